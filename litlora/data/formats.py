"""Rows to messages: the shapes in which people keep conversations, told apart by their keys."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from litlora.data.rows import Row
from litlora.errors import UserError, did_you_mean

Message = dict[str, Any]  # role: system, user or assistant; content: text; weight: 0 where an answer is not graded
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= {"assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
PREFERENCE = ("chosen", "rejected", "preferred_output", "non_preferred_output", "kto_tag")


@dataclass(frozen=True)
class Text:
    """A row that is no conversation: text to be learnt as a whole."""

    text: str


class Format(NamedTuple):
    """A shape of rows: for each field the names it goes by, and what makes messages of it."""

    needs: Mapping[str, tuple[str, ...]]
    convert: Callable[[Mapping[str, Any], Mapping[str, str]], "list[Message] | Text"]


def to_messages(row: Row, mapping: Mapping[str, str] | None = None, form: str | None = None) -> "list[Message] | Text":
    """The messages of a row, or its Text. `mapping`: our field name -> theirs; `form`: the format its file has.

    Raises UserError at the row's place: no known format, a missing or empty field, another type than text.
    """
    try:
        value = _renamed(row.value, mapping or {})
        form = form or detect(value)
        return FORMATS[form].convert(value, _names(value, form))
    except UserError as error:
        raise UserError(error.what, where=row.where, context=error.context, hint=error.hint) from None


def format_of(row: Row, mapping: Mapping[str, str] | None = None) -> str:
    """The name of a row's format."""
    try:
        return detect(_renamed(row.value, mapping or {}))
    except UserError as error:
        raise UserError(error.what, where=row.where, context=error.context, hint=error.hint) from None


def parse_mapping(entries: Sequence[str]) -> dict[str, str]:
    """`--rows.map OURS=YOURS`, repeated or separated by commas, as our name -> theirs."""
    mapping = {}
    for entry in (part.strip() for joined in entries for part in joined.split(",")):
        ours, equals, yours = (part.strip() for part in entry.partition("="))
        if not (ours and equals and yours):
            raise UserError(f"'{entry}' is not OURS=YOURS", where="--rows.map", hint="for example --rows.map prompt=question")
        if ours not in FIELDS:
            hint = did_you_mean(ours, FIELDS) or f"a row has: {', '.join(sorted(FIELDS))}"
            raise UserError(f"no row has a field '{ours}'", where="--rows.map", hint=hint)
        mapping[ours] = yours
    return mapping


def detect(value: Any) -> str:
    """The name of the format whose fields a row has."""
    if not isinstance(value, Mapping):
        raise UserError(f"a row is an object with named fields, this one is {_kind(value)}")
    if found := [key for key in PREFERENCE if key in value]:
        hint = "keep the good answer of each, as messages"
        raise UserError(f"rows of preferences ({', '.join(found)}) are not learnt by fine-tuning", hint=hint)
    if isinstance(value.get("label"), bool) and ("messages" in value or "completion" in value):
        hint = "keep the good ones, without the label"
        raise UserError("rows with a verdict (label: true or false) are not learnt by fine-tuning", hint=hint)
    for name, form in FORMATS.items():
        if all(any(key in value for key in names) for names in form.needs.values()):
            return name
    for name, form in FORMATS.items():  # the first field is there, another is not
        if any(key in value for key in next(iter(form.needs.values()))):
            lacks = next(names for names in form.needs.values() if not any(key in value for key in names))
            raise UserError(_lack(name, lacks, value), hint=f"--rows.map {lacks[0]}=..., if it has another name here")
    known = " | ".join("+".join(names[0] for names in form.needs.values()) for form in FORMATS.values())
    raise UserError(f"a row with {_keys(value)}; known are {known}", hint=_example(value))


# ---- formats ---------------------------------------------------------------------------------------------------------


def _messages(value: Mapping[str, Any], names: Mapping[str, str]) -> list[Message]:
    return _checked(_message_list(value[names["messages"]], names["messages"], "role", "content"), value)


def _sharegpt(value: Mapping[str, Any], names: Mapping[str, str]) -> list[Message]:
    key = names["conversations"]
    listed = value[key]
    by_role = isinstance(listed, list) and listed and isinstance(listed[0], Mapping) and "role" in listed[0]
    role, content = ("role", "content") if by_role else ("from", "value")
    return _checked(_with_system(value, _message_list(listed, key, role, content)), value)


def _alpaca(value: Mapping[str, Any], names: Mapping[str, str]) -> list[Message]:
    asked = [_text(value, names["instruction"])]
    asked += [_text(value, key) for key in ("input", "context") if value.get(key)]
    messages = []
    for pair in value.get("history") or []:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise UserError("history is not a list of [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [
        {"role": "user", "content": "\n\n".join(part for part in asked if part.strip())},
        {"role": "assistant", "content": _text(value, names["output"])},
    ]
    return _checked(_with_system(value, messages), value)


def _completion(value: Mapping[str, Any], names: Mapping[str, str]) -> list[Message]:
    messages: list[Message] = []
    for key, role in ((names["prompt"], "user"), (names["completion"], "assistant")):
        if isinstance(value[key], list):
            messages += _message_list(value[key], key, "role", "content")
        else:
            messages.append({"role": role, "content": _text(value, key)})
    return _checked(_with_system(value, messages), value)


