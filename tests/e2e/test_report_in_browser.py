"""The HTML page in a real browser: light and dark, wide and as narrow as a phone, with the keyboard alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edgepack.report.evidence import read_evidence
from edgepack.report.gather import gather
from edgepack.report.page import report_page
from edgepack.report.rollout import course_page
from tests.support.chromium import Browser, chromium
from tests.support.evidence import evidence
from tests.support.results import emulated, history_of, recorded, throttled
from tests.support.rollouts import course

pytestmark = pytest.mark.full

PHONE, DESK = 360, 1280
TAB, ENTER = ("Tab", 9), ("Enter", 13)

LOW_CONTRAST = """
(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * (top[3] ?? 1) + under[i] * (1 - (top[3] ?? 1)));
  const light = rgb => rgb.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const back = element => {
    const chain = [];
    for (let e = element; e; e = e.parentElement) chain.unshift(parse(getComputedStyle(e).backgroundColor));
    return chain.reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const low = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || ['title', 'desc', 'style'].includes(element.localName)) continue;
    const style = getComputedStyle(element);
    const colour = element.localName === 'text' ? style.fill : style.color;
    const [a, b] = [light(parse(colour)), light(back(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push(`${element.localName}.${element.className}: ${ratio.toFixed(2)} ${element.textContent}`);
  }
  return low;
})()
"""  # WCAG 2.2, relative luminance and contrast ratio; level AA asks for 4.5

OVERLAPS = """
[...document.querySelectorAll('figure svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.height < 6;
  }).map(text => text.textContent);
})
"""


CONTROLS = """
[...document.querySelectorAll('a[href], summary, [tabindex="0"]')].filter(e => e.checkVisibility())
"""  # what is in closed details is no control yet


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    history_of(
        folder / "history.sqlite",
        *(recorded("int8"), recorded("fp32"), recorded("int8"), throttled(), emulated(), recorded("against")),
    )
    builds = tuple(read_evidence(evidence(target), target) for target in ("rpi4", "rpi5"))
    path = folder / "report.html"
    path.write_text(report_page(replace(gather([], folder / "history.sqlite"), builds=builds)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rollout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rollout") / "rollout.html"
    path.write_text(course_page(course()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_text_is_readable(browser: Browser, report: Path, scheme: str, width: int) -> None:
    browser.open(report, width=width, height=800, scheme=scheme)
    back = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 23, 29)"}[scheme]
    assert browser.evaluate(LOW_CONTRAST) == []
    assert browser.evaluate(OVERLAPS) == []


@pytest.mark.parametrize("width", [320, PHONE, DESK])
def test_only_tables_scroll_sideways(browser: Browser, report: Path, width: int) -> None:
    browser.open(report, width=width, height=800, scheme="light")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("innerWidth") == width


def test_the_browser_finds_nothing_to_complain_about(browser: Browser, report: Path) -> None:
    browser.open(report, width=DESK, height=800, scheme="light")
    assert browser.evaluate("document.querySelectorAll('figure svg').length") == 8 + 3 * 3 + 2
    assert browser.errors == []


def test_nothing_is_asked_of_a_network(browser: Browser, report: Path) -> None:
    with browser.watching("Network.requestWillBeSent") as requests:
        browser.open(report, width=DESK, height=800, scheme="light")
    assert [each["request"]["url"] for each in requests] == [report.resolve().as_uri()]


def test_the_keyboard_reaches_every_control_in_order(browser: Browser, report: Path) -> None:
    browser.open(report, width=DESK, height=800, scheme="light")
    browser.press(*TAB)
    assert browser.evaluate("document.activeElement.className") == "skip"
    assert browser.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    count = browser.evaluate(f"(window.controls = {CONTROLS}).length")
    reached = [browser.evaluate("controls.indexOf(document.activeElement)")]
    for _ in range(count - 1):
        browser.press(*TAB)
        reached.append(browser.evaluate("controls.indexOf(document.activeElement)"))
        assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == list(range(count))


def test_the_keyboard_skips_to_the_results_and_opens_what_is_closed(browser: Browser, report: Path) -> None:
    browser.open(report, width=DESK, height=800, scheme="light")
    browser.press(*TAB)
    browser.press(*ENTER)
    assert browser.evaluate("location.hash") == "#main"
    browser.evaluate("document.querySelector('#m1 summary').focus()")
    assert browser.evaluate("document.activeElement.parentElement.open") is False
    browser.press(*ENTER)
    assert browser.evaluate("document.activeElement.parentElement.open") is True


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, PHONE, DESK])
def test_a_rollouts_page_is_readable_and_only_its_tables_scroll(
    browser: Browser, rollout: Path, scheme: str, width: int
) -> None:
    with browser.watching("Network.requestWillBeSent") as requests:
        browser.open(rollout, width=width, height=800, scheme=scheme)
    assert [each["request"]["url"] for each in requests] == [rollout.resolve().as_uri()]
    assert browser.evaluate(LOW_CONTRAST) == []
    assert width == 320 or browser.evaluate(OVERLAPS) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelectorAll('figure svg').length") == 3
    assert browser.errors == []
