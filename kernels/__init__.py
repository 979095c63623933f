"""Triton kernels of the operation, installed as ``moe3d.kernels``.

Each file holds one kernel with a function that prepares its launch; ``plan`` decides shapes, ``tables`` launch
configurations. Nothing here knows of autograd, options or dispatch: :mod:`moe3d.ops.triton` puts the kernels together.
"""
