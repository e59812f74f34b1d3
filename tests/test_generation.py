"""From a prompt's ids to an answer: YARDSTICK M05 to M09, with models of two layers and a tokenizer of bytes."""

import json
import resource
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from talkers import byte_tokenizer
from torch import Tensor

from litlora import generation
from litlora.config import Config
from litlora.errors import UserError, WorkError
from litlora.generation import Answer, Conversation, Sampler, find_stop, generate_batch
from litlora.methods import tuning_of
from litlora.methods.attach import add, as_base, attach, trainable, tuned_state
from litlora.model import GPT, KVCache
from litlora.options import LoRAOptions, SamplingOptions
from litlora.tokenizer import Tokenizer

CONTEXT = 48
CONFIG = Config(
    model_type="llama",
    vocab_size=288,  # more rows than the tokenizer has ids
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=CONTEXT,
)
WINDOW = 8
WINDOWED = replace(CONFIG, sliding_window=WINDOW, layer_types=("sliding_attention", "full_attention", "sliding_attention"))
GREEDY = SamplingOptions(temperature=0.0)


def tiny_model(config: Config = CONFIG, seed: int = 0) -> GPT:
    """Every tensor random, gains included; sharp enough that greedy tokens do not tie."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + ("norm" in name))
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes, then <s> 256, </s> 257, <|end|> 258: size 259."""
    return Tokenizer(byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


def ids_of(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy_without_cache(model: GPT, prompt: Sequence[int], n: int, size: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1, :size].argmax()))
    return ids[len(prompt) :]


def fresh(
    model: GPT, tokenizer: Tokenizer, prompt: Sequence[int], sampling: SamplingOptions = GREEDY, stop_ids: Sequence[int] = ()
) -> Answer:
    answer = Conversation(model, tokenizer, stop_ids).ask(prompt, sampling)
    answer.all()
    return answer


