"""C3: decoding on CPU, one greedy answer at a time, litlora against its peers, beside the rate at which memory is read.

Every tool runs in a process of its own, in turn, several times over; a ratio is taken within one turn. A token needs every weight once, so
the bytes of the weights over the rate of reading, measured in the same process, is the limit: by the fastest reading, and by many one
after the other, as an answer reads them, for a shared machine has its best moments. The gate: all tools that compute in fp32 must give
the same tokens, and the same logits after random tokens one by one: random weights themselves mostly repeat one token. Where nothing
computes in fp32, nothing is judged.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extensions.benchmarks.artefacts import SEED, SHAPES, linears
from extensions.benchmarks.drive import artefacts, convert_for_litgpt, parser_of, present, resolve_places, take_turns
from extensions.benchmarks.measure import (
    default_threads,
    median,
    run_json,
    table,
    thread_env,
    word,
    write_results,
)

OURS = "litlora"
BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.0, "nf4": 4.5}  # of a weight
AIMS = {"135m": {OURS: 1.5, "litlora-int8": 3.0}, "1.1b": {OURS: 1.4, "litlora-int8": 2.5}}  # times the best peer
AIM_LIMIT = 0.8  # of the limit
FORCED = 8  # tokens that are given one by one before logits are compared
TOLERANCE = 1e-4  # relative difference of logits in fp32


@dataclass(frozen=True)
class Line:
    """One line of the table: a tool with its settings."""

    tool: str
    needs: tuple[str, ...]  # modules
    what: str
    quantize: str = "none"
    static_cache: bool = False
    prompt_lookup: int = 0


LINES = {
    "litgpt": Line("litgpt", ("litgpt",), "its generate"),
    "transformers": Line("transformers", ("transformers",), "dynamic cache"),
    "transformers-static": Line("transformers", ("transformers",), "static cache", static_cache=True),
    OURS: Line(OURS, (OURS,), "its defaults"),
    "litlora-int8": Line(OURS, (OURS,), "--quantize int8", quantize="int8"),
    "litlora-nf4": Line(OURS, (OURS,), "--quantize nf4", quantize="nf4"),
    "litlora-lookup": Line(OURS, (OURS,), "--prompt_lookup 8", prompt_lookup=8),
}
DEFAULT_LINES = tuple(name for name in LINES if name != "litlora-lookup")  # what random weights say repeats itself as no text does


def main() -> int:
    args = read_arguments()
    lines, absent = present(args, {name: (LINES[name].tool, LINES[name].needs) for name in args.lines})
    place = prepare(args, lines)
    prompts = random_prompts(args)
    about = run_json([sys.executable, "-m", "extensions.benchmarks.measure", str(args.threads)], env=thread_env(args.threads))
    path = args.work_dir / "decode_job.json"

    def command_of(name: str) -> list[str]:
        path.write_text(json.dumps(job_of(args, LINES[name], place, prompts)))
        return [args.python[LINES[name].tool], "-m", "extensions.benchmarks.run_decode", str(path)]

    runs = take_turns(args, "c3", lines, command_of)
    gate = tokens_agree(runs, args.reference, args.precision)
    summary = summarise(args, runs)
    options = {key: getattr(args, key) for key in ("shape", "precision", "prompt_tokens", "new_tokens", "repeats", "threads", "quick")}
    kept = [
        {key: value for key, value in each.items() if key != "logits"} for each in runs
    ]  # the gate has looked at them: 50,000 numbers each
    result = {"id": "C3", "machine": about, "options": options, "absent": absent, "gate": gate, "summary": summary, "runs": kept}
    markdown = report(args, about, absent, gate, summary)
    path = write_results(args.out_dir, "c3", result, markdown)
    print(f"{markdown}\n\nwritten: {path}")
    return 0 if gate["passed"] is not False and not any("failed" in each for each in runs) else 1


# ---- before ----------------------------------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    quick = "a tiny shape, 8 tokens, one turn, no peer"
    parser = parser_of(__doc__, ("litgpt", "transformers", OURS), shape="135m", threads=default_threads(), repeats=5, quick=quick)
    parser.add_argument(
        "--tokenizer", type=Path, help="directory with the tokenizer.json of the shape (SmolLM's for 135m, Llama 2's for 1.1b)"
    )
    parser.add_argument("--lines", nargs="+", choices=LINES, help="what to run, in this order (default: all but litlora-lookup)")
    parser.add_argument(
        "--reference", choices=LINES, default="transformers", help="whose tokens are the right ones (absent: the first fp32 line)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="that the peers compute in (default: the shape's)")
    parser.add_argument("--prompt_tokens", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--new_tokens", type=int, default=128)
    args = parser.parse_args()
    if args.quick:
        args.shape, args.prompt_tokens, args.new_tokens, args.repeats = "tiny", [8, 40], 8, 1
        args.lines = args.lines or [name for name in LINES if LINES[name].tool == OURS]
    elif args.tokenizer is None:
        parser.error("--tokenizer is needed (only --quick does without)")
    args.lines = args.lines or list(DEFAULT_LINES)
    args.precision = args.precision or {"float32": "fp32", "bfloat16": "bf16"}[SHAPES[args.shape]["torch_dtype"]]
    resolve_places(parser, args)
    return args


def prepare(args: argparse.Namespace, lines: Sequence[str]) -> Path:
    place = artefacts(args)
    if "litgpt" in lines:
        convert_for_litgpt(args.python["litgpt"], place)
    return place


def random_prompts(args: argparse.Namespace) -> list[list[int]]:
    chance, highest = random.Random(SEED), 255 if args.quick else SHAPES[args.shape]["vocab_size"] - 1
    return [[chance.randint(1, highest) for _ in range(length)] for length in args.prompt_tokens]


def job_of(args: argparse.Namespace, line: Line, place: Path, prompts: list[list[int]]) -> dict[str, Any]:
    return {
        "tool": line.tool,
        "base": str(place / "base"),
        "litgpt_base": str(place / "litgpt"),
        "precision": args.precision,
        "quantize": line.quantize,
        "static_cache": line.static_cache,
        "prompt_lookup": line.prompt_lookup,
        "prompts": prompts,
        "forced": prompts[0][:FORCED],
        "new_tokens": args.new_tokens,
        "threads": args.threads,
    }


def weight_bytes(config: Mapping[str, Any], precision: str, line: Line) -> float:
    """What a token must read: the blocks' matrices, ours as they are stored unless in few bits, and the head, ours as it is stored."""
    blocks = sum(inner * outer for _, inner, outer in linears(dict(config)))
    stored = {"float32": "fp32", "bfloat16": "bf16"}[config["torch_dtype"]] if line.tool == OURS else precision
    bits = BITS[stored if line.quantize == "none" else line.quantize]
    return (blocks * bits + config["vocab_size"] * config["hidden_size"] * BITS[stored]) / 8


