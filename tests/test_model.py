"""model.py: what a GPT promises besides equality with the references (test_parity.py). Tiny models, one thread."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, gradients, random_tokens, randomise, relative, tiny_config, tiny_gpt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from litlora import kernels
from litlora.config import Rope, rotary_steps
from litlora.errors import UserError
from litlora.kernels import SummedLoss
from litlora.methods.attach import merge
from litlora.model import (
    GPT,
    IGNORE,
    Adapter,
    Composed,
    Context,
    DoRA,
    KVCache,
    Linear,
    LoRA,
    init_weights,
    rotary_frequencies,
    rotary_table,
)

WINDOW, CONTEXT = 7, 48  # of the tiny mistral


def adapt(gpt: GPT, method: type[LoRA] = LoRA, seed: int = 4, **options: Any) -> GPT:
    """Freeze `gpt` and put random adapters, of about a tenth of W, on every Linear that may have one."""
    gpt.requires_grad_(False)
    for name, host in linears(gpt):
        if not (name == "lm_head" and gpt.config.tie_word_embeddings):
            host.adapter = method(host, **{"r": 3, "alpha": 6, "dropout": 0.0, **options})
    shake(gpt, seed)
    return gpt.eval()


@torch.no_grad()
def shake(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("lora_A", "lora_B")):
            parameter.copy_(0.06 * noise)
        elif name.endswith("magnitude"):
            parameter.mul_(1 + 0.2 * noise)


def linears(gpt: GPT) -> list[tuple[str, Linear]]:
    return [(name, module) for name, module in gpt.named_modules() if isinstance(module, Linear)]


class Shapes(TorchDispatchMode):
    """The shape of every tensor that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen += [tensor.shape for tensor in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(tensor, Tensor)]
        return out


# ---- names -----------------------------------------------------------------------------------------------------------


def test_parameters_carry_hugging_faces_names_and_nothing_else_is_in_the_state() -> None:
    gpt = tiny_gpt("qwen3")
    block = "model.layers.2."
    names = set(gpt.state_dict())
    expected = {
        "self_attn.q_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.o_proj.bias",
        "mlp.down_proj.weight",
        "input_layernorm.weight",
    }
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < names
    assert {block + name for name in expected} < names
    gpt(random_tokens(1, 4), cache=KVCache(4))
    assert set(gpt.state_dict()) == names == {name for name, _ in gpt.named_parameters()}


def test_a_tied_head_is_the_embedding() -> None:
    gpt = tiny_gpt("smollm")
    assert gpt.lm_head.weight is gpt.model.embed_tokens.weight
    assert copy.deepcopy(gpt).bfloat16().lm_head.weight.dtype == torch.bfloat16
    assert sum(1 for name, _ in gpt.named_parameters() if name.startswith(("lm_head", "model.embed"))) == 1


def test_attaching_renames_no_parameter() -> None:
    gpt = tiny_gpt()
    before = set(gpt.state_dict())
    after = set(adapt(gpt, DoRA).state_dict())
    assert before < after
    assert {name.rpartition(".adapter.")[2] for name in after - before} == {"lora_A", "lora_B", "magnitude"}


# ---- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "linear", "llama3", "yarn"])
def test_the_rotary_table_stays_exact_in_a_bf16_model(family: str) -> None:
    """M04: fp32, off by at most pos * 2^-23 + 1e-6 at far positions. Must catch: angles in bf16 (error 2.0)."""
    gpt = tiny_gpt(family).bfloat16()
    rope, D = gpt.config.rope, gpt.config.head_dim
    far = [0, 257, 8191, 131_071]
    cos, sin = rotary_table(torch.tensor(far), rope, D)
    assert cos.dtype == sin.dtype == torch.float32
    own = Context.of(random_tokens(1, 3), gpt.config, None, 0, None).turns[rope]
    assert own.cos.dtype == own.sin.dtype == torch.float32
    steps, gain = rotary_steps(rope, D)
    for row, position in enumerate(far):
        angles = position * torch.tensor(steps, dtype=torch.float64)
        bound = gain * (position * 2**-23 + 1e-6)
        assert (cos[0, 0, row] - gain * torch.cat((angles, angles)).cos()).abs().max() <= bound
        assert (sin[0, 0, row] - gain * torch.cat((-angles.sin(), angles.sin()))).abs().max() <= bound


