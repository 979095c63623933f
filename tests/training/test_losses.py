"""The losses against hand-written loops and known values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d.geometry import decode_pose, encode_pose, project, unproject
from moe3d.losses import (
    CameraLoss,
    EntropyLoss,
    MixtureNLL,
    MoEDepthLoss,
    Schedule,
    Term,
    WeightedLoss,
    at_local_level,
    camera_loss,
    confidence_loss,
    entropy_loss,
    expected_cost_loss,
    l1_depth_loss,
    load_balance,
    log_depth_loss,
    log_gradient_loss,
    mixture_nll,
    moe_depth_loss,
    normalise_scale,
)
from moe3d.training.recipes import BEST

DEPTH_LOSSES = (moe_depth_loss, l1_depth_loss, log_depth_loss, log_gradient_loss)


@pytest.fixture
def maps():
    """Predicted and true depth [2, 3, 7, 9] in float64, and which pixels are valid; the truth is 0 elsewhere."""
    generator = torch.Generator().manual_seed(0)
    depth, truth = (torch.rand(2, 2, 3, 7, 9, generator=generator, dtype=torch.float64) + 0.5).unbind()
    valid = torch.rand(2, 3, 7, 9, generator=generator) < 0.7
    return depth, truth * valid, valid


def pixels(valid):
    return [tuple(index) for index in valid.nonzero().tolist()]


def test_depth_loss_is_the_mean_square_over_valid_pixels(maps):
    depth, truth, valid = maps
    squares = [(depth[i] - truth[i]).item() ** 2 for i in pixels(valid)]
    assert moe_depth_loss(depth, truth, valid).item() == pytest.approx(sum(squares) / len(squares))


def test_log_depth_loss_is_the_mean_relative_error(maps):
    depth, truth, valid = maps
    errors = [abs(math.log(depth[i] / truth[i])) for i in pixels(valid)]
    assert log_depth_loss(depth, truth, valid).item() == pytest.approx(sum(errors) / len(errors))


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_gradient_loss_compares_valid_neighbours_at_every_spacing(maps, scales):
    depth, truth, valid = maps
    error = torch.where(valid, (depth / truth.clamp(min=1e-9)).log(), torch.nan)
    expected = 0.0
    for step in (1, 2, 4)[:scales]:
        for axis in (0, 1):
            differences = []
            for b in range(2):
                for s in range(3):
                    for y in range(0, 7, step):
                        for x in range(0, 9, step):
                            other = (y + step, x) if axis == 0 else (y, x + step)
                            if other[0] < 7 and other[1] < 9:
                                differences.append(abs(error[b, s, y, x] - error[(b, s, *other)]))
            differences = [d for d in differences if not d.isnan()]
            expected += sum(differences) / max(1, len(differences))
    assert log_gradient_loss(depth, truth, valid, scales).item() == pytest.approx(float(expected) / scales)


def test_scale_and_offset_of_a_scene_leave_its_gradient_loss_alone(maps):
    depth, truth, valid = maps
    assert log_gradient_loss(3 * truth.clamp(min=0.1), truth, valid).item() == pytest.approx(0, abs=1e-12)
    once, thrice = (log_gradient_loss(factor * depth, truth, valid) for factor in (1, 3))
    assert once.item() == pytest.approx(thrice.item())


@pytest.mark.parametrize("loss", DEPTH_LOSSES)
def test_nothing_valid_gives_zero_and_zero_gradients(loss):
    depth = torch.rand(1, 1, 4, 4).add(0.5).requires_grad_()
    value = loss(depth, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert torch.equal(depth.grad, torch.zeros_like(depth))


@pytest.mark.parametrize("loss", DEPTH_LOSSES)
def test_invalid_pixels_get_no_gradient_even_where_they_are_nan(maps, loss):
    depth, truth, valid = maps
    depth = torch.where(valid, depth, torch.nan).requires_grad_()
    loss(depth, truth, valid).backward()
    assert depth.grad.isfinite().all()
    assert not depth.grad[~valid].any()


@pytest.mark.parametrize("loss", DEPTH_LOSSES)
def test_gradients_pass_gradcheck(maps, loss):
    depth, truth, valid = (m[:1, :1] for m in maps)
    assert torch.autograd.gradcheck(lambda d: loss(d, truth, valid), depth.requires_grad_())


def test_entropy_loss_of_uniform_weights_is_log_k():
    weights = torch.full((2, 4, 5, 6), 0.25, dtype=torch.float64)
    entropy = -(weights * weights.log()).sum(1)
    assert entropy_loss(entropy).item() == pytest.approx(math.log(4))


def test_confidence_loss_is_least_at_alpha_over_error_and_spares_the_depth():
    truth = torch.ones(1, 1, 8, 8)
    depth = torch.full_like(truth, 1.1).requires_grad_()
    confidence = torch.full_like(truth, 0.2 / math.log(1.1)).requires_grad_()
    confidence_loss(confidence, depth, truth, truth > 0).backward()
    assert confidence.grad.abs().max() < 1e-6
    assert depth.grad is None


def test_camera_loss_of_known_errors():
    truth = torch.linspace(-1, 1, 18, dtype=torch.float64).view(1, 2, 9)
    translation, rotation, view = (truth.clone() for _ in range(3))
    translation[..., :3] += 2
    rotation[..., 3:7] -= 0.5
    view[..., 7:] += 0.3
    everything = torch.tensor([True])
    assert camera_loss([translation], truth, everything).item() == pytest.approx(2)
    assert camera_loss([rotation], truth, everything).item() == pytest.approx(0.5)
    assert camera_loss([view], truth, everything).item() == pytest.approx(0.15)
    assert camera_loss([translation + 1e3 * (translation - truth)], truth, everything).item() == pytest.approx(100)
    stages = camera_loss([translation, rotation, view], truth, everything)
    assert stages.item() == pytest.approx((0.36 * 2 + 0.6 * 0.5 + 0.15) / 3)


def test_camera_loss_leaves_out_scenes_that_do_not_count():
    generator = torch.Generator().manual_seed(0)
    pose, truth = torch.randn(2, 3, 2, 9, generator=generator).unbind()
    pose.requires_grad_()
    camera_loss([pose], truth, torch.tensor([True, False, True])).backward()
    assert not pose.grad[1].any() and pose.grad[[0, 2]].any()
    nothing = camera_loss([pose], truth, torch.zeros(3, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 20), st.floats(0.01, 100))
def test_normalised_scenes_have_unit_mean_distance_in_the_first_camera_whatever_their_unit(seed, unit):
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(2, 3, 12, 10, generator=generator, dtype=torch.float64) + 0.5
    valid = torch.rand(2, 3, 12, 10, generator=generator) < 0.8
    pose = torch.rand(2, 3, 9, generator=generator, dtype=torch.float64) + 0.2
    extrinsics, intrinsics = decode_pose(pose, (12, 10))

    scaled, cameras = normalise_scale(depth * unit, valid, intrinsics, extrinsics * _times_translation(unit))
    reference, same = normalise_scale(depth, valid, intrinsics, extrinsics)
    torch.testing.assert_close(scaled, reference, rtol=1e-3, atol=0)  # VGGT adds 1e-3 to the count
    torch.testing.assert_close(cameras, same, rtol=1e-3, atol=1e-6)

    assert torch.allclose(cameras[:, 0], torch.eye(3, 4, dtype=torch.float64))
    distance = unproject(scaled, intrinsics, cameras).norm(dim=-1)
    for scene in range(2):
        assert distance[scene][valid[scene]].mean().item() == pytest.approx(1, rel=1e-3)


def test_normalising_keeps_what_the_cameras_see():
    pose = torch.tensor([[[0.3, 0.1, -0.2, 0.1, 0.2, 0.0, 0.9, 0.8, 1.0], [0.5, 0, 0.1, 0, 0.1, 0.1, 0.9, 0.8, 1.0]]])
    extrinsics, intrinsics = decode_pose(pose.double(), (12, 10))
    depth = torch.rand(1, 2, 12, 10, dtype=torch.float64) + 1
    before = _first_in_second(depth, intrinsics, extrinsics)
    depth, extrinsics = normalise_scale(depth, depth > 0, intrinsics, extrinsics)
    after = _first_in_second(depth, intrinsics, extrinsics)
    torch.testing.assert_close(before, after)
    assert encode_pose(extrinsics, intrinsics, (12, 10))[0, 0, :3].abs().max() < 1e-12


def _first_in_second(depth, intrinsics, extrinsics):
    """Where the first frame's pixels land in the second."""
    points = unproject(depth, intrinsics, extrinsics)[0, 0].flatten(0, 1)
    return project(points, intrinsics[0, 1], extrinsics[0, 1])[0]


