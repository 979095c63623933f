"""The demo's report as one HTML page that needs nothing but itself.

Every sentence with a judgement in it is made from the numbers beside it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import NamedTuple

import numpy as np

from moe3d.viz.colors import colormap, expert_colors
from moe3d.viz.pictures import ERROR_LIMIT, FLYING, LANDED

SAME = 0.01
"""Two values that differ by less than this fraction are called about the same."""


class Metric(NamedTuple):
    """How a metric is called and read."""

    name: str
    higher_is_better: bool
    form: str
    meaning: str


METRICS = {
    "abs_rel": Metric("AbsRel", False, ".3f", "mean of |predicted − true| / true depth, after scaling each prediction by one number (ratio of medians)"),
    "delta1": Metric("δ1", True, ".3f", "fraction of pixels whose predicted depth is within a factor of 1.25 of the truth, scaled likewise"),
    "si_f1": Metric("Boundary F1", True, ".3f", "do depth edges stand on the very pixel where true ones do; precision and recall in one number, over ten thresholds (Depth Pro)"),
    "flying_rate": Metric("Flying points", False, ".1%", "fraction of true boundary pixels whose prediction hangs between the near and the far surface, and lies on neither"),
}  # fmt: skip


@dataclass(frozen=True)
class PageScene:
    """What the page shows of a scene beside the report's numbers."""

    title: str
    about: str
    pictures: Mapping[str, bytes]
    """The pictures of :func:`moe3d.viz.comparison.scene_pictures`, each as a PNG or JPEG file."""
    depth_range: tuple[float, float]
    """Near and far end of the depth's colours, in metres."""
    weights: np.ndarray
    """[K, h, w], the gate's."""
    downloads: Mapping[str, str]
    """What a file is -> its path relative to the page."""


def render_page(report: Mapping, scenes: Sequence[PageScene]) -> str:
    """The page.

    Args:
        report: as ``moe3d demo`` writes it to ``report.json``.
        scenes: one for each of ``report["scenes"]``, in the same order.
    """
    content = "\n".join(
        [
            _header(report),
            "<main>",
            _table(report, scenes),
            *(_scene(numbers, scene) for numbers, scene in zip(report["scenes"], scenes, strict=True)),
            "</main>",
            _footer(report),
        ]
    )
    return files("moe3d.viz").joinpath("page.html").read_text("utf-8").replace("{{content}}", content)


def compare_words(stock: Mapping[str, float | None], moe: Mapping[str, float | None]) -> str:
    """What the MoE head does better, worse and alike, with the numbers."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "about the same": []}
    for key, metric in METRICS.items():
        judgement = _judge(key, stock[key], moe[key])
        if judgement is not None:
            groups[judgement].append(f"{metric.name} {_text(key, stock[key])} → {_text(key, moe[key])}")
    parts = [f"{judgement}: {', '.join(entries)}" for judgement, entries in groups.items() if entries]
    return f"With the MoE head, {'; '.join(parts)}." if parts else "Nothing can be compared here."


def gate_words(weights: np.ndarray) -> str:
    """How the gate [K, h, w] shares the pixels out."""
    leads = np.bincount(weights.argmax(axis=0).ravel(), minlength=len(weights)) / weights[0].size
    used = int((leads >= 0.01).sum())
    decided = float((weights.max(axis=0) >= 0.9).mean())
    experts = f"{used} of {len(weights)} experts lead" if used > 1 else "One expert leads"
    return f"{experts} on at least 1% of the pixels; one holds 90% of the weight or more on {decided:.0%} of them."


def _judge(key: str, stock: float | None, moe: float | None) -> str | None:
    if stock is None or moe is None:
        return None
    if abs(moe - stock) <= SAME * max(abs(stock), abs(moe)):
        return "about the same"
    return "better" if (moe > stock) == METRICS[key].higher_is_better else "worse"


def _text(key: str, value: float | None) -> str:
    return "–" if value is None else format(value, METRICS[key].form)


def _header(report: Mapping) -> str:
    mean = report["mean"]
    words = compare_words(mean["stock"], mean["moe"])
    return f"""<header>
