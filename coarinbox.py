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
back; what is refused is answered with everything that is wrong with it. The file needs nothing but
Python and may be copied into another project.

Each section uses only what stands above it: documents, configuration, rules, storage, pages, HTTP,
server, command line. The one exception is that an HTTP request asks the server it came through.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import difflib
import errno
import html
import http.server
import io
import ipaddress
import json
import logging
import math
import operator
import os
import re
import secrets
import signal
import socket
import socketserver
import stat
import sys
import threading
import time
import traceback
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import ssl

__version__ = "0.1.0"

LOG = logging.getLogger("coarinbox")


# --- Documents -----------------------------------------------------------------------------------

# A notification is nested five levels deep. Python's own limit differs between versions.
MAX_DEPTH = 100


def number(digits: str) -> int | float:
    if math.isinf(float(digits)):
        raise ValueError(f"a number is too large: {digits:.20}… ({len(digits)} characters)")
    return int(digits) if digits.lstrip("-").isdigit() else float(digits)


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
        if depth(document) > MAX_DEPTH:
            raise RecursionError
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at octet {error.start}") from error
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    return document


def lookup(document: Any, member: str) -> tuple[bool, Any]:
    """Find a member by its dotted name; the empty name is the document itself.

    Returns True and the value, None when there is none, or False and None when a parent of the
    member is not an object.
    """
    value = document
    for name in member.split(".") if member else ():
        if not isinstance(value, dict):
            return False, None
        value = value.get(name)
    return True, value


