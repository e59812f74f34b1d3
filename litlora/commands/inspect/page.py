"""What inspect found, as lines for a person. Nothing of it is computed here."""

from collections.abc import Iterator, Mapping
from typing import Any

from litlora.checkpoint import names
from litlora.commands.inspect.report import Report
from litlora.console import amount, count, counted
from litlora.errors import printable

WIDTH = 12  # of the names of lines
FEW = 8  # so many modules or layers have a line each
NAMES_OF_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def page(found: Report) -> list[str]:
    """Everything, one thing a line; a terminal gets no command out of somebody else's file."""
    return [printable(line) for line in lines(found)]


def lines(found: Report) -> Iterator[str]:
    yield f"{found.path}: {found.what}"
    if found.chosen:
        yield line("chosen", found.chosen)
    if found.faults:
        yield line("faults", found.faults[0] + (f" and {len(found.faults) - 1} more" if len(found.faults) > 1 else ""))
    if found.run:
        yield from run_lines(found.run)
    if found.method:
        yield line("method", f"{found.method}: {options_text(found.options or {})}".removesuffix(": "))
    if found.training:
        yield from training_lines(found.training)
    if found.base:
        yield line("base", base_text(found.base))
    if found.model:
        yield from model_lines(found.model, of_base=found.base is not None)
    if found.adapter:
        yield line("adapter", f"{found.adapter['file']}: {stored(found.adapter)}")
        if after := found.adapter.get("new_after"):
            yield line("", f"new blocks after layers {', '.join(map(str, after))} of the base, counted from 0")
    if found.tensors:
        yield line("tensors", stored(found.tensors))
    if found.tokenizer:
        whose = {"own": "its own", "base": "its base's", None: "none"}
        yield line("tokenizer", f"{whose[found.tokenizer['tokenizer']]}; chat template: {whose[found.tokenizer['template']]}")
    yield from lineage_lines(found)
    if found.note:
        yield from block("note", found.note.splitlines())
    yield line("size", sizes_text(found.sizes))
    if found.hashed is False:
        yield line("hashes", "not compared, only sizes: --check reads every byte")
    elif found.hashed and not found.faults:
        yield line("hashes", "every byte is as it was committed")
    yield from moved_lines(found)
    for title, rows, key in (("can", found.can, "command"), ("cannot", found.cannot, "why")):
        width = max((len(row["to"]) for row in rows), default=0)
        yield from block(title, [f"{row['to']:<{width}}  {row[key]}" for row in rows])


def line(name: str, text: str) -> str:
    return f"{name:<{WIDTH}}{text}"


def block(name: str, texts: list[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield line(name if number == 0 else "", text)


# ---- parts -----------------------------------------------------------------------------------------------------------


def run_lines(run: Mapping[str, Any]) -> Iterator[str]:
    yield line("command", f"litlora {run['command']}" if run["command"] else "not known")
    if run["begins_with"]:
        yield line("from", str(run["begins_with"]))
    if run["data"]:
        yield line("data", ", ".join(map(str, run["data"])) if isinstance(run["data"], list) else str(run["data"]))
    torn = f", {run['torn']} torn" if run["torn"] else ""
    yield line("steps", f"{run['steps']}: {run['whole']} whole ({run['resumable']} with their training state){torn}")
    if run["best"]:
        yield line("best", f"{run['best']} ({run['why']})")
        yield line("last", run["last"])
    yield line("end", f"{run['ended']}: {run['how']}")
    yield from block("left over", [f"{one['path']}: {one['what']}" for one in run["leftovers"]])


def options_text(options: Mapping[str, Any]) -> str:
    """What was chosen; nothing, nowhere and no are left out."""
    told = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in options.items()}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in told.items() if value not in (None, "", False, {}))


def training_lines(training: Mapping[str, Any]) -> Iterator[str]:
    losses = [
        f"{name} loss {training[key]:.4f}"
        for name, key in (("training", "train_loss"), ("validation", "val_loss"))
        if training[key] is not None
    ]
    facts = []
    if training["step"]:
        facts = [f"step {training['step']}", f"epoch {training['epoch']:.2f}", f"{count(training['tokens'])} tokens"]
    if facts or losses:
        yield line("training", ", ".join([*facts, *losses]))
    if training["settings"]:
        yield line("settings", options_text({name.removeprefix("train."): value for name, value in training["settings"].items()}))
    if training["versions"]:
        yield line("written by", ", ".join(f"{name} {number}" for name, number in training["versions"].items()))


def base_text(base: Mapping[str, Any]) -> str:
    words = {
        "same": "the one it was trained on",
        "unrecorded": "it does not say which weights it was trained on",
        "unchecked": "there, its weights not compared: --check reads them",
    }
    if base["state"] in words:
        held = f"; training held it in {base['quantize']}" if base["quantize"] != "none" else ""
        path = names.DEMO if base["path"] == str(names.DEMO_BASE) else base["path"]
        return f"{path} ({words[base['state']]}{held})"
    return f"{base['state']}: {base['why']}"


