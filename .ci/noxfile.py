# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""The checks of this repository that need more than the plain Python, as sessions of nox.

.ci/run installs what the sessions need, and performs them in the order of this file. The tests run
on each Python in an environment where nothing is installed; everything else runs in the environment
of nox itself, with all of requirements.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".ci/work"
AXE = "axe-core@4.14.1"  # checks the accessibility of the pages
# The instructions of a POST, in multiples of what parsing its JSON takes.
INSTRUCTIONS = 30
PYTHONS = [f"3.{minor}" for minor in range(9, 16)]

nox.needs_version = ">=2026"
nox.options.envdir = str(WORK / "nox")
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False


def run(session: nox.Session, *arguments: str, **environment: str) -> None:
    session.chdir(ROOT)
    environment["COVERAGE_FILE"] = str(WORK / "coverage")
    session.run(sys.executable, *arguments, env=environment)


@nox.session(python=False)
def formatting(session: nox.Session) -> None:
    run(session, "-m", "ruff", "format", "--check", ".")


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    run(session, "-m", "ruff", "check", ".")


@nox.session(python=False)
def types(session: nox.Session) -> None:
    scripts = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(".ci/*.py"))
    run(session, "-m", "mypy", "coarinbox.py", "test_coarinbox.py", *scripts)


@nox.session(python=PYTHONS, venv_backend="virtualenv", reuse_venv=True)
def tests(session: nox.Session) -> None:
    """Run the tests with every warning an error, and nothing but the standard library."""
    session.chdir(ROOT)
    session.run("python", "-X", "dev", "-W", "error", ".ci/unittests.py", *session.posargs)


@nox.session(python=False)
def measured_tests(session: nox.Session) -> None:
    """Run the tests where nothing may be skipped, and note what each of them executes."""
    npm = ["npm", "install", "--no-save", "--no-package-lock", "--no-audit", "--ignore-scripts"]
    session.run(*npm, "--prefix", str(WORK), AXE)
    run(session, "-m", "coverage", "erase")
    # Not `coverage run`: this variable is for the programs that the tests start as well.
    start = str(ROOT / ".coveragerc")
    run(session, ".ci/unittests.py", NO_SKIPS="1", COVERAGE_PROCESS_START=start)


@nox.session(python=False)
def coverage(session: nox.Session) -> None:
    run(session, "-m", "coverage", "combine")
    run(session, "-m", "coverage", "report", "--show-missing", "--fail-under=100")


@nox.session(python=False)
def fuzz(session: nox.Session) -> None:
    run(session, ".ci/fuzz.py", *(session.posargs or ["--requests=5000"]))


@nox.session(python=False)
def bench(session: nox.Session) -> None:
    run(session, ".ci/bench.py", *(session.posargs or ["--short", f"--guard={INSTRUCTIONS}"]))


@nox.session(python=False)
def mutants(session: nox.Session) -> None:
    run(session, ".ci/mutants.py", *(session.posargs or ["--seconds=120"]))
