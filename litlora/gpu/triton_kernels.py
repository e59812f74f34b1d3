"""Kernels in Triton for what takes a GPU several passes over memory otherwise: in fp32 inside, rounded once at the end.

They have not run on a GPU yet. Tests run each in Triton's interpreter on a CPU against torch's arithmetic, and compile each for
NVIDIA's GPUs. What each computes is said where its counterpart is, in `kernels.py`, `quantized.py` and `model.py`.

Letters for shapes are those of `model.py`. A name in capitals in a kernel is known when it is compiled.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # numbers that one program holds at once
PROGRAMS = 1024  # at most, where each goes over many rows
KEYS_BYTES = 2**15  # of keys and values that are looked at together: a GPU holds three times so much, and the smallest have 99 KB for it
SPLITS = 16  # parts of the tokens seen that are looked at side by side, when there is one query
MATVEC_OUT = 4  # numbers of a product's outcome that one program computes


def tile(width: int) -> tuple[int, int]:
    """Rows and columns that one program holds, powers of two; all columns of a row."""
    columns: int = triton.next_power_of_2(width)
    return max(1, TILE // columns), columns


def warps(columns: int) -> int:
    return 16 if columns > 8192 else 8 if columns > 2048 else 4


# ---- RMS norm ----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (..., C), (C,) -> (..., C) in x's dtype
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    C = x.size(-1)
    rows, (ROWS, COLUMNS) = x.numel() // C, tile(C)
    rms_norm_kernel[(triton.cdiv(rows, ROWS),)](x, weight, y, rows, C, eps, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=warps(COLUMNS))
    return y


@triton.jit
def rms_norm_kernel(x, weight, y, rows, C, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < C)
    numbers = tl.load(x + row * C + column, mask=inside, other=0).to(tl.float32)
    gains = tl.load(weight + column, mask=column < C, other=0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(numbers * numbers, 1) / C + eps)[:, None]
    tl.store(y + row * C + column, numbers * inverse * gains, mask=inside)


def rms_norm_back(grad: Tensor, x: Tensor, weight: Tensor, eps: float, learns: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of x (..., C) and, if it `learns`, of the weight (C,)."""
    x, grad = x.contiguous(), grad.contiguous()
    C = x.size(-1)
    rows, (ROWS, COLUMNS) = x.numel() // C, tile(C)
    programs = min(triton.cdiv(rows, ROWS), PROGRAMS)
    grad_x = torch.empty_like(x)
    parts = torch.empty(programs if learns else 0, C, dtype=torch.float32, device=x.device)
    rms_norm_back_kernel[(programs,)](
        grad, x, weight, grad_x, parts, rows, C, eps, ROWS=ROWS, COLUMNS=COLUMNS, LEARNS=learns, num_warps=warps(COLUMNS)
    )
    return grad_x, parts.sum(0).to(weight.dtype) if learns else None


