"""``moe3d eval``: what it writes, on what, and how it says what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moe3d.cli import main
from moe3d.cli import model as model_options
from moe3d.data import open_dataset
from moe3d.data.synthetic import SyntheticDataset
from moe3d.evaluation import ModelSystem, Predictions, Protocol, write_predictions
from moe3d.evaluation import evaluate as judge
from moe3d.models import load_mini
from support.evaluation import perfect

TASKS = ("mv", "depth", "boundary")
OPTION_VALUES = {
    "head": "y", "mode": "mean", "sharpen": "0", "backend": "cpu", "precision": "ieee", "device": "cpu",
    "dtype": "float32", "width": "28",
}  # fmt: skip
KEYS = {
    "mv": {"acc_mean", "acc_median", "comp_mean", "comp_median", "nc_mean", "nc_median", "nonfinite", "coverage"},
    "depth": {"abs_rel", "delta1", "delta2", "delta3", "sq_rel", "rmse", "log_rmse", "nonfinite", "coverage"},
    "boundary": {
        "si_f1", "sobel_f1", "edge_iou", "edge_miou", "edge_iou_si", "edge_miou_si", "dbe_acc", "dbe_comp",
        "edge_chamfer", "flying_rate", "flying_rate_ci", "abs_rel_boundary", "delta1_boundary", "nonfinite", "coverage",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(SyntheticDataset, "size", (42, 56))
    monkeypatch.setattr(model_options, "input_width", lambda model: 56)


@pytest.fixture(scope="module")
def predictions(tmp_path_factory):
    """Folders of predictions of the first synthetic scenes: perfect ones, and blurred ones."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("perfect", "blurred")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SyntheticDataset, "size", (42, 56))
        dataset = open_dataset("synthetic")
        for sequence in list(dataset.sequences)[:2]:
            exact = perfect(dataset.load(sequence, dataset.sequences[sequence]))
            exact.depth[exact.depth == 0] = np.nan
            write_predictions(folders["perfect"], sequence, exact)
            blurred = (exact.depth + np.roll(exact.depth, 1, axis=1) + np.roll(exact.depth, 1, axis=2)) / 3
            write_predictions(folders["blurred"], sequence, Predictions(**{**vars(exact), "depth": blurred}))
    return folders


def evaluate(task, *arguments, dataset="synthetic"):
    return main(["eval", task, "--dataset", dataset, *map(str, arguments)])