def _times_translation(unit):
    return torch.tensor([1, 1, 1, unit], dtype=torch.float64)


def test_l1_depth_loss_is_the_mean_absolute_error(maps):
    depth, truth, valid = maps
    errors = [abs(depth[i] - truth[i]).item() for i in pixels(valid)]
    assert l1_depth_loss(depth, truth, valid).item() == pytest.approx(sum(errors) / len(errors))


@pytest.fixture
def mixture(maps):
    """Weights and hypotheses [2, 3, K = 3, 7, 9] in float64 beside the maps' truth and validity."""
    _, truth, valid = maps
    generator = torch.Generator().manual_seed(1)
    logits, hypotheses = torch.rand(2, 2, 3, 3, 7, 9, generator=generator, dtype=torch.float64).unbind()
    return logits.softmax(2), hypotheses + 0.5, truth, valid


@pytest.mark.parametrize("log_depth", [True, False])
@pytest.mark.parametrize("density", ["laplace", "gaussian"])
@pytest.mark.parametrize("scale", [0.1, torch.tensor([0.05, 0.2, 0.4], dtype=torch.float64)[:, None, None]])
def test_mixture_nll_is_that_of_pytorchs_distributions(mixture, density, log_depth, scale):
    weights, hypotheses, truth, valid = mixture
    means = hypotheses.log() if log_depth else hypotheses
    family = {"laplace": torch.distributions.Laplace, "gaussian": torch.distributions.Normal}[density]
    components = family(means.movedim(2, -1), torch.as_tensor(scale).expand_as(means).movedim(2, -1))
    expected = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights.movedim(2, -1)), components
    ).log_prob(truth.clamp(min=1e-9).log() if log_depth else truth)
    actual = mixture_nll(weights, hypotheses, truth, valid, scale, density, log_depth)
    torch.testing.assert_close(actual, -expected[valid].mean())


