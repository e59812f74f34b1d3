"""C1 (and C2's memory): LoRA fine-tuning on CPU, litlora against its peers, on the same samples in the same steps.

Every tool runs in a process of its own, in turn, several times over: {peers ..., litlora}, {peers ..., litlora}, ... A ratio is
taken within one turn, so that a machine whose speed changes cannot make it. Beside each run stands what a plain matrix
product reached during it. The gate: all tools that compute in fp32 must report the same loss at every step.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from extensions.benchmarks.artefacts import SHAPES, flops_per_token
from extensions.benchmarks.drive import artefacts, convert_for_litgpt, parser_of, present, resolve_places, take_turns
from extensions.benchmarks.job import Job, write_job
from extensions.benchmarks.measure import (
    default_threads,
    median,
    percentile,
    run_json,
    table,
    thread_env,
    write_results,
)

TOLERANCE = {"fp32": 1e-5, "bf16-mixed": 5e-3, "bf16": 2e-2}  # largest relative difference of a step's loss from the reference's
OURS = "litlora"


@dataclass(frozen=True)
class Line:
    """One line of the table: a tool with its settings."""

    runner: str  # a module of this package
    env: str  # whose interpreter it needs
    needs: tuple[str, ...]  # modules
    what: str
    settings: Mapping[str, Any]


LINES = {
    "litgpt-default": Line(
        "run_litgpt", "litgpt", ("litgpt",), "bf16-mixed, micro-batch 1: its defaults", {"precision": "bf16-mixed", "micro_batch": 1}
    ),
    "litgpt-mb1": Line("run_litgpt", "litgpt", ("litgpt",), "fp32, micro-batch 1", {"micro_batch": 1}),
    "litgpt-mb4": Line("run_litgpt", "litgpt", ("litgpt",), "fp32, micro-batch 4", {"micro_batch": 4}),
    "litgpt-mixed-mb4": Line(
        "run_litgpt", "litgpt", ("litgpt",), "bf16-mixed, micro-batch 4", {"precision": "bf16-mixed", "micro_batch": 4}
    ),
    "litgpt-bf16-mb4": Line("run_litgpt", "litgpt", ("litgpt",), "bf16-true, micro-batch 4", {"precision": "bf16", "micro_batch": 4}),
    "peft": Line("run_peft", "peft", ("transformers", "peft"), "fp32, micro-batch 4, padded", {"micro_batch": 4}),
    "peft-bf16": Line(
        "run_peft", "peft", ("transformers", "peft"), "bf16 base, micro-batch 4, padded", {"precision": "bf16", "micro_batch": 4}
    ),
    "trl": Line("run_trl", "trl", ("trl", "peft"), "fp32, micro-batch 4, padded", {"micro_batch": 4}),
    "trl-packed": Line("run_trl", "trl", ("trl", "peft"), "fp32, micro-batch 4, padding_free", {"micro_batch": 4, "padding_free": True}),
    "llamafactory": Line("run_llamafactory", "llamafactory", ("llamafactory",), "fp32, micro-batch 4, padded", {"micro_batch": 4}),
    "litlora": Line("run_litlora", "litlora", ("litlora",), "fp32, packed, beginnings shared", {}),
    "litlora-apart": Line("run_litlora", "litlora", ("litlora",), "fp32, packed, nothing shared", {"share_prefix": False}),
    "litlora-held": Line(
        "run_litlora", "litlora", ("litlora",), "fp32, packed, beginnings shared, the base held in bf16", {"quantize": "bf16"}
    ),
    "litlora-bf16": Line("run_litlora", "litlora", ("litlora",), "bf16 base, packed", {"precision": "bf16"}),
}
DEFAULT_LINES = ("litgpt-default", "litgpt-mb1", "litgpt-mb4", "peft", "trl", "llamafactory", OURS)


def main() -> int:
    args = read_arguments()
    lines, absent = present(args, {name: (LINES[name].env, LINES[name].needs) for name in args.lines})
    job = prepare(args, lines)
    about = run_json([sys.executable, "-m", "extensions.benchmarks.measure", str(args.threads)], env=thread_env(args.threads))

    def command_of(name: str) -> list[str]:
        path = write_job(replace(job, **LINES[name].settings), args.work_dir / "job.json")
        return [args.python[LINES[name].env], "-m", f"extensions.benchmarks.{LINES[name].runner}", str(path)]

    runs = take_turns(args, "c1", lines, command_of)
    gate = losses_agree(runs, args.reference)
    summary = summarise(args, job, runs)
    options = {
        key: getattr(args, key)
        for key in ("shape", "grade", "samples_per_step", "warmup", "timed", "repeats", "longest", "lr", "threads", "quick")
    }
    result = {"id": "C1", "machine": about, "options": options, "absent": absent, "gate": gate, "summary": summary, "runs": runs}
    markdown = report(args, about, absent, gate, summary)
    path = write_results(args.out_dir, "c1", result, markdown)
    print(f"{markdown}\n\nwritten: {path}")
    return 0 if gate["passed"] and not any("failed" in each for each in runs) else 1


# ---- before ----------------------------------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    quick = "a tiny shape, three steps, one turn"
    parser = parser_of(__doc__, [line.env for line in LINES.values()], shape="135m", threads=default_threads(), repeats=3, quick=quick)
    parser.add_argument("--tokenizer", type=Path, help="directory with the tokenizer.json of the shape (SmolLM's for 135m)")
    parser.add_argument("--rows", type=Path, help="an Alpaca JSON file")
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(DEFAULT_LINES), help="what to run, in this order")
    parser.add_argument(
        "--reference", choices=LINES, default="peft", help="whose losses the gate compares with (if absent: the first fp32 line)"
    )
    parser.add_argument("--grade", choices=("all", "answers"), default="all", help="all: prompts are graded too")
    parser.add_argument("--samples_per_step", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2, help="optimizer steps before the timed ones")
    parser.add_argument("--timed", type=int, default=8, help="optimizer steps that are timed")
    parser.add_argument("--lr", type=float, default=2e-4, help="constant")
    parser.add_argument("--longest", type=int, default=512, help="tokens; longer samples are cut")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.warmup, args.timed, args.repeats, args.longest = "tiny", 1, 2, 1, 48
        args.lr = 1e-2  # a tiny model hardly moves at 2e-4: the gate would not see an update that is wrong
    elif args.tokenizer is None or args.rows is None:
        parser.error("--tokenizer and --rows are needed (only --quick does without)")
    resolve_places(parser, args)
    return args


def prepare(args: argparse.Namespace, lines: Sequence[str]) -> Job:
    """Make the base, the adapter and the samples; convert the base for litgpt where it will run."""
    count = args.samples_per_step * (args.warmup + args.timed)
    rows = ["--rows", str(args.rows.resolve())] if args.rows else []
    place = artefacts(args, "--count", str(count), "--longest", str(args.longest), "--grade", args.grade, *rows)
    if any(LINES[name].env == "litgpt" for name in lines):
        convert_for_litgpt(args.python["litgpt"], place)
    return Job(
        base=str(place / "base"),
        litgpt_base=str(place / "litgpt"),
        adapter=str(place / "adapter"),
        samples=str(place / "samples" / "samples.json"),
        samples_per_step=args.samples_per_step,
        warmup=args.warmup,
        timed=args.timed,
        threads=args.threads,
        lr=args.lr,
    )


# ---- after -----------------------------------------------------------------------------------------------------------


def losses_agree(runs: Sequence[Mapping[str, Any]], reference: str) -> dict[str, Any]:
    """The correctness gate: every run's loss at every step against the reference's, within the tolerance of its precision."""
    good = [each for each in runs if "failed" not in each]
    exact = [each for each in good if precision_of(each["line"]) == "fp32"]
    truth = next((each for each in exact if each["line"] == reference), exact[0] if exact else None)
    if truth is None:
        return {"passed": False, "reason": "no fp32 run succeeded", "differences": {}}
    differences: dict[str, float] = {}
    for each in good:
        pairs = zip(each["losses"], truth["losses"], strict=True)
        apart = [abs(mine - right) / abs(right) for mine, right in pairs]
        worst = max(apart) if all(map(math.isfinite, apart)) else math.inf  # max() passes over a nan
        differences[each["line"]] = max(worst, differences.get(each["line"], 0.0))
    same_work = len({(each["trained"], *each["real_tokens"], *each["graded_tokens"]) for each in good}) == 1
    wrong = [name for name, worst in differences.items() if worst > TOLERANCE[precision_of(name)]]
    return {
        "passed": not wrong and same_work,
        "reference": truth["line"],
        "steps": len(truth["losses"]),
        "first_loss": truth["losses"][0],
        "last_loss": truth["losses"][-1],
        "differences": differences,  # largest relative difference over all steps and turns
        "same_work": same_work,  # the same tokens, graded tokens and number of trained parameters everywhere
        "wrong": wrong,
    }


def precision_of(line: str) -> str:
    return str(LINES[line].settings.get("precision", "fp32"))


def summarise(args: argparse.Namespace, job: Job, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per line: medians over the turns, percentiles over all timed steps, and ours over it, turn by turn."""
    speeds = {(each["line"], each["turn"]): sum(each["real_tokens"]) / sum(each["step_seconds"]) for each in runs if "failed" not in each}
    flops = flops_of_samples(args, job)
    summary: dict[str, Any] = {}
    for line in dict.fromkeys(each["line"] for each in runs):
        mine = [each for each in runs if each["line"] == line and "failed" not in each]
        if not mine:
            continue
        steps = [seconds for each in mine for seconds in each["step_seconds"]]
        speed = median([speeds[line, each["turn"]] for each in mine])
        ratios = [speeds[OURS, each["turn"]] / speeds[line, each["turn"]] for each in mine if (OURS, each["turn"]) in speeds]
        gemm = median([sum(each["gemm_gflops"]) / len(each["gemm_gflops"]) for each in mine])
        summary[line] = {
            "real_tokens_per_second": speed,
            "graded_tokens_per_second": speed * sum(mine[0]["graded_tokens"]) / sum(mine[0]["real_tokens"]),
            "samples_per_second": args.samples_per_step * args.timed / median([sum(each["step_seconds"]) for each in mine]),
            "step_median": median(steps),
            "step_p90": percentile(steps, 0.9),
            "peak_mb": median([each["peak_mb"] for each in mine]),
            "first_step_at": median([each["first_step_at"] for each in mine]),
            "computed_positions": mine[0]["computed_positions"],
            "real_tokens_per_cpu_second": median([sum(each["real_tokens"]) / sum(each["step_cpu_seconds"]) for each in mine]),
            "busy": sum(sum(each["step_cpu_seconds"]) for each in mine) / sum(steps) / args.threads,
            "gemm_gflops": gemm,
            "share_of_gemm": speed * flops / (gemm * 1e9),
            "ours_over_it": {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)} if ratios else None,
        }
    return summary


