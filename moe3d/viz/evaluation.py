"""An evaluation's report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from PIL import Image

from moe3d.evaluation import FrameView, View
from moe3d.evaluation.judge import EDGE_RATIO
from moe3d.viz.colors import apply_colormap, expert_colors
from moe3d.viz.comparison import encode_picture
from moe3d.viz.html import css, data_uri, document, figure, ramp, swatch
from moe3d.viz.metrics import METRICS, best
from moe3d.viz.pictures import ERROR_LIMIT, depth_picture, depth_range, error_picture

SHOWN = 12  # frames on a page, so that it stays a few megabytes
WIDEST = 640  # pixels of a picture
FAR = 0.1  # metres at which a distance's colour is full
HIT, MISSED, FALSE = (np.array(color, dtype=np.uint8) for color in ([70, 190, 235], [250, 200, 60], [255, 45, 110]))

HEADLINES = {
    "mv": ("acc_mean", "comp_mean", "nc_mean"),
    "depth": ("abs_rel", "delta1", "rmse"),
    "boundary": ("si_f1", "flying_rate", "dbe_acc"),
}
TITLES = {"mv": "Multi-view reconstruction", "depth": "Depth", "boundary": "Depth boundaries"}
ERRORS = {
    "mv": "distances from predicted points to the nearest true one",
    "depth": "relative depth errors",
    "boundary": "relative depth errors within 5 pixels of a true boundary",
}

# arXiv 2601.05208, its tables. It does not say how it finds the edges of its F1, so that is beside each of ours.
_PAPER_F1 = {"VGGT": 0.232, "MoE3D": 0.319}
PAPER: dict[tuple[str, str], dict[str, dict[str, float]]] = {
    ("mv", "nrgbd"): {
        "DUSt3R": {"acc_mean": 0.144, "comp_mean": 0.245, "nc_mean": 0.701},
        "VGGT": {"acc_mean": 0.073, "comp_mean": 0.052, "nc_mean": 0.769},
        "MoE3D": {"acc_mean": 0.055, "comp_mean": 0.035, "nc_mean": 0.800},
    },
    ("depth", "kitti"): {"VGGT": {"abs_rel": 0.076}, "MoE3D": {"abs_rel": 0.064}},
    ("boundary", "nyuv2"): {name: {"si_f1": f1, "sobel_f1": f1} for name, f1 in _PAPER_F1.items()},
}
_PAPER_NOTES = {
    "mv": "The paper does not say which frames it uses or how it aligns.",
    "depth": "The paper does not say how it aligns.",
    "boundary": "The paper reports one boundary F1 without saying how it finds edges: it stands beside both of ours.",
}


@dataclass(frozen=True)
class GalleryFrame:
    """A frame's pictures, as PNG and JPEG files: "input", "truth", and of each system "depth", "error" and "edges"."""

    sequence: str
    frame: str
    near_far: tuple[float, float]
    """Metres at the two ends of the depths' colours."""
    pictures: dict[str, bytes]
    systems: list[tuple[str, dict, dict[str, bytes]]]
    """(name, metrics, pictures)."""


@dataclass
class Gallery:
    """Keeps the worst frames' pictures of a run that may be long."""

    size: int = SHOWN
    _kept: list[tuple[float, int, GalleryFrame]] = field(default_factory=list)
    _offered: int = 0

    def offer(self, badness: float | None, view: Callable[[], FrameView]) -> None:
        """Keep this frame if it is among the worst so far; an undefined one is the least bad."""
        self._offered += 1
        # Of equally bad ones the first is kept.
        rank = -math.inf if badness is None else badness, -self._offered
        if len(self._kept) < self.size:
            heapq.heappush(self._kept, (*rank, draw_frame(view())))
        elif self._kept and rank > self._kept[0][:2]:
            heapq.heapreplace(self._kept, (*rank, draw_frame(view())))

    def frames(self) -> list[GalleryFrame]:
        """The worst one first."""
        return [frame for *_, frame in sorted(self._kept, key=lambda kept: kept[:2], reverse=True)]


