"""Loading never runs code, nothing leaves the machine, and a name is only a name: real commands under an audit hook (`guarded.py`)."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import copy, make_adapter
from conftest import ROOT
from guarded import MARK
from talkers import make_step, make_talker

from litlora import options, parsing
from litlora.checkpoint import names
from litlora.commands import COMMANDS, Command, Commands

SMALL = ["--train.max_steps", "2", "--train.global_batch_size", "2", "--eval.max_samples", "2", "--accelerator", "cpu", "--threads", "1"]
ASK = ["--prompt", "say 1", "--max_new_tokens", "3", "--threads", "1"]


def guarded(root: Path, commands: list[dict[str, Any]], foreign: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """Run each in one process under the hook; what it found. A command is its words, and `cwd` and `makes` where they matter."""
    home = root / "home"
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    plan = {
        "root": str(root),
        "foreign": [*map(str, foreign)],
        "commands": [{"cwd": str(root)} | each | {"makes": [*each.get("makes", []), str(home / "cache")]} for each in commands],
    }
    (home / "plan.json").write_text(json.dumps(plan))
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home / "tmp"), "PYTHONSAFEPATH": "1",
    }  # fmt: skip
    words = [sys.executable, str(ROOT / "tests" / "guarded.py"), str(home / "plan.json")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, errors="replace")
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(commands)
    return found


def assert_harmless(command: dict[str, Any], found: dict[str, Any], codes: tuple[int, ...]) -> None:
    words = [*command["words"]]
    assert not found["seen"], (words, found)
    assert not found["made"], (words, found)
    assert found["code"] in codes, (words, found)
    assert "Traceback" not in found["said"] and "this is a bug" not in found["said"], (words, found)


def rows_file(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"{n}"}) + "\n" for n in range(8)))
    return path


# ---- S01: what lies in a model's directory ---------------------------------------------------------------------------


class Payload:
    """Pickled, it runs a shell when it is read."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return (exec, (self.code,))


def pickled(path: Path, *, zipped: bool = False) -> Path:
    """A file as `torch.save` writes it, old form and new, with code in it."""
    data = pickle.dumps(Payload(f"'{MARK}'; import os; os.system('touch {path.parent}/pwned')"), protocol=2)
    if zipped:
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
        data = held.getvalue()
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


SOURCES = (
    "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "generate.py", "custom_generate/generate.py", "__init__.py",
    "sitecustomize.py", "conftest.py", "setup.py", "torch.py", "litlora.py", "jinja2.py", "handler.py",
)  # fmt: skip
BESIDE = (  # a step and a base may hold them; no command opens one
    *names.TRAINER_FILES, "training_state.pt", "pytorch_lora_weights.bin", "value_head.bin", "model.ckpt", "consolidated.00.pth",
)  # fmt: skip


