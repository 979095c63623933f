"""The formulations of the forward pass, at low resolution, by Winograd's algorithm and with float32 numbers as sums of
two bfloat16 ones: against the float64 truth, what must not depend on the choice, and the choice itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe3d import _build
from moe3d.benchmark.case import Case
from moe3d.benchmark.probe import peak_memory
from moe3d.ops import native
from support import truth
from support.accuracy import ENTROPY_ABSOLUTE, Comparison, assert_within
from support.isas import bf16_isas, isas
from support.problems import Problem, random_problem

pytestmark = pytest.mark.skipif(_build.native().module is None, reason=_build.native().reason or "")

FORMULATIONS = ("low-resolution", "winograd", "bf16x3")
INEXACT = [("winograd", isa) for isa in isas()] + [("bf16x3", isa) for isa in bf16_isas()]


@pytest.fixture(params=FORMULATIONS)
def formulation(request, monkeypatch):
    monkeypatch.setenv(native.FORMULATION_VARIABLE, request.param)
    return request.param


def _set(request, monkeypatch):
    formulation, isa = request.param
    monkeypatch.setenv(native.FORMULATION_VARIABLE, formulation)
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    return formulation


@pytest.fixture(params=INEXACT, ids="-".join)
def inexact(request, monkeypatch):
    """Every formulation with other rounding errors than plain products', by every instruction set that has it."""
    return _set(request, monkeypatch)


@pytest.fixture(params=[("low-resolution", isa) for isa in isas()] + INEXACT, ids="-".join)
def any_way(request, monkeypatch):
    """Every formulation by every instruction set."""
    return _set(request, monkeypatch)


@pytest.fixture
def winograd(monkeypatch):
    monkeypatch.setenv(native.FORMULATION_VARIABLE, "winograd")


def run(problem: Problem, **options):
    return problem.run(backend="cpu", return_experts=True, **options)


HEAD = {"batch": 1, "channels": 24, "hidden": 16, "gate_hidden": 16, "experts": 2, "pos": True}
# Where float32 positions leave other rounding errors room: op.md's rule holds to the letter.
ACCURATE = [
    {"source": (64, 64), "size": (112, 112), "channels": 6},
    {"source": (63, 90), "size": (109, 160), "pos": False},
    {"source": (100, 20), "size": (175, 20), "experts": 1, "gate": False},  # one axis is not resampled
    {"source": (90, 3), "size": (163, 7), "experts": 16, "mode": "argmax"},
    {"source": (88, 30), "size": (154, 53), "channels": 33, "pos": False, "hidden": 17, "gate_hidden": 33},
]
# Less room, but enough for tiles whose sums are in parts.
NARROW = {"source": (70, 40), "size": (131, 70), "channels": 64, "prediction_channels": 3, "activation": "inv_log"}


@pytest.mark.parametrize("shape", [*ACCURATE, NARROW], ids=str)
def test_as_accurate_as_pytorch(inexact, poisoned, shape):
    if inexact == "bf16x3" and shape is NARROW:
        pytest.skip("bf16x3 is not chosen here")
    problem = random_problem(**(HEAD | shape))
    clear = truth.decided(problem)
    outputs = run(problem), truth.evaluate(problem, conv=torch.float32, mix=torch.float32), truth.evaluate(problem)
    for name, *values in zip(outputs[0]._fields, *outputs, strict=True):
        where = clear if name == "confidence" else clear[:, None] if name == "prediction" else torch.ones(())
        compared = Comparison(*((v.double() * where).flatten() for v in values))
        assert_within(name, compared, ENTROPY_ABSOLUTE if name == "entropy" else 0.0)


