"""``pytest bench --benchmark-only``, in a process of its own, with a wrong backend among the right ones."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
PLUGIN = """
from moe3d.benchmark import roofline
from moe3d.ops import dispatch
from moe3d.ops.reference import ReferenceBackend

class Wrong(ReferenceBackend):
    def forward(self, tensors, options):
        output = super().forward(tensors, options)
        return output._replace(prediction=output.prediction.roll(1, -1))

dispatch._REGISTRY["cpu"] = Wrong()
roofline._PROBES["cpu"] = (1 << 20, 64)
"""


def run_bench(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    (tmp_path / "wrong_backend.py").write_text(PLUGIN)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--benchmark-only",
        "-p",
        "wrong_backend",
        "-p",
        "no:cacheprovider",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True
    )


def test_the_suites_refuse_the_wrong_time_the_right_and_sum_up(tmp_path):
    done = run_bench(tmp_path, "--smoke", "--device", "cpu", "-k", "test_scaling")
    text = done.stdout
    assert done.returncode == 1, text
    assert "1 failed, 4 passed" in text and "refused: wrong: relative RMS error" in text
    assert "benchmark 'scaling 28x28-9f-K1-ieee': 4 tests" in text  # pytest-benchmark's own table
    ours = text[text.index("the tail: fused features to depth") :]
    table = ours[: ours.index("overhead of the mixture")].splitlines()
    names = {line.split("  ")[0] for line in table[3:] if line}
    assert names == {"stock", "stock, cached embedding", "eager concatenated", "reference"}
    assert "GFLOPs +4.97% (the paper: +4.97%)" in ours and "measured ceilings: copy" in ours


def test_a_smoke_run_is_never_recorded():
    spec = spec_from_file_location("front", ROOT / "bench" / "conftest.py")
    front = module_from_spec(spec)
    spec.loader.exec_module(front)
    options = SimpleNamespace(getoption=lambda name: name in ("smoke", "record"))
    with pytest.raises(pytest.UsageError, match="run it without --record"):
        front.pytest_configure(options)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["default", "full", "smoke"])
def test_the_cases_of_every_suite(mode, device):
    covered = set()
    for name in sorted(path.stem for path in (ROOT / "bench").glob("test_*.py")):
        module = import_module(f"bench.{name}")
        cases = module.cases(mode, device)
        labels = [(case.channels, case.label) for case, _ in cases]
        assert len(set(labels)) == len(labels), f"{name} measures something twice"
        assert all(case.device == device for case, _ in cases)
        assert len(set(module.PEERS)) == len(module.PEERS) > 0
        covered |= {name} if cases else set()
        if name == "test_tail":
            assert {case.frames for case, _ in cases} == ({1, 8} if mode != "smoke" else {1, 2})
    everywhere = {"test_tail", "test_head", "test_model", "test_memory"}
    assert covered >= everywhere
    if mode != "default":
        assert covered >= everywhere | {"test_training", "test_scaling", "test_latency"}


def test_the_full_run_holds_all_that_is_asked_of_it():
    scaling, tail = import_module("bench.test_scaling"), import_module("bench.test_tail")
    cases = [case for case, _ in scaling.cases("full", "cpu")]
    assert {case.frames for case in cases} == {1, 2, 4, 8, 16, 32, 64}
    assert {case.experts for case in cases} == {1, 2, 4, 8, 16}
    sizes = {case.size for case, _ in tail.cases("full", "cpu")}
    assert sizes == {(154, 518), (392, 518), (518, 518), (1036, 1036)}


@pytest.mark.parametrize("supported", [True, False])
def test_the_full_run_races_in_bfloat16_where_pytorch_has_convolutions_of_it(monkeypatch, supported):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    cases = [case for case, _ in import_module("bench.test_tail").cases("full", "cpu")]
    assert {case.frames for case in cases if case.precision == "bf16"} == ({1, 8} if supported else set())
