#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
#
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""An inbox for people who implement COAR Notify: a W3C LDN receiver in one file.

    python coarinbox.py                      serve http://localhost:5005/inbox
    python coarinbox.py --config local.cfg   the same, configured

Notifications are checked against the COAR Notify specification, stored octet for octet and served
back; what is refused is answered with everything that is wrong with it. The page at / shows every
delivery as it comes. The file needs nothing but Python and may be copied into another project.

In a test, `running` gives an inbox that lasts as long as a block.

Each section uses only what stands above it: documents, configuration, rules, storage, deliveries,
pages, answers, simulated failures, connections, HTTP, server, test double, command line. The one
exception is that an HTTP request asks the server it came through.
"""

from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import heapq
import html
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import secrets
import selectors
import signal
import socket
import socketserver
import ssl
import stat
import sys
import tempfile
import threading
import time
import traceback
import types
import uuid
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

__version__ = "0.1.0"

LOG = logging.getLogger("coarinbox")


# --- Documents -----------------------------------------------------------------------------------

# A notification is nested five levels deep. Python's own limit differs between versions.
MAX_DEPTH = 100


def clip(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"


def number(digits: str) -> int | float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"a number is too large: {clip(digits, 20)}")
    return int(digits) if re.fullmatch("-?[0-9]+", digits) else value


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_int=number, parse_float=number, parse_constant=refuse_constant)


def depth(document: Any) -> int:
    """Count how many lists and objects stand inside each other, without recursion."""
    levels, level = 0, [document]
    while level := [node for node in level if isinstance(node, (dict, list))]:
        levels += 1
        level = [
            child for node in level for child in (node.values() if isinstance(node, dict) else node)
        ]
    return levels


def parse(octets: bytes) -> Any:
    """Parse a JSON text (RFC 8259) in UTF-8, the only encoding it may have between systems.

    Raises `ValueError`, saying what is wrong, for everything else, `NaN` and numbers that JSON
    receivers disagree about (RFC 7493 section 2.2) included.
    """
    try:
        text = octets.decode("utf-8")
        if not text:
            raise ValueError("the body is empty")
        if text.startswith("\ufeff"):
            raise ValueError("it starts with a byte order mark (RFC 8259 section 8.1)")
        document = DECODER.decode(text)
        # Most texts have not even that many brackets.
        if text.count("{") + text.count("[") > MAX_DEPTH and depth(document) > MAX_DEPTH:
            raise RecursionError
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at octet {error.start}") from error
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    return document


def visible(text: str) -> str:
    """Write what cannot be seen, or would pass for something else, the way JSON escapes it.

    That is control characters, line breaks, marks that reverse the direction of writing, and all
    spaces but U+0020.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else json.dumps(character)[1:-1] for character in text
    )


def lookup(document: Any, member: str) -> Any:
    """Find a member by its dotted name; returns None when there is none."""
    value = document
    for name in member.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


# What RFC 3986 and RFC 3987 forbid everywhere in a URI, and the parts they divide one into.
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
    """Return the scheme of an absolute URI (RFC 3986 section 4.3), in lower case.

    A fragment is allowed. Returns the empty string for anything else.
    """
    match = URI.fullmatch(value) if isinstance(value, str) else None
    if not match:
        return ""
    scheme, host = match["scheme"].lower(), match["host"] or ""
    if host.startswith("["):
        usable = ip_address(host) is not None
    else:
        usable = host != "" or scheme not in ("http", "https")
    return scheme if usable else ""


def is_uri(value: Any) -> bool:
    """Whether value is an absolute URI."""
    return scheme_of(value) != ""


def is_http_uri(value: Any) -> bool:
    """Whether value is an absolute URI with scheme http or https and a host."""
    return scheme_of(value) in ("http", "https")


# --- Configuration -------------------------------------------------------------------------------


class ConfigurationError(ValueError):
    """A setting or a configuration file is unusable; the text says why, in one line."""


class Kind(NamedTuple):
    """A kind of value that a setting takes, in words and as a predicate."""

    expected: str
    accepts: Callable[[Any], bool]


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value


def is_path(value: Any) -> bool:
    return is_text(os.fspath(value) if isinstance(value, os.PathLike) else value)


def is_base_url(value: Any) -> bool:
    return is_http_uri(value) and value.isascii() and not re.search("[?#]", value)


def is_printable(value: Any) -> bool:
    return is_text(value) and value.isprintable()


def is_secret(value: Any) -> bool:
    return is_printable(value) and value == value.strip()


def optional(kind: Kind) -> Kind:
    return Kind(f"None or {kind.expected}", lambda value: value is None or kind.accepts(value))


# `type`, because to `isinstance` True is a number.
A_FLAG = Kind("True or False", lambda value: type(value) is bool)
A_MODE = Kind('True, False or "strict"', lambda value: type(value) is bool or value == "strict")
A_STATUS = Kind("201 or 202", lambda value: type(value) is int and value in (201, 202))
A_COUNT = Kind(
    "a whole number from 1 to 2147483647",
    lambda value: type(value) is int and 1 <= value <= 2147483647,
)
A_PORT = Kind("a port, 0 to 65535", lambda value: type(value) is int and 0 <= value <= 65535)
A_DURATION = Kind(  # sockets refuse what the platform's clock cannot hold
    "a number of seconds, 0.001 to 86400",
    lambda value: type(value) in (int, float) and 0.001 <= value <= 86400,
)
A_HOST = Kind("a host name or an IP address", is_printable)
A_BASE_URL = Kind('a URL such as "https://inbox.example.org", without a query', is_base_url)
A_SECRET = Kind("a text without line breaks, or spaces around it", is_secret)
A_FILE = Kind("the name of a file", is_path)
A_DIRECTORY = Kind("the name of a directory", is_path)


def setting(default: Any, kind: Kind) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind})


