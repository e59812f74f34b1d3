"""A base with a larger vocabulary: for text that its tokenizer cuts into many pieces, such as another language.

The tokenizer gets more tokens and the merges that lead to them; the embedding and the head get a row for each, the mean of the
rows of the pieces that the token stands for (Gee et al. 2022, arXiv:2402.09977). Everything else is the base, byte for byte. No
torch here.

    text.py      what is learnt from and measured on
    tokens.py    which tokens, by which merges
    weights.py   the rows, and the files of weights
"""

import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litlora import families
from litlora.checkpoint import names
from litlora.checkpoint.card import typed
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import check_free_space, check_outside, check_writable, commit_directory, make_directory
from litlora.checkpoint.fingerprint import combine
from litlora.checkpoint.reading import file_in, read_bytes, read_json, sha256
from litlora.checkpoint.tokenizers import template_files
from litlora.errors import UserError
from litlora.safetensors_file import DTYPE_BITS
from litlora.vocabulary.text import first_lines, lines_of, split_off_tail, tokens_per_character
from litlora.vocabulary.tokens import Vocabulary, learn, take
from litlora.vocabulary.weights import Digests, Weights, find_weights, new_shape, write_weights

__all__ = [
    "Plan",
    "Vocabulary",
    "extend",
    "first_lines",
    "learn",
    "lines_of",
    "prepare",
    "split_off_tail",
    "take",
    "tokens_per_character",
]

KEPT_FILES = (
    names.SPECIAL_TOKENS,
    names.GENERATION_CONFIG,
    *names.LICENCE_FILES,
    *names.PROCESSOR_FILES,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A base that can be extended, and where the new one goes. Its vocabulary is what grows before `extend` writes it all."""

    base: Checkpoint
    out_dir: Path
    vocabulary: Vocabulary
    weights: Weights

    @property
    def base_bytes(self) -> int:
        """All tensors of the base."""
        return sum(info.size for tensors in self.weights.files.values() for info in tensors.values())

    @property
    def new_bytes(self) -> int:
        """The same of the new model."""
        return sum(
            math.prod(new_shape(self.weights, name, info, self.vocabulary.size)) * DTYPE_BITS[info.dtype] // 8
            for tensors in self.weights.files.values()
            for name, info in tensors.items()
        )


def prepare(base: Checkpoint, out_dir: Path) -> Plan:
    """Look at everything that could stop it before any text is read. UserError says what does."""
    if not base.is_model:
        hint = f"litlora merge_lora {typed(str(base.path))}, then extend the result"
        raise UserError("is an adapter: a vocabulary belongs to a whole model", where=base.path, hint=hint)
    if os.path.lexists(out_dir):
        raise UserError("exists already; nothing is overwritten", where=out_dir, hint="--out_dir another directory")
    check_outside(out_dir, base.path)
    check_writable(out_dir)
    vocabulary = Vocabulary(base.tokenizer_dir())
    return Plan(base=base, out_dir=out_dir, vocabulary=vocabulary, weights=find_weights(base, vocabulary.size))


def extend(
    plan: Plan, *, source: Mapping[str, Any], measured: Mapping[str, Any] | None, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Write the new base to `plan.out_dir`, whole or not at all, and return what extend_vocab_report.json says.

    `source` and `measured` say where the tokens are from and what they save: they go into the report. `progress` is told the bytes
    of the base that are done. UserError where there is no new token; WorkError where the disk is full.
    """
    vocabulary, out_dir = plan.vocabulary, plan.out_dir.absolute()
    if not vocabulary.new:
        raise UserError("nothing to add: every token of it is there, or out of reach of the merges", where=vocabulary.path)
    vocabulary.check()
    check_free_space(out_dir, plan.new_bytes + 2**26)
    make_directory(out_dir.parent)
    with commit_directory(out_dir, needed_bytes=plan.new_bytes) as directory:
        digests = write_weights(plan.weights, directory, vocabulary.base_size, vocabulary.base_pieces(), progress)
        write_small_files(plan, directory)
        report = make_report(plan, source, measured, digests, directory)
        (directory / names.EXTEND_REPORT).write_bytes(as_json(report))
    return report


def write_small_files(plan: Plan, directory: Path) -> None:
    """What lies beside the weights. Other forms of the tokenizer (tokenizer.model, vocab.json ...) lack the new tokens and stay behind."""
    base = plan.base.path
    (directory / names.TOKENIZER).write_bytes(plan.vocabulary.encode())
    kept = {name: read_bytes(file_in(base, name)) for name in KEPT_FILES if (base / name).exists()}
    for name, data in (kept | template_files(base)).items():
        (directory / name).write_bytes(data)
    rows = max(plan.weights.rows, plan.vocabulary.size)
    (directory / names.CONFIG).write_bytes(as_json(families.with_changes(read_json(base, names.CONFIG), {"vocab_size": rows})))
    if not (directory / names.WEIGHTS).exists():
        (directory / names.WEIGHTS_INDEX).write_bytes(as_json(new_index(plan)))


def new_index(plan: Plan) -> dict[str, Any]:
    """The same tensors in the same files; what it says of their whole size is another."""
    values = read_json(plan.base.path, names.WEIGHTS_INDEX)
    metadata = values.get("metadata") if isinstance(values.get("metadata"), dict) else {}
    metadata = {key: value for key, value in (metadata or {}).items() if key != "total_parameters"}
    return values | {"metadata": metadata | {"total_size": plan.new_bytes}}


def make_report(
    plan: Plan, source: Mapping[str, Any], measured: Mapping[str, Any] | None, digests: Digests, directory: Path
) -> dict[str, Any]:
    """extend_vocab_report.json. It holds no time and no duration: the same input gives the same bytes."""
    vocabulary, rows = plan.vocabulary, plan.weights.rows
    spare = min(rows, vocabulary.size) - vocabulary.base_size
    weights = {path.name for path in plan.weights.files}
    return {
        "format_version": 1,
        "base": {"path": plan.base.recorded_path, "fingerprint": combine(digests.before), "bytes": plan.base_bytes},
        "extended": {"fingerprint": combine(digests.after), "bytes": plan.new_bytes},
        "kind": vocabulary.kind,
        "tokens": {
            "before": vocabulary.base_size,
            "after": vocabulary.size,
            "characters": len(vocabulary.characters),
            "merged": len(vocabulary.merged),
            "left_out": vocabulary.left_out,
        },
        "source": dict(source),
        "rows": {"before": rows, "after": max(rows, vocabulary.size), "spare_used": spare, "tensors": sorted(plan.weights.by_token)},
        "tokens_per_character": dict(measured) if measured else None,
        "versions": {"litlora": version(), "numpy": np.__version__, "python": platform.python_version()},
        "files": {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.name not in weights},
        "weights": dict(sorted(digests.after.items())),
    }


def version() -> str:
    from litlora import __version__

    return __version__


def as_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