def test_a_stretched_rope_turns_quick_dimensions_as_before_and_slow_ones_less() -> None:
    """What "llama3" and "yarn" have in common, whatever their ramps: the ends of the frequency range."""
    plain, _ = rotary_frequencies(Rope(rope_theta=1e6), 64, torch.device("cpu"))
    for kind in ("llama3", "yarn"):
        rope = Rope(rope_theta=1e6, rope_type=kind, factor=8.0, original_max_position_embeddings=8192)
        steps, gain = rotary_frequencies(rope, 64, torch.device("cpu"))
        assert torch.equal(steps[0], plain[0])
        torch.testing.assert_close(steps[-1], plain[-1] / 8)
        assert (steps[:-1] > steps[1:]).all()
        assert gain == pytest.approx(1.0 if kind == "llama3" else 0.1 * math.log(8) + 1)


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("length", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1, CONTEXT - 1, CONTEXT])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_cache_changes_nothing(family: str, length: int, chunk: int) -> None:
    """M05: prefill in chunks, then token by token to the context's end. Must catch: a window that starts at the chunk."""
    gpt, tokens = tiny_gpt(family), random_tokens(2, CONTEXT)
    cache = KVCache(CONTEXT, rows=2)
    pieces = [*tokens[:, :length].split(chunk, 1), *tokens[:, length:].unbind(1)]
    with torch.no_grad():
        whole = gpt(tokens)
        parts = torch.cat([gpt(piece.view(2, -1), cache=cache) for piece in pieces], 1)
    assert (parts - whole).abs().max() <= 2e-6 * max(1, whole.abs().max())
    assert cache.lengths == [CONTEXT, CONTEXT]


def test_a_window_hides_what_lies_before_it() -> None:
    """A token further back than layers * (window - 1) cannot matter, one at that distance does; cached or not."""
    gpt, tokens = tiny_gpt("mistral"), random_tokens(1, 40)
    reach = gpt.config.num_hidden_layers * (WINDOW - 1)
    for distance, equal in ((reach + 1, True), (reach, False)):
        other = tokens.clone()
        other[0, 39 - distance] += 1
        assert torch.equal(gpt(tokens)[0, 39], gpt(other)[0, 39]) == equal


def test_conversations_on_one_model_do_not_disturb_each_other() -> None:
    """M06: two caches, interleaved, calls failing half-way and at the end; both end as if they had been alone. Must catch:
    a cache that counts tokens before the head has answered."""
    gpt = tiny_gpt("mistral")
    one, two = random_tokens(1, 12, seed=1), random_tokens(1, 12, seed=2)
    caches = KVCache(12), KVCache(12)
    alone = [gpt(tokens)[:, 5:] for tokens in (one, two)]
    for tokens, cache in zip((one, two), caches, strict=True):
        gpt(tokens[:, :5], cache=cache)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    for module in (gpt.model.layers[1], gpt.lm_head):
        handle = module.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            gpt(two[:, :7], cache=caches[0])
        handle.remove()
    after = [[gpt(tokens[:, i : i + 1], cache=cache) for tokens, cache in zip((one, two), caches, strict=True)] for i in range(5, 12)]
    for which in (0, 1):
        torch.testing.assert_close(torch.cat([step[which] for step in after], 1), alone[which], rtol=1e-5, atol=1e-5)


