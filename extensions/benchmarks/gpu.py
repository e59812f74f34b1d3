"""G1 to G4: training and answering on one GPU, Llama-3.1-8B's shape, litlora against its peers and against the device's own limits.

    G1  LoRA r 16 on all projections, bf16, samples of 4,096 tokens      G3  the same with the base in NF4, against ourselves in bf16
    G2  the same on samples as long as Alpaca's, 16 a step               G4  answering, one at a time, bf16, int8 and NF4

Every line is a process of its own, one after another on the same device. Beside each stand the limit that the device's own speed of
the moment sets, and a check that the result is right. Random weights and samples: see `run_gpu.py`. It has not run on a GPU yet.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extensions.benchmarks.artefacts import SHAPES, alpaca_like, flops_per_token, full_samples, linears
from extensions.benchmarks.drive import parser_of, present, resolve_places
from extensions.benchmarks.measure import median, run_json, table, thread_env, write_results

NEEDS = {
    "litlora": ("litlora", "lightning_fabric"),
    "peft": ("transformers", "peft"),
    "transformers": ("transformers",),
    "litgpt": ("litgpt",),
}
LINES: dict[str, dict[str, dict[str, Any]]] = {  # id -> line -> what is its job's own; the others are held against the first
    "G1": {"litlora": {"tool": "litlora"}, "peft": {"tool": "peft", "micro_batch": 1}, "litgpt": {"tool": "litgpt"}},
    "G2": {"litlora": {"tool": "litlora"}, "peft": {"tool": "peft"}, "litgpt": {"tool": "litgpt"}},
    "G3": {
        "litlora": {"tool": "litlora"},
        "litlora-nf4": {"tool": "litlora", "quantize": "nf4"},
        "litlora-nf4-dq": {"tool": "litlora", "quantize": "nf4-dq"},
        "litlora-nf4-8gb": {"tool": "litlora", "quantize": "nf4", "recompute": True, "micro_batch_tokens": 2048},
    },
    "G4": {
        "litlora": {"tool": "litlora"},
        "transformers": {"tool": "transformers"},
        "litlora-int8": {"tool": "litlora", "quantize": "int8"},
        "litlora-nf4": {"tool": "litlora", "quantize": "nf4"},
    },
}
BITS = {"none": 16.0, "int8": 8.0, "nf4": 4.5, "nf4-dq": 4.13}  # of a number in the blocks' matrices
LOSS = {"fp32": 1e-5, "none": 1e-2, "nf4": 5e-2, "nf4-dq": 5e-2}  # largest relative difference of a step's loss from the first line's
LOGITS = (
    4e-2  # of a step from a plain one, and of transformers' from ours, both in bf16: 32 layers, rounded at other places, are 1.3e-2 apart
)


def main() -> int:
    args = read_arguments()
    passed = True
    for id in args.ids:
        wanted = {line: own["tool"] for line, own in LINES[id].items() if not args.lines or line in args.lines}
        lines, absent = present(args, {line: (tool, NEEDS[tool]) for line, tool in wanted.items()})
        runs, env = [], thread_env(args.threads) if args.threads else None
        for line in lines:
            print(f"{id}: {line}", file=sys.stderr, flush=True)
            path = write_job(args, id, LINES[id][line])
            runs.append({"line": line} | run_json([args.python[wanted[line]], "-m", "extensions.benchmarks.run_gpu", str(path)], env=env))
            if "failed" in runs[-1]:
                print(f"  failed: {runs[-1]['failed']}", file=sys.stderr)
        gate = answers_agree(runs) if id == "G4" else losses_agree(args, id, runs)
        summary = {each["line"]: summarise(args, id, each) for each in runs if "failed" not in each}
        options = {"shape": args.shape, "device": args.device, "warmup": args.warmup, "timed": args.timed, "quick": args.quick}
        result = {"id": id, "options": options, "absent": absent, "gate": gate, "summary": summary, "runs": runs}
        markdown = report(args, id, absent, gate, summary, runs)
        print(f"{markdown}\n\nwritten: {write_results(args.out_dir, id.lower(), result, markdown)}\n")
        passed = passed and not gate["wrong"] and bool(summary) and not any("failed" in each for each in runs)
    return 0 if passed else 1


# ---- before ----------------------------------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, NEEDS, shape="8b", threads=0, repeats=5, quick="a tiny shape, three steps")
    parser.add_argument("--ids", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --quick alone")
    parser.add_argument("--lines", nargs="+", choices=sorted({line for lines in LINES.values() for line in lines}), help="only these")
    parser.add_argument("--warmup", type=int, default=5, help="optimizer steps before the timed ones")
    parser.add_argument("--timed", type=int, default=20, help="optimizer steps that are timed")
    parser.add_argument("--new_tokens", type=int, default=128, help="of an answer")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.warmup, args.timed, args.new_tokens, args.repeats = "tiny", 1, 2, 8, 1
    elif args.device == "cpu":
        parser.error("--device cpu says only that it starts: --quick")
    resolve_places(parser, args)
    return args


def write_job(args: argparse.Namespace, id: str, own: Mapping[str, Any]) -> Path:
    """The words of `run_gpu.Job`, which this process does not import: torch comes with it."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    vocab, per_step = SHAPES[args.shape]["vocab_size"], 16 if id == "G2" else 4
    job = {"config": SHAPES[args.shape], "device": args.device, "warmup": args.warmup, "timed": args.timed, **own}
    if id == "G4":
        job |= {"new_tokens": args.new_tokens, "repeats": args.repeats}
    else:
        count = per_step * (args.warmup + args.timed)
        short, full = (200, 64) if args.quick else (799, 4096)
        chosen = alpaca_like(count, vocab, short) if id == "G2" else full_samples(count, vocab, full)
        if own.get("micro_batch_tokens"):  # as long as what fits
            chosen = [{key: values[: own["micro_batch_tokens"]] for key, values in sample.items()} for sample in chosen]
        samples = args.work_dir / "gpu_samples.json"
        samples.write_text(json.dumps({"samples": chosen}))
        job |= {"samples": str(samples), "samples_per_step": per_step}
    path = args.work_dir / "gpu_job.json"
    path.write_text(json.dumps(job))
    return path


