#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
#
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""An inbox for people who implement COAR Notify: a W3C LDN receiver in one file.

It checks notifications against the specification, says what is wrong and what to write instead,
stores them byte for byte, shows every delivery on a page, and answers like a review service. It
needs nothing but Python, and the file may be copied into another project. There are three ways to
use it. As a server, configured by a file if need be:

    python coarinbox.py [--config local.cfg]

As a tool, without a server:

    python coarinbox.py --check FILE...
    python coarinbox.py --sample "Request Review" --send http://localhost:5005/inbox

As a module, in a test:

    with coarinbox.running() as inbox:
        send_something(inbox.url)
        delivery = inbox.wait_for(type="Offer")

Four words mean different things. A *finding* is something wrong with a notification, or something
that could be better. A *problem* is an answer with an HTTP error (RFC 9457). A *simulated failure*
is an error that a test asked for. A *bug* is a fault of this program.

Each section uses only those above it, but Access, `InboxHandler` and `Connection` use the server.

    notifications   JSON and URIs, Patterns and hints, Rules, Validation, Samples and replies
    configuration   Settings
    what is kept    Store, Deliveries, Delivery log, Ledger, Simulated failures
    HTTP            Messages, Intake, Waiting
    other inboxes   Sending, Replies
    this inbox      Templates, Wording, Pages, Access, Resources, Connections, Server
    how to use it   Test double, Command line
"""

from __future__ import annotations

import sys

# An older Python fails at the := below and prints this line, so the line names the version.
if (version := sys.version_info[:2]) < (3, 9):  # coarinbox needs Python 3.9 or later
    sys.exit("coarinbox needs Python 3.9 or later, and this is {}.{}".format(*version))

import argparse
import base64
import collections
import contextlib
import copy
import dataclasses
import enum
import errno
import functools
import hashlib
import heapq
import hmac
import html
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import queue
import re
import selectors
import shlex
import signal
import socket
import socketserver
import ssl
import stat
import threading
import time
import traceback
import types
import uuid
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from email.utils import formatdate, parsedate_to_datetime
from html.parser import HTMLParser
from typing import IO, Any, NamedTuple, Optional, Union
from urllib.parse import parse_qsl, quote, unquote, urlencode, urljoin, urlsplit

__version__ = "1.0.1"

LOG = logging.getLogger("coarinbox")


# --- JSON and URIs -------------------------------------------------------------------------------
#
# Reads JSON strictly (`parse`, `lookup`), tells URIs from other strings (`is_uri`, `is_http_uri`,
# `ip_address`) and prepares untrusted text for people (`clip`, `escape_controls`). Every function
# takes time linear in its input.
# Must not know: notifications, HTTP.

# A notification is nested five levels deep. Python's own limit differs between versions.
MAX_DEPTH = 100


class NestedTooDeeplyError(ValueError):
    """The document is JSON, but nested more than MAX_DEPTH levels deep."""


def clip(text: str, length: int) -> str:
    """Shorten a text, and append its full length if it was cut."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"


def counted(count: int, word: str) -> str:
    """Write a number and a word, in the plural where the number demands it."""
    return f"{count:,} {word}" + "s" * (count != 1 and word.islower())


def parse_number(digits: str) -> int | float:
    """Read a JSON number. Raises `ValueError` for a number that overflows a double."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"a number is too large: {clip(digits, 20)}")
    return int(digits) if re.fullmatch("-?[0-9]+", digits) else value


def parse_constant(name: str) -> None:
    """Refuse `NaN` and the infinities, which Python would read."""
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(
    parse_int=parse_number, parse_float=parse_number, parse_constant=parse_constant
)


# The documents that this module builds have no cycles, so it need not look for them.
to_json = json.JSONEncoder(check_circular=False).encode


def depth(text: str) -> int:
    """Count how many brackets of a JSON text are open at once, ignoring those in strings."""
    brackets = re.sub(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[^][{}"]+', "", text, flags=re.DOTALL)
    return max(itertools.accumulate(1 if each in "[{" else -1 for each in brackets), default=0)


def parse(data: bytes) -> Any:
    """Parse a JSON text (RFC 8259) in UTF-8, the only encoding allowed between systems.

    Raises `NestedTooDeeplyError`, or another `ValueError` that says what is wrong. `NaN` and
    numbers that JSON receivers read differently (RFC 7493 section 2.2) are refused too.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    if not text:
        raise ValueError("the body is empty")
    if text.startswith("\ufeff"):
        raise ValueError("it starts with a byte order mark (RFC 8259 section 8.1)")
    # Counting brackets is cheap, and most texts have fewer than MAX_DEPTH.
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH and depth(text) > MAX_DEPTH:
        raise NestedTooDeeplyError(f"nested more than {MAX_DEPTH} levels deep")
    return DECODER.decode(text)


# Characters without a glyph that `str.isprintable` accepts all the same.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def escape_controls(text: str) -> str:
    """Escape characters that are invisible or mislead the reader, the way JSON does.

    These are control characters, line breaks, marks that reverse the direction of writing, every
    space but U+0020, and characters without a glyph.
    """
    if text.isascii() and text.isprintable():  # as nearly all are
        return text
    others = set(re.findall("[^ -~]", text))
    odd = (each for each in others if not each.isprintable() or INVISIBLE.match(each))
    return text.translate({ord(each): json.dumps(each)[1:-1] for each in odd})


def lookup(document: Any, member: str) -> Any:
    """Return the member with a dotted name, or None if it is missing."""
    value = document
    for name in member.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


# Characters that RFC 3986 and RFC 3987 forbid anywhere in a URI, and the parts of a URI.
FORBIDDEN = r"\s\x00-\x1f\x7f-\x9f\ud800-\udfff<>\"{}|\\^`"
URI = re.compile(
    rf"""
    (?P<scheme> [A-Za-z][A-Za-z0-9+.-]* ) :
    (?: // (?: [^/?\#@\[\]{FORBIDDEN}]* @ )?                # user information
        (?P<host> \[ [^/?\#@\]{FORBIDDEN}]* \] | [^/?\#@\[\]:{FORBIDDEN}]* )
        (?: : [0-9]+ )? (?= [/?\#] | \Z )                   # port
      | (?! // ) )
    [^?\#\[\]{FORBIDDEN}]*                                 # path
    (?: \? [^\#{FORBIDDEN}]* )?                            # query
    (?: \# [^\#\[\]{FORBIDDEN}]* )?                        # fragment
    """,
    re.VERBOSE,
)


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Read the host of a URI as an IP address, IPv6 in brackets; None for any other host."""
    try:
        if host.startswith("["):
            address = ipaddress.IPv6Address(host[1:-1])
            return address.ipv4_mapped or address
        return ipaddress.IPv4Address(host)
    except ValueError:
        return None


def scheme_of(value: Any) -> str:
    """Return the scheme of an absolute URI, in lower case; empty for anything else."""
    match = URI.fullmatch(value) if isinstance(value, str) else None
    if not match:
        return ""
    scheme, host = match["scheme"].lower(), match["host"] or ""
    usable = ip_address(host) if host.startswith("[") else host or scheme not in ("http", "https")
    return scheme if usable else ""


def is_uri(value: Any) -> bool:
    """Return whether value is an absolute URI, with a fragment or without."""
    return scheme_of(value) != ""


def is_http_uri(value: Any) -> bool:
    """Return whether value is an absolute URI with scheme http or https and a host."""
    return scheme_of(value) in ("http", "https")


# --- Patterns and hints --------------------------------------------------------------------------
#
# The vocabulary of COAR Notify, and corrections for words that are not in it. A pattern is
# recognised by its types (`pattern_of`). A hint is a text such as "write `Person`", made from the
# faulty value. Hints read only the beginning of a value, because it may be hostile. Public names:
# `PATTERNS`, `Pattern`, `pattern_of`, `types_of`.
# Must not know: the rules.

SPECIFICATION = "https://coar-notify.net/specification/1.0.1/"


class Pattern(NamedTuple):
    """A kind of notification, recognised by its types."""

    name: str
    family: str  # patterns of one family share their rules
    page: str  # below SPECIFICATION
    types: tuple[str, ...]

    @property
    def spec(self) -> str:
        """The URL of the page of the specification."""
        return f"{SPECIFICATION}{self.page}/"

    def __str__(self) -> str:
        return f"{json_types(self.types)} ({self.name})"


# fmt: off
PATTERNS = (
    Pattern("Accept", "answer", "accept", ("Accept",)),
    Pattern("Announce Endorsement", "endorsement", "announce-endorsement",
            ("Announce", "coar-notify:EndorsementAction")),
    Pattern("Announce Relationship", "relationship", "announce-relationship",
            ("Announce", "coar-notify:RelationshipAction")),
    Pattern("Announce Review", "review", "announce-review",
            ("Announce", "coar-notify:ReviewAction")),
    Pattern("Announce Service Result", "service result", "announce-resource", ("Announce",)),
    Pattern("Reject", "answer", "reject", ("Reject",)),
    Pattern("Request Endorsement", "request", "request-endorsement",
            ("Offer", "coar-notify:EndorsementAction")),
    Pattern("Request Review", "request", "request-review", ("Offer", "coar-notify:ReviewAction")),
    Pattern("Tentatively Accept", "answer", "tentative-accept", ("TentativeAccept",)),
    Pattern("Tentatively Reject", "answer", "tentative-reject", ("TentativeReject",)),
    Pattern("Unprocessable Notification", "unprocessable", "unprocessable",
            ("Flag", "coar-notify:UnprocessableNotification")),
    Pattern("Undo Offer", "answer", "undo-offer", ("Undo",)),
)
# fmt: on

REQUEST_REVIEW = next(each for each in PATTERNS if each.name == "Request Review")  # as example
ACTIVITY_STREAMS = "https://www.w3.org/ns/activitystreams"
COAR_NOTIFY = "https://coar-notify.net"
PURL = "https://purl.org/coar/notify"  # the namespace of earlier versions
ACTOR_TYPES = frozenset("Application Group Organization Person Service".split())
AS2_OBJECT_TYPES = ACTOR_TYPES | frozenset(
    "Activity Article Audio Collection CollectionPage Relationship Document Event Image"
    " IntransitiveActivity Note Object OrderedCollection OrderedCollectionPage Page Place Profile"
    " Question Tombstone Video".split()
)
AS2_NAMES = AS2_OBJECT_TYPES | frozenset(
    "Accept Add Announce Arrive Block Create Delete Dislike Flag Follow Ignore Invite Join Leave"
    " Like Link Listen Mention Move Offer Read Reject Remove TentativeAccept TentativeReject"
    " Travel Undo Update View".split()
)
SCHEMA_ORG = ("sorg:", "https://schema.org/", "http://schema.org/")


def names_in(value: Any) -> list[str]:
    """List the strings in the value of a `type` member."""
    if isinstance(value, str):
        return [value]
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def types_of(value: Any) -> frozenset[str]:
    """Collect the strings in the value of a `type` member."""
    return frozenset(names_in(value))


# The most specific first: `fitting` takes the first that fits, and Announce alone fits all of them.
BY_TYPES = {
    frozenset(pattern.types): pattern
    for pattern in sorted(PATTERNS, key=lambda pattern: -len(pattern.types))
}


def fitting(value: Any) -> Pattern | None:
    """Return the most specific pattern that the value of a `type` member fits."""
    types = types_of(value)
    exact = BY_TYPES.get(types)  # nearly always
    return exact or next((BY_TYPES[wanted] for wanted in BY_TYPES if wanted <= types), None)


def pattern_of(document: Any) -> Pattern | None:
    """Return the pattern that a notification claims by its `type`, the most specific that fits."""
    return fitting(document.get("type")) if isinstance(document, dict) else None


def is_lookalike(name: str) -> bool:
    """Return whether a type looks like an action of COAR Notify."""
    vocabulary = r"coar-notify:|https?://(coar-notify\.net|purl\.org/coar)(/|\Z)"
    looks = "Action" in name or re.match(vocabulary, name) is not None
    return looks and not name.startswith(SCHEMA_ORG)


def json_types(types: Sequence[str]) -> str:
    """Write types as JSON: a single one as a string, several as a list."""
    return json.dumps(types[0] if len(types) == 1 else list(types), ensure_ascii=False)


def short_value(value: Any) -> Any:
    """Return a value if its JSON is short enough to be repeated in an answer, else None."""
    try:
        # It would remember the value when looking for circles, and stay in memory with it.
        pieces = json.JSONEncoder(allow_nan=False, check_circular=False).iterencode(value)
        short = sum(map(len, itertools.islice(pieces, 101))) <= 100
    except (RecursionError, TypeError, ValueError):
        short = False
    return value if short else None


def simplify(name: str) -> str:
    """Reduce a name or IRI to its last part: `as:Offer`, `@offer` and `https://…#Offer` are one."""
    last = re.split("[:/#]", name[-100:].rstrip("/"))[-1]
    return re.sub("[^a-z0-9]", "", last.lower())


def close_to(name: str, wanted: Iterable[str], cutoff: float = 0.85) -> str:
    """Return the wanted name that is spelt like another one, or nearly so; or nothing."""
    import difflib

    return next(iter(difflib.get_close_matches(name, wanted, n=1, cutoff=cutoff)), "")


def misspelt(given: Any, wanted: Iterable[str]) -> str:
    """Return a hint if one of the given names looks like a misspelt wanted one, else nothing."""
    spelt = {simplify(name): name for name in wanted}
    for name in names_in(given)[:50]:
        if close := close_to(simplify(name)[:40], spelt):
            return f"found `{clip(name, 100)}`; write `{spelt[close]}`"
    return ""


def type_hint(value: Any) -> str:
    """Suggest the one or two patterns that a `type` probably means; nothing if unsure.

    A word speaks for a pattern if it is close to the name of the pattern, or to one of its types,
    with or without `Action`. A whole type that is the name of a pattern decides.
    """
    whole = {simplify(name)[:40] for name in names_in(value)[:5]}
    words = (word for name in names_in(value)[:5] for word in re.split("[ ,+]+", name[:200]))
    given = {simplify(word) for word in itertools.islice(words, 5)}
    if any(word.endswith("ingestaction") for word in given):
        return "Request Ingest and Announce Ingest were removed in specification 1.0.0"
    votes = {}
    for pattern in PATTERNS:
        names = [simplify(name) for name in (pattern.name, *pattern.types)]
        names += [name.replace("action", "") for name in names]
        votes[str(pattern)] = sum(close_to(word, names) != "" for word in given)
        votes[str(pattern)] += 10 * (close_to(names[0], whole) != "")
    most = max(votes.values())
    likely = [pattern for pattern, count in votes.items() if count == most > 0]
    return f"did you mean {' or '.join(likely)}?" if 0 < len(likely) <= 2 else ""


def action_hint(value: Any) -> str:
    """Name the first type that looks like an action, and suggest the pattern it may stand for."""
    name = next(filter(is_lookalike, names_in(value)))
    hint = type_hint(["Announce", name])
    return f"found `{clip(name, 100)}`" + (f"; {hint}" if hint else "")


def misnamed(member: str, given: list[Any]) -> str:
    """Return a hint if a missing member was probably written under another name."""
    if member == "ietf:item" and "url" in given:
        return "found `url`, its name in version 0.9; write `ietf:item`"
    return misspelt(given, [member])


# Common substitutes for a URI (a bare UUID, DOI, host or ORCID iD), and the URI to write.
MEANT_AS_URI = (
    ("[{]?([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})[}]?", "urn:uuid:{}"),
    ("(?:(?:doi|DOI):? ?|doi[.]org/)?(10[.][0-9]{4,9}/.+)", "https://doi.org/{}"),
    ("(localhost(?::[0-9]+)?(?:/.*)?)", "http://{}"),
    ("((?:[0-9]{4}-){3}[0-9]{3}[0-9X])", "https://orcid.org/{}"),
)


def strings_hint(value: Any) -> str:
    """Suggest the strings alone where a `type` also holds other values."""
    names = [name for name in names_in(value)[:5] if len(name) <= 100]
    return f"write `{json_types(names)}`" if names else ""


def single_hint(value: Any) -> str:
    """Suggest one of the types in a list, the first that an actor may have."""
    names = names_in(value)[:50]
    chosen = next(filter(ACTOR_TYPES.__contains__, names), "".join(names[:1]))
    return f"write `{json_types([chosen])}`" if 0 < len(chosen) <= 100 else ""


def object_hint(value: Any) -> str:
    """Suggest removing the list around a single object."""
    wrapped = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
    return "write the object alone, without the list around it" if wrapped else ""


def uri_hint(value: Any, is_wanted: Callable[[Any], bool]) -> str:
    """Suggest a URI of the wanted kind in place of the value, if it can be derived from it."""
    inner = value[0] if isinstance(value, list) and len(value) == 1 else value
    inner = inner.get("id", inner.get("@id")) if isinstance(inner, dict) else inner
    if not isinstance(inner, str) or len(inner) > 200:
        return ""
    text = inner.strip()
    if is_wanted(text):
        return ("" if text == inner else "remove the white space; ") + f"write `{text}`"
    matches = ((re.fullmatch(written, text), uri) for written, uri in MEANT_AS_URI)
    meant = [uri.format(match[1]) for match, uri in matches if match]
    uri = next(filter(is_wanted, (text.replace(" ", "%20"), *meant)), "")
    return f"write `{uri}`" if uri else ""


def id_hint(value: str) -> str:
    """Suggest the recommended form of the UUID in an `id`, or a new UUID if it has none."""
    match = re.fullmatch("(?:[^:]{1,20}:)*([0-9a-f]{32})", value[-100:].lower().replace("-", ""))
    return f"write `{uuid.UUID(match[1]).urn}`" if match else "write `urn:uuid:…` with a new UUID"


# --- Rules ---------------------------------------------------------------------------------------
#
# The rules for notifications, as tables that read like the specification, and the habits of
# production receivers. A rule puts a check on a member and says how bad it is to break it. Public
# names: `LEVELS`, `Finding`, `RULES` (by name of the pattern), `RECEIVERS`.
# Must not know: how the rules are applied, HTTP, storage.

REFUSED, MUST, SHOULD, FINE = "E", "M", "S", ""


class Level(NamedTuple):
    """How bad a finding is, in a word and in a sentence."""

    word: str
    meaning: str


LEVELS = {
    REFUSED: Level(
        "error",
        "the coarnotify libraries refuse it, or it is a missing id, which the Python one makes up",
    ),
    MUST: Level(
        "must", "breaks a MUST or REQUIRED of the specification, though coarnotify accepts it"
    ),
    SHOULD: Level("should", "breaks a SHOULD or RECOMMENDED, or a production receiver refuses it"),
}


class Finding(NamedTuple):
    """One thing that is wrong with a notification."""

    level: str  # a key of LEVELS
    pointer: str  # RFC 6901, to the member or to where one is missing
    code: str  # names the rule; stays the same between versions
    message: str
    spec: str  # URL of the page that says so
    value: Any = None  # the value of the member, if it is short
    refused_by: tuple[str, ...] = ()  # names of receivers
    fix: str = ""  # the end of the message: how to mend it

    @property
    def fault(self) -> str:
        """The message without the fix."""
        return self.message.removesuffix(f"; {self.fix}")

    def as_json(self) -> dict[str, Any]:
        """Return the members of a JSON object, leaving out empty ones."""
        members = self._asdict()
        for name, default in self._field_defaults.items():
            if members[name] == default:
                del members[name]
        return members

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> Finding:
        """Read what `as_json` wrote; raises `TypeError` for anything else."""
        finding = cls(**{**members, "refused_by": tuple(members.get("refused_by", ()))})
        texts = finding._replace(value="")
        if not all(isinstance(text, str) for text in (*texts[:6], *texts.refused_by, texts.fix)):
            raise TypeError("a finding has a member that is not a string")
        return finding

    def __str__(self) -> str:
        names = f" (refused by {', '.join(self.refused_by)})" if self.refused_by else ""
        return self.message + names


class Check(NamedTuple):
    """A demand on the value of a member."""

    name: str  # the end of the code of a finding, so it must never change
    demand: str  # completes "the member must"
    # Takes any JSON value, and the value of the sibling if there is one. Never raises.
    accepts: Callable[..., bool]
    hint: Callable[..., str] = lambda *values: ""  # how to mend it; empty where EXAMPLE will do
    sibling: str = ""  # dotted name of another member of the notification


# Spellings of the namespaces that are understood, and the right ones.
VARIANTS = {
    f"{ACTIVITY_STREAMS}/": ACTIVITY_STREAMS,
    f"{COAR_NOTIFY}/": COAR_NOTIFY,
    PURL: COAR_NOTIFY,
    f"{PURL}/": COAR_NOTIFY,
}


def matches(form: str) -> Callable[[Any], bool]:
    """Accept strings that begin with a match of a regular expression."""
    match = re.compile(form).match
    return lambda value: isinstance(value, str) and match(value) is not None


is_media_type = matches(r"(?a)[\w!#$&^.+-]+/[\w!#$&^.+-]+ *(;|\Z)")
is_uuid_urn = matches(r"urn:uuid:[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")
is_loose_uuid_urn = matches(r"urn:uuid:[0-9a-fA-F-]{32,36}\Z")  # with hyphens or without


def in_order(value: Any) -> Any:
    """Return types with the pattern's own first; the same object if they are in order already."""
    pattern = fitting(value)
    types = pattern.types if pattern else ()
    places = [value.index(name) for name in types]
    if places == sorted(places):
        return value
    return [*types, *(name for name in value[:10] if name not in types)]


def contexts_in(value: Any) -> list[str]:
    """List the namespaces in an `@context` in their right spelling; other entries are empty."""
    names = value if isinstance(value, list) else []
    return [VARIANTS.get(name, name) if isinstance(name, str) else "" for name in names]


def old_contexts_in(value: Any) -> list[str]:
    """List the spellings of a namespace in an `@context` that does not have the right one."""
    names = names_in(value)
    return [old for old, right in VARIANTS.items() if old in names and right not in names]


def context_hint(value: Any) -> str:
    """Write both namespaces, and after them the other contexts that a notification has."""
    others: list[Any] = []
    for each in value[:10] if isinstance(value, list) else [value]:
        is_other = is_http_uri(each) and not re.search("activitystream|coar.?notify", each)
        if (is_other or isinstance(each, dict)) and each not in others:
            others.append(each)
    written = [ACTIVITY_STREAMS, COAR_NOTIFY, *(short_value(others) or [])]
    return f"write `{json.dumps(written, ensure_ascii=False)}`"


def include(name: str, wanted: frozenset[str], what: str) -> Check:
    """Demand one of the wanted types."""
    return Check(
        name,
        f"include {what}",
        lambda value: not wanted.isdisjoint(names_in(value)),
        lambda value: misspelt(value, wanted),
    )


def equal(member: str, meaning: str) -> Check:
    """Demand the value of another member, unless that one is missing; both have one meaning."""
    return Check(
        f"equals-{member}",
        f"equal {member}",
        lambda value, other: other is None or value == other,
        lambda value, other: (
            f"write {meaning} in both"
            + (f"; {member} is `{clip(other, 200)}`" if is_uri(other) else "")
        ),
        sibling=member,
    )


EMBED_OFFER = "write the complete Offer, without its `@context`"
ASK_ID = "write the id of the notification that it answers"

# fmt: off
UNEXPECTED = Check("unexpected", "be left out", lambda value: False)
OBJECT = Check("object", "be an object", lambda value: isinstance(value, dict), object_hint)
STRING = Check("string", "be a string", lambda value: isinstance(value, str))
TEXT = Check("text", "be a string that is not empty", matches(r"\s*\S"))
ABSOLUTE_URI = Check("absolute-uri", "be an absolute URI", is_uri,
                     lambda value: uri_hint(value, is_uri))
HTTP_URI = Check("http-uri", "be an HTTP URI", is_http_uri,
                 lambda value: uri_hint(value, is_http_uri))
RECOMMENDED_ID = Check("preferred", "be `urn:uuid:` in lower case and a hyphenated UUID",
                       is_uuid_urn, id_hint)
TYPES = Check("strings", "be a string or a list of strings",
              lambda value: isinstance(value, str) or names_in(value) == value, strings_hint)
ONE_TYPE = Check("single", "be a single string", lambda value: not isinstance(value, list),
                 single_hint)
ONE_SERVICE = ONE_TYPE._replace(hint=lambda value: 'write `"Service"`')
SERVICE = include("service", frozenset({"Service"}), "Service")
OFFER = include("offer", frozenset({"Offer"}), "Offer")
ACTOR_TYPE = include("actor", ACTOR_TYPES, f"one of {', '.join(sorted(ACTOR_TYPES))}")
AS2_TYPE = include("as2-object", AS2_OBJECT_TYPES,
                   "an ActivityStreams 2.0 object type, such as Page, Article or Document")
ABOUT_PAGE = include("about-page", frozenset({"sorg:AboutPage"}), "sorg:AboutPage")
SCHEMA_TYPE = Check("schema", "include a schema.org type, such as sorg:ScholarlyArticle",
                    lambda value: any(name.startswith(SCHEMA_ORG) for name in names_in(value)))
MIME_TYPE = Check("media-type", "be a media type, type/subtype", is_media_type)
NAMESPACED = Check("namespaces", f"be a list holding {ACTIVITY_STREAMS} and {COAR_NOTIFY}",
                   lambda value: {ACTIVITY_STREAMS, COAR_NOTIFY} <= set(contexts_in(value)),
                   context_hint)
CURRENT = Check("current", "name no outdated variant of a namespace",
                lambda value: not old_contexts_in(value),
                lambda value: "; ".join(
                    f"found `{old}`; write `{VARIANTS[old]}`" for old in old_contexts_in(value)))
FIRST = Check("order", f"begin with {ACTIVITY_STREAMS}",
              lambda value: ACTIVITY_STREAMS in contexts_in(value)[:1]
              or ACTIVITY_STREAMS not in contexts_in(value),
              context_hint)
PATTERN = Check("pattern", "fit a pattern", lambda value: fitting(value) is not None,
                lambda value: type_hint(value)
                or f"write the types of one, such as {REQUEST_REVIEW}")
ORDER = Check("order", "name the ActivityStreams type before the `coar-notify:` one",
              lambda value: in_order(value) is value,
              lambda value: f"write `{json_types(in_order(value))}`")
KNOWN_ACTIONS = Check("known-actions", "name only actions that a pattern has",
                      lambda value: not any(map(is_lookalike, names_in(value))), action_hint)
SAME_OFFER = equal("object.id", "the id of the Offer")
SAME_NOTIFICATION = equal("object.id", "the id of the notification")
SAME_RESOURCE = equal("object.as:object", "the URL of the resource")
# An Offer is complete if its types are those of a pattern.
COMPLETE = PATTERN._replace(demand="be that of a complete Offer", hint=lambda value: EMBED_OFFER)


class Rule(NamedTuple):
    """A demand on a member, with the levels of it being missing and of it being wrong.

    Findings are in the order of the rules. After an error, later rules of the member say nothing.
    """

    member: str  # its dotted name; empty for the whole notification
    if_missing: str
    if_wrong: str
    check: Check

    def code(self, need: str) -> str:
        """Return the code of findings: `need` is "required", or the name of the check."""
        return f"{self.member or 'notification'}-{need}"


EVERY = (
    #    member            if missing, if wrong, check
    Rule("",               REFUSED, REFUSED, OBJECT),
    Rule("@context",       MUST,    MUST,    NAMESPACED),
    Rule("@context",       FINE,    SHOULD,  CURRENT),
    Rule("@context",       FINE,    SHOULD,  FIRST),
    Rule("id",             REFUSED, REFUSED, ABSOLUTE_URI),
    Rule("id",             FINE,    SHOULD,  RECOMMENDED_ID),
    Rule("type",           REFUSED, REFUSED, PATTERN),
    Rule("type",           FINE,    REFUSED, TYPES),
    Rule("type",           FINE,    SHOULD,  ORDER),
    Rule("origin",         REFUSED, REFUSED, OBJECT),
    Rule("origin.id",      REFUSED, REFUSED, HTTP_URI),
    Rule("origin.type",    MUST,    MUST,    TYPES),
    Rule("origin.type",    FINE,    SHOULD,  SERVICE),
    Rule("origin.inbox",   SHOULD,  MUST,    HTTP_URI),
    Rule("target",         REFUSED, REFUSED, OBJECT),
    Rule("target.id",      REFUSED, REFUSED, HTTP_URI),
    Rule("target.type",    MUST,    MUST,    TYPES),
    Rule("target.type",    FINE,    SHOULD,  SERVICE),
    Rule("target.inbox",   MUST,    MUST,    HTTP_URI),
    Rule("object",         REFUSED, REFUSED, OBJECT),
    Rule("object.id",      REFUSED, REFUSED, ABSOLUTE_URI),
    Rule("actor",          SHOULD,  REFUSED, OBJECT),
    Rule("actor.id",       MUST,    REFUSED, ABSOLUTE_URI),
    Rule("actor.id",       FINE,    SHOULD,  HTTP_URI),
    Rule("actor.type",     FINE,    REFUSED, TYPES),
    Rule("actor.type",     MUST,    REFUSED, ACTOR_TYPE),
    Rule("actor.type",     FINE,    SHOULD,  ONE_TYPE),
    Rule("actor.name",     SHOULD,  SHOULD,  TEXT),
    Rule("inReplyTo",      FINE,    REFUSED, ABSOLUTE_URI),
    Rule("context",        FINE,    REFUSED, OBJECT),
    Rule("context.id",     REFUSED, REFUSED, HTTP_URI),
    Rule("summary",        FINE,    SHOULD,  STRING),
)


def resource(
    member: str, type_: str = FINE, cite_as: str = FINE, item: str = FINE
) -> tuple[Rule, ...]:
    """Return the rules for something in a repository, given the levels of missing members."""
    return (
        Rule(f"{member}.type",                FINE,    MUST,   TYPES),
        Rule(f"{member}.type",                type_,   MUST,   AS2_TYPE),
        Rule(f"{member}.type",                FINE,    SHOULD, ABOUT_PAGE),
        Rule(f"{member}.ietf:cite-as",        cite_as, SHOULD, HTTP_URI),
        Rule(f"{member}.ietf:item",           item,    MUST,   OBJECT),
        Rule(f"{member}.ietf:item.id",        MUST,    MUST,   HTTP_URI),
        Rule(f"{member}.ietf:item.type",      FINE,    MUST,   TYPES),
        Rule(f"{member}.ietf:item.type",      MUST,    MUST,   AS2_TYPE),
        Rule(f"{member}.ietf:item.type",      FINE,    SHOULD, SCHEMA_TYPE),
        Rule(f"{member}.ietf:item.mediaType", MUST,    MUST,   MIME_TYPE),
    )


def announcement(type_: str) -> tuple[Rule, ...]:
    """Return the rules for an Announce, given the level of a missing or wrong object type."""
    return EVERY + (
        Rule("object.type",         FINE,    MUST,    TYPES),
        Rule("object.type",         type_,   type_,   AS2_TYPE),
        Rule("context",             REFUSED, REFUSED, OBJECT),
        *resource("context"),
    )


OBJECT_OF_SCHEMA_ORG = Rule("object.type", FINE, SHOULD, SCHEMA_TYPE)
CITED_OBJECT = Rule("object.ietf:cite-as", SHOULD, SHOULD, HTTP_URI)

# A row that repeats one of EVERY raises its level to an error, which silences the other row.
FAMILIES: Mapping[str, tuple[Rule, ...]] = {
    "request": EVERY + (
        Rule("object.id",           FINE,    MUST,    HTTP_URI),
        *resource("object", type_=MUST, cite_as=SHOULD, item=MUST),
    ),
    "answer": EVERY + (
        Rule("inReplyTo",           REFUSED, REFUSED, ABSOLUTE_URI),
        Rule("inReplyTo",           FINE,    REFUSED, SAME_OFFER),
        Rule("object.@context",     FINE,    SHOULD,  UNEXPECTED),
        Rule("object.type",         REFUSED, REFUSED, TYPES),
        Rule("object.type",         FINE,    MUST,    OFFER),
        Rule("object.type",         FINE,    SHOULD,  COMPLETE),
    ),
    "review": announcement(REFUSED) + (OBJECT_OF_SCHEMA_ORG, CITED_OBJECT),
    "endorsement": announcement(MUST) + (OBJECT_OF_SCHEMA_ORG, CITED_OBJECT),
    "service result": announcement(REFUSED) + (
        OBJECT_OF_SCHEMA_ORG,
        Rule("type",                FINE,    SHOULD,  KNOWN_ACTIONS),
    ),
    "relationship": announcement(REFUSED) + (
        Rule("object.as:subject",      REFUSED, REFUSED, ABSOLUTE_URI),
        Rule("object.as:relationship", REFUSED, REFUSED, ABSOLUTE_URI),
        Rule("object.as:object",       REFUSED, REFUSED, ABSOLUTE_URI),
        Rule("context.id",             FINE,    MUST,    SAME_RESOURCE),
    ),
    "unprocessable": tuple(rule for rule in EVERY if rule.member != "summary") + (
        Rule("inReplyTo",           REFUSED, REFUSED, ABSOLUTE_URI),
        Rule("inReplyTo",           FINE,    SHOULD,  SAME_NOTIFICATION),
        Rule("summary",             REFUSED, MUST,    TEXT),
    ),
}
# fmt: on

RULES = {pattern.name: FAMILIES[pattern.family] for pattern in PATTERNS}

ID_CODES = ("id-required", "id-absolute-uri", "id-preferred")
NAME_CODES = ("actor-required", "actor.name-required", "actor.name-text")


def has_foreign_names(value: Any) -> bool:
    """Return whether a type is no name of ActivityStreams, and has no prefix."""
    return any(":" not in name and name not in AS2_NAMES for name in names_in(value))


class Refusal(NamedTuple):
    """Something that a receiver refuses: findings of ours, or faults that only it reports."""

    what: str
    codes: tuple[str, ...] = ()
    applies: Callable[[Any], bool] = lambda value: True  # to the value of the member
    rules: tuple[Rule, ...] = ()  # for this receiver alone, about values that are there

    @property
    def all_codes(self) -> tuple[str, ...]:
        """The codes of all findings that it is about."""
        return (*self.codes, *(rule.code(rule.check.name) for rule in self.rules))


class Receiver(NamedTuple):
    """A production receiver, and the notifications it is known to refuse besides level E."""

    name: str
    source: str  # where this was read
    refusals: tuple[Refusal, ...]


# fmt: off
EXACT_TYPE = "content-type-exact"  # a code
FOREIGN_MEDIA_TYPE = Refusal("a Content-Type other than application/ld+json", ("content-type",))
REPEATED_ID = Refusal("a repeated id", ("id-repeated",))
PLAIN_TYPES = Check("activitystreams", "name ActivityStreams types, or others with a prefix",
                    lambda value: not has_foreign_names(value))

RECEIVERS = (
    Receiver("DSpace", "https://github.com/DSpace/DSpace", (
        FOREIGN_MEDIA_TYPE,
        Refusal("an id that is neither urn:uuid: in lower case with hyphens nor an HTTP URL",
                ID_CODES,
                lambda value: not is_http_uri(value) and not is_uuid_urn(value)),
    )),
    Receiver("EPrints", "https://github.com/eprintsug/coar_notify", (
        Refusal("a Content-Type that is not exactly application/ld+json",
                ("content-type", EXACT_TYPE)),
    )),
    Receiver("PCI", "https://github.com/pci-dev/pci", (
        FOREIGN_MEDIA_TYPE,
        REPEATED_ID,
        Refusal("types in another order", ("type-order",)),
        Refusal("no actor.name, no object.ietf:cite-as, no origin.inbox",
                (*NAME_CODES, "object.ietf:cite-as-required", "origin.inbox-required")),
    )),
    Receiver("PREreview", "https://github.com/PREreview/coar-notify", (
        Refusal("@context or types in another order", ("@context-order", "type-order")),
        Refusal("no actor.name", NAME_CODES),
        Refusal("origin.type or target.type as a list", rules=(
            Rule("origin.type", FINE, SHOULD, ONE_SERVICE),
            Rule("target.type", FINE, SHOULD, ONE_SERVICE),
        )),
    )),
    Receiver("Software Heritage", "https://docs.softwareheritage.org/user/coarnotify/", (
        Refusal("an id that is not urn:uuid: in lower case", ID_CODES,
                lambda value: not is_loose_uuid_urn(value)),
        REPEATED_ID,
        Refusal("a target.inbox other than where it was posted", ("target.inbox-elsewhere",)),
        Refusal("types without a colon that are no ActivityStreams names",
                ("type-pattern", "type-known-actions"), has_foreign_names,
                (Rule("type", FINE, SHOULD, PLAIN_TYPES),)),
    )),
)
# fmt: on


def refused_by(code: str, *values: Any) -> tuple[str, ...]:
    """Name the receivers that refuse a value for this code, or, without a value, any value."""
    return tuple(
        name
        for name, _, refusals in RECEIVERS
        if any(code in each.all_codes and all(map(each.applies, values)) for each in refusals)
    )


# --- Validation ----------------------------------------------------------------------------------
#
# Applies the rules. `validate` finds everything that breaks them, and advises with the hints of the
# checks or an `EXAMPLE`. `assess` sorts the findings into errors and warnings for a mode of
# validation (`mode_of`), adds findings about the delivery (`Arrival`), and tells 415 from 400.
# `constraints` and `receivers` list the rules for people.
# Must not know: how HTTP is parsed, storage.

