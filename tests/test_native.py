"""What few tokens are computed with on a CPU (`cpu/native.c`): each function against torch's in fp64, whole models against themselves
without it.

Mutations seen to fail stand in docstrings, after "Caught:".
"""

import itertools
import os
import platform
import shutil
import signal
import sysconfig
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY, random_tokens, relative, tiny_gpt
from test_lookup import GREEDY, asked, repeated
from test_promises import learnt
from torch import Tensor

from litlora import cpu
from litlora.cpu import library, native
from litlora.kernels import add_product, linear, place, rms_norm, swiglu
from litlora.methods import tuning_of
from litlora.methods.attach import attach
from litlora.model import GPT, KVCache, Turn, rotary_table, rotate
from litlora.options import AdapterOptions, LoRAOptions, ProOptions
from litlora.quantized import KINDS, hold, quantized

WHOLE = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 24}  # of whole registers, as real models are
OWN_HEADS = ("deepseek_v2", "deepseek_v2_groups", "deepseek_v3", "longrope")  # whose size stands in other keys, or tables, too
needs_native = pytest.mark.skipif(cpu.working() is None, reason="no kernels for this CPU: no C compiler at installation, or no AVX2")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function was called."""
    count: Counter[str] = Counter()

    def counted(name: str) -> None:
        real = getattr(native, name)

        def once(*args: object, **how: object) -> Tensor:
            count[name] += 1
            return real(*args, **how)

        monkeypatch.setattr(native, name, once)

    for name in ("product", "rms_norm", "swiglu", "turned", "attention_of_few"):
        counted(name)
    return count


SHAPES = [(1, 8), (5, 24), (3, 48), (4, 64), (7, 64), (130, 192), (97, 1024)]  # out, in


@needs_native
@torch.no_grad()
@pytest.mark.parametrize(("out", "width"), SHAPES)
@pytest.mark.parametrize("kind", ["fp32", *KINDS])
def test_a_product_of_few_rows_is_exact_and_each_row_has_the_bits_that_it_has_alone(
    kind: str, out: int, width: int, called: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C3, every kind of weight, every number of rows, one to three threads. Caught: the last rows of a weight left out; a scale of the row
    before; the two codes of a byte exchanged; sums in another order for four rows of x."""
    x, weight = random(16, width), random(out, width, seed=1)
    made = None if kind == "fp32" else quantized(kind, weight)
    exact = x.double() @ (weight if made is None else made.wide()).double().t()
    size = x.double().abs() @ (weight if made is None else made.wide()).double().abs().t()
    serves = width % cpu.WIDTH["nf4" if kind.startswith("nf4") else kind] == 0
    monkeypatch.setattr(native, "PARALLEL", 0)
    alone: list[Tensor] = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for n in range(1, 17):
            y = linear(x[:n], weight, None) if made is None else made(x[:n])
            if serves:
                assert ((y - exact[:n]).abs() <= 2e-6 * size[:n]).all()
            alone = alone or [y[0]]
            if serves and n > len(alone):
                alone.append((linear(x[n - 1 : n], weight, None) if made is None else made(x[n - 1 : n]))[0])
            if serves:
                assert torch.equal(y, torch.stack(alone[:n])), (threads, n)
    assert bool(called["product"]) == serves


