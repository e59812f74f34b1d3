"""`litlora finetune METHOD`: a base, a method and rows -> out/step-100, out/step-200 ... (train/run.py does the rest).

What is trained is a Tuning, whatever the method; `full` alone differs in what a step holds: a whole model.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from litlora import console
from litlora.checkpoint import names
from litlora.checkpoint.card import model_card, typed
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.files import as_json, model_files, open_prompts, serving_files
from litlora.checkpoint.manifest import Manifest
from litlora.checkpoint.resolve import demo_base, resolve
from litlora.checkpoint.weights import adapter_tensors, as_files_name, base_tensors, load_base, quantize_meant
from litlora.config import Config, merged_layers
from litlora.data.samples import IGNORE, DataSet
from litlora.errors import UserError, WorkError
from litlora.families import learns, linear_shapes
from litlora.methods import METHODS, lora_config, stored_tuning, tuning_of
from litlora.methods.attach import attach, frozen_state, linears, load_tuned_state, numbers_in, trainable, tuned_state
from litlora.methods.tuning import EMBEDDING, HEAD, LoRASlot, Tuning, why_misread, why_unmergeable
from litlora.model import GPT
from litlora.options import AdapterOptions, Finetune, FitOptions, FreezeOptions, LoRAOptions
from litlora.peft import adapter_config_to_peft, prompt_to_peft
from litlora.precision import choose_dtype
from litlora.prompts import Prompts
from litlora.train.before import check_run, is_first_process
from litlora.train.guards import say_what_moved, warn_of_untrained_end
from litlora.train.run import Job, compute_text, load_rows, open_run, show_samples, train
from litlora.train.signals import Signals


def finetune(options: Finetune) -> None:
    """Fine-tune, committing a step now and then; print the last one's path."""
    with Signals() as signals:
        work, job = planned(options, start_of(options))
        if options.dry_run:
            show_samples(job)
            return
        with open_run(options, needed_bytes=step_bytes(work)) as directory:
            for message in directory.messages if is_first_process() else ():
                console.warn(message)
            last = train(job, directory.resume_from, signals)
        if is_first_process():
            say_what_moved(resolve(last, base_dir=work.base.path), work.base)
            say_what_next(last, options, work)


def start_of(options: Finetune) -> Checkpoint:
    """What training begins with; where a run is resumed whose base moved, that is where --base_dir says."""
    path = options.checkpoint_dir
    if path and options.resume and options.base_dir and not Path(path).exists():
        path = options.base_dir
    return resolve(path, base_dir=options.base_dir) if path else demo_base()


def planned(options: Finetune, start: Checkpoint) -> tuple["Work", Job]:
    """What is trained, and how: everything that can be refused is, and nothing is written yet. Where `start` is only looked at, nothing
    ever will be, and no weight is needed."""
    base = start.base()
    options = with_rate(options, options.method, base)
    quantize = quantize_meant(options.quantize, [] if start is base else [start])
    work = Work(options, options.method, getattr(options, options.method), start, base, quantize)
    refuse_nothing_frozen(work)
    if not base.looks_only:
        base.shards()  # whatever is wrong with the model is said before anything is written
    if start is not base:
        refuse_another_method(start, work)
    prompts = open_prompts(start, options.chat_template)
    if not base.looks_only:
        check_run(options, [start.path, base.path])
    data = load_rows(options, prompts, context=work.config.max_position_embeddings)
    return work, job_of(work, f"finetune {options.method}", prompts, data)


def with_rate(options: Any, method: str, base: Checkpoint) -> Any:
    """The options with a learning rate: what was asked for, else the method's own."""
    if options.train.lr is not None:
        return options
    rate = METHODS[method].demo_rate if base.is_demo else METHODS[method].rate
    return replace(options, train=replace(options.train, lr=rate))


@dataclass(frozen=True)
class Work:
    """What is trained, of which model, from where."""

    options: FitOptions
    method: str
    wanted: Any  # the method's own options
    start: Checkpoint  # the base, or the step that training goes on from
    base: Checkpoint
    quantize: str = "none"  # in which few bits the frozen weights are held

    @property
    def config(self) -> Config:
        return self.base.config()

    @property
    def tuning(self) -> Tuning:
        return tuning_of(self.wanted, self.config)

    @property
    def is_full(self) -> bool:
        return self.method == "full"


