"""Rows to messages: the shapes in which people keep conversations, told apart by their keys."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from litlora.data.places import Row
from litlora.errors import UserError, did_you_mean
from litlora.prompts import THOUGHT

# role: system, user, assistant or tool; content: text; weight: 0 where an answer is not graded; tool_calls; what is thought before an
# answer (THOUGHT in prompts). Before them may stand one with the role `tools`: its content lists what may be called.
Message = dict[str, Any]
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= {"assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
ROLES |= {"function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool"}
SYSTEM, ABOUT = ("system", "system_prompt"), ("input", "context")  # fields beside a prompt: before it, and with it
BETTER, WORSE = ("chosen", "preferred_output"), ("rejected", "non_preferred_output")
LABELS = ("label", "kto_tag")
CALLED = ("tool_call_id", "name")  # of a message, for templates that show them
REASONING = (*THOUGHT, "reasoning")  # of an answer, as rows call it


@dataclass(frozen=True)
class Text:
    """A row that is no conversation: text to be learnt as a whole, or a piece of one."""

    text: str
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class Pair:
    """A preference: two conversations that differ in the answer. Recognised and checked; fine-tuning does not learn them."""

    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class Verdict:
    """A conversation that somebody found good or bad. As Pair."""

    messages: list[Message]
    good: bool


class Format(NamedTuple):
    """A shape of rows: for each field the names it goes by, and what makes messages of it."""

    needs: Mapping[str, tuple[str, ...]]
    convert: Callable[[Mapping[str, Any], Mapping[str, str]], "list[Message] | Text | Pair | Verdict"]


def to_messages(row: Row, mapping: Mapping[str, str] | None = None, form: str | None = None) -> "list[Message] | Text":
    """The messages of a row, or its Text. `mapping`: our field name -> theirs; `form`: the format its file has.

    Raises UserError at the row's place: no known format, a missing or empty field, another type than text, rows that judge answers.
    """
    value = read_row(row, mapping, form)
    if isinstance(value, Pair):
        hint = "keep the good answer of each, as messages; litlora data validate checks them as they are"
        raise UserError("rows of preferences (two answers to one prompt) are not learnt by fine-tuning", where=row.where, hint=hint)
    if isinstance(value, Verdict):
        hint = "keep the good ones, without the label"
        raise UserError("rows with a verdict (label: true or false) are not learnt by fine-tuning", where=row.where, hint=hint)
    return value


def read_row(row: Row, mapping: Mapping[str, str] | None = None, form: str | None = None) -> "list[Message] | Text | Pair | Verdict":
    """What a row holds, whatever it is for. Raises UserError as `to_messages`."""
    try:
        value = _renamed(row.value, mapping or {})
        form = form or detect(value)
        made = FORMATS[form].convert(value, _names(value, form))
    except UserError as error:
        raise UserError(error.what, where=row.where, context=error.context, hint=error.hint) from None
    return replace(made, begins=row.begins, ends=row.ends) if isinstance(made, Text) else made


def format_of(row: Row, mapping: Mapping[str, str] | None = None) -> str:
    """The name of a row's format."""
    try:
        return detect(_renamed(row.value, mapping or {}))
    except UserError as error:
        raise UserError(error.what, where=row.where, context=error.context, hint=error.hint) from None


def unread(row: Row, mapping: Mapping[str, str] | None, form: str) -> set[str]:
    """The fields of a row that no sample is made of, by the names they have in its file."""
    value = _renamed(row.value, mapping or {})
    names = _names(value, form)
    beside = SYSTEM if form == "completion" and isinstance(value[names["prompt"]], list) else BESIDE.get(form, SYSTEM)
    read = {*names.values(), *beside, *(["tools"] if form != "text" else [])}
    return {str(key) for key, entry in value.items() if key not in read and entry not in (None, "")}


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
    if any(isinstance(value.get(key), bool) for key in LABELS) and any(key in value for key in ("messages", "conversations", "completion")):
        return "verdict"
    learnt = {name: form for name, form in FORMATS.items() if name != "verdict"}  # `label` may be any field of a row
    for name, form in learnt.items():
        if all(any(key in value for key in names) for names in form.needs.values()):
            return name
    for name, form in learnt.items():  # the first field is there, another is not
        if any(key in value for key in next(iter(form.needs.values()))):
            lacks = next(names for names in form.needs.values() if not any(key in value for key in names))
            raise UserError(_lack(name, lacks, value), hint=f"--rows.map {lacks[0]}=..., if it has another name here")
    known = " | ".join("+".join(names[0] for names in form.needs.values()) for name, form in FORMATS.items() if name not in NOT_LEARNT)
    raise UserError(f"a row with {_keys(value)}; known are {known}", hint=_example(value))


