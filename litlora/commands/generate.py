"""`litlora generate`: answer one prompt as a stream, or many side by side. Answers go to standard output, the rest to standard error.

`open_model` is how every command that talks to a model gets it: resolve, refuse early, load, put run-time adapters on.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litlora.checkpoint.card import typed
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.files import open_prompts
from litlora.checkpoint.resolve import resolve
from litlora.console import counted, put, put_json, put_words, say, style
from litlora.errors import UserError
from litlora.importing import import_whole
from litlora.options import ComputeOptions, Generate, SamplingOptions
from litlora.parsing import check_ranges
from litlora.prompts import Prompts

if TYPE_CHECKING:  # torch takes two seconds: what can be refused is refused first
    from litlora.generation import Answer, Conversation
    from litlora.model import GPT

AT_ONCE = 32  # prompts of a file that are answered before the first of them is printed

Message = dict[str, Any]


def generate(options: Generate) -> None:
    questions = read_questions(options)
    opened = open_model(options, options.checkpoint_dir, options.base_dir, options.adapter, options.chat_template, options.quantize)
    prompts = [question.prompt_ids(opened.prompts) for question in questions]
    check_room(questions, prompts, opened.model.config.max_position_embeddings)
    if options.prompt is None and options.prompts is not None:
        many(options, opened, questions, prompts)
        return
    conversation = opened.conversation()
    answer = conversation.ask(prompts[0], options, continues=questions[0].raw)
    for piece in answer:
        if not options.json:
            put_words(piece, end="")
    if options.json:
        put_json(values(questions[0], answer))
    else:
        put()
    template = "" if questions[0].raw else f" · template {opened.prompts.template_name}"
    say(style(stats(answer, conversation.context) + template, "dim"))


def many(options: Generate, opened: "Opened", questions: "Sequence[Question]", prompts: Sequence[list[int]]) -> None:
    """Answers in the order of the questions, printed as they are ready."""
    import time

    from litlora.generation import generate_batch
    from litlora.prompts.channels import channels_of

    began, tokens, tokenizer, stop_ids = time.perf_counter(), 0, opened.prompts.tokenizer, opened.prompts.stop_ids
    about: dict[str, Any] = {"continues": questions[0].raw, "channels": channels_of(opened.prompts)}
    for start in range(0, len(prompts), AT_ONCE):
        asked = questions[start : start + AT_ONCE]
        answers = generate_batch(opened.model, tokenizer, stop_ids, prompts[start : start + AT_ONCE], options, **about)
        for question, answer in zip(asked, answers, strict=True):
            if options.json:
                put_json(values(question, answer))
            else:
                put_words(answer.text)
            tokens += len(answer.ids)
    seconds = time.perf_counter() - began
    say(style(f"{counted(len(prompts), 'answer')} · {counted(tokens, 'token')} · {tokens / seconds:.0f} tok/s", "dim"))


def values(question: "Question", answer: "Answer") -> dict[str, Any]:
    row = {"prompt": question.asked, "text": answer.text, "finish_reason": answer.finish_reason}
    return row | {"prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.ids)}


def stats(answer: "Answer", context: int) -> str:
    """`84 tokens · 30 looked up · 41 tok/s · first token 0.21 s · context 312/2048`"""
    parts = [counted(len(answer.ids), "token"), *([f"{answer.looked_up} looked up"] if answer.sampling.prompt_lookup else [])]
    parts += [f"{answer.tokens_per_second:.0f} tok/s", f"first token {answer.first_token_seconds:.2f} s"]
    parts.append(f"context {answer.prompt_tokens + len(answer.ids)}/{context}")
    return " · ".join(parts)


# ---- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One prompt: a conversation to answer, or (raw) a text to go on with."""

    where: str  # for messages to the user
    asked: str  # the text as it was given: the last message of a conversation
    messages: Sequence[Message]
    raw: bool

    def prompt_ids(self, prompts: Prompts) -> list[int]:
        try:
            if self.raw:
                return prompts.text_ids(self.asked)
            prompts.refuse_tools_unseen(self.messages)
            return prompts.prompt_ids(self.messages)
        except UserError as error:
            raise UserError(error.what, where=error.where or self.where, context=error.context, hint=error.hint) from error


def read_questions(options: Generate) -> list[Question]:
    """From --prompt, else the file of --prompts, else standard input, which is one prompt."""
    if options.prompt is not None and options.prompts is not None:
        raise UserError("--prompt and --prompts cannot be used together", hint="put the prompt into the file, as one more line")
    if options.raw and options.system is not None:
        raise UserError("--system needs the chat template that --raw leaves out", hint="put the text in front of the prompt yourself")
    if options.raw and options.chat_template is not None:
        raise UserError("--raw takes no chat template", where="--chat_template", hint="leave one of the two out")
    if options.prompts is not None:
        questions = list(questions_of(Path(options.prompts), options))
        if not questions:
            raise UserError("there is no prompt in this file", where=options.prompts, hint="one prompt per line, or rows as for training")
        return questions
    if options.prompt is not None:
        if not options.prompt.strip() and not options.raw:  # a variable that was never set
            raise UserError("is empty", where="--prompt", hint="say something; with --raw the model begins a text of its own")
        return [asked("--prompt", options.prompt, options)]
    try:
        text = "" if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason} at byte {error.start})", where="standard input") from None
    if not text.strip():  # a script, or whoever started it, has nothing there: that is no question
        hint = 'give one with --prompt "..." or --prompts FILE, or pipe it in; litlora chat is for talking'
        raise UserError("there is no prompt", hint=hint)
    return [asked("standard input", text, options)]


