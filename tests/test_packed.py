"""Attention over the samples of a packed row in one launch: on a CPU, where a loop over the samples stands in for the kernel."""

import inspect
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, random_tokens, relative, tiny_gpt
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from litlora import gpu
from litlora.gpu import packed
from litlora.gpu.packed import Packed, Repeated
from litlora.model import GPT, IGNORE

SEGMENTS = [5, 19, 1, 8]


class Reference:
    """What `torch.nn.attention.varlen.varlen_attn` says that it computes, sample by sample; it counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        *, scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
    ) -> Tensor:  # (T, H, D), (S, K, D) twice -> (T, H, D)  # fmt: skip
        self.calls += 1
        left, right = window_size
        assert right == 0 and (enable_gqa or query.size(1) == key.size(1))
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k)
        assert cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key) == len(value)
        assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
        parts = []
        for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
            q, k, v = (side.transpose(0, 1) for side in (query[q0:q1], key[k0:k1], value[k0:k1]))
            at = torch.arange(k1 - k0)[k1 - k0 - (q1 - q0) :, None]  # the last query is at the last key
            keys = torch.arange(k1 - k0)
            seen = (keys <= at) if left < 0 else (keys <= at) & (keys >= at - left)
            parts.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa).transpose(0, 1))
        return torch.cat(parts)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Reference:
    """The rest of a GPU's way, in any dtype and for heads of any size."""
    made = Reference()
    monkeypatch.setattr(packed, "has_kernel", lambda device: True)
    monkeypatch.setattr(packed, "kernel", lambda: made)
    monkeypatch.setattr(packed, "grouping", lambda: {"enable_gqa": True})
    monkeypatch.setattr(Packed, "serves", lambda self, q, v: q.size(-1) == v.size(-1))
    return made


def loss_and_gradients(gpt: GPT, prefix: int, segments: Sequence[int] = SEGMENTS) -> tuple[Tensor, dict[str, Tensor]]:
    length = prefix + sum(segments)
    targets = random_tokens(1, length, seed=1)
    targets[0, ::3] = IGNORE
    loss = gpt(random_tokens(1, length), targets, segments=segments, prefix=prefix)
    return loss, gradients(gpt, loss)


@pytest.mark.parametrize("prefix", [0, 6, 20])
@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "gemma3", "phi3", "smollm3", "stablelm", "falcon"])
def test_all_samples_at_once_give_the_loss_and_gradients_of_one_after_another(family: str, prefix: int, reference: Reference) -> None:
    """Caught: a window of one key too many; keys that begin with their sample, not with the prefix; the gradient of one copy of a prefix
    alone; a scale of 1 / sqrt(D) for every family."""
    gpt = tiny_gpt(family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "has_kernel", lambda device: False)
        loss, grads = loss_and_gradients(gpt, prefix)
    assert not reference.calls
    ours, our_grads = loss_and_gradients(gpt, prefix)
    assert reference.calls == gpt.config.num_hidden_layers * (2 if prefix == 20 else 1)  # most of the keys are copies: computed once more
    assert relative(ours, loss) <= 1e-6
    assert grads.keys() == our_grads.keys()
    for name, grad in grads.items():
        assert relative(our_grads[name], grad) <= 2e-5, name


