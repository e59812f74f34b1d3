"""An adapter made of adapters. What kind of sum it is depends on what they are:

one       a single parent with weight 1: its tensors, byte for byte
low rank  LoRA, whatever the ranks, targets and scales: the updates are added, exactly, by stacking the factors
          (`arithmetic.stacked`); a smaller rank is a truncated SVD; TIES and DARE work on the updates B A themselves
same      anything else, of identical structure: number by number, relative to what each number was before training.
          Of DoRA, bottlenecks and prompts, which are not linear in what they learn, only a mean of the parameters means anything

Tensors trained whole (modules_to_save, freeze, norms) take part as theta_0 + the combination of theta_i - theta_0, whatever the kind.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import Tensors
from litlora.combine.arithmetic import Array, Cut, Factors, factored, shortened, stacked
from litlora.combine.parents import Parent, differences
from litlora.combine.recipe import Recipe
from litlora.errors import UserError, WorkError
from litlora.families import expected_tensors, linear_shapes, tensor_name
from litlora.merge.tensors import read_float32
from litlora.methods import from_peft, lora_config, lora_options
from litlora.methods.tuning import EMBEDDING, BottleneckSlot, LoRASlot, ScaleShiftSlot, Tuning
from litlora.options import AdapterOptions
from litlora.peft import adapter_config_to_peft, prompt_from_peft, scale
from litlora.safetensors_file import SafetensorsFile

MERGE_FIRST = "merge each with litlora merge_lora and combine the merged models, or --whole"


@dataclass(frozen=True, kw_only=True)
class Blend:
    """An adapter to be made, and what its manifest and its config say of it."""

    parents: tuple[Parent, ...]  # those with a weight
    recipe: Recipe  # with their weights
    kind: str  # one, low rank, same
    tuning: Tuning
    method: str
    options: dict[str, Any]
    described: dict[str, Any] | None  # adapter_config.json
    rank: int | None = None

    @property
    def base(self) -> Checkpoint:
        return self.parents[0].checkpoint.base()

    @property
    def bytes(self) -> int:
        """Of its tensors, at most."""
        return sum(4 * int(np.prod(shape)) for shape in self.tuning.file_shapes(self.base.config()).values())

    @property
    def file(self) -> str:
        return names.ADAPTER_WEIGHTS if self.tuning.in_peft else names.OWN_ADAPTER_WEIGHTS


@dataclass
class Blended:
    """What was computed."""

    tensors: Tensors
    cuts: dict[str, Cut] = field(default_factory=dict)  # module -> what a smaller rank cost
    ranks: dict[str, int] = field(default_factory=dict)


def blend_of(parents: Sequence[Parent], recipe: Recipe, rank: int | None = None) -> Blend:
    """What will be made of adapters on one base. UserError where they cannot be combined so."""
    live = [number for number, weight in enumerate(recipe.weights) if weight != 0]
    parents, recipe = tuple(parents[number] for number in live), replace(recipe, weights=tuple(recipe.weights[number] for number in live))
    check_methods(parents)
    first = parents[0]
    plain = all(isinstance(kind, LoRASlot) and not kind.use_dora for parent in parents for kind in parent.tuning.slots.values())
    is_lora = first.checkpoint.method == "lora" and plain
    if rank is not None and not is_lora:
        raise UserError("only plain LoRA has a rank to choose", where="--rank", hint="leave it out")
    if recipe.is_linear and recipe.weights == (1.0,) and not cuts(first.tuning, rank):
        return described(first.tuning, parents, recipe, "one")
    if is_lora:
        return described(low_rank_tuning(parents, recipe, rank), parents, recipe, "low rank", rank)
    check_same(parents)
    check_meaning(parents, recipe)
    return described(first.tuning, parents, recipe, "same")


def make(blend: Blend, progress: Callable[[int], None] = lambda done: None) -> Blended:
    """Compute it, module by module; `progress` is told how many tensors are done. WorkError where a number is not finite."""
    stored = blend.tuning.file_names(blend.base.config())
    with ExitStack() as stack:
        files = [stack.enter_context(SafetensorsFile(parent.checkpoint.adapter_file())) for parent in blend.parents]
        if blend.kind == "one":
            infos = {name: files[0].tensors[name] for name in stored}
            return Blended({name: (info.dtype, info.shape, bytes(files[0].bytes(name))) for name, info in infos.items()})
        found, values = Blended({}), {}
        with np.errstate(all="ignore"):  # what is not finite is looked for below
            for part in parts(blend, files, found):
                values.update(part)
                progress(len(values))
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise WorkError(f"combined, {name} is not finite", hint="smaller weights: the sum is more than fp32 holds")
    return replace(found, tensors={name: ("F32", values[parameter].shape, values[parameter]) for name, parameter in stored.items()})


def parts(blend: Blend, files: Sequence[SafetensorsFile], found: Blended) -> Iterator[dict[str, Array]]:
    """The result's parameters by their names, some at a time; what smaller ranks cost goes into `found`."""
    low_rank = blend.kind == "low rank"
    for slot, kind in blend.tuning.slots.items() if low_rank else ():
        assert isinstance(kind, LoRASlot)
        (b, a), cut = added(blend, slot, kind.r, files)
        module = slot.removesuffix(".adapter")
        found.ranks[module] = kind.r
        if cut is not None:
            found.cuts[module] = cut
        yield {f"{slot}.lora_A": a, f"{slot}.lora_B": b}
    for name in blend.tuning.whole if low_rank else blend.tuning.parameters(blend.base.config()):
        yield {name: moved(blend, name, files)}


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def low_rank_tuning(parents: Sequence[Parent], recipe: Recipe, rank: int | None) -> Tuning:
    """Where the result has LoRA, of which rank, and what it has whole. Its scale is 1 everywhere: alpha is r."""
    config = parents[0].checkpoint.config()
    untied = any(parent.tuning.untied for parent in parents)
    for parent in parents:
        if untied and not parent.tuning.untied and EMBEDDING in parent.tuning.whole and config.tie_word_embeddings:
            what = "trains embedding and head as one matrix, and another checkpoint has separated them"
            raise UserError(what, where=parent.path, hint=MERGE_FIRST)
    whole = {name for parent in parents for name in parent.tuning.whole}
    ranks: Counter[str] = Counter()
    for parent in parents:
        for slot, kind in parent.tuning.slots.items():
            assert isinstance(kind, LoRASlot)
            ranks[slot] += kind.r
            if f"{slot.removesuffix('.adapter')}.weight" in whole:
                what = f"has LoRA on {slot.removesuffix('.adapter')}, which another checkpoint trains whole"
                raise UserError(what, where=parent.path, hint=MERGE_FIRST)
    slots = {}
    for module, shape in linear_shapes(config).items():
        if (slot := f"{module}.adapter") in ranks:
            r = ranks[slot]
            if not recipe.is_linear or (rank is not None and rank < r):
                r = min(r if rank is None else rank, *shape)
            slots[slot] = LoRASlot(r=r, alpha=float(r))
    order = expected_tensors(replace(config, tie_word_embeddings=config.tie_word_embeddings and not untied))
    return Tuning(slots=slots, whole=tuple(name for name in order if name in whole), untied=untied, in_peft=True)


