"""Every option of every command, in one place: name, type, default, unit, help. No torch here.

A command is a dataclass; a group of options (`--train.lr`) is a dataclass inside it. `parsing.py` makes the command
line and the YAML file out of these, and nothing else in the house declares an option.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


def option(
    default: Any,
    help: str,
    *,
    unset: str = "",  # what None stands for, where that is the default
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Any:
    """A dataclass field with its help text and, for numbers, the range it must lie in."""
    metadata = {"help": help, "unset": unset, "above": above, "least": least, "below": below, "most": most}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(kind: type, help: str, **defaults: Any) -> Any:
    """A nested dataclass of options, with other defaults where a command needs them."""
    return field(default_factory=lambda: kind(**defaults), metadata={"help": help})


# ---- groups ----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class TrainOptions:
    """How training goes: how long, how much at once, how fast, what is kept."""

    max_steps: int | None = option(None, "stop after this many optimizer steps", unset="what the epochs need", least=1)
    epochs: float = option(3.0, "passes over the training rows", above=0)
    global_batch_size: int = option(16, "samples per optimizer step, over all devices", least=1)
    micro_batch_tokens: int | None = option(None, "tokens computed at once", unset="1024, on a GPU 8192; never changes the result", least=1)
    max_seq_length: int | None = option(None, "longest sample, in tokens; longer ones are cut", unset="the model's context", least=2)
    lr: float | None = option(
        None,
        "highest learning rate",
        unset="lora 2e-4, adapter 1e-3, pro 5e-5, freeze 2e-5, full 1e-5, a new model 3e-3; more for the demo base",
        least=0,
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = option("cosine", "how the learning rate falls after the warm-up")
    lr_warmup_steps: int = option(10, "optimizer steps of linear warm-up", least=0)
    weight_decay: float = option(0.0, "AdamW weight decay", least=0)
    beta1: float = option(0.9, "AdamW beta 1", least=0, below=1)
    beta2: float = option(0.999, "AdamW beta 2", least=0, below=1)
    max_norm: float = option(1.0, "clip the gradient's norm to this; 0 turns clipping off", least=0)
    packing: bool = option(True, "compute whole samples as one stream without padding (false: padded rows; same result)")
    share_prefix: bool = option(True, "compute once what packed samples begin with alike, as a system prompt (same result)")
    checkpoint_activations: Literal["auto", "none", "blocks"] = option(
        "auto", "keep every block's activations, or compute them again in the backward pass (less memory, a third more time, same result)"
    )
    mask_prompt: bool = option(True, "grade answers only (false: every token)")
    save_interval: int = option(100, "commit a checkpoint every so many optimizer steps; 0: only at the end", least=0)
    keep: str = option(
        "all",
        "checkpoints that stay: all, or any of best, last and a number of the newest, as best,last,3; "
        "the newest, the best, what the run began with and what you noted or merged always stay",
    )
    keep_states: str | None = option(
        None, "checkpoints that can be resumed from: all, or so many of the newest", unset="all; of a whole model the newest 2"
    )
    patience: int = option(0, "stop after so many validations without a new lowest loss, each of which is committed; 0: never", least=0)
    log_interval: int = option(1, "a row of metrics every so many optimizer steps", least=1)


@dataclass(kw_only=True)
class RowsOptions:
    """How the rows of your data are read."""

    on_error: Literal["stop", "skip"] = option("stop", "a row that cannot be used: stop, or skip it and list it")
    documents: Literal["file", "blank", "line"] = option(
        "file", "one document of a .txt file: all of it, what stands between blank lines, or a line"
    )
    cache: bool = option(True, "keep tokenized rows of files above 8 MB for the next run, in ~/.cache/litlora/rows")
    map: list[str] = option([], "field names of your rows, as OURS=YOURS (prompt=question); repeatable")


@dataclass(kw_only=True)
class EvalOptions:
    """What validation looks at, and when."""

    interval: int = option(100, "optimizer steps between validations; 0: only at the end", least=0)
    fraction: float = option(0.05, "share of the rows held out for validation", least=0, most=0.9)
    max_samples: int | None = option(200, "validate on at most this many held-out rows", least=1)
    data: str | None = option(None, "validate on this file instead of held-out rows")


Accelerator = Literal["auto", "cpu", "cuda", "mps"]
RUN_OR_DEMO = "the run in out, else the demo base"
TEMPLATE = "a .jinja file, or a name: one of the tokenizer's own templates, or alpaca"
LAYERS = "0-based numbers, ranges (4-7), last:N or first:N"


@dataclass(kw_only=True)
class WholeOptions:
    """What every method can train besides its own: modules of the base, whole."""

    modules_to_save: list[str] = option([], "modules trained and saved whole: embed_tokens, lm_head, norm, input_layernorm ...")
    untie: bool = option(False, "separate a head that is the embedding's own matrix, so that one can change without the other")


@dataclass(kw_only=True)
class LoRAOptions(WholeOptions):
    """LoRA (Hu et al. 2021, arXiv:2106.09685) on the Linear layers; DoRA is arXiv:2402.09353."""

    r: int = option(16, "rank", least=1)
    alpha: float = option(32.0, "the update is scaled by alpha / r", above=0)
    dropout: float = option(0.0, "dropout on what goes into A", least=0, most=0.99)
    target_modules: list[str] = option(
        ["all-linear"],
        "q_proj, self_attn.q_proj, a full name, a regular expression of full names, or all-linear: all of the blocks but experts",
    )
    layers: list[str] = option([], f"adapt these layers only: {LAYERS}; nothing: all")
    rank_pattern: list[str] = option([], "another rank for some modules, as NAME=R (down_proj=64); repeatable")
    alpha_pattern: list[str] = option([], "another alpha for some modules, as NAME=ALPHA; repeatable")
    init: Literal["default", "pissa", "orthogonal"] = option(
        "default", "of A and B: default (B zero), pissa (arXiv:2404.02948), orthogonal (B A zero, neither A nor B)"
    )
    lr_ratio: float = option(1.0, "B's learning rate over A's (LoRA+, arXiv:2402.12354, which suggests 16)", above=0)
    use_dora: bool = option(False, "learn each row's length apart from its direction (DoRA)")
    use_rslora: bool = option(False, "scale by alpha / sqrt(r) (arXiv:2312.03732)")


@dataclass(kw_only=True)
class AdapterOptions(WholeOptions):
    """Adapters beside and inside the blocks: bottlenecks, a learnt prompt, or scales and shifts."""

    kind: Literal["prompt", "scale_shift", "series", "parallel"] = option(
        "parallel", "prompt: LLaMA-Adapter (arXiv:2303.16199); scale_shift: its v2 (2304.15010); series: 1902.00751; parallel: 2110.04366"
    )
    layers: list[str] = option([], f"adapt these layers only: {LAYERS}; nothing: all")
    positions: Literal["attention", "mlp", "both"] = option("both", "series, parallel: where the bottlenecks sit")
    width: int = option(64, "series, parallel: numbers in the bottleneck", least=1)
    scale: float = option(1.0, "series, parallel: factor of what the bottleneck adds (2110.04366 takes 4, with a rate of 1e-4)", above=0)
    activation: Literal["relu", "gelu", "silu"] = option("relu", "series, parallel: between down and up")
    length: int = option(10, "prompt: learnt positions that every query may look at", least=1)
    target_modules: list[str] = option(["all-linear"], "scale_shift: the Linear layers, named as LoRA's targets are")
    norms: bool = option(True, "scale_shift: train the norms' gains as well, as the paper does")


@dataclass(kw_only=True)
class ProOptions(WholeOptions):
    """LLaMA-Pro (Wu et al. 2024, arXiv:2401.02415): copies of blocks that add nothing at first; only they learn."""

    n_insert: int | None = option(None, "new blocks, spread evenly", unset="a quarter of the base's, rounded up", least=1)
    positions: list[str] = option([], f"instead: the base's blocks that a new one follows: {LAYERS}")


@dataclass(kw_only=True)
class FreezeOptions:
    """Everything is frozen but the chosen modules of the chosen layers, and the extra modules outside the layers."""

    layers: list[str] = option(["last:2"], f"the layers that learn: {LAYERS}")
    modules: list[str] = option(["all"], "what of them learns: self_attn, mlp, q_proj, input_layernorm ...; all: everything in them")
    extra_modules: list[str] = option([], "what learns outside the layers: embed_tokens, norm (the last one only), lm_head")
    untie: bool = option(False, "separate a head that is the embedding's own matrix, so that one can change without the other")


@dataclass(kw_only=True)
class FullOptions:
    """Every parameter learns; each step is a whole model."""

    dtype: Literal["keep", "float32"] = option("keep", "what a step's weights are stored in (keep: the base's); training is in fp32")
    untie: bool = option(False, "separate a head that is the embedding's own matrix")


@dataclass(kw_only=True)
class ModelOptions:
    """The shape of a model trained from nothing; Hugging Face's config.json names."""

    vocab_size: int = option(2048, "tokens in the vocabulary", least=258)
    hidden_size: int = option(160, "width", least=8)
    intermediate_size: int = option(432, "width of the MLP", least=8)
    num_hidden_layers: int = option(6, "blocks", least=1)
    num_attention_heads: int = option(5, "query heads", least=1)
    num_key_value_heads: int = option(5, "key/value heads", least=1)
    max_position_embeddings: int = option(512, "context, in tokens", least=16)
    rope_theta: float = option(10_000.0, "base of the rotary angles", above=0)
    tie_word_embeddings: bool = option(True, "one matrix for embedding and head")


