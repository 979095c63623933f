"""A dataset through a protocol: which frames are judged, on what, and how figures are gathered."""

import json

import numpy as np
import pytest
import torch

from moe3d.data import open_dataset
from moe3d.evaluation import (
    FileSystem,
    Frame,
    ModelSystem,
    Predictions,
    Protocol,
    aggregate_boundary,
    aggregate_depth,
    boundary_report,
    default_sampling,
    depth_metrics,
    evaluate,
    fit_alignment,
    sample_frames,
    write_predictions,
)
from moe3d.evaluation.evaluate import HISTOGRAM_EDGES
from moe3d.evaluation.protocol import scene_of
from moe3d.models import load_mini
from support.datasets import CASES
from support.evaluation import MemoryDataset, MemorySystem, perfect


def noisy(seed=0, size=(12, 16)):
    def predict(sample):
        predictions = perfect(sample, size)
        rng = np.random.default_rng([seed, *sample.names[0].encode()])
        predictions.depth[:] = (predictions.depth + 3) * np.exp(rng.normal(0, 0.1, predictions.depth.shape))
        return predictions

    return MemorySystem(f"noisy-{seed}", predict)


PERFECT = MemorySystem("perfect", perfect)


def protocol(task, **choices):
    align = {"mv": "umeyama-icp"}.get(task, "median")
    return Protocol(task, "synthetic", **{"align": align, **choices})


@pytest.mark.parametrize("task", ["mv", "depth", "boundary"])
def test_the_report_is_json_and_complete(task):
    dataset = MemoryDataset({"a": 2, "b": 3})
    report = evaluate(dataset, [PERFECT, noisy()], protocol(task))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["system"] == "perfect" and list(report["compare"]) == ["noisy-0"]
    assert report["protocol"]["frames"] == dataset.sequences
    for figures in (report, report["compare"]["noisy-0"]):
        assert [entry["name"] for entry in figures["sequences"]] == ["a", "b"]
        assert [[f["name"] for f in entry["frames"]] for entry in figures["sequences"]] == [*dataset.sequences.values()]
        assert figures["mean"].keys() | {"name", "frames"} == figures["sequences"][0].keys()
        assert sum(figures["error_histogram"]["counts"]) > 0
    assert ("flying_sweep" in report["protocol"]) == (task == "boundary")


def test_depth_figures_are_those_of_the_images():
    dataset, system = MemoryDataset({"a": 2, "b": 1}), noisy(size=(7, 9))
    report = evaluate(dataset, [system], protocol("depth", align="scale-shift", edge_filter=0.5))
    expected = []
    for sample in dataset.samples.values():
        for i, name in enumerate(sample.names):
            one = dataset.load(next(k for k, s in dataset.samples.items() if s is sample), [name])
            depth = system.function(one).depth[0]
            frame = Frame(depth, sample.depth[i].numpy(), sample.valid[i].numpy(), "bilinear", 0.5)
            expected.append(depth_metrics(frame, "scale-shift"))
    judged = [frame for entry in report["sequences"] for frame in entry["frames"]]
    assert [{k: v for k, v in frame.items() if k != "name"} for frame in judged] == expected
    assert report["mean"] == aggregate_depth(expected)
    assert report["mean"]["coverage"] < 1
    assert all(len(names) == 1 for _, names in system.asked_for)  # one image at a time


def test_a_sequence_is_predicted_and_aligned_together():
    dataset, system = MemoryDataset({"a": 3}), noisy()
    report = evaluate(dataset, [system], protocol("depth", per="sequence"))
    sample = dataset.samples["a"]
    assert system.asked_for == [("a", sample.names)]
    depth, truth, valid = system.function(sample).depth, sample.depth.double().numpy(), sample.valid.numpy()
    alignment = fit_alignment(depth[valid], truth[valid], "median")
    for i, frame in enumerate(report["sequences"][0]["frames"]):
        expected = depth_metrics(Frame(depth[i], truth[i], valid[i], "bilinear"), alignment)
        assert frame == {"name": frame["name"], **expected}


