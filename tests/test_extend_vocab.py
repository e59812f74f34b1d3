"""A base with a larger vocabulary: what was there stays, what is new can be reached, and others read it as we do."""

import json
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import checkpoint_samples as samples
import numpy as np
import pytest
import tokenizers
import torch
from conftest import ROOT, shared_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from talkers import byte_tokenizer, make_step

from litlora import parsing, vocabulary
from litlora.checkpoint import names
from litlora.checkpoint.fingerprint import fingerprint
from litlora.checkpoint.resolve import resolve
from litlora.commands.extend_vocab import ExtendVocab, extend_vocab
from litlora.data.vocabulary import train_tokenizer
from litlora.errors import UserError
from litlora.safetensors_file import SafetensorsFile, from_float32, to_float32
from litlora.tokenizer import Tokenizer
from litlora.vocabulary import Vocabulary
from litlora.vocabulary.tokens import BYTES

POEMS = ROOT / "tutorials" / "tang_poems.jsonl"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
REAL = ["tinyllama-chat", "smollm", "gpt2", "phi-3"]  # as published: their files, their classes in transformers


def poems() -> list[str]:
    return [json.loads(line)["text"] for line in POEMS.read_text(encoding="utf-8").splitlines()]


def llama_tokenizer(directory: Path) -> None:
    """A small tokenizer as Llama 2's: byte fallback, no pre-tokenizer, U+2581 for a space."""
    letters = [*"\u2581abcdefghijklmnopqrstuvwxyz,.'月<>/sé"]
    merges = [["\u2581", "t"], ["h", "e"], ["\u2581t", "he"], ["a", "n"], ["an", "d"], ["i", "n"], ["in", "g"]]
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *BYTES, *letters, *(a + b for a, b in merges)])
    added = [{"id": i, "content": c, **dict.fromkeys(FLAGS, False), "special": True} for i, c in enumerate(["<unk>", "<s>", "</s>"])]
    steps = [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    back = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "merges": merges}
    shape = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*back, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {**model, "vocab": {token: number for number, token in enumerate(tokens)}},
    }
    (directory / names.TOKENIZER).write_text(json.dumps(shape))
    (directory / names.TOKENIZER_CONFIG).write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}))


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def make_base(path: Path, kind: str = "bytes", *, spare: int = 0, dtype: str = "F32", shards: int = 1, **changes: Any) -> Path:
    """A base with random weights and the tokenizer `kind`: bytes, llama, or the name of a real one. `spare` rows have no token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f"{path.name}-tokenizer"
    scratch.mkdir()
    if kind == "llama":
        llama_tokenizer(scratch)
    elif kind == "bytes":
        byte_tokenizer(scratch)
    else:
        for file in shared_data(f"tokenizers/{kind}").iterdir():
            if file.name in names.TOKENIZER_FILES:
                shutil.copyfile(file, scratch / file.name)
    changes = {"vocab_size": Vocabulary(scratch).size + spare, **changes}
    random = samples.base_tensors(**changes)
    tensors = {name: (dtype, shape, from_float32(np.asarray(raw), dtype)) for name, (_, shape, raw) in random.items()}
    samples.make_base(path, shards=shards, tensors=tensors, **changes)
    for file in scratch.iterdir():
        shutil.copyfile(file, path / file.name)
    return path


def run(*words: str | Path) -> None:
    extend_vocab(parsing.parse(ExtendVocab, [str(word) for word in words], command="extend_vocab"))


def extended(base: Path, size: int, data: Path = POEMS) -> Path:
    """`base`, extended to `size` tokens (if the text has so many)."""
    out = base.with_name(f"{base.name}-{size}")
    run(base, "--data", data, "--vocab_size", str(size), "--out_dir", out)
    return out


def tensors_of(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with SafetensorsFile(path) as file:
            found |= {name: (info.dtype, info.shape, bytes(file.bytes(name))) for name, info in file.tensors.items()}
    return found


def read(directory: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((directory / name).read_text(encoding="utf-8")))


def plain(directory: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(directory / names.TOKENIZER))


# ---- the tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "llama"])
def test_old_tokens_keep_their_ids_and_new_ones_follow(tmp_path: Path, kind: str) -> None:
    """Also of added tokens that are no tokens of the model: the package would number those anew, after the new ones."""
    base = make_base(tmp_path / "base", kind)
    size = Tokenizer(base).size
    out = extended(base, size + 60)
    before, after = plain(base).get_vocab(), plain(out).get_vocab()
    assert {token: after[token] for token in before} == before
    assert sorted(set(after.values()) - set(before.values())) == list(range(size, size + 60))
    assert [(t.content, i, t.special) for i, t in plain(out).get_added_tokens_decoder().items()] == [
        (t.content, i, t.special) for i, t in plain(base).get_added_tokens_decoder().items()
    ]
    assert Tokenizer(out).size == size + 60
    assert Tokenizer(out).eos_ids == Tokenizer(base).eos_ids


def test_a_token_that_only_tokenizer_config_lists_keeps_its_id(tmp_path: Path) -> None:
    """Qwen 3's way: tokenizer.json is Qwen 2.5's, and the later tokens are in tokenizer_config.json."""
    base = make_base(tmp_path / "base", spare=5)
    config = read(base, names.TOKENIZER_CONFIG)
    (base / names.TOKENIZER_CONFIG).write_text(json.dumps({**config, "added_tokens_decoder": {"259": {"content": "<think>"}}}))
    out = extended(base, 300)
    assert plain(out).token_to_id("<think>") == 259
    assert Tokenizer(out).encode("a<think>b", special=True) == Tokenizer(base).encode("a<think>b", special=True) == [97, 259, 98]
    assert min(plain(out).get_vocab()[token] for token in Vocabulary(out).ids if token not in Vocabulary(base).ids) == 260


@pytest.mark.parametrize("kind", ["bytes", "llama"])
def test_the_merges_lead_to_every_new_token(tmp_path: Path, kind: str) -> None:
    """A row for a token that no text is ever cut into would be a row for nothing."""
    base = make_base(tmp_path / "base", kind)
    out = extended(base, 10**6)
    model, vocab = plain(out).model, plain(out).get_vocab()
    size = read(out, names.EXTEND_REPORT)["tokens"]["before"]
    new = [token for token, number in vocab.items() if number >= size]
    assert len(new) > 70
    assert all([piece.value for piece in model.tokenize(token)] == [token] for token in new)
    used = {number for text in poems() for number in Tokenizer(out).encode(text, special=False)}
    assert len(used & {vocab[token] for token in new}) > 0.6 * len(new), "learnt on this text, most are seen in it"
    merges = read(out, names.TOKENIZER)["model"]["merges"]
    own = read(base, names.TOKENIZER)["model"]["merges"]
    assert merges[: len(own)] == own


def test_tokens_learnt_on_a_language_save_tokens_on_text_that_was_not_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures in the report are what anybody would count."""
    base = make_base(tmp_path / "base", "llama")
    data = tmp_path / "poems.txt"
    data.write_text("".join(poems()), encoding="utf-8")
    out = extended(base, 700, data)
    told = capsys.readouterr()
    assert told.out == f"{out}\n"
    lines = [line + "\n" for line in data.read_text(encoding="utf-8").splitlines()]
    tail = lines[-3:]
    assert len("".join(tail).encode()) <= len("".join(lines).encode()) // 10 < len("".join(lines[-4:]).encode())
    measured = read(out, names.EXTEND_REPORT)["tokens_per_character"]
    for moment, directory in (("before", base), ("after", out)):
        ids = plain(directory).encode("".join(tail), add_special_tokens=False).ids
        assert measured[moment] == round(len(ids) / len("".join(tail)), 4)
        assert f"{measured[moment]:.3f} {'before' if moment == 'before' else 'now'}" in told.err
    assert measured["characters"] == len("".join(tail))
    assert measured["after"] < 0.7 * measured["before"]


