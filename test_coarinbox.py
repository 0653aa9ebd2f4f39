# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""The tests of coarinbox: `python -m unittest` runs them, with nothing installed.

Those that compare with the `coarnotify` package, or need another optional program, are skipped
where it is missing.
"""

from __future__ import annotations

import ast
import base64
import concurrent.futures
import contextlib
import copy
import datetime
import doctest
import errno
import functools
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
import re
import shutil
import signal
import socket
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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import coarinbox
from coarinbox import E, M, S

HERE = pathlib.Path(__file__).resolve().parent
MODULE = HERE / "coarinbox.py"
JSON_LD = "application/ld+json"
PROC = os.path.isdir("/proc/self/fd")  # where the descriptors of a process can be counted

# --- Notifications -------------------------------------------------------------------------------

ABSENT = object()  # as the value of a member: not there

REPOSITORY = {
    "id": "https://repository.example.org/",
    "inbox": "https://repository.example.org/inbox/",
    "type": "Service",
}
JOURNAL = {
    "id": "https://journal.example.com/system",
    "inbox": "https://journal.example.com/inbox",
    "type": "Service",
}
AUTHOR = {"id": "https://orcid.org/0000-0002-1825-0097", "name": "J. Carberry", "type": "Person"}
EDITORS = {"id": "https://journal.example.com/", "name": "The Journal", "type": "Organization"}
PREPRINT = {
    "id": "https://repository.example.org/preprint/421",
    "ietf:cite-as": "https://doi.org/10.5555/12345680",
    "ietf:item": {
        "id": "https://repository.example.org/preprint/421/content.pdf",
        "mediaType": "application/pdf",
        "type": ["Article", "sorg:ScholarlyArticle"],
    },
    "type": ["Page", "sorg:AboutPage"],
}
REVIEW = {
    "id": "https://journal.example.com/review/7",
    "ietf:cite-as": "https://doi.org/10.5555/98765",
    "type": ["Page", "sorg:Review"],
}
RELATIONSHIP = {
    "id": "urn:uuid:74fff356-0632-44d9-b176-888da85758dc",
    "as:subject": "https://journal.example.com/article/1",
    "as:relationship": "http://purl.org/vocab/frbr/core#supplement",
    "as:object": "https://repository.example.org/preprint/421",
    "type": "Relationship",
}
OFFER_ID = "urn:uuid:0370c0fb-bb78-4a9b-87f5-bed307a509dd"


def notification(type_: Any, sender: Any, actor: Any, receiver: Any, **members: Any) -> Any:
    return {
        "@context": ["https://www.w3.org/ns/activitystreams", "https://coar-notify.net"],
        "id": "urn:uuid:94ecae35-dcfd-4182-8550-22c7164fe23f",
        "type": type_,
        "origin": sender,
        "target": receiver,
        "actor": actor,
        **members,
    }


def request(action: str) -> Any:
    offer = notification(["Offer", action], REPOSITORY, AUTHOR, JOURNAL, object=PREPRINT)
    return {**offer, "id": OFFER_ID}


def answer(type_: str, action: str = "coar-notify:ReviewAction") -> Any:
    offer = {name: value for name, value in request(action).items() if name != "@context"}
    sender = (REPOSITORY, AUTHOR, JOURNAL) if type_ == "Undo" else (JOURNAL, EDITORS, REPOSITORY)
    return notification(type_, *sender, inReplyTo=OFFER_ID, object=offer)


def announce(type_: Any, object_: Any = REVIEW) -> Any:
    about = {"context": PREPRINT, "inReplyTo": OFFER_ID, "object": object_}
    return notification(type_, JOURNAL, EDITORS, REPOSITORY, **about)


# One notification of each pattern, without any fault; as JSON, so that they share no parts.
NOTIFICATIONS: dict[str, Any] = json.loads(
    json.dumps(
        {
            "Accept": answer("Accept"),
            "Announce Endorsement": announce(["Announce", "coar-notify:EndorsementAction"]),
            "Announce Relationship": announce(
                ["Announce", "coar-notify:RelationshipAction"],
                {**RELATIONSHIP, "ietf:cite-as": "https://doi.org/10.5555/1"},
            ),
            "Announce Review": announce(["Announce", "coar-notify:ReviewAction"]),
            "Announce Service Result": announce("Announce"),
            "Reject": answer("Reject"),
            "Request Endorsement": request("coar-notify:EndorsementAction"),
            "Request Review": request("coar-notify:ReviewAction"),
            "Tentatively Accept": answer("TentativeAccept"),
            "Tentatively Reject": answer("TentativeReject"),
            "Unprocessable Notification": notification(
                ["Flag", "coar-notify:UnprocessableNotification"],
                JOURNAL,
                EDITORS,
                REPOSITORY,
                inReplyTo=OFFER_ID,
                object={"id": OFFER_ID},
                summary="It answers with 404.",
            ),
            "Undo Offer": answer("Undo", "coar-notify:EndorsementAction"),
        }
    )
)


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


def members(document: Any, prefix: str = "") -> list[str]:
    """List the dotted names of all the members of a notification, those of its parts included."""
    names = []
    for name, value in document.items():
        names.append(prefix + name)
        if isinstance(value, dict):
            names += members(value, f"{prefix}{name}.")
    return names


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


def ask(
    server: Any, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> Answer:
    """Send one request on a connection of its own; a body that is no octets is sent as JSON."""
    connection = http.client.HTTPConnection(*address(server), timeout=10)
    try:
        return ask_on(connection, method, path, body, headers)
    finally:
        connection.close()


def ask_on(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    defaults = {"Content-Type": JSON_LD} if body is not None else {}
    connection.request(method, path, body, {**defaults, **(headers or {})})
    response = connection.getresponse()
    return Answer(response.status, response.headers, response.read())


def address(server: Any) -> tuple[str, int]:
    host, port = server.server_address[:2]
    return str(host), int(port)


def raw(server: Any, octets: bytes, then: str = "read") -> list[Answer]:
    """Send octets as they are and read every answer until the server ends the connection.

    What follows: "read" leaves our side open, "half-close" closes it first.
    """
    with socket.create_connection(address(server), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):  # it may answer before it has read everything
            connection.sendall(octets)
        if then == "half-close":
            connection.shutdown(socket.SHUT_WR)
        answers = []
        with connection.makefile("rb") as stream:
            while line := stream.readline():
                answers.append(read_answer(line, stream))
        return answers


def read_answer(status_line: bytes, stream: Any) -> Answer:
    version, status = status_line.split()[:2]
    assert version == b"HTTP/1.1", status_line
    headers = http.client.parse_headers(stream)
    return Answer(int(status), headers, stream.read(int(headers.get("Content-Length", 0))))


def post_head(*lines: str) -> bytes:
    """Make the head of a POST to the inbox that has these header lines besides."""
    head = ["POST /inbox HTTP/1.1", "Host: localhost", f"Content-Type: {JSON_LD}", *lines, "", ""]
    return "\r\n".join(head).encode("latin-1")


ACCEPT = NOTIFICATIONS["Accept"]
BODY = json.dumps(ACCEPT).encode()


def utc_now() -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    return now.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now.microsecond // 1000:03}Z"


def files_in(store: Any) -> list[str]:
    """List what lies in a store beside the log of the deliveries."""
    return sorted(set(os.listdir(store)) - {"deliveries.jsonl"})


class InboxTest(unittest.TestCase):
    """Tests against an inbox of their own, which must not log a fault of its own meanwhile."""

    settings: dict[str, Any] = {}
    faults_expected = False

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
        context = serving(**self.settings)
        self.server = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Look again and again whether something is so; it must be within ten seconds."""
        deadline = time.monotonic() + 10
        while not condition():
            self.assertLess(time.monotonic(), deadline, "it did not happen")
            time.sleep(0)  # it needs the interpreter

    def check_log(self) -> None:
        faults = [line.getMessage() for line in self.log if line.levelno >= logging.ERROR]
        if not self.faults_expected:
            self.assertEqual(faults, [])

    def log_lines(self) -> list[str]:
        return [line.getMessage() for line in self.log]

    def ask(self, *arguments: Any, **more: Any) -> Answer:
        return ask(self.server, *arguments, **more)

    def post(self, document: Any = ACCEPT, **headers: str) -> Answer:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", "/inbox", document, names)

    def stored(self) -> list[str]:
        return list(self.server.store.names())

    def listed(self, **more: Any) -> list[str]:
        listing = self.ask("GET", "/inbox", **more).json()
        return [entry["@id"] for entry in listing["ldp:contains"]]

    def assert_problem(self, answer: Answer, status: int) -> Any:
        """Assert that an answer is a problem document (RFC 9457); returns it."""
        self.assertEqual(answer.status, status, answer)
        self.assertEqual(answer.headers["Content-Type"], "application/problem+json")
        problem = answer.json()
        self.assertEqual(problem["status"], status)
        self.assertTrue(problem["title"] and problem["detail"])
        self.assertEqual(problem["type"], "about:blank")
        return problem

    def assert_serves(self) -> None:
        self.assertEqual(self.post().status, 201)


# --- Rules ---------------------------------------------------------------------------------------

# Each rule, broken: code, level, pattern, member, the value that breaks it.
# fmt: off
BROKEN: list[tuple[str, str, str, str, Any]] = [
    ("@context-required", M, "Accept", "@context", ABSENT),
    ("@context-namespaces", M, "Accept", "@context", "https://www.w3.org/ns/activitystreams"),
    ("@context-namespaces", M, "Reject", "@context", ["https://www.w3.org/ns/activitystreams"]),
    ("@context-namespaces", M, "Reject", "@context", ["https://coar-notify.net"]),
    ("@context-current", S, "Accept", "@context",
     ["https://www.w3.org/ns/activitystreams", "https://purl.org/coar/notify"]),
    ("@context-current", S, "Accept", "@context",
     ["https://www.w3.org/ns/activitystreams", "https://purl.org/coar/notify/"]),
    ("@context-current", S, "Undo Offer", "@context",
     ["https://www.w3.org/ns/activitystreams", "https://coar-notify.net/"]),
    ("id-required", E, "Request Review", "id", ABSENT),
    ("id-required", E, "Announce Review", "id", None),
    ("id-absolute-uri", E, "Request Review", "id", "/notifications/1"),
    ("id-absolute-uri", E, "Announce Review", "id", ["urn:uuid:1"]),
    ("id-preferred", S, "Request Review", "id", "urn:uuid:94ecae35dcfd4182855022c7164fe23f"),
    ("id-preferred", S, "Reject", "id", "info:notification/1"),
    ("type-required", E, "Accept", "type", ABSENT),
    ("type-strings", E, "Accept", "type", ["Accept", 5]),
    ("type-pattern", E, "Accept", "type", "Acept"),
    ("type-pattern", E, "Request Review", "type", ["Offer", "coar-notify:IngestAction"]),
    ("type-known-actions", S, "Announce Service Result", "type", ["Announce", "ReviewAction"]),
    ("type-known-actions", S, "Announce Service Result", "type",
     ["Announce", "coar-notify:EndorsmentAction"]),
    ("origin-required", E, "Announce Review", "origin", ABSENT),
    ("origin-object", E, "Accept", "origin", "https://repository.example.org/"),
    ("origin.id-required", E, "Accept", "origin.id", ABSENT),
    ("origin.id-http-uri", E, "Announce Endorsement", "origin.id", OFFER_ID),
    ("origin.type-required", M, "Accept", "origin.type", ABSENT),
    ("origin.type-strings", M, "Accept", "origin.type", {"@id": "Service"}),
    ("origin.type-service", S, "Accept", "origin.type", ["Application"]),
    ("origin.inbox-required", S, "Accept", "origin.inbox", ABSENT),
    ("origin.inbox-http-uri", M, "Accept", "origin.inbox", "mailto:inbox@example.org"),
    ("target-required", E, "Accept", "target", None),
    ("target-object", E, "Announce Relationship", "target", []),
    ("target.id-required", E, "Accept", "target.id", ABSENT),
    ("target.id-http-uri", E, "Accept", "target.id", 7),
    ("target.type-required", M, "Undo Offer", "target.type", ABSENT),
    ("target.type-strings", M, "Undo Offer", "target.type", [["Service"]]),
    ("target.type-service", S, "Undo Offer", "target.type", "Person"),
    ("target.inbox-required", M, "Accept", "target.inbox", ABSENT),
    ("target.inbox-http-uri", M, "Accept", "target.inbox", "/inbox"),
    ("object-required", E, "Announce Review", "object", ABSENT),
    ("object-object", E, "Unprocessable Notification", "object", OFFER_ID),
    ("object.id-required", E, "Request Review", "object.id", ABSENT),
    ("object.id-absolute-uri", E, "Announce Review", "object.id", "review/7"),
    ("object.id-http-uri", M, "Request Review", "object.id", "doi:10.5555/12345680"),
    ("actor-required", S, "Accept", "actor", ABSENT),
    ("actor-object", E, "Announce Service Result", "actor", "J. Carberry"),
    ("actor.id-required", M, "Accept", "actor.id", ABSENT),
    ("actor.id-absolute-uri", E, "Accept", "actor.id", "0000-0002-1825-0097"),
    ("actor.type-required", M, "Accept", "actor.type", ABSENT),
    ("actor.type-actor", E, "Accept", "actor.type", "Robot"),
    ("actor.type-single", S, "Accept", "actor.type", ["Person"]),
    ("inReplyTo-required", E, "Accept", "inReplyTo", ABSENT),
    ("inReplyTo-required", E, "Unprocessable Notification", "inReplyTo", ABSENT),
    ("inReplyTo-absolute-uri", E, "Announce Review", "inReplyTo", "previous"),
    ("inReplyTo-equals-object.id", E, "Reject", "inReplyTo", "urn:uuid:another"),
    ("context-required", E, "Announce Relationship", "context", ABSENT),
    ("context-object", E, "Announce Review", "context", "https://example.org/preprint/421"),
    ("context.id-required", E, "Announce Review", "context.id", ABSENT),
    ("context.id-http-uri", E, "Announce Review", "context.id", "doi:10.5555/12345680"),
    ("context.id-equals-object.as:object", M, "Announce Relationship", "context.id",
     "https://repository.example.org/preprint/422"),
    ("context.type-as2-object", M, "Announce Review", "context.type", "sorg:AboutPage"),
    ("context.ietf:cite-as-http-uri", M, "Announce Review", "context.ietf:cite-as", "10.5555/1"),
    ("context.ietf:item-object", M, "Announce Review", "context.ietf:item", "content.pdf"),
    ("context.ietf:item.id-required", M, "Announce Review", "context.ietf:item.id", ABSENT),
    ("context.ietf:item.id-http-uri", M, "Announce Review", "context.ietf:item.id", "1.pdf"),
    ("context.ietf:item.type-required", M, "Announce Review", "context.ietf:item.type", ABSENT),
    ("context.ietf:item.type-as2-object", M, "Announce Review", "context.ietf:item.type", "PDF"),
    ("context.ietf:item.mediaType-required", M, "Announce Review", "context.ietf:item.mediaType",
     ABSENT),
    ("context.ietf:item.mediaType-media-type", M, "Announce Review",
     "context.ietf:item.mediaType", "pdf"),
    ("object.type-required", M, "Request Review", "object.type", ABSENT),
    ("object.type-required", E, "Announce Review", "object.type", ABSENT),
    ("object.type-required", E, "Accept", "object.type", ABSENT),
    ("object.type-as2-object", M, "Request Endorsement", "object.type", ["sorg:AboutPage"]),
    ("object.type-as2-object", E, "Announce Endorsement", "object.type", "sorg:Review"),
    ("object.type-strings", E, "Tentatively Accept", "object.type", 5),
    ("object.type-offer", M, "Tentatively Reject", "object.type", "Invite"),
    ("object.ietf:cite-as-required", S, "Request Review", "object.ietf:cite-as", ABSENT),
    ("object.ietf:cite-as-required", S, "Announce Review", "object.ietf:cite-as", ABSENT),
    ("object.ietf:cite-as-http-uri", M, "Request Review", "object.ietf:cite-as", "doi:10.5555/1"),
    ("object.ietf:cite-as-http-uri", M, "Announce Review", "object.ietf:cite-as", "doi:10.5555/1"),
    ("object.ietf:item-required", M, "Request Review", "object.ietf:item", ABSENT),
    ("object.ietf:item-object", M, "Request Review", "object.ietf:item", ["1.pdf"]),
    ("object.ietf:item.id-required", M, "Request Review", "object.ietf:item.id", ABSENT),
    ("object.ietf:item.id-http-uri", M, "Request Review", "object.ietf:item.id", "1.pdf"),
    ("object.ietf:item.type-required", M, "Request Review", "object.ietf:item.type", ABSENT),
    ("object.ietf:item.type-as2-object", M, "Request Review", "object.ietf:item.type", "PDF"),
    ("object.ietf:item.mediaType-required", M, "Request Review", "object.ietf:item.mediaType",
     ABSENT),
    ("object.ietf:item.mediaType-media-type", M, "Request Review",
     "object.ietf:item.mediaType", "application"),
    ("object.as:subject-required", E, "Announce Relationship", "object.as:subject", ABSENT),
    ("object.as:subject-absolute-uri", E, "Announce Relationship", "object.as:subject", "this"),
    ("object.as:relationship-required", E, "Announce Relationship", "object.as:relationship",
     ABSENT),
    ("object.as:relationship-absolute-uri", E, "Announce Relationship",
     "object.as:relationship", "supplement"),
    ("object.as:object-required", E, "Announce Relationship", "object.as:object", ABSENT),
    ("object.as:object-absolute-uri", E, "Announce Relationship", "object.as:object", {}),
    ("summary-required", E, "Unprocessable Notification", "summary", ABSENT),
    ("summary-text", M, "Unprocessable Notification", "summary", ""),
]
# fmt: on


def codes(document: Any) -> set[tuple[str, str, str]]:
    return {(found.level, found.pointer, found.code) for found in coarinbox.validate(document)}


class RulesTest(unittest.TestCase):
    def test_there_is_a_faultless_notification_of_each_pattern(self) -> None:
        self.assertEqual(list(NOTIFICATIONS), [pattern.name for pattern in coarinbox.PATTERNS])
        self.assertEqual(len(NOTIFICATIONS), 12)
        for name, document in NOTIFICATIONS.items():
            with self.subTest(name):
                pattern = coarinbox.pattern_of(document)
                self.assertEqual(pattern and pattern.name, name)
                self.assertEqual(coarinbox.validate(document), [])

    def test_each_rule_reports_what_breaks_it_at_its_member(self) -> None:
        for code, level, name, member, value in BROKEN:
            with self.subTest(code, pattern=name, value=value):
                found = codes(changed(NOTIFICATIONS[name], member, value))
                self.assertIn((level, "/" + member.replace(".", "/"), code), found)

    def test_no_rule_is_without_an_example_that_breaks_it(self) -> None:
        rules = {constraint["code"] for constraint in coarinbox.constraints()}
        # The whole notification is the one member that cannot be replaced in itself.
        self.assertEqual(
            {code for code, *_ in BROKEN} | {"notification-object", "notification-required"}, rules
        )

    def test_the_levels_of_the_examples_are_those_of_the_list_of_constraints(self) -> None:
        levels = {rule["code"]: rule["levels"] for rule in coarinbox.constraints()}
        for code, level, name, _, _ in BROKEN:
            with self.subTest(code, pattern=name):
                self.assertEqual(levels[code].get(name), level)

    def test_what_is_no_object_is_one_fault(self) -> None:
        for document in ([], [ACCEPT], "text", json.dumps(ACCEPT), 5, 1.5, True, False):
            with self.subTest(document=document):
                self.assertEqual(codes(document), {(E, "", "notification-object")})
        self.assertEqual(codes(None), {(E, "", "notification-required")})

    def test_every_fault_is_reported_and_says_where_and_why(self) -> None:
        document = changed(NOTIFICATIONS["Request Review"], "origin.id", "here")
        document = changed(document, "target", ABSENT)
        document = changed(document, "object.ietf:item.mediaType", "pdf")
        spec = "https://coar-notify.net/specification/1.0.1/request-review/"
        self.assertEqual(
            [found.as_json() for found in coarinbox.validate(document)],
            [
                {
                    "level": "E",
                    "pointer": "/origin/id",
                    "code": "origin.id-http-uri",
                    "message": "origin.id must be an HTTP URI",
                    "spec": spec,
                    "value": "here",
                },
                {
                    "level": "E",
                    "pointer": "/target",
                    "code": "target-required",
                    "message": "target is missing; it must be an object",
                    "spec": spec,
                },
                {
                    "level": "M",
                    "pointer": "/object/ietf:item/mediaType",
                    "code": "object.ietf:item.mediaType-media-type",
                    "message": "object.ietf:item.mediaType must be a media type, type/subtype",
                    "spec": spec,
                    "value": "pdf",
                },
            ],
        )

    def test_without_a_pattern_the_rules_for_all_of_them_apply(self) -> None:
        found = codes({"type": "Nothing"})
        pointers = {pointer for level, pointer, _ in found if level == E}
        self.assertEqual(pointers, {"/id", "/type", "/origin", "/target", "/object"})

    def test_an_unknown_type_is_answered_with_the_known_ones_and_the_nearest(self) -> None:
        examples = [
            (["Offer", "coar-notify:EndorsmentAction"], "Offer + coar-notify:EndorsementAction"),
            (["ReviewAction", "Offer"], "Offer + coar-notify:ReviewAction"),
            (["Offer", "coar-notify:IngestAction"], "Offer + coar-notify:"),
            ("TentativelyAccept", "TentativeAccept"),
        ]
        for types, nearest in examples:
            with self.subTest(types=types):
                document = changed(NOTIFICATIONS["Request Review"], "type", types)
                (message,) = (
                    found.message
                    for found in coarinbox.validate(document)
                    if found.code == "type-pattern"
                )
                self.assertIn(f"nearest: {nearest}", message)
                self.assertIn("Flag + coar-notify:UnprocessableNotification", message)

    def test_the_most_specific_pattern_wins_then_the_first_of_the_table(self) -> None:
        examples: list[tuple[Any, str | None]] = [
            (["Announce", "Announce"], "Announce Service Result"),
            (["coar-notify:ReviewAction", "x:Other", "Announce"], "Announce Review"),
            (["Accept", "Offer", "coar-notify:ReviewAction"], "Request Review"),
            (["Undo", "Reject"], "Reject"),
            (["Announce", "coar-notify:ReviewAction", "coar-notify:EndorsementAction"],
             "Announce Endorsement"),
            ("accept", None),
            ("Offer", None),
            ([], None),
        ]  # fmt: skip
        for types, name in examples:
            with self.subTest(types=types):
                pattern = coarinbox.pattern_of({"type": types})
                self.assertEqual(pattern and pattern.name, name)

    def test_an_action_that_is_known_is_none_that_is_unknown(self) -> None:
        types = ["Announce", "coar-notify:UnprocessableNotification", "sorg:Review"]
        document = changed(NOTIFICATIONS["Announce Service Result"], "type", types)
        self.assertEqual(codes(document), set())

    def test_null_counts_as_absent(self) -> None:
        for name, document in NOTIFICATIONS.items():
            for member in members(document):
                with self.subTest(name, member=member):
                    self.assertEqual(
                        codes(changed(document, member, None)),
                        codes(changed(document, member, ABSENT)),
                    )

    def test_without_a_type_all_that_it_may_be_are_listed(self) -> None:
        findings = {each.code: each for each in coarinbox.validate(changed(ACCEPT, "type", ABSENT))}
        for types in ("Announce, ", "Offer + coar-notify:ReviewAction", "TentativeAccept", "Undo"):
            self.assertIn(types, findings["type-required"].message)

    def test_unknown_members_are_never_a_finding(self) -> None:
        for name, document in NOTIFICATIONS.items():
            for parent in ["", "origin.", "target.", "object.", "actor."]:
                with self.subTest(name, parent=parent):
                    self.assertEqual(codes(changed(document, parent + "x:unknown", 5)), set())

    def test_in_an_embedded_offer_only_level_e_is_kept_up(self) -> None:
        for code, level, name, member, value in BROKEN:
            if name.startswith("Request") and member not in ("@context", "type", "id"):
                with self.subTest(code, value=value):
                    offer = changed(NOTIFICATIONS[name], member, value)
                    document = changed(ACCEPT, "object", changed(offer, "@context", ABSENT))
                    pointer = "/object/" + member.replace(".", "/")
                    self.assertIn((E if level == E else S, pointer, code), codes(document))

    def test_an_embedded_notification_of_no_pattern_needs_no_more_than_its_id(self) -> None:
        document = changed(ACCEPT, "object", {"id": OFFER_ID, "type": ["Offer", "x:Action"]})
        self.assertEqual(codes(document), set())

    def test_a_fault_of_the_embedded_id_is_reported_once(self) -> None:
        document = changed(ACCEPT, "object.id", "offer")
        found = [entry for entry in codes(document) if entry[1] == "/object/id" and entry[0] == E]
        self.assertEqual(found, [(E, "/object/id", "object.id-absolute-uri")])
        announced = changed(NOTIFICATIONS["Announce Review"], "context.id", "urn:x")
        found = [each for each in codes(changed(ACCEPT, "object", announced)) if each[0] == E]
        self.assertIn((E, "/object/context/id", "context.id-http-uri"), found)
        self.assertNotIn(
            (S, "/object/context/id", "context.id-http-uri"),
            codes(changed(ACCEPT, "object", announced)),
        )

    def test_a_value_is_repeated_where_it_is_short_and_json(self) -> None:
        for value, repeated in [
            (5, 5), (["x"], ["x"]), ("x" * 98, "x" * 98), ("x" * 99, None), (math.nan, None),
        ]:  # fmt: skip
            (finding,) = coarinbox.validate(changed(ACCEPT, "actor", value))
            self.assertEqual(finding.value, repeated)

    def test_it_neither_raises_nor_changes_what_it_is_given(self) -> None:
        deep: Any = "x"
        for _ in range(900):
            deep = {"type": "Accept", "object": deep, "id": ["x"]}
        self.assertTrue(coarinbox.validate(deep))
        self.assertTrue(coarinbox.validate({"id": 10**5000}))
        for document in [
            {"id": float("inf"), "inReplyTo": float("nan")},
            {"type": "T" * 10**6},
            {"type": [str(n) for n in range(10**5)]},
            {"type": "Accept", "object": {"type": [[]]}, "@context": {}},
        ]:
            before = repr(document)
            self.assertTrue(coarinbox.validate(document))
            self.assertEqual(repr(document), before)

    def test_the_pages_of_the_specification(self) -> None:
        pages = {
            "Accept": "accept",
            "Announce Endorsement": "announce-endorsement",
            "Announce Relationship": "announce-relationship",
            "Announce Review": "announce-review",
            "Announce Service Result": "announce-resource",
            "Reject": "reject",
            "Request Endorsement": "request-endorsement",
            "Request Review": "request-review",
            "Tentatively Accept": "tentative-accept",
            "Tentatively Reject": "tentative-reject",
            "Unprocessable Notification": "unprocessable",
            "Undo Offer": "undo-offer",
        }
        for name, document in NOTIFICATIONS.items():
            (found,) = coarinbox.validate(changed(document, "target.inbox", ABSENT))
            url = f"https://coar-notify.net/specification/1.0.1/{pages[name]}/"
            self.assertEqual(found.spec, url)
        found = coarinbox.validate({})[0]
        self.assertEqual(found.spec, "https://coar-notify.net/specification/1.0.1/")

    def test_the_nearest_types_are_named_where_there_are_any(self) -> None:
        for type_, hint in [
            ("Acept", r" \(nearest: Accept\)$"),
            (["ReviewAction", "Offer"], r" \(nearest: Offer \+ coar-notify:ReviewAction\)$"),
            ([], r"UnprocessableNotification, Undo$"),
        ]:
            found = coarinbox.validate(changed(ACCEPT, "type", type_))
            (message,) = (each.message for each in found if each.code == "type-pattern")
            self.assertRegex(message, hint)

    def test_what_is_no_variant_of_a_namespace_is_not_taken_for_one(self) -> None:
        document = changed(ACCEPT, "@context", ["https://www.w3.org/ns/activitystreams"])
        found = [each.code for each in coarinbox.validate(document)]
        self.assertEqual(found, ["@context-namespaces"])

    def test_the_demands_in_words(self) -> None:
        for member, value, message in [
            ("origin.type", "Person", "origin.type should include Service"),
            ("object.type", "Accept", "object.type must include Offer"),
            ("inReplyTo", "urn:x", "inReplyTo must equal object.id"),
            ("target.inbox", ABSENT, "target.inbox is missing; it must be an HTTP URI"),
        ]:
            found = coarinbox.validate(changed(ACCEPT, member, value))
            self.assertIn(message, [each.message for each in found])

    def test_a_value_is_repeated_only_where_it_is_short(self) -> None:
        for value, repeated in [("x" * 50, True), ("x" * 500, False), ([["x"] * 99], False)]:
            (found,) = coarinbox.validate(changed(ACCEPT, "origin.id", value))
            self.assertEqual("value" in found.as_json(), repeated)


