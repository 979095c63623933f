"""The report page in a headless Chromium: the divider moves by pointer, by keyboard and by finger."""

from __future__ import annotations

import pytest

from moe3d.viz.page import render_page


@pytest.fixture(scope="module")
def browser(start_chromium):
    return start_chromium("--disable-gpu")


@pytest.fixture
def page(browser, small_report, tmp_path):
    (tmp_path / "report.html").write_text(render_page(*small_report), "utf-8")

    def open_at(width, height, mobile=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get((tmp_path / "report.html").as_uri())
        browser.execute_script("document.querySelector('.stage').scrollIntoView({block: 'center'})")
        return browser

    return open_at


def _stage(browser):
    """Left, top, width and height of the first scene's stage."""
    box = (
        "const b = document.querySelector('.stage').getBoundingClientRect(); return [b.left, b.top, b.width, b.height]"
    )
    return browser.execute_script(box)


def _divider(browser):
    """Where the handle stands and the stock picture ends, in percent of the stage."""
    return browser.execute_script("""
        const stage = document.querySelector(".stage"), box = stage.getBoundingClientRect();
        const handle = stage.querySelector(".handle").getBoundingClientRect();
        const cut = getComputedStyle(stage.querySelector("img.stock")).clipPath.match(/[\\d.]+(?=%)/g).map(Number);
        return [100 * ((handle.left + handle.right) / 2 - box.left) / box.width, cut];
    """)


def _mouse(browser, kind, x, y):
    pressed = {"button": "left", "buttons": 1, "clickCount": 1}
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, **pressed})


def _visible(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('.stage')[0].querySelectorAll('img')]"
        ".filter(i => getComputedStyle(i).visibility == 'visible').map(i => i.className).sort()"
    )


def test_the_mouse_drags_the_divider_to_where_it_is(page):
    browser = page(1200, 900)
    assert _divider(browser)[0] == pytest.approx(50, abs=0.5)
    left, top, width, height = _stage(browser)
    _mouse(browser, "mousePressed", left + 0.5 * width, top + height / 2)
    _mouse(browser, "mouseMoved", left + 0.7 * width, top + height / 2)
    assert _divider(browser)[0] == pytest.approx(70, abs=1)
    _mouse(browser, "mouseMoved", left + 0.2 * width, top + height / 4)
    _mouse(browser, "mouseReleased", left + 0.2 * width, top + height / 4)
    handle, cut = _divider(browser)
    assert handle == pytest.approx(20, abs=1)
    assert cut[-1] == pytest.approx(80, abs=1)  # cut off from the right: stock is to the left of the handle
    _mouse(browser, "mouseMoved", left + 0.9 * width, top + height / 2)
    assert _divider(browser)[0] == pytest.approx(20, abs=1)  # nobody holds it any more


def test_the_divider_stops_at_the_edges(page):
    browser = page(1200, 900)
    left, top, width, height = _stage(browser)
    _mouse(browser, "mousePressed", left + 0.5 * width, top + height / 2)
    for x, expected in ((left + 3 * width, 100), (1, 0)):
        _mouse(browser, "mouseMoved", x, top + height / 2)
        assert _divider(browser)[0] == pytest.approx(expected, abs=0.5)
    _mouse(browser, "mouseReleased", 1, top + height / 2)


def test_the_keyboard_moves_the_divider_and_says_where_it_is(page):
    from selenium.webdriver.common.keys import Keys

    browser = page(1200, 900)
    slider = browser.find_element("css selector", ".stage input")
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert _divider(browser)[0] == pytest.approx(53, abs=0.5)
    assert slider.get_attribute("aria-valuetext") == "53% stock, 47% MoE"
    slider.send_keys(Keys.HOME)
    assert _divider(browser)[0] == pytest.approx(0, abs=0.5)
    outline = "return getComputedStyle(document.querySelector('.handle'), '::after').outlineStyle"
    assert browser.execute_script(outline) == "solid"


def _swipe(browser, *points):
    """Put a finger down on the first point, move it over the others, lift it."""
    for kind, (x, y) in zip(["touchStart", *["touchMove"] * (len(points) - 1)], points, strict=True):
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


@pytest.fixture
def phone(page):
    browser = page(390, 844, mobile=True)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    yield browser
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_a_finger_drags_the_divider(phone):
    left, top, width, height = _stage(phone)
    _swipe(phone, *((left + at * width, top + height / 2) for at in (0.5, 0.6, 0.8)))
    assert _divider(phone)[0] == pytest.approx(80, abs=1)


def test_a_finger_scrolls_the_page_across_a_picture_and_leaves_its_divider(phone):
    left, top, width, height = _stage(phone)
    before = phone.execute_script("return scrollY")
    _swipe(phone, *((left + 0.2 * width, top + height - y) for y in (5, 25, 60, 120, 200, 300)))
    assert phone.execute_script("return scrollY") > before + 100
    assert _divider(phone)[0] == pytest.approx(50, abs=0.5)


def test_a_phone_shows_the_page_unscaled(phone):
    assert phone.execute_script("return document.documentElement.scrollWidth") == 390


def test_buttons_choose_the_layer_of_their_scene_with_its_legend(page):
    browser = page(1200, 900)
    assert _visible(browser) == ["moe depth", "stock depth"]
    browser.find_element("css selector", ".layers button[value=flying]").click()
    assert _visible(browser) == ["moe flying", "stock flying"]
    state = """
        const [first, second] = document.querySelectorAll(".compare");
        const shown = c => [...c.querySelectorAll(".legend")].filter(l => l.offsetParent).map(l => l.dataset.layer);
        const pressed = first.querySelectorAll("button[aria-pressed=true]");
        return [shown(first), shown(second), [...pressed].map(b => b.value)];
    """
    assert browser.execute_script(state) == [["flying"], ["depth"], ["flying"]]


def test_light_and_dark_follow_the_system(page):
    browser = page(1200, 900)
    lightness = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        lightness.append(int(color.removeprefix("rgb(").split(",")[0]))
    assert lightness[0] > 200 and lightness[1] < 50


def test_the_browser_has_nothing_to_complain_of_and_asks_for_nothing(page):
    browser = page(1200, 900)
    assert browser.get_log("browser") == []
    assert (
        browser.execute_script(
            "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
        )
        == []
    )
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0
