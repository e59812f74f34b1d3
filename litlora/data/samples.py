"""Messages to samples: token ids with the ids to predict, cut to length, counted, and split into training and validation."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from litlora import __version__
from litlora.console import counted, warn
from litlora.data.demo import FILES, demo_file
from litlora.data.formats import Message, Text, format_of, parse_mapping, texts, to_messages
from litlora.data.places import Row
from litlora.data.rows import DataFile, data_file, data_files, rows_of
from litlora.data.store import IGNORE, Made, Sample, Samples, Stored, store, store_on_disk
from litlora.errors import UserError
from litlora.options import RowsOptions
from litlora.prompts import Prompts, SampleIds

AT_ONCE = 1024  # rows tokenized together
CHARACTERS = 1 << 22  # and the characters in them, about
LARGE = 1 << 23  # bytes of a file whose samples are kept on disk
PLACEHOLDER = re.compile(r"\{\{[A-Za-z_]\w*\}\}")  # {{name}}: the author of the rows left it to be filled in
FORMAT = 4  # of what is kept there; another one finds nothing


@dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0  # read
    skipped: int = 0  # that could not be used (--rows.on_error skip)
    truncated: int = 0  # samples cut to max_seq_length
    nothing_graded: int = 0  # samples left out because no graded token was left
    placeholders: int = 0  # conversations with a {{name}} in them


@dataclass
class DataSet:
    """The samples of a run, ready for training.

    train, weights   the training samples, and how often an epoch sees each
    validation       the held-out samples, none of which has a double among the training samples (after `split`)
    formats          file -> the format that was found in it
    skipped          "file:line:column: reason" of each row that was skipped
    fingerprint      sha256 over the files' bytes, what each is read as, and everything that makes samples of them
    """

    train: Samples
    weights: list[float]
    validation: Samples
    formats: dict[str, str]
    counts: Counts
    fingerprint: str
    skipped: list[str] = field(default_factory=list)
    placeholder: str = ""  # the first of them: "rows.json:2:3: {{name}}"
    groups: list[str] = field(default_factory=list, repr=False)  # one for each of `train`: the same where the row is the same

    @property
    def tokens(self) -> int:
        return int(self.train.lengths.sum())

    @property
    def graded(self) -> int:
        return int(self.train.graded.sum())

    @property
    def longest(self) -> int:
        return max(int(samples.lengths.max(initial=0)) for samples in (self.train, self.validation))

    def summary(self) -> str:
        """`1,600 rows (alpaca) + 80 validation · 210,334 tokens, 61% graded · longest 181`, and what was left out."""
        kinds = ", ".join(dict.fromkeys(self.formats.values()))
        share = self.graded / max(self.tokens, 1)
        parts = [f"{counted(len(self.train), 'sample')} ({kinds}) + {len(self.validation):,} validation"]
        parts += [f"{counted(self.tokens, 'token')}, {share:.0%} graded", f"longest {self.longest:,}"]
        counts = self.counts
        parts += [counted(counts.skipped, "row skipped", "rows skipped")] if counts.skipped else []
        left_out = {"cut to length": counts.truncated, "without a graded token": counts.nothing_graded}
        return " · ".join([*parts, *(f"{count:,} {what}" for what, count in left_out.items() if count)])

    def split(self, fraction: float, seed: int, max_samples: int | None = None) -> "DataSet":
        """Holds out a share of the training samples for validation; doubles of a row stay on one side.

        Which rows are held out depends on the seed and on each row's content, not on the order of the rows. Samples
        that a validation file gave are kept as they are, and nothing is held out then.
        """
        if self.validation or fraction == 0:
            return replace(self, validation=self.validation[:max_samples])
        wanted = round(fraction * len(self.train)) or 1
        ranked = sorted(dict.fromkeys(self.groups), key=lambda group: hashlib.sha256(f"{seed} {group}".encode()).digest())
        sizes: dict[str, int] = {}
        for group in self.groups:
            sizes[group] = sizes.get(group, 0) + 1
        held: set[str] = set()
        count = 0
        for group in ranked[:-1]:  # one is always left to train on
            if count + sizes[group] <= wanted:
                held.add(group)
                count += sizes[group]
        if len(ranked) < 2:
            raise UserError(
                "one row alone cannot be trained on and held out for validation",
                where="--eval.fraction",
                hint="add rows, or --eval.fraction 0",
            )
        held = held or {ranked[0]}
        keep = [n for n, group in enumerate(self.groups) if group not in held]
        validation = self.train.take([n for n, group in enumerate(self.groups) if group in held])
        return replace(
            self,
            train=self.train.take(keep),
            weights=[self.weights[n] for n in keep],
            groups=[self.groups[n] for n in keep],
            validation=validation[:max_samples],
        )


def marked(sample: Sample, prompts: Prompts) -> str:
    """A sample's text, control tokens shown, « before what is graded and » after it."""
    ids = sample.tokens.tolist() + [int(i) for i in sample.targets[-1:] if i != IGNORE]
    graded = [False, *(sample.targets != IGNORE).tolist()]
    parts, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or graded[end] != graded[start]:
            text = prompts.tokenizer.decode(ids[start:end], skip_special=False)
            parts.append(f"«{text}»" if graded[start] else text)
            start = end
    return "".join(parts)


