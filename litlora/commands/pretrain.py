"""`litlora pretrain`: a small Llama from nothing, its vocabulary learnt too, or a given model trained further; plain in out/model."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from litlora import console
from litlora.checkpoint import names
from litlora.checkpoint.card import model_card, typed
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import commit_directory, remove
from litlora.checkpoint.files import as_json, open_prompts, serving_files
from litlora.checkpoint.manifest import Manifest
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.weights import as_files_name, base_tensors, load_base, raw_tensors
from litlora.commands.finetune import Work, job_of, with_rate
from litlora.config import Config, Rope
from litlora.data.samples import DataSet, texts_of
from litlora.data.vocabulary import tokenizer_files, train_tokenizer
from litlora.errors import UserError
from litlora.families import config_to_hf
from litlora.methods import refuse_part, tuning_of
from litlora.model import GPT, init_weights
from litlora.options import FullOptions, ModelOptions, Pretrain
from litlora.precision import device_of
from litlora.prompts import Prompts, chosen_template
from litlora.safetensors_file import write_safetensors
from litlora.tokenizer import Tokenizer
from litlora.train.before import check_run, is_first_process
from litlora.train.run import Job, compute_text, load_rows, open_run, show_samples, train
from litlora.train.signals import Signals

RATE = 3e-3  # of a new model
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pretrain(options: Pretrain) -> None:
    """Train a model from nothing, or a given one further; print the path of the finished one."""
    with Signals() as signals:
        if options.checkpoint_dir is not None:
            options = going_on(options)
        else:
            refuse_odd_shapes(options)
            options = replace(options, train=replace(options.train, lr=RATE if options.train.lr is None else options.train.lr))
        check_template(options)
        device_of(options.accelerator)  # refused before a vocabulary is learnt
        check_run(options, [resolve(options.checkpoint_dir).path] if options.checkpoint_dir is not None else [])
        if options.dry_run:
            with TemporaryDirectory() as scratch:
                show_samples(prepared(options, Path(scratch)))
            return
        with open_run(options, needed_bytes=2**28) as directory:
            first = is_first_process()
            for message in directory.messages if first else ():
                console.warn(message)
            job = prepared(options, Path(options.out_dir) / names.VOCABULARY)
            last = train(job, directory.resume_from, signals)
            if first:
                finished = export(resolve(last), Path(options.out_dir) / names.MODEL, options, job)
                here = typed(str(finished))
                console.header([("next", f"litlora generate {here} --prompt TEXT"), ("", f"litlora finetune lora {here} --data FILE")])
                console.put(finished)


def going_on(options: Pretrain) -> Pretrain:
    """The options of a run that goes on from a model, with the rate of full fine-tuning. UserError where one speaks of a new model."""
    if options.tokenizer_dir is not None:
        hint = "leave --tokenizer_dir out; litlora extend_vocab makes a model with more tokens"
        raise UserError("a model that is trained further keeps its tokenizer", where="--tokenizer_dir", hint=hint)
    for name, given in (("--model", options.model != ModelOptions()), ("--dtype", options.dtype != Pretrain().dtype)):
        if given:
            raise UserError("a model that is trained further keeps its shape and dtype", where=name, hint=f"leave {name} out")
    start = resolve(options.checkpoint_dir)
    if not start.is_model:
        raise UserError(
            "is an adapter, and a whole model is trained here", where=start.path, hint=f"litlora merge_lora {typed(str(start.path))}"
        )
    refuse_part(start.config(), "pretrain trains a whole model")
    return with_rate(options, "full", start)


def check_template(options: Pretrain) -> None:
    """Whatever is wrong with --chat_template is said before anything is written."""
    if options.chat_template is not None:
        start = resolve(options.checkpoint_dir).tokenizer_dir() if options.checkpoint_dir is not None else options.tokenizer_dir
        chosen_template(options.chat_template, {} if start is None else Tokenizer(start).chat_templates)


def prepared(options: Pretrain, place: Path) -> Job:
    """Vocabulary (learnt into `place` if none is given), prompts and rows."""
    if options.checkpoint_dir is not None:
        start = resolve(options.checkpoint_dir)
        prompts = open_prompts(start, options.chat_template)
        work = Work(options, "full", FullOptions(), start, start)
        return job_of(work, "pretrain", prompts, load_rows(options, prompts, context=work.config.max_position_embeddings))
    prompts = Prompts.chosen(vocabulary(options, place), options.chat_template)
    return model_job(options, prompts, load_rows(options, prompts, context=options.model.max_position_embeddings))


def vocabulary(options: Pretrain, place: Path) -> Tokenizer:
    """The tokenizer named by --tokenizer_dir; without one, a vocabulary learnt from the rows, kept so that resuming finds it."""
    if options.tokenizer_dir is not None:
        return Tokenizer(options.tokenizer_dir)
    if not names.has_vocabulary(place):
        if not is_first_process():
            raise UserError(
                "every process would learn a vocabulary of its own", where="--tokenizer_dir", hint="give one, or use one process"
            )
        learnt = train_tokenizer(texts_of(options.data, options.rows), options.model.vocab_size)
        if place.is_dir():  # a dry run's own, empty
            place = place / names.VOCABULARY
        with commit_directory(place) as temporary:
            for name, content in tokenizer_files(learnt, options.model.max_position_embeddings).items():
                (temporary / name).write_bytes(content)
    return Tokenizer(place)


def model_job(options: Pretrain, prompts: Prompts, data: DataSet) -> Job:
    config = model_config(options, prompts.tokenizer)

    def build(device: torch.device) -> GPT:
        model = GPT(config)
        init_weights(model, options.seed)
        if is_first_process():
            count = console.count(sum(parameter.numel() for parameter in model.parameters()))
            console.header([("shape", f"{count} parameters, all trained")])
        return model.to(device)

    def restore(model: GPT, step: Checkpoint) -> None:
        model.load_state_dict(load_base(step).state_dict(), strict=True)

    def contents(model: GPT) -> Mapping[str, Mapping[str, torch.Tensor]]:
        return {names.WEIGHTS: as_files_name(own_tensors(model), model.config)}

    def card(manifest: Manifest) -> str:
        return model_card(manifest, str(Path(options.out_dir) / names.step_name(manifest.step)))

    where, blocks = compute_text(options, torch.float32), console.counted(config.num_hidden_layers, "block")
    return Job(
        command="pretrain",
        config=config,
        tuning=tuning_of(FullOptions(), config),
        options=options,
        method="full",
        method_options=asdict(options.model),
        prompts=prompts,
        data=data,
        base=None,
        parent=None,
        facts=[("model", f"a new {config.model_type}, {blocks} of width {config.hidden_size} · {where}")],
        build=build,
        restore=restore,
        contents=contents,
        files=new_model_files(config, prompts),
        card=card,
    )


def own_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """The parameters as a Hugging Face file holds them: a tied head is not stored twice."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def new_model_files(config: Config, prompts: Prompts, dtype: str = "float32") -> dict[str, bytes]:
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids), "pad_token_id": config.pad_token_id}
    generation = {name: value for name, value in ids.items() if value not in (None, [])}
    return {
        **serving_files(prompts.tokenizer.directory, prompts.template, prompts.tool_template),
        names.CONFIG: as_json({**config_to_hf(config), "torch_dtype": dtype, "dtype": dtype}),
        names.GENERATION_CONFIG: as_json(generation),
    }


