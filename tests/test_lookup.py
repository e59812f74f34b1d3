"""Prompt lookup: drafts from the conversation's own ids, checked several at once, change how often the model is called and nothing else.

Models in fp64 here: whether two tokens tie in their last digits is then no matter of how many are computed at once. Mutations seen to
fail stand in docstrings, after "Caught:".
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import EVERY, random_tokens, shared_data, tiny_gpt
from test_promises import CASES, fresh, learnt
from torch import Tensor

from litlora import generation
from litlora.generation import LOOKUP_PAUSE, Answer, Conversation, Lookup, generate_batch
from litlora.model import GPT
from litlora.options import SamplingOptions
from litlora.quantized import Int8, hold, quantized
from litlora.tokenizer import Tokenizer

GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=24)
SAMPLED = SamplingOptions(temperature=0.6, top_p=0.9, repetition_penalty=1.1, max_new_tokens=24, seed=3)
samplings = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


class Letters:
    """A tokenizer of one letter per id."""

    size = 131

    def decode(self, ids: Sequence[int], **how: Any) -> str:
        return "".join(chr(97 + token % 26) for token in ids)

    def stream(self) -> "Letters":
        return self

    def push(self, token_id: int) -> str:
        return self.decode([token_id])

    def flush(self) -> str:
        return ""


def talk(model: GPT, stop_ids: Sequence[int] = ()) -> Conversation:
    return Conversation(model, Letters(), stop_ids)  # type: ignore[arg-type]


def asked(model: GPT, prompt: Sequence[int], sampling: SamplingOptions, guesses: int = 0, stop_ids: Sequence[int] = ()) -> Answer:
    answer = talk(model, stop_ids).ask(prompt, replace(sampling, prompt_lookup=guesses))
    answer.all()
    return answer


def repeated(n: int = 7, times: int = 3) -> list[int]:
    """A prompt that says the same again and again."""
    return random_tokens(1, n, seed=4)[0].tolist() * times


class Calls:
    """How many tokens each forward pass of a model was given."""

    def __init__(self, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
        self.widths: list[int] = []
        forward = model.forward

        def counted(tokens: Tensor, *args: Any, **rest: Any) -> Tensor:
            logits: Tensor = forward(tokens, *args, **rest)
            self.widths.append(tokens.size(1))
            return logits

        monkeypatch.setattr(model, "forward", counted)


def told_what_to_say(model: GPT, text: Sequence[int]) -> GPT:
    """The model with its trunk and head replaced: after the first n of these ids it says the next one."""

    class Teleprompter(torch.nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            following = torch.tensor([*text, 0])[x[..., 0].long() + 1]
            return torch.nn.functional.one_hot(following, model.config.vocab_size).float()

    class Positions(torch.nn.Module):
        norm = torch.nn.Identity()

        def forward(self, tokens: Tensor, context: Any) -> Tensor:
            held = 0 if context.cache is None else context.cache.lengths[0]
            return torch.arange(held, held + tokens.size(1), dtype=torch.float32)[None, :, None]

    model.lm_head, model.model = Teleprompter(model.lm_head.weight), Positions()  # type: ignore[assignment]
    return model


# ---- the same tokens -------------------------------------------------------------------------------------------------


@samplings
@pytest.mark.parametrize("family", EVERY)
def test_with_drafts_every_family_says_the_same(family: str, sampling: SamplingOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled: the sampler sees the same logits in the same order. With a rope that depends on the length there are no drafts,
    else many: here one id that was there before is enough, and there are no pauses. Caught: a draft kept beyond its first wrong token;
    the cache not rewound; the sampler asked about a whole draft at once; drafts for a rope that depends on the length."""
    monkeypatch.setattr(generation, "LOOKUP_IDS", (2, 1))
    monkeypatch.setattr(generation, "LOOKUP_PAUSE", 0)
    model = tiny_gpt(family).double()
    prompt = random_tokens(1, 20, seed=4)[0].tolist()
    plain = asked(model, prompt, sampling)
    calls = Calls(model, monkeypatch)
    drafted = asked(model, prompt, sampling, 5)
    assert drafted.ids == plain.ids
    assert drafted.text == plain.text
    if model.config.rope.depends_on_length:
        assert talk(model).lookup(drafted) is None
    else:
        assert max(calls.widths[1:]) > 1


@pytest.mark.parametrize("case", CASES)
def test_with_drafts_every_method_says_the_same_unmerged(case: str) -> None:
    model = learnt(fresh(case, CASES[case].families[0], torch.float64)[0])
    for sampling in (GREEDY, SAMPLED):
        assert asked(model, repeated(), sampling, 6).ids == asked(model, repeated(), sampling).ids


