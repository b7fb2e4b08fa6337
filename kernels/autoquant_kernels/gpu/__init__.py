"""The kernels in Triton; imported only where Triton and a GPU (or its interpreter) are there."""
