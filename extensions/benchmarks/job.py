"""What a training runner is told: one file, the same for every tool but for how it cuts and rounds."""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IGNORE = -100  # a label that is not graded


@dataclass(frozen=True, kw_only=True)
class Job:
    base: str  # a Hugging Face directory
    litgpt_base: str  # the same weights in litgpt's own layout
    adapter: str  # a PEFT directory: the adapter that every tool starts from
    samples: str  # JSON: {"samples": [{"ids": [...], "graded": [...]}, ...]}, in the order of the steps
    samples_per_step: int
    warmup: int  # steps
    timed: int  # steps
    threads: int
    micro_batch: int = 4  # samples computed at once, where a tool counts in samples
    padding_free: bool = False  # trl's setting of that name: a micro-batch's samples in one row, one after the other
    share_prefix: bool = True  # litlora's --train.share_prefix
    quantize: str = "none"  # litlora's --quantize
    precision: str = "fp32"  # fp32 | bf16-mixed | bf16
    lr: float = 2e-4  # constant
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    r: int = 16
    alpha: float = 32.0

    @property
    def steps(self) -> int:
        return self.warmup + self.timed


@dataclass(frozen=True)
class Sample:
    ids: list[int]
    graded: list[bool]  # one per id: is this token asked of the model? (never the first: nothing stands before it)

    @property
    def labels(self) -> list[int]:
        return [token if graded else IGNORE for token, graded in zip(self.ids, self.graded, strict=True)]


def read_steps(job: Job) -> list[list[Sample]]:
    """The samples of each optimizer step."""
    samples = [Sample(row["ids"], row["graded"]) for row in json.loads(Path(job.samples).read_text())["samples"]]
    assert len(samples) >= job.steps * job.samples_per_step, "the samples file is too short for these steps"
    return [samples[step * job.samples_per_step : (step + 1) * job.samples_per_step] for step in range(job.steps)]


def graded_tokens(samples: list[Sample]) -> int:
    return sum(sum(sample.graded) for sample in samples)


def serve_job(train: Callable[[Job], dict[str, Any]]) -> None:
    """The front door of a runner: `python -m extensions.benchmarks.run_TOOL JOB.json`; the last line of stdout is its JSON."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    result = train(job)
    timed = read_steps(job)[job.warmup :]
    counts = {
        "real_tokens": [sum(len(sample.ids) for sample in step) for step in timed],
        "graded_tokens": [graded_tokens(step) for step in timed],
    }
    print(json.dumps(result | counts | {"threads": job.threads}))


def write_job(job: Job, path: Path) -> Path:
    path.write_text(json.dumps(dataclasses.asdict(job)))
    return path
