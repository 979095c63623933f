"""The CUDA kernels without a GPU: their sources, forward and backward, on an emulator of the device.

The emulator (csrc/test/device_host.h) runs every thread of every block, with barriers, asynchronous copies and matrix
fragments as on a GPU; numbers are judged by the rule of every backend.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moe3d import _build
from moe3d.ops import dispatch, gpu, native, native_cuda
from support import emulator as emulation
from support import truth
from support.accuracy import Comparison, assert_as_accurate_as_pytorch, assert_within
from support.backends import Runner
from support.problems import Problem, random_problem

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler")
RUNNER = Runner("cuda", "cpu")
SMALL = {"batch": 1, "source": (3, 4), "size": (5, 7)}


@pytest.fixture(scope="module")
def emulator():
    return emulation.Emulator(emulation.build())


@pytest.fixture(params=["direct", "low-resolution"])
def formulation(request, monkeypatch):
    """Each of the two ways to make hidden activations, where it is in doubt as well as where it counts as slower."""
    monkeypatch.setenv(native_cuda.FORMULATION_VARIABLE, request.param)
    return request.param


@pytest.fixture(autouse=True)
def emulated(emulator, monkeypatch):
    """The backend runs on the emulator, in memory that is NaN until it is written."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        memory = empty(*args, **kwargs)
        return memory.fill_(torch.nan if memory.is_floating_point() else 255)

    monkeypatch.setitem(dispatch._REGISTRY, "cuda", emulation.EmulatedBackend(emulator))
    for module in (native, native_cuda):
        monkeypatch.setattr(module, "torch", _Patched(poisoned))
    yield
    emulator.policy(0, True)
    emulator.band_bytes()


class _Patched:
    """PyTorch with another ``empty``."""

    def __init__(self, empty):
        self.empty = empty

    def __getattr__(self, name):
        return getattr(torch, name)


def run(problem: Problem, **options):
    return problem.run(backend="cuda", **options)


def taken(emulator, problem: Problem, precision: str = "auto", skip_below: float = 0.0) -> str:
    """The formulation of a forward pass."""
    tensors = native_cuda.HeadTensors(*(problem.tensors.get(n) for n in native_cuda.HeadTensors._fields))
    options = native_cuda.HeadOptions(*problem.size, 1.0, "exp", "expp1", "mean", 0.3, False, skip_below, precision)
    return native_cuda._CUDACall(emulator, tensors, options).formulation


def gradients(problem: Problem, **options) -> dict[str, torch.Tensor]:
    leaves = problem.leaves()
    outputs = [o for o in run(leaves, **options) if o is not None]
    torch.autograd.backward(outputs, [torch.ones_like(o) + 0.1 * o.detach() for o in outputs])
    return {name: leaf.grad for name, leaf in leaves.tensors.items()}


