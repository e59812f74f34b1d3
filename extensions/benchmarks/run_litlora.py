"""litlora itself, by the functions that `litlora finetune lora` trains with: `launch`, `share_of_window` and `train_step`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from extensions.benchmarks.job import IGNORE, Job, read_steps, serve_job
from extensions.benchmarks.job import Sample as Row
from extensions.benchmarks.measure import StepClock
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.weights import load_base
from litlora.data.samples import Sample
from litlora.methods import tuning_of
from litlora.methods.attach import attach, trainable
from litlora.options import FinetuneLoRA, LoRAOptions, TrainOptions
from litlora.peft import to_peft_name
from litlora.train.loop import share_of_window, train_step
from litlora.train.optimizer import build_optimizer
from litlora.train.run import launch


def train(job: Job) -> dict[str, Any]:
    fabric = launch(FinetuneLoRA(accelerator="cpu", threads=job.threads))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.precision]
    options = TrainOptions(
        lr=job.lr, beta1=job.beta1, beta2=job.beta2, weight_decay=job.weight_decay, lr_schedule="constant", max_norm=0,
        share_prefix=job.share_prefix,
    )  # fmt: skip
    assert job.eps == 1e-8, "litlora's AdamW keeps torch's eps"
    model = load_base(resolve(job.base), dtype, quantize=job.quantize, looked_up=True)
    attach(model, tuning_of(LoRAOptions(r=job.r, alpha=job.alpha), model.config), seed=1)
    learnt = trainable(model)
    load_adapter(learnt, Path(job.adapter))
    optimizer = build_optimizer(learnt, options)
    wrapped, prepared = fabric.setup(model, optimizer)
    wrapped.train()
    clock, computed = StepClock(job.warmup, job.steps), 0
    steps = [[as_litlora(row) for row in step] for step in read_steps(job)]
    clock.start()
    for samples in steps:
        lanes = share_of_window(fabric, wrapped, samples, options)
        computed += sum(batch.tokens.numel() for batches in lanes for batch in batches)
        clock.tick(train_step(fabric, wrapped, prepared, lanes, max_norm=options.max_norm).loss)
    return clock.report() | {"tool": "litlora", "computed_positions": computed, "trained": sum(p.numel() for p in learnt.values())}


def as_litlora(row: Row) -> Sample:
    ids = np.asarray(row.ids, dtype=np.int32)
    targets = np.where(np.asarray(row.graded[1:]), ids[1:], IGNORE).astype(np.int32)
    return Sample(tokens=ids[:-1], targets=targets, where="benchmark")


def load_adapter(learnt: dict[str, torch.nn.Parameter], directory: Path) -> None:
    """Copy the common adapter into ours; every tensor on both sides is used."""
    tensors = load_file(directory / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in learnt.items():
            parameter.copy_(tensors.pop(to_peft_name(name)))
    assert not tensors, f"not used: {list(tensors)}"


if __name__ == "__main__":
    serve_job(train)
