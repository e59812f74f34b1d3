"""The small files that make a step serve with its base alone: the tokenizer's, and the chat template it was trained with.

And the way back: the tokenizer of a step, as its base has it.
"""

import json
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.reading import file_in, read_bytes
from litlora.tokenizer import Tokenizer


def serving_files(directory: Path, template: str) -> dict[str, bytes]:
    """The tokenizer's files of `directory`, and `template` as the one that transformers and vLLM read first. UserError as `file_in`."""
    found = {name: read_bytes(file_in(directory, name)) for name in names.TOKENIZER_FILES if (directory / name).exists()}
    return {**found, names.CHAT_TEMPLATE: template.encode()}


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that goes with `checkpoint`: an adapter's own files, and what its base's config says of end ids and model type."""
    return Tokenizer(checkpoint.tokenizer_dir(), checkpoint.base().path)


def as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
