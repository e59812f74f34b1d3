"""What is trained is what is served: prompts and end ids of a base, of a step that finetune wrote, and of transformers on that step."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import make_base
from conftest import shared_data
from talkers import make_talker

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.files import open_prompts
from litlora.checkpoint.resolve import resolve
from litlora.commands.generate import prompts_for
from litlora.tokenizer import Tokenizer

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True, "max_position_embeddings": 256}
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
CONVERSATIONS = [  # no two spaces before a digit: transformers 5 reads smollm as GPT-2, against its tokenizer.json
    [{"role": "user", "content": "Hello, world!"}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "héllo 1234\n"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and?"},
    ],
]


def make_served(place: Path, name: str, method: str) -> tuple[Path, Path]:
    """(base, step): a tiny model with a published tokenizer and its end ids, and what one training step on it committed."""
    published = shared_data(f"tokenizers/{name}")
    path = published / names.CONFIG
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    changes: dict[str, Any] = {key: values[key] for key in ("eos_token_id", "bos_token_id") if key in values}
    changes["model_type"] = values["model_type"] if values.get("model_type") in SUPPORTED else "llama"
    base = make_base(place / "base", vocab_size=Tokenizer(published).size, **SMALL, **changes)
    for file in (*names.TOKENIZER_FILES, names.GENERATION_CONFIG):
        if (published / file).exists():
            shutil.copyfile(published / file, base / file)
    return base, train(base, place, method)


def train(base: Path, place: Path, method: str = "lora", more: str = "") -> Path:
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Say {n}.", "output": f"{n}!"}) + "\n" for n in range(8)))
    words = f"--checkpoint_dir {base} --data {rows} --out_dir {place / 'out'} --train.max_steps 1 --train.global_batch_size 1 --threads 1"
    assert main(["finetune", method, *words.split(), "--eval.max_samples", "1", *more.split()]) == 0
    return place / "out" / "step-1"


PUBLISHED = ["smollm", "gpt2", "llama-3", "tinyllama-chat", "qwen2.5", "mistral-v0.3"]


@pytest.mark.parametrize(("name", "method"), [*((name, "lora") for name in PUBLISHED), ("llama-3", "full"), ("smollm", "adapter")])
def test_a_step_is_served_as_it_was_trained(name: str, method: str, tmp_path: Path) -> None:
    """D02, D04. Caught: the template stored with `bos_token` and `eos_token` in it; a step's tokenizer without its base's config."""
    transformers = pytest.importorskip("transformers")
    base, step = make_served(tmp_path, name, method)
    checkpoint = resolve(step)
    trained, served = prompts_for(resolve(base), []), prompts_for(checkpoint, [(checkpoint, 1.0)])
    theirs = transformers.AutoTokenizer.from_pretrained(step)
    assert theirs.chat_template == served.template == trained.template
    for messages in CONVERSATIONS:
        ids = trained.prompt_ids(messages)
        assert served.prompt_ids(messages) == ids
        assert theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False) == ids
    assert served.stop_ids == trained.stop_ids
    assert served.text_ids("Once upon") == trained.text_ids("Once upon")
    assert served.tokenizer.hash == trained.tokenizer.hash == checkpoint.manifest.tokenizer  # type: ignore[union-attr]
    if name == "llama-3":
        assert served.stop_ids == {128001, 128008, 128009}


def test_the_chosen_template_is_trained_with_and_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D04: `--chat_template` of finetune is the step's own from then on, for every command; another one is said."""
    base, mine = make_talker(tmp_path / "base"), tmp_path / "mine.jinja"
    template = "{% for m in messages %}{{ m.role + '>' + m.content + '<|end|>' }}{% endfor %}"
    mine.write_text(template + "{{ 'assistant>' if add_generation_prompt }}")
    step = train(base, tmp_path, more=f"--chat_template {mine}")
    mine.unlink()
    assert f"template  {mine}" in capsys.readouterr().err
    checkpoint = resolve(step)
    served = prompts_for(checkpoint, [(checkpoint, 1.0)])
    asked = [{"role": "user", "content": "hi"}]
    assert served.tokenizer.decode(served.prompt_ids(asked), skip_special=False) == "user>hi<|end|>assistant>"
    assert served.template_hash == checkpoint.manifest.chat_template != open_prompts(resolve(base)).template_hash  # type: ignore[union-attr]
    short = "--max_new_tokens 1 --threads 1"
    capsys.readouterr()
    for command in ("chat", "generate --prompt hi --json", f"evaluate --data {tmp_path / 'rows.jsonl'}"):
        name, *words = command.split()
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/tokens\n"))
        assert main([name, str(step), *words, "--chat_template", "alpaca", *short.split()]) == 0
        said = capsys.readouterr()
        assert f"warning: {step} was trained with another chat template than alpaca (built in)" in said.err
        assert ("### Instruction:\nhi" in said.out) == (name == "chat")
    assert main(["generate", str(step), "--raw", "--chat_template", "alpaca", "--prompt", "hi"]) == 2


def test_end_ids_that_only_the_bases_config_names_end_a_steps_answer_too(tmp_path: Path) -> None:
    """D03: no eos_token in the tokenizer's files; config.json has it. The built-in template writes it out."""
    base = make_talker(tmp_path / "base", template=None)
    values = json.loads((base / names.TOKENIZER_CONFIG).read_text())
    (base / names.TOKENIZER_CONFIG).write_text(json.dumps({key: value for key, value in values.items() if key != "eos_token"}))
    config = json.loads((base / names.CONFIG).read_text())
    (base / names.CONFIG).write_text(json.dumps({**config, "eos_token_id": 257}))
    trained, served = open_prompts(resolve(base)), open_prompts(resolve(train(base, tmp_path)))
    assert served.stop_ids == trained.stop_ids == {257}
    assert served.tokenizer.eos_id == trained.tokenizer.eos_id == 257
    sample = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert served.sample_ids(sample) == trained.sample_ids(sample)
    assert served.sample_ids(sample)[0][-1] == 257