def draw_frame(view: FrameView) -> GalleryFrame:
    """All pictures of a frame."""
    image = np.rint(np.clip(view.image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    truth = view.systems[0][2].truth
    near_far = depth_range(truth, np.isfinite(truth))
    return GalleryFrame(
        sequence=view.sequence,
        frame=view.frame,
        near_far=near_far,
        pictures={"input": _encode("input", image), "truth": _encode("truth", depth_picture(truth, *near_far))},
        systems=[(name, metrics, _draw(one, image, near_far)) for name, metrics, one in view.systems],
    )


def edges_picture(image: np.ndarray, edges: np.ndarray, true_edges: np.ndarray) -> np.ndarray:
    """Edges on a darkened grey image: ``HIT`` where both stand, ``MISSED`` where only true ones do, else ``FALSE``.

    Args:
        image: [H', W', 3] uint8, of any size.
        edges, true_edges: [H, W] bool.
    """
    height, width = edges.shape
    grey = np.asarray(Image.fromarray(image).convert("L").resize((width, height), Image.Resampling.BILINEAR))
    picture = np.repeat(np.rint(grey * 0.55).astype(np.uint8)[..., None], 3, axis=2)
    picture[true_edges] = MISSED
    picture[edges] = FALSE
    picture[edges & true_edges] = HIT
    return picture


def distance_picture(distances: np.ndarray) -> np.ndarray:
    """Distances [H, W] in metres, full colour from ``FAR``; grey where not finite."""
    return apply_colormap(distances / FAR, "entropy")


def render_evaluation(report: Mapping, frames: Sequence[GalleryFrame]) -> str:
    """The page of a report of :func:`moe3d.evaluation.evaluate` that also has "versions" and "commit"."""
    protocol = report["protocol"]
    title = f"{TITLES[protocol['task']]} on {protocol['dataset']}"
    parts = [
        _header(report, title),
        "<main>",
        _means(report),
        _sequences(report),
        _histogram(report),
        *(_frame(frame, report) for frame in frames),
        "</main>",
        _footer(report, len(frames)),
    ]
    return document(f"{title}: moe3d eval", "\n".join(parts))


def _draw(view: View, image: np.ndarray, near_far: tuple[float, float]) -> dict[str, bytes]:
    if view.distances is None:
        known = np.isfinite(view.depth) & np.isfinite(view.truth) & (view.depth > 0)
        error = error_picture(np.where(known, view.depth, 1), np.where(known, view.truth, 1), known)
    else:
        error = distance_picture(view.distances)
    pictures = {
        "depth": depth_picture(view.depth, *near_far),
        "error": error,
        "edges": edges_picture(image, view.edges, view.true_edges),
    }
    return {name: _encode(name, picture) for name, picture in pictures.items()}


def _encode(name: str, picture: np.ndarray) -> bytes:
    step = -(-picture.shape[1] // WIDEST)
    return encode_picture(name, np.ascontiguousarray(picture[::step, ::step]))[1]


def _systems(report: Mapping) -> dict[str, Mapping]:
    """Name -> a system's figures, the report's own first."""
    return {report["system"]: report, **report["compare"]}


def _header(report: Mapping, title: str) -> str:
    protocol, systems = report["protocol"], _systems(report)
    count = sum(map(len, protocol["frames"].values()))
    judged = f"{count:,} frame{'s' if count != 1 else ''} of {len(protocol['frames']):,} sequence"
    judged += "s" if len(protocol["frames"]) != 1 else ""
    descriptions = "; ".join(
        f"<strong>{escape(name)}</strong>: {escape(str(protocol['systems'][name]))}" for name in systems
    )
    return f"""<header>
<p class="brand">moe3d<span>{escape(report["versions"]["moe3d"])} · eval {escape(protocol["task"])}</span></p>
<h1>{escape(title)}</h1>
<p class="lead">{judged}. {descriptions}.</p>
</header>"""


def _means(report: Mapping) -> str:
    systems, protocol = _systems(report), report["protocol"]
    paper = PAPER.get((protocol["task"], protocol["dataset"]), {})
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in systems)
    heads += "".join(f'<th scope="col" class="paper">{name}, paper</th>' for name in paper)
    keys = [key for key in METRICS if key in report["mean"]]
    rows = "".join(_mean_row(key, [system["mean"][key] for system in systems.values()], paper) for key in keys)
    note = ""
    if paper:
        note = (
            f'<p class="note">In italics: the paper’s own figures (arXiv 2601.05208). {_PAPER_NOTES[protocol["task"]]}'
        )
        note += " They were not measured here.</p>"
    interval = report["mean"].get("flying_rate_ci")
    if interval:
        low, high = interval
        note += f'<p class="note">Flying points of {escape(report["system"])}: 95% interval {low:.1%} to {high:.1%}, '
        note += "by bootstrap over scenes.</p>"
    return f"""<section class="card"><div class="scroll"><table class="metrics">
<caption>Mean</caption>
<thead><tr><th scope="col">Metric</th>{heads}</tr></thead>
<tbody>{rows}</tbody></table></div>{note}</section>"""


def _mean_row(key: str, values: list[float | None], paper: Mapping[str, Mapping[str, float]]) -> str:
    metric = METRICS[key]
    arrow = {True: " ↑", False: " ↓", None: ""}[metric.higher_is_better]
    published = "".join(f'<td class="paper">{_paper_text(key, figures)}</td>' for figures in paper.values())
    return f'<tr><th scope="row">{metric.name}{arrow}</th>{_cells(key, values)}{published}</tr>'


def _paper_text(key: str, figures: Mapping[str, float]) -> str:
    return METRICS[key].text(figures[key]) if key in figures else ""


def _cells(key: str, values: list[float | None]) -> str:
    return "".join(
        f'<td class="{"best" if wins else ""}">{METRICS[key].text(value)}</td>'
        for value, wins in zip(values, best(key, values), strict=True)
    )


def _sequences(report: Mapping) -> str:
    """One row per sequence, where there are several."""
    systems = _systems(report)
    if len(report["sequences"]) < 2:
        return ""
    keys = HEADLINES[report["protocol"]["task"]]
    groups = "".join(f'<th colspan="{len(systems)}" scope="colgroup">{METRICS[key].name}</th>' for key in keys)
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in systems) * len(keys)
    rows = "".join(
        f'<tr><th scope="row">{escape(same[0]["name"])}</th>'
        + "".join(_cells(key, [entry[key] for entry in same]) for key in keys)
        + "</tr>"
        for same in zip(*(system["sequences"] for system in systems.values()), strict=True)
    )
    return f"""<section class="card"><div class="scroll"><table class="metrics">
<caption>Sequences</caption>
<thead><tr><th></th>{groups}</tr><tr><th scope="col">Sequence</th>{heads}</tr></thead>
<tbody>{rows}</tbody></table></div></section>"""


def _histogram(report: Mapping) -> str:
    """The errors' distribution on a logarithmic axis, one line per system."""
    systems, task = _systems(report), report["protocol"]["task"]
    colors = expert_colors(max(len(systems), 2))
    lines, legend, highest = [], [], 0.0
    shares = {}
    for name, system in systems.items():
        counts = np.array(system["error_histogram"]["counts"], dtype=float)
        shares[name] = counts / max(counts.sum(), 1)
        highest = max(highest, float(shares[name].max()))
    width, height, top, bottom, left = 720, 230, 10, 36, 66
    for color, (name, share) in zip(colors, shares.items(), strict=False):
        edges = np.linspace(left, width - 10, len(share) + 1)
        levels = top + (height - top - bottom) * (1 - share / (highest or 1))
        path = f"M{edges[0]:.1f} {height - bottom}" + "".join(
            f"V{level:.1f}H{edge:.1f}" for level, edge in zip(levels, edges[1:], strict=True)
        )
        lines.append(f'<path d="{path}V{height - bottom}" fill="none" stroke="{css(color)}" stroke-width="2"/>')
        legend.append(swatch(color, escape(name)))
    unit = ("1 mm", "1 cm", "10 cm", "1 m") if task == "mv" else ("0.1%", "1%", "10%", "100%")
    ticks = "".join(
        f'<text x="{x:.0f}" y="{height - 8}" text-anchor="{anchor}">{label}</text>'
        for x, label, anchor in zip(
            np.linspace(left, width - 10, 4), unit, ("start", "middle", "middle", "end"), strict=True
        )
    )
    return f"""<section class="card"><h2>Errors</h2>
<div class="legend always">{"".join(legend)}</div>
<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="Histogram of {ERRORS[task]}">
<line x1="{left}" x2="{width - 10}" y1="{height - bottom}" y2="{height - bottom}" stroke="currentColor"/>
{"".join(lines)}{ticks}
<text x="{left - 6}" y="{top + 12}" text-anchor="end">{highest:.0%}</text>
<text x="{left - 6}" y="{height - bottom}" text-anchor="end">0</text></svg>
<p class="note">The share of all {ERRORS[task]} that falls in each of {len(next(iter(shares.values())))} equal steps of
a logarithmic scale; the outermost ones hold the rest.</p></section>"""


def _frame(frame: GalleryFrame, report: Mapping) -> str:
    name = f"{frame.sequence} / {frame.frame}"
    near, far = frame.near_far
    depths = f"<span>{near:.1f} m</span>{ramp('depth')}<span>{far:.1f} m</span>"
    given = [
        figure(data_uri(frame.pictures["input"]), f"Input, {name}", "<b>Input</b>"),
        figure(data_uri(frame.pictures["truth"]), f"True depth, {name}", f"<b>True depth</b>{_legend(depths)}"),
    ]
    rows = [
        f'<div class="system"><h3>{escape(system)} <small>{_words(metrics)}</small></h3><div class="row">'
        + "".join(_figures(pictures, f"{system}, {name}", report["protocol"]["task"]))
        + "</div></div>"
        for system, metrics, pictures in frame.systems
    ]
    return f"""<section class="card scene"><header><h2>{escape(name)}</h2></header>
<div class="row given">{"".join(given)}</div>
{"".join(rows)}</section>"""


def _figures(pictures: Mapping[str, bytes], of: str, task: str) -> list[str]:
    if task == "mv":
        error = f"<span>0</span>{ramp('entropy')}<span>{100 * FAR:.0f} cm</span>"
        what = "Distance to the truth"
    else:
        error = f"<span>×{1 / ERROR_LIMIT:.2f}</span>{ramp('error')}<span>×{ERROR_LIMIT:.2f}</span>"
        what = "Error, predicted / true"
    edges = swatch(HIT, "hit") + swatch(MISSED, "missed") + swatch(FALSE, "false")
    return [
        figure(data_uri(pictures["depth"]), f"Prediction, {of}", "<b>Prediction</b>, colours of the truth"),
        figure(data_uri(pictures["error"]), f"Error, {of}", f"<b>{what}</b>{_legend(error)}"),
        figure(data_uri(pictures["edges"]), f"Edges, {of}", f"<b>Edges</b>{_legend(edges)}"),
    ]


def _legend(content: str) -> str:
    return f'<div class="legend always">{content}</div>'


def _words(metrics: Mapping) -> str:
    shown = [key for keys in HEADLINES.values() for key in keys if key in metrics]
    return " · ".join(f"{METRICS[key].name} {METRICS[key].text(metrics[key])}" for key in shown)


def _footer(report: Mapping, shown: int) -> str:
    protocol = report["protocol"]
    meanings = "".join(
        f"<dt>{metric.name}</dt><dd>{escape(metric.meaning)}</dd>"
        for key, metric in METRICS.items()
        if key in report["mean"]
    )
    hidden = ("frames", "skipped", "flying_sweep", "systems")
    choices = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape('none' if value is None else str(value))}</dd>"
        for key, value in protocol.items()
        if key not in hidden
    )
    skipped = "".join(
        f"<li>{escape(' / '.join(filter(None, (entry['sequence'], entry['frame']))))}: {escape(entry['reason'])}</li>"
        for entry in protocol["skipped"][:SHOWN]
    )
    more = len(protocol["skipped"]) - SHOWN
    skipped += f"<li>and {more:,} more, in the JSON file</li>" if more > 0 else ""
    left_out = f"<h2>Left out</h2><ul>{skipped}</ul>" if skipped else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    commit = f" at {report['commit']}" if report["commit"] else ""
    return f"""<footer>
<h2>How to read this</h2>
<p>Shown are {"all frames" if shown == _count(protocol) else f"the {shown} worst frames"}, the worst one for
{escape(report["system"])} first. In bold: the best of the systems judged here. Edges are where neighbouring depths
differ by more than {EDGE_RATIO:g} times; grey is what is not known.</p>
<dl>{meanings}</dl>
<h2>Protocol</h2>
<dl>{choices}</dl>
{left_out}
<p>{escape(versions)}{escape(commit)}</p>
</footer>"""


def _count(protocol: Mapping) -> int:
    return sum(map(len, protocol["frames"].values()))
