"""The CUDA kernels on a CPU: compiled for the host against an emulator of the device (csrc/test/device_host.h).

:func:`build` makes the library; :class:`EmulatedBackend` is the ``cuda`` backend with that library in the place of the
compiled module, on CPU tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from moe3d.ops import dispatch
from moe3d.ops.native_cuda import CUDABackend

CSRC = Path(__file__).resolve().parents[2] / "csrc"
_Pointer = ctypes.c_void_p


def _struct(name: str, **fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _pointers(*names: str) -> dict:
    return dict.fromkeys(names, _Pointer)


_PARAMETERS = ("expert_w1", "expert_b1", "expert_w2", "expert_b2", "gate_w1", "gate_b1", "gate_w2", "gate_b2")
_SIZES = ("batch", "channels", "in_height", "in_width", "height", "width", "experts", "expert_hidden", "outputs")
# csrc/moe_head.h, field by field
Problem = _struct(
    "Problem",
    **dict.fromkeys((*_SIZES, "gate_hidden"), ctypes.c_int64),
    x=_Pointer,
    x_element=ctypes.c_int32,
    x_strides=ctypes.c_int64 * 4,
    **_pointers(*_PARAMETERS, "gate_logits", "pos_x", "pos_y", "packed"),
    temperature=ctypes.c_float,
    activation=ctypes.c_int32,
    conf_activation=ctypes.c_int32,
    mode=ctypes.c_int32,
    gap=ctypes.c_float,
    skip_below=ctypes.c_float,
    bf16=ctypes.c_bool,
    formulation=ctypes.c_int32,
    isa=ctypes.c_char_p,
    threads=ctypes.c_int32,
)
_MAPS = _pointers("prediction", "confidence", "entropy", "weights", "hypotheses")
Outputs, Cotangents = _struct("Outputs", **_MAPS), _struct("Cotangents", **_MAPS)
Gradients = _struct("Gradients", **_pointers("x", *_PARAMETERS, "gate_logits"))
Execution = _struct(
    "Execution",
    arithmetic=ctypes.c_int32,
    device=ctypes.c_int32,
    stream=_Pointer,
    workspace=_Pointer,
    workspace_bytes=ctypes.c_int64,
)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def build(*flags: str) -> Path:
    """Compiles the library, or finds the one that the same sources gave before."""
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted(CSRC.rglob("*.[hc]*")):
        digest.update(path.read_bytes())
    library = Path(tempfile.gettempdir()) / f"moe3d-emulator-{os.getuid()}-{digest.hexdigest()[:16]}.so"
    if not library.is_file():
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        command = [compiler(), "-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", *flags]
        subprocess.run([*command, CSRC / "test" / "emulated.cpp", "-o", unfinished], check=True)
        unfinished.rename(library)
    return library


class Emulator:
    """The library under the names of the compiled module."""

    Problem, Outputs, Cotangents, Gradients, Execution = Problem, Outputs, Cotangents, Gradients, Execution

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        for name, struct in (("problem", Problem), ("execution", Execution)):
            size = getattr(self._library, f"moe_size_of_{name}")
            size.restype = ctypes.c_int64
            assert size() == ctypes.sizeof(struct), f"{name} is declared otherwise in csrc/moe_head.h"
        for name in ("forward", "backward"):
            getattr(self._library, f"moe_cuda_{name}_workspace").restype = ctypes.c_int64

    def __getattr__(self, name: str):
        function = getattr(self._library, f"moe_{name}")
        return lambda *arguments: function(
            *(ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments)
        )

    def policy(self, order: int, late_copies: bool) -> None:
        """The order of threads between two barriers (0 up, 1 down, else a shuffle), and when copies happen."""
        self._library.moe_policy(order, ctypes.c_bool(late_copies))

    def band_bytes(self, forward: int = 96 << 20, backward: int = 128 << 20) -> None:
        """What a band may take of the workspace; without arguments, as it is on a GPU."""
        self._library.moe_band_bytes(ctypes.c_int64(forward), ctypes.c_int64(backward))

    def cuda_message(self, status: int) -> str:
        return f"status {status}"


class EmulatedBackend(CUDABackend):
    def __init__(self, emulator: Emulator):
        self.emulator = emulator

    def unavailable(self) -> str | None:
        return None

    def _unsupported_device(self, device) -> str | None:
        return None

    def _module(self) -> Emulator:
        return self.emulator


def install() -> None:
    """From now on "cuda" is the emulator: for whole suites of tests."""
    dispatch._REGISTRY["cuda"] = EmulatedBackend(Emulator(build()))
