"""`litlora extend_vocab`: a base whose tokenizer knows more tokens, learnt from text or taken from another tokenizer."""

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.reading import sha256
from litlora.checkpoint.resolve import resolve
from litlora.console import Progress, counted, header, put, say, warn
from litlora.data.samples import texts_of
from litlora.errors import UserError
from litlora.options import ExtendVocab
from litlora.vocabulary import (
    Plan,
    Vocabulary,
    extend,
    first_lines,
    learn,
    lines_of,
    prepare,
    split_off_tail,
    take,
    tokens_per_character,
)

BIG = 256 * 2**20  # bytes of a base from which on a progress line is worth it
MB = 10**6


def extend_vocab(options: ExtendVocab) -> None:
    """Extend the base that `options` names; the result's path goes to standard output. UserError, WorkError: nothing was written."""
    refuse_odd_words(options)
    plan = prepare(resolve(options.checkpoint_dir or names.DEMO), Path(options.out_dir))
    vocabulary = plan.vocabulary
    room = wanted(options, vocabulary)
    lines = lines_of(texts_of(options.data, options.rows))
    text, tail = split_off_tail(lines)
    place = "the last lines of the data, from which nothing was learnt"
    if options.eval_data:
        tail, place = first_lines(lines_of(texts_of(options.eval_data, options.rows))), ", ".join(options.eval_data)
    elif not tail:
        tail, place = first_lines(text), "the text that they were learnt from: it is too short to keep some of it apart"
    origin = f"those of {options.tokenizer_dir}"
    if options.data:
        origin = f"learnt from {sum(map(len, text)):,} of {sum(map(len, lines)):,} characters in {', '.join(options.data)}"
    header(
        [
            ("base", f"{plan.base.typed}, {plan.base_bytes / MB:,.0f} MB, {vocabulary.base_size:,} tokens ({vocabulary.kind})"),
            ("tokens", origin),
            ("result", str(plan.out_dir)),
        ]
    )
    if options.tokenizer_dir is not None:
        other = Vocabulary(Path(options.tokenizer_dir))
        take(vocabulary, other, room)
        source: dict[str, Any] = {"tokenizer": str(other.path.resolve()), "sha256": sha256(other.path)}
    else:
        assert room is not None
        learn(vocabulary, text, room)
        source = {"data": options.data, "characters": sum(map(len, text)), "sha256": hashlib.sha256("".join(text).encode()).hexdigest()}
    measured = measure(vocabulary, tail, place) if tail else None
    bar = Progress(round(plan.base_bytes / MB), "MB", quiet=plan.base_bytes < BIG)
    report = extend(plan, source=source, measured=measured, progress=lambda done: bar.update(round(done / MB)))
    bar.close()
    tell(options, plan, report, room)
    put(plan.out_dir)


def refuse_odd_words(options: ExtendVocab) -> None:
    if bool(options.data) == (options.tokenizer_dir is not None):
        what = "--data and --tokenizer_dir are two ways to get tokens" if options.data else "there is nothing to get new tokens from"
        raise UserError(what, hint="give one of them: --data FILE --vocab_size N, or --tokenizer_dir DIR")
    if options.data and options.vocab_size is None:
        raise UserError("how many tokens are to be learnt?", where="--vocab_size", hint="--vocab_size N, the base's own among them")


def wanted(options: ExtendVocab, vocabulary: Vocabulary) -> int | None:
    """How many tokens to add, at most. None: all there are."""
    if options.vocab_size is None:
        return None
    if options.vocab_size <= vocabulary.size:
        what = f"the base has {vocabulary.size:,} tokens already"
        raise UserError(what, where=f"--vocab_size {options.vocab_size}", hint="it counts the base's tokens too: give a larger one")
    return options.vocab_size - vocabulary.size


def measure(vocabulary: Vocabulary, lines: Sequence[str], place: str) -> dict[str, Any]:
    """Tokens per character with the base's tokenizer and with the new one."""
    found = {"before": vocabulary.original, "after": vocabulary.tokenizer()}
    shares = {moment: round(tokens_per_character(tokenizer, lines), 4) for moment, tokenizer in found.items()}
    return {**shares, "measured_on": place, "characters": sum(map(len, lines))}


def tell(options: ExtendVocab, plan: Plan, report: dict[str, Any], room: int | None) -> None:
    """What came of it, and what to type next."""
    tokens, rows, measured = report["tokens"], report["rows"], report["tokens_per_character"]
    added = tokens["after"] - tokens["before"]
    if room is not None and added < room:
        why = "there are no others" if options.tokenizer_dir else "no other character or pair is in the text twice"
        warn(f"{counted(added, 'token was', 'tokens were')} added, not {room:,}: {why}")
    if tokens["left_out"]:
        say(f"{counted(tokens['left_out'], 'token was', 'tokens were')} left out: as the base cuts text, none would ever be used")
    learnt = f"{counted(tokens['characters'], 'character')}, {tokens['merged']:,} made by merges"
    say(f"{tokens['before']:,} tokens became {tokens['after']:,}: {learnt}")
    spare = f", of which {rows['spare_used']:,} were spare" if rows["spare_used"] else ""
    are = "is the mean" if added == 1 else "are means"
    say(f"{counted(added, 'row')} of {' and '.join(rows['tensors'])} {are} of the pieces' rows{spare}; every other tensor is the base's")
    if measured:
        say(f"tokens per character: {measured['before']:.3f} before, {measured['after']:.3f} now, on {measured['measured_on']}")
    modules = "embed_tokens" if plan.base.config().tie_word_embeddings else "embed_tokens lm_head"
    data = " ".join(map(shlex.quote, options.data)) or "FILE"
    say("the new rows know nothing yet of how their tokens are used; train them, and the blocks with them, on text:")
    say(f"next: litlora finetune lora {shlex.quote(str(plan.out_dir))} --data {data} --lora.modules_to_save {modules}")