@triton.jit
def rms_norm_back_kernel(
    grad, x, weight, grad_x, parts, rows, C, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEARNS: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    gains = tl.load(weight + column, mask=column < C, other=0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = (row < rows) & (column < C)
        numbers = tl.load(x + row * C + column, mask=inside, other=0).to(tl.float32)
        slope = tl.load(grad + row * C + column, mask=inside, other=0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(numbers * numbers, 1) / C + eps)[:, None]
        if LEARNS:
            total += slope * numbers * inverse
        slope *= gains
        along = tl.sum(slope * numbers, 1)[:, None] * inverse * inverse / C
        tl.store(grad_x + row * C + column, (slope - numbers * along) * inverse, mask=inside)
    if LEARNS:
        tl.store(parts + tl.program_id(0) * C + column, tl.sum(total, 0)[None, :], mask=column < C)


# ---- SwiGLU ------------------------------------------------------------------------------------------------------------


def in_rows(x: Tensor) -> Tensor:
    """(..., F) as (rows, F) whose rows lie whole in memory, though not always one right after another: a half of a fused product."""
    flat = x.flatten(0, -2)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def gated(gate: Tensor, up: Tensor) -> Tensor:  # (..., F) twice -> (..., F)
    gates, ups = in_rows(gate), in_rows(up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows, width = gates.shape
    grid = (rows, triton.cdiv(width, TILE // 4))
    gated_kernel[grid](gates, ups, y, width, gates.stride(0), ups.stride(0), COLUMNS=TILE // 4, num_warps=4)
    return y


@triton.jit
def gated_kernel(gate, up, y, width, gate_step, up_step, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    g = tl.load(gate + row * gate_step + column, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + row * up_step + column, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * width + column, g * tl.sigmoid(g) * u, mask=inside)


def gated_back(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:  # (..., F) thrice -> twice
    grads, gates, ups = in_rows(grad), in_rows(gate), in_rows(up)
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    rows, width = gates.shape
    grid = (rows, triton.cdiv(width, TILE // 4))
    gated_back_kernel[grid](
        grads, gates, ups, grad_gate, grad_up, width, grads.stride(0), gates.stride(0), ups.stride(0), COLUMNS=TILE // 4, num_warps=4
    )
    return grad_gate, grad_up


@triton.jit
def gated_back_kernel(grad, gate, up, grad_gate, grad_up, width, grad_step, gate_step, up_step, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    d = tl.load(grad + row * grad_step + column, mask=inside, other=0).to(tl.float32)
    g = tl.load(gate + row * gate_step + column, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + row * up_step + column, mask=inside, other=0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(grad_gate + row * width + column, d * u * s * (1 + g * (1 - s)), mask=inside)
    tl.store(grad_up + row * width + column, d * g * s, mask=inside)


# ---- rotary positions --------------------------------------------------------------------------------------------------


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, way: int) -> Tensor:
    """x (B, n, T, D) in any order in memory, turned by (1 or B, 1, T, D) forwards (`way` 1) or back (-1)."""
    y = torch.empty_like(x)
    B, n, T, D = x.shape
    HALF: int = triton.next_power_of_2(D // 2)
    HEADS = min(triton.next_power_of_2(n), max(1, TILE // 4 // HALF))
    cos, sin = cos.contiguous(), sin.contiguous()
    table_step = cos.stride(0) if cos.size(0) > 1 else 0
    turned_kernel[(B * T, triton.cdiv(n, HEADS))](
        x, cos, sin, y, n, T, D // 2, float(way), *x.stride(), *y.stride(), table_step,
        INTERLEAVED=interleaved, HEADS=HEADS, HALF=HALF, num_warps=4,
    )  # fmt: skip
    return y


@triton.jit
def turned_kernel(
    x, cos, sin, y, n, T, half, way, x_b, x_n, x_t, x_d, y_b, y_n, y_t, y_d, table_step,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + half
    inside = (head < n) & (pair < half)
    rows = b * x_b + head.to(tl.int64) * x_n + t * x_t
    left = tl.load(x + rows + first * x_d, mask=inside, other=0).to(tl.float32)
    right = tl.load(x + rows + second * x_d, mask=inside, other=0).to(tl.float32)
    row = b * table_step + t * 2 * half
    known = pair < half
    new_left = left * tl.load(cos + row + first, mask=known) + right * (way * tl.load(sin + row + first, mask=known))
    new_right = right * tl.load(cos + row + second, mask=known) + left * (way * tl.load(sin + row + second, mask=known))
    rows = b * y_b + head.to(tl.int64) * y_n + t * y_t
    tl.store(y + rows + first * y_d, new_left, mask=inside)
    tl.store(y + rows + second * y_d, new_right, mask=inside)


# ---- weights in few bits -----------------------------------------------------------------------------------------------


def widened_nf4(codes: Tensor, scales: Tensor, table: Tensor, block: int, dtype: torch.dtype, out: int, into: int) -> Tensor:
    """The weight (out, into) of two codes a byte, the first one high, `block` of which share one of the `scales`."""
    y = torch.empty(out, into, dtype=dtype, device=codes.device)
    widened_nf4_kernel[(triton.cdiv(y.numel(), TILE // 2),)](codes, scales, table, y, y.numel(), BLOCK=block, SIZE=TILE // 2, num_warps=4)
    return y


@triton.jit
def widened_nf4_kernel(codes, scales, table, y, count, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    byte = tl.load(codes + at // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(at % 2 == 0, byte >> 4, byte & 15)
    tl.store(y + at, tl.load(table + code) * tl.load(scales + at // BLOCK, mask=inside, other=0), mask=inside)


def widened_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:  # (out, in), (out,) -> (out, in)
    y = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    out, into = codes.shape
    grid = (out, triton.cdiv(into, TILE // 4))
    widened_int8_kernel[grid](codes, scales, y, into, COLUMNS=TILE // 4, num_warps=4)
    return y


@triton.jit
def widened_int8_kernel(codes, scales, y, into, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < into
    code = tl.load(codes + row * into + column, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * into + column, code * tl.load(scales + row), mask=inside)


def product_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x (..., in) of few rows, times a weight (out, in) that stays as it is: each code is read once a row."""
    flat, (out, into) = x.flatten(0, -2).contiguous(), codes.shape
    y = torch.empty(len(flat), out, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(out, MATVEC_OUT), len(flat))
    product_int8_kernel[grid](flat, codes, scales, y, out, into, OUT=MATVEC_OUT, COLUMNS=TILE // MATVEC_OUT, num_warps=4)
    return y.unflatten(0, x.shape[:-1])


@triton.jit
def product_int8_kernel(x, codes, scales, y, out, into, OUT: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * OUT + tl.arange(0, OUT)[:, None]
    x += tl.program_id(1) * into
    total = tl.zeros((OUT, COLUMNS), tl.float32)
    for first in range(0, into, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        code = tl.load(codes + row.to(tl.int64) * into + column, mask=(row < out) & (column < into), other=0).to(tl.float32)
        total += code * tl.load(x + column, mask=column < into, other=0).to(tl.float32)
    y += tl.program_id(1) * out
    scale = tl.load(scales + row, mask=row < out, other=0)
    tl.store(y + row, tl.sum(total, 1)[:, None] * scale, mask=row < out)


def product_nf4(x: Tensor, codes: Tensor, scales: Tensor, table: Tensor, block: int, out: int) -> Tensor:
    """The same for two codes a byte; `in` is a multiple of `block`."""
    flat, into = x.flatten(0, -2).contiguous(), x.size(-1)
    y = torch.empty(len(flat), out, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(out, MATVEC_OUT), len(flat))
    product_nf4_kernel[grid](
        flat, codes, scales, table, y, out, into // 2, BYTES=block // 2, OUT=MATVEC_OUT, COLUMNS=TILE // 2 // MATVEC_OUT, num_warps=4
    )
    return y.unflatten(0, x.shape[:-1])


@triton.jit
def product_nf4_kernel(x, codes, scales, table, y, out, into, BYTES: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * OUT + tl.arange(0, OUT)[:, None]
    x += tl.program_id(1) * into * 2
    total = tl.zeros((OUT, COLUMNS), tl.float32)
    for first in range(0, into, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]  # of bytes
        inside = (row < out) & (column < into)
        at = row.to(tl.int64) * into + column
        byte = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
        left = tl.load(x + 2 * column, mask=column < into, other=0).to(tl.float32)
        right = tl.load(x + 2 * column + 1, mask=column < into, other=0).to(tl.float32)
        scale = tl.load(scales + at // BYTES, mask=inside, other=0)
        total += (tl.load(table + (byte >> 4)) * left + tl.load(table + (byte & 15)) * right) * scale
    y += tl.program_id(1) * out
    tl.store(y + row, tl.sum(total, 1)[:, None], mask=row < out)


# ---- attention of one query --------------------------------------------------------------------------------------------


def attention_of_one(positions: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Of q (B, H, 1, D) over as many of k (B, K, S, D) and v (B, K, S, V) as `positions` (B, 1) and the window say -> (B, 1, H, V).

    What lies beyond is not read. The tokens seen are cut into parts, each with a softmax of its own, which are joined then (Dao et al.
    2023, "Flash-Decoding"; the arithmetic is that of arXiv:2112.05682, section 3).
    """
    q = q.contiguous()
    (B, H, _, D), K, V = q.shape, k.size(1), v.size(3)
    y = torch.empty(B, 1, H, V, dtype=v.dtype, device=q.device)
    parts = torch.empty(B * H, SPLITS, V, dtype=torch.float32, device=q.device)
    largest, sums = (torch.empty(B * H, SPLITS, dtype=torch.float32, device=q.device) for _ in range(2))
    assert k.stride(3) == v.stride(3) == 1, "a cache's heads lie whole"
    WIDTH, VALUES = max(16, triton.next_power_of_2(D)), max(16, triton.next_power_of_2(V))
    attention_of_one_kernel[(B * K, SPLITS)](
        q, k, v, positions, parts, largest, sums, float(scale), K, H // K, D, V, *k.stride()[:3], *v.stride()[:3],
        WINDOW=window or 0, SPLITS=SPLITS, KEYS=keys_at_once((WIDTH + VALUES) * k.element_size()),
        GROUP=max(16, triton.next_power_of_2(H // K)), WIDTH=WIDTH, VALUES=VALUES, num_warps=4,
    )  # fmt: skip
    joined_parts_kernel[(B * H,)](parts, largest, sums, y, V, SPLITS=SPLITS, VALUES=triton.next_power_of_2(V), num_warps=4)
    return y


def keys_at_once(size: int) -> int:
    """How many, where a key and its value take `size` bytes together."""
    return max(16, min(64, KEYS_BYTES // size))


@triton.jit
def attention_of_one_kernel(
    q, k, v, positions, parts, largest, sums, scale, K, group, D, V, k_b, k_n, k_s, v_b, v_n, v_s,
    WINDOW: tl.constexpr, SPLITS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    b, n = (tl.program_id(0) // K).to(tl.int64), (tl.program_id(0) % K).to(tl.int64)
    end = tl.load(positions + b).to(tl.int32) + 1
    start = tl.maximum(end - WINDOW, 0) if WINDOW else 0
    part = tl.cdiv(tl.cdiv(end - start, SPLITS), KEYS) * KEYS
    start += tl.program_id(1) * part
    end = tl.minimum(start + part, end)

    member = tl.arange(0, GROUP)
    width, value = tl.arange(0, WIDTH)[None, :], tl.arange(0, VALUES)[None, :]
    head = tl.program_id(0) * group + member  # of B * H
    own = member < group
    query = tl.load(q + head[:, None] * D + width, mask=own[:, None] & (width < D), other=0)
    most = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    seen = tl.zeros((GROUP, VALUES), tl.float32)
    for first in range(start, end, KEYS):
        key = first + tl.arange(0, KEYS)[:, None]
        at = b * k_b + n * k_n + key.to(tl.int64) * k_s
        keys = tl.load(k + at + width, mask=(key < end) & (width < D), other=0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(first + tl.arange(0, KEYS)[None, :] < end, scores, float("-inf"))
        more = tl.maximum(most, tl.max(scores, 1))
        kept, weights = tl.exp(most - more), tl.exp(scores - more[:, None])
        at = b * v_b + n * v_n + key.to(tl.int64) * v_s
        values = tl.load(v + at + value, mask=(key < end) & (value < V), other=0)
        seen = seen * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * kept + tl.sum(weights, 1)
        most = more
    at = head * SPLITS + tl.program_id(1)
    tl.store(largest + at, most, mask=own)
    tl.store(sums + at, total, mask=own)
    tl.store(parts + at[:, None] * V + value, seen, mask=own[:, None] & (value < V))


@triton.jit
def joined_parts_kernel(parts, largest, sums, y, V, SPLITS: tl.constexpr, VALUES: tl.constexpr):
    part, value = tl.arange(0, SPLITS), tl.arange(0, VALUES)[None, :]
    at = tl.program_id(0) * SPLITS + part
    most = tl.load(largest + at)
    shares = tl.exp(most - tl.max(most, 0))  # 0 for a part without a token
    seen = tl.load(parts + at[:, None] * V + value, mask=value < V, other=0)
    total = tl.sum(shares * tl.load(sums + at), 0)
    tl.store(y + tl.program_id(0) * V + value, tl.sum(shares[:, None] * seen, 0)[None, :] / total, mask=value < V)
