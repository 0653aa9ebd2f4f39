# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Measure the inbox beside other servers, which take turns in one run; print Markdown.

    bash .ci/run bench -- --against OLD.py --svg .github/speed.svg    the whole, some 10 minutes
    bash .ci/run bench -- --short                                     to see whether it works

coarinbox and coarnotify's Flask server validate and store the same notification, each with a new
id. The Node server only stores it; the floor, a bare `http.server`, only answers 201.
"""

import argparse
import collections
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from servers import BODY, DISK, FLASK, FLOOR, NODE, OURS, TMPFS, Server, post, running

Sides = dict[str, Sequence[str]]  # the commands of the servers


class Scenario(NamedTuple):
    title: str
    connections: int
    keep_alive: bool = True
    place: Path = TMPFS  # with FSYNC on the disk only


SCENARIOS = (
    Scenario("Keep-alive, 8 connections", 8),
    Scenario("Keep-alive, 64 connections", 64),
    Scenario("A connection each, 8 at once", 8, keep_alive=False),
    Scenario("`FSYNC` on a disk, 8 connections", 8, place=DISK),
    Scenario("`FSYNC` on a disk, 64 connections", 64, place=DISK),
)
SCRIPT = """
local before, after = os.getenv("BODY"):match("^(.*)ID(.*)$")
local series, count = os.getenv("SERIES"), 0
wrk.headers["Content-Type"] = "application/ld+json"
wrk.headers["Connection"] = os.getenv("CONNECTION")
function request()
    count = count + 1
    return wrk.format("POST", nil, nil, before .. series .. ("%012d"):format(count) .. after)
end
function done(summary, latency)
    local errors = summary.errors
    print("measured", summary.requests, summary.duration / 1e6, latency:percentile(99) / 1e3,
        errors.connect + errors.read + errors.write + errors.status + errors.timeout)
end
"""


class Load(NamedTuple):
    rate: float  # requests a second
    cpu: float  # microseconds of the server for each
    p99: float  # milliseconds


Loads = dict[tuple[Scenario, str], Load]
States = dict[str, list[float]]  # first 201, memory then, memory after the load, what is stored


def load(server: Server, scenario: Scenario, seconds: float) -> Load:
    environment = {
        "BODY": BODY.replace("PORT", str(server.port)),
        "SERIES": str(uuid.uuid4())[:24],  # the first part of each id
        "CONNECTION": "keep-alive" if scenario.keep_alive else "close",
    }
    stored, cpu = len(os.listdir(server.store)), server.cpu()
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT)
        script.flush()
        wrk = ["wrk", "-t1", f"-c{scenario.connections}", f"-d{seconds:.0f}s", "--timeout=30s"]
        wrk += [f"--script={script.name}", f"http://localhost:{server.port}/inbox"]
        output = subprocess.check_output(wrk, env={**os.environ, **environment}, text=True)
    cpu, new = server.cpu() - cpu, len(os.listdir(server.store)) - stored
    number, duration, p99, failed = map(float, output.partition("measured")[2].split()[:4])
    if failed > number / 100 or (stored and new < number - failed):
        raise RuntimeError(f"of {number:.0f} requests {failed:.0f} failed, {new} were stored")
    return Load(number / duration, cpu / number * 1e6, p99)


def measure_loads(sides: Sides, rounds: int, seconds: float) -> tuple[Loads, States]:
    """Return the medians of some rounds, in which the servers take turns in random order."""
    loads, states = collections.defaultdict(list), collections.defaultdict(list)
    for place in [TMPFS, DISK] * rounds:
        # On a disk, the Flask server shows what is lost by syncing, as it never does.
        present = [side for side in sides if place is TMPFS or side not in ("Node", "http.server")]
        for side in random.sample(present, len(present)):
            with running(sides[side], place, FSYNC=place is DISK) as server:
                memory = server.memory()
                for scenario in SCENARIOS:
                    if scenario.place is place:
                        loads[scenario, side].append(load(server, scenario, seconds))
                if place is TMPFS:
                    stored = len(os.listdir(server.store))
                    states[side].append((server.start, memory, server.memory(), stored))
    keys = [(scenario, side) for scenario in SCENARIOS for side in sides]
    medians = {key: Load(*map(statistics.median, zip(*loads[key]))) for key in keys if loads[key]}
    return medians, {side: list(map(statistics.median, zip(*states[side]))) for side in sides}


CACHEGRIND = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
PARSE = f"import json, sys\nfor _ in range(int(sys.argv[1])): json.loads({BODY!r})"
FEW, MANY = 50, 250  # the longer run minus the shorter one leaves out start and end


def measure_instructions(command: Sequence[str]) -> float:
    """Count the user instructions of a POST to a server, or of one turn of the program PARSE."""
    counts = []
    for number in (FEW, MANY):
        with tempfile.NamedTemporaryFile("r") as log:
            traced = (*CACHEGRIND, f"--log-file={log.name}", *command)
            if PARSE in command:
                subprocess.run([*traced, str(number)], check=True)
            else:
                with running(traced, FSYNC=False) as server:
                    post(server.port, number)
            counts.append(int(log.read().partition("refs:")[2].split()[0].replace(",", "")))
    return (counts[1] - counts[0]) / (MANY - FEW)


QUERIES = (
    "/deliveries?limit=50", "/deliveries", "/inbox", "/deliveries?q=nothing",
    "/deliveries?status=5xx", "/deliveries?pattern=Accept", "/deliveries?origin=nobody",
)  # fmt: skip


def measure_growth(command: Sequence[str], number: int) -> list[float]:
    """Return the milliseconds of each query, and of a POST, with so many deliveries stored."""
    with running(command) as server:
        (file,) = server.store.glob("*.json")
        body, log = file.read_bytes(), (server.store / "deliveries.jsonl").read_text()

    def fill(store: Path) -> None:
        """Multiply the delivery of the other server, whatever its line in the log is."""
        (store / "body").write_bytes(body)
        with (store / "deliveries.jsonl").open("w") as lines:
            for index in range(number):
                name = f"20260131_{index:06}_{uuid.uuid4().hex}"
                os.link(store / "body", store / f"{name}.json")
                lines.write(log.replace(file.stem, name))

    with running(command, fill=fill, FSYNC=False) as server:
        times = [min(get(server.port, path) for _ in range(3)) for path in QUERIES]
        start = time.perf_counter()
        post(server.port, 100)
        return [*times, (time.perf_counter() - start) / 100 * 1000]


def get(port: int, path: str) -> float:
    """Return the milliseconds until an answer has been read; NaN if a version does not know it."""
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(f"http://localhost:{port}{path}") as answer:
            while answer.read(1 << 20):
                pass
    except urllib.error.HTTPError:
        return math.nan
    return (time.perf_counter() - start) * 1000


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print(f"{title}:\n\n| | {' | '.join(head)} |\n| --- |{' ---: |' * len(head)}")
    for name, *values in rows:
        texts = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)
        print(f"| {name} | {' | '.join(texts)} |")
    print(flush=True)


def report_loads(loads: Loads) -> None:
    head = ("requests/s", "CPU µs each", "p99 ms", "ours / its requests/s", "ours / its p99")
    for scenario in SCENARIOS:
        ours, rows = loads[scenario, "coarinbox"], []
        for (each, side), load in loads.items():
            if each == scenario:
                rows.append([side, *load, ours.rate / load.rate, ours.p99 / load.p99])
        table(scenario.title, head, rows)


SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="720" height="124" role="img" aria-labelledby="t d">
<title id="t">Speed of coarinbox beside the Flask server and a bare http.server</title>
<desc id="d">DESCRIPTION</desc>
<style>
  text { font: 13px system-ui, sans-serif; fill: #333 } .title { font-weight: 600 }
  .paper { fill: #fff } .bar { fill: #9aa5b1 } .coarinbox { fill: #2f6fde }
  @media (prefers-color-scheme: dark) {
    text { fill: #ddd } .paper { fill: #16191d } .bar { fill: #68737f } .coarinbox { fill: #5b93f5 }
  }
</style>
<rect class="paper" width="720" height="124" rx="6"/>
BARS
</svg>
"""
CHARTS = (
    ("Requests a second, 8 connections", SCENARIOS[0], "rate", "{:,.0f}"),
    ("99 % are answered within, 64 connections", SCENARIOS[1], "p99", "{:,.0f} ms"),
)


