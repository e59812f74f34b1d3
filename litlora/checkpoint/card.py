"""README.md of a step: what it is, and commands that work as they stand."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.manifest import Manifest

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes


def model_card(manifest: Manifest, directory: str = "", *, in_peft: bool = True, misread: str = "", unmergeable: str = "") -> str:
    """The text of README.md; `directory` is the step's path as the user would type it (default: its name).

    `in_peft`: whether its file is one of PEFT's; `misread`: why PEFT computes something else with it, if it does; `unmergeable`: why it
    cannot be merged, if it cannot.
    """
    here = directory or names.step_name(manifest.step)
    sections = [_front_matter(manifest, in_peft), _what(manifest, here), _use_litlora(manifest, here)]
    if manifest.base is None:
        sections.append(_use_transformers(here))
    else:
        base = manifest.base.path if manifest.base.path != names.DEMO else str(names.DEMO_BASE)
        if in_peft and misread:
            sections.append(f"PEFT reads it, and computes something else: {misread}. Merged, any tool computes the same.")
        elif in_peft:
            sections += [_use_peft(base, here), _use_vllm(manifest, base, here)]
        sections.append(f"It cannot be merged: {unmergeable}." if unmergeable else _merge(here))
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(manifest: Manifest, in_peft: bool) -> str:
    library = "transformers" if manifest.base is None else "peft" if in_peft else "litlora"
    lines = [f"library_name: {library}", f"tags: [{manifest.method}, litlora]"]
    return "\n".join(["---", *lines, "---"])


def _what(manifest: Manifest, here: str) -> str:
    losses = [
        f"{name} {loss:.4f}"
        for name, loss in (("training loss", manifest.train_loss), ("validation loss", manifest.val_loss))
        if loss is not None
    ]
    facts = [f"step {manifest.step}", f"epoch {manifest.epoch:.2f}", *losses]
    lines = [f"# {names.step_name(manifest.step)}", "", ", ".join(facts) + "."]
    if manifest.lineage and manifest.lineage[-1]["event"] == "combined":
        lines = [f"# {Path(here).name}", "", *_parents(manifest.lineage[-1])]
    elif not manifest.step:
        lines = [f"# {Path(here).name}", "", "Converted by `litlora convert`, which knows nothing of its training."]
    if manifest.base is not None:
        lines += ["", f"{_kind(manifest)}. It holds no base weights; its base is `{manifest.base.path}` ({manifest.base.model_type}),"]
        lines += [f"fingerprint `{manifest.base.fingerprint}`."]
        if manifest.base.quantize != "none":
            lines += [f"Training held the base's weights in {manifest.base.quantize}, and litlora does so when it answers; others and a"]
            lines += ["merge take them as they are in the base, which is close to it and not the same."]
        if manifest.base.path == names.DEMO:
            lines += ["", "The base is the toy model that comes with litlora: good for trying things, not for answers."]
    else:
        lines += ["", "A whole model in Hugging Face's layout."]
    return "\n".join(lines)


def _parents(event: Mapping[str, Any]) -> list[str]:
    """What it was combined of."""
    values = "".join(f", {name} {value}" for name, value in event["options"].items())
    lines = [f"Made by `litlora combine --how {event['how']}`{values} of", ""]
    return lines + [f"* {parent['weight']:.6g} x `{parent['path']}`" for parent in event["parents"]]


def _kind(manifest: Manifest) -> str:
    options = manifest.options
    return {
        "lora": f"A {'DoRA' if options.get('use_dora') else 'LoRA'} adapter",
        "adapter": f"Adapters ({options.get('kind')})",
        "pro": "New blocks for a model (LLaMA-Pro)",
        "freeze": "Some layers and modules of a model, trained",
    }.get(manifest.method, manifest.method)


def _use_litlora(manifest: Manifest, here: str) -> str:
    return _block("litlora", "sh", f"litlora chat {typed(here)}\nlitlora generate {typed(here)} --prompt 'Hello'")


def _use_peft(base: str, here: str) -> str:
    code = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({here!r})
model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, {here!r})"""
    return _block("PEFT", "python", code)


def _use_transformers(here: str) -> str:
    code = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({here!r})
model = AutoModelForCausalLM.from_pretrained({here!r})"""
    return _block("transformers", "python", code)


def _use_vllm(manifest: Manifest, base: str, here: str) -> str:
    """Nothing where vLLM cannot."""
    return "" if why_not_vllm(manifest.options) else _block("vLLM", "sh", vllm_command(manifest.options, base, here))


def vllm_command(options: Mapping[str, Any], base: str, here: str) -> str:
    """Serves the adapter at `here`, trained with LoRA's `options`; only where `why_not_vllm` is empty."""
    rank = next(rank for rank in VLLM_RANKS if rank >= _stored_rank(options))
    return f"vllm serve {typed(base)} --enable-lora --max-lora-rank {rank} --lora-modules {typed(f'{Path(here).name}={here}')}"


def why_not_vllm(options: Mapping[str, Any]) -> str:
    """Why vLLM cannot serve an adapter that was trained with these options; empty where it can."""
    if not isinstance(options.get("r"), int):
        return "vLLM serves LoRA alone"
    if options.get("use_dora"):
        return "vLLM has no DoRA"
    if options.get("modules_to_save"):
        return "vLLM does not load modules that were trained whole"
    rank = _stored_rank(options)
    return "" if rank <= VLLM_RANKS[-1] else f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this one is {rank}"


def _stored_rank(options: Mapping[str, Any]) -> int:
    largest = max([options["r"], *(int(word.rpartition("=")[2]) for word in options.get("rank_pattern", []))])
    return 2 * largest if options.get("init") == "pissa" else largest


def _merge(here: str) -> str:
    return _block("Merge into a plain model", "sh", f"litlora merge_lora {typed(here)}") + f"\n\nThe result is in `{here}/{names.MERGED}`."


def _block(title: str, language: str, code: str) -> str:
    return f"## {title}\n\n```{language}\n{code}\n```"


def typed(path: str) -> str:
    """As one word of a shell; a path that begins with a dash is not an option."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)