def flops_of_samples(args: argparse.Namespace, job: Job) -> float:
    samples = json.loads(Path(job.samples).read_text())["samples"][args.warmup * args.samples_per_step :]
    lengths = [len(sample["ids"]) for sample in samples]
    graded = sum(sum(sample["graded"]) for sample in samples) / sum(lengths)
    mean_keys = sum(length * (length + 1) / 2 for length in lengths) / sum(lengths)
    return flops_per_token(SHAPES[args.shape], graded, mean_keys, job.r)


def report(
    args: argparse.Namespace, about: Mapping[str, Any], absent: Mapping[str, str], gate: Mapping[str, Any], summary: Mapping[str, Any]
) -> str:
    rows = []
    for line, each in summary.items():
        ratio = each["ours_over_it"]
        rows.append(
            {
                "line": f"{line} ({LINES[line].what})",
                "real tok/s": f"{each['real_tokens_per_second']:.1f}",
                "graded tok/s": f"{each['graded_tokens_per_second']:.1f}",
                "step p50 s": f"{each['step_median']:.3f}",
                "p90 s": f"{each['step_p90']:.3f}",
                "peak MB": f"{each['peak_mb']:.0f}",
                "first step s": f"{each['first_step_at']:.1f}",
                "tok/cpu s": f"{each['real_tokens_per_cpu_second']:.1f}",
                "busy": f"{each['busy']:.0%}",
                "GEMM GFLOP/s": f"{each['gemm_gflops']:.0f}",
                "of GEMM": f"{each['share_of_gemm']:.0%}",
                "litlora is": f"{ratio['median']:.2f}x ({ratio['lowest']:.2f}-{ratio['highest']:.2f})" if ratio else "-",
            }
        )
    grade = "prompts graded too" if args.grade == "all" else "answers graded"
    text = [
        f"# C1: LoRA fine-tuning on CPU, {args.shape}, {grade}{' (quick: says only that it starts)' if args.quick else ''}",
        "",
        f"{about.get('cpu', '?')}, {args.threads} threads, flags {' '.join(about.get('flags', [])) or '-'}; at the start a matrix product "
        f"reached {about.get('gemm_fp32_gflops', 0):.0f} GFLOP/s in fp32, {about.get('gemm_bf16_gflops', 0):.0f} in bf16.",
        f"{args.samples_per_step} samples a step, {args.warmup} warm-up and {args.timed} timed steps, {args.repeats} turns; "
        f"r 16 on all projections, AdamW, lr {args.lr:g} constant, no clipping, no dropout.",
        "",
        table(rows) if rows else "nothing ran",
        "",
        f"Gate: {'passed' if gate['passed'] else 'FAILED'}. " + gate_text(gate),
    ]
    text += [f"Left out: {name}: {why}" for name, why in absent.items()]
    return "\n".join(text)


def gate_text(gate: Mapping[str, Any]) -> str:
    if "reason" in gate:
        return str(gate["reason"])
    parts = [f"{name} {worst:.1e} (allowed {TOLERANCE[precision_of(name)]:.0e})" for name, worst in gate["differences"].items()]
    return (
        f"Largest relative difference of a step's loss from {gate['reference']}, over {gate['steps']} steps "
        f"({gate['first_loss']:.4f} -> {gate['last_loss']:.4f}): {', '.join(parts)}. "
        f"Same tokens and trained parameters: {gate['same_work']}."
    )


if __name__ == "__main__":
    sys.exit(main())
