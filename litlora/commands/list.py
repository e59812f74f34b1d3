"""`litlora list RUN`: its checkpoints in a table, the best one marked, torn ones named."""

import json
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.note import first_line, read_note, tags_of
from litlora.checkpoint.resolve import Step, kind_of, list_steps
from litlora.console import style, warn
from litlora.errors import UserError
from litlora.options import ListSteps

MB = 10**6


def list_run(options: ListSteps) -> None:
    """One row per step. Reads every byte of them: what it calls whole is whole."""
    run = Path(options.checkpoint_dir or names.RUN)
    if not run.is_dir() or kind_of(run) != "run":
        raise UserError("is no run: it holds no step-N directories", where=run, hint="give the directory that holds the steps")
    steps = list_steps(run)
    rows = [row_of(step) for step in steps]
    best = best_of(rows)
    for row in rows:
        row["best"] = row is best
    rows = [row for row in rows if options.tag is None or options.tag.lstrip("#") in row["tags"]]
    rows.sort(key=lambda row: sort_key(row, options.sort))
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    print(table(rows))
    for step in steps:
        for fault in (*step.faults, *step.state_faults):
            warn(f"{step.path}: {fault}")


def row_of(step: Step) -> dict[str, Any]:
    """What is known of one step; None where it is not."""
    manifest, note = step.manifest, read_note(step.path)
    return {
        "step": step.number,
        "path": str(step.path),
        "whole": step.is_whole,
        "resumable": step.is_resumable,
        "method": manifest.method if manifest else None,
        "epoch": manifest.epoch if manifest else None,
        "tokens": manifest.tokens if manifest else None,
        "train_loss": manifest.train_loss if manifest else None,
        "val_loss": manifest.val_loss if manifest else None,
        "bytes": sum(path.stat().st_size for path in step.path.rglob("*") if path.is_file()),
        "merged": (step.path / names.MERGED).is_dir(),
        "note": first_line(note),
        "tags": tags_of(note),
    }


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that `--checkpoint_dir RUN` means: of the whole ones the lowest validation loss, else the newest."""
    whole = [row for row in rows if row["whole"]]
    measured = [row for row in whole if row["val_loss"] is not None]
    if measured:
        return min(measured, key=lambda row: (row["val_loss"], -row["step"]))
    return max(whole, key=lambda row: row["step"], default=None)


def sort_key(row: dict[str, Any], key: str) -> tuple[bool, float, int]:
    value = {"size": row["bytes"]}.get(key, row.get(key))
    return value is None, float(value) if value is not None else 0.0, row["step"]


def table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no checkpoint"
    cells = [("", "step", "epoch", "train loss", "val loss", "MB", "state", "note")]
    cells += [
        (
            "*" if row["best"] else "",
            str(row["step"]),
            "" if row["epoch"] is None else f"{row['epoch']:.2f}",
            loss(row["train_loss"]),
            loss(row["val_loss"]),
            f"{row['bytes'] / MB:.1f}",
            state(row),
            row["note"],
        )
        for row in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]) - 1)]
    lines = ["  ".join([*map(str.rjust, row, widths), row[-1]]).rstrip() for row in cells]  # the last column, the note, as it is
    return "\n".join([style(lines[0], "dim"), *lines[1:]])


def loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def state(row: dict[str, Any]) -> str:
    if not row["whole"]:
        return "torn"
    return ", ".join(word for word, is_so in (("resumable", row["resumable"]), ("merged", row["merged"])) if is_so)
