"""Vocabularies that are kept in other files than tokenizer.json, made into the `tokenizers` package's own form.

    tokenizer.model           SentencePiece (sentencepiece_model.proto), BPE or unigram; or tiktoken's list of ranks, as Llama 3's
    vocab.json + merges.txt   byte-level BPE; how words are split is not in them: the tokenizer class says it

What comes out gives the ids of the tokenizer.json that such files are published with; of tokenizer.model, SentencePiece's own.
"""

import base64
import binascii
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from litlora.errors import UserError

MODELS = ("tokenizer.model", "tokenizer.model.v3")
VOCABULARY, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
SPACE = "\u2581"  # how SentencePiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3_RANKS = 128_000


def read_vocabulary(directory: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    """The vocabulary of a directory that has no tokenizer.json; None where it has no other either. `config`: tokenizer_config.json.

    Raises UserError for a damaged file, and where the files do not say how text is split.
    """
    model = next((directory / name for name in MODELS if (directory / name).is_file()), None)
    if model is not None:
        raw = model.read_bytes()
        return of_ranks(raw, model, config) if _looks_like_ranks(raw) else of_sentencepiece(SentencePieces.read(raw, model), model, config)
    if (directory / VOCABULARY).is_file() and (directory / MERGES).is_file():
        return of_merges(directory, config)
    return None


def byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the other 68 bytes get letters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}


# ---- SentencePiece ---------------------------------------------------------------------------------------------------


@dataclass
class SentencePieces:
    """What a SentencePiece model file says: ModelProto of sentencepiece_model.proto, as far as it bears on ids."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # text, score, type; the place is the id
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    bos_id: int = 1
    eos_id: int = 2
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    @classmethod
    def read(cls, raw: bytes, where: Path) -> "SentencePieces":
        """Of a file's bytes. UserError where they are no such model."""
        model, said = cls(), False
        try:
            for number, value in _fields(raw):
                if number == 1:
                    model.pieces.append(cls._piece(value))
                elif number == 2:
                    said = True
                    model._take_trainer(dict(_fields(value)))
                elif number == 3:
                    spec = dict(_fields(value))
                    model.charsmap = bytes(spec.get(2, b""))
                    model.add_dummy_prefix = bool(spec.get(3, True))
                    model.remove_extra_whitespaces = bool(spec.get(4, True))
            if not model.pieces or not said:
                raise ValueError("what it was trained as is missing" if model.pieces else "no pieces")
        except (ValueError, IndexError, TypeError, struct.error) as error:  # UnicodeDecodeError is a ValueError
            raise UserError(
                f"neither a SentencePiece model nor a list of ranks ({error})", where=where, hint="fetch the file again"
            ) from error
        return model

    @staticmethod
    def _piece(raw: bytes) -> tuple[str, float, int]:
        values = dict(_fields(raw))
        return bytes(values[1]).decode("utf-8"), struct.unpack("<f", values.get(2, b"\0\0\0\0"))[0], int(values.get(3, NORMAL))

    def _take_trainer(self, spec: Mapping[int, Any]) -> None:
        self.model_type, self.byte_fallback = int(spec.get(3, UNIGRAM)), bool(spec.get(35, False))
        self.bos_id, self.eos_id = (_signed(spec.get(number, default)) for number, default in ((41, 1), (42, 2)))

    def of_type(self, kind: int) -> list[str]:
        return [text for text, _, its in self.pieces if its == kind]

    def piece(self, number: int) -> str | None:
        return self.pieces[number][0] if 0 <= number < len(self.pieces) else None


def of_sentencepiece(model: SentencePieces, where: Path, config: Mapping[str, Any]) -> Tokenizer:
    """BPE: a merge for each way to put a piece together, the better score first. Unigram: the pieces and their scores."""
    scores = {text: score for text, score, _ in model.pieces}
    unknown = next(iter(model.of_type(UNKNOWN)), None)
    if len(scores) < len(model.pieces):
        raise UserError("two of its pieces are the same", where=where)
    if model.remove_extra_whitespaces and model.of_type(USER_DEFINED):
        what = "joins spaces and has user-defined pieces, beside which the spaces would be lost"
        raise UserError(what, where=where, hint="take the tokenizer.json of the same model")
    if model.model_type == BPE:
        vocabulary = {text: number for number, text in enumerate(scores)}
        # Ties go to the longer pieces, as transformers breaks them: SentencePiece itself takes whichever stands first in the text.
        pairs = sorted(_pairs(vocabulary), key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])))
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback))
    elif model.model_type == UNIGRAM:
        unknown_id = list(scores).index(unknown) if unknown is not None else None
        tokenizer = Tokenizer(models.Unigram(list(scores.items()), unknown_id, model.byte_fallback))
    else:
        raise UserError("a SentencePiece model of words or characters", where=where, hint="BPE and unigram models are read")
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    control = [*model.of_type(UNKNOWN), *model.of_type(CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in model.of_type(USER_DEFINED)])
    begin = model.piece(model.bos_id)
    if begin in control and "add_bos_token" not in config and begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, model.bos_id)])
    return tokenizer


