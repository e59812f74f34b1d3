"""One line of G1 to G4, in a process of its own: a tool trains, or answers, with a base of a true shape that is drawn on the device.

Every number of base and adapter comes from a generator that is seeded by the number's name, so that all tools have the same ones and
nothing is read or written. `python -m extensions.benchmarks.run_gpu JOB.json`; the last line of stdout is its JSON. It has not run on a
GPU yet.
"""

import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from extensions.benchmarks.artefacts import PROJECTIONS, sizes
from extensions.benchmarks.job import IGNORE, Sample, graded_tokens
from extensions.benchmarks.measure import versions


@dataclass(frozen=True, kw_only=True)
class Job:
    tool: str  # of TRAIN or DECODE
    config: dict[str, Any]  # of the base, as its config.json
    device: str
    samples: str = ""  # JSON, as in job.Job
    samples_per_step: int = 16
    micro_batch: int = 4  # samples computed at once, where a tool counts in samples
    micro_batch_tokens: int = 8192  # tokens computed at once, where it counts in tokens: litlora's default, 53 GB of the 8B shape
    warmup: int = 5
    timed: int = 20
    quantize: str = "none"
    recompute: bool = False  # activations, in the backward pass
    r: int = 16
    alpha: float = 32.0
    lr: float = 2e-4
    prompt_tokens: int = 64
    new_tokens: int = 128
    repeats: int = 5

    def steps(self) -> list[list[Sample]]:
        rows = [Sample(row["ids"], row["graded"]) for row in json.loads(Path(self.samples).read_text())["samples"]]
        return [rows[start : start + self.samples_per_step] for start in range(0, len(rows), self.samples_per_step)]


# ---- the same numbers for every tool ---------------------------------------------------------------------------------