@dataclass(kw_only=True)
class SamplingOptions:
    """How the tokens of an answer are picked, and how many at most."""

    max_new_tokens: int | None = option(None, "stop after so many new tokens", unset="the context's end", least=1)
    temperature: float = option(0.7, "0 takes the most likely token each time", least=0)
    top_k: int = option(0, "sample among the k most likely tokens; 0: all", least=0)
    top_p: float = option(0.95, "sample among the most likely tokens that hold this share of the probability", least=0, most=1)
    min_p: float = option(0.0, "drop tokens less likely than this share of the likeliest", least=0, most=1)
    repetition_penalty: float = option(1.0, "divide the logits of tokens already seen (arXiv:1909.05858)", above=0)
    stop: list[str] = option([], "stop before this text; repeatable")
    seed: int = option(1234, "of the sampling")
    prompt_lookup: int = option(
        0, "guess so many tokens by how the text went on after the same ones before, and check them at once; 0: off", least=0, most=64
    )


# ---- commands --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class ComputeOptions:
    """Shared by every command that computes with torch; inherited, so that they stand at the top level."""

    accelerator: Accelerator = option("auto", "where to compute (auto: a GPU that torch's cuda finds, else the CPU)")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "dtype of the frozen weights and the arithmetic (auto: fp32 on a CPU, bf16 on a GPU that has it)"
    )
    threads: int | None = option(None, "CPU threads", unset="torch's choice", least=1)