MAX_EMBEDDED = 4  # notifications that are embedded in each other; the specification has one

# fmt: off
A_SERVICE = {"id": "https://…", "type": "Service", "inbox": "https://…"}
A_PDF = {"id": "https://…", "type": ["Article", "sorg:ScholarlyArticle"],
          "mediaType": "application/pdf"}
A_PAGE = {"id": "https://…", "type": ["Page", "sorg:AboutPage"],
          "ietf:cite-as": "https://doi.org/…", "ietf:item": A_PDF}
A_RESULT = {"id": "https://…", "type": ["Page", "sorg:WebPage"]}
# Examples for the messages, by member, and for the `object` by family, where a check has no hint.
EXAMPLE = {
    "@context": [ACTIVITY_STREAMS, COAR_NOTIFY],
    "id": "urn:uuid:…",
    "type": list(REQUEST_REVIEW.types),
    "origin": A_SERVICE,
    "target": A_SERVICE,
    "actor": {"id": "https://…", "type": "Person", "name": "…"},
    "context": A_PAGE,
    "inReplyTo": "urn:uuid:…",
    "summary": "…",
}
EXAMPLE_OBJECTS = {
    "request": A_PAGE,
    "answer": {"id": "urn:uuid:…", "type": EXAMPLE["type"]},
    "review": {"id": "https://…", "type": ["Page", "sorg:Review"],
               "ietf:cite-as": "https://doi.org/…"},
    "endorsement": {**A_RESULT, "ietf:cite-as": "https://doi.org/…"},
    "service result": A_RESULT,
    "relationship": {"id": "urn:uuid:…", "type": "Relationship", "as:subject": "https://…",
                     "as:relationship": "http://purl.org/vocab/frbr/core#supplement",
                     "as:object": "https://…"},
    "unprocessable": {"id": "urn:uuid:…"},
}
# fmt: on


def rules_for(pattern: Pattern | None) -> tuple[Rule, ...]:
    """Return the rules for a pattern, or the common rules if there is none."""
    return RULES[pattern.name] if pattern else EVERY


# The name of a member, the rules that demand it, the rules for its value, and the values that are
# known to break none. Most notifications share services, types and namespaces with others.
MemberRules = tuple[str, list[Rule], list[Rule], set[object]]
MAX_KNOWN = 1000  # values of a member


@functools.cache
def tests_for(pattern: Pattern | None, embedded: bool) -> list[tuple[list[str], list[MemberRules]]]:
    """Group the rules once by the object that they look into, and by the member."""
    rules = rules_for(pattern)[1:]  # without the one for the whole notification
    if embedded:  # the specification's own examples break M rules there
        rules = tuple(
            Rule(member, missing.replace(MUST, SHOULD), wrong.replace(MUST, SHOULD), check)
            for member, missing, wrong, check in rules
            if member != "@context"
        )
    objects: list[tuple[list[str], list[MemberRules]]] = []
    groups = itertools.groupby(rules, lambda rule: (rule.member, rule.check.sibling))
    for (member, _), group in groups:
        *path, name = member.split(".")
        if not objects or objects[-1][0] != path:
            objects.append((path, []))
        together = list(group)
        missing = [rule for rule in together if rule.if_missing]
        known: set[object] = {dict} if {rule.check for rule in together} == {OBJECT} else set()
        objects[-1][1].append((name, missing, together, known))
    return objects


def broken_rules(
    part: dict[str, Any], pattern: Pattern | None, embedded: bool
) -> Iterator[tuple[Rule, Any]]:
    """Yield the broken rules, each with the value, or None if the member is missing."""
    for path, members in tests_for(pattern, embedded):
        node: Any = part
        for name in path:
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            continue  # the rule for that object reports it
        for name, missing, rules, known in members:
            value = node.get(name)
            # An empty list of types counts as missing, but coarnotify refuses it in an actor.
            if not value and (
                value is None or (value == [] and name == "type" and path != ["actor"])
            ):
                for rule in missing:
                    yield rule, None
            elif (value if isinstance(value, str) else form_of(value)) not in known:
                yield from broken_by(value, part, rules, known)


def form_of(value: Any) -> object:
    """Return a hashable stand-in: strings, a tuple of strings, or `dict` for any object."""
    if isinstance(value, list):
        return tuple(value) if all(isinstance(each, str) for each in value) else None
    return dict if isinstance(value, dict) else value


def broken_by(
    value: Any, part: dict[str, Any], rules: list[Rule], known: set[object]
) -> Iterator[tuple[Rule, Any]]:
    """Yield the rules that a value breaks; a short text that breaks none is known from then on."""
    sibling = rules[0].check.sibling
    values = [value, lookup(part, sibling)] if sibling else [value]
    broken = [rule for rule in rules if not rule.check.accepts(*values)]
    for rule in broken:
        yield rule, value
    form = form_of(value)
    is_short = isinstance(form, (str, tuple)) and len(repr(form)) <= 200
    if is_short and not broken and not sibling:
        if len(known) >= MAX_KNOWN:
            known.clear()
        known.add(form)


def names_original(part: Any, family: str) -> bool:
    """Whether the `object` of an answer can be what it answers: an Offer, and not itself."""
    is_other = lookup(part, "object.id") != lookup(part, "id")
    return is_other and (family != "answer" or "Offer" in types_of(lookup(part, "object.type")))


def misnamed_hint(rule: Rule, part: Any, pattern: Pattern | None) -> str:
    """Return a hint if a missing member seems to be there under another name."""
    parent, _, name = rule.member.rpartition(".")
    around = lookup(part, parent) if parent else part
    known = {each.member.rpartition(".")[::2] for each in rules_for(pattern)}
    unknown = [each for each in around if (parent, each) not in known]
    if ACTIVITY_STREAMS in contexts_in(names_in(around.get("context"))):
        unknown.append("context")  # else it is known as the member for a resource
    return misnamed(name, unknown)


def example_fix(rule: Rule, value: Any, part: Any, pattern: Pattern | None) -> str:
    """Suggest an example, with the URI that the notification has in another place."""
    rules, name = rules_for(pattern), rule.member.rpartition(".")[2]
    example_object = EXAMPLE_OBJECTS[pattern.family if pattern else "request"]
    example = lookup({**EXAMPLE, "object": example_object}, rule.member)
    if example is None:
        return ""
    twins = {each.check.sibling: each.member for each in rules if each.check.sibling}
    twins.update({member: sibling for sibling, member in twins.items()})
    twin = lookup(part, twins.get(rule.member, ""))
    if is_uri(twin) and rule.check.accepts(twin) and len(twin) <= 200:
        example = twin
    elif isinstance(example, dict) and isinstance(value, str) and len(value) <= 200:
        of_id = [each.check for each in rules if each.member == f"{rule.member}.id"]
        checks = [check for check in of_id if not check.sibling]
        if checks and all(check.accepts(value) for check in checks):
            example = {**example, "id": value}
    written = json.dumps(example, ensure_ascii=False)
    return f"write `{json.dumps(name)}: {written}`" if value is None else f"write `{written}`"


def fix_of(rule: Rule, value: Any, part: Any, pattern: Pattern | None) -> str:
    """Suggest a correction: the value that was probably meant, or else an example."""
    family = pattern.family if pattern else "request"
    if value is None:
        hint = misnamed_hint(rule, part, pattern)
    else:
        other = [lookup(part, rule.check.sibling)] if rule.check.sibling else []
        hint = rule.check.hint(value, *other)
    if rule.member == "inReplyTo" and not names_original(part, family):
        return (not rule.check.sibling and hint) or ASK_ID
    if not hint and family == "answer" and rule.member in ("object", "object.type"):
        return EMBED_OFFER
    return hint or example_fix(rule, value, part, pattern)


def describe(
    level: str, member: str, code: str, fault: str, fix: str, spec: str, value: Any
) -> Finding:
    """Make a finding about a member, given by its dotted name."""
    pointer = "/" + member.replace(".", "/") if member else ""
    message, names = f"{fault}; {fix}" if fix else fault, refused_by(code, value)
    return Finding(level, pointer, code, message, spec, short_value(value), names, fix)


def report(rule: Rule, value: Any, part: Any, pattern: Pattern | None, prefix: str = "") -> Finding:
    """Describe a broken rule."""
    missing, member = value is None, prefix + rule.member
    level, need = (rule.if_missing, "required") if missing else (rule.if_wrong, rule.check.name)
    where = member or "the notification"
    demand = f"{'should' if level == SHOULD else 'must'} {rule.check.demand}"
    fault = f"{where} is missing; it {demand}" if missing else f"{where} {demand}"
    if value == "":
        fault += "; it is empty"
    fix = fix_of(rule, value, part, pattern) if rule.member else rule.check.hint(value)
    if prefix and rule.check is RECOMMENDED_ID:
        fix = "keep it if the Offer has this id"  # its sender has chosen it
    spec = pattern.spec if pattern else SPECIFICATION
    finding = describe(level, member, rule.code(need), fault, fix, spec, value)
    # Receivers look at the notification itself only.
    return finding._replace(refused_by=()) if prefix else finding


def parts(document: Any) -> Iterator[tuple[str, Any, Pattern | None]]:
    """Yield the notification, then the Offer that it embeds if it is an answer, and so on.

    Each is a tuple: the prefix of its members, the document, and its pattern.
    """
    for level in range(MAX_EMBEDDED + 1):
        pattern = pattern_of(document)
        if pattern or level == 0:
            yield "object." * level, document, pattern
        if not pattern or pattern.family != "answer":
            return
        document = document.get("object")


def validate(document: Any) -> list[Finding]:
    """Find everything that is wrong with a notification.

    `document` is what `parse` returns; it is not changed. Returns the findings in the order of the
    rules. Never raises.
    """
    if not isinstance(document, dict):
        return [report(EVERY[0], document, document, None)]
    findings = []
    refused = set()  # members with an error: a second finding would repeat the same fault
    for prefix, part, pattern in parts(document):
        for rule, value in broken_rules(part, pattern, prefix != ""):
            member = prefix + rule.member
            if member not in refused:
                findings.append(report(rule, value, part, pattern, prefix))
                if findings[-1].level == REFUSED:
                    refused.add(member)
    return findings