sizes = st.integers(1, 12)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([2, 6, 16, 34]),
    source=st.tuples(sizes, sizes),
    more=st.tuples(st.integers(0, 15), st.one_of(st.integers(0, 15), st.integers(100, 120))),
    experts=st.sampled_from([1, 2, 5, 16]),
    hidden=st.sampled_from([1, 17, 33]),
    gate_hidden=st.sampled_from([1, 33]),
    pos=st.booleans(),
    gate_logits=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes(inexact, source, more, channels_last, **shape):
    """Sizes at which nobody would choose it, where its errors are largest: a slip is one of order one."""
    problem = random_problem(source=source, size=(source[0] + more[0], source[1] + more[1]), **shape)
    if channels_last:
        problem = problem.with_tensors(x=problem.tensors["x"].contiguous(memory_format=torch.channels_last))
    for name, a, r in zip(native.MoEOutput._fields, run(problem), truth.evaluate(problem), strict=True):
        assert ((a - r).abs() / (1 + r.abs())).max() < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_in_sixteen_bits(inexact, dtype):
    shape = HEAD | {"source": (9, 20), "size": (16, 35), "pos": False}
    problem = random_problem(**shape, dtype=dtype, param_dtype=torch.float32)
    wide = problem.with_tensors(x=problem.tensors["x"].float())
    for a, b in zip(run(problem, precision="ieee"), run(wide), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("skip_below", [0.0, 1e-3])
@pytest.mark.parametrize("batch", [1, 3])
def test_results_do_not_depend_on_threads_or_other_frames(any_way, threads, batch, skip_below):
    problem = random_problem(batch=batch, source=(20, 40), size=(35, 130), pos=True, gate_logits=True)
    found = {}
    for count in (1, 2, 3, 7):
        threads(count)
        found[count] = problem.run(backend="cpu", skip_below=skip_below)[:3]
    for results in found.values():
        assert all(torch.equal(a, b) for a, b in zip(results, found[1], strict=True))
    last = {name: problem.tensors[name][-1:] for name in ("x", "gate_logits")}
    alone = problem.with_tensors(**last).run(backend="cpu", skip_below=skip_below)[:3]
    assert all(torch.equal(a[-1:], b) for a, b in zip(found[1], alone, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pixel", [(0, 0), (7, 13), (19, 39)])
def test_what_is_not_finite_stays_in_its_footprint(inexact, value, pixel):
    """Tiles would spread it, and low halves be NaN: such bands are done again, the same but for rounding."""
    source, size = (20, 40), (35, 70)
    problem = random_problem(**(HEAD | {"batch": 2}), source=source, size=size)
    clean = run(problem)
    x = problem.tensors["x"].clone()
    x[(1, 2, *pixel)] = value
    dirty = run(problem.with_tensors(x=x))
    near = []
    for at, s, t in zip(pixel, source, size, strict=True):
        position = torch.arange(t) * ((s - 1) / (t - 1))
        read = [((position - at).abs() < reach).float()[None, None] for reach in (1 - 1e-9, 2)]
        near.append([torch.nn.functional.max_pool1d(r, 3, 1, 1)[0, 0].bool() for r in read])
    inside, around = (rows[:, None] & columns[None] for rows, columns in zip(*near, strict=True))
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(after[0], before[0])
        torch.testing.assert_close(after[1][..., ~around], before[1][..., ~around], rtol=1e-4, atol=1e-5)
        if math.isnan(value):
            assert after[1][..., inside].isnan().all()
    if inexact == "winograd":  # whose bands are low; others are not touched at all
        far = (torch.arange(size[0]) - pixel[0] * 1.75).abs() > 12
        assert all(torch.equal(a[1][..., far, :], b[1][..., far, :]) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("name", ["expert_w1", "gate_w1", "expert_b1"])
def test_weights_that_are_not_finite(monkeypatch, name):
    problem = random_problem(**HEAD, source=(12, 20), size=(21, 35))
    bad = problem.tensors[name].clone()
    bad.view(-1)[3] = math.nan
    found = []
    for formulation in FORMULATIONS:
        monkeypatch.setenv(native.FORMULATION_VARIABLE, formulation)
        found.append(run(problem.with_tensors(**{name: bad})))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [3e37, 3.4e38])  # in Winograd's transform; as a bfloat16 number
def test_numbers_that_overflow_in_the_formulation_alone(monkeypatch, value):
    problem = random_problem(**HEAD, source=(12, 20), size=(21, 35), activation="linear", conf_activation="sigmoid")
    x = problem.tensors["x"].clone()
    x[0, :, 3, 4] = value
    w1 = torch.zeros_like(problem.tensors["expert_w1"])
    w1[:, 0, 0, 1, 1] = 1.0
    problem = problem.with_tensors(x=x, expert_w1=w1)
    found = []
    for formulation in FORMULATIONS:
        monkeypatch.setenv(native.FORMULATION_VARIABLE, formulation)
        found.append(run(problem).hypotheses)
    for other in found[1:]:
        assert other.isfinite().all()
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-6 * found[0].abs().max().item())


def test_an_expert_is_left_out_of_whole_cells(winograd):
    """Expert 1 is NaN everywhere: it shows exactly in the cells (here 6 rows, 48 columns) where it was computed."""
    height, width = 40, 96
    problem = random_problem(batch=1, experts=2, source=(20, 50), size=(height, width), skip_below=1e-6)
    nan = problem.tensors["expert_b2"].clone()
    nan[1] = torch.nan
    logits = torch.zeros(1, 2, height, width)
    logits[:, 1] = -60.0
    logits[:, 1, 20, 70] = 0.0
    zero = {name: torch.zeros_like(problem.tensors[name]) for name in ("gate_w2", "gate_b2")}
    output = problem.with_tensors(expert_b2=nan, gate_logits=logits, **zero).run(backend="cpu")
    computed = torch.zeros(height, width, dtype=torch.bool)
    computed[18:24, 48:96] = True
    assert torch.equal(output.prediction[0, 0].isnan(), computed)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"source": (64, 64), "size": (112, 112), "isa": "avx512"}, "winograd"),
        ({"source": (64, 64), "size": (112, 112), "isa": "amx"}, "winograd"),
        ({"source": (148, 148), "size": (259, 259), "channels": 128, "batch": 1, "isa": "amx"}, "bf16x3"),
        ({"source": (64, 64), "size": (112, 112), "precision": "bf16"}, "low-resolution"),
        ({"source": (64, 64), "size": (64, 64)}, "low-resolution"),  # PyTorch interpolates nothing
        ({"source": (65, 65), "size": (129, 129)}, "low-resolution"),  # or exactly, at a ratio of 2
        ({"source": (16, 16), "size": (28, 28)}, "low-resolution"),  # or nearly, at small positions
        ({"source": (60, 60), "size": (200, 200)}, "low-resolution"),  # fewer operations
        ({"source": (112, 112), "size": (64, 64)}, "low-resolution"),
    ],
    ids=str,
)
def test_the_choice(monkeypatch, shape, expected):
    if shape.get("precision") == "bf16" and not native.has_bf16_products():
        pytest.skip("this processor has no avx512_bf16")
    if "isa" in shape:
        if shape["isa"] not in _build.native().module.supported_isas():
            pytest.skip(f"this processor has no {shape['isa']}")
        monkeypatch.setenv(native.ISA_VARIABLE, shape["isa"])
    problem = random_problem(**(HEAD | {name: value for name, value in shape.items() if name != "isa"}))
    chosen = problem.run(backend="cpu").prediction
    monkeypatch.setenv(native.FORMULATION_VARIABLE, expected)
    assert torch.equal(chosen, problem.run(backend="cpu").prediction)
    if expected != "low-resolution":
        monkeypatch.setenv(native.FORMULATION_VARIABLE, "low-resolution")
        assert not torch.equal(chosen, problem.run(backend="cpu").prediction)