def cuts(tuning: Tuning, rank: int | None) -> bool:
    """Whether a rank is asked for that is below one it has."""
    return rank is not None and any(isinstance(kind, LoRASlot) and kind.r > rank for kind in tuning.slots.values())


def added(blend: Blend, slot: str, rank: int, files: Sequence[SafetensorsFile]) -> tuple[Factors, Cut | None]:
    """One module's factors, for a scale of 1; and what they cost, where they are an approximation or might have been one."""
    recipe, present = blend.recipe, [number for number, parent in enumerate(blend.parents) if slot in parent.tuning.slots]
    factors: list[Factors] = []
    scales: list[float] = []
    for number in present:
        parent, kind = blend.parents[number], blend.parents[number].tuning.slots[slot]
        assert isinstance(kind, LoRASlot)
        b, a = (read_float32(files[number], parent.stored[f"{slot}.{side}"]) for side in ("lora_B", "lora_A"))
        factors.append((b, a))
        scales.append(scale(kind.alpha, kind.r, kind.use_rslora))
    if recipe.is_linear:
        exact = stacked(factors, [recipe.weights[number] * of for number, of in zip(present, scales, strict=True)])
        if blend.rank is None:
            return exact, None
        short, cut = shortened(exact, rank)
        return (short, cut) if rank < len(exact[1]) else (exact, replace(cut, lost=0.0))
    updates = [b @ a for b, a in (stacked([pair], [of]) for pair, of in zip(factors, scales, strict=True))]
    keys = [f"{blend.parents[number].identity} {slot}" for number in present]
    return factored(recipe.of(updates, present, keys), rank)


# ---- number by number ------------------------------------------------------------------------------------------------


