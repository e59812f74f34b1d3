"""transformers with PEFT, as its users train: padded batches, an attention mask, gradient accumulation, the loss over graded tokens.

A plain loop rather than transformers' Trainer: the same model code and the same loss function, without the Trainer's own
overhead, which is to the peer's advantage. `num_items_in_batch` is what the Trainer passes, so that the loss of a step is
a mean over its graded tokens however it is cut.
"""

from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from extensions.benchmarks.job import IGNORE, Job, Sample, graded_tokens, read_steps, serve_job
from extensions.benchmarks.measure import StepClock


def train(job: Job) -> dict[str, Any]:
    torch.set_num_threads(job.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.precision]
    base = AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype)
    model = PeftModel.from_pretrained(base, job.adapter, is_trainable=True)
    model.train()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=job.lr, betas=(job.beta1, job.beta2), eps=job.eps, weight_decay=job.weight_decay)
    clock, computed = StepClock(job.warmup, job.steps), 0
    steps = read_steps(job)
    clock.start()
    for samples in steps:
        graded, total = graded_tokens(samples), 0.0
        for start in range(0, len(samples), job.micro_batch):
            batch = padded(samples[start : start + job.micro_batch])
            computed += batch["input_ids"].numel()
            loss = model(**batch, num_items_in_batch=graded, use_cache=False).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(total)
    return clock.report() | {"tool": "peft", "computed_positions": computed, "trained": sum(p.numel() for p in learnt)}


def padded(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest: input_ids, attention_mask and labels, each (B, T)."""
    rows = [torch.tensor(sample.ids) for sample in samples]
    labels = [torch.tensor(sample.labels) for sample in samples]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=0),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_value=0),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }


if __name__ == "__main__":
    serve_job(train)
