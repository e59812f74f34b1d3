"""A model's step on a CPU, done again without Python (`cpu/tape.py`): the same bits as the plain one's.

Mutations seen to fail stand in docstrings, after "Caught:".
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import EVERY, EXPERTS, random_tokens, tiny_gpt
from talkers import byte_tokenizer
from test_generation import GREEDY, ids_of
from test_native import METHODS, OWN_HEADS, WHOLE, decoded, needs_native, random
from test_promises import learnt
from test_replay import varies
from torch import Tensor

from litlora import cpu
from litlora.cpu import native
from litlora.cpu.tape import Tape
from litlora.generation import Conversation, Sampler, generate_batch, reserve
from litlora.kernels import linear, rms_norm
from litlora.methods import tuning_of
from litlora.methods.attach import attach
from litlora.model import GPT, KVCache
from litlora.options import LoRAOptions
from litlora.quantized import KINDS, hold, quantized
from litlora.replay import ReplayedStep, sees_what_is_held
from litlora.tokenizer import Tokenizer


def whole_gpt(family: str) -> GPT:
    """Of whole registers, as real models are: what our kernels serve."""
    return tiny_gpt(family, **{key: size for key, size in WHOLE.items() if key != "head_dim" or family not in OWN_HEADS})


@torch.inference_mode()
def played(gpt: GPT, tokens: Tensor, by: int = 1) -> Tensor:  # (1, T) -> (T - 9, V)
    """As `decoded`, each step the one before done again, in a cache that grows twice; where nothing was written there is no number."""
    cache = KVCache(11)
    gpt(tokens[:, :9], cache=cache)
    step, found = ReplayedStep(gpt, cache), []
    for part in tokens[0, 9:].split(by):
        n, size = cache.lengths[0], cache.size
        reserve(cache, n + len(part), 32)
        if n == 9 or cache.size > size:
            for sides in cache.held.values():
                for side in sides:
                    side[:, :, n:] = torch.nan
        found.append(step(part[None])[0])
    return torch.cat(found)


SERVED = [family for family in EVERY if family not in EXPERTS and not varies(tiny_gpt(family).config)]


@needs_native
@pytest.mark.parametrize("by", [1, 4])
@pytest.mark.parametrize("family", SERVED)
def test_a_step_done_again_has_the_bits_of_a_plain_one(family: str, by: int) -> None:
    """C3, every family whose steps are alike, a token or some at a time. Where attention is not ours it looks at what is masked, and sums
    in another order."""
    gpt, tokens = whole_gpt(family), random_tokens(1, 24)
    found, expected = played(gpt, tokens, by), decoded(gpt, tokens, by)
    if sees_what_is_held(gpt):
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_most_families_are_served_on_a_cpu() -> None:
    """Also those whose scores are capped."""
    served = {family for family in SERVED if sees_what_is_held(whole_gpt(family))}
    assert {"llama", "llama3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"} <= served or cpu.working() is None


@needs_native
@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_model_too(method: str) -> None:
    """C3, methods."""
    gpt, tokens = whole_gpt("llama"), random_tokens(1, 24)
    plain = decoded(gpt, tokens)
    attach(gpt, tuning_of(METHODS[method], gpt.config), seed=1)
    learnt(gpt.eval())
    found = played(gpt, tokens)
    assert torch.equal(found, decoded(gpt, tokens))
    assert not torch.equal(found, plain)


def test_a_model_in_fp64_too() -> None:
    """Nothing of ours serves it: torch writes to the cache. Caught: a cache that is put back to what it held."""
    gpt, tokens = whole_gpt("llama").double(), random_tokens(1, 24)
    torch.testing.assert_close(played(gpt, tokens), decoded(gpt, tokens))


@needs_native
@pytest.mark.parametrize("width", [128, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_too(kind: str, width: int) -> None:
    """C3, every kind of weight. Where no kernel of ours serves, one weight after the other is made wide in the same room. Caught: what is
    written there done once, at the recording."""
    gpt, tokens = tiny_gpt("llama", **WHOLE | {"hidden_size": width, "head_dim": 32}), random_tokens(1, 24)
    for name, module in gpt.named_modules():
        if name.endswith("_proj"):
            hold(module, quantized(kind, module.weight))
    found, expected = played(gpt, tokens), decoded(gpt, tokens)
    assert torch.equal(found, expected)


def attached(gpt: GPT) -> None:
    attach(gpt, tuning_of(METHODS["lora"], gpt.config), seed=1)
    learnt(gpt.eval())


def replaced(gpt: GPT) -> None:
    gpt.model.layers[1].mlp.up_proj.weight = nn.Parameter(random(128, 96))


def moved(gpt: GPT) -> None:
    gpt.model.norm.weight.data = random(96)


def written(gpt: GPT) -> None:
    with torch.no_grad():
        gpt.model.norm.weight.add_(2)  # of which the gains are made, once


def held(gpt: GPT) -> None:
    down = gpt.model.layers[0].mlp.down_proj
    hold(down, quantized("int8", down.weight))


@needs_native
@pytest.mark.parametrize("change", [attached, replaced, moved, written, held])
def test_a_model_that_changes_between_two_answers_is_not_the_one_of_before(change: Callable[[GPT], None]) -> None:
    """An adapter, another weight, other memory for it, other numbers in it. A graph reads those that are only written over. Caught: parts
    that are not looked at; parameters known by what they are instead of where they lie."""
    gpt, tokens = whole_gpt("gemma"), random_tokens(1, 12)[0]
    with torch.inference_mode():
        cache = KVCache(16)
        gpt(tokens[None, :9], cache=cache)
        step = ReplayedStep(gpt, cache)
        step(tokens[None, 9:10])
        before = step(tokens[None, 10:11])[0, 0]
    change(gpt)
    assert (step.parts == step.parts_now()) is (change is written)
    step.renew()
    with torch.inference_mode():
        cache.rewind(10)
        found = step(tokens[None, 10:11])[0, 0]
        cache.rewind(10)
        assert torch.equal(found, gpt(tokens[None, 10:11], cache=cache)[0, 0])
    assert not torch.equal(found, before)


@needs_native
def test_a_weight_that_comes_to_lie_where_another_lay_is_another_one() -> None:
    """Gains of which only their sum with 1 is on the tape. Caught: the address alone looked at."""
    gpt, tokens = whole_gpt("gemma"), random_tokens(1, 12)[0]
    cache = KVCache(16)
    with torch.inference_mode():
        gpt(tokens[None, :9], cache=cache)
        step = ReplayedStep(gpt, cache)
    for seed in range(16):
        with torch.inference_mode():
            cache.rewind(9)
            step.renew()
            found = step(tokens[None, 9:10])
            cache.rewind(9)
            assert torch.equal(found, gpt(tokens[None, 9:10], cache=cache))
        for n in range(2):  # the second may lie where the first of before lay
            gpt.model.norm.weight = nn.Parameter(random(96, seed=2 * seed + n))
        assert step.parts != step.parts_now()


@needs_native
def test_a_model_that_is_in_training_draws_anew() -> None:
    """Caught: modes not looked at."""
    gpt, tokens = whole_gpt("llama"), random_tokens(1, 12)[0]
    attach(gpt, tuning_of(LoRAOptions(r=8, dropout=0.5), gpt.config), seed=1)
    learnt(gpt.eval())
    with torch.inference_mode():
        cache = KVCache(16)
        gpt(tokens[None, :9], cache=cache)
        step, found = ReplayedStep(gpt, cache), []
        for training in (False, False, True, True):
            gpt.train(training)
            step.renew()
            found.append(step(tokens[None, 9:10]))
            cache.rewind(9)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2]) and not torch.equal(found[2], found[3])


@needs_native
@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_an_answer_is_that_of_the_weights_as_they_are_then(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused optimizer, as the one here, writes weights over without a trace. Caught: what was computed of them for the answer before."""
    tokenizer = Tokenizer(byte_tokenizer(tmp_path))
    options = LoRAOptions(r=8, use_dora=True) if method == "dora" else LoRAOptions(r=8, init="pissa")

    def said() -> list[list[int]]:
        gpt, found = tiny_gpt("llama3", **WHOLE, vocab_size=300), []
        attach(gpt, tuning_of(options, gpt.config), seed=1)
        learnt(gpt.eval())
        conversation = Conversation(gpt, tokenizer, ())
        optimizer = torch.optim.AdamW((p for p in gpt.parameters() if p.requires_grad), lr=0.1, fused=True)
        for _ in range(2):
            answer = conversation.ask(ids_of(6), GREEDY)
            answer.all()
            found.append(answer.ids)
            tokens = random_tokens(1, 16)
            gpt(tokens, tokens).backward()
            optimizer.step()
        return found

    found = said()
    assert found[0] != found[1]
    monkeypatch.setattr(ReplayedStep, "serves", staticmethod(lambda model: False))
    assert said() == found