def test_one_token_too_many_is_refused_before_anything_is_done() -> None:
    """M06: exactly the context fits; one more is a clean error, with nothing computed, allocated or changed."""
    gpt, tokens = tiny_gpt(), random_tokens(1, 9)
    full, empty = KVCache(8), KVCache(8)
    gpt(tokens[:, :8], cache=full)
    held = [tensor for pair in full.held.values() for tensor in pair]
    before = [tensor.clone() for tensor in held]
    for cache, more in ((full, tokens[:, :1]), (empty, tokens)):
        with pytest.raises(UserError, match="holds 8 tokens in all"), Shapes() as shapes:
            gpt(more, cache=cache)
        assert not shapes.seen
    assert full.lengths == [8]
    assert all(torch.equal(was, now) for was, now in zip(before, held, strict=True))
    assert empty.lengths == [0]
    assert not empty.held


@pytest.mark.parametrize("rows", [2, 3, 8])
@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_rows_of_unequal_length_decode_as_if_alone(family: str, rows: int) -> None:
    """M07: right-padded prefill, rewind to the true lengths, six steps. Must catch: one row's positions for all."""
    gpt = tiny_gpt(family)
    lengths = [(5, 11, 1, 8, 3, 14, 2, 9)[i] for i in range(rows)]
    prompts = [random_tokens(1, n, seed=n) for n in lengths]
    padded = torch.cat([F.pad(prompt, (0, max(lengths) - prompt.size(1))) for prompt in prompts])
    cache = KVCache(24, rows)
    logits = gpt(padded, cache=cache, logits_at=torch.tensor(lengths) - 1)
    assert logits.shape == (rows, 1, 131)
    cache.rewind(lengths)
    for _ in range(6):
        for row, prompt in enumerate(prompts):
            torch.testing.assert_close(logits[row, 0], gpt(prompt)[0, -1], rtol=1e-5, atol=1e-5)
        tokens = logits.argmax(-1)  # (B, 1)
        prompts = [torch.cat((prompt, token[None]), 1) for prompt, token in zip(prompts, tokens, strict=True)]
        logits = gpt(tokens, cache=cache)
    ragged_chunk = random_tokens(rows, 3, seed=50)
    logits = gpt(ragged_chunk, cache=cache)
    for row, prompt in enumerate(prompts):
        alone = gpt(torch.cat((prompt, ragged_chunk[row : row + 1]), 1))[0, -3:]
        torch.testing.assert_close(logits[row], alone, rtol=1e-5, atol=1e-5)


