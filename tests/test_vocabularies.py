"""litlora/tokenizer/vocabularies.py: tokenizer.model, vocab.json with merges.txt and ranks give the ids of a tokenizer.json."""

import base64
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import make_base
from conftest import shared_data
from test_tokenizer import LLAMACPP, TEXTS, real

from litlora.__main__ import main
from litlora.checkpoint.files import open_prompts, open_tokenizer
from litlora.checkpoint.resolve import resolve
from litlora.errors import UserError
from litlora.prompts import Prompts
from litlora.tokenizer import Tokenizer, vocabularies

WITHOUT = [  # vocabularies that are published in both forms
    "tinyllama-chat",
    "chinese-llama-2",
    "gpt2",
    pytest.param("qwen2.5", marks=pytest.mark.slow),
    pytest.param("llama-3", marks=pytest.mark.slow),
]


@cache
def bare(name: str, folder: Path) -> Tokenizer:
    """The tokenizer of a published directory whose tokenizer.json was left out."""
    directory = folder / name
    directory.mkdir()
    for file in shared_data(f"tokenizers/{name}").iterdir():
        if file.name != "tokenizer.json":
            (directory / file.name).symlink_to(file)
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bare")


@pytest.mark.parametrize("name", WITHOUT)
def test_a_directory_without_tokenizer_json_gives_the_same_ids(name: str, folder: Path) -> None:
    """M08, D02: ids, ends, BOS, control tokens, size and text. Caught: merges by id in place of score; BOS of ranks forgotten."""
    ours, theirs = bare(name, folder), real(name)
    case = next(case for case, tokenizer in LLAMACPP if tokenizer == name) if name != "chinese-llama-2" else "llama-spm"
    texts = [
        *TEXTS,
        *(shared_data("tokenizer_cases/llamacpp") / f"{case}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n"),
    ]
    texts += shared_data("text/tang_poems_zh.txt").read_text(encoding="utf-8")[:3000].split("\n\n")
    texts += [f"a{token} b {token}{token}c" for token in list(theirs.control)[:20]]
    for special in (False, True):
        assert ours.encode_batch(texts, special=special) == theirs.encode_batch(texts, special=special)
    for what in ("bos_id", "eos_id", "eos_ids", "adds_bos", "size", "control", "special_ids", "special_tokens"):
        assert getattr(ours, what) == getattr(theirs, what), what
    ids = [i for text in texts for i in theirs.encode(text, special=True)]
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.hash != theirs.hash  # other files: a run is not taken up with them


def test_mistrals_model_gives_sentencepieces_ids(folder: Path) -> None:
    """771 control tokens in the model itself. Its tokenizer.json adds no space before one that is there; SentencePiece does."""
    ours, theirs = bare("mistral-v0.3", folder), real("mistral-v0.3")
    assert (ours.size, ours.eos_ids, set(ours.control)) == (theirs.size, theirs.eos_ids, set(theirs.control))
    for text in ["Hello  world", "[INST] hi[/INST] yo</s>[INST] and", "你好 🤗", "a</s> b", "<s>a"]:
        assert ours.encode(text, special=True) == theirs.encode(text, special=True), text
    assert ours.decode(ours.encode("  two", special=False)) == "  two"
    assert ours.encode(" ", special=False) == [1027]


