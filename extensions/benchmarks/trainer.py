"""What the tools built on transformers' Trainer have in common: the clock as one of its callbacks, and the settings of the work."""

from typing import Any

import torch
from transformers import TrainerCallback

from extensions.benchmarks.job import Job, read_steps
from extensions.benchmarks.measure import StepClock


class Watch(TrainerCallback):
    """Ticks when the Trainer says a step's loss, which it does after every one: the sum of its micro-batches, each over the
    graded tokens of the whole step."""

    def __init__(self, job: Job) -> None:
        self.clock = StepClock(job.warmup, job.steps)
        self.computed = 0  # positions, padding included
        self.trained = 0  # parameters

    def on_train_begin(self, *_: Any, model: torch.nn.Module, **more: Any) -> None:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}, "only fp32 is compared"
        self.trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        model.get_input_embeddings().register_forward_pre_hook(self.count)  # type: ignore[operator]
        self.clock.start()

    def count(self, _: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        self.computed += given[0].numel()

    def on_log(self, *_: Any, logs: dict[str, float], **more: Any) -> None:
        if "loss" in logs:  # not the summary at the end
            self.clock.tick(logs["loss"])

    def report(self) -> dict[str, Any]:
        return self.clock.report() | {"computed_positions": self.computed, "trained": self.trained}


def rows_of(job: Job) -> list[dict[str, Any]]:
    """The samples as rows that are tokenized already, in the order of the steps."""
    return [
        {"input_ids": sample.ids, "attention_mask": [1] * len(sample.ids), "labels": sample.labels}
        for step in read_steps(job)
        for sample in step
    ]


def settings(job: Job, out_dir: str) -> dict[str, Any]:
    """The Trainer's own arguments."""
    assert job.precision == "fp32", "only fp32 is compared"
    batch = min(job.micro_batch, job.samples_per_step)
    assert job.samples_per_step % batch == 0, "the Trainer cuts a step into whole micro-batches"
    return {
        "output_dir": out_dir,
        "use_cpu": True,
        "max_steps": job.steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": job.samples_per_step // batch,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": job.beta1,
        "adam_beta2": job.beta2,
        "adam_epsilon": job.eps,
        "weight_decay": job.weight_decay,
        "max_grad_norm": 0.0,
        "bf16": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,  # there is no device to copy to
    }
