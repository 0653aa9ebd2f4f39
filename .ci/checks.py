#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Every check of this repository, in order; the last line of the output is the sum.

    bash .ci/run           what decides whether a change lands, in less than fifteen minutes
    bash .ci/run --full    the same, with a hundred thousand malformed requests, a hundred kills,
                           the whole benchmark and every mutant; that takes hours

What is done stands in the table of steps(). A step is a title and a function that returns a
Report. Of a run of unit tests each test counts, any other step counts as one check.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 3 * 3600  # seconds, for each command
PROBE_TIMEOUT = 60  # seconds, for an interpreter to tell its version
TAIL = 6  # lines of output that a passing step shows
COVERAGE_MINIMUM = 100  # percent, of lines and of branches
MINORS = range(9, 15)  # the tests run on Python 3.9 to 3.14,
TOOLS_MINOR = 11  # and what requirements.txt pins needs Python 3.11

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / ".ci/requirements.txt"
VENV = ROOT / ".ci/work/venv"
VENV_PYTHON = str(VENV / "bin/python")
COVERAGE = [VENV_PYTHON, "-m", "coverage"]
SCRIPTS = (".ci/bench.py", ".ci/floor.py", ".ci/fuzz.py", ".ci/mutants.py")
MYPY_FILES = ("coarinbox.py", "test_coarinbox.py", ".ci/checks.py", *SCRIPTS)
# The programs that the tests need, and their Debian packages.
PROGRAMS = {
    "curl": "curl",
    "openssl": "openssl",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
    "node": "nodejs",
    "npm": "npm",
    "wrk": "wrk",
}
AXE = "axe-core@4.14.1"  # the check for accessibility, from npm
AXE_FILE = ROOT / ".ci/work/node_modules/axe-core/axe.min.js"