def test_expected_cost_weighs_every_expert_by_its_odds(mixture):
    weights, hypotheses, truth, valid = mixture
    costs = [
        sum(weights[b, s, k, y, x] * abs(math.log(hypotheses[b, s, k, y, x] / truth[b, s, y, x])) for k in range(3))
        for b, s, y, x in pixels(valid)
    ]
    assert expected_cost_loss(*mixture).item() == pytest.approx(float(sum(costs)) / len(costs))


@pytest.mark.parametrize("loss", [mixture_nll, expected_cost_loss])
def test_mixture_losses_pass_gradcheck_and_ignore_what_is_not_valid(mixture, loss):
    weights, hypotheses, truth, valid = (m[:1, :1, ..., :4, :5] for m in mixture)
    inputs = (weights.clone().requires_grad_(), hypotheses.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda w, d: loss(w, d, truth, valid), inputs)
    broken = torch.where(valid.unsqueeze(2), hypotheses, torch.inf).requires_grad_()
    value = loss(weights, broken, truth, valid)
    value.backward()
    assert value.isfinite() and broken.grad.isfinite().all()
    assert not broken.grad[~valid.unsqueeze(2).expand_as(broken)].any()


def test_a_likelihood_prefers_two_surfaces_where_a_squared_error_prefers_their_mean():
    """A pixel that is near or far with equal odds: the mixture's optimum is on the surfaces, the L2's between them."""
    truth = torch.tensor([1.0, 2.0] * 50).reshape(1, 1, 10, 10)
    weights = torch.full((1, 1, 2, 10, 10), 0.5)
    between, apart = torch.full((1, 1, 2, 10, 10), 1.5), torch.tensor([1.0, 2.0])[:, None, None].expand(1, 1, 2, 10, 10)
    valid = truth > 0
    assert mixture_nll(weights, apart, truth, valid) < mixture_nll(weights, between, truth, valid)
    mixed = [(weights * hypotheses).sum(2) for hypotheses in (apart, between)]
    assert moe_depth_loss(mixed[0], truth, valid) == moe_depth_loss(mixed[1], truth, valid)


