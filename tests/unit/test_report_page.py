"""The HTML page of builds: whole, escaped, the same bytes, and of use to those who do not see its figures."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from typing import Any

import pytest

from edgepack.errors import InputError, UnsupportedError
from tests.support.evidence import candidate, evidence, gate, page_of_builds, robustness
from tests.support.html import HOSTILE, Tags


def hostile(value: Any) -> Any:
    """The same document with every free text made hostile."""
    if isinstance(value, dict):
        kept = {"outcome", "answer", "schema"}
        made = {name: each if name in kept else hostile(each) for name, each in value.items()}
        for table in ("drift", "params"):  # whose keys are free text too
            if made.get(table):
                made[table] = {name + HOSTILE: each for name, each in made[table].items()}
        return made
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return value + HOSTILE if isinstance(value, str) else value


def small(**changes: Any) -> dict[str, Any]:
    """Evidence without figures: drawing takes its time."""
    bare = {"candidates": [candidate("int8", drop=None)], "sensitivity": [], "robustness": None}
    return evidence(**{**bare, **changes})


@pytest.fixture(scope="module")
def page() -> str:
    return page_of_builds(
        [evidence("rpi4"), evidence("x86-avx512-vnni", candidates=[candidate("int8", outcome="failed")])]
    )


def test_the_same_evidence_gives_the_same_bytes(page: str) -> None:
    again = [evidence("rpi4"), evidence("x86-avx512-vnni", candidates=[candidate("int8", outcome="failed")])]
    assert page_of_builds(again) == page


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    tags = Tags(page)
    assert not {"script", "iframe", "img", "link", "object"} & {name for name, _ in tags.found}
    assert set(re.findall(r"https?://[^\"'\s]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not [name for _, attributes in tags.found for name in attributes if name == "src" or name.startswith("on")]
    assert "default-src 'none'" in page


def test_ids_are_unique_and_all_that_refer_to_one_find_it(page: str) -> None:
    tags = Tags(page)
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r"url\(#([^)]+)\)", page))
    for _, attributes in tags.found:
        wanted |= {each for key in ("aria-labelledby", "aria-describedby") for each in attributes.get(key, "").split()}
        wanted |= {attributes[key][1:] for key in ("href", "xlink:href") if attributes.get(key, "").startswith("#")}
    assert wanted and wanted <= set(ids)


def test_every_text_of_the_evidence_is_escaped_in_html_and_in_figures() -> None:
    made = page_of_builds([hostile(evidence())])
    tags = Tags(made)
    assert not tags.named("script")
    assert "\x00" not in made
    for svg in re.findall(r"<svg.*?</svg>", made, re.DOTALL):
        assert "<script" not in svg
    shown = HOSTILE.replace("\x00", "\ufffd")
    for text in ("fashion-mnist", "int4 GPTQ", "ruined", "canonicalise", "noise", "balanced", "y", "ranges"):
        assert text + shown in tags.text, text


def test_every_figure_says_what_it_shows_and_every_table_what_it_holds(page: str) -> None:
    tags = Tags(page)
    figures = tags.named("svg")
    assert len(figures) == 4 + 3  # the second target has no speed to draw
    assert all(each["role"] == "img" and len(each["aria-labelledby"].split()) == 2 for each in figures)
    assert len(tags.named("table")) == len(tags.named("caption"))
    assert all(each.get("scope") in ("col", "row") for each in tags.named("th"))
    described = re.findall(r"<desc[^>]*>(.*?)</desc>", page)
    assert "3 int4 GPTQ: 67.4 KiB, drop +0.09 [-0.06, +0.24] points" in described[0]
    assert "3 int4 GPTQ: 67.4 KiB, time 1.004 [0.984, 1.024] of fp32's" in described[1]
    assert "/features/block.0/conv_pw/Conv (Conv): +3.1 dB" in described[2]
    assert "noise 5: fp32 71.87%, here none" in described[3]


def test_headings_skip_no_level(page: str) -> None:
    levels = [int(name[1]) for name, _ in Tags(page).found if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_page_works_with_the_keyboard_alone(page: str) -> None:
    tags = Tags(page)
    first = tags.named("a")[0]
    assert first["href"] == "#main" and first["class"] == "skip"
    regions = [each for each in tags.named("div") if each.get("class") == "scroll"]
    assert all(each["tabindex"] == "0" and each["role"] == "region" and each["aria-label"] for each in regions)


def test_where_speed_was_measured_is_said(page: str) -> None:
    assert "0.0612 ms against 0.061 ms of fp32, in turns on x86_64" in page


def test_every_candidate_stands_in_the_table_with_what_became_of_it_and_why(page: str) -> None:
    for each in evidence()["candidates"]:
        row = next(row for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL) if f">{each['name']}</a>" in row)
        assert each["outcome"] in row
        assert each["reason"] in row
        assert ("on the front" in row) == each["front"]
    assert page.count('<tr class="chosen">') == 1


def test_the_chosen_one_is_marked_in_figures_by_shape_and_a_ruined_one_does_not_flatten_the_rest(page: str) -> None:
    figure = re.findall(r"<svg.*?</svg>", page, re.DOTALL)[0]
    assert "chosen" in figure and "limit of the gate" in figure
    assert "60.0" not in figure.partition("</desc>")[2].replace("t1-drop", "")  # no tick reaches the 62 points
    assert "6 int2 rounded: 37.1 KiB, drop +62.00" in figure


def test_what_was_not_measured_is_said_and_not_drawn() -> None:
    bare = evidence(candidates=[candidate("int8", size=None, drop=None, outcome="not tried", reason="no time left")])
    page = page_of_builds([bare | {"sensitivity": [], "gate": None, "robustness": None}])
    tags = Tags(page)
    assert not tags.named("svg")
    for text in ("No candidate was measured", "Nothing reached the gate", "Layers were not probed", "no time left"):
        assert text in tags.text
    assert "no candidate may ship" in tags.text


def test_a_metric_that_is_no_share_is_not_shown_in_points() -> None:
    selection = candidate("int8")["selection"] | {"metric": "mae", "is_share": False, "baseline": 2.5, "value": 2.75}
    one = candidate("int8", selection=selection | {"drop": 0.25, "interval": [0.125, 0.375]}, outcome="chosen")
    judged = gate(metric="mae", is_share=False, baseline=2.5, value=2.75, drop=0.25, interval=[0.125, 0.375])
    page = page_of_builds([evidence(candidates=[one], gate=judged | {"max_drop": 0.5}, robustness=None)])
    assert "+0.25 [+0.125, +0.375]" in page
    assert " points" not in Tags(page).text
    assert "%" not in re.findall(r"<svg.*?</svg>", page, re.DOTALL)[0].partition("</desc>")[2]


@pytest.mark.parametrize(
    ("answer", "accepted", "text"),
    [("passed", False, "passed"), ("missed", False, "missed"), ("unresolved", True, "unresolved, accepted")],
)
def test_the_gates_answer_is_said_in_words(answer: str, accepted: bool, text: str) -> None:
    page = page_of_builds([small(gate=gate(answer, accepted_unresolved=accepted, more_samples=700))])
    assert f">{text}</span>" in page
    assert ("about 700 more would" in page) == (answer == "unresolved")


def test_outputs_without_a_finite_value_are_shown_as_such() -> None:
    broken = gate("missed", value=None, drop=None, interval=None, reason="NaN in output 'y'")
    nan = candidate("int8")["selection"] | {"value": None, "drop": None, "interval": None}
    report = robustness() | {"mean_drop": None, "interval": None, "answer": "missed", "reason": "NaN under noise"}
    page = page_of_builds(
        [small(candidates=[candidate("int8", selection=nan, outcome="failed")], gate=broken, robustness=report)]
    )
    assert "NaN in output &#39;y&#39;" in page
    assert "NaN under noise" in page


def test_a_page_of_no_build_says_so() -> None:
    assert "There is no evidence to show" in page_of_builds([])


def test_evidence_of_another_schema_is_refused() -> None:
    with pytest.raises(InputError, match="evidence 2: schema is 2; this version draws evidence of schema 1"):
        page_of_builds([small(), small() | {"schema": 2}])


def test_evidence_that_is_wrong_is_refused_with_the_field_that_is() -> None:
    wrong = evidence()
    wrong["candidates"][0]["outcome"] = "maybe"
    with pytest.raises(InputError, match=r"evidence 1: candidates\.0\.outcome.*found 'maybe'"):
        page_of_builds([wrong])


def test_fields_of_a_later_version_are_let_through() -> None:
    assert page_of_builds([small(new={"thing": 1})]) == page_of_builds([small()])


def test_the_plotting_library_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"needs matplotlib, .*pip install 'edgepack\[report\]'"):
        page_of_builds([evidence()])


def test_the_plotting_library_is_not_loaded_before_a_page_is_asked_for() -> None:
    code = "import sys, edgepack.report.page; sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
