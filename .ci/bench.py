# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Measure the inbox beside other servers, which take turns in one run; print Markdown.

    bash .ci/run bench -- --against OLD.py --svg .github/speed.svg    the whole, some 10 minutes
    bash .ci/run bench -- --short                                     to see whether it works

coarinbox and coarnotify's Flask server validate and store the same notification, with a new id
each time, and log to nowhere. The Node server only stores it, and the floor, a bare `http.server`,
only answers 201. Needs Linux, wrk and valgrind.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import platform
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TMPFS, DISK = Path("/dev/shm"), ROOT / ".ci/work"  # noqa: S108, it is where the tmpfs is
REQUEST_REVIEW = {
    "@context": ["https://www.w3.org/ns/activitystreams", "https://coar-notify.net"],
    "id": "urn:uuid:ID",
    "type": ["Offer", "coar-notify:ReviewAction"],
    "actor": {
        "id": "https://orcid.org/0000-0002-1825-0097",
        "name": "Josiah Carberry",
        "type": "Person",
    },
    "origin": {
        "id": "https://repo.example.org/",
        "inbox": "https://repo.example.org/inbox/",
        "type": "Service",
    },
    "target": {
        "id": "https://journal.example.com/",
        "inbox": "http://localhost:PORT/inbox",
        "type": "Service",
    },
    "object": {
        "id": "https://repo.example.org/preprint/421",
        "type": "Page",
        "ietf:cite-as": "https://doi.org/10.5555/421",
        "ietf:item": {
            "id": "https://repo.example.org/preprint/421/content.pdf",
            "type": "Article",
            "mediaType": "application/pdf",
        },
    },
}
BODY = json.dumps(REQUEST_REVIEW)
WRK = shutil.which("wrk") or "wrk"
TYPE = {"Content-Type": "application/ld+json"}


# --- Servers -------------------------------------------------------------------------------------


class Side(NamedTuple):
    name: str
    command: Sequence[str]


NODE_SERVER = """
const {writeFile} = require("fs"), store = process.env.STORE
require("http").createServer((request, response) => {
    const parts = [], path = `${store}/${require("crypto").randomUUID()}.json`
    request.on("data", part => parts.push(part)).on("end", () =>
        writeFile(path, Buffer.concat(parts), () => response.writeHead(201).end()))
}).listen(process.env.PORT, "localhost")
"""
OURS = Side("coarinbox", (sys.executable, str(ROOT / "coarinbox.py")))
FLASK = Side("Flask server", (sys.executable, "-m", "coarnotify.test.server.inbox"))
NODE = Side("Node server", ("node", "-e", NODE_SERVER))
FLOOR = Side("floor", (sys.executable, str(ROOT / ".ci/floor.py")))