def numbers(name: str, shape: Sequence[int], job: Job, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the base or of the adapter, by its Hugging Face or PEFT name."""
    generator = torch.Generator(job.device).manual_seed(zlib.crc32(name.encode()))
    made = torch.empty(shape, dtype=dtype, device=job.device)
    if name.endswith("norm.weight"):
        return made.fill_(1)
    if "lora_" in name:
        bound = 0.0 if "lora_B" in name else math.sqrt(1 / shape[-1])
        return made.uniform_(-bound, bound, generator=generator) if bound else made.zero_()
    return made.normal_(0, job.config["initializer_range"], generator=generator)


def computed_in(job: Job) -> torch.dtype:
    return torch.float32 if job.device == "cpu" else torch.bfloat16


@torch.no_grad()
def fill(model: nn.Module, job: Job, named: Callable[[str], str]) -> None:
    """Every parameter of an empty model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(numbers(named(name), parameter.shape, job, parameter.dtype))


# ---- the tools, each as its users have it ----------------------------------------------------------------------------


def litlora_base(job: Job) -> Any:
    """Its weights in few bits one by one, as `load_base` does."""
    from litlora.families import config_from_hf
    from litlora.model import GPT, Linear
    from litlora.quantized import hold, quantized

    with torch.device("meta"):
        model = GPT(config_from_hf(job.config, "config.json")).to(computed_in(job))
    for name, parameter in list(model.named_parameters()):
        module, _, attribute = name.rpartition(".")
        host, drawn = model.get_submodule(module), numbers(name, parameter.shape, job, computed_in(job))
        if job.quantize != "none" and isinstance(host, Linear) and module != "lm_head":
            hold(host, quantized(job.quantize, drawn))
        else:
            setattr(host, attribute, nn.Parameter(drawn))
    model.tie()
    return model


def train_litlora(job: Job) -> dict[str, Any]:
    """By the functions that `litlora finetune lora` trains with."""
    from extensions.benchmarks.run_litlora import as_litlora
    from litlora.methods import tuning_of
    from litlora.methods.attach import attach, trainable
    from litlora.options import FinetuneLoRA, LoRAOptions, TrainOptions
    from litlora.peft import to_peft_name
    from litlora.train.loop import share_of_window, train_step
    from litlora.train.optimizer import build_optimizer
    from litlora.train.run import launch

    fabric = launch(FinetuneLoRA(accelerator="cuda" if job.device == "cuda" else "cpu"))
    options = TrainOptions(lr=job.lr, weight_decay=0.0, lr_schedule="constant", max_norm=0, micro_batch_tokens=job.micro_batch_tokens)
    model = litlora_base(job)
    attach(model, tuning_of(LoRAOptions(r=job.r, alpha=job.alpha), model.config), seed=1)
    learnt = trainable(model)
    with torch.no_grad():
        for name, parameter in learnt.items():
            parameter.copy_(numbers(to_peft_name(name), parameter.shape, job, parameter.dtype))
    model.model.recompute = job.recompute
    wrapped, optimizer = fabric.setup(model, build_optimizer(learnt, options))
    wrapped.train()

    def step(samples: list[Sample]) -> float:
        lanes = share_of_window(fabric, wrapped, [as_litlora(sample) for sample in samples], options)
        return train_step(fabric, wrapped, optimizer, lanes, max_norm=options.max_norm).loss

    return timed_steps(job, step, learnt.values())


def train_peft(job: Job) -> dict[str, Any]:
    """transformers with PEFT: padded micro-batches in a plain loop, which spares it the Trainer's own overhead."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from extensions.benchmarks.run_peft import padded

    config = AutoConfig.for_model(**job.config)
    with torch.device(job.device):
        base = AutoModelForCausalLM.from_config(config, dtype=computed_in(job), attn_implementation="sdpa")
    targets = [name.split(".")[1] for name in PROJECTIONS]
    model = get_peft_model(base, LoraConfig(r=job.r, lora_alpha=job.alpha, target_modules=targets, task_type="CAUSAL_LM"))
    fill(model, job, lambda name: name.replace(".default", "") if "lora_" in name else name.removeprefix(PEFT).replace(".base_layer", ""))
    base.tie_weights()
    model.train()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=job.lr, weight_decay=0.0, fused=True)

    def step(samples: list[Sample]) -> float:
        graded, total = graded_tokens(samples), torch.zeros((), device=job.device)
        for start in range(0, len(samples), job.micro_batch):
            batch = {name: tensor.to(job.device) for name, tensor in padded(samples[start : start + job.micro_batch]).items()}
            loss = model(**batch, num_items_in_batch=graded, use_cache=False).loss
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return timed_steps(job, step, learnt)


PEFT = "base_model.model."


def train_litgpt(job: Job) -> dict[str, Any]:
    """litgpt's model, collate function and loss in a plain loop, a sample at a time as its defaults say."""
    from litgpt.data.base import get_sft_collate_fn
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    hf = job.config
    on = dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True)
    config = Config(
        name="benchmark", hf_config={}, block_size=hf["max_position_embeddings"], vocab_size=hf["vocab_size"],
        padded_vocab_size=hf["vocab_size"], n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"], n_embd=hf["hidden_size"],
        n_query_groups=hf["num_key_value_heads"], rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP", intermediate_size=hf["intermediate_size"], rope_base=int(hf["rope_theta"]), norm_eps=hf["rms_norm_eps"],
        lora_r=job.r, lora_alpha=job.alpha, lora_dropout=0.0, lora_head=False, **on,
    )  # fmt: skip
    with torch.device(job.device):
        model = GPT(config).to(computed_in(job))
    mark_only_lora_as_trainable(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = of_litgpt(name, parameter.shape, job)
            parameter.copy_(torch.cat([numbers(ours, shape, job, parameter.dtype) for ours, shape in parts]))
    model.train()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=job.lr, weight_decay=0.0)
    collate = get_sft_collate_fn(pad_id=0, ignore_index=IGNORE)

    def step(samples: list[Sample]) -> float:
        graded, total = graded_tokens(samples), 0.0
        for sample in samples:
            counts = {"raw": len(sample.ids), "raw_plus_prompt_template": len(sample.ids)}
            batch = collate([{"input_ids": torch.tensor(sample.ids), "labels": torch.tensor(sample.labels), "token_counts": counts}])
            ids, targets = batch["input_ids"].to(job.device), batch["labels"].to(job.device)
            logits = model(ids, lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            loss = chunked_cross_entropy(logits, targets[..., 1:])
            (loss * (sum(sample.graded) / graded)).backward()
            total += loss.item() * sum(sample.graded) / graded
        optimizer.step()
        optimizer.zero_grad()
        return total

    return timed_steps(job, step, learnt)


OF_LITGPT = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn.proj": ("self_attn.o_proj",),
    "mlp.fc_1": ("mlp.gate_proj",), "mlp.fc_2": ("mlp.up_proj",), "mlp.proj": ("mlp.down_proj",),
}  # fmt: skip


def of_litgpt(name: str, shape: Sequence[int], job: Job) -> list[tuple[str, Sequence[int]]]:
    """Our names, and shapes, of what is stacked in one of litgpt's parameters."""
    if ".h." not in name or "norm" in name:
        embedding = "model.embed_tokens.weight"
        head = embedding if job.config["tie_word_embeddings"] else "lm_head.weight"
        known = {"lm_head.linear.weight": head, "transformer.wte.weight": embedding}
        return [(known.get(name, "norm.weight"), shape)]
    _, _, layer, part, which, *rest = name.split(".")
    width, stacked = sizes(job.config), OF_LITGPT[f"{part}.{which}"]
    kind = rest[-1] if rest[-1].startswith("lora_") else ""
    prefix, suffix = (PEFT, f".{kind}.weight") if kind else ("", ".weight")
    rows = [job.r if kind == "lora_A" else width[PROJECTIONS[ours][1]] for ours in stacked]
    return [(f"{prefix}model.layers.{layer}.{ours}{suffix}", (n, shape[-1])) for ours, n in zip(stacked, rows, strict=True)]


