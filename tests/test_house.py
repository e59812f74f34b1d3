"""The rules of the house (DESIGN section 2), held by looking at the source itself."""

import ast
import builtins
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "litlora"

FLOORS = [
    {"errors", "config", "options", "importing"},
    {"cpu", "gpu", "console"},
    {"kernels", "quantized"},
    {"parsing", "precision", "model", "families", "peft", "safetensors_file", "tokenizer"},
    {"methods", "prompts", "replay"},
    {"checkpoint", "data", "generation"},
    {"train", "merge", "vocabulary", "convert"},
    {"combine", "verify"},
    {"commands"},
    {"__init__", "__main__"},
]
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}

# The Python API's front doors reach up, lazily, when they are called: `GPT.from_pretrained` is the model's own.
LAZY_EXCEPTIONS = {("model", "checkpoint")}

METHODS = ("lora", "adapter", "pro", "freeze", "full")

TORCH_FREE = [
    "litlora", "litlora.__main__", "litlora.errors", "litlora.config", "litlora.options", "litlora.parsing", "litlora.console",
    "litlora.importing",
    "litlora.families", "litlora.peft", "litlora.peft.targets", "litlora.safetensors_file", "litlora.tokenizer", "litlora.prompts",
    "litlora.methods", "litlora.methods.tuning", "litlora.checkpoint", "litlora.checkpoint.names", "litlora.checkpoint.commit",
    "litlora.checkpoint.manifest", "litlora.checkpoint.resolve", "litlora.checkpoint.fingerprint", "litlora.checkpoint.checkpoint",
    "litlora.checkpoint.downloaded", "litlora.commands.download",
    "litlora.checkpoint.card", "litlora.checkpoint.run", "litlora.merge", "litlora.merge.effective", "litlora.merge.expand",
    "litlora.vocabulary", "litlora.combine", "litlora.combine.soup", "litlora.verify", "litlora.verify.weights", "litlora.commands.verify",
    "litlora.convert", "litlora.convert.sources", "litlora.convert.hf", "litlora.convert.adapters", "litlora.convert.gguf_model",
    "litlora.convert.gguf_adapter", "litlora.commands.convert",
    "litlora.commands", "litlora.commands.diff", "litlora.commands.combine", "litlora.commands.merge_lora", "litlora.commands.expand",
    "litlora.commands.extend_vocab", "litlora.commands.generate", "litlora.commands.data",
    "litlora.commands.inspect", "litlora.commands.list", "litlora.commands.note",
    "litlora.data.rows", "litlora.data.formats", "litlora.data.samples", "litlora.data.demo",
    "litlora.train.before",
]  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The rooms of litlora that a file imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute, so that a line alone says where a name is from"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "litlora" else [node.module or ""]
        rooms |= {name.split(".")[1] for name in names if name.startswith("litlora.")}
    return rooms - {"__version__"}


def source_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def test_every_file_has_its_floor() -> None:
    """A room that no floor knows is a room that was built without asking where it belongs."""
    assert {room_of(path) for path in source_files()} == set(LEVEL)


def test_a_file_imports_only_from_lower_floors_or_its_own_room() -> None:
    """DESIGN section 2."""
    wrong = []
    for path in source_files():
        room = room_of(path)
        for other in imports_of(path):
            lower = other == room or LEVEL[other] < LEVEL[room] or room == "__main__"
            if not lower and (room, other) not in LAZY_EXCEPTIONS:
                wrong.append(f"{path.relative_to(ROOT)} (floor {LEVEL[room]}) imports {other} (floor {LEVEL[other]})")
    assert not wrong, "\n".join(wrong)


