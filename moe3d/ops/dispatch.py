"""The registry of backends, and the choice of one.

To add a backend: subclass :class:`~moe3d.ops.backend.Backend` in a module of this folder and register an instance in
``_REGISTRY``.
"""

from __future__ import annotations

from moe3d.ops.backend import Backend
from moe3d.ops.native import CPUBackend
from moe3d.ops.native_cuda import CUDABackend
from moe3d.ops.reference import ReferenceBackend
from moe3d.ops.triton import TritonBackend
from moe3d.ops.types import HeadOptions, HeadTensors

_REGISTRY: dict[str, Backend] = {  # in the order in which "auto" tries them: the fastest first
    "triton": TritonBackend(),
    "cuda": CUDABackend(),
    "cpu": CPUBackend(),
    "reference": ReferenceBackend(),
}
AUTO = "auto"
NAMES = (AUTO, *_REGISTRY)


def backends() -> dict[str, str | None]:
    """Each backend's name, with None if it can run on this machine, else the reason why not."""
    return {name: backend.unavailable() for name, backend in _REGISTRY.items()}


def automatic_backends() -> list[str]:
    """The backends that "auto" may choose on this machine, the fastest first."""
    return [name for name, backend in _REGISTRY.items() if backend.automatic and backend.unavailable() is None]


def select(name: str, tensors: HeadTensors, options: HeadOptions) -> Backend:
    """The backend that serves this call; "auto" takes the fastest that can.

    Raises RuntimeError with the reason where an explicitly chosen backend cannot run, or none can.
    """
    reason = None
    for candidate in automatic_backends() if name == AUTO else (name,):
        reason = _why_not(_REGISTRY[candidate], tensors, options)
        if reason is None:
            return _REGISTRY[candidate]
    raise RuntimeError(f"backend {candidate!r} cannot run here because {reason}")


def _why_not(backend: Backend, tensors: HeadTensors, options: HeadOptions) -> str | None:
    return backend.unavailable() or backend.unsupported(tensors, options)
