# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Send malformed requests to an inbox, and see whether it stays what it was.

    python .ci/fuzz.py --requests 100000

The same seed makes the same requests. Each answer has to be one of HTTP/1.1 and no 5xx, except for
505 and failures that the request asks for, and the connection has to end in time. In the end the
inbox must have the descriptors that it had, hardly more memory than half-way, no bug in its log,
and every notification that it acknowledged; and it must still serve. Needs Linux.
"""

from __future__ import annotations

import argparse
import collections
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
GROWTH = 5.0  # MB that the memory may grow by in the second half

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
    b"/inbox?status=503", b"/inbox?status=500&times=1", b"/inbox?close=1", b"/inbox?delay=0.01",
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
VERBS = (b"", b"PATCH", b"TRACE", b"post", b"P\x00ST", b"CONNECT", b"X" * 5000, b"__init__")


# --- Changes to them -----------------------------------------------------------------------------


def post_body(body: bytes) -> bytes:
    return post(f"Content-Length: {len(body)}", body=body)


def change_bytes(source: random.Random, request: bytes) -> bytes:
    """Insert, replace, remove or repeat some bytes."""
    start = source.randrange(len(request) + 1)
    end = start + source.choice([0, 1, source.randint(1, 40)])
    odd = [b"", b"\r", b"\n", b"\r\n", b"\x00", b" ", b":", b"\xff", source.randbytes(9)]
    return request[:start] + source.choice([*odd, request[start:end] * 2]) + request[end:]


def truncate(source: random.Random, request: bytes) -> bytes:
    return request[: source.randrange(len(request) + 1)]


def add_line(source: random.Random, request: bytes) -> bytes:
    lines = request.split(b"\r\n")
    lines.insert(source.randrange(1, max(2, len(lines))), source.choice(LINES))
    return b"\r\n".join(lines)


def change_line_ends(source: random.Random, request: bytes) -> bytes:
    return request.replace(b"\r\n", source.choice([b"\n", b"\r", b"\n\r", b" \r\n", b"\r\r\n"]))


def change_target(source: random.Random, request: bytes) -> bytes:
    verb, _, rest = request.partition(b" ")
    return verb + b" " + source.choice(TARGETS) + b" " + rest.partition(b" ")[2]


def change_verb(source: random.Random, request: bytes) -> bytes:
    return source.choice(VERBS) + b" " + request.partition(b" ")[2]


def change_body(source: random.Random, request: bytes) -> bytes:
    return post_body(source.choice(BODIES))


def change_members(source: random.Random, request: bytes) -> bytes:
    document = json.loads(BODY)
    for _ in range(source.randint(1, 4)):
        holder = source.choice([document, *(v for v in document.values() if isinstance(v, dict))])
        holder[source.choice([*holder, "inReplyTo", "actor"])] = json.loads(source.choice(VALUES))
    return post_body(json.dumps(document).encode())


def send_something_else(source: random.Random, request: bytes) -> bytes:
    return source.choice([*ALIEN, source.randbytes(source.randrange(2000))])


CHANGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    change_bytes, change_bytes, change_bytes, truncate, add_line, change_line_ends, change_target,
    change_verb, change_body, change_members, send_something_else,
)  # fmt: skip


def malformed(seed: str) -> bytes:
    """Return a request that is most likely malformed; the same seed makes the same request."""
    source = random.Random(seed)  # noqa: S311, it has to be predictable
    request = source.choice(WELL_FORMED)
    for _ in range(source.choice([1, 1, 1, 2, 3, 5])):
        request = source.choice(CHANGES)(source, request)
    return request


# --- Requests and replies ------------------------------------------------------------------------


class Reply(NamedTuple):
    request: bytes
    received: bytes
    hung: bool

    def statuses(self) -> list[int]:
        return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", self.received)]

    def fault(self) -> str:
        if self.hung:
            return "the connection did not end"
        if self.received and not self.received.startswith(b"HTTP/1.1 "):
            return f"no answer of HTTP/1.1: {self.received[:60]!r}"
        # A client may ask the inbox to fail, with `?status=503`.
        wrong = [status for status in self.statuses() if status >= 500 and status != 505]
        return f"answered with {wrong}" if wrong and b"status=5" not in self.request else ""


def send(port: int, number: int, request: bytes) -> Reply:
    """Send bytes on a new connection, half-close it, and read until the server closes it."""
    received = b""
    with socket.socket() as connection:
        # Ever new addresses and a reset at the end, or the ports of one address would run out.
        connection.bind((f"127.0.{number // 250 % 250}.{number % 250 + 1}", 0))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", port))
        try:
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                received += piece
        except ConnectionError:
            pass
        except OSError:
            return Reply(request, received, hung=True)
    return Reply(request, received, hung=False)


# --- The inbox -----------------------------------------------------------------------------------


class Process(NamedTuple):
    pid: int
    port: int

    def memory(self) -> float:
        """Return the resident memory in MB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def settle(self, expected: int) -> int:
        """Wait until no more descriptors are open than expected, or it is too late."""
        end = time.monotonic() + PATIENCE
        while self.descriptors() > expected and time.monotonic() < end:
            time.sleep(0.05)
        return self.descriptors()


