"""The pytest plugin of gpu_tests.py: what is known of the tests is in a JSON file after each of them.

With pytest-xdist the process that hands out the tests hears of all of them; it alone writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report import write_json

PATH = "SPARQ_GPU_TESTS_JSON"  # environment variable: where the file is
LONG = ("test_cuda_graphs",)  # Inductor compiles: each takes as long as many others
MESSAGE = 400  # characters of a failure that are kept


class Record:
    """What the JSON file holds; it counts as timed out until it is finished."""

    def __init__(self, path: Path) -> None:
        self.path, self.started = path, time.monotonic()
        self.passed = 0
        self.failed: list[dict[str, str]] = []
        self.skipped: list[dict[str, str]] = []

    def write(self, finished: bool = False) -> None:
        seconds = round(time.monotonic() - self.started, 2)
        known: dict[str, Any] = dict(passed=self.passed, failed=self.failed, skipped=self.skipped)
        write_json(self.path, known | dict(seconds=seconds, timed_out=not finished))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(dict(name=report.nodeid, message=_message(report)))
        elif report.skipped:
            self.skipped.append(dict(name=report.nodeid, reason=_reason(report)))
        elif report.when == "call":
            self.passed += 1
        else:
            return
        self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(dict(name=report.nodeid, message=_message(report)))
        elif report.skipped:
            self.skipped.append(dict(name=report.nodeid, reason=_reason(report)))
        else:
            return
        self.write()

    def pytest_sessionfinish(self) -> None:
        self.write(finished=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and PATH in os.environ:
        record = Record(Path(os.environ[PATH]))
        record.write()
        config.pluginmanager.register(record)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take long begin at once, no two of them on one worker: xdist hands out the first ones in pairs."""
    long = [item for item in items if getattr(item, "originalname", item.name) in LONG]
    others = iter([item for item in items if item not in long])

    def ordered() -> Iterator[pytest.Item]:
        for item in long:
            yield item
            yield from (other for other in [next(others, None)] if other is not None)
        yield from others

    items[:] = list(ordered())


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The error, without the way to it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else f"{Path(crash.path).name}:{crash.lineno}: {crash.message}"
    return text[-MESSAGE:] if crash is None else text[:MESSAGE]


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    place = report.longrepr
    return str(place[2] if isinstance(place, tuple) else place).removeprefix("Skipped: ")
