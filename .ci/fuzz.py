# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Send malformed requests to an inbox, and see whether it stays what it was.

    bash .ci/run fuzz -- --requests 100000

The same seed makes the same requests. Each answer has to be one of HTTP/1.1 and no 5xx, but 505 and
failures that the request asks for, and the connection has to end in time. In the end the inbox must
serve, with the descriptors that it had, little more memory, no bug, and all that it acknowledged.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import re
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from servers import BODY as REQUEST_REVIEW
from servers import OURS, Server, post, running

NAME = r"[0-9]{8}_[0-9]{6}_[0-9a-f]{32}"
CLIENTS = 8  # at once
PATIENCE = 10.0  # seconds until a connection counts as hung
GROWTH = 5.0  # MB that the memory may grow by in the last 10,000 requests: some are stored
UUID = "0370c0fb-bb78-4a9b-87f5-bed307a509dd"
BODY = REQUEST_REVIEW.replace("PORT", "5005").replace("ID", UUID).encode()


def head(verb: str, target: str, *lines: str) -> bytes:
    return "\r\n".join([f"{verb} {target} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def deliver(*lines: str, body: bytes = BODY, target: str = "/inbox") -> bytes:
    return head("POST", target, "Content-Type: application/ld+json", *lines) + body


def deliver_body(body: bytes) -> bytes:
    return deliver(f"Content-Length: {len(body)}", body=body)


LENGTH = f"Content-Length: {len(BODY)}"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
WELL_FORMED = (
    deliver(LENGTH), deliver(LENGTH) * 2, deliver(LENGTH, "Expect: 100-continue"),
    deliver("Transfer-Encoding: chunked", body=CHUNKS), deliver(LENGTH, target="/inbox?close=1"),
    deliver(LENGTH, target="http://localhost/inbox"), deliver(LENGTH, "Authorization: Basic eDp5"),
    deliver(LENGTH) + head("HEAD", "/inbox"), head("HEAD", "/inbox"), head("PUT", "/constraints"),
    head("OPTIONS", "/constraints"), head("GET", "/deliveries?limit=2&status=4xx&q=x"),
    head("GET", "/"), head("GET", "/", "Accept: text/html;q=0.9, */*;q=0.1"),
    head("GET", "/inbox/20260101_000000_" + "0" * 32),
)  # fmt: skip
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
    b"/inbox#x", b"http://", b"http://evil.example/inbox", b"http:///inbox",
    b"https://localhost:x/inbox", b"/inbox?", b"/inbox?status=999", b"/inbox?status=%ff",
    b"/inbox?&&&=", b"/deliveries?limit=0", b"/" + b"a" * 70_000, b"/deliveries?since=x",
    b"/deliveries?q=%00%ff", b"/deliveries/..", b"/deliveries/x/body", b"/inbox?status=503",
    b"/inbox?status=500&times=1", b"/inbox?close=1", b"/inbox?delay=0.01",
)  # fmt: skip
BODIES = (
    b"", b"null", b"[]", b"{}", b"{" * 200, b"[" * 5000, b'{"a":' * 99 + b"1" + b"}" * 99, b"NaN",
    b'{"id": 1e999}', b'{"id": "\\ud800"}', b"\xef\xbb\xbf{}", b"\xff", b'{"type": [[[]]]}',
    b"1" * 5000, b'{"type": "Accept", "object": {"type": "Accept", "object": {"type": "Offer"}}}',
    b"\x00" * 9, b'{"id": "http://[::1"}', b'{"origin": {"id": "http://\\u0000"}}',
    b'{"a": 1, "a": 2}', b'"\\u202e"',
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
LINE_ENDS = (b"\n", b"\r", b"\n\r", b" \r\n", b"\r\r\n")
VERBS = (b"", b"PATCH", b"TRACE", b"post", b"P\x00ST", b"CONNECT", b"X" * 5000, b"__init__")


def change_bytes(source: random.Random, request: bytes) -> bytes:
    """Insert, replace, remove or repeat some bytes."""
    start = source.randrange(len(request) + 1)
    end = start + source.choice([0, 1, source.randint(1, 40)])
    odd = [b"", b"\r", b"\n", b"\r\n", b"\x00", b" ", b":", b"\xff", source.randbytes(9)]
    return request[:start] + source.choice([*odd, request[start:end] * 2]) + request[end:]


def add_line(source: random.Random, request: bytes) -> bytes:
    lines = request.split(b"\r\n")
    lines.insert(source.randrange(1, max(2, len(lines))), source.choice(LINES))
    return b"\r\n".join(lines)


def change_target(source: random.Random, request: bytes) -> bytes:
    verb, _, rest = request.partition(b" ")
    return b" ".join([verb, source.choice(TARGETS), rest.partition(b" ")[2]])


def change_members(source: random.Random, request: bytes) -> bytes:
    document = json.loads(BODY)
    for _ in range(source.randint(1, 4)):
        holder = source.choice([document, *(v for v in document.values() if isinstance(v, dict))])
        holder[source.choice([*holder, "inReplyTo", "actor"])] = json.loads(source.choice(VALUES))
    return deliver_body(json.dumps(document).encode())


CHANGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    change_bytes, change_bytes, change_bytes, add_line, change_target, change_members,
    lambda source, request: request[: source.randrange(len(request) + 1)],
    lambda source, request: request.replace(b"\r\n", source.choice(LINE_ENDS)),
    lambda source, request: source.choice(VERBS) + b" " + request.partition(b" ")[2],
    lambda source, request: deliver_body(source.choice(BODIES)),
    lambda source, request: source.choice([*ALIEN, source.randbytes(source.randrange(2000))]),
)  # fmt: skip


def malformed(seed: str) -> bytes:
    """Return a request that is most likely malformed; the same seed makes the same request."""
    source = random.Random(seed)  # noqa: S311, it has to be predictable
    request = source.choice(WELL_FORMED)
    for _ in range(source.choice([1, 1, 1, 2, 3, 5])):
        request = source.choice(CHANGES)(source, request)
    return request


def send(port: int, number: int, request: bytes) -> bytes | None:
    """Send bytes, half-close, and read until the server closes; None if it does not in time."""
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
            return None
    return received


def statuses_of(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", received)]


def fault_of(request: bytes, received: bytes | None) -> str:
    """Return what is wrong with an answer, if anything is."""
    if received is None:
        return "the connection did not end"
    if received and not received.startswith(b"HTTP/1.1 "):
        return f"no answer of HTTP/1.1: {received[:60]!r}"
    # A client may ask the inbox to fail, with `?status=503`.
    wrong = [status for status in statuses_of(received) if status >= 500 and status != 505]
    return f"answered with {wrong}" if wrong and b"status=5" not in request else ""


def send_many(port: int, seed: int, numbers: range) -> Iterator[tuple[bytes, bytes | None]]:
    """Send malformed requests, some at a time; yield each with what was received."""
    requests = [malformed(f"{seed}/{number}") for number in numbers]
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        yield from zip(requests, pool.map(send, itertools.repeat(port), numbers, requests))


def check(server: Server, seed: int, number: int) -> Iterator[str]:
    """Send so many requests to an inbox, and yield what is wrong."""
    acknowledged: set[str] = set()
    statuses: collections.Counter[int] = collections.Counter()
    list(send_many(server.port, seed, range(CLIENTS)))  # some descriptors may stay open from now on
    time.sleep(0.5)
    before, memory = server.descriptors(), []
    for start in range(0, number, number // 10):
        for request, received in send_many(server.port, seed, range(start, start + number // 10)):
            if fault := fault_of(request, received):
                yield f"{fault}: {request[:200]!r}"
            statuses.update(statuses_of(received or b""))
            found = re.findall(rb"Location: \S+(%b)" % NAME.encode(), received or b"")
            acknowledged.update(f"{name.decode()}.json" for name in found)
        memory.append(server.memory())
    print(f"{number} requests, answered with {dict(sorted(statuses.items()))}")
    print("MB of memory:", *(f"{size:.1f}" for size in memory))
    if memory[-1] > memory[len(memory) // 2] + GROWTH * max(1, number / 20_000):
        yield "the memory has grown"
    started = time.monotonic()
    if not post(server.port) or time.monotonic() - started > 1:
        yield "a valid notification is not accepted within a second"
    while server.descriptors() > before and time.monotonic() < started + PATIENCE:
        time.sleep(0.05)
    if server.descriptors() > before:
        yield f"{before} descriptors have become {server.descriptors()}"
    stored = set(os.listdir(server.store))
    if not acknowledged or acknowledged - stored:
        yield f"of {len(acknowledged)} acknowledged, these are missing: {acknowledged - stored}"
    odd = [name for name in stored if not re.fullmatch(rf"{NAME}\.json|deliveries\.jsonl", name)]
    if odd or len(os.listdir(server.store.parent)) != 2:
        yield f"there are files that should not be: {odd}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    command = (OURS[0], "-W", "error", *OURS[1:])
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        with running(command, log=log.name, FSYNC=False, REQUEST_TIMEOUT=5) as server:
            faults = list(check(server, options.seed, options.requests))
        text = log.read()
    if bug := re.search("Traceback|Warning", text):
        faults.append(f"a bug in its log: {text[max(0, bug.start() - 500) :][:2000]}")
    for fault in faults[:20]:
        print("FAULT:", fault)
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
