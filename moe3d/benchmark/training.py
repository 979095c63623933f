"""Who races over a training step of the tail: forward, backward and AdamW, with the backbone and decoder frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import moe3d
from moe3d.benchmark.accuracy import Error, Judge, Outputs, truth
from moe3d.benchmark.case import Case, Weights, random_inputs, random_weights
from moe3d.benchmark.peers import (
    BY_EXPERT_CACHED,
    CONCATENATED,
    STOCK_CACHED,
    Peer,
    peers,
    with_judges,
)
from moe3d.benchmark.race import Contestant
from moe3d.position import position_tables

_ENTROPY_WEIGHT = 0.01
_SLACK = 10.0  # of gradients: where a hidden activation is nearly 0, rounding decides whether ReLU lets one pass


def names() -> list[str]:
    return [STOCK_CACHED, CONCATENATED, BY_EXPERT_CACHED, *moe3d.backends()]


def loss_of(outputs: Outputs) -> Tensor:
    """A stand-in for the paper's loss: squared log depth and confidence, and the gate's entropy."""
    loss = outputs.prediction.log().square().mean() + outputs.confidence.log().square().mean()
    return loss if outputs.entropy is None else loss + _ENTROPY_WEIGHT * outputs.entropy.mean()


class TrainingField:
    """The contestants of one case. Their first step's gradients are checked against those of the float64 truth."""

    def __init__(self, case: Case, names: Sequence[str], seed: int = 0, to_features: bool = False):
        """``to_features``: the features get a gradient, too, as they do when the decoder before the tail is trained."""
        self.case, self.seed, self.to_features = case, seed, to_features
        self.inputs = [x.requires_grad_(to_features) for x in random_inputs(case, seed)]
        self.peers = with_judges(peers(), names)
        self.judge = Judge(case.precision, _SLACK)
        self._truths: dict[Case, list[Tensor]] = {}

    def contestants(self) -> list[Contestant]:
        return [Contestant(p.name, partial(self._prepare, p), partial(self._check, p)) for p in self.peers]

    def _prepare(self, peer: Peer) -> Callable[[int], list[Tensor]]:
        peer.require(self.case)
        case = peer.of(self.case)
        weights = _parameters(random_weights(case, self.seed))
        parameters = weights.present
        optimiser = torch.optim.AdamW(parameters, lr=1e-6)

        def step(i: int) -> list[Tensor]:
            optimiser.zero_grad()
            x = self.inputs[i % len(self.inputs)]
            x.grad = None
            # Built anew in every step: packing the weights is part of it, once they change.
            loss_of(peer.build(case, weights)(x)).backward()
            optimiser.step()
            return _gradients([*parameters, x] if self.to_features else parameters)

        return step

    def _check(self, peer: Peer, gradients: list[Tensor]) -> Error:
        case = peer.of(self.case)
        if case not in self._truths:
            self._truths[case] = self._true_gradients(case)
        return self.judge(peer.name, peer.plain, gradients, self._truths[case])

    def _true_gradients(self, case: Case) -> list[Tensor]:
        """Frame by frame, which bounds the memory: the loss is a mean over frames."""
        weights = _parameters(random_weights(case, self.seed).map(Tensor.double))
        frames = [x.detach().double()[None].requires_grad_(self.to_features) for x in self.inputs[0]]
        for x in frames:
            tables = position_tables(case.size, case.channels, case.width / case.height, self.inputs[0])
            (loss_of(truth(x, weights, case.size, tables)) / case.frames).backward()
        gradients = _gradients(weights.present)
        return [*gradients, torch.cat(_gradients(frames))] if self.to_features else gradients


def _parameters(weights: Weights) -> Weights:
    return weights.map(lambda w: w.detach().clone().requires_grad_())


def _gradients(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.grad for leaf in leaves if leaf.grad is not None]
