"""MoE3D's effect in miniature: ``python -m moe3d.training.study --out DIR``.

Heads that differ in one thing each are trained from one pretrained network's features, on the same scenes, in the same
number of steps, each at the best of the same learning rates by validation, and judged on held-out synthetic scenes and
on Motorcycle. What is finished stays: a line per variant and seed in results.jsonl. Writes table.md and figure.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d.losses import CONSTANT_ZERO, Schedule
from moe3d.models.load import load_model
from moe3d.nn import MoEHead
from moe3d.ops.types import MoEOutput
from moe3d.position import position_map
from moe3d.sharpen import sharpen
from moe3d.training.features import CachedScenes, FeatureNetwork, cache_scenes, front_features, read_batches
from moe3d.training.heads import HeadBudget, HeadTrainer, MakeHead, best_rate, mixture_head
from moe3d.training.recipes import BEST, PAPER, Recipe
from moe3d.training.scenes import Batch, LiveScenes, open_corpus
from moe3d.training.trainer import DivergedError
from moe3d.training.validate import METRICS, first_frame, first_truth, gate_summary, judge, motorcycle, summarise

TEMPERATURES = (0.125, 0.25, 0.5, 1.0)  # of the tempered decode; the one of the best SI-F1 on validation scenes is used
EDGE_TOLERANCE = 0.03
SNAP_RATIO = 1.2
SEEDS = {"train": 0, "val": 1, "test": 2}  # of the draw of scenes
BASELINE = ("single-l2", "mean")
SINGLE_DECODES = ("mean", "snapped", "sharpened", "filtered", "edge-oracle")
MIXTURE_DECODES = (
    "mean", "argmax", "tempered", "switch", "snapped", "sharpened", "filtered", "edge-oracle", "oracle", "image-oracle",
)  # fmt: skip
_MODES = {"argmax": "argmax", "switch": "switch", "snapped": "switch", "filtered": "switch"}  # else: mean
_MARKERS = dict(zip(MIXTURE_DECODES, "osD^vp>P*X", strict=True))


@torch.no_grad()
def wide_head(block: nn.Sequential, recipe: Recipe, seed: int) -> nn.Module:
    """One expert with as many parameters as the paper's mixture, so that capacity is told apart from the mixture.

    It begins as the pretrained block: the channels that are added start with weight zero in the last layer.
    """
    narrow = MoEHead.from_conv_block(block, 1)
    mixture = MoEHead.from_conv_block(block, PAPER.num_experts, PAPER.gate_hidden)
    per_channel = 9 * narrow.in_channels + 1 + narrow.out_channels
    hidden = round((_count(mixture) - narrow.out_channels) / per_channel)
    wide = MoEHead(narrow.in_channels, narrow.out_channels, 1, expert_hidden=hidden, seed=seed)
    wide.expert_w2.zero_()
    for name in ("expert_w1", "expert_b1"):
        getattr(wide, name)[:, : narrow.expert_hidden] = getattr(narrow, name)
    wide.expert_w2[..., : narrow.expert_hidden] = narrow.expert_w2
    wide.expert_b2.copy_(narrow.expert_b2)
    return wide


class ImageBranchHead(nn.Module):
    """A single head that sees the image at full resolution: what the gate's image branch gives without a mixture.

    A branch of two 3x3 convolutions on the image joins the block's hidden channels, and a 3x3 convolution of both
    corrects the log depth, by nothing at first.
    """

    def __init__(self, block: nn.Sequential, recipe: Recipe, seed: int) -> None:
        super().__init__()
        first, last = cast(nn.Conv2d, block[0]), cast(nn.Conv2d, block[2])
        hidden, channels = first.out_channels, 16
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(first.in_channels, hidden, 3, padding=1)
            self.last = nn.Conv2d(hidden, 1, 1)
            self.image = nn.Sequential(
                nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()
            )
            self.merge = nn.Conv2d(hidden + channels, hidden, 3, padding=1)
            self.correction = nn.Conv2d(hidden, 1, 1)
        self.first.load_state_dict(first.state_dict())
        self.last.load_state_dict({"weight": last.weight[:1], "bias": cast(Tensor, last.bias)[:1]})
        for parameter in self.correction.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, size: tuple[int, int], pos: tuple[Tensor, Tensor], image: Tensor) -> MoEOutput:
        """Called and answering as :class:`~moe3d.nn.MoEHead`."""
        features = F.interpolate(x, size, mode="bilinear", align_corners=True) + position_map(*pos)
        hidden = torch.relu(self.first(features))
        both = torch.cat([hidden, self.image(image - 0.5)], dim=1)
        log_depth = self.last(hidden) + self.correction(torch.relu(self.merge(both)))
        return MoEOutput(log_depth.exp(), None, torch.zeros_like(log_depth[:, 0]), None, None)


@dataclass(frozen=True)
class Variant:
    """One row, or one per decode, of the table."""

    about: str
    recipe: Recipe
    head: MakeHead = mixture_head
    every_seed: bool = True
    """False: one seed will do."""

    @property
    def decodes(self) -> tuple[str, ...]:
        """The ways in which its prediction is read."""
        return MIXTURE_DECODES if self.recipe.num_experts > 1 else SINGLE_DECODES


_SINGLE = replace(PAPER, num_experts=1, entropy_weight=CONSTANT_ZERO, temperature=Schedule(1.0))
_NLL = Recipe(loss="nll-laplace", num_experts=2, mode="switch")
VARIANTS = {
    "single-l2": Variant("single head, L2", _SINGLE),
    "single-l1": Variant("single head, L1", replace(_SINGLE, loss="l1")),
    "wide-l2": Variant("single head widened to the MoE's parameters, L2", _SINGLE, wide_head),
    "single-log-l1": Variant("single head, L1 in log depth", replace(_SINGLE, loss="log-l1")),
    "single-log-l1-image": Variant(
        "single head with an image branch, L1 in log depth", replace(_SINGLE, loss="log-l1"), ImageBranchHead
    ),
    "moe-l2": Variant("MoE without entropy loss", replace(PAPER, entropy_weight=CONSTANT_ZERO)),
    "paper": Variant("MoE3D as published: L2 and entropy", PAPER),
    "nll-laplace": Variant("Laplace likelihood in log depth", _NLL),
    "nll-gaussian": Variant("Gaussian likelihood in log depth", replace(_NLL, loss="nll-gaussian")),
    "nll-laplace-image": Variant(
        "Laplace likelihood, image branch in the gate", replace(_NLL, image_gate=True), every_seed=False
    ),
    "nll-laplace-guided": Variant(
        "the same, the branch guided by the features", replace(_NLL, image_gate="guided"), every_seed=False
    ),
    "best": Variant("recipe best: guided, at the local level, experts apart, expected cost, level", BEST),
    "best-absolute": Variant(
        "recipe best, not at the local level", replace(BEST, window=0, scale=0.1, level_weight=0.0), every_seed=False
    ),
    "best-no-level": Variant("recipe best without the level's loss", replace(BEST, level_weight=0.0), every_seed=False),
    "best-together": Variant("recipe best, experts not apart", replace(BEST, spread=0.0), every_seed=False),
    "paper-k2": Variant("as published, K = 2", replace(PAPER, num_experts=2), every_seed=False),
    "paper-k8": Variant("as published, K = 8", replace(PAPER, num_experts=8), every_seed=False),
    "paper-noise-0.03": Variant("as published, noise .03", replace(PAPER, init_noise=0.03), every_seed=False),
    "paper-noise-1": Variant("as published, noise 1", replace(PAPER, init_noise=1.0), every_seed=False),
    "paper-gate-32": Variant("as published, gate 32", replace(PAPER, gate_hidden=32), every_seed=False),
    "nll-depth": Variant("Laplace likelihood in depth", replace(_NLL, log_depth=False), every_seed=False),
    "nll-learned-scale": Variant(
        "Laplace likelihood, learned scale", replace(_NLL, learn_scale=True), every_seed=False
    ),
    "best-k4": Variant("recipe best, K = 4", replace(BEST, num_experts=4), every_seed=False),
}


@dataclass(frozen=True)
class StudyOptions:
    """The same for every variant."""

    model: str = "mini"
    size: tuple[int, int] = (98, 126)
    budget: HeadBudget = field(default_factory=HeadBudget)
    seeds: int = 3
    train_scenes: int = 1200
    validation_scenes: int = 24
    test_scenes: int = 64


@dataclass(frozen=True)
class Held:
    """A held-out frame."""

    batch: Batch
    """As for :class:`~moe3d.training.features.FeatureNetwork`, one scene of one frame."""
    truth: np.ndarray
    """[H, W] metres, at its own size."""
    valid: np.ndarray

    def on_grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Truth and validity at the prediction's size, picked."""
        size = self.batch["images"].shape[-2:]
        grids = (torch.from_numpy(m)[None, None].float() for m in (self.truth, self.valid))
        truth, valid = (F.interpolate(grid, size, mode="nearest-exact")[0, 0].numpy() for grid in grids)
        return truth, valid > 0


