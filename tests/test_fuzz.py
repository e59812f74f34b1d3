"""Whatever is read may hold anything: it is accepted or refused in documented words, within seconds (YARDSTICK Z01).

Hypothesis makes it up: half of it near what is meant, for noise alone stops at the first check.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_samples import ADAPTER, CONFIG, add_step, make_base, manifest_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from talkers import TEMPLATE, byte_tokenizer

from litlora import options, parsing
from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.manifest import read_manifest, read_state, seal
from litlora.checkpoint.resolve import read_step, resolve
from litlora.commands import COMMANDS, Command
from litlora.console import print_table, warn
from litlora.data.samples import load_data
from litlora.errors import UserError, WorkError
from litlora.families import config_from_hf
from litlora.methods import from_peft
from litlora.peft import adapter_config_from_peft
from litlora.prompts import Prompts
from litlora.tokenizer import Tokenizer

EXAMPLES = int(os.environ.get("LITLORA_EXAMPLES", "60"))  # 500 and more now and then
fuzz = settings(max_examples=EXAMPLES, deadline=5000, suppress_health_check=list(HealthCheck))  # milliseconds: none hangs

TEXT = st.text(max_size=12)
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([-1, 0, 1, 2**63, 1e308, "", "\0", "a/b", "../x"])
JSON = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)  # `parse_json` has refused whatever is none


def near(good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The same with a few keys changed, missing or new."""
    changes = st.dictionaries(st.sampled_from(sorted(good)) | TEXT, JSON, max_size=3)
    missing = st.lists(st.sampled_from(sorted(good)), max_size=2)
    return st.builds(lambda new, gone: {key: value for key, value in {**good, **new}.items() if key not in gone}, changes, missing)


def only_documented(work: Callable[[], object]) -> None:
    with contextlib.suppress(UserError, WorkError):
        work()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return Prompts(Tokenizer(byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))), TEMPLATE)


# ---- rows and messages -----------------------------------------------------------------------------------------------

MESSAGE = near({"role": "user", "content": "a"}) | st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXT | JSON}
)
ROW = (
    near({"prompt": "a", "completion": "b"})
    | near({"instruction": "a", "input": "b", "output": "c"})
    | near({"text": "a"})
    | st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4) | JSON})
    | st.fixed_dictionaries({"conversations": st.lists(near({"from": "human", "value": "a"}), max_size=4)})
    | near({"prompt": "a", "chosen": "b", "rejected": "c"})
    | JSON
)


def read_rows(path: Path, prompts: Prompts) -> None:
    for on_error in ("stop", "skip"):
        rows = options.RowsOptions(on_error=on_error)  # type: ignore[arg-type]
        only_documented(lambda rows=rows: load_data([str(path)], prompts, rows=rows, max_seq_length=64))  # type: ignore[misc]


@fuzz
@given(rows=st.lists(ROW, max_size=3))
def test_rows_of_any_json_are_read_or_refused(place: Path, prompts: Prompts, rows: list[Any]) -> None:
    """Z01: JSONL rows of every format, and messages; also as one JSON array."""
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    read_rows(path, prompts)


@fuzz
@given(
    data=st.binary(max_size=60) | st.builds(lambda a, b: b'{"prompt": "a", "completion": "b"}\n' + a + b"\n" + b, st.binary(), st.binary())
)
def test_rows_of_any_bytes_are_read_or_refused(place: Path, prompts: Prompts, data: bytes) -> None:
    """Z01: whatever the file is called."""
    for name in ("rows.jsonl", "rows.json", "rows.txt", "rows.csv"):
        path = place / name
        path.write_bytes(data)
        read_rows(path, prompts)


# ---- what a user types, and files of options -------------------------------------------------------------------------

LEAVES = sorted(
    {f"--{leaf.name}" for inside in COMMANDS.values() if isinstance(inside, dict) for one in inside.values()
     if isinstance(one, Command) for leaf in parsing.leaves(getattr(options, one.options))}
)  # fmt: skip
WORD = TEXT | st.sampled_from(LEAVES) | st.sampled_from(["1", "-1", "true", "null", "[]", "{", "1e999", "nan", "-rf", "--", "a=b", "out"])


def commands() -> list[Command]:
    found = [one for inside in COMMANDS.values() for one in (inside.values() if isinstance(inside, dict) else [inside])]
    return [one for one in found if isinstance(one, Command)]


@fuzz
@given(command=st.sampled_from(commands()), words=st.lists(WORD | st.builds("{}={}".format, st.sampled_from(LEAVES), WORD), max_size=5))
def test_any_words_after_any_command_are_parsed_or_refused(command: Command, words: list[str]) -> None:
    """Z01: options of every command."""
    words = [word for word in words if word.partition("=")[0] not in ("-h", "--help", "--print_config", "--print_config=")]
    only_documented(lambda: parsing.parse(getattr(options, command.options), words, command=command.function))


