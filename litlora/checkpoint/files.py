"""The small files that make a step serve with its base alone: the tokenizer's, and the chat template it was trained with.

And the way back: the tokenizer of a step, as its base has it.
"""

import json
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.reading import file_in, parse_json, read_bytes
from litlora.checkpoint.tokenizers import tokenizer_files
from litlora.config import Config
from litlora.console import warn
from litlora.families import changed_keys
from litlora.prompts import Prompts
from litlora.tokenizer import Tokenizer


def serving_files(directory: Path, template: str, tool_template: str | None = None) -> dict[str, bytes]:
    """The tokenizer's files of `directory`, and `template` as the one that transformers and vLLM read first. UserError as `file_in`.

    `tool_template`, the tokenizer's own beside it, they read in tokenizer_config.json, and only where the first is there too.
    """
    found = tokenizer_files(directory)
    if tool_template is None:
        return {**found, names.CHAT_TEMPLATE: template.encode()}
    found.pop(names.CHAT_TEMPLATE, None)
    return found


def model_files(base: Checkpoint, config: Config) -> dict[str, bytes]:
    """What makes weights a model again: the base's config.json (changed where `config` differs from it), generation config, licence."""
    raw = read_bytes(file_in(base.path, names.CONFIG))
    changed = changed_keys(base.config(), config)
    found = {names.CONFIG: as_json(parse_json(raw, base.path / names.CONFIG) | changed) if changed else raw}
    for name in (names.GENERATION_CONFIG, *names.LICENCE_FILES):
        if (base.path / name).exists():
            found[name] = read_bytes(file_in(base.path, name))
    return found


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that goes with `checkpoint`: an adapter's own files, and what its base's config says of it."""
    base = checkpoint.base()
    return Tokenizer(checkpoint.tokenizer_dir(), base.path, rows=base.config().vocab_size)


def open_prompts(checkpoint: Checkpoint, chat_template: str | None = None) -> Prompts:
    """How `checkpoint` is spoken to: as it was trained, or with the template of `--chat_template`, which is said where it differs."""
    prompts = Prompts.chosen(open_tokenizer(checkpoint), chat_template)
    trained = checkpoint.manifest.chat_template if checkpoint.manifest else ""
    if chat_template is not None and trained not in ("", prompts.template_hash):
        warn(f"{checkpoint.path} was trained with another chat template than {prompts.template_name}")
    return prompts


def as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
