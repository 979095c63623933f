"""``moe3d reconstruct`` from the command line to its files, with throw-away weights and small images."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from moe3d.cli import main
from moe3d.cli import reconstruct as command
from moe3d.evaluation import read_predictions
from moe3d.geometry import decode_pose, project
from moe3d.models import load_model
from moe3d.reconstruct import frames as frames_module
from moe3d.reconstruct import load_images, run
from moe3d.reconstruct.frames import FrameFolder, find_scenes, load_frame
from support.pictures import photo, write_video

WIDTH = 56
ALL = "npz,ply,glb,colmap,depth-png,gate-png"


@pytest.fixture
def start(small_weights, tmp_path, capsys):
    """``start(inputs, ...)`` runs the command; (exit code, summary or None, standard error)."""
    weights, head = small_weights

    def start(*argv, out=tmp_path / "out", head=head, width=WIDTH):
        inputs = [str(word) for word in argv]
        flags = ["--model", str(weights), "--head", str(head), "--width", str(width), "--out", str(out), "--json"]
        code = main(["reconstruct", *inputs, *flags])
        output, errors = capsys.readouterr()
        return code, json.loads(output) if output else None, errors

    return start


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_weights, photos):
    """The folder of a run with all exports on three photographs."""
    out = tmp_path_factory.mktemp("finished")
    weights, head = small_weights
    flags = f"--model {weights} --head {head} --width {WIDTH} --out {out} --export {ALL} --experts --frames-chunk 2"
    assert main(["reconstruct", *(str(photos / f"img{i}.png") for i in (1, 2, 3)), *flags.split()]) == 0
    return out


@pytest.fixture(scope="module")
def expected(small_weights, photos):
    """What the model itself says of them."""
    images = load_images([photos / f"img{i}.png" for i in (1, 2, 3)], WIDTH).images
    weights, head = small_weights
    with torch.no_grad():
        single = load_model(weights, "stock")(images)
        return load_model(weights, head, return_experts=True)(images) | {"stock": single["depth"], "images": images}


def test_frames_are_what_the_model_says(finished, expected):
    scene = find_scenes(finished)["scene"]
    assert scene.names == ["img1", "img2", "img3"]
    extrinsics, intrinsics = decode_pose(expected["pose_enc"][0], (42, WIDTH))
    keys = {"depth": "depth", "confidence": "depth_conf", "points": "world_points", "hypotheses": "depth_hypotheses",
            "points_confidence": "world_points_conf", "stock_depth": "stock"}  # fmt: skip
    for i, frame in enumerate(scene):
        for name, key in keys.items():
            values = expected[key][0, i].numpy()
            np.testing.assert_allclose(
                getattr(frame, name), values.reshape(getattr(frame, name).shape), rtol=2e-5, atol=1e-5
            )
        np.testing.assert_allclose(frame.weights, expected["depth_weights"][0, i], atol=1e-3)
        np.testing.assert_allclose(frame.entropy, expected["depth_entropy"][0, i], atol=1e-3)
        np.testing.assert_allclose(frame.extrinsics, extrinsics[i], atol=1e-6)
        np.testing.assert_allclose(frame.intrinsics, intrinsics[i], rtol=1e-5)
        np.testing.assert_array_equal(frame.image, np.rint(expected["images"][i].permute(1, 2, 0) * 255))


def test_the_prediction_file_is_what_eval_reads(finished, expected):
    predictions = read_predictions(finished, "scene", ["img3", "img1"])
    np.testing.assert_allclose(predictions.depth[0], expected["depth"][0, 2, ..., 0], rtol=2e-5)
    assert predictions.points.shape == (2, 42, WIDTH, 3) and predictions.confidence.shape == (2, 42, WIDTH)


def test_clouds_agree_and_gltf_has_y_up(finished):
    ply = trimesh.load(finished / "scene.ply")
    (glb,) = trimesh.load(finished / "scene.glb").geometry.values()
    np.testing.assert_array_equal(glb.vertices, ply.vertices * [1, -1, -1])
    np.testing.assert_array_equal(glb.colors, ply.colors)
    assert len(ply.vertices) == pytest.approx(0.75 * 3 * 42 * WIDTH, abs=2)


def test_colmap_reads_its_model_back(finished):
    pycolmap = pytest.importorskip("pycolmap")
    model = pycolmap.Reconstruction(str(finished / "scene" / "colmap" / "sparse" / "0"))
    frames = list(find_scenes(finished)["scene"])
    cloud = trimesh.load(finished / "scene.ply")
    assert len(model.images) == len(model.cameras) == 3 and len(model.points3D) == len(cloud.vertices)
    errors = []
    for number, image in model.images.items():
        frame, camera = frames[number - 1], model.cameras[image.camera_id]
        with Image.open(finished / "scene" / "colmap" / "images" / image.name) as picture:
            assert picture.size == (camera.width, camera.height) == (80, 60)
        pose = image.cam_from_world() if callable(image.cam_from_world) else image.cam_from_world
        np.testing.assert_allclose(pose.matrix(), frame.extrinsics, atol=1e-6)
        # 56x42 of 80x60: the same angles, and COLMAP counts pixels from their corners.
        np.testing.assert_allclose(camera.params[:2], frame.intrinsics[[0, 1], [0, 1]] * 80 / 56, rtol=1e-5)
        np.testing.assert_allclose(camera.params[2:], (frame.intrinsics[:2, 2] + 0.5) * 80 / 56, rtol=1e-5)
        for point in list(image.points2D)[::50]:
            seen = camera.img_from_cam(pose * model.points3D[point.point3D_id].xyz)
            errors.append(np.abs(seen - point.xy).max())
            assert model.points3D[point.point3D_id].track.elements[0].image_id == number
    assert len(errors) > 30 and max(errors) < 1e-2


def test_depth_pictures_hold_the_depth_with_their_scale(finished, expected):
    about = json.loads((finished / "scene" / "depth" / "scale.json").read_text())
    for i, name in enumerate(about["frames"]):
        with Image.open(finished / "scene" / "depth" / f"{name}.png") as picture:
            levels = np.asarray(picture)
        assert levels.dtype == np.uint16 or levels.max() > 255
        np.testing.assert_allclose(levels * about["scale"], expected["depth"][0, i, ..., 0], atol=0.51 * about["scale"])


def test_gate_pictures_show_the_gate(finished):
    from moe3d.viz.pictures import gate_picture

    frame = find_scenes(finished)["scene"][1]
    with Image.open(finished / "scene" / "gate" / "img2.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), gate_picture(frame.weights))
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 20


def test_points_from_the_point_head(start, photos):
    code, summary, _ = start(photos / "img1.png", "--points", "head", "--export", "ply", "--conf-percentile", "0")
    assert code == 0 and summary["points"] == 42 * WIDTH
    frame = find_scenes(summary["out"])["scene"][0]
    cloud = trimesh.load(os.path.join(summary["out"], "scene.ply"))
    np.testing.assert_array_equal(cloud.vertices, frame.points.reshape(-1, 3))


def test_images_of_every_kind(start, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.fromarray(photo(60, 80)[..., 0]).save(folder / "grey.png")
    Image.fromarray(np.dstack([photo(60, 80), photo(60, 80)[..., :1]])).save(folder / "rgba.png")
    Image.fromarray(photo(60, 80)[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(60, 80)).save(folder / "rotated.jpg", exif=exif)
    Image.fromarray(photo(30, 90)).save(folder / "wide.png")
    code, summary, errors = start(folder, "--export", "colmap,npz")
    assert code == 0 and summary["scene"] == "mixed" and summary["frames"] == 5
    assert (
        "is taller than wide: cropped to its middle" in errors and "sizes differ: padded with white to 56x56" in errors
    )
    frames = dict(zip(find_scenes(summary["out"])["mixed"].names, find_scenes(summary["out"])["mixed"], strict=True))
    assert frames["rotated"].original_size.tolist() == [80, 60]
    assert (frames["wide"].depth > 0).any(axis=1).sum() == 14 and not frames["wide"].depth[:21].any()
    with Image.open(tmp_path / "out/mixed/colmap/images/rotated.png") as upright:
        assert upright.size == (60, 80)
    # A point of the grid and the same point of the original image lie on the same ray.
    for name, (row, column) in {"rotated": (0, 0), "wide": (21, 0)}.items():
        frame = frames[name]
        ray = np.linalg.inv(frame.intrinsics.astype(float)) @ [column - 0.5, row - 0.5, 1]
        pixel, _ = project(torch.tensor(ray)[None], torch.tensor(frame.original_intrinsics).double())
        top = {"rotated": 80 * (1 - 56 / 70) / 2 - 0.5, "wide": -0.5}[name]  # 80x60 becomes 70x56, then 56x56
        np.testing.assert_allclose(pixel[0], [-0.5, top], atol=0.6 if name == "rotated" else 1e-3)


def test_equal_names_from_two_folders(start, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "hall")
    code, summary, _ = start(photos / "img1.png", tmp_path / "hall" / "img1.png", "--export", "npz")
    assert code == 0 and read_predictions(summary["out"], "scene").frames == ["room_img1", "hall_img1"]


def test_a_video(start, tmp_path):
    code, summary, _ = start(write_video(tmp_path / "walk.mp4"), "--fps", "2", "--export", "colmap")
    assert code == 0 and summary["frames"] == 4
    assert sorted(os.listdir(tmp_path / "out/scene/colmap/images")) == [f"walk_{i:06d}.png" for i in (0, 5, 10, 15)]


def test_one_unreadable_image_is_named_or_skipped_and_counted(start, photos, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    shutil.copy(photos / "img1.png", folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(folder / "pixel.png")
    code, _, errors = start(folder)
    assert code == 1 and "broken.jpg is not an image" in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
    code, summary, errors = start(folder, "--skip-bad", "--export", "npz")
    assert code == 0 and summary["frames"] == 1 and len(summary["skipped"]) == 2
    assert "skipped: " in errors and "pixel.png: an image must have more than one pixel" in errors


@pytest.mark.parametrize("name", ["a.png", "z.png"])
def test_a_link_to_nowhere_is_named_or_skipped(start, photos, tmp_path, name):
    folder = tmp_path / "links"
    folder.mkdir()
    shutil.copy(photos / "img1.png", folder / "m.png")
    (folder / name).symlink_to("nowhere")
    code, _, errors = start(folder)
    assert code == 1 and f"links/{name}: No such file or directory" in errors and errors.count("\n") == 1
    code, summary, _ = start(folder, "--skip-bad", "--export", "npz")
    assert code == 0 and summary["frames"] == 1 and len(summary["skipped"]) == 1


def test_a_name_that_is_no_utf8_is_kept(start, photos, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(photos / "img1.png", os.fsencode(folder) + b"/caf\xe9.png")
    assert start(folder, "--export", "colmap")[0] == 0
    model = tmp_path / "out/old/colmap"
    assert b"caf\xe9.png\0" in (model / "sparse/0/images.bin").read_bytes()
    assert os.listdir(os.fsencode(model / "images")) == [b"caf\xe9.png"]


def test_a_later_run_leaves_no_pictures_of_frames_that_are_gone(start, photos, tmp_path):
    folder = tmp_path / "trip"
    shutil.copytree(photos, folder)
    flags = ("--export", "colmap,depth-png,gate-png")
    assert start(folder, *flags)[0] == 0
    (tmp_path / "out/trip/colmap/splats.ply").write_text("the user's")
    (folder / "img2.png").unlink()
    assert start(folder, *flags)[0] == 0
    pictures = [file for file in (tmp_path / "out/trip").rglob("*.png") if "img2" in file.name]
    assert not pictures and (tmp_path / "out/trip/colmap/splats.ply").exists()
    assert (tmp_path / "out/trip/depth/img1.png").exists()


@pytest.mark.parametrize("flags", [
    "--conf-percentile 101", "--conf-percentile -1", "--conf-percentile nan", "--fps 0", "--fps inf", "--edge-filter 0",
    "--max-points 0", "--max-points 1.5", "--frames-chunk 0", "--width 50", "--width 0", "--export npz,obj",
    "--export ,", "--mode median", "--backend fastest",
])  # fmt: skip
def test_numbers_out_of_range_are_wrong_usage(photos, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as exit_:
        main(["reconstruct", str(photos), "--out", str(tmp_path / "out"), *flags.split()])
    assert exit_.value.code == 2 and os.listdir(tmp_path) == []
    assert re.fullmatch(rf"moe3d reconstruct: error: argument {flags.split()[0]}: .*\n", capsys.readouterr().err)


def test_bad_places_and_models_are_errors_that_leave_nothing(start, photos, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other.safetensors").write_text("nothing")
    (tmp_path / "own" / "room").mkdir(parents=True)
    (tmp_path / "own" / "room" / "frames").write_text("mine")
    for out, head, says in (
        (tmp_path / "file", None, "must be a folder, but is a file"),
        (tmp_path / "file" / "below", None, "must be a folder, but is a file"),
        (tmp_path / "own", None, "holds other files than a reconstruction"),
        (tmp_path / "out", tmp_path / "other.safetensors", "is not a whole safetensors file"),
    ):
        code, _, errors = start(photos, out=out, **({"head": head} if head else {}))
        assert code == 1 and says in errors and errors.count("\n") == 1, errors
    assert sorted(os.listdir(tmp_path)) == ["file", "other.safetensors", "own"]
    assert (tmp_path / "own" / "room" / "frames").read_text() == "mine"
    code, _, errors = start(tmp_path / "absent")
    assert code == 1 and "absent: no such file or folder" in errors


def test_gates_need_a_gate(start, photos, tmp_path):
    code, _, errors = start(photos / "img1.png", "--export", "gate-png", head="stock")
    assert code == 1 and "gate-png needs a model with a mixture-of-experts head" in errors


def _tree(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def interrupted_after(monkeypatch):
    """The run is interrupted when that many frames are saved."""

    def interrupt(count, error=KeyboardInterrupt):
        save = frames_module.save_frame

        def save_and_stop(path, frame):
            if len(list(path.parent.glob("*.npz"))) >= count:
                raise error
            save(path, frame)

        monkeypatch.setattr(frames_module, "save_frame", save_and_stop)
        return lambda: monkeypatch.setattr(frames_module, "save_frame", save)

    return interrupt


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_is_finished_stays_whole_and_is_resumed(start, photos, tmp_path, interrupted_after, error, monkeypatch):
    go_on = interrupted_after(5, error)
    code, _, errors = start(photos, "--frames-chunk", "2")
    partial = tmp_path / "out" / "room.partial"
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert f"5 finished frames are kept in {partial}: --resume goes on from them" in errors
    kept = _tree(tmp_path / "out")
    assert len(kept) == 6 and all(load_frame(path).depth.shape == (42, WIDTH) for path in partial.glob("frames/*"))
    go_on()
    saved = []
    save = frames_module.save_frame
    monkeypatch.setattr(frames_module, "save_frame", lambda path, frame: (saved.append(path.name), save(path, frame)))
    code, summary, _ = start(photos, "--frames-chunk", "2", "--resume", "--export", "ply")
    assert code == 0 and summary["resumed"] == 5 and saved == [f"{i:06d}.npz" for i in range(5, 10)]
    assert sorted(os.listdir(tmp_path / "out")) == ["room", "room.ply"]
    start(photos, "--frames-chunk", "2", "--export", "ply", out=tmp_path / "whole")
    (tmp_path / "whole" / "room" / "run.json").unlink()
    (tmp_path / "out" / "room" / "run.json").unlink()
    assert _tree(tmp_path / "out") == _tree(tmp_path / "whole")  # not a bit is different


def test_resuming_with_other_settings_or_damaged_frames(start, photos, tmp_path, interrupted_after):
    go_on = interrupted_after(5)
    assert start(photos, "--frames-chunk", "2")[0] == 130
    for option, value in (("mode", "argmax"), ("sharpen", "0"), ("dtype", "bfloat16")):
        code, _, errors = start(photos, "--resume", f"--{option}", value)
        assert code == 1
        assert f"room.partial was made with other {option}: run as before, or without --resume" in errors
    path = tmp_path / "out/room.partial/frames/000001.npz"
    path.write_bytes(path.read_bytes()[:1000])
    go_on()
    code, summary, _ = start(photos, "--resume", "--frames-chunk", "2", "--export", "npz")
    assert code == 0 and summary["resumed"] == 4


def test_resuming_with_other_weights_in_the_same_folder(small_weights, photos, tmp_path, capsys):
    weights, _ = small_weights
    folder = tmp_path / "weights"
    folder.mkdir()
    shutil.copy(weights, folder / "model.safetensors")
    command = ["reconstruct", str(photos / "img1.png"), "--model", str(folder), "--width", str(WIDTH), "--json"]
    command += ["--export", "npz", "--out", str(tmp_path / "out"), "--resume"]
    resumed = []
    for changed in (False, False, True):
        if changed:
            os.utime(folder / "model.safetensors", ns=(0, 0))
        assert main(command) == 0
        resumed.append(json.loads(capsys.readouterr().out)["resumed"])
    assert resumed == [0, 1, 0]


def test_a_finished_run_is_resumed_without_the_model(start, photos, tmp_path, monkeypatch):
    assert start(photos, "--export", "npz")[0] == 0
    monkeypatch.setattr(command, "load", lambda *args, **kwargs: pytest.fail("the frames are there"))
    code, summary, _ = start(photos, "--export", "glb,colmap", "--resume", "--max-points", "100")
    assert code == 0 and (summary["resumed"], summary["points"]) == (10, 100)
    assert sorted(os.listdir(tmp_path / "out")) == ["room", "room.glb", "room.npz"]
    assert len(os.listdir(tmp_path / "out/room/colmap/images")) == 10


def test_a_failure_leaves_an_earlier_result_and_success_replaces_it(start, photos, tmp_path, monkeypatch):
    assert start(photos / "img1.png", photos / "img2.png", "--export", "ply")[0] == 0
    before = _tree(tmp_path / "out")

    def no_space(folder, scene):
        (folder / "half.ply").write_bytes(b"ply")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(command.ALL_EXPORTERS, "ply", no_space)
    code, _, errors = start(photos / "img3.png", "--export", "ply")
    assert code == 1 and errors.endswith("error: No space left on device\n")
    after = _tree(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert [name for name in after if name not in before] == [
        "scene.partial/run.json",
        "scene.partial/frames/000000.npz",
    ]
    monkeypatch.undo()
    code, summary, _ = start(photos / "img3.png", "--export", "ply", "--resume")
    assert code == 0 and summary["resumed"] == 1
    assert sorted(_tree(tmp_path / "out")) == ["scene.ply", "scene/frames/000000.npz", "scene/run.json"]
    assert find_scenes(tmp_path / "out")["scene"].names == ["img3"]


def test_termination_before_a_frame_leaves_nothing(start, photos, tmp_path, monkeypatch):
    def terminate(*args, **kwargs):
        assert (tmp_path / "out" / "room.partial").is_dir()
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    monkeypatch.setattr(run, "predict_frames", terminate)
    assert start(photos)[0] == 143
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("harm", ["truncated", "pickled", "lacking", "misshapen"])
def test_damaged_and_dangerous_frames_are_refused(finished, tmp_path, harm):
    path = shutil.copy(finished / "scene/frames/000000.npz", tmp_path / "a.npz")
    arrays = dict(np.load(path))
    if harm == "lacking":
        del arrays["confidence"]
    arrays |= {"pickled": {"depth": np.array([{"a": 1}], dtype=object)}, "misshapen": {"entropy": np.zeros(3)}}.get(
        harm, {}
    )
    np.savez(path, **arrays)
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"a\.npz (is not a whole|does not hold)"):
        load_frame(path)


def test_a_folder_without_a_reconstruction_is_an_error(tmp_path):
    for folder, kind in ((tmp_path, FileNotFoundError), (tmp_path / "absent", FileNotFoundError)):
        with pytest.raises(kind):
            find_scenes(folder)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text('{"frames": ["../../a"], "settings": 3}')
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        find_scenes(tmp_path)
    with pytest.raises(NotADirectoryError):
        find_scenes(tmp_path / "x" / "run.json")


def test_names_never_become_paths(tmp_path):
    folder = FrameFolder(tmp_path, ["../../evil", "/etc/passwd"], {})
    assert [folder.path(i).parent for i in range(2)] == [tmp_path / "frames"] * 2


def test_the_summary_for_people(photos, capsys, small_weights, tmp_path):
    argv = ["reconstruct", str(photos / "img1.png"), "--model", str(small_weights[0]), "--out", str(tmp_path)]
    assert main([*argv, "--width", "28", "--export", "npz,ply,colmap"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"scene: 1 frames of 28x28, [\d,]+ points, [\d.]+ s, at most [\d.]+ GiB", output[0])
    files = [f"  {tmp_path / name}" for name in ("scene.npz", "scene.ply", "scene/colmap")]
    assert output[1:] == [*files, f"look at it: moe3d view {tmp_path}"]
