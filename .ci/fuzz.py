#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Send malformed requests to an inbox, and see whether it stays what it was.

    python .ci/fuzz.py            100,000 requests, some minutes
    python .ci/fuzz.py --short    5,000

The same seed makes the same requests. Every answer must be one of HTTP/1.1, none a 5xx but 505,
and the connection must end in time. In the end the inbox must have the threads and descriptors
that it had, hardly more memory than half-way, nothing in its log about faults of its own,
and every notification that it acknowledged, and it must still serve. Needs Linux.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NAME = r"[0-9]{8}_[0-9]{6}_[0-9a-f]{32}"
CLIENTS = 8  # at once
PATIENCE = 10.0  # seconds until a connection counts as hung
GROWTH = 5.0  # MB that memory may grow by in the second half
ALLOWED = {505}  # of the statuses from 500 on

NOTIFICATION = {
    "@context": ["https://www.w3.org/ns/activitystreams", "https://coar-notify.net"],
    "id": "urn:uuid:0370c0fb-bb78-4a9b-87f5-bed307a509dd",
    "type": ["Announce", "coar-notify:ReviewAction"],
    "origin": {"id": "https://journal.example.com/", "type": "Service"},
    "target": {"id": "https://repo.example.org/", "type": "Service"},
    "object": {"id": "https://journal.example.com/review/7", "type": "Page"},
    "context": {"id": "https://repo.example.org/preprint/421"},
}
BODY = json.dumps(NOTIFICATION).encode()


# --- Requests ------------------------------------------------------------------------------------


def post(*lines: str, body: bytes = BODY, target: str = "/inbox") -> bytes:
    head = [f"POST {target} HTTP/1.1", "Host: localhost", "Content-Type: application/ld+json"]
    return "\r\n".join([*head, *lines, "", ""]).encode() + body