# What RFC 3986 and RFC 3987 forbid everywhere in a URI, and the parts they divide one into.
FORBIDDEN = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff<>\"{}|\\^`]")
URI = re.compile(
    r"""
    (?P<scheme> [A-Za-z][A-Za-z0-9+.-]* ) :
    (?: // (?: [^/?\#@\[\]]* @ )?                                # user information
        (?P<host> \[ [^/?\#@\]]* \] | [^/?\#@\[\]:]* )
        (?: : [0-9]+ )? (?= [/?\#] | \Z )                        # port
      | (?! // ) )
    [^?\#\[\]]* (?: \? [^\#]* )? (?: \# [^\#\[\]]* )?            # path, query, fragment
    """,
    re.VERBOSE,
)
UUID_URN = re.compile(r"(?i:urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})")
MEDIA_TYPE = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+-]+ *(;|\Z)", re.ASCII)


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Read the host of a URI as an IP address, IPv6 in brackets; None for any other host."""
    try:
        if host.startswith("["):
            address = ipaddress.IPv6Address(host[1:-1])
            return address.ipv4_mapped or address
        return ipaddress.IPv4Address(host)
    except ValueError:
        return None


def is_uri(value: Any) -> bool:
    """Whether value is an absolute URI (RFC 3986 section 4.3, with a fragment allowed)."""
    match = URI.fullmatch(value) if isinstance(value, str) and not FORBIDDEN.search(value) else None
    if not match:
        return False
    host = match["host"] or ""
    if host.startswith("["):
        return ip_address(host) is not None
    return host != "" or match["scheme"].lower() not in ("http", "https")


def is_http_uri(value: Any) -> bool:
    """Whether value is an absolute URI with scheme http or https and a host."""
    return is_uri(value) and value.partition(":")[0].lower() in ("http", "https")


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
A_COUNT = Kind("a whole number above 0", lambda value: type(value) is int and 0 < value < 2**31)
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


def shown(value: Any) -> str:
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
                reason = f"{field.name} is {shown(value)}, expected {kind.expected}"
                raise ConfigurationError(reason)
        if self.SSL_KEY and not self.SSL_CERT:
            raise ConfigurationError("SSL_KEY is set, expected SSL_CERT beside it")


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
    known = [field.name for field in dataclasses.fields(Settings)]
    values = read_configuration(filename) if filename else {}
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            LOG.warning("%s: unknown setting %s ignored; nearest: %s", filename, name, nearest)
    ours = {name: value for name, value in values.items() if name in known}
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
# own examples break the other rules there.
IN_EMBEDDED = {E: E, M: S, S: S, OK: OK}

# Which levels a value of VALIDATE_INCOMING refuses. The others are warnings.
REFUSED: Mapping[bool | str, tuple[str, ...]] = {True: (E,), False: (), "strict": (E, M)}


class Pattern(NamedTuple):
    """A kind of notification, known by its types."""

    name: str
    page: str  # below SPECIFICATION
    types: tuple[str, ...]

    @property
    def spec(self) -> str:
        return f"{SPECIFICATION}{self.page}/"


# fmt: off
PATTERNS = (
    Pattern("Accept", "accept", ("Accept",)),
    Pattern("Announce Endorsement", "announce-endorsement",
            ("Announce", "coar-notify:EndorsementAction")),
    Pattern("Announce Relationship", "announce-relationship",
            ("Announce", "coar-notify:RelationshipAction")),
    Pattern("Announce Review", "announce-review", ("Announce", "coar-notify:ReviewAction")),
    Pattern("Announce Service Result", "announce-resource", ("Announce",)),
    Pattern("Reject", "reject", ("Reject",)),
    Pattern("Request Endorsement", "request-endorsement",
            ("Offer", "coar-notify:EndorsementAction")),
    Pattern("Request Review", "request-review", ("Offer", "coar-notify:ReviewAction")),
    Pattern("Tentatively Accept", "tentative-accept", ("TentativeAccept",)),
    Pattern("Tentatively Reject", "tentative-reject", ("TentativeReject",)),
    Pattern("Unprocessable Notification", "unprocessable",
            ("Flag", "coar-notify:UnprocessableNotification")),
    Pattern("Undo Offer", "undo-offer", ("Undo",)),
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
    types = types_of(lookup(document, "type")[1])
    fitting = [pattern for pattern in PATTERNS if types.issuperset(pattern.types)]
    return max(fitting, key=lambda pattern: len(pattern.types), default=None)


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
    return is_http_uri(value) or (is_uri(value) and bool(UUID_URN.fullmatch(value)))


def is_media_type(value: Any) -> bool:
    return is_text(value) and bool(MEDIA_TYPE.match(value))


def has_known_actions(value: Any) -> bool:
    actions = (name for name in types_of(value) if re.match("coar-notify:|[^:]*Action$", name))
    return COAR_NOTIFY_TYPES.issuperset(actions)


class Check(NamedTuple):
    """Something that a rule demands of the value of a member."""

    name: str  # ends the code of a finding
    demand: str  # completes "the member must"
    holds: Callable[..., bool]  # of the value, and of those of the members `beside` it
    beside: tuple[str, ...] = ()
    hint: Callable[[Any], str] = lambda value: ""


def include(name: str, types: frozenset[str], what: str) -> Check:
    return Check(name, f"include {what}", lambda value: not types.isdisjoint(types_of(value)))


def equal(member: str) -> Check:
    return Check(f"equals-{member}", f"equal {member}", operator.eq, (member,))


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
A_MEDIA_TYPE = Check("media-type", "be a media type, type/subtype", is_media_type)
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

    def examine(self, notification: Any, prefix: str, spec: str) -> Finding | None:
        """Apply the rule to a notification that stands at the pointer `prefix`."""
        reached, value = lookup(notification, self.member)
        if value is None:
            level, need = (self.absent if reached else OK), "required"
        else:
            level, need = (OK if self.holds(notification, value) else self.wrong), self.check.name
        if not level:
            return None
        pointer = prefix + ("/" + self.member.replace(".", "/") if self.member else "")
        message = self.message(level, pointer, value)
        return Finding(level, pointer, self.code(need), message, spec, abridged(value))

    def holds(self, notification: Any, value: Any) -> bool:
        beside = [lookup(notification, member)[1] for member in self.check.beside]
        return None in beside or self.check.holds(value, *beside)

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
    Rule("type",            E, E, TYPES),
    Rule("type",            OK, E, PATTERN),
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
    """The rules for something in a repository; the levels are those of it lacking a member."""
    return (
        Rule(f"{member}.id", OK, M, HTTP_URI),
        Rule(f"{member}.type", no_type, M, AS2_TYPE),
        Rule(f"{member}.ietf:cite-as", no_cite_as, M, HTTP_URI),
        Rule(f"{member}.ietf:item", no_item, M, OBJECT),
        Rule(f"{member}.ietf:item.id", M, M, HTTP_URI),
        Rule(f"{member}.ietf:item.type", M, M, AS2_TYPE),
        Rule(f"{member}.ietf:item.mediaType", M, M, A_MEDIA_TYPE),
    )


REQUEST = EVERY + resource("object", no_type=M, no_cite_as=S, no_item=M)
ANSWER = EVERY + (
    Rule("inReplyTo",           E),
    Rule("inReplyTo",           OK, E, equal("object.id")),
    Rule("object.type",         E, E, TYPES),
    Rule("object.type",         OK, M, OFFER),
)
ANNOUNCE = EVERY + (
    Rule("object.type",         E, E, AS2_TYPE),
    Rule("object.ietf:cite-as", S, M, HTTP_URI),
    Rule("context",             E),
    *resource("context"),
)
RELATIONSHIP = ANNOUNCE + (
    Rule("object.as:subject",      E, E, ABSOLUTE_URI),
    Rule("object.as:relationship", E, E, ABSOLUTE_URI),
    Rule("object.as:object",       E, E, ABSOLUTE_URI),
    Rule("context.id",             OK, M, equal("object.as:object")),
)
SERVICE_RESULT = ANNOUNCE + (
    Rule("type",                OK, S, KNOWN_ACTIONS),
)
UNPROCESSABLE = EVERY + (
    Rule("inReplyTo",           E),
    Rule("summary",             E, M, TEXT),
)
# fmt: on

RULES: Mapping[str, tuple[Rule, ...]] = {
    "Accept": ANSWER,
    "Announce Endorsement": ANNOUNCE,
    "Announce Relationship": RELATIONSHIP,
    "Announce Review": ANNOUNCE,
    "Announce Service Result": SERVICE_RESULT,
    "Reject": ANSWER,
    "Request Endorsement": REQUEST,
    "Request Review": REQUEST,
    "Tentatively Accept": ANSWER,
    "Tentatively Reject": ANSWER,
    "Unprocessable Notification": UNPROCESSABLE,
    "Undo Offer": ANSWER,
}


EMBEDDED: Mapping[str, tuple[Rule, ...]] = {
    name: tuple(
        rule._replace(absent=IN_EMBEDDED[rule.absent], wrong=IN_EMBEDDED[rule.wrong])
        for rule in rules
        if rule.member != "@context"
    )
    for name, rules in RULES.items()
}


def parts(document: Any) -> Iterator[tuple[str, Any, Pattern | None, tuple[Rule, ...]]]:
    """Yield the notification and, where it answers one that it embeds, that one, and so on.

    Each comes as the pointer to it, itself, its pattern and its rules.
    """
    prefix, pattern = "", pattern_of(document)
    yield prefix, document, pattern, RULES[pattern.name] if pattern else EVERY
    while pattern and RULES[pattern.name] is ANSWER:
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
        for rule in rules:
            finding = rule.examine(part, prefix, spec)
            if finding:
                # An answer and the offer in it make some of the same demands of its object.
                findings.setdefault(finding.message, finding)
    return list(findings.values())


def constraints() -> list[dict[str, Any]]:
    """List the rules, one entry for each code, with the level it has for each pattern."""
    listed: dict[str, dict[str, Any]] = {}
    for pattern in PATTERNS:
        for rule in RULES[pattern.name]:
            required = ("required", "be present", rule.absent)
            right = (rule.check.name, rule.check.demand, rule.wrong)
            for need, demand, level in (required, right):
                entry = {"code": rule.code(need), "member": rule.member, "demand": demand}
                if level:
                    levels = listed.setdefault(entry["code"], {**entry, "levels": {}})["levels"]
                    levels.setdefault(pattern.name, level)
    return list(listed.values())


# --- Storage -------------------------------------------------------------------------------------

NAME = "[0-9]{8}_[0-9]{6}_[0-9a-f]{32}"
SUFFIX = ".json"


class Store:
    """Notifications in a directory, one file each, which is the only truth about them.

    Files that somebody adds or removes, or another process that shares the directory, count. What
    goes wrong with the directory is raised as `OSError`.
    """

    def __init__(self, directory: str, fsync: bool = True) -> None:
        """Use `directory`, creating it if it is missing; `fsync` makes `add` wait for the disk."""
        self.directory = os.path.abspath(directory)
        self.fsync = fsync
        os.makedirs(self.directory, exist_ok=True)

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name + SUFFIX)

    def names(self) -> list[str]:
        """List the names of the notifications by the second in which they arrived."""
        try:
            with os.scandir(self.directory) as entries:
                return sorted(
                    entry.name[: -len(SUFFIX)]
                    for entry in entries
                    if re.fullmatch(NAME + re.escape(SUFFIX), entry.name)
                    and entry.is_file(follow_symlinks=False)
                )
        except FileNotFoundError:
            return []

    def add(self, octets: bytes) -> str:
        """Store a notification under a new name, which is returned once it is complete.

        It appears whole or not at all, and never in place of another one.
        """
        name = time.strftime("%Y%m%d_%H%M%S_", time.gmtime()) + uuid.uuid4().hex
        draft = os.path.join(self.directory, f".{name}.part")
        os.makedirs(self.directory, exist_ok=True)
        try:
            with open(draft, "xb") as file:
                file.write(octets)
                file.flush()
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
        with self.regular_file(name) as path, open(path, "rb") as file:
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


# --- Pages ---------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
</head>
<body>
<main>
<h1>{title}</h1>
{content}
</main>
</body>
</html>
"""