@torch.inference_mode()
def test_memory_that_is_used_again_holds_each_time_what_it_held() -> None:
    """Of before and of inside, written to by what does not vary, then by what does. Caught: the first not done again; its numbers put back
    where they are written over, after they were read."""
    x, before, two, three = random(4), torch.zeros(4), torch.full((4,), 2.0), torch.full((4,), 3.0)

    def compute() -> Tensor:
        inside, found = torch.zeros(4), []
        for room in (before, inside):
            for value in (two, three, x):
                found.append(x * room.copy_(value))
        kept = two * 2
        found.append(kept + x + 0)
        kept.add_(x)
        return torch.cat((*found, kept))

    with Tape(x) as tape:
        found = compute()
    for seed in (1, 2):
        x.copy_(random(4, seed=seed))
        before.fill_(torch.nan)
        tape.play()
        assert torch.equal(found, compute())


@needs_native
@torch.inference_mode()
def test_a_weight_that_is_made_inside_and_made_again_is_two() -> None:
    """As one room for wide rows is. Caught: what our kernels read forgotten."""
    x, two, three = random(1, 16), random(8, 16, seed=1), random(8, 16, seed=2)
    with Tape(x) as tape:
        room, found = torch.zeros(8, 16), []
        for weight in (two, three):
            found.append(linear(x, room.copy_(weight), None))
    x.copy_(random(1, 16, seed=3))
    tape.play()
    assert torch.equal(found[0], linear(x, two, None)) and torch.equal(found[1], linear(x, three, None))


