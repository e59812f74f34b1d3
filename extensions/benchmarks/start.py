"""C5, C6 and C7: how long until a command answers, in fresh processes with a warm file cache, tools in turn.

C5: help texts, beside the interpreter alone and the import of jsonargparse. C6: process start to the first token after a
prompt of 8 tokens, beside `import torch` alone; the gate is that all tools that compute in fp32 say the same token. C7: process
start to the end of the first step of a LoRA fine-tuning on 64 rows, beside the import of Fabric, and of it with torch's optimizer; and
of ours to its beginning, for the arithmetic of the step is no part of a start.
C5 and C7 have no gate: nobody's text or loss is compared.
All of it on CPU.
"""

import argparse
import functools
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extensions.benchmarks.artefacts import SHAPES, alpaca_prompt
from extensions.benchmarks.drive import artefacts, convert_for_litgpt, parser_of, resolve_places, versions_of
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
    word,
    write_results,
)

PROMPTS = {  # of 8 tokens, the one that stands for the beginning counted
    "135m": "The capital of France is the city of",  # SmolLM's
    "1.1b": "The capital of France is the city",  # Llama 2's
}
TOOLS = {  # that an id measures
    "C5": ("litlora", "litgpt", "trl"),
    "C6": ("litlora", "litgpt", "transformers", "llamafactory"),
    "C7": ("litlora", "litgpt", "trl", "llamafactory"),
}
AIM_HELP = 0.25  # seconds
AIM_BEYOND_TORCH = 0.5  # seconds over `import torch`
AIM_BEYOND_FABRIC = 1.0  # seconds over `import Fabric`
ROWS = 64  # of C7
READY = "litlora finetune lora, ready for the first step"  # no peer says when it is


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
        [tool for tools in TOOLS.values() for tool in tools],
        shape="135m",
        threads=default_threads(),
        repeats=5,
        quick="a tiny shape, once",
    )
    parser.add_argument("--ids", nargs="+", choices=TOOLS, default=list(TOOLS), help="what to measure (default: all)")
    parser.add_argument(
        "--tokenizer", type=Path, help="C6, C7: directory with the tokenizer.json of the shape (135m: SmolLM's, 1.1b: Llama 2's)"
    )
    args = parser.parse_args()
    if args.quick:
        args.shape, args.repeats = "tiny", 1
    elif {"C6", "C7"} & {*args.ids} and args.tokenizer is None:
        parser.error("C6 and C7 need --tokenizer (only --quick does without)")
    resolve_places(parser, args)
    return args


# ---- what is started -------------------------------------------------------------------------------------------------


def help_texts(args: argparse.Namespace) -> tuple[dict[str, Start], dict[str, str]]:
    ours, absent = args.python["litlora"], not_installed(args, *TOOLS["C5"])
    starts = {
        "python -c pass": Start([ours, "-c", "pass"]),
        "import jsonargparse": Start([ours, "-c", "import jsonargparse"]),
        "litlora --help": Start([ours, "-m", "litlora", "--help"]),
        "litlora finetune lora --help": Start([ours, "-m", "litlora", "finetune", "lora", "--help"]),
    }
    if "litgpt" not in absent:
        starts["litgpt --help"] = Start([args.python["litgpt"], "-m", "litgpt", "--help"])
        starts["litgpt finetune_lora --help"] = Start([args.python["litgpt"], "-m", "litgpt", "finetune_lora", "--help"])
    if "trl" not in absent:
        starts["trl --help"] = Start([str(trl_script(args)), "--help"])
    return starts, absent