@dataclass(kw_only=True)
class QuantizeOptions:
    """Of commands that use a base without changing it."""

    quantize: Literal["auto", "none", "bf16", "int8", "nf4", "nf4-dq"] = option(
        "auto", "how the frozen weights are held: bf16; int8; nf4 (4 bits, QLoRA's); nf4-dq (its scales in 8); auto: as a step was trained"
    )


@dataclass(kw_only=True)
class FitOptions(ComputeOptions):
    """What every training command has."""

    data: list[str] = option(
        ["demo"], "demo, a file (.json, .jsonl, .csv, .parquet, .txt) or a directory; repeatable, FILE:WEIGHT for passes per epoch"
    )
    out_dir: str = option("out", "the run's directory")
    resume: bool = option(False, "go on from the newest whole checkpoint in out_dir")
    overwrite: bool = option(False, "delete the run in out_dir first")
    seed: int = option(1234, "of order, split, initialisation and dropout")
    devices: int = option(1, "processes on this machine", least=1)
    num_nodes: int = option(1, "machines", least=1)
    strategy: Literal["auto", "ddp"] = option("auto", "how several processes share the work: Fabric's strategy")
    dry_run: bool = option(False, "show what would be done, with rendered samples; write nothing")
    train: TrainOptions = group(TrainOptions, "training")
    rows: RowsOptions = group(RowsOptions, "rows of your data")
    eval: EvalOptions = group(EvalOptions, "validation")