def test_copies_of_what_samples_share_are_not_kept(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 1,500 tokens before 67 answers would be kept as 100,000 keys in every block. Caught: what is written out kept."""
    written, plain = list[StorageWeakRef](), Repeated.apply

    def noted(x: Tensor, copies: Any) -> Any:
        y = plain(x, copies)
        written.append(StorageWeakRef(y.untyped_storage()))
        return y

    monkeypatch.setattr(Repeated, "apply", noted)
    gpt, length = tiny_gpt("llama"), 20 + sum(SEGMENTS)
    tokens = random_tokens(1, length)
    loss = gpt(tokens, tokens, segments=SEGMENTS, prefix=20)
    assert len(written) == 2 * gpt.config.num_hidden_layers and all(storage.expired() for storage in written)
    loss.backward()


@pytest.mark.parametrize("prefix", [0, 6])
@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma3"])
def test_a_sample_alone_is_computed_by_it_too(family: str, prefix: int, reference: Reference) -> None:
    """It may be longer than a window: without the kernel, scores of each window's worth of queries exist then, and are kept. Caught: two
    samples at least; what stands in front of one as a sample of its own, whose rows are copied."""
    gpt = tiny_gpt(family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "has_kernel", lambda device: False)
        loss, grads = loss_and_gradients(gpt, prefix, [27])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "Copies", lambda *args: pytest.fail("copied"))
        ours, our_grads = loss_and_gradients(gpt, prefix, [27])
    assert reference.calls == gpt.config.num_hidden_layers
    assert relative(ours, loss) <= 1e-6
    assert all(relative(our_grads[name], grad) <= 2e-5 for name, grad in grads.items())


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "deepseek_v2"])
def test_what_no_kernel_computes_is_computed_one_after_another(family: str, reference: Reference) -> None:
    """Capped scores, scores with sinks, values of another size than keys. Caught: caps and sinks not looked at; serves always true."""
    loss_and_gradients(tiny_gpt(family), 0)
    assert not reference.calls


def test_where_a_row_begins_and_ends_is_made_once_for_all_blocks(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    plain = packed.ends
    monkeypatch.setattr(packed, "ends", lambda *args: made.append(args) or plain(*args))
    loss_and_gradients(tiny_gpt(), 6)
    assert len(made) == 2  # queries and keys


def test_a_cpu_keeps_to_the_loop() -> None:
    """It has no such kernel: `varlen_attn` fails there. Caught: one for every device."""
    assert Packed.of(0, SEGMENTS, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("capability", "hip", "taken"), [((7, 5), None, False), ((8, 0), None, True), ((9, 0), None, True), ((9, 4), "6.4", False)]
)
def test_kernels_are_for_gpus_from_ampere_on(
    capability: tuple[int, int], hip: str | None, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older GPU, or one of another maker's, computes with torch's own operations, and no kernel is tried on it: one that compiles there
    may fail later, in an answer's graph; nor by Triton on one that is not the current one, where Triton would start it. Caught: Triton's
    kernels for every GPU; for any of several."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    asked: list[torch.device] = []
    monkeypatch.setattr(gpu, "tried", lambda device: asked.append(device) or "kernels")
    monkeypatch.setattr(packed, "works", lambda device: not asked.append(device))
    monkeypatch.setattr(gpu, "working", gpu.working.__wrapped__)  # remembers nothing
    x, other = (SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda", number)) for number in (1, 0))
    assert gpu.triton_for(other) is None
    assert (gpu.triton_for(x) == "kernels", packed.has_kernel.__wrapped__(x.device)) == (taken, taken)
    assert asked == [x.device] * (2 if taken else 0)


@pytest.mark.parametrize(
    ("dtype", "size", "value_size", "taken"),
    [
        (torch.bfloat16, 128, 128, True),
        (torch.float16, 64, 64, True),
        (torch.bfloat16, 256, 256, True),
        (torch.float32, 128, 128, False),
        (torch.bfloat16, 12, 12, False),
        (torch.bfloat16, 264, 264, False),
        (torch.bfloat16, 192, 128, False),
    ],
)
def test_the_kernel_is_asked_only_for_what_it_takes(dtype: torch.dtype, size: int, value_size: int, taken: bool) -> None:
    """Caught: any dtype; a value of any size."""
    rows = Packed(0, SEGMENTS, torch.device("cpu"))
    assert rows.serves(torch.empty(1, 1, 1, size, dtype=dtype), torch.empty(1, 1, 1, value_size, dtype=dtype)) is taken


def test_the_words_are_those_of_the_torch_that_is_installed() -> None:
    """A version that knows `enable_gqa` gets it; the other arguments exist in each."""
    known = inspect.signature(packed.kernel()).parameters
    words = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size", *packed.grouping()]
    assert all(word in known for word in words)
    assert list(known)[:7] == words[:7]


def test_where_the_kernel_fails_samples_are_computed_one_after_another(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that is built without it, or without its way back, or that wants as many heads of keys as of queries, trains too; it may be
    asked first where nothing learns. Caught: a failure that is passed on; forward alone."""
    with torch.inference_mode():
        assert packed.works(torch.device("cpu")) and reference.calls == 1

    def forward(*args: Tensor, **more: Any) -> Tensor:
        raise NotImplementedError("torch was not compiled with flash attention")

    def heads(*args: Tensor, **more: Any) -> Tensor:
        raise ValueError("the same number of heads")

    def backward(q: Tensor, *args: Any, **more: Any) -> Tensor:
        y = q.clone()
        y.register_hook(lambda grad: forward(grad))
        return y

    for failing, why in ((forward, "torch was not compiled"), (heads, "the same number"), (backward, "torch was not compiled")):
        monkeypatch.setattr(packed, "kernel", lambda failing=failing: failing)
        with pytest.warns(UserWarning, match=f"FlashAttention does not work here .{why}"):
            assert not packed.works(torch.device("cpu"))
