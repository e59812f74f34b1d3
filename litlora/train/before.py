"""What can be refused of a training before torch is imported, which takes seconds: its rows' files, its directory, what stays in it."""

import os
from collections.abc import Sequence
from pathlib import Path

from litlora.checkpoint import names
from litlora.checkpoint.commit import check_outside
from litlora.checkpoint.run import kept_number, prepare_run_directory
from litlora.data.samples import files_of
from litlora.errors import UserError
from litlora.options import FitOptions

STATES_OF_MODELS = 2  # training states that are kept of steps that are whole models: the newest ones'


def check_paths(options: FitOptions) -> None:
    """What a training reads and where it writes, by their names alone. UserError."""
    check_files(options)
    if not options.resume:  # its steps are read, every byte, and once is enough
        check_run(options)


def check_files(options: FitOptions) -> None:
    """UserError where rows are to be read from what is no file of rows."""
    named = [*options.data, *([options.eval.data] if options.eval.data is not None else [])]
    files_of([entry for entry in named if entry.partition(":")[0] != names.DEMO])  # the demo's are made, which takes longer than a look


def check_run(options: FitOptions, reads: Sequence[Path] = ()) -> None:
    """What can be refused about the directory and what stays in it, before rows are read. Writes nothing.

    `reads`: what training begins with, the base last.
    """
    steps_kept(options)
    states_kept(options, of_models=False)
    if options.train.patience and (not options.eval.interval or (options.eval.data is None and not options.eval.fraction)):
        hint = "set --eval.interval, and --eval.fraction or --eval.data"
        raise UserError("nothing is validated on the way, so it would wait for ever", where="--train.patience", hint=hint)
    inside = [path for path in reads if Path(options.out_dir).resolve() in (path.resolve(), *path.resolve().parents)]
    if options.overwrite and inside:
        hint = "--out_dir another directory"
        raise UserError(f"--overwrite would delete {inside[0]}, from which training begins", where=options.out_dir, hint=hint)
    if reads and not options.resume:  # its steps could not be merged where they are
        check_outside(Path(options.out_dir), reads[-1])
    if is_first_process() and not options.dry_run:  # which says it beside what it shows
        prepare_run_directory(options.out_dir, resume=options.resume, overwrite=options.overwrite, dry_run=True)


def steps_kept(options: FitOptions) -> int | None:
    """How many of the newest steps stay; None: all. (The best one always does, so `best` asks for nothing more.)"""
    return kept_number(options.train.keep, "--train.keep", ("best", "last"))


def states_kept(options: FitOptions, *, of_models: bool) -> int | None:
    """How many of the newest training states stay; None: all. Those of whole models are three times as large as the models."""
    default = str(STATES_OF_MODELS) if of_models else "all"
    return kept_number(options.train.keep_states or default, "--train.keep_states")


def is_first_process() -> bool:
    """Whether this process speaks and writes for all (before Fabric is there to be asked)."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"))
