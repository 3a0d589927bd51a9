"""The identities that the stand-in representation model learns to tell apart: emoji, and their names."""

from __future__ import annotations

import functools

import emoji

from data.shards.index import key_hash

TEXT_STYLE = "\ufe0f"  # variation selector: in Unicode's sequences, not in the file names

LAST_EMOJI_VERSION = 13  # later emoji of Unicode are not in every release of the drawings

# Groups of near-copies that differ only in small print.
LETTERING = ("button", "o’clock", "thirty", "input", "arrow")


@functools.cache
def identities() -> tuple[tuple[str, str], ...]:
    """(glyph, name) of emoji that differ at a glance, in an order that mixes all kinds."""
    found = {
        glyph.replace(TEXT_STYLE, ""): entry["en"].strip(":").replace("_", " ")
        for glyph, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"] and entry["E"] <= LAST_EMOJI_VERSION
    }
    single = [(glyph, name) for glyph, name in found.items() if len(glyph) == 1]
    apart = [item for item in single if not any(word in item[1] for word in LETTERING)]
    return tuple(sorted(apart, key=lambda item: key_hash(item[0])))