def first_tokens(args: argparse.Namespace) -> tuple[dict[str, Start], dict[str, str]]:
    """Each tool at its defaults, and in fp32 where that is something else and the tool can."""
    place, prompt = artefacts(args), prompt_of(args.shape)
    base, once = str(place / "base"), ["--prompt", prompt, "--max_new_tokens", "1", "--temperature", "0"]
    in_fp32 = SHAPES[args.shape]["torch_dtype"] == "float32"  # what computes as the base is stored, computes so by default
    starts = {"import torch": imported(args.python["litlora"], "import torch")}
    absent = not_installed(args, *TOOLS["C6"])
    if "litgpt" not in absent:
        convert_for_litgpt(args.python["litgpt"], place)
        litgpt = [args.python["litgpt"], "-m", "litgpt", "generate", str(place / "litgpt"), *once]
        said, answer = functools.partial(said_by_litgpt, prompt), functools.partial(litgpt_answer, prompt)
        starts["litgpt generate (default)"] = Start(litgpt, said)
        starts["litgpt generate (32-true)"] = Start([*litgpt, "--precision", "32-true"], said, answer)
    if "transformers" not in absent:
        transformers = [args.python["transformers"], "-m", "extensions.benchmarks.first_token", base, prompt]
        starts["transformers"] = Start(transformers, bool, str.strip if in_fp32 else None)
        if not in_fp32:
            starts["transformers (float32)"] = Start([*transformers, "float32"], bool, str.strip)
    if "llamafactory" not in absent:
        judged = llamafactory_answer if in_fp32 else None  # whatever is asked for, it computes as the base is stored
        starts["llamafactory-cli chat"] = Start(llamafactory_chat(args, place / "base", prompt), said_by_llamafactory, judged)
    if "litlora" not in absent:
        litlora = [args.python["litlora"], "-m", "litlora", "generate", base, "--raw", *once]
        starts["litlora generate"] = Start(litlora, bool, str.strip)  # in fp32 on any CPU
    return starts, absent


def first_steps(args: argparse.Namespace) -> tuple[dict[str, Start], dict[str, str]]:
    """Each tool at its defaults, but for one optimizer step of 16 samples in fp32, LoRA of rank 16 on all projections without dropout,
    answers graded only, and no activations computed again: with memory enough that only costs the peers time. No validation before the
    step is asked for; litgpt looks at two batches all the same ("Verifying settings"), which is part of its start. Nobody finds what an
    earlier turn left in a cache: neither tokenized rows nor the base's fingerprint."""
    place = artefacts(args)
    rows = [{"instruction": f"Say {n} in words.", "input": "", "output": f"It is {n}." * 8} for n in range(ROWS)]
    (place / "rows.json").write_text(json.dumps(rows))
    ours, absent = args.python["litlora"], not_installed(args, *TOOLS["C7"])
    optimizer = "import torch; p = torch.ones(1, requires_grad=True); p.grad = torch.ones(1); torch.optim.AdamW([p]).step()"
    starts = {
        "import Fabric": imported(ours, "from lightning_fabric import Fabric"),
        "import torch, AdamW.step": imported(ours, optimizer),
    }
    if "litgpt" not in absent:
        starts["litgpt finetune_lora"] = Start(litgpt_finetune(args, place), lambda stdout: "(step)" in stdout)
    if "trl" not in absent:
        starts["trl sft"] = Start(trl_sft(args, place, rows), said_by_trainer)
    if "llamafactory" not in absent:
        starts["llamafactory-cli train"] = Start(llamafactory_train(args, place), said_by_trainer)
    words = ["finetune", "lora", str(place / "base"), "--data", str(place / "rows.json"), "--chat_template", "alpaca"]
    words += ["--train.max_steps", "1", "--eval.fraction", "0", "--out_dir", "{new}"]
    command = ["env", "XDG_CACHE_HOME={new}-cache", ours, "-m", "litlora", *words]
    begun = Start(both_outputs(command), lambda stdout: re.search(r"^trained +\S+ of ", stdout, re.MULTILINE) is not None)
    step = Start(both_outputs(command), lambda stdout: "step=1/1" in stdout)
    return starts | {READY: begun, "litlora finetune lora": step}, absent


# ---- the tools' commands, and what they say --------------------------------------------------------------------------


