"""The words for how to measure."""

from __future__ import annotations

import pytest

from edgepack.bench.conduct import read_cpus, read_scenario
from edgepack.errors import UsageError


def test_processors_are_numbers_and_ranges() -> None:
    assert read_cpus("2,3") == (2, 3)
    assert read_cpus("0-2, 6") == (0, 1, 2, 6)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "0-99999", "1;2"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected say 2,3 or 0-3"):
        read_cpus(text)


def test_a_scenario_is_one_of_two_and_streams_belong_to_offline() -> None:
    assert read_scenario("offline", 4) == "offline"
    with pytest.raises(UsageError, match="expected single-stream or offline"):
        read_scenario("server", None)
    with pytest.raises(UsageError, match="add --scenario offline"):
        read_scenario("single-stream", 2)