# URIs, and whether they are absolute URIs and HTTP URIs.
URIS = [
    ("https://example.org/a", True, True),
    ("HTTPS://EXAMPLE.ORG/", True, True),
    ("http://localhost/", True, True),
    ("http://inbox:8080/", True, True),
    ("http://my_host.org/", True, True),
    ("http://exämple.org/ö", True, True),
    ("http://192.168.0.1:80/", True, True),
    ("http://[2001:db8::7]:8080/x", True, True),
    ("http://[2001:db8::7]", True, True),
    ("http://user:secret@example.org/", True, True),
    ("https://example.org?q", True, True),
    ("https://example.org/%20~a!$&'()*+,;=:@?a[b]=c/?#f/?", True, True),
    ("https://example.org/?", True, True),
    ("https://example.org/#", True, True),
    ("https://example.org:99999/", True, True),
    ("urn:uuid:94ecae35-dcfd-4182-8550-22c7164fe23f", True, False),
    ("info:doi/10.5555/1", True, False),
    ("mailto:a@example.org", True, False),
    ("ftp://example.org/x", True, False),
    ("file:///etc/x", True, False),
    ("a+b.c-d:", True, False),
    ("", False, False),
    ("urn", False, False),
    ("/a/b", False, False),
    ("//example.org/a", False, False),
    ("example.org/a", False, False),
    ("1http://example.org/", False, False),
    ("http:", False, False),
    ("https:", False, False),
    ("https:///x", False, False),
    ("http:x", False, False),
    ("http:/x", False, False),
    ("http://", False, False),
    ("http:///x", False, False),
    ("http://?x", False, False),
    ("http://:80/", False, False),
    ("http://example.org:/", False, False),
    ("http://example.org:port/", False, False),
    ("http://example.org:80x/", False, False),
    ("http://a@b@example.org/", False, False),
    ("http://2001:db8::7/", False, False),
    ("http://[2001:db8::g]/", False, False),
    ("http://[::1/", False, False),
    ("http://[::1]x/", False, False),
    ("http://[]/", False, False),
    ("https://example.org/a b", False, False),
    ("https://example.org/a\n", False, False),
    ("https://example.org/\x00", False, False),
    ("https://example.org/\x7f", False, False),
    ("https://example.org/\u00a0", False, False),
    ("https://example.org/\u2028", False, False),
    ("https://example.org/\ud800", False, False),
    ("https://example.org/#a#b", False, False),
    *((f"https://example.org/{character}", False, False) for character in '<>"{}|\\^`'),
]


class UriTest(unittest.TestCase):
    def test_absolute_and_http_uris(self) -> None:
        self.assertGreater(len(URIS), 50)
        for uri, absolute, http_uri in URIS:
            with self.subTest(uri=uri):
                self.assertEqual((E, "/id", "id-absolute-uri") not in codes({"id": uri}), absolute)
                where = {"origin": {"id": uri}}
                found = (E, "/origin/id", "origin.id-http-uri") not in codes(where)
                self.assertEqual(found, http_uri)

    def test_a_long_one_takes_no_longer_than_its_length(self) -> None:
        for uri in ("http://" + "a@" * 10**6, "http://[" + ":" * 10**6, "a:" + "?" * 10**6 + " "):
            coarinbox.validate({"id": uri})


# --- The coarnotify package as an oracle ---------------------------------------------------------

VALUES: list[Any] = [ABSENT, None, True, 1.5, "text", [], {}, ["x"], {"id": "https://a.example/"}]
TYPES: list[Any] = [
    "Accept", "Offer", ["Offer"], ["coar-notify:ReviewAction", "Offer"], "Announce",
    ["Announce", "Announce"], ["Announce", "coar-notify:IngestAction"], ["Accept", "Reject"],
    ["Accept", 5], ["Accept", {}], 5, [5], ["Undo", "x:Y"], "Flag", "Nothing", "Person",
    ["Person"], ["x:Y", "Service"], "Page", ["Page", "x:Y"],
]  # fmt: skip
# URIs of which coarinbox and coarnotify think differently, and who accepts them.
HOSTS = ["inbox:8080", "my_host.org", "a.b", "-a.org", "a..org", "ex%61mple.org"]
URI_DIFFERENCES = {
    **{f"http://{host}/": "coarinbox" for host in HOSTS},
    "http://exämple.org/ö": "coarinbox",
    "https://example.org/%20~a!$&'()*+,;=:@?a[b]=c/?#f/?": "coarinbox",
    "https://example.org/?": "coarinbox",
    "https://example.org/#": "coarinbox",
    "file:///etc/x": "coarinbox",
    "https://example.org/a\n": "coarnotify",
    "http:": "coarnotify",
    "https:": "coarnotify",
    "http:x": "coarnotify",
    "http:/x": "coarnotify",
    "http://[::1/": "coarnotify",
    "http://[::1]x/": "coarnotify",
    "http://2001:db8::7/": "coarnotify",
}
ANSWERS = ("Accept", "Reject", "Tentatively Accept", "Tentatively Reject", "Undo Offer")
URI_MEMBERS = ("id", "origin.id", "context.id")


class Mutation(NamedTuple):
    """A changed notification; member and pattern are those of the innermost notification in it."""

    document: Any
    pattern: str
    member: str
    value: Any


# What the two think differently of, who accepts it, and whether a mutation is of that kind.
DIFFERENCES: list[tuple[str, str, Any]] = [
    (
        "the members of an Announce that coarnotify does not look at",
        "coarnotify",
        lambda change: (
            change.pattern.startswith("Announce")
            and change.member.split(".")[0] in ("origin", "target", "object", "actor", "inReplyTo")
        ),
    ),
    (
        "an id that is missing, because coarnotify invents one",
        "coarnotify",
        lambda change: (
            (change.member in ("id", "object.id") and change.value in (ABSENT, None))
            or (change.member == "object" and change.value == {})
        ),
    ),
    (
        "a type that holds something else than strings",
        "coarnotify",
        lambda change: change.member == "type" and not isinstance(change.value, str),
    ),
    (
        "an actor's type that is a list",
        "coarinbox",
        lambda change: change.member == "actor.type" and isinstance(change.value, list),
    ),
    *(
        (f"the URI {uri!r}", who, lambda change, uri=uri: change.value == uri)
        for uri, who in URI_DIFFERENCES.items()
    ),
]


def innermost(document: Any, member: str) -> tuple[str, str]:
    """Follow a member into embedded notifications; returns the pattern there, and the rest."""
    pattern = coarinbox.pattern_of(document)
    assert pattern
    embedded = pattern.name in ANSWERS and coarinbox.pattern_of(document["object"])
    if embedded and member.startswith("object."):
        return innermost(document["object"], member[len("object.") :])
    return pattern.name, member


# They embed the same offer as an Accept, which is looked at by the same code.
LIKE_ACCEPT = ("Reject", "Tentatively Accept", "Tentatively Reject")


def single_mutations() -> Iterator[Mutation]:
    """Change each member of each notification: to other types, to other URIs, to nothing."""
    uris = list(dict.fromkeys([*(uri for uri, _, _ in URIS), *URI_DIFFERENCES]))
    for number, (name, document) in enumerate(NOTIFICATIONS.items()):
        some = uris[number % 3 :: 3]  # which makes all of them in any three patterns
        for member in members({**document, "object": None} if name in LIKE_ACCEPT else document):
            values = VALUES + (TYPES if member.endswith("type") else [])
            for value in values + (some if member in URI_MEMBERS else []):
                yield Mutation(
                    changed(document, member, value), *innermost(document, member), value
                )


def embedded_mutations() -> Iterator[Mutation]:
    """Embed each notification in an answer, and change each member of it."""
    for document in NOTIFICATIONS.values():
        embedding = {**ACCEPT, "inReplyTo": document["id"], "object": document}
        embedding = changed(embedding, "object.@context", ABSENT)
        for member in members(embedding["object"]):
            for value in (ABSENT, "text"):
                altered = changed(embedding, f"object.{member}", value)
                yield Mutation(altered, *innermost(embedding, f"object.{member}"), value)


def accepted_by_coarinbox(document: Any) -> bool:
    return all(found.level != E for found in coarinbox.validate(document))


@functools.cache
def coarnotify_server() -> Any:
    from coarnotify.server import COARNotifyReceipt, COARNotifyServer, COARNotifyServiceBinding

    class Binding(COARNotifyServiceBinding):  # type: ignore[misc]
        def notification_received(self, notification: Any) -> Any:
            return COARNotifyReceipt(COARNotifyReceipt.CREATED)

    return COARNotifyServer(Binding())


def accepted_by_coarnotify(document: Any) -> bool:
    try:
        coarnotify_server().receive(json.dumps(document))
    except Exception:  # it crashes in many ways on what it refuses
        return False
    return True


def who_accepts(document: Any) -> str | None:
    """Tell who of the two accepts a notification alone; None when they agree."""
    ours, theirs = accepted_by_coarinbox(document), accepted_by_coarnotify(document)
    return None if ours == theirs else "coarinbox" if ours else "coarnotify"


class MutationTest(InboxTest):
    """Thousands of notifications, each with one fault or two."""

    def test_coarnotify_agrees_but_for_the_known_differences(self) -> None:
        if not importlib.util.find_spec("coarnotify"):
            self.skipTest("the coarnotify package is not installed")
        mutations = [*single_mutations(), *embedded_mutations()]
        self.assertGreater(len(mutations), 3000)
        seen = set()
        for change in mutations:
            accepted_by = who_accepts(change.document)
            if accepted_by:
                known = [
                    what
                    for what, who, applies in DIFFERENCES
                    if who == accepted_by and applies(change)
                ]
                self.assertTrue(known, f"only {accepted_by} accepts {change}")
                seen.add(known[0])
        self.assertEqual(seen, {what for what, _, _ in DIFFERENCES})

    def test_coarnotify_agrees_about_two_faults_at_once(self) -> None:
        if not importlib.util.find_spec("coarnotify"):
            self.skipTest("the coarnotify package is not installed")
        pairs = list(self.pairs())
        self.assertGreater(len(pairs), 1000)
        for document, changes in pairs:
            accepted_by = who_accepts(document)
            known = [
                what
                for what, who, applies in DIFFERENCES
                if who == accepted_by and any(applies(change) for change in changes)
            ]
            self.assertTrue(not accepted_by or known, f"only {accepted_by} accepts {document}")

    def pairs(self) -> Iterator[tuple[Any, list[Mutation]]]:
        for document in NOTIFICATIONS.values():
            names = members(document)
            for first, second in zip(names, names[5:] + names[:5]):
                if not (second.startswith(first) or first.startswith(second)):
                    for one, other in zip(VALUES[::3], VALUES[1::3]):
                        altered = changed(changed(document, first, one), second, other)
                        changes = [
                            Mutation(altered, *innermost(document, first), one),
                            Mutation(altered, *innermost(document, second), other),
                        ]
                        yield altered, changes

    def test_over_http_each_gets_its_verdict_and_nothing_is_a_fault_of_ours(self) -> None:
        mutations = [*single_mutations(), *embedded_mutations()]
        documents = [change.document for change in mutations[::10]]
        self.assertGreater(len(documents), 500)
        for start in range(0, len(documents), 20):
            some = documents[start : start + 20]
            bodies = [json.dumps(document).encode() for document in some]
            requests = [post_head(f"Content-Length: {len(body)}") + body for body in bodies]
            answers = raw(self.server, b"".join(requests), "half-close")
            self.assertEqual(
                [answer.status for answer in answers],
                [201 if accepted_by_coarinbox(document) else 400 for document in some],
            )


# --- Properties ----------------------------------------------------------------------------------


def shuffled(value: Any, order: Any) -> Any:
    """Copy a document with the members of each object in another order."""
    if isinstance(value, list):
        return [shuffled(child, order) for child in value]
    if not isinstance(value, dict):
        return value
    items = [(name, shuffled(child, order)) for name, child in value.items()]
    order.shuffle(items)
    return dict(items)


class PropertiesTest(unittest.TestCase):
    """What holds for any document, whether arbitrary JSON or nearly a notification."""

    def setUp(self) -> None:
        if not importlib.util.find_spec("hypothesis"):
            self.skipTest("the hypothesis package is not installed")

    def for_any_document(self, check: Callable[..., None], examples: int = 100) -> None:
        """Call a function with documents, each beside a source of random choices."""
        import hypothesis
        from hypothesis import strategies

        paths = [path for document in NOTIFICATIONS.values() for path in members(document)]
        names = sorted({name for path in paths for name in path.split(".")})
        texts = [value for value in [*TYPES, *URI_DIFFERENCES, *names] if isinstance(value, str)]
        scalars = (
            strategies.none()
            | strategies.booleans()
            | strategies.integers()
            | strategies.floats(allow_nan=False, allow_infinity=False)
            | strategies.text()
            | strategies.sampled_from(texts)
        )
        anything = strategies.recursive(
            scalars,
            lambda inner: (
                strategies.lists(inner, max_size=4)
                | strategies.dictionaries(
                    strategies.sampled_from(names) | strategies.text(), inner, max_size=6
                )
            ),
            max_leaves=30,
        )

        @strategies.composite
        def nearly(draw: Any) -> Any:
            document = draw(strategies.sampled_from(list(NOTIFICATIONS.values())))
            places = strategies.sampled_from(sorted(members(document)))
            for member in draw(strategies.lists(places, max_size=4)):
                with contextlib.suppress(KeyError, TypeError, AttributeError):  # its parent is gone
                    document = changed(document, member, draw(anything))
            return document

        decorate = hypothesis.given(anything | nearly(), strategies.randoms(use_true_random=False))
        limits = hypothesis.settings(
            max_examples=examples, deadline=None, database=None, derandomize=True
        )
        limits(decorate(check))()

    def test_validate_neither_raises_nor_changes_the_document(self) -> None:
        def check(document: Any, order: Any) -> None:
            before = copy.deepcopy(document)
            findings = coarinbox.validate(document)
            self.assertEqual(document, before)
            self.assertEqual(coarinbox.validate(document), findings)
            json.dumps([finding.as_json() for finding in findings], allow_nan=False)

        self.for_any_document(check)

    def test_the_order_of_members_means_nothing(self) -> None:
        def check(document: Any, order: Any) -> None:
            other = shuffled(document, order)
            self.assertEqual(coarinbox.validate(document), coarinbox.validate(other))

        self.for_any_document(check)

    def test_strict_refuses_whatever_the_default_refuses(self) -> None:
        def check(document: Any, order: Any) -> None:
            refused, _ = coarinbox.judge(document, True)
            strictly, warnings = coarinbox.judge(document, "strict")
            self.assertLessEqual(set(map(str, refused)), set(map(str, strictly)))
            self.assertEqual(len(strictly + warnings), len(coarinbox.validate(document)))

        self.for_any_document(check)

    def test_what_was_sent_is_what_comes_back(self) -> None:
        with coarinbox.running(VALIDATE_INCOMING=False) as inbox:

            def check(document: Any, order: Any) -> None:
                if not isinstance(document, (dict, list)):
                    document = [document]
                form = {"ensure_ascii": order.random() < 0.5, "indent": order.choice([None, 0, 3])}
                octets = json.dumps(document, **form).encode("utf-8", "surrogatepass")
                octets = order.choice([b"", b" \r\n"]) + octets + order.choice([b"", b"\t\n"])
                answer = send(inbox.url, octets)
                if answer.status == 201:
                    got = ask(inbox.server, "GET", path_of(answer.headers["Location"]))
                    self.assertEqual(got.body, octets)
                else:  # half a surrogate pair is no UTF-8, and some numbers are too large
                    with self.assertRaises(ValueError):
                        coarinbox.parse(octets)

            self.for_any_document(check, examples=50)


# --- LDN -----------------------------------------------------------------------------------------


class LdnTest(InboxTest):
    """What W3C Linked Data Notifications demands of a receiver (section 3.3, and 3.1 discovery)."""

    def test_must_answer_a_post_with_201_and_a_location_to_retrieve_it_from(self) -> None:
        answer = self.post()
        self.assertEqual(answer.status, 201)
        location = answer.headers["Location"]
        host, port = address(self.server)
        self.assertRegex(location, f"^http://{host}:{port}/inbox/{coarinbox.NAME}$")
        retrieved = self.ask("GET", path_of(location))
        self.assertEqual((retrieved.status, retrieved.body), (200, BODY))
        receipt: dict[str, Any] = {"location": location, "pattern": "Accept", "warnings": []}
        self.assertEqual(answer.json(), receipt)

    def test_must_accept_json_ld_with_or_without_a_profile(self) -> None:
        for content_type in [
            "application/ld+json",
            'application/ld+json;profile="https://www.w3.org/ns/activitystreams"',
            'application/ld+json; profile="http://example.org/profile"; charset=utf-8',
            "APPLICATION/LD+JSON ; charset=UTF-8",
            "application/json",
            "application/activity+json",
        ]:
            with self.subTest(content_type):
                answer = self.post(Content_Type=content_type, Slug="mine")
                self.assertEqual(answer.status, 201)

    def test_must_list_the_notifications_with_the_requested_url_as_subject(self) -> None:
        locations = sorted(self.post().headers["Location"] for _ in range(3))
        host, port = address(self.server)
        for path in ("/inbox", "/inbox/", "/inbox?page=1"):
            with self.subTest(path):
                answer = self.ask("GET", path, headers={"Accept": JSON_LD})
                self.assertEqual(answer.status, 200)
                self.assertEqual(answer.headers["Content-Type"], JSON_LD)
                listing = answer.json()
                self.assertEqual(listing["@context"], {"ldp": "http://www.w3.org/ns/ldp#"})
                self.assertEqual(listing["@id"], f"http://{host}:{port}{path}")
                self.assertEqual(listing["@type"], "ldp:Container")
                self.assertEqual(
                    sorted(entry["@id"] for entry in listing["ldp:contains"]), locations
                )

    def test_must_offer_every_notification_as_json_ld(self) -> None:
        location = self.post().headers["Location"]
        for accept in ("application/ld+json", "*/*", "application/json", "text/turtle", ""):
            with self.subTest(accept=accept):
                answer = self.ask("GET", path_of(location), headers={"Accept": accept})
                self.assertEqual((answer.status, answer.headers["Content-Type"]), (200, JSON_LD))

    def test_should_refuse_what_breaks_a_constraint_and_say_where_they_stand(self) -> None:
        answer = self.post({"@id": "", "http://www.w3.org/ns/ldp#contains": []})
        self.assert_problem(answer, 400)
        self.assertIn('rel="http://www.w3.org/ns/ldp#constrainedBy"', answer.headers["Link"])
        constraints = path_of(answer.headers["Link"].partition("<")[2].partition(">")[0])
        self.assertEqual(self.ask("GET", constraints).status, 200)

    def test_should_advertise_what_may_be_posted(self) -> None:
        answer = self.ask("OPTIONS", "/inbox")
        self.assertEqual((answer.status, answer.body), (204, b""))
        self.assertEqual(
            answer.headers["Accept-Post"],
            "application/ld+json, application/json, application/activity+json",
        )
        self.assertEqual(
            set(answer.headers["Allow"].split(", ")), {"GET", "HEAD", "POST", "DELETE", "OPTIONS"}
        )

    def test_is_discovered_through_a_link(self) -> None:
        host, port = address(self.server)
        link = f'<http://{host}:{port}/inbox>; rel="http://www.w3.org/ns/ldp#inbox"'
        for method in ("GET", "HEAD"):
            self.assertEqual(self.ask(method, "/").headers["Link"], link)

    def test_the_verbs_may_come_all_at_once(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [
                pool.submit(self.ask, method, "/inbox", BODY if method == "POST" else None)
                for method in ["OPTIONS", "POST", "GET"] * 20
            ]
            statuses = [answer.result().status for answer in answers]
        self.assertEqual(statuses, [204, 201, 200] * 20)
        self.assertEqual(len(self.listed()), 20)


class QueuedTest(InboxTest):
    settings = {"RESPONSE_STATUS": 202}

    def test_must_answer_202_with_the_status_in_the_body(self) -> None:
        answer = self.post()
        self.assertEqual(answer.status, 202)
        self.assertNotIn("Location", answer.headers)
        self.assertEqual(answer.json()["pattern"], "Accept")
        self.assertEqual(self.ask("GET", path_of(answer.json()["location"])).body, BODY)
        page = self.ask("GET", "/", headers={"Accept": "text/html"}).body
        self.assertIn(b'<b class="queued">202 queued</b>', page)


def path_of(url: str) -> str:
    return "/" + url.split("/", 3)[3]


# --- HTTP ----------------------------------------------------------------------------------------


class ResourcesTest(InboxTest):
    def test_head_is_get_without_the_body(self) -> None:
        location = path_of(self.post().headers["Location"])
        for path in ("/", "/inbox", location, "/constraints", "/nothing"):
            with self.subTest(path):
                got, head = self.ask("GET", path), self.ask("HEAD", path)
                self.assertEqual(head.body, b"")
                self.assertEqual(head.status, got.status)
                self.assertEqual(int(head.headers["Content-Length"]), len(got.body))
                for name in ("Content-Type", "Link", "Vary"):
                    self.assertEqual(head.headers[name], got.headers[name])

    def test_a_receipt_is_json(self) -> None:
        self.assertEqual(self.post().headers["Content-Type"], "application/json")

    def test_an_answer_to_head_is_its_head(self) -> None:
        with socket.create_connection(address(self.server), timeout=10) as connection:
            connection.sendall(b"HEAD /constraints HTTP/1.0\r\n\r\n")
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        self.assertTrue(received.startswith(b"HTTP/1.1 200 OK\r\n"), received[:50])
        self.assertEqual(received.index(b"\r\n\r\n"), len(received) - 4)
        self.assertIn(b"\r\nDate: ", received)  # RFC 9110 section 6.6.1
        self.assertIn(f"\r\nServer: coarinbox/{coarinbox.__version__}\r\n".encode(), received)

    def test_a_deleted_notification_is_gone(self) -> None:
        kept, gone = (path_of(self.post().headers["Location"]) for _ in range(2))
        self.assertEqual(self.ask("DELETE", gone).status, 204)
        self.assert_problem(self.ask("GET", gone), 404)
        self.assert_problem(self.ask("DELETE", gone), 404)
        self.assertEqual([path_of(url) for url in self.listed()], [kept])

    def test_deleting_the_inbox_empties_it_for_the_next_test(self) -> None:
        for _ in range(3):
            self.post()
        answer = self.ask("DELETE", "/inbox")
        # RFC 9110 section 8.6
        self.assertEqual((answer.status, answer.headers["Content-Length"]), (204, None))
        self.assertEqual(self.listed(), [])
        self.assert_serves()

    def test_what_somebody_else_deletes_meanwhile_is_gone_too(self) -> None:
        self.post()
        names = ["20200101_000000_" + "a" * 32, *self.stored()]
        with unittest.mock.patch.object(self.server.store, "names", lambda: iter(names)):
            self.assertEqual(self.ask("DELETE", "/inbox").status, 204)
        self.assertEqual(self.stored(), [])

    def test_what_a_resource_cannot_do_is_405_with_what_it_can(self) -> None:
        location = path_of(self.post().headers["Location"])
        for path, works in {
            "/": "GET, HEAD, OPTIONS",
            "/constraints": "GET, HEAD, OPTIONS",
            "/inbox": "GET, POST, DELETE, HEAD, OPTIONS",
            location: "GET, DELETE, HEAD, OPTIONS",
        }.items():
            for method in ("PUT", "PATCH", "TRACE", "CONNECT", "BREW", "get"):
                with self.subTest(path, method=method):
                    answer = self.ask(method, path)
                    self.assert_problem(answer, 405)
                    self.assertEqual(answer.headers["Allow"], works)
            self.assertEqual(self.ask("OPTIONS", path).headers["Allow"], works)
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
            with self.subTest(other[:99]):
                for method in ("GET", "DELETE"):
                    octets = f"{method} /inbox/{other} HTTP/1.1\r\nHost: localhost\r\n\r\n"
                    (answer,) = raw(self.server, octets.encode("latin-1"), "half-close")
                    self.assert_problem(answer, 404)
        self.assertEqual(self.stored(), [name])

    def test_the_request_line_may_hold_a_whole_url(self) -> None:
        for target in ("http://localhost", "http://localhost?q=x", "HTTP://localhost/inbox?x"):
            head = f"HEAD {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            (answer,) = raw(self.server, head, "half-close")
            self.assertEqual(answer.status, 200)
        head = b"HEAD http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
        (answer,) = raw(self.server, head, "half-close")
        self.assertEqual(answer.status, 421)

    def test_a_page_is_for_those_who_prefer_html(self) -> None:
        location = path_of(self.post().headers["Location"])
        browser = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
        for accept, is_html in [
            (browser, True),
            ("text/html", True),
            ("text/*", True),
            ("TEXT/HTML ; Q=0.9, application/ld+json;q=0.8", True),
            ("text/html, application/ld+json;q=0", True),
            ('application/ld+json;profile="a,b";q=0.4, text/html;q=0.5', True),
            ("*/*", False),
            ("text/html, application/ld+json", False),
            ("text/html;q=0.5, application/json", False),
            ("text/html;q=0.5, application/*", False),
            ("text/html, application/json;q=1.0", False),
            ("text/html;q=0", False),
            ("application/ld+json;q=0.2, */*;q=0.1", False),
            ("text/html;q=0.001, */*;q=0.01", False),
        ]:
            for path in ("/inbox", "/inbox?close=1&times=2", location, "/constraints"):
                with self.subTest(accept, path=path):
                    answer = self.ask("GET", path, headers={"Accept": accept})
                    self.assertEqual(answer.status, 200)
                    self.assertEqual(
                        answer.headers["Content-Type"].startswith("text/html"), is_html
                    )
                    self.assertEqual(answer.headers["Vary"], "Accept")
                    self.assertEqual(answer.headers["X-Content-Type-Options"], "nosniff")

    def test_a_page_shows_what_was_sent_as_text(self) -> None:
        hostile = "<script>alert(1)</script>\"'&"
        location = path_of(self.post(changed(ACCEPT, "summary", hostile)).headers["Location"])
        answer = self.ask("GET", location, headers={"Accept": "text/html"})
        self.assertNotIn(b"<script>alert", answer.body)
        self.assertIn(b"&lt;script&gt;alert", answer.body)
        self.assertIn("default-src 'none'", answer.headers["Content-Security-Policy"])
        self.assertEqual(answer.headers["Referrer-Policy"], "no-referrer")

    def test_the_constraints_are_the_rules(self) -> None:
        listed = self.ask("GET", "/constraints").json()
        self.assertEqual(listed["constraints"], coarinbox.constraints())
        self.assertEqual(listed["specification"], coarinbox.SPECIFICATION)
        self.assertEqual(listed["levels"], coarinbox.LEVELS)
        required, valid = listed["constraints"][:2]
        everywhere = dict.fromkeys(NOTIFICATIONS, "E")
        self.assertEqual(required, {
            "code": "notification-required", "member": "", "demand": "be present",
            "levels": everywhere,
        })  # fmt: skip
        self.assertEqual(valid["demand"], "be an object")
        self.assertEqual(listed["refused"], ["E"])
        page = self.ask("GET", "/constraints", headers={"Accept": "text/html"}).body.decode()
        self.assertIn("<title>Constraints · coarinbox</title>", page)
        self.assertIn("<td>be an absolute URI</td><td>E: every pattern</td>", page)
        self.assertIn("<td>M: Request Endorsement, Request Review</td>", page)
        for level, suffix in (("E", "; refused here"), ("M", "")):
            row = f"<dt>{level}</dt><dd>{coarinbox.LEVELS[level]}{suffix}</dd>"
            self.assertIn(row, page)
        self.assertRegex(
            page, "<td>E: Accept, .*Undo Offer; M: Request Endorsement, Request Review</td>"
        )
        for constraint in listed["constraints"]:
            self.assertIn(f'id="{constraint["code"]}"', page)

    def test_urls_are_those_that_the_client_uses(self) -> None:
        for host in (
            "localhost:1234", "LOCALHOST", "inbox.localhost", "127.9.9.9:80", "[::1]:80",
            "localhost.", "[::ffff:127.0.0.1]:80",
        ):  # fmt: skip
            with self.subTest(host):
                location = self.post(Host=host).headers["Location"]
                self.assertTrue(location.startswith(f"http://{host}/inbox/"), location)

    def test_only_http_1_0_may_come_without_a_host(self) -> None:
        """RFC 9112 section 3.2; then URLs are those of the address bound."""
        head = post_head(f"Content-Length: {len(BODY)}").replace(b"Host: localhost\r\n", b"")
        (answer,) = raw(self.server, head.replace(b"HTTP/1.1", b"HTTP/1.0") + BODY)
        self.assertEqual(answer.status, 201)
        self.assertTrue(answer.headers["Location"].startswith(self.server.base + "/inbox/"))
        whole_url = head.replace(b" /inbox", b" http://localhost/inbox")
        for octets in (head, whole_url):
            (answer,) = raw(self.server, octets + BODY)
            self.assertIn("Host", self.assert_problem(answer, 400)["detail"])

    def test_the_names_of_other_sites_are_refused_on_loopback(self) -> None:
        for host in ("evil.example", "localhost.evil.example", "10.0.0.1", "notlocalhost", "[::2]"):
            with self.subTest(host):
                problem = self.assert_problem(self.post(Host=host), 421)
                self.assertIn("BASE_URL", problem["detail"])
        self.assertEqual(self.stored(), [])

    def test_a_malformed_host_is_refused(self) -> None:
        for host in (
            "a b",
            "localhost:x",
            "<script>",
            "localhost/x",
            "user@localhost",
            "[::1",
            "ö",
        ):
            with self.subTest(host):
                octets = f"GET /inbox HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1")
                (answer,) = raw(self.server, octets, "half-close")
                self.assert_problem(answer, 400)
        for octets in (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: a\r\n\r\n",
            b"GET http://localhost/ HTTP/1.1\r\nHost: a b\r\n\r\n",
        ):
            (answer,) = raw(self.server, octets, "half-close")
            self.assert_problem(answer, 400)

    def test_requests_share_a_connection(self) -> None:
        connection = http.client.HTTPConnection(*address(self.server), timeout=10)
        self.addCleanup(connection.close)
        for method, path, status in [
            ("POST", "/inbox", 201), ("GET", "/inbox", 200), ("HEAD", "/inbox", 200),
            ("OPTIONS", "/inbox", 204), ("GET", "/nothing", 404), ("DELETE", "/inbox", 204),
        ]:  # fmt: skip
            answer = ask_on(connection, method, path, BODY if method == "POST" else None)
            self.assertEqual(answer.status, status)
            self.assertIsNotNone(connection.sock, f"{method} {path} ended the connection")
        self.assertEqual(ask_on(connection, "POST", "/inbox", {}).status, 400)
        self.assertIsNotNone(connection.sock, "a body that was read needs no new connection")

    def test_requests_may_come_before_the_answers(self) -> None:
        octets = (post_head(f"Content-Length: {len(BODY)}") + BODY) * 5
        answers = raw(self.server, octets, "half-close")
        self.assertEqual([answer.status for answer in answers], [201] * 5)

    def test_http_1_0_and_close_end_the_connection(self) -> None:
        for head in (
            b"GET /inbox HTTP/1.0\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: x ,\tClose\r\n\r\n",
        ):
            (answer,) = raw(self.server, head)
            self.assertEqual((answer.status, answer.headers["Connection"]), (200, "close"))
        octets = b"GET /inbox HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2
        answers = raw(self.server, octets, "half-close")
        self.assertEqual([answer.headers["Connection"] for answer in answers], ["keep-alive"] * 2)


