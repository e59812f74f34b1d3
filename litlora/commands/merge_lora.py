"""`litlora merge_lora`: a step and its base become a plain Hugging Face directory. Says what it does, does it, says what to type next."""

import os
import shlex
from pathlib import Path
from typing import Any

from litlora.console import Progress, counted, header, put, say, warn
from litlora.errors import UserError
from litlora.options import MergeLoRA

BIG = 256 * 2**20  # bytes of a base from which on a progress line is worth it
MB = 10**6


def merge_lora(options: MergeLoRA) -> None:
    """Merge the adapter that `options` names; the result's path goes to standard output. UserError, WorkError: nothing was written."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported: the merge spreads tensors over threads itself
    from litlora.checkpoint.resolve import resolve
    from litlora.merge import merge, prepare

    checkpoint = resolve(options.checkpoint_dir, base_dir=options.base_dir)
    if checkpoint.is_demo and options.checkpoint_dir is None:
        raise UserError("there is no run in out whose adapter could be merged", hint="litlora finetune lora makes one; or name a step")
    plan = prepare(checkpoint, Path(options.out_dir) if options.out_dir else None, dtype=options.dtype, overwrite=options.overwrite)
    model = plan.model
    kept = "every tensor keeps its dtype" if model.dtype is None else f"every tensor becomes {options.dtype}"
    header(
        [
            ("adapter", str(checkpoint.path)),
            ("base", f"{model.base.typed}, {model.base_bytes / MB:,.0f} MB"),
            ("result", f"{plan.out_dir}, {model.bytes / MB:,.0f} MB; {kept}"),
        ]
    )
    if checkpoint.manifest is None:
        warn("this adapter does not say which weights it was trained on, so nobody can tell whether this base is the right one")
    bar = Progress(model.bytes // MB, "MB", quiet=model.bytes < BIG)
    report = merge(plan, prove=full_proof(options, plan), progress=lambda done: bar.update(done // MB))
    bar.close()
    tell(report)
    place = shlex.quote(str(plan.out_dir))
    say(f"next: litlora chat {place}")
    say(f"      or AutoModelForCausalLM.from_pretrained({str(plan.out_dir)!r}), or vllm serve {place}")
    put(plan.out_dir)


def full_proof(options: MergeLoRA, plan: Any) -> Any:
    """What `--verify full` adds before the result gets its name: everything read again, and logits. Needs torch, so it is asked for."""
    if options.verify != "full":
        return None
    from litlora.verify import prove

    return lambda directory: prove(plan.checkpoint, directory)


def tell(report: dict[str, Any]) -> None:
    """The proof in a few lines."""
    tensors, changed, moved = report["tensors"], len(report["modules"]), report["update_relative_norm"]
    told = [f"{counted(changed, 'module')} changed" + (f" by {moved:.3%} of their norm" if moved is not None else "")] if changed else []
    told += [counted(tensors["new"], "tensor is new", "tensors are new")] if tensors["new"] else []
    told += [counted(tensors["copied"], "tensor untouched", "tensors untouched")]
    told += [f"{tensors['converted']} stored in another dtype"] if tensors["converted"] else []
    say(", ".join(told))
    if report["new_layers"]:
        say(f"new layers, counted from 0: {', '.join(map(str, report['new_layers']))}")
    say(f"{report['size']}")
    if report["modules_unchanged"]:
        same = counted(len(report["modules_unchanged"]), "adapted module")
        warn(f"{same} did not change at all: the update is zero")
    if report["trained_on"] != "none":
        kind = report["trained_on"]
        say(f"training saw the base in {kind}; this went into the original weights, which are near to that and not the same")
    lost = report["update_lost_to_rounding"]
    if lost > 0.5:
        hint = "--dtype float32 keeps all of it; or use the adapter unmerged (litlora chat, vLLM with LoRA)"
        warn(f"rounding took {lost:.0%} of the update away: it is small beside the weights, and their dtype is coarse", hint)
    if "proof" in report:
        proof = report["proof"]
        written = counted(proof["tensors"], "tensor")
        say(f"read again from the disk: {written} as written; logits differ by at most {proof['largest_difference']:.2g}")
