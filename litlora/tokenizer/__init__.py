"""Text to token ids and back, from a model directory's own `tokenizer.json`, or from what it has in its place (`vocabularies.py`).

The arithmetic is the `tokenizers` package's. What is added here is what a trainer needs beside it: which ids begin and
end a text, control strings that stay text when a user wrote them, and decoding token by token.

Control tokens never reach the package by their names. They are found in the text first, each is replaced by a
stand-in (an added token of our own, which splits the text exactly as the control token would), and the stand-ins' ids
are exchanged afterwards. So one and the same text may hold `</s>` as the end of a turn and `</s>` as five letters.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, normalizers

from litlora.errors import UserError
from litlora.tokenizer.templates import DEFAULT, FILE, listed_templates, template_files
from litlora.tokenizer.vocabularies import SPACE, added_tokens, byte_letters, named_pieces, read_vocabulary

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # in which a new vocabulary is kept
BORDERS = ("<s>", "</s>", "<bos>", "<eos>", "<unk>", "<pad>")  # never said by a model, however a file flags them
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A model's tokenizer.

    bos_id      the id that begins a text, or None
    adds_bos    whether a plain text begins with it (a chat template decides for itself)
    eos_id      the id that ends a text, or None
    eos_ids     every id that ends an answer: the tokenizer's, config.json's and generation_config.json's
    size        how many ids are known; a model may have more rows, and those are never sampled
    rows        of the model's embedding; a tokenizer may know more ids, and no text may hold those
    """

    def __init__(self, directory: str | Path, model_dir: str | Path | None = None, *, rows: int | None = None) -> None:
        """Reads `directory`; raises UserError where it has no vocabulary or a damaged one.

        `model_dir` is the whole model's directory, where it is another one: an adapter has a tokenizer and no config.json, and that
        and generation_config.json name end ids too. `rows`: what its config says of them; None: one for each id.
        """
        self.directory = Path(directory)
        model_dir = self.directory if model_dir is None else Path(model_dir)
        self._config = _read_json(self.directory / "tokenizer_config.json")
        self.special_tokens = self._named_tokens()
        self._tokenizer = self._read_vocabulary()
        self._tokenizer.no_padding()  # some are published with the padding of their last use
        self._tokenizer.no_truncation()

        self.bos_id = self._id_of_named("bos_token")
        models = [_read_json(model_dir / name) for name in ("generation_config.json", "config.json")]
        self._model_type = models[1].get("model_type")
        inside = models[1].get("text_config")  # of a model of text and images
        models += [inside] if isinstance(inside, dict) else []
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        ends = [i for config in models for i in _as_ids(config.get("eos_token_id")) if i < self.size]
        named_end = self._id_of_named("eos_token")
        self.eos_id = named_end if named_end is not None else next(iter(ends), None)
        self.eos_ids = frozenset([*ends, *([] if self.eos_id is None else [self.eos_id])])
        self.adds_bos = self._begins_plain_text()
        self.rows = self.size if rows is None else rows
        self._prepare_control()

    # ---- reading the directory ---------------------------------------------------------------------------------------

    def _read_vocabulary(self) -> tokenizers.Tokenizer:
        """The vocabulary with all its added tokens."""
        path = self.directory / "tokenizer.json"
        self._of_pieces = False
        if path.is_file():
            try:
                vocabulary = tokenizers.Tokenizer.from_buffer(path.read_bytes())
            except Exception as error:  # the package raises Exception itself
                raise UserError(f"not a tokenizer that the tokenizers package reads: {error}", where=path) from error
            self._add_tokens(vocabulary, only_missing=True)
            return vocabulary
        other = read_vocabulary(self.directory, self._config)
        if other is None:
            found = sorted(p.name for p in self.directory.iterdir())[:12] if self.directory.is_dir() else []
            raise UserError(
                "no tokenizer (looked for tokenizer.json, tokenizer.model, vocab.json with merges.txt)",
                where=self.directory,
                context=[f"found: {', '.join(found)}"] if found else ["there is no such directory"],
                hint="copy tokenizer.json and tokenizer_config.json from the base model's repository",
            )
        self._of_pieces = other.pre_tokenizer is None  # SentencePiece's
        if not self.special_tokens:
            self.special_tokens = named_pieces(self.directory)
        self._add_tokens(other, only_missing=False)
        named = [token for token in self.special_tokens.values() if other.token_to_id(token) is not None]
        other.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named])
        return other

    def _add_tokens(self, vocabulary: tokenizers.Tokenizer, *, only_missing: bool) -> None:
        """Tokens that are listed beside the vocabulary get their ids (Qwen 3 has Qwen 2.5's vocabulary and more of them)."""
        for number, token in added_tokens(self.directory, self._config, list(self.special_tokens.values())):
            if only_missing and vocabulary.token_to_id(token.content) is not None:
                continue
            vocabulary.add_tokens([token])
            if vocabulary.token_to_id(token.content) != number:
                raise UserError(
                    f"{token.content!r} has id {number} beside the vocabulary, which leaves {vocabulary.token_to_id(token.content)} for it",
                    where=self.directory,
                    hint="take all files of the tokenizer from the same release of the base model",
                )

    def _named_tokens(self) -> dict[str, str]:
        """`bos_token` and the like, as a chat template sees them."""
        older = _read_json(self.directory / "special_tokens_map.json")
        named = {}
        for name in NAMED:
            value = self._config[name] if name in self._config else older.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                named[name] = value
        return named

    def _id_of_named(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        found = None if token is None else self._tokenizer.token_to_id(token)
        if token is not None and found is None:
            raise UserError(f"{name} is {token!r}, which tokenizer.json does not know", where=self.directory / "tokenizer_config.json")
        return found

    def _begins_plain_text(self) -> bool:
        """Whether plain text gets a BOS: add_bos_token where it is written, else what the post-processor does."""
        if "add_bos_token" in self._config or "add_eos_token" in self._config:
            return bool(self._config.get("add_bos_token")) and self.bos_id is not None
        framed = self._tokenizer.encode("a", add_special_tokens=True).ids
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        if len(framed) == len(bare) or framed[: len(bare)] == bare:
            return False
        if self.bos_id is None:
            self.bos_id = framed[0]
            self.special_tokens["bos_token"] = str(self._tokenizer.id_to_token(framed[0]))
        return framed[0] == self.bos_id

    @cached_property
    def vocabulary_hash(self) -> str:
        """sha256 of what makes ids of a text, whatever files it was read from: where it is equal, ids have one meaning.

        Of the package's own form of it, once all tokens are added and the prefix is taken over (`legacy`, `add_prefix_space`).
        """
        return hashlib.sha256(json.dumps([self._tokenizer.to_str(), self._prefix]).encode()).hexdigest()

    @cached_property
    def hash(self) -> str:
        """sha256 of all that bears on the ids of a sample: the vocabulary, and what begins and ends a text and an answer."""
        borders = [self.special_tokens, self.bos_id, self.adds_bos, self.eos_id, sorted(self.eos_ids)]
        return hashlib.sha256(json.dumps([self.vocabulary_hash, borders], sort_keys=True).encode()).hexdigest()

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """The directory's templates by name, in files and in tokenizer_config.json; a file comes first."""
        return listed_templates(self._config) | self._template_files

    @cached_property
    def _template_files(self) -> dict[str, str]:
        return template_files(self.directory)

    @property
    def _in_use(self) -> dict[str, str]:
        """Of which transformers takes one by itself: where templates are files, none but those."""
        return self._template_files or listed_templates(self._config)

    @cached_property
    def chat_template(self) -> str | None:
        """The one in use: `default`. UserError where there are others alone."""
        named = self._in_use
        if named and DEFAULT not in named:
            raise UserError(
                f"has chat templates ({', '.join(named)}), none of them named default",
                where=self.directory,
                hint=f"say which with --chat_template ({', '.join(self.chat_templates)}), or write it into {FILE}",
            )
        return named.get(DEFAULT)

    @property
    def tool_template(self) -> str | None:
        """Another one for conversations with tools."""
        return self._in_use.get("tool_use")

    # ---- text to ids -------------------------------------------------------------------------------------------------

    def _prepare_control(self) -> None:
        """Finds the control tokens and gives the package a stand-in for each kind of them."""
        added = self._tokenizer.get_added_tokens_decoder()
        ends = {self._tokenizer.id_to_token(i) for i in [*self.eos_ids, *([] if self.bos_id is None else [self.bos_id])]}
        control = {
            number: token
            for number, token in added.items()
            if len(token.content) > 1 and (token.special or token.content in ends or _is_markup(token.content))
        }
        self.control = {token.content: number for number, token in control.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special) | self.eos_ids
        self._stand_ins: dict[str, str] = {}
        self._stand_in_ids: set[int] = set()
        # Flagged special, a token is left alone by `encode_special_tokens`; this changes no id.
        self._tokenizer.add_special_tokens([_flagged(token, token.content, special=True) for token in control.values()])
        self._tokenizer.encode_special_tokens = True
        for token in control.values():
            name = f"\ufdd0{token.lstrip:d}{token.rstrip:d}{token.normalized:d}\ufdd1"  # noncharacters: no text has them
            self._tokenizer.add_tokens([_flagged(token, name, special=False)])
            self._stand_ins[token.content] = name
            self._stand_in_ids.add(int(self._tokenizer.token_to_id(name) or 0))
        longest_first = sorted(self.control, key=lambda content: (-len(content), content))
        self._any_control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        special = [content for content in longest_first if self.control[content] in self.special_ids or content in BORDERS]
        self._special_control = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._prefix = self._take_over_prefix()

    def _take_over_prefix(self) -> str:
        """What we put before the first word of a text ourselves: Llama 2's space, or nothing.

        Llama 2's file puts one after every control token as well; its tokenizer class, which is what transformers
        serves the model with, does not (unless `legacy`), nor does SentencePiece. All put one at the start.
        """
        of_llama = str(self._config.get("tokenizer_class", "")).removesuffix("Fast") == "LlamaTokenizer"
        at_start = self._of_pieces or (of_llama and self._model_type in (None, "llama"))
        if not at_start or self._config.get("legacy", False):
            return ""
        shape = json.loads(self._tokenizer.normalizer.__getstate__()) if self._tokenizer.normalizer else {}
        steps = shape.get("normalizers", [])
        if [step.get("type") for step in steps] != ["Prepend", "Replace"] or self._tokenizer.pre_tokenizer is not None:
            return ""
        self._tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        return "" if self._config.get("add_prefix_space") is False else SPACE

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`, with no BOS or EOS added. `special`: control strings in it are control tokens, else they are text."""
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool, mark: str = "") -> list[list[int]]:
        """`encode` of many texts at once. `mark` is a character that `shield` put into them; it is taken out again."""
        prepared, found = [], []
        for text in texts:
            if "\ufdd0" in text and any(name in text for name in self._stand_ins.values()):
                raise UserError("a text holds U+FDD0 and U+FDD1, which Unicode keeps out of texts", hint="take them out")
            controls: list[int] = []
            if special:
                controls = [self.control[match[0]] for match in self._any_control.finditer(text)]
                text = self._any_control.sub(lambda match: self._stand_ins[match[0]], text) if controls else text
            text = text.replace(mark, "") if mark else text
            prepared.append(self._prefix + text if text and not text.startswith("\ufdd0") else text)
            found.append(controls)
        encodings = self._tokenizer.encode_batch_fast(prepared, add_special_tokens=False)
        return [self._exchange(encoding.ids, controls) for encoding, controls in zip(encodings, found, strict=True)]

    def refuse_beyond(self, ids: Sequence[int]) -> None:
        """UserError where the model has no row for one of the ids: a token that was added to the tokenizer alone."""
        if self.size > self.rows and (number := max(ids, default=0)) >= self.rows:  # Gemma 3 has such a token, for images
            raise UserError(
                f"the token {self.token_of(number)!r} has the id {number}, and the model's embedding {self.rows:,} rows: "
                "it was added to the tokenizer alone",
                hint="take the tokenizer that came with the model, or one whose tokens the model has rows for",
            )

    def _exchange(self, ids: list[int], controls: list[int]) -> list[int]:
        if not controls:
            return ids
        waiting = iter(controls)
        exchanged = [next(waiting) if i in self._stand_in_ids else i for i in ids]
        assert next(waiting, None) is None, "a stand-in was lost"
        return exchanged

    def encode_after(self, text: str, *, special: bool, mark: str = "") -> list[int]:
        """Ids of `text` as it stands after other text: without the space that some tokenizers put at a beginning."""
        for guard in ("\n", "a", ".", "0"):
            alone, together = self.encode_batch([guard, guard + text], special=special, mark=mark)
            if together[: len(alone)] == alone:
                return together[len(alone) :]
        return self.encode_batch([text], special=special, mark=mark)[0]

    def shield(self, text: str, mark: str, *, answer: bool = False) -> str:
        """`text` with `mark` inside each control string, so that `encode_batch(..., special=True, mark=mark)` takes it for text.

        In an answer only special tokens are shielded: `<think>` and `<tool_call>` are what a model says.
        """
        pattern = self._special_control if answer else self._any_control
        while pattern.search(text):
            text = pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        return text

    def specials_in(self, text: str, start: int = 0) -> Iterator[re.Match[str]]:
        """The special tokens written in `text` from position `start` on."""
        return self._special_control.finditer(text, start)

    def id_of(self, token: str) -> int | None:
        """The id of `token` as it is written in the vocabulary, or None."""
        found = self._tokenizer.token_to_id(token)
        return found if found is not None and found < self.size else None

    def token_of(self, number: int) -> str | None:
        """The vocabulary's writing of one id, or None."""
        return self._tokenizer.id_to_token(number) if 0 <= number < self.size else None

    # ---- ids to text -------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`. Ids outside the vocabulary, and special ones when skipped, leave nothing."""
        kept = [int(i) for i in ids if self._is_shown(int(i), skip_special)]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def _is_shown(self, number: int, skip_special: bool) -> bool:
        return 0 <= number < self.size and not (skip_special and number in self.special_ids)

    def stream(self, skip_special: bool = True) -> "TextStream":
        """Decodes one id at a time."""
        return TextStream(self, skip_special)

    @cached_property
    def _decoder_steps(self) -> list[dict[str, Any]]:
        decoder = self._tokenizer.decoder
        if decoder is None:
            return []
        shape = json.loads(decoder.__getstate__())
        return shape["decoders"] if shape.get("type") == "Sequence" else [shape]


class TextStream:
    """Decoding token by token: what `push` and `flush` gave, put together, is `decode` of all ids.

    Text is held back while it may still change: an unfinished character, or, where a vocabulary falls back to bytes,
    a run of byte tokens (the package decodes such a run as a whole).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        steps = tokenizer._decoder_steps
        kinds = [step.get("type") for step in steps]
        plain = all(step.get("pattern", {}).get("String") for step in steps if step.get("type") == "Replace")
        self._kind = "other"
        if kinds == ["ByteLevel"]:
            self._kind = "bytes"
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        elif plain and kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
            self._kind = "pieces"
            self._replace = (steps[0]["pattern"]["String"], steps[0]["content"])
            self._strip = (steps[3]["content"], steps[3]["start"]) if len(steps) == 4 and not steps[3]["stop"] else ("", 0)
            self._kind = "other" if len(steps) == 4 and steps[3]["stop"] else "pieces"
        self._pending = bytearray()
        self._ids: list[int] = []
        self._sent = 0

    def push(self, number: int) -> str:
        """The text that is certain now that this id is known; often empty."""
        if not self._tokenizer._is_shown(number, self._skip):
            return ""
        if self._kind == "other":
            return self._push_any(number)
        token = self._tokenizer.token_of(number) or ""
        if self._kind == "bytes":
            return self._utf8.decode(_bytes_of(token))
        token = token.replace(*self._replace)
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            self._pending.append(int(token[3:5], 16))
            return ""
        return self._stripped(self._take_pending() + token)

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        if self._kind == "bytes":
            return self._utf8.decode(b"", final=True)
        if self._kind == "pieces":
            return self._stripped(self._take_pending())
        text = self._tokenizer.decode(self._ids, skip_special=False)
        sent, self._sent = self._sent, len(text)
        return text[sent:]

    def _push_any(self, number: int) -> str:
        self._ids.append(number)
        text = self._tokenizer.decode(self._ids, skip_special=False)
        if text.endswith("\ufffd"):
            return ""
        sent, self._sent = self._sent, len(text)
        return text[sent:]

    def _take_pending(self) -> str:
        pending, self._pending = bytes(self._pending), bytearray()
        try:
            return pending.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(pending)

    def _stripped(self, text: str) -> str:
        content, count = self._strip
        while count and text.startswith(content):
            text, count = text[len(content) :], count - 1
        self._strip = (content, 0 if text else count)
        return text


def _is_markup(content: str) -> bool:
    """`<think>`, `[INST]`, `<|user|>`: a control token by its looks; runs of spaces and added words are text."""
    return (content[0], content[-1]) in (("<", ">"), ("[", "]")) and not any(c.isspace() for c in content)


def _flagged(token: AddedToken, content: str, *, special: bool) -> AddedToken:
    flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": token.normalized}
    return AddedToken(content, special=special, single_word=False, **flags)


_LETTERS = byte_letters()


def _bytes_of(token: str) -> bytes:
    """The bytes of a byte-level token; a token with other letters (an added one) stands for itself."""
    numbers = [_LETTERS.get(letter) for letter in token]
    return token.encode() if None in numbers else bytes(number for number in numbers if number is not None)


def _as_ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON ({error})", where=path) from error
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=path)
    return value
