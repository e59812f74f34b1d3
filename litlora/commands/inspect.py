"""`litlora inspect PATH`: what a path is, where it comes from, what its training changed and by how much, and what it is good for."""

import json
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.manifest import has_state
from litlora.checkpoint.resolve import resolve
from litlora.console import warn
from litlora.errors import UserError
from litlora.families import expected_tensors
from litlora.methods.tuning import why_unmergeable
from litlora.options import Inspect

MB = 10**6


def inspect(options: Inspect) -> None:
    """Print what is known of a checkpoint; everything is read from its files."""
    checkpoint = resolve(options.checkpoint_dir, base_dir=options.base_dir)
    found = {**what_it_is(checkpoint), **where_from(checkpoint), **what_changed(checkpoint), "files": sizes(checkpoint.path)}
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for key, value in found.items():
        print(f"{key:<12}{shown(value)}")
    unmoved = [name for name, far in found.get("moved", {}).items() if far == 0]
    if unmoved:
        warn(f"{', '.join(unmoved[:3])}{f' and {len(unmoved) - 3} more' if len(unmoved) > 3 else ''}: as it was before training")


def what_it_is(checkpoint: Checkpoint) -> dict[str, Any]:
    kinds = {"base": "a whole model", "adapter": "a PEFT adapter", "step": "a step of a run"}
    merged = (checkpoint.path / names.MERGE_REPORT).exists()
    found: dict[str, Any] = {"path": str(checkpoint.path), "kind": "a merged model" if merged else kinds[checkpoint.kind]}
    if checkpoint.why:
        found["chosen"] = checkpoint.why
    if checkpoint.is_model:
        config = checkpoint.config()
        found["model"] = f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}"
        if config.llama_pro_layers:
            found["new layers"] = list(config.llama_pro_layers)
    if checkpoint.manifest or not checkpoint.is_model:
        found["method"] = checkpoint.method
    return found


def where_from(checkpoint: Checkpoint) -> dict[str, Any]:
    """Lineage, and whether the base is there and the same."""
    found: dict[str, Any] = {}
    if checkpoint.manifest:
        record = checkpoint.manifest
        found |= {"options": record.options, "step": record.step, "epoch": record.epoch, "tokens": record.tokens}
        found |= {"train loss": record.train_loss, "val loss": record.val_loss, "parent": record.parent}
        found |= {"lineage": [happened(event) for event in record.lineage]} if record.lineage else {}
        found |= {"resumable": has_state(checkpoint.path), "versions": record.versions}
    if not checkpoint.is_model:
        try:
            base = checkpoint.base()
            known = checkpoint.manifest is not None
            found["base"] = f"{base.path} ({'the one it was trained on' if known else 'it does not say which weights it was trained on'})"
            found["merges"] = why_unmergeable(checkpoint.tuning(), checkpoint.config()) or True
        except UserError as error:
            found["base"] = f"not usable: {error}"
    return {key: value for key, value in found.items() if value is not None}


def happened(event: dict[str, Any]) -> str:
    """One event of a lineage in words."""
    if event["event"] != "combined":
        return ", ".join([event["event"], *(f"{name} {value}" for name, value in event.items() if name != "event")])
    parents = ", ".join(f"{parent['path']} ({parent['weight']:.6g})" for parent in event["parents"])
    return f"combined of {parents} by {event['how']}"


def what_changed(checkpoint: Checkpoint) -> dict[str, Any]:
    """`moved`: by module, as a share of what was there (checkpoint/movement.py)."""
    before = origin(checkpoint)
    if before is None:
        return {}
    from litlora.checkpoint.movement import lost_to_rounding, movement

    try:
        lost = lost_to_rounding(checkpoint, before)
        return {"moved": movement(checkpoint, before)} | ({} if lost is None else {"lost to rounding": lost})
    except UserError as error:
        return {"not sound": str(error)}


def origin(checkpoint: Checkpoint) -> Checkpoint | None:
    """The model that it changed, where that is still there and of the same shape."""
    try:
        if not checkpoint.is_model:
            return checkpoint.base()
        start = checkpoint
        while start.manifest is not None and start.path.resolve().parent == checkpoint.path.resolve().parent:
            if start.manifest.parent is None or not Path(start.manifest.parent).is_dir():
                return None
            start = resolve(start.manifest.parent)  # a resumed run's steps lead back, one by one, to what it began with
        shapes, theirs = (expected_tensors(one.config()) for one in (checkpoint, start))
    except UserError:
        return None
    same = all(theirs.get(name, shape) == shape for name, shape in shapes.items()) and start.is_model
    return start if same and start is not checkpoint else None


def sizes(directory: Path) -> dict[str, str]:
    return {path.name: f"{path.stat().st_size / MB:.2f} MB" for path in sorted(directory.iterdir()) if path.is_file()}


def shown(value: Any) -> str:
    """One line for a person: of many modules, each kind's range."""
    if not isinstance(value, dict):
        return str(value)
    if value and all(isinstance(far, float) for far in value.values()):
        return "\n".join(movement_lines(value)).lstrip()
    return ", ".join(f"{key} {text}" for key, text in value.items())


def movement_lines(moved: dict[str, float]) -> list[str]:
    """`q_proj  30 of them, 0.8% to 2.1%`: by the last words of the modules' names."""
    kinds: dict[str, list[float]] = {}
    for name, far in moved.items():
        words = [word for word in name.split(".") if word not in ("weight", "adapter", "model", "layers") and not word.isdecimal()]
        kinds.setdefault(".".join(words), []).append(far)
    width = max(map(len, kinds))
    return [f"{'':<12}{kind:<{width}}  {len(far)} x, {min(far):.2%} to {max(far):.2%}" for kind, far in kinds.items()]