def assert_equal(a, b):
    for one, other in zip(a, b, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize(
    "case",
    [
        {"batch": 2, "pos": True, "gate_logits": True},
        {"experts": 1, "gate": False, "source": (1, 1), "size": (3, 2)},
        {"experts": 1, "mode": "argmax"},
        {"experts": 16, "prediction_channels": 3, "hidden": 2, "activation": "norm_exp", "size": (2, 3)},
        {"experts": 4, "hidden": 33, "gate_hidden": 70, "channels": 20, "pos": True},  # wide groups, not full
        {"experts": 2, "hidden": 17, "gate_hidden": 1, "channels": 33, "source": (2, 17), "size": (3, 34)},  # tiles
        {"source": (6, 8), "size": (3, 5), "mode": "switch", "gap": 0.1, "temperature": 0.5},
        {"source": (1, 5), "size": (18, 4), "mode": "argmax", "conf_activation": None},
        {"source": (5, 1), "size": (5, 1), "conf_activation": "expp0", "activation": "sigmoid"},
        {"activation": "xy_inv_log", "prediction_channels": 3, "conf_activation": "sigmoid"},
        {"activation": "norm", "prediction_channels": 3},
        {"activation": "inv_log"},
        {"activation": "linear", "mode": "argmax"},
        {"activation": "relu", "mode": "switch"},
    ],
    ids=str,
)
def test_as_accurate_as_pytorch(case, formulation):
    assert_as_accurate_as_pytorch(RUNNER, precision="ieee", **SMALL | case)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_as_accurate_as_pytorchs(dtype, precision, formulation):
    if (dtype, precision) == (torch.float32, "auto"):
        pytest.skip("is float32 here")
    case = {"channels": 40, "experts": 2, "pos": True, "gate_logits": True}
    assert_as_accurate_as_pytorch(RUNNER, dtype=dtype, precision=precision, **SMALL | case)


def test_wide_groups_in_sixteen_bits():
    case = {"channels": 24, "experts": 3, "hidden": 32, "gate_hidden": 40, "dtype": torch.float16}
    assert_as_accurate_as_pytorch(RUNNER, **SMALL | case)


LOW_RESOLUTION = [  # sizes at which something ends: units of 32 pixels, strips of two, 64 columns, rows of x
    {"source": (5, 70), "size": (9, 123), "pos": True},
    {"source": (3, 33), "size": (4, 33), "channels": 70},
    {"source": (2, 40), "size": (7, 41), "experts": 16, "hidden": 2},
    {"source": (1, 9), "size": (5, 140), "prediction_channels": 3, "hidden": 17},
    {"source": (4, 1), "size": (7, 1), "pos": True},
    {"source": (2, 3), "size": (2, 16), "experts": 1, "gate": False, "hidden": 20, "pos": True},
]


@pytest.mark.parametrize("case", LOW_RESOLUTION, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_resolution_is_as_accurate_as_pytorch(emulator, case, dtype, monkeypatch):
    monkeypatch.setenv(native_cuda.FORMULATION_VARIABLE, "low-resolution")
    case = {"batch": 1, "dtype": dtype, "experts": 2} | case
    assert taken(emulator, random_problem(**case)) == "low-resolution"
    ours, plain, exact = [], [], []
    for seed in range(3):
        problem = random_problem(seed=seed, **case)
        for found, output in (
            (ours, run(problem, return_experts=True)),
            (plain, truth.evaluate(problem, conv=dtype, mix=torch.float32)),
            (exact, truth.evaluate(problem.double())),
        ):
            found.append(torch.cat([o.double().flatten() for o in (output.hypotheses.log(), output.weights)]))
    assert_within("hypotheses and weights", Comparison(*(torch.cat(found) for found in (ours, plain, exact))))


def test_what_low_resolution_leaves_to_the_other(emulator, monkeypatch):
    monkeypatch.setenv(native_cuda.FORMULATION_VARIABLE, "low-resolution")
    assert taken(emulator, random_problem()) == "low-resolution"
    assert taken(emulator, random_problem(), skip_below=1e-6) == "direct"
    for refused in ({"size": (2, 9)}, {"size": (7, 3)}, {"channels": 1024}, {"source": (2, 1), "size": (2, 5000)}):
        assert taken(emulator, random_problem(batch=1, **refused)) == "direct", refused
    monkeypatch.setenv(native_cuda.FORMULATION_VARIABLE, "direct")
    assert taken(emulator, random_problem()) == "direct"


@pytest.mark.parametrize(("precision", "least"), [("ieee", 8), ("tf32", 24), ("bf16", 48)])
def test_low_resolution_is_taken_where_it_counts_as_faster(emulator, precision, least):
    """At VGGT's ratio from so many channels on; never without resampling."""
    for channels in (8, 16, 24, 32, 48, 64, 128):
        vggt = random_problem(batch=1, channels=channels, source=(74, 296), size=(130, 518), experts=4, hidden=32,
                              gate_hidden=128)  # fmt: skip
        assert taken(emulator, vggt, precision) == ("low-resolution" if channels >= least else "direct"), channels
    same = random_problem(batch=1, channels=128, source=(32, 64), size=(32, 64), hidden=32, gate_hidden=128)
    assert taken(emulator, same, precision) == "direct"


def test_huge_weights_stay_finite_and_right(formulation):
    problem = random_problem(channels=40, source=(3, 20), size=(5, 35), batch=1, activation="linear", pos=True)
    scale = {name: 1e4 * problem.tensors[name] for name in ("expert_w1", "expert_b1")}
    problem = problem.with_tensors(**scale)
    exact = truth.evaluate(problem.double())
    for precision, limit in (("ieee", 1e-5), ("tf32", 3e-3), ("bf16", 3e-2)):
        ours = run(problem, precision=precision, return_experts=True)
        assert ((ours.hypotheses - exact.hypotheses).norm() / exact.hypotheses.norm()).item() < limit, precision


def test_tf32_has_the_error_of_its_operands(formulation):
    """11 significant bits: about 3e-4 for each operand, an order of magnitude below bfloat16's."""
    problem = random_problem(channels=40, experts=3, hidden=40, pos=True, **SMALL)
    exact, leaves, double = truth.evaluate(problem.double()), problem.leaves(), problem.double().leaves()
    ours, bf16 = run(leaves, precision="tf32"), run(problem, precision="bf16")

    def error(a, b):
        return ((a - b).norm() / b.norm()).item()

    assert 1e-5 < error(ours.prediction, exact.prediction) < 1e-3 < 10 * error(bf16.prediction, exact.prediction)
    ours.prediction.sum().backward()
    truth.evaluate(double).prediction.sum().backward()
    for name, leaf in leaves.tensors.items():
        assert error(leaf.grad, double.tensors[name].grad) < 1e-2, name


@pytest.mark.parametrize(("precision", "wide"), [("ieee", False), ("bf16", False), ("bf16", True), ("tf32", True)])
def test_the_order_of_threads_and_copies_changes_no_bit(emulator, precision, wide, formulation):
    """What a missing barrier, or a copy that nobody waits for, would."""
    head = {"hidden": 40, "gate_hidden": 30} if wide else {"hidden": 9, "gate_hidden": 20}
    problem = random_problem(channels=40, source=(2, 3), size=(3, 18), batch=1, experts=2, pos=True, **head)
    found = []
    for order, late in ((0, True), (1, False), (2, True)):
        emulator.policy(order, late)
        skipping = run(problem, precision=precision, skip_below=1e-6)
        found.append([*skipping[:3], *run(problem, precision=precision)[:3]])
        if order < 2:
            found[-1] += gradients(problem, precision=precision).values()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=False))