<p class="brand">moe3d<span>{escape(report["version"])} · demo</span></p>
<h1>A depth head, and a mixture of experts in its place</h1>
<p class="lead">The same small network, twice: once with its stock depth head, once with K experts and a gate instead of the
head’s last block. <strong>{escape(words)}</strong> These are means over {len(report["scenes"])} scenes that neither head was trained on.</p>
<div class="tiles">{"".join(_tile(key, mean) for key in METRICS)}{_time_tile(report)}</div>
</header>"""


def _tile(key: str, mean: Mapping) -> str:
    stock, moe = mean["stock"][key], mean["moe"][key]
    judgement = _judge(key, stock, moe)
    change = "" if judgement is None or not stock else f"{moe / stock - 1:+.1%} · {judgement}"
    tone = {"better": "good", "worse": "bad"}.get(judgement or "", "")
    return f"""<div class="tile"><h3>{METRICS[key].name}</h3>
<div class="pair"><small>{_text(key, stock)} →</small> {_text(key, moe)}</div><div class="change {tone}">{change}</div></div>"""


def _time_tile(report: Mapping) -> str:
    timing = report["timing"]
    low, high = timing["interval_percent"]
    stock, moe = (_duration(timing[f"{head}_seconds"]) for head in ("stock", "moe"))
    return f"""<div class="tile"><h3>Time for {timing["views"]} views</h3>
<div class="pair"><small>{stock} →</small> {moe}</div>
<div class="change">{report["overhead_percent"]:+.0f}% ({low:+.0f} to {high:+.0f}) · {escape(report["backend"])} backend</div></div>"""


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _table(report: Mapping, scenes: Sequence[PageScene]) -> str:
    names = "".join(f'<th colspan="2" scope="colgroup">{metric.name}</th>' for metric in METRICS.values())
    heads = "".join('<th scope="col">stock</th><th scope="col" class="moe">MoE</th>' for _ in METRICS)
    rows = [_row(scene.title, numbers) for numbers, scene in zip(report["scenes"], scenes, strict=True)]
    rows.append(_row("Mean of the scenes", report["mean"]))
    return f"""<section class="card"><div class="scroll"><table>
<caption>All scenes</caption>
<thead><tr><th></th>{names}</tr><tr><th scope="col">Scene</th>{heads}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div></section>"""


def _row(title: str, numbers: Mapping) -> str:
    cells = []
    for key in METRICS:
        stock, moe = numbers["stock"][key], numbers["moe"][key]
        judgement = _judge(key, stock, moe)
        cells.append(f'<td class="{"best" if judgement == "worse" else ""}">{_text(key, stock)}</td>')
        cells.append(f'<td class="moe {"best" if judgement == "better" else ""}">{_text(key, moe)}</td>')
    return f'<tr><th scope="row">{escape(title)}</th>{"".join(cells)}</tr>'


def _scene(numbers: Mapping, scene: PageScene) -> str:
    pictures = {name: _data_uri(file) for name, file in scene.pictures.items()}
    size, model_size = ("×".join(map(str, reversed(numbers[key]))) for key in ("size", "model_size"))
    floor = numbers["truth_flying_rate"]
    words = compare_words(numbers["stock"], numbers["moe"])
    if floor:
        words += f" The truth itself counts {floor:.1%} flying points here, where three surfaces meet in one window: no head gets below that by being right."
    downloads = " · ".join(f'<a href="{escape(path)}">{escape(what)}</a>' for what, path in scene.downloads.items())
    return f"""<section class="card scene">
<header><h2>{escape(scene.title)}</h2><p>{escape(scene.about)}; {numbers["views"]} views of {size}, given to the model at {model_size}</p></header>
<div class="grid">
{_compare(scene, pictures)}
<div class="side">
{_figure(pictures["input"], f"Input view of {scene.title}", "<b>Input</b>, the first view")}
{_figure(pictures["depth_truth"], f"True depth of {scene.title}", "<b>True depth</b>, in the same colours; grey where unknown")}
</div>
{_gate_figure(scene, pictures)}
{_entropy_figure(scene, pictures)}
{_detail_figure(scene, pictures)}
</div>
<p class="words">{escape(words)}</p>
<p class="files">In this page’s folder: {downloads}</p>
</section>"""


def _compare(scene: PageScene, pictures: Mapping[str, str]) -> str:
    layers = {"depth": "Depth", "error": "Error", "flying": "Flying points", "points": "Cloud from the side"}
    buttons = "".join(
        f'<button type="button" value="{layer}" aria-pressed="{"true" if layer == "depth" else "false"}">{label}</button>'
        for layer, label in layers.items()
    )
    images = "".join(
        f'<img class="{head} {layer}" src="{pictures[f"{layer}_{head}"]}" alt="{label}, {called} head" draggable="false">'
        for layer, label in layers.items()
        for head, called in (("moe", "MoE"), ("stock", "stock"))
    )
    _, height, width = scene.weights.shape
    return f"""<figure class="compare">