class BaseUrlTest(InboxTest):
    settings = {"BASE_URL": "https://inbox.example.org/tunnel/"}

    def test_it_goes_into_every_url_and_may_be_the_host(self) -> None:
        base = "https://inbox.example.org/tunnel"
        answer = self.post(Host="inbox.example.org")
        self.assertEqual(answer.status, 201)
        self.assertTrue(answer.headers["Location"].startswith(f"{base}/inbox/2"))
        self.assertEqual(self.ask("GET", "/inbox").json()["@id"], f"{base}/inbox")
        self.assertEqual(self.listed(), [answer.headers["Location"]])
        self.assertIn(f"<{base}/inbox>", self.ask("GET", "/").headers["Link"])
        self.assertIn(f"<{base}/constraints>", self.post({}).headers["Link"])
        self.assert_problem(self.post(Host="other.example.org"), 421)
        (answer,) = raw(self.server, b"GET /inbox HTTP/1.0\r\n\r\n")
        self.assertEqual(answer.json()["@id"], f"{base}/inbox")


class EverywhereTest(InboxTest):
    settings = {"HOST": "0.0.0.0"}

    def test_an_inbox_that_is_open_to_others_answers_to_every_name(self) -> None:
        answer = self.post(Host="coarinbox:5005")
        self.assertTrue(answer.headers["Location"].startswith("http://coarinbox:5005/inbox/"))


class LogTest(InboxTest):
    def test_each_finding_has_a_line_for_clients_that_hide_the_answer(self) -> None:
        self.post(ValidationModeTest.INVALID)
        client, _ = address(self.server)
        for line in (
            "E origin is missing; it must be an object",
            "M target.inbox is missing; it must be an HTTP URI",
            "not a valid notification: 1 error",
            '"POST /inbox HTTP/1.1" 400 -',
        ):
            self.assertIn(f"{client} {line}", self.log_lines())


class ScriptLogTest(InboxTest):
    def test_what_the_script_of_a_page_asks_for_is_not_worth_a_line(self) -> None:
        script = {"Sec-Fetch-Dest": "empty", "Sec-Fetch-Site": "same-origin"}
        self.ask("GET", "/", headers=script)
        self.assertEqual(self.log_lines(), [])
        self.ask("DELETE", "/inbox", headers=script)
        self.ask("GET", "/", headers={"Sec-Fetch-Dest": "document"})
        self.assertEqual(len(self.log_lines()), 2)


class ValidationModeTest(unittest.TestCase):
    """What each value of VALIDATE_INCOMING refuses, and what it warns about."""

    FAULTY = changed(changed(ACCEPT, "actor", ABSENT), "target.inbox", ABSENT)  # levels S and M
    INVALID = changed(FAULTY, "origin", ABSENT)  # levels S, M and E

    def check(self, mode: Any, expected: list[tuple[Any, int, str, str]]) -> None:
        with serving(VALIDATE_INCOMING=mode) as server:
            for document, status, errors, warnings_ in expected:
                with self.subTest(document=document):
                    before = len(list(server.store.names()))
                    answer = ask(server, "POST", "/inbox", document)
                    self.assertEqual(answer.status, status)
                    stored = len(list(server.store.names())) - before
                    self.assertEqual(stored, 1 if status == 201 else 0)
                    for name, levels in (("errors", errors), ("warnings", warnings_)):
                        found = (entry["level"] for entry in answer.json().get(name, []))
                        self.assertEqual("".join(sorted(found)), levels)

    def test_true_refuses_what_coarnotify_refuses(self) -> None:
        self.check(True, [
            (ACCEPT, 201, "", ""),
            (self.FAULTY, 201, "", "MS"),
            (self.INVALID, 400, "E", "MS"),
            ([ACCEPT], 400, "E", ""),
            ("text", 400, "E", ""),
        ])  # fmt: skip

    def test_strict_refuses_whatever_breaks_a_must(self) -> None:
        self.check("strict", [
            (ACCEPT, 201, "", ""),
            (self.FAULTY, 400, "M", "S"),
            (self.INVALID, 400, "EM", "S"),
        ])  # fmt: skip

    def test_false_refuses_only_what_is_neither_object_nor_array(self) -> None:
        self.check(False, [
            (ACCEPT, 201, "", ""),
            (self.INVALID, 201, "", "EMS"),
            ([ACCEPT], 201, "", "E"),
            ([], 201, "", "E"),
            ("text", 400, "E", ""),
            (5, 400, "E", ""),
        ])  # fmt: skip


# --- Bad input -----------------------------------------------------------------------------------


class BadBodyTest(InboxTest):
    """Bodies that are no notification: 400, nothing stored, and the connection goes on."""

    def refuse(self, body: bytes, *, says: str) -> None:
        problem = self.assert_problem(self.post(body), 400)
        self.assertIn(says, problem["detail"])
        self.assertEqual(self.stored(), [])

    def test_not_json(self) -> None:
        self.refuse(b"", says="the body is empty")
        for body in (b" ", b"{", b"{}{}", b"{'id': 1}", b"<rdf/>", b'{"a": 1,}', b"\0", b"nul"):
            with self.subTest(body):
                self.refuse(body, says="not JSON")

    def test_not_utf_8(self) -> None:
        for body in (b'{"id": "\xff"}', BODY.decode().encode("utf-16"), b'"\xc3"', b"\xed\xa0\x80"):
            with self.subTest(body):
                self.refuse(body, says="not UTF-8")

    def test_a_byte_order_mark(self) -> None:
        self.refuse(b"\xef\xbb\xbf" + BODY, says="byte order mark")

    def test_constants_that_are_not_json(self) -> None:
        for name in (b"NaN", b"Infinity", b"-Infinity"):
            self.refuse(b'{"id": %s}' % name, says=f"{name.decode()} is not JSON")

    def test_numbers_that_receivers_disagree_about(self) -> None:
        for number in (b"9" * 5000, b"-" + b"9" * 5000, b"1e400", b"9" * 10**6):
            self.refuse(b'{"id": %s}' % number, says="too large")

    def test_nesting(self) -> None:
        for depth in (coarinbox.MAX_DEPTH + 1, 1000, 100_000):
            for start, end in ((b"[", b"]"), (b'{"":', b"}")):
                with self.subTest(start, depth=depth):
                    self.refuse(start * depth + b"1" + end * depth, says="nested more than 100")
                    self.refuse(start * depth, says="")

    def test_nesting_up_to_the_limit_is_no_fault(self) -> None:
        document: Any = "x"
        for _ in range(coarinbox.MAX_DEPTH - 1):
            document = [document]
        self.assertEqual(self.post({**ACCEPT, "x:deep": document}).status, 201)

    def test_an_encoded_json_string(self) -> None:
        self.refuse(json.dumps(json.dumps(ACCEPT)).encode(), says="not a valid notification")

    def test_scalars_and_lists(self) -> None:
        for body in (b"null", b"true", b"5", b'"text"', b"[]", b"[1]", b"[" + BODY + b"]"):
            with self.subTest(body):
                self.refuse(body, says="not a valid notification")

    def test_whatever_the_octets_they_are_kept(self) -> None:
        for body in (
            BODY + b" \n", b"\t" + BODY, BODY.replace(b'", "', b'" ,\n"'),
            BODY.replace(b"J. Carberry", "Jürg, \U0001f600".encode()),
            BODY.replace(b"J. Carberry", rb"\ud800\u0000"),
            BODY[:-1] + b', "id": "urn:uuid:94ecae35-dcfd-4182-8550-22c7164fe23f"}',
        ):  # fmt: skip
            with self.subTest(body):
                answer = self.post(body)
                self.assertEqual(answer.status, 201, answer.body)
                self.assertEqual(self.ask("GET", path_of(answer.headers["Location"])).body, body)

    def test_the_wrong_type_or_coding(self) -> None:
        for name, value in [
            ("Content-Type", "text/plain"), ("Content-Type", "text/html"), ("Content-Type", ""),
            ("Content-Type", "application/xml"), ("Content-Type", "application/jsonld"),
            ("Content-Type", "json"), ("Content-Type", "application/+json"),
            ("Content-Type", "multipart/form-data; boundary=x"), ("Content-Type", "image/svg+json"),
            ("Content-Encoding", "gzip"), ("Content-Encoding", "identity, br"),
        ]:  # fmt: skip
            with self.subTest(name, value=value):
                answer = self.ask("POST", "/inbox", BODY, {name: value})
                self.assert_problem(answer, 415)
                helpful = "Accept-Post" if name == "Content-Type" else "Accept-Encoding"
                self.assertIn(helpful, answer.headers)
                self.assertIn("constrainedBy", answer.headers["Link"])
        octets = f"POST /inbox HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n\r\n"
        (answer,) = raw(self.server, octets.encode() + BODY, "half-close")
        self.assertIn("Content-Type is missing,", self.assert_problem(answer, 415)["detail"])
        self.assertEqual(self.post(Content_Encoding="Identity").status, 201)
        self.assertEqual(self.post(Content_Encoding="br").headers["Accept-Encoding"], "identity")


class FramingTest(InboxTest):
    """How the length of a body is given (RFC 9112 section 6), rightly and wrongly."""

    settings = {"MAX_CONTENT_LENGTH": 4000}

    def refuse(self, octets: bytes, status: int, then: str = "read") -> None:
        """Expect one answer, after which the server ends the connection, and then serves others."""
        (answer,) = raw(self.server, octets, then)
        self.assert_problem(answer, status)
        self.assertEqual(answer.headers["Connection"], "close")
        self.assertEqual(self.stored(), [])

    def test_chunks(self) -> None:
        head = post_head("Transfer-Encoding: Chunked")
        for chunks in [
            chunked(BODY, 100),
            chunked(BODY, 1),
            chunked(BODY, 5000),
            chunked(BODY, 100, extension=b' ; name="value"'),
            chunked(BODY, 100, trailer=b"X-Checksum: 1\r\n"),
        ]:
            answers = raw(self.server, (head + chunks) * 2, "half-close")
            self.assertEqual([answer.status for answer in answers], [201, 201])
        for name in self.stored():
            self.assertEqual(self.server.store.read(name), BODY)

    def test_slashes_that_are_doubled_are_logged_as_well(self) -> None:
        for path in ("//inbox", "///inbox/", "http://localhost//inbox"):
            self.assertEqual(self.ask("POST", path, ACCEPT).status, 201)
        self.assertEqual(len(self.ask("GET", "/deliveries").json()["deliveries"]), 3)

    def test_broken_chunks(self) -> None:
        head = post_head("Transfer-Encoding: chunked")
        for chunks in [
            b"x\r\n", b"\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n",
            b"5\r\nhello, too long\r\n0\r\n\r\n", b"5\nhello\n0\n\n", b" 5\r\nhello\r\n0\r\n\r\n",
            b"5\r\nhelloXX0\r\n\r\n",
            b"5;a\rb\r\nhello\r\n0\r\n\r\n", b"5;\0\r\nhello\r\n0\r\n\r\n",
            b"5" * 17 + b"\r\n", b"5;" + b"x" * 2000 + b"\r\nhello\r\n0\r\n\r\n",
        ]:  # fmt: skip
            with self.subTest(chunks[:40]):
                self.refuse(head + chunks, 400)
        for trailer in (b"X: y\r\n" * 200, b"X: " + b"y" * 70000 + b"\r\n"):
            with self.subTest(trailer[:40]):
                self.refuse(head + b"0\r\n" + trailer + b"\r\n", 431)

    def test_no_length(self) -> None:
        self.refuse(post_head(), 411)
        self.refuse(post_head() + BODY, 411)

    def test_a_length_that_is_none(self) -> None:
        for length in ("-1", "+5", "5.0", "0x5", "1e3", "five", "5, 5", "5 5", "²", "1_000"):
            with self.subTest(length):
                self.refuse(post_head(f"Content-Length: {length}") + BODY, 400)

    def test_lengths_that_contradict_each_other(self) -> None:
        right, wrong = f"Content-Length: {len(BODY)}", f"Content-Length: {len(BODY) + 1}"
        self.refuse(post_head(right, wrong) + BODY, 400)
        self.refuse(post_head(right, right) + BODY, 400)  # even so: RFC 9110 section 8.6
        self.refuse(post_head(right, "Transfer-Encoding: chunked") + chunked(BODY, 100), 400)
        self.refuse(post_head("Transfer-Encoding: gzip, chunked") + chunked(BODY, 100), 400)
        self.refuse(post_head("Transfer-Encoding: identity") + BODY, 400)
        for coding in ("\x0bchunked", "chunked\xa0", "chunked, chunked", "x"):
            self.refuse(post_head(f"Transfer-Encoding: {coding}") + chunked(BODY, 100), 400)
        old = post_head("Transfer-Encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0")
        self.refuse(old + chunked(BODY, 100), 400)
        head = post_head("Content-Length: 000" + "0" * 99 + right[16:])
        (answer,) = raw(self.server, head + BODY, "half-close")
        self.assertEqual(answer.status, 201)

    def test_a_body_that_ends_early(self) -> None:
        for octets in UNFINISHED:
            with self.subTest(octets):
                self.refuse(octets, 400, "half-close")

    def test_a_body_over_the_limit(self) -> None:
        large = json.dumps({**ACCEPT, "summary": "x" * 4000}).encode()
        self.refuse(post_head(f"Content-Length: {len(large)}"), 413)
        self.refuse(post_head(f"Content-Length: {len(large)}") + large, 413)
        self.refuse(post_head("Content-Length: " + "9" * 5000), 413)
        self.refuse(post_head("Transfer-Encoding: chunked") + chunked(large, 100), 413)
        self.refuse(post_head("Transfer-Encoding: chunked") + b"fffffffffffffff\r\n", 413)

    def test_a_body_of_the_largest_size(self) -> None:
        body = BODY + b" " * (4000 - len(BODY))
        self.assertEqual(self.post(body).status, 201)
        octets = post_head("Transfer-Encoding: chunked") + chunked(body, 1000)
        (answer,) = raw(self.server, octets, "half-close")
        self.assertEqual(answer.status, 201)

    def test_a_large_body_that_is_refused_early_does_not_hide_the_answer(self) -> None:
        large = b"x" * 20_000_000  # more than the system holds for a connection
        self.assert_problem(self.post(large), 413)
        self.assert_problem(self.ask("POST", "/nothing", large), 404)

    def test_a_request_that_has_no_use_for_its_body_leaves_no_trace_of_it(self) -> None:
        smuggled = b"GET /constraints HTTP/1.1\r\nHost: localhost\r\n\r\n"
        head = (
            f"DELETE /inbox HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(smuggled)}\r\n\r\n"
        )
        (answer,) = raw(self.server, head.encode() + smuggled)
        self.assertEqual((answer.status, answer.headers["Connection"]), (204, "close"))
        for lengths in (("0", "43"), ("43", "0"), ("x", "0")):
            lines = "".join(f"Content-Length: {length}\r\n" for length in lengths)
            octets = f"GET /inbox HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode()
            self.refuse(octets + smuggled, 400)

    def test_100_continue_comes_when_the_body_is_wanted(self) -> None:
        head = post_head(f"Content-Length: {len(BODY)}", "Expect: 100-continue")
        with socket.create_connection(address(self.server), timeout=10) as connection:
            connection.sendall(head)
            stream = connection.makefile("rb")
            self.assertEqual(
                stream.readline() + stream.readline(), b"HTTP/1.1 100 Continue\r\n\r\n"
            )
            connection.sendall(BODY)
            self.assertEqual(read_answer(stream.readline(), stream).status, 201)
            stream.close()

    def test_100_continue_does_not_come_when_it_is_not(self) -> None:
        self.refuse(post_head("Content-Length: 5000", "Expect: 100-continue"), 413)
        head = post_head("Content-Length: 5", "Expect: 100-continue").replace(b"ld+json", b"xml")
        self.refuse(head, 415)


