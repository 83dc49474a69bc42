"""Options of the test suite."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from edgepack.bench.lease import NAME_VARIABLE

# Several test runs on one machine must not wait for each other's benchmarks.
os.environ.setdefault(NAME_VARIABLE, f"tests-{os.getpid()}")

# A shell that starts the suite in the background has it ignore Ctrl-C, and so all that it starts: tests that interrupt
# a command would see it end by itself.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="rewrite tests/golden from what plans are now")


@pytest.fixture(scope="session", autouse=True)
def no_history_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure is not the user's to find in their history."""
    before = os.environ.get("EDGEPACK_DATA")
    os.environ["EDGEPACK_DATA"] = str(tmp_path_factory.mktemp("data"))
    yield
    if before is None:
        del os.environ["EDGEPACK_DATA"]
    else:
        os.environ["EDGEPACK_DATA"] = before