def page(title: str, content: str) -> str:
    """Wrap HTML content in a page; the title is escaped here."""
    return PAGE.format(title=html.escape(title), content=content)


def inbox_page(base: str, names: list[str]) -> str:
    base = html.escape(base)
    links = "".join(
        f'<li><a href="{base}/inbox/{name}">{name}</a></li>' for name in reversed(names)
    )
    return page(
        "coarinbox",
        f"<p>Send COAR Notify notifications to <code>{base}/inbox</code>.</p>"
        f'<p><a href="{base}/constraints">What they must be</a></p>'
        f"<h2>{len(names)} stored</h2><ul>{links}</ul>",
    )


def notification_page(name: str, octets: bytes) -> str:
    return page(name, f"<pre>{html.escape(octets.decode('utf-8', 'replace'))}</pre>")


def constraints_page() -> str:
    rows = []
    for entry in constraints():
        levels = ", ".join(f"{name} {level}" for name, level in entry["levels"].items())
        demand = f"{entry['member'] or 'the notification'}: {entry['demand']}"
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in (entry["code"], demand, levels))
        rows.append(f'<tr id="{html.escape(entry["code"])}">{cells}</tr>')
    meanings = "".join(f"<dt>{level}</dt><dd>{text}</dd>" for level, text in LEVELS.items())
    return page("Constraints", f"<dl>{meanings}</dl><table>{''.join(rows)}</table>")


