"""Ahead-of-time compilation of every kernel in its default configuration, for GPUs that need not be there.

The figures are compared with ``compiled.json``; after a change of the kernels or of Triton, see what moved and write
it anew with ``python tests/triton/test_triton_compile.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from aot import Report, compile_launch, compiled_launch  # noqa: E402

from moe3d.kernels import passes, tables  # noqa: E402
from moe3d.kernels.pack import Parameters  # noqa: E402
from moe3d.kernels.plan import Launch, Mixing, Precision  # noqa: E402

TABLE = Path(__file__).with_name("compiled.json")
# What a block may have; sm_80's configurations also serve sm_86, sm_89 and sm_120, whose limit is lower than its own.
SHARED_MEMORY = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
PRECISIONS = {"half": Precision(torch.bfloat16, "half"), "tf32": Precision(torch.float32, "tf32"),
              "ieee": Precision(torch.float32, "ieee")}  # fmt: skip
NO_PRODUCTS = {"_upsample_kernel", "_downsample_kernel", "_column_table_kernel"}
# Bytes, by Triton's version and case. 3.7 comes with PyTorch 2.13's builds for CUDA; there a candidate for tuning, no
# default, spills two registers.
SPILLS = {("3.7", (100, "half", "tma")): 8}
CASES = [
    *((capability, "half", variant) for capability in SHARED_MEMORY for variant in ("", "skip", "columns")),
    *((capability, "half", "tma") for capability in (90, 100)),
    *((capability, "tf32", "") for capability in SHARED_MEMORY),
    (90, "tf32", "columns"),
    (90, "ieee", ""),
]


def call(precision: Precision, variant: str, experts: int = 4) -> passes.Call:
    """VGGT's tail with the paper's budget: C = 128, K = 4 experts of 32, a gate of 128."""
    w1, gate = torch.zeros(experts, 32, 128, 3, 3), torch.zeros(128, 128, 3, 3)
    parameters = Parameters(w1, w1[..., 0, 0, 0], torch.zeros(experts, 2, 32), torch.zeros(experts, 2),
                            gate, gate[:, 0, 0, 0], torch.zeros(experts, 128), torch.zeros(experts))  # fmt: skip
    return passes.Call(
        x=torch.zeros(1, 128, 5, 5, dtype=precision.dtype).contiguous(memory_format=torch.channels_last),
        parameters=parameters, gate_logits=None, pos_x=torch.zeros(18, 64), pos_y=torch.zeros(9, 64), size=(9, 18),
        mixing=Mixing(experts, 2, "exp", "expp1", "mean", 1.0, 0.3, True), return_experts=False,
        skip_below=1e-6 if variant == "skip" else 0.0, precision=precision, multiprocessors=132,
    )  # fmt: skip


def launches_of(this: passes.Call, capability: int, kind: str, variant: str) -> dict[str, Launch]:
    """One launch of each kernel that the variant has to itself; the backward pass has one variant."""

    def config(kernel: str) -> tables.Config:
        return tables.config(kernel, kind, (capability // 10, capability % 10), "none", this.columns)

    outputs = passes.new_outputs(this)
    if variant:
        chosen = config("columns" if variant == "columns" else "forward")._replace(tma=variant == "tma")
        found = [
            launch
            for launch in passes.forward_pass(this, outputs, chosen)
            if launch.kernel.__name__ in ("_forward_kernel", "_column_table_kernel") or launch.arguments.get("FLAG")
        ]
        return {launch.kernel.__name__: launch for launch in found}
    forward = passes.forward_pass(this, outputs, config("forward"))
    backward = passes.Backward(this, outputs, passes.Gradients(*[True] * 9, False), config).launches()
    return {launch.kernel.__name__: launch for launch in (*forward, *backward)}


def reports(capability: int, kind: str, variant: str) -> dict[str, Report]:
    found = launches_of(call(PRECISIONS[kind], variant), capability, kind, variant)
    return {name: compile_launch(launch, capability) for name, launch in found.items()}


def key(capability: int, kind: str, variant: str) -> str:
    return "/".join(part for part in (f"sm_{capability}", kind, variant) if part)


@pytest.mark.parametrize("case", CASES, ids=lambda case: key(*case))
def test_compiled_kernels(case):
    capability, kind, _ = case
    table = json.loads(TABLE.read_text())
    compiled = reports(*case)
    assert "_forward_kernel" in compiled
    spills = SPILLS.get((triton.__version__.rpartition(".")[0], case), 0)
    for name, report in compiled.items():
        assert report.spills <= spills, (name, report)
        assert report.registers > 32, f"{name} was compiled to a stub: {report}"
        assert report.shared <= SHARED_MEMORY[capability], (name, report)
        if kind != "ieee" and name not in NO_PRODUCTS:
            assert report.matrix >= 2, f"{name} uses no matrix unit: {report}"
        if table["triton"] == triton.__version__:
            assert report._asdict() == pytest.approx(table[key(*case)][name], rel=0.05), name


@pytest.mark.parametrize(
    ("capability", "kind", "experts"),
    [(90, "half", 8), (90, "half", 16), (90, "tf32", 16), (80, "ieee", 8), (90, "ieee", 16)],
)
def test_many_experts_spill_nothing(capability, kind, experts):
    this = call(PRECISIONS[kind], "", experts)
    for name, launch in launches_of(this, capability, kind, "").items():
        assert compile_launch(launch, capability).spills == 0, name


@pytest.mark.parametrize("capability", [80, 90])
def test_divisions_of_which_exactness_is_promised_are_exact(capability):
    """`/` would be div.full.f32, up to 2 ulp off: no weight of exactly 1/K, no correctly rounded position."""
    this = call(PRECISIONS["half"], "")
    launches = launches_of(this, capability, "half", "columns") | launches_of(this, capability, "half", "")
    for name in ("_upsample_kernel", "_downsample_kernel", "_column_table_kernel", "_forward_kernel"):
        code = compiled_launch(launches[name], capability).asm["ptx"]
        assert "div.rn.f32" in code, name
        assert name == "_forward_kernel" or "div.full.f32" not in code, name  # its other quotients may be off


def test_sizes_of_one_compile():
    """Triton makes a constant of an integer that is 1, and constants lack the methods of tensors."""
    this = call(PRECISIONS["half"], "")._replace(size=(1, 1), pos_x=None, pos_y=None)
    this = this._replace(x=this.x[:, :, :1, :1])
    for launch in launches_of(this, 90, "half", "").values():
        assert compile_launch(launch, 90).registers > 32


if __name__ == "__main__":
    figures = {key(*case): {n: r._asdict() for n, r in reports(*case).items()} for case in CASES}
    TABLE.write_text(json.dumps({"triton": triton.__version__, **figures}, indent=1) + "\n")
