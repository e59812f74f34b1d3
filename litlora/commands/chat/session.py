"""What is said in a chat: the messages, the replies, and the slash commands.

Replies and what a command was asked to show are printed; everything about them goes to standard error.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from litlora.checkpoint.checkpoint import Checkpoint
from litlora.commands.generate import Message, Opened, put_on, split_weight, stats, with_system
from litlora.console import counted, put, put_words, say, style
from litlora.data.formats import Text, to_messages
from litlora.data.rows import read_rows
from litlora.errors import UserError, did_you_mean
from litlora.generation import Answer, Conversation, room
from litlora.methods.attach import as_base
from litlora.options import Chat, SamplingOptions
from litlora.parsing import PEER_NAMES, parse


class Session:
    """One chat. The model sees the messages from `first` on, under the system prompt; the others no longer fit its context."""

    def __init__(self, opened: Opened, options: Chat, *, interactive: bool) -> None:
        self.opened, self.interactive = opened, interactive
        self.sampling = SamplingOptions(**{field.name: getattr(options, field.name) for field in fields(SamplingOptions)})
        self.messages: list[Message] = []  # without the system prompt
        self.system = options.system
        self.first = 0
        self.replies = 0  # each reply samples with a seed of its own, so that /retry says something else
        self.shows_stats = interactive
        self.compares = False
        self.prompt: list[int] = []  # of the newest reply
        self.tuned, self.base = opened.conversation(), opened.conversation()
        if options.compare:
            self.do_compare("on")

    def handle(self, text: str) -> bool:
        """Answer a message or obey a command; False to leave. UserError: nothing changed."""
        if not text.startswith("/") or text.startswith("//"):
            self.ask(text[1:] if text.startswith("//") else text)
            return True
        word, _, rest = text[1:].partition(" ")
        name = ALIASES.get(word, word)
        if name not in COMMANDS:
            close = did_you_mean(f"/{word}", [f"/{known}" for known in COMMANDS])
            raise UserError(f"no command /{word}", hint=close or "/help lists the commands; a message that begins with / is sent with //")
        COMMANDS[name].run(self, rest.strip())
        return name != "exit"

    # ---- replies

    def ask(self, text: str) -> None:
        """The user's message, and the reply to it."""
        self.answer([*self.messages, {"role": "user", "content": text}])

    def answer(self, messages: list[Message]) -> None:
        """Go on with `messages` and a reply to the last of them; where nothing is said, all stays as it was."""
        before, answered = (self.messages, self.first), False
        self.messages, self.first = messages, min(self.first, len(messages))
        try:
            answered = self.reply()
        finally:
            if not answered:
                self.messages, self.first = before

    def reply(self) -> bool:
        """Answer the last message; False where that was broken off before the first word. A part of a reply is kept."""
        first, prompt = self.fitting()
        if first > self.first:
            gone = turns_in(self.messages[self.first : first])
            turns = "oldest turn no longer fits" if gone == 1 else f"{gone} oldest turns no longer fit"
            say(style(f"the {turns} in the context of {self.tuned.context:,} tokens: the model does not see them any more", "dim"))
        self.first, self.prompt = first, prompt
        if self.compares:
            self.stream(self.base, "base")
        answer = self.stream(self.tuned, "tuned" if self.compares else "")
        self.replies += 1
        if answer.finish_reason is None and not answer.text:
            say(style("nothing was said: the message is taken back", "dim"))
            return False
        self.messages.append(answer.message())
        return True

    def fitting(self) -> tuple[int, list[int]]:
        """From which message on the conversation fits the context with room for a reply, and the prompt it makes."""
        context, first = self.tuned.context, self.first
        wanted = min(self.sampling.max_new_tokens or context, context // 4)  # tokens kept free for the reply
        while True:
            prompt = self.opened.prompts.prompt_ids(self.heard(first))
            later = [n for n in range(first + 1, len(self.messages)) if self.messages[n]["role"] == "user"]
            if len(prompt) + wanted <= context or not later:
                room(len(prompt), context)  # one message alone may be too long
                return first, prompt
            first = later[0]

    def heard(self, first: int) -> list[Message]:
        return with_system(self.messages[first:], self.system)

    def stream(self, conversation: Conversation, label: str) -> Answer:
        """Print a reply as it comes. Ctrl-C breaks it off at a terminal; elsewhere it ends the command."""
        if label:
            put(f"[{label}]")
        answer = conversation.ask(self.prompt, replace(self.sampling, seed=self.sampling.seed + self.replies))
        with as_base(self.opened.model) if label == "base" else nullcontext():
            try:
                for piece in answer:
                    put_words(piece, end="")
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
        put()
        if answer.finish_reason == "length" and answer.prompt_tokens + len(answer.ids) == conversation.context:
            say(style(f"cut off: the context of {conversation.context:,} tokens is full", "dim"))
        if self.shows_stats and answer.ids:
            say(style(stats(answer, conversation.context), "dim"))
        return answer

    # ---- commands: each takes the words after its name

    def do_help(self, rest: str) -> None:
        width = max(len(f"/{name} {command.takes}") for name, command in COMMANDS.items()) + 2
        for name, command in COMMANDS.items():
            put(f"{f'/{name} {command.takes}':<{width}}{command.help}")
        put('A message goes on in the next line after a \\ at its end, after Alt-Enter, or between """ and """.')
        put("A message that begins with / is sent with //.")

    def do_exit(self, rest: str) -> None:
        """Session.handle does it."""

    def do_clear(self, rest: str) -> None:
        self.messages, self.first = [], 0
        say("a new conversation")

    def do_system(self, rest: str) -> None:
        if rest:
            self.system = None if rest == "off" else rest
        say(f"system prompt: {'none' if self.system is None else self.system}")

    def do_set(self, rest: str) -> None:
        known = [field.name for field in fields(SamplingOptions)]
        if rest:
            name, value = name_and_value(rest)
            if name not in known:
                hint = did_you_mean(PEER_NAMES.get(name, name), known) or "/set alone shows them all"
                raise UserError(f"no option {name or rest}", hint=hint)
            if not value:
                raise UserError(f"{name} needs a value", hint=f"/set {name} {getattr(SamplingOptions(), name) or 'off'}")
            off = value in ("off", "none")
            words = [] if off and name == "stop" else [f"--{name}={'null' if off else unquoted(value)}"]
            setattr(self.sampling, name, getattr(parse(SamplingOptions, words, command="chat"), name))
        say("  ".join(f"{name} {getattr(self.sampling, name)}" for name in known))

    def do_retry(self, rest: str) -> None:
        if not self.messages:
            raise UserError("there is nothing to answer again")
        answered = self.messages[-1]["role"] == "assistant"
        if self.sampling.temperature == 0 and answered:
            say(style("temperature is 0, so the reply will be the same: /set temperature 0.7", "dim"))
        self.answer(self.messages[:-1] if answered else list(self.messages))

    def do_undo(self, rest: str) -> None:
        if not self.messages:
            raise UserError("there is nothing to take back")
        while self.messages and self.messages.pop()["role"] != "user":
            pass
        self.first = min(self.first, len(self.messages))
        say(f"taken back; {counted(turns_in(self.messages), 'turn is', 'turns are')} left")

    def do_compare(self, rest: str) -> None:
        wanted = {"": not self.compares, "on": True, "off": False}.get(rest)
        if wanted is None:
            raise UserError(f"/compare takes on or off, not '{rest}'")
        if wanted and not self.opened.on:
            raise UserError("there is no adapter on the model, so there is nothing to compare", hint="/adapter PATH puts one on")
        self.compares = wanted
        say(
            "each message is answered by the base and by the tuned model; the conversation goes on with the latter"
            if wanted
            else "compare is off"
        )

    def do_adapter(self, rest: str) -> None:
        if rest:
            put_on(self.opened, [] if rest == "off" else [split_weight(word) for word in adapter_words(rest)])
            self.tuned, self.base = self.opened.conversation(), self.opened.conversation()
            self.compares = self.compares and rest != "off"
        say(f"adapter: {', '.join(described(adapter, weight) for adapter, weight in self.opened.on) or 'none'}")

    def do_tokens(self, rest: str) -> None:
        if not self.prompt:
            raise UserError("nothing has been asked yet")
        put(f"{counted(len(self.prompt), 'token')}\n{self.prompt}\n{self.opened.prompts.tokenizer.decode(self.prompt, skip_special=False)}")

    def do_save(self, rest: str) -> None:
        path = needed(rest, "/save")
        if not self.messages:
            raise UserError("there is nothing to save yet")
        row = json.dumps({"messages": self.heard(0)}, ensure_ascii=False)
        try:
            with path.open("a+", encoding="utf-8") as file:
                end = file.tell()
                file.seek(max(0, end - 1))
                torn = bool(end) and file.read(1) != "\n"  # somebody's last line has no end
                file.write("\n" * torn + row + "\n")
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=path) from None
        say(f"saved as one row of {path}")

    def do_load(self, rest: str) -> None:
        path = needed(rest, "/load")
        rows = list(read_rows(path))
        if not rows:
            raise UserError("holds no row", where=path)
        row, messages = rows[-1], to_messages(rows[-1])
        if isinstance(messages, Text):
            raise UserError("is a text, not a conversation", where=row.where)
        self.system = next((str(message["content"]) for message in messages if message["role"] == "system"), None)
        self.messages, self.first = [message for message in messages if message["role"] != "system"], 0
        say(f"{counted(turns_in(self.messages), 'turn')} from {row.where}")

    def do_stats(self, rest: str) -> None:
        if rest not in ("", "on", "off"):
            raise UserError(f"/stats takes on or off, not '{rest}'")
        self.shows_stats = not self.shows_stats if not rest else rest == "on"
        say(f"stats are {'on' if self.shows_stats else 'off'}")


