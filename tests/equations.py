"""A model and everything that fine-tuning adds to it, written down once more from the papers' equations in plain autograd.

An oracle for model.py that shares nothing with it but the table of rotary angles, which test_model.py and test_parity.py hold.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from litlora.config import Config
from litlora.methods.tuning import BottleneckSlot, LoRASlot, PromptSlot, ScaleShiftSlot, Tuning
from litlora.model import rotary_table


class Plain:
    """A model of these `weights`, by their names.

    `seen(name, x, y)` says what leaves a Linear, an attention, an MLP or a layer instead of y, into which x went; under the name
    `...self_attn.prompt` x is the rotated q and y what leaves attention before o_proj.
    """

    def __init__(self, config: Config, weights: Mapping[str, Tensor], seen: Callable[..., Tensor] = lambda name, x, y: y) -> None:
        self.config, self.weights, self.seen = config, weights, seen

    def logits(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.config.num_hidden_layers):
            x = self.seen(f"model.layers.{layer}", x, self.block(x, f"model.layers.{layer}", layer))
        return self.linear("lm_head", self.norm("model.norm", x))

    def block(self, x: Tensor, prefix: str, layer: int) -> Tensor:  # (B, T, C)
        normed = self.norm(f"{prefix}.input_layernorm", x)
        x = x + self.seen(f"{prefix}.self_attn", normed, self.attention(normed, f"{prefix}.self_attn", layer))
        normed = self.norm(f"{prefix}.post_attention_layernorm", x)
        gate, up = self.linear(f"{prefix}.mlp.gate_proj", normed), self.linear(f"{prefix}.mlp.up_proj", normed)
        return x + self.seen(f"{prefix}.mlp", normed, self.linear(f"{prefix}.mlp.down_proj", gate * gate.sigmoid() * up))

    def attention(self, x: Tensor, prefix: str, layer: int) -> Tensor:  # (B, T, C)
        q, k, v = (self.heads(f"{prefix}.{name}_proj", x) for name in "qkv")
        q, k = (self.turned(self.head_norm(f"{prefix}.{name}_norm", side)) for name, side in (("q", q), ("k", k)))
        at, window = torch.arange(x.size(1)), self.config.window(layer) or x.size(1)
        hidden = (at[None, :] > at[:, None]) | (at[None, :] <= at[:, None] - window)
        y = self.look(q, k, v, hidden)  # (B, H, T, D)
        y = self.seen(f"{prefix}.prompt", q, y.transpose(1, 2))
        return self.linear(f"{prefix}.o_proj", y.flatten(2))

    def look(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:  # -> (B, H, T, D)
        k, v = (side.repeat_interleave(q.size(1) // side.size(1), 1) for side in (k, v))
        scores = (q @ k.transpose(2, 3) / math.sqrt(self.config.head_dim)).masked_fill(hidden, -math.inf)
        return scores.softmax(-1) @ v

    def heads(self, name: str, x: Tensor) -> Tensor:  # (B, T, C) -> (B, heads, T, D)
        return self.linear(name, x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def turned(self, x: Tensor) -> Tensor:  # (B, heads, T, D)
        cos, sin = rotary_table(torch.arange(x.size(2)), self.config.rope, self.config.head_dim)
        left, right = x.chunk(2, -1)
        return torch.cat((left, right), -1) * cos + torch.cat((right, left), -1) * sin  # the first half of sin is negated

    def linear(self, name: str, x: Tensor) -> Tensor:
        own = f"{name}.weight" if f"{name}.weight" in self.weights else "model.embed_tokens.weight"  # a tied head
        y = x @ self.weights[own].T + self.weights.get(f"{name}.bias", 0.0)
        return self.seen(name, x, y)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.weights[f"{name}.weight"]

    def head_norm(self, name: str, x: Tensor) -> Tensor:
        return self.norm(name, x) if self.config.qk_norm else x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: z.clamp_min(0),
    "silu": lambda z: z * z.sigmoid(),
    "gelu": lambda z: z * (1 + (z / math.sqrt(2)).erf()) / 2,
}


def spoken(tuning: Tuning, config: Config, values: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """What a tuning makes of y, for `Plain`, from the papers' equations in plain autograd.

    `values`: the model's parameters by name, and PiSSA's start_A and start_B.
    """

    def own(name: str, x: Tensor, y: Tensor) -> Tensor:
        slot = name if name.endswith(".prompt") else f"{name}.adapter"
        kind, get = tuning.slots.get(slot), lambda part: values[f"{slot}.{part}"]
        if isinstance(kind, LoRASlot):
            scale = kind.alpha / (math.sqrt(kind.r) if kind.use_rslora else kind.r)
            a, b = get("lora_A"), get("lora_B")
            if kind.init == "pissa":  # scale (B A - B0 A0), where dA and dB are what learns
                a0, b0 = get("start_A"), get("start_B")
                return y + scale * (x @ ((b0 + b) @ (a0 + a) - b0 @ a0).T)
            if not kind.use_dora:
                return y + scale * (x @ (b @ a).T)
            turned = values[f"{name}.weight"] + scale * b @ a
            length = turned.detach().norm(dim=1)  # section 4.3: a constant to the gradient
            return x @ (get("magnitude")[:, None] / length[:, None] * turned).T + values.get(f"{name}.bias", 0.0)
        if isinstance(kind, ScaleShiftSlot):
            return get("scale") * (y + get("shift"))
        if isinstance(kind, BottleneckSlot):
            into = x if kind.parallel else y
            inner = ACTIVATIONS[kind.activation](into @ get("down.weight").T + get("down.bias"))
            return y + kind.scale * (inner @ get("up.weight").T + get("up.bias"))
        if isinstance(kind, PromptSlot):
            plain = Plain(config, values)
            prompt, host = get("adaption_prompt"), slot.removesuffix(".prompt")
            k, v = plain.head_norm(f"{host}.k_norm", plain.heads(f"{host}.k_proj", prompt)), plain.heads(f"{host}.v_proj", prompt)
            return y + get("adaption_gate") * plain.look(x, k, v, torch.tensor(False)).transpose(1, 2)
        if name.startswith("model.layers.") and name.count(".") == 2 and int(name.split(".")[2]) in tuning.inserted:
            return Plain(config, values).block(y, f"{name}.inserted", int(name.split(".")[2]))
        return y

    return own
