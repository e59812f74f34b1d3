"""`litlora data inspect FILE` and `litlora data validate FILE`: what rows hold and what is wrong with them, before any training."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np

from litlora.checkpoint.files import open_prompts
from litlora.checkpoint.resolve import demo_base, resolve
from litlora.console import counted, header, put, put_json, show
from litlora.data.formats import NOT_LEARNT, Message, Pair, Text, Verdict, format_of, parse_mapping, read_row, unread
from litlora.data.places import Row
from litlora.data.rows import DataFile, rows_of
from litlora.data.samples import DataSet, files_of, load_data, marked, warn_of_placeholders
from litlora.errors import UserError, WorkError, printable
from litlora.options import InspectData, ValidateData
from litlora.prompts import Prompts

AT_ONCE = 256  # conversations that a template is tried on together


def data(options: InspectData | ValidateData) -> None:
    """Look at rows; what is found goes to standard output. WorkError where `validate` found a row that cannot be used."""
    if isinstance(options, ValidateData):
        validate(options)
    else:
        inspect(options)


# ---- inspect ---------------------------------------------------------------------------------------------------------


def inspect(options: InspectData) -> None:
    """Formats, lengths and the graded share of the samples that fine-tuning would make, and some of them as text."""
    checkpoint = resolve(options.checkpoint_dir, base_dir=options.base_dir) if options.checkpoint_dir else demo_base()
    prompts = open_prompts(checkpoint, options.chat_template)
    judged = [file for file in files_of(options.data) if kind_of(file, options) in NOT_LEARNT]
    if judged:
        hint = f"litlora data validate {judged[0].name} checks them as they are"
        raise UserError("rows that judge answers are recognised, and not learnt by fine-tuning", where=judged[0].name, hint=hint)
    context = checkpoint.base().config().max_position_embeddings
    longest = min(options.max_seq_length or context, context)
    found = load_data(options.data, prompts, rows=options.rows, max_seq_length=longest, mask_prompt=options.mask_prompt)
    warn_of_placeholders(found)
    read = [file for file in files_of(options.data) if file.name in found.formats]  # of another all rows are skipped
    left = sorted({name for file in read for name in unread_in(file, options, found.formats[file.name])})
    samples = [*found.train, *found.validation]
    if options.json:
        shown = [{"where": sample.where, "text": marked(sample, prompts)} for sample in samples[: options.number]]
        put_json({**figures(found), "unread": left, "template": prompts.template_name, "shown": shown})
        return
    header([("model", str(checkpoint.path)), ("template", prompts.template_name)])
    for name, value in [*lines(found), *([("unread", ", ".join(left))] if left else [])]:
        show(f"{name:<9}{printable(value)}")
    for sample in samples[: options.number]:
        show(f"--- {sample.where}: {counted(len(sample.tokens), 'token')}, {sample.graded} graded\n{marked(sample, prompts)}")


def kind_of(file: DataFile, options: InspectData) -> str:
    """The format of the first row that has one; "" where none has."""
    for row in rows_of(file, (lambda error: None) if options.rows.on_error == "skip" else None, options.rows.documents):
        try:
            return format_of(row, parse_mapping(options.rows.map))
        except UserError:
            if options.rows.on_error == "stop":
                raise
    return ""


def unread_in(file: DataFile, options: InspectData, form: str) -> list[str]:
    """The fields of a file's first rows that no sample is made of: one that matters may have another name than a format knows."""
    names: dict[str, None] = {}
    for row in islice(rows_of(file, lambda error: None, options.rows.documents), AT_ONCE):
        try:
            names |= dict.fromkeys(unread(row, parse_mapping(options.rows.map), form))
        except UserError:  # a row that is skipped
            continue
    return sorted(names)


def figures(found: DataSet) -> dict[str, Any]:
    """Counts, and the lengths in tokens that half, nine tenths, 99 in a hundred and all samples stay within."""
    samples = [*found.train, *found.validation]
    lengths = np.array([len(sample.tokens) for sample in samples])
    graded = np.array([sample.graded for sample in samples])
    rows = sum(1 for _ in groupby(zip((sample.where for sample in found.train), found.groups, strict=True)))  # a row may be several samples
    return {
        "files": found.formats,
        **asdict(found.counts),
        "samples": len(found.train),
        "validation": len(found.validation),
        "doubles": rows - len(set(found.groups)),
        "tokens": int(lengths.sum()),
        "graded": int(graded.sum()),
        "lengths": {"shortest": int(lengths.min()), **quantiles(lengths)},
        "graded_lengths": {"shortest": int(graded.min()), **quantiles(graded)},
    }


def quantiles(numbers: np.ndarray) -> dict[str, int]:
    values = np.quantile(numbers, [0.5, 0.9, 0.99, 1.0], method="higher")
    return dict(zip(("median", "90%", "99%", "longest"), map(int, values), strict=True))