@dataclass(kw_only=True)
class Finetune(FitOptions, QuantizeOptions):
    """What `litlora finetune` has with every method; the method's own options are the group that bears its name."""

    method: ClassVar[str]
    checkpoint_dir: str | None = option(None, "a Hugging Face directory or a step of the same method", unset="the embedded demo base")
    base_dir: str | None = option(None, "where a step's base is now, if it moved")
    chat_template: str | None = option(None, TEMPLATE, unset="the model's own, else the Alpaca style; every step keeps it")


@dataclass(kw_only=True)
class FinetuneLoRA(Finetune):
    """Fine-tune a model with LoRA."""

    method: ClassVar[str] = "lora"
    lora: LoRAOptions = group(LoRAOptions, "LoRA")


@dataclass(kw_only=True)
class FinetuneAdapter(Finetune):
    """Fine-tune a model with adapters beside and inside its blocks."""

    method: ClassVar[str] = "adapter"
    adapter: AdapterOptions = group(AdapterOptions, "adapters")


@dataclass(kw_only=True)
class FinetunePro(Finetune):
    """Fine-tune new blocks between those of a model."""

    method: ClassVar[str] = "pro"
    pro: ProOptions = group(ProOptions, "LLaMA-Pro")


@dataclass(kw_only=True)
class FinetuneFreeze(Finetune):
    """Fine-tune some layers and modules of a model."""

    method: ClassVar[str] = "freeze"
    freeze: FreezeOptions = group(FreezeOptions, "what is not frozen")


@dataclass(kw_only=True)
class FinetuneFull(Finetune):
    """Fine-tune the whole model."""

    method: ClassVar[str] = "full"
    full: FullOptions = group(FullOptions, "full fine-tuning")


@dataclass(kw_only=True)
class Pretrain(FitOptions):
    """Train a small model from nothing, or a given one further on plain text."""

    method: ClassVar[str] = "full"
    checkpoint_dir: str | None = option(None, "go on from this model, with its tokenizer and dtype", unset="a new model")
    tokenizer_dir: str | None = option(None, "directory with a tokenizer.json", unset="one is trained on the data")
    chat_template: str | None = option(None, TEMPLATE, unset="the tokenizer's own")
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "dtype of a new model in out_dir/model; its steps are float32")
    model: ModelOptions = group(ModelOptions, "the new model's shape")
    train: TrainOptions = group(TrainOptions, "training", weight_decay=0.1, beta2=0.95, lr_warmup_steps=100, mask_prompt=False)


@dataclass(kw_only=True)
class MergeLoRA:
    """Write a plain Hugging Face model with what was trained merged in."""

    checkpoint_dir: str | None = option(None, "the step, or a run", unset="the run in out")
    out_dir: str | None = option(None, "where the merged model goes", unset="merged/ inside the step")
    base_dir: str | None = option(None, "where the base is now, if it moved")
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = option("keep", "dtype of the whole merged model (keep: the base's)")
    verify: Literal["quick", "full"] = option("quick", "quick: in the same pass; full: logits of merged against unmerged too")
    overwrite: bool = option(False, "replace an earlier merge in out_dir")