def test_nothing_is_learnt_from_the_tail_that_is_measured_on() -> None:
    """Else the saving would be that of text seen before."""
    lines = vocabulary.lines_of([f"line {number}" for number in range(100)])
    head, tail = vocabulary.split_off_tail(lines)
    assert head + tail == lines
    assert 5 <= len(tail) <= 10
    assert vocabulary.split_off_tail(["one line\n"]) == (["one line\n"], [])
    long = ["x" * 2**16 + "\n"] * 600
    head, tail = vocabulary.split_off_tail(long)
    assert sum(map(len, tail)) <= 2**20
    assert sum(map(len, head)) <= 8 * 2**20 + 2**17, "of very much text only a part is learnt from"


PIECES = ["明月", "山", "the ", "</s>", "<s", "\n", "床前", "é", "🙂", " "]


@pytest.mark.parametrize("kind", ["bytes", "llama"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(text=st.text(max_size=40) | st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_text_comes_back_as_the_base_gave_it_back(grown: Mapping[str, tuple[Path, Path]], kind: str, text: str) -> None:
    """YARDSTICK M09 for the new tokenizer: what could be said before can be said now."""
    base, out = (opened(directory) for directory in grown[kind])
    assert out.decode(out.encode(text, special=False)) == base.decode(base.encode(text, special=False))


OPENED: dict[Path, Tokenizer] = {}


def opened(directory: Path) -> Tokenizer:
    if directory not in OPENED:
        OPENED[directory] = Tokenizer(directory)
    return OPENED[directory]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    bases = {kind: make_base(tmp_path_factory.mktemp("grown") / kind, kind) for kind in ("bytes", "llama")}
    return {kind: (base, extended(base, 500)) for kind, base in bases.items()}


def test_control_strings_in_the_text_become_no_tokens(tmp_path: Path) -> None:
    """YARDSTICK D05: a text that says </s> many times must not teach the tokenizer to end there."""
    data = tmp_path / "text.txt"
    data.write_text("the end</s> and</s> the<|end|> end <s>the<0x41> thing</s>\n" * 50)
    for kind in ("bytes", "llama"):
        base = make_base(tmp_path / kind, kind)
        out = extended(base, 400, data)
        after = Tokenizer(out)
        ids = after.encode("the</s> end<s><|end|><0x41>", special=False)
        assert not set(ids) & (after.special_ids | {after.id_of(name) for name in ("<0x41>", "</s>", "<|end|>")})
        assert after.decode(ids) == "the</s> end<s><|end|><0x41>"
        assert max(ids) >= Tokenizer(base).size


def test_white_space_and_digits_stay_what_the_base_learnt(tmp_path: Path) -> None:
    """A new token for a newline would be an untrained one in every chat template."""
    data = tmp_path / "text.txt"
    data.write_text("月一\t\n\u3000月二 12 12 12, 月, 月。。\n" * 50, encoding="utf-8")
    base = make_base(tmp_path / "base", "llama")
    out = extended(base, 400, data)
    new = set(Vocabulary(out).ids) - set(Vocabulary(base).ids)
    assert {"一", "二", "。", "1", "2", "月一", "。。"} <= new
    assert not any(set(token) & set("\n\t\u3000 ") for token in new)
    assert not any(token.removeprefix("\u2581") in ("12", ",月", "月,", "2,") for token in new)


def test_fewer_tokens_than_asked_for_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base")
    out = extended(base, 100_000)
    report = read(out, names.EXTEND_REPORT)
    assert "not 99,741" in capsys.readouterr().err
    assert read(out, names.CONFIG)["vocab_size"] == report["tokens"]["after"] == Tokenizer(out).size < 1000


# ---- from another tokenizer ------------------------------------------------------------------------------------------


def test_the_tokens_of_another_tokenizer_are_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that the merges reach; its special tokens are not among them."""
    base = make_base(tmp_path / "base")
    other = make_base(tmp_path / "other")
    learnt = train_tokenizer([*poems(), *["the end of the road"] * 20], 700)
    learnt.save(str(other / names.TOKENIZER))
    out = tmp_path / "out"
    run(base, "--tokenizer_dir", other, "--eval_data", POEMS, "--out_dir", out)
    report = read(out, names.EXTEND_REPORT)
    taken = set(Vocabulary(out).ids) - set(Vocabulary(base).ids)
    assert taken == {token for token in learnt.get_vocab() if len(token) > 1} - set(Vocabulary(other).control)
    assert report["tokens"]["left_out"] == 0
    assert report["source"]["tokenizer"] == str((other / names.TOKENIZER).resolve())
    text = "".join(poems())
    assert len(plain(out).encode(text).ids) == len(learnt.encode(text).ids), "the base had no merges of its own that could differ"
    capsys.readouterr()
    run(base, "--tokenizer_dir", other, "--vocab_size", "300", "--out_dir", tmp_path / "fewer")
    assert Tokenizer(tmp_path / "fewer").size == 300
    assert read(tmp_path / "fewer", names.EXTEND_REPORT)["tokens_per_character"] is None


def test_what_the_merges_cannot_reach_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base", "llama")
    other = make_base(tmp_path / "other", "llama")
    shape = read(other, names.TOKENIZER)
    for token in ("hand", "xyz", "xy", "山水", "水"):
        shape["model"]["vocab"][token] = len(shape["model"]["vocab"])
    (other / names.TOKENIZER).write_text(json.dumps(shape))
    out = tmp_path / "out"
    run(base, "--tokenizer_dir", other, "--out_dir", out)
    assert set(Vocabulary(out).ids) - set(Vocabulary(base).ids) == {"hand", "xyz", "xy", "水"}, "h+and; xyz once there is xy; no 山"
    shape["model"]["vocab"]["山林人"] = len(shape["model"]["vocab"])
    for character in "山林人":
        shape["model"]["vocab"][character] = len(shape["model"]["vocab"])
    (other / names.TOKENIZER).write_text(json.dumps(shape))
    capsys.readouterr()
    run(base, "--tokenizer_dir", other, "--out_dir", tmp_path / "again")
    assert "山水" in Vocabulary(tmp_path / "again").ids
    assert "山林人" not in Vocabulary(tmp_path / "again").ids
    assert "1 token was left out" in capsys.readouterr().err


def test_tokens_that_the_base_would_cut_into_words_are_left_out(tmp_path: Path) -> None:
    """Where the other tokenizer has other words (digits together, a bracket with what follows) they could never be used."""
    base = make_base(tmp_path / "base")
    other = make_base(tmp_path / "other")
    shape = read(other, names.TOKENIZER)
    for token in ("(s", "(self", "12", "se", "self", "lf"):
        shape["model"]["vocab"][token] = len(shape["model"]["vocab"]) + 10
    (other / names.TOKENIZER).write_text(json.dumps(shape))
    out = tmp_path / "out"
    run(base, "--tokenizer_dir", other, "--out_dir", out)
    assert set(Vocabulary(out).ids) - set(Vocabulary(base).ids) == {"12", "se", "self", "lf"}
    assert read(out, names.EXTEND_REPORT)["tokens"]["left_out"] == 2


# ---- the weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("tied", "spare", "shards"), [(True, 0, 1), (False, 7, 3)])
def test_a_new_row_is_the_mean_of_the_pieces_rows_and_nothing_else_moves(
    tmp_path: Path, dtype: str, tied: bool, spare: int, shards: int
) -> None:
    """Against fp64, every row; spare rows are used before any is added, and those that remain keep their bytes."""
    base = make_base(tmp_path / "base", "llama", dtype=dtype, tie_word_embeddings=tied, spare=spare, shards=shards)
    size = Tokenizer(base).size
    out = extended(base, size + 40)
    before, after = tensors_of(base), tensors_of(out)
    grown = {EMBEDDING} if tied else {EMBEDDING, HEAD}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == grown
    model, names_of = plain(base).model, {number: token for token, number in plain(out).get_vocab().items()}
    for name in grown:
        _, shape, raw = before[name]
        old = to_float32(raw, dtype, shape)
        rows = [old[[piece.id for piece in model.tokenize(names_of[size + i])]].astype(np.float64).mean(axis=0) for i in range(40)]
        wanted = from_float32(np.stack(rows).astype(np.float32), dtype)
        row = len(raw) // shape[0]
        assert after[name][1] == (size + 40, shape[1])
        assert after[name][2] == raw[: size * row] + wanted
    assert read(out, names.CONFIG) == read(base, names.CONFIG) | {"vocab_size": size + 40}
    report = read(out, names.EXTEND_REPORT)
    assert report["rows"]["spare_used"] == spare
    assert report["base"]["fingerprint"] == fingerprint(resolve(base).shards())
    assert report["extended"]["fingerprint"] == fingerprint(resolve(out).shards())
    if shards > 1:
        index = read(out, names.WEIGHTS_INDEX)
        assert index["weight_map"] == read(base, names.WEIGHTS_INDEX)["weight_map"]
        assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in after.values())


def test_an_embedding_with_room_enough_does_not_grow(tmp_path: Path) -> None:
    """Qwen's embedding has more rows than its tokenizer has tokens."""
    base = make_base(tmp_path / "base", spare=100)
    out = extended(base, 300)
    before, after = tensors_of(base), tensors_of(out)
    assert before[EMBEDDING][1] == after[EMBEDDING][1]
    row = len(before[EMBEDDING][2]) // 359
    assert after[EMBEDDING][2][: 259 * row] == before[EMBEDDING][2][: 259 * row]
    assert after[EMBEDDING][2][259 * row : 300 * row] != before[EMBEDDING][2][259 * row : 300 * row]
    assert after[EMBEDDING][2][300 * row :] == before[EMBEDDING][2][300 * row :]
    assert read(out, names.CONFIG)["vocab_size"] == 359


def test_the_model_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """DESIGN section 6: what is not computed with streams by."""
    base = make_base(tmp_path / "base", hidden_size=2048, intermediate_size=1200, head_dim=64, num_attention_heads=8)
    plan = vocabulary.prepare(resolve(base), tmp_path / "out")
    vocabulary.learn(plan.vocabulary, poems(), 300)
    assert plan.base_bytes > 80e6
    pieces = plan.vocabulary.base_pieces()
    tracemalloc.start()
    vocabulary.write_weights(plan.weights, tmp_path, plan.vocabulary.base_size, pieces)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6, peak


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    for name in ("one", "two"):
        run(base, "--data", POEMS, "--vocab_size", "600", "--out_dir", tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


# ---- what others make of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REAL)
def test_transformers_cuts_text_as_we_do(tmp_path: Path, kind: str) -> None:
    """Promise 9: the class that the base's files name reads tokenizer.json alone, and to the same ids; they survive the way back."""
    from transformers import AutoTokenizer

    base = make_base(tmp_path / "base", kind)
    out = extended(base, 10**6)
    size = read(out, names.EXTEND_REPORT)["tokens"]["before"]
    assert not any((out / name).exists() for name in ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"))
    before, theirs, ours = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(out), Tokenizer(out)
    assert type(theirs) is type(before)
    seen = set()
    for text in [*poems(), "The moon, 月 and 12 birds;\n\n  床前明月光 it's"]:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == ours.encode(text, special=False)
        assert theirs(theirs.decode(ids), add_special_tokens=False).input_ids == ids
        seen |= set(ids)
    assert len([number for number in seen if number >= size]) > 0.5 * (Tokenizer(out).size - size)
    assert {token: theirs.convert_tokens_to_ids(token) for token in before.get_vocab()} == before.get_vocab()
    assert theirs.all_special_ids == before.all_special_ids


def test_transformers_loads_the_extended_model(tmp_path: Path) -> None:
    """A07: the whole directory; old text has the logits it had, and the new tokens are there to be said."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = shared_data("models/stories3m-llama")
    out = tmp_path / "out"
    run(base, "--data", shared_data("text/tang_poems_zh.txt"), "--vocab_size", "6000", "--out_dir", out)
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (base, out))
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(base)("Once upon a time there was a little bird.").input_ids])
    with torch.no_grad():
        old, new = before(tokens).logits, after(tokens).logits
    assert new.shape[-1] == after.config.vocab_size == 6000
    assert torch.equal(new[..., :4096], old)
    assert torch.equal(after.lm_head.weight, after.model.embed_tokens.weight)
    poem = "床前明月光，疑是地上霜。"
    ids = tokenizer(poem, add_special_tokens=False).input_ids
    assert len(ids) <= len(poem) + 1
    assert tokenizer.decode(ids) == poem
    assert read(out, names.EXTEND_REPORT)["tokens_per_character"]["after"] < 1.2
    assert read(out, names.GENERATION_CONFIG) == read(base, names.GENERATION_CONFIG)


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(*words: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        run(*words)
    return caught.value.report()


def test_what_cannot_be_meant_is_refused_before_any_work(tmp_path: Path) -> None:
    """Nothing is written, and each refusal says what to do."""
    base = make_base(tmp_path / "base")
    out = tmp_path / "out"
    assert "two ways" in refused(base, "--data", POEMS, "--tokenizer_dir", base, "--out_dir", out)
    assert "nothing to get new tokens from" in refused(base, "--out_dir", out)
    assert "--vocab_size N" in refused(base, "--data", POEMS, "--out_dir", out)
    assert "has 259 tokens already" in refused(base, "--data", POEMS, "--vocab_size", "259", "--out_dir", out)
    assert "nothing to add" in refused(base, "--tokenizer_dir", base, "--out_dir", out)
    assert "exists already" in refused(base, "--data", POEMS, "--vocab_size", "300", "--out_dir", base)
    llama = make_base(tmp_path / "llama", "llama")
    shown = refused(base, "--tokenizer_dir", llama, "--out_dir", out)
    assert "SentencePiece-like" in shown and "byte-level" in shown
    assert refused(base, "--tokenizer_dir", tmp_path, "--out_dir", out).count(names.TOKENIZER)
    step = make_step(tmp_path / "run", 3, base)
    assert f"litlora merge_lora {step}" in refused(step, "--data", POEMS, "--vocab_size", "300", "--out_dir", out)
    assert "is no directory" in refused(base, "--data", POEMS, "--vocab_size", "300", "--out_dir", POEMS / "x")
    assert not out.exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False), "a Unigram model"),
        (tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), "a WordPiece model"),
        (tokenizers.models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (tokenizers.models.BPE({"a": 0, "b": 1}, []), "neither byte-level nor falls back to bytes"),
    ],
)
def test_a_tokenizer_that_cannot_grow_by_merges_is_refused_by_name(tmp_path: Path, model: Any, said: str) -> None:
    base = make_base(tmp_path / "base")
    tokenizers.Tokenizer(model).save(str(base / names.TOKENIZER))
    assert said in refused(base, "--data", POEMS, "--vocab_size", "300", "--out_dir", tmp_path / "out")


@pytest.mark.parametrize("others", [("vocab.json", "merges.txt"), ("tokenizer.model",)])
def test_a_vocabulary_that_is_not_in_tokenizer_json_is_refused_with_the_way_to_one(tmp_path: Path, others: tuple[str, ...]) -> None:
    """Of the base, and of the directory whose tokens are wanted."""
    base, other = make_base(tmp_path / "base"), Path(shutil.copytree(make_base(tmp_path / "second"), tmp_path / "other"))
    (other / names.TOKENIZER).unlink()
    for name in others:
        (other / name).write_bytes(b"")
    for words in ((other, "--data", POEMS, "--vocab_size", "300"), (base, "--tokenizer_dir", other)):
        said = refused(*words, "--out_dir", tmp_path / "out")
        assert f"{other}: its vocabulary is in {' and '.join(others)}, and only a tokenizer.json can be extended" in said
        assert "save_pretrained" in said and not (tmp_path / "out").exists()


def test_weights_and_tokenizer_of_two_models_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", vocab_size=200)
    assert "259 tokens and its embedding rows for 200" in refused(base, "--data", POEMS, "--vocab_size", "300", "--out_dir", tmp_path / "o")
    config = read(base, names.CONFIG)
    (base / names.CONFIG).write_text(json.dumps({**config, "vocab_size": 259}))
    assert "has the shape" in refused(base, "--data", POEMS, "--vocab_size", "300", "--out_dir", tmp_path / "o")


def test_nothing_is_left_behind_where_it_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YARDSTICK A05: no half model at the final name."""
    base = make_base(tmp_path / "base")
    before = tensors_of(base)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vocabulary, "write_small_files", full)
    with pytest.raises(Exception, match="the disk is full"):
        run(base, "--data", POEMS, "--vocab_size", "300", "--out_dir", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "base-tokenizer"]
    assert tensors_of(base) == before