def get(target: str, verb: str = "GET", *lines: str) -> bytes:
    return "\r\n".join([f"{verb} {target} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


LENGTH = f"Content-Length: {len(BODY)}"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
WELL_FORMED = (
    post(LENGTH),
    post(LENGTH) * 2,
    post(LENGTH, "Expect: 100-continue"),
    post("Transfer-Encoding: chunked", body=CHUNKS),
    post(LENGTH, target="http://localhost/inbox"),
    post(LENGTH, target="/inbox?close=1"),
    post(LENGTH, "Authorization: Basic eDp5"),
    get("/"),
    get("/", "GET", "Accept: text/html;q=0.9, */*;q=0.1"),
    get("/inbox", "HEAD"),
    get("/deliveries?limit=2&status=4xx&q=x"),
    get("/inbox/20260101_000000_" + "0" * 32),
    get("/constraints", "PUT"),
    get("/constraints", "OPTIONS"),
    post(LENGTH) + get("/inbox", "HEAD"),
)
LINES = (
    b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: +5", b"Content-Length: 5, 6",
    b"Content-Length: 99999999999999999999999", b"Content-Length: 0x10", b"Content-Length:",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: x",
    b"Transfer-Encoding : chunked", b" Transfer-Encoding: chunked", b"Transfer-Encoding:\tchunked",
    b"Content-Length : 5", b"X: y\r\n z", b"X: y\n Content-Length: 5", b"X: y\rContent-Length: 5",
    b"X\x00: y", b"X: \x00", b"X: \xff\xfe", b": empty", b"no colon", b"X: " + b"y" * 70_000,
    b"\r\n".join([b"X: y"] * 200), b"Host: evil.example", b"Host: ", b"Host: [::1", b"Host: a b",
    b"Expect: 100-continue", b"Expect: x", b"Connection: close", b"Connection: keep-alive, x",
    b"Content-Encoding: gzip", b"Content-Type: text/plain", b"Content-Type: application/" * 9,
    b"Authorization: Basic !!!", b"Authorization: Bearer \xff", b"Upgrade: h2c", b"Origin: null",
    b"Sec-Fetch-Site: cross-site", b"Accept: " + b"a/b;q=" * 999, b"Accept: ,;=\"", b"Cookie: x",
)  # fmt: skip
TARGETS = (
    b"/../../etc/passwd", b"/inbox/../../x", b"/inbox/..%2f..%2fx", b"/inbox/%2e%2e/x", b"//inbox",
    b"/inbox/%00", b"/inbox\\..\\x", b"/inbox/..;/x", b"/%69nbox", b"*", b"inbox", b"?", b"#",
    b"/inbox#x",
    b"http://", b"http://evil.example/inbox", b"http:///inbox", b"https://localhost:x/inbox",
    b"/inbox?",
    b"/inbox?status=999", b"/inbox?status=%ff", b"/inbox?&&&=", b"/deliveries?limit=0",
    b"/" + b"a" * 70_000,
    b"/deliveries?since=x", b"/deliveries?q=%00%ff", b"/deliveries/..", b"/deliveries/x/body",
)  # fmt: skip
BODIES = (
    b"", b"null", b"[]", b"{}", b"{" * 200, b"[" * 5000, b'{"a":' * 99 + b"1" + b"}" * 99, b"NaN",
    b'{"id": 1e999}', b'{"id": "\\ud800"}', b"\xef\xbb\xbf{}", b"\xff", b'{"type": [[[]]]}',
    b"1" * 5000,
    b'{"type": "Accept", "object": {"type": "Accept", "object": {"type": "Offer"}}}', b"\x00" * 9,
    b'{"id": "http://[::1"}', b'{"origin": {"id": "http://\\u0000"}}', b'{"a": 1, "a": 2}',
    b'"\\u202e"',
)  # fmt: skip
VALUES = (
    "null", "5", "true", "[]", "{}", "-1e300", r'["Announce", 5]', '""', '"x"', '"http://"',
    r'"\ud800"', r'"\u0000"', '"http://[::1"', '"urn:uuid:5"', '["Offer", "ReviewAction"]',
)  # fmt: skip
ALIEN = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\r\n", b"GET / HTTP/0.9\r\n\r\n", b"\r\n" * 50,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 80, b"\x00" * 100, b"SSH-2.0-x\r\n",
    b"GET / HTTP/1.10\r\n\r\n", b"GET  / HTTP/1.1\r\n\r\n", b"get / http/1.1\r\n\r\n", b"",
)  # fmt: skip


def flip(random: random.Random, octets: bytes) -> bytes:
    place = random.randrange(len(octets) + 1)
    return octets[:place] + bytes([random.randrange(256)]) + octets[place + 1 :]


def insert(random: random.Random, octets: bytes) -> bytes:
    place = random.randrange(len(octets) + 1)
    added = random.choice(
        [b"\r", b"\n", b"\r\n", b"\x00", b" ", b":", b"\xff", random.randbytes(9)]
    )
    return octets[:place] + added + octets[place:]


def remove(random: random.Random, octets: bytes) -> bytes:
    place = random.randrange(len(octets) + 1)
    return octets[:place] + octets[place + random.randint(1, 40) :]


def repeat(random: random.Random, octets: bytes) -> bytes:
    place = random.randrange(len(octets) + 1)
    return octets[: place + random.randint(1, 40)] + octets[place:]


def truncate(random: random.Random, octets: bytes) -> bytes:
    return octets[: random.randrange(len(octets) + 1)]


def add_line(random: random.Random, octets: bytes) -> bytes:
    lines = octets.split(b"\r\n")
    lines.insert(random.randrange(1, max(2, len(lines))), random.choice(LINES))
    return b"\r\n".join(lines)


def end_lines_otherwise(random: random.Random, octets: bytes) -> bytes:
    return octets.replace(b"\r\n", random.choice([b"\n", b"\r", b"\n\r", b" \r\n", b"\r\r\n"]))


def change_target(random: random.Random, octets: bytes) -> bytes:
    verb, _, rest = octets.partition(b" ")
    return verb + b" " + random.choice(TARGETS) + b" " + rest.partition(b" ")[2]


def change_verb(random: random.Random, octets: bytes) -> bytes:
    verbs = (b"", b"PATCH", b"TRACE", b"post", b"P\x00ST", b"CONNECT", b"X" * 5000, b"__init__")
    return random.choice(verbs) + b" " + octets.partition(b" ")[2]


def change_body(random: random.Random, octets: bytes) -> bytes:
    body = random.choice(BODIES)
    return post(f"Content-Length: {len(body)}", body=body)


def edit_json(random: random.Random, octets: bytes) -> bytes:
    document = json.loads(BODY)
    for _ in range(random.randint(1, 4)):
        holder = random.choice([document, *(v for v in document.values() if isinstance(v, dict))])
        holder[random.choice([*holder, "inReplyTo", "actor"])] = json.loads(random.choice(VALUES))
    body = json.dumps(document).encode()
    return post(f"Content-Length: {len(body)}", body=body)


def alien(random: random.Random, octets: bytes) -> bytes:
    return random.choice([*ALIEN, random.randbytes(random.randrange(2000))])


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    flip, insert, remove, repeat, truncate, add_line, end_lines_otherwise, change_target,
    change_verb, change_body, edit_json, alien,
)  # fmt: skip


def malformed(seed: str) -> bytes:
    """Make a request that is most likely malformed; the same for the same seed."""
    source = random.Random(seed)  # noqa: S311, it is to be predictable
    octets = source.choice(WELL_FORMED)
    for _ in range(source.choice([1, 1, 1, 2, 3, 5])):
        octets = source.choice(MUTATIONS)(source, octets)
    return octets


# --- Answers -------------------------------------------------------------------------------------


class Reply(NamedTuple):
    """What came back for a request."""

    octets: bytes
    hung: bool

    def statuses(self) -> list[int]:
        return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", self.octets)]

    def fault(self) -> str:
        if self.hung:
            return "the connection did not end"
        if self.octets and not self.octets.startswith(b"HTTP/1.1 "):
            return f"no answer of HTTP/1.1: {self.octets[:60]!r}"
        wrong = {status for status in self.statuses() if status >= 500} - ALLOWED
        return f"answered with {wrong}" if wrong else ""


