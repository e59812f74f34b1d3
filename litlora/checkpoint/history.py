"""What a run's directory says of the run: its command and data, how far it was to go and how far it came, what it left lying about."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from litlora.checkpoint import names
from litlora.checkpoint.commit import is_alive
from litlora.checkpoint.foreign import Foreign, recognise
from litlora.checkpoint.reading import read_bytes
from litlora.console import counted
from litlora.errors import UserError
from litlora.parsing import yaml_texts


def leftovers(run: Path) -> list[tuple[Path, Foreign]]:
    """What of ours lies in a run and is no step: half-written directories, torn steps that were set aside."""
    ours = (path for path in sorted(run.iterdir()) if names.temporary_owner(path) is not None or names.is_aside(path))
    return [(path, found) for path in ours if (found := recognise(path))]


def command_of(run: Path) -> str:
    """`finetune lora`: what began it; empty where it does not say."""
    begun = re.match(r"# .*?litlora (\S+(?: \S+)?) --config", _text(run / names.RUN_YAML).partition("\n")[0])
    return begun[1] if begun else ""


def options_of(run: Path) -> dict[str, Any]:
    """Its run.yaml, every value as the text that stands there; empty where there is none to be read."""
    try:
        values = yaml_texts(_text(run / names.RUN_YAML))
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def metrics_of(run: Path) -> list[dict[str, str]]:
    """The rows of its metrics.csv: column -> what stands there."""
    try:
        rows = list(csv.DictReader(io.StringIO(_text(run / names.METRICS).replace("\0", ""))))
    except csv.Error:  # a field that never ends
        return []
    return [{key: value for key, value in row.items() if isinstance(key, str) and isinstance(value, str)} for row in rows]


def validations_waited(rows: Sequence[Mapping[str, str]]) -> int:
    """How many of the last validations brought no new lowest loss. What was measured before the first step does not count."""
    lowest, waited = math.inf, 0
    for row in rows:
        loss = _number(row.get("val_loss"))
        if loss is not None and row.get("step") != "0":
            lowest, waited = (loss, 0) if loss < lowest else (lowest, waited + 1)
    return waited


def how_it_ended(run: Path, step: int, epoch: float) -> tuple[str, str]:
    """(state, in words) of a run whose newest step is number `step`, after `epoch` passes; state: running, finished, failed, stopped."""
    trainer = _text(run / names.LOCK).strip()
    if trainer.isascii() and trainer.isdecimal() and len(trainer) < 12 and is_alive(int(trainer)):
        return "running", f"process {trainer} is training"
    rows = metrics_of(run)
    loss = _number(rows[-1].get("loss")) if rows else None
    if loss is not None and not math.isfinite(loss):
        return "failed", f"the loss was {loss} at step {rows[-1].get('step')}"
    train = options_of(run).get("train")
    planned = train if isinstance(train, Mapping) else {}
    steps, epochs, patience = (_number(planned.get(name)) for name in ("max_steps", "epochs", "patience"))
    if patience and validations_waited(rows) >= patience:
        return "finished", f"after {counted(step, 'step')}: {counted(patience, 'validation')} brought no new lowest loss"
    if steps is not None:
        all_of_them = counted(steps, "step")
        return ("finished", f"all {all_of_them}") if step >= steps else ("stopped", f"after {step:,} of {all_of_them}")
    if epochs is not None:
        done = epoch >= epochs - 1e-6  # rounded when it was written down
        return ("finished", f"all {counted(epochs, 'epoch')}") if done else ("stopped", f"after {epoch:.2f} of {counted(epochs, 'epoch')}")
    return "unknown", f"it does not say how far it was to go ({names.RUN_YAML})"


def _number(text: object) -> float | None:
    try:
        return float(text) if isinstance(text, str) and text else None
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8", "replace")
    except UserError:
        return ""
