"""What was measured, on the page: chosen from the history, drawn from results that a real benchmark gave."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from edgepack import __main__ as door
from edgepack.bundle.bundle import Bundle
from edgepack.errors import InputError, VerificationError
from edgepack.report.gather import IN_FULL, Material, gather
from edgepack.report.page import report_page
from tests.support.evidence import candidate, evidence
from tests.support.html import HOSTILE, Tags
from tests.support.results import emulated, history_of, recorded, throttled
from tests.support.runtime import make_bundle


def on_device(document: dict[str, dict[str, str]], name: str) -> dict[str, dict[str, str]]:
    return document | {"device": document["device"] | {"name": name}}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    path = tmp_path_factory.mktemp("history") / "history.sqlite"
    history_of(path, recorded("int8"), recorded("fp32"), recorded("int8"), throttled(), emulated(), recorded("against"))
    return gather([], path)


@pytest.fixture(scope="module")
def page(material: Material) -> str:
    return report_page(material)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    built = evidence("here", candidates=[candidate("int8", drop=None)], sensitivity=[], robustness=None)
    return make_bundle(tmp_path_factory.mktemp("bundle"), wheels=(), evidence=json.dumps(built).encode())


def measured_as(bundle: Bundle, name: str = "fp32") -> dict[str, dict[str, str]]:
    """A recorded result, as if of this bundle."""
    document: dict[str, dict[str, str]] = recorded(name)
    manifest = bundle.manifest
    own = {"digest": bundle.digest, "name": manifest.name, "target": manifest.target.name}
    return document | {"bundle": document["bundle"] | own}


# --- what is taken ---


def test_without_a_bundle_the_newest_of_each_bundle_on_each_device_is_shown(material: Material) -> None:
    shown = [(each.benchmark.bundle.precision, each.benchmark.device.name) for each in material.results]
    assert shown == [("fp32", "local"), ("int8", "local"), ("int8", "pi4"), ("int8", "emulated:rpi4")]
    newest = [row.id for row in material.history if row.kind == "bench" and row.bundle == material.history[0].bundle]
    assert material.results[1].row.id == newest[1]
    assert len(material.comparisons) == 1
    assert len(material.history) == 6


def test_a_bundle_brings_its_evidence_and_only_its_own_results(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    _, own, elsewhere = history_of(
        path, recorded("int8"), measured_as(bundle), on_device(measured_as(bundle), "ssh://pi@lab")
    )
    found = gather([bundle.path], path)
    assert [each.target for each in found.builds] == ["here"]
    assert [each.row.id for each in found.results] == [own, elsewhere]
    assert {row.name for row in found.history} == {"small"}
    assert found.missing == ()
    assert [each.row.id for each in gather([bundle.path], path, device="ssh://pi@lab").results] == [elsewhere]


def test_results_can_be_chosen_by_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    first, _, third = history_of(path, recorded("int8"), recorded("int8"), recorded("against"))
    found = gather([], path, results=[third[:8], first[:8]])
    assert [each.row.id for each in found.results] == [first]
    assert [each.row.id for each in found.comparisons] == [third]
    with pytest.raises(InputError, match="no result has an id that begins with 0000"):
        gather([], path, results=["0000"])


def test_what_is_missing_is_said_with_the_command_that_gets_it(bundle: Bundle, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.sqlite"
    command = f"`edgepack bench {bundle.path} --device"
    assert gather([bundle.path], nothing).missing == (f"Times of {bundle.path}: {command} NAME`.",)
    assert gather([bundle.path], nothing, device="pi4").missing == (f"Times of {bundle.path} on pi4: {command} pi4`.",)
    assert not nothing.exists()
    history_of(nothing, recorded("int8"), measured_as(bundle, "against"))
    in_turns = gather([bundle.path], nothing)
    assert len(in_turns.comparisons) == 1 and command in in_turns.missing[0]
    assert "`edgepack report BUNDLE ...`" in gather([], nothing).missing[0]


def test_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to report: no bundle is named, and .* holds no result of pi4"):
        gather([], tmp_path / "nothing.sqlite", device="pi4")


def test_only_so_many_are_shown_in_full(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    ids = history_of(path, *(on_device(recorded("fp32"), f"board-{number}") for number in range(IN_FULL + 3)))
    found = gather([], path)
    assert [each.row.id for each in found.results] == ids[3:]
    assert len(found.history) == IN_FULL + 3


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_evidence_that_is_no_evidence_is_refused_by_the_bundles_name(content: bytes, tmp_path: Path) -> None:
    broken = make_bundle(tmp_path, wheels=(), evidence=content)
    with pytest.raises(VerificationError, match=r"small.*evidence\.json"):
        gather([broken.path], tmp_path / "nothing.sqlite")


def test_a_result_that_is_none_is_refused_with_the_field_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    (wrong,) = history_of(path, recorded("int8") | {"runtime": 3})
    with pytest.raises(InputError, match=rf"history\.sqlite: result {wrong}: runtime: .*found 3; expected a result"):
        gather([], path)


# --- what is shown ---


def test_the_numbers_are_those_of_the_result(page: str) -> None:
    latency = recorded("fp32")["latency_ms"]
    low, high = latency["intervals"]["p50"]
    assert f"<dd>{latency['p50']:.3f} ms<small>[{low:.3f}, {high:.3f}]</small></dd>" in page
    text = Tags(page).text
    for reason in recorded("fp32")["verdict"]["reasons"]:
        assert reason["message"] in text
    assert f"Not observable there: {', '.join(recorded('fp32')['verdict']['unobserved'])}." in text
    assert "AMD EPYC, Debian GNU/Linux 12 (bookworm), onnxruntime" in text
    assert "2 processes" in text


def test_each_figure_is_told_in_words(page: str) -> None:
    told = dict(re.findall(r'<desc id="([^"]*)-text">(.*?)</desc>', page))
    fp32 = recorded("fp32")
    assert set(told) == {
        "devices",
        "history",
        *(f"m{number}-{name}" for number in (1, 2, 3) for name in ("distribution", "time", "operators")),
    }
    samples = fp32["samples"]
    assert f"{samples['count']} inferences from {min(samples['ns']) / 1e6:.3f} to" in told["m1-distribution"]
    assert f"p50 {fp32['latency_ms']['p50']:.3f} ms" in told["m1-distribution"]
    assert told["m1-time"].endswith("and 2 processes. No throttling is marked.")
    longest = fp32["operators"][0]
    assert told["m1-operators"].startswith(f"{longest['name']} ({longest['op']}, {longest['kernel']})")
    assert "fashion-mnist (int8 for x86-avx512-vnni) on pi4: p50 0.0" in told["devices"]
    assert told["history"].count("fashion-mnist for x86-avx512-vnni on local") == 3


def test_axes_have_plain_numbers(page: str) -> None:
    assert "mathdefault" not in page
    assert ">0.2</text>" in page and ">500</text>" in page


def test_throttling_is_marked_where_it_was(page: str) -> None:
    document = throttled()
    readings, began = document["environment"]["readings"], document["samples"]["starts_ns"][0]
    names = ["under-voltage", "throttled", "soft temperature limit"]
    assert [each["throttled"] for each in readings] == [[], [], names, [], [], []]
    begin, end = ((readings[number]["t_ns"] - began) / 1e9 for number in (1, 2))
    told = re.search(r'<desc id="m3-time-text">(.*?)</desc>', page)
    span = f"{begin:.2f} to {end:.2f} s: {', '.join(names)}"
    assert told is not None and f"The processor was held back: {span}" in told[1]
    figure = next(svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if 'id="m3-time"' in svg)
    assert "<pattern" in figure and "held back (throttled)" in figure and "MHz" in figure
    assert "held back (throttled)" not in page.partition('id="m3"')[0]
    assert "Whether something held the processor back could not be seen" in page.partition('id="m3"')[0]


def test_throttling_of_which_only_the_fact_was_kept_is_said_without_a_moment(tmp_path: Path) -> None:
    document = throttled()
    del document["environment"]["readings"]
    path = tmp_path / "history.sqlite"
    history_of(path, document)
    page = report_page(gather([], path))
    assert "under-voltage, throttled, soft temperature limit; at which moment was not kept" in page
    assert "held back (throttled)" not in page


def test_an_emulated_device_has_no_latency(page: str) -> None:
    section = page.partition('<section id="m4"')[2].partition("</section>")[0]
    assert "An emulated device has no latency" in section and "<svg" not in section
    row = next(row for row in re.findall(r"<tr>.*?</tr>", page) if 'href="#m4"' in row and "none: emulated" in row)
    assert row.count("none: emulated") == 3


def test_operators_that_nobody_timed_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    history_of(path, recorded("fp32") | {"operators": None})
    page = report_page(gather([], path))
    assert "Operators were not timed: <code>edgepack bench BUNDLE --profile</code>" in page
    assert "No bundle was timed twice on one device" in page
    assert "Devices side by side" not in page
    assert "<li>What was built, and why: name the bundles, <code>edgepack report BUNDLE ...</code>.</li>" in page


def test_every_operator_and_every_result_stands_in_a_table(page: str, material: Material) -> None:
    tables = dict(re.findall(r"<table>\n<caption>([^<]*)</caption>.*?<tbody>(.*?)</tbody>", page, re.DOTALL))
    assert page.count("<caption>Operators, the longest first</caption>") == 3
    for each in recorded("int8")["operators"]:
        assert f"<code>{each['name']}</code></th><td>{each['op']}</td>" in page
    history = tables["Every result, the newest first; times in ms"]
    found = re.findall(r'<th scope="row">(?:<a href="[^"]*">)?(\w+)', history)
    assert found == [row.id for row in reversed(material.history)]
    speed = recorded("against")["speed"]
    low, high = speed["interval"]
    assert f"{speed['ratio']:.3f} [{low:.3f}, {high:.3f}]" in page


def test_the_same_history_gives_the_same_bytes(page: str, material: Material) -> None:
    section = report_page(replace(material, results=material.results[:1])).partition('id="m1"')[2]
    assert section.partition("</section>")[0] == page.partition('id="m1"')[2].partition("</section>")[0]


def test_ids_are_unique_and_links_lead_somewhere(page: str) -> None:
    tags = Tags(page)
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {each["href"][1:] for each in tags.named("a")} <= set(ids)
    assert len(tags.named("table")) == len(tags.named("caption"))


def test_every_text_of_a_result_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    document = recorded("fp32")
    document["device"] |= {"name": "board" + HOSTILE, "os": "os" + HOSTILE}
    document["bundle"] |= {"name": "net" + HOSTILE, "precision": "int8" + HOSTILE}
    document["operators"][0] |= {"name": "layer" + HOSTILE, "op": "Conv" + HOSTILE, "kernel": "kernel" + HOSTILE}
    document |= {"notes": ["note" + HOSTILE], "runtime": "runtime" + HOSTILE}
    document["verdict"]["reasons"] = [{"rule": "x", "severity": "suspect", "message": "reason" + HOSTILE}]
    history_of(path, document, document)
    made = report_page(gather([], path))
    tags = Tags(made)
    assert not tags.named("script") and "\x00" not in made
    for text in ("board", "os", "net", "int8", "layer", "Conv", "kernel", "note", "runtime", "reason"):
        assert text + HOSTILE.replace("\x00", "\ufffd") in tags.text, text


# --- the command ---


def test_the_command_writes_the_page_and_tells_what_is_on_it(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "history.sqlite", tmp_path / "page.html"
    (own,) = history_of(path, measured_as(bundle))
    assert door.run(["report", str(bundle.path), "--history", str(path), "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {
        "path": str(out),
        "bytes": out.stat().st_size,
        "builds": [{"name": "fashion-mnist", "target": "here"}],
        "results": [own],
        "comparisons": [],
        "history": 1,
        "missing": [],
    }
    assert Tags(out.read_text(encoding="utf-8")).named("svg")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere.edgepack"], 3, "nowhere.edgepack: no such bundle"),
        (["--history", "nowhere.sqlite"], 3, "nowhere.sqlite: no such history"),
        (["--device", "nobody"], 3, "nothing to report"),
        (["--result", "0000"], 3, "0000"),
    ],
)
def test_what_cannot_be_reported_is_said_with_its_exit_code(
    arguments: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door.run(["report", *arguments, "-o", str(tmp_path / "page.html")]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
