"""The decoder's layers in C++ against PyTorch in float64: numbers, borders, threads, instruction sets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe3d.ops import native, native_layers
from moe3d.ops.native_layers import Cells, Upsampled, Winograd

pytestmark = pytest.mark.skipif(not native_layers.can_run(), reason="no C++ part")

SIZES = [(1, 1, 1), (2, 1, 9), (1, 4, 4), (3, 5, 2), (1, 13, 18)]  # batch, height, width
CASES = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def last(x):
    return x.permute(0, 2, 3, 1).contiguous()


def error(found, true):
    """Relative RMS, of channels last against PyTorch's order."""
    found = found.permute(0, 3, 1, 2)
    assert found.shape == true.shape
    return ((found - true).norm() / true.norm()).item()


def convolution(outputs, inputs, seed=1):
    return draw(outputs, inputs, 3, 3, seed=seed, scale=(9 * inputs) ** -0.5), draw(outputs, seed=seed + 1)


def double(*tensors):
    return [t.double() for t in tensors]


def assert_close(found, true, plain):
    """op.md's bound: 1.5 times the error of PyTorch in float32, plus 1e-6."""
    assert error(found, true) <= 1.5 * error(last(plain), true) + 1e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (48, 80), (272, 32)])
@pytest.mark.parametrize("relu_input", [False, True])
def test_winograd(isa, poisoned, size, inputs, outputs, relu_input):
    batch, height, width = size
    x, (weight, bias) = draw(batch, inputs, height, width), convolution(outputs, inputs)
    read = x.relu() if relu_input else x
    true = F.conv2d(*double(read, weight, bias), padding=1)
    found = Winograd(weight, bias)(last(x), relu_input=relu_input)
    assert_close(found, true, F.conv2d(read, weight, bias, padding=1))


@pytest.mark.parametrize("relu_residual", [False, True])
def test_winograd_adds_what_it_is_given(isa, relu_residual):
    x, (weight, _) = draw(2, 16, 5, 7), convolution(32, 16)
    residual, added = draw(2, 32, 5, 7, seed=5), draw(2, 32, 5, 7, seed=6)
    layer, kept = Winograd(weight, None), last(residual)
    plain = F.conv2d(*double(x, weight), padding=1)
    assert error(layer(last(x)), plain) < 1e-6
    true = plain + (residual.relu() if relu_residual else residual) + added
    options = {"residual": kept, "relu_residual": relu_residual, "added": last(added)}
    expected = layer(last(x), **options)
    assert error(expected, true) < 1e-6
    assert torch.equal(kept, last(residual))
    found = layer(last(x), **options, out=kept)
    assert found is kept and torch.equal(found, expected)


def test_winograds_error_stays_near_pytorchs():
    """Through sums of sums; the usual points and plain sums have ten times PyTorch's error at this width."""
    x, (weight, bias) = draw(1, 256, 24, 24).relu(), convolution(256, 256)
    true = F.conv2d(*double(x, weight, bias), padding=1)
    plain = error(last(F.conv2d(x, weight, bias, padding=1)), true)
    assert error(Winograd(weight, bias)(last(x)), true) < 1.5 * plain + 6e-7


def test_winograd_propagates_what_is_not_finite():
    x, (weight, bias) = draw(1, 16, 12, 12), convolution(16, 16)
    x[0, 3, 5, 6] = torch.nan
    found = Winograd(weight, bias)(last(x), relu_input=True)
    assert found[0, 4:7, 5:8].isnan().all()  # relu keeps NaN
    assert found[0, 8:].isfinite().all() and found[0, :, 8:].isfinite()[:, 4:].all()  # other tiles


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_strided(isa, poisoned, size, stride):
    batch, height, width = size
    x, (weight, bias) = draw(batch, 24, height, width), convolution(48, 24)
    true = F.conv2d(*double(x, weight, bias), padding=1, stride=stride)
    plain = F.conv2d(x, weight, bias, padding=1, stride=stride)
    assert_close(Cells.strided(weight, bias, stride)(last(x)), true, plain)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_a_transposed_convolution_and_the_next_one(isa, poisoned, size, scale):
    batch, height, width = size
    x, (weight, _) = draw(batch, 24, height, width), convolution(32, 40)
    spread, spread_bias = draw(24, 40, scale, scale, seed=3, scale=0.2), draw(40, seed=4)

    def both(x, spread, spread_bias, weight):
        return F.conv2d(F.conv_transpose2d(x, spread, spread_bias, stride=scale), weight, padding=1)

    tensors = x, spread, spread_bias, weight
    assert_close(Cells.after_transposed(*tensors[1:])(last(x)), both(*double(*tensors)), both(*tensors))


def upsampled(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


@CASES
@given(
    st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.integers(1, 70), st.integers(0, 99)
)
def test_upsampling(isa, poisoned, batch, height, width, out_height, out_width, seed):
    x, size = draw(batch, 32, height, width, seed=seed), (out_height, out_width)
    true = upsampled(x.double(), size)
    assert error(native_layers.upsample(last(x), size), true) < 2e-7

    point, point_bias = draw(24, 32, seed=seed + 1, scale=0.2), draw(24, seed=seed + 2)
    weight, bias = convolution(48, 24, seed=seed + 3)
    true = F.conv2d(true, *double(point[:, :, None, None], point_bias))
    true = F.conv2d(true, *double(weight, bias), padding=1)
    assert error(Upsampled(point, point_bias, weight, bias)(last(x), size), true) < 1e-6


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_change_nothing(threads, batch):
    x, (weight, bias) = draw(batch, 32, 19, 23), convolution(48, 32)
    point, point_bias = draw(32, 32, scale=0.2), draw(32)
    layers = [
        Winograd(weight, bias),
        Cells.strided(weight, bias, 2),
        Cells.after_transposed(draw(32, 32, 2, 2), point_bias, weight),
        lambda x: Upsampled(point, point_bias, weight, bias)(x, (40, 44)),
        lambda x: native_layers.upsample(x, (40, 44)),
    ]
    for layer in layers:
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(layer(last(x)))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_no_frames():
    weight, bias = convolution(16, 16)
    assert Winograd(weight, bias)(torch.empty(0, 4, 5, 16)).shape == (0, 4, 5, 16)
    assert native_layers.upsample(torch.empty(0, 4, 5, 16), (8, 9)).shape == (0, 8, 9, 16)


def test_a_fingerprint_changes_with_any_tensor():
    tensors = [draw(1000), draw(3, 5), draw(1)]
    before = native.fingerprint(tensors)
    assert native.fingerprint([t.clone() for t in tensors]) == before
    for t in tensors:
        t.data += 1e-3
        after = native.fingerprint(tensors)
        assert after != before
        before = after


def test_an_instruction_set_that_is_not_there(monkeypatch):
    monkeypatch.setenv("MOE3D_CPU_ISA", "neon99")
    assert not native_layers.can_run()
