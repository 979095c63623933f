"""Photographs and videos made on the spot."""

from __future__ import annotations

import numpy as np
import pytest


def photo(height, width, seed=0):
    """[H, W, 3] uint8: smooth colours with some noise, what resampling filters disagree about."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(9 * x + seed * y), np.cos(7 * y), np.sin(12 * x * y)], axis=-1)
    return np.clip(127 + 90 * waves + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def write_video(path, frames=20, rate=10, rotation=None, pixel_aspect=None):
    """Frame i is grey 10 i with a white corner at the top left."""
    av = pytest.importorskip("av", reason="needs PyAV")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            image = np.full((48, 64, 3), 10 * i, np.uint8)
            image[:16, :16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    return path