def test_boundary_figures_are_those_of_the_images():
    dataset, system = MemoryDataset({"a": 2, "b": 1}), noisy(size=(24, 32))
    report = evaluate(dataset, [system], protocol("boundary"))
    expected, scenes = [], []
    for name, sample in dataset.samples.items():
        for i, frame in enumerate(sample.names):
            depth = system.function(dataset.load(name, [frame])).depth[0]
            arrays = (sample.depth[i].numpy(), sample.valid[i].numpy(), sample.intrinsics[i].numpy())
            expected.append(boundary_report(depth, *arrays))
            scenes.append(name)
    total = aggregate_boundary(expected, scenes)
    assert report["protocol"]["flying_sweep"] == total.pop("protocol")["flying_sweep"]
    assert report["mean"] == total and report["mean"]["flying_rate_ci"] is not None


def test_multi_view_means_are_plain_over_sequences():
    report = evaluate(MemoryDataset({"a": 2, "b": 3}), [noisy()], protocol("mv"))
    for key in ("acc_mean", "comp_median", "nc_mean"):
        assert report["mean"][key] == pytest.approx(np.mean([entry[key] for entry in report["sequences"]]))
        assert report["mean"][key] > 0


@pytest.mark.parametrize("task", ["mv", "depth", "boundary"])
def test_frames_without_truth_and_broken_ones_are_left_out_and_listed(task):
    left_out = {"broken": [("a", "frame-1"), ("c", "frame-0")], "invalid": [("a", "frame-2"), ("b", "frame-0")]}
    dataset = MemoryDataset({"a": 4, "b": 1, "c": 1}, **left_out)
    only = MemorySystem("only", lambda sample: perfect(sample))
    report = evaluate(dataset, [only], protocol(task))
    assert report["protocol"]["frames"] == {"a": ["frame-0", "frame-3"]}
    reasons = {(e["sequence"], e["frame"]): e["reason"] for e in report["protocol"]["skipped"]}
    assert reasons == {
        ("a", "frame-1"): "broken",
        ("c", "frame-0"): "broken",
        ("a", "frame-2"): "no valid ground truth",
        ("b", "frame-0"): "no valid ground truth",
    }


def test_nothing_to_judge_is_an_error():
    with pytest.raises(ValueError, match="no frame of synthetic has valid ground truth"):
        evaluate(MemoryDataset({"a": 1}, invalid=[("a", "frame-0")]), [PERFECT], protocol("depth"))


@pytest.mark.parametrize("task", ["mv", "depth", "boundary"])
def test_predictions_of_nothing_are_null(task):
    nothing = MemorySystem(
        "nothing", lambda s: Predictions(**{**vars(perfect(s)), "depth": np.full((len(s.names), 3, 4), np.nan)})
    )
    dataset = MemoryDataset({"a": 2})
    mean = evaluate(dataset, [nothing], protocol(task))["mean"]
    assert mean["nonfinite"] > 0 and mean["coverage"] == 0
    assert all(value is None for key, value in mean.items() if key not in ("nonfinite", "coverage"))


def test_files_are_matched_by_name(tmp_path):
    dataset = MemoryDataset({"a": 3})
    whole = perfect(dataset.samples["a"]).select(["frame-2", "frame-0", "frame-1"])
    extra = Predictions(
        ["more", *whole.frames],
        *(np.concatenate([x[:1], x]) for x in (whole.depth, whole.intrinsics, whole.extrinsics)),
    )
    write_predictions(tmp_path, "a", extra)
    for task in ("mv", "depth", "boundary"):
        report = evaluate(dataset, [FileSystem("files", tmp_path)], protocol(task))
        assert report == evaluate(dataset, [MemorySystem("files", perfect)], protocol(task))