def not_installed(args: argparse.Namespace, *tools: str) -> dict[str, str]:
    lacking = [tool for tool in tools if missing(args.python[tool], [tool]) or (tool == "trl" and not trl_script(args).is_file())]
    return {tool: f"not installed (--python {tool}=PATH)" for tool in lacking}


def prompt_of(shape: str) -> str:
    return PROMPTS.get(shape, PROMPTS["135m"])


def trl_script(args: argparse.Namespace) -> Path:
    return Path(args.python["trl"]).with_name("trl")


def llamafactory_chat(args: argparse.Namespace, base: Path, prompt: str) -> list[str]:
    """Its chat reads questions from standard input until one is `exit`. Its template `empty` sets no beginning: if the tokenizer does, it
    is written out, with the blank that Llama's tokenizer puts before the first word by itself."""
    words = ["chat", "--model_name_or_path", str(base), "--template", "empty", "--infer_backend", "huggingface"]
    words += ["--infer_dtype", "float32", "--do_sample", "false", "--max_new_tokens", "1"]
    settings = json.loads((base / "tokenizer_config.json").read_text())
    typed = f"{settings['bos_token']} {prompt}" if settings.get("add_bos_token") else prompt
    said = f"{typed}\nexit"
    return ["bash", "-c", 'exec "${@:2}" <<< "$1"', "-", said, args.python["llamafactory"], "-m", "llamafactory.cli", *words]


def litgpt_finetune(args: argparse.Namespace, place: Path) -> list[str]:
    convert_for_litgpt(args.python["litgpt"], place)
    words = [
        "finetune_lora",
        str(place / "litgpt"),
        "--precision",
        "32-true",
        "--data",
        "JSON",
        "--data.json_path",
        str(place / "rows.json"),
    ]
    words += [
        "--lora_r",
        "16",
        "--lora_alpha",
        "32",
        "--lora_dropout",
        "0",
        "--lora_key",
        "true",
        "--lora_projection",
        "true",
        "--lora_mlp",
        "true",
    ]
    words += [
        "--data.mask_prompt",
        "true",
        "--data.val_split_fraction",
        "0.1",
        "--train.global_batch_size",
        "16",
        "--train.micro_batch_size",
        "4",
    ]
    words += ["--train.max_steps", "1", "--train.epochs", "1", "--eval.initial_validation", "false", "--out_dir", "{new}"]
    return [args.python["litgpt"], "-m", "litgpt", *words]


