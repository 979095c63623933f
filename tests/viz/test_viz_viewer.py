"""The viewer: what it shows for which setting, where it listens, and how it looks in a headless Chromium."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import entr

import moe3d
from moe3d.cli import main
from moe3d.data import open_dataset
from moe3d.geometry import project
from moe3d.reconstruct.frames import FrameFolder, ReconstructedFrame
from moe3d.viz.colors import INVALID, expert_colors
from moe3d.viz.viewer import SceneClouds, Viewer, ViewSettings, true_depths

HEIGHT, WIDTH, EXPERTS = 24, 32, 3


def make_frame(seed: int, mixture: bool = True) -> ReconstructedFrame:
    rng = np.random.default_rng(seed)
    depth = (2 + rng.random((HEIGHT, WIDTH))).astype(np.float32)
    weights = rng.dirichlet(np.full(EXPERTS, 0.3), (HEIGHT, WIDTH)).transpose(2, 0, 1)
    extrinsics = np.eye(3, 4, dtype=np.float32)
    extrinsics[0, 3] = -0.2 * seed
    gate = {
        "weights": weights.astype(np.float16),
        "entropy": entr(weights).sum(axis=0).astype(np.float16),
        "stock_depth": depth + np.float32(0.5),
    }
    return ReconstructedFrame(
        image=np.full((HEIGHT, WIDTH, 3), (40, 230, 40), np.uint8),
        depth=depth,
        confidence=rng.random((HEIGHT, WIDTH)).astype(np.float32),
        intrinsics=np.array([[30, 0, WIDTH / 2], [0, 40, HEIGHT / 2], [0, 0, 1]], np.float32),
        extrinsics=extrinsics,
        original_size=np.array([HEIGHT, WIDTH]),
        original_intrinsics=np.eye(3, dtype=np.float32),
        **(gate if mixture else {}),
    )


def write_scene(folder: Path, mixture: bool = True, names=("left", "right")) -> FrameFolder:
    scene = FrameFolder(folder, names, {})
    scene.create()
    for index in range(len(names)):
        scene.save(index, make_frame(index, mixture))
    return scene


@pytest.fixture
def scene(tmp_path):
    return write_scene(tmp_path / "motorcycle")


@pytest.fixture
def clouds(scene):
    return SceneClouds(scene, 10**6)


def _shown(clouds, **settings):
    points, colors = zip(*clouds.visible(ViewSettings(**({"conf_percentile": 0.0} | settings))), strict=True)
    return np.concatenate(points), np.concatenate(colors)


def test_points_are_those_of_the_chosen_head(scene, clouds):
    for head, depths in (("MoE", [f.depth for f in scene]), ("stock", [f.stock_depth for f in scene])):
        points, colors = _shown(clouds, head=head)
        expected = [f.unprojected(d).reshape(-1, 3) for f, d in zip(scene, depths, strict=True)]
        np.testing.assert_array_equal(points, np.concatenate(expected))
        assert (colors == (40, 230, 40)).all()


def test_the_sliders_and_boxes_hide_points(scene, clouds):
    confidence = np.concatenate([f.confidence.ravel() for f in scene])
    entropy = np.concatenate([f.entropy.ravel() for f in scene])
    expert = np.concatenate([f.weights.argmax(axis=0).ravel() for f in scene])
    everything, _ = _shown(clouds)
    cases = (
        ({"conf_percentile": 60.0}, confidence >= np.percentile(confidence, 60, method="lower")),
        ({"max_entropy": 0.5}, entropy <= 0.5),
        ({"experts": frozenset({0, 2})}, expert != 1),
        ({"experts": frozenset()}, np.zeros(len(expert), bool)),
    )
    for settings, kept in cases:
        np.testing.assert_array_equal(_shown(clouds, **settings)[0], everything[kept])
        assert kept.sum() < len(kept)


def test_colours_tell_experts_entropy_and_depth_apart(scene, clouds):
    assert clouds.colors == ["RGB", "depth", "expert", "entropy"]
    _, experts = _shown(clouds, color="expert")
    best = np.concatenate([f.weights.argmax(axis=0).ravel() for f in scene])
    np.testing.assert_array_equal(experts, expert_colors(EXPERTS)[best])
    for color, values in (("depth", [f.depth for f in scene]), ("entropy", [f.entropy for f in scene])):
        light = _shown(clouds, color=color)[1] @ np.array([0.3, 0.6, 0.1])
        slope = np.corrcoef(light, np.concatenate([v.ravel() for v in values]))[0, 1]
        assert slope < -0.9 if color == "depth" else slope > 0.9


def test_without_a_mixture_there_are_no_experts(tmp_path):
    clouds = SceneClouds(write_scene(tmp_path / "a", mixture=False), 10**6)
    assert clouds.num_experts == 0 and clouds.colors == ["RGB", "depth"]
    np.testing.assert_array_equal(_shown(clouds)[0], _shown(clouds, head="stock", experts=frozenset())[0])


def test_errors_are_coloured_where_there_is_ground_truth(scene):
    truth = true_depths(open_dataset("motorcycle"), "motorcycle", scene.names)
    assert truth["left"].shape == (500, 741) and (truth["left"] > 0).mean() > 0.5
    clouds = SceneClouds(scene, 10**6, {"left": np.kron(2 * scene[0].depth, np.ones((2, 2)))})
    _, colors = _shown(clouds, color="error")
    first, second = colors[: HEIGHT * WIDTH], colors[HEIGHT * WIDTH :]
    assert (first > 235).all()  # right after median alignment: white
    assert (second == INVALID).all()  # unknown
    with pytest.raises(ValueError, match="the dataset has no ground truth for the scene 'moto'"):
        true_depths(open_dataset("motorcycle"), "moto", scene.names)


def test_no_more_points_are_held_than_asked_for(scene):
    clouds = SceneClouds(scene, 300)
    assert len(_shown(clouds)[0]) == pytest.approx(300, abs=70)


def test_frusta_have_the_cameras_own_angles(scene, clouds):
    camera, frame = clouds.cameras[1], scene[1]
    np.testing.assert_allclose(camera.position, [0.2, 0, 0], atol=1e-6)
    np.testing.assert_allclose(camera.wxyz, [1, 0, 0, 0], atol=1e-6)
    # The frustum's upper right edge, by its angles, is seen at the image's own corner.
    up = np.tan(camera.fov / 2)
    corner = torch.tensor([[camera.aspect * up, -up, 1.0]], dtype=torch.float32)
    pixel, _ = project(corner, torch.from_numpy(frame.intrinsics))
    np.testing.assert_allclose(pixel[0], [WIDTH, 0], atol=1e-4)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _addresses(pid: int, port: int) -> set[str]:
    """The local addresses that sockets on this port listen on, from the kernel's table."""
    found = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        if state == "0A" and int(local.split(":")[1], 16) == port:
            found.add(socket.inet_ntoa(bytes.fromhex(local.split(":")[0])[::-1]))
    return found


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs /proc/self/net/tcp")
def test_the_command_answers_on_the_loopback_only_and_ends_with_130(scene, tmp_path):
    pytest.importorskip("viser", reason="needs viser")
    port = _free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moe3d", "view", str(tmp_path), "--port", str(port), "--dataset", "motorcycle"],
        env={**os.environ, "PYTHONPATH": str(Path(moe3d.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout.readline() == f"open http://127.0.0.1:{port} in a browser; Ctrl-C ends\n", (
            process.stderr.read()
        )
        assert _addresses(process.pid, port) == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "moe3d view: interrupted\n"
    finally:
        process.kill()


@pytest.mark.parametrize("argv", [["--port", "0"], ["--port", "65536"], ["--max-points", "0"], ["--dataset", "mine"]])
def test_wrong_usage(tmp_path, argv):
    with pytest.raises(SystemExit) as exit_:
        main(["view", str(tmp_path), *argv])
    assert exit_.value.code == 2


def test_an_address_of_another_machine_is_one_sentence(scene, capsys):
    for host in ("192.0.2.1", "no.such.host.invalid"):  # reserved for documentation, and for names that are none
        assert main(["view", str(scene.folder.parent), "--host", host]) == 1
        assert f"--host must be an address of this machine, got '{host}'" in capsys.readouterr().err


def test_a_folder_without_a_reconstruction_is_one_sentence(tmp_path, capsys):
    assert main(["view", str(tmp_path)]) == 1
    assert "holds no reconstruction" in capsys.readouterr().err


# In a browser, which renders in software.


@pytest.fixture(scope="module")
def browser(start_chromium):
    pytest.importorskip("viser", reason="needs viser")
    software = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")
    return start_chromium("--window-size=800,500", *software)


@pytest.fixture
def viewer(scene):
    pytest.importorskip("viser", reason="needs viser")
    viewer = Viewer({"one": SceneClouds(scene, 10**6)}, port=_free_port())
    yield viewer
    viewer.stop()


def _picture(browser) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")).astype(int)


def _until(condition, what):
    until = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < until, f"waited in vain until {what}"
        time.sleep(0.2)


def _wait_for(browser, condition, what):
    _until(lambda: condition(_picture(browser)[:, :450]), f"the browser shows {what}")  # beside the panel


def _green(picture):
    return ((picture[..., 1] > 150) & (picture[..., 0] < 90) & (picture[..., 2] < 90)).sum()


CLICK = """
    const rows = box => [1, 2, 3, 4, 5, 6].reduce((found, _) => [...found, found.at(-1).parentElement], [box]);
    const boxes = [...document.querySelectorAll("input[type=checkbox]")].filter(
        box => rows(box).some(row => new RegExp(arguments[0]).test((row.innerText || "").trim())));
    boxes.forEach(box => box.click());
    return boxes.length;
"""


def test_the_browser_shows_points_and_follows_the_controls(browser, viewer):
    browser.get(viewer.url)
    _wait_for(browser, lambda picture: _green(picture) > 500, "the green points")
    text = browser.find_element("tag name", "body").text
    for label in (
        "Colour",
        "Depth of",
        "Hide least confident %",
        "Point size",
        "Cameras",
        "Entropy at most",
        "Expert 3",
    ):
        assert label in text
    # The photographs in the frusta are green, too.
    assert browser.execute_script(CLICK, "^Cameras$") == 1
    _wait_for(browser, lambda picture: _green(picture) > 100, "the points without cameras")
    for expert in range(EXPERTS):  # one after the other: the browser sends what is settled only
        assert browser.execute_script(CLICK, f"^Expert {expert + 1}$") == 1
        _until(lambda gone=expert: gone not in viewer.settings().experts, f"expert {expert + 1} is switched off")
    _wait_for(browser, lambda picture: _green(picture) < 50, "that no expert is left")
    assert "0 points" in browser.find_element("tag name", "body").text
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
