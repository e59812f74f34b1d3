"""Every file name that litlora reads or writes, in one place. No other room spells one, but `tokenizer`, which lies below.

The first block is Hugging Face's layout, the second PEFT's, the third our own.
"""

import hashlib
import os
import re
from pathlib import Path

# ---- a Hugging Face directory
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
ADDITIONAL_TEMPLATES = "additional_chat_templates"  # the folder of those that have a name
TEMPLATE = ".jinja"
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    CHAT_TEMPLATE,
    "added_tokens.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "vocab.json",
    "merges.txt",
)
VOCABULARIES = ((TOKENIZER,), ("tokenizer.model",), ("tokenizer.model.v3",), ("vocab.json", "merges.txt"))  # one of these is a tokenizer
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "chat_template.json")  # of models of text and images
LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "NOTICE", "USE_POLICY.md")
README = "README.md"
UNFINISHED = ".cache/huggingface/download/**/*.incomplete"  # what an interrupted download leaves
DOWNLOAD = ".cache/huggingface/litlora.json"  # ours: which model `litlora download` put there, and whether all of it
MAIN = "main"  # the revision that is meant where none is named
MODELS = "models"  # where a model goes that no directory is named for

# ---- a PEFT adapter
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OWN_ADAPTER_WEIGHTS = "litlora_adapter.safetensors"  # of a method that PEFT does not know

# ---- other formats: known by their names; `convert` alone reads them
PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
LITGPT_WEIGHTS = "lit_model.pth"
LITGPT_LORA = "lit_model.pth.lora"
LITGPT_ADAPTERS = (LITGPT_LORA, "lit_model.pth.adapter", "lit_model.pth.adapter_v2")
LITGPT_CONFIG = "model_config.yaml"
LITGPT_HYPERPARAMETERS = "hyperparameters.yaml"
PICKLED_ADAPTER = "adapter_model.bin"
PICKLED_ADAPTERS = (PICKLED_ADAPTER, "adapter_model.pth", "adapter_model.pt")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", *LITGPT_ADAPTERS)  # how the names of files end that run code when they are read
TRAINER_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")  # of transformers: no weights
GGUF = ".gguf"
SAFETENSORS = ".safetensors"

# ---- ours, in a step
MANIFEST = "litlora.json"
TRAINING_STATE = "training_state.safetensors"
TRAINING_STATE_META = "training_state.json"
NOTE = "note.md"  # the user's own words: never hashed
MERGED = "merged"
MERGE_REPORT = "merge_report.json"
EXTEND_REPORT = "extend_vocab_report.json"
EXPAND_REPORT = "expand_report.json"
COMBINE_REPORT = "combine_report.json"
CONVERT_REPORT = "convert_report.json"
UNCOVERED = frozenset({MANIFEST, TRAINING_STATE, TRAINING_STATE_META, NOTE})  # what a manifest does not hash

# ---- ours, in a run
RUN = "out"  # the run that a command takes when it is given no path
BEST, LAST = "best", "last"  # RUN/best, RUN/last: its best step, its newest; where no directory of that name is there
RUN_YAML = "run.yaml"
METRICS = "metrics.csv"
VOCABULARY = "vocabulary"  # pretrain: the tokenizer learnt from the rows
MODEL = "model"  # pretrain: the finished model
SKIPPED_ROWS = "skipped_rows.txt"
LOCK = ".litlora.lock"

# ---- the embedded default
DEMO = "demo"
ASSETS = Path(__file__).resolve().parent.parent / "assets"
DEMO_BASE = ASSETS / "demo_base"
DEMO_TRAIN = ASSETS / "demo_data" / "train.jsonl"
DEMO_HELDOUT = ASSETS / "demo_data" / "heldout.jsonl"

LONGEST_NAME = 255  # bytes, on every file system that people use

_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_ASIDE = re.compile(_STEP.pattern + r"\.torn(-[0-9]+)?")
_TEMPORARY = re.compile(r"\.tmp-(.+)-([0-9]+)", re.DOTALL)


def has_vocabulary(directory: Path) -> bool:
    """Whether a directory has all files of a tokenizer."""
    return any(all((directory / name).exists() for name in together) for together in VOCABULARIES)


def step_name(step: int) -> str:
    """The directory of step number `step`: `step-200`."""
    return f"step-{step}"


def step_number(path: str | Path) -> int | None:
    """200 for `out/step-200`, None for a name that is no step's."""
    found = _STEP.fullmatch(Path(path).name)
    return int(found[1]) if found else None


def shard_name(number: int, count: int) -> str:
    """Of `count` files of weights the one of `number`, from 1 on, as Hugging Face calls it; a single one has the plain name."""
    return WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def gguf_name(what: str, kind: str) -> str:
    """`model-f16.gguf`, `adapter-f32.gguf`: with llama.cpp's word for the type."""
    return f"{what}-{kind.lower()}{GGUF}"


def aside_name(name: str, count: int) -> str:
    """What a torn step is called once a resumed run is about to write its number again; `count` from 1 on."""
    return f"{name}.torn" if count == 1 else f"{name}.torn-{count}"


def is_aside(path: str | Path) -> bool:
    """Whether it is the name of a torn step that was set aside."""
    return _ASIDE.fullmatch(Path(path).name) is not None


def temporary_name(name: str, pid: int) -> str:
    """What `name` is called while process `pid` still writes it: by its hash, where it would be longer than a file's name may be."""
    whole = f".tmp-{name}-{pid}"
    if len(os.fsencode(whole)) <= LONGEST_NAME:
        return whole
    return f".tmp-{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}-{pid}"


def temporary_owner(path: str | Path) -> int | None:
    """The process that wrote the temporary `path`, None for a name that is no temporary's."""
    found = _TEMPORARY.fullmatch(Path(path).name)
    return int(found[2]) if found else None