def load_data(
    data: Sequence[str], prompts: Prompts, *, rows: RowsOptions, max_seq_length: int, mask_prompt: bool = True, heldout: bool = False
) -> DataSet:
    """Reads, checks and tokenizes all of `data` (`demo`, files, directories, FILE:WEIGHT) before anything is trained.

    `heldout`: the validation part of what is named (the demo's held-out rows, a directory's val file) in place of the
    training part, where there is one. Raises UserError with file, line and column; with `rows.on_error` skip such rows
    are counted and listed, but where no row can be used at all it raises all the same.
    """
    maker = _Maker(prompts, rows, max_seq_length, mask_prompt)
    train: list[Stored] = []
    validation: list[Stored] = []
    weights: list[float] = []
    for source in (_source(entry) for entry in data):
        parts = (source.validation or source.train, []) if heldout else (source.train, source.validation)
        for file in parts[0]:
            train.append(maker.samples_of(file, source.weight))
            weights += [source.weight] * len(train[-1].index)
        validation += [maker.samples_of(file, 0.0) for file in parts[1]]
    if not weights:
        raise maker.nothing_left(data)
    groups = [group for part in train for group in part.groups()]
    fingerprint, found = maker.fingerprint(), maker.placeholder
    return DataSet(Samples(train), weights, Samples(validation), maker.formats, maker.counts, fingerprint, maker.skipped, found, groups)


def warn_of_placeholders(data: DataSet) -> None:
    """One line where rows hold a `{{name}}` that nobody filled in: it would be learnt as it stands."""
    if data.counts.placeholders:
        warn(f"rows with a placeholder, which would be learnt to the letter: {data.counts.placeholders:,}, the first at {data.placeholder}")


def texts_of(data: Sequence[str], rows: RowsOptions) -> Iterator[str]:
    """The bare text of every training row, without any template: what a vocabulary is learnt from."""
    mapping, skips = parse_mapping(rows.map), rows.on_error == "skip"
    left_out: list[UserError] = []
    for source in map(_source, data):
        for file in source.train:
            form = None
            for row in rows_of(file, left_out.append if skips else None, rows.documents):
                try:
                    form = form or format_of(row, mapping)
                    value = to_messages(row, mapping, form)
                except UserError as error:
                    if not skips:
                        raise
                    left_out.append(error)
                    continue
                yield from [value.text] if isinstance(value, Text) else texts(value)
    if left_out:
        warn(f"{counted(len(left_out), 'row was', 'rows were')} left out, the first of them: {left_out[0]}")


# ---- what is named on the command line -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    train: list[DataFile]
    validation: list[DataFile]
    weight: float


def files_of(data: Sequence[str]) -> list[DataFile]:
    """Every file that `data` names: those to train on, then those to validate on."""
    sources = [_source(entry) for entry in data]
    return [file for source in sources for file in (*source.train, *source.validation)]


def _source(entry: str) -> _Source:
    """`demo`, what its base was made of (`demo:text`, `demo:chats`), a path, or PATH:WEIGHT."""
    name, weight = split_entry(entry)
    if is_part_of_demo(entry):
        return _Source([DataFile(entry, "lines", demo_file(entry.partition(":")[2]))], [], weight)
    if name == "demo":
        train, heldout = ([DataFile(f"demo:{part}", "lines", demo_file(part))] for part in ("train", "heldout"))
        return _Source(train, heldout, weight)
    train, heldout = ([data_file(p) for p in files] for files in data_files(Path(name)))
    return _Source(train, heldout, weight)