def draw(loads: Loads) -> str:
    """Draw bars with their numbers, which the description holds for screen readers."""
    bars, description, sides = "", "", ("Flask", "coarinbox", "http.server")
    for x, (title, scenario, name, form) in zip((16, 376), CHARTS):
        values = [getattr(loads[scenario, side], name) for side in sides]
        labels = list(map(form.format, values))
        description += f"{title}: {', '.join(map(' '.join, zip(sides, labels)))}. "
        bars += f'<text class="title" x="{x}" y="24">{title}</text>\n'
        for y, side, value, label in zip((52, 78, 104), sides, values, labels):
            width = round(180 * value / max(values))
            bars += (
                f'<text x="{x}" y="{y}">{side}</text>\n'
                f'<rect class="bar {side}" x="{x + 90}" y="{y - 14}" width="{width}" height="18"/>'
                f'\n<text x="{x + 96 + width}" y="{y}">{label}</text>\n'
            )
    return SVG.replace("DESCRIPTION", description.strip()).replace("BARS", bars)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="see whether it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another version of coarinbox.py")
    parser.add_argument("--guard", type=float, help="most instructions of a POST, in JSON parsings")
    parser.add_argument("--svg", type=Path, help="where to draw a graph")
    options = parser.parse_args()
    rounds, seconds, number = (1, 1, 2_000) if options.short else (options.rounds, 4, 100_000)
    ours: Sides = {"coarinbox": OURS}
    if options.against:
        ours[options.against.stem] = (sys.executable, str(options.against.resolve()))
    node: Sides = {"Node": NODE} if shutil.which("node") else {}
    sides: Sides = {**ours, "Flask": FLASK, **node, "http.server": FLOOR}
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; medians of {rounds} rounds of {seconds} s each.\n")
    loads, states = measure_loads(sides, rounds, seconds)
    report_loads(loads)
    head = ["first 201 after ms", "MB then", "MB after the load", "notifications by then"]
    table("Start and memory", head, [[side, *state] for side, state in states.items()])
    if options.svg:
        options.svg.write_text(draw(loads))
    growth = zip((*QUERIES, "POST"), *(measure_growth(each, number) for each in ours.values()))
    table(f"Milliseconds with {number:,} deliveries", list(ours), list(growth))
    parsing = measure_instructions((sys.executable, "-c", PARSE))
    posts = {side: measure_instructions(command) for side, command in ours.items()}
    counts = [[side, post / 1000, post / parsing] for side, post in posts.items()]
    table("Instructions of a POST", ["thousands", "times parsing its JSON"], counts)
    if options.guard and posts["coarinbox"] > options.guard * parsing:
        print(f"a POST takes more than {options.guard:g} times what parsing its JSON takes")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
