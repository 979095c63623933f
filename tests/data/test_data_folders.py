"""Every dataset on disk: a rendered scene, written in the dataset's own format, comes back as it was."""

from __future__ import annotations

import builtins
import logging
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from moe3d import geometry
from moe3d.data import AllFramesSkipped, Sample, open_dataset
from moe3d.data.files import BrokenFrame, read_depth_png, read_image
from support.datasets import CASES, Case, save_png16


def over(cases: dict[str, Case]):
    """A test for each of them."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases)


EVERY = over(CASES)
WITH_POSES = over({name: case for name, case in CASES.items() if case.has_poses})
NOT_TONE_MAPPED = over({name: case for name, case in CASES.items() if name != "hypersim"})


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The folder of each case, written once; tests that change files write their own."""
    written = {}

    def root(case: Case):
        if case.depth not in written:
            written[case.depth] = case.written(tmp_path_factory.mktemp("dataset"))
        return written[case.depth]

    return root


def opened(case: Case, root):
    return open_dataset(case.name, root)


def frames_of(case: Case) -> tuple[str, ...]:
    """The labelled NYU set's first image is for training."""
    return case.frames[1:] if case is CASES["nyuv2-labelled"] else case.frames


@EVERY
def test_sequences_and_frames_have_the_documented_names(case, roots):
    assert opened(case, roots(case)).sequences == {case.sequence: list(frames_of(case))}


@EVERY
def test_the_scene_comes_back(case, roots):
    dataset = opened(case, roots(case))
    names = list(frames_of(case))[::-1]
    sample = dataset.load(case.sequence, names)
    views = [case.views()[case.frames.index(name)] for name in names]
    assert isinstance(sample, Sample)
    assert sample.names == names
    fx, fy, cx, cy = case.camera
    expected = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]).expand(len(names), 3, 3)
    torch.testing.assert_close(sample.intrinsics, expected, rtol=1e-6, atol=1e-5)
    for k, view in enumerate(views):
        inside = (view.depth > 0) & (view.depth < dataset.max_depth - case.precision)
        known = sample.valid[k].numpy()
        assert np.array_equal(known, inside)
        depth = sample.depth[k].numpy()
        assert (depth[~known] == 0).all()
        np.testing.assert_allclose(depth[known], view.depth[known], atol=case.precision, rtol=case.precision)
        if case.has_poses:
            np.testing.assert_allclose(sample.extrinsics[k].numpy(), view.extrinsics, atol=2e-6)
    assert dataset.skipped == []


@EVERY
def test_samples_have_the_promised_form(case, roots):
    dataset = opened(case, roots(case))
    names = list(frames_of(case))
    sample = dataset.load(case.sequence, names)
    count, (height, width) = len(names), case.size
    assert sample.images.shape == (count, 3, height, width)
    assert sample.depth.shape == sample.valid.shape == (count, height, width)
    assert sample.valid.dtype == torch.bool
    assert {t.dtype for t in (sample.images, sample.depth, sample.intrinsics)} == {torch.float32}
    assert sample.images.min() >= 0
    assert sample.images.max() <= 1
    assert dataset.has_poses == case.has_poses
    if case.has_poses:
        assert sample.extrinsics.shape == (count, 3, 4)
        assert sample.extrinsics.dtype == torch.float32
    else:
        assert sample.extrinsics is None


@pytest.mark.parametrize(
    "case", [c for n, c in CASES.items() if n != "hypersim"], ids=[n for n in CASES if n != "hypersim"]
)
def test_images_come_back(case, roots):
    """Hypersim's are tone mapped, which has its own tests."""
    names = list(frames_of(case))
    images = opened(case, roots(case)).load(case.sequence, names).images
    for name, image in zip(names, images, strict=True):
        expected = case.views()[case.frames.index(name)].image.astype(float)
        difference = np.abs(255 * image.permute(1, 2, 0).numpy() - expected)
        assert np.median(difference) <= 3 if case.image.endswith(".jpg") else difference.max() < 1e-3