def plant(directory: Path) -> Path:
    """Files that run code when they are opened, beside a good model or step; and its settings point at them."""
    for name in SOURCES:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"'{MARK}'\nraise SystemExit('the model ran its own code')\n")
    for number, name in enumerate(BESIDE):
        pickled(directory / name, zipped=number % 2 == 0)
    auto = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil"] * 2,
    }
    more = {"auto_map": auto, "trust_remote_code": True, "model_file": "modeling_evil.py", "custom_generate": "custom_generate"}
    for name in (names.CONFIG, names.TOKENIZER_CONFIG):
        path = directory / name
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | more))
    (directory / names.GENERATION_CONFIG).write_text(json.dumps(more))
    return directory


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `other`, good models with code beside them; `adapter`; `rows.jsonl`."""
    root = tmp_path_factory.mktemp("hostile")
    for seed, name in enumerate(("base", "other")):
        plant(make_talker(root / name, seed))
    adapter = plant(make_adapter(root / "adapter", str(root / "base")))
    settings = json.loads((adapter / names.ADAPTER_CONFIG).read_text())
    settings["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "modeling_evil"}
    (adapter / names.ADAPTER_CONFIG).write_text(json.dumps(settings))
    rows_file(root / "rows.jsonl")
    return root


def test_every_command_works_offline_beside_hostile_files_and_runs_none_of_them(hostile: Path) -> None:
    """S01: sockets blocked, no shell, no process, no pickle, no code out of the model's directory, which offers plenty.

    Caught: an `import` of the directory's modeling file.
    """
    base, rows, out, adapter = (str(hostile / name) for name in ("base", "rows.jsonl", "out", "adapter"))
    fit = [base, "--data", rows, *SMALL]
    demo = str(hostile / "demo")
    commands = [
        ["finetune", "lora", "--out_dir", demo, *SMALL],
        ["merge_lora", demo],
        ["chat", demo, *ASK[2:]],
        ["finetune", "lora", *fit, "--out_dir", out, "--train.save_interval", "1"],
        ["finetune", "lora", "--resume", "--out_dir", out, "--train.max_steps", "3"],
        ["chat", out, *ASK[2:]],
        ["generate", out, *ASK],
        ["generate", base, *ASK, "--adapter", adapter],
        ["generate", f"{hostile}/merged", *ASK],
        ["evaluate", out, "--data", rows, "--threads", "1", "--max_new_tokens", "2"],
        *(["inspect", path] for path in (base, out, adapter, f"{hostile}/merged")),
        ["verify", out],
        ["verify", f"{hostile}/merged"],
        ["diff", f"{out}/step-1", f"{out}/step-3"],
        ["diff", base, f"{hostile}/other"],
        ["combine", f"{out}/step-1", f"{out}/step-2", "--out_dir", f"{hostile}/combined"],
        ["combine", base, f"{hostile}/other", "--out_dir", f"{hostile}/combined-models"],
        ["convert", out, "--to", "peft", "--out_dir", f"{hostile}/peft"],
        ["convert", base, "--to", "gguf", "--out_dir", f"{hostile}/gguf"],
        ["expand", base, "--out_dir", f"{hostile}/expanded"],
        ["list", out],
        ["note", f"{out}/step-3", "words"],
        ["data", "inspect", rows, "--checkpoint_dir", base],
        ["data", "validate", rows, "--checkpoint_dir", base],
        *(["finetune", method, *fit, "--out_dir", f"{out}-{method}"] for method in ("adapter", "pro", "freeze", "full")),
        ["merge_lora", f"{out}-pro"],
    ]
    commands.insert(8, ["merge_lora", out, "--out_dir", f"{hostile}/merged"])
    plans = [{"words": words, "makes": [str(hostile)], "cwd": base} for words in commands]
    # A step gets its own company when it is there: between two calls of the guard.
    begun = guarded(hostile, plans[:4], (hostile,))
    for step in (hostile / "out").glob("step-*"):
        plant(step)
    for plan, found in zip(plans, [*begun, *guarded(hostile, plans[4:], (hostile,))], strict=True):
        assert_harmless(plan, found, (0,))
    assert not list(hostile.rglob("pwned"))


def spoiled(hostile: Path) -> Iterator[tuple[Path, str]]:
    """Models, steps and rows in which a file that is read holds a pickle with code: where it is, and which file."""
    places = hostile / "spoiled"
    places.mkdir()
    step = make_step(hostile / "run", 3, hostile / "base")
    for zipped in (False, True):
        kind = "zip" if zipped else "raw"
        for number, name in enumerate(() if zipped else (names.WEIGHTS, names.CONFIG, names.TOKENIZER, names.TOKENIZER_CONFIG)):
            directory = copy(hostile / "base", places / f"base-{kind}-{number}")
            yield pickled(directory / name, zipped=zipped).parent, name
        for number, name in enumerate((names.PICKLED_WEIGHTS, "model.pt", names.LITGPT_WEIGHTS)):  # and no other weights
            directory = copy(hostile / "base", places / f"pickled-{kind}-{number}")
            (directory / names.WEIGHTS).unlink()
            (directory / names.LITGPT_CONFIG).write_text("name: !!python/object/apply:os.system ['touch pwned']\n")
            yield pickled(directory / name, zipped=zipped).parent, name
        for number, name in enumerate((names.ADAPTER_WEIGHTS, *names.PICKLED_ADAPTERS, names.ADAPTER_CONFIG, names.LITGPT_LORA)):
            directory = copy(hostile / "adapter", places / f"adapter-{kind}-{number}")
            if name != names.ADAPTER_CONFIG:
                (directory / names.ADAPTER_WEIGHTS).unlink()
            yield pickled(directory / name, zipped=zipped).parent, name
        for number, name in enumerate(() if zipped else (names.MANIFEST, names.ADAPTER_WEIGHTS, names.ADAPTER_CONFIG, names.TOKENIZER)):
            directory = copy(step, places / f"of-{kind}-{number}" / step.name)
            yield pickled(directory / name, zipped=zipped).parent, name


def test_a_pickle_under_any_name_that_is_read_is_refused_and_runs_nothing(hostile: Path) -> None:
    """S01: by each command that reads a model; `convert`, which reads pickled weights, too."""
    plans = []
    for number, (path, name) in enumerate(spoiled(hostile)):
        tokens = name in (names.TOKENIZER, names.TOKENIZER_CONFIG)
        asked = [["generate", str(path), *ASK], ["convert", str(path), "--to", "hf", "--out_dir", f"{hostile}/made-{number}"]]
        asked += [] if tokens else [["inspect", str(path)], ["verify", str(path)]]
        asked += [] if tokens else [["merge_lora", str(path), "--out_dir", f"{hostile}/made-{number}"]]
        asked += [["diff", str(path), str(hostile / "base")], ["combine", str(path), str(path), "--out_dir", f"{hostile}/made-{number}"]]
        asked += [["evaluate", str(path), "--data", f"{hostile}/rows.jsonl"]]
        asked += [["finetune", "lora", str(path), "--data", f"{hostile}/rows.jsonl", "--out_dir", f"{hostile}/made-{number}", *SMALL]]
        plans += [{"words": words, "name": name, "makes": [f"{hostile}/made-{number}"]} for words in asked]
    for plan, found in zip(plans, guarded(hostile, plans, (hostile,)), strict=True):
        lenient = plan["words"][0] in ("diff", "convert", "combine", "inspect") or plan["name"].startswith("tokenizer")
        assert_harmless(plan, found, (0, 1, 2) if lenient else (1, 2))
        assert found["code"] == 0 or not [path for path in hostile.glob("made-*") if path.name in plan["words"]]
    assert not list(hostile.rglob("pwned"))


def test_a_pickle_among_the_rows_or_as_training_state_is_refused_and_runs_nothing(hostile: Path, tmp_path: Path) -> None:
    """S01: rows of every ending, and what a run is resumed from."""
    for number, ending in enumerate((".json", ".jsonl", ".csv", ".txt", ".parquet", ".pkl", ".pt", ".npy", "")):
        pickled(tmp_path / f"rows-{number}{ending}", zipped=number % 2 == 0)
    plans: list[dict[str, Any]] = [{"words": ["data", "validate", str(path)]} for path in sorted(tmp_path.glob("rows-*"))]
    rows = rows_file(tmp_path / "good.jsonl")
    out = tmp_path / "out"
    train = ["finetune", "lora", str(hostile / "base"), "--data", str(rows), "--out_dir", str(out), *SMALL]
    begun = guarded(tmp_path, [{"words": train, "makes": [str(out)]}])
    assert_harmless({"words": train}, begun[0], (0,))
    for name in (names.TRAINING_STATE, names.TRAINING_STATE_META, names.RUN_YAML):
        run = copy(out, tmp_path / f"out-{name}")
        pickled((run if name == names.RUN_YAML else run / "step-2") / name, zipped=True)
        plans.append({"words": ["finetune", "lora", "--resume", "--out_dir", str(run), "--train.max_steps", "3"], "makes": [str(run)]})
    for plan, found in zip(plans, guarded(tmp_path, plans, (tmp_path,)), strict=True):
        text = plan["words"][-1].endswith(".txt") and b"\0" not in Path(plan["words"][-1]).read_bytes()
        assert_harmless(plan, found, (0, 1, 2) if text else (1, 2))
    assert not list(tmp_path.rglob("pwned"))


# ---- S06: a name is only a name --------------------------------------------------------------------------------------

NAMES = {
    "spaces": "  two  spaces ",
    "newlines": "a\nb\rc",
    "shell": "; touch pwned; $(touch pwned) `touch pwned` && | > pwned 'q\" #",
    "dash": "-rf",
    "dashes": "--out_dir",
    "longest": "n" * 255,
    "unicode": "\u00fc-\u65e5\u672c-\U0001f642-\u202e-e\u0301",
    "formats": "%s %n {0} {x!r} ${HOME} ~",
    "globs": "*[a-z]?",
    "dots": "...",
}
INPUTS = {  # option -> what it may be given: which of these things
    "checkpoint_dir": "base", "other_dir": "base", "checkpoints": "base", "base_dir": "base", "adapter": "adapter", "data": "rows.jsonl",
    "eval.data": "rows.jsonl", "eval_data": "rows.jsonl", "prompts": "prompts.txt", "tokenizer_dir": "base", "config": "options.yaml",
    "chat_template": "template.jinja",
}  # fmt: skip
MADE = ("out_dir", "plot")
WORDS: dict[str, list[str]] = {  # what each command needs beside the one path
    "finetune": SMALL,
    "pretrain": [*SMALL, "--model.num_hidden_layers=1", "--model.hidden_size=16", "--model.intermediate_size=16",
                 "--model.num_attention_heads=2", "--model.num_key_value_heads=2", "--model.vocab_size=260",
                 "--train.max_seq_length=32"],
    "convert": ["--to=gguf"],
    "expand": ["--n_insert=1"],
    "generate": ["--max_new_tokens=2"],
    "chat": ["--max_new_tokens=2"],
    "evaluate": ["--max_new_tokens=2", "--max_samples=2"],
    "combine": ["--how=average"],
}  # fmt: skip


def leaf_commands(table: Commands = COMMANDS, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Command]]:
    for word, inside in table.items():
        if isinstance(inside, Command):
            yield (*before, word), inside
        else:
            yield from leaf_commands(inside, (*before, word))


def path_options(command: Command) -> list[str]:
    known = [leaf.name for leaf in parsing.leaves(getattr(options, command.options))]
    assert not [name for name in known if name.endswith("_dir") and name not in (*INPUTS, *MADE)]
    return [name for name in (*INPUTS, *MADE) if name in (*known, "config")]


CASES = [(words, command, option) for words, command in leaf_commands() for option in path_options(command)]


def of_name(root: Path, number: int, words: tuple[str, ...], command: Command, option: str, name: str) -> dict[str, Any]:
    """One command with one path of that name, in a directory of its own where that is a link to what is meant, or nothing yet."""
    known = [leaf.name for leaf in parsing.leaves(getattr(options, command.options))]
    here = root / "here" / str(number)
    here.mkdir(parents=True)
    given = {
        "out_dir": str(here / "made"),
        "data": str(root / "rows.jsonl"),
        "checkpoint_dir": str(root / "base"),
        "other_dir": str(root / "other"),
    }
    given |= {"checkpoints": str(root / "other"), "prompt": "say 1"}
    if words[0] in ("merge_lora", "list", "note", "verify"):
        given["checkpoint_dir"] = str(root / "run")
    if words[0] == "pretrain":
        given.pop("checkpoint_dir")
    if option == "prompts":
        given.pop("prompt")
    given = {key: value for key, value in given.items() if key in known}
    if option in INPUTS:
        ending = Path(INPUTS[option]).suffix
        name = name[: 255 - len(ending)] + ending
        target = "run" if option == "checkpoint_dir" and words[0] in ("merge_lora", "list", "note", "verify") else INPUTS[option]
        (here / name).symlink_to(root / target)
    if option == "config":
        return {"words": [*words, *WORDS.get(words[0], []), *(f"--{key}={value}" for key, value in given.items()), f"--config={name}"],
                "cwd": str(here), "makes": ["made"]}  # fmt: skip
    given[option] = name
    pairs = [f"--{key}={value}" for key, value in given.items()]
    return {"words": [*words, *WORDS.get(words[0], []), *pairs], "cwd": str(here), "makes": ["made", *([name] if option in MADE else [])]}


def try_names(root: Path, chosen: list[tuple[tuple[str, ...], Command, str, str]]) -> None:
    make_talker(root / "base")
    make_talker(root / "other", 1)
    make_adapter(root / "adapter", str(root / "base"))
    make_step(root / "run", 3, root / "base")
    rows_file(root / "rows.jsonl")
    (root / "prompts.txt").write_text("say 1\n")
    (root / "options.yaml").write_text("{}\n")
    (root / "template.jinja").write_text("{{ messages[0].content }}")
    plans = [of_name(root, number, *case) for number, case in enumerate(chosen)]
    for plan, found in zip(plans, guarded(root, plans), strict=True):
        judges = plan["words"][0] == "verify" or plan["words"][:2] == ["data", "validate"]  # what they look at may well be at fault
        assert_harmless(plan, found, (0, 1, 2) if judges else (0, 2))
    assert not list(root.rglob("pwned"))


def test_a_path_of_any_name_is_only_a_name(tmp_path: Path) -> None:
    """S06: each option that takes a path, of each command, with one of the names: no shell, no process, nothing made elsewhere."""
    several = list(NAMES.values())
    few = [case for case in CASES if case[0][0] != "finetune" or case[0] == ("finetune", "lora")]  # the five share their reading of paths
    try_names(tmp_path, [(*case, several[number % len(several)]) for number, case in enumerate(few)])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_path_of_each_name_is_only_a_name(tmp_path: Path, name: str) -> None:
    """S06: every option of every command with every name."""
    try_names(tmp_path, [(*case, NAMES[name]) for case in CASES])


def test_a_yaml_tag_makes_nothing(tmp_path: Path) -> None:
    """S06: python's tags are refused in a file of options and in a run's run.yaml."""
    tags = ("!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!python/object/new:os.system [x]")
    plans: list[dict[str, Any]] = []
    for number, tag in enumerate(tags):
        run = tmp_path / f"run-{number}"
        run.mkdir()
        (run / names.RUN_YAML).write_text(f"# litlora finetune lora --config run.yaml\nseed: {tag}\n")
        plans.append({"words": ["finetune", "lora", "--config", f"{run}/{names.RUN_YAML}", "--out_dir", f"{tmp_path}/out"]})
        plans.append({"words": ["finetune", "lora", "--resume", "--out_dir", str(run)]})
    for plan, found in zip(plans, guarded(tmp_path, plans), strict=True):
        assert_harmless(plan, found, (2,))
    assert not list(tmp_path.rglob("pwned"))
