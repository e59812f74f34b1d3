"""A whole model made of whole models, or of what adapters on one base mean: block by block, nothing is loaded as a whole.

A mean of the parameters needs no base. Everything else is theta_0 + the combination of theta_i - theta_0, where theta_0 is the base
of the adapters, or what `--base_dir` names. Sums are taken in fp64, made fp32 and rounded once to what is stored. TIES reads every tensor
three times: twice to find out which numbers are its largest.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.combine.arithmetic import Array
from litlora.combine.parents import Parent
from litlora.combine.recipe import Recipe
from litlora.config import Config
from litlora.errors import UserError, WorkError
from litlora.families import stored_name
from litlora.merge.directory import config_bytes, copy_files
from litlora.merge.effective import Effective
from litlora.merge.outputs import Output
from litlora.merge.tensors import write_at
from litlora.merge.weights import new_file
from litlora.methods import refuse_part
from litlora.safetensors_file import DTYPES, SafetensorsFile, from_float32

# What two models may say differently in config.json: nothing that is computed with depends on it.
NO_ARITHMETIC = {"torch_dtype", "initializer_range", "llama_pro_layers", "bos_token_id", "eos_token_ids", "pad_token_id"}


@dataclass(frozen=True, kw_only=True)
class ModelBlend:
    """A whole model to be made."""

    parents: tuple[Parent, ...]  # those with a weight
    recipe: Recipe  # with their weights
    base: Checkpoint | None  # theta_0; None where it drops out
    outputs: dict[str, Output]  # parameter -> name, shape and dtype in the result
    dtype: str | None  # the file's word; None: the first parent's own dtypes

    @property
    def bytes(self) -> int:
        return sum(output.size for output in self.outputs.values())


def model_blend_of(parents: Sequence[Parent], recipe: Recipe, *, base: Checkpoint | None = None, dtype: str = "keep") -> ModelBlend:
    """What will be made. UserError where the models have other shapes, or a base is needed and none is known."""
    live = [number for number, weight in enumerate(recipe.weights) if weight != 0]
    parents, recipe = tuple(parents[number] for number in live), replace(recipe, weights=tuple(recipe.weights[number] for number in live))
    word = None if dtype == "keep" else DTYPES[dtype]
    if recipe.is_mean:
        base = None
    elif base is None:
        bases = {parent.checkpoint.base().path: parent.checkpoint.base() for parent in parents if not parent.is_model}
        if not bases:
            what = f"{recipe.how} is about what was changed of a base, and whole models do not say which one"
            raise UserError(what, where="--base_dir", hint="--base_dir the model that all of them began as")
        base = next(iter(bases.values()))
    with Effective(parents[0].checkpoint) as first:
        for checkpoint in [*(parent.checkpoint for parent in parents[1:]), *([base] if base else [])]:
            with Effective(checkpoint) as other:
                check_shape(first, other)
        refuse_part(first.config, "combine writes a whole model")
        outputs = {
            name: replace(output, name=stored_name(name, first.config), dtype=word or output.dtype)
            for name, output in first.outputs.items()
        }
    return ModelBlend(parents=parents, recipe=recipe, base=base, outputs=outputs, dtype=word)


def check_shape(first: Effective, other: Effective) -> None:
    """UserError where two models do not have the same tensors, or compute differently with them."""
    what = f"is a model of another shape than {first.checkpoint.path}"
    faults = [f"{name}: {first.shapes.get(name)} there, {other.shapes.get(name)} here" for name in {**first.shapes, **other.shapes}]
    faults = [
        fault
        for fault, name in zip(faults, {**first.shapes, **other.shapes}, strict=True)
        if first.shapes.get(name) != other.shapes.get(name)
    ]
    for field in fields(Config):
        mine, theirs = getattr(first.config, field.name), getattr(other.config, field.name)
        if field.name not in NO_ARITHMETIC and mine != theirs:
            faults.insert(0, f"{field.name}: {mine} there, {theirs} here")
    if faults:
        raise UserError(what, where=other.checkpoint.path, context=faults, hint="only models with the same tensors can be combined")


def write_model(blend: ModelBlend, directory: Path, progress: Callable[[int], None] = lambda done: None) -> None:
    """The weights, config.json and what goes with it. WorkError where a number is not finite, or larger than its dtype holds."""
    with ExitStack() as stack:
        sources = [stack.enter_context(Effective(parent.checkpoint)) for parent in blend.parents]
        base = stack.enter_context(Effective(blend.base)) if blend.base else None
        homes: dict[Path, list[Output]] = {}
        for name, output in blend.outputs.items():
            homes.setdefault(sources[0].base_file(sources[0].outputs[name]).path, []).append(output)
        done = 0
        for home, outputs in homes.items():
            with SafetensorsFile(home) as old, new_file(tuple(outputs), old, directory / home.name) as (sink, places):
                for output in outputs:
                    start = places[output.name].start
                    for block in combined(blend, output.parameter, sources, base):
                        raw = as_stored(block, output)
                        write_at(sink, raw, start)
                        start += len(raw)
                    done += output.size
                    progress(done)
        if not (directory / names.WEIGHTS).exists():
            weight_map = {output.name: home.name for home, outputs in homes.items() for output in outputs}
            index = {"metadata": {"total_size": blend.bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (directory / names.WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
        model = replace(sources[0].model, dtype=blend.dtype)
        (directory / names.CONFIG).write_bytes(config_bytes(model))
        copy_files(model.base.path, (names.GENERATION_CONFIG, *names.LICENCE_FILES), directory)


def combined(blend: ModelBlend, name: str, sources: Sequence[Effective], base: Effective | None) -> Iterator[Array]:
    """One parameter's numbers in fp32, in order."""
    recipe, present = blend.recipe, range(len(sources))
    if base is None:
        for means in zip(*(source.blocks(name) for source in sources), strict=True):
            yield recipe.of(means, present, []).astype(np.float32)
        return
    if all(is_of(base, source, name) for source in sources):
        yield from base.blocks(name)
        return
    updates = [functools.partial(changes, source, base, name) for source in sources]
    picks = recipe.picks(updates, math.prod(base.shapes[name]), [f"{parent.identity} {name}" for parent in blend.parents])
    for old, *blocks in zip(*(source.blocks(name) for source in (base, *sources)), strict=True):
        picked = [pick(block - old) for pick, block in zip(picks, blocks, strict=True)]
        yield (old + recipe.sum(picked, present)).astype(np.float32)


def is_of(base: Effective, source: Effective, name: str) -> bool:
    """Whether a parameter is the base's own tensor, which nothing was added to."""
    output = source.outputs[name]
    return output.update is None and output.value is None and source.base_file(output).path == base.base_file(base.outputs[name]).path


def changes(source: Effective, base: Effective, name: str) -> Iterator[Array]:
    """How far a parameter lies from the base's, block by block."""
    for block, old in zip(source.blocks(name), base.blocks(name), strict=True):
        yield block - old


def as_stored(values: Array, output: Output) -> bytes:
    if not np.isfinite(values).all():
        raise WorkError(f"combined, {output.name} is not finite", hint="smaller weights, or look at the parents: litlora verify")
    raw = from_float32(values, output.dtype)
    if output.dtype == "F16" and float(np.abs(values).max(initial=0.0)) >= 65520:
        raise WorkError(f"combined, {output.name} is larger than float16 holds", hint="--dtype float32")
    return raw