@samplings
def test_with_drafts_a_base_in_int8_says_the_same(sampling: SamplingOptions) -> None:
    """By torch's own product for few rows, each of which it computes alike whatever stands beside it. What goes in is rounded to bf16, so
    a last digit may become a larger one: the promise is for fp32, and this model's tokens are far enough apart."""
    model = tiny_gpt("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    for name, host in model.named_modules():
        if hasattr(host, "quantized") and name != "lm_head":
            hold(host, quantized("int8", host.weight.detach()))
    assert sum(isinstance(module, Int8) for module in model.modules()) == 7 * model.config.num_hidden_layers
    assert asked(model, repeated(), sampling, 6).ids == asked(model, repeated(), sampling).ids


def test_with_drafts_a_real_model_says_the_same() -> None:
    """fp32, after two beginnings, greedy and sampled."""
    from litlora.checkpoint.resolve import resolve
    from litlora.checkpoint.weights import load_model

    directory = shared_data("models/stories3m-llama")
    model, tokenizer = load_model(resolve(directory), dtype=torch.float32), Tokenizer(directory)
    foretold = 0
    for begin in ("Tom and Tim ran. Tom and Tim sat. Tom and", "The cat said: I am a cat. The dog said: I am"):
        for sampling in (replace(GREEDY, max_new_tokens=40), replace(SAMPLED, max_new_tokens=40, repetition_penalty=1.0)):
            plain, drafted = (
                Conversation(model, tokenizer, ()).ask(tokenizer.encode(begin, special=True), replace(sampling, prompt_lookup=n))
                for n in (0, 8)
            )
            assert drafted.all() == plain.all()
            assert drafted.ids == plain.ids
            foretold += drafted.looked_up
    assert foretold > 0


# ---- fewer forward passes --------------------------------------------------------------------------------------------


def test_a_text_that_repeats_itself_takes_fewer_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token that was foretold saves one. Caught: no draft beyond the text's end."""
    line = random_tokens(1, 8, seed=4)[0].tolist()
    model = told_what_to_say(tiny_gpt("llama", max_position_embeddings=64), line * 9)
    calls = Calls(model, monkeypatch)
    plain = asked(model, line, replace(GREEDY, max_new_tokens=48))
    assert plain.ids == line * 6
    assert calls.widths == [8] + [1] * 47
    calls.widths.clear()
    answer = asked(model, line, replace(GREEDY, max_new_tokens=48), 10)
    assert answer.ids == plain.ids
    assert len(calls.widths) == 48 - answer.looked_up
    assert calls.widths == [8, 1, 11, 11, 11, 11, 2]  # two tokens alone; 4 times a draft and one more; the limit


def test_without_the_option_there_is_no_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = told_what_to_say(tiny_gpt("llama"), repeated(5, 20))
    calls = Calls(model, monkeypatch)
    assert asked(model, repeated(5, 2), GREEDY).looked_up == 0
    assert calls.widths == [10] + [1] * 23


def test_answers_side_by_side_are_given_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt("llama").double()
    prompts, calls = [repeated(), repeated(2, 9)], Calls(model, monkeypatch)
    answers = generate_batch(model, Letters(), (), prompts, replace(GREEDY, prompt_lookup=8))  # type: ignore[arg-type]
    assert set(calls.widths[1:]) == {1}
    assert [answer.ids for answer in answers] == [asked(model, prompt, GREEDY).ids for prompt in prompts]


def test_where_drafts_fail_they_become_rare_until_one_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text in which another id follows the same two each time, at last no oftener than one step in 16; then one that repeats itself.
    Caught: pauses that do not grow; a pause that a right draft does not end."""
    line = random_tokens(1, 8, seed=4)[0].tolist()
    text = [1, 2, *itertools.chain.from_iterable((n, 1, 2) for n in range(10, 90)), *line * 12]
    model = told_what_to_say(tiny_gpt("llama", max_position_embeddings=512), text)
    calls = Calls(model, monkeypatch)
    answer = asked(model, text[:8], replace(GREEDY, max_new_tokens=len(text) - 8), 4)
    assert answer.ids == text[8:]
    tried = [step for step, width in enumerate(calls.widths[1:]) if width > 1]
    failed = [step for step in tried if step < 230]
    gaps = [after - before for before, after in itertools.pairwise(failed)]
    assert gaps == sorted(gaps)
    assert gaps[0] <= 3 and LOOKUP_PAUSE < gaps[-1] <= LOOKUP_PAUSE + 3
    right = [step for step in tried if step >= 230]
    assert right == list(range(right[0], right[0] + len(right))) and len(right) >= 10


# ---- where an answer ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", range(1, 14))
def test_the_limit_may_lie_within_a_draft(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then none of it is computed that is not said. Caught: a draft as long as the whole rest, whose last logits nobody wants."""
    line = random_tokens(1, 4, seed=4)[0].tolist()
    model = told_what_to_say(tiny_gpt("llama"), line * 9)
    calls = Calls(model, monkeypatch)
    answer = asked(model, line * 2, replace(GREEDY, max_new_tokens=limit), 6)
    assert (answer.ids, answer.finish_reason) == ((line * 9)[8 : 8 + limit], "length")
    assert sum(calls.widths) == 8 + limit - 1  # all but the last token went in, once


def test_a_draft_never_leaves_the_context() -> None:
    """48 tokens: the cache is full with the last token but one, and every token is the one that comes without drafts."""
    model = tiny_gpt("llama", max_position_embeddings=48).double()
    sampling = replace(GREEDY, max_new_tokens=None)
    for length in (1, 20, 45, 46, 47):
        prompt = (repeated(3, 20))[:length]
        conversation = talk(model)
        answer = conversation.ask(prompt, replace(sampling, prompt_lookup=9))
        answer.all()
        assert answer.ids == asked(model, prompt, sampling).ids
        assert (len(answer.ids), answer.finish_reason) == (48 - length, "length")
        assert max(conversation.cache.lengths) <= conversation.cache.size <= 48


def test_an_end_token_within_a_draft_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt has it as well, as a chat has the end of each turn: a draft ends before it. Caught: drafts with it."""
    line = random_tokens(1, 6, seed=4)[0].tolist()
    end = 130
    model = told_what_to_say(tiny_gpt("llama"), [*line, end, *line, end, *line, end])
    calls = Calls(model, monkeypatch)
    answer = asked(model, [*line, end, *line[:2]], GREEDY, 9, [end])
    assert (answer.ids, answer.finish_reason) == ([*line[2:], end], "stop")
    assert calls.widths == [9, 4]  # the prompt; the third token with the other three


def test_what_is_broken_off_within_a_draft_is_gone_on_with() -> None:
    """After each number of tokens, by leaving the loop; then a longer prompt, the same prompt, and another one.
    Caught: a whole draft noted as held before it was confirmed."""
    model = tiny_gpt("llama").double()
    sampling = replace(GREEDY, prompt_lookup=7)
    wanted, short = asked(model, repeated(), GREEDY).ids, replace(sampling, max_new_tokens=6)
    for said in (1, 2, 3, 6, 7, 11, 19):
        conversation = talk(model)
        answer = conversation.ask(repeated(), sampling)
        for _ in itertools.islice(answer, said):
            pass
        assert answer.ids == wanted[:said]
        for prompt in ([*repeated(), *answer.ids, 5], repeated(), [*repeated()[:9], 3, 2]):
            again = conversation.ask(prompt, short)
            again.all()
            assert again.ids == asked(model, prompt, short).ids
            assert conversation.held == [*prompt, *again.ids][: len(conversation.held)]


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_an_exception_while_a_draft_is_checked_leaves_nothing_behind(fails_at: int) -> None:
    model = tiny_gpt("llama").double()
    conversation = talk(model)
    calls = itertools.count()

    def fail(*_: object) -> None:
        if next(calls) == fails_at:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask(repeated(), replace(GREEDY, prompt_lookup=7)).all()
    hook.remove()
    again = conversation.ask(repeated(), replace(GREEDY, prompt_lookup=7))
    again.all()
    assert again.ids == asked(model, repeated(), GREEDY).ids


# ---- drafts ----------------------------------------------------------------------------------------------------------


def test_a_draft_is_what_followed_the_last_time() -> None:
    """Three ids rather than two, the last time rather than the first; what runs to the end begins again. Caught: each of
    these the other way round."""
    assert Lookup([1, 2, 3, 4, 9, 2, 3, 5, 7, 2, 3], 3, ()).draft(9) == [5, 7, 2]
    assert Lookup([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 3, ()).draft(9) == [4, 9, 2]
    assert Lookup([8, 1, 2, 1, 2], 5, ()).draft(9) == [1, 2, 1, 2, 1]
    assert Lookup([1, 2, 3, 1, 2], 5, ()).draft(2) == [3, 1]
    assert Lookup([1, 2, 3, 1, 2], 5, ()).draft(0) == []
    assert Lookup([1, 2, 3, 1, 2], 5, {1}).draft(9) == [3]
    for nothing in ([], [1], [1, 2], [1, 2, 3, 4], [1, 3, 2, 1]):
        assert Lookup(nothing, 5, ()).draft(9) == []