def by_level(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings, the gravest first."""
    return sorted(findings, key=lambda finding: finding.level)  # E, M, S


MAX_FINDINGS = 100  # in an answer, and in a line of the log


def most_important(
    findings: Sequence[Finding], limit: int = MAX_FINDINGS
) -> tuple[list[Finding], int]:
    """Return the findings, errors first, and how many were left out to stay within the limit."""
    if not findings:
        return [], 0
    ordered = by_level(findings)
    return ordered[:limit], max(0, len(ordered) - limit)


class Arrival(NamedTuple):
    """The circumstances of a delivery, besides the document."""

    content_type: str
    posted_to: Collection[str] = ()  # URLs of the inbox: as requested, and as given out
    known_as: str | None = None  # the name of a stored notification that has the same id


LDN = "https://www.w3.org/TR/ldn/"
JSON_LD = "application/ld+json"
BY_ITSELF = Arrival(JSON_LD)  # for a document that was not delivered, such as a file
# Rules for the delivery, all of level S, by code: the member, and the demand on it.
DELIVERY_RULES = {
    "content-type": ("", f"have the Content-Type {JSON_LD}"),
    EXACT_TYPE: ("", f"have exactly the Content-Type {JSON_LD}"),
    "id-repeated": ("id", "be new"),
    "target.inbox-elsewhere": ("target.inbox", "be the URL that was posted to"),
}


def media_type_of(content_type: str) -> str:
    """Return the media type of a Content-Type, without parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()


def without_query(url: str) -> str:
    """Return an HTTP URI in the form in which two of them can be compared."""
    scheme, _, rest = re.split("[?#]", url, maxsplit=1)[0].partition("://")
    host, _, path = rest.partition("/")
    default_port = ":443" if scheme.lower() == "https" else ":80"
    return f"{scheme.lower()}://{host.lower().removesuffix(default_port)}/{path}"


def delivery_findings(document: Any, arrival: Arrival) -> list[Finding]:
    """Find faults of a delivery that the document does not show."""
    found: dict[str, tuple[Any, str]] = {}  # by code: the value, and the rest of the message
    if arrival.content_type != JSON_LD and media_type_of(arrival.content_type) != JSON_LD:
        content_type = clip(arrival.content_type, 100)
        fix = f"found `{content_type}`; send `Content-Type: {JSON_LD}`"
        found["content-type"] = content_type, fix
    if arrival.known_as:
        found["id-repeated"] = None, f"it was delivered before, as {arrival.known_as}"
    inbox, here = lookup(document, "target.inbox"), list(arrival.posted_to)
    elsewhere = here and inbox not in here and is_http_uri(inbox)
    if elsewhere and without_query(inbox) not in map(without_query, here):
        found["target.inbox-elsewhere"] = inbox, f"write `{here[0]}`"
    if not found:
        return []
    pattern, findings = pattern_of(document), []
    page = pattern.spec if pattern else SPECIFICATION
    for code, (value, fix) in found.items():
        member, demand = DELIVERY_RULES[code]
        fault, spec = f"{member or 'the notification'} should {demand}", page if member else LDN
        findings.append(describe(SHOULD, member, code, fault, fix, spec, value))
    return findings


def receiver_findings(document: Any, receiver: Receiver, content_type: str) -> list[Finding]:
    """Find faults that only this receiver objects to."""
    findings, pattern = [], pattern_of(document)
    inexact = media_type_of(content_type) == JSON_LD != content_type.strip()
    if inexact and receiver.name in refused_by(EXACT_TYPE):
        fault, fix = f"the Content-Type must be exactly {JSON_LD}", "send it without parameters"
        findings.append(describe(SHOULD, "", EXACT_TYPE, fault, fix, receiver.source, content_type))
    for rule in (rule for refusal in receiver.refusals for rule in refusal.rules):
        value = lookup(document, rule.member)
        if value is not None and not rule.check.accepts(value):
            findings.append(report(rule, value, document, pattern))
    return findings


@functools.cache
def coarnotify_server() -> Any:
    """Return a server of the coarnotify library; raises `ImportError` if it is not installed."""
    from coarnotify.server import COARNotifyServer, COARNotifyServiceBinding

    class Binding(COARNotifyServiceBinding):  # type: ignore[misc]
        def notification_received(self, notification: Any) -> None:
            """Accept it."""

    return COARNotifyServer(Binding())


def library_errors(errors: Mapping[Any, Any], pointer: str = "") -> Iterator[tuple[str, str]]:
    """Yield the errors of a `ValidationError` of the library, each with its pointer."""
    for key, entry in errors.items():
        here = f"{pointer}/{key[0] if isinstance(key, tuple) else key}"
        for text in entry.get("errors", []):
            yield here, str(text)
        yield from library_errors(entry.get("nested", {}), here)


def coarnotify_findings(document: Any) -> list[Finding]:
    """Ask the installed coarnotify library, and report its exceptions in its own words."""
    try:
        # It changes the document that it is given.
        coarnotify_server().receive(copy.deepcopy(document))
        return []
    except Exception as error:
        errors = list(library_errors(getattr(error, "errors", {})))
        if not errors:  # it crashes in many ways, such as on types that it does not know
            errors = [("" if pattern_of(document) else "/type", f"{type(error).__name__}: {error}")]
    return [
        Finding(REFUSED, pointer, "coarnotify", f"coarnotify: {clip(text, 300)}", SPECIFICATION)
        for pointer, text in errors
    ]


# Which levels a value of VALIDATE_INCOMING refuses. The other findings are warnings.
MODES: Mapping[bool | str, tuple[str, ...]] = {
    True: (REFUSED,),
    False: (),
    "strict": (REFUSED, MUST),
    "coarnotify": (REFUSED,),
    **{receiver.name: (REFUSED,) for receiver in RECEIVERS},
}


def mode_of(value: Any) -> bool | str | None:
    """Return the mode of validation that a setting means, in its right case; None if none."""
    names = {name.lower(): name for name in MODES if isinstance(name, str)}
    return value if isinstance(value, bool) else names.get(str(value).lower())


class Assessment(NamedTuple):
    """The findings that a notification is refused for, and the others."""

    errors: list[Finding]
    warnings: list[Finding]

    @property
    def status(self) -> int:
        """The status of the answer, if there are errors."""
        media_type = any(error.code.startswith("content-type") for error in self.errors)
        return 415 if media_type else 400


def assess(document: Any, mode: bool | str, arrival: Arrival = BY_ITSELF) -> Assessment:
    """Validate a notification in one of the MODES; without `arrival`, judge the document alone."""
    findings = validate(document)
    for receiver in RECEIVERS:
        if receiver.name == mode:
            findings += receiver_findings(document, receiver, arrival.content_type)
    findings += delivery_findings(document, arrival)
    levels = MODES[mode]
    if not isinstance(document, (dict, list)):
        levels = (REFUSED,)  # it could not be stored
    elif mode == "coarnotify":
        return Assessment(coarnotify_findings(document), findings)
    assessment = Assessment([], [])
    for finding in findings:
        refused = finding.level in levels or mode in finding.refused_by
        (assessment.errors if refused else assessment.warnings).append(finding)
    return assessment


def constraints_of(pattern: Pattern) -> list[dict[str, Any]]:
    """List the rules for a pattern: code, member, demand, level, and who refuses what breaks it."""
    listed: dict[str, dict[str, Any]] = {}

    def add(code: str, member: str, demand: str, level: str) -> None:
        entry = {"code": code, "member": member, "demand": demand, "level": level}
        if level:
            listed.setdefault(code, {**entry, "refused_by": list(refused_by(code))})

    for rule in RULES[pattern.name]:
        add(rule.code("required"), rule.member, "be present", rule.if_missing)
        add(rule.code(rule.check.name), rule.member, rule.check.demand, rule.if_wrong)
    for refusal in (refusal for receiver in RECEIVERS for refusal in receiver.refusals):
        for rule in refusal.rules:
            add(rule.code(rule.check.name), rule.member, rule.check.demand, rule.if_wrong)
    for code, (member, demand) in DELIVERY_RULES.items():
        add(code, member, demand, SHOULD)
    return list(listed.values())


def constraints() -> list[dict[str, Any]]:
    """List the rules, one entry for each code, with the level it has for each pattern."""
    listed: dict[str, dict[str, Any]] = {}
    for pattern in PATTERNS:
        for entry in constraints_of(pattern):
            level, levels = entry.pop("level"), {**entry, "levels": {}}
            listed.setdefault(entry["code"], levels)["levels"][pattern.name] = level
    return list(listed.values())


def receivers() -> list[dict[str, Any]]:
    """List the receivers: their name, the source of the facts, and their refusals."""
    return [
        {"name": each.name, "source": each.source, "refuses": [what for what, *_ in each.refusals]}
        for each in RECEIVERS
    ]


# --- Samples and replies -------------------------------------------------------------------------
#
# Builds valid notifications from one set of parts. `sample` makes a notification of any pattern,
# `reply` answers an Offer, `find_pattern` finds a pattern by its name. All three are pure, except
# that each notification gets a new id.
# Must not know: HTTP, the store, the settings.

Document = dict[str, Any]  # a notification

# RFC 2606 reserves these hosts for examples.
REPOSITORY, REVIEWS = (
    {"id": url, "inbox": f"{url}inbox", "type": "Service"}
    for url in ("https://repository.example.org/", "https://reviews.example.net/")
)
AUTHOR = {"id": "https://orcid.org/0000-0002-1825-0097", "name": "J. Carberry", "type": "Person"}
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
# The results that the service announces: the end of their URL and DOI, and their types.
RESULTS = {
    "Announce Endorsement": ("endorsement/7", ["Page", "sorg:WebPage"]),
    "Announce Review": ("review/7", ["Document", "sorg:Review"]),
    "Announce Service Result": ("report/7", ["Document", "sorg:Report"]),
}
REPLY_PATTERNS = tuple(
    pattern for pattern in PATTERNS if pattern.family not in ("relationship", "request")
)
AUTO_REPLIES = tuple(each.name for each in REPLY_PATTERNS if each.name != "Undo Offer")


class UnknownPatternError(ValueError):
    """No pattern has this name; the text lists the names."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message, with a known name that is really close, or nothing."""
    spelt = {each.lower(): each for each in known}
    near = close_to(name.lower(), spelt, cutoff=0.64)
    return f"; did you mean {spelt[near]}?" if near else ""


def find_pattern(name: str) -> Pattern:
    """Return the pattern that has a name, in any case. Raises `UnknownPatternError`."""
    for pattern in PATTERNS:
        if pattern.name.lower() == name.lower():
            return pattern
    given = escape_controls(clip(name, 80))
    expected = f"one of {', '.join(RULES)}{did_you_mean(name, RULES)}"
    raise UnknownPatternError(f'unknown pattern "{given}", expected {expected}')


def sample(
    pattern: str,
    *,
    origin: Mapping[str, Any] | None = None,
    target: Mapping[str, Any] | None = None,
    in_reply_to: Any = None,
) -> Document:
    """Return a new notification of a pattern, without any finding.

    `origin` and `target` are service objects, with `id`, `inbox` and `type`. Without `target` it
    goes to the default inbox of coarinbox. `in_reply_to` is the Offer that it answers; a made-up
    one by default. Raises `ValueError` for an unknown pattern, and for an Offer that cannot be
    answered with it.
    """
    chosen = find_pattern(pattern)
    if in_reply_to is not None:
        return build_answer(in_reply_to, chosen, origin, target)
    is_offer = chosen.family == "request"
    from_repository = is_offer or chosen.name == "Undo Offer"
    here, there = (REPOSITORY, REVIEWS) if from_repository else (REVIEWS, REPOSITORY)
    ends = origin or here, target or {**there, "inbox": "http://localhost:5005/inbox"}
    offered = ends if from_repository else ends[::-1]
    offer = build(chosen if is_offer else REQUEST_REVIEW, AUTHOR, *offered, object=PREPRINT)
    return offer if is_offer else build_answer(offer, chosen)


def reply(offer: Any, pattern: str = "Accept") -> Document:
    """Return a new notification that answers an Offer, which is not changed.

    Every pattern but the requests and Announce Relationship answers an Offer. The reply goes from
    the Offer's target to its origin; only Undo Offer comes from the sender of the Offer. It has no
    findings but those that the Offer's own faults cause. Raises `ValueError` when the pattern
    answers no Offer, or the document is not an Offer with a usable id.
    """
    chosen = find_pattern(pattern)
    if chosen not in REPLY_PATTERNS:
        listed = ", ".join(pattern.name for pattern in REPLY_PATTERNS)
        raise ValueError(f"{chosen.name} answers no Offer. These do: {listed}")
    return build_answer(offer, chosen)


def build_answer(offer: Any, pattern: Pattern, origin: Any = None, target: Any = None) -> Document:
    """Answer an Offer with any pattern but a request, optionally between other services."""
    if pattern.family == "request":
        raise ValueError(f"{pattern.name} starts a conversation and answers no Offer")
    if "Offer" not in types_of(lookup(offer, "type")):
        raise ValueError("only an Offer can be answered: an object whose type includes Offer")
    if not is_uri(offer.get("id")):
        raise ValueError("the Offer cannot be answered: its id is not an absolute URI")
    is_undo = pattern.name == "Undo Offer"
    ends = ("origin", "target") if is_undo else ("target", "origin")
    sender, receiver = origin or offer.get(ends[0]), target or offer.get(ends[1])
    service = {"id": lookup(sender, "id"), "name": "Example Reviews", "type": "Service"}
    actor = offer.get("actor") if is_undo else service
    members = {"inReplyTo": offer["id"], **answer_members(offer, pattern)}
    return build(pattern, actor, sender, receiver, **members)


def answer_members(offer: Any, pattern: Pattern) -> dict[str, Any]:
    """Return `object`, `context` and `summary` of an answer to an Offer."""
    if pattern.types[0] == "Flag":
        return {"object": {"id": offer["id"]}, "summary": "The preprint answers with status 404."}
    if pattern.types[0] != "Announce":
        return {"object": {name: offer[name] for name in offer if name != "@context"}}
    if pattern.name in RESULTS:
        path, types = RESULTS[pattern.name]
        urls = {"id": REVIEWS["id"] + path, "ietf:cite-as": f"https://doi.org/10.5555/{path}"}
        return {"object": {**urls, "type": types}, "context": offer.get("object")}
    relationship = {
        "id": uuid.uuid4().urn,
        "type": "Relationship",
        "as:subject": f"{REVIEWS['id']}dataset/7",
        "as:relationship": "http://purl.org/vocab/frbr/core#supplement",
        "as:object": lookup(offer, "object.id"),
    }
    return {"object": relationship, "context": offer.get("object")}


def build(pattern: Pattern, actor: Any, origin: Any, target: Any, **members: Any) -> Document:
    """Put a notification together, with a new id; members that are None are left out."""
    document = {
        "@context": [ACTIVITY_STREAMS, COAR_NOTIFY],
        "id": uuid.uuid4().urn,
        "type": pattern.types[0] if len(pattern.types) == 1 else list(pattern.types),
        "actor": actor,
        "origin": origin,
        "target": target,
        **members,
    }
    # The copies share nothing with the parts, the Offer, or each other.
    return {name: copy.deepcopy(value) for name, value in document.items() if value is not None}


# --- Settings ------------------------------------------------------------------------------------
#
# `Settings` is the table of everything that a user may set. `configure` fills it from a file,
# environment variables and flags. An unusable value raises `ConfigurationError`.
# Must not know: HTTP, how a setting is used.


class ConfigurationError(ValueError):
    """A setting or a configuration file is unusable; the text says why, in one line."""


class Kind(NamedTuple):
    """The values that a setting takes, in words and as a predicate."""

    expected: str
    accepts: Callable[[Any], bool]


def is_path(value: Any) -> bool:
    """Return whether a value can name a file or a directory."""
    return isinstance(value, (str, os.PathLike)) and str(value) != "" and "\0" not in str(value)


def is_line(value: Any) -> bool:
    """Return whether a value is a text on one line, without spaces around it."""
    return isinstance(value, str) and value.isprintable() and value != "" and value == value.strip()


def is_inbox_url(value: Any) -> bool:
    """Return whether notifications can be sent to a URL."""
    try:
        return bool(origin_of(value))
    except ValueError:
        return False


def origin_of(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of the URL of an inbox. Raises `ValueError` for another one."""
    if not is_http_uri(url):
        raise ValueError("expected http://HOST/… or https://HOST/…")
    parts = urlsplit(url)
    if "@" in parts.netloc:  # it would end up in the log
        raise ValueError("a user name or a password in a URL is not sent; use a token")
    port = (443 if parts.scheme == "https" else 80) if parts.port is None else parts.port
    return parts.scheme, parts.hostname or "", port


def reply_patterns(value: Any) -> tuple[str, ...] | None:
    """Return names of patterns that answer an Offer, in their right case; None if one does not."""
    known = {name.lower(): name for name in AUTO_REPLIES}
    names = value if isinstance(value, (list, tuple)) else [value]
    found = tuple(known.get(str(name).lower(), "") for name in names)
    return found if all(found) else None


def in_range(low: float, high: float, *types: type) -> Callable[[Any], bool]:
    """Make a predicate for numbers; `isinstance` would take True for one."""
    return lambda value: type(value) in types and low <= value <= high


A_FLAG = Kind("True or False", lambda value: type(value) is bool)
A_MODE = Kind(
    'True, False, "strict", "coarnotify" or a receiver such as "DSpace"',
    lambda value: mode_of(value) is not None,
)
A_STATUS = Kind("201 or 202", in_range(201, 202, int))
A_COUNT = Kind("a whole number from 1 to 2147483647", in_range(1, 2147483647, int))
# `select` on Windows takes 512 sockets; those of clients that were just answered come on top.
MOST_CONNECTIONS = 250 if os.name == "nt" else 2147483647
SOME_CONNECTIONS = Kind(
    f"a whole number from 1 to {MOST_CONNECTIONS}", in_range(1, MOST_CONNECTIONS, int)
)
A_PORT = Kind("a port, 0 to 65535", in_range(0, 65535, int))
# Sockets refuse time-outs that overflow the platform's clock.
A_TIMEOUT = Kind("a number of seconds, 0.001 to 86400", in_range(0.001, 86400, int, float))
A_DELAY = Kind("a number of seconds, 0 to 86400", in_range(0, 86400, int, float))
SOME_PATTERNS = Kind(
    "a list of " + ", ".join(AUTO_REPLIES), lambda value: reply_patterns(value) is not None
)
AN_INBOX = Kind('the URL of an inbox, such as "http://localhost:8080/inbox"', is_inbox_url)
A_HOST = Kind("a host name or an IP address", is_line)
A_BASE_URL = Kind(
    'a URL such as "https://inbox.example.org", without a query',
    lambda value: is_http_uri(value) and value.isascii() and not re.search("[?#@]", value),
)
A_SECRET = Kind("a text without line breaks, or spaces around it", is_line)
A_DIRECTORY = Kind("the name of a directory", is_path)
A_FILE = Kind("the name of a file", is_path)
ANYTHING = Kind("anything", lambda value: True)


def setting(default: Any, kind: Kind) -> Any:
    """Declare a field of `Settings`."""
    return dataclasses.field(default=default, metadata={"kind": kind})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a user may set, see `local.cfg.example`. A setting with default None is optional.

    Raises `ConfigurationError` when a value is unusable.
    """

    STORE_DIR: str = setting("notifications", A_DIRECTORY)  # where notifications are stored
    HOST: str = setting("localhost", A_HOST)  # address to listen on
    PORT: int = setting(5005, A_PORT)  # 0 takes a free one
    RESPONSE_STATUS: int = setting(201, A_STATUS)  # of a notification that was accepted
    VALIDATE_INCOMING: bool | str = setting(True, A_MODE)  # see `MODES`
    REPLIES: tuple[str, ...] = setting((), SOME_PATTERNS)  # to each Offer that was accepted
    REPLY_DELAY: float = setting(1, A_DELAY)  # seconds before each reply
    REPLY_TO: str | None = setting(None, AN_INBOX)  # None: to the origin of the Offer
    DEBUG: bool = setting(False, A_FLAG)  # log headers and bodies
    DEBUG_PYCHARM: bool = setting(False, A_FLAG)  # attach to a debug server
    DEBUG_PYCHARM_SERVER: str = setting("localhost", A_HOST)
    DEBUG_PYCHARM_PORT: int = setting(6000, A_PORT)
    BASE_URL: str | None = setting(None, A_BASE_URL)  # public address behind a proxy or tunnel
    MAX_CONTENT_LENGTH: int = setting(1048576, A_COUNT)  # bytes of a body
    REQUEST_TIMEOUT: float = setting(30, A_TIMEOUT)  # seconds for one whole request
    MAX_CONNECTIONS: int = setting(128, SOME_CONNECTIONS)  # served at once
    FSYNC: bool = setting(True, A_FLAG)  # 2xx means: on the disk
    TOKEN: str | None = setting(None, A_SECRET)  # that every request must carry
    CORS_ORIGINS: object = setting((), ANYTHING)  # a name of Flask-CORS, see `cors_origins`
    SSL_CERT: str | None = setting(None, A_FILE)  # PEM; set it to serve HTTPS
    SSL_KEY: str | None = setting(None, A_FILE)

    def __post_init__(self) -> None:
        for name in SETTINGS:
            check_setting(name, getattr(self, name))
        object.__setattr__(self, "VALIDATE_INCOMING", mode_of(self.VALIDATE_INCOMING))
        object.__setattr__(self, "REPLIES", reply_patterns(self.REPLIES))
        if self.VALIDATE_INCOMING == "coarnotify":
            try:
                coarnotify_server()
            except ImportError as error:
                reason = f"VALIDATE_INCOMING is 'coarnotify', which cannot be imported: {error}"
                raise ConfigurationError(f"{reason}; pip install coarnotify") from error
        if self.SSL_KEY and not self.SSL_CERT:
            raise ConfigurationError("SSL_KEY is set, expected SSL_CERT beside it")


SETTINGS = {field.name: field for field in dataclasses.fields(Settings)}


def check_setting(name: str, value: Any, source: str = "") -> None:
    """Raise `ConfigurationError` for a value that a setting cannot have."""
    field = SETTINGS[name]
    kind, optional = field.metadata["kind"], field.default is None
    if not kind.accepts(value) and not (optional and value is None):
        expected = f"{'None or ' * optional}{kind.expected}"
        raise ConfigurationError(f"{source}{name} is {short_repr(value)}, expected {expected}")


def short_repr(value: Any) -> str:
    """Show a value in a message: on one line, at most 80 characters."""
    try:
        return " ".join(repr(value).split())[:80]
    except ValueError:  # Python does not print numbers of more than 4300 digits
        return "a number of thousands of digits"


def read_configuration(filename: str) -> dict[str, Any]:
    """Execute a configuration file as Flask's `Config.from_pyfile` does.

    Returns every UPPERCASE name it leaves behind. Raises `ConfigurationError` naming the file, and
    the line where there is one, when it cannot be read, is not Python or fails.
    """
    names: dict[str, Any] = {"__name__": "config", "__file__": filename}
    try:
        with open(filename, "rb") as file:  # once: it may be a pipe, which runpy would read twice
            exec(compile(file.read(), filename, "exec", dont_inherit=True), names)
    except BaseException as error:  # a KeyboardInterrupt of the file's own included
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == filename]
        if isinstance(error, SyntaxError) and error.filename == filename:
            lines.append(error.lineno)
        where = f"{filename}, line {lines[-1]}" if lines else filename
        reason = f"{where}: {type(error).__name__}: {getattr(error, 'msg', error)}"
        raise ConfigurationError(" ".join(reason.split())) from error
    return {name: value for name, value in names.items() if str(name).isupper()}


def read_value(text: str) -> Any:
    """Read a value that is JSON, or True, False or None as in Python; anything else is a text."""
    with contextlib.suppress(ValueError):
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    return text


def read_environment(variables: Mapping[str, str]) -> dict[str, Any]:
    """Read the variables `COARNOTIFY_<SETTING>`, much as Flask's `Config.from_prefixed_env` does.

    Settings that are texts stay texts: a TOKEN may be a number.
    """
    values: dict[str, Any] = {}
    for name, field in SETTINGS.items():
        text = variables.get(f"COARNOTIFY_{name}")
        # Kubernetes sets COARNOTIFY_PORT=tcp://… where a service is called coarnotify.
        if text is not None and not text.startswith("tcp://"):
            values[name] = text if field.type in ("str", "str | None") else read_value(text)
    return values


def configure(
    filename: str | None, flags: Mapping[str, Any], variables: Mapping[str, str] = {}
) -> Settings:
    """Combine the defaults, a configuration file, environment variables, and command-line flags.

    Names in the file that are no setting of ours are passed over with a warning: the file may be
    shared with a Flask application. Raises `ConfigurationError`, which says where the value is.
    """
    values = {} if filename is None else read_configuration(filename)
    for name in values.keys() - SETTINGS:
        hint = did_you_mean(name, SETTINGS)
        LOG.warning("%s: ignored: unknown setting %s%s", filename, name, hint)
        del values[name]
    environment = read_environment(variables)
    for source, layer in ((f"{filename}: ", values), ("COARNOTIFY_", environment)):
        for name, value in layer.items():
            check_setting(name, value, source)
    return Settings(**{**values, **environment, **flags})


def cors_origins(value: Any) -> frozenset[str]:
    """Read CORS_ORIGINS: an origin, "*", or a list of them. Warns about anything else."""
    listed = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    origins = {each.lower().rstrip("/") for each in listed if isinstance(each, str)}
    usable = frozenset(each for each in origins if re.fullmatch(r"\*|https?://[^/?#@]+", each))
    if len(usable) < len(listed):
        LOG.warning('CORS_ORIGINS is %s, expected origins like "https://x.org"', short_repr(value))
    return usable


# --- Store ---------------------------------------------------------------------------------------
#
# `Store` keeps notifications in a directory, one file each. The directory is the only truth about
# them: files that people or other processes add or remove count. `Store.add` stores a batch: it
# writes and syncs the files side by side in a `Pool`, links them under their names, and syncs the
# directory once. An `OSError` of one file is returned in its place, one of the directory is raised.
# Must not know: JSON, HTTP, the event loop.

NAME = "[0-9]{8}_[0-9]{6}_[0-9a-f]{32}"
FILE_NAME = re.compile(rf"({NAME})\.json")
DRAFT_NAME = re.compile(rf"\.{NAME}\.part")
DRAFT_LIFETIME = 3600  # seconds after which nobody can still be writing a draft

Outcome = Union[str, OSError]  # the name under which a body was stored, or why it was not


@functools.lru_cache(maxsize=8)  # most notifications of a second need the same
def utc(second: int, form: str) -> str:
    """Format a time in UTC, given in seconds since 1970."""
    return time.strftime(form, time.gmtime(second))


def new_name() -> str:
    """Make a name for a delivery: the time in UTC, and 128 random bits."""
    return utc(int(time.time()), "%Y%m%d_%H%M%S_") + os.urandom(16).hex()


# Follow no symlink, which could lead anywhere, and do not wait at a FIFO.
O_SAFE = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def open_file(path: str, flags: int) -> int:
    """Open a file, with the flags of `os.open`; a symlink is refused, a FIFO not waited for."""
    return os.open(path, flags | O_SAFE, 0o666)


def create_file(path: str, flags: int) -> int:
    """Open a file for writing, and create its directory if somebody has removed it."""
    flags |= os.O_CREAT
    try:
        return open_file(path, flags)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open_file(path, flags)


def sync_file(file: int) -> None:
    """Flush a file to the disk; on macOS, `os.fsync` would stop at the cache of the drive."""
    try:
        import fcntl

        fcntl.fcntl(file, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined,unused-ignore]
    except (ImportError, AttributeError, OSError):  # another system, or disk
        os.fsync(file)


def write_all(file: int, data: bytes) -> None:
    """Write to a file. Raises `OSError` if the disk took only a part."""
    if os.write(file, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Pool:
    """Daemon threads, started on demand: they never keep the program from ending."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.threads: list[threading.Thread] = []
        self.tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.idle = threading.Semaphore(0)

    def submit(self, task: Callable[[], None]) -> None:
        """Run a task, which must not raise. Raises `RuntimeError` if there can be no thread."""
        if not self.idle.acquire(blocking=False) and len(self.threads) < self.size:
            thread = threading.Thread(target=self.work, daemon=True)
            try:
                thread.start()
                self.threads.append(thread)
            except RuntimeError:
                if not self.threads:
                    raise
        self.tasks.put(task)

    def work(self) -> None:
        """Run tasks until None comes."""
        while task := self.tasks.get():
            task()
            del task  # it would keep what it refers to, such as open files, until the next one
            self.idle.release()

    def close(self) -> None:
        """End the threads, each after the task that it is busy with."""
        for _ in self.threads:
            self.tasks.put(None)
        for thread in self.threads:
            thread.join(0.01)  # an idle one needs no longer


class Store:
    """Notifications in a directory, which is created if it is missing."""

    def __init__(self, directory: str, fsync: bool) -> None:
        """Use `directory`; `fsync` makes `add` wait for the disk. Raises `OSError`."""
        self.directory, self.fsync = os.path.abspath(directory), fsync
        self.syncers = Pool(8)  # more do not make the disk faster
        os.makedirs(self.directory, exist_ok=True)
        with contextlib.suppress(OSError):  # it may belong to somebody else
            self.sync_directory(os.path.dirname(self.directory))
        if not os.access(self.directory, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.directory)
        self.sweep()

    def sweep(self) -> None:
        """Remove the drafts that a killed process has left behind."""
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if not DRAFT_NAME.fullmatch(entry.name):  # a `stat` of every file takes seconds
                    continue
                with contextlib.suppress(OSError):
                    age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                    if age > DRAFT_LIFETIME:
                        os.unlink(entry.path)

    def path(self, name: str) -> str:
        """Return the path of a notification."""
        return f"{self.directory}{os.sep}{name}.json"

    def draft(self, name: str) -> str:
        """Return the path of a notification while it is being written."""
        return f"{self.directory}{os.sep}.{name}.part"

    def names(self) -> list[str]:
        """List the names of the notifications in the order in which they arrived."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            files = (entry.name for entry in entries if entry.is_file(follow_symlinks=False))
            return sorted(match[1] for match in map(FILE_NAME.fullmatch, files) if match)
        return []

    def add(self, bodies: Sequence[bytes]) -> list[Outcome]:
        """Store a batch; returns the name of each body, or why that one could not be stored.

        A notification appears whole or not at all, and never in place of another one.
        """
        names = [new_name() for _ in bodies]
        outcomes: dict[str, Outcome] = {}
        self.write_drafts(list(zip(names, bodies)), outcomes)
        for name in names:
            self.publish(name, outcomes)
        try:
            self.sync_directory(self.directory)
        except OSError as error:
            for name in names:  # nobody will be told that they are there
                outcomes[name] = error
                with contextlib.suppress(OSError):
                    os.unlink(self.path(name))
        return [outcomes[name] for name in names]

    def write_drafts(self, batch: list[tuple[str, bytes]], outcomes: dict[str, Outcome]) -> None:
        """Write and sync the drafts of a batch, several at once: the disk syncs them together."""
        shares = min(len(batch), self.syncers.size) if self.fsync else 1
        done: queue.SimpleQueue[None] = queue.SimpleQueue()

        def write_share(number: int) -> None:
            for name, body in batch[number::shares]:
                outcomes[name] = self.write_draft(name, body)
            done.put(None)

        for number in range(1, shares):
            try:
                self.syncers.submit(functools.partial(write_share, number))
            except RuntimeError:  # no thread can be started: this one does it all
                write_share(number)
        write_share(0)
        for _ in range(shares):
            done.get()

    def write_draft(self, name: str, body: bytes) -> Outcome:
        """Write a body under its temporary name."""
        try:
            file = create_file(self.draft(name), os.O_WRONLY | os.O_EXCL)
            try:
                write_all(file, body)
                if self.fsync:
                    sync_file(file)
            finally:
                os.close(file)
        except OSError as error:
            return error
        return name

    def publish(self, name: str, outcomes: dict[str, Outcome]) -> None:
        """Link a draft under its name, if it was written, and remove the draft."""
        draft, path = self.draft(name), self.path(name)
        try:
            if outcomes[name] is name:
                try:
                    os.link(draft, path)
                except FileExistsError:
                    raise
                except (AttributeError, OSError):
                    os.rename(draft, path)  # no links here; names do not repeat, so this is as safe
        except OSError as error:
            outcomes[name] = error
        with contextlib.suppress(OSError):
            os.unlink(draft)

    def sync_directory(self, path: str) -> None:
        """Flush the names of new files to the disk; only POSIX systems can."""
        if self.fsync and os.name == "posix":
            directory = os.open(path, os.O_RDONLY)
            try:
                sync_file(directory)
            finally:
                os.close(directory)

    def read(self, name: str) -> bytes:
        """Read a notification. Raises `KeyError` if there is none of this name."""
        with self.regular_file(name) as path, open(path, "rb", opener=open_file) as file:
            return file.read()

    def remove(self, name: str) -> None:
        """Remove a notification. Raises `KeyError` if there is none of this name."""
        with self.regular_file(name) as path:
            os.unlink(path)

    @contextlib.contextmanager
    def regular_file(self, name: str) -> Iterator[str]:
        """Refuse FIFOs, which would block, and symlinks, which could point anywhere."""
        try:
            if not stat.S_ISREG(os.lstat(self.path(name)).st_mode):
                raise KeyError(name)
            yield self.path(name)
        except FileNotFoundError:
            raise KeyError(name) from None

    def clear(self) -> None:
        """Remove every notification."""
        for name in self.names():
            with contextlib.suppress(KeyError):
                self.remove(name)


# --- Deliveries ----------------------------------------------------------------------------------
#
# A `Delivery` is one attempt to deliver a notification, in either direction, and its outcome. A
# `Query` selects deliveries, and tells which parts of the log can hold none of them. `Totals` count
# them.
# Must not know: HTTP, files, the event loop.

# The members that tell the subject of a notification, its sender, and its place in a conversation.
ABOUT = {
    "": ("id", "inReplyTo", "origin"), "origin": ("id", "inbox"), "target": ("id",),
    "actor": ("name", "id"), "context": ("id",), "object": ("id",), "object.object": ("id",),
}  # fmt: skip
ABOUT_PATHS = [
    (path.split(".") if path else [], [(name, f"{path}.{name}".lstrip(".")) for name in names])
    for path, names in ABOUT.items()
]
ABOUT_LENGTH = 1000  # characters kept of each
MAX_LOGGED_HEADERS = 16384  # characters of a request's headers in a line of the log


def utc_now() -> str:
    """Return the present time, ISO 8601 in UTC, with milliseconds."""
    now = time.time()
    return f"{utc(int(now), '%Y-%m-%dT%H:%M:%S')}.{int(now % 1 * 1000):03}Z"


def summary(document: Any) -> dict[str, str]:
    """Collect the members in `ABOUT`, by their dotted names, as far as they are strings."""
    found = {}
    for path, members in ABOUT_PATHS:
        node = document
        for step in path:
            node = node.get(step) if isinstance(node, dict) else None
        for name, member in members if isinstance(node, dict) else ():
            value = node.get(name)
            if isinstance(value, str):
                found[member] = value[:ABOUT_LENGTH]
    return found


# For searches in raw lines: the statuses of each `Delivery.verdict`; that of an adopted one is 0.
VERDICTS = {
    "dropped": "0",
    "stored": "0|[12]..",
    "queued": "202",
    "redirected": "3..",
    "refused": "4..",
    "failed": "[5-9]..",
}


class Delivery(NamedTuple):
    """An attempt to deliver a notification, and its outcome."""

    name: str = ""  # also the name of the stored notification; the first field, see `line_start`
    time: str = ""  # of the answer: ISO 8601, UTC
    direction: str = "in"  # "out" if this inbox was the sender
    client: str = ""  # the IP address of the sender; empty if this inbox was the sender
    method: str = "POST"
    target: str = ""  # of the request: path and query; the whole URL if this inbox was the sender
    headers: Mapping[str, str] = {}  # of the request, without secrets
    status: int = 0  # of the answer; 0 if there was none
    answer_headers: Mapping[str, str] = {}
    detail: str = ""  # of the problem; empty if there was none
    pattern: str | None = None
    about: Mapping[str, str] = {}  # see `summary`
    findings: Sequence[Finding] = ()
    errors: int = 0  # the number of findings that it was refused for; they come first
    omitted: int = 0  # the number of findings left out, beyond MAX_FINDINGS
    body: bytes | None = None  # as far as it arrived; None in the log if it was stored
    answer_body: bytes | None = None  # only if this inbox was the sender
    simulated: bool = False  # whether a failure, or a delay, was asked for
    seconds: float = 0.0  # from the end of the request to the answer
    via: str = ""  # its origin, if that was no request: "adopted", "REPLIES", "page" or "test"

    @property
    def verdict(self) -> str:
        """One word for the status, one of `VERDICTS`."""
        if not self.status:
            return "stored" if self.via == "adopted" else "dropped"
        if self.status >= 400:
            return "refused" if self.status < 500 else "failed"
        if self.status >= 300:
            return "redirected"
        return "queued" if self.status == 202 else "stored"

    @property
    def is_stored(self) -> bool:
        """Whether the inbox that got it has stored it."""
        return self.verdict in ("stored", "queued")

    def __repr__(self) -> str:
        """Describe the delivery in one line, for the output of tests."""
        status = f"{self.status} " if self.status else ""
        id_ = self.about.get("id", "without an id")
        text = clip(f"{status}{self.verdict} {self.summary} {id_}", 500)
        return escape_controls(f"<Delivery {text}>")

    @property
    def summary(self) -> str:
        """What came from whom, or went where: `Request Review from https://…`."""
        asked = self.method, self.target.partition("?")[0].rstrip("/")
        is_elsewhere = self.direction == "in" and asked != ("POST", "/inbox")
        what = f"{self.method} {self.target}" if is_elsewhere else self.pattern or "no pattern"
        way = "to" if self.direction == "out" else "from"
        return f"{what} {way} {self.peer or self.client}"

    @property
    def peer(self) -> str:
        """The service at the other end: where it was sent to, or the origin that it names."""
        if self.direction == "out":
            return self.target
        return self.about.get("origin.id") or self.about.get("origin") or ""

    @property
    def notification(self) -> Any:
        """The document that was sent; None if it is not JSON, or not at hand."""
        try:
            return None if self.body is None else parse(self.body)
        except ValueError:
            return None

    def has_status(self, wanted: str) -> bool:
        """Match the status against a pattern such as `400` or `4xx`; an empty one matches any."""
        return re.fullmatch(wanted.replace("x", ".") or ".*", str(self.status)) is not None

    def searchable(self) -> Iterator[str]:
        """Yield the texts that a search looks into."""
        yield from (self.name, str(self.status), self.verdict, self.detail)
        yield from filter(None, [self.pattern, *self.about.values()])
        for finding in self.findings:
            yield from (finding.code, finding.message)

    def as_json(self) -> dict[str, Any]:
        """Write the delivery for the log and for programs; a body that is not a text as base64."""
        entry = {**self._asdict(), "findings": [finding.as_json() for finding in self.findings]}
        for member in ("body", "answer_body"):
            data = entry.pop(member)
            if data is not None:
                entry.update(body_as_json(member, data))
        return entry

    @classmethod
    def from_json(cls, line: bytes) -> Delivery | None:
        """Read what `as_json` wrote; None for a line that was torn, or edited beyond use."""
        try:
            entry = LINE_DECODER.decode(line.decode())
            for member in ("body", "answer_body"):
                if member in entry:
                    entry[member] = entry[member].encode("utf-8", "replace")
                elif f"{member}_base64" in entry:
                    entry[member] = base64.b64decode(entry[f"{member}_base64"], validate=True)
            entry["findings"] = [Finding.from_json(each) for each in entry.get("findings", ())]
            known = {name: entry[name] for name in cls._fields if name in entry}
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            return None
        typed = all(map(isinstance, known.values(), map(MEMBER_TYPES.__getitem__, known)))
        about, pattern = known.get("about", {}), known.get("pattern") or ""
        if not typed or not all(isinstance(text, str) for text in (pattern, *about.values())):
            return None
        known["pattern"] = pattern if pattern in RULES else None
        return cls(**known) if LINE_NAME.fullmatch(known.get("name", "")) else None

    @classmethod
    def from_stored_file(cls, name: str, body: bytes) -> Delivery:
        """Describe a notification that was put into the store without being delivered here."""
        try:
            document = parse(body)
        except ValueError as error:
            return cls(name, via="adopted", detail=f"it is not JSON: {error}")
        pattern = pattern_of(document)
        return cls(
            name,
            via="adopted",
            pattern=pattern and pattern.name,
            about=summary(document),
            findings=by_level(validate(document)),
        )


LINE_DECODER = json.JSONDecoder(parse_constant=parse_constant)
LINE_NAME = re.compile(NAME)
# The defaults show of which type each member is.
MEMBER_TYPES = {
    name: object if default is None else type(default)
    for name, default in {**Delivery._field_defaults, "findings": []}.items()
}


class LogLine(NamedTuple):
    """A line about a delivery: `400 Request Review from https://… 5 errors http://…`."""

    delivery: Delivery
    url: str  # of the page about it

    def __str__(self) -> str:
        delivery = self.delivery
        warnings = len(delivery.findings) - delivery.errors + delivery.omitted
        counts = f" {counted(delivery.errors, 'error')}" if delivery.errors else ""
        if warnings:
            counts += f"{',' * bool(counts)} {counted(warnings, 'warning')}"
        text = f"{delivery.status or delivery.verdict} {clip(delivery.summary, 300)}"
        return escape_controls(f"{text}{counts} {self.url}")


def log_delivery(delivery: Delivery, url: str) -> None:
    """Log the outcome of a delivery and the reasons, because many clients hide the answer."""
    # `info` would look for its caller, which takes longer than writing the line.
    LOG.handle(
        logging.LogRecord(LOG.name, logging.INFO, __file__, 0, LogLine(delivery, url), (), None)
    )
    reasons = [f"{finding.level} {finding}" for finding in delivery.findings]
    if delivery.detail and not delivery.errors:
        reasons.insert(0, clip(delivery.detail, 300))
    if delivery.omitted:
        reasons.append(f"and {delivery.omitted:,} more")
    for reason in reasons:
        LOG.info("  %s", escape_controls(reason))


def body_as_json(member: str, data: bytes) -> dict[str, str]:
    """Write bytes as a text, or as base64 if they are not one or JSON would swell them more."""
    try:
        text = data.decode("utf-8")
        if len(json.dumps(text)) <= len(data) * 4 // 3 + 4:
            return {member: text}
    except UnicodeDecodeError:
        pass
    return {f"{member}_base64": base64.b64encode(data).decode()}


# What the parameters of a URL must be, as a regular expression and in words.
Parameters = Mapping[str, tuple[str, str]]

# A form sends empty ones.
QUERY_PARAMETERS: Parameters = {
    "limit": ("|[1-9][0-9]{0,2}|1000", "a number from 1 to 1000"),
    "status": ("|0|[1-5]([0-9]{2}|xx)", "a status such as 400, or 4xx, or 0 for no answer"),
    "pattern": ("|".join(["", *RULES]), "one of " + ", ".join(RULES)),
    "origin": ("(?s:.*)", "a text"),
    "direction": ("|in|out", "in or out"),
    "warnings": ("|1", "1"),
    "since": (
        f"|{NAME}" r"|[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?Z)?",
        "the name of a delivery, or a time in UTC such as 2026-01-31T12:00:00Z",
    ),
    "before": (f"|{NAME}", "the name of a delivery"),
    "day": ("|[0-9]{4}-[0-9]{2}-[0-9]{2}", "a day in UTC such as 2026-01-31"),
    "q": ("(?s:.*)", "a text"),
}


def parse_query(text: str, parameters: Parameters) -> dict[str, str]:
    """Read the query of a URL. Raises `ValueError`, saying which parameters work."""
    if not text:
        return {}
    values = dict(parse_qsl(text, keep_blank_values=True, errors="strict"))
    check_parameters(values, parameters)
    return values


def check_parameters(values: Mapping[str, str], parameters: Parameters) -> None:
    """Raise `ValueError` for a parameter that is unknown, or has an unusable value."""
    for name, value in values.items():
        if name not in parameters:
            known = f"known are {', '.join(parameters)}" if parameters else "there are none here"
            raise ValueError(f"unknown parameter {short_repr(name)}; {known}")
        expression, expected = parameters[name]
        if not re.fullmatch(expression, value):
            raise ValueError(f"{name} is {short_repr(value)}, expected {expected}")


def json_bytes(text: str) -> bytes:
    """Write a text the way a line of the log holds it, without its quotes."""
    return json.dumps(text)[1:-1].encode()


def line_start(name: str) -> bytes:
    """Return the beginning of the line of a delivery."""
    return b'{"name": "%b"' % json_bytes(name)


class Query(NamedTuple):
    """A selection of deliveries; its members are the parameters of a URL."""

    limit: str = ""  # the largest number of deliveries, the newest ones
    status: str = ""  # of the answer, such as 400 or 4xx
    pattern: str = ""
    since: str = ""  # after the delivery of this name, or from this time on
    before: str = ""  # before the delivery of this name
    q: str = ""  # holding this text
    origin: str = ""  # of or to a service whose URL holds this text
    direction: str = ""  # in or out
    warnings: str = ""  # 1: with findings
    day: str = ""  # in UTC

    @property
    def page_length(self) -> int:
        """The number of deliveries on a page."""
        return int(self.limit or 50)

    def may_match(self, line: bytes) -> bool:
        """Test one raw line, or many, cheaply: parsing every line would be slow."""
        if not line.isascii():  # somebody has edited it
            return True
        expressions, texts, verdict = needles(self)
        if not all(expression.search(line) for expression in expressions):
            return False
        if verdict and verdict.search(line):
            return True
        lower = line.lower() if texts else b""
        return all(text in lower for text in texts) or LOOKALIKES.search(lower) is not None

    def may_concern(self, block: bytes, *names: str) -> bool:
        """Test many raw lines at once: for a match, or for the delivery of one of these names."""
        return self.may_match(block) or any(line_start(name) in block for name in names if name)

    def matches(self, delivery: Delivery) -> bool:
        """Whether a delivery is selected, `limit`, `since` and `before` aside."""
        text = self.q.casefold()
        return (
            self.direction in ("", delivery.direction)
            and delivery.time.startswith(self.day)
            and self.pattern in ("", delivery.pattern)
            and bool(self.warnings) <= bool(delivery.findings)
            and (not self.status or delivery.has_status(self.status))
            and (not self.origin or self.origin.casefold() in delivery.peer.casefold())
            and (not text or any(text in each.casefold() for each in delivery.searchable()))
        )

    def find_in(self, line: bytes) -> Delivery | None:
        """Return the delivery in a line of the log, if it matches."""
        delivery = Delivery.from_json(line) if self.may_match(line) else None
        return delivery if delivery and self.matches(delivery) else None

    def ends_at(self, delivery: Delivery) -> bool:
        """Whether this delivery, and hence every older one, is outside the range of `since`."""
        # Times contain "-", names do not. Dropping the "Z" makes 12:00 sort before 12:00:00.5Z.
        start = self.since.rstrip("Z") if "-" in self.since else ""
        return delivery.name == self.since or delivery.time < start


# Escaped characters that are equal to ASCII letters where case is ignored, such as the Kelvin sign,
# and ASCII characters that somebody has escaped.
LOOKALIKES = re.compile(rb"\\u(00[2-7]|00df|0130|0149|017f|01f0|1e9[6-9abe]|212a|fb0)")


class Needles(NamedTuple):
    """The marks of lines that a query may select, which are found without parsing the lines."""

    expressions: list[re.Pattern[bytes]]  # a line matches all of them
    texts: list[bytes]  # in lower case; a line contains all of them, or LOOKALIKES
    verdict: re.Pattern[bytes] | None  # or it has a status whose verdict contains `q`


@functools.lru_cache(maxsize=64)
def needles(query: Query) -> Needles:
    """Return the marks of lines that a query may select."""
    parts = {
        '"pattern": "%s"': query.pattern,
        '"direction": "%s"': query.direction if query.direction == "out" else "",
        '"status": %s,': query.status.replace("x", "[0-9]"),
        r'"findings": \[\{': query.warnings,
        '"time": "%sT': query.day,
    }
    expressions = [part.replace("%s", value) for part, value in parts.items() if value]
    texts: list[bytes] = []
    for text in filter(None, (query.origin.casefold(), query.q.casefold())):
        in_ascii = re.findall("[\0-\x7f]+", text)  # JSON escapes the other characters
        texts += map(json_bytes, in_ascii)
        expressions += [] if in_ascii else [spellings(text[0])]
    text = query.q.casefold()
    statuses = "|".join(VERDICTS[verdict] for verdict in VERDICTS if text and text in verdict)
    verdict = re.compile(f'"status": ({statuses}),'.encode()) if statuses else None
    return Needles([re.compile(each.encode()) for each in expressions], texts, verdict)


def spellings(character: str) -> str:
    """Return an expression for a character in either case, escaped as in JSON."""
    cased = map(chr, range(0x80, 0x1E944))  # Adlam, the last alphabet that has two cases
    same = {character, *(each for each in cased if character in each.casefold())}
    digits = (re.escape(json_bytes(each)[2:].decode()) for each in same)
    return rf"\\u(?i:{'|'.join(digits)})"


# The kinds of deliveries that the page counts, each as the query that selects it.
TOTALS = {
    "all": Query(),
    "stored": Query(status="2xx", direction="in"),
    "with_warnings": Query(status="2xx", direction="in", warnings="1"),
    "refused": Query(status="4xx", direction="in"),
    "failed": Query(status="5xx", direction="in"),
    "sent": Query(direction="out"),
}
# The parts of a line that are needed to count it, and to know the id of a stored notification.
LINE = re.compile(
    rb'\{"name": "([^"]*)", "time": "[^"]*", (?:"direction": "([a-z]+)", )?'
    rb'.*?"status": ([0-9]+), .*?"about": \{(?:"id": ("(?:[^"\\]|\\.)*"))?.*?"findings": \[(\{)?'
)


class Totals(NamedTuple):
    """How many deliveries each query in `TOTALS` selects."""

    all: int = 0
    stored: int = 0
    with_warnings: int = 0
    refused: int = 0
    failed: int = 0
    sent: int = 0

    @classmethod
    def of(cls, tally: Mapping[tuple[str, int, bool], int]) -> Totals:
        """Add up deliveries counted by direction, status, and whether they have findings."""
        counts = dict.fromkeys(TOTALS, 0)
        for (direction, status, has_findings), count in tally.items():
            findings = [Finding("", "", "", "", "")] * has_findings
            delivery = Delivery(direction=direction, status=status, findings=findings)
            for name, query in TOTALS.items():
                counts[name] += count * query.matches(delivery)
        return cls(**counts)


# --- Delivery log --------------------------------------------------------------------------------
#
# `DeliveryLog` keeps all deliveries in a file, one JSON object a line, the newest at the end. The
# file may be edited, cut or replaced at any time: a line that cannot be read is passed over.
# Reading backwards yields None now and then, so that long reads can take turns or be abandoned.
# Must not know: HTTP, the event loop.

CONVERSATION = 50  # deliveries shown of one conversation, the newest
BLOCK = 262144  # bytes of the log that are read at once
MAX_LINE = 8388608  # bytes of a line of the log; a longer one is not looked at
RECHECK = 1.0  # seconds after which those who follow the log look for changes by other processes


class Place(NamedTuple):
    """A position in the log: the beginning of the file, and the offset to read from next."""

    beginning: bytes = b""  # with the name of a delivery; the next file may have the same inode
    offset: int = 0


START = Place()
BEGINNING = 64  # bytes of the log that tell it from another one


class DeliveryLog:
    """All deliveries, in a file. Methods raise `OSError` if it cannot be read or written."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.changed = threading.Condition()  # for `follow`, which waits in other threads
        self.size = 0  # of the log after our last line

    def open(self) -> IO[bytes]:
        """Open the log for reading. Raises `FileNotFoundError` before the first delivery."""
        return open(self.path, "rb", opener=open_file)

    def append(self, delivery: Delivery) -> Delivery:
        """Write a delivery, with the present time, at the end of the log; returns it so."""
        delivery = delivery._replace(time=utc_now())
        line = to_json(delivery.as_json()).encode() + b"\n"
        with self.changed:
            file = create_file(self.path, os.O_RDWR | os.O_APPEND)
            try:
                size = os.fstat(file).st_size
                if size != self.size and size:  # another process, or a torn line, was the last
                    os.lseek(file, -1, os.SEEK_END)
                    if os.read(file, 1) != b"\n":
                        line = b"\n" + line  # leave it alone, it is passed over
                write_all(file, line)
                self.size = size + len(line)
            finally:
                os.close(file)
            self.changed.notify_all()
        return delivery

    def clear(self) -> None:
        """Forget all deliveries."""
        with self.changed, contextlib.suppress(FileNotFoundError):
            try:
                os.unlink(self.path)
            except PermissionError:  # Windows does not remove what somebody reads
                os.truncate(self.path, 0)

    def end(self) -> Place:
        """Return the place after the last delivery so far."""
        with contextlib.suppress(FileNotFoundError), self.open() as file:
            return Place(file.read(BEGINNING), file.seek(0, os.SEEK_END))
        return START

    def read(self, place: Place) -> tuple[list[bytes], Place]:
        """Return some whole lines from a place on, and the place after them.

        Begins anew at the start of the file if it has been replaced or cut since.
        """
        with contextlib.suppress(FileNotFoundError), self.open() as file:
            beginning, size = file.read(BEGINNING), file.seek(0, os.SEEK_END)
            same = place.beginning == beginning and place.offset <= size
            offset = file.seek(place.offset if same else 0)
            data = file.read(BLOCK)
            if b"\n" not in data and len(data) == BLOCK:
                data += file.readline(MAX_LINE)
            if offset == 0:  # it may have been empty a moment ago
                beginning = data[:BEGINNING]
            end = data.rfind(b"\n") + 1
            return data[:end].split(b"\n")[:-1], Place(beginning, offset + end)
        return [], START

    def follow(self, deadline: float) -> Iterator[Delivery]:
        """Yield all deliveries, and further ones until a deadline (`time.monotonic`).

        Deliveries that were already logged count even if reading them takes longer.
        """
        place, enough = START, self.end()
        while True:
            lines, place = self.read(place)
            yield from filter(None, map(Delivery.from_json, lines))
            seconds = deadline - time.monotonic()
            if seconds <= 0 and (not lines or place.offset >= enough.offset):
                return
            with self.changed:
                if not lines and self.end() == place:
                    self.changed.wait(min(seconds, RECHECK))

    def lines(self, worth: Callable[[bytes], bool] = lambda block: True) -> Iterator[bytes | None]:
        """Yield the lines of the log, the newest first, and None after each block that is read.

        Blocks that are not `worth` reading are skipped: splitting all of them takes long.
        """
        with contextlib.suppress(FileNotFoundError), self.open() as file:
            start = file.seek(0, os.SEEK_END)
            rest = b""  # the end of a line whose beginning is still to be read
            while start:
                size = min(start, max(BLOCK, len(rest)))  # double for a long line: join it rarely
                start = file.seek(start - size)
                rest, end, block = (file.read(size) + rest).partition(b"\n")
                rest = rest if len(rest) <= MAX_LINE else b""
                if end and worth(block):
                    yield from reversed(block.split(b"\n"))
                yield None
            yield rest

    def newest_first(self, *texts: bytes) -> Iterator[Delivery | None]:
        """Read the log from its end; where texts are given, only lines that hold one of them."""

        def is_wanted(lines: bytes) -> bool:
            return not texts or any(text in lines for text in texts)

        for line in self.lines(is_wanted):
            if line is None:
                yield None
            elif is_wanted(line):
                yield Delivery.from_json(line)

    def find(self, name: str) -> Iterator[Delivery | None]:
        """Yield the delivery of this name, if there is one."""
        for delivery in self.newest_first(line_start(name)):
            yield delivery
            if delivery:
                return

    def select(self, query: Query, limit: int | None = None) -> Iterator[Delivery | None]:
        """Yield the deliveries that a query selects, the newest first, at most `limit`."""
        return (found and found[0] for found in self.select_lines(query, limit))

    def select_lines(
        self, query: Query, limit: int | None = None
    ) -> Iterator[tuple[Delivery, bytes] | None]:
        """Do as `select`, and yield each delivery with its line in the log."""
        found, skipping = 0, bool(query.before)
        for line in self.lines(lambda block: query.may_concern(block, query.since, query.before)):
            if line is None:
                yield None
            elif query.since and line.startswith(line_start(query.since)):
                return
            elif skipping:
                skipping = not line.startswith(line_start(query.before))
            elif delivery := query.find_in(line):
                if query.ends_at(delivery):
                    return
                found += 1
                yield delivery, line
            if found == limit:
                return

    def conversation(self, about: Mapping[str, str]) -> Iterator[Delivery | None]:
        """Yield a notification, the one that it answers, and its answers, the newest first.

        Yields at most CONVERSATION of them, and the one that it answers.
        """
        asked = about.get("inReplyTo")
        ids = set(filter(None, (about.get("id"), asked)))
        texts = [b'"id": "%b"' % json_bytes(id_) for id_ in ids]
        texts += [b'"inReplyTo": "%b"' % json_bytes(id_) for id_ in ids]
        shown, is_missing = 0, asked is not None
        for delivery in self.newest_first(*texts) if ids else ():
            if delivery is None:
                yield None
                continue
            id_, in_reply_to = delivery.about.get("id"), delivery.about.get("inReplyTo")
            wanted = shown < CONVERSATION and not ids.isdisjoint((id_, in_reply_to))
            if wanted or (is_missing and id_ == asked):
                shown, is_missing = shown + 1, is_missing and id_ != asked
                yield delivery
            if shown >= CONVERSATION and not is_missing:
                return

    def beside(self, name: str, query: Query) -> Iterator[tuple[str, str] | None]:
        """Yield the names of the next newer and the next older delivery that a query selects."""
        likely: collections.deque[bytes] = collections.deque(maxlen=1000)  # parse few of them
        newer, passed = "", False
        for line in self.lines(lambda block: query.may_concern(block, name)):
            if line is None:
                yield None
            elif line.startswith(line_start(name)):
                passed = True
                matches = filter(None, map(query.find_in, reversed(likely)))
                newer = next((delivery.name for delivery in matches), "")
            elif not passed:
                if query.may_match(line):
                    likely.append(line)
            elif older := query.find_in(line):
                yield newer, older.name
                return
        yield newer, ""

    def place_after(self, query: Query) -> Iterator[Place | None]:
        """Yield the place where `since` tells followers to begin, else the end."""
        place = self.end()
        for line in self.lines() if query.since else ():
            delivery = Delivery.from_json(line) if line else None
            if delivery and query.ends_at(delivery):
                break
            place = place._replace(offset=place.offset - (0 if line is None else len(line) + 1))
            yield None
        yield place._replace(offset=max(0, place.offset))


# --- Ledger --------------------------------------------------------------------------------------
#
# `Ledger` keeps the store and the log of deliveries together, and derives two facts from them: the
# number of deliveries of each kind, and the ids of stored notifications. It adopts notifications
# that are only in the store. Other threads may call `clear` and iterate `survey`.
# Must not know: HTTP, the event loop.


class Survey(NamedTuple):
    """The facts that the log holds at the start, and the stored notifications that it lacks."""

    tally: collections.Counter[tuple[str, int, bool]]
    ids: dict[int, str]
    unlogged: list[Delivery]


MAX_IDS = 10_000  # the latest ids of stored notifications; all of them would need much memory


class Ledger:
    """The notifications in a directory, and all deliveries. Raises `OSError` like `Store`."""

    def __init__(self, directory: str, fsync: bool) -> None:
        self.store = Store(directory, fsync)
        self.log = DeliveryLog(os.path.join(self.store.directory, "deliveries.jsonl"))
        self.recorded: set[bytes] | None = set()  # names, while the survey counts the other lines
        self.forget()

    def forget(self) -> None:
        """Forget the counts and the ids."""
        self.tally: collections.Counter[tuple[str, int, bool]] = collections.Counter()
        # Names by the hash of the id, because ids may be long; the latest last.
        self.ids: dict[int, str] = {}
        self.adopted: set[str] = set()

    def clear(self) -> None:
        """Forget all deliveries and notifications."""
        self.forget()
        # In this order, or a notification that arrives in between would be stored but not logged.
        self.log.clear()
        self.store.clear()

    def record(self, delivery: Delivery) -> Delivery:
        """Log a delivery. A failure to log is reported, but does not fail the request."""
        recorded = self.recorded
        if recorded is not None:
            recorded.add(delivery.name.encode())
        try:
            delivery = self.log.append(delivery)
        except OSError as error:
            LOG.error("a delivery could not be logged: %s", error)
        id_ = delivery.about.get("id", "")
        # The log does not hold longer ids as a whole.
        if delivery.direction == "in" and delivery.is_stored and 0 < len(id_) < ABOUT_LENGTH:
            self.ids.pop(hash(id_), None)  # it becomes the latest
            self.ids[hash(id_)] = delivery.name
            if len(self.ids) > MAX_IDS:
                del self.ids[next(iter(self.ids))]
        self.tally[delivery.direction, delivery.status, bool(delivery.findings)] += 1
        return delivery

    def known_as(self, id_: Any) -> str | None:
        """Return the name of the stored notification with this id, or None."""
        name = self.ids.get(hash(id_)) if isinstance(id_, str) else None
        return name if name and os.path.exists(self.store.path(name)) else None

    def adopt(self, delivery: Delivery) -> Delivery:
        """Log a notification that is only in the store, once; returns its delivery."""
        if delivery.name in self.adopted:
            return delivery
        self.adopted.add(delivery.name)
        return self.record(delivery)

    def survey(self, now: str) -> Iterator[Survey | None]:
        """Yield a survey of everything older than `now`, the start of a name; None is a pause."""
        known: set[bytes] = set()
        survey = Survey(collections.Counter(), {}, [])
        try:
            names = [name for name in self.store.names() if name < now]
            yield from self.count_lines(survey, known)
        finally:
            self.recorded = None
        for missing in (name for name in names if name.encode() not in known):
            with contextlib.suppress(KeyError):
                body = self.store.read(missing)
                survey.unlogged.append(Delivery.from_stored_file(missing, body))
            yield None
        yield survey

    def count_lines(self, survey: Survey, known: set[bytes]) -> Iterator[None]:
        """Count the lines that this process has not recorded, and learn all names."""
        for line in (each or b"" for each in self.log.lines()):
            match = LINE.match(line)
            if match:
                name, direction, status, id_, finding = match.groups(default=b"")
                known.add(name)
                way = "out" if direction == b"out" else "in"
                if name not in (self.recorded or ()):
                    survey.tally[way, int(status), finding != b""] += 1
                was_adopted = status == b"0" and b'"via": "adopted"' in line
                is_stored = way == "in" and (status in (b"201", b"202") or was_adopted)
                if is_stored and id_ and len(survey.ids) < MAX_IDS:
                    with contextlib.suppress(ValueError):  # somebody has edited the line badly
                        survey.ids.setdefault(hash(json.loads(id_)), name.decode())
            yield None

    def take_over(self, survey: Survey) -> None:
        """Add a survey to the counts, and adopt the notifications that were only stored."""
        self.tally.update(survey.tally)
        self.ids = {**dict(reversed(survey.ids.items())), **self.ids}
        for delivery in survey.unlogged:
            self.adopt(delivery)


# --- Simulated failures --------------------------------------------------------------------------
#
# A `Failure` is a simulated failure. `Failures` holds the ones that `fail_next` asked for. For the
# ones that the URL of the inbox asks for, it counts the attempts at each notification.
# Must not know: how HTTP is parsed, who asks.

FAILURE_PARAMETERS: Parameters = {
    "status": ("[345][0-9]{2}", "a status from 300 to 599"),
    "times": ("[1-9][0-9]{0,5}", "a number from 1 to 999999"),
    "retry-after": (
        "[0-9]{1,9}|[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}(:[0-9]{2}){2} GMT",
        "a number of seconds or an HTTP date",
    ),
    "delay": (r"[0-9]{1,4}(\.[0-9]{1,9})?|\.[0-9]{1,9}", "a number of seconds, at most 9999"),
    "close": ("1", "1"),
}

MAX_TRACKED = 10_000  # notifications whose attempts are counted
# Headers that a client may rely on when it sees one of these statuses (RFC 9110 section 15).
DEMANDED_HEADERS: Mapping[int, Mapping[str, str]] = {
    401: {"WWW-Authenticate": 'Bearer realm="coarinbox"'},
    405: {"Allow": "GET, HEAD, OPTIONS"},
    407: {"Proxy-Authenticate": 'Basic realm="coarinbox"'},
    426: {"Upgrade": "HTTP/2.0"},
}


class Failure(NamedTuple):
    """A simulated failure of an attempt to deliver a notification."""

    status: int = 0  # of the answer; 0 for the usual one
    times: int = 0  # attempts that fail; a URL counts them by notification, and 0 means all
    retry_after: str = ""  # seconds, or an HTTP date (RFC 9110 section 10.2.3)
    delay: float = 0  # seconds until the answer
    close: bool = False  # whether there is no answer at all

    @classmethod
    def from_values(cls, values: Mapping[str, str]) -> Failure:
        """Read parameters that `parse_query` has checked. Raises `ValueError` if one is missing."""
        if not values:
            return NO_FAILURE
        if not values.keys() & {"status", "delay", "close"}:
            raise ValueError("a failure needs a status, a delay or close")
        return cls(
            status=int(values.get("status", 0)),
            times=int(values.get("times", 0)),
            retry_after=values.get("retry-after", ""),
            delay=float(values.get("delay", 0)),
            close="close" in values,
        )

    def headers(self, inbox: str) -> dict[str, str]:
        """Return the headers that belong to the status of the answer."""
        location = {"Location": inbox} if self.status < 400 else {}
        retry_after = {"Retry-After": self.retry_after} if self.retry_after else {}
        return {**DEMANDED_HEADERS.get(self.status, {}), **location, **retry_after}


NO_FAILURE = Failure()


class Failures:
    """Simulated failures, waiting to be used up."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all of them; any thread may call this while the loop still uses the old ones."""
        self.next: collections.deque[Failure] = collections.deque()
        self.attempts: dict[tuple[Failure, bytes], int] = {}  # that failed, the latest last

    def push(self, failure: Failure) -> None:
        """Have the next attempts fail, as many as `failure.times` says."""
        self.next.extend([failure] * failure.times)

    def pop(self, failure: Failure, identity: bytes) -> Failure | None:
        """Return the failure to simulate for this attempt, if any.

        `failure` is the one that the URL asks for, `identity` tells notifications apart.
        """
        waiting, attempts = self.next, self.attempts
        if waiting:
            return waiting.popleft()
        if failure == NO_FAILURE:
            return None
        key = failure, hashlib.sha256(identity).digest()  # ids may be as long as a body
        number = attempts.pop(key, 0)
        if failure.times:
            attempts[key] = number + 1
        if len(attempts) > MAX_TRACKED:
            del attempts[next(iter(attempts))]
        return failure if not failure.times or number < failure.times else None


# --- Messages ------------------------------------------------------------------------------------
#
# HTTP/1.1 without sockets (RFC 9112). `Incoming` holds the bytes that have arrived. `read_request`
# is a generator that takes one `Request` out of them. A handler answers with a `Response`, or
# raises a `Problem`. Parsed strictly: anything that a proxy might read differently (folded lines,
# a bare LF, two lengths) is refused, because that is how request smuggling works. A head of more
# than MAX_HEAD bytes or MAX_FIELDS lines is refused too.
# Must not know: sockets, threads, resources.

MAX_HEAD = 65536  # bytes of a request line and its headers, and of the trailer after chunks
MAX_FIELDS = 100  # header lines, as in `http.client`

# The target of a request is a path, or a whole URL.
REQUEST_LINE = re.compile(
    r"([!-~]+) (?=[!-~])(?:(?i:https?)://([!-.0->@-~]*))?([!-~]*) (HTTP/[1-9]\.[0-9])\r\n"
)
FIELDS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+|(?!:))(?::[0-9]{1,5})?")
TLS_HANDSHAKE = b"\x16\x03"  # how a client begins that speaks TLS

SECRET_HEADERS = frozenset({"authorization", "cookie", "proxy-authorization"})
BODILESS = (204, 304)  # RFC 9110 section 6.4.1


class Problem(Exception):
    """An HTTP error to answer with; raise it anywhere while a request is read or handled.

    Status 0 closes the connection without an answer. `members` go into the problem document.
    """

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] = {}, **members: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers, self.members = headers, members

    def response(self) -> Response:
        """Make the problem document (RFC 9457)."""
        title = http.client.responses.get(self.status, "Error")
        document = {"type": "about:blank", "title": title, "status": self.status}
        document.update(detail=self.detail, **self.members)
        return json_response(self.status, document, "application/problem+json", self.headers)