def test_bands_give_the_same_outputs_bit_for_bit(emulator, formulation):
    problem = random_problem(batch=3, experts=2, source=(20, 5), size=(35, 9), pos=True)
    whole = run(problem, return_experts=True)
    for limit in (1, 10**5, 4 * 10**5):  # a row of tiles at a time; some rows; some frames
        emulator.band_bytes(forward=limit)
        assert_equal(whole, run(problem, return_experts=True))


def test_bands_of_the_backward_pass_add_up(emulator):
    problem = random_problem(batch=2, experts=2, source=(12, 4), size=(33, 7), pos=True, gate_logits=True)
    whole = gradients(problem)
    emulator.band_bytes(backward=1)
    for name, banded in gradients(problem).items():
        torch.testing.assert_close(banded, whole[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "every second", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts_of_x_give_the_same_bits(layout, dtype, formulation):
    problem = random_problem(channels=32, dtype=dtype, experts=1, **SMALL)
    x = problem.tensors["x"]
    strided = {
        "channels last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
        "every second": lambda: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
        "expanded": lambda: x[:1, :, :, :1].expand_as(x),
    }[layout]()
    plain = strided.contiguous()
    assert_equal(run(problem.with_tensors(x=strided)), run(problem.with_tensors(x=plain)))


def test_strides_that_the_kernels_read_themselves(emulator):
    """The backend hands over channels that lie side by side; the contract allows any strides."""
    problem = random_problem(channels=16, experts=1, **SMALL)
    expected = run(problem)
    tensors = native_cuda.HeadTensors(*(problem.tensors.get(n) for n in native_cuda.HeadTensors._fields))
    options = native_cuda.HeadOptions(5, 7, 1.0, "exp", "expp1", "mean", 0.3, False, 0.0, "ieee")
    call = native_cuda._CUDACall(emulator, tensors, options)
    x = problem.tensors["x"].transpose(2, 3).contiguous().transpose(2, 3)
    call.problem.x, call.problem.x_strides = x.data_ptr(), x.stride()
    outputs = native.empty_outputs(tensors, options)
    call.run("cuda_forward", call.addresses("Outputs", outputs._asdict()))
    assert_equal(outputs, expected)


@pytest.mark.parametrize("skip_below", [0.0, 1e-6])
def test_nan_reaches_exactly_its_footprint(skip_below, formulation):
    problem = random_problem(batch=1, source=(6, 7), size=(11, 19), gate_logits=True, pos=True)
    clean = run(problem, skip_below=skip_below)
    x = problem.tensors["x"].clone()
    x[0, 3, 2, 3] = math.nan
    got = run(problem.with_tensors(x=x), skip_below=skip_below)
    pixel = torch.zeros(1, 1, 6, 7, dtype=torch.float64)
    pixel[0, 0, 2, 3] = 1.0
    weight = F.interpolate(pixel, size=problem.size, mode="bilinear", align_corners=True)
    spread = F.max_pool2d((weight > 1e-9).double(), 3, stride=1, padding=1) > 0
    assert torch.equal(got.prediction.isnan(), spread) and torch.equal(got.entropy.isnan(), spread[:, 0])
    if not skip_below:
        assert torch.equal(got.prediction[~spread], clean.prediction[~spread])


def test_an_expert_that_is_not_finite_spoils_no_other(formulation):
    problem = random_problem(experts=3, **SMALL)
    bias = problem.tensors["expert_b1"].clone()
    bias[1, 0] = math.nan
    leaves = problem.with_tensors(expert_b1=bias).leaves()
    spoilt, clean = run(leaves, return_experts=True), run(problem, return_experts=True)
    kept = [0, 2]
    assert spoilt.hypotheses[:, 1].isnan().all() and torch.equal(spoilt.hypotheses[:, kept], clean.hypotheses[:, kept])
    assert torch.equal(spoilt.weights, clean.weights)
    spoilt.hypotheses.sum().backward()
    gradient = leaves.tensors["expert_w1"].grad
    assert gradient[kept].isfinite().all() and gradient[1].isnan().any()


@pytest.mark.parametrize("mode", ["argmax", "switch"])
def test_an_overflowing_expert_that_is_not_chosen_has_no_gradient(mode):
    problem = random_problem(experts=2, mode=mode, **SMALL)
    bias, gate = problem.tensors["expert_b2"].clone(), torch.tensor([4.0, -0.4])  # 0.012 has a say in "switch"
    bias[1] = 200.0
    leaves = problem.with_tensors(expert_b2=bias, gate_b2=gate, gate_w2=0 * problem.tensors["gate_w2"]).leaves()
    output = run(leaves)
    (output.prediction.sum() + output.confidence.sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.tensors.values())
    assert not leaves.tensors["expert_w1"].grad[1].any()


def test_extreme_logits_and_temperatures_stay_finite():
    problem = random_problem(gate_logits=True, **SMALL)
    problem = problem.with_tensors(gate_logits=200.0 * problem.tensors["gate_logits"].sign())
    for temperature in (1.0, 1e-30):
        scaled = problem.with_options(temperature=temperature)
        assert all(o.isfinite().all() for o in run(scaled, return_experts=True))
    assert all(g.isfinite().all() for g in gradients(problem, return_experts=True).values())


@pytest.mark.parametrize("mode", ["mean", "argmax", "switch"])
@pytest.mark.parametrize("hidden", [5, 70], ids=["narrow groups", "wide groups"])
def test_skipping_changes_no_more_than_its_bound(mode, hidden):
    problem = random_problem(experts=4, mode=mode, hidden=hidden, batch=1, source=(4, 9), size=(9, 20))
    bias = problem.tensors["expert_b2"].clone()
    bias[0, 0] = 12.0  # exp(12): an expert that would spoil the mean if its weight were dropped unseen
    problem = problem.with_tensors(expert_b2=bias, gate_w2=40.0 * problem.tensors["gate_w2"])
    exact, skipped, eps = run(problem, return_experts=True), run(problem, skip_below=1e-6), 1e-6
    spread = (exact.hypotheses - exact.prediction[:, None]).abs().amax(1)
    error = (skipped.prediction - exact.prediction).abs()
    assert (error <= 3 * eps * spread / (1 - 3 * eps) + 1e-5 * exact.prediction.abs()).all()
    torch.testing.assert_close(skipped.entropy, exact.entropy, rtol=1e-5, atol=1e-6)


def test_skipping_leaves_experts_out_tile_by_tile():
    """Expert 1 is NaN everywhere: it shows exactly in the tile (16 x 16) where it was computed."""
    problem = random_problem(batch=1, experts=2, source=(20, 20), size=(40, 37))
    nan = problem.tensors["expert_b2"].clone()
    nan[1] = math.nan
    logits = torch.zeros(1, 2, 40, 37)
    logits[:, 1] = -60.0
    logits[:, 1, 20, 33] = 0.0
    zero = {name: torch.zeros_like(problem.tensors[name]) for name in ("gate_w2", "gate_b2")}
    problem = problem.with_tensors(expert_b2=nan, gate_logits=logits, **zero)
    computed = torch.zeros(40, 37, dtype=torch.bool)
    computed[16:32, 32:] = True
    output = run(problem, skip_below=1e-6)
    assert torch.equal(output.prediction[0, 0].isnan(), computed) and output.entropy.isfinite().all()
    assert run(problem, skip_below=1e-6, return_experts=True).hypotheses[:, 1].isnan().all()  # all are wanted
    logits[:, 0, 3, 3] = -math.inf  # its tile skips nothing
    computed[:16, :16] = True
    output = run(problem.with_tensors(gate_logits=logits), skip_below=1e-6)
    assert torch.equal(output.prediction[0, 0].isnan(), computed)


def test_only_what_is_asked_for_gets_a_gradient():
    problem = random_problem(gate_logits=True, **SMALL)
    everything = gradients(problem)
    for wanted in ("x", "expert_w1", "gate_b1", "expert_b2", "gate_logits"):
        leaves = problem.with_tensors(**{wanted: problem.tensors[wanted].clone().requires_grad_()})
        outputs = [o for o in run(leaves) if o is not None]
        torch.autograd.backward(outputs, [torch.ones_like(o) + 0.1 * o.detach() for o in outputs])
        assert torch.equal(leaves.tensors[wanted].grad, everything[wanted]), wanted


def test_an_empty_batch():
    output = run(random_problem(batch=0))
    assert output.prediction.shape == (0, 1, 7, 9)


def test_a_workspace_that_is_too_small_is_refused(emulator, monkeypatch):
    problem = random_problem(**SMALL)
    monkeypatch.setattr(emulation.Emulator, "cuda_forward_workspace", lambda *_: 256, raising=False)
    with pytest.raises(RuntimeError, match="the cuda backend failed"):
        run(problem)


@pytest.mark.parametrize(
    ("arguments", "reason"), [({"dtype": torch.float64}, "float64"), ({"size": (1, 40000)}, "longer than 32768")]
)
def test_refusals_say_why(arguments, reason):
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run here because .*{reason}"):
        run(random_problem(**arguments))


class TestWithoutADevice:
    """The backend itself, as users have it."""

    @pytest.fixture(autouse=True)
    def real(self, emulated, monkeypatch):
        monkeypatch.setitem(dispatch._REGISTRY, "cuda", native_cuda.CUDABackend())

    def test_a_module_without_the_cuda_part_tells_why(self, monkeypatch):
        module = type("Module", (), {})()
        monkeypatch.setattr(_build, "native", lambda: _build.Native(module, None))
        monkeypatch.setattr(_build, "record", lambda: {"cpu": None, "cuda": "no nvcc was found"})
        assert native_cuda.CUDABackend().unavailable() == "its CUDA part is not installed (no nvcc was found)"

    def test_no_module_tells_why(self, monkeypatch):
        monkeypatch.setattr(_build, "native", lambda: _build.Native(None, "it broke"))
        assert native_cuda.CUDABackend().unavailable() == "it broke"

    def test_no_device_tells_why(self, monkeypatch, emulator):
        monkeypatch.setattr(_build, "native", lambda: _build.Native(emulator, None))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert native_cuda.CUDABackend().unavailable() == "there is no CUDA device"

    def test_an_unknown_formulation_is_refused(self, monkeypatch, emulator):
        monkeypatch.setattr(_build, "native", lambda: _build.Native(emulator, None))
        monkeypatch.setenv(native_cuda.FORMULATION_VARIABLE, "fft")
        reason = native_cuda.CUDABackend().unavailable()
        assert reason == "MOE3D_CUDA_FORMULATION='fft', expected one of auto, low-resolution, direct"

    def test_it_is_used_only_where_it_is_asked_for(self, monkeypatch):
        """Until it has been found right on a GPU."""
        monkeypatch.setattr(native_cuda.CUDABackend, "unavailable", lambda self: None)
        assert "cuda" not in dispatch.automatic_backends()

    def test_tensors_elsewhere_are_refused(self, monkeypatch):
        monkeypatch.setattr(native_cuda.CUDABackend, "unavailable", lambda self: None)
        with pytest.raises(RuntimeError, match="x is on 'cpu', not on a CUDA device"):
            run(random_problem())

    @pytest.mark.parametrize(
        ("dtype", "precision", "tf32", "expected"),
        [
            (torch.float32, "auto", True, "tf32"),
            (torch.float32, "auto", False, "ieee"),
            (torch.bfloat16, "auto", True, "bf16"),
            (torch.float16, "auto", True, "fp16"),
            (torch.float16, "bf16", True, "bf16"),
            (torch.bfloat16, "ieee", True, "ieee"),
        ],
    )
    def test_arithmetic(self, monkeypatch, dtype, precision, tf32, expected):
        monkeypatch.setattr(gpu, "convolutions_use_tf32", lambda: tf32)
        assert native_cuda._arithmetic(dtype, precision) == expected