def test_rewinding_forgets() -> None:
    gpt, tokens = tiny_gpt(), random_tokens(1, 10)
    cache = KVCache(10)
    gpt(tokens[:, :8], cache=cache)
    cache.rewind(3)
    torch.testing.assert_close(gpt(tokens[:, 3:], cache=cache), gpt(tokens)[:, 3:], rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        cache.rewind(11)


def test_a_cache_filled_in_inference_mode_can_be_used_outside_it() -> None:
    gpt, tokens = tiny_gpt(), random_tokens(1, 6)
    cache = KVCache(6)
    with torch.inference_mode():
        gpt(tokens[:, :4], cache=cache)
    torch.testing.assert_close(gpt(tokens[:, 4:], cache=cache), gpt(tokens)[:, 4:], rtol=1e-5, atol=1e-5)
    loss = gpt(tokens, tokens)  # nor does anything made there spoil training
    loss.backward()


def test_a_cached_call_records_no_gradient() -> None:
    gpt = tiny_gpt()
    assert not gpt(random_tokens(1, 4), cache=KVCache(8)).requires_grad
    assert gpt(random_tokens(1, 4)).requires_grad


# ---- packing ---------------------------------------------------------------------------------------------------------

SEGMENTS = [5, 19, 1, 8]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("adapted", [None, LoRA, DoRA])
@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3", "smollm"])
def test_packed_samples_give_the_loss_and_gradients_of_separate_ones(
    family: str, adapted: type[LoRA] | None, dtype: torch.dtype, bound: float
) -> None:
    """N09. Must catch: positions that go on; attention that looks across; a loss divided per sample."""
    gpt = tiny_gpt(family).to(dtype)
    if adapted:
        adapt(gpt, adapted)
        assert all(parameter.dtype == dtype for parameter in gpt.parameters())
    tokens, targets = random_tokens(1, sum(SEGMENTS)), random_tokens(1, sum(SEGMENTS), seed=1)
    targets[0, ::3] = IGNORE
    packed = gpt(tokens, targets, segments=SEGMENTS)
    packed_grads = gradients(gpt, packed)
    pieces = zip(tokens.split(SEGMENTS, 1), targets.split(SEGMENTS, 1), strict=True)
    alone: Tensor = sum(gpt(*piece) for piece in pieces)
    assert packed.dtype == dtype
    assert relative(packed, alone) <= bound
    grads = gradients(gpt, alone)
    assert grads.keys() == packed_grads.keys()
    for name, grad in grads.items():
        assert relative(packed_grads[name], grad) <= bound, name


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_a_packed_sample_does_not_see_its_neighbours(family: str) -> None:
    """N10: changing the first sample leaves the others' logits equal to the bit. Must catch: restarting positions only."""
    gpt, tokens = tiny_gpt(family), random_tokens(1, sum(SEGMENTS))
    other = tokens.clone()
    other[0, : SEGMENTS[0]] += 1
    before, after = gpt(tokens, segments=SEGMENTS), gpt(other, segments=SEGMENTS)
    assert torch.equal(before[:, SEGMENTS[0] :], after[:, SEGMENTS[0] :])
    assert not torch.equal(before[:, : SEGMENTS[0]], after[:, : SEGMENTS[0]])
    torch.testing.assert_close(before[:, 5:24], gpt(tokens[:, 5:24]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_long_row_makes_no_mask_of_its_length_squared(family: str) -> None:
    """Packed or not, windowed or not: memory for attention grows with T, and with T times the window at most."""
    gpt, segments = tiny_gpt(family), [200, 150, 50]
    with Shapes() as shapes:
        gpt(random_tokens(1, 400), random_tokens(1, 400), segments=segments).backward()
        gpt(random_tokens(1, 400), random_tokens(1, 400)).backward()
    largest = max(shapes.seen, key=math.prod)
    assert math.prod(largest) <= 400 * max(131, 72), largest


def test_padding_on_the_right_changes_nothing_before_it() -> None:
    gpt, tokens = tiny_gpt("mistral"), random_tokens(1, 9)
    torch.testing.assert_close(gpt(F.pad(tokens, (0, 5), value=3))[:, :9], gpt(tokens), rtol=1e-6, atol=1e-6)


# ---- the loss --------------------------------------------------------------------------------------------------------


def head_of(kind: str) -> GPT:
    """A model whose head is of a kind; what lies below always carries LoRA, so that the loss has somewhere to flow."""
    gpt = tiny_gpt("smollm" if kind == "tied" else "llama3")
    if kind != "tied":
        adapt(gpt, DoRA if kind == "dora" else LoRA)
        if kind in ("frozen", "trained"):
            gpt.lm_head.adapter = None
    gpt.lm_head.weight.requires_grad_(kind in ("tied", "trained"))
    return gpt


def plain_loss(gpt: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(gpt(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


@pytest.fixture
def three_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "chunk_rows", lambda V, device: 3)


@pytest.mark.usefixtures("three_rows_at_once")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["frozen", "lora", "dora", "trained", "tied"])
def test_a_loss_in_chunks_equals_cross_entropy_over_all_logits(kind: str, dtype: torch.dtype) -> None:
    """N09's sum, for every kind of head, gradients included. Must catch: only the last chunk's gradient of the head."""
    gpt = head_of(kind).to(dtype)
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=1)
    targets[:, :5] = IGNORE
    ours, expected = gpt(tokens, targets), plain_loss(gpt, tokens, targets)
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    assert relative(ours, expected) <= bound
    found, wanted = gradients(gpt, 0.25 * ours), gradients(gpt, 0.25 * expected)
    assert found.keys() == wanted.keys()
    assert any(name.startswith("lm_head") or "embed" in name for name in found) == (kind != "frozen")
    for name, grad in wanted.items():
        assert relative(found[name], grad) <= bound, name


@pytest.mark.usefixtures("three_rows_at_once")
def test_the_logits_of_all_graded_tokens_never_exist_at_once() -> None:
    gpt = head_of("lora")
    tokens, targets = random_tokens(1, 40), random_tokens(1, 40, seed=1)
    targets[:, :10] = IGNORE
    with Shapes() as shapes:
        gpt(tokens, targets).backward()
    V = gpt.config.vocab_size
    assert max(shape[0] for shape in shapes.seen if len(shape) == 2 and shape[1] == V and shape[0] != gpt.config.hidden_size) == 3


def test_nothing_graded_is_a_loss_of_zero_with_gradients_of_zero() -> None:
    """N13: no NaN, and every gradient is there (a distributed run waits for it)."""
    for kind in ("frozen", "lora", "dora", "trained", "tied"):
        gpt = head_of(kind)
        loss = gpt(random_tokens(1, 6), torch.full((1, 6), IGNORE))
        assert loss.item() == 0
        grads = gradients(gpt, loss)
        assert grads.keys() == {name for name, parameter in gpt.named_parameters() if parameter.requires_grad}
        assert all((grad == 0).all() for grad in grads.values())


def test_a_loss_is_a_sum_so_micro_batches_add_up() -> None:
    gpt, tokens = tiny_gpt(), random_tokens(4, 12)
    targets = tokens.clone()
    targets[0, :9] = IGNORE
    torch.testing.assert_close(gpt(tokens[:1], targets[:1]) + gpt(tokens[1:], targets[1:]), gpt(tokens, targets))


def test_without_gradients_the_loss_is_the_same_and_nothing_is_kept() -> None:
    gpt, tokens = tiny_gpt(), random_tokens(2, 12)
    with torch.no_grad():
        quiet = gpt(tokens, tokens)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, gpt(tokens, tokens), rtol=1e-6, atol=0)


def test_large_logits_do_not_overflow() -> None:
    """A softmax without its shift would be infinite at 90."""
    gpt = tiny_gpt("llama")
    with torch.no_grad():
        gpt.lm_head.weight.mul_(300)
    tokens = random_tokens(1, 8)
    assert relative(gpt(tokens, tokens), plain_loss(gpt, tokens, tokens)) < 1e-5


def test_a_bf16_model_has_an_fp32_loss() -> None:
    gpt, tokens = tiny_gpt(), random_tokens(2, 20)
    exact = gpt(tokens, tokens)
    rough = gpt.bfloat16()(tokens, tokens)
    assert rough.dtype == torch.float32
    assert relative(rough, exact) < 1e-2


# ---- derivatives that are written out --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("apply", "shapes"),
    [
        (lambda x, w: kernels.Normed.apply(x, w, 1e-5), [(2, 3, 6), (6,)]),
        (kernels.Gated.apply, [(2, 3, 5), (2, 3, 5)]),
    ],
)
def test_a_written_out_derivative_is_the_derivative(apply: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    """Against finite differences in fp64. Must catch: a missing 1 / C in Normed. Caught: a gate's derivative without what it multiplies."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(apply, inputs)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_turn_back_is_the_derivative_of_a_turn(interleaved: bool) -> None:
    """Likewise; its table turns by one angle per pair, else it has no inverse. Caught: turned forwards; halves for neighbours."""
    torch.manual_seed(0)
    x, angle = torch.randn(2, 4, 3, 6, dtype=torch.float64, requires_grad=True), torch.rand(1, 1, 3, 3, dtype=torch.float64)
    both = ((angle.cos(), angle.cos()), (-angle.sin(), angle.sin()))
    cos, sin = (torch.stack(sides, -1 if interleaved else -2).flatten(-2) for sides in both)
    assert torch.autograd.gradcheck(lambda x: kernels.Rotated.apply(x, cos, sin, interleaved), [x])


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_a_fresh_adapter_changes_nothing(family: str, method: type[LoRA]) -> None:
    """Promise 8; LoRA to the bit, DoRA to rounding (its gain is m / |W|)."""
    gpt, tokens = tiny_gpt(family), random_tokens(2, 12)
    before = gpt(tokens)
    for _, host in linears(gpt):
        host.adapter = method(host, 4, 8.0, 0.0)
    after = gpt(tokens)
    if method is LoRA:
        assert torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_only_what_was_attached_learns(method: type[LoRA]) -> None:
    gpt = adapt(tiny_gpt(), method)
    grads = gradients(gpt, gpt(random_tokens(2, 8), random_tokens(2, 8, seed=1)))
    assert grads.keys() == {name for name, _ in gpt.named_parameters() if ".adapter." in name}
    assert all(grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_adapters_stay_fp32_on_a_bf16_base(method: type[LoRA]) -> None:
    """Their update would be lost in bf16; what comes out has the base's dtype all the same."""
    gpt, tokens = tiny_gpt(), random_tokens(2, 12)
    rough = adapt(copy.deepcopy(gpt).bfloat16(), method)
    exact = adapt(gpt.bfloat16().float(), method)
    assert {p.dtype for name, p in rough.named_parameters() if ".adapter." in name} == {torch.float32}
    logits = rough(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - exact(tokens)).abs().max() <= 3e-2 * exact(tokens).abs().max()
    assert all(grad.dtype == torch.float32 for grad in gradients(rough, rough(tokens, tokens)).values())


def test_dora_keeps_a_small_change_of_length_on_a_bf16_base() -> None:
    """A gain of 1.0035 is 1 in bf16, so it is applied in fp32. Must catch: the gain cast to y's dtype."""
    host = Linear(64, 4000, bias=False).bfloat16()
    host.adapter = DoRA(host, 2, 2.0, 0.0)
    x = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = host(x).float()
    with torch.no_grad():
        host.adapter.magnitude.mul_(1.0035)
    assert 1.002 < host(x).float().abs().sum() / before.abs().sum() < 1.006


def test_dropout_belongs_to_training_and_to_the_adapter() -> None:
    gpt = adapt(tiny_gpt(), dropout=0.5)
    tokens = random_tokens(1, 8)
    assert torch.equal(gpt(tokens), gpt(tokens))
    gpt.train()
    assert not torch.equal(gpt(tokens), gpt(tokens))


def test_several_adapters_add_up_by_weight() -> None:
    """y + sum of w_i (adapter_i(host, x, y) - y), each seeing the base's y."""
    host = Linear(10, 6, bias=True)
    one, two = LoRA(host, 2, 4.0, 0.0), LoRA(host, 3, 3.0, 0.0)
    shake(one, 1)
    shake(two, 2)
    x = torch.randn(2, 5, 10)
    y = host(x)
    expected = y + 0.25 * (one(host, x, y) - y) - 1.5 * (two(host, x, y) - y)
    host.adapter = Composed([one, two], [0.25, -1.5])
    torch.testing.assert_close(host(x), expected)
    (host.weight.data, host.bias.data), host.adapter = host.adapter.folded(host), None
    torch.testing.assert_close(host(x), expected, rtol=1e-5, atol=1e-5)


def test_dora_goes_alone() -> None:
    host = Linear(10, 6, bias=False)
    dora, lora = DoRA(host, 2, 4.0, 0.0), LoRA(host, 2, 4.0, 0.0)
    for adapters, weights in (([dora, lora], [1.0, 1.0]), ([dora], [0.5])):
        with pytest.raises(UserError, match="DoRA"):
            Composed(adapters, weights)
    Composed([dora], [1.0])


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    host = Linear(8, 8, bias=False)
    assert LoRA(host, 16, 32.0, 0.0).scale == 2.0
    assert LoRA(host, 16, 32.0, 0.0, use_rslora=True).scale == 8.0


# ---- merging ---------------------------------------------------------------------------------------------------------

DTYPES: dict[torch.dtype, float] = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # N05's bounds


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("family", ["llama3", "qwen2", "smollm"])
def test_a_merged_model_is_plain_and_computes_the_same(family: str, method: type[LoRA], dtype: torch.dtype) -> None:
    """N05."""
    gpt = adapt(tiny_gpt(family).to(dtype), method)
    tokens = random_tokens(2, 20)
    before = gpt(tokens).float()
    plain = GPT(merge(gpt).config).to(dtype)
    plain.load_state_dict(gpt.state_dict(), strict=True)
    after = plain(tokens).float()
    assert (after - before).abs().max() <= DTYPES[dtype] * max(1, before.abs().max())
    assert {parameter.dtype for parameter in gpt.parameters()} == {dtype}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_rounds_once(dtype: torch.dtype, use_rslora: bool) -> None:
    """N04: against fp64, 0.5 ulp of the result plus the fp32 product's own error. Must catch: B A rounded before it is added."""
    torch.manual_seed(0)
    host = Linear(40, 30, bias=False).to(dtype)
    lora = LoRA(host, 5, 12.0, 0.0, use_rslora)
    shake(lora, 3)
    W, A, B, s = (value.detach().double() for value in (host.weight, lora.lora_A, lora.lora_B, torch.tensor(lora.scale)))
    exact = W + s * B @ A
    weight, bias = lora.folded(host)
    merged = weight.to(dtype).double()
    assert bias is None
    ulp = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    assert ((merged - exact).abs() <= 0.5 * ulp + (5 + 2) * 2**-24 * (W.abs() + s * B.abs() @ A.abs())).all()


def test_merging_a_tied_head_unties_it_and_says_so() -> None:
    """A04: the embedding is not to change because the head learnt."""
    gpt, tokens = tiny_gpt("smollm"), random_tokens(1, 10)
    gpt.lm_head.adapter = LoRA(gpt.lm_head, 3, 6.0, 0.0)
    shake(gpt, 5)
    embedding, before = gpt.model.embed_tokens.weight.clone(), gpt(tokens)
    merge(gpt)
    assert not gpt.config.tie_word_embeddings
    assert torch.equal(gpt.model.embed_tokens.weight, embedding)
    torch.testing.assert_close(gpt(tokens), before, rtol=1e-5, atol=1e-5)
    assert merge(tiny_gpt("smollm")).config.tie_word_embeddings


def test_an_adapter_that_cannot_be_folded_says_so_and_nothing_is_merged() -> None:
    class Square(Adapter):
        def forward(self, host: Linear, x: Tensor, y: Tensor) -> Tensor:
            return y.square()

    gpt = adapt(tiny_gpt())
    gpt.lm_head.adapter = Square()
    before = copy.deepcopy(gpt.state_dict())
    with pytest.raises(UserError, match="lm_head: Square computes more"):
        merge(gpt)
    assert gpt.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in gpt.state_dict().items())


# ---- beginnings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_are_those_of_the_seed_and_of_the_right_size(family: str) -> None:
    gpt = GPT(tiny_config(family, num_hidden_layers=8))
    randomise(gpt)
    init_weights(gpt, seed=7)
    other = GPT(gpt.config)
    init_weights(other, seed=7)
    for (name, parameter), again in zip(gpt.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, again), name
        if name.endswith("norm.weight"):
            assert (parameter == 1 - gpt.config.norm_offset).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            wanted = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.1), name
    init_weights(other, seed=8)
    assert not torch.equal(gpt.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_a_model_can_be_built_without_memory() -> None:
    """On the meta device, to be filled by assignment; the head stays tied through `tie`."""
    with torch.device("meta"):
        gpt = GPT(tiny_config("smollm"))
    assert all(parameter.is_meta for parameter in gpt.parameters())
    real = tiny_gpt("smollm")
    gpt.load_state_dict(real.state_dict(), assign=True)
    gpt.tie()
    assert gpt.lm_head.weight is gpt.model.embed_tokens.weight
    tokens = random_tokens(1, 9)
    assert torch.equal(gpt(tokens), real(tokens))


@pytest.fixture(autouse=True)
def gradients_are_on() -> Iterator[None]:
    """A test that left them off would make later ones pass for nothing."""
    yield
    assert torch.is_grad_enabled()
    assert SummedLoss is kernels.SummedLoss