# ---- prefill and decode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_decoding_with_a_cache_gives_the_tokens_of_the_whole_at_once(
    config: Config, chunk: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M05."""
    monkeypatch.setattr(generation, "PREFILL_TOKENS", chunk)
    monkeypatch.setattr(generation, "FIRST_CACHE_TOKENS", 5)  # so that the cache grows on the way
    model = tiny_model(config)
    for length in (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1, CONTEXT - 1):
        answer = fresh(model, tokenizer, ids_of(length))
        assert answer.ids == greedy_without_cache(model, ids_of(length), CONTEXT - length, tokenizer.size)


def test_stories3m_says_what_its_reference_says() -> None:
    """The greedy ids of a real model, made by transformers."""
    from litlora.checkpoint.resolve import resolve
    from litlora.checkpoint.weights import load_model

    directory = shared_data("models/stories3m-llama")
    reference = json.loads((directory / "reference.json").read_text())
    model = load_model(resolve(directory), dtype=torch.float32)
    tokenizer = Tokenizer(directory)
    n = len(reference["greedy_ids"])
    answer = fresh(model, tokenizer, reference["prompt_ids"], replace(GREEDY, max_new_tokens=n))
    assert answer.ids == reference["greedy_ids"]
    assert answer.text == tokenizer.decode(reference["greedy_ids"])
    [batched] = generate_batch(model, tokenizer, (), [reference["prompt_ids"]], replace(GREEDY, max_new_tokens=n))
    assert batched.ids == reference["greedy_ids"]


def test_two_conversations_on_one_model_do_not_disturb_each_other(model: GPT, tokenizer: Tokenizer) -> None:
    """M06."""
    alone = [fresh(model, tokenizer, ids_of(n, seed=n)).ids for n in (5, 9)]
    answers = [Conversation(model, tokenizer, ()).ask(ids_of(n, seed=n), GREEDY) for n in (5, 9)]
    streams = [iter(answer) for answer in answers]
    while any(next(stream, None) is not None for stream in streams):
        pass
    for stream in streams:
        assert list(stream) == []
    assert [answer.ids for answer in answers] == alone


@pytest.mark.parametrize("broken_layer", [0, 2])
def test_an_exception_in_the_middle_leaves_nothing_behind(broken_layer: int, tokenizer: Tokenizer) -> None:
    """M06; mutation seen: `held` filled before the forward pass made the answer after the exception another one."""
    model, conversation = tiny_model(), None
    conversation = Conversation(model, tokenizer, ())
    wanted = fresh(model, tokenizer, ids_of(11)).ids
    for fails_at in (0, 1, 4):
        calls = iter(range(100))

        def fail(*_: object, calls: Iterator[int] = calls, fails_at: int = fails_at) -> None:
            if next(calls) == fails_at:
                raise KeyboardInterrupt

        hook = model.model.layers[broken_layer].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            conversation.ask(ids_of(11), GREEDY).all()
        hook.remove()
        longer = [*ids_of(11), *wanted[:6]]  # goes on with what was being fed when it broke
        again = conversation.ask(longer, GREEDY)
        again.all()
        assert again.ids == fresh(model, tokenizer, longer).ids


def test_an_answer_may_fill_the_context_exactly(model: GPT, tokenizer: Tokenizer) -> None:
    """M06."""
    answer = fresh(model, tokenizer, ids_of(CONTEXT - 1))
    assert (len(answer.ids), answer.finish_reason) == (1, "length")
    answer = fresh(model, tokenizer, ids_of(10), replace(GREEDY, max_new_tokens=10_000))
    assert (len(answer.ids), answer.finish_reason) == (CONTEXT - 10, "length")


@pytest.mark.parametrize("length", [0, CONTEXT, CONTEXT + 1])
def test_a_prompt_without_room_is_refused_before_anything_is_allocated(length: int, tokenizer: Tokenizer) -> None:
    """M06: less than 5 MB more memory, although a cache of this model's context would take 2 GB."""
    context = 10**7 if length else CONTEXT
    model = GPT(replace(CONFIG, max_position_embeddings=context)).eval()
    prompt = range(context + length - CONTEXT) if length else []
    conversation = Conversation(model, tokenizer, ())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="no room for an answer" if length else "no tokens"):
        conversation.ask(prompt, GREEDY)
    with pytest.raises(UserError):
        generate_batch(model, tokenizer, (), [[1], prompt], GREEDY)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 5 * 1024  # kB
    assert not conversation.cache.held


def test_logits_that_are_not_numbers_are_a_failure(tokenizer: Tokenizer) -> None:
    """A broken model must not look like a talkative one."""
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(WorkError, match="not finite"):
        fresh(model, tokenizer, [1, 2, 3])
    with pytest.raises(WorkError, match="not finite"):
        generate_batch(model, tokenizer, (), [[1, 2, 3], [4]], GREEDY)


# ---- a conversation of several turns ---------------------------------------------------------------------------------


def test_only_what_is_new_is_computed(model: GPT, tokenizer: Tokenizer) -> None:
    """The second prompt begins as the first one and its answer; the third leaves that way after 8 ids."""
    conversation = Conversation(model, tokenizer, ())
    first = conversation.ask(ids_of(12), replace(GREEDY, max_new_tokens=6))
    first.all()
    assert conversation.reused == 0
    second = [*ids_of(12), *first.ids, *ids_of(5, seed=2)]
    third = [*ids_of(8), 3, 2, 1]
    for prompt, reused in ((second, 17), (third, 8), (third, 10), (third[:4], 3)):  # the last token said was never fed
        answer = conversation.ask(prompt, replace(GREEDY, max_new_tokens=4))
        answer.all()
        assert conversation.reused == reused
        assert answer.ids == fresh(model, tokenizer, prompt, replace(GREEDY, max_new_tokens=4)).ids


