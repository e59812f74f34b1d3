"""Which modules a word means: PEFT's matching by name, end of name or pattern, and layers by number. No torch here."""

import re
from collections.abc import Iterable, Sequence

from litlora.errors import UserError, did_you_mean

ALL_LINEAR = "all-linear"  # every projection of the blocks; not the head, nor those of experts, which are most of a model's weights
OF_AN_EXPERT = re.compile(r"\.experts\.\d+\.")


def match_targets(target_modules: Sequence[str] | str, linear_names: Sequence[str]) -> list[str]:
    """The names among `linear_names` that the targets mean, in the order of `linear_names`.

    A target in a list is a full name, the end of one after a dot (`q_proj`, `self_attn.q_proj`), or all-linear: every
    projection of the blocks but the experts', so not the head. A string is all-linear, or a regular expression for the full name, as in
    PEFT. UserError if nothing matches, or if one target of a list matches nothing; it lists the names that exist.
    """
    blocks = {name for name in linear_names if layer_number(name, ()) is not None and not OF_AN_EXPERT.search(name)}
    if isinstance(target_modules, str):
        if target_modules.lower() == ALL_LINEAR:
            return [name for name in linear_names if name in blocks]
        pattern = compiled(target_modules, "target_modules")
        found = {name for name in linear_names if pattern.fullmatch(name)}
        if not found:
            raise no_such_module([target_modules], linear_names)
    else:
        by_target = {
            target: blocks if target.lower() == ALL_LINEAR else {name for name in linear_names if is_named(name, target)}
            for target in target_modules
        }
        lost = [target for target, names in by_target.items() if not names]
        if lost or not by_target:
            raise no_such_module(lost, linear_names)
        found = set().union(*by_target.values())
    return [name for name in linear_names if name in found]


def is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def layer_number(name: str, layers_pattern: Sequence[str]) -> int | None:
    """The number of the layer that a module belongs to: the first number after a list of layers; None outside of them."""
    for pattern in layers_pattern or [r"[^.]*"]:
        anywhere = r"(?:^|.*?\.)" if layers_pattern else r".*?\."
        if found := re.match(rf"{anywhere}{pattern}\.(?P<layer>\d+)\.", name):
            return int(found["layer"])
    return None


def shortened(modules: Sequence[str], linear_names: Sequence[str]) -> list[str]:
    """Names for adapter_config.json that mean exactly `modules`: `q_proj` where every q_proj is meant, else full names."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    return ends if set(match_targets(ends, linear_names)) == set(modules) else list(modules)


def no_such_module(lost: Sequence[str], linear_names: Sequence[str]) -> UserError:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linear_names))
    guesses = [guess for guess in (did_you_mean(target, ends) for target in lost) if guess]
    what = f"no module of this model is a target named {', '.join(lost)}" if lost else "no target module is named"
    parted = [name.strip() for target in lost for name in target.split(",")]
    if len(parted) > len(lost) and set(parted) <= {*ends, ALL_LINEAR}:
        return UserError(what, where="target_modules", hint=f"with spaces between them: {' '.join(parted)}")
    return UserError("; ".join([what, *guesses[:1]]), where="target_modules", hint=f"its modules: {', '.join(ends)}, or {ALL_LINEAR}")


def compiled(pattern: str, where: str = "") -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}", where=where) from error


# ---- what the options' words mean ------------------------------------------------------------------------------------


def named_or_matched(words: Sequence[str], linear_names: Sequence[str]) -> list[str]:
    """As `match_targets` of a list, where a word may also be a regular expression for full names."""
    found: set[str] = set()
    for word in words or [""]:
        is_name = word.lower() == ALL_LINEAR or any(is_named(name, word) for name in linear_names)
        is_pattern = not is_name and re.search(r"[*+?\[\](){}|^$\\]", word)
        found.update(match_targets(word if is_pattern else [word] if word else [], linear_names))
    return [name for name in linear_names if name in found]


def layers_meant(words: Sequence[str], count: int, where: str) -> list[int]:
    """The layers of a model of `count` that words mean: `3`, `4-7` (both ends), `last:2`, `first:2`; ascending, each once.

    UserError naming the word that is none of these, or that means a layer which is not there; `where` is the option.
    """
    found: set[int] = set()
    for word in words:
        number, span, end = re.fullmatch(r"\d+", word), re.fullmatch(r"(\d+)-(\d+)", word), re.fullmatch(r"(last|first):(\d+)", word)
        if number:
            meant = range(int(word), int(word) + 1)
        elif span:
            meant = range(int(span[1]), int(span[2]) + 1)
        elif end:
            size = int(end[2])
            meant = range(count - size, count) if end[1] == "last" else range(size)
        else:
            raise UserError(f"{word!r} names no layer", where=where, hint="a number from 0, a range such as 4-7, last:2 or first:2")
        if not meant or meant[0] < 0 or meant[-1] >= count:
            raise UserError(f"{word} is not there: the model has layers 0 to {count - 1}", where=where)
        found.update(meant)
    return sorted(found)


def modules_named(words: Sequence[str], module_names: Iterable[str], where: str) -> list[str]:
    """The modules whose name is a word, or ends in one after a dot: never a part of a name, so `norm` is no `input_layernorm`.

    UserError naming the word that means none, with the names that exist; `where` is the option.
    """
    names = list(module_names)
    lost = [word for word in words if not any(is_named(name, word) for name in names)]
    if lost:
        ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        ends = [end for end in ends if not end.isdecimal()]
        guess = did_you_mean(lost[0], ends)
        raise UserError(
            "; ".join(filter(None, [f"no module of this model is named {', '.join(lost)}", guess])),
            where=where,
            hint=f"its modules: {', '.join(ends)}",
        )
    return [name for name in names if any(is_named(name, word) for word in words)]


def modules_ending(words: Sequence[str], module_names: Iterable[str]) -> list[str]:
    """What PEFT means by modules_to_save: every module whose name ends in a word, also in the middle of one of its parts."""
    return [name for name in module_names if name.endswith(tuple(words))] if words else []


def ending_words(modules: Sequence[str], module_names: Sequence[str]) -> list[str]:
    """Words with which PEFT means exactly `modules`: `embed_tokens` where it is safe, else full names."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    return ends if modules_ending(ends, module_names) == list(modules) else list(modules)


def modules_of(parameter_names: Iterable[str]) -> list[str]:
    """Every module that holds one of these parameters, itself or further down, in the order in which they first appear."""
    found: dict[str, None] = {}
    for name in parameter_names:
        parts = name.split(".")[:-1]
        found.update(dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1)))
    return list(found)
