"""The source checkpoint on disk: headers, tensors, shards, the hub, architecture and names."""
