"""`litlora pretrain`: rows -> a vocabulary, a small Llama trained from nothing, and at the end a plain model in out/model."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from litlora import console
from litlora.checkpoint import names
from litlora.checkpoint.card import model_card
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import Tensors, commit_directory, remove
from litlora.checkpoint.files import as_json, serving_files
from litlora.checkpoint.manifest import Manifest
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.weights import load_base, raw_tensors
from litlora.config import Config, Rope
from litlora.data.samples import DataSet, texts_of
from litlora.data.vocabulary import tokenizer_files, train_tokenizer
from litlora.errors import UserError
from litlora.families import config_to_hf
from litlora.model import GPT, init_weights
from litlora.options import Pretrain
from litlora.prompts import Prompts
from litlora.safetensors_file import write_safetensors
from litlora.tokenizer import Tokenizer
from litlora.train.run import Job, check_run, compute_text, is_first_process, load_rows, open_run, show_samples, train
from litlora.train.signals import Signals

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pretrain(options: Pretrain) -> None:
    """Train a model from nothing; print the path of the finished one."""
    with Signals() as signals:
        refuse_odd_shapes(options)
        check_run(options)
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
                finished = export(last, Path(options.out_dir) / names.MODEL, options, job.prompts)
                console.header(
                    [("next", f"litlora generate {finished} --prompt TEXT"), ("", f"litlora finetune lora {finished} --data FILE")]
                )
                print(finished)


def prepared(options: Pretrain, place: Path) -> Job:
    """Vocabulary (learnt into `place` if none is given), prompts and rows."""
    template = None if options.chat_template is None else Path(options.chat_template).read_text(encoding="utf-8")
    prompts = Prompts(vocabulary(options, place), template=template)
    return model_job(options, prompts, load_rows(options, prompts, context=options.model.max_position_embeddings))


def vocabulary(options: Pretrain, place: Path) -> Tokenizer:
    """The tokenizer named by --tokenizer_dir; without one, a vocabulary learnt from the rows, kept so that resuming finds it."""
    if options.tokenizer_dir is not None:
        return Tokenizer(options.tokenizer_dir)
    if not (place / names.TOKENIZER).exists():
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

    def contents(model: GPT) -> Mapping[str, Tensors]:
        return {names.WEIGHTS: raw_tensors(own_tensors(model))}

    def card(manifest: Manifest) -> str:
        return model_card(manifest, str(Path(options.out_dir) / names.step_name(manifest.step)))

    where = compute_text(options, torch.float32)
    return Job(
        command="pretrain",
        options=options,
        method="full",
        method_options=asdict(options.model),
        prompts=prompts,
        data=data,
        base=None,
        parent=None,
        facts=[("model", f"a new {config.model_type}, {config.num_hidden_layers} blocks of width {config.hidden_size} · {where}")],
        build=build,
        restore=restore,
        contents=contents,
        files=model_files(config, prompts),
        card=card,
    )


def own_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """The parameters as a Hugging Face file holds them: a tied head is not stored twice."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def model_files(config: Config, prompts: Prompts, dtype: str = "float32") -> dict[str, bytes]:
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids), "pad_token_id": config.pad_token_id}
    generation = {name: value for name, value in ids.items() if value not in (None, [])}
    return {
        **serving_files(prompts.tokenizer.directory, prompts.template),
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


def export(step: Path, finished: Path, options: Pretrain, prompts: Prompts) -> Path:
    """The last step as a plain model in `--dtype`, without training state: what others load."""
    model = load_base(resolve(step))
    tensors = {name: tensor.to(STORED[options.dtype]) for name, tensor in own_tensors(model).items()}
    if finished.exists():
        remove(finished)  # of an earlier end of this run; everything in it comes from the step
    with commit_directory(finished) as temporary:
        for name, content in model_files(model.config, prompts, options.dtype).items():
            (temporary / name).write_bytes(content)
        write_safetensors(temporary / names.WEIGHTS, raw_tensors(tensors), {"format": "pt"})
    return finished
