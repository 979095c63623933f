"""Small device functions that every kernel shares: operands of the matrix units, interpolation, elementwise maths.

PRECISION is one of "half" (16-bit operands as they are), "tf32" and "ieee" (32-bit operands), and "upcast": 16-bit
operands multiplied in float32, for Triton's interpreter, whose bfloat16 products are wrong.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32."""
    if PRECISION == "upcast":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif PRECISION == "half":
        acc = tl.dot(a, b, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def to_operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """float32 values rounded to what the matrix units read; they would truncate to tf32, with twice the error."""
    if PRECISION == "tf32":
        x = round_off(x, 13)
    elif PRECISION == "upcast" and DTYPE == tl.bfloat16:
        x = round_off(x, 16)  # the interpreter truncates to bfloat16, where a GPU rounds
    return x.to(DTYPE)


@triton.jit
def round_off(x, BITS: tl.constexpr):
    """float32 values without the last bits of their mantissas; infinities and NaN as they are."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + (1 << (BITS - 1))) & -(1 << BITS)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded.to(tl.float32, bitcast=True))


@triton.jit
def source_position(target, source_size, target_size):
    """Where target index t falls in the source under align_corners=True: the lower index and the upper one's weight.

    t (s - 1) / (T - 1) is split by integer division, so the index is exact and the weight correctly rounded (by div_rn:
    `/` is div.full on a GPU, up to 2 ulp off). At the last index the weight is 0, and nobody reads a neighbour beyond
    the edge.
    """
    span = tl.maximum(target_size - 1, 1)
    numerator = target * (source_size - 1)
    return numerator // span, tl.div_rn((numerator % span).to(tl.float32), span.to(tl.float32))


@triton.jit
def source_weight(source, target, source_size, target_size):
    """The weight of a source index in a target index, 0 where it has none: the same table read the other way."""
    span = tl.maximum(target_size - 1, 1)
    distance = tl.abs(target * (source_size - 1) - source * span)
    return tl.div_rn(tl.maximum(span - distance, 0).to(tl.float32), span.to(tl.float32))


@triton.jit
def first_target(source, source_size, target_size):
    """The first target index in which a source index may have weight."""
    span = tl.maximum(source_size - 1, 1)
    return tl.maximum(source - 1, 0) * (target_size - 1) // span


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def largest(DTYPE: tl.constexpr):
    """The least float32 value that overflows when it is rounded to an operand."""
    if DTYPE == tl.float16:
        limit: tl.constexpr = 65520.0
    elif DTYPE == tl.bfloat16:
        limit: tl.constexpr = 3.3961775292304957e38
    else:
        limit: tl.constexpr = float("inf")
    return limit


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # keeps NaN


@triton.jit
def expm1(x):
    """e^x - 1 without cancellation near 0, by its series there."""
    series = 1.0 + x * 0.1
    series = 1.0 + x * (1.0 / 9.0) * series
    series = 1.0 + x * 0.125 * series
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * 0.2 * series
    series = 1.0 + x * 0.25 * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * 0.5 * series
    return tl.where(tl.abs(x) < 0.7, x * series, tl.exp(x) - 1.0)
