"""The machine code of the CUDA kernels in the compiled module, for every GPU it was built for: none needs be there.

Registers, local memory and tensor-core instructions are compared with ``compiled.json``; after a change of the kernels
or of nvcc, see what moved and write it anew with ``python tests/native/test_native_cuda_code.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from moe3d import _build

TABLE = Path(__file__).with_name("compiled.json")
# An instruction of the tensor cores multiplies 16-bit numbers, or tf32; "Ieee" has only the vector units.
MATRIX = {"Bf16": r"HMMA\.16816\.F32\.BF16", "Half": r"HMMA\.16816\.F32\b(?!\.BF16)", "Tf32": r"HMMA\.1688\.F32\.TF32"}
PRODUCTS = ("Convolution", "LowResolution", "WeightGradient")
MAY_SPILL = ("Mix", "MixGradient", "Reach")  # one thread a pixel, any number of experts: bound by memory
REGISTERS = 65536


class Report(NamedTuple):
    registers: int
    local: int  #         bytes of local memory a thread
    matrix: int  #        tensor-core instructions, static count
    instructions: int  #  all of them


def module():
    return _build.native().module


def cuobjdump() -> str | None:
    """Triton brings one, and so does the CUDA toolkit."""
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled and bundled.is_file() else shutil.which("cuobjdump")


pytestmark = [
    pytest.mark.skipif(not hasattr(module(), "cuda_forward"), reason=f"no CUDA part: {_build.record()['cuda']}"),
    pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump"),
]


def dump(*options: str) -> str:
    command = [cuobjdump(), *options, module().__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def readable(mangled: str) -> str:
    """``Convolution Bf16 128 SecondLayer`` from the name of ``entry<Convolution<Bf16, 128, SecondLayer<Bf16>>>``."""
    words, rest = [], mangled.partition("entryI")[2]
    while found := re.search(r"Li(\d+)E|(\d+)([A-Za-z]\w*)", rest):
        if found[1]:
            words.append(found[1])
            rest = rest[found.end() :]
        else:
            end = found.start(3) + int(found[2])
            words.append(rest[found.start(3) : end])
            rest = rest[end:]
    return " ".join(words[: words.index("Params")])


@functools.cache
def reports() -> dict[str, dict[str, Report]]:
    """{GPU: {kernel: report}}."""
    found: dict[str, dict[str, Report]] = defaultdict(dict)
    usage: dict[tuple[str, str], tuple[int, int]] = {}
    arch = ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            registers, stack, local = (int(re.search(rf"{key}:(\d+)", line)[1]) for key in ("REG", "STACK", "LOCAL"))
            usage[arch, name] = registers, stack + local
    for part in re.split(r"^(?=[ \t]*code for sm_)", dump("--dump-sass"), flags=re.M)[1:]:
        arch = re.search(r"code for (sm_\w+)", part)[1]
        for function in part.split("Function : ")[1:]:
            name = function.split(maxsplit=1)[0]
            code = "\n".join(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);", function, re.M))
            matrix = len(re.findall(r"\bHMMA\b", code))
            kernel = readable(name)
            found[arch][kernel] = Report(*usage[arch, name], matrix, code.count("\n") + 1)
            expected = next((MATRIX[w] for w in kernel.split() if w in MATRIX), None)
            if expected and matrix:
                assert len(re.findall(expected, code)) == matrix, f"{kernel} multiplies another type"
    return dict(found)


def test_every_listed_gpu_has_code_and_the_newest_also_ptx():
    archs = sorted(reports(), key=lambda arch: int(re.search(r"\d+", arch)[0]))
    assert archs and all(int(re.search(r"\d+", arch)[0]) >= 80 for arch in archs)
    assert archs[-1] in dump("--list-ptx")


def test_the_products_use_the_tensor_cores_and_fit():
    for arch, kernels in reports().items():
        assert {f"Convolution {t} {w} SecondLayer" for t in (*MATRIX, "Ieee") for w in (32, 128)} <= set(kernels)
        assert {f"LowResolution {t}" for t in (*MATRIX, "Ieee")} <= set(kernels)
        # two blocks of ten warps: five warps to each quarter of the registers
        assert all(kernels[f"LowResolution {t}"].registers <= 96 for t in ("Bf16", "Half")), arch
        for name, report in kernels.items():
            family, *rest = name.split()
            assert report.registers > 8, (arch, name, report)
            if family not in MAY_SPILL:
                assert report.local == 0, f"{arch}: {name} spills: {report}"
            if family in PRODUCTS:
                assert report.registers * 256 <= REGISTERS, (arch, name, report)
                assert (report.matrix >= 4) == ("Ieee" not in rest), (arch, name, report)


def test_nothing_has_grown():
    table = json.loads(TABLE.read_text())
    if table["nvcc"] != module().cuda_compiler:
        pytest.skip(f"the table is {table['nvcc']}'s, and this is {module().cuda_compiler}")
    for arch, kernels in reports().items():
        for name, report in kernels.items():
            assert report._asdict() == pytest.approx(table[arch][name], rel=0.05), (arch, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_a_launch_is_an_error_in_words():
    problem, execution = module().Problem(), module().Execution()
    status = module().cuda_forward(problem, module().Outputs(), execution)
    assert status >= 1000 and len(module().cuda_message(status)) > 10


if __name__ == "__main__":
    figures = {arch: {name: r._asdict() for name, r in sorted(found.items())} for arch, found in reports().items()}
    TABLE.write_text(json.dumps({"nvcc": module().cuda_compiler, **figures}, indent=1) + "\n")
