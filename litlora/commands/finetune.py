"""`litlora finetune METHOD`: a base, a method and rows -> out/step-100, out/step-200 ... (train/run.py does the rest)."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from litlora import console
from litlora.checkpoint import names
from litlora.checkpoint.card import model_card
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import Tensors
from litlora.checkpoint.files import as_json, open_tokenizer, serving_files
from litlora.checkpoint.manifest import Manifest
from litlora.checkpoint.resolve import demo_base, resolve
from litlora.checkpoint.weights import adapter_tensors, load_base, raw_tensors
from litlora.data.samples import IGNORE, DataSet
from litlora.errors import UserError
from litlora.families import linear_shapes
from litlora.methods import METHODS, adapter_state, load_adapter_state, trainable
from litlora.model import GPT
from litlora.options import FinetuneLoRA
from litlora.peft import adapter_config, adapter_config_to_peft, rank_and_alpha, targets
from litlora.precision import choose_dtype
from litlora.prompts import Prompts
from litlora.train.guards import warn_of_untrained_end
from litlora.train.run import Job, check_run, compute_text, is_first_process, load_rows, open_run, show_samples, train
from litlora.train.signals import Signals

RATE = 2e-4
DEMO_RATE = 1e-3  # a model 128 wide takes, and needs, larger steps: 99% exact instead of 70%


def finetune(options: FinetuneLoRA) -> None:
    """Fine-tune, committing a step now and then; print the last one's path."""
    with Signals() as signals:
        start = resolve(options.checkpoint_dir, base_dir=options.base_dir) if options.checkpoint_dir else demo_base()
        base = start.base()
        options = with_rate(options, base)
        base.config(), base.shards()  # whatever is wrong with the model is said before anything is written
        if start is not base:
            refuse_another_method(start, options)
        prompts = Prompts(open_tokenizer(start))
        check_run(options)
        data = load_rows(options, prompts, context=base.config().max_position_embeddings)
        job = lora_job(options, start, base, prompts, data)
        if options.dry_run:
            show_samples(job)
            return
        with open_run(options, needed_bytes=step_bytes(options, base)) as directory:
            for message in directory.messages if is_first_process() else ():
                console.warn(message)
            last = train(job, directory.resume_from, signals)
        if is_first_process():
            say_what_next(last, options)


def with_rate(options: FinetuneLoRA, base: Checkpoint) -> FinetuneLoRA:
    """The options with a learning rate: what was asked for, else the method's own."""
    if options.train.lr is not None:
        return options
    return replace(options, train=replace(options.train, lr=DEMO_RATE if base.is_demo else RATE))


def step_bytes(options: FinetuneLoRA, base: Checkpoint) -> int:
    """What a step takes on the disk: the adapter in fp32, AdamW's two moments, and the small files."""
    shapes = linear_shapes(base.config())
    described = adapter_config(options.lora, list(shapes))
    adapted = sum(rank_and_alpha(described, name)[0] * sum(shapes[name]) for name in targets(described, list(shapes)))
    return 3 * 4 * adapted + 2**25


def lora_job(options: FinetuneLoRA, start: Checkpoint, base: Checkpoint, prompts: Prompts, data: DataSet) -> Job:
    config = base.config()
    described = adapter_config(options.lora, list(linear_shapes(config)), str(base.path.resolve()))

    def build(device: torch.device) -> GPT:
        model = load_base(base, choose_dtype(options.precision, device), device)
        METHODS[options.method].attach(model, options.lora, seed=options.seed)
        if start is not base:
            restore(model, start)
        if is_first_process():
            warn_of_untrained_end(model, graded_ends(data, prompts), prompts.tokenizer)
        count = sum(parameter.numel() for parameter in trainable(model).values())
        all_of_it = sum(parameter.numel() for parameter in model.parameters())
        if is_first_process():
            console.header([("trained", f"{console.count(count)} of {console.count(all_of_it)} parameters ({count / all_of_it:.1%})")])
        return model

    def restore(model: GPT, step: Checkpoint) -> None:
        load_adapter_state(model, adapter_tensors(step), step.adapter_file())

    def contents(model: GPT) -> Mapping[str, Tensors]:
        return {names.ADAPTER_WEIGHTS: raw_tensors(adapter_state(model))}

    def card(manifest: Manifest) -> str:
        return model_card(manifest, str(Path(options.out_dir) / names.step_name(manifest.step)))

    name = "demo (a toy model that comes with litlora)" if base.is_demo else str(base.path)
    kind = "DoRA" if options.lora.use_dora else "LoRA"
    scope = " ".join(options.lora.target_modules)
    return Job(
        command="finetune lora",
        options=options,
        method="lora",
        method_options=asdict(options.lora),
        prompts=prompts,
        data=data,
        base=base.record(Path(options.out_dir)),
        parent=None if start is base else str(start.path.resolve()),
        facts=[
            ("model", f"{name} · {config.model_type} · {compute_text(options)}" + (f" · from {start.path}" if start is not base else "")),
            ("adapter", f"{kind} r={options.lora.r} alpha={options.lora.alpha:g} on {scope}"),
        ],
        build=build,
        restore=restore,
        contents=contents,
        files={**serving_files(start.tokenizer_dir(), prompts.template), names.ADAPTER_CONFIG: as_json(adapter_config_to_peft(described))},
        card=card,
    )


def graded_ends(data: DataSet, prompts: Prompts) -> set[int]:
    """The ids that end an answer in the first rows: what the model has to learn to stop with."""
    last = [int(sample.targets[sample.targets != IGNORE][-1]) for sample in data.train[:64]]
    return set(last) & prompts.stop_ids


def refuse_another_method(start: Checkpoint, options: FinetuneLoRA) -> None:
    """Training goes on from a step's weights where the method and its shapes are the step's; anything else needs a merge first."""
    theirs = start.adapter_config()
    ours = adapter_config(options.lora, list(linear_shapes(start.config())))
    names_of = ("r", "alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
    different = [
        f"{name}: {getattr(theirs, name)} there, {getattr(ours, name)} here"
        for name in names_of
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if sorted(targets(theirs, list(linear_shapes(start.config())))) != sorted(targets(ours, list(linear_shapes(start.config())))):
        different.append("target_modules differ")
    if different:
        raise UserError(
            "holds another adapter than the one asked for, so training cannot go on from its weights",
            where=start.path,
            context=different,
            hint=f"use the same options, or merge first: litlora merge_lora {start.path}",
        )


def say_what_next(last: Path, options: FinetuneLoRA) -> None:
    """The end of a run: the result to standard output, what to type next to standard error."""
    where = "" if options.out_dir == names.RUN else f" {options.out_dir}"
    console.header(
        [
            ("next", f"litlora chat{where}"),
            ("", f"litlora evaluate {last} --compare_base"),
            ("", f"litlora merge_lora --checkpoint_dir {last}"),
        ]
    )
    print(last)
