"""manifest.json: one way to write it, and every other one is damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.bundle.manifest import (
    CHECKSUM,
    MANIFEST,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    Manifest,
    check_path,
    dump_manifest,
    parse_manifest,
)
from edgepack.errors import VerificationError
from edgepack.store import canonical_json, digest_json
from tests.support.runtime import make_bundle


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_bundle(tmp_path_factory.mktemp("bundle"), wheels=()).manifest


def summed(table: dict[str, Any]) -> bytes:
    """A manifest of these values with a checksum that is right."""
    rest = {key: value for key, value in table.items() if key != CHECKSUM}
    return canonical_json(rest | {CHECKSUM: digest_json(rest)}) + b"\n"


def test_what_is_dumped_is_parsed_and_dumped_again_the_same(manifest: Manifest) -> None:
    data = dump_manifest(manifest)
    assert parse_manifest(data, "x") == manifest
    assert dump_manifest(parse_manifest(data, "x")) == data == summed(json.loads(data))


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text.rstrip(),
        lambda text: text + "\n",
        lambda text: text.replace(":", ": ", 1),
        lambda text: json.dumps(json.loads(text), indent=1) + "\n",
        lambda text: text.replace('"name":"small"', '"name":"smale"'),
        lambda text: text.replace('"name":"small"', '"name":"small","name":"small"'),
        lambda text: text.replace('"min_sqnr_db":40.0', '"min_sqnr_db":4e1'),
        lambda text: text.replace('"min_sqnr_db":40.0', '"min_sqnr_db":NaN'),
        lambda text: text.replace('"title":"this machine"', '"title":"\\ud800"'),
        lambda text: text.replace(f'"{CHECKSUM}":"', f'"{CHECKSUM}":"0'),
        lambda text: text.replace(f'"{CHECKSUM}":', '"other":'),
    ],
)
def test_a_manifest_written_in_another_way_is_damage(manifest: Manifest, rewrite: Callable[[str], str]) -> None:
    text = dump_manifest(manifest).decode()
    other = rewrite(text)
    assert other != text
    with pytest.raises(VerificationError, match=r"x: the manifest is not what was written.*copy or build it again"):
        parse_manifest(other.encode(), "x")


def test_every_flipped_bit_is_found(manifest: Manifest) -> None:
    whole = dump_manifest(manifest)
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        with pytest.raises(VerificationError):
            parse_manifest(bytes(data), "x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\xfa", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "manifest schema None; this edgepack reads 1"),
        (b"null", "manifest schema None"),
        (b'{"schema_version":2}', "manifest schema 2; this edgepack reads 1: build it again"),
        (b" " * (MAX_MANIFEST_BYTES + 1), f"at most {MAX_MANIFEST_BYTES} are read"),
    ],
    ids=range(8),
)
def test_what_is_no_manifest_of_this_schema_is_said_so(data: bytes, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        parse_manifest(data, "x")


def test_every_key_is_checked_with_its_place(manifest: Manifest) -> None:
    table = json.loads(dump_manifest(manifest))
    changes: list[tuple[Callable[[Any], object], str]] = [
        (lambda t: t.update(surprise=1), "'surprise': Extra inputs"),
        (lambda t: t.pop("runner"), "'runner': Field required"),
        (lambda t: t["golden"].update(samples="many"), "'golden.samples'"),
        (lambda t: t["files"]["runner.py"].update(sha256="0"), "'files.runner.py.sha256'"),
        (lambda t: t["files"]["runner.py"].update(bytes=-1), "'files.runner.py.bytes'"),
        (lambda t: t["model"]["files"].update(model="model/none.onnx"), "'model/none.onnx' is named"),
        (lambda t: t["runtime"].update(wheels=["wheels/none.whl"]), "'wheels/none.whl' is named"),
        (lambda t: t["files"].update({"../up": t["files"]["runner.py"]}), "'../up' leaves the bundle's folder"),
        (lambda t: t["files"].update({MANIFEST: t["files"]["runner.py"]}), "cannot be among the files"),
        (lambda t: t["files"].update({"runner.py/x": t["files"]["runner.py"]}), "'runner.py' is a file, and a folder"),
        (lambda t: t["files"].update({f"f{i}": t["files"]["runner.py"] for i in range(MAX_FILES)}), "'files'"),
    ]
    for change, message in changes:
        other = json.loads(json.dumps(table))
        change(other)
        with pytest.raises(VerificationError, match="x: manifest: ") as caught:
            parse_manifest(summed(other), "x")
        assert message in str(caught.value)


VERDICT = {
    "metric": "top1",
    "baseline": 0.9,
    "value": 0.9,
    "drop": 0.0,
    "interval": [-0.01, 0.01],
    "samples": 9,
    "answer": "passed",
    "is_agreement": False,
    "is_share": True,
    "accepted_unresolved": False,
    "extra": {"more": 1},
}


def with_evidence(table: dict[str, Any], **changes: object) -> None:
    verdict = VERDICT | {key: value for key, value in changes.items() if key != "note"}
    accuracy = {"verdict": verdict, "evaluation_sha256": "0" * 64, "judged_in": "x", "note": changes.get("note")}
    table["accuracy"] = accuracy


FORGED: list[tuple[str, Callable[[Any], object]]] = [
    ("name", lambda t: t.update(name="../../etc")),
    ("name", lambda t: t.update(name="a\x1b[2Jb")),
    ("edgepack", lambda t: t.update(edgepack="0\n1")),
    ("target.title", lambda t: t["target"].update(title="\x1b]0;owned\x07")),
    ("target.cpu_flags", lambda t: t["target"].update(cpu_flags=["f"] * 257)),
    ("target.memory_mib", lambda t: t["target"].update(memory_mib=-1)),
    ("requires.python", lambda t: t["requires"].update(python="3")),
    ("requires.os_ids.0.id", lambda t: t["requires"].update(os_ids=[{"id": "a\rb", "version_id": "1"}])),
    ("model.inputs.0.name", lambda t: t["model"]["inputs"][0].update(name="x" * 501)),
    ("model.inputs.0.shape", lambda t: t["model"]["inputs"][0].update(shape=[1] * 65)),
    ("runtime.name", lambda t: t["runtime"].update(name="import os")),
    ("sizes.model", lambda t: t["sizes"].update(model=0)),
    ("sizes.baseline_model", lambda t: t["sizes"].update(baseline_model=10**30)),
    ("sizes.wheels", lambda t: t["sizes"].update(wheels=-5)),
    ("golden.samples", lambda t: t["golden"].update(samples=0)),
    ("golden.min_sqnr_db", lambda t: t["golden"].update(min_sqnr_db=-1e9)),
    ("bench.warmup", lambda t: t["bench"].update(warmup=10**9)),
    ("bench.runs", lambda t: t["bench"].update(runs=0)),
    ("bench.seconds", lambda t: t["bench"].update(seconds=1e300)),
    ("bench.seconds", lambda t: t["bench"].update(seconds=-1.0)),
    ("bench.threads", lambda t: t["bench"].update(threads=100_000)),
    ("budget.latency_ms", lambda t: t["budget"].update(latency_ms=0.0)),
    ("budget.memory_mib", lambda t: t["budget"].update(memory_mib=1e30)),
    ("accuracy.verdict", lambda t: with_evidence(t, answer="perhaps")),
    ("accuracy.verdict", lambda t: with_evidence(t, metric="\x1b[31mtop1")),
    ("accuracy.verdict", lambda t: with_evidence(t, interval=[0.1])),
    ("accuracy.verdict", lambda t: with_evidence(t, interval=None)),
    ("accuracy.note", lambda t: with_evidence(t, note="fine\nreally")),
]


@pytest.mark.parametrize(("key", "change"), FORGED, ids=range(len(FORGED)))
def test_a_forged_manifest_says_nothing_that_is_out_of_bounds_or_cannot_be_printed(
    manifest: Manifest, key: str, change: Callable[[Any], object]
) -> None:
    table = json.loads(dump_manifest(manifest))
    with_evidence(table)
    parse_manifest(summed(table), "x")
    change(table)
    with pytest.raises(VerificationError, match="x: manifest: ") as caught:
        parse_manifest(summed(table), "x")
    assert f"'{key}" in str(caught.value) and str(caught.value).isprintable()


@given(st.text(st.characters(codec="utf-8"), max_size=12))
def test_a_path_that_is_taken_stays_below_the_folder(path: str) -> None:
    try:
        check_path(path)
    except ValueError:
        return
    assert Path("/folder", path).resolve().is_relative_to("/folder")
    assert Path(path).as_posix() == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/a",
        "..",
        "../a",
        "a/..",
        "a/../b",
        ".",
        "./a",
        "a/.",
        "a//b",
        "a/",
        "a\\b",
        "a\nb",
        "a\0b",
        "ä",
        "x" * 241,
    ],
)
def test_a_path_that_is_not_plain_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="leaves the bundle's folder, or is not a plain one"):
        check_path(path)
