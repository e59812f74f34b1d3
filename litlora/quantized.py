"""Weights in 16, 8 or 4 bits: what a Linear of a frozen base may hold instead of its `weight`.

    bf16     as they are stored, where they are stored in bf16: nothing is lost, and they stay in the map of their file
    int8     a whole number from -127 to 127 each, and one fp32 scale for each output row: 8 bits and a little more
    nf4      4 bits each, and one fp32 scale for every 64: 4.5 bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, section 3)
    nf4-dq   the same with the scales in 8 bits, as there in "double quantization": 4.13 bits

The numbers lie in plain tensors. They are made wide where they are used, some rows at a time, and never kept wide: neither between
calls nor for the backward pass, which makes them wide again. No gradient reaches them.

Embedding, head, norms and biases stay as they are, and so does everything that is trained.

Run on CPUs. On a GPU kernels of `gpu/` widen a weight in one pass and multiply a few rows without widening it; none of it has run on one.
"""

import functools
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable

from litlora import cpu, gpu
from litlora.errors import UserError

BLOCK = 64  # numbers of a weight that share a scale in nf4
SCALES_BLOCK = 256  # scales that share one of theirs in nf4-dq
FEW_IN_BF16 = 2  # rows for which torch's product in bf16 costs less than one in fp32 with the weight made wide
FEW_ON_GPU = 4  # rows for which reading the codes once for each costs less than a weight that is written wide and read again
AT_ONCE = 2**20  # numbers that are wide at once on a CPU: 4 MB in fp32, which stay in its cache; a GPU takes a whole weight

