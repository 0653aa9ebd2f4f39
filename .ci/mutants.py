#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Breaks coarinbox.py in one place after another, and shows which faults no test notices.

    .ci/work/venv/bin/python .ci/mutants.py              every mutant, more than an hour
    .ci/work/venv/bin/python .ci/mutants.py --short      a sample, drawn anew for each seed
    .ci/work/venv/bin/python .ci/mutants.py --lines 100-200

A mutant is the module with one expression or statement changed. The tests that execute that line,
the quickest first, run on it until one fails; then it counts as killed, as it does when they hang.
Lines that are executed on import are for all tests. Not changed are annotations, docstrings, and
texts for people, as a test of their wording would only repeat it: those of several words, what
f-strings say, and the page, which the tests with a browser are for.

.ci/survivors.txt lists mutants that do no harm, with the reason why. The exit status is 1 when
fewer than 95 % of the others are killed, or 85 % of a sample, and when one of the list is no mutant
any more.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import copy
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MODULE = "coarinbox.py"
TESTS = "test_coarinbox.py"
HARMLESS = ROOT / ".ci/survivors.txt"
NEEDED = 0.95
SAMPLE = 60
NEEDED_OF_SAMPLE = 0.85  # chance may take more from a sample, but hardly so much
LEFT_OUT = ("BrowserTest",)  # they take minutes for one mutant

# Texts for people, and the templates of the page.
PROSE = re.compile(r"[A-Za-z]{2,},? [A-Za-z]{2,}|\n[^\n]")

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


# --- Mutants -------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    line: int
    start: int  # offsets in the octets of the module
    end: int
    text: str  # what stands there instead
    before: str
    context: str  # the line in which it begins

    def __str__(self) -> str:
        change = f"{' '.join(self.before.split())}  ->  {' '.join(self.text.split())}"
        return f"{self.context}  |  {change}"


def changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """Yield what may stand in place of a node; None where a statement goes."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            yield with_(node, ops=[*node.ops[:index], swapped(operator), *node.ops[index + 1 :]])
    elif isinstance(node, (ast.BoolOp, ast.BinOp, ast.AugAssign)) and type(node.op) in SWAPS:
        yield with_(node, op=swapped(node.op))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from map(ast.Constant, other_constants(node.value))
    elif isinstance(node, ast.Return) and not is_empty(node.value):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "contextlib.suppress":
        yield with_(node, args=[])
    elif may_go(node):
        yield None


def may_go(node: ast.AST) -> bool:
    """Whether a statement can be left out, but not so that a name is missing."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, (ast.Constant, ast.Yield))
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], (ast.Attribute, ast.Subscript))
    return isinstance(node, (ast.Raise, ast.Break, ast.Continue, ast.Delete))