class Command(NamedTuple):
    takes: str
    help: str
    run: Callable[[Session, str], None]


COMMANDS = {
    "help": Command("", "this list", Session.do_help),
    "exit": Command("", "leave (Ctrl-D does too)", Session.do_exit),
    "clear": Command("", "a new conversation", Session.do_clear),
    "system": Command("[TEXT|off]", "the system prompt", Session.do_system),
    "set": Command("[NAME VALUE]", "sampling: /set temperature 0.7", Session.do_set),
    "retry": Command("", "answer the last message again", Session.do_retry),
    "undo": Command("", "take the last message and its reply back", Session.do_undo),
    "compare": Command("[on|off]", "let the base answer as well", Session.do_compare),
    "adapter": Command("[PATH[:WEIGHT] ...|off]", "switch the adapters; the base stays loaded", Session.do_adapter),
    "tokens": Command("", "the exact prompt of the last reply: ids and text", Session.do_tokens),
    "save": Command("FILE", "append the conversation as a row to train on", Session.do_save),
    "load": Command("FILE", "go on with the conversation in the file's last row", Session.do_load),
    "stats": Command("[on|off]", "speed and context after each reply", Session.do_stats),
}
ALIASES = {"quit": "exit", "bye": "exit", "q": "exit", "new": "clear", "reset": "clear", "regen": "retry", "?": "help"}