# ---- formats ---------------------------------------------------------------------------------------------------------


def _conversation(value: Mapping[str, Any], names: Mapping[str, str]) -> list[Message]:
    key = next(iter(names.values()))
    return _checked(_with_system(value, _message_list(value[key], key)), value)


def _alpaca(value: Mapping[str, Any], names: Mapping[str, str]) -> list[Message]:
    asked = _asked(value, names["instruction"])
    messages = []
    for pair in parsed(value.get("history") or [], "'history'"):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise UserError("history is not a list of [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": _text(value, names["output"])},
    ]
    return _checked(_with_system(value, messages), value)


def _completion(value: Mapping[str, Any], names: Mapping[str, str]) -> list[Message]:
    messages: list[Message] = []
    for key, role in ((names["prompt"], "user"), (names["completion"], "assistant")):
        if isinstance(value[key], list):
            messages += _message_list(value[key], key)
        else:
            messages.append({"role": role, "content": _asked(value, key) if role == "user" else _text(value, key)})
    return _checked(_with_system(value, messages), value)


def _asked(value: Mapping[str, Any], key: str) -> str:
    """What a row asks, with what it asks about, if that stands in a field of its own."""
    parts = [_text(value, key), *(_about(value, name) for name in ABOUT if name != key and value.get(name))]
    return "\n\n".join(part for part in parts if part.strip())


def _about(value: Mapping[str, Any], name: str) -> str:
    """Text, or several passages of it."""
    found = value[name]
    if isinstance(found, list) and all(isinstance(part, str) for part in found):
        return "\n\n".join(found)
    try:
        return _text(value, name)
    except UserError as error:  # HotpotQA's, say, is an object of titles and sentences
        hint = "make it a text or a list of texts; or give the field another name, and it is not read"
        raise UserError(error.what, hint=hint) from error


def _plain(value: Mapping[str, Any], names: Mapping[str, str]) -> Text:
    text = _text(value, names["text"])
    if not text.strip():
        raise UserError("the text is empty")
    return Text(text)


def _pair(value: Mapping[str, Any], names: Mapping[str, str]) -> Pair:
    """Two answers to what the row asks: in a conversation of its own, in the fields of another format, or in both of the answers."""
    asked = value.get("input")
    if isinstance(asked, Mapping) and "messages" in asked:  # OpenAI's preference format
        before = _message_list(asked["messages"], "messages")
    else:
        key = next((key for key in ("conversations", "messages", "conversation", *ASKS) if value.get(key)), None)
        if key is None:
            before = []
        elif isinstance(value[key], list):
            before = _message_list(value[key], key)
        else:
            parts = [_text(value, key), _text(value, "input") if key == "instruction" and value.get("input") else ""]
            before = [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]
    both = []
    for field in ("chosen", "rejected"):
        key, said = names[field], value[names[field]]
        if isinstance(said, str):
            after: list[Message] = [{"role": "assistant", "content": _content(said, f"'{key}'")}]
        else:
            after = _message_list([said] if isinstance(said, Mapping) else said, key)
        whole = after[: len(before)] == before  # some keep the prompt in both places
        both.append(_checked(_with_system(value, after if whole else [*before, *after]), value))
        if both[-1][-1]["role"] != "assistant":
            raise UserError(f"'{key}' does not end with an answer")
    if both[0] == both[1]:
        raise UserError(f"'{names['chosen']}' and '{names['rejected']}' are the same")
    return Pair(*both)


def _verdict(value: Mapping[str, Any], names: Mapping[str, str]) -> Verdict:
    plain = {key: entry for key, entry in value.items() if key not in LABELS}
    form = detect(plain)
    made = FORMATS[form].convert(plain, _names(plain, form))
    if not isinstance(made, list):
        raise UserError(f"a {form} row with a verdict; it needs a prompt and an answer")
    return Verdict(made, bool(value[names["label"]]))


ANSWERS = ("output", "response", "answer", "completion", "target")
ASKS = ("prompt", "question", "query", "instruction")
FORMATS: dict[str, Format] = {
    "preference": Format({"chosen": BETTER, "rejected": WORSE}, _pair),
    "verdict": Format({"label": LABELS}, _verdict),
    "messages": Format({"messages": ("messages",)}, _conversation),
    "sharegpt": Format({"conversations": ("conversations", "conversation")}, _conversation),
    "alpaca": Format({"instruction": ("instruction",), "output": ANSWERS}, _alpaca),
    "completion": Format(
        {"prompt": ("prompt", "question", "query", "problem", "input"), "completion": ("completion", *ANSWERS[:3], "solution")}, _completion
    ),
    "text": Format({"text": ("text",)}, _plain),
}
NOT_LEARNT = ("preference", "verdict")
BESIDE = {"alpaca": (*SYSTEM, *ABOUT, "history"), "completion": (*SYSTEM, *ABOUT), "text": ()}  # what else is read; of others SYSTEM
FIELDS = {name for form in FORMATS.values() for name in form.needs} | {*ABOUT, "system", "history", "tools"}


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


