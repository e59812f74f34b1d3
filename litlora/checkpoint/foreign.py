"""What is no checkpoint of ours or Hugging Face's, but known by its names: other programs' formats, single files, our own remains.

Nothing is read but names and, of a safetensors file, the header: a .bin, .pth or .ckpt file runs code when it is unpickled.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from litlora.checkpoint import names
from litlora.checkpoint.commit import is_alive


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """Something that no command loads as it is."""

    kind: str  # litgpt, litgpt adapter, pickled, pickled adapter, gguf, temporary, aside, file
    what: str  # in words
    why: str  # why it is not loaded
    command: str = ""  # what makes something of it
    advice: str = ""  # where there is no such command
    is_weights: bool = True  # False: a file of which nothing is known but that it is one

    @property
    def hint(self) -> str:
        return self.command or self.advice


def recognise(path: Path) -> Foreign | None:
    """What lies at `path`, by its names alone; None where they say nothing. OSError where the path cannot be looked at."""
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        return None
    if (owner := names.temporary_owner(path)) is not None:
        return _temporary(path, owner)
    if names.is_aside(path):
        why = "its files were not what they had been when a resumed run came to write its number again"
        return Foreign(kind="aside", what="a torn step that was set aside", why=why, advice="nothing reads it: delete it when you like")
    found = {entry.name for entry in path.iterdir() if entry.is_file()}
    if names.LITGPT_WEIGHTS in found:
        lacking = "" if names.LITGPT_CONFIG in found else f", without the {names.LITGPT_CONFIG} that belongs to it"
        return _pickled(path, "litgpt", f"a LitGPT checkpoint{lacking}", names.LITGPT_WEIGHTS)
    if adapter := next((name for name in names.LITGPT_ADAPTERS if name in found), None):
        return _pickled(path, "litgpt adapter", "an adapter of LitGPT", adapter)
    if pickled := next((name for name in names.PICKLED_ADAPTERS if name in found and names.ADAPTER_CONFIG in found), None):
        return _pickled(path, "pickled adapter", "a PEFT adapter whose weights are pickled", pickled)
    if any(name.endswith(names.SAFETENSORS) for name in found):
        return None
    if gguf := next((name for name in sorted(found) if name.endswith(names.GGUF)), None):
        return _gguf(path / gguf, "gguf")
    if pickles := sorted(name for name in found if name.endswith(names.PICKLES) and name not in names.TRAINER_FILES):
        more = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
        return _pickled(path, "pickled", "a directory of pickled weights", f"{pickles[0]}{more}")
    return None


# What `litlora convert` reads, by the names that must be there, and what becomes of it.
CONVERTED: tuple[tuple[tuple[str, ...], str], ...] = (
    ((names.LITGPT_WEIGHTS, names.LITGPT_CONFIG), "hf"),
    ((names.LITGPT_LORA, names.LITGPT_CONFIG, names.LITGPT_HYPERPARAMETERS), "peft"),
    ((names.PICKLED_WEIGHTS, names.CONFIG), "hf"),
    ((names.PICKLED_INDEX, names.CONFIG), "hf"),
    *(((name, names.ADAPTER_CONFIG), "peft") for name in names.PICKLED_ADAPTERS),
)


def convert_hint(directory: Path) -> tuple[str, str]:
    """The command that makes something readable of the pickled weights in a directory; where there is none, what is needed for one."""
    for needed, target in CONVERTED:
        if all((directory / name).is_file() for name in needed):
            return f"litlora convert {shlex.quote(str(directory))} --to {target} --out_dir DIR", ""
    begun = [needed for needed, _ in CONVERTED if (directory / needed[0]).is_file()]
    if begun:
        return "", f"litlora convert reads {begun[0][0]} where {' and '.join(begun[0][1:])} lies beside it"
    read = [needed for needed, _ in CONVERTED if needed[0] not in (names.PICKLED_INDEX, *names.PICKLED_ADAPTERS[1:])]
    known = ", ".join(f"{needed[0]} with {' and '.join(needed[1:])}" for needed in read)
    return "", f"use a copy in safetensors format; of pickled weights litlora convert reads {known}"


def _pickled(path: Path, kind: str, what: str, file: str) -> Foreign:
    command, advice = convert_hint(path)
    return Foreign(kind=kind, what=what, why=f"{file} can run code when it is read, and is not", command=command, advice=advice)


def _gguf(file: Path, kind: str) -> Foreign:
    why = "litlora writes this format and does not read it"
    return Foreign(kind=kind, what="a model for llama.cpp (GGUF)", why=why, command=f"llama-cli -m {shlex.quote(str(file))}")


def _temporary(path: Path, owner: int) -> Foreign:
    if is_alive(owner):
        return Foreign(
            kind="temporary", what="a directory that is being written", why=f"process {owner} has not finished it", advice="wait"
        )
    hint = "the next command that writes here removes it"
    return Foreign(kind="temporary", what="what a process left half-written", why=f"process {owner} died before it was done", advice=hint)


def _file(path: Path) -> Foreign:
    parent = shlex.quote(str(path.parent))
    if path.name.endswith(names.PICKLES):
        why = "it can run code when it is read, and is not"
        command, advice = convert_hint(path.parent)
        return Foreign(kind="file", what="a file of pickled weights", why=why, command=command, advice=advice)
    if path.suffix == names.GGUF:
        return _gguf(path, "file")
    if path.suffix == names.SAFETENSORS:
        why = "a checkpoint is a directory: weights without their config are numbers without a meaning"
        return Foreign(kind="file", what="a safetensors file", why=why, command=f"litlora inspect {parent}")
    return Foreign(kind="file", what="a file", why="a checkpoint is a directory", command=f"litlora inspect {parent}", is_weights=False)