# --- HTTP ----------------------------------------------------------------------------------------

JSON_LD = "application/ld+json"
ACCEPT_POST = f"{JSON_LD}, application/json, application/activity+json"

# The Host header (RFC 9110 section 7.2).
HOST = r"((\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]+)?)?"
# A header line (RFC 9112 section 5), held to the letter: whatever another reader of the same
# octets could take for something else, a line folded or ended otherwise, is refused.
HEADER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n")
MAX_HEADERS = 100  # as in `http.client`
MAX_LINE = 65536

# Seconds for which a connection that ends early is still read, so that its client gets the answer.
LINGER = 2.0


class Response(NamedTuple):
    """Status, body and own headers of an answer; `reply` adds the headers that all have."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


def json_response(
    status: int, document: Any, kind: str = "application/json", headers: Mapping[str, str] = {}
) -> Response:
    body = json.dumps(document, indent=2).encode() + b"\n"
    return Response(status, body, {"Content-Type": kind, **headers})


def html_response(text: str, headers: Mapping[str, str] = {}) -> Response:
    kind = {"Content-Type": "text/html; charset=utf-8"}
    policy = {"Content-Security-Policy": "default-src 'none'"}
    return Response(200, text.encode("utf-8", "replace"), {**kind, **policy, **headers})


class Problem(Exception):
    """Something to answer with an error; raise it anywhere while a request is served."""

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] = {}, **members: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.detail = HTTPStatus(status), detail
        self.headers, self.members = headers, members

    def response(self) -> Response:
        """Make the problem document (RFC 9457)."""
        title = {"type": "about:blank", "title": self.status.phrase, "status": self.status}
        document = {**title, "detail": self.detail, **self.members}
        return json_response(self.status, document, "application/problem+json", self.headers)


def quality(media_type: str, accept: str) -> float:
    """Weigh a media type, from 0 to 1, by an Accept header (RFC 9110 section 12.5.1)."""
    weights: dict[str, float] = {}
    for element in re.findall(r'(?:[^,"]|"[^"]*"?)+', accept.lower()):
        name, *parameters = (part.strip() for part in element.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "")
        known = re.fullmatch(r"[01](\.[0-9]{0,3})?", weight)
        weights[name] = max(weights.get(name, 0.0), float(weight) if known else 1.0)
    for name in (media_type, media_type.partition("/")[0] + "/*", "*/*"):
        if name in weights:
            return weights[name]
    return 0.0


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
        raise Problem(507 if full else 500, f"the store failed: {error.strerror}") from error


class DeadlineReader(io.RawIOBase):
    """Reads from a socket until a deadline, however slowly octets drip in.

    A socket's own time-out begins anew with every octet. Raises `Problem` at the deadline.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.deadline = math.inf

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        remaining = self.deadline - time.monotonic()
        try:
            if remaining > 0:
                self.connection.settimeout(remaining)
                return self.connection.recv_into(buffer)
        except socket.timeout:
            pass
        raise Problem(408, "the request was not complete in time (REQUEST_TIMEOUT)")