def test_missing_predictions_are_named(tmp_path):
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        FileSystem("files", tmp_path / "none")
    dataset, system = MemoryDataset({"a": 2}), FileSystem("files", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no predictions of sequence 'a': expected the file .*a\.npz"):
        evaluate(dataset, [system], protocol("depth"))
    write_predictions(tmp_path, "a", perfect(dataset.samples["a"]).select(["frame-0"]))
    with pytest.raises(ValueError, match="files, sequence 'a': no prediction of frame 'frame-1'"):
        evaluate(dataset, [system], protocol("depth"))


@pytest.mark.parametrize(("task", "judged"), [("depth", {"a": 2, "b": 1}), ("mv", {"a": 2, "b": 2, "c": 2})])
def test_a_limit_counts_images_or_sequences(task, judged):
    dataset = MemoryDataset(dict.fromkeys("abcd", 2))
    chosen, advanced = protocol(task, limit=3), []
    report = evaluate(dataset, [PERFECT], chosen, advance=lambda: advanced.append(1))
    assert {name: len(frames) for name, frames in report["protocol"]["frames"].items()} == judged
    assert len(advanced) == 3 == len(list(chosen.batches(dataset)))


def test_what_is_beyond_the_maximum_depth_or_the_crop_does_not_count():
    dataset = MemoryDataset({"a": 1}, size=(480, 640))
    sample = dataset.samples["a"]
    inside = sample.valid[0, 45:471, 41:601]
    report = evaluate(dataset, [PERFECT], protocol("depth", crop="eigen"))
    assert report["sequences"][0]["frames"][0]["pixels"] == inside.sum() < sample.valid.sum()
    dataset.max_depth = 10.0
    report = evaluate(dataset, [PERFECT], protocol("depth"))
    assert report["sequences"][0]["frames"][0]["pixels"] == (sample.valid & (sample.depth < 10)).sum() > 0
    assert report["protocol"]["max_depth"] == 10
    with pytest.raises(ValueError, match="crop eigen is for images of 480x640, got 12x16"):
        evaluate(MemoryDataset({"a": 1}), [PERFECT], protocol("depth", crop="eigen"))


def test_the_histogram_counts_every_error_once():
    off = MemorySystem("off", lambda s: Predictions(**{**vars(perfect(s)), "depth": perfect(s).depth * 1.1}))
    dataset = MemoryDataset({"a": 2})
    report = evaluate(dataset, [PERFECT, off], protocol("depth", align="none"))
    pixels = int(dataset.samples["a"].valid.sum())
    zero, tenth = (np.array(figures["error_histogram"]["counts"]) for figures in (report, report["compare"]["off"]))
    assert zero.tolist() == [pixels] + [0] * (len(HISTOGRAM_EDGES) - 2)
    assert tenth.sum() == pixels and HISTOGRAM_EDGES[tenth.argmax()] == pytest.approx(0.1, rel=0.3)


def test_every_frame_is_offered_with_a_view(tmp_path):
    offered = []
    dataset = MemoryDataset({"a": 2, "b": 1})
    for task in ("mv", "depth", "boundary"):
        offered.clear()
        report = evaluate(dataset, [noisy(), PERFECT], protocol(task), lambda *one: offered.append(one))
        badness = {"mv": "acc_mean", "depth": "abs_rel", "boundary": "flying_rate"}[task]
        frames = [frame for entry in report["sequences"] for frame in entry["frames"]]
        assert [bad for bad, _ in offered] == [frame[badness] for frame in frames]
        views = [make() for _, make in offered]
        assert [(view.sequence, view.frame) for view in views] == [("a", "frame-0"), ("a", "frame-1"), ("b", "frame-0")]
        for view in views:
            (_, _, rough), (name, _, exact) = view.systems
            assert name == "perfect" and (exact.edges == exact.true_edges).all() and exact.true_edges.any()
            known = np.isfinite(exact.truth)
            np.testing.assert_allclose(exact.depth[known], exact.truth[known], rtol=1e-6)
            assert (rough.distances is None) == (task != "mv")
            torch.testing.assert_close(
                torch.from_numpy(view.image), dataset.load(view.sequence, [view.frame]).images[0]
            )


@pytest.mark.parametrize(
    ("dataset", "sampling", "count", "expected"),
    [
        ("7scenes", "spann3r", 1000, range(0, 1000, 20)),
        ("nrgbd", "spann3r", 1000, range(0, 1000, 40)),
        ("7scenes", "cut3r", 1000, range(0, 1000, 200)),
        ("nrgbd", "cut3r", 1500, range(0, 1500, 500)),
        ("nrgbd", "cut3r", 395, range(0, 395, 197)),
        ("nrgbd", "cut3r", 1, [0]),
        ("7scenes", "pi3-sparse", 1000, range(0, 1000, 200)),
        ("nrgbd", "pi3-sparse", 395, [0]),  # thin_geometry
        ("nrgbd", "pi3-sparse", 1500, [0, 500, 1000]),
        ("7scenes", "pi3-dense", 500, range(0, 500, 40)),
        ("nrgbd", "pi3-dense", 1500, range(0, 1500, 100)),
        ("hypersim", "pi3-dense", 100, [0, 40, 80]),
        ("nrgbd", "all", 7, range(7)),
    ],
)
def test_sampling_schemes(dataset, sampling, count, expected):
    names = [f"img{i}" for i in range(count)]
    assert sample_frames(names, dataset, sampling) == [names[i] for i in expected]


def test_sampling_is_one_of_the_schemes():
    with pytest.raises(ValueError, match=r"sampling must be one of pi3-sparse, .*got 'half'"):
        sample_frames(["a"], "nrgbd", "half")
    assert [default_sampling(name) for name in ("nrgbd", "7scenes", "synthetic")] == ["pi3-sparse", "pi3-sparse", "all"]


@pytest.mark.parametrize(
    ("dataset", "sequence", "frame", "scene"),
    [
        ("7scenes", "chess_seq-03", "frame-000012", "chess"),
        ("hypersim", "ai_001_002_cam_00", "frame.0000", "ai_001_002"),
        ("vkitti2", "Scene01_15-deg-left_Camera_0", "rgb_00000", "Scene01"),
        ("kitti", "2011_09_26_drive_0002_sync", "0000000005", "2011_09_26_drive_0002_sync"),
        ("kitti", "kitti", "2011_09_26_drive_0002_sync_image_0000000005_image_02", "2011_09_26_drive_0002_sync"),
        ("nyuv2", "nyuv2", "00001", "00001"),
        ("nrgbd", "kitchen", "img12", "kitchen"),
        ("synthetic", "scene-000001", "frame-0000", "scene-000001"),
    ],
)
def test_frames_of_one_scene_are_drawn_together(dataset, sequence, frame, scene):
    assert scene_of(dataset, sequence, frame) == scene


@pytest.mark.parametrize("case", [name for name in CASES if name != "7scenes"])  # which is large, and like NRGBD
@pytest.mark.parametrize("task", ["mv", "depth"])
def test_datasets_on_disk_are_evaluated(case, task, tmp_path):
    written = CASES[case]
    dataset = open_dataset(written.name, written.written(tmp_path))
    chosen = Protocol(task, written.name, align={"mv": "umeyama-icp", "depth": "median"}[task])
    if task == "mv" and not written.has_poses:
        with pytest.raises(ValueError, match="need camera poses, and this dataset has none"):
            evaluate(dataset, [PERFECT], chosen)
        return
    report = evaluate(dataset, [PERFECT], chosen)
    assert report["protocol"]["frames"] == dataset.sequences and written.sequence in dataset.sequences
    key = {"mv": "acc_mean", "depth": "abs_rel"}[task]
    assert report["mean"][key] == pytest.approx(0, abs=1e-6) and report["mean"]["coverage"] == 1


def test_a_model_sees_whole_images_at_multiples_of_14():
    sample = open_dataset("motorcycle").load("motorcycle", ["left", "right"])
    seen, fields = [], []
    model = load_mini()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model.register_forward_hook(lambda module, args, output: fields.append(output["pose_enc"][0, :, 7:].double()))
    predictions = ModelSystem("mini", model, 84).predict("motorcycle", sample)
    assert seen == [(2, 3, 56, 84)] and predictions.depth.shape == (2, 56, 84)
    focal_y, focal_x = (torch.tensor([56, 84]) / 2 / torch.tan(fields[0] / 2)).T  # of the fields of view, up and across
    np.testing.assert_allclose(predictions.intrinsics[:, 1, 1], focal_y, rtol=1e-6)
    np.testing.assert_allclose(predictions.intrinsics[:, 0, 0], focal_x, rtol=1e-6)
    np.testing.assert_allclose(predictions.intrinsics[:, :2, 2], [[42, 28]] * 2)
    assert predictions.frames == ["left", "right"] and (predictions.depth > 0).all()
    np.testing.assert_allclose(predictions.extrinsics[0], np.eye(3, 4), atol=0.5)
    assert predictions.points is None
