"""note.md of a step: the user's own words about it. Never hashed, so it can be written at any time; words that begin with # are tags."""

import re
from pathlib import Path

from litlora.checkpoint import names
from litlora.checkpoint.commit import write_atomically
from litlora.checkpoint.reading import read_bytes


def read_note(step: Path) -> str:
    """What was written about a step; nothing where nothing was."""
    path = step / names.NOTE
    return read_bytes(path).decode("utf-8", "replace").strip() if path.is_file() else ""


def write_note(step: Path, text: str) -> None:
    """`text` in place of what was written before; an empty one takes the note away."""
    if text.strip():
        write_atomically(step / names.NOTE, f"{text.strip()}\n".encode())
    else:
        (step / names.NOTE).unlink(missing_ok=True)


def first_line(note: str) -> str:
    return note.splitlines()[0] if note else ""


def tags_of(note: str) -> list[str]:
    """`release` of `#release`; a heading's # stands alone and is none."""
    found = (word.rstrip("./-") for word in re.findall(r"(?<!\S)#([\w./-]+)", note))  # "#release." at a sentence's end
    return [word for word in dict.fromkeys(found) if word]