def test_the_cache_follows_use_and_not_the_context(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context of 131,072 and no limit on the answer: what is held doubles with use, and its rows keep their tokens.

    Caught: KVCache(context) for a batch; growing without copying what is held.
    """
    config = replace(CONFIG, max_position_embeddings=131_072)
    model = tiny_model(config)
    prompts = [ids_of(n, seed=n) for n in (5, 20, 11)]
    probe = generate_batch(model, tokenizer, (), prompts, replace(GREEDY, max_new_tokens=60))
    sizes: list[int] = []
    forward = model.forward

    def counted(*args: Any, cache: KVCache, **rest: Any) -> Tensor:
        logits: Tensor = forward(*args, cache=cache, **rest)
        assert {tensor.size(2) for held in cache.held.values() for tensor in held} == {cache.size}
        sizes.append(cache.size)
        return logits

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(generation, "FIRST_CACHE_TOKENS", 8)
    stops = {probe[row].ids[at] for row, at in enumerate((58, 57, 59))}  # no limit: a stop token ends each row at the latest there
    answers = generate_batch(model, tokenizer, stops, prompts, GREEDY)
    for before, now in zip(probe, answers, strict=True):
        assert now.ids == before.ids[: len(now.ids)]
        assert now.finish_reason == "stop"
    longest = max(answer.prompt_tokens + len(answer.ids) for answer in answers)
    assert sizes[0] == 20
    assert sizes == sorted(sizes)
    assert sizes[-1] <= 2 * longest
    sizes.clear()
    limited = generate_batch(model, tokenizer, (), prompts, replace(GREEDY, max_new_tokens=30))
    assert sizes[-1] == 50  # the longest prompt and its answer: never more than can be used
    assert [answer.ids for answer in limited] == [answer.ids[:30] for answer in probe]


@pytest.mark.parametrize("entrance", ["attached", "added"])
def test_the_base_is_plain_while_adapters_are_out_and_they_come_back(entrance: str, tokenizer: Tokenizer) -> None:
    """Same weights in memory; also after an exception; whether the adapter learns or only serves."""
    model, trained = tiny_model(), tiny_model()
    base = fresh(model, tokenizer, ids_of(9)).ids
    tuning = tuning_of(LoRAOptions(r=4), CONFIG)
    attach(trained, tuning, seed=1)
    for name, parameter in trainable(trained).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.5)
    if entrance == "attached":
        model = trained
    else:
        add(model, tuning, tuned_state(trained, tuning, CONFIG))
    tuned = fresh(model, tokenizer, ids_of(9)).ids
    assert tuned != base
    with as_base(model):
        assert fresh(model, tokenizer, ids_of(9)).ids == base
    with pytest.raises(ZeroDivisionError), as_base(model):
        raise ZeroDivisionError
    assert fresh(model, tokenizer, ids_of(9)).ids == tuned


# ---- many prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingOptions(temperature=1.3, repetition_penalty=1.2)], ids=["greedy", "sampled"])
def test_answers_side_by_side_are_those_given_alone(
    config: Config, sampling: SamplingOptions, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M07 and M08: 1 to 8 ragged prompts, any order, some ending early; mutation seen: no rewind after the padded prefill."""
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 20)
    model = tiny_model(config)
    prompts = [ids_of(n, seed=n) for n in (3, 17, 1, 40, 9, 17, 2, CONTEXT - 1)]
    stops = sorted({fresh(model, tokenizer, prompt, sampling).ids[n] for prompt, n in zip(prompts, (3, 9, 1), strict=False)})
    alone = [fresh(model, tokenizer, prompt, sampling, stops) for prompt in prompts]
    assert {answer.finish_reason for answer in alone} == {"stop", "length"}
    for n in range(1, 9):
        for order in (list(range(n)), list(range(n))[::-1]):
            heard: list[int] = []
            answers = generate_batch(model, tokenizer, stops, [prompts[i] for i in order], sampling, rows=5, done=heard.append)
            assert [answer.ids for answer in answers] == [alone[i].ids for i in order]
            assert [(answer.text, answer.finish_reason) for answer in answers] == [(alone[i].text, alone[i].finish_reason) for i in order]
            assert heard == ([5, n] if n > 5 else [n])


