"""C8: how long training stands still for a checkpoint, how many bytes it takes, and whether it keeps AdamW's moments.

The same LoRA (r 16, all projections) on the same base and rows, by each tool in a process of its own and in turn. `stands still`: how
long saving keeps the next step waiting, the median over all checkpoints but the last. `litlora-waiting` writes as a whole model that is
too large to copy is written; `before` is another checkout of litlora, for comparison in the same sitting. Bytes are compared with what
must be there: the adapter and AdamW's two moments, 12 bytes a trained parameter. The tokenizer and its template are told apart, and
the aim is judged without them: a step that serves by itself needs them, however small the adapter is. `keeps moments`: without them no
training goes on as it was; litgpt saves none.

`next step slower`: the median of the steps right after a save, without the first step, minus that of all others: what is hashed
and written beside the next step takes processors and disk from it, and does not show in `stands still`. Steps differ in length, so
that a few hundredths of a step, or less than nothing, say nothing.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extensions.benchmarks.drive import artefacts, convert_for_litgpt, parser_of, present, resolve_places, take_turns, versions_of
from extensions.benchmarks.measure import default_threads, median, run_json, table, thread_env, word, write_results

OURS = "litlora"
LINES = {  # name -> tool and what it needs
    "litgpt": ("litgpt", ("litgpt",)),
    "trainer": ("transformers", ("transformers", "peft")),
    "before": (OURS, ("torch",)),
    "litlora-waiting": (OURS, (OURS,)),
    OURS: (OURS, (OURS,)),
}
MOMENTS = ("training_state.safetensors", "optimizer.pt")  # of litlora and of the Trainer
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
AIM_STEPS, AIM_BYTES = 1.0, 0.01  # stands still at most so many steps; bytes over adapter and moments, tokenizer left out
MB = 10**6


def main() -> int:
    args = read_arguments()
    asked = [name for name in args.lines if name != "before" or args.before]
    lines, absent = present(args, {name: LINES[name] for name in asked})
    place = artefacts(args)
    if "litgpt" in lines:
        convert_for_litgpt(args.python["litgpt"], place)
    outs = place / "c8"
    shutil.rmtree(outs, ignore_errors=True)
    outs.mkdir()
    rows = args.rows or made_up_rows(outs / "rows.json")
    about = run_json([sys.executable, "-m", "extensions.benchmarks.measure", str(args.threads)], env=thread_env(args.threads))

    def command_of(name: str) -> list[str]:
        shutil.rmtree(outs / name, ignore_errors=True)
        tool = OURS if name == "before" else name
        base = place / ("litgpt" if name == "litgpt" else "base")
        script = str(Path(__file__).with_name("run_checkpoint.py"))  # before: its tree has another one, or none
        words = [args.python[LINES[name][0]], script, tool, "--base", str(base), "--rows", str(rows), "--out", str(outs / name)]
        for option in ("steps", "every", "longest", "threads"):
            words += [f"--{option}", str(getattr(args, option))]
        return ["env", f"PYTHONPATH={args.before}", *words] if name == "before" else words

    runs = take_turns(args, "c8", lines, command_of)
    shutil.rmtree(outs)
    summary = summarise(runs, args.every)
    options = {key: getattr(args, key) for key in ("shape", "steps", "every", "longest", "repeats", "threads", "quick")}
    failed = {run["line"]: run["failed"] for run in runs if "failed" in run}
    markdown = report(args, about, {**absent, **failed}, summary)
    versions = {name: versions_of(args.python[LINES[name][0]]) for name in lines}
    result = {"id": "C8", "machine": about, "versions": versions, "options": options, "absent": absent, "summary": summary, "runs": runs}
    path = write_results(args.out_dir, "c8", result, markdown)
    print(f"{markdown}\n\nwritten: {path}")
    return 1 if failed else 0


def read_arguments() -> argparse.Namespace:
    tools = [tool for tool, _ in LINES.values()]
    parser = parser_of(__doc__, tools, shape="135m", threads=default_threads(), repeats=1, quick="a tiny shape, 5 steps")
    parser.add_argument("--tokenizer", type=Path, help="directory with the tokenizer.json of the shape (SmolLM's for 135m)")
    parser.add_argument("--rows", type=Path, help="an Alpaca JSON file")
    parser.add_argument("--before", type=Path, help="another checkout of litlora")
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES), help="what to run, in this order (default: all)")
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--every", type=int, default=3, help="steps from one checkpoint to the next")
    parser.add_argument("--longest", type=int, default=128, help="longest sample, in tokens")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.steps, args.every, args.longest, args.repeats = "tiny", 5, 2, 256, 1
    elif args.tokenizer is None or args.rows is None:
        parser.error("--tokenizer and --rows are needed (only --quick does without)")
    args.rows, args.before = (path and path.resolve() for path in (args.rows, args.before))
    resolve_places(parser, args)
    return args


def made_up_rows(path: Path) -> Path:
    path.write_text(json.dumps([{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(64)]))
    return path


# ---- reporting -------------------------------------------------------------------------------------------------------


def summarise(runs: Sequence[Mapping[str, Any]], every: int) -> dict[str, dict[str, Any]]:
    """Medians over all runs of a line; its first step, in which much is allocated, is nobody's figure."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if "failed" not in run:
            lines.setdefault(run["line"], []).append(run)
    found = {}
    for name, several in lines.items():
        step = median([seconds for run in several for seconds in run["steps"][1:]])
        stood = [seconds for run in several for seconds in run["stood"]]
        files = several[0]["files"]
        adapter = next(size for file, size in files.items() if file.startswith(("adapter_model", "lit_model")))
        found[name] = {
            "step_seconds": step,
            "stood_seconds": median(stood),
            "stood_at_most": max(stood),
            "in_steps": median(stood) / step,
            "bytes": sum(files.values()),
            "over_adapter_and_moments": sum(files.values()) / (3 * adapter) - 1,
            "of_which_tokenizer": sum(files.get(file, 0) for file in TOKENIZER) / (3 * adapter),
            "keeps_moments": any(file in files for file in MOMENTS),
            "next_step_slower_seconds": slower_after_a_save([run["steps"] for run in several], every),
        }
    return found


