"""One tool trains LoRA and saves now and then; how long it stands still for that, and what lies on the disk. One JSON line on stdout.

python extensions/benchmarks/run_checkpoint.py litlora --base DIR --rows FILE --out DIR --steps 13 --every 3 --longest 128 --threads 2
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

BATCH = 4  # samples a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=("litlora", "litlora-waiting", "trainer", "litgpt"))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    found = {"trainer": trainer, "litgpt": litgpt}.get(args.tool, litlora)(args)
    step = max(args.out.glob("*-*"), key=lambda path: path.stat().st_mtime)
    found["files"] = {path.name: path.stat().st_size for path in sorted(step.iterdir())}
    print(json.dumps(found))


def litlora(args: argparse.Namespace) -> dict[str, Any]:
    """The command in this process; `litlora-waiting`: as where the copy would not fit into memory. An earlier litlora has no Saver."""
    import contextlib

    from litlora.__main__ import main as command
    from litlora.train import loop, run

    stood: list[float] = []

    def timed(function: Any) -> Any:
        def called(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                stood.append(time.perf_counter() - began)

        return called

    saver = getattr(loop, "Saver", None)
    if saver is not None:
        saver.save = timed(saver.save)
        if args.tool == "litlora-waiting":
            run.free_memory = lambda: 0
    else:
        run.Committer.commit = timed(run.Committer.commit)
    steps: list[float] = []
    train_step = loop.train_step

    def stepped(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = train_step(*given, **named)
        steps.append(time.perf_counter() - began)
        return result

    loop.train_step = stepped
    words = f"finetune lora {args.base} --data {args.rows} --out_dir {args.out} --train.max_steps {args.steps} --rows.on_error skip"
    words += f" --train.save_interval {args.every} --train.global_batch_size {BATCH} --train.max_seq_length {args.longest}"
    words += f" --eval.interval 0 --eval.fraction 0 --threads {args.threads} --accelerator cpu --precision fp32 --overwrite"
    with contextlib.redirect_stdout(sys.stderr):
        code = command(words.split())
    assert code == 0, code
    return {"steps": steps, "stood": stood[:-1]}  # the last commit has nothing to stand beside


def trainer(args: argparse.Namespace) -> dict[str, Any]:
    """transformers' Trainer with PEFT: the same base, rank, targets, rows and batch; its own defaults in saving."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from litlora.data.samples import load_data
    from litlora.prompts import Prompts
    from litlora.tokenizer import Tokenizer

    torch.set_num_threads(args.threads)
    data = load_data([str(args.rows)], Prompts(Tokenizer(args.base)), rows=skipping(), max_seq_length=args.longest, mask_prompt=True)
    rows = [{"input_ids": sample.tokens.tolist(), "labels": sample.targets.tolist()} for sample in data.train]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in batch)
        filled = {"input_ids": 0, "labels": -100}
        found = {name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in batch]) for name, value in filled.items()}
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch])
        return {**found, "attention_mask": mask}

    stood: list[float] = []
    steps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.append(time.perf_counter() - self.began)

    class Timed(Trainer):
        def _save_checkpoint(self, *given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            super()._save_checkpoint(*given, **named)
            stood.append(time.perf_counter() - began)

    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    settings = TrainingArguments(
        output_dir=str(args.out), max_steps=args.steps, save_steps=args.every, per_device_train_batch_size=BATCH, report_to=[],
        logging_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    Timed(model=model, args=settings, train_dataset=rows, data_collator=collate, callbacks=[Clock()]).train()
    return {"steps": steps, "stood": stood[:-1]}


def litgpt(args: argparse.Namespace) -> dict[str, Any]:
    """`litgpt finetune_lora` in this process: the same base (in its layout), rank, targets, rows and batch; its own way to save.

    A checkpoint is there when it has written the adapter and, after that, copied the base's small files and noted its settings.
    """
    from litgpt.__main__ import main as command
    from litgpt.finetune import lora as finetune

    stood: list[float] = []
    steps: list[float] = []
    began = {"save": 0.0, "step": 0.0}
    write, note, schedule = finetune.save_lora_checkpoint, finetune.save_prompt_style, finetune.get_lr_scheduler

    def save(*given: Any) -> None:
        began["save"] = time.perf_counter()
        write(*given)

    def end_of_save(*given: Any) -> None:
        note(*given)
        stood.append(time.perf_counter() - began["save"])

    class Rows(finetune.CycleIterator):  # type: ignore[misc]
        def __next__(self) -> Any:
            began["step"] = time.perf_counter()
            return super().__next__()

    def scheduler(*given: Any, **named: Any) -> Any:
        made = schedule(*given, **named)
        advance = made.step

        def stepped() -> None:
            advance()
            steps.append(time.perf_counter() - began["step"])

        made.step = stepped
        return made

    finetune.save_lora_checkpoint, finetune.save_prompt_style = save, end_of_save
    finetune.CycleIterator, finetune.get_lr_scheduler = Rows, scheduler
    finetune.merge_lora = lambda **_: None  # of its last checkpoint, when training is over: C4 has it
    words = f"finetune_lora {args.base} --out_dir {args.out} --precision 32-true --lora_r 16 --lora_alpha 32 --lora_dropout 0"
    words += "".join(f" --lora_{part} true" for part in ("query", "key", "value", "projection", "mlp"))
    words += f" --data JSON --data.json_path {args.rows} --data.val_split_fraction 0.1 --train.max_seq_length {args.longest}"
    words += f" --train.global_batch_size {BATCH} --train.micro_batch_size {BATCH} --train.max_steps {args.steps}"
    words += f" --train.save_interval {args.every} --train.lr_warmup_steps 1 --eval.interval {args.steps + 1}"
    words += " --eval.initial_validation false --eval.final_validation false"
    sys.argv = ["litgpt", *words.split()]
    command()
    return {"steps": steps, "stood": stood[:-1]}


def skipping() -> Any:
    from litlora.options import RowsOptions

    return RowsOptions(on_error="skip")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