def test_no_prompts_give_no_answers(model: GPT, tokenizer: Tokenizer) -> None:
    assert generate_batch(model, tokenizer, (), [], GREEDY) == []


# ---- stopping --------------------------------------------------------------------------------------------------------


class Parrot:
    """Stands in for a model's choice: an Answer is told these tokens."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingOptions, stop_ids: Sequence[int] = (), context: int = 4096) -> None:
        self.answer = Answer([1], sampling, tokenizer, frozenset(stop_ids), context)

    def say(self, ids: Sequence[int]) -> list[str]:
        self.answer.tokens = ids
        return list(self.answer)


def test_every_end_token_ends_an_answer_and_is_not_text(tokenizer: Tokenizer) -> None:
    for end in (257, 258):
        parrot = Parrot(tokenizer, GREEDY, stop_ids=(257, 258))
        pieces = parrot.say([*tokenizer.encode("hé", special=False), end, 65, 66])
        assert "".join(pieces) == parrot.answer.text == "hé"
        assert parrot.answer.ids[-1] == end
        assert parrot.answer.finish_reason == "stop"


def test_an_end_token_at_the_limit_is_an_end(tokenizer: Tokenizer) -> None:
    parrot = Parrot(tokenizer, replace(GREEDY, max_new_tokens=3), stop_ids=(257,))
    parrot.say([65, 66, 257])
    assert parrot.answer.finish_reason == "stop"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab\nЯ🙂", max_size=20), st.lists(st.text(alphabet="ab\nЯ🙂", min_size=1, max_size=4), max_size=3))
def test_a_stop_text_is_never_printed_and_nothing_before_it_is_lost(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    """M10's stop; across token boundaries, since a token here is a byte. Mutation seen: holding nothing back."""
    parrot = Parrot(tokenizer, replace(GREEDY, stop=stops), stop_ids=(257,))
    pieces = parrot.say([*tokenizer.encode(text, special=False), 257])
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    if ends:  # the first to be complete; of those complete at once, the longest
        cut = min(at for stop in stops if (at := text.find(stop)) >= 0 and at + len(stop) == min(ends))
        assert "".join(pieces) == parrot.answer.text == text[:cut]
    else:
        assert "".join(pieces) == parrot.answer.text == text
    assert parrot.answer.finish_reason == "stop"


def test_text_is_held_back_only_while_it_may_be_a_stop() -> None:
    assert find_stop("one two", ["\n\n"]) == (None, 7)
    assert find_stop("one\n", ["\n\n"]) == (None, 3)
    assert find_stop("one\n\ntwo", ["\n\n", "w"]) == (3, 3)
    assert find_stop("xaab", ["aabc", "ba"]) == (None, 1)
    assert find_stop("abc", [""]) == (None, 3)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_what_is_streamed_is_what_all_ids_decode_to(tokenizer: Tokenizer, raw: bytes) -> None:
    """M09, through an Answer: bytes that are no characters, and an answer that ends inside one."""
    ids = list(raw)
    parrot = Parrot(tokenizer, replace(GREEDY, max_new_tokens=max(1, len(ids))))
    assert "".join(parrot.say(ids)) == parrot.answer.text == tokenizer.decode(ids)


# ---- sampling --------------------------------------------------------------------------------------------------------


def draws(logits: Tensor, n: int, size: int = 10**6, **options: float) -> Tensor:
    """How often each token is drawn."""
    sampler = Sampler(SamplingOptions(**{"temperature": 1.0, "top_p": 1.0, **options}), size, ())  # type: ignore[arg-type]
    return torch.bincount(torch.stack([sampler.pick(logits) for _ in range(n)]), minlength=len(logits))


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """The probability of counts at least so far from `expected` probabilities."""
    possible = expected > 0
    assert counts[~possible].sum() == 0, "an impossible token was drawn"
    if possible.sum() == 1:
        return 1.0
    wanted = expected[possible].double() * counts.sum()
    x = ((counts[possible] - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64), x / 2))


