"""What the kernels must return, in plain PyTorch operations."""
