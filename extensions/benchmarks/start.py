"""C5, C6 and C7: how long until a command answers, in fresh processes with a warm file cache, tools in turn.

C5: help texts, beside the interpreter alone and the import of jsonargparse. C6: process start to the first token after a
prompt of 8 tokens, beside `import torch` alone; the gate is that all tools that compute in fp32 say the same token. C7: process
start to the end of the first step of a LoRA fine-tuning on 64 rows, beside the import of Fabric, and of it with torch's optimizer.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extensions.benchmarks.drive import artefacts, convert_for_litgpt, parser_of, resolve_places
from extensions.benchmarks.measure import (
    Run,
    default_threads,
    median,
    missing,
    run,
    run_json,
    table,
    tail,
    thread_env,
    write_results,
)

PROMPT = "The capital of France is the city of"  # 8 tokens in SmolLM's vocabulary
IDS = ("C5", "C6", "C7")
AIM_HELP = 0.25  # seconds
AIM_BEYOND_TORCH = 0.5  # seconds over `import torch`
AIM_BEYOND_FABRIC = 1.0  # seconds over `import Fabric`
ROWS = 64  # of C7


@dataclass(frozen=True)
class Start:
    """One line of a table: a process, and which of its output is waited for. `{new}` in a word is a place that is not there yet."""

    command: list[str]
    wanted: Callable[[str], bool] | None = None  # given stdout so far; None: the process's end counts
    answer: Callable[[str], str] | None = None  # the token's text, out of stdout (tools that compute in fp32)


def main() -> int:
    args = read_arguments()
    about = run_json([sys.executable, "-m", "extensions.benchmarks.measure", str(args.threads)], env=thread_env(args.threads))
    passed = True
    if "C5" in args.ids:
        passed = measure(args, "C5", about, *help_texts(args))
    if "C6" in args.ids:
        passed = measure(args, "C6", about, *first_tokens(args)) and passed
    if "C7" in args.ids:
        passed = measure(args, "C7", about, *first_steps(args)) and passed
    return 0 if passed else 1


def read_arguments() -> argparse.Namespace:
    parser = parser_of(
        __doc__,
        ("litlora", "litgpt", "transformers", "trl"),
        shape="135m",
        threads=default_threads(),
        repeats=5,
        quick="a tiny shape, once",
    )
    parser.add_argument("--ids", nargs="+", choices=IDS, default=list(IDS), help="what to measure (default: all)")
    parser.add_argument("--tokenizer", type=Path, help="C6, C7: directory with the tokenizer.json of the shape (SmolLM's for 135m)")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.repeats = "tiny", 1
    elif {"C6", "C7"} & {*args.ids} and args.tokenizer is None:
        parser.error("C6 and C7 need --tokenizer (only --quick does without)")
    resolve_places(parser, args)
    return args


# ---- what is started -------------------------------------------------------------------------------------------------


def help_texts(args: argparse.Namespace) -> tuple[dict[str, Start], dict[str, str]]:
    ours = args.python["litlora"]
    starts = {
        "python -c pass": Start([ours, "-c", "pass"]),
        "import jsonargparse": Start([ours, "-c", "import jsonargparse"]),
        "litlora --help": Start([ours, "-m", "litlora", "--help"]),
        "litlora finetune lora --help": Start([ours, "-m", "litlora", "finetune", "lora", "--help"]),
    }
    absent = {}
    if missing(args.python["litgpt"], ["litgpt"]):
        absent["litgpt"] = "not installed (--python litgpt=PATH)"
    else:
        starts["litgpt --help"] = Start([args.python["litgpt"], "-m", "litgpt", "--help"])
        starts["litgpt finetune_lora --help"] = Start([args.python["litgpt"], "-m", "litgpt", "finetune_lora", "--help"])
    script = Path(args.python["trl"]).with_name("trl")
    if missing(args.python["trl"], ["trl"]) or not script.is_file():
        absent["trl"] = "not installed (--python trl=PATH)"
    else:
        starts["trl --help"] = Start([str(script), "--help"])
    return starts, absent


def first_tokens(args: argparse.Namespace) -> tuple[dict[str, Start], dict[str, str]]:
    place = artefacts(args)
    base, once = str(place / "base"), ["--prompt", PROMPT, "--max_new_tokens", "1", "--temperature", "0"]
    starts = {"import torch": Start([args.python["litlora"], "-c", "import torch"])}
    absent = {}
    for tool in ("litgpt", "transformers", "litlora"):
        if missing(args.python[tool], [tool]):
            absent[tool] = f"not installed (--python {tool}=PATH)"
    if "litgpt" not in absent:
        convert_for_litgpt(args.python["litgpt"], place)
        litgpt = [args.python["litgpt"], "-m", "litgpt", "generate", str(place / "litgpt"), *once]
        starts["litgpt generate (default)"] = Start(litgpt, said_by_litgpt)
        starts["litgpt generate (32-true)"] = Start([*litgpt, "--precision", "32-true"], said_by_litgpt, litgpt_answer)
    if "transformers" not in absent:
        transformers = [args.python["transformers"], "-m", "extensions.benchmarks.first_token", base, PROMPT]
        starts["transformers"] = Start(transformers, bool, str.rstrip)
    if "litlora" not in absent:
        starts["litlora generate"] = Start([args.python["litlora"], "-m", "litlora", "generate", base, "--raw", *once], bool, str.rstrip)
    return starts, absent


def first_steps(args: argparse.Namespace) -> tuple[dict[str, Start], dict[str, str]]:
    """Each tool at its defaults, but for one optimizer step of 16 samples in fp32 and no validation before it."""
    place = artefacts(args)
    rows = place / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"Say {n} in words.", "input": "", "output": f"It is {n}." * 8} for n in range(ROWS)]))
    ours, absent = args.python["litlora"], {}
    optimizer = "import torch; p = torch.ones(1, requires_grad=True); p.grad = torch.ones(1); torch.optim.AdamW([p]).step()"
    starts = {
        "import Fabric": Start([ours, "-c", "from lightning_fabric import Fabric"]),
        "import torch, AdamW.step": Start([ours, "-c", optimizer]),
    }
    if missing(args.python["litgpt"], ["litgpt"]):
        absent["litgpt"] = "not installed (--python litgpt=PATH)"
    else:
        convert_for_litgpt(args.python["litgpt"], place)
        words = ["finetune_lora", str(place / "litgpt"), "--precision", "32-true", "--data", "JSON", "--data.json_path", str(rows)]
        words += ["--data.val_split_fraction", "0.1", "--train.global_batch_size", "16", "--train.micro_batch_size", "4"]
        words += ["--train.max_steps", "1", "--train.epochs", "1", "--eval.initial_validation", "false", "--out_dir", "{new}"]
        starts["litgpt finetune_lora"] = Start([args.python["litgpt"], "-m", "litgpt", *words], lambda stdout: "(step)" in stdout)
    words = ["finetune", "lora", str(place / "base"), "--data", str(rows), "--chat_template", "alpaca"]
    words += ["--train.max_steps", "1", "--eval.fraction", "0", "--out_dir", "{new}"]
    step = Start(both_outputs([ours, "-m", "litlora", *words]), lambda stdout: "step=1/1" in stdout)
    return starts | {"litlora finetune lora": step}, absent


def both_outputs(command: Sequence[str]) -> list[str]:
    """What it says on standard error comes on standard output as well."""
    return ["bash", "-c", 'exec "$@" 2>&1', "-", *command]


def said_by_litgpt(stdout: str) -> bool:
    """It prints its settings, and later the prompt and the answer on a line of their own."""
    return stdout.startswith(PROMPT) or f"\n{PROMPT}" in stdout


def litgpt_answer(stdout: str) -> str:
    return f"\n{stdout}".rpartition(f"\n{PROMPT}")[2].rstrip()


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, id: str, about: Mapping[str, Any], starts: Mapping[str, Start], absent: Mapping[str, str]) -> bool:
    """Run every start once to warm the file cache (not in --quick), then `repeats` times in turn; write the results; did all go well?"""
    runs: dict[str, list[Run]] = {name: [] for name in starts}
    for turn in range(1 if args.quick else 0, args.repeats + 1):
        print(f"{id}: {'warm-up' if turn == 0 else f'turn {turn}/{args.repeats}'}", file=sys.stderr, flush=True)
        for name, start in starts.items():
            with tempfile.TemporaryDirectory() as new:
                command = [word.replace("{new}", f"{new}/new") for word in start.command]
                done = run(command, env=thread_env(args.threads), wanted=start.wanted)
            if turn > 0 or done.code != 0:
                runs[name].append(done)
    failed = {name: " | ".join(tail(each.stderr)) for name, several in runs.items() for each in several if each.code != 0}
    for name, why in failed.items():
        print(f"  failed: {name}: {why}", file=sys.stderr)
    good = {name: several for name, several in runs.items() if name not in failed}
    answers = {name: start.answer(good[name][0].stdout) for name, start in starts.items() if start.answer and name in good}
    same = len(set(answers.values())) <= 1
    seconds = {name: [each.wall if each.first is None else each.first for each in several] for name, several in good.items()}
    markdown = report(args, id, about, good, seconds, answers, {**absent, **failed})
    result = {
        "id": id,
        "machine": about,
        "options": {"shape": args.shape, "repeats": args.repeats, "threads": args.threads, "quick": args.quick},
        "absent": dict(absent),
        "failed": failed,
        "seconds": seconds,
        "peak_mb": {name: median([each.peak_mb for each in several]) for name, several in good.items()},
        "cpu_seconds": {name: median([each.cpu for each in several]) for name, several in good.items()},
        "gate": {"passed": same, "answers": answers},
    }
    path = write_results(args.out_dir, id.lower(), result, markdown)
    print(f"{markdown}\n\nwritten: {path}\n")
    return same and not failed


def report(
    args: argparse.Namespace,
    id: str,
    about: Mapping[str, Any],
    good: Mapping[str, Sequence[Run]],
    seconds: Mapping[str, Sequence[float]],
    answers: Mapping[str, str],
    left_out: Mapping[str, str],
) -> str:
    ours = [name for name in seconds if name.startswith("litlora")]
    rows = []
    for name, several in seconds.items():
        row = {
            "": name,
            "median s": f"{median(several):.2f}",
            "min s": f"{min(several):.2f}",
            "cpu s": f"{median([each.cpu for each in good[name]]):.2f}",
            "peak MB": f"{median([each.peak_mb for each in good[name]]):.0f}",
        }
        rows.append(row | {f"over {our}": f"{median(several) / median(seconds[our]):.1f}x" for our in ours})
    what = {"C5": "help texts", "C6": f"process start to first token, {args.shape}", "C7": f"process start to first step, {args.shape}"}[id]
    text = [
        f"# {id}: {what}{' (quick: says only that it starts)' if args.quick else ''}",
        "",
        f"{about.get('cpu', '?')}, {args.threads} threads; median of {args.repeats}, tools in turn, warm file cache.",
        "",
        table(rows) if rows else "nothing ran",
        "",
        *verdicts(id, seconds),
    ]
    if answers:
        said = ", ".join(f"{name}: {word!r}" for name, word in answers.items())
        text.append(f"Gate (same first token in fp32): {'passed' if len(set(answers.values())) == 1 else 'FAILED'}: {said}.")
    return "\n".join(text + [f"Left out: {name}: {why}" for name, why in left_out.items()])


def verdicts(id: str, seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """What the aims of PERFORMANCE.md say about ours."""
    lines = []
    for name in (name for name in seconds if name.startswith("litlora")):
        beside, more = {
            "C5": ("python -c pass", 0.0),
            "C6": ("import torch", AIM_BEYOND_TORCH),
            "C7": ("import Fabric", AIM_BEYOND_FABRIC),
        }[id]
        if beside not in seconds:
            continue
        aim = AIM_HELP if id == "C5" else median(seconds[beside]) + more
        took = median(seconds[name])
        lines.append(f"{name}: {took:.2f} s, aim {aim:.2f} s: {'reached' if took <= aim else 'MISSED'}.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
