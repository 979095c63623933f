import numpy as np
import pytest

from moe3d.evaluation import Predictions, read_predictions, write_predictions


def some(count=3, size=(4, 5), names=None, **others):
    rng = np.random.default_rng(0)
    arrays = {
        "depth": rng.uniform(1, 2, (count, *size)).astype(np.float32),
        "intrinsics": rng.uniform(1, 2, (count, 3, 3)),
        "extrinsics": rng.uniform(1, 2, (count, 3, 4)),
    }
    return Predictions(names or [f"frame-{i}" for i in range(count)], **{**arrays, **others})


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def as_arrays(predictions):
    return {"frames": np.array(predictions.frames), **predictions._arrays()}


@pytest.mark.parametrize("extras", [(), ("points",), ("points", "confidence")])
def test_written_predictions_are_read_back(tmp_path, extras):
    shapes = {"points": (3, 4, 5, 3), "confidence": (3, 4, 5)}
    written = some(**{name: np.random.default_rng(1).normal(size=shapes[name]) for name in extras})
    written.depth[0, 0] = [np.nan, np.inf, -np.inf, 0, -1]
    path = write_predictions(tmp_path, "scene_seq-01", written)
    assert path == tmp_path / "scene_seq-01.npz" and list(tmp_path.iterdir()) == [path]
    read = read_predictions(tmp_path, "scene_seq-01")
    assert read.frames == written.frames
    for name in ("depth", "intrinsics", "extrinsics", *extras):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
        assert getattr(read, name).dtype == getattr(written, name).dtype
    assert all(getattr(read, name) is None for name in shapes.keys() - set(extras))


def test_frames_are_matched_by_name_in_any_order(tmp_path):
    written = some(points=np.random.default_rng(1).normal(size=(3, 4, 5, 3)))
    write_predictions(tmp_path, "scene", written)
    read = read_predictions(tmp_path, "scene", ["frame-2", "frame-0"])
    assert read.frames == ["frame-2", "frame-0"]
    for name in ("depth", "intrinsics", "extrinsics", "points"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name)[[2, 0]])


def test_numpys_own_files_are_read(tmp_path):
    """Others write the format with ``np.savez`` or ``np.savez_compressed``, and more arrays than we know."""
    written = some()
    np.savez_compressed(tmp_path / "scene.npz", **as_arrays(written), remark=np.array("more"))
    np.testing.assert_array_equal(read_predictions(tmp_path, "scene").depth, written.depth)


def test_a_missing_sequence_and_a_missing_frame_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no predictions of sequence 'other': expected the file .*other\.npz"):
        read_predictions(tmp_path, "other")
    write_predictions(tmp_path, "scene", some())
    with pytest.raises(ValueError, match=r"scene\.npz: no prediction of frame 'frame-7' \(1 of 2 frames are missing"):
        read_predictions(tmp_path, "scene", ["frame-1", "frame-7"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": np.ones((3, 4, 5), int)}, "depth must be floating point, got int64"),
        ({"depth": np.ones((3, 4))}, r"depth must be \[N, H, W\], got shape \[3, 4\]"),
        ({"depth": np.ones((3, 0, 5))}, r"depth must be \[N, H, W\], got shape \[3, 0, 5\]"),
        ({"depth": np.ones((2, 4, 5))}, r"depth must be \[3, 4, 5\] for 3 frames, got \[2, 4, 5\]"),
        ({"intrinsics": np.ones((3, 3, 4))}, r"intrinsics must be \[3, 3, 3\] for 3 frames"),
        ({"extrinsics": np.ones((3, 4, 4))}, r"extrinsics must be \[3, 3, 4\] for 3 frames"),
        ({"points": np.ones((3, 4, 4, 3))}, r"points must be \[3, 4, 5, 3\] for 3 frames"),
        ({"confidence": np.ones((3, 4, 5, 1))}, r"confidence must be \[3, 4, 5\] for 3 frames"),
        ({"names": ["a", "b", "a"]}, "frames must name each frame once, got 'a' twice"),
        ({"names": [1, 2, 3]}, r"frames must be a non-empty list of names, got int64"),
        ({"count": 0}, "frames must be a non-empty list of names"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        some(**change)


def test_damaged_files_are_named(tmp_path):
    arrays = as_arrays(some())
    whole = save(tmp_path / "whole.npz", **arrays).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, arrays["depth"])
    flipped = bytearray(whole)
    flipped[whole.index(arrays["depth"].tobytes()) + 5] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    save(tmp_path / "objects.npz", **{**arrays, "depth": np.array([None, "x", 3], object)})
    for name in ("cut", "text", "empty", "single", "flipped", "objects"):
        with pytest.raises(ValueError, match=rf"{name}\.npz: not a whole \.npz file of plain arrays"):
            read_predictions(tmp_path, name)
    del arrays["extrinsics"]
    save(tmp_path / "less.npz", **arrays)
    with pytest.raises(ValueError, match=r"less\.npz: the array 'extrinsics' is missing, expected frames, depth"):
        read_predictions(tmp_path, "less")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a"])
def test_a_sequence_names_a_file(tmp_path, name):
    with pytest.raises(ValueError, match="sequence must be a name without folders"):
        write_predictions(tmp_path, name, some())


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    write_predictions(tmp_path, "scene", some())
    before = (tmp_path / "scene.npz").read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space left"):
        write_predictions(tmp_path, "scene", some(count=1))
    assert [p.name for p in tmp_path.iterdir()] == ["scene.npz"] and (tmp_path / "scene.npz").read_bytes() == before