# The 16 values of NF4, arXiv:2305.14314, appendix E: quantiles of a normal distribution, scaled to [-1, 1], 0 among them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Quantized(nn.Module):
    """A weight (out, in) in few bits. Its tensors are frozen Parameters, so that they move with the model."""

    kind = ""
    codes: nn.Parameter
    scales: nn.Parameter  # fp32; bf16 has none

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features

    def rows(self, start: int, stop: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Those rows, wide: (stop - start, in). Rows of a cut that `cuts` made. `out`: where they may be written."""
        raise NotImplementedError

    def for_now(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The same on a CPU in room that the next ones take."""
        return self.rows(start, stop, dtype, room(stop - start, self.in_features, dtype) if self.codes.is_cpu else None)

    def wide(self) -> Tensor:
        """The weight (out, in) in fp32: what these few bits stand for."""
        return torch.cat([self.rows(start, stop, torch.float32) for start, stop in self.cuts()])

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if not torch.is_grad_enabled():
            return self.answering(x)
        y: Tensor = Product.apply(x, self) if x.requires_grad else self.product(x)
        return y

    def answering(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """The product where no gradient is recorded; it may be rounded as bf16 is, where no kernel of ours serves."""
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        flat, y = x.flatten(0, -2), x.new_empty(*x.shape[:-1], self.out_features)  # no view of anything: an adapter writes over it
        for start, stop in self.cuts():
            torch.mm(flat, self.for_now(start, stop, x.dtype).t(), out=y.view(-1, self.out_features)[:, start:stop])
        return y

    def back(self, grad: Tensor) -> Tensor:  # (..., out) -> (..., in)
        flat = grad.flatten(0, -2)
        grad_x = flat.new_zeros(len(flat), self.in_features)
        for start, stop in self.cuts():
            grad_x.addmm_(flat[:, start:stop], self.for_now(start, stop, grad.dtype))
        return grad_x.unflatten(0, grad.shape[:-1])

    def cuts(self) -> Iterator[tuple[int, int]]:
        """First and last + 1 of the rows that are wide at the same time; whole blocks of nf4, also where a row is none."""
        step = self.out_features
        if next(self.parameters()).is_cpu:
            whole = BLOCK // math.gcd(BLOCK, self.in_features)
            step = max(1, AT_ONCE // (self.in_features * whole)) * whole
        return ((start, min(start + step, self.out_features)) for start in range(0, self.out_features, step))

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())


class Product(torch.autograd.Function):
    """x W^T of a quantized W: keeps neither x nor a wide W, for the gradient of x needs W alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantized) -> Tensor:
        ctx.weight = weight
        return weight.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.weight.back(grad), None


class Room(threading.local):
    """What is wide for the moment, in each thread always in the same place: what comes and goes between tensors that stay would leave
    holes, which smaller ones that stay fill, and the next wide rows would take memory of their own."""

    held: Tensor | None = None


ROOM = Room()


def room(rows: int, columns: int, dtype: torch.dtype) -> Tensor:  # (rows, columns), of any numbers
    held, count = ROOM.held, rows * columns
    if held is None or held.dtype != dtype or held.numel() < count:
        with torch.inference_mode(False):
            ROOM.held = held = torch.empty(max(count, AT_ONCE), dtype=dtype)
    return held[:count].view(rows, columns)


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class Bf16(Quantized):
    """W rounded to bf16."""

    kind = "bf16"

    def __init__(self, weight: Tensor) -> None:  # (out, in), of any dtype
        super().__init__(*weight.shape)
        self.codes = frozen(weight.to(torch.bfloat16))  # (out, in); the same memory where it is bf16

    def rows(self, start: int, stop: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        part = self.codes[start:stop]
        return part.to(dtype) if out is None or dtype == part.dtype else out.copy_(part)

    def answering(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """Two rows at most are rounded as the weight is: to widen it for them would take longer than the product."""
        if (native := cpu.native_for(x)) and native.multiplies(x, "bf16", self.codes, self.out_features):
            return native.product(x, "bf16", self.codes, self.out_features)
        if x.device.type != "cpu" or x.numel() > FEW_IN_BF16 * self.in_features:
            return self.product(x)
        return nn.functional.linear(x.bfloat16(), self.codes).to(x.dtype)


class Int8(Quantized):
    """W = scales codes, row by row (Dettmers et al. 2022, arXiv:2208.07339, equation 2, for weights alone)."""

    kind = "int8"

    def __init__(self, weight: Tensor) -> None:  # (out, in), of any dtype
        super().__init__(*weight.shape)
        self.codes = frozen(torch.empty(weight.shape, dtype=torch.int8, device=weight.device))  # (out, in)
        self.scales = frozen(torch.empty(len(weight), device=weight.device))  # (out,)
        for start, stop in self.cuts():
            part = weight[start:stop].float()
            largest = part.abs().amax(1)
            scales = largest / torch.full_like(largest, 127)  # by a number itself CUDA does not divide: it multiplies by a rounded 1 / 127
            self.scales[start:stop] = scales
            self.codes[start:stop] = (part / nonzero(scales)[:, None]).round_().clamp_(-127, 127)

    def rows(self, start: int, stop: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if fused := gpu.triton_for(self.scales):
            return fused.widened_int8(self.codes[start:stop], self.scales[start:stop], dtype)
        return torch.mul(self.codes[start:stop], self.scales[start:stop, None], out=out if dtype == torch.float32 else None).to(dtype)

    def product(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """The scales go to what comes out: a product with whole numbers, which are exact in bf16 as well, needs one pass less."""
        flat, y = x.flatten(0, -2), x.new_empty(*x.shape[:-1], self.out_features)
        for start, stop in self.cuts():
            part = self.codes[start:stop]
            whole = room(len(part), self.in_features, x.dtype).copy_(part) if x.is_cpu else part.to(x.dtype)
            torch.mm(flat, whole.t(), out=y.view(-1, self.out_features)[:, start:stop])
        return y.mul_(self.scales)

    def answering(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """torch's own product of bf16 with int8 for few rows, several times as fast on a CPU as to widen the weight. What goes in and what
        comes out is rounded to bf16, which costs a tenth of what the eight bits did; the scales are not: that would move whole rows."""
        if (fused := gpu.triton_for(x)) and x.numel() <= FEW_ON_GPU * self.in_features:
            return fused.product_int8(x, self.codes, self.scales)
        if (native := cpu.native_for(x)) and native.multiplies(x, "int8", self.codes, self.out_features, self.scales):
            return native.product(x, "int8", self.codes, self.out_features, self.scales)
        if x.device.type != "cpu" or x.numel() > cpu.FEW * self.in_features or self.in_features % 64:  # it reads beyond others' end
            return self.product(x)
        y = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), self.codes, ones(self.out_features))
        return (y * self.scales).to(x.dtype).view(*x.shape[:-1], -1)


class FourBit(Quantized):
    """W = scale NF4[code], block by block of the row-major weight; two codes a byte, the first one high. Bit for bit bitsandbytes' form."""

    kind = "nf4"

    def __init__(self, weight: Tensor) -> None:  # (out, in), of any dtype
        super().__init__(*weight.shape)
        count, device = weight.numel(), weight.device
        self.codes = frozen(torch.empty(-(-count // 2), dtype=torch.uint8, device=device))
        scales = torch.empty(-(-count // BLOCK), device=device)
        for start, stop in self.cuts():
            part = in_blocks(weight[start:stop].float(), BLOCK)
            largest = part.abs().amax(1)  # (n,)
            scales[start * self.in_features // BLOCK :][: len(largest)] = largest
            codes = nearest((part / nonzero(largest)[:, None]).flatten())
            packed = codes[0::2] << 4 | codes[1::2]
            self.codes[start * self.in_features // 2 :][: len(packed)] = packed[: -(-(stop - start) * self.in_features // 2)]
        self.keep(scales)

    def keep(self, scales: Tensor) -> None:
        self.scales = frozen(scales)  # (ceil(out * in / 64),)

    def scales_of(self, first: int, last: int) -> Tensor:
        return self.scales[first:last]

    def rows(self, start: int, stop: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        first, last = start * self.in_features, stop * self.in_features
        if fused := gpu.triton_for(self.scales):
            codes, scales = self.codes[first // 2 : -(-last // 2)], self.scales_of(first // BLOCK, -(-last // BLOCK))
            return fused.widened_nf4(codes, scales, table(NF4, codes.device), BLOCK, dtype, stop - start, self.in_features)
        fits = out is not None and dtype == torch.float32 and (last - first) % BLOCK == 0
        into = out.view(-1).view(torch.int64) if out is not None and fits else None
        numbers = torch.index_select(pairs(self.codes.device), 0, self.codes[first // 2 : -(-last // 2)].int(), out=into)
        wide = in_blocks(numbers.view(torch.float32), BLOCK).mul_(self.scales_of(first // BLOCK, -(-last // BLOCK))[:, None])
        return wide.flatten()[: last - first].view(-1, self.in_features).to(dtype)

    def answering(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        scales = functools.partial(self.scales_of, 0, self.out_features * self.in_features // BLOCK)
        if (fused := gpu.triton_for(x)) and x.numel() <= FEW_ON_GPU * self.in_features and not self.in_features % BLOCK:
            return fused.product_nf4(x, self.codes, scales(), table(NF4, x.device), BLOCK, self.out_features)
        if (native := cpu.native_for(x)) and native.multiplies(x, "nf4", self.codes, self.out_features, self.scales):
            return native.product(x, "nf4", self.codes, self.out_features, scales(), table(NF4, x.device))
        return self.product(x)


class FourBitTwice(FourBit):
    """Its scales, less their mean, are `scales` EIGHT_BIT[code] in blocks of 256 (arXiv:2305.14314, section 3)."""

    kind = "nf4-dq"

    def keep(self, scales: Tensor) -> None:
        self.mean = frozen(scales.cpu().mean().to(scales.device))  # where its bits are the same: a GPU adds in another order
        parts = in_blocks(scales - self.mean, SCALES_BLOCK)
        largest = parts.abs().amax(1)
        codes = torch.bucketize(parts / nonzero(largest)[:, None], midpoints(eight_bit(), scales.device))
        self.scale_codes = frozen(codes.flatten()[: len(scales)].to(torch.uint8))  # (ceil(out * in / 64),)
        self.scales = frozen(largest)  # (ceil(out * in / 64 / 256),)

    def scales_of(self, first: int, last: int) -> Tensor:
        block = first // SCALES_BLOCK
        numbers = table(eight_bit(), self.codes.device).index_select(0, self.scale_codes[block * SCALES_BLOCK : last].int())
        wide = in_blocks(numbers, SCALES_BLOCK).mul_(self.scales[block : -(-last // SCALES_BLOCK), None]).flatten()
        return wide[first - block * SCALES_BLOCK :][: last - first] + self.mean


KINDS: dict[str, type[Bf16] | type[Int8] | type[FourBit]] = {made.kind: made for made in (Bf16, Int8, FourBit, FourBitTwice)}


def bytes_of(kind: str, out_features: int, in_features: int) -> int:
    """What such a weight takes, before there is one."""
    count = out_features * in_features
    scales = -(-count // BLOCK)
    if kind == "bf16":
        return 2 * count
    if kind == "int8":
        return count + 4 * out_features
    return -(-count // 2) + (4 * scales if kind == "nf4" else scales + 4 * -(-scales // SCALES_BLOCK) + 4)


def is_read_as_stored(weight: Tensor) -> bool:
    """Whether kernels of ours read it in the bf16 that it is in."""
    return weight.dtype == torch.bfloat16 and weight.size(-1) % cpu.WIDTH["bf16"] == 0


@torch.no_grad()
def quantized(kind: str, weight: Tensor, where: str = "") -> Quantized:
    """`weight` (out, in) in few bits, on its device. UserError, naming `where`, where a number that is none would spoil others' scale."""
    made = KINDS[kind](weight)
    if not isinstance(made, Bf16) and not torch.isfinite(made.scales).all():
        raise UserError("holds numbers that are not finite", where=where, hint="load it wide to look at it: --quantize none")
    return made


def hold(linear: Any, quantized: Quantized | None) -> None:
    """This instead of a model's Linear's weight; None: a weight again, of what the few bits stand for, which learns as a new one does."""
    linear.register_parameter("weight", nn.Parameter(linear.wide()) if quantized is None else None)
    linear.quantized = quantized


def beside(host: nn.Module) -> dict[str, Any]:
    """dtype, at least fp32, and device of what an adapter puts beside its host, in whatever the host's numbers are held."""
    held = list(host.parameters())
    return {"dtype": functools.reduce(torch.promote_types, (one.dtype for one in held), torch.float32), "device": held[0].device}


# ---- tables ------------------------------------------------------------------------------------------------------------


def in_blocks(tensor: Tensor, size: int) -> Tensor:
    """(ceil(n / size), size); the last one is filled up with zeros."""
    flat = tensor.flatten()
    return nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size) if len(flat) % size else flat.view(-1, size)


def nonzero(scales: Tensor) -> Tensor:
    """A block of zeros is divided by 1."""
    return torch.where(scales == 0, 1.0, scales)


@functools.lru_cache(maxsize=16)
def table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


@functools.lru_cache(maxsize=64)
def ones(count: int) -> Tensor:
    """Scales for a product that is to have none. (count,) bf16"""
    return torch.ones(count, dtype=torch.bfloat16)


@functools.lru_cache(maxsize=16)
def midpoints(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Below the first a number is nearest to the first value, above the last to the last."""
    known = table(values, device)
    return (known[1:] + known[:-1]) / 2


def nearest(numbers: Tensor) -> Tensor:  # (n,) in [-1, 1] -> (n,) uint8
    """Codes of NF4; of two that are equally near the lower one. Five times as fast as a search among the midpoints."""
    parts = ((numbers + 1) * 128).to(torch.int32).clamp_(0, 255)
    lower = lowest(numbers.device).index_select(0, parts)
    ends = nn.functional.pad(midpoints(NF4, numbers.device), (0, 1), value=math.inf)
    return (lower + (numbers > ends.index_select(0, lower))).to(torch.uint8)


@functools.lru_cache(maxsize=16)
def lowest(device: torch.device) -> Tensor:
    """For each of 256 parts of [-1, 1] the lowest code that a number in it may have; the next one is the highest, for midpoints are ten
    parts apart. It begins half a part lower, so that rounding into the next part does no harm. (256,)"""
    return torch.bucketize(torch.arange(-128, 128, device=device) / 128 - 1 / 256, midpoints(NF4, device), out_int32=True)


@functools.lru_cache(maxsize=16)
def pairs(device: torch.device) -> Tensor:
    """The two fp32 numbers of each byte, as one int64: looked up at once, which is three times as fast as one by one. (256,)"""
    known = table(NF4, device)
    return torch.stack((known.repeat_interleave(16), known.repeat(16)), 1).view(torch.int64).flatten()


@functools.lru_cache(maxsize=1)
def eight_bit() -> tuple[float, ...]:
    """The dynamic tree of 8 bits (Dettmers et al. 2022, arXiv:2110.02861, section 1.3): for each power of ten from -6 to 0 twice as many
    numbers as for the one below, each in the middle of its part of [0.1, 1]; the same with a minus; 0 and 1."""
    numbers = [0.0, 1.0]
    for digits in range(7):
        edges = torch.linspace(0.1, 1, 2**digits + 1)
        middles = (10.0 ** (digits - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        numbers += [*middles, *(-number for number in middles)]
    return tuple(sorted(numbers))