def slower_after_a_save(runs: Sequence[Sequence[float]], every: int) -> float | None:
    """By how many seconds, in the medians; None where all steps follow a save, or none does."""
    after = [seconds for steps in runs for done, seconds in enumerate(steps) if done and done % every == 0]
    others = [seconds for steps in runs for done, seconds in enumerate(steps) if done % every]
    return median(after) - median(others) if after and others else None


def report(
    args: argparse.Namespace, about: Mapping[str, Any], left_out: Mapping[str, str], summary: Mapping[str, Mapping[str, Any]]
) -> str:
    rows = [
        {
            "tool": name,
            "s a step": f"{line['step_seconds']:.3f}",
            "stands still, s": f"{line['stood_seconds']:.3f}",
            "at most": f"{line['stood_at_most']:.3f}",
            "in steps": f"{line['in_steps']:.2f}",
            "next step slower, s": "-" if line["next_step_slower_seconds"] is None else f"{line['next_step_slower_seconds']:+.3f}",
            "bytes, MB": f"{line['bytes'] / MB:.2f}",
            "over adapter + moments": f"{line['over_adapter_and_moments']:+.2%}",
            "of which tokenizer and template": f"{line['of_which_tokenizer']:.2%}",
            "keeps moments": "yes" if line["keeps_moments"] else "no",
        }
        for name, line in summary.items()
    ]
    quick = " (quick: says only that it starts)" if args.quick else ""
    return "\n".join(
        [
            f"# C8: one checkpoint, {args.shape}, a checkpoint every {args.every} steps of 4 samples{quick}",
            "",
            f"{about.get('cpu', '?')}, {args.threads} threads; {args.repeats} turns.",
            "",
            table(rows) if rows else "nothing ran",
            "",
            *verdicts(summary),
            *[f"Left out: {name}: {why}" for name, why in left_out.items()],
        ]
    )


def verdicts(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the aims of PERFORMANCE.md say about ours."""
    said = []
    for name, line in summary.items():
        if name.startswith(OURS):
            over = line["over_adapter_and_moments"] - line["of_which_tokenizer"]
            still = f"stands still {line['in_steps']:.2f} steps, aim {AIM_STEPS:.0f}: {word(line['in_steps'] <= AIM_STEPS)}"
            size = f"{over:+.2%} bytes without tokenizer and template, aim {AIM_BYTES:+.0%}: {word(over <= AIM_BYTES)}"
            said.append(f"{name}: {still}; {size}.")
    return said


if __name__ == "__main__":
    sys.exit(main())
