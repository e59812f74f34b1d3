"""A tokenizer.json as GGUF stores it, so that llama.cpp makes the same ids of a text.

Two kinds are known. SentencePiece's (`llama`): pieces with ▁ for a space and bytes where a piece is missing; llama.cpp joins the two
neighbours whose piece has the highest score, so a piece's score is minus the rank of the merge that makes it. GPT-2's (`gpt2`): letters
for bytes, merges in their order, and a word for the rule that cuts a text before that (`tokenizer.ggml.pre`), which llama.cpp knows by
name alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.reading import read_json
from litlora.console import warn
from litlora.errors import UserError
from litlora.tokenizer import Tokenizer
from litlora.tokenizer.vocabularies import SPACE, read_vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")

WORDS_OF_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS_OF_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What cuts a text, as `shape_of` writes it -> (llama.cpp's word for it, whether it takes a word that is a token as it is).
CUTTERS: dict[tuple[str, ...], tuple[str, bool]] = {
    (f"Split {WORDS_OF_LLAMA_3}", "bytes"): ("llama-bpe", True),
    (f"Split {WORDS_OF_LLAMA_3.replace('{1,3}', '')}", "bytes"): ("qwen2", False),
    (f"Split {WORDS_OF_TEKKEN}", "bytes"): ("tekken", True),
    ("digits", "bytes, words"): ("smollm", False),
    ("bytes, words",): ("gpt-2", False),
}


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """All that GGUF says of a tokenizer; one entry for each row of the embedding."""

    model: str  # llama, gpt2
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)  # of `llama`
    merges: list[str] = field(default_factory=list)  # of `gpt2`
    space_prefix: bool | None = None  # of `llama`: whether a text begins with a space
    ids: dict[str, int] = field(default_factory=dict)  # bos, eos, eot, eom, unk, pad
    adds_bos: bool = False
    chat_template: str | None = None


def token_table(directory: Path, rows: int) -> TokenTable:
    """What GGUF says of the tokenizer in `directory`, for a model with `rows` rows. UserError of one that llama.cpp has no form for."""
    path = directory / names.TOKENIZER
    tokenizer = Tokenizer(directory)
    raw = read_tokenizer(directory)
    model = raw.get("model", {})
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"its model is {model.get('type')}; only BPE is supported", where=path)
    if tokenizer.size > rows:
        raise UserError(f"has {tokenizer.size:,} tokens, and the model {rows:,} rows", where=path, hint="the tokenizer is another model's")
    merges = [tuple(merge) if isinstance(merge, list) else split_merge(merge, model["vocab"]) for merge in model["merges"]]
    added = added_tokens(raw, directory)
    is_pieces = bool(model.get("byte_fallback"))
    tokens, types = tokens_and_types(model["vocab"], added, tokenizer, rows, unknown=model.get("unk_token"), is_pieces=is_pieces)
    ids = named_ids(tokenizer, model.get("unk_token"))
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "ids": ids,
        "adds_bos": tokenizer.adds_bos,
        "chat_template": tokenizer.chat_template,
    }
    if is_pieces:
        return TokenTable(
            model="llama", pre="default", scores=scores_of(tokens, merges, path), space_prefix=begins_with_space(raw, path), **common
        )
    pre, takes_whole_words = cutter(raw, path)
    if bool(model.get("ignore_merges")) != takes_whole_words:
        warn(f"llama.cpp {'takes' if takes_whole_words else 'does not take'} a word that is a token as it is; this tokenizer differs there")
    return TokenTable(model="gpt2", pre=pre, merges=[" ".join(merge) for merge in merges], **common)


def read_tokenizer(directory: Path) -> dict[str, Any]:
    """tokenizer.json, or what it would say, where there is only tokenizer.model or vocab.json."""
    if (directory / names.TOKENIZER).exists():
        return read_json(directory, names.TOKENIZER)
    config = read_json(directory, names.TOKENIZER_CONFIG) if (directory / names.TOKENIZER_CONFIG).exists() else {}
    built = read_vocabulary(directory, config)
    assert built is not None, "Tokenizer refuses a directory without a vocabulary"
    found: dict[str, Any] = json.loads(built.to_str())
    return found


def split_merge(merge: str, vocab: Mapping[str, int]) -> tuple[str, str]:
    """`a b` of an older file; where a piece has a space in it, the split that makes two known pieces."""
    pairs = [(merge[:i], merge[i + 1 :]) for i, letter in enumerate(merge) if letter == " "]
    return next((pair for pair in pairs if pair[0] in vocab and pair[1] in vocab), pairs[0])


def added_tokens(raw: Mapping[str, Any], directory: Path) -> dict[int, dict[str, Any]]:
    """id -> added token: tokenizer.json's, and those that tokenizer_config.json alone lists."""
    config = read_json(directory, names.TOKENIZER_CONFIG) if (directory / names.TOKENIZER_CONFIG).exists() else {}
    listed = {int(number): token for number, token in (config.get("added_tokens_decoder") or {}).items()}
    return listed | {token["id"]: token for token in raw.get("added_tokens") or []}