class InboxHandler(http.server.BaseHTTPRequestHandler):
    """Serves the requests of one connection.

    The base class parses a request and calls `do_GET` or its like. All of these are `serve`, which
    finds the resource in `ROUTES` and sends the `Response` that its method returns. Whatever is
    wrong is raised as `Problem`, by the base class too. `reply` writes every answer.
    """

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # 0.9 would be answered without a status
    server_version = f"coarinbox/{__version__}"
    disable_nagle_algorithm = True
    server: InboxServer
    raw_requestline: bytes

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.wire = DeadlineReader(self.connection)
        self.rfile = self.incoming = io.BufferedReader(self.wire)
        self.unread = False  # whether the connection holds octets that belong to this request

    def finish(self) -> None:
        """Close the connection, but not so abruptly that an early answer is lost.

        Closing with octets unread resets the connection, which discards what was sent on it.
        """
        if self.unread:
            with contextlib.suppress(OSError, Problem):
                self.connection.shutdown(socket.SHUT_WR)
                self.wire.deadline = time.monotonic() + LINGER
                while self.incoming.read1():
                    pass
        super().finish()

    def handle(self) -> None:
        """Serve requests until the connection ends, or breaks, which is no fault of ours."""
        try:
            super().handle()
        except OSError as error:
            self.log_message("connection lost: %s", error)

    def handle_one_request(self) -> None:
        self.close_connection = True
        self.continue_expected = False
        self.command, self.requestline, self.request_version = "", "", self.protocol_version
        try:
            if self.request_begins():
                super().handle_one_request()
        except Problem as problem:
            self.log_message("%s", problem.detail)
            self.reply(problem.response())

    def request_begins(self) -> bool:
        """Wait for a request; False if none comes in time, or the client or the server stops."""
        patience = self.server.settings.REQUEST_TIMEOUT
        self.wire.deadline = time.monotonic() + patience
        with self.server.idling(self.connection), contextlib.suppress(Problem):
            while self.incoming.peek(1)[:1] in (b"\r", b"\n"):  # RFC 9112 section 2.2
                self.incoming.read(1)
            self.unread = self.incoming.peek(1) != b""
        self.wire.deadline = time.monotonic() + patience
        return self.unread

    def parse_request(self) -> bool:
        """Parse the head of a request (RFC 9112 sections 2 to 6); faults are raised."""
        line = self.raw_requestline.decode("latin-1")
        self.requestline = line.rstrip("\r\n")
        if not re.fullmatch(r"[!-~]+ [!-~]+ HTTP/[1-9]\.[0-9]\r\n", line):
            raise Problem(400, f"the request line is malformed: {line!r:.80}")
        self.rfile = io.BytesIO(self.read_head())
        super().parse_request()
        self.rfile = self.incoming
        if self.server.settings.DEBUG:
            self.log_message("%s", self.requestline)
            for name, value in self.headers.items():
                secret = name.lower() == "authorization"
                self.log_message("%s: %s", name, "(masked)" if secret else value)
        self.check_framing()
        return True

    def read_head(self) -> bytes:
        """Read the header lines; the base class answers for those that are too long or too many."""
        head = b""
        for _ in range(MAX_HEADERS + 1):
            line = self.incoming.readline(MAX_LINE + 1)
            if line == b"\r\n" or len(line) > MAX_LINE:
                return head + line
            if not HEADER.fullmatch(line):
                raise Problem(400, f"a header line is malformed: {line!r:.80}")
            head += line.rstrip() + b"\r\n"
        return head

    def handle_expect_100(self) -> bool:
        # Not yet: `read_body` sends the 100 once nothing else stands in the body's way.
        self.continue_expected = True
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Raise what the base class would send as HTML."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self.serve()  # which answers a verb that nothing knows with 405, or 404
        else:
            detail = ": ".join(text for text in (message, explain) if text)
            raise Problem(code, detail or HTTPStatus(code).description)

    def serve(self) -> None:
        try:
            response = self.route()
        except (Problem, OSError):
            raise
        except Exception as error:
            LOG.exception("a fault of the inbox itself")
            raise Problem(500, "a fault of the inbox itself; its log says more") from error
        self.reply(response)

    do_GET = do_HEAD = do_POST = do_DELETE = do_OPTIONS = serve

    def route(self) -> Response:
        """Find the resource and let it answer."""
        self.check_host()
        self.check_token()
        for path, verbs in self.ROUTES.items():
            match = re.fullmatch(path, self.target.partition("?")[0])
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
        raise Problem(404, "nothing is here; there are /, /inbox, /inbox/NAME and /constraints")

    def reply(self, response: Response) -> None:
        """Send an answer; nothing but `100 Continue` is sent elsewhere."""
        self.close_connection = self.close_connection or self.unread or self.server.closing
        self.connection.settimeout(self.server.settings.REQUEST_TIMEOUT)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Vary", "Accept")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        if response.status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def version_string(self) -> str:
        return self.server_version

    def log_message(self, format: str, *args: Any) -> None:
        # Escaped: what clients send must not pass for lines of the log.
        line = "".join(
            character if character.isprintable() else character.encode("unicode_escape").decode()
            for character in format % args
        )
        LOG.info("%s %s", self.client_address[0], line)

    # What a request says about itself

    @property
    def target(self) -> str:
        """Path and query, also where the request line has a whole URL (RFC 9112 section 3.2)."""
        return re.sub("(?i)^https?://[^/?]*/?", "/", self.path)

    @property
    def host(self) -> str:
        """The name that the client calls us by, with the port; empty where it does not say."""
        whole = re.match("(?i)https?://([^/?]*)", self.path)
        names = [whole[1]] if whole else self.headers.get_all("Host", [""])
        if len(names) > 1 or not re.fullmatch(HOST, names[0]):
            raise Problem(400, "the Host header is malformed")
        return names[0]

    @property
    def base(self) -> str:
        """The URL, without a slash at its end, below which the client finds everything."""
        if self.server.settings.BASE_URL or not self.host:
            return self.server.base
        return f"{self.server.scheme}://{self.host}"

    def check_host(self) -> None:
        if not self.server.answers_to(re.sub(":[0-9]+$", "", self.host)):
            detail = f"an inbox on loopback does not answer to {self.host}; set BASE_URL to its URL"
            raise Problem(421, detail)

    def check_token(self) -> None:
        """Demand TOKEN as a Bearer token (RFC 6750) or a Basic password (RFC 7617)."""
        token = self.server.settings.TOKEN
        if token is None:
            return
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        octets = given.encode("latin-1") if scheme.lower() in ("bearer", "basic") else b""
        if scheme.lower() == "basic":
            try:
                octets = base64.b64decode(octets).partition(b":")[2]
            except ValueError:
                octets = b""
        if not secrets.compare_digest(octets, token.encode()):
            challenge = 'Bearer realm="coarinbox", Basic realm="coarinbox", charset="UTF-8"'
            detail = 'no "Authorization: Bearer TOKEN", nor TOKEN as the password of Basic'
            raise Problem(401, detail, {"WWW-Authenticate": challenge})

    def wants_html(self) -> bool:
        accept = ",".join(self.headers.get_all("Accept", ["*/*"]))
        data = max(quality(JSON_LD, accept), quality("application/json", accept))
        return quality("text/html", accept) > data

    def constraint(
        self, status: int, detail: str, headers: Mapping[str, str] = {}, **members: Any
    ) -> Problem:
        """Make a problem that says where the constraints of the inbox stand (LDP 4.2.1.6)."""
        link = f'<{self.base}/constraints>; rel="http://www.w3.org/ns/ldp#constrainedBy"'
        return Problem(status, detail, {"Link": link, **headers}, **members)

    def check_content(self) -> None:
        if not re.fullmatch(r"application/(json|\S+\+json)", self.headers.get_content_type()):
            given = self.headers.get("Content-Type", "missing")
            detail = f"Content-Type is {given}, expected {ACCEPT_POST} or the like"
            raise self.constraint(415, detail, {"Accept-Post": ACCEPT_POST})
        coding = self.headers.get("Content-Encoding", "identity").lower()
        if coding != "identity":
            detail = f"Content-Encoding is {coding}, expected none"
            raise self.constraint(415, detail, {"Accept-Encoding": "identity"})

    def judge(self, octets: bytes) -> dict[str, Any]:
        """Return the pattern and the warnings of a notification; refuse it if it is not valid."""
        try:
            document = parse(octets)
        except ValueError as error:
            raise self.constraint(400, f"the body is not JSON: {error}") from error
        mode = self.server.settings.VALIDATE_INCOMING
        refused = REFUSED[mode] if isinstance(document, (dict, list)) else (E,)
        pattern = pattern_of(document)
        result: dict[str, Any] = {"pattern": pattern.name if pattern else None}
        findings = validate(document)
        for finding in findings:
            self.log_message("%s %s", finding.level, finding.message)
        errors = [finding.as_json() for finding in findings if finding.level in refused]
        warnings = [finding.as_json() for finding in findings if finding.level not in refused]
        if errors:
            count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
            detail = f"not a valid notification: {count}"
            raise self.constraint(400, detail, **result, errors=errors, warnings=warnings)
        return {**result, "warnings": warnings}

    # The body of a request (RFC 9112 sections 6 and 7)

    def check_framing(self) -> None:
        """Find out how the body ends, for every verb: the next request begins there."""
        codings = [coding.lower() for coding in self.headers.get_all("Transfer-Encoding", [])]
        lengths = set(self.headers.get_all("Content-Length", []))
        if codings and (lengths or self.request_version == "HTTP/1.0"):
            raise Problem(400, "Transfer-Encoding goes with HTTP/1.1 and without Content-Length")
        if codings not in ([], ["chunked"]):
            raise Problem(400, "the only transfer coding that works here is chunked")
        if len(lengths) > 1 or not all(re.fullmatch("[0-9]+", length) for length in lengths):
            raise Problem(400, "Content-Length is not one number of octets")
        self.chunked = bool(codings)
        # 20 digits are too large whatever follows; thousands more would be slow to convert.
        self.length = next((int(length.lstrip("0")[:20] or "0") for length in lengths), None)
        self.unread = self.chunked or bool(self.length)

    def read_body(self) -> bytes:
        if self.length is None and not self.chunked:
            self.unread = True  # whatever comes, it is no request
            raise Problem(411, "the request has neither Content-Length nor a chunked body")
        length = self.check_size(self.length or 0)
        if self.continue_expected:
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
        body = b"".join(self.read_chunks()) if self.chunked else self.read_exactly(length)
        self.unread = False
        return body

    def check_size(self, size: int) -> int:
        limit = self.server.settings.MAX_CONTENT_LENGTH
        if size > limit:
            raise self.constraint(413, f"the body is larger than {limit} octets")
        return size

    def read_chunks(self) -> Iterator[bytes]:
        total = 0
        while True:
            line = self.incoming.readline(1024)
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,16})[ \t]*(;.*)?\r\n", line)
            if not match:
                raise Problem(400, "the body's chunks are malformed: no size")
            size = int(match[1], 16)
            if size == 0:
                break
            total = self.check_size(total + size)
            yield self.read_exactly(size)
            if self.read_exactly(2) != b"\r\n":
                raise Problem(400, "the body's chunks are malformed: one is longer than its size")
        if not (b"\r\n" + self.read_head()).endswith(b"\r\n\r\n"):
            raise Problem(400, "the trailer after the body's chunks is too long")

    def read_exactly(self, size: int) -> bytes:
        octets = self.incoming.read(size)
        if len(octets) < size:
            raise Problem(400, f"the connection ended {size - len(octets)} octets early")
        return octets

    # The resources

    def get_home(self) -> Response:
        link = f'<{self.base}/inbox>; rel="http://www.w3.org/ns/ldp#inbox"'
        with store_problems():
            names = self.server.store.names()
        return html_response(inbox_page(self.base, names), {"Link": link})

    def get_inbox(self) -> Response:
        """List the notifications (LDN section 3.3.1)."""
        if self.wants_html():
            return self.get_home()
        with store_problems():
            names = self.server.store.names()
        listing = {
            "@context": {"ldp": "http://www.w3.org/ns/ldp#"},
            "@id": self.base + self.target,
            "@type": "ldp:Container",
            "ldp:contains": [{"@id": f"{self.base}/inbox/{name}"} for name in names],
        }
        return json_response(200, listing, JSON_LD)

    def post_inbox(self) -> Response:
        """Take a notification in (LDN section 3.3.2); a 2xx is a promise that it is stored."""
        self.check_content()
        octets = self.read_body()
        if self.server.settings.DEBUG:
            self.log_message("%s", octets.decode("utf-8", "backslashreplace"))
        receipt = self.judge(octets)
        with store_problems():
            name = self.server.store.add(octets)
        location = f"{self.base}/inbox/{name}"
        status = self.server.settings.RESPONSE_STATUS
        headers = {"Location": location} if status == HTTPStatus.CREATED else {}
        return json_response(status, {"location": location, **receipt}, headers=headers)

    def delete_inbox(self) -> Response:
        with store_problems():
            self.server.store.clear()
        return Response(204)

    def get_notification(self, name: str) -> Response:
        with store_problems():
            octets = self.server.store.read(name)
        if self.wants_html():
            return html_response(notification_page(name, octets))
        return Response(200, octets, {"Content-Type": JSON_LD})

    def delete_notification(self, name: str) -> Response:
        with store_problems():
            self.server.store.remove(name)
        return Response(204)

    def get_constraints(self) -> Response:
        if self.wants_html():
            return html_response(constraints_page())
        document = {
            "specification": SPECIFICATION,
            "levels": LEVELS,
            "refused": REFUSED[self.server.settings.VALIDATE_INCOMING],
            "constraints": constraints(),
        }
        return json_response(200, document)

    ROUTES: Mapping[str, Mapping[str, Callable[..., Response]]] = {
        "/": {"GET": get_home},
        "/inbox/?": {"GET": get_inbox, "POST": post_inbox, "DELETE": delete_inbox},
        f"/inbox/(?P<name>{NAME})": {"GET": get_notification, "DELETE": delete_notification},
        "/constraints": {"GET": get_constraints},
    }


