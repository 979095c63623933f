"""VGGT's output activations and their derivatives, on all outputs of all experts of a tile at once.

``z`` is [M, OP, KP]: pixels, output rows (the prediction's first, then the confidence, then the gate's logits, then
padding) and experts. ``predicted`` [1, OP, 1] marks the prediction's rows, the only ones that may mix.
"""

import triton
import triton.language as tl

from moe3d.kernels.numerics import expm1, relu


@triton.jit
def row_sum(z, selected):
    """The sum over the selected output rows, [M, 1, KP]; what is not selected may be infinite."""
    return tl.sum(tl.where(selected, z, 0.0), axis=1, keep_dims=True)


@triton.jit
def inv_log(y):
    magnitude = expm1(tl.abs(y))
    return tl.where(y < 0, -magnitude, magnitude)


@triton.jit
def activation(z, row, predicted, NAME: tl.constexpr):
    """The hypotheses in the prediction's rows; the other rows are meaningless."""
    if NAME == "exp":
        d = tl.exp(z)
    elif NAME == "relu":
        d = relu(z)
    elif NAME == "sigmoid":
        d = tl.sigmoid(z)
    elif NAME == "linear":
        d = z
    elif NAME == "inv_log":
        d = inv_log(z)
    elif NAME == "xy_inv_log":
        depth = inv_log(row_sum(z, row == 2))
        d = tl.where(row == 2, depth, z * depth)
    elif NAME == "norm":
        d = z / tl.sqrt(row_sum(z * z, predicted))
    else:
        tl.static_assert(NAME == "norm_exp")
        length = norm_exp_length(z, predicted)
        d = z / length * expm1(length)
    return d


@triton.jit
def activation_vjp(z, grad, row, predicted, NAME: tl.constexpr):
    """The gradient to the prediction's rows of ``z``; ``grad`` is 0 or meaningless in the others."""
    if NAME == "exp":
        g = grad * tl.exp(z)
    elif NAME == "relu":
        g = tl.where(z <= 0, 0.0, grad)
    elif NAME == "sigmoid":
        s = tl.sigmoid(z)
        g = grad * s * (1.0 - s)
    elif NAME == "linear":
        g = grad
    elif NAME == "inv_log":
        g = grad * tl.exp(tl.abs(z))
    elif NAME == "xy_inv_log":
        log_z = row_sum(z, row == 2)
        along = row_sum(grad * z, row < 2) + row_sum(grad, row == 2)
        g = tl.where(row == 2, along * tl.exp(tl.abs(log_z)), grad * inv_log(log_z))
    elif NAME == "norm":
        length = tl.sqrt(row_sum(z * z, predicted))
        unit = z / length
        g = (grad - unit * row_sum(unit * grad, predicted)) / length
    else:
        tl.static_assert(NAME == "norm_exp")
        length = norm_exp_length(z, predicted)
        unit = z / length
        radial = unit * row_sum(unit * grad, predicted)
        g = expm1(length) / length * (grad - radial) + tl.exp(length) * radial
    return g


@triton.jit
def norm_exp_length(z, predicted):
    length = tl.sqrt(row_sum(z * z, predicted))
    return tl.where(length < 1e-8, 1e-8, length)  # VGGT's clamp; keeps NaN


@triton.jit
def confidence(z, NAME: tl.constexpr):
    if NAME == "expp1":
        c = 1.0 + tl.exp(z)
    elif NAME == "expp0":
        c = tl.exp(z)
    else:
        tl.static_assert(NAME == "sigmoid")
        c = tl.sigmoid(z)
    return c


@triton.jit
def confidence_vjp(z, grad, NAME: tl.constexpr):
    if NAME == "sigmoid":
        s = tl.sigmoid(z)
        g = grad * s * (1.0 - s)
    else:
        g = grad * tl.exp(z)
    return g
