"""`litlora generate`: one prompt as a stream, many side by side, in every way in which a prompt can be given."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from checkpoint_samples import make_adapter
from talkers import make_step, make_talker

import litlora
from litlora.__main__ import main
from litlora.commands.generate import split_weight
from litlora.errors import UserError
from litlora.prompts import Prompts
from litlora.tokenizer import Tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("generate") / "base", ends=False)


@pytest.fixture
def run(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`litlora generate BASE ...` with bytes on standard input; (exit code, standard output, standard error)."""

    def run(*words: str | Path, path: Path = base, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        return main(["generate", str(path), "--max_new_tokens", "10", *map(str, words)]), *capsys.readouterr()

    return run


def answer(path: Path, prompt: str, **options: object) -> str:
    return litlora.generate(litlora.load(path), prompt, max_new_tokens=10, **options)  # type: ignore[arg-type]


def test_the_answer_goes_to_standard_output_and_the_speed_to_standard_error(base: Path, run: Run) -> None:
    code, out, notes = run("--prompt", "héllo")
    assert (code, out) == (0, answer(base, "héllo") + "\n")
    assert notes.startswith("10 tokens · ")


def test_drafts_change_no_word_and_are_counted(base: Path, run: Run) -> None:
    code, out, notes = run("--prompt", "abc abc abc abc", "--prompt_lookup", "8")
    assert (code, out) == (0, answer(base, "abc abc abc abc") + "\n")
    assert re.match(r"10 tokens · \d looked up · \d+ tok/s", notes)
    assert answer(base, "abc abc abc abc", prompt_lookup=8) + "\n" == out
    assert run("--prompt", "x", "--prompt_lookup", "65")[0] == 2


def test_a_prompt_may_come_on_standard_input(base: Path, run: Run) -> None:
    assert run(stdin="two\nlines 🙂\n".encode())[:2] == (0, answer(base, "two\nlines 🙂") + "\n")
    code, _, notes = run(stdin=b"\xff")
    assert code == 2
    assert "standard input: not UTF-8 text" in notes
    code, _, notes = run("--prompt", "\udcff")
    assert code == 2
    assert "--prompt: not UTF-8 text" in notes


@pytest.mark.parametrize("nothing", [b"", b" \n"])
def test_nothing_on_standard_input_is_no_prompt(nothing: bytes, run: Run) -> None:
    """`litlora generate` in a script, forgotten --prompt: refused. Caught: the model's answer to an empty message, exit code 0."""
    code, out, notes = run(stdin=nothing)
    assert (code, out) == (2, "")
    assert "there is no prompt" in notes and "--prompts FILE" in notes


def test_an_empty_prompt_is_none_but_where_a_text_is_gone_on_with(run: Run) -> None:
    """`--prompt "$UNSET"`. Caught: the model's answer to an empty message, exit code 0."""
    for empty in ("", " \n"):
        code, out, notes = run("--prompt", empty)
        assert (code, out) == (2, "") and "error: --prompt: is empty" in notes
    assert run("--prompt", "", "--raw")[0] == 0


def test_help_says_where_a_prompt_comes_from_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "the prompt (default: standard input is read, all of it one prompt)" in capsys.readouterr().out


def test_without_a_prompt_at_a_terminal_nobody_waits(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["generate", str(base)]) == 2
    assert "there is no prompt" in capsys.readouterr().err


def test_a_system_prompt_and_a_raw_prompt_reach_the_model(base: Path, run: Run) -> None:
    assert run("--prompt", "x", "--system", "S")[1] == answer(base, "x", system="S") + "\n"
    assert run("--prompt", "s:S<|end|>u:x<|end|>a:", "--raw")[1] == answer(base, "x", system="S") + "\n"
    assert run("--prompt", "x", "--system", "S", "--raw")[0] == 2


def test_a_raw_prompt_has_one_bos(base: Path) -> None:
    """D02."""
    tokenizer = Tokenizer(base)
    prompts = Prompts(tokenizer)
    assert prompts.text_ids("a") == prompts.text_ids("<s>a") == [256, 97]
    assert prompts.text_ids("") == [256]
    tokenizer.adds_bos = False
    assert Prompts(tokenizer).text_ids("a") == [97]


def test_a_file_of_lines_is_answered_in_order(base: Path, run: Run, tmp_path: Path) -> None:
    """More of them than are computed at once; blank lines are none."""
    lines = [f"{'word ' * (n % 5)}{n}" for n in range(35)]
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff" + "\r\n\r\n".join(lines))
    code, out, notes = run("--prompts", path, "--json")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == lines
    assert [row["text"] for row in rows[:3]] == [answer(base, line) for line in lines[:3]]
    assert rows[-1]["text"] == answer(base, lines[-1])
    assert {row["finish_reason"] for row in rows} == {"length"}
    assert {row["completion_tokens"] for row in rows} == {10}
    assert rows[0]["prompt_tokens"] == len("u:0a:") + 2
    assert "35 answers · 350 tokens" in notes


def test_rows_as_for_training_are_prompts_up_to_their_last_answer(base: Path, run: Run, tmp_path: Path) -> None:
    """With and without answers, in each format."""
    rows = [
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "x"}]},
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "do", "input": "this"},
        {"prompt": "x"},
        {"text": "x"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run("--prompts", path, "--json")
    assert code == 0
    with_system, task, plain = answer(base, "x", system="S"), answer(base, "do\n\nthis"), answer(base, "x")
    assert [json.loads(line)["text"] for line in out.splitlines()] == [with_system, with_system, task, task, plain, plain]
    code, out, _ = run("--prompts", path, "--system", "T")
    assert out.startswith(f"{answer(base, 'x', system='T')}\n" * 2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sharegpt.jsonl", '{"conversations": [{"from": "human", "value": "x"}]}'),
        ("emptied.jsonl", '{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}]}'),
        ("question.json", '[{"question": "x"}]'),
        ("empty.jsonl", '{"instruction": "x", "input": "", "output": ""}'),
        ("columns.jsonl", '{"instruction": "x", "input": "", "output": "", "text": "whole"}'),
        ("table.csv", 'prompt,id\r\n"x",7\r\n'),
        ("table.tsv", "instruction\toutput\nx\t\n"),
        ("messages.csv", 'messages,id\n"[{""role"": ""user"", ""content"": ""x""}]",7\n'),
        ("both.csv", 'conversations\n"[{""from"": ""human"", ""value"": ""x""}, {""from"": ""gpt"", ""value"": """"}]"\n'),
    ],
)
def test_rows_that_only_ask_are_prompts_in_each_format(name: str, content: str, base: Path, run: Run, tmp_path: Path) -> None:
    """Caught: a table's first line answered as a prompt; rows refused for the answer that they ask for, also as JSON in a column."""
    (tmp_path / name).write_text(content)
    code, out, notes = run("--prompts", tmp_path / name)
    assert (code, out) == (0, answer(base, "x") + "\n"), notes