def _plain(value: Mapping[str, Any], names: Mapping[str, str]) -> Text:
    text = _text(value, names["text"])
    if not text.strip():
        raise UserError("the text is empty")
    return Text(text)


ANSWERS = ("output", "response", "answer", "completion", "target")
FORMATS: dict[str, Format] = {
    "messages": Format({"messages": ("messages",)}, _messages),
    "sharegpt": Format({"conversations": ("conversations", "conversation")}, _sharegpt),
    "alpaca": Format({"instruction": ("instruction",), "output": ANSWERS}, _alpaca),
    "completion": Format({"prompt": ("prompt", "question", "query"), "completion": ("completion", *ANSWERS[:3])}, _completion),
    "text": Format({"text": ("text",)}, _plain),
}
FIELDS = {name for form in FORMATS.values() for name in form.needs} | {"input", "system", "history"}


# ---- checks ----------------------------------------------------------------------------------------------------------


def _renamed(value: Any, mapping: Mapping[str, str]) -> Any:
    if not mapping or not isinstance(value, Mapping):
        return value
    if lacking := [yours for yours in mapping.values() if yours not in value]:
        raise UserError(f"a row without {', '.join(map(repr, lacking))}, which --rows.map names; it has {_keys(value)}")
    kept = {key: entry for key, entry in value.items() if key not in mapping.values()}
    return kept | {ours: value[yours] for ours, yours in mapping.items()}


def _names(value: Any, form: str) -> dict[str, str]:
    """Which of its names each field of the format goes by in this row."""
    if not isinstance(value, Mapping):
        raise UserError(f"a row is an object with named fields, this one is {_kind(value)}")
    chosen = {}
    for field, names in FORMATS[form].needs.items():
        present = [key for key in names if key in value]
        if not present:
            raise UserError(_lack(form, names, value))
        chosen[field] = present[0]
    return chosen


def _message_list(listed: Any, key: str, role_key: str, content_key: str) -> list[Message]:
    if not isinstance(listed, list) or not listed:
        raise UserError(f"'{key}' is {'an empty list' if listed == [] else _kind(listed)}, not a list of messages")
    messages = []
    for number, entry in enumerate(listed, 1):
        place = f"message {number} of '{key}'"
        if not isinstance(entry, Mapping) or role_key not in entry:
            raise UserError(f"{place} has no '{role_key}'")
        role = ROLES.get(entry[role_key]) if isinstance(entry[role_key], str) else None
        if entry.get("tool_calls") or role is None:
            what = "tool_calls" if entry.get("tool_calls") else f"{role_key} {entry[role_key]!r}"
            raise UserError(f"{place} has {what}; known are {', '.join(sorted(ROLES))}", hint="rows with tools cannot be learnt yet")
        message: Message = {"role": role, "content": _content(entry.get(content_key), f"'{content_key}' of {place}")}
        if "weight" in entry:
            if entry["weight"] not in (0, 1):
                raise UserError(f"weight of {place} is {entry['weight']!r}, not 0 or 1")
            message["weight"] = int(entry["weight"])
        messages.append(message)
    return messages


def _with_system(value: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    if not value.get("system"):
        return messages
    return [{"role": "system", "content": _text(value, "system")}, *messages]


def _checked(messages: list[Message], value: Mapping[str, Any]) -> list[Message]:
    if value.get("tools"):
        raise UserError("the row has tools", hint="rows with tools cannot be learnt yet")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise UserError("there is no answer in this row (no assistant message)")
    if any(not message["content"].strip() and message.get("weight", 1) for message in answers):
        raise UserError("the answer is empty")
    if not any(message["content"].strip() for message in messages if message["role"] != "assistant"):
        raise UserError("the prompt is empty")
    return messages


def _content(value: Any, place: str) -> str:
    """Text, also where it is kept as a list of parts of text."""
    if isinstance(value, list):
        parts = []
        for part in value:
            if not (isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
                raise UserError(f"{place} has a part that is no text", hint="only text is learnt here")
            parts.append(part["text"])
        value = "".join(parts)
    if not isinstance(value, str):
        raise UserError(f"{place} is {_kind(value)}, not text")
    if found := re.search(r"[\ud800-\udfff]", value):
        raise UserError(f"{place} has half a character (\\u{ord(found[0]):04x} alone), which is no text")
    return value


def _text(value: Mapping[str, Any], key: str) -> str:
    return _content(value[key], f"'{key}'")


def _lack(form: str, names: Sequence[str], value: Mapping[str, Any]) -> str:
    others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    return f"{form} row without '{names[0]}'{others}; it has {_keys(value)}"


def _keys(value: Mapping[str, Any]) -> str:
    keys = list(map(str, value))
    return f"{'the key' if len(keys) == 1 else 'keys'} {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}" if keys else "no keys"


def _example(value: Mapping[str, Any]) -> str:
    keys = [str(key) for key, entry in value.items() if isinstance(entry, str)]
    return f"--rows.map prompt={keys[0]} --rows.map completion={keys[1]}" if len(keys) > 1 else "--rows.map OURS=YOURS names your fields"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
