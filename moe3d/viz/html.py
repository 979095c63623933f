"""What the pages share: the document around them, and pieces that need nothing outside it."""

from __future__ import annotations

import base64
from html import escape
from importlib.resources import files

import numpy as np

from moe3d.viz.colors import colormap


def document(title: str, content: str) -> str:
    """A whole page with the package's style."""
    page = files("moe3d.viz").joinpath("page.html").read_text("utf-8")
    return page.replace("{{title}}", escape(title)).replace("{{content}}", content)


def figure(source: str, description: str, caption: str, kind: str = "") -> str:
    """A picture with its caption, which is HTML."""
    image = f'<img src="{source}" alt="{escape(description)}">'
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def swatch(color: np.ndarray, label: str) -> str:
    """A colour of a legend."""
    return f'<span><i class="swatch" style="background: {css(color)}"></i>{label}</span>'


def ramp(name: str) -> str:
    """A colour map of a legend."""
    stops = ", ".join(map(css, colormap(name)[::15]))
    return f'<span class="ramp" style="background: linear-gradient(90deg, {stops})"></span>'


def css(color: np.ndarray) -> str:
    return f"rgb({' '.join(map(str, color))})"


def data_uri(file: bytes) -> str:
    """A PNG or JPEG file as an address."""
    kind = "png" if file.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