def test_tools_that_the_template_does_not_show_are_not_left_out(run: Run, tmp_path: Path) -> None:
    """As in training: an answer to half of what was asked looks like any other."""
    row = {"tools": [{"name": "weather"}], "messages": [{"role": "user", "content": "x"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    for more in ([], ["--system", "T"]):
        code, out, notes = run("--prompts", tmp_path / "rows.jsonl", *more)
        assert (code, out) == (2, "") and "the chat template does not show them" in notes


def test_a_prompt_with_a_token_that_the_model_does_not_know_is_named(run: Run, tmp_path: Path) -> None:
    """As rows of training are. Caught: the tokenizer's directory named, and not the line."""
    base = make_talker(tmp_path / "base", ends=False)
    config = json.loads((base / "config.json").read_text())
    vocabulary = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    vocabulary.add_tokens([f"<fill{n}>" for n in range(vocabulary.get_vocab_size(), config["vocab_size"])])
    vocabulary.add_tokens([tokenizers.AddedToken("foo", normalized=False)])
    vocabulary.save(str(base / "tokenizer.json"))
    (tmp_path / "prompts.txt").write_text("short\na foo\n")
    for more in ([], ["--raw"]):
        code, out, notes = run("--prompts", tmp_path / "prompts.txt", *more, path=base)
        assert (code, out) == (2, "") and f"{tmp_path / 'prompts.txt'}:2: the token 'foo' has the id {config['vocab_size']}" in notes
    code, _, notes = run("--prompt", "foo", path=base)
    assert code == 2 and "error: --prompt: the token 'foo'" in notes


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_answered(run: Run, tmp_path: Path) -> None:
    """M06."""
    path = tmp_path / "prompts.txt"
    path.write_text("short\n" + "x" * 300 + "\n")
    code, out, notes = run("--prompts", path)
    assert (code, out) == (2, "")
    assert f"{path}:2: the prompt has 306 tokens and the model's context 256" in notes


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b" \n", "no prompt in this file"),
        ("empty.jsonl", b"", "the file is empty"),
        ("bad.jsonl", b'{"prompt": \n', "bad.jsonl:1"),
        ("bad.txt", b"\xff", "not UTF-8"),
        ("bad.csv", b'messages\n"[{""role"": }]"\n', "bad.csv:2:1: 'messages' is not valid JSON"),
        ("answer.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}', "answer.jsonl:1"),
        (".", b"", "cannot be read"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_a_file_without_prompts_is_refused(name: str, content: bytes | None, said: str, run: Run, tmp_path: Path) -> None:
    if content is not None and name != ".":
        (tmp_path / name).write_bytes(content)
    code, out, notes = run("--prompts", tmp_path / name)
    assert (code, out) == (2, "")
    assert said in notes


def test_adapters_are_added_by_weight(base: Path, run: Run, tmp_path: Path) -> None:
    one, two = make_step(tmp_path / "out", 100, base), make_adapter(tmp_path / "peft", str(base), seed=7)
    assert run("--prompt", "x", "--adapter", one)[1] == answer(one, "x") + "\n"
    both = run("--prompt", "x", "--adapter", f"{one}:0.5", f"{two}:-0.25")[1]
    assert both == litlora.generate(litlora.load(base, adapters={one: 0.5, two: -0.25}), "x", max_new_tokens=10) + "\n"
    assert both != run("--prompt", "x")[1]


def test_a_colon_splits_off_a_weight_only_where_the_whole_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "a:0.5").mkdir()
    assert split_weight(f"{tmp_path}/a:0.5") == (f"{tmp_path}/a:0.5", 1.0)
    assert split_weight(f"{tmp_path}/a:0.5:2") == (f"{tmp_path}/a:0.5", 2.0)
    assert split_weight("out/step-200:-1e-1") == ("out/step-200", -0.1)
    assert split_weight("out") == ("out", 1.0)
    for wrong in ("out:half", "out:nan", "out:"):
        with pytest.raises(UserError, match="is no weight"):
            split_weight(wrong)


def test_an_adapters_template_is_the_one_it_was_trained_with(base: Path, run: Run, tmp_path: Path) -> None:
    """A base without a template, and an adapter with one: what was trained is what is asked."""
    bare = make_talker(tmp_path / "bare", template=None, ends=False)
    step = make_step(tmp_path / "out", 100, bare)
    assert run("--prompt", "x", "--adapter", step, path=bare)[1] == answer(step, "x") + "\n"
    assert answer(step, "x") == answer(step, "u:x<|end|>a:", raw=True)
    assert answer(bare, "x") == answer(bare, "### Instruction:\nx\n\n### Response:\n", raw=True)


def test_a_wrong_path_is_refused_before_torch_is_imported(base: Path, run: Run, tmp_path: Path) -> None:
    """Waiting two seconds for an error is two seconds too many."""
    import subprocess

    code = "import sys\nfrom litlora.__main__ import main\ncode = main(sys.argv[1:])\nassert 'torch' not in sys.modules\nsys.exit(code)"
    for words in (["nowhere", "--prompt", "x"], [str(base), "--prompts", "nowhere"], [str(base), "--prompt", "x", "--adapter", "nowhere"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "generate", *words], capture_output=True, text=True, cwd=Path(litlora.__file__).parents[1]
        )
        assert done.returncode == 2, done.stderr
        assert "nowhere" in done.stderr