def tokens_and_types(
    vocab: Mapping[str, int],
    added: Mapping[int, Mapping[str, Any]],
    tokenizer: Tokenizer,
    rows: int,
    *,
    unknown: str | None,
    is_pieces: bool,
) -> tuple[list[str], list[int]]:
    """Each row's text and kind. Rows that no token has get a name that no text has."""
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for text, number in vocab.items():
        tokens[number], types[number] = text, BYTE if is_pieces and BYTE_PIECE.fullmatch(text) else NORMAL
    for number, token in added.items():
        text = token["content"]
        is_control = token.get("special") or number in tokenizer.special_ids or text in tokenizer.control
        tokens[number] = text if is_control else text.replace(SPACE, " ")  # found in the text before spaces are replaced
        types[number] = CONTROL if is_control else USER_DEFINED
    for number in tokenizer.special_ids:
        types[number] = CONTROL
    if unknown is not None and is_pieces:
        types[vocab[unknown]] = UNKNOWN
    return tokens, types


def scores_of(tokens: Sequence[str], merges: Sequence[Sequence[str]], where: Path) -> list[float]:
    """Minus the rank of the first merge that makes a piece; pieces that no merge makes come last."""
    ranks: dict[str, int] = {}
    mixed = 0
    before = ""
    for rank, (left, right) in enumerate(merges):
        made = left + right
        mixed += made != before and made in ranks
        ranks.setdefault(made, rank)
        before = made
    if mixed:
        why = "its merges are not sorted by the piece that they make, and llama.cpp knows pieces alone"
        warn(f"{where}: {why} ({mixed:,} of {len(merges):,}): it may cut some texts otherwise")
    return [float(-ranks.get(token, len(merges))) for token in tokens]


def begins_with_space(raw: Mapping[str, Any], where: Path) -> bool:
    """Whether a space is put before a text. UserError of another preparation than SentencePiece's."""
    normalizer, before = raw.get("normalizer"), raw.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    kinds = [step.get("type") for step in steps]
    if before is None and kinds in (["Prepend", "Replace"], ["Replace"]):
        return kinds[0] == "Prepend"
    of_pieces = before is not None and before.get("type") == "Metaspace" and before.get("replacement") == SPACE and not before.get("split")
    if not kinds and of_pieces and before is not None:
        prepends = before.get("prepend_scheme") != "never"
        if prepends:
            warn("llama.cpp puts a space before every text, this tokenizer only before one that does not begin with one")
        return prepends
    raise UserError("prepares texts in a way that llama.cpp has no form for", where=where)


def cutter(raw: Mapping[str, Any], where: Path) -> tuple[str, bool]:
    """llama.cpp's word for what cuts a text into words, and whether it takes a word that is a token as it is."""
    shape = tuple(shape_of(raw.get("pre_tokenizer")))
    if shape not in CUTTERS:
        known = ", ".join(word for word, _ in CUTTERS.values())
        raise UserError(f"cuts texts by a rule that is none of {known}", where=where, hint="llama.cpp must know the rule by its name")
    if raw.get("normalizer") not in (None, {"type": "NFC"}):
        raise UserError("changes texts in a way that llama.cpp has no form for (normalizer)", where=where)
    return CUTTERS[shape]


def shape_of(step: Mapping[str, Any] | None) -> list[str]:
    """A pre_tokenizer in words, one for each step."""
    if step is None:
        return []
    kind = step.get("type")
    if kind == "Sequence":
        return [word for inner in step["pretokenizers"] for word in shape_of(inner)]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return ["bytes, words" if step.get("use_regex", True) else "bytes"]
    if kind == "Digits" and step.get("individual_digits"):
        return ["digits"]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [f"Split {step.get('pattern', {}).get('Regex')}"]
    return [str(kind)]


def named_ids(tokenizer: Tokenizer, unknown: str | None) -> dict[str, int]:
    """The ids with a part of their own; further ends of an answer go where llama.cpp looks for more of them."""
    others = sorted(tokenizer.eos_ids - {tokenizer.eos_id})
    named: dict[str, int | None] = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "eot": others[0] if others else None,
        "eom": others[1] if len(others) > 1 else None,
        "unk": tokenizer.id_of(unknown) if unknown else None,
        "pad": tokenizer.id_of(tokenizer.special_tokens.get("pad_token", "")),
    }
    return {name: number for name, number in named.items() if number is not None}


def add_tokens(writer: Any, table: TokenTable) -> None:
    """The table under the format's keys."""
    writer.add_tokenizer_model(table.model)
    writer.add_tokenizer_pre(table.pre)
    writer.add_token_list(table.tokens)
    writer.add_token_types(table.types)
    if table.scores:
        writer.add_token_scores(table.scores)
    if table.merges:
        writer.add_token_merges(table.merges)
    if table.space_prefix is not None:
        writer.add_add_space_prefix(table.space_prefix)
    for name, number in table.ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(table.adds_bos)
    writer.add_add_eos_token(False)
    if table.chat_template is not None:
        writer.add_chat_template(table.chat_template)
