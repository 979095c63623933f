"""Scenes depend on the seed, the step and the place, and on nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from moe3d.data import AllFramesSkipped
from moe3d.data.synthetic import render_scene
from moe3d.geometry import decode_pose, unproject
from moe3d.losses import CameraLoss
from moe3d.training import scenes as module
from moe3d.training.scenes import LiveScenes, Share, as_scene, batches, collate, open_corpus


def test_a_scene_is_the_same_whenever_and_by_whomever_it_is_asked_for(live):
    """Out of order, alone or in a batch, in this process or in a worker."""
    later = live[2, 0]
    live[0, 1]
    loaded = list(batches(live, Share(batch=1), first_step=1, steps=3, workers=1))
    for again in (live[2, 0], {key: value[0] for key, value in loaded[1].items()}):
        assert again["names"] == later["names"]
        assert all(torch.equal(again[key], later[key]) for key in later if key != "names")
    assert live[2, 1]["names"] != later["names"]


def test_scenes_of_a_step_have_one_shape_and_steps_differ(live):
    shapes = {step: {live[step, place]["images"].shape for place in (0, 1)} for step in range(3)}
    assert all(len(found) == 1 for found in shapes.values())
    assert {shape[0] for found in shapes.values() for shape in found} == {1, 2}


def test_the_processes_share_the_global_batch_out():
    whole = [key for keys in Share(batch=6).keys(7) for key in keys]
    parts = [key for process in (0, 1, 2) for keys in Share(2, 1, process, 3).keys(7) for key in keys]
    turns = [key for keys in Share(2, accumulate=3).keys(7) for key in keys]
    assert whole == parts == turns == [(7, place) for place in range(6)]


def test_a_scene_is_in_vggts_unit_with_the_first_camera_as_world(live):
    scene = next(live[step, 0] for step in range(9) if len(live[step, 0]["depth"]) == 2)
    extrinsics, intrinsics = decode_pose(scene["pose_enc"], scene["images"].shape[-2:])
    torch.testing.assert_close(extrinsics[0], torch.eye(3, 4), rtol=0, atol=1e-6)
    distance = unproject(scene["depth"], intrinsics, extrinsics).norm(dim=-1)[scene["valid"]].mean()
    assert distance.item() == pytest.approx(1, rel=0.02)  # the pose encoding forgets the principal point
    assert 0.3 < (scene["depth"][scene["valid"]] * scene["unit"]).median() < 40  # metres


def test_batches_keep_names_as_lists(live):
    batch = collate([live[0, 0], live[0, 1]])
    assert batch["images"].shape[0] == len(batch["names"]) == 2
    assert all(name.startswith("synthetic/scene-") for scene in batch["names"] for name in scene)


class Numbers:
    """25 places, each in rain and in fog, with as many frames as their number says."""

    has_poses, max_depth, skipped = True, float("inf"), ()
    sequences: ClassVar = {f"{i:02d}_{w}": [str(k) for k in range(i)] for i in range(25) for w in ("rain", "fog")}


def test_validation_never_sees_a_place_of_training(monkeypatch):
    monkeypatch.setattr(module, "open_dataset", lambda name, root, split: Numbers())
    train, val = (set(open_corpus("x", "root", (14, 14), 3, v).sequences) for v in (False, True))
    assert not train & val
    assert train | val == {name for name in Numbers.sequences if name >= "03"}
    assert val == {"10_rain", "10_fog", "20_rain", "20_fog"}
    with pytest.raises(ValueError, match="no sequence with 30 frames or more for training"):
        open_corpus("x", "root", (14, 14), 30)
    with pytest.raises(ValueError, match="size must be given for the dataset 'x'"):
        open_corpus("x", "root", None, 1)


def test_kittis_drives_of_a_day_are_places_of_their_own(monkeypatch):
    drives = {f"2011_09_26_drive_{i:04d}_sync": ["0", "1"] for i in range(3)}
    monkeypatch.setattr(Numbers, "sequences", drives)
    monkeypatch.setattr(module, "open_dataset", lambda name, root, split: Numbers())
    train, val = (open_corpus("kitti", "root", (14, 14), 2, v).sequences for v in (False, True))
    assert val == tuple(drives)[:1] and train == tuple(drives)[1:]


def test_a_single_place_is_for_training_and_photographs_are_seen_one_by_one(monkeypatch):
    monkeypatch.setattr(Numbers, "sequences", {"nyuv2": ["1", "2", "3"]})
    monkeypatch.setattr(module, "open_dataset", lambda name, root, split: Numbers())
    assert open_corpus("nyuv2", "root", (14, 14), 1).sequences == ("nyuv2",)
    with pytest.raises(ValueError, match="has one place, so nothing to validate on: ask for 0 validation scenes"):
        open_corpus("nyuv2", "root", (14, 14), 1, validation=True)
    with pytest.raises(ValueError, match=r"frames must be 1 for the dataset 'nyuv2', .* got 2"):
        open_corpus("nyuv2", "root", (14, 14), 2)


@pytest.mark.parametrize("frames", [1, 2])
def test_cameras_are_taught_where_their_poses_are_known(frames):
    sample = render_scene(5, (28, 42), frames)
    known, unknown = (as_scene(replace(sample, extrinsics=e)) for e in (sample.extrinsics, None))
    predictions = {"pose_enc_list": [torch.zeros(1, frames, 9)]}
    losses = [CameraLoss()(predictions, collate([scene])).item() for scene in (known, unknown)]
    assert losses[0] > 0 and losses[1] == (losses[0] if frames == 1 else 0)


@pytest.mark.parametrize(("name", "split"), [("hypersim", "train"), ("7scenes", "train"), ("vkitti2", "train")])
def test_training_is_never_on_a_test_split(monkeypatch, name, split):
    opened = []
    monkeypatch.setattr(module, "open_dataset", lambda *arguments: opened.append(arguments) or Numbers())
    open_corpus(name, "root", (14, 14), 1)
    assert opened == [(name, "root", split)]


def test_the_papers_sizes_are_the_defaults():
    assert module.DEFAULT_SIZES["hypersim"] == (378, 518) and module.DEFAULT_SIZES["vkitti2"] == (154, 518)
    assert open_corpus("synthetic", None, None, 2).dataset.size == (168, 224)


def test_a_dataset_whose_frames_are_all_broken_is_an_error():
    class Broken(Numbers):
        sequences: ClassVar = {"wall": ["3", "5"]}

        def load(self, sequence, frames):
            raise AllFramesSkipped(f"{frames[0]} is broken")

    corpus = module.Corpus("walls", Broken(), ("wall",), (28, 28))
    with pytest.raises(ValueError, match=r"no 2 usable frames were found .* dataset 'walls'"):
        LiveScenes([corpus], (2, 2), seed=0)[0, 0]
