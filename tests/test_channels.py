"""Answers in channels, as gpt-oss gives them: what is printed, what a conversation goes on with, and which templates have them."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from talkers import make_talker
from test_prompts import CHANNELS, MODELS, models  # noqa: F401, a fixture
from test_tokenizer import byte_level

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.commands.evaluate import is_exact
from litlora.generation import Answer, Conversation
from litlora.options import SamplingOptions
from litlora.prompts import Prompts
from litlora.prompts.channels import channels_of, text_of
from litlora.tokenizer import Tokenizer

CONTROL = ("<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>", "<|constrain|>")
THOUGHT = "<|channel|>analysis<|message|>Six sevens, 是.<|end|>"
SAID = "<|channel|>final<|message|>It is 42 🙂.<|return|>"
CALL = '<|channel|>commentary to=functions.sum <|constrain|>json<|message|>{"a": 1}<|call|>'


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return Prompts(Tokenizer(byte_level(tmp_path_factory.mktemp("channels") / "t", *CONTROL)), CHANNELS)


def answer_of(prompts: Prompts, said: str, **sampling: Any) -> tuple[Answer, list[str]]:
    """The Answer that these ids make, and the pieces in which it came."""
    stop_ids = prompts.stop_ids | {prompts.tokenizer.id_of("<|call|>") or 0}
    answer = Answer([1], SamplingOptions(**sampling), prompts.tokenizer, stop_ids, 4096, channels=channels_of(prompts))
    answer.tokens = prompts.tokenizer.encode(said, special=True)
    return answer, list(answer)


def test_thoughts_stand_between_think_marks_and_history_has_the_final_text(prompts: Prompts) -> None:
    """Caught: `analysisSix sevens, 是.assistantfinalIt is 42 🙂.`, printed and gone on with."""
    answer, pieces = answer_of(prompts, f"{THOUGHT}<|start|>assistant{SAID}")
    assert answer.text == "".join(pieces) == "<think>\nSix sevens, 是.\n</think>\n\nIt is 42 🙂."
    assert answer.message() == {"role": "assistant", "content": "It is 42 🙂.", "thinking": "Six sevens, 是."}
    history = [{"role": "user", "content": "6 times 7?"}, answer.message(), {"role": "user", "content": "And 8?"}]
    shown = prompts.tokenizer.decode(prompts.prompt_ids(history), skip_special=False)
    assert "<|start|>assistant<|channel|>final<|message|>It is 42 🙂.<|end|>" in shown and "analysis" not in shown


def test_an_answer_without_thoughts_is_its_final_text(prompts: Prompts) -> None:
    """Trained on rows without reasoning; or, with another template before, without any header."""
    assert answer_of(prompts, SAID)[0].message() == {"role": "assistant", "content": "It is 42 🙂."}
    assert answer_of(prompts, "It is 42 🙂.<|return|>")[0].text == "It is 42 🙂."
    assert answer_of(prompts, f"{THOUGHT}It is 42 🙂.<|return|>")[0].message()["content"] == "It is 42 🙂."


def test_what_is_no_thought_and_no_answer_stays_as_it_was_written(prompts: Prompts) -> None:
    """A call of a tool, also with its name before the channel; thoughts in two parts; a word said before the call."""
    two = f"{THOUGHT}<|start|>assistant{THOUGHT}<|start|>assistant"
    thought = "<think>\nSix sevens, 是.\n</think>\n\n"
    call = CALL.removesuffix("<|call|>")
    assert answer_of(prompts, two + CALL)[0].text == thought + thought + call
    told = answer_of(prompts, THOUGHT + "<|start|>assistant" + CALL)[0].message()
    assert told == {"role": "assistant", "content": call, "thinking": "Six sevens, 是."}
    before = "<|start|>assistant to=functions.sum<|channel|>commentary json<|message|>{}"
    assert answer_of(prompts, f"{THOUGHT}{before}<|call|>")[0].message()["content"] == before


@pytest.mark.parametrize("most", range(1, 90))
def test_an_answer_that_is_cut_off_loses_no_word(most: int, prompts: Prompts) -> None:
    """At every token: what was said so far, and nothing of it twice."""
    whole = answer_of(prompts, f"{THOUGHT}<|start|>assistant{SAID}")[0]
    answer, pieces = answer_of(prompts, f"{THOUGHT}<|start|>assistant{SAID}", max_new_tokens=most)
    assert answer.text == "".join(pieces) and len(answer.ids) == min(most, len(whole.ids))
    message = answer.message()
    for name in ("content", "thinking"):
        assert whole.message()[name].startswith(message.get(name, "").rstrip("\ufffd"))


def test_a_stop_text_cuts_what_is_kept_as_well(prompts: Prompts) -> None:
    answer, _ = answer_of(prompts, f"{THOUGHT}<|start|>assistant{SAID}", stop=[" 42"])
    assert answer.finish_reason == "stop" and answer.text.endswith("</think>\n\nIt is")
    assert answer.message() == {"role": "assistant", "content": "It is", "thinking": "Six sevens, 是."}
    assert answer_of(prompts, f"{THOUGHT}{SAID}", stop=["sevens"])[0].message() == {"role": "assistant", "content": "", "thinking": "Six "}


def test_exact_match_compares_with_the_row_as_an_answer_reads(prompts: Prompts) -> None:
    answer, _ = answer_of(prompts, SAID)
    row, channels = prompts.tokenizer.encode(SAID, special=True), channels_of(prompts)
    assert is_exact(answer, text_of(row, prompts.tokenizer, prompts.stop_ids, channels))
    plain = prompts.tokenizer.encode("plain é", special=True)
    assert text_of(plain, prompts.tokenizer, prompts.stop_ids, None) == "plain é"


def test_templates_that_write_nothing_before_an_answer_have_no_channels(models: Callable[[str], Any], prompts: Prompts) -> None:  # noqa: F811
    """By the template alone, whatever the model is called: also a name for it, another one on the same tokenizer."""
    for name in MODELS:
        assert channels_of(models(name)[1]) is None, name
    assert channels_of(Prompts.chosen(prompts.tokenizer, "alpaca")) is None
    unthinking = CHANNELS.replace("m.thinking", "m.other")
    found = channels_of(Prompts(prompts.tokenizer, unthinking))
    assert found is not None and found.thought == () and found.answer == channels_of(prompts).answer  # type: ignore[union-attr]


def test_an_empty_thought_before_an_answer_is_no_header(tmp_path: Path) -> None:
    """As Qwen 3 writes it, where the marks are special tokens. Caught: nothing shown until a thought ended, and the thought kept."""
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    tokenizer = Tokenizer(byte_level(tmp_path / "t", "<|start|>", "<|end|>", "<think>", "</think>"))
    assert channels_of(Prompts(tokenizer, template)) is None


@pytest.fixture
def speaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose tokenizer and template have channels, and that always says the same."""
    base = make_talker(tmp_path / "base", context=2048)
    directory = byte_level(tmp_path / "t", *CONTROL)
    config = json.loads((base / names.CONFIG).read_text())
    (base / names.TOKENIZER).write_bytes((directory / names.TOKENIZER).read_bytes())
    tokens = {"eos_token": "<|return|>", "chat_template": CHANNELS}
    (base / names.TOKENIZER_CONFIG).write_text(json.dumps(tokens))
    tokenizer = Tokenizer(base)
    assert tokenizer.size <= config["vocab_size"]

    def tokens_of(self: Conversation, answer: Answer, asked: int) -> Iterator[int]:
        yield from tokenizer.encode(f"{THOUGHT}<|start|>assistant{SAID}", special=True)

    monkeypatch.setattr(Conversation, "tokens", tokens_of)
    return base


def test_generate_and_chat_print_and_keep_it_so(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The saved row can be trained on: the thought stands where the template takes it from."""
    shown = "<think>\nSix sevens, 是.\n</think>\n\nIt is 42 🙂.\n"
    assert main(["generate", str(speaker), "--prompt", "6 times 7?"]) == 0
    assert capsys.readouterr().out == shown
    assert main(["generate", str(speaker), "--prompt", "6 times 7?", "--raw"]) == 0
    assert "<think>" not in capsys.readouterr().out
    lines = f"6 times 7?\nAnd 8?\n/tokens\n/save {tmp_path / 'row.jsonl'}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
    assert main(["chat", str(speaker)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(shown * 2) and "<|channel|>final<|message|>It is 42 🙂.<|end|>" in out and "analysis" not in out
    row = json.loads((tmp_path / "row.jsonl").read_text())
    assert row["messages"][1] == {"role": "assistant", "content": "It is 42 🙂.", "thinking": "Six sevens, 是."}
    assert main(["data", "validate", str(tmp_path / "row.jsonl"), "--checkpoint_dir", str(speaker)]) == 0
