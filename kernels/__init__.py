"""Triton kernels of the operation, installed as ``moe3d.kernels``."""
