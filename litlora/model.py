"""A GPT, and what fine-tuning adds to it, in one file. Read it the way a batch travels:

    tokens -> GPT -> Block x L -> Attention -> attend -> MLP -> logits, or the loss
                       every weight matrix is a Linear; a Linear, an Attention and an MLP (or Experts) may carry an Adapter,
                       an Attention a learnt prompt, and a Block may be followed by an inserted one

Shapes. B rows, T tokens of this call, S tokens looked at, C hidden size, H query heads, K key/value heads, D head
size, V vocabulary, R rank, P learnt positions, N graded tokens, E experts, k of them for a token.

Names. Parameters carry Hugging Face's Llama names, so a Llama-like checkpoint loads as it is. An adapter adds names
below its host (`...q_proj.adapter.lora_A`, `...layers.3.inserted.mlp.up_proj.weight`) and never changes one.

Families. What tells one from another is a field of the Config: which norms, where; how q, k and v come; what turns; what is
scaled or capped. Nothing here knows a family's name.

Arithmetic. Norms, rotary tables and losses are computed in at least fp32 whatever the weights' dtype; everything else
in the dtype of the embedding's output. Weights that are trained may be kept wider, and are rounded where they are used.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from litlora import cpu, gpu
from litlora.config import Config, Rope, rotary_steps
from litlora.errors import UserError
from litlora.gpu.packed import Packed
from litlora.kernels import Added, Rotated, SummedLoss, add_product, cheap, keeping_less, linear, place, rms_norm, swiglu, turned
from litlora.quantized import Bf16, Quantized, beside, hold, is_read_as_stored

IGNORE = -100  # a target that is not graded


class GPT(nn.Module):
    """A decoder: token ids in, logits or a loss out. `config` says its shape and arithmetic."""

    checkpoint: Any = None  # the Checkpoint it was loaded from, whose tokenizer goes with it
    plain: Any = None  # what it was before anything was added to it (methods/attach.py puts it back)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Head(config)
        self.tie()

    @staticmethod
    def from_pretrained(
        path: str | Path | None, *, base_dir: str | Path | None = None, dtype: torch.dtype | None = None, quantize: str = "auto"
    ) -> "GPT":
        """The model at `path`: a Hugging Face directory, a step, a run, a merged model (None: as the commands choose).

        A step gets its adapter attached; `base_dir` says where its base is now, if it moved. `dtype` None keeps the
        weights' own; `quantize` as in `litlora.load`. UserError where the path is none of these, or anything in it does not fit.
        """
        from litlora.checkpoint.resolve import resolve  # the one import upwards: a model does not need files to exist
        from litlora.checkpoint.weights import load_model, quantize_meant

        checkpoint = resolve(path, base_dir=base_dir)
        model = load_model(checkpoint, dtype=dtype, quantize=quantize_meant(quantize, [] if checkpoint.is_model else [checkpoint]))
        model.checkpoint = checkpoint
        return model

    @property
    def drops(self) -> bool:
        """Whether it has dropout and is in training: a pass draws random numbers."""
        return self.training and any(getattr(module, "dropout", 0) for module in self.modules())

    @property
    def can_share(self) -> bool:
        """Whether what samples begin with alike is alike in each: not with dropout, nor with a rope that depends on a text's length."""
        ropes = (self.config.rope_of(layer) for layer in range(self.config.num_hidden_layers))
        return not self.drops and not any(rope.depends_on_length for rope in ropes if rope)

    def tie(self) -> None:
        """Make the head the embedding's own Parameter, where the config says so. Call it after assigning weights."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,  # (B, T) int64
        targets: Tensor | None = None,  # (B, T) int64, IGNORE where not graded
        *,
        segments: Sequence[int] | None = None,  # lengths of packed samples, in order; B is 1 and they sum to T
        prefix: int = 0,  # so many tokens in front of them that are the beginning of each: T more
        cache: "KVCache | None" = None,
        logits_at: Tensor | None = None,  # (B,) int64, the one position of each row whose logits are wanted
    ) -> Tensor:
        """Logits (B, T, V), or (B, 1, V) with `logits_at`; given targets, the loss summed over graded tokens (scalar).

        Rows are causal, so what stands right of a row's end (padding) changes nothing before it. Packed samples do not
        see each other and their positions start at 0. What they all begin with may be given once, as their `prefix`: the
        loss and its gradients are those of the whole samples (its graded tokens count for each). With a cache the tokens
        follow those that each row already holds, and no gradient is recorded; UserError, before anything changes, where they
        do not fit.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            context = Context.of(tokens, self.config, segments, prefix, cache)
            x = self.model(tokens, context)  # (B, T, C)
            if targets is not None:
                assert cache is None, "a loss is for training, a cache is for generation"
                graded = (targets.flatten() != IGNORE).nonzero().squeeze(1)  # (N,): the one place that waits for the device
                x = self.model.norm(x.flatten(0, 1).index_select(0, graded))  # (N, C)
                counts = torch.where(graded < prefix, len(segments), 1) if segments is not None and prefix else None  # (N,)
                return summed_loss(self.lm_head, x, targets.flatten().index_select(0, graded), counts)
            if logits_at is not None:
                x = x[torch.arange(len(x), device=x.device), logits_at].unsqueeze(1)  # (B, 1, C)
            logits: Tensor = self.lm_head(self.model.norm(x))
            if cache is not None:
                cache.advance(tokens.size(1))  # only now: a call that failed has held nothing
            return logits


