"""`litlora combine A B:0.5 ...`: one checkpoint made of several. Says what is combined with which weights, and what a smaller rank cost."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litlora.checkpoint import names
from litlora.checkpoint.commit import remove, remove_leftovers
from litlora.checkpoint.resolve import kind_of, resolve, whole_steps
from litlora.combine import Parent, Plan, Recipe, prepare, recipe_of
from litlora.combine import combine as write
from litlora.combine.soup import greedy
from litlora.commands.generate import open_model, split_weight
from litlora.console import Progress, counted, header, put, say, warn
from litlora.errors import UserError
from litlora.options import Combine

if TYPE_CHECKING:
    from litlora.data.store import Sample

MB = 10**6
BIG = 256 * 2**20  # bytes of a model from which on a progress line is worth it
LARGE = 0.1  # relative error from which on a warning is due
WORST = 3  # modules that are named where a smaller rank was asked for


def combine(options: Combine) -> None:
    """Combine what `options` names; the result's path goes to standard output. UserError, WorkError: nothing was written."""
    parents, given = open_parents(options)
    recipe = recipe_of(options, given, [str(parent.path) for parent in parents])
    if options.how != "greedy_soup" and (options.data or options.max_samples is not None):
        raise UserError("are options of greedy_soup, which alone measures", where="--data, --max_samples", hint="leave them out")
    if options.how == "greedy_soup":
        soup(options, parents, recipe)
        return
    plan = planned(options, parents, recipe)
    header(heading(plan))
    tell(options, made(plan))


def open_parents(options: Combine) -> tuple[list[Parent], list[float]]:
    """The checkpoints that are named, and the weight each was given; a run means all its whole steps, each with the run's weight."""
    parents: list[Parent] = []
    weights: list[float] = []
    for word in options.checkpoints:
        path, weight = split_weight(word)
        paths = [Path(path)]
        if Path(path).is_dir() and kind_of(Path(path)) == "run":
            paths = [step.path for step in whole_steps(Path(path))]
            if not paths:
                raise UserError("is a run without a whole checkpoint", where=path)
            say(f"{path} is a run: its {counted(len(paths), 'whole step')}, {', '.join(step.name for step in paths)}")
        parents += [Parent(resolve(one if one.is_dir() else path, base_dir=options.base_dir)) for one in paths]
        weights += [weight] * len(paths)
    return parents, weights


def planned(options: Combine, parents: Sequence[Parent], recipe: Recipe, out_dir: Path | None = None) -> Plan:
    """The combination that the options mean, looked at closely."""
    base = resolve(options.base_dir) if options.base_dir is not None else None
    return prepare(
        parents, recipe, out_dir or Path(options.out_dir), base=base, rank=options.rank, whole=options.whole, dtype=options.dtype
    )


