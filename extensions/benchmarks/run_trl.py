"""TRL's SFTTrainer as its users train with it, on samples that are tokenized already.

Its defaults but for what costs time and gains nothing here: bf16 and computing activations again (gradient checkpointing) are off.
Order and learning rate are everybody's.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from extensions.benchmarks.job import Job, serve_job
from extensions.benchmarks.trainer import Watch, rows_of, settings


def train(job: Job) -> dict[str, Any]:
    torch.set_num_threads(job.threads)
    base = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32)
    watch = Watch(job)
    with tempfile.TemporaryDirectory() as out_dir:
        trainer = SFTTrainer(
            model=PeftModel.from_pretrained(base, job.adapter, is_trainable=True),
            args=SFTConfig(
                **settings(job, out_dir),
                train_sampling_strategy="sequential",
                gradient_checkpointing=False,
                max_length=None,  # samples are cut already
                padding_free=job.padding_free,
            ),
            train_dataset=Dataset.from_list(rows_of(job)),
            processing_class=AutoTokenizer.from_pretrained(job.base),
            callbacks=[watch],
        )
        trainer.train()
    return watch.report() | {"tool": "trl"}


if __name__ == "__main__":
    serve_job(train)
