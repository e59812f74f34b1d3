"""litlora/tokenizer.py: ids as the tokenizers' own projects give them, control strings as text, decoding token by token."""

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from conftest import shared_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from talkers import byte_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from litlora.commands.pretrain import vocabulary
from litlora.errors import UserError
from litlora.options import Pretrain
from litlora.prompts import Prompts
from litlora.tokenizer import Tokenizer

NAMES = [
    "tinyllama-chat", "phi-3", "mistral-v0.3", "chinese-llama-2", "llama-3", "qwen2.5", "smollm", "gpt2", "pythia", "minimind",
    "../models/stories3m-llama",
]  # fmt: skip
TEXTS = ["Hello  world\n\n", "  two before", "\ttab", "你好 🤗\u200d🔥 é e\u0301", "a\r\nb", " ", "\n", "x" * 300, "0123 4567"]


@cache
def real(name: str) -> Tokenizer:
    return Tokenizer(shared_data(f"tokenizers/{name}"))


def write(directory: Path, tokenizer: tokenizers.Tokenizer, **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


CONTROL = [AddedToken(content, special=True) for content in ("<s>", "</s>", "<|im_end|>")]
CONTROL += [AddedToken(content, special=False) for content in ("<think>", "    ", "newword")]


def byte_level(directory: Path, *special: str) -> Path:
    """A vocabulary of bytes with a few merges, as GPT-2's; `special`: more control tokens."""
    vocab = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("h", "e"), ("Ġ", "t"), ("ä", "½"), ("Ċ", "Ċ")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab | {"".join(pair): 256 + n for n, pair in enumerate(merges)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([*CONTROL, *(AddedToken(content, special=True) for content in special)])
    return write(directory, tokenizer, bos_token="<s>", eos_token="</s>")


def test_a_token_that_was_added_to_the_tokenizer_alone_is_named(tmp_path: Path) -> None:
    """Caught: an IndexError in training, generate and evaluate, said to be a bug. Gemma 3 has such a token, which no text holds.

    How many rows there are says who reads the model. Caught: whatever config.json lay beside the vocabulary.
    """
    tokenizer = Tokenizer(byte_level(tmp_path / "t", "<|new|>"))
    number = tokenizer.id_of("<|new|>")
    assert number is not None
    (tmp_path / "t" / "config.json").write_text(json.dumps({"vocab_size": 7, "text_config": {"vocab_size": number}}))
    tokenizer = Tokenizer(tmp_path / "t", rows=number)
    tokenizer.refuse_beyond(tokenizer.encode("<|new|></s>", special=False))
    prompts = Prompts(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|new|>{% endif %}")
    for asked in (lambda: prompts.text_ids("a<|new|>"), lambda: prompts.prompt_ids([{"role": "user", "content": "a"}])):
        with pytest.raises(UserError, match=rf"the token '<\|new\|>' has the id {number}, and the model's embedding {number} rows"):
            asked()
    new = vocabulary(Pretrain(tokenizer_dir=str(tmp_path / "t")), tmp_path)  # of a model that is made with a row for each
    assert number in Prompts(new).text_ids("a<|new|>") and Tokenizer(tmp_path / "t").rows == new.size


def pieces(directory: Path) -> Path:
    """A vocabulary of pieces that falls back to bytes, as Llama 2's."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz好", "▁t", "he", "▁the"]
    vocab = {letter: n for n, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "t"), ("h", "e"), ("▁t", "he")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_tokens(CONTROL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return write(directory, tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    directory = tmp_path_factory.mktemp("tokenizers")
    metaspace = tokenizers.Tokenizer.from_file(str(pieces(directory / "p") / "tokenizer.json"))
    metaspace.normalizer, metaspace.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    other = tokenizers.Tokenizer.from_file(str(directory / "p" / "tokenizer.json"))
    other.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])  # a decoder we know no steps of
    return {
        "bytes": Tokenizer(byte_level(directory / "b")),
        "pieces": Tokenizer(directory / "p"),
        "metaspace": Tokenizer(write(directory / "m", metaspace, bos_token="<s>", eos_token="</s>")),
        "other": Tokenizer(write(directory / "o", other, bos_token="<s>", eos_token="</s>")),
    }


# ---- ids as others have them -----------------------------------------------------------------------------------------

LLAMACPP = [("llama-spm", "tinyllama-chat"), ("llama-spm", "phi-3"), ("phi-3", "phi-3"), ("phi-3", "tinyllama-chat")]
LLAMACPP += [("gpt-2", "gpt2"), ("qwen2", "qwen2.5"), ("llama-bpe", "llama-3")]


@pytest.mark.parametrize(("cases", "name"), LLAMACPP)
def test_ids_equal_llama_cpps(cases: str, name: str) -> None:
    """M08, D04's ground: 46 strings and more of each published vocabulary. Against: the space before the first word left out."""
    folder = shared_data("tokenizer_cases/llamacpp")
    texts = (folder / f"{cases}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in (folder / f"{cases}.out").read_text().splitlines()]
    assert len(texts) >= len(expected) >= 46
    for text, ids in zip(texts, expected, strict=False):
        assert real(name).encode(text, special=False) == ids, repr(text)


HF_CASES = {
    "Xenova/llama-tokenizer": "tinyllama-chat", "Xenova/llama3-tokenizer": "llama-3", "Xenova/llama3-tokenizer-new": "llama-3",
    "Xenova/gpt2": "gpt2", "Xenova/Qwen1.5-0.5B-Chat": "qwen2.5",
}  # fmt: skip


@pytest.mark.parametrize("theirs", HF_CASES)
def test_ids_and_text_equal_transformers_own_test_cases(theirs: str) -> None:
    """152 cases. Where the case has a BOS, it is the one that `adds_bos` announces."""
    tokenizer = real(HF_CASES[theirs])
    cases = [case for case in json.loads(shared_data("tokenizer_cases/hf_cases.json").read_text()) if case["tokenizer"] == theirs]
    assert len(cases) >= 25
    for case in cases:
        begin = [tokenizer.bos_id] if tokenizer.adds_bos and theirs != "Xenova/llama3-tokenizer" else []
        assert begin + tokenizer.encode(case["text"], special=True) == case["ids"], case["text"]
        if case["case"] != "PUNCTUATION" or tokenizer._decoder_steps[0]["type"] != "ByteLevel":  # theirs "cleans up" spaces; we keep them
            assert tokenizer.decode(case["ids"], skip_special=False) == case["decoded"]


@pytest.mark.parametrize(("file", "name"), [("gpt2_encoded_tokens.json", "gpt2"), ("llama_encoded.json", "tinyllama-chat")])
def test_a_long_text_equals_swifts(file: str, name: str) -> None:
    case = json.loads(shared_data(f"tokenizer_cases/swift/{file}").read_text())
    tokenizer, ids = real(name), case.get("token_ids") or case.get("ids")
    if ids is None:
        ids = [tokenizer.id_of(token) for token in case["bpe_tokens"]]
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and ids[0] == tokenizer.bos_id else []
    assert begin + tokenizer.encode(case["text"], special=False) == ids


@pytest.mark.parametrize("name", [name for name in NAMES if name != "../models/stories3m-llama"])
def test_ids_with_control_tokens_equal_transformers(name: str) -> None:
    """D04: control tokens in a text, and the text between them, as transformers splits it. Against: Llama 2's space after `</s>`."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(shared_data(f"tokenizers/{name}")), real(name)
    written = list(ours.control)[:3] + list(ours.control)[-3:]
    for text in TEXTS:
        joined = "Begin" + "".join(control + text for control in written)
        assert ours.encode(joined, special=True) == theirs.encode(joined, add_special_tokens=False), (name, joined)


@pytest.mark.parametrize(
    ("name", "bos", "adds_bos", "eos", "eos_ids", "size"),
    [
        ("tinyllama-chat", 1, True, 2, {2}, 32000),
        ("phi-3", 1, False, 32000, {32000}, 32011),
        ("mistral-v0.3", 1, True, 2, {2}, 32768),
        ("chinese-llama-2", 1, True, 2, {2}, 55296),
        ("llama-3", 128000, True, 128009, {128001, 128008, 128009}, 128256),
        ("qwen2.5", None, False, 151643, {151643}, 151665),
        ("smollm", 0, False, 0, {0}, 49153),
        ("gpt2", 50256, False, 50256, {50256}, 50257),
        ("pythia", 0, False, 0, {0}, 50278),
        ("minimind", 1, False, 2, {2}, 6400),
        ("../models/stories3m-llama", 1, True, 2, {2}, 4096),
    ],
)
def test_where_a_text_begins_and_ends_is_read_from_the_directory(
    name: str, bos: int | None, adds_bos: bool, eos: int, eos_ids: set[int], size: int
) -> None:
    """D02, M08: BOS as transformers adds it to plain text; eos ids of all three files; size without padded rows."""
    tokenizer = real(name)
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.eos_id, tokenizer.eos_ids) == (bos, adds_bos, eos, eos_ids)
    assert tokenizer.size == size
    assert tokenizer.token_of(size) is None


def test_padding_and_truncation_kept_in_a_file_are_not_applied() -> None:
    """smollm's tokenizer.json pads everything to 192 tokens."""
    assert real("smollm").encode("a", special=False) == [81]
    assert len(real("smollm").encode("word " * 500, special=False)) > 400


# ---- control strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_control_string_in_a_text_becomes_a_control_token(name: str) -> None:
    """D05, for each control token of each vocabulary, alone and in a text. Against: non-special tokens (`<tool_call>`) left out."""
    tokenizer = real(name)
    control = set(tokenizer.control.values())
    if name == "qwen2.5":
        assert set(tokenizer.control) >= {"<tool_call>", "<|fim_prefix|>", "<|im_end|>"}  # the first two are not flagged special
    for content in list(tokenizer.control)[:40] + list(tokenizer.control)[-40:]:
        for text in (content, f"a {content}b", content * 2):
            ids = tokenizer.encode(text, special=False)
            assert not control & set(ids), content
            assert tokenizer.decode(ids) == text
            assert tokenizer.control[content] in tokenizer.encode(text, special=True)


def test_added_words_and_spaces_stay_tokens_of_their_own(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["bytes"]
    assert set(tokenizer.control) == {"<s>", "</s>", "<|im_end|>", "<think>"}
    ids = tokenizer.encode("a    newword", special=False)
    assert [tokenizer.token_of(i) for i in ids] == ["a", "    ", "newword"]


@pytest.mark.parametrize("kind", ["bytes", "pieces", "metaspace"])
def test_a_shielded_control_string_is_text_and_an_open_one_is_not(kinds: dict[str, Tokenizer], kind: str) -> None:
    """D05: one text with `</s>` as five letters and as the end of a turn."""
    tokenizer, mark = kinds[kind], "\ue000"
    text = tokenizer.shield("a </s> <think> b", mark) + "</s>" + tokenizer.shield("<think> </s>", mark, answer=True)
    ids = tokenizer.encode_batch([text], special=True, mark=mark)[0]
    assert ids.count(tokenizer.eos_id) == 1
    assert ids.count(tokenizer.id_of("<think>")) == 1
    shown = tokenizer.decode(ids, skip_special=False)
    assert shown.replace(" ", "") == "a</s><think>b</s><think></s>"


def test_control_strings_that_overlap_are_all_shielded(tmp_path: Path) -> None:
    """D05. Against: one pass alone, which leaves what begins inside of another."""
    tokenizer = Tokenizer(byte_level(tmp_path, "<a>", "a><b>"))
    text = "x<a><b>y"
    shielded = tokenizer.shield(text, "\ufdd2")
    (ids,) = tokenizer.encode_batch([shielded], special=True, mark="\ufdd2")
    assert not set(ids) & set(tokenizer.control.values()) and tokenizer.decode(ids) == text
    assert set(tokenizer.encode(text, special=True)) & set(tokenizer.control.values())


def test_text_after_other_text_has_no_space_of_a_beginning(kinds: dict[str, Tokenizer]) -> None:
    for kind in ("pieces", "metaspace"):
        tokenizer = kinds[kind]
        assert tokenizer.encode("the", special=False)[0] == tokenizer.id_of("▁the")
        assert [tokenizer.token_of(i) for i in tokenizer.encode_after("the", special=False)] == ["t", "he"]
    tokenizer = kinds["bytes"]
    assert [tokenizer.token_of(i) for i in tokenizer.encode_after("\n\n", special=False)] == ["ĊĊ"]


def test_a_text_that_holds_a_stand_in_is_refused(kinds: dict[str, Tokenizer]) -> None:
    stand_in = kinds["bytes"]._stand_ins["<s>"]
    for special in (True, False):
        with pytest.raises(UserError, match="U\\+FDD0"):
            kinds["bytes"].encode(f"a{stand_in}b", special=special)
    assert kinds["bytes"].decode(kinds["bytes"].encode("a\ufdd0b\ufdd1", special=True)) == "a\ufdd0b\ufdd1"


def test_many_texts_at_once_are_as_one_by_one() -> None:
    for name in ("tinyllama-chat", "gpt2", "mistral-v0.3"):
        texts = [*TEXTS, "", "</s>a", "<s></s>"]
        for special in (True, False):
            assert real(name).encode_batch(texts, special=special) == [real(name).encode(text, special=special) for text in texts]


# ---- decoding token by token -----------------------------------------------------------------------------------------


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> Iterator[str]:
    stream = tokenizer.stream(skip_special)
    yield from (stream.push(i) for i in ids)
    yield stream.flush()


AWKWARD = st.text(st.sampled_from(list("aé好🤗👩\u200d🔥\ufe0f\u0301 \n\t▁<s>/|<0x41>\u202e\ufffd\x00\U0010ffff\ue000")), max_size=30)
ANY_TEXT = st.one_of(st.text(max_size=40), AWKWARD)


@pytest.mark.parametrize("kind", ["bytes", "pieces", "metaspace", "other"])
def test_streamed_text_is_the_decoded_text(kinds: dict[str, Tokenizer], kind: str) -> None:
    """M09: 2,000 strings of each kind, and nothing broken on the way. Against: byte runs decoded one by one; no leading-space rule."""
    tokenizer = kinds[kind]

    @settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(ANY_TEXT)
    def check(text: str) -> None:
        ids = tokenizer.encode(text, special=False)
        shown = list(streamed(tokenizer, ids))
        assert "".join(shown) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in shown)
        if kind == "bytes" or (kind == "pieces" and "▁" not in text):  # the others lose a space at the beginning
            assert "".join(shown) == text

    check()


@pytest.mark.parametrize("kind", ["bytes", "pieces", "metaspace"])
def test_streamed_text_is_the_decoded_text_of_any_ids(kinds: dict[str, Tokenizer], kind: str) -> None:
    """M09: lone and broken bytes, control tokens, ids outside the vocabulary: what a model may really emit."""
    tokenizer, chance = kinds[kind], random.Random(1)
    for _ in range(2000):
        ids = [chance.randrange(tokenizer.size + 3) for _ in range(chance.randrange(12))]
        for skip_special in (True, False):
            assert "".join(streamed(tokenizer, ids, skip_special)) == tokenizer.decode(ids, skip_special)


@pytest.mark.parametrize("name", NAMES)
def test_real_vocabularies_stream_as_they_decode(name: str) -> None:
    """M09 with published vocabularies: texts, and random ids."""
    tokenizer, chance = real(name), random.Random(2)
    sequences = [tokenizer.encode(text, special=False) for text in [*TEXTS, "👨‍👩‍👧‍👦 à la 漢字 " * 3]]
    sequences += [[chance.randrange(tokenizer.size) for _ in range(20)] for _ in range(200)]
    for ids in sequences:
        shown = list(streamed(tokenizer, ids))
        assert "".join(shown) == tokenizer.decode(ids)
        theirs = [i for i in ids if i not in tokenizer.special_ids]
        assert tokenizer.decode(ids) == tokenizer._tokenizer.decode(theirs, skip_special_tokens=False)


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    for name in ("gpt2", "tinyllama-chat"):
        ids = real(name).encode("🤗!", special=False)
        assert len(ids) >= 4
        assert [piece for piece in streamed(real(name), ids) if piece] in (["🤗", "!"], ["🤗!"])


def test_special_tokens_are_not_shown_unless_asked_for(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["bytes"]
    ids = tokenizer.encode("<s>a<think>b</s>", special=True)
    assert tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.decode(ids, skip_special=False) == "<s>a<think>b</s>"


# ---- what is refused ---------------------------------------------------------------------------------------------------


def test_a_directory_without_tokenizer_json_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_bytes(b"")
    with pytest.raises(UserError, match="looked for tokenizer") as caught:
        Tokenizer(tmp_path)
    assert "merges.txt" in caught.value.context[0]
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", [b"", b"{", b'{"model": 1}', b"\xff\xfe"])
def test_a_damaged_tokenizer_json_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_an_end_token_that_the_vocabulary_lacks_is_refused(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(UserError, match="eos_token is '<eos>'"):
        Tokenizer(tmp_path)


def test_tokens_listed_beside_the_vocabulary_get_their_ids(tmp_path: Path) -> None:
    """Qwen 3: tokenizer_config.json may list more than tokenizer.json; another id than listed is refused."""
    size = Tokenizer(byte_level(tmp_path)).size
    config = {"eos_token": "</s>", "added_tokens_decoder": {str(size): {"content": "<new>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a<new>", special=True)[-1] == size == tokenizer.size - 1
    config["added_tokens_decoder"] = {str(size + 5): {"content": "<new>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"has id {size + 5}"):
        Tokenizer(tmp_path)


def test_end_ids_are_those_of_all_three_files(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level(tmp_path))
    im_end, size = tokenizer.id_of("<|im_end|>"), tokenizer.size
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [im_end, size + 7]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert Tokenizer(tmp_path).eos_ids == {im_end, 5, tokenizer.eos_id}  # an id that no text has can never be sampled
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {"eos_token_id": [7]}}))
    assert Tokenizer(tmp_path).eos_ids == {im_end, 7, tokenizer.eos_id}
    (tmp_path / "generation_config.json").unlink()  # a model need not have one
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert Tokenizer(tmp_path).eos_ids == {tokenizer.eos_id}


def test_the_chat_template_is_the_file_else_the_default_in_the_config(tmp_path: Path) -> None:
    config = {"eos_token": "</s>", "chat_template": "inside"}
    byte_level(tmp_path)
    for value, expected in (("inside", "inside"), ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": value}))
        assert Tokenizer(tmp_path).chat_template == expected
    named = [{"name": "a", "template": "t"}, {"name": "b", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    with pytest.raises(UserError, match="none of them named default"):
        _ = Tokenizer(tmp_path).chat_template
    (tmp_path / "chat_template.jinja").write_text("the file's")
    assert Tokenizer(tmp_path).chat_template == "the file's"


def test_the_hash_changes_with_what_changes_ids(tmp_path: Path) -> None:
    first = Tokenizer(byte_level(tmp_path / "a"))
    assert first.hash == Tokenizer(byte_level(tmp_path / "b")).hash
    assert first.hash != Tokenizer(pieces(tmp_path / "c")).hash
    (tmp_path / "b" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert first.hash != Tokenizer(tmp_path / "b").hash
    assert first.vocabulary_hash == Tokenizer(tmp_path / "b").vocabulary_hash  # another end, the same ids


@pytest.mark.parametrize("listed", [True, {"": {}}, {"258": None}, {"258": {"content": 3}}, [1]])
def test_a_table_of_added_tokens_that_is_none_is_refused(tmp_path: Path, listed: object) -> None:
    """Z01: tokenizer_config.json's added_tokens_decoder, by its name."""
    byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": listed}))
    with pytest.raises(UserError, match="added_tokens_decoder: not a table"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"added_tokens_decoder": {}}, "a qrs"),  # one more
        ({"legacy": True}, "</s>a"),
        ({"add_prefix_space": False}, "a"),
        ({"model_type": "gemma"}, "</s>a"),
    ],
)
def test_the_hash_changes_with_tokens_and_flags_beside_the_vocabulary(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    """M08: one tokenizer.json, other ids; and however the file is laid out, the same hash for the same ids."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    pieces(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    first = Tokenizer(tmp_path)
    shape = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(shape, indent=1))
    assert Tokenizer(tmp_path).hash == first.hash
    assert max(token["id"] for token in shape["added_tokens"]) < first.size
    if "added_tokens_decoder" in change:
        change = {"added_tokens_decoder": {str(first.size): {"content": "qrs"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change))
    (tmp_path / "config.json").write_text(json.dumps({name: change[name] for name in ("model_type",) if name in change}))
    other = Tokenizer(tmp_path)
    assert other.encode(text, special=True) != first.encode(text, special=True)
    assert other.hash != first.hash and other.vocabulary_hash != first.vocabulary_hash
