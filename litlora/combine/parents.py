"""What is combined: checkpoints of one base, looked at before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.files import open_prompts
from litlora.checkpoint.reading import sha256
from litlora.console import warn
from litlora.errors import UserError
from litlora.merge.plan import check_values
from litlora.methods.tuning import LoRASlot, Tuning
from litlora.prompts import Prompts
from litlora.safetensors_file import SafetensorsFile


@dataclass(frozen=True)
class Parent:
    """A step, a PEFT adapter or a whole model."""

    checkpoint: Checkpoint

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def is_model(self) -> bool:
        return self.checkpoint.is_model

    @cached_property
    def tuning(self) -> Tuning:
        """What it does to its base; without dropout, which is nothing of the result."""
        tuning = self.checkpoint.tuning()
        slots = {slot: replace(kind, dropout=0.0) if isinstance(kind, LoRASlot) else kind for slot, kind in tuning.slots.items()}
        return replace(tuning, slots=slots)

    @cached_property
    def identity(self) -> dict[str, str]:
        """The hash of what was trained: of an adapter's file, or of all weights of a model."""
        if self.is_model:
            return {"fingerprint": self.checkpoint.fingerprint()}
        file, manifest = self.checkpoint.adapter_file(), self.checkpoint.manifest
        record = manifest.files.get(file.name) if manifest else None  # compared when the step was resolved
        return {"sha256": record.sha256 if record else sha256(file)}

    @cached_property
    def stored(self) -> dict[str, str]:
        """Parameter -> the tensor of its file. (Of a matrix that stands there under two names, one.)"""
        return {parameter: name for name, parameter in self.tuning.file_names(self.checkpoint.config()).items()}

    @cached_property
    def prompts(self) -> Prompts | None:
        """How it is spoken to; None where it has no tokenizer."""
        return open_prompts(self.checkpoint) if names.has_vocabulary(self.checkpoint.tokenizer_dir()) else None

    def record(self, weight: float) -> dict[str, Any]:
        """What the lineage of the result says of it."""
        manifest = self.checkpoint.manifest
        made = {"lineage": list(manifest.lineage)} if manifest and manifest.lineage else {}
        step = manifest.step if manifest else None
        return {"path": str(self.path.resolve()), **self.identity, "step": step, "weight": weight, **made}


def check_parents(parents: Sequence[Parent]) -> None:
    """UserError where one stands there twice, adapters are of different bases or unsound, or tokenizers differ."""
    seen: set[Path] = set()
    for parent in parents:
        if parent.path.resolve() in seen:
            raise UserError("is given twice", where=parent.path, hint=f"give it a weight: {parent.path}:2")
        seen.add(parent.path.resolve())
    adapters = [parent for parent in parents if not parent.is_model]
    for parent in adapters[1:]:
        check_base(parent, adapters[0])
    check_tokenizers(parents)
    for parent in adapters:
        with SafetensorsFile(parent.checkpoint.adapter_file()) as file:
            check_values(file, parent.tuning, parent.checkpoint.config())
        if parent.checkpoint.manifest is None:
            warn(f"{parent.path} does not say which weights it was trained on, so nobody can tell whether this base is the right one")


def check_base(parent: Parent, first: Parent) -> None:
    """Each knows its own base by fingerprint, or (of PEFT) by path or `--base_dir`; here the bases are compared."""
    ours, theirs = parent.checkpoint.base(), first.checkpoint.base()
    if ours.path.resolve() != theirs.path.resolve() and ours.fingerprint() != theirs.fingerprint():
        context = [f"{base.fingerprint()} ({base.path}) of {of.path}" for of, base in ((first, theirs), (parent, ours))]
        hint = "only adapters of one base can be combined; of merged models litlora combine makes averages, too"
        raise UserError("is an adapter on another base", where=parent.path, context=context, hint=hint)


def check_tokenizers(parents: Sequence[Parent]) -> None:
    """One vocabulary for all; of chat templates the first one's is taken, and differing ones are named."""
    first = parents[0]
    for parent in parents[1:]:
        if vocabulary(parent) != vocabulary(first):
            where, hint = parent.path, "ids of one would mean something else to the other"
            raise UserError(f"has another tokenizer than {first.path}", where=where, hint=hint)
    templates = {parent.path: template_hash(parent) for parent in parents}
    odd = [str(path) for path, template in templates.items() if template != templates[first.path]]
    if odd:
        warn(f"{', '.join(odd[:3])}: another chat template than {first.path}, whose template the result gets")


def vocabulary(parent: Parent) -> str:
    """What its ids mean, as a hash; empty where it has no tokenizer. What ends an answer may differ: a base and what was made of it."""
    return parent.prompts.tokenizer.vocabulary_hash if parent.prompts else ""


def template_hash(parent: Parent) -> str:
    recorded = parent.checkpoint.manifest.chat_template if parent.checkpoint.manifest else ""
    return recorded or (parent.prompts.template_hash if parent.prompts else "")


def common(values: Sequence[str]) -> str:
    """What all of them say, or nothing."""
    return values[0] if len(set(values)) == 1 else ""


def differences(first: Tuning, other: Tuning) -> list[str]:
    """What two tunings do not have in common, a line each."""
    lines = [
        f"{slot}: {first.slots.get(slot)} there, {other.slots.get(slot)} here"
        for slot in {**first.slots, **other.slots}
        if first.slots.get(slot) != other.slots.get(slot)
    ]
    for what in ("inserted", "whole", "untied"):
        mine, theirs = getattr(first, what), getattr(other, what)
        lines += [f"{what}: {mine} there, {theirs} here"] if mine != theirs else []
    return lines
