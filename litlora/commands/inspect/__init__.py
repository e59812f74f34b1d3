"""`litlora inspect PATH`: what a path is, where it comes from, what its training changed and by how much, and what it is good for.

`report.py` says what is known, `weights.py` reads headers and compares weights, `uses.py` says what it is good for, `page.py` prints it.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.resolve import looked_at, resolve
from litlora.commands.inspect.page import page
from litlora.commands.inspect.report import look
from litlora.console import put, put_json, warn
from litlora.options import Inspect


def inspect(options: Inspect) -> None:
    """Print what is known of a path. UserError (exit code 2) where nothing is, after saying what lies there."""
    path = options.checkpoint_dir
    with looked_at(path or names.RUN):
        found = look(path, Path(options.base_dir) if options.base_dir is not None else None, check=options.check)
    if options.json:
        put_json(finite(asdict(found)), indent=2)
    elif found.kind != "unknown":
        put("\n".join(page(found)))
    if found.kind == "unknown":
        resolve(found.path)  # raises: what is there, what is missing, what was perhaps meant
    for fault in found.faults:
        warn(f"{found.path}: {fault}")
    unmoved = [name for name, far in (found.moved or {}).items() if far == 0]
    if unmoved:
        warn(f"{', '.join(unmoved[:3])}{f' and {len(unmoved) - 3} more' if len(unmoved) > 3 else ''}: as it was before training")


def finite(value: Any) -> Any:
    """As JSON has it: a number that is none (NaN, infinite) is null."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
