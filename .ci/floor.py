# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""The least that an inbox on `http.server` has to do: answer 201. See bench.py."""

from __future__ import annotations

import http.server
import os


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(201)
        self.send_header("Content-Length", "0")
        if self.close_connection:
            self.send_header("Connection", "close")  # which wrk wants to know
        self.end_headers()


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024  # with the 5 of the base class, connections are lost


if __name__ == "__main__":
    Server(("localhost", int(os.environ["PORT"])), Handler).serve_forever()
