"""`litlora list RUN ...`: checkpoints in a table, the best one of each run marked, torn ones named."""

import difflib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.history import leftovers
from litlora.checkpoint.note import first_line, read_note, tags_of
from litlora.checkpoint.reading import READ_UNASKED, size_of
from litlora.checkpoint.resolve import Step, best_of, kind_of, list_step_paths, list_steps, looked_at, valid_below, why_best
from litlora.console import MB, amount, count, print_table, put_json, say
from litlora.errors import UserError, told
from litlora.options import ListSteps


def list_run(options: ListSteps) -> None:
    """One row per step. What it calls whole was read to the last byte; of a run that is large for that, sizes are compared only."""
    runs = []
    for run in runs_of(options.runs):
        with looked_at(run):
            runs.append(listed(run, check=options.check))
    for found in runs:
        found["steps"] = [row for row in found["steps"] if options.tag is None or options.tag.lstrip("#") in row["tags"]]
        found["steps"].sort(key=lambda row: sort_key(row, options.sort))
    if options.json:
        put_json(runs if len(options.runs) > 1 else runs[0], indent=2)
        return
    rows = [(found["run"], row) for found in runs for row in found["steps"]]
    if options.sort != "step":
        rows.sort(key=lambda pair: sort_key(pair[1], options.sort))
    if rows:
        bold = [number for number, (_, row) in enumerate(rows) if row["best"]]
        several = len(runs) > 1
        lines = [(*((run,) if several else ()), *cells(row)) for run, row in rows]
        print_table(("run", *HEAD) if several else HEAD, lines, right=range(1 + several, 7 + several), bold=bold)
    else:
        say("no checkpoint" + (f" has the tag {options.tag}" if options.tag else ""))
    for found in runs:
        tell(found)


def runs_of(given: Sequence[str]) -> list[Path]:
    """What is named as a run; of several paths, those that are none are left out, and it is said. UserError where none is one."""
    runs: list[Path] = []
    others: list[Path] = []
    for path in map(Path, given):
        with looked_at(path):
            (runs if len(given) == 1 or is_run(path) else others).append(path)
    if not runs:
        raise UserError("none of them is a run: it would hold step-N directories", where=", ".join(given[:3]))
    if others:
        say(f"left out, for they are no runs: {', '.join(map(str, others))}")
    return runs


def is_run(path: Path) -> bool:
    return path.is_dir() and kind_of(path) == "run"


def listed(run: Path, *, check: bool = False) -> dict[str, Any]:
    """What is known of a run's steps, and what else of ours lies in it. UserError where it is no run."""
    if not is_run(run):
        what = "is no run: it holds no step-N directories" if run.exists() else "there is no such directory"
        raise UserError(what, where=run, hint=hint_for(run))
    sizes = {path: size_of(path) for path in list_step_paths(run)}
    hashed = check or sum(sizes.values()) <= READ_UNASKED
    steps = list_steps(run, hashed=hashed)
    best, last = best_of(steps), max((step for step in steps if step.is_whole), key=lambda step: step.number, default=None)
    return {
        "run": str(run),
        "read": hashed,  # whether every byte was; if not, the sizes were compared, and no step is said to be whole
        "best": str(best.path) if best else None,
        "why": why_best(best, run, steps) if best else None,
        "last": str(last.path) if last else None,
        "steps": [row_of(step, sizes.get(step.path, 0)) | {"best": step is best} for step in steps],
        "leftovers": [{"path": str(path), "kind": one.kind, "what": one.what, "hint": one.hint} for path, one in leftovers(run)],
    }


def hint_for(path: Path) -> str:
    """What to do about a path that is no run."""
    if names.step_number(path) is not None and is_run(path.parent):
        return f"litlora list {shlex.quote(str(path.parent))}"
    if str(path) == names.RUN and not path.exists():
        return "litlora finetune lora begins one"
    beside = [entry.name for entry in valid_below(path.parent) if is_run(entry)]
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else "give the directory that holds the steps"


def row_of(step: Step, size: int) -> dict[str, Any]:
    """What is known of one step; None where it is not."""
    manifest, note = step.manifest, read_note(step.path)
    return {
        "step": step.number,
        "path": str(step.path),
        "whole": False if step.faults else True if step.hashed else None,
        "resumable": step.is_resumable,
        "faults": [*step.faults, *step.state_faults],
        "method": manifest.method if manifest else None,
        "epoch": manifest.epoch if manifest else None,
        "tokens": manifest.tokens if manifest else None,
        "train_loss": manifest.train_loss if manifest else None,
        "val_loss": manifest.val_loss if manifest else None,
        "bytes": size,
        "merged": (step.path / names.MERGED).is_dir(),
        "note": first_line(note),
        "tags": tags_of(note),
    }


def sort_key(row: dict[str, Any], key: str) -> tuple[bool, float, int]:
    value = {"size": row["bytes"]}.get(key, row.get(key))
    return value is None, float(value) if value is not None else 0.0, row["step"]


# ---- for a person ----------------------------------------------------------------------------------------------------

HEAD = ("", "step", "epoch", "tokens", "train", "val", "MB", "state", "note")


def cells(row: dict[str, Any]) -> Sequence[str]:
    words = [*row["faults"][:1], row["note"]]
    return (
        "*" if row["best"] else "",
        str(row["step"]),
        "" if row["epoch"] is None else f"{row['epoch']:.2f}",
        "" if row["tokens"] is None else count(row["tokens"]),
        loss(row["train_loss"]),
        loss(row["val_loss"]),
        f"{row['bytes'] / MB:.1f}",
        state(row),
        " · ".join(word for word in words if word),
    )


def loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def state(row: dict[str, Any]) -> str:
    """`whole` is said of what was read to the last byte, and of nothing else."""
    word = {True: "whole", False: "torn", None: "unread"}[row["whole"]]
    return ", ".join([word, *(name for name in ("resumable", "merged") if row[name])])


def tell(found: dict[str, Any]) -> None:
    """Below the table: which step the run's path means, what was not looked at, and what is no step."""
    if found["best"]:
        say(told(f"* {found['best']}: {found['why']}"))
    if not found["read"]:
        size = amount(sum(row["bytes"] for row in found["steps"]))
        say(f"unread: {size} in this run, so sizes were compared and contents were not; --check reads every byte")
    for one in found["leftovers"]:
        say(told(f"{one['path']}: {one['what']}; {one['hint']}"))