def model_lines(model: Mapping[str, Any], *, of_base: bool) -> Iterator[str]:
    new = f", of which {', '.join(map(str, model['new_layers']))} are new" if model["new_layers"] else ""
    layers, heads = counted(model["layers"], "layer"), counted(model["heads"], "head")
    shape = f"{model['model_type']}, {layers}{new}, width {model['hidden_size']}, {heads}"
    shape += f" ({model['key_value_heads']} for keys and values)" if model["key_value_heads"] != model["heads"] else ""
    yield line("base model" if of_base else "model", shape)
    tied = "embedding and head are one matrix" if model["tied"] else "the head is a matrix of its own"
    yield line("", f"context {model['context']:,} tokens, vocabulary {model['vocabulary']:,}, {tied}")
    yield line("", stored(model))
    yield line("", f"fingerprint {model['fingerprint'] or 'not computed: --check reads the weights'}")


def stored(tensors: Mapping[str, Any]) -> str:
    dtypes = ", ".join(
        f"{NAMES_OF_DTYPES.get(name, name)}" + (f" ({n})" if len(tensors["dtypes"]) > 1 else "") for name, n in tensors["dtypes"].items()
    )
    return f"{counted(tensors['tensors'], 'tensor')}, {count(tensors['parameters'])} parameters, {dtypes}"


def lineage_lines(found: Report) -> Iterator[str]:
    texts = []
    for one in found.lineage:
        losses = f", validation loss {one['val_loss']:.4f}" if one.get("val_loss") is not None else ""
        step = f"step {one['step']} of " if one.get("step") else ""
        known = f" ({step}{one['method']}{losses})" if "step" in one else "" if one["exists"] else " (not there any more)"
        texts.append(f"{one['how']} {one['path']}{known}")
    texts += map(happened, found.events)
    yield from block("lineage", texts)


def weight_text(weight: object) -> str:
    return f" ({weight:.4g})" if isinstance(weight, int | float) else ""


def happened(event: Mapping[str, Any]) -> str:
    """One event of a manifest's lineage; whoever wrote it may have meant nothing by it."""
    parents = event.get("parents")
    named = [one for one in parents if isinstance(one, dict)] if isinstance(parents, list) else []
    of = [f"{one.get('path')}{weight_text(one.get('weight'))}" for one in named]
    rest = options_text({name: value for name, value in event.items() if name not in ("event", "parents")})
    return f"{event['event']}{' of ' * bool(of)}{', '.join(of)}: {rest}".removesuffix(": ")


def sizes_text(sizes: Mapping[str, int]) -> str:
    words = {"weights": "weights", "training_state": "training state", "merged": "merged model", "other": "other"}
    parts = [f"{words[key]} {amount(size)}" for key, size in sizes.items() if key in words and size]
    return amount(sizes.get("all", 0)) + (f": {', '.join(parts)}" if len(parts) > 1 else "")


# ---- what changed ----------------------------------------------------------------------------------------------------


def moved_lines(found: Report) -> Iterator[str]:
    """How far each module was moved; of many, each kind's range, and each layer's (or each part of the depth)."""
    if found.moved_unknown:
        yield line("changed", f"not known: {found.moved_unknown}")
    if not found.moved:
        return
    far = found.moved.values()
    still = sum(share == 0 for share in far)
    all_of_it = counted(len(found.moved), "module or tensor", "modules and tensors")
    yield line("changed", f"{len(found.moved) - still:,} of {all_of_it}, as a share of what was there")
    yield from rows(found.moved if len(found.moved) <= FEW else None, by_kind(found.moved), by_layer(found.moved))
    if found.lost_to_rounding:
        yield line("", f"{found.lost_to_rounding:.1%} of the change was lost to rounding when it was stored")


def rows(few: Mapping[str, float] | None, *groups: Mapping[str, list[float]]) -> Iterator[str]:
    if few is not None:
        width = max(map(len, few))
        yield from (line("", f"{name:<{width}}  {far:8.3%}") for name, far in few.items())
        return
    width = max(len(name) for group in groups for name in group)
    for group in groups:
        for name, shares in group.items():
            mean = (sum(share * share for share in shares) / len(shares)) ** 0.5
            span = f"  ({min(shares):.3%} to {max(shares):.3%})" if len(shares) > 1 else ""
            yield line("", f"{name:<{width}}  {len(shares):4} x {mean:8.3%}{span}")


def by_kind(moved: Mapping[str, float]) -> dict[str, list[float]]:
    """`self_attn.q_proj`: the last words of the modules' names."""
    kinds: dict[str, list[float]] = {}
    for name, far in moved.items():
        words = [
            word for word in name.split(".") if word not in ("weight", "adapter", "prompt", "model", "layers") and not word.isdecimal()
        ]
        kinds.setdefault(".".join(words) or name, []).append(far)
    return kinds


def by_layer(moved: Mapping[str, float]) -> dict[str, list[float]]:
    """`layer 3`, or where there are many layers `layers 4-7`; what lies outside the layers is in `by_kind` alone."""
    of_layer: dict[int, list[float]] = {}
    for name, far in moved.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdecimal():
            of_layer.setdefault(int(parts[2]), []).append(far)
    if not of_layer:
        return {}
    size = -(-(max(of_layer) + 1) // FEW)  # layers that share a line
    found: dict[str, list[float]] = {}
    for layer in sorted(of_layer):
        first = layer // size * size
        found.setdefault(f"layer {layer}" if size == 1 else f"layers {first}-{first + size - 1}", []).extend(of_layer[layer])
    return found