# --- Server --------------------------------------------------------------------------------------


@contextlib.contextmanager
def unusable(what: str) -> Iterator[None]:
    """Turn errors of the operating system into errors of the settings that led to them."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{what}: {error}") from error


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    if certificate is None:
        return None
    import ssl  # costs more than everything else at start

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    return context


class InboxServer(http.server.ThreadingHTTPServer):
    """An inbox that listens as soon as it is made and serves from `serve_forever` to `shutdown`.

    `server_close`, or the end of a `with` block, shuts it down and waits for the requests in
    flight. Raises `ConfigurationError` when a setting cannot be put into practice.
    """

    daemon_threads = False  # nobody waits for daemons
    allow_reuse_port = False  # two inboxes on one port would share what arrives
    request_queue_size = 1024

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.serving = self.closing = False
        self.lock = threading.Lock()
        self.idle: dict[socket.socket, None] = {}  # the connection that was idle longest is first
        self.slots = threading.Semaphore(settings.MAX_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in settings.HOST else socket.AF_INET
        with unusable(f"SSL_CERT {settings.SSL_CERT!r}, SSL_KEY {settings.SSL_KEY!r}"):
            self.tls = tls_context(settings.SSL_CERT, settings.SSL_KEY)
        with unusable(f"STORE_DIR {settings.STORE_DIR!r}"):
            self.store = Store(settings.STORE_DIR, settings.FSYNC)
        with unusable(f"HOST {settings.HOST!r}, PORT {settings.PORT}"):
            super().__init__((settings.HOST, settings.PORT), InboxHandler)

    def server_bind(self) -> None:
        if self.settings.HOST == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # HTTPServer would also look up a name for the address, and may wait long for it.
        socketserver.TCPServer.server_bind(self)

    @property
    def base(self) -> str:
        """The URL below which everything is found, without a slash at its end."""
        if self.settings.BASE_URL:
            return self.settings.BASE_URL.rstrip("/")
        host = self.settings.HOST if self.settings.HOST not in ("0.0.0.0", "::") else "localhost"
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"

    @property
    def scheme(self) -> str:
        return "https" if self.tls else "http"

    def answers_to(self, host: str) -> bool:
        """Whether a request may be for `host`: on loopback, only for a loopback name or BASE_URL.

        Otherwise a web page could have its own host name resolve to loopback (DNS rebinding).
        """
        name, bound = host.lower().rstrip("."), str(self.server_address[0])
        ip, own_ip = ip_address(name), ip_address(f"[{bound}]" if ":" in bound else bound)
        if not name or not own_ip or not own_ip.is_loopback:
            return True
        known = urlsplit(self.settings.BASE_URL or "").hostname or ""
        is_local = ip.is_loopback if ip else f".{name}".endswith(".localhost")
        return is_local or name.strip("[]") == known.rstrip(".")

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls:
            # The handshake comes with the first read: in the connection's thread, with a deadline.
            connection = self.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in its own thread; wait, or end an idle one, if there are too many."""
        while not self.slots.acquire(timeout=0.1):
            self.hang_up(1)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.slots.release()

    @contextlib.contextmanager
    def idling(self, connection: socket.socket) -> Iterator[None]:
        """Mark a connection as one that may be ended, because no request has begun on it."""
        with self.lock:
            self.idle[connection] = None
        try:
            if self.closing:
                self.hang_up()
            yield
        finally:
            with self.lock:
                self.idle.pop(connection, None)

    def hang_up(self, most: int | None = None) -> None:
        """Take no more requests from the connections that were idle longest."""
        with self.lock:
            for connection in list(self.idle)[:most]:
                with contextlib.suppress(OSError):
                    # Not the method of a TLS socket, which would go on without encryption.
                    socket.socket.shutdown(connection, socket.SHUT_RD)

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        with self.lock:
            if self.closing:
                return
            self.serving = True
        try:
            super().serve_forever(poll_interval)
        finally:
            self.serving = False

    def shutdown(self) -> None:
        """Stop `serve_forever`, from another thread, or keep it from ever beginning."""
        with self.lock:
            self.closing = True
        if self.serving:  # or the base class would wait for the end of what has not begun
            super().shutdown()

    def server_close(self) -> None:
        self.shutdown()
        self.hang_up()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # an OSError is a connection that broke
            LOG.exception("a fault of the inbox itself")


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


def run(server: InboxServer) -> None:
    """Serve until SIGINT or SIGTERM; the second one does not wait for requests in flight."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        for signal_ in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_, signal.SIG_DFL)
        threading.Thread(target=server.shutdown).start()

    with server:
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        lines = [
            f"coarinbox {__version__}",
            f"inbox       {server.base}/inbox",
            f"page        {server.base}/",
            f"store       {server.store.directory}",
            f"validation  {server.settings.VALIDATE_INCOMING}",
        ]
        print("\n".join(lines), file=sys.stderr, flush=True)
        server.serve_forever()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    options = vars(parse_arguments(arguments))
    filename = options.pop("config", None) or os.environ.get("COARNOTIFY_SETTINGS")
    try:
        settings = configure(filename, options)
        if settings.DEBUG_PYCHARM:
            attach_debugger(settings.DEBUG_PYCHARM_SERVER, settings.DEBUG_PYCHARM_PORT)
        run(InboxServer(settings))
    except ConfigurationError as error:
        print(f"coarinbox: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
