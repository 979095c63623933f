"""The plan covers every row once and every channel once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d.kernels.pack import operand
from moe3d.kernels.plan import Precision, bands, sections


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 600), st.integers(1, 900), st.sampled_from([4, 8]),
       st.integers(1, 40), st.integers(1, 132))  # fmt: skip
def test_bands_cover_each_row_of_each_frame_once(frames, height, max_rows, tile, columns, wave):
    seen = set()
    for band in bands(frames, height, max_rows, 2, tile, columns, wave):
        assert band.first_row % tile == 0
        assert (band.rows + 2) * band.frames <= max(max_rows, tile + 2)
        rows = {
            (f, y)
            for f in range(band.first_frame, band.first_frame + band.frames)
            for y in range(band.first_row, band.first_row + band.rows)
        }
        assert not rows & seen
        seen |= rows
    assert seen == {(f, y) for f in range(frames) for y in range(height)}


@settings(deadline=None)
@given(st.integers(1, 2000), st.sampled_from([64, 128, 256]))
def test_sections_hold_every_channel_and_waste_little(channels, most):
    main, tail = sections(channels, most)
    assert main.width <= most and tail.width <= most
    assert channels <= main.channels + tail.channels < max(1.6 * channels, channels + 32)


def test_tf32_operands_are_rounded_and_keep_what_is_not_finite():
    x = torch.tensor([1 + 2**-11, 1 + 2**-10, -3.0000001, float("inf"), float("nan")])
    rounded = operand(x, Precision(torch.float32, "tf32"))
    assert rounded[:4].tolist() == [1 + 2**-10, 1 + 2**-10, -3.0, float("inf")] and rounded[4].isnan()