# --- Commands ------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    succeeded: bool
    output: str


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "COARNOTIFY_SETTINGS"}
    return {
        **kept,
        "DEBIAN_FRONTEND": "noninteractive",
        "NO_COLOR": "1",
        "PYTHON_COLORS": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run(command: Sequence[str], timeout: float = TIMEOUT) -> Outcome:
    # A file and not a pipe takes the output: a child that is left behind would keep a pipe open.
    with tempfile.TemporaryFile() as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(False, f"{error}\n")
        end = wait(process, timeout)
        file.seek(0)
        output = file.read().decode(errors="replace")
    return Outcome(process.returncode == 0 and not end, output + end)


def wait(process: subprocess.Popen[bytes], timeout: float) -> str:
    """Wait for the end of a process and of its group; return what is to be said about it."""
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # a Python in development mode tells where it hangs
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        return f"\nkilled after {timeout:g} seconds\n"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"\nkilled by signal {-status}\n" if status < 0 else ""


# --- Reports -------------------------------------------------------------------------------------


class Report(NamedTuple):
    passed: int
    failed: int
    output: str


def check(*commands: Sequence[str]) -> Report:
    """One check, which passes when all the commands succeed; the first failure ends it."""
    output = ""
    for command in commands:
        outcome = run(command)
        output += outcome.output
        if not outcome.succeeded:
            return Report(0, 1, output)
    return Report(1, 0, output)


class Summary(NamedTuple):
    ran: int
    failed: int
    skipped: int
    expected: int


def summarize(output: str) -> Summary:
    """Read the closing lines of unittest; all is 0 when they are missing."""
    ran = list(re.finditer(r"^Ran (\d+) tests? in ", output, re.MULTILINE))
    result = re.compile(r"^(?:OK|FAILED)(?: \((.*)\))?$", re.MULTILINE)
    end = result.search(output, ran[-1].end()) if ran else None
    if not end:
        return Summary(0, 0, 0, 0)
    counts = {
        name: int(number) for name, number in re.findall(r"([a-z][a-z ]*)=(\d+)", end[1] or "")
    }
    failed = sum(counts.get(name, 0) for name in ("failures", "errors", "unexpected successes"))
    skipped, expected = counts.get("skipped", 0), counts.get("expected failures", 0)
    return Summary(int(ran[-1][1]), failed, skipped, expected)


def count_passed(summary: Summary, output: str) -> int:
    """The number of tests that passed, or less where the output leaves it open.

    Not every skip or failure is a test of its own among those that ran: it may be a subtest or a
    whole class, and Python 3.12.1 leaves out what a decorator skips. Then the lines of a verbose
    run, if it is one, know better.
    """
    rest = summary.ran - summary.failed - summary.skipped - summary.expected
    lines = re.findall(r"^(?:.* \.\.\. )?ok$", output, re.MULTILINE)
    return max(rest, min(len(lines), summary.ran))


def unittests(command: Sequence[str], may_skip: bool = True) -> Report:
    """A run of unit tests. One that fails, but not by its tests, counts as one failure."""
    succeeded, output = run(command)
    summary = summarize(output)
    failed = summary.failed
    if not failed and not (succeeded and summary.ran):
        failed = 1
    if "Exception ignored in" in output:
        # Where `-W error` cannot raise: a socket or file that nobody closed.
        failed += 1
    if summary.skipped and not may_skip:
        failed += 1
        output += "\n".join(["\nNothing may be skipped here, but this was:", *skips(output), ""])
    return Report(count_passed(summary, output), failed, output)


def skips(output: str) -> list[str]:
    return re.findall(r"^.*\bskipped ['\"].*$", output, re.MULTILINE)


# --- Interpreters --------------------------------------------------------------------------------


class Interpreter(NamedTuple):
    minor: int
    patch: int
    path: str

    @property
    def version(self) -> str:
        return f"3.{self.minor}.{self.patch}"


def candidates() -> Iterator[Path]:
    for folder in os.get_exec_path():
        for minor in MINORS:
            yield Path(folder, f"python3.{minor}")
    yield from Path.home().glob(".pyenv/versions/*/bin/python3")


def probe(path: Path) -> Interpreter | None:
    """Ask an interpreter who it is; a file of that name may be a stub that fails."""
    if not os.access(path, os.X_OK):
        return None
    question = "import sys; print('%d.%d.%d' % sys.version_info[:3], sys.executable)"
    succeeded, output = run([str(path), "-c", question], PROBE_TIMEOUT)
    answer = re.fullmatch(r"3\.(\d+)\.(\d+) (.+)\n", output)
    if not (succeeded and answer):
        return None
    return Interpreter(int(answer[1]), int(answer[2]), answer[3])


def find_interpreters() -> list[Interpreter]:
    """The newest patch of each minor version, in ascending order."""
    found = sorted(filter(None, map(probe, candidates())))
    newest = {interpreter.minor: interpreter for interpreter in found}
    return [newest[minor] for minor in MINORS if minor in newest]


def report_interpreters(interpreters: list[Interpreter]) -> Report:
    lines = [f"{interpreter.version}: {interpreter.path}" for interpreter in interpreters]
    present = {interpreter.minor for interpreter in interpreters}
    lines += [f"3.{minor}: not found" for minor in MINORS if minor not in present]
    return Report(int(bool(present)), int(not present), "\n".join(lines))


# --- Installation --------------------------------------------------------------------------------


def install_packages() -> Report:
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    if not importlib.util.find_spec("ensurepip"):
        missing.append("python3-venv")
    if not missing:
        return Report(1, 0, "nothing is missing")
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    return check(["apt-get", "update"], install)


def choose_base(interpreters: list[Interpreter]) -> str:
    """The interpreter for the virtual environment: this one, unless it is too old."""
    if sys.version_info >= (3, TOOLS_MINOR) or not interpreters:
        return sys.executable
    return interpreters[-1].path


def install_requirements(base: str) -> Report:
    pip = [VENV_PYTHON, "-m", "pip", "--disable-pip-version-check"]
    identity = REQUIREMENTS.read_bytes() + str(Path(base).resolve()).encode()
    stamp, digest = VENV / "digest", hashlib.sha256(identity).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        report = check([*pip, "check"])
        if not report.failed:
            return report
    report = check(
        [base, "-m", "venv", "--clear", str(VENV)],
        [*pip, "install", "--no-deps", "--requirement", str(REQUIREMENTS)],
        [*pip, "check"],
    )
    if not report.failed:
        stamp.write_text(digest)
    return report


def install_axe() -> Report:
    version = AXE_FILE.with_name("package.json")
    if version.is_file() and f'"version": "{AXE.partition("@")[2]}"' in version.read_text():
        return Report(1, 0, "it is there")
    options = ["--no-save", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
    return check(["npm", "install", "--prefix", str(ROOT / ".ci/work"), *options, AXE])


# --- Steps ---------------------------------------------------------------------------------------


class Step(NamedTuple):
    title: str
    action: Callable[[], Report]
    shown: int = TAIL  # lines of output when it passes


def steps(full: bool) -> list[Step]:
    size = [] if full else ["--short"]
    interpreters = find_interpreters()
    ruff, mypy = [VENV_PYTHON, "-m", "ruff"], [VENV_PYTHON, "-m", "mypy"]
    return [
        Step("Tests, as in the README", partial(unittests, [sys.executable, "-m", "unittest"])),
        Step("Packages from Debian", install_packages),
        Step("Packages from PyPI", partial(install_requirements, choose_base(interpreters))),
        Step("Packages from npm", install_axe),
        Step("Format", partial(check, [*ruff, "format", "--check", "."])),
        Step("Lint", partial(check, [*ruff, "check", "."])),
        Step("Types", partial(check, [*mypy, *MYPY_FILES])),
        Step("Interpreters", partial(report_interpreters, interpreters), len(MINORS)),
        *map(strict_tests, interpreters),
        Step("Tests with nothing skipped, measured", measured_tests),
        Step("Coverage", measure_coverage, 100),
        Step("Malformed requests", partial(check, [sys.executable, ".ci/fuzz.py", *size])),
        Step("Benchmark", partial(check, [VENV_PYTHON, ".ci/bench.py", *size]), 100),
        Step("Mutants", partial(check, [VENV_PYTHON, ".ci/mutants.py", *size]), 100),
    ]


def strict_tests(interpreter: Interpreter) -> Step:
    command = [interpreter.path, "-X", "dev", "-W", "error", "-m", "unittest", "--verbose"]
    return Step(f"Tests on Python {interpreter.version}", partial(unittests, command))


def measured_tests() -> Report:
    run([*COVERAGE, "erase"])
    return unittests([*COVERAGE, "run", "-m", "unittest", "--verbose"], may_skip=False)


def measure_coverage() -> Report:
    threshold = f"--fail-under={COVERAGE_MINIMUM}"
    return check([*COVERAGE, "combine"], [*COVERAGE, "report", "--show-missing", threshold])


def perform(step: Step) -> Report:
    print(f"=== {step.title}")
    start = time.monotonic()
    try:
        report = step.action()
    except Exception:
        report = Report(0, 1, traceback.format_exc())
    lines = report.output.rstrip().splitlines()
    for line in lines if report.failed else lines[-step.shown :]:
        print(f"    {line}".rstrip())
    result = "FAILED" if report.failed else "passed"
    print(f"--- {step.title}: {result} in {time.monotonic() - start:.1f} s\n")
    return report


def main() -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and so end the children
    full = "--full" in sys.argv[1:]
    if full:
        os.environ["COARINBOX_KILLS"] = "100"
    results = [(step, perform(step)) for step in steps(full)]
    for step, report in results:
        if report.failed:
            print(f"FAILED: {step.title} ({report.failed})")
    failed = sum(report.failed for _, report in results)
    print(f"{sum(report.passed for _, report in results)} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