@needs_native
def test_several_at_once_and_a_forked_child_get_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers belong to one product at a time, and a child process has none. Caught: a second product that takes the helpers' job; helpers
    that still count as there in a child, for whom it waits for ever."""
    monkeypatch.setattr(native, "PARALLEL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    weights = [random(203, 64, seed=seed) for seed in range(4)]
    x = random(3, 64)
    wanted = [native.product(x, "fp32", weight, 203) for weight in weights]

    def many(weight: Tensor) -> list[Tensor]:
        return [native.product(x, "fp32", weight, 203) for _ in range(300)]

    with ThreadPoolExecutor(4) as several:
        for found, right in zip(several.map(many, weights), wanted, strict=True):
            assert all(torch.equal(one, right) for one in found)
    child = os.fork()
    if not child:
        os._exit(not torch.equal(native.product(x, "fp32", weights[0], 203), wanted[0]))
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits for helpers that it has not")
    assert os.waitstatus_to_exitcode(status) == 0


@needs_native
@torch.no_grad()
def test_a_bias_is_added_and_a_weight_that_does_not_lie_whole_is_read_right(called: Counter[str]) -> None:
    """Caught: the bias left out; a transposed weight read as if it lay row by row."""
    x, weight, bias = random(2, 3, 64), random(32, 64, seed=1), random(32, seed=2)
    assert relative(linear(x, weight, bias), F.linear(x, weight, bias)) <= 1e-6
    assert relative(linear(x.transpose(0, 1), weight, None), F.linear(x.transpose(0, 1), weight)) <= 1e-6
    assert called["product"] == 2
    turned_over = random(64, 32, seed=3).t()
    assert relative(linear(x, turned_over, None), F.linear(x, turned_over)) <= 1e-6
    assert relative(quantized("bf16", turned_over.bfloat16())(x), F.linear(x, turned_over.bfloat16().float())) <= 1e-2
    assert called["product"] == 2


@needs_native
@torch.no_grad()
def test_norm_gate_and_turn_are_those_of_many_rows(called: Counter[str]) -> None:
    """Caught: the norm without eps; silu of -x; e^x for large x; pairs turned back."""
    x, weight = random(1, 3, 48), random(48, seed=1)
    small = 1e-3 * x
    for one in (x, small):
        wanted = F.rms_norm(one.double(), (48,), weight.double(), 1e-5)
        assert relative(rms_norm(one, weight, 1e-5), wanted.float()) <= 1e-6
    gate, up = torch.cat((torch.linspace(-100, 100, 41), torch.linspace(-1, 1, 7))), random(48, seed=2)
    wanted = F.silu(gate.double()) * up.double()
    found = swiglu(gate.clone(), up).double()
    assert ((found - wanted).abs() <= 1e-6 * wanted.abs() + 1e-36).all()
    for interleaved, part in itertools.product((False, True), (16, 8)):
        q = random(1, 5, 4, 16, seed=3).transpose(1, 2)  # (1, n, T, D), as a projection leaves it
        config = tiny_gpt("llama").config
        rope = config.rope_of(0)
        assert rope is not None
        cos, sin = rotary_table(torch.arange(7, 12), replace(rope, interleaved=interleaved), part)
        found = rotate(q, Turn(cos, sin, interleaved))
        with torch.enable_grad():
            assert relative(found, rotate(q, Turn(cos, sin, interleaved))) <= 1e-6
    assert called["rms_norm"] == 2 and called["swiglu"] == 1 and called["turned"] == 4


@needs_native
@torch.no_grad()
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("D", "Dv"), [(16, 16), (64, 72), (24, 8), (128, 128)])
@pytest.mark.parametrize(("cap", "sinking"), [(None, False), (2.0, False), (1000.0, False), (None, True), (2.0, True)])
def test_few_queries_see_what_comes_before_them_and_no_more(
    cap: float | None, sinking: bool, D: int, Dv: int, T: int, window: int | None
) -> None:
    """One row or several that differ in length, in a cache that holds what is no number beyond its end; scores plain, capped near the cap
    and far below it, with sinks. Caught: a key too few; a window one longer; a head's keys taken from the next; the last of several queries
    alone right; tanh without its sign, by one of its two ways alone; a sink left out, or another head's."""
    B, H, K, size = 3, 10, 2, 101
    keys, values = random(B, K, size, D, seed=1), random(B, K, size, Dv, seed=2)
    q, positions = random(B, T, H, D, seed=3).transpose(1, 2), torch.tensor([[20], [97], [8]]) + torch.arange(T) - (T - 1)
    sinks = 3 * random(H, seed=4) if sinking else None
    scores = (q.double() @ keys.double().repeat_interleave(H // K, 1).transpose(-2, -1)) * 0.3  # (B, H, T, size)
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    at = torch.arange(size)
    hidden = at > positions[:, None, :, None]
    if window is not None:
        hidden |= at <= positions[:, None, :, None] - window
    column = torch.full((H,), -torch.inf) if sinks is None else sinks
    scores = torch.cat((scores.masked_fill(hidden, -torch.inf), column.double().view(H, 1, 1).expand(B, H, T, 1)), -1)
    wanted = scores.softmax(-1)[..., :-1] @ values.double().repeat_interleave(H // K, 1)
    for row, last in enumerate(positions[:, -1].tolist()):
        keys[row, :, last + 1 :], values[row, :, last + 1 :] = torch.nan, torch.nan
    S = int(positions.max()) + 1
    for threads in (1, 2, 7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "PARALLEL", 0)
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found = native.attention_of_few(positions, q, keys[:, :, :S], values[:, :, :S], window, 0.3, cap, sinks)
            assert relative(found, wanted.transpose(1, 2).float()) <= 2e-6
            one = native.attention_of_few(None, q[2:], keys[2:, :, :9], values[2:, :, :9], window, 0.3, cap, sinks)
            assert torch.equal(one, found[2:])
            alone = native.attention_of_few(positions, q[:, :, T - 1 :], keys[:, :, :S], values[:, :, :S], window, 0.3, cap, sinks)
            assert torch.equal(alone, found[:, T - 1 :])


@needs_native
@torch.no_grad()
def test_what_it_cannot_read_is_left_to_torch(called: Counter[str]) -> None:
    """A model that was cast holds other numbers than the kernels take; what does not fit is torch's to refuse. Caught: each look left out:
    at the dtype of codes, of scales, at the sizes."""
    x, weight = random(1, 64), random(32, 64, seed=1)
    for kind in KINDS:
        made = quantized(kind, weight)
        wanted = x @ made.wide().t()
        cast = made.float() if kind == "bf16" else made.half()
        before = called["product"]
        if kind == "bf16":
            assert relative(cast.product(x), wanted) <= 1e-6
            with pytest.raises(RuntimeError):
                cast(x)  # torch's product in bf16 with what is fp32 now
        elif kind == "int8":
            assert relative(cast(x), wanted) <= 2e-2
        else:
            assert relative(cast(x), x @ cast.wide().t()) <= 1e-3
        assert called["product"] == before
    for wrong in (lambda: linear(x, random(32, 48), None), lambda: rms_norm(x, random(48), 1e-5), lambda: swiglu(x, random(1, 48))):
        with pytest.raises(RuntimeError):
            wrong()
    cache = KVCache(16)
    gpt = tiny_gpt("llama", **WHOLE)
    cache.held = {
        block.self_attn: tuple(random(1, gpt.config.num_key_value_heads, 16, 24).bfloat16() for _ in range(2)) for block in gpt.model.layers
    }  # type: ignore[attr-defined,misc]
    with pytest.raises(RuntimeError, match="dtype"):
        gpt(random_tokens(1, 3), cache=cache)


@needs_native
@torch.no_grad()
def test_what_is_no_number_stays_none() -> None:
    """A broken model must not look like a talkative one. Caught: the two operands of a minimum exchanged, which loses it."""
    x, ones = torch.full((1, 64), torch.nan), torch.ones(64)
    assert linear(x, torch.ones(16, 64), None).isnan().all() and rms_norm(x, ones, 1e-5).isnan().all()
    assert swiglu(x.clone(), x).isnan().all() and swiglu(x.clone(), ones[None]).isnan().all()
    q = torch.full((1, 2, 1, 16), torch.nan)
    for cap, sinks in ((None, None), (2.0, None), (None, torch.ones(2))):
        found = native.attention_of_few(None, q, torch.ones(1, 1, 3, 16), torch.ones(1, 1, 3, 16), None, 1.0, cap, sinks)
        assert found.isnan().all()


@needs_native
@torch.inference_mode()
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 3), (3, 1), (2, 4)])
def test_what_comes_to_a_cache_stands_where_each_row_goes_on(B: int, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of heads that lie side by side, as a projection gives them. Caught: one position for all tokens of a row."""
    whole, more = torch.zeros(B, 3, 16, 10), random(B, T, 5, 10)[:, :, 1:4].transpose(1, 2)  # D is no multiple of a register here
    positions = torch.arange(T) + torch.tensor([5, 0, 9])[:B, None]  # (B, T)
    assert native.places(whole, more)
    ours = whole.clone()
    place(ours, more, positions)
    monkeypatch.setattr(cpu, "working", lambda: None)
    place(whole, more, positions)
    assert torch.equal(ours, whole)
    assert torch.equal(whole[0, :, 5], more[0, :, 0])
    assert whole.count_nonzero() == B * T * 3 * 10


@needs_native
@torch.inference_mode()
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_a_product_is_added_to_what_is_there(out: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """C3, LoRA: scaled, for any number of rows; each row has the bits that it has alone. Caught: the scale left out; the sum left out."""
    weight = random(out, width, seed=1)
    for n in (1, 2, 3, 4, 7, 16):
        x, y = random(n, width), random(1, n, out, seed=2)
        alone = torch.cat([add_product(y[:, row : row + 1].clone(), x[None, row : row + 1], weight, -0.7) for row in range(n)], 1)
        found = add_product(y.clone(), x[None], weight, -0.7)
        assert torch.equal(found, alone)
        exact = y.double() - 0.7 * (x.double() @ weight.double().t())
        assert (found - exact).abs().max() <= 2e-6 * width**0.5 + 1e-6
    assert torch.equal(add_product(y.clone(), x[None], weight, 0.0), y)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "working", lambda: None)
        torch.testing.assert_close(add_product(y.clone(), x[None], weight, -0.7), found, rtol=1e-4, atol=1e-4)


@needs_native
@torch.inference_mode()
def test_a_sum_is_torchs_to_the_bit() -> None:
    """With a scale, too, and of any size. Caught: the scale left out."""
    for size in (1, 7, 64, 999):
        a, b = random(size), random(size, seed=1)
        for scale in (1.0, 0.22, -3.0):
            assert torch.equal(native.summed(a, b, scale, torch.empty_like(a)), torch.add(a, b, alpha=scale))


@torch.inference_mode()
def decoded(gpt: GPT, tokens: Tensor, by: int = 1) -> Tensor:  # (1, T) -> (T - 9, V)
    """Logits after each token from the tenth on, `by` at a time."""
    cache = KVCache(32)
    gpt(tokens[:, :9], cache=cache)
    return torch.cat([gpt(part, cache=cache)[0] for part in tokens[:, 9:].split(by, 1)])


@needs_native
@pytest.mark.parametrize("family", EVERY)
def test_an_answer_is_the_same_with_and_without(family: str, called: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """C3, every family: logits of tokens one by one and by threes. Where the family's arithmetic is plain, everything is used."""
    sizes = {key: size for key, size in WHOLE.items() if key != "head_dim" or family not in OWN_HEADS}
    gpt, tokens = tiny_gpt(family, **sizes), random_tokens(1, 24)
    ours = {by: decoded(gpt, tokens, by) for by in (1, 3)}
    assert called["product"]
    if family in ("gemma2", "gpt_oss"):
        assert called["attention_of_few"] >= 15
    if family in ("llama", "llama3", "qwen2", "mistral"):
        assert min(called[name] for name in ("product", "rms_norm", "swiglu", "turned", "attention_of_few")) >= 15
    monkeypatch.setattr(cpu, "working", lambda: None)
    for by, found in ours.items():
        assert relative(found, decoded(gpt, tokens, by)) <= 2e-5, by


METHODS = {
    "lora": LoRAOptions(r=3),
    "dora": LoRAOptions(r=3, use_dora=True),
    "series": AdapterOptions(kind="series", width=5),
    "prompt": AdapterOptions(kind="prompt", length=3),
    "scale_shift": AdapterOptions(kind="scale_shift"),
    "pro": ProOptions(n_insert=1),
}


@needs_native
@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_model_answers_the_same_with_and_without(method: str, called: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """C3, methods."""
    gpt, tokens = tiny_gpt("llama", **WHOLE), random_tokens(1, 24)
    attach(gpt, tuning_of(METHODS[method], gpt.config), seed=1)
    learnt(gpt.eval())
    ours = decoded(gpt, tokens)
    assert called["product"] >= 15 * 7
    monkeypatch.setattr(cpu, "working", lambda: None)
    assert relative(ours, decoded(gpt, tokens)) <= 2e-5
    assert relative(ours, decoded(tiny_gpt("llama", **WHOLE), tokens)) > 1e-3  # it has learnt something


@needs_native
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_draft_changes_no_bit_of_an_answer(kind: str) -> None:
    """Prompt lookup is exact in fp32: several tokens at once have the logits of one by one, to the bit."""
    gpt, tokens = tiny_gpt("llama", **WHOLE | {"hidden_size": 128, "head_dim": 32}), random_tokens(1, 24)
    for name, module in gpt.named_modules():
        if kind != "none" and name.endswith("_proj"):
            hold(module, quantized(kind, module.weight))
    assert torch.equal(decoded(gpt, tokens, 1), decoded(gpt, tokens, 5))
    plain, guessed = (asked(gpt, repeated(), GREEDY, guesses) for guesses in (0, 6))
    assert guessed.ids == plain.ids and guessed.looked_up


def test_a_machine_with_a_compiler_has_kernels() -> None:
    """`optional` in pyproject.toml lets an installation succeed where they do not compile: it must be for want of a compiler."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if shutil.which(compiler) is None or platform.machine() != "x86_64" or not {"avx2", "fma"} <= set(flags.split()):
        pytest.skip("no C compiler, or not the CPU that they are for")
    assert cpu.working() is native
    assert native.library().version() == library.VERSION


@needs_native
def test_where_it_cannot_be_loaded_torch_computes_and_says_so(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was compiled: silence. Something that is no library, or that of another version: a warning. Caught: the exception let
    through; the version not looked at."""
    for name in ("working", "load"):  # which remember nothing
        monkeypatch.setattr(library, name, getattr(library, name).__wrapped__)
    with monkeypatch.context() as patch:
        patch.setattr(library, "compiled", lambda: None)
        assert cpu.working.__wrapped__() is None
    broken = tmp_path / "_native.so"  # type: ignore[operator]
    broken.write_bytes(b"no library")
    with monkeypatch.context() as patch:
        patch.setattr(library, "compiled", lambda: broken)
        with pytest.warns(UserWarning, match="kernels for this CPU cannot be loaded"):
            assert cpu.working.__wrapped__() is None
    monkeypatch.setattr(library, "VERSION", -1)
    with pytest.warns(UserWarning, match="is of version .*: install litlora again"):
        assert cpu.working.__wrapped__() is None
