# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Break coarinbox.py in one place after another, and report which faults no test notices.

    bash .ci/run mutants -- --seconds 600 --seed 7

A mutant is the module with one expression or statement changed. The tests that execute that line
run on it until one fails; code that only the import executes is tested by all of them. The session
`measured_tests` has to run first, since it notes which test executes which line.

A random sample is tried, as large as the time allows. A survivor is not always a gap, since some
mutants do no harm; the exit status is 1 if the sample leaves no doubt that the tests kill less
than 80 % of all. Texts for people are not changed, as a test of their wording would repeat it.
"""

from __future__ import annotations

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
MODULE = "coarinbox.py"
NEEDED = 0.8
LEFT_OUT = "BrowserTest"  # takes half a minute for each mutant
TEST_LIMIT = "20"  # seconds for one test of a mutant,
LIMIT = 90  # and for all of them
WORKERS = os.cpu_count() or 1
UNITTESTS = (sys.executable, str(ROOT / ".ci/unittests.py"))
PROSE = re.compile(r"[A-Za-z]{2,},? [A-Za-z]{2,}|\n")
SWAPS: dict[type[ast.AST], str] = {
    ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not", ast.IsNot: "is", ast.In: "not in",
    ast.NotIn: "in", ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.And: "or",
    ast.Or: "and", ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.BitOr: "&",
    ast.BitAnd: "|",
}  # fmt: skip


class Mutant(NamedTuple):
    line: int
    start: int  # offsets in the bytes of the module
    end: int
    after: str  # what stands there instead

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.after.encode() + source[self.end :]

    def describe(self, source: bytes) -> str:
        before = source[self.start : self.end].decode()
        return f"{MODULE}:{self.line}: {' '.join(before.split())}  ->  {self.after}"


UNCHANGED = Mutant(0, 0, 0, "")
Queue = collections.deque[Mutant]


def mutants(source: bytes) -> Iterator[Mutant]:
    lines = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    for parent in nodes(ast.parse(source)):
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
    if not DATA.exists() or DATA.stat().st_mtime < (ROOT / MODULE).stat().st_mtime:
        sys.exit("the module has changed: perform the sessions measured_tests and coverage first")
    data = coverage.CoverageData(str(DATA))
    data.read()
    by_line: dict[int, set[str]] = {}
    for file in data.measured_files():
        for line, tests in data.contexts_by_lineno(file).items():
            by_line[line] = {test for test in tests if LEFT_OUT not in test} - {FIXTURE}
    executed = collections.Counter(test for tests in by_line.values() for test in tests - {""})
    every = [test for test, _ in executed.most_common()][::-1]
    chosen = {0: every}
    for line, names in by_line.items():
        # All tests depend on what the import executes, and may depend on what only fixtures do.
        some = names and "" not in names
        chosen[line] = [test for test in every if test in names] if some else every
    return chosen


def try_mutants(queue: Queue, tests: dict[int, list[str]], end: float) -> dict[Mutant, bool]:
    """Try mutants from a queue while there is time; return which of them pass the tests."""
    source, passed = (ROOT / MODULE).read_bytes(), {}
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "work", ".*_cache"))
        while queue and time.monotonic() < end:
            mutant = queue.popleft()
            (copy / MODULE).write_bytes(mutant.apply(source))
            # All tests have just passed in another session; here, some show that the copy works.
            names = tests[0][:150] if mutant is UNCHANGED else tests.get(mutant.line, tests[0])
            passed[mutant], _ = run([*UNITTESTS, "--failfast", *names], LIMIT, copy)
            if passed[mutant] and mutant is not UNCHANGED:
                sys.stdout.write(mutant.describe(source) + "\n")
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    options = parser.parse_args()
    found = list(mutants((ROOT / MODULE).read_bytes()))
    random.Random(options.seed).shuffle(found)  # noqa: S311
    print(f"{len(found)} mutants, sample of seed {options.seed}; survivors:", flush=True)
    os.environ["TEST_LIMIT"] = TEST_LIMIT
    tests, queue = read_tests(), collections.deque([UNCHANGED, *found])
    end, passed = time.monotonic() + options.seconds, {}
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for result in pool.map(lambda _: try_mutants(queue, tests, end), range(WORKERS)):
            passed.update(result)
    if not passed.pop(UNCHANGED):
        print("the tests fail without any mutant")
        return 1
    score = 1 - sum(passed.values()) / len(passed)
    # Two standard deviations, or chance would decide whether a change lands.
    margin = 2 * (NEEDED * (1 - NEEDED) / len(passed)) ** 0.5
    print(f"{score:.0%} of {len(passed)} mutants killed, give or take {margin:.0%}")
    return 0 if score >= NEEDED - margin else 1


if __name__ == "__main__":
    sys.exit(main())
