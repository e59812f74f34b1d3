"""What is kept for the backward pass (C2): nothing twice, and nothing that is cheap to make again of what is kept anyway."""

import copy
import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import FAMILIES, kept_for_backward, random_tokens, tiny_gpt
from test_train import TUNINGS, WITH_DROPOUT, adapted
from torch import Tensor

from litlora import kernels
from litlora import model as model_file
from litlora.kernels import cheap, keeping_less, looked_up, packed, watched
from litlora.methods import tuning_of
from litlora.methods.attach import attach, linears, trainable
from litlora.model import GPT, Composed, Linear, LoRA
from litlora.options import LoRAOptions
from litlora.quantized import hold, quantized

SEGMENTS, PREFIX = (9, 14, 6), 10
T = PREFIX + sum(SEGMENTS)
CPU = torch.device("cpu")


def loss_of(model: GPT) -> Tensor:
    """Of three samples that begin alike."""
    tokens = torch.randint(0, 131, (1, T + 1), generator=torch.Generator().manual_seed(1))
    return model(tokens[:, :-1], tokens[:, 1:], segments=SEGMENTS, prefix=PREFIX)


def test_a_block_keeps_what_nothing_cheap_can_make() -> None:
    """C2, byte by byte, of a Llama with LoRA on all of it: x twice, q, k, v, what attention gave, gate and up; A x of seven, and small
    tables. Caught: the norms', the MLP's or the joined samples' output kept; keys and values kept for each sample with their beginning."""
    r = 4
    model = adapted(options=LoRAOptions(r=r))
    config, own = model.config, {parameter.data_ptr() for parameter in model.parameters()}
    with kept_for_backward() as held:
        loss_of(model)
    kept = [tensor.untyped_storage().nbytes() // 4 for tensor in held if tensor.data_ptr() not in own]
    C, inner, H, K, D = (
        config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )  # fmt: skip
    numbers = T * (2 * C + 2 * (H + K) * D + 2 * inner + 7 * r)  # of a block
    softmax, tables, masks = T * H, 2 * T * D, sum(n * (PREFIX + n) for n in SEGMENTS)  # one number for each query; for all blocks
    assert sum(kept) == config.num_hidden_layers * (numbers + softmax) + tables + masks


CASES = [
    *((family, LoRAOptions(r=4), None) for family in FAMILIES),
    ("mixtral", LoRAOptions(r=4, target_modules=["q_proj", "w1", "w2", "w3"]), "nf4"),
    ("deepseek_v3", LoRAOptions(r=4, target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"]), "nf4"),
    *(("llama3", options, None) for options in TUNINGS.values()),
    ("llama3", WITH_DROPOUT["lora"], "int8"),
    ("llama3", WITH_DROPOUT["dora"], "bf16"),
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("family", "options", "kind"), CASES)
def test_what_is_made_again_has_the_same_bits(
    family: str, options: Any, kind: str | None, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N01: every gradient, to the bit, is that of a pass that keeps all. Caught: a gate that its recipe writes over; another eps."""
    found = []
    for whole in (True, False):
        if whole:
            monkeypatch.setattr(model_file, "keeping_less", lambda device: nullcontext())
        model = tiny_gpt(family)
        if kind:
            for name, host in linears(model).items():
                if name != "lm_head":
                    hold(host, quantized(kind, host.weight.detach()))
        attach(model, tuning_of(options, model.config), seed=3)
        model.train().model.recompute = recompute
        torch.manual_seed(5)
        with torch.no_grad():  # B is 0 at first, and A has no gradient then
            for parameter in trainable(model).values():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        loss_of(model).backward()
        found.append({name: parameter.grad for name, parameter in trainable(model).items()})
        monkeypatch.undo()
    all_kept, less = found
    assert all_kept.keys() == less.keys() != set()
    for name, gradient in all_kept.items():
        assert gradient is None if less[name] is None else torch.equal(gradient, less[name]), name


@pytest.mark.parametrize("bias", [False, True])
def test_lora_writes_over_what_its_host_gave(bias: bool) -> None:
    """C2: no second tensor of that size beside it, except where a view (torch's product with a bias) would cost one more on the way back.
    Composed adapters each have it as it was. Caught: y gone when it was taken away; gradients of a plain formula missed."""
    torch.manual_seed(2)
    host, given = Linear(6, 5, bias).double().requires_grad_(False), []
    host.adapter = LoRA(host, 3, 4.0, 0.0)
    torch.nn.init.normal_(host.adapter.lora_B)
    honest = host.product
    host.product = lambda *of: given.append(honest(*of)) or given[-1]
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    y = host(x)
    assert (y.data_ptr() == given[0].data_ptr()) is not bias
    a, b = host.adapter.lora_A, host.adapter.lora_B
    plain = torch.nn.functional.linear(x, host.weight, host.bias) + 4 / 3 * (x @ a.t() @ b.t())
    torch.testing.assert_close(y, plain)
    weight = torch.randn_like(y)
    for ours, right in zip(*(torch.autograd.grad((of * weight).sum(), (x, a, b)) for of in (y, plain)), strict=True):
        torch.testing.assert_close(ours, right)
    host.adapter = Composed([host.adapter, copy.deepcopy(host.adapter)], [0.5, 2.0])
    with torch.no_grad():
        without = host(x)
    torch.testing.assert_close(host(x), without)


# ---- a recipe ----------------------------------------------------------------------------------------------------------


def doubled(x: Tensor) -> Tensor:
    return x * 2


def test_a_recipe_does_not_keep_what_it_makes() -> None:
    """Not while it waits, nor after the last that needed it had it: three products of one cheap tensor make it once more, together.
    Caught: made three times; kept after the third."""
    made: list[Any] = []

    def counted(x: Tensor) -> Tensor:
        y = x * 2
        made.append(weakref.ref(y.untyped_storage()))
        return y

    x, weights = torch.randn(5, 3), [torch.randn(3, 3, requires_grad=True) for _ in range(3)]
    with keeping_less(CPU):
        y = cheap(counted, x)
        loss = sum((y @ weight).sum() for weight in weights)
    del y
    gc.collect()
    assert [one() for one in made] == [None]
    loss.backward()
    gc.collect()
    assert [one() for one in made] == [None, None]
    for weight in weights:
        torch.testing.assert_close(weight.grad, (2 * x).sum(0)[:, None].expand(3, 3))


def test_what_is_cheap_may_be_made_of_what_is_cheap() -> None:
    """Then neither is kept, but what the first is made of. Caught: the first one kept for the second's recipe."""
    x, weight = torch.randn(5, 3), torch.randn(3, 3, requires_grad=True)
    with kept_for_backward() as held, keeping_less(CPU):
        first = cheap(doubled, x)
        second = cheap(doubled, first)
        loss = (second @ weight).sum()
        alive = [weakref.ref(one.untyped_storage()) for one in (first, second)]
        del first, second
    gc.collect()
    assert [one() for one in alive] == [None, None]
    assert [tensor.data_ptr() for tensor in held] == [x.data_ptr()]
    loss.backward()
    torch.testing.assert_close(weight.grad, (4 * x).sum(0)[:, None].expand(3, 3))


def test_what_was_written_over_is_kept_itself() -> None:
    """Caught: the recipe of what it was."""
    y = cheap(doubled, torch.ones(3))
    assert packed(y) is not y
    assert packed(y.add_(1)) is y


@pytest.mark.parametrize("name", ["self_attn.q_proj", "input_layernorm", "mlp.up_proj"])
def test_what_is_written_over_before_it_is_needed_is_noticed(name: str) -> None:
    """As autograd does without hooks: gradients of other numbers would be silently wrong. Caught: the look left out, of what is kept
    itself and of what a recipe is made of."""
    model = tiny_gpt("llama").train()
    tokens = random_tokens(1, 9)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    with torch.no_grad():
        model.get_parameter(f"model.layers.1.{name}.weight").mul_(2)
    with pytest.raises(RuntimeError, match="written over since"):
        loss.backward()
    one, other = torch.ones(3), torch.ones(3)
    made = watched(cheap(torch.add, one, other))
    other.mul_(2)
    with pytest.raises(RuntimeError, match="written over since"):
        looked_up(made)


def test_a_view_is_made_again_as_the_view() -> None:
    """A transposed one, and a part. Caught: the whole."""
    x = torch.randn(4, 6)
    y = cheap(doubled, x)
    for view in (y.t(), y[1:3, 2:], y.view(2, 12), y.flatten()):
        assert torch.equal(kernels.unpacked(packed(view)), view)


def test_a_gpu_keeps_all_of_it() -> None:
    """There a pass over memory takes time beside a product."""
    assert isinstance(keeping_less(torch.device("cuda")), nullcontext)


def test_without_gradients_nothing_is_noted() -> None:
    with torch.no_grad():
        y = cheap(doubled, torch.ones(3))
    assert packed(y) is y


def test_after_a_step_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a collection: no recipe is in a circle. Caught: one that holds what it made."""
    model, honest = adapted(options=TUNINGS["lora"]), kernels.Recipe.keep
    made: list[Any] = []
    monkeypatch.setattr(kernels.Recipe, "keep", lambda recipe: (made.append(weakref.ref(recipe)), honest(recipe)))
    gc.disable()
    try:
        loss_of(model).backward()
        assert made and not [one() for one in made if one() is not None]
    finally:
        gc.enable()