def test_an_unknown_density_and_a_scale_of_zero_are_refused(mixture):
    with pytest.raises(ValueError, match="density must be one of laplace, gaussian, got 'cauchy'"):
        mixture_nll(*mixture, density="cauchy")
    with pytest.raises(ValueError, match="scale must be a finite number above 0, got 0"):
        MixtureNLL(scale=0)


def test_the_truth_at_the_predictions_level_keeps_its_steps_only(maps):
    depth, truth, valid = maps
    moved = at_local_level(truth, depth, valid, 3)
    for b, s, y, x in pixels(valid):
        window = (b, s, slice(max(0, y - 1), y + 2), slice(max(0, x - 1), x + 2))
        ratio = (depth[window].log() - truth[window].log())[valid[window]].mean()
        assert moved[b, s, y, x].item() == pytest.approx(truth[b, s, y, x].item() * math.exp(ratio))
    assert (moved[~valid] == 1).all()
    assert torch.allclose(at_local_level(7 * truth, depth, valid, 3), moved)  # a factor is no step


def test_a_likelihood_at_the_local_level_ignores_a_factor_and_teaches_nothing_through_the_mean(mixture):
    weights, hypotheses, truth, valid = mixture
    depth = (weights * hypotheses).sum(2).requires_grad_()
    predictions = {"depth_weights": weights, "depth_hypotheses": hypotheses, "depth": depth[..., None]}
    loss = MixtureNLL(window=3)
    near, far = (loss(predictions, {"depth": factor * truth, "valid": valid}) for factor in (1.0, 5.0))
    torch.testing.assert_close(near, far)
    assert not near.requires_grad
    with pytest.raises(ValueError, match=r"^window must be 0 or an odd number of pixels, got 4$"):
        MixtureNLL(window=4)


def test_the_level_that_a_local_likelihood_ignores_has_a_loss_of_its_own(mixture):
    weights, hypotheses, truth, valid = (value.float() if value.is_floating_point() else value for value in mixture)
    depth = (weights * hypotheses).sum(2)
    predictions = {"depth_weights": weights, "depth_hypotheses": hypotheses, "depth": depth[..., None]}
    predictions["depth_entropy"] = -(weights * weights.log()).sum(2)
    batch = {"depth": truth, "valid": valid}
    with_it, without = (
        replace(BEST, level_weight=weight).objective()(predictions, batch, 0.5) for weight in (4.0, 0.0)
    )
    each = torch.stack(
        [log_depth_loss(*scene) for scene in zip(depth.split(1), truth.split(1), valid.split(1), strict=True)]
    )
    torch.testing.assert_close(with_it["total"] - without["total"], 4 * each, rtol=1e-4, atol=1e-4)
    assert BEST.level_weight > 0 and each.min() > 0