class Trunk(nn.Module):
    """Everything below the head; the last norm is applied by GPT, to the tokens it needs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = norm(config, config.hidden_size)
        self.scale = config.embedding_multiplier
        self.dtype: torch.dtype | None = None  # what is computed in; None: the embedding's own
        self.recompute = False  # a block's activations in the backward pass, instead of keeping them (Chen et al. 2016, arXiv:1604.06174)

    def forward(self, tokens: Tensor, context: "Context") -> Tensor:  # (B, T) -> (B, T, C)
        x: Tensor = self.embed_tokens(tokens).to(self.dtype)
        if self.scale != 1:
            x = x * torch.tensor(self.scale, dtype=x.dtype, device="cpu")  # as it was trained: rounded
        again = self.recompute and torch.is_grad_enabled()
        with keeping_less(x.device):
            for block in self.layers:
                x = checkpoint(block, x, context, use_reentrant=False) if again else block(x, context)
        return x


@dataclass(frozen=True)
class Context:
    """What every block of one forward pass needs besides x."""

    turns: "dict[Rope | None, Turn]"  # one for each rope of the model
    segments: tuple[int, ...] | None
    prefix: int  # tokens in front of the segments that each of them continues
    cache: "KVCache | None"
    ragged: Tensor | None  # (B, T) int64, positions where the rows of a cache differ in length; None: they do not
    packed: Packed | None  # on a GPU: the segments once more, for all of them to be computed at once
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(tokens: Tensor, config: Config, segments: Sequence[int] | None, prefix: int, cache: "KVCache | None") -> "Context":
        (B, T), device = tokens.shape, tokens.device
        ragged = None
        if segments is not None:
            assert cache is None, "packed samples are for training, a cache is for generation"
            assert B == 1, f"{B} rows of packed samples"
            assert prefix + sum(segments) == T, f"samples of {prefix} + {sum(segments)} tokens in a row of {T}"
            own = (torch.arange(prefix, prefix + n, device=device) for n in segments)
            positions = torch.cat([torch.arange(prefix, device=device), *own])  # (T,)
            segments = tuple(segments)
        elif cache is None:
            positions = torch.arange(T, device=device)
        else:
            cache.check_room(B, T)
            if cache.is_ragged:
                positions = ragged = cache.starts(device)[:, None] + torch.arange(T, device=device)  # (B, T)
            else:
                positions = torch.arange(cache.lengths[0], cache.lengths[0] + T, device=device)
        length = T if cache is None else max(cache.reach, max(cache.lengths) + T)
        ropes = {config.rope_of(layer) for layer in range(config.num_hidden_layers)} - {None}
        assert not prefix or not any(rope.depends_on_length for rope in ropes if rope), "what samples share depends on their length"
        turns = {rope: turn_of(positions, rope, config.rotary_dim, segments, length) for rope in ropes if rope is not None}
        return Context(cast("dict[Rope | None, Turn]", turns), segments, prefix, cache, ragged, Packed.of(prefix, segments, device))

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, cap: float | None, sinks: Tensor | None) -> "Callable[..., Tensor] | None":
        """What computes attention of q, k, v, window and scale: on a GPU where samples or rows differ in length and scores are plain, on a
        CPU for few queries."""
        if self.cache is not None and (native := cpu.native_for(q)) and native.attends(q, k, v):
            return functools.partial(native.attention_of_few, self.ragged, cap=cap, sinks=sinks)
        if cap is not None or sinks is not None:
            return None
        if self.packed is not None and self.packed.serves(q, v):
            return self.packed
        if self.ragged is not None and q.size(2) == 1 and (fused := gpu.triton_for(q)):
            return functools.partial(fused.attention_of_one, self.ragged)
        return None

    def mask(self, q: Tensor, S: int, window: int | None) -> Tensor:
        """(T, S) or, ragged, (B, 1, T, S): 0 where a query may look, -inf elsewhere; the last query is the last key."""
        T = q.size(2)
        if (T, S, window) not in self.masks:
            keys = torch.arange(S, device=q.device)
            at = keys[S - T :, None] if self.ragged is None else self.ragged[:, None, :, None]
            hidden = keys > at if window is None else (keys > at) | (keys <= at - window)
            self.masks[T, S, window] = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf)
        return self.masks[T, S, window]


class Block(nn.Module):
    """x + attention(x), then x + MLP(x), with norms where the family has them; parallel: x + attention(x) + MLP(x)."""

    inserted: "Block | None"  # LLaMA-Pro: the block that follows this one

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.norms, self.parallel, self.scale = config.norms, config.parallel_residual, config.residual_multiplier
        self.silence = config.silence
        self.self_attn = (LatentAttention if config.kv_lora_rank else Attention)(config, layer)
        self.mlp = Experts(config) if config.has_experts(layer) else MLP(config, config.intermediate_size)
        for name in self.norms.names:
            self.register_module(name, norm(config, config.hidden_size))
        self.register_module("inserted", None)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B, T, C) -> (B, T, C)
        seen = self.normed(self.norms.before_attention, x)
        y = self.normed(self.norms.after_attention, self.self_attn(seen, context))
        if self.parallel:
            x = x + (y + self.mlp(seen if self.norms.before_mlp is None else self.normed(self.norms.before_mlp, x)))
        else:
            x = torch.add(x, y, alpha=self.scale)
            y = self.normed(self.norms.after_mlp, self.mlp(self.normed(self.norms.before_mlp, x)))
            x = torch.add(x, y, alpha=self.scale)
        return x if self.inserted is None else self.inserted(x, context)

    def normed(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else cast(nn.Module, self._modules[name])(x)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    qkv_proj: "Linear"  # instead of the three
    q_norm: "nn.Module | None"
    k_norm: "nn.Module | None"
    prompt: "Adapter | None"  # what it makes of (q, y), before o_proj
    adapter: "Adapter | None"

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.kv_heads, self.head_dim, self.qkv, self.qk_norm = H, K, D, config.qkv, config.qk_norm
        self.window, self.rope = config.window(layer), config.rope_of(layer)
        self.add_projections(config)
        self.o_proj = Linear(H * config.value_dim, config.hidden_size, config.attention_out_bias)
        each = ((H, D), (K, D))
        widths = {None: None, "head": (D, D), "heads": each, "heads_apart": each, "width": (H * D, K * D)}[config.qk_norm]
        self.register_module("q_norm", norm(config, widths[0]) if widths else None)
        self.register_module("k_norm", norm(config, widths[1]) if widths else None)
        self.scale, self.cap = config.attention_scale, config.attn_logit_softcapping
        self.sinks = nn.Parameter(torch.zeros(H)) if config.attention_sinks else None  # (H,)
        self.register_module("prompt", None)
        self.register_module("adapter", None)

    def add_projections(self, config: Config) -> None:
        """What `project` needs."""
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if config.qkv == "apart":
            self.q_proj = Linear(C, H * D, config.attention_bias)
            self.k_proj = Linear(C, K * D, config.attention_bias)
            self.v_proj = Linear(C, K * D, config.attention_bias)
        else:
            self.qkv_proj = Linear(C, (H + 2 * K) * D, config.attention_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B, T, C) -> (B, T, C)
        q, k, v = (side.transpose(1, 2) for side in self.project(x))  # (B, H, T, D), (B, K, T, D) twice
        if self.rope is not None:
            q, k = rotate(q, context.turns[self.rope]), rotate(k, context.turns[self.rope])
        if context.cache is not None:
            k, v = context.cache.extend(self, k, v, context.ragged)  # (B, K, S, D)
        y = self.attention(q, k, v, context)  # (B, T, H, D)
        if self.prompt is not None:
            y = self.prompt(self, q, y)
        return adapted(self, x, self.o_proj(y.flatten(2)))

    @property
    def product(self) -> "Product":
        if self.cap is None and self.sinks is None:  # its scores are those that every kernel for attention computes
            return functools.partial(grouped_attention, scale=self.scale)
        return functools.partial(scored_attention, scale=self.scale, cap=self.cap, sinks=self.sinks)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, C) -> (B, T, H, D), (B, T, K, D) twice
        """q, k and v, normed where the family does that, not yet turned."""
        if self.qkv == "apart":
            q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        elif self.qkv == "stacked":
            qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 K, D)
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 2)
        else:
            qkv = self.qkv_proj(x).unflatten(-1, (self.kv_heads, -1, self.head_dim))  # (B, T, K, H / K + 2, D)
            q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        if self.q_norm is None or self.k_norm is None:
            return q, k, v
        if self.qk_norm != "width":
            return self.q_norm(q), self.k_norm(k), v
        return self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k), v

    def attention(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:  # -> (B, T, H, D)
        if kernel := context.kernel(q, k, v, self.cap, self.sinks):
            return kernel(q, k, v, self.window, self.scale)
        if context.segments is None or len(context.segments) == 1:
            return attend(q, k, v, self.window, context, self.product).transpose(1, 2)
        parts = [context.prefix, *context.segments] if context.prefix else list(context.segments)
        samples = list(zip(*(x.split(parts, 2) for x in (q, k, v)), strict=True))
        if context.prefix:
            (_, first_k, first_v), own = samples[0], samples[1:]
            samples[1:] = [(q, cheap(joined, 2, first_k, k), cheap(joined, 2, first_v, v)) for q, k, v in own]
        return cheap(joined, 1, *(attend(q, k, v, self.window, context, self.product).transpose(1, 2) for q, k, v in samples))


class LatentAttention(Attention):
    """Keys and values of all heads made of one latent of each token (DeepSeek-V2: arXiv:2405.04434, section 2.1, equations 9 to 19).

    Of a head of q and k its last dimensions turn; of k these are the same for all heads, and made without the latent. Here they come
    first, where `rotate` looks for them: the scores are the same. A cache holds keys and values, not the latents.
    """

    def add_projections(self, config: Config) -> None:
        C, H, D, R, bias = config.hidden_size, config.num_attention_heads, config.head_dim, config.qk_rope_head_dim, config.attention_bias
        self.turning, self.q_rank, self.kv_rank = R, config.q_lora_rank, config.kv_lora_rank
        if self.q_rank is None:
            self.q_proj = Linear(C, H * D, False)
        else:
            self.q_a_proj = Linear(C, self.q_rank, bias)
            self.q_a_layernorm = RMSNorm(self.q_rank, LATENT_EPS)
            self.q_b_proj = Linear(self.q_rank, H * D, False)
        self.kv_a_proj_with_mqa = Linear(C, self.kv_rank + R, bias)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, LATENT_EPS)
        self.kv_b_proj = Linear(self.kv_rank, H * (D - R + config.value_dim), False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, C) -> (B, T, H, D) twice, (B, T, H, value size)
        still = self.head_dim - self.turning
        q = self.q_proj(x) if self.q_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_still, q_turns = q.unflatten(-1, (self.heads, -1)).tensor_split((still,), -1)
        latent, k_turns = self.kv_a_proj_with_mqa(x).tensor_split((self.kv_rank,), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1))
        k_still, v = kv.tensor_split((still,), -1)
        k_turns = k_turns.unsqueeze(2).expand(-1, -1, self.heads, -1)
        return torch.cat((q_turns, q_still), -1), torch.cat((k_turns, k_still), -1), v


LATENT_EPS = 1e-6  # of the norms of latents, whatever the config says of the others


def joined(dim: int, *parts: Tensor) -> Tensor:
    return torch.cat(parts, dim)


Product = Callable[..., Tensor]  # as F.scaled_dot_product_attention: of q, k, v and a mask, or is_causal


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, context: Context, product: Product) -> Tensor:
    """Softmax attention of q (B, H, T, D) over k, v (B, K, S, D), whose last T are the queries' own; (B, H, T, D).

    A mask is made only where the kernel's own causal order does not do, and never one of T x T for a long T.
    """
    T, S = q.size(2), k.size(2)
    if context.ragged is not None:
        return product(q, k, v, context.mask(q, S, window))
    if window is not None and T + window - 1 < S:  # what the first query does not see, none does
        first = S - (T + window - 1)
        return attend(q, k[:, :, first:], v[:, :, first:], window, context, product)
    if T == 1 or (T == S and (window is None or window >= T)):
        return product(q, k, v, is_causal=T > 1)
    if window is not None and window < T:  # a window's worth of queries at a time
        ends = range(S - T + window, S + window, window)
        parts = zip(q.split(window, 2), ends, strict=True)
        return torch.cat([attend(part, k[:, :, :end], v[:, :, :end], window, context, product) for part, end in parts], 2)
    return product(q, k, v, context.mask(q, S, window))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False, scale: float) -> Tensor:
    """A Product by torch's kernels. Where each head has one query, those that share a key head go in as its queries, (B, K, H / K, D):
    all of them look at the same keys, which are then read once."""
    if q.size(2) > 1:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=True)
    queries = q.reshape(len(q), k.size(1), -1, q.size(3))
    return F.scaled_dot_product_attention(queries, k, v, mask, scale=scale).reshape(*q.shape[:3], -1)


def scored_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False, scale: float, cap: Any, sinks: Any
) -> Tensor:
    """A Product whose scores exist as a whole, which no kernel needs. With a cap they are c tanh(score / c) (Gemma 2: arXiv:2408.00118,
    section 2); of `sinks` (H,) each is one more score of its head, which takes a share and gives no value (gpt-oss: arXiv:2508.10925)."""
    q, (T, S) = q.unflatten(1, (k.size(1), -1)), (q.size(2), k.size(2))  # (B, K, H / K, T, D)
    scores = q @ k[:, :, None].transpose(-2, -1) * scale  # (B, K, H / K, T, S)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores + (mask if mask.dim() == 2 else mask.unsqueeze(1))
    elif is_causal:
        scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), -1)
    return (wider(scores).softmax(-1)[..., :S].to(v.dtype) @ v[:, :, None]).flatten(1, 2)


class MLP(nn.Module):
    """SwiGLU or another gated unit (Shazeer 2020, arXiv:2002.05202), or a plain one."""

    adapter: "Adapter | None"

    def __init__(self, config: Config, inner: int) -> None:
        super().__init__()
        C, bias = config.hidden_size, config.mlp_bias
        self.kind, self.act = config.mlp, ACTIVATIONS[config.hidden_act]
        if config.mlp == "fused":
            self.gate_up_proj = Linear(C, 2 * inner, bias)
        else:
            if config.mlp == "gated":
                self.gate_proj = Linear(C, inner, bias)
            self.up_proj = Linear(C, inner, bias)
        self.down_proj = Linear(inner, C, bias)
        self.register_module("adapter", None)

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        if self.kind == "plain":
            return adapted(self, x, self.down_proj(cheap(self.act, self.up_proj(x))))
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.kind == "fused" else (self.gate_proj(x), self.up_proj(x))
        gated = swiglu(gate, up) if self.act is F.silu else cheap(torch.mul, cheap(self.act, gate), up)  # (..., inner)
        return adapted(self, x, self.down_proj(gated))


class Experts(nn.Module):
    """E MLPs, of which each token goes through the k that its router chose (Jiang et al. 2024, arXiv:2401.04088, section 2.1).

    What a token gets depends on itself alone: there is no limit on how many go through one expert.
    """

    adapter: "Adapter | None"
    shared_experts: "MLP | None"  # what every token goes through besides (DeepSeekMoE: arXiv:2401.06066, equation 9)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = Router(config)
        if config.mlp == "stacked":
            self.experts: Iterable[Any] = StackedMLPs(config)
        else:
            self.experts = nn.ModuleList(MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.register_module("shared_experts", MLP(config, shared) if shared else None)
        self.register_module("adapter", None)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        tokens = x.flatten(0, 1)  # (B T, C)
        weights, chosen = self.gate(tokens)  # (B T, k) twice
        order = chosen.flatten().argsort(stable=True)  # (B T k,): by expert, then by token
        rows, weights = order // chosen.size(1), weights.flatten()[order, None]
        counts = chosen.flatten().bincount(minlength=len(self.gate.weight)).tolist()  # waits for the device
        y = torch.zeros_like(tokens, dtype=weights.dtype)
        ends = itertools.accumulate(counts)
        for expert, count, end in zip(self.experts, counts, ends, strict=True):
            if count or torch.is_grad_enabled():  # whoever learns has a gradient, if of zeros: ranks wait for each other's
                own = rows[end - count : end]
                y.index_add_(0, own, expert(cheap(torch.index_select, tokens, 0, own)) * weights[end - count : end])
        y = y.to(x.dtype).view_as(x)
        return adapted(self, x, y if self.shared_experts is None else y + self.shared_experts(x))


class StackedMLPs(nn.Module):
    """The experts of a layer as one tensor for each of their matrices, (E, in, out), with biases (gpt-oss: arXiv:2508.10925, section 2).

    They are no Linears, so no targets. In gate_up_proj a gate and its up are neighbours. Iterating gives one function for each.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        E, C, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.limit, self.alpha = config.swiglu_limit, config.swiglu_alpha
        self.gate_up_proj = nn.Parameter(torch.zeros(E, C, 2 * inner))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(E, 2 * inner))
        self.down_proj = nn.Parameter(torch.zeros(E, inner, C))
        self.down_proj_bias = nn.Parameter(torch.zeros(E, C))

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        stacks = (self.gate_up_proj, self.gate_up_proj_bias, self.down_proj, self.down_proj_bias)
        return (functools.partial(self.one, of) for of in zip(*(stack.unbind() for stack in stacks), strict=True))

    def one(self, of: Sequence[Tensor], x: Tensor) -> Tensor:  # (n, C) -> (n, C)
        into, into_bias, out, out_bias = (part.to(x.dtype) for part in of)
        gate, up = torch.addmm(into_bias, x, into).unflatten(-1, (-1, 2)).unbind(-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return torch.addmm(out_bias, (up + 1) * gate * torch.sigmoid(self.alpha * gate), out)


class Router(nn.Module):
    """Which experts each token goes through, and how much each of them counts. In at least fp32: two may be close.

    No Linear of ours: it is never a target, nor stored in fewer bits. It is trained whole or not at all. With groups, a token's experts
    are all of the groups whose best ones score highest (DeepSeek-V2: arXiv:2405.04434, section 2.2.2).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Linear(config.hidden_size, config.num_experts, bias=False).weight
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None
        corrected = config.routing == "corrected"  # DeepSeek-V3: arXiv:2412.19437, equations 13 to 16
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False) if corrected else None
        self.k, self.normed, self.scale = config.num_experts_per_tok, config.norm_topk_prob, config.routed_scaling_factor
        self.groups, self.best_groups, self.best_of_group = config.n_group, config.topk_group, 2 if corrected else 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (n, C) -> weights (n, k), experts (n, k) int64
        bias = None if self.bias is None else wider(self.bias.to(x.dtype))
        scores = F.linear(wider(x), wider(self.weight.to(x.dtype)), bias)  # (n, E)
        scores = scores.softmax(-1) if self.e_score_correction_bias is None else scores.sigmoid()
        chosen = self.standing(scores.detach()).topk(self.k).indices
        weights = scores.gather(-1, chosen)
        if self.normed:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.scale if self.scale != 1 else weights, chosen

    def standing(self, scores: Tensor) -> Tensor:  # (n, E) -> same
        """By what experts are chosen: corrected, and -inf outside the best groups."""
        if self.e_score_correction_bias is not None:
            scores = scores + wider(self.e_score_correction_bias)
        if self.groups == 1:
            return scores
        scores = scores.unflatten(-1, (self.groups, -1))  # (n, groups, E / groups)
        best = scores.topk(self.best_of_group).values.sum(-1).topk(self.best_groups).indices  # (n, best groups)
        out = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device).scatter_(-1, best, False)
        return scores.masked_fill(out.unsqueeze(-1), -math.inf).flatten(1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Linear(nn.Linear):
    """Every weight matrix of a GPT. The one place to adapt, to quantize and to count."""

    adapter: "Adapter | None"
    quantized: Quantized | None  # the weight in few bits; `weight` is None then

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_module("adapter", None)  # a class attribute would shadow the module put here
        self.register_module("quantized", None)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return adapted(self, x, self.product(x, self.bias))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # (..., in) -> (..., out)
        weight, bias = self.weight, None if bias is None else bias.to(x.dtype)
        if weight is None:
            y: Tensor = self.quantized(x)
        elif weight.dtype != x.dtype and cpu.native_for(x) and is_read_as_stored(weight):  # the head: the embedding is its weight as well
            y = Bf16(weight)(x)
        else:
            return linear(x, weight if weight.dtype == x.dtype else weight.to(x.dtype), bias)
        return y if bias is None else y + bias

    def wide(self) -> Tensor:
        """The weight (out, in), or what its few bits stand for: then a new tensor, for the moment."""
        return self.weight if self.quantized is None else self.quantized.wide()


class Head(Linear):
    """From the last hidden states to logits, scaled and capped as the family does."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.hidden_size, config.vocab_size, config.lm_head_bias)
        self.scale, self.cap = config.logit_scale / config.logits_scaling, config.final_logit_softcapping

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., V)
        logits = super().forward(x)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def norm(config: Config, size: int | tuple[int, int]) -> nn.Module:
    """A norm of the family's kind over the last dimension; of (heads, D): with gains for each head."""
    if isinstance(size, tuple):
        return HeadNorm(*size, config.rms_norm_eps, config.qk_norm == "heads_apart")
    if config.norm == "rms":
        return RMSNorm(size, config.rms_norm_eps, config.norm_offset)
    return LayerNorm(size, config.rms_norm_eps, elementwise_affine=config.norm_gain, bias=config.norm_bias)


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, arXiv:1910.07467, over the last dimension. `offset`: what is added to the gains as they are stored."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if self.offset:  # stored near 0: their sum has more digits than they
            weight = self.offset + wider(weight)
        return rms_norm(x, weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Ba et al. 2016, arXiv:1607.06450, over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if side is None else side.to(x.dtype) for side in (self.weight, self.bias))
        return cheap(F.layer_norm, x, self.normalized_shape, weight, bias, self.eps)


