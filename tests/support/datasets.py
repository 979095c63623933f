"""Writes small datasets as they lie on disk, from a scene rendered through each dataset's own camera.

Each writer spells out its format independently of the readers: PNG bytes by hand, conventions by their documentation.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

from moe3d.data.synthetic.render import trace
from moe3d.data.synthetic.scenes import draw_scene

SEED = 0  # a scene of large surfaces, most of which every view sees
GL = np.diag([1.0, -1.0, -1.0])


@dataclass(frozen=True)
class View:
    """One frame of the rendered scene."""

    image: np.ndarray
    """[H, W, 3] uint8."""
    depth: np.ndarray
    """[H, W] float64 planar metres; 0 where a ray hits nothing."""
    extrinsics: np.ndarray
    """[3, 4] world-to-camera, OpenCV axes."""

    @property
    def camera_to_world(self) -> np.ndarray:
        """[4, 4]."""
        return np.linalg.inv(np.vstack([self.extrinsics, [0, 0, 0, 1]]))


@lru_cache
def render(camera: tuple[float, float, float, float], size: tuple[int, int], count: int = 3) -> tuple[View, ...]:
    """Views of one scene through a pinhole (fx, fy, cx, cy); each thing has its own colour."""
    fx, fy, cx, cy = camera
    scene = draw_scene(np.random.default_rng(SEED))
    x, y = (np.arange(size[1]) - cx) / fx, (np.arange(size[0]) - cy) / fy
    palette = np.random.default_rng(0).integers(20, 236, (len(scene.primitives.kind) + 1, 3), dtype=np.uint8)
    views = []
    for pose in scene.cameras[:count]:
        depth, index = trace(scene.primitives, pose, x, y)
        views.append(View(palette[index], np.where(np.isfinite(depth), depth, 0), pose.extrinsics()))
    return tuple(views)


@dataclass(frozen=True)
class Case:
    """A dataset's camera, its writer, and where a frame's files are."""

    camera: tuple[float, float, float, float]
    """(fx, fy, cx, cy) that the loaded frames must have."""
    size: tuple[int, int]
    write: Callable[[Path, Sequence[View]], None]
    sequence: str
    frames: tuple[str, ...]
    image: str
    depth: str
    """Paths under the root of the file of the second frame."""
    precision: float
    """Metres: half a step of the stored depth, or relative where it is stored in floating point."""
    name: str
    has_poses: bool = True

    def views(self) -> tuple[View, ...]:
        """Those that ``written`` writes."""
        return render(self.camera, self.size, len(self.frames))

    def written(self, root: Path) -> Path:
        """The dataset of :meth:`views` under ``root``."""
        self.write(root, self.views())
        return root


def save_png16(path: Path, values: np.ndarray) -> None:
    """A 16-bit grey PNG by the specification (ISO 15948)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.asarray(values))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    content = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def save_image(path: Path, image: np.ndarray) -> None:
    """By the suffix; JPEG at the quality 95."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def save_hdf5(path: Path, values: np.ndarray) -> None:
    """As Hypersim's files: one dataset named "dataset"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("dataset", data=values, compression="gzip")


def save_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def words(values: np.ndarray) -> str:
    return " ".join(f"{value:.9g}" for value in np.ravel(values))


def millimetres(depth: np.ndarray) -> np.ndarray:
    return np.minimum(np.round(1000 * depth), 65535).astype(np.uint16)


def write_nrgbd(root: Path, views: Sequence[View]) -> None:
    scene = root / "kitchen"
    lines = []
    for number, view in enumerate(views):
        save_image(scene / "images" / f"img{number}.png", view.image)
        save_png16(scene / "depth" / f"depth{number}.png", millimetres(view.depth))
        pose = view.camera_to_world.copy()
        pose[:3, 1:3] *= -1
        lines += [words(row) for row in pose]
    save_text(scene / "poses.txt", *lines)
    save_text(scene / "focal.txt", "70.5")


def write_7scenes(root: Path, views: Sequence[View]) -> None:
    save_text(root / "chess" / "TestSplit.txt", "sequence3")
    save_text(root / "chess" / "TrainSplit.txt", "sequence1")
    for number, view in enumerate(views):
        stem = root / "chess" / "seq-03" / f"frame-{number:06d}"
        save_image(stem.with_name(f"{stem.name}.color.png"), view.image)
        depth = np.where(view.depth > 0, millimetres(view.depth), 65535)
        save_png16(stem.with_name(f"{stem.name}.depth.proj.png"), depth)
        save_text(stem.with_name(f"{stem.name}.pose.txt"), *(words(row) for row in view.camera_to_world))


