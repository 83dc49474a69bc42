"""The HTML page of a rollout: whole, escaped, the same bytes, without a script or a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepack.errors import InputError
from edgepack.fleet.state import Act, Audit
from edgepack.report.rollout import course_page
from tests.support.html import HOSTILE, Tags
from tests.support.rollouts import REASON, course


@pytest.fixture(scope="module")
def page() -> str:
    return course_page(course())


def test_it_says_where_each_target_stands_what_went_wrong_and_who_said_what(page: str) -> None:
    tags = Tags(page)
    assert not {"script", "iframe", "img", "link", "object"} & {name for name, _ in tags.found}
    for text in (REASON, "no route to host", "ada@lab, process 4711", "1 of 1 failed", "spare gets nothing"):
        assert text in tags.text
    assert len(tags.named("svg")) == 3
    assert all(each["role"] == "img" for each in tags.named("svg"))
    badges = [each["class"] for each in tags.named("span") if each.get("class", "").startswith("badge")]
    assert badges[:4] == ["badge good", "badge plain", "badge doubt", "badge bad"]


def test_the_same_rollout_gives_the_same_bytes_and_what_a_device_says_is_escaped(page: str) -> None:
    assert course_page(course()) == page
    hostile = course_page(course(HOSTILE, target=f"rpi5{HOSTILE}"))
    tags = Tags(hostile)
    assert "<script" not in hostile
    assert "<script>alert('1')</script>" in tags.text


def test_the_audit_log_gives_the_acts_on_one_release_and_refuses_a_line_that_is_none(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    assert audit.acts("r-1") == []
    audit("rollout", release="r-1")
    audit("outcome", release="r-2", device="d")
    audit("pause", release="r-1", target="rpi4")
    found = audit.acts("r-1")
    assert [(each.act, each.target) for each in found] == [("rollout", None), ("pause", "rpi4")]
    assert all(isinstance(each, Act) and "process" in each.who for each in found)
    entries = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert all({"at", "who", "act"} <= set(each) for each in entries)
    with (tmp_path / "audit.jsonl").open("a") as file:
        file.write('{"at": 3\n')
    with pytest.raises(InputError, match="line 4 is no act"):
        audit.acts("r-1")