@fuzz
@given(values=near({"train": {"lr": 1.0}, "seed": 1, "data": ["a"], "lora": {"r": 4}, "eval": {}, "rows": {}}) | JSON, text=TEXT)
def test_a_file_of_options_of_any_yaml_is_parsed_or_refused(place: Path, values: Any, text: str) -> None:
    """Z01: train config YAML; JSON is YAML, and so is nearly any text."""
    path = place / "options.yaml"
    for content in (json.dumps(values), text, f"seed: {text}", f"train:\n  lr: {text}\n"):
        path.write_text(content, encoding="utf-8", errors="replace")
        only_documented(lambda: parsing.parse(options.FinetuneLoRA, ["--config", str(path)], command="finetune lora"))


# ---- what comes with a model -----------------------------------------------------------------------------------------


@fuzz
@given(
    values=near(CONFIG | {"rope_theta": 1e4, "rope_scaling": None, "eos_token_id": 2, "sliding_window": 7, "hidden_act": "silu"}) | OBJECT
)
def test_any_config_json_is_read_or_refused(values: Any) -> None:
    """Z01."""
    only_documented(lambda: config_from_hf(values, "config.json"))


@fuzz
@given(
    values=near(ADAPTER | {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": [0]})
    | OBJECT
)
def test_any_adapter_config_is_read_or_refused(values: Any) -> None:
    """Z01: of a PEFT adapter, and where its adapters go."""
    config = config_from_hf(CONFIG, "config.json")

    def read() -> None:
        from_peft(adapter_config_from_peft(values, "adapter_config.json"), config).file_shapes(config)

    only_documented(read)


SPECIAL = near({"content": "<s>", "lstrip": False, "normalized": False, "special": True}) | JSON
TOKENIZER_CONFIG = near(
    {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {"258": {"content": "<|end|>", "special": True}},
        "pad_token": None,
    }
) | st.fixed_dictionaries({"bos_token": SPECIAL, "eos_token": SPECIAL, "added_tokens_decoder": st.dictionaries(TEXT, SPECIAL, max_size=2)})


@fuzz
@given(values=TOKENIZER_CONFIG | JSON)
def test_any_tokenizer_config_is_read_or_refused(place: Path, values: Any) -> None:
    """Z01: special tokens and the chat template, used once."""
    directory = place / "tokenizer"
    if not directory.exists():
        directory.mkdir()
        byte_tokenizer(directory)
    (directory / names.TOKENIZER_CONFIG).write_text(json.dumps(values), encoding="utf-8")

    def use() -> None:
        Prompts(Tokenizer(directory)).samples_ids([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])

    only_documented(use)


@fuzz
@given(
    values=near({"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}) | JSON,
    raw=st.binary(max_size=40),
)
def test_any_index_and_any_json_file_is_read_or_refused(place: Path, values: Any, raw: bytes) -> None:
    """Z01, Z02 in small: the index of a sharded base, and the same files with any bytes."""
    base = place / "base"
    if not base.exists():
        make_base(base, shards=2)
    for content in (json.dumps(values).encode(), raw):
        (base / names.WEIGHTS_INDEX).write_bytes(content)
        only_documented(lambda: resolve(base).shards())


# ---- what litlora itself wrote, and somebody changed -----------------------------------------------------------------

MANIFEST = {key: value for key, value in json.loads(manifest_of(3, val_loss=1.25).encode()).items() if key != "sha256"}


@fuzz
@given(
    values=near(MANIFEST)
    | st.builds(lambda base: MANIFEST | {"base": base}, near({"path": "/b", "model_type": "llama", "fingerprint": "xxh3:0"}))
    | OBJECT,
    raw=st.binary(max_size=40),
)
def test_any_manifest_is_read_or_refused(place: Path, values: dict[str, Any], raw: bytes) -> None:
    """Z01: also where whoever changed it made its own hash right again."""
    step = place / "run" / "step-3"
    if not step.exists():
        add_step(step.parent, 3)
    good = {name: (step / name).read_bytes() for name in (names.MANIFEST, names.TRAINING_STATE_META)}
    manifest = read_manifest(step)
    try:
        for content in (seal(values), json.dumps(values).encode(), raw):
            (step / names.MANIFEST).write_bytes(content)
            read_step(step)  # a step is torn or whole; looking at it refuses nothing
            only_documented(lambda: resolve(step))
            only_documented(lambda: resolve(step.parent))
            (step / names.MANIFEST).write_bytes(good[names.MANIFEST])
            (step / names.TRAINING_STATE_META).write_bytes(content)
            read_step(step)
            only_documented(lambda: read_state(step, manifest))
    finally:
        for name, content in good.items():
            (step / name).write_bytes(content)


# ---- names of somebody else's on a terminal --------------------------------------------------------------------------

COMMANDING = st.sampled_from(
    ["\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\r", "\x08", "\nhint: rm -r", "\u202e", "\u2028", "\x7f", "\ufeff"]
)
HOSTILE = st.builds(lambda *parts: "".join(parts), st.text("ab\u3000é.", max_size=3), COMMANDING, st.text(max_size=3))


def as_tensor(place: Path, name: str) -> list[list[str]]:
    """A base with one tensor too many."""
    base = make_base(place / "base")
    tensors = load_file(base / names.WEIGHTS)
    with contextlib.suppress(UnicodeEncodeError):
        save_file({**tensors, name: np.zeros(2, np.float32)}, base / names.WEIGHTS)
    return [[command, str(base)] for command in ("inspect", "verify")] + [
        ["diff", str(base), "demo"],
        ["expand", str(base), "--out_dir", "x"],
    ]


def as_manifest(place: Path, name: str) -> list[list[str]]:
    """What a sealed manifest says of a step: whoever sealed it may have been somebody else."""
    step = add_step(place / "out", 1, make_base(place / "base"))
    values = json.loads((step / names.MANIFEST).read_text())
    values |= {"method": name, "versions": {name: name}, "base": {**values["base"], "path": name}}
    with contextlib.suppress(UnicodeEncodeError):
        (step / names.MANIFEST).write_bytes(seal({key: value for key, value in values.items() if key != "sha256"}))
    return [["inspect", str(step)], ["list", str(place / "out")], ["verify", str(step)], ["chat", str(step)]]


def as_row(place: Path, name: str) -> list[list[str]]:
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps(value) + "\n" for value in ({name: 1}, {"messages": [{"role": name, "content": name}]})))
    good = place / "good.jsonl"
    good.write_text(json.dumps({"prompt": f"a{name}", "completion": f"{name}b"}) + "\n")
    return [["data", "validate", str(rows)], ["data", "inspect", str(good)], ["finetune", "lora", "--data", str(rows), "--dry_run"]]


def as_file(place: Path, name: str) -> list[list[str]]:
    (place / "there").mkdir()
    with contextlib.suppress(OSError, ValueError):
        (place / "there" / name.replace("/", "_")).write_text("")
    return [["inspect", str(place / "there")], ["chat", str(place / "there")], ["data", "inspect", str(place / "there")], ["verify", name]]


def as_adapter(place: Path, name: str) -> list[list[str]]:
    step = add_step(place / "out", 1, make_base(place / "base"))
    values = json.loads((step / names.ADAPTER_CONFIG).read_text())
    (step / names.MANIFEST).unlink()
    adapter = step.rename(place / "adapter")
    (adapter / names.ADAPTER_CONFIG).write_text(json.dumps({**values, "base_model_name_or_path": name, "revision": name, name: name}))
    return [[command, str(adapter)] for command in ("inspect", "verify", "merge_lora")]


@pytest.mark.parametrize("put", [as_tensor, as_manifest, as_row, as_file, as_adapter])
@settings(max_examples=max(EXAMPLES // 6, 5), deadline=None, suppress_health_check=list(HealthCheck))
@given(name=HOSTILE)
@example(name="\x1b]0;title\x07\t")
def test_no_name_of_somebody_elses_commands_the_terminal(put: Any, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Z01, S01: of tensors, keys, roles, files, modules; in refusals, findings and tables. It is written out, and begins no line."""
    for words in put(tmp_path_factory.mktemp("names"), name):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(words)
        shown = out.getvalue() + err.getvalue()
        ours = {"\n", "\t"} if words[0] == "data" else {"\n"}  # a row's text is shown with its own lines and tabs
        assert shown and not {letter for letter in shown if letter < " " or "\x7f" <= letter <= "\x9f"} - ours
        assert not {"\u202e", "\u2028", "\ufeff"} & set(shown)
        assert "hint: rm -r" not in shown.splitlines() or words[0] == "data"


@fuzz
@given(name=HOSTILE | st.text())
def test_every_way_to_say_something_writes_names_out(name: str) -> None:
    """Refusals, warnings and tables: our own further lines are indented, so that a name begins none."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warn(name, name)
        print_table(["a", "b"], [[name, "1"]])
        print(UserError(name, where=name, context=[name], hint=name).report(), file=err)
    lines = err.getvalue().split("\n")[:-1]
    ours = [line.partition(": ")[0] for line in lines if not line.startswith("  ")]
    assert ours == (["warning", "hint", "error", "hint"] if name else ["warning", "error"]) and len(out.getvalue().split("\n")) == 3
    assert not any(letter < " " or "\x7f" <= letter <= "\x9f" for line in (*lines, *out.getvalue().split("\n")) for letter in line)
