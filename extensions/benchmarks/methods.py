"""Every method on the same base and rows, by the real command: time per step, memory, loss, and what a step holds, against LoRA.

    python -m extensions.benchmarks.methods --base DIR --data ROWS.json --steps 200

Each line is a process of its own, in turn with the others. Seconds are the median of the steps after the first five; memory is
the process's peak; losses are validation losses on the same held-out rows, before the first step and after the last.
"""

import argparse
import csv
import shutil
import sys
from pathlib import Path
from typing import Any

from extensions.benchmarks.measure import (
    default_threads,
    default_work_dir,
    machine,
    median,
    run,
    table,
    tail,
    thread_env,
    versions,
    write_results,
)

LINES = {  # name -> the words after `litlora finetune`
    "lora": "lora",
    "lora, dora": "lora --lora.use_dora true",
    "lora, rslora": "lora --lora.use_rslora true",
    "lora, pissa": "lora --lora.init pissa",
    "lora, orthogonal": "lora --lora.init orthogonal",
    "lora+, ratio 16": "lora --lora.lr_ratio 16",
    "lora, embeddings": "lora --lora.modules_to_save embed_tokens",
    "adapter, prompt": "adapter --adapter.kind prompt",
    "adapter, scale_shift": "adapter --adapter.kind scale_shift",
    "adapter, series": "adapter --adapter.kind series",
    "adapter, parallel": "adapter --adapter.kind parallel",
    "pro": "pro",
    "freeze": "freeze",
    "full": "full",
}
SKIPPED = 5  # steps that are not timed
MB = 10**6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a Hugging Face directory; left out: the demo base and its rows")
    parser.add_argument("--data", help="rows, as for training")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--options", default="", help="words that every line gets, for example '--rows.on_error skip'")
    parser.add_argument("--lr", nargs="*", default=[], metavar="LINE=RATE", help="other rates than the methods' own")
    parser.add_argument("--work", type=Path, default=default_work_dir() / "methods")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rates = dict(word.rsplit("=", 1) for word in args.lr)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.lines}
    for _ in range(args.repeats):
        for name in args.lines:
            result = measured(name, args, rates)
            found[name].append(result)
            said = result.get("error") or "{seconds:.3f} s a step, {memory_mb:.0f} MB".format(**result)
            print(f"{name}: {said}", file=sys.stderr)
    failed = [name for name, results in found.items() if any("error" in result for result in results)]
    text = f"# Every method, {args.base or 'the demo base'}, {args.steps} steps of {args.batch}\n\n{shown(found)}"
    about = {"machine": machine(args.threads), "versions": versions(), "arguments": {key: str(value) for key, value in vars(args).items()}}
    print(write_results(args.out, "methods", {**about, "lines": found}, text))
    print(text)
    return 1 if failed else 0


def measured(name: str, args: argparse.Namespace, rates: dict[str, str]) -> dict[str, Any]:
    """One run of one line, and what its metrics.csv and its last step say."""
    words = LINES[name].split()
    out = args.work / name.replace(",", "").replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "litlora", "finetune", *words, "--out_dir", str(out), "--train.max_steps", str(args.steps)]
    command += ["--train.global_batch_size", str(args.batch), "--train.save_interval", "0", "--eval.interval", "0", *args.options.split()]
    command += ["--threads", str(args.threads)]
    command += ["--checkpoint_dir", args.base] if args.base else []
    command += ["--data", args.data] if args.data else []
    rate = rates.get(name, rates.get(words[0]))
    command += ["--train.lr", rate] if rate else []
    done = run(command, env=thread_env(args.threads))
    if done.code != 0:
        return {"error": " / ".join(tail(done.stderr))}
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    steps = [row for row in rows if row["loss"]]
    weights = [path for path in (out / f"step-{args.steps}").glob("*.safetensors") if not path.name.startswith("training_state")]
    return {
        "seconds": median([float(row["seconds"]) for row in steps[SKIPPED:] or steps]),
        "memory_mb": max(float(row["memory_mb"]) for row in rows),
        "tokens_per_second": median([float(row["tokens_per_second"]) for row in steps[SKIPPED:] or steps]),
        "before": float(rows[0]["val_loss"]),
        "after": float(rows[-1]["val_loss"]),
        "lr": max(float(row["lr"]) for row in steps),
        "bytes": sum(path.stat().st_size for path in weights),
    }


def shown(found: dict[str, list[dict[str, Any]]]) -> str:
    good = {name: results for name, results in found.items() if results and not any("error" in result for result in results)}
    if not good:
        return "nothing ran"
    middle = {name: {key: median([result[key] for result in results]) for key in results[0]} for name, results in good.items()}
    reference = middle.get("lora") or next(iter(middle.values()))
    rows = [
        {
            "method": name,
            "lr": f"{values['lr']:.1e}",
            "loss before": f"{values['before']:.3f}",
            "after": f"{values['after']:.3f}",
            "s a step": f"{values['seconds']:.3f}",
            "time over LoRA's": f"{values['seconds'] / reference['seconds']:.2f}",
            "peak MB": f"{values['memory_mb']:.0f}",
            "memory over LoRA's": f"{values['memory_mb'] / reference['memory_mb']:.2f}",
            "a step holds MB": f"{values['bytes'] / MB:.2f}",
        }
        for name, values in middle.items()
    ]
    failed = [f"{name}: {results[0]['error']}" for name, results in found.items() if results and "error" in results[0]]
    return "\n".join([table(rows), *failed])


if __name__ == "__main__":
    sys.exit(main())
