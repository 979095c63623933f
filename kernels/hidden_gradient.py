"""Second step of the backward pass: from hidden activations to the gradient before their ReLU, in place.

On the way, one row of the band per program, the sums over its pixels that are the gradients to the second layer and to
the first layer's biases. A program owns its slots in the partial sums, and adds to them band after band.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe3d.kernels.numerics import dot, is_finite, to_operand
from moe3d.kernels.pack import Packed
from moe3d.kernels.plan import Launch, Precision


@triton.jit(do_not_specialize=["first_row", "padded_width", "height", "width", "own_first", "own_last"])
def _hidden_gradient_kernel(hidden, grad_z, w2, feeds, sum_w2, sum_b1, sum_b2, first_row, padded_width, height,
                            width, own_first, own_last,
                            N: tl.constexpr, COLUMNS: tl.constexpr, PARAMETERS: tl.constexpr,
                            BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A row of pixels x BLOCK_N hidden channels."""
    row_in_band = tl.program_id(0)
    row = first_row + row_in_band
    visible = tl.where((row >= 0) & (row < height), width, 0)  # columns of this row inside the image
    owned = tl.where((row >= own_first) & (row < own_last), visible, 0)  # those that no other band sums
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    z_column = tl.arange(0, COLUMNS)  # [Z]
    entry = channel[None, :] * COLUMNS + z_column[:, None]  # [Z, N]
    w2t = tl.load(w2 + entry)
    grad_w2 = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    grad_b1 = tl.zeros([BLOCK_N], tl.float32)
    grad_b2 = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, padded_width - 2, BLOCK_P):
        column = start + tl.arange(0, BLOCK_P)  # [P]
        seen = (column < visible)[:, None]
        mine = (column < owned)[:, None]
        pixel = (row_in_band.to(tl.int64) * padded_width + column + 1)[:, None]
        h = tl.load(hidden + pixel * N + channel[None, :], seen, other=0.0)  # [P, N]
        g = tl.load(grad_z + pixel * COLUMNS + z_column[None, :], seen, other=0.0)  # [P, Z]
        operand = to_operand(g, hidden.dtype.element_ty, PRECISION)
        zeros = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        back = dot(operand, w2t, zeros, PRECISION)
        finite = is_finite(operand)
        if (
            tl.max(tl.max(tl.where(finite, 0, 1), axis=1), axis=0) > 0
        ):  # keep it from the other experts, as `confined` does
            back = dot(tl.where(finite, operand, 0.0).to(operand.dtype), w2t, zeros, PRECISION)
            reached = tl.dot(tl.where(finite, 0.0, 1.0).to(tl.float16), tl.load(feeds + entry)) > 0
            back = tl.where(reached, float("nan"), back)
        back = tl.where(h <= 0, 0.0, back)  # NaN passes, as through relu
        tl.store(hidden + pixel * N + channel[None, :], to_operand(back, hidden.dtype.element_ty, PRECISION))
        if PARAMETERS:
            grad_w2 = dot(tl.trans(tl.where(mine, h, 0.0).to(h.dtype)), operand, grad_w2, PRECISION)
            grad_b1 += tl.sum(tl.where(mine, back, 0.0), axis=0)
            grad_b2 += tl.sum(tl.where(mine, g, 0.0), axis=0)
    if PARAMETERS:
        slot = row_in_band * N + channel
        w2_slot = sum_w2 + slot[:, None] * COLUMNS + z_column[None, :]
        tl.store(w2_slot, tl.load(w2_slot) + grad_w2)
        tl.store(sum_b1 + slot, tl.load(sum_b1 + slot) + grad_b1)
        b2_slot = sum_b2 + row_in_band * COLUMNS + z_column
        kept = z_column < tl.where(tl.program_id(1) == 0, COLUMNS, 0)  # one program of a row is enough
        tl.store(b2_slot, tl.load(b2_slot, kept, other=0.0) + grad_b2, kept)


def hidden_gradient(hidden, grad_z, packed: Packed, sums, rows: range, own: range, size: tuple[int, int],
                    precision: Precision, block_p: int, num_warps: int) -> Launch:  # fmt: skip
    """Turns ``hidden`` [rows, padded width, N] into its gradient; ``sums`` is (w2, b1, b2) by row, or None.

    Padded width is a multiple of ``block_p``, plus the border; outside the image the gradient is 0.
    """
    channels, columns = hidden.shape[2], packed.b2.shape[0]
    block_n = min(channels & -channels, max(16, 2048 // columns))  # wider ones spill
    sum_w2, sum_b1, sum_b2 = sums or (grad_z, grad_z, grad_z)
    return Launch(
        kernel=_hidden_gradient_kernel,
        grid=(len(rows), channels // block_n),
        arguments=dict(
            hidden=hidden, grad_z=grad_z, w2=packed.w2, feeds=packed.feeds, sum_w2=sum_w2, sum_b1=sum_b1, sum_b2=sum_b2,
            first_row=rows.start, padded_width=hidden.shape[1], height=size[0], width=size[1],
            own_first=own.start, own_last=own.stop,
            N=channels, COLUMNS=columns, PARAMETERS=sums is not None,
            BLOCK_N=block_n, BLOCK_P=block_p, PRECISION=precision.dot,
        ),
        num_warps=num_warps,
    )  # fmt: skip
