"""From the words of one command to its dataclass of options, and back to YAML.

`options.py` declares; this file reads one leaf command at a time. Words are first brought to pairs of name and value, so that a
path may begin with a dash, a switch needs no value and a list may be repeated. Text is then taken as it stands; what has to be
understood (numbers, switches, choices) jsonargparse parses. A YAML file's values are words too: only its null is more.
"""

import dataclasses
import textwrap
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from litlora.console import put
from litlora.errors import UserError, did_you_mean, no_such_file

Options = TypeVar("Options")
BARE = ("checkpoint_dir",)  # the option that a command's first bare word stands for, where its dataclass says nothing else
Value = str | list[Any] | dict[str, Any] | None  # of one option, as it was written; a dict and what a list holds may be no value at all

# What the same thing is called elsewhere: a user who types the name they know is told ours.
PEER_NAMES = {
    "learning_rate": "train.lr",
    "lr": "train.lr",
    "num_train_epochs": "train.epochs",
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "max_iters": "train.max_steps",
    "iters": "train.max_steps",
    "batch_size": "train.global_batch_size",
    "train.micro_batch_size": "train.micro_batch_tokens",
    "per_device_train_batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "cutoff_len": "train.max_seq_length",
    "max_length": "train.max_seq_length",
    "max_seq_length": "train.max_seq_length",
    "warmup_steps": "train.lr_warmup_steps",
    "save_steps": "train.save_interval",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "use_dora": "lora.use_dora",
    "use_rslora": "lora.use_rslora",
    "model": "checkpoint_dir",
    "model_name_or_path": "checkpoint_dir",
    "base_model": "checkpoint_dir",
    "adapter_path": "adapter",
    "adapter_name_or_path": "adapter",
    "dataset": "data",
    "data.json_path": "data",
    "train_data": "data",
    "output_dir": "out_dir",
    "resume_from_checkpoint": "resume",
    "top_n": "top_k",
    "max_tokens": "max_new_tokens",
    "load_in_4bit": "quantize",
    "load_in_8bit": "quantize",
    "quantization_bit": "quantize",
    "device": "accelerator",
}
QUANTIZE_ELSEWHERE = "finetune, estimate, generate, chat and evaluate have it; what others write is made of the weights as they are stored"


class Given(NamedTuple):
    """What one option was given, and by which file ("" for the command line)."""

    value: Value
    file: str


class Leaf(NamedTuple):
    """One option of a command: the dotted name, and the dataclass field that declares it."""

    name: str
    type: Any
    default: Any
    field: dataclasses.Field[Any]

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.type) is list

    @property
    def is_switch(self) -> bool:
        return self.type is bool

    @property
    def is_optional(self) -> bool:
        return isinstance(self.type, types.UnionType) and types.NoneType in typing.get_args(self.type)

    @property
    def is_text(self) -> bool:
        return self.type is str or (self.is_optional and str in typing.get_args(self.type))


def leaves(kind: type, prefix: str = "") -> Iterator[Leaf]:
    """Every option of a dataclass of options, groups opened."""
    types = typing.get_type_hints(kind)
    defaults = kind()
    for field in dataclasses.fields(kind):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            # The group's own default may differ from its class's: take each value from the instance.
            for leaf in leaves(type(value), f"{prefix}{field.name}."):
                yield leaf._replace(default=getattr(value, leaf.field.name))
        else:
            yield Leaf(prefix + field.name, types[field.name], value, field)


def parse(kind: type[Options], words: Sequence[str], *, command: str) -> Options:
    """The options of `litlora <command> <words>`. Raises UserError for anything that is not an option, a value or a file."""
    known = {leaf.name: leaf for leaf in leaves(kind)}
    pairs = list(as_pairs(words, known, command, getattr(kind, "bare", BARE)))
    if any(name == "help" for name, _ in pairs):
        put(help_text(known.values(), kind, command))
        raise SystemExit(0)
    given: dict[str, Given] = {}
    for file in [str(value) for name, value in pairs if name == "config"]:
        given |= {name: Given(value, file) for name, value in read_yaml(Path(file), known, command).items()}
    given |= {name: Given(value, "") for name, value in pairs if name in known}
    options = as_dataclass(kind, understood(given, known, command))
    check_ranges(options)
    if any(name == "print_config" for name, _ in pairs):
        put(to_yaml(options), end="")
        raise SystemExit(0)
    return options