def test_what_looks_at_files_alone_imports_no_torch() -> None:
    """DESIGN section 2: config, families, PEFT's format, what methods mean, checkpoint, merge and all of parsing start without torch."""
    code = f"""
import importlib, sys
for name in {TORCH_FREE!r}:
    importlib.import_module(name)
    heavy = [module for module in ("torch", "lightning_fabric", "transformers") if module in sys.modules]
    assert not heavy, f"{{name}} imported {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words", ["--help", "finetune --help", "merge_lora --help", "chat --help", *(f"finetune {method} --help" for method in METHODS)]
)
def test_help_imports_neither_torch_nor_numpy(words: str) -> None:
    """C5: seven seconds for --help was the complaint."""
    code = f"""
import sys
from litlora.__main__ import main
try:
    code = main({words.split()!r})
except SystemExit as stop:
    code = stop.code
heavy = [module for module in ("torch", "lightning_fabric", "numpy", "tokenizers", "jinja2") if module in sys.modules]
assert code == 0 and not heavy, (code, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_one_room_spells_the_file_names() -> None:
    """DESIGN section 2: checkpoint/names.py owns them; a literal elsewhere is a second truth."""
    named = re.compile(
        r"\.(safetensors|safetensors\.index\.json|jinja)$|^(config|generation_config|tokenizer|tokenizer_config|adapter_config|litlora)\.json$"
    )
    wrong = []
    for path in source_files():
        if room_of(path) in ("checkpoint", "tokenizer"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs and named.search(node.value):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}")
    assert not wrong, "\n".join(wrong)


UNPICKLER = SOURCE / "convert" / "pickles.py"


def test_nothing_unpickles() -> None:
    """YARDSTICK S01: loading never runs code. One import tool reads pickled weights, and asks for nothing but weights."""
    banned = re.compile(
        r"\bpickle\b|torch\.save\(|torch\.load\(|strict=False|\beval\(|\bexec\(|yaml\.load\(|os\.system|shell=True|_lazy_load|except:\s"
    )
    allowed = re.compile(r"\.eval\(\)|def eval|never pickle|no pickle|not pickle")
    found = [
        (path, number, line.strip())
        for path in source_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if banned.search(line) and not allowed.search(line)
    ]
    only = [line for path, _, line in found if path == UNPICKLER]
    wrong = [f"{path.relative_to(ROOT)}:{number}: {line}" for path, number, line in found if path != UNPICKLER]
    assert not wrong, "\n".join(wrong)
    assert len(only) == 1 and re.search(r"= torch\.load\(.*weights_only=True", only[0]), only


def test_files_and_functions_stay_readable() -> None:
    """DESIGN section 2: files to about 600 lines, functions to about 60; model.py may reach 1,000, for it has experts as well."""
    wrong = []
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        length, most = len(text.splitlines()), 1000 if path.name == "model.py" else 640
        if length > most:
            wrong.append(f"{path.relative_to(ROOT)}: {length} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (node.end_lineno or 0) - node.lineno > 70:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {(node.end_lineno or 0) - node.lineno} lines")
    assert not wrong, "\n".join(wrong)


def test_every_command_is_a_file_and_a_function_of_its_name() -> None:
    """DESIGN section 2: one word = one command = one file = one function."""
    import importlib

    from litlora import options
    from litlora.commands import COMMANDS, Command

    for word, inside in COMMANDS.items():
        for command in inside.values() if isinstance(inside, dict) else [inside]:
            assert isinstance(command, Command)
            assert command.module == f"litlora.commands.{word}"
            assert command.function == word or (hasattr(builtins, word) and command.function.startswith(f"{word}_")), word
            assert callable(getattr(importlib.import_module(command.module), command.function))
            assert hasattr(options, command.options)


def test_every_option_has_help() -> None:
    """An option that nobody explains is an option that nobody uses."""
    from litlora import options
    from litlora.commands import COMMANDS, Command
    from litlora.parsing import leaves

    for inside in COMMANDS.values():
        for command in inside.values() if isinstance(inside, dict) else [inside]:
            assert isinstance(command, Command)
            for leaf in leaves(getattr(options, command.options)):
                assert leaf.field.metadata.get("help"), f"{command.options}: --{leaf.name}"