def quoted(value: Any) -> str:
    try:
        return " ".join(repr(value).split())[:80]
    except ValueError:  # Python does not print numbers of more than 4300 digits
        return "a number of thousands of digits"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a user may set; `local.cfg.example` says what each setting means.

    Raises `ConfigurationError` when a value is unusable.
    """

    STORE_DIR: str = setting("notifications", A_DIRECTORY)
    HOST: str = setting("localhost", A_HOST)
    PORT: int = setting(5005, A_PORT)
    RESPONSE_STATUS: int = setting(201, A_STATUS)
    VALIDATE_INCOMING: bool | str = setting(True, A_MODE)
    DEBUG: bool = setting(False, A_FLAG)
    DEBUG_PYCHARM: bool = setting(False, A_FLAG)
    DEBUG_PYCHARM_SERVER: str = setting("localhost", A_HOST)
    DEBUG_PYCHARM_PORT: int = setting(6000, A_PORT)
    BASE_URL: str | None = setting(None, optional(A_BASE_URL))
    MAX_CONTENT_LENGTH: int = setting(1048576, A_COUNT)
    REQUEST_TIMEOUT: float = setting(30, A_DURATION)
    MAX_CONNECTIONS: int = setting(128, A_COUNT)
    FSYNC: bool = setting(True, A_FLAG)
    TOKEN: str | None = setting(None, optional(A_SECRET))
    SSL_CERT: str | None = setting(None, optional(A_FILE))
    SSL_KEY: str | None = setting(None, optional(A_FILE))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.metadata["kind"]
            if not kind.accepts(value):
                reason = f"{field.name} is {quoted(value)}, expected {kind.expected}"
                raise ConfigurationError(reason)
        if self.SSL_KEY and not self.SSL_CERT:
            raise ConfigurationError("SSL_KEY is set, expected SSL_CERT beside it")


SETTING_NAMES = [field.name for field in dataclasses.fields(Settings)]


def unknown(name: str, kind: str, known: Iterable[str]) -> str:
    """Say that a name is unknown, and which known one is nearest."""
    (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f"unknown {kind} {name}; nearest: {nearest}"


def failing_line(filename: str, error: BaseException) -> int | None:
    if isinstance(error, SyntaxError) and error.filename == filename:
        return error.lineno
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((frame.lineno for frame in frames if frame.filename == filename), None)


def read_configuration(filename: str) -> dict[str, Any]:
    """Execute a configuration file as Flask's `Config.from_pyfile` does.

    Returns every UPPERCASE name it leaves behind. Raises `ConfigurationError` naming the file, and
    the line where there is one, when it cannot be read, is not Python or fails.
    """
    module = types.ModuleType("config")
    module.__file__ = filename
    try:
        with open(filename, "rb") as file:
            code = compile(file.read(), filename, "exec", dont_inherit=True)
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        line = failing_line(filename, error)
        where = f"{filename}, line {line}" if line else filename
        what = error.msg if isinstance(error, SyntaxError) else error
        reason = " ".join(f"{where}: {type(error).__name__}: {what}".split())
        raise ConfigurationError(reason) from error
    return {name: value for name, value in vars(module).items() if name.isupper()}


def configure(filename: str | None, flags: Mapping[str, Any]) -> Settings:
    """Combine the defaults, a configuration file if one is named, and command-line flags.

    Names that are no setting of ours are passed over with a warning: the file may be shared with
    a Flask application. Raises `ConfigurationError`.
    """
    values = read_configuration(filename) if filename else {}
    for name in values:
        if name not in SETTING_NAMES:
            LOG.warning("%s: ignored: %s", filename, unknown(name, "setting", SETTING_NAMES))
    ours = {name: value for name, value in values.items() if name in SETTING_NAMES}
    try:
        settings = Settings(**ours)
    except ConfigurationError as error:
        raise ConfigurationError(f"{filename}: {error}") from error
    return dataclasses.replace(settings, **flags)


# --- Rules ---------------------------------------------------------------------------------------

SPECIFICATION = "https://coar-notify.net/specification/1.0.1/"

E, M, S, OK = "E", "M", "S", ""
LEVELS = {
    E: "refused by the coarnotify libraries",
    M: "breaks a MUST of the specification",
    S: "breaks a SHOULD of the specification, or is known to be refused in production",
}

# In an offer that an answer embeds, M becomes S and @context is not expected: the specification's
# own examples break those rules there.
IN_EMBEDDED = {E: E, M: S, S: S, OK: OK}

# Which levels a value of VALIDATE_INCOMING refuses. The others are warnings.
REFUSED: Mapping[bool | str, tuple[str, ...]] = {True: (E,), False: (), "strict": (E, M)}


class Pattern(NamedTuple):
    """A kind of notification, known by its types."""

    name: str
    family: str  # those that share their rules
    page: str  # below SPECIFICATION
    types: tuple[str, ...]

    @property
    def spec(self) -> str:
        return f"{SPECIFICATION}{self.page}/"


# fmt: off
PATTERNS = (
    Pattern("Accept", "answer", "accept", ("Accept",)),
    Pattern("Announce Endorsement", "announcement", "announce-endorsement",
            ("Announce", "coar-notify:EndorsementAction")),
    Pattern("Announce Relationship", "relationship", "announce-relationship",
            ("Announce", "coar-notify:RelationshipAction")),
    Pattern("Announce Review", "announcement", "announce-review",
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

ACTIVITY_STREAMS = "https://www.w3.org/ns/activitystreams"
COAR_NOTIFY = "https://coar-notify.net"
PURL = "https://purl.org/coar/notify"
COAR_NOTIFY_VARIANTS = (COAR_NOTIFY + "/", PURL, PURL + "/")
COAR_NOTIFY_TYPES = frozenset(
    name for pattern in PATTERNS for name in pattern.types if name.startswith("coar-notify:")
)
ACTOR_TYPES = frozenset("Application Group Organization Person Service".split())
AS2_OBJECT_TYPES = ACTOR_TYPES | frozenset(
    "Activity Article Audio Collection CollectionPage Relationship Document Event Image"
    " IntransitiveActivity Note Object OrderedCollection OrderedCollectionPage Page Place Profile"
    " Question Tombstone Video".split()
)


def types_of(value: Any) -> frozenset[str]:
    """Collect the type names in the value of a `type` member; anything but strings is ignored."""
    names = value if isinstance(value, list) else [value]
    return frozenset(name for name in names if isinstance(name, str))


def pattern_of(document: Any) -> Pattern | None:
    """Find the pattern that a notification claims by its `type`, the most specific that fits."""
    types = types_of(lookup(document, "type"))
    fitting = [pattern for pattern in PATTERNS if types.issuperset(pattern.types)]
    return max(fitting, key=lambda pattern: len(pattern.types), default=None)


UUID_URN = re.compile(r"(?i:urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})")
TYPE_SUBTYPE = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+-]+ *(;|\Z)", re.ASCII)

TYPE_SETS = tuple(" + ".join(pattern.types) for pattern in PATTERNS)


def nearest_types(value: Any) -> str:
    # Cut short: comparing costs the product of the lengths.
    given = " + ".join(sorted(types_of(value)))[:100]
    nearest = difflib.get_close_matches(given, TYPE_SETS, n=1, cutoff=0)
    return f"nearest: {nearest[0]}" if given else ""


def is_types(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) for name in names)


def names_namespaces(value: Any) -> bool:
    names = value if isinstance(value, list) else []
    known = (COAR_NOTIFY, *COAR_NOTIFY_VARIANTS)
    return ACTIVITY_STREAMS in names and any(namespace in names for namespace in known)


def names_no_variant(value: Any) -> bool:
    names = value if isinstance(value, list) else []
    return COAR_NOTIFY in names or not any(variant in names for variant in COAR_NOTIFY_VARIANTS)


def is_preferred_id(value: Any) -> bool:
    return is_http_uri(value) or (is_text(value) and bool(UUID_URN.fullmatch(value)))


def is_media_type(value: Any) -> bool:
    return is_text(value) and bool(TYPE_SUBTYPE.match(value))


def has_known_actions(value: Any) -> bool:
    actions = (name for name in types_of(value) if re.match("coar-notify:|[^:]*Action$", name))
    return COAR_NOTIFY_TYPES.issuperset(actions)


class Check(NamedTuple):
    """Something that a rule demands of the value of a member."""

    name: str  # ends the code of a finding
    demand: str  # completes "the member must"
    holds: Callable[..., bool]  # told the value, and those of the members in `beside`
    beside: tuple[str, ...] = ()
    hint: Callable[[Any], str] = lambda value: ""


def include(name: str, types: frozenset[str], what: str) -> Check:
    return Check(name, f"include {what}", lambda value: not types.isdisjoint(types_of(value)))


def equal(member: str) -> Check:
    return Check(
        f"equals-{member}",
        f"equal {member}",
        lambda value, other: other is None or value == other,
        beside=(member,),
    )


PRESENT = Check("present", "be present", lambda value: True)
OBJECT = Check("object", "be an object", lambda value: isinstance(value, dict))
TEXT = Check(
    "text", "be a text that is not empty", lambda value: isinstance(value, str) and value != ""
)
ABSOLUTE_URI = Check("absolute-uri", "be an absolute URI", is_uri)
HTTP_URI = Check("http-uri", "be an HTTP URI", is_http_uri)
PREFERRED_ID = Check("preferred", "be a hyphenated urn:uuid: or an HTTP URI", is_preferred_id)
TYPES = Check("strings", "be a string or a list of strings", is_types)
ONE_TYPE = Check("single", "be a single string", lambda value: not isinstance(value, list))
SERVICE = include("service", frozenset({"Service"}), "Service")
OFFER = include("offer", frozenset({"Offer"}), "Offer")
ACTOR_TYPE = include("actor", ACTOR_TYPES, "one of " + ", ".join(sorted(ACTOR_TYPES)))
AS2_TYPE = include("as2-object", AS2_OBJECT_TYPES, "an ActivityStreams 2.0 object type")
MEDIA_TYPE = Check("media-type", "be a media type, type/subtype", is_media_type)
NAMESPACES = Check(
    "namespaces", f"be a list holding {ACTIVITY_STREAMS} and {COAR_NOTIFY}", names_namespaces
)
CURRENT = Check("current", f"name {COAR_NOTIFY}, not a variant of it", names_no_variant)
PATTERN = Check(
    "pattern",
    "hold the types of a pattern: " + ", ".join(TYPE_SETS),
    lambda value: pattern_of({"type": value}) is not None,
    hint=nearest_types,
)
KNOWN_ACTIONS = Check(
    "known-actions", "name no unknown action", has_known_actions, hint=nearest_types
)


class Finding(NamedTuple):
    """One thing that is wrong with a notification."""

    level: str  # E, M or S
    pointer: str  # RFC 6901, to the member or to where one is missing
    code: str  # names the rule; the same in every version
    message: str
    spec: str  # URL of the page that says so
    value: Any = None  # what stands there, where it is short

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if value is not None}


def abridged(value: Any) -> Any:
    """Return a value if it is short enough to be repeated in an answer, else None."""
    try:
        return value if len(json.dumps(value, allow_nan=False)) <= 100 else None
    except (RecursionError, TypeError, ValueError):
        return None


class Rule(NamedTuple):
    """What is demanded of a member, and the levels of it being absent and of it being wrong."""

    member: str  # its dotted name; empty for the whole notification
    absent: str
    wrong: str = OK
    check: Check = PRESENT

    def code(self, need: str) -> str:
        return f"{self.member or 'notification'}-{need}"

    def examine(self, values: Mapping[str, Any], prefix: str, spec: str) -> Finding | None:
        """Apply the rule to the members of a notification that stands at the pointer `prefix`."""
        if self.member not in values:
            return None  # it has no place, and why is the business of another rule
        value, check = values[self.member], self.check
        if value is None:
            level, need = self.absent, "required"
        elif check.holds(value, *map(values.get, check.beside)):
            return None
        else:
            level, need = self.wrong, check.name
        if not level:
            return None
        pointer = prefix + ("/" + self.member.replace(".", "/") if self.member else "")
        message = self.message(level, pointer, value)
        return Finding(level, pointer, self.code(need), message, spec, abridged(value))

    def message(self, level: str, pointer: str, value: Any) -> str:
        where = pointer[1:].replace("/", ".") or "the notification"
        demand = f"{'should' if level == S else 'must'} {self.check.demand}"
        if value is None:
            return f"{where} is missing; it {demand}"
        hint = self.check.hint(value)
        return f"{where} {demand} ({hint})" if hint else f"{where} {demand}"


# fmt: off
EVERY = (
    #    member            absent, wrong: what it must be
    Rule("",                E, E, OBJECT),
    Rule("@context",        M, M, NAMESPACES),
    Rule("@context",        OK, S, CURRENT),
    Rule("id",              E, E, ABSOLUTE_URI),
    Rule("id",              OK, S, PREFERRED_ID),
    Rule("type",            OK, E, TYPES),
    Rule("type",            E, E, PATTERN),
    Rule("origin",          E, E, OBJECT),
    Rule("origin.id",       E, E, HTTP_URI),
    Rule("origin.type",     M, M, TYPES),
    Rule("origin.type",     OK, S, SERVICE),
    Rule("origin.inbox",    S, M, HTTP_URI),
    Rule("target",          E, E, OBJECT),
    Rule("target.id",       E, E, HTTP_URI),
    Rule("target.type",     M, M, TYPES),
    Rule("target.type",     OK, S, SERVICE),
    Rule("target.inbox",    M, M, HTTP_URI),
    Rule("object",          E, E, OBJECT),
    Rule("object.id",       E, E, ABSOLUTE_URI),
    Rule("actor",           S, E, OBJECT),
    Rule("actor.id",        M, E, ABSOLUTE_URI),
    Rule("actor.type",      M, E, ACTOR_TYPE),
    Rule("actor.type",      OK, S, ONE_TYPE),
    Rule("inReplyTo",       OK, E, ABSOLUTE_URI),
    Rule("context",         OK, E, OBJECT),
    Rule("context.id",      E, E, HTTP_URI),
)


def resource(
    member: str, no_type: str = OK, no_cite_as: str = OK, no_item: str = OK
) -> tuple[Rule, ...]:
    """The rules for something in a repository, but for its id.

    The arguments are the levels of a missing member.
    """
    return (
        Rule(f"{member}.type", no_type, M, AS2_TYPE),
        Rule(f"{member}.ietf:cite-as", no_cite_as, M, HTTP_URI),
        Rule(f"{member}.ietf:item", no_item, M, OBJECT),
        Rule(f"{member}.ietf:item.id", M, M, HTTP_URI),
        Rule(f"{member}.ietf:item.type", M, M, AS2_TYPE),
        Rule(f"{member}.ietf:item.mediaType", M, M, MEDIA_TYPE),
    )


ANNOUNCEMENT = EVERY + (
    Rule("object.type",         E, E, AS2_TYPE),
    Rule("object.ietf:cite-as", S, M, HTTP_URI),
    Rule("context",             E),
    *resource("context"),
)

FAMILIES: Mapping[str, tuple[Rule, ...]] = {
    "request": EVERY + (
        Rule("object.id",       OK, M, HTTP_URI),
        *resource("object", no_type=M, no_cite_as=S, no_item=M),
    ),
    "answer": EVERY + (
        Rule("inReplyTo",       E),
        Rule("inReplyTo",       OK, E, equal("object.id")),
        Rule("object.type",     E, E, TYPES),
        Rule("object.type",     OK, M, OFFER),
    ),
    "announcement": ANNOUNCEMENT,
    "relationship": ANNOUNCEMENT + (
        Rule("object.as:subject",      E, E, ABSOLUTE_URI),
        Rule("object.as:relationship", E, E, ABSOLUTE_URI),
        Rule("object.as:object",       E, E, ABSOLUTE_URI),
        Rule("context.id",             OK, M, equal("object.as:object")),
    ),
    "service result": ANNOUNCEMENT + (
        Rule("type",            OK, S, KNOWN_ACTIONS),
    ),
    "unprocessable": EVERY + (
        Rule("inReplyTo",       E),
        Rule("summary",         E, M, TEXT),
    ),
}
# fmt: on

RULES = {pattern.name: FAMILIES[pattern.family] for pattern in PATTERNS}

EMBEDDED = {
    name: tuple(
        rule._replace(absent=IN_EMBEDDED[rule.absent], wrong=IN_EMBEDDED[rule.wrong])
        for rule in rules
        if rule.member != "@context"
    )
    for name, rules in RULES.items()
}


def collect(document: Any, rules: Iterable[Rule]) -> dict[str, Any]:
    """Look up the members that rules are about, by their dotted names; None is one that is missing.

    Where the parent of a member is not an object, there is no entry for it.
    """
    values = {"": document}
    for rule in rules:
        if rule.member not in values:
            parent, _, name = rule.member.rpartition(".")
            if isinstance(values.get(parent), dict):  # the rule for the parent comes first
                values[rule.member] = values[parent].get(name)
    return values


def parts(document: Any) -> Iterator[tuple[str, Any, Pattern | None, tuple[Rule, ...]]]:
    """Yield the notification and, where it answers one that it embeds, that one, and so on.

    Each comes as the pointer to it, itself, its pattern and its rules.
    """
    prefix, pattern = "", pattern_of(document)
    yield prefix, document, pattern, RULES[pattern.name] if pattern else EVERY
    while pattern and pattern.family == "answer":
        prefix, document = prefix + "/object", document.get("object")
        pattern = pattern_of(document)
        if pattern:
            yield prefix, document, pattern, EMBEDDED[pattern.name]


def validate(document: Any) -> list[Finding]:
    """Find everything that is wrong with a notification.

    `document` is what `parse` returns; it is not changed. Returns the findings in the order of
    the rules. Never raises.
    """
    findings: dict[str, Finding] = {}
    for prefix, part, pattern, rules in parts(document):
        spec = pattern.spec if pattern else SPECIFICATION
        values = collect(part, rules)
        for rule in rules:
            finding = rule.examine(values, prefix, spec)
            if finding:
                # An answer and the offer in it make some of the same demands of the same members.
                findings.setdefault(finding.message, finding)
    return list(findings.values())


def judge(document: Any, mode: bool | str) -> tuple[list[Finding], list[Finding]]:
    """Validate a document; returns what it is refused for in a mode, and the warnings."""
    findings = validate(document)
    refused = REFUSED[mode] if isinstance(document, (dict, list)) else (E,)
    return (
        [finding for finding in findings if finding.level in refused],
        [finding for finding in findings if finding.level not in refused],
    )


def constraints() -> list[dict[str, Any]]:
    """List the rules, one entry for each code, with the level it has for each pattern."""
    listed: dict[str, dict[str, Any]] = {}
    for pattern in PATTERNS:
        for rule in RULES[pattern.name]:
            required = ("required", "be present", rule.absent)
            right = (rule.check.name, rule.check.demand, rule.wrong)
            for need, demand, level in (required, right):
                if level:
                    code = rule.code(need)
                    entry = {"code": code, "member": rule.member, "demand": demand, "levels": {}}
                    listed.setdefault(code, entry)["levels"].setdefault(pattern.name, level)
    return list(listed.values())


# --- Storage -------------------------------------------------------------------------------------

NAME = "[0-9]{8}_[0-9]{6}_[0-9a-f]{32}"
SUFFIX = ".json"
BATCH = 20_000  # names that are held in memory
FILE_NAME = re.compile(NAME + re.escape(SUFFIX))


def new_name() -> str:
    return time.strftime("%Y%m%d_%H%M%S_", time.gmtime()) + uuid.uuid4().hex


def open_file(path: str, flags: int) -> int:
    """Open as `os.open`, but follow no link, which could lead anywhere, and wait at no pipe."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, flags, 0o666)


def create(path: str, mode: str) -> IO[bytes]:
    """Open a file that may be new, and its directory too if somebody has removed it."""
    try:
        return open(path, mode, buffering=0, opener=open_file)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open(path, mode, buffering=0, opener=open_file)


def disk_full() -> OSError:
    """What to raise when only a part of something was written."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Store:
    """Notifications in a directory, one file each, which is the only truth about them.

    Files that somebody adds or removes, or another process that shares the directory, count. What
    goes wrong with the directory is raised as `OSError`.
    """

    def __init__(self, directory: str, fsync: bool) -> None:
        """Use `directory`, creating it if it is missing; `fsync` makes `add` wait for the disk."""
        self.directory = os.path.abspath(directory)
        self.fsync = fsync
        os.makedirs(self.directory, exist_ok=True)
        if not os.access(self.directory, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.directory)

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name + SUFFIX)

    def names(self) -> Iterator[str]:
        """Yield the names of the notifications by the second in which they arrived.

        Looks through the directory again for every `BATCH` of them, so as not to hold them all.
        """
        last, complete = "", False
        while not complete:
            batch = heapq.nsmallest(BATCH, (name for name in self.unsorted() if name > last))
            yield from batch
            last, complete = batch[-1] if batch else "", len(batch) < BATCH

    def unsorted(self) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            for entry in entries:
                if FILE_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    yield entry.name[: -len(SUFFIX)]

    def add(self, octets: bytes) -> str:
        """Store a notification under a new name, which is returned once it is complete.

        It appears whole or not at all, and never in place of another one.
        """
        name = new_name()
        draft = os.path.join(self.directory, f".{name}.part")
        try:
            with create(draft, "xb") as file:
                if file.write(octets) < len(octets):
                    raise disk_full()
                if self.fsync:
                    os.fsync(file.fileno())
            self.publish(draft, self.path(name))
        finally:
            with contextlib.suppress(OSError):
                os.remove(draft)
        return name

    def publish(self, draft: str, path: str) -> None:
        try:
            os.link(draft, path)
        except FileExistsError:
            raise
        except (AttributeError, OSError):
            # No hard links here. Names do not repeat, so this replaces nothing either.
            os.rename(draft, path)
        try:
            self.sync_directory()
        except OSError:
            os.remove(path)  # nobody will be told that it is there
            raise

    def sync_directory(self) -> None:
        if self.fsync and os.name == "posix":
            directory = os.open(self.directory, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def read(self, name: str) -> bytes:
        """Read the octets of a notification. Raises `KeyError` when there is none of this name."""
        with self.regular_file(name) as path, open(path, "rb", opener=open_file) as file:
            return file.read()

    def remove(self, name: str) -> None:
        """Remove a notification. Raises `KeyError` when there is none of this name."""
        with self.regular_file(name) as path:
            os.remove(path)

    @contextlib.contextmanager
    def regular_file(self, name: str) -> Iterator[str]:
        try:
            # What is no regular file could keep its reader waiting, or lead out of the directory.
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

# The members that say what a notification is about: who sent it, and its place in a conversation.
ABOUT = ("id", "inReplyTo", "origin.id", "actor.name", "actor.id", "object.id")
ABOUT_LENGTH = 1000  # characters that are kept of each

CONVERSATION = 50  # deliveries of one that are shown, the newest
MARK = 64  # octets at the beginning of a line in the log: they hold its name
HEARTBEAT = 1.0  # seconds after which those who follow the log learn that there is nothing new


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")[:-6] + "Z"


def summary(document: Any) -> dict[str, str]:
    """Collect the members in `ABOUT`, by their dotted names, as far as they are strings."""
    values = ((member, lookup(document, member)) for member in ABOUT)
    return {member: value[:ABOUT_LENGTH] for member, value in values if isinstance(value, str)}


class Delivery(NamedTuple):
    """An attempt to deliver a notification, and what became of it."""

    name: str  # also that of the notification, if it was stored; first, see `MARK`
    time: str  # of the answer: ISO 8601, UTC; empty for what was put into the store by hand
    client: str  # its address
    target: str  # of the request: path and query
    headers: Mapping[str, Any]  # of the request, without secrets
    status: int  # of the answer; 0 if there was none
    detail: str  # of the problem; empty if there was none
    pattern: str | None
    about: Mapping[str, Any]  # see `summary`
    findings: Sequence[Finding]
    body: bytes | None = None  # as far as it came; None in the log if it was stored
    simulated: bool = False  # whether a failure, or a delay, was asked for

    @property
    def verdict(self) -> str:
        if not self.status:
            return "dropped" if self.time else "found"
        if self.status >= 400:
            return "refused" if self.status < 500 else "failed"
        if self.status >= 300:
            return "redirected"
        return "queued" if self.status == 202 else "stored"

    @property
    def outcome(self) -> str:
        return f"{self.status} {self.verdict}" if self.status else self.verdict

    @property
    def notification(self) -> Any:
        """The document that was sent; None if it is not JSON, or not at hand."""
        try:
            return None if self.body is None else parse(self.body)
        except ValueError:
            return None

    @property
    def moment(self) -> str:
        """The time, for people, without the zone."""
        return self.time[:19].replace("T", " ")

    @property
    def sender(self) -> str | None:
        return self.about.get("origin.id") or self.about.get("actor.id")

    @property
    def subject(self) -> str | None:
        return self.about.get("object.id")

    def has_status(self, wanted: str) -> bool:
        """Whether the status is 400, say, or 4xx, or any where nothing is wanted."""
        return re.fullmatch(wanted.replace("x", ".") or ".*", str(self.status)) is not None

    def texts(self) -> Iterator[str]:
        """Yield what a search looks into."""
        yield from (self.name, str(self.status), self.verdict, self.detail)
        yield from filter(None, [self.pattern, *self.about.values()])
        for finding in self.findings:
            yield from (finding.code, finding.message)

    def as_json(self) -> dict[str, Any]:
        entry = {**self._asdict(), "findings": [finding.as_json() for finding in self.findings]}
        octets = entry.pop("body")
        if octets is None:
            return entry
        try:
            return {**entry, "body": octets.decode("utf-8")}
        except UnicodeDecodeError:
            return {**entry, "body_base64": base64.b64encode(octets).decode()}

    @classmethod
    def from_json(cls, line: bytes) -> Delivery | None:
        """Read what `as_json` wrote; None where it was torn, or edited beyond use."""
        try:
            entry = parse(line)
            findings = [Finding(**finding) for finding in entry.pop("findings")]
            octets = base64.b64decode(entry.pop("body_base64", ""), validate=True) or None
            text = entry.pop("body", None)
            body = octets if text is None else text.encode("utf-8", "replace")
            delivery = cls(**entry, findings=findings, body=body)
            texts = [delivery.name, delivery.time, delivery.client, delivery.target]
            texts += [delivery.detail, *delivery.about.values()]
            texts += [text for finding in findings for text in finding[:-1]]
            texts += [] if delivery.pattern is None else [delivery.pattern]
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        usable = (
            all(isinstance(text, str) for text in texts)
            and isinstance(delivery.headers, dict)
            and type(delivery.status) is int
            and type(delivery.simulated) is bool
            and re.fullmatch(NAME, delivery.name)
        )
        return delivery if usable else None


def found_in_store(name: str, octets: bytes) -> Delivery:
    """Describe a notification that was put into the store by hand."""
    document, detail = None, ""
    try:
        document = parse(octets)
    except ValueError as error:
        detail = f"it is not JSON: {error}"
    pattern = pattern_of(document)
    return Delivery(
        name,
        time="",
        client="",
        target="",
        headers={},
        status=0,
        detail=detail,
        pattern=pattern and pattern.name,
        about=summary(document),
        findings=[] if detail else validate(document),
    )


# What the values in a query must be, as a regular expression and in words. A form sends empty ones.
PARAMETERS = {
    "limit": ("|[1-9][0-9]{0,2}|1000", "a number from 1 to 1000"),
    "status": ("|0|[1-5]([0-9]{2}|xx)", "a status such as 400, or 4xx, or 0 for no answer"),
    "pattern": ("|".join(["", *RULES]), "one of " + ", ".join(RULES)),
    "since": (
        f"|{NAME}" r"|[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?Z)?",
        "the name of a delivery, or a time in UTC such as 2026-01-31T12:00:00Z",
    ),
    "before": (f"|{NAME}", "the name of a delivery"),
    "q": ("(?s:.*)", "a text"),
}


def parse_query(text: str, parameters: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Read the query of a URL. Raises `ValueError`, saying what may be asked for."""
    values = dict(parse_qsl(text, keep_blank_values=True, errors="strict"))
    for name, value in values.items():
        if name not in parameters:
            raise ValueError(f"{quoted(name)} is no parameter, but {', '.join(parameters)} are")
        expression, expected = parameters[name]
        if not re.fullmatch(expression, value):
            raise ValueError(f"{name} is {quoted(value)}, expected {expected}")
    return values


