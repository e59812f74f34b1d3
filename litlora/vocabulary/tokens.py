"""A BPE tokenizer that grows: more tokens and more merges, appended after its own. Every id that was there stays.

A new token is of use only if the merges lead to it, and those of the base come first. So a token is taken exactly where all
merges there are by then leave its text in two pieces: one more merge, of those two, makes it. Tokens that were learnt apart from
the base's merges lack this: of 4,000 so learnt for Llama 3's tokenizer on Chinese poems, 1,389 were never made. Continued
training (Purason et al. 2025, arXiv:2512.03989) gives it: the base cuts the text, and merges are learnt over its pieces.

Two kinds are known. Byte-level (GPT-2, Llama 3, Qwen): every byte has a letter, and tokens are written in these letters.
SentencePiece-like (Llama 2, TinyLlama): tokens are written as they read, with U+2581 for a space, and a character that is no
token falls back to the tokens of its bytes.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from litlora.checkpoint import names
from litlora.checkpoint.reading import file_in, parse_json, read_bytes, read_json
from litlora.errors import UserError
from litlora.tokenizer import SPACE
from litlora.vocabulary.text import chunks

BYTE_LEVEL, SENTENCEPIECE = "byte-level", "SentencePiece-like"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SEEN = 2  # a character or a pair that the text has once only becomes no token: nothing could be learnt about it
PRIVATE = 0x10000  # token i is the character PRIVATE + i to the trainer; none of these is white space
WRITTEN = decoders.ByteLevel()  # from the letters of bytes to text
ALONE, OPENER, LETTERS, SIGNS = "alone", "opener", "letters", "signs"


class Vocabulary:
    """What a tokenizer.json says, and what is added to it.

    ids         token -> id, added tokens included
    ranks       pair of tokens -> place of its merge: the lowest goes first
    control     what of them no merge may ever make out of a text: added tokens, and the names of bytes
    size        the id that the next token gets
    characters  new tokens that needed no merge;   merged  new tokens that needed one
    left_out    tokens that were not taken because no text would ever be cut into them
    """

    def __init__(self, directory: Path) -> None:
        """UserError where there is no tokenizer.json, or one that is not a BPE of a known kind."""
        others = next((files for files in names.VOCABULARIES if all((directory / name).exists() for name in files)), ())
        if others and names.TOKENIZER not in others:
            what = f"its vocabulary is in {' and '.join(others)}, and only a {names.TOKENIZER} can be extended"
            hint = "make one with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            raise UserError(what, where=directory, hint=hint)
        self.path = file_in(directory, names.TOKENIZER)
        raw = read_bytes(self.path)
        try:
            self.original = _plain(tokenizers.Tokenizer.from_buffer(raw))
        except Exception as error:  # the package raises Exception itself
            raise UserError(f"not a tokenizer that the tokenizers package reads: {error}", where=self.path) from error
        self._shape = parse_json(raw, self.path)
        model = self._shape["model"]
        self.kind = _kind_of(self._shape, self.path)
        self.ids: dict[str, int] = model.pop("vocab")
        merges = model.pop("merges")
        self._as_text = any(isinstance(merge, str) for merge in merges[:1])  # "a b"; newer files have ["a", "b"]
        pairs = (merge.split(" ") if self._as_text else merge for merge in merges)
        self.ranks: dict[tuple[str, str], int] = {(a, b): rank for rank, (a, b) in enumerate(pairs)}
        self._take_added_tokens(directory)
        self.control = {token["content"] for token in self._shape["added_tokens"]}
        self.control |= set(BYTES) if self.kind == SENTENCEPIECE else set()
        self.base_size = self.size = 1 + max(self.ids.values())
        self.characters: list[str] = []
        self.merged: list[str] = []
        self.left_out = 0

    def _take_added_tokens(self, directory: Path) -> None:
        """Give the added tokens the ids they have, as tokens of the model too: the package numbers those that are not anew.

        It counts from the number of the model's tokens, which grows. Some tokens are listed in tokenizer_config.json alone (Qwen 3).
        """
        added: list[dict[str, Any]] = self._shape.setdefault("added_tokens", [])
        known = {token["content"] for token in added}
        config = read_json(directory, names.TOKENIZER_CONFIG) if (directory / names.TOKENIZER_CONFIG).exists() else {}
        listed = config.get("added_tokens_decoder") or {}
        for number, token in sorted((int(number), token) for number, token in listed.items()):
            if token["content"] not in known:
                added.append({"id": number, "content": token["content"], **{flag: bool(token.get(flag, False)) for flag in FLAGS}})
        owners = {number: token for token, number in self.ids.items()}
        for token in added:
            number, content = token["id"], token["content"]
            if self.ids.setdefault(content, number) != number or owners.setdefault(number, content) != content:
                raise UserError(f"the added token {content!r} cannot have the id {number}", where=self.path, hint="download it again")

    # ---- growing -----------------------------------------------------------------------------------------------------

    @property
    def new(self) -> list[str]:
        """The new tokens in the order of their ids, which begin at `base_size`."""
        return self.characters + self.merged

    def pieces(self, text: str) -> list[str]:
        """What the merges make of a text written in the model's characters, each of which is a token."""
        parts = list(text)
        while len(parts) > 1:
            found = [(self.ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in self.ranks]
            if not found:
                break
            at = min(found)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts

    def add_characters(self, characters: Iterable[str], room: int) -> None:
        """Those that are no tokens yet, in order, until there are `room` new tokens. Byte-level tokenizers have them all."""
        assert not self.merged, "characters come first, so that every merge finds them"
        for character in characters:
            if self.size - self.base_size == room:
                return
            if character not in self.ids and self.kind == SENTENCEPIECE and _is_character(character):
                self._add(character)
                self.characters.append(character)

    def add_merged(self, candidates: Iterable[str], room: int) -> None:
        """Those of the tokens that one more merge reaches, in order, until there are `room` new tokens.

        One that is out of reach is tried again once others have been added; what remains is counted in `left_out`.
        """
        wanted = [token for token in dict.fromkeys(candidates) if len(token) > 1 and token not in self.ids]
        waiting = [token for token in wanted if all(letter in self.ids for letter in token) and self._is_left_whole(token)]
        before, next_rank = -1, 1 + max(self.ranks.values(), default=-1)
        while waiting and len(waiting) != before:
            before, later = len(waiting), []
            for token in waiting:
                parts = self.pieces(token)
                if len(parts) > 2:
                    later.append(token)
                elif self.size - self.base_size < room:
                    self._add(token)
                    self.merged.append(token)
                    self.ranks[parts[0], parts[1]] = next_rank
                    next_rank += 1
                else:
                    return
            waiting = later
        self.left_out = len(wanted) - len(self.merged)

    def _is_left_whole(self, token: str) -> bool:
        """Whether what comes before the merges lets it be: byte-level tokenizers cut text into words first, each in its own way."""
        if self.kind == SENTENCEPIECE:
            return " " not in token
        text = WRITTEN.decode([token])
        if "\ufffd" in text:  # it ends within a character, where no word ends
            return True
        normalizer = self.original.normalizer
        same = normalizer is None or normalizer.normalize_str(text) == text
        return same and len(self.original.pre_tokenizer.pre_tokenize_str(text)) == 1

    def _add(self, token: str) -> None:
        assert token not in self.ids
        self.ids[token] = self.size
        self.size += 1

    # ---- as a tokenizer ----------------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """tokenizer.json with all that was added."""
        vocab = dict(sorted(self.ids.items(), key=lambda item: item[1]))
        pairs = sorted(self.ranks, key=self.ranks.__getitem__)
        merges = [f"{a} {b}" for a, b in pairs] if self._as_text else pairs
        shape = {**self._shape, "model": {**self._shape["model"], "vocab": vocab, "merges": merges}}
        return json.dumps(shape, ensure_ascii=False).encode()  # not indented: that takes ten times as long

    def tokenizer(self) -> tokenizers.Tokenizer:
        """As it is now."""
        return _plain(tokenizers.Tokenizer.from_buffer(self.encode()))

    def check(self) -> None:
        """The package itself agrees: every token has its id, and merges alone lead to every new one."""
        grown = self.tokenizer()
        assert all(grown.token_to_id(token) == number for token, number in self.ids.items()), "an id moved"
        model = grown.model
        if getattr(model, "ignore_merges", False):  # else a whole word that is a token would be found without any merge
            model.ignore_merges = False
        for token in self.new:
            assert [piece.value for piece in model.tokenize(token)] == [token], f"{token!r} is out of reach"

    def base_pieces(self) -> list[list[int]]:
        """For each new token, the ids that the base has used for its text so far."""
        model = self.original.model
        return [[piece.id for piece in model.tokenize(token)] for token in self.new]


def _plain(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Without the padding and cutting that some are published with; special tokens written in a text are text."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _kind_of(shape: dict[str, Any], path: Path) -> str:
    model = shape["model"]
    name = model.get("type") or ("BPE" if "merges" in model else "nameless")
    if name != "BPE":
        raise UserError(f"its tokenizer is a {name} model: only BPE grows by merges", where=path, hint="use a base with a BPE tokenizer")
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if affixes:
        raise UserError(f"its tokenizer marks the parts of words ({affixes[0]}), which cannot be extended", where=path)
    if model.get("byte_fallback") and all(name in model["vocab"] for name in BYTES):
        return SENTENCEPIECE
    outer = shape.get("pre_tokenizer") or {}
    if any(step.get("type") == "ByteLevel" for step in [outer, *outer.get("pretokenizers", [])]):
        return BYTE_LEVEL
    raise UserError("its tokenizer is a BPE that is neither byte-level nor falls back to bytes: some text would be lost", where=path)


def _is_character(token: str) -> bool:
    """Whether it is one character to see: white space and control characters stay the bytes that the base learnt them as."""
    return len(token) == 1 and token.isprintable() and not token.isspace()


# ---- where new tokens come from --------------------------------------------------------------------------------------


def take(vocabulary: Vocabulary, other: Vocabulary, room: int | None) -> None:
    """Up to `room` (None: all) of another tokenizer's tokens, in its order. UserError where it is of another kind."""
    if other.kind != vocabulary.kind:
        what = f"this tokenizer is {other.kind}, and that of the base is {vocabulary.kind}: their tokens are written differently"
        raise UserError(what, where=other.path, hint="use a tokenizer of the base's kind, or learn the tokens: --data FILE")
    room = len(other.ids) if room is None else room
    tokens = [token for token, _ in sorted(other.ids.items(), key=lambda item: item[1]) if token not in other.control]
    vocabulary.add_characters(tokens, room)
    vocabulary.add_merged(tokens, room)


def learn(vocabulary: Vocabulary, lines: Sequence[str], room: int) -> None:
    """Up to `room` tokens for the text in `lines`: its characters (SentencePiece-like), then BPE merges that go on from the base's."""
    if vocabulary.kind == SENTENCEPIECE:
        vocabulary.add_characters(common_characters(vocabulary.original, lines), room)
    more = room - len(vocabulary.new)
    if more:
        vocabulary.add_merged(learnt_merges(vocabulary, lines, more), room)


def common_characters(tokenizer: tokenizers.Tokenizer, lines: Sequence[str]) -> list[str]:
    """The characters of the text as the tokenizer normalizes it, the most frequent first."""
    normalizer = tokenizer.normalizer
    counts: Counter[str] = Counter()
    for chunk in chunks(lines):
        counts.update(normalizer.normalize_str(chunk) if normalizer else chunk)
    return [character for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= SEEN]


def learnt_merges(vocabulary: Vocabulary, lines: Sequence[str], room: int) -> list[str]:
    """Tokens made by the most frequent pairs of pieces, in the order in which they were learnt; somewhat more than `room`."""
    trainer = trainers.BpeTrainer(
        vocab_size=len(vocabulary.ids) + room + 100,  # some of them may be there already: the strings of added tokens
        initial_alphabet=[chr(PRIVATE + number) for number in vocabulary.ids.values()],
        min_frequency=SEEN,
        show_progress=False,
    )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(spelt(vocabulary, lines), trainer)
    texts = {chr(PRIVATE + number): token for token, number in vocabulary.ids.items()}
    merges = json.loads(learner.to_str())["model"]["merges"]
    return ["".join(texts[character] for character in a + b) for a, b in merges]


def spelt(vocabulary: Vocabulary, lines: Sequence[str]) -> Iterator[str]:
    """The text with one private character for each piece, and a space wherever no token may reach across."""
    tokenizer = vocabulary.tokenizer()
    kinds = {number: joins(token, vocabulary.kind) for token, number in vocabulary.ids.items()}
    openers = {number for token, number in vocabulary.ids.items() if vocabulary.kind == SENTENCEPIECE and token.startswith(SPACE)}
    for chunk in chunks(lines):
        encoding = tokenizer.encode(chunk, add_special_tokens=False)
        letters, kind, word = [], ALONE, None
        for number, place in zip(encoding.ids, encoding.word_ids, strict=True):
            before, kind = kind, kinds[number]
            goes_on = before in (kind, OPENER) and kind != ALONE and number not in openers and place == word
            word = place
            letters.append(chr(PRIVATE + number) if goes_on else " " + chr(PRIVATE + number))
        yield "".join(letters)


def joins(token: str, kind: str) -> str:
    """What a piece may be joined with.

    A byte-level tokenizer splits text into words itself. A SentencePiece-like one has no rule for that, its trainer had: words
    begin at a space, letters and signs stay apart, and digits, white space and bytes stay alone.
    """
    if kind == BYTE_LEVEL:
        return LETTERS
    classes = {unicodedata.category(character)[0] for character in token.removeprefix(SPACE)}
    if not classes:
        return OPENER
    return LETTERS if classes <= {"L", "M"} else SIGNS if classes <= {"P", "S"} and SPACE not in token[1:] else ALONE
