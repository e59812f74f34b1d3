"""C4: merging a LoRA on all linears into a 1.1B bf16 base, litlora against its peers, beside `cp` and fsync of the base's file.

Each tool runs in a process of its own, interpreter start included, in turn with the others, and everything that it reads is in the
system's cache. Peers end when the last byte is handed to the system; ours waits for the disk, as `cp + fsync` does, and hashes what it
wrote. The gate: what every tool has written is compared with fp64, and ours must be rounded once.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extensions.benchmarks.drive import artefacts, convert_for_litgpt, must, parser_of, present, resolve_places, versions_of
from extensions.benchmarks.measure import Run, default_threads, median, run, run_json, table, tail, thread_env, word, write_results

OURS = "litlora"
LIMIT = "cp + fsync"
AIM_TIMES, AIM_MB = 2.0, 150  # of the limit's time; of memory
TOLERATED = 2.0  # steps of bf16 that a peer may be off: rounding the change and the sum apart makes one, and not merging many
MB = 10**6


@dataclass(frozen=True)
class Line:
    """One line of the table: a tool with its settings."""

    tool: str
    needs: tuple[str, ...]  # modules
    what: str
    precision: str = ""  # litgpt's, that the adapter was trained in


LINES = {
    "litgpt": Line("litgpt", ("litgpt",), "merge_lora, adapter in fp32 as its default leaves it", "bf16-mixed"),
    "litgpt-bf16": Line("litgpt", ("litgpt",), "merge_lora, adapter in bf16", "bf16-true"),
    "peft": Line("peft", ("transformers", "peft"), "merge_and_unload, save_pretrained"),
    "llamafactory": Line("llamafactory", ("llamafactory",), "export"),
    OURS: Line(OURS, (OURS,), "merge_lora"),
    "litlora-unseen": Line(OURS, (OURS,), "base not seen before: it is read twice"),
}


@dataclass(frozen=True)
class Places:
    """Where things lie: the base and litgpt's copy of it as every benchmark shares them, and what is merged beside them."""

    shared: Path

    @property
    def base(self) -> Path:
        return self.shared / "base"

    @property
    def weights(self) -> Path:
        return self.base / "model.safetensors"

    @property
    def step(self) -> Path:
        return self.shared / "merge" / "run" / "step-100"

    @property
    def cache(self) -> Path:
        return self.shared / "merge" / "cache"

    @property
    def env(self) -> dict[str, str]:
        return {"XDG_CACHE_HOME": str(self.cache)}

    @property
    def out(self) -> Path:
        return self.shared / "merge" / "out"

    def of_litgpt(self, line: str) -> Path:
        return self.shared / "merge" / line


def main() -> int:
    args = read_arguments()
    lines, absent = present(args, {name: (LINES[name].tool, LINES[name].needs) for name in args.lines})
    places = prepare(args, lines)
    about = run_json([sys.executable, "-m", "extensions.benchmarks.measure", str(args.threads)], env=thread_env(args.threads))
    runs: dict[str, list[Run]] = {name: [] for name in (LIMIT, *lines)}
    written, checks, failed = {}, {}, {}
    for turn in range(args.repeats):
        for name in runs:
            if name in failed:
                continue
            print(f"turn {turn + 1}/{args.repeats}: {name}", file=sys.stderr, flush=True)
            done, written[name] = measured(args, places, name)
            runs[name].append(done)
            if done.code != 0:
                failed[name] = f"exit code {done.code}: " + " | ".join(tail(done.stderr or done.stdout))
                print(f"  failed: {failed[name]}", file=sys.stderr)
            elif name != LIMIT and turn == args.repeats - 1:
                checks[name] = checked(places)
    shutil.rmtree(places.out)
    good = {name: several for name, several in runs.items() if name not in failed}
    summary, gate = summarise(good, written), judge(checks)
    markdown = report(args, about, {**absent, **failed}, summary, gate)
    result = {
        "id": "C4",
        "machine": about,
        "versions": {name: versions_of(args.python[LINES[name].tool]) for name in lines},
        "shape": args.shape,
        "options": {key: getattr(args, key) for key in ("repeats", "threads", "quick")},
        "absent": absent,
        "failed": failed,
        "gate": gate,
        "tools": summary,
    }
    path = write_results(args.out_dir, "c4", result, markdown)
    print(f"{markdown}\n\nwritten: {path}")
    return 0 if gate["passed"] and not failed else 1


