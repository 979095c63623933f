"""Images in, a folder of frames and exports out: resumable, whole at every moment, with memory that stays bounded.

VGGT-like models see all frames at once, so a resumed run computes the backbone again: what it saves are the heads of
the finished frames, and everything for a finished run, of which only the exports are then made anew.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EEXIST, ENOTDIR
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe3d.atomic import make_folder, output_folder
from moe3d.reconstruct.exports import Exporter, Scene
from moe3d.reconstruct.frames import PARTIAL, FrameFolder, ReconstructedFrame
from moe3d.reconstruct.images import LoadedImages, Placement, load_images
from moe3d.reconstruct.inputs import IMAGE_SUFFIXES, find_files, frame_names, image_files, left_out, scene_name
from moe3d.reconstruct.points import PointSelection
from moe3d.reconstruct.predict import FramePrediction, backbone_blocks, predict_frames
from moe3d.reconstruct.progress import Progress


@dataclass(frozen=True)
class Job:
    """What to reconstruct, and how."""

    inputs: Sequence[str]
    """Images, folders, globs and videos."""
    out: Path
    """The folder for the results of any number of scenes."""
    load: Callable[[], nn.Module]
    """Gives the model, on its device; called only if there is something to compute."""
    identity: Mapping[str, Any]
    """What tells this model from others, as JSON: a run is resumed only with the same."""
    width: Callable[[nn.Module], int]
    """Of the images that the model gets, a multiple of 14."""
    fps: float = 1.0
    """Frames per second that are taken from a video."""
    frames_chunk: int = 8
    """Frames that the heads see at once."""
    dtype: torch.dtype = torch.float32
    """Of the backbone."""
    keep_hypotheses: bool = False
    """Keep each expert's depth, too."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read instead of failing."""
    resume: bool = False
    """Take over what an earlier run of the same job has finished."""


def reconstruct(job: Job, selection: PointSelection, exports: Mapping[str, Exporter]) -> dict[str, Any]:
    """Run a job: ``OUT/<scene>/run.json`` and ``frames/``, and the exports.

    A run that fails or is interrupted leaves its finished frames, each whole, in ``OUT/<scene>.partial``, from where
    ``resume`` takes them, and everything else as it was.

    Returns:
        A summary, fit for JSON.

    Raises:
        OSError: an input is not there, or the output cannot be written.
        ValueError: an image, a video or a selection that will not do; a resumed run with other settings.
        RuntimeError: the model cannot run.
    """
    started = time.monotonic()
    inputs = find_files(job.inputs)
    scene = scene_name(job.inputs)
    final, partial = job.out / scene, job.out / f"{scene}{PARTIAL}"
    _check_ours(final)
    settings = _settings(job, inputs)
    progress = Progress()
    with _kept_if_finished(partial):
        shutil.rmtree(partial / "images", ignore_errors=True)
        files, skipped = image_files(inputs, partial / "images", job.fps, job.skip_unreadable)
        names = dict(zip(frame_names(files), files, strict=True))
        frames = _finished_run(final, settings) if job.resume else None
        notes: list[str] = []
        taken_over = len(frames) if frames else 0
        if frames is None:
            frames, found, taken_over = _compute(job, names, partial, settings, progress)
            notes = [*found.notes, *filter(None, [left_out(job.inputs)])]
            skipped |= {str(files[at]): why for at, why in found.skipped.items()}
        cloud = Scene(scene, frames, [names[name] for name in frames.names], selection)
        written = _export(job.out, cloud, exports, progress)
        _move_frames(frames, final)
        _remove_partial(partial)
    first = FrameFolder.open(final)[0]
    return {
        "scene": scene,
        "out": str(job.out),
        "frames": len(frames),
        "resumed": taken_over,
        "size": list(first.depth.shape),
        "skipped": skipped,
        "notes": notes,
        "points": len(cloud.cloud.points) if "cloud" in vars(cloud) else None,
        "files": written,
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory": progress.peak_memory(),
    }


def _settings(job: Job, inputs: Sequence[Path]) -> dict[str, Any]:
    """What the frames depend on, as it comes back from JSON."""
    settings = {
        "inputs": [[str(path.resolve()), file_stamp(path)] for path in inputs],
        "fps": job.fps,
        "dtype": str(job.dtype).removeprefix("torch."),
        "experts": job.keep_hypotheses,
        "skip_bad": job.skip_unreadable,
        **job.identity,
    }
    return json.loads(json.dumps(settings))


def file_stamp(path: Path) -> list[int] | None:
    """Size and time, by which a file is known to be the same; None where there is none."""
    if not path.is_file():
        return None
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _check_ours(final: Path) -> None:
    """Never write into a folder of the user's that happens to have the scene's name."""
    if final.exists() and not final.is_dir():
        raise NotADirectoryError(ENOTDIR, "must be a folder, but is a file", str(final))
    if final.is_dir() and any(final.iterdir()) and not (final / "run.json").is_file():
        raise FileExistsError(EEXIST, "holds other files than a reconstruction: use another --out", str(final))