def as_pairs(
    words: Sequence[str], known: Mapping[str, Leaf], command: str, bare: Sequence[str] = BARE
) -> Iterator[tuple[str, str | list[str]]]:
    """The words as (name, value); the first bare words are the options `bare` (all of them where that is a list), a list's values are
    gathered into one list."""
    lists: dict[str, list[str]] = {}
    rest = list(words)
    for name in bare:
        if name not in known or not rest or rest[0].startswith("-"):
            break
        if not known[name].is_list:
            yield name, rest.pop(0)
            continue
        while rest and not rest[0].startswith("-"):
            lists.setdefault(name, []).append(rest.pop(0))
    switch = ""  # the option before, where it takes no value
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            yield "help", ""
            continue
        if not word.startswith("--"):
            hint = f"--{switch} takes no value but true or false" if switch else "options are written --name value"
            raise UserError(f"'{word}' belongs to no option of litlora {command}", hint=hint)
        name, equals, value = word[2:].partition("=")
        if name == "print_config":
            yield name, ""
            continue
        if name != "config" and name not in known:
            raise unknown_option(name, known, command, f"--{name}")
        takes_no_value = not equals and name in known and known[name].is_switch and (not rest or rest[0].lower() not in ("true", "false"))
        switch = name if takes_no_value else ""
        if takes_no_value:
            yield name, "true"
        elif name in known and known[name].is_list:
            values = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if not values:
                raise UserError(f"--{name} needs a value")
            lists.setdefault(name, []).extend(values)
        elif equals or (rest and not is_option(rest[0], known)):
            yield name, value if equals else rest.pop(0)
        else:
            raise UserError(f"--{name} needs a value")
    yield from lists.items()


def is_option(word: str, known: Mapping[str, Leaf]) -> bool:
    name = word[2:].partition("=")[0]
    return word.startswith("--") and (name in known or name in ("config", "help", "print_config"))


def unknown_option(name: str, known: Mapping[str, Leaf], command: str, shown: str, where: str = "") -> UserError:
    meant = PEER_NAMES.get(name) or PEER_NAMES.get(name.replace("-", "_"))
    if meant in known:
        hint = f"here it is --{meant}"
    else:
        dashes = "--" if shown.startswith("--") else ""  # a file's keys have none
        meant_by = {leaf: leaf for leaf in known} | {leaf.rpartition(".")[2]: leaf for leaf in known}
        close = did_you_mean(name.replace("-", "_"), meant_by)
        for word, whole in meant_by.items():
            close = close.replace(f"mean {word}?", f"mean {dashes}{whole}?")
        hint = QUANTIZE_ELSEWHERE if name == "quantize" else close or all_options(command)
    return UserError(f"no option {shown}", where=where, hint=hint)


def understood(given: Mapping[str, Given], known: Mapping[str, Leaf], command: str) -> dict[str, Any]:
    """Every option's value by its dotted name: what was given, in the option's type, and the defaults."""
    values = {leaf.name: leaf.default for leaf in known.values()}
    words = []
    for name, (value, file) in given.items():
        leaf = known[name]
        if leaf.is_list and isinstance(value, str):
            value = [value]
        texts = leaf.is_list and isinstance(value, list) and all(isinstance(item, str) for item in value)
        if texts or (leaf.is_text and isinstance(value, str)) or (leaf.is_optional and value is None):
            values[name] = value
        elif leaf.is_list or leaf.is_text or value is None:
            raise wrong_value(leaf, "null" if value is None else str(value), command, file)
        else:
            words.append(f"--{name}={value}")
    try:
        parsed = build_parser([known[name] for name in given]).parse_args(words)
    except (ArgumentError, TypeError, ValueError) as error:
        name = next((name for name in given if f'"{name}"' in str(error)), "")
        if not name:
            raise UserError(" ".join(str(error).split()), hint=all_options(command)) from error
        raise wrong_value(known[name], str(error).rpartition("value: ")[2].strip(), command, given[name].file) from error
    return values | {name: parsed[name] for name in given if not (known[name].is_text or known[name].is_list or given[name].value is None)}


