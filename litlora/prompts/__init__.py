"""Messages to token ids, and which of them an answer is graded on. One path for training, generate and chat.

The text is the chat template's (`sandbox.py` runs it); here it becomes ids, and here the answers are found in it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from litlora.errors import UserError
from litlora.prompts.sandbox import compile_template, render
from litlora.tokenizer import Tokenizer
from litlora.tokenizer.templates import read_template

# role, content, and weight: 0 where an answer is not to be graded; tool_calls; THOUGHT. One with the role `tools` lists what may be called.
Message = Mapping[str, Any]
Messages = Sequence[Message]
SampleIds = tuple[list[int], list[bool]]  # the ids, and which of them are graded

ALPACA = """\
{%- for message in messages %}
    {%- if not loop.first %}{{ "\\n\\n" }}{% endif %}
    {%- if message.role == "system" %}
        {{- message.content }}
    {%- elif message.role == "assistant" %}
        {{- "### Response:\\n" + message.content + EOS }}
    {%- else %}
        {{- "### Instruction:\\n" + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "\\n\\n### Response:\\n" }}{% endif %}
"""  # EOS stands for the end token: see `alpaca`
BUILT_IN = "alpaca"  # the name of the one above
THOUGHT = ("reasoning_content", "thinking")  # what is thought before an answer, as templates call it: Qwen's and DeepSeek's, gpt-oss's
THINK_BEGIN, THINK_END = "<think>", "</think>"  # around it, where it is written into the answer
SHOWN = ("tool_calls", "tool_call_id", "name", *THOUGHT)  # of a message, beside role and content
MARKS = [chr(code) for code in (*range(0xFDD2, 0xFDF0), *range(0xE000, 0xF900))]  # noncharacters, then private use


class Prompts:
    """How one model is spoken to.

    template, template_name   the Jinja text in use, and where it is from
    tool_template             another one for conversations with tools, where the model has one
    stop_ids                  the ids that end an answer: the tokenizer's, and the template's end of a turn
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, name: str = "") -> None:
        """`template` None: the model's own, else the built-in Alpaca style."""
        self.tokenizer = tokenizer
        built_in = template is None and tokenizer.chat_template is None
        self.template = template or tokenizer.chat_template or alpaca(tokenizer)
        self.template_name = name or (
            f"{BUILT_IN} (built in)" if built_in else "the model's own" if template in (None, tokenizer.chat_template) else "given"
        )
        self._begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        self._values = dict(tokenizer.special_tokens)
        self._compiled = compile_template(self.template)
        default = tokenizer.chat_templates.get("default")
        self.tool_template = tokenizer.tool_template if self.template == default else None
        self._with_tools = compile_template(self.tool_template) if self.tool_template else self._compiled

    @classmethod
    def chosen(cls, tokenizer: Tokenizer, choice: str | None) -> "Prompts":
        """With the template of `--chat_template` (None: the model's own). UserError where there is none, or it is no template."""
        if choice is None:
            return cls(tokenizer)
        text, name = chosen_template(choice, tokenizer.chat_templates)
        try:
            return cls(tokenizer, alpaca(tokenizer) if text is None else text, name)
        except UserError as error:
            raise UserError(error.what, where=f"--chat_template {choice}", hint=error.hint) from error

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        return self.tokenizer.eos_ids | frozenset(self._end_of_turn)

    @property
    def template_hash(self) -> str:
        """sha256 of the template's text: what a manifest records."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    # ---- text --------------------------------------------------------------------------------------------------------

    def _render(self, messages: Messages, mark: str, *, ask: bool) -> str:
        """The template's text. With a mark, control strings in the messages carry it (see `Tokenizer.shield`)."""
        plain: list[dict[str, Any]] = []
        tools = None
        for message in messages:
            shown = {key: message[key] for key in ("role", "content", *SHOWN) if key in message}
            if mark:
                answer = message["role"] == "assistant"
                shown = {key: value if key == "role" else self._shielded(value, mark, answer) for key, value in shown.items()}
            if message["role"] == "tools":
                tools = shown["content"]
            else:
                plain.append(shown)
        compiled = self._with_tools if tools else self._compiled
        text = _whole(render(compiled, messages=plain, add_generation_prompt=ask, tools=tools, documents=None, **self._values))
        return text if ask else text.removesuffix(self._always_asks)

    def _shielded(self, value: Any, mark: str, answer: bool) -> Any:
        """The value with the mark in each control string of each text in it."""
        if isinstance(value, str):
            return self.tokenizer.shield(value, mark, answer=answer)
        if isinstance(value, Mapping):
            return {self._shielded(key, mark, answer): self._shielded(entry, mark, answer) for key, entry in value.items()}
        return [self._shielded(entry, mark, answer) for entry in value] if isinstance(value, list) else value

    def _mark_for(self, messages: Messages) -> str:
        """A character that occurs in none of the messages."""
        texts = [text for message in messages for text in _texts([message[key] for key in ("content", *SHOWN) if key in message])]
        return next(mark for mark in MARKS if not any(mark in text for text in (*texts, self.template)))

    # ---- ids ---------------------------------------------------------------------------------------------------------

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of the prompt, ready for an answer to follow; the same in training, generate and chat."""
        mark = self._mark_for(messages)
        ids = self.tokenizer.encode_batch([self._render(messages, mark, ask=True)], special=True, mark=mark)[0]
        self.tokenizer.refuse_beyond(ids)
        return ids

    def text_ids(self, text: str) -> list[int]:
        """A text to go on with: control strings in it are control tokens, and BOS stands before it once, where the model has one."""
        ids = self.tokenizer.encode(_whole(text), special=True)
        ids = ids if ids[:1] == self._begin else [*self._begin, *ids]
        self.tokenizer.refuse_beyond(ids)
        return ids

    def batch_text_sample_ids(
        self, texts: Sequence[str], borders: Sequence[tuple[bool, bool]] | None = None
    ) -> list[SampleIds | UserError]:
        """Plain texts to learn: BOS where the model has one, the text, EOS; all graded but the BOS. A refusal stands in its place.

        `borders`: of each text, whether a document begins and whether it ends with it; BOS and EOS stand there alone.
        """
        end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        samples: list[SampleIds | UserError] = []
        encoded = self.tokenizer.encode_batch(texts, special=False)
        for text, ids, (begins, ends) in zip(texts, encoded, borders or [(True, True)] * len(texts), strict=True):
            before = self._begin if begins else []
            inner = ids if begins else self.tokenizer.encode_after(text, special=False)
            after = end if ends else []
            made = [*before, *inner, *after], [False] * len(before) + [True] * (len(inner) + len(after))
            samples.append(self._refused([made]) or made)
        return samples

    def _refused(self, samples: Sequence[SampleIds]) -> UserError | None:
        """What is wrong with one of the samples, the end tokens that were put to them included."""
        try:
            for ids, _ in samples:
                self.tokenizer.refuse_beyond(ids)
        except UserError as error:
            return error
        return None

    def sample_ids(self, messages: Messages) -> SampleIds:
        """Ids of a conversation up to the end of its last answer, and which are graded: each answer with its end token.

        Raises UserError where the template cannot show a conversation as one sequence; `samples_ids` gives one for each answer.
        """
        samples = self.samples_ids(messages)
        if len(samples) > 1:
            raise UserError("this chat template writes earlier turns differently afterwards, so each answer is a sample of its own")
        return samples[0]

    def samples_ids(self, messages: Messages) -> list[SampleIds]:
        """`sample_ids`; one for each graded answer where the template rewrites earlier turns."""
        result = self.batch_samples_ids([messages])[0]
        if isinstance(result, UserError):
            raise result
        return result

    def batch_samples_ids(self, conversations: Sequence[Messages]) -> "list[list[SampleIds] | UserError]":
        """`samples_ids` of many conversations, tokenized together; a refusal stands in its place."""
        drafts: list[list[Draft] | UserError] = []
        for messages in conversations:
            try:
                drafts.append(self._drafts(messages))
            except UserError as error:
                drafts.append(error)
        flat = [draft for one in drafts if not isinstance(one, UserError) for draft in one]
        encoded = self._encode_drafts(flat)
        results: list[list[SampleIds] | UserError] = []
        for one in drafts:
            if isinstance(one, UserError):
                results.append(one)
            else:
                samples = [sample for _ in one for sample in next(encoded)]
                results.append(self._refused(samples) or samples)
        return results

    def _encode_drafts(self, drafts: "list[Draft]") -> Iterator[list[SampleIds]]:
        by_mark: dict[str, list[str]] = {}
        for draft in drafts:
            by_mark.setdefault(draft.mark, []).extend(draft.cuts())
        waiting = {mark: iter(self.tokenizer.encode_batch(texts, special=True, mark=mark)) for mark, texts in by_mark.items()}
        for draft in drafts:
            yield self._assemble(draft, [next(waiting[draft.mark]) for _ in draft.cuts()])

    def _assemble(self, draft: "Draft", prefixes: list[list[int]]) -> list[SampleIds]:
        """Ids of a draft from the ids of its prefixes (prompt, prompt with answer, next prompt, ...).

        Where a token would reach over the border between prompt and answer, the prompt keeps the ids that chat gives it
        and the answer is tokenized after it. With several answers, each is then a sample of its own.
        """
        whole = prefixes[-1]
        if any(whole[: len(prefix)] != prefix for prefix in prefixes):
            if len(draft.spans) > 1:
                return [self._after_prompt(draft, span, prefixes[2 * n]) for n, span in enumerate(draft.spans) if span.graded]
            return [self._after_prompt(draft, draft.spans[0], prefixes[0])]
        graded = [False] * len(whole)
        for n, span in enumerate(draft.spans):
            start, end = len(prefixes[2 * n]), len(prefixes[2 * n + 1])
            graded[start:end] = [span.graded] * (end - start)
        return [self._ended(whole, graded, draft.spans[-1])]

    def _after_prompt(self, draft: "Draft", span: "Span", prompt: list[int]) -> SampleIds:
        answer = self.tokenizer.encode_after(draft.text[span.start : span.end], special=True, mark=draft.mark)
        return self._ended(prompt + answer, [False] * len(prompt) + [span.graded] * len(answer), span)

    def _ended(self, ids: list[int], graded: list[bool], last: "Span") -> SampleIds:
        if last.has_end or self.tokenizer.eos_id is None:
            return ids, graded
        return [*ids, self.tokenizer.eos_id], [*graded, last.graded]

    # ---- where the answers are ---------------------------------------------------------------------------------------

    def _drafts(self, messages: Messages) -> "list[Draft]":
        """The text of each sample of a conversation, and the spans of its answers in it.

        An answer begins where the prompt that asks for it ends: both are rendered and compared.
        """
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise UserError("no answer to learn: there is no assistant message")
        messages = messages[: turns[-1] + 1]
        mark = self._mark_for(messages)
        self.refuse_tools_unseen(messages, mark)
        drafts = [self._draft_of_turn(messages[: n + 1], mark) for n in turns]
        whole = drafts[-1].text
        if all(whole.startswith(draft.text) for draft in drafts):
            spans = [draft.spans[0] for draft in drafts]
            for span in spans:
                if not span.has_end:
                    self._extend_to_end(span, whole)
            return [Draft(whole, mark, spans)]
        return [draft for draft in drafts if draft.spans[0].graded]

    def refuse_tools_unseen(self, messages: Messages, mark: str = "") -> None:
        """UserError where a conversation has tools that the template leaves out."""
        if (
            messages
            and messages[0]["role"] == "tools"
            and self._render(messages, mark, ask=False) == self._render(messages[1:], mark, ask=False)
        ):
            raise UserError("the row has tools, and the chat template does not show them", hint="take a base whose template knows tools")

    def _draft_of_turn(self, messages: Messages, mark: str) -> "Draft":
        """The text up to the last message's end, and that message's span."""
        prompt, full = self._render(messages[:-1], mark, ask=True), self._render(messages, mark, ask=False)
        graded = bool(messages[-1].get("weight", 1))
        content = self.tokenizer.shield(messages[-1]["content"] or "", mark, answer=True).strip()
        calls = bool(messages[-1].get("tool_calls"))
        if not full.startswith(prompt):
            full = prompt + self._answer_text(full, content, calls)
        if calls and not all(call["function"]["name"] in full[len(prompt) :] for call in messages[-1]["tool_calls"]):
            raise UserError("the chat template does not show the tool call of an answer", hint="take a base whose template knows tools")
        thought = self.tokenizer.shield(next((messages[-1][key] for key in THOUGHT if key in messages[-1]), ""), mark, answer=True)
        written = not thought and THINK_END in content
        if written and content not in full[len(prompt) :]:  # Qwen 3's sets other line breaks between the two
            thought, _, content = (part.strip() for part in content.rpartition(THINK_END))
            thought = thought.removeprefix(THINK_BEGIN)
        if thought.strip() not in full[len(prompt) :]:
            hint = "--chat_template takes another; or write it into the answer, as the base itself would"
            if written or self._cuts_thoughts:
                hint = "--chat_template takes one that shows it; or take it out of the row, and the answer alone is learnt"
            raise UserError("the chat template does not show the reasoning of an answer", hint=hint)
        endings = list(self.tokenizer.specials_in(full, len(prompt)))
        begins = [len(prompt), *(ending.end() for ending in endings)]
        if calls:  # a call may begin with a special token, as Mistral's does
            begins[:-1] = [len(prompt)] * len(endings)
        # The last that holds it: gpt-oss writes thoughts and channels before, in which the words of an answer may stand too.
        for begin, ending in zip(reversed(begins[:-1]), reversed(endings), strict=True):
            if content in full[begin : ending.start()]:
                return Draft(full[: ending.end()], mark, [Span(len(prompt), ending.end(), graded, True)])
        after = self._frame[1]
        end = len(full) - len(after) if full.endswith(content + after) else full.rfind(content, len(prompt)) + len(content)
        if end < len(prompt) + len(content):
            raise UserError("the chat template does not show the answer as it is written in the row", hint="--chat_template takes another")
        return Draft(full[:end], mark, [Span(len(prompt), end, graded, False)])

    def _answer_text(self, full: str, content: str, calls: bool) -> str:
        """What the template writes for an answer, where the row's prompt is written differently once it is answered.

        Mistral's template, say, gives the system prompt to the last message only. What stands around an answer is then
        taken from a plain conversation, in which prompt and answer do fit together.
        """
        before, after = self._frame
        if before is None or (before + content) not in full or calls:
            raise UserError(
                "the chat template writes this prompt differently once it is answered, so the answer cannot be told from it",
                hint="--chat_template takes another",
            )
        return before + content + after

    @cached_property
    def _always_asks(self) -> str:
        """How a template asks for an answer that does so whether it should or not (GLM-Edge's): what follows an answer is not its end."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "replied"}
        values = {"tools": None, "documents": None, **self._values}
        try:
            asked, wanted, answered, going_on = (
                render(self._compiled, messages=messages, add_generation_prompt=ask, **values)
                for messages, ask in (
                    ([question], False),
                    ([question], True),
                    ([question, answer], False),
                    ([question, answer, question], False),
                )
            )
        except UserError:  # a template that wants something else in a conversation; what it says then is seen later
            return ""
        after = answered.partition("replied")[2]
        always = asked.endswith(after) and wanted.endswith(after)
        return after if always and not going_on.partition("replied")[2].startswith(after) else ""

    @cached_property
    def _cuts_thoughts(self) -> bool:
        """Whether the template leaves out a thought that is written into an answer, as R1's does."""
        answer = {"role": "assistant", "content": f"{THINK_BEGIN}\nthought\n{THINK_END}\n\nreplied"}
        try:
            return "thought" not in self._render([{"role": "user", "content": "question"}, answer], "", ask=False)
        except UserError:  # it wants something else in a conversation
            return True

    @cached_property
    def _frame(self) -> tuple[str | None, str]:
        """What the template puts before and after an answer; (None, "") where it does not tell."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "replied"}
        prompt, full = self._render([question], "", ask=True), self._render([question, answer], "", ask=False)
        if not full.startswith(prompt) or full.count("replied") != 1:
            return None, ""
        before, _, after = full[len(prompt) :].partition("replied")
        return before, after

    def _extend_to_end(self, span: "Span", whole: str) -> None:
        """An earlier answer's end token, where the template leaves it out after the last answer only."""
        ending = next(self.tokenizer.specials_in(whole, span.end), None)
        if ending and ending.start() == span.end and self.tokenizer.control[ending[0]] in self.tokenizer.eos_ids:
            span.end, span.has_end = ending.end(), True

    @cached_property
    def _end_of_turn(self) -> list[int]:
        """The id with which this template ends an answer, if it is one token."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "replied"}
        try:
            ids, _ = self.sample_ids([question, answer])
        except UserError:
            return []
        return [ids[-1]] if ids[-1] in self.tokenizer.special_ids else []


def chosen_template(choice: str, named: Mapping[str, str]) -> tuple[str | None, str]:
    """(text, where it is from): the one that a tokenizer has under this name, else the built-in one (None), else a file.

    A file that is called as one of them is ./NAME. UserError where there is none.
    """
    if choice in named:
        return named[choice], f"{choice}, of the tokenizer"
    if choice == BUILT_IN:
        return None, f"{BUILT_IN} (built in)"
    known = ", ".join(dict.fromkeys([*named, BUILT_IN]))
    try:
        text = read_template(Path(choice), "utf-8-sig")
    except UserError as error:
        raise UserError(error.what, where=f"--chat_template {choice}") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in it
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        hint = f"give a .jinja file, or one of {known}"
        raise UserError(f"cannot be read: {why}", where=f"--chat_template {choice}", hint=hint) from error
    if not text.strip():
        raise UserError("is empty", where=f"--chat_template {choice}")
    return text, choice


def alpaca(tokenizer: Tokenizer) -> str:
    """The built-in template for one tokenizer. Its BOS and EOS are written out, because what reads the template back from a step
    (litlora, transformers, vLLM) fills in names by other rules: a BOS that plain text does not get, no EOS that config.json names.
    """
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer names no eos_token, so an answer could not end", where=tokenizer.directory)
    begin = tokenizer.token_of(tokenizer.bos_id) if tokenizer.adds_bos and tokenizer.bos_id is not None else None
    text = ALPACA.replace("EOS", _literal(str(tokenizer.token_of(tokenizer.eos_id))))
    return text if begin is None else "{{ " + _literal(begin) + " }}\n" + text


def _whole(text: str) -> str:
    """The text. UserError where it holds half a character, as Python writes a byte that is no UTF-8 in a pipe or a command's words."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"what is said holds half a character ({half}), which is no text", hint="write it in UTF-8") from None
    return text


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _texts(key)
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def _literal(text: str) -> str:
    """`text` as a string of the template language."""
    for character, written in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(character, written)
    return f'"{text}"'


@dataclass
class Span:
    """One answer in a text: characters `start` to `end`, its end token included where the template writes one."""

    start: int
    end: int
    graded: bool
    has_end: bool


@dataclass
class Draft:
    """The text of one sample, with the mark in its shielded strings, and its answers in order."""

    text: str
    mark: str
    spans: list[Span]

    def cuts(self) -> list[str]:
        """The text up to each border: before an answer, after it, before the next ..."""
        return [self.text[:border] for span in self.spans for border in (span.start, span.end)]
