#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""How fast the inbox is beside coarnotify's Flask server, measured in turns in one run.

    .ci/work/venv/bin/python .ci/bench.py            the whole, about 15 minutes
    .ci/work/venv/bin/python .ci/bench.py --short    whether it works; its figures mean little

Both servers validate and store the same notification and log to nowhere. The floor is a bare
`http.server` that answers 201 and stores nothing. Prints Markdown. Needs Linux, and coarnotify
and Flask in the environment; the load comes from wrk, or from this program where there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import platform
import random
import selectors
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
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TMPFS, DISK = Path("/dev/shm"), ROOT / ".ci/work"  # noqa: S108, it is where the tmpfs is
CONNECTIONS = (1, 8, 64)
NOTIFICATION = {
    "@context": ["https://www.w3.org/ns/activitystreams", "https://coar-notify.net"],
    "id": "urn:uuid:0370c0fb-bb78-4a9b-87f5-bed307a509dd",
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
        "inbox": "https://journal.example.com/inbox/",
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
BODY = json.dumps(NOTIFICATION).encode()


# --- Servers -------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of server; it is told its port and its store by a configuration file."""

    title: str
    command: Sequence[str]
    place: Path = TMPFS  # of its store
    fsync: bool = False


FLASK_COMMAND = ("-m", "coarnotify.test.server.inbox")
OUR_COMMAND = (str(ROOT / "coarinbox.py"),)
FLASK = Kind("Flask, tmpfs", FLASK_COMMAND)
FLASK_DISK = Kind("Flask, disk", FLASK_COMMAND, DISK)
OURS = Kind("coarinbox, `FSYNC=False`, tmpfs", OUR_COMMAND)
OURS_DISK = Kind("coarinbox, `FSYNC=False`, disk", OUR_COMMAND, DISK)
OURS_SYNCED = Kind("coarinbox, `FSYNC=True`, disk", OUR_COMMAND, DISK, True)
FLOOR = Kind("floor", (str(ROOT / ".ci/floor.py"),))
KINDS = (FLASK, OURS, FLOOR, FLASK_DISK, OURS_DISK, OURS_SYNCED)


class Server(NamedTuple):
    process: subprocess.Popen[bytes]
    port: int
    store: Path
    start: float  # seconds from the start to the first 201

    def memory(self) -> float:
        """The resident memory in MB."""
        return self.status("VmRSS")

    def peak(self) -> float:
        """The most memory that ever was resident, in MB."""
        return self.status("VmHWM")

    def status(self, name: str) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"{name}:")[2].split()[0]) / 1024

    def stored(self) -> int:
        return sum(name.endswith(".json") for name in os.listdir(self.store))

    def get(self, path: str) -> float:
        """Fetch and read an answer; returns the seconds that it took."""
        start = time.perf_counter()
        connection = http.client.HTTPConnection("localhost", self.port)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            while response.read(1 << 20):
                pass
        if response.status != 200:
            raise RuntimeError(f"{path} is answered with {response.status}")
        return time.perf_counter() - start


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(kind: Kind, fill: Callable[[Path], None] = lambda store: None) -> Iterator[Server]:
    """Start a server on a new store and wait for its first 201."""
    with tempfile.TemporaryDirectory(dir=kind.place) as directory:
        store, settings, port = Path(directory, "store"), Path(directory, "cfg"), free_port()
        store.mkdir()
        fill(store)
        settings.write_text(
            f"STORE_DIR = {str(store)!r}\nPORT = {port}\nDEBUG = False\nFSYNC = {kind.fsync}\n"
        )
        command = [sys.executable, *kind.command, *([str(port)] if kind is FLOOR else [])]
        environment = {**os.environ, "COARNOTIFY_SETTINGS": str(settings)}
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while not delivers(port):
                if process.poll() is not None or time.perf_counter() - start > 30:
                    raise RuntimeError(f"{kind.title} does not serve")
            yield Server(process, port, store, time.perf_counter() - start)
        finally:
            process.kill()
            process.wait()


