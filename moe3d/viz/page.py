"""The demo's report as one HTML page that needs nothing but itself.

Every sentence with a judgement in it is made from the numbers beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from moe3d.viz import metrics
from moe3d.viz.colors import expert_colors
from moe3d.viz.html import data_uri, document, figure, ramp, swatch
from moe3d.viz.metrics import SAME, SAME_AT_ZERO, judge
from moe3d.viz.pictures import ERROR_LIMIT, FLYING, LANDED

EDGES = 0.05
"""Below this boundary F1 the page says that a head draws no edges to speak of."""


METRICS = {key: metrics.METRICS[key] for key in ("abs_rel", "delta1", "si_f1", "flying_rate")}
_TONES = {"better": "good", "worse": "bad"}
_LAYERS = {"depth": "Depth", "error": "Error", "flying": "Flying points", "points": "Side view"}


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
        scenes: at least one; one for each of ``report["scenes"]``, in the same order.
    """
    sections = [_scene(numbers, scene) for numbers, scene in zip(report["scenes"], scenes, strict=True)]
    content = "\n".join(
        [
            _header(report, num_experts=len(scenes[0].weights)),
            "<main>",
            _table(report, scenes),
            *sections,
            "</main>",
            _footer(report),
        ]
    )
    return document("moe3d demo", content)


def compare_words(stock: Mapping[str, float | None], moe: Mapping[str, float | None], with_values: bool = True) -> str:
    """What the MoE head does better, worse and about as well, in a sentence."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "about the same": []}
    for key, metric in METRICS.items():
        judgement = judge(key, stock[key], moe[key])
        if judgement is not None:
            values = f" {METRICS[key].text(stock[key])} → {METRICS[key].text(moe[key])}" if with_values else ""
            groups[judgement].append(metric.name + values)
    parts = [f"{judgement}: {', '.join(entries)}" for judgement, entries in groups.items() if entries]
    return f"With the MoE head, {'; '.join(parts)}." if parts else "Nothing can be compared here."


def gate_words(weights: np.ndarray) -> str:
    """How the gate [K, H, W] shares the pixels out, in a sentence."""
    leads = np.bincount(weights.argmax(axis=0).ravel(), minlength=len(weights)) / weights[0].size
    used = int((leads >= 0.01).sum())
    decided = float((weights.max(axis=0) >= 0.9).mean())
    return (
        f"{used} of {len(weights)} experts lead{'s' if used == 1 else ''} on 1% of the pixels or more; "
        f"on {decided:.0%} of all pixels one holds at least 90% of the weight."
    )


def entropy_words(weights: np.ndarray) -> str:
    """How undecided the gate [K, H, W] is on average, in a sentence."""
    terms = weights * np.log(weights, where=weights > 0, out=np.zeros(weights.shape))
    share = abs(terms.sum(axis=0).mean()) / max(np.log(len(weights)), 1e-6)
    return f"On average it reaches {share:.0%} of log {len(weights)}, the value of a gate that prefers none."


def _header(report: Mapping, num_experts: int) -> str:
    mean = report["mean"]
    words = compare_words(mean["stock"], mean["moe"], with_values=False)
    return f"""<header>
<p class="brand">moe3d<span>{escape(report["version"])} · demo</span></p>
<h1>A depth head, and a mixture of experts in its place</h1>
<p class="lead">One small network, twice: with its stock depth head, and with {num_experts} experts and a gate in place
of that head’s last block. <strong>{escape(words)}</strong> The figures are means over the
{len(report["scenes"])} scenes below; neither head was trained on them.</p>
<div class="tiles">{"".join(_tile(key, mean) for key in METRICS)}{_time_tile(report)}</div>
</header>"""


def _tile(key: str, mean: Mapping) -> str:
    stock, moe = mean["stock"][key], mean["moe"][key]
    judgement = judge(key, stock, moe)
    change = judgement or "not defined here"
    if judgement in _TONES and stock:
        change = f"{moe / stock - 1:+.1%} · {judgement}"
    tone = _TONES.get(judgement or "", "")
    return f"""<div class="tile"><h3>{METRICS[key].name}</h3>
