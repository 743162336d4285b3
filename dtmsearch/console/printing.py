"""The one way by which text reaches a terminal: what would act on it there is shown instead.

Names, prompts, messages and answers come from model folders, texts and stores of others. A character that moves the
cursor, colours, renames the window or turns the direction of reading is no part of them that a terminal should obey.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.text import Text

# Control characters but for tab and line feed, marks and overrides of direction, and halves of characters, which no
# terminal can be sent.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """The text with whatever acts on a terminal written out, as in `\\x1b[2J`. JSON stays the same JSON."""
    return _ACTING.sub(_written_out, text)


def shown_in_line(text: str) -> str:
    """The same for what has to stay in one line, as a cell of a table."""
    return shown(text).replace("\n", "\\n").replace("\t", "\\t")


def _written_out(match: re.Match[str]) -> str:
    number = ord(match[0])
    # JSON holds none of the first kind, and reads the second as the character.
    return f"\\x{number:02x}" if number < 0x20 else f"\\u{number:04x}"


def print_shown(text: str, stream: TextIO, end: str = "\n") -> None:
    """Print text, shown."""
    print(shown(text), file=stream, end=end, flush=True)


def styled(text: str, style: str = "", **options: Any) -> Text:
    """Text for a live view, shown, and never read as markup."""
    from rich.text import Text

    return Text(shown_in_line(text), style=style, **options)
