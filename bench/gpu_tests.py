"""Run the tests that need a GPU and record each outcome with the device, the versions and the date.

python bench/gpu_tests.py [pytest arguments]

A failure is printed when it happens; stopped with Ctrl-C (SIGINT) the run records what it has seen.
"""

import sys
import time

import pytest
from record import write


class Recorder:
    """Collects the outcome and duration of each test; a pytest plugin."""

    def __init__(self) -> None:
        self.rows: dict[str, dict] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self.rows.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0})
        row["seconds"] = round(row["seconds"] + report.duration, 1)
        if report.outcome != "passed":
            row["outcome"] = report.outcome
        if report.failed:
            print(f"\nfailed after {report.duration:.0f} s: {report.nodeid}\n{report.longreprtext[-1500:]}", flush=True)


def main() -> int:
    recorder = Recorder()
    start = time.perf_counter()
    status = pytest.main(["-m", "gpu", "-q", *sys.argv[1:]], plugins=[recorder])
    rows = list(recorder.rows.values())
    if all(row["outcome"] == "skipped" for row in rows):
        print("no test ran here, and nothing is recorded: is there a card? (vbcompile doctor)")
        return int(status) or 1
    print(f"{sum(r['outcome'] == 'passed' for r in rows)} of {len(rows)} passed in {time.perf_counter() - start:.0f} s")
    print(write("gpu_tests", rows))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