<div class="layers" role="group" aria-label="What to show">{buttons}</div>
<div class="stage" data-layer="depth" style="aspect-ratio: {width} / {height}">{images}
<input type="range" min="0" max="100" step="1" value="50" aria-label="Divider: stock head to the left, MoE head to the right, {escape(scene.title)}">
<div class="handle" aria-hidden="true"></div><span class="tag stock">Stock</span><span class="tag moe">MoE</span></div>
{_legends(scene)}
</figure>"""


def _legends(scene: PageScene) -> str:
    near, far = scene.depth_range
    depth = f"<span>{near:.1f} m</span>{_ramp('depth')}<span>{far:.1f} m</span><span>(logarithmic)</span>"
    error = (
        f"<span>too near, ×{1 / ERROR_LIMIT:.2f} or less</span>{_ramp('error')}<span>too far, ×{ERROR_LIMIT:.2f} or more</span>"
    )
    flying = f"<span>At true boundaries the prediction</span>{_swatch(FLYING, 'flies between two surfaces')}{_swatch(LANDED, 'does not')}"
    points = "<span>The predicted points, seen from the left and above: what hangs between surfaces is a flying point</span>"
    return "".join(
        f'<figcaption class="legend {"shown" if layer == "depth" else ""}" data-layer="{layer}">{legend}</figcaption>'
        for layer, legend in (("depth", depth), ("error", error), ("flying", flying), ("points", points))
    )


def _gate_figure(scene: PageScene, pictures: Mapping[str, str]) -> str:
    share = scene.weights.mean(axis=(1, 2))
    swatches = "".join(
        _swatch(color, f"{k}: {part:.0%}") for k, (color, part) in enumerate(zip(expert_colors(len(share)), share), start=1)
    )
    caption = f"<b>Gate</b>: each expert’s colour, mixed by its weight. {gate_words(scene.weights)}"
    legend = f'<div class="legend always">{swatches}</div>'
    return _figure(pictures["gate"], f"Gate weights on {scene.title}", caption + legend, "third")


def _entropy_figure(scene: PageScene, pictures: Mapping[str, str]) -> str:
    caption = "<b>Entropy</b> of the gate: how undecided it is between experts."
    legend = f'<div class="legend always"><span>sure</span>{_ramp("entropy")}<span>log {len(scene.weights)}</span></div>'
    return _figure(pictures["entropy"], f"Gate entropy on {scene.title}", caption + legend, "third")


def _detail_figure(scene: PageScene, pictures: Mapping[str, str]) -> str:
    crops = "".join(
        f'<div><img src="{pictures[f"detail_{name}"]}" alt="Detail of {escape(scene.title)}: {label}"><span class="tag">{label}</span></div>'
        for name, label in (("input", "input"), ("truth", "true depth"), ("stock", "stock"), ("moe", "MoE"))
    )
    caption = "<b>Detail</b>, where true boundaries are densest."
    return f'<figure class="third detail"><div class="crops">{crops}</div><figcaption>{caption}</figcaption></figure>'


def _figure(source: str, description: str, caption: str, kind: str = "") -> str:
    return f'<figure class="{kind}"><img src="{source}" alt="{escape(description)}"><figcaption>{caption}</figcaption></figure>'


def _swatch(color: np.ndarray, label: str) -> str:
    return f'<span><i class="swatch" style="background: rgb({" ".join(map(str, color))})"></i>{label}</span>'


def _ramp(name: str) -> str:
    stops = ", ".join(f"rgb({' '.join(map(str, color))})" for color in colormap(name)[::15])
    return f'<span class="ramp" style="background: linear-gradient(90deg, {stops})"></span>'


def _data_uri(file: bytes) -> str:
    kind = "png" if file.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def _footer(report: Mapping) -> str:
    meanings = "".join(f"<dt>{metric.name}</dt><dd>{escape(metric.meaning)}</dd>" for metric in METRICS.values())
    timing = report["timing"]
    return f"""<footer>
<h2>How to read this</h2>
<dl>{meanings}</dl>
<p>Backbone, camera and everything of the depth head before its last block are the same weights in both. The network has about
4 million parameters and was trained on synthetic scenes only: it shows what the head changes, not how well a large model
reconstructs. In bold: the better of two values that differ by more than {SAME:.0%}.</p>
<p>Time: {timing["views"]} views of {"×".join(map(str, reversed(timing["size"])))} through the whole network, median of {timing["rounds"]} interleaved
rounds on {escape(report["device"])}; the brackets hold the 95% interval of the overhead.</p>
</footer>"""
