"""What is typed: one message at a time, from a terminal or from a pipe.

A message is a line; a backslash at its end, or three quotes around it, let it go on over several.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from litlora.console import warn
from litlora.errors import UserError

QUOTES = '"""'


class Reader(Protocol):
    def read(self) -> str | None:
        """The next message, never a blank one; None at the end."""


def unfinished(text: str) -> bool:
    """Whether the message goes on in the next line."""
    if text.startswith(QUOTES):
        return not text[len(QUOTES) :].rstrip().endswith(QUOTES)
    return text.endswith("\\")


def joined(text: str, line: str) -> str:
    """An unfinished message and its next line."""
    return f"{text if text.startswith(QUOTES) else text[:-1]}\n{line}"


def message(text: str) -> str:
    """What was meant by what was typed: without the quotes of a block, or the line breaks at its end."""
    if text.startswith(QUOTES) and not unfinished(text):
        return text.rstrip()[len(QUOTES) : -len(QUOTES)].removeprefix("\n").removesuffix("\n")
    return text.rstrip("\n")


class Lines:
    """Messages from a pipe or a file."""

    def __init__(self, source: TextIO) -> None:
        self.source, self.number = source, 0

    def read(self) -> str | None:
        while (text := self.line()) is not None:
            while unfinished(text) and (line := self.line()) is not None:
                text = joined(text, line)
            if (said := message(text)).strip():
                return said
        return None

    def line(self) -> str | None:
        self.number += 1
        try:
            line = self.source.readline()
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 text ({error.reason})", where=f"standard input:{self.number}", hint="pipe in UTF-8") from None
        return line.rstrip("\r\n") if line else None


class Terminal:
    """Messages typed at a prompt that knows its history, pasted text, several lines and the slash commands."""

    def __init__(self, commands: Mapping[str, Any]) -> None:
        from prompt_toolkit import PromptSession  # here: only a terminal needs it
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.output import create_output

        class Slash(Completer):
            def get_completions(self, document: Any, complete_event: Any) -> Iterator[Completion]:
                before = document.text_before_cursor
                if before.startswith("/") and " " not in before and "\n" not in before:
                    yield from (Completion(f"/{name} ", -len(before), f"/{name}") for name in commands if name.startswith(before[1:]))

        self.session: PromptSession[str] = PromptSession(
            message="> ",
            multiline=True,
            prompt_continuation="",  # so that several lines can be copied as they are
            history=history(),
            completer=Slash(),
            complete_while_typing=False,
            key_bindings=bindings(),
            output=create_output(always_prefer_tty=True),  # replies may go to a file
        )

    def read(self) -> str | None:
        while True:
            try:
                said = message(self.session.prompt())
            except KeyboardInterrupt:
                continue  # the line is gone
            except EOFError:
                return None
            if said.strip():
                return said


def bindings() -> Any:
    """Enter sends, except where the message goes on; Alt-Enter always breaks the line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: Any) -> None:
        buffer = event.current_buffer
        if not unfinished(buffer.text):
            buffer.validate_and_handle()
            return
        if not buffer.text.startswith(QUOTES):
            buffer.text = buffer.text[:-1]  # the backslash
        buffer.cursor_position = len(buffer.text)
        buffer.insert_text("\n")

    @keys.add("escape", "enter")
    def alt_enter(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def history() -> Any:
    """Of all chats, in the user's state directory (XDG base directory specification); in memory where that cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "litlora" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        warn(f"what you type will not be remembered: {path} cannot be written ({error.strerror})")
        return InMemoryHistory()
    return FileHistory(str(path))
