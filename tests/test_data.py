"""litlora/data: samples cut and counted, orders and batches that change no result."""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import byte_level, real

from litlora.data.batches import Batch, pack, share_of_rank
from litlora.data.order import epoch_order
from litlora.data.rows import read_rows
from litlora.data.samples import IGNORE, DataSet, Sample, load_data
from litlora.errors import UserError
from litlora.options import RowsOptions
from litlora.prompts import Prompts
from litlora.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_end|>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>assistant\n' }}{% endif %}"
)

ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return Prompts(Tokenizer(byte_level(tmp_path_factory.mktemp("t"))), CHATML)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def load(path: Path | str, prompts: Prompts, length: int = 512, *, on_error: Any = "stop", map: Sequence[str] = (), **more: Any) -> DataSet:
    return load_data([str(path)], prompts, rows=RowsOptions(on_error=on_error, map=list(map)), max_seq_length=length, **more)


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def pairs(n: int, repeat: int = 1) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(n) for _ in range(repeat)]


# ---- samples -----------------------------------------------------------------------------------------------------------


def test_a_sample_is_shifted_once_and_graded_to_its_end(tmp_path: Path, prompts: Prompts) -> None:
    """D01, D03: targets are the next ids, IGNORE in the prompt; the last target is EOS."""
    data = load(jsonl(tmp_path / "rows.jsonl", pairs(1)), prompts)
    sample, tokenizer = data.train[0], prompts.tokenizer
    assert sample.tokens.dtype == sample.targets.dtype == np.int32
    assert tokenizer.decode(sample.tokens, skip_special=False) == "<|im_end|>user\nquestion 0</s><|im_end|>assistant\nanswer 0"
    shown = sample.targets != IGNORE
    assert tokenizer.decode(sample.targets[shown], skip_special=False) == "answer 0</s>"
    assert (sample.targets[:-1][shown[:-1]] == sample.tokens[1:][shown[:-1]]).all()
    assert sample.where == f"{tmp_path / 'rows.jsonl'}:1:1"
    assert (data.tokens, data.graded, data.longest) == (len(sample.tokens), int(shown.sum()), len(sample.tokens))
    assert sample.graded == data.graded


def beyond(directory: Path, *tokens: str, **more: Any) -> Prompts:
    """With words that were added to the tokenizer alone."""
    size = Tokenizer(byte_level(directory)).size
    path = directory / "tokenizer.json"
    added = tokenizers.Tokenizer.from_file(str(path))
    added.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokens])
    added.save(str(path))
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    return Prompts(Tokenizer(directory, rows=size), CHATML)


@pytest.mark.parametrize("form", ["conversations", "texts"])
def test_a_row_that_holds_a_token_without_a_row_in_the_embedding_is_refused_alone(tmp_path: Path, form: str) -> None:
    """F14: named by its place, and left out where that was asked for. Caught: all that was tokenized with it refused."""
    prompts = beyond(tmp_path / "t", "foo")
    rows: list[Any] = [{"prompt": "q", "completion": said} for said in ("a", "a foo", "b")]
    path = jsonl(tmp_path / "rows.jsonl", rows if form == "conversations" else [{"text": row["completion"]} for row in rows])
    with pytest.raises(UserError, match="the token 'foo' has the id") as refused:
        load(path, prompts)
    assert refused.value.where == f"{path}:2:1" and "take the tokenizer that came with the model" in refused.value.hint
    data = load(path, prompts, on_error="skip")
    assert (data.counts.rows, data.counts.skipped, len(data.train)) == (3, 1, 2)
    assert data.skipped[0].startswith(f"{path}:2:1: the token 'foo'")