def build_parser(asked: Iterable[Leaf]) -> Any:
    """jsonargparse's parser for what was given: one argument per option that is not plain text, no abbreviations."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, add_help=False, default_env=False)
    for leaf in asked:
        if not leaf.is_text and not leaf.is_list:
            parser.add_argument(f"--{leaf.name}", type=leaf.type, default=leaf.default)
    return parser


def all_options(command: str) -> str:
    return f"litlora {command} --help lists the options"


def help_text(known: Iterable[Leaf], kind: type, command: str) -> str:
    """`litlora COMMAND --help`: every option with its values, what it is for, and its default."""
    leaf_of = {leaf.name: leaf for leaf in known}
    first_line = (kind.__doc__ or "").splitlines()[0]
    if command.startswith("estimate "):  # its options are those of the fine-tuning that it estimates
        first_line = f"The memory and the time that litlora finetune {command.split()[1]} would take with the same options."
    words = [f"[{name.upper()}{' ...' * leaf_of[name].is_list}]" for name in getattr(kind, "bare", BARE) if name in leaf_of]
    usage = " ".join([f"usage: litlora {command}", *words, "[--option value ...]"])
    lines = [usage, "", first_line]
    above = None
    for leaf in leaf_of.values():
        inside = leaf.name.rpartition(".")[0]
        if inside != above:
            lines.append("")
            above = inside
        default = " ".join(map(str, leaf.default)) if leaf.is_list else leaf.default
        shown = "" if default in (None, "") or default is False else f" [{default}]"
        if default is None and leaf.field.metadata["unset"]:
            shown = f" (default: {leaf.field.metadata['unset']})"
        head = f"  --{leaf.name} {values_of(leaf.type)}".rstrip()
        first, *more = textwrap.wrap(f"{leaf.field.metadata['help']}{shown}", 92)
        lines += [f"{head:<46}  {first}", *(f"{'':<48}{line}" for line in more)]
    lines += ["", "  --config FILE.yaml (repeatable: later files win, options win over files)   --print_config   --debug   --help"]
    return "\n".join(lines)


def values_of(kind: Any) -> str:
    """What a value looks like, for help and for messages: N, X, TEXT, {auto,fp32} ..."""
    kind = next((part for part in typing.get_args(kind) if type(None) in typing.get_args(kind)), kind)  # `X | None` is an X
    if kind is bool:
        return ""
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    if typing.get_origin(kind) is list:
        return "TEXT ..."
    return {int: "N", float: "X", str: "TEXT"}[kind]


def wrong_value(leaf: Leaf, value: str, command: str, file: str) -> UserError:
    """What is said of a value that the option cannot have: which it can, and what the words mean."""
    values = values_of(leaf.type)
    wanted = {"N": "a whole number", "X": "a number", "": "true or false", "TEXT": "a text", "TEXT ...": "texts"}.get(values, values)
    about = f"{leaf.field.metadata['help']} ({all_options(command)})" if values.startswith("{") else all_options(command)
    return UserError(f"--{leaf.name} must be {wanted}, not {value}", where=file, hint=about)


def read_yaml(path: Path, known: Mapping[str, Leaf], command: str) -> dict[str, Value]:
    """A YAML file of options, flattened to dotted names, every scalar but null as the text that stands there.

    Unknown keys are refused with the nearest known one.
    """
    import yaml

    try:
        content = yaml_texts(path.read_text(encoding="utf-8"))
        flat = dict(flattened(content, known)) if isinstance(content, dict) else {}
    except FileNotFoundError as error:
        raise no_such_file(path) from error
    except OSError as error:
        hint = "--config takes a YAML file of options"
        raise UserError(f"cannot be read ({error.strerror})", where=path, hint=hint) from error
    except UnicodeDecodeError as error:
        raise UserError("is not UTF-8 text", where=path) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise UserError(f"not valid YAML ({getattr(error, 'problem', None) or str(error).splitlines()[0]})", where=where) from error
    except RecursionError as error:
        raise UserError("is nested too deep", where=path) from error
    except ValueError as error:  # a zero byte in the path
        raise UserError(f"cannot be read ({error})", where=repr(str(path))) from error
    if content is not None and not isinstance(content, dict):
        raise UserError("holds no options (a mapping of names to values is needed)", where=path)
    for name in flat:
        if name not in known:
            raise unknown_option(name, known, command, name, where=str(path))
    return flat


def yaml_texts(text: str) -> Any:
    """A YAML document of mappings, sequences, null and text: `007`, `yes` and `2024-01-01` stay what was typed."""
    import yaml

    standard, core = yaml.SafeLoader, "tag:yaml.org,2002:"

    plain = {f"{core}{kind}" for kind in ("null", "merge")}
    made = {tag: make for tag, make in standard.yaml_constructors.items() if tag in (None, f"{core}null", f"{core}map", f"{core}seq")}

    class Texts(yaml.SafeLoader):
        pass

    Texts.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag in plain]
        for letter, resolvers in standard.yaml_implicit_resolvers.items()
    }
    Texts.yaml_constructors = made | {f"{core}{kind}": standard.construct_yaml_str for kind in ("str", "int", "float", "bool", "timestamp")}
    loader = Texts(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def flattened(content: Mapping[str, Any], known: Mapping[str, Leaf], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in known:
            yield from flattened(value, known, f"{name}.")
        else:
            yield name, value


def as_dataclass(kind: type[Options], values: Mapping[str, Any], prefix: str = "") -> Options:
    """The values, by their dotted names, as the command's dataclass, groups included."""
    made = {}
    defaults = kind()
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # every command is a dataclass
        name, default = f"{prefix}{field.name}", getattr(defaults, field.name)
        made[field.name] = as_dataclass(type(default), values, f"{name}.") if dataclasses.is_dataclass(default) else values[name]
    return kind(**made)


def check_ranges(options: Any, prefix: str = "") -> None:
    for field in dataclasses.fields(options):
        name, value = f"{prefix}{field.name}", getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            above, least, below, most = (field.metadata[bound] for bound in ("above", "least", "below", "most"))
            bounds = {  # what is asked, and whether the value keeps to it
                f"above {above}": above is None or value > above,
                f"at least {least}": least is None or value >= least,
                f"below {below}": below is None or value < below,
                f"at most {most}": most is None or value <= most,
            }
            if value != value or not all(bounds.values()):
                asked = [bound for bound in bounds if not bound.endswith("None")]
                raise UserError(f"--{name} must be {' and '.join(asked) or 'a number'}, not {value}")


def to_yaml(options: Any) -> str:
    """The options as YAML that `--config` reads back to the same options."""
    import yaml

    values = dataclasses.asdict(options)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    broken = {"\x85", "\u2028", "\u2029"} & set(text)  # line ends to YAML, which PyYAML reads back as other ones unless escaped
    return yaml.safe_dump(values, sort_keys=False) if broken else text