def adapter_words(rest: str) -> list[str]:
    """The adapters that were named: one path, also with spaces in it, or several words as a shell would read them."""
    if Path(rest).exists():
        return [rest]
    try:
        return shlex.split(rest)
    except ValueError as error:
        raise UserError(f"cannot be read: {error}", where="/adapter", hint="/adapter out/step-100:0.5 out/step-200:0.5") from None


def described(adapter: Checkpoint, weight: float) -> str:
    return f"{adapter.path}" + (f" x {weight:g}" if weight != 1 else "")


def turns_in(messages: Sequence[Message]) -> int:
    return sum(message["role"] == "user" for message in messages)


def needed(rest: str, command: str) -> Path:
    if not rest:
        raise UserError(f"{command} needs a file", hint=f"{command} chats.jsonl")
    return Path(rest).expanduser()


def name_and_value(text: str) -> tuple[str, str]:
    """`temperature 0.5`, `temperature=0.5` or `--temperature 0.5`; the value may be missing."""
    end = re.search(r"\s*=\s*|\s+", text)
    name, value = (text[: end.start()], text[end.end() :]) if end else (text, "")
    return name.lstrip("-").replace("-", "_"), value


def unquoted(value: str) -> str:
    """A value in double quotes as JSON has it, so that "\\n\\n" can be typed."""
    try:
        text = json.loads(value) if value.startswith('"') else value
    except ValueError as error:
        raise UserError(f"{value} is not a text in quotes ({error})") from None
    return str(text)
