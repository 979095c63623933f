"""The report page: what it says, and that it needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from moe3d.viz.page import compare_words, entropy_words, gate_words, render_page

METRICS = ("abs_rel", "delta1", "si_f1", "flying_rate")


class _Reader(HTMLParser):
    """Collects tags, and checks that they close in order."""

    VOID = ("meta", "link", "img", "input", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(small_report):
    return render_page(*small_report)


def test_the_page_is_well_formed_and_has_a_part_for_each_scene(page):
    reader = _Reader(page)
    assert reader.open == []
    assert sum(tag == "section" and attributes["class"] == "card scene" for tag, attributes in reader.tags) == 2
    assert "First <one>" in reader.text and "<one>" not in page.replace("&lt;one&gt;", "")


def test_the_page_loads_nothing(page):
    reader = _Reader(page)
    sources = [a["src"] for _, a in reader.tags if "src" in a]
    assert len(sources) == 2 * 16 and all(
        source.startswith(("data:image/png;", "data:image/jpeg;")) for source in sources
    )
    assert {tag for tag, a in reader.tags if "href" in a} == {"a", "link"}
    assert all(a["href"] == "data:," for tag, a in reader.tags if tag == "link")
    assert not re.search(r"https?:|@import|url\(", page)


def test_every_picture_and_control_has_a_name(page):
    reader = _Reader(page)
    assert all(a.get("alt") for tag, a in reader.tags if tag == "img")
    assert all(a.get("aria-label") for tag, a in reader.tags if tag == "input")


def test_the_table_has_every_number_and_marks_the_better_one(page):
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", page)
    cells = {name: re.findall(r'<td class="(?:moe )?(best)?">(.*?)</td>', row) for name, row in rows}
    assert cells["First &lt;one&gt;"] == [
        ("best", "0.100"), ("", "0.200"), ("", "0.900"), ("best", "0.950"),
        ("", "0.300"), ("", "0.301"), ("", "50.0%"), ("best", "25.0%"),
    ]  # fmt: skip
    assert cells["Second"] == [
        ("", "0.300"), ("best", "0.200"), ("", "0.500"), ("", "0.500"), ("", "–"), ("", "–"), ("", "–"), ("", "–"),
    ]  # fmt: skip
    assert cells["Mean"][6:] == [("", "50.0%"), ("best", "25.0%")]


def test_the_words_follow_the_numbers(small_report, page):
    first, second = small_report[0]["scenes"]
    assert compare_words(first["stock"], first["moe"]) == (
        "With the MoE head, better: δ1 0.900 → 0.950, Flying points 50.0% → 25.0%; worse: AbsRel 0.100 → 0.200; "
        "about the same: Boundary F1 0.300 → 0.301."
    )
    assert compare_words(second["stock"], second["moe"], with_values=False) == (
        "With the MoE head, better: AbsRel; about the same: δ1."
    )
    assert "A perfect prediction would count 12.5% flying points" in page
    for text in ("500 ms", "1.25 s", "sharpened 1.75 s", "+12% (+11 to +13)", "4.2 million"):
        assert text in page


def test_equal_and_undefined_values_get_no_praise():
    nothing, something = dict.fromkeys(METRICS), dict.fromkeys(METRICS, 0.5)
    assert compare_words(nothing, something) == "Nothing can be compared here."
    assert "better" not in compare_words(something, something) and "worse" not in compare_words(something, something)
    assert "about the same" in compare_words(dict.fromkeys(METRICS, 0.0), dict.fromkeys(METRICS, 0.0))


def test_values_next_to_zero_are_not_compared_by_their_ratio(small_report):
    tiny = [dict.fromkeys(METRICS, value) for value in (0.0005, 0.0015)]
    assert "better" not in compare_words(*tiny) and "worse" not in compare_words(*tiny)
    report, scenes = small_report
    entry = report["scenes"][0]
    blurred = entry | {"stock": entry["stock"] | {"si_f1": 0.01}, "moe": entry["moe"] | {"si_f1": 0.04}}
    sentence = "Neither head’s depth edges are where the true ones are,"
    assert sentence in render_page({**report, "scenes": [blurred]}, scenes[:1])
    assert sentence not in render_page(report, scenes)


@pytest.mark.parametrize("key", METRICS)
def test_better_and_worse_change_places_with_the_heads(key):
    low, high = dict.fromkeys(METRICS) | {key: 0.2}, dict.fromkeys(METRICS) | {key: 0.4}
    higher_is_better = key in ("delta1", "si_f1")
    assert ("better" in compare_words(low, high)) == higher_is_better == ("worse" in compare_words(high, low))


def test_the_gate_is_described_by_its_weights():
    sure = np.zeros((4, 2, 50))
    sure[0, 0], sure[2, 1] = 1, 1
    assert gate_words(sure) == (
        "2 of 4 experts lead on 1% of the pixels or more; on 100% of all pixels one holds at least 90% of the weight."
    )
    uniform = np.full((4, 2, 50), 0.25)
    assert gate_words(uniform).startswith("1 of 4 experts leads") and "on 0% of all pixels" in gate_words(uniform)


@pytest.mark.parametrize(("weights", "share"), [([0.25] * 4, "100%"), ([1, 0, 0, 0], "0%"), ([0.5, 0.5, 0, 0], "50%")])
def test_the_entropy_is_told_as_a_share_of_its_maximum(weights, share):
    gate = np.broadcast_to(np.array(weights, dtype=np.float32)[:, None, None], (4, 3, 5))
    assert entropy_words(gate).startswith(f"On average it reaches {share} of log 4,")


def test_numbers_and_pictures_must_belong_together(small_report):
    report, scenes = small_report
    with pytest.raises(ValueError):
        render_page(report, scenes[:1])