def agreement(sample: Sample, extrinsics: torch.Tensor) -> float:
    """The share of the first frame's points, of those that fall into the second, that have its depth within 2 %."""
    points = geometry.unproject(sample.depth[0], sample.intrinsics[0], extrinsics[0])[sample.valid[0]]
    pixels, depth = geometry.project(points, sample.intrinsics[1], extrinsics[1])
    column, row = pixels.round().long().unbind(-1)
    height, width = sample.depth.shape[1:]
    inside = (depth > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    inside[inside.clone()] = sample.valid[1][row[inside], column[inside]]
    assert inside.float().mean() > 0.1
    truth = sample.depth[1][row[inside], column[inside]]
    return float(((depth[inside] / truth - 1).abs() < 0.02).float().mean())


@WITH_POSES
def test_one_frames_points_land_on_the_others_depth(case, roots):
    sample = opened(case, roots(case)).load(case.sequence, list(case.frames[:2]))
    assert agreement(sample, sample.extrinsics) > 0.85  # the rest is hidden in the second frame
    opengl = torch.diag(torch.tensor([1.0, -1.0, -1.0])) @ sample.extrinsics
    for wrong in (sample.extrinsics[[0, 0]], geometry.invert_extrinsics(sample.extrinsics), opengl):
        assert agreement(sample, wrong) < 0.35


@EVERY
def test_opening_decodes_nothing(case, roots, monkeypatch):
    root = roots(case)
    import h5py

    monkeypatch.setattr(Image, "open", None)
    monkeypatch.setattr(h5py, "File", None)
    assert opened(case, root).sequences


@EVERY
def test_a_maximum_depth_can_be_set(case, roots):
    dataset = opened(case, roots(case))
    names = list(frames_of(case))
    usual = dataset.load(case.sequence, names)
    dataset.max_depth = float(usual.depth[usual.valid].median())
    cut = dataset.load(case.sequence, names)
    assert torch.equal(cut.valid, usual.valid & (usual.depth < dataset.max_depth))
    assert torch.equal(cut.depth, usual.depth * cut.valid)


@EVERY
def test_a_dataset_can_be_sent_to_another_process(case, roots):
    copy = pickle.loads(pickle.dumps(opened(case, roots(case))))
    assert copy.load(case.sequence, list(frames_of(case))).valid.any()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def replace_by_another_size(path):
    save_png16(path, np.full((10, 12), 900))


DAMAGES = [
    pytest.param(case, file, damage, id=f"{name}-{file}-{damage.__name__}")
    for name, case in CASES.items()
    for file in ("image", "depth")
    for damage in (truncate, empty, remove, replace_by_another_size)
    if name != "nyuv2-labelled"  # one file for all frames
    and not (name == "nyuv2-files" and damage is remove)  # the frame is the file
    and not (damage is replace_by_another_size and not (file == "depth" and case.depth.endswith(".png")))
]


@pytest.mark.parametrize(("case", "file", "damage"), DAMAGES)
def test_a_broken_frame_is_left_out_said_once_and_counted(case, file, damage, tmp_path, caplog):
    dataset = opened(case, case.written(tmp_path))
    path = tmp_path / getattr(case, file)
    damage(path)
    with caplog.at_level(logging.WARNING, "moe3d.data"):
        for _ in range(2):
            sample = dataset.load(case.sequence, list(case.frames))
    assert sample.names == [name for name in case.frames if name != case.frames[1]]
    assert len(sample.images) == len(sample.depth) == len(case.frames) - 1
    (skipped,) = dataset.skipped
    assert (skipped.sequence, skipped.frame) == (case.sequence, case.frames[1])
    assert caplog.messages == [f"{case.name}: skipped {case.sequence} {case.frames[1]}: {skipped.reason}"]
    assert ("the depth 10x12" if damage is replace_by_another_size else path.name) in skipped.reason
    with pytest.raises(AllFramesSkipped, match=f"none of the 1 frames asked of '{case.sequence}' can be used"):
        dataset.load(case.sequence, [case.frames[1]])


def test_a_truncated_image_is_noticed(tmp_path):
    """Or changes nothing: what is cut off may be padding at the end."""
    values = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16) * 311
    save_png16(tmp_path / "depth.png", values)
    Image.fromarray((values[..., None] % 256).astype(np.uint8).repeat(3, 2)).save(tmp_path / "image.jpg")
    for name, read in (("image.jpg", read_image), ("depth.png", lambda path: read_depth_png(path, 1.0))):
        content = (tmp_path / name).read_bytes()
        whole = read(tmp_path / name)
        for length in range(0, len(content), 5):
            (tmp_path / name).write_bytes(content[:length])
            try:
                assert np.array_equal(read(tmp_path / name), whole)
            except BrokenFrame as error:
                assert name in str(error)


