"""The memory and the time that a run will take, before a weight of it is read.

Nothing is guessed from a table of models: the model is made without its numbers (torch's meta device), with what is attached to it, and
sent a micro-batch; what autograd would keep for the backward pass is counted as it is kept. So it holds for every family and method.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from litlora.checkpoint.weights import NothingDrawn
from litlora.config import Config
from litlora.kernels import chunk_rows, packed, really_kept
from litlora.methods.attach import attach, linears, trainable
from litlora.methods.tuning import Tuning
from litlora.model import GPT, Attention, Context, Linear
from litlora.quantized import bytes_of
from litlora.train.lanes import learns_in_lanes, side_by_side

TRAINED = 16  # bytes a trained parameter: fp32 itself, its gradient, AdamW's two moments
COPY = 12  # of all but the gradient in a commit, which the machine's own memory holds
LANE = 8  # bytes a trained parameter, in each lane where there are several: its gradient so far, and that of a batch
EFFICIENCY = 0.72  # of the rate of plain products that a step reaches (extensions/benchmarks, C1: 0.71 to 0.74)
STORED_IN = {"bfloat16": torch.bfloat16, "float16": torch.float16}
HOLES = 0.65  # of the activations: what glibc loses between them (extensions/benchmarks/log.md: 0.6 to 1)
FABRIC = 150 * 2**20  # bytes that Fabric's import takes, where it has not been imported yet
PER_BLOCK = 1.2e-3  # seconds a block takes however few its tokens are, forward and back, on a CPU


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a run computes with and on."""

    config: Config
    tuning: Tuning
    dtype: torch.dtype  # of the frozen weights and the arithmetic
    quantize: str = "none"  # in which few bits the frozen weights of the blocks are held
    device: torch.device
    micro_batch: int  # tokens of the largest one
    tokens: float  # of a step, on one device
    length: float  # of a sample, in the mean
    graded: float  # share of the tokens
    program: int  # bytes that are in use before the model is there
    lanes: int = 1  # as many as there may be

    def lanes_for(self, model: GPT) -> int:
        return self.lanes if learns_in_lanes(model) else 1

    @cached_property
    def shapes(self) -> GPT:
        """The model with everything attached, without its numbers."""
        with torch.device("meta"), NothingDrawn():
            model = GPT(self.config).to(self.dtype)
            if not self.config.tie_word_embeddings:  # it is looked up as it is stored
                model.model.dtype = self.dtype
                model.model.embed_tokens.to(STORED_IN.get(self.config.torch_dtype, self.dtype))
            attach(model, self.tuning, seed=None)
        return model.train()


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the peak, by what they are for."""

    program: int  # Python, torch and the rest
    weights: int  # the base, as it is computed with
    trained: int  # what learns, its gradients, its optimizer
    activations: int  # what the largest micro-batch keeps for the backward pass, and holes between it
    workspace: int  # logits, and what a block needs while it computes

    @property
    def total(self) -> int:
        return self.program + self.weights + self.trained + self.activations + self.workspace


def memory_of(load: Load, *, recompute: bool = False) -> Memory:
    """The peak of a run, its activations kept or, block by block, computed again."""
    model = load.shapes
    learning = trainable(model)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    frozen -= saved_by_few_bits(model, load.quantize)
    kept, inputs = kept_bytes(model, load), load.micro_batch * load.config.hidden_size * load.dtype.itemsize
    activations = max(kept) + inputs * sum(block > 0 for block in kept) if recompute else sum(kept)
    holes = round(HOLES * activations) if load.device.type == "cpu" else 0
    lanes = load.lanes_for(model)
    rows = min(lanes * chunk_rows(load.config.vocab_size, load.device), max(1, round(load.micro_batch * load.graded)))
    logits = 2 * 4 * rows * load.config.vocab_size
    inside = 4 * load.micro_batch * max(load.config.intermediate_size, load.config.hidden_size) * load.dtype.itemsize
    return Memory(
        program=load.program,
        weights=frozen,
        trained=(TRAINED + COPY * (load.device.type == "cpu") + LANE * lanes * (lanes > 1)) * sum(p.numel() for p in learning.values()),
        activations=activations + holes,
        workspace=max(logits, inside),
    )


def saved_by_few_bits(model: GPT, quantize: str) -> int:
    """Bytes that the frozen weights of the blocks' Linears are fewer than when they are wide."""
    hosts = [host for name, host in linears(model).items() if name != "lm_head" and not host.weight.requires_grad]
    if quantize == "none":
        return 0
    return sum(host.weight.nbytes - bytes_of(quantize, host.out_features, host.in_features) for host in hosts)


# ---- memory ------------------------------------------------------------------------------------------------------------


