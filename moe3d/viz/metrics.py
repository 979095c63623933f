"""How metrics are called, written and read, on every page and in every table."""

from __future__ import annotations

from typing import NamedTuple

SAME, SAME_AT_ZERO = 0.01, 0.002
"""Two values are called about the same if they differ by no more than this fraction of the larger, or than this."""


class Metric(NamedTuple):
    """How a metric is called and read."""

    name: str
    higher_is_better: bool | None
    """None: it counts, and judges nothing."""
    form: str
    meaning: str

    def text(self, value: float | None) -> str:
        return "–" if value is None else format(value, self.form)


METRICS = {
    "acc_mean": Metric("Acc, mean", False, ".4f", "accuracy: metres from each predicted point to the nearest true one"),
    "acc_median": Metric("Acc, median", False, ".4f", "the same, the median over points"),
    "comp_mean": Metric(
        "Comp, mean", False, ".4f", "completeness: metres from each true point to the nearest predicted one"
    ),
    "comp_median": Metric("Comp, median", False, ".4f", "the same, the median over points"),
    "nc_mean": Metric(
        "NC, mean", True, ".3f", "normal consistency: |cosine| between normals of nearest points, both ways"
    ),
    "nc_median": Metric("NC, median", True, ".3f", "the same, the median over points"),
    "abs_rel": Metric(
        "AbsRel",
        False,
        ".3f",
        "mean of |predicted − true| / true depth, the prediction aligned first",
    ),
    "delta1": Metric(
        "δ1",
        True,
        ".3f",
        "fraction of pixels whose predicted depth, aligned likewise, is within a factor of 1.25 of the truth",
    ),
    "delta2": Metric("δ2", True, ".3f", "the same within 1.25²"),
    "delta3": Metric("δ3", True, ".3f", "the same within 1.25³"),
    "sq_rel": Metric("SqRel", False, ".3f", "mean of (predicted − true)² / true depth, in metres"),
    "rmse": Metric("RMSE", False, ".3f", "root of the mean squared error, in metres"),
    "log_rmse": Metric("logRMSE", False, ".3f", "the same of the depths’ natural logarithms"),
    "si_f1": Metric(
        "Boundary F1",
        True,
        ".3f",
        "do depth edges stand on the very pixels where true ones do: precision and recall in one number, over ten "
        "thresholds (Depth Pro’s protocol)",
    ),
    "sobel_f1": Metric("Boundary F1, Sobel", True, ".3f", "the same of Sobel edges steeper than 0.25 in metric depth"),
    "edge_iou": Metric("Edge IoU", True, ".3f", "overlap of the Sobel edges: intersection over union"),
    "edge_miou": Metric("Edge mIoU", True, ".3f", "mean of that and of the overlap of all other pixels"),
    "edge_iou_si": Metric("Edge IoU, ratio", True, ".3f", "overlap of edges where depth jumps by more than 1.25 times"),
    "edge_miou_si": Metric("Edge mIoU, ratio", True, ".3f", "mean of that and of the overlap of all other pixels"),
    "dbe_acc": Metric("DBE acc", False, ".2f", "iBims-1: pixels from predicted edges to true ones, of those within 10"),
    "dbe_comp": Metric(
        "DBE comp", False, ".2f", "iBims-1: pixels between either map’s edges and the other’s, at most 10"
    ),
    "edge_chamfer": Metric("Edge Chamfer", False, ".3f", "metres between the point clouds at depth edges, both ways"),
    "flying_rate": Metric(
        "Flying points",
        False,
        ".1%",
        "fraction of true boundary pixels whose prediction hangs between the near and the far surface, on neither",
    ),
    "abs_rel_boundary": Metric("AbsRel at boundaries", False, ".3f", "AbsRel within 5 pixels of a true boundary"),
    "delta1_boundary": Metric("δ1 at boundaries", True, ".3f", "δ1 within 5 pixels of a true boundary"),
    "coverage": Metric("Coverage", None, ".1%", "fraction of pixels with ground truth that were judged"),
    "nonfinite": Metric("Not finite", None, ",", "pixels with ground truth whose prediction is no positive number"),
}


def judge(key: str, before: float | None, after: float | None) -> str | None:
    """Whether ``after`` is "better", "worse" or "about the same"; None where nothing can be said."""
    if before is None or after is None:
        return None
    if abs(after - before) <= max(SAME * max(before, after), SAME_AT_ZERO):
        return "about the same"
    return "better" if (after > before) == METRICS[key].higher_is_better else "worse"


def best(key: str, values: list[float | None]) -> list[bool]:
    """Which of several values are the best one, or as good when written out; none where all are."""
    metric = METRICS[key]
    defined = [value for value in values if value is not None]
    if metric.higher_is_better is None or not defined:
        return [False] * len(values)
    winner = metric.text(max(defined) if metric.higher_is_better else min(defined))
    wins = [metric.text(value) == winner for value in values]
    return [False] * len(values) if all(wins) else wins