@contextlib.contextmanager
def inbox(directory: Path) -> Iterator[Process]:
    """Run an inbox with its log and its store in a directory; demand that it ends well."""
    log, settings = directory / "log", directory / "cfg"
    settings.write_text(
        f"STORE_DIR = {str(directory / 'store')!r}\nPORT = 0\nFSYNC = False\nREQUEST_TIMEOUT = 5\n"
    )
    command = [sys.executable, "-W", "error", str(ROOT / "coarinbox.py"), "--config", str(settings)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        while not (found := re.search(r"localhost:([0-9]+)/inbox", log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.01)
        yield Process(process.pid, int(found[1]))
        process.terminate()
        if process.wait(PATIENCE):
            raise RuntimeError(f"the inbox ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()


def send_many(port: int, seed: int, numbers: range) -> list[Reply]:
    def send_one(number: int) -> Reply:
        return send(port, number, malformed(f"{seed}/{number}"))

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(send_one, numbers))


def check_files(directory: Path, acknowledged: set[str]) -> Iterator[str]:
    """Yield what is wrong with what the inbox has left behind."""
    found = {path.name for path in (directory / "store").iterdir()}
    missing = {f"{name}.json" for name in acknowledged} - found
    if missing or not acknowledged:
        yield f"of {len(acknowledged)} acknowledged notifications, {len(missing)} are missing"
    odd = [name for name in found if not re.fullmatch(rf"{NAME}\.json|deliveries\.jsonl", name)]
    if odd or len(list(directory.iterdir())) != 3:
        yield f"there are files that should not be: {odd}"
    log = (directory / "log").read_text(errors="replace")
    bug = re.search("Traceback|Warning", log)
    if bug:
        yield f"a bug in its log: {log[max(0, bug.start() - 500) :][:2000]}"


def run(directory: Path, seed: int, number: int) -> Iterator[str]:
    """Send so many requests to an inbox, and yield what is wrong."""
    acknowledged: set[str] = set()
    statuses: collections.Counter[int] = collections.Counter()
    valid = post(LENGTH, "Connection: close")
    with inbox(directory) as process:
        for index in range(CLIENTS):
            send(process.port, index, valid)
        time.sleep(0.5)
        before = process.descriptors()
        memory = []
        for start in range(0, number, number // 10):
            for reply in send_many(process.port, seed, range(start, start + number // 10)):
                if reply.fault():
                    yield f"{reply.fault()}: {reply.request[:200]!r}"
                statuses.update(reply.statuses())
                found = re.findall(rf"Location: \S+({NAME})", reply.received.decode("latin-1"))
                acknowledged.update(found)
            memory.append(process.memory())
        descriptors = process.settle(before)
        started = time.monotonic()
        last = send(process.port, 0, valid)
        if last.statuses() != [201] or time.monotonic() - started > 1:
            yield f"a valid request is answered with {last.received[:200]!r}"
    print(f"{number} requests, answered with {dict(sorted(statuses.items()))}")
    print("memory in MB:", *(f"{size:.1f}" for size in memory))
    if descriptors > before:
        yield f"{before} descriptors have become {descriptors}"
    if memory[-1] > memory[len(memory) // 2] + GROWTH:
        yield "the memory has grown"
    yield from check_files(directory, acknowledged)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        faults = list(run(Path(directory), options.seed, options.requests))
    for fault in faults[:20]:
        print("FAULT:", fault)
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