@dataclass(kw_only=True)
class TalkOptions(ComputeOptions, QuantizeOptions):
    """Which model is spoken to, and how."""

    checkpoint_dir: str | None = option(None, "a model, a step or a run", unset=RUN_OR_DEMO)
    base_dir: str | None = option(None, "where a step's base is now, if it moved")
    adapter: list[str] = option([], "add an adapter at run time, PATH or PATH:WEIGHT; repeatable")
    chat_template: str | None = option(None, TEMPLATE, unset="the one it was trained with, else the model's own")


@dataclass(kw_only=True)
class Generate(TalkOptions, SamplingOptions):
    """Answer one prompt, or many."""

    prompt: str | None = option(None, "the prompt", unset="standard input is read, all of it one prompt")
    prompts: str | None = option(None, "a file with one prompt per line, or rows as for training (.jsonl, .json, .csv, .parquet)")
    system: str | None = option(None, "system prompt")
    raw: bool = option(False, "no chat template: continue the text as it is")
    json: bool = option(False, "one JSON object per answer")
    temperature: float = option(0.0, "0 takes the most likely token each time", least=0)


@dataclass(kw_only=True)
class Chat(TalkOptions, SamplingOptions):
    """Talk to a model in the terminal."""

    system: str | None = option(None, "system prompt")
    compare: bool = option(False, "answer with the base as well, below it")


@dataclass(kw_only=True)
class Inspect:
    """What a path is, where it comes from, what its training changed, and what it is good for."""

    checkpoint_dir: str | None = option(None, "a model, a step, a run or a PEFT adapter", unset=RUN_OR_DEMO)
    base_dir: str | None = option(None, "where a step's base is now, if it moved")
    check: bool = option(False, "read every byte, however large (without: files of up to 1 GB; of larger ones names, sizes and headers)")
    json: bool = option(False, "print one JSON object")


@dataclass(kw_only=True)
class Combine(ComputeOptions):
    """Make one checkpoint of several: between two steps, averages, weighted sums, soups, TIES, DARE."""

    bare: ClassVar[tuple[str, ...]] = ("checkpoints",)
    checkpoints: list[str] = option([], "steps, PEFT adapters or models, PATH or PATH:WEIGHT; a run means all its whole steps")
    how: Literal["average", "interpolate", "ema", "weighted_sum", "greedy_soup", "ties", "dare", "dare_ties"] = option(
        "average", "what is done with them; tutorials/combine.md says when to use which"
    )
    out_dir: str = option("combined", "where the result goes; it must not be there yet")
    base_dir: str | None = option(None, "the base of the adapters, if it moved; of whole models, what their updates are relative to")
    t: float | None = option(None, "interpolate: 0 is the first, 1 the second", unset="0.5", least=0, most=1)
    decay: float | None = option(None, "ema: the share of what was before, at each step", unset="0.9", least=0, below=1)
    density: float | None = option(
        None, "ties, dare: the share of an update's numbers that is kept", unset="ties 0.2, dare 0.5", above=0, most=1
    )
    scale: float | None = option(None, "ties, dare: factor of the combined update", unset="1")
    seed: int = option(1234, "of what dare drops")
    rank: int | None = option(
        None, "highest rank of a LoRA result, by SVD", unset="the sum of the ranks: exact but for ties and dare", least=1
    )
    whole: bool = option(False, "write a whole model, not an adapter: exact whatever the method")
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = option("keep", "of a whole result (keep: the base's, or the first model's)")
    data: list[str] = option([], "greedy_soup: measure on these rows", unset="the validation rows of the run")
    rows: RowsOptions = group(RowsOptions, "rows of your data")
    max_samples: int | None = option(None, "greedy_soup: at most so many rows", least=1)