class HeadNorm(nn.Module):
    """The same of each head's D numbers, with gains of its own and no bias. `apart`: each head's gains are a parameter of their own."""

    def __init__(self, heads: int, head_dim: int, eps: float, apart: bool) -> None:
        super().__init__()
        if apart:
            self.norms = nn.ModuleList(nn.LayerNorm(head_dim, bias=False) for _ in range(heads))
        else:
            self.weight = nn.Parameter(torch.ones(heads, head_dim))
        self.eps, self.apart = eps, apart

    def forward(self, x: Tensor) -> Tensor:  # (B, T, n, D) -> same
        weight = torch.stack([cast(Tensor, norm.weight) for norm in self.norms]) if self.apart else self.weight  # (n, D)
        return (F.layer_norm(wider(x), x.shape[-1:], eps=self.eps) * wider(weight.to(x.dtype))).to(x.dtype)


# ---- positions -------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """By how much each position turns the first R dimensions of q and k: cos and sin of the angles, fp32."""

    cos: Tensor  # (1 or B, 1, T, R)
    sin: Tensor  # (1 or B, 1, T, R), that of the first of each pair negated
    interleaved: bool  # a pair is (2i, 2i + 1); else (i, i + R/2)


def turn_of(positions: Tensor, rope: Rope, head_dim: int, segments: Sequence[int] | None, length: int) -> Turn:
    """The Turn of positions (T,) or (B, T) in a text of `length`, or in packed ones."""
    if segments is None or not rope.depends_on_length:
        return Turn(*rotary_table(positions, rope, head_dim, length), rope.interleaved)
    tables = [rotary_table(part, rope, head_dim, len(part)) for part in positions.split(list(segments))]
    return Turn(torch.cat([cos for cos, _ in tables], 2), torch.cat([sin for _, sin in tables], 2), rope.interleaved)