class Response(NamedTuple):
    """An answer, without the headers that every answer has."""

    status: int
    # A body of unknown length is an iterator, see `Scan`, or the events of a stream.
    body: bytes | Iterator[bytes] | Events = b""
    headers: Mapping[str, str] = {}


class Events(NamedTuple):
    """The body of an event stream: the deliveries that match, from a place in the log on."""

    query: Query
    place: Place


def json_response(
    status: int, document: Any, kind: str = "application/json", headers: Mapping[str, str] = {}
) -> Response:
    """Answer with a document as indented JSON."""
    body = json.dumps(document, indent=2).encode() + b"\n"  # people read it
    return Response(status, body, {"Content-Type": kind, **headers})


def json_list(
    document: Mapping[str, Any], member: str, items: Iterable[bytes | None]
) -> Iterator[bytes]:
    """Yield, in pieces, a JSON document whose last member is a list.

    The items are JSON already. An item that is None yields b"", a pause.
    """
    head, _, tail = json.dumps({**document, member: []}).rpartition("[]")
    yield f"{head}[".encode()
    separator = b"\n"
    for item in items:
        yield b"" if item is None else separator + item
        separator = separator if item is None else b",\n"
    yield f"\n]{tail}\n".encode()


class Request:
    """A request, as far as it was read; `problem` says why it is incomplete or refused."""

    line = method = target = ""
    version = "HTTP/1.1"
    host = ""  # from the target, if that is a URL, else from the Host header
    chunked = False
    length: int | None = 0  # of the body; None if it is missing, but there must be one
    approved = False  # whether host, token and site are right: only then is it logged
    unread = True  # whether a part of it is still to come, so that no other request can follow
    problem: Problem | None = None
    arrived = 0.0  # when it was complete, by `time.monotonic`

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}  # by their names in lower case, repeated ones joined
        self.spelling: dict[str, str] = {}  # of these names, as they were sent
        self.body = bytearray()

    @property
    def is_http10(self) -> bool:
        """Whether the client speaks HTTP/1.0, which has neither chunks nor a need for Host."""
        return self.version == "HTTP/1.0"

    @property
    def keeps_alive(self) -> bool:
        """Whether the client wants to use the connection again (RFC 9112 section 9.3)."""
        connection = self.headers.get("connection", "").lower()
        options = [each.strip() for each in connection.split(",")] if connection else []
        return "close" not in options and (not self.is_http10 or "keep-alive" in options)

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for `100 Continue` before its body (RFC 9110 section 10.1.1)."""
        expected = self.headers.get("expect", "").lower() == "100-continue"
        return expected and not self.is_http10 and self.unread

    def shown_fields(self) -> dict[str, str]:
        """Return the headers as they were sent, up to a limit, without secrets."""
        shown: dict[str, str] = {}
        room = MAX_LOGGED_HEADERS
        for key, value in self.headers.items() if self.approved else ():
            room -= len(key) + len(value) * (1 if value.isascii() else 6)  # as JSON writes it
            if room < 0:
                shown["…"] = f"more than {MAX_LOGGED_HEADERS} characters of headers"
                break
            shown[self.spelling[key]] = "(masked)" if key in SECRET_HEADERS else value
        return shown


Reading = Generator[Optional[Request], None, None]  # yields None while bytes are missing


class Incoming:
    """The bytes that have arrived on a connection, and the reason why no more will."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended: Problem | None = None

    def more(self) -> Reading:
        """Wait for more bytes. Raises the `Problem` that has ended the input."""
        if self.ended:
            raise self.ended
        yield None

    def line(self, limit: int) -> Generator[Request | None, None, bytes]:
        """Take a line with its line break; empty if it has more than `limit` bytes."""
        searched = 0
        while (end := self.data.find(b"\n", searched, limit) + 1) == 0:
            searched = len(self.data)
            if searched >= limit:
                return b""
            yield from self.more()
        return self.take(end)

    def take(self, size: int) -> bytes:
        """Remove the first bytes and return them."""
        taken = bytes(self.data[:size])
        del self.data[:size]
        return taken

    def move(self, size: int, body: bytearray) -> Reading:
        """Move `size` bytes to the end of `body` as they arrive."""
        while True:
            part = self.data[:size]
            body += part
            del self.data[: len(part)]
            size -= len(part)
            if not size:
                return
            yield from self.more()


def read_request(
    incoming: Incoming, max_body: int
) -> Generator[Request | None, None, Request | None]:
    """Read one request; returns it, whole or with its `problem`, or None if the input has ended.

    Yields None while bytes are missing, and the request itself once, when its head is complete.
    The caller may then refuse it by throwing in a `Problem`.
    """
    while not incoming.data or incoming.data[0] in b"\r\n":  # RFC 9112 section 2.2
        if not incoming.data:
            if incoming.ended:
                return None
            yield None
        del incoming.data[: len(incoming.data) - len(incoming.data.lstrip(b"\r\n"))]
    request = Request()
    try:
        yield from read_head(incoming, request)
        check_framing(request)
        yield request
        yield from read_body(incoming, request, max_body)
    except Problem as problem:
        request.problem = problem
    return request


def read_head(incoming: Incoming, request: Request) -> Reading:
    """Read the request line and the header lines (RFC 9112 sections 3 and 5)."""
    while incoming.data[0] == TLS_HANDSHAKE[0] and len(incoming.data) < 2:
        yield from incoming.more()
    if incoming.data.startswith(TLS_HANDSHAKE):
        raise Problem(
            400, "the client speaks TLS, this port does not: use http://, or set SSL_CERT"
        )
    line = ""
    try:
        line = (yield from incoming.line(MAX_HEAD)).decode("latin-1")
    finally:  # the page shows a malformed line too, as far as it can be read
        request.line = (line or incoming.data[:200].decode("latin-1")).rstrip("\r\n")
        request.method, request.target = [*request.line[:1000].split(" "), ""][:2]
    if not line:
        raise Problem(414, f"the request line is longer than {MAX_HEAD} bytes")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Problem(400, f"the request line is malformed: {request.line!r:.80}")
    request.method, host, request.target, request.version = match.groups()
    if host is not None or request.target.startswith("/"):
        # Two slashes would begin the name of another host.
        request.target = "/" + request.target.lstrip("/")
    if not request.version.startswith("HTTP/1."):
        raise Problem(505, f"this server speaks HTTP/1.1, not {request.version}")
    for name, value in (yield from read_fields(incoming, MAX_HEAD - len(line))):
        key = name.lower()
        known = request.headers.get(key)
        request.headers[key] = value if known is None else f"{known}, {value}"
        request.spelling.setdefault(key, name)
    request.host = request.headers.get("host", "") if host is None else host


def read_fields(
    incoming: Incoming, limit: int
) -> Generator[Request | None, None, list[tuple[str, str]]]:
    """Read header lines, at most `limit` bytes, up to the empty line that ends them."""
    data, end, searched = incoming.data, 0, 0
    while True:
        if data.find(b"\n", searched) >= 0:  # another line is complete
            end = check_fields(data, end)
            if data.startswith(b"\r\n", end) and end + 2 <= limit:
                break
        searched = len(data)
        if searched >= limit:
            raise Problem(431, f"the head is longer than {MAX_HEAD} bytes")
        yield from incoming.more()
    lines = incoming.take(end + 2).decode("latin-1").split("\r\n")[:-2]
    parts = [line.partition(":") for line in lines]
    return [(name, value.strip(" \t")) for name, _, value in parts]


def check_fields(data: bytearray, start: int) -> int:
    """Return the offset of the first line that is empty or incomplete. Raises `Problem`."""
    end = FIELDS.match(data, start).end()  # type: ignore[union-attr]
    number = data.count(b"\n", 0, end)
    if number > MAX_FIELDS:
        raise Problem(431, f"there are more than {MAX_FIELDS} header lines")
    line = bytes(data[end : data.find(b"\n", end) + 1])
    if line not in (b"", b"\r\n"):  # its value may be a secret, so do not quote that
        name = line.partition(b":")[0][:80] if line[:1].strip() and b":" in line else b""
        shown = repr(name.decode("latin-1")) if name else "it has no name before a colon"
        raise Problem(400, f"header line {number + 1} is malformed: {shown}")
    return end


def check_framing(request: Request) -> None:
    """Determine the length of the body, for every method (RFC 9112 section 6.3)."""
    coding, length = request.headers.get("transfer-encoding"), request.headers.get("content-length")
    if coding is not None and (length is not None or request.is_http10):
        raise Problem(400, "Transfer-Encoding needs HTTP/1.1 and excludes Content-Length")
    if coding is not None and coding.lower() != "chunked":
        raise Problem(400, "the only transfer coding that this server reads is chunked")
    if length is not None and not length.isdecimal():
        raise Problem(400, "Content-Length is not one number of bytes")
    request.chunked = coding is not None
    if length is not None:
        # Look at 20 digits at most: they exceed any limit, and converting thousands is slow.
        request.length = int(length.lstrip("0")[:20] or "0")
    elif request.method in ("POST", "PUT") and not request.chunked:
        request.length = None
    # Bytes after a POST without a length are a body all the same, not another request.
    request.unread = request.chunked or request.length != 0


def read_body(incoming: Incoming, request: Request, max_body: int) -> Reading:
    """Read as many bytes as `check_framing` found (RFC 9112 section 6)."""
    if request.chunked:
        yield from read_chunks(incoming, request.body, max_body)
    elif request.length is None:
        raise Problem(411, "the request has neither Content-Length nor a chunked body")
    else:
        check_length(request.length, max_body)
        yield from incoming.move(request.length, request.body)
    request.unread = False


def check_length(length: int, max_body: int) -> None:
    """Raise `Problem` (413) if a body has more bytes than it may."""
    if length > max_body:
        raise Problem(413, f"the body is larger than {max_body} bytes (MAX_CONTENT_LENGTH)")


def read_chunks(incoming: Incoming, body: bytearray, max_body: int) -> Reading:
    """Read a chunked body, and discard the trailer after it (RFC 9112 section 7.1)."""
    framing = 0
    while True:
        line = yield from incoming.line(1024)
        match = CHUNK_SIZE.fullmatch(line)
        if not match:
            raise Problem(400, "the chunks of the body are malformed: one has no size")
        framing += len(line)
        if framing > MAX_HEAD + len(body):  # reading many tiny chunks would hold up other clients
            raise Problem(400, "the chunks of the body are too small, or their extensions too long")
        size = int(match[1], 16)
        if size == 0:
            break
        check_length(len(body) + size, max_body)
        yield from incoming.move(size, body)
        if (yield from incoming.line(2)) != b"\r\n":
            raise Problem(
                400, "the chunks of the body are malformed: one is not as long as it says"
            )
    yield from read_fields(incoming, MAX_HEAD)  # the trailer


# --- Intake --------------------------------------------------------------------------------------
#
# Decides about a notification, without waiting. `judge` checks the request and returns a
# `Verdict`. `accepted` makes the `Response` to a notification that was stored, and `conclude`
# describes the `Delivery`. The caller stores the notification in between.
# Must not know: sockets, threads, how a notification is stored.

JSON_TYPE = re.compile(r"(?i:application/([^\s;]+\+)?json)[ \t]*(;|\Z)")
ACCEPT_POST = f"{JSON_LD}, application/json, application/activity+json"


class Verdict(NamedTuple):
    """The decision about a notification, before it is stored."""

    problem: Problem | None = None  # why it is refused
    failure: Failure | None = None  # a simulated failure that is due
    known: Delivery = Delivery()  # the members that follow from the document, such as its findings


def check_content(request: Request) -> None:
    """Raise `Problem` if the body cannot be JSON, by its headers."""
    given = request.headers.get("content-type", "missing")
    if given != JSON_LD and not JSON_TYPE.match(given):
        detail = f"Content-Type is {clip(given, 100)}, expected {ACCEPT_POST} or the like"
        raise Problem(415, detail, {"Accept-Post": ACCEPT_POST})
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding != "identity":
        detail = f"Content-Encoding is {clip(coding, 100)}, expected none"
        raise Problem(415, detail, {"Accept-Encoding": "identity"})


def parse_notification(body: bytes) -> Any:
    """Parse a body. Raises `Problem`."""
    try:
        return parse(body)
    except NestedTooDeeplyError as error:
        raise Problem(400, f"the document is {error}") from error
    except ValueError as error:
        raise Problem(400, f"the body is not JSON: {error}") from error


def judge(
    request: Request,
    mode: bool | str,
    here: Collection[str],
    known_as: Callable[[Any], str | None],
    failures: Callable[[bytes], Failure | None],
) -> Verdict:
    """Check a notification: its headers, its syntax, the rules, and whether a failure is due.

    `mode` is VALIDATE_INCOMING, `here` the URLs of this inbox. `known_as` returns the name of the
    stored notification with an id. `failures` returns the failure to simulate for a notification,
    which it knows by its id or else by its body.
    """
    body = bytes(request.body)
    try:
        check_content(request)
        document = parse_notification(body)
    except Problem as problem:
        return Verdict(problem)
    id_ = lookup(document, "id")
    content_type = request.headers["content-type"]
    assessment = assess(document, mode, Arrival(content_type, here, known_as(id_)))
    errors, omitted = most_important(assessment.errors)
    warnings, more = most_important(assessment.warnings, MAX_FINDINGS - len(errors))
    pattern = pattern_of(document)
    known = Delivery(
        pattern=pattern and pattern.name,
        about=summary(document),
        findings=[*errors, *warnings],
        errors=len(errors),
        omitted=omitted + more,
    )
    if errors:
        detail = f"not a valid notification: {counted(len(assessment.errors), 'error')}"
        headers = {"Accept-Post": JSON_LD} if assessment.status == 415 else {}
        return Verdict(Problem(assessment.status, detail, headers, **receipt(known)), None, known)
    identity = id_.encode("utf-8", "replace") if isinstance(id_, str) else body
    return Verdict(None, failures(identity), known)


def receipt(delivery: Delivery) -> dict[str, Any]:
    """Return the members of an answer that are about the notification."""
    members: dict[str, Any] = {"pattern": delivery.pattern}
    findings = [finding.as_json() for finding in delivery.findings]
    if delivery.errors:
        members["errors"] = findings[: delivery.errors]
    members["warnings"] = findings[delivery.errors :]
    if delivery.omitted:
        members["omitted"] = f"and {delivery.omitted:,} more"
    return members


def simulated(failure: Failure, inbox: str) -> Problem | None:
    """Return the problem that a simulated failure answers with; None if it was only a delay."""
    if failure.close:
        return Problem(0, "a simulated failure: the connection ends without an answer")
    if failure.status:
        return Problem(failure.status, "a simulated failure", failure.headers(inbox))
    return None


def store_problem(error: OSError) -> Problem:
    """Return the problem for an error of the store: 507 if the disk is full, else 500."""
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
    return Problem(507 if full else 500, f"the store failed: {error.strerror or error}")


def accepted(delivery: Delivery, location: str, status: int) -> Response:
    """Acknowledge a notification that has been stored (LDN section 3.3.2)."""
    headers = {"Content-Type": "application/json"}
    if status == 201:
        headers["Location"] = location
    body = to_json({"location": location, **receipt(delivery)}).encode() + b"\n"
    return Response(status, body, headers)


def conclude(
    request: Request, verdict: Verdict, client: str, name: str, response: Response
) -> Delivery:
    """Describe the delivery that a request was; `name` is empty if nothing was stored."""
    return verdict.known._replace(
        name=name or new_name(),
        client=client,
        method=request.method,
        target=clip(request.target, 2000),
        headers=request.shown_fields(),
        status=response.status,
        answer_headers=dict(response.headers),
        detail=verdict.problem.detail if verdict.problem else "",
        body=bytes(request.body) if request.approved and not name else None,
        simulated=verdict.failure is not None,
        seconds=round(time.monotonic() - request.arrived, 4) if request.arrived else 0.0,
    )


# --- Waiting -------------------------------------------------------------------------------------
#
# The steps that a generator can wait for, and the event loop that waits in its place. The generator
# yields a `Commit`, `Pause`, `Blocking`, `Sending`, `Scan` or `Turn`, and is resumed with the
# result: `name = yield Commit(body)` reads like a call that blocks, and holds no thread. `Loop`
# owns the selector, the timers and the pools. Other threads reach it through `post`.
# Must not know: connections, resources.


class Commit(NamedTuple):
    """Wait until a body is stored; results in its name, or raises `OSError`."""

    body: bytes


class Pause(NamedTuple):
    """Wait for some seconds; raises `ConnectionAbortedError` if the client leaves before."""

    seconds: float


class Blocking(NamedTuple):
    """Wait for a function that may block; results in its result or its exception."""

    function: Callable[[], Any]


class Sending(NamedTuple):
    """Wait for a function that talks to another inbox; results in its result or its exception."""

    function: Callable[[], Any]


class Scan(NamedTuple):
    """Exhaust an iterator that reads much; results in the list of its items that are not None.

    Scans take turns, and end when their client leaves, or the server stops.
    """

    items: Iterator[Any]


class Turn(NamedTuple):
    """Advance such an iterator for one turn; results in its items, and whether it has ended."""

    items: Iterator[Any]


TURN = 0.02  # seconds that a scan may take before the next one has its turn


def take_turn(items: Iterator[Any]) -> tuple[list[Any], bool]:
    """Advance an iterator for TURN seconds; returns its items but None, and whether it ended."""
    end = time.monotonic() + TURN
    found = []
    for item in items:
        if item is not None:
            found.append(item)
        if time.monotonic() >= end:
            return found, False
    return found, True


Step = Union[Commit, Pause, Blocking, Sending, Scan, Turn]
Steps = Generator[Step, Any, None]


def advance(steps: Steps, result: Any) -> Step:
    """Send a generator the result that it waits for, or throw it in; returns the next step."""
    return steps.throw(result) if isinstance(result, Exception) else steps.send(result)


Then = Callable[[Any], None]  # takes a result, or an exception in its place
NEVER = math.inf


def result_of(function: Callable[[], Any]) -> Any:
    """Call a function; returns the exception if it raises one."""
    try:
        return function()
    except Exception as error:
        return error


class Loop:
    """An event loop: sockets, timers, generators, and pools for what would block it."""

    def __init__(self) -> None:
        self.bugs: list[BaseException] = []  # exceptions that should not happen
        self.closing = self.closed = False
        self.tasks: dict[Steps, str | None] = {}  # without a client, by key; None if cancelled
        # Long reads take turns in one thread. More threads would be no faster, and make the loop
        # wait longer for the GIL.
        self.pool, self.senders, self.scans = Pool(16), Pool(8), Pool(1)
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.mailbox: collections.deque[Callable[[], object]] = collections.deque()
        self.selector = selectors.DefaultSelector()
        self.bell, self.ringer = socket.socketpair()
        for sock in (self.bell, self.ringer):
            sock.setblocking(False)
        self.selector.register(self.bell, selectors.EVENT_READ, lambda events: self.bell.recv(4096))

    def close_loop(self) -> None:
        """Close the sockets, the selector and the pools."""
        for sock in (self.bell, self.ringer):
            sock.close()
        self.selector.close()
        for pool in (self.pool, self.senders, self.scans):
            pool.close()
        self.closed = True
        self.mailbox.clear()

    def turn(self, deadline: float) -> bool:
        """Run everything that is ready, after waiting for it until a deadline at most.

        Returns whether a socket was ready, because more may follow at once.
        """
        soonest = min(deadline, self.timers[0][0] if self.timers else NEVER)
        seconds = max(0, soonest - time.monotonic()) if soonest < NEVER else None
        ready = self.selector.select(0 if self.mailbox else seconds)
        for key, events in ready:
            self.guard(key.data, events)
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            self.guard(heapq.heappop(self.timers)[2])
        for _ in range(len(self.mailbox)):
            self.guard(self.mailbox.popleft())
        return bool(ready)

    def guard(self, task: Callable[..., object], *arguments: Any) -> None:
        """Run a task; a bug in it closes the connection that it works for, but spares the loop."""
        try:
            task(*arguments)
        except Exception as error:
            self.report_bug(error)
            while isinstance(task, functools.partial):
                task = task.func
            close = getattr(getattr(task, "__self__", None), "close", None)
            if close:
                close()

    def report_bug(self, error: BaseException) -> None:
        """Log an exception that should not happen, and remember it for `running`."""
        LOG.error("a bug of the inbox", exc_info=error)
        self.bugs.append(error)

    def post(self, task: Callable[[], object]) -> None:
        """Queue a task for the loop, from any thread or signal handler."""
        self.mailbox.append(task)
        if self.closed:  # a thread has ended late; its results may hold open files
            self.mailbox.clear()
            return
        with contextlib.suppress(OSError):  # if the buffer is full, the loop will wake up anyway
            self.ringer.send(b"!")

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the loop, from another thread, and return its result.

        Raises its exception, or `queue.Empty` if the loop does not get to it within ten seconds.
        """
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.post(lambda: results.put(result_of(function)))
        result = results.get(timeout=10)
        if isinstance(result, Exception):
            raise result
        return result

    def call_later(self, seconds: float, task: Callable[[], None]) -> None:
        """Run a task after some seconds."""
        heapq.heappush(self.timers, (time.monotonic() + seconds, next(self.numbers), task))

    def perform(self, step: Any, then: Then, wanted: Callable[[], bool]) -> None:
        """Perform a step; the loop passes its result, or an exception, to `then`."""
        if isinstance(step, Pause):
            self.call_later(step.seconds, functools.partial(then, None))
        elif isinstance(step, Scan):
            self.scan(step.items, [], then, wanted)
        elif isinstance(step, Turn):
            self.run_in(self.scans, functools.partial(take_turn, step.items), then)
        else:
            pool = self.senders if isinstance(step, Sending) else self.pool
            self.run_in(pool, step.function, then)

    def scan(
        self, items: Iterator[Any], found: list[Any], then: Then, wanted: Callable[[], bool]
    ) -> None:
        """Exhaust an iterator, taking turns with other scans, while somebody wants the result."""

        def on_turn(turn: Any) -> None:
            if isinstance(turn, Exception):
                then(turn)
                return
            found.extend(turn[0])
            if turn[1]:
                then(found)
            elif self.closing:
                then(Problem(503, "the inbox stops"))
            elif wanted():
                self.scan(items, found, then, wanted)
            else:
                then(ConnectionAbortedError())

        self.run_in(self.scans, functools.partial(take_turn, items), on_turn)

    def run_in(self, pool: Pool, function: Callable[[], Any], then: Then) -> None:
        """Run a function in a pool; the loop passes its result, or its exception, to `then`."""
        try:
            pool.submit(lambda: self.post(functools.partial(then, result_of(function))))
        except RuntimeError:
            LOG.error("no thread can be started")
            problem = Problem(503, "no thread can be started", {"Retry-After": "1"})
            self.post(functools.partial(then, problem))

    def start(self, steps: Steps, key: str = "") -> None:
        """Run a generator of steps that no client waits for; `key` is to cancel it by."""
        self.tasks[steps] = key
        self.resume(steps, None)

    def resume(self, steps: Steps, result: Any) -> None:
        """Advance a generator that was started, unless it has been cancelled."""
        if result is None and self.tasks[steps] is None:  # cancelled while it paused
            steps.close()
            del self.tasks[steps]
            return
        try:
            step = advance(steps, result)
        except Exception as error:
            del self.tasks[steps]
            if not isinstance(error, StopIteration):
                raise
        else:
            self.perform(step, functools.partial(self.resume, steps), lambda: True)

    def cancel(self, key: str = "") -> None:
        """End the generators with this key, or all that have a key, at their next pause."""
        for steps, each in self.tasks.items():
            if each and key in ("", each):
                self.tasks[steps] = None


# --- Sending -------------------------------------------------------------------------------------
#
# Sends notifications to other inboxes with `http.client`, which ignores proxies in the environment.
# `send` is for people: it finds the inbox of a resource and follows redirects. `post` is for the
# server: one request to addresses that were approved before. `addresses_of`, `addresses_of_client`
# and `retry_delay` decide where and when. Starts no thread, never sleeps.
# Must not know: the server, the log.

MAX_ANSWER = 65536  # bytes of an answer that are read, its head included
MAX_REDIRECTS = 5
TIMEOUT = 10  # seconds until there must be an answer
URL_CHARACTERS = "/?%:@!$&'()*+,;=~[]"  # they stay as they are in a request
LDP_INBOX = ("http://www.w3.org/ns/ldp#inbox", "ldp:inbox")
# How resources that are not inboxes answer a POST. 403 comes from web frameworks that demand a
# token against cross-site requests.
NOT_AN_INBOX = (403, 404, 405, 501)


class SendError(OSError):
    """There is no answer. The text is one line that says why, without secrets."""


class Answer(NamedTuple):
    """The answer of a receiver."""

    url: str  # of the inbox, after redirects and discovery
    status: int
    headers: http.client.HTTPMessage
    body: bytes  # cut where the receiver stopped, or at MAX_ANSWER
    location: str  # absolute; empty if there is none

    @property
    def accepted(self) -> bool:
        """Whether it is an inbox that accepted; any page that ignores the body may answer 200."""
        return self.status in (201, 202)

    def reasons(self) -> list[str]:
        """List the reasons of the receiver, from a problem document (RFC 9457) or the like.

        Its detail comes first, then its findings, which an answer that accepts may have too.
        """
        problem = Delivery(body=self.body).notification  # None if it is not JSON
        details = [lookup(problem, member) for member in ("detail", "message", "error")]
        texts = [detail for detail in details if isinstance(detail, str)][:1]
        for found in (lookup(problem, "errors"), lookup(problem, "warnings")):
            for each in found if isinstance(found, list) else []:
                words = (lookup(each, name) or "-" for name in ("level", "pointer", "message"))
                names = ", ".join(names_in(lookup(each, "refused_by")))
                texts.append(" ".join(map(str, words)) + (names and f" (refused by {names})"))
        if self.status in NOT_AN_INBOX and not texts:
            return ["this is no inbox, and no page there advertises one"]
        if 200 <= self.status < 300 and not self.accepted:
            return ["an inbox that accepts a notification answers 201 or 202", *texts]
        return texts


def send(document: Any, url: str, *, token: str | None = None, timeout: float = TIMEOUT) -> Answer:
    """POST a notification to an inbox, or to the inbox that a resource advertises.

    `document` is sent as JSON, or as it is if it is bytes. `token` goes as `Authorization: Bearer`,
    and only to the scheme, host and port of `url`. Redirects are followed for 307 and 308.
    `timeout` is in seconds, for all of it except the operating system's look-up of names. Raises
    `SendError` if there is no answer.
    """
    deadline, body = time.monotonic() + timeout, encode(document)
    if token is not None and not is_line(token):  # a line break would add headers
        raise SendError("the token must be a text without line breaks, or spaces around it")

    def request(target: str, body: bytes | None) -> Answer:
        followed = (307, 308) if body is not None else (301, 302, 303, 307, 308)
        for _ in range(MAX_REDIRECTS + 1):
            addresses = addresses_of(target)
            secret = token if origin_of(target) == origin_of(url) else None
            answer = exchange(target, addresses, deadline, body, secret)
            if answer.status not in followed or not answer.location:
                return answer
            target = answer.location
        raise send_error(url, f"more than {MAX_REDIRECTS} redirects")

    # POST before discovery: the URL nearly always names an inbox, where a page must not divert the
    # notification, and a receiver under test should see one request.
    answer = request(url, body)
    if answer.status not in NOT_AN_INBOX:
        return answer
    try:
        page = request(answer.url, None)
    except SendError:  # the first answer says more
        return answer
    inbox = resolve(page.url, advertised_inbox(page)) if page.status == 200 else ""
    return request(inbox, body) if inbox not in ("", answer.url) else answer


def post(document: Any, url: str, addresses: Sequence[str]) -> Answer:
    """POST a notification to one of these addresses, as `send` does, but follow nothing."""
    return exchange(url, addresses, time.monotonic() + TIMEOUT, encode(document), None)


def addresses_of(url: str) -> list[str]:
    """Look up the IP addresses of the host of a URL. Raises `SendError` if there are none."""
    try:
        _, host, port = origin_of(url)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise send_error(url, f"the host is unknown: {explain(error)}") from error
    except ValueError as error:
        raise send_error(url, f"the URL is unusable: {error}") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def addresses_of_client(addresses: Iterable[str], client: str) -> list[str]:
    """Select the addresses that are the client's; a reply to it may go to these only.

    A payload must not make the inbox connect to third parties. 127.0.0.1 and ::1 count as one, and
    so do an IPv4 address and its IPv6-mapped form.
    """

    def normal(text: str) -> str:
        address = str(ip_address(text) or ip_address(f"[{text}]"))
        return "127.0.0.1" if address == "::1" else address

    return [address for address in addresses if normal(address) == normal(client)]


def retry_delay(
    tries: int, status: int | None, headers: Mapping[str, str] | http.client.HTTPMessage
) -> float | None:
    """Return the seconds before the next try, or None if there is none.

    `tries` counts those so far. `status` and `headers` are those of the last answer; the status is
    None if there was none. `Retry-After` is honoured up to a minute.
    """
    if tries > 2 or not (status is None or status == 429 or 500 <= status < 600):
        return None
    after, wait = headers.get("Retry-After") or "", 2.0 * tries
    if re.fullmatch("[0-9]{1,9}", after):
        wait = float(after)
    elif after:
        # Date is the receiver's own clock, which may differ from ours.
        with contextlib.suppress(OverflowError, TypeError, ValueError):
            now = parsedate_to_datetime(headers.get("Date") or "")
            wait = (parsedate_to_datetime(after) - now).total_seconds()
    return min(max(wait, 0.0), 60.0)


def encode(document: Any) -> bytes:
    """Write a notification as JSON; bytes stay as they are."""
    return document if isinstance(document, bytes) else json.dumps(document).encode()


def exchange(
    url: str, addresses: Sequence[str], deadline: float, body: bytes | None, token: str | None
) -> Answer:
    """POST a body to one of the addresses, or GET. Raises `SendError` if there is no answer."""
    method = "GET" if body is None else "POST"
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers: dict[str, Any] = {
        "Accept": "application/ld+json, application/json, text/html;q=0.5, */*;q=0.1",
        "Connection": "close",
        "User-Agent": f"coarinbox/{__version__}",
    }
    if body is not None:
        headers["Content-Type"] = JSON_LD
    if token is not None:
        headers["Authorization"] = f"Bearer {token}".encode()
    try:
        with contextlib.closing(connect(url, addresses, deadline)) as connection:
            # A receiver may refuse a notification before it has read all of it.
            with contextlib.suppress(ConnectionError):
                connection.request(method, quote(target, URL_CHARACTERS), body, headers)
            reader: Any = TimedReader(connection.sock, deadline)
            with http.client.HTTPResponse(reader, method=method) as response:
                response.begin()
                data = bytearray()
                # The status counts, even if the end of the body is missing.
                with contextlib.suppress(OSError, http.client.HTTPException):
                    while piece := response.read1(MAX_ANSWER):
                        data += piece
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise send_error(url, explain(error)) from error
    location = resolve(url, response.headers.get("Location") or "")
    return Answer(url, response.status, response.headers, bytes(data), location)


def connect(url: str, addresses: Sequence[str], deadline: float) -> http.client.HTTPConnection:
    """Connect to the host of a URL; another look-up of its addresses could lead elsewhere."""
    scheme, host, port = origin_of(url)
    # Divide the time among the addresses, or one dead address would use it up.
    seconds = remaining(deadline) / len(addresses)
    connection = http.client.HTTPConnection(addresses[0], port, timeout=seconds)
    try:
        connection.connect()
    except OSError:
        if len(addresses) == 1:
            raise
        return connect(url, addresses[1:], deadline)
    connection.host = host  # for the header Host, which omits the usual port
    connection.default_port = 443 if scheme == "https" else 80
    connection.sock.settimeout(remaining(deadline))
    if scheme == "https":
        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
    return connection


class TimedReader(io.RawIOBase):
    """Reads an answer from a socket until a deadline, and at most MAX_ANSWER bytes of it.

    The time-out of a socket starts anew with each byte, so it is set again before each read.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock, self.deadline, self.left = sock, deadline, MAX_ANSWER

    def makefile(self, mode: str) -> io.BufferedReader:
        """Stand in for a socket, which `http.client` expects."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """Say yes, as `io.RawIOBase` demands of a reader."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive into a buffer. Raises `TimeoutError` at the deadline."""
        self.sock.settimeout(remaining(self.deadline))
        view = memoryview(buffer)[: self.left]
        count = self.sock.recv_into(view) if view else 0
        self.left -= count
        return count


