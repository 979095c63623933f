"""An evaluation's page: what it says, what it shows, and that it needs nothing else."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from moe3d.evaluation import Predictions, Protocol, evaluate
from moe3d.viz.evaluation import (
    FALSE,
    HIT,
    MISSED,
    Gallery,
    distance_picture,
    edges_picture,
    render_evaluation,
)
from moe3d.viz.metrics import METRICS, best, judge
from support.evaluation import MemoryDataset, MemorySystem, perfect


def off(factor):
    def predict(sample):
        exact = perfect(sample)
        wrong = np.random.default_rng(0).uniform(1, factor, exact.depth.shape)
        return Predictions(**{**vars(exact), "depth": exact.depth * wrong})

    return predict


def make(task, dataset="synthetic", size=3, name="second <system>"):
    gallery = Gallery(size)
    systems = [MemorySystem("first", perfect), MemorySystem(name, off(1.5))]
    protocol = Protocol(task, dataset, align="umeyama-icp" if task == "mv" else "median")
    memory = MemoryDataset({"a": 3, "b <c>": 2}, invalid=[("a", "frame-1")])
    report = evaluate(memory, systems, protocol, gallery.offer)
    report["protocol"] |= {"systems": {"first": "a model", name: "files & more"}, "root": None}
    return report | {"versions": {"moe3d": "1.2.3", "torch": "2"}, "commit": "abc"}, gallery.frames()


@pytest.mark.parametrize("task", ["mv", "depth", "boundary"])
def test_the_page_is_complete_and_loads_nothing(task):
    report, frames = make(task)
    page = render_evaluation(report, frames)
    assert "<system>" not in page and "<c>" not in page and "second &lt;system&gt;" in page
    assert page.count('<section class="card scene">') == 3 and page.count("<img") == 3 * (2 + 2 * 3)
    assert not re.search(r"https?:|@import|url\(|{{", page)
    for key in report["mean"].keys() & METRICS.keys():
        assert METRICS[key].name in page
    for text in ("1.2.3", "abc", "no valid ground truth", "a model", "files &amp; more", "the 3 worst frames"):
        assert text in page
    assert page.count('<path d="M') == 2


def test_only_the_best_is_bold():
    report, frames = make("depth")
    page = render_evaluation(report, frames)
    cell = r'<td class="(\w*)">([\d.]+)</td>'
    ours = re.search(rf'<th scope="row">AbsRel ↓</th>{cell}{cell}', page)
    assert ours.groups()[:3:2] == ("best", "") and float(ours[2]) < float(ours[4])
    assert best("abs_rel", [0.2, 0.1, None, 0.1001]) == [False, True, False, True]
    assert best("delta1", [0.2, 0.3]) == [False, True]
    assert best("abs_rel", [0.1, 0.1]) == [False, False] == best("coverage", [0.1, 0.2])
    assert best("abs_rel", [None]) == [False]


@pytest.mark.parametrize(
    ("task", "dataset", "figures"),
    [
        ("mv", "nrgbd", ["0.0730", "0.0520", "0.769", "0.0550", "0.0350", "0.800", "0.1440", "0.2450", "0.701"]),
        ("depth", "kitti", ["0.076", "0.064"]),
        ("boundary", "nyuv2", ["0.232", "0.319"]),
        ("depth", "nyuv2", []),
    ],
)
def test_the_papers_figures_stand_beside_ours_and_are_marked(task, dataset, figures):
    report, frames = make(task, dataset, size=0)
    page = render_evaluation(report, frames)
    published = re.findall(r'<td class="paper">([\d.]+)</td>', page)
    assert set(published) == set(figures)
    assert ("paper’s own figures" in page) == bool(figures)
    assert ("MoE3D, paper" in page) == bool(figures)


def test_a_gallery_keeps_the_worst_and_draws_no_others():
    drawn = []
    _, frames = make("depth", size=1)

    class Spy(Gallery):
        def offer(self, badness, view):
            super().offer(badness, lambda: drawn.append(badness) or view())

    gallery = Spy(2)
    memory = MemoryDataset({"a": 5})
    offered = []

    def observe(badness, view):
        offered.append(view)

    evaluate(memory, [MemorySystem("one", off(1.5))], Protocol("depth", "synthetic"), observe)
    for badness, view in zip([0.3, None, 0.5, 0.1, 0.5], offered, strict=True):
        gallery.offer(badness, view)
    assert [frame.frame for frame in gallery.frames()] == ["frame-2", "frame-4"]
    assert drawn == [0.3, None, 0.5, 0.5]
    assert len(frames) == 1


def test_pictures_are_small_and_of_the_frames_shape():
    gallery = Gallery(1)
    memory = MemoryDataset({"a": 1}, size=(30, 1300))
    evaluate(memory, [MemorySystem("one", perfect)], Protocol("boundary", "synthetic"), gallery.offer)
    (frame,) = gallery.frames()
    for file in [*frame.pictures.values(), *frame.systems[0][2].values()]:
        assert Image.open(io.BytesIO(file)).size == (434, 10)


def test_edges_are_hit_missed_or_false():
    edges, true_edges = np.zeros((2, 4, 6), dtype=bool)
    edges[0, :4], true_edges[0, 2:] = True, True
    picture = edges_picture(np.full((8, 12, 3), 200, np.uint8), edges, true_edges)
    assert picture.shape == (4, 6, 3)
    for columns, color in (([0, 1], FALSE), ([2, 3], HIT), ([4, 5], MISSED)):
        assert (picture[0, columns] == color).all()
    assert (picture[1:] == 110).all()


def test_distances_grow_lighter_and_are_grey_where_unknown():
    picture = distance_picture(np.array([[0, 0.05, 0.1, 7.0, np.nan]]))
    lightness = picture[0].sum(axis=1)
    assert lightness[0] < lightness[1] < lightness[2] == lightness[3]
    assert (picture[0, 4] == 128).all()


def test_a_judgement_needs_a_difference():
    assert judge("abs_rel", 0.2, 0.1) == "better" and judge("si_f1", 0.2, 0.1) == "worse"
    assert judge("abs_rel", 0.2, 0.201) == "about the same" and judge("abs_rel", None, 0.1) is None
