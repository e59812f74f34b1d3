"""litlora/commands/data.py: what rows hold and what is wrong with them, said before a model is trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from checkpoint_samples import make_base
from conftest import shared_data
from talkers import byte_tokenizer

from litlora.__main__ import main

GOOD = {"prompt": "Say one.", "completion": "One!"}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["data", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_rows_are_shown_with_what_is_graded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """D01, D03: format, counts, lengths, and a row whose answer and end token stand between the marks."""
    path = jsonl(tmp_path / "rows.jsonl", [GOOD, GOOD, {"prompt": "Say two.", "completion": "Two!"}])
    code, out, err = run("inspect", path, "--number", 1, capsys=capsys)
    assert code == 0
    assert f"file     {path} · completion\n" in out and "rows     3 · 1 double of another\n" in out
    assert f"--- {path}:1:1: " in out and "Say one.<|end|><|assistant|>«One!<|end|>»\n" in out and "Two" not in out
    assert "template  the model's own" in err
    figures = json.loads(run("inspect", path, "--json", capsys=capsys)[1])
    assert (figures["rows"], figures["samples"], figures["doubles"], len(figures["shown"])) == (3, 3, 1, 3)
    assert 0 < figures["graded"] < figures["tokens"]
    assert figures["lengths"]["longest"] >= figures["lengths"]["median"] >= figures["graded_lengths"]["longest"]


def test_what_is_not_read_of_a_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A field may matter, and have another name than any format knows: it would be left out without a word."""
    path = jsonl(tmp_path / "rows.jsonl", [{**GOOD, "id": 7, "passage": "One is meant."}, {**GOOD, "system": "s", "kind": None}])
    assert "\nunread   id, passage\n" in run("inspect", path, capsys=capsys)[1]
    assert "unread" not in run("inspect", path, "--rows.map", "input=passage", "--rows.map", "context=id", "--number", 0, capsys=capsys)[1]
    assert json.loads(run("inspect", path, "--json", capsys=capsys)[1])["unread"] == ["id", "passage"]
    bad = jsonl(tmp_path / "bad.jsonl", [{"foo": 1}])
    code, out, _ = run("inspect", path, bad, "--rows.on_error", "skip", capsys=capsys)
    assert code == 0 and "\nunread   id, passage\n" in out, "all rows of the other file are skipped"


def test_a_row_of_several_samples_is_no_double_of_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Caught: two doubles of 1 row. The template writes earlier turns differently, so each answer is a sample."""
    template = tmp_path / "t.jinja"
    last = "{% if loop.last and m.role == 'assistant' %}={% endif %}"
    asks = "{% if add_generation_prompt %}={% endif %}"
    template.write_text("{% for m in messages %}" + last + "{{ m.content }}<|end|>{% endfor %}" + asks)
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    path = jsonl(tmp_path / "rows.jsonl", [{"messages": turns}, {"messages": turns[:2]}, {"messages": turns[:2]}])
    found = json.loads(run("inspect", path, "--chat_template", template, "--json", capsys=capsys)[1])
    assert (found["rows"], found["samples"], found["doubles"]) == (3, 5, 1)


def test_placeholders_are_counted_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`{{name}}` in a question or an answer; the spaces of `{{ name }}` are a template's, in rows about code. Nothing else is said."""
    braces = [{"prompt": text, "completion": text} for text in ("{{ name }}", "{name}", "{{1}}", "{{}}")]
    path = jsonl(
        tmp_path / "rows.jsonl", [GOOD, *braces, {"prompt": "{{who_1}}?", "completion": "I."}, {"prompt": "q", "completion": "{{a}}"}]
    )
    out = ["--out_dir", str(tmp_path / "out"), "--dry_run"]
    for words in (["data", "inspect", str(path)], ["finetune", "lora", "--data", str(path), *out]):
        assert main(words) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        assert said == [f"warning: rows with a placeholder, which would be learnt to the letter: 2, the first at {path}:6:1: {{{{who_1}}}}"]
    assert run("inspect", jsonl(path, [GOOD, *braces]), capsys=capsys)[2].count("placeholder") == 0
    err = run("inspect", shared_data("instruct/identity.json"), "--number", 0, capsys=capsys)[2]
    assert ": 85, the first at" in err and err.count("identity.json:2:3: {{name}}") == 1


def test_lengths_and_grading_follow_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [GOOD, {"prompt": "x " * 100, "completion": "y"}])
    cut = json.loads(run("inspect", path, "--max_seq_length", 40, "--json", capsys=capsys)[1])
    assert (cut["truncated"], cut["nothing_graded"], cut["samples"]) == (1, 1, 1)
    every = json.loads(run("inspect", path, "--mask_prompt", "false", "--json", capsys=capsys)[1])
    assert every["graded"] == every["tokens"]


def test_a_mistake_stops_inspect_and_points_to_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [GOOD, {"prompt": "q"}])
    code, out, err = run("inspect", path, capsys=capsys)
    assert (code, out) == (2, "") and f"{path}:2:1: completion row without 'completion'" in err