def trl_sft(args: argparse.Namespace, place: Path, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """It has no Alpaca prompt, and the base no chat template: it is given prompt and completion."""
    (place / "trl").mkdir(exist_ok=True)
    pairs = [{"prompt": alpaca_prompt(row), "completion": row["output"]} for row in rows]
    (place / "trl" / "rows.json").write_text(json.dumps(pairs))
    words = ["sft", "--model_name_or_path", str(place / "base"), "--dtype", "float32", "--dataset_name", str(place / "trl"), "--use_peft"]
    words += ["--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0", "--lora_target_modules", "all-linear"]
    words += ["--bf16", "false", "--gradient_checkpointing", "false"]
    return with_trainer([str(trl_script(args)), *words])


def llamafactory_train(args: argparse.Namespace, place: Path) -> list[str]:
    (place / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    words = ["train", "--stage", "sft", "--do_train", "--model_name_or_path", str(place / "base"), "--template", "alpaca"]
    words += ["--dataset", "rows", "--dataset_dir", str(place), "--finetuning_type", "lora", "--lora_rank", "16", "--lora_target", "all"]
    words += ["--disable_gradient_checkpointing", "true"]
    return with_trainer([args.python["llamafactory"], "-m", "llamafactory.cli", *words])


def with_trainer(command: Sequence[str]) -> list[str]:
    """One step of transformers' Trainer; rows that were tokenized before are not found again."""
    words = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4", "--logging_steps", "1"]
    words += ["--save_strategy", "no", "--report_to", "none", "--output_dir", "{new}"]
    return both_outputs(["env", "HF_DATASETS_CACHE={new}-cache", *command, *words])


def imported(python: str, program: str) -> Start:
    """Until that is done: ours does not wait either for the end of its process."""
    return Start([python, "-c", f"{program}; print('there', flush=True)"], lambda stdout: "there" in stdout)


def both_outputs(command: Sequence[str]) -> list[str]:
    """What it says on standard error comes on standard output as well."""
    return ["bash", "-c", 'exec "$@" 2>&1', "-", *command]


def said_by_litgpt(prompt: str, stdout: str) -> bool:
    """It prints its settings, and later the prompt and the answer on a line of their own."""
    return stdout.startswith(prompt) or f"\n{prompt}" in stdout


def litgpt_answer(prompt: str, stdout: str) -> str:
    return f"\n{stdout}".rpartition(f"\n{prompt}")[2].strip()


def said_by_llamafactory(stdout: str) -> bool:
    return bool(stdout.partition("Assistant: ")[2])


def llamafactory_answer(stdout: str) -> str:
    """It asks for the next question below the answer."""
    return stdout.partition("Assistant: ")[2].strip().removesuffix("User:").strip()


def said_by_trainer(stdout: str) -> bool:
    """A step's loss, not `train_loss` at the end."""
    return "{'loss':" in stdout


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, id: str, about: Mapping[str, Any], starts: Mapping[str, Start], absent: Mapping[str, str]) -> bool:
    """Run every start once to warm the file cache (not in --quick), then `repeats` times in turn; write the results; did all go well?"""
    runs: dict[str, list[Run]] = {name: [] for name in starts}
    for turn in range(1 if args.quick else 0, args.repeats + 1):
        print(f"{id}: {'warm-up' if turn == 0 else f'turn {turn}/{args.repeats}'}", file=sys.stderr, flush=True)
        for name, start in starts.items():
            with tempfile.TemporaryDirectory() as new:
                command = [word.replace("{new}", f"{new}/new") for word in start.command]
                done = run(command, env=thread_env(args.threads) | {"CUDA_VISIBLE_DEVICES": ""}, wanted=start.wanted)
            if turn > 0 or trouble(start, done):
                runs[name].append(done)
    failed = {name: why for name, several in runs.items() for each in several if (why := trouble(starts[name], each))}
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
        "versions": {tool: versions_of(args.python[tool]) for tool in TOOLS[id] if tool not in absent},
        "options": {"shape": args.shape, "repeats": args.repeats, "threads": args.threads, "quick": args.quick},
        "absent": dict(absent),
        "failed": failed,
        "seconds": seconds,
        "peak_mb": {name: median([each.peak_mb for each in several]) for name, several in good.items()},
        "cpu_seconds": {name: median([each.cpu for each in several]) for name, several in good.items()},
        "gate": {"passed": same, "answers": answers} if answers else None,
    }
    path = write_results(args.out_dir, id.lower(), result, markdown)
    print(f"{markdown}\n\nwritten: {path}\n")
    return same and not failed


def trouble(start: Start, done: Run) -> str | None:
    """Why this run does not count."""
    if done.code != 0:
        return f"exit code {done.code}: " + " | ".join(tail(done.stderr or done.stdout))
    if start.wanted is not None and done.first is None:
        return "what was waited for never came: " + " | ".join(tail(done.stdout))
    return None


def report(
    args: argparse.Namespace,
    id: str,
    about: Mapping[str, Any],
    good: Mapping[str, Sequence[Run]],
    seconds: Mapping[str, Sequence[float]],
    answers: Mapping[str, str],
    left_out: Mapping[str, str],
) -> str:
    ours = [name for name in seconds if name.startswith("litlora") and name != READY]
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
        lines.append(f"{name}: {took:.2f} s, aim {aim:.2f} s: {word(took <= aim)}.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
