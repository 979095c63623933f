"""Virtual KITTI 2, KITTI and Sintel: what is particular to each."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from moe3d.data import open_dataset
from support.datasets import CASES, save_png16, save_text, write_kitti_drive

VIRTUAL, DRIVES, CROPPED, SINTEL = (CASES[name] for name in ("vkitti2", "kitti-drives", "kitti-cropped", "sintel"))


def test_vkitti2_sky_and_far_depth(tmp_path):
    values = np.full(VIRTUAL.size, 1500)
    values[0, :4] = 65535, 7999, 8000, 65534
    save_png16(VIRTUAL.written(tmp_path) / VIRTUAL.depth, values)
    dataset = open_dataset("vkitti2", tmp_path)
    assert dataset.load(VIRTUAL.sequence, ["rgb_00001"]).valid[0, 0, :5].tolist() == [False, True, False, False, True]
    dataset.max_depth = float("inf")
    sample = dataset.load(VIRTUAL.sequence, ["rgb_00001"])
    assert sample.valid[0, 0, :5].tolist() == [False, True, True, True, True]
    torch.testing.assert_close(sample.depth[0, 0, :5], torch.tensor([0, 79.99, 80.0, 655.34, 15.0]))


def test_vkitti2_cameras_have_rows_of_their_own(tmp_path):
    root = VIRTUAL.written(tmp_path)
    for kind in ("rgb", "depth"):
        folder = root / "Scene01" / "15-deg-left" / "frames" / kind
        (folder / "Camera_0").rename(folder / "Camera_1")
    dataset = open_dataset("vkitti2", root)
    sequence = "Scene01_15-deg-left_Camera_1"
    assert list(dataset.sequences) == [sequence]
    sample = dataset.load(sequence, list(VIRTUAL.frames))
    for k, view in enumerate(VIRTUAL.views()):
        np.testing.assert_allclose(sample.extrinsics[k, :, :3].numpy(), view.extrinsics[:, :3], atol=1e-6)
        baseline = sample.extrinsics[k, :, 3].numpy() - view.extrinsics[:, 3]
        np.testing.assert_allclose(baseline, [-0.532725, 0, 0], atol=1e-5)


@pytest.mark.parametrize("name", ["extrinsic.txt", "intrinsic.txt"])
def test_vkitti2_tables(tmp_path, name):
    path = VIRTUAL.written(tmp_path) / "Scene01" / "15-deg-left" / name
    lines = path.read_text().splitlines()
    save_text(path, *(line for line in lines if not line.startswith("1 0 ")))
    dataset = open_dataset("vkitti2", tmp_path)
    assert dataset.load(VIRTUAL.sequence, list(VIRTUAL.frames)).names == ["rgb_00000", "rgb_00002"]
    assert dataset.skipped[0].reason == f"{name} has no row for frame 1 of camera 0"
    path.unlink()
    with pytest.raises(ValueError, match=f"skipped: {name} is missing"):
        open_dataset("vkitti2", tmp_path)


def test_vkitti2_has_one_split(tmp_path):
    root = VIRTUAL.written(tmp_path)
    assert open_dataset("vkitti2", root, "train").sequences == open_dataset("vkitti2", root).sequences
    with pytest.raises(ValueError, match="no split 'test', expected one of train"):
        open_dataset("vkitti2", root, "test")


@pytest.mark.parametrize(
    ("date", "focal", "cx", "cy"),
    [
        ("2011_09_26", 721.5377, 609.5593, 172.854),
        ("2011_09_28", 707.0493, 604.0814, 180.5066),
        ("2011_09_29", 718.3351, 600.3891, 181.5122),
        ("2011_09_30", 707.0912, 601.8873, 183.1104),
        ("2011_10_03", 718.856, 607.1928, 185.2157),
    ],
)
def test_kitti_calibration_is_that_of_the_day(tmp_path, date, focal, cx, cy):
    drive = f"{date}_drive_0005_sync"
    write_kitti_drive(tmp_path / "val", DRIVES.views(), drive)
    sample = open_dataset("kitti", tmp_path).load(drive, ["0000000005"])
    torch.testing.assert_close(sample.intrinsics[0], torch.tensor([[focal, 0, cx], [0, focal, cy], [0, 0, 1]]))


def test_kitti_photographs_where_the_raw_archives_put_them(tmp_path):
    drive = "2011_09_26_drive_0002_sync"
    write_kitti_drive(tmp_path / "val", DRIVES.views())
    (tmp_path / "2011_09_26" / drive).mkdir(parents=True)
    (tmp_path / "val" / drive / "image_02").rename(tmp_path / "2011_09_26" / drive / "image_02")
    dataset = open_dataset("kitti", tmp_path)
    assert dataset.load(drive, list(DRIVES.frames)).names == list(DRIVES.frames)
    (tmp_path / "2011_09_26").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"skipped: image_02/data is missing, .* in 2011_09_26/{drive}"):
        open_dataset("kitti", tmp_path)


def test_kitti_links_are_followed_once_and_a_drive_is_in_one_place(tmp_path):
    drive = "2011_09_26_drive_0002_sync"
    write_kitti_drive(tmp_path / "val", DRIVES.views())
    for name in ("back", "again"):  # two of them make a path for every order of both
        (tmp_path / name).symlink_to(tmp_path)
    assert list(open_dataset("kitti", tmp_path).sequences) == [drive]
    write_kitti_drive(tmp_path / "other", DRIVES.views())
    with pytest.raises(ValueError, match=f"two drives are named {drive}, .* narrow the root"):
        open_dataset("kitti", tmp_path)


def test_kitti_a_day_without_calibration(tmp_path):
    write_kitti_drive(tmp_path, DRIVES.views(), "2012_01_01_drive_0001_sync")
    with pytest.raises(ValueError, match="skipped: no calibration is known for '2012_01_01'"):
        open_dataset("kitti", tmp_path)


def test_kitti_one_layout_at_a_time(tmp_path):
    CROPPED.written(DRIVES.written(tmp_path))
    with pytest.raises(ValueError, match=r"holds both drives \(.*\) and .*val_selection_cropped: name one of them"):
        open_dataset("kitti", tmp_path)
    assert list(open_dataset("kitti", tmp_path / "depth_selection").sequences) == ["kitti"]
    assert list(open_dataset("kitti", tmp_path / "depth_selection" / "val_selection_cropped").sequences) == ["kitti"]


def test_kitti_depth_without_a_return_is_not_valid(tmp_path):
    values = np.full(CROPPED.size, 256 * 20 + 128)
    values[0, :3] = 0, 1, 256 * 80
    save_png16(CROPPED.written(tmp_path) / CROPPED.depth, values)
    sample = open_dataset("kitti", tmp_path).load("kitti", [CROPPED.frames[1]])
    assert sample.valid[0, 0, :4].tolist() == [False, True, False, True]
    torch.testing.assert_close(sample.depth[0, 0, :4], torch.tensor([0, 1 / 256, 0, 20.5]))


def test_kitti_cropped_intrinsics_are_needed(tmp_path):
    root = CROPPED.written(tmp_path)
    next((root / "depth_selection" / "val_selection_cropped" / "intrinsics").glob("*5_image_02.txt")).unlink()
    dataset = open_dataset("kitti", root)
    assert dataset.load("kitti", list(CROPPED.frames)).names == [CROPPED.frames[1]]
    assert dataset.skipped[0].reason == f"{CROPPED.frames[0]}.txt is missing"


def test_sintel_sequences_beyond_the_usual(tmp_path):
    root = SINTEL.written(tmp_path)
    for kind in ("final", "depth", "camdata_left"):
        (root / "training" / kind / "alley_2").rename(root / "training" / kind / "alley_1")
    with pytest.raises(ValueError, match="no frames of the sintel dataset"):
        open_dataset("sintel", root)
    assert list(open_dataset("sintel", root, "all").sequences) == ["alley_1"]
    (root / "training" / "camdata_left").rename(root / "training" / "camdata")
    with pytest.raises(ValueError, match="skipped: training/camdata_left/alley_1 is missing"):
        open_dataset("sintel", root, "all")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("depth", struct.pack("<fii", 1.0, 96, 64), "does not begin with the number 202021.25"),
        (
            "depth",
            struct.pack("<fii", 202021.25, 96, 64) + bytes(100),
            "has 112 bytes, not those of a depth map of 64x96",
        ),
        ("depth", struct.pack("<fii", 202021.25, 0, 0), "not those of a depth map of 0x0"),
        ("camdata_left", struct.pack("<f20d", 202021.25, *range(20)), "has 164 bytes, not the 172 of a camera"),
        ("camdata_left", struct.pack("<f21d", 202021.25, *[np.nan] * 21), "the intrinsics are not finite"),
    ],
    ids=["another tag", "too short", "no size", "half a camera", "unknown camera"],
)
def test_sintel_files_that_are_none(tmp_path, file, content, reason):
    folder = SINTEL.written(tmp_path) / "training" / file / "alley_2"
    next(folder.glob("frame_0002.*")).write_bytes(content)
    dataset = open_dataset("sintel", tmp_path)
    assert dataset.load("alley_2", list(SINTEL.frames)).names == ["frame_0001", "frame_0003"]
    assert reason in dataset.skipped[0].reason


def test_sintel_a_folder_in_place_of_a_file(tmp_path):
    file = SINTEL.written(tmp_path) / "training" / "depth" / "alley_2" / "frame_0002.dpt"
    file.unlink()
    file.mkdir()
    dataset = open_dataset("sintel", tmp_path)
    assert dataset.load("alley_2", list(SINTEL.frames)).names == ["frame_0001", "frame_0003"]
    assert dataset.skipped[0].reason.startswith("frame_0002.dpt cannot be read")


def test_sintel_depth_from_70_metres_on_is_not_valid(tmp_path):
    path = SINTEL.written(tmp_path) / SINTEL.depth
    values = [69.999, 70.0, np.inf, np.nan, -1.0] + [3.0] * (64 * 96 - 5)
    path.write_bytes(struct.pack("<fii", 202021.25, 96, 64) + struct.pack(f"<{64 * 96}f", *values))
    sample = open_dataset("sintel", tmp_path).load("alley_2", ["frame_0002"])
    assert sample.valid[0, 0, :6].tolist() == [True, False, False, False, False, True]
    assert sample.depth[0, 0, 1:5].tolist() == [0, 0, 0, 0]