<div class="pair"><small>{METRICS[key].text(stock)} →</small> {METRICS[key].text(moe)}</div>
<div class="change {tone}">{change}</div></div>"""


def _time_tile(report: Mapping) -> str:
    timing = report["timing"]
    low, high = timing["interval_percent"]
    stock, moe, sharpened = (_duration(timing[f"{name}_seconds"]) for name in ("stock", "moe", "sharpened"))
    overhead = f"{report['overhead_percent']:+.0f}% ({low:+.0f} to {high:+.0f})"
    return f"""<div class="tile"><h3>Time for {timing["views"]} views</h3>
<div class="pair"><small>{stock} →</small> {moe}</div>
<div class="change">{overhead} · {escape(report["backend"])} backend · sharpened {sharpened}</div></div>"""


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _table(report: Mapping, scenes: Sequence[PageScene]) -> str:
    names = "".join(f'<th colspan="2" scope="colgroup">{metric.name}</th>' for metric in METRICS.values())
    heads = '<th scope="col">stock</th><th scope="col" class="moe">MoE</th>' * len(METRICS)
    rows = [_row(scene.title, numbers) for numbers, scene in zip(report["scenes"], scenes, strict=True)]
    return f"""<section class="card"><div class="scroll"><table>
<caption>All scenes</caption>
<thead><tr><th></th>{names}</tr><tr><th scope="col">Scene</th>{heads}</tr></thead>
<tbody>{"".join(rows)}{_row("Mean", report["mean"])}</tbody></table></div></section>"""


def _row(title: str, numbers: Mapping) -> str:
    cells = []
    for key in METRICS:
        stock, moe = numbers["stock"][key], numbers["moe"][key]
        judgement = judge(key, stock, moe)
        cells.append(f'<td class="{"best" if judgement == "worse" else ""}">{METRICS[key].text(stock)}</td>')
        cells.append(f'<td class="moe {"best" if judgement == "better" else ""}">{METRICS[key].text(moe)}</td>')
    return f'<tr><th scope="row">{escape(title)}</th>{"".join(cells)}</tr>'


def _scene(numbers: Mapping, scene: PageScene) -> str:
    pictures = {name: data_uri(file) for name, file in scene.pictures.items()}
    given = (
        f"{numbers['views']} views of {_size(numbers['size'])}, given to the model at {_size(numbers['model_size'])}"
    )
    downloads = " · ".join(f'<a href="{escape(path)}">{escape(what)}</a>' for what, path in scene.downloads.items())
    return f"""<section class="card scene">
<header><h2>{escape(scene.title)}</h2><p>{escape(scene.about)}; {given}</p></header>
<div class="grid">
{_compare(scene, pictures)}
<div class="side">
{figure(pictures["input"], f"Input, {scene.title}", "<b>Input</b>, the first view")}
{figure(pictures["depth_truth"], f"True depth, {scene.title}", "<b>True depth</b>, same colours; grey where unknown")}
</div>
{_gate_figure(scene, pictures)}
{_entropy_figure(scene, pictures)}
{_detail_figure(scene, pictures)}
</div>
<p class="words">{escape(_scene_words(numbers))}</p>
<p class="files">In this page’s folder: {downloads}</p>
</section>"""


def _scene_words(numbers: Mapping) -> str:
    stock, moe, floor = numbers["stock"], numbers["moe"], numbers["truth_flying_rate"]
    words = compare_words(stock, moe)
    if stock["si_f1"] is not None and moe["si_f1"] is not None and max(stock["si_f1"], moe["si_f1"]) < EDGES:
        words += " Neither head’s depth edges are where the true ones are, so flying points say little here."
    if floor:
        words += (
            f" A perfect prediction would count {floor:.1%} flying points, where a window holds more than two surfaces."
        )
    return words


def _compare(scene: PageScene, pictures: Mapping[str, str]) -> str:
    buttons = "".join(
        f'<button type="button" value="{layer}" aria-pressed="{str(layer == "depth").lower()}">{label}</button>'
        for layer, label in _LAYERS.items()
    )
    images = "\n".join(
        f'<img class="{head} {layer}" src="{pictures[f"{layer}_{head}"]}" alt="{label}, {spoken} head">'
        for layer, label in _LAYERS.items()
        for head, spoken in (("moe", "MoE"), ("stock", "stock"))
    )
    _, height, width = scene.weights.shape
    label = f"Divider on {escape(scene.title)}: the stock head to its left, the MoE head to its right"
    return f"""<figure class="compare">
