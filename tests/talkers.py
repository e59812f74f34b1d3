"""Small models that can be talked to: a tokenizer of bytes, a chat template, random weights, and an adapter that changes what is said."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from checkpoint_samples import ADAPTER, adapter_tensors, base_tensors, make_base, manifest_of
from tokenizers.pre_tokenizers import ByteLevel

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import commit_step

BOS, END, TURN = "<s>", "</s>", "<|end|>"  # ids 256, 257, 258; a byte's id is the byte
SIZE = 259
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role[0] }}:{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def byte_tokenizer(directory: Path, template: str | None = TEMPLATE) -> Path:
    """A tokenizer.json of bytes with <s> 256, </s> 257 and <|end|> 258."""
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={letter: byte for byte, letter in letters().items()}, merges=[]))
    built.pre_tokenizer = ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens([BOS, END, TURN])
    built.save(str(directory / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": END, "add_bos_token": True, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return directory


def in_two_files(directory: Path, swapped: tuple[str, str] | None = None) -> Path:
    """The directory's tokenizer.json as vocab.json and merges.txt, as GPT-2's; two letters' ids `swapped`."""
    vocabulary = json.loads((directory / names.TOKENIZER).read_text())["model"]["vocab"]
    if swapped is not None:
        first, second = swapped
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (directory / names.TOKENIZER).unlink()
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    config = json.loads((directory / names.TOKENIZER_CONFIG).read_text())
    added = {str(number): {"content": token, "special": True} for number, token in enumerate((BOS, END, TURN), 256)}
    config |= {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added}
    (directory / names.TOKENIZER_CONFIG).write_text(json.dumps(config))
    return directory


def letters() -> dict[int, str]:
    """Each byte's letter in a byte-level vocabulary (GPT-2's: printable Latin-1 stands for itself, the others follow from 256 on)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def make_talker(path: Path, seed: int = 0, *, template: str | None = TEMPLATE, context: int = 256, ends: bool = True, **sizes: int) -> Path:
    """A base whose every command works. What it says is noise, and the same each time; with `ends` False it never stops."""
    changes: dict[str, Any] = {"vocab_size": 288, "max_position_embeddings": context, **sizes}
    tensors = dict(base_tensors(seed, **changes))
    dtype, shape, head = tensors["lm_head.weight"]
    head = np.array(head)
    head[256:] = 0 if not ends else head[256:]  # a logit of 0 is never the largest of 256
    make_base(path, seed, tensors={**tensors, "lm_head.weight": (dtype, shape, head)}, **changes)
    byte_tokenizer(path, template)
    return path


def make_step(run: Path, step: int, base: Path, *, val_loss: float | None = None, template: str | None = TEMPLATE) -> Path:
    """`step-N` of a run on `base`, with its own tokenizer, as training leaves it."""
    run.mkdir(parents=True, exist_ok=True)
    record = Checkpoint(base, "base").record(run)
    with tempfile.TemporaryDirectory() as scratch:
        files = {path.name: path.read_bytes() for path in byte_tokenizer(Path(scratch), template).iterdir()}
    files[names.ADAPTER_CONFIG] = json.dumps({**ADAPTER, "base_model_name_or_path": record.path}).encode()
    manifest = manifest_of(step, record, val_loss=val_loss)
    return commit_step(run, manifest, tensors={names.ADAPTER_WEIGHTS: adapter_tensors(step)}, files=files, state=None)
