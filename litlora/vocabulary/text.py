"""The text that tokens are learnt from, and that on which they are measured."""

from collections.abc import Iterable, Iterator, Sequence

import tokenizers

MEASURED = 2**20  # bytes: on no more text than that is anything measured ...
TAIL = 10  # ... and to have some, no more than the tenth part of the text is kept apart
LEARNT_FROM = 8 * 2**20  # characters: for so many (of Chinese, where few clauses are equal) the trainer takes 1.4 GB of memory
CHUNK = 50_000  # characters tokenized at once


def lines_of(texts: Iterable[str]) -> list[str]:
    """Every line with its end, which the last of a text gets where it has none."""
    return [line if line.endswith("\n") else line + "\n" for text in texts for line in text.splitlines(keepends=True)]


def split_off_tail(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """What to learn from, and the last lines, which are kept apart for measuring; none where a tenth is less than a line.

    Of very much text every second line is learnt from, or every third, and so on.
    """
    total = sum(map(len, lines))
    tail = first_lines(reversed(lines), min(MEASURED, sum(len(line.encode()) for line in lines) // TAIL))[::-1]
    every = max(1, -(-total // LEARNT_FROM))
    return list(lines[: len(lines) - len(tail) : every]), tail


def first_lines(lines: Iterable[str], limit: int = MEASURED) -> list[str]:
    """As many as `limit` bytes hold."""
    kept, size = [], 0
    for line in lines:
        size += len(line.encode())
        if size > limit:
            break
        kept.append(line)
    return kept


def chunks(lines: Iterable[str]) -> Iterator[str]:
    """The lines again, many at once."""
    kept: list[str] = []
    length = 0
    for line in lines:
        kept.append(line)
        length += len(line)
        if length >= CHUNK:
            yield "".join(kept)
            kept, length = [], 0
    if kept:
        yield "".join(kept)


def tokens_per_character(tokenizer: tokenizers.Tokenizer, lines: Sequence[str]) -> float:
    """How many tokens the text takes, over its characters."""
    tokens = sum(len(tokenizer.encode(chunk, add_special_tokens=False).ids) for chunk in chunks(lines))
    return tokens / max(1, sum(map(len, lines)))