class Server(NamedTuple):
    process: subprocess.Popen[bytes]
    port: int
    store: Path
    start: float  # milliseconds from the start to the first 201

    def cpu(self) -> float:
        """Return the CPU time that the process has used so far, in seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Return the resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def stored(self) -> int:
        return len(list(self.store.glob("*.json")))


@contextlib.contextmanager
def running(
    side: Side, place: Path = TMPFS, sync: bool = False, fill: Callable[[Path], None] | None = None
) -> Iterator[Server]:
    """Run a server with a new store, from its first 201 on."""
    with tempfile.TemporaryDirectory(dir=place) as directory:
        store, settings = Path(directory, "store"), Path(directory, "cfg")
        store.mkdir()
        if fill:
            fill(store)
        with socket.create_server(("localhost", 0)) as listener:
            port = int(listener.getsockname()[1])
        # With DEBUG, the Flask server would be a process that restarts another.
        lines = (
            f"STORE_DIR = {str(store)!r}",
            f"PORT = {port}",
            f"FSYNC = {sync}",
            "DEBUG = False",
        )
        settings.write_text("\n".join(lines))
        own = {"COARNOTIFY_SETTINGS": str(settings), "PORT": str(port), "STORE": str(store)}
        start = time.perf_counter()
        process = subprocess.Popen(
            side.command,
            env={**os.environ, **own, "PYTHONHASHSEED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not post(port):
                if process.poll() is not None or time.perf_counter() - start > 60:
                    raise RuntimeError(f"{side.name} does not serve")
                time.sleep(0.001)
            yield Server(process, port, store, (time.perf_counter() - start) * 1000)
            process.terminate()
            process.wait(30)
        finally:
            process.kill()
            process.wait()


def post(port: int, number: int = 1) -> bool:
    """Deliver notifications on one connection; return whether they were accepted."""
    connection = http.client.HTTPConnection("localhost", port, timeout=60)
    with contextlib.closing(connection), contextlib.suppress(ConnectionError):
        for _ in range(number):
            body = BODY.replace("PORT", str(port)).replace("ID", str(uuid.uuid4()))
            connection.request("POST", "/inbox", body, TYPE)
            response = connection.getresponse()
            response.read()
        return response.status == 201
    return False


# --- Load ----------------------------------------------------------------------------------------


class Scenario(NamedTuple):
    title: str
    connections: int
    keep_alive: bool
    place: Path
    sync: bool


SCENARIOS = (
    Scenario("keep-alive, 8 connections", 8, True, TMPFS, False),
    Scenario("keep-alive, 64", 64, True, TMPFS, False),
    Scenario("a connection each, 8", 8, False, TMPFS, False),
    Scenario("`FSYNC` on a disk, 8", 8, True, DISK, True),
    Scenario("`FSYNC` on a disk, 64", 64, True, DISK, True),
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


def load(server: Server, scenario: Scenario, seconds: float) -> Load:
    environment = {
        "BODY": BODY.replace("PORT", str(server.port)),
        "SERIES": str(uuid.uuid4())[:24],
        "CONNECTION": "keep-alive" if scenario.keep_alive else "close",
    }
    stored, cpu = server.stored(), server.cpu()
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT)
        script.flush()
        options = ["-t1", f"-c{scenario.connections}", f"-d{seconds:.0f}s", "-s", script.name]
        output = subprocess.run(
            [WRK, *options, f"http://localhost:{server.port}/inbox"],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout.decode()
    cpu, new = server.cpu() - cpu, server.stored() - stored
    number, duration, p99, failed = map(float, output.partition("measured")[2].split()[:4])
    if failed > number / 100 or (stored and new < number - failed):
        raise RuntimeError(f"of {number:.0f} requests {failed:.0f} failed, {new} were stored")
    return Load(number / duration, cpu / number * 1e6, p99)


class Loads(NamedTuple):
    loads: dict[tuple[Scenario, Side], list[Load]]
    # Milliseconds until the first 201, memory then, and after the load.
    states: dict[Side, list[tuple[float, float, float]]]

    def median(self, scenario: Scenario, side: Side) -> Load:
        return Load(*map(statistics.median, zip(*self.loads[scenario, side])))


def measure_loads(sides: Sequence[Side], rounds: int, seconds: float) -> Loads:
    measured = Loads(*(collections.defaultdict[Any, Any](list) for _ in range(2)))
    for place, _ in [(TMPFS, False), (DISK, True)] * rounds:
        scenarios = [scenario for scenario in SCENARIOS if scenario.place is place]
        # The Flask server never syncs, and stands here for what it costs not to.
        taking_part = [each for each in sides if place is TMPFS or each not in (NODE, FLOOR)]
        for side in random.sample(taking_part, len(taking_part)):
            with running(side, place, scenarios[0].sync) as server:
                memory = server.memory()
                for scenario in scenarios:
                    measured.loads[scenario, side].append(load(server, scenario, seconds))
                if place is TMPFS:
                    measured.states[side].append((server.start, memory, server.memory()))
    return measured


# --- Instructions --------------------------------------------------------------------------------

CACHEGRIND = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
PARSE = f"import json, sys\nfor _ in range(int(sys.argv[1])): json.loads({BODY!r})"


def count_instructions(command: Sequence[str], posts: int) -> int:
    """Count the user instructions of a program, or of a server and some POSTs to it."""
    with tempfile.NamedTemporaryFile("r") as log:
        command = (*CACHEGRIND, f"--log-file={log.name}", *command)
        if posts:
            with running(Side("cachegrind", command)) as server:
                post(server.port, posts)
        else:
            subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}, check=True)
        refs = re.search(r"I\s+refs:\s+([\d,]+)", log.read())
        return int(refs[1].replace(",", "")) if refs else 0


def measure_instructions(sides: Sequence[Side]) -> list[float]:
    """Return what a POST takes on each side, after what parsing its JSON takes.

    Each is the difference of a long and a short run; the counts do not depend on other load.
    """
    few, many = 50, 250
    parse = (sys.executable, "-c", PARSE)
    jobs: list[tuple[Sequence[str], int]] = [((*parse, str(number)), 0) for number in (few, many)]
    jobs += [(side.command, number) for side in sides for number in (few, many)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = list(pool.map(lambda job: count_instructions(*job), jobs))
    return [(long - short) / (many - few) for short, long in zip(counts[::2], counts[1::2])]


# --- Growth --------------------------------------------------------------------------------------

QUERIES = (
    "/deliveries?q=nothing", "/deliveries?status=5xx", "/deliveries?pattern=Accept",
    "/deliveries?limit=50", "/deliveries", "/inbox",
)  # fmt: skip


def measure_growth(side: Side, number: int) -> list[float]:
    """Return the milliseconds of each query, and of a POST, with so many deliveries stored."""
    with running(side) as server:
        (file,) = server.store.glob("*.json")
        body, log = file.read_bytes(), (server.store / "deliveries.jsonl").read_text()

    def fill(store: Path) -> None:
        (store / "body").write_bytes(body)
        with (store / "deliveries.jsonl").open("w") as lines:
            for index in range(number):
                clock = time.strftime("%H%M%S", time.gmtime(index % 86400))
                name = f"20260131_{clock}_{uuid.uuid4().hex}"
                os.link(store / "body", store / f"{name}.json")
                lines.write(log.replace(file.stem, name))
        (store / "body").unlink()

    with running(side, fill=fill) as server:
        times = [min(get(server.port, path) for _ in range(3)) for path in QUERIES]
        start = time.perf_counter()
        post(server.port, 100)
        return [*times, (time.perf_counter() - start) * 10]


def get(port: int, path: str) -> float:
    """Return the milliseconds that a request takes until its answer has been read."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection("localhost", port, timeout=120)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        while response.read(1 << 20):
            pass
    if response.status != 200:
        raise RuntimeError(f"{path} is answered with {response.status}")
    return (time.perf_counter() - start) * 1000