@contextmanager
def _kept_if_finished(partial: Path) -> Iterator[None]:
    """A folder for an unfinished run, of which nothing stays after a failure unless it holds finished frames."""
    made = make_folder(partial)
    try:
        yield
    except BaseException:
        finished = len(list((partial / "frames").glob("*.npz")))
        if finished:
            shutil.rmtree(partial / "images", ignore_errors=True)
            print(f"{finished} finished frames are kept in {partial}: --resume goes on from them", file=sys.stderr)
        elif made:
            shutil.rmtree(made, ignore_errors=True)
        else:
            _remove_partial(partial)
        raise


def _remove_partial(partial: Path) -> None:
    """What an unfinished run leaves, and nothing else."""
    for name in ("images", "frames", "replaced"):
        shutil.rmtree(partial / name, ignore_errors=True)
    (partial / "run.json").unlink(missing_ok=True)
    with suppress(OSError):
        partial.rmdir()


def _finished_run(final: Path, settings: dict[str, Any]) -> FrameFolder | None:
    """An earlier run's frames, if it was of the same job and they are all there."""
    try:
        frames = FrameFolder.open(final)
    except (FileNotFoundError, ValueError):
        return None
    return frames if frames.settings == settings and len(frames.finished()) == len(frames) else None


def _compute(
    job: Job, names: Mapping[str, Path], partial: Path, settings: dict[str, Any], progress: Progress
) -> tuple[FrameFolder, LoadedImages, int]:
    """All frames into the folder of the unfinished run, which may hold some already; how many it did."""
    _prepare_partial(partial, settings, job.resume)
    model = job.load()
    progress.device = next(model.parameters()).device
    width = job.width(model)
    loaded = load_images(progress.over(names.values(), "Reading images", len(names)), width, job.skip_unreadable)
    readable = [name for at, name in enumerate(names) if at not in loaded.skipped]
    frames = FrameFolder(partial, readable, settings)
    frames.create()
    finished = _readable(frames)
    if len(finished) < len(frames):
        with progress.bar("Backbone", len(backbone_blocks(model))) as bar:
            predictions = predict_frames(model, loaded.images, job.frames_chunk, job.dtype, finished, bar.update)
            first = next(predictions)
        with progress.bar("Frames", len(frames), done=len(finished)) as bar:
            for index, prediction in _chain(first, predictions):
                frames.save(index, _frame(prediction, loaded.images[index], loaded.placements[index], job))
                bar.update()
    return frames, loaded, len(finished)


def _prepare_partial(partial: Path, settings: dict[str, Any], resume: bool) -> None:
    """Keep an unfinished run's frames to resume it, else remove them."""
    if resume and (partial / "run.json").is_file():
        before = FrameFolder.open(partial).settings
        different = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
        if different:
            raise ValueError(
                f"--resume: {partial} was made with other {' and '.join(different)}: run as before, or without --resume"
            )
    else:
        shutil.rmtree(partial / "frames", ignore_errors=True)
        (partial / "run.json").unlink(missing_ok=True)


def _readable(frames: FrameFolder) -> set[int]:
    """The finished frames that can be read; damaged ones are made anew."""
    whole = set()
    for index in frames.finished():
        try:
            frames[index]
        except ValueError:
            continue
        whole.add(index)
    return whole


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _frame(prediction: FramePrediction, image: Tensor, place: Placement, job: Job) -> ReconstructedFrame:
    """A frame as it is stored: half precision where that is enough, and no depth where the grid shows no image."""
    arrays: dict[str, np.ndarray] = {}
    shown = place.rows(image.shape[1])
    for name, values in prediction.items():
        if name == "hypotheses" and not job.keep_hypotheses:
            continue
        arrays[name] = values.to(torch.float16 if name in ("entropy", "weights") else torch.float32).numpy()
    for name in ("depth", "stock_depth"):
        if name in arrays:
            arrays[name] = np.where(_rows(shown, image.shape[1]), arrays[name], 0).astype(np.float32)
    return ReconstructedFrame(
        image=(image * 255).round().byte().permute(1, 2, 0).numpy(),
        original_size=np.array(place.original),
        original_intrinsics=place.to_original(prediction["intrinsics"]).numpy(),
        **arrays,
    )


def _rows(shown: slice, height: int) -> np.ndarray:
    """[H, 1] bool."""
    row = np.arange(height)[:, None]
    return (row >= shown.start) & (row < shown.stop)


def _export(out: Path, scene: Scene, exports: Mapping[str, Exporter], progress: Progress) -> list[str]:
    """All exports or none; the files' paths below ``out``."""
    with output_folder(out) as folder:
        with progress.bar("Exports", len(exports)) as bar:
            for export in exports.values():
                export(folder, scene)
                bar.update()
        _remove_older(out, folder)
        return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _remove_older(out: Path, folder: Path) -> None:
    """Pictures of an earlier run's frames, which would lie among those of this one."""
    for new in {file.parent for file in folder.rglob("*") if file.suffix in IMAGE_SUFFIXES}:
        for file in (out / new.relative_to(folder)).glob("*"):
            if file.suffix in IMAGE_SUFFIXES and not (new / file.name).exists():
                file.unlink()


def _move_frames(frames: FrameFolder, final: Path) -> None:
    """From the unfinished run's folder to the scene's, in place of an earlier run's frames."""
    if frames.folder == final:
        return
    final.mkdir(exist_ok=True)
    if (final / "frames").is_dir():
        (final / "frames").rename(frames.folder / "replaced")
    (frames.folder / "frames").rename(final / "frames")
    (frames.folder / "run.json").rename(final / "run.json")
