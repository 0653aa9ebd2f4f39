# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""The checks of this repository, as sessions of nox; .ci/run performs them in this order.

The tests run on each Python in an environment where nothing is installed. Everything else runs in
the environment of nox itself, which has all of requirements.txt.
"""

import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".ci/work"

nox.options.envdir = str(WORK / "nox")
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False


def run(session: nox.Session, command: str, **environment: str) -> None:
    session.chdir(ROOT)
    environment["COVERAGE_FILE"] = str(WORK / "coverage")
    session.run(sys.executable, *command.split(), *session.posargs, env=environment)


def add_session(name: str, command: str, arguments: str = "") -> None:
    """Add a session that runs a module or script with these arguments, unless others are given."""

    @nox.session(name=name, python=False)
    def perform(session: nox.Session) -> None:
        run(session, command if session.posargs else f"{command} {arguments}")


add_session("formatting", "-m ruff format", "--check .")
add_session("lint", "-m ruff check", ".")
add_session("types", "-m mypy")


@nox.session(python=[f"3.{minor}" for minor in range(9, 16)], venv_backend="virtualenv")
def tests(session: nox.Session) -> None:
    """Run the tests with every warning an error, and nothing but the standard library."""
    session.chdir(ROOT)
    session.run("python", "-X", "dev", "-W", "error", ".ci/unittests.py", *session.posargs)


@nox.session(python=False)
def measured_tests(session: nox.Session) -> None:
    """Run the tests where nothing may be skipped, and note what each of them executes."""
    npm = "npm install --no-save --no-package-lock --no-audit --ignore-scripts axe-core@4.14.1"
    session.run(*npm.split(), "--prefix", str(WORK))  # axe looks at the accessibility of the pages
    run(session, "-m coverage erase")
    # Not `coverage run`: this variable is for the programs that the tests start as well.
    config = str(ROOT / ".coveragerc")
    run(session, ".ci/unittests.py", NO_SKIPS="1", COVERAGE_PROCESS_START=config)
    run(session, "-m coverage combine --quiet")


add_session("coverage", "-m coverage report", "--show-missing --fail-under=100")
add_session("fuzz", ".ci/fuzz.py", "--requests=20000")
add_session("bench", ".ci/bench.py", "--short --guard=30")
add_session("mutants", ".ci/mutants.py", "--seconds=120")