def is_part_of_demo(entry: str) -> bool:
    """`demo:text`, `demo:chats`."""
    return entry.startswith("demo:") and entry.partition(":")[2] in FILES


def split_entry(entry: str) -> tuple[str, float]:
    """What an entry of `--data` names, and how often an epoch sees it. The last colon splits only where the whole is no path."""
    name, weight = entry, 1.0
    if entry != "demo" and not is_part_of_demo(entry) and not Path(entry).exists() and ":" in entry:
        name, _, number = entry.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            name = entry
        if not 0 < weight < 1e6:
            hint = "a weight is passes per epoch: FILE:2 or FILE:0.5"
            raise UserError(f"the weight {number} is not above 0", where=f"--data {entry}", hint=hint)
    return name, weight


# ---- rows to samples -------------------------------------------------------------------------------------------------


class _Maker:
    """Makes samples of files, and counts."""

    def __init__(self, prompts: Prompts, rows: RowsOptions, max_seq_length: int, mask_prompt: bool) -> None:
        self.prompts, self.skip, self.mask_prompt = prompts, rows.on_error == "skip", mask_prompt
        self.mapping, self.max_seq_length, self.documents = parse_mapping(rows.map), max_seq_length, rows.documents
        self.counts = Counts()
        self.formats: dict[str, str] = {}
        self.skipped: list[str] = []
        self.placeholder = ""
        self._left: SampleIds | None = ([], [])  # of a text that goes on in the next row; None: it was refused
        self._hashes: list[object] = [prompts.tokenizer.hash, prompts.template, max_seq_length, mask_prompt, self.skip, self.mapping]
        self._hashes += [rows.documents] if rows.documents != "file" else []
        self._hashes += [for_tools] if (for_tools := prompts.tool_template) else []
        self._fixed, self.keep = list(self._hashes), rows.cache

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._hashes, sort_keys=True).encode()).hexdigest()

    def nothing_left(self, data: Sequence[str]) -> UserError:
        counts = self.counts
        if counts.nothing_graded:
            return UserError(
                f"nothing to train on: of {counted(counts.rows, 'row')}, {counted(counts.nothing_graded, 'has', 'have')} no graded token "
                f"within {counted(self.max_seq_length, 'token')} and {counted(counts.skipped, 'was', 'were')} skipped",
                where=", ".join(data),
                hint="raise --train.max_seq_length",
            )
        if not counts.rows:
            return UserError("nothing to train on: no rows", where=", ".join(data), hint="a table has a row below its columns' names")
        all_of_them = "the only row was" if counts.skipped == 1 else f"all {counts.skipped:,} rows were"
        return UserError(f"nothing to train on: {all_of_them} skipped", where=", ".join(data), context=self.skipped[:3])

    def _bad(self, error: UserError) -> None:
        if not self.skip:
            hint = error.hint or "--rows.on_error skip trains without such rows"
            raise UserError(error.what, where=error.where, context=error.context, hint=hint) from error
        self.counts.skipped += 1
        self.skipped.append(str(error))

    def samples_of(self, file: DataFile, weight: float) -> Stored:
        """The samples of one file; those of a large one on disk, from an earlier run where nothing has changed."""
        digest = file.sha256()
        self._hashes.append([digest, file.kind, weight])
        if file.size < LARGE:
            return store(self._made(file), file.name)
        before, first = asdict(self.counts), self.placeholder
        skipped = len(self.skipped)
        tokenizer = self.prompts.tokenizer
        fixed = [FORMAT, __version__, self._fixed, digest, file.kind, min(tokenizer.rows, tokenizer.size)]
        key = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()

        def make() -> Iterator[Made]:
            """From the file's beginning: what an attempt counted that could not be written to the end is forgotten."""
            self.counts, self._left, self.placeholder = Counts(**before), ([], []), ""
            del self.skipped[skipped:]
            return self._made(file)

        def about() -> dict[str, Any] | None:
            """What has to be known again; None where rows were skipped, for these are listed by their places."""
            now = {name: value - before[name] for name, value in asdict(self.counts).items()}
            place = self.placeholder.removeprefix(file.name)  # the file may have another name when it is found
            return None if now["skipped"] else {"format": self.formats.get(file.name, ""), "counts": now, "placeholder": place}

        stored, said = store_on_disk(key, file.name, make, about, self.keep)
        if said is not None:
            self.formats[file.name] = said["format"]
            self.counts = Counts(**{name: before[name] + value for name, value in said["counts"].items()})
            self.placeholder = said["placeholder"] and file.name + said["placeholder"]
        self.placeholder = first or self.placeholder
        return stored

    def _made(self, file: DataFile) -> Iterator[Made]:
        """The samples of one file, each with its row's group."""
        return (made for chunk in _chunks(self._parsed(file)) for made in self._tokenized(chunk))

    def _parsed(self, file: DataFile) -> Iterator[tuple[Row, list[Message] | Text]]:
        form = None

        def bad_line(error: UserError) -> None:
            self.counts.rows += 1
            self._bad(error)

        for row in rows_of(file, bad_line if self.skip else None, self.documents):
            self.counts.rows += row.begins  # a long text comes in several pieces
            try:
                form = form or format_of(row, self.mapping)
                self.formats[file.name] = form
                value = to_messages(row, self.mapping, form)
                self._look_for_placeholders(row, value)
                yield row, value
            except UserError as error:
                self._bad(error)

    def _look_for_placeholders(self, row: Row, value: list[Message] | Text) -> None:
        said = [] if isinstance(value, Text) else texts(value)
        if found := next(filter(None, map(PLACEHOLDER.search, said)), None):
            self.counts.placeholders += 1
            self.placeholder = self.placeholder or f"{row.where}: {found[0]}"

    def _tokenized(self, chunk: Sequence[tuple[Row, list[Message] | Text]]) -> Iterator[Made]:
        conversations = [value for _, value in chunk if not isinstance(value, Text)]
        answers = iter(self.prompts.batch_samples_ids(conversations))
        plain = [value for _, value in chunk if isinstance(value, Text)]
        texts = iter(self.prompts.batch_text_sample_ids([text.text for text in plain], [(text.begins, text.ends) for text in plain]))
        for row, value in chunk:
            if isinstance(value, Text):
                yield from self._pieces(row, next(texts))
                continue
            made = next(answers)
            if isinstance(made, UserError):
                self._bad(UserError(made.what, where=row.where, context=made.context, hint=made.hint))
            else:
                group = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
                yield from ((sample, group) for ids in made for sample in self._fitted(row, ids))

    def _pieces(self, row: Row, made: SampleIds | UserError) -> Iterator[Made]:
        """A text in pieces of max_seq_length tokens; each token but the first is predicted once.

        What is left of a text that goes on is kept for the next of its rows; of one that is refused nothing more is learnt.
        """
        left = ([], []) if row.begins else self._left
        if left is None:
            return
        if isinstance(made, UserError):
            self._left = None
            self._bad(UserError(made.what, where=row.where, hint=made.hint))
            return
        ids, graded = left[0] + made[0], left[1] + made[1]
        step, start = self.max_seq_length, 0
        while start < max(len(ids) - 1, 1) and (row.ends or start + step + 1 <= len(ids)):
            for sample in self._fitted(row, (ids[start : start + step + 1], graded[start : start + step + 1])):
                yield sample, hashlib.sha256(sample.tokens.tobytes()).hexdigest()
            start += step
        self._left = (ids[start:], graded[start:])

    def _fitted(self, row: Row, made: SampleIds) -> Iterator[Sample]:
        """The sample, cut to max_seq_length; none where nothing graded is left."""
        ids, graded = np.asarray(made[0], dtype=np.int32), np.asarray(made[1], dtype=bool)
        if not self.mask_prompt:
            graded = np.ones_like(graded)
        if len(ids) > self.max_seq_length + 1:
            self.counts.truncated += 1
            ids, graded = ids[: self.max_seq_length + 1], graded[: self.max_seq_length + 1]
        targets = np.where(graded[1:], ids[1:], np.int32(IGNORE))
        if not graded[1:].any():
            self.counts.nothing_graded += 1
            return
        yield Sample(ids[:-1], targets, row.where)


def _chunks(rows: Iterator[tuple[Row, list[Message] | Text]]) -> Iterator[list[tuple[Row, list[Message] | Text]]]:
    """The rows, some at a time: what is tokenized together has to fit into memory together."""
    chunk, size = [], 0
    for row, value in rows:
        chunk.append((row, value))
        size += len(value.text) if isinstance(value, Text) else sum(map(len, texts(value)))
        if len(chunk) >= AT_ONCE or size >= CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