def chunked(body: bytes, size: int, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    parts = [b"%x%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks]
    return b"".join(parts) + b"0\r\n" + trailer + b"\r\n"


# Requests that end before their body does.
UNFINISHED = [
    post_head(f"Content-Length: {len(BODY) + 1}") + BODY,
    *(post_head("Transfer-Encoding: chunked") + chunks
      for chunks in (b"", b"5", b"5\r\nhel", b"5\r\nhello", b"5\r\nhello\r\n")),
]  # fmt: skip


class BadRequestTest(InboxTest):
    """Requests that are none."""

    def test_what_the_base_class_would_answer_with_html(self) -> None:
        line, header, many = (
            "the request line is malformed",
            "header line 2 is malformed: ",
            "65536",
        )
        for octets, status, reason in [
            (b"GARBAGE\r\n", 400, line),
            (b"  \r\n", 400, line),
            (b"GET /\r\n", 400, line),
            (b"GET / HTTP/1.1 x\r\n\r\n", 400, line),
            (b"GET  / HTTP/1.1\r\n\r\n", 400, line),
            (b"GET\t/\tHTTP/1.1\r\n\r\n", 400, line),
            (b"GET /\x85 HTTP/1.1\r\n\r\n", 400, line),
            (b"GET /\x00 HTTP/1.1\r\n\r\n", 400, line),
            (b"GET / HTTP/x\r\n\r\n", 400, line),
            (b"GET / HTTP/1.11111\r\n\r\n", 400, line),
            (b"GET / HTTP/0.9\r\n\r\n", 400, line),
            (b"GET / HTTP/1.1\nX: y\r\n\r\n", 400, line),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", 400, line),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/2.0 is not spoken"),
            (b"GET / HTTP/2.0\r\n\r\n", 505, "HTTP/2.0 is not spoken"),
            (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414, many),
            (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 60_000 + b"\r\n", 431, "more than 100"),
            (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100 + b"\r\n", 431, "more than 100"),
            (b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431, many),
            (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400, header + "b''"),
            (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", 400, header + "b'Host '"),
            (b"GET / HTTP/1.1\r\n folded: localhost\r\n\r\n", 400, header + "b''"),
            (b"GET / HTTP/1.1\r\nX: y\r\n folded\r\n\r\n", 400, "header line 3 is malformed"),
            (b"GET / HTTP/1.1\r\nX: y\n\r\n", 400, header + "b'X'"),
            (b"GET / HTTP/1.1\r\nX: y\rContent-Length: 5\r\n\r\n", 400, header + "b'X'"),
            (b"GET / HTTP/1.1\r\nX: y\r\r\nContent-Length: 5\r\n\r\n", 400, header + "b'X'"),
            (b"GET / HTTP/1.1\r\nX: \x00\r\n\r\n", 400, header + "b'X'"),
            (b"GET / HTTP/1.1\r\n: y\r\n\r\n", 400, header + "b''"),
            (b"GET / HTTP/1.1\r\nFrom somebody\r\n\r\n", 400, header + "b''"),
        ]:
            with self.subTest(octets[:60]):
                hosted = octets.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nHost: localhost\r\n", 1)
                (answer,) = raw(self.server, hosted)
                self.assertIn(reason, self.assert_problem(answer, status)["detail"])
                self.assertEqual(answer.headers["Connection"], "close")
        self.assert_serves()

    def test_a_hundred_header_lines_are_not_too_many(self) -> None:
        octets = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 99 + b"\r\n"
        (answer,) = raw(self.server, octets, "half-close")
        self.assertEqual(answer.status, 200)

    def test_empty_lines_before_a_request_are_ignored(self) -> None:
        octets = b"\r\n\r\n\nGET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answers = raw(self.server, octets * 2 + b"\r\n", "half-close")
        self.assertEqual([answer.status for answer in answers], [200, 200])

    def test_a_flood_of_them_ends_like_silence(self) -> None:
        with socket.create_connection(address(self.server)) as connection:
            begun = time.monotonic()
            with unittest.mock.patch("coarinbox.LINGER", 0.05), self.assertRaises(ConnectionError):
                while time.monotonic() < begun + 10:
                    connection.sendall(b"\r\n" * 100)
        self.assert_serves()

    def test_a_request_that_breaks_off_is_not_carried_out(self) -> None:
        self.post()
        whole = b"DELETE /inbox HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for end in range(1, len(whole)):
            (answer,) = raw(self.server, whole[:end], "half-close")
            problem = self.assert_problem(answer, 400)
            part = whole[:end].count(b"\n")
            where = f"header line {part}" if part else "the request line"
            self.assertEqual(problem["detail"], f"the connection ended before {where} did")
        self.assertEqual(len(self.stored()), 1)

    def test_white_space_around_the_value_of_a_header_means_nothing(self) -> None:
        octets = post_head(f"Content-Length:\t{len(BODY)} \t", "Transfer-encoded:").replace(
            b"Host: localhost", b"Host:localhost "
        )
        (answer,) = raw(self.server, octets + BODY, "half-close")
        self.assertEqual(answer.status, 201)

    def test_a_client_that_resets_the_connection_leaves_no_traceback(self) -> None:
        for octets in (b"POST /in", post_head("Content-Length: 99"), post_head(), b""):
            connection = socket.create_connection(address(self.server))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(octets)
            connection.close()
        self.assert_serves()
        self.server.server_close()  # waits for the connections above
        self.assertFalse([line for line in self.log if line.exc_info])

    def test_the_log_holds_one_line_for_a_request_whatever_it_says(self) -> None:
        raw(self.server, b"GET /\x1b[31m\rforged HTTP/1.1\r\n\r\n")
        raw(self.server, b"GET /%0aforged HTTP/1.1\r\nHost: localhost\r\n\r\n", "half-close")
        lines = self.log_lines()
        self.assertEqual(len(lines), 4, lines)  # each with the reason of the refusal
        for line in lines:
            self.assertTrue(line.isprintable(), line)


class StallTest(InboxTest):
    """Clients that do not go on, which are waited for no longer than `REQUEST_TIMEOUT`."""

    settings = {"REQUEST_TIMEOUT": 0.2}

    def test_a_request_that_does_not_end_is_answered_and_silence_is_not(self) -> None:
        stalled = [*UNFINISHED, b"", b"\r\n"]
        with concurrent.futures.ThreadPoolExecutor(len(stalled)) as pool:
            answers = list(pool.map(lambda octets: raw(self.server, octets), stalled))
        self.assertEqual(answers[-2:], [[], []])
        for octets, (answer,) in zip(UNFINISHED, answers):
            with self.subTest(octets):
                self.assert_problem(answer, 408)
                self.assertEqual(answer.headers["Connection"], "close")
        self.assertEqual(self.stored(), [])
        deliveries = self.ask("GET", "/deliveries").json()["deliveries"]
        self.assertEqual([each["status"] for each in deliveries], [408] * len(UNFINISHED))
        bodies = sorted(each["body"] for each in deliveries)
        self.assertEqual(bodies, sorted(["", "", "hel", "hello", "hello", BODY.decode()]))

    def test_a_client_that_does_not_read_its_answer_is_let_go(self) -> None:
        name = "20200101_000000_" + "a" * 32
        pathlib.Path(self.server.store.path(name)).write_bytes(b" " * 30_000_000)
        with socket.create_connection(address(self.server)) as connection:
            connection.sendall(f"GET /inbox/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            connection.recv(1)
            self.server.server_close()  # waits for the connection above
        self.assertIn("timed out", self.log_lines()[-1])

    def test_a_request_that_drips_gets_no_longer_than_one_that_stalls(self) -> None:
        with socket.create_connection(address(self.server), timeout=10) as connection:
            begun = time.monotonic()
            stopped = threading.Event()

            def drip() -> None:
                with contextlib.suppress(OSError):
                    for octet in post_head("X: " + "y" * 10_000):
                        connection.sendall(bytes([octet]))
                        if stopped.wait(0.02):
                            break

            dripping = threading.Thread(target=drip)
            dripping.start()
            stream = connection.makefile("rb")
            self.assert_problem(read_answer(stream.readline(), stream), 408)
            self.assertLess(time.monotonic() - begun, 5)
            stopped.set()
            dripping.join()
            stream.close()


# --- Storage -------------------------------------------------------------------------------------


class StorageTest(InboxTest):
    settings = {"FSYNC": True}

    def test_a_file_holds_the_octets_as_they_came(self) -> None:
        name = path_of(self.post().headers["Location"]).rpartition("/")[2]
        self.assertEqual(files_in(self.server.store.directory), [name + ".json"])
        path = pathlib.Path(self.server.store.directory, name + ".json")
        self.assertEqual(path.read_bytes(), BODY)
        other = path.with_name("other")
        other.touch()
        self.assertEqual(path.stat().st_mode, other.stat().st_mode)

    def test_names_are_the_time_and_unique(self) -> None:
        before = time.gmtime()
        names = [path_of(self.post().headers["Location"]).rpartition("/")[2] for _ in range(20)]
        self.assertEqual(len(set(names)), 20)
        for name in names:
            moment = time.strptime(name[:15], "%Y%m%d_%H%M%S")
            self.assertTrue(before[:6] <= moment[:6] <= time.gmtime()[:6])

    def test_the_directory_is_the_only_truth(self) -> None:
        directory = pathlib.Path(self.server.store.directory)
        ours, other = "20200101_000000_" + "a" * 32, "20200101_000000_" + "b" * 32
        (directory / f"{ours}.json").write_bytes(b"[dropped in]")
        for stranger in (f".{other}.part", f"{other}.txt", "deliveries.jsonl", "README.json"):
            (directory / stranger).write_bytes(BODY)
        (directory / f"{other}.json").mkdir()
        self.assertEqual([path_of(url) for url in self.listed()], [f"/inbox/{ours}"])
        self.assertEqual(self.ask("GET", f"/inbox/{ours}").body, b"[dropped in]")
        for method in ("GET", "DELETE"):
            self.assert_problem(self.ask(method, f"/inbox/{other}"), 404)
        (directory / f"{ours}.json").unlink()
        self.assertEqual(self.listed(), [])
        self.assert_problem(self.ask("GET", f"/inbox/{ours}"), 404)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "this system has no named pipes")
    def test_what_is_planted_in_the_store_leads_nowhere(self) -> None:
        directory = pathlib.Path(self.server.store.directory)
        link, pipe = "20200101_000000_" + "a" * 32, "20200101_000000_" + "b" * 32
        (directory / f"{link}.json").symlink_to(MODULE)
        os.mkfifo(directory / f"{pipe}.json")
        for name in (link, pipe):
            for method in ("GET", "DELETE"):
                self.assert_problem(self.ask(method, f"/inbox/{name}"), 404)
        self.assertEqual(self.listed(), [])

    def test_emptying_leaves_what_is_not_a_notification(self) -> None:
        self.post()
        other = pathlib.Path(self.server.store.directory, "notes.json")
        other.write_text("{}")
        self.assertEqual(self.ask("DELETE", "/inbox").status, 204)
        self.assertEqual(os.listdir(self.server.store.directory), ["notes.json"])

    def test_a_store_that_was_deleted_is_made_anew(self) -> None:
        gone = path_of(self.post().headers["Location"])
        shutil.rmtree(self.server.store.directory)
        self.assertEqual(self.listed(), [])
        self.assert_problem(self.ask("GET", gone), 404)
        self.assertEqual(self.ask("DELETE", "/inbox").status, 204)
        self.assert_serves()
        self.assertEqual(len(self.listed()), 1)

    def test_it_never_overwrites(self) -> None:
        path = pathlib.Path(self.server.store.path("20200101_000000_" + "a" * 32))
        path.write_bytes(b"first")
        draft = path.with_suffix(".part")
        draft.write_bytes(b"second")
        with self.assertRaises(FileExistsError):
            self.server.store.publish(str(draft), str(path))
        self.assertEqual(path.read_bytes(), b"first")

    def test_a_201_means_that_it_is_listed_at_once(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:

            def post_and_look(_: int) -> bool:
                location = self.post().headers["Location"]
                return location in self.listed() and self.ask("GET", path_of(location)).body == BODY

            self.assertTrue(all(pool.map(post_and_look, range(40))))

    def test_two_inboxes_may_share_a_store(self) -> None:
        with serving(STORE_DIR=self.server.store.directory) as other:
            ask(other, "POST", "/inbox", ACCEPT)
            self.post()
            self.assertEqual(len(self.stored()), 2)
            self.assertEqual(self.stored(), list(other.store.names()))

    def test_notifications_are_listed_oldest_first(self) -> None:
        names = [
            f"2020010{day}_000000_{digit * 32}" for day, digit in ((1, "f"), (2, "a"), (3, "c"))
        ]
        for name in reversed(names):
            pathlib.Path(self.server.store.path(name)).write_bytes(BODY)
        self.assertEqual([path_of(url) for url in self.listed()], [f"/inbox/{n}" for n in names])


class SyncTest(InboxTest):
    """What FSYNC promises, with a disk whose answers we choose."""

    settings = {"FSYNC": True}
    faults_expected = True

    @unittest.skipUnless(PROC, "counting descriptors needs /proc")
    def test_it_leaves_no_descriptor_open(self) -> None:
        self.post()
        before = os.listdir("/proc/self/fd")
        for _ in range(10):
            self.post()
        self.assertLess(len(os.listdir("/proc/self/fd")), len(before) + 10)

    def test_before_a_201_the_file_and_its_name_have_reached_the_disk(self) -> None:
        synced = []

        def fsync(descriptor: int) -> None:
            synced.append(stat.S_IFMT(os.fstat(descriptor).st_mode))

        with unittest.mock.patch("os.fsync", fsync):
            self.assert_serves()
            self.assertEqual(synced, [stat.S_IFREG, stat.S_IFDIR])
            with serving(FSYNC=False) as other:
                self.assertEqual(ask(other, "POST", "/inbox", ACCEPT).status, 201)
            self.assertEqual(len(synced), 2)

    def test_a_disk_that_fails_leaves_nothing_behind(self) -> None:
        for kind in (stat.S_IFREG, stat.S_IFDIR):
            for number, status in ((errno.EIO, 500), (errno.ENOSPC, 507), (errno.EDQUOT, 507)):

                def fsync(descriptor: int, kind: int = kind, number: int = number) -> None:
                    if stat.S_IFMT(os.fstat(descriptor).st_mode) == kind:
                        raise OSError(number, os.strerror(number))

                with unittest.mock.patch("os.fsync", fsync):
                    self.assert_problem(self.post(), status)
                self.assertEqual(files_in(self.server.store.directory), [])

    def test_a_disk_without_hard_links_will_do(self) -> None:
        with unittest.mock.patch("os.link", side_effect=PermissionError(errno.EPERM, "no links")):
            location = self.post().headers["Location"]
        self.assertEqual(self.ask("GET", path_of(location)).body, BODY)
        self.assertEqual(len(files_in(self.server.store.directory)), 1)

    def test_nobody_waits_for_the_disk_of_another(self) -> None:
        released = threading.Event()
        with unittest.mock.patch("os.fsync", lambda _: released.wait(10)):
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                slow = pool.submit(self.ask, "POST", "/inbox", ACCEPT)
                self.wait_until(lambda: bool(files_in(self.server.store.directory)))
                self.assertEqual(self.ask("GET", "/constraints").status, 200)
                self.assertFalse(slow.done())
                released.set()
                self.assertEqual(slow.result().status, 201)


class BrokenStoreTest(InboxTest):
    faults_expected = True

    def test_a_file_where_the_store_should_be(self) -> None:
        directory = self.server.store.directory
        os.rmdir(directory)
        pathlib.Path(directory).write_text("in the way")
        name = "20200101_000000_" + "a" * 32
        code = errno.ENOTDIR
        for method, path in [
            ("POST", "/inbox"), ("GET", "/inbox"), ("GET", "/"), ("DELETE", "/inbox"),
            ("GET", f"/inbox/{name}"), ("DELETE", f"/inbox/{name}"),
        ]:  # fmt: skip
            with self.subTest(method, path=path):
                answer = self.ask(method, path, BODY if method == "POST" else None)
                problem = self.assert_problem(answer, 500)
                self.assertEqual(problem["detail"], f"the store failed: {os.strerror(code)}")
        os.remove(directory)
        self.assert_serves()

    def test_a_list_that_breaks_off_cannot_be_taken_for_a_whole_one(self) -> None:
        def names() -> Iterator[str]:
            for _ in range(3000):
                yield coarinbox.new_name()
            raise OSError("the disk is gone")

        with unittest.mock.patch.object(self.server.store, "names", names):
            with self.assertRaises(http.client.IncompleteRead):
                self.ask("GET", "/inbox")
        self.assertEqual(self.log_lines()[-1], "the store failed: the disk is gone")
        self.assert_serves()

    @unittest.skipUnless(shutil.which("nsenter"), "making a small disk needs util-linux")
    def test_a_disk_that_is_full_or_read_only(self) -> None:
        """On a tmpfs of 64 KiB, in a mount namespace of its own."""
        with tempfile.TemporaryDirectory() as directory:
            script = f'mount -t tmpfs -o size=64k tmpfs {directory} && exec "$0" "$@"'
            command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, sys.executable]
            command += [str(MODULE), "--port", "0", "--store", f"{directory}/store"]
            with running(command) as inbox:
                large = json.dumps({**ACCEPT, "summary": "x" * 10_000}).encode()
                answers = [inbox.ask("POST", "/inbox", large) for _ in range(20)]
                stored = [answer.status for answer in answers].count(201)
                self.assertGreater(stored, 2)
                for answer in answers[:stored]:
                    path = path_of(answer.headers["Location"])
                    self.assertEqual(inbox.ask("GET", path).body, large)
                for answer in answers[stored:]:
                    self.assert_problem(answer, 507)
                self.assertEqual(len(inbox.ask("GET", "/inbox").json()["ldp:contains"]), stored)

                self.assertEqual(inbox.ask("DELETE", path).status, 204)
                self.assertEqual(inbox.ask("POST", "/inbox", large).status, 201)

                inside = ["nsenter", "--user", "--mount", "--preserve-credentials"]
                inside += ["--target", str(inbox.process.pid)]
                log = ["cat", f"{directory}/store/deliveries.jsonl"]
                for line in subprocess.run(inside + log, capture_output=True).stdout.splitlines():
                    self.assertTrue(json.loads(line))  # none was cut short by the end of the disk
                self.assertEqual(inbox.ask("DELETE", "/inbox").status, 204)
                for mode, status in (("ro", 500), ("rw", 201)):
                    remount = ["mount", "-o", f"remount,{mode}", directory]
                    subprocess.run(inside + remount, check=True, timeout=20)
                    self.assertEqual(inbox.ask("POST", "/inbox", ACCEPT).status, status)
                self.assertEqual(len(inbox.ask("GET", "/inbox").json()["ldp:contains"]), 1)


# --- Deliveries ----------------------------------------------------------------------------------

OFFER = NOTIFICATIONS["Request Review"]
# Refused for two reasons, with a warning besides.
REFUSED = changed(changed(OFFER, "origin", "https://r.example.org/"), "id", "offer-1")
REFUSED = changed(REFUSED, "object.ietf:cite-as", ABSENT)


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
        listed = answer.json()["deliveries"]
        assert isinstance(listed, list)
        return listed

    def statuses(self, query: str = "") -> list[int]:
        return [delivery["status"] for delivery in self.deliveries(query)]

    def names(self, query: str = "") -> list[str]:
        return [delivery["name"] for delivery in self.deliveries(query)]


class DeliveryLogTest(DeliveriesTest):
    settings = {"MAX_CONTENT_LENGTH": 10_000}

    def test_every_attempt_has_a_line_in_order_of_arrival(self) -> None:
        attempts: list[tuple[bytes, int, str, str]] = [
            (post_head(f"Content-Length: {len(BODY)}") + BODY, 201, "", ""),
            (post_head("Content-Length: 7") + b'{"a":1}', 400, "not a valid notif", '{"a":1}'),
            (post_head("Content-Length: 4") + b"true", 400, "not a valid notification", "true"),
            (post_head("Content-Length: 2") + b"no", 400, "not JSON", "no"),
            (post_head("Content-Length: 9") + b"half", 400, "ended 5 octets early", "half"),
            (post_head("Transfer-Encoding: chunked") + b"4\r\nhalf\r\n5", 400, "no size", "half"),
            (post_head("Content-Length: 1", "broken") + b"x", 400, "header line", ""),
            (post_head().replace(b"localhost", b"evil.example"), 421, "BASE_URL", ""),
            (post_head("Content-Length: 4").replace(b"ld+json", b"pdf") + b"%PDF",
             415, "Content-Type is application/pdf", "%PDF"),
            (post_head(), 411, "neither", ""),
            (post_head("Content-Length: 10001"), 413, "larger than 10000", ""),
            (post_head().replace(b"1.1", b"3.1"), 505, "3.1", ""),
            (post_head().replace(b"HTTP/1.1", b"FTP/1.1"), 400, "the request line", ""),
            (b"POST /inbox?" + b"x" * 70_000, 414, "", ""),
            (post_head().replace(b"/inbox", b"http://localhost/inbox"), 411, "neither", ""),
            (post_head("Content-Length: 7").replace(b"/inbox", b"/inbox/?a=b") + b'{"a":1}',
             400, "'a' is no parameter", '{"a":1}'),
        ]  # fmt: skip
        for octets, status, _, _ in attempts:
            (answer,) = raw(self.server, octets, "half-close")
            self.assertEqual(answer.status, status, octets)
        lines = self.lines()
        self.assertEqual(len(lines), len(attempts))
        for line, (octets, status, detail, body) in zip(lines, attempts):
            with self.subTest(octets):
                self.assertEqual(line["status"], status)
                self.assertIn(detail, line["detail"])
                self.assertEqual(line.get("body", ""), body)
                self.assertEqual("body" in line, status != 201)

    def test_a_client_that_breaks_off_has_a_line_too(self) -> None:
        with socket.create_connection(address(self.server), timeout=10) as connection:
            connection.sendall(post_head("Content-Length: 9", "Expect: 100-continue"))
            self.assertIn(b" 100 ", connection.recv(100))  # its head has been read
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.server.server_close()  # waits for the connection above
        self.assertEqual([(line["status"], line["body"]) for line in self.lines()], [(400, "")])

    def test_what_is_no_delivery_has_none(self) -> None:
        path = path_of(self.post().headers["Location"])
        for method, where in [
            ("GET", "/"), ("GET", "/inbox"), ("HEAD", path), ("GET", "/deliveries"), ("POST", "/"),
            ("OPTIONS", "/inbox"), ("PUT", "/inbox"), ("DELETE", path), ("POST", path),
        ]:  # fmt: skip
            self.ask(method, where, BODY if method in ("POST", "PUT") else None)
        self.assertEqual(len(self.lines()), 1)

    def test_a_line_tells_all_about_a_refusal(self) -> None:
        started = utc_now()
        answer = self.post(REFUSED, User_Agent="tester/1", X_Twice="ö")
        (line,) = self.lines()
        problem = self.assert_problem(answer, 400)
        self.assertTrue(started <= line["time"] <= utc_now(), line["time"])
        self.assertRegex(line["name"], "^[0-9]{8}_[0-9]{6}_[0-9a-f]{32}$")
        self.assertEqual(line["client"], "127.0.0.1")
        self.assertEqual(line["target"], "/inbox")
        self.assertEqual(line["headers"]["User-Agent"], "tester/1")
        self.assertEqual(line["headers"]["Content-Type"], JSON_LD)
        self.assertEqual(line["detail"], problem["detail"])
        self.assertEqual(line["pattern"], "Request Review")
        self.assertEqual(len(problem["errors"]), 2)
        key = operator.itemgetter("code")
        findings = sorted(problem["errors"] + problem["warnings"], key=key)
        self.assertEqual(sorted(line["findings"], key=key), findings)
        self.assertEqual(json.loads(line["body"]), REFUSED)
        about = {"id": "offer-1", "object.id": OFFER["object"]["id"]}
        actor = {f"actor.{name}": OFFER["actor"][name] for name in ("id", "name")}
        self.assertEqual(line["about"], {**about, **actor})

    def test_a_line_about_what_was_stored_has_its_name_and_not_its_body(self) -> None:
        location = self.post().headers["Location"]
        (line,) = self.lines()
        self.assertEqual(path_of(location), "/inbox/" + line["name"])
        self.assertNotIn("body", line)

    def test_a_body_that_is_no_text_is_kept_as_it_came(self) -> None:
        self.post(b"\xff\x00")
        (line,) = self.lines()
        self.assertEqual(base64.b64decode(line["body_base64"]), b"\xff\x00")
        self.assertNotIn("body", line)
        self.assertEqual(self.deliveries(), [line])

    def test_secrets_are_masked(self) -> None:
        more = {"Proxy-Authorization": "Basic s3cret"}
        self.post(Authorization="Bearer s3cret", Cookie="session=s3cret", **more)
        self.post(authorization="Basic s3cret")
        self.assertNotIn(b"s3cret", self.path.read_bytes())
        self.assertEqual(self.path.read_bytes().count(b"\n"), 2)  # and no empty lines
        self.assertEqual(self.lines()[0]["headers"]["Authorization"], "(masked)")

    def test_secrets_do_not_leak_through_what_is_malformed(self) -> None:
        for line in (
            "Authorization : Bearer s3cret",
            "X: y\r\n s3cret",
            "Authorization: s3cret\x07",
        ):
            (answer,) = raw(self.server, post_head("User-Agent: tester", line), "half-close")
            self.assertEqual(answer.status, 400)
            self.assertNotIn(b"s3cret", answer.body)
        raw(self.server, post_head("Authorization: s3cret")[:-4], "half-close")
        raw(
            self.server, post_head().replace(b"/in", b"http://me:s3cret@localhost/in"), "half-close"
        )
        self.assertEqual(len(self.lines()), 5)
        self.assertNotIn(b"s3cret", self.path.read_bytes())
        for line in self.lines()[:3]:  # what came before the malformed one is worth knowing
            self.assertEqual(line["headers"]["User-Agent"], "tester")

    def test_long_texts_do_not_make_it_longer(self) -> None:
        self.assertEqual(self.post({**OFFER, "id": "urn:x:" + "y" * 5_000}).status, 201)
        (line,) = self.lines()
        self.assertEqual(len(line["about"]["id"]), coarinbox.ABOUT_LENGTH)

    def test_headers_of_one_name_are_joined(self) -> None:
        raw(self.server, post_head("X-Trace: a", "x-trace: b", "Content-Length: 0"), "half-close")
        self.assertEqual(self.lines()[0]["headers"]["X-Trace"], "a, b")

    def test_a_restart_forgets_nothing(self) -> None:
        self.post()
        self.post(REFUSED)
        before = self.deliveries()
        self.assertEqual([delivery["status"] for delivery in before], [400, 201])
        self.server.server_close()
        with serving(STORE_DIR=self.server.store.directory) as again:
            self.assertEqual(ask(again, "GET", "/deliveries").json()["deliveries"], before)

    def test_lines_that_cannot_be_read_are_passed_over(self) -> None:
        self.post(REFUSED)
        (good,) = self.lines()
        bad: list[Any] = [{**good, member: 5} for member in good if member != "status"]
        bad += [{**good, "status": "400"}, {**good, "pattern": []}, {**good, "stranger": ""}]
        needed = good.keys() - {"body", "simulated"}
        bad += [{**good, "name": "\ud800"}, {**good, "name": good["name"] + "\ndata: x"}]
        bad += [{**good, "headers": {"a": math.nan}}, {**good, "headers": {"a": math.inf}}]
        bad += [{name: good[name] for name in good if name != left_out} for left_out in needed]
        bad += [{**good, "findings": [finding]} for finding in (None, {}, {"level": "E"}, [1])]
        for member in ("message", "spec"):
            bad += [{**good, "findings": [{**good["findings"][0], member: 1}]}]
        bad += [
            {**good, "about": {"id": 1}},
            {**good, "headers": [1]},
            {**good, "body_base64": "?"},
        ]
        bad += [None, [], 1, "", {}]
        torn = [b"", b"{", b"\xff", b"\0" * 9, b"[" * 99_999, json.dumps(good).encode()[:-9]]
        lines = [json.dumps(entry).encode() for entry in bad]
        with self.path.open("ab") as file:
            file.write(b"\n".join([*lines, *torn]))
        self.post(REFUSED)
        self.assertEqual(len(self.deliveries()), 2)
        for path in ("/", f"/deliveries/{good['name']}"):
            self.assertEqual(self.ask("GET", path, headers=HTML).status, 200)

    def test_lines_that_can_just_be_read_are(self) -> None:
        self.post(REFUSED)
        (good,) = self.lines()
        del good["simulated"]
        self.path.write_text(json.dumps({**good, "body": "half a pair: \ud800"}) + "\n")
        (delivery,) = self.deliveries()
        self.assertEqual((delivery["body"], delivery["simulated"]), ("half a pair: ?", False))

    def test_a_torn_line_does_not_spoil_the_next_one(self) -> None:
        self.post()
        whole = self.path.read_bytes()
        for length in (1, len(whole) // 2, len(whole) - 1):
            self.path.write_bytes(whole + whole[:length])
            before = len(self.deliveries())
            self.post(REFUSED)
            self.assertEqual(len(self.deliveries()), before + 1)
            self.assertEqual(self.deliveries()[0]["status"], 400)

    def test_a_log_that_was_deleted_begins_anew(self) -> None:
        self.post()
        self.path.unlink()
        self.assertEqual(self.deliveries(), [])
        self.post(REFUSED)
        self.assertEqual(self.statuses(), [400])

    def test_emptying_the_inbox_forgets_the_deliveries(self) -> None:
        self.post()
        self.post(REFUSED)
        self.assertEqual(self.ask("DELETE", "/inbox").status, 204)
        self.assertEqual(self.deliveries(), [])
        self.assertEqual(self.ask("DELETE", "/inbox").status, 204)

    def test_what_is_stored_while_the_inbox_is_emptied_has_its_line(self) -> None:
        for number in range(300):
            path = self.server.store.path(f"20200101_000000_{number:032}")
            pathlib.Path(path).write_bytes(BODY)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            emptied = pool.submit(self.ask, "DELETE", "/inbox")
            pool.map(lambda _: self.post(), range(40))
        self.assertEqual(emptied.result().status, 204)
        self.assertLessEqual(set(self.stored()), set(self.names()))

    def test_the_lines_are_in_the_order_of_their_times(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            pool.map(lambda _: self.post(REFUSED), range(200))
        times = [line["time"] for line in self.lines()]
        self.assertEqual(len(times), 200)
        self.assertEqual(times, sorted(times))

    def test_two_inboxes_may_share_a_log(self) -> None:
        with serving(STORE_DIR=self.server.store.directory) as other:
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                servers = [self.server, other] * 20
                pool.map(lambda server: ask(server, "POST", "/inbox", REFUSED), servers)
            self.assertEqual(len(self.lines()), 40)
            self.assertEqual(
                ask(other, "GET", "/deliveries").json()["deliveries"], self.deliveries()
            )

    def test_memory_does_not_grow_with_the_log(self) -> None:
        """The log begins with 1 GiB of nothing, which takes no room on the disk."""
        with self.path.open("wb") as file:
            file.truncate(2**30)
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        for _ in range(60):
            self.post(REFUSED)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        newest = self.names("?limit=1")[0]
        for path in ("/", "/deliveries", f"/deliveries?since={newest}"):
            self.assertEqual(self.ask("GET", path, headers=HTML).status, 200)
        with Listener(self.server, f"/deliveries?since={newest}"):
            self.assertLess(tracemalloc.get_traced_memory()[1], 5_000_000)


class DeliveryLogFaultTest(DeliveriesTest):
    faults_expected = True

    def test_a_log_that_cannot_be_written_is_no_reason_to_refuse(self) -> None:
        self.path.mkdir()
        self.assert_serves()
        self.assertEqual(len(self.stored()), 1)
        self.assertIn("a delivery could not be logged", self.log_lines()[-2])
        for path in ("/deliveries", "/", f"/inbox/{self.stored()[0]}"):
            self.assert_problem(self.ask("GET", path, headers=HTML), 500)
        self.path.rmdir()
        self.assert_serves()
        self.assertEqual(self.statuses(), [201])

    @unittest.skipUnless(hasattr(os, "mkfifo"), "this system has no named pipes")
    def test_what_is_planted_in_its_place_leads_nowhere(self) -> None:
        elsewhere = self.path.with_name("elsewhere")
        for plant in (lambda: os.mkfifo(self.path), lambda: self.path.symlink_to(elsewhere)):
            plant()  # type: ignore[no-untyped-call]
            self.assert_serves()
            self.assert_problem(self.ask("GET", "/deliveries"), 500)
            self.path.unlink()
        self.assertFalse(elsewhere.exists())


HTML = {"Accept": "text/html"}


class QueryTest(DeliveriesTest):
    def setUp(self) -> None:
        super().setUp()
        self.post(ACCEPT)
        self.post(REFUSED)
        self.post("ungültig".encode("latin-1"))
        self.post(changed(OFFER, "origin.id", "https://Ünïcode.example.org/"))

    def test_the_newest_come_first(self) -> None:
        self.assertEqual(self.statuses(), [201, 400, 400, 201])
        self.assertEqual(self.names(), [line["name"] for line in reversed(self.lines())])

    def test_each_parameter_selects(self) -> None:
        names = self.names()
        for query, expected in [
            ("limit=2", [0, 1]), ("limit=1000", [0, 1, 2, 3]),
            ("status=400", [1, 2]), ("status=4xx", [1, 2]), ("status=2xx", [0, 3]),
            ("status=404", []), ("status=5xx", []),
            ("pattern=Accept", [3]), ("pattern=Request+Review", [0, 2]), ("pattern=Reject", []),
            (f"since={names[2]}", [0, 1]), (f"since={names[0]}", []),
            ("since=20200101_000000_" + "0" * 32, [0, 1, 2, 3]),
            ("since=2020-01-01", [0, 1, 2, 3]), ("since=2020-01-01T00:00Z", [0, 1, 2, 3]),
            (f"since={self.deliveries()[0]['time']}", None), ("since=2999-01-01T00:00:00Z", []),
            (f"before={names[1]}", [2, 3]), (f"before={names[3]}", []),
            (f"before={names[0]}&since={names[3]}&status=400&limit=1", [1]),
            ("q=", [0, 1, 2, 3]), ("limit=&status=&pattern=&since=&before=&q=", [0, 1, 2, 3]),
            ("q=REFUSED", [1, 2]), ("q=not+UTF-8", [1]),
            ("q=must+be+an+object", [2]), ("q=origin-object", [2]), ("q=offer-1", [2]),
            ("q=%C3%9CN%C3%AFCODE", [0]), (f"q={names[3]}", [3]), ("q=request+review", [0, 2]),
        ]:  # fmt: skip
            with self.subTest(query):
                selected = self.names(f"?{query}")
                if expected is None:  # the clock may not have moved between two of them
                    self.assertEqual(selected, names[: len(selected)])
                    self.assertTrue(selected)
                else:
                    self.assertEqual(selected, [names[index] for index in expected])

    def test_a_time_selects_from_then_on(self) -> None:
        times = "2026-01-31T11:59:59.999Z", "2026-01-31T12:00:00.000Z", "2026-01-31T12:00:00.001Z"
        lines = [{**line, "time": moment} for line, moment in zip(self.lines(), times)]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for since, count in [
            ("2026-01-31", 3), ("2026-01-31T12:00Z", 2), ("2026-01-31T12:00:00Z", 2),
            ("2026-01-31T12:00:00.000Z", 2), ("2026-01-31T12:00:00.001Z", 1),
            ("2026-01-31T12:00:01Z", 0), ("2026-02-01", 0),
        ]:  # fmt: skip
            self.assertEqual(len(self.names(f"?since={since}")), count, since)

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
            ("q=%FF", "utf-8"),
        ]:  # fmt: skip
            for path in ("/deliveries", "/"):
                with self.subTest(query, path=path):
                    problem = self.assert_problem(self.ask("GET", f"{path}?{query}"), 400)
                    self.assertIn(expected, problem["detail"])

    def test_a_single_one_can_be_had_by_its_name(self) -> None:
        for delivery in self.deliveries():
            self.assertEqual(self.ask("GET", f"/deliveries/{delivery['name']}").json(), delivery)
        unknown = "20200101_000000_" + "0" * 32
        self.assert_problem(self.ask("GET", f"/deliveries/{unknown}"), 404)
        self.assert_problem(self.ask("DELETE", f"/deliveries/{delivery['name']}"), 405)


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
            lines = list(iter(self.stream.readline, b"\n"))
            fields = dict(
                line.decode().rstrip("\n").split(": ", 1) for line in lines if line != b":\n"
            )
            if fields:
                return Event(fields["id"], json.loads(fields["data"]))
        raise AssertionError("no event came")

    def comment(self) -> None:
        """Wait for the next comment, which comes when there is nothing new."""
        while self.stream.readline() != b":\n":
            pass


class EventsTest(DeliveriesTest):
    def setUp(self) -> None:
        patch = unittest.mock.patch("coarinbox.HEARTBEAT", 0.02)
        patch.start()
        self.addCleanup(patch.stop)
        super().setUp()

    def listen(self, path: str = "/deliveries", **headers: str) -> Listener:
        listener = Listener(self.server, path, **headers)
        self.addCleanup(listener.__exit__)
        self.assertEqual(listener.stream.status, 200)
        return listener

    def assert_ends(self, listener: Listener) -> None:
        with self.assertRaises(http.client.IncompleteRead):
            for _ in range(1000):  # as long as there are heartbeats
                listener.stream.read(1)

    def test_one_who_comes_while_the_inbox_ends_does_not_keep_it(self) -> None:
        bookmark = self.server.deliveries.bookmark

        def ending(query: coarinbox.Query) -> coarinbox.Bookmark:
            self.server.shutdown()
            self.server.hang_up()
            return bookmark(query)

        with unittest.mock.patch.object(self.server.deliveries, "bookmark", ending):
            listener = self.listen()
        self.assert_ends(listener)

    def test_one_who_was_slow_once_does_not_keep_it_either(self) -> None:
        listener = self.listen()
        for _ in range(10):  # more than fits into the buffers of a connection
            self.post(b"x" * 1_000_000)
        for _ in range(10):
            self.assertEqual(listener.event().data["status"], 400)
        self.server.hang_up()
        self.assert_ends(listener)

    def test_a_line_that_is_just_being_written_comes_when_it_is_whole(self) -> None:
        self.post(OFFER)
        line = self.path.read_bytes()
        with self.listen() as listener, self.path.open("ab", buffering=0) as log:
            log.write(line[:99])
            listener.comment()
            listener.comment()
            log.write(line[99:])
            self.assertEqual(listener.event().data, json.loads(line))

    def test_deliveries_come_as_they_are_answered(self) -> None:
        self.post()  # before anybody listens
        listener = self.listen()
        self.assertEqual(listener.stream.headers["Content-Type"], "text/event-stream")
        for document in (ACCEPT, REFUSED, b"no"):
            self.post(document)
            newest = self.deliveries()[0]
            self.assertEqual(listener.event(), Event(newest["name"], newest))

    def test_who_comes_back_misses_nothing(self) -> None:
        listener = self.listen()
        self.post()
        last = listener.event().id
        listener.__exit__()
        missed = [self.post(REFUSED).status for _ in range(3)]
        self.server.server_close()
        with serving(STORE_DIR=self.server.store.directory) as again:
            with Listener(again, Last_Event_ID=last) as back:
                self.assertEqual([back.event().data["status"] for _ in missed], missed)
                ask(again, "POST", "/inbox", ACCEPT)
                self.assertEqual(back.event().data["status"], 201)

    def test_the_last_event_counts_more_than_the_url(self) -> None:
        for _ in range(3):
            self.post()
        third, second, first = self.names()
        path = f"/deliveries?since={first}"
        self.assertEqual(self.listen(path).event().id, second)
        self.assertEqual(self.listen(path, Last_Event_ID=second).event().id, third)

    def test_an_id_that_nobody_knows_brings_everything(self) -> None:
        self.post()
        self.post()
        for last in ("20200101_000000_" + "0" * 32, "?", "2020-01-01"):
            listener = self.listen(Last_Event_ID=last)
            self.assertEqual([listener.event().id, listener.event().id], self.names()[::-1])

    def test_they_may_be_selected(self) -> None:
        listener = self.listen("/deliveries?status=4xx&q=JSON")
        for document in (ACCEPT, REFUSED, b"no"):
            self.post(document)
        self.assertEqual(listener.event().id, self.names()[0])

    def test_a_log_that_begins_anew_is_followed_from_its_beginning(self) -> None:
        for _ in range(3):
            self.post()
        listener = self.listen()
        for forget in (self.path.unlink, lambda: self.ask("DELETE", "/inbox")):
            forget()
            expected: list[str] = []
            for _ in range(5):  # longer than the one before
                self.post(REFUSED)
                expected.insert(0, self.names()[0])
            self.assertEqual([listener.event().id for _ in range(5)], expected[::-1])

    def test_a_log_that_was_cut_short_is_followed_from_there(self) -> None:
        for _ in range(4):
            self.post()
        listener, whole = self.listen(), self.path.read_bytes()
        for rest in (whole.splitlines(keepends=True)[0], whole[:-100], b""):
            self.path.write_bytes(rest)
            for _ in range(3):  # by the third comment it has looked around since
                listener.comment()
            for _ in range(5):
                self.post(REFUSED)
            expected = self.names()[:5][::-1]
            while expected:
                if listener.event().id == expected[0]:
                    expected.pop(0)

    def test_a_log_that_is_replaced_while_it_is_read_is_read_again(self) -> None:
        listener, find = self.listen(), coarinbox.Bookmark.find
        for _ in range(4):
            self.post()
            listener.event()

        def find_and_replace(mark: Any, file: Any) -> Any:
            found, log = find(mark, file), self.path.read_bytes()
            if b'"name": "2' in log:
                self.path.write_bytes(log.replace(b'"name": "2', b'"name": "1'))
            return found

        with unittest.mock.patch.object(coarinbox.Bookmark, "find", find_and_replace):
            self.post()
            names: set[str] = set()
            while len(names) < 5:
                names.add(listener.event().id[1:])
        self.assertEqual(names, {name[1:] for name in self.names()})

    def test_a_log_that_was_cut_and_has_grown_is_followed_still(self) -> None:
        self.post()
        listener = self.listen(Last_Event_ID="?")
        listener.event()
        self.post()
        listener.event()
        first = self.path.read_bytes().splitlines(keepends=True)[0]
        self.path.write_bytes(first + b"{torn")
        self.post(REFUSED)
        while listener.event().data["status"] != 400:
            pass

    def test_what_another_inbox_on_the_same_store_gets_comes_too(self) -> None:
        listener = self.listen()
        with serving(STORE_DIR=self.server.store.directory) as other:
            ask(other, "POST", "/inbox", ACCEPT)
        self.assertEqual(listener.event().data["status"], 201)

    def test_one_that_stops_reading_costs_nobody_anything(self) -> None:
        deaf = [self.listen() for _ in range(5)]
        large = changed(REFUSED, "summary", "x" * 900_000)
        listener = self.listen()
        for _ in range(10):  # more than fits into the buffers of a connection
            self.assertEqual(self.post(large).status, 400)
            self.assertEqual(listener.event().data["status"], 400)
        started = time.monotonic()
        self.server.server_close()  # waits for all that is served
        self.assertLess(time.monotonic() - started, self.server.settings.REQUEST_TIMEOUT / 2)
        self.assertEqual(len(deaf), 5)

    def test_each_event_has_the_time_of_a_request(self) -> None:
        large = changed(REFUSED, "summary", "x" * 900_000)
        impatient = serving(STORE_DIR=self.server.store.directory, REQUEST_TIMEOUT=0.2)
        with impatient as server, Listener(server) as listener:
            started = time.monotonic()
            while time.monotonic() < started + 0.25:
                listener.comment()
            for _ in range(10):
                self.assertEqual(self.post(large).status, 400)
            for _ in range(10):
                self.assertEqual(listener.event().data["status"], 400)

    def test_one_that_leaves_is_forgotten(self) -> None:
        listener = self.listen()
        self.assertEqual(len(self.server.connections), 1)
        listener.__exit__()
        self.wait_until(lambda: not self.server.connections)
        self.assertFalse([line for line in self.log_lines() if "lost" in line])

    def test_head_is_told_what_there_is(self) -> None:
        answer = self.ask("HEAD", "/deliveries", headers={"Accept": "text/event-stream"})
        self.assertEqual(answer.headers["Content-Type"], "text/event-stream")

    def test_who_can_read_both_gets_what_they_prefer(self) -> None:
        for accept, kind in [
            ("*/*", "application/json"), ("application/json", "application/json"),
            ("text/event-stream", "text/event-stream"), ("text/html", "text/html; charset=utf-8"),
            ("text/event-stream;q=0.5, application/json", "application/json"),
        ]:  # fmt: skip
            answer = self.ask("HEAD", "/deliveries", headers={"Accept": accept})
            self.assertEqual(answer.headers["Content-Type"], kind, accept)


class CrowdTest(DeliveriesTest):
    settings = {"MAX_CONNECTIONS": 2}

    def test_listeners_make_room_for_deliveries(self) -> None:
        with Listener(self.server), Listener(self.server):
            self.assert_serves()

    def test_one_that_was_slow_once_makes_room_like_any_other(self) -> None:
        large = changed(REFUSED, "summary", "x" * 900_000)
        for _ in range(12):  # more than fits into the buffers of a connection
            self.post(large)
        earlier = f"/deliveries?since={self.names()[-1]}"
        with Listener(self.server, earlier) as first, Listener(self.server, earlier) as second:
            for listener in (first, second):
                for _ in range(11):
                    listener.event()
                listener.comment()
            self.assert_serves()


class ScarceTest(DeliveriesTest):
    settings = {"MAX_CONNECTIONS": 3}

    def test_no_request_is_cut_off_by_making_room(self) -> None:
        """A client whose idle connection was ended tries again; none is told that it broke off."""

        def post_often(_: int) -> None:
            connection = http.client.HTTPConnection(*address(self.server), timeout=10)
            for _ in range(40):
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


class Page(html.parser.HTMLParser):
    """A page that was read: its elements, and that each of them is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes}, [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag == "mark":  # it is a line
            self.handle_data("\n")
        element = self.open.pop()
        assert element.tag == tag, (element.tag, tag)

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.texts.append(data)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [
            element
            for element in self.elements
            if element.tag == tag and wanted.items() <= element.attributes.items()
        ]

    def one(self, tag: str, **attributes: str) -> Element:
        (element,) = self.all(tag, **attributes)
        return element

    @property
    def rows(self) -> list[str]:
        return [
            row.text for row in self.all("a") if row.attributes.get("id", "").startswith("row-")
        ]


class Element(NamedTuple):
    tag: str
    attributes: dict[str, str]
    texts: list[str]

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


class PageTest(DeliveriesTest):
    def page(self, path: str = "/") -> Page:
        answer = self.ask("GET", path, headers=HTML)
        self.assertEqual(answer.status, 200, answer)
        self.assertTrue(answer.headers["Content-Type"].startswith("text/html"))
        return Page(answer.body.decode())

    def newest(self) -> Page:
        return self.page("/deliveries/" + self.names()[0])

    def test_the_list_says_what_came_and_what_became_of_it(self) -> None:
        self.post(OFFER)
        self.post(changed(ACCEPT, "origin.inbox", ABSENT))
        self.post(REFUSED)
        self.post(b"no")
        rows = self.page().rows
        self.assertEqual(len(rows), 4)
        expected: list[list[Any]] = [
            ["400 refused", "the body is not JSON"],
            ["400 refused", "Request Review", "https://orcid.org/0000-0002-1825-0097",
             PREPRINT["id"], "id must be an absolute URI; origin must be an object; id should"],
            ["201 stored", "Accept", JOURNAL["id"], OFFER_ID, "origin.inbox is missing"],
            ["201 stored", "Request Review", REPOSITORY["id"], PREPRINT["id"]],
        ]  # fmt: skip
        for row, texts in zip(rows, expected):
            self.assertRegex(row, "^[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2} ")
            for text in texts:
                self.assertIn(text, row)

    def test_findings_stand_beside_the_members_they_are_about(self) -> None:
        self.post(changed(REFUSED, "target.inbox", ABSENT))
        page = self.newest()
        self.assertEqual(page.one("h1").text, "400 refused Request Review")
        problem = self.post(changed(REFUSED, "target.inbox", ABSENT)).json()
        findings = problem["errors"] + problem["warnings"]
        marked = {
            "/id": '"id": "offer-1",',
            "/origin": '"origin": "https://r.example.org/",',
            "/target/inbox": '"target": {',  # where it is missing
            "/object/ietf:cite-as": '"object": {',
        }
        self.assertEqual({finding["pointer"] for finding in findings}, set(marked))
        for number, finding in enumerate(sorted(findings, key=lambda each: each["level"]), 1):
            item = page.one("li", id=f"finding-{number}")
            self.assertIn(finding["message"], item.text)
            self.assertIn(coarinbox.LEVELS[finding["level"]], item.text)
            self.assertEqual(page.one("a", href=f"#at-{number}").text, finding["pointer"])
            (mark,) = (mark for mark in page.all("mark") if f"[{number}]" in mark.text)
            self.assertTrue(mark.text.startswith(marked[finding["pointer"]] + " ["), mark.text)
            self.assertLessEqual(mark.attributes["class"], finding["level"])  # the gravest of all
            self.assertEqual(
                page.one("a", href=f"#finding-{number}").attributes["id"], f"at-{number}"
            )
            self.assertEqual(len(page.all("a", href=f"../constraints#{finding['code']}")), 1)
        self.assertEqual(len(page.all("mark")), 4)

    def test_the_payload_is_shown_as_json_line_by_line(self) -> None:
        document = {"@id": 1, "a/b~c": {"text": "ü\n\u202e", "numbers": [1, 2.5, None], "no": {}}}
        self.post({**document, "list": [[], {"x": True}]})
        first, *lines = "".join(self.newest().all("pre")[0].texts).splitlines()
        self.assertTrue(first.startswith("{ [1] [2]"), first)
        self.assertEqual(lines, [
            '  "@id": 1,',
            '  "a/b~c": {',
            r'    "text": "ü\n\u202e",',
            '    "numbers": [1, 2.5, null],',
            '    "no": {}',
            "  },",
            '  "list": [',
            "    [],",
            "    {",
            '      "x": true',
            "    }",
            "  ]",
            "}",
        ])  # fmt: skip

    def test_whatever_came_instead_of_json_is_shown(self) -> None:
        for body, shown in [
            (b"<p>no\r\nJSON\t", "<p>no JSON\\t"), (b"\xff\0", "\\xff\\u0000"),
        ]:  # fmt: skip
            self.post(body)
            page = self.newest()
            self.assertEqual(page.all("pre")[0].text, shown)
            self.assertEqual(page.one("h1").text, "400 refused")
            self.assertEqual(page.one("title").text, "400 refused · coarinbox")
            path = f"/deliveries/{self.names()[0]}/body"
            answer = self.ask("GET", path)
            self.assertEqual(answer.body, body)
            self.assertEqual(answer.headers["Content-Type"], "text/plain; charset=utf-8")
        self.post(b"")
        self.assertIn("Nothing of it was read.", self.newest().one("main").text)

    def test_the_request_is_shown_without_secrets(self) -> None:
        self.post(REFUSED, Authorization="Bearer s3cret", X_Trace="<b>")
        request = self.newest().all("pre")[1].text
        self.assertTrue(request.startswith("POST /inbox Host: "), request)
        self.assertIn("X-Trace: <b>", request)
        self.assertIn("Authorization: (masked)", request)

    def test_a_conversation_is_shown_with_what_it_lacks(self) -> None:
        def conversation() -> tuple[list[str], list[str]]:
            page = self.newest()
            current = page.all("a", **{"aria-current": "page"})
            own = [f"row-{self.names()[0]}"] if page.rows else []
            self.assertEqual([row.attributes["id"] for row in current], own)
            return page.rows, [note.text for note in page.all("p", class_="warning")]

        self.post(NOTIFICATIONS["Undo Offer"])
        rows, notes = conversation()
        self.assertEqual(rows, [])
        self.assertIn("No other delivery belongs to it.", self.newest().one("main").text)
        self.assertEqual(notes, [f"It replies to {OFFER_ID}, which was never delivered here."])
        self.post(changed(OFFER, "id", "urn:uuid:another"))
        self.assertEqual(conversation(), ([], []))
        self.assertEqual(self.newest().one("div", id="missing").text, "")
        self.post(changed(OFFER, "origin", ABSENT))
        self.post(OFFER)
        self.post(ACCEPT)
        rows, notes = conversation()
        self.assertEqual(notes, [])
        verdicts = [re.sub("https?:.*|urn:.*", "", row[20:]).strip() for row in rows]
        self.assertEqual(verdicts, [
            "201 stored Undo Offer", "400 refused Request Review", "201 stored Request Review",
            "201 stored Accept",
        ])  # fmt: skip

    def test_what_was_asked_shows_its_answer(self) -> None:
        self.post(OFFER)
        self.post(ACCEPT)
        page = self.page(f"/deliveries/{self.names()[1]}")
        self.assertEqual(page.one("title").text, "201 stored Request Review · coarinbox")
        rows = page.rows
        self.assertEqual([re.sub("https?:.*", "", row[20:]).strip() for row in rows], [
            "201 stored Request Review", "201 stored Accept",
        ])  # fmt: skip

    def test_many_answers_do_not_hide_what_they_answer(self) -> None:
        self.post(OFFER)
        for _ in range(60):
            self.post(ACCEPT)
        page = self.newest()
        self.assertEqual(page.all("p", class_="warning"), [])
        self.assertEqual(len(page.rows), 51)
        self.assertIn("Request Review", page.rows[0])

    def test_a_page_is_not_much_larger_than_what_it_shows(self) -> None:
        long_name, members = "k" * 200_000, {str(number): 0 for number in range(9_000)}
        self.post(changed(REFUSED, "summary", {long_name: members}))
        self.post(changed(REFUSED, "summary", {long_name: [{}] * 50_000}))
        for name in self.names():
            tracemalloc.start()
            page = self.page(f"/deliveries/{name}")
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.assertLess(len(str(page.one("main").texts)), 400_000)
            self.assertLess(peak, 50_000_000)

    def test_only_web_addresses_become_links(self) -> None:
        self.post(REFUSED)
        line = self.path.read_text().replace(
            "https://coar-notify.net/spec", "javascript:alert(1)//"
        )
        self.path.write_text(line)
        page = self.newest()
        self.assertEqual([link for link in page.all("a") if "java" in str(link.attributes)], [])
        self.assertTrue(page.all("li", id="finding-1"))

    def test_a_notification_has_the_same_view_at_its_own_address(self) -> None:
        path = path_of(self.post().headers["Location"])
        views = [self.page(path), self.newest()]
        self.assertEqual(views[0].one("main").texts, views[1].one("main").texts)
        self.assertIn(path, views[0].one("dl").text)

    def test_one_that_was_removed_keeps_its_delivery(self) -> None:
        path = path_of(self.post().headers["Location"])
        self.ask("DELETE", path)
        self.assertIn("no longer stored", self.newest().one("main").text)
        self.assert_problem(self.ask("GET", f"/deliveries/{self.names()[0]}/body"), 404)
        self.assert_problem(self.ask("GET", path, headers=HTML), 404)

    def test_one_that_was_dropped_into_the_store_is_shown_too(self) -> None:
        name = "20200101_000000_" + "a" * 32
        for body, text in ((json.dumps(REFUSED).encode(), "offer-1"), (b"no", "no")):
            pathlib.Path(self.server.store.path(name)).write_bytes(body)
            page = self.page(f"/inbox/{name}")
            self.assertTrue(page.one("h1").text.startswith("found"))
            self.assertIn(text, page.all("pre")[0].text)

    @unittest.skipUnless(shutil.which("curl"), "curl is not installed")
    def test_an_empty_inbox_says_how_to_send_the_first_notification(self) -> None:
        url, command = ("".join(pre.texts) for pre in self.page().all("pre", class_="copy"))
        self.assertEqual(url, self.server.base.replace("localhost", "127.0.0.1") + "/inbox")
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=20)
        self.assertIn("201 Created", done.stdout)
        self.assertEqual(self.deliveries()[0]["findings"], [])
        self.assertEqual(len(self.page().rows), 1)

    def test_the_filter_works_by_itself(self) -> None:
        for document in (ACCEPT, REFUSED, OFFER):
            self.post(document)
        page = self.page("/?q=offer-1&status=4xx")
        self.assertEqual(len(page.rows), 1)
        self.assertEqual(page.one("input", id="q").attributes["value"], "offer-1")
        chosen = [option for option in page.all("option") if "selected" in option.attributes]
        self.assertEqual([option.attributes["value"] for option in chosen], ["4xx"])
        self.assertEqual(len(self.page("/?q=&status=").rows), 3)
        page = self.page("/?q=nowhere")
        self.assertEqual((page.rows, page.one("p", id="newest").text), ([], ""))
        self.assertEqual(page.one("title").text, "Deliveries · coarinbox")
        nothing = self.page("/?q=%22%3E%3Cb%3E")
        self.assertIn("No delivery matches", nothing.one("div", id="deliveries").text)
        self.assertEqual(nothing.one("input", id="q").attributes["value"], '"><b>')

    def test_a_very_long_payload_is_cut_and_says_so(self) -> None:
        self.post({**OFFER, "summary": dict.fromkeys(map(str, range(3000)), 0)})
        shown = self.newest().one("section", **{"aria-labelledby": "payload"}).text
        self.assertIn("only 2000 lines are shown", shown)
        self.assertIn('"1900": 0', shown)
        self.assertNotIn('"2500": 0', shown)

    def test_each_verdict_has_its_word(self) -> None:
        for query in ("status=503", "status=301", "close=1"):
            with contextlib.suppress(http.client.HTTPException, ConnectionError):
                self.ask("POST", f"/inbox?{query}", ACCEPT)
        self.post()
        words = [each.text for each in self.page().all("b") if "class" in each.attributes]
        self.assertEqual(words, ["201 stored", "dropped", "301 redirected", "503 failed"])

    def test_why_is_told_in_the_colour_of_the_verdict(self) -> None:
        self.post(changed(ACCEPT, "target.inbox", ABSENT))
        self.post(REFUSED)
        reasons = [each for each in self.page().all("span") if "why" in str(each.attributes)]
        colours = [each.attributes["class"] for each in reasons]
        self.assertEqual(colours, ["why refused", "why warning"])

    def test_the_filter_keeps_what_it_has_no_field_for(self) -> None:
        page = self.page("/?pattern=Accept&since=2026-01-01&status=400")
        options = [(each.attributes["value"], each.text) for each in self.page().all("option")]
        stored = [("2xx", "2xx stored"), ("4xx", "4xx refused"), ("5xx", "5xx failed")]
        self.assertEqual(options, [("", "all"), *stored])
        kept = {field.attributes["name"]: field.attributes["value"] for field in page.all("input")}
        self.assertEqual(kept, {"q": "", "pattern": "Accept", "since": "2026-01-01"})
        chosen = [option for option in page.all("option") if "selected" in option.attributes]
        self.assertEqual(
            [(each.attributes["value"], each.text) for each in chosen], [("400", "400")]
        )

    def test_what_was_put_into_the_store_by_hand_has_all_its_views(self) -> None:
        name = "20200101_000000_" + "a" * 32
        pathlib.Path(self.server.store.path(name)).write_bytes(BODY)
        page = self.page(f"/inbox/{name}")
        self.assertIn("found Accept", page.one("h1").text)
        facts = [each.text for each in page.all("dt")]
        self.assertEqual(facts[:4], ["time", "client", "stored as", "id"])
        shown = self.ask("GET", f"/inbox/{name}", headers=HTML).body
        self.assertIn(b"<dt>client</dt><dd></dd>", shown)
        self.assertIn(b"<pre>POST \n</pre>", shown)
        link = next(each for each in page.all("a") if each.text == "As it came")
        path = urllib.parse.urljoin(f"/inbox/{name}", link.attributes["href"])
        self.assertEqual(self.ask("GET", path).body, BODY)
        answer = self.ask("GET", f"/deliveries/{name}")
        self.assertEqual((answer.status, answer.json()["pattern"]), (200, "Accept"))
        self.assert_problem(self.ask("GET", f"/deliveries/{name[:-1]}b"), 404)
        for octets, codes in ((json.dumps([]).encode(), ["notification-object"]), (b"no", [])):
            pathlib.Path(self.server.store.path(name)).write_bytes(octets)
            findings = self.ask("GET", f"/deliveries/{name}").json()["findings"]
            self.assertEqual([finding["code"] for finding in findings], codes)

    def test_older_deliveries_are_a_link_away(self) -> None:
        for number in range(100):
            self.post(changed(REFUSED, "id", f"number {number}"))
        seen, pages = [], 0
        path: str | None = "/?status=400"
        while path:
            page = self.page(path)
            seen += [link.attributes["id"] for link in page.all("a") if "id" in link.attributes]
            links = {link.text: link.attributes["href"] for link in page.all("a")}
            newest = "./?status=400" if pages else None
            self.assertEqual(links.get("Newest deliveries"), newest)
            older = links.get("Older deliveries")
            path, pages = older and urllib.parse.urljoin(path, older), pages + 1
            self.assertEqual(len(seen), 50 * pages)
        self.assertEqual(seen, [f"row-{name}" for name in self.names("?limit=1000")])
        self.assertEqual(pages, 2)

    def test_every_link_leads_somewhere(self) -> None:
        for document in (OFFER, ACCEPT, REFUSED, b"no"):
            self.post(document)
        base = "http://{}:{}".format(*address(self.server))
        seen, waiting = set(), {"/", "/inbox", "/inbox/", "/deliveries"}
        while waiting:
            path = waiting.pop()
            seen.add(path)
            if path.endswith("/body"):
                self.assertEqual(self.ask("GET", path).status, 200)
                continue
            page = self.page(path)
            ids = [
                element.attributes["id"] for element in page.elements if "id" in element.attributes
            ]
            self.assertEqual(len(set(ids)), len(ids), "an id comes twice")
            for link in page.all("a"):
                url = urllib.parse.urljoin(base + path, link.attributes["href"])
                target, _, fragment = url.partition("#")
                if target == base + path and fragment:
                    self.assertIn(fragment, ids)
                elif target.startswith(base) and path_of(target) not in seen:
                    waiting.add(path_of(target))
        self.assertGreater(len(seen), 10)

    def test_no_text_can_become_markup_or_an_address(self) -> None:
        for hostile in HOSTILE:
            self.post(hostile)
        pages = [self.page(), *(self.page(f"/deliveries/{name}") for name in self.names())]
        self.assertGreater(len(pages), 10)
        allowed = set("html head meta title link style body header a code span button main h1 h2 p"
                      " dl dt dd div section ol li pre mark b time form label input select option"
                      " nav script".split())  # fmt: skip
        for page in pages:
            self.assertEqual({element.tag for element in page.elements} - allowed, set())
            self.assertEqual(len(page.all("script")), 1)
            for element in page.elements:
                href = element.attributes.get("href", "")
                self.assertRegex(href, r"\A(https?://|\.?\./|[#?]|data:,\Z|\Z)")
                self.assertFalse([name for name in element.attributes if name.startswith("on")])
            text = "".join(page.one("main").texts)
            self.assertEqual([c for c in text if not c.isprintable() and c != "\n"], [])
            self.assertLess(len(text), 600_000)

    def test_nothing_runs_but_the_script_of_the_page_itself(self) -> None:
        self.post(REFUSED)
        for path in ("/", "/inbox", "/constraints", "/deliveries/" + self.names()[0]):
            answer = self.ask("GET", path, headers=HTML)
            self.assertEqual(answer.headers["X-Content-Type-Options"], "nosniff")
            policy = dict(
                directive.split(maxsplit=1)
                for directive in answer.headers["Content-Security-Policy"].split("; ")
            )
            page = Page(answer.body.decode())
            for kind in ("script", "style"):
                digest = hashlib.sha256("".join(page.one(kind).texts).encode()).digest()
                source = f"'sha256-{base64.b64encode(digest).decode()}'"
                self.assertEqual(policy[f"{kind}-src"], source)
            self.assertEqual(policy["default-src"], "'none'")
            self.assertEqual(policy["frame-ancestors"], "'none'")
            self.assertNotIn("unsafe", str(policy))


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
    hostile += [{**ACCEPT, member: text} for text in small for member in ("id", "inReplyTo", text)]
    hostile += [changed(OFFER, "object.id", text) for text in texts]
    hostile += [{**OFFER, **{f"member {number}": "<b>" for number in range(10_000)}}]
    hostile += [text.encode("utf-8", "replace") for text in texts]
    return hostile


HOSTILE = hostile_notifications()


class ForeignPageTest(DeliveriesTest):
    def test_the_pages_of_other_sites_cannot_empty_the_inbox(self) -> None:
        host, port = address(self.server)
        path = path_of(self.post().headers["Location"])
        for headers in [
            {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": ""},
            {"Origin": f"http://{host}:{port + 1}"}, {"Origin": f"http://{host}"},
            {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example"},
        ]:  # fmt: skip
            for where in ("/inbox", path):
                with self.subTest(headers, where=where):
                    problem = self.assert_problem(self.ask("DELETE", where, headers=headers), 403)
                    named = headers.get("Origin") or headers.get("Sec-Fetch-Site", "none")
                    self.assertIn(f"such as {named}; set BASE_URL", problem["detail"])
        self.assertEqual(len(self.stored()), 1)
        self.assertEqual(len(self.deliveries()), 1)

    def test_its_own_page_can(self) -> None:
        host, port = address(self.server)
        headers: dict[str, str]
        for headers in [
            {},
            {"Origin": f"http://{host}:{port}", "Sec-Fetch-Site": "same-origin"},
            {"Origin": f"http://LOCALHOST:{port}", "Host": f"localhost:{port}"},
            {"Sec-Fetch-Site": "none"},
        ]:
            with self.subTest(headers):
                self.post()
                self.assertEqual(self.ask("DELETE", "/inbox", headers=headers).status, 204)
                self.assertEqual(self.stored(), [])

    def test_behind_a_proxy_its_own_page_is_that_of_base_url(self) -> None:
        origin = {"Origin": "https://inbox.example.org", "Sec-Fetch-Site": "same-origin"}
        for base in (
            "https://Inbox.example.org/coar",
            "https://inbox.example.org:443",
            "https://me@inbox.example.org",
            "http://other",
        ):
            with serving(BASE_URL=base) as proxied:
                status = ask(proxied, "DELETE", "/inbox", headers=origin).status
                self.assertEqual(status, 403 if "other" in base else 204, base)

    def test_reading_changes_nothing(self) -> None:
        self.post()
        for path in ("/", "/inbox", "/deliveries", "/constraints", path_of(self.listed()[0])):
            for method in ("GET", "HEAD", "OPTIONS"):
                self.ask(method, path)
        self.assertEqual((len(self.stored()), len(self.deliveries())), (1, 1))


# --- Browser -------------------------------------------------------------------------------------

BROWSER = shutil.which("chromium") and shutil.which("chromedriver")
SELENIUM = importlib.util.find_spec("selenium")
AXE = HERE / ".ci/work/node_modules/axe-core/axe.min.js"  # where .ci/run puts it
QUIET = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    " disable-component-update disable-sync"
).split()


@unittest.skipUnless(BROWSER and SELENIUM, "chromium, chromedriver or selenium is not installed")
class BrowserTest(DeliveriesTest):
    """Tests in a real browser, which all of them share."""

    driver: Any
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

    @classmethod
    def tearDownClass(cls) -> None:
        cls.driver.quit()
        cls.profile.cleanup()

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.driver.get, "about:blank")
        self.window(1280, 900)
        self.scripts(True)

    def window(self, width: int, height: int, scheme: str = "light") -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def scripts(self, on: bool) -> None:
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not on})

    def open(self, path: str = "/", live: bool = True) -> None:
        self.driver.get(self.server.base + path)
        if live:
            self.wait_for("#state", "live")

    def all(self, selector: str) -> list[Any]:
        found = self.driver.find_elements("css selector", selector)
        assert isinstance(found, list)
        return found

    def text(self, selector: str) -> str:
        return " ".join(" ".join(element.text for element in self.all(selector)).split())

    def wait_for(self, selector: str, text: str, seconds: float = 10) -> None:
        """Wait until some element holds a text."""
        from selenium.common.exceptions import StaleElementReferenceException as Stale
        from selenium.webdriver.support.wait import WebDriverWait

        wait = WebDriverWait(self.driver, seconds, 0.02, ignored_exceptions=[Stale])
        wait.until(lambda _: text in self.text(selector), f"no {text!r} in {selector}")

    def run_script(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    @unittest.skipUnless(importlib.util.find_spec("coarnotify"), "coarnotify is not installed")
    def test_a_refusal_appears_within_a_second_with_its_reasons(self) -> None:
        import coarnotify.client
        import coarnotify.exceptions
        import coarnotify.patterns

        self.open()
        self.run_script("window.mark = 1")
        client = coarnotify.client.COARNotifyClient(self.server.base + "/inbox")
        offer = changed(OFFER, "origin.id", "urn:uuid:origin")
        notification = coarnotify.patterns.RequestReview(offer, validate_stream_on_construct=False)
        with self.assertRaisesRegex(coarnotify.exceptions.NotifyException, "response: 400$"):
            client.send(notification, validate=False)
        self.wait_for("#deliveries", "origin.id must be an HTTP URI", seconds=1)
        self.assertEqual(self.run_script("return window.mark"), 1, "the page was loaded again")
        live = self.text("#deliveries")
        self.assertIn("400 refused", self.text("#newest"))  # which is spoken

        self.all("#deliveries a")[0].click()
        self.wait_for("h1", "400 refused Request Review")
        (finding,) = self.all("ol.findings li")
        self.assertIn("origin.id must be an HTTP URI", finding.text)
        self.assertEqual(self.text("mark"), '"id": "urn:uuid:origin", [1]')
        (payload, _) = self.all("pre")
        self.assertGreater(finding.rect["x"], payload.rect["x"] + payload.rect["width"])
        self.assertLess(abs(finding.rect["y"] - payload.rect["y"]), 50)

        self.scripts(False)
        self.open(live=False)
        self.assertEqual(self.text("#deliveries"), live)
        self.assertFalse(self.all("#empty:not([hidden])"))
        self.all("#deliveries a")[0].click()
        self.assertEqual(self.text("mark"), '"id": "urn:uuid:origin", [1]')

    def test_a_conversation_grows_while_one_looks(self) -> None:
        self.post(OFFER)
        self.open("/deliveries/" + self.names()[0])
        self.assertIn("No other delivery", self.text("#conversation"))
        self.post(ACCEPT)
        self.wait_for("#conversation", "201 stored Accept")

    def test_the_filter_narrows_while_one_types(self) -> None:
        for document in (ACCEPT, REFUSED):
            self.post(document)
        self.open()
        (box,) = self.all("#q")
        box.send_keys("offer-1")
        self.wait_for("#deliveries", "Request Review")
        self.wait_until_gone("Accept")
        self.assertIn("q=offer-1", self.driver.current_url)
        self.post(ACCEPT)  # does not match
        self.post(changed(REFUSED, "summary", "2"))
        self.wait_for_rows(2)
        self.assertNotIn("Accept", self.text("#deliveries"))
        self.assertEqual(self.run_script("return document.activeElement.id"), "q")

    def wait_until_gone(self, text: str) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 10, 0.02).until(lambda _: text not in self.text("#deliveries"))

    def wait_for_rows(self, count: int) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        rows = "#deliveries .rows a"
        WebDriverWait(self.driver, 10, 0.02).until(lambda _: len(self.all(rows)) == count)

    def test_the_keyboard_stays_where_it_is(self) -> None:
        self.post()
        self.open()
        (row,) = self.all("#deliveries a")
        self.run_script("arguments[0].focus()", row)
        self.post(REFUSED)
        self.wait_for_rows(2)
        focused = self.run_script("return document.activeElement.id")
        self.assertEqual(focused, "row-" + self.names()[1])

    def test_the_button_empties_the_inbox_after_asking(self) -> None:
        self.post()
        self.open()
        for answer, left in (("dismiss", 1), ("accept", 0)):
            self.all("#empty")[0].click()
            getattr(self.driver.switch_to.alert, answer)()
            self.wait_for_rows(left)
            self.assertEqual(len(self.stored()), left)
        self.wait_for("#deliveries", self.server.base + "/inbox")

    def test_it_is_live_again_after_a_restart(self) -> None:
        self.open()
        settings = {"PORT": address(self.server)[1], "STORE_DIR": self.server.store.directory}
        self.server.server_close()
        self.wait_for("#state", "not connected")
        with serving(**settings) as again:
            ask(again, "POST", "/inbox", ACCEPT)
            self.wait_for("#deliveries", "201 stored")
            self.wait_for("#state", "live")

    def test_nothing_hostile_runs_or_breaks_the_layout(self) -> None:
        for hostile in HOSTILE:
            self.post(hostile)
        paths = ["/", *(f"/deliveries/{name}" for name in self.names())]
        self.assertGreater(len(paths), 30)
        for width in (1280, 400):
            self.window(width, 900)
            for path in paths if width == 400 else paths[:8]:
                with self.subTest(path, width=width):
                    self.open(path, live=False)
                    self.assertIsNone(self.run_script("return window.hacked"))
                    scrolls = "return document.documentElement.scrollWidth - innerWidth"
                    self.assertLessEqual(self.run_script(scrolls), 0)
        violations = [line for line in self.driver.get_log("browser") if "Security" in str(line)]
        self.assertEqual(violations, [])

    @unittest.skipUnless(AXE.exists(), "axe-core is not installed")
    def test_everybody_can_use_it(self) -> None:
        self.open()
        self.check_accessibility("empty")
        for document in (OFFER, ACCEPT, REFUSED, b"no"):
            self.post(document)
        details = [f"/deliveries/{name}" for name in self.names()]
        for scheme in ("light", "dark"):
            for width in (1280, 400):
                self.window(width, 900, scheme)
                for path in ("/", "/?q=nothing+like+it", "/constraints", *details):
                    self.open(path)
                    self.check_accessibility(f"{path}, {width}, {scheme}")

    def check_accessibility(self, where: str) -> None:
        self.run_script(AXE.read_text(encoding="utf-8"))
        results = self.driver.execute_async_script(
            "axe.run().then(arguments[arguments.length - 1], arguments[arguments.length - 1])"
        )
        self.assertGreater(len(results["passes"]), 10)
        problems = [
            (violation["id"], [node["html"] for node in violation["nodes"]][:3])
            for violation in results["violations"]
        ]
        self.assertEqual(problems, [], where)


# --- The program ---------------------------------------------------------------------------------


class Program:
    """An inbox that runs as a process; what it logs is read all the time, or it would stall."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self.started = threading.Event()
        self.reader = threading.Thread(target=self.read_log)
        self.reader.start()
        self.started.wait()
        self.banner = self.log[:]
        urls = [line.split()[1] for line in self.banner if line.startswith("inbox")]
        assert urls, self.banner
        self.url = urls[0]
        parts = urllib.parse.urlsplit(self.url)
        self.server_address = (str(parts.hostname), int(parts.port or 0))

    def read_log(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))
            if line.startswith("validation"):
                self.started.set()
        self.started.set()

    def ask(self, *arguments: Any, **more: Any) -> Answer:
        return ask(self, *arguments, **more)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; returns the exit status and what was logged."""
        self.process.send_signal(number)
        status = self.process.wait(20)
        self.reader.join()
        return status, "\n".join(self.log)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "COARNOTIFY_SETTINGS": "", "PYTHONUNBUFFERED": "1", **more}


@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[Program]:
    """Run an inbox as a process until the block ends."""
    options = {"env": environment(), **options}
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


# How often the test with `kill -9` kills; a hundred times take half a minute.
KILLS = int(os.environ.get("COARINBOX_KILLS", "1"))


class Done(NamedTuple):
    """What is left of a program that has ended."""

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
        before, logger = os.getcwd(), logging.getLogger()
        with contextlib.ExitStack() as stack:
            stack.callback(os.chdir, before)
            os.chdir(self.directory)
            for target, value in [
                ("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()))),
                ("sys.stdout", output),
                ("sys.stderr", errors),
                ("os.environ", environment(**env)),
            ]:
                stack.enter_context(unittest.mock.patch(target, value))
            stack.enter_context(unittest.mock.patch.object(logger, "handlers", []))
            stack.callback(logger.setLevel, logger.level)
            try:
                status = coarinbox.main(list(arguments))
            except SystemExit as end:  # of argparse
                status = int(end.code or 0)
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
        done = self.invoke(*arguments, **env)
        self.assertEqual(done.status, 2, done.errors)
        self.assertEqual(done.errors.count("\n"), 1, done.errors)
        self.assertEqual(done.output, [])
        return done.errors


class StartTest(ProgramTest):
    def test_it_says_where_it_is(self) -> None:
        with running(self.command("--port", "0"), cwd=self.directory) as inbox:
            host, port = inbox.server_address
            self.assertEqual(host, "localhost")
            self.assertEqual(inbox.banner, [
                f"coarinbox {coarinbox.__version__}",
                f"address     127.0.0.1 port {port}",
                f"inbox       http://localhost:{port}/inbox",
                f"page        http://localhost:{port}/",
                f"store       {self.directory / 'notifications'}",
                "validation  True",
            ])  # fmt: skip
            answer = inbox.ask("POST", "/inbox", ACCEPT)
            self.assertEqual(answer.status, 201)
            self.assertTrue(answer.headers["Location"].startswith(inbox.url + "/2"))
            self.assertEqual(len(files_in(self.directory / "notifications")), 1)

    def test_the_file_alone_suffices(self) -> None:
        shutil.copy(MODULE, self.directory)
        alone = [sys.executable, "-I", "-S", "coarinbox.py", "--port", "0"]
        with running(alone, cwd=self.directory) as inbox:
            self.assertEqual(inbox.ask("POST", "/inbox", ACCEPT).status, 201)

    def test_it_tells_its_version(self) -> None:
        done = self.invoke("--version")
        self.assertEqual(done, (0, [f"coarinbox {coarinbox.__version__}"], ""))

    def test_sigint_and_sigterm_end_it_with_status_0(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            with running(self.command("--port", "0"), cwd=self.directory) as inbox:
                idle = http.client.HTTPConnection(*inbox.server_address, timeout=10)
                self.assertEqual(ask_on(idle, "POST", "/inbox", ACCEPT).status, 201)
                status, log = inbox.stop(number)
                self.assertEqual(status, 0, log)
                self.assertNotIn("Traceback", log)
                idle.close()

    def test_a_request_in_flight_is_answered_before_the_end(self) -> None:
        with self.stalled() as (inbox, connection), connection.makefile("rb") as stream:
            self.assertIn(b"100 Continue", stream.readline() + stream.readline())
            inbox.process.send_signal(signal.SIGTERM)
            while can_connect(inbox.server_address):  # it stops listening first
                pass
            connection.sendall(BODY)
            answer = read_answer(stream.readline(), stream)
            self.assertEqual((answer.status, answer.headers["Connection"]), (201, "close"))
            self.assertEqual(inbox.process.wait(10), 0)
        self.assertEqual(len(files_in(self.directory / "notifications")), 1)

    def test_a_signal_some_time_after_the_first_does_not_wait(self) -> None:
        with self.stalled(self.command(TWICE=0.05)) as (inbox, connection):
            connection.recv(1)  # its request has begun, and is never completed
            inbox.process.send_signal(signal.SIGTERM)
            while can_connect(inbox.server_address):
                pass
            time.sleep(0.05)
            inbox.process.send_signal(signal.SIGINT)
            self.assertEqual(inbox.process.wait(10), 0)
        self.assertEqual(files_in(self.directory / "notifications"), [])

    def test_a_signal_that_comes_twice_is_one(self) -> None:
        with self.stalled() as (inbox, connection), connection.makefile("rb") as stream:
            self.assertIn(b"100 Continue", stream.readline() + stream.readline())
            inbox.process.send_signal(signal.SIGTERM)
            inbox.process.send_signal(signal.SIGINT)
            while can_connect(inbox.server_address):
                pass
            connection.sendall(BODY)
            self.assertEqual(read_answer(stream.readline(), stream).status, 201)
            self.assertEqual(inbox.process.wait(10), 0)

    def test_it_ends_though_connections_wait_for_others(self) -> None:
        command = self.command("--config", self.config("MAX_CONNECTIONS = 1"))
        with self.stalled(command) as (inbox, connection):
            connection.recv(1)
            with socket.create_connection(inbox.server_address, timeout=10):
                inbox.process.send_signal(signal.SIGTERM)
                connection.sendall(BODY)
                self.assertEqual(inbox.process.wait(10), 0)
        self.assertEqual(len(files_in(self.directory / "notifications")), 1)

    @contextlib.contextmanager
    def stalled(self, command: list[str] | None = None) -> Iterator[tuple[Program, socket.socket]]:
        """Run an inbox, and a client that has sent only the head of its request."""
        command = [*(command or self.command()), "--port", "0"]
        with running(command, cwd=self.directory) as inbox:
            with socket.create_connection(inbox.server_address, timeout=10) as connection:
                head = post_head(f"Content-Length: {len(BODY)}", "Expect: 100-continue")
                connection.sendall(head)
                yield inbox, connection

    def test_kill_9_loses_nothing_that_was_acknowledged(self) -> None:
        acknowledged: list[str] = []
        document = json.dumps({**ACCEPT, "summary": "x" * 50_000}).encode()

        def post(inbox: Program) -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    acknowledged.append(inbox.ask("POST", "/inbox", document).headers["Location"])

        for _ in range(KILLS):
            enough = len(acknowledged) + 50
            with running(self.command("--port", "0"), cwd=self.directory) as inbox:
                threads = [threading.Thread(target=post, args=(inbox,)) for _ in range(4)]
                for thread in threads:
                    thread.start()
                while len(acknowledged) < enough and any(map(threading.Thread.is_alive, threads)):
                    time.sleep(0)
                inbox.process.kill()
                for thread in threads:
                    thread.join()
        store = self.directory / "notifications"
        self.assertGreaterEqual(len(acknowledged), 50 * KILLS)
        for location in acknowledged:
            self.assertTrue((store / f"{location.rpartition('/')[2]}.json").exists())
        for path in store.glob("*.json"):
            self.assertEqual(path.read_bytes(), document)

    def test_a_port_that_is_taken(self) -> None:
        with serving(HOST="127.0.0.1") as other:
            line = self.fail_to_start("--host", "127.0.0.1", "--port", str(address(other)[1]))
        self.assertIn("HOST '127.0.0.1', PORT", line)

    def test_a_store_or_an_address_that_cannot_be(self) -> None:
        (self.directory / "file").write_text("")
        self.assertIn("STORE_DIR", self.fail_to_start("--port", "0", "--store", "file/store"))
        self.assertIn("HOST", self.fail_to_start("--port", "0", "--host", "no.such.host.invalid"))
        self.assertIn("HOST", self.fail_to_start("--port", "0", "--host", "x" * 300))

    def test_ipv6(self) -> None:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            self.skipTest("this machine has no IPv6")
        for host, name, clients in [
            ("::1", "[::1]", ["::1"]), ("::", "localhost", ["::1", "127.0.0.1"]),
            ("0.0.0.0", "localhost", ["127.0.0.1"]),
        ]:  # fmt: skip
            with serving(HOST=host) as server:
                port = address(server)[1]
                self.assertEqual(server.base, f"http://{name}:{port}")
                for client in clients:
                    connection = http.client.HTTPConnection(client, port, timeout=10)
                    self.assertEqual(ask_on(connection, "GET", "/inbox").status, 200)
                    connection.close()
                foreign = ask(server, "GET", "/inbox", headers={"Host": "evil.example"})
                self.assertEqual(foreign.status, 421 if host == "::1" else 200)

    def test_debug_logs_headers_and_bodies_but_no_secrets(self) -> None:
        command = self.command("--port", "0", "--config", self.config("DEBUG = True"))
        with running(command, cwd=self.directory) as inbox:
            headers = {"Authorization": "Bearer s3cret", "X-Mine": "yes\tno"}
            inbox.ask("POST", "/inbox", '{"id":\n"xö"}'.encode(), headers)
            _, log = inbox.stop()
        self.assertIn(" 127.0.0.1 X-Mine: yes\\tno\n", log)
        self.assertIn('{"id":\\n"xö"}', log)
        self.assertNotIn("s3cret", log)
        with self.assertLogs("coarinbox", "INFO") as caught, serving(DEBUG=True) as server:
            self.assertEqual(ask(server, "POST", "/inbox", b"\xff").status, 400)
            ask(server, "POST", "/inbox", b"%PDF", {"Content-Type": "application/pdf"})
        self.assertIn("INFO:coarinbox:127.0.0.1 \\xff", caught.output)
        self.assertIn("INFO:coarinbox:127.0.0.1 %PDF", caught.output)
        self.assertIn("INFO:coarinbox:127.0.0.1 POST /inbox HTTP/1.1", caught.output)

    def test_each_line_of_the_log_has_its_time(self) -> None:
        with running(self.command("--port", "0"), cwd=self.directory) as inbox:
            inbox.ask("GET", "/inbox")
            _, log = inbox.stop()
        self.assertRegex(log, r'(?m)^[0-9]{4}-[0-9-]{5} [0-9:]{8},[0-9]{3} 127.0.0.1 "GET /inbox')


def can_connect(where: tuple[str, int]) -> bool:
    try:
        socket.create_connection(where, timeout=1).close()
    except OSError:
        return False
    return True


class ConfigurationTest(ProgramTest):
    @unittest.skipUnless(shutil.which("unshare"), "a read-only disk needs util-linux")
    def test_a_store_that_cannot_be_written_to(self) -> None:
        script = f'mount -t tmpfs -o ro tmpfs {self.directory} && exec "$0" "$@"'
        command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, sys.executable]
        command += [str(MODULE), "--port", "0", "--store", str(self.directory)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        self.assertEqual(done.returncode, 2, done)
        self.assertIn("expected a directory to write to", done.stderr)

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

    def test_flags_win_over_the_file_which_wins_over_the_environment(self) -> None:
        self.config('VALIDATE_INCOMING = "strict"\nSTORE_DIR = "from-file"\n')
        other = self.directory / "other.cfg"
        other.write_text('VALIDATE_INCOMING = False\nSTORE_DIR = "from-environment"\n')
        for arguments, store, mode in [
            ([], "from-environment", False),
            (["--config", "local.cfg"], "from-file", "strict"),
            (["--config", "local.cfg", "--store", "from-flag"], "from-flag", "strict"),
        ]:
            settings = self.configured(*arguments, COARNOTIFY_SETTINGS="other.cfg")
            self.assertEqual((settings.STORE_DIR, settings.VALIDATE_INCOMING), (store, mode))

    def test_a_flag_that_is_not_given_leaves_the_file_alone(self) -> None:
        path = self.config("DEBUG_PYCHARM = True\nPORT = 1234")
        with unittest.mock.patch("coarinbox.attach_debugger") as attach_debugger:
            self.assertEqual(self.configured("--config", path).PORT, 1234)
        attach_debugger.assert_called_once_with("localhost", 6000)

    def test_errors_name_the_file_the_line_and_what_is_wrong(self) -> None:
        for text, expected in [
            ("PORT = 5005\nHOST = (", "local.cfg, line 2: SyntaxError"),
            ("x = 1\ny = x / 0\n", "local.cfg, line 2: ZeroDivisionError: division by zero"),
            ("import nowhere", "local.cfg, line 1: ModuleNotFoundError"),
            ("def f():\n  return g\nf()", "local.cfg, line 2: NameError"),
            ("raise SystemExit(3)", "local.cfg, line 1: SystemExit: 3"),
            ("a = 1\0", "local.cfg"),
            ("PORT = 'a\\nb' * 99", "local.cfg: PORT is 'a"),
            ("raise ValueError('two\\nlines')", "local.cfg, line 1: ValueError: two lines"),
        ]:
            with self.subTest(text):
                line = self.fail_to_start("--config", self.config(text))
                self.assertIn(expected, line)
        self.assertIn("none.cfg", self.fail_to_start("--config", "none.cfg"))
        self.assertIn("none.cfg", self.fail_to_start(COARNOTIFY_SETTINGS="none.cfg"))
        line = self.fail_to_start("--config", self.config("PORT = '5005'"))
        self.assertIn("local.cfg: PORT is '5005'", line)

    def test_each_setting_refuses_what_it_cannot_use_and_says_what_it_can(self) -> None:
        for name, values in UNUSABLE.items():
            for value in values:
                with self.subTest(name, value=value):
                    with self.assertRaises(coarinbox.ConfigurationError) as caught:
                        coarinbox.Settings(**{name: value})
                    self.assertRegex(str(caught.exception), rf"^{name} is .*, expected .")
                    self.assertNotIn(f"{name} is None", str(caught.exception) * bool(value))
        self.assertEqual(set(UNUSABLE), set(vars(coarinbox.Settings())))
        with self.assertRaisesRegex(coarinbox.ConfigurationError, "expected 201 or 202$"):
            coarinbox.Settings(RESPONSE_STATUS=200)
        with self.assertRaisesRegex(coarinbox.ConfigurationError, "from 1 to 2147483647"):
            coarinbox.Settings(MAX_CONTENT_LENGTH=2**31)
        with self.assertRaisesRegex(coarinbox.ConfigurationError, "is 'x{79}, expected"):
            coarinbox.Settings(PORT="x" * 500)  # type: ignore[arg-type]

    def test_each_setting_takes_what_it_can_use(self) -> None:
        usable: list[tuple[str, Any]] = [
            ("STORE_DIR", pathlib.Path("store")), ("PORT", 0), ("PORT", 65535),
            ("RESPONSE_STATUS", 202), ("VALIDATE_INCOMING", "strict"), ("REQUEST_TIMEOUT", 0.5),
            ("BASE_URL", "https://example.org"), ("BASE_URL", "http://[::1]:80/x/"),
            ("HOST", "::"), ("TOKEN", "s3cret"), ("MAX_CONTENT_LENGTH", 1),
            ("MAX_CONTENT_LENGTH", 2**31 - 1), ("REQUEST_TIMEOUT", 0.001),
            ("REQUEST_TIMEOUT", 86400),
        ]  # fmt: skip
        for name, value in usable:
            with self.subTest(name, value=value):
                settings = coarinbox.Settings(**{name: value})
                with self.assertRaises(AttributeError):  # nobody changes them later
                    setattr(settings, name, value)

    def test_unknown_settings_are_warned_about_with_the_nearest_name(self) -> None:
        path = self.config('STORE_DIRECTORY = "x"\nSECRET_KEY = "y"\nlower = 1\nPORT = 0\n')
        with self.assertLogs("coarinbox", "WARNING") as caught:
            settings = coarinbox.configure(path, {})
        self.assertEqual(settings, coarinbox.Settings(PORT=0))
        self.assertEqual(len(caught.output), 2)
        (line,) = (line for line in caught.output if "STORE_DIRECTORY" in line)
        warning = f"{path}: ignored: unknown setting STORE_DIRECTORY; nearest: STORE_DIR"
        self.assertEqual(line, f"WARNING:coarinbox:{warning}")

    def test_unknown_flags_and_values_end_it_with_status_2(self) -> None:
        for arguments in (["--nothing"], ["--port", "x"], ["extra"]):
            done = self.invoke(*arguments)
            self.assertEqual((done.status, done.output), (2, []))
            self.assertIn("usage: coarinbox", done.errors)
        command = [sys.executable, str(MODULE), "--port", "70000"]
        done_alone = subprocess.run(command, capture_output=True, timeout=20)
        self.assertEqual(done_alone.returncode, 2)
        line = self.fail_to_start("--port", "70000", "--config", self.config("DEBUG = True"))
        self.assertTrue(line.startswith("coarinbox: PORT is 70000"), line)


UNUSABLE: dict[str, list[Any]] = {
    "STORE_DIR": ["", None, 5, b"store", "a\0b"],
    "HOST": ["", None, 127, "\udc80", "a\nb"],
    "PORT": ["5005", -1, 65536, 5005.0, True, None],
    "RESPONSE_STATUS": [200, 204, "201", None, True, 10**5000],
    "VALIDATE_INCOMING": ["Strict", "yes", None, 1, 0],
    "DEBUG": [1, "no", None],
    "DEBUG_PYCHARM": [1, "no", None],
    "DEBUG_PYCHARM_SERVER": ["", None],
    "DEBUG_PYCHARM_PORT": ["6000", -1],
    "BASE_URL": ["", "example.org", "ftp://example.org", "http://", "http://a/?q", "http://a/#f",
                 "http://a b/", 'http://a/"', "http://a/\n", "http://[1]", "http://ä/", 5],
    "MAX_CONTENT_LENGTH": [0, -1, 1.5, None, "1M", 2**31, -(10**5000)],
    "REQUEST_TIMEOUT": [0, -1, "30", None, float("inf"), float("nan"), 86401, 1e-320, True],
    "MAX_CONNECTIONS": [0, -1, None],
    "FSYNC": [1, None],
    "TOKEN": ["", 5, "s3cret\n", " s3cret", "\udc80"],
    "SSL_CERT": ["", 5],
    "SSL_KEY": ["", "key.pem"],
}  # fmt: skip


# --- Test double ---------------------------------------------------------------------------------


def send(url: str, document: Any = ACCEPT) -> Answer:
    """Send a notification the way a user's code would, knowing only the URL of the inbox."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    request = urllib.request.Request(url, body, {"Content-Type": JSON_LD})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return Answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())  # type: ignore[arg-type]


class RunningTest(unittest.TestCase):
    def test_a_test_of_five_lines(self) -> None:
        with coarinbox.running() as inbox:
            send(inbox.url, OFFER)
            delivery = inbox.wait_for(type="Offer", timeout=5)
            assert delivery.notification["object"]["id"] == PREPRINT["id"]
        self.assertEqual((delivery.status, delivery.pattern), (201, "Request Review"))

    def test_it_shows_what_came_and_what_was_stored(self) -> None:
        with coarinbox.running() as inbox:
            self.assertEqual((inbox.deliveries, inbox.notifications), ([], []))
            for document in (OFFER, REFUSED, b"no", ACCEPT):
                send(inbox.url, document)
            self.assertEqual([each.status for each in inbox.deliveries], [201, 400, 400, 201])
            sent = [each.notification for each in inbox.deliveries]
            self.assertEqual(sent, [OFFER, REFUSED, None, ACCEPT])
            self.assertEqual(inbox.notifications, [OFFER, ACCEPT])
            self.assertEqual(inbox.deliveries[1].findings[0].code, "id-absolute-uri")
            inbox.clear()
            self.assertEqual((inbox.deliveries, inbox.notifications), ([], []))

    def test_settings_are_arguments(self) -> None:
        with coarinbox.running(VALIDATE_INCOMING="strict", RESPONSE_STATUS=202) as inbox:
            self.assertEqual(send(inbox.url, changed(ACCEPT, "actor.id", ABSENT)).status, 400)
            self.assertEqual(send(inbox.url).status, 202)
        with self.assertRaisesRegex(coarinbox.ConfigurationError, "PORT"):
            with coarinbox.running(PORT="none"):
                self.fail("it runs")
        with self.assertRaisesRegex(
            coarinbox.ConfigurationError, "^unknown setting TOKN; nearest: TOKEN"
        ):
            with coarinbox.running(TOKN="x"):
                self.fail("it runs")

    def test_its_url_leads_to_it_whatever_the_public_one_is(self) -> None:
        with coarinbox.running(BASE_URL="https://inbox.example.org/") as inbox:
            location = send(inbox.url).headers["Location"]
            self.assertTrue(location.startswith("https://inbox.example.org/inbox/"), location)
            self.assertEqual(inbox.notifications, [ACCEPT])

    def test_what_was_removed_since_has_no_body(self) -> None:
        with coarinbox.running() as inbox:
            location = send(inbox.url).headers["Location"]
            send(inbox.url, OFFER)
            self.assertEqual(ask(inbox.server, "DELETE", path_of(location)).status, 204)
            self.assertEqual([each.notification for each in inbox.deliveries], [None, OFFER])
            self.assertEqual(inbox.notifications, [OFFER])

    def test_several_at_once_are_independent(self) -> None:
        with coarinbox.running() as first, coarinbox.running() as second:
            first.fail_next(503)
            self.assertEqual(send(second.url).status, 201)
            self.assertEqual(send(first.url).status, 503)
            self.assertEqual((len(first.deliveries), len(second.deliveries)), (1, 1))
            second.clear()
            self.assertEqual(len(first.deliveries), 1)

    def test_it_waits_for_what_is_still_to_come(self) -> None:
        with coarinbox.running() as inbox, concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(inbox.wait_for, in_reply_to=OFFER_ID)
            self.assertFalse(waiting.done())
            send(inbox.url, OFFER)
            send(inbox.url, ACCEPT)
            self.assertEqual(waiting.result().notification, ACCEPT)
            inbox.clear()
            waiting = pool.submit(inbox.wait_for)
            send(inbox.url, OFFER)
            self.assertEqual(waiting.result().notification, OFFER)

    def test_each_demand_selects(self) -> None:
        with coarinbox.running() as inbox:
            for document in (OFFER, ACCEPT, REFUSED):
                send(inbox.url, document)
            offer, accept, refused = inbox.deliveries
            self.assertEqual(inbox.wait_for(timeout=0), offer)
            self.assertEqual(inbox.wait_for(type="Accept", timeout=0), accept)
            self.assertEqual(inbox.wait_for(type="coar-notify:ReviewAction", timeout=0), offer)
            self.assertEqual(inbox.wait_for(pattern="Request Review", timeout=0), offer)
            self.assertEqual(inbox.wait_for(in_reply_to=OFFER_ID, timeout=0), accept)
            self.assertEqual(inbox.wait_for(status=400, timeout=0), refused)
            self.assertEqual(inbox.wait_for(status="4xx", type="Offer", timeout=0), refused)
            self.assertEqual(inbox.wait_for(lambda each: "inReplyTo" in each.about), accept)

    def test_what_does_not_come_is_an_assertion_that_says_what_did(self) -> None:
        with coarinbox.running() as inbox:
            with self.assertRaisesRegex(
                AssertionError, "no delivery with status='2xx' within 0 s; what came: nothing"
            ):
                inbox.wait_for(timeout=0)
            for document in (OFFER, REFUSED, b"no"):
                send(inbox.url, document)
            demands: list[tuple[dict[str, Any], list[str]]] = [
                ({"type": "Reject"}, ["its type is ['Offer', 'coar-notify:ReviewAction']"]),
                ({"pattern": "Reject"}, ["its pattern is Request Review"]),
                ({"in_reply_to": OFFER_ID}, ["its inReplyTo is None"]),
                ({"predicate": lambda each: False}, ["the predicate is false"]),
                ({"predicate": lambda each: each.about["x"]}, ["the predicate raises KeyError"]),
                ({"type": "Reject", "status": "4xx"}, ["its status is not 4xx", "its type is ["]),
            ]  # fmt: skip
            for demand, reasons in demands:
                with self.subTest(demand), self.assertRaises(AssertionError) as caught:
                    inbox.wait_for(**demand, timeout=0)
                lines = str(caught.exception).splitlines()
                self.assertEqual(len(lines), 4, lines)
                for reason in reasons:
                    self.assertIn(reason, str(caught.exception))
            self.assertIn("400 refused Request Review offer-1: its type is", lines[2])

    def test_a_refusal_is_told_with_its_reasons(self) -> None:
        with coarinbox.running() as inbox:
            send(inbox.url, REFUSED)
            send(inbox.url, b"no")
            inbox.fail_next(404)
            send(inbox.url, changed(OFFER, "actor", ABSENT))
            with self.assertRaises(AssertionError) as caught:
                inbox.wait_for(type="Offer", timeout=0)
            wanted, first, second, third = str(caught.exception).splitlines()
            self.assertIn("no delivery with type='Offer', status='2xx' within 0 s", wanted)
            self.assertIn("E id must be an absolute URI; E origin must be an object", first)
            self.assertTrue(first.endswith("it should be an HTTP URI"), first)
            self.assertIn("the body is not JSON", second)
            self.assertTrue(third.endswith(": a simulated failure"), third)

    def test_what_no_delivery_could_ever_be_is_refused(self) -> None:
        with coarinbox.running() as inbox:
            send(inbox.url, OFFER)
            demands: list[tuple[dict[str, Any], str]] = [
                ({"pattern": "RequestReview"}, "^unknown pattern .* nearest: Request Review$"),
                ({"type": "Ofer"}, "^unknown type .* nearest: Offer$"),
                ({"status": "2x"}, "a status such as"),
                ({"type": "ReviewAction"}, "nearest: coar-notify:ReviewAction"),
            ]  # fmt: skip
            for demand, expected in demands:
                for method in (inbox.wait_for, inbox.assert_none):
                    with self.subTest(demand), self.assertRaisesRegex(AssertionError, expected):
                        method(**demand)
            for type_ in ("Create", "coar-notify:IngestAction", "sorg:Review"):
                inbox.assert_none(type=type_)  # others may have them
            with self.assertRaisesRegex(TypeError, "Request Review"):
                inbox.assert_none("Request Review")  # type: ignore[arg-type]
            with self.assertRaisesRegex(TypeError, "not one name"):
                inbox.wait_for(type=["Offer"])  # type: ignore[arg-type]
            with self.assertRaises(KeyError):
                inbox.assert_none(lambda each: each.notification["objekt"])

    def test_after_the_block_there_is_nothing_to_look_at(self) -> None:
        with coarinbox.running() as inbox:
            send(inbox.url)
        for look in (lambda: inbox.deliveries, inbox.wait_for, inbox.assert_none, inbox.clear):
            with self.assertRaisesRegex(RuntimeError, "inside the `with` block"):
                look()

    def test_that_nothing_comes_can_be_asserted(self) -> None:
        with coarinbox.running() as inbox:
            inbox.assert_none(within=0.01)
            send(inbox.url, REFUSED)
            with self.assertRaisesRegex(AssertionError, "unexpected delivery: 400 refused Request"):
                inbox.assert_none()
            inbox.assert_none(type="Accept")
            inbox.assert_none(status="2xx")
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(inbox.assert_none, type="Accept", within=5)
                send(inbox.url, ACCEPT)
                self.assertIsInstance(waiting.exception(), AssertionError)

    def test_the_next_attempts_fail_as_told(self) -> None:
        with coarinbox.running() as inbox:
            inbox.fail_next(503, times=2, retry_after=7)
            inbox.fail_next(429, retry_after="Fri, 01 Jan 2027 00:00:00 GMT")
            answers = [send(inbox.url) for _ in range(4)]
            self.assertEqual([answer.status for answer in answers], [503, 503, 429, 201])
            self.assertEqual([answer.headers["Retry-After"] for answer in answers],
                             ["7", "7", "Fri, 01 Jan 2027 00:00:00 GMT", None])  # fmt: skip
            self.assertEqual([each.simulated for each in inbox.deliveries], [True] * 3 + [False])
            self.assertEqual(len(inbox.notifications), 1)
            self.assertEqual(inbox.wait_for(status=503).notification, ACCEPT)
            inbox.fail_next(close=True)
            with self.assertRaises(http.client.RemoteDisconnected):
                send(inbox.url)
            self.assertEqual(inbox.wait_for(status=0).verdict, "dropped")
            inbox.fail_next(500)
            inbox.clear()
            self.assertEqual(send(inbox.url).status, 201)

    def test_a_failure_that_cannot_be_is_refused(self) -> None:
        with coarinbox.running() as inbox:
            for arguments in [
                {"status": 200}, {"status": 600}, {"status": 503, "times": 0},
                {"status": 503, "retry_after": "soon"}, {"status": 503, "delay": -1}, {},
                {"status": 503, "times": None}, {"retry_after": 1}, {"delay": 10_000},
            ]:  # fmt: skip
                with self.subTest(arguments), self.assertRaisesRegex(ValueError, "expected|needs"):
                    inbox.fail_next(**arguments)  # type: ignore[arg-type]
            self.assertEqual(send(inbox.url).status, 201)

    def test_a_fault_of_the_inbox_surfaces(self) -> None:
        with self.assertLogs("coarinbox", "ERROR"), self.assertRaises(RuntimeError) as caught:
            with coarinbox.running() as inbox:
                with unittest.mock.patch("coarinbox.validate", side_effect=ZeroDivisionError):
                    self.assertEqual(send(inbox.url).status, 500)
        self.assertIsInstance(caught.exception.__cause__, ZeroDivisionError)

    def test_a_steady_sender_does_not_keep_it_waiting(self) -> None:
        with coarinbox.running() as inbox, concurrent.futures.ThreadPoolExecutor(1) as pool:
            enough = threading.Event()

            def flood() -> None:
                while not enough.is_set():
                    send(inbox.url)

            flooding = pool.submit(flood)
            with self.assertRaises(AssertionError):
                inbox.wait_for(lambda each: time.sleep(0.02), timeout=0.1)
            enough.set()
            flooding.result()

    def test_an_exception_in_the_block_leaves_nothing_behind(self) -> None:
        with self.assertRaises(ZeroDivisionError):
            with coarinbox.running() as inbox:
                directory = inbox.server.store.directory
                raise ZeroDivisionError
        self.assertFalse(os.path.exists(directory))
        self.assertFalse(can_connect(address(inbox.server)))

    def test_it_ends_at_once_when_more_clients_wait_than_it_serves(self) -> None:
        with contextlib.ExitStack() as clients:

            def connect() -> socket.socket:
                client = socket.create_connection(address(inbox.server), timeout=10)
                clients.enter_context(client)
                client.sendall(post_head("Content-Length: 9", "Expect: 100-continue"))
                return client

            with coarinbox.running(MAX_CONNECTIONS=1) as inbox:
                connect().recv(1)  # its request has begun
                waiting = threading.Event()
                inbox.server.make_room = waiting.set  # type: ignore[method-assign, assignment]
                connect()
                self.assertTrue(waiting.wait(10))
                started = time.monotonic()
            self.assertLess(time.monotonic() - started, 2)

    def test_it_ends_at_once_while_somebody_listens(self) -> None:
        with contextlib.ExitStack() as clients:
            with coarinbox.running() as inbox:
                clients.enter_context(Listener(inbox.server)).comment()
                started = time.monotonic()
            self.assertLess(time.monotonic() - started, coarinbox.HEARTBEAT / 2)

    def test_it_ends_at_once_whatever_clients_do(self) -> None:
        before = set(threading.enumerate())
        with contextlib.ExitStack() as clients:
            with coarinbox.running() as inbox:
                inbox.fail_next(503, delay=3600)
                for octets in [
                    b"", b"POST /in", post_head("Content-Length: 9") + b"half",
                    post_head(f"Content-Length: {len(BODY)}") + BODY,
                ]:  # fmt: skip
                    client = socket.create_connection(address(inbox.server), timeout=10)
                    clients.enter_context(client).sendall(octets)
                clients.enter_context(Listener(inbox.server))
                started = time.monotonic()
            self.assertLess(time.monotonic() - started, coarinbox.HEARTBEAT / 2)
            self.assertEqual(set(threading.enumerate()), before)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "this system does not list descriptors")
    def test_many_in_a_row_leave_nothing_behind(self) -> None:
        def left() -> tuple[int, int, list[str]]:
            return len(os.listdir("/proc/self/fd")), threading.active_count(), os.listdir(temporary)

        with tempfile.TemporaryDirectory() as temporary:
            with unittest.mock.patch("tempfile.tempdir", temporary):
                before = left()
                for _ in range(20):
                    with coarinbox.running() as inbox:
                        send(inbox.url)
                self.assertEqual(left(), before)

    def test_it_is_quiet(self) -> None:
        code = (
            "import coarinbox, urllib.request, urllib.error\n"
            "with coarinbox.running() as inbox:\n"
            "    try: urllib.request.urlopen(inbox.url, b'no')\n"
            "    except urllib.error.HTTPError as error: error.close()\n"
        )
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=20)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))


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
        self.assertEqual(len(self.stored()), 4)

    def test_the_id_tells_notifications_apart(self) -> None:
        other = changed(ACCEPT, "summary", "another")
        answers = [self.send("status=503&times=1", document) for document in (ACCEPT, other)]
        self.assertEqual([answer.status for answer in answers], [503, 201])

    def test_without_a_number_all_of_them_fail(self) -> None:
        for _ in range(3):
            self.assert_problem(self.send("status=500"), 500)
        rows = Page(self.ask("GET", "/", headers=HTML).body.decode()).rows
        self.assertTrue(all("500 failed" in row for row in rows), rows)
        self.assertEqual(self.post().status, 201)

    def test_any_status_can_be_chosen(self) -> None:
        for status in (301, 304, 400, 404, 418, 429, 451, 499, 500, 503, 599):
            with self.subTest(status):
                answer = self.send(f"status={status}")
                self.assertEqual(answer.status, status)
                self.assertEqual("Location" in answer.headers, status < 400)
                if status != 304:  # it has no body
                    title = {404: "Not Found", 499: "Error"}.get(status, answer.json()["title"])
                    self.assertEqual(answer.json()["title"], title)
        self.assertEqual(self.stored(), [])

    def test_a_304_has_no_body_that_could_pass_for_the_next_answer(self) -> None:
        post = post_head(f"Content-Length: {len(BODY)}") + BODY
        octets = post.replace(b"/inbox", b"/inbox?status=304", 1) + post
        answers = raw(self.server, octets, "half-close")
        self.assertEqual([answer.status for answer in answers], [304, 201])
        self.assertNotIn("Content-Length", answers[0].headers)

    def test_emptying_the_inbox_forgets_the_attempts(self) -> None:
        for _ in range(2):
            self.assertEqual(self.send("status=503&times=1").status, 503)
            self.ask("DELETE", "/inbox")

    def test_without_an_id_the_body_tells_notifications_apart(self) -> None:
        with serving(VALIDATE_INCOMING=False) as lax:
            for document in ({"a": 1}, {"b": 1}, {"a": 1}, {"id": "None"}):
                ask(lax, "POST", "/inbox?status=503&times=1", document)
            listed = ask(lax, "GET", "/deliveries").json()["deliveries"]
            self.assertEqual([each["status"] for each in listed], [503, 201, 503, 503])

    def test_a_redirect_leads_to_the_plain_inbox(self) -> None:
        self.send("status=300")
        answer = self.send("status=307")
        inbox = "http://{}:{}/inbox".format(*address(self.server))
        self.assertEqual(answer.headers["Location"], inbox)
        rows = Page(self.ask("GET", "/", headers=HTML).body.decode()).rows
        self.assertIn("307 redirected", rows[0])
        self.assertIn("300 redirected", rows[1])
        self.assertEqual(self.ask("POST", path_of(answer.headers["Location"]), ACCEPT).status, 201)

    def test_an_answer_can_be_late(self) -> None:
        started = time.monotonic()
        self.assertEqual(self.send("delay=0.05&status=503&times=1").status, 503)
        self.assertGreaterEqual(time.monotonic() - started, 0.05)
        self.assertEqual(self.send("delay=0.01").status, 201)

    def test_there_can_be_no_answer_at_all(self) -> None:
        with self.assertRaises(http.client.RemoteDisconnected):
            self.send("close=1&times=1")
        self.assertEqual(self.send("close=1&times=1").status, 201)
        self.assertEqual([line["status"] for line in self.lines()], [0, 201])

    def test_each_is_logged_as_simulated(self) -> None:
        self.send("status=503&times=1")
        self.send("status=503&times=1")
        first, second = self.lines()
        self.assertEqual((first["simulated"], second["simulated"]), (True, False))
        self.assertEqual(json.loads(first["body"]), ACCEPT)
        self.assertEqual(first["target"], "/inbox?status=503&times=1")
        page = Page(self.ask("GET", "/", headers=HTML).body.decode())
        self.assertIn("a simulated failure", page.rows[1])
        path = f"/deliveries/{first['name']}"
        page = Page(self.ask("GET", path, headers=HTML).body.decode())
        self.assertIn("Findings None.", page.one("main").text)

    def test_what_is_refused_anyway_is_refused_first(self) -> None:
        query = "status=503&times=1"
        self.assert_problem(self.send(query, REFUSED), 400)
        self.assert_problem(self.send(query, b"no"), 400)
        self.assert_problem(self.send(query, b"x" * 2_000_000), 413)
        self.assert_problem(self.send(query), 503)
        with serving(TOKEN="secret") as closed:
            self.assertEqual(ask(closed, "POST", f"/inbox?{query}", ACCEPT).status, 401)

    def test_a_bad_value_is_refused_with_what_is_expected(self) -> None:
        for query, expected in [
            ("status=200", "a status from 300 to 599"), ("status=x", "a status"),
            ("times=0&status=503", "a number from 1"), ("retry-after=soon", "an HTTP date"),
            ("delay=-1", "a number of seconds"), ("delay=99999", "at most 9999"),
            ("close=0", "expected 1"), ("close", "expected 1"), ("times=1", "needs a status"),
            ("status=503&bogus", "'bogus' is no parameter"),
            ("stauts=503", "status, times, retry-after, delay, close"),
        ]:  # fmt: skip
            with self.subTest(query):
                self.assertIn(expected, self.assert_problem(self.send(query), 400)["detail"])
        self.assertEqual(self.stored(), [])

    def test_the_count_of_attempts_has_bounds(self) -> None:
        with unittest.mock.patch("coarinbox.MAX_MET", 10):
            for number in range(30):
                document = changed(ACCEPT, "id", f"urn:x:{number}")
                self.assertEqual(self.send("status=503&times=1", document).status, 503)
            self.assertLessEqual(len(self.server.failures.met), 10)
            self.assertEqual(self.send("status=503&times=1", document).status, 201)

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

    @unittest.skipUnless(shutil.which("node"), "node is not installed")
    def test_a_client_in_another_language(self) -> None:
        script = """
            const [url, body] = process.argv.slice(1);
            const headers = {"Content-Type": "application/ld+json"};
            const post = query => fetch(url + query, {method: "POST", headers, body})
                .then(answer => answer.status, () => "failed");
            (async () => {
                for (const query of ["?status=503&times=1", "?status=503&times=1", "?status=307",
                    "?status=302", "?close=1", "?delay=0.01"]) console.log(await post(query));
            })();
        """
        command = ["node", "-e", script, self.server.base + "/inbox", BODY.decode()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        self.assertEqual(done.stdout.split(), ["503", "201", "201", "200", "failed", "201"])


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
            "refused.json: E /id id-absolute-uri id must be an absolute URI",
            "refused.json: E /origin origin-object origin must be an object",
            "refused.json: S /id id-preferred id should be a hyphenated urn:uuid: or an HTTP URI",
        ])  # fmt: skip
        _, (line,), _ = self.invoke("--check", self.write("broken.json", b"{"))
        self.assertTrue(line.startswith("broken.json: E - json it is not JSON: "), line)

    def test_the_exit_status_tells_the_verdict(self) -> None:
        good, bad = self.write("good.json", ACCEPT), self.write("bad.json", REFUSED)
        warned = self.write("warned.json", changed(ACCEPT, "@context", ABSENT))
        broken, scalar = self.write("broken.json", b"{"), self.write("scalar.json", 5)
        strict = self.write("strict.cfg", b'VALIDATE_INCOMING = "strict"')
        lax = self.write("lax.cfg", b"VALIDATE_INCOMING = False")
        for arguments, expected, count in [
            ([good], 0, 0), ([bad], 1, 4), ([good, bad], 1, 4), ([warned], 0, 1), ([broken], 1, 1),
            ([warned, "--config", strict], 1, 1), ([bad, "--config", lax], 0, 4),
            ([scalar, "--config", lax], 1, 1), ([broken, "--config", lax], 1, 1),
            (["missing.json"], 2, 0), ([bad, "missing.json", good], 2, 4),
        ]:  # fmt: skip
            with self.subTest(arguments):
                status, lines, stderr = self.invoke("--check", *arguments)
                self.assertEqual((status, len(lines)), (expected, count), (lines, stderr))
                self.assertEqual("missing.json: No such file" in stderr, expected == 2)

    def test_directories_are_searched(self) -> None:
        for name in ("a/2.jsonld", "a/1.json", "a/b/3.json", "a/notes.txt", "a/deliveries.jsonl"):
            self.write(name, [])
        status, lines, _ = self.invoke("--check", "a")
        self.assertEqual(status, 1)
        checked = [line.partition(":")[0] for line in lines]
        self.assertEqual(checked, ["a/1.json", "a/2.jsonld", "a/b/3.json"])
        (self.directory / "empty").mkdir()
        status, _, stderr = self.invoke("--check", "empty")
        self.assertEqual(status, 2)
        self.assertIn("0 checked, 0 refused", stderr)

    def test_what_is_no_file_is_passed_over_and_what_is_too_large_is_refused(self) -> None:
        self.write("a/large.json", changed(ACCEPT, "summary", "x" * 2_000_000))
        (self.directory / "a/largest.json").write_bytes(BODY.ljust(1048576))
        if hasattr(os, "mkfifo"):
            os.mkfifo(self.directory / "a/pipe.json")
        status, lines, _ = self.invoke("--check", "a", "--check", "a/large.json")
        self.assertEqual(status, 1)
        self.assertEqual(lines, ["a/large.json: E - size it is larger than 1048576 octets"] * 2)

    def test_odd_names_do_not_break_the_lines(self) -> None:
        name = self.write("two\nlines.json", [])
        _, lines, stderr = self.invoke("--check", name)
        self.assertEqual(len(lines), 1, lines)
        self.assertNotIn("Traceback", stderr)

    def test_a_terminal_that_cannot_show_all_characters(self) -> None:
        self.write("ö.json", [])
        output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(coarinbox.main(["--check", str(self.directory / "ö.json")]), 1)
        output.seek(0)
        self.assertIn("\\xf6.json: E", output.read())

    def test_a_program_may_call_it_and_take_the_output(self) -> None:
        self.write("bad.json", [])
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(coarinbox.main(["--check", str(self.directory / "bad.json")]), 1)
        self.assertIn("notification-object", output.getvalue())

    def test_standard_input(self) -> None:
        self.assertEqual(self.invoke("--check", "-", stdin=json.dumps(ACCEPT))[:2], (0, []))
        status, lines, _ = self.invoke("--check", "-", stdin="[]")
        self.assertEqual(status, 1)
        self.assertEqual(lines, ["-: E - notification-object the notification must be an object"])