# --- Reports -------------------------------------------------------------------------------------


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    def text(cell: Any) -> str:
        if isinstance(cell, str):
            return cell
        return f"{cell:,.0f}" if cell >= 100 else f"{cell:.3g}"

    print(f"{title}:\n")
    print("| " + " | ".join(head) + " |\n| --- |" + " ---: |" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(map(text, row)) + " |")
    print(flush=True)


def report_loads(measured: Loads, sides: Sequence[Side]) -> None:
    for scenario in SCENARIOS:
        ours, rows = measured.median(scenario, OURS), []
        for side in sides:
            if (scenario, side) in measured.loads:
                load = measured.median(scenario, side)
                rows.append([side.name, *load, ours.rate / load.rate, ours.p99 / load.p99])
        head = ["", "requests/s", "CPU µs each", "p99 ms", "ours / its requests", "ours / its p99"]
        table(scenario.title, head, rows)
    rows = [[side.name, *map(statistics.median, zip(*measured.states[side]))] for side in sides]
    table("Start and memory", ["", "first 201 after ms", "MB then", "MB after the load"], rows)


SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="720" height="104" role="img">
<title>Speed of coarinbox beside the Flask server and a bare http.server</title>
<style>
  text { font: 13px system-ui, sans-serif; fill: #333 }
  rect { fill: #9aa5b1 }
  .ours { fill: #2f6fde }
  @media (prefers-color-scheme: dark) { text { fill: #ddd } rect { fill: #68737f } }
</style>
"""


def draw(measured: Loads) -> str:
    """Draw bars of the requests a second at 8 connections, and of p99 at 64."""
    many, late = "Requests a second, 8 connections", "99 % are answered within, 64 connections"
    svg = SVG
    for left, title, scenario, index, unit in ((0, many, 0, 0, ""), (370, late, 1, 2, " ms")):
        svg += f'<text x="{left}" y="15" font-weight="600">{title}</text>\n'
        sides = (FLASK, OURS, FLOOR)
        values = [measured.median(SCENARIOS[scenario], side)[index] for side in sides]
        for y, side, value in zip((42, 68, 94), sides, values):
            width, kind = round(180 * value / max(values)), "ours" if side is OURS else "other"
            svg += (
                f'<text x="{left}" y="{y}">{side.name}</text>\n'
                f'<rect class="{kind}" x="{left + 90}" y="{y - 14}" width="{width}" height="18"/>\n'
                f'<text x="{left + 96 + width}" y="{y}">{value:,.0f}{unit}</text>\n'
            )
    return svg + "</svg>\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="see whether it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of each load")
    parser.add_argument("--against", type=Path, help="another version of coarinbox.py")
    parser.add_argument("--guard", type=float, help="most instructions of a POST, in JSON parsings")
    parser.add_argument("--svg", type=Path, help="where to draw a graph")
    options = parser.parse_args()
    rounds, seconds, number = options.rounds, options.seconds, 100_000
    if options.short:
        rounds, seconds, number = 1, 1, 2_000
    ours = [OURS]
    if options.against:
        ours.append(Side(options.against.stem, (sys.executable, str(options.against.resolve()))))
    sides = [*ours, FLASK, *([NODE] if shutil.which("node") else []), FLOOR]
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    print(f"{os.cpu_count()} cores of {cpu}, Linux {platform.release()}, ", end="")
    print(
        f"Python {platform.python_version()}; medians of {rounds} rounds of {seconds:g} s each.\n"
    )
    measured = measure_loads(sides, rounds, seconds)
    report_loads(measured, sides)
    if options.svg:
        options.svg.write_text(draw(measured))
    growth = zip((*QUERIES, "POST"), *(measure_growth(side, number) for side in ours))
    head = ["", *(side.name for side in ours)]
    table(f"Milliseconds with {number:,} deliveries", head, [list(row) for row in growth])
    parsing, *posts = measure_instructions(ours)
    rows = [[side.name, each / 1000, each / parsing] for side, each in zip(ours, posts)]
    table("Instructions of a POST", ["", "thousands", "times parsing its JSON"], rows)
    return 1 if options.guard and posts[0] > options.guard * parsing else 0


if __name__ == "__main__":
    sys.exit(main())
