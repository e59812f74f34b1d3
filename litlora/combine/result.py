"""The checkpoint that comes of a combination: a directory like a step's, whose manifest says what it was made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.card import model_card
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import check_free_space, check_new, commit_checkpoint, commit_directory, make_directory
from litlora.checkpoint.files import as_json, serving_files
from litlora.checkpoint.manifest import Manifest, records_of
from litlora.combine.adapters import Blend, Blended, blend_of, make
from litlora.combine.models import ModelBlend, model_blend_of, write_model
from litlora.combine.parents import Parent, check_parents, common
from litlora.combine.recipe import Recipe
from litlora.errors import UserError
from litlora.methods.tuning import LoRASlot, why_misread, why_unmergeable
from litlora.options import FullOptions
from litlora.prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A combination that nothing speaks against any more."""

    parents: tuple[Parent, ...]
    recipe: Recipe
    blend: Blend | ModelBlend
    out_dir: Path
    options: dict[str, Any]  # for the record
    prompts: Prompts | None  # the first parent's tokenizer and template, which are the result's

    @property
    def is_model(self) -> bool:
        return isinstance(self.blend, ModelBlend)

    @property
    def what(self) -> str:
        """What will be there, in words."""
        blend = self.blend
        if isinstance(blend, ModelBlend):
            return "a whole model" + (f", relative to {blend.base.typed}" if blend.base else "")
        ranks = sorted({kind.r for kind in blend.tuning.slots.values() if isinstance(kind, LoRASlot)})
        shown = f" of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
        exact = {
            "one": "; the tensors of its one parent",
            "low rank": "; exact" if blend.recipe.is_linear and blend.rank is None else "; by SVD",
            "same": "; number by number",
        }
        return f"an adapter ({blend.method}){shown}{exact[blend.kind]}"


def prepare(
    parents: Sequence[Parent],
    recipe: Recipe,
    out_dir: Path,
    *,
    base: Checkpoint | None = None,
    rank: int | None = None,
    whole: bool = False,
    dtype: str = "keep",
) -> Plan:
    """Look at everything that could stop it before anything is written. `base`: what updates of whole models are relative to."""
    check_place(out_dir, parents, base)
    models = [parent for parent in parents if parent.is_model]
    if models and len(models) < len(parents) and not whole:
        what = f"is a whole model, and {next(p for p in parents if not p.is_model).path} is an adapter"
        raise UserError(what, where=models[0].path, hint="--whole takes each adapter as the model that it makes of its base")
    check_parents(parents)
    is_model = whole or bool(models)
    odd = (
        ("--rank", "adapter") if is_model and rank is not None else ("--dtype", "whole model") if not is_model and dtype != "keep" else None
    )
    if odd:
        raise UserError(
            f"is for a result that is {'an' if odd[1] == 'adapter' else 'a'} {odd[1]}, and this is none", where=odd[0], hint="leave it out"
        )
    if is_model:
        blend: Blend | ModelBlend = model_blend_of(parents, recipe, base=base, dtype=dtype)
    else:
        blend = blend_of(parents, recipe, rank)
    check_free_space(out_dir, blend.bytes + 2**24)
    prompts = parents[0].prompts
    options = {
        **recipe.values,
        **({"rank": rank} if rank else {}),
        **({"whole": True} if whole else {}),
        **({"dtype": dtype} if is_model else {}),
    }
    return Plan(parents=tuple(parents), recipe=recipe, blend=blend, out_dir=out_dir, options=options, prompts=prompts)


def check_place(out_dir: Path, parents: Sequence[Parent], base: Checkpoint | None) -> None:
    """UserError where the result cannot go there, or would lie in what it is made from."""
    check_new(out_dir)
    real = out_dir.resolve()
    for path in [
        *(parent.path for parent in parents),
        *(parent.checkpoint.base().path for parent in parents),
        *([base.path] if base else []),
    ]:
        if path.resolve() in real.parents:
            raise UserError(f"lies in {path}, from which it is made", where=out_dir, hint="--out_dir another directory")