# --- Faults --------------------------------------------------------------------------------------


def post_until_it_ends(inbox: Program, acknowledged: list[str], document: bytes) -> None:
    """Send a notification again and again, on one connection, and note where each is stored."""
    connection = http.client.HTTPConnection(*inbox.server_address, timeout=10)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        while True:
            answer = ask_on(connection, "POST", "/inbox", document)
            assert answer.status == 201, answer
            acknowledged.append(path_of(answer.headers["Location"]))


class UnderLoadTest(ProgramTest):
    document = json.dumps({**ACCEPT, "summary": "x" * 20_000}).encode()

    @contextlib.contextmanager
    def load(self, *inboxes: Program) -> Iterator[list[str]]:
        """Let four clients send to each inbox, from before the block until the inbox ends."""
        acknowledged: list[str] = []
        threads = [
            threading.Thread(target=post_until_it_ends, args=(inbox, acknowledged, self.document))
            for inbox in inboxes * 4
        ]
        for thread in threads:
            thread.start()
        try:
            while len(acknowledged) < 100 and any(map(threading.Thread.is_alive, threads)):
                time.sleep(0)
            yield acknowledged
        finally:
            for inbox in inboxes:
                inbox.process.terminate()
            for thread in threads:
                thread.join()

    def stored(self) -> set[str]:
        files = (self.directory / "notifications").glob("*.json")
        return {f"/inbox/{file.stem}" for file in files if file.read_bytes() == self.document}

    def test_sigterm_leaves_no_request_that_had_begun_without_its_answer(self) -> None:
        for fsync in (True, False):
            path = self.config(f"FSYNC = {fsync}")
            command = self.command("--port", "0", "--config", path)
            with running(command, cwd=self.directory) as inbox:
                with self.load(inbox) as acknowledged:
                    status, log = inbox.stop()
            self.assertEqual(status, 0)
            self.assertNotIn("Traceback", log)
            self.assertGreaterEqual(len(acknowledged), 100)
            self.assertEqual(self.stored(), set(acknowledged))
            self.assertEqual(len(files_in(self.directory / "notifications")), len(acknowledged))
            shutil.rmtree(self.directory / "notifications")

    def test_two_inboxes_on_one_store_lose_nothing_and_list_everything(self) -> None:
        command = self.command("--port", "0")
        with contextlib.ExitStack() as stack:
            inboxes = [stack.enter_context(running(command, cwd=self.directory)) for _ in range(2)]
            with self.load(*inboxes) as acknowledged:
                known = set(acknowledged)
                for inbox in inboxes:
                    contained = inbox.ask("GET", "/inbox").json()["ldp:contains"]
                    self.assertLessEqual(known, {path_of(entry["@id"]) for entry in contained})
                    lines = inbox.ask("GET", "/deliveries?limit=1000").json()["deliveries"]
                    self.assertLessEqual(known, {f"/inbox/{line['name']}" for line in lines})
        self.assertEqual(self.stored(), set(acknowledged))
        log = (self.directory / "notifications/deliveries.jsonl").read_text().split("\n")
        names = [json.loads(line)["name"] for line in log if line]
        self.assertEqual(sorted(f"/inbox/{name}" for name in names), sorted(acknowledged))