# ---- before ----------------------------------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    tools = [line.tool for line in LINES.values()]
    parser = parser_of(__doc__, tools, shape="1.1b", threads=default_threads(), repeats=3, quick="a tiny shape in bf16, once")
    parser.add_argument(
        "--tokenizer", type=Path, help="directory with a tokenizer.json to lie beside the base (default: a tiny one is made)"
    )
    parser.add_argument(
        "--lines", nargs="+", choices=LINES, default=list(LINES), help="what to run beside cp, in this order (default: all)"
    )
    args = parser.parse_args()
    if args.quick:
        args.shape, args.repeats = "tiny-bf16", 1
    resolve_places(parser, args)
    return args


def prepare(args: argparse.Namespace, lines: Sequence[str]) -> Places:
    """The base, the adapter as ours and PEFT read it, and for litgpt both of them in its layout. Making the adapter reads the base's
    fingerprint: into the cache that the timed lines use, so that litlora has seen the base from the first turn on."""
    places = Places(artefacts(args))
    shutil.rmtree(places.shared / "merge", ignore_errors=True)
    must([sys.executable, "-m", "extensions.benchmarks.merge_files", "step", str(places.base), str(places.step)], env=places.env)
    assert has_seen(places), "the base's fingerprint was not remembered: litlora would be timed as litlora-unseen is"
    for name in (name for name in lines if LINES[name].tool == "litgpt"):
        python = args.python["litgpt"]
        convert_for_litgpt(python, places.shared)
        words = [str(places.shared / "litgpt"), str(places.step), str(places.of_litgpt(name)), LINES[name].precision]
        must([python, "-m", "extensions.benchmarks.run_merge", "litgpt-adapter", *words])
    return places


def has_seen(places: Places) -> bool:
    remembered = places.cache / "litlora" / "fingerprints.json"
    return remembered.is_file() and any(key.startswith(f"{places.weights.resolve()}|") for key in json.loads(remembered.read_text()))


# ---- measuring -------------------------------------------------------------------------------------------------------


def command_of(args: argparse.Namespace, places: Places, name: str) -> list[str]:
    base, step, out = str(places.base), str(places.step), str(places.out / "merged")
    if name == LIMIT:
        return ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(places.weights), str(places.out / "copy")]
    tool = LINES[name].tool
    words = {
        "litgpt": ["litgpt", "merge_lora", out],
        "peft": ["extensions.benchmarks.run_merge", "peft", base, step, out],
        "llamafactory": [
            *("llamafactory.cli", "export", "--model_name_or_path", base, "--adapter_name_or_path", step),
            *("--template", "default", "--export_dir", out),
        ],
        OURS: ["litlora", "merge_lora", step, "--out_dir", out],
    }[tool]
    return [args.python[tool], "-m", *words]


def measured(args: argparse.Namespace, places: Places, name: str) -> tuple[Run, int]:
    """One run, and the bytes it wrote: before it what is still unwritten goes to the disk, and what it reads into the cache."""
    shutil.rmtree(places.out, ignore_errors=True)
    places.out.mkdir()
    if name == "litlora-unseen":
        shutil.rmtree(places.cache, ignore_errors=True)
    litgpt = name in LINES and LINES[name].tool == "litgpt"
    if litgpt:  # it writes beside the adapter
        shutil.copytree(places.of_litgpt(name), places.out / "merged")
    before = size_of(places.out)
    run(["sync"])
    with open(places.shared / "litgpt" / "lit_model.pth" if litgpt else places.weights, "rb", buffering=0) as file:
        while file.read(2**22):
            pass
    done = run(command_of(args, places, name), env=places.env | thread_env(args.threads))
    return done, size_of(places.out) - before


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def checked(places: Places) -> dict[str, Any]:
    words = [str(place) for place in (places.base, places.step, places.out / "merged")]
    return run_json([sys.executable, "-m", "extensions.benchmarks.merge_files", "check", *words])


