"""The chat templates that lie in a tokenizer's directory, by name.

Transformers writes the one named `default` to chat_template.jinja and each of the others to additional_chat_templates/NAME.jinja; earlier
versions put all of them into tokenizer_config.json, and those are not looked at by it where there is such a file.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litlora.errors import UserError

FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"
DEFAULT = "default"
LIMIT = 64 * 2**20  # bytes, as of other small files: a link may lead to anything


def template_files(directory: Path) -> dict[str, str]:
    """Those that are files; of two `default` the one in the folder, as in transformers. UserError as `read_template`."""
    paths = [(DEFAULT, directory / FILE), *((path.stem, path) for path in sorted((directory / FOLDER).glob("*.jinja")))]
    found = {}
    for name, path in paths:
        if path.is_file():
            found[name] = read_template(path)
    return found


def read_template(path: Path, encoding: str = "utf-8") -> str:
    """A file's text. UserError where it is too long or no UTF-8; OSError where it cannot be read."""
    with open(path, encoding=encoding) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LIMIT:
            raise UserError(f"has {size:,} bytes; at most {LIMIT:,} are read", where=path)
        try:
            return file.read(LIMIT)
        except UnicodeDecodeError as error:
            raise UserError("is not UTF-8 text", where=path) from error


def listed_templates(config: Mapping[str, Any]) -> dict[str, str]:
    """Those that tokenizer_config.json holds; one that has no name there is `default`."""
    value = config.get("chat_template")
    if isinstance(value, str):
        return {DEFAULT: value}
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    return {str(entry.get("name")): entry["template"] for entry in entries if isinstance(entry.get("template"), str)}