@dataclass
class Study:
    """A folder with its cached features and results.

    Args:
        folder: to write to, or to go on in.
        options: must be those that the folder was begun with.

    Raises:
        ValueError: they are others.
    """

    folder: Path
    options: StudyOptions
    scenes: dict[str, CachedScenes] = field(init=False)
    held: dict[str, list[Held]] = field(init=False)
    trainer: HeadTrainer = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        model = load_model(self.options.model, "stock")
        counts = {
            "train": self.options.train_scenes,
            "val": self.options.validation_scenes,
            "test": self.options.test_scenes,
        }
        self.scenes = {part: self._cache(model, part, count) for part, count in counts.items()}
        self.held = {part: [_held(batch) for batch in read_batches(self.scenes[part])] for part in ("val", "test")}
        self.held["motorcycle"] = [_held_motorcycle(model)]
        block = cast(nn.Sequential, model.get_submodule("depth_head.scratch.output_conv2"))
        self.trainer = HeadTrainer(
            block, self.scenes["train"].folder, [held.batch for held in self.held["val"]], self.options.budget
        )

    def run(self, names: Sequence[str], report: Callable[[str], None] = print) -> list[dict[str, Any]]:
        """Train and judge what is missing; every result, also of earlier runs."""
        for name in names:
            seeds = range(self.options.seeds if VARIANTS[name].every_seed else 1)
            for seed in seeds:
                if not any((line["variant"], line["seed"]) == (name, seed) for line in self.results()):
                    line = self._result(name, seed)
                    with open(self._results, "a") as file:
                        file.write(json.dumps(line) + "\n")
                    report(f"{name}, seed {seed}: {_brief(line)}")
        return self.results()

    @property
    def _results(self) -> Path:
        return self.folder / "results.jsonl"

    def results(self) -> list[dict[str, Any]]:
        """The lines so far; one that a crash has cut short does not count."""
        if not self._results.exists():
            return []
        lines = []
        for text in self._results.read_text("utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        settings = _plain(self.options)
        other = next((line for line in lines if line["settings"] != settings), None)
        if other is not None:
            raise ValueError(f"{self._results} is of a study with other settings, {other['settings']}, not {settings}")
        return lines

    def _cache(self, model: nn.Module, part: str, count: int) -> CachedScenes:
        """Validation and test scenes are from the splits of these names."""
        corpus = open_corpus("synthetic", None, self.options.size, 1, validation=part == "val")
        if part == "test":
            corpus = replace(corpus, dataset=_test_split(self.options.size))
            corpus = replace(corpus, sequences=tuple(corpus.dataset.sequences))
        live = LiveScenes([corpus], (1, 1), SEEDS[part])
        cache_scenes(model, live, count, self.folder / "cache" / part)
        return CachedScenes(self.folder / "cache" / part, SEEDS[part], count)

    def _result(self, name: str, seed: int) -> dict[str, Any]:
        heading = {"variant": name, "seed": seed, "settings": _plain(self.options)}
        try:
            return heading | self._train_and_judge(name, seed)
        except DivergedError as error:
            return heading | {"diverged": str(error)}

    def _train_and_judge(self, name: str, seed: int) -> dict[str, Any]:
        variant = VARIANTS[name]
        rates = self._rates(name)
        rate = best_rate(rates)
        network = cast(FeatureNetwork, self.trainer.train(variant.head, variant.recipe, seed, rate).network)
        temperature = self._choose_temperature(network) if variant.recipe.num_experts > 1 else 1.0
        own = variant.recipe.decode_temperature
        temperatures = {"tempered": temperature, "sharpened": own, "edge-oracle": own}
        gap = variant.recipe.gap
        judged = {
            part: {d: _judge_all(network, d, self.held[part], temperatures, gap) for d in variant.decodes}
            for part in ("test", "motorcycle")
        }
        predicted = [_predict(network, one.batch) for one in self.held["test"]]
        return {
            "parameters": _count(network),
            "rate": rate,
            "rates": {f"{r:g}": round(loss, 5) if math.isfinite(loss) else None for r, loss in rates.items()},
            "temperature": temperature,
            "gate": gate_summary(predicted),
            **judged,
        }

    def _rates(self, name: str) -> dict[float, float]:
        """Validation loss by learning rate, after a short run with seed 0; an earlier result's where there is one."""
        for line in self.results():
            if line["variant"] == name and "rates" in line:
                return {float(rate): math.inf if loss is None else loss for rate, loss in line["rates"].items()}
        return self.trainer.sweep(VARIANTS[name].head, VARIANTS[name].recipe)

    def _choose_temperature(self, network: FeatureNetwork) -> float:
        def f1(temperature: float) -> float:
            judged = _judge_all(network, "tempered", self.held["val"], {"tempered": temperature}, PAPER.gap)
            return judged["si_f1"] or 0.0

        return max(TEMPERATURES, key=f1)


def _judge_all(
    network: FeatureNetwork, decode: str, held: Sequence[Held], temperatures: Mapping[str, float], gap: float
) -> dict[str, float | None]:
    edge_filter = EDGE_TOLERANCE if decode == "filtered" else None
    judged = []
    for one in held:
        depth = decode_depth(network, decode, one, temperatures, gap)
        judged.append(judge(depth, one.truth, one.valid, edge_filter))
    return summarise(judged)


def decode_depth(
    network: FeatureNetwork, decode: str, held: Held, temperatures: Mapping[str, float], gap: float
) -> np.ndarray:
    """Depth [h, w] of a held-out frame; a mixture's logits are also divided by the decode's temperature, if it has one.

    - mean, argmax, switch: the head's own modes; tempered: a mean at a temperature chosen on validation scenes.
    - sharpened: a mean at the recipe's temperature, then :func:`~moe3d.sharpen.sharpen`.
    - edge-oracle: the same, with a filter that sees the true depth in place of the image, and more of it
      (:func:`with_true_edges`): what remains has the wrong depth, not a soft edge.
    - snapped: what a single head predicts, or a mixture's switch, each pixel moved to the nearer one of the least and
      the largest depth around it (3x3) where these differ by more than a factor 1.2.
    - filtered: the same before snapping; the filter itself is a matter of judging.
    - oracle: each pixel's expert that is nearest to the truth. image-oracle: nearest to :func:`image_depth`.
    """
    tail = network.tail
    if decode in ("oracle", "image-oracle"):
        return _oracle(_predict(network, held.batch), held, by_image=decode == "image-oracle")
    if not isinstance(tail, MoEHead) or tail.num_experts == 1:
        depth = _predict(network, held.batch)["depth"].numpy()
    else:
        before = tail.mode, tail.temperature, tail.gap
        tail.mode, tail.gap = _MODES.get(decode, "mean"), gap
        tail.temperature *= temperatures.get(decode, 1.0)
        try:
            depth = _predict(network, held.batch)["depth"].numpy()
        finally:
            tail.mode, tail.temperature, tail.gap = before
    if decode == "sharpened":
        return sharpen(torch.from_numpy(depth)[None], held.batch["images"][:, 0])[0].numpy()
    if decode == "edge-oracle":
        return with_true_edges(depth, *held.on_grid())
    return snap(depth) if decode == "snapped" else depth


def snap(depth: np.ndarray) -> np.ndarray:
    """Post-processing that games the flying rate: see :func:`decode_depth`."""
    from scipy import ndimage

    least, largest = ndimage.minimum_filter(depth, 3), ndimage.maximum_filter(depth, 3)
    nearer = np.where(depth - least < largest - depth, least, largest)
    return np.where(largest > SNAP_RATIO * least, nearer, depth)


def image_depth(truth: np.ndarray, valid: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Truth whose edges are moved to the image's: what could be known of them by looking at it.

    Args:
        truth, valid: [H, W].
        image: [3, H, W] in [0, 1].
    """
    depth, known, colours = (torch.from_numpy(array)[None] for array in (truth, valid, image))
    return sharpen(depth, colours, 1, edge_ratio=1.0, valid=known)[0].numpy()


def with_true_edges(depth: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Depth [H, W] whose edges are moved to the truth's; where that is not valid it stays."""
    true_log = torch.from_numpy(np.log(np.where(valid, truth, 1.0))).float().expand(1, 3, -1, -1)
    predicted, known = (torch.from_numpy(array)[None] for array in (depth, valid))
    return sharpen(predicted, true_log, passes=8, window=9, edge_ratio=1.0, valid=known)[0].numpy()


def _oracle(predicted: Mapping[str, Tensor], held: Held, by_image: bool) -> np.ndarray:
    truth, valid = held.on_grid()
    if by_image:
        truth = image_depth(truth, valid, held.batch["images"][0, 0].numpy())
    depth, hypotheses = predicted["depth"].numpy(), predicted["hypotheses"].numpy()
    scale = np.median(truth[valid]) / np.median(depth[valid])
    error = np.abs(np.log(hypotheses * scale) - np.log(np.where(valid, truth, 1.0)))
    chosen = np.take_along_axis(hypotheses, error.argmin(0)[None], 0)[0]
    return np.where(valid, chosen, depth)


@torch.no_grad()
def _predict(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return first_frame(network(batch))


def _held(batch: Batch) -> Held:
    return Held(batch, *first_truth(batch))


@torch.no_grad()
def _held_motorcycle(model: nn.Module) -> Held:
    """The left photograph, by itself."""
    (sample,) = motorcycle()
    images = sample.images[None, :1]
    fused = front_features(model, images)[None].half().float()  # as it would come from the cache
    return Held({"images": images, "fused": fused}, sample.depth[0].numpy(), sample.valid[0].numpy())


def _test_split(size: tuple[int, int]):
    from moe3d.data.synthetic import SyntheticDataset

    dataset = SyntheticDataset(None, "test")
    dataset.size = size
    return dataset


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _plain(options: StudyOptions) -> dict[str, Any]:
    """What results of one study share; more seeds may be added later."""
    settings = json.loads(json.dumps(asdict(options)))
    del settings["seeds"]
    return settings


def _brief(line: Mapping[str, Any]) -> str:
    if "diverged" in line:
        return line["diverged"]
    decode = "tempered" if "tempered" in line["test"] else "mean"
    numbers = line["test"][decode]
    shown = ", ".join(f"{key} {numbers[key]}" for key in ("abs_rel", "si_f1", "flying_rate"))
    return f"rate {line['rate']:g}, {decode}: {shown}"


def table(lines: Sequence[Mapping[str, Any]], part: str) -> str:
    """Results as a Markdown table: mean and, over several seeds, standard deviation; ratios to the single L2 head."""
    header = ["head", "decode", "seeds", *METRICS, "F1 ratio", "fly ratio", "gate entropy", "usage"]
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    base = _by_row(lines, part).get(BASELINE)
    for (name, decode), group in _by_row(lines, part).items():
        ratios = ["-", "-"]
        if base is not None:
            ratios = [_ratio(group, base, part, decode, key) for key in ("si_f1", "flying_rate")]
        cells = [VARIANTS[name].about, decode, str(len(group))]
        cells += [_spread([line[part][decode][key] for line in group]) for key in METRICS]
        cells += [*ratios, _spread([line["gate"].get("entropy") for line in group]), _usage(group[0])]
        rows.append("| " + " | ".join(cells) + " |")
    for name, variant in VARIANTS.items():
        diverged = sum(line["variant"] == name and "diverged" in line for line in lines)
        if diverged:
            rows.append(
                "| " + " | ".join([variant.about, "diverges", str(diverged)] + ["-"] * (len(header) - 3)) + " |"
            )
    return "\n".join(rows)


def _by_row(lines: Sequence[Mapping[str, Any]], part: str) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name in VARIANTS:
        for line in lines:
            if line["variant"] == name:
                for decode in line.get(part, ()):
                    rows.setdefault((name, decode), []).append(line)
    return rows


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.4f}"
    return f"{mean} ± {statistics.stdev(known):.4f}" if len(known) > 1 else mean


def _ratio(group, base, part: str, decode: str, key: str) -> str:
    here = [line[part][decode][key] for line in group]
    there = [line[part][BASELINE[1]][key] for line in base]
    if None in here or None in there or not statistics.fmean(there):
        return "-"
    return f"{statistics.fmean(here) / statistics.fmean(there):.2f}"


def _usage(line: Mapping[str, Any]) -> str:
    shares = [value for key, value in line["gate"].items() if key.startswith("chosen/")]
    return " ".join(f"{share:.2f}" for share in shares) or "-"


def figure(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """SI-F1 against flying-point rate on the test scenes, a point per head and decode, bars for the seeds' spread.

    Heads of which one seed will do are left to the table.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes = plt.subplots(figsize=(8, 6))[1]
    lines = [line for line in lines if "test" in line and VARIANTS[line["variant"]].every_seed]
    names = [name for name in VARIANTS if any(line["variant"] == name for line in lines)]
    colors = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    for (name, decode), group in _by_row(lines, "test").items():
        if decode == "filtered":  # drops points instead of moving them
            continue
        x, y = ([line["test"][decode][key] or 0.0 for line in group] for key in ("flying_rate", "si_f1"))
        axes.errorbar(
            statistics.fmean(x), statistics.fmean(y), xerr=np.std(x), yerr=np.std(y),
            marker=_MARKERS[decode], color=colors[name],
        )  # fmt: skip
    for name in names:
        axes.plot([], [], "o", color=colors[name], label=name)
    for decode, marker in _MARKERS.items():
        if decode != "filtered":
            axes.plot([], [], marker, color="grey", label=decode)
    axes.set(xlabel="flying-point rate (less is better)", ylabel="SI boundary F1 (more is better)")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes.figure.savefig(path, bbox_inches="tight")  # type: ignore[union-attr]
    plt.close(axes.figure)  # type: ignore[arg-type]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moe3d.training.study", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, or to go on in")
    parser.add_argument("--model", default=StudyOptions.model, help="mini, or the path of weights")
    parser.add_argument("--seeds", type=int, default=StudyOptions.seeds)
    parser.add_argument("--steps", type=int, default=HeadBudget.steps)
    parser.add_argument("--batch", type=int, default=HeadBudget.batch, help="scenes per step")
    parser.add_argument("--train-scenes", type=int, default=StudyOptions.train_scenes)
    parser.add_argument("--test-scenes", type=int, default=StudyOptions.test_scenes)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), metavar="NAME")
    args = parser.parse_args(argv)
    options = StudyOptions(
        model=args.model,
        budget=HeadBudget(steps=args.steps, batch=args.batch),
        seeds=args.seeds,
        train_scenes=args.train_scenes,
        test_scenes=args.test_scenes,
    )
    write_study(args.out, options, args.variants)


def write_study(folder: Path, options: StudyOptions, names: Sequence[str]) -> None:
    """Run what is missing, then write table.md and figure.svg of all there is."""
    lines = Study(folder, options).run(names)
    titles = {"test": f"{options.test_scenes} held-out synthetic scenes", "motorcycle": "Motorcycle"}
    text = "\n\n".join(f"## {title}\n\n{table(lines, part)}" for part, title in titles.items())
    (folder / "table.md").write_text(text + "\n", "utf-8")
    figure(lines, folder / "figure.svg")


if __name__ == "__main__":
    main()
