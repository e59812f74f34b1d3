"""Everything that could stop a merge, looked at before anything is written."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from litlora import families, peft
from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import check_free_space
from litlora.checkpoint.reading import sha256
from litlora.config import Config
from litlora.errors import UserError
from litlora.merge.tensors import DTYPES, WIDTH, read_float32
from litlora.safetensors_file import SafetensorsFile, TensorInfo


@dataclass(frozen=True, kw_only=True)
class Target:
    """A tensor of the base that an adapter changes, and the adapter's tensors that do it."""

    module: str
    a: str
    b: str
    magnitude: str | None  # DoRA's
    scale: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge that nothing speaks against any more."""

    checkpoint: Checkpoint
    base: Checkpoint
    config: Config
    out_dir: Path
    dtype: str | None  # the file's word; None: every tensor keeps its own
    overwrite: bool
    adapter: Path
    adapter_sha256: str
    files: dict[Path, dict[str, TensorInfo]]  # the base's files and what they hold
    targets: dict[str, Target]  # by the name of the tensor in those files

    def stored_dtype(self, name: str, info: TensorInfo) -> str:
        """What the merged model stores a tensor as."""
        keeps = self.dtype is None or info.dtype not in ("F16", "BF16", "F32", "F64") or families.is_derived(name)
        return info.dtype if keeps or self.dtype is None else self.dtype

    @property
    def base_bytes(self) -> int:
        """All tensors of the base."""
        return sum(info.size for tensors in self.files.values() for info in tensors.values())

    @property
    def merged_bytes(self) -> int:
        """The same of the merged model."""
        return sum(output_bytes(self, tensors) for tensors in self.files.values())


def prepare(checkpoint: Checkpoint, out_dir: Path | None = None, *, dtype: str = "keep", overwrite: bool = False) -> Plan:
    """Look at everything that could stop the merge before anything is written. UserError says what does."""
    if checkpoint.is_model:
        merged = (checkpoint.path / names.MERGE_REPORT).exists()
        what = "it is already merged" if merged else "it is a whole model, without an adapter"
        raise UserError(f"there is nothing to merge: {what}", where=checkpoint.path, hint="name a step: litlora merge_lora out/step-200")
    base = checkpoint.base()
    out_dir = out_dir or checkpoint.path / names.MERGED
    check_out_dir(out_dir, checkpoint, base, overwrite)
    config = base.config()
    files = base_files(base, config)
    adapter = checkpoint.adapter_file()
    record = checkpoint.manifest.files.get(adapter.name) if checkpoint.manifest else None  # compared when the step was resolved
    plan = Plan(
        checkpoint=checkpoint,
        base=base,
        config=config,
        out_dir=out_dir,
        dtype=None if dtype == "keep" else DTYPES[dtype],
        overwrite=overwrite,
        adapter=adapter,
        adapter_sha256=record.sha256 if record else sha256(adapter),
        files=files,
        targets=find_targets(checkpoint, config, adapter, files),
    )
    check_adapter(plan)
    check_dtypes(plan)
    check_free_space(out_dir, plan.merged_bytes + 2**24)
    return plan


def check_out_dir(out_dir: Path, checkpoint: Checkpoint, base: Checkpoint, overwrite: bool) -> None:
    real, root = out_dir.resolve(), base.path.resolve()
    if real == root or root in real.parents:
        raise UserError(f"a merge never writes into its base {base.path}", where=out_dir, hint="--out_dir another directory")
    if os.path.lexists(out_dir):
        earlier = (out_dir / names.MERGE_REPORT).is_file() and not out_dir.is_symlink()
        if not earlier:
            raise UserError("exists and is no earlier merge", where=out_dir, hint="--out_dir another directory")
        if not overwrite:
            raise UserError("holds a merged model already", where=out_dir, hint="--overwrite replaces it, once the new one is complete")
    parent = next(step for step in out_dir.absolute().parents if step.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        why = "cannot be written to" if parent.is_dir() else "is no directory"
        raise UserError(why, where=parent, hint="--out_dir a directory that you may write to")


def base_files(base: Checkpoint, config: Config) -> dict[Path, dict[str, TensorInfo]]:
    """The base's files and their tensors, after checking that they hold exactly the model that config.json describes."""
    files: dict[Path, dict[str, TensorInfo]] = {}
    for path in sorted(set(base.shards().values())):
        with SafetensorsFile(path) as file:
            files[path] = file.tensors
    found: dict[str, tuple[int, ...]] = {}
    for tensors in files.values():
        for name, info in tensors.items():
            if families.tensor_name(name) in found:
                raise UserError(f"the tensor {name} is there twice", where=base.path)
            found[families.tensor_name(name)] = info.shape
    expected = families.expected_tensors(config)
    extra = [name for name in found.keys() - expected.keys() if not families.is_derived(name)]
    if config.tie_word_embeddings:
        extra = [name for name in extra if name != "lm_head.weight"]  # a copy of the embedding, which every reader ignores
    faults = [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    faults += [f"unexpected: {name} {found[name]}" for name in sorted(extra)]
    faults += [f"wrong shape: {n} {found[n]}, needed {expected[n]}" for n in expected if n in found and found[n] != expected[n]]
    if faults:
        what = "\n".join([f"the base's tensors are not those of its {names.CONFIG}", *(f"  {fault}" for fault in faults)])
        raise UserError(what, where=base.path, hint="copy or download the base again")
    return files


def find_targets(checkpoint: Checkpoint, config: Config, path: Path, files: Mapping[Path, Mapping[str, TensorInfo]]) -> dict[str, Target]:
    """Which of the base's tensors the adapter changes. UserError, naming every tensor: left over, missing, or of the wrong shape."""
    adapter, shapes = checkpoint.adapter_config(), families.linear_shapes(config)
    with SafetensorsFile(path) as file:
        found = {name: info.shape for name, info in file.tensors.items() if peft.copied_base_tensor(name) is None}
    modules = peft.targets(adapter, list(shapes))
    if config.tie_word_embeddings and "lm_head" in modules:
        raise UserError(
            "the adapter sits on lm_head, which this base shares with its embedding: merging would change both",
            where=checkpoint.path,
            hint="use the adapter unmerged (litlora chat), or train without lm_head among the targets",
        )
    peft.check_tensors(found, peft.expected_adapter_tensors(adapter, shapes), path)
    stored = {families.tensor_name(name): name for tensors in files.values() for name in tensors}
    targets = {}
    for module in modules:
        r, alpha = peft.rank_and_alpha(adapter, module)
        a, b, magnitude = (peft.to_peft_name(f"{module}{peft.HOST_SLOT}{part}") for part in ("lora_A", "lora_B", "magnitude"))
        targets[stored[f"{module}.weight"]] = Target(
            module=module, a=a, b=b, magnitude=magnitude if adapter.use_dora else None, scale=peft.scale(alpha, r, adapter.use_rslora)
        )
    return targets


def check_adapter(plan: Plan) -> None:
    """Its numbers are finite, and they are not all without effect."""
    infinite, moves = [], False
    with SafetensorsFile(plan.adapter) as file:
        for target in plan.targets.values():
            for name in filter(None, (target.a, target.b, target.magnitude)):
                values = read_float32(file, name)
                infinite += [] if np.isfinite(values).all() else [name]
                moves = moves or name == target.magnitude or (name == target.b and target.scale != 0 and bool(values.any()))
    if infinite:
        raise UserError(
            "\n  ".join(["these tensors hold values that are not finite:", *infinite]), where=plan.adapter, hint="use an earlier step"
        )
    if not moves:
        raise UserError(
            "the adapter changes nothing: every lora_B is zero", where=plan.adapter, hint="train it first, or use the base as it is"
        )


def check_dtypes(plan: Plan) -> None:
    for path, tensors in plan.files.items():
        for name, info in tensors.items():
            computed = name in plan.targets or plan.stored_dtype(name, info) != info.dtype
            if computed and info.dtype not in WIDTH:
                raise UserError(
                    f"{name} is {info.dtype}, which cannot be merged into", where=path, hint="use a base in float32, bfloat16 or float16"
                )


def output_bytes(plan: Plan, tensors: Mapping[str, TensorInfo]) -> int:
    """The data of one merged file."""
    return sum(
        info.size if (dtype := plan.stored_dtype(name, info)) == info.dtype else math.prod(info.shape) * WIDTH[dtype]
        for name, info in tensors.items()
    )
