# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Run the unit tests as `python -m unittest` does, for the sessions of .ci/noxfile.py.

    python .ci/unittests.py [ARGUMENT ...]

A test that takes longer than $TEST_LIMIT seconds ends the run with the stack of every thread; with
$NO_SKIPS, a skipped test fails. If coverage.py measures the run, each test is a context, also in
the processes that it starts. FIXTURE is for what happens between tests, "" for the import.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import unittest

LIMIT = float(os.environ.get("TEST_LIMIT", "120"))
FIXTURE = "fixture"


class Result(unittest.TextTestResult):
    def startTestRun(self) -> None:
        self.switch(FIXTURE)

    def startTest(self, test: unittest.TestCase) -> None:
        self.switch(test.id())
        super().startTest(test)

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self.switch(FIXTURE)

    def switch(self, context: str) -> None:
        # Between two tests the clock runs too, since a fixture of a class or module may hang.
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        os.environ["COVERAGE_CONTEXT"] = context
        if "coverage" in sys.modules:
            measured = sys.modules["coverage"].Coverage.current()
            if measured:
                measured.switch_context(context)

    def stopTestRun(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        if "NO_SKIPS" in os.environ:
            self.failures.append((test, f"skipped, where nothing may be skipped: {reason}"))
        else:
            super().addSkip(test, reason)


class Runner(unittest.TextTestRunner):
    resultclass = Result  # type: ignore[assignment]


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    unittest.main(None, testRunner=Runner)