def test_an_end_token_without_a_row_in_the_embedding_is_refused(tmp_path: Path) -> None:
    """Also where it is put behind an answer by us. Caught: it was appended unseen, and the embedding asked for its row."""
    prompts = beyond(tmp_path / "t", "<end>", eos_token="<end>")
    plain = Prompts(prompts.tokenizer, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a"}])
    for file in (path, jsonl(tmp_path / "texts.jsonl", [{"text": "a"}])):
        with pytest.raises(UserError, match="the token '<end>' has the id") as refused:
            load(file, plain)
        assert refused.value.where == f"{file}:1:1"
    with pytest.raises(UserError, match="nothing to train on: the only row was skipped") as refused:
        load(path, plain, on_error="skip")
    assert "the token '<end>'" in refused.value.context[0]


def test_of_a_long_text_nothing_is_learnt_from_the_piece_on_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one row, and skipped once."""
    monkeypatch.setattr("litlora.data.rows.PIECE", 4)
    prompts = beyond(tmp_path / "t", "foo")
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "a.txt", "one\ntwo\na foo\nfour\nfoo\n")
    write(tmp_path / "texts" / "b.txt", "five\nsix\n")
    data = load(tmp_path / "texts", prompts, 4, on_error="skip")
    assert (data.counts.rows, data.counts.skipped) == (2, 1)
    said = "".join(prompts.tokenizer.decode(sample.targets.tolist()) for sample in data.train)
    assert said == "ne\ntive\nsix\n"  # the whole sample before it; no text's first token is predicted


def test_without_masking_every_token_is_graded(tmp_path: Path, prompts: Prompts) -> None:
    data = load(jsonl(tmp_path / "rows.jsonl", pairs(1)), prompts, mask_prompt=False)
    assert (data.train[0].targets != IGNORE).all()


def test_long_samples_are_cut_and_counted(tmp_path: Path, prompts: Prompts) -> None:
    """D03, F14. A sample cut before its answer trains nothing, so it is left out, and counted."""
    rows = [{"prompt": "q", "completion": "a" * 50}, {"prompt": "q" * 90, "completion": "a"}, {"prompt": "q", "completion": "a"}]
    whole = load(jsonl(tmp_path / "rows.jsonl", rows), prompts)
    assert [whole.counts.truncated, whole.counts.nothing_graded] == [0, 0]
    data = load(tmp_path / "rows.jsonl", prompts, 40)
    assert [data.counts.truncated, data.counts.nothing_graded, len(data.train), data.longest] == [2, 1, 2, 40]
    assert (data.train[0].tokens == whole.train[0].tokens[:40]).all()
    assert "2 cut to length · 1 without a graded token" in data.summary()


def test_rows_with_nothing_to_train_are_refused_with_the_count(tmp_path: Path, prompts: Prompts) -> None:
    """F14."""
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "q" * 90, "completion": "a"}] * 3 + [{"prompt": 1, "completion": "a"}])
    with pytest.raises(UserError, match="of 4 rows, 3 have no graded token within 40 tokens and 1 was skipped"):
        load(path, prompts, 40, on_error="skip")
    with pytest.raises(UserError, match="no rows") as caught:
        load(write(tmp_path / "rows.csv", "prompt,completion\n"), prompts)
    assert "row below" in caught.value.hint
    with pytest.raises(UserError, match="not text") as caught:
        load(path, prompts, 40)
    assert caught.value.hint == "--rows.on_error skip trains without such rows"
    with pytest.raises(UserError, match="all 2 rows were skipped"):
        load(jsonl(path, [{"prompt": 1, "completion": "a"}, {"text": "t"}]), prompts, on_error="skip")


def test_a_text_is_cut_into_pieces_that_predict_every_token_once(tmp_path: Path) -> None:
    """D02, D03: one BOS at the very beginning, EOS at the very end."""
    prompts = Prompts(real("../models/stories3m-llama"))
    text = "Once upon a time there was a fox. " * 20
    ids = prompts.tokenizer.encode(text, special=False)
    data = load(write(tmp_path / "story.txt", text), prompts, 16)
    assert [int(i) for sample in data.train for i in sample.targets] == [*ids, 2]
    assert [int(i) for sample in data.train for i in sample.tokens] == [1, *ids]
    assert {len(sample.tokens) for sample in data.train[:-1]} == {16}
    assert data.counts.truncated == 0
    assert data.formats == {str(tmp_path / "story.txt"): "text"}


def test_a_long_text_is_learnt_as_if_read_at_once(tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a document is tokenized by has no say in what is learnt. Against: the end of each piece dropped; an end token in between."""
    text = "".join(f"line {n} of a text\n" for n in range(400))
    path = write(tmp_path / "text.txt", text)
    whole = load(path, prompts, 64)
    for piece in (10, 500, 2000):
        monkeypatch.setattr("litlora.data.rows.PIECE", piece)
        assert len(list(read_rows(path))) > 2
        cut = load(path, prompts, 64)
        assert [sample.tokens.tolist() for sample in cut.train] == [sample.tokens.tolist() for sample in whole.train]
        assert [sample.targets.tolist() for sample in cut.train] == [sample.targets.tolist() for sample in whole.train]


def test_a_history_that_is_rewritten_gives_samples_that_stay_together(tmp_path: Path) -> None:
    """One row, several samples: never on both sides of the split."""
    template = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '-' }}</s>{% endfor %}"
    prompts = Prompts(Tokenizer(byte_level(tmp_path / "t")), template)
    rows = [{"messages": [*ASKED, {"role": "user", "content": f"r{i}"}, ASKED[1]]} for i in range(10)]
    data = load(jsonl(tmp_path / "rows.jsonl", rows), prompts)
    assert len(data.train) == 20
    held = data.split(0.3, seed=3)
    assert len(held.validation) == 6
    assert not {sample.where for sample in held.train} & {sample.where for sample in held.validation}


