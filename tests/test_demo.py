"""The embedded default: its rows, its base, and what is written about them."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.data import demo, vocabulary
from litlora.families import config_from_hf, expected_tensors
from litlora.tokenizer import Tokenizer

KEYS = ["name", "city", "item", "quantity"]


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]+|[0-9]+", text))


@pytest.mark.parametrize(("path", "name", "count"), [(names.DEMO_TRAIN, "train", 1_600), (names.DEMO_HELDOUT, "heldout", 200)])
def test_the_generator_writes_the_shipped_rows_byte_for_byte(path: Path, name: str, count: int) -> None:
    """Mutation: another SEED."""
    assert path.read_bytes() == demo.demo_file(name)
    assert len(rows_of(path)) == count


def test_every_row_is_an_order_and_its_json() -> None:
    for row in rows_of(names.DEMO_TRAIN) + rows_of(names.DEMO_HELDOUT):
        answer = json.loads(row["output"])
        assert list(answer) == KEYS
        assert all(str(value) in row["instruction"] for value in answer.values()), row


def test_no_value_of_a_held_out_row_occurs_in_a_training_row() -> None:
    """DESIGN section 7. Mutation: a held-out row copied into train.jsonl."""
    training = [(row["instruction"], json.loads(row["output"])) for row in rows_of(names.DEMO_TRAIN)]
    seen = set().union(*(words(text) | words(json.dumps(answer)) for text, answer in training))
    for row in rows_of(names.DEMO_HELDOUT):
        answer = json.loads(row["output"])
        new = words(f"{answer['name']} {answer['city']} {answer['quantity']}") | {answer["item"].split()[-1]}
        assert not new & seen, row


def test_the_base_never_read_a_name_or_a_place_of_the_demo_rows() -> None:
    """Copying is what is tested: nothing can be known by heart from pretraining either."""
    read = set().union(
        *(words(json.dumps(row)) for row in demo.demo_rows("text")), *(words(json.dumps(row)) for row in demo.demo_rows("chats"))
    )
    for row in rows_of(names.DEMO_HELDOUT):
        answer = json.loads(row["output"])
        assert not words(f"{answer['name']} {answer['city']}") & read, row


def test_no_answer_that_the_base_learnt_is_json() -> None:
    """Before fine-tuning the score must be nothing."""
    for row in demo.demo_rows("chats"):
        assert not any("{" in message["content"] for message in row["messages"])


def test_base_tokenizer_and_rows_stay_below_6_megabytes() -> None:
    assert sum(path.stat().st_size for path in names.ASSETS.rglob("*") if path.is_file()) < 6_000_000


def test_the_shipped_base_is_a_llama_of_at_most_two_and_a_half_million_parameters() -> None:
    config = config_from_hf(json.loads((names.DEMO_BASE / names.CONFIG).read_text(encoding="utf-8")), names.DEMO_BASE)
    assert config.model_type == "llama"
    with safe_open(names.DEMO_BASE / names.WEIGHTS, "numpy") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        dtypes = {file.get_slice(name).get_dtype() for name in found}
    assert found == expected_tensors(config)
    assert dtypes == {"BF16"}
    count = 0
    for shape in found.values():
        count += shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert count <= 2_500_000


def test_the_shipped_base_loads_and_answers() -> None:
    import torch

    from litlora.model import GPT

    model, tokenizer = GPT.from_pretrained(names.DEMO_BASE, dtype=torch.float32), Tokenizer(names.DEMO_BASE)
    ids = tokenizer.encode("<|user|>Bertan lives in Velborg. Where does Bertan live?<|end|><|assistant|>", special=True)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert "Velborg<|end|>" in tokenizer.decode(ids, skip_special=False)


def test_the_tokenizer_reads_every_text_back() -> None:
    tokenizer = Tokenizer(names.DEMO_BASE)
    for text in ("Anna wants 12 lamps.", " two  spaces\n", "Zoë ✓ 字 \x00", '{"a": "b"}'):
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
    assert tokenizer.eos_ids
    assert [tokenizer.id_of(token) for token in vocabulary.SPECIAL_TOKENS] == [0, 1, 2, 3]


def test_the_provenance_names_every_file_by_its_hash() -> None:
    """Mutation: one digit of a hash."""
    written = (names.DEMO_BASE / "PROVENANCE.md").read_text(encoding="utf-8")
    files = [path for path in names.ASSETS.rglob("*") if path.is_file() and path.name != "PROVENANCE.md"]
    assert len(files) >= 7
    for path in files:
        line = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(names.ASSETS).as_posix()}"
        assert line in written, path


def test_a_vocabulary_knows_every_byte_and_splits_digits() -> None:
    tokenizer = vocabulary.train_tokenizer(["ab ab ab 1234 1234 1234"] * 9, 300)
    ids = tokenizer.encode("1234").ids
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "1234"
    for text in ("\x00\xff", "字"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    again = vocabulary.train_tokenizer(["ab ab ab 1234 1234 1234"] * 9, 300)
    assert tokenizer.to_str() == again.to_str()


def test_the_demo_base_is_named_by_its_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`demo` can be typed, and where it is installed is long. Caught: `str(self.path)` in `Checkpoint.typed`."""
    run = tmp_path / "run"
    assert main(["finetune", "lora", "--train.max_steps", "1", "--eval.fraction", "0", "--out_dir", str(run)]) == 0
    capsys.readouterr()
    for words in (["merge_lora", str(run / "step-1")], ["inspect", str(run / "step-1")], ["expand", "--out_dir", str(tmp_path / "deep")]):
        assert main(words) == 0
        said = "".join(capsys.readouterr())
        assert re.search(r"^base +demo\b", said, re.MULTILINE), said