def delivers(port: int) -> bool:
    """Whether a notification is taken; a refused connection is tried again in a millisecond."""
    connection = http.client.HTTPConnection("localhost", port, timeout=30)
    try:
        with contextlib.closing(connection):
            connection.request("POST", "/inbox", BODY, {"Content-Type": "application/ld+json"})
            return connection.getresponse().status == 201
    except ConnectionError:
        time.sleep(0.001)
        return False


# --- Load ----------------------------------------------------------------------------------------


class Load(NamedTuple):
    """What a number of connections achieved."""

    rate: float  # requests a second
    median: float  # milliseconds until an answer
    p99: float
    failed: int  # answers other than 201, and connections that broke


WRK = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/ld+json"
wrk.headers["Connection"] = os.getenv("CONNECTION")
wrk.body = os.getenv("BODY")
function done(summary, latency)
    local errors = summary.errors
    print("measured", summary.requests / summary.duration * 1e6,
        latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
        errors.connect + errors.read + errors.write + errors.status + errors.timeout)
end
"""


def load(server: Server, connections: int, keep_alive: bool, seconds: float) -> Load:
    """Send the notification again and again, on so many connections at once."""
    method = load_by_wrk if shutil.which("wrk") and seconds >= 1 else load_by_hand
    before = server.stored()
    measured = method(server.port, connections, keep_alive, seconds)
    stored = server.stored() - before
    # What was under way at the end may have been stored without being counted.
    if before and stored + 1 < measured.rate * seconds * 0.9:
        raise RuntimeError(f"{measured.rate * seconds:.0f} acknowledged, but {stored} stored")
    return measured


def load_by_wrk(port: int, connections: int, keep_alive: bool, seconds: float) -> Load:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(WRK)
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}", "-s", script.name]
        connection = "keep-alive" if keep_alive else "close"
        output = subprocess.run(
            [*command, f"http://localhost:{port}/inbox"],
            env={**os.environ, "BODY": BODY.decode(), "CONNECTION": connection},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout.decode()
    rate, median, p99, failed = output.partition("measured")[2].split()[:4]
    return Load(float(rate), float(median), float(p99), int(float(failed)))


class Exchange:
    """A connection on which one request after another is sent."""

    def __init__(self, port: int, keep_alive: bool) -> None:
        self.port, self.keep_alive = port, keep_alive
        connection = "keep-alive" if keep_alive else "close"
        head = (
            f"POST /inbox HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: {connection}\r\n"
            f"Content-Type: application/ld+json\r\nContent-Length: {len(BODY)}\r\n\r\n"
        )
        self.request = head.encode() + BODY
        self.connect()

    def connect(self) -> None:
        self.socket = socket.create_connection(("localhost", self.port))
        self.send()

    def send(self) -> None:
        self.start, self.answer = time.perf_counter(), b""
        self.socket.sendall(self.request)

    def receive(self) -> bool | None:
        """Read on; returns None until the answer is there, and then whether it is a 201."""
        octets = self.socket.recv(65536)
        self.answer += octets
        head, end, body = self.answer.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].split()
        if octets and not (end and length and len(body) >= int(length[0])):
            return None
        self.close_after = not octets or b"connection: close" in head.lower()
        return head.split()[1:2] == [b"201"]


def load_by_hand(port: int, connections: int, keep_alive: bool, seconds: float) -> Load:
    latencies: list[float] = []
    failed, end = 0, time.perf_counter() + seconds
    with selectors.DefaultSelector() as selector:
        for _ in range(connections):
            exchange = Exchange(port, keep_alive)
            selector.register(exchange.socket, selectors.EVENT_READ, exchange)
        while time.perf_counter() < end:
            for key, _ in selector.select(1):
                exchange = key.data
                succeeded = exchange.receive()
                if succeeded is None:
                    continue
                latencies.append((time.perf_counter() - exchange.start) * 1000)
                failed += not succeeded
                if keep_alive and not exchange.close_after:
                    exchange.send()
                else:
                    selector.unregister(exchange.socket)
                    exchange.socket.close()
                    exchange.connect()
                    selector.register(exchange.socket, selectors.EVENT_READ, exchange)
        for key in list(selector.get_map().values()):
            key.data.socket.close()
    latencies.sort()
    if not latencies:
        return Load(0, 0, 0, failed)
    p99 = latencies[len(latencies) * 99 // 100]
    return Load(len(latencies) / seconds, statistics.median(latencies), p99, failed)


# --- Measurements --------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("| " + " | ".join(["---"] + ["---:"] * (len(head) - 1)) + " |")
    for row in rows:
        cells = (f"{cell:,.3g}" if isinstance(cell, float) and cell < 100 else cell for cell in row)
        texts = (f"{cell:,.0f}" if isinstance(cell, float) else str(cell) for cell in cells)
        print("| " + " | ".join(texts) + " |")
    print(flush=True)


Measured = dict[tuple[Kind, int, bool], list[Load]]


def measure_loads(rounds: int, seconds: float) -> None:
    """Requests a second and latencies, the servers taking turns; medians of the rounds."""
    loads: Measured = {}
    starts: dict[Kind, list[float]] = {}
    memory: dict[Kind, list[float]] = {}
    for _ in range(rounds):
        for kind in random.sample(KINDS, len(KINDS)):
            with running(kind) as server:
                starts.setdefault(kind, []).append(server.start)
                memory.setdefault(kind, []).append(server.memory())
                for keep_alive, connections in itertools.product((True, False), CONNECTIONS):
                    measured = load(server, connections, keep_alive, seconds)
                    loads.setdefault((kind, connections, keep_alive), []).append(measured)
    for keep_alive in (True, False):
        print(
            f"Requests/s (p50, p99 in ms), {'keep-alive' if keep_alive else 'new connections'}:\n"
        )
        rows = [
            [
                kind.title,
                *(cell(loads[kind, connections, keep_alive]) for connections in CONNECTIONS),
            ]
            for kind in KINDS
        ]
        table(["", *(f"{connections} conn." for connections in CONNECTIONS)], rows)
    print("Start to first 201, and memory then:\n")
    rows = [
        [
            kind.title,
            f"{statistics.median(starts[kind]) * 1000:.0f} ms",
            f"{statistics.median(memory[kind]):.1f} MB",
        ]
        for kind in KINDS
    ]
    table(["", "first 201", "resident"], rows)
    print_ratios(loads, starts)


def cell(loads: Sequence[Load]) -> str:
    rate = statistics.median(load.rate for load in loads)
    median = statistics.median(load.median for load in loads)
    p99 = statistics.median(load.p99 for load in loads)
    failed = sum(load.failed for load in loads)
    return f"{rate:,.0f} ({median:.3g}, {p99:.3g})" + f", {failed} failed" * bool(failed)


def print_ratios(loads: Measured, starts: dict[Kind, list[float]]) -> None:
    def rate(kind: Kind, keep_alive: bool) -> float:
        return statistics.median(load.rate for load in loads[kind, 8, keep_alive])

    def p99(kind: Kind, keep_alive: bool) -> float:
        return statistics.median(load.p99 for load in loads[kind, 64, keep_alive])

    rows = []
    for title, of, to in (
        ("requests/s at 8, no sync, tmpfs / Flask", (OURS, rate), (FLASK, rate)),
        ("requests/s at 8, no sync, tmpfs / floor", (OURS, rate), (FLOOR, rate)),
        ("requests/s at 8, synced, disk / Flask", (OURS_SYNCED, rate), (FLASK_DISK, rate)),
        ("p99 at 64, no sync, tmpfs / Flask", (OURS, p99), (FLASK, p99)),
        ("p99 at 64, synced, disk / Flask", (OURS_SYNCED, p99), (FLASK_DISK, p99)),
    ):
        ratios = (of[1](of[0], keep) / to[1](to[0], keep) for keep in (True, False))
        rows.append([title, *(f"{ratio:.2f}" for ratio in ratios)])
    start = statistics.median(starts[OURS]) / statistics.median(starts[FLASK])
    rows.append(["time to the first 201 / Flask", f"{start:.2f}", f"{start:.2f}"])
    print("Ratios:\n")
    table(["", "keep-alive", "new"], rows)


def measure_memory(requests: int) -> None:
    """The resident memory while many notifications come, on 8 connections."""
    rows = []
    for kind in (FLASK, OURS):
        with running(kind) as server:
            figures = [server.memory()]
            for part in (requests // 5, requests):
                while server.stored() < part:
                    load(server, 8, True, 2 if requests > 10_000 else 0.2)
                figures.append(server.memory())
        rows.append([kind.title, *(f"{figure:.1f}" for figure in figures)])
    print("Resident memory in MB:\n")
    table(["", "at rest", f"after {requests // 5:,} POSTs", f"after {requests:,}"], rows)


def fill(store: Path, number: int) -> None:
    """Put so many notifications, and their deliveries, into a store."""
    with open(store / "deliveries.jsonl", "w") as log:
        for index in range(number):
            name = f"20260131_{index // 3600 % 24:02}{index // 60 % 60:02}{index % 60:02}_"
            name += uuid.uuid4().hex
            (store / f"{name}.json").write_bytes(BODY)
            delivery = {
                "name": name,
                "time": "2026-01-31T00:00:00.000Z",
                "client": "127.0.0.1",
                "target": "/inbox",
                "headers": {"Host": "localhost"},
                "status": 201,
                "detail": "",
                "pattern": "Request Review",
                "about": {"id": NOTIFICATION["id"]},
                "findings": [],
                "simulated": False,
            }
            log.write(json.dumps(delivery) + "\n")


def measure_stored(few: int, many: int, seconds: float) -> None:
    """What requests cost with few and with many notifications stored, in turns."""
    rows: list[list[object]] = []
    with (
        running(OURS, lambda store: fill(store, few)) as small,
        running(OURS, lambda store: fill(store, many)) as large,
    ):
        servers = (small, large)
        for path in ("/", "/deliveries?limit=50"):
            times = [[server.get(path) for server in servers] for _ in range(50)]
            rows.append(
                compare(
                    f"`GET {path}`, ms", *(statistics.median(each) * 1000 for each in zip(*times))
                )
            )
        loads = [[load(server, 8, True, seconds) for server in servers] for _ in range(5)]
        rates = [statistics.median(each.rate for each in column) for column in zip(*loads)]
        rows.append(compare("`POST /inbox`, requests/s at 8", *rates))
        before = [server.peak() for server in servers]
        rows.append(
            compare("`GET /inbox`, ms", *(server.get("/inbox") * 1000 for server in servers))
        )
        grown = [server.peak() - peak for server, peak in zip(servers, before)]
        rows.append(compare("`GET /inbox`, MB of memory more than before", *grown))
    print("Requests with so many notifications stored (tmpfs, `FSYNC=False`):\n")
    table(["", f"{few:,}", f"{many:,}", "ratio"], rows)


def compare(title: str, few: float, many: float) -> list[object]:
    return [title, few, many, f"{many / few:.2f}" if few else ""]


def machine() -> str:
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    load_from = "wrk" if shutil.which("wrk") else "its own generator"
    return (
        f"{os.cpu_count()} cores of {cpu}, Linux {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}, load from {load_from}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="see whether it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of each load")
    options = parser.parse_args()
    rounds, seconds = (1, 0.2) if options.short else (options.rounds, options.seconds)
    DISK.mkdir(exist_ok=True)
    print(f"{machine()}; medians of {rounds} rounds of {seconds:g} s each.\n")
    measure_loads(rounds, seconds)
    measure_memory(500 if options.short else 50_000)
    measure_stored(100, 1000 if options.short else 100_000, seconds)


if __name__ == "__main__":
    main()
