"""litgpt's own model, collate function and training loop (`litgpt.finetune.lora.fit`), on our samples.

Three things are ours, none of which costs it time: the learning rate is constant; the scheduler's step is the clock; and the
loss of a micro-batch is weighted by its graded tokens, where litgpt takes the mean of micro-batch means (another
loss, whose update depends on how a batch is cut). So its losses can be compared with everybody's. Its default logger is left out.

`python -m extensions.benchmarks.run_litgpt JOB.json`, or `... run_litgpt --convert BASE LITGPT_BASE`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune import lora as litgpt_lora
from litgpt.lora import GPT, mark_only_lora_as_trainable
from litgpt.lora import Config as LoRAConfig
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy, load_checkpoint, save_config
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from extensions.benchmarks.job import IGNORE, Job, Sample, graded_tokens, read_steps, serve_job
from extensions.benchmarks.measure import StepClock

PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16-mixed": "bf16-mixed", "bf16": "bf16-true"}


def train(job: Job) -> dict[str, Any]:
    assert job.samples_per_step % job.micro_batch == 0, "litgpt cuts a step into whole micro-batches"
    torch.set_num_threads(job.threads)
    if job.precision != "fp32":
        torch.set_float32_matmul_precision("high")  # what its command line sets; left out where losses are compared to 1e-5
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=PRECISION[job.precision])
    on = dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True)
    config = LoRAConfig.from_file(
        Path(job.litgpt_base) / "model_config.yaml", lora_r=job.r, lora_alpha=job.alpha, lora_dropout=0.0, lora_head=False, **on
    )
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    betas = (job.beta1, job.beta2)
    optimizer: Any = fabric.setup_optimizers(
        torch.optim.AdamW(model.parameters(), lr=job.lr, betas=betas, eps=job.eps, weight_decay=job.weight_decay)
    )
    # as litgpt's own fine-tuning loads it: the file has no LoRA; the gate's losses would tell of a weight that was not loaded
    load_checkpoint(fabric, model, Path(job.litgpt_base) / "lit_model.pth", strict=False)
    load_adapter(dict(model.named_parameters()), Path(job.adapter))
    clock = fit(job, fabric, model, optimizer)
    computed = sum(padded_positions(step, job.micro_batch) for step in read_steps(job))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return clock.report() | {"tool": "litgpt", "computed_positions": computed, "trained": trained}


def fit(job: Job, fabric: L.Fabric, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> StepClock:
    """litgpt's fit, with the clock in its scheduler and its loss weighted by graded tokens."""
    clock, steps = StepClock(job.warmup, job.steps), read_steps(job)
    parts: list[torch.Tensor] = []  # of this step's loss

    def token_weighted(logits: Any, targets: torch.Tensor, **options: Any) -> torch.Tensor:
        loss = chunked_cross_entropy(logits, targets, **options)
        if not torch.is_grad_enabled():
            return loss  # its sanity check before training
        weight = (targets != IGNORE).sum() / graded_tokens(steps[len(clock.seconds)])
        parts.append((loss * weight).detach())
        return loss * weight * (job.samples_per_step // job.micro_batch)  # which fit divides by again

    class Clock(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[Any]:
            return [job.lr]

        def step(self, epoch: int | None = None) -> None:
            super().step()
            if parts:  # not the call that every scheduler makes when it is built
                clock.tick(sum(part.item() for part in parts))
                parts.clear()

    litgpt_lora.chunked_cross_entropy = token_weighted
    flat: Any = [as_litgpt(sample) for step in steps for sample in step]
    collate = get_sft_collate_fn(pad_id=0, ignore_index=IGNORE)
    rows: Any = DataLoader(flat, batch_size=job.micro_batch, shuffle=False, collate_fn=collate)
    least: Any = [min(flat, key=lambda row: len(row["input_ids"]))]
    shortest: Any = DataLoader(least, batch_size=1, collate_fn=collate)
    rows, shortest = fabric.setup_dataloaders(rows, shortest)
    options = TrainArgs(
        save_interval=None,
        log_interval=1,
        global_batch_size=job.samples_per_step,
        micro_batch_size=job.micro_batch,
        epochs=2,
        max_steps=job.steps,
    )
    scheduler = Clock(optimizer)
    clock.start()
    litgpt_lora.fit(
        fabric=fabric,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=rows,
        val_dataloader=shortest,
        devices=1,
        checkpoint_dir=Path(job.litgpt_base),
        out_dir=Path(job.litgpt_base) / "never_written",
        train=options,
        eval=EvalArgs(interval=10**9, max_iters=1),
        data=None,
    )
    return clock


def as_litgpt(sample: Sample) -> dict[str, Any]:
    counts = {"raw": len(sample.ids), "raw_plus_prompt_template": len(sample.ids)}
    return {"input_ids": torch.tensor(sample.ids), "labels": torch.tensor(sample.labels), "token_counts": counts}


def padded_positions(samples: list[Sample], micro_batch: int) -> int:
    cuts = [samples[start : start + micro_batch] for start in range(0, len(samples), micro_batch)]
    return sum(len(cut) * max(len(sample.ids) for sample in cut) for cut in cuts)


def load_adapter(parameters: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Copy a PEFT adapter into litgpt's parameters: its q, k and v share one A (3R, C) and one B (out, R), stacked in that order."""
    tensors = load_file(directory / "adapter_model.safetensors")
    layers = 1 + max(int(name.split(".")[4]) for name in tensors)
    theirs = {"attn.qkv": ["q", "k", "v"], "attn.proj": ["o"], "mlp.fc_1": ["gate"], "mlp.fc_2": ["up"], "mlp.proj": ["down"]}
    for layer in range(layers):
        for name, ours in theirs.items():
            part = "self_attn" if name.startswith("attn") else "mlp"
            for letter in "AB":
                stack = [tensors.pop(f"base_model.model.model.layers.{layer}.{part}.{our}_proj.lora_{letter}.weight") for our in ours]
                target = next(p for key, p in parameters.items() if key.endswith(f"transformer.h.{layer}.{name}.lora_{letter}"))
                with torch.no_grad():
                    assert target.shape == torch.cat(stack).shape, f"{name}: {tuple(target.shape)}"
                    target.copy_(torch.cat(stack))
    assert not tensors, f"not used: {list(tensors)}"


def convert(base: Path, target: Path) -> None:
    """litgpt's layout of a Hugging Face Llama, by litgpt's own converter (called below its front door, which knows no random shapes)."""
    hf = json.loads((base / "config.json").read_text())
    config = Config(
        name="SmolLM2-135M" if hf["hidden_size"] == 576 else "benchmark",
        hf_config={},
        block_size=hf["max_position_embeddings"],
        vocab_size=hf["vocab_size"],
        padded_vocab_size=hf["vocab_size"],
        n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"],
        n_embd=hf["hidden_size"],
        n_query_groups=hf["num_key_value_heads"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=hf["intermediate_size"],
        rope_base=int(hf["rope_theta"]),
        norm_eps=hf["rms_norm_eps"],
    )
    target.mkdir(parents=True, exist_ok=True)
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(base / "model.safetensors"))
    torch.save(weights, target / "lit_model.pth")
    save_config(config, target)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        (target / name).write_bytes((base / name).read_bytes())


if __name__ == "__main__":
    if sys.argv[1] == "--convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve_job(train)