def moved(blend: Blend, name: str, files: Sequence[SafetensorsFile]) -> Array:
    """One parameter: theta_0 + the combination of theta_i - theta_0; of a mean sum_i w_i theta_i, which is the same."""
    recipe = blend.recipe
    present = [number for number, parent in enumerate(blend.parents) if name in parent.stored]
    values = [read_float32(files[number], blend.parents[number].stored[name]) for number in present]
    if recipe.is_mean and len(present) == len(blend.parents):
        return recipe.of(values, present, []).astype(np.float32)
    start = start_of(name, blend.base, values[0].shape)
    keys = [f"{blend.parents[number].identity} {name}" for number in present]
    return (start + recipe.of([value - start for value in values], present, keys)).astype(np.float32)


def start_of(name: str, base: Checkpoint, shape: tuple[int, ...]) -> Array:
    """What a parameter was before training: the base's, of a separated head the embedding, of a new block its neighbour's (what
    writes last to the residual stream silent), of a scale 1 and of a shift 0."""
    module, _, part = name.rpartition(".")
    if module.endswith(".adapter"):
        return np.full(shape, float(part == "scale"), np.float32)
    fill = base.config().silence(name) if ".inserted." in name else None
    if fill is not None:
        return np.full(shape, fill, np.float32)
    homes = {tensor_name(stored, base.config()): (stored, path) for stored, path in base.shards().items()}
    plain = name.replace(".inserted.", ".")
    stored, path = homes[plain] if plain in homes else homes[EMBEDDING]
    with SafetensorsFile(path) as file:
        return read_float32(file, stored)


# ---- what cannot be combined -----------------------------------------------------------------------------------------


def check_methods(parents: Sequence[Parent]) -> None:
    first = parents[0]
    for parent in parents[1:]:
        if parent.checkpoint.method != first.checkpoint.method:
            what = f"was trained by {parent.checkpoint.method}, and {first.path} by {first.checkpoint.method}"
            raise UserError(what, where=parent.path, hint=MERGE_FIRST)


def check_same(parents: Sequence[Parent]) -> None:
    """Parameters are averaged one by one only where all have the same."""
    first = parents[0]
    for parent in parents[1:]:
        if found := differences(first.tuning, parent.tuning):
            what = f"is built otherwise than {first.path}, and only plain LoRA can be combined then"
            raise UserError(what, where=parent.path, context=found, hint=MERGE_FIRST)


def check_meaning(parents: Sequence[Parent], recipe: Recipe) -> None:
    """What is not linear in its parameters has a mean of them, and nothing else."""
    kinds = {unlinear(kind) for kind in parents[0].tuning.slots.values()} - {""}
    if kinds and not recipe.is_mean:
        what = f"{recipe.how} with these weights means nothing for {kinds.pop()}: what it adds is not linear in its parameters"
        raise UserError(what, where=parents[0].path, hint=f"--how average or interpolate; of DoRA: {MERGE_FIRST}")


def unlinear(kind: Any) -> str:
    """In words, an adapter whose effect is not linear in its parameters, with a start that is not recorded; empty for others."""
    if isinstance(kind, LoRASlot):
        return "DoRA" if kind.use_dora else ""
    return "" if isinstance(kind, ScaleShiftSlot) else "bottlenecks" if isinstance(kind, BottleneckSlot) else "learnt prompts"


# ---- how it is described ---------------------------------------------------------------------------------------------


def described(tuning: Tuning, parents: tuple[Parent, ...], recipe: Recipe, kind: str, rank: int | None = None) -> Blend:
    """The Blend, with the options and the adapter_config.json that mean exactly `tuning`."""
    first = parents[0].checkpoint
    base, config, values = first.base(), first.config(), None
    path = str(base.path.resolve())
    if first.method == "lora":
        options = lora_options(tuning, config)
        peft = lora_config(options, config, path)
        meant = from_peft(peft, config, untied=options.untie)
        assert meant == tuning, f"{options} would mean {meant}, not {tuning}"
        recorded, values = asdict(options), adapter_config_to_peft(peft)
    else:
        options_of_peft = {} if first.manifest else prompt_from_peft(first.peft_values(), first.path)
        recorded = dict(first.manifest.options) if first.manifest else asdict(AdapterOptions(**options_of_peft))
        values = first.peft_values() | {"base_model_name_or_path": path} if tuning.in_peft else None
    return Blend(
        parents=parents, recipe=recipe, kind=kind, tuning=tuning, method=first.method, options=recorded, described=values, rank=rank
    )