def judge(checks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Ours is rounded once and changes nothing else; a peer has at least merged. What a tool wrote and how far it is off is told of all."""

    def right(name: str, found: Mapping[str, Any]) -> bool:
        close = found.get("of_bound", 2) <= 1 if name.startswith(OURS) else found.get("units", 2 * TOLERATED) <= TOLERATED
        return close and found["untouched_same"]

    wrong = [name for name, found in checks.items() if not right(name, found)]
    return {"passed": not wrong and any(name.startswith(OURS) for name in checks), "wrong": wrong, "checks": dict(checks)}


# ---- reporting -------------------------------------------------------------------------------------------------------


def summarise(runs: Mapping[str, Sequence[Run]], written: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Ratios are taken within a turn."""

    def over(several: Sequence[Run], beside: str) -> float | None:
        if beside not in runs:
            return None
        return round(median([one.wall / other.wall for one, other in zip(several, runs[beside], strict=True)]), 3)

    return {
        name: {
            "wall_s": [round(one.wall, 3) for one in several],
            "ratio": over(several, LIMIT),
            "over_litlora": over(several, OURS),
            "cpu_s": round(median([one.cpu for one in several]), 2),
            "peak_mb": round(max(one.peak_mb for one in several), 1),
            "bytes_written": written[name],
        }
        for name, several in runs.items()
    }


def report(
    args: argparse.Namespace,
    about: Mapping[str, Any],
    left_out: Mapping[str, str],
    summary: Mapping[str, Mapping[str, Any]],
    gate: Mapping[str, Any],
) -> str:
    rows = []
    for name, tool in summary.items():
        found = gate["checks"].get(name, {})
        times = {key: "-" if tool[key] is None else f"{tool[key]:.2f}" for key in ("ratio", "over_litlora")}
        row = {
            "": f"{name} ({LINES[name].what})" if name in LINES else name,
            "wall, median": f"{median(tool['wall_s']):.2f} s",
            "x cp + fsync": times["ratio"],
            "over litlora": times["over_litlora"],
            "CPU": f"{tool['cpu_s']:.2f} s",
            "peak memory": f"{tool['peak_mb']:,.0f} MB",
            "written": f"{tool['bytes_written'] / MB:,.0f} MB",
            "as": found.get("dtype", "-"),
            "worst error": f"{found['units']:.2f}" if "units" in found else "-",
        }
        rows.append(row)
    ours = {name: each for name, each in gate["checks"].items() if name.startswith(OURS) and "of_bound" in each}
    bounds = ", ".join(f"{name} {each['of_bound']:.4f}" for name, each in ours.items())
    return "\n".join(
        [
            f"# C4: merging a LoRA, {args.shape}{' (quick: says only that it starts)' if args.quick else ''}",
            "",
            f"{about.get('cpu', '?')}, {args.threads} threads; {args.repeats} turns, warm file cache, process start included.",
            "",
            table(rows),
            "",
            "`worst error`: the farthest from fp64 among the rows looked at, in steps of bf16; rounded once it is at most 0.5.",
            "",
            *verdicts(summary),
            f"Gate (ours within one rounding, peers within {TOLERATED:.0f} steps, untouched tensors as they were): "
            f"{'passed' if gate['passed'] else 'FAILED'}; error over its bound: {bounds}.",
            *[f"Wrong: {name}: {gate['checks'][name]}" for name in gate["wrong"]],
            *[f"Left out: {name}: {why}" for name, why in left_out.items()],
        ]
    )


def verdicts(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the aims of PERFORMANCE.md say about ours."""

    return [
        f"{name}: {tool['ratio']:.2f}x {LIMIT}, aim {AIM_TIMES:.0f}x: {word(tool['ratio'] <= AIM_TIMES)}; "
        f"{tool['peak_mb']:.0f} MB, aim {AIM_MB} MB: {word(tool['peak_mb'] <= AIM_MB)}."
        for name, tool in summary.items()
        if name.startswith(OURS) and tool["ratio"] is not None
    ]


if __name__ == "__main__":
    sys.exit(main())
