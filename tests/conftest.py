"""Options of the test suite."""

from __future__ import annotations

import os

import pytest

from edgepack.bench.lease import NAME_VARIABLE

# Several test runs on one machine must not wait for each other's benchmarks.
os.environ.setdefault(NAME_VARIABLE, f"tests-{os.getpid()}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="rewrite tests/golden from what plans are now")