def step_bytes(work: Work) -> int:
    """What a step takes on the disk: what learns in fp32, AdamW's two moments, a whole model as it is stored, and the small files."""
    count = sum(torch.Size(shape).numel() for shape in work.tuning.parameters(work.config).values())
    stored = sum(tensor.nbytes for tensor in base_tensors(work.base).values()) if work.is_full else 0
    return 3 * 4 * count + stored + 2**25


def job_of(work: Work, command: str, prompts: Prompts, data: DataSet) -> Job:
    """The Job of training `work` on rows."""
    options, base, start, config, tuning = work.options, work.base, work.start, work.config, work.tuning
    stored = stored_tuning(work.wanted, config)
    dtypes = stored_dtypes(work) if work.is_full and not base.looks_only else {}

    def build(device: torch.device) -> GPT:
        dtype = choose_dtype(options.precision, device)
        model = load_base(base, dtype, device, quantize=work.quantize, wide=tuning.whole, looked_up=True)
        attach(model, tuning, seed=options.seed, stored=base_tensors(base))
        if start is not base:
            put_back(work, model, start)
        if is_first_process():
            if not {EMBEDDING, HEAD} & set(tuning.whole) and "lm_head.adapter" not in tuning.slots:
                warn_of_untrained_end(model, graded_ends(data, prompts), prompts.tokenizer)
            few = [("frozen", few_bits_text(model, work.quantize))] if work.quantize != "none" else []
            console.header([*few, ("trained", trained_text(model))])
        return model

    def contents(model: GPT) -> Mapping[str, Mapping[str, torch.Tensor]]:
        if work.is_full:
            return {names.WEIGHTS: as_files_name(as_stored(dict(model.named_parameters()), dtypes), model.config)}
        file = names.ADAPTER_WEIGHTS if tuning.in_peft else names.OWN_ADAPTER_WEIGHTS
        return {file: tuned_state(model, tuning, config)}

    def exact(model: GPT) -> Mapping[str, torch.Tensor]:
        rounded = {name: p.detach() for name, p in trainable(model).items() if p.dtype != dtypes.get(name, p.dtype)}
        return rounded | frozen_state(model)

    def card(manifest: Manifest) -> str:
        where = str(Path(options.out_dir) / names.step_name(manifest.step))
        misread, unmergeable = why_misread(tuning, config), why_unmergeable(tuning, config)
        return model_card(manifest, where, in_peft=tuning.in_peft, misread=misread, unmergeable=unmergeable)

    return Job(
        command=command,
        options=options,
        method=work.method,
        method_options=asdict(work.wanted),
        prompts=prompts,
        data=data,
        base=None if work.is_full else base.record(Path(options.out_dir), work.quantize),
        parent=str(start.path.resolve()) if work.is_full or start is not base else None,
        facts=[*facts(work, stored), ("template", prompts.template_name)],
        build=build,
        restore=partial(put_back, work),
        contents=contents,
        exact=exact,
        files={**serving_files(start.tokenizer_dir(), prompts.template, prompts.tool_template), **method_files(work)},
        card=card,
        config=config,
        tuning=tuning,
        from_nothing=False,
        lineage=start.manifest.lineage if start.manifest else (),
        origin=start.fingerprint() if work.is_full and not base.looks_only else None,
        lr_ratio=work.wanted.lr_ratio if isinstance(work.wanted, LoRAOptions) else 1.0,
        watched=new_layers(tuning, config) if work.method == "pro" else {},
    )


def stored_dtypes(work: Work) -> dict[str, torch.dtype]:
    """What each tensor of a whole model is stored in: as in the one it comes from, or what learns in fp32 where that was asked for."""
    dtypes = {name: tensor.dtype for name, tensor in base_tensors(work.base).items()}
    dtypes |= {HEAD: dtypes[EMBEDDING]} if work.tuning.untied else {}
    if work.wanted.dtype == "float32":
        return {name: torch.float32 if learns(name) else dtype for name, dtype in dtypes.items()}
    return dtypes