def _message_list(listed: Any, key: str) -> list[Message]:
    listed = parsed(listed, f"'{key}'")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"'{key}' is {'an empty list' if listed == [] else _kind(listed)}, not a list of messages")
    by_value = isinstance(listed[0], Mapping) and "from" in listed[0] and "role" not in listed[0]
    keys = ("from", "value") if by_value else ("role", "content")
    return [_message(entry, f"message {number} of '{key}'", *keys) for number, entry in enumerate(listed, 1)]


def _message(entry: Any, place: str, role_key: str, content_key: str) -> Message:
    if not isinstance(entry, Mapping) or role_key not in entry:
        raise UserError(f"{place} has no '{role_key}'")
    role = ROLES.get(entry[role_key]) if isinstance(entry[role_key], str) else None
    if role is None:
        raise UserError(f"{place} has {role_key} {entry[role_key]!r}; known are {', '.join(sorted(ROLES))}")
    content, calls = entry.get(content_key), entry.get("tool_calls")
    if entry[role_key] == "function_call":  # ShareGPT with tools: the call is the text
        content, calls = None, [parsed(content, f"'{content_key}' of {place}")]
    message: Message = {"role": role}
    if role == "assistant" and calls:
        message["content"] = None if content is None else _content(content, f"'{content_key}' of {place}")
        message["tool_calls"] = _calls(calls, place)
    else:
        message["content"] = _content(content, f"'{content_key}' of {place}")
    message |= {key: entry[key] for key in CALLED if role == "tool" and isinstance(entry.get(key), str)}
    if role == "assistant" and (key := next((key for key in REASONING if entry.get(key)), None)):
        message |= dict.fromkeys(THOUGHT, _content(entry[key], f"'{key}' of {place}"))
    if "weight" in entry:
        if entry["weight"] not in (0, 1):
            raise UserError(f"weight of {place} is {entry['weight']!r}, not 0 or 1")
        message["weight"] = int(entry["weight"])
    return message


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls as templates read them: arguments are an object, not the text of one."""
    if not isinstance(calls, list):
        raise UserError(f"tool_calls of {place} is {_kind(calls)}, not a list")
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"a tool call of {place} has no name", hint='{"function": {"name": "...", "arguments": {...}}}')
        arguments = parsed(function.get("arguments") or {}, f"the arguments of a tool call of {place}")
        if not isinstance(arguments, Mapping):
            raise UserError(f"the arguments of a tool call of {place} are {_kind(arguments)}, not an object")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        result.append({**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _tools(tools: Any) -> list[Any]:
    listed = parsed(tools, "'tools'")
    if not isinstance(listed, list) or not all(isinstance(tool, Mapping) for tool in listed):
        raise UserError(f"'tools' is {_kind(listed)}, not a list of objects")
    # As OpenAI and transformers write them; ShareGPT rows have the functions alone.
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in listed]


def parsed(value: Any, place: str) -> Any:
    """The value; where it is the text of an object or a list (in a column of a table, say), what that text says."""
    if not (isinstance(value, str) and value.lstrip()[:1] in ("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON ({error})") from error


def _with_system(value: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """A conversation that begins with a system message has its own."""
    key = next((key for key in SYSTEM if value.get(key) and messages[0]["role"] != "system"), None)
    return [{"role": "system", "content": _text(value, key)}, *messages] if key else messages


def _checked(messages: list[Message], value: Mapping[str, Any]) -> list[Message]:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise UserError("there is no answer in this row (no assistant message)")
    if any(not says(message) and message.get("weight", 1) for message in answers):
        raise UserError("the answer is empty")
    if not any(says(message) for message in messages if message["role"] != "assistant"):
        raise UserError("the prompt is empty")
    tools = value.get("tools")
    return [{"role": "tools", "content": _tools(tools)}, *messages] if tools else messages


def says(message: Message) -> bool:
    """Whether there is anything in a message."""
    return bool((message["content"] or "").strip() or message.get("tool_calls"))


def texts(messages: Sequence[Message]) -> list[str]:
    """What is said in them and thought, without the tools that may be called."""
    parts = (message.get(key) for message in messages for key in (THOUGHT[0], "content"))
    return [part for part in parts if isinstance(part, str)]


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