def test_load_balance_counts_weights_choices_and_the_dead():
    weights = torch.zeros(1, 2, 3, 4, 5)
    weights[:, :, 0], weights[:, 0, 1] = 0.4, 0.6
    weights[:, 1, 0] += 0.595
    weights[:, 1, 2] = 0.005
    balance = load_balance(weights)
    torch.testing.assert_close(balance.mean_weight, torch.tensor([0.6975, 0.3, 0.0025]))
    torch.testing.assert_close(balance.chosen, torch.tensor([0.5, 0.5, 0.0]))
    assert balance.dead.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("text", "values"),  # at progress 0, 1/4, 1/2, 1
    [
        ("0.3", (0.3, 0.3, 0.3, 0.3)),
        ("0:1:linear", (0, 0.25, 0.5, 1)),
        ("0:1:linear:0.5", (0, 0.5, 1, 1)),
        ("1:0:cosine", (1, 0.5 + math.sqrt(0.125), 0.5, 0)),
        ("1:0.0001:exponential", (1, 0.1, 0.01, 0.0001)),
    ],
)
def test_schedules(text, values):
    assert [Schedule.parse(text).at(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx(values)


@pytest.mark.parametrize("text", ["", "x", "1:2", "1:2:sine", "1:0:exponential", "0:1:linear:0", "1:2:constant", "nan"])
def test_schedules_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="schedule"):
        Schedule.parse(text)


def test_a_weighted_sum_treats_scenes_alike_whatever_their_valid_pixels(mixture):
    weights, hypotheses, truth, valid = mixture
    valid = valid.clone()
    valid[0, :, 2:] = False
    entropy = -(weights * weights.log()).sum(2)
    predictions = {
        "depth": (weights * hypotheses).sum(2).unsqueeze(-1),
        "depth_weights": weights,
        "depth_hypotheses": hypotheses,
        "depth_entropy": entropy,
        "pose_enc_list": [torch.ones(2, 3, 9, dtype=torch.float64)],
    }
    batch = {
        "depth": truth,
        "valid": valid,
        "pose_enc": torch.zeros(2, 3, 9, dtype=torch.float64),
        "names": [["a"], ["b"]],
    }
    objective = WeightedLoss(
        {
            "depth": Term(MoEDepthLoss(), Schedule(1.0)),
            "nll": Term(MixtureNLL(), Schedule(0.5)),
            "entropy": Term(EntropyLoss(), Schedule(0, 2, "linear"), relative=True),
            "camera": Term(CameraLoss(), Schedule(1.0)),
        }
    )
    objective.unit = 0.1
    losses = objective(predictions, batch, progress=0.25)
    for b in range(2):
        one = slice(b, b + 1)
        depth = moe_depth_loss(predictions["depth"][one, ..., 0], truth[one], valid[one])
        nll = mixture_nll(weights[one], hypotheses[one], truth[one], valid[one])
        assert losses["depth"][b] == depth and losses["nll"][b] == nll
        assert losses["camera"][b] == 0  # fewer than 100 valid pixels
        expected = depth + 0.5 * nll + 0.1 * 0.5 * entropy[one].mean()
        torch.testing.assert_close(losses["total"][b], expected)


def test_a_learned_scale_is_a_parameter_per_expert_and_finds_the_noise():
    """The maximum-likelihood scale of a Laplace distribution is the mean absolute error."""
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(1, 1, 40, 40, generator=generator) * 0.3
    predictions = {"depth_weights": torch.ones(1, 1, 1, 40, 40), "depth_hypotheses": torch.ones(1, 1, 1, 40, 40)}
    batch = {"depth": error.exp(), "valid": torch.ones(1, 1, 40, 40, dtype=torch.bool)}
    loss = MixtureNLL(learned_experts=1)
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        value = loss(predictions, batch)
        value.backward()
        return value

    optimizer.step(closure)
    assert loss.log_scale.exp().item() == pytest.approx(error.abs().mean().item(), rel=1e-3)