def write_vkitti2(root: Path, views: Sequence[View]) -> None:
    folder = root / "Scene01" / "15-deg-left"
    extrinsic = ["frame cameraID r1,1 r1,2 r1,3 t1 r2,1 r2,2 r2,3 t2 r3,1 r3,2 r3,3 t3 0 0 0 1"]
    intrinsic = ["frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]"]
    for number, view in enumerate(views):
        for camera in (0, 1):
            shifted = np.vstack([view.extrinsics, [0, 0, 0, 1]])
            shifted[0, 3] -= 0.532725 * camera
            extrinsic.append(f"{number} {camera} {words(shifted)}")
            intrinsic.append(f"{number} {camera} 72.5 71.5 47.25 31.75")
        save_image(folder / "frames" / "rgb" / "Camera_0" / f"rgb_{number:05d}.jpg", view.image)
        depth = np.where(view.depth > 0, np.minimum(np.round(100 * view.depth), 65535), 65535)
        save_png16(folder / "frames" / "depth" / "Camera_0" / f"depth_{number:05d}.png", depth)
    save_text(folder / "extrinsic.txt", *extrinsic)
    save_text(folder / "intrinsic.txt", *intrinsic)


HYPERSIM_CAMERA = (60.0, 58.0, 50.25, 30.5)
HYPERSIM_SIZE = (64, 96)
METRES_PER_UNIT = 0.0254


def hypersim_matrices(camera: tuple[float, float, float, float] = HYPERSIM_CAMERA) -> dict[str, float]:
    """The columns M_cam_from_uv and M_proj of a shifted lens, worked out per entry; both have a scale of their own."""
    (height, width), (fx, fy, cx, cy) = HYPERSIM_SIZE, camera
    scale = 1.25
    rays = np.array([
        [width / (2 * fx), 0, (width / 2 - 0.5 - cx) / fx],
        [0, height / (2 * fy), -(height / 2 - 0.5 - cy) / fy],
        [0, 0, -1],
    ])  # fmt: skip
    projection = np.zeros((4, 4))
    projection[0, 0], projection[1, 1] = 2 * fx / width, 2 * fy / height
    projection[0, 2], projection[1, 2] = 1 - (2 * cx + 1) / width, (2 * cy + 1) / height - 1
    projection[2, 2], projection[2, 3], projection[3, 2] = -1.002, -2.002, -1
    columns = {f"M_cam_from_uv_{i}{j}": scale * rays[i, j] for i in range(3) for j in range(3)}
    return columns | {f"M_proj_{i}{j}": projection[i, j] / scale for i in range(4) for j in range(4)}


def write_hypersim(root: Path, views: Sequence[View]) -> None:
    scene, height, width = root / "ai_001_002", *HYPERSIM_SIZE
    fx, fy, cx, cy = HYPERSIM_CAMERA
    columns = {"scene_name": "ai_001_002", "settings_output_img_width": float(width)}
    columns |= {"settings_output_img_height": float(height)} | hypersim_matrices()
    save_text(root / "metadata_camera_parameters.csv", ",".join(columns), ",".join(map(str, columns.values())))
    numbers = [3 + 2 * k for k in range(len(views))]
    save_text(
        root / "metadata_images_split_scene_v1.csv",
        "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name",
        *(f"ai_001_002,cam_01,{number},True,,test" for number in numbers),
    )
    save_text(
        scene / "_detail" / "metadata_scene.csv",
        "parameter_name,parameter_value",
        f"meters_per_asset_unit,{METRES_PER_UNIT}",
    )
    save_text(scene / "_detail" / "metadata_cameras.csv", "camera_name", "cam_01")
    # The trajectory has a pose that belongs to no image first, and the images' poses in reverse order.
    poses = [view.camera_to_world for view in reversed(views)]
    trajectory = scene / "_detail" / "cam_01"
    positions = [np.zeros(3), *(pose[:3, 3] / METRES_PER_UNIT for pose in poses)]
    save_hdf5(trajectory / "camera_keyframe_frame_indices.hdf5", np.array([0, *reversed(numbers)]))
    save_hdf5(trajectory / "camera_keyframe_positions.hdf5", np.stack(positions))
    save_hdf5(trajectory / "camera_keyframe_orientations.hdf5", np.stack([GL, *(pose[:3, :3] @ GL for pose in poses)]))
    row, column = np.mgrid[:height, :width]
    lengths = np.sqrt(((column - cx) / fx) ** 2 + ((row - cy) / fy) ** 2 + 1)
    for number, view in zip(numbers, views, strict=True):
        final, geometry = (scene / "images" / f"scene_cam_01_{kind}_hdf5" for kind in ("final", "geometry"))
        distance = np.where(view.depth > 0, view.depth * lengths, np.nan)
        save_hdf5(final / f"frame.{number:04d}.color.hdf5", ((view.image / 255) ** 2.2).astype(np.float16))
        save_hdf5(geometry / f"frame.{number:04d}.depth_meters.hdf5", distance.astype(np.float32))
        save_hdf5(geometry / f"frame.{number:04d}.render_entity_id.hdf5", np.where(view.depth > 0, 7, -1))