def test_validate_lists_every_row_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F14. Against: stopping at the first; a row counted twice."""
    bad: list[Any] = [{"prompt": "q"}, {"prompt": "q", "completion": " "}, [1]]
    path = jsonl(tmp_path / "rows.jsonl", [GOOD, *bad, GOOD])
    path.write_text(path.read_text() + '{"prompt": "q" 5}\n')
    other = jsonl(tmp_path / "more.jsonl", [GOOD])
    code, out, err = run("validate", path, other, capsys=capsys)
    places = [line.partition(": ")[0] for line in out.splitlines()[:4]]
    assert code == 1 and places == [f"{path}:{place}" for place in ("2:1", "3:1", "4:1", "6:16")]
    assert out.splitlines()[4:] == [f"{path} · completion · 6 rows, 4 refused", f"{other} · completion · 1 row, 0 refused"]
    assert "4 of 7 rows cannot be used" in err and "--rows.on_error skip" in err
    reports = json.loads(run("validate", path, "--json", capsys=capsys)[1])
    assert [(report["rows"], len(report["refused"])) for report in reports] == [(6, 4)]
    short = run("validate", path, "--show", 1, capsys=capsys)[1]
    assert "... and 3 more" in short and "6:16" not in short
    assert run("validate", other, capsys=capsys)[0] == 0


def test_an_array_with_a_mistake_is_read_up_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    path.write_text(f"[{json.dumps(GOOD)},\n{json.dumps(GOOD)} 7]")
    code, out, _ = run("validate", path, capsys=capsys)
    assert code == 1 and f"{path}:2:" in out and "expecting ',' or ']'" in out


def test_validate_tries_the_models_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A template that refuses a system prompt refuses the row; without a model only the rows are looked at."""
    model = tmp_path / "model"
    model.mkdir()
    base = shared_data("models/stories3m-llama")
    for file in base.iterdir():
        if file.is_file():
            shutil.copyfile(file, model / file.name)
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    (model / "chat_template.jinja").write_text(template + "{{ m.content }}</s>{% endfor %}")
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = jsonl(tmp_path / "rows.jsonl", [{"messages": said}, {"messages": said[1:]}])
    assert run("validate", path, capsys=capsys)[0] == 0
    code, out, _ = run("validate", path, "--checkpoint_dir", model, capsys=capsys)
    assert code == 1 and f"{path}:1:1: the chat template refused this conversation: no system here" in out and "2 rows, 1 refused" in out


@pytest.mark.parametrize("form", ["conversations", "texts", "preferences"])
def test_validate_names_each_row_whose_tokens_the_model_does_not_know(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """F14. Caught: the first of them ended the report; texts were not looked at; a preference was refused once for each of its answers."""
    base = make_base(tmp_path / "base", vocab_size=259)
    byte_tokenizer(base)
    vocabulary = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    vocabulary.add_tokens([tokenizers.AddedToken("foo", normalized=False)])
    vocabulary.save(str(base / "tokenizer.json"))
    rows: list[Any] = [{"prompt": said, "completion": "x"} for said in ("a", "a foo", "b", "foo")]
    if form == "texts":
        rows = [{"text": row["prompt"]} for row in rows]
    if form == "preferences":
        rows = [{"prompt": row["prompt"], "chosen": "x", "rejected": "y"} for row in rows]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    code, out, _ = run("validate", path, "--checkpoint_dir", base, capsys=capsys)
    assert code == 1 and out.splitlines()[-1].endswith("4 rows, 2 refused")
    assert [line.partition(": the token 'foo' has the id 259")[0] for line in out.splitlines()[:-1]] == [f"{path}:2:1", f"{path}:4:1"]


def test_rows_are_shown_and_tried_with_the_chosen_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template, path = tmp_path / "mine.jinja", jsonl(tmp_path / "rows.jsonl", [GOOD])
    template.write_text("{% for m in messages %}{{ '[' + m.role[0] + ']' }}{% if m.role != 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    template.write_text(template.read_text() + "{% if add_generation_prompt %}{{ '[a]' }}{% endif %}")
    code, out, err = run("inspect", path, "--chat_template", template, capsys=capsys)
    assert code == 0 and "[u][a]«One!<|end|>»\n" in out and f"template  {template}\n" in err
    template.write_text("{{ messages[0].content }}")
    code, out, _ = run("validate", path, "--chat_template", template, capsys=capsys)
    assert code == 1 and f"{path}:1:1: the chat template does not show the answer" in out


def test_preference_rows_are_validated_and_not_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "a"}]
    )
    code, out, _ = run("validate", path, capsys=capsys)
    assert code == 1 and "2:1: 'chosen' and 'rejected' are the same" in out
    assert f"{path} · preference (not learnt by fine-tuning) · 2 rows, 1 refused" in out
    code, _, err = run("inspect", path, capsys=capsys)
    assert code == 2 and "not learnt by fine-tuning" in err
    assert main(["finetune", "lora", "--data", str(path), "--out_dir", str(tmp_path / "out")]) == 2
    assert "not learnt by fine-tuning" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("instruct/dpo_en_demo.json", "preference (not learnt by fine-tuning) · 300 rows, 0 refused"),
        ("instruct/kto_en_demo.json", "verdict (not learnt by fine-tuning) · 300 rows, 0 refused"),
        ("instruct/alpaca_data-0-3252-zh.json", "alpaca · 3,247 rows, 4 refused"),
        ("instruct/fastchat_dummy_conversation.json", "sharegpt · "),
        ("math/gsm8k_train.jsonl", "completion · 7,473 rows, 0 refused"),
        ("text/c4_demo.jsonl", "text · 300 rows, 0 refused"),
    ],
)
def test_published_files_are_validated(file: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in run("validate", shared_data(file), capsys=capsys)[1]