@torch.inference_mode()
def test_without_kernels_a_tape_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other CPUs. Caught: a kernel that is not there called."""
    monkeypatch.setattr(cpu, "working", lambda: None)
    monkeypatch.setattr(native, "library", lambda: pytest.fail("there is none"))
    x, y = random(4), random(4, seed=1)
    with Tape(x) as tape:
        found = x + y
    x.fill_(1)
    tape.play()
    assert torch.equal(found, 1 + y)


@needs_native
@torch.inference_mode()
def test_attentions_on_a_tape_share_room_for_scores() -> None:
    """It is as long as the cache for each: a gigabyte for all widths of drafts in a cache of 8,192. Caught: room for each attention."""
    q, keys = random(1, 4, 1, 16), random(1, 2, 33, 16, seed=1)
    with Tape(q) as tape:
        first = native.attention_of_few(None, q, keys, keys, None, 1.0)
        second = native.attention_of_few(None, q * 2, keys, keys, None, 1.0)
    assert len({memory.data_ptr() for memory in tape.kept if memory.nbytes() == 4 * native.TOGETHER * (33 + 7)}) == 1
    expected = first.clone(), second.clone()
    tape.play()
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])


@needs_native
@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2"])
def test_rows_of_other_lengths_too(family: str) -> None:
    """Texts side by side, one of which stands still from some step on. Caught: one place for all rows."""
    gpt, tokens, starts = whole_gpt(family), random_tokens(3, 24), (9, 4, 7)

    def steps(step: Callable[[Tensor], Tensor], cache: KVCache) -> Tensor:  # (8, 3, V)
        found = []
        for n in range(8):
            lengths = list(cache.lengths)
            reserve(cache, max(lengths) + 1, 32)
            found.append(step(torch.stack([row[length] for row, length in zip(tokens, lengths, strict=True)])[:, None])[:, 0])
            cache.rewind([length + (row != 1 or n < 3) for row, length in enumerate(lengths)])
        return torch.stack(found)

    caches = KVCache(11, rows=3), KVCache(11, rows=3)
    for cache in caches:
        gpt(tokens[:, :9], cache=cache)
        cache.rewind(starts)
    found = steps(ReplayedStep(gpt, caches[0]), caches[0])
    expected = steps(lambda tokens: gpt(tokens, cache=caches[1]), caches[1])
    assert caches[0].lengths == caches[1].lengths == [17, 7, 15]
    if sees_what_is_held(gpt):
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_native
@torch.inference_mode()
def test_a_tape_does_again_whatever_was_done() -> None:
    """Calls of ours and torch's in turns: views, several results, in place, into a part, without an input. Caught: what is written over
    left out; the second of several results left out."""
    weight, gains, into = random(32, 64), random(32).abs(), torch.zeros(3, 32)

    def compute(x: Tensor) -> Tensor:
        y = rms_norm(linear(x, weight, None), gains, 1e-5) + 1
        left, right = y.view(2, 2, 16).unbind(1)
        values, order = right.sort(-1)
        into[1].copy_(y[0])
        into[2] = 7
        left = left.clone().mul_(2)
        rest = torch.arange(16) + torch.zeros(16).add_(order[0])
        return torch.cat((left + values, left.t().contiguous().view(2, 16), F.silu(rest)[None], into[1:].flatten().view(4, 16)))

    x = random(2, 64)
    with Tape(x) as tape:
        found = compute(x)
    for seed in range(1, 4):
        other = random(2, 64, seed=seed)
        expected = compute(other).clone()
        into.fill_(torch.nan)
        x.copy_(other)
        tape.play()
        assert torch.equal(found, expected)


@needs_native
@torch.inference_mode()
def test_what_does_not_vary_is_computed_once() -> None:
    """A DoRA's gains took ten times as long as the rest of a token. Caught: everything done again; all that was computed kept."""
    x, weight = random(1, 64), random(32, 64)
    with Tape(x) as tape:
        gains = torch.linalg.vector_norm(weight * 2, dim=1)
        found = linear(x, weight, None) * gains
    assert len(tape.steps) == 2
    assert all(memory.nbytes() < weight.nbytes or memory.data_ptr() == weight.data_ptr() for memory in tape.kept)
    expected = found.clone()
    found.zero_()
    tape.play()
    assert torch.equal(found, expected)