def put_back(work: Work, model: GPT, step: Checkpoint) -> None:
    """What a step holds, into the model."""
    if work.is_full:
        with torch.no_grad():
            for name, tensor in base_tensors(step).items():
                model.get_parameter(name).copy_(tensor)
    else:
        load_tuned_state(model, work.tuning, adapter_tensors(step), step.adapter_file(), work.config)


def as_stored(trained: Mapping[str, torch.nn.Parameter], dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """A whole model in the dtypes of the one it comes from. WorkError where a number does not fit any more."""
    tensors = {}
    for name, parameter in trained.items():
        tensor = parameter.detach().to(dtypes[name])
        if not torch.isfinite(tensor).all():
            raise WorkError(f"{name} has grown beyond what {str(tensor.dtype).removeprefix('torch.')} holds; nothing was committed")
        tensors[name] = tensor if tensor.dtype == parameter.dtype else tensor.cpu()  # beside a model a GPU may have no room for another
    return tensors


def method_files(work: Work) -> dict[str, bytes]:
    """What else lies in a step, so that others can load it."""
    base = work.base
    if work.is_full:
        config = replace(work.config, tie_word_embeddings=work.config.tie_word_embeddings and not work.wanted.untie)
        return model_files(base, replace(config, torch_dtype="float32") if work.wanted.dtype == "float32" else config)
    path = str(base.path.resolve())
    if isinstance(work.wanted, LoRAOptions):
        return {names.ADAPTER_CONFIG: as_json(adapter_config_to_peft(lora_config(work.wanted, work.config, path)))}
    if work.tuning.in_peft:
        return {names.ADAPTER_CONFIG: as_json(prompt_to_peft(work.wanted, len(work.tuning.slots), path))}
    return {}


def graded_ends(data: DataSet, prompts: Prompts) -> set[int]:
    """The ids that end an answer in the first rows: what the model has to learn to stop with."""
    last = [int(sample.targets[sample.targets != IGNORE][-1]) for sample in data.train[:64]]
    return set(last) & prompts.stop_ids


def refuse_nothing_frozen(work: Work) -> None:
    """Few bits are for weights that stand still."""
    if work.quantize != "none" and set(linear_weights(work.config)) <= set(work.tuning.whole):
        what = f"{work.method} trains every weight, and those in {work.quantize} cannot learn"
        raise UserError(what, where="--quantize", hint="--quantize none, or a method that leaves weights as they are, such as lora")


def linear_weights(config: Config) -> list[str]:
    """The weights that --quantize is about: those of the blocks' Linears."""
    return [f"{name}.weight" for name in linear_shapes(config) if name != "lm_head"]


def refuse_another_method(start: Checkpoint, work: Work) -> None:
    """Training goes on from a step's weights where the method and its shapes are the step's; anything else needs a merge first."""
    hint = f"use the same options, or merge first: litlora merge_lora {typed(str(start.path))}"
    if start.method != work.method:
        raise UserError(f"was trained by {start.method}, so {work.method} cannot go on from its weights", where=start.path, hint=hint)
    theirs, ours = start.tuning(), stored_tuning(work.wanted, work.config)
    here, there = (without_dropout(tuning) for tuning in (ours, theirs))
    slots = [slot for slot in {**there, **here} if there.get(slot) != here.get(slot)]
    different = [f"{slot}: {there.get(slot)} there, {here.get(slot)} here" for slot in slots]
    different += [
        f"{what}: {getattr(theirs, what)} there, {getattr(ours, what)} here"
        for what in ("inserted", "whole", "untied")
        if getattr(theirs, what) != getattr(ours, what)
    ]
    if different:
        raise UserError(
            "holds another adapter than the one asked for, so training cannot go on from its weights",
            where=start.path,
            context=different,
            hint=hint,
        )


def without_dropout(tuning: Tuning) -> dict[str, Any]:
    """Its slots; dropout may be another one when training goes on."""
    return {slot: replace(kind, dropout=0.0) if isinstance(kind, LoRASlot) else kind for slot, kind in tuning.slots.items()}


# ---- what is said ----------------------------------------------------------------------------------------------------


def facts(work: Work, stored: Tuning) -> list[tuple[str, str]]:
    """Header lines about the model and the method."""
    base, options = work.base, work.options
    name = "demo (a toy model that comes with litlora)" if base.is_demo else str(base.path)
    from_step = "" if work.start is base else f" · from {work.start.path}"
    lines = [("model", f"{name} · {work.config.model_type} · {compute_text(options)}{from_step}"), ("method", method_text(work))]
    why = "" if work.is_full else why_unmergeable(stored, work.config)
    return [*lines, ("merging", f"not possible: {why}. Every command takes the steps as they are")] if why else lines


def method_text(work: Work) -> str:
    """One line: what learns, and where."""
    wanted, tuning, layers = work.wanted, work.tuning, work.config.num_hidden_layers
    if isinstance(wanted, LoRAOptions):
        kind = "DoRA" if wanted.use_dora else "LoRA" if wanted.init == "default" else f"LoRA ({wanted.init})"
        text = f"{kind} r={wanted.r} alpha={wanted.alpha:g} on {' '.join(wanted.target_modules)}"
        text += f" of layers {' '.join(wanted.layers)}" if wanted.layers else ""
    elif isinstance(wanted, AdapterOptions):
        text = f"{wanted.kind} adapters: {len(tuning.slots)} in {console.counted(layers, 'layer')}"
    elif work.method == "pro":
        new = [label.removeprefix("layer_") for label in new_layers(tuning, work.config)]
        which = f"layer {new[0]}" if len(new) == 1 else f"layers {', '.join(new)}"
        learn = "is new and learns" if len(new) == 1 else "are new and learn"
        text = f"LLaMA-Pro: {which} of {layers + len(tuning.inserted)} {learn}, the others stand still"
    elif isinstance(wanted, FreezeOptions):
        text = f"{' '.join(wanted.modules)} of layers {' '.join(wanted.layers)} of {layers}"
        text += f", and {' '.join(wanted.extra_modules)}" if wanted.extra_modules else ""
    else:
        return "full: every parameter learns"
    saved = getattr(wanted, "modules_to_save", [])
    shared = EMBEDDING in tuning.whole and work.config.tie_word_embeddings and not tuning.untied
    head = ", the head untied" if tuning.untied else " (embedding and head are one matrix)" if shared else ""
    return text + (f", and {' '.join(saved)} whole" if saved else "") + head


def new_layers(tuning: Tuning, config: Config) -> dict[str, str]:
    """The new blocks: `layer_N`, N in the deeper model -> how the names of its parameters begin."""
    if not tuning.inserted:
        return {f"layer_{layer}": f"model.layers.{layer}." for layer in config.llama_pro_layers}
    places = merged_layers(config, tuning.inserted)
    return {f"layer_{place}": f"model.layers.{layer}.inserted." for place, (layer, is_new) in enumerate(places) if is_new}


def trained_text(model: GPT) -> str:
    count = sum(parameter.numel() for parameter in trainable(model).values())
    all_of_it = numbers_in(model)
    return f"{console.count(count)} of {console.count(all_of_it)} parameters ({count / all_of_it:.1%})"


def few_bits_text(model: GPT, quantize: str) -> str:
    """What is held in few bits, and what that saves."""
    held = [host for host in linears(model).values() if host.quantized is not None]
    few = sum(host.quantized.nbytes for host in held if host.quantized is not None)
    wide = sum(host.in_features * host.out_features for host in held) * model.lm_head.weight.element_size()
    weights = console.counted(len(held), "weight")
    return f"{weights} in {quantize}: {console.amount(few)} instead of {console.amount(wide)}; all others stay wide"


def say_what_next(last: Path, options: Finetune, work: Work) -> None:
    """The end of a run: the result to standard output, what to type next to standard error."""
    where = "" if options.out_dir == names.RUN else f" {typed(options.out_dir)}"
    lines = [("next", f"litlora chat{where}")]
    if not work.is_full:
        lines.append(("", f"litlora evaluate {typed(str(last))} --compare_base"))
    if not work.is_full and not why_unmergeable(work.tuning, work.config):
        lines.append(("", f"litlora merge_lora --checkpoint_dir {typed(str(last))}"))
    console.header(lines)
    console.put(last)
