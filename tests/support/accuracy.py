"""op.md's rule for how right a backend must be, in one place.

Against the float64 truth on the same (rounded) inputs, the relative RMS error is at most 1.5 times that of plain
PyTorch at the same dtype and precision, plus 1e-6, and the largest error at most 4 times PyTorch's plus
1e-5 max|truth|, for outputs and gradients alike. Entropy near 0 is compared absolutely (1e-5).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe3d.ops.types import MoEOutput
from support import truth
from support.backends import Runner
from support.problems import Problem, random_problem

RMS_FACTOR, RMS_FLOOR = 1.5, 1e-6
WORST_FACTOR, WORST_FLOOR = 4.0, 1e-5
ENTROPY_ABSOLUTE = 1e-5
TF32_OUTPUTS, TF32_GRADIENTS = 2e-3, 5e-2  # relative RMS; of gradients because rounding turns some ReLUs
POOLED = 4  # problems a case


class Comparison(NamedTuple):
    """One output or gradient of one problem, flat and in float64."""

    ours: Tensor
    plain: Tensor
    exact: Tensor


def smooth_problem(seed: int = 0, **arguments) -> Problem:
    """A random problem; for float32 one in which no ReLU sits so near its kink that rounding decides the gradient."""
    for attempt in range(100):
        problem = random_problem(seed=1000 * seed + attempt, **arguments)
        if problem.tensors["x"].dtype.itemsize < 4 or truth.distance_to_kinks(problem) > 1e-5:
            return problem
    raise AssertionError("no smooth problem among 100")


def assert_as_accurate_as_pytorch(
    runner: Runner, *, precision: str = "auto", change: Callable[[Problem], Problem] = lambda p: p, **arguments
) -> None:
    """Outputs and all gradients of random problems obey the rule; cotangents arrive at every output.

    Rounding errors are luck in a gradient of three numbers, so they are pooled over several problems.
    """
    for name, values in _pooled(runner, precision, change, **arguments).items():
        assert_within(name, values, ENTROPY_ABSOLUTE if name == "entropy" else 0.0)


def assert_accurate_to_tf32(runner: Runner, precision: str, **arguments) -> None:
    """Outputs and all gradients, pooled as above, have errors that 11 significant bits explain.

    Not by the rule: whether PyTorch's own convolutions of so few channels take tf32 is the library's choice.
    """
    for name, values in _pooled(runner, precision, **arguments).items():
        limit = TF32_GRADIENTS if name.startswith("gradient") else TF32_OUTPUTS
        error = (values.ours - values.exact).norm() / values.exact.norm()
        assert error <= limit, f"{name}: relative RMS error {error:.3g} > {limit}"


def assert_within(name: str, values: Comparison, absolute: float = 0.0) -> None:
    """The rule itself. Beside it, the ratio of two RMS errors over n values scatters by about 1/sqrt(n)."""
    if values.exact.numel() == 0:
        return
    assert values.ours.isfinite().all(), f"{name} is not finite"
    error, baseline, exact = values.ours - values.exact, values.plain - values.exact, values.exact
    if error.abs().max() <= absolute:
        return
    factor = RMS_FACTOR * (1 + 2 * exact.numel() ** -0.5)
    rms, rms_limit = error.norm(), factor * baseline.norm() + RMS_FLOOR * exact.norm()
    assert rms <= rms_limit, f"{name}: RMS error {rms:.3g} > {rms_limit:.3g} (truth {exact.norm():.3g})"
    worst = error.abs().max()
    worst_limit = WORST_FACTOR * baseline.abs().max() + WORST_FLOOR * exact.abs().max()
    assert worst <= worst_limit, f"{name}: largest error {worst:.3g} > {worst_limit:.3g}"


def _pooled(
    runner: Runner, precision: str, change: Callable[[Problem], Problem] = lambda p: p, **arguments
) -> dict[str, Comparison]:
    pooled: dict[str, list[Comparison]] = defaultdict(list)
    for seed in range(POOLED):
        problem = change(smooth_problem(seed, device=runner.device, **arguments))
        for name, comparison in _compare(problem, backend=runner.backend, precision=precision):
            pooled[name].append(comparison)
    return {name: Comparison(*map(torch.cat, zip(*parts, strict=True))) for name, parts in pooled.items()}


def _compare(problem: Problem, backend: str, precision: str) -> Iterator[tuple[str, Comparison]]:
    conv = {"auto": problem.tensors["x"].dtype, "bf16": torch.bfloat16}.get(precision, torch.float32)
    clear = truth.decided(problem)
    ours_of, plain_of, exact_of = problem.leaves(), problem.leaves(), problem.double().leaves()
    ours = ours_of.run(return_experts=True, backend=backend, precision=precision)
    plain = truth.evaluate(plain_of, conv=conv, mix=torch.float32)
    exact = truth.evaluate(exact_of)

    for name, a, p, r in zip(MoEOutput._fields, ours, plain, exact, strict=True):
        assert (a is None) == (r is None), f"{name} is {a}"
        if a is not None:
            assert a.shape == r.shape and a.dtype == torch.float32 and a.is_contiguous(), name
            seen = _mask(name, clear, r)
            yield name, Comparison(*(v.detach().double()[seen] for v in (a, p, r)))

    cotangents = _cotangents(exact, clear)
    for outputs in (ours, plain, exact):
        pairs = [(o, c.to(o)) for o, c in zip(outputs, cotangents, strict=True) if o is not None and o.requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
    for name, leaf in ours_of.tensors.items():
        assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype, name
        gradients = (p.tensors[name].grad.double().flatten() for p in (ours_of, plain_of, exact_of))
        yield f"gradient of {name}", Comparison(*gradients)


def _cotangents(outputs: MoEOutput, clear: Tensor) -> list[Tensor]:
    """Random, but 0 where a choice that rounding may turn would reach a value."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.empty(0) if o is None else
        torch.randn(o.shape, generator=generator).to(o.device) * _mask(name, clear, o)
        for name, o in zip(MoEOutput._fields, outputs, strict=True)
    ]  # fmt: skip


def _mask(name: str, clear: Tensor, output: Tensor) -> Tensor:
    """Where rounding cannot turn the choice of expert that this output shows."""
    if name == "prediction":
        return clear.unsqueeze(1).expand_as(output)
    return clear if name == "confidence" else torch.ones_like(output, dtype=torch.bool)