@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_judged_beside_others(task, predictions, tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    compare = [f"--compare={name}={predictions['blurred']}" for name in ("blurred", "again")]
    assert evaluate(task, "--predictions", predictions["perfect"], *compare, "--limit", 2, "--out", out) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["report.html", "report.json"]
    report = json.loads(out.read_text())
    assert report.keys() >= {"protocol", "sequences", "mean", "versions", "commit"}
    assert report["mean"].keys() == KEYS[task]
    assert report["protocol"]["systems"] == {
        "predictions": f"predictions in {predictions['perfect']}",
        "blurred": f"predictions in {predictions['blurred']}",
        "again": f"predictions in {predictions['blurred']}",
    }
    assert report["compare"]["again"] == report["compare"]["blurred"]
    better, worse = report["mean"], report["compare"]["blurred"]["mean"]
    key = {"mv": "acc_mean", "depth": "abs_rel", "boundary": "flying_rate"}[task]
    assert better[key] < worse[key]
    if task != "boundary":
        assert better[key] == pytest.approx(0, abs=1e-6)
    printed = capsys.readouterr().out
    assert "predictions" in printed and key in printed and str(out) in printed
    page = out.with_suffix(".html").read_text()
    assert "blurred" in page and page.count("data:image/") > 3


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_model_has_its_stock_head_beside_it(task, tmp_path):
    out = tmp_path / "report.json"
    assert evaluate(task, "--limit", 1, "--out", out) == 0
    report = json.loads(out.read_text())
    assert report["system"] == "moe" and list(report["compare"]) == ["stock"]
    how = "depth by mean, 4 passes of sharpening, backend auto, precision auto"
    assert report["protocol"]["systems"] == {"moe": f"mini, shipped MoE head, {how}", "stock": "mini, stock head"}
    assert report["mean"]["coverage"] == 1 and report["mean"] != report["compare"]["stock"]["mean"]
    assert set(report["versions"]) == {"moe3d", "python", "torch", "numpy", "scipy", "scikit-image"}


def test_the_stock_head_alone_on_a_real_image(tmp_path, capsys):
    assert evaluate("depth", "--head", "stock", "--align", "scale-shift", dataset="motorcycle") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stock"] and len(lines) == 1 + len(KEYS["depth"])
    assert list(tmp_path.iterdir()) == []


def test_a_model_runs_where_and_in_what_it_is_told_to(tmp_path, capsys):
    out, reports = tmp_path / "report.json", {}
    for dtype in ("auto", "bfloat16"):
        flags = ["--head", "stock", "--limit", 1, "--device", "cpu", "--dtype", dtype, "--out", out]
        assert evaluate("depth", *flags) == 0
        reports[dtype] = json.loads(out.read_text())
    assert [(r["protocol"]["device"], r["protocol"]["dtype"]) for r in reports.values()] == [
        ("cpu", "float32"),
        ("cpu", "bfloat16"),
    ]
    exact, rounded = (report["mean"]["abs_rel"] for report in reports.values())
    assert exact != rounded and exact == pytest.approx(rounded, rel=0.05)
    capsys.readouterr()
    assert evaluate("depth", "--device", "cuda:99") == 1
    assert "error: --device 'cuda:99' is not available here" in capsys.readouterr().err


def test_the_head_decodes_as_it_is_told_to(tmp_path):
    """Against what the model's own attributes give."""
    out = tmp_path / "report.json"
    flags = ["--mode", "argmax", "--sharpen", 0, "--backend", "reference", "--precision", "ieee", "--width", 84]
    assert evaluate("depth", *flags, "--limit", 1, "--per", "sequence", "--align", "none", "--out", out) == 0
    report = json.loads(out.read_text())
    assert report["protocol"]["width"] == 84
    how = "by argmax, 0 passes of sharpening, backend reference, precision ieee"
    assert report["protocol"]["systems"]["moe"] == f"mini, shipped MoE head, depth {how}"

    model = load_mini("moe")
    tail = model.depth_head.tail
    tail.mode, tail.sharpen, tail.backend, tail.precision = "argmax", 0, "reference", "ieee"
    dataset = open_dataset("synthetic")
    protocol = Protocol("depth", "synthetic", align="none", per="sequence", limit=1)
    expected = judge(dataset, [ModelSystem("moe", model, 84)], protocol)
    assert report["mean"]["abs_rel"] == pytest.approx(expected["mean"]["abs_rel"], rel=1e-6)


def test_the_protocol_is_what_was_asked_for(predictions, tmp_path):
    out = tmp_path / "report.json"
    flags = [
        "--align",
        "median-icp",
        "--sampling",
        "spann3r",
        "--points",
        "depth",
        "--max-depth",
        9,
        "--edge-filter",
        0.1,
    ]
    assert evaluate("mv", "--predictions", predictions["perfect"], *flags, "--limit", 1, "--out", out) == 0
    protocol = json.loads(out.read_text())["protocol"]
    expected = {
        "task": "mv", "dataset": "synthetic", "align": "median-icp", "sampling": "spann3r", "points": "depth",
        "max_depth": 9.0, "edge_filter": 0.1, "crop": "none", "limit": 1, "root": None,
        "frames": {"scene-000000": ["frame-0000"]},
    }  # fmt: skip
    assert protocol | expected == protocol and "device" not in protocol
    flags = ["--align", "scale-l1", "--per", "sequence", "--limit", 1]
    assert evaluate("depth", "--predictions", predictions["perfect"], *flags, "--out", out) == 0
    protocol = json.loads(out.read_text())["protocol"]
    assert protocol | {"align": "scale-l1", "per": "sequence", "views": "a sequence's frames together"} == protocol
    assert "sampling" not in protocol and len(protocol["frames"]["scene-000000"]) == 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval"], "TASK"),
        (["eval", "speed"], "invalid choice: 'speed'"),
        (["eval", "depth"], "--dataset"),
        (["eval", "mv", "--dataset", "motorcycle"], "invalid choice: 'motorcycle'"),
        (["eval", "depth", "--dataset", "no"], "invalid choice: 'no'"),
        (["eval", "depth", "--dataset", "synthetic", "--limit", "0"], "expected an integer of at least 1, got '0'"),
        (["eval", "depth", "--dataset", "synthetic", "--limit", "-1"], "--limit"),
        (["eval", "depth", "--dataset", "synthetic", "--edge-filter", "nan"], "expected a number above 0, got 'nan'"),
        (["eval", "depth", "--dataset", "synthetic", "--max-depth", "0"], "expected a number above 0, got '0'"),
        (["eval", "depth", "--dataset", "synthetic", "--align", "umeyama-icp"], "invalid choice"),
        (["eval", "mv", "--dataset", "synthetic", "--align", "median"], "invalid choice"),
        (["eval", "depth", "--dataset", "synthetic", "--compare", "folder"], "must be NAME=DIR, got 'folder'"),
        (["eval", "depth", "--dataset", "synthetic", "--compare", "moe=x"], "the name 'moe' is taken"),
        (["eval", "depth", "--dataset", "synthetic", "--compare", "a=x", "--compare", "a=y"], "the name 'a' is taken"),
        (["eval", "depth", "--dataset", "synthetic", "--predictions", "x", "--model", "mini"], "not allowed with"),
        *(
            (
                ["eval", "depth", "--dataset", "synthetic", "--predictions", "x", f"--{option}", value],
                f"argument --{option}: not allowed with argument --predictions",
            )
            for option, value in OPTION_VALUES.items()
        ),
        (["eval", "depth", "--dataset", "synthetic", "--out", "page.html"], "must name a JSON file, got 'page.html'"),
        (["eval", "depth", "--dataset", "synthetic", "--sampling", "all"], "unrecognized arguments: --sampling all"),
    ],
)
def test_wrong_usage(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def fails(capsys, *arguments, dataset="synthetic", task="depth"):
    assert evaluate(task, *arguments, dataset=dataset) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_what_is_missing_or_does_not_fit_is_one_sentence(predictions, tmp_path, capsys):
    none, out = tmp_path / "none", tmp_path / "report.json"
    assert "is not a folder" in fails(capsys, "--predictions", none)
    assert "is not a folder" in fails(capsys, "--predictions", predictions["perfect"], "--compare", f"a={none}")
    assert "sequence 'scene-000002'" in fails(
        capsys, "--predictions", predictions["perfect"], "--per", "sequence", "--limit", 3, "--out", out
    )
    assert "480x640, got 42x56" in fails(capsys, "--predictions", predictions["perfect"], "--crop", "eigen")
    assert "no points of a head" in fails(
        capsys, "--predictions", predictions["perfect"], "--points", "head", "--limit", 1, task="mv"
    )
    assert "takes no root" in fails(capsys, "--root", tmp_path)
    assert "needs a root" in fails(capsys, dataset="kitti")
    assert "model must be" in fails(capsys, "--model", "nothing")
    assert "must be a file, but is a folder" in fails(capsys, "--out", tmp_path)
    assert "must be a file, but is a device" in fails(capsys, "--out", "/dev/null")
    np.savez(tmp_path / "scene-000000.npz", depth=np.ones((1, 2, 2)))
    assert "the array 'frames' is missing" in fails(capsys, "--predictions", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene-000000.npz"]


def test_a_failed_run_leaves_the_earlier_report(predictions, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert evaluate("depth", "--predictions", predictions["perfect"], "--limit", 2, "--out", out) == 0
    before = out.read_text()
    fails(capsys, "--predictions", predictions["perfect"], "--per", "sequence", "--limit", 3, "--out", out)
    assert out.read_text() == before and len(list(tmp_path.iterdir())) == 2


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert evaluate("depth", "--predictions", tmp_path / "none", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err
