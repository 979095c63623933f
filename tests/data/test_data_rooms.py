"""Neural RGB-D, 7-Scenes, NYU-v2 and Bonn: what is particular to each."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat

from moe3d.data import open_dataset
from support.datasets import CASES, render, save_image, save_png16, save_text

NRGBD, SEVEN, LABELLED, FILES, BONN = (
    CASES[name] for name in ("nrgbd", "7scenes", "nyuv2-labelled", "nyuv2-files", "bonn")
)


def test_nrgbd_numbers_are_sorted_as_numbers(tmp_path):
    views = render(NRGBD.camera, NRGBD.size, 2)
    NRGBD.write(tmp_path, [views[k % 2] for k in range(12)])
    dataset = open_dataset("nrgbd", tmp_path)
    assert dataset.sequences["kitchen"] == [f"img{k}" for k in range(12)]
    sample = dataset.load("kitchen", ["img9", "img10", "img2"])
    for k, view in enumerate((views[1], views[0], views[0])):
        np.testing.assert_allclose(sample.extrinsics[k].numpy(), view.extrinsics, atol=2e-6)


def test_nrgbd_frames_with_unknown_poses_are_listed_and_skipped(tmp_path):
    """They are in the list, because published samplings count them, and are left out after it."""
    poses = NRGBD.written(tmp_path) / "kitchen" / "poses.txt"
    lines = poses.read_text().splitlines()
    lines[4:8] = ["nan nan nan nan"] * 4
    save_text(poses, *lines)
    dataset = open_dataset("nrgbd", tmp_path)
    assert dataset.sequences["kitchen"] == ["img0", "img1", "img2"]
    assert dataset.load("kitchen", ["img0", "img1", "img2"]).names == ["img0", "img2"]
    (skipped,) = dataset.skipped
    assert (skipped.frame, skipped.reason) == ("img1", "the pose is not finite")


def test_nrgbd_more_images_than_poses(tmp_path):
    poses = NRGBD.written(tmp_path) / "kitchen" / "poses.txt"
    save_text(poses, *poses.read_text().splitlines()[:8])
    dataset = open_dataset("nrgbd", tmp_path)
    assert dataset.load("kitchen", ["img1", "img2"]).names == ["img1"]
    assert dataset.skipped[0].reason == "poses.txt has only 2 poses"


@pytest.mark.parametrize("text", ["1 2 3\n", "one two\n" * 8, ""])
def test_nrgbd_poses_that_are_none(tmp_path, text):
    (NRGBD.written(tmp_path) / "kitchen" / "poses.txt").write_text(text)
    dataset = open_dataset("nrgbd", tmp_path)
    with pytest.raises(ValueError, match="none of the 3 frames asked of 'kitchen' can be used"):
        dataset.load("kitchen", list(NRGBD.frames))
    assert all("poses.txt" in skipped.reason for skipped in dataset.skipped)
    assert len(dataset.skipped) == 3


def test_nrgbd_a_scene_that_lacks_its_poses_is_left_out(tmp_path):
    NRGBD.written(tmp_path)
    (tmp_path / "kitchen").rename(tmp_path / "whiteroom")
    NRGBD.written(tmp_path)
    (tmp_path / "kitchen" / "poses.txt").unlink()
    (tmp_path / "notes").mkdir()
    dataset = open_dataset("nrgbd", tmp_path)
    assert list(dataset.sequences) == ["whiteroom"]
    (skipped,) = dataset.skipped
    assert (skipped.sequence, skipped.frame, skipped.reason) == ("kitchen", None, "poses.txt is missing")


def test_nrgbd_the_focal_length_is_the_files_or_the_published_one(tmp_path):
    focal = NRGBD.written(tmp_path) / "kitchen" / "focal.txt"
    focal.unlink()
    intrinsics = open_dataset("nrgbd", tmp_path).load("kitchen", ["img0"]).intrinsics[0]
    torch.testing.assert_close(intrinsics, torch.tensor([[554.25626, 0, 48], [0, 554.25626, 32], [0, 0, 1]]))
    for text in ("", "1 2", "wide"):
        focal.write_text(text)
        dataset = open_dataset("nrgbd", tmp_path)
        with pytest.raises(ValueError, match="none of the 1 frames"):
            dataset.load("kitchen", ["img0"])
        assert "focal.txt" in dataset.skipped[0].reason


def test_nrgbd_depth_from_10_metres_on_is_not_valid(tmp_path):
    values = np.full(NRGBD.size, 2500)
    values[0, :4] = 0, 1, 9999, 10000
    save_png16(NRGBD.written(tmp_path) / NRGBD.depth, values)
    sample = open_dataset("nrgbd", tmp_path).load("kitchen", ["img1"])
    assert sample.valid[0, 0, :5].tolist() == [False, True, True, False, True]
    torch.testing.assert_close(sample.depth[0, 0, :5], torch.tensor([0, 0.001, 9.999, 0, 2.5]))


def test_7scenes_splits_are_those_of_their_lists(tmp_path):
    SEVEN.written(tmp_path)
    (tmp_path / "chess" / "seq-03").rename(tmp_path / "chess" / "seq-01")
    save_text(tmp_path / "chess" / "TestSplit.txt", "sequence3", "sequence5")
    with pytest.raises(ValueError, match="no frames of the 7scenes dataset"):
        open_dataset("7scenes", tmp_path)
    train = open_dataset("7scenes", tmp_path, "train")
    assert list(train.sequences) == ["chess_seq-01"]
    assert train.skipped == []  # what is not on disk is not evaluated


def test_7scenes_without_the_list_or_the_projected_depth(tmp_path):
    root = SEVEN.written(tmp_path)
    for path in (root / "chess" / "seq-03").glob("*.depth.proj.png"):
        path.rename(path.with_name(path.name.replace(".proj", "")))
    with pytest.raises(
        ValueError, match=r"expected .*depth\.proj\.png .*skipped: it has no frame-\*\.depth\.proj\.png"
    ):
        open_dataset("7scenes", root)
    (root / "chess" / "TestSplit.txt").unlink()
    with pytest.raises(ValueError, match=r"skipped: TestSplit\.txt is missing"):
        open_dataset("7scenes", root)


def test_7scenes_unknown_depth(tmp_path):
    values = np.full(SEVEN.size, 1500)
    values[0, :4] = 0, 65535, 9999, 12000
    save_png16(SEVEN.written(tmp_path) / SEVEN.depth, values)
    dataset = open_dataset("7scenes", tmp_path)
    assert dataset.load(SEVEN.sequence, SEVEN.frames[1:]).valid[0, 0, :5].tolist() == [False, False, True, False, True]
    dataset.max_depth = float("inf")
    assert dataset.load(SEVEN.sequence, SEVEN.frames[1:]).valid[0, 0, :5].tolist() == [False, False, True, True, True]


def test_nyuv2_splits_are_those_of_splits_mat(tmp_path):
    root = LABELLED.written(tmp_path)
    assert open_dataset("nyuv2", root).sequences == {"nyuv2": ["00002"]}
    assert open_dataset("nyuv2", root, "train").sequences == {"nyuv2": ["00001"]}
    image = open_dataset("nyuv2", root, "train").load("nyuv2", ["00001"]).images[0]
    assert np.array_equal((255 * image).round().byte().permute(1, 2, 0).numpy(), LABELLED.views()[0].image)


def test_nyuv2_labelled_damage(tmp_path):
    root = LABELLED.written(tmp_path)
    savemat(root / "splits.mat", {"testNdxs": np.array([[2], [9]])})
    dataset = open_dataset("nyuv2", root)
    assert dataset.load("nyuv2", ["00002", "00009"]).names == ["00002"]
    assert dataset.skipped[0].reason.startswith("nyu_depth_v2_labeled.mat cannot be read")
    for damaged in ({"x": np.ones(1)}, None):
        savemat(root / "splits.mat", damaged) if damaged else (root / "splits.mat").write_bytes(b"cut")
        with pytest.raises(ValueError, match=r"splits\.mat is not the labelled set's list of splits"):
            open_dataset("nyuv2", root)
    (root / "splits.mat").unlink()
    with pytest.raises(ValueError, match=r"skipped: splits\.mat is missing beside the labelled set"):
        open_dataset("nyuv2", root)


def test_nyuv2_files(tmp_path):
    root = FILES.written(tmp_path)
    with pytest.raises(ValueError, match="a folder of HDF5 files has no split 'train', expected 'test'"):
        open_dataset("nyuv2", root, "train")
    with h5py.File(root / FILES.depth, "a") as file:
        depth = file.pop("depth")[()]
    dataset = open_dataset("nyuv2", root)
    assert dataset.load("nyuv2", ["00001", "00002"]).names == ["00001"]
    with h5py.File(root / FILES.depth, "a") as file:
        file["depth"] = depth[None]
    assert dataset.load("nyuv2", ["00001", "00002"]).names == ["00001"]
    assert dataset.skipped[1].reason == "the image is 48x64x3, the depth 1x48x64"
    for image, reason in ((np.zeros((48, 64)), "2 axes, not 3"), ({}, "cannot be read")):
        with h5py.File(root / FILES.depth, "a") as file:
            del file["rgb"]
            file.create_group("rgb") if isinstance(image, dict) else file.create_dataset("rgb", data=image)
        assert dataset.load("nyuv2", ["00001", "00002"]).names == ["00001"]
        assert reason in dataset.skipped[-1].reason
    (root / "train").mkdir()
    (root / "val" / "official" / "00001.h5").rename(root / "train" / "00002.h5")
    with pytest.raises(ValueError, match=r"two frames are named 00002, .* narrow the root"):
        open_dataset("nyuv2", root)


def test_nyuv2_pixels_count_from_zero():
    """The toolbox unprojects pixels counted from 1, so its principal point moves by one."""
    from moe3d.data.nyuv2 import INTRINSICS

    assert INTRINSICS[0, 2] == pytest.approx(324.58244941119034)
    assert INTRINSICS[1, 2] == pytest.approx(252.73616633400465)


def test_bonn_pairs_are_formed_by_order(tmp_path):
    root = BONN.written(tmp_path)
    extra = root / "rgbd_bonn_balloon2" / "rgb_110" / "1548266479.00000.png"
    save_image(extra, BONN.views()[0].image)
    with pytest.raises(ValueError, match="skipped: rgb_110 has 3 images and depth_110 has 2"):
        open_dataset("bonn", root)


def test_bonn_sequences_beyond_the_usual(tmp_path):
    (BONN.written(tmp_path) / "rgbd_bonn_balloon2").rename(tmp_path / "rgbd_bonn_kidnapping_box")
    with pytest.raises(ValueError, match="no frames of the bonn dataset"):
        open_dataset("bonn", tmp_path)
    assert list(open_dataset("bonn", tmp_path, "all").sequences) == ["kidnapping_box"]
