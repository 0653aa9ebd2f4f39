#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""What an inbox on `http.server` cannot be faster than: it answers 201 and does nothing else.

python .ci/floor.py PORT
"""

import http.server
import sys


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024  # the 5 of the base class would measure lost connections


if __name__ == "__main__":
    Server(("localhost", int(sys.argv[1])), Handler).serve_forever()