def rotary_table(positions: Tensor, rope: Rope, head_dim: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin, (1 or B, 1, T, R), of the angle by which each position, (T,) or (B, T), turns R dimensions of q and k.

    The sin of each pair's first is negated: (left, right) turns into (left cos - right sin, right cos + left sin).

    fp32 whatever the model's dtype: in bf16 position 257 would already be another one.
    """
    frequencies, gain = rotary_frequencies(rope, head_dim, positions.device, length if rope.depends_on_length else 0)
    angles = (positions.float()[..., None] * frequencies).unsqueeze(-3)  # (1, T, R / 2) or (B, 1, T, R / 2)
    if positions.dim() == 1:
        angles = angles.unsqueeze(0)
    cos, sin = angles.cos() * gain, angles.sin() * gain
    if rope.interleaved:
        return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


@functools.lru_cache(maxsize=64)
def rotary_frequencies(rope: Rope, head_dim: int, device: torch.device, length: int = 0) -> tuple[Tensor, float]:
    """`rotary_steps` on a device: (R / 2,) fp32."""
    steps, gain = rotary_steps(rope, head_dim, length)
    return torch.tensor(steps, dtype=torch.float32, device=device), gain


def rotate(x: Tensor, turn: Turn) -> Tensor:  # (B, n, T, D) -> same
    """Turn each pair by its position's angle; what lies beyond R stays as it is."""
    if turn.cos.size(-1) < x.size(-1):
        first, rest = x.tensor_split((turn.cos.size(-1),), -1)
        return torch.cat((rotate(first, turn), rest), -1)
    if not torch.is_grad_enabled():
        native = cpu.native_for(x)
        return native.turned(x, *turn) if native and native.turns(x, turn.cos) else turned(x, *turn, 1)
    y: Tensor = Rotated.apply(x, *turn)
    return y


class KVCache:
    """Keys and values of the tokens already seen. It belongs to a conversation (`rows` of them), not to the model.

    `lengths` says how many tokens each row holds; at most `size`. Its memory is taken by the first call that uses it.
    """

    def __init__(self, size: int, rows: int = 1) -> None:
        self.size = size
        self.lengths = [0] * rows
        self.reach = 0  # tokens of the text that is being written to it in parts, where a rope depends on that
        self.held: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # per attention: (B, K, size, D) twice

    @property
    def is_ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    def rewind(self, length: int | Sequence[int]) -> None:
        """Forget every token after `length`, the same for all rows or one per row."""
        lengths = [length] * len(self.lengths) if isinstance(length, int) else list(length)
        assert all(0 <= n <= held for n, held in zip(lengths, self.lengths, strict=True)), f"{lengths} of {self.lengths}"
        self.lengths = lengths

    def starts(self, device: torch.device) -> Tensor:
        """Where each row goes on, (B,) int64, if they are ragged."""
        return torch.tensor(self.lengths, device=device)

    def end(self, T: int) -> int:
        """How much of a row is looked at when T more tokens are in it."""
        return max(self.lengths) + T

    def check_room(self, B: int, T: int) -> None:
        assert len(self.lengths) == B, f"{B} rows for a cache of {len(self.lengths)}"
        if max(self.lengths) + T > self.size:
            raise UserError(
                f"there is no room for {T} more after {max(self.lengths)}: it holds {self.size} tokens in all",
                hint="shorten the prompt or ask for fewer new tokens",
            )

    def advance(self, T: int) -> None:
        self.lengths = [length + T for length in self.lengths]

    def extend(self, attention: nn.Module, k: Tensor, v: Tensor, ragged: Tensor | None) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, T, D) after what each row holds; views (B, K, S, D) of all that is held now."""
        B, K, T, _ = k.shape
        if attention not in self.held:
            with torch.inference_mode(False):  # so that a cache filled under inference_mode can be used outside it
                make = k.new_empty if B == 1 else k.new_zeros  # a row looks, masked, at what only longer ones have: no NaN may lie there
                self.held[attention] = (make(B, K, self.size, k.size(-1)), make(B, K, self.size, v.size(-1)))
        keys, values = self.held[attention]
        start, end = self.lengths[0], self.end(T)
        for side, more in ((keys, k), (values, v)):
            if ragged is None:
                side.narrow(2, start, T).copy_(more)
            else:
                place(side, more, ragged)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)


# ---- the loss --------------------------------------------------------------------------------------------------------


def summed_loss(head: Linear, x: Tensor, targets: Tensor, counts: Tensor | None = None) -> Tensor:
    """Cross-entropy of head(x) (N, C) against targets (N,), each counted so often (N,), summed; logits exist for a few rows at a time."""
    parameters = [p for p in head.parameters() if p.requires_grad]
    loss: Tensor = SummedLoss.apply(head, x, targets, counts, torch.is_grad_enabled(), *parameters)
    return loss


# ---- adapters --------------------------------------------------------------------------------------------------------
# One idea (He et al. 2022, arXiv:2110.04366): see what went into a host and what came out of it, and say what should
# come out instead. A fresh adapter says "the same", so training starts at the base.


def adapted(host: "Host", x: Tensor, y: Tensor) -> Tensor:
    adapter = host._modules["adapter"]  # the same as host.adapter, which nn.Module looks for in Python: 300 times for a token
    return y if adapter is None else cast(Tensor, adapter(host, x, y))


Host = Linear | Attention | MLP | Experts
SLOTS = ("adapter", "prompt", "inserted")  # the places where a module takes something that it was not made with


class Adapter(nn.Module):
    """What happens between a host's x (..., in) and y (..., out), which it may write over. Its parameters are fp32, cast to x's dtype where
    they are used."""

    def forward(self, host: Any, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def folded(self, host: Linear) -> tuple[Tensor, Tensor | None]:
        """The weight (out, in) and bias (out,), in at least fp32, with which the host alone computes the same. Left out where none do."""
        raise NotImplementedError


def wider(tensor: Tensor) -> Tensor:
    """In at least fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class LoRA(Adapter):
    """W + scale B A (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, host: Linear, r: int, alpha: float, dropout: float, use_rslora: bool = False) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, host.in_features, **beside(host)))  # (R, in)
        self.lora_B = nn.Parameter(torch.zeros(host.out_features, r, **beside(host)))  # (out, R)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT
        self.dropout = dropout
        self.scale = alpha / math.sqrt(r) if use_rslora else alpha / r  # arXiv:2312.03732, equation 7

    def matrices(self) -> tuple[Tensor, Tensor]:  # (R, in), (out, R)
        """A and B as they are used, and stored."""
        return self.lora_A, self.lora_B

    def forward(self, host: Linear, x: Tensor, y: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            x = F.dropout(x, self.dropout)
        return self.added(x, y, self.scale)

    def added(self, x: Tensor, y: Tensor, scale: float) -> Tensor:  # y + scale x A^T B^T
        a, b = (matrix.to(x.dtype) for matrix in self.matrices())
        if torch.is_grad_enabled():
            y = Added.apply(y.clone() if y._is_view() else y, x, a, b, scale)  # what is written over through a view costs another copy
            return y
        return add_product(y, linear(x, a, None), b, scale)

    def folded(self, host: Linear) -> tuple[Tensor, Tensor | None]:
        a, b = self.matrices()
        return torch.addmm(host.wide().to(b.dtype), b, a, alpha=self.scale), host.bias


class PiSSA(LoRA):
    """LoRA that starts at W's principal components (Meng et al. 2024, arXiv:2404.02948), and leaves W as it is.

    What is added is scale (B A - B0 A0), with B0 A0 the start: exactly zero at first, where the paper subtracts scale B0 A0 from
    W. The parameters are what was learnt, dA = A - A0 and dB = B - B0, so that
    B A - B0 A0 = dB A0 + B dA, a LoRA of twice the rank: that is how it computes and how it is stored.
    """

    start_A: Tensor  # (R, in)
    start_B: Tensor  # (out, R)

    def __init__(self, host: Linear, r: int, alpha: float, dropout: float, use_rslora: bool = False) -> None:
        super().__init__(host, r, alpha, dropout, use_rslora)
        with torch.no_grad():
            self.lora_A.zero_()
            u, s, v = torch.svd_lowrank(
                wider(host.wide()), q=min(r + 8, host.out_features, host.in_features), niter=8
            )  # (out, q), (q,), (in, q)
            size = (s[:r] / self.scale).sqrt()
            self.register_buffer("start_A", size[:, None] * v[:, :r].t(), persistent=False)
            self.register_buffer("start_B", u[:, :r] * size, persistent=False)

    def matrices(self) -> tuple[Tensor, Tensor]:  # (2 R, in), (out, 2 R)
        return torch.cat((self.start_A, self.lora_A)), torch.cat((self.lora_B, self.start_B + self.lora_B), 1)


class DoRA(LoRA):
    """LoRA turns each row of W, `magnitude` sets its length (Liu et al. 2024, arXiv:2402.09353)."""

    def __init__(self, host: Linear, r: int, alpha: float, dropout: float, use_rslora: bool = False) -> None:
        super().__init__(host, r, alpha, dropout, use_rslora)
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(host.wide().detach().to(self.lora_B.dtype), dim=1))  # (out,)

    def forward(self, host: Linear, x: Tensor, y: Tensor) -> Tensor:
        """gain (W + scale B A) x + bias; with dropout, as PEFT, everything but the plain W x sees the dropped-out x."""
        gain = self.gain(host)  # in fp32 also where y is bf16, in which 1.001 would be 1
        rest: Tensor | float = 0.0 if host.bias is None else host.bias
        base = y if host.bias is None else y - host.bias
        if self.training and self.dropout > 0:
            x = F.dropout(x, self.dropout)
            base = host.product(x)
            rest = y - base
        return (gain * self.added(x, base, self.scale) + rest).to(y.dtype)

    def gain(self, host: Linear) -> Tensor:  # (out,)
        with torch.no_grad():  # section 4.3: the norm is a constant to the gradient
            length = torch.linalg.vector_norm(super().folded(host)[0], dim=1)
        return self.magnitude / length

    def folded(self, host: Linear) -> tuple[Tensor, Tensor | None]:
        return self.gain(host)[:, None] * super().folded(host)[0], host.bias


class ScaleShift(Adapter):
    """scale (y + shift), both (out,) (LLaMA-Adapter V2: Gao et al. 2023, arXiv:2304.15010, equation 3)."""

    def __init__(self, host: Linear) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(host.out_features, **beside(host)))
        self.shift = nn.Parameter(torch.zeros(host.out_features, **beside(host)))

    def forward(self, host: Linear, x: Tensor, y: Tensor) -> Tensor:
        return (self.scale * (y + self.shift)).to(y.dtype)

    def folded(self, host: Linear) -> tuple[Tensor, Tensor | None]:
        bias = self.shift if host.bias is None else host.bias + self.shift
        return self.scale[:, None] * host.wide(), self.scale * bias


class Bottleneck(Adapter):
    """y + scale up(activation(down(.))) of y, in series with its host (Houlsby et al. 2019, arXiv:1902.00751, figure 2), or of x,
    in parallel (He et al. 2022, arXiv:2110.04366, table 1). The host is an attention, an MLP or experts; its x is the normed stream."""

    def __init__(self, host: Attention | MLP | Experts, width: int, scale: float, activation: str, parallel: bool) -> None:
        super().__init__()
        last = host.o_proj if isinstance(host, Attention) else host.gate if isinstance(host, Experts) else host.down_proj
        C = last.weight.size(1) if isinstance(last, Router) else last.out_features
        self.down, self.up = nn.Linear(C, width, **beside(host)), nn.Linear(width, C, **beside(host))
        for silent in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(silent)
        self.scale, self.parallel = scale, parallel
        self.activation: Any = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[activation]

    def forward(self, host: Attention | MLP | Experts, x: Tensor, y: Tensor) -> Tensor:
        into = x if self.parallel else y
        down, up = ((linear.weight.to(y.dtype), linear.bias.to(y.dtype)) for linear in (self.down, self.up))
        return torch.add(y, F.linear(self.activation(F.linear(into, *down)), *up), alpha=self.scale)


class Prompt(Adapter):
    """y + gate softmax(q K^T / sqrt(D)) V over P learnt positions (LLaMA-Adapter: Zhang et al. 2023, arXiv:2303.16199, equations
    4 to 6), in its attention, before o_proj: here x is q (B, H, T, D) and y (B, T, H, D).

    As in PEFT the gate is one number without a tanh, and the learnt positions are not rotated. Keys and values are made anew at
    every call: nothing is cached that training could change.
    """

    def __init__(self, host: Attention, length: int) -> None:
        super().__init__()
        self.adaption_prompt = nn.Parameter(torch.empty(1, length, host.o_proj.out_features, **beside(host)).normal_())  # (1, P, C)
        self.adaption_gate = nn.Parameter(torch.zeros(1, **beside(host)))

    def forward(self, host: Attention, q: Tensor, y: Tensor) -> Tensor:  # -> (B, T, H, D)
        _, *prompt = host.project(self.adaption_prompt.to(q.dtype))  # (1, P, K, D) twice
        k, v = (side.transpose(1, 2).expand(len(q), -1, -1, -1) for side in prompt)  # (B, K, P, D)
        seen = host.product(q, k, v).transpose(1, 2)  # (B, T, H, D)
        return y + self.adaption_gate.to(y.dtype) * seen


class Composed(Adapter):
    """Several adapters in one slot: y + sum of w_i (adapter_i(host, x, y) - y). DoRA goes alone, with weight 1."""

    def __init__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
        super().__init__()
        if len(adapters) != len(weights) or (any(isinstance(a, DoRA) for a in adapters) and list(weights) != [1.0]):
            raise UserError("DoRA cannot be weighted or combined with another adapter", hint="merge it into a base first")
        self.adapters = nn.ModuleList(adapters)
        self.weights = tuple(weights)

    def forward(self, host: Any, x: Tensor, y: Tensor) -> Tensor:
        total = y
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            total = torch.add(total, adapter(host, x, y.clone()) - y, alpha=weight)
        return total

    def folded(self, host: Linear) -> tuple[Tensor, Tensor | None]:
        base = wider(host.wide())
        total, bias = base, cast("Tensor | None", host.bias)
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            assert isinstance(adapter, Adapter)
            folded, shifted = adapter.folded(host)
            total = torch.add(total, folded - base, alpha=weight)
            if shifted is not None:
                own = torch.zeros_like(shifted) if host.bias is None else host.bias
                bias = torch.add(own if bias is None else bias, shifted - own, alpha=weight)
        return total, bias


# ---- inserted blocks ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def silent_copy(block: Block) -> Block:
    """LLaMA-Pro (Wu et al. 2024, arXiv:2401.02415, section 3.2): a copy that adds nothing yet, for what it writes to x is zero."""
    copied = copy.deepcopy(block)
    for module in copied.modules():  # what is on the block is not part of it
        for slot in SLOTS:
            if slot in module._modules:
                setattr(module, slot, None)
        if isinstance(module, Linear) and module.quantized is not None:  # it is to learn
            hold(module, None)
    for name, parameter in copied.named_parameters():
        if (value := block.silence(name)) is not None:
            parameter.fill_(value)
    return copied


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Weights to train from: normal with the config's deviation, smaller by sqrt(2 L) for what writes to the residual
    stream (Radford et al. 2019); gains 1, biases 0. The same numbers for a seed on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or (name.endswith("weight") and parameter.dim() == 1):
            parameter.fill_(1.0 - model.config.norm_offset)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            std = model.config.initializer_range / (depth if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")) else 1.0)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