def test_depth_must_be_16_bit(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "depth.png")
    with pytest.raises(BrokenFrame, match=r"depth\.png is not a 16-bit grey PNG but has the mode RGB"):
        read_depth_png(tmp_path / "depth.png", 1e-3)


@EVERY
def test_a_wrong_root_names_the_expected_files(case, tmp_path):
    named = case.depth.rsplit("/", 1)[-1].rsplit(".", 1)[-1]
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=rf"no frames of the {case.name} dataset in '{root}', expected .*{named}"):
            open_dataset(case.name, root)


@EVERY
def test_a_root_is_needed(case):
    with pytest.raises(ValueError, match=f"the {case.name} dataset needs a root, a folder with "):
        open_dataset(case.name)


@EVERY
def test_an_unknown_split_is_refused(case, roots):
    with pytest.raises(ValueError, match=f"the {case.name} dataset has no split 'dev', "):
        open_dataset(case.name, roots(case), split="dev")


@pytest.mark.parametrize("name", ["hypersim", "nyuv2"])
def test_a_missing_library_is_named_with_its_extra(name, roots, monkeypatch):
    root = roots(next(case for case in CASES.values() if case.name == name))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=rf"the {name} dataset needs h5py, .* pip install 'moe3d\[eval\]'"):
        open_dataset(name, root)


def test_the_others_do_without_it(roots, monkeypatch):
    real = builtins.__import__

    def without(module, *arguments, **options):
        if module.split(".")[0] == "h5py":
            raise ImportError(module)
        return real(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for case in CASES.values():
        if case.name not in ("hypersim", "nyuv2"):
            assert opened(case, roots(case)).load(case.sequence, list(frames_of(case))).valid.any()


def test_frames_of_different_sizes_are_not_stacked(tmp_path):
    case = CASES["kitti-cropped"]
    root = case.written(tmp_path)
    save_png16(root / case.depth, np.full((10, 12), 900))
    Image.new("RGB", (12, 10)).save(root / case.image)
    dataset = opened(case, root)
    with pytest.raises(ValueError, match=r"frames of 'kitti' differ in size \(10x12 and 48x64\)"):
        dataset.load("kitti", list(case.frames))
    assert dataset.load("kitti", [case.frames[1]]).depth.shape == (1, 10, 12)


def test_a_pose_that_is_no_rigid_motion_is_left_out(tmp_path):
    case = CASES["7scenes"]
    root = case.written(tmp_path)
    pose = root / case.depth.replace("depth.proj.png", "pose.txt")
    for text, reason in (
        ("0 " * 16, "not a rigid motion"),
        ("nan " * 16, "not finite"),
        ("1 2 3 4 " * 2, "not a table of 4x4"),
    ):
        pose.write_text(text)
        dataset = opened(case, root)
        assert dataset.load(case.sequence, list(case.frames)).names == [case.frames[0]]
        assert reason in dataset.skipped[0].reason


def test_a_frame_may_be_asked_for_twice(roots):
    case = CASES["bonn"]
    sample = opened(case, roots(case)).load(case.sequence, [case.frames[0]] * 2)
    assert sample.names == [case.frames[0]] * 2
    assert torch.equal(sample.depth[0], sample.depth[1])


def test_sequences_left_out_for_one_reason_share_a_line(tmp_path, caplog):
    case = CASES["nrgbd"]
    for scene in ("whiteroom", "staircase"):
        (case.written(tmp_path) / "kitchen").rename(tmp_path / scene)
        (tmp_path / scene / "poses.txt").unlink()
    dataset = opened(case, case.written(tmp_path))
    assert list(dataset.sequences) == ["kitchen"]
    assert [record.sequence for record in dataset.skipped] == ["staircase", "whiteroom"]
    assert caplog.messages == ["nrgbd: left out 2 sequence(s), the first staircase: poses.txt is missing"]