@needs_native
@torch.inference_mode()
@pytest.mark.parametrize("constant", [True, False])
def test_what_is_added_to_what_does_not_vary_is_added_once(constant: bool) -> None:
    """LoRA beside keys of a learnt prompt, whose host no kernel of ours serves. Caught: each time on top of the last (`prepare` left out
    of `heard`; the call done before it is heard); what does not vary done again; what was made where
    something freed had lain, taken for fresh."""
    x, weight, rows = random(1, 64), random(32, 64, seed=1), random(1, 64, seed=2)
    start = random(1, 32, seed=3)

    def compute(x: Tensor) -> Tensor:
        unused = [start.new_empty(1, 32) for _ in range(64)]  # nobody writes to them, and what comes next may lie there
        del unused
        keys = start * 2
        native.add_product(keys, rows if constant else x, weight, 0.5)
        return keys + linear(x, weight, None)

    with Tape(x) as tape:
        found = compute(x)
    assert len(tape.steps) == (1 if constant else 2)  # calls of ours; before them what puts the keys back
    for seed in range(4, 7):
        x.copy_(random(1, 64, seed=seed))
        expected = compute(x)
        tape.play()
        assert torch.equal(found, expected)


@torch.inference_mode()
def test_memory_that_is_written_to_part_by_part_is_put_back_whole() -> None:
    """A step reads all of it before. Caught: the first part alone put back."""
    x, held = random(4), random(8, seed=1)

    def compute(x: Tensor) -> Tensor:
        before = held * x.sum()
        held[:4].add_(x)
        held[4:].add_(x)
        return before + held

    first = held.clone()
    with Tape(x) as tape:
        found = compute(x)
    for seed in range(2, 5):
        x.copy_(random(4, seed=seed))
        held.copy_(first)
        expected = compute(x)
        tape.play()
        assert torch.equal(found, expected)


@torch.inference_mode()
def test_a_tape_takes_no_number_that_may_change() -> None:
    """Caught: the check left out."""
    x = random(4)
    with pytest.raises(RuntimeError, match="gives a number"), Tape(x):
        x.sum().item()
    assert native.RECORDING.heard is None


