"""Where what a run reads lies: written down so that it is found from any directory, and where the run moved together with it, too."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.history import options_of
from litlora.data.samples import is_part_of_demo, split_entry
from litlora.options import FitOptions

DIRECTORIES = ("checkpoint_dir", "base_dir", "tokenizer_dir")
TEMPLATE = "chat_template"  # a file, or a name


def absolute(options: FitOptions, *, template_is_file: bool) -> FitOptions:
    """The options for a file that is read anywhere: what they name and where they write, by whole paths."""

    def at(path: str) -> str:
        return path if path == names.DEMO and not Path(path).exists() else whole(path)

    here = with_paths(options, [*DIRECTORIES, TEMPLATE] if template_is_file else DIRECTORIES, at)
    return replace(here, out_dir=whole(options.out_dir))


def whole(path: str) -> str:
    """A link stays one; but a way up is followed: from a directory that may be gone it would lead nowhere."""
    return str(Path(path).resolve() if ".." in Path(path).parts else Path(path).absolute())


def found_again(options: FitOptions, run: str | Path) -> FitOptions:
    """The options of `run` as its run.yaml has them. What is not where it was, and lies as it did seen from the run, moved with it."""
    was = options_of(Path(run)).get("out_dir")

    def at(path: str) -> str:
        if not isinstance(was, str) or not (os.path.isabs(was) and os.path.isabs(path)) or os.path.lexists(path):
            return path
        moved = os.path.abspath(os.path.join(run, os.path.relpath(path, was)))
        return moved if os.path.exists(moved) else path

    return with_paths(options, [*DIRECTORIES, TEMPLATE], at)


def with_paths(options: FitOptions, single: Sequence[str], at: Callable[[str], str]) -> FitOptions:
    """The options with `at` of each path that rows are read from, without its weight, and of each in the options `single`."""

    def of_entry(entry: str) -> str:
        name, _ = split_entry(entry)
        return entry if name == names.DEMO or is_part_of_demo(entry) else at(name) + entry[len(name) :]

    read: dict[str, Any] = {name: at(path) for name in single if (path := getattr(options, name, None)) is not None}
    held_out = None if options.eval.data is None else of_entry(options.eval.data)
    return replace(options, **read, data=[of_entry(entry) for entry in options.data], eval=replace(options.eval, data=held_out))