def questions_of(path: Path, options: Generate) -> Iterator[Question]:
    """A line of a text file is a prompt; of a row as for training, what comes before its last answer is, if it has one."""
    from litlora.data.formats import Text, to_messages
    from litlora.data.rows import KINDS, Row, read_rows

    if KINDS.get(path.suffix.lower(), "text") == "text":
        lines = enumerate(read_text(path).split("\n"), 1)
        yield from (asked(f"{path}:{number}", line.rstrip("\r"), options) for number, line in lines if line.strip())
        return
    for row in read_rows(path):
        messages = to_messages(Row(with_some_answer(row.value), row.where))
        if isinstance(messages, Text):
            yield asked(row.where, messages.text, options)
            continue
        last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
        if last == 0:
            raise UserError("there is nothing before the answer", where=row.where)
        yield Question(row.where, messages[last - 1]["content"], with_system(messages[:last], options.system), options.raw)


def with_some_answer(row: Any) -> Any:
    """A row that asks without an answer, with one, so that it is read like those for training."""
    from litlora.data.formats import ANSWERS, FORMATS, ROLES, parsed

    if not isinstance(row, dict):
        return row
    for key in (*FORMATS["messages"].needs["messages"], *FORMATS["sharegpt"].needs["conversations"]):
        listed = row.get(key)
        with suppress(UserError):  # what is no JSON is refused by its place, later
            listed = parsed(listed, key)  # in a table it is text
        if isinstance(listed, list) and listed and isinstance(last := listed[-1], dict):
            role, said = ("from", "value") if "from" in last and "role" not in last else ("role", "content")
            answers = ROLES.get(str(last.get(role))) == "assistant"
            if not answers or not (last.get(said) or last.get("tool_calls")):
                return {**row, key: [*(listed[:-1] if answers else listed), {role: "assistant", said: "-"}]}
            return row
    asks = ("instruction", *FORMATS["completion"].needs["prompt"])
    given = [row[key] for key in (*ANSWERS, "solution") if key in row]
    if any(key in row for key in asks) and (given or "text" not in row) and not any(given):
        return {**row, "output" if "instruction" in row else "completion": "-"}
    return row


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason} at byte {error.start})", where=path, hint="save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path, hint="--prompts takes a file") from None