@pytest.mark.parametrize("seed", range(5))
def test_doubles_of_a_row_stay_on_one_side_of_the_split(tmp_path: Path, prompts: Prompts, seed: int) -> None:
    """Held-out rows that were trained on prove nothing. Against: groups by place instead of content."""
    path = jsonl(tmp_path / "rows.jsonl", random.Random(seed).sample(pairs(40, repeat=3), 120))
    data = load(path, prompts).split(0.1, seed=seed)
    assert (len(data.train), len(data.validation)) == (108, 12)
    assert not {sample.tokens.tobytes() for sample in data.train} & {sample.tokens.tobytes() for sample in data.validation}
    assert len(data.weights) == len(data.train) == len(data.groups)


def test_the_split_is_the_seeds_and_the_rows_not_their_orders(tmp_path: Path, prompts: Prompts) -> None:
    one, other = jsonl(tmp_path / "a.jsonl", pairs(50)), jsonl(tmp_path / "b.jsonl", pairs(50)[::-1])

    def held(path: Path, seed: int) -> set[bytes]:
        return {sample.tokens.tobytes() for sample in load(path, prompts).split(0.2, seed).validation}

    assert held(one, 1) == held(other, 1) != held(one, 2)
    assert len(load(one, prompts).split(0.2, 1, max_samples=3).validation) == 3
    assert len(load(one, prompts).split(0.2, 1, max_samples=3).train) == 40
    assert len(load(one, prompts).split(0.0, 1).validation) == 0
    with pytest.raises(UserError, match="one row alone cannot be trained on"):
        load(jsonl(one, pairs(1, repeat=5)), prompts).split(0.2, 1)
    two = load(jsonl(one, pairs(2)), prompts).split(0.9, 1)
    assert (len(two.train), len(two.validation)) == (1, 1)


def test_files_have_weights(tmp_path: Path, prompts: Prompts) -> None:
    one, other = jsonl(tmp_path / "a.jsonl", pairs(2)), jsonl(tmp_path / "b:3.jsonl", pairs(3))
    rows = RowsOptions()
    data = load_data([f"{one}:0.5", str(other), f"{other}:2"], prompts, rows=rows, max_seq_length=99)
    assert data.weights == [0.5] * 2 + [1.0] * 3 + [2.0] * 3
    for wrong, reason in ((f"{one}:0", "the weight 0 is not above 0"), (f"{one}:nan", "the weight nan"), (f"{one}:x", "no such file")):
        with pytest.raises(UserError, match=reason):
            load_data([wrong], prompts, rows=rows, max_seq_length=99)


def test_the_demo_has_training_and_held_out_rows(prompts: Prompts) -> None:
    data = load("demo", prompts)
    assert len(data.train) == 1600
    assert len(data.validation) == len(load("demo", prompts, heldout=True).train) == 200
    assert not {s.tokens.tobytes() for s in data.train} & {s.tokens.tobytes() for s in data.validation}
    assert data.formats["demo:train"] == "alpaca"


def test_the_fingerprint_changes_with_whatever_changes_samples(tmp_path: Path, prompts: Prompts) -> None:
    path = jsonl(tmp_path / "a.jsonl", pairs(3))
    first = load(path, prompts).fingerprint
    assert first == load(path, prompts).fingerprint == load(jsonl(tmp_path / "b.jsonl", pairs(3)), prompts).fingerprint
    others = [
        load(path, prompts, 500),
        load(path, prompts, mask_prompt=False),
        load(f"{path}:2", prompts),
        load(path, Prompts(prompts.tokenizer)),
    ]
    others += [load(jsonl(path, pairs(4)), prompts)]
    assert len({first, *(data.fingerprint for data in others)}) == 6


def test_reading_and_ordering_data_imports_no_torch() -> None:
    """DESIGN section 2. Only batches.py needs it."""
    code = "import sys, litlora.data.samples, litlora.data.order; assert not {'torch', 'lightning_fabric', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- orders ------------------------------------------------------------------------------------------------------------


