"""From what the user names to image files: folders, globs, videos, equal names."""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from moe3d.reconstruct.inputs import find_files, frame_names, image_files, left_out, scene_name
from moe3d.reconstruct.video import extract_frames
from support.pictures import write_video


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in (
        "a/img10.png",
        "a/img2.JPG",
        "a/.hidden.png",
        "a/notes.txt",
        "b/img2.png",
        "b/deep/x.webp",
        "empty/x.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _names(*inputs):
    return [str(file) for file in find_files(inputs)]


def test_folders_are_in_natural_order_without_what_is_no_picture(tree):
    assert _names("a") == ["a/img2.JPG", "a/img10.png"]
    assert _names("b", "a/notes.txt") == ["b/img2.png", "a/notes.txt"]  # a file that is named is taken at its word


def test_globs_that_the_shell_left_alone(tree):
    assert _names("*/img2.*") == ["a/img2.JPG", "b/img2.png"]
    assert _names("b/**") == ["b/deep/x.webp", "b/img2.png"]
    (tree / "[1].png").write_bytes(b"")
    assert _names("[1].png") == ["[1].png"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", "holds no image"),
        ("absent", "no such file"),
        ("a/*.tiff", "matches no image"),
        ("absent.png", "no such"),
    ],
)
def test_names_without_files_are_errors(tree, name, says):
    with pytest.raises(FileNotFoundError, match=f"{name.replace('*', '.')}: {says}"):
        find_files([name])


def test_the_scene_has_the_single_folders_name(tree):
    assert scene_name(["a"]) == "a" and scene_name(["b/deep/"]) == "deep" and scene_name(["a/."]) == "a"
    assert scene_name(["a", "b"]) == scene_name(["a/img2.JPG"]) == scene_name(["/"]) == "scene"


def test_equal_names_become_unique(tree):
    assert frame_names(find_files(["a", "b"])) == ["a_img2", "img10", "b_img2"]
    paths = [tree / name for name in ("x/y/1.png", "x/y/1.jpg", "z/y/1.png", "2.png", "y_1.png")]
    names = frame_names(paths)
    assert names == ["y_1", "y_1_2", "y_1_3", "2", "y_1_4"] and len(set(names)) == 5


@pytest.mark.parametrize(
    ("fps", "expected"), [(1, [0, 10]), (4, [0, 3, 5, 8, 10, 13, 15, 18]), (1000, list(range(20)))]
)
def test_frames_at_a_rate(tmp_path, fps, expected):
    files = list(extract_frames(write_video(tmp_path / "walk.mp4"), tmp_path, fps))
    assert [file.name for file in files] == [f"walk_{i:06d}.png" for i in expected]
    for file, i in zip(files, expected, strict=True):
        assert np.asarray(Image.open(file))[40, 40].mean() == pytest.approx(10 * i, abs=4)


def test_a_video_that_lies_on_its_side_is_put_upright(tmp_path):
    (file,) = extract_frames(write_video(tmp_path / "a.mp4", 1, rotation=90), tmp_path, 1)
    picture = np.asarray(Image.open(file)).mean(axis=2)
    assert picture.shape == (64, 48)
    assert picture[-10:, :10].min() > 200 > picture[:40].max()  # turned counterclockwise by 90 degrees


def test_pixels_that_are_no_squares_become_squares(tmp_path):
    for rotation, shape in ((None, (48, 85)), (90, (85, 48))):
        path = write_video(tmp_path / f"{rotation}.mp4", 1, rotation=rotation, pixel_aspect=Fraction(4, 3))
        (file,) = extract_frames(path, tmp_path, 1)
        assert np.asarray(Image.open(file)).shape[:2] == shape


def test_what_is_no_picture_by_its_name_is_said(tmp_path):
    for name in ("a.png", "b.CR2", "c.txt", "d.txt", "README", ".hidden.txt"):
        (tmp_path / name).touch()
    assert left_out([str(tmp_path)]) == (
        "4 file(s) are no images or videos by their names, and left out: .cr2, .txt, without a suffix"
    )
    assert not left_out([str(tmp_path / "c.txt")])


def test_no_scene_is_called_as_an_unfinished_run(tmp_path):
    (tmp_path / "trip.partial").mkdir()
    assert scene_name([str(tmp_path / "trip.partial")]) == "trip_partial"


def test_videos_are_replaced_by_their_frames(tmp_path):
    photo, video = tmp_path / "a.png", write_video(tmp_path / "v.mp4")
    files, damaged = image_files([photo, video, photo], tmp_path / "frames", 1)
    assert [file.name for file in files] == ["a.png", "v_000000.png", "v_000010.png", "a.png"] and not damaged


@pytest.mark.parametrize(
    "content", [b"", b"no video", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", b"ffconcat version 1.0\nfile v.mp4\n"]
)
def test_what_is_no_video_is_named(tmp_path, content):
    pytest.importorskip("av", reason="needs PyAV")
    write_video(tmp_path / "v.mp4")
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.mp4 is not a video that can be decoded"):
        list(extract_frames(tmp_path / "bad.mp4", tmp_path, 1))


def test_a_damaged_video_is_an_error_or_skipped(tmp_path):
    path = write_video(tmp_path / "v.mp4")
    path.write_bytes(path.read_bytes()[: os.path.getsize(path) // 2])
    with pytest.raises(ValueError, match=r"v\.mp4 is not a video"):
        image_files([path], tmp_path / "one", 1)
    files, damaged = image_files([path], tmp_path / "two", 1, skip_unreadable=True)
    assert files == [] and list(damaged) == [str(path)]
    with pytest.raises(FileNotFoundError):
        list(extract_frames(tmp_path / "absent.mp4", tmp_path, 1))
