"""Characters that a reader cannot see, written out: in a terminal they would be commands."""

import logging
import re

from lwf_unsloth.secret_texts import without_secrets

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    "\ud800-\udfff]"
)
"""Control codes but tab and newline, direction and zero-width marks, lone surrogates. The
zero-width joiners stay: Persian, Indic scripts and emoji need them."""

_NAMES = {0x00: "NUL", 0x07: "BEL", 0x08: "BS", 0x0D: "CR", 0x1B: "ESC", 0x7F: "DEL"}


def shown(text: str) -> str:
    """Text with its invisible characters written out, e.g. "[U+202E]"; newline and tab stay."""
    return UNSEEN.sub(lambda match: name_of(match.group()), text)


def name_of(character: str) -> str:
    """A visible name in brackets: "[ESC]", else the code point."""
    return f"[{_NAMES.get(ord(character), f'U+{ord(character):04X}')}]"


class PlainFormatter(logging.Formatter):
    """Log lines in which text of models, data and libraries is no command to the terminal, and in
    which no secret stands.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line; control codes but tab and newline are written out."""
        return shown(without_secrets(super().format(record)))
