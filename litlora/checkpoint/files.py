"""The small files that make a step serve with its base alone: the tokenizer's, and the chat template it was trained with."""

import json
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.reading import file_in, read_bytes


def serving_files(directory: Path, template: str) -> dict[str, bytes]:
    """The tokenizer's files of `directory`, and `template` as the one that transformers and vLLM read first. UserError as `file_in`."""
    found = {name: read_bytes(file_in(directory, name)) for name in names.TOKENIZER_FILES if (directory / name).exists()}
    return {**found, names.CHAT_TEMPLATE: template.encode()}


def as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
