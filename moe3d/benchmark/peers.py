"""Who races over the tail: VGGT's own head, the ways to write a mixture in plain PyTorch, and this package's backends.

The plain PyTorch peers are written for themselves, simply, as somebody would who does not know this package; they share
nothing with its backends. Every peer takes fused features x [B, C, h, w] and gives :class:`~.accuracy.Outputs`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe3d
from moe3d.benchmark.accuracy import Error, Judge, Outputs, join, truth
from moe3d.benchmark.case import VGGT_CHUNK, Case, Weights, random_inputs, random_weights
from moe3d.benchmark.race import Contestant, Unavailable
from moe3d.ops import native_cuda
from moe3d.ops.native import ISA_VARIABLE, chosen_formulation, has_bf16_products
from moe3d.position import position_tables

STOCK = "stock"
STOCK_CACHED = "stock, cached embedding"
WIDENED = "stock, widened"
BY_EXPERT = "eager by expert"
BY_EXPERT_CACHED = "eager by expert, cached embedding"
CONCATENATED = "eager concatenated"
CHANNELS_LAST = "eager concatenated, channels_last"
COMPILED = "torch.compile"
ONE_EXPERT = "cpu, one expert"
AVX2 = "cpu, AVX2"


def _direct(_: Case) -> str:
    return "direct"


def _cpu_formulation(case: Case) -> str:
    return chosen_formulation(case.source_size, case.size, case.channels, case.hidden, case.precision == "bf16")


def _cuda_formulation(case: Case) -> str:
    hidden = case.experts, case.expert_hidden, case.gate_hidden if case.gated else 0
    return native_cuda.chosen_formulation(case.source_size, case.size, case.channels, hidden, case.precision)


# What backends execute, where it is not the direct form; for the counts.
_FORMULATIONS: dict[str, Callable[[Case], str]] = {"cpu": _cpu_formulation, "cuda": _cuda_formulation}

Tail = Callable[[Tensor], Outputs]


def embedding(size: tuple[int, int], channels: int, device: torch.device, aspect: float) -> Tensor:
    """VGGT's position embedding [C, H, W], computed as VGGT does at every call: pixel by pixel in float64."""
    height, width = size
    diagonal = (aspect**2 + 1) ** 0.5  # aspect: width / height of the image
    x, y = aspect / diagonal * (width - 1) / width, 1 / diagonal * (height - 1) / height
    grid_y, grid_x = torch.meshgrid(
        torch.linspace(-y, y, height, device=device), torch.linspace(-x, x, width, device=device), indexing="ij"
    )
    frequency = 100.0 ** -(torch.arange(channels // 4, dtype=torch.float64, device=device) / (channels / 4))

    def waves(position: Tensor) -> Tensor:
        phase = position.reshape(-1, 1).double() * frequency
        return torch.cat([phase.sin(), phase.cos()], dim=1).float()

    pixels = torch.cat([waves(grid_x), waves(grid_y)], dim=1) * 0.1
    return pixels.view(height, width, channels).permute(2, 0, 1)


def features(case: Case, cached: bool, memory_format: torch.memory_format = torch.contiguous_format) -> Callable:
    """Upsampling and embedding, x -> [B, C, H, W]; the embedding is rebuilt at every call, as VGGT does, or kept."""
    shape = case.size, case.channels, torch.device(case.device), case.width / case.height
    kept = _kept_embedding(*shape, case.dtype, memory_format) if cached else None

    def run(x: Tensor) -> Tensor:
        x = F.interpolate(x, size=case.size, mode="bilinear", align_corners=True)
        return x + (embedding(*shape).to(x.dtype) if kept is None else kept)

    return run


@functools.lru_cache(maxsize=2)
def _kept_embedding(size, channels, device, aspect, dtype, memory_format) -> Tensor:
    return embedding(size, channels, device, aspect).to(dtype)[None].contiguous(memory_format=memory_format)


def _block(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """3x3, ReLU, 1x1; float32 out, as under autocast."""
    hidden = F.relu_(F.conv2d(x, w1, b1, padding=1))
    return F.conv2d(hidden, w2[:, :, None, None], b2).float()


def single_head(upsample: Callable, w: Weights) -> Tail:
    """VGGT's tail."""
    (block,) = w.experts

    def run(x: Tensor) -> Outputs:
        z = _block(upsample(x), *block)
        return Outputs(z[:, :-1].exp(), 1 + z[:, -1].exp(), None)

    return run


def by_expert(upsample: Callable, w: Weights) -> Tail:
    """The mixture as a loop over the experts."""
    experts, gate = w.experts, w.gate

    def run(x: Tensor) -> Outputs:
        shared = upsample(x)
        weights = torch.ones_like(shared[:, :1]) if gate is None else _block(shared, *gate).softmax(1)
        prediction: Any = 0.0
        confidence: Any = 0.0
        for k, expert in enumerate(experts):
            z, weight = _block(shared, *expert), weights[:, k]
            prediction = prediction + weight[:, None] * z[:, :-1].exp()
            confidence = confidence + weight * (1 + z[:, -1].exp())
        return Outputs(prediction, confidence, _entropy(weights))

    return run


def concatenated(upsample: Callable, w: Weights, memory_format: torch.memory_format = torch.contiguous_format) -> Tail:
    """The mixture with one 3x3 convolution for all experts and the gate."""
    (experts, outputs, width), gate = w.expert_w2.shape, w.gate
    blocks = [*w.experts, *([] if gate is None else [gate])]
    w1, b1 = (torch.cat([block[i] for block in blocks]) for i in (0, 1))
    w1 = w1.contiguous(memory_format=memory_format)
    w2, b2 = w.expert_w2.reshape(-1, width, 1, 1), w.expert_b2.flatten()

    def run(x: Tensor) -> Outputs:
        hidden = F.relu_(F.conv2d(upsample(x), w1, b1, padding=1))
        z = F.conv2d(hidden[:, : experts * width], w2, b2, groups=experts).float().unflatten(1, (experts, outputs))
        if gate is None:
            weights = torch.ones_like(z[:, :, 0])
        else:
            weights = F.conv2d(hidden[:, experts * width :], gate[2][:, :, None, None], gate[3]).float().softmax(1)
        prediction = (weights[:, :, None] * z[:, :, :-1].exp()).sum(1)
        confidence = (weights * (1 + z[:, :, -1].exp())).sum(1)
        return Outputs(prediction, confidence, _entropy(weights))

    return run


def _entropy(weights: Tensor) -> Tensor:
    return torch.special.entr(weights).sum(1)


def compiled(case: Case, w: Weights) -> Tail:
    """The concatenated form through torch.compile: its default mode on the CPU, max-autotune on CUDA."""
    mode = "max-autotune" if torch.device(case.device).type == "cuda" else "default"
    return torch.compile(concatenated(features(case, cached=True), w), mode=mode, dynamic=False)


def backend_tail(name: str, case: Case, w: Weights) -> Tail:
    """This package's operation; the embedding's small tables are rebuilt at every call, as a patched model does."""
    weights: dict[str, Any] = w._asdict()

    def run(x: Tensor) -> Outputs:
        tables = position_tables(case.size, case.channels, case.width / case.height, x)
        output = moe3d.moe_head(x, case.size, pos=tables, backend=name, precision=case.precision, **weights)
        assert output.confidence is not None  # it was not asked to leave it out
        return Outputs(output.prediction, output.confidence, output.entropy if case.gated else None)

    return run


def _with_avx2(case: Case, w: Weights) -> Tail:
    tail = backend_tail("cpu", case, w)

    def run(x: Tensor) -> Outputs:
        with _instruction_set("avx2"):
            return tail(x)

    return run


@contextlib.contextmanager
def _instruction_set(name: str | None) -> Iterator[None]:
    """The ``cpu`` backend's, where one is named."""
    before = os.environ.get(ISA_VARIABLE)
    if name is not None:
        os.environ[ISA_VARIABLE] = name
    try:
        yield
    finally:
        if name is not None:
            os.environ.pop(ISA_VARIABLE)
        if name is not None and before is not None:
            os.environ[ISA_VARIABLE] = before


@dataclass(frozen=True)
class Peer:
    """One way to compute the tail.

    ``of`` turns the mixture's case into the one that this peer computes (one plain head, say). ``formulation``: see
    :func:`~.roofline.tail_work`. ``plain``: the peer by whose error this one's is judged; None for those that judge.
    ``backend``: of this package, if it is one; ``isa``: the instruction set to which the ``cpu`` backend is held.
    """

    name: str
    build: Callable[[Case, Weights], Tail]
    of: Callable[[Case], Case] = lambda case: case
    formulation: Callable[[Case], str] = _direct
    plain: str | None = CONCATENATED
    memory_format: torch.memory_format = torch.contiguous_format
    backend: str | None = None
    isa: str | None = None

    def require(self, case: Case) -> None:
        """Raises :class:`~.race.Unavailable` with the reason where this peer cannot run ``case`` here."""
        if self.backend is None:
            return
        with _instruction_set(self.isa):
            require_backend(self.backend, case.device)
            has_arithmetic = case.precision != "bf16" or has_bf16_products()
        if self.backend == "cpu" and not has_arithmetic:
            raise Unavailable("bfloat16 arithmetic needs a processor and an instruction set with avx512_bf16")


def _contiguous(write: Callable, cached: bool) -> Callable[[Case, Weights], Tail]:
    return lambda case, w: write(features(case, cached), w)


def _channels_last(case: Case, w: Weights) -> Tail:
    return concatenated(features(case, True, torch.channels_last), w, torch.channels_last)


_PLAIN = [
    Peer(STOCK_CACHED, _contiguous(single_head, True), of=lambda case: case.single, plain=None),
    Peer(STOCK, _contiguous(single_head, False), of=lambda case: case.single, plain=STOCK_CACHED),
    Peer(WIDENED, _contiguous(single_head, True), of=lambda case: case.widened, plain=None),
    Peer(CONCATENATED, _contiguous(concatenated, True), plain=None),
    Peer(CHANNELS_LAST, _channels_last, memory_format=torch.channels_last),
    Peer(BY_EXPERT, _contiguous(by_expert, False)),
    Peer(BY_EXPERT_CACHED, _contiguous(by_expert, True)),
    Peer(COMPILED, compiled),
]


_VARIANTS = [
    Peer(
        ONE_EXPERT,
        partial(backend_tail, "cpu"),
        of=lambda case: case.single,
        formulation=_cpu_formulation,
        plain=STOCK_CACHED,
        backend="cpu",
    ),
    Peer(AVX2, _with_avx2, formulation=_cpu_formulation, backend="cpu", isa="avx2"),
]


def peers() -> dict[str, Peer]:
    """All of them by name; those that judge come first. The package's backends go by their own names."""
    backends = [
        Peer(name, partial(backend_tail, name), formulation=_FORMULATIONS.get(name, _direct), backend=name)
        for name in moe3d.backends()
    ]
    return {peer.name: peer for peer in _PLAIN + backends + _VARIANTS}


class TailField:
    """The contestants of one case: same inputs for all, same weights for all that compute the same thing."""

    def __init__(self, case: Case, names: Sequence[str], seed: int = 0):
        self.case, self.seed = case, seed
        self.peers = with_judges(peers(), names)
        self.judge = Judge(case.precision)
        self.inputs = {torch.contiguous_format: random_inputs(case, seed)}
        self._weights: dict[Case, Weights] = {}
        self._truths: dict[Case, Outputs] = {}

    def contestants(self) -> list[Contestant]:
        return [Contestant(p.name, partial(self._prepare, p), partial(self._check, p)) for p in self.peers]

    @torch.no_grad()
    def _prepare(self, peer: Peer) -> Callable[[int], Outputs]:
        peer.require(self.case)
        case, inputs = peer.of(self.case), self._inputs(peer.memory_format)
        tail = peer.build(case, self.weights_of(case))
        return torch.no_grad()(lambda i: in_chunks(tail, inputs[i % len(inputs)]))

    @torch.no_grad()
    def _check(self, peer: Peer, outputs: Outputs) -> Error:
        return self.judge(peer.name, peer.plain, outputs, self.truth_of(peer.of(self.case)))

    def _inputs(self, memory_format: torch.memory_format) -> list[Tensor]:
        if memory_format not in self.inputs:
            plain = self.inputs[torch.contiguous_format]
            self.inputs[memory_format] = [x.contiguous(memory_format=memory_format) for x in plain]
        return self.inputs[memory_format]

    def weights_of(self, case: Case) -> Weights:
        if case not in self._weights:
            self._weights[case] = random_weights(case, self.seed)
        return self._weights[case]

    def truth_of(self, case: Case) -> Outputs:
        if case not in self._truths:
            x = self.inputs[torch.contiguous_format][0]
            tables = position_tables(case.size, case.channels, case.width / case.height, x)
            self._truths[case] = truth(x, self.weights_of(case), case.size, tables)
        return self._truths[case]


def in_chunks(tail: Tail, x: Tensor) -> Outputs:
    """At most as many frames at a time as VGGT's heads compute."""
    if len(x) <= VGGT_CHUNK:
        return tail(x)
    return join([tail(chunk) for chunk in x.split(VGGT_CHUNK)])


def with_judges(every: Mapping[str, Peer], names: Sequence[str]) -> list[Peer]:
    """The named peers and those by whom they are judged, these first."""
    wanted = {*names, *(every[name].plain for name in names)}
    return [peer for peer in every.values() if peer.name in wanted]


def require_backend(name: str, device: str) -> None:
    """Raises :class:`~.race.Unavailable` where ``name`` is a backend of this package that cannot run on ``device``."""
    reason = moe3d.backends().get(name)
    if reason is not None:
        raise Unavailable(reason)
    if name == "cpu" and torch.device(device).type != "cpu":
        raise Unavailable("the cpu backend works on the CPU")
