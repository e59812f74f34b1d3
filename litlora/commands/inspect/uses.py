"""What a checkpoint is good for, as commands that work as they stand, and what it is not, with the reason."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from litlora.checkpoint import names
from litlora.checkpoint.card import typed, vllm_command, why_not_vllm
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.history import command_of, how_it_ended
from litlora.checkpoint.resolve import Step, list_step_paths, read_step
from litlora.errors import UserError

if TYPE_CHECKING:
    from litlora.commands.inspect.report import Report

Can = list[dict[str, str]]  # {"to": ..., "command": ...}
Cannot = list[dict[str, str]]  # {"to": ..., "why": ...}


def uses_of(checkpoint: Checkpoint, found: "Report") -> tuple[Can, Cannot]:
    """Of a model, a step or an adapter; `found` is what is known of it so far."""
    can, cannot = uses_of_model(checkpoint, found) if checkpoint.is_model else uses_of_adapter(checkpoint, found)
    if checkpoint.kind == "step":
        more, no = going_on(checkpoint)
        can, cannot = [*can, *more], [*cannot, *no]
    check = use("check it", f"litlora verify {typed(str(checkpoint.path))}{base_option(checkpoint)}")
    return [*can, check] if can or checkpoint.kind == "step" else can, cannot


def uses_of_model(checkpoint: Checkpoint, found: "Report") -> tuple[Can, Cannot]:
    here = typed(str(checkpoint.path))
    merging = why_not("merge", "it is a whole model already")
    if found.model is None:
        return [], [why_not("use it", found.faults[0] if found.faults else "it is no model that litlora knows"), merging]
    cannot = [merging]
    if found.tokenizer and found.tokenizer["tokenizer"] is None:
        return [], [why_not("talk to it", "it has no tokenizer"), merging]
    can = [
        use("chat", f"litlora chat {here}"),
        use("generate", f"litlora generate {here} --prompt TEXT"),
        use("evaluate", f"litlora evaluate {here} --data FILE"),
    ]
    if checkpoint.kind == "base":
        can.append(use("train it", f"litlora finetune {'pro' if found.kind == 'expanded' else 'lora'} {here} --data FILE --out_dir DIR"))
    can.append(use("transformers", f"AutoModelForCausalLM.from_pretrained({str(checkpoint.path)!r})"))
    can.append(use("vLLM", f"vllm serve {here}"))
    return can, cannot


def uses_of_adapter(checkpoint: Checkpoint, found: "Report") -> tuple[Can, Cannot]:
    here, moved = typed(str(checkpoint.path)), base_option(checkpoint)
    if found.adapter is None or found.model is None or found.faults:
        lost = found.base["why"] if found.base else None
        can = [use("give its base", f"litlora inspect {here} --base_dir DIR")] if lost else []
        return can, [why_not("use it", lost or (found.faults[0] if found.faults else "its files do not fit together"))]
    can = [
        use("chat", f"litlora chat {here}{moved}"),
        use("generate", f"litlora generate {here}{moved} --prompt TEXT"),
        use("evaluate", f"litlora evaluate {here}{moved} --data FILE"),
    ]
    cannot = []
    if found.adapter["merges"]:
        can.append(use("merge", f"litlora merge_lora {here}{moved}"))
    else:
        cannot.append(why_not("merge", found.adapter["why_not"]))
    base, own = str(checkpoint.base().path), str(checkpoint.path)
    if not found.adapter["in_peft"]:
        return can, [*cannot, why_not("PEFT, vLLM", f"neither knows this method; {names.OWN_ADAPTER_WEIGHTS} is read by litlora alone")]
    can.append(use("PEFT", f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {own!r})"))
    options = lora_options(checkpoint)
    if why := why_not_vllm(options):
        cannot.append(why_not("vLLM", why))
    else:
        can.append(use("vLLM", vllm_command(options, base, own)))
    return can, cannot


def lora_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """What vLLM asks about, from adapter_config.json as it was checked; nothing where it describes no LoRA."""
    try:
        described = checkpoint.adapter_config()
    except UserError:
        return {}
    ranks = [f"{name}={rank}" for name, rank in described.rank_pattern.items()]
    return {"r": described.r, "use_dora": described.use_dora, "modules_to_save": described.modules_to_save, "rank_pattern": ranks}


# ---- going on with training ------------------------------------------------------------------------------------------


def going_on(step: Checkpoint) -> tuple[Can, Cannot]:
    """Resuming the run where this step is the one that it goes on from; a new run from its weights in any case."""
    run, command = step.path.parent, command_of(step.path.parent)
    if not command:
        return [], [why_not("resume", f"it lies in no run: {names.RUN_YAML} is not beside it")]
    can = []
    if command != "pretrain":  # --config: the method and its shapes must be the same
        more = f"litlora {command} --config {typed(str(run / names.RUN_YAML))}"
        can.append(use("train on", f"{more} --checkpoint_dir {typed(str(step.path))}{base_option(step)} --out_dir DIR"))
    looked = [read_step(path, hashed=False) for path in list_step_paths(run)]
    newest = max((one for one in looked if one.is_resumable), key=lambda one: one.number, default=None)
    why = why_not_resumed(step, newest)
    if why or newest is None:
        return can, [why_not("resume", why)]
    epoch = step.manifest.epoch if step.manifest else 0.0
    return [resume(run, command, how_it_ended(run, newest.number, epoch)[0]), *can], []


def why_not_resumed(step: Checkpoint, newest: Step | None) -> str:
    if newest is None or (step.manifest and newest.number < step.manifest.step):
        return "it has no training state"
    return "" if newest.path.name == step.path.name else f"--resume goes on from the newest, {newest.path.name}"


def resume(run: Path, command: str, ended: str) -> dict[str, str]:
    """A run that came to its end goes on where it is given more steps."""
    words = f"litlora {command} --resume" + ("" if str(run) == names.RUN else f" --out_dir {typed(str(run))}")
    return use("train longer", f"{words} --train.max_steps N") if ended == "finished" else use("resume", words)


def uses_of_run(run: Path, known: dict[str, Any]) -> tuple[Can, Cannot]:
    here = typed(str(run))
    can: Can = []
    cannot: Cannot = []
    if known["steps"]:
        can.append(use("its steps", f"litlora list {here}"))
    if known["model"]:
        can.append(use("its model", f"litlora inspect {typed(known['model'])}"))
    if known["best"]:
        can.append(use("its best", f"litlora inspect {typed(known['best'])}"))
        can.append(use("chat", f"litlora chat {here}"))
    else:
        cannot.append(why_not("use it", "no checkpoint in it is whole" if known["steps"] else "it has no checkpoint yet"))
    if known["ended"] == "running":
        cannot.append(why_not("resume", known["how"]))
    elif known["command"] and (known["resumable"] or not known["steps"]):
        can.append(resume(run, known["command"], known["ended"]))
    elif known["steps"]:
        cannot.append(why_not("resume", f"there is no {names.RUN_YAML}" if not known["command"] else "no step has its training state"))
    return can, cannot


def whole_hint(torn: Path) -> Can:
    """The newest other step of the run that nothing seems to be wrong with."""
    others = [path for path in list_step_paths(torn.parent) if path != torn] if names.step_number(torn) is not None else []
    whole = next((path for path in reversed(others) if read_step(path, with_state=False, hashed=False).is_whole), None)
    return [use("go on", f"litlora inspect {typed(str(whole))}")] if whole else []


# ---- words -----------------------------------------------------------------------------------------------------------


def use(purpose: str, command: str) -> dict[str, str]:
    return {"to": purpose, "command": command}


def why_not(purpose: str, why: str) -> dict[str, str]:
    return {"to": purpose, "why": why}


def base_option(checkpoint: Checkpoint) -> str:
    return f" --base_dir {typed(str(checkpoint.base_dir))}" if checkpoint.base_dir is not None else ""
