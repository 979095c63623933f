"""Calls of one backend under the conditions that the later stages are about; also run by compute-sanitizer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch
from torch import Tensor

import moe3d
from bench.gpu.stages import Skip
from moe3d.benchmark.case import PRECISIONS, Case, random_inputs, random_weights
from moe3d.benchmark.race import Effort
from moe3d.benchmark.suites import RACES
from moe3d.ops.types import MoEOutput
from moe3d.position import position_tables

RUNS = 100
_ONCE = Effort(seconds=0, least_rounds=1, most_rounds=1)
_MANY = 2**31


class Call:
    """The operation on one random input with one backend."""

    def __init__(self, case: Case, backend: str, seed: int = 0, **options):
        self.case = case
        self.x = random_inputs(case, seed)[0]
        self.weights = random_weights(case, seed)._asdict()
        pos = position_tables(case.size, case.channels, case.width / case.height, self.x)
        self.options = {"pos": pos, "backend": backend, "precision": case.precision, **options}

    @torch.no_grad()
    def forward(self, frames: slice = slice(None)) -> MoEOutput:
        return moe3d.moe_head(self.x[frames], self.case.size, **self.weights, **self.options)

    def gradients(self) -> list[Tensor]:
        """To x and all parameters, from a fixed cotangent of each output."""
        weights = {n: w.detach().requires_grad_() for n, w in self.weights.items() if w is not None}
        x = self.x.detach().requires_grad_()
        output = moe3d.moe_head(x, self.case.size, **weights, **self.options)
        total = output.prediction.mean() + output.confidence.mean() + output.entropy.mean()
        return list(torch.autograd.grad(total, [x, *weights.values()]))


def accuracy(case: Case, backend: str) -> dict:
    """Outputs, and gradients to features and parameters, judged beside plain PyTorch."""
    errors = {}
    for suite in ("tail", "decoder training"):
        outcome = RACES[suite].run(case, _ONCE, [backend])[backend]
        if outcome.skipped:
            raise Skip(outcome.skipped)
        if outcome.refused:
            raise RuntimeError(f"{suite}: {outcome.refused}")
        errors[suite] = outcome.error._asdict()
    return errors


def determinism(
    device: str, backend: str, precisions: Sequence[str] = PRECISIONS, runs: int = RUNS, size=(518, 518)
) -> dict:
    for precision in precisions:
        call = Call(Case(2, *size, precision=precision, device=device), backend)
        first = [*_present(call.forward()), *call.gradients()]
        for run in range(1, runs):
            again = [*_present(call.forward()), *call.gradients()]
            different = sum(not torch.equal(a, b) for a, b in zip(first, again, strict=True))
            if different:
                raise RuntimeError(
                    f"{precision}: run {run} differs from the first in {different} of {len(first)} tensors"
                )
    return {"runs": runs, "precisions": list(precisions)}


def cuda_graph(device: str, backend: str) -> dict:
    call, other = (Call(Case(device=device), backend, seed) for seed in (0, 1))
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            call.forward()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.forward()
    call.x.copy_(other.x)
    graph.replay()
    _require_equal(captured, call.forward(), "the replay")
    return {"replays": 1}


def two_streams(device: str, backend: str, rounds: int = 20) -> dict:
    calls = [Call(Case(2, device=device), backend, seed) for seed in (0, 1)]
    expected = [call.forward() for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(rounds):
        results = []
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(call.forward())
        torch.cuda.synchronize()
        for result, right in zip(results, expected, strict=True):
            _require_equal(result, right, "a call beside another stream's")
    return {"rounds": rounds}


def second_device(device: str, backend: str) -> dict:
    if torch.cuda.device_count() < 2:
        raise Skip("there is only one GPU")
    call, twin = (Call(Case(device=f"cuda:{index}"), backend) for index in (0, 1))
    # Each device has its own generator: the same numbers, so that the results can be compared.
    twin.x.copy_(call.x)
    with torch.cuda.device(0):
        _require_equal(MoEOutput(*(None if t is None else t.to(0) for t in twin.forward())), call.forward(), "GPU 1")
    return {"devices": torch.cuda.device_count()}


def large(device: str, backend: str) -> dict:
    """Features, then weights and hypotheses, of over 2^31 elements: first and last frame against their own calls."""
    frame = Case(precision="bf16", device=device)
    h, w = frame.source_size
    features = Case(_MANY // (frame.channels * h * w) + 1, precision="bf16", device=device)
    experts = Case(_MANY // (16 * frame.pixels) + 1, experts=16, channels=8, precision="bf16", device=device)
    for case, options in ((features, {}), (experts, {"return_experts": True})):
        call = Call(case, backend, **options)
        whole = call.forward()
        for index in (0, case.frames - 1):
            part = slice(index, index + 1)
            _require_close([t[part] for t in _present(whole)], _present(call.forward(part)), f"frame {index}")
        del call, whole
    return {"feature_frames": features.frames, "expert_frames": experts.frames}


def _present(output: MoEOutput) -> list[Tensor]:
    return [t for t in output if t is not None]


def _require_equal(result: MoEOutput, expected: MoEOutput, what: str) -> None:
    if not all(torch.equal(a, b) for a, b in zip(_present(result), _present(expected), strict=True)):
        raise RuntimeError(f"{what} gives another result")


def _require_close(result: list[Tensor], expected: list[Tensor], what: str) -> None:
    for a, b in zip(result, expected, strict=True):
        error = float((a - b).norm() / b.norm())
        if not error <= 1e-3:
            raise RuntimeError(f"{what} differs by {error:.1e} from a call of its own")


def main() -> None:
    """A call forward and backward: of the case, or for compute-sanitizer small ones in every precision."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("backend")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case", type=lambda text: Case(**json.loads(text)))
    args = parser.parse_args()
    small = [Case(2, 42, 56, precision=precision, device=args.device) for precision in PRECISIONS]
    for case in [args.case] if args.case else small:
        call = Call(case, args.backend)
        call.forward()
        call.gradients()


if __name__ == "__main__":
    main()
