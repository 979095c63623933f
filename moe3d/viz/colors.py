"""Colour: maps whose steps look equally large, made in OKLab, and one colour per expert.

OKLab is Björn Ottosson's "perceptual color space for image processing" (2020): equal distances in it look about equal.
Each map is a path through a few anchors given as (lightness 0..1, chroma, hue in degrees).
"""

from __future__ import annotations

from functools import cache

import numpy as np

INVALID = np.array([128, 128, 128], dtype=np.uint8)
"""Neutral grey, on none of the maps: what has no value."""

_ANCHORS = {
    # Lightness falls steadily, so that the map also reads in grey: pale yellow (near) over red to night blue (far).
    "depth": [
        (0.96, 0.07, 105), (0.84, 0.15, 80), (0.70, 0.19, 48), (0.56, 0.20, 18), (0.42, 0.17, 340), (0.29, 0.12, 300),
        (0.17, 0.06, 275),
    ],
    # Blue (too near) over white (right) to orange red (too far), lightness alike on both sides.
    "error": [
        (0.40, 0.15, 262), (0.55, 0.16, 258), (0.76, 0.10, 250), (0.97, 0.00, 250), (0.76, 0.14, 58), (0.60, 0.18, 40),
        (0.44, 0.15, 32),
    ],
    # Night violet (sure) over green to pale yellow (undecided).
    "entropy": [
        (0.18, 0.06, 300), (0.36, 0.09, 265), (0.52, 0.09, 205), (0.68, 0.13, 160), (0.84, 0.17, 125),
        (0.96, 0.12, 105),
    ],
}  # fmt: skip


@cache
def colormap(name: str) -> np.ndarray:
    """The colours of the map "depth", "error" or "entropy": [255, 3] uint8 sRGB, low values first; read only.

    With ``INVALID`` they are 256, so that a picture in one map makes a small palette PNG.
    """
    from scipy.interpolate import PchipInterpolator  # smooth, and monotonic between anchors: no bands at them

    lightness, chroma, hue = np.array(_ANCHORS[name]).T
    anchors = np.stack([lightness, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))], axis=1)
    path = PchipInterpolator(np.arange(len(anchors)), anchors)
    table = encode_srgb(oklab_to_linear(path(np.linspace(0, len(anchors) - 1, 255))))
    table.setflags(write=False)
    return table


def apply_colormap(values: np.ndarray, name: str) -> np.ndarray:
    """Values [...] in [0, 1], clipped to it, to colours [..., 3] uint8; what is not finite becomes ``INVALID``."""
    finite = np.isfinite(values)
    index = np.rint(np.clip(np.where(finite, values, 0), 0, 1) * 254).astype(np.intp)
    return np.where(finite[..., None], colormap(name)[index], INVALID)


@cache
def expert_colors(count: int) -> np.ndarray:
    """One colour per expert, [count, 3] uint8: hues evenly around the circle, yellow light and blue dark; read only."""
    hue = np.radians(255 + 360 * np.arange(count) / count)
    lightness = 0.69 + 0.13 * np.cos(hue - np.radians(95))
    lab = np.stack([lightness, 0.15 * np.cos(hue), 0.15 * np.sin(hue)], axis=1)
    table = encode_srgb(oklab_to_linear(lab))
    table.setflags(write=False)
    return table


def oklab_to_linear(lab: np.ndarray) -> np.ndarray:
    """OKLab [..., 3] to linear sRGB [..., 3]; colours outside the gamut leave [0, 1]."""
    to_cones = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    return (lab @ to_cones.T) ** 3 @ to_rgb.T


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light [...], clipped to [0, 1], to sRGB uint8 (IEC 61966-2-1)."""
    linear = np.clip(linear, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def decode_srgb(colors: np.ndarray) -> np.ndarray:
    """sRGB uint8 [...] to linear light [...] in [0, 1]."""
    encoded = colors / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