def named_pieces(directory: Path) -> dict[str, str]:
    """The tokens that a SentencePiece model itself calls begin and end, for a directory that says nothing of them."""
    path = next((directory / name for name in MODELS if (directory / name).is_file()), None)
    if path is None or _looks_like_ranks(raw := path.read_bytes()):
        return {}
    model = SentencePieces.read(raw, path)
    named = {"bos_token": model.piece(model.bos_id), "eos_token": model.piece(model.eos_id)}
    control = set(model.of_type(CONTROL))
    return {name: text for name, text in named.items() if text is not None and text in control}


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: number, and an int or bytes (https://protobuf.dev/programming-guides/encoding/)."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError("a field without a number")
        if kind == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _varint(raw, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + length > len(raw):
            raise ValueError("it ends too soon")
        yield number, raw[at : at + length]
        at += length


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, least first, and where the next begins."""
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _signed(value: int) -> int:
    """A varint as int32: -1 is written as 2**64 - 1."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _pairs(vocabulary: Mapping[Any, int]) -> Iterator[tuple[Any, Any]]:
    """The ways to put each entry together from two others, in the order of ids: of the whole, of the left and of the right part."""
    for whole in vocabulary:
        cuts = ((whole[:at], whole[at:]) for at in range(1, len(whole)))
        known = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
        yield from sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


# ---- ranks, and vocab.json with merges.txt ---------------------------------------------------------------------------


def _looks_like_ranks(raw: bytes) -> bool:
    """Whether the first line is `base64 number`."""
    word, _, number = raw.partition(b"\n")[0].partition(b" ")
    return number.strip().isdigit() and len(word) % 4 == 0 and word.isascii()


def of_ranks(raw: bytes, where: Path, config: Mapping[str, Any]) -> Tokenizer:
    """tiktoken's form: the bytes of each token in base64, and its rank, which is its id and its place among the merges.

    Llama 3 begins a text with its BOS, whose id tokenizer_config.json has.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        word, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except (binascii.Error, ValueError) as error:
            raise UserError("not a token and its rank", where=f"{where}:{number}:1", hint="fetch the file again") from error
    if len(ranks) != LLAMA_3_RANKS:
        what = f"{len(ranks):,} ranks; how text is split is not in the file, and is known for Llama 3's 128,000 alone"
        raise UserError(what, where=where, hint="take the tokenizer.json of the same model")
    letters = {byte: letter for letter, byte in byte_letters().items()}
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(written[a], written[b]) for a, b in _pairs(ranks)]
    tokenizer = Tokenizer(models.BPE({written[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    _split_words(tokenizer, WORDS.format(digits=r"\p{N}{1,3}"))
    begin = config.get("bos_token")
    begin_id = next((number for number, token in decoded_tokens(where.parent, config).items() if token["content"] == begin), None)
    if isinstance(begin, str) and begin_id is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, begin_id)])
    return tokenizer


def of_merges(directory: Path, config: Mapping[str, Any]) -> Tokenizer:
    """GPT-2's and Qwen's form. The class named in tokenizer_config.json says how words are split; no other is guessed at."""
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if kind not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        what = f"how a {kind or 'tokenizer without a class'} splits words is not in {VOCABULARY} and {MERGES}, and not known here"
        raise UserError(what, where=directory, hint="take the tokenizer.json of the same model")
    try:
        vocabulary, merges = models.BPE.read_file(str(directory / VOCABULARY), str(directory / MERGES))
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the package raises Exception itself
        raise UserError(f"{VOCABULARY} and {MERGES} do not fit together: {error}", where=directory) from error
    if kind == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
        _split_words(tokenizer, WORDS.format(digits=r"\p{N}"))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
        tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_words(tokenizer: Tokenizer, pattern: str) -> None:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()


def added_tokens(directory: Path, config: Mapping[str, Any], named: Sequence[str]) -> list[tuple[int, AddedToken]]:
    """Tokens beside the vocabulary, by id: those that tokenizer_config.json lists, and those of added_tokens.json (older directories)."""
    found: dict[int, AddedToken] = {}
    path = directory / ADDED
    if path.is_file():
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            found |= {int(number): AddedToken(text, special=text in named, normalized=False) for text, number in listed.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"not a table of tokens and ids ({error})", where=path) from error
    for number, token in decoded_tokens(directory, config).items():
        flags = {key: bool(token.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "special", "normalized")}
        found[number] = AddedToken(token["content"], **flags)
    return sorted(found.items(), key=lambda entry: entry[0])


def decoded_tokens(directory: Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """tokenizer_config.json's added_tokens_decoder, by id. UserError where it is no table of them."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        found = {int(number): token for number, token in listed.items()}
        if all(isinstance(token["content"], str) for token in found.values()):
            return found
        why = "a content is no text"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
    raise UserError(f"added_tokens_decoder: not a table of tokens and ids ({why})", where=directory / "tokenizer_config.json")
