# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""The tests of coarinbox: `python -m unittest` runs them, with nothing installed.

Those that compare with the `coarnotify` package, or need another optional program, are skipped
where it is missing.
"""

from __future__ import annotations

import ast
import base64
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import doctest
import errno
import functools
import gc
import glob
import hashlib
import html.parser
import http.client
import importlib.util
import io
import itertools
import json
import logging
import logging.handlers
import math
import operator
import os
import pathlib
import random
import re
import runpy
import select
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unittest
import unittest.mock
import urllib.error
import urllib.parse
import urllib.request
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import coarinbox

HERE = pathlib.Path(__file__).resolve().parent
MODULE = HERE / "coarinbox.py"
JSON_LD = "application/ld+json"
E, M, S = coarinbox.LEVELS
PROC = os.path.isdir("/proc/self/fd")  # where the descriptors of a process can be counted


def setUpModule() -> None:
    """Have the programs that tests start notice SIGHUP, even if the tests run under `nohup`."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


# --- Notifications -------------------------------------------------------------------------------

ABSENT = object()  # as the value of a member: not there
NAMESPACES = AS2, COAR = "https://www.w3.org/ns/activitystreams", "https://coar-notify.net"
PURL = "https://purl.org/coar/notify"  # the namespace in old notifications
UUID = "94ecae35-dcfd-4182-8550-22c7164fe23f"
OFFER_ID = "urn:uuid:0370c0fb-bb78-4a9b-87f5-bed307a509dd"
# fmt: off
REPOSITORY = {"id": "https://repository.example.org/", "type": "Service",
              "inbox": "https://repository.example.org/inbox/"}
JOURNAL = {"id": "https://journal.example.com/system", "type": "Service",
           "inbox": "https://journal.example.com/inbox"}
AUTHOR = {"id": "https://orcid.org/0000-0002-1825-0097", "name": "J. Carberry", "type": "Person"}
EDITORS = {"id": "https://journal.example.com/", "name": "The Journal", "type": "Organization"}
PREPRINT = {
    "id": "https://repository.example.org/preprint/421", "type": ["Page", "sorg:AboutPage"],
    "ietf:cite-as": "https://doi.org/10.5555/12345680",
    "ietf:item": {"id": "https://repository.example.org/preprint/421/content.pdf",
                  "mediaType": "application/pdf", "type": ["Article", "sorg:ScholarlyArticle"]},
}
REVIEW = {"id": "https://journal.example.com/review/7", "type": ["Page", "sorg:Review"],
          "ietf:cite-as": "https://doi.org/10.5555/98765"}
RELATIONSHIP = {
    "id": "urn:uuid:74fff356-0632-44d9-b176-888da85758dc", "type": "Relationship",
    "as:subject": "https://journal.example.com/article/1",
    "as:relationship": "http://purl.org/vocab/frbr/core#supplement",
    "as:object": PREPRINT["id"], "ietf:cite-as": "https://doi.org/10.5555/1",
}
REQUEST: dict[str, Any] = {
    "origin": REPOSITORY, "target": JOURNAL, "actor": AUTHOR, "object": PREPRINT}
REVIEW_OFFER, ENDORSEMENT_OFFER = (
    {"id": OFFER_ID, "type": ["Offer", f"coar-notify:{action}"], **REQUEST}
    for action in ("ReviewAction", "EndorsementAction")
)
ANSWER = {"origin": JOURNAL, "target": REPOSITORY, "actor": EDITORS,
          "inReplyTo": OFFER_ID, "object": REVIEW_OFFER}
RESULT = {**ANSWER, "context": PREPRINT, "object": REVIEW}
# One notification of each pattern, without any fault.
NOTIFICATIONS: dict[str, Any] = {
    name: {"@context": [*NAMESPACES], "id": f"urn:uuid:{UUID}", "type": types, **members}
    for name, types, members in [
        ("Accept", "Accept", ANSWER),
        ("Announce Endorsement", ["Announce", "coar-notify:EndorsementAction"], RESULT),
        ("Announce Relationship", ["Announce", "coar-notify:RelationshipAction"],
         {**RESULT, "object": RELATIONSHIP}),
        ("Announce Review", ["Announce", "coar-notify:ReviewAction"], RESULT),
        ("Announce Service Result", "Announce", RESULT), ("Reject", "Reject", ANSWER),
        ("Request Endorsement", ENDORSEMENT_OFFER["type"], ENDORSEMENT_OFFER),
        ("Request Review", REVIEW_OFFER["type"], REVIEW_OFFER),
        ("Tentatively Accept", "TentativeAccept", ANSWER),
        ("Tentatively Reject", "TentativeReject", ANSWER),
        ("Unprocessable Notification", ["Flag", "coar-notify:UnprocessableNotification"],
         {**ANSWER, "object": {"id": OFFER_ID}, "summary": "It answers with 404."}),
        ("Undo Offer", "Undo", {**REQUEST, "inReplyTo": OFFER_ID, "object": ENDORSEMENT_OFFER}),
    ]
}
# fmt: on


def changed(document: Any, member: str, value: Any) -> Any:
    """Copy a notification, with another value for a member, given by its dotted name.

    The copy shares with the notification what stands beside the member.
    """
    name, _, rest = member.partition(".")
    if rest:
        return {**document, name: changed(document[name], rest, value)}
    others = {**document, name: value}
    if value is ABSENT:
        del others[name]
    return others


def altered(name: str, **changes: Any) -> Any:
    """Copy a notification with other values for members; `__` stands for the dot in a name."""
    document = NOTIFICATIONS[name]
    for member, value in changes.items():
        member = {"at_context": "@context"}.get(member, member.replace("__", "."))
        document = changed(document, member.replace("cite_as", "ietf:cite-as"), value)
    return document


def members(document: Any, prefix: str = "") -> list[str]:
    """List the dotted names of all the members of a notification, those of its parts included."""
    names = []
    for name, value in document.items():
        names.append(prefix + name)
        if isinstance(value, dict):
            names += members(value, f"{prefix}{name}.")
    return names


def addressed(document: Any, url: str) -> Any:
    """Copy a notification, with another inbox as its target's, if it names one."""
    named = coarinbox.lookup(document, "target.inbox") is not None
    return changed(document, "target.inbox", url) if named else document


# --- Talking to an inbox -------------------------------------------------------------------------


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[coarinbox.InboxServer]:
    """Serve an inbox with a temporary store on a free port of loopback."""
    with coarinbox.running(**settings) as inbox:
        yield inbox.server


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Leave the redirect to the caller, as an answer like any other."""


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirects)


def with_defaults(body: Any, headers: dict[str, str] | None) -> tuple[Any, dict[str, str]]:
    """Return a body, as JSON unless it is bytes, and its headers."""
    if body is None:
        return None, headers or {}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return data, {"Content-Type": JSON_LD, **(headers or {})}


def fetch(
    url: str, method: str = "GET", body: Any = None, headers: dict[str, str] | None = None
) -> Answer:
    """Send a request as a user's code would; a body that is not bytes is sent as JSON."""
    request = urllib.request.Request(url, *with_defaults(body, headers), method=method)
    try:
        with OPENER.open(request, timeout=10) as response:
            return Answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())  # type: ignore[arg-type]


def ask(server: Any, method: str, path: str, *more: Any, **named: Any) -> Answer:
    """Send a request to an inbox; `more` is as for `fetch`."""
    host, port = address(server)
    return fetch(f"http://{host}:{port}{path}", method, *more, **named)


def ask_on(
    connection: Any, method: str, path: str, body: Any = None, headers: Any = None
) -> Answer:
    """Send a request on a connection that others share."""
    connection.request(method, path, *with_defaults(body, headers))
    response = connection.getresponse()
    return Answer(response.status, response.headers, response.read())


def address(server: Any) -> tuple[str, int]:
    host, port = server.server_address[:2]
    return str(host), int(port)


def raw(server: Any, data: bytes, then: str = "read") -> list[Answer]:
    """Send bytes as they are and read every answer until the server closes the connection.

    With "half-close" the client tells the server that no more bytes will follow.
    """
    with socket.create_connection(address(server), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):  # it may answer before it has read everything
            connection.sendall(data)
        if then == "half-close":
            connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as stream:
            return [read_answer(line, stream) for line in iter(stream.readline, b"")]


def read_answer(status_line: bytes, stream: Any) -> Answer:
    version, status = status_line.split()[:2]
    assert version == b"HTTP/1.1", status_line
    headers = http.client.parse_headers(stream)
    return Answer(int(status), headers, stream.read(int(headers.get("Content-Length", 0))))


def post_head(*lines: str) -> bytes:
    """Make the head of a POST to the inbox, with more header lines."""
    head = ["POST /inbox HTTP/1.1", "Host: localhost", f"Content-Type: {JSON_LD}", *lines, "", ""]
    return "\r\n".join(head).encode("latin-1")


def get_head(*lines: str, target: str = "/constraints", host: str = "localhost") -> bytes:
    """Make the head of a GET, with more header lines."""
    return "\r\n".join([f"GET {target} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


def connect(server: Any, data: bytes = b"") -> socket.socket:
    """Open a connection and send something on it."""
    connection = socket.create_connection(address(server), timeout=10)
    connection.sendall(data)
    return connection


def answer_on(connection: socket.socket) -> Answer:
    """Read one answer, and nothing of the next one."""
    with connection.makefile("rb", buffering=0) as stream:
        return read_answer(stream.readline(), stream)


ACCEPT = NOTIFICATIONS["Accept"]
BODY = json.dumps(ACCEPT).encode()


def post_to(query: str = "", body: bytes = BODY) -> bytes:
    """Make a whole POST to the inbox, with a query."""
    head = post_head(f"Content-Length: {len(body)}")
    return head.replace(b"/inbox", b"/inbox" + query.encode(), 1) + body


def path_of(url: str) -> str:
    return "/" + url.split("/", 3)[3]


def what_the_system_says(call: Callable[..., object], *arguments: Any) -> str:
    """Return the reason for which a call fails, in the words of this system."""
    try:
        call(*arguments)
    except OSError as error:
        return str(error.strerror)
    raise AssertionError("it does not fail")


def utc_now() -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def files_in(store: Any) -> list[str]:
    """List what lies in a store beside the log of the deliveries."""
    return sorted(set(os.listdir(store)) - {"deliveries.jsonl"})


Test = TypeVar("Test", bound=Callable[..., None])


def with_settings(**settings: Any) -> Callable[[Test], Test]:
    """Give the inbox of one test other settings than the class has."""

    def decorate(test: Test) -> Test:
        test.settings = settings  # type: ignore[attr-defined]
        return test

    return decorate


@contextlib.contextmanager
def constants(**values: Any) -> Iterator[None]:
    """Give constants of the module other values in a block or, as a decorator, in a test."""
    with unittest.mock.patch.multiple("coarinbox", **values):
        yield


@contextlib.contextmanager
def syncing_with(sync: Callable[[int], object]) -> Iterator[None]:
    """Have a function stand for what a disk does with a file, in a block or in a test."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unittest.mock.patch("os.fsync", sync))
        if importlib.util.find_spec("fcntl"):  # macOS has a call of its own there
            refused = OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
            stack.enter_context(unittest.mock.patch("fcntl.fcntl", side_effect=refused))
        yield


# Windows syncs the directory when it likes.
SYNCED_KINDS = [stat.S_IFREG, stat.S_IFDIR] if os.name == "posix" else [stat.S_IFREG]


class InboxTest(unittest.TestCase):
    """Tests against an inbox of their own; a test fails if the inbox logs an error."""

    settings: dict[str, Any] = {}
    errors_expected = False

    def setUp(self) -> None:
        handler = logging.handlers.BufferingHandler(capacity=1_000_000)
        self.log: list[logging.LogRecord] = handler.buffer
        logger = logging.getLogger("coarinbox")
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        self.addCleanup(logger.setLevel, level)
        self.addCleanup(logger.removeHandler, handler)
        self.addCleanup(self.check_log)
        test = getattr(self, self.id().rpartition(".")[2])
        context = serving(**{**self.settings, **getattr(test, "settings", {})})
        self.server = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll until `condition()` is true; fail after ten seconds."""
        deadline = time.monotonic() + 10
        while not condition():
            self.assertLess(time.monotonic(), deadline, "it did not happen")
            time.sleep(0)  # let the thread of the inbox run

    def check_log(self) -> None:
        errors = [line.getMessage() for line in self.log if line.levelno >= logging.ERROR]
        if not self.errors_expected:
            self.assertEqual(errors, [])

    def log_lines(self) -> list[str]:
        return [line.getMessage() for line in self.log]

    def ask(self, *arguments: Any, **more: Any) -> Answer:
        return ask(self.server, *arguments, **more)

    def ask_raw(self, data: bytes, then: str = "half-close") -> Answer:
        """Send bytes as they are, and return the one answer to them; see `raw`."""
        (answer,) = raw(self.server, data, then)
        return answer

    def post(self, document: Any = ACCEPT, **headers: str) -> Answer:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", "/inbox", document, names)

    def stored(self) -> list[str]:
        return sorted(
            file.stem for file in pathlib.Path(self.server.store.directory).glob("*.json")
        )

    def listed(self) -> list[str]:
        return [entry["@id"] for entry in self.ask("GET", "/inbox").json()["ldp:contains"]]

    def assert_problem(self, answer: Answer, status: int) -> Any:
        """Assert that an answer is a problem document (RFC 9457); returns it."""
        self.assertEqual(answer.status, status, answer)
        self.assertEqual(answer.headers["Content-Type"], "application/problem+json")
        problem = answer.json()
        self.assertEqual((problem["type"], problem["status"]), ("about:blank", status))
        self.assertTrue(problem["title"] and problem["detail"])
        return problem

    def assert_serves(self) -> None:
        self.assertEqual(self.post().status, 201)


# --- Rules ---------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """A notification with one fault: what a member must be, and a value that is not that."""

    pattern: str
    member: str
    need: str
    level: str
    value: Any
    text: str = ""  # a part of the message

    @property
    def code(self) -> str:
        return f"{self.member}-{self.need}"

    @property
    def document(self) -> Any:
        return changed(NOTIFICATIONS[self.pattern], self.member, self.value)


SPECIFICATION = "https://coar-notify.net/specification/1.0.1/"
REMOVED = "Request Ingest and Announce Ingest were removed in specification 1.0.0"
WHOLE_OFFER = "write the complete Offer, without its `@context`"
REVIEW_REQUEST = '["Offer", "coar-notify:ReviewAction"] (Request Review)'
ENDORSEMENT = '["Offer", "coar-notify:EndorsementAction"] (Request Endorsement)'
ANNOUNCED_REVIEW = '["Announce", "coar-notify:ReviewAction"] (Announce Review)'
A_PAGE = 'write `["Page", "sorg:AboutPage"]`'
# fmt: off
MEANT: dict[str, list[Any]] = {  # by the pattern, the types that were probably meant to fit it
    REVIEW_REQUEST: [
        ["Offer", "RequestReview"], ["ReviewAction", "Offer"], ["Offer", "coar-notify:Review"],
        ["as:Offer", "https://purl.org/coar/notify_vocabulary/review-action/"],
        "Offer, coar-notify:ReviewAction",
    ],
    ENDORSEMENT: [["Offer", "coar-notify:EndorsmentAction"]],
    f"{ENDORSEMENT} or {REVIEW_REQUEST}": ["Offer"],
    f"{ANNOUNCED_REVIEW} or {REVIEW_REQUEST}": ["coar-notify:ReviewAction"],
    '"TentativeAccept" (Tentatively Accept)': ["TentativelyAccept", f"{AS2}#TentativeAccept"],
    '"Accept" (Accept)': ["accept", "Acept"],
}
# By pattern: a member, what it must be, how bad it is, a value that is not that, and what is said.
WRONG: dict[str, list[Any]] = {
    "Accept": [
        ("@context", "namespaces", M, AS2, f'write `["{AS2}", "{COAR}"]`'),
        ("@context", "namespaces", M, [AS2, {}, 5]), ("@context", "namespaces", M, [COAR]),
        ("@context", "current", S, [AS2, f"{COAR}/"], f"found `{COAR}/`; write `{COAR}`"),
        ("@context", "current", S, [f"{AS2}/", f"{PURL}/"],
         f"found `{AS2}/`; write `{AS2}`; found `{PURL}/`; write `{COAR}`"),
        ("@context", "order", S, [COAR, AS2], f"@context should begin with {AS2}"),
        ("id", "preferred", S, f"URN:UUID:{UUID.upper()}", f"write `urn:uuid:{UUID}`"),
        ("id", "preferred", S, f"urn:uuid:{UUID.replace('-', '')}", f"write `urn:uuid:{UUID}`"),
        ("type", "strings", E, ["Accept", None], 'write `"Accept"`'),
        ("origin", "object", E, JOURNAL["id"], f'`{{"id": "{JOURNAL["id"]}", "type": "Service"'),
        ("origin.id", "http-uri", E, OFFER_ID, 'write `"https://…"`'),
        ("origin.type", "strings", M, ["Service", {}], 'write `"Service"`'),
        ("origin.type", "service", S, ["x:Service"], "should include Service; found `x:Service`"),
        ("origin.inbox", "http-uri", M, "mailto:inbox@example.org"), ("target", "object", E, []),
        ("target.id", "http-uri", E, 7), ("target.type", "strings", M, ["Service", ["Service"]]),
        ("target.type", "service", S, "Person"), ("target.inbox", "http-uri", M, "/inbox"),
        ("target.inbox", "http-uri", M, {"id": "http://a.example/"}, "write `http://a.example/`"),
        ("target.inbox", "http-uri", M, "localhost:80/", "write `http://localhost:80/`"),
        ("object", "object", E, OFFER_ID, WHOLE_OFFER),
        ("object", "object", E, [PREPRINT], "write the object alone, without the list around it"),
        ("object.id", "required", E, ABSENT, f'write `"id": "{OFFER_ID}"`'),
        ("actor", "object", E, "Jane", 'write `{"id": "https://…", "type": "Person", "name"'),
        ("actor.id", "absolute-uri", E, "0000-0002-1825-0097", f"write `{AUTHOR['id']}`"),
        ("actor.id", "http-uri", S, "mailto:editor@example.org"), ("actor.name", "text", S, " "),
        ("actor.type", "actor", E, "Robot"), ("actor.type", "actor", E, []),
        ("actor.type", "actor", E, "organisation", "write `Organization`"),
        ("actor.type", "strings", E, ["Person", None], 'write `"Person"`'),
        ("actor.type", "single", S, ["Person"]),
        ("inReplyTo", "required", E, ABSENT, f'write `"inReplyTo": "{OFFER_ID}"`'),
        ("inReplyTo", "absolute-uri", E, [{"@id": OFFER_ID}], f"write `{OFFER_ID}`"),
        ("inReplyTo", "equals-object.id", E, "urn:x", f"in both; object.id is `{OFFER_ID}`"),
        ("object.type", "strings", E, 5), ("object.type", "pattern", S, "Offer", WHOLE_OFFER),
        ("object.type", "offer", M, "Invite", "object.type must include Offer"),
        ("object.@context", "unexpected", S, [*NAMESPACES], "should be left out"),
        ("summary", "string", S, ["withdrawn"]),
    ],
    "Announce Endorsement": [
        ("object.type", "as2-object", M, ["page", "sorg:WebPage"], "found `page`; write `Page`"),
    ],
    "Announce Relationship": [
        ("context.id", "required", E, ABSENT, f'write `"id": "{PREPRINT["id"]}"`'),
        ("context.id", "equals-object.as:object", M, "http://a.example/1"),
        ("context", "object", E, PREPRINT["id"], f'write `{{"id": "{PREPRINT["id"]}", "type"'),
        ("object", "object", E, 5, '"type": "Relationship", "as:subject": "https://…"'),
        ("object.type", "as2-object", E, "relationship", "write `Relationship`"),
        ("object.as:object", "absolute-uri", E, {}), ("object.as:subject", "absolute-uri", E, "x"),
        ("object.as:relationship", "absolute-uri", E, "supplement"),
    ],
    "Announce Review": [
        ("context", "object", E, PREPRINT["id"]), ("context.id", "http-uri", E, "doi:10.5555/1"),
        ("object.id", "absolute-uri", E, "review/7"), ("object.type", "schema", S, "Page"),
        ("object.type", "as2-object", E, "sorg:Review", 'write `["Page", "sorg:Review"]`'),
        ("object.type", "strings", M, ["Page", "sorg:Review", 5]),
        ("object.ietf:cite-as", "http-uri", S, "doi:10.5555/1", "`https://doi.org/10.5555/1`"),
    ],
    "Announce Service Result": [
        ("type", "known-actions", S, ["Announce", "coar:IngestAction"], REMOVED),
        ("type", "known-actions", S, ["Announce", "x:OtherAction"], "found `x:OtherAction`"),
        *(("type", "known-actions", S, ["Announce", found],
           f"found `{found}`; did you mean {ANNOUNCED_REVIEW}?") for found in """
            ReviewAction coar:ReviewAction coar_notify:ReviewAction coar-notify:reviewAction
            coar-notify:RevieuAction http://coar-notify.net/specification/vocabulary/ReviewAction
            https://purl.org/coar/notify_vocabulary/review-action/""".split()),
        ("type", "known-actions", S, ["Announce", "coar-notify:X"], "found `coar-notify:X`"),
        ("object.type", "schema", S, ["Page", "x:Report"]),
    ],
    "Request Review": [
        ("id", "absolute-uri", E, "/notifications/1", 'write `"urn:uuid:…"`'),
        ("type", "pattern", E, ["Offer", "coar-notify:IngestAction"], f"a pattern; {REMOVED}"),
        *(("type", "pattern", E, types, f"type must fit a pattern; did you mean {meant}?")
          for meant, given in MEANT.items() for types in given),
        *(("type", "pattern", E, types, f"; write the types of one, such as {REVIEW_REQUEST}")
          for types in ("Create", ["Person"], {"@id": "Offer"})),
        ("type", "order", S, ["coar-notify:ReviewAction", "x:Y", "Offer"],
         'write `["Offer", "coar-notify:ReviewAction", "x:Y"]`'),
        ("object", "object", E, PREPRINT["id"], f'`{{"id": "{PREPRINT["id"]}", "type": ["Page", "'),
        ("object.id", "http-uri", M, "doi:10.5555/1", "write `https://doi.org/10.5555/1`"),
    ],
    "Unprocessable Notification": [
        ("object", "object", E, OFFER_ID, f'write `{{"id": "{OFFER_ID}"}}`'),
        ("inReplyTo", "equals-object.id", S, "urn:x"),
        ("summary", "text", M, "", 'write `"…"`'), ("summary", "text", M, 5),
    ],
}
FAULTS = [Fault(pattern, *row) for pattern, rows in WRONG.items() for row in rows] + [
    # A resource is the object of a request, or the context of an announcement.
    Fault(pattern, f"{part}.{member}", need, level, value, text)
    for part, pattern in (("object", "Request Review"), ("context", "Announce Review"))
    for member, need, level, value, text in [
        ("type", "strings", M, ["Page", "sorg:AboutPage", None], A_PAGE),
        ("type", "as2-object", M, "sorg:AboutPage", A_PAGE),
        ("type", "about-page", S, ["Page", "x:AboutPage"], "write `sorg:AboutPage`"),
        ("ietf:cite-as", "http-uri", S, "10.5555/1", "write `https://doi.org/10.5555/1`"),
        ("ietf:item", "object", M, "http://a.example/1", 'write `{"id": "http://a.example/1"'),
        ("ietf:item.id", "http-uri", M, "http://a.example/a b", "write `http://a.example/a%20b`"),
        ("ietf:item.type", "strings", M, ["Article", "sorg:Text", 5], '["Article", "sorg:Text"]'),
        ("ietf:item.type", "as2-object", M, ["PDF", "sorg:Text"], "such as Page, Article or Doc"),
        ("ietf:item.type", "schema", S, "Article", "such as sorg:ScholarlyArticle"),
        ("ietf:item.mediaType", "media-type", M, "application/", 'write `"application/pdf"`'),
    ]
] + [
    Fault(pattern, member, "required", level, ABSENT, f"{member} is missing; it ")
    for pattern, level, names in [
        ("Accept", E, "id type origin origin.id target target.id object object.id object.type"),
        ("Accept", M, "@context origin.type target.type target.inbox actor.id actor.type"),
        ("Accept", S, "origin.inbox actor actor.name"),
        ("Announce Endorsement", M, "object.type"),
        ("Announce Relationship", E, "object.as:subject object.as:relationship object.as:object"),
        ("Announce Review", E, "id object object.type context context.id"),
        ("Announce Review", M, "context.ietf:item.id context.ietf:item.type"),
        ("Announce Review", M, "context.ietf:item.mediaType"),
        ("Announce Review", S, "object.ietf:cite-as"),
        ("Request Review", M, "object.type object.ietf:item object.ietf:item.id"),
        ("Request Review", M, "object.ietf:item.type object.ietf:item.mediaType"),
        ("Request Review", S, "object.ietf:cite-as"),
        ("Unprocessable Notification", E, "inReplyTo object.id summary"),
    ] for member in names.split()
]
# Rules that cannot be broken alone, and what is broken as well.
ALONG = {"object.type-offer": ["object.type-pattern"],
         "object.as:object-absolute-uri": ["context.id-equals-object.as:object"]}
# fmt: on


def codes(document: Any) -> set[tuple[str, str, str]]:
    return {(found.level, found.pointer, found.code) for found in coarinbox.validate(document)}


class RulesTest(unittest.TestCase):
    def test_there_is_a_faultless_notification_of_each_pattern(self) -> None:
        pages = (
            "accept announce-endorsement announce-relationship announce-review announce-resource"
            " reject request-endorsement request-review tentative-accept tentative-reject"
            " unprocessable undo-offer"
        )
        self.assertEqual(list(NOTIFICATIONS), [pattern.name for pattern in coarinbox.PATTERNS])
        for (name, document), page in zip(NOTIFICATIONS.items(), pages.split()):
            pattern = coarinbox.pattern_of(document)
            assert pattern
            self.assertEqual((pattern.name, pattern.spec), (name, f"{SPECIFICATION}{page}/"))
            self.assertEqual(coarinbox.validate(document), [])

    def test_one_fault_is_one_finding_at_its_member_that_says_what_to_write(self) -> None:
        for fault in FAULTS:
            with self.subTest(fault=fault):
                # What is right is remembered, and must not hide a fault in something like it.
                self.assertEqual(coarinbox.validate(NOTIFICATIONS[fault.pattern]), [])
                document, before = fault.document, repr(fault.document)
                found, *others = coarinbox.validate(document)
                self.assertEqual(repr(document), before)
                pointer = "/" + fault.member.replace(".", "/")
                expected = (fault.level, pointer, fault.code)
                self.assertEqual((found.level, found.pointer, found.code), expected)
                self.assertIn(fault.text, found.message)
                self.assertEqual("did you mean" in found.message, "did you mean" in fault.text)
                self.assertEqual(found.message, "; ".join(filter(None, [found.fault, found.fix])))
                self.assertNotIn(found.fix or "write", found.fault)
                self.assertEqual([each.code for each in others], ALONG.get(fault.code, []))
                pattern = coarinbox.pattern_of(document)
                self.assertEqual(found.spec, pattern.spec if pattern else SPECIFICATION)

    def test_the_list_of_constraints_holds_these_rules_with_their_levels(self) -> None:
        listed = {rule["code"]: rule for rule in coarinbox.constraints()}
        others = {"notification-object", "notification-required", *coarinbox.DELIVERY_RULES}
        others |= {"origin.type-single", "target.type-single", "type-activitystreams"}
        self.assertEqual({fault.code for fault in FAULTS} | others, set(listed))
        for fault in FAULTS:
            self.assertEqual(listed[fault.code]["levels"].get(fault.pattern), fault.level, fault)
        self.assertEqual(listed["id-preferred"]["refused_by"], ["DSpace", "Software Heritage"])
        self.assertEqual(listed["notification-required"]["demand"], "be present")

    def test_what_is_no_notification_at_all(self) -> None:
        for document in ([], [ACCEPT], "text", json.dumps(ACCEPT), 5, 1.5, True, False):
            self.assertEqual(codes(document), {(E, "", "notification-object")}, document)
        self.assertEqual(codes(None), {(E, "", "notification-required")})

    def test_a_finding_says_where_and_why_and_who_refuses_it(self) -> None:
        document = altered("Request Review", origin__id="here", actor__name=ABSENT)
        wrong, refused = coarinbox.validate(document)
        fix = 'write `"https://…"`'
        self.assertEqual(wrong.as_json(), {
            "level": "E", "pointer": "/origin/id", "code": "origin.id-http-uri", "value": "here",
            "message": f"origin.id must be an HTTP URI; {fix}", "fix": fix,
            "spec": f"{SPECIFICATION}request-review/",
        })  # fmt: skip
        self.assertEqual(refused.as_json()["refused_by"], ("PCI", "PREreview"))
        self.assertEqual(str(refused), f"{refused.message} (refused by PCI, PREreview)")

    def test_a_value_is_repeated_where_it_is_short_and_json(self) -> None:
        for value, repeated in [
            (["x"], ["x"]), ("x" * 98, "x" * 98), ("x" * 99, None), (math.nan, None),
        ]:  # fmt: skip
            (finding,) = coarinbox.validate(changed(ACCEPT, "actor", value))
            self.assertEqual(finding.value, repeated)
            self.assertEqual("value" in finding.as_json(), repeated is not None)

    def test_the_most_specific_pattern_wins_then_the_first_of_the_table(self) -> None:
        examples: list[tuple[Any, str | None]] = [
            (["Announce", "Announce"], "Announce Service Result"),
            (["coar-notify:ReviewAction", "x:Other", "Announce"], "Announce Review"),
            (["Accept", "Offer", "coar-notify:ReviewAction"], "Request Review"),
            (["Undo", "Reject"], "Reject"),
            (["Announce", "coar-notify:ReviewAction", "coar-notify:EndorsementAction"],
             "Announce Endorsement"),
            ("accept", None), ("Offer", None), ([], None),
        ]  # fmt: skip
        for types, name in examples:
            pattern = coarinbox.pattern_of({"type": types})
            self.assertEqual(pattern and pattern.name, name, types)

    def test_null_counts_as_absent_and_so_does_an_empty_list_of_types(self) -> None:
        for name, document in NOTIFICATIONS.items():
            for member in members(document):
                absent = codes(changed(document, member, ABSENT))
                with self.subTest(name, member=member):
                    self.assertEqual(codes(changed(document, member, None)), absent)
                    if member.endswith("type") and not member.endswith("actor.type"):
                        self.assertEqual(codes(changed(document, member, [])), absent)

    def test_what_breaks_no_rule(self) -> None:
        for name, member, value in [
            ("Accept", "id", f"urn:uuid:{UUID.upper()}"),
            ("Accept", "@context", [AS2, PURL, COAR]),
            ("Accept", "@context", [AS2, COAR, {"x": "https://x.example"}]),
            ("Accept", "type", ["Accept", "coar-notify:ReviewAction"]),  # of WEKO
            ("Announce Endorsement", "object.type", ["Page", "sorg:WebPage"]),
            # As in the examples of the specification.
            *((name, "context", {"id": PREPRINT["id"]}) for name in ANNOUNCEMENTS),
            ("Announce Relationship", "context.ietf:item.type", ["Object", "sorg:Dataset"]),
            ("Announce Relationship", "object.id", f"URN:UUID:{UUID.upper()}"),
            ("Accept", "summary", "Accepted because …"), ("Announce Review", "inReplyTo", ABSENT),
            *(("Announce Service Result", "type", ["Announce", type_])
              for type_ in ("sorg:ReviewAction", "http://schema.org/Action", "Create", "x:Review")),
            *((name, f"{part}x:unknown", 5) for name in NOTIFICATIONS
              for part in ("", "origin.", "target.", "object.", "actor.")),
        ]:  # fmt: skip
            with self.subTest(name, member=member, value=value):
                self.assertEqual(codes(changed(NOTIFICATIONS[name], member, value)), set())

    def test_in_an_embedded_offer_only_level_e_is_kept_up(self) -> None:
        for fault in FAULTS:
            if fault.pattern.startswith("Request") and fault.member not in ("type", "id"):
                with self.subTest(fault=fault):
                    offered = changed(fault.document, "@context", ABSENT)
                    (found,) = coarinbox.validate(changed(ACCEPT, "object", offered))
                    self.assertEqual(found.level, E if fault.level == E else S)
                    self.assertEqual(found.pointer, "/object/" + fault.member.replace(".", "/"))
                    self.assertEqual((found.code, found.refused_by), (fault.code, ()))

    def test_what_is_embedded_needs_an_id_and_each_fault_of_it_is_reported_once(self) -> None:
        for offered, pointer, level, code in [
            (altered("Request Review", type=["Offer", "x:Y"]), "type", S, "object.type-pattern"),
            (altered("Request Review", id="offer"), "id", E, "object.id-absolute-uri"),
            (altered("Announce Review", context__id="x"), "context/id", E, "context.id-http-uri"),
            (altered("Accept", object__actor__id="x"), "object/actor/id", E,
             "actor.id-absolute-uri"),
        ]:  # fmt: skip
            found = codes(altered("Accept", object=offered, inReplyTo=offered["id"]))
            expected = (level, f"/object/{pointer}", code)
            self.assertEqual({each for each in found if each[1] == expected[1]}, {expected})

    def test_hostile_values_make_short_messages_in_short_time(self) -> None:
        # Each would take minutes if it were compared as a whole, or repeated in each finding.
        huge, deep = "x" * 10**6, ACCEPT
        for _ in range(900):
            deep = {"type": "Accept", "object": deep, "id": ["x"]}
        for document in [
            {"type": [f"{n}Offer{huge[:80]}" for n in range(10**4)], "id": huge, "origin": huge},
            {f"@{n}d": n for n in range(10**5)},
            {"type": "Accept", "object": {"type": ["Offer"] * 30_000, "id": f"10.5555/{huge}"}},
            {"@context": [huge] * 3 + [{}] * 30_000, "summary": [[]] * 30_000, "inReplyTo": [huge]},
            {"actor": {"type": [huge[:30] + str(n) for n in range(10**4)]}, "type": huge},
            {"id": "http://" + "a@" * 10**5}, {"id": "http://[" + ":" * 10**5},
            {"id": "a:" + "?" * 10**5 + " "}, {"id": math.inf, "inReplyTo": 10**5000}, deep,
        ]:  # fmt: skip
            started = time.process_time()
            found = coarinbox.validate(document)
            self.assertLess(time.process_time() - started, 2)
            self.assertGreater(len(found), 3)
            self.assertLess(len(json.dumps([each.as_json() for each in found])), 50_000)

    @constants(MAX_KNOWN=2)
    def test_only_some_values_that_are_right_are_remembered(self) -> None:
        for name in "abcabc":
            wrong = changed(ACCEPT, "actor.name", name)
            self.assertEqual(coarinbox.validate(wrong), [])
        self.assertEqual(len(coarinbox.validate(changed(ACCEPT, "actor.name", " "))), 1)


class HintsTest(unittest.TestCase):
    """A message says what to write."""

    def fixes(self, document: Any) -> dict[str, str]:
        """Return what to write, by the dotted name of the member."""
        findings = coarinbox.validate(document)
        return {found.pointer[1:].replace("/", "."): found.fix for found in findings}

    def test_a_missing_member_is_found_under_a_similar_name(self) -> None:
        for pattern, member, others in [
            ("Accept", "id", "@id Id"), ("Accept", "type", "@type"),
            ("Accept", "inReplyTo", "inReplyto in_reply_to as:inReplyTo"),
            ("Accept", "target.inbox", "ldp:inbox"), ("Accept", "actor.name", "sorg:name"),
            ("Request Review", "object.ietf:cite-as", "ietf:citeAs cite-as"),
            ("Request Review", "object.ietf:item", "url item"),
            ("Request Review", "object.ietf:item.mediaType", "mediatype"),
            ("Announce Relationship", "object.as:object", "object"),
            ("Unprocessable Notification", "summary", "Summary"),
        ]:  # fmt: skip
            value = coarinbox.lookup(NOTIFICATIONS[pattern], member)
            document = changed(NOTIFICATIONS[pattern], member, ABSENT)
            parent, dot, name = member.rpartition(".")
            for other in others.split():
                with self.subTest(pattern, member=member, other=other):
                    fix = self.fixes(changed(document, parent + dot + other, value))[member]
                    self.assertRegex(fix, f"found `{other}`.*; write `{name}`")
        for member, another in [("id", "type"), ("@context", "context"), ("origin.id", "origin.x")]:
            document = changed(NOTIFICATIONS["Announce Review"], member, ABSENT)
            self.assertNotIn("found", self.fixes(changed(document, another, "x"))[member])

    def test_advice_fits_what_is_there(self) -> None:
        other = "https://x.example/context"
        offered = f"urn:uuid:{UUID.replace('-', '')}"
        away = altered("Accept", object=PREPRINT, inReplyTo=f"{PREPRINT['id']}0")
        elsewhere = {**changed(OFFER, "@context", ABSENT), "context": [*NAMESPACES]}
        theirs = altered("Accept", object__id=offered, inReplyTo=offered)
        wrong = ["http://www.w3.org/ns/activitystreams", "http://coar-notify.net", other, other]
        for document, member, advice in [
            (altered("Accept", type="Tentatively Accept"), "type", '"TentativeAccept" (Tentative'),
            (altered("Accept", type="request_review"), "type", "(Request Review)?"),
            (altered("Accept", type=["Offer", "UndoOffer"]), "type", 'did you mean "Undo" (Undo'),
            (away, "object.type", "write the complete Offer, without its `@context`"),
            (away, "inReplyTo", "write the id of the notification that it answers"),
            (changed(away, "inReplyTo", ABSENT), "inReplyTo", "write the id of the notification"),
            (theirs, "object.id", "keep it if the Offer has this id"),
            (altered("Accept", actor__type=["sorg:X", "Group"]), "actor.type", 'write `"Group"`'),
            (altered("Accept", at_context=[COAR, other, AS2]), "@context", f'{COAR}", "{other}"]`'),
            (altered("Accept", at_context=wrong), "@context", f'{COAR}", "{other}"]`'),
            (elsewhere, "@context", "found `context`; write `@context`"),
            (altered("Accept", origin="urn:x:1"), "origin", '{"id": "https://…", "type": "Serv'),
            ([ACCEPT], "", "write the object alone, without the list around it"),
        ]:  # fmt: skip
            with self.subTest(advice):
                found = coarinbox.validate(document)
                pointer = "/" + member.replace(".", "/") if member else ""
                (message, *_) = (each.message for each in found if each.pointer == pointer)
                self.assertIn(advice, message)
        service = altered("Accept", origin__type=["Organization", "Service"])
        (error,) = coarinbox.assess(service, "PREreview").errors
        self.assertEqual((error.pointer, error.fix), ("/origin/type", 'write `"Service"`'))

    def test_a_newcomer_gets_to_a_clean_notification_in_three_attempts(self) -> None:
        types = ["Offer", "RequestReview"]
        first: Any = {"@id": "offer-1", "@type": types, "origin": REPOSITORY["id"]}
        fixes = self.fixes(first)
        self.assertEqual(fixes["id"], "found `@id`; write `id`")
        # All the examples are taken as they are; only the two names are corrected.
        second: Any = {"id": "offer-1", "type": types}
        second["origin"] = json.loads(fixes["origin"][len("write `") : -1])
        for fix in fixes.values():
            if fix.startswith('write `"'):
                second.update(json.loads("{" + fix[len("write `") : -1] + "}"))
        fixes = self.fixes(second)
        self.assertEqual((set(fixes), fixes["id"]), ({"id", "type"}, 'write `"urn:uuid:…"`'))
        types = json.loads(re.search(r"mean (\[.*?\])", fixes["type"])[1])  # type: ignore[index]
        self.assertEqual(coarinbox.validate({**second, "id": OFFER_ID, "type": types}), [])


HTTP_URIS = """
    https://example.org/a HTTPS://EXAMPLE.ORG/ http://localhost/ http://inbox:8080/
    http://my_host.org/ http://exämple.org/ö http://192.168.0.1:80/ http://[2001:db8::7]:8080/x
    http://[2001:db8::7] http://user:secret@example.org/ https://example.org?q
    https://example.org/%20~a!$&'()*+,;=:@?a[b]=c/?#f/? https://example.org/? https://example.org/#
    https://example.org:99999/
""".split()
OTHER_URIS = f"""
    urn:uuid:{UUID} info:doi/10.5555/1 mailto:a@example.org ftp://example.org/x file:///etc/x
    a+b.c-d:
""".split()
NO_URIS = """
    urn /a/b //example.org/a example.org/a 1http://example.org/ http: https: https:///x http:x
    http:/x http:// http:///x http://?x http://:80/ http://example.org:/ http://example.org:port/
    http://example.org:80x/ http://a@b@example.org/ http://2001:db8::7/ http://[2001:db8::g]/
    http://[::1/ http://[::1]x/ http://[]/ https://example.org/#a#b
""".split()
# fmt: off
NO_URIS += ["", *(f"https://example.org/{rest}" for rest in (
    "a b", "a\n", "\0", "\x7f", "\u00a0", "\u2028", "\ud800", *'<>"{}|\\^`'))]
# fmt: on


class TextTest(unittest.TestCase):
    """Numbers, characters, and URIs."""

    def test_numbers_are_what_they_were_written_as(self) -> None:
        found = coarinbox.parse(b"[1, -2, 1.5, 1e2, 9007199254740993]")
        self.assertEqual(repr(found), "[1, -2, 1.5, 100.0, 9007199254740993]")

    def test_what_shows_nothing_is_escaped(self) -> None:
        for text in ("plain", "Ünïcödé 漢字", "a b", "", "\N{CHECK MARK}"):
            self.assertEqual(coarinbox.escape_controls(text), text)
        hidden = "\n\x00\x1b\x7f\u00a0\u200b\u202e\u2028\ufeff\u3164\u2800\u034f\ufe0f\u115f\uffa0"
        for character in hidden + "\U000e0101":
            escaped = json.dumps(character)[1:-1]
            self.assertEqual(coarinbox.escape_controls(f"a{character}ß"), f"a{escaped}ß")

    def test_absolute_and_http_uris(self) -> None:
        for uris, absolute, http_uri in [
            (HTTP_URIS, True, True), (OTHER_URIS, True, False), (NO_URIS, False, False),
        ]:  # fmt: skip
            for uri in uris:
                with self.subTest(uri=uri):
                    found = {code for _, _, code in codes({"id": uri, "origin": {"id": uri}})}
                    self.assertEqual("id-absolute-uri" not in found, absolute)
                    self.assertEqual("origin.id-http-uri" not in found, http_uri)


# --- Field cases ---------------------------------------------------------------------------------


class Case(NamedTuple):
    """Something seen in the field, and the findings that it must have."""

    name: str
    document: Any
    expect: list[tuple[str, ...]] = []  # pointer, level, a text in it, receivers who refuse it
    media_type: str = JSON_LD


def offer(**changes: Any) -> Any:
    return altered("Request Review", **changes)


# Rebuilt after public reports, templates and the documentation or source of the software named.
# fmt: off
EXPANDED = json.dumps(offer()).replace('"id"', '"@id"').replace('"type"', '"@type"')
CASES = [
    Case("plain JSON, as sciety, Invenio and an OJS plugin send it", offer(),
         [("", S, f"found `application/json`; send `Content-Type: {JSON_LD}`",
           "DSpace", "EPrints", "PCI")], media_type="application/json"),
    Case("a service result is not cited",
         altered("Announce Service Result", object__cite_as=ABSENT)),
    Case("the type of an actor as a full IRI: DSpace issue 12838",
         offer(actor__type=f"{AS2}#Person"), [("/actor/type", E, "`Person`")]),
    Case("@id and @type, as JSON-LD without a context", json.loads(EXPANDED),
         [("/id", E, "@id"), ("/type", E, "@type"), ("/origin/id", E, "@id"),
          ("/target/id", E, ""), ("/object/id", E, ""), ("/actor/type", M, "@type")]),
    Case("types in another order, which PCI joins and PREreview compares",
         offer(type=["coar-notify:ReviewAction", "Offer"]), [("/type", S, "", "PCI", "PREreview")]),
    Case("no name", offer(actor__name=ABSENT), [("/actor/name", S, "", "PREreview", "PCI")]),
    Case("Request Ingest, which DSpace ships", offer(type=["Offer", "coar-notify:IngestAction"]),
         [("/type", E, "removed")]),
    Case("a bare UUID, as Software Heritage's documentation asks for", offer(id=UUID),
         [("/id", E, f"write `urn:uuid:{UUID}`", "Software Heritage")]),
    Case("a space before a URI, as in Software Heritage's documentation",
         altered("Announce Relationship", **{"object__as:object": f" {PREPRINT['id']}"}),
         [("/object/as:object", E, "white space"), ("/context/id", M, "equal")]),
    Case("an HTTP id", offer(id="https://repository.example.org/n/1"),
         [("/id", S, "write `urn:uuid:…` with a new UUID", "Software Heritage")]),
    Case("an empty citation, as in the workflow of PCI and sciety",
         altered("Announce Review", object__cite_as=""), [("/object/ietf:cite-as", S, "is empty")]),
    Case("0.9's url: sciety issue 3543, DSpace issue 9449",
         offer(object={**PREPRINT, "ietf:item": None, "url": PREPRINT["ietf:item"]}),
         [("/object/ietf:item", M, "found `url`")]),
    Case("null among the types", offer(actor__type=["Person", None]),
         [("/actor/type", E, 'write `"Person"`')]),
    Case("a stub of an Offer", altered("Accept", object={"id": OFFER_ID, "type": "Offer"}),
         [("/object/type", S, "write the complete Offer, without its `@context`")]),
    Case("a text in place of origin", offer(origin=JOURNAL["id"]),
         [("/origin", E, f'write `{{"id": "{JOURNAL["id"]}", "type": "Service", "inbox": "http')]),
    Case("PREreview's first sender: no urn:uuid:, a DOI as id, no type",
         offer(at_context=[AS2, PURL], id=UUID,
               object={"id": "10.5555/2026.02.07.1", "ietf:cite-as": "https://doi.org/10.5555/1"}),
         [("/@context", S, f"write `{COAR}`"), ("/id", E, f"write `urn:uuid:{UUID}`"),
          ("/object/id", E, "write `https://doi.org/10.5555/2026.02.07.1`"),
          ("/object/type", M, "Page"), ("/object/ietf:item", M, "mediaType")]),
]
# fmt: on


class FieldCasesTest(unittest.TestCase):
    """What is said about things that were seen in the field."""

    def test_each_gets_its_findings_and_no_other(self) -> None:
        for case in CASES:
            levels = {level for _, level, *_ in case.expect}
            inbox = coarinbox.lookup(case.document, "target.inbox")
            arrival = coarinbox.Arrival(case.media_type, [inbox] if inbox else [])
            for mode, refused in ((True, {E}), ("strict", {E, M})):
                with self.subTest(case.name, mode=mode):
                    errors, warnings = coarinbox.assess(case.document, mode, arrival)
                    self.assertEqual(errors != [], levels & refused != set())
                    found = {(each.pointer, each.level): each for each in errors + warnings}
                    for pointer, level, text, *receivers in case.expect:
                        self.assertIn(text, found[pointer, level].message)
                        self.assertLessEqual(set(receivers), set(found[pointer, level].refused_by))
                    if "@id" not in case.name:  # where everything is missing
                        self.assertEqual(set(found), {entry[:2] for entry in case.expect})


# --- Receivers and modes -------------------------------------------------------------------------


RECEIVERS = ["DSpace", "EPrints", "PCI", "PREreview", "Software Heritage"]


class ReceiversTest(unittest.TestCase):
    """What production receivers refuse, and what an inbox that plays one of them does."""

    def test_they_are_listed_and_refuse_by_codes_of_rules(self) -> None:
        listed = coarinbox.receivers()
        self.assertEqual([each["name"] for each in listed], RECEIVERS)
        self.assertEqual(listed[1], {
            "name": "EPrints", "source": "https://github.com/eprintsug/coar_notify",
            "refuses": ["a Content-Type that is not exactly application/ld+json"],
        })  # fmt: skip
        known = {rule["code"] for rule in coarinbox.constraints()} | {"content-type-exact"}
        for refusal in itertools.chain(*(each.refusals for each in coarinbox.RECEIVERS)):
            self.assertLessEqual(set(refusal.codes), known, refusal.what)

    def test_each_receiver_plays_its_part(self) -> None:
        exact = coarinbox.Arrival(JSON_LD, [JOURNAL["inbox"]])
        plain = exact._replace(content_type="application/json; charset=utf-8")
        profile = exact._replace(content_type="Application/LD+JSON ;profile=x")
        for document, arrival, refusing in [
            (offer(), exact, ""),
            (offer(object__type="sorg:AboutPage"), exact, ""),  # level M
            (offer(), profile, "EPrints 415"),
            (offer(), plain, "DSpace 415, EPrints 415, PCI 415"),
            (offer(), exact._replace(known_as="20261125"), "PCI 400, Software Heritage 400"),
            (offer(), exact._replace(posted_to=["http://a.example/"]), "Software Heritage 400"),
            (offer(id="https://a.example/1"), exact, "Software Heritage 400"),
            (offer(id="tag:a.example,2026:1"), exact, "DSpace 400, Software Heritage 400"),
            (offer(id=f"urn:uuid:{UUID.replace('-', '')}"), exact, "DSpace 400"),
            (offer(type=["Offer", "coar-notify:ReviewAction", "ReviewRequest"]), exact,
             "Software Heritage 400"),
            (altered("Announce Review", type=["Announce", "ReviewAction"]),
             exact._replace(posted_to=[REPOSITORY["inbox"]]), "Software Heritage 400"),
            (offer(actor=ABSENT), exact, "PCI 400, PREreview 400"),
            (offer(object__cite_as=ABSENT), exact, "PCI 400"),
            (offer(origin__inbox=ABSENT), exact, "PCI 400"),
            (offer(at_context=[COAR, AS2]), exact, "PREreview 400"),
            (offer(origin__type=["Service"]), exact, "PREreview 400"),
            (offer(target__type=["Service"]), exact, "PREreview 400"),
        ]:  # fmt: skip
            with self.subTest(refusing, document=document):
                played = {name: coarinbox.assess(document, name, arrival) for name in RECEIVERS}
                statuses = [f"{name} {each.status}" for name, each in played.items() if each.errors]
                self.assertEqual(", ".join(statuses), refusing)
                for mode in (True, "strict")[: 2 if refusing else 1]:
                    self.assertEqual(coarinbox.assess(document, mode, arrival).errors, [])

    def test_what_one_receiver_alone_refuses_is_a_finding_in_its_mode_only(self) -> None:
        document = offer(origin__type=["Service"])
        self.assertEqual(coarinbox.assess(document, "PCI"), ([], []))
        ((error,), warnings) = coarinbox.assess(document, "PREreview")
        self.assertEqual((error.level, error.pointer), (S, "/origin/type"))
        self.assertEqual((error.refused_by, warnings), (("PREreview",), []))

    def test_another_inbox_than_where_it_was_posted(self) -> None:
        http, https = "http://a.example/inbox", "https://a.example/inbox"
        for inbox, posted_to, elsewhere in [
            (http, [http], False), ("HTTP://A.Example/inbox", [f"{http}?status=503"], False),
            (f"{http}?x", ["http://b.example/", http], False), (http, [], False),
            ("http://a.example:80/inbox", [http], False), (ABSENT, [http], False),
            (https, ["https://a.example:443/inbox"], False), ("mailto:a@a.example", [http], False),
            ("http://a.example:443/inbox", [http], True), (f"{http}/", [http], True),
            ("http://a.example/Inbox", [http], True), (https, [http], True),
        ]:  # fmt: skip
            with self.subTest(inbox, posted_to=posted_to):
                arrival = coarinbox.Arrival(JSON_LD, posted_to)
                findings = coarinbox.delivery_findings(offer(target__inbox=inbox), arrival)
                found = [(each.level, each.code, each.pointer, each.fix) for each in findings]
                expected = (S, "target.inbox-elsewhere", "/target/inbox", f"write `{http}`")
                self.assertEqual(found, [expected] if elsewhere else [])


class ModesTest(unittest.TestCase):
    """What each value of VALIDATE_INCOMING refuses, and what it warns about."""

    FAULTY = altered("Accept", actor=ABSENT, target__inbox=ABSENT)  # levels S and M
    INVALID = changed(FAULTY, "origin", ABSENT)  # levels S, M and E

    def test_what_each_mode_refuses_and_warns_about(self) -> None:
        examples: list[tuple[bool | str, Any, str, str]] = [
            (True, self.FAULTY, "", "MS"), (True, self.INVALID, "E", "MS"), (True, [], "E", ""),
            ("strict", self.FAULTY, "M", "S"), ("strict", self.INVALID, "EM", "S"),
            (False, self.INVALID, "", "EMS"), (False, [ACCEPT], "", "E"), (False, [], "", "E"),
            (False, "text", "E", ""), ("PCI", 5, "E", ""),
        ]  # fmt: skip
        for mode, document, errors, warnings in examples:
            with self.subTest(mode=mode, document=document):
                assessed = coarinbox.assess(document, mode)
                levels = ["".join(sorted(each.level for each in found)) for found in assessed]
                self.assertEqual(levels, [errors, warnings])

    def test_the_gravest_findings_come_first_and_the_others_are_left_out_if_need_be(self) -> None:
        found = coarinbox.validate({"id": 5, "actor": {}})
        levels = sorted(each.level for each in found)
        for limit in (4, len(found)):
            kept, left_out = coarinbox.most_important(found, limit=limit)
            self.assertEqual([each.level for each in kept], levels[:limit])
            self.assertEqual(left_out, len(found) - limit)

    def test_without_the_library_its_mode_cannot_be_set(self) -> None:
        coarinbox.coarnotify_server.cache_clear()
        wanted = "'coarnotify', which cannot .*; pip install coarnotify$"
        with unittest.mock.patch.dict(sys.modules, {"coarnotify.server": None}):
            with self.assertRaisesRegex(coarinbox.ConfigurationError, wanted):
                coarinbox.Settings(VALIDATE_INCOMING="coarnotify")


# --- The coarnotify package as an oracle ---------------------------------------------------------

needs_coarnotify = unittest.skipUnless(
    importlib.util.find_spec("coarnotify"), "the coarnotify package is not installed"
)
# fmt: off
VALUES: list[Any] = [ABSENT, None, True, 1.5, "text", [], {}, ["x"], {"id": "https://a.example/"}]
TYPES: list[Any] = [
    "Accept", "Offer", ["Offer"], ["coar-notify:ReviewAction", "Offer"], "Announce",
    ["Announce", "Announce"], ["Announce", "coar-notify:IngestAction"], ["Accept", "Reject"],
    ["Accept", 5], ["Accept", {}], 5, [5], ["Undo", "x:Y"], "Flag", "Nothing", "Person",
    ["Person"], ["x:Y", "Service"], "Page", ["Page", "x:Y"],
]
# fmt: on
# URIs of which coarinbox and coarnotify think differently, by who accepts them.
URI_DIFFERENCES = {
    "coarinbox": """
        http://inbox:8080/ http://my_host.org/ http://a.b/ http://-a.org/ http://a..org/
        http://ex%61mple.org/ http://exämple.org/ö https://example.org/? https://example.org/#
        https://example.org/%20~a!$&'()*+,;=:@?a[b]=c/?#f/? file:///etc/x
    """.split(),
    "coarnotify": [
        "https://example.org/a\n",
        *"http: https: http:x http:/x http://[::1/ http://[::1]x/ http://2001:db8::7/".split(),
    ],
}
URIS = sorted({*HTTP_URIS, *OTHER_URIS, *NO_URIS, *itertools.chain(*URI_DIFFERENCES.values())})
URI_MEMBERS = ("id", "origin.id", "context.id")


class Change(NamedTuple):
    """Another value for a member of a notification, which may be embedded in another one."""

    pattern: str
    member: str
    value: Any


def mutations() -> Iterator[tuple[Any, Change]]:
    """Change one member of each notification, also where the notification is embedded."""
    for number, (name, document) in enumerate(NOTIFICATIONS.items()):
        uris = URIS[number % 3 :: 3]  # all in any three patterns
        embedding = {**ACCEPT, "inReplyTo": document["id"], "object": document}
        for member in members({**document, "object": None} if name in ANSWERS else document):
            values = VALUES + (TYPES if member.endswith("type") else [])
            for value in values + (uris if member in URI_MEMBERS else []):
                yield changed(document, member, value), Change(name, member, value)
            for value in values[::3] if member != "@context" else []:
                embedded = changed(embedding, f"object.{member}", value)
                yield embedded, Change(name, member, value)


# What the two think differently of, who accepts it, and whether a change is of that kind.
# fmt: off
DIFFERENCES: list[tuple[str, str, Callable[[Change], bool]]] = [
    ("the members of an Announce that coarnotify does not look at", "coarnotify",
     lambda change: change.pattern.startswith("Announce")
     and change.member.split(".")[0] in ("origin", "target", "object", "actor", "inReplyTo")),
    ("an id that is missing, because coarnotify invents one", "coarnotify",
     lambda change: (change.member in ("id", "object.id") and change.value in (ABSENT, None))
     or (change.member == "object" and change.value == {})),
    ("a type that holds something else than strings", "coarnotify",
     lambda change: change.member == "type" and not isinstance(change.value, str)),
    ("an actor's type that is a list", "coarinbox",
     lambda change: change.member == "actor.type" and isinstance(change.value, list)),
    *((f"the URI {uri!r}", who, lambda change, uri=uri: change.value == uri)
      for who, uris in URI_DIFFERENCES.items() for uri in uris),
]
# fmt: on


def accepted_by_coarnotify(document: Any) -> bool:
    try:
        coarinbox.coarnotify_server().receive(json.dumps(document))
    except Exception:  # it crashes in many ways on what it refuses
        return False
    return True


@needs_coarnotify
class CoarnotifyTest(unittest.TestCase):
    """What the library accepts, and the mode that asks the library itself."""

    def test_it_agrees_about_thousands_of_faults_but_for_the_known_differences(self) -> None:
        seen: set[str] = set()
        for document, change in mutations():
            ours = not coarinbox.assess(document, True).errors
            if ours != accepted_by_coarnotify(document):
                accepts = "coarinbox" if ours else "coarnotify"
                known = [what for what, who, applies in DIFFERENCES
                         if who == accepts and applies(change)]  # fmt: skip
                self.assertTrue(known, f"only {accepts} accepts {document}, with {change}")
                seen.add(known[0])
        self.assertEqual(seen, {what for what, _, _ in DIFFERENCES})

    def test_it_accepts_all_samples_and_replies(self) -> None:
        documents = [coarinbox.sample(name) for name in NOTIFICATIONS]
        offers = [coarinbox.sample(name) for name in REQUESTS]
        documents += [coarinbox.reply(offer, name) for offer in offers for name in REPLIES]
        self.assertEqual(len(documents), 30)
        for document in documents:
            self.assertTrue(accepted_by_coarnotify(document), document)

    def test_its_mode_refuses_what_it_refuses_in_its_words(self) -> None:
        document = offer(origin__id="mailto:a@example.org", actor__type="Robot")
        before = copy.deepcopy(document)
        errors, warnings = coarinbox.assess(document, "coarnotify")
        self.assertEqual(document, before)
        self.assertEqual(warnings, coarinbox.validate(document))
        self.assertEqual({each.pointer for each in errors}, {"/origin/id", "/actor/type"})
        self.assertEqual({(each.level, each.code) for each in errors}, {(E, "coarnotify")})
        for found in errors:
            self.assertTrue(found.message.startswith("coarnotify: "), found.message)
        self.assertIn("URL scheme must be http or https", str(errors))

    def test_its_mode_accepts_what_it_accepts(self) -> None:
        self.assertEqual(coarinbox.assess(ACCEPT, "coarnotify"), ([], []))
        errors, warnings = coarinbox.assess(altered("Announce Review", origin=ABSENT), "coarnotify")
        self.assertEqual((errors, [each.level for each in warnings]), ([], [E]))

    def test_where_it_crashes_it_refuses(self) -> None:
        deep: Any = {}
        for _ in range(90):
            deep = {**ACCEPT, "object": deep}
        text = json.dumps(ACCEPT)  # which it accepts as if it were the object
        documents: list[Any] = [text, {}, [], {"type": {}}, deep, {"type": "Nothing"}]
        for document in documents:
            errors, _ = coarinbox.assess(document, "coarnotify")
            self.assertEqual([each.level for each in errors], [E], str(document)[:80])
            self.assertLess(len(str(errors)), 100_000)
        self.assertEqual(errors[0].pointer, "/type")


# --- Properties ----------------------------------------------------------------------------------


class PropertiesTest(unittest.TestCase):
    """What holds for any document that is nearly a notification."""

    def test_it_is_judged_whatever_it_holds_in_any_order_and_is_not_changed(self) -> None:
        documents = [document for document, _ in mutations()][::40]
        self.assertGreater(len(documents), 100)
        for document in documents:
            before, findings = repr(document), coarinbox.validate(document)
            self.assertEqual(coarinbox.validate(dict(reversed(document.items()))), findings)
            for mode, media_type in (("DSpace", "x/y"), ("PCI", JSON_LD), ("PREreview", JSON_LD)):
                arrival = coarinbox.Arrival(media_type, ["http://a.example/"], "20261125_120000")
                errors, warnings = coarinbox.assess(document, mode, arrival)
                for found in errors + warnings:
                    self.assertTrue(found.message.endswith(found.fix))
                    self.assertLess(len(found.message), 2000)
                    written = json.loads(json.dumps(found.as_json(), allow_nan=False))
                    self.assertEqual(coarinbox.Finding.from_json(written), found)
                for found in warnings:
                    self.assertNotEqual(found.level, E)
                    self.assertNotIn(mode, found.refused_by)
            self.assertEqual(repr(document), before)


# --- Samples and replies -------------------------------------------------------------------------

REQUESTS = ("Request Endorsement", "Request Review")
ANSWERS = ("Accept", "Reject", "Tentatively Accept", "Tentatively Reject", "Undo Offer")
ANNOUNCEMENTS = ("Announce Endorsement", "Announce Review", "Announce Service Result")
REPLIES = tuple(sorted((*ANSWERS, *ANNOUNCEMENTS, "Unprocessable Notification")))


class SampleTest(unittest.TestCase):
    def test_each_is_new_and_clean_between_services_that_can_be_chosen(self) -> None:
        for name in NOTIFICATIONS:
            first, second = coarinbox.sample(name), coarinbox.sample(name.upper())
            document = coarinbox.sample(name, origin=JOURNAL, target=REPOSITORY)
            for each in (first, second, document):
                pattern = coarinbox.pattern_of(each)
                self.assertEqual((pattern and pattern.name, codes(each)), (name, set()))
            self.assertNotEqual(first["id"], second["id"])
            first["origin"]["id"] = first["object"]["id"] = "changed"
            self.assertNotIn("changed", json.dumps([second, coarinbox.sample(name)]))
            self.assertEqual((document["origin"], document["target"]), (JOURNAL, REPOSITORY))
            if name in ANSWERS:
                ends = (JOURNAL, REPOSITORY) if name == "Undo Offer" else (REPOSITORY, JOURNAL)
                offered = document["object"]
                self.assertEqual((offered["origin"], offered["target"]), ends)

    def test_it_can_answer_an_offer_between_other_services(self) -> None:
        other = {**JOURNAL, "id": "https://reviews.example.net/"}
        for name in (*REPLIES, "Announce Relationship"):
            with self.subTest(name):
                document = coarinbox.sample(name, in_reply_to=OFFER, origin=other, target=JOURNAL)
                self.assertEqual((document["inReplyTo"], codes(document)), (OFFER["id"], set()))
                self.assertEqual((document["origin"], document["target"]), (other, JOURNAL))
                actor = AUTHOR if name == "Undo Offer" else other  # a service acts for itself
                self.assertEqual(document["actor"]["id"], actor["id"])
        for name in REQUESTS:
            with self.assertRaisesRegex(ValueError, f"{name} .* answers no Offer"):
                coarinbox.sample(name, in_reply_to=OFFER)

    def test_an_unknown_name_gets_the_list_and_a_suggestion_if_one_is_close(self) -> None:
        suggestions = {"ANNOUNCE-REVIEW": "Announce Review", "": "", "zebra": "", "x\n" * 1000: ""}
        for name, suggestion in suggestions.items():
            with self.subTest(name), self.assertRaises(ValueError) as caught:
                coarinbox.sample(name)
            text = str(caught.exception)
            self.assertIn(", ".join(NOTIFICATIONS), text)
            self.assertEqual(text.partition("; did you mean ")[2].strip("?"), suggestion)
            self.assertLess(len(text), 500)
            self.assertNotIn("\n", text)


class ReplyTest(unittest.TestCase):
    def test_a_clean_offer_gets_clean_replies_from_its_target_to_its_origin(self) -> None:
        for offered, name in itertools.product(map(NOTIFICATIONS.get, REQUESTS), REPLIES):
            with self.subTest(offered["type"], reply=name):
                before = json.dumps(offered)
                document = coarinbox.reply(offered, name)
                self.assertEqual(coarinbox.pattern_of(document), coarinbox.find_pattern(name))
                self.assertEqual(codes(document), set())
                self.assertEqual(document["inReplyTo"], offered["id"])
                ends = (REPOSITORY, JOURNAL) if name == "Undo Offer" else (JOURNAL, REPOSITORY)
                self.assertEqual((document["origin"], document["target"]), ends)
                if name in ANSWERS:
                    self.assertEqual(document["object"], changed(offered, "@context", ABSENT))
                elif name in ANNOUNCEMENTS:
                    self.assertEqual(document["context"], offered["object"])
                    self.assertNotEqual(document["object"]["id"], offered["object"]["id"])
                else:
                    self.assertEqual(document["object"]["id"], offered["id"])
                document["target"]["id"] = document["object"]["id"] = "changed"
                self.assertEqual(json.dumps(offered), before)

    def test_its_findings_are_due_to_the_offer(self) -> None:
        names = [name for name in members(OFFER) if name not in ("id", "type")]
        replies = ("Accept", "Announce Review", "Undo Offer", "Unprocessable Notification")
        faulty = 0
        for member, value in itertools.product(names, (ABSENT, None, 5, [], {})):
            offered = changed(OFFER, member, value)
            if any(codes(coarinbox.reply(offered, name)) for name in replies):
                self.assertTrue(coarinbox.validate(offered), (member, value))
                faulty += 1
        self.assertGreater(faulty, 50)

    def test_any_offer_can_be_answered_and_nothing_else(self) -> None:
        types = ["coar-notify:New", "Offer"]
        self.assertEqual(coarinbox.reply(offer(type=types))["object"]["type"], types)
        no_offer, no_id = "an object whose type includes Offer", "its id is not an absolute URI"
        for document, reason in [
            (None, no_offer), ([OFFER], no_offer), (ACCEPT, no_offer),
            (offer(type=ABSENT), no_offer), (offer(id=ABSENT), no_id), (offer(id="1"), no_id),
        ]:  # fmt: skip
            with self.assertRaisesRegex(ValueError, reason):
                coarinbox.reply(document)
        for name in (*REQUESTS, "Announce Relationship"):
            with self.assertRaisesRegex(ValueError, f"{name} answers no Offer.*: Accept, "):
                coarinbox.reply(OFFER, name)
        with self.assertRaisesRegex(ValueError, "did you mean Reject?"):
            coarinbox.reply(OFFER, "Rejct")


# --- LDN -----------------------------------------------------------------------------------------


class LdnTest(InboxTest):
    """The demands of W3C Linked Data Notifications on a receiver (sections 3.1 and 3.3)."""

    def here(self, path: str) -> str:
        host, port = address(self.server)
        return f"http://{host}:{port}{path}"

    def test_must_answer_a_post_with_201_and_a_location_to_retrieve_it_from(self) -> None:
        document = changed(ACCEPT, "target.inbox", self.here("/inbox"))
        answer = self.post(document)
        self.assertEqual((answer.status, answer.headers["Content-Type"]), (201, "application/json"))
        location = answer.headers["Location"]
        self.assertRegex(location, f"^{self.here('/inbox/')}{coarinbox.NAME}$")
        self.assertEqual(fetch(location).json(), document)
        receipt: dict[str, Any] = {"location": location, "pattern": "Accept", "warnings": []}
        self.assertEqual(answer.json(), receipt)

    @with_settings(RESPONSE_STATUS=202)
    def test_must_answer_202_with_the_status_in_the_body(self) -> None:
        answer = self.post()
        self.assertEqual((answer.status, answer.headers["Location"]), (202, None))
        self.assertEqual(answer.json()["pattern"], "Accept")
        self.assertEqual(fetch(answer.json()["location"]).body, BODY)

    def test_must_accept_json_ld_with_or_without_a_profile_and_should_say_so(self) -> None:
        for content_type in [
            "application/ld+json", f'application/ld+json;profile="{AS2}"',
            'application/ld+json; profile="http://example.org/profile"; charset=utf-8',
            "APPLICATION/LD+JSON ; charset=UTF-8", "application/json", "application/activity+json",
        ]:  # fmt: skip
            answer = self.post(Content_Type=content_type, Slug="mine")
            self.assertEqual(answer.status, 201, content_type)
        answer = self.ask("OPTIONS", "/inbox")
        self.assertEqual((answer.status, answer.body), (204, b""))
        accepted = "application/ld+json, application/json, application/activity+json"
        self.assertEqual(answer.headers["Accept-Post"], accepted)

    def test_must_list_the_notifications_with_the_requested_url_as_subject(self) -> None:
        locations = {self.post().headers["Location"] for _ in range(3)}
        for path in ("/inbox", "/inbox/", "/inbox?status=503"):
            answer = self.ask("GET", path, headers={"Accept": JSON_LD})
            self.assertEqual((answer.status, answer.headers["Content-Type"]), (200, JSON_LD))
            listing = answer.json()
            self.assertEqual({entry["@id"] for entry in listing.pop("ldp:contains")}, locations)
            context = {"ldp": "http://www.w3.org/ns/ldp#"}
            expected = {"@context": context, "@id": self.here(path), "@type": "ldp:Container"}
            self.assertEqual(listing, expected)

    def test_should_refuse_what_breaks_a_constraint_and_say_where_they_stand(self) -> None:
        answer = self.post({"@id": "", "http://www.w3.org/ns/ldp#contains": []})
        self.assert_problem(answer, 400)
        constraints = self.here("/constraints")
        link = f'<{constraints}>; rel="http://www.w3.org/ns/ldp#constrainedBy"'
        self.assertEqual(answer.headers["Link"], link)
        self.assertEqual(fetch(constraints).status, 200)

    def test_is_discovered_through_a_link_or_json_ld_where_that_is_preferred(self) -> None:
        inbox, html = self.here("/inbox"), "text/html; charset=utf-8"
        for method, accept, content_type in [
            ("GET", JSON_LD, JSON_LD), ("GET", f"{JSON_LD}, text/html;q=0.9", JSON_LD),
            ("GET", "*/*", html), ("GET", f"text/html, {JSON_LD}", html), ("HEAD", "*/*", html),
        ]:  # fmt: skip
            answer = self.ask(method, "/", headers={"Accept": accept})
            link = f'<{inbox}>; rel="http://www.w3.org/ns/ldp#inbox"'
            found = (answer.headers["Link"], answer.headers["Content-Type"])
            self.assertEqual(found, (link, content_type), accept)
            if content_type == JSON_LD:
                self.assertEqual(answer.json()["ldp:inbox"], {"@id": inbox})


# --- HTTP ----------------------------------------------------------------------------------------


class ResourcesTest(InboxTest):
    def test_head_is_get_without_the_body(self) -> None:
        location = path_of(self.post().headers["Location"])
        for path in ("/", "/inbox", location, "/constraints", "/deliveries", "/nothing"):
            got, head = self.ask("GET", path), self.ask("HEAD", path)
            self.assertEqual((head.status, head.body), (got.status, b""))
            self.assertEqual(int(head.headers["Content-Length"]), len(got.body))
            for name in ("Content-Type", "Link", "Vary"):
                self.assertEqual(head.headers[name], got.headers[name], path)
            self.assertTrue(head.headers["Date"])  # RFC 9110 section 6.6.1
            self.assertEqual(head.headers["Server"], f"coarinbox/{coarinbox.__version__}")
        with connect(self.server, get_head("Connection: close").replace(b"GET", b"HEAD")) as client:
            received = b"".join(iter(lambda: client.recv(65536), b""))
        self.assertEqual(received.index(b"\r\n\r\n"), len(received) - 4)

    def test_a_deleted_notification_is_gone(self) -> None:
        kept, gone = (self.post().headers["Location"] for _ in range(2))
        self.assertEqual(fetch(gone, "DELETE").status, 204)
        for method in ("GET", "DELETE"):
            self.assert_problem(fetch(gone, method), 404)
        self.assertEqual(self.listed(), [kept])

    def test_deleting_the_inbox_empties_it_whoever_else_does_the_same(self) -> None:
        raw(self.server, post_to() * 20, "half-close")
        self.assertEqual(len(self.listed()), 20)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: self.ask("DELETE", "/inbox"), range(4)))
        found = [(answer.status, answer.headers["Content-Length"]) for answer in answers]
        self.assertEqual(found, [(204, None)] * 4)  # RFC 9110 section 8.6
        self.assertEqual((self.stored(), self.listed()), ([], []))
        self.assert_serves()

    def test_what_a_resource_cannot_do_is_405_with_what_it_can(self) -> None:
        location = path_of(self.post().headers["Location"])
        for path, works in [
            ("/", "GET"), ("/constraints", "GET"), ("/deliveries", "GET"),
            ("/inbox", "GET, POST, DELETE"), (location, "GET, DELETE"),
        ]:  # fmt: skip
            for method in ("OPTIONS", "PUT", "PATCH", "TRACE", "get"):
                answer = self.ask(method, path)
                allowed = set(answer.headers["Allow"].split(", "))
                self.assertEqual(allowed, {*works.split(", "), "HEAD", "OPTIONS"})
                self.assertEqual(answer.status, 204 if method == "OPTIONS" else 405, path)
        self.assert_problem(self.ask("POST", location, BODY), 405)
        self.assert_problem(self.ask("BREW", "/nothing"), 404)

    def test_names_of_any_other_form_are_404(self) -> None:
        name = path_of(self.post().headers["Location"]).rpartition("/")[2]
        os.mkdir(os.path.join(self.server.store.directory, "sub"))
        for other in [
            "x", "..", ".", "../store", "..%2fstore", "%2e%2e", "%2e%2e/x", name + ".json",
            name.upper(), name + "%00", name + "/", name + "/x", "sub/" + name, "%5c" + name,
            "./" + name, "..;/" + name, "x" * 5000, name[:-1], name + "0", "\\" + name,
        ]:  # fmt: skip
            for method in (b"GET", b"DELETE"):
                head = get_head(target=f"/inbox/{other}").replace(b"GET", method, 1)
                self.assert_problem(self.ask_raw(head), 404)
        self.assertEqual(self.stored(), [name])

    def test_a_notification_is_json_ld_but_for_those_who_prefer_html(self) -> None:
        location = path_of(self.post(changed(ACCEPT, "summary", "<b>&")).headers["Location"])
        for path, (is_page, accept) in itertools.product([location, "/inbox?close=1&times=2"], [
            (True, "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
            (True, "text/*"), (True, "text/html, application/ld+json;q=0"),
            (True, "TEXT/HTML ; Q=0.9, application/ld+json;q=0.8"),
            (True, 'application/ld+json;profile="a,b";q=0.4, text/html;q=0.5'),
            (False, "*/*"), (False, "text/turtle"), (False, ""), (False, "text/html;q=0"),
            (False, "text/html, application/json"), (False, "text/html;q=0.5, application/*"),
            (False, "text/html;q=0.001, */*;q=0.01"),
        ]):  # fmt: skip
            answer = self.ask("GET", path, headers={"Accept": accept})
            content_type = "text/html; charset=utf-8" if is_page else JSON_LD
            self.assertEqual(answer.headers["Content-Type"], content_type, (path, accept))
            self.assertEqual(answer.headers["Vary"], "Accept, Origin")
            self.assertEqual(answer.headers["X-Content-Type-Options"], "nosniff")
            if is_page:
                self.assertNotIn(b"<b>&", answer.body)
                self.assertIn("default-src 'none'", answer.headers["Content-Security-Policy"])
                self.assertEqual(answer.headers["Referrer-Policy"], "same-origin")
                self.assertEqual(answer.headers["Cache-Control"], "no-store")

    def test_the_constraints_are_the_rules(self) -> None:
        listed = self.ask("GET", "/constraints").json()
        self.assertEqual(listed["constraints"], coarinbox.constraints())
        self.assertEqual(listed["receivers"], coarinbox.receivers())
        self.assertEqual(listed["specification"], SPECIFICATION)
        words = {level: meaning["word"] for level, meaning in listed["levels"].items()}
        self.assertEqual((words, listed["refused"]), ({E: "error", M: "must", S: "should"}, ["E"]))
        page = self.ask("GET", "/constraints", headers={"Accept": "text/html"}).body.decode()
        self.assertIn("<title>Request Review · coarinbox</title>", page)


class HostTest(InboxTest):
    """By which names an inbox may be called, and what its URLs are then."""

    def test_urls_are_those_that_the_client_uses(self) -> None:
        hosts = "LOCALHOST localhost. inbox.localhost:12345 127.9.9.9 [::1]:80 [::ffff:127.0.0.1]"
        for host in hosts.split():
            location = self.post(Host=host).headers["Location"]
            self.assertTrue(location.startswith(f"http://{host}/inbox/"), location)

    def test_only_http_1_0_may_come_without_a_host(self) -> None:
        """RFC 9112 section 3.2; then URLs are those of the address bound."""
        data = post_to().replace(b"Host: localhost\r\n", b"")
        answer = self.ask_raw(data.replace(b"HTTP/1.1", b"HTTP/1.0"))
        self.assertEqual(answer.status, 201)
        self.assertTrue(answer.headers["Location"].startswith(self.server.base + "/inbox/"))
        for without_host in (data, data.replace(b" /inbox", b" http://localhost/inbox")):
            problem = self.assert_problem(self.ask_raw(without_host, "read"), 400)
            self.assertIn("Host", problem["detail"])

    def test_the_names_of_other_sites_are_refused_on_loopback(self) -> None:
        for host in ("evil.example", "localhost.evil.example", "10.0.0.1", "notlocalhost", "[::2]"):
            problem = self.assert_problem(self.post(Host=host), 421)
            self.assertIn("BASE_URL", problem["detail"])
        self.assert_problem(self.ask_raw(get_head(target="http://evil.example/")), 421)
        self.assertEqual(self.stored(), [])

    def test_a_malformed_host_is_refused(self) -> None:
        hosts = "localhost:x localhost:123456 <script> localhost/x user@localhost [::1 ö".split()
        for head in (
            *(get_head(host=host) for host in hosts), get_head("Host: a"),
            get_head(target="http://localhost/", host="a b"),
        ):  # fmt: skip
            self.assert_problem(self.ask_raw(head), 400)

    @with_settings(BASE_URL="https://inbox.example.org/tunnel/")
    def test_base_url_goes_into_every_url_and_may_be_the_host(self) -> None:
        base = "https://inbox.example.org/tunnel"
        answer = self.post(Host="inbox.example.org")
        self.assertEqual(answer.status, 201)
        self.assertTrue(answer.headers["Location"].startswith(f"{base}/inbox/2"))
        self.assertEqual(self.ask("GET", "/inbox").json()["@id"], f"{base}/inbox")
        self.assertEqual(self.listed(), [answer.headers["Location"]])
        self.assertIn(f"<{base}/inbox>", self.ask("GET", "/").headers["Link"])
        self.assertIn(f"<{base}/constraints>", self.post({}).headers["Link"])
        self.assert_problem(self.post(Host="other.example.org"), 421)
        answer = self.ask_raw(b"GET /inbox HTTP/1.0\r\n\r\n")
        self.assertEqual(answer.json()["@id"], f"{base}/inbox")

    @with_settings(HOST="0.0.0.0")
    def test_an_inbox_that_is_open_to_others_answers_to_every_name(self) -> None:
        answer = self.post(Host="coarinbox:5005")
        self.assertTrue(answer.headers["Location"].startswith("http://coarinbox:5005/inbox/"))


class LogTest(InboxTest):
    def test_each_finding_is_answered_and_has_a_line_for_clients_that_hide_the_answer(self) -> None:
        problem = self.assert_problem(self.post(ModesTest.INVALID), 400)
        for name, levels in (("errors", [E]), ("warnings", [M, S])):
            self.assertEqual([each["level"] for each in problem[name]], levels)
        delivery, *lines = self.log_lines()
        (name,) = (each["name"] for each in self.ask("GET", "/deliveries").json()["deliveries"])
        page = f"{self.server.base}/deliveries/{name}"
        self.assertEqual(delivery, f"400 Accept from 127.0.0.1 1 error, 2 warnings {page}")
        missing = 'M target.inbox is missing; it must be an HTTP URI; write `"inbox": "https://…"`'
        self.assertIn(f"  {missing}", lines)
        self.assertEqual([line[:4] for line in lines], ["  E ", "  M ", "  S "])
        # The page writes the answer anew.
        shown = Page(self.ask("GET", f"/deliveries/{name}", None, HTML).body.decode())
        written = json.dumps(problem, indent=2, ensure_ascii=False)
        self.assertIn(" ".join(written.split()), shown.text)
        accepted = self.post().json()
        url = path_of(accepted["location"]).replace("/inbox/", "/deliveries/")
        shown = Page(self.ask("GET", url, None, HTML).body.decode())
        self.assertIn(" ".join(json.dumps(accepted, indent=2).split()), shown.text)

    def test_a_request_has_one_short_line_and_one_with_the_reason_of_a_refusal(self) -> None:
        raw(self.server, b"GET /\x1b[31m\rforged HTTP/1.1\r\n\r\n")
        for target in ("/%0aforged", "/" + "x" * 60_000):
            self.ask_raw(get_head(target=target))
        lines = self.log_lines()
        self.assertEqual(len(lines), 6, lines)
        for line in lines:
            self.assertTrue(line.isprintable() and len(line) < 1100, line)

    @with_settings(DEBUG=True)
    def test_a_request_that_is_logged_whole_has_a_thousand_lines_at_most(self) -> None:
        self.post(b"\n" * 5000)
        *_, last = (line for line in self.log_lines() if line.startswith("127.0.0.1   "))
        self.assertRegex(last, "and 4,00[0-9] more lines")
        self.assertLess(len(self.log_lines()), 1010)
        self.post(b"[" + b" " * 100_000 + b"5]")  # too long to be indented
        self.assertIn("5]", "".join(self.log_lines()))

    def test_no_part_of_a_request_swells_its_answer_or_the_log(self) -> None:
        """65 kB became 390, because JSON writes six characters for one."""
        swelling = b"\xff" * 60_000
        for data in (
            b"POST /" + swelling + b" HTTP/1.1\r\n\r\n",
            post_head("Content-Length: 0").replace(b"/inbox", b"/" + b"x" * 60_000),
            post_head("Content-Length: 0").replace(b"localhost", b"x" * 60_000),
            post_head("Content-Length: 0").replace(JSON_LD.encode(), swelling),
            post_head("Content-Length: 0", "Origin: http://" + "\xff" * 60_000),
            post_head("Content-Length: 0", "Content-Encoding: " + "\xff" * 60_000),
            post_head("Content-Length: 0", "X: " + "\xff" * 16_000),
        ):
            answer = self.ask_raw(data)
            self.assertGreaterEqual(answer.status, 400)
            self.assertLess(len(answer.body), 4_000, data[:60])
        with self.server.deliveries.open() as log:
            self.assertEqual([line[:50] for line in log if len(line) > 20_000], [])

    @with_settings(DEBUG=True, MAX_CONTENT_LENGTH=9)
    def test_a_request_that_is_refused_early_is_logged_whole_too(self) -> None:
        self.ask_raw(post_head("Content-Length: 10", "X-Mine: yes"))
        self.assertIn("X-Mine: yes", "".join(self.log_lines()))

    def test_what_the_script_of_a_page_asks_for_is_not_worth_a_line(self) -> None:
        script = {"Sec-Fetch-Dest": "empty", "Sec-Fetch-Site": "same-origin"}
        self.ask("GET", "/", headers=script)
        self.assertEqual(self.log_lines(), [])
        self.ask("DELETE", "/inbox", headers=script)
        self.ask("GET", "/", headers={"Sec-Fetch-Dest": "document"})
        self.assertEqual(len(self.log_lines()), 2)


# --- Bad input -----------------------------------------------------------------------------------


class BadBodyTest(InboxTest):
    def test_a_body_that_is_no_notification_is_refused_and_not_stored(self) -> None:
        for says, bodies in {
            "the body is empty": [b""],
            "the body is not JSON": [b" ", b"{", b"{}{}", b"{'id': 1}", b'{"a": 1,}', b"\0"],
            "not UTF-8": [b'{"id": "\xff"}', b"\xed\xa0\x80", BODY.decode().encode("utf-16")],
            "byte order mark": [b"\xef\xbb\xbf" + BODY],
            "NaN is not JSON": [b'{"id": NaN}'],
            "Infinity is not JSON": [b'{"id": Infinity}', b'{"id": -Infinity}'],
            "too large": [  # which receivers disagree about
                b'{"id": %s}' % number for number in (b"9" * 10**5, b"-" + b"9" * 5000, b"1e400")
            ],
            "the document is nested more than 100 levels deep": [
                start * depth + b"1" + end * depth
                for depth in (101, 1000, 100_000) for start, end in ((b"[", b"]"), (b'{"":', b"}"))
            ],
            "": [b"[" * 101, b"[" * 100_000, b'{"":' * 100_000],
            "the body is not JSON: Unterminated string": [b'"' + b"[" * 101],
            "not a valid notification": [
                b"null", b"5", b"[]", b"[%s]" % BODY, json.dumps(BODY.decode()).encode(),
            ],
        }.items():  # fmt: skip
            for body in bodies:
                problem = self.assert_problem(self.post(body), 400)
                self.assertIn(says, problem["detail"], body[:99])
        self.assertEqual(self.stored(), [])

    @with_settings(VALIDATE_INCOMING=False)
    def test_without_validation_any_object_or_array_is_accepted(self) -> None:
        for body, status in ((b"[]", 201), (b'{"id": []}', 201), (b"5", 400)):
            self.assertEqual(self.post(body).status, status, body)

    def test_every_byte_is_kept(self) -> None:
        for body in (
            BODY + b" \n", b"\t" + BODY, BODY.replace(b'", "', b'" ,\n"'),
            BODY.replace(b"J. Carberry", "Jürg, \U0001f600".encode()),
            BODY.replace(b"J. Carberry", rb"\ud800\u0000"),
            BODY[:-1] + b', "id": "urn:uuid:%s"}' % UUID.encode(),
            BODY[:-1] + b', "x:deep": %s}' % (b"[" * 99 + b"]" * 99),  # up to the limit
        ):  # fmt: skip
            answer = self.post(body)
            self.assertEqual(answer.status, 201, answer.body)
            self.assertEqual(fetch(answer.headers["Location"]).body, body)

    def test_the_wrong_type_or_coding(self) -> None:
        for name, helpful, advice, values in [
            ("Content-Type", "Accept-Post", "application/ld+json, ", [
                "text/plain", "", "application/jsonld", "json", "application/+json", "text/x+json",
            ]),
            ("Content-Encoding", "Accept-Encoding", "identity", ["gzip", "identity, br"]),
        ]:  # fmt: skip
            for value in values:
                answer = self.ask("POST", "/inbox", BODY, {name: value})
                self.assert_problem(answer, 415)
                self.assertIn("constrainedBy", answer.headers["Link"])
                self.assertIn(advice, answer.headers[helpful])
        untyped = post_to().replace(f"Content-Type: {JSON_LD}\r\n".encode(), b"")
        problem = self.assert_problem(self.ask_raw(untyped), 415)
        self.assertIn("Content-Type is missing,", problem["detail"])
        self.assertEqual(self.post(Content_Encoding="Identity").status, 201)


def chunked(body: bytes, size: int, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    parts = [b"%x%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks]
    return b"".join(parts) + b"0\r\n" + trailer + b"\r\n"


CHUNKED = "Transfer-Encoding: chunked"
# Requests that end before their body does, and what there is of it.
UNFINISHED = {
    post_head(f"Content-Length: {len(BODY) + 1}") + BODY: BODY,
    post_head(CHUNKED): b"",
    post_head(CHUNKED) + b"5": b"",
    post_head(CHUNKED) + b"5\r\nhel": b"hel",
    post_head(CHUNKED) + b"5\r\nhello": b"hello",
    post_head(CHUNKED) + b"5\r\nhello\r\n": b"hello",
}


def read_requests(data: bytes, size: int) -> list[Any]:
    """Read all requests out of bytes that arrive `size` at a time, until one has a problem."""
    requests: list[Any] = []
    incoming = coarinbox.Incoming()
    pieces = iter([data[start : start + size] for start in range(0, len(data), size)])
    while not requests or requests[-1].problem is None:
        reader = coarinbox.read_request(incoming, max_body=4000)
        try:
            while True:
                if next(reader) is None:
                    piece = next(pieces, b"")
                    incoming.data += piece
                    if not piece:
                        incoming.ended = coarinbox.Problem(400, "the input has ended")
        except StopIteration as stop:
            if stop.value is None:
                break
            requests.append(stop.value)
    return requests


class ReadRequestTest(unittest.TestCase):
    """How requests are told apart in a stream of bytes (RFC 9112), however those are cut."""

    def read(self, data: bytes) -> list[coarinbox.Request]:
        """Read the same requests out of all bytes at once, out of 7 at a time, and out of each."""
        sizes = (len(data), 7, 1) if len(data) < 10_000 else (len(data), 997)
        whole, *others = (read_requests(data, size) for size in sizes)
        for requests in others:
            self.assertEqual(repr([*map(vars, requests)]), repr([*map(vars, whole)]))
        return whole

    def read_one(self, data: bytes) -> coarinbox.Request:
        (request,) = self.read(data)
        self.assertIsNone(request.problem, data[:200])
        return request

    def assert_refused(self, data: bytes, status: int, reason: str = "") -> None:
        with self.subTest(data[:200]):
            *_, request = self.read(data)
            assert request.problem
            self.assertEqual(request.problem.status, status, request.problem)
            self.assertIn(reason, request.problem.detail)
            self.assertTrue(request.unread)  # so that no other request can follow

    def test_what_a_request_says(self) -> None:
        for data, *expected in [
            (b"GET / HTTP/1.1\r\nHost: a", "GET", "/", "HTTP/1.1", "a"),
            (b"brew /x?y#z HTTP/1.0", "brew", "/x?y#z", "HTTP/1.0", ""),
            (b"OPTIONS * HTTP/1.1\r\nHost: a", "OPTIONS", "*", "HTTP/1.1", "a"),
            (b"GET http://b:80/x HTTP/1.1\r\nHost: a", "GET", "/x", "HTTP/1.1", "b:80"),
            (b"GET HTTPS://b?y HTTP/1.1\r\nHost: a", "GET", "/?y", "HTTP/1.1", "b"),
            (b"GET //x//y HTTP/1.9\r\nHost: a", "GET", "/x//y", "HTTP/1.9", "a"),
        ]:
            found = self.read_one(data + b"\r\n\r\n")
            self.assertEqual([found.method, found.target, found.version, found.host], expected)
        lines = "X-Trace:a", "x-TRACE: \tb c\t ", "Empty:", "!#$%&'*+.^_`|~: x", "Latin: \xfc"
        found = self.read_one("\r\n".join(["GET / HTTP/1.1", *lines, "", ""]).encode("latin-1"))
        headers = {"x-trace": "a, b c", "empty": "", "!#$%&'*+.^_`|~": "x", "latin": "\xfc"}
        self.assertEqual(found.headers, headers)

    def test_bodies(self) -> None:
        right = f"Content-Length: {len(BODY)}"
        bodies = [
            post_head(right) + BODY,
            post_head(f"Content-Length:\t{len(BODY)} \t", "Transfer-encoded:") + BODY,
            post_head("Content-Length: " + "0" * 99 + right[16:]) + BODY,
            *(post_head("transfer-encoding: Chunked") + chunked(BODY, size) for size in (1, 100)),
            post_head(CHUNKED) + chunked(BODY, 100, extension=b' ; name="value"'),
            post_head(CHUNKED) + chunked(BODY, 100, trailer=b"X-Checksum: 1\r\n"),
            post_head(CHUNKED) + chunked(BODY, 999).replace(b"3d", b"0003D"),
            *(post_to().replace(b"POST", method) for method in (b"GET", b"DELETE", b"PUT")),
        ]
        self.assertEqual([request.body for request in self.read(b"".join(bodies))], [BODY] * 11)

    def test_requests_follow_each_other(self) -> None:
        data = b"\r\n\r\n\nGET / HTTP/1.1\r\n\r\n" + post_to() + b"\r\nGET /x HTTP/1.1\r\n\r\n\r\n"
        requests = [(request.target, request.body) for request in self.read(data)]
        self.assertEqual(requests, [("/", b""), ("/inbox", BODY), ("/x", b"")])
        self.assertEqual(self.read(b"\r\n\r\n"), [])

    def test_a_request_that_ends_early(self) -> None:
        whole = b"DELETE /inbox HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for data in [*(whole[:end] for end in range(1, len(whole))), *UNFINISHED]:
            self.assert_refused(data, 400, "the input has ended")
        for data, body in UNFINISHED.items():
            self.assertEqual(self.read(data)[0].body, body)

    def test_what_is_malformed(self) -> None:
        get, post = b"GET / HTTP/1.1\r\n", post_head(CHUNKED)
        for reason, requests in {
            "the request line is malformed": [
                b"GARBAGE\r\n", b"  \r\n", b"GET /\r\n", b"GET / HTTP/1.1 x\r\n",
                b"GET  / HTTP/1.1\r\n", b"GET\t/\tHTTP/1.1\r\n", b"GET /\x85 HTTP/1.1\r\n",
                b"GET /\x00 HTTP/1.1\r\n", b"GET / HTTP/x\r\n", b"GET / HTTP/1.11111\r\n",
                b"GET / HTTP/0.9\r\n", b"GET / HTTP/1.1\n", b"GET / FTP/1.1\r\n",
            ],
            "TLS": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n"],
            "header line 1 is malformed: it has no name before a colon": [get + line for line in (
                b"no colon\r\n", b" folded: x\r\n", b": y\r\n",
            )],
            "header line 1 is malformed: 'X": [get + line for line in (
                b"X: y\n", b"X: y\rContent-Length: 5\r\n", b"X: \x00\r\n", b"X\xa0: y\r\n",
                b"X: y\r\r\nContent-Length: 5\r\n", b"X : y\r\n",
            )],
            "header line 2 is malformed": [get + b"X: y\r\n folded\r\n"],
            "malformed": [post + chunks for chunks in (
                b"x\r\n", b"\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n",
                b"5\r\nhello, too long\r\n0\r\n\r\n", b"5\nhello\n0\n\n", b"5" * 17 + b"\r\n",
                b" 5\r\nhello\r\n0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n", b"5\r\nhelloXX0\r\n\r\n",
                b"5\r\nhelloX\n0\r\n\r\n", b"5;a\rb\r\nhello\r\n0\r\n\r\n",
                b"5;\0\r\nhello\r\n0\r\n\r\n", b"5;" + b"x" * 2000 + b"\r\nhello",
            )],
        }.items():  # fmt: skip
            for data in requests:
                self.assert_refused(data, 400, reason)
        self.assert_refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "not HTTP/2.0")

    def test_what_is_too_large(self) -> None:
        line, long = b"GET / HTTP/1.1\r\n", b"X: " + b"y" * 995 + b"\r\n"
        for lines, count in ((b"X: y\r\n" * 100, 100), (long * 65, 65)):
            values = self.read_one(line + lines + b"\r\n").headers["x"].split(", ")
            self.assertEqual(len(values), count)
        largest = BODY + b" " * (4000 - len(BODY))
        for data in (post_to(body=largest), post_head(CHUNKED) + chunked(largest, 999)):
            self.assertEqual(self.read_one(data).body, largest)
        for data, status, reason in [
            (b"GET /".ljust(65536, b"x"), 414, "65536"),
            (line + b"X: ".ljust(65536, b"y"), 431, "65536"),
            (line + b"X: y\r\n" * 101, 431, "more than 100 header lines"),
            (line + long * 66, 431, "65536"),  # the limit is for all of them
            (b"GET /" + b"x" * 60_000 + line[5:] + long * 6, 431, "65536"),
            (post_head(CHUNKED) + b"0\r\n" + b"X: y\r\n" * 101, 431, "100 header lines"),
            (post_head(CHUNKED) + b"0\r\nX: " + b"y" * 70_000, 431, "65536"),
            (post_head("Content-Length: 4001"), 413, "4000"),
            (post_head("Content-Length: " + "9" * 5000), 413, "4000"),
            (post_to(body=largest + b" "), 413, "4000"),
            (post_head(CHUNKED) + chunked(largest + b" ", 1000), 413, "4000"),
            (post_head(CHUNKED) + b"fffffffffffffff\r\n", 413, "4000"),
        ]:  # fmt: skip
            self.assert_refused(data, status, reason)

    def test_chunks_that_are_mostly_framing(self) -> None:
        """A body of 1 MB in chunks of one byte held up everybody for two seconds."""
        data = post_head(CHUNKED) + b"1;" + b"e" * 100 + b"\r\nx\r\n"
        chunk = data.partition(b"\r\n\r\n")[2]
        self.assertEqual(len(self.read_one(data + chunk * 600 + b"0\r\n\r\n").body), 601)
        self.assert_refused(data + chunk * 700, 400, "too small")

    def test_lengths_that_are_missing_or_wrong_or_contradict_each_other(self) -> None:
        right, wrong = f"Content-Length: {len(BODY)}", f"Content-Length: {len(BODY) + 1}"
        for verb in (b"POST", b"PUT"):
            self.assert_refused(post_head().replace(b"POST", verb) + BODY, 411)
        for length in ("-1", "+5", "5.0", "0x5", "1e3", "five", "5, 5", "5 5", "²", "1_000", ""):
            self.assert_refused(post_head(f"Content-Length: {length}") + BODY, 400)
        for lines in ((right, wrong), (right, right)):  # RFC 9110 section 8.6
            self.assert_refused(post_head(*lines) + BODY, 400)
        codings = "gzip, chunked", "chunked, chunked", "identity", "\x0bchunked", "chunked\xa0", ""
        for head in (
            *(post_head(f"Transfer-Encoding: {coding}") for coding in codings),
            post_head(right, CHUNKED), post_head(CHUNKED).replace(b"HTTP/1.1", b"HTTP/1.0"),
        ):  # fmt: skip
            self.assert_refused(head + chunked(BODY, 100), 400)
        for lengths in (("0", "43"), ("43", "0"), ("x", "0")):  # a body that passes for a request
            head = get_head(*(f"Content-Length: {length}" for length in lengths))
            self.assert_refused(head + get_head(), 400)


class FramingTest(InboxTest):
    """Which requests share a connection, and which end it."""

    settings = {"MAX_CONTENT_LENGTH": 4000}

    def test_requests_share_a_connection(self) -> None:
        connection = http.client.HTTPConnection(*address(self.server), timeout=10)
        self.addCleanup(connection.close)
        for method, path, body, status in [
            ("POST", "/inbox", BODY, 201), ("GET", "/inbox", None, 200), ("HEAD", "/", None, 200),
            ("OPTIONS", "/inbox", None, 204), ("GET", "/nothing", None, 404),
            ("DELETE", "/inbox", None, 204), ("POST", "/inbox", b"{}", 400),
        ]:  # fmt: skip
            self.assertEqual(ask_on(connection, method, path, body).status, status)
            self.assertIsNotNone(connection.sock, f"{method} {path} ended the connection")

    def test_http_1_0_and_close_end_the_connection(self) -> None:
        old = b"GET /inbox HTTP/1.0\r\n\r\n"
        for head in (old, get_head("Connection: close"), get_head("Connection: x ,\tClose")):
            answer = self.ask_raw(head, "read")
            self.assertEqual((answer.status, answer.headers["Connection"]), (200, "close"))
        requests = b"GET /inbox HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2
        answers = raw(self.server, requests, "half-close")
        self.assertEqual([answer.headers["Connection"] for answer in answers], ["keep-alive"] * 2)

    def test_a_refusal_ends_the_connection(self) -> None:
        for data, status in [
            (post_head(), 411), (post_head(CHUNKED) + b"x\r\n", 400), (b"GARBAGE\r\n", 400),
            (post_head("Content-Length: 5000", "Expect: 100-continue"), 413),
            (post_head("Content-Length: 5", "Expect: 100-continue").replace(b"ld+", b"x"), 415),
        ]:  # fmt: skip
            answer = self.ask_raw(data, "read")
            self.assert_problem(answer, status)
            self.assertEqual(answer.headers["Connection"], "close")
        self.assertEqual(self.stored(), [])
        raw(self.server, (post_head(CHUNKED) + chunked(BODY, 100)) * 2, "half-close")
        self.assertEqual([fetch(url).body for url in self.listed()], [BODY, BODY])

    def test_a_request_that_breaks_off_is_not_carried_out(self) -> None:
        self.post()
        for data in (get_head(target="/inbox").replace(b"GET", b"DELETE")[:-2], *UNFINISHED):
            answer = self.ask_raw(data)
            self.assertIn("ended before", self.assert_problem(answer, 400)["detail"])
            self.assertEqual(answer.headers["Connection"], "close")
        self.assertEqual(len(self.stored()), 1)

    def test_a_body_that_nobody_needs_is_no_request(self) -> None:
        smuggled = get_head(target="/smuggled")
        head = get_head(f"Content-Length: {len(smuggled)}", target="/inbox")
        for method, status in ((b"GET", 200), (b"DELETE", 204), (b"BREW", 405)):
            data = head.replace(b"GET", method, 1) + smuggled + get_head()
            answers = raw(self.server, data, "half-close")
            self.assertEqual([answer.status for answer in answers], [status, 200])

    def test_100_continue_comes_before_the_answer_even_if_it_had_to_wait_for_room(self) -> None:
        send_bytes, tried, read = socket.socket.send, threading.Event(), threading.Event()

        def send_later(sock: socket.socket, data: bytes) -> int:
            if data.startswith(b"HTTP/1.1 100") and not read.is_set():
                tried.set()
                raise BlockingIOError
            return send_bytes(sock, data)

        head = post_head(f"Content-Length: {len(BODY)}", "Expect: 100-continue")
        with unittest.mock.patch("socket.socket.send", send_later):
            with connect(self.server, head) as connection:
                self.assertTrue(tried.wait(10))
                connection.sendall(BODY)
                self.wait_until(lambda: self.stored() != [])
                read.set()
                self.assertEqual(connection.recv(25), b"HTTP/1.1 100 Continue\r\n\r\n")
                self.assertEqual(answer_on(connection).status, 201)


class StallTest(InboxTest):
    """Clients that do not go on: `REQUEST_TIMEOUT` ends them."""

    settings = {"REQUEST_TIMEOUT": 0.2}

    def test_a_request_that_does_not_end_is_answered_and_silence_is_not(self) -> None:
        stalled = [*UNFINISHED, b"", b"\r\n"]
        with concurrent.futures.ThreadPoolExecutor(len(stalled)) as pool:
            answers = list(pool.map(lambda data: raw(self.server, data), stalled))
        self.assertEqual(answers[-2:], [[], []])
        for data, (answer,) in zip(UNFINISHED, answers):
            self.assert_problem(answer, 408)
            self.assertEqual(answer.headers["Connection"], "close", data)
        self.assertEqual(self.stored(), [])
        deliveries = self.ask("GET", "/deliveries").json()["deliveries"]
        self.assertEqual([each["status"] for each in deliveries], [408] * len(UNFINISHED))
        bodies = sorted(each["body"] for each in deliveries)
        self.assertEqual(bodies, sorted(body.decode() for body in UNFINISHED.values()))

    @unittest.skipUnless(os.name == "posix", "Windows takes an answer of any length at once")
    def test_a_client_that_does_not_read_its_answer_is_disconnected(self) -> None:
        name = "20200101_000000_" + "a" * 32
        pathlib.Path(self.server.store.directory, f"{name}.json").write_bytes(b" " * 10_000_000)
        with connect(self.server, get_head(target=f"/inbox/{name}")) as connection:
            connection.recv(1)
            self.wait_until(lambda: "timed out" in "".join(self.log_lines()))
        self.assert_serves()

    def test_empty_lines_without_an_end_are_not_read_for_ever(self) -> None:
        with connect(self.server) as connection, self.assertRaises(ConnectionError):
            started = time.monotonic()
            while time.monotonic() < started + 10:
                connection.sendall(b"\r\n" * 100)
        self.assert_serves()

    def test_a_request_that_drips_gets_no_more_time_than_one_that_stalls(self) -> None:
        with connect(self.server) as connection:
            begun = time.monotonic()
            while not select.select([connection], [], [], 0.02)[0]:
                self.assertLess(time.monotonic() - begun, 5)
                connection.sendall(b"G")
            problem = self.assert_problem(answer_on(connection), 408)
            self.assertIn("REQUEST_TIMEOUT", problem["detail"])


# --- Storage -------------------------------------------------------------------------------------


def beside(server: Any, **settings: Any) -> Any:
    """Serve another inbox on the store of `server`."""
    return serving(STORE_DIR=server.store.directory, **settings)


class StorageTest(InboxTest):
    settings = {"FSYNC": True}

    @property
    def directory(self) -> pathlib.Path:
        return pathlib.Path(self.server.store.directory)

    def test_a_file_holds_the_bytes_that_were_sent_even_where_there_are_no_hard_links(self) -> None:
        no_links = unittest.mock.patch("os.link", side_effect=PermissionError(errno.EPERM, "no"))
        other = self.directory / "other"
        other.touch()
        for disk in (contextlib.nullcontext(), no_links):
            with disk:
                name = self.post().headers["Location"].rpartition("/")[2]
            file = self.directory / f"{name}.json"
            self.assertEqual((file.read_bytes(), file.stat().st_mode), (BODY, other.stat().st_mode))
            file.unlink()
        self.assertEqual(files_in(self.directory), ["other"])

    def test_a_201_means_that_it_is_listed_at_once_under_a_name_of_its_own(self) -> None:
        before = time.gmtime()[:6]

        def post_and_look(_: int) -> bool:
            location = self.post().headers["Location"]
            return location in self.listed() and self.ask("GET", path_of(location)).body == BODY

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            self.assertTrue(all(pool.map(post_and_look, range(20))))
        first, *_, last = (time.strptime(name[:15], "%Y%m%d_%H%M%S") for name in self.stored())
        self.assertTrue(before <= first[:6] <= last[:6] <= time.gmtime()[:6])
        self.assertEqual(len(self.listed()), 20)

    def test_the_directory_is_the_only_truth(self) -> None:
        names = [f"2020010{day}_000000_" + digit * 32 for day, digit in enumerate("fac", 1)]
        for name in reversed(names):
            (self.directory / f"{name}.json").write_bytes(b"[dropped in]")
        strangers = [f".{names[0]}.part", f"{names[0]}.txt", "README.json"]
        for stranger in [*strangers, "deliveries.jsonl"]:
            (self.directory / stranger).write_bytes(BODY)
        oldest_first = [f"/inbox/{name}" for name in names]
        self.assertEqual([path_of(url) for url in self.listed()], oldest_first)
        self.assertEqual(self.ask("GET", oldest_first[0]).body, b"[dropped in]")
        (self.directory / f"{names[0]}.json").unlink()
        self.assertEqual([path_of(url) for url in self.listed()], oldest_first[1:])
        self.assert_problem(self.ask("GET", oldest_first[0]), 404)
        self.assertEqual(self.ask("DELETE", "/inbox").status, 204)
        self.assertCountEqual(os.listdir(self.directory), strangers)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "this system has no named pipes")
    def test_what_is_planted_in_the_store_leads_nowhere(self) -> None:
        for plant in (os.mkdir, os.mkfifo, functools.partial(os.symlink, MODULE)):
            name = f"20200101_000000_{uuid.uuid4().hex}"
            plant(self.directory / f"{name}.json")
            for method in ("GET", "DELETE"):
                self.assert_problem(self.ask(method, f"/inbox/{name}"), 404)
        self.assertEqual(self.listed(), [])

    def test_a_store_that_was_deleted_is_made_anew(self) -> None:
        gone = path_of(self.post().headers["Location"])
        shutil.rmtree(self.directory)
        self.assertEqual(self.listed(), [])
        self.assert_problem(self.ask("GET", gone), 404)
        self.assertEqual(self.ask("DELETE", "/inbox").status, 204)
        self.assert_serves()
        self.assertEqual(len(self.listed()), 1)

    def test_before_a_201_the_file_and_its_name_have_reached_the_disk(self) -> None:
        synced = []

        def fsync(descriptor: int) -> None:
            synced.append(stat.S_IFMT(os.fstat(descriptor).st_mode))

        with syncing_with(fsync):
            self.assert_serves()
            self.assertEqual(synced, SYNCED_KINDS)
            with serving(FSYNC=False) as other:
                self.assertEqual(ask(other, "POST", "/inbox", ACCEPT).status, 201)
            self.assertEqual(synced, SYNCED_KINDS)

    def test_while_a_file_is_synced_others_are_served_and_the_end_waits_for_it(self) -> None:
        released = threading.Event()
        with syncing_with(lambda _: released.wait(10)):
            with connect(self.server, post_to()) as syncing:
                self.wait_until(lambda: bool(files_in(self.directory)))
                self.assertEqual(self.ask("GET", "/constraints").status, 200)
                syncing.setblocking(False)
                with self.assertRaises(BlockingIOError):
                    syncing.recv(1)  # there is no answer yet
                syncing.settimeout(10)
                head = post_head("Content-Length: 9", "Expect: 100-continue")
                with connect(self.server, head) as begun:
                    self.assertIn(b" 100 ", begun.recv(99))
                    self.server.stop(within=0.01)
                    self.assert_problem(answer_on(begun), 503)  # its time is over
                released.set()
                self.assertEqual(answer_on(syncing).status, 201)


class BrokenStoreTest(InboxTest):
    settings = {"FSYNC": True}
    errors_expected = True

    def test_a_log_that_cannot_be_removed_is_emptied(self) -> None:
        """Windows does not remove a file that somebody reads."""
        self.post()
        remove = os.unlink

        def unlink(path: str) -> None:
            if path.endswith(".jsonl"):
                raise PermissionError(errno.EACCES, "it is open")
            remove(path)

        with unittest.mock.patch("os.unlink", unlink):
            self.assertEqual(self.ask("DELETE", "/inbox").status, 204)
        self.assertEqual(self.ask("GET", "/deliveries").json()["deliveries"], [])
        self.assertEqual(self.stored(), [])

    def test_a_disk_that_fails_leaves_nothing_behind(self) -> None:
        failures = ((errno.EIO, 500), (errno.ENOSPC, 507), (errno.EDQUOT, 507))
        for kind, (number, status) in itertools.product(SYNCED_KINDS, failures):

            def fsync(descriptor: int, kind: int = kind, number: int = number) -> None:
                if stat.S_IFMT(os.fstat(descriptor).st_mode) == kind:
                    raise OSError(number, os.strerror(number))

            with syncing_with(fsync):
                self.assert_problem(self.post(), status)
            self.assertEqual(files_in(self.server.store.directory), [])

    @unittest.skipUnless(os.name == "posix", "Windows takes it for a directory that is missing")
    def test_a_file_where_the_store_should_be(self) -> None:
        directory, one = self.server.store.directory, "/inbox/20200101_000000_" + "a" * 32
        os.rmdir(directory)
        pathlib.Path(directory).write_text("in the way")
        for method, path, body in [
            ("POST", "/inbox", BODY), ("GET", "/inbox", None), ("GET", "/", None),
            ("DELETE", "/inbox", None), ("GET", one, None), ("DELETE", one, None),
        ]:  # fmt: skip
            problem = self.assert_problem(self.ask(method, path, body), 500)
            self.assertEqual(problem["detail"], f"the store failed: {os.strerror(errno.ENOTDIR)}")
        os.remove(directory)
        self.assert_serves()

    def test_it_never_overwrites(self) -> None:
        with unittest.mock.patch("coarinbox.new_name", lambda: f"20200101_000000_{'0' * 32}"):
            location = self.post().headers["Location"]
            self.assert_problem(self.post(OFFER), 500)  # for it would have the same name
        self.assertEqual(self.ask("GET", path_of(location)).body, BODY)
        self.assertEqual(len(files_in(self.server.store.directory)), 1)

    def test_a_list_that_breaks_off_cannot_be_taken_for_a_whole_one(self) -> None:
        def select(*_: object) -> Iterator[tuple[coarinbox.Delivery, bytes]]:
            yield coarinbox.Delivery(), b"{}"
            raise OSError("the disk is gone")

        with unittest.mock.patch("os.scandir", side_effect=OSError("the disk is gone")):
            self.assert_problem(self.ask("GET", "/inbox"), 500)
        with unittest.mock.patch.object(self.server.deliveries, "select_lines", select):
            self.assert_problem(self.ask("GET", "/deliveries"), 500)
            # With no time for a turn, the beginning is sent by itself.
            with constants(TURN=0), self.assertRaises(http.client.IncompleteRead):
                self.ask("GET", "/deliveries")
        self.assertEqual(self.log_lines()[-1], "the store failed: the disk is gone")
        self.assert_serves()

    def test_a_disk_that_is_full(self) -> None:
        """On a tmpfs of 64 KiB, in a mount namespace of its own."""
        large = json.dumps({**ACCEPT, "summary": "x" * 10_000}).encode()
        with tempfile.TemporaryDirectory() as directory:
            command = [*on_small_disk("size=64k", directory), "--store", f"{directory}/store"]
            with running(command) as inbox:
                answers = [inbox.ask("POST", "/inbox", large) for _ in range(20)]
                stored = [answer.status for answer in answers].count(201)
                self.assertGreater(stored, 2)
                for answer in answers[stored:]:
                    self.assert_problem(answer, 507)
                paths = [path_of(answer.headers["Location"]) for answer in answers[:stored]]
                listed = inbox.ask("GET", "/inbox").json()["ldp:contains"]
                self.assertEqual([path_of(entry["@id"]) for entry in listed], sorted(paths))
                self.assertEqual(inbox.ask("GET", paths[-1]).body, large)
                self.assertEqual(inbox.ask("DELETE", paths[-1]).status, 204)
                self.assertEqual(inbox.ask("POST", "/inbox", large).status, 201)
                (newest, *_) = inbox.ask("GET", "/deliveries").json()["deliveries"]
                self.assertEqual(newest["status"], 201)  # a torn line before it does no harm


def on_small_disk(options: str, directory: Any) -> list[str]:
    """Return the command line of an inbox for which a tmpfs is mounted on a directory."""
    mount = f"mount -t tmpfs -o {options} tmpfs {directory}"
    shell = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    try:
        subprocess.run([*shell, mount], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.CalledProcessError):
        raise unittest.SkipTest("only root may mount a disk, and nobody may pass for it") from None
    return [*shell, f'{mount} && exec "$0" "$@"', sys.executable, str(MODULE), "--port", "0"]


# --- Deliveries ----------------------------------------------------------------------------------

OFFER = NOTIFICATIONS["Request Review"]
# Refused for two reasons, with a warning besides.
REFUSED = changed(changed(OFFER, "origin", "https://r.example.org/"), "id", "offer-1")
REFUSED = changed(REFUSED, "object.ietf:cite-as", ABSENT)
HTML = {"Accept": "text/html"}
LARGE = b"x" * 1_000_000  # ten of them are more than fits into the buffers of a connection


class DeliveriesTest(InboxTest):
    """Tests that look at the log of the deliveries."""

    @property
    def path(self) -> pathlib.Path:
        return pathlib.Path(self.server.store.directory, "deliveries.jsonl")

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.path.read_bytes().splitlines() if line]

    def deliveries(self, query: str = "") -> list[Any]:
        answer = self.ask("GET", f"/deliveries{query}")
        self.assertEqual(answer.status, 200, answer)
        return list(answer.json()["deliveries"])

    def statuses(self, query: str = "") -> list[int]:
        return [delivery["status"] for delivery in self.deliveries(query)]

    def post_each(self, *documents: Any) -> None:
        for document in documents:
            self.post(document)

    def names(self, query: str = "") -> list[str]:
        return [delivery["name"] for delivery in self.deliveries(query)]


class DeliveryLogTest(DeliveriesTest):
    settings = {"MAX_CONTENT_LENGTH": 10_000}

    def test_every_attempt_has_a_line_in_order_of_arrival(self) -> None:
        # No body of a stored notification, which has a file, and none of a stranger.
        attempts: list[tuple[bytes, int, str, str | None]] = [
            (post_to(), 201, "", None),
            (post_to("", b'{"a":1}'), 400, "not a valid notification", '{"a":1}'),
            (post_to("", b"no"), 400, "not JSON", "no"),
            (post_to("", b"\xff\x00"), 400, "not UTF-8", "/wA="),  # in base64
            (post_head("Content-Length: 9") + b"half", 400, "ended before the request", "half"),
            (post_head(CHUNKED) + b"4\r\nhalf\r\n5", 400, "ended before the request", "half"),
            (post_head("Content-Length: 1", "broken") + b"x", 400, "header line", None),
            (post_head().replace(b"localhost", b"evil.example"), 421, "BASE_URL", None),
            (post_head("Content-Length: 4").replace(b"ld+json", b"pdf") + b"%PDF",
             415, "Content-Type is application/pdf", "%PDF"),
            (post_head(), 411, "neither", ""),
            (post_head("Content-Length: 10001"), 413, "larger than 10000", ""),
            (post_head().replace(b"1.1", b"3.1"), 505, "3.1", None),
            (b"POST /inbox?" + b"x" * 70_000, 414, "", None),
            (post_head().replace(b"/inbox", b"http://localhost/inbox"), 411, "neither", ""),
            (post_to("/?a=b", b'{"a":1}'), 400, "unknown parameter 'a'", '{"a":1}'),
            (post_to("/x", b'{"a":1}'), 404, "/inbox", '{"a":1}'),
            (post_to().replace(b"POST", b"PUT"), 405, "/inbox", BODY.decode()),
        ]  # fmt: skip
        for data, status, _, _ in attempts:
            self.assertEqual(self.ask_raw(data).status, status, data)
        path = f"/inbox/{self.stored()[0]}"
        for other in ("GET /", "GET /x", f"HEAD {path}", f"DELETE {path}", "OPTIONS /inbox"):
            self.ask(*other.split())  # is no delivery
        self.ask("PUT", path, BODY)  # nor is this
        lines = self.lines()
        self.assertEqual(len(lines), len(attempts))
        self.assertEqual(path, f"/inbox/{lines[0]['name']}")
        self.assertEqual(lines, sorted(lines, key=operator.itemgetter("time")))
        for line, (data, status, detail, body) in zip(lines, attempts):
            with self.subTest(data):
                self.assertEqual(line["status"], status)
                self.assertIn(detail, line["detail"])
                self.assertEqual(line.get("body", line.get("body_base64")), body)
                self.assertEqual(bool(line["headers"]), body is not None or status == 201)

    def test_a_client_that_breaks_off_has_a_line_too(self) -> None:
        head = post_head("Content-Length: 9", "Expect: 100-continue")
        with connect(self.server, head) as connection:
            self.assertIn(b" 100 ", connection.recv(100))  # its head has been read
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.wait_until(lambda: self.deliveries() != [])
        self.assertEqual([(line["status"], line["body"]) for line in self.lines()], [(400, "")])

    def test_a_line_tells_all_about_a_refusal(self) -> None:
        started, document = utc_now(), changed(REFUSED, "actor.name", "y" * 5_000)
        body = json.dumps(document).encode()
        head = post_head(f"Content-Length: {len(body)}", "X-Trace: a", "x-trace: b")
        problem = self.assert_problem(self.ask_raw(head + body), 400)
        (line,) = self.lines()
        self.assertTrue(started <= line["time"] <= utc_now(), line["time"])
        self.assertEqual(json.loads(line["body"]), document)
        self.assertEqual(line["findings"], problem["errors"] + problem["warnings"])
        for holder, expected in [
            (line, {"client": "127.0.0.1", "target": "/inbox", "pattern": "Request Review",
                    "detail": problem["detail"]}),
            (line["headers"], {"Content-Type": JSON_LD, "X-Trace": "a, b"}),
            (line["about"], {"id": "offer-1", "object.id": OFFER["object"]["id"],
                             "actor.id": AUTHOR["id"], "actor.name": "y" * 1_000}),
        ]:  # fmt: skip
            self.assertLessEqual(expected.items(), holder.items())

    def test_secrets_are_masked_even_where_the_request_is_malformed(self) -> None:
        requests = [post_head("Content-Length: 0", line) for line in (
            "Authorization: Bearer s3cret", "Cookie: session=s3cret", "authorization: Basic s3cret",
            "Proxy-Authorization: Basic s3cret", "Authorization : Bearer s3cret",
            "X: y\r\n s3cret", "Authorization: s3cret\a",
        )]  # fmt: skip
        requests += [post_head("Authorization: s3cret")[:-4]]
        requests += [post_head().replace(b"/inbox", b"http://me:s3cret@localhost/inbox")]
        for request in requests:
            self.assertNotIn(b"s3cret", self.ask_raw(request).body)
        self.assertNotIn(b"s3cret", self.path.read_bytes())
        self.assertEqual(self.path.read_bytes().count(b"\n"), len(requests))  # no empty lines
        self.assertEqual(self.lines()[0]["headers"]["Authorization"], "(masked)")

    def test_lines_that_cannot_be_read_are_passed_over(self) -> None:
        self.post(REFUSED)
        (good,), line = self.lines(), self.path.read_bytes()
        bad: list[Any] = [None, [], 1, "", {}, {**good, "name": good["name"] + "\ndata: x"}]
        bad += [{**good, "name": "\ud800"}, {**good, "headers": {"a": math.nan}}]
        bad += [{**good, "status": "400"}, {**good, "body_base64": "?", "body": 5}]
        torn = [b"", b"{", b"\xff", b"\0" * 9, b"[" * 99_999, line[:1], line[:-9]]
        for end in (b"{", line[:-9], line[:-1]):  # of a line that another process may complete
            before = b"\n".join([*(json.dumps(entry).encode() for entry in bad), *torn, end])
            self.path.write_bytes(before)
            self.assertEqual(self.statuses(), [400] * (end == line[:-1]))
            self.post(ACCEPT)
            self.assertEqual(self.statuses(), [201] + [400] * (end == line[:-1]))
            self.assertTrue(self.path.read_bytes().startswith(before))

    def test_no_line_that_somebody_edited_breaks_a_page(self) -> None:
        self.post(REFUSED)
        (good,) = self.lines()
        strange: Any = (None, True, -1e99, "\ud800", [], [None], {"a": 1}, [{}])
        edited: list[Any] = [{member: value} for member in good for value in strange]
        for member, value in itertools.product(good["findings"][0], strange):
            edited.append({"findings": [{**good["findings"][0], member: value}]})
        lines = [{**good, "name": f"20200101_000000_{number:032}", **change}
                 for number, change in enumerate(edited)]  # fmt: skip
        lines += [{"name": "20200101_000000_" + "a" * 32, "status": 400, "findings": []}]
        lines += [{**good, "body": "half a pair: \ud800"}]
        self.path.write_text("\n".join(map(json.dumps, lines)))
        self.assertGreater(len(self.names()), 30)
        pages = ["/?q=x&limit=1000", *(f"/deliveries/{name}" for name in self.names())]
        for page in pages:
            self.assertEqual(self.ask("GET", page, headers=HTML).status, 200, page)
        body = self.ask("GET", f"/deliveries/{good['name']}/body").body
        self.assertEqual(body, b"half a pair: ?")

    def test_what_is_stored_while_the_inbox_is_emptied_has_its_line(self) -> None:
        for number in range(300):
            name = f"20200101_000000_{number:032}.json"
            self.path.with_name(name).write_bytes(BODY)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            emptied = pool.submit(self.ask, "DELETE", "/inbox")
            pool.map(lambda _: self.post(), range(40))
        self.assertEqual(emptied.result().status, 204)
        self.assertLessEqual(set(self.stored()), set(self.names()))

    def test_memory_does_not_grow_with_the_log(self) -> None:
        """The log begins with 128 MiB of nothing, which takes no room on the disk."""
        with self.path.open("wb") as file:
            file.truncate(2**27)
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        self.post_each(*[b"no"] * 60)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        newest = self.names("?limit=1")[0]
        for path in ("/", "/deliveries", f"/deliveries?since={newest}"):
            self.assertEqual(self.ask("GET", path, headers=HTML).status, 200)
        with Listener(self.server, f"/deliveries?since={newest}"):
            self.assertLess(tracemalloc.get_traced_memory()[1], 100_000_000)

    def test_of_a_long_conversation_the_newest_are_shown_and_what_they_answer(self) -> None:
        self.post_each(OFFER, *[ACCEPT] * 60)
        names = self.names()
        page = self.ask("GET", f"/deliveries/{names[0]}", headers=HTML).body.decode()
        self.assertEqual([name for name in names if name in page], [*names[:50], names[-1]])

    @unittest.skipUnless(hasattr(os, "mkfifo"), "this system has no named pipes")
    def test_a_log_that_cannot_be_written_is_no_reason_to_refuse(self) -> None:
        self.errors_expected, elsewhere = True, self.path.with_name("elsewhere")
        for plant in (os.mkdir, os.mkfifo, functools.partial(os.symlink, elsewhere)):
            plant(self.path)
            self.assert_serves()
            for path in ("/deliveries", "/", f"/inbox/{self.stored()[0]}"):
                self.assertEqual(self.ask("GET", path, headers=HTML).status, 500)
            (os.rmdir if plant is os.mkdir else os.unlink)(self.path)
        self.assertIn("a delivery could not be logged", "\n".join(self.log_lines()))
        self.assertFalse(elsewhere.exists())
        self.assert_serves()
        self.assertEqual(self.statuses()[0], 201)


class QueryTest(DeliveriesTest):
    def setUp(self) -> None:
        super().setUp()
        unicode = changed(OFFER, "origin.id", "https://Ünïcode.example.org/")
        self.post_each(ACCEPT, REFUSED, "ungültig".encode("latin-1"), unicode)

    def test_each_parameter_selects_and_the_newest_come_first(self) -> None:
        names = self.names()
        self.assertEqual(self.statuses(), [201, 400, 400, 201])
        self.assertEqual(names, [line["name"] for line in reversed(self.lines())])
        for query, expected in [
            ("limit=2", [0, 1]), ("limit=1000", [0, 1, 2, 3]),
            ("status=400", [1, 2]), ("status=4xx", [1, 2]), ("status=2xx", [0, 3]),
            ("status=404", []), ("pattern=Accept", [3]), ("pattern=Request+Review", [0, 2]),
            (f"since={names[2]}", [0, 1]), (f"since={names[0]}", []),
            ("since=20200101_000000_" + "0" * 32, [0, 1, 2, 3]),
            (f"before={names[1]}", [2, 3]), (f"before={names[3]}", []),
            (f"before={names[0]}&since={names[3]}&status=400&limit=1", [1]),
            ("limit=&status=&pattern=&since=&before=&q=", [0, 1, 2, 3]),
            ("q=REFUSED", [1, 2]), ("q=not+UTF-8", [1]),
            ("q=must+be+an+object", [2]), ("q=origin-object", [2]), ("q=offer-1", [2]),
            ("q=%C3%9CN%C3%AFCODE", [0]), (f"q={names[3]}", [3]), ("q=request+review", [0, 2]),
        ]:  # fmt: skip
            with self.subTest(query):
                self.assertEqual(self.names(f"?{query}"), [names[index] for index in expected])

    def test_a_search_ignores_case_and_how_json_writes_a_character(self) -> None:
        texts = ["Straße", "ΣΊΣΥΦΟΣ", "a 5\u212a run", 'say "so"', "line\nbreak", "a\\b"]
        self.post_each(*(changed(OFFER, "actor.name", text) for text in texts))
        names = self.names("?limit=6")[::-1]
        for query, index in [
            ("STRASSE", 0), ("straße", 0), ("σίσυφος", 1), ("5k RUN", 2), ('"SO"', 3),
            ("E\nb", 4), ("A\\B", 5), ("Σ", 1), ("ς", 1),
        ]:  # fmt: skip
            found = self.names("?limit=6&q=" + urllib.parse.quote(query))
            self.assertEqual(found, [names[index]], query)
        for query, count in [("drop", 0), ("Queued", 0), ("tored", 8), ("fuse", 2)]:
            self.assertEqual(len(self.names(f"?q={query}")), count, query)
        # Whoever edits the log may write the characters as they are, or escape them otherwise.
        lines = [json.dumps(line, ensure_ascii=False) for line in self.lines()]
        self.path.write_text("\n".join([*lines, ""]), encoding="utf-8")
        self.assertEqual(self.names("?limit=6&q=5k%20run"), [names[2]])
        lines = [json.dumps(line).replace("\\u03c3", "\\u03C3") for line in self.lines()]
        self.path.write_text("\n".join([*lines, ""]), encoding="utf-8")
        self.assertEqual(self.names("?limit=6&q=" + urllib.parse.quote("Σ")), [names[1]])

    def test_each_status_has_a_verdict_that_a_search_finds(self) -> None:
        for status, verdict in [
            (0, "dropped"), (200, "stored"), (201, "stored"), (202, "queued"),
            (307, "redirected"), (400, "refused"), (499, "refused"), (500, "failed"),
        ]:  # fmt: skip
            delivery = delivered(OFFER, status)
            self.assertEqual(delivery.verdict, verdict)
            line = json.dumps(delivery.as_json()).encode()
            self.assertIsNotNone(coarinbox.Query(q=verdict).find_in(line))

    def test_most_lines_are_passed_over_without_reading_them_whole(self) -> None:
        """Texts with other letters than ASCII took seven seconds in 100,000 deliveries."""
        lines = self.path.read_bytes().splitlines()
        self.assertEqual(len(lines), 4)
        for text, expected in [("zzéz", 0), ("queued", 0), ("failed", 0), ("Ünïcode.ex", 1)]:
            query = coarinbox.Query(q=text)
            self.assertEqual(sum(map(query.may_match, lines)), expected, text)

    def test_a_time_selects_from_then_on_and_a_day_its_own(self) -> None:
        times = "2026-01-31T11:59:59.999Z", "2026-01-31T12:00:00.000Z", "2026-01-31T12:00:00.001Z"
        lines = [{**line, "time": moment} for line, moment in zip(self.lines(), times)]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for query, count in [
            ("since=2020-01-01", 3), ("since=2026-01-31", 3), ("since=2026-02-01", 0),
            ("since=2026-01-31T12:00Z", 2), ("since=2026-01-31T12:00:00Z", 2),
            ("since=2026-01-31T12:00:00.000Z", 2), ("since=2026-01-31T12:00:00.001Z", 1),
            ("since=2026-01-31T12:00:01Z", 0), ("day=2026-01-31", 3), ("day=2026-01-30", 0),
        ]:  # fmt: skip
            self.assertEqual(len(self.names(f"?{query}")), count, query)

    def test_without_a_limit_all_of_them(self) -> None:
        self.path.write_bytes(self.path.read_bytes() * 251)
        self.assertEqual(len(self.names()), 1004)
        self.assertEqual(len(self.names("?limit=1000")), 1000)

    def test_what_cannot_be_asked_says_what_can(self) -> None:
        for query, expected in [
            ("limit=0", "a number from 1 to 1000"), ("limit=1001", "a number from 1 to 1000"),
            ("limit=x", "a number"), ("status=40", "a status such as 400, or 4xx"),
            ("status=999", "a status"), ("pattern=Offer", "one of Accept, Announce"),
            ("since=yesterday", "a time in UTC such as"), ("since=2026-01-31T12:00%2B01:00", "UTC"),
            ("before=2026-01-31", "the name of a delivery"), ("limt=5", "limit"), ("limt", "limit"),
            ("day=yesterday", "a day in UTC"), ("q=%FF", "utf-8"),
        ]:  # fmt: skip
            for path in ("/deliveries", "/"):
                with self.subTest(query, path=path):
                    problem = self.assert_problem(self.ask("GET", f"{path}?{query}"), 400)
                    self.assertIn(expected, problem["detail"])

    def test_a_single_one_and_its_body_can_be_had_by_its_name(self) -> None:
        for delivery in self.deliveries():
            self.assertEqual(self.ask("GET", f"/deliveries/{delivery['name']}").json(), delivery)
        stored, unknown = delivery["name"], "20200101_000000_" + "0" * 32
        self.assertEqual(self.ask("GET", f"/deliveries/{stored}/body").body, BODY)
        self.assertEqual(self.ask("DELETE", f"/inbox/{stored}").status, 204)
        for method, path, status, expected in [
            ("DELETE", stored, 405, "DELETE"), ("GET", unknown, 404, "may have been removed"),
            ("GET", f"{stored}/body", 404, "no longer stored"),
        ]:  # fmt: skip
            problem = self.assert_problem(self.ask(method, f"/deliveries/{path}"), status)
            self.assertIn(expected, problem["detail"])


class Event(NamedTuple):
    id: str
    data: Any


class Listener:
    """A client that listens to the deliveries as they come; it is ready once it has been made."""

    def __init__(self, server: Any, path: str = "/deliveries", **headers: str) -> None:
        self.connection = http.client.HTTPConnection(*address(server), timeout=10)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request("GET", path, headers={"Accept": "text/event-stream", **named})
        self.stream = self.connection.getresponse()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.connection.close()

    def event(self) -> Event:
        """Wait for the next event."""
        for _ in range(1000):  # there is a comment at each heartbeat
            lines = [line.decode() for line in iter(self.stream.readline, b"\n") if line != b":\n"]
            if lines:
                fields = dict(line.rstrip("\n").split(": ", 1) for line in lines)
                return Event(fields["id"], json.loads(fields["data"]))
        raise AssertionError("no event came")

    def comment(self) -> None:
        """Wait for the next comment, which comes when there is nothing new."""
        while self.stream.readline() != b":\n":
            pass


@unittest.mock.patch.multiple("coarinbox", HEARTBEAT=0.02, RECHECK=0.02, GATHER=0)
class EventsTest(DeliveriesTest):
    def listen(self, path: str = "/deliveries", **headers: str) -> Listener:
        listener = Listener(self.server, path, **headers)
        self.addCleanup(listener.__exit__)
        self.assertEqual(listener.stream.status, 200)
        return listener

    def test_deliveries_come_as_they_are_answered_and_may_be_selected(self) -> None:
        self.post()  # before anybody listens
        listener, selective = self.listen(), self.listen("/deliveries?status=4xx&q=JSON")
        self.assertEqual(listener.stream.headers["Content-Type"], "text/event-stream")
        for document in (ACCEPT, REFUSED, b"no"):
            self.post(document)
            newest = self.deliveries()[0]
            self.assertEqual(listener.event(), Event(newest["name"], newest))
        self.assertEqual(selective.event().id, newest["name"])

    def test_a_line_that_is_just_being_written_comes_when_it_is_whole(self) -> None:
        self.post(OFFER)
        line = self.path.read_bytes()
        with self.listen() as listener, self.path.open("ab", buffering=0) as log:
            log.write(line[:99])
            listener.comment()
            listener.comment()
            log.write(line[99:])
            self.assertEqual(listener.event().data, json.loads(line))

    @constants(BLOCK=1)
    def test_wherever_a_part_that_is_read_begins_no_event_is_lost(self) -> None:
        """An empty line may be all that a part holds."""
        self.post_each(*[b"no"] * 3)
        lines, (*_, first) = self.path.read_bytes().splitlines(), self.names()
        self.path.write_bytes(b"\n\n".join(lines) + b"\n" * 5)
        listener = self.listen(f"/deliveries?since={first}")
        for line in lines[1:]:
            self.assertEqual(listener.event().data, json.loads(line))

    def test_a_client_that_comes_back_misses_nothing(self) -> None:
        """The last event counts more than the URL, and an unknown one brings everything."""
        self.post_each(ACCEPT, REFUSED, b"no")
        names = self.names()[::-1]
        with beside(self.server) as again:
            for since, last, start in [
                ("", names[0], 1), (names[0], "", 1), (names[0], names[1], 2),
                ("", "?", 0), ("", "2020-01-01", 0), ("", "20200101_000000_" + "0" * 32, 0),
            ]:  # fmt: skip
                headers = {"Last_Event_ID": last} if last else {}
                with Listener(again, f"/deliveries?since={since}", **headers) as back:
                    self.assertEqual([back.event().id for _ in names[start:]], names[start:])
                    ask(again, "POST", "/inbox", ACCEPT)
                    names.append(back.event().id)

    def test_a_log_that_begins_anew_is_followed_from_its_beginning(self) -> None:
        self.post_each(*[ACCEPT] * 3)
        listener = self.listen()
        ways: list[Callable[[], object]] = [lambda: self.ask("DELETE", "/inbox")]
        if os.name == "posix":  # Windows does not remove a file that somebody reads
            ways.append(self.path.unlink)
        for forget in ways:
            forget()
            self.assertEqual(self.deliveries(), [])
            self.post_each(*[REFUSED] * 5)  # longer than the one before
            self.assertEqual([listener.event().id for _ in range(5)], self.names()[::-1])

    def test_what_comes_while_the_log_is_read_comes_at_once(self) -> None:
        read_news, begun, posted = coarinbox.read_news, threading.Event(), threading.Event()

        def read_slowly(*arguments: Any) -> Any:
            news = read_news(*arguments)
            begun.set()
            self.assertTrue(posted.wait(10))
            return news

        with constants(RECHECK=60, read_news=read_slowly):
            listener = self.listen()
            self.assertTrue(begun.wait(10))
            self.post()
            posted.set()
            self.assertEqual(listener.event().data["status"], 201)

    @constants(RECHECK=60)
    def test_one_that_comes_while_others_are_served_misses_nothing(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(self.post_each, *[b"no"] * 100)
            listeners = [self.listen("/deliveries?since=2020-01-01") for _ in range(20)]
        names = self.names()[::-1]
        for listener in listeners:
            self.assertEqual([listener.event().id for _ in names], names)

    def test_one_that_does_not_read_holds_up_nobody_and_gets_everything(self) -> None:
        with beside(self.server, REQUEST_TIMEOUT=0.1) as server:
            with Listener(server) as quick, Listener(server) as slow:
                started = time.monotonic()
                while time.monotonic() < started + 0.15:  # a stream has no end that could be late
                    quick.comment()
                for _ in range(10):
                    self.assertEqual(self.post(LARGE).status, 400)
                    self.assertEqual(quick.event().data["status"], 400)
                self.assertEqual([slow.event().data["status"] for _ in range(10)], [400] * 10)
                server.stop()
                for listener in (quick, slow):
                    listener.stream.read()  # which fails if the end is cut off

    def test_listeners_outlast_a_log_that_cannot_be_read_and_may_leave(self) -> None:
        self.errors_expected = True
        with self.listen() as listener:
            self.path.mkdir()
            reported = "the log of deliveries cannot be read"
            self.wait_until(lambda: reported in "".join(self.log_lines()))
            self.path.rmdir()
            self.assert_serves()
            self.assertEqual(listener.event().data["status"], 201)
        self.wait_until(lambda: not self.server.connections)
        self.assertNotIn("lost", "".join(self.log_lines()))

    def test_clients_that_can_read_both_get_what_they_prefer(self) -> None:
        for accept, kind in [
            ("*/*", "application/json"), ("text/event-stream", "text/event-stream"),
            ("text/*", "text/html; charset=utf-8"),
            ("text/event-stream;q=0.5, application/json", "application/json"),
        ]:  # fmt: skip
            answer = self.ask("HEAD", "/deliveries", headers={"Accept": accept})
            self.assertEqual(answer.headers["Content-Type"], kind, accept)

    @constants(GRACE=0.01)
    @with_settings(MAX_CONNECTIONS=2)
    def test_listeners_make_room_even_if_they_were_slow_once(self) -> None:
        self.post_each(*[LARGE] * 11)
        everything = "/deliveries?since=2020-01-01"
        for listener in [self.listen(everything), self.listen(everything)]:
            for _ in range(11):
                listener.event()
        self.assert_serves()

    @with_settings(MAX_CONNECTIONS=3)
    def test_no_request_is_cut_off_by_making_room(self) -> None:
        """A client whose idle connection was closed tries again; none is told that it broke off."""

        def post_often(_: int) -> None:
            connection = http.client.HTTPConnection(*address(self.server), timeout=10)
            for _ in range(20):
                for _ in range(20):
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        ask_on(connection, "POST", "/inbox", ACCEPT)
                        break
                    connection.close()
            connection.close()

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            list(pool.map(post_often, range(6)))
        self.assertEqual(set(self.statuses("?limit=1000")), {201})


# --- Pages ---------------------------------------------------------------------------------------

VOID = frozenset("meta link input br".split())


class Element(NamedTuple):
    tag: str
    attributes: dict[str, str]
    texts: list[str]

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


class Page(html.parser.HTMLParser):
    """A page that was parsed: its elements, each of which must be closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes}, [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("dd", "div", "dt", "h1", "h2", "p", "summary"):  # it ends a line
            self.handle_data(" ")
        element = self.open.pop()
        assert element.tag == tag, (element.tag, tag)

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.texts.append(data)

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            element
            for element in self.elements
            if tag in ("", element.tag) and wanted.items() <= element.attributes.items()
        ]

    def one(self, tag: str = "", **attributes: str) -> Element:
        (element,) = self.all(tag, **attributes)
        return element

    def texts(self, tag: str = "", **attributes: str) -> list[str]:
        return [element.text for element in self.all(tag, **attributes)]

    def links(self, text: str) -> list[str]:
        return [link.attributes["href"] for link in self.all("a") if text in link.text]

    def copies(self, button: str) -> list[str]:
        """Return what the buttons of that name copy."""
        return [each.attributes["data-copy"] for each in self.all("button") if each.text == button]

    @property
    def text(self) -> str:
        return self.one("main").text

    @property
    def rows(self) -> list[str]:
        return [e.text for e in self.all("li") if e.attributes.get("id", "").startswith("row-")]

    @property
    def lines(self) -> list[str]:
        """The lines of the document that is shown, without their indentation."""
        lines = "".join(self.one("div", class_="json").texts).splitlines()
        return [line.strip() for line in lines if line.strip()]


CONTEXT = coarinbox.PageContext("../", "http://localhost:5005")
NUMBERS = itertools.count()


def query_of(text: str) -> coarinbox.Query:
    return coarinbox.Query(**coarinbox.parse_query(text, coarinbox.QUERY_PARAMETERS))


def delivered(document: Any = None, status: int = 201, **more: Any) -> coarinbox.Delivery:
    """Make a delivery, with the findings that its document deserves."""
    pattern = coarinbox.pattern_of(document)
    members: dict[str, Any] = {
        "name": f"20260131_120000_{next(NUMBERS):032x}", "time": "2026-01-31T12:00:00.000Z",
        "client": "192.0.2.1", "target": "/inbox", "status": status,
        "headers": {"Host": "localhost:5005", "Content-Type": JSON_LD},
        "pattern": pattern and pattern.name,
        "about": coarinbox.summary(document),
        "findings": coarinbox.validate(document) if document else [],
        "body": document if isinstance(document, bytes) else json.dumps(document).encode(),
    }  # fmt: skip
    members.update(more)
    members["findings"] = sorted(members["findings"], key=lambda each: each.level)
    refused = status >= 400 and members.get("direction") != "out"
    errors = sum(each.level == E for each in members["findings"]) if refused else 0
    return coarinbox.Delivery(**{"errors": errors, **members})


def sent(document: Any = ACCEPT, status: int = 201, **more: Any) -> coarinbox.Delivery:
    to = {"direction": "out", "client": "", "target": "http://localhost:8080/inbox"}
    return delivered(document, status, **{**to, **more})


def finding(level: str, pointer: str, fix: str = "", **more: Any) -> coarinbox.Finding:
    code, spec = pointer.strip("/").replace("/", ".") + "-required", "https://example.org/spec"
    found = coarinbox.Finding(level, pointer, code, f"{pointer} is wrong; {fix}", spec, fix=fix)
    return found._replace(**more)


def list_page(*deliveries: Any, query: str = "", **totals: int) -> Page:
    context = CONTEXT._replace(query=query_of(query))
    counts = coarinbox.Totals(**{"all": len(deliveries) or 1, **totals})
    return Page(coarinbox.list_page(context, deliveries, counts))


def delivery_page(
    delivery: Any, conversation: Any = (), context: Any = CONTEXT, **more: Any
) -> Page:
    bodies = {"body": more.pop("body", delivery.body), "answer_body": more.pop("answer", b"{}")}
    page = coarinbox.delivery_page(context, delivery._replace(**bodies), conversation, **more)
    return Page(page)


class ListPageTest(unittest.TestCase):
    def test_a_row_says_what_came_who_sent_it_and_what_became_of_it(self) -> None:
        rows = list_page(
            delivered(None, 400, detail="the body is not JSON"),
            delivered(REFUSED, 400),
            delivered(changed(ACCEPT, "origin.inbox", ABSENT)),
            sent(NOTIFICATIONS["Announce Review"], 503),
        ).rows
        self.assertEqual(rows, [
            "01-31 12:00 400 no pattern 192.0.2.1 the body is not JSON",
            "01-31 12:00 400 · 2 errors Request Review r.example.org repository.example.org"
            "/preprint/421 id must be an absolute URI; write \"urn:uuid:…\" +2",
            "01-31 12:00 201 · 1 warning Accept journal.example.com /preprint/421"
            ' origin.inbox is missing; it should be an HTTP URI; write "inbox": "https://…"',
            "01-31 12:00 ↗ sent 503 Announce Review to localhost:8080 /review/7"
            " Service Unavailable",
        ])  # fmt: skip

    def test_each_verdict_has_a_chip_of_its_own(self) -> None:
        must, should = finding("M", "/a"), finding("S", "/b")
        for delivery, kind, text in [
            (delivered(OFFER), "ok", "201"),
            (delivered(OFFER, findings=[should, must]), "M", "201 · 2 warnings"),
            (delivered(OFFER, findings=[should]), "S", "201 · 1 warning"),
            (delivered(OFFER, 400, findings=[finding("E", "/c"), must]), "E", "400 · 1 error"),
            (delivered(OFFER, 400, findings=[must]), "E", "400 · 1 finding"),
            (delivered(OFFER, 400, findings=[must, should], errors=1), "E", "400 · 1 error"),
            (delivered(OFFER, 503, simulated=True), "none", "503"),
            (delivered(OFFER, 503, findings=[must], simulated=True), "none", "503"),
            (delivered(OFFER, 0, simulated=True), "none", "dropped"),
            (delivered(OFFER, 0, via="adopted"), "ok", "found"),
            (sent(ACCEPT, 0), "E", "↗ no answer"),
            (sent(ACCEPT, 0)._replace(body=None), "E", "↗ not sent"),
            (sent(ACCEPT, 202), "ok", "↗ sent 202"),
        ]:
            with self.subTest(text):
                page = list_page(delivery)
                self.assertEqual(page.one("span", class_=f"chip {kind}").text, text)
                self.assertEqual(len(page.all("span", class_="tag")), int(delivery.simulated))

    def test_who_sent_it_is_never_the_actor_and_an_answer_is_about_what_was_offered(self) -> None:
        for document, row in [
            (changed(OFFER, "origin", ABSENT), "Request Review 192.0.2.1 repository.example.org"),
            (changed(ACCEPT, "object.id", "https://a.example/offer"), "example.com /preprint/421"),
            (NOTIFICATIONS["Announce Relationship"], "example.com /preprint/421"),  # not its urn
        ]:
            self.assertIn(row, list_page(delivered(document)).rows[0])
        page = list_page(delivered(OFFER), delivered(ACCEPT), delivered(OFFER), delivered())
        origins = "journal.example.com" + "repository.example.org"
        self.assertEqual(page.one("datalist").text, origins, "each of them once, to choose from")

    def test_the_reason_of_a_failure_comes_before_what_the_notification_could_do_better(
        self,
    ) -> None:
        warned = [finding("S", "/a")]
        for delivery, reason in [
            (delivered(OFFER, 503, findings=warned, simulated=True, detail="a simulated failure"),
             "a simulated failure"),
            (sent(OFFER, 0, findings=warned, detail="Connection refused"), "Connection refused"),
            (sent(OFFER, 201, findings=warned), "/a is wrong"),
        ]:  # fmt: skip
            self.assertIn(reason, list_page(delivery).rows[0])

    def test_totals_lead_to_the_deliveries_that_they_count(self) -> None:
        warned = changed(OFFER, "target.inbox", ABSENT)
        deliveries = [delivered(OFFER), delivered(warned), delivered(REFUSED, 400)]
        deliveries += [delivered(OFFER, 503), sent(ACCEPT), sent(ACCEPT, 404), sent(ACCEPT, 500)]
        tally = collections.Counter((d.direction, d.status, bool(d.findings)) for d in deliveries)
        page = list_page(*deliveries, **coarinbox.Totals.of(tally)._asdict())
        for name, count in [("All", 7), ("Stored", 2), ("With warnings", 1), ("Refused", 1),
                            ("Failed", 1), ("Sent", 3)]:  # fmt: skip
            (url,) = page.links(f"{name} {count}")
            query = query_of(url.partition("?")[2])
            self.assertEqual(len(list(filter(query.matches, deliveries))), count, name)

    def test_filters_are_kept_by_every_link_and_the_form_but_for_what_it_changes(self) -> None:
        filters = {"limit": "2", "status": "4xx", "pattern": "Accept", "q": '"><b>', "origin": "x",
                   "direction": "in", "day": "2026-01-30", "before": delivered().name}  # fmt: skip
        first, second, third = (delivered(OFFER) for _ in range(3))
        text = urllib.parse.urlencode(filters)
        page = list_page(first, second, third, query=text, all=1284)
        for label, changes in {
            "Newest": {}, "Older": {"before": second.name}, "Refused": {},
            "Sent": {"status": "", "direction": "out"}, "pattern Accept": {"pattern": ""},
            "q ": {"q": ""}, "origin x": {"origin": ""}, "day 2026-01-30": {"day": ""},
            "01-31 12:00": {"day": "2026-01-31"},
            "repository.example.org": {"origin": "repository.example.org"},
        }.items():  # fmt: skip
            expected = query_of(text)._replace(**{"before": "", **changes})
            self.assertEqual({query_of(url[4:]) for url in page.links(label)}, {expected}, label)
        self.assertIn("Refused", page.one("a", aria_current="true").text)
        self.assertEqual(len(page.links("remove")), 4, "the chip shows the status")
        self.assertEqual(list_page(delivered(), query="status=415").links("remove"), ["../"])
        fields = {each.attributes["name"]: each.attributes["value"] for each in page.all("input")}
        kept = ("status", "q", "origin", "direction", "day")
        self.assertEqual(fields, {name: filters[name] for name in kept})
        self.assertEqual(page.texts("option", selected="selected"), ["Accept"])

    def test_older_deliveries_are_a_link_away(self) -> None:
        deliveries = [delivered(OFFER) for _ in range(3)]
        page = list_page(*deliveries, query="limit=2", all=1284)
        self.assertEqual((len(page.rows), page.links("Newest")), (2, []))
        self.assertIn("2 of 1,284", page.text)
        self.assertEqual(list_page(*deliveries[:2], query="limit=2").links("Older"), [])

    def test_an_empty_list_says_so_or_how_to_send_the_first_notification(self) -> None:
        before = delivered().name
        page = list_page(query=f"q=nowhere&limit=5&before={before}&since={before}")
        self.assertEqual(page.one("div", id="deliveries").text, "No delivery matches. Show all")
        renewed_by = page.one("body").attributes["data-stream"]
        self.assertEqual(renewed_by, "../deliveries?q=nowhere", "what it shows, and no more")
        for token in (False, True):
            context = CONTEXT._replace(token=token)
            page = Page(coarinbox.list_page(context, [], coarinbox.Totals()))
            command = page.one("pre")
            self.assertIn("curl -s http://localhost:5005/samples/Request%20Review", command.text)
            self.assertEqual(command.text.count("Bearer $TOKEN"), 2 * token)
            self.assertIn("".join(command.texts), page.copies("Copy"))
            self.assertIn('"inbox": "http://localhost:5005/inbox",', page.lines)


class DeliveryPageTest(unittest.TestCase):
    def test_a_refused_one_with_its_findings_and_our_answer(self) -> None:
        found = [finding("S", "", "compress it", code="content-type"), finding("M", "/actor/name")]
        found += [finding("E", "/origin/id"), finding("S", "/id"), finding("E", "/object/id")]
        found += [finding("E", "/type", 'write `"type": "Offer"`', refused_by=("DSpace", "PCI"))]
        delivery = delivered(
            {"id": "x", "actor": {"id": "y"}, "object": {}}, 400, findings=found, omitted=4212,
            headers={"Content-Type": JSON_LD, "X-Trace": "<b>"}, pattern="Request Review",
            answer_headers={"X": "y"}, seconds=0.003,
        )  # fmt: skip
        page = delivery_page(delivery, answer=b'{"a": 1}')
        self.assertEqual(page.one("title").text, "400 · 3 errors Request Review · coarinbox")
        self.assertEqual(page.text, (
            "← All 400 · 3 errors Request Review from 192.0.2.1 Received 2026-01-31 12:00:00 , "
            "from 192.0.2.1 Stored no; correct it and send it again id x Send again Copy as curl "
            'Copy JSON Copy link Raw Payload { 1 "id": "x", 6 "type": "Offer", 3 "actor": { "id": '
            '"y" "name": … 4 }, "object": { "id": … 2 } } What arrived POST /inbox Content-Type: '
            "application/ld+json 5 X-Trace: <b> What we answered after 3 ms 400 Bad Request X: y "
            'Body, 8 bytes { "a": 1 } Findings compare with a valid Request Review 3 errors '
            "refused here 1 /origin/id is wrong rule · specification 2 /object/id is wrong rule · "
            'specification 3 /type is wrong Write "type": "Offer" refused by DSpace PCI · rule · '
            "specification 1 MUST a warning here 4 /actor/name is wrong rule · specification 2 "
            "SHOULD a warning here 5 is wrong Compress it rule · specification 6 /id is wrong rule "
            "· specification and 4,212 more Conversation Nothing else has this id or answers it. "
            "Send again To the same bytes Send again"
        ))  # fmt: skip
        for number in "123456":
            self.assertEqual(page.one(id=f"at-{number}").attributes["href"], f"#finding-{number}")
            self.assertEqual(page.one("a", href=f"#at-{number}").text, number)
        self.assertEqual(len(page.all("p", class_="ghost E")), 2)
        self.assertEqual(len(page.all("p", class_="ghost M")), 1)
        self.assertEqual(page.one("mark").text, "Content-Type: application/ld+json 5")
        constraints = "../constraints?pattern=Request+Review"
        self.assertEqual(page.links("rule")[2], f"{constraints}#type-required")
        self.assertEqual(page.links("a valid Request Review"), [f"{constraints}#example"])
        page = delivery_page(delivery._replace(headers={}))
        self.assertEqual(page.lines[0], "{ 1 5", "without the header it is about the whole")
        embedded = delivery_page(delivered(changed(ACCEPT, "object.object.ietf:item", ABSENT)))
        self.assertEqual(embedded.links("rule"), [f"{constraints}#object.ietf:item-required"])

    def test_one_that_was_sent_in_vain_and_one_that_was_found_in_the_store(self) -> None:
        about = f"id {ACCEPT['id']} Answers {OFFER_ID} "
        for delivery, facts, exchange in [
            (sent(ACCEPT, 0, detail="no answer within 10 s", via="REPLIES"),
             "↗ no answer Accept to localhost:8080 about /preprint/421 no answer within 10 s Sent "
             f"2026-01-31 12:00:00 , to http://localhost:8080/inbox, by REPLIES {about}",
             " } What we sent POST http://localhost:8080/inbox Host: localhost:5005 Content-Type: "
             "application/ld+json What they answered no answer Findings None: this is a valid"),
            (delivered(ACCEPT, 0, via="adopted", name="NAME", client="", target="", headers={}),
             "found Accept from journal.example.com about /preprint/421 Found "
             f"2026-01-31 12:00:00 , in the store Stored NAME {about}", " } Findings "),
        ]:  # fmt: skip
            text = delivery_page(delivery, [delivery], answer=None).text
            self.assertTrue(text.startswith(f"← All {facts}"), text)
            self.assertIn(exchange, text)
            self.assertIn(f"It answers {OFFER_ID}, which was never delivered here. Nothing", text)

    def test_the_payload_is_shown_as_json_line_by_line(self) -> None:
        document = {"@id": 1, "a/b~c": {"text": "ü\n\u202e", "numbers": [1, 2.5, None], "": {}}}
        page = delivery_page(delivered({**document, "list": [[], {"x": True}]}, findings=[]))
        self.assertEqual(page.lines, [
            "{", '"@id": 1,', '"a/b~c": {', r'"text": "ü\n\u202e",', '"numbers": [1, 2.5, null],',
            '"": {}', "},", '"list": [', "[],", "{", '"x": true', "}", "]", "}",
        ])  # fmt: skip
        deep: Any = 0
        for _ in range(coarinbox.MAX_DEPTH):  # as deep as the inbox takes it
            deep = {"a": deep}
        page = delivery_page(delivered(deep, 400))
        self.assertEqual(page.lines.count('"a": {'), coarinbox.MAX_DEPTH - 1)

    def test_a_very_long_payload_is_cut_and_says_so(self) -> None:
        self.assertEqual(len(delivery_page(delivered(OFFER)).copies("Copy JSON")), 1)
        values = [dict.fromkeys(map(str, range(1_000)), 0), [{}] * 10_000]
        delivery = delivered({**OFFER, "summary": {"k" * 200_000: values}}, findings=[])
        tracemalloc.start()
        text = coarinbox.delivery_page(CONTEXT, delivery, ())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        page = Page(text)
        self.assertLess(peak, 50_000_000)
        self.assertLess(len(text), 400_000)
        self.assertIn("only 2000 lines are shown", page.lines[-1])
        self.assertEqual(page.copies("Copy JSON"), [])  # it is too large for a button

    def test_whatever_came_instead_of_json_is_shown(self) -> None:
        for body, shown in [
            (b"<p>no\r\nJSON\t", "<p>no JSON\\t"), (b"\xff\0", "\\xff\\u0000"),
            (b"\n" * 1_000_000, "only 2000 lines are shown"), (b"", "Nothing of it was read."),
        ]:  # fmt: skip
            page = delivery_page(delivered(None, 400, detail="not JSON", body=body))
            self.assertIn("400 No pattern from 192.0.2.1 not JSON", page.text)
            self.assertIn(shown, page.text)

    @unittest.skipUnless(os.name == "posix", "the command is for another shell")
    def test_the_copied_command_makes_the_same_request(self) -> None:
        headers = {"Content-Type": "text/plain", "X": "it's `id`", "Authorization": "(masked)",
                   "Cookie": "(masked)", "Content-Length": "9"}  # fmt: skip
        for body, data in [
            (b"it's $HOME\n`id`", ["--data-raw", "it's $HOME\n`id`"]),
            (b"@/etc/passwd", ["--data-raw", "@/etc/passwd"]),
            (b"\x1b[31m", ["--data-binary", "@-"]), (b"\xff", ["--data-binary", "@-"]),
            (b"x" * 100_000, ["--data-binary", "@-"]),
        ]:  # fmt: skip
            delivery = delivered(None, 404, method="PUT", target="/a?b='c'&d", headers=headers)
            (command,) = delivery_page(delivery, body=body).copies("Copy as curl")
            self.assertNotIn("masked", command)
            # A curl that prints its arguments, but for what only fetches the body.
            curl = """curl() { [ "$1" = -s ] || printf '%s\\0' "$@"; }; TOKEN=secret; """
            done = subprocess.run(["sh", "-c", curl + command], capture_output=True, timeout=20)
            self.assertEqual(done.stdout.decode().split("\0")[:-1], [
                "-i", "-X", "PUT", "http://localhost:5005/a?b='c'&d", "-H",
                "Content-Type: text/plain", "-H", "X: it's `id`", "-H",
                "Authorization: Bearer secret", *data,
            ])  # fmt: skip

    def test_a_conversation_is_in_the_order_of_its_requests(self) -> None:
        """A receiver may send its reply before it answers."""
        offer = sent(OFFER, time="2026-01-31T12:00:09.000Z", seconds=9.0)
        reply = delivered(ACCEPT, time="2026-01-31T12:00:05.000Z")
        edited = delivered(REFUSED, 400, time="yesterday", seconds=1.0)
        page = delivery_page(offer, [reply, offer, edited])
        timeline = page.one("section", id="conversation").text
        self.assertRegex(timeline, "sent 201 Request Review .* 201 Accept .* 5.0 s later")

    def test_a_conversation_is_shown_in_order_with_attempts_folded(self) -> None:
        offer, review = delivered(OFFER), NOTIFICATIONS["Announce Review"]
        accept = sent(ACCEPT, time="2026-01-31T12:00:02.000Z", via="REPLIES")
        attempts = [sent(review, 503, time=f"2026-01-31T12:00:{s}.000Z") for s in (10, 12, 16)]
        page = delivery_page(attempts[1], [offer, accept, *attempts])
        self.assertEqual(page.one("section", id="conversation").text, (
            "Conversation 1 received, 4 sent, the last 16 s later"
            " 201 Request Review 2026-01-31 12:00:00 from repository.example.org,"
            " about /preprint/421"
            " ↗ sent 201 Accept 2026-01-31 12:00:02 2.0 s later, to localhost:8080, by REPLIES"
            " ↗ sent 503 Announce Review 2026-01-31 12:00:16 14 s later, to localhost:8080,"
            " about /review/7 Service Unavailable 3 attempts 2026-01-31 12:00:10 ↗ sent 503"
            " 2026-01-31 12:00:12 ↗ sent 503 this page 2.0 s later"
            " 2026-01-31 12:00:16 ↗ sent 503 4.0 s later"
        ))  # fmt: skip
        links = {f"../deliveries/{each.name}" for each in (offer, accept, attempts[2])}
        self.assertLessEqual(links, {a.attributes["href"] for a in page.all("a")})
        stream = "../deliveries?q=" + urllib.parse.quote_plus(OFFER_ID)
        self.assertEqual(page.one("body").attributes["data-stream"], stream)

    def test_the_deliveries_beside_it_are_those_of_the_filter(self) -> None:
        filtered = "?status=4xx&direction=in"
        context = CONTEXT._replace(query=query_of(f"{filtered[1:]}&before={delivered().name}"))
        page = delivery_page(delivered(REFUSED, 400), context=context, beside=("a", "b"))
        self.assertEqual(page.links("← Refused"), [f"../{filtered}"])
        beside = [page.one("a", rel=rel).attributes["href"] for rel in ("prev", "next")]
        self.assertEqual(beside, [f"../deliveries/a{filtered}", f"../deliveries/b{filtered}"])
        self.assertEqual(delivery_page(delivered()).all("a", rel="next"), [])

    def test_one_can_answer_an_offer_with_a_document_that_one_may_edit(self) -> None:
        delivery = delivered({**OFFER, "summary": "\u202e<b>"})
        page = delivery_page(delivery, reply_pattern="Reject")
        url = f"../deliveries/{delivery.name}"
        actions = [form.attributes["action"] for form in page.all("form")]
        self.assertEqual(actions, [f"{url}#reply", f"{url}/send", f"{url}/send"])
        self.assertEqual(page.texts("option", selected="selected"), ["Reject"])
        document = json.loads("".join(page.one("textarea").texts))
        self.assertEqual((document["type"], document["object"]["summary"]), ("Reject", "\u202e<b>"))
        to = [field.attributes["value"] for field in page.all("input", name="to")]
        self.assertEqual(to, [REPOSITORY["inbox"], "http://localhost:5005/inbox"])
        self.assertEqual(page.links("Reply"), ["#reply"])
        too_long = {**OFFER, "summary": "x" * 100_000}
        for document in (ACCEPT, [OFFER], b"no", too_long):
            self.assertEqual(delivery_page(delivered(document)).all("section", id="reply"), [])

    def test_nothing_can_be_sent_without_permission_or_body(self) -> None:
        for more in ({"context": CONTEXT._replace(may_send=False)}, {"body": None}):
            page = delivery_page(delivered(OFFER), **more)
            self.assertEqual((page.all("form"), page.links("Send again")), ([], []))
        self.assertIn("no longer: it was removed", page.texts("dd"))
        self.assertIn("It is no longer stored: it was removed.", page.texts("p"))


def every_page(document: Any = REFUSED) -> Iterator[Page]:
    """Yield a page of each kind; the first three show the document."""
    text, delivery = str(document)[:2000], delivered(document, 400)
    findings = [*delivery.findings, finding("E", "/id", text, spec=text)]
    delivery = delivery._replace(findings=findings)
    context = CONTEXT._replace(query=coarinbox.Query(q=text))
    yield Page(coarinbox.list_page(context, [delivery], coarinbox.Totals(1)))
    yield delivery_page(delivery, [delivery, sent(ACCEPT)], context)
    yield Page(coarinbox.error_page(CONTEXT, 400, text))
    yield list_page(delivery)
    yield list_page(all=0)
    yield Page(coarinbox.constraints_page(CONTEXT, coarinbox.PATTERNS[0]))
    yield Page(coarinbox.samples_page(CONTEXT))


class PageTest(unittest.TestCase):
    def test_constraints_are_those_of_one_pattern_with_an_example(self) -> None:
        for pattern in coarinbox.PATTERNS:
            page = Page(coarinbox.constraints_page(CONTEXT, pattern))
            self.assertEqual(page.texts("h1"), [pattern.name])
            tabs = page.texts("a", aria_current="page")
            self.assertEqual(tabs, ["Constraints", pattern.name])
            for rule in coarinbox.constraints_of(pattern):
                self.assertEqual(page.one("li", id=rule["code"]).attributes["class"], rule["level"])
            example = json.loads(*page.copies("Copy JSON"))
            self.assertEqual(coarinbox.pattern_of(example), pattern)
            self.assertEqual(coarinbox.validate(example), [])
            self.assertIn(f'"id": "{example["id"]}",', page.lines)
        self.assertIn("error id is an HTTP URI origin.id-http-uri", page.texts("li"))
        self.assertIn("This inbox refuses: error.", page.text)
        modes: list[tuple[bool | str, str]] = [
            (False, "none of them"), ("strict", "error, MUST"),
            ("PCI", "error, whatever PCI refuses"), ("coarnotify", "whatever coarnotify refuses"),
        ]  # fmt: skip
        for mode, refused in modes:
            context = CONTEXT._replace(mode=mode)
            page = Page(coarinbox.constraints_page(context, coarinbox.PATTERNS[0]))
            self.assertIn(f"This inbox refuses: {refused}.", page.text)

    def test_samples_can_be_read_copied_and_sent(self) -> None:
        page = Page(coarinbox.samples_page(CONTEXT))
        for copied, pattern in itertools.zip_longest(page.copies("Copy JSON"), coarinbox.PATTERNS):
            document = json.loads(copied)
            self.assertEqual(coarinbox.pattern_of(document), pattern)
            self.assertEqual(document["target"]["inbox"], "http://localhost:5005/inbox")
            (link,) = (each for each in page.all("a") if each.text == pattern.name)
            shown = page.one("section", id=link.attributes["href"][1:]).text
            self.assertIn(json.dumps(document["type"]), shown)
            self.assertEqual(len(page.all("button", data_send=pattern.name)), 1)

    def test_an_error_is_a_page_with_navigation(self) -> None:
        page = Page(coarinbox.error_page(CONTEXT, 404, "it <was> removed"))
        self.assertEqual(page.text, "404 Not Found it <was> removed All deliveries")
        self.assertEqual(page.links("All deliveries"), ["../"])

    def test_links_lead_somewhere_and_nothing_runs_but_the_script_of_the_page(self) -> None:
        directives = coarinbox.CONTENT_SECURITY_POLICY.split("; ")
        policy = dict(directive.split(maxsplit=1) for directive in directives)
        self.assertEqual((policy["default-src"], policy["frame-ancestors"]), ("'none'",) * 2)
        self.assertNotIn("unsafe", str(policy))
        for page in every_page():
            for kind in ("script", "style"):
                digest = hashlib.sha256("".join(page.one(kind).texts).encode()).digest()
                source = f"'sha256-{base64.b64encode(digest).decode()}'"
                self.assertEqual(policy[f"{kind}-src"], source)
            ids = [each.attributes["id"] for each in page.elements if "id" in each.attributes]
            self.assertEqual(len(set(ids)), len(ids), "an id comes twice")
            for element in page.elements:
                for name, value in element.attributes.items():
                    if name in ("href", "action"):
                        self.assertRegex(value, r"\A(\.\./|#|https?://|data:,\Z)")
                    if name in ("for", "aria-labelledby") or value.startswith("#"):
                        self.assertIn(value.lstrip("#"), ids)

    def test_no_text_can_become_markup_or_an_address(self) -> None:
        harmless = set(
            "html head meta title link style body header a span code button main h1 h2 h3 p dl dt"
            " dd div section nav ol ul li pre mark b small time form label input select option"
            " datalist details summary textarea kbd script".split()
        )
        self.assertGreater(len(HOSTILE), 30)
        for hostile in HOSTILE:
            for page in itertools.islice(every_page(hostile), 3):
                self.assertLessEqual({each.tag for each in page.elements}, harmless)
                self.assertEqual(len(page.all("script")), 1)
                for element in page.elements:
                    href = element.attributes.get("href", "")
                    self.assertRegex(href, r"\A(https?://|\.\./|#|data:,\Z|\Z)")
                    names = element.attributes.keys()
                    self.assertFalse([n for n in names if n.startswith("on") or n == "style"])
                text = "".join(page.one("main").texts).replace("\n", "")
                self.assertTrue(text.isprintable())
                self.assertLess(len(text), 1_000_000)


def hostile_notifications() -> list[Any]:
    """Make notifications that would do harm if any of their texts were taken for something else."""
    texts = [
        "<script>window.hacked = 1</script>", "\"'><img src=x onerror='window.hacked = 1'>",
        "</pre></mark><svg onload=window.hacked=1>", "javascript:window.hacked=1",
        "data:text/html,<script>window.hacked=1</script>", "{style}{script}{{0}}%s&lt;b&gt;",
        "\u202e\u2066reversed\u200b\u0000\u0085\u2028", "x" * 2**20, "<!--", "]]>", "\ud800", "",
        "http://example.org/\"onmouseover=\"window.hacked=1", "https://example.org/' autofocus='",
    ]  # fmt: skip

    def everywhere(value: Any, text: str) -> Any:
        if isinstance(value, dict):
            return {name: everywhere(child, text) for name, child in value.items()}
        return [text] if isinstance(value, list) else text

    small = [text for text in texts if len(text) < 2**20]
    hostile = [everywhere(OFFER, text) for text in texts[:7]]
    hostile += [{**ACCEPT, "id": text, "inReplyTo": text, text: text} for text in small]
    hostile += [changed(OFFER, "object.id", text) for text in texts]
    hostile += [{**OFFER, **{f"member {number}": "<b>" for number in range(10_000)}}]
    hostile += [text.encode("utf-8", "replace") for text in texts]
    return hostile


HOSTILE = hostile_notifications()


class ForeignPageTest(unittest.TestCase):
    def test_only_its_own_pages_can_empty_the_inbox(self) -> None:
        none, same = {"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "same-origin"}
        evil, proxied = {"Origin": "https://evil.example"}, {"Origin": "https://inbox.example.org"}
        cases: list[tuple[str | None, dict[str, str], int]] = [
            (None, {}, 204), (None, none, 204), (None, evil, 403), (None, {"Origin": "null"}, 403),
            (None, {"Origin": "http://127.0.0.1:PORT", **same}, 204),
            (None, {"Origin": "http://LOCALHOST:PORT", "Host": "localhost:PORT"}, 204),
            (None, {"Origin": "http://127.0.0.1:1"}, 403), (None, {"Origin": ""}, 403),
            (None, {"Origin": "http://127.0.0.1"}, 403), (None, {**same, **evil}, 403),
            (None, {"Sec-Fetch-Site": "cross-site"}, 403),
            (None, {"Sec-Fetch-Site": "same-site"}, 403),
            ("https://Inbox.example.org/coar", {**proxied, **same}, 204),
            ("https://inbox.example.org:443", proxied, 204), ("http://other", proxied, 403),
        ]  # fmt: skip
        for base, headers, status in cases:
            with self.subTest(base, headers=headers), coarinbox.running(BASE_URL=base) as inbox:
                port = str(address(inbox.server)[1])
                headers = {name: text.replace("PORT", port) for name, text in headers.items()}
                send(inbox.url)
                for path in (f"/inbox/{inbox.deliveries[0].name}", "/inbox"):
                    answer = ask(inbox.server, "DELETE", path, headers=headers)
                    self.assertEqual(answer.status, status, path)
                    if status == 403:
                        foreign = headers.get("Origin") or headers.get("Sec-Fetch-Site", "none")
                        self.assertIn(foreign, answer.json()["detail"])
                        self.assertIn("BASE_URL", answer.json()["detail"])
                self.assertEqual(len(inbox.notifications), int(status == 403))


# --- Browser -------------------------------------------------------------------------------------

BROWSER = shutil.which("chromium") and shutil.which("chromedriver")
SELENIUM = importlib.util.find_spec("selenium")
AXE = HERE / ".ci/work/node_modules/axe-core/axe.min.js"  # where .ci/run puts it
OVERFLOW = "return document.documentElement.scrollWidth - innerWidth"
VIEWS = itertools.cycle(itertools.product((1280, 853, 400), ("light", "dark")))
QUIET = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    " disable-component-update disable-sync"
).split()


@unittest.skipUnless(BROWSER and SELENIUM, "chromium, chromedriver or selenium is not installed")
class BrowserTest(DeliveriesTest):
    """Tests in a real browser, which all of them share."""

    driver: Any
    keys: Any
    actions: Any
    profile: tempfile.TemporaryDirectory[str]

    @classmethod
    def setUpClass(cls) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        cls.profile = tempfile.TemporaryDirectory()
        for argument in [*QUIET, f"user-data-dir={cls.profile.name}"]:
            options.add_argument(f"--{argument}")
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        cls.driver = webdriver.Chrome(options=options, service=service)
        cls.keys, cls.actions = webdriver.Keys, webdriver.ActionChains

    @classmethod
    def tearDownClass(cls) -> None:
        cls.driver.quit()
        cls.profile.cleanup()

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.driver.get, "about:blank")
        self.window(1280)
        self.scripts(True)

    def window(self, width: int, scheme: str = "light") -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def scripts(self, on: bool) -> None:
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not on})

    def open(self, path: str = "/", live: bool = True) -> None:
        self.driver.get(self.server.base + path)
        if live:
            self.wait_for("#state", "live")

    def run_script(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
        return " ".join(" ".join(self.run_script(script, selector)).split())

    def wait_for(self, selector: str, text: str, seconds: float = 10) -> None:
        """Wait until some element holds a text."""
        started = time.monotonic()
        self.wait_until(lambda: text in self.text(selector))
        self.assertLess(time.monotonic() - started, seconds)

    def wait_for_rows(self, count: int) -> None:
        self.wait_until(lambda: len(self.all("#deliveries .open")) == count)

    def wait_for_url(self, end: str) -> None:
        self.wait_until(lambda: str(self.driver.current_url) == self.server.base + end)

    def click(self, selector: str, text: str = "") -> None:
        """Click the first element that is named so."""
        script = "return [...document.querySelectorAll(arguments[0])].find(e => e.innerText"
        self.run_script(f"{script}.includes(arguments[1]))", selector, text).click()

    def press(self, *keys: str) -> str:
        """Press keys where the focus is; returns the id of the row that has it then."""
        self.actions(self.driver).send_keys(*keys).perform()
        return str(self.run_script("return document.activeElement.closest('li')?.id"))

    def test_a_refusal_appears_within_a_second_with_its_reasons(self) -> None:
        self.post(ACCEPT)
        self.open()
        self.run_script("window.kept = 1")
        self.post(changed(OFFER, "origin.id", "urn:uuid:origin"))
        self.wait_for("#deliveries", "origin.id must be an HTTP URI", seconds=1)
        self.assertEqual(self.run_script("return window.kept"), 1, "the page was loaded again")
        self.assertEqual(self.driver.title, "(1) Deliveries · coarinbox")
        self.assertIn("Request Review", self.text("#deliveries .new"))
        self.assertIn("400 · 1 error", self.text("#newest"))  # which is spoken
        self.run_script("dispatchEvent(new Event('pointermove'))")  # somebody looks
        self.assertEqual(self.driver.title, "Deliveries · coarinbox")

        self.click("#deliveries .open")
        self.wait_for("h1", "Request Review")
        self.assertIn("origin.id must be an HTTP URI", self.text(".findings"))
        (payload,), (findings,) = self.all("#payload"), self.all("#findings")
        self.assertGreater(findings.rect["x"], payload.rect["x"] + payload.rect["width"])
        self.assertLess(abs(findings.rect["y"] - payload.rect["y"]), 50)

    def test_the_first_sample_takes_the_place_of_the_instructions_until_it_is_removed(self) -> None:
        self.open()
        self.assertIn("Nothing has been delivered yet", self.text("h1"))
        self.click("#sample option", "Undo Offer")
        self.click("button", "Send to this inbox")
        self.wait_for("#deliveries", "201 Undo Offer")
        self.assertEqual(self.all("pre"), [])
        self.open("/samples", live=False)
        self.click("[data-send=Reject]")
        self.wait_for("#deliveries", "201 Reject")
        for answer, left in (("dismiss", 2), ("accept", 0)):
            self.click("[data-clear]")
            getattr(self.driver.switch_to.alert, answer)()
            self.wait_for_rows(left)
            self.assertEqual(len(self.stored()), left)
        self.wait_for("h1", "Nothing has been delivered yet")
        self.wait_for("#state", "live")
        self.post(OFFER)
        self.wait_for("#deliveries", "Request Review", seconds=1)
        self.assertEqual(len(self.all("li.new")), 1)
        self.assertEqual(self.driver.title, "(1) Deliveries · coarinbox")
        self.open("/?limit=2")
        self.post_each(*[ACCEPT] * 3)
        self.wait_until(lambda: self.driver.title == "(2+) Deliveries · coarinbox")

    def test_a_conversation_grows_while_one_types_and_copies(self) -> None:
        self.post(OFFER)
        self.open(f"/deliveries/{self.names()[0]}")
        self.assertIn("Nothing else has this id", self.text("#conversation"))
        (folded,), (field,) = self.all(".json > details"), self.all("textarea")
        self.run_script("arguments[0].open = false", folded)
        field.send_keys("typed ")
        self.post(ACCEPT)
        self.wait_for("#conversation", "1 warning Accept", seconds=1)
        self.assertFalse(self.run_script("return arguments[0].open", folded))
        self.assertIn("typed", field.get_attribute("value"))
        self.click("button", "Copy JSON")
        self.wait_for(".tools", "Copied")
        field.clear()
        field.send_keys(self.keys.CONTROL, "v")
        self.assertEqual(json.loads(field.get_attribute("value")), OFFER)

    def test_the_filter_narrows_while_one_types(self) -> None:
        self.post_each(ACCEPT, REFUSED)
        self.open()
        self.all("[type=search]")[0].send_keys("offer-1")
        self.wait_for_rows(1)
        self.wait_for_url("/?q=offer-1")
        self.assertIn("q offer-1", self.text("#active"))
        self.wait_for("#state", "live")
        self.post_each(ACCEPT, changed(REFUSED, "summary", "2"))  # the first does not match
        self.wait_for_rows(2)
        self.assertNotIn("Accept", self.text("#deliveries"))
        self.assertEqual(self.run_script("return document.activeElement.name"), "q")
        self.click("#active a")
        self.wait_for_rows(4)

    def test_keys_move_open_search_and_go_back_within_the_filter(self) -> None:
        self.post_each(REFUSED, ACCEPT, b"no", REFUSED)
        names, filtered = self.names("?status=4xx"), "?status=4xx&direction=in"
        self.open()
        self.click("#totals a", "Refused")
        self.wait_for_rows(3)
        first, _, last = (f"row-{name}" for name in names)
        for keys, row in [("j", first), ("jjj", last), ("kkk", first)]:
            self.assertEqual(self.press(*keys), row)
        self.post(b"no")
        self.wait_for_rows(4)
        self.assertEqual(self.press(), first, "the focus stays where it is")
        self.press(self.keys.ENTER)
        for key, name in [("", names[0]), ("j", names[1]), ("j", names[2]), ("k", names[1])]:
            self.press(key)
            self.wait_for_url(f"/deliveries/{name}{filtered}")
        self.press(self.keys.ESCAPE)
        self.wait_for_url(f"/{filtered}")
        self.press("/", "x", "j")
        self.assertEqual(self.all("[type=search]")[0].get_attribute("value"), "xj")

    def test_an_offer_is_answered_by_hand_and_the_conversation_shows_it(self) -> None:
        self.post(changed(OFFER, "origin.inbox", f"{self.server.base}/inbox"))
        (offer,), keys = self.names(), self.keys
        for pattern, scripts in (("Reject", False), ("Announce Review", True)):
            self.scripts(scripts)
            self.open(live=False)
            shown = [each for each in self.all(".script") if each.is_displayed()]
            self.assertEqual(bool(shown), scripts, "there is a button that needs a script")
            self.click("#deliveries .open", "Request Review")
            self.wait_for_url(f"/deliveries/{offer}")
            self.click("#reply option", pattern)
            self.click("#reply button", "Write it")
            self.wait_for_url(f"/deliveries/{offer}?reply={pattern.replace(' ', '+')}#reply")
            self.wait_for("#reply option:checked", pattern)
            end = (keys.CONTROL, keys.END, keys.NULL, keys.BACKSPACE)
            self.all("#document")[0].send_keys(*end, ', "summary": "edited" }')
            self.click("#reply button.main")
            self.wait_for(".title", f"sent 201 {pattern} to ")
            self.assertIn('"summary": "edited"', self.text("#payload"))
            self.assertIn("201 Created", self.text("#answer"))
            self.assertIn("by hand", self.text(".facts"))
            self.assertRegex(self.text("#conversation"), rf"Request Review .* sent 201 {pattern}")

    def test_a_page_that_nobody_sees_asks_for_nothing(self) -> None:
        def hide(hidden: bool) -> int:
            """Hide the page, or show it; returns how often it asked for anything before."""
            return int(self.run_script(
                "const asked = performance.getEntriesByType('resource').filter("
                "    entry => entry.startTime > window.since).length;"
                "window.since = performance.now();"
                "Object.defineProperty(document, 'hidden', {value: arguments[0],"
                "    configurable: true});"
                "document.dispatchEvent(new Event('visibilitychange')); return asked",
                hidden,
            ))  # fmt: skip

        self.post()
        self.open()
        self.post()
        self.wait_for_rows(2)
        self.run_script(
            "window.titles = []; new MutationObserver(() => window.titles.push(document.title))"
            ".observe(document.querySelector('title'), {childList: true})"
        )
        hide(True)
        self.post_each(*[ACCEPT] * 3)
        # A page that is seen shows the same deliveries before this one is looked at again.
        hidden = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        self.open()
        self.wait_for_rows(5)
        self.driver.close()
        self.driver.switch_to.window(hidden)
        self.assertEqual(len(self.all("#deliveries .open")), 2)
        counted = [f"({count}) Deliveries · coarinbox" for count in (2, 3, 4)]
        self.assertLessEqual(set(counted), set(self.run_script("return window.titles")))
        self.assertEqual(hide(False), 0)
        self.wait_for_rows(5)
        self.wait_until(lambda: self.driver.title == "(3) Deliveries · coarinbox")

    def test_it_is_live_again_after_a_restart(self) -> None:
        self.open()
        self.server.server_close()
        self.wait_for("#state", "not connected")
        with beside(self.server, PORT=address(self.server)[1]) as again:
            ask(again, "POST", "/inbox", ACCEPT)
            self.wait_for("#deliveries", "201")
            self.wait_for("#state", "live")

    def test_nothing_hostile_runs_or_breaks_the_layout(self) -> None:
        self.post_each(*HOSTILE)
        # Every second: `PageTest` has looked at the markup of all of them.
        paths = ["/", *(f"/deliveries/{name}" for name in self.names()[::2])]
        self.assertGreater(len(paths), 20)
        for width, some in ((1280, paths[:5]), (400, paths)):
            self.window(width)
            for path in some:
                self.open(path, live=False)
                self.assertIsNone(self.run_script("return window.hacked"), path)
                self.assertLessEqual(self.run_script(OVERFLOW), 0, f"{path}, {width}")
        violations = [line for line in self.driver.get_log("browser") if "Security" in str(line)]
        self.assertEqual(violations, [])

    @unittest.skipUnless(AXE.exists(), "axe-core is not installed")
    def test_everybody_can_use_it(self) -> None:
        self.check_accessibility("/")  # of an empty inbox
        self.post_each(ACCEPT, OFFER, REFUSED, b"no")
        accept, offer = self.names("?status=201")[::-1]
        to = {"to": f"{self.server.base}/nowhere"}
        self.assertEqual(self.ask("POST", f"/deliveries/{offer}/send", to).status, 201)
        self.ask("POST", "/inbox?status=503", OFFER)
        self.ask("DELETE", f"/inbox/{accept}")
        filters = "/?status=4xx&origin=r.example.org&q=nothing"
        deliveries = [f"/deliveries/{name}" for name in self.names()]
        for path in ("/", filters, "/constraints", "/samples", "/nowhere", *deliveries):
            self.check_accessibility(path)

    def check_accessibility(self, path: str) -> None:
        """Look at a page in two of `VIEWS`, by turns; none may scroll sideways."""
        self.open(path, live=False)
        self.run_script(AXE.read_text(encoding="utf-8"))
        for width, scheme in itertools.islice(VIEWS, 2):
            self.window(width, scheme)
            results = self.driver.execute_async_script("axe.run().then(arguments[0])")
            self.assertGreater(len(results["passes"]), 10)
            problems = [
                (violation["id"], [node["html"] for node in violation["nodes"]][:3])
                for violation in results["violations"]
            ]
            self.assertEqual(problems, [], f"{path}, {width}, {scheme}")
            self.assertLessEqual(self.run_script(OVERFLOW), 0, f"{path}, {width}")


# --- The program ---------------------------------------------------------------------------------


class Program:
    """An inbox that runs as a process; its log is read all the time, or lines would be dropped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self.read_log("validation")
        self.banner = self.log[:]
        urls = [line.split()[1] for line in self.banner if line.startswith("inbox")]
        assert urls, self.banner
        self.url = urls[0]
        parts = urllib.parse.urlsplit(self.url)
        self.server_address = (str(parts.hostname), int(parts.port or 0))
        self.reader = threading.Thread(target=self.read_log)
        self.reader.start()

    def read_log(self, last: str | None = None) -> None:
        """Read on in the log, up to a line that begins with `last`."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))
            if last and line.startswith(last):
                return

    def ask(self, *arguments: Any, **more: Any) -> Answer:
        return ask(self, *arguments, **more)

    def send_signal(self, number: int) -> None:
        """Send a signal; Windows has only one that a process can send and its receiver handle."""
        self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", number))

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; returns the exit status and what was logged."""
        self.send_signal(number)
        status = self.process.wait(20)
        self.reader.join()
        return status, "\n".join(self.log)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "COARNOTIFY_SETTINGS": "", "PYTHONUNBUFFERED": "1", **more}


@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[Program]:
    """Run an inbox as a process until the block ends."""
    group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # or Windows signals us as well
    options = {"env": environment(), "creationflags": group, **options}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **options
    ) as process:
        program = Program(process)
        try:
            yield program
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()
                program.reader.join()


class Done(NamedTuple):
    """A program that has ended: its exit status and its output."""

    status: int
    output: list[str]
    errors: str


class ProgramTest(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name).resolve()

    def config(self, text: str) -> str:
        path = self.directory / "local.cfg"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def command(self, *arguments: str, **constants: float) -> list[str]:
        """The command line of an inbox, which may have constants that make it wait less.

        Unlike a script, an imported module has been compiled before.
        """
        code = (
            f"import sys; sys.path.insert(0, {str(HERE)!r}); import coarinbox\n"
            f"vars(coarinbox).update({constants}); sys.exit(coarinbox.main())"
        )
        return [sys.executable, "-c", code, *arguments]

    def invoke(self, *arguments: str, stdin: str = "", **env: str) -> Done:
        """Run the command line to its end, in this process, as it takes long to start another."""
        output, errors = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        given = io.TextIOWrapper(io.BytesIO(stdin.encode()))
        logger, patch = logging.getLogger(), unittest.mock.patch
        with contextlib.ExitStack() as stack:
            stack.callback(os.chdir, os.getcwd())
            os.chdir(self.directory)
            stack.enter_context(patch.multiple("sys", stdin=given, stdout=output, stderr=errors))
            stack.enter_context(patch("os.environ", environment(**env)))
            stack.enter_context(patch.object(logger, "handlers", []))
            stack.callback(logger.setLevel, logger.level)
            try:
                status = coarinbox.main(list(arguments))
            except SystemExit as end:  # of argparse
                status = int(end.code or 0)
            for handler in logger.handlers:  # the log is written by another thread
                handler.flush()
            output.seek(0)
            return Done(status, output.read().splitlines(), errors.getvalue())

    def configured(self, *arguments: str, **env: str) -> coarinbox.Settings:
        """Run the command line up to where it would serve; returns the settings it has then."""
        with unittest.mock.patch("coarinbox.InboxServer") as server:
            with unittest.mock.patch("coarinbox.run"):
                done = self.invoke(*arguments, **env)
        self.assertEqual(done.status, 0, done.errors)
        (settings,) = server.call_args.args
        assert isinstance(settings, coarinbox.Settings)
        return settings

    def fail_to_start(self, *arguments: str, **env: str) -> str:
        """Expect exit status 2 and one line on standard error, which is returned."""
        with unittest.mock.patch("coarinbox.run"):  # which would serve for ever if it did start
            done = self.invoke(*arguments, **env)
        self.assertEqual(done.status, 2, done.errors)
        self.assertEqual(done.errors.count("\n"), 1, done.errors)
        self.assertEqual(done.output, [])
        return done.errors


def can_connect(where: tuple[str, int]) -> bool:
    try:
        socket.create_connection(where, timeout=1).close()
    except OSError:
        return False
    return True


class StartTest(ProgramTest):
    def test_the_file_alone_says_where_it_is_and_what_is_going_on_until_a_signal(self) -> None:
        shutil.copy(MODULE, self.directory)
        alone = [sys.executable, "-I", "-S", "coarinbox.py", "--port", "0"]
        with running(alone, cwd=self.directory) as inbox:
            port = inbox.server_address[1]
            self.assertEqual(inbox.banner, [
                f"coarinbox {coarinbox.__version__}",
                f"address     127.0.0.1 port {port}",
                f"inbox       http://localhost:{port}/inbox",
                f"page        http://localhost:{port}/",
                f"store       {self.directory / 'notifications'}",
                "validation  True",
            ])  # fmt: skip
            idle = http.client.HTTPConnection(*inbox.server_address, timeout=10)
            self.addCleanup(idle.close)
            answer = ask_on(idle, "POST", "/inbox", ACCEPT)
            self.assertTrue(answer.headers["Location"].startswith(inbox.url + "/2"))
            self.assertEqual(len(files_in(self.directory / "notifications")), 1)
            status, log = inbox.stop(signal.SIGINT)
        self.assertEqual(status, 0, log)
        self.assertRegex(log, r"(?m)^[0-9]{4}-[0-9-]{5} [0-9:]{8} 201 Accept from ")
        self.assertNotIn("Traceback", log)

    def test_debug_logs_headers_and_bodies_but_no_secrets(self) -> None:
        with self.assertLogs("coarinbox", "INFO") as caught, serving(DEBUG=True) as server:
            headers = {"Authorization": "Bearer s3cret", "X-Mine": "yes\tno"}
            ask(server, "POST", "/inbox", '{"id":\n"xö"}'.encode(), headers)
            ask(server, "POST", "/inbox", b"\xff", {"Content-Type": "application/pdf"})
        for text in (
            "POST /inbox HTTP/1.1", "  X-Mine: yes\\tno", '    "id": "xö"', "  \\xff"
        ):  # fmt: skip
            self.assertIn(f"INFO:coarinbox:127.0.0.1 {text}", caught.output)
        self.assertNotIn("s3cret", str(caught.output))

    @contextlib.contextmanager
    def stalled(self, **constants: float) -> Iterator[tuple[Program, Any]]:
        """Run an inbox, with a client that has sent only the head of its request."""
        path = self.config("MAX_CONNECTIONS = 1")
        command = self.command("--port", "0", "--config", path, **constants)
        with running(command, cwd=self.directory) as inbox:
            head = post_head(f"Content-Length: {len(BODY)}", "Expect: 100-continue")
            with connect(inbox, head) as connection:
                self.assertIn(b" 100 ", connection.recv(99))  # its request has begun
                yield inbox, connection

    def test_a_request_in_flight_is_answered_before_the_end(self) -> None:
        """Even if the signal comes twice, and other clients wait for a connection."""
        with self.stalled(DOUBLE_SIGNAL=60) as (inbox, connection), connect(inbox):
            inbox.send_signal(signal.SIGTERM)
            while can_connect(inbox.server_address):  # it stops listening first
                pass
            inbox.send_signal(signal.SIGINT)
            connection.sendall(BODY)
            answer = answer_on(connection)
            self.assertEqual((answer.status, answer.headers["Connection"]), (201, "close"))
            self.assertEqual(inbox.process.wait(10), 0)
        self.assertEqual(len(files_in(self.directory / "notifications")), 1)

    def test_a_signal_some_time_after_the_first_does_not_wait(self) -> None:
        with self.stalled(DOUBLE_SIGNAL=0) as (inbox, _):
            inbox.send_signal(signal.SIGTERM)
            while can_connect(inbox.server_address):
                pass
            started = time.monotonic()
            inbox.send_signal(signal.SIGINT)
            self.assertEqual(inbox.process.wait(10), 0)
            self.assertLess(time.monotonic() - started, coarinbox.STOP_WITHIN - 0.5)
        self.assertEqual(files_in(self.directory / "notifications"), [])

    def test_kill_9_loses_nothing_that_was_acknowledged(self) -> None:
        acknowledged: list[str] = []
        document = json.dumps({**ACCEPT, "summary": "x" * 50_000}).encode()

        def post(inbox: Program) -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    acknowledged.append(inbox.ask("POST", "/inbox", document).headers["Location"])

        with running(self.command("--port", "0"), cwd=self.directory) as inbox:
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                senders = [pool.submit(post, inbox) for _ in range(4)]
                while len(acknowledged) < 50 and not senders[0].done():
                    time.sleep(0)
                inbox.process.kill()
        self.assertGreaterEqual(len(acknowledged), 50)
        stored = {path.stem: path.read_bytes() for path in self.directory.glob("*/*.json")}
        self.assertLessEqual({url.rpartition("/")[2] for url in acknowledged}, stored.keys())
        self.assertEqual(set(stored.values()), {document})

    def test_a_store_or_an_address_that_cannot_be(self) -> None:
        (self.directory / "file").write_text("")
        with serving(HOST="127.0.0.1") as other:
            taken = str(address(other)[1])
            for arguments, expected in [
                (["--store", "file/store"], "STORE_DIR"), (["--host", "x" * 300], "HOST"),
                (["--host", "no.such.host.invalid"], "HOST"),
                (["--host", "127.0.0.1", "--port", taken], f"HOST '127.0.0.1', PORT {taken}"),
            ]:  # fmt: skip
                self.assertIn(expected, self.fail_to_start("--port", "0", *arguments))
        with unittest.mock.patch("os.access", return_value=False):  # as on a read-only disk
            self.assertIn("expected a directory to write to", self.fail_to_start())

    def test_other_addresses_than_localhost(self) -> None:
        if not has_ipv6():
            self.skipTest("this machine has no IPv6")
        for host, name, clients, foreign in [
            ("::1", "[::1]", ["[::1]"], 421), ("0.0.0.0", "localhost", ["127.0.0.1"], 200),
            ("::", "localhost", ["[::1]", "127.0.0.1"], 200),
        ]:  # fmt: skip
            with serving(HOST=host) as server:
                port = address(server)[1]
                self.assertEqual(server.base, f"http://{name}:{port}")
                for client in clients:
                    url = f"http://{client}:{port}/inbox"
                    self.assertEqual(fetch(url).status, 200)
                    self.assertEqual(fetch(url, headers={"Host": "evil.example"}).status, foreign)


class ConfigurationTest(ProgramTest):
    def test_the_example_holds_every_setting_at_its_default(self) -> None:
        values = coarinbox.read_configuration(str(HERE / "local.cfg.example"))
        self.assertEqual(values, vars(coarinbox.Settings()))
        self.assertGreater(len(values), 10)

    def test_it_is_executed_as_python(self) -> None:
        path = self.config(
            "import dataclasses, os\nhere = os.path.dirname(__file__)\n"
            "@dataclasses.dataclass\nclass Other:\n    x: int = 0\n"
            "def f(x: int) -> None: pass\nassert f.__annotations__['x'] is int\n"
            'STORE_DIR = os.path.join(here, "elsewhere", __name__)\nPORT = 10 - 10\n'
        )
        settings = self.configured("--config", path)
        self.assertEqual(settings.STORE_DIR, str(self.directory / "elsewhere/config"))
        self.assertEqual(settings.PORT, 0)

    def test_flags_win_over_the_environment_which_wins_over_the_file(self) -> None:
        self.config('VALIDATE_INCOMING = "strict"\nSTORE_DIR = "file"\nDEBUG_PYCHARM = True')
        (self.directory / "other.cfg").write_text('STORE_DIR = "other file"\nMAX_CONNECTIONS = 5')
        file, variable = {"COARNOTIFY_SETTINGS": "other.cfg"}, {"COARNOTIFY_STORE_DIR": "variable"}
        default = coarinbox.Settings().MAX_CONNECTIONS
        for arguments, env, store, connections in [
            ([], file, "other file", 5),
            (["--config", "local.cfg"], file, "file", default),
            (["--config", "local.cfg"], variable, "variable", default),
            (["--config", "local.cfg", "--store", "flag"], variable, "flag", default),
        ]:
            with unittest.mock.patch("coarinbox.attach_debugger") as attach_debugger:
                settings = self.configured(*arguments, **env)
            self.assertEqual((settings.STORE_DIR, settings.MAX_CONNECTIONS), (store, connections))
            self.assertEqual(settings.VALIDATE_INCOMING, "strict" if arguments else True)
            expected = [unittest.mock.call("localhost", 6000)] if arguments else []
            self.assertEqual(attach_debugger.mock_calls, expected)

    def test_an_environment_variable_is_json_or_as_in_python_or_a_text(self) -> None:
        for name, text, value in [
            ("PORT", "8080", 8080), ("FSYNC", "False", False), ("FSYNC", "true", True),
            ("REPLY_TO", "http://localhost:8080/inbox", "http://localhost:8080/inbox"),
            ("REPLIES", '["accept", "announce review"]', ("Accept", "Announce Review")),
            ("REPLIES", "Accept", ("Accept",)), ("VALIDATE_INCOMING", "strict", "strict"),
            ("VALIDATE_INCOMING", "dspace", "DSpace"),
            ("TOKEN", "123456", "123456"),  # settings that are texts stay texts
            ("PORT", "tcp://10.0.0.1:5005", 5005),  # it names a service of Kubernetes
            ("STRANGER", "1", None),
        ]:  # fmt: skip
            with self.subTest(name, text=text):
                settings = self.configured(**{f"COARNOTIFY_{name}": text})
                self.assertEqual(getattr(settings, name, None), value)
        line = self.fail_to_start(COARNOTIFY_PORT="abc")
        self.assertEqual(line, "coarinbox: COARNOTIFY_PORT is 'abc', expected a port, 0 to 65535\n")

    def test_errors_name_the_file_the_line_and_what_is_wrong(self) -> None:
        for text, expected in [
            ("PORT = 5005\nHOST = (", "local.cfg, line 2: SyntaxError"),
            ("x = 1\ny = x / 0\n", "local.cfg, line 2: ZeroDivisionError: division by zero"),
            ("import nowhere", "local.cfg, line 1: ModuleNotFoundError"),
            ("def f():\n  return g\nf()", "local.cfg, line 2: NameError"),
            ("raise SystemExit(3)", "local.cfg, line 1: SystemExit: 3"),
            ("raise ValueError('two\\nlines')", "local.cfg, line 1: ValueError: two lines"),
            ("a = 1\0", "local.cfg"), ("PORT = 'a\\nb' * 99", "local.cfg: PORT is 'a"),
            ("PORT = '5005'", "local.cfg: PORT is '5005'"),
        ]:  # fmt: skip
            with self.subTest(text):
                self.assertIn(expected, self.fail_to_start("--config", self.config(text)))
        self.assertIn("none.cfg", self.fail_to_start("--config", "none.cfg"))
        self.assertIn("none.cfg", self.fail_to_start(COARNOTIFY_SETTINGS="none.cfg"))
        self.assertIn("VALIDATE_INCOMING is 'lax'", self.fail_to_start("--validate", "lax"))
        line = self.fail_to_start("--port", "70000", "--config", self.config("DEBUG = True"))
        self.assertTrue(line.startswith("coarinbox: PORT is 70000"), line)

    def test_each_setting_refuses_what_it_cannot_use_and_says_what_it_can(self) -> None:
        for name, values in UNUSABLE.items():
            for value in values:
                with self.subTest(name, value=value):
                    with self.assertRaises(coarinbox.ConfigurationError) as caught:
                        coarinbox.Settings(**{name: value})
                    self.assertRegex(str(caught.exception), rf"^{name} is .*, expected .")
                    self.assertNotIn(f"{name} is None", str(caught.exception) * bool(value))
        # Flask-CORS has a setting CORS_ORIGINS too, so no value of it is an error.
        self.assertEqual({*UNUSABLE, "CORS_ORIGINS"}, set(vars(coarinbox.Settings())))
        for name, value, expected in [
            ("RESPONSE_STATUS", 200, "expected 201 or 202$"), ("PORT", "x" * 500, "'x{79}, expect"),
            ("MAX_CONTENT_LENGTH", 2**31, "from 1 to 2147483647"),
        ]:  # fmt: skip
            with self.assertRaisesRegex(coarinbox.ConfigurationError, expected):
                coarinbox.Settings(**{name: value})  # type: ignore[arg-type]

    def test_each_setting_takes_what_it_can_use_and_is_not_changed_later(self) -> None:
        for name, value in [
            ("STORE_DIR", pathlib.Path("store")), ("PORT", 65535), ("HOST", "::"),
            ("RESPONSE_STATUS", 202), ("BASE_URL", "https://example.org"), ("TOKEN", "s3cret"),
            ("BASE_URL", "http://[::1]:80/x/"), ("MAX_CONTENT_LENGTH", 1),
            ("MAX_CONTENT_LENGTH", 2**31 - 1), ("REQUEST_TIMEOUT", 0.001),
            ("REQUEST_TIMEOUT", 86400),
        ]:  # fmt: skip
            with self.subTest(name, value=value), self.assertRaises(AttributeError):
                settings = coarinbox.Settings(**{name: value})  # type: ignore[arg-type]
                setattr(settings, name, value)

    def test_unknown_settings_are_warned_about_with_the_nearest_name(self) -> None:
        path = self.config('STORE_DIRECTORY = "x"\nSECRET_KEY = "y"\nlower = 1\nPORT = 0\n')
        with self.assertLogs("coarinbox", "WARNING") as caught:
            self.assertEqual(coarinbox.configure(path, {}), coarinbox.Settings(PORT=0))
        start = f"WARNING:coarinbox:{path}: ignored: unknown setting"
        expected = [f"{start} SECRET_KEY", f"{start} STORE_DIRECTORY; did you mean STORE_DIR?"]
        self.assertEqual(sorted(caught.output), expected)

    def test_unknown_flags_and_values_end_it_with_status_2(self) -> None:
        for *arguments, line in [
            ("--nothing", "usage: coarinbox"), ("extra", "usage: coarinbox"),
            ("--port", "x", "coarinbox: PORT is 'x', expected a port, 0 to 65535\n"),
        ]:  # fmt: skip
            done = self.invoke(*arguments)
            self.assertEqual((done.status, done.output), (2, []))
            self.assertIn(line, done.errors)
        done = self.invoke("--version")
        self.assertEqual(done, (0, [f"coarinbox {coarinbox.__version__}"], ""))


UNUSABLE: dict[str, list[Any]] = {
    "STORE_DIR": ["", None, 5, b"store", "a\0b"], "HOST": ["", None, 127, "\udc80", "a\nb"],
    "PORT": ["5005", -1, 65536, 5005.0, True, None], "FSYNC": [1, None],
    "RESPONSE_STATUS": [200, 204, "201", None, True, 10**5000],
    "VALIDATE_INCOMING": ["lax", "yes", None, 1, 0, ""], "DEBUG": [1, "no", None],
    "DEBUG_PYCHARM": [1, "no", None], "DEBUG_PYCHARM_SERVER": ["", None],
    "DEBUG_PYCHARM_PORT": ["6000", -1], "MAX_CONNECTIONS": [0, -1, None],
    "BASE_URL": ["", "example.org", "ftp://example.org", "http://", "http://a/?q", "http://a/#f",
                 "http://a b/", 'http://a/"', "http://a/\n", "http://[1]", "http://ä/", 5,
                 "http://me@a/"],
    "MAX_CONTENT_LENGTH": [0, -1, 1.5, None, "1M", 2**31, -(10**5000)],
    "REQUEST_TIMEOUT": [0, -1, "30", None, float("inf"), float("nan"), 86401, 1e-320, True],
    "REPLIES": ["Accept me", ["Accept", "Offer"], 5, None],
    "REPLY_DELAY": [-1, "1", None, True, float("nan")], "REPLY_TO": ["", "example.org", 5],
    "TOKEN": ["", 5, "s3cret\n", " s3cret", "\udc80"], "SSL_CERT": ["", 5],
    "SSL_KEY": ["", "key.pem"],
}  # fmt: skip


# --- Test double ---------------------------------------------------------------------------------


def send(url: str, document: Any = ACCEPT) -> Answer:
    return fetch(url, "POST", document)


class RunningTest(unittest.TestCase):
    def test_a_test_of_five_lines(self) -> None:
        with coarinbox.running() as inbox:
            send(inbox.url, OFFER)
            delivery = inbox.wait_for(type="Offer", timeout=5)
            assert delivery.notification["object"]["id"] == PREPRINT["id"]
        self.assertEqual((delivery.status, delivery.pattern), (201, "Request Review"))
        for look in (lambda: inbox.deliveries, inbox.wait_for, inbox.assert_none, inbox.clear):
            with self.assertRaisesRegex(RuntimeError, "inside the `with` block"):
                look()

    def test_settings_are_arguments(self) -> None:
        """Nothing comes from the environment, and the URL leads here whatever the public one is."""
        settings = {"VALIDATE_INCOMING": "strict", "BASE_URL": "https://inbox.example.org/"}
        with unittest.mock.patch.dict(os.environ, COARNOTIFY_TOKEN="secret"):
            with coarinbox.running(**settings) as inbox:
                self.assertEqual(send(inbox.url, changed(ACCEPT, "actor.id", ABSENT)).status, 400)
                location = send(inbox.url).headers["Location"]
                self.assertTrue(location.startswith("https://inbox.example.org/inbox/"), location)
                self.assertEqual(inbox.notifications, [ACCEPT])
        unknown = "^unknown setting TOKN; did you mean TOKEN"
        for name, expected in (("PORT", "PORT"), ("TOKN", unknown)):
            with self.assertRaisesRegex(coarinbox.ConfigurationError, expected):
                with coarinbox.running(**{name: "x"}):
                    self.fail("it runs")

    def test_a_bug_of_the_inbox_surfaces(self) -> None:
        with self.assertLogs("coarinbox", "ERROR"), self.assertRaises(RuntimeError) as caught:
            with coarinbox.running() as inbox:
                with unittest.mock.patch("coarinbox.validate", side_effect=ZeroDivisionError):
                    self.assertEqual(send(inbox.url).status, 500)
        self.assertIsInstance(caught.exception.__cause__, ZeroDivisionError)

    def test_it_ends_at_once_whatever_clients_do(self) -> None:
        head = post_head("Content-Length: 9", "Expect: 100-continue")
        for limit in (1, 100):  # more clients than it serves, or fewer
            with self.subTest(limit), contextlib.ExitStack() as clients:
                with coarinbox.running(MAX_CONNECTIONS=limit) as inbox:
                    inbox.fail_next(503, delay=3600)
                    clients.enter_context(connect(inbox.server, head)).recv(1)  # it has begun
                    for data in (b"", b"POST /in", head, head + b"x", post_to()):
                        clients.enter_context(connect(inbox.server, data))
                    if limit > 1:
                        clients.enter_context(Listener(inbox.server))
                    started = time.monotonic()
                self.assertLess(time.monotonic() - started, coarinbox.STOP_WITHIN)

    @unittest.skipUnless(PROC, "this system does not list descriptors")
    def test_it_is_quiet_and_leaves_nothing_behind(self) -> None:
        def left() -> tuple[int, int, list[str]]:
            return len(os.listdir("/proc/self/fd")), threading.active_count(), os.listdir(temporary)

        temporary, errors = tempfile.mkdtemp(), io.StringIO()
        self.addCleanup(os.rmdir, temporary)
        with unittest.mock.patch("tempfile.tempdir", temporary), contextlib.redirect_stderr(errors):
            before = left()
            for _ in range(10):
                with contextlib.suppress(ZeroDivisionError), coarinbox.running(FSYNC=True) as inbox:
                    send(inbox.url, b"no")
                    send(inbox.url)
                    self.assertEqual(inbox.notifications, [ACCEPT])
                    ask(inbox.server, "GET", "/inbox")
                    raise ZeroDivisionError  # an exception in the block changes nothing
            self.assertFalse(can_connect(address(inbox.server)))
            deadline = time.monotonic() + 5  # threads that have nothing to do end soon
            while left() > before and time.monotonic() < deadline:
                time.sleep(0)
            self.assertEqual(left()[0], before[0])
            self.assertLessEqual(left()[1:], before[1:])
        self.assertEqual(errors.getvalue(), "")


class DoubleTest(unittest.TestCase):
    def setUp(self) -> None:
        context = coarinbox.running()
        self.inbox = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def send(self, *documents: Any) -> list[int]:
        return [send(self.inbox.url, document).status for document in documents]

    def test_it_shows_what_came_and_what_was_stored_here(self) -> None:
        inbox = self.inbox
        self.assertEqual(self.send(OFFER, REFUSED, b"no", ACCEPT), [201, 400, 400, 201])
        shown = [each.notification for each in inbox.deliveries]
        self.assertEqual(shown, [OFFER, REFUSED, None, ACCEPT])
        self.assertEqual(inbox.notifications, [OFFER, ACCEPT])
        self.assertEqual(inbox.deliveries[1].findings[0].code, "id-absolute-uri")
        ask(inbox.server, "DELETE", f"/inbox/{inbox.deliveries[0].name}")
        self.assertEqual(inbox.deliveries[0].notification, None, "it was removed")
        self.assertEqual(inbox.notifications, [ACCEPT])
        with coarinbox.running() as other:
            other.fail_next(503)
            self.assertEqual((self.send(OFFER), send(other.url).status), ([201], 503))
            inbox.clear()
            self.assertEqual((inbox.deliveries, inbox.notifications), ([], []))
            self.assertEqual(len(other.deliveries), 1)

    def test_it_waits_for_what_is_still_to_come(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(self.inbox.wait_for, in_reply_to=OFFER_ID)
            unexpected = pool.submit(lambda: self.inbox.assert_none(type="Accept", within=5))
            self.assertFalse(waiting.done())
            self.send(OFFER, ACCEPT)
            self.assertEqual(waiting.result().notification, ACCEPT)
            self.assertIsInstance(unexpected.exception(), AssertionError)

    def test_a_wait_goes_on_after_a_clear(self) -> None:
        """The new log may have the inode of the one before, and be longer."""
        self.send(b"no")
        (first,), seen, cleared = self.inbox.deliveries, threading.Event(), threading.Event()

        def is_another(delivery: coarinbox.Delivery) -> bool:
            seen.set()
            return cleared.wait(10) and delivery.name != first.name

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.inbox.wait_for, is_another, status="", timeout=5)
            self.assertTrue(seen.wait(10))
            self.inbox.clear()
            self.send(REFUSED)
            cleared.set()
            self.assertEqual(waiting.result().notification, REFUSED)

    @constants(BLOCK=100)  # it takes many pieces to read the log
    def test_each_demand_selects_from_what_has_arrived(self) -> None:
        self.send(OFFER, ACCEPT, REFUSED)
        offer, accept, refused = self.inbox.deliveries
        demands: list[tuple[Any, dict[str, Any]]] = [
            (offer, {}), (offer, {"type": "coar-notify:ReviewAction"}),
            (offer, {"pattern": "Request Review"}), (accept, {"type": "Accept"}),
            (accept, {"in_reply_to": OFFER_ID}), (refused, {"status": 400}),
            (accept, {"predicate": lambda each: "inReplyTo" in each.about}),
            (refused, {"status": "4xx", "type": "Offer"}),
        ]  # fmt: skip
        for expected, demand in demands:
            self.assertEqual(self.inbox.wait_for(**demand, timeout=0), expected, demand)

    def test_clean_is_only_what_has_no_findings_at_all(self) -> None:
        """An inbox accepts much that its sender should still improve."""
        accept = addressed(ACCEPT, self.inbox.url)
        self.assertEqual(self.send(changed(accept, "actor.name", ABSENT)), [201])
        with self.assertRaisesRegex(AssertionError, "clean=True within(?s:.*): S actor[.]name"):
            self.inbox.wait_for(clean=True, timeout=0)
        self.send(changed(accept, "id", f"urn:uuid:{uuid.uuid4()}"))
        self.assertEqual(self.inbox.wait_for(clean=True).findings, [])

    def test_a_delivery_is_shown_in_one_line(self) -> None:
        inbox, long = self.inbox, changed(OFFER, "id", "urn:x:\n" + "x" * 5000)
        url = inbox.url.replace("localhost", "127.0.0.1")
        for to, document, expected in [
            (url, OFFER, f"201 stored Request Review from {REPOSITORY['id']} {OFFER_ID}>"),
            (url, b"no", "400 refused no pattern from 127.0.0.1 without an id>"),
            (url[:-1], OFFER, "404 refused POST /inbo from 127.0.0.1 without an id>"),
            (url, long, "400 refused Request Review"),
        ]:  # fmt: skip
            send(to, document)
            line = repr(inbox.deliveries[-1])
            self.assertTrue(line.startswith(f"<Delivery {expected}"), line)
            self.assertTrue(line.isprintable() and len(line) < 600, line)
        expected = f"<Delivery 201 stored Request Review to {inbox.url} {OFFER_ID}>"
        self.assertEqual(repr(inbox.send(OFFER, inbox.url)), expected)
        inbox.fail_next(close=True)
        self.assertRegex(repr(inbox.send(ACCEPT, inbox.url)), "^<Delivery dropped Accept to ")

    def test_what_does_not_come_is_an_assertion_that_says_what_did(self) -> None:
        nothing = "no delivery with status='2xx' within 0 s; what arrived: nothing"
        with self.assertRaisesRegex(AssertionError, nothing):
            self.inbox.wait_for(timeout=0)
        self.send(OFFER, REFUSED, b"no")
        self.inbox.fail_next(404)
        self.send(ACCEPT)
        demands: list[tuple[dict[str, Any], list[str]]] = [
            ({"type": "Reject"}, [
                "no delivery with type='Reject', status='2xx' within 0 s; what arrived:\n",
                ": its type is ['Offer', 'coar-notify:ReviewAction']\n",
                ": E id must be an absolute URI; write", "; E origin must be an object; write",
                "the body is not JSON", ": a simulated failure",
            ]),
            ({"pattern": "Reject"}, ["its pattern is Request Review"]),
            ({"in_reply_to": OFFER_ID}, ["its inReplyTo is None"]),
            ({"predicate": lambda each: False}, ["the predicate is false"]),
            ({"predicate": lambda each: each.about["x"]}, ["the predicate raises KeyError"]),
            ({"type": "Reject", "status": "4xx"}, ["status is not 4xx", "offer-1>: its type is"]),
        ]  # fmt: skip
        for demand, reasons in demands:
            with self.subTest(demand), self.assertRaises(AssertionError) as caught:
                self.inbox.wait_for(**demand, timeout=0)
            self.assertEqual(str(caught.exception).count("\n"), 4)
            for reason in reasons:
                self.assertIn(reason, str(caught.exception))

    def test_what_no_delivery_could_ever_be_is_refused(self) -> None:
        self.send(OFFER)
        wrong: list[tuple[type[Exception], dict[str, Any], str]] = [
            (AssertionError, {"pattern": "RequestReview"}, "^unknown pattern .* mean Request"),
            (AssertionError, {"type": "Ofer"}, "^unknown type .* mean Offer[?]$"),
            (AssertionError, {"type": "ReviewAction"}, "mean coar-notify:ReviewAction"),
            (AssertionError, {"status": "2x"}, "a status such as"),
            (TypeError, {"predicate": "Request Review"}, "Request Review"),
            (TypeError, {"type": ["Offer"]}, "not one name"),
        ]
        for kind, demand, expected in wrong:
            for look in (self.inbox.assert_none, self.inbox.wait_for):
                with self.subTest(demand), self.assertRaisesRegex(kind, expected):
                    look(**demand)

    def test_that_nothing_comes_can_be_asserted(self) -> None:
        self.inbox.assert_none(within=0.01)
        self.send(REFUSED)
        with self.assertRaisesRegex(AssertionError, "unexpected .*: <Delivery 400 refused Request"):
            self.inbox.assert_none()
        with self.assertRaisesRegex(KeyError, "objekt"):
            self.inbox.assert_none(lambda each: each.notification["objekt"])
        # Others may have types that are unknown here.
        for type_ in ("Accept", "Create", "coar-notify:IngestAction", "sorg:Review"):
            self.inbox.assert_none(type=type_)
        self.inbox.assert_none(status="2xx")

    def test_the_next_attempts_fail_as_told(self) -> None:
        inbox, date = self.inbox, "Fri, 01 Jan 2027 00:00:00 GMT"
        inbox.fail_next(503, times=2, retry_after=7)
        inbox.fail_next(429, retry_after=date)
        answers = [send(inbox.url) for _ in range(4)]
        told = [(answer.status, answer.headers["Retry-After"]) for answer in answers]
        self.assertEqual(told, [(503, "7"), (503, "7"), (429, date), (201, None)])
        self.assertEqual([each.simulated for each in inbox.deliveries], [True] * 3 + [False])
        self.assertEqual(inbox.wait_for(status=503).notification, ACCEPT)
        inbox.fail_next(close=True)
        with self.assertRaises(http.client.RemoteDisconnected):
            self.send(ACCEPT)
        self.assertEqual(inbox.wait_for(status=0).verdict, "dropped")
        inbox.fail_next(500)
        inbox.clear()
        self.assertEqual(self.send(ACCEPT), [201])

    def test_a_failure_that_cannot_be_is_refused(self) -> None:
        for arguments in [
            {}, {"status": 200}, {"status": 503, "times": None}, {"retry_after": "soon"},
            {"status": 503, "delay": -1}, {"delay": 10_000},
        ]:  # fmt: skip
            with self.subTest(arguments), self.assertRaisesRegex(ValueError, "expected|needs"):
                self.inbox.fail_next(**arguments)  # type: ignore[arg-type]
        self.assertEqual(self.send(ACCEPT), [201])

    def test_a_steady_sender_does_not_keep_it_waiting(self) -> None:
        enough = threading.Event()

        def flood() -> None:
            while not enough.is_set():
                self.send(ACCEPT)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(flood)
            with self.assertRaises(AssertionError):
                self.inbox.wait_for(lambda each: time.sleep(0.01), timeout=0.05)
            enough.set()


class SimulatedFailureTest(DeliveriesTest):
    """Failures that are chosen by the URL of the inbox."""

    def send(self, query: str, document: Any = ACCEPT) -> Answer:
        return self.ask("POST", f"/inbox?{query}", document)

    def test_the_first_attempts_at_each_notification_fail(self) -> None:
        query = "status=503&times=2&retry-after=1"
        for document in (ACCEPT, OFFER):
            answers = [self.send(query, document) for _ in range(4)]
            self.assertEqual([answer.status for answer in answers], [503, 503, 201, 201])
            self.assertEqual(answers[0].headers["Retry-After"], "1")
            self.assertIn("simulated", self.assert_problem(answers[0], 503)["detail"])
            self.assertNotIn("Retry-After", answers[2].headers)
        self.assertEqual(self.ask("DELETE", "/inbox").status, 204)
        self.assertEqual(self.send(query).status, 503, "the attempts are forgotten, too")

    @with_settings(VALIDATE_INCOMING=False)
    def test_the_id_tells_notifications_apart_or_else_the_body(self) -> None:
        for document, status in [
            (ACCEPT, 503), (changed(ACCEPT, "summary", "another"), 201),
            ({"a": 1}, 503), ({"b": 1}, 503), ({"a": 1}, 201), ({"id": "None"}, 503),
        ]:  # fmt: skip
            self.assertEqual(self.send("status=503&times=1", document).status, status, document)

    def test_any_status_can_be_chosen_for_all_attempts(self) -> None:
        plain = "http://{}:{}/inbox".format(*address(self.server))
        for status in (300, 301, 307, 400, 404, 418, 429, 451, 499, 500, 503, 599):
            with self.subTest(status):
                self.send(f"status={status}")
                answer = self.send(f"status={status}")
                self.assertEqual(answer.status, status)
                title = {404: "Not Found", 499: "Error"}.get(status, answer.json()["title"])
                self.assertEqual(answer.json()["title"], title)
                self.assertEqual(answer.headers["Location"], plain if status < 400 else None)
        self.assertEqual(self.stored(), [])

    def test_a_304_has_no_body_that_could_pass_for_the_next_answer(self) -> None:
        answers = raw(self.server, post_to("?status=304") + post_to(), "half-close")
        self.assertEqual([answer.status for answer in answers], [304, 201])
        self.assertNotIn("Content-Length", answers[0].headers)

    def test_an_answer_can_be_late(self) -> None:
        started = time.monotonic()
        self.assertEqual(self.send("delay=0.05&status=503&times=1").status, 503)
        self.assertGreaterEqual(time.monotonic() - started, 0.05)
        self.assertEqual(self.send("delay=0.01").status, 201)

    def test_each_is_logged_as_simulated_even_if_there_is_no_answer(self) -> None:
        with self.assertRaises(http.client.RemoteDisconnected):
            self.send("close=1&times=1")
        self.assertEqual(self.send("close=1&times=1").status, 201)
        lines = self.lines()
        self.assertEqual([(x["simulated"], x["status"]) for x in lines], [(True, 0), (False, 201)])
        self.assertEqual(json.loads(lines[0]["body"]), ACCEPT)
        self.assertEqual(lines[0]["target"], "/inbox?close=1&times=1")
        self.assertIn("a simulated failure", lines[0]["detail"])

    @with_settings(TOKEN="secret")
    def test_what_is_refused_anyway_is_refused_first(self) -> None:
        token = {"Authorization": "Bearer secret"}
        for document, headers, status in [
            (REFUSED, token, 400), (b"no", token, 400), (b"x" * 2_000_000, token, 413),
            (ACCEPT, {}, 401), (ACCEPT, token, 503),
        ]:  # fmt: skip
            answer = self.ask("POST", "/inbox?status=503&times=1", document, headers)
            self.assert_problem(answer, status)

    def test_a_bad_value_is_refused_with_what_is_expected(self) -> None:
        for query, expected in [
            ("status=200", "a status from 300 to 599"), ("status=x", "a status"),
            ("times=0&status=503", "a number from 1"), ("retry-after=soon", "an HTTP date"),
            ("delay=-1", "a number of seconds"), ("delay=99999", "at most 9999"),
            ("close=0", "expected 1"), ("close", "expected 1"), ("times=1", "needs a status"),
            ("status=503&bogus", "unknown parameter 'bogus'"),
            ("stauts=503", "status, times, retry-after, delay, close"),
        ]:  # fmt: skip
            with self.subTest(query):
                self.assertIn(expected, self.assert_problem(self.send(query), 400)["detail"])
        self.assertEqual(self.stored(), [])

    @constants(MAX_TRACKED=10)
    def test_the_count_of_attempts_has_bounds(self) -> None:
        documents = [changed(ACCEPT, "id", f"urn:x:{number}") for number in range(30)]
        for document in [*documents, documents[0]]:  # which is forgotten
            self.assertEqual(self.send("status=503&times=1", document).status, 503)
        self.assertEqual(self.send("status=503&times=1", documents[-1]).status, 201)

    @unittest.skipUnless(importlib.util.find_spec("coarnotify"), "coarnotify is not installed")
    def test_what_coarnotify_makes_of_each_is_what_the_readme_says(self) -> None:
        import coarnotify.client
        import coarnotify.patterns

        table = re.findall(r"^\| `\?(\S+)` \| (.*?) \|", README, re.MULTILINE)
        self.assertGreater(len(table), 5)
        for query, expected in table:
            # That the answer is late matters here, and not how much.
            url = f"{self.server.base}/inbox?{query.replace('delay=1', 'delay=0.1')}"
            client = coarnotify.client.COARNotifyClient(url)
            try:
                response = client.send(coarnotify.patterns.RequestReview(copy.deepcopy(OFFER)))
                observed = f"`{response.action}`"
            except Exception as error:
                observed = f"`{type(error).__name__}: {error}`"
            with self.subTest(query):
                self.assertTrue(observed.startswith(expected.rstrip("`…")), observed)


class CheckTest(ProgramTest):
    def write(self, name: str, document: Any) -> str:
        path = self.directory / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        return name

    def test_each_finding_has_a_line(self) -> None:
        name = self.write("refused.json", changed(REFUSED, "object.ietf:cite-as", PREPRINT["id"]))
        status, lines, _ = self.invoke("--check", name)
        self.assertEqual(status, 1)
        self.assertEqual(lines, [
            'refused.json: E /id id-absolute-uri id must be an absolute URI; write `"urn:uuid:…"`'
            " (refused by DSpace, Software Heritage)",
            "refused.json: E /origin origin-object origin must be an object; write"
            ' `{"id": "https://r.example.org/", "type": "Service", "inbox": "https://…"}`',
        ])  # fmt: skip
        for document, expected in [
            (b"{", "json it is not JSON: "), ([], "notification-object the notification must be"),
            (b"[" * 101 + b"]" * 101, "depth it is nested more than 100 levels deep"),
            (b" " * 1048577, "size it is larger than 1048576 bytes"),
        ]:  # fmt: skip
            # Not even an odd name breaks the line, on systems that have such names.
            odd = "two\nlines.json" if os.name == "posix" else "two lines.json"
            done = self.invoke("--check", self.write(odd, document))
            (line,) = done.output
            self.assertIn(f"lines.json: E - {expected}", line)
            self.assertNotIn("Traceback", done.errors)

    def test_a_clean_file_is_ok_and_the_summary_counts(self) -> None:
        names = [self.write("good.json", BODY.ljust(1048576)), self.write("bad.json", [])]
        names.append(self.write("warned.json", changed(ACCEPT, "actor.name", ABSENT)))
        status, lines, stderr = self.invoke("--check", *names)
        self.assertEqual((status, lines[0]), (1, "good.json: ok"))
        self.assertTrue(lines[2].endswith(" (refused by PCI, PREreview)"), lines[2])
        self.assertIn("coarinbox: 3 checked, 1 refused, 1 with warnings\n", stderr)
        done = self.invoke("--check", "-", stdin=json.dumps(ACCEPT))
        self.assertEqual((done.status, done.output), (0, ["-: ok"]))

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no device that is always full")
    def test_output_that_cannot_be_written_is_no_verdict(self) -> None:
        self.write("good.json", ACCEPT)
        for arguments in (["--check", "good.json"], ["--sample", "Accept"]):
            with open("/dev/full", "wb") as full:
                options: Any = {"stdout": full, "stderr": subprocess.PIPE, "cwd": self.directory}
                done = subprocess.run(self.command(*arguments), **options, text=True)
            self.assertEqual(done.returncode, 2)
            self.assertIn("coarinbox: standard output: No space left on device\n", done.stderr)
            self.assertNotIn("Traceback", done.stderr)
        for redirection, status in ((">&-", 0), ("<&-", 2)):
            shell = ["sh", "-c", f'exec "$0" "$@" {redirection}', *self.command("--check")]
            shell.append("good.json" if status == 0 else "-")
            done = subprocess.run(shell, cwd=self.directory, capture_output=True, text=True)
            self.assertEqual((done.returncode, "Traceback" in done.stderr), (status, False))

    def test_the_exit_status_tells_the_verdict(self) -> None:
        for name, document in {
            "good": ACCEPT, "bad": REFUSED, "broken": b"{", "scalar": 5,
            "warned": changed(ACCEPT, "@context", ABSENT),
            "nameless": changed(ACCEPT, "actor.name", ABSENT),
        }.items():  # fmt: skip
            self.write(name, document)
        not_there = what_the_system_says(os.stat, self.directory / "missing")
        for mode, names, expected, count in [
            (True, "good", 0, 1), (True, "bad", 1, 3), (True, "good bad", 1, 4),
            (True, "warned", 0, 1), (True, "broken", 1, 1), ("strict", "warned", 1, 1),
            (False, "bad", 0, 3), (False, "scalar", 1, 1), (False, "broken", 1, 1),
            ("pci", "nameless", 1, 1), ("dspace", "nameless", 0, 1), ("strict", "nameless", 0, 1),
            (True, "missing", 2, 0), (True, "bad missing good", 2, 4),
        ]:  # fmt: skip
            with self.subTest(names, mode=mode):
                done = self.invoke("--validate", str(mode), "--check", *names.split())
                self.assertEqual((done.status, len(done.output)), (expected, count), done)
                self.assertEqual(f"missing: {not_there}\n" in done.errors, expected == 2)

    def test_directories_are_searched_for_files(self) -> None:
        for name in ("a/2.jsonld", "a/1.json", "a/b/3.json", "a/notes.txt", "a/deliveries.jsonl"):
            self.write(name, [])
        for name in ("empty", "a/directory.json"):
            (self.directory / name).mkdir()
        special = ["/dev/zero"] if os.path.exists("/dev/zero") else []
        if hasattr(os, "mkfifo"):
            os.mkfifo(self.directory / "a/pipe.json")
            special.append("a/pipe.json")
        done = self.invoke("--check", "a", "--check", "a/1.json")
        self.assertEqual(done.status, 1)
        checked = [line.partition(":")[0] for line in done.output]
        found = [os.path.join("a", *name.split("/")) for name in ("1.json", "2.jsonld", "b/3.json")]
        self.assertEqual(checked, [*found, "a/1.json"])
        expected = {each: f"coarinbox: {each}: not a regular file" for each in special}
        for name, reason in {"empty": "0 checked, 0 refused", **expected}.items():
            done = self.invoke("--check", name)
            self.assertEqual((done.status, done.output), (2, []))
            self.assertIn(reason, done.errors)

    def test_a_program_may_call_it_and_take_the_output_even_as_ascii(self) -> None:
        name = str(self.directory / self.write("ö.json", []))
        for output in (io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="ascii")):
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
                self.assertEqual(coarinbox.main(["--check", name]), 1)
            output.seek(0)
            self.assertRegex(output.read(), r"(ö|\\xf6)\.json: E - notification-object")


# --- Sending -------------------------------------------------------------------------------------


class Received(NamedTuple):
    """A request that a receiver got."""

    line: str  # such as "POST /inbox"
    headers: http.client.HTTPMessage
    body: bytes


class Receiver(socketserver.ThreadingTCPServer):
    """A receiver that gives one answer, or one for each method and path.

    An answer is bytes, or a function that yields them.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self, answers: Any) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.read_body: Callable[[Any, int], bytes] = lambda stream, length: stream.read(length)
        self.reset(answers)

    def reset(self, answers: Any) -> None:
        self.answers = answers
        self.received: list[Received] = []

    @property
    def lines(self) -> list[str]:
        return [each.line for each in self.received]

    def finish_request(self, request: Any, client_address: Any) -> None:
        with contextlib.suppress(OSError), request.makefile("rb") as stream:  # who sends may leave
            line = stream.readline().decode().rpartition(" ")[0]
            headers = http.client.parse_headers(stream)
            body = self.read_body(stream, int(headers.get("Content-Length", 0)))
            self.received.append(Received(line, headers, body))
            one_for_each = isinstance(self.answers, dict)
            answer = self.answers.get(line, NOT_FOUND) if one_for_each else self.answers
            for data in [answer] if isinstance(answer, bytes) else answer():
                request.sendall(data)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # of TLS, when a sender does not like the certificate


@contextlib.contextmanager
def receiving(answers: Any, tls: tuple[str, str] | None = None) -> Iterator[Receiver]:
    """Run a receiver until the block ends."""
    with Receiver(answers) as receiver:
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
            receiver.url = receiver.url.replace("http:", "https:")
        thread = threading.Thread(target=receiver.serve_forever, args=(0.002,))
        thread.start()
        try:
            yield receiver
        finally:
            receiver.shutdown()
            thread.join()


class LateAnswer:
    """An answer that a receiver does not give before `due` is set."""

    def __init__(self) -> None:
        self.arrived, self.due = threading.Semaphore(0), threading.Event()

    def __call__(self) -> Iterator[bytes]:
        self.arrived.release()
        self.due.wait(10)
        yield CREATED

    def wait_for_request(self) -> None:
        assert self.arrived.acquire(timeout=10)


def http_answer(status: int, body: str = "", **headers: str) -> bytes:
    named = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = [f"HTTP/1.1 {status} Because", f"Content-Length: {len(body.encode())}", *named, "", ""]
    return "\r\n".join(head).encode() + body.encode()


CREATED = http_answer(201, Location="/inbox/1")
NOT_ALLOWED = http_answer(405)
NOT_FOUND = http_answer(404)


def endless(start: bytes, data: bytes, pause: float = 0) -> Callable[[], Iterator[bytes]]:
    """Make an answer without an end; after a head that says so, in chunks."""
    if b"chunked" in start:
        data = b"%x\r\n%b\r\n" % (len(data), data)

    def answer() -> Iterator[bytes]:
        yield start
        while True:
            yield data
            threading.Event().wait(pause)

    return answer


def free_port() -> int:
    """Return a port that is free, and that the system gives to nobody who asks for any."""
    while True:
        port = random.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


class SendingTest(unittest.TestCase):
    def setUp(self) -> None:
        super().setUp()
        context = receiving(CREATED)
        self.receiver = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def assert_fails(self, reason: str, url: str, document: Any = ACCEPT, **options: Any) -> str:
        """Expect that there is no answer, and that the text that says why is one line."""
        started = time.monotonic()
        with self.assertRaises(coarinbox.SendError) as caught:
            coarinbox.send(document, url, **options)
        self.assertLess(time.monotonic() - started, 5)
        text = str(caught.exception)
        self.assertRegex(text, reason)
        self.assertNotIn("\n", text)
        return text


class SendTest(SendingTest):
    def test_a_request_as_it_arrives(self) -> None:
        host = self.receiver.url.replace("127.0.0.1", "localhost")
        proxy = f"http://127.0.0.1:{free_port()}"  # those of the environment are ignored
        with unittest.mock.patch.dict(os.environ, http_proxy=proxy, HTTP_PROXY=proxy, no_proxy=""):
            answer = coarinbox.send({"a": "ö"}, f"{host}/ä/%C3%A4?q=ö%20b&c=[1]")
        request_ = self.receiver.received.pop()
        self.assertEqual(request_.line, "POST /%C3%A4/%C3%A4?q=%C3%B6%20b&c=[1]")
        self.assertEqual(json.loads(request_.body), {"a": "ö"})
        self.assertEqual(request_.headers.get_all("Host"), [host.partition("//")[2]])
        self.assertEqual(request_.headers.get_all("Content-Type"), [JSON_LD])
        self.assertIsNone(request_.headers["Authorization"])
        self.assertEqual(answer.location, f"{host}/inbox/1")

    def test_what_fails_is_named(self) -> None:
        here, not_http = f"{self.receiver.url}/inbox", "the answer is not HTTP"
        silent = "the receiver closed the connection without an answer"
        for answer, reason in [
            (b"", silent), (b"SSH-2.0-OpenSSH\r\n\r\n", f"{not_http}: SSH-2.0"),
            (b"HTTP/1.1 abc\r\n\r\n", not_http),
            (endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), f"{not_http}: .* headers"),
        ]:  # fmt: skip
            with self.subTest(reason):
                self.receiver.reset(answer)
                self.assert_fails(f"^{here}: {reason}", here)
        unknown, unusable = "the host is unknown", "the URL is unusable"
        for url, reason in [
            (f"http://127.0.0.1:{free_port()}/", "Connection refused"),
            (here.replace("http:", "https:"), "TLS failed"),
            ("http://a..b/", unknown), ("http://nowhere.invalid/", unknown),
            ("localhost:5005/inbox", f"{unusable}: expected http://HOST"),
            ("http://localhost:99999/", f"{unusable}: Port out of range"),
            ("ftp://localhost/inbox", unusable), ("file:///etc/passwd", unusable),
            ("/inbox", unusable), ("", unusable), ("http://", unusable), ("http://[::1/", unusable),
            ("http://localhost/a b", unusable), ("http://localhost/a\r\nX: y", unusable),
        ]:  # fmt: skip
            with self.subTest(url):
                self.assert_fails(f": {reason}", url)

    def test_secrets_in_a_url_or_a_token_that_is_unusable_are_neither_sent_nor_shown(self) -> None:
        url, texts = self.receiver.url, []
        for user in ("user:secret@", "secret@[", "secret@secret@"):
            texts.append(self.assert_fails("://…@", url.replace("//", f"//{user}")))
        for token in ("a\r\nX: secret", "a\nsecret", "secret\r", " secret", "", "secret\0"):
            texts.append(self.assert_fails("the token must be", url, token=token))
        self.assertNotIn("secret", "".join(texts))
        self.assertEqual(self.receiver.received, [])

    def test_a_token_is_dropped_when_the_origin_changes(self) -> None:
        with receiving(CREATED) as other:
            link = f"<{other.url}>; rel={LDP_INBOX}"
            self.receiver.reset({
                "POST /here": http_answer(307, Location="/there"),
                "POST /there": http_answer(308, Location=f"{other.url}/inbox"),
                "POST /page": NOT_ALLOWED, "GET /page": http_answer(200, Link=link),
            })  # fmt: skip
            for path in ("/here", "/page"):
                coarinbox.send(ACCEPT, self.receiver.url + path, token="abc")
                self.assertIsNone(other.received.pop().headers["Authorization"])
        expected = ["POST /here", "POST /there", "POST /page", "GET /page"]
        self.assertEqual(self.receiver.lines, expected)
        tokens = {each.headers["Authorization"] for each in self.receiver.received}
        self.assertEqual(tokens, {"Bearer abc"})

    def test_redirects_307_and_308_are_followed_with_the_body_and_others_are_not(self) -> None:
        new, created = f"{self.receiver.url}/new/inbox", f"{self.receiver.url}/inbox/1"
        for status in (300, 301, 302, 303, 304, 307, 308):
            moved = http_answer(status, Location="new/inbox")
            self.receiver.reset({"POST /old": moved, "POST /new/inbox": CREATED})
            answer = coarinbox.send(ACCEPT, f"{self.receiver.url}/old")
            bodies = [json.loads(each.body) for each in self.receiver.received]
            if status in (307, 308):
                self.assertEqual((answer.url, answer.location), (new, created))
                self.assertEqual((answer.status, bodies), (201, [ACCEPT] * 2))
            else:
                self.assertEqual((answer.location, answer.status, bodies), (new, status, [ACCEPT]))
        self.receiver.reset(http_answer(307))  # without Location
        self.assertEqual(coarinbox.send(ACCEPT, self.receiver.url).status, 307)
        moved_often = {f"POST /{n}": http_answer(307, Location=f"/{n + 1}") for n in range(5)}
        self.receiver.reset({**moved_often, "POST /5": CREATED})
        self.assertEqual(coarinbox.send(ACCEPT, f"{self.receiver.url}/0").status, 201)
        self.receiver.reset(http_answer(307, Location="/"))
        self.assert_fails("more than 5 redirects", self.receiver.url)
        self.assertEqual(len(self.receiver.received), 6)


LDP_INBOX = '"http://www.w3.org/ns/ldp#inbox"'

# Resources that advertise the inbox at /inbox: media type, body, Link header.
# fmt: off
ADVERTISING: dict[str, tuple[str, str, str]] = {
    "Link": ("text/plain", "", f"</inbox>; rel={LDP_INBOX}"),
    "Link, not quoted": ("", "", f"</inbox>;rel={LDP_INBOX[1:-1]}"),
    "Link, among others": (
        "text/html", '<link rel="ldp:inbox" href="/other">',
        f'<a,b>; rel="next"; title="x; y, z", </inbox> ; title="a" ; REL={LDP_INBOX}, <c>; rel=d'),
    "Link, several relations": ("", "", f'</inbox>; rel="me {LDP_INBOX[1:]}'),
    "JSON-LD": (JSON_LD, '{"inbox": "/inbox"}', ""),
    "JSON-LD, prefix": (JSON_LD, '{"ldp:inbox": {"@id": "/inbox"}}', ""),
    "JSON-LD, expanded": (JSON_LD, f'[{{{LDP_INBOX}: [{{"@id": "/inbox"}}]}}]', ""),
    "JSON-LD, graph": ("application/json", '{"@graph": [{}, {"inbox": {"id": "/inbox"}}]}', ""),
    "JSON-LD, of several": (
        JSON_LD, '[{"@id": "/x", "inbox": "/x/inbox"}, {"id": "/a/page", "inbox": "/inbox"}]', ""),
    "HTML link": ("text/html", f"<link REL={LDP_INBOX} href=/inbox>", ""),
    "HTML anchor": ("text/html; charset=utf-8", '<p>é<a rel="x ldp:inbox" href="/inbox">i</a>', ""),
    "RDFa": ("application/xhtml+xml", '<p property="ldp:inbox" resource="/inbox"/>', ""),
    "HTML base": ("text/html", '<base href="/"><link rel="ldp:inbox" href="inbox">', ""),
    "HTML, the first": (
        "text/html", '<a rel="ldp:inbox" href="/inbox"><a rel="ldp:inbox" href="/other">', ""),
}
SILENT: dict[str, tuple[str, str, str]] = {
    "nothing": ("", "", ""),
    "another relation": ("", "", '</inbox>; rel="ldp#inbox"; title=inbox'),
    "a bad Link": ("", "", f"inbox; rel={LDP_INBOX}, <inbox; rel={LDP_INBOX}"),
    "a comment": ("text/html", '<!-- <link rel="ldp:inbox" href="/inbox"> -->', ""),
    "a script": ("text/html", """<script>'<link rel="ldp:inbox" href="/inbox">'</script>""", ""),
    "no URL": ("text/html", '<link rel="ldp:inbox">', ""),
    "odd HTML": ("text/html", "<![odd[x]]><p>", ""),  # some Pythons raise an error
    "not JSON": (JSON_LD, "{", ""),
    "odd JSON": (JSON_LD, '[5, null, {"inbox": 5}, {"inbox": []}, {"inbox": {"@id": {}}}]', ""),
    "itself": ("", "", f"</a/page>; rel={LDP_INBOX}"),
}
# fmt: on


def resource(kind: str, body: str, link: str) -> bytes:
    headers = {"Content_Type": kind, "Link": link}
    return http_answer(200, body, **{name: value for name, value in headers.items() if value})


class DiscoveryTest(SendingTest):
    def send(self, page: bytes, refusal: bytes = NOT_ALLOWED, **more: bytes) -> coarinbox.Answer:
        """Send to a page, as if it were an inbox."""
        answers = {f"GET /a/{path}": answer for path, answer in {"page": page, **more}.items()}
        self.receiver.reset({"POST /inbox": CREATED, "POST /a/page": refusal, **answers})
        return coarinbox.send(ACCEPT, f"{self.receiver.url}/a/page")

    def test_a_resource_leads_to_its_inbox(self) -> None:
        for name, advertising in ADVERTISING.items():
            with self.subTest(name):
                answer = self.send(resource(*advertising))
                self.assertEqual((answer.status, answer.url), (201, f"{self.receiver.url}/inbox"))
                expected = ["POST /a/page", "GET /a/page", "POST /inbox"]
                self.assertEqual(self.receiver.lines, expected)
                self.assertEqual(json.loads(self.receiver.received[2].body), ACCEPT)

    def test_where_nothing_is_advertised_the_first_answer_counts(self) -> None:
        link = f"</inbox>; rel={LDP_INBOX}"
        pages = {name: resource(*silent) for name, silent in SILENT.items()}
        for name, page in {**pages, "404": http_answer(404, Link=link), "no HTTP": b"?"}.items():
            with self.subTest(name):
                answer = self.send(page, http_answer(405, '{"detail": "not here"}'))
                self.assertEqual((answer.status, answer.reasons()), (405, ["not here"]))
                self.assertEqual(self.receiver.lines, ["POST /a/page", "GET /a/page"])

    def test_only_answers_of_what_is_no_inbox_make_it_look_for_one(self) -> None:
        page = resource(*ADVERTISING["Link"])
        for status in (200, 202, 204, 400, 401, 409, 415, 422, 429, 500, 503):
            self.assertEqual(self.send(page, http_answer(status)).status, status)
            self.assertEqual(self.receiver.lines, ["POST /a/page"])
        for status in (403, 404, 405, 501):
            self.assertEqual(self.send(page, http_answer(status)).status, 201)

    def test_the_page_may_have_moved_but_its_inbox_must_be_usable(self) -> None:
        for status in (301, 302, 303, 307, 308):
            moved = http_answer(status, Location="new")
            self.assertEqual(self.send(moved, new=resource(*ADVERTISING["Link"])).status, 201)
        for inbox in ("http://[x", "mailto:inbox@example.org"):
            with self.assertRaisesRegex(coarinbox.SendError, "the URL is unusable"):
                self.send(http_answer(200, Link=f"<{inbox}>; rel={LDP_INBOX}"))


class DeadlineTest(SendingTest):
    """However a receiver is slow, the time for it is limited, and so is what is read of it."""

    LARGE = b"x" * 20_000_000  # more than fits into the buffers of a connection

    def test_an_answer_that_does_not_come_in_time(self) -> None:
        def redirect() -> Iterator[bytes]:
            threading.Event().wait(0.04)
            yield http_answer(307, Location="/")

        def read_slowly(stream: Any, length: int) -> bytes:
            while stream.read(100_000):
                threading.Event().wait(0.01)
            return b""

        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            self.assert_fails(f"^{url}: timed out$", url, timeout=0.05)
            self.assert_fails("timed out", url, self.LARGE, timeout=0.05)
            self.assert_fails("timed out", url.replace("http:", "https:"), timeout=0.05)
        dripping = endless(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.01)
        for answer, timeout, requests in ((dripping, 0.1, 1), (redirect, 0.1, 3), (CREATED, 0, 0)):
            self.receiver.reset(answer)
            self.assert_fails("timed out", self.receiver.url, timeout=timeout)
            self.assertLessEqual(len(self.receiver.received), requests)
        self.receiver.read_body = read_slowly
        self.assert_fails("timed out", self.receiver.url, self.LARGE * 4, timeout=0.1)

    def test_the_status_counts_even_if_the_body_never_ends_or_drips(self) -> None:
        for headers in (b"", b"Content-Length: 99999999\r\n", b"Transfer-Encoding: chunked\r\n"):
            head = b"HTTP/1.1 201 Created\r\n" + headers + b"\r\n"
            self.receiver.reset(endless(head, b"x" * 1000))
            answer = coarinbox.send(ACCEPT, self.receiver.url)
            self.assertEqual((answer.status, {*answer.body}), (201, {ord("x")}))
            self.assertTrue(60_000 <= len(answer.body) <= 65_535, len(answer.body))
        self.receiver.reset(endless(head, b"x", 0.01))
        self.assertEqual(coarinbox.send(ACCEPT, self.receiver.url, timeout=0.4).status, 201)
        self.receiver.reset(endless(b"HTTP/1.1 201 Created\r\nX: ", b"x" * 1000))
        coarinbox.send(ACCEPT, self.receiver.url)  # a header without an end
        self.receiver.reset(endless(http_answer(201, "whole"), b"", 10))
        self.assertEqual(coarinbox.send(ACCEPT, self.receiver.url).body, b"whole")

    @unittest.skipUnless(sys.platform == "linux", "elsewhere a reset may overtake the answer")
    def test_a_receiver_that_answers_and_resets_the_connection(self) -> None:
        self.receiver.reset(http_answer(413))
        self.receiver.read_body = lambda stream, length: b""
        self.assertEqual(coarinbox.send(self.LARGE, self.receiver.url).status, 413)


class ReplyRulesTest(SendingTest):
    """Where a reply to an Offer may go, that it goes nowhere else, and when it is tried again."""

    def test_the_address_is_that_of_the_client(self) -> None:
        for client, allowed, others in [
            ("192.0.2.1", "192.0.2.1 ::ffff:192.0.2.1", "192.0.2.2"),
            ("127.0.0.1", "::1 127.0.0.1", "127.0.0.2 0.0.0.0 :: ::ffff:192.0.2.1"),
            ("::1", "::1 127.0.0.1 ::ffff:127.0.0.1", "::2"),
            ("::ffff:127.0.0.1", "127.0.0.1", "::ffff:127.0.0.2"),
            ("2001:db8::1", "2001:db8:0::1", "2001:db8::2"), ("fe80::1%eth1", "", "fe80::1%eth0"),
        ]:  # fmt: skip
            with self.subTest(client):
                addresses = [*others.split(), *allowed.split()]
                selected = coarinbox.addresses_of_client(addresses, client)
                self.assertEqual(selected, allowed.split())

    def test_all_addresses_are_tried_and_the_host_is_not_looked_up_again(self) -> None:
        host = f"reviews.example.net:{self.receiver.server_address[1]}"
        for addresses in (["127.0.0.1"], ["::1", "127.0.0.1"], ["127.0.0.1", "::1"]):
            answer = coarinbox.post(ACCEPT, f"http://{host}/inbox", addresses)
            self.assertEqual(answer.status, 201)
            self.assertEqual(self.receiver.received.pop().headers["Host"], host)
        with self.assertRaises(coarinbox.SendError):
            coarinbox.post(ACCEPT, f"http://127.0.0.1:{free_port()}/", ["::1", "127.0.0.1"])

    def test_redirects_and_pages_lead_nowhere(self) -> None:
        link = f"</inbox>; rel={LDP_INBOX}"
        for status in (307, 308, 404, 405):
            self.receiver.reset(http_answer(status, Location="/inbox", Link=link))
            answer = coarinbox.post(ACCEPT, f"{self.receiver.url}/page", ["127.0.0.1"])
            self.assertEqual((answer.status, self.receiver.lines), (status, ["POST /page"]))

    def test_how_long_to_wait_before_the_next_try(self) -> None:
        early, late = "Thu, 01 Jan 2026 00:00:04 GMT", "Thu, 01 Jan 2026 00:00:09 GMT"
        for tries, status, after, date, delay in [
            (1, None, "", "", 2), (2, None, "", "", 4), (3, None, "", "", None),
            (1, 500, "", "", 2), (2, 503, "", "", 4), (3, 503, "", "", None), (1, 429, "", "", 2),
            (1, 201, "1", "", None), (1, 307, "", "", None), (1, 400, "", "", None),
            (1, 429, "7", "", 7), (2, 503, "0", "", 0), (1, 429, "3600", "", 60),
            (3, 429, "7", "", None), (1, 429, late, early, 5), (1, 429, early, late, 0),
            (1, 429, late, "", 2), (1, 429, late, "yesterday", 2), (1, 429, "soon", "", 2),
            (1, 429, "9" * 99, "", 2),
        ]:  # fmt: skip
            with self.subTest(tries=tries, status=status, after=after, date=date):
                headers = {"Retry-After": after, "Date": date}
                self.assertEqual(coarinbox.retry_delay(tries, status, headers), delay)


class ConverseTest(ProgramTest):
    """`--sample` and `--send`."""

    def setUp(self) -> None:
        super().setUp()
        self.write("good.json", ACCEPT)
        self.write("bad.json", altered("Accept", origin=ABSENT))

    def write(self, name: str, document: Any) -> None:
        (self.directory / name).write_text(json.dumps(document))

    def test_a_sample_is_printed_or_sent_and_then_addressed_to_the_inbox(self) -> None:
        done = self.invoke("--sample", "request review")
        self.assertEqual((done.status, done.errors), (0, ""))
        self.assertIn('  "type": [', done.output)
        document = json.loads("\n".join(done.output))
        self.assertEqual(coarinbox.pattern_of(document), coarinbox.find_pattern("Request Review"))
        with coarinbox.running(VALIDATE_INCOMING="strict") as inbox:
            status, (line,), _ = self.invoke("--send", inbox.url, "--sample", "ACCEPT")
            self.assertEqual(status, 0)
            self.assertTrue(line.startswith("--sample ACCEPT: 201 Created"), line)
            (delivery,) = inbox.deliveries
            self.assertEqual((delivery.findings, delivery.pattern), ([], "Accept"))
            self.assertEqual(delivery.notification["target"]["inbox"], inbox.url)
        for more in ([], ["--send", "http://127.0.0.1:9/"]):
            line = self.fail_to_start("--sample", "Request Revue", *more)
            self.assertIn("did you mean Request Review?", line)

    def test_files_are_sent_and_what_is_wrong_with_them_is_shown(self) -> None:
        with coarinbox.running() as inbox:
            good, files = addressed(ACCEPT, inbox.url), ("good.json", "-", "bad.json")
            self.write("good.json", good)
            stdin = json.dumps(addressed(OFFER, inbox.url))
            status, lines, _ = self.invoke("--send", inbox.url, *files, stdin=stdin)
            self.assertEqual(status, 1)
            for line, name in zip(lines, ("good.json", "-")):
                self.assertTrue(line.startswith(f"{name}: 201 Created {inbox.url}/"), line)
            self.assertEqual(lines[2], "bad.json: 400 Bad Request")
            self.assertTrue(lines[4].startswith("  E /origin origin is missing"), lines)
            self.assertEqual(inbox.notifications, [good, json.loads(stdin)])
            self.assertEqual(self.invoke("--send", inbox.url, "good.json").status, 0)

    def test_what_a_receiver_says_cannot_forge_lines(self) -> None:
        odd = {"message": "one\ntwo: \x1b[31m" + "x" * 1000, "errors": [5, {}], "warnings": 5}
        with receiving(http_answer(400, json.dumps(odd), Location="/\x1b[31m")) as receiver:
            status, lines, _ = self.invoke("--send", receiver.url, "good.json")
        self.assertEqual((status, len(lines)), (1, 4), lines)
        self.assertTrue(all(line.isprintable() and len(line) < 400 for line in lines), lines)

    def test_what_is_no_inbox_has_not_accepted_it(self) -> None:
        """A page may ignore what is sent to it."""
        for status, expected in [
            (200, "200 OK\n  an inbox that accepts a notification answers 201 or 202"),
            (405, "405 Method Not Allowed\n  this is no inbox, and no page there advertises one"),
            (202, "202 Accepted"),
        ]:
            with receiving(http_answer(status)) as receiver:
                done = self.invoke("--send", receiver.url, "good.json")
            self.assertEqual(done.status, int(status != 202))
            self.assertEqual("\n".join(done.output), f"good.json: {expected}")

    def test_what_cannot_be_read_or_reached(self) -> None:
        with coarinbox.running() as inbox:
            self.write("good.json", addressed(ACCEPT, inbox.url))
            status, lines, errors = self.invoke("--send", inbox.url, "none.json", ".", "good.json")
        self.assertEqual((status, len(lines)), (2, 1))
        not_there = what_the_system_says(os.stat, self.directory / "none.json")
        self.assertIn(f"coarinbox: none.json: {not_there}\n", errors)
        self.assertIn("coarinbox: .: ", errors)
        port = free_port()
        url = f"http://127.0.0.1:{port}/inbox"
        refused = what_the_system_says(socket.create_connection, ("127.0.0.1", port))
        done = self.invoke("--send", url, "good.json")
        self.assertEqual(done, (2, [], f"coarinbox: good.json: {url}: {refused}\n"))

    def test_a_token_is_sent_and_never_shown(self) -> None:
        with coarinbox.running(TOKEN="sécret") as inbox:
            for token, expected in [("sécret", 0), ("sécret\n", 2), ("sécret2", 1)]:
                done = self.invoke("--send", inbox.url, "--token", token, "good.json")
                self.assertEqual(done.status, expected, done)
                self.assertNotIn("sécret", done.errors + "".join(done.output))

    def test_arguments_that_make_no_sense(self) -> None:
        for arguments in (
            ["good.json"], ["--token", "x"], ["--send", "http://127.0.0.1:9/"], ["--sample"],
            ["--sample", "Accept", "good.json"], ["--send"],
        ):  # fmt: skip
            status, lines, errors = self.invoke(*arguments)
            self.assertEqual((status, lines), (2, []), arguments)
            self.assertIn("coarinbox: error: ", errors)


# --- What the delivery tells ---------------------------------------------------------------------


class ArrivedTest(InboxTest):
    """What an inbox finds wrong with a delivery, though the document does not show it."""

    def setUp(self) -> None:
        super().setUp()
        self.here = "http://{}:{}/inbox".format(*address(self.server))

    def offer(self, inbox: str = "") -> Any:
        return addressed({**OFFER, "id": uuid.uuid4().urn}, inbox or self.here)

    def findings(self, document: Any, content_type: str = JSON_LD) -> list[Any]:
        """Send a notification; returns the warnings of the answer."""
        answer = self.post(document, Content_Type=content_type)
        self.assertEqual(answer.status, 201, answer)
        warnings: list[Any] = answer.json()["warnings"]
        return warnings

    def test_the_url_that_was_posted_to(self) -> None:
        public, local = "https://inbox.example.org", self.server.local  # localhost, with the port
        with serving(BASE_URL=f"{public}/") as proxied:
            for server, inbox, path, host, is_elsewhere in [
                (self.server, self.here, "/inbox?status=503&times=9", "", False),
                (self.server, f"{self.here}/", "/inbox/", "", False),
                (self.server, f"{self.here}/", "/inbox", "", True),
                (self.server, f"{local}/inbox", "/inbox", "inbox.localhost", False),  # as given out
                (self.server, self.here, "/inbox", "inbox.localhost", True),
                (proxied, f"{public}:443/inbox", "/inbox", "", False),
                (proxied, f"{proxied.local}/inbox", "/inbox", "", True),
                (proxied, "http://{}:{}/inbox".format(*address(proxied)), "/inbox", "", False),
            ]:
                with self.subTest(inbox, path=path, host=host):
                    ask(server, "POST", path, self.offer(inbox), {"Host": host} if host else {})
                    (delivery,) = ask(server, "GET", "/deliveries?limit=1").json()["deliveries"]
                    found = [each["code"] for each in delivery["findings"]]
                    self.assertEqual(found, ["target.inbox-elsewhere"] * is_elsewhere)

    def test_an_id_counts_as_repeated_while_it_is_stored(self) -> None:
        first, other = self.offer(), self.offer()
        self.assertEqual(self.post(changed(first, "origin", ABSENT)).status, 400)
        self.assertEqual(self.ask("POST", "/inbox?status=503&times=1", first).status, 503)
        self.assertEqual(self.findings(first) + self.findings(other), [])
        name = self.ask("GET", "/deliveries?status=201").json()["deliveries"][1]["name"]
        (found,) = self.findings({**other, "id": first["id"]})  # with another body
        self.assertEqual((found["code"], found["pointer"]), ("id-repeated", "/id"))
        self.assertEqual(found["refused_by"], ["PCI", "Software Heritage"])
        self.assertIn(f"was delivered before, as {name}", found["message"])
        for name in self.stored():
            self.ask("DELETE", f"/inbox/{name}")
        self.assertEqual(self.findings(first), [])
        self.ask("DELETE", "/inbox")
        self.assertEqual(self.findings(first), [])

    def test_ids_are_known_after_a_restart(self) -> None:
        """They are read from the log in the background: a while may pass until then."""
        offers = [{**OFFER, "id": f"urn:x:\u00fc{number}"} for number in range(3)]
        store = self.server.store.directory
        with coarinbox.running(STORE_DIR=store) as inbox, receiving(CREATED) as receiver:
            locations = [send(inbox.url, each).headers["Location"] for each in offers]
            inbox.send(offers[1], receiver.url)
            self.assertEqual(ask(inbox.server, "DELETE", path_of(locations[2])).status, 204)
        with coarinbox.running(STORE_DIR=store) as inbox:
            self.wait_until(lambda: b"4 of 4" in ask(inbox.server, "GET", "/", headers=HTML).body)
            answers = [send(inbox.url, offer).body.decode() for offer in offers[1:]]
            self.assertIn(f"before, as {last_part(locations[1])}", answers[0])
            self.assertNotIn("id-repeated", answers[1])

    @constants(MAX_IDS=2)
    def test_only_the_latest_ids_are_known(self) -> None:
        """Otherwise the memory of an inbox would grow with each notification."""
        self.findings(self.offer())
        self.wait_until(lambda: not self.server.tasks)  # it has looked around
        first, second, third = offers = [self.offer() for _ in range(3)]
        for offer in [*offers, first]:
            self.assertEqual(self.findings(offer), [])
        self.assertEqual(self.findings(third)[0]["code"], "id-repeated")
        self.assertEqual(self.findings(second), [])  # which makes it forget the first one
        with beside(self.server) as again:
            post = functools.partial(ask, again, "POST", "/inbox")
            self.wait_until(lambda: b"id-repeated" in post(third).body)
            self.assertNotIn(b"id-repeated", post(first).body)

    def test_errors_come_before_warnings(self) -> None:
        problem = self.assert_problem(self.post(REFUSED), 400)
        self.assertEqual(list(problem)[-2:], ["errors", "warnings"])
        levels = [{each["level"] for each in problem[name]} for name in ("errors", "warnings")]
        self.assertEqual(levels, [{E}, {S}])

    def test_each_answer_of_the_inbox_names_its_constraints(self) -> None:
        link = '</constraints>; rel="http://www.w3.org/ns/ldp#constrainedBy"'
        for method, body in [
            ("GET", None), ("HEAD", None), ("OPTIONS", None), ("DELETE", None), ("PUT", ACCEPT),
            ("POST", ACCEPT), ("POST", REFUSED), ("POST", b"no"),
        ]:  # fmt: skip
            links = self.ask(method, "/inbox", body).headers.get_all("Link", [])
            self.assertEqual([re.sub("<http://[^/]*", "<", each) for each in links], [link])
        page = self.ask("GET", "/inbox", headers=HTML)
        self.assertRegex(", ".join(page.headers.get_all("Link", [])), "#(inbox.*#c|c.*#inbox)")


class ReceiverModeTest(unittest.TestCase):
    """An inbox that plays a receiver."""

    def test_it_refuses_what_the_receiver_refuses(self) -> None:
        for mode, kind, status, code in [
            ("DSpace", "application/json", 415, "content-type"),
            ("DSpace", f"{JSON_LD};profile=x", 201, ""),
            ("eprints", f"{JSON_LD};profile=x", 415, "content-type-exact"),
            ("software heritage", JSON_LD, 400, "target.inbox-elsewhere"),
        ]:  # fmt: skip
            with self.subTest(mode, kind=kind), serving(VALIDATE_INCOMING=mode) as server:
                answer = ask(server, "POST", "/inbox", OFFER, {"Content-Type": kind})
                found = [each["code"] for each in answer.json().get("errors", [])]
                self.assertEqual((answer.status, found), (status, [code] if code else []))
                self.assertEqual("Accept-Post" in answer.headers, status == 415)


# --- The other half ------------------------------------------------------------------------------


def last_part(url: str) -> str:
    """Return the name that a URL ends with."""
    return url.rpartition("/")[2]


def offer_between(partner: str, inbox: str) -> Any:
    """Make an Offer from one inbox to another; its sender wants replies at `partner`."""
    ends = {"origin": {**REPOSITORY, "inbox": partner}, "target": {**JOURNAL, "inbox": inbox}}
    return coarinbox.sample("Request Review", **ends)


def replying(*patterns: str, **settings: Any) -> Any:
    """Run an inbox that answers Offers with these patterns, at once."""
    return coarinbox.running(**{"REPLIES": patterns, "REPLY_DELAY": 0, **settings})


def sent_by(inbox: coarinbox.Inbox, count: int) -> list[coarinbox.Delivery]:
    """Wait until an inbox has made so many attempts to send something; returns them."""
    sent: list[coarinbox.Delivery] = []

    def is_last(delivery: coarinbox.Delivery) -> bool:
        sent.append(delivery)
        return len(sent) == count

    inbox.wait_for(is_last, direction="out", status="")
    return sent


def has_ipv6() -> bool:
    with contextlib.suppress(OSError):
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        return True
    return False


def other_address() -> str:
    """Return an address of this machine that is not loopback, if there is one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))  # which sends nothing
        host = str(sock.getsockname()[0])
        return "" if host.startswith("127.") else host
    return ""


NEEDS_IPV6 = unittest.skipUnless(has_ipv6(), "there is no IPv6")


class SamplesTest(InboxTest):
    settings = {"VALIDATE_INCOMING": "strict"}

    def test_each_pattern_has_one_that_is_clean_where_the_client_sees_the_inbox(self) -> None:
        host = {"Host": "a.localhost:8"}
        listed = self.ask("GET", "/samples", None, host).json()["samples"]
        self.assertEqual(list(listed), list(coarinbox.RULES))
        for name, url in listed.items():
            answer = self.ask("GET", path_of(url), None, host)
            self.assertEqual(answer.headers["Content-Type"], JSON_LD)
            self.assertEqual(answer.json()["target"]["inbox"], "http://a.localhost:8/inbox")
            receipt = self.post(answer.json(), **host).json()
            self.assertEqual((receipt["pattern"], receipt["warnings"]), (name, []))

    def test_names_in_any_case_and_a_list_for_others(self) -> None:
        for name in ("request%20review", "REQUEST%20Review"):
            self.assertEqual(self.ask("GET", f"/samples/{name}").json()["type"], OFFER["type"])
        for name in ("request+review", "Request", "x%2Fy", "%ff", "%00"):
            problem = self.assert_problem(self.ask("GET", f"/samples/{name}"), 404)
            self.assertIn(", ".join(coarinbox.RULES), problem["detail"])
        self.assert_problem(self.ask("GET", "/samples/Accept?x=1"), 400)


class AutoReplyTest(SendingTest):
    """REPLIES: an inbox that answers each Offer. Here, replies go to `receiver`."""

    def offer_to(self, inbox: coarinbox.Inbox) -> Any:
        return offer_between(self.receiver.url, inbox.url)

    def test_a_whole_conversation(self) -> None:
        replies = ["tentatively accept", "ACCEPT", "Announce Review"]
        strict = {"VALIDATE_INCOMING": "strict"}
        service = replying(*replies, REPLY_DELAY=0.05, **strict)
        with coarinbox.running(**strict) as repository, service as reviews:
            offer = offer_between(repository.url, reviews.url)
            repository.send(offer, reviews.url)
            repository.wait_for(pattern="Announce Review", in_reply_to=offer["id"])
            reviews.wait_for(pattern="Announce Review", direction="out")
            for inbox, directions in ((repository, "out in in in"), (reviews, "in out out out")):
                patterns = ["Request Review", *map(str.title, replies)]
                seen = [(e.pattern, e.direction, e.status, e.findings) for e in inbox.deliveries]
                rows: list[Any] = [(*row, 201, []) for row in zip(patterns, directions.split())]
                self.assertEqual(seen, rows)
            to = {(each.via, each.target) for each in reviews.deliveries[1:]}
            self.assertEqual(to, {("REPLIES", repository.url)})
            times = [datetime.datetime.fromisoformat(e.time[:-1]) for e in reviews.deliveries]
            for earlier, later in zip(times, times[1:]):  # to the millisecond
                self.assertGreaterEqual((later - earlier).total_seconds(), 0.049)

    def test_the_page_of_the_offer_says_why_a_reply_was_not_sent(self) -> None:
        nobody = ("127.0.0.1", free_port())
        near = what_the_system_says(socket.create_connection, nobody)
        far = "its host is not [^,]*, which delivered the Offer"
        for partner, chip, why in [
            ("http://192.0.2.1/", "↗ not sent", far),
            ("http://{}:{}/".format(*nobody), "↗ no answer", re.escape(near)),
        ]:
            with self.subTest(partner), constants(retry_delay=lambda *_: None):
                with replying("Accept") as inbox:
                    offer = offer_between(partner, inbox.url)
                    page_of_offer = send(inbox.url, offer).headers["Location"]
                    (out,) = sent_by(inbox, 1)
                    page = Page(fetch(page_of_offer, headers=HTML).body.decode())
                    timeline = page.one("section", id="conversation").text
                    self.assertRegex(timeline, f"{chip} Accept .* {why}")
                    url = f"{inbox.server.base}/deliveries/{out.name}"
                    page = Page(fetch(url, headers=HTML).body.decode())
                self.assertRegex(page.text, why)
                self.assertEqual("Nothing was sent." in page.text, chip == "↗ not sent")
                self.assertEqual("What we sent" in page.text, chip != "↗ not sent")

    def test_any_offer_that_was_accepted_is_answered(self) -> None:
        with coarinbox.running() as partner:
            with replying("Accept", VALIDATE_INCOMING=False) as inbox:
                offer = {**offer_between(partner.url, inbox.url), "type": "Offer"}
                coarinbox.send(offer, inbox.url)
                partner.wait_for(in_reply_to=offer["id"], status="")

    def test_where_replies_may_go(self) -> None:
        here, port = self.receiver.url, self.receiver.server_address[1]
        public, reply_to = {"BASE_URL": "http://a.example/"}, {"REPLY_TO": here}
        tunnel = {"X-Forwarded-For": "203.0.113.9"}
        other, nowhere = "its host is not 127.0.0.1, which delivered", "no usable origin.inbox"
        table: list[tuple[dict[str, Any], Any, dict[str, str], str]] = [
            ({}, here, {}, ""), ({}, f"http://localhost:{port}/", {}, ""),
            (reply_to, ABSENT, {}, ""), ({**public, **reply_to}, "http://192.0.2.1/", tunnel, ""),
            ({}, "http://192.0.2.1/", {}, other), ({}, f"http://0.0.0.0:{port}/", {}, other),
            ({}, ABSENT, {}, nowhere), ({}, "mailto:a@b.example", {}, nowhere),
            ({}, "http://127.0.0.1@192.0.2.1/", {}, "a user name or a password"),
            ({}, "http://nowhere.invalid/", {}, "the host is unknown"),
            (public, here, {}, "behind a proxy"), ({}, here, tunnel, "behind a proxy"),
            ({}, here, {"forwarded": "for=127.0.0.1"}, "behind a proxy"),
            ({}, here, {"X-Pad": "x" * 17_000, **tunnel}, "behind a proxy"),
        ]  # fmt: skip
        for settings, origin, headers, reason in table:
            with self.subTest(origin, **settings), replying("Accept", **settings) as inbox:
                offer = changed(offer_between("", inbox.url), "origin.inbox", origin)
                answer = ask(inbox.server, "POST", "/inbox", offer, headers)
                (out,) = sent_by(inbox, 1)
                self.assertIn(reason, out.detail)
                received = [json.loads(each.body) for each in self.receiver.received]
                self.assertEqual((out.status, len(received)), (0, 0) if reason else (201, 1))
                page = ask(inbox.server, "GET", path_of(answer.json()["location"]), None, HTML).body
                self.assertIn(out.name, page.decode())  # as part of the conversation
                for reply in received:
                    self.assertEqual(reply["object"], changed(offer, "@context", ABSENT))
                    self.assertEqual(reply["target"]["inbox"], out.target)
                self.receiver.received.clear()

    def test_each_offer_that_was_accepted_is_answered_and_nothing_else(self) -> None:
        with replying("Accept", RESPONSE_STATUS=202) as inbox:
            offer = self.offer_to(inbox)
            others = [changed(offer, "actor.type", "Robot"), coarinbox.reply(offer)]
            for document in [*others, coarinbox.sample("Announce Review", in_reply_to=offer)]:
                send(inbox.url, document)
            statuses = [send(f"{inbox.url}?status=503&times=1", offer).status for _ in range(3)]
            self.assertEqual(statuses, [503, 202, 202])
            replied = [each.about["inReplyTo"] for each in sent_by(inbox, 2)]
            self.assertEqual((replied, len(self.receiver.received)), ([offer["id"]] * 2, 2))

    def test_why_an_offer_cannot_be_answered_is_said(self) -> None:
        lax = {"VALIDATE_INCOMING": False, "REPLY_TO": self.receiver.url}
        with replying("Accept", **lax) as inbox:
            with self.assertLogs("coarinbox", logging.ERROR), NO_THREAD:
                send(inbox.url, OFFER)
                sent_by(inbox, 1)
            send(inbox.url, altered("Request Review", id=ABSENT))
            for out, reason in zip(sent_by(inbox, 2), ("no thread", "its id is not an absolute")):
                self.assertIn(reason, out.detail)
        self.assertEqual(self.receiver.received, [])

    def test_failures_are_tried_again_and_then_given_up(self) -> None:
        """Each reply waits until the one before was delivered or given up."""
        original = coarinbox.retry_delay

        def without_waiting(*arguments: Any) -> float | None:
            return None if original(*arguments) is None else 0

        for query, statuses in [
            ("?status=503&times=2", [503, 503, 201]), ("?close=1", [0, 0, 0]),
            ("?status=400", [400]),
        ]:  # fmt: skip
            with self.subTest(query), constants(retry_delay=without_waiting):
                with coarinbox.running() as partner, replying("Accept", "Reject") as inbox:
                    send(inbox.url, offer_between(partner.url + query, inbox.url))
                    attempts = sent_by(inbox, 2 * len(statuses))
                seen = [(each.pattern, each.status) for each in attempts]
                self.assertEqual(seen, [*itertools.product(("Accept", "Reject"), statuses)])
                self.assertEqual(
                    [not each.detail for each in attempts], [s == 201 for _, s in seen]
                )
                self.assertEqual(len({each.about["id"] for each in attempts}), 2)

    def test_nothing_goes_on_for_ever(self) -> None:
        """Two inboxes that reply to each other come to an end, and so does one by itself."""
        patterns = "Accept", "Reject"
        with replying(*patterns) as first, replying(*patterns) as second:
            for partner in (second, first) * 2:  # another time shows that both have ended
                offer = offer_between(partner.url, first.url)
                send(first.url, offer)
                partner.wait_for(pattern="Reject", in_reply_to=offer["id"])
            self.assertEqual(len(sent_by(first, 8)), 8)
            first.assert_none(pattern="Request Review", direction="out")
            second.assert_none(direction="out")

    def test_undo_offer_stops_what_is_still_to_come_for_this_offer(self) -> None:
        late = LateAnswer()
        self.receiver.reset(late)
        with replying("Accept", "Reject") as inbox:
            undone, other = (self.offer_to(inbox) for _ in range(2))
            for offer in (undone, other):
                send(inbox.url, offer)
                late.wait_for_request()
            send(inbox.url, coarinbox.reply(undone, "Undo Offer"))
            late.due.set()
            sent = sorted((each.about["inReplyTo"], each.pattern) for each in sent_by(inbox, 3))
        # What was on its way is logged.
        expected = [(undone["id"], "Accept"), (other["id"], "Accept"), (other["id"], "Reject")]
        self.assertEqual((sent, len(self.receiver.received)), (sorted(expected), 3))

    def test_a_bug_surfaces_and_ends_the_replies_to_its_offer(self) -> None:
        with self.assertLogs("coarinbox") as logged, self.assertRaises(RuntimeError) as caught:
            with constants(retry_delay=None), replying("Accept", "Reject") as inbox:
                send(inbox.url, self.offer_to(inbox))
                self.assertEqual(sent_by(inbox, 1)[0].pattern, "Accept")
        self.assertIsInstance(caught.exception.__cause__, TypeError)
        self.assertNotIn("dropped", "".join(logged.output))  # nothing was to come

    def test_the_inbox_forgets_what_is_still_to_come(self) -> None:
        with replying("Accept", REPLY_DELAY=0.02) as inbox:
            send(inbox.url, self.offer_to(inbox))
            inbox.clear()
            other = self.offer_to(inbox)
            send(inbox.url, other)
            (out,) = sent_by(inbox, 1)
        self.assertEqual((out.about["inReplyTo"], len(self.receiver.received)), (other["id"], 1))

    def test_the_end_of_the_inbox_drops_what_is_still_to_come_and_says_so(self) -> None:
        with self.assertLogs("coarinbox", logging.INFO) as logged:
            with replying("Accept", REPLY_DELAY=600) as inbox:
                send(inbox.url, self.offer_to(inbox))
        self.assertIn("the inbox stops; replies still waiting are dropped", "".join(logged.output))


class SendAgainTest(SendingTest, DeliveriesTest):
    """POST /deliveries/NAME/send, and what it leaves in the log."""

    def setUp(self) -> None:
        super().setUp()
        self.url = f"{self.receiver.url}/inbox"
        self.name = last_part(self.post(OFFER).headers["Location"])

    def send(self, wanted: Any, name: str = "", server: Any = None, **headers: str) -> Answer:
        """Ask for something to be sent; a text is a form."""
        is_form = isinstance(wanted, str)
        kind = "application/x-www-form-urlencoded" if is_form else "application/json"
        body = wanted.encode() if is_form else wanted
        path = f"/deliveries/{name or self.name}/send"
        return ask(server or self.server, "POST", path, body, {"Content-Type": kind, **headers})

    def test_what_is_sent(self) -> None:
        reply = addressed(coarinbox.reply(OFFER, "Reject"), self.url)
        table: list[tuple[dict[str, Any], str, Any]] = [
            ({}, "", OFFER), ({"pattern": "reject"}, "&pattern=reject", reply),
            ({"document": {"a": "ü"}}, "&document=%7B%22a%22:%22%C3%BC%22%7D", {"a": "ü"}),
        ]  # fmt: skip
        for more, form, expected in table:
            for wanted in ({"to": self.url, **more}, f"to={self.url}{form}"):
                with self.subTest(wanted):
                    answer = self.send(wanted)
                    (out,) = self.deliveries("?direction=out&limit=1")
                    if isinstance(wanted, str):
                        self.assertEqual((answer.status, answer.body), (303, b""))
                    else:
                        self.assertEqual((answer.status, answer.json()), (201, out))
                    path = path_of(answer.headers["Location"])
                    self.assertEqual(self.ask("GET", path).json(), out)
                    self.assertEqual((out["target"], out["status"]), (self.url, 201))
                    request_ = self.receiver.received.pop()
                    self.assertEqual(request_.headers["Content-Type"], JSON_LD)
                    new_id = {"id": out["about"].get("id")} if "pattern" in more else {}
                    self.assertEqual(json.loads(request_.body), {**expected, **new_id})
        self.assertEqual(self.names("?direction=in"), [self.name])

    def test_what_cannot_be_sent(self) -> None:
        accept = last_part(self.post(ACCEPT).headers["Location"])
        self.post(b"no JSON")
        broken, to = self.names()[0], {"to": self.url}
        missing = self.name[:-1] + ("0" if self.name[-1] != "0" else "1")
        with_secret = {"to": self.url.replace("//", "//user:secret@")}
        large = {**to, "document": "x" * 1_100_000}
        table: list[tuple[int, str, list[Any]]] = [
            (400, "", [{}, [], b"", b"{", b"\xff", "", "to=", "to=%ff", with_secret]),
            (400, "", [{"to": url} for url in (None, [self.url], "/inbox", "file:///etc/passwd")]),
            (400, "", [{**to, "two": 2}, {**to, "pattern": 5}]),
            (404, missing, [to]), (404, "x", [to]), (413, "", [large]),
            (409, accept, [{**to, "pattern": "Accept"}]),
            (409, broken, [{**to, "pattern": "Accept"}]),
            (409, "", [{**to, "pattern": "Request Review"}, f"to={self.url}&pattern=Undo"]),
        ]  # fmt: skip
        for status, name, attempts in table:
            for wanted in attempts:
                with self.subTest(str(wanted)[:80], name=name):
                    problem = self.assert_problem(self.send(wanted, name), status)
                    self.assertNotIn("secret", str(problem))
        self.ask("DELETE", f"/inbox/{self.name}")
        for wanted in (to, {**to, "pattern": "Accept"}):
            self.assert_problem(self.send(wanted), 404)
        self.assertEqual(self.receiver.received, [])
        self.assertEqual(len(self.deliveries()), 3)  # no attempt is a delivery itself
        self.assertNotIn(b"secret", self.path.read_bytes())

    def test_a_reply_to_a_service_that_is_only_named(self) -> None:
        self.post(altered("Request Review", origin=REPOSITORY["id"]))
        self.send({"to": self.url, "pattern": "Accept"}, self.names()[0])
        replied = json.loads(self.receiver.received.pop().body)
        self.assertEqual(replied["target"], REPOSITORY["id"])

    def test_whatever_became_of_it_is_the_answer(self) -> None:
        here = "http://{}:{}".format(*address(self.server))
        table: list[tuple[Any, int, str]] = [
            (f"http://127.0.0.1:{free_port()}/", 0, "Connection refused"),
            (f"{here}/inbox", 201, ""), (f"{here}/deliveries/{self.name}/send", 400, ""),
            (b"SSH-2.0\r\n", 0, "not HTTP"), (http_answer(308, Location=self.url), 201, ""),
            (http_answer(503, '{"detail": "later"}'), 503, "later"),
            (http_answer(400, '{"detail": "no\\n\\u001b[31mway"}'), 400, "no"),
            (http_answer(400, "x" * 9_000_000), 400, ""),
            (b"HTTP/1.1 200 \xff\r\nContent-Length: 2\r\nX: \xff\r\n\r\n\xff\xff", 200, ""),
        ]  # fmt: skip
        for answer, status, detail in table:
            with self.subTest(status=status, detail=detail):
                self.receiver.reset({"POST /": answer, "POST /inbox": CREATED})
                out = self.send({"to": answer if isinstance(answer, str) else self.receiver.url})
                self.assertEqual((out.status, out.json()["status"]), (201, status))
                self.assertIn(detail, out.json()["detail"])
                self.assertLess(len(out.body), 150_000)
                self.assertRegex(
                    "\n".join(self.log_lines()), f"{out.json()['name']}(?s:.*){detail}"
                )
        page = self.ask("GET", f"/deliveries/{self.name}", headers=HTML).body.decode()
        for each in self.deliveries("?direction=out"):
            self.assertIn(each["name"], page)
        self.assertEqual(self.statuses("?direction=out&status=400"), [400] * 3)
        self.assertTrue(all(line.isprintable() for line in self.log_lines()))

    def test_the_same_bytes_are_sent_again(self) -> None:
        """They may be large, or no JSON, and what was sent can be sent again too."""
        body = b" " + json.dumps({**OFFER, "x": "\u00e9"}).encode()
        for sent in (body, b"no JSON \xff", b"{}" + b" " * 1_048_574):
            self.post(sent)
            for _ in range(2):
                self.assertEqual(self.send({"to": self.url}, self.names()[0]).status, 201)
                self.assertEqual(self.receiver.received.pop().body, sent)

    def test_strangers_and_other_sites_may_not(self) -> None:
        token, tunnel = {"Authorization": "Bearer s3cret"}, {"X-Forwarded-For": "127.0.0.1"}
        site, form = {"Origin": FOREIGN}, {"Sec-Fetch-Site": "cross-site"}
        public, closed = {"BASE_URL": "http://127.0.0.1/"}, {"TOKEN": "s3cret"}
        table: list[tuple[dict[str, Any], dict[str, str], int]] = [
            ({}, {}, 201), ({}, tunnel, 403), ({}, {"Forwarded": "for=_x"}, 403), (public, {}, 403),
            (closed, {}, 401), (closed, token, 201),
            ({**closed, **public}, {**token, **tunnel}, 201),
            ({"CORS_ORIGINS": "*"}, site, 403), ({"CORS_ORIGINS": "*"}, form, 403),
            ({**closed, "CORS_ORIGINS": "*"}, {**token, **site}, 403),
        ]  # fmt: skip
        for settings, headers, status in table:
            with self.subTest(settings=settings, headers=headers), serving(**settings) as server:
                posted = ask(server, "POST", "/inbox", OFFER, token)
                name = last_part(posted.json()["location"])
                done = [self.send(wanted, name, server, **headers).status
                        for wanted in ({"to": self.url}, f"to={self.url}")]  # fmt: skip
                self.assertEqual(done, [201, 303] if status == 201 else [status] * 2)
                self.assertEqual(len(self.receiver.received), 2 if status == 201 else 0)
                self.receiver.received.clear()

    @unittest.skipUnless(other_address(), "this machine has no address but loopback")
    def test_who_comes_from_another_machine_needs_a_token(self) -> None:
        for settings, status in [({}, 403), ({"TOKEN": "s3cret"}, 201)]:
            with coarinbox.running(HOST="0.0.0.0", **settings) as inbox:
                name = inbox.send(OFFER, f"http://127.0.0.1:{free_port()}/").name
                where = other_address(), inbox.server.server_address[1]
                far = unittest.mock.Mock(server_address=where)
                answer = self.send({"to": self.url}, name, far, Authorization="Bearer s3cret")
                self.assertEqual(answer.status, status)
                self.assertEqual(len(self.receiver.received), status == 201)

    def test_a_receiver_that_never_answers_is_no_hindrance(self) -> None:
        late = LateAnswer()
        self.receiver.reset(late)
        to = json.dumps({"to": self.url}).encode()
        head = post_to("", to).replace(b"/inbox", f"/deliveries/{self.name}/send".encode(), 1)
        with contextlib.ExitStack() as clients:
            for _ in range(10):  # more than there are threads
                clients.enter_context(connect(self.server, head))
            for _ in range(8):
                late.wait_for_request()
            self.assert_serves()
            self.assertEqual(self.deliveries("?direction=out"), [])
            clients.enter_context(connect(self.server, post_head("Content-Length: 9")))
            self.server.stop(within=0.1)  # requests in flight do not keep it from ending
            self.wait_until(self.server.stopped.is_set)
        late.due.set()


class SendingDoubleTest(unittest.TestCase):
    """`inbox.send`, `inbox.reply`, and what the test double says of what it has sent."""

    def test_a_test_replies_to_an_offer(self) -> None:
        with coarinbox.running() as repository, coarinbox.running() as reviews:
            offer = offer_between(repository.url, reviews.url)
            sent = repository.send(offer, reviews.url)
            self.assertEqual((sent.status, sent.direction, sent.via), (201, "out", "test"))
            self.assertEqual((sent.target, sent.notification), (reviews.url, offer))
            received = reviews.wait_for(type="Offer")
            for pattern, to in [("Accept", None), ("announce review", repository.url)]:
                replied = reviews.reply(received, pattern, to)
                self.assertEqual((replied.status, replied.findings), (201, []))
                self.assertEqual(repository.wait_for(pattern=replied.pattern or "").findings, [])
            self.assertEqual([each.direction for each in reviews.deliveries], ["in", "out", "out"])
            self.assertEqual(reviews.wait_for(pattern="accept", direction="").direction, "out")
            reviews.assert_none(pattern="Accept")  # what was sent does not count
            self.assertEqual(reviews.notifications, [offer])

    def test_an_offer_is_undone_where_it_was_sent(self) -> None:
        with coarinbox.running() as repository, coarinbox.running() as reviews:
            sent = repository.send(offer_between(repository.url, reviews.url), reviews.url)
            undone = repository.reply(sent, "Undo Offer")
            self.assertEqual((undone.target, undone.findings), (reviews.url, []))
            reviews.wait_for(pattern="Undo Offer", clean=True)

    def test_what_cannot_be_done(self) -> None:
        with coarinbox.running() as inbox:
            nobody = f"http://127.0.0.1:{free_port()}/"
            self.assertIn("refused", inbox.send(ACCEPT, nobody).detail)
            inbox.send(b"no JSON", inbox.url)
            inbox.send(changed(OFFER, "origin.inbox", ABSENT), inbox.url)
            broken, offer = (each for each in inbox.deliveries if each.direction == "in")
            for delivery in (broken, offer):
                with self.assertRaisesRegex(ValueError, "only an Offer|names no inbox"):
                    inbox.reply(delivery)
            with self.assertRaisesRegex(ValueError, "answers no Offer"):
                inbox.reply(offer, "Request Review", inbox.url)
            for misuse in (inbox.wait_for, inbox.assert_none):
                with self.assertRaises(AssertionError):
                    misuse(direction="outgoing")
            with unittest.mock.patch.object(inbox.server, "record", side_effect=OSError("full")):
                with self.assertRaisesRegex(OSError, "full"):
                    inbox.send(ACCEPT, nobody)


# --- Faults --------------------------------------------------------------------------------------


def drop_in(server: Any, body: bytes = BODY, name: str = "") -> str:
    """Put a file into the store, as another program would; returns its path in the inbox."""
    name = name or coarinbox.new_name()
    pathlib.Path(server.store.directory, f"{name}.json").write_bytes(body)
    return f"/inbox/{name}"


@contextlib.contextmanager
def reading_late() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Set the first event when a notification has been read, and go on after the second."""
    read, begun, released = coarinbox.Store.read, threading.Event(), threading.Event()

    def read_late(store: coarinbox.Store, name: str) -> bytes:
        body = read(store, name)
        begun.set()
        assert released.wait(10)
        return body

    with unittest.mock.patch.object(coarinbox.Store, "read", read_late):
        yield begun, released


NEEDS_SPARSE_FILES = unittest.skipUnless(os.name == "posix", "files may have no holes")


class UnderLoadTest(ProgramTest):
    def test_two_inboxes_on_one_store_that_are_ended_lose_nothing(self) -> None:
        """SIGTERM leaves no request without its answer."""
        document = json.dumps(altered("Accept", summary="x" * 20_000)).encode()
        acknowledged: list[str] = []
        enough = threading.Event()

        def post_until_it_ends(inbox: Program) -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    answer = inbox.ask("POST", "/inbox", document)
                    acknowledged.append(last_part(answer.headers["Location"]))
                    if len(acknowledged) > 80:
                        enough.set()

        with contextlib.ExitStack() as stack:
            command = self.command("--port", "0")
            # Windows cannot append in one step, so that two might write at the same place.
            count = 2 if os.name == "posix" else 1
            programs = [running(command, cwd=self.directory) for _ in range(count)]
            inboxes = [stack.enter_context(program) for program in programs]
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(4))
            senders = [pool.submit(post_until_it_ends, inbox) for inbox in inboxes * 2]
            self.assertTrue(enough.wait(20))
            for status, log in [inbox.stop() for inbox in inboxes]:
                self.assertEqual((status, "Traceback" in log), (0, False), log)
        self.assertEqual([each.result() for each in senders], [None] * len(senders))
        store = self.directory / "notifications"
        lines = (store / "deliveries.jsonl").read_text().splitlines()
        names = sorted(json.loads(line)["name"] for line in lines if line)
        self.assertEqual(names, sorted(acknowledged))
        self.assertEqual(files_in(store), [f"{name}.json" for name in names])
        self.assertEqual({(store / file).read_bytes() for file in files_in(store)}, {document})

    @NEEDS_SPARSE_FILES
    def test_a_signal_ends_it_at_once_though_clients_and_receivers_wait(self) -> None:
        """Ten searches kept it for 16 seconds, and SIGHUP killed it."""
        path = self.config("REPLIES = ['Accept']; REPLY_DELAY = 0; FSYNC = False")
        store = self.directory / "notifications"
        store.mkdir()
        (store / "deliveries.jsonl").touch()
        os.truncate(store / "deliveries.jsonl", 2**36)  # long to read, but no room on the disk
        command, late = self.command("--port", "0", "--config", path), LateAnswer()
        with receiving(late) as silent, running(command, cwd=self.directory) as inbox:
            for _ in range(2):
                inbox.ask("POST", "/inbox", offer_between(silent.url, inbox.url))
                late.wait_for_request()
            search = get_head(target="/deliveries?q=x")
            search_page = get_head("Accept: text/html", target="/deliveries?q=x")
            with contextlib.ExitStack() as clients:
                for data in (post_to("?delay=9999"), search, search_page, b""):
                    clients.enter_context(connect(inbox, data))
                clients.enter_context(Listener(inbox))
                self.assertEqual(inbox.ask("POST", "/inbox", ACCEPT).status, 201)
                started = time.monotonic()
                status, log = inbox.stop(signal.SIGHUP)
                self.assertLess(time.monotonic() - started, coarinbox.STOP_WITHIN - 0.1)
        self.assertEqual((status, "Traceback" in log), (0, False), log)
        self.assertIn("the inbox stops; replies", log)


class ScarcityTest(InboxTest):
    """More clients than are served at once."""

    settings = {"MAX_CONNECTIONS": 2}
    head = post_head(f"Content-Length: {len(BODY)}", "Expect: 100-continue")

    def connect(self, data: bytes = b"") -> socket.socket:
        """Open a connection that lasts as long as the test, and send something on it."""
        connection = connect(self.server, data)
        self.addCleanup(connection.close)
        return connection

    def assert_answered(self, *connections: socket.socket) -> None:
        self.assertEqual({answer_on(connection).status for connection in connections}, {201})

    def test_idle_connections_make_room(self) -> None:
        first, second, third = clients = [self.connect() for _ in range(3)]
        for client in clients:
            client.sendall(post_to())
            self.assert_answered(client)
        self.assertEqual(first.recv(1), b"", "the one that was idle longest is still open")
        for client in (second, third):
            client.sendall(post_to())
        self.assert_answered(second, third)

    @NEEDS_SPARSE_FILES
    @constants(GRACE=0.1)  # longer than a turn takes
    def test_long_searches_make_room(self) -> None:
        """As many as there are connections let nobody else in for minutes."""
        self.assert_serves()
        os.truncate(self.server.deliveries.path, 2**36)  # it takes long to read
        for kind in ("text/html", "application/json"):
            head = get_head(f"Accept: {kind}", target="/deliveries?q=x")
            with connect(self.server, head), connect(self.server, head):
                self.assert_serves()
                self.wait_until(lambda: len(self.server.connections) == 1)

    @constants(GRACE=0.02)
    def test_slow_clients_make_room_and_are_told_so(self) -> None:
        """They do not end their request, wait for a simulated delay or do not read the answer."""
        large = drop_in(self.server, b" " * 10_000_000)
        unfinished = post_head("Content-Length: 9")
        for data in (unfinished, post_to("?delay=60"), get_head(target=large)):
            with connect(self.server, data) as first, connect(self.server, data) as second:
                self.assert_serves()
                if data.startswith(b"POST"):
                    (told,) = select.select([first, second], [], [], 10)[0]
                    answer = answer_on(told)
                    problem = self.assert_problem(answer, 503)
                    self.assertIn("MAX_CONNECTIONS", problem["detail"])
                    headers = [answer.headers[name] for name in ("Retry-After", "Connection")]
                    self.assertEqual(headers, ["1", "close"])
                    other = first if told is second else second
                    other.setblocking(False)
                    with self.assertRaises(BlockingIOError):  # one was enough
                        other.recv(1)

    @with_settings(MAX_CONNECTIONS=16)
    @constants(GRACE=0.02)
    def test_a_crowd_of_bad_clients_delays_others_only_until_each_had_its_time(self) -> None:
        """They send nothing, drip the head of a request, or do not read the answer."""
        large = drop_in(self.server, b" " * 5_000_000)
        kinds = (b"", b"POST /inbox HT", get_head()[:-2], get_head(target=large))
        crowd = [self.connect(data) for data in kinds * 16]
        started = time.monotonic()
        for _ in range(3):
            good = self.connect(post_to())
            while not select.select([good], [], [], 0.01)[0]:
                self.assertLess(time.monotonic() - started, 5)
                for connection in crowd:
                    with contextlib.suppress(OSError):
                        connection.send(b"x")
            self.assert_answered(good)

    @constants(GRACE=60)
    def test_clients_that_have_just_come_do_not(self) -> None:
        first, second = self.connect(self.head), self.connect(self.head[:20])
        third = self.connect(post_to())
        second.sendall(self.head[20:])
        for connection in (first, second):  # by now the third one has been noticed
            self.assertIn(b" 100 ", connection.recv(99))
            connection.sendall(BODY)
        self.assert_answered(first, second, third)
        for connection in [self.connect() for _ in range(5)]:
            connection.sendall(post_to().replace(b"HTTP/1.1", b"HTTP/1.0"))
            self.assert_answered(connection)

    @constants(GRACE=60, PAUSE=0)
    def test_the_end_may_come_while_there_is_no_room(self) -> None:
        begun = [self.connect(self.head) for _ in range(2)]
        for connection in begun:
            self.assertIn(b" 100 ", connection.recv(99))
        self.server.stop()
        self.wait_until(lambda: not can_connect(address(self.server)))
        for connection in begun:
            connection.sendall(BODY)
        self.assert_answered(*begun)

    def test_pipelined_requests_are_answered_in_order_and_do_not_hold_up_others(self) -> None:
        stored = drop_in(self.server)
        kinds = [
            (get_head(), 200, b'"constraints"'), (get_head(target=stored), 200, BODY),
            (post_to("", b"no"), 400, b"not JSON"), (post_to("?status=503"), 503, b"simulated"),
            (get_head(target="/inbox"), 200, b"ldp:"), (post_to(), 201, b"/inbox/"),
        ] * 10  # fmt: skip
        with self.connect(b"".join(request for request, *_ in kinds)).makefile("rb") as greedy:
            self.assertEqual(self.ask("GET", "/health").status, 204)
            self.assertLess(sum("/constraints" in line for line in self.log_lines()), 10)
            for _, status, part in kinds:
                answer = read_answer(greedy.readline(), greedy)
                self.assertEqual((answer.status, part in answer.body), (status, True))

    def test_a_client_that_does_not_read_cannot_send_on_and_holds_up_nobody(self) -> None:
        body = bytes(range(256)) * 40_000
        slow = self.connect(get_head(target=drop_in(self.server, body)))
        slow.settimeout(0.1)
        with self.assertRaises(socket.timeout):
            for _ in range(50):
                slow.sendall(b"x" * 1_000_000)
        self.assert_serves()
        slow.settimeout(10)
        with slow.makefile("rb") as stream:
            self.assertEqual(read_answer(stream.readline(), stream).body, body)  # all of it

    @constants(PAUSE=0.02)
    def test_when_the_system_has_no_more_descriptors_new_connections_wait(self) -> None:
        self.errors_expected = True
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            error, started = OSError(number, os.strerror(number)), time.monotonic()
            with unittest.mock.patch("socket.socket.accept", side_effect=error) as accept:
                connection = self.connect()
                self.wait_until(lambda accept=accept: accept.call_count >= 3)  # type: ignore[misc]
            # It does not try again and again.
            self.assertGreaterEqual(time.monotonic() - started, 2 * coarinbox.PAUSE)
            with connection:
                self.assert_serves()
            self.assertIn(f"a connection could not be accepted: {error}", self.log_lines())

    @constants(LINGER=60, GRACE=0.02)
    def test_floods_do_not_hold_up_others(self) -> None:
        for first, then in ((b"", b"\r\n" * 1000), (b"garbage\r\n", b"x" * 65536)):  # read on
            for _ in range(6):
                flooding = self.connect(first)
                flooding.setblocking(False)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    for _ in range(30):
                        flooding.send(then)
                self.assert_serves()
        # Some have been answered, and are still read; they have room of their own.
        self.assertLessEqual(len(self.server.connections), 2 * 2 + 1)

    def test_it_does_not_spin_while_it_is_full(self) -> None:
        for query in ("?delay=.2", "?delay=.2", ""):
            client = self.connect(post_to(query))
        used = time.process_time()
        self.assertNotEqual(client.recv(12), b"")
        self.assertLess(time.process_time() - used, 0.08)


class BugTest(InboxTest):
    """Bugs of the inbox itself, which must not end the service."""

    errors_expected = True

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.server.bugs.clear)  # at the end of `running`, they would be raised

    def test_a_bug_between_requests_or_in_one_does_not_end_the_service(self) -> None:
        self.server.post(lambda: 1 / 0)
        self.wait_until(lambda: bool(self.server.bugs))
        with unittest.mock.patch("coarinbox.InboxHandler.respond", side_effect=ValueError("odd")):
            self.assertEqual(raw(self.server, get_head()), [])
        self.assert_serves()
        self.assertEqual([str(bug) for bug in self.server.bugs], ["division by zero", "odd"])

    def test_a_line_break_in_a_header_does_not_split_the_answer(self) -> None:
        for line_break in ("\r\n", "\n", "\r"):
            with constants(ACCEPT_POST=f"x{line_break}Set-Cookie: y"):
                answer = self.ask("OPTIONS", "/inbox")
            self.assert_problem(answer, 500)
            self.assertNotIn("Set-Cookie", answer.headers)
            self.assertIsInstance(self.server.bugs.pop(), ValueError)

    @constants(TURN=0)  # so that the beginning is sent by itself
    def test_a_bug_in_the_middle_of_an_answer_cuts_it_off(self) -> None:
        def select(*_: object) -> Iterator[tuple[coarinbox.Delivery, bytes]]:
            yield coarinbox.Delivery(), b"{}"
            raise ZeroDivisionError

        with unittest.mock.patch.object(self.server.deliveries, "select_lines", select):
            with self.assertRaises(http.client.IncompleteRead):
                self.ask("GET", "/deliveries")
        self.assertIsInstance(self.server.bugs[0], ZeroDivisionError)
        self.assert_serves()

    def test_a_bug_at_the_end_does_not_prevent_it(self) -> None:
        with unittest.mock.patch("coarinbox.Connection.on_stop", lambda connection: 1 / 0):
            with connect(self.server) as idle:
                self.assert_serves()  # the idle connection has been accepted, too
                self.server.stop()
                self.assertEqual(idle.recv(1), b"")


class DepartureTest(InboxTest):
    """Clients that leave."""

    def test_nothing_of_them_stays_but_a_line_in_the_log(self) -> None:
        for data in (b"", get_head(), post_head("Content-Length: 9"), post_to("?delay=60")):
            self.ask("DELETE", "/inbox")
            connect(self.server, data).close()
            self.assertEqual(self.ask("GET", "/health").status, 204)  # after it was accepted
            self.wait_until(lambda: not self.server.connections)
        (delivery,) = self.ask("GET", "/deliveries").json()["deliveries"]
        self.assertEqual((delivery["status"], delivery["simulated"]), (0, True))
        self.assertEqual(self.stored(), [])

    def test_a_client_that_sends_on_during_a_delay_is_disconnected(self) -> None:
        """Nobody reads what it sends, so that its leaving would go unnoticed."""
        for before in (b"", post_to()):
            with connect(self.server, before + post_to("?delay=60")) as connection:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(get_head() * 5000)
                    while connection.recv(65536):  # until it is closed
                        pass
        self.assert_serves()

    def test_a_client_that_has_left_before_it_is_served(self) -> None:
        with unittest.mock.patch("socket.socket.setsockopt", side_effect=OSError("lost")):
            self.assertEqual(raw(self.server, b""), [])
        self.assert_serves()


class ShortWriteTest(InboxTest):
    """A disk that takes only a part of what is written to it."""

    errors_expected = True

    @contextlib.contextmanager
    def disk_that_cuts(self, start: bytes) -> Iterator[None]:
        """Write only 100 bytes of what starts so."""
        write = os.write

        def short(file: int, data: bytes) -> int:
            return write(file, data[:100] if bytes(data).startswith(start) else data)

        with unittest.mock.patch("os.write", short):
            yield

    def test_what_is_cut_is_not_stored(self) -> None:
        with self.disk_that_cuts(BODY[:20]):
            self.assert_problem(self.post(), 507)
        self.assertEqual(files_in(self.server.store.directory), [])
        self.assert_serves()

    def test_what_cannot_be_logged_is_adopted_once(self) -> None:
        path = drop_in(self.server).replace("/inbox/", "/deliveries/")
        with self.disk_that_cuts(b'{"name"'):
            first, second = (self.ask("GET", path).json() for _ in range(2))
        self.assertEqual((first["name"], first), (last_part(path), second))
        reason = f"not be logged: [Errno {errno.ENOSPC}]"
        self.assertEqual("".join(self.log_lines()).count(reason), 1)


class ManyTest(InboxTest):
    """Lists that are too long to be sent at once: each entry is a part of its own here."""

    @constants(TURN=0)
    def test_a_long_list_is_sent_in_pieces_and_in_order(self) -> None:
        paths = sorted(drop_in(self.server) for _ in range(40))
        connection = http.client.HTTPConnection(*address(self.server), timeout=10)
        with contextlib.closing(connection):
            answer = ask_on(connection, "GET", "/inbox")
            listed = [path_of(entry["@id"]) for entry in answer.json()["ldp:contains"]]
            self.assertEqual(listed, paths)
            headers = [answer.headers[name] for name in ("Transfer-Encoding", "Connection")]
            self.assertEqual(headers, ["chunked", "keep-alive"])
            self.assertEqual(ask_on(connection, "POST", "/inbox", ACCEPT).status, 201)
        # Some clients know no chunks.
        with connect(self.server, b"GET /inbox HTTP/1.0\r\nConnection: keep-alive\r\n\r\n") as old:
            received = b"".join(iter(lambda: old.recv(65536), b""))
        head, _, body = received.partition(b"\r\n\r\n")
        self.assertNotIn(b"chunked", head)
        self.assertIn(b"Connection: close", head)
        self.assertEqual(len(json.loads(body)["ldp:contains"]), 41)

    def test_one_thread_reads_them_all(self) -> None:
        """Several would make the loop wait for the interpreter's lock."""
        take_turn, threads = coarinbox.take_turn, set()

        def take_turn_here(items: Any) -> Any:
            threads.add(threading.get_ident())
            return take_turn(items)

        self.post()
        with constants(take_turn=take_turn_here, TURN=0):
            for path in ("/inbox", "/deliveries", "/deliveries?q=x", "/"):
                self.assertEqual(self.ask("GET", path).status, 200)
        self.assertEqual(len(threads), 1)


class TokenTest(DeliveriesTest):
    settings = {"TOKEN": "s3cret: ü"}
    basic = "Basic " + base64.b64encode("browser:s3cret: ü".encode()).decode()

    def test_every_request_must_carry_it(self) -> None:
        wrong = base64.b64encode(b"s3cret:wrong").decode()
        for authorization in (
            "", "Bearer", "Bearer wrong", "Bearer s3cret: u", "Basic", "Basic ?", "Digest x",
            "Digest s3cret: \xc3\xbc", "Basic s3cret: \xc3\xbc", "Basic \xff", f"Basic {wrong}",
            "s3cret",
        ):  # fmt: skip
            for asked in ("POST /inbox", "GET /", "GET /deliveries", "OPTIONS /inbox", "GET /x"):
                with self.subTest(asked, authorization=authorization):
                    body = BODY if asked.startswith("POST") else None
                    headers = {"Authorization": authorization} if authorization else {}
                    answer = self.ask(*asked.split(), body, headers)
                    self.assert_problem(answer, 401)
                    challenges = answer.headers.get_all("WWW-Authenticate") or []
                    schemes = [challenge.split()[0] for challenge in challenges]
                    self.assertEqual(schemes, ["Bearer", "Basic"])
        token = "s3cret: ü".encode().decode("latin-1")
        # Software Heritage takes the second one.
        for authorization in (f"Bearer {token}", f"Token {token}", self.basic.replace("B", "b", 1)):
            self.assertEqual(self.post(Authorization=authorization).status, 201)

    def test_what_strangers_send_is_not_logged(self) -> None:
        """6 MB of headers became 37 MB of log, without the token."""
        token = {"Authorization": self.basic}
        for status, headers in [
            (401, {"X-Mine": "unwanted"}), (401, {"Authorization": "Bearer unwanted"}),
            (421, {**token, "Host": "evil.example"}), (403, {**token, "Origin": FOREIGN}),
        ]:  # fmt: skip
            answer = self.ask("POST", "/inbox", changed(OFFER, "id", "urn:x:unwanted"), headers)
            problem, line = self.assert_problem(answer, status), self.lines()[-1]
            self.assertNotIn("unwanted", json.dumps(line))
            expected = {"client": address(self.server)[0], "target": "/inbox", "headers": {},
                        "status": status, "detail": problem["detail"]}  # fmt: skip
            self.assertLessEqual(expected.items(), line.items())
        self.assertEqual(len(self.lines()), 4)

    def test_health_is_for_everybody_and_leaves_no_line_in_the_log(self) -> None:
        for method in ("GET", "HEAD"):
            answer = self.ask(method, "/health")
            self.assertEqual((answer.status, answer.body), (204, b""))
        self.assertEqual(self.log_lines(), [])


class EmbeddedTest(unittest.TestCase):
    """A server that another program runs."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        settings = coarinbox.Settings(PORT=0, STORE_DIR=directory.name, FSYNC=False)
        self.server = coarinbox.InboxServer(settings)

    def test_the_end_closes_a_client_that_has_sent_a_line_break_only(self) -> None:
        thread = threading.Thread(target=self.server.serve_forever)
        with connect(self.server, b"\r\n") as client:
            with self.server:
                thread.start()
                self.assertEqual(ask(self.server, "GET", "/health").status, 204)
                self.server.stop(within=0)
                thread.join()
            self.assertEqual(client.recv(1), b"")
        self.assertEqual(self.server.bugs, [])

    def test_the_end_of_the_block_ends_the_server_whatever_happens_in_it(self) -> None:
        thread = threading.Thread(target=self.server.serve_forever)
        with self.assertRaises(ZeroDivisionError), self.server:
            thread.start()
            self.assertEqual(ask(self.server, "POST", "/inbox", ACCEPT).status, 201)
            raise ZeroDivisionError
        thread.join(10)
        self.assertFalse(thread.is_alive())
        self.server.serve_forever()  # too late, and over at once

    def test_clients_that_have_already_connected_are_answered_before_the_end(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.server)
            waiting = [stack.enter_context(connect(self.server, post_to())) for _ in range(70)]
            self.server.stop()
            self.server.serve_forever()
            self.assertEqual([answer_on(each).status for each in waiting], [201] * 70)

    def test_an_inbox_that_never_served_can_be_ended(self) -> None:
        with self.server:
            self.server.shutdown()
            self.server.serve_forever()


class TlsTest(SendingTest, InboxTest):
    certificate: str
    key: str
    context: ssl.SSLContext

    @classmethod
    def setUpClass(cls) -> None:
        """Make a certificate for localhost and 127.0.0.1."""
        if not shutil.which("openssl"):
            raise unittest.SkipTest("making a certificate needs openssl")
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.certificate, cls.key = f"{directory.name}/cert.pem", f"{directory.name}/key.pem"
        done = subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
             "-keyout", cls.key, "-out", cls.certificate],
            capture_output=True, timeout=60,
        )  # fmt: skip
        if done.returncode:  # on Windows, some do not find their configuration
            raise unittest.SkipTest(f"openssl makes no certificate: {done.stderr!r}")
        cls.settings = {"SSL_CERT": cls.certificate, "SSL_KEY": cls.key}
        cls.context = ssl.create_default_context(cafile=cls.certificate)

    def connect(self, data: bytes = b"") -> ssl.SSLSocket:
        secure = self.context.wrap_socket(connect(self.server), server_hostname="localhost")
        self.addCleanup(secure.close)
        secure.sendall(data)
        return secure

    def test_https(self) -> None:
        large = altered("Accept", summary="x" * 900_000)  # TLS sends 16 KiB at most at once
        self.assertTrue(self.server.base.startswith("https://localhost:"))
        where = address(self.server)
        client = http.client.HTTPSConnection(*where, timeout=10, context=self.context)
        with connect(self.server), contextlib.closing(client):  # the first stalls in the handshake
            for document in (ACCEPT, large):
                location = ask_on(client, "POST", "/inbox", document).headers["Location"]
                self.assertTrue(location.startswith("https://127.0.0.1:"), location)
                self.assertEqual(ask_on(client, "GET", path_of(location)).json(), document)
        with contextlib.suppress(OSError):
            self.assertEqual(raw(self.server, get_head()), [])  # not encrypted
        self.server.server_close()
        self.assertFalse([line for line in self.log if line.exc_info])

    @unittest.skipUnless(hasattr(ssl, "OP_IGNORE_UNEXPECTED_EOF"), "needs Python 3.10")
    @with_settings(MAX_CONNECTIONS=1)
    @constants(GRACE=0.02)
    def test_who_is_cut_off_for_the_sake_of_others_is_told_so(self) -> None:
        first = self.connect(post_head("Content-Length: 9") + b"x")
        self.connect()  # which waits until there is room
        self.assertEqual(answer_on(first).status, 503)

    def test_requests_that_come_at_once_are_all_answered(self) -> None:
        """Together they fill a TLS record: what a read leaves of it, nobody but TLS knows of."""
        last = post_head("Content-Length: 0", "Connection: close")
        first = post_head("Content-Length: 0", "X: ")
        padding = b"x" * (16384 - len(first + last))
        secure = self.connect(first.replace(b"X: ", b"X: " + padding) + last)
        with secure.makefile("rb") as stream:
            answers = [read_answer(stream.readline(), stream).status for _ in range(2)]
            self.assertEqual(answers, [400, 400])

    @constants(TURN=0)
    def test_a_client_that_breaks_the_encryption_is_disconnected(self) -> None:
        """Even while a thread works for it, which then works for nobody."""
        begun, gone = threading.Semaphore(0), threading.Semaphore(0)

        def search(*_: object) -> Iterator[None]:
            yield None
            begun.release()
            self.assertTrue(gone.acquire(timeout=10))

        slow: Any = {"select": search, "select_lines": search}
        with unittest.mock.patch.multiple(self.server.deliveries, **slow):
            for kind in ("text/html", "application/json"):
                head = get_head(f"Accept: {kind}", target="/deliveries")
                secure = self.connect(head)
                self.assertTrue(begun.acquire(timeout=10))
                socket.socket.send(secure, b"not encrypted")
                self.wait_until(lambda: not self.server.connections)
                gone.release(2)
                with self.connect(head) as other:
                    self.assertTrue(begun.acquire(timeout=10))
                    self.assertEqual(answer_on(other).status, 200)
        # Before Python 3.10, there is a line for clients that leave without a word, too.
        self.assertGreaterEqual("".join(self.log_lines()).count("connection lost"), 2)

    def test_a_client_that_does_not_encrypt_finds_the_reason_in_the_log(self) -> None:
        with socket.create_connection(address(self.server), timeout=10) as client:
            client.sendall(get_head())
            with contextlib.suppress(ConnectionError):
                while client.recv(999):
                    pass
        self.assertIn("the client speaks plain HTTP", "".join(self.log_lines()))

    def test_old_versions_of_the_protocol_are_refused(self) -> None:
        hello = b"\x03\x02" + bytes(32) + b"\x00" + b"\x00\x02\x00\x2f" + b"\x01\x00"  # TLS 1.1
        record = b"\x01" + len(hello).to_bytes(3, "big") + hello
        record = b"\x16\x03\x01" + len(record).to_bytes(2, "big") + record
        with connect(self.server, record) as connection:
            alert = connection.recv(100)
        self.assertEqual((alert[:1], alert[5:]), (b"\x15", b"\x02\x46"))  # protocol_version

    def test_files_that_cannot_be_used(self) -> None:
        encrypted = f"{self.key}.encrypted"
        encrypt = ["openssl", "pkey", "-in", self.key, "-aes256", "-passout", "pass:x"]
        subprocess.run([*encrypt, "-out", encrypted], check=True, capture_output=True)
        expected = "SSL_CERT.*; expected a certificate and its key, not encrypted, in PEM"
        for settings in (
            {"SSL_CERT": "none.pem"}, {"SSL_CERT": self.key}, {"SSL_KEY": None},
            {"SSL_KEY": encrypted},  # its password is not asked for
        ):  # fmt: skip
            with self.assertRaisesRegex(coarinbox.ConfigurationError, expected):
                serving(**{**self.settings, **settings}).__enter__()

    def test_a_certificate_must_be_trusted_and_have_the_name_of_the_url(self) -> None:
        drip = endless(b"HTTP/1.1 201 Created\r\n\r\n", b"x", 0.01)
        with receiving(drip, (self.certificate, self.key)) as receiver:
            reason = "TLS failed: certificate verify failed: .*self.signed.*; set SSL_CERT_FILE"
            self.assert_fails(reason, receiver.url)
            with unittest.mock.patch.dict(os.environ, SSL_CERT_FILE=self.certificate):
                self.assertEqual(coarinbox.send(ACCEPT, f"{self.server.base}/inbox").status, 201)
                self.assertEqual(coarinbox.send(ACCEPT, receiver.url, timeout=0.4).status, 201)
                url = receiver.url.replace("127.0.0.1", "reviews.example.net")
                with self.assertRaisesRegex(coarinbox.SendError, "TLS failed: .*reviews.example"):
                    coarinbox.post(ACCEPT, url, ["127.0.0.1"])
            self.assertEqual(len(receiver.received), 1)


NEEDS_PYDEVD = unittest.skipUnless(importlib.util.find_spec("pydevd"), "pydevd is not installed")


class DebuggerTest(ProgramTest):
    def debugged(self, port: int) -> Any:
        """Run an inbox that attaches to an editor at a port."""
        path = self.config(f'DEBUG_PYCHARM_SERVER = "127.0.0.1"\nDEBUG_PYCHARM_PORT = {port}')
        command = self.command("-d", "--port", "0", "--config", path)
        return running(command, cwd=self.directory)

    def test_without_the_package_one_line_says_what_to_install(self) -> None:
        with unittest.mock.patch.dict(sys.modules, pydevd=None):
            with unittest.mock.patch("coarinbox.run") as run:
                done = self.invoke("-d", "--port", "0")
        self.assertEqual((done.status, done.errors.count("\n")), (0, 1), done.errors)
        self.assertIn("no debugger: it needs the package pydevd-pycharm", done.errors)
        (server,) = run.call_args.args
        server.server_close()

    @NEEDS_PYDEVD
    def test_it_connects_to_the_server_that_waits(self) -> None:
        def accept(editor: socket.socket) -> socket.socket:
            connection, _ = editor.accept()
            connection.sendall(b"501\t1\t0.1\n101\t3\t\n")  # version, run
            return connection

        with socket.create_server(("127.0.0.1", 0)) as editor:
            editor.settimeout(20)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                accepted = pool.submit(accept, editor)
                with self.debugged(editor.getsockname()[1]) as inbox:
                    with accepted.result():
                        self.assertEqual(inbox.ask("POST", "/inbox", ACCEPT).status, 201)
                    # The editor has ended, and the inbox has not.
                    self.assertEqual(inbox.ask("POST", "/inbox", ACCEPT).status, 201)

    @NEEDS_PYDEVD
    def test_without_a_server_it_says_so_and_serves(self) -> None:
        with self.debugged(free_port()) as inbox:
            self.assertIn("no debugger: 127.0.0.1", "\n".join(inbox.banner))
            self.assertEqual(inbox.ask("GET", "/inbox").status, 200)


# --- Bounds --------------------------------------------------------------------------------------

# What one client can cost the others has limits. Docstrings give what the same input did to version
# 0.1.0. Times are bounds against a standstill, not measurements: they leave room for a machine that
# is busy with something else.

LONG = 60_000  # bytes: nearly as many as the head of a request may have
FOREIGN = "https://evil.example"
NO_THREAD = unittest.mock.patch(
    "threading.Thread.start", side_effect=RuntimeError("can't start new thread")
)


class HeadTest(InboxTest):
    """The head of a request, before anybody knows who sends it."""

    def test_none_takes_long_to_read(self) -> None:
        """65 kB of spaces in a Connection header held everybody up for five seconds."""
        values = {
            "Connection": ["close" + " " * LONG + "x", " ," * (LONG // 2), "\t" * LONG + ",x"],
            "Accept": ["," * LONG, '"' * LONG, ";" * LONG, 'a",' * (LONG // 3), " " * LONG + ",b"],
            "Authorization": ["Basic " + "=" * LONG, "Bearer" + " " * LONG + "x"],
            "Content-Length": ["1" * LONG, "0" * LONG, "1" + " " * LONG + "1"],
            "Content-Type": ["application/" + "a+" * (LONG // 2), JSON_LD + " " * LONG + "x"],
            "Expect": ["100-continue" + " " * LONG + "x"],
            "Origin": ["https://" + ":" * LONG, "//" * (LONG // 2), "a.@" * (LONG // 3)],
            "Transfer-Encoding": ["chunked" + " " * LONG + "x", "," * LONG],
        }
        lines = [f"{name}: {value}" for name, listed in values.items() for value in listed]
        heads = [post_head(line) for line in lines]
        for host in ("localhost:" + "1" * LONG, "[" + ":" * LONG, "a." * (LONG // 2)):
            heads.append(get_head(host=host))
        for target in ("/inbox?" + "&" * LONG, "/" * LONG, "/deliveries?limit=" + "0" * LONG):
            heads.append(get_head(target=target))
        for head in heads:
            started = time.process_time()
            with connect(self.server, head) as connection:
                self.assertEqual(connection.recv(9), b"HTTP/1.1 ")
            self.assertLess(time.process_time() - started, 1, head[:80])

    def test_its_errors_are_answered_at_once_and_can_be_read_later(self) -> None:
        head = post_head("Content-Length: 5000000")
        for status, data in [
            (413, head), (413, post_head(CHUNKED) + b"4c4b40\r\n"),
            (421, head.replace(b"localhost", b"evil.example")), (400, head[:-2] + b"malformed\r\n"),
            (403, post_head("Content-Length: 999999", f"Origin: {FOREIGN}")),
        ]:  # fmt: skip
            with self.subTest(status), connect(self.server, data) as connection:
                self.assertTrue(connection.recv(1, socket.MSG_PEEK))  # before the body is there
                connection.sendall(b"x" * 5_000_000)
                connection.shutdown(socket.SHUT_WR)
                self.assertEqual(answer_on(connection).status, status)
                self.assertEqual(connection.recv(1), b"")  # and no reset

    @constants(LINGER=0.1)
    def test_later_input_is_discarded_for_some_time_only(self) -> None:
        with connect(self.server, post_head("Content-Length: 999999999999")) as connection:
            started = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < started + 8:
                    connection.sendall(b"x" * 65536)
            self.assertTrue(0.05 < time.monotonic() - started < 5)


class LogLineTest(DeliveriesTest):
    """The room that one request may take in the log of the deliveries."""

    def newest_line(self) -> bytes:
        return self.path.read_bytes().splitlines()[-1]

    def test_headers_have_sixteen_kibibytes_of_it(self) -> None:
        """As characters outside ASCII, 60 kB became 360 kB."""
        for value, longest in (("x", 20_000), ("\xff", 110_000)):
            self.assertEqual(self.post(ACCEPT, X_Long=value * LONG).status, 201)
            self.assertLess(len(self.newest_line()), longest)
            names = {name.lower() for name in json.loads(self.newest_line())["headers"]}
            self.assertLessEqual({"host", "content-type"}, names)

    def test_a_body_takes_no_more_of_it_than_base64_does(self) -> None:
        """JSON escapes some bytes with six: a refused body of 1 MB became 6 MB."""
        for text in (b"\0", b"\x7f", "é".encode(), "字".encode(), b'"', b"\xff", b"x"):
            body = text * (LONG // len(text))
            self.assert_problem(self.post(body), 400)
            line = self.newest_line()
            self.assertLess(len(line), len(body) * 1.4 + 2000, text)
            path = f"/deliveries/{json.loads(line)['name']}/body"
            self.assertEqual(self.ask("GET", path).body, body)
        self.assertEqual(json.loads(line)["body"], "x" * LONG)  # readable text stays readable

    def test_a_hundred_findings_are_enough(self) -> None:
        """2.6 kB of Accepts inside each other were answered with 535 kB."""
        nested: Any = {"type": "Accept"}
        for _ in range(95):
            nested = {"type": "Accept", "object": nested}
        answer = self.post(nested)
        self.assert_problem(answer, 400)
        self.assertLess(len(answer.body) + len(self.newest_line()), 50_000)
        # So many findings of one document are a matter of future rules.
        findings = coarinbox.validate(REFUSED) * 1000
        errors = sum(each.level == E for each in findings)
        with unittest.mock.patch("coarinbox.validate", return_value=findings):
            problem = self.assert_problem(self.post(), 400)
            with serving(VALIDATE_INCOMING=False) as lax:
                receipt = ask(lax, "POST", "/inbox", ACCEPT).json()
        self.assertEqual((len(problem["errors"]), problem["warnings"]), (100, []))
        self.assertIn(f"{errors:,} errors", problem["detail"])
        self.assertRegex(problem["omitted"], "and [0-9],[0-9]{3} more")
        line = json.loads(self.newest_line())
        self.assertEqual((len(receipt["warnings"]), len(line["findings"])), (100, 100))
        self.assertGreater(line["omitted"], 1000)


class WaitingTest(DeliveriesTest):
    """Clients that wait, or make the inbox work, for a long time."""

    def test_a_client_that_waits_holds_no_thread(self) -> None:
        with contextlib.ExitStack() as clients:
            before = threading.active_count()
            for _ in range(30):
                clients.enter_context(connect(self.server, post_to("?delay=9999")))
                clients.enter_context(connect(self.server, post_head("Content-Length: 9")))
                clients.enter_context(Listener(self.server))
            self.assert_serves()
            self.assertLess(threading.active_count() - before, 5)

    @NEEDS_SPARSE_FILES
    def test_searches_leave_the_inbox_usable_and_end_when_their_clients_leave(self) -> None:
        """They went on, held all connections and let nobody else in."""
        self.post()
        os.truncate(self.path, 2**36)  # it takes long to read, and no room on the disk
        with contextlib.ExitStack() as clients:
            heads = [get_head(f"Accept: {kind}", target="/deliveries?q=x")
                     for kind in ("text/html", "application/json")]  # fmt: skip
            searching = [clients.enter_context(connect(self.server, head)) for head in heads * 5]
            for _ in range(10):
                started = time.monotonic()
                self.assert_serves()
                self.assertLess(time.monotonic() - started, 2)
            self.assertGreaterEqual(len(self.server.connections), 10)
            for client in searching:
                client.shutdown(socket.SHUT_WR)
            self.wait_until(lambda: not self.server.connections)
        self.assertIn("the client has left", "".join(self.log_lines()))

    @NEEDS_SPARSE_FILES
    def test_no_answer_takes_the_place_of_one_that_was_given_up(self) -> None:
        self.post()
        os.truncate(self.path, 2**36)
        search = get_head("Accept: text/html", target="/?q=x")
        self.assertEqual(raw(self.server, search + get_head(), "half-close"), [])

    def test_listeners_share_one_reader(self) -> None:
        """Fifty left a twentieth of the rate, even where they wanted none of what came."""
        read = unittest.mock.patch("coarinbox.read_news", wraps=coarinbox.read_news)
        with read as reading, contextlib.ExitStack() as clients:
            for _ in range(50):
                clients.enter_context(Listener(self.server, "/deliveries?q=nothing+has+this"))
            reading.reset_mock()
            for _ in range(20):
                self.assert_serves()
            self.wait_until(lambda: reading.called)
            self.assertLess(reading.call_count, 50)
        self.assertEqual(len(reading.call_args.args[1]), 1)  # what they want is looked for once


class MemoryTest(unittest.TestCase):
    def setUp(self) -> None:
        context = serving(VALIDATE_INCOMING=False)
        self.server = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)

    def test_ids_do_not_stay_in_it(self) -> None:
        """150 ids of 1 MB, whose attempts are counted, stayed in memory: 684 MB."""
        kept = []
        for number in range(5):
            # One character outside the BMP: each character takes four bytes.
            body = f'{{"id": "urn:x:{number}:{"x" * 300_000}\U0001f600"}}'.encode()
            self.assertEqual(raw(self.server, post_to("?close=1&times=1", body)), [])
            self.assertEqual(ask(self.server, "GET", "/health").status, 204)
            kept.append(tracemalloc.get_traced_memory()[0])
        self.assertLess(kept[-1] - kept[0], 1_000_000)

    def test_what_was_answered_does_not_stay_in_it(self) -> None:
        """It did, until Python looked for what nobody needs any more."""
        gc.disable()
        self.addCleanup(gc.enable)
        body = b"[" + b" " * 100_000
        head = get_head(f"Content-Length: {len(body)}", target="/health")
        before = tracemalloc.get_traced_memory()[0]
        for path in ("/nowhere", "/inbox"):
            for _ in range(20):
                self.assertIn(ask(self.server, "POST", path, body).status, (404, 400))
        with contextlib.ExitStack() as end:
            for _ in range(20):  # they stay connected, and ask for nothing more
                client = end.enter_context(connect(self.server, head + body))
                self.assertEqual(answer_on(client).status, 204)
            self.assertLess(tracemalloc.get_traced_memory()[0] - before, 1_000_000)

    def test_a_search_that_outlasts_the_inbox_leaves_no_file_open(self) -> None:
        gc.disable()
        self.addCleanup(gc.enable)
        files, begun, released = [], threading.Event(), threading.Event()

        def search(*_: object) -> Iterator[None]:
            with open(os.devnull) as file:
                files.append(file)
                begun.set()
                released.wait(10)
                yield from itertools.repeat(None)  # which takes turns without an end

        with serving() as server, unittest.mock.patch.object(server.deliveries, "select", search):
            with connect(server, get_head("Accept: text/html", target="/")):
                self.assertTrue(begun.wait(10))
        released.set()
        deadline = time.monotonic() + 10
        while not files[0].closed:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0)

    def test_what_was_validated_does_not_stay_in_it(self) -> None:
        """A value that was too long for its finding did, and brought the document with it."""

        class Document(list):  # type: ignore[type-arg]
            """A list that can be watched."""

        gc.disable()
        self.addCleanup(gc.enable)
        document = Document([{}] * 1000)
        left = weakref.ref(document)
        self.assertEqual([each.value for each in coarinbox.validate(document)], [None])
        del document
        self.assertIsNone(left())

    def test_documents_are_parsed_one_at_a_time(self) -> None:
        """A hundred bodies of 1 MB took 2.7 GB, because each was kept until its answer was sent."""
        body = b"[" + b"{}," * 5_000 + b"{}]"
        self.assertEqual(ask(self.server, "POST", "/inbox", body).status, 201)
        one = tracemalloc.get_traced_memory()[1]
        almost = post_head(f"Content-Length: {len(body)}") + body[:-1]
        with contextlib.ExitStack() as clients:
            waiting = [clients.enter_context(connect(self.server, almost)) for _ in range(8)]
            for connection in waiting:
                connection.sendall(body[-1:])
            self.assertEqual([answer_on(each).status for each in waiting], [201] * 8)
        self.assertLess(tracemalloc.get_traced_memory()[1], 4 * one)


class StandardErrorTest(unittest.TestCase):
    def setUp(self) -> None:
        self.addCleanup(self.wait_for_threads, set(threading.enumerate()))

    def wait_for_threads(self, others: set[threading.Thread]) -> None:
        deadline = time.monotonic() + 10
        while set(threading.enumerate()) - others:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0)

    @constants(MAX_WAITING=100, FLUSH_WITHIN=0.01)
    def test_nobody_has_to_read_it(self) -> None:
        """Every request stopped as soon as the pipe was full; the end does not wait either."""
        threads, is_read, written = threading.enumerate(), threading.Event(), io.StringIO()

        def write(text: str) -> None:
            assert is_read.wait(10)
            written.write(text)

        started, stderr = time.monotonic(), unittest.mock.Mock(write=write, isatty=lambda: False)
        with unittest.mock.patch("sys.stderr", stderr):
            with coarinbox.log_to_stderr(), serving(DEBUG=True) as server:
                # Each header is a line of the log.
                requests = get_head(*[f"X-{n}: y" for n in range(90)], target="/none") * 5
                statuses = [each.status for each in raw(server, requests, "half-close")]
                self.assertEqual(statuses, [404] * 5)
            self.assertLess(time.monotonic() - started, 4)
            is_read.set()
            for thread in {*threading.enumerate()}.difference(threads):
                thread.join(10)
        self.assertRegex(written.getvalue(), "(?m)^[0-9]{2,} lines were dropped: nobody read")
        self.assertGreater(written.getvalue().count("\n"), 100)  # what waited is written

    def log_on_a_terminal(self, *requests: bytes, **variables: str) -> str:
        """Return what a terminal shows of some requests, the times aside."""
        terminal = io.StringIO()
        with unittest.mock.patch.object(terminal, "isatty", return_value=True, create=True):
            with unittest.mock.patch.dict(os.environ, variables):
                with unittest.mock.patch("sys.stderr", terminal), coarinbox.log_to_stderr():
                    with serving(FSYNC=False) as server:
                        for each in requests:
                            raw(server, each, "half-close")
        return re.sub("(?m)^[0-9-]{10} [0-9:]{8} ", "", terminal.getvalue())

    def test_the_status_of_a_delivery_has_a_color_on_a_terminal(self) -> None:
        elsewhere, here = coarinbox.sample("Accept"), coarinbox.sample("Request Review")
        here["target"]["inbox"] = "http://localhost/inbox"
        table = [
            (post_to("", json.dumps(here).encode()), 32, "201 Request Review from https://repo"),
            (post_to("", json.dumps(elsewhere).encode()), 33, "201 Accept .* 1 warning http://"),
            (post_to("", b"{}"), 31, "400 no pattern from 127.0.0.1 5 errors, 2 warnings http://"),
            (post_to("?close=1"), 33, "dropped Accept from https://journal.example.com/"),
            (post_to("?status=503"), 31, "503 Accept from https://journal.example.com/"),
        ]  # fmt: skip
        requests = [request for request, *_ in table]
        colored, plain = (
            self.log_on_a_terminal(*requests, NO_COLOR=each, WT_SESSION="x") for each in ("", "1")
        )
        for _, color, words in table:
            status, _, rest = words.partition(" ")
            self.assertRegex(colored, f"(?m)^\x1b\\[{color}m{status}\x1b\\[0m {rest}")
            self.assertRegex(plain, f"(?m)^{words}")

    def test_the_old_console_of_windows_gets_no_colors(self) -> None:
        """It shows the characters that ask for them."""
        terminal = unittest.mock.Mock(isatty=lambda: True)
        for session, expected in ({}, False), ({"WT_SESSION": "x"}, True):
            with unittest.mock.patch.dict(os.environ, session, clear=True):
                with unittest.mock.patch("os.name", "nt"):
                    self.assertEqual(coarinbox.shows_colors(terminal), expected)


class FullHouseTest(InboxTest):
    """A system where no thread can be started."""

    errors_expected = True

    @with_settings(FSYNC=True)
    def test_requests_that_need_a_thread_are_refused_until_there_is_one(self) -> None:
        with NO_THREAD:
            for method, body in (("GET", None), ("POST", BODY)):
                answer = self.ask(method, "/inbox", body)
                self.assertEqual((answer.status, answer.headers["Retry-After"]), (503, "1"))
        self.assertIn("no thread can be started", self.log_lines())
        self.assert_serves()
        self.assertEqual(self.ask("GET", "/inbox").status, 200)

    def test_requests_wait_for_the_threads_that_there_are_and_others_are_served(self) -> None:
        head = get_head(target=drop_in(self.server))
        with reading_late() as (begun, released), connect(self.server, head) as first:
            self.assertTrue(begun.wait(10))
            self.assert_serves()
            with NO_THREAD as start, connect(self.server, head) as second:
                self.wait_until(lambda: start.called)
                released.set()
                self.assertEqual([answer_on(each).body for each in (first, second)], [BODY] * 2)


APP, DEV = "https://app.example", "http://localhost:3000"


class OtherSitesTest(InboxTest):
    """Pages of other sites, in the browser of somebody who runs an inbox: CORS_ORIGINS."""

    settings = {"CORS_ORIGINS": [APP, DEV]}
    allowed = {"Origin": APP, "Sec-Fetch-Site": "cross-site"}
    preflight = {**allowed, "Access-Control-Request-Method": "POST"}

    def test_who_may_post(self) -> None:
        """A page could fill the inbox of a developer who looked at it."""
        for origins, headers, status in [
            ((), {}, 201), ((), {"Sec-Fetch-Site": "none"}, 201), ((), {"Origin": "ours"}, 201),
            ((), {"Origin": FOREIGN}, 403), ((), {"Origin": "null"}, 403),
            ((), {"Origin": DEV, "Sec-Fetch-Site": "same-site"}, 403),
            ((), {"Sec-Fetch-Site": "cross-site"}, 403), ((APP, DEV), {"Origin": APP}, 201),
            ((APP, DEV), {"Origin": DEV}, 201), ((APP, DEV), {"Origin": "null"}, 403),
            ((APP, DEV), {"Origin": "http://app.example"}, 403),
            ((APP, DEV), {"Origin": "https://app.example.evil.example"}, 403),
            ("*", {"Origin": FOREIGN}, 201), ("*", {"Origin": "null"}, 201),
        ]:  # fmt: skip
            with self.subTest(origins, headers=headers), serving(CORS_ORIGINS=origins) as server:
                ours = "http://{}:{}".format(*address(server))
                named = {name: text.replace("ours", ours) for name, text in headers.items()}
                answer = ask(server, "POST", "/inbox", ACCEPT, named)
                self.assertEqual(answer.status, status)
                if status == 403:
                    self.assertIn("CORS_ORIGINS", answer.json()["detail"])
                if status == 403 or origins:  # whoever may post may not delete
                    self.assertEqual(ask(server, "DELETE", "/inbox", None, named).status, 403)

    def test_an_unusable_value_is_warned_about(self) -> None:
        """Flask-CORS has a setting of the same name, with other values."""
        for value in ([r"https?://.*\.example"], 5):
            with self.assertLogs("coarinbox", "WARNING") as log, serving(CORS_ORIGINS=value) as it:
                answer = ask(it, "POST", "/inbox", ACCEPT, {"Origin": FOREIGN})
            self.assertEqual(answer.status, 403)
            self.assertRegex("".join(log.output), "^(?!.*unknown setting).*CORS_ORIGINS")

    def test_what_a_page_that_is_allowed_can_read(self) -> None:
        answer = self.ask("POST", "/inbox", ACCEPT, self.allowed)
        self.assertIn("location", answer.headers["Access-Control-Expose-Headers"].lower())
        path = path_of(answer.headers["Location"])
        for method, resource, body, status, origin in [
            ("POST", "/inbox", REFUSED, 400, APP), ("GET", path, None, 200, APP),
            ("GET", "/deliveries", None, 200, None), ("DELETE", path, None, 403, None),
        ]:  # fmt: skip
            answer = self.ask(method, resource, body, self.allowed)
            answered = (answer.status, answer.headers["Access-Control-Allow-Origin"])
            self.assertEqual(answered, (status, origin), resource)

    @with_settings(TOKEN="secret")
    def test_a_browser_that_asks_first_is_told_without_a_token(self) -> None:
        headers = self.ask("OPTIONS", "/inbox", headers=self.preflight).headers
        self.assertEqual(headers["Access-Control-Allow-Origin"], APP)
        methods = set(re.findall("[A-Z]+", headers["Access-Control-Allow-Methods"]))
        self.assertEqual(methods & {"POST", "DELETE"}, {"POST"})
        names = set(re.findall("[a-z-]+", headers["Access-Control-Allow-Headers"].lower()))
        self.assertLessEqual({"content-type", "authorization"}, names)
        answer = self.ask("OPTIONS", "/inbox", headers={**self.preflight, "Origin": FOREIGN})
        self.assertNotIn("Access-Control-Allow-Origin", answer.headers)
        self.assertIn("CORS_ORIGINS", "".join(self.log_lines()))
        self.assertEqual(self.ask("OPTIONS", "/inbox").status, 401)

    def test_a_page_that_cannot_read_the_answer_finds_the_reason_in_the_log(self) -> None:
        delete = {**self.preflight, "Access-Control-Request-Method": "DELETE"}
        for method, path, headers, allowed in [
            ("GET", "/inbox", self.allowed, True), ("OPTIONS", "/inbox", self.preflight, True),
            ("GET", "/inbox", {"Origin": FOREIGN}, False), ("OPTIONS", "/inbox", delete, False),
            ("OPTIONS", "/deliveries", self.preflight, False),
        ]:  # fmt: skip
            self.log.clear()
            answer = self.ask(method, path, headers=headers)
            self.assertEqual("Access-Control-Allow-Origin" in answer.headers, allowed)
            reason = f"CORS_ORIGINS does not allow pages of {headers['Origin']} to do this"
            self.assertEqual(reason in "".join(self.log_lines()), not allowed)


class SharedStoreTest(DeliveriesTest):
    """A store that others use too, or have used."""

    OLD = "20200101_000000_" + "a" * 32  # the name of a notification from before

    def setUp(self) -> None:
        super().setUp()
        self.ask("GET", "/health")
        self.wait_until(lambda: not self.server.tasks)  # it has looked around

    def test_old_drafts_are_swept_at_the_start_and_young_ones_are_not(self) -> None:
        store, now = self.path.parent, time.time()
        old, young = (store / f".20200101_000000_{digit * 32}.part" for digit in "ab")
        for draft, age in ((old, 7200), (young, 600)):
            draft.write_bytes(BODY)
            os.utime(draft, (now - age, now - age))
        with beside(self.server):
            self.assertEqual((old.exists(), young.exists()), (False, True))

    def test_notifications_without_a_delivery_are_adopted_at_the_start(self) -> None:
        """Only clients that knew their names found them, and without a time."""
        start, name = utc_now(), last_part(drop_in(self.server, BODY, self.OLD))
        for _ in range(2):
            with beside(self.server) as other:
                self.wait_until(lambda: self.deliveries() != [])
                self.assertEqual(ask(other, "GET", f"/deliveries/{name}/body").body, BODY)
            (adopted,) = self.deliveries()
            self.assertEqual((adopted["name"], adopted["pattern"]), (name, "Accept"))
            self.assertGreaterEqual(adopted["time"], start)
        self.assertEqual(self.stored(), [name])
        with beside(self.server) as other:
            self.wait_until(lambda: other.ledger.known_as(ACCEPT["id"]) == name)

    def test_a_delivery_that_is_logged_while_it_looks_around_counts_once(self) -> None:
        self.post()
        with serving(STORE_DIR=self.server.store.directory) as server:
            self.wait_until(lambda: not server.tasks)
            ledger = coarinbox.Ledger(server.store.directory, fsync=False)
            ledger.record(delivered(OFFER, 404))
            *_, survey = ledger.survey("3")
            assert survey
            ledger.take_over(survey)
            ledger.record(delivered(OFFER, 404))
        self.assertEqual(sum(ledger.tally.values()), 3)

    def test_an_inbox_that_is_emptied_while_it_looks_around_adopts_nothing(self) -> None:
        drop_in(self.server, BODY, self.OLD)
        with reading_late() as (begun, released), beside(self.server) as other:
            self.assertTrue(begun.wait(10))
            self.assertEqual(ask(other, "DELETE", "/inbox").status, 204)
            released.set()
            self.wait_until(lambda: not other.tasks)  # it has looked at everything
        self.assertEqual((self.deliveries(), self.stored()), ([], []))

    def test_one_that_was_added_later_is_adopted_when_somebody_asks_for_it(self) -> None:
        added = [last_part(drop_in(self.server, body)) for body in (BODY, b"no JSON")]
        for name in added * 2:
            self.assertTrue(self.ask("GET", f"/deliveries/{name}").json()["time"])
        self.assertEqual([line["name"] for line in self.lines()], added)
        self.assertIn("not JSON", self.lines()[1]["detail"])

    @unittest.skipUnless(os.name == "posix", "Windows replaces no file that somebody reads")
    def test_followers_of_a_log_that_is_replaced_or_cut_begin_anew(self) -> None:
        for _ in range(3):
            self.post(REFUSED)
        log, (first, *others) = self.server.deliveries, self.path.read_bytes().splitlines(True)
        _, place = log.read(coarinbox.START)
        for lines in (others * 5, others * 2, [first]):  # longer, but not the same; cut; both
            self.path.write_bytes(b"".join(lines))
            read, place = log.read(place)
            self.assertEqual([line + b"\n" for line in read], lines)

    def test_a_line_that_is_written_just_when_somebody_looks_is_read_once(self) -> None:
        self.post(REFUSED)
        log, line = self.server.deliveries, self.path.read_bytes()
        late = unittest.mock.MagicMock()  # a file that was empty when its beginning was looked at
        file = late.__enter__.return_value
        file.read.side_effect, file.seek.return_value = [b"", line], 0
        with unittest.mock.patch.object(log, "open", return_value=late):
            lines, place = log.read(coarinbox.START)
        self.assertEqual(lines, [line.rstrip(b"\n")])
        self.assertEqual(log.read(place)[0], [])

    def test_a_delivery_carries_the_headers_of_its_answer(self) -> None:
        location = self.post().headers["Location"]
        self.ask("POST", "/inbox?status=503&retry-after=7", OFFER)
        refused, stored = (each["answer_headers"] for each in self.deliveries())
        self.assertEqual((stored["Location"], refused["Retry-After"]), (location, "7"))

    def test_a_line_that_somebody_edited_badly_hides_no_other_at_the_start(self) -> None:
        self.post()
        with self.path.open("ab") as log:
            log.write(self.path.read_bytes().replace(b'"id": "urn', b'"id": "\\q'))
        with beside(self.server) as other:
            self.wait_until(lambda: b"of 2" in ask(other, "GET", "/", None, HTML).body)


class AddressTest(unittest.TestCase):
    def assert_serves_localhost(self, *hosts: str) -> None:
        with serving(HOST="localhost") as server:
            for host in hosts:
                answer = fetch(f"http://{host}:{address(server)[1]}/inbox", "POST", ACCEPT)
                self.assertEqual(answer.status, 201)

    @NEEDS_IPV6
    def test_localhost_is_both_loopbacks(self) -> None:
        self.assert_serves_localhost("127.0.0.1", "[::1]", "localhost")

    def test_a_port_that_is_free_on_one_loopback_only_is_passed_over(self) -> None:
        """Clients have ports, too: of many inboxes that start, one met the port of a client."""
        in_use = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        bind, taken = socket.socket.bind, [in_use, in_use]

        def bind_later(sock: socket.socket, where: Any) -> None:
            if where[0] == "::1" and where[1] and taken:
                raise taken.pop()
            bind(sock, where)

        with unittest.mock.patch("socket.socket.bind", bind_later):
            self.assert_serves_localhost("127.0.0.1")

    @NEEDS_IPV6
    def test_a_port_that_was_asked_for_must_be_free_on_both_loopbacks(self) -> None:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
            port = other.getsockname()[1]
            with self.assertRaisesRegex(coarinbox.ConfigurationError, f"PORT {port}: .* is free"):
                serving(HOST="localhost", PORT=port).__enter__()

    def test_without_ipv6_localhost_is_one_loopback(self) -> None:
        bind = socket.socket.bind

        def bind_ipv4(sock: socket.socket, where: Any) -> None:
            if sock.family == socket.AF_INET6:
                raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
            bind(sock, where)

        with unittest.mock.patch("socket.socket.bind", bind_ipv4):
            self.assert_serves_localhost("127.0.0.1")

    def test_no_other_program_may_take_the_port(self) -> None:
        """Windows would let it, but for an option; here, another one stands for it."""
        option, create = socket.SO_KEEPALIVE, not hasattr(socket, "SO_EXCLUSIVEADDRUSE")
        with unittest.mock.patch("socket.SO_EXCLUSIVEADDRUSE", option, create=create):
            with serving(HOST="localhost") as server:
                for sock in server.sockets:
                    self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, option))

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no fork")
    def test_a_child_leaves_the_inbox_of_its_parent_alone(self) -> None:
        """A child that left the block closed the socket and removed the store."""
        code = """if True:
            import os, signal
            import coarinbox
            with coarinbox.running(VALIDATE_INCOMING=False) as inbox:
                coarinbox.send({"a": 1}, inbox.url)
                if os.fork() == 0:
                    signal.alarm(10)  # should it hang, it does not stay for ever
                else:
                    assert os.wait()[1] == 0
                    coarinbox.send({"a": 2}, inbox.url)
                    print(inbox.notifications)
        """
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=20)
        self.assertEqual(done.stdout, "[{'a': 1}, {'a': 2}]\n", done.stderr)
        self.assertEqual(done.returncode, 0)


class FirstDayTest(unittest.TestCase):
    """Likely mistakes of the first day, as somebody's tests show them."""

    def test_a_post_to_a_wrong_path_is_a_delivery(self) -> None:
        """It left no trace, and the test waited in vain."""
        with coarinbox.running() as inbox:
            paths = ["/", "/inboxes", "/ldn/inbox", "/inbox/x", "/constraints"]
            answers = [send(inbox.url.replace("/inbox", path), OFFER) for path in paths]
            for answer in (*answers, fetch(inbox.url, "PUT", OFFER)):
                self.assertIn(answer.status, (404, 405))
                self.assertIn(inbox.url, answer.json()["detail"])
            self.assertIn("POST", answer.headers["Allow"])
            self.assertEqual([each.target for each in inbox.deliveries], [*paths, "/inbox"])
            with self.assertRaisesRegex(AssertionError, rf"404[^\n]*{inbox.url}") as missing:
                inbox.wait_for(type="Offer", timeout=0)
            for line in (
                "404 refused POST /inboxes from",
                "POST /inbox/x",
                "405 refused PUT /inbox ",
            ):
                self.assertIn(line, str(missing.exception))
            with self.assertRaisesRegex(AssertionError, "unexpected"):
                inbox.assert_none()

    def test_a_proxy_that_does_not_remove_its_path(self) -> None:
        """The answer named the URL that had just been used."""
        with serving(BASE_URL="https://a.example/notify/") as server:
            detail = ask(server, "POST", "/notify/inbox", OFFER).json()["detail"]
            self.assertIn("the proxy has to remove /notify", detail)
            detail = ask(server, "POST", "/other/inbox", OFFER).json()["detail"]
            self.assertIn("POST notifications to https://a.example/notify/inbox", detail)

    def test_a_test_may_wait_without_a_limit(self) -> None:
        with coarinbox.running() as inbox, concurrent.futures.ThreadPoolExecutor(2) as pool:
            limits = (None, float("inf"))
            waits = [pool.submit(inbox.wait_for, type="Accept", timeout=each) for each in limits]
            send(inbox.url, ACCEPT)
            self.assertEqual([wait.result(10).status for wait in waits], [201, 201])
            for limit in limits:
                with self.assertRaisesRegex(AssertionError, "unexpected"):
                    inbox.assert_none(type="Accept", within=limit)

    def test_a_clock_that_was_set_back_hides_nothing(self) -> None:
        """Deliveries from before, which seem to lie in the future, did not count."""
        with coarinbox.running() as inbox:
            send(inbox.url, OFFER)
            log = pathlib.Path(inbox.server.store.directory, "deliveries.jsonl")
            log.write_bytes(re.sub(rb'"time": "\d{4}', b'"time": "2999', log.read_bytes()))
            self.assertEqual(inbox.wait_for(type="Offer", timeout=0).status, 201)
            with self.assertRaisesRegex(AssertionError, "unexpected"):
                inbox.assert_none(type="Offer")


class StrictTest(InboxTest):
    """HTTP, where other clients and older versions were less exact."""

    def test_a_parameter_that_a_method_does_not_know_is_refused(self) -> None:
        """`DELETE /inbox?before=x` emptied the inbox of somebody who looked for retention."""
        path = path_of(self.post().headers["Location"])
        for method, target in [
            ("DELETE", "/inbox?before=" + path[7:]), ("DELETE", "/inbox?status=503"),
            ("DELETE", f"{path}?x=1"), ("GET", f"{path}?x=1"), ("GET", "/inbox?limit=1"),
            ("GET", "/?status=4xx&x=1"), ("GET", "/deliveries?x=1"), ("GET", "/constraints?x=1"),
            ("GET", f"/deliveries{path[6:]}?x=1"), ("POST", "/inbox?before=x"),
        ]:  # fmt: skip
            with self.subTest(method, target=target):
                body = BODY if method == "POST" else None
                self.assert_problem(self.ask(method, target, body), 400)
        for method in ("GET", "HEAD", "OPTIONS"):  # clients ask before they post
            answer = self.ask(method, "/inbox?status=503&times=2&retry-after=1&delay=1&close=1")
            self.assertIn(answer.status, (200, 204))
        self.assertEqual(self.ask("GET", path).body, BODY)

    def test_a_response_has_the_header_that_its_status_demands(self) -> None:
        for request_, status, header in [
            (post_to("?status=401"), 401, "WWW-Authenticate"),
            (post_to("?status=405"), 405, "Allow"), (post_to("?status=426"), 426, "Upgrade"),
            (post_to("?status=407"), 407, "Proxy-Authenticate"),
            (get_head(target="*").replace(b"GET", b"OPTIONS"), 204, "Allow"),  # the server itself
        ]:  # fmt: skip
            answer = self.ask_raw(request_)
            self.assertEqual((answer.status, bool(answer.headers[header])), (status, True))

    def test_a_client_that_speaks_tls_is_called_by_its_name(self) -> None:
        with connect(self.server) as connection, self.assertRaises(OSError):
            ssl.create_default_context().wrap_socket(connection, server_hostname="localhost")
        self.wait_until(lambda: self.log_lines() != [])
        self.assertRegex("".join(self.log_lines()), r"^(?!.*x03).*TLS")

    def test_a_client_that_has_said_everything_gets_its_answer(self) -> None:
        for fsync in (False, True):
            with serving(FSYNC=fsync) as server:
                (answer,) = raw(server, post_to(), "half-close")
                self.assertEqual(answer.status, 201)
        self.assertEqual(raw(self.server, post_to("?delay=60"), "half-close"), [])  # it has left


class CommitTest(InboxTest):
    """Notifications that arrive together reach the disk together."""

    settings = {"FSYNC": True}
    errors_expected = True

    def post_together(self, *lengths: int) -> list[int]:
        """Send notifications at once; those that are accepted are there, and nothing else is."""
        bodies = [json.dumps(altered("Accept", summary="x" * n)).encode() for n in lengths]
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(self.server, post_to("", b))) for b in bodies]
            answers = [answer_on(client) for client in clients]
        accepted = [body for body, answer in zip(bodies, answers) if answer.status == 201]
        store = pathlib.Path(self.server.store.directory)
        stored = [(store / file).read_bytes() for file in files_in(store)]
        self.assertEqual(sorted(stored), sorted(accepted))
        return [answer.status for answer in answers]

    @contextlib.contextmanager
    def disk(self, fails: Callable[[os.stat_result], int] = lambda _: 0) -> Iterator[list[int]]:
        """Have a slow disk whose errors we choose; yields the kinds of file that were synced."""
        synced: list[int] = []

        def sync(descriptor: int) -> None:
            status = os.fstat(descriptor)
            synced.append(stat.S_IFMT(status.st_mode))
            time.sleep(0.02)
            if number := fails(status):
                raise OSError(number, os.strerror(number))

        with syncing_with(sync):
            yield synced

    @unittest.skipUnless(importlib.util.find_spec("fcntl"), "the system has no such call")
    def test_a_drive_with_a_cache_of_its_own_is_told_to_empty_it(self) -> None:
        """On macOS, `os.fsync` leaves a notification in there."""
        told = unittest.mock.Mock()
        with self.disk() as synced:
            with unittest.mock.patch.multiple("fcntl", create=True, F_FULLFSYNC=51, fcntl=told):
                self.assertEqual(self.post_together(1), [201])
        self.assertEqual([call.args[1] for call in told.call_args_list], [51, 51])
        self.assertEqual(synced, [])

    def test_they_share_a_sync_of_the_directory(self) -> None:
        with self.disk() as synced:
            self.assertEqual(self.post_together(*range(24)), [201] * 24)
        self.assertEqual(synced.count(stat.S_IFREG), 24)
        self.assertLessEqual(synced.count(stat.S_IFDIR), 12)

    def test_each_fails_by_itself(self) -> None:
        with self.disk(lambda status: errno.ENOSPC if status.st_size > 5000 else 0):
            self.assertEqual(self.post_together(*[9000, 1] * 8), [507, 201] * 8)

    @unittest.skipUnless(stat.S_IFDIR in SYNCED_KINDS, "nobody can sync a directory here")
    def test_a_directory_that_cannot_be_synced_fails_all_of_them(self) -> None:
        with self.disk(lambda status: errno.EIO if stat.S_ISDIR(status.st_mode) else 0):
            self.assertEqual(self.post_together(*range(8)), [500] * 8)
        self.assert_serves()

    def test_without_another_thread_one_syncs_them_all(self) -> None:
        self.assertEqual(self.ask("GET", "/inbox").status, 200)  # which starts one
        with NO_THREAD, self.disk() as synced:
            self.assertEqual(self.post_together(*range(8)), [201] * 8)
        self.assertLess(synced.count(stat.S_IFDIR), 8)


class StartAndEndTest(ProgramTest):
    """Starts that go wrong end with one line and status 2, and ends are quiet."""

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no device that is always full")
    def test_it_serves_though_standard_error_is_closed_or_full(self) -> None:
        """And though SIGHUP arrives, which its parent has disabled, as `nohup` does."""
        inboxes = {}
        for way in ("2>&-", "2>/dev/full"):
            port = free_port()
            command = self.command("--port", str(port), "--store", way[-3:])
            shell = ["sh", "-c", f'trap "" HUP; exec "$0" "$@" {way}', *command]
            options: Any = {"cwd": self.directory, "stdout": subprocess.DEVNULL}
            inboxes[port] = subprocess.Popen(shell, **options)
            self.addCleanup(inboxes[port].kill)
        for port, inbox in inboxes.items():
            while not can_connect(("localhost", port)):
                self.assertIsNone(inbox.poll())
            inbox.send_signal(signal.SIGHUP)
            self.assertEqual(send(f"http://localhost:{port}/inbox").status, 201)
            inbox.terminate()
            self.assertEqual(inbox.wait(20), 0)

    def test_an_unusable_configuration_is_refused_in_one_line(self) -> None:
        for text in ("raise KeyboardInterrupt", "globals()[5] = 1; PORT = 'x'"):
            self.fail_to_start("--config", self.config(text))
        self.fail_to_start("--config", "")

    def test_a_signal_in_the_first_moments_ends_it_quietly(self) -> None:
        """The configuration sends it, because nobody else knows when the first moments are."""
        processes = {}
        for number in [each for each in signal.Signals if each.name in coarinbox.STOP_SIGNALS]:
            path = self.directory / number.name
            path.write_text(f"import signal; signal.raise_signal({int(number)})")
            command = [sys.executable, str(MODULE), "--port", "0", "--config", str(path)]
            options: Any = {"env": environment(), "stderr": subprocess.PIPE}
            processes[number] = subprocess.Popen(command, **options)
            self.addCleanup(processes[number].kill)
        for number, process in processes.items():
            _, errors = process.communicate(timeout=20)
            self.assertEqual((process.returncode, errors), (128 + number, b""))

    def test_a_python_that_is_too_old_is_told_so(self) -> None:
        """Before 3.8, that is with the line that such a Python cannot read."""
        with unittest.mock.patch("sys.version_info", (3, 8, 20)):
            with self.assertRaises(SystemExit) as caught:
                runpy.run_path(str(MODULE))
        expected = "coarinbox needs Python 3.9 or later, and this is 3.8"
        self.assertEqual(caught.exception.code, expected)
        for python in glob.glob(os.path.expanduser("~/.pyenv/versions/[23].[0-8]*/bin/python")):
            if re.search(r"/(2\.7|3\.[0-8])\.", python):
                done = subprocess.run([python, str(MODULE)], capture_output=True, text=True)
                with self.subTest(python):
                    self.assertNotEqual(done.returncode, 0)
                    self.assertRegex(done.stderr, r"^(?s:(?!.*Traceback).*3\.9)")


# --- The coarnotify package as a client ----------------------------------------------------------


class ClientTest(unittest.TestCase):
    @unittest.skipUnless(importlib.util.find_spec("coarnotify"), "coarnotify is not installed")
    def test_its_own_integration_tests_pass(self) -> None:
        from coarnotify.test.integration import test_client

        for mode in (True, "coarnotify"):
            tests = unittest.defaultTestLoader.loadTestsFromModule(test_client)
            output = io.StringIO()
            with coarinbox.running(VALIDATE_INCOMING=mode) as inbox:
                # They expect it at port 5005, where another one may run.
                with unittest.mock.patch.object(test_client, "INBOX", inbox.url):
                    with contextlib.redirect_stdout(output):
                        result = unittest.TextTestRunner(output).run(tests)
                self.assertTrue(result.wasSuccessful(), output.getvalue())
                self.assertEqual((result.testsRun, len(inbox.notifications)), (12, 12))


# --- The files -----------------------------------------------------------------------------------


# What the examples of the README import and start: code that tries again when an inbox is busy.
MY_CODE = """\
import coarinbox, sys

def request_review(inbox):
    offer = coarinbox.sample("Request Review")
    while not coarinbox.send(offer, inbox).accepted:
        pass
"""
MY_PROGRAM = f"#!{sys.executable}\n{MY_CODE}\nrequest_review(sys.argv[1])\n"
# What comes before an example that begins with a running inbox.
STARTED = "python coarinbox.py 2> log &\nuntil curl -s localhost:5005/health; do sleep 0.1; done\n"
README = (HERE / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Find the blocks of code in the README that are in a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert found, language
    return found


def sessions() -> Iterator[tuple[str, str]]:
    """Yield each command that follows a prompt, and what it prints as the README has it."""
    for block in blocks("console"):
        for session in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            match = re.match(r"((?:.*[|\\]\n)*.*\n)((?s:.*))", session)
            assert match, session
            yield match[1], match[2]


def run_example(script: str) -> str:
    """Run a shell script to its end, where a reader of the README would; returns the output.

    Another inbox may run on the ports of the README, so that these are replaced everywhere.
    """
    ports = {port: str(free_port()) for port in ("5005", "5006")}

    def moved(text: str) -> str:
        return re.sub("500[56]", lambda match: ports[match[0]], text)

    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        for file, text in (("coarinbox.py", MODULE.read_text("utf-8")), ("my-program", MY_PROGRAM)):
            (directory / file).write_text(moved(text), encoding="utf-8")
            (directory / file).chmod(0o755)
        for python in ("python", "python3"):
            (directory / python).symlink_to(sys.executable)
        env = environment(PATH=f"{name}:{os.environ['PATH']}", TMPDIR=name, RUNNER_TEMP=name)
        env.pop("COVERAGE_PROCESS_START", None)  # nobody could look at the copy afterwards
        # The end of the shell is also that of the inboxes in the background.
        shell = ["sh", "-c", f"trap 'kill -9 0' EXIT\n{moved(script)}\necho END"]
        printed = subprocess.run(
            shell, cwd=directory, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=30, start_new_session=True,
        ).stdout  # fmt: skip
    for port, other in ports.items():
        printed = printed.replace(other, port)
    return str(printed)


class ReadmeTest(ProgramTest):
    def test_the_first_screen_holds_the_essential(self) -> None:
        lines = README.splitlines()
        first = "\n".join(lines[:45])
        for essential in ("(.github/page.png)", "not a production", "python coarinbox.py\n",
                          "uv run", "--sample", "curl", "201 Created", "Location:",
                          "400 Bad Request", "write `"):  # fmt: skip
            self.assertIn(essential, first)
        self.assertLessEqual(len(lines), 230)
        self.assertLess(lines.index("## It answers"), len(lines) / 3)

    def test_what_it_links_to_is_there(self) -> None:
        files = re.findall(r"\]\((?!https:)([^)]+)\)", README)
        self.assertGreater(len(files), 3)
        self.assertEqual([file for file in files if not (HERE / file).is_file()], [])

    def test_the_settings_are_those_of_the_code(self) -> None:
        rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| (.+?) \|", README, re.MULTILINE)
        settings = [
            (name.strip("`"), value.strip("`"))
            for names, values in rows
            for name, value in itertools.zip_longest(names.split(", "), values.split(", "))
        ]
        expected = [(name, repr(value)) for name, value in vars(coarinbox.Settings()).items()]
        self.assertEqual(settings, expected)

    def test_the_flags_are_those_of_the_program(self) -> None:
        help_ = " ".join(" ".join(self.invoke("--help").output).split())
        flags = set(re.findall("`(--[a-z]+(?: [A-Z]+)?)", README))
        self.assertGreater(len(flags), 5)
        self.assertEqual({flag for flag in flags if f"{flag} " not in help_}, set())

    def test_the_parameters_that_select_deliveries_are_those_of_the_code(self) -> None:
        listed = re.search(r"\n(`status` .*?)\s+select\s+deliveries", README, re.DOTALL)
        assert listed
        without_examples = re.sub(r"\(.*?\)", "", listed[1], flags=re.DOTALL)
        names = set(re.findall("`([a-z]+)`", without_examples))
        self.assertEqual(names, set(coarinbox.QUERY_PARAMETERS))


class ExampleTest(unittest.TestCase):
    """The examples in the README, as they are written."""

    @unittest.skipUnless(os.name == "posix" and shutil.which("curl"), "they need a shell and curl")
    def test_each_command_prints_what_follows_it_and_scripts_do_what_they_show(self) -> None:
        (talk,), (service, step) = blocks("sh"), blocks("yaml")
        talk = talk.replace("sleep 2", "until grep -q 'Announce Review' log; do sleep 0.1; done")
        (command,) = re.findall("command: (.*)", service)
        (health,) = re.findall('test: "(.*?)"', service)
        container = f"{command} &\nuntil {health}; do kill -0 $!; sleep 0.1; done\n"
        container = container.replace(" /coarinbox.py", " coarinbox.py").replace("/tmp/", "")
        commands, shown = zip(*sessions())
        scripts = [STARTED + talk, step.partition("run: |\n")[2]]
        scripts += [container] if shutil.which("wget") else []
        typed = STARTED + "\necho END\n".join(commands)
        with concurrent.futures.ThreadPoolExecutor() as pool:  # some of them wait
            results = pool.map(run_example, [typed, *(f"set -e\n{each}" for each in scripts)])
        outputs, *others = (printed.split("\nEND\n") for printed in results)
        self.assertEqual(len(outputs), len(shown) + 1, outputs)
        for expected, printed in zip(shown, outputs):
            name = re.compile("[0-9]{8}_[0-9]{6}_[0-9a-f]{32}")
            wanted, given = name.sub("NAME", expected), name.sub("NAME", printed) + "\n"
            matches = doctest.OutputChecker().check_output(wanted, given, doctest.ELLIPSIS)
            self.assertTrue(matches, printed)
        replies = ("Announce Review", "Accept", "Tentatively Accept")
        received = "\n".join(f'"pattern": "{reply}"' for reply in replies)
        parts = received, '"pattern": "Request Review"', "address     0.0.0.0 port 5005"
        for part, (printed, *end) in zip(parts, others):
            self.assertIn(part, printed)
            self.assertEqual(len(end), 1, printed)  # each of its commands succeeded

    def test_those_in_python_do_what_they_show(self) -> None:
        names: dict[str, Any] = {}
        exec(MY_CODE, names)
        my_code = unittest.mock.Mock(request_review=names["request_review"])
        with unittest.mock.patch.dict(sys.modules, my_code=my_code):
            for example in blocks("python"):
                exec(example.replace("(REPLIES=", "(REPLY_DELAY=0, REPLIES="), names)  # at once
        names["test_a_busy_inbox_is_tried_again"]()
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(names["ReviewTest"]).run(result)
        self.assertTrue(result.testsRun == 1 and result.wasSuccessful(), result)


class ShapeTest(unittest.TestCase):
    source = MODULE.read_text(encoding="utf-8")
    sections = re.findall("^# --- (.*?) -+$", source, re.MULTILINE)

    def test_it_says_which_version_it_is(self) -> None:
        self.assertRegex(coarinbox.__version__, r"^[0-9]+\.[0-9]+\.[0-9]+$")

    def test_its_head_and_the_guide_for_contributors_name_the_sections_in_their_order(self) -> None:
        self.assertGreater(len(self.sections), 15)
        lists = re.findall("^    [a-zA-Z ]+?   +([A-Z].*)$", coarinbox.__doc__ or "", re.MULTILINE)
        self.assertEqual(", ".join(lists).split(", "), self.sections)
        guide = (HERE / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
        self.assertEqual(re.findall(r"^\| ([A-Z].*?) \|", guide, re.MULTILINE), self.sections)
        self.assertLessEqual(len(guide.splitlines()), 120)

    def test_its_head_tells_words_apart_that_look_alike(self) -> None:
        words = re.findall(r"\*(.*?)\*", coarinbox.__doc__ or "", re.DOTALL)
        self.assertEqual(words, ["finding", "problem", "simulated failure", "bug"])

    def test_functions_are_short_and_only_the_standard_library_is_imported(self) -> None:
        lengths, imported = {}, set()
        for node in ast.walk(ast.parse(self.source)):
            if isinstance(node, ast.FunctionDef):
                lengths[node.name] = (node.end_lineno or 0) - node.lineno + 1
            elif isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
        self.assertGreater(len(lengths), 50)
        self.assertEqual({name: lines for name, lines in lengths.items() if lines > 40}, {})
        if sys.version_info >= (3, 10):
            optional = {"coarnotify", "pydevd"}
            self.assertEqual(imported - sys.stdlib_module_names, optional)


if __name__ == "__main__":
    unittest.main()