def asked(where: str, text: str, options: Generate) -> Question:
    try:
        text.encode()
    except UnicodeEncodeError:  # Python hides bytes that are no text in half characters
        raise UserError("not UTF-8 text", where=where) from None
    return Question(where, text, with_system([{"role": "user", "content": text}], options.system), options.raw)


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages under another system prompt; None keeps theirs."""
    if system is None:
        return list(messages)
    tools = [message for message in messages if message["role"] == "tools"]
    return [*tools, {"role": "system", "content": system}, *(m for m in messages if m["role"] not in ("system", "tools"))]


def check_room(questions: Sequence[Question], prompts: Sequence[Sequence[int]], context: int) -> None:
    """Refuse a prompt that does not fit, by its place, before anything is computed or allocated."""
    from litlora.generation import room

    for question, ids in zip(questions, prompts, strict=True):
        try:
            room(len(ids), context)
        except UserError as error:
            raise UserError(error.what, where=question.where, hint=error.hint) from None


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass
class Opened:
    """A model that is ready to talk, and where it came from."""

    checkpoint: Checkpoint  # what was asked for
    on: list[tuple[Checkpoint, float]]  # the adapters on it, with their weights; a step's own is one
    model: "GPT"
    prompts: Prompts
    chat_template: str | None = None  # what --chat_template said: it stays when the adapters change
    quantize: str = "none"  # in which few bits the base's weights are held
    loaded: Any = None  # the base's Snapshot before adapters were switched

    @property
    def base(self) -> Checkpoint:
        return self.checkpoint.base()

    def conversation(self) -> "Conversation":
        """A new one, with the tokenizer and the template in use."""
        return conversation_with(self.model, self.prompts)


def conversation_with(model: "GPT", prompts: Prompts) -> "Conversation":
    from litlora.generation import Conversation
    from litlora.prompts.channels import channels_of

    return Conversation(model, prompts.tokenizer, prompts.stop_ids, channels_of(prompts))


def open_model(
    options: ComputeOptions,
    path: str | None,
    base_dir: str | None,
    adapters: Sequence[str],
    chat_template: str | None = None,
    quantize: str = "none",
    *,
    answers: bool = True,
) -> Opened:
    """Load what a command names. What can be refused without torch is refused before it is imported.

    `quantize`: as it was typed. `answers`: it is to say tokens a few at a time.
    """
    checkpoint = resolve(path, base_dir=base_dir)
    added = [(open_adapter(name, checkpoint.base()), weight) for name, weight in map(split_weight, adapters)]
    on = [*([] if checkpoint.is_model else [(checkpoint, 1.0)]), *added]
    prompts = prompts_for(checkpoint, on, chat_template)

    import_whole("torch")
    import torch

    from litlora.checkpoint.weights import for_answers, load_model, quantize_meant
    from litlora.precision import choose_dtype, device_of

    meant = quantize_meant(quantize, [adapter for adapter, _ in on])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = device_of(options.accelerator)
    dtype = choose_dtype(options.precision, device)
    as_stored = answers and for_answers(quantize, dtype, device.type)
    model = load_model(checkpoint, dtype=dtype, adapters=added, device=device, quantize=meant, as_stored=as_stored)
    return Opened(checkpoint, on, model.eval(), prompts, chat_template, meant)


def split_weight(word: str) -> tuple[str, float]:
    """PATH or PATH:WEIGHT; split at the last colon only where the whole is no path."""
    path, colon, weight = word.rpartition(":")
    if not colon or Path(word).exists():
        return word, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"'{word}' is no path, and '{weight}' is no weight", hint="an adapter is PATH or PATH:WEIGHT, as in out/step-200:0.5"
        )
    return path, value


def open_adapter(path: str | Path, base: Checkpoint) -> Checkpoint:
    """The adapter at `path`, once it is known to belong to `base` (by fingerprint, where it recorded one)."""
    adapter = resolve(path, base_dir=base.path)
    if adapter.is_model:
        raise UserError("is a whole model, not an adapter", where=adapter.typed, hint=f"litlora chat {typed(adapter.typed)} talks to it")
    adapter.base()
    return adapter


def prompts_for(checkpoint: Checkpoint, on: Sequence[tuple[Checkpoint, float]], chat_template: str | None = None) -> Prompts:
    """The tokenizer and the template that the first adapter was trained with, else the model's own; or the template of --chat_template."""
    return open_prompts(on[0][0] if on else checkpoint, chat_template)


def put_on(opened: Opened, adapters: Sequence[tuple[str, float]]) -> None:
    """Take every adapter off and put these on; the base stays loaded. After a UserError all is as it was."""
    from litlora.checkpoint.weights import put_on as add
    from litlora.methods.attach import put_back, remove, snapshot, widen

    wanted = [(open_adapter(path, opened.base), weight) for path, weight in adapters]
    prompts, model = prompts_for(opened.base, wanted, opened.chat_template), opened.model
    before, plain = snapshot(model), model.plain
    try:
        remove(model)
        opened.loaded = opened.loaded or snapshot(model)
        put_back(model, opened.loaded)  # also what an adapter before these needed wide
        widen(model, [name for adapter, _ in wanted for name in adapter.tuning().looked_at])
        model.plain = None
        for adapter, weight in wanted:
            add(model, adapter, weight)
    except BaseException:
        put_back(model, before)
        model.plain = plain
        raise
    opened.on, opened.prompts = wanted, prompts


# ---- the Python API --------------------------------------------------------------------------------------------------


def answer_once(
    model: "GPT",
    prompt: str | Sequence[Mapping[str, Any]],
    adapter: tuple[str | Path, float] | None,
    sampling: SamplingOptions,
    *,
    system: str | None,
    raw: bool,
) -> str:
    """What `litlora.generate` does (see there)."""
    from litlora.checkpoint.weights import put_on as add
    from litlora.methods.attach import restored

    check_ranges(sampling)
    checkpoint = model.checkpoint
    if not isinstance(checkpoint, Checkpoint):
        raise UserError(
            "this model was not loaded from a directory, so it has no tokenizer", hint="use GPT.from_pretrained or litlora.load"
        )
    if raw and not isinstance(prompt, str):
        raise UserError("raw goes on with a text, and messages need the chat template", hint="leave raw out")
    added = None if adapter is None else open_adapter(adapter[0], checkpoint.base())
    on = [] if checkpoint.is_model else [(checkpoint, 1.0)]
    prompts = prompts_for(checkpoint, on if added is None else [*on, (added, 1.0)])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
    question = Question("prompt", prompt if isinstance(prompt, str) else "", with_system(messages, system), raw)
    training = model.training
    try:
        with restored(model):
            if added is not None and adapter is not None:
                add(model, added, adapter[1])
            conversation = conversation_with(model.eval(), prompts)
            return conversation.ask(question.prompt_ids(prompts), sampling, continues=raw).all()
    finally:
        model.train(training)
