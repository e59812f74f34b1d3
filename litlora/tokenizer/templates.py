"""The chat templates that lie in a tokenizer's directory, by name.

Transformers writes the one named `default` to chat_template.jinja and each of the others to additional_chat_templates/NAME.jinja; earlier
versions put all of them into tokenizer_config.json, and those are not looked at by it where there is such a file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litlora.errors import UserError

FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"
DEFAULT = "default"


def template_files(directory: Path) -> dict[str, str]:
    """Those that are files; of two `default` the one in the folder, as in transformers. UserError where one is not UTF-8."""
    paths = [(DEFAULT, directory / FILE), *((path.stem, path) for path in sorted((directory / FOLDER).glob("*.jinja")))]
    found = {}
    for name, path in paths:
        if path.is_file():
            try:
                found[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError("not UTF-8 text", where=path) from error
    return found


def listed_templates(config: Mapping[str, Any]) -> dict[str, str]:
    """Those that tokenizer_config.json holds; one that has no name there is `default`."""
    value = config.get("chat_template")
    if isinstance(value, str):
        return {DEFAULT: value}
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    return {str(entry.get("name")): entry["template"] for entry in entries if isinstance(entry.get("template"), str)}
