"""A deeper model that computes exactly what its base does: LLaMA-Pro's start, written out (Wu et al. 2024, arXiv:2401.02415, 3.2).

Each new block is a copy of the one before it in which whatever writes last to the residual stream is zero, weights and biases.
Everything else is the base, byte for byte.
"""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import check_free_space, check_outside, check_writable, commit_directory, make_directory
from litlora.checkpoint.fingerprint import tensor_digests
from litlora.checkpoint.manifest import seal
from litlora.checkpoint.reading import sha256
from litlora.checkpoint.shards import find_shards
from litlora.checkpoint.tokenizers import tokenizer_files
from litlora.console import counted
from litlora.errors import UserError, WorkError
from litlora.families import LLAMA_PRO_LAYERS
from litlora.merge.directory import fingerprint_after, fingerprint_before, front_matter, how_to_use, version, write_model_files
from litlora.merge.outputs import NewModel, new_model
from litlora.merge.tensors import Moved
from litlora.merge.weights import write_weights
from litlora.methods import insert_positions
from litlora.methods.tuning import Tuning


@dataclass(frozen=True)
class Expansion:
    """A deeper model that nothing speaks against any more."""

    model: NewModel
    positions: tuple[int, ...]  # the base's layers that a new one follows
    out_dir: Path


def prepare_expansion(base: Checkpoint, out_dir: Path, n_insert: int | None = None, positions: Sequence[str] = ()) -> Expansion:
    """`n_insert` blocks spread evenly, or one after each of the `positions`. UserError says what speaks against it."""
    if not base.is_model:
        raise UserError("is an adapter; only whole models can be expanded", where=base.path, hint=f"litlora merge_lora {base.path} first")
    if os.path.lexists(out_dir):
        raise UserError("exists already; nothing is overwritten", where=out_dir, hint="--out_dir another directory")
    check_outside(out_dir, base.path)
    check_writable(out_dir)
    config = base.config()
    tuning = Tuning(inserted=insert_positions(n_insert, positions, config))
    model = new_model(base, config, tuning, dtype=None, trained=False)
    check_free_space(out_dir, model.bytes + 2**24)
    return Expansion(model, tuning.inserted, out_dir)


def expand(plan: Expansion, *, progress: Callable[[int], None] = lambda done: None) -> None:
    """Write it to `plan.out_dir`, whole or not at all. What was written is read again before it gets that name; WorkError."""
    model, final = plan.model, plan.out_dir.absolute()
    make_directory(final.parent)
    with commit_directory(final, needed_bytes=model.bytes) as directory:
        moved = write_weights(model, None, directory, progress)
        write_model_files(model, directory)
        for name, data in tokenizer_files(model.base.tokenizer_dir()).items():
            (directory / name).write_bytes(data)
        (directory / names.README).write_text(model_card(model, fingerprint_before(model, moved)))
        found = tensor_digests(find_shards(directory), use_cache=False)
        if faults := [name for name, one in moved.items() if found.get(name) != one.after]:
            raise WorkError("\n  ".join(["what lies on the disk is not what was written:", *faults]), where=directory)
        (directory / names.EXPAND_REPORT).write_bytes(seal(make_report(plan, moved, directory)))


def make_report(plan: Expansion, moved: Mapping[str, Moved], directory: Path) -> dict[str, Any]:
    """expand_report.json: what it was made from, and the hash of everything in it. No time: the same expansion gives the same bytes."""
    model, weights = plan.model, {path.name for path in plan.model.files}
    return {
        "format_version": 2,  # as the other reports that have a hash of their own
        "base": {"path": model.base.recorded_path, "bytes": model.base_bytes, "fingerprint": fingerprint_before(model, moved)},
        "expanded": {"bytes": model.bytes, "fingerprint": fingerprint_after(model, moved)},
        "positions": list(plan.positions),
        "new_layers": list(model.new_layers),
        "versions": {"litlora": version(), "numpy": np.__version__, "python": platform.python_version()},
        "files": {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.name not in weights},
        "weights": {name: one.after for name, one in sorted(moved.items())},
    }


def model_card(model: NewModel, fingerprint: str) -> str:
    """README.md: what was added, and how to train it."""
    before, after = model.base_config.num_hidden_layers, model.config.num_hidden_layers
    return f"""{front_matter(model, ["llama-pro"])}
# {model.base.path.name}, {counted(after - before, "block")} deeper

Written by `litlora expand` from the base `{model.base.recorded_path}` (fingerprint `{fingerprint}`).
It has {after} layers instead of {before}. New are, counted from 0: {", ".join(map(str, model.new_layers))}.
Each is a copy of the one before it in which the output projections of attention and MLP are zero, so that the model computes
exactly what its base does until these blocks learn. `{LLAMA_PRO_LAYERS}` in `{names.CONFIG}` names them. The licence of the
base goes for this model too.

Train them, and nothing else:

    litlora finetune pro . --data FILE

{how_to_use()}"""
