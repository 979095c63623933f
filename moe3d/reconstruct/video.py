"""Frames of a video as image files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe3d.reconstruct.images import MAX_PIXELS

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts", ".3gp", ".wmv")

# A playlist in a video's clothes could name other files and addresses: only containers are opened, only files read.
_SAFE = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg",
}


def extract_frames(video: str | os.PathLike[str], folder: Path, fps: float) -> Iterator[Path]:
    """Write a video's frames, upright, as PNG files ``<stem>_<number in the video, 6 digits>.png``.

    Args:
        video: a file in any format that FFmpeg decodes.
        folder: exists; the files are written to it.
        fps: frames per second of the video's own time: of each 1/fps the first. More than the video has gives all.

    Yields:
        The files, in the video's order.

    Raises:
        ValueError: not a video, one that is damaged (after the frames before the damage), or frames beyond 200
            megapixels.
        OSError: the file is not there, may not be read, or the folder cannot be written.
        RuntimeError: PyAV is not installed.
    """
    video = Path(video)
    with video.open("rb"):  # FFmpeg's own message would name neither the file nor the reason
        pass
    first, due = None, 0
    for number, (seconds, frame, width) in enumerate(_decode(video)):
        first = seconds if first is None else first
        period = int((seconds - first) * fps + 1e-6)
        if period < due:
            continue
        due = period + 1
        path = folder / f"{video.stem}_{number:06d}.png"
        Image.fromarray(_upright(frame, width)).save(path, compress_level=1)
        yield path


def _decode(video: Path) -> Iterator[tuple[float, Any, int]]:
    """(time in seconds, frame, the width at which it is shown) of every frame."""
    try:
        import av
    except ImportError:
        raise RuntimeError(f"{video} needs PyAV to be decoded: pip install 'moe3d[video]'") from None
    decoded = 0
    try:
        with av.open(str(video), options=_SAFE) as container:
            if not container.streams.video:
                raise ValueError(f"{video} holds no video")
            stream = container.streams.video[0]
            if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                raise ValueError(f"{video} has frames of more than {MAX_PIXELS // 10**6} megapixels, too many")
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or 25)  # for the rare container without timestamps
            width = _shown_width(stream)
            for frame in container.decode(stream):
                yield (decoded / rate if frame.time is None else frame.time), frame, width
                decoded += 1
    except av.FFmpegError as error:
        raise ValueError(
            f"{video} is not a video that can be decoded ({error.strerror}, after {decoded} frames)"
        ) from None
    if not decoded:
        raise ValueError(f"{video} is not a video that can be decoded (it holds no frames)")


def _shown_width(stream: Any) -> int:
    """The stored width, or as wide as pixels that are no squares (those of DV and AVCHD) are shown."""
    return round(stream.codec_context.width * (stream.sample_aspect_ratio or 1))


def _upright(frame: Any, width: int) -> np.ndarray:
    """[H, W, 3] uint8, ``width`` wide and then turned as the video's display matrix says."""
    pixels = frame.to_ndarray(format="rgb24", width=width)
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
