"""A checkpoint: a directory that was recognised, and what can be asked of it without torch.

base      a Hugging Face model as downloaded or merged: config.json and its weights
step      one of our own: litlora.json, and what was trained on a base, or (method `full`) a whole model
adapter   a PEFT adapter without our manifest
"""

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from litlora.checkpoint import fingerprint, names
from litlora.checkpoint.manifest import BaseRecord, Manifest, has_state, read_state
from litlora.checkpoint.reading import file_in, read_json
from litlora.checkpoint.shards import find_shards
from litlora.config import Config
from litlora.errors import UserError, located
from litlora.families import config_from_hf
from litlora.methods import from_manifest, from_peft
from litlora.methods.tuning import Tuning
from litlora.peft import AdapterConfig, adapter_config_from_peft, is_prompt, prompt_from_peft

Kind = Literal["base", "step", "adapter"]


@dataclass(frozen=True)
class Checkpoint:
    """Made by `resolve`. Every method raises UserError, naming the file, where the directory does not hold what is asked."""

    path: Path
    kind: Kind
    why: str = ""  # how it was chosen, for the user; empty where the path itself was given
    manifest: Manifest | None = None  # of a step
    base_dir: Path | None = None  # where the user says that the base is now
    looks_only: bool = False  # described and never computed with: its weights, or its base's, are not read for a fingerprint

    @property
    def is_model(self) -> bool:
        """Whether it holds all weights of a model: a base, or a step of method `full`. If not, it is an adapter on `base()`."""
        return self.kind == "base" or (self.manifest is not None and self.manifest.base is None)

    @property
    def is_demo(self) -> bool:
        return self.path == names.DEMO_BASE

    @property
    def typed(self) -> str:
        """How a command is given it, and names it: `demo`, or its path."""
        return names.DEMO if self.is_demo else str(self.path)

    @property
    def recorded_path(self) -> str:
        """How a manifest names it as a base: `demo`, or its absolute path."""
        return names.DEMO if self.is_demo else str(self.path.resolve())

    def base(self) -> "Checkpoint":
        """The model that an adapter belongs to, with the weights it was trained on; a whole model gives itself."""
        return self if self.is_model else self._base

    def config(self) -> Config:
        """The shape of the model."""
        model = self.base()
        return config_from_hf(read_json(model.path, names.CONFIG), model.path / names.CONFIG)

    def shards(self) -> dict[str, Path]:
        """Tensor name as stored -> file that holds it, of the whole model below. Headers and sizes of all files are checked."""
        return self.base()._shards

    def fingerprint(self) -> str:
        """Of the model's weights; of an adapter, its base's."""
        return self.base()._fingerprint

    def tokenizer_dir(self) -> Path:
        """The directory whose tokenizer goes with it: its own, else its base's."""
        return self.path if names.has_vocabulary(self.path) else self.base().path

    @property
    def method(self) -> str:
        """The word after `litlora finetune` that makes such adapters."""
        if self.manifest:
            return self.manifest.method
        return "adapter" if is_prompt(self.peft_values()) else "lora"

    def tuning(self) -> Tuning:
        """What it does to its base; UserError of a whole model."""
        if self.is_model:
            raise UserError("is a whole model, not an adapter", where=self.path)
        config, manifest, where = self.config(), self.manifest, self.path / names.ADAPTER_CONFIG
        if manifest and manifest.method != "lora":
            return from_manifest(manifest.method, manifest.options, config, self.path / names.MANIFEST)
        if is_prompt(self.peft_values()):
            tuning = from_manifest("adapter", prompt_from_peft(self.peft_values(), where), config, where)
            if not tuning.in_peft:  # methods.peft_prompts says where
                raise UserError(f"PEFT computes something else for such prompts on this {config.model_type} model", where=where)
            return tuning
        described = self.adapter_config()
        with located(where):
            return from_peft(described, config, untied=bool(manifest.options.get("untie")) if manifest else None)

    def adapter_config(self) -> AdapterConfig:
        """How PEFT describes its LoRA."""
        return adapter_config_from_peft(self.peft_values(), self.path / names.ADAPTER_CONFIG)

    def peft_values(self) -> dict[str, Any]:
        """What its adapter_config.json says, unchecked."""
        return read_json(self.path, names.ADAPTER_CONFIG)

    def adapter_file(self) -> Path:
        """What was trained: PEFT's file, or ours where PEFT does not know the method."""
        own = self.manifest is not None and names.OWN_ADAPTER_WEIGHTS in self.manifest.files
        return file_in(self.path, names.OWN_ADAPTER_WEIGHTS if own else names.ADAPTER_WEIGHTS)

    def training_state(self) -> dict[str, Any]:
        """What `TrainingState.values` was when this step was committed; its tensors were checked against their hash too."""
        if self.manifest is None or not has_state(self.path):
            raise UserError("has no training state", where=self.path, hint="train on from its weights: --checkpoint_dir")
        return read_state(self.path, self.manifest)

    def training_values(self) -> dict[str, Any]:
        """The values that the run itself saved with its optimizer's state (state.py)."""
        values: dict[str, Any] = self.training_state()["values"]
        return values

    @property
    def quantize(self) -> str:
        """In which few bits its training held the base's weights, in the word of --quantize; none of a whole model."""
        return self.manifest.base.quantize if self.manifest and self.manifest.base else "none"

    def record(self, run: Path, quantize: str = "none") -> BaseRecord:
        """What the manifests of `run` say about this model when it is their base."""
        step = run.resolve() / names.step_name(0)
        relative = "" if self.is_demo else os.path.relpath(self.path.resolve(), step)
        model_type, fingerprint = self.config().model_type, "" if self.looks_only else self.fingerprint()
        return BaseRecord(path=self.recorded_path, model_type=model_type, fingerprint=fingerprint, relative=relative, quantize=quantize)

    @cached_property
    def _shards(self) -> dict[str, Path]:
        shards = find_shards(self.path)
        if self.manifest is not None:
            foreign = sorted(path.name for path in set(shards.values()) if path.name not in self.manifest.files)
            if foreign:
                raise UserError("was not committed with this checkpoint", where=self.path / foreign[0], hint="move it away")
        return shards

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint.fingerprint(self._shards)

    @cached_property
    def _base(self) -> "Checkpoint":
        from litlora.checkpoint.base import find_base  # it resolves paths, and so makes Checkpoints

        base = find_base(self)
        return replace(base, looks_only=True) if self.looks_only else base