def remaining(deadline: float) -> float:
    """Return the seconds until the deadline. Raises `TimeoutError` if it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def resolve(base: str, reference: str) -> str:
    """Resolve a URL reference; an unusable one is returned unchanged."""
    try:
        return urljoin(base, reference) if reference else ""
    except ValueError:
        return reference


def send_error(url: str, reason: str) -> SendError:
    """Say why there is no answer from a URL, without the secrets in it."""
    shown = clip(re.sub("//[^/]*@", "//…@", url[:500]), 200)
    return SendError(escape_controls(f"{shown}: {reason}"))


def explain(error: Exception) -> str:
    """Say in a few words why there is no answer."""
    if isinstance(error, ConnectionResetError):  # RemoteDisconnected is one, too
        return "the receiver closed the connection without an answer"
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, http.client.HTTPException):
        return f"the answer is not HTTP: {text}"
    if not isinstance(error, ssl.SSLError):
        return text
    hints = {"verify": "set SSL_CERT_FILE to trust it", "version number|record layer": "try http:"}
    hint = "".join(f"; {hint}" for words, hint in hints.items() if re.search(words, text))
    return "TLS failed: " + re.sub(r"^\[.*?\] | \(_ssl\.c:\d+\)$", "", text) + hint


def advertised_inbox(page: Answer) -> str:
    """Return the reference to an inbox that a resource advertises (LDN section 3.1), or nothing."""
    links = ", ".join(page.headers.get_all("Link", []))
    for link, parameters in re.findall("<([^<>]*)>([^<]*)", links):
        relation = re.search(r'\brel *= *"?([^";,]*)', parameters, re.IGNORECASE)
        if relation and names_inbox(relation[1]):
            return str(link)
    if "html" in page.headers.get_content_type():
        finder = InboxFinder()
        # The parser gives up at some odd declarations.
        with contextlib.suppress(AssertionError, NotImplementedError):
            finder.feed(page.body.decode("utf-8", "replace"))
        return finder.inbox
    try:
        return described_inbox(parse(page.body), page.url)
    except ValueError:
        return ""


def names_inbox(relations: str) -> bool:
    """Return whether one of the relations of a link names an inbox."""
    return not {*LDP_INBOX}.isdisjoint(relations.lower().split())


def described_inbox(document: Any, url: str) -> str:
    """Find an inbox in a JSON-LD document, preferably of the resource at the URL."""
    parts = [document, lookup(document, "@graph")]
    lists = [part if isinstance(part, list) else [part] for part in parts]
    nodes = [node for part in lists for node in part if isinstance(node, dict)]
    nodes.sort(key=lambda node: resolve(url, str(node.get("@id", node.get("id")))) != url)
    for value in (node.get(name) for node in nodes for name in (*LDP_INBOX, "inbox")):
        first = value[0] if isinstance(value, list) and value else value
        link = lookup(first, "@id") or lookup(first, "id") or first
        if link and isinstance(link, str):
            return link
    return ""


class InboxFinder(HTMLParser):
    """Finds the inbox in the links and the RDFa of an HTML page."""

    base, inbox = "", ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember `base`, and the first link to an inbox."""
        given = {name: value or "" for name, value in attrs}
        if tag == "base":
            self.base = given.get("href", "")
        if not self.inbox and names_inbox(f"{given.get('rel')} {given.get('property')}"):
            self.inbox = resolve(self.base, given.get("resource") or given.get("href", ""))


# --- Replies -------------------------------------------------------------------------------------
#
# Sends notifications as deliveries. `outgoing` makes one attempt and describes it. `answer_offer`
# plays the review service: it answers an Offer with the patterns of REPLIES. `reply_addresses`
# makes sure that replies go only to the host that delivered the Offer, or to REPLY_TO.
# Must not know: sockets, pages, the event loop.

FORWARDED = ("forwarded", "x-forwarded-for")  # headers of a request that came through a proxy


def outgoing(document: Any, url: str, via: str, addresses: Sequence[str] = ()) -> Delivery:
    """Make an attempt to send a notification, and describe it; a failure is described too.

    Uses `post` if addresses are given, else `send`.
    """
    body = encode(document)
    parsed = Delivery(body=body).notification
    pattern = pattern_of(parsed)
    findings, omitted = most_important(validate(parsed))
    delivery = Delivery(
        name=new_name(),
        direction="out",
        target=url if is_inbox_url(url) else "",  # it may hold a password
        headers={"Content-Type": JSON_LD},
        pattern=pattern and pattern.name,
        about=summary(parsed),
        findings=findings,
        omitted=omitted,
        body=body,
        via=via,
    )
    started = time.monotonic()
    try:
        answer = post(body, url, addresses) if addresses else send(body, url)
    except SendError as error:
        return delivery._replace(detail=str(error))
    return delivery._replace(
        target=answer.url,
        status=answer.status,
        answer_headers={name.title(): clip(text, 1000) for name, text in answer.headers.items()},
        detail="" if answer.accepted else clip("".join(answer.reasons()[:1]), 300),
        answer_body=answer.body,
        seconds=round(time.monotonic() - started, 4),
    )


def reply_addresses(url: Any, client: str, proxied: bool, settings: Settings) -> list[str]:
    """Look up the addresses that replies to an Offer may go to. Raises `SendError` if none may.

    A payload must not make this inbox talk to third parties: without REPLY_TO, replies go only to
    the host that delivered the Offer, the `client`; behind a proxy, that is not known.
    """
    if settings.REPLY_TO:
        return addresses_of(url)
    if not is_http_uri(url):
        raise SendError("the Offer has no usable origin.inbox to reply to; set REPLY_TO")
    if proxied:
        raise SendError("behind a proxy, anybody could have sent the Offer; set REPLY_TO")
    allowed = addresses_of_client(addresses_of(url), client)
    if not allowed:
        reason = f"its host is not {client}, which delivered the Offer; set REPLY_TO"
        raise SendError(f"no reply is sent to {clip(url, 200)}: {reason}")
    return allowed


def answer_offer(
    offer: Any,
    delivery: Delivery,
    proxied: bool,
    settings: Settings,
    record: Callable[[Delivery], Delivery],
) -> Steps:
    """Answer an Offer with each pattern of REPLIES, one after the other, after a delay each."""
    url = settings.REPLY_TO or lookup(offer, "origin.inbox")
    try:
        client = delivery.client
        addresses = yield Sending(lambda: reply_addresses(url, client, proxied, settings))
        for pattern in settings.REPLIES:
            document = yield Sending(functools.partial(reply_to, offer, pattern, url))
            attempt = functools.partial(outgoing, document, url, "REPLIES", addresses)
            tries = 0
            seconds: float | None = settings.REPLY_DELAY
            while seconds is not None:
                yield Pause(seconds)
                sent = record((yield Sending(attempt)))
                tries += 1
                seconds = retry_delay(tries, sent.status or None, sent.answer_headers)
    except (SendError, ValueError, Problem) as error:
        unsent = Delivery(new_name(), direction="out", pattern=settings.REPLIES[0], via="REPLIES")
        about = {"inReplyTo": delivery.about.get("id", "")}
        target = url if is_inbox_url(url) else ""
        record(unsent._replace(target=target, detail=str(error), about=about))


def reply_to(offer: Any, pattern: str, url: str) -> Document:
    """Build a reply, addressed to the inbox that it is sent to. Raises `ValueError`."""
    document = reply(offer, pattern)
    if isinstance(document.get("target"), dict):
        document["target"]["inbox"] = url
    return document


FORM = "application/x-www-form-urlencoded"


def read_send(body: bytes, is_form: bool) -> dict[str, Any]:
    """Read a JSON object or a form that says what to send, and where. Raises `Problem`."""
    try:
        wanted = dict(parse_qsl(body.decode())) if is_form else parse(body)
    except ValueError as error:
        raise Problem(400, f"the body is neither JSON nor a form: {error}") from error
    if not isinstance(wanted, dict) or wanted.keys() - {"to", "pattern", "document"}:
        raise Problem(400, 'expected {"to": URL}, perhaps with "pattern" or "document"')
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if not is_inbox_url(wanted.get("to")):
        raise Problem(400, '"to" is no http or https URL, or holds a user name or password')
    if not isinstance(wanted.get("pattern", ""), str):
        raise Problem(400, '"pattern" is not a text')
    if is_form and "document" in wanted:
        wanted["document"] = wanted["document"].encode()
    return wanted


# --- Templates -----------------------------------------------------------------------------------
#
# The look of the pages: the style, the script that keeps a page up to date, the templates, and
# `fill`, which puts values into them. Pages load nothing external.
# Must not know: the meaning of the values.

STYLE = """
:root { color-scheme: light dark; --paper: light-dark(#fff, #111317);
  --panel: light-dark(#f7f8fa, #181b21); --line: light-dark(#e3e6ea, #2b3038);
  --edge: light-dark(#868e98, #6b747f); --ink: light-dark(#1a1e24, #eceef1);
  --faint: light-dark(#5b636e, #a3abb5); --accent: light-dark(#3350b5, #9fb2ff);
  --accent-tint: light-dark(#eef2fe, #1d2440); --red: light-dark(#b01030, #ff9a97);
  --red-tint: light-dark(#ffe9ea, #3d161b); --amber: light-dark(#7a4b00, #f2bf5c);
  --amber-tint: light-dark(#fff1cc, #36270b); --green: light-dark(#176638, #5fd08c);
  --dim: light-dark(#eceef1, #252a32);
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace; }
* { box-sizing: border-box; } time, .totals, .chip { font-variant-numeric: tabular-nums; }
body { margin: 0 auto; max-width: 96rem; padding: 0 2rem 4rem; background: var(--paper);
  color: var(--ink); font: .875rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3, p, ol, ul, dl, dd { margin: 0; padding: 0; list-style: none; }
h1 { font-size: 1.25rem; line-height: 1.75rem; } h2, h2 code { font-size: .9375rem; }
h3, h2 button { font-size: .875rem; } h1, h2, h3, b, .chip { font-weight: 600; }
a { color: var(--accent); text-underline-offset: .2em; }
a:not(:hover) { text-decoration-color: color-mix(in srgb, currentColor 40%, transparent); }
button, input, select, textarea { font: inherit; color: inherit; background: var(--paper);
  border: 1px solid var(--edge); min-height: 1.875rem; }
button, input, select, textarea, .tools > a { border-radius: .375rem; padding: .1875rem .625rem; }
button, .tools > a { font-weight: 500; background: var(--panel); border: 1px solid var(--line); }
:is(button, .tools > a, .totals a, .active a):hover { border-color: var(--edge); }
.tools > .main { background: var(--accent); border-color: var(--accent); color: var(--paper); }
button, summary { cursor: pointer; } label { display: block; font-weight: 500; }
textarea { width: 100%; padding: .5rem .75rem; resize: vertical; line-height: 1.5; }
::placeholder { color: var(--faint); opacity: 1; }
code, pre, .json, textarea { font-family: var(--mono); }
code, pre, .json, textarea, small, .chip, .heads, .rows time, .timeline time, .rules :is(a, b),
.findings p:last-child { font-size: .8125rem; }
small, .timeline time { font-weight: 400; } .open b { font-weight: 500; }
small, .faint, .heads, .tag, #state, .facts dt, .timeline time, .rules a, .findings p:last-child,
.rows :is(time, .about, .why) { color: var(--faint); }
.tools > a:not(.main), .totals a, .active a, .open, .rail > nav a,
.rows a:is(.from, .day):not(:hover) { color: inherit; text-decoration: none; }
.tools > .main, header nav a, .ref, .rules a:not(:hover) { text-decoration: none; }
:focus-visible, :target:not(section, main), .json :has(> :target), mark:has(:target) {
  outline: 2px solid var(--accent); outline-offset: 2px; border-radius: .25rem; }
main:focus { outline: none; } :root:not(.scripted) .script, #state:empty { display: none; }
.sr, .skip:not(:focus) { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; }
.skip { position: absolute; top: .375rem; left: .75rem; padding: .375rem 1.25rem;
  background: var(--paper); z-index: 2; }
.tools, .address, .filters, .totals, .active, .title, .pager, .pages, .level, .attempts li,
section > h2, .timeline h3, body > header, header nav { display: flex; flex-wrap: wrap;
  gap: .25rem .75rem; align-items: center; }
.title, .pages, .level, .attempts li, .timeline h3 { align-items: baseline; }
.pager, .pages, header nav { gap: 1.25rem; } .pager :first-child { margin-right: auto; }
.tools, .filters, .totals, .active { gap: .5rem; } .push, .address, h3 time { margin-left: auto; }
body > header { margin: 0 -2rem 1.5rem; padding: .625rem 2rem; gap: .25rem 1.5rem;
  border-bottom: 1px solid var(--line); }
header nav a { color: var(--faint); padding: .25rem 0; }
header nav :is(:hover, [aria-current]) { color: var(--ink); }
header nav [aria-current] { font-weight: 600; box-shadow: 0 2px var(--accent); }
#state::before { content: ""; display: inline-block; width: .5rem; height: .5rem;
  margin-right: .4rem; border-radius: 50%; background: var(--green); }
#state.off::before { background: none; border: 2px solid var(--red); }
/* Chips: red is filled, amber is filled for a MUST and outlined for a SHOULD, green is plain */
.E { --tone: var(--red); --tint: var(--red-tint); } .S { --tone: var(--faint); --tint: var(--dim); }
.M { --tone: var(--amber); --tint: var(--amber-tint); }
.chip, .tag, .ref { display: inline-block; border-radius: .25rem; text-align: center; }
.chip { padding: 0 .5rem; border: 1px solid #0000; border-radius: .375rem; line-height: 1.375rem; }
.chip:is(.E, .M) { color: var(--tone); background: var(--tint); } .chip.S { color: var(--amber); }
.chip:is(.E, .S) { border-color: color-mix(in srgb, currentColor 35%, transparent); }
.chip.ok { padding: 0; color: var(--green); } .chip.none { padding: 0; color: var(--faint); }
.tag, .ref { padding: 0 .25rem; font: 600 .75rem/1.125rem system-ui, sans-serif; }
.tag { padding: 0 .375rem; border: 1px solid var(--line); font-weight: 400; }
.totals a, .active a { display: block; padding: .125rem .75rem; border: 1px solid var(--line);
  border-radius: 1rem; }
.totals b { margin-left: .25rem; } .totals .refused b { color: var(--red); }
.totals a[aria-current], .active a { background: var(--accent-tint); border-color: var(--accent); }
.filters { margin: .875rem 0 1.25rem; } .filters form { display: contents; }
.filters [type=search] { flex: 1 1 10rem; max-width: 18rem; } .filters select { max-width: 11rem; }
.rows li, .heads, .open, .facts, .rules li, .beside, .rail, .card, .card form { display: grid;
  align-items: baseline; }
.rows li, .heads { gap: 0 1rem;
  grid-template-columns: 9.25rem 9.75rem 12.5rem 12.5rem minmax(0, 2fr) minmax(0, 3fr); }
.rows li { position: relative; margin: 0 -.75rem; padding: .3125rem .75rem; }
.rows li, .findings li, .rules li, .pages { border-top: 1px solid var(--line); }
.rows li:has(.chip.E) { box-shadow: inset 3px 0 var(--red); .why { color: var(--red); } }
.rows li.new { background: var(--accent-tint); animation: new 6s ease-out forwards; }
@keyframes new { to { background: none; } }
.heads { padding-bottom: .25rem; } .rows .why { display: flex; gap: .375rem; }
.rows li > *, .open b, .why span { overflow: hidden; text-overflow: ellipsis; }
.chip, .tag, .sr, .rows li > *, .open b, .why span { white-space: nowrap; }
.open { grid-column: span 2; grid-template-columns: subgrid; }
.open::after { content: ""; position: absolute; inset: 0; } .open:focus-visible { outline: none; }
.open:focus-visible::after { outline: 2px solid var(--accent); outline-offset: -2px; }
.rows :is(.from, .day) { position: relative; z-index: 1; justify-self: start; max-width: 100%; }
.pages { margin-top: 1rem; padding-top: 1rem; } .pager { margin-bottom: .75rem; }
.title .chip { font-size: .9375rem; line-height: 1.625rem; align-self: center; }
.facts { grid-template-columns: max-content minmax(0, 1fr); gap: 0 1.25rem; margin: .75rem 0 1rem; }
.beside, .rail { margin-top: 1.5rem; align-items: start; }
.beside { grid-template-columns: minmax(0, 7fr) minmax(0, 6fr); gap: 2rem; }
section > h2 { min-height: 1.875rem; margin-bottom: .375rem; gap: 0 .75rem; }
section + section { margin-top: 1.75rem; } main > .tools { margin-top: 1rem; }
pre, .json, .card { margin: 0; border: 1px solid var(--line); border-radius: .5rem; }
pre, .json { padding: .75rem 1rem; line-height: 1.4375rem; background: var(--panel);
  white-space: pre-wrap; overflow: clip; }
.json { padding-left: 1.75rem; white-space: normal;
  details > * { margin-left: 2ch; } :is(summary, details > .end) { margin-left: 0; }
  details details details details details details details details details > * { margin-left: 1px; }
  summary { list-style: none; position: relative; } .k { color: var(--accent); }
  summary::before { content: "▾"; position: absolute; left: -1.75ch; color: var(--faint); }
  details:not([open]) > summary::before { content: "▸"; }
  details:not([open]) > summary::after { content: " …"; color: var(--faint); }
  details:not([open]):has(.ref) > summary::after { content: " … with findings";
    color: var(--red); }
  .ghost { font-style: italic; user-select: none; }
  .ghost::before { content: "+ "; color: var(--tone); font-weight: 700; margin-left: -2ch; } }
.json :is(.E, .M, .S):not(.ref), pre mark { color: inherit; background: var(--tint);
  border-image: conic-gradient(var(--tint) 0 0) fill 0 / 0 / 0 100vw; }
.ref { min-width: 1.125rem; color: var(--paper); background: var(--tone); }
.level { color: var(--tone); gap: .5rem; } .findings + .level { margin-top: 1rem; }
.findings li { position: relative; padding: .5rem 0 .5rem 2rem; }
.findings .ref { position: absolute; left: 0; top: .6875rem; }
:is(.findings, .rules) code { background: var(--dim); border-radius: .25rem; padding: 0 .25rem; }
.timeline { > li { position: relative; padding: 0 0 1.125rem 1.75rem; }
  > li::before { content: ""; position: absolute; left: .25rem; top: .375rem; z-index: 1;
    width: .75rem; height: .75rem; border: 2px solid var(--dot, var(--edge)); border-radius: 50%;
    background: var(--paper); }
  > li:not(:last-child)::after { content: ""; position: absolute; left: .5625rem; top: .625rem;
    bottom: -.625rem; border-left: 2px solid var(--line); }
  .out { --dot: var(--accent); } .out::before { background: var(--dot); }
  li:has(.chip.E) { --dot: var(--red); } h3 { gap: 0 .625rem; } }
.card, .card form { gap: .5rem; grid-template-columns: minmax(0, 1fr); } .card { padding: 1rem; }
.tools > :is(input, select) { flex: 1 1 12rem; min-width: 0; }
pre + details, details > pre { margin-top: .5rem; }
.rail { grid-template-columns: 12.5rem minmax(0, 1fr) minmax(0, 1fr); gap: 2.25rem;
  > nav, > aside { position: sticky; top: 1rem; }
  > aside { max-height: calc(100vh - 2rem); overflow-y: auto; }
  > nav a { display: block; margin-left: -.75rem; padding: .25rem .75rem; border-radius: .375rem; }
  [aria-current] { background: var(--accent-tint); color: var(--accent); font-weight: 600; }
  > .wide { grid-column: 2 / -1; max-width: 56rem; } }
.rail > nav a:hover, .rows li:hover { background: var(--panel); }
.rules li { grid-template-columns: 5rem minmax(0, 1fr) auto; gap: 0 .75rem; padding: .25rem 0; }
.rules b { color: var(--tone); } .rules code:empty { display: none; }
@media (max-width: 76rem) { /* the reason moves below */
  .rows li, .heads { grid-template-columns: 6rem 9.5rem 11rem minmax(0, 5fr) minmax(0, 4fr); }
  .rows span:has(+ small:not(:empty)), .why:empty, .heads span:last-child { display: none; }
  .rows .why { grid-column: 2 / -1; } .rail > .wide { grid-column: 1 / -1; }
  .rail { grid-template-columns: minmax(0, 5fr) minmax(0, 4fr); gap: 1.25rem 2rem; }
  .rail > nav { position: static; grid-column: 1 / -1; display: grid; padding-left: .75rem;
    grid-template-columns: repeat(auto-fill, minmax(10.75rem, 1fr)); }
  .rules li { grid-template-columns: 4.5rem minmax(0, 1fr); } .rules a { grid-column: 2; } }
@media (max-width: 48rem) { /* two lines a row, one column */
  body { padding: 0 1rem 3rem; } body > header { margin: 0 -1rem 1rem; padding: .5rem 1rem; }
  .address { margin-left: 0; } .heads, .keys, .rows .about:empty { display: none; }
  .rows li { display: flex; flex-wrap: wrap; gap: .125rem .625rem; padding: .5rem .75rem; }
  .rows .open { display: flex; gap: .625rem; order: -2; flex: 1 1 calc(100% - 7rem); }
  .rows .day { order: -1; margin-left: auto; } .totals a { padding: .125rem .5rem; }
  .rows .from { max-width: 45%; } .rows .why, .about:has(+ .why:empty) { flex: 1 1 3rem; }
  .about:not(:has(+ .why:empty)) { max-width: 28%; }
  .filters :is([type=search], select, [list]) { flex: 1 1 40%; max-width: none; min-width: 0; }
  .rail { grid-template-columns: minmax(0, 1fr); > aside { position: static; max-height: none; } }
  .beside { display: flex; flex-direction: column; gap: 0; align-items: stretch; }
  .beside > div { display: contents; } .beside section { margin: 0 0 1.75rem; }
  .beside .first { order: -1; } }
@media (prefers-reduced-motion: reduce) { * { animation: none !important; } }
"""

# The server renders everything. The script fetches the page again when a delivery arrives, and
# changes only the parts that differ, so that focus, folding, scrolling and typed text stay.
SCRIPT = """
const {root} = document.body.dataset, {title} = document;
const query = selector => document.querySelector(selector), state = query("#state");
let events, loading, typing, unseen = 0, waiting = false, pause = Promise.resolve();
function say(text) { [state.textContent, state.className] = [text, text === "live" ? "" : "off"]; }
function localize(part) {
  const now = new Date(), units = [[3600, "h"], [60, "min"], [1, "s"]];
  const day = {day: "numeric", month: "short", hour: "2-digit", minute: "2-digit"};
  for (const time of part.querySelectorAll("time")) {
    const then = new Date(time.dateTime), age = Math.max(1, (now - then) / 1000);
    if (isNaN(then)) continue;
    const today = then.toDateString() === now.toDateString(), [first, last] = time.children;
    const full = time.closest(".facts") && {...day, year: "numeric", second: "2-digit"};
    const format = full || (today ? {timeStyle: "medium"} : day);
    const [size, unit] = units.find(([size]) => age >= size);
    first.textContent = then.toLocaleString("en-GB", format).replace(",", "");
    const recent = today && !time.closest("ol:not(.rows)");
    last.textContent = recent ? `${Math.floor(age / size)} ${unit} ago` : "";
  }
}
function announce(count) { document.title = count ? `(${count}) ${title}` : title; }
function mark(part) {  // a new row, or a new list of rows
  const rows = part.matches("[id^=row-]") ? [part] : part.querySelectorAll("[id^=row-]");
  for (const row of rows) { row.className = "new"; unseen += 1; }
}
function morph(old, fresh, marking) {
  if (old.isEqualNode(fresh) || old.nodeName === "FORM") return;
  if (old.nodeName !== fresh.nodeName) return old.replaceWith(fresh);
  if (!old.attributes) return void (old.data = fresh.data);
  const kept = old.id.startsWith("row-") ? "class" : "open";
  for (const {name} of [...old.attributes, ...fresh.attributes]) {
    const value = fresh.getAttribute(name);
    if (name !== kept) value === null ? old.removeAttribute(name) : old.setAttribute(name, value);
  }
  for (const child of [...old.children]) {
    if (child.id && !fresh.ownerDocument.getElementById(child.id)) child.remove();
  }
  let next = old.firstChild;
  for (const node of [...fresh.childNodes]) {
    const twin = node.id ? document.getElementById(node.id) : next?.id ? null : next;
    if (marking && !twin && node.matches) mark(node);
    if (!twin || twin !== next) old.insertBefore(twin ?? node, next);
    next = (twin ?? node).nextSibling;
    if (twin) morph(twin, node, marking);
  }
  while (next?.nextSibling) next.nextSibling.remove();
  next?.remove();
}
async function renew(marking) {
  loading?.abort();
  const {signal} = loading = new AbortController();
  try {
    const answer = await fetch(location.href, {headers: {Accept: "text/html"}, signal});
    if (!answer.ok) return say(answer.status === 404 ? "removed" : "not connected");
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    localize(page);
    morph(query("main"), page.querySelector("main"), marking);
    const rows = document.querySelectorAll(".rows li").length, older = query("[rel=next]");
    announce(unseen >= rows && older ? `${rows}+` : unseen);  // more than the list shows
    const {dataset} = document.body, {stream} = page.body.dataset;
    if (dataset.stream === stream) return;
    dataset.stream = stream;
    listen();
  } catch (error) {
    if (error.name !== "AbortError") say("not connected");
  }
}
async function refresh() {  // at most once a second
  if (waiting) return;
  waiting = true;
  await pause;
  waiting = false;
  if (document.hidden) return;
  pause = renew(true).then(() => new Promise(done => setTimeout(done, 1000)));
}
function listen() {
  events?.close();  // a browser has few connections for all open pages; hidden lists still count
  if ((document.hidden && query("#payload")) || !document.body.dataset.stream) return;
  events = new EventSource(document.body.dataset.stream);
  events.onopen = () => { say("live"); if (!document.hidden) renew(true); };  // and what was missed
  events.onmessage = () => document.hidden ? announce(unseen += 1) : refresh();
  events.onerror = () => say("not connected");
}
function search(form) {
  const set = [...new FormData(form)].filter(([, value]) => value);
  history.replaceState(null, "", root + (set.length ? "?" + new URLSearchParams(set) : ""));
  renew(false);
}
async function ask(path, options) {
  const answer = await fetch(root + path, options).catch(() => null);
  if (answer?.ok) return answer.text();
  throw alert(answer ? (await answer.json()).detail : "The inbox cannot be reached.");
}
const actions = {
  copy(button) {
    const area = document.createElement("textarea"), label = button.textContent;
    area.value = button.dataset.copy;  // the clipboard of navigator needs HTTPS
    button.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = label; }, 1500);
  },
  async send(button) {
    const name = button.dataset.send || query("#sample").value;
    const headers = {"Content-Type": "application/ld+json", "Accept": "*/*"};
    const body = await ask("samples/" + encodeURIComponent(name), {headers});
    await ask("inbox", {method: "POST", headers, body});
    location.href = root;
  },
  async clear() {
    if (!confirm("Remove all notifications and deliveries from the inbox?")) return;
    await ask("inbox", {method: "DELETE"});
    location.href = root;
  },
};
addEventListener("click", ({target}) => {
  const button = target.closest("button[type=button]");
  for (const name in button?.dataset) actions[name](button);
});
addEventListener("input", ({target}) => {
  clearTimeout(typing);
  if (target.form?.id === "filter") typing = setTimeout(search, 150, target.form);
});
addEventListener("submit", event => {
  if (event.target.id !== "filter") return;
  event.preventDefault();
  search(event.target);
});
addEventListener("keydown", event => {
  const {key, target} = event, step = {j: 1, k: -1}[key];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (target.matches("input, select, textarea")) return void (key === "Escape" && target.blur());
  const rows = [...document.querySelectorAll(".open")], at = rows.indexOf(target) + step;
  if (key === "Escape") query(".pager a")?.click();
  else if (key === "/") event.preventDefault(query("[type=search]")?.focus());
  else if (step && rows.length) rows[Math.min(Math.max(at, 0), rows.length - 1)].focus();
  else if (step) query(step > 0 ? "[rel=next]" : "[rel=prev]")?.click();
});
for (const kind of ["focus", "pointermove", "keydown"]) {
  addEventListener(kind, () => { if (unseen) [unseen, document.title] = [0, title]; });
}
document.addEventListener("visibilitychange", () => {
  if (query("#payload")) return listen();
  if (document.hidden) return;
  unseen = 0;  // the new rows are counted again
  renew(true);
});
setInterval(() => document.hidden || localize(document), 5000);
document.documentElement.className = "scripted";
localize(document);
listen();
"""


def csp_hash(text: str) -> str:
    """Return the source that a Content-Security-Policy names for an inline text."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src {csp_hash(STYLE)}; script-src {csp_hash(SCRIPT)};"
    " img-src data:; connect-src 'self'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'"
)

# Much as in Mustache, `{name}` is a value, escaped, and `{>name}` another template. The text in
# `{#name}…{/name}` is repeated for each item of a list, whose members are values there. It is shown
# once for any other value, unless that is empty. `{^name}…{/name}` is shown for an empty value.
TEMPLATES = {
    "page": """<!doctype html><html lang="en"><head><title>{title} · coarinbox</title>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><link rel="http://www.w3.org/ns/ldp#inbox" href="{base}/inbox">