def decode_litlora(job: Job) -> dict[str, Any]:
    """By the Conversation that generate and chat have; the gate compares its steps with plain ones, fed the same tokens."""
    from litlora.generation import Conversation
    from litlora.model import KVCache
    from litlora.options import SamplingOptions

    model = litlora_base(job).requires_grad_(False).eval()
    prompt = prompt_of(job)
    tokenizer: Any = Silent(job.config["vocab_size"])
    sampling = SamplingOptions(temperature=0.0, max_new_tokens=job.new_tokens)

    def answer() -> tuple[list[int], float]:
        made = Conversation(model, tokenizer, ()).ask(prompt, sampling)
        made.all()
        return made.ids, made.tokens_per_second

    found = timed_answers(job, answer)
    conversation, cache = Conversation(model, tokenizer, ()), KVCache(len(prompt) + 16)
    with torch.inference_mode():
        first = conversation.prefill(prompt)
        model(torch.tensor([prompt], device=job.device), cache=cache)
        apart = 0.0
        for token in found["tokens"][:8]:
            ours = conversation.step(torch.tensor(token, device=job.device), token)[0]
            plain = model(torch.tensor([[token]], device=job.device), cache=cache)[0, 0]
            apart = max(apart, float((ours - plain).float().norm() / plain.float().norm()))
    return found | {"logits": first[:64].float().tolist(), "step_apart": apart, "graph": bool(conversation.replayed)}


class Silent:
    """A tokenizer for answers that nobody reads."""

    def __init__(self, size: int) -> None:
        self.size = size

    def stream(self) -> "Silent":
        return self

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def decode_transformers(job: Job) -> dict[str, Any]:
    """`generate`, as it is by default."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**(job.config | {"eos_token_id": None, "bos_token_id": None}))
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(config, dtype=computed_in(job)).eval()
    fill(model, job, lambda name: name)
    model.tie_weights()
    ids = torch.tensor([prompt_of(job)], device=job.device)

    def generate(count: int) -> tuple[list[int], float]:
        start = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        tokens: list[int] = found[0, ids.size(1) :].tolist()
        return tokens, time.perf_counter() - start

    def answer() -> tuple[list[int], float]:
        (_, first), (tokens, whole) = generate(1), generate(job.new_tokens)
        return tokens, (job.new_tokens - 1) / (whole - first)

    with torch.inference_mode():
        logits = model(ids).logits[0, -1, :64].float().tolist()
    return timed_answers(job, answer) | {"logits": logits}


# ---- measuring -------------------------------------------------------------------------------------------------------


def timed_steps(job: Job, step: Callable[[list[Sample]], float], learnt: Any) -> dict[str, Any]:
    """Each step from the end of the one before it; `step` returns its loss, a number, so the device is done with what it depends on."""
    losses, seconds, steps = [], [], job.steps()[: job.warmup + job.timed]
    last = clock(job)
    for samples in steps:
        losses.append(step(samples))
        last, before = clock(job), last
        seconds.append(last - before)
    timed = steps[job.warmup :]
    return {
        "losses": losses,
        "step_seconds": seconds[job.warmup :],
        "real_tokens": [sum(len(sample.ids) for sample in samples) for samples in timed],
        "graded_tokens": [graded_tokens(samples) for samples in timed],
        "trained": sum(parameter.numel() for parameter in learnt),
    }


def timed_answers(job: Job, answer: Callable[[], tuple[list[int], float]]) -> dict[str, Any]:
    answer()
    rounds = [answer() for _ in range(job.repeats)]
    return {
        "tokens": rounds[0][0],
        "tokens_per_second": [speed for _, speed in rounds],
        "same": len({tuple(ids) for ids, _ in rounds}) == 1,
    }


def clock(job: Job) -> float:
    if job.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def prompt_of(job: Job) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    drawn: list[int] = torch.randint(1, job.config["vocab_size"], (job.prompt_tokens,), generator=generator).tolist()
    return drawn


def limits(job: Job) -> dict[str, float]:
    """What the device reaches now: operations a second of plain products, bytes a second of a copy."""
    size, dtype = (8192, torch.bfloat16) if job.device == "cuda" else (512, torch.float32)
    a, b = (torch.ones(size, size, dtype=dtype, device=job.device) for _ in range(2))
    found = {}
    for name, work, amount in (("flops", lambda: a @ b, 2 * size**3), ("bytes", lambda: b.copy_(a), 2 * a.nbytes)):
        work()
        start = clock(job)
        for _ in range(20):
            work()
        found[name] = 20 * amount / (clock(job) - start)
    return found


TRAIN = {"litlora": train_litlora, "peft": train_peft, "litgpt": train_litgpt}
DECODE = {"litlora": decode_litlora, "transformers": decode_transformers}


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    before = limits(job)
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = (TRAIN if job.samples else DECODE)[job.tool](job)
    peak = torch.cuda.max_memory_allocated() / 1e6 if job.device == "cuda" else None
    name = torch.cuda.get_device_name() if job.device == "cuda" else "cpu"
    print(json.dumps(found | {"limits": before, "peak_device_mb": peak, "device": name, "versions": versions()}))


if __name__ == "__main__":
    main()
