# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Check this repository: install what the checks need, perform each, and count.

    bash .ci/run                        every check, on a machine that need not know the project
    bash .ci/run SESSION [-- ARGUMENT]  one session of .ci/noxfile.py, such as `bench -- --help`

Each unit test counts, and every other step counts as one check; the last line of the output is the
sum, `N passed, N failed`. The first step is the test command of the README, with the plain Python
and nothing installed. Needs Linux, and Debian's packages or the programs that they contain.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TOOLS_MINOR = 11  # requirements.txt needs Python 3.11
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".ci/work/venv"
NOX = [str(VENV / "bin/python"), "-m", "nox", "--noxfile", str(ROOT / ".ci/noxfile.py")]
# The programs that the checks need, and their Debian packages.
PROGRAMS = {
    "chromedriver": "chromium-driver", "chromium": "chromium", "curl": "curl", "node": "nodejs",
    "npm": "npm", "nsenter": "util-linux", "openssl": "openssl", "unshare": "util-linux",
    "valgrind": "valgrind", "wget": "wget", "wrk": "wrk",
}  # fmt: skip


class Report(NamedTuple):
    passed: int
    failed: int
    output: str


def run(command: Sequence[str], limit: float = 600, cwd: Path = ROOT) -> tuple[bool, str]:
    """Run a command for so many seconds at most; return whether it succeeded, and its output."""
    null, succeeded = subprocess.DEVNULL, False
    # A pipe would stay open as long as a child that the command leaves behind.
    with tempfile.TemporaryFile() as file:
        try:
            process = subprocess.Popen(
                command, cwd=cwd, stdin=null, stdout=file, stderr=file, start_new_session=True
            )
        except OSError as error:
            return False, f"{error}\n"
        try:
            succeeded = process.wait(limit) == 0
        except subprocess.TimeoutExpired:
            os.write(file.fileno(), b"\nkilled: it took too long\n")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(0)
        return succeeded, file.read().decode(errors="replace")


def check(*commands: Sequence[str]) -> Report:
    """Run commands until one fails, and count the tests that they ran, or else one check."""
    output, succeeded = "", True
    for command in commands:
        if succeeded:
            succeeded, text = run(command)
            output += text
    passed, failed = count_tests(output) or (int(succeeded), 0)
    # Python cannot raise what goes wrong in a finalizer, such as the warning about an open file.
    failed += output.count("Exception ignored in")
    return Report(passed, failed or int(not succeeded), output)


def count_tests(output: str) -> tuple[int, int] | None:
    """Read how many tests passed and failed from the output of unittest, if it ran."""
    ran = re.search(r"^Ran (\d+) tests? in .*\n\n(?:OK|FAILED)(.*)$", output, re.MULTILINE)
    if not ran:
        return None
    counts = {name: int(number) for name, number in re.findall(r"([a-z][a-z ]*)=(\d+)", ran[2])}
    failed = sum(counts.get(each, 0) for each in ("failures", "errors", "unexpected successes"))
    return max(0, int(ran[1]) - sum(counts.values())), failed


def extend_path() -> None:
    """Let `python3.9` and the like be found where pyenv has put them."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = sorted(map(str, versions.glob("*/bin")), reverse=True)
    os.environ["PATH"] = os.pathsep.join([*os.get_exec_path(), *found])


def install_packages() -> Report:
    missing = {package for program, package in PROGRAMS.items() if not shutil.which(program)}
    if not importlib.util.find_spec("ensurepip"):
        missing.add("python3-venv")
    if not missing:
        return Report(1, 0, "nothing is missing\n")
    apt = ["apt-get", "--option=DPkg::Lock::Timeout=300", "--yes"]
    install = [*apt, "install", "--no-install-recommends", *sorted(missing)]
    return check([*apt, "update"], install)


def install_requirements() -> Report:
    """Make the environment of the tools; what is there already stays."""
    code = f"import sys, ensurepip; sys.exit(sys.version_info < (3, {TOOLS_MINOR}))"
    pip = [str(VENV / "bin/python"), "-m", "pip", "--disable-pip-version-check", "install"]
    for name in (sys.executable, *(f"python3.{minor}" for minor in range(TOOLS_MINOR, 20))):
        if run([name, "-c", code])[0]:
            requirements = ("--requirement", str(ROOT / ".ci/requirements.txt"))
            return check([name, "-m", "venv", str(VENV)], [*pip, "--quiet", *requirements])
    return Report(0, 1, f"there is no Python 3.{TOOLS_MINOR} or later with venv\n")


def reports() -> Iterator[tuple[str, Report]]:
    yield "Tests, as in the README", check([sys.executable, "-m", "unittest"])
    yield "Packages of Debian", install_packages()
    yield "Packages of PyPI", install_requirements()
    listed = check([*NOX, "--list", "--json"])
    yield "Sessions of nox", listed
    sessions = json.loads(listed.output.splitlines()[-1]) if listed.passed else []
    names = [session["session"] for session in sessions]
    # The tests wait a lot, so two interpreters at a time take little longer than one.
    for together, group in itertools.groupby(names, lambda name: name.startswith("tests-")):
        with ThreadPoolExecutor(2 if together else 1) as pool:
            yield from pool.map(perform, group)


def perform(session: str) -> tuple[str, Report]:
    report = check([*NOX, "--session", session])
    missing = re.search(r"^nox > Session .* skipped: (.*)$", report.output, re.MULTILINE)
    return session, Report(0, 0, missing[1]) if missing else report


def main() -> int:
    # An exception instead of the sudden end, so that `run` ends the children too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    os.environ.update(DEBIAN_FRONTEND="noninteractive", NO_COLOR="1", PYTHONDONTWRITEBYTECODE="1")
    os.environ.pop("COARNOTIFY_SETTINGS", None)
    extend_path()
    if sys.argv[1:]:
        return subprocess.run([*NOX, "--session", *sys.argv[1:]]).returncode
    done = []
    for title, report in reports():
        lines = report.output.rstrip().splitlines()
        for line in lines if report.failed else lines[-40:]:
            print(f"    {line}".rstrip())
        print(f"--- {title}: {report.passed} passed, {report.failed} failed\n")
        done.append((title, report))
    for title, report in done:
        if report.failed:
            print(f"FAILED: {title} ({report.failed})")
    failed = sum(report.failed for _, report in done)
    print(f"{sum(report.passed for _, report in done)} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
