"""C8: how long training stands still for a checkpoint, and how many bytes it takes.

    python -m extensions.benchmarks.checkpoint_c8 --rows ALPACA.json --before TREE

The same LoRA (r 16, all projections) on the same base and rows, by each tool in a process of its own and in turn. `stands still`: how
long saving keeps the next step waiting, the median over all checkpoints but the last. `litlora-waiting` writes as a whole model that is
too large to copy is written; `before` is another checkout of litlora, for comparison in the same sitting. Bytes are compared with what
must be there: the adapter and AdamW's two moments, 12 bytes a trained parameter.
"""

import argparse
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
    run_json,
    table,
    tail,
    thread_env,
    versions,
    write_results,
)

LINES = ("trainer", "before", "litlora-waiting", "litlora")
MB = 10**6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m", help="of the base, as artefacts.py makes it")
    parser.add_argument("--base", type=Path, help="instead: a Hugging Face directory")
    parser.add_argument("--rows", type=Path, required=True, help="an Alpaca JSON file")
    parser.add_argument("--before", type=Path, help="another checkout of litlora")
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--longest", type=int, default=128, help="longest sample, in tokens")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--work_dir", type=Path, default=default_work_dir())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    base = args.base or args.work_dir / args.shape / "base"
    if args.base is None:
        made = run([sys.executable, "-m", "extensions.benchmarks.artefacts", "--shape", args.shape, "--work_dir", str(args.work_dir)])
        if made.code:
            print(*tail(made.stderr), sep="\n", file=sys.stderr)
            return 1
    lines = [name for name in args.lines if name != "before" or args.before]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in lines}
    for _ in range(args.repeats):
        for name in lines:
            found[name].append(one(name, base, args))
            print(name, found[name][-1].get("failed") or f"stood still {median(found[name][-1]['stood']):.3f} s", file=sys.stderr)
    about = {
        "machine": machine(args.threads),
        "versions": versions(),
        "arguments": {key: plain(value) for key, value in vars(args).items()},
    }
    of = base.name if args.base else args.shape
    text = f"# C8: one checkpoint, {of}, a checkpoint every {args.every} steps of 4 samples\n\n{shown(found)}"
    print(write_results(args.out, "c8", {**about, "lines": found}, text))
    print(text)
    return int(any("failed" in result for results in found.values() for result in results))


def plain(value: Any) -> Any:
    """Of a place its last word: where it lies on this machine is nobody's business."""
    return value.name if isinstance(value, Path) else value


def one(name: str, base: Path, args: argparse.Namespace) -> dict[str, Any]:
    out = args.work_dir / "c8" / name
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    tool = "litlora" if name == "before" else name
    script = Path(__file__).with_name("run_checkpoint.py")
    command = [sys.executable, str(script), tool, "--base", str(base), "--rows", str(args.rows), "--out", str(out)]
    for option in ("steps", "every", "longest", "threads"):
        command += [f"--{option}", str(getattr(args, option))]
    environment = dict(thread_env(args.threads)) | ({"PYTHONPATH": str(args.before)} if name == "before" else {})
    result = run_json(command, env=environment)
    shutil.rmtree(out, ignore_errors=True)
    return result


def shown(found: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for name, results in found.items():
        good = [result for result in results if "failed" not in result]
        if not good:
            continue
        step = median([seconds for result in good for seconds in result["steps"][1:]])
        stood = [seconds for result in good for seconds in result["stood"]]
        files = good[0]["files"]
        adapter = next(size for file, size in files.items() if file.startswith("adapter_model"))
        rows.append(
            {
                "tool": name,
                "s a step": f"{step:.3f}",
                "stands still, s": f"{median(stood):.3f}",
                "at most": f"{max(stood):.3f}",
                "in steps": f"{median(stood) / step:.2f}",
                "bytes, MB": f"{sum(files.values()) / MB:.2f}",
                "over adapter + moments": f"{sum(files.values()) / (3 * adapter) - 1:+.2%}",
            }
        )
    failed = [f"{name}: {results[0]['failed']}" for name, results in found.items() if results and "failed" in results[0]]
    return "\n".join([table(rows) if rows else "nothing ran", *failed])


if __name__ == "__main__":
    sys.exit(main())
