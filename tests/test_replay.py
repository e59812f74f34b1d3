"""The step that a GPU replays, on a CPU, where it is called as it is: the same logits as the plain one's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import EVERY, EXPERTS, random_tokens, relative, tiny_config, tiny_gpt
from talkers import byte_tokenizer
from test_generation import GREEDY, WINDOWED, ids_of, tiny_model
from test_promises import trained
from torch import Tensor

from litlora import generation
from litlora.config import Config
from litlora.generation import Conversation, reserve
from litlora.model import GPT, KVCache
from litlora.options import SamplingOptions
from litlora.replay import ReplayedStep
from litlora.tokenizer import Tokenizer


def varies(config: Config) -> bool:
    ropes = (config.rope_of(layer) for layer in range(config.num_hidden_layers))
    return any(rope.depends_on_length for rope in ropes if rope)


SERVED = [family for family in EVERY if family not in EXPERTS and not varies(tiny_config(family))]


@torch.inference_mode()
def plain(gpt: GPT, tokens: Tensor) -> Tensor:  # (T,) -> (T - 9, V)
    """Logits after each token from the tenth on, one at a time."""
    cache = KVCache(32)
    gpt(tokens[None, :9], cache=cache)
    return torch.stack([gpt(token.view(1, 1), cache=cache)[0, 0] for token in tokens[9:]])


@torch.inference_mode()
def replayed(gpt: GPT, tokens: Tensor) -> Tensor:
    """The same, in a cache that is too small at first, and holds what is no number where nothing was written."""
    cache = KVCache(11)
    gpt(tokens[None, :9], cache=cache)
    for held in cache.held.values():
        for side in held:
            side[:, :, 9:] = torch.nan
    step, found = ReplayedStep(gpt, cache), []
    for n, token in enumerate(tokens[9:], 9):
        assert cache.lengths == [n]
        reserve(cache, n + 1, 32)
        found.append(step(token.view(1, 1))[0, 0])
    return torch.stack(found)


@pytest.mark.parametrize("family", SERVED)
def test_a_replayed_step_gives_the_logits_of_a_plain_one(family: str) -> None:
    """Over windows, and while the cache grows. Caught: a position that stands still; what is no number left in keys or in values; a
    cache that has grown and is not noticed; a window that is left out of the mask."""
    gpt, tokens = tiny_gpt(family), random_tokens(1, 20)[0]
    assert relative(replayed(gpt, tokens), plain(gpt, tokens)) <= 1e-5


@pytest.mark.parametrize("case", ["lora", "dora", "pissa", "prompt", "scale-shift", "series", "parallel", "pro", "head"])
def test_with_whatever_is_attached(case: str) -> None:
    gpt, _, _ = trained(case, "qwen2")
    tokens = random_tokens(1, 20)[0]
    assert relative(replayed(gpt.eval(), tokens), plain(gpt, tokens)) <= 1e-5


def test_it_goes_on_after_the_conversation_was_taken_back() -> None:
    """`Conversation` forgets tokens by the length of its cache alone. Caught: positions that the step counts itself."""
    gpt, tokens = tiny_gpt(), random_tokens(1, 20)[0]
    with torch.inference_mode():
        cache = KVCache(32)
        gpt(tokens[None, :9], cache=cache)
        step = ReplayedStep(gpt, cache)
        for token in tokens[:5]:
            step(token.view(1, 1))
        cache.rewind(9)
        found = torch.cat([step(token.view(1, 1))[0] for token in tokens[9:]])
    assert relative(found, plain(gpt, tokens)) <= 1e-5


def test_it_is_made_anew_where_memory_ended_while_the_cache_grew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then some layers have new tensors and the cache its old size; a graph would go on in memory that was given back. Caught: the size
    alone looked at."""
    gpt, tokens = tiny_gpt(), random_tokens(1, 20)[0]
    with torch.inference_mode():
        cache = KVCache(16)
        gpt(tokens[None, :9], cache=cache)
        step = ReplayedStep(gpt, cache)
        step(tokens[None, 9:10])
        made, sizes, new = step.whole, iter(range(4)), Tensor.new_empty

        def new_empty(self: Tensor, *size: int) -> Tensor:
            if next(sizes) == 3:
                raise RuntimeError("out of memory")
            return new(self, *size)

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "new_empty", new_empty)
            with pytest.raises(RuntimeError, match="out of memory"):
                reserve(cache, 17, 32)
        assert cache.size == 16
        found = step(tokens[None, 10:11])[0, 0]
    assert step.whole is not made
    assert relative(found, plain(gpt, tokens)[1]) <= 1e-5


def test_nothing_in_a_step_asks_for_a_number_or_has_a_shape_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph cannot hold: `item`, `tolist`, and operations of which another token has other shapes or others of. Caught: views of the
    cache that end with the text."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, tuple[torch.Size, ...]]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            assert func is not torch.ops.aten._local_scalar_dense.default
            self.seen.append((str(func), tuple(arg.shape for arg in args if isinstance(arg, Tensor))))
            return func(*args, **(kwargs or {}))

    gpt, tokens = tiny_gpt("gemma3"), random_tokens(1, 20)[0]
    with torch.inference_mode():
        cache = KVCache(32)
        gpt(tokens[None, :9], cache=cache)
        step = ReplayedStep(gpt, cache)
        step(tokens[None, 9:10])
        found = []
        for token in tokens[10:14]:
            with Operations() as operations:
                step(token.view(1, 1))
            found.append(operations.seen)
    assert found[0] == found[1] == found[2] == found[3]
    assert len(found[0]) > 50


@pytest.mark.parametrize("family", ["llama3", "qwen3_moe", "dynamic"])
def test_where_it_serves(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router's choice must be known to the host, and a rope that depends on a length is another one at each token."""
    gpt = tiny_gpt(family)
    assert not ReplayedStep.serves(gpt)  # on a CPU
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert ReplayedStep.serves(gpt) is (family == "llama3")


def test_a_conversation_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions, the second one with the beginning of the first. Caught: a step that is never asked; a cache that has no room left."""
    model, tokenizer = tiny_model(WINDOWED), Tokenizer(byte_tokenizer(tmp_path))
    monkeypatch.setattr(generation, "FIRST_CACHE_TOKENS", 8)
    asked = []
    plain = ReplayedStep.__call__
    monkeypatch.setattr(ReplayedStep, "__call__", lambda self, token: asked.append(token) or plain(self, token))

    def answers(sampling: SamplingOptions = GREEDY) -> list[list[int]]:
        conversation, said = Conversation(model, tokenizer, ()), []
        for prompt in (ids_of(6), [*ids_of(6)[:4], *ids_of(3, seed=1)]):
            answer = conversation.ask(prompt, sampling)
            answer.all()
            said.append(answer.ids)
        return said

    expected = answers()
    assert not asked
    monkeypatch.setattr(ReplayedStep, "serves", staticmethod(lambda model: True))
    assert answers() == expected
    assert len(asked) == sum(map(len, expected)) - 2  # the first token of each comes from the prompt
    assert answers(replace(GREEDY, prompt_lookup=4)) == expected  # drafts are computed as they were, between steps that are replayed
