"""The truth against the operation in float64, and the rule by which results are admitted."""

from __future__ import annotations

import pytest
import torch

import moe3d
from moe3d.benchmark.accuracy import PLAIN_LIMIT, Error, Judge, Wrong, error_of, truth
from moe3d.benchmark.case import Case, random_inputs, random_weights
from moe3d.benchmark.peers import embedding
from moe3d.position import position_map, position_tables

SMALL = Case(frames=2, height=28, width=42, experts=3, gate_hidden=10, channels=8, expert_hidden=6)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("size", [(28, 42), (8, 12), (16, 24), (1, 1), (5, 3)])
def test_the_truth_is_the_operations_definition(experts, size):
    case = Case(frames=2, height=28, width=42, experts=experts, gate_hidden=10, channels=8, expert_hidden=6)
    x, weights = random_inputs(case, 0)[0], random_weights(case, 0)
    tables = position_tables(size, case.channels, 1.5, x)
    exact = truth(x, weights, size, tables)
    double = {name: w if w is None else w.double() for name, w in weights._asdict().items()}
    pos = tuple(t.double() for t in tables)
    output = moe3d.moe_head(x.double(), size, **double, pos=pos, backend="reference")
    torch.testing.assert_close(exact.prediction, output.prediction)
    torch.testing.assert_close(exact.confidence, output.confidence)
    if experts > 1:
        torch.testing.assert_close(exact.entropy, output.entropy)


@pytest.mark.parametrize("size, aspect", [((5, 7), 1.4), ((1, 4), 0.5), ((37, 37), 1.0)])
def test_the_peers_embedding_is_the_packages(size, aspect):
    tables = position_tables(size, 16, aspect, torch.empty(0))
    torch.testing.assert_close(
        embedding(size, 16, torch.device("cpu"), aspect), position_map(*tables), rtol=0, atol=1e-7
    )


@pytest.mark.real_vggt
def test_the_peers_embedding_is_vggts():
    from vggt.heads.utils import create_uv_grid, position_grid_to_embed

    grid = create_uv_grid(42, 28, aspect_ratio=1.5, dtype=torch.float32, device="cpu")
    theirs = (position_grid_to_embed(grid, 16) * 0.1).permute(2, 0, 1)
    torch.testing.assert_close(embedding((28, 42), 16, torch.device("cpu"), 1.5), theirs, rtol=0, atol=1e-7)


def test_errors_are_relative_and_the_worst_output_counts():
    r = torch.tensor([3.0, 4.0], dtype=torch.float64)
    error = error_of([r + 0.05, r], [r, r])
    assert error == pytest.approx(Error(rms=0.05 * 2**0.5 / 5, worst=0.05 / 4))


@pytest.mark.parametrize(
    "result, message",
    [
        (None, r"expected a result of shape \[2\], got None"),
        (torch.zeros(3), r"expected a result of shape \[2\], got \[3\]"),
        (torch.tensor([1.0, torch.nan]), "not finite"),
        (torch.tensor([1.0, torch.inf]), "not finite"),
    ],
)
def test_results_that_are_no_results(result, message):
    with pytest.raises(Wrong, match=message):
        error_of([result], [torch.ones(2, dtype=torch.float64)])


def judged(error: float, plain_error: float | None) -> Error:
    """Both errors at one of two pixels, of a truth of ones."""
    true = torch.ones(2, dtype=torch.float64)
    judge = Judge("ieee")

    def result(e: float):
        return [true + torch.tensor([e, 0.0], dtype=torch.float64)]

    if plain_error is not None:
        judge("plain", None, result(plain_error), [true])
    return judge("ours", None if plain_error is None else "plain", result(error), [true])


def test_a_result_may_be_half_as_wrong_again_as_plain_pytorch():
    assert judged(1.4e-5, plain_error=1e-5).rms == pytest.approx(1.4e-5 / 2**0.5)
    with pytest.raises(Wrong, match=r"RMS error 1.3e-05 \(allowed 1.2e-05\)"):
        judged(1.8e-5, plain_error=1e-5)


def test_plain_pytorch_itself_has_a_limit():
    judged(0.9 * PLAIN_LIMIT["ieee"], plain_error=None)
    with pytest.raises(Wrong):
        judged(2 * PLAIN_LIMIT["ieee"], plain_error=None)


def test_nobody_is_admitted_whose_judge_is_not():
    judge, true = Judge("ieee"), torch.ones(2, dtype=torch.float64)
    with pytest.raises(Wrong, match="'plain', by which it is judged, is not right itself"):
        judge("ours", "plain", [true], [true])
    with pytest.raises(Wrong):
        judge("plain", None, [2 * true], [true])
    with pytest.raises(Wrong, match="is not right itself"):
        judge("ours", "plain", [true], [true])