LOGITS = torch.tensor([1.0, 3.0, -2.0, 0.5, 2.0, -1.0, 2.9, 0.0])


def test_draws_follow_the_distribution_and_never_leave_the_tokenizer() -> None:
    """M08: 1e5 draws, with logits that beg for the padded rows. Mutation seen: temperature applied after the softmax."""
    logits = torch.cat((LOGITS, torch.full((5,), 1e4)))
    counts = draws(logits, 100_000, size=8, temperature=0.8)
    assert counts[8:].sum() == 0
    assert chi_square_p(counts[:8], (LOGITS / 0.8).softmax(0)) > 1e-4


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 3}, [1, 6, 4]),
        ({"top_k": 10**6}, range(8)),
        ({"top_p": 0.7}, [1, 6]),
        ({"top_p": 0.83}, [1, 6, 4]),
        ({"top_p": 0.0}, [1]),
        ({"min_p": 0.3}, [1, 6, 4]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.1}, [1, 6, 4]),
        ({"temperature": 1e-6}, [1]),
        ({"temperature": 1e-300}, [1]),
    ],
)
def test_each_filter_keeps_what_it_says(options: dict[str, float], kept: Sequence[int]) -> None:
    """M08."""
    expected = torch.zeros(8)
    expected[list(kept)] = LOGITS.softmax(0)[list(kept)]
    assert chi_square_p(draws(LOGITS, 5_000, **options), expected / expected.sum()) > 1e-4


@pytest.mark.parametrize("sharpness", [0.02, 8.0])
def test_the_nucleus_is_the_same_however_it_is_found(sharpness: float) -> None:
    """top_p's shortcut through the 256 likeliest tokens: inside them (sharp) and beyond (flat)."""
    probabilities = (torch.randn(5000, generator=torch.Generator().manual_seed(3)) * sharpness).softmax(0)
    values, order = generation.nucleus(probabilities, 0.6)
    ranked, places = probabilities.sort(descending=True)
    inside = ranked.double().cumsum(0) - ranked.double() < 0.6
    assert set(order[values > 0].tolist()) == set(places[inside].tolist())
    assert (int(inside.sum()) > generation.NUCLEUS_GUESS) == (sharpness < 1)
    values, order = generation.nucleus(probabilities, 0.0)
    assert order[values > 0].tolist() == [int(probabilities.argmax())]


def test_temperature_zero_takes_the_likeliest_token() -> None:
    """M08."""
    for seed in range(5):
        logits = torch.randn(300, generator=torch.Generator().manual_seed(seed))
        assert int(Sampler(replace(GREEDY, seed=seed), 280, ()).pick(logits)) == int(logits[:280].argmax())


def test_a_seed_gives_the_same_answer_again_and_another_gives_another(model: GPT, tokenizer: Tokenizer) -> None:
    """M08."""
    sampling = SamplingOptions(temperature=1.5, seed=-7)
    torch.manual_seed(1)
    first = fresh(model, tokenizer, ids_of(5), sampling).ids
    torch.manual_seed(2)
    assert fresh(model, tokenizer, ids_of(5), sampling).ids == first
    assert fresh(model, tokenizer, ids_of(5), replace(sampling, seed=2**70)).ids != first


def test_what_was_said_is_penalized_in_prompt_and_answer() -> None:
    """arXiv:1909.05858: a seen token's logit is divided, or multiplied where it is negative."""
    sampler = Sampler(SamplingOptions(temperature=0.0, repetition_penalty=4.0), 4, [0, 9])
    assert int(sampler.pick(torch.tensor([3.0, 2.0, 1.0, -1.0, 99.0]))) == 1  # 0 was in the prompt
    assert int(sampler.pick(torch.tensor([3.0, 2.0, 1.0, -1.0, 99.0]))) == 2  # and 1 was said
    assert int(sampler.pick(torch.tensor([-3.0, -2.0, -9.0, -7.0, 99.0]))) == 3  # -12, -8, -36, -7
