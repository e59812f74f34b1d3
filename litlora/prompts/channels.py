"""Answers that are several messages, each with a header that says which channel it is in, as gpt-oss writes them.

Known by what a template writes, not by a model's name.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from litlora.errors import UserError
from litlora.prompts import THINK_BEGIN, THINK_END, THOUGHT, Prompts
from litlora.tokenizer import TextStream, Tokenizer


class Channels(NamedTuple):
    """How a template writes an answer that is several messages, each with a header (gpt-oss: `<|channel|>final<|message|>` and a text)."""

    marker: int  # ends a header
    answer: tuple[int, ...]  # the header of what is said
    thought: tuple[int, ...]  # of what is thought before it; () where the template shows no thoughts
    role: tuple[int, ...]  # stands before the header of a message that is not the first
    key: str  # of a thought in a message


def channels_of(prompts: Prompts) -> Channels | None:
    """What the template writes before an answer itself, between special tokens; None where that is nothing, as in most."""
    special, question = prompts.tokenizer.special_ids, {"role": "user", "content": "question"}

    def written(**thought: str) -> list[int]:
        try:
            ids, graded = prompts.sample_ids([question, {"role": "assistant", "content": "replied", **thought}])
        except UserError:  # a template that wants another conversation, or that shows no thoughts under this key
            return []
        return [token_id for token_id, is_answer in zip(ids, graded, strict=True) if is_answer]

    plain = written()
    end = next((n for n, token_id in enumerate(plain) if n and token_id in special), 0)
    if plain[:1] == [] or plain[0] not in special or end < 2 or plain[end] in prompts.stop_ids:
        return None
    if not prompts.tokenizer.decode(plain[end + 1 :]).startswith("replied"):  # an empty thought before it is no header
        return None
    marker, answer = plain[end], tuple(plain[:end])
    for key in THOUGHT:
        said = written(**{key: "thought"})
        if said.count(marker) != 2 or said[-len(plain) :] != plain:
            continue
        first = said.index(marker)
        ender = next(n for n in range(first + 1, len(said)) if said[n] in special)
        return Channels(marker, answer, tuple(said[:first]), tuple(said[ender + 1 : -len(plain)]), key)
    return Channels(marker, answer, (), (), THOUGHT[0])


def stream_of(tokenizer: Tokenizer, channels: Channels | None) -> "TextStream | ChannelStream":
    return tokenizer.stream() if channels is None else ChannelStream(tokenizer, channels)


def text_of(ids: Sequence[int], tokenizer: Tokenizer, stop_ids: Collection[int], channels: Channels | None) -> str:
    """The text of an Answer with these ids."""
    stream = stream_of(tokenizer, channels)
    return "".join([stream.push(token_id) for token_id in ids if token_id not in stop_ids]) + stream.flush()


class ChannelStream:
    """The text of an answer in channels: thoughts between <think> and </think>, as other models write them, and then what is said.

    What is neither, a call of a tool, stands there as it was written, header included.
    """

    def __init__(self, tokenizer: Tokenizer, channels: Channels) -> None:
        self.tokenizer, self.channels = tokenizer, channels
        self.stream = tokenizer.stream()
        self.header: list[int] | None = []  # ids of a header that is not ended; None: inside a message
        self.kind = "answer"  # of the message: or thought, or call
        self.pieces: list[tuple[str, str]] = []  # what was given, by kind: answer, thought, call, frame (what stands around a thought)

    def push(self, number: int) -> str:
        """The text that is certain now that this id is known; often empty."""
        special = number in self.tokenizer.special_ids
        if self.header == [] and not special:  # a message without one
            self.begin("answer")
        if self.header is None:
            return self.end(number) if special else self.give(self.kind, self.stream.push(number))
        self.header.append(number)
        if number != self.channels.marker:
            return ""
        role, opening = self.channels.role, self.channels.answer[0]
        if tuple(self.header[: len(role) + 1]) == (*role, opening):
            del self.header[: len(role)]
        header = tuple(self.header[:-1])
        return self.begin("answer" if header == self.channels.answer else "thought" if header == self.channels.thought else "call")

    def end(self, number: int) -> str:
        """Of a message: the special token with which it ends may begin the next one's header."""
        self.header = [number] if number in (*self.channels.role[:1], self.channels.answer[0]) else []
        said = self.give(self.kind, self.stream.flush())
        if self.kind == "thought":
            return said + self.give("frame", f"\n{THINK_END}\n\n")
        return said + (self.give("call", "\n") if self.kind == "call" else "")

    def begin(self, kind: str) -> str:
        """A message of this kind, with what stands before its text."""
        header, self.header, self.kind, self.stream = self.header or [], None, kind, self.tokenizer.stream()
        if kind == "call":
            return self.give("call", self.tokenizer.decode(header, skip_special=False))
        return self.give("frame", f"{THINK_BEGIN}\n") if kind == "thought" else ""

    def flush(self) -> str:
        """What was held back, at the end of the answer: also the beginning of a header, lest a text that has none be lost."""
        if self.header is None:
            return self.give(self.kind, self.stream.flush())
        return self.give("frame", self.tokenizer.decode(self.header))

    def give(self, kind: str, text: str) -> str:
        if text:
            self.pieces.append((kind, text))
        return text
