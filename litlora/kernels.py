"""Arithmetic whose backward pass is written out, to keep and touch less memory than autograd would. No modules of ours: `model.py` says
where each is used.

Letters for shapes are those of `model.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litlora import cpu, gpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,). In fp32 torch leaves the product of a few rows to one thread of a
    CPU, which alone reads half of what the memory gives: here each thread has rows of the weight, by a kernel of ours where there is one,
    else by torch's of many small products. The same sums."""
    if (native := cpu.native_for(x)) and native.multiplies(x, "fp32", weight, weight.size(0)):
        y: Tensor = native.product(x, "fp32", weight, weight.size(0))
        return y if bias is None else y.add_(bias)
    threads = 1 if torch.is_grad_enabled() or x.dtype != torch.float32 or x.device.type != "cpu" else torch.get_num_threads()
    if threads == 1 or not 0 < x.numel() <= cpu.FEW * x.size(-1) or weight.size(0) % threads or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    rows = x.reshape(1, -1, x.size(-1)).expand(threads, -1, -1)
    y = torch.bmm(rows, weight.view(threads, -1, x.size(-1)).transpose(1, 2))  # (threads, n, out / threads)
    y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def add_product(y: Tensor, x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """y (..., out) + scale x W^T, of x (..., in) and W (out, in), where no gradient is recorded; y is lost, and may be what comes back."""
    ours = scale != 0 and y.is_contiguous() and (native := cpu.native_for(x)) and native.multiplies(x, "fp32", weight, weight.size(0))
    if not ours:
        return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), weight.t(), alpha=scale).view_as(y)
    native.add_product(y, x, weight, scale)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x (..., C) with gains (C,), which may be of a wider dtype; in x's."""
    if gpu.triton_for(x):
        y: Tensor = Normed.apply(x, weight, eps)
        return y
    if (native := cpu.native_for(x)) and native.norms(x, weight):
        normed: Tensor = native.rms_norm(x, weight, eps)
        return normed
    wide = x.to(weight.dtype)
    if x.is_cuda or not torch.is_grad_enabled():  # torch's own is fused on CUDA; elsewhere its backward pass is slow
        return plainly_normed(wide, weight, eps, x.dtype)
    y = Normed.apply(wide, weight, eps)
    return noted(y.to(x.dtype), plainly_normed, wide, weight, eps, x.dtype)


def plainly_normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps).to(dtype)


class Normed(torch.autograd.Function):
    """RMS norm of x (..., C) with gains (C,); keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        fused = gpu.triton_for(x)
        return fused.rms_norm(x, weight, eps) if fused else F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if fused := gpu.triton_for(x):
            return *fused.rms_norm_back(grad, x, weight, ctx.eps, ctx.needs_input_grad[1]), None
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        x, grad = x.to(wide), grad.to(wide)
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(ctx.eps).rsqrt_()  # (..., 1)
        grad_weight = (grad * x * inverse).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        along = torch.linalg.vecdot(grad, x).unsqueeze_(-1).mul_(inverse).mul_(inverse).div_(-x.size(-1))
        return grad.addcmul_(x, along).mul_(inverse).to(dtype), grad_weight, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both (..., F). Where no gradient is recorded the gate is lost."""
    if torch.is_grad_enabled() or gpu.triton_for(gate):
        return noted(Gated.apply(gate, up), plainly_gated, gate, up)
    if (native := cpu.native_for(gate)) and native.gates(gate, up):
        y: Tensor = native.swiglu(gate, up)
        return y
    return F.silu(gate, inplace=True).mul_(up)


def plainly_gated(gate: Tensor, up: Tensor) -> Tensor:
    fused = gpu.triton_for(gate)
    return fused.gated(gate, up) if fused else F.silu(gate).mul_(up)