@dataclass(kw_only=True)
class Expand:
    """Insert blocks that add nothing yet into a model (LLaMA-Pro, Wu et al. 2024, arXiv:2401.02415)."""

    checkpoint_dir: str | None = option(None, "a Hugging Face directory, or a merged model", unset="the embedded demo base")
    n_insert: int | None = option(None, "new blocks, spread evenly", unset="a quarter of the base's, rounded up", least=1)
    positions: list[str] = option([], f"instead: the base's blocks that a new one follows: {LAYERS}")
    out_dir: str | None = option(None, "where the deeper model goes", unset="must be given")


@dataclass(kw_only=True)
class ExtendVocab:
    """Make a base with a larger vocabulary, for text in another language."""

    checkpoint_dir: str | None = option(None, "the base: a Hugging Face directory", unset="the embedded demo base")
    data: list[str] = option([], "learn tokens for this text: a file (.txt, .json, .jsonl) or a directory; repeatable")
    tokenizer_dir: str | None = option(None, "take the tokens of the tokenizer.json in this directory instead")
    vocab_size: int | None = option(None, "tokens in the whole new tokenizer", unset="with --tokenizer_dir all that fit in", least=1)
    out_dir: str = option("extended", "where the new base goes")
    eval_data: list[str] = option([], "measure tokens per character on this text, not on the last tenth of --data; repeatable")
    rows: RowsOptions = group(RowsOptions, "rows of your data")


@dataclass(kw_only=True)
class DataOptions:
    """Which rows are looked at, and with which tokenizer and template."""

    bare: ClassVar[tuple[str, ...]] = ("data",)
    data: list[str] = option(["demo"], "files or directories, as for finetune")
    checkpoint_dir: str | None = option(None, "the model whose tokenizer and chat template are used", unset="the embedded demo base")
    base_dir: str | None = option(None, "where a step's base is now, if it moved")
    chat_template: str | None = option(None, TEMPLATE, unset="the model's own, else the Alpaca style")
    rows: RowsOptions = group(RowsOptions, "rows of your data")
    json: bool = option(False, "print one JSON object")


@dataclass(kw_only=True)
class InspectData(DataOptions):
    """What rows hold, how long they are as samples, what of them is graded, and some of them as the model sees them."""

    number: int = option(3, "rows that are shown, the graded part between « and »", least=0)
    max_seq_length: int | None = option(None, "longest sample, in tokens", unset="the model's context", least=2)
    mask_prompt: bool = option(True, "grade answers only (false: every token)")


@dataclass(kw_only=True)
class ValidateData(DataOptions):
    """Every row that cannot be used, by file, line and column. Exit code 1 where there is one."""

    data: list[str] = option(["demo"], "files or directories, as for finetune; rows of preferences too")
    checkpoint_dir: str | None = option(None, "refuse what this model's chat template refuses, too", unset="the rows alone are looked at")
    show: int = option(20, "print at most so many reasons; 0: all of them", least=0)


@dataclass(kw_only=True)
class Convert:
    """Write a model or an adapter in another format: whole or not at all, and compared with its source tensor by tensor."""

    checkpoint_dir: str | None = option(
        None, "a model, step, run or adapter; also with pickled weights (.bin, .pth), or of LitGPT", unset="the run in out"
    )
    to: Literal["hf", "peft", "litlora", "gguf"] | None = option(
        None, "hf, peft: for others' tools; litlora: a step that knows its base; gguf: for llama.cpp", unset="must be given"
    )
    out_dir: str | None = option(None, "where the result goes: a new directory", unset="must be given")
    dtype: Literal["keep", "float32", "bfloat16", "float16", "q8_0"] = option("keep", "what matrices are stored as (q8_0: gguf alone)")
    base_dir: str | None = option(None, "where an adapter's base is, if it moved or the adapter does not say")
    max_shard_size: float = option(5.0, "hf: gigabytes a file of weights may have; 0: one file", least=0)