def write_sintel(root: Path, views: Sequence[View]) -> None:
    tag = struct.pack("<f", 202021.25)
    fx, fy, cx, cy = SINTEL_CAMERA
    for number, view in enumerate(views, start=1):
        files = {
            kind: root / "training" / kind / "alley_2" / f"frame_{number:04d}.{suffix}"
            for kind, suffix in (("final", "png"), ("depth", "dpt"), ("camdata_left", "cam"))
        }
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        save_image(files["final"], view.image)
        height, width = view.depth.shape
        depth = np.where(view.depth > 0, view.depth, 1e5)  # the sky is far
        values = struct.pack(f"<{height * width}f", *depth.ravel())
        files["depth"].write_bytes(tag + struct.pack("<ii", width, height) + values)
        camera = (fx, 0, cx, 0, fy, cy, 0, 0, 1, *view.extrinsics.ravel())
        files["camdata_left"].write_bytes(tag + struct.pack("<21d", *camera))


def write_nyuv2_labelled(root: Path, views: Sequence[View]) -> None:
    """MATLAB's v7.3: HDF5 behind 512 bytes of header, H x W x 3 x N stored as [N, 3, W, H]."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        images = np.stack([view.image.transpose(2, 1, 0) for view in views])
        depths = np.stack([view.depth.T for view in views]).astype(np.float32)
        file.create_dataset("images", data=images, chunks=(1, *images.shape[1:]))
        file.create_dataset("depths", data=depths, chunks=(1, *depths.shape[1:]))
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    test = np.arange(1, len(views) + 1)[:, None]
    savemat(root / "splits.mat", {"testNdxs": test[1:], "trainNdxs": test[:1]})


def write_nyuv2_files(root: Path, views: Sequence[View]) -> None:
    folder = root / "val" / "official"
    folder.mkdir(parents=True, exist_ok=True)
    for number, view in enumerate(views, start=1):
        with h5py.File(folder / f"{number:05d}.h5", "w") as file:
            file["rgb"] = view.image.transpose(2, 0, 1)
            file["depth"] = view.depth.astype(np.float32)


def write_kitti_drive(root: Path, views: Sequence[View], drive: str = "2011_09_26_drive_0002_sync") -> None:
    for number, view in enumerate(views, start=5):
        truth = root / drive / "proj_depth" / "groundtruth" / "image_02" / f"{number:010d}.png"
        save_png16(truth, np.round(256 * view.depth))
        save_image(root / drive / "image_02" / "data" / f"{number:010d}.png", view.image)


def write_kitti_cropped(root: Path, views: Sequence[View]) -> None:
    folder = root / "depth_selection" / "val_selection_cropped"
    fx, fy, cx, cy = KITTI_CROPPED_CAMERA
    for number, view in enumerate(views, start=5):
        drive, frame = "2011_09_26_drive_0002_sync", f"{number:010d}_image_02"
        save_image(folder / "image" / f"{drive}_image_{frame}.png", view.image)
        save_png16(folder / "groundtruth_depth" / f"{drive}_groundtruth_depth_{frame}.png", np.round(256 * view.depth))
        save_text(folder / "intrinsics" / f"{drive}_image_{frame}.txt", f"{fx} 0.0 {cx} 0.0 {fy} {cy} 0.0 0.0 1.0")


def write_bonn(root: Path, views: Sequence[View]) -> None:
    folder = root / "rgbd_bonn_balloon2"
    for number, view in enumerate(views):
        save_image(folder / "rgb_110" / f"1548266472.{61041 + 3333 * number}.png", view.image)
        save_png16(folder / "depth_110" / f"1548266472.{60033 + 3333 * number}.png", np.round(5000 * view.depth))


SINTEL_CAMERA = (112.0, 112.0, 47.5, 31.5)
KITTI_CROPPED_CAMERA = (721.5377, 721.5377, 60.25, 30.5)
_HYPERSIM = "ai_001_002/images/scene_cam_01"
_KITTI = "2011_09_26_drive_0002_sync"
_CROPPED = "depth_selection/val_selection_cropped"

CASES = {
    "nrgbd": Case(
        (70.5, 70.5, 48.0, 32.0), (64, 96), write_nrgbd, "kitchen", ("img0", "img1", "img2"),
        "kitchen/images/img1.png", "kitchen/depth/depth1.png", 5.1e-4, "nrgbd",
    ),
    "7scenes": Case(
        (525.0, 525.0, 320.0, 240.0), (480, 640), write_7scenes, "chess_seq-03", ("frame-000000", "frame-000001"),
        "chess/seq-03/frame-000001.color.png", "chess/seq-03/frame-000001.depth.proj.png", 5.1e-4, "7scenes",
    ),
    "vkitti2": Case(
        (72.5, 71.5, 47.25, 31.75), (64, 96), write_vkitti2, "Scene01_15-deg-left_Camera_0",
        ("rgb_00000", "rgb_00001", "rgb_00002"), "Scene01/15-deg-left/frames/rgb/Camera_0/rgb_00001.jpg",
        "Scene01/15-deg-left/frames/depth/Camera_0/depth_00001.png", 5.1e-3, "vkitti2",
    ),
    "hypersim": Case(
        HYPERSIM_CAMERA, HYPERSIM_SIZE, write_hypersim, "ai_001_002_cam_01", ("frame.0003", "frame.0005", "frame.0007"),
        f"{_HYPERSIM}_final_hdf5/frame.0005.color.hdf5", f"{_HYPERSIM}_geometry_hdf5/frame.0005.depth_meters.hdf5",
        1e-5, "hypersim",
    ),
    "sintel": Case(
        SINTEL_CAMERA, (64, 96), write_sintel, "alley_2", ("frame_0001", "frame_0002", "frame_0003"),
        "training/final/alley_2/frame_0002.png", "training/depth/alley_2/frame_0002.dpt", 1e-5, "sintel",
    ),
    "nyuv2-labelled": Case(
        (518.857901, 519.469611, 324.582449, 252.736166), (48, 64), write_nyuv2_labelled, "nyuv2", ("00001", "00002"),
        "nyu_depth_v2_labeled.mat", "nyu_depth_v2_labeled.mat", 1e-5, "nyuv2", has_poses=False,
    ),
    "nyuv2-files": Case(
        (518.857901, 519.469611, 324.582449, 252.736166), (48, 64), write_nyuv2_files, "nyuv2", ("00001", "00002"),
        "val/official/00002.h5", "val/official/00002.h5", 1e-5, "nyuv2", has_poses=False,
    ),
    "kitti-drives": Case(
        (721.5377, 721.5377, 609.5593, 172.854), (48, 64), write_kitti_drive, _KITTI, ("0000000005", "0000000006"),
        f"{_KITTI}/image_02/data/0000000006.png",
        f"{_KITTI}/proj_depth/groundtruth/image_02/0000000006.png", 2e-3, "kitti", has_poses=False,
    ),
    "kitti-cropped": Case(
        KITTI_CROPPED_CAMERA, (48, 64), write_kitti_cropped, "kitti",
        (f"{_KITTI}_image_0000000005_image_02", f"{_KITTI}_image_0000000006_image_02"),
        f"{_CROPPED}/image/{_KITTI}_image_0000000006_image_02.png",
        f"{_CROPPED}/groundtruth_depth/{_KITTI}_groundtruth_depth_0000000006_image_02.png", 2e-3, "kitti",
        has_poses=False,
    ),
    "bonn": Case(
        (542.822841, 542.57687, 315.59352, 237.756098), (48, 64), write_bonn, "balloon2",
        ("1548266472.61041", "1548266472.64374"), "rgbd_bonn_balloon2/rgb_110/1548266472.64374.png",
        "rgbd_bonn_balloon2/depth_110/1548266472.63366.png", 1.1e-4, "bonn", has_poses=False,
    ),
}  # fmt: skip