# ---- after -----------------------------------------------------------------------------------------------------------


def tokens_agree(runs: Sequence[Mapping[str, Any]], reference: str, precision: str) -> dict[str, Any]:
    """The correctness gate: every answer of every run in fp32 must be the reference's. Of the others (bf16, few bits) it is only told
    how much of an answer is equal from its beginning on: after one other token an answer is another one. `passed` is None where nothing
    ran in fp32."""
    good = [each for each in runs if "failed" not in each]
    exact = [each for each in good if precision == "fp32" and LINES[each["line"]].quantize == "none"]
    truth = next((each for each in exact or good if each["line"] == reference), (exact or good or [None])[0])
    if truth is None:
        return {"passed": False, "reason": "nothing ran", "shares": {}}
    shares: dict[str, float] = {}  # the least over all turns
    for each in good:
        pairs = [(mine["ids"], right["ids"]) for mine, right in zip(each["answers"], truth["answers"], strict=True)]
        equal = sum(next((n for n, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs)
        shares[each["line"]] = min(equal / sum(len(right) for _, right in pairs), shares.get(each["line"], 1.0))
    apart: dict[str, float] = {}  # the most over all turns
    for each in good:
        found = [distance(mine, right) for mine, right in zip(each["logits"], truth["logits"], strict=True)]
        apart[each["line"]] = max(*found, apart.get(each["line"], 0.0))
    compared = sorted({each["line"] for each in exact})
    wrong = [line for line in compared if shares[line] < 1 or apart[line] > TOLERANCE]
    passed = not wrong if compared else None
    return {"passed": passed, "reference": truth["line"], "compared": compared, "shares": shares, "logits_apart": apart, "wrong": wrong}


def distance(mine: Sequence[float], right: Sequence[float]) -> float:
    """Of two vectors, relative to the second; infinite where a number is none."""
    found = math.dist(mine, right) / math.hypot(*right)
    return found if math.isfinite(found) else math.inf


def summarise(args: argparse.Namespace, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per line: medians over the turns for each prompt, and against the limit and the best peer of the same turn."""
    good = [each for each in runs if "failed" not in each]
    speeds = {(each["line"], each["turn"]): [answer["tokens_per_second"] for answer in each["answers"]] for each in good}
    summary: dict[str, Any] = {}
    for line in dict.fromkeys(each["line"] for each in good):
        mine = [each for each in good if each["line"] == line]
        size = weight_bytes(SHAPES[args.shape], args.precision, LINES[line])
        rate = median([max(reading["best"] for reading in each["bandwidth"]) for each in mine])  # a limit: the best of what was seen
        steady = median([median([reading["steady"] for reading in each["bandwidth"]]) for each in mine])  # what there was meanwhile
        prompts = []
        for place, length in enumerate(args.prompt_tokens):
            answers = [each["answers"][place] for each in mine]
            speed = median([answer["tokens_per_second"] for answer in answers])
            peers = {each["turn"]: best_peer(speeds, each["turn"], place) for each in mine}
            ratios = [speeds[line, turn][place] / best for turn, best in peers.items() if best]
            prompts.append(
                {
                    "prompt_tokens": length,
                    "tokens_per_second": speed,
                    "first_token_seconds": median([answer["first_token_seconds"] for answer in answers]),
                    "cpu_seconds_per_token": median([answer["cpu_seconds_per_token"] for answer in answers]),
                    "gigabytes_per_second": speed * size / 1e9,
                    "share_of_limit": speed * size / rate,
                    "share_of_steady": speed * size / steady,
                    "over_best_peer": median(ratios) if ratios else None,
                }
            )
        summary[line] = {
            "prompts": prompts,
            "weight_bytes": size,
            "bandwidth": rate,
            "steady_bandwidth": steady,
            "limit_tokens_per_second": rate / size,
            "peak_mb": median([each["peak_mb"] for each in mine]),
        }
    return summary


def best_peer(speeds: Mapping[tuple[str, int], Sequence[float]], turn: int, place: int) -> float | None:
    found = [speed[place] for (line, of), speed in speeds.items() if of == turn and LINES[line].tool != OURS]
    return max(found, default=None)


def report(
    args: argparse.Namespace, about: Mapping[str, Any], absent: Mapping[str, str], gate: Mapping[str, Any], summary: Mapping[str, Any]
) -> str:
    rows = [
        {
            "line": f"{line} ({LINES[line].what})",
            "prompt": str(each["prompt_tokens"]),
            "tok/s": f"{each['tokens_per_second']:.1f}",
            "first token s": f"{each['first_token_seconds']:.3f}",
            "cpu ms/token": f"{each['cpu_seconds_per_token'] * 1e3:.1f}",
            "GB/s": f"{each['gigabytes_per_second']:.1f}",
            "of limit": f"{each['share_of_limit']:.0%}",
            "of steady": f"{each['share_of_steady']:.0%}",
            "over best peer": f"{each['over_best_peer']:.2f}x" if each["over_best_peer"] else "-",
            "peak MB": f"{whole['peak_mb']:.0f}",
            "same tokens": f"{gate['shares'][line]:.0%}",
            "logits apart": f"{gate['logits_apart'][line]:.0e}",
        }
        for line, whole in summary.items()
        for each in whole["prompts"]
    ]
    limits = []
    for line, whole in summary.items():
        rates = f"{whole['bandwidth'] / 1e9:.1f} and {whole['steady_bandwidth'] / 1e9:.1f} GB/s"
        limits.append(f"{line} {whole['limit_tokens_per_second']:.1f} tok/s at {rates}")
    text = [
        f"# C3: decoding, {args.shape}, {args.precision}{' (quick: says only that it starts)' if args.quick else ''}",
        "",
        f"{about.get('cpu', '?')}, {args.threads} threads; batch 1, greedy, {args.new_tokens} new tokens; median of {args.repeats} turns.",
        "",
        table(rows) if rows else "nothing ran",
        "",
        f"Limit (every weight read once a token; memory at its best, and steadily between the answers): {', '.join(limits)}.",
        *verdicts(args.shape, summary),
        f"Gate (same tokens and logits in fp32): {judgement(gate)}.",
    ]
    return "\n".join(text + [f"Left out: {name}: {why}" for name, why in absent.items()])


def judgement(gate: Mapping[str, Any]) -> str:
    if gate["passed"] is None:
        return "not judged: nothing computes in fp32"
    if gate["passed"]:
        return f"passed: {', '.join(gate['compared'])}"
    return f"FAILED: {gate.get('reason') or ', '.join(gate['wrong'])}"


def verdicts(shape: str, summary: Mapping[str, Any]) -> list[str]:
    """What the aims of PERFORMANCE.md say about ours: the worst prompt counts."""
    said = []
    for line, aim in AIMS.get(shape, {}).items():
        if line not in summary:
            continue
        prompts = summary[line]["prompts"]
        ratios = [each["over_best_peer"] for each in prompts if each["over_best_peer"]]
        if ratios:
            said.append(f"{line}: {min(ratios):.2f}x of the best peer, aim {aim}x: {word(min(ratios) >= aim)}.")
        if line == OURS:
            for what, of in (("memory's best moment", "share_of_limit"), ("what memory gave steadily", "share_of_steady")):
                share = min(each[of] for each in prompts)
                said.append(f"{line}: {share:.0%} of the limit by {what}, aim {AIM_LIMIT:.0%}: {word(share >= AIM_LIMIT)}.")
    return said


if __name__ == "__main__":
    sys.exit(main())