def send(port: int, number: int, octets: bytes) -> Reply:
    """Send octets on a connection of their own, and nothing more; read until the server ends it."""
    received = b""
    with socket.socket() as connection:
        # From ever new addresses, or there would be no ports left; and reset for the same reason.
        connection.bind((f"127.0.{number // 250 % 250}.{number % 250 + 1}", 0))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", port))
        try:
            with contextlib.suppress(ConnectionError):
                connection.sendall(octets)
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                received += piece
        except ConnectionError:
            pass
        except OSError:
            return Reply(received, hung=True)
    return Reply(received, hung=False)


# --- The inbox -----------------------------------------------------------------------------------


class State(NamedTuple):
    memory: float  # MB
    threads: int
    descriptors: int


def state(process: int) -> State:
    status = Path(f"/proc/{process}/status").read_text()
    memory, threads = (
        int(status.partition(f"{name}:")[2].split()[0]) for name in ("VmRSS", "Threads")
    )
    return State(memory / 1024, threads, len(os.listdir(f"/proc/{process}/fd")))


def settled(process: int, before: State) -> State:
    """Wait until the descriptors are those of before, at most until a connection counts as hung."""
    end = time.monotonic() + PATIENCE
    while (now := state(process)).descriptors > before.descriptors and time.monotonic() < end:
        time.sleep(0.05)
    return now


@contextlib.contextmanager
def inbox(directory: Path) -> Iterator[tuple[int, int, Path]]:
    """Run an inbox; gives its process, its port, and the file with its log."""
    log, store = directory / "log", directory / "store"
    settings = directory / "cfg"
    settings.write_text(f"STORE_DIR = {str(store)!r}\nPORT = 0\nFSYNC = False\nREQUEST_TIMEOUT = 5")
    command = [sys.executable, "-W", "error", str(ROOT / "coarinbox.py"), "--config", str(settings)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        while not (found := re.search(r"localhost:([0-9]+)/inbox", log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.01)
        yield process.pid, int(found[1]), log
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()


def run(seed: int, number: int) -> list[str]:
    """Send so many requests; returns what was wrong."""
    faults = []
    with tempfile.TemporaryDirectory() as directory, inbox(Path(directory)) as (pid, port, log):
        store, valid = Path(directory, "store"), post(LENGTH, "Connection: close")
        for index in range(CLIENTS):
            send(port, index, valid)
        before = warm = settled(pid, State(0, 0, 0)._replace(descriptors=6))

        def one(index: int) -> tuple[bytes, Reply]:
            request = malformed(f"{seed}/{index}")
            return request, send(port, index, request)

        acknowledged: set[str] = set()
        statuses: dict[int, int] = {}
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            for start in range(0, number, 1000):
                for request, reply in pool.map(one, range(start, min(start + 1000, number))):
                    if reply.fault():
                        faults.append(f"{reply.fault()}: {request[:200]!r}")
                    for status in reply.statuses():
                        statuses[status] = statuses.get(status, 0) + 1
                    acknowledged |= set(
                        re.findall(rf"Location: \S+({NAME})", reply.octets.decode("latin-1"))
                    )
                if start <= number // 2:
                    warm = settled(pid, before)
        after = settled(pid, before)
        started = time.monotonic()
        last = send(port, 0, valid)
        print(f"{number} requests, answered with {dict(sorted(statuses.items()))}")
        print(f"before {before}\nhalf-way {warm}\nafter {after}")
        if last.statuses() != [201] or time.monotonic() - started > 1:
            faults.append(f"a valid request is answered with {last.octets[:200]!r}")
        if after.descriptors > before.descriptors:
            faults.append("descriptors are left")
        if after.threads > before.threads + CLIENTS:
            faults.append("threads are left")
        if number >= 10_000 and after.memory > warm.memory + GROWTH:
            faults.append("memory has grown")
        missing = [name for name in acknowledged if not (store / f"{name}.json").is_file()]
        if missing or not acknowledged:
            faults.append(f"of {len(acknowledged)} acknowledged, {len(missing)} are missing")
        alien_files = [
            path.name
            for path in store.iterdir()
            if not re.fullmatch(rf"{NAME}\.json|deliveries\.jsonl", path.name)
        ]
        if alien_files or len(list(Path(directory).iterdir())) != 3:
            faults.append(f"there are files that should not be: {alien_files}")
        text = log.read_text(errors="replace")
        if "fault" in text or "Traceback" in text or "Warning" in text:
            faults.append("its log: " + text[max(0, text.find("Traceback") - 500) :][:2000])
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    faults = run(options.seed, 5_000 if options.short else 100_000)
    for fault in faults[:20]:
        print("FAULT:", fault)
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