LLAMAS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "settings", [{}, {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}]
)
def test_ids_equal_sentencepieces(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """A model trained here, with SentencePiece's own defaults (NFKC, spaces joined) and with Llama's. The package is the oracle."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = shared_data("text/tinyshakespeare.txt")
    words = {"model_prefix": str(tmp_path / "tokenizer"), "vocab_size": 600, "model_type": kind, "user_defined_symbols": ["qqq"]}
    sentencepiece.SentencePieceTrainer.train(input=str(text), input_sentence_size=3000, minloglevel=2, **words, **settings)
    if not settings:
        with pytest.raises(UserError, match="user-defined pieces"):
            Tokenizer(tmp_path)
        words["user_defined_symbols"] = []
        sentencepiece.SentencePieceTrainer.train(input=str(text), input_sentence_size=3000, minloglevel=2, **words, **settings)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = Tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.size, ours.adds_bos) == (theirs.bos_id(), theirs.eos_id(), theirs.vocab_size(), True)
    lines = text.read_text()[:40_000].split("\n")
    for line in [*(line for line in lines if line), "Hello  there ,  my lord", "ﬁve ½ lords", "O, qqq he said qqq", "ab é"]:
        assert ours.encode(line, special=False) == theirs.encode(line), repr(line)


def test_a_base_with_tokenizer_model_alone_is_trained_and_served(tmp_path: Path) -> None:
    """A step carries the vocabulary and the template it was trained with. Caught: the base's template taken for the step's."""
    base = tmp_path / "base"
    make_base(base, vocab_size=32_000, max_position_embeddings=64, num_hidden_layers=1)
    (base / "tokenizer.json").unlink()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(shared_data(f"tokenizers/tinyllama-chat/{name}"), base / name)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 4)
    words = f"--checkpoint_dir {base} --data {tmp_path / 'rows.jsonl'} --out_dir {tmp_path / 'out'} --train.max_steps 1 --eval.fraction 0"
    assert main(["finetune", "lora", *words.split()]) == 0
    (base / "chat_template.jinja").unlink()
    step = resolve(tmp_path / "out" / "step-1")
    assert step.tokenizer_dir() == step.path and "{{ eos_token }}" in open_prompts(step).template
    assert open_tokenizer(step).encode("Hello  world", special=False) == real("tinyllama-chat").encode("Hello  world", special=False)
    assert main(["generate", str(step.path), "--prompt", "q", "--max_new_tokens", "2"]) == 0


def test_added_tokens_of_an_older_directory_have_their_ids(tmp_path: Path) -> None:
    """added_tokens.json, without added_tokens_decoder."""
    source = shared_data("tokenizers/qwen2.5")
    config = json.loads((source / "tokenizer_config.json").read_text())
    listed = {token["content"]: int(number) for number, token in config.pop("added_tokens_decoder").items()}
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(source / name, tmp_path / name)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: config[key] for key in ("eos_token", "tokenizer_class")}))
    (tmp_path / "added_tokens.json").write_text(json.dumps(listed))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("<|im_start|>user\nhi 12<|im_end|>", special=True)
    assert ids == [listed["<|im_start|>"], 872, 198, 6023, 220, 16, 17, listed["<|im_end|>"]]
    (tmp_path / "added_tokens.json").write_text(json.dumps({**listed, "<|more|>": 200_000}))
    with pytest.raises(UserError, match=r"\|more\|>. has id 200000"):
        Tokenizer(tmp_path)


def message(*fields: tuple[int, bytes | int]) -> list[bytes]:
    """Fields of a protocol buffer message, one by one."""
    return [bytes([n << 3, v]) if isinstance(v, int) else bytes([n << 3 | 2, len(v)]) + v for n, v in fields]


RANKS = b"".join(base64.b64encode(bytes([n])) + b" %d\n" % n for n in range(256))


def test_ranks_begin_a_text_with_the_token_that_the_config_calls_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D02: the id that added_tokens_decoder gives it, behind the ranks; none where it is not listed there. (The published Llama 3 is
    among the slow ones above.) Caught: the first id behind the ranks; no BOS; its id one off."""
    monkeypatch.setattr(vocabularies, "LLAMA_3_RANKS", 256)
    (tmp_path / "tokenizer.model").write_bytes(RANKS)
    listed = {str(256 + n): {"content": text, "special": True} for n, text in enumerate(["<|end|>", "<|begin|>"])}
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "added_tokens_decoder": listed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.eos_ids, tokenizer.size) == (257, True, {256}, 258)
    assert Prompts(tokenizer).text_ids("é<|end|>") == [257, 0xC3, 0xA9, 256]
    config["added_tokens_decoder"] = {"256": listed["256"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="bos_token is"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer.model": b""}, "neither a SentencePiece model nor a list of ranks"),
        ({"tokenizer.model": b"\x0a\xff\x01abc"}, "neither a SentencePiece model"),
        ({"tokenizer.model": b"\x0a\x05\x0a\x03\xff\xfea"}, "neither a SentencePiece model"),
        ({"tokenizer.model": b"\xff" * 40}, "neither a SentencePiece model"),
        ({"tokenizer.model": b"\x0a\x03\x0a\x01a"}, "what it was trained as is missing"),
        ({"tokenizer.model": RANKS}, "256 ranks; how text is split"),
        ({"tokenizer.model": RANKS + b"\xff\xff 3\n"}, "not a token and its rank"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"#version: 0.2\n"}, "how a tokenizer without a class splits words"),
        (
            {"vocab.json": b'{"a": 0}', "merges.txt": b"a b\n", "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}'},
            "do not fit together",
        ),
        ({"vocab.json": b'{"a": 0}'}, "no tokenizer"),
    ],
)
def test_what_is_damaged_or_does_not_say_enough_is_refused(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    """Never other ids than the model was trained with. Caught: an unknown class taken for GPT-2."""
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        Tokenizer(tmp_path)


def test_a_truncated_model_is_refused_or_whole(tmp_path: Path) -> None:
    """Cut anywhere, a model file is no vocabulary with other pieces. Caught: no look at whether the last field is there to its end."""
    raw = shared_data("tokenizers/tinyllama-chat/tokenizer.model").read_bytes()
    for size in (1, 1000, 123_456, len(raw) - 1):
        (tmp_path / "tokenizer.model").write_bytes(raw[:size])
        with pytest.raises(UserError):
            Tokenizer(tmp_path)
    fields = message((2, b"\x18\x02"), *((1, message((1, text))[0]) for text in (b"x", b"yz", b"first", b"last")))  # BPE, four pieces
    (tmp_path / "tokenizer.model").write_bytes(b"".join(fields))
    assert Tokenizer(tmp_path).size == 4
    for size in range(1, len(fields[-1])):
        (tmp_path / "tokenizer.model").write_bytes(b"".join(fields[:-1]) + fields[-1][:size])
        with pytest.raises(UserError, match="neither a SentencePiece model"):
            Tokenizer(tmp_path)
