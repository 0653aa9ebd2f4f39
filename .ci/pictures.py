# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The coarinbox authors
"""Make the pictures of the README: .github/page.png and .github/delivery.png.

They show an inbox on port 5005 that has received samples, some with faults. Needs Chromium.
"""

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import coarinbox  # noqa: E402, it is beside this directory


def example(inbox: coarinbox.Inbox, number: int, pattern: str) -> dict[str, Any]:
    """Make a sample that one of the services sends, about something of its own."""
    base = f"https://{('dspace', 'journal', 'review')[number % 3]}.example.org"
    origin = {"id": f"{base}/", "inbox": inbox.url, "type": "Service"}
    target = {"id": inbox.url.removesuffix("inbox"), "inbox": inbox.url, "type": "Service"}
    document = coarinbox.sample(pattern, origin=origin, target=target)
    if pattern.startswith("Request"):
        document["object"]["id"] = f"{base}/items/{number + 410}"
    return document


def fill(inbox: coarinbox.Inbox) -> str:
    """Deliver samples, with and without faults; returns the name of one with many."""
    for number, pattern in enumerate(coarinbox.RULES):
        coarinbox.send(example(inbox, number, pattern), inbox.url)
    coarinbox.send(b"{'id': 1}", inbox.url)
    warned = example(inbox, 8, "Request Endorsement")
    del warned["target"]["inbox"]
    coarinbox.send(warned, inbox.url)
    offer = example(inbox, 9, "Request Review")
    for failure in ("?status=503&times=1", "?close=1&times=1", ""):
        with contextlib.suppress(OSError):
            coarinbox.send(offer, inbox.url + failure)
    delivered = inbox.deliveries[-1]
    for pattern in ("Tentatively Accept", "Announce Review"):
        inbox.reply(delivered, pattern, to=inbox.url)
    faulty = example(inbox, 12, "Request Review")
    faulty |= {"id": "9c3f1d5e-6d0b-4f0e", "inReplyTo": "", "origin": faulty["origin"]["id"]}
    faulty["target"] = {"@id": inbox.url.removesuffix("inbox"), "type": "Service"}
    del faulty["object"]["ietf:cite-as"]
    coarinbox.send(faulty, inbox.url)
    return inbox.deliveries[-1].name


def picture(name: str, url: str) -> None:
    with tempfile.TemporaryDirectory() as profile:
        flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1280,800"
        paths = [f"--user-data-dir={profile}", f"--screenshot={ROOT / '.github' / name}"]
        command = ["chromium", *flags.split(), *paths, url]
        subprocess.run(command, check=True, timeout=60, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    with coarinbox.running(PORT=5005) as inbox:
        name, page = fill(inbox), inbox.url.removesuffix("inbox")
        picture("page.png", page)
        picture("delivery.png", f"{page}deliveries/{name}?status=4xx&direction=in")
