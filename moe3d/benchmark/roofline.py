"""What the work costs at least, and what the machine can do at most.

Counting: a MAC is one multiply-add of a convolution or of an interpolation; activations, softmax and the additions of
biases and embeddings are left out. Bytes are the least that must move through memory: every input, weight and output
once. ``2 * macs / rate`` and ``bytes / bandwidth`` are two floors under the time; the larger one is the bound.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from moe3d.benchmark.case import Case, arithmetic
from moe3d.benchmark.clock import time_call

_PROBES = {"cpu": (256 << 20, 2048), "cuda": (4 << 30, 8192)}  # bytes to copy, size of the matrices
FORMULATIONS = ("direct", "columns", "low-resolution", "winograd")

PAPER_GFLOPS_PERCENT = 4.97  # MoE3D (arXiv 2601.05208), over VGGT
PAPER_PARAMETERS_PERCENT = 0.79
PAPER_TIME_PERCENT = 7.0


@dataclass(frozen=True)
class Work:
    """Multiply-adds that matrix units can do, those left to vector units, and bytes; per call."""

    matrix_macs: int
    vector_macs: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(
            self.matrix_macs + other.matrix_macs, self.vector_macs + other.vector_macs, self.bytes + other.bytes
        )


def tail_work(case: Case, formulation: str = "direct") -> Work:
    """The tail from fused features to outputs, for a plain head (``experts=1``) or a mixture.

    Args:
        formulation: of upsampling and first layer together. "direct": upsample, then convolve, as VGGT does.
            "columns": interpolate the rows, convolve at full height and low width with three column taps side by side,
            then interpolate the columns. "low-resolution": one product with 9 N outputs per low-resolution pixel, then
            interpolate and sum both ways; "bf16x3", the same, each product once though it is three of bfloat16 parts.
            "winograd": 64 products for a tile of 6 x 6 outputs; interpolation and transforms by dense 8 x 6 matrices
            there (rows once a column, columns once a tile) and 6 x 8 back.
    """
    (height, width), (h, w) = case.size, case.source_size
    c, n = case.channels, case.hidden
    if formulation == "direct":
        matrix, vector = height * width * c * 9 * n, height * width * c * 4  # 2 x 2 source pixels
    elif formulation == "columns":
        # Rows: 2 taps for each of C channels. Columns: 3 kernel columns of 2 taps for each of N channels.
        matrix, vector = height * w * 3 * c * 3 * n, height * w * c * 2 + height * width * n * 6
    elif formulation in ("low-resolution", "bf16x3"):
        # Columns for each low-resolution row and kernel row: 3 x 3 kernel taps of 2. Rows: 3 kernel rows of 2 taps.
        matrix, vector = h * w * c * 9 * n, h * width * n * 18 + height * width * n * 6
    elif formulation == "winograd":
        rows, columns = -(-height // 6), -(-width // 6)
        matrix = rows * columns * 64 * c * n
        vector = rows * 8 * 6 * c * (w + 8 * columns) + rows * columns * 14 * 24 * n
    else:
        raise ValueError(f"formulation must be one of {', '.join(FORMULATIONS)}, got {formulation!r}")
    second = case.experts * case.expert_hidden * case.outputs + (case.gate_hidden * case.experts if case.gated else 0)
    return Work(case.frames * (matrix + case.pixels * second), case.frames * vector, _least_bytes(case))


def _least_bytes(case: Case) -> int:
    """Features, weights and tables in, float32 outputs out: prediction, confidence and, of a mixture, entropy."""
    itemsize = 2 if case.precision == "bf16" else 4
    h, w = case.source_size
    tables = (case.height + case.width) * case.channels // 2
    read = case.frames * case.channels * h * w + case.parameters + tables
    planes = case.outputs + (1 if case.gated else 0)
    return read * itemsize + case.frames * case.pixels * planes * 4


def eager_bytes(case: Case) -> int:
    """What the tail moves when every step of the concatenated form is a call of its own that reads and writes memory.

    Steps: interpolate, add the embedding, 3x3, ReLU, 1x1 of experts and gate, and the mixture (counted once over its
    inputs and outputs, however many calls it takes).
    """
    itemsize = 2 if case.precision == "bf16" else 4
    h, w = case.source_size
    c, n = case.channels, case.hidden
    raw = case.experts * case.outputs + (case.experts if case.gated else 0)
    planes = case.outputs + (1 if case.gated else 0)
    per_pixel = c + 3 * c + (c + n) + 2 * n + (n + raw) + (raw + planes)
    return itemsize * case.frames * (c * h * w + case.pixels * per_pixel) + itemsize * case.parameters


def eager_bytes_by_expert(case: Case) -> int:
    """As :func:`eager_bytes`, but every expert and the gate read the upsampled features for themselves."""
    itemsize = 2 if case.precision == "bf16" else 4
    return eager_bytes(case) + itemsize * case.frames * case.pixels * case.channels * (case.experts - 1 + case.gated)


def embedding_bytes(case: Case) -> int:
    """What VGGT's embedding moves each time it is built, once per call, for any number of frames.

    Per pixel and axis, on C/4 float64 phases: write them, read them twice for sine and cosine and write both, read and
    write both to join them, read them and write float32. Then, on C float32: join the axes, and scale.
    """
    phases = 8 * case.channels // 4
    axis = phases * (1 + 2 * 2 + 2 * 2 + 2 + 1)
    return case.pixels * (2 * axis + 4 * 4 * case.channels)


# VGGT's own numbers (arXiv 2503.11651 and its released configuration).
_WIDTH, _VIT_BLOCKS, _AGGREGATOR_BLOCKS, _SPECIAL_TOKENS = 1024, 24, 48, 5
_LEVELS, _FEATURES = (256, 512, 1024, 1024), 256
VGGT_HEAD_PARAMETERS = 32_654_562


def vggt_macs(height: int, width: int) -> int:
    """VGGT's aggregator and depth head on one frame: convolutions and linear layers."""
    patches = (height // 14) * (width // 14)
    # A block: queries, keys, values and the output projection are 4 D^2 a token, the MLP of width 4 D is 8 D^2.
    blocks = (_VIT_BLOCKS + _AGGREGATOR_BLOCKS) * (patches + _SPECIAL_TOKENS) * 12 * _WIDTH**2
    return patches * 3 * 14 * 14 * _WIDTH + blocks + vggt_head_macs(height, width)


def vggt_head_macs(height: int, width: int) -> int:
    """VGGT's DPT depth head on one frame: its convolutions."""
    h, w = height // 14, width // 14
    pixels = _level_pixels(h, w)
    c, f = _LEVELS, _FEATURES
    project = h * w * 2 * _WIDTH * sum(c)
    resize = h * w * (16 * c[0] ** 2 + 4 * c[1] ** 2) + pixels[3] * 9 * c[3] ** 2
    to_features = sum(n * 9 * channels * f for n, channels in zip(pixels, c, strict=True))
    # Two residual units of two 3x3 a level, one at the coarsest; a 1x1 after the upsampling to the next level's size.
    units = 9 * f**2 * (4 * sum(pixels[:3]) + 2 * pixels[3])
    fused = f**2 * (64 * h * w + sum(pixels[:3]))
    output_conv1 = 64 * h * w * 9 * f * (f // 2)
    tail = tail_work(Case(1, height, width, 1)).matrix_macs
    return project + resize + to_features + units + fused + output_conv1 + tail


def _level_pixels(h: int, w: int) -> tuple[int, int, int, int]:
    """Of the decoder's four levels, finest first, for h x w patches."""
    return 16 * h * w, 4 * h * w, h * w, ((h + 1) // 2) * ((w + 1) // 2)


def vggt_paper_flops(height: int, width: int) -> int:
    """VGGT's aggregator and depth head on one frame as fvcore counts, which is how the paper's +4.97% comes out.

    fvcore counts one per multiply-add of convolutions and linear layers, five per normalised and four per interpolated
    value, and does not know ``scaled_dot_product_attention``. (That the paper counted so is inferred from its figure.)
    """
    h, w = height // 14, width // 14
    tokens = h * w + _SPECIAL_TOKENS
    # Two norms a block and one after the ViT; queries and keys in the aggregator; the head's on four layers of tokens.
    norms = 2 * (_VIT_BLOCKS + _AGGREGATOR_BLOCKS) + 1 + 2 * _AGGREGATOR_BLOCKS
    normalised = tokens * _WIDTH * norms + 4 * h * w * 2 * _WIDTH
    upsampled = _FEATURES * (64 * h * w + sum(_level_pixels(h, w)[:3])) + height * width * _FEATURES // 2
    return vggt_macs(height, width) + 5 * normalised + 4 * upsampled


@dataclass(frozen=True)
class Overhead:
    """What the mixture adds to VGGT, in percent."""

    gflops: float
    parameters: float


def counted_overhead(case: Case) -> Overhead:
    """By our count, for one frame of ``case``, to stand beside the paper's +4.97% GFLOPs and +0.79% parameters.

    Operations over aggregator and depth head, parameters over the depth head alone: what the paper divides by is not
    published, but with these denominators one budget (K = 4, gate 128) gives both of its figures.
    """
    one = Case(1, case.height, case.width, case.experts, case.gate_hidden)
    macs = tail_work(one).matrix_macs - tail_work(one.single).matrix_macs
    parameters = one.parameters - one.single.parameters
    return Overhead(100 * macs / vggt_paper_flops(*case.size), 100 * parameters / VGGT_HEAD_PARAMETERS)


@dataclass(frozen=True)
class Ceilings:
    """What this machine was seen to do."""

    copy_bytes_per_s: float  # read plus written
    matrix_flops_per_s: dict[str, float]  # by precision

    def floor_s(self, work: Work, precision: str) -> tuple[float, str]:
        """The least time for the work in seconds, and what bounds it: "arithmetic" or "memory"."""
        arithmetic_s = 2 * work.matrix_macs / self.matrix_flops_per_s[precision]
        memory_s = work.bytes / self.copy_bytes_per_s
        return max((arithmetic_s, "arithmetic"), (memory_s, "memory"))


def measure_ceilings(device: str, precisions: tuple[str, ...]) -> Ceilings:
    """A large copy, and a large matrix product on random data at each precision: the best of two seconds each."""
    size, n = _PROBES[torch.device(device).type]
    bandwidth = _copy_bandwidth(size, device)
    rates = {precision: 2 * n**3 / _product_time(n, precision, device) for precision in precisions}
    return Ceilings(bandwidth, rates)


def _copy_bandwidth(size: int, device: str) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_time(lambda: target.copy_(source), device)


def _product_time(n: int, precision: str, device: str) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    with arithmetic(precision):
        return _best_time(lambda: a @ b, device)


def _best_time(run, device: str, seconds: float = 2.0, least: int = 5) -> float:
    """Long enough that what else the machine does has a pause in it."""
    run()
    times = [time_call(run, device)]
    start = time.perf_counter()
    while len(times) < least or time.perf_counter() - start < seconds:
        times.append(time_call(run, device))
    return min(times)
