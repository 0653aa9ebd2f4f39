# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Break coarinbox.py in one place after another, and report which faults no test notices.

    bash .ci/run mutants -- --seconds 600 --seed 7

A mutant is the module with one expression or statement changed, but for texts that people read.
The tests that execute that line run on it until one fails. The session `measured_tests` has to run
first: it notes which test executes which line. A random sample is tried, as large as the time
allows. A survivor is not always a gap, since some mutants do no harm; the exit status is 1 if the
sample leaves no doubt that the tests kill less than 80 % of all.
"""

import argparse
import ast
import collections
import concurrent.futures
import itertools
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import coverage
from checks import run
from unittests import FIXTURE

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / ".ci/work/coverage"
MODULE = ROOT / "coarinbox.py"
SOURCE = MODULE.read_bytes()
NEEDED = 0.8
LEFT_OUT = "BrowserTest"  # takes half a minute for each mutant
LIMIT = 90  # seconds for all tests of a mutant
PROSE = re.compile(r"[A-Za-z]{2,},? [A-Za-z]{2,}|\n")
SWAPS: dict[type[ast.AST], str] = {
    ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not", ast.IsNot: "is", ast.In: "not in",
    ast.NotIn: "in", ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.And: "or",
    ast.Or: "and", ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.BitOr: "&",
    ast.BitAnd: "|",
}  # fmt: skip


class Mutant(NamedTuple):
    line: int = 0
    start: int = 0  # offsets in the bytes of the module
    end: int = 0
    after: str = ""  # what stands there instead

    def __str__(self) -> str:
        before = SOURCE[self.start : self.end].decode()
        return f"{MODULE.name}:{self.line}: {' '.join(before.split())}  ->  {self.after}"


def mutants() -> Iterator[Mutant]:
    lines = [0, *itertools.accumulate(map(len, SOURCE.splitlines(keepends=True)))]
    for parent in nodes(ast.parse(SOURCE)):
        for node, after in changes(parent):
            start = lines[node.lineno - 1] + node.col_offset
            end = lines[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
            yield Mutant(node.lineno, start, end, after)


def nodes(parent: ast.AST) -> Iterator[ast.AST]:
    """Walk through the code that is executed, without f-strings, annotations and docstrings."""
    for name, value in ast.iter_fields(parent):
        for node in value if isinstance(value, list) else [value]:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
            # The positions of what an f-string contains are wrong before Python 3.12.
            skipped = text or guard or isinstance(node, ast.JoinedStr)
            if isinstance(node, ast.AST) and name not in ("annotation", "returns") and not skipped:
                yield node
                yield from nodes(node)


def changes(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Yield a node, this one or one of its own, and what may stand in its place."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield node, swap(node.ops[0], node.left, node.comparators[0])
    elif isinstance(node, ast.BoolOp):
        yield node, swap(node.op, *node.values)
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield node, swap(node.op, node.left, node.right)
    elif isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            yield node, repr(not value)
        elif value and isinstance(value, bytes):
            yield node, f"({b'XX' + value!r})"
        elif value and isinstance(value, str) and not PROSE.search(value):
            yield node, f"({'XX' + value!r})"
    elif isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        yield node, "return None"
    elif isinstance(node, ast.ExceptHandler) and node.type:
        yield node.type, "()"
    elif isinstance(node, ast.stmt) and may_go(node):
        yield node, "pass"
    for test in getattr(node, "ifs", None) or [getattr(node, "test", None)]:
        if test and not isinstance(test, (ast.Compare, ast.BoolOp)):
            yield test, f"(not ({ast.unparse(test)}))"


def swap(operator: ast.AST, *operands: ast.expr) -> str:
    return f"({f' {SWAPS[type(operator)]} '.join(f'({ast.unparse(each)})' for each in operands)})"


def may_go(node: ast.stmt) -> bool:
    """Return whether a statement can be left out, and no name is missing then."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, (ast.Yield, ast.YieldFrom))
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], (ast.Attribute, ast.Subscript))
    return isinstance(node, (ast.Raise, ast.Break, ast.Continue, ast.Delete))


def read_tests() -> dict[int, list[str]]:
    """Return the tests for each line, those first that execute the fewest lines; 0 is for all."""
    if not DATA.exists() or DATA.stat().st_mtime < MODULE.stat().st_mtime:
        sys.exit("the module has changed: perform the sessions measured_tests and coverage first")
    data = coverage.CoverageData(str(DATA))
    data.read()
    by_line = {
        line: {test for test in tests if LEFT_OUT not in test} - {FIXTURE}
        for line, tests in data.contexts_by_lineno(str(MODULE)).items()
    }
    executed = collections.Counter(test for tests in by_line.values() for test in tests - {""})
    every = sorted(executed, key=executed.__getitem__)
    chosen = {0: every}
    for line, names in by_line.items():
        # All tests depend on what the import executes, and may depend on what only fixtures do.
        for_all = not names or "" in names
        chosen[line] = every if for_all else [test for test in every if test in names]
    return chosen


def passes(mutant: Mutant, tests: list[str]) -> bool:
    """Run tests on a copy of this repository; return whether no test notices the mutant there."""
    with tempfile.TemporaryDirectory() as name:
        ignored = shutil.ignore_patterns(".git", "work", ".*_cache")
        copy = shutil.copytree(ROOT, Path(name, "copy"), ignore=ignored)
        changed = SOURCE[: mutant.start] + mutant.after.encode() + SOURCE[mutant.end :]
        (copy / MODULE.name).write_bytes(changed)
        command = (sys.executable, str(ROOT / ".ci/unittests.py"), "--failfast", *tests)
        return run(command, LIMIT, copy)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    options = parser.parse_args()
    found, tests = list(mutants()), read_tests()
    random.Random(options.seed).shuffle(found)  # noqa: S311
    print(f"{len(found)} mutants, sample of seed {options.seed}; survivors:", flush=True)
    os.environ["TEST_LIMIT"] = "20"  # seconds for one of them
    # All tests have just passed in another session; here, some show that the copy works.
    if not passes(Mutant(), tests[0][:150]):
        sys.exit("the tests fail without any mutant")
    end, passed = time.monotonic() + options.seconds, []

    def attempt(mutant: Mutant) -> None:
        if time.monotonic() < end:
            passed.append(passes(mutant, tests.get(mutant.line, tests[0])))
            if passed[-1]:
                sys.stdout.write(f"{mutant}\n")

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(attempt, found))
    score = 1 - sum(passed) / len(passed)
    # Two standard deviations, or chance would decide whether a change lands.
    margin = 2 * (NEEDED * (1 - NEEDED) / len(passed)) ** 0.5
    print(f"{score:.0%} of {len(passed)} mutants killed, give or take {margin:.0%}")
    return 0 if score >= NEEDED - margin else 1


if __name__ == "__main__":
    sys.exit(main())