class Gated(torch.autograd.Function):
    """silu(gate) * up, both (..., F); keeps the two and recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return plainly_gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if fused := gpu.triton_for(gate):
            return fused.gated_back(grad, gate, up)
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Rotated(torch.autograd.Function):
    """`turned`; the way back is to turn back, so it keeps the table alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return turned(x, cos, sin, interleaved, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, sin, ctx.interleaved, -1), None, None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, way: int) -> Tensor:
    """x (B, n, T, R) turned by cos and sin (1 or B, 1, T, R) of the angles, as `Turn` has them, forwards (`way` 1) or back (-1)."""
    if fused := gpu.triton_for(x):
        return fused.turned(x, cos, sin, interleaved, way)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x.roll(x.size(-1) // 2, -1)
    return (x * cos).addcmul_(swapped, sin, value=way).to(x.dtype)  # in fp32, rounded once


def place(side: Tensor, more: Tensor, positions: Tensor) -> None:
    """Write more (B, K, T, D) at positions (B, T) int64 of side (B, K, size, D), which has them."""
    if (native := cpu.native_for(more)) and native.places(side, more):
        native.place(side, more, positions)
    else:
        rows = torch.arange(len(more), device=more.device)[:, None]
        side[rows, :, positions] = more.transpose(1, 2)


class Added(torch.autograd.Function):
    """y + scale x A^T B^T, written over y (..., out); x (..., in), A (R, in), B (out, R). Keeps all but y, and x A^T."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = F.linear(x, a)  # (..., R)
        y.view(-1, y.size(-1)).addmm_(low.flatten(0, -2), b.t(), alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, low, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        _, for_x, for_a, for_b, _ = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        grad_b = (flat.t() @ low.flatten(0, -2)).mul_(ctx.scale) if for_b else None
        grad_low = (flat @ b).mul_(ctx.scale) if for_x or for_a else None  # (n, R)
        grad_a = grad_low.t() @ x.flatten(0, -2) if grad_low is not None and for_a else None
        grad_x = (grad_low @ a).view(x.shape) if grad_low is not None and for_x else None
        return grad, grad_x, grad_a, grad_b, None


class SummedLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, by asking autograd about the head alone.

    So it serves whatever the head is: frozen, trained, tied or adapted.
    """

    @staticmethod
    def forward(
        ctx: Any, head: nn.Linear, x: Tensor, targets: Tensor, counts: Tensor | None, learning: bool, *parameters: Tensor
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        learning = learning and any(ctx.needs_input_grad)
        grad_x = torch.zeros_like(x) if learning else None
        grads = [torch.zeros_like(p) for p in parameters] if learning else []
        rows = chunk_rows(head.out_features, x.device)
        for start in range(0, len(x), rows):
            chunk = slice(start, start + rows)
            with torch.set_grad_enabled(learning):
                part = x[chunk].detach().requires_grad_(learning)
                logits = head(part)  # (n, V)
            loss, grad_logits = softmax_loss(logits.detach().to(wide), targets[chunk], None if counts is None else counts[chunk])
            total += loss
            if grad_x is not None:
                found = torch.autograd.grad(logits, (part, *parameters), grad_logits.to(logits.dtype))
                grad_x[chunk] = found[0]
                for grad, more in zip(grads, found[1:], strict=True):
                    grad += more
        if grad_x is not None:
            ctx.save_for_backward(grad_x, *grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *grads = ctx.saved_tensors
        return (None, grad_x * grad_loss, None, None, None, *(grad * grad_loss for grad in grads))


def softmax_loss(logits: Tensor, targets: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy (scalar) of logits (n, V), and its gradient (n, V), which is written over the logits."""
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, targets[:, None])  # (n, 1)
    sums = logits.exp_().sum(-1, keepdim=True)  # (n, 1)
    losses = sums.log() - chosen
    logits /= sums
    logits.scatter_add_(-1, targets[:, None], -torch.ones_like(chosen))
    if counts is not None:
        losses *= counts[:, None]
        logits *= counts[:, None]
    return losses.sum(), logits


def chunk_rows(V: int, device: torch.device) -> int:
    """How many rows of logits exist at once: 64 MiB of fp32 on a CPU, 512 MiB on a GPU."""
    return max(1, (2**24 if device.type == "cpu" else 2**27) // V)


# ---- kept as what it is made of --------------------------------------------------------------------------------------
# A product whose weight or adapter learns keeps what went into it. Where that is cheap to make of what others keep anyway (a norm of x;
# silu(gate) * up of gate and up), the backward pass is left this instead, and makes it once more: the same operations, the same bits.


def cheap(make: Callable[..., Tensor], *of: Any) -> Tensor:
    """make(*of), a new tensor: inside `keeping_less` the backward pass keeps `of` instead of it."""
    return noted(make(*of), make, *of)


def noted(y: Tensor, make: Callable[..., Tensor], *of: Any) -> Tensor:
    """y, which make(*of) makes once more."""
    if torch.is_grad_enabled():
        setattr(y.untyped_storage(), RECIPE, Recipe(y, make, of))  # as long as its numbers are there
    return y


def keeping_less(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, autograd keeps cheap tensors as what they are made of. On CPUs: there a pass over memory costs little beside a product."""
    return torch.autograd.graph.saved_tensors_hooks(watched, looked_up) if device.type == "cpu" else nullcontext()


RECIPE = "recipe"  # attribute of a storage


class Recipe:
    """How a cheap tensor is made, of what. What several need (q, k and v of one norm) is made for the first and is gone after the last:
    autograd lets go of what it kept for a product when the product's gradient is there."""

    def __init__(self, y: Tensor, make: Callable[..., Tensor], of: tuple[Any, ...]) -> None:
        self.make, self.version = make, y._version
        self.of: list[Any] = [each.detach() if isinstance(each, Tensor) else each for each in of]
        self.made: Tensor | None = None

    def keep(self) -> None:
        """It is needed; what it is made of may be cheap too."""
        self.of = [watched(each) if isinstance(each, Tensor) else each for each in self.of]

    @torch.no_grad()
    def again(self) -> Tensor:
        if self.made is None:
            self.made = self.make(*map(looked_up, self.of))
        return self.made


class Kept(NamedTuple):
    """A view of a tensor that is made once more."""

    recipe: Recipe
    size: Sequence[int]
    stride: Sequence[int]
    offset: int


def packed(tensor: Tensor) -> "Tensor | Kept":
    recipe: Recipe | None = getattr(tensor.untyped_storage(), RECIPE, None)
    if recipe is None or recipe.version != tensor._version:  # nobody has written over it since
        return tensor
    recipe.keep()
    return Kept(recipe, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def unpacked(kept: Any) -> Any:
    return kept.recipe.again().as_strided(kept.size, kept.stride, kept.offset) if isinstance(kept, Kept) else kept


class Watched(NamedTuple):
    """A tensor that is kept itself, and how often it had been written over: autograd looks at that only where it has no hooks."""

    tensor: Tensor
    version: int


def watched(tensor: Tensor) -> "Watched | Kept":
    kept = packed(tensor)
    return Watched(kept, kept._version) if isinstance(kept, Tensor) else kept


def looked_up(kept: Any) -> Any:
    if not isinstance(kept, Watched):
        return unpacked(kept)
    if kept.tensor._version != kept.version:
        raise RuntimeError(f"a tensor {tuple(kept.tensor.shape)} that the backward pass needs was written over since the forward pass")
    return kept.tensor


def really_kept(kept: Any) -> Iterator[Tensor]:
    """The tensors that live on in what `packed` gave."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, Watched):
        yield kept.tensor
    elif isinstance(kept, Kept):
        for each in kept.recipe.of:
            yield from really_kept(each)