def lines(found: DataSet) -> list[tuple[str, str]]:
    """The same for people."""
    values = figures(found)
    left_out = {
        ("row skipped", "rows skipped"): found.counts.skipped,
        ("cut to length",) * 2: found.counts.truncated,
        ("without a graded token",) * 2: found.counts.nothing_graded,
        ("double of another", "doubles of another"): values["doubles"],
    }
    said = [counted(count, *words) for words, count in left_out.items() if count]
    return [
        *(("file", f"{name} · {form}") for name, form in found.formats.items()),
        ("rows", " · ".join([f"{found.counts.rows:,}", *said])),
        ("samples", f"{values['samples']:,}" + (f" + {values['validation']:,} validation" if values["validation"] else "")),
        ("tokens", f"{values['tokens']:,} · {values['graded'] / values['tokens']:.1%} graded"),
        ("lengths", spread(values["lengths"])),
        ("answers", spread(values["graded_lengths"])),
    ]


def spread(values: Mapping[str, int]) -> str:
    return " · ".join(f"{name} {value:,}" for name, value in values.items()) + " tokens"


# ---- validate --------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What was found in one file."""

    file: str
    format: str = ""
    rows: int = 0
    refused: list[str] = field(default_factory=list)  # file:line:column: reason

    def bad(self, error: UserError, counted: bool = False) -> None:
        self.rows += not counted
        self.refused.append(str(error))


def validate(options: ValidateData) -> None:
    """Read every row of every file as fine-tuning would, and go on behind each one that cannot be used."""
    prompts = None
    if options.checkpoint_dir is not None or options.chat_template is not None:
        checkpoint = resolve(options.checkpoint_dir, base_dir=options.base_dir) if options.checkpoint_dir else demo_base()
        prompts = open_prompts(checkpoint, options.chat_template)
    reports = [validated(file, options, prompts) for file in files_of(options.data)]
    refused = [reason for report in reports for reason in report.refused]
    if options.json:
        put_json([asdict(report) for report in reports])
    else:
        for reason in refused[: options.show or None]:
            show(printable(reason))
        if 0 < options.show < len(refused):
            put(f"... and {len(refused) - options.show:,} more (--show 0 prints all)")
        for report in reports:
            note = " (not learnt by fine-tuning)" if report.format in NOT_LEARNT else ""
            kind = report.format or "no known format"
            show(f"{printable(report.file)} · {kind}{note} · {counted(report.rows, 'row')}, {len(report.refused):,} refused")
    if refused:
        rows = sum(report.rows for report in reports)
        hint = "--rows.on_error skip trains without them" if len(refused) < rows else ""
        raise WorkError(f"{len(refused):,} of {counted(rows, 'row')} cannot be used", where=", ".join(options.data), hint=hint)


def validated(file: DataFile, options: ValidateData, prompts: Prompts | None) -> Report:
    report, mapping = Report(file.name), parse_mapping(options.rows.map)
    waiting: list[tuple[Row, list[Message]]] = []
    spoilt = False  # what a long text begins with
    try:
        for row in rows_of(file, report.bad, options.rows.documents):
            report.rows += row.begins  # a long text comes in several pieces
            try:
                report.format = report.format or format_of(row, mapping)
                value = read_row(row, mapping, report.format)
                waiting += [(row, messages) for messages in conversations(value)]
                spoilt = spoilt and not row.begins
                if prompts is not None and isinstance(value, Text) and not spoilt:
                    spoilt = not try_text(row, value, prompts, report)
            except UserError as error:
                report.bad(error, counted=True)
            if prompts is None:
                waiting = []
            elif len(waiting) >= AT_ONCE:
                try_template(waiting, prompts, report)
                waiting = []
    except UserError as error:  # what follows cannot be told apart: an array with a mistake, a file of another kind
        report.bad(error)
    if prompts is not None:
        try_template(waiting, prompts, report)
    return report


def conversations(value: list[Message] | Text | Pair | Verdict) -> list[list[Message]]:
    if isinstance(value, Pair):
        return [value.chosen, value.rejected]
    return [value.messages] if isinstance(value, Verdict) else [] if isinstance(value, Text) else [value]


def try_template(waiting: Sequence[tuple[Row, list[Message]]], prompts: Prompts, report: Report) -> None:
    """Refuses the rows whose messages the chat template cannot show, or the model has no row of its embedding for."""
    made = prompts.batch_samples_ids([messages for _, messages in waiting])
    for place, results in groupby(zip(waiting, made, strict=True), lambda one: one[0][0].where):  # a preference is two conversations
        if (refused := next((result for _, result in results if isinstance(result, UserError)), None)) is not None:
            report.bad(UserError(refused.what, where=place), counted=True)


def try_text(row: Row, text: Text, prompts: Prompts, report: Report) -> bool:
    """Whether the model knows all of its tokens; else it is refused."""
    (made,) = prompts.batch_text_sample_ids([text.text], [(text.begins, text.ends)])
    if isinstance(made, UserError):
        report.bad(UserError(made.what, where=row.where), counted=True)
    return not isinstance(made, UserError)