def conditions(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the conditions of a node that no other change turns round."""
    tests = getattr(node, "ifs", []) or ([node.test] if hasattr(node, "test") else [])
    for test in tests:
        inverted = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        equality = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)
        compared = isinstance(test, ast.Compare) and isinstance(test.ops[0], equality)
        if not inverted and not compared:
            yield test


def with_(node: ast.AST, **fields: Any) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def swapped(operator: ast.AST) -> ast.AST:
    return SWAPS[type(operator)]()


def is_empty(node: ast.AST | None) -> bool:
    """Whether None in place of a value changes little, or what another constant does too."""
    return node is None or (isinstance(node, ast.Constant) and not node.value)


def other_constants(value: object) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1]
    if isinstance(value, str):
        return [] if PROSE.search(value) else ["XX" + value]
    return [b"XX" + value] if isinstance(value, bytes) else []


def nodes(parent: ast.AST) -> Iterator[ast.AST]:
    """Walk through the code that is executed, without annotations and what f-strings say."""
    for name, value in ast.iter_fields(parent):
        for node in value if isinstance(value, list) else [value]:
            guard = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
            if (
                isinstance(node, ast.AST)
                and name not in ("annotation", "returns")
                and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
                and not (isinstance(parent, ast.JoinedStr) and isinstance(node, ast.Constant))
                and not (isinstance(parent, ast.FormattedValue) and name == "format_spec")
                and not guard
            ):
                yield node
                yield from nodes(node)


def replacements(node: ast.AST) -> Iterator[tuple[Any, str]]:
    """Yield nodes, this one or some of its own, and the text that may stand in place of each."""
    for new in changes(node):
        text = ast.unparse(ast.fix_missing_locations(new)) if new else "pass"
        yield node, f"({text})" if isinstance(new, ast.expr) else text
    for test in conditions(node):
        yield test, f"(not ({ast.unparse(test)}))"
    if isinstance(node, ast.ExceptHandler) and node.type:
        yield node.type, "()"


def mutants(source: bytes) -> Iterator[Mutant]:
    lines = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    for parent in nodes(ast.parse(source)):
        for node, text in replacements(parent):
            start = lines[node.lineno - 1] + node.col_offset
            end = lines[node.end_lineno - 1] + node.end_col_offset
            before = source[start:end].decode()
            if is_source(before, node):
                context = source[lines[node.lineno - 1] : lines[node.lineno]].decode().strip()
                yield Mutant(node.lineno, start, end, text, before, context)


def is_source(text: str, node: ast.AST) -> bool:
    """Whether a node was found where it should be; Python 3.11 is wrong within f-strings."""
    try:
        if isinstance(node, ast.expr):
            return ast.dump(ast.parse(f"({text})", mode="eval").body) == ast.dump(node)
        return ast.dump(ast.parse(text).body[0]) == ast.dump(node)
    except SyntaxError:
        return False


def mutated(source: bytes, mutant: Mutant) -> bytes:
    return source[: mutant.start] + mutant.text.encode() + source[mutant.end :]


# --- Which tests are for which lines --------------------------------------------------------------


class Plan(NamedTuple):
    seconds: dict[str, float]  # that each test takes
    tests: dict[int, list[str]]  # by line of the module, if they and not its import execute it

    def order(self, line: int) -> list[str]:
        """List the tests for a line, the quickest first."""
        return sorted(self.tests.get(line, self.seconds), key=lambda name: self.seconds[name])


# Run by another Python: the tests, one after the other, each in a context of its own.
MEASURE = """
import coverage, json, os, sys, time, unittest
measured = coverage.Coverage.current() or coverage.Coverage(config_file=sys.argv[1])
measured.start()
class Result(unittest.TextTestResult):
    def startTest(self, test):
        super().startTest(test)
        os.environ["COARINBOX_TEST"] = test.id()
        measured.switch_context(test.id())
        self.begun = time.monotonic()
    def stopTest(self, test):
        seconds[test.id()] = time.monotonic() - self.begun
        measured.switch_context("")
        super().stopTest(test)
    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        skipped.append(test.id())
seconds, skipped = {}, []
tests = unittest.defaultTestLoader.loadTestsFromName("test_coarinbox")
result = unittest.TextTestRunner(resultclass=Result, verbosity=0).run(tests)
measured.stop()
measured.save()
measured.combine()
data = measured.get_data()
contexts = {}
for file in data.measured_files():  # some tests copy the module
    if os.path.basename(file) == "coarinbox.py":
        for line, names in data.contexts_by_lineno(file).items():
            contexts.setdefault(line, []).extend(names)
for name in skipped:
    seconds.pop(name, None)
json.dump({"seconds": seconds, "contexts": contexts, "ok": result.wasSuccessful()}, sys.stdout)
"""


def measure(directory: Path) -> Plan:
    config = directory / "coveragerc"
    config.write_text(
        f"[run]\nsource = {directory}\nconcurrency = thread\ncontext = ${{COARINBOX_TEST-}}\n"
        f"data_file = {directory}/.coverage\nparallel = True\n"
    )
    command = [sys.executable, "-c", MEASURE, str(config)]
    # The inboxes that the tests start as programs read the name of the test from their environment.
    env = {**os.environ, "COVERAGE_PROCESS_START": str(config)}
    done = subprocess.run(command, cwd=directory, env=env, stdout=subprocess.PIPE, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    if not report["ok"]:
        sys.exit("the tests fail without any mutant")
    left_out = [name for name in report["seconds"] if name.split(".")[1] in LEFT_OUT]
    seconds = {name: took for name, took in report["seconds"].items() if name not in left_out}
    tests = {
        int(line): sorted({name for name in names if name in seconds})
        for line, names in report["contexts"].items()
        if "" not in names
    }
    return Plan(seconds, tests)


# --- Running tests on a mutant -------------------------------------------------------------------


def copy_project(directory: Path) -> None:
    for name in (MODULE, TESTS, "README.md", "local.cfg.example", "LICENSE"):
        shutil.copy(ROOT / name, directory)


def load(path: Path, code: types.CodeType) -> None:
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    sys.modules[path.stem] = module
    exec(code, module.__dict__)  # noqa: S102


def result_class(plan: Plan) -> type[unittest.TextTestResult]:
    class Result(unittest.TextTestResult):
        """A test that takes much longer than usual ends the process."""

        def startTest(self, test: unittest.TestCase) -> None:
            super().startTest(test)
            signal.setitimer(signal.ITIMER_REAL, 5 + 3 * plan.seconds.get(test.id(), 0))

    return Result


def run_tests(
    names: list[str], directory: Path, source: bytes, tests: types.CodeType, plan: Plan
) -> bool:
    """Run tests on a module, in a process of their own; returns whether all pass."""
    os.chdir(directory)
    (directory / MODULE).write_bytes(source)
    try:
        load(directory / MODULE, compile(source, directory / MODULE, "exec"))
        load(directory / TESTS, tests)
        suite = unittest.defaultTestLoader.loadTestsFromNames(names)
        with (directory / "outcome").open("w") as outcome:
            results = result_class(plan)
            runner = unittest.TextTestRunner(outcome, failfast=True, resultclass=results)
            return runner.run(suite).wasSuccessful()
    except BaseException:
        return False


class Trial(NamedTuple):
    mutant: Mutant | None  # None to see that nothing fails by itself
    directory: Path


class Trials:
    """Mutants, each tried in a process that is a copy of this one."""

    def __init__(self, source: bytes, plan: Plan, places: list[Path]) -> None:
        self.source, self.plan, self.free = source, plan, places
        self.tests = compile((ROOT / TESTS).read_bytes(), ROOT / TESTS, "exec")
        # Now, and not in each process, import what these import.
        load(ROOT / MODULE, compile(source, ROOT / MODULE, "exec"))
        load(ROOT / TESTS, self.tests)
        self.running: dict[int, Trial] = {}

    def start(self, mutant: Mutant | None) -> None:
        names = self.plan.order(mutant.line if mutant else 0)
        source = mutated(self.source, mutant) if mutant else self.source
        directory = self.free.pop()
        (directory / "outcome").write_text("")
        process = os.fork()
        if not process:
            os.setsid()
            quiet = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(quiet, descriptor)
            passed = run_tests(names, directory, source, self.tests, self.plan)
            os._exit(0 if passed else 1)
        self.running[process] = Trial(mutant, directory)

    def next_end(self) -> tuple[Mutant | None, bool, str]:
        """Wait for the end of a trial; returns its mutant, whether it was killed, and how."""
        process, status = os.wait()
        trial = self.running.pop(process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)  # what it has left behind
        self.free.append(trial.directory)
        return trial.mutant, status != 0, (trial.directory / "outcome").read_text()


def results(trials: Trials, chosen: list[Mutant]) -> Iterator[tuple[Mutant | None, bool, str]]:
    waiting: collections.deque[Mutant | None] = collections.deque(chosen)
    while waiting or trials.running:
        while waiting and trials.free:
            trials.start(waiting.popleft())
        yield trials.next_end()


# --- The whole -----------------------------------------------------------------------------------


def harmless() -> set[str]:
    lines = HARMLESS.read_text().splitlines() if HARMLESS.exists() else []
    return {line.strip() for line in lines if "  ->  " in line}


def choose(found: list[Mutant], options: argparse.Namespace) -> list[Mutant]:
    print(f"{len(found)} mutants", flush=True)
    if options.lines:
        first, _, last = options.lines.partition("-")
        found = [mutant for mutant in found if int(first) <= mutant.line <= int(last or first)]
    # In no order, so that those that are done are a fair sample at any time.
    random.Random(options.seed).shuffle(found)  # noqa: S311
    if options.short:
        print(f"a sample of {SAMPLE}, seed {options.seed}", flush=True)
        del found[SAMPLE:]
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--lines", default="")
    options = parser.parse_args()
    source, known = (ROOT / MODULE).read_bytes(), harmless()
    found = list(mutants(source))
    outdated = known - set(map(str, found))
    if outdated:
        sys.exit("\n".join(["in the list, but no mutants:", *sorted(outdated)]))
    chosen = choose(found, options)
    with tempfile.TemporaryDirectory() as directory:
        places = [Path(directory, str(number)) for number in range(1 + (os.cpu_count() or 1))]
        for place in places:
            place.mkdir()
            copy_project(place)
        plan = measure(places.pop())
        print(f"{len(plan.seconds)} tests, {sum(plan.seconds.values()):.0f} s", flush=True)
        trials = Trials(source, plan, places)
        controls: list[Any] = [None] * len(places)
        killed = survived = excused = 0
        for mutant, dead, outcome in results(trials, controls + chosen):
            if mutant is None:
                if dead:
                    sys.exit(f"the tests fail without any mutant:\n{outcome}")
            elif dead:
                killed += 1
            elif str(mutant) in known:
                excused += 1
            else:
                survived += 1
                print(f"{killed} killed; line {mutant.line}: {mutant}", flush=True)
    score = killed / max(1, killed + survived)
    print(f"{killed} killed, {survived} survived, {excused} harmless: {score:.1%}")
    return 0 if score >= (NEEDED_OF_SAMPLE if options.short else NEEDED) else 1


if __name__ == "__main__":
    sys.exit(main())
