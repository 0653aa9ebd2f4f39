# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Run an inbox as a program, for the scripts beside this one. Needs Linux.

Public: `running` and the `Server` that it gives; the commands `OURS`, `FLASK`, `NODE` and `FLOOR`;
`post`, and the notification that it delivers, `BODY`.
"""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import coarinbox  # noqa: E402, it is beside this directory

TMPFS, DISK = Path("/dev/shm"), ROOT / ".ci/work"  # noqa: S108, it is where the tmpfs is
# A notification that only needs an ID, and the PORT of the inbox that it is for.
BODY = json.dumps({**coarinbox.sample("Request Review"), "id": "urn:uuid:ID"})
BODY = BODY.replace("localhost:5005", "localhost:PORT")
# The least that an inbox on `http.server` has to do: it answers 201.
FLOOR_SERVER = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(201)
        self.send_header("Content-Length", "0")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
http.server.ThreadingHTTPServer.request_queue_size = 1024  # not 5, which loses connections
http.server.ThreadingHTTPServer(("localhost", int(os.environ["PORT"])), Handler).serve_forever()
"""
# It stores what it is sent, and validates nothing.
NODE_SERVER = """
const {writeFile} = require("fs"), store = process.env.STORE
require("http").createServer((request, response) => {
    const parts = [], path = `${store}/${require("crypto").randomUUID()}.json`
    request.on("data", part => parts.push(part)).on("end", () =>
        writeFile(path, Buffer.concat(parts), () => response.writeHead(201).end()))
}).listen(process.env.PORT, "localhost")
"""
OURS = (sys.executable, str(ROOT / "coarinbox.py"))
FLASK = (sys.executable, "-m", "coarnotify.test.server.inbox")
NODE = ("node", "-e", NODE_SERVER)
FLOOR = (sys.executable, "-c", FLOOR_SERVER)


class Server(NamedTuple):
    process: subprocess.Popen[bytes]
    port: int
    store: Path
    start: float  # milliseconds until the first 201

    def cpu(self) -> float:
        """Return the CPU time that the process has used so far, in seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Return the resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextlib.contextmanager
def running(
    command: Sequence[str],
    place: Path = TMPFS,
    log: str = os.devnull,
    fill: Callable[[Path], None] = lambda store: None,
    **settings: object,
) -> Iterator[Server]:
    """Run a server, from its first 201 on, with a new store that is filled before."""
    with tempfile.TemporaryDirectory(dir=place) as directory, open(log, "ab") as output:
        store, file = Path(directory, "store"), Path(directory, "settings.cfg")
        store.mkdir()
        fill(store)
        with socket.create_server(("localhost", 0)) as listener:
            port = int(listener.getsockname()[1])
        # With DEBUG, the Flask server would be a process that restarts another.
        settings = {"STORE_DIR": str(store), "PORT": port, "DEBUG": False, **settings}
        file.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
        own = {"COARNOTIFY_SETTINGS": str(file), "PORT": str(port), "STORE": str(store)}
        env = {**os.environ, **own, "PYTHONHASHSEED": "0"}  # comparable instructions
        start, null = time.perf_counter(), subprocess.DEVNULL
        process = subprocess.Popen(command, env=env, stdin=null, stdout=output, stderr=output)
        try:
            while not post(port):
                if process.poll() is not None or time.perf_counter() - start > 60:
                    raise RuntimeError(f"{command} does not serve")
                time.sleep(0.001)
            yield Server(process, port, store, (time.perf_counter() - start) * 1000)
            process.terminate()
            process.wait(30)
        finally:
            process.kill()
            process.wait()


def post(port: int, number: int = 1) -> bool:
    """Deliver notifications on one connection; return whether the last one was accepted."""
    connection = http.client.HTTPConnection("localhost", port, timeout=60)
    with contextlib.closing(connection), contextlib.suppress(ConnectionError):
        for _ in range(number):
            body = BODY.replace("PORT", str(port)).replace("ID", str(uuid.uuid4()))
            connection.request("POST", "/inbox", body, {"Content-Type": "application/ld+json"})
            response = connection.getresponse()
            response.read()
        return response.status == 201
    return False
