"""Compiles prepared launches for GPUs that need not be there, and reads the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
_MATRIX = re.compile(r"\b(HGMMA|HMMA|QGMMA|UTC\w*MMA)\b")


class Report(NamedTuple):
    registers: int
    shared: int  #        bytes
    spills: int  #        bytes of local memory per thread
    matrix: int  #        tensor-core instructions, static count
    instructions: int  #  all of them


def compile_launch(launch, capability: int) -> Report:
    compiled = compiled_launch(launch, capability)
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def compiled_launch(launch, capability: int):
    """Triton's own object, with the code of every step in ``asm``."""
    signature, constexprs, attrs = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{_TYPES[value.base.dtype][1:]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constexprs[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs, attrs)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _read(cubin: bytes, shared: int) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = _cuobjdump("--dump-resource-usage", path), _cuobjdump("--dump-sass", path)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);", code, re.M)
    return Report(registers, shared, stack + local, len(_MATRIX.findall(code)), len(instructions))


def _cuobjdump(option: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