class Kept(torch.autograd.Function):
    """Attention for its shapes: keeps what a fused kernel keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, H, T, D), (B, K, S, D) twice
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:3], dtype=torch.float32))
        return y


class WithoutNumbers(TorchFunctionMode):
    """What shapes do not tell: the kernel that computes attention (fused), and whom a router chooses (each expert as often as any)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].size(-1) == args[2].size(-1):  # else torch has no fused one on CPUs
            return Kept.apply(*args[:3])
        if func is Tensor.bincount:
            chosen, experts = args[0].numel(), kwargs["minlength"]
            return torch.tensor([chosen * (n + 1) // experts - chosen * n // experts for n in range(experts)], device="cpu")
        return func(*args, **(kwargs or {}))


def kept_bytes(model: GPT, load: Load) -> list[int]:
    """What autograd keeps of a micro-batch, block by block."""
    whole = max(1, round(load.micro_batch / max(load.length, 1)))
    segments = [load.micro_batch // whole] * (whole - 1)
    segments.append(load.micro_batch - sum(segments))
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        for one in really_kept(packed(tensor) if load.device.type == "cpu" else tensor):  # as `keeping_less`
            if (storage := one.untyped_storage()._cdata) not in own:
                held.setdefault(storage, one)
        return tensor

    def size() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    sizes: dict[Any, int] = {}  # of each kind of block: most models have one or two
    outcome: dict[Any, Tensor] = {}
    kept: list[int] = []
    with torch.device("meta"), WithoutNumbers(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = torch.zeros(1, load.micro_batch, dtype=torch.int64)
        context, x = Context.of(tokens, load.config, segments, 0, None), model.model.embed_tokens(tokens).to(load.dtype)
        for block in model.model.layers:
            kind = (not kept, x.requires_grad, *kind_of(block))  # the first one's keep what all share: the rotary table
            if kind not in sizes:
                before = size()
                outcome[kind] = block(x, context)
                sizes[kind] = size() - before
            x = outcome[kind]
            kept.append(sizes[kind])
    return kept


def kind_of(block: nn.Module) -> Iterator[Any]:
    """What tells whether two blocks keep the same: their modules with what they are set to, and which of their tensors learn."""
    for name, module in block.named_modules():
        yield name, type(module)
        yield tuple((key, value) for key, value in sorted(vars(module).items()) if isinstance(value, bool | int | float | str))
        yield tuple((key, p.shape, p.requires_grad) for key, p in module.named_parameters(recurse=False))


# ---- time --------------------------------------------------------------------------------------------------------------


def seconds_of_step(load: Load, *, recompute: bool = False) -> float:
    """From the operations that are necessary (4 N a token and more, as in extensions/benchmarks) and the rate of plain products now."""
    model = load.shapes
    passes = 3 if recompute else 2
    operations = 0.0
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            share = load.graded if name == "lm_head" else 1.0
            if ".experts." in name:
                share *= load.config.num_experts_per_tok / load.config.num_experts
            count = module.in_features * module.out_features
            whole = 1 if module.weight.requires_grad else 0  # its own gradient
            operations += 2 * share * count * (passes + whole)
            extra = 0 if module.adapter is None else sum(p.numel() for p in module.adapter.parameters())
            operations += 2 * extra * (passes + 1)
        elif isinstance(module, Attention):
            operations += (passes + 1.5) * 4 * (load.length / 2) * module.heads * module.head_dim
    batches = math.ceil(load.tokens / load.micro_batch)
    blocks = sum(isinstance(module, Attention) for module in model.modules())
    fixed = PER_BLOCK * blocks * batches if load.device.type == "cpu" else 0.0
    lanes = load.lanes_for(model)
    rate = sum(side_by_side([()] * lanes, lambda _: product_rate(load)))
    return operations * load.tokens / (rate * EFFICIENCY) + fixed / lanes


def product_rate(load: Load, seconds: float = 0.15) -> float:
    """Operations a second of this machine's matrix products, at this model's width, in its dtype: the fastest of those in `seconds`."""
    rows, width = min(load.micro_batch, 1024), load.config.hidden_size
    x = torch.randn(rows, width, device=load.device).to(load.dtype)
    w = torch.randn(max(width, min(load.config.intermediate_size, 4096)), width, device=load.device).to(load.dtype)
    fastest, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or fastest == math.inf:
        began = time.perf_counter()
        F.linear(x, w)
        wait(load.device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2.0 * rows * w.numel() / fastest


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def largest(lengths: np.ndarray, micro_batch_tokens: int) -> int:
    """Tokens of the largest micro-batch: it is filled, or holds one sample that is longer than that."""
    return max(min(micro_batch_tokens, int(lengths.sum())), int(lengths.max()))