def combine(
    plan: Plan, *, val_loss: float | None = None, told: Mapping[str, Any] | None = None, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Write the result to `plan.out_dir`, whole or not at all, and return what combine_report.json says.

    `val_loss`: of the result, where it was measured; `told`: more for the lineage. `progress` is told the tensors done, or of a whole
    model its bytes. WorkError where it cannot be computed or stored.
    """
    final = plan.out_dir.absolute()
    event = {
        "event": "combined",
        "how": plan.recipe.how,
        "options": plan.options,
        **(told or {}),
        "parents": [parent.record(weight) for parent, weight in zip(plan.parents, plan.recipe.weights, strict=True)],
    }
    manifest = manifest_of(plan, event, val_loss)
    files = small_files(plan, manifest)
    make_directory(final.parent)
    if isinstance(plan.blend, Blend):
        blended = make(plan.blend, progress)
        report = {**event, "result": report_of(plan.blend, blended)}
        files = {**files, names.COMBINE_REPORT: as_json(report)}
        commit_checkpoint(final, manifest, tensors={plan.blend.file: blended.tensors}, files=files)
        return report
    report = {**event, "result": {"kind": "whole model", "bytes": plan.blend.bytes}}
    with commit_directory(final, needed_bytes=plan.blend.bytes + 2**20) as directory:
        write_model(plan.blend, directory, progress)
        for name, data in {**files, names.COMBINE_REPORT: as_json(report)}.items():
            (directory / name).write_bytes(data)
        (directory / names.MANIFEST).write_bytes(manifest.with_files(records_of(directory)).encode())
    return report


def manifest_of(plan: Plan, event: dict[str, Any], val_loss: float | None) -> Manifest:
    """Steps, epochs and tokens are those of the parent that went farthest: the result itself took no step."""
    from litlora import __version__

    known = [parent.checkpoint.manifest for parent in plan.parents if parent.checkpoint.manifest]
    prompts, blend = plan.prompts, plan.blend
    return Manifest(
        method=blend.method if isinstance(blend, Blend) else "full",
        options=blend.options if isinstance(blend, Blend) else asdict(FullOptions()),
        step=max((one.step for one in known), default=0),
        epoch=max((one.epoch for one in known), default=0.0),
        tokens=max((one.tokens for one in known), default=0),
        val_loss=val_loss,
        base=blend.base.record(plan.out_dir.absolute().parent, held_in_training(plan)) if isinstance(blend, Blend) else None,
        tokenizer=prompts.tokenizer.hash if prompts else "",
        chat_template=prompts.template_hash if prompts else "",
        data=common([one.data for one in known]) if len(known) == len(plan.parents) else "",
        lineage=(event,),
        versions={"litlora": __version__, "numpy": np.__version__},
    )


def held_in_training(plan: Plan) -> str:
    """The few bits that all parents were trained on, if they are the same."""
    return common([parent.checkpoint.quantize for parent in plan.parents]) or "none"


def small_files(plan: Plan, manifest: Manifest) -> dict[str, bytes]:
    """Tokenizer and template of the first parent, adapter_config.json, README."""
    blend = plan.blend
    place, prompts = plan.parents[0].checkpoint.tokenizer_dir(), plan.prompts
    files = serving_files(place, prompts.template, prompts.tool_template) if prompts else {}
    read: dict[str, Any] = {}
    if isinstance(blend, Blend):
        tuning, config = blend.tuning, blend.base.config()
        read = {"in_peft": tuning.in_peft, "misread": why_misread(tuning, config), "unmergeable": why_unmergeable(tuning, config)}
        if blend.described is not None:
            files[names.ADAPTER_CONFIG] = as_json(blend.described)
    return {**files, names.README: model_card(manifest, str(plan.out_dir), **read).encode()}


def report_of(blend: Blend, blended: Blended) -> dict[str, Any]:
    """What a smaller rank cost, by module and in all: relative error ||stored - exact|| / ||exact||, share of ||exact||^2 kept."""
    ranks = blended.ranks
    found: dict[str, Any] = {"kind": blend.kind, "method": blend.method, "tensors": len(blended.tensors)}
    if ranks:
        found["ranks"] = ranks
    if blended.cuts:
        total = sum(cut.exact for cut in blended.cuts.values()), sum(cut.lost for cut in blended.cuts.values())
        found["relative_error"] = (total[1] / total[0]) ** 0.5 if total[0] else 0.0
        found["energy_kept"] = 1 - total[1] / total[0] if total[0] else 1.0
        found["modules"] = {
            module: {"rank": ranks[module], "relative_error": cut.error, "energy_kept": cut.energy} for module, cut in blended.cuts.items()
        }
    return found