class Query(NamedTuple):
    """Which deliveries somebody wants to see; its members are the parameters of a URL."""

    limit: str = ""  # at most so many, the newest ones
    status: str = ""  # of the answer, such as 400 or 4xx
    pattern: str = ""
    since: str = ""  # after the delivery of this name, or from this time on
    before: str = ""  # before the delivery of this name
    q: str = ""  # holding this text

    @classmethod
    def from_query(cls, text: str) -> Query:
        """Read the query of a URL. Raises `ValueError`."""
        return cls(**parse_query(text, PARAMETERS))

    @property
    def page_length(self) -> int:
        return int(self.limit or 50)

    def matches(self, delivery: Delivery) -> bool:
        text = self.q.casefold()
        return (
            delivery.has_status(self.status)
            and self.pattern in ("", delivery.pattern)
            and any(text in each.casefold() for each in delivery.texts())
        )

    def ends_at(self, delivery: Delivery) -> bool:
        """Whether neither this delivery is wanted nor those before it."""
        # No name has a "-"; and without its "Z" a time is less than all that begin with it.
        moment = self.since.rstrip("Z") if "-" in self.since else ""
        return delivery.name == self.since or delivery.time < moment


def backwards(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, the last one first, each with the offset of its end."""
    start = end = file.seek(0, os.SEEK_END)
    rest = b""  # the end of a line whose beginning is still to be read
    while start:
        size = min(start, max(65536, len(rest)))  # doubled for long lines, so as not to join often
        start = file.seek(start - size)
        rest, *lines = (file.read(size) + rest).split(b"\n")
        for line in reversed(lines):
            yield end, line
            end -= len(line) + 1
    yield end, rest


class Bookmark(NamedTuple):
    """A place in the log of the deliveries, and a line by which to know that log again."""

    place: int  # offset of what is to be read next
    line: int  # offset of some line that was there
    beginning: bytes  # of that line, with the name of its delivery

    def holds(self, file: IO[bytes]) -> bool:
        """Whether a file is still the log that it was."""
        file.seek(self.line)
        return file.read(len(self.beginning)) == self.beginning

    def find(self, file: IO[bytes]) -> Bookmark:
        """Go to the place, or to the beginning of the file if that is not the log that it was."""
        mark = self if self.holds(file) else BEGINNING
        return mark._replace(place=file.seek(min(mark.place, file.seek(0, os.SEEK_END))))


BEGINNING = Bookmark(0, 0, b"")


class DeliveryLog:
    """All attempts to deliver a notification, one JSON object a line, the last one at the end.

    The file may be edited, cut short or removed at any time; lines that cannot be read are passed
    over. What else goes wrong with it is raised as `OSError`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.changed = threading.Condition()
        self.wakes = 0

    def append(self, delivery: Delivery) -> None:
        """Write a delivery at the end of the log, with the time, whole or not at all."""
        with self.changed, create(self.path, "a+b") as file:
            # Here, so that the lines are in the order of their times.
            line = json.dumps({**delivery.as_json(), "time": utc_now()}).encode() + b"\n"
            end = file.tell()
            if not self.is_whole(file):
                # The last line was cut short, or another process is just writing it: then an
                # empty line will follow.
                line = b"\n" + line
            if file.write(line) < len(line):
                file.truncate(end)
                raise disk_full()
            self.changed.notify_all()

    def is_whole(self, file: IO[bytes]) -> bool:
        """Whether the last line of a log has its end."""
        file.seek(max(0, file.tell() - 1))
        return file.read(1) in (b"", b"\n")

    def clear(self) -> None:
        with self.changed, contextlib.suppress(FileNotFoundError):
            os.remove(self.path)

    def wake(self) -> None:
        """Have those who `follow` look around at once."""
        with self.changed:
            self.wakes += 1
            self.changed.notify_all()

    def reading(self) -> IO[bytes]:
        try:
            return open(self.path, "rb", opener=open_file)
        except FileNotFoundError:
            return io.BytesIO()

    def newest_first(self, *texts: str) -> Iterator[Delivery]:
        """Read the log from its end; where texts are given, only what holds one of them."""
        needles = [json.dumps(text)[1:-1].encode() for text in texts] or [b""]
        with self.reading() as file:
            for _, line in backwards(file):
                # Most lines need not be parsed to see that they do not matter.
                delivery = Delivery.from_json(line) if any(n in line for n in needles) else None
                if delivery:
                    yield delivery

    def find(self, name: str) -> Delivery | None:
        """Find a delivery by its name."""
        return next((each for each in self.newest_first(name) if each.name == name), None)

    def select(self, query: Query, limit: int | None) -> Iterator[Delivery]:
        """Find the deliveries that somebody wants to see, the newest first, at most so many."""
        deliveries = self.newest_first()
        if query.before:
            deliveries = itertools.dropwhile(lambda each: each.name != query.before, deliveries)
            next(deliveries, None)
        recent = itertools.takewhile(lambda each: not query.ends_at(each), deliveries)
        yield from itertools.islice(filter(query.matches, recent), limit)

    def conversation(self, about: Mapping[str, str]) -> list[Delivery]:
        """Find what a notification answers, what answers it, and itself, the oldest first.

        Of very many, these are the newest, and what it answers.
        """
        own, asked = about.get("id"), about.get("inReplyTo")
        ids = {text for text in (own, asked) if text}
        found = (
            delivery
            for delivery in (self.newest_first(*ids) if ids else ())
            if not ids.isdisjoint((delivery.about.get("id"), delivery.about.get("inReplyTo")))
        )
        newest = list(itertools.islice(found, CONVERSATION))
        if asked and all(delivery.about.get("id") != asked for delivery in newest):
            older = (delivery for delivery in found if delivery.about.get("id") == asked)
            newest += itertools.islice(older, 1)
        return newest[::-1]

    def bookmark(self, query: Query) -> Bookmark:
        """Find where `follow` is to begin: at the end, unless something `since` then is wanted."""
        with self.reading() as file:
            first = file.read(MARK)
            size = file.seek(0, os.SEEK_END)
            for end, line in backwards(file) if query.since else ():
                delivery = Delivery.from_json(line)
                if delivery and query.ends_at(delivery):
                    return Bookmark(end, end - len(line), line[:MARK])
        return Bookmark(0 if query.since else size, 0, first)

    def follow(
        self, bookmark: Bookmark, patience: Callable[[], float] = lambda: HEARTBEAT
    ) -> Iterator[Delivery | None]:
        """Yield the deliveries from a place on, as they come.

        Yields None when all have been read, and whenever some seconds, `patience`, have brought
        none, or `wake` is called.
        """
        while True:
            state = self.state()
            with self.reading() as file:
                found = bookmark = bookmark.find(file)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    place, delivery = bookmark.place, Delivery.from_json(line)
                    bookmark = bookmark._replace(place=place + len(line))
                    if delivery:
                        bookmark = Bookmark(bookmark.place, place, line[:MARK])
                        yield delivery
                if not found.holds(file):  # it was exchanged while it was read
                    bookmark = BEGINNING
            while state == self.state():
                yield None
                with self.changed:
                    if state == self.state():
                        self.changed.wait(patience())

    def state(self) -> tuple[int, ...]:
        """Return a value that changes when the file does, or somebody calls `wake`."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return (self.wakes,)
        return self.wakes, status.st_ino, status.st_size, status.st_mtime_ns


# --- Pages ---------------------------------------------------------------------------------------

MAX_LINES = 2000  # of a payload that are shown
MAX_LENGTH = 2000  # characters of a text that are shown

STYLE = """
:root {
  color-scheme: light dark;
  --ink: light-dark(#1b2026, #e3e7eb); --paper: light-dark(#fff, #12161b);
  --faint: light-dark(#59636e, #98a2ad); --line: light-dark(#d5dae0, #333b44);
  --link: light-dark(#0a4fae, #7fb8f7); --good: light-dark(#13652d, #5fce7c);
  --bad: light-dark(#a3142b, #ff8a80); --odd: light-dark(#7a4a00, #e5b35b);
  --E: light-dark(#ffe1df, #56211f); --M: light-dark(#fff0bf, #4a3a0c);
  --S: light-dark(#e2eefc, #1d344e);
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 0 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 14px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
a { color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 1px; }
h1 { font-size: 1.3rem; margin: 1rem 0 .5rem; }
h2 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
code, pre, time { font-family: ui-monospace, monospace; font-size: .9em; }
pre { margin: 0; padding: .5rem .75rem; border: 1px solid var(--line); white-space: pre-wrap; }
header, form { display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: center; }
header { padding: .5rem 0; border-bottom: 1px solid var(--line); }
[hidden] { display: none; }
input, select, button { font: inherit; line-height: inherit; height: 1.75rem; color: inherit;
  background: var(--paper); border: 1px solid var(--faint); border-radius: 3px; }
#q { width: 16rem; }
#empty { margin-left: auto; }
.copy { user-select: all; }
.faint, dt, time { color: var(--faint); }
.stored, .queued { color: var(--good); }
.refused { color: var(--bad); }
.failed, .dropped, .redirected, .warning { color: var(--odd); }
#newest { position: absolute; clip-path: inset(50%); }
ol.rows { list-style: none; margin: .25rem -.5rem; padding: 0; }
ol.rows a, .columns { display: grid; grid-template-columns: 10rem 7.5rem 13rem 1fr 1fr;
  gap: 0 1rem; align-items: baseline; }
ol.rows a { padding: .25rem .5rem; border-top: 1px solid var(--line);
  color: inherit; text-decoration: none; }
ol.rows a:hover, ol.rows a[aria-current] { background: var(--S); }
ol.rows span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
ol.rows .why { grid-column: 2 / -1; }
.columns { margin: 1rem 0 0; font-size: .9em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: .5rem 0; }
dd { margin: 0; }
.beside { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 0 1.5rem; }
.beside > section:first-child { order: 1; }
.E { --tint: var(--E); --edge: var(--bad); }
.M { --tint: var(--M); --edge: var(--odd); }
.S { --tint: var(--S); --edge: var(--link); }
mark { display: block; margin: 0 -.75rem; padding: 0 .75rem; color: inherit;
  background: var(--tint); }
ol.findings { margin: 0; padding-left: 1.75rem; }
ol.findings li { margin-bottom: .5rem; padding-left: .5rem; border-left: 3px solid var(--edge); }
ol.findings p { margin: 0; }
ol.findings .faint { font-size: .9em; }
li:target, tr:target, mark:has(:target) { outline: 2px solid var(--link); }
table { border-collapse: collapse; table-layout: fixed; width: 100%; }
tr { border-bottom: 1px solid var(--line); }
td, th { padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
@media (max-width: 60rem) {
  .beside, label:has(#q), td { display: block; }
  .columns, thead { display: none; }
  td { padding: 0; }
  ol.rows a { grid-template-columns: max-content 1fr; }
  ol.rows span, ol.rows .why { grid-column: 1 / -1; }
  ol.rows .why { white-space: normal; }
}
"""

# The server renders everything; the script fetches the page again and exchanges what is `live`.
SCRIPT = """
const home = document.querySelector("nav a").href;
const form = document.querySelector("form");
const state = document.getElementById("state");
let wanted = false, busy = false, events;

function say(text, kind) {
  state.textContent = text;
  state.className = kind;
}

function exchange(part, fresh) {
  const rows = part.querySelector("ol"), found = fresh.querySelector("ol");
  if (!rows || !found) return part.replaceChildren(...fresh.childNodes);
  // Row by row, so that nothing moves under the eyes, the pointer or the focus of a reader.
  const keys = list => [...list.children].map(row => row.firstElementChild.id);
  const left = keys(found);
  for (const row of [...rows.children]) {
    if (!left.includes(row.firstElementChild.id)) row.remove();
  }
  [...found.children].forEach((row, index) => {
    if (keys(rows)[index] !== left[index]) rows.insertBefore(row, rows.children[index] ?? null);
  });
}

async function renew() {
  const answer = await fetch(location.href, {headers: {Accept: "text/html"}});
  if (!answer.ok) return say(answer.status === 404 ? "removed" : "not connected", "refused");
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll(".live")) {
    exchange(part, page.getElementById(part.id));
  }
}

async function refresh() {
  wanted = true;
  if (busy) return;
  busy = true;
  while (wanted) {
    wanted = false;
    await renew().catch(() => say("not connected", "refused"));
  }
  busy = false;
}

function listen() {
  events?.close();  // a browser has few connections for all the pages that are open
  if (document.hidden) return;
  events = new EventSource(home + "deliveries");
  events.onopen = () => { say("live", "faint"); refresh(); };
  events.onmessage = refresh;
  events.onerror = () => say("not connected", "refused");
}

async function empty() {
  if (!confirm("Remove all notifications and deliveries from the inbox?")) return;
  const answer = await fetch(home + "inbox", {method: "DELETE"}).catch(() => null);
  if (answer?.ok) location.href = home;
  else alert(answer ? (await answer.json()).detail : "The inbox cannot be reached.");
}

if (form) {
  const button = document.getElementById("empty");
  button.hidden = false;
  button.addEventListener("click", empty);
  document.getElementById("filter").hidden = true;
  form.addEventListener("input", () => {
    history.replaceState(null, "", home + "?" + new URLSearchParams(new FormData(form)));
    refresh();
  });
}
document.addEventListener("visibilitychange", listen);
listen();
"""


def digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src {digest(STYLE)}; script-src {digest(SCRIPT)}; img-src data:;"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<b>coarinbox</b> <code class="copy">{inbox}</code>
<nav><a href="{root}">Deliveries</a> · <a href="{root}constraints">Constraints</a></nav>
<span id="state" role="status"></span>
</header>
<main>
{content}
</main>
<script>{script}</script>
</body>
</html>
"""

HOME = """<h1>Deliveries</h1>
<form role="search" action="{root}">
<label>Filter <input id="q" type="search" name="q" value="{q}" autocomplete="off"
placeholder="pattern, id, origin, finding …"></label>
<label>Status <select id="status" name="status">{options}</select></label>
<input type="hidden" name="pattern" value="{pattern}">
<input type="hidden" name="since" value="{since}">
<button id="filter">Filter</button>
<button id="empty" type="button" hidden>Empty the inbox</button>
</form>
<p id="newest" class="live" role="status">{newest}</p>
<p class="columns faint" aria-hidden="true"><span>Time (UTC)</span> <span>Verdict</span>
<span>Pattern</span> <span>Origin</span> <span>Object</span></p>
<div id="deliveries" class="live">{deliveries}</div>
<p id="more" class="live">{more}</p>"""

OPTION = """<option value="{value}"{selected}>{label}</option>"""
STATUSES = {"": "all", "2xx": "2xx stored", "4xx": "4xx refused", "5xx": "5xx failed"}

ROWS = """<ol class="rows">{rows}</ol>"""

ROW = """
<li><a id="row-{name}" href="{root}deliveries/{name}"{current}>
<time datetime="{time}">{moment}</time> <b class="{verdict}">{outcome}</b>
<span>{pattern}</span> <span class="faint">{sender}</span> <span class="faint">{subject}</span>
<span class="why {kind}">{reasons}</span></a></li>"""

NEWEST = """<a href="{root}{query}">Newest deliveries</a> """
OLDER = """<a href="{root}{query}">Older deliveries</a>"""

NOTE = """<p class="{kind}">{text}</p>"""

EMPTY = """<p>Nothing has been delivered yet. The inbox, ready to copy:</p>
<pre class="copy">{inbox}</pre>
<p>A first notification, to try it:</p>
<pre class="copy">curl -i {inbox} {token}-H 'Content-Type: application/ld+json' -d '{
  "@context": ["https://www.w3.org/ns/activitystreams", "https://coar-notify.net"],
  "id": "urn:uuid:94ecae35-dcfd-4182-8550-22c7164fe23f",
  "type": ["Announce", "coar-notify:ReviewAction"],
  "actor": {"id": "https://review.example.com/", "name": "Reviews", "type": "Service"},
  "origin": {"id": "https://review.example.com/system", "type": "Service",
             "inbox": "https://review.example.com/inbox"},
  "target": {"id": "https://repository.example.org/", "type": "Service",
             "inbox": "https://repository.example.org/inbox"},
  "context": {"id": "https://repository.example.org/preprint/421"},
  "object": {"id": "https://review.example.com/review/7", "type": ["Page", "sorg:Review"],
             "ietf:cite-as": "https://doi.org/10.5555/98765"}}'</pre>"""

DELIVERY = """<h1><span class="{verdict}">{outcome}</span> {pattern}</h1>
<p>{detail}</p>
<dl>{facts}</dl>
<div class="beside">
<section aria-labelledby="findings"><h2 id="findings">Findings</h2>
{findings}</section>
<section aria-labelledby="payload"><h2 id="payload">Payload</h2>
{payload}</section>
</div>
<section><h2>Conversation</h2>
<div id="missing" class="live">{missing}</div>
<div id="conversation" class="live">{conversation}</div></section>
<section><h2>Request</h2>
<pre>POST {target}
{head}</pre></section>"""

FACT = """<dt>{name}</dt><dd>{value}</dd>"""
LINK = """<a href="{url}">{text}</a>"""
LINE = """{text}\n"""
MARKED_LINE = """<mark class="{level}">{text}{references}</mark>"""
REFERENCE = """ <a id="at-{number}" href="#finding-{number}">[{number}]</a>"""
FINDING = """
<li id="finding-{number}" class="{level}"><p>{message}</p>
<p class="faint"><a href="#at-{number}">{place}</a> · {meaning} ·
<a href="{root}constraints#{code}">{code}</a> · {specification}</p></li>"""
FINDINGS = """<ol class="findings">{items}</ol>"""
PAYLOAD = """<pre>{lines}</pre>
<p class="faint">Indented. <a href="{root}deliveries/{name}/body">As it came</a></p>"""

CONSTRAINTS = """<h1>Constraints</h1>
<dl>{meanings}</dl>
<table>
<thead><tr><th>Code</th><th>The member is to</th><th>Levels</th></tr></thead>
<tbody>{rows}</tbody>
</table>"""
CONSTRAINT = """
<tr id="{code}"><td><code>{code}</code></td><td>{demand}</td><td>{levels}</td></tr>"""


class Html(NamedTuple):
    """Markup that may be sent as it is: made by `fill` from the templates above."""

    text: str


def safe(value: Any) -> str:
    """Write a value as HTML: markup and lists of it as they are, anything else escaped."""
    if isinstance(value, Html):
        return value.text
    if isinstance(value, list):
        return "".join(map(safe, value))
    return "" if value is None else html.escape(visible(clip(str(value), MAX_LENGTH)))


def fill(template: str, source: object = None, **values: Any) -> Html:
    """Put values into a template; those that are not given are attributes of `source`."""

    def field(match: re.Match[str]) -> str:
        name = match[1]
        return safe(values[name] if name in values else getattr(source, name))

    return Html(re.sub(r"\{([a-z]+)\}", field, template))


class Site(NamedTuple):
    """What a page needs to know about where it stands."""

    root: str  # the relative URL of `/`
    inbox: str  # the absolute URL of the inbox
    token: str  # what curl needs besides


def page(site: Site, title: str, content: Html) -> Html:
    return fill(PAGE, site, title=title, style=Html(STYLE), script=Html(SCRIPT), content=content)


def by_level(findings: Sequence[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: finding.level)


def rows(site: Site, deliveries: Sequence[Delivery], current: str = "") -> Html:
    """List deliveries, each with the reasons for its verdict; the current one is marked."""
    items = []
    for delivery in deliveries:
        messages = [finding.message for finding in by_level(delivery.findings)]
        reasons = clip("; ".join(messages) or delivery.detail, 500)
        kind = delivery.verdict if delivery.detail else "warning"
        here = Html(' aria-current="page"') if delivery.name == current else ""
        item = fill(ROW, delivery, root=site.root, current=here, kind=kind, reasons=reasons)
        items.append(item)
    return fill(ROWS, rows=items)


def note(text: str, kind: str = "faint") -> Html:
    return fill(NOTE, kind=kind, text=text)


def home_page(site: Site, query: Query, deliveries: Sequence[Delivery]) -> Html:
    """Show the deliveries that a query selects, or how to make the first one.

    There may be one delivery more than are to be shown, which means that there are older ones.
    """
    listed, newest, content = deliveries[: query.page_length], "", note("No delivery matches.")
    if listed:
        newest = f"The newest: {listed[0].moment}, {listed[0].outcome}."
        content = rows(site, listed)
    elif query == Query():
        content = fill(EMPTY, site)
    statuses = {**STATUSES, query.status: STATUSES.get(query.status, query.status)}
    options = [
        fill(OPTION, value=value, label=label, selected=Html(" selected" * (value == query.status)))
        for value, label in statuses.items()
    ]
    live = {"newest": newest, "deliveries": content, "more": turn_page(site, query, deliveries)}
    home = fill(HOME, query, root=site.root, options=options, **live)
    return page(site, "Deliveries · coarinbox", home)


def turn_page(site: Site, query: Query, deliveries: Sequence[Delivery]) -> list[Html]:
    limit, links = query.page_length, []
    if query.before:
        links.append(fill(NEWEST, site, query=as_query(query._replace(before=""))))
    if len(deliveries) > limit:
        older = query._replace(before=deliveries[limit - 1].name)
        links.append(fill(OLDER, site, query=as_query(older)))
    return links


def as_query(query: Query) -> str:
    return "?" + urlencode({name: value for name, value in query._asdict().items() if value})


def delivery_page(
    site: Site, delivery: Delivery, octets: bytes | None, around: Sequence[Delivery]
) -> Html:
    """Show a delivery: what is wrong with it beside its payload, and what belongs to it."""
    unstored = delivery.detail or octets is None
    stored = {} if unstored else {"stored as": f"{site.inbox}/{delivery.name}"}
    facts = {"time": delivery.time, "client": delivery.client, **stored, **delivery.about}
    content = fill(
        DELIVERY,
        delivery,
        facts=[fill(FACT, name=name, value=linked(value)) for name, value in facts.items()],
        findings=findings_list(site, delivery),
        payload=payload(site, delivery, octets),
        missing=missing(delivery, around),
        conversation=conversation(site, delivery, around),
        head=[fill(LINE, text=f"{name}: {value}") for name, value in delivery.headers.items()],
    )
    title = f"{delivery.outcome} {delivery.pattern or ''} · coarinbox"
    return page(site, title, content)


def linked(value: str, text: str = "") -> str | Html:
    return fill(LINK, url=value, text=text or value) if is_http_uri(value) else value


def findings_list(site: Site, delivery: Delivery) -> Html:
    if not delivery.findings:
        return note("None." if delivery.pattern else "Not checked.")
    items = []
    for number, finding in enumerate(by_level(delivery.findings), 1):
        place, meaning = finding.pointer or "the notification", LEVELS.get(finding.level)
        common = {"root": site.root, "number": number, "place": place, "meaning": meaning}
        specification = linked(finding.spec, "specification")
        items.append(fill(FINDING, finding, **common, specification=specification))
    return fill(FINDINGS, items=items)


def missing(delivery: Delivery, around: Sequence[Delivery]) -> Html | str:
    asked = delivery.about.get("inReplyTo")
    if not asked or any(other.about.get("id") == asked for other in around):
        return ""
    return note(f"It replies to {clip(asked, 200)}, which was never delivered here.", "warning")


def conversation(site: Site, delivery: Delivery, around: Sequence[Delivery]) -> Html:
    """Show what a notification answers, and what answers it."""
    if all(other.name == delivery.name for other in around):
        return note("No other delivery belongs to it.")
    return rows(site, around, delivery.name)


def payload(site: Site, delivery: Delivery, octets: bytes | None) -> Html:
    """Show a notification, or what came in place of one, with the numbers of the findings."""
    if not octets:
        return note("It is no longer stored." if octets is None else "Nothing of it was read.")
    try:
        lines = outline(parse(octets))
    except ValueError:
        lines = ((None, text) for text in octets.decode("utf-8", "backslashreplace").splitlines())
    first = list(itertools.islice(lines, MAX_LINES))
    marks = locate(by_level(delivery.findings), {path for path, _ in first})
    listed = [payload_line(text, marks.get(path, [])) for path, text in first]
    if next(lines, None):
        listed.append(fill(LINE, text=f"… only {MAX_LINES} lines are shown"))
    return fill(PAYLOAD, delivery, root=site.root, lines=listed)


def payload_line(text: str, marks: Sequence[tuple[int, Finding]]) -> Html:
    if not marks:
        return fill(LINE, text=text)
    references = [fill(REFERENCE, number=number) for number, _ in marks]
    return fill(MARKED_LINE, marks[0][1], text=text, references=references)


Path = tuple[str, ...]  # the members and indexes that lead to a value


def locate(
    findings: Sequence[Finding], paths: Collection[Path | None]
) -> dict[Path | None, list[tuple[int, Finding]]]:
    """Number the findings, and collect them by path: their own, or that of the next parent."""
    marks: dict[Path | None, list[tuple[int, Finding]]] = {}
    for number, finding in enumerate(findings, 1):
        path = tuple(finding.pointer.split("/")[1:])  # no rule has a member with "/" or "~"
        while path and path not in paths:
            path = path[:-1]
        marks.setdefault(path, []).append((number, finding))
    return marks


def outline(
    value: Any, path: Path = (), before: str = "", after: str = ""
) -> Iterator[tuple[Path | None, str]]:
    """Yield the lines of a document as JSON, each with the path to what begins on it."""
    children: list[tuple[str, str, Any]] = []
    if isinstance(value, dict):
        children = [(name, f"{json_text(name)}: ", child) for name, child in value.items()]
    elif isinstance(value, list) and any(isinstance(child, (dict, list)) for child in value):
        children = [(str(index), "", child) for index, child in enumerate(value)]
    if not children:
        yield path, f"{before}{json_text(value)}{after}"
        return
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    margin = "  " * len(path)
    yield path, before + opening
    for number, (name, key, child) in enumerate(children, 1):
        comma = "," if number < len(children) else ""
        yield from outline(child, (*path, name), f"{margin}  {key}", comma)
    yield None, margin + closing + after


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def constraints_page(site: Site, refused: Sequence[str]) -> Html:
    """Show the rules, and which of their levels this inbox refuses."""
    listed = [fill(CONSTRAINT, **{**entry, "levels": levels(entry)}) for entry in constraints()]
    meanings = [
        fill(FACT, name=level, value=meaning + "; refused here" * (level in refused))
        for level, meaning in LEVELS.items()
    ]
    content = fill(CONSTRAINTS, meanings=meanings, rows=listed)
    return page(site, "Constraints · coarinbox", content)


def levels(entry: Mapping[str, Any]) -> str:
    """Say which patterns a constraint has at which level."""
    named: dict[str, list[str]] = {}
    for name, level in entry["levels"].items():
        named.setdefault(level, []).append(name)
    return "; ".join(
        f"{level}: {'every pattern' if len(names) == len(PATTERNS) else ', '.join(names)}"
        for level, names in named.items()
    )


# --- Answers -------------------------------------------------------------------------------------

JSON_LD = "application/ld+json"
PIECE = 65536  # characters, about, of a long list that are sent at once


class Response(NamedTuple):
    """Status, body and own headers of an answer; `reply` adds the headers that all have."""

    status: int  # 0 ends the connection without an answer
    body: bytes | Generator[bytes, None, None] = b""
    headers: Mapping[str, str] = {}
    detail: str = ""  # why it is an error


def json_response(
    status: int, document: Any, kind: str = "application/json", headers: Mapping[str, str] = {}
) -> Response:
    body = json.dumps(document, indent=2).encode() + b"\n"
    return Response(status, body, {"Content-Type": kind, **headers})


def html_response(document: Html, headers: Mapping[str, str] = {}) -> Response:
    common = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "Referrer-Policy": "no-referrer",
    }
    return Response(200, document.text.encode(), {**common, **headers})


class Problem(Exception):
    """Something to answer with an error; raise it anywhere while a request is served."""

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] = {}, **members: Any
    ) -> None:
        self.status, self.detail = status, detail
        self.headers, self.members = headers, members

    def response(self) -> Response:
        """Make the problem document (RFC 9457)."""
        phrase = http.client.responses.get(self.status, "Error")
        title = {"type": "about:blank", "title": phrase, "status": self.status}
        document = {**title, "detail": self.detail, **self.members}
        response = json_response(self.status, document, "application/problem+json", self.headers)
        return response._replace(detail=self.detail)


@contextlib.contextmanager
def store_problems() -> Iterator[None]:
    """Turn what goes wrong with the store into problems."""
    try:
        yield
    except KeyError:
        raise Problem(404, "no notification has this name") from None
    except OSError as error:
        LOG.error("the store failed: %s", error)
        full = errno.errorcode.get(error.errno or 0) in ("ENOSPC", "EDQUOT")
        detail = f"the store failed: {error.strerror or error}"
        raise Problem(507 if full else 500, detail) from error


def json_list(
    document: Mapping[str, Any], member: str, texts: Iterable[str], kind: str = "application/json"
) -> Response:
    """Answer with a document whose last member is a list of texts, each of which is JSON.

    It is sent while it is read. What goes wrong with the store before is raised here, as `Problem`.
    """
    head, _, tail = json.dumps({**document, member: []}, indent=2).rpartition("[]")
    pieces = in_pieces(head + "[", texts, f"\n  ]{tail}\n")
    first, second = next(pieces), next(pieces, b"")  # only one piece goes with its length
    body = resumed(first + second, pieces) if second else first
    return Response(200, body, {"Content-Type": kind})


def in_pieces(head: str, texts: Iterable[str], tail: str) -> Generator[bytes, None, None]:
    piece, separator = head, "\n    "
    with store_problems():
        for text in texts:
            piece += separator + text.replace("\n", "\n    ")
            separator = ",\n    "
            if len(piece) > PIECE:
                yield piece.encode()
                piece = ""
    yield (piece + tail).encode()


def resumed(start: bytes, rest: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
    yield start
    yield from rest


def as_event(delivery: Delivery | None) -> bytes:
    """Write a delivery as a server-sent event (HTML section 9.2)."""
    if delivery is None:
        return b":\n\n"  # a comment, or nobody would notice that the client has left
    return f"id: {delivery.name}\ndata: {json.dumps(delivery.as_json())}\n\n".encode()


# --- Simulated failures --------------------------------------------------------------------------

# What the values in the query of the inbox must be, as a regular expression and in words.
FAILURE_PARAMETERS = {
    "status": ("[345][0-9]{2}", "a status from 300 to 599"),
    "times": ("[1-9][0-9]{0,5}", "a number from 1 to 999999"),
    "retry-after": (
        "[0-9]{1,9}|[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}(:[0-9]{2}){2} GMT",
        "a number of seconds or an HTTP date",
    ),
    "delay": (r"[0-9]{1,4}(\.[0-9]{1,9})?|\.[0-9]{1,9}", "a number of seconds, at most 9999"),
    "close": ("1", "1"),
}


class Failure(NamedTuple):
    """What an attempt to deliver meets, because a test wants it to."""

    status: int = 0  # of the answer
    times: int = 0  # how many attempts at each notification; 0 for all
    retry_after: str = ""  # seconds, or an HTTP date (RFC 9110 section 10.2.3)
    delay: float = 0  # seconds until the answer
    close: bool = False  # whether there is no answer at all

    @classmethod
    def from_query(cls, text: str) -> Failure:
        """Read the query of a URL. Raises `ValueError` if it does not make a failure."""
        values = parse_query(text, FAILURE_PARAMETERS)
        if values and not values.keys() & {"status", "delay", "close"}:
            raise ValueError("a failure needs a status, a delay or close")
        return cls(
            status=int(values.get("status", 0)),
            times=int(values.get("times", 0)),
            retry_after=values.get("retry-after", ""),
            delay=float(values.get("delay", 0)),
            close="close" in values,
        )

    def headers(self, inbox: str) -> dict[str, str]:
        location = inbox if self.status < 400 else ""
        fields = {"Retry-After": self.retry_after, "Location": location}
        return {name: value for name, value in fields.items() if value}


MAX_MET = 10_000  # notifications whose attempts are counted


class Failures:
    """The failures that are due: those that were lined up first, then those that URLs ask for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.next: collections.deque[Failure] = collections.deque()
        self.met: dict[tuple[Failure, str], int] = {}  # attempts that failed, the latest last

    def line_up(self, failure: Failure) -> None:
        """Have the next attempts meet a failure, as many as it says."""
        with self.lock:
            self.next.extend([failure] * failure.times)

    def due(self, failure: Failure, id_: str) -> Failure | None:
        """Return what the next attempt at the notification with this id has to meet."""
        with self.lock:
            if self.next:
                return self.next.popleft()
            if failure == Failure():
                return None
            attempts = self.met.pop((failure, id_), 0)
            if failure.times:
                self.met[failure, id_] = attempts + 1
            if len(self.met) > MAX_MET:
                del self.met[next(iter(self.met))]
            return failure if attempts < (failure.times or 1) else None

    def clear(self) -> None:
        with self.lock:
            self.next.clear()
            self.met.clear()


# --- Connections ---------------------------------------------------------------------------------

# One thread, the leader, serves every request as long as there is nothing to wait for: threads that
# share an interpreter slow each other down at each call of the system. Who has to wait, for a
# client, the disk or a long list, calls `InboxServer.resign` before that, or waits in a block of
# `InboxServer.away`; then another thread leads, and this one is done when it has answered. A
# connection without a request needs no thread.

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


# Seconds that a client may take over a request, or an answer, even if others want to be served.
GRACE = 0.5


class Wait(NamedTuple):
    """What a connection waits for.

    Without a request that has begun, it is for the next one, or for the next event of a stream.
    """

    since: float  # as of `time.monotonic`
    how: int  # for `socket.shutdown`, to end it: SHUT_RD where it reads, else SHUT_RDWR
    grace: float = 0  # seconds for which it is not ended to make room for others
    begun: bool = False  # whether it is for the rest of a request, or until an answer is taken


class Wire(io.RawIOBase):
    """The octets that come from a client and go to it, until a deadline, however slowly they drip.

    The socket does not block. Only when there is nothing to read, or no room for what is sent, does
    the thread wait for the client, and lets another one lead. At the deadline, reading raises
    `Problem`, and `send` raises `OSError`.
    """

    def __init__(
        self,
        connection: socket.socket,
        away: Callable[[Wait], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Use a connection, and let others be served in blocks of `away`."""
        self.connection, self.away = connection, away
        self.waits = True  # whether reading waits for the client, or else finds nothing
        # Whether the selector has seen something: good for one reading, or a client that keeps
        # sending would keep the leader from all others.
        self.ready = False
        self.ended = False  # whether the client will send no more
        self.evicted = False  # whether the server has ended the connection
        self.connection.setblocking(False)

    def start(self, seconds: float) -> None:
        """Give the client so long."""
        self.began = time.monotonic()
        self.deadline = self.began + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if not self.waits and not self.ready and not self.decrypted():
            return None
        self.ready = False
        try:
            size = self.receive(buffer)
        except socket.timeout:
            raise self.too_late() from None
        except ConnectionError:
            size = 0  # a client that is gone will send no more
        self.ended = size == 0
        if self.ended and self.waits and self.evicted:
            detail = "the request was not complete when others came (MAX_CONNECTIONS)"
            raise Problem(503, detail, {"Retry-After": "1"})
        # Octets that come one by one come in time, each.
        if self.waits and time.monotonic() > self.deadline:
            raise self.too_late()
        return size

    def receive(self, buffer: Any) -> int | None:
        """Read what has come; where nothing has, wait for it, or return None."""
        try:
            return self.connection.recv_into(buffer)
        except WOULD_BLOCK:
            if not self.waits:
                return None
            with self.patiently(socket.SHUT_RD):
                return self.connection.recv_into(buffer)

    def decrypted(self) -> bool:
        """Whether TLS holds octets of which the selector knows nothing."""
        return isinstance(self.connection, ssl.SSLSocket) and self.connection.pending() > 0

    def too_late(self) -> Problem:
        return Problem(408, "the request was not complete in time (REQUEST_TIMEOUT)")

    def send(self, octets: bytes) -> None:
        """Send all. Raises `OSError` if the client is gone, or does not take it in time."""
        sent = 0
        with contextlib.suppress(*WOULD_BLOCK):
            sent = self.connection.send(octets)
        if sent < len(octets):
            with self.patiently(socket.SHUT_RDWR):
                self.connection.sendall(memoryview(octets)[sent:])

    @contextlib.contextmanager
    def patiently(self, how: int) -> Iterator[None]:
        """Wait for the client in the block, until the deadline, while others are served."""
        with self.away(Wait(self.began, how, GRACE, begun=True)):
            # 0 would mean not to wait, and less than that is no time-out.
            self.connection.settimeout(max(0.001, self.deadline - time.monotonic()))
            try:
                yield
            finally:
                self.connection.setblocking(False)


# --- HTTP ----------------------------------------------------------------------------------------

JSON_TYPE = re.compile(r"(?i:application/([^\s;]+\+)?json)[ \t]*(;|\Z)")
ACCEPT_POST = f"{JSON_LD}, application/json, application/activity+json"

# The Host header (RFC 9110 section 7.2).
HOST_HEADER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+|(?!:))(?::[0-9]+)?")
# The request line and a header line (RFC 9112 sections 3 and 5), held to the letter: whatever
# another reader of the same octets could take for something else, a line folded or ended otherwise,
# is refused. The target of a request is a path, or a whole URL.
REQUEST_LINE = re.compile(
    r"([!-~]+) (?=[!-~])(?:(?i:https?)://([!-.0->@-~]*))?([!-~]*) (HTTP/[1-9]\.[0-9])\r\n"
)
HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n")
MAX_HEADERS = 100  # as in `http.client`
MAX_LINE = 65536

# Answers that have no body (RFC 9110 section 6.4.1).
BODILESS = (204, 304)

LINE_ENDS = 8  # octets of empty lines before a request that are passed over

# Seconds for which a connection that ends early is still read, so that its client gets the answer.
LINGER = 2.0

INBOX = "/inbox/?"
# The beginning of a request that delivers a notification, even if the rest is malformed.
DELIVERS = re.compile(f"POST +((?i:https?)://[^/? ]*)?/*{INBOX}[?\\s]".encode())

# Headers whose values are nobody else's business.
SECRET = frozenset({"authorization", "cookie", "proxy-authorization"})


def quality(media_type: str, accept: str) -> float:
    """Weigh a media type, from 0 to 1, by an Accept header (RFC 9110 section 12.5.1)."""
    weights: dict[str, float] = {}
    for element in re.findall(r'(?:[^,"]|"[^"]*"?)+', accept.lower()):
        name, *parameters = (part.strip() for part in element.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "")
        known = re.fullmatch(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?", weight)
        weights[name] = max(weights.get(name, 0.0), float(weight) if known else 1.0)
    for name in (media_type, media_type.partition("/")[0] + "/*", "*/*"):
        if name in weights:
            return weights[name]
    return 0.0


def check_line(line: bytes, what: str, too_long: int) -> None:
    """Refuse a line that is longer than `MAX_LINE`, with that status, or that broke off."""
    if len(line) > MAX_LINE:
        raise Problem(too_long, f"{what} is longer than {MAX_LINE} octets")
    if not line.endswith(b"\n"):
        raise Problem(400, f"the connection ended before {what} did")


def authority(url: str) -> str:
    """Return the host of a URL, with its port unless that is the usual one."""
    host = url.lower().partition("//")[2].partition("/")[0].rpartition("@")[2]
    return re.sub(":(80|443)$", "", host)


Asked = TypeVar("Asked", Query, Failure)


class InboxHandler(http.server.BaseHTTPRequestHandler):
    """Serves the requests of one connection.

    `route` finds the resource in `ROUTES`, whose method returns a `Response`. Whatever is wrong is
    raised as `Problem`. `reply` writes every answer; the base class reads and writes none.
    """

    protocol_version = "HTTP/1.1"
    server_version = f"coarinbox/{__version__}"
    disable_nagle_algorithm = True
    server: InboxServer
    rfile: io.BufferedReader
    raw_requestline: bytes

    def __init__(self, request: Any, client_address: Any, server: InboxServer) -> None:
        # The base class would serve the connection to its end.
        self.request, self.client_address, self.server = request, client_address, server
        self.setup()

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.wire = Wire(self.connection, functools.partial(self.server.away, self))
        self.rfile = io.BufferedReader(self.wire)
        self.unread = False  # whether the connection holds octets that belong to this request

    def finish(self) -> None:
        """Close the connection, but not so abruptly that an early answer is lost.

        Closing with octets unread resets the connection, which discards what was sent on it.
        """
        if self.unread:
            with contextlib.suppress(OSError, Problem):
                self.server.resign(self)
                self.connection.shutdown(socket.SHUT_WR)
                self.wire.start(LINGER)
                while self.rfile.read1():
                    pass
        super().finish()

    def handle(self) -> None:
        """Serve the requests that one reading brings; a lost connection is no fault of ours."""
        try:
            self.wire.ready = True
            while self.request_begins():
                self.handle_one_request()
                if self.close_connection:
                    break
                self.server.rest(self)
        except OSError as error:
            self.log_message("connection lost: %s", error)
            self.close_connection = True

    def request_begins(self) -> bool:
        """Begin the request that has come; False if none has, or the connection ends."""
        self.wire.waits = False
        octets = self.rfile.peek(1)
        for _ in range(LINE_ENDS):
            if octets[:1] in (b"\r", b"\n"):  # RFC 9112 section 2.2
                self.rfile.read(1)
                octets = self.rfile.peek(1)
        self.wire.waits = True
        self.unread = octets != b""  # until `check_framing` knows what belongs to the request
        # A request that has come in the moment in which its connection was ended has not begun: its
        # client gets no answer, and may send it again.
        begun = self.unread and self.server.begin(self)
        self.close_connection = not begun and (self.unread or self.wire.ended)
        return begun

    def handle_one_request(self) -> None:
        self.command, self.requestline, self.request_version = "", "", self.protocol_version
        self.raw_requestline, self.path, self.host = b"", "", ""
        self.fields: dict[str, str] = {}  # of the head, by their names in lower case
        self.spelling: dict[str, str] = {}  # of these names
        self.body = bytearray()
        self.document: Any = None
        self.pattern: str | None = None
        self.findings: list[Finding] = []
        self.name, self.simulated = "", False
        self.wire.start(self.server.settings.REQUEST_TIMEOUT)
        try:
            self.read_head()
            self.serve()
        except Problem as problem:
            self.reply(problem.response())

    def read_head(self) -> None:
        """Read and parse the head of a request (RFC 9112 sections 2 to 6); faults are raised."""
        self.raw_requestline = self.rfile.readline(MAX_LINE + 1)
        check_line(self.raw_requestline, "the request line", 414)
        line = self.raw_requestline.decode("latin-1")
        self.requestline = line.rstrip("\r\n")
        match = REQUEST_LINE.fullmatch(line)
        if not match:
            raise Problem(400, f"the request line is malformed: {line!r:.80}")
        self.command, host, self.path, self.request_version = match.groups()
        if host is not None or self.path.startswith("/"):
            # Two slashes would begin the name of a host elsewhere.
            self.path = "/" + self.path.lstrip("/")
        for name, value in self.read_fields():
            key = name.lower()
            self.spelling.setdefault(key, name)
            # RFC 9110 section 5.3
            self.fields[key] = f"{self.fields[key]}, {value}" if key in self.fields else value
        self.host = self.fields.get("host", "") if host is None else host
        if self.server.settings.DEBUG:
            self.log_message("%s", self.requestline)
            for name, value in self.shown_headers().items():
                self.log_message("%s: %s", name, value)
        self.check_version()
        self.check_framing()

    def read_fields(self) -> Iterator[tuple[str, str]]:
        """Read header lines up to the empty one; yield their names and values."""
        for number in range(1, MAX_HEADERS + 2):
            line = self.rfile.readline(MAX_LINE + 1)
            check_line(line, f"header line {number}", 431)
            if line == b"\r\n":
                return
            match = HEADER.fullmatch(line)
            if not match:  # its value may be a secret
                name = line.partition(b":")[0][:80] if line[:1].strip() and b":" in line else b""
                raise Problem(400, f"header line {number} is malformed: {name!r}")
            yield match[1].decode("latin-1"), match[2].strip().decode("latin-1")
        raise Problem(431, f"there are more than {MAX_HEADERS} header lines")

    def check_version(self) -> None:
        """Find out what the version of HTTP means for the connection (RFC 9112 section 9.3)."""
        if not self.request_version.startswith("HTTP/1."):
            raise Problem(505, f"{self.request_version} is not spoken here, but HTTP/1.1 is")
        options = re.split("[ \t]*,[ \t]*", self.fields.get("connection", "").lower())
        self.close_connection = "close" in options or (self.old and "keep-alive" not in options)
        # `read_body` sends the 100 once nothing else stands in the body's way.
        expected = self.fields.get("expect", "").lower()
        self.continue_expected = expected == "100-continue" and not self.old

    def serve(self) -> None:
        try:
            response = self.route()
        except (Problem, OSError):
            raise
        except Exception as error:
            self.server.fault(error)
            raise Problem(500, "a fault of the inbox itself; its log says more") from error
        self.reply(response)

    def route(self) -> Response:
        """Find the resource and let it answer."""
        if self.command != "POST":
            self.server.resign(self)  # reading from the store may take its time
        self.check_host()
        self.check_token()
        for path, verbs in self.ROUTES.items():
            match = path.fullmatch(self.resource)
            if match:
                verb = "GET" if self.command == "HEAD" else self.command
                if verb in verbs:
                    return verbs[verb](self, **match.groupdict())
                allow = {"Allow": ", ".join([*verbs, "HEAD", "OPTIONS"])}
                if verb != "OPTIONS":
                    detail = f"{self.command} does not work here, but {allow['Allow']} do"
                    raise Problem(405, detail, allow)
                post = {"Accept-Post": ACCEPT_POST} if "POST" in verbs else {}
                return Response(204, headers={**allow, **post})
        raise Problem(404, "nothing is here, but at /, /inbox, /deliveries and /constraints")

    def reply(self, response: Response) -> None:
        """Log a delivery and send the answer; only `100 Continue` is sent elsewhere."""
        if response.detail:
            self.log_message("%s", response.detail)
        if DELIVERS.match(self.raw_requestline):
            self.record(response)
        if not response.status:
            self.close_connection = True
            return
        endless = not isinstance(response.body, bytes) and self.old
        self.close_connection |= endless or self.unread or self.server.closing.is_set()
        self.wire.start(self.server.settings.REQUEST_TIMEOUT)
        self.log_request(response.status)
        head = self.head(response)
        body = b"" if self.command == "HEAD" or response.status in BODILESS else response.body
        if isinstance(body, bytes):
            self.wire.send(head + body)  # at once, or it is two packets
        else:
            self.wire.send(head)
            self.send_pieces(body)

    def head(self, response: Response) -> bytes:
        """Write the status line and the headers of an answer."""
        if response.status in BODILESS:
            framing = {}
        elif isinstance(response.body, bytes):
            framing = {"Content-Length": str(len(response.body))}
        else:
            framing = {} if self.old else {"Transfer-Encoding": "chunked"}
        fields = {
            "Server": self.server_version,
            "Date": self.date_time_string(),
            **response.headers,
            "Vary": "Accept",
            "X-Content-Type-Options": "nosniff",
            "Connection": "close" if self.close_connection else "keep-alive",
            **framing,
        }
        phrase = http.client.responses.get(response.status, "")
        lines = [f"{name}: {value}\r\n" for name, value in fields.items()]
        return f"HTTP/1.1 {response.status} {phrase}\r\n{''.join(lines)}\r\n".encode("latin-1")

    def send_pieces(self, pieces: Generator[bytes, None, None]) -> None:
        """Send a body of unknown length; where it breaks off, the connection ends."""
        ends, self.close_connection = self.close_connection, True
        # Who listens may leave; and for a problem it is too late.
        with contextlib.suppress(OSError, Problem), contextlib.closing(pieces):
            for octets in itertools.chain(pieces, [b""]):
                self.wire.start(self.server.settings.REQUEST_TIMEOUT)
                chunk = b"%x\r\n%b\r\n" % (len(octets), octets)  # RFC 9112 section 7.1
                self.wire.send(octets if self.old else chunk)
            self.close_connection = ends

    def record(self, response: Response) -> None:
        """Put a delivery into the log; that this fails is no reason to refuse it."""
        delivery = Delivery(
            name=self.name or new_name(),
            time="",
            client=self.client_address[0],
            target=self.path,
            headers=self.shown_headers(),
            status=response.status,
            detail=response.detail,
            pattern=self.pattern,
            about=summary(self.document),
            findings=self.findings,
            body=None if self.name else bytes(self.body),
            simulated=self.simulated,
        )
        try:
            self.server.deliveries.append(delivery)
        except OSError as error:
            LOG.error("a delivery could not be logged: %s", error)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log a request, unless the script of a page makes it again and again by itself."""
        by_script = self.fields.get("sec-fetch-dest") == "empty" and self.command == "GET"
        if not by_script or self.server.settings.DEBUG:
            super().log_request(code, size)

    def log_message(self, format: str, *args: Any) -> None:
        # Escaped: what clients send must not pass for lines of the log.
        LOG.info("%s %s", self.client_address[0], visible(format % args))

    # What a request says

    @property
    def old(self) -> bool:
        """Whether the client speaks HTTP/1.0, which has neither chunks nor a need for Host."""
        return self.request_version == "HTTP/1.0"

    @property
    def resource(self) -> str:
        return self.path.partition("?")[0]

    @property
    def site(self) -> Site:
        """What a page needs to know; its links are relative, so that any proxy may stand before."""
        root = "../" * (self.resource.count("/") - 1) or "./"
        token = '-H "Authorization: Bearer $TOKEN" ' if self.server.settings.TOKEN else ""
        return Site(root, f"{self.base}/inbox", token)

    def shown_headers(self) -> dict[str, str]:
        """The headers as they were sent, without secrets."""
        return {
            self.spelling[key]: "(masked)" if key in SECRET else value
            for key, value in self.fields.items()
        }

    @property
    def base(self) -> str:
        """The URL, without a slash at its end, below which the client finds everything."""
        if self.server.settings.BASE_URL or not self.host:
            return self.server.base
        return f"{self.server.scheme}://{self.host}"

    def prefers(self, media_type: str) -> bool:
        """Whether the client would rather have this media type than JSON."""
        accept = self.fields.get("accept", "*/*")
        data = max(quality(JSON_LD, accept), quality("application/json", accept))
        return quality(media_type, accept) > data

    def wants_html(self) -> bool:
        return self.prefers("text/html")

    def query(self, read: Callable[[str], Asked]) -> Asked:
        """Read the query of the URL; what is wrong with it is a problem."""
        try:
            return read(self.path.partition("?")[2])
        except ValueError as error:
            raise Problem(400, str(error)) from error

    # What is refused

    def check_host(self) -> None:
        if "host" not in self.fields and not self.old:  # RFC 9112 section 3.2
            raise Problem(400, f"the Host header is missing, which {self.request_version} demands")
        match = HOST_HEADER.fullmatch(self.host)
        if not match or not HOST_HEADER.fullmatch(self.fields.get("host", "")):
            raise Problem(400, "the Host header is malformed")
        if not self.server.answers_to(match[1]):
            detail = f"an inbox on loopback does not answer to {self.host}; set BASE_URL to its URL"
            raise Problem(421, detail)

    def check_token(self) -> None:
        """Demand TOKEN as a Bearer token (RFC 6750) or a Basic password (RFC 7617)."""
        token = self.server.settings.TOKEN
        if token is None:
            return
        scheme, _, given = self.fields.get("authorization", "").partition(" ")
        octets = given.encode("latin-1") if scheme.lower() in ("bearer", "basic") else b""
        if scheme.lower() == "basic":
            try:
                octets = base64.b64decode(octets).partition(b":")[2]
            except ValueError:
                octets = b""
        if not secrets.compare_digest(octets, token.encode()):
            challenge = 'Bearer realm="coarinbox", Basic realm="coarinbox", charset="UTF-8"'
            detail = "the token is missing or wrong; it goes with Bearer, or as password with Basic"
            raise Problem(401, detail, {"WWW-Authenticate": challenge})

    def check_site(self) -> None:
        """Refuse what the page of another site asks for (Fetch Metadata, RFC 6454)."""
        site, origin = self.fields.get("sec-fetch-site", "none"), self.fields.get("origin")
        ours = (authority(f"//{self.host}"), authority(self.server.base))
        foreign = origin is not None and authority(origin) not in ours
        if site not in ("same-origin", "none") or foreign:
            detail = f"this is not for pages of other sites, such as {origin or site}; set BASE_URL"
            raise Problem(403, detail)

    def constraint(
        self, status: int, detail: str, headers: Mapping[str, str] = {}, **members: Any
    ) -> Problem:
        """Make a problem that says where the constraints of the inbox stand (LDP 4.2.1.6)."""
        link = f'<{self.base}/constraints>; rel="http://www.w3.org/ns/ldp#constrainedBy"'
        return Problem(status, detail, {"Link": link, **headers}, **members)

    def check_content(self) -> None:
        given = self.fields.get("content-type", "missing")
        if not JSON_TYPE.match(given):
            detail = f"Content-Type is {given}, expected {ACCEPT_POST} or the like"
            raise self.constraint(415, detail, {"Accept-Post": ACCEPT_POST})
        coding = self.fields.get("content-encoding", "identity").lower()
        if coding != "identity":
            detail = f"Content-Encoding is {coding}, expected none"
            raise self.constraint(415, detail, {"Accept-Encoding": "identity"})

    def check_notification(self, octets: bytes) -> dict[str, Any]:
        """Return the pattern and the warnings of a notification; refuse it if it is not valid."""
        try:
            self.document = parse(octets)
        except ValueError as error:
            raise self.constraint(400, f"the body is not JSON: {error}") from error
        errors, warnings = judge(self.document, self.server.settings.VALIDATE_INCOMING)
        self.findings = errors + warnings
        for finding in self.findings:
            self.log_message("%s %s", finding.level, finding.message)
        pattern = pattern_of(self.document)
        self.pattern = pattern and pattern.name
        result: dict[str, Any] = {
            "pattern": self.pattern,
            "warnings": [finding.as_json() for finding in warnings],
        }
        if errors:
            count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
            result["errors"] = [finding.as_json() for finding in errors]
            raise self.constraint(400, f"not a valid notification: {count}", **result)
        return result

    def simulate(self, failure: Failure) -> None:
        """Meet an attempt with a failure instead of storing the notification, if one is due."""
        id_ = lookup(self.document, "id")
        known_by = id_ if isinstance(id_, str) else hashlib.sha256(self.body).hexdigest()
        due = self.server.failures.due(failure, known_by)
        if not due:
            return
        self.simulated = True
        if due.delay:
            self.server.resign(self)
            self.server.closing.wait(due.delay)
        if due.close:
            raise Problem(0, "a simulated failure: the connection ends without an answer")
        if due.status:
            raise Problem(due.status, "a simulated failure", due.headers(f"{self.base}/inbox"))

    # The body of a request (RFC 9112 sections 6 and 7)

    def check_framing(self) -> None:
        """Find out how the body ends, for every verb: the next request begins there."""
        coding, length = self.fields.get("transfer-encoding"), self.fields.get("content-length")
        if coding is not None and (length is not None or self.old):
            raise Problem(400, "Transfer-Encoding goes with HTTP/1.1 and without Content-Length")
        if coding is not None and coding.lower() != "chunked":
            raise Problem(400, "the only transfer coding that works here is chunked")
        if length is not None and not re.fullmatch("[0-9]+", length):
            raise Problem(400, "Content-Length is not one number of octets")
        self.chunked = coding is not None
        # 20 digits are too large whatever follows; thousands more would be slow to convert.
        self.length = None if length is None else int(length.lstrip("0")[:20] or "0")
        self.unread = self.chunked or bool(self.length)

    def read_body(self) -> bytes:
        if self.length is None and not self.chunked:
            self.unread = True  # whatever comes, it is no request
            raise Problem(411, "the request has neither Content-Length nor a chunked body")
        self.check_size(self.length or 0)
        if self.continue_expected:
            with contextlib.suppress(OSError):  # a client that has left will not send its body
                self.wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.chunked:
            self.read_chunks()
        else:
            self.read_part(self.length or 0)
        self.unread = False
        return bytes(self.body)

    def check_size(self, size: int) -> None:
        limit = self.server.settings.MAX_CONTENT_LENGTH
        if size > limit:
            raise self.constraint(413, f"the body is larger than {limit} octets")

    def read_chunks(self) -> None:
        while True:
            line = self.rfile.readline(1024)
            match = re.fullmatch(
                rb"([0-9A-Fa-f]{1,16})[ \t]*(;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n", line
            )
            if not match:
                raise Problem(400, "the body's chunks are malformed: no size")
            size = int(match[1], 16)
            if size == 0:
                break
            self.check_size(len(self.body) + size)
            self.read_part(size)
            if self.rfile.read(2) != b"\r\n":
                raise Problem(400, "the body's chunks are malformed: one is longer than its size")
        for _ in self.read_fields():
            pass  # nobody needs the trailer

    def read_part(self, size: int) -> None:
        """Add so many octets to the body; what has come stays there when the rest does not."""
        end = len(self.body) + size
        while len(self.body) < end:
            octets = self.rfile.read1(end - len(self.body))
            if not octets:
                raise Problem(400, f"the connection ended {end - len(self.body)} octets early")
            self.body += octets

    # The resources

    def get_home(self) -> Response:
        return self.home(self.query(Query.from_query))

    def home(self, query: Query) -> Response:
        with store_problems():
            deliveries = list(self.server.deliveries.select(query, query.page_length + 1))
        link = f'<{self.base}/inbox>; rel="http://www.w3.org/ns/ldp#inbox"'
        return html_response(home_page(self.site, query, deliveries), {"Link": link})

    def get_inbox(self) -> Response:
        """List the notifications (LDN section 3.3.1)."""
        if self.wants_html():
            return self.home(Query())  # what the URL asks for is failures
        base = self.base
        listing = {
            "@context": {"ldp": "http://www.w3.org/ns/ldp#"},
            "@id": base + self.path,
            "@type": "ldp:Container",
        }
        names = self.server.store.names()
        contained = (json.dumps({"@id": f"{base}/inbox/{name}"}) for name in names)
        return json_list(listing, "ldp:contains", contained, JSON_LD)

    def post_inbox(self) -> Response:
        """Take a notification in (LDN section 3.3.2); a 2xx is a promise that it is stored."""
        if self.continue_expected:
            self.check_content()
        octets = self.read_body()  # even if its type is wrong: people want to see what they sent
        if self.server.settings.DEBUG:
            self.log_message("%s", octets.decode("utf-8", "backslashreplace"))
        self.check_content()
        failure = self.query(Failure.from_query)
        receipt = self.check_notification(octets)
        self.simulate(failure)
        if self.server.store.fsync:
            self.server.resign(self)
        with store_problems():
            self.name = self.server.store.add(octets)
        location = f"{self.base}/inbox/{self.name}"
        status = self.server.settings.RESPONSE_STATUS
        headers = {"Location": location} if status == 201 else {}
        return json_response(status, {"location": location, **receipt}, headers=headers)

    def delete_inbox(self) -> Response:
        """Forget the notifications and the deliveries, for the next test."""
        self.check_site()
        with store_problems():
            self.server.clear()
        return Response(204)

    def get_notification(self, name: str) -> Response:
        with store_problems():
            octets = self.server.store.read(name)
        if not self.wants_html():
            return Response(200, octets, {"Content-Type": JSON_LD})
        return self.show(self.delivery(name))

    def delete_notification(self, name: str) -> Response:
        self.check_site()
        with store_problems():
            self.server.store.remove(name)
        return Response(204)

    def get_deliveries(self) -> Response:
        """List the deliveries, the newest first, or send them as they come."""
        query = self.query(Query.from_query)
        if self.prefers("text/event-stream"):
            query = query._replace(since=self.fields.get("last-event-id", query.since))
            with store_problems():
                bookmark = self.server.deliveries.bookmark(query)
            return Response(
                200, self.events(query, bookmark), {"Content-Type": "text/event-stream"}
            )
        if self.wants_html():
            return self.get_home()
        limit = int(query.limit) if query.limit else None
        deliveries = self.server.deliveries.select(query, limit)
        entries = (json.dumps(delivery.as_json(), indent=2) for delivery in deliveries)
        return json_list({}, "deliveries", entries)

    def events(self, query: Query, bookmark: Bookmark) -> Generator[bytes, None, None]:
        """Yield the deliveries that are wanted, as they come, and now and then that none comes."""
        with self.server.away(self, Wait(time.monotonic(), socket.SHUT_RDWR)), store_problems():
            coming = self.server.deliveries.follow(bookmark)
            yield from (as_event(each) for each in coming if not each or query.matches(each))

    def get_delivery(self, name: str) -> Response:
        delivery = self.delivery(name)
        return self.show(delivery) if self.wants_html() else json_response(200, delivery.as_json())

    def delivery(self, name: str) -> Delivery:
        with store_problems():
            known = self.server.deliveries.find(name)
            return known or found_in_store(name, self.server.store.read(name))

    def show(self, delivery: Delivery) -> Response:
        with store_problems():
            around = self.server.deliveries.conversation(delivery.about)
            octets = self.body_of(delivery)
        return html_response(delivery_page(self.site, delivery, octets, around))

    def body_of(self, delivery: Delivery) -> bytes | None:
        with contextlib.suppress(KeyError):
            return self.server.store.read(delivery.name) if delivery.body is None else delivery.body
        return None

    def get_body(self, name: str) -> Response:
        """Show what came, octet for octet, whatever it is: as text, which no browser will run."""
        delivery = self.delivery(name)
        with store_problems():
            octets = self.body_of(delivery)
        if octets is None:
            raise Problem(404, "it is no longer stored")
        return Response(200, octets, {"Content-Type": "text/plain; charset=utf-8"})

    def get_constraints(self) -> Response:
        refused = REFUSED[self.server.settings.VALIDATE_INCOMING]
        if self.wants_html():
            return html_response(constraints_page(self.site, refused))
        document = {
            "specification": SPECIFICATION,
            "levels": LEVELS,
            "refused": refused,
            "constraints": constraints(),
        }
        return json_response(200, document)

    ROUTES: Mapping[re.Pattern[str], Mapping[str, Callable[..., Response]]] = {
        re.compile(INBOX): {"GET": get_inbox, "POST": post_inbox, "DELETE": delete_inbox},
        re.compile(f"/inbox/(?P<name>{NAME})"): {
            "GET": get_notification,
            "DELETE": delete_notification,
        },
        re.compile("/"): {"GET": get_home},
        re.compile("/deliveries"): {"GET": get_deliveries},
        re.compile(f"/deliveries/(?P<name>{NAME})"): {"GET": get_delivery},
        re.compile(f"/deliveries/(?P<name>{NAME})/body"): {"GET": get_body},
        re.compile("/constraints"): {"GET": get_constraints},
    }


# --- Server --------------------------------------------------------------------------------------


@contextlib.contextmanager
def unusable(what: str, expected: str) -> Iterator[None]:
    """Turn errors of the operating system into errors of the settings that led to them."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{what}: {error}; expected {expected}") from error


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    if certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Or who is cut off for others would see an error of TLS, and no 503. That bodies are whole is
    # seen by HTTP.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    context.load_cert_chain(certificate, key, password="")  # or it would ask on the terminal
    return context


class InboxServer(http.server.HTTPServer):
    """An inbox that listens as soon as it is made and serves from `serve_forever` to `shutdown`.

    `server_close`, or the end of a `with` block, shuts it down and waits for the requests in
    flight. Raises `ConfigurationError` when a setting cannot be put into practice.
    """

    request_queue_size = 1024
    allow_reuse_port = False  # from Python 3.14 on, two inboxes could have the same one

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.closing = threading.Event()
        self.failures = Failures()
        self.faults: list[BaseException] = []  # of the inbox itself; there should be none
        self.lock = threading.Lock()  # for the three that follow, and for who leads
        self.connections: set[InboxHandler] = set()
        self.waiting: dict[InboxHandler, Wait] = {}  # those that may be ended
        self.selector = selectors.DefaultSelector()
        self.leader = 0  # the thread that leads
        self.full_until = 0.0  # when to look for new connections again
        self.poll_interval, self.next_look = 0.1, 0.0  # see `serve_forever`, `end_overdue`
        # While some connections are being ended there may be more than MAX_CONNECTIONS.
        self.threads = concurrent.futures.ThreadPoolExecutor(2 * settings.MAX_CONNECTIONS + 1)
        self.address_family = socket.AF_INET6 if ":" in settings.HOST else socket.AF_INET
        files = f"SSL_CERT {settings.SSL_CERT!r}, SSL_KEY {settings.SSL_KEY!r}"
        with unusable(files, "a certificate and its key, not encrypted, in PEM"):
            self.tls = tls_context(settings.SSL_CERT, settings.SSL_KEY)
        with unusable(f"STORE_DIR {settings.STORE_DIR!r}", "a directory to write to"):
            self.store = Store(settings.STORE_DIR, settings.FSYNC)
            self.deliveries = DeliveryLog(os.path.join(self.store.directory, "deliveries.jsonl"))
        address = f"HOST {settings.HOST!r}, PORT {settings.PORT}"
        with unusable(address, "an address of this machine and a port that is free"):
            # Where it fails, it calls `server_close`, which needs all of the above.
            super().__init__((settings.HOST, settings.PORT), InboxHandler)
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        if self.settings.HOST == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # HTTPServer would also look up a name for the address, and may wait long for it.
        socketserver.TCPServer.server_bind(self)

    @property
    def base(self) -> str:
        """The URL below which everything is found, without a slash at its end."""
        return self.settings.BASE_URL.rstrip("/") if self.settings.BASE_URL else self.local

    @property
    def local(self) -> str:
        """The URL of the address that is listened on."""
        host = self.settings.HOST if self.settings.HOST not in ("0.0.0.0", "::") else "localhost"
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"

    @property
    def scheme(self) -> str:
        return "https" if self.tls else "http"

    def answers_to(self, host: str) -> bool:
        """Whether a request may be for `host`: on loopback, only for a loopback name or BASE_URL.

        Otherwise a web page could have its own host name resolve to loopback (DNS rebinding).
        """
        name = host.lower().rstrip(".")
        if name in ("", "localhost"):
            return True
        bound, ip = str(self.server_address[0]), ip_address(name)
        own_ip = ip_address(f"[{bound}]" if ":" in bound else bound)
        if not own_ip or not own_ip.is_loopback:
            return True
        known = urlsplit(self.settings.BASE_URL or "").hostname or ""
        is_local = ip.is_loopback if ip else name.endswith(".localhost")
        return is_local or name.strip("[]") == known.rstrip(".")

    def clear(self) -> None:
        """Forget all deliveries, notifications, and failures that were to come."""
        # In this order, or what arrives meanwhile would be stored without a line in the log.
        self.deliveries.clear()
        self.store.clear()
        self.failures.clear()

    # The threads, see Connections

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Serve until `shutdown`; look every so many seconds for what does not announce itself."""
        self.poll_interval = poll_interval
        while not self.closing.is_set():
            if not self.leader:
                self.find_leader()
            self.closing.wait(poll_interval)  # not for ever: signals wait for this thread

    def find_leader(self) -> None:
        """Have a thread lead; where none can be started now, `serve_forever` asks again."""
        try:
            self.threads.submit(self.lead)
        except RuntimeError as error:
            if not self.closing.is_set():
                LOG.error("no thread can be started: %s", error)

    def lead(self) -> None:
        """Serve what comes, one request after another, until another thread leads."""
        with self.lock:
            if self.leader:
                return
            self.leader = threading.get_ident()
        try:
            while self.leader == threading.get_ident() and not self.closing.is_set():
                self.look_around()
        except Exception as error:
            self.fault(error)
            self.leader = 0

    def look_around(self) -> None:
        """Wait until some connections need a thread, and serve them."""
        if time.monotonic() >= self.full_until:
            self.watch(self.socket, True)
        events = self.selector.select(self.poll_interval)
        # Those who have sent something come before new connections, which may need their room.
        for key, _ in sorted(events, key=lambda event: event[0].data is None):
            if self.leader != threading.get_ident() or self.closing.is_set():
                return
            if key.data:
                self.attend(key.data)
            else:
                # As many as come, but none that would need the room of the one before.
                while self.accept() and len(self.connections) < self.settings.MAX_CONNECTIONS:
                    pass
        self.end_overdue()

    def resign(self, handler: InboxHandler) -> None:
        """Let another thread lead, if this one does: it has to wait while it serves `handler`."""
        if self.leader != threading.get_ident() or self.closing.is_set():
            return
        self.watch(handler.connection, False)
        self.leader = 0
        self.find_leader()

    def attend(self, handler: InboxHandler) -> None:
        """Serve the requests that have come on a connection."""
        try:
            handler.handle()
            if not handler.close_connection:
                # From here on, it may be another thread's.
                self.watch(handler.connection, True, handler)
                return
        except Exception as error:
            self.fault(error)
        self.drop(handler)

    @contextlib.contextmanager
    def away(self, handler: InboxHandler, wait: Wait) -> Iterator[None]:
        """Let others be served while this thread waits; what it waits for may end meanwhile."""
        self.resign(handler)
        with self.lock:
            noted = self.waiting.setdefault(handler, wait)  # a stream stays one while it is sent
        try:
            if self.closing.is_set():
                self.hang_up()  # once more: `server_close` may have done so before this
            yield
        finally:
            if noted is wait:
                with self.lock:
                    self.waiting.pop(handler, None)

    # The connections

    def accept(self) -> bool:
        """Take a connection, if one has come; if there are too many, end another one, or pause."""
        if len(self.connections) >= self.settings.MAX_CONNECTIONS and not self.make_room():
            self.pause()
            return False
        try:
            request, client_address = self.get_request()
        except OSError as error:
            if errno.errorcode.get(error.errno or 0) in ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"):
                LOG.error("a connection could not be taken: %s", error)
                self.make_room()
                self.pause()
            return False
        try:
            handler = InboxHandler(request, client_address, self)
        except OSError:  # the client has left already
            self.shutdown_request(request)
            return True
        with self.lock:
            self.connections.add(handler)
        self.rest(handler, GRACE)
        self.watch(handler.connection, True, handler)
        return True

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls:
            # The handshake comes with the first read, so that nobody waits for it.
            connection = self.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def pause(self) -> None:
        """Leave new connections alone until another one ends, or a little later."""
        self.full_until = time.monotonic() + self.poll_interval
        self.watch(self.socket, False)

    def watch(
        self, source: socket.socket, wanted: bool, handler: InboxHandler | None = None
    ) -> None:
        """Look for what comes on a connection, or for new connections, or not for now."""
        with self.lock:
            watched = source in self.selector.get_map()
            if wanted and not watched:
                self.selector.register(source, selectors.EVENT_READ, handler)
            elif watched and not wanted:
                self.selector.unregister(source)

    def rest(self, handler: InboxHandler, grace: float = 0) -> None:
        """Note that a connection waits for its next request."""
        with self.lock:
            self.waiting[handler] = Wait(time.monotonic(), socket.SHUT_RD, grace)

    def begin(self, handler: InboxHandler) -> bool:
        """Note that a request has begun; False if its connection was ended before."""
        with self.lock:
            return self.waiting.pop(handler, None) is not None

    def drop(self, handler: InboxHandler) -> None:
        """Close a connection."""
        try:
            handler.finish()
        finally:
            self.watch(handler.connection, False)
            self.shutdown_request(handler.request)
            with self.lock:
                self.waiting.pop(handler, None)
                self.connections.discard(handler)
            if not self.closing.is_set():
                self.watch(self.socket, True)

    def end(self, handler: InboxHandler) -> None:
        """Have a connection end that is waiting. The caller holds the lock."""
        wait = self.waiting.pop(handler)
        handler.wire.evicted = True
        with contextlib.suppress(OSError):
            # Not the method of a TLS socket, which would go on without encryption.
            socket.socket.shutdown(handler.connection, wait.how)

    def make_room(self) -> bool:
        """End the connection that has waited longest; what has just begun has its time."""
        with self.lock:
            now, many = time.monotonic(), len(self.connections)
            endable = [
                handler for handler, wait in self.waiting.items() if now - wait.since >= wait.grace
            ]
            if not endable or many >= 2 * self.settings.MAX_CONNECTIONS:
                return False
            self.end(min(endable, key=lambda handler: self.waiting[handler].since))
        self.deliveries.wake()
        return True

    def end_overdue(self) -> None:
        """End the connections on which no request comes."""
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + self.poll_interval
        oldest = now - self.settings.REQUEST_TIMEOUT
        with self.lock:
            for handler, wait in list(self.waiting.items()):
                at_rest = wait.how == socket.SHUT_RD and not wait.begun  # and no stream
                if at_rest and wait.since < oldest:
                    self.end(handler)

    def hang_up(self) -> None:
        """End the connections that nobody waits for an answer on."""
        with self.lock:
            for handler, wait in list(self.waiting.items()):
                if not wait.begun:
                    self.end(handler)
        self.deliveries.wake()

    def shutdown(self) -> None:
        """Stop `serve_forever`, from another thread, or keep it from ever beginning."""
        self.closing.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # so that `lead` looks up at once

    def server_close(self) -> None:
        self.shutdown()
        self.hang_up()
        self.threads.shutdown()
        for handler in list(self.connections):
            self.drop(handler)
        self.selector.close()
        super().server_close()

    def abort(self) -> None:
        """Close without waiting for clients: what has not been answered yet will not be."""
        self.shutdown()
        self.cut_off()
        self.server_close()

    def cut_off(self) -> None:
        """End every connection, whatever is under way on it."""
        for handler in list(self.connections):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(handler.connection, socket.SHUT_RDWR)

    def fault(self, error: BaseException) -> None:
        LOG.error("a fault of the inbox itself", exc_info=error)
        self.faults.append(error)


# --- Test double ---------------------------------------------------------------------------------

POLL = 0.05  # seconds that the end of a `running` block may wait where nothing wakes the server
KNOWN_TYPES = frozenset(name for pattern in PATTERNS for name in pattern.types)


class Wanted(NamedTuple):
    """What a test looks for among the deliveries."""

    predicate: Callable[[Delivery], object] | None
    type: str
    pattern: str
    in_reply_to: str
    status: str

    def check(self) -> Wanted:
        """Refuse what no delivery could ever be, lest a misspelt test passes or waits in vain.

        Raises `AssertionError`, and `TypeError` for a predicate or a type that is none. A type may
        be any, but no near miss of one that a pattern has.
        """
        if self.predicate is not None and not callable(self.predicate):
            raise TypeError(f"the predicate {quoted(self.predicate)} cannot be called")
        if not isinstance(self.type, str):
            raise TypeError(f"the type {quoted(self.type)} is not one name")
        for spelt in (self.type, f"coar-notify:{self.type}"):
            near = difflib.get_close_matches(spelt, KNOWN_TYPES, cutoff=0.85)
            if near and self.type not in KNOWN_TYPES:
                raise AssertionError(unknown(self.type, "type", near))
        if self.pattern and self.pattern not in RULES:
            raise AssertionError(unknown(self.pattern, "pattern", RULES))
        expression, expected = PARAMETERS["status"]
        if not re.fullmatch(expression, self.status):
            raise AssertionError(f"status is {quoted(self.status)}, expected {expected}")
        return self

    def __str__(self) -> str:
        given = {name: value for name, value in self._asdict().items() if value}
        return ", ".join(f"{name}={quoted(value)}" for name, value in given.items()) or "any"

    def mismatch(self, delivery: Delivery) -> str:
        """Return the first reason why a delivery is not wanted; empty if it is."""
        if not delivery.has_status(self.status):
            refused = delivery.verdict == "refused" and not delivery.simulated
            reasons = by_level(delivery.findings) if refused else []
            listed = "; ".join(f"{finding.level} {finding.message}" for finding in reasons)
            return listed or delivery.detail or f"its status is not {self.status}"
        document = delivery.notification
        types, asked = lookup(document, "type"), lookup(document, "inReplyTo")
        if self.type and self.type not in types_of(types):
            return f"its type is {quoted(types)}"
        if self.pattern not in ("", delivery.pattern):
            return f"its pattern is {delivery.pattern}"
        if self.in_reply_to not in ("", asked):
            return f"its inReplyTo is {quoted(asked)}"
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
        if self.server.closing.is_set():
            raise RuntimeError("the inbox is closed; look at it inside the `with` block")
        return self.server

    @property
    def deliveries(self) -> list[Delivery]:
        """Every attempt so far, the first one first; see `Delivery`."""
        return [self.complete(each) for each in self.open_server.deliveries.newest_first()][::-1]

    @property
    def notifications(self) -> list[Any]:
        """The documents of the notifications that were stored, the first one first."""
        stored = (each for each in self.deliveries if each.has_status("2xx"))
        return [each.notification for each in stored if each.body is not None]

    def complete(self, delivery: Delivery) -> Delivery:
        """Add the body of what was stored."""
        with contextlib.suppress(KeyError):
            return delivery._replace(body=delivery.body or self.server.store.read(delivery.name))
        return delivery

    def wait_for(
        self,
        predicate: Callable[[Delivery], object] | None = None,
        *,
        type: str = "",
        pattern: str = "",
        in_reply_to: str = "",
        status: str | int = "2xx",
        timeout: float = 5,
    ) -> Delivery:
        """Return the first delivery that is all that is wanted; wait for it if need be.

        `status` is that of the answer, such as 503 or "4xx", 0 for none, or "" for any: unless it
        is given, a delivery counts when it was accepted. `timeout` is in seconds. Raises
        `AssertionError`, saying what did arrive, when the time is over, and at once when nothing
        could ever be like that.
        """
        wanted = Wanted(predicate, type, pattern, in_reply_to, str(status)).check()
        others = []
        for delivery in self.arriving(timeout):
            try:
                reason = wanted.mismatch(delivery)
            except Exception as error:  # it may look for members that another one has
                reason = f"the predicate raises {error!r}"
            if not reason:
                return delivery
            others.append(f"\n  {described(delivery)}: {reason}")
        came = "".join(others) or " nothing"
        raise AssertionError(f"no delivery with {wanted} within {timeout:g} s; what came:{came}")

    def assert_none(
        self,
        predicate: Callable[[Delivery], object] | None = None,
        *,
        type: str = "",
        pattern: str = "",
        in_reply_to: str = "",
        status: str | int = "",
        within: float = 0,
    ) -> None:
        """Raise `AssertionError` if such a delivery, accepted or not, has come or comes in time.

        `within` is in seconds. What the predicate raises is raised.
        """
        wanted = Wanted(predicate, type, pattern, in_reply_to, str(status)).check()
        for delivery in self.arriving(within):
            if not wanted.mismatch(delivery):
                raise AssertionError(f"an unexpected delivery: {described(delivery)}")

    def arriving(self, seconds: float) -> Iterator[Delivery]:
        """Yield the deliveries so far and those that come in so many seconds."""
        start, deadline = utc_now(), time.monotonic() + seconds

        def remaining() -> float:
            return max(0, deadline - time.monotonic())

        for delivery in self.open_server.deliveries.follow(BEGINNING, remaining):
            # What was there at the start counts, however long it takes to read it.
            if not remaining() and (not delivery or delivery.time > start):
                return
            if delivery:
                yield self.complete(delivery)

    def clear(self) -> None:
        """Forget all deliveries, notifications, and failures that were to come."""
        self.open_server.clear()

    def fail_next(
        self,
        status: int | None = None,
        times: int = 1,
        retry_after: int | str | None = None,
        delay: float = 0,
        close: bool = False,
    ) -> None:
        """Let the next attempts, so many times, fail: with a status, or with no answer at all.

        Attempts that are refused anyway do not count. `retry_after` is seconds or an HTTP date,
        `delay` seconds. Raises `ValueError` when a value is unusable.
        """
        given = {
            "status": status,
            "times": str(times),
            "retry-after": retry_after,
            "delay": f"{delay:.9f}" if delay else None,
            "close": 1 if close else None,
        }
        query = urlencode({name: value for name, value in given.items() if value is not None})
        failure = Failure.from_query(query)
        self.open_server.failures.line_up(failure)


def described(delivery: Delivery) -> str:
    about = delivery.about.get("id", "without an id")
    return visible(f"{delivery.outcome} {delivery.pattern or 'no pattern'} {about}")


@contextlib.contextmanager
def running(**settings: Any) -> Iterator[Inbox]:
    """Run an inbox while a block lasts, quietly: on a free port, with a store that is removed.

        with coarinbox.running(VALIDATE_INCOMING="strict") as inbox:
            send_something(inbox.url)
            delivery = inbox.wait_for(type="Offer")

    The settings are those of a configuration file. Raises `ConfigurationError` if they cannot be
    used, and `RuntimeError` at the end of the block if the inbox itself has failed.
    """
    for name in settings.keys() - SETTING_NAMES:
        raise ConfigurationError(unknown(name, "setting", SETTING_NAMES))
    with tempfile.TemporaryDirectory(prefix="coarinbox-") as directory:
        defaults = {"PORT": 0, "STORE_DIR": directory, "FSYNC": False}
        server = InboxServer(Settings(**{**defaults, **settings}))
        thread = threading.Thread(target=server.serve_forever, args=(POLL,))
        thread.start()
        try:
            yield Inbox(server)
        finally:
            server.abort()
            thread.join()
    if server.faults:
        raise RuntimeError("the inbox itself has failed") from server.faults[0]


# --- Command line --------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="coarinbox",
        argument_default=argparse.SUPPRESS,  # what is not given leaves the setting alone
        description="An inbox for COAR Notify notifications.",
        epilog="The environment variable COARNOTIFY_SETTINGS may name the configuration file too.",
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="configuration file, see local.cfg.example")
    add("--store", metavar="DIR", dest="STORE_DIR", help="where notifications are stored")
    add("--host", metavar="H", dest="HOST", help="address to listen on")
    add("--port", metavar="N", dest="PORT", type=int, help="port to listen on, 0 for a free one")
    add("-d", action="store_true", dest="DEBUG_PYCHARM", help="attach to a PyCharm debug server")
    add(
        "--check",
        metavar="FILE",
        nargs="+",
        action="extend",
        help="validate files, - or directories, and end",
    )
    add("--version", action="version", version=f"coarinbox {__version__}")
    return parser.parse_args(arguments)


def attach_debugger(host: str, port: int) -> None:
    """Connect to a PyCharm debug server that waits there, if that is possible."""
    try:
        import pydevd

        # Not suspended: breakpoints are set in the editor, and the inbox should serve meanwhile.
        pydevd.settrace(host, port=port, stdoutToServer=True, stderrToServer=True, suspend=False)
    except ImportError:
        LOG.warning("no debugger: it needs the package pydevd-pycharm (pip install pydevd-pycharm)")
    except OSError as error:
        LOG.warning("no debugger: %s:%s: %s", host, port, error)


def files_below(path: str, onerror: Callable[[OSError], object]) -> list[str]:
    """List a file itself, or the JSON files in a directory."""
    if not os.path.isdir(path):
        return [path]
    tree = os.walk(path, onerror=onerror)
    files = (os.path.join(folder, name) for folder, _, names in tree for name in names)
    return sorted(
        file for file in files if file.endswith((".json", ".jsonld")) and os.path.isfile(file)
    )


def read_file(path: str) -> bytes:
    if path == "-":
        return sys.stdin.buffer.read()
    with open(path, "rb") as file:
        return file.read()


def check_file(octets: bytes, settings: Settings) -> tuple[list[Finding], list[Finding]]:
    """Judge a notification as an inbox would; returns what it is refused for, and the warnings."""
    try:
        errors, warnings = judge(parse(octets), settings.VALIDATE_INCOMING)
    except ValueError as error:
        errors, warnings = [Finding(E, "", "json", f"it is not JSON: {error}", SPECIFICATION)], []
    if len(octets) > settings.MAX_CONTENT_LENGTH:
        size = f"it is larger than {settings.MAX_CONTENT_LENGTH} octets"
        errors = [*errors, Finding(E, "", "size", size, SPECIFICATION)]
    return errors, warnings


def check(paths: list[str], settings: Settings) -> int:
    """Validate files; returns the exit status: 1 if one is refused, 2 if one is unreadable."""
    unreadable: list[OSError] = []
    verdicts = []
    for file in (file for path in paths for file in files_below(path, unreadable.append)):
        try:
            refused, warnings = check_file(read_file(file), settings)
        except OSError as error:
            unreadable.append(error)
            continue
        verdicts.append(refused != [])
        for finding in refused + warnings:
            where = f"{visible(file)}: {finding.level} {finding.pointer or '-'}"
            print(f"{where} {finding.code} {finding.message}")
    for each in unreadable:
        print(visible(f"coarinbox: {each.filename}: {each.strerror}"), file=sys.stderr)
    print(f"coarinbox: {len(verdicts)} checked, {sum(verdicts)} refused", file=sys.stderr)
    return 2 if unreadable or not verdicts else int(any(verdicts))


# Seconds within which a second signal is the same one: `timeout`, say, sends it to a process and
# to its group.
TWICE = 0.5


def run(server: InboxServer) -> None:
    """Serve until SIGINT or SIGTERM; a later one does not wait for requests in flight."""
    signals: list[float] = []

    def stop(number: int, frame: types.FrameType | None) -> None:
        signals.append(time.monotonic())
        if len(signals) == 1:
            # Not here: the signal may have come while this thread holds what `shutdown` waits for.
            threading.Thread(target=server.shutdown).start()
        elif signals[-1] - signals[0] > TWICE:
            server.cut_off()

    with server:
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        lines = [
            f"coarinbox {__version__}",
            "address     {} port {}".format(*server.server_address[:2]),
            f"inbox       {server.base}/inbox",
            f"page        {server.base}/",
            f"store       {server.store.directory}",
            f"validation  {server.settings.VALIDATE_INCOMING}",
        ]
        print("\n".join(lines), file=sys.stderr)
        server.serve_forever()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    options = vars(parse_arguments(arguments))
    filename = options.pop("config", None) or os.environ.get("COARNOTIFY_SETTINGS")
    try:
        paths = options.pop("check", [])
        settings = configure(filename, options)
        if paths:
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="backslashreplace")
            return check(paths, settings)
        if settings.DEBUG_PYCHARM:
            attach_debugger(settings.DEBUG_PYCHARM_SERVER, settings.DEBUG_PYCHARM_PORT)
        run(InboxServer(settings))
    except ConfigurationError as error:
        print(f"coarinbox: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