@torch.inference_mode()
def test_a_model_that_asks_for_a_number_answers_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that prints, say. Caught: the error let through."""
    gpt, tokens, asked = whole_gpt("llama"), random_tokens(1, 12), []
    expected = played(gpt, tokens)
    gpt.model.layers[0].mlp.register_forward_hook(lambda module, inputs, y: asked.append(float(y.abs().max())))
    with pytest.warns(UserWarning, match=r"a step cannot be recorded \(.*gives a number"):
        found = played(gpt, tokens)
    assert torch.equal(found, expected)
    assert len(asked) >= 3


@needs_native
@torch.inference_mode()
def test_what_other_threads_do_is_not_on_it() -> None:
    """Caught: one recording for all threads."""
    x, weight = random(1, 64), random(32, 64)
    with Tape(x) as tape:
        thread = threading.Thread(target=torch.inference_mode()(linear), args=(x, weight, None))
        thread.start()
        thread.join()
    assert not tape.steps
    with Tape(x) as tape:
        linear(x, weight, None)
    assert len(tape.steps) == 1


@needs_native
def test_a_tape_outlives_what_it_was_made_of() -> None:
    """It keeps memory, not owners: a weight that was given back would be read all the same. Caught: tensors that are not kept."""
    with torch.inference_mode():
        weight, x = random(256, 256), random(1, 256)
        expected = linear(x, weight, None).clone()
        with Tape(x) as tape:
            found = linear(x, weight, None)
        weight.data = torch.zeros(256, 256)
        del weight
        others = [torch.full((256, 256), 3.0) for _ in range(8)]
        found.zero_()
        tape.play()
        assert torch.equal(found, expected)
        assert others


@needs_native
def test_a_conversation_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C3. Caught: a step that is never asked."""
    gpt, tokenizer = tiny_gpt("llama3", **WHOLE, vocab_size=300), Tokenizer(byte_tokenizer(tmp_path))
    plays = []
    play = Tape.play
    monkeypatch.setattr(Tape, "play", lambda self: plays.append(self) or play(self))

    def said() -> list[int]:
        answer = Conversation(gpt, tokenizer, ()).ask(ids_of(6), GREEDY)
        answer.all()
        return answer.ids

    found = said()
    assert len(plays) == len(found) - 2  # the first comes from the prompt, the second from the step that is recorded
    first, second = generate_batch(gpt, tokenizer, (), [ids_of(6), ids_of(4)], GREEDY)
    assert first.ids == found
    assert len(plays) == len(found) - 2 + max(len(first.ids), len(second.ids)) - 2
    monkeypatch.setattr(ReplayedStep, "serves", staticmethod(lambda model: False))
    made = len(plays)
    assert said() == found
    assert [answer.ids for answer in generate_batch(gpt, tokenizer, (), [ids_of(6), ids_of(4)], GREEDY)] == [first.ids, second.ids]
    assert len(plays) == made


@needs_native
def test_torchs_other_threads_sleep_while_an_answer_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C3: they would look for work on the cores of our helpers, which took a third of the speed. Caught: picking a token, copying its
    logits with all of them; products that are recorded for one thread."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # who runs the tests has threads of its own
    gpt, tokenizer = tiny_gpt("llama3", **WHOLE, vocab_size=300), Tokenizer(byte_tokenizer(tmp_path))
    run, draw, clone, product = native.run, Sampler.draw, Tensor.clone, native.FORMS["product"]
    seen: dict[str, set[int]] = {"products": set(), "logits": set(), "pick": set()}

    def spied(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any) -> Any:
            seen[name].add(torch.get_num_threads())
            return function(*args)

        return spy

    def ran(calls: Sequence[bytes]) -> None:
        fields = (product.unpack(call) for call in calls)
        seen["products"].update(threads for number, *_, threads, _ in fields if number == native.NUMBERS["product"])
        run(calls)

    monkeypatch.setattr(native, "run", ran)
    monkeypatch.setattr(Sampler, "draw", spied("pick", draw))
    monkeypatch.setattr(Tensor, "clone", spied("logits", clone))
    monkeypatch.setattr(native, "PARALLEL", 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        conversation = Conversation(gpt, tokenizer, ())
        answer = conversation.ask(ids_of(6), replace(GREEDY, temperature=1.0, max_new_tokens=8))
        pieces = iter(answer)
        next(pieces)
        next(pieces)  # what is recorded copies its tokens with all of them
        seen["logits"].clear()
        for _ in pieces:
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert seen == {"products": {3}, "logits": {1}, "pick": {1}}


def test_a_thread_that_begins_while_another_answers_has_torchs_threads() -> None:
    """Torch gives a new thread what was set last. Caught: one thread for good, in a server that answers several at once."""
    threads, found = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        begin = threading.Event()
        other = threading.Thread(target=lambda: (begin.wait(), torch.ones(8) + 1, found.append(torch.get_num_threads())))
        other.start()
        with cpu.one_thread():
            begin.set()
            other.join()
    finally:
        torch.set_num_threads(threads)
    assert found == [3]


def test_an_answer_that_is_broken_off_leaves_torch_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a chat, which goes on afterwards. Caught: one that came as they were sent to sleep, and later answers on one thread."""
    threads, set_to = torch.get_num_threads(), torch.set_num_threads
    monkeypatch.setattr(threading, "active_count", lambda: 1)

    def interrupted(number: int) -> None:
        set_to(number)
        if number == 1:
            raise KeyboardInterrupt

    try:
        set_to(3)
        monkeypatch.setattr(torch, "set_num_threads", interrupted)
        with pytest.raises(KeyboardInterrupt), cpu.one_thread():
            pass
        assert torch.get_num_threads() == 3
    finally:
        set_to(threads)
