"""A tokenizer's files for another directory. Ours are flat: what lies in a folder of its own goes into tokenizer_config.json."""

import json
from pathlib import Path

from litlora.checkpoint import names
from litlora.checkpoint.reading import file_in, parse_json, read_bytes

WITH_TEMPLATES = (names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE)


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """Name -> bytes of the tokenizer's files in `directory`, its chat templates as in `template_files`. UserError as `file_in`."""
    others = [name for name in names.TOKENIZER_FILES if name not in WITH_TEMPLATES and (directory / name).exists()]
    return {name: read_bytes(file_in(directory, name)) for name in others} | template_files(directory)


def template_files(directory: Path) -> dict[str, bytes]:
    """Those of tokenizer_config.json and chat_template.jinja that there are.

    Templates of additional_chat_templates/ become a list in tokenizer_config.json, as earlier versions of transformers wrote it; the
    later ones read it where there is no chat_template.jinja, so the one in there is listed too. Links to nothing are passed over.
    """
    found = {name: read_bytes(file_in(directory, name)) for name in WITH_TEMPLATES if (directory / name).exists()}
    folder = directory / names.ADDITIONAL_TEMPLATES
    files = [path for path in folder.glob(f"*{names.TEMPLATE}") if path.exists()]
    if not files:
        return found
    from litlora.tokenizer import templates  # with the tokenizers package, which few need here

    for path in files:
        file_in(folder, path.name)
    values = parse_json(found.get(names.TOKENIZER_CONFIG, b"{}"), directory / names.TOKENIZER_CONFIG)
    named = templates.listed_templates(values) | templates.template_files(directory)
    listed = [{"name": name, "template": text} for name, text in named.items()]
    return {names.TOKENIZER_CONFIG: (json.dumps(values | {"chat_template": listed}, indent=2, ensure_ascii=False) + "\n").encode()}
