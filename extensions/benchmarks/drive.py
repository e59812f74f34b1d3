"""What the drivers share: their options, which lines can run here, and processes one after another."""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from extensions.benchmarks.artefacts import SHAPES
from extensions.benchmarks.measure import default_work_dir, missing, run, run_json, tail, thread_env

RESULTS = Path(__file__).parent / "results"


def parser_of(
    description: str | None, tools: Collection[str], *, shape: str, threads: int, repeats: int, quick: str
) -> argparse.ArgumentParser:
    """With the options that every driver has: what is measured, the defaults, and what --quick does."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.set_defaults(tools=[*dict.fromkeys(tools)])
    known = ", ".join(dict.fromkeys(tools))
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PATH", help=f"interpreter of {known} (default: this one)")
    parser.add_argument("--shape", choices=SHAPES, default=shape)
    parser.add_argument("--threads", type=int, default=threads, help="of the CPU" if threads else "of the CPU; 0: as torch likes")
    parser.add_argument("--repeats", type=int, default=repeats, help="turns, or answers that are timed")
    parser.add_argument("--work_dir", type=Path, default=default_work_dir(), help="bases and samples are kept here between runs")
    parser.add_argument("--out_dir", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help=f"{quick}: does everything start?")
    return parser


def resolve_places(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """`args.python` becomes each tool's interpreter, `args.work_dir` absolute."""
    chosen = dict(pair.partition("=")[::2] for pair in args.python)
    if unknown := set(chosen) - set(args.tools):
        parser.error(f"--python: no tool {', '.join(sorted(unknown))}")
    args.python = {tool: chosen.get(tool, sys.executable) for tool in args.tools}
    args.work_dir = args.work_dir.resolve()


def present(args: argparse.Namespace, needs: Mapping[str, tuple[str, Sequence[str]]]) -> tuple[list[str], dict[str, str]]:
    """Of lines with their tool and its modules those that can run here, and why the others cannot."""
    lines, absent = [], {}
    for name, (tool, modules) in needs.items():
        if lacking := missing(args.python[tool], modules):
            absent[name] = f"{', '.join(lacking)} not installed (--python {tool}=PATH)"
            print(f"left out: {name}: {absent[name]}", file=sys.stderr)
        else:
            lines.append(name)
    return lines, absent


def take_turns(args: argparse.Namespace, id: str, lines: Sequence[str], command_of: Callable[[str], Sequence[str]]) -> list[dict[str, Any]]:
    """What each line's process found, the lines in turn, several times over."""
    assert lines, "none of the lines can run here"
    runs: list[dict[str, Any]] = []
    for turn in range(args.repeats):
        for name in lines:
            print(f"turn {turn + 1}/{args.repeats}: {name}", file=sys.stderr, flush=True)
            runs.append({"line": name, "turn": turn} | run_json(command_of(name), env=thread_env(args.threads)))
            (args.work_dir / f"{id}_runs.json").write_text(json.dumps(runs))  # so that an hour is not lost to what follows
            if "failed" in runs[-1]:
                print(f"  failed: {runs[-1]['failed']}", file=sys.stderr)
    return runs


def versions_of(python: str) -> dict[str, Any]:
    return run_json([python, "-c", "import json; from extensions.benchmarks.measure import versions; print(json.dumps(versions()))"])


# ---- what they run on ------------------------------------------------------------------------------------------------


def artefacts(args: argparse.Namespace, *words: str) -> Path:
    """The directory of the shape's base and what was made of it."""
    command = [sys.executable, "-m", "extensions.benchmarks.artefacts", "--work_dir", str(args.work_dir), "--shape", args.shape, *words]
    must(command + (["--tokenizer", str(args.tokenizer.resolve())] if args.tokenizer else []))
    place: Path = args.work_dir / args.shape
    return place


def convert_for_litgpt(python: str, place: Path) -> None:
    """litgpt's copy of the base, once per base."""
    made_of, copy = (place / "base" / "made_of.json").read_text(), place / "litgpt" / "made_of.json"
    if not copy.is_file() or copy.read_text() != made_of:
        must([python, "-m", "extensions.benchmarks.run_litgpt", "--convert", str(place / "base"), str(place / "litgpt")])
        copy.write_text(made_of)


def must(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
    done = run(command, env=env)
    if done.code != 0:
        sys.exit(f"{' '.join(command[1:4])} failed: " + "\n".join(tail(done.stderr, 20)))
