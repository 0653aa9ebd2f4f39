# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Run the unit tests as `python -m unittest` does, and count every single one.

    python .ci/unittests.py [ARGUMENT ...]

The last line is `N passed, N failed, N skipped`. A test that takes longer than $TEST_LIMIT seconds
ends the run with the stack of every thread; with $NO_SKIPS, a skipped test counts as failed. If
coverage.py measures the run, each test is a context, in the processes that it starts as well; the
context FIXTURE is for what happens between tests, and the empty one for the import.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import unittest
from typing import Any

LIMIT = float(os.environ.get("TEST_LIMIT", "120"))
NO_SKIPS = "NO_SKIPS" in os.environ
FIXTURE = "fixture"


class Result(unittest.TextTestResult):
    passed = 0

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

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1


class Runner(unittest.TextTestRunner):
    resultclass = Result  # type: ignore[assignment]

    def run(self, test: Any) -> Any:
        result: Any = super().run(test)
        faulthandler.cancel_dump_traceback_later()
        if NO_SKIPS:
            for test, reason in result.skipped:
                print(f"skipped, though nothing may be skipped here: {test}: {reason}")
                result.failures.append((test, reason))
        faults = [test for test, _ in result.failures + result.errors]
        # Several subtests of one test are one failure.
        failed = {getattr(test, "test_case", test).id() for test in faults}
        failed |= {test.id() for test in result.unexpectedSuccesses}
        print(f"{result.passed} passed, {len(failed)} failed, {len(result.skipped)} skipped")
        return result


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    unittest.main(None, testRunner=Runner)