def made(plan: Plan, **told: Any) -> dict[str, Any]:
    """Do it, with a progress line where it takes long."""
    unit, total = ("MB", plan.blend.bytes // MB) if plan.is_model else ("tensors", 0)
    bar = Progress(total, unit, quiet=not plan.is_model or plan.blend.bytes < BIG)
    report = write(plan, progress=lambda done: bar.update(done // MB), **told)
    bar.close()
    return report


# ---- the greedy soup -------------------------------------------------------------------------------------------------


def soup(options: Combine, parents: Sequence[Parent], recipe: Recipe) -> None:
    """Measure every candidate, then the average with one more, and write the best. Each attempt is measured as it would be written."""
    planned(options, parents, recipe)  # whatever speaks against it is said before anything is measured
    samples = samples_of(options, parents)
    losses = []
    for parent in parents:
        losses.append(loss_of(options, parent.path, samples))
        manifest = parent.checkpoint.manifest
        recorded = f" (recorded {manifest.val_loss:.4f})" if manifest and manifest.val_loss is not None else ""
        say(f"{parent.path}: loss {losses[-1]:.4f}{recorded}")
    out_dir = Path(options.out_dir).absolute()
    trial = f"{out_dir.name}.attempt"
    room = out_dir.with_name(names.temporary_name(trial, os.getpid()))  # what is half-written lies inside, and goes with it
    if out_dir.parent.is_dir():
        remove_leftovers(out_dir.parent, trial)

    def measure(members: tuple[int, ...]) -> float:
        try:
            write(planned(options, [parents[number] for number in members], share(recipe, len(members)), room / trial))
            return loss_of(options, room / trial, samples)
        finally:
            remove(room)

    attempts = greedy(losses, measure)
    for attempt in attempts[1:]:
        fate = "stays" if attempt.kept else "is left out"
        say(f"with {parents[attempt.candidate].path}: loss {attempt.loss:.4f}, it {fate}")
    last = next(attempt for attempt in reversed(attempts) if attempt.kept)
    weights = tuple(1 / len(last.members) if number in last.members else 0.0 for number in range(len(parents)))
    plan = planned(options, parents, replace(recipe, weights=weights))
    on = counted(len(samples), "row")
    header([*heading(plan), ("loss", f"{last.loss:.4f} on {on}; the best candidate alone {attempts[0].loss:.4f}")])
    told = {
        "losses": [round(loss, 6) for loss in losses],
        "attempts": [{"with": attempt.candidate, "loss": round(attempt.loss, 6), "kept": attempt.kept} for attempt in attempts],
    }
    tell(options, made(plan, val_loss=last.loss, told=told))


def share(recipe: Recipe, count: int) -> Recipe:
    return replace(recipe, weights=(1 / count,) * count)


def samples_of(options: Combine, parents: Sequence[Parent]) -> "Sequence[Sample]":
    """The rows that are measured on: `--data`, else what the run of all candidates held out."""
    from litlora.checkpoint.files import open_prompts
    from litlora.data.samples import load_data

    first = parents[0].checkpoint
    prompts, context = open_prompts(first), first.config().max_position_embeddings
    found: Sequence[Sample]
    if options.data:
        found = load_data(options.data, prompts, rows=options.rows, max_seq_length=context, heldout=True).train
    else:
        found = held_out(parents, prompts, context)
    return found[: options.max_samples]


def held_out(parents: Sequence[Parent], prompts: Any, context: int) -> "Sequence[Sample]":
    """The validation rows of the run that all candidates are steps of, split off as its run.yaml says. UserError where there are none."""
    from litlora.commands.evaluate import rows_of_run

    runs = {parent.path.resolve().parent for parent in parents}
    run = next(iter(runs))
    if len(runs) > 1 or not (run / names.RUN_YAML).is_file():
        raise UserError(
            "greedy_soup measures, and these are not steps of one run", where="--data", hint="--data FILE with rows to measure on"
        )
    samples, _ = rows_of_run(run, prompts, context)
    if not samples:
        raise UserError("its run held out no rows", where=run / names.RUN_YAML, hint="--data FILE with rows to measure on")
    say(f"measured on the {counted(len(samples), 'validation row')} of {run}")
    return samples


def loss_of(options: Combine, path: Path, samples: "Sequence[Sample]") -> float:
    """Nats per graded token."""
    opened = open_model(options, str(path), options.base_dir, [])
    from litlora.train.loss import loss_of_samples

    total, graded = loss_of_samples(opened.model, samples)
    return total / graded


# ---- what is said ----------------------------------------------------------------------------------------------------


def heading(plan: Plan) -> list[tuple[str, str]]:
    values = ", ".join(f"{name} {value}" for name, value in plan.options.items() if name != "dtype")
    lines = [("combine", f"{plan.recipe.how}{f' ({values})' if values else ''}")]
    lines += [("", f"{weight:.6g} x {parent.path}") for parent, weight in zip(plan.parents, plan.recipe.weights, strict=True)]
    return [*lines, ("result", f"{plan.out_dir}: {plan.what}")]


def tell(options: Combine, report: dict[str, Any]) -> None:
    """What a smaller rank cost, and what to type next."""
    result = report["result"]
    if "relative_error" in result:
        say(f"by SVD: relative error {result['relative_error']:.3%}, {result['energy_kept']:.3%} of the energy kept")
        worst = sorted(result["modules"].items(), key=lambda item: -item[1]["relative_error"])[:WORST]
        for module, cost in worst if result["relative_error"] > 0 else ():
            say(f"  {module}: rank {cost['rank']}, relative error {cost['relative_error']:.3%}")
    if result.get("relative_error", 0) > LARGE:
        warn(f"{result['relative_error']:.0%} of the combined update is not in the result", "a larger --rank; or --whole, which is exact")
    place = shlex.quote(options.out_dir)
    say(f"next: litlora evaluate {place} --data FILE")
    say(f"      litlora chat {place}")
    put(options.out_dir)