<style>{style}</style></head><body data-root="{root}" data-stream="{stream}">
<a class="skip" href="#main">Skip to content</a>
<header><b>coarinbox</b> <nav aria-label="Pages">{#tabs}{>link} {/tabs}</nav>
<span class="address"><code>{base}/inbox</code> {#address}{>copy}{/address}</span>
<span id="state" role="status"></span></header>
<main id="main" tabindex="-1">{content}</main><script>{script}</script></body></html>""",
    "link": """<a href="{url}"{#chosen} aria-current="page"{/chosen}>{name}</a>""",
    "copy": """<button type="button" class="script" data-copy="{copy}">{label}</button>""",
    "menu": """{#menu}<option{#chosen} selected="selected"{/chosen}>{name}</option>{/menu}""",
    "kept": """{#kept}<input type="hidden" name="{name}" value="{value}">{/kept}""",
    "chip": """<span class="chip {kind}">{chip}</span>{#simulated}
<span class="tag">simulated</span>{/simulated}""",
    "peer": """{#peer_url}<a class="from" href="{peer_url}">{#sent}<span class="faint">to</span>
{/sent}{host}</a>{/peer_url}{^peer_url}<span class="from faint">{host}</span>{/peer_url}""",
    "time": """<time datetime="{time}" title="{time}"><span>{utc}</span> <small></small></time>""",
    "list": """<h1 class="sr">Deliveries</h1><nav id="totals" class="totals" aria-label="Outcome">
{#totals}<a class="{name}" href="{url}"{#chosen} aria-current="true"{/chosen}>{text}
<b>{count}</b></a> {/totals}</nav>
<div class="filters"><form id="filter" role="search" action="{root}"><input type="search" name="q"
value="{q}" aria-label="Text" autocomplete="off" placeholder="Text, id or finding  ( / )">
<select name="pattern" aria-label="Pattern"><option value="">Any pattern</option>{>menu}</select>
<input name="origin" value="{origin}" list="origins" aria-label="Origin" autocomplete="off"
placeholder="Any origin"><datalist id="origins">{#origins}<option>{origins}</option>{/origins}
</datalist>{>kept}<button>Filter</button></form>
<ul id="active" class="active" aria-label="Active filters">{#active}<li><a href="{url}">{name}
<b>{value}</b> <span aria-hidden="true">&times;</span><span class="sr">remove</span></a></li>
{/active}</ul>
<button class="push script" type="button" data-clear="">Empty the inbox</button></div>
<p id="newest" class="sr" role="status">{#newest}The newest: {chip}, {pattern}{/newest}</p>
<div id="deliveries">{#newest}<p class="heads" aria-hidden="true"><span>Time</span>
<span>Verdict</span><span>Pattern</span><span>Origin</span><span>About</span><span>Why</span></p>
<ol class="rows">{#rows}<li id="row-{name}"><a class="day" href="{day_url}" title="Only this day">
<time datetime="{time}" title="{time}"><span>{minute}</span> <small></small></time></a>
<a class="open" href="{url}"><span>{>chip}</span> <b>{pattern}{^pattern}<span class="faint">no
pattern</span>{/pattern}</b></a> {>peer} <span class="about" title="{subject}">{about}</span>
<span class="why">{#why}<span>{why}</span>{#more} <b>+{more}</b>{/more}{/why}</span></li>
{/rows}</ol>{/newest}{^newest}No delivery matches. <a href="{root}">Show all</a>{/newest}</div>
<nav id="turn" class="pages" aria-label="More">
{#start}<a href="{start}">Newest deliveries</a>{/start}
{#older}<a rel="next" href="{older}">Older deliveries</a>{/older}
<span class="faint push">{shown}</span> <span class="faint keys script"><kbd>j</kbd>
<kbd>k</kbd> move · <kbd>Enter</kbd> opens · <kbd>/</kbd> searches</span></nav>""",
    "empty": """<h1>Nothing has been delivered yet</h1>
<p class="faint">Whatever arrives at <code>{base}/inbox</code> shows up here at once, refused or
not.</p><div class="beside"><div><section><h2>Send a first notification {#copies}{>copy}{/copies}
</h2><pre>{command}</pre></section><section><h2>What it sends</h2>{document}</section></div>
<div><section class="script"><h2>Or from here</h2><div class="card">
<label for="sample">A valid sample of each pattern</label>
<p class="tools"><select id="sample">{>menu}</select>
<button class="main" type="button" data-send="">Send to this inbox</button></p></div></section>
<section><h2>Or from your software</h2><dl class="facts"><dt>Without curl</dt>
<dd><code>python coarinbox.py --send {base}/inbox --sample "Request Review"</code></dd>
<dt>To fail</dt><dd><code>{base}/inbox?status=503&amp;times=2</code> refuses the first two attempts
</dd></dl></section></div></div>""",
    "delivery": """<nav class="pager" aria-label="Deliveries"><a href="{list_url}">← {list}</a>
{#newer}<a rel="prev" href="{newer}">Newer</a>{/newer}
{#older}<a rel="next" href="{older}">Older</a>{/older}</nav>
<div class="title">{>chip} <h1>{pattern}{^pattern}No pattern{/pattern}</h1>
<span>{^sent}from {/sent}{>peer}{#subject} about {#page}<a href="{page}">{about}</a>{/page}
{^page}{about}{/page}{/subject}</span></div><p>{^levels}{detail}{/levels}</p>
<dl class="facts"><dt>{how}</dt><dd>{>time}, {where}{#by}, by {by}{/by}</dd>
{#stored}<dt>Stored</dt><dd>{stored}</dd>{/stored}{#id}<dt>id</dt><dd><code>{id}</code></dd>{/id}
{#asked}<dt>Answers</dt><dd><code>{asked}</code></dd>{/asked}</dl>
<p class="tools">{#reply}<a class="main" href="#reply">Reply</a> {/reply}
{#again}<a href="#again">Send again</a> {/again}{#copies}{>copy} {/copies}
{#raw}<a href="{raw}">Raw</a>{/raw}</p>
<div class="beside"><div><section id="payload"><h2>Payload</h2>{payload}</section>
{#exchanged}<section id="request"><h2>What {#sent}we sent{/sent}{^sent}arrived{/sent}</h2>
<pre>{request}</pre></section><section id="answer">
<h2>What {#sent}they{/sent}{^sent}we{/sent} answered <small>{took}</small></h2>
<pre>{answer}</pre>{#size}<details><summary>Body, {size} bytes</summary>{answered}</details>{/size}
</section>{/exchanged}</div><div>{>findings}{>conversation}{>reply}{>again}</div></div>""",
    "findings": """<section id="findings" class="first"><h2>Findings {^clean}{#pattern}
<small>compare with <a href="{rules}#example">a valid {pattern}</a></small>{/pattern}{/clean}</h2>
{#levels}<h3 class="level {level}">{count} <small>{meaning}</small></h3><ol class="findings">
{#items}<li id="finding-{number}" class="{level}">{#marked}<a class="ref" href="#at-{number}"
aria-label="finding {number}, show where">{number}</a>{/marked}
{^marked}<span class="ref">{number}</span>{/marked} <p><b>{fault}</b></p> <p>{advice}</p>
<p>{#named}refused by {#refused_by}<span class="tag">{refused_by}</span> {/refused_by}· {/named}
{#rule}<a href="{rules}#{rule}">rule</a> · {/rule}
{#spec}<a href="{spec}">specification</a>{/spec}{^spec}specification{/spec}</p></li>{/items}</ol>
{/levels}{#omitted}<p class="faint">and {omitted} more</p>{/omitted}
{#clean}<p>{#pattern}None: this is <a href="{rules}#example">a valid {pattern}</a>.{/pattern}
{^pattern}The document was not checked.{/pattern}</p>{/clean}</section>""",
    "conversation": """<section id="conversation"><h2>Conversation <small>{summary}</small></h2>
{#unknown}<p class="faint">It answers {asked}, which was never delivered here.</p>{/unknown}
{^entries}<p class="faint">Nothing else has this id or answers it.</p>{/entries}
<ol class="timeline">{#entries}<li class="{direction}"><h3>{>chip} {>linked} {>time}</h3>
<p class="faint">{#later}{later}, {/later}{#sent}to{/sent}{^sent}from{/sent} {host}{#by}, by {by}
{/by}{^by}{#about}, about {about}{/about}{/by}</p>
{#failed}<p>{why}</p>{/failed}
{#count}<details><summary>{count} attempts</summary><ol class="attempts">
{#attempts}<li>{>time} {>linked} <small>{later}</small></li> {/attempts}</ol></details>{/count}
</li>{/entries}</ol></section>""",
    "reply": """{#reply}<section id="reply"><h2>Reply</h2><div class="card">
<form method="get" action="{root}deliveries/{name}#reply">{>kept}
<label for="pattern">Pattern</label><p class="tools"><select id="pattern" name="reply">{>menu}
</select> <button>Write it</button></p></form>
<form method="post" action="{root}deliveries/{name}/send"><label for="document">Document
<small>as it will be sent; edit it as you like</small></label>
<textarea id="document" name="document" rows="12" spellcheck="false">{reply}</textarea>
<label for="reply-to">To <small>the inbox of its target</small></label>
<p class="tools"><input id="reply-to" name="to" type="url" value="{inbox}" required>
<button class="main">Send</button></p></form></div></section>{/reply}""",
    "again": """{#again}<section id="again"><h2>Send again</h2><form class="card" method="post"
action="{root}deliveries/{name}/send"><label for="to">To <small>the same bytes</small></label>
<p class="tools"><input id="to" name="to" type="url" value="{again}" required>
<button class="main">Send again</button></p></form></section>{/again}""",
    "linked": """{#here}<span>{text}</span> <span class="tag">this page</span>{/here}
{^here}<a href="{url}">{text}</a>{/here}""",
    # The lines of a document, and of the head of a message
    "leaf": """<p class="{level}">{>line}</p>\n""",
    "open": """<details open><summary class="{level}">{>line}</summary>\n""",
    "close": """<p class="end">{text}</p></details>\n""",
    "missing": """<p class="ghost {level}">{>line}</p>\n""",
    "field": """{#level}<mark class="{level}">{>line}</mark>{/level}{^level}{text}{/level}\n""",
    "line": """{#key}<span class="k">{key}</span>: {/key}{text}{#refs} <a class="ref {level}"
id="at-{number}" href="#finding-{number}" aria-label="finding {number}">{number}</a>{/refs}""",
    "document": """<div class="json">{lines}</div>""",
    "text": """{#text}<pre>{text}</pre>{/text}{^text}<p>{note}</p>{/text}""",
    "constraints": """<h1>{title}</h1><p class="faint">{count} rules. This inbox refuses: {refused}.
<a href="{spec}">Specification</a></p>
<div class="rail"><nav aria-label="Patterns">{#patterns}{>link}{/patterns}</nav>
<div>{#groups}<section><h2>{group}</h2><ul class="rules">
{#rules}<li id="{code}" class="{level}"><b>{word}</b> <span><code>{below}</code> {demand}</span>
<a href="#{code}">{code}</a></li>{/rules}</ul></section>{/groups}</div>
<aside aria-label="Example"><section id="example"><h2>A valid example {#copies}{>copy}{/copies}</h2>
{document}</section></aside></div>""",
    "samples": """<h1>{title}</h1>
<p class="faint">A valid notification of each pattern, addressed to this inbox.</p>
<div class="rail"><nav aria-label="Patterns">{#patterns}{>link}{/patterns}</nav>
<div class="wide">{#samples}<section id="{anchor}"><h2>{name} <span class="push tools">
{#copies}{>copy}{/copies}
<button type="button" class="script" data-send="{name}">Send to this inbox</button>
<a href="{rules}#main">Rules</a></span></h2>{document}</section>{/samples}</div></div>""",
    "error": """<h1>{title}</h1><p>{detail}</p>
<p class="tools"><a class="main" href="{root}">All deliveries</a></p>""",
}

PART = re.compile(
    r"\{(?P<sign>[#^])(?P<section>\w+)\}(?P<inside>.*?)\{/(?P=section)\}"
    r"|\{(?P<partial>>?)(?P<name>\w+)\}",
    re.DOTALL,
)
MAX_LENGTH = 2000  # characters of a value that are shown


class Html(str):
    """Markup that may be sent as it is."""


def whole(text: str) -> Html:
    """Escape a text; control characters in its lines become visible."""
    return Html("\n".join(html.escape(escape_controls(line)) for line in text.split("\n")))


def escape(value: Any) -> Html:
    """Write any value as HTML, clipped unless it is markup."""
    return value if isinstance(value, Html) else whole(clip(str(value), MAX_LENGTH))


def fill(template: str, values: Mapping[str, Any]) -> Html:
    """Put values into a template, escaped."""

    def fill_part(match: re.Match[str]) -> str:
        name = match["section"] or match["name"]
        if match["partial"]:
            return fill(TEMPLATES[name], values)
        if match["name"]:
            return escape("" if values[name] is None else values[name])
        value, inside = values.get(name), match["inside"]
        items = value if isinstance(value, list) else [value] if value else []
        if match["sign"] == "^":
            return "" if items else fill(inside, values)
        members = (item if isinstance(item, dict) else {name: item} for item in items)
        return "".join(fill(inside, {**values, **each}) for each in members)

    return Html(PART.sub(fill_part, template))


def render(template: str, /, **values: Any) -> Html:
    """Fill the template of this name."""
    return fill(TEMPLATES[template], values)


# --- Wording -------------------------------------------------------------------------------------
#
# Describes a delivery in a few words of plain text: its verdict (`chip_of`), its subject
# (`subject_of`), the time since another one (`between`), and a command that sends it again
# (`curl_command`).
# Must not know: HTML.

WORDS = {REFUSED: "error", MUST: "MUST", SHOULD: "SHOULD"}  # for the levels of findings
MAX_COPY = 65536  # characters of a body that a button copies, or a form holds
PLACE = re.compile(r"https?://(?:[^/?#]*@)?(?P<host>[^/?#]*)(?P<path>.*)", re.I | re.S)
BEARER = '-H "Authorization: Bearer $TOKEN"'
# Headers that a copied request does without: curl writes its own, or they are secret.
NOT_COPIED = frozenset(
    "accept-encoding authorization connection content-length cookie expect host"
    " proxy-authorization transfer-encoding user-agent".split()
)


def is_unsent(delivery: Delivery) -> bool:
    """Whether it is the record of a reply that could not be sent: one without a body."""
    return delivery.direction == "out" and delivery.body is None


def chip_of(delivery: Delivery) -> tuple[str, str]:
    """Return the kind of the chip that shows a verdict (E, M, S, ok or none), and its text."""
    status, accepted = delivery.status, delivery.is_stored
    levels = [finding.level for finding in delivery.findings]
    text = str(status) if status else "found" if accepted else "dropped"
    if delivery.direction == "out":
        no_answer = "not sent" if is_unsent(delivery) else "no answer"
        text = f"↗ sent {status}" if status else f"↗ {no_answer}"
    elif delivery.errors:
        text += f" · {counted(delivery.errors, 'error')}"
    elif levels and not delivery.simulated:
        text += f" · {counted(len(levels), 'warning' if accepted else 'finding')}"
    if not accepted:
        return "none" if delivery.simulated else "E", text
    return "ok" if not levels else "S" if set(levels) == {"S"} else "M", text


def host_of(url: str) -> str:
    """Return the host and port of an HTTP URI, and anything else as it is."""
    match = PLACE.match(url)
    return match["host"] if match else url


def subject_of(delivery: Delivery) -> tuple[str, str]:
    """Return the id of the subject of a notification, and a short form of it.

    The subject of an answer is the offered resource. The short form is a path if the subject is on
    the host of the origin or the target.
    """
    about = delivery.about.get
    ids: list[str] = [about(f"{name}.id", "") for name in ("object.object", "object", "context")]
    subject = next(filter(is_http_uri, ids), ids[1])
    match = PLACE.match(subject)
    if not match:
        return subject, re.sub(r"^(urn:uuid:.{4}).{20,}(.{4})$", r"\1…\2", subject)
    services = (host_of(about(name, "")) for name in ("origin.id", "origin", "target.id"))
    known = match["host"] in services and match["path"].strip("/")
    return subject, match["path"] if known else match["host"] + match["path"]


def in_words(seconds: float) -> str:
    """Write a duration in seconds the way people say it."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
    units = ((86400, "d"), (3600, "h"), (60, "min"))
    size, unit = next((each for each in units if seconds >= 2 * each[0]), (1, "s"))
    return f"{seconds // size:.0f} {unit}"


def between(earlier: str, later: str) -> str:
    """Say how much later another time is; empty if one of them cannot be read."""
    try:
        start, end = (datetime.fromisoformat(time.rstrip("Z")) for time in (earlier, later))
        return in_words((end - start).total_seconds()) + " later"
    except (TypeError, ValueError):
        return ""


def began(delivery: Delivery) -> Delivery:
    """Return a delivery with the time of its request instead of its answer.

    A receiver may send its reply before it answers. The order of answers would mislead then.
    """
    try:
        end = datetime.fromisoformat(delivery.time.rstrip("Z"))
        start = end - timedelta(seconds=delivery.seconds)
    except (OverflowError, ValueError):  # somebody has edited the log
        return delivery
    return delivery._replace(time=start.isoformat(timespec="milliseconds") + "Z")


def curl_command(delivery: Delivery, base: str, needs_token: bool) -> str:
    """Write a command that makes the same request; a secret in it is `$TOKEN`."""
    body, names = delivery.body or b"", {name.lower() for name in delivery.headers}
    url = delivery.target if delivery.direction == "out" else base + delivery.target
    words = ["curl -i -X", shlex.quote(delivery.method), shlex.quote(escape_controls(url))]
    for name, value in delivery.headers.items():
        if name.lower() not in NOT_COPIED:
            words.append("-H " + shlex.quote(escape_controls(f"{name}: {value}")))
    words += [BEARER] if "authorization" in names else []
    words += [] if "content-type" in names else ["-H 'Content-Type:'"]
    text = body.decode("utf-8", "replace")
    if text.encode() == body and len(body) < MAX_COPY and text.replace("\n", "").isprintable():
        return " ".join([*words, "--data-raw", shlex.quote(text)])
    # A terminal could take control characters for commands, so curl fetches such a body itself.
    return piped_command(f"{base}/deliveries/{delivery.name}/body", words, needs_token)


def piped_command(source: str, post: Sequence[str], needs_token: bool) -> str:
    """Write a command that fetches a body and pipes it into another command."""
    fetch = ["curl -s", shlex.quote(source), *([BEARER] if needs_token else []), "|\n "]
    return " ".join([*fetch, *post, "--data-binary @-"])


# --- Pages ---------------------------------------------------------------------------------------
#
# Computes the values that templates show. `list_page`, `delivery_page`, `constraints_page`,
# `samples_page` and `error_page` take a `PageContext` and return `Html`. They are pure functions,
# except that samples and replies get new ids. Links are relative, so that pages work behind any
# reverse proxy.
# Must not know: requests, the store, the log.

MAX_LINES = 2000  # of a payload that are shown
BY_SPEC = {pattern.spec: pattern.name for pattern in PATTERNS}  # an embedded Offer has its own
OUTCOME = ("status", "direction", "warnings")  # the members of a query that `TOTALS` set
json_text = functools.partial(json.dumps, ensure_ascii=False)
Values = dict[str, Any]  # for a template


class PageContext(NamedTuple):
    """The facts about the inbox and the reader that every page needs."""

    root: str  # the relative URL of `/`
    base: str  # the absolute URL of `/`, without the slash
    query: Query = Query()  # the deliveries that the reader looks through
    mode: bool | str = True  # VALIDATE_INCOMING, one of the MODES
    token: bool = False  # whether requests need a token
    may_send: bool = True  # whether the reader may send from here

    def url(self, path: str = "", **changes: str) -> str:
        """Return the URL of a page, with the query of the reader, changed."""
        query = self.query._replace(**{"before": "", **changes})._asdict()
        values = {name: value for name, value in query.items() if value}
        return self.root + path + ("?" + urlencode(values, errors="replace") if values else "")

    def rules_url(self, pattern: str | None) -> str:
        """Return the URL of the page about the rules of a pattern."""
        return f"{self.root}constraints?{urlencode({'pattern': pattern or ''})}"


def render_page(
    context: PageContext, template: str, values: Values, tab: str = "", stream: str = ""
) -> Html:
    """Make a page; its script renews it when the event stream `stream` has a delivery."""
    root, values = context.root, {**context._asdict(), **values}
    tabs = {"Deliveries": root, "Samples": f"{root}samples", "Constraints": f"{root}constraints"}
    values["content"] = render(template, **values)
    values |= {"tabs": choices(tabs, tab), "address": copies({"Copy": f"{context.base}/inbox"})}
    values |= {"style": Html(STYLE), "script": Html(SCRIPT), "stream": stream}
    return render("page", **values)


def choices(urls: Mapping[str, str], chosen: str) -> list[Values]:
    """Make links or options by name, and mark the chosen one."""
    return [{"name": name, "url": url, "chosen": name == chosen} for name, url in urls.items()]


def copies(texts: Mapping[str, str]) -> list[Values]:
    """Make buttons that copy texts, by their labels, unless that would double a large page."""
    short = {label: text for label, text in texts.items() if len(text) <= MAX_COPY}
    return [{"label": label, "copy": whole(text)} for label, text in short.items()]


def filters(context: PageContext, *names: str) -> list[Values]:
    """Return the members of the query that are set, each with a link that removes it."""
    members = {name: value for name, value in context.query._asdict().items() if value}
    return [
        {"name": name, "value": members[name], "url": context.url(**{name: ""})}
        for name in names
        if name in members
    ]


def with_code(text: str) -> Html:
    """Escape a text, and show the parts between backticks as code."""
    return Html(re.sub("`([^`]*)`", r"<code>\1</code>", escape(text)))


def view_delivery(context: PageContext, delivery: Delivery) -> Values:
    """Return the members of a delivery, and the texts and links that templates show for it."""
    kind, chip = chip_of(delivery)
    subject, about = subject_of(delivery)
    host, sent = host_of(delivery.peer or delivery.client), delivery.direction == "out"
    phrase = http.client.responses.get(delivery.status, "") if kind == "E" else ""
    has_reason = delivery.simulated or (sent and delivery.detail)
    told = () if has_reason else delivery.findings
    messages = [finding.message.replace("`", "") for finding in told]
    return {
        **delivery._asdict(),
        "kind": kind,
        "chip": chip,
        "sent": sent,
        "by": {"page": "hand"}.get(delivery.via, delivery.via) if sent else "",
        "host": clip(host, 100),
        "subject": subject,
        "about": about,
        "page": subject if is_http_uri(subject) else "",  # another scheme could run a script
        "why": clip(messages[0] if messages else delivery.detail or phrase, 300),
        "more": len(messages[1:]),
        "utc": delivery.time[:19].replace("T", " "),
        "minute": delivery.time[5:16].replace("T", " "),
        "url": context.url(f"deliveries/{delivery.name}"),
        "peer_url": delivery.peer and context.url(origin=host),
        "day_url": context.url(day=delivery.time[:10]),
    }


# The list


def outcome_of(query: Query) -> dict[str, str]:
    """Return the members of a query that `TOTALS` set."""
    return {name: getattr(query, name) for name in OUTCOME}


def current_total(query: Query) -> str:
    """Return the name in `TOTALS` of the outcome that a query selects; empty if it has none."""
    names = [name for name, each in TOTALS.items() if outcome_of(each) == outcome_of(query)]
    return names[0] if names else ""


def list_page(context: PageContext, deliveries: Sequence[Delivery], totals: Totals) -> Html:
    """Show the deliveries that a query selects, newest first; before the first one, a welcome.

    One delivery more than the query's page length means that there are older ones.
    """
    if not totals.all:
        return empty_page(context)
    query, shown = context.query, deliveries[: context.query.page_length]
    rows, current = [view_delivery(context, each) for each in shown], current_total(query)
    hidden = ("limit", "before", *(OUTCOME if current else ()))
    values = {
        **query._asdict(),
        "title": "Deliveries",
        "totals": [
            {"name": name, "text": name.replace("_", " ").capitalize(), "count": f"{count:,}"}
            | {"chosen": name == current, "url": context.url(**outcome_of(TOTALS[name]))}
            for name, count in totals._asdict().items()
        ],
        "menu": choices(dict.fromkeys(RULES, ""), query.pattern),
        "origins": sorted({host_of(each.peer) for each in shown if each.peer}),
        "kept": filters(context, *OUTCOME, "since", "day"),
        "active": filters(context, *(name for name in Query._fields if name not in hidden)),
        "rows": rows,
        "newest": rows[:1],
        "start": query.before and context.url(),
        "older": deliveries[len(shown) :] and context.url(before=shown[-1].name),
        "shown": f"{len(shown)} of {totals.all:,}",
    }
    stream = context.url("deliveries", limit="", since="")
    return render_page(context, "list", values, "Deliveries", stream)


def empty_page(context: PageContext) -> Html:
    """Show how to send a first notification."""
    post = [f"curl -i -H 'Content-Type: {JSON_LD}'", shlex.quote(f"{context.base}/inbox")]
    post += [BEARER] if context.token else []
    command = piped_command(f"{context.base}/samples/Request%20Review", post, context.token)
    values = {
        "title": "Deliveries",
        "command": whole(command),
        "copies": copies({"Copy": command}),
        "document": render_document(sample_here(context.base)),
        "menu": choices(dict.fromkeys(RULES, ""), "Request Review"),
    }
    return render_page(context, "empty", values, "Deliveries", context.url("deliveries"))


# A delivery


def delivery_page(
    context: PageContext,
    delivery: Delivery,
    conversation: Sequence[Delivery],
    beside: tuple[str, str] = ("", ""),
    reply_pattern: str = "Accept",
) -> Html:
    """Show a delivery: its payload, its findings, the answer, and its conversation.

    The delivery has its body, unless that was removed, and the body of the answer. `conversation`
    has the oldest delivery first; `beside` are the names of the newer and the older delivery;
    `reply_pattern` is that of the reply to write.
    """
    numbered = view_findings(context, delivery)
    typed = "content-type" in map(str.lower, delivery.headers)
    head = [each for each in numbered if typed and each["code"].startswith("content-type")]
    rest = [each for each in numbered if each not in head]
    document = delivery.notification
    payload = render_text(delivery.body) if document is None else render_document(document, rest)
    if is_unsent(delivery):
        payload = render("text", text="", note="Nothing was sent.")
    values = {
        **view_delivery(context, delivery),
        "title": f"{chip_of(delivery)[1]} {delivery.pattern or ''}",
        "clean": not numbered,
        "omitted": delivery.omitted and f"{delivery.omitted:,}",
        "levels": group_by_level(numbered),
        "rules": context.rules_url(delivery.pattern),
        "marked": document is not None,
        "payload": payload,
        **view_beside(context, *beside),
        **view_fate(delivery),
        **view_exchange(delivery, head),
        **view_conversation(context, delivery, conversation),
        **view_forms(context, delivery, reply_pattern),
    }
    related = delivery.about.get("inReplyTo") or delivery.about.get("id")
    stream = context._replace(query=Query(q=related)).url("deliveries") if related else ""
    return render_page(context, "delivery", values, "Deliveries", stream)


def view_beside(context: PageContext, newer: str, older: str) -> Values:
    """Link to the list that the reader came from, and to the neighbours of the delivery there."""
    name = (current_total(context.query) or "deliveries").replace("_", " ").capitalize()
    urls = [each and context.url(f"deliveries/{each}") for each in (newer, older)]
    return {"list": name, "list_url": context.url(), "newer": urls[0], "older": urls[1]}


def view_fate(delivery: Delivery) -> Values:
    """Say where a delivery came from or went to, and whether it is stored."""
    if delivery.direction == "out":
        how = "Not sent" if is_unsent(delivery) else "Sent"
        return {"how": how, "where": f"to {delivery.target or 'nobody'}"}
    not_stored = {"E": "no; correct it and send it again", "none": "no; send it again"}
    stored = "no longer: it was removed" if delivery.body is None else f"`{delivery.name}`"
    stored = with_code(not_stored.get(chip_of(delivery)[0], stored))
    how, where = "Received", f"from {delivery.client}"
    if delivery.via == "adopted":
        how, where = "Found", "in the store"
    return {"how": how, "where": where, "stored": stored}


def view_findings(context: PageContext, delivery: Delivery) -> list[Values]:
    """Number the findings; the ones that the delivery was refused for come first."""
    shown = []
    for number, finding in enumerate(delivery.findings, 1):
        member = finding.pointer.rpartition("/")[2]
        written = re.search(rf'"{re.escape(member)}": [^`]+', finding.fix)
        view: Values = {
            "number": number,
            "refused": number <= delivery.errors,
            "rule": "" if finding.code == "coarnotify" else finding.code,
            "rules": context.rules_url(BY_SPEC.get(finding.spec, delivery.pattern)),
            "fault": with_code(finding.fault),
            "advice": with_code(finding.fix[:1].upper() + finding.fix[1:]),
            "missing": written[0] if written else f"{json_text(member)}: …",
            "named": bool(finding.refused_by),
            "refused_by": list(finding.refused_by),
            "spec": finding.spec if is_http_uri(finding.spec) else "",
        }
        shown.append({**finding._asdict(), **view})
    return shown


def group_by_level(numbered: Sequence[Values]) -> list[Values]:
    """Group findings by level, and by whether the delivery was refused for them."""
    groups = []
    for key, found in itertools.groupby(numbered, operator.itemgetter("refused", "level")):
        (refused, level), items = key, list(found)
        meaning = "refused here" if refused else "a warning here"
        count = counted(len(items), WORDS.get(level, str(level)))
        groups.append({"level": level, "count": count, "meaning": meaning, "items": items})
    return groups


def render_line(kind: str, text: str, found: Sequence[Values] = (), key: str = "") -> Html:
    """Write a line of a document or of a head, with the numbers of its findings."""
    level = found[0]["level"] if found else ""
    return render(kind, key=key, text=text, level=level, refs=list(found))


def render_document(document: Any, numbered: Sequence[Values] = ()) -> Html:
    """Show a document as JSON that can be folded, marked with the numbers of the findings."""
    found = [(each["pointer"].split("/")[1:], each) for each in numbered]
    lines = list(itertools.islice(outline(document, found), MAX_LINES + 1))
    shown = "".join(lines[:MAX_LINES])
    if len(lines) > MAX_LINES:
        rest = [each for each in numbered if f'id="at-{each["number"]}"' not in shown]
        shown += render_line("leaf", f"… only {MAX_LINES} lines are shown", rest)
        shown += "</details>" * (shown.count("<details") - shown.count("</details"))
    return render("document", lines=Html(shown))


def outline(
    value: Any, found: Sequence[tuple[list[str], Values]], key: str = "", comma: str = ""
) -> Iterator[Html]:
    """Yield the lines of a document; missing members come before the first nested object.

    Each finding comes with the rest of the path to its member.
    """
    children: dict[str, Any] = value if isinstance(value, dict) else {}
    if isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
        children = {str(index): each for index, each in enumerate(value)}
    here: list[Values] = []
    below: dict[str, list[tuple[list[str], Values]]] = {}
    missing: dict[str, list[Values]] = {}
    for path, finding in found:
        if path and path[0] in children:
            below.setdefault(path[0], []).append((path[1:], finding))
        elif len(path) == 1 and isinstance(value, dict):
            missing.setdefault(path[0], []).append(finding)
        else:
            here.append(finding)
    if not children and not missing:
        yield render_line("leaf", json_text(value) + comma, here, key)
        return
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    yield render_line("open", opening, here, key)
    for number, (name, child) in enumerate(children.items(), 1):
        if isinstance(child, dict):
            for each in missing.values():
                yield render_line("missing", each[0]["missing"] + ",", each)
            missing = {}
        shown = json_text(name) if isinstance(value, dict) else ""
        after = "," if number < len(children) else ""
        yield from outline(child, below.get(name, []), shown, after)
    for each in missing.values():
        yield render_line("missing", each[0]["missing"], each)
    yield render_line("close", closing + comma)


def render_text(body: bytes | None) -> Html:
    """Show any bytes as lines of text, as far as a page can hold them."""
    text = (body or b"").decode("utf-8", "backslashreplace").replace("\r\n", "\n")
    lines = text.split("\n", MAX_LINES)
    if len(lines) > MAX_LINES:
        lines[MAX_LINES] = f"… only {MAX_LINES} lines are shown"
    note = "It is no longer stored: it was removed." if body is None else "Nothing of it was read."
    return render("text", text=Html("\n".join(map(escape, lines))), note=note)


def view_exchange(delivery: Delivery, head: Sequence[Values]) -> Values:
    """Show the request, whose body is the payload, and its answer; an adopted file has neither."""
    phrase, answer = http.client.responses.get(delivery.status, ""), delivery.answer_body or b""
    status = f"{delivery.status} {phrase}" if delivery.status else "no answer"
    size = answer and f"{len(answer):,}"
    with contextlib.suppress(ValueError):
        answer = json_text(parse(answer), indent=2).encode()
    return {
        "exchanged": not (delivery.via == "adopted" or is_unsent(delivery)),
        "request": render_head(f"{delivery.method} {delivery.target}", delivery.headers, head),
        "took": f"after {in_words(delivery.seconds)}" if delivery.seconds else "",
        "answer": render_head(status, delivery.answer_headers),
        "size": size,
        "answered": render_text(answer),
    }


def render_head(start: str, headers: Mapping[str, Any], found: Sequence[Values] = ()) -> Html:
    """Show the head of a message; findings about its media type are marked."""
    lines = [render_line("field", start)]
    for name, value in headers.items():
        marks = found if name.lower() == "content-type" else ()
        lines.append(render_line("field", f"{name}: {value}", marks))
    return Html("".join(lines))


def view_conversation(
    context: PageContext, delivery: Delivery, conversation: Sequence[Delivery]
) -> Values:
    """Show a conversation in the order of time; repeated attempts are folded into one entry."""
    conversation = sorted(map(began, conversation), key=lambda each: each.time)
    asked, ids = delivery.about.get("inReplyTo"), {each.about.get("id") for each in conversation}
    entries: list[Values] = []
    before = ""
    for _, group in itertools.groupby(
        conversation, lambda each: (each.direction, each.pattern, each.about.get("id", each.name))
    ):
        attempts: list[Values] = []
        earlier = ""
        for each in group:
            shown = {**view_delivery(context, each), "here": each.name == delivery.name}
            later = between(earlier, each.time)
            attempts.append({**shown, "text": shown["chip"], "later": later})
            earlier = each.time
        last = {**attempts[-1], "text": each.pattern or "No pattern", "attempts": attempts}
        last["failed"] = last["sent"] and last["kind"] == "E"
        count = len(attempts) if attempts[1:] else 0
        entries.append({**last, "later": between(before, earlier), "count": count})
        before = earlier
    values = {"id": delivery.about.get("id"), "asked": asked, "unknown": asked and asked not in ids}
    if len(conversation) < 2:
        return {**values, "summary": "", "entries": []}
    sent = sum(each.direction == "out" for each in conversation)
    later = between(conversation[0].time, before)
    span = f", the last {later}" if later else ""
    summary = f"{len(conversation) - sent} received, {sent} sent{span}"
    return {**values, "summary": summary, "entries": entries}


def view_forms(context: PageContext, delivery: Delivery, pattern: str) -> Values:
    """Offer to copy a delivery, to send it again, and to reply if it is an Offer."""
    if delivery.body is None:
        return {}
    url, body = f"deliveries/{delivery.name}", delivery.body
    texts = {
        "Copy as curl": curl_command(delivery, context.base, context.token),
        "Copy JSON": body.decode("utf-8", "backslashreplace"),
        "Copy link": f"{context.base}/{url}",
    }
    values: Values = {"copies": copies(texts), "raw": f"{context.root}{url}/body"}
    if not context.may_send:
        return values
    with contextlib.suppress(ValueError):
        answer = reply(parse(body if len(body) <= MAX_COPY else b""), pattern)
        values["reply"] = whole(json_text(answer, indent=2))
        values["inbox"] = lookup(answer, "target.inbox")
    return {
        **values,
        "kept": filters(context, *Query._fields),
        "menu": choices({each.name: "" for each in REPLY_PATTERNS}, pattern),
        "again": delivery.target if delivery.direction == "out" else f"{context.base}/inbox",
    }


# Constraints, samples, errors


def sample_here(base: str, pattern: str = "Request Review") -> dict[str, Any]:
    """Return a new notification of a pattern for the inbox at a base URL."""
    return sample(pattern, target={"id": f"{base}/", "inbox": f"{base}/inbox", "type": "Service"})


def view_sample(context: PageContext, pattern: str) -> Values:
    """Show a valid notification of a pattern, for this inbox."""
    document = sample_here(context.base, pattern)
    return {
        "name": pattern,
        "anchor": pattern.lower().replace(" ", "-"),
        "copies": copies({"Copy JSON": json.dumps(document, indent=2)}),
        "document": render_document(document),
        "rules": context.rules_url(pattern),
    }


def constraints_page(context: PageContext, pattern: Pattern) -> Html:
    """Show the rules of a pattern by member, with a valid notification beside them."""
    groups: dict[str, list[Values]] = {}
    for rule in constraints_of(pattern):
        name, _, below = rule["member"].partition(".")
        verb, _, rest = rule["demand"].partition(" ")  # completes "the member must"
        verb = {"be": "is", "have": "has"}.get(verb, verb + "s")
        shown = {
            "below": below,
            "word": WORDS[rule["level"]],
            "demand": with_code(f"{verb} {rest}"),
        }
        groups.setdefault(name, []).append({**rule, **shown})
    levels = () if context.mode == "coarnotify" else MODES[context.mode]
    refused = [WORDS[level] for level in levels]
    if context.mode not in (True, False, "strict"):
        refused.append(f"whatever {context.mode} refuses")
    values = {
        **view_sample(context, pattern.name),
        "title": pattern.name,
        "spec": pattern.spec,
        "count": sum(map(len, groups.values())),
        "refused": ", ".join(refused) or "none of them",
        "patterns": choices({name: context.rules_url(name) for name in RULES}, pattern.name),
        "groups": [
            {"group": name or "The notification", "rules": rules} for name, rules in groups.items()
        ],
    }
    return render_page(context, "constraints", values, "Constraints")


def samples_page(context: PageContext) -> Html:
    """Show a valid notification of each pattern."""
    samples = [view_sample(context, name) for name in RULES]
    patterns = choices({each["name"]: f"#{each['anchor']}" for each in samples}, "")
    values = {"title": "Samples", "samples": samples, "patterns": patterns}
    return render_page(context, "samples", values, "Samples")


def error_page(context: PageContext, status: int, detail: str) -> Html:
    """Say what went wrong, and where to go from there."""
    title = f"{status} {http.client.responses.get(status, 'Error')}"
    return render_page(context, "error", {"title": title, "detail": detail})


PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with "no-referrer", forms would come from the origin null
    "Cache-Control": "no-store",
}


def html_response(page: Html, headers: Mapping[str, str] = {}, status: int = 200) -> Response:
    """Answer with a page."""
    return Response(status, page.encode(), {**PAGE_HEADERS, **headers})


# --- Access --------------------------------------------------------------------------------------
#
# Decides who may ask. `check_head` refuses a request by its host, its token, or the site of the
# page that sent it, before its body is read. `allowed_origin` applies CORS_ORIGINS, `is_loopback`
# tells which hosts are this machine, and `quality` reads the preferences of an Accept header.
# Must not know: resources, bodies.

CORS_RESOURCES = re.compile(rf"/inbox(/({NAME})?)?")  # what pages of CORS_ORIGINS may use
CORS_METHODS = ("GET", "HEAD", "POST", "OPTIONS")
SAFE = ("GET", "HEAD", "OPTIONS")  # methods that change nothing


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether a host, by its name or IP address, can only be this machine."""
    name = host.lower().rstrip(".")
    ip = ip_address(name) or ip_address(f"[{name}]")
    return ip.is_loopback if ip else name in ("", "localhost") or name.endswith(".localhost")


def authority(url: str) -> str:
    """Return the host of a URL, with its port unless that is 80 or 443."""
    host = url.lower().partition("//")[2].partition("/")[0].rpartition("@")[2]
    return re.sub(":(80|443)$", "", host)


def is_preflight(request: Request) -> bool:
    """Whether it is the preflight of a browser for a page of another site (Fetch section 4.8)."""
    return request.method == "OPTIONS" and "access-control-request-method" in request.headers


def check_head(request: Request, server: InboxServer) -> None:
    """Raise `Problem` for a request that must not go on, before its body is read."""
    check_host(request, server)
    if request.target.partition("?")[0] != "/health" and not is_preflight(request):
        check_token(request, server.settings.TOKEN)
    check_site(request, server)


def check_host(request: Request, server: InboxServer) -> None:
    """Refuse a request without a Host header, or for a host that is not this inbox."""
    if "host" not in request.headers and not request.is_http10:  # RFC 9112 section 3.2
        raise Problem(400, f"the Host header is missing; {request.version} requires it")
    header, match = request.headers.get("host", ""), HOST.fullmatch(request.host)
    if not match or (header != request.host and not HOST.fullmatch(header)):
        raise Problem(400, "the Host header is malformed")
    if not answers_to(match[1], str(server.server_address[0]), server.settings.BASE_URL):
        cause = f"an inbox on loopback does not answer to {clip(request.host, 200)}"
        raise Problem(421, f"{cause}; set BASE_URL to its URL")


def answers_to(host: str, address: str, base_url: str | None) -> bool:
    """Whether a request may be for `host`: on loopback, only for a loopback name or BASE_URL.

    Otherwise a web page could have its own host name resolve to loopback (DNS rebinding).
    """
    if is_loopback(host) or not is_loopback(address):
        return True
    known = urlsplit(base_url or "").hostname or ""
    return host.lower().rstrip(".").strip("[]") == known.rstrip(".")


# Two lines, because some clients read only the first challenge of a line.
CHALLENGES = {
    "WWW-Authenticate": 'Bearer realm="coarinbox"',
    "Www-Authenticate": 'Basic realm="coarinbox", charset="UTF-8"',
}


def check_token(request: Request, token: str | None) -> None:
    """Demand TOKEN as a Bearer token (RFC 6750) or a Basic password (RFC 7617)."""
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    data = (
        given.strip().encode("latin-1") if scheme.lower() in ("bearer", "token", "basic") else b""
    )
    if scheme.lower() == "basic":
        try:
            data = base64.b64decode(data).partition(b":")[2]
        except ValueError:
            data = b""
    if not hmac.compare_digest(data, token.encode()):
        detail = "the token is missing or wrong; send it with Bearer, or as the password of Basic"
        raise Problem(401, detail, CHALLENGES)


def allowed_origin(request: Request, allowed: Collection[str]) -> str | None:
    """Return the origin of the page that sent a request, if CORS_ORIGINS allows the request."""
    origin = request.headers.get("origin")
    if origin is None or not (origin.lower() in allowed or "*" in allowed):
        return None
    fits = CORS_RESOURCES.fullmatch(request.target.partition("?")[0])
    method = request.method
    if is_preflight(request):
        method = request.headers["access-control-request-method"]
    return origin if fits and method in CORS_METHODS else None


def is_foreign(request: Request, server: InboxServer) -> bool:
    """Whether the page of another origin has sent a request."""
    origin, ours = request.headers.get("origin"), (f"//{request.host}", server.base)
    return origin is not None and authority(origin) not in map(authority, ours)


def check_site(request: Request, server: InboxServer) -> None:
    """Refuse changes by a page of another site (Fetch Metadata, RFC 6454)."""
    if request.method in SAFE or allowed_origin(request, server.allowed_origins):
        return
    site, origin = request.headers.get("sec-fetch-site", "none"), request.headers.get("origin")
    if is_foreign(request, server) or site not in ("same-origin", "none"):
        cause = f"pages of {clip(origin or f'another site ({site})', 200)} may not do this"
        raise Problem(403, f"{cause}; CORS_ORIGINS may allow them to POST, or set BASE_URL")


def quality(media_type: str, accept: str) -> float:
    """Weigh a media type, from 0 to 1, by an Accept header (RFC 9110 section 12.5.1)."""
    weights: dict[str, float] = {}
    # Browsers send some 200 characters; parsing thousands of types would hold up other clients.
    for element in re.sub('"[^"]*"', "", accept[:2000].lower()).split(","):
        name, *parameters = (part.strip() for part in element.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "")
        known = re.fullmatch(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?", weight)
        weights[name] = max(weights.get(name, 0.0), float(weight) if known else 1.0)
    for name in (media_type, media_type.partition("/")[0] + "/*", "*/*"):
        if name in weights:
            return weights[name]
    return 0.0


# --- Resources -----------------------------------------------------------------------------------
#
# `InboxHandler` answers one `Request`. `ROUTES` maps a path and a verb to the method of the handler
# that answers. A method that has to wait is a generator: `name = yield Commit(body)` reads like a
# call that blocks, and the event loop resumes it with the result.
# Must not know: sockets, threads.


class Route(NamedTuple):
    """How a resource answers a method, and which parameters the URL may have."""

    function: Callable[..., Steps | None]  # takes the handler, the parameters, parts of the path
    parameters: Parameters


ROUTES: dict[re.Pattern[str], dict[str, Route]] = {}


def route(
    method: str, path: str, parameters: Parameters = {}
) -> Callable[[Callable[..., Steps | None]], Callable[..., Steps | None]]:
    """Enter a method of `InboxHandler` into `ROUTES`."""

    def enter(function: Callable[..., Steps | None]) -> Callable[..., Steps | None]:
        ROUTES.setdefault(re.compile(path), {})[method] = Route(function, parameters)
        return function

    return enter


INBOX = "/inbox/?"
LDP_CONTEXT = {"ldp": "http://www.w3.org/ns/ldp#"}
PAGE_PARAMETERS = {
    **QUERY_PARAMETERS,
    "reply": ("|".join(pattern.name for pattern in REPLY_PATTERNS), "a pattern of a reply"),
}


@functools.lru_cache(maxsize=2)  # most requests of a second need the same
def http_date(second: int) -> str:
    """Format a time in seconds since 1970 for HTTP (RFC 9110 section 5.6.7)."""
    return formatdate(second, usegmt=True)


MAX_INDENTED = 65536  # characters of a body that DEBUG indents
MAX_SHOWN = 1000  # lines of a request that DEBUG logs


class InboxHandler(http.server.BaseHTTPRequestHandler):
    """Answers one request, complete or not. Its methods raise `Problem` for an HTTP error."""

    protocol_version = "HTTP/1.1"
    server_version = f"coarinbox/{__version__}"
    server: InboxServer
    request: Request

    def __init__(self, request: Request, client_address: Any, server: InboxServer) -> None:
        # Do not call the base class: it would read from a socket, and block, until the connection
        # ends; and its parser is lenient, see Messages.
        self.request, self.client_address, self.server = request, client_address, server
        self.requestline, self.request_version = clip(request.line, 1000), request.version
        self.command, self.path = request.method, request.target
        self.headers = request.headers  # type: ignore[assignment]
        self.resource, _, self.query = request.target.partition("?")
        self.close_connection = request.unread or not request.keeps_alive or server.closing
        self.output = b""
        self.answered: Response | None = None
        self.rest: Iterator[bytes] | Events | None = None  # of the answer, if it is not in `wfile`

    # How every request is answered

    def respond(self) -> Steps:
        """Answer the request. Exceptions end here."""
        request = self.request
        try:
            if self.server.settings.DEBUG and request.approved:
                self.log_exchange()
            if request.problem:
                raise request.problem
            method = getattr(self, f"do_{self.command}", self.do_GET)
            yield from method() or ()
        except ConnectionAbortedError:
            self.close_connection = True  # the client would mistake the next answer for this one
            self.log_message("the client has left")
        except Problem as problem:
            self.fail(problem)
        except OSError as error:
            LOG.error("the store failed: %s", error)
            self.fail(store_problem(error))
        except Exception as error:
            self.server.report_bug(error)
            self.fail(Problem(500, "a bug of the inbox; its log says more"))

    def do_GET(self) -> Steps | None:
        """Call the method that `ROUTES` has for the resource and the verb."""
        methods, parts = self.find_resource()
        entry = methods.get("GET" if self.command == "HEAD" else self.command)
        if not entry:
            works, advice = allow(methods), f"POST notifications to {self.inbox}"
            detail = advice if self.command in ("POST", "PUT") else f"{works} do"
            raise Problem(405, f"{self.command} does not work here; {detail}", {"Allow": works})
        return entry.function(self, self.parameters(entry.parameters), **parts)

    do_HEAD = do_POST = do_DELETE = do_GET

    def do_OPTIONS(self) -> None:
        """List the methods of a resource (RFC 9110 section 9.3.7), also for a preflight."""
        methods = {} if self.path == "*" else self.find_resource()[0]
        known: dict[str, tuple[str, str]] = {}
        for entry in methods.values():
            known.update(entry.parameters)
        self.parameters(known)
        headers = {"Allow": allow(methods)}
        if self.is_inbox:
            headers["Accept-Post"] = ACCEPT_POST
        if is_preflight(self.request) and allowed_origin(self.request, self.server.allowed_origins):
            headers["Access-Control-Allow-Methods"] = ", ".join(CORS_METHODS)
            headers["Access-Control-Allow-Headers"] = "Content-Type, Authorization, Slug"
        self.answer(Response(204, headers=headers))

    def find_resource(self) -> tuple[Mapping[str, Route], dict[str, str]]:
        """Return the routes of the resource, and the named parts of its path. Raises `Problem`."""
        for path, methods in ROUTES.items():
            match = path.fullmatch(self.resource)
            if match:
                return methods, match.groupdict()
        detail = "nothing is here; see /, /inbox, /deliveries, /samples and /constraints"
        if self.is_delivery:
            detail = f"no inbox is here; POST notifications to {self.inbox}"
        prefix = urlsplit(self.server.base).path
        if prefix and self.resource.startswith(f"{prefix}/"):
            detail = f"the proxy has to remove {prefix}, the path of BASE_URL, from the request"
        raise Problem(404, detail)

    def parameters(self, known: Parameters) -> dict[str, str]:
        """Read the query of the URL. Raises `Problem` for an unknown parameter or value."""
        try:
            return parse_query(self.query, known)
        except ValueError as error:
            raise Problem(400, str(error)) from error

    def answer(self, response: Response) -> None:
        """Write the head, and the body if it is bytes; the connection sends any other body."""
        self.answered = response._replace(headers=self.all_headers(response))
        status, headers = response.status, self.answered.headers
        self.log_request(status)
        lines = [
            f"{self.protocol_version} {status} {http.client.responses.get(status, '')}",
            f"Server: {self.server_version}",
            f"Date: {http_date(int(time.time()))}",
            *[f"{name}: {value}" for name, value in headers.items()],
        ]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        # A line break in a value would let a client inject headers, or a second response.
        if not head.count(b"\r") == head.count(b"\n") == len(lines) + 1:
            raise ValueError("a line break in a header")
        self.output = head
        if self.command == "HEAD" or status in BODILESS:
            return
        if isinstance(response.body, bytes):
            self.output += response.body
        else:
            self.rest = response.body

    def all_headers(self, response: Response) -> dict[str, str]:
        """Complete the headers of an answer."""
        fixed = {"Vary": "Accept, Origin", "X-Content-Type-Options": "nosniff"}
        headers = {**response.headers, **fixed}
        if self.is_inbox:
            constrained = f'<{self.base}/constraints>; rel="http://www.w3.org/ns/ldp#constrainedBy"'
            headers["Link"] = (
                f"{headers['Link']}, {constrained}" if "Link" in headers else constrained
            )
        origin = allowed_origin(self.request, self.server.allowed_origins)
        if origin:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "Location, Link, Retry-After"
        if isinstance(response.body, bytes):
            if response.status not in BODILESS:
                headers["Content-Length"] = str(len(response.body))
        elif self.request.is_http10:
            self.close_connection = True  # which ends the body
        else:
            headers["Transfer-Encoding"] = "chunked"
        headers["Connection"] = "close" if self.close_connection else "keep-alive"
        return headers

    def fail(self, problem: Problem) -> None:
        """Answer with a problem, and log a delivery if the request tried to deliver."""
        if self.is_delivery:
            self.deliver(Verdict(problem))
        else:
            self.request.problem = problem
            self.log_message("%s", clip(problem.detail, 300))
            self.send_error(problem.status, problem.detail)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Write a problem, as a document or, for people, a page. All problems go through here."""
        problem = self.request.problem or Problem(code, message or "")
        # Their frames refer to the request, and would keep it in memory.
        problem.__traceback__ = problem.__context__ = problem.__cause__ = None
        response = problem.response()
        if self.prefers("text/html"):
            page = error_page(self.context(), code, problem.detail)
            response = html_response(page, problem.headers, code)
        self.answer(response)

    def deliver(self, verdict: Verdict, name: str = "") -> Delivery:
        """Answer a delivery, and log it before the answer is sent."""
        problem = self.request.problem = verdict.problem
        if problem is None:
            status = self.server.settings.RESPONSE_STATUS
            self.answer(accepted(verdict.known, f"{self.inbox}/{name}", status))
        elif problem.status:
            self.send_error(problem.status, problem.detail)
        else:
            self.close_connection = True
        response = self.answered or Response(0)
        delivery = conclude(self.request, verdict, self.client_address[0], name, response)
        return self.server.record(delivery)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log a request, except deliveries, health checks, and the polling of open pages."""
        if self.is_delivery or self.resource == "/health":
            return
        # The browser hides the answer from such a page, so the log gives the reason.
        if self.command in SAFE and is_foreign(self.request, self.server):
            origin = clip(self.request.headers["origin"], 200)
            if not allowed_origin(self.request, self.server.allowed_origins):
                self.log_message("CORS_ORIGINS does not allow pages of %s to do this", origin)
        by_script = self.request.headers.get("sec-fetch-dest") == "empty" and self.command == "GET"
        if not by_script or self.server.settings.DEBUG:
            super().log_request(code, size)

    def log_exchange(self) -> None:
        """Log the headers and the body of a request; a JSON body is indented."""
        self.log_message("%s", self.requestline)
        lines = [f"{name}: {value}" for name, value in self.request.shown_fields().items()]
        text = self.request.body.decode("utf-8", "backslashreplace")
        if len(text) <= MAX_INDENTED:
            with contextlib.suppress(ValueError):
                text = json.dumps(parse(bytes(self.request.body)), indent=2, ensure_ascii=False)
        lines += text.split("\n") if text else []
        if len(lines) > MAX_SHOWN:
            lines[MAX_SHOWN:] = [f"and {len(lines) - MAX_SHOWN:,} more lines"]
        for line in lines:
            self.log_message("  %s", line)

    def log_message(self, format: str, *args: Any) -> None:
        """Log a line with the address of the client, as the base class does to standard error."""
        # Escape control characters, so that a client cannot forge lines of the log.
        LOG.info("%s %s", self.client_address[0], escape_controls(format % args))

    # What a request says

    @property
    def is_inbox(self) -> bool:
        """Whether the request is for the inbox itself."""
        return self.resource in ("/inbox", "/inbox/")

    @property
    def is_delivery(self) -> bool:
        """Whether the request tries to deliver a notification, perhaps to a wrong path."""
        elsewhere = self.resource.startswith("/deliveries/") and self.resource.endswith("/send")
        return self.is_inbox if self.command == "PUT" else self.command == "POST" and not elsewhere

    @property
    def base(self) -> str:
        """The base URL as the client sees it, without a trailing slash."""
        if self.server.settings.BASE_URL or not (self.request.approved and self.request.host):
            return self.server.base
        return f"{self.server.scheme}://{self.request.host}"

    @property
    def inbox(self) -> str:
        """The URL of the inbox as the client sees it."""
        return f"{self.base}/inbox"

    def context(self, query: Query = TOTALS["all"]) -> PageContext:
        """Return the context of a page. Links are relative: pages work behind any proxy."""
        root, settings = "../" * (self.resource.count("/") - 1) or "./", self.server.settings
        mode, token = settings.VALIDATE_INCOMING, settings.TOKEN is not None
        return PageContext(root, self.base, query, mode, token, self.is_user)

    def prefers(self, media_type: str) -> bool:
        """Whether the client prefers a media type to JSON."""
        accept = self.request.headers.get("accept", "*/*")
        data = max(quality(JSON_LD, accept), quality("application/json", accept))
        return quality(media_type, accept) > data

    # The inbox

    @route("POST", INBOX, FAILURE_PARAMETERS)
    def post_inbox(self, values: Mapping[str, str]) -> Steps:
        """Take a notification in (LDN section 3.3.2); a 2xx is a promise that it is stored."""
        try:
            failure = Failure.from_values(values)
        except ValueError as error:
            raise Problem(400, str(error)) from error
        settings, name = self.server.settings, ""
        requested = f"{self.server.scheme}://{self.request.host}{self.resource}"
        here = [f"{self.base}{self.resource}", f"{self.server.base}/inbox", requested]
        failures = functools.partial(self.server.failures.pop, failure)
        mode, known_as = settings.VALIDATE_INCOMING, self.server.ledger.known_as
        verdict = judge(self.request, mode, here, known_as, failures)
        if verdict.failure:
            verdict = yield from self.simulate(verdict, verdict.failure)
        if not verdict.problem:
            try:
                name = yield Commit(bytes(self.request.body))
            except OSError as error:
                LOG.error("the store failed: %s", error)
                verdict = verdict._replace(problem=store_problem(error))
        delivery = self.deliver(verdict, name)
        if name:
            self.reply(delivery)

    def simulate(self, verdict: Verdict, failure: Failure) -> Generator[Pause, None, Verdict]:
        """Wait as long as a simulated failure says; returns the verdict with its problem."""
        try:
            if failure.delay:
                yield Pause(failure.delay)
            return verdict._replace(problem=simulated(failure, self.inbox))
        except ConnectionAbortedError:
            return verdict._replace(problem=Problem(0, "the client left during a simulated delay"))

    def reply(self, delivery: Delivery) -> None:
        """Start the REPLIES to an Offer; an Undo Offer cancels those that are still to come."""
        server = self.server
        if delivery.pattern == "Undo Offer" and delivery.about.get("inReplyTo"):
            server.cancel(delivery.about["inReplyTo"])
        document = parse(bytes(self.request.body)) if server.settings.REPLIES else None
        if "Offer" in types_of(lookup(document, "type")):
            proxied, settings = self.is_proxied, server.settings
            steps = answer_offer(document, delivery, proxied, settings, server.record)
            server.start(steps, delivery.about.get("id", ""))

    @route("GET", INBOX, FAILURE_PARAMETERS)
    def get_inbox(self, values: Mapping[str, str]) -> Steps:
        """List the notifications (LDN section 3.3.1); the parameters are for those who POST."""
        if self.prefers("text/html"):
            yield from self.show_home(Query())
            return
        names = yield Blocking(self.server.store.names)
        listing = {"@context": LDP_CONTEXT, "@id": self.base + self.path, "@type": "ldp:Container"}
        url = json.dumps(self.inbox)[1:-1]
        contained = (f'{{"@id": "{url}/{name}"}}'.encode() for name in names)
        yield from self.stream(json_list(listing, "ldp:contains", contained), JSON_LD)

    def stream(self, pieces: Iterator[bytes], kind: str) -> Steps:
        """Answer with a long body; its beginning is computed first, while it may still fail."""
        first, ended = yield Turn(pieces)
        body = b"".join(first)
        whole = body if ended else itertools.chain([body], pieces)
        self.answer(Response(200, whole, {"Content-Type": kind}))

    @route("DELETE", INBOX)
    def delete_inbox(self, values: Mapping[str, str]) -> Steps:
        """Forget the notifications and the deliveries, for the next test."""
        yield Blocking(self.server.clear)
        self.answer(Response(204))

    @route("GET", f"/inbox/(?P<name>{NAME})")
    def get_notification(self, values: Mapping[str, str], name: str) -> Steps:
        """Send a notification, byte for byte; show it to people (LDN section 3.3.1)."""
        body = yield from self.read(name)
        if self.prefers("text/html"):
            yield from self.show((yield from self.find_delivery(name)))
        else:
            self.answer(Response(200, body, {"Content-Type": JSON_LD}))

    @route("DELETE", f"/inbox/(?P<name>{NAME})")
    def delete_notification(self, values: Mapping[str, str], name: str) -> Steps:
        """Remove a notification; its delivery stays in the log."""
        with missing_is_404():
            yield Blocking(lambda: self.server.store.remove(name))
        self.answer(Response(204))

    # The deliveries

    @route("GET", "/", QUERY_PARAMETERS)
    def get_home(self, values: Mapping[str, str]) -> Steps:
        """Show the page; as JSON-LD, say where the inbox is (LDN section 3.1)."""
        accept = self.request.headers.get("accept", "")
        if quality(JSON_LD, accept) <= quality("text/html", accept):
            yield from self.show_home(Query(**values))
            return
        here = {"@context": LDP_CONTEXT, "@id": f"{self.base}/", "ldp:inbox": {"@id": self.inbox}}
        self.answer(json_response(200, here, JSON_LD, self.inbox_link()))

    def inbox_link(self) -> dict[str, str]:
        """Return the Link header for the discovery of the inbox (LDN section 3.1)."""
        return {"Link": f'<{self.inbox}>; rel="http://www.w3.org/ns/ldp#inbox"'}

    def show_home(self, query: Query) -> Steps:
        """Show the list of the deliveries that a query selects."""
        deliveries = yield Scan(self.server.deliveries.select(query, query.page_length + 1))
        totals, context = Totals.of(self.server.ledger.tally), self.context(query)
        page = yield Blocking(lambda: list_page(context, deliveries, totals))
        self.answer(html_response(page, self.inbox_link()))

    @route("GET", "/deliveries", QUERY_PARAMETERS)
    def get_deliveries(self, values: Mapping[str, str]) -> Steps:
        """List the deliveries, the newest first, or stream them as they arrive."""
        query, log = Query(**values), self.server.deliveries
        accept = self.request.headers.get("accept", "")
        if "text/event-stream" in accept.lower() and self.prefers("text/event-stream"):
            query = query._replace(since=self.request.headers.get("last-event-id", query.since))
            (place,) = yield Scan(log.place_after(query))
            body = Events(query, place)
            self.answer(Response(200, body, {"Content-Type": "text/event-stream"}))
        elif self.prefers("text/html"):
            yield from self.show_home(query)
        else:
            selected = log.select_lines(query, int(query.limit) if query.limit else None)
            pieces = json_list({}, "deliveries", (found and found[1] for found in selected))
            yield from self.stream(pieces, "application/json")

    @route("GET", f"/deliveries/(?P<name>{NAME})", PAGE_PARAMETERS)
    def get_delivery(self, values: Mapping[str, str], name: str) -> Steps:
        """Show a delivery; the parameters are the filter of the list that the reader came from."""
        delivery = yield from self.find_delivery(name)
        if self.prefers("text/html"):
            pattern = values.get("reply") or "Accept"
            filters = {name: text for name, text in values.items() if name != "reply"}
            yield from self.show(delivery, Query(**filters), pattern)
        else:
            self.answer(json_response(200, delivery.as_json()))

    @route("GET", f"/deliveries/(?P<name>{NAME})/body")
    def get_body(self, values: Mapping[str, str], name: str) -> Steps:
        """Send the body of a delivery as plain text, which no browser executes."""
        body = yield from self.body_of((yield from self.find_delivery(name)))
        if body is None:
            raise Problem(404, "it is no longer stored")
        self.answer(Response(200, body, {"Content-Type": "text/plain; charset=utf-8"}))

    def read(self, name: str) -> Generator[Blocking, Any, bytes]:
        """Read a notification from the store. Raises `Problem` (404) if it is missing."""
        with missing_is_404():
            body: bytes = yield Blocking(lambda: self.server.store.read(name))
        return body

    def find_delivery(self, name: str) -> Generator[Blocking | Scan, Any, Delivery]:
        """Find a delivery by its name; adopts a notification that is only in the store."""
        found = yield Scan(self.server.deliveries.find(name))
        if found:
            delivery: Delivery = found[0]
            return delivery
        body = yield from self.read(name)
        return self.server.ledger.adopt(Delivery.from_stored_file(name, body))

    def body_of(self, delivery: Delivery) -> Generator[Blocking, Any, bytes | None]:
        """Return the body of a delivery, or None if it was removed from the store."""
        if delivery.body is not None:
            return delivery.body
        try:
            return (yield from self.read(delivery.name))
        except Problem:
            return None

    def show(
        self, delivery: Delivery, query: Query = TOTALS["all"], reply_pattern: str = "Accept"
    ) -> Steps:
        """Show the page of a delivery, with its neighbours in a query."""
        log, context = self.server.deliveries, self.context(query)
        related = (yield Scan(log.conversation(delivery.about)))[::-1] or [delivery]
        (beside,) = yield Scan(log.beside(delivery.name, query))
        body = yield from self.body_of(delivery)
        answer = delivery.answer_body if delivery.direction == "out" else self.our_answer(delivery)
        full = delivery._replace(body=body, answer_body=answer)
        page = yield Blocking(lambda: delivery_page(context, full, related, beside, reply_pattern))
        self.answer(html_response(page))

    def our_answer(self, delivery: Delivery) -> bytes:
        """Reconstruct the body of our answer to a delivery, which the log leaves out."""
        members = receipt(delivery) if delivery.findings or not delivery.detail else {}
        response = accepted(delivery, f"{self.inbox}/{delivery.name}", delivery.status)
        if delivery.detail:
            response = Problem(delivery.status, delivery.detail, **members).response()
        return response.body if isinstance(response.body, bytes) and delivery.status else b""

    @route("POST", f"/deliveries/(?P<name>{NAME})/send")
    def post_send(self, values: Mapping[str, str], name: str) -> Steps:
        """Send a delivery again, or a reply to it; answers with the delivery that this makes."""
        if not self.is_user:
            raise Problem(403, "only clients on this machine may send; others need a TOKEN")
        content_type = self.request.headers.get("content-type", "").lower()
        # curl calls everything a form.
        is_form = content_type.startswith(FORM) and not self.request.body.startswith(b"{")
        wanted = read_send(bytes(self.request.body), is_form)
        url = wanted["to"]
        original = yield from self.find_delivery(name)
        document: Any = yield from self.body_of(original)
        if "document" in wanted:
            document = wanted["document"]
        elif document is None:
            raise Problem(404, "it is no longer stored")
        elif "pattern" in wanted:
            offer, pattern = document, wanted["pattern"]
            try:
                document = yield Blocking(lambda: reply_to(parse(offer), pattern, url))
            except ValueError as error:
                raise Problem(409, str(error)) from error
        delivery = yield Sending(lambda: outgoing(document, url, "page"))
        delivery = self.server.record(delivery)
        headers = {"Location": f"{self.base}/deliveries/{delivery.name}"}
        created = json_response(201, delivery.as_json(), headers=headers)
        self.answer(Response(303, headers=headers) if is_form else created)

    @property
    def is_user(self) -> bool:
        """Whether the client may make this inbox send. `check_token` has checked a TOKEN before."""
        is_here = is_loopback(self.client_address[0]) and not self.is_proxied
        return self.server.settings.TOKEN is not None or is_here

    @property
    def is_proxied(self) -> bool:
        """Whether a proxy or tunnel may have made the request, so that a stranger looks local."""
        headers = self.request.headers.keys()
        return bool(self.server.settings.BASE_URL) or not headers.isdisjoint(FORWARDED)

    # The rest

    @route("GET", "/constraints", {"pattern": QUERY_PARAMETERS["pattern"]})
    def get_constraints(self, values: Mapping[str, str]) -> Steps:
        """List the rules, for people those of one pattern."""
        if self.prefers("text/html"):
            context = self.context()
            pattern = find_pattern(values.get("pattern") or REQUEST_REVIEW.name)
            page = yield Blocking(lambda: constraints_page(context, pattern))
            self.answer(html_response(page))
            return
        listed = yield Blocking(constraints)
        document = {
            "specification": SPECIFICATION,
            "levels": {name: level._asdict() for name, level in LEVELS.items()},
            "refused": MODES[self.server.settings.VALIDATE_INCOMING],
            "receivers": receivers(),
            "constraints": listed,
        }
        self.answer((yield Blocking(lambda: json_response(200, document))))

    @route("GET", "/samples")
    def get_samples(self, values: Mapping[str, str]) -> Steps:
        """List the samples by pattern."""
        if self.prefers("text/html"):
            context = self.context()
            self.answer(html_response((yield Blocking(lambda: samples_page(context)))))
            return
        urls = {pattern.name: f"{self.base}/samples/{quote(pattern.name)}" for pattern in PATTERNS}
        self.answer(json_response(200, {"samples": urls}))

    @route("GET", "/samples/(?P<name>[^/]+)")
    def get_sample(self, values: Mapping[str, str], name: str) -> None:
        """Make a valid notification, to be sent here."""
        try:
            self.answer(json_response(200, sample_here(self.base, unquote(name)), JSON_LD))
        except ValueError as error:
            raise Problem(404, str(error)) from error

    @route("GET", "/health")
    def get_health(self, values: Mapping[str, str]) -> None:
        """Tell a health check that the inbox serves."""
        self.answer(Response(204))


def allow(methods: Collection[str]) -> str:
    """Write an Allow header; without a resource, it lists all methods of the server."""
    known = [*(methods or ("GET", "POST", "DELETE")), "OPTIONS"]
    return ", ".join([*known, "HEAD"] if "GET" in known else known)


@contextlib.contextmanager
def missing_is_404() -> Iterator[None]:
    """Turn a `KeyError` of the store into a problem."""
    try:
        yield
    except KeyError:
        raise Problem(404, "no notification has this name; it may have been removed") from None


# --- Connections ---------------------------------------------------------------------------------
#
# A `Connection` serves one client, one request at a time: pipelined requests wait in `Incoming`
# until the answer before has been sent. The event loop calls its methods `on_…`. Each of them ends
# in `proceed`, which advances the connection as far as possible without waiting. `Listeners` are
# connections that wait for events. Everything but `read_news` runs in the thread of the event loop.
# `may_be_evicted` and `evict` disconnect slow clients when the server needs room.
# Must not know: rules, pages, how a notification is stored.

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CHUNK = 65536  # bytes read at once, and the limit for pipelined requests that wait
GRACE = 0.5  # seconds before a slow client may be disconnected to make room for another
# How long to keep reading after an early error. Closing with unread data would reset the
# connection, and the client would never see the answer.
LINGER = 2.0
GATHER = 0.05  # seconds in which events are gathered, so that listeners cost less than deliveries
HEARTBEAT = 15.0  # seconds between comments in an event stream: sending shows who has left


class State(enum.Enum):
    """What a connection is doing."""

    IDLE = "no request has begun"
    READING = "a request has begun"
    COMMITTING = "its notification is on the way to the disk"
    WORKING = "another thread works for it"
    SCANNING = "a long read, which takes turns with others"
    PAUSING = "a simulated delay"
    QUEUING = "its next request has already arrived, but other clients are served first"
    WRITING = "an answer is being sent"
    LISTENING = "a stream of events"
    LINGERING = "answered; what still arrives is discarded"
    CLOSED = "gone"


# Clients whose connections are not taken for others: for them, something is on its way.
SPARED = (State.COMMITTING, State.WORKING, State.QUEUING, State.LINGERING, State.CLOSED)
PATIENT = (State.PAUSING, State.SCANNING)  # the last whose connections are taken
# Here the end of input means that the client has left; elsewhere it may half-close and wait.
ATTENTIVE = (State.IDLE, State.PAUSING, State.LISTENING, State.LINGERING)


class Connection:
    """One client, and its request that is being read or answered."""

    def __init__(self, server: InboxServer, sock: socket.socket, address: Any) -> None:
        self.server, self.socket, self.address = server, sock, address
        self.incoming, self.output = Incoming(), bytearray()
        self.state, self.eof, self.used = State.IDLE, False, False
        self.events = 0  # the events that the selector watches for
        self.expect_request()

    def enter(
        self, state: State, seconds: float, overdue: Callable[[], None] | None = None
    ) -> None:
        """Change the state; `overdue`, or `close`, is called if `seconds` pass without a change."""
        if self.state is State.CLOSED:  # the commit of a closed connection may return later
            return
        self.state, self.since = state, time.monotonic()
        self.deadline, self.overdue = self.since + seconds, overdue or self.close
        self.server.next_deadline = min(self.server.next_deadline, self.deadline)

    # Bytes in

    def on_ready(self, events: int) -> None:
        """Receive and send, now that the selector says that the socket is ready."""
        if self.state is State.CLOSED:  # by an event of the same turn
            return
        if events & selectors.EVENT_READ:
            self.receive()
        if events & selectors.EVENT_WRITE:
            self.flush()
            if self.state is State.LISTENING and not self.output:
                self.server.listeners.on_change()  # it was left out until now
        self.proceed()

    def receive(self) -> None:
        """Read once, so that a client that never stops sending cannot starve the others."""
        try:
            data = self.socket.recv(CHUNK)
        except WOULD_BLOCK:
            return
        except ConnectionError:
            data = b""  # a client that is gone will send no more
        except OSError as error:
            self.lose(error)
            return
        if not data:
            self.eof = True
            if self.state in ATTENTIVE:
                self.close()
            ended = Problem(400, "the connection ended before the request did")
            self.incoming.ended = self.incoming.ended or ended
        elif self.state is not State.LINGERING:
            self.incoming.data += data
            if self.state is State.IDLE:
                self.expect_request()

    def expect_request(self) -> None:
        """Start to read the next request, or wait for its first byte."""
        settings = self.server.settings
        if self.incoming.data:
            self.reader = read_request(self.incoming, settings.MAX_CONTENT_LENGTH)
            self.enter(State.READING, settings.REQUEST_TIMEOUT, self.on_timeout)
        elif self.eof:
            self.close()
        else:
            self.enter(State.IDLE, settings.REQUEST_TIMEOUT)

    def read(self) -> Request | None:
        """Return the next request, or None if it is not complete yet, or the input has ended."""
        try:
            head = next(self.reader)
            if head is not None:
                self.check(head)
                next(self.reader)
                if head.expects_continue and not self.incoming.data:
                    self.send(CONTINUE)
        except StopIteration as stop:
            if stop.value is None:
                self.close()
            request: Request | None = stop.value
            return request
        return None

    def check(self, head: Request) -> None:
        """Check a request before its body is read, and have the reader raise any `Problem`."""
        try:
            check_head(head, self.server)
            head.approved = True
            if head.expects_continue and head.method == "POST":
                check_content(head)
        except Problem as problem:
            self.reader.throw(problem)  # which ends the reader

    def end_input(self, reason: Problem) -> None:
        """Have the reader raise `reason`: a timeout, an eviction, or the end of the server."""
        self.incoming.ended = self.incoming.ended or reason
        self.proceed()

    def on_timeout(self) -> None:
        """End a request that took longer than REQUEST_TIMEOUT."""
        self.end_input(Problem(408, "the request was not complete in time (REQUEST_TIMEOUT)"))

    # The request that is being answered

    def proceed(self) -> None:
        """Advance as far as possible without waiting, then update the selector."""
        while True:
            if self.state is State.WRITING and not self.output:
                self.write_on()
            elif self.state is State.READING and (request := self.read()):
                request.arrived = time.monotonic()
                self.handler = InboxHandler(request, self.address, self.server)
                self.steps = self.handler.respond()
                self.resume(None)
            else:
                break
        if self.state in ATTENTIVE and len(self.incoming.data) >= CHUNK:
            self.close()  # the buffer is full, so the end of input would go unnoticed
        self.watch()

    def resume(self, result: Any) -> None:
        """Send the handler the result that it waits for, and start its next step."""
        try:
            step = advance(self.steps, result)
        except StopIteration:
            self.send_answer()
            return
        if isinstance(step, Pause):
            self.enter(State.PAUSING, step.seconds, functools.partial(self.on_result, None))
        elif isinstance(step, Commit):
            self.enter(State.COMMITTING, NEVER)
            self.server.commit(step.body, self.on_result)
        else:
            is_scan = isinstance(step, (Scan, Turn))
            self.enter(State.SCANNING if is_scan else State.WORKING, NEVER)
            self.server.perform(step, self.on_result, self.is_wanted)

    def on_result(self, result: Any) -> None:
        """Continue with the result of a step."""
        self.resume(result)
        self.proceed()

    def is_wanted(self) -> bool:
        """Whether the client is still there to get the result of a long read."""
        return not self.eof and self.state is not State.CLOSED

    # Bytes out

    def send_answer(self) -> None:
        """Send the output of the handler; the rest of the body may follow in chunks."""
        self.enter(State.WRITING, self.server.settings.REQUEST_TIMEOUT, self.on_stalled)
        self.send(self.handler.output)

    def send(self, data: bytes) -> None:
        """Queue data for the client, and send as much as its socket accepts."""
        self.output += data
        self.flush()

    def flush(self) -> None:
        """Send as much as the socket accepts; the selector reports when it accepts more."""
        try:
            if self.output and self.state is not State.CLOSED:
                del self.output[: self.socket.send(self.output)]
                self.since = time.monotonic()
        except WOULD_BLOCK:
            pass
        except OSError as error:
            self.lose(error)

    def write_on(self) -> None:
        """Continue, after all output is sent, with the rest of the answer or the next request."""
        rest = self.handler.rest
        if isinstance(rest, Events):
            self.enter(State.LISTENING, NEVER)
            self.server.listeners.add(self, rest)
        elif rest is not None:
            self.enter(State.SCANNING, NEVER)
            self.compute_pieces()
        elif self.handler.close_connection or self.server.closing:
            self.end()
        elif self.incoming.data:  # pipelined requests would keep the loop from other clients
            self.enter(State.QUEUING, 0, self.on_turn)
        else:
            self.used = True
            del self.handler, self.steps  # they would keep the request in memory
            self.expect_request()

    def on_turn(self) -> None:
        """Serve the next pipelined request, now that other clients had their turn."""
        self.expect_request()
        self.proceed()

    def compute_pieces(self) -> None:
        """Compute the next part of the body, in the thread of the scans."""
        rest: Any = self.handler.rest
        turn = functools.partial(take_turn, rest)
        self.server.run_in(self.server.scans, turn, self.on_pieces)

    def on_pieces(self, turn: Any) -> None:
        """Send the next part of a body, which a turn of the scans has computed."""
        if isinstance(turn, (OSError, Problem)):
            LOG.error("the store failed: %s", turn)
        elif isinstance(turn, Exception):
            self.server.report_bug(turn)
        if isinstance(turn, Exception) or (self.server.closing and not turn[1]):
            self.close()  # after the head, only this tells the client that the body is incomplete
            return
        pieces, ended = turn
        if not (ended or any(pieces)):
            if self.is_wanted():
                self.compute_pieces()  # in the same state, so that it may be evicted
            else:
                self.close()  # a half-closed client of a long search has probably left
            return
        self.enter(State.WRITING, self.server.settings.REQUEST_TIMEOUT, self.on_stalled)
        self.send_chunk(b"".join(pieces))
        if ended:
            self.end_chunks()
        self.proceed()

    def send_chunk(self, data: bytes) -> None:
        """Send a part of a body of unknown length (RFC 9112 section 7.1)."""
        if data:
            chunk = b"%x\r\n%b\r\n" % (len(data), data)
            self.send(data if self.handler.request.is_http10 else chunk)
            self.watch()

    def end_chunks(self) -> None:
        """Send the last chunk."""
        self.handler.rest = None
        self.send(b"" if self.handler.request.is_http10 else b"0\r\n\r\n")

    # The end

    def end(self) -> None:
        """Close; if the client still sends, keep reading for LINGER seconds."""
        if self.eof or not (self.handler.request.unread or self.incoming.data):
            self.close()
            return
        with contextlib.suppress(OSError):
            # Not the method of a TLS socket, which would go on without encryption.
            socket.socket.shutdown(self.socket, socket.SHUT_WR)
        self.incoming.data.clear()
        self.enter(State.LINGERING, LINGER)

    def on_stalled(self) -> None:
        """Disconnect a client that does not read its answer."""
        self.lose(TimeoutError("the client timed out (REQUEST_TIMEOUT)"))

    def lose(self, error: OSError) -> None:
        """Log an error of the connection, and close it."""
        reason = escape_controls(str(error))
        if getattr(error, "reason", "") == "HTTP_REQUEST":
            reason = "the client speaks plain HTTP, this port does not: use https://"
        LOG.info("%s connection lost: %s", self.address[0], reason)
        self.close()

    def close(self) -> None:
        """Close at once; a handler that pauses learns that its client has left."""
        if self.state is State.CLOSED:
            return
        paused, self.state = self.state is State.PAUSING, State.CLOSED
        self.watch()
        self.server.listeners.remove(self)
        self.server.connections.pop(self, None)
        self.socket.close()
        del self.overdue  # a reference cycle would keep the request in memory
        if paused:
            self.resume(ConnectionAbortedError())

    def may_be_evicted(self, now: float) -> bool:
        """Whether the client had GRACE seconds. An idle one that was served before gets none."""
        grace = 0 if self.used and self.state is State.IDLE else GRACE
        return self.state not in SPARED and now - self.since >= grace

    def evict(self) -> None:
        """Disconnect the client to make room for another."""
        problem = Problem(
            503, "others needed the connection (MAX_CONNECTIONS)", {"Retry-After": "1"}
        )
        if self.state is State.PAUSING:
            self.handler.close_connection = True
            self.on_result(problem)
        elif self.state is State.READING:
            self.end_input(problem)
        else:
            if self.state is State.LISTENING:
                self.end_chunks()
            self.close()

    def on_stop(self) -> None:
        """End idle connections, streams and simulated delays, because the server stops."""
        if self.state is State.IDLE:
            self.on_ready(selectors.EVENT_READ)  # a request may have arrived just now
        if self.state is State.IDLE:
            self.close()
        elif self.state is State.LISTENING:
            self.server.listeners.remove(self)
            self.handler.close_connection = True
            self.enter(State.WRITING, LINGER)
            self.end_chunks()
            self.proceed()
        elif self.state is State.PAUSING:
            self.handler.close_connection = True
            self.on_result(None)

    def watch(self) -> None:
        """Update the events that the selector watches for."""
        is_open, selector = self.state is not State.CLOSED, self.server.selector
        reads = is_open and not self.eof and len(self.incoming.data) < CHUNK
        writes = is_open and bool(self.output)
        events = selectors.EVENT_READ * reads | selectors.EVENT_WRITE * writes
        if events and not self.events:
            selector.register(self.socket, events, self.on_ready)
        elif events and events != self.events:
            selector.modify(self.socket, events, self.on_ready)
        elif self.events and not events:
            selector.unregister(self.socket)
        self.events = events


class Listeners:
    """Event streams. Streams at the same place of the log with the same query share the reading."""

    def __init__(self, server: InboxServer) -> None:
        self.server = server
        self.streams: dict[Connection, Events] = {}
        self.scheduled = self.rechecking = False
        self.changed = False  # since the last reading began
        self.heartbeat = 0.0

    def add(self, connection: Connection, events: Events) -> None:
        """Send a connection the events of a stream from now on."""
        if not self.rechecking:
            self.rechecking = True
            self.server.call_later(RECHECK, self.on_recheck)
        self.streams[connection] = events
        self.on_change()

    def remove(self, connection: Connection) -> None:
        """Forget a connection, whether it listens or not."""
        self.streams.pop(connection, None)

    def on_change(self) -> None:
        """Read the new lines of the log after GATHER seconds: more may follow."""
        self.changed = True
        if self.streams and not self.scheduled:
            self.scheduled = True
            self.server.call_later(GATHER, self.read)

    def on_recheck(self) -> None:
        """Look for changes by other processes, as long as anybody listens."""
        self.rechecking = bool(self.streams)
        if not self.streams:
            return
        now = time.monotonic()
        if now >= self.heartbeat:
            self.heartbeat = now + HEARTBEAT
            for connection in self.ready():
                connection.send_chunk(b":\n\n")
        self.on_change()
        self.server.call_later(RECHECK, self.on_recheck)

    def ready(self) -> list[Connection]:
        """List the listeners that have read everything so far; slow ones are left out for now."""
        return [connection for connection in self.streams if not connection.output]

    def read(self) -> None:
        """Read on in the log, in the thread of the scans."""
        self.changed = False
        wanted = {self.streams[connection] for connection in self.ready()}
        news = functools.partial(read_news, self.server.deliveries, wanted)
        self.server.run_in(self.server.scans, news, self.on_news)

    def on_news(self, news: Any) -> None:
        """Send each listener its news."""
        self.scheduled = False
        if isinstance(news, Exception):
            LOG.error("the log of deliveries cannot be read: %s", news)
            return
        for connection in self.ready():
            events = self.streams[connection]
            if events in news:
                data, place = news[events]
                self.streams[connection] = events._replace(place=place)
                connection.send_chunk(data)
        # A listener that began in the past may have more to read.
        if self.changed or any(place != events.place for events, (_, place) in news.items()):
            self.on_change()


def read_news(log: DeliveryLog, wanted: Collection[Events]) -> dict[Events, tuple[bytes, Place]]:
    """Read on in the log; returns the events for each stream, and the place after them."""
    read = {place: log.read(place) for place in {events.place for events in wanted}}
    news = {}
    for events in wanted:
        lines, place = read[events.place]
        deliveries = filter(None, map(events.query.find_in, lines))
        news[events] = b"".join(map(as_event, deliveries)), place
    return news


def as_event(delivery: Delivery) -> bytes:
    """Write a delivery as a server-sent event (HTML section 9.2)."""
    return f"id: {delivery.name}\ndata: {json.dumps(delivery.as_json())}\n\n".encode()


# --- Server --------------------------------------------------------------------------------------
#
# One thread runs the event loop, `InboxServer.serve_forever`: it owns the selector, the connections
# and the timers, and it alone uses sockets. A handler that has to wait is a generator and yields a
# step; the loop resumes it with the result. Work that may block runs in a pool of daemon threads,
# whose results return through `post`. While one batch of notifications is being synced to the disk,
# the notifications that arrive form the next batch.
# Must not know: rules, pages.

# Seconds that a notification waits for others while the loop is busy. 64 clients need some 16 ms.
MAX_GATHER = 0.02
STOP_WITHIN = 2.0  # seconds after `stop` in which clients may still take their answers
PAUSE = 0.05  # seconds before looking for new connections again when there is no room


@contextlib.contextmanager
def as_configuration_error(what: str, expected: str) -> Iterator[None]:
    """Turn errors of the operating system into errors of the settings that led to them."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{what}: {error}; expected {expected}") from error


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """Load a certificate and its key; None if there is none."""
    if certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Otherwise a client disconnected to make room would see a TLS error instead of our 503.
    # Truncation is safe to ignore here: HTTP framing detects it.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    # An empty password, or an encrypted key would be asked about on the terminal.
    context.load_cert_chain(certificate, key, password="")
    return context


def keep_port(sock: socket.socket) -> None:
    """See to it that no other program takes the port as well, which Windows would let it do."""
    if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)


class InboxServer(Loop, http.server.HTTPServer):
    """An inbox that listens as soon as it is made, and serves from `serve_forever` to `shutdown`.

    `server_close`, or the end of a `with` block, shuts it down and waits for the requests in
    flight. Raises `ConfigurationError` when a setting cannot be put into practice.
    """

    request_queue_size = 1024
    allow_reuse_address = os.name == "posix"  # elsewhere it would share a port that is in use
    allow_reuse_port = False  # from Python 3.14 on, two inboxes could have the same one

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.allowed_origins = cors_origins(settings.CORS_ORIGINS)
        self.failures = Failures()
        self.connections: dict[Connection, None] = {}
        self.next_deadline = NEVER  # the earliest deadline of a connection, or earlier
        self.listeners = Listeners(self)
        self.paused = False
        self.arrived: list[tuple[bytes, Then]] = []  # to be stored by the next batch
        self.committing, self.commit_by = False, NEVER
        self.stopped = threading.Event()
        self.stopped.set()
        self.sockets: list[socket.socket] = []
        self.address_family = socket.AF_INET6 if ":" in settings.HOST else socket.AF_INET
        files = f"SSL_CERT {settings.SSL_CERT!r}, SSL_KEY {settings.SSL_KEY!r}"
        with as_configuration_error(files, "a certificate and its key, not encrypted, in PEM"):
            self.tls = tls_context(settings.SSL_CERT, settings.SSL_KEY)
        with as_configuration_error(f"STORE_DIR {settings.STORE_DIR!r}", "a directory to write to"):
            self.ledger = Ledger(settings.STORE_DIR, settings.FSYNC)
        self.store, self.deliveries = self.ledger.store, self.ledger.log
        Loop.__init__(self)
        address = f"HOST {settings.HOST!r}, PORT {settings.PORT}"
        with as_configuration_error(address, "an address of this machine and a port that is free"):
            # If it fails, it calls `server_close`, which needs the attributes above.
            http.server.HTTPServer.__init__(self, (settings.HOST, settings.PORT), InboxHandler)
        self.scheme = "https" if self.tls else "http"
        host = "localhost" if settings.HOST in ("0.0.0.0", "::") else settings.HOST
        host = f"[{host}]" if ":" in host else host
        # The URL of the address that it listens on, and the public one; without a trailing slash.
        self.local = f"{self.scheme}://{host}:{self.server_address[1]}"
        self.base = settings.BASE_URL.rstrip("/") if settings.BASE_URL else self.local
        for sock in self.sockets:
            sock.setblocking(False)
        self.listen(True)

    def server_bind(self, attempts: int = 10) -> None:
        """Bind the sockets. `localhost` means both loopbacks: clients may try either first."""
        if self.settings.HOST == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        keep_port(self.socket)
        # HTTPServer would also look up a name for the address, and may wait long for it.
        socketserver.TCPServer.server_bind(self)
        self.sockets = [self.socket]
        if self.settings.HOST != "localhost" or not self.has_ipv6_loopback():
            return
        try:
            self.sockets.append(self.listen_on_ipv6(self.server_address[1]))
        except OSError:
            if self.settings.PORT or not attempts:
                raise
            self.socket.close()  # its port was free on this loopback only
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.server_address = (self.settings.HOST, 0)
            self.server_bind(attempts - 1)

    def listen_on_ipv6(self, port: int) -> socket.socket:
        """Listen on the loopback of IPv6 too. Raises `OSError` if the port is taken there."""
        with contextlib.ExitStack() as unless_it_listens:
            sock = unless_it_listens.enter_context(socket.socket(socket.AF_INET6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, self.allow_reuse_address)
            keep_port(sock)
            sock.bind(("::1", port))
            sock.listen(self.request_queue_size)
            unless_it_listens.pop_all()
            return sock

    def has_ipv6_loopback(self) -> bool:
        """Whether this machine has the address ::1."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
            return True
        return False

    def clear(self) -> None:
        """Forget all deliveries, notifications, waiting replies and failures; from any thread."""
        self.post(self.cancel)
        self.ledger.clear()
        self.failures.clear()

    def record(self, delivery: Delivery) -> Delivery:
        """Log a delivery, and tell those who listen."""
        delivery = self.ledger.record(delivery)
        if LOG.isEnabledFor(logging.INFO):
            log_delivery(delivery, f"{self.base}/deliveries/{delivery.name}")
        self.listeners.on_change()
        return delivery

    def take_stock(self) -> Steps:
        """Survey in the background the files that were there at the start."""
        tally = self.ledger.tally
        try:
            (survey,) = yield Scan(self.ledger.survey(new_name()[:15]))
        except (OSError, Problem) as error:
            if not self.closing:
                LOG.error("the store could not be looked through: %s", error)
            return
        if tally is self.ledger.tally:  # the inbox has not been emptied since
            self.ledger.take_over(survey)
            self.listeners.on_change()

    # The loop

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until `stop` or `shutdown`. Nothing is polled, whatever `poll_interval` is."""
        self.stopped.clear()
        try:
            self.start(self.take_stock())
            while not self.closing or self.connections:
                is_due = self.arrived and not self.committing
                self.finish_turn(self.turn(0 if is_due else self.next_deadline))
        finally:
            self.drop_all()
            self.stopped.set()

    def finish_turn(self, is_busy: bool) -> None:
        """Handle the connections that are overdue, and store the notifications that gathered."""
        now = time.monotonic()
        if self.next_deadline <= now:
            for connection in [each for each in self.connections if each.deadline <= now]:
                self.guard(connection.overdue)
            self.next_deadline = min((each.deadline for each in self.connections), default=NEVER)
        # Clients that were just answered send their next notification at once. A turn that finds
        # nothing new shows that all have arrived; otherwise batches of one and of many alternate.
        gathered = not is_busy or not self.store.fsync or now >= self.commit_by
        if self.arrived and not self.committing and gathered:
            self.guard(self.commit_arrived)

    # Storing

    def commit(self, body: bytes, then: Then) -> None:
        """Store a body with the next batch."""
        if not self.arrived:
            self.commit_by = time.monotonic() + MAX_GATHER
        self.arrived.append((body, then))

    def commit_arrived(self) -> None:
        """Store the bodies that have arrived, as one batch: here, or in the pool if it syncs."""
        batch, self.arrived = self.arrived, []
        add = functools.partial(self.store.add, [body for body, _ in batch])
        then = functools.partial(self.on_committed, batch)
        if self.store.fsync:
            self.committing = True
            self.run_in(self.pool, add, then)
        else:
            then(result_of(add))

    def on_committed(self, batch: list[tuple[bytes, Then]], outcomes: Any) -> None:
        """Pass each outcome on to the handler that waits for it."""
        self.committing = False
        if isinstance(outcomes, Exception):
            outcomes = [outcomes] * len(batch)
        for (_, then), outcome in zip(batch, outcomes):
            self.guard(then, outcome)

    # The connections

    def listen(self, wanted: bool) -> None:
        """Look for new connections, or leave them alone."""
        self.paused = not wanted
        for sock in self.sockets:
            if wanted:
                on_accept = functools.partial(self.on_accept, sock)
                self.selector.register(sock, selectors.EVENT_READ, on_accept)
            else:
                self.selector.unregister(sock)

    def on_accept(self, listener: socket.socket, events: int) -> None:
        """Accept the pending connections, as long as there is room or can be made."""
        for number in range(64):  # then others have their turn
            if not self.has_room():
                if number:  # perhaps no more are pending: nobody is disconnected for that
                    return
                if not self.make_room():
                    self.pause()
                    return
            try:
                sock, address = listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    LOG.error("a connection could not be accepted: %s", error)
                    self.make_room()
                    self.pause()
                return
            try:
                self.welcome(sock, address)
            except OSError:  # the client has left already
                sock.close()

    def welcome(self, sock: socket.socket, address: Any) -> None:
        """Make a connection for a client that was accepted. Raises `OSError` if it has left."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if self.tls:  # the first read does the handshake, so that nobody waits for it
            sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        connection = Connection(self, sock, address)
        self.connections[connection] = None
        # A request often arrives together with the connection.
        self.guard(connection.on_ready, selectors.EVENT_READ)

    def has_room(self) -> bool:
        """Whether one more client can be served. Clients that linger do not count."""
        lingering = [each for each in self.connections if each.state is State.LINGERING]
        if len(lingering) > self.settings.MAX_CONNECTIONS:
            lingering[0].close()
        return len(self.connections) - len(lingering) < self.settings.MAX_CONNECTIONS

    def make_room(self) -> bool:
        """Disconnect the client that has been idle longest; returns whether there is room now.

        Clients in a simulated delay, or with a long read, are disconnected last.
        """
        now = time.monotonic()
        candidates = [each for each in self.connections if each.may_be_evicted(now)]
        if candidates:
            min(candidates, key=lambda each: (each.state in PATIENT, each.since)).evict()
        return self.has_room()

    def pause(self) -> None:
        """Stop accepting for PAUSE seconds; new clients wait in the backlog."""
        if not self.paused:
            self.listen(False)
            self.call_later(PAUSE, self.on_unpause)

    def on_unpause(self) -> None:
        """Accept again, unless the server stops."""
        if not self.closing:
            self.listen(True)

    # The end

    def stop(self, within: float = STOP_WITHIN) -> None:
        """End `serve_forever`: give requests in flight some seconds, and end all else at once.

        May be called by any thread, and again with less time. Does not wait.
        """
        self.post(functools.partial(self.on_stop, within))

    def on_stop(self, within: float) -> None:
        """Stop, in the thread of the loop, see `stop`."""
        if not self.closing:
            for sock in self.sockets:
                self.on_accept(sock, 0)  # clients in the backlog would see a reset
            if not self.paused:
                self.listen(False)
            self.closing = True
            waiting = len(list(filter(None, self.tasks.values())))
            if waiting:
                LOG.info("the inbox stops; replies still waiting are dropped, Offers: %d", waiting)
            for sock in self.sockets:
                sock.close()
            for connection in list(self.connections):
                self.guard(connection.on_stop)
        # A notification on its way to the disk still gets its answer, unless there is no time.
        spared = State.COMMITTING if within else None
        self.call_later(within, functools.partial(self.drop_all, spared))

    def drop_all(self, spared: State | None = None) -> None:
        """Close all connections, except those in the state `spared`."""
        for connection in list(self.connections):
            if connection.state is State.READING:
                connection.end_input(Problem(503, "the inbox stops"))
            if connection.state is not spared:
                connection.close()

    def shutdown(self) -> None:
        """Stop, and wait for the end of `serve_forever`."""
        self.stop()
        self.stopped.wait()

    def server_close(self) -> None:
        """Shut down, and release sockets and threads."""
        self.shutdown()
        for sock in (self.socket, *self.sockets):
            sock.close()
        self.close_loop()
        self.store.syncers.close()


# --- Test double ---------------------------------------------------------------------------------
#
# `running` serves an inbox during a block of a test. It yields an `Inbox`, which lists the
# deliveries, waits for them, sends notifications, and makes the next attempts fail.
# Must not know: pages, connections.


class Wanted(NamedTuple):
    """The criteria of a test for a delivery, see `Inbox.wait_for`."""

    predicate: Callable[[Delivery], object] | None = None
    type: str = ""
    pattern: str = ""
    in_reply_to: str = ""
    status: str | int = ""
    direction: str = "in"
    clean: bool = False

    def checked(self) -> Wanted:
        """Reject criteria that can never match, so that a typo fails at once, not by a timeout.

        In `assert_none` it would even pass. Raises `AssertionError`, and `TypeError` for a
        predicate or a type of the wrong kind. Any type goes but a near miss of a known one.
        """
        if self.predicate is not None and not callable(self.predicate):
            raise TypeError(f"the predicate {short_repr(self.predicate)} cannot be called")
        if not isinstance(self.type, str):
            raise TypeError(f"the type {short_repr(self.type)} is not one name")
        known = {name for pattern in PATTERNS for name in pattern.types}
        near = close_to(self.type, known) or close_to(f"coar-notify:{self.type}", known)
        if near and self.type not in known:
            raise AssertionError(f"unknown type {self.type}; did you mean {near}?")
        status, direction = str(self.status), self.direction
        try:
            check_parameters({"status": status, "direction": direction}, QUERY_PARAMETERS)
            pattern_name = self.pattern and find_pattern(self.pattern).name
            return self._replace(status=status, pattern=pattern_name)
        except ValueError as error:
            raise AssertionError(str(error)) from None

    def __str__(self) -> str:
        given = {name: value for name, value in self._asdict().items() if value and value != "in"}
        return ", ".join(f"{name}={short_repr(value)}" for name, value in given.items()) or "any"

    def mismatch(self, delivery: Delivery) -> str:
        """Return the first reason why a delivery is not wanted; empty if it is."""
        listed = "; ".join(f"{each.level} {each.message}" for each in delivery.findings)
        if not delivery.has_status(str(self.status)):
            refused = delivery.verdict == "refused" and not delivery.simulated
            return (refused and listed) or delivery.detail or f"its status is not {self.status}"
        document = delivery.notification
        types, in_reply_to = lookup(document, "type"), lookup(document, "inReplyTo")
        if self.type and self.type not in types_of(types):
            return f"its type is {short_repr(types)}"
        if self.pattern not in ("", delivery.pattern):
            return f"its pattern is {delivery.pattern}"
        if self.in_reply_to not in ("", in_reply_to):
            return f"its inReplyTo is {short_repr(in_reply_to)}"
        if self.clean and listed:
            return listed
        return "" if not self.predicate or self.predicate(delivery) else "the predicate is false"


class Inbox:
    """An inbox within a test, see `running`."""

    def __init__(self, server: InboxServer) -> None:
        self.server = server

    @property
    def url(self) -> str:
        """The URL to send notifications to, whatever BASE_URL is."""
        return f"{self.server.local}/inbox"

    @property
    def open_server(self) -> InboxServer:
        """The server. Raises `RuntimeError` after the `with` block."""
        if self.server.closing:
            raise RuntimeError("the inbox is closed; look at it inside the `with` block")
        return self.server

    @property
    def deliveries(self) -> list[Delivery]:
        """Every attempt so far, the first one first; see `Delivery`."""
        return list(self.arriving(0))

    @property
    def notifications(self) -> list[Any]:
        """The documents of the notifications that were stored, the first one first."""
        stored = (each for each in self.arriving(0, "in") if each.is_stored)
        return [each.notification for each in stored if each.body is not None]

    def arriving(self, seconds: float | None, direction: str = "") -> Iterator[Delivery]:
        """Yield the deliveries so far, and further ones for some seconds; None is forever."""
        server = self.open_server
        deadline = NEVER if seconds is None else time.monotonic() + seconds
        for delivery in server.deliveries.follow(deadline):
            if direction in ("", delivery.direction):
                body = delivery.body
                with contextlib.suppress(KeyError):  # it was not stored, or has been removed
                    body = body or server.store.read(delivery.name)
                yield delivery._replace(body=body)

    def wait_for(
        self,
        predicate: Callable[[Delivery], object] | None = None,
        *,
        type: str = "",
        pattern: str = "",
        in_reply_to: str = "",
        status: str | int = "2xx",
        direction: str = "in",
        clean: bool = False,
        timeout: float | None = 5,
    ) -> Delivery:
        """Return the first delivery that meets all criteria; wait for it if need be.

        `status` is that of the answer, such as 503 or "4xx", 0 for none, or "" for any: unless it
        is given, a delivery counts when it was accepted. `direction` is "in", "out" for deliveries
        that this inbox sent, or "" for both. `clean` accepts only deliveries without findings.
        `timeout` is in seconds, None is forever.
        Raises `AssertionError`, saying what did arrive, when the time is over, and at once when
        nothing can ever meet the criteria.
        """
        wanted = Wanted(predicate, type, pattern, in_reply_to, status, direction, clean)
        wanted = wanted.checked()
        arrived = ""
        for delivery in self.arriving(timeout, direction):
            try:
                reason = wanted.mismatch(delivery)
            except Exception as error:  # it may look for members that another one has
                reason = f"the predicate raises {error!r}"
            if not reason:
                return delivery
            arrived += f"\n  {delivery}: {reason}"
        reason = f"no delivery with {wanted} within {timeout:g} s"
        raise AssertionError(f"{reason}; what arrived:{arrived or ' nothing'}")

    def assert_none(
        self,
        predicate: Callable[[Delivery], object] | None = None,
        *,
        within: float | None = 0,
        **criteria: Any,
    ) -> None:
        """Raise `AssertionError` if such a delivery has arrived, or does within some seconds.

        The criteria are those of `wait_for`, but unless a status is given, refused deliveries count
        too. `within` may be None, forever. Exceptions of the predicate are not caught.
        """
        wanted = Wanted(predicate, **criteria).checked()
        for delivery in self.arriving(within, wanted.direction):
            if not wanted.mismatch(delivery):
                raise AssertionError(f"an unexpected delivery: {delivery}")

    def send(self, document: Any, url: str) -> Delivery:
        """Send a notification to another inbox; returns the outgoing delivery.

        `document` is sent as JSON, or as it is if it is bytes. See `coarinbox.send`.
        """
        server = self.open_server
        delivery = outgoing(document, url, "test")
        recorded: Delivery = server.call(lambda: server.record(delivery))
        return recorded

    def reply(self, delivery: Delivery, pattern: str = "Accept", to: str | None = None) -> Delivery:
        """Answer an Offer with a pattern; returns the outgoing delivery.

        It goes to `to`, by default the Offer's `origin.inbox`; Undo Offer, which the sender of an
        Offer sends, to its `target.inbox`. Raises `ValueError` for what cannot
        be answered, see `coarinbox.reply`.
        """
        url = to or lookup(reply(delivery.notification, pattern), "target.inbox")
        if not is_http_uri(url):
            raise ValueError("the Offer names no inbox to reply to; say where it is with `to`")
        return self.send(reply_to(delivery.notification, pattern, url), url)

    def clear(self) -> None:
        """Forget all deliveries, notifications, waiting replies and simulated failures."""
        self.open_server.clear()

    def fail_next(
        self,
        status: int | None = None,
        times: int = 1,
        retry_after: int | str | None = None,
        delay: float = 0,
        close: bool = False,
    ) -> None:
        """Let the next attempts, `times` of them, fail: with a status, or without an answer.

        Attempts that are refused anyway do not count. `retry_after` is seconds or an HTTP date,
        `delay` seconds. Raises `ValueError` when a value is unusable.
        """
        given = {"status": status, "retry-after": retry_after, "times": str(times)}
        texts = {name: str(value) for name, value in given.items() if value is not None}
        if delay:
            texts["delay"] = f"{delay:.9f}"
        if close:
            texts["close"] = "1"
        check_parameters(texts, FAILURE_PARAMETERS)
        self.open_server.failures.push(Failure.from_values(texts))


@contextlib.contextmanager
def running(**settings: Any) -> Iterator[Inbox]:
    """Run an inbox while a block lasts, quietly: on a free port, with a store that is removed.

        with coarinbox.running(VALIDATE_INCOMING="strict") as inbox:
            send_something(inbox.url)
            delivery = inbox.wait_for(type="Offer")

    The settings are those of a configuration file. Raises `ConfigurationError` if they cannot be
    used, and `RuntimeError` at the end of the block if the inbox itself has failed.
    """
    # Here, because a server starts sooner without them.
    import shutil
    import tempfile

    for name in settings.keys() - SETTINGS:
        raise ConfigurationError(f"unknown setting {name}{did_you_mean(name, SETTINGS)}")
    process = os.getpid()
    with contextlib.ExitStack() as at_the_end:
        directory = tempfile.mkdtemp(prefix="coarinbox-")
        at_the_end.callback(shutil.rmtree, directory, ignore_errors=True)
        defaults = {"PORT": 0, "STORE_DIR": directory, "FSYNC": False}
        server = InboxServer(Settings(**{**defaults, **settings}))
        at_the_end.callback(server.server_close)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        at_the_end.callback(thread.join)
        at_the_end.callback(server.stop, within=0)
        try:
            yield Inbox(server)
        finally:
            if os.getpid() != process:  # a child that was forked leaves its parent's inbox alone
                at_the_end.pop_all()
    if server.bugs:
        raise RuntimeError("the inbox itself has failed") from server.bugs[0]


# --- Command line --------------------------------------------------------------------------------
#
# `main` reads the options. It prints a sample, or calls `check_files`, `send_files` or `serve`,
# which return the exit status. The log goes to standard error through a thread.
# Must not know: HTTP, pages.

MAX_WAITING = 10_000  # lines of the log that may wait for standard error
FLUSH_WITHIN = 0.5  # seconds that the program waits at its end for a reader of standard error
# Seconds within which a second signal counts as the same one: `timeout`, for example, signals a
# process and its group.
DOUBLE_SIGNAL = 0.5
# Windows has no SIGHUP. Only Windows has SIGBREAK, with which other programs can end it there.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")


def handle_signals(handler: Callable[[int, types.FrameType | None], None]) -> None:
    """Handle STOP_SIGNALS, but leave SIGHUP disabled if it is, as `nohup` does."""
    for number in signal.Signals:
        is_disabled = signal.getsignal(number) is signal.SIG_IGN and number.name == "SIGHUP"
        if number.name in STOP_SIGNALS and not is_disabled:
            signal.signal(number, handler)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the options; an option in capitals is a setting."""
    parser = argparse.ArgumentParser(
        prog="coarinbox",
        argument_default=argparse.SUPPRESS,  # an option that is not given changes no setting
        description="An inbox for COAR Notify notifications.",
        epilog="The environment variable COARNOTIFY_SETTINGS may name the configuration file too,"
        " and COARNOTIFY_PORT=8080 sets PORT.",
    )
    config = os.environ.get("COARNOTIFY_SETTINGS") or None
    parser.set_defaults(config=config, check=[], sample=None, send=None, token=None)
    add = parser.add_argument
    add("--config", metavar="FILE", help="configuration file, see local.cfg.example")
    add("--store", metavar="DIR", dest="STORE_DIR", help="where notifications are stored")
    add("--host", metavar="H", dest="HOST", help="address to listen on")
    add("--port", metavar="N", dest="PORT", type=read_value, help="port, 0 for a free one")
    modes = "true, false, strict, coarnotify, or a receiver such as DSpace"
    add("--validate", metavar="MODE", dest="VALIDATE_INCOMING", type=read_value, help=modes)
    add("-d", action="store_true", dest="DEBUG_PYCHARM", help="attach to a PyCharm debug server")
    checks = "validate files, - or directories, and end"
    add("--check", metavar="FILE", nargs="+", action="extend", help=checks)
    add("--sample", metavar="PATTERN", help="print a valid notification, or --send it, and end")
    add("--send", metavar="URL", help="send files, or - for standard input, to an inbox, and end")
    add("--token", metavar="SECRET", help="the token of the inbox to send to")
    add("files", metavar="FILE", nargs="*", default=[], help="what to send")
    add("--version", action="version", version=f"coarinbox {__version__}")
    options = parser.parse_args(arguments)
    if options.send is None and (options.files or options.token is not None):
        parser.error("FILE and --token go with --send URL")
    if options.send is not None and not options.files and options.sample is None:
        parser.error("--send needs a FILE, - for standard input, or --sample PATTERN")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    """Combine the options that are settings with the file and the environment."""
    flags = {name: value for name, value in vars(options).items() if name.isupper()}
    return configure(options.config, flags, os.environ)


def complain(text: object) -> None:
    """Print a line to standard error."""
    print(escape_controls(f"coarinbox: {text}"), file=sys.stderr)


def files_below(path: str, onerror: Callable[[OSError], object]) -> list[str]:
    """List a file itself, or the JSON files in a directory."""
    if not os.path.isdir(path):
        return [path]
    tree = os.walk(path, onerror=onerror)
    files = (os.path.join(folder, name) for folder, _, names in tree for name in names)
    named = sorted(file for file in files if file.endswith((".json", ".jsonld")))
    return [file for file in named if os.path.isfile(file)]


def read_file(path: str) -> bytes:
    """Read a file, or standard input for `-`."""
    if path == "-":
        if not sys.stdin:
            raise OSError(errno.EBADF, "standard input is closed", path)
        return sys.stdin.buffer.read()
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)  # a FIFO would block
    with open(path, "rb") as file:
        return file.read()


def assess_file(data: bytes, settings: Settings) -> Assessment:
    """Judge the content of a file as an inbox would judge the body of a request."""
    try:
        if len(data) <= settings.MAX_CONTENT_LENGTH:
            return assess(parse(data), settings.VALIDATE_INCOMING)
        code, reason = "size", f"it is larger than {settings.MAX_CONTENT_LENGTH} bytes"
    except NestedTooDeeplyError as error:
        code, reason = "depth", f"it is {error}"
    except ValueError as error:
        code, reason = "json", f"it is not JSON: {error}"
    return Assessment([Finding(REFUSED, "", code, reason, SPECIFICATION)], [])


def check_files(options: argparse.Namespace) -> int:
    """Validate files; returns the exit status: 1 if one is refused, 2 if one is unreadable."""
    settings = settings_of(options)
    unreadable: list[OSError] = []
    verdicts: collections.Counter[str] = collections.Counter()
    files = [file for path in options.check for file in files_below(path, unreadable.append)]
    for file in files:
        try:
            errors, warnings = assess_file(read_file(file), settings)
        except OSError as error:
            unreadable.append(error)
            continue
        verdicts["refused" if errors else "warned" if warnings else "clean"] += 1
        found = errors + warnings
        lines = [f"{each.level} {each.pointer or '-'} {each.code} {each}" for each in found]
        for line in lines or ["ok"]:
            print(escape_controls(f"{file}: {line}"))
    for failed in unreadable:
        complain(f"{failed.filename}: {failed.strerror}")
    checked, refused, warned = sum(verdicts.values()), verdicts["refused"], verdicts["warned"]
    complain(f"{checked} checked, {refused} refused, {warned} with warnings")
    return 2 if unreadable or not checked else int(refused > 0)


def send_files(options: argparse.Namespace) -> int:
    """Send notifications; returns the exit status: 1 if one is refused, 2 if one is not sent."""
    documents: list[tuple[str, Any]] = [(path, None) for path in options.files]
    if options.sample is not None:
        document = sample(options.sample)
        document["target"]["inbox"] = options.send
        documents.append((f"--sample {options.sample}", document))
    status = 0
    for name, document in documents:
        try:
            answer = send(document or read_file(name), options.send, token=options.token)
        except OSError as error:
            complain(f"{name}: {error.strerror or error}")
            status = 2
            continue
        phrase = http.client.responses.get(answer.status, "")
        words = f"{name}: {answer.status} {phrase} {answer.location}".split()
        print(escape_controls(" ".join(words)))
        for reason in answer.reasons():
            print(escape_controls(f"  {clip(reason, 300)}"))
        status = max(status, int(not answer.accepted))
    return status


def serve(options: argparse.Namespace) -> int:
    """Run the inbox until a signal ends it; returns the exit status."""
    settings = settings_of(options)
    if settings.DEBUG_PYCHARM:
        attach_debugger(settings.DEBUG_PYCHARM_SERVER, settings.DEBUG_PYCHARM_PORT)
    run(InboxServer(settings))
    return 0


def attach_debugger(host: str, port: int) -> None:
    """Connect to a PyCharm debug server that waits there, if that is possible."""
    try:
        import pydevd

        # Not suspended: breakpoints are set in the editor, and the inbox should keep serving.
        pydevd.settrace(host, port=port, stdoutToServer=True, stderrToServer=True, suspend=False)
    except ImportError:
        LOG.warning("no debugger: it needs the package pydevd-pycharm (pip install pydevd-pycharm)")
    except OSError as error:
        LOG.warning("no debugger: %s:%s: %s", host, port, error)


def run(server: InboxServer) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; a later one does not wait for requests in flight."""
    received: list[float] = []
    sys.setswitchinterval(0.0005)  # the loop waits so long for the GIL while a pool computes

    def stop(number: int, frame: types.FrameType | None) -> None:
        received.append(time.monotonic())
        if len(received) == 1:
            server.stop()
        elif received[-1] - received[0] > DOUBLE_SIGNAL:
            server.stop(within=0)

    with server:
        handle_signals(stop)
        # A signal may reach another thread; this wakes up the loop, and Python calls `stop` there.
        signal.set_wakeup_fd(server.ringer.fileno(), warn_on_full_buffer=False)
        lines = [
            f"coarinbox {__version__}",
            "address     {} port {}".format(*server.server_address[:2]),
            f"inbox       {server.base}/inbox",
            f"page        {server.base}/",
            f"store       {server.store.directory}",
            f"validation  {server.settings.VALIDATE_INCOMING}",
        ]
        for handler in LOG.handlers:
            handler.flush()  # earlier lines come first
        with contextlib.suppress(OSError):  # standard error may be full
            print("\n".join(lines), file=sys.stderr)
        try:
            server.serve_forever()
        finally:
            signal.set_wakeup_fd(-1)  # the number may soon belong to another file


COLORS = {"stored": 32, "queued": 32, "refused": 31, "failed": 31}  # green and red


@functools.lru_cache(maxsize=2)  # most lines of a second need the same
def local_time(second: int) -> str:
    """Format a time in seconds since 1970, as the clock here shows it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


def shows_colors(stream: IO[str] | None) -> bool:
    """Whether a stream is a terminal that shows colors; on Windows, the old console does not."""
    is_able = os.name == "posix" or "WT_SESSION" in os.environ
    return bool(stream and stream.isatty() and is_able and not os.environ.get("NO_COLOR"))


class LineFormatter(logging.Formatter):
    """Writes a line of the log with its time; the status of a delivery has a color."""

    def __init__(self, is_colored: bool) -> None:
        super().__init__("%(asctime)s %(message)s")
        self.is_colored = is_colored

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Write the local time without fractions of a second."""
        return local_time(int(record.created))

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Write the line; color the status if it is about a delivery."""
        line = record.msg
        if self.is_colored and isinstance(line, LogLine):
            delivery = line.delivery
            is_clean = not (delivery.is_stored and delivery.findings)
            color = COLORS.get(delivery.verdict, 33) if is_clean else 33  # yellow
            status, _, rest = record.message.partition(" ")
            record.message = f"\x1b[{color}m{status}\x1b[0m {rest}"
        return super().formatMessage(record)


class StderrHandler(logging.Handler):
    """Writes log lines to standard error from a thread: a pipe without a reader would block."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(LineFormatter(shows_colors(sys.stderr)))
        # The lines to write. An event is set when its turn comes, and None ends the thread.
        self.lines: queue.SimpleQueue[str | threading.Event | None] = queue.SimpleQueue()
        self.dropped = 0
        self.writer = threading.Thread(target=self.write_lines, daemon=True)
        self.writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line, or count it as dropped."""
        if self.lines.qsize() < MAX_WAITING:
            self.lines.put(self.format(record))
        else:
            self.dropped += 1

    def write_lines(self) -> None:
        """Write the lines, many at once, until None comes."""
        lines: list[str | threading.Event | None] = []
        while None not in lines:
            lines = [self.lines.get()]
            time.sleep(0.01)  # waking up for every line would slow down the loop
            lines += [self.lines.get() for _ in range(self.lines.qsize())]
            dropped, self.dropped = self.dropped, 0
            text = "".join(f"{line}\n" for line in lines if isinstance(line, str))
            if dropped:
                text += f"{dropped} lines were dropped: nobody read standard error\n"
            with contextlib.suppress(AttributeError, OSError, ValueError):  # None if it is closed
                sys.stderr.write(text)
                sys.stderr.flush()
            for written in lines:
                if isinstance(written, threading.Event):
                    written.set()

    def flush(self) -> None:
        """Wait until everything is written, but not long."""
        written = threading.Event()
        self.lines.put(written)
        if self.writer.is_alive():
            written.wait(FLUSH_WITHIN)

    def close(self) -> None:
        """Write the remaining lines, and end the thread."""
        self.flush()
        self.lines.put(None)
        super().close()


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Write the log to standard error during a block."""
    handler, level = StderrHandler(), LOG.level
    # Nobody asks for these, and every line would pay for them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.setLevel(level)
        LOG.removeHandler(handler)
        handler.close()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    options = parse_arguments(arguments)
    with log_to_stderr():
        try:
            is_tool = options.check or options.send is not None or options.sample is not None
            return use_tool(options) if is_tool else serve(options)
        except (ConfigurationError, UnknownPatternError) as error:
            complain(error)
            return 2


def use_tool(options: argparse.Namespace) -> int:
    """Check or send files, or print a sample; returns the exit status, 2 if nobody reads it."""
    try:
        if options.send is not None:
            status = send_files(options)
        elif options.check:
            status = check_files(options)
        else:
            print(json.dumps(sample(options.sample), indent=2))
            status = 0
        if sys.stdout:  # None if it is closed
            sys.stdout.flush()
        return status
    except OSError as error:  # such as a closed pipe
        complain(f"standard output: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return 2


if __name__ == "__main__":
    # Until `run` takes over, there is nothing to finish.
    handle_signals(lambda number, frame: os._exit(128 + number))
    sys.exit(main())
