"""A base and what was trained on it become one plain model, in one pass over the base's files.

Of LoRA: W' = cast(fp32(W) + scale * fp32(B) @ fp32(A)), rounded once; scales and shifts, parameters trained whole, new blocks and a
head of its own likewise. Nothing is loaded as a whole. The base streams by: what nothing was trained on is copied by the kernel,
the rest goes through some megabytes of memory in blocks of rows. Everything that proves the result is measured in the same pass:
the hash of every tensor before and after, how far each module moved, and what rounding took away. No torch here: numpy does the
arithmetic.

    outputs.py     which tensors the new model has, and what each is made of
    plan.py        what speaks against it, before anything is written
    weights.py     the files of weights
    tensors.py     one tensor: the arithmetic
    directory.py   what lies beside the weights, and the report
    expand.py      the same for a deeper model that computes what its base does (LLaMA-Pro before training)
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.commit import commit_directory, make_directory, remove, remove_leftovers, sync
from litlora.checkpoint.manifest import seal
from litlora.errors import UserError, WorkError
from litlora.merge.directory import fingerprint_before, make_report, write_small_files
from litlora.merge.plan import Plan, prepare
from litlora.merge.tensors import MergeOverflow, Moved
from litlora.merge.weights import write_weights

__all__ = ["MergeOverflow", "Plan", "merge", "prepare"]


def merge(
    plan: Plan, *, prove: Callable[[Path], dict[str, Any]] | None = None, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Write the merged model to `plan.out_dir`, whole or not at all, and return what merge_report.json says.

    `prove` looks at the finished directory before it gets its name, and may raise; what it returns goes into the report.
    `progress` is told the bytes of the result that are done. UserError where the base is not the adapter's own, MergeOverflow or
    another WorkError where the result cannot be stored.
    """
    with committed(plan) as directory:
        moved = write_weights(plan.model, plan.adapter, directory, progress)
        refuse_other_base(plan, moved)
        refuse_no_change(plan, moved)
        write_small_files(plan, directory)
        report = make_report(plan, moved, directory)
        (directory / names.MERGE_REPORT).write_bytes(seal(report))
        if prove is not None:
            report["proof"] = prove(directory)
            (directory / names.MERGE_REPORT).write_bytes(seal(report))
    return report


def refuse_other_base(plan: Plan, moved: Mapping[str, Moved]) -> None:
    """The bytes that were merged into, not those that were there when somebody looked before."""
    recorded = plan.checkpoint.manifest.base if plan.checkpoint.manifest else None
    found = fingerprint_before(plan.model, moved)
    if recorded is not None and recorded.fingerprint != found:
        raise UserError(
            f"the base is not the one that this adapter was trained on: {found} instead of {recorded.fingerprint}",
            where=plan.model.base.path,
            hint="--base_dir the original base",
        )


def refuse_no_change(plan: Plan, moved: Mapping[str, Moved]) -> None:
    telling = [moved[output.name] for output in plan.model if output.can_tell]
    if not any(one.update for one in telling):
        raise UserError("the merge changes nothing: the update is zero", where=plan.checkpoint.path, hint="use the base as it is")
    if not any(one.differs for one in telling):  # where the whole model changes its dtype, all do
        why = "rounding to the base's dtype takes the whole update away"
        raise WorkError(
            f"the merge changes nothing: {why}", where=plan.checkpoint.path, hint="--dtype float32, or use the adapter unmerged"
        )


# ---- getting onto the disk -------------------------------------------------------------------------------------------


@contextmanager
def committed(plan: Plan) -> Iterator[Path]:
    """A temporary directory that becomes `plan.out_dir` when it is complete. An earlier merge keeps its place until then."""
    final = plan.out_dir.absolute()
    make_directory(final.parent)
    remove_remains(final)
    if not os.path.lexists(final):
        with commit_directory(final, needed_bytes=plan.model.bytes) as temporary:
            yield temporary
        return
    newer = final.with_name(names.temporary_name(final.name, os.getpid()))
    with commit_directory(newer, needed_bytes=plan.model.bytes) as temporary:
        yield temporary
    exchange(newer, final)
    sync(final.parent)
    remove(newer)


def remove_remains(final: Path) -> None:
    """What merges into `final` left when their process died: the new model, half-written or complete, or the earlier one."""
    owners = {owner for path in final.parent.iterdir() if (owner := names.temporary_owner(path)) is not None}
    for name in (final.name, earlier_name(final), *(names.temporary_name(final.name, owner) for owner in owners)):
        remove_leftovers(final.parent, name)


def earlier_name(final: Path) -> str:
    return f"{final.name}.earlier"


def exchange(new: Path, old: Path) -> None:
    """Swap the names of two directories: at every moment there is a complete one at each."""
    AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2; Python has no call for it
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
        return
    aside = old.with_name(names.temporary_name(earlier_name(old), os.getpid()))  # elsewhere: for a moment there is only the new one
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)