@dataclass(kw_only=True)
class Download:
    """Fetch a base from Hugging Face (or from HF_ENDPOINT): config, weights, tokenizer, licence, and nothing else.

    Started again it fetches the files that are missing yet. HF_TOKEN opens private and gated models."""

    bare: ClassVar[tuple[str, ...]] = ("repo_id",)
    repo_id: str | None = option(None, "the model: ORG/NAME", unset="must be given")
    out_dir: str | None = option(None, "where it goes: a new directory, or one that this command began", unset="models/NAME")
    revision: str = option("main", "a branch, a tag or a commit")


@dataclass(kw_only=True)
class Verify:
    """Look at a checkpoint again, byte for byte: hashes, its base, and of a merged model every number, its logits and its loss.

    Exit code 1 where anything fails."""

    checkpoint_dir: str | None = option(None, "a step, a run (all its steps), a merged model, an adapter or a base", unset=RUN_OR_DEMO)
    base_dir: str | None = option(None, "where a step's base is now, if it moved")
    level: Literal["quick", "full"] = option("full", "of a merged model: every number (quick), and logits on probe texts (full)")
    accelerator: Accelerator = option("cpu", "where logits and losses are computed, in fp32")
    data: list[str] = option([], "also compare losses on these rows: demo, a file or a directory; repeatable")
    rows: RowsOptions = group(RowsOptions, "rows of your data")
    max_samples: int | None = option(None, "at most so many rows", least=1)
    json: bool = option(False, "print a JSON list")


@dataclass(kw_only=True)
class Diff:
    """How two checkpoints differ: settings, tensors, how far each module is apart, and whether two updates point the same way."""

    bare: ClassVar[tuple[str, ...]] = ("checkpoint_dir", "other_dir")
    checkpoint_dir: str | None = option(None, "A: a model, a step, a run or a PEFT adapter", unset="must be given")
    other_dir: str | None = option(None, "B: another one, of any kind", unset="must be given")
    base_dir: str | None = option(None, "where their base is now, if it moved")
    plot: str | None = option(None, "also draw the map into this file (.png, .svg, .pdf)", unset="no picture")
    exit_code: bool = option(False, "exit code 1 where they differ (without: 0 either way)")
    json: bool = option(False, "print one JSON object")


@dataclass(kw_only=True)
class ListSteps:
    """The checkpoints of a run in a table: losses, size, state, note; the best one is marked."""

    bare: ClassVar[tuple[str, ...]] = ("runs",)
    runs: list[str] = option(["out"], "a run, or several in one table (out/*: what is no run is left out)")
    sort: Literal["step", "val_loss", "train_loss", "tokens", "size"] = option("step", "in which order (step: run by run)")
    tag: str | None = option(None, "those with this tag only (a word of the note that begins with #)")
    check: bool = option(False, "read every byte, however large the run is (without: runs of up to 1 GB; of larger ones the sizes)")
    json: bool = option(False, "print one JSON object")


@dataclass(kw_only=True)
class WriteNote:
    """Write a note about a checkpoint, or show it; words that begin with # are tags."""

    bare: ClassVar[tuple[str, ...]] = ("checkpoint_dir", "text")
    checkpoint_dir: str | None = option(None, "the step, or a run's best", unset="must be given")
    text: str | None = option(None, "the note; an empty text takes it away", unset="show what was written")
    append: bool = option(False, "add to what was written")


@dataclass(kw_only=True)
class Evaluate(TalkOptions):
    """Loss, perplexity and exact match on rows."""

    data: list[str] = option(
        [], "demo (its held-out rows), a file or a directory; repeatable (default: what the step's run held out, else demo)"
    )
    rows: RowsOptions = group(RowsOptions, "rows of your data")
    max_samples: int | None = option(None, "at most so many rows", least=1)
    max_new_tokens: int = option(256, "of an answer", least=1)
    exact_match: bool = option(True, "also answer each prompt and compare with the row")
    compare_base: bool = option(False, "the base alone as well, for before and after")
    json: bool = option(False, "print one JSON object")