<div class="layers" role="group" aria-label="What to show">{buttons}</div>
<div class="stage" data-layer="depth" style="aspect-ratio: {width} / {height}">
{images}
<input type="range" min="0" max="100" step="1" value="50" aria-label="{label}">
<div class="handle" aria-hidden="true"></div><span class="tag stock">Stock</span><span class="tag moe">MoE</span></div>
{_legends(scene)}
</figure>"""


def _legends(scene: PageScene) -> str:
    near, far = scene.depth_range
    legends = {
        "depth": f"<span>{near:.1f} m</span>{ramp('depth')}<span>{far:.1f} m, logarithmic</span>",
        "error": f"<span>too near, ×{1 / ERROR_LIMIT:.2f} or less</span>{ramp('error')}"
        f"<span>too far, ×{ERROR_LIMIT:.2f} or more</span>",
        "flying": f"<span>At true boundaries, the prediction</span>{swatch(FLYING, 'flies between two surfaces')}"
        f"{swatch(LANDED, 'does not')}",
        "points": "<span>The predicted points, seen from the left and above. What hangs between surfaces flies.</span>",
    }
    return "".join(
        f'<figcaption class="legend {"shown" if layer == "depth" else ""}" data-layer="{layer}">{legend}</figcaption>'
        for layer, legend in legends.items()
    )


def _gate_figure(scene: PageScene, pictures: Mapping[str, str]) -> str:
    shares = scene.weights.mean(axis=(1, 2))
    colors = expert_colors(len(shares))
    swatches = "".join(swatch(colors[k], f"{k + 1}: {share:.0%}") for k, share in enumerate(shares))
    caption = f"<b>Gate</b>: each expert’s colour, mixed by its weight. {gate_words(scene.weights)}"
    legend = f'<div class="legend always">{swatches}</div>'
    return figure(pictures["gate"], f"Gate, {scene.title}", caption + legend, "third")


def _entropy_figure(scene: PageScene, pictures: Mapping[str, str]) -> str:
    caption = f"<b>Entropy</b> of the gate: how undecided it is. {entropy_words(scene.weights)}"
    ends = f"<span>sure</span>{ramp('entropy')}<span>undecided (log {len(scene.weights)})</span>"
    legend = f'<div class="legend always">{ends}</div>'
    return figure(pictures["entropy"], f"Entropy, {scene.title}", caption + legend, "third")


def _detail_figure(scene: PageScene, pictures: Mapping[str, str]) -> str:
    crops = "".join(
        f'<div><img src="{pictures[f"detail_{name}"]}" alt="Detail, {label}"><span class="tag">{label}</span></div>'
        for name, label in (("input", "input"), ("truth", "truth"), ("stock", "stock"), ("moe", "MoE"))
    )
    caption = "<b>Detail</b>, where true boundaries are densest, whatever was predicted there."
    return f'<figure class="third detail"><div class="crops">{crops}</div><figcaption>{caption}</figcaption></figure>'


def _size(size: Sequence[int]) -> str:
    """(height, width) as people say it."""
    return f"{size[1]}×{size[0]}"


def _footer(report: Mapping) -> str:
    meanings = "".join(f"<dt>{metric.name}</dt><dd>{escape(metric.meaning)}</dd>" for metric in METRICS.values())
    timing = report["timing"]
    return f"""<footer>
<h2>How to read this</h2>
<dl>{meanings}</dl>
<p>The backbone, the camera head and all of the depth head before its last block are the same weights in both. With
{report["parameters"] / 1e6:.1f} million parameters it is a model to see the head’s effect on, not one that reconstructs
well. Only the first view of each scene is shown and judged, its depth aligned by one number, the ratio of the medians.
In bold: the better of two values that differ by more than {SAME:.0%} and {SAME_AT_ZERO}.</p>
<p>Time: {timing["views"]} views of {_size(timing["size"])} through the whole network, {escape(report["device"])},
medians of {timing["rounds"]} interleaved rounds; in brackets the 95% interval of the overhead.</p>
<p>Point clouds are in metres. GLB files have glTF’s axes (y up, looking along −z), PLY files the first camera’s (x
right, y down, z forward).</p>
</footer>"""