# ---- after -----------------------------------------------------------------------------------------------------------


def losses_agree(args: argparse.Namespace, id: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every step's loss against the first line's; lines that had other samples are left out."""
    good = [each for each in runs if "failed" not in each]
    differences, wrong = {}, []
    for each in good[1:]:
        if each["real_tokens"] != good[0]["real_tokens"]:
            continue
        steps = [abs(a - b) / abs(b) for a, b in zip(each["losses"], good[0]["losses"], strict=True)]
        apart = max(steps) if all(map(math.isfinite, steps)) else math.inf  # max() passes over a nan
        differences[each["line"]] = apart
        kind = LINES[id][each["line"]].get("quantize", "none" if args.device == "cuda" else "fp32")
        if not apart <= LOSS[kind] or each["trained"] != good[0]["trained"]:
            wrong.append(each["line"])
    return {"differences": differences, "wrong": wrong}


def answers_agree(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Our steps against plain ones; the logits after the prompt of lines with a base in bf16 against each other."""
    good = [each for each in runs if "failed" not in each]
    differences = {f"{each['line']}: a step": each["step_apart"] for each in good if "step_apart" in each}
    plain = [each for each in good if not LINES["G4"][each["line"]].get("quantize")]
    for each in plain[1:]:
        square = sum((a - b) ** 2 for a, b in zip(each["logits"], plain[0]["logits"], strict=True))
        differences[f"{each['line']}: logits"] = (square / sum(b**2 for b in plain[0]["logits"])) ** 0.5
    wrong = [name for name, apart in differences.items() if not apart <= LOGITS]
    wrong += [f"{each['line']}: answers differ from round to round" for each in good if not each["same"]]
    return {"differences": differences, "wrong": wrong}


def summarise(args: argparse.Namespace, id: str, run: Mapping[str, Any]) -> dict[str, Any]:
    config, quantize = SHAPES[args.shape], LINES[id][run["line"]].get("quantize", "none")
    if id == "G4":
        blocks, head = sum(inner * outer for _, inner, outer in linears(config)), config["vocab_size"] * config["hidden_size"]
        wide = 2 if args.device == "cuda" else 4
        limit = run["limits"]["bytes"] / (blocks * min(BITS[quantize] / 8, wide) + head * wide)  # weights are read once; no cache counted
        speed = median(run["tokens_per_second"])
    else:
        tokens, graded = sum(run["real_tokens"]), sum(run["graded_tokens"])
        keys = 2048 if id != "G2" else 167
        limit = run["limits"]["flops"] / flops_per_token(config, graded / tokens, keys, 16)
        speed = tokens / sum(run["step_seconds"])
    return {"tokens_per_second": speed, "limit": limit, "share": speed / limit, "peak_device_mb": run["peak_device_mb"]}


def report(
    args: argparse.Namespace, id: str, absent: Mapping[str, str], gate: Mapping[str, Any], summary: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
) -> str:  # fmt: skip
    rows = []
    for line, each in summary.items():
        first = next(iter(summary.values()))["tokens_per_second"]
        memory = each["peak_device_mb"]
        rows.append(
            {
                "line": line,
                "tok/s": f"{each['tokens_per_second']:,.0f}",
                "limit now": f"{each['limit']:,.0f}",
                "of it": f"{each['share']:.0%}",
                "peak GB": "-" if memory is None else f"{memory / 1e3:.1f}",
                "beside the first": f"{each['tokens_per_second'] / first:.2f}x",
            }
        )
    device = next((each["device"] for each in runs if "device" in each), "?")
    quick = " (quick: says only that it starts)" if args.quick else ""
    differences = ", ".join(f"{name} {apart:.1e}" for name, apart in gate["differences"].items())
    text = [f"# {id}: {args.shape} on {device}{quick}", "", table(rows) if rows else "nothing ran", ""]
    text += [f"Gate: {'FAILED: ' + ', '.join(gate['wrong']) if gate['wrong'] else 'passed'}. Relative differences: {differences or '-'}."]
    text += [f"Left out: {name}: {why}" for name, why in absent.items()]
    text += [f"Failed: {each['line']}: {each['failed']}" for each in runs if "failed" in each]
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