def test_an_unknown_formulation_is_refused(monkeypatch):
    monkeypatch.setenv(native.FORMULATION_VARIABLE, "fft")
    with pytest.raises(
        RuntimeError, match="MOE3D_CPU_FORMULATION='fft', expected one of auto, low-resolution, winograd, bf16x3"
    ):
        random_problem().run(backend="cpu")


@pytest.mark.parametrize(("formulation", "products"), [("winograd", 64), ("bf16x3", 9)])
def test_extra_memory_of_a_frame(monkeypatch, formulation, products):
    """Beyond inputs and outputs, for two threads, with the packed weights that stay between calls: at most 20 MB."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv(native.FORMULATION_VARIABLE, formulation)
    case = Case(1, 154, 518, 4)
    packed = products * case.channels * case.hidden * 4
    outputs = 3 * 154 * 518 * 4
    assert peak_memory("tail", "cpu", case)["peak_bytes"] - outputs + packed < 20e6


# --- packed weights that are kept between calls ---


def packings(monkeypatch) -> list[int]:
    """Grows by one with each packing."""
    counted: list[int] = []
    call = native._CPUCall.run

    def counting(self, function, *structs):
        if function == "cpu_pack":
            counted.append(1)
        return call(self, function, *structs)

    monkeypatch.setattr(native._CPUCall, "run", counting)
    return counted


def in_place(w: torch.Tensor) -> None:
    w.mul_(1.5)


def through_data(w: torch.Tensor) -> None:
    w.data.mul_(1.5)


def one_number(w: torch.Tensor) -> None:
    w[..., 0, 1, 1][-1] += 1.0


@pytest.mark.parametrize("change", [in_place, through_data, one_number])
@pytest.mark.parametrize("name", ["expert_w1", "gate_w1"])
def test_packed_weights_are_never_stale(formulation, monkeypatch, name, change):
    counted = packings(monkeypatch)
    problem = random_problem(**HEAD, source=(12, 20), size=(21, 35))
    before = run(problem)
    assert all(torch.equal(a, b) for a, b in zip(run(problem), before, strict=True)) and len(counted) == 1
    with torch.no_grad():
        change(problem.tensors[name])
    after = run(problem)
    fresh = run(problem.with_tensors(**{n: t.clone() for n, t in problem.tensors.items()}))
    assert all(torch.equal(a, b) for a, b in zip(after, fresh, strict=True))
    assert not torch.equal(after.prediction, before.prediction)


def test_packed_weights_follow_an_optimiser(formulation):
    problem = random_problem(**HEAD, source=(12, 20), size=(21, 35)).leaves()
    optimiser = torch.optim.SGD([problem.tensors["expert_w1"]], lr=1.0)
    run(problem).prediction.sum().backward()
    optimiser.step()
    fresh = problem.with_tensors(expert_w1=problem.tensors["expert_w1"].detach().clone())
    assert torch.equal(run(problem).prediction, run(fresh).prediction)


def test_packed_weights_go_with_the_parameters(winograd):
    problem = random_problem(**HEAD, source=(12, 20), size=(21, 35))
    before = len(native._packed)
    run(problem)
    assert len(native._packed) == before + 1
    del problem
    assert len(native._packed) == before


def test_packed_weights_of_each_instruction_set(monkeypatch):
    problem = random_problem(**HEAD, source=(12, 20), size=(21, 35))
    names = _build.native().module.supported_isas()
    for name in (*names, *names):
        monkeypatch.setenv(native.ISA_VARIABLE, name)
        for formulation in FORMULATIONS:
            monkeypatch.setenv(native.FORMULATION_VARIABLE, formulation)
            torch.testing.assert_close(
                run(problem).prediction.double(), truth.evaluate(problem).prediction, rtol=1e-4, atol=1e-5
            )
