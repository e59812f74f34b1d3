"""LLaMA-Factory as `llamafactory-cli train` runs it (`run_exp`, stage sft), on a dataset that is tokenized already (`tokenized_path`).

Its defaults but for what costs time and gains nothing here: computing activations again (gradient checkpointing) is off.
Order and learning rate are everybody's.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from llamafactory.train.tuner import run_exp

from extensions.benchmarks.job import Job, serve_job
from extensions.benchmarks.trainer import Watch, rows_of, settings


def train(job: Job) -> dict[str, Any]:
    torch.set_num_threads(job.threads)
    watch = Watch(job)
    with tempfile.TemporaryDirectory() as place:
        tokenized = Path(place) / "tokenized"
        DatasetDict({"train": Dataset.from_list(rows_of(job))}).save_to_disk(tokenized)
        run_exp(
            settings(job, str(Path(place) / "out"))
            | {
                "stage": "sft",
                "do_train": True,
                "model_name_or_path": job.base,
                "adapter_name_or_path": job.adapter,
                "finetuning_type": "lora",
                "template": "empty",  # no text is left to be put in one
                "dataset": "tokenized",  # must be named, and is not read beside tokenized_path
                "tokenized_path": str(tokenized),
                "disable_shuffling": True,
                "disable_gradient_checkpointing": True,
            },
            callbacks=[watch],
        )
    return watch.report() | {"tool": "llamafactory"}


if __name__ == "__main__":
    serve_job(train)