def test_every_sample_comes_once_an_epoch_in_another_order() -> None:
    """N12, R03."""
    orders = [epoch_order([1.0] * 13, seed=5, epoch=epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(13)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != epoch_order([1.0] * 13, seed=6, epoch=0)


def test_an_order_is_a_function_of_seed_and_epoch_alone() -> None:
    """R03: no global state, and the same on every machine and version: the numbers are written down."""
    np.random.seed(0)
    random.seed(0)
    before = random.getstate()
    assert epoch_order([1.0] * 8, seed=1234, epoch=2) == epoch_order([1.0] * 8, seed=1234, epoch=2) == [1, 4, 0, 2, 6, 3, 5, 7]
    assert random.getstate() == before
    code = "from litlora.data.order import epoch_order; print(epoch_order([1.0] * 8, seed=1234, epoch=2))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout) == [
        1,
        4,
        0,
        2,
        6,
        3,
        5,
        7,
    ]


def test_weights_are_passes_per_epoch() -> None:
    weights = [1.0] * 10 + [2.0] * 10 + [0.3] * 10 + [2.5] * 4 + [0.0] * 5
    seen = [Counter(epoch_order(weights, 7, epoch)) for epoch in range(200)]
    for counts in seen:
        assert [counts[i] for i in range(20)] == [1] * 10 + [2] * 10
        assert sum(counts[i] for i in range(20, 30)) == 3
        assert sorted(counts[i] for i in range(30, 34)) == [2, 2, 3, 3]
        assert not any(counts[i] for i in range(34, 39))
    drawn = [sum(counts[i] for counts in seen) for i in range(20, 30)]
    assert min(drawn) > 35  # 60 expected, each epoch another choice


@given(st.lists(st.sampled_from([0.25, 1.0, 1.5, 3.0]), min_size=1, max_size=60), st.integers(0, 2**31), st.integers(0, 9))
def test_orders_have_the_length_that_the_weights_say(weights: list[float], seed: int, epoch: int) -> None:
    expected = sum(math.floor(w) for w in weights) + sum(
        math.floor(part * sum(1 for w in weights if w % 1 == part) + 0.5) for part in {w % 1 for w in weights}
    )
    assert len(epoch_order(weights, seed, epoch)) == expected


# ---- batches -----------------------------------------------------------------------------------------------------------


def samples_of(lengths: Sequence[int]) -> list[Sample]:
    made = []
    for n, length in enumerate(lengths):
        tokens = np.arange(length, dtype=np.int32) + 1000 * (n + 1)
        targets = np.where(np.arange(length) % 3 == 0, IGNORE, tokens + 1).astype(np.int32)
        made.append(Sample(tokens, targets, f"row {n}"))
    return made


def taken_apart(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The samples of a batch, from its segments or its rows."""
    parts = []
    if batch.segments is None:
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            length = next((n for n, token in enumerate(tokens) if token == 0), len(tokens))
            assert set(targets[length:]) <= {IGNORE}
            parts.append((tokens[:length], targets[:length]))
        return parts
    assert batch.tokens.shape[0] == 1
    assert batch.prefix + sum(batch.segments) == batch.tokens.shape[1]
    tokens, targets = batch.tokens[0].tolist(), batch.targets[0].tolist()
    start = batch.prefix
    for length in batch.segments:
        own = slice(start, start + length)
        parts.append((tokens[: batch.prefix] + tokens[own], targets[: batch.prefix] + targets[own]))
        start += length
    return parts


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 100), st.booleans())
def test_a_batch_holds_whole_samples_and_each_sample_is_in_one(lengths: list[int], limit: int, packing: bool) -> None:
    """N10's and N12's ground: nothing split, nothing lost, no label of one sample beside tokens of another. Against: FFD with >."""
    samples = samples_of(lengths)
    batches = pack(samples, limit, packing)
    parts = [part for batch in batches for part in taken_apart(batch)]
    assert sorted(parts) == sorted((sample.tokens.tolist(), sample.targets.tolist()) for sample in samples)
    for batch in batches:
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens.numel() <= limit or len(taken_apart(batch)) == 1
        assert batch.graded == int((batch.targets != IGNORE).sum())
    assert sum(batch.graded for batch in batches) == sum(sample.graded for sample in samples)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 25), st.integers(0, 2)), min_size=1, max_size=25), st.integers(1, 150))
def test_a_batch_that_shares_a_beginning_holds_the_same_samples(kinds: list[tuple[int, int, int]], limit: int) -> None:
    """N09's ground. Rows of a few templates, some of them twice, some graded from the start.

    Caught: a beginning alike in its tokens but not in what is graded; the last token of a sample that is another's beginning shared.
    """
    samples = [templated(*kind) for kind in kinds]
    batches = pack(samples, limit, share=True)
    parts = [part for batch in batches for part in taken_apart(batch)]
    assert sorted(parts) == sorted((sample.tokens.tolist(), sample.targets.tolist()) for sample in samples)
    assert all(batch.tokens.numel() <= limit or len(taken_apart(batch)) == 1 for batch in batches)
    assert all(min(batch.segments or ()) > 0 for batch in batches)
    assert sum(batch.graded for batch in batches) == sum(sample.graded for sample in samples)
    apart = pack(samples, limit)
    assert sum(batch.tokens.numel() + 24 for batch in batches) <= sum(batch.tokens.numel() + 24 for batch in apart)


def templated(template: int, length: int, seed: int) -> Sample:
    """A sample that begins with 30 words of a template; the templates agree in their first 12. Template 3 is graded throughout."""
    words = [*range(100, 112), *range(200 + 100 * (template % 3), 218 + 100 * (template % 3))]
    tokens = np.array([*words, *np.random.default_rng(seed).integers(0, 9, length)], dtype=np.int32)
    targets = np.append(tokens[1:], 9)
    targets[: 0 if template == 3 else 29] = IGNORE
    return Sample(tokens, targets, f"{template} {length}")


def test_what_is_shared_is_computed_once() -> None:
    """Two templates of 30 words, 8 rows of 10 more words of each: two streams of 29 + 8 x 11 tokens, where they were 640."""
    samples = [templated(template, 10, seed) for seed in range(8) for template in (0, 1)]
    batches = pack(samples, 1024, share=True)
    assert [(batch.prefix, batch.segments) for batch in batches] == [(29, (11,) * 8)] * 2, "the last word predicts what is not alike"
    few = pack([templated(0, 10, 0), templated(1, 10, 0)], 1024, share=True)
    assert [(batch.prefix, batch.segments) for batch in few] == [(12, (28, 28))], "a batch for each would cost more"


def test_what_is_shared_pays() -> None:
    """From 8 tokens on, of two samples or more, and where fewer tokens are computed in the end: a batch counts as 24 more.

    Caught: more than 8; a sample that shares with itself; rows of a template always together, however they fill batches.
    """

    def alike_in(count: int) -> list[Sample]:
        rows = [np.array([*range(count), last, 9], dtype=np.int32) for last in (50, 60)]
        return [Sample(tokens, np.append(tokens[1:], 0), "") for tokens in rows]

    # the target of the last token that is alike is not
    assert [pack(alike_in(count), 100, share=True)[0].prefix for count in (8, 9)] == [0, 8]
    assert [batch.prefix for batch in pack(alike_in(9), 11, share=True)] == [0, 0]
    rows = [templated(*kind) for kind in [(1, 10, 0), (2, 25, 1), (0, 5, 2), (1, 5, 3)]]
    assert sum(batch.tokens.numel() + 24 for batch in pack(rows, 80, share=True)) == 171  # 189 with both rows of template 1 in a batch


def test_packing_fills_batches() -> None:
    samples = samples_of([30, 10, 20, 20, 10, 10])
    assert sorted(batch.tokens.numel() for batch in pack(samples, 50)) == [50, 50]
    assert [tuple(batch.tokens.shape) for batch in pack(samples, 60, packing=False)] == [(2, 30), (3, 20), (1, 10)]
    assert all(batch.segments is None for batch in pack(samples, 60, packing=False))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_ranks_share_a_window_without_loss_and_evenly(lengths: list[int], world: int) -> None:
    """N12: every sample on one rank; no rank has more than another by more than its own shortest sample, which came to it last. Caught:
    samples counted instead of tokens; the shortest first."""
    window = samples_of(lengths)
    shares = [share_of_rank(window, rank, world) for rank in range(world)]
    assert sorted(sample.where for share in shares for sample in share) == sorted(sample.where for sample in window)
    loads = [sum(len(sample.tokens) for sample in share) for share in shares]
    last = [min((len(sample.tokens) for sample in share), default=0) for share in shares]
    assert all(load - length <= min(loads) for load, length in zip(loads, last, strict=True))
    if world == 1:
        assert shares[0] == window


def test_a_window_of_one_sample_leaves_the_other_ranks_idle() -> None:
    """N12: the tail window of 13 samples by 4."""
    assert [len(share_of_rank(samples_of([5]), rank, 2)) for rank in range(2)] == [1, 0]


def test_ranks_are_balanced_by_tokens_not_by_samples() -> None:
    shares = [share_of_rank(samples_of([10, 40, 10, 10, 10]), rank, 2) for rank in range(2)]
    assert [[len(sample.tokens) for sample in share] for share in shares] == [[40], [10, 10, 10, 10]]
