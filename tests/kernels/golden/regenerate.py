"""Writes `modelopt.safetensors`: weights and what NVIDIA's ModelOpt exports for them.

python tests/kernels/golden/regenerate.py        (needs nvidia-modelopt; it runs on a CPU)
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernel_cases import five_distributions

GOLDEN = Path(__file__).with_name("modelopt.safetensors")


def weights() -> dict[str, Tensor]:
    """bfloat16 `[16, 128]` by name; with zeros of both signs, tiny blocks and exact ties."""
    found = {name: w.bfloat16() for name, w in five_distributions(16, 128).items()}
    wide = five_distributions(16, 128)["normal"] * torch.logspace(-9, 1, 16)[:, None]
    wide[2], wide[3, :40] = 0.0, -0.0
    found["wide"] = wide.bfloat16()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    ties = torch.cat((ties, -ties))
    found["ties"] = (ties * 2.0 ** torch.arange(-8, 8)[:, None]).repeat(1, 8).bfloat16()
    return found


def exported(w: Tensor) -> dict[str, Tensor]:
    """Codes, block scales and global scale of NVFP4, codes and scale of FP8, as ModelOpt gives."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    quantized, block_scale, global_scale = NVFP4QTensor.quantize(w, 16)
    fp8_scale = (w.float().abs().amax() / 448.0).float()
    fp8, _ = FP8QTensor.quantize(w, fp8_scale)
    return {
        "codes": quantized._quantized_data.view(torch.uint8),
        "block_scale": block_scale.view(torch.uint8),
        "global_scale": global_scale.float().reshape(()),
        "fp8": fp8._quantized_data.view(torch.uint8),
        "fp8_scale": fp8_scale.reshape(()),
    }


def main() -> None:
    """Write the file."""
    tensors = {}
    for name, w in weights().items():
        tensors[f"{name}.weight"] = w
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in exported(w).items()}
    save_file(tensors, GOLDEN)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