def model_config(options: Pretrain, tokenizer: Tokenizer) -> Config:
    shape = options.model
    return Config(
        model_type="llama",
        vocab_size=tokenizer.size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        max_position_embeddings=shape.max_position_embeddings,
        rope=Rope(rope_theta=shape.rope_theta),
        tie_word_embeddings=shape.tie_word_embeddings,
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=tuple(sorted(tokenizer.eos_ids)),
    )


def refuse_odd_shapes(options: Pretrain) -> None:
    shape = options.model
    if options.precision == "bf16":
        raise UserError(
            "a new model is trained in fp32", where="--precision bf16", hint="leave --precision out; --dtype says how the result is stored"
        )
    if shape.hidden_size % (2 * shape.num_attention_heads):
        raise UserError("--model.hidden_size must be an even multiple of --model.num_attention_heads", hint="128 and 4, for example")
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise UserError("--model.num_attention_heads must be a multiple of --model.num_key_value_heads", hint="4 and 2, for example")


def export(step: Checkpoint, finished: Path, options: Pretrain, job: Job) -> Path:
    """The last step as a plain model without training state: what others load. A new model in `--dtype`, one trained further in its own."""
    tensors, files = base_tensors(step), dict(job.files)
    if options.checkpoint_dir is None:
        tensors = {name: tensor.to(STORED[options.dtype]) for name, tensor in tensors.items()}
        files |= new_model_files(step.config(), job.prompts, options.dtype)
    if finished.exists():
        remove(finished)  # of an earlier end of this run; everything in it comes from the step
    with commit_directory(finished) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        write_safetensors(temporary / names.WEIGHTS, raw_tensors(as_files_name(tensors, step.config())), {"format": "pt"})
    return finished