class BadConnectionsTest(ProgramTest):
    """A thousand connections that are bad for others, where 256 are served at once.

    In good time means: the first answer after the others have had their time (`GRACE`) for each
    256 of them, and then each at once.
    """

    GRACE = 0.1
    LARGE = "20200101_000000_" + "a" * 32  # more than fits into the buffers of a connection

    def setUp(self) -> None:
        super().setUp()
        path = self.config("FSYNC = False; MAX_CONNECTIONS = 256")
        command = self.command("--port", "0", "--config", path, GRACE=self.GRACE)
        program = running(command, cwd=self.directory)
        self.inbox = program.__enter__()
        self.addCleanup(program.__exit__, None, None, None)
        (self.directory / f"notifications/{self.LARGE}.json").write_bytes(b" " * 5_000_000)

    def connect(self, octets: bytes) -> socket.socket:
        connection = socket.socket()
        self.addCleanup(connection.close)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(self.inbox.server_address)
        connection.sendall(octets)
        return connection

    def drip(self, connections: list[socket.socket], over: threading.Event) -> None:
        """Send a header line on each, and read an octet from each, until it is over."""
        for connection in connections:
            connection.setblocking(False)
        while not over.wait(self.GRACE * 0.8):
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.send(b"X: y\r\n")
                    connection.recv(1)

    def assert_served_in_good_time(self, *kinds: bytes) -> None:
        kind = itertools.islice(itertools.cycle(kinds), 1000)
        bad = [(octets, self.connect(octets)) for octets in kind]
        self.assertEqual(len(bad), 1000)
        begun = [connection for octets, connection in bad if octets]
        over = threading.Event()
        thread = threading.Thread(target=self.drip, args=(begun, over))
        thread.start()
        try:
            for patience in (8, *[2] * 20):
                started = time.monotonic()
                self.assertEqual(self.inbox.ask("POST", "/inbox", ACCEPT).status, 201)
                self.assertLess(time.monotonic() - started, patience)
            if PROC:
                descriptors = os.listdir(f"/proc/{self.inbox.process.pid}/fd")
                self.assertLess(len(descriptors), 2 * 256 + 50)
        finally:
            over.set()
            thread.join()

    def test_that_send_nothing(self) -> None:
        self.assert_served_in_good_time(b"")

    def test_that_never_end_their_request_or_do_not_read_the_answer(self) -> None:
        endless = (b"", b"POST /inbox HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        deaf = f"GET /inbox/{self.LARGE} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        self.assert_served_in_good_time(*endless * 8, deaf)


class ScarcityTest(InboxTest):
    settings = {"MAX_CONNECTIONS": 2}

    def give(self, seconds: float) -> None:
        """Have requests and new connections make room only after so many seconds."""
        patch = unittest.mock.patch("coarinbox.GRACE", seconds)
        patch.start()
        self.addCleanup(patch.stop)

    def test_requests_that_do_not_end_make_room(self) -> None:
        self.give(0.05)
        with contextlib.ExitStack() as clients:
            slow = []
            for head in (post_head("Content-Length: 9"), b"POST /in"):
                slow.append(socket.create_connection(address(self.server), 10))
                clients.enter_context(slow[-1]).sendall(head)
            self.assertEqual(self.post().status, 201)
            with slow[0].makefile("rb") as stream:
                answer = read_answer(stream.readline(), stream)
            self.assert_problem(answer, 503)
            self.assertEqual(answer.headers["Retry-After"], "1")
            self.assertIn("MAX_CONNECTIONS", answer.json()["detail"])

    def test_clients_that_do_not_read_their_answers_make_room(self) -> None:
        name = "20200101_000000_" + "a" * 32
        pathlib.Path(self.server.store.path(name)).write_bytes(b" " * 30_000_000)
        self.give(0.05)
        with contextlib.ExitStack() as clients:
            for _ in range(2):
                deaf = clients.enter_context(socket.create_connection(address(self.server), 10))
                deaf.sendall(f"GET /inbox/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                deaf.recv(1)  # it comes
            self.assert_serves()

    def test_requests_that_have_just_begun_do_not(self) -> None:
        self.give(60)
        with contextlib.ExitStack() as clients:
            begun = [
                clients.enter_context(socket.create_connection(address(self.server), 10))
                for _ in range(2)
            ]
            for connection in begun:
                connection.sendall(post_head(f"Content-Length: {len(BODY)}"))
            self.wait_until(lambda: sum(wait.begun for wait in self.server.waiting.values()) == 2)
            clients.enter_context(socket.create_connection(address(self.server), 10))
            self.wait_until(
                lambda: self.server.socket not in self.server.selector.get_map()
            )  # it has been seen
            for connection in begun:
                connection.sendall(BODY)
                with connection.makefile("rb") as stream:
                    self.assertEqual(read_answer(stream.readline(), stream).status, 201)

    def test_new_connections_have_time_to_begin(self) -> None:
        self.give(60)
        with contextlib.ExitStack() as clients:
            new = [
                clients.enter_context(socket.create_connection(address(self.server), 10))
                for _ in range(5)
            ]
            self.wait_until(lambda: self.server.full_until > 0)  # there are more than it can take
            for connection in new:
                connection.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
                with connection.makefile("rb") as stream:
                    self.assertIn(b" 200 ", stream.readline())

    def test_requests_that_have_come_go_before_new_connections(self) -> None:
        with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as clients:
            limits: dict[str, Any] = {
                "MAX_CONNECTIONS": 2,
                "PORT": 0,
                "STORE_DIR": directory,
                "FSYNC": False,
            }
            server = clients.enter_context(coarinbox.InboxServer(coarinbox.Settings(**limits)))
            request = post_head(f"Content-Length: {len(BODY)}", "Connection: close") + BODY
            waiting = [socket.create_connection(address(server), 10) for _ in range(12)]
            for connection in waiting:
                clients.enter_context(connection).sendall(request)
            threading.Thread(target=server.serve_forever).start()
            for connection in waiting:
                with connection.makefile("rb") as stream:
                    self.assertEqual(read_answer(stream.readline(), stream).status, 201)

    def test_all_are_served_where_no_thread_can_be_started(self) -> None:
        error = RuntimeError("can't start new thread")
        with unittest.mock.patch("threading.Thread.start", side_effect=error):
            with self.assertLogs("coarinbox", "ERROR"):
                for _ in range(3):
                    self.assertEqual(self.ask("GET", "/inbox").status, 200)
                    self.assertEqual(self.post().status, 201)
        self.faults_expected = True
        self.assertEqual(self.ask("GET", "/inbox").status, 200)
        self.assertEqual(self.server.faults, [])

    def test_a_client_that_sends_many_requests_at_once_keeps_nobody_waiting(self) -> None:
        request = post_head(f"Content-Length: {len(BODY)}") + BODY
        with socket.create_connection(address(self.server), timeout=10) as greedy:
            thread = threading.Thread(target=greedy.sendall, args=(request * 300,))
            thread.start()
            with greedy.makefile("rb") as stream:
                self.assertEqual(read_answer(stream.readline(), stream).status, 201)
                self.assertEqual(self.ask("GET", "/constraints").status, 200)
                self.assertLess(len(self.stored()), 300)
                for _ in range(299):
                    self.assertEqual(read_answer(stream.readline(), stream).status, 201)
            thread.join()
        self.assertEqual(len(self.stored()), 300)

    def test_what_takes_long_to_read_keeps_nobody_waiting(self) -> None:
        read, begun, answered = self.server.store.read, threading.Event(), threading.Event()

        def read_later(name: str) -> bytes:
            begun.set()
            self.assertTrue(answered.wait(10))
            return read(name)

        path = path_of(self.post().headers["Location"])
        with unittest.mock.patch.object(self.server.store, "read", read_later):
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                slow = pool.submit(self.ask, "GET", path)
                self.assertTrue(begun.wait(10))
                self.assertEqual(self.post().status, 201)
                answered.set()
                self.assertEqual(slow.result().body, BODY)

    def test_when_the_system_has_nothing_more_to_give_new_connections_wait(self) -> None:
        self.faults_expected = True
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            error = OSError(number, os.strerror(number))
            line = f"a connection could not be taken: {error}"
            with unittest.mock.patch.object(self.server, "get_request", side_effect=error):
                connection = socket.create_connection(address(self.server), 10)
                self.wait_until(lambda line=line: line in self.log_lines())  # type: ignore[misc]
            with connection:
                self.assert_serves()

    def test_one_thread_that_cannot_be_started_is_made_up_for(self) -> None:
        self.faults_expected = True
        start, failed = threading.Thread.start, threading.Event()

        def start_later(thread: threading.Thread) -> None:
            if failed.is_set():
                return start(thread)
            failed.set()
            raise RuntimeError("can't start new thread")

        with unittest.mock.patch("threading.Thread.start", start_later):
            with socket.create_connection(address(self.server), timeout=10) as slow:
                slow.sendall(b"POST /inbox HTTP/1.1\r\n")
                self.assertEqual(self.post().status, 201)
                self.assertTrue(failed.is_set())
                self.assertEqual(self.post().status, 201)

    def test_endless_ends_of_lines_keep_nobody_waiting(self) -> None:
        self.assert_served_during_flood(b"", b"\r\n" * 1000)

    def test_nor_does_what_follows_a_refusal(self) -> None:
        with unittest.mock.patch("coarinbox.LINGER", 60):
            self.assert_served_during_flood(b"garbage\r\n", b"x" * 65536)

    def assert_served_during_flood(self, first: bytes, then: bytes) -> None:
        over = threading.Event()

        def flood() -> None:
            with socket.create_connection(address(self.server), timeout=10) as connection:
                with contextlib.suppress(OSError):
                    connection.sendall(first)
                    while not over.is_set():
                        connection.sendall(then)

        thread = threading.Thread(target=flood)
        thread.start()
        for _ in range(5):
            self.assertEqual(self.post().status, 201)
        over.set()
        thread.join()

    def test_it_does_not_turn_idly_while_it_is_full(self) -> None:
        with contextlib.ExitStack() as clients:
            for query in (b"?delay=.2", b"?delay=.2", b""):
                client = socket.create_connection(address(self.server), timeout=10)
                head = post_head(f"Content-Length: {len(BODY)}").replace(
                    b"/inbox", b"/inbox" + query
                )
                clients.enter_context(client).sendall(head + BODY)
            used = time.process_time()
            self.assertNotEqual(client.recv(12), b"")
            self.assertLess(time.process_time() - used, 0.08)

    def test_a_clock_that_is_set_back(self) -> None:
        self.post()
        with unittest.mock.patch("time.gmtime", return_value=time.gmtime(0)):
            earlier = path_of(self.post().headers["Location"])
        self.assertIn("/19700101_000000_", earlier)
        self.assertEqual(self.ask("GET", earlier).body, BODY)
        self.assertEqual(len(self.listed()), 2)
        deliveries = self.ask("GET", "/deliveries").json()["deliveries"]
        self.assertEqual(earlier, f"/inbox/{deliveries[0]['name']}")

    def test_a_store_that_is_taken_away_and_put_back(self) -> None:
        first = path_of(self.post().headers["Location"])
        directory = self.server.store.directory
        os.rename(directory, directory + ".away")
        second = path_of(self.post().headers["Location"])
        self.assertEqual(
            (self.ask("GET", first).status, self.ask("GET", second).status), (404, 200)
        )
        shutil.rmtree(directory)
        os.rename(directory + ".away", directory)
        self.assertEqual(self.ask("GET", first).body, BODY)
        self.assertEqual(self.post().status, 201)


class FaultTest(InboxTest):
    """Faults of the inbox itself, which must not end the service."""

    faults_expected = True

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.server.faults.clear)  # at the end of `running`, they would be raised

    def test_a_fault_between_requests(self) -> None:
        fault = unittest.mock.patch.object(
            self.server, "look_around", side_effect=ValueError("between requests")
        )
        with fault:
            self.wait_until(lambda: bool(self.server.faults))
        self.assert_serves()
        self.assertIn("between requests", str(self.server.faults[0]))

    def test_a_fault_outside_of_requests_ends_the_connection(self) -> None:
        with unittest.mock.patch("coarinbox.InboxHandler.handle", side_effect=ValueError("odd")):
            self.assertEqual(raw(self.server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), [])
        self.assertEqual([str(fault) for fault in self.server.faults], ["odd"])
        self.assert_serves()
        self.wait_until(lambda: not self.server.connections)

    def test_an_answer_that_finds_no_room_waits_for_it(self) -> None:
        with unittest.mock.patch("socket.socket.send", side_effect=BlockingIOError):
            answer = self.ask("GET", "/constraints")
        self.assertEqual(answer.json()["constraints"], coarinbox.constraints())

    def test_of_a_client_that_has_left_nothing_stays(self) -> None:
        for octets in (b"", post_head("Content-Length: 9"), b"GET / HTTP/1.0\r\n\r\n"):
            with socket.create_connection(address(self.server)) as connection:
                connection.sendall(octets)
            self.assert_serves()  # and so has taken the connection before
            self.wait_until(lambda: not self.server.connections)
            self.assertEqual(self.server.waiting, {})

    def test_at_its_end_it_closes_what_is_idle(self) -> None:
        with socket.create_connection(address(self.server), timeout=10) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertEqual(connection.recv(12), b"HTTP/1.1 200")
            self.server.server_close()
            rest = b"".join(iter(lambda: connection.recv(65536), b""))
        self.assertIn(b"Connection: keep-alive", rest)

    def test_a_connection_that_is_lost_before_it_is_served(self) -> None:
        with unittest.mock.patch("coarinbox.InboxHandler.setup", side_effect=OSError("lost")):
            self.assertEqual(raw(self.server, b""), [])
        self.assert_serves()
        self.assertEqual(self.server.faults, [])

    def test_threads_that_are_wanted_after_the_end_are_no_fault(self) -> None:
        self.server.server_close()
        self.server.find_leader()
        self.assertEqual(self.log_lines(), [])


class HastyTest(InboxTest):
    """Clients that send without a pause, and without an end."""

    settings = {"REQUEST_TIMEOUT": 0.2}

    def flood(self, head: bytes, octets: bytes, server: Any = None) -> float:
        """Send octets until the connection breaks; returns the seconds that it took."""
        where = address(server or self.server)
        with socket.create_connection(where, timeout=10) as connection:
            started = time.monotonic()
            connection.sendall(head)
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < started + 10:
                    connection.sendall(octets)
            return time.monotonic() - started

    def test_a_request_in_single_octets_has_no_more_time_than_others(self) -> None:
        with unittest.mock.patch("coarinbox.LINGER", 0.05):
            self.assertLess(self.flood(post_head("Content-Length: 1000000"), b"x"), 1.5)
        self.assertIn("REQUEST_TIMEOUT", "".join(self.log_lines()))

    def test_what_follows_a_refusal_is_not_read_for_ever(self) -> None:
        head = post_head("Content-Length: 999999999999999")
        with unittest.mock.patch("coarinbox.LINGER", 0.05):
            self.assertLess(self.flood(head, b"x" * 65536), 3)
            with serving(REQUEST_TIMEOUT=30) as patient:  # with requests, that is
                self.assertLess(self.flood(head, b"x" * 65536, patient), 3)


class ShortWriteTest(InboxTest):
    faults_expected = True

    @contextlib.contextmanager
    def disk_that_takes_a_part(self, of_the_log: bool) -> Iterator[None]:
        create = coarinbox.create

        def short(path: str, mode: str) -> Any:
            file = create(path, mode)
            if of_the_log != (path == self.server.deliveries.path):
                return file
            cut = unittest.mock.MagicMock(wraps=file)
            cut.__enter__.return_value, cut.__exit__ = cut, lambda *_: file.close()
            cut.write = lambda octets: file.write(octets[:100])
            return cut

        with unittest.mock.patch("coarinbox.create", short):
            yield

    def test_what_the_disk_takes_in_part_is_not_stored(self) -> None:
        with self.disk_that_takes_a_part(of_the_log=False):
            self.assert_problem(self.post(), 507)
        self.assertEqual(self.stored(), [])
        self.assertFalse([name for name in files_in(self.server.store.directory) if "part" in name])
        self.assertEqual(self.post().status, 201)

    def test_nor_is_it_logged(self) -> None:
        self.post()
        path = pathlib.Path(self.server.deliveries.path)
        before = path.read_bytes()
        with self.disk_that_takes_a_part(of_the_log=True):
            self.assertEqual(self.post().status, 201)
        self.assertEqual(path.read_bytes(), before)
        self.assertIn(f"not be logged: [Errno {errno.ENOSPC}]", "".join(self.log_lines()))


class DescriptorsTest(ProgramTest):
    @unittest.skipUnless(PROC, "the limit of descriptors needs a POSIX shell")
    def test_when_they_are_used_up_nothing_is_lost_and_service_resumes(self) -> None:
        command = ["sh", "-c", 'ulimit -n 24 && exec "$@"', "sh", *self.command("--port", "0")]
        with running(command, cwd=self.directory) as inbox:
            with contextlib.ExitStack() as clients:
                for _ in range(60):
                    clients.enter_context(socket.create_connection(inbox.server_address, 10))
                statuses = [inbox.ask("POST", "/inbox", ACCEPT).status for _ in range(20)]
            self.assertLessEqual(set(statuses), {201, 500})
            while statuses[-1] == 500 or len(statuses) == 20:  # until it sees that they have left
                statuses.append(inbox.ask("POST", "/inbox", ACCEPT).status)
            status, log = inbox.stop()
        self.assertEqual(status, 0)
        self.assertNotIn("Traceback", log)
        self.assertIn("Too many open files", log)
        untaken = log.count("a connection could not be taken")
        self.assertTrue(0 < untaken < 500, untaken)  # it does not try again and again
        stored = [
            name for name in files_in(self.directory / "notifications") if "jsonl" not in name
        ]
        self.assertEqual(len(stored), statuses.count(201))


class ManyTest(InboxTest):
    def holding(self, names: list[str]) -> Any:
        """Let the store hold notifications that nobody has written."""
        return unittest.mock.patch.object(self.server.store, "unsorted", names.copy)

    def test_a_long_list_is_sent_in_pieces_and_in_order(self) -> None:
        names = sorted(coarinbox.new_name() for _ in range(1000))
        with self.holding(names[::-1]), unittest.mock.patch("coarinbox.BATCH", 400):
            answer = self.ask("GET", "/inbox")
        listed = [path_of(entry["@id"]) for entry in answer.json()["ldp:contains"]]
        self.assertEqual(listed, [f"/inbox/{name}" for name in names])
        self.assertEqual(answer.headers["Transfer-Encoding"], "chunked")
        self.assertEqual(answer.headers["Connection"], "keep-alive")

    def test_a_connection_serves_on_after_a_long_list(self) -> None:
        names = [coarinbox.new_name() for _ in range(1000)]
        connection = http.client.HTTPConnection(*address(self.server), timeout=10)
        with contextlib.closing(connection):
            with self.holding(names):
                answer = ask_on(connection, "GET", "/inbox")
                self.assertEqual(len(answer.json()["ldp:contains"]), 1000)
            self.assertEqual(ask_on(connection, "POST", "/inbox", ACCEPT).status, 201)

    def test_a_long_list_for_those_who_know_no_chunks(self) -> None:
        with self.holding([coarinbox.new_name() for _ in range(1000)]):
            with socket.create_connection(address(self.server), timeout=10) as old:
                old.sendall(b"GET /inbox HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
                received = b"".join(iter(lambda: old.recv(65536), b""))
        head, _, body = received.partition(b"\r\n\r\n")
        self.assertNotIn(b"chunked", head)
        self.assertIn(b"Connection: close", head)
        self.assertEqual(len(json.loads(body)["ldp:contains"]), 1000)

    def test_memory_does_not_grow_with_the_number(self) -> None:
        peaks = []
        with unittest.mock.patch("coarinbox.BATCH", 500):
            for number in (2_000, 10_000):
                names = [f"20260101_000000_{index:032x}" for index in range(number)]
                with self.holding(names):
                    tracemalloc.start()
                    self.assertEqual(self.count(b'"@id": "http', "/inbox"), number + 1)
                    peaks.append(tracemalloc.get_traced_memory()[1])
                    tracemalloc.stop()
        self.assertLess(peaks[1], peaks[0] * 1.5)

    def count(self, text: bytes, path: str) -> int:
        """Fetch an answer, without keeping it; returns how many of its lines hold a text."""
        connection = http.client.HTTPConnection(*address(self.server), timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return sum(text in line for line in iter(response.readline, b""))


class TokenTest(InboxTest):
    settings = {"TOKEN": "s3cret: ü"}

    def test_every_request_must_carry_it(self) -> None:
        token = "s3cret: ü".encode()
        wrong_basic = base64.b64encode(b"s3cret:wrong").decode()
        for authorization in [
            None, "", "Bearer", "Bearer wrong", "Bearer s3cret: u", "Basic", "Basic ?", "Digest x",
            "Digest s3cret: \xc3\xbc", "Basic s3cret: \xc3\xbc", "Basic \xff",
            f"Basic {wrong_basic}", "s3cret",
        ]:  # fmt: skip
            for method, path in (
                ("POST", "/inbox"),
                ("GET", "/"),
                ("GET", "/deliveries"),
                ("OPTIONS", "/inbox"),
                ("GET", "/x"),
            ):
                with self.subTest(authorization, method=method):
                    headers = {} if authorization is None else {"Authorization": authorization}
                    answer = self.ask(method, path, BODY if method == "POST" else None, headers)
                    self.assert_problem(answer, 401)
                    self.assertRegex(answer.headers["WWW-Authenticate"], "Bearer .*Basic ")
        basic = base64.b64encode(b"anybody:" + token).decode()
        for authorization in ("Bearer " + token.decode("latin-1"), f"basic {basic}"):
            answer = self.ask("POST", "/inbox", BODY, {"Authorization": authorization})
            self.assertEqual(answer.status, 201)
        self.assertEqual(len(self.stored()), 2)

    def test_the_first_notification_to_try_it_goes_with_it(self) -> None:
        headers = {**HTML, "Authorization": b"Bearer " + "s3cret: ü".encode()}
        page = self.ask("GET", "/", headers=headers).body.decode()
        self.assertIn("/inbox -H &quot;Authorization: Bearer $TOKEN&quot; -H 'Content", page)

    def test_the_events_too(self) -> None:
        with Listener(self.server) as listener:
            self.assertEqual(listener.stream.status, 401)
        authorization = "Basic " + base64.b64encode("browser:s3cret: ü".encode()).decode()
        with Listener(self.server, Authorization=authorization) as listener:
            self.assertEqual(self.ask("POST", "/inbox", BODY).status, 401)
            self.assertEqual(listener.event().data["status"], 401)


class EmbeddedTest(unittest.TestCase):
    def test_the_end_of_the_block_ends_the_server_whatever_happens_in_it(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            settings = coarinbox.Settings(PORT=0, STORE_DIR=directory)
            with self.assertRaises(ZeroDivisionError), coarinbox.InboxServer(settings) as server:
                thread = threading.Thread(target=server.serve_forever)
                thread.start()
                self.assertEqual(ask(server, "POST", "/inbox", ACCEPT).status, 201)
                raise ZeroDivisionError
            thread.join(10)
            self.assertFalse(thread.is_alive())
            server.serve_forever()  # too late, and over at once

    def test_an_inbox_that_never_served_can_be_ended(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            settings = coarinbox.Settings(PORT=0, STORE_DIR=directory)
            with coarinbox.InboxServer(settings) as server:
                server.shutdown()
                server.serve_forever()


class LimitTest(InboxTest):
    settings = {"MAX_CONNECTIONS": 2}

    def test_more_connections_wait_and_idle_ones_make_room(self) -> None:
        first, second, third = (
            http.client.HTTPConnection(*address(self.server), timeout=10) for _ in range(3)
        )
        idle: list[http.client.HTTPConnection] = []
        for connection in (first, second, third):
            self.wait_until(lambda: len(self.server.waiting) == len(idle))
            self.addCleanup(connection.close)
            self.assertEqual(ask_on(connection, "POST", "/inbox", ACCEPT).status, 201)
            idle.append(connection)
        self.assertEqual(first.sock.recv(1), b"", "the one that was idle longest was not ended")
        for connection in (second, third):
            self.assertEqual(ask_on(connection, "POST", "/inbox", ACCEPT).status, 201)


class TlsTest(ProgramTest):
    certificate: str
    key: str

    @classmethod
    def setUpClass(cls) -> None:
        if not shutil.which("openssl"):
            raise unittest.SkipTest("making a certificate needs openssl")
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.certificate, cls.key = f"{directory.name}/cert.pem", f"{directory.name}/key.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
             "-keyout", cls.key, "-out", cls.certificate],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip

    def test_https(self) -> None:
        context = ssl.create_default_context(cafile=self.certificate)
        with serving(SSL_CERT=self.certificate, SSL_KEY=self.key, REQUEST_TIMEOUT=1) as server:
            self.assertTrue(server.base.startswith("https://localhost:"))
            with socket.create_connection(address(server)):  # stalls in the handshake
                for _ in range(2):
                    connection = http.client.HTTPSConnection(
                        *address(server), timeout=10, context=context
                    )
                    answer = ask_on(connection, "POST", "/inbox", ACCEPT)
                    self.assertEqual(answer.status, 201)
                    self.assertTrue(answer.headers["Location"].startswith("https://127.0.0.1:"))
                    self.assertEqual(ask_on(connection, "GET", "/inbox").status, 200)
                    connection.close()
            with self.assertLogs("coarinbox", "INFO") as caught:
                with contextlib.suppress(OSError):
                    self.assertEqual(raw(server, b"GET / HTTP/1.1\r\n\r\n"), [])
                server.server_close()
            self.assertFalse([line for line in caught.records if line.exc_info])

    @unittest.skipUnless(hasattr(ssl, "OP_IGNORE_UNEXPECTED_EOF"), "needs Python 3.10")
    def test_who_is_cut_off_for_the_sake_of_others_is_told_so(self) -> None:
        context = ssl.create_default_context(cafile=self.certificate)
        settings = {"SSL_CERT": self.certificate, "SSL_KEY": self.key, "MAX_CONNECTIONS": 1}
        with serving(**settings) as server, contextlib.ExitStack() as clients:

            def connect() -> ssl.SSLSocket:
                connection = socket.create_connection(address(server), timeout=10)
                secure = context.wrap_socket(connection, server_hostname="localhost")
                return clients.enter_context(secure)

            clients.enter_context(unittest.mock.patch("coarinbox.GRACE", 0.05))
            first = connect()
            first.sendall(post_head("Content-Length: 9") + b"x")
            connect()  # which waits until there is room
            with first.makefile("rb") as stream:
                self.assertEqual(read_answer(stream.readline(), stream).status, 503)

    def test_requests_that_come_at_once_are_all_answered(self) -> None:
        """The second lies where nobody but TLS knows of it: the first is just as long as a read."""
        last = post_head("Content-Length: 0", "Connection: close")
        first = post_head("Content-Length: 0", "X: ")
        padding = b"x" * (io.DEFAULT_BUFFER_SIZE - len(first))
        first = first.replace(b"X: ", b"X: " + padding)
        context = ssl.create_default_context(cafile=self.certificate)
        with serving(SSL_CERT=self.certificate, SSL_KEY=self.key) as server:
            with socket.create_connection(address(server), timeout=10) as connection:
                with context.wrap_socket(connection, server_hostname="localhost") as secure:
                    secure.sendall(first + last)
                    with secure.makefile("rb") as stream:
                        for _ in range(2):
                            self.assertEqual(read_answer(stream.readline(), stream).status, 400)

    def test_old_versions_of_the_protocol_are_refused(self) -> None:
        hello = b"\x03\x02" + bytes(32) + b"\x00" + b"\x00\x02\x00\x2f" + b"\x01\x00"  # TLS 1.1
        record = b"\x01" + len(hello).to_bytes(3, "big") + hello
        with serving(SSL_CERT=self.certificate, SSL_KEY=self.key) as server:
            with socket.create_connection(address(server), timeout=10) as connection:
                connection.sendall(b"\x16\x03\x01" + len(record).to_bytes(2, "big") + record)
                alert = connection.recv(100)
        self.assertEqual((alert[:1], alert[5:]), (b"\x15", b"\x02\x46"))  # protocol_version

    def test_files_that_cannot_be_used(self) -> None:
        for text in (
            'SSL_CERT = "none.pem"',
            f"SSL_CERT = {self.key!r}",
            f"SSL_CERT = {self.certificate!r}",
        ):
            line = self.fail_to_start("--port", "0", "--config", self.config(text))
            self.assertIn("SSL_CERT", line)
            self.assertIn("expected a certificate and its key, not encrypted, in PEM", line)

    def test_an_encrypted_key_is_refused_and_not_asked_about(self) -> None:
        encrypted = f"{self.directory}/encrypted.pem"
        encrypt = ["openssl", "pkey", "-in", self.key, "-aes256", "-passout", "pass:x"]
        subprocess.run([*encrypt, "-out", encrypted], check=True, capture_output=True)
        with self.assertRaisesRegex(coarinbox.ConfigurationError, "not encrypted"):
            with serving(SSL_CERT=self.certificate, SSL_KEY=encrypted):
                self.fail("it runs")


class DebuggerTest(ProgramTest):
    def test_without_the_package_one_line_says_what_to_install(self) -> None:
        with unittest.mock.patch.dict(sys.modules, pydevd=None):
            with unittest.mock.patch("coarinbox.run") as run:
                done = self.invoke("-d", "--port", "0")
        self.assertEqual((done.status, done.errors.count("\n")), (0, 1), done.errors)
        self.assertIn("no debugger: it needs the package pydevd-pycharm", done.errors)
        (server,) = run.call_args.args
        server.server_close()

    @unittest.skipUnless(importlib.util.find_spec("pydevd"), "the pydevd package is not installed")
    def test_it_connects_to_the_server_that_waits(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as editor:
            editor.settimeout(20)
            port = editor.getsockname()[1]
            path = self.config(f'DEBUG_PYCHARM_SERVER = "127.0.0.1"\nDEBUG_PYCHARM_PORT = {port}')
            command = self.command("-d", "--port", "0", "--config", path)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                accepted = pool.submit(self.accept_the_debugger, editor)
                with running(command, cwd=self.directory) as inbox:
                    with accepted.result():
                        self.assertEqual(inbox.ask("POST", "/inbox", ACCEPT).status, 201)
                    # The editor has ended, and the inbox has not.
                    self.assertEqual(inbox.ask("POST", "/inbox", ACCEPT).status, 201)

    def accept_the_debugger(self, editor: socket.socket) -> socket.socket:
        connection, _ = editor.accept()
        connection.sendall(b"501\t1\t0.1\n101\t3\t\n")  # version, run
        return connection

    @unittest.skipUnless(importlib.util.find_spec("pydevd"), "the pydevd package is not installed")
    def test_without_a_server_it_says_so_and_serves(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
        path = self.config(f'DEBUG_PYCHARM_SERVER = "127.0.0.1"\nDEBUG_PYCHARM_PORT = {port}')
        command = self.command("-d", "--port", "0", "--config", path)
        with running(command, cwd=self.directory) as inbox:
            self.assertIn("no debugger: 127.0.0.1", "\n".join(inbox.banner))
            self.assertEqual(inbox.ask("GET", "/inbox").status, 200)

    def test_an_editor_that_does_not_wait_is_no_reason_to_end(self) -> None:
        debugger = unittest.mock.Mock()
        debugger.settrace.side_effect = ConnectionRefusedError("refused")
        with unittest.mock.patch.dict(sys.modules, pydevd=debugger):
            with self.assertLogs("coarinbox", "WARNING") as caught:
                coarinbox.attach_debugger("editor.example", 6000)
        self.assertEqual(
            caught.output, ["WARNING:coarinbox:no debugger: editor.example:6000: refused"]
        )
        options = {"stdoutToServer": True, "stderrToServer": True, "suspend": False}
        debugger.settrace.assert_called_once_with("editor.example", port=6000, **options)


# --- The coarnotify package as a client ----------------------------------------------------------


class ClientTest(unittest.TestCase):
    @unittest.skipUnless(importlib.util.find_spec("coarnotify"), "coarnotify is not installed")
    def test_its_own_integration_tests_pass(self) -> None:
        from coarnotify.test.integration import test_client

        tests = unittest.defaultTestLoader.loadTestsFromModule(test_client)
        output = io.StringIO()
        with coarinbox.running() as inbox:
            # They expect it at port 5005, where another one may run.
            with unittest.mock.patch.object(test_client, "INBOX", inbox.url):
                with contextlib.redirect_stdout(output):
                    result = unittest.TextTestRunner(output).run(tests)
            self.assertTrue(result.wasSuccessful(), output.getvalue())
            self.assertEqual((result.testsRun, len(inbox.notifications)), (12, 12))


# --- The files -----------------------------------------------------------------------------------


# The code of somebody who tries again when an inbox is busy, and a program around it.
MY_CODE = """
import json, urllib.error, urllib.request

def request_review(inbox):
    for attempt in range(3):
        body = json.dumps({}).encode()
        request = urllib.request.Request(inbox, body, {{"Content-Type": "application/ld+json"}})
        try:
            return urllib.request.urlopen(request).close()
        except urllib.error.HTTPError as error:
            error.close()
"""
MY_PROGRAM = "my_code.request_review(sys.argv[1])\n"


README = (HERE / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Find the blocks of code in the README that are in a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert found, language
    return found


class ReadmeTest(ProgramTest):
    @unittest.skipUnless(shutil.which("curl"), "curl is not installed")
    def test_the_commands_print_what_it_says(self) -> None:
        sessions = [block for block in blocks("console") if block.startswith("$ ")]
        self.assertEqual(len(sessions), 3)
        name = re.compile("[0-9]{8}_[0-9]{6}_[0-9a-f]{32}")
        with running(self.command("--port", "0"), cwd=self.directory) as inbox:
            for session in sessions:
                command, closing, output = session[2:].partition("'\n")
                here = command.replace("5005", str(inbox.server_address[1])) + closing
                done = subprocess.run(
                    here, shell=True, cwd=self.directory, capture_output=True, text=True, timeout=20
                )
                printed = done.stdout.replace(str(inbox.server_address[1]), "5005")
                expected, printed = name.sub("NAME", output), name.sub("NAME", printed)
                matches = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
                self.assertTrue(matches, printed)

    def test_the_first_screen_holds_the_essential(self) -> None:
        first = "\n".join(README.splitlines()[:40])
        for essential in ("python coarinbox.py\n", "curl", "201 Created", "Location:", '"pointer"'):
            self.assertIn(essential, first)

    def test_the_settings_are_those_of_the_code(self) -> None:
        rows = re.findall(r"^\| `([A-Z_]+)` \| `(.+?)` \|", README, re.MULTILINE)
        settings = [(name, repr(value)) for name, value in vars(coarinbox.Settings()).items()]
        self.assertEqual(rows, settings)

    def test_the_flags_are_those_of_the_program(self) -> None:
        help_ = " ".join(self.invoke("--help").output)
        listed = README.partition("lists the flags")[2].partition("\n\n")[0]
        flags = re.findall("`(--?[a-z]+(?: [A-Z]+)?)`", listed)
        self.assertGreater(len(flags), 6)
        for flag in flags:
            self.assertIn(f"{flag} ", help_)


def run_example(code: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command where the module is, with code that uses it and what that tests."""
    # What runs here is a copy, whose coverage nobody could look at afterwards.
    env = {name: value for name, value in environment().items() if "COVERAGE" not in name}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # no other package has a part in it
    with tempfile.TemporaryDirectory() as name:
        env["TMPDIR"] = name
        directory = pathlib.Path(name)
        shutil.copy(MODULE, directory)
        (directory / "test_review.py").write_text(code)
        (directory / "my_code.py").write_text(MY_CODE.format(OFFER))
        (directory / "python").symlink_to(sys.executable)
        program = directory / "my-program"
        program.write_text(f"#!{sys.executable}\nimport my_code, sys\n" + MY_PROGRAM)
        program.chmod(0o755)
        return subprocess.run(
            command, cwd=directory, env=env, capture_output=True, text=True, timeout=60
        )


class ExampleTest(unittest.TestCase):
    """The examples in the README, all at once: the one for the shell waits a second."""

    examples: dict[str, concurrent.futures.Future[subprocess.CompletedProcess[str]]]

    @classmethod
    def setUpClass(cls) -> None:
        pool = concurrent.futures.ThreadPoolExecutor()
        cls.addClassCleanup(pool.shutdown)
        with_unittest, with_pytest = blocks("python")
        (script,) = blocks("sh")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            script = script.replace("5006", str(free.getsockname()[1]))
        python = (sys.executable, "-m")
        cls.examples = {
            "sh": pool.submit(run_example, "", "sh", "-ec", "PATH=.:$PATH\n" + script),
            "unittest": pool.submit(run_example, with_unittest, *python, "unittest"),
            "pytest": pool.submit(
                run_example, with_pytest, *python, "pytest", "-p", "no:cacheprovider"
            ),
        }

    def assert_works(self, name: str, text: str) -> None:
        done = self.examples[name].result()
        output = done.stdout + done.stderr
        self.assertEqual(done.returncode, 0, output)
        self.assertIn(text, output)

    def test_the_one_for_unittest_passes(self) -> None:
        self.assert_works("unittest", "Ran 1 test")

    @unittest.skipUnless(importlib.util.find_spec("pytest"), "pytest is not installed")
    def test_the_one_for_pytest_passes(self) -> None:
        self.assert_works("pytest", "1 passed")

    @unittest.skipUnless(shutil.which("curl"), "curl is not installed")
    def test_the_one_for_the_shell_works(self) -> None:
        self.assert_works("sh", "Request Review")


class ShapeTest(unittest.TestCase):
    def test_it_says_which_version_it_is(self) -> None:
        self.assertRegex(coarinbox.__version__, r"^[0-9]+\.[0-9]+\.[0-9]+$")

    def test_no_function_is_longer_than_a_screen(self) -> None:
        tree = ast.parse(MODULE.read_text(encoding="utf-8"))
        lengths = {
            node.name: (node.end_lineno or 0) - node.lineno + 1
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
        }
        self.assertGreater(len(lengths), 50)
        self.assertEqual({name: lines for name, lines in lengths.items() if lines > 40}, {})

    def test_nothing_but_the_standard_library_is_imported(self) -> None:
        code = "import sys, coarinbox; print(*{name.partition('.')[0] for name in sys.modules})"
        done = subprocess.run(
            [sys.executable, "-S", "-c", code], cwd=HERE, capture_output=True, text=True, check=True
        )
        if sys.version_info >= (3, 10):
            foreign = set(done.stdout.split()) - sys.stdlib_module_names - {"coarinbox", "__main__"}
            self.assertEqual(foreign, set())


if __name__ == "__main__":
    unittest.main()
