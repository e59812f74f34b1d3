"""Bars of a benchmark's result: litlora, its peers and the limit, from the JSON that the benchmark wrote.

    python -m extensions.benchmarks.plot extensions/benchmarks/results/2026-11-21-c1.json --out c1.svg     # pip install "litlora[plot]"

Nothing is measured here, and nothing of two sittings stands in one picture.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS, PEER, LIMIT = "#2f6fde", "#a7adb8", "#c2452d"


@dataclass(frozen=True)
class Bars:
    title: str
    unit: str
    more_is_better: bool
    values: Mapping[str, float]  # tool -> figure
    limit: float | None  # what cannot be passed
    limit_is: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("result", type=Path, help="a JSON file of extensions/benchmarks/results")
    parser.add_argument("--id", help="what of it to draw (default: what the result is of; C2 is the memory of a C1)")
    parser.add_argument("--out", type=Path, required=True, help="the picture: .svg, .png or .pdf")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text())
    read = READERS.get((arguments.id or str(result.get("id"))).upper())
    if read is None:
        raise SystemExit(f"{arguments.result}: no bars are drawn of {arguments.id or result.get('id')!r}, only of {', '.join(READERS)}")
    draw(read(result), caption(arguments.result, result), arguments.out)
    print(arguments.out)


# ---- reading -----------------------------------------------------------------------------------------------------------


def training(result: Mapping[str, Any]) -> Bars:
    """C1. The limit is what the tokens of our line would take at the rate of a plain product, measured in the same processes."""
    summary = result["summary"]
    ours = summary["litlora"]
    limit = ours["real_tokens_per_second"] / ours["share_of_gemm"] if ours.get("share_of_gemm") else None
    values = {name: line["real_tokens_per_second"] for name, line in summary.items()}
    shape, graded = result["options"]["shape"], "prompts graded too" if result["options"]["grade"] == "all" else "answers graded"
    return Bars(
        f"LoRA fine-tuning on a CPU, {shape} shape, {graded}", "real tokens a second", True, values, limit, "every product at full rate"
    )


def memory(result: Mapping[str, Any]) -> Bars:
    """C2, of a result of C1."""
    values = {name: line["peak_mb"] / 1000 for name, line in result["summary"].items()}
    return Bars(f"Memory of LoRA fine-tuning on a CPU, {result['options']['shape']} shape", "GB at the peak", False, values, None, "")


def decoding(result: Mapping[str, Any]) -> Bars:
    """C3, after the shortest prompt. The limit is that of our plain line: every weight is read once a token."""
    summary = result["summary"]
    values = {name: line["prompts"][0]["tokens_per_second"] for name, line in summary.items()}
    options = result["options"]
    return Bars(
        f"Decoding on a CPU, {options['shape']} shape, {options['precision']}, one answer at a time",
        "tokens a second",
        True,
        values,
        summary["litlora"]["limit_tokens_per_second"],
        f"{options['precision']} weights read once a token",
    )


def merging(result: Mapping[str, Any]) -> Bars:
    """C4."""
    values = {name: statistics.median(tool["wall_s"]) for name, tool in result["tools"].items()}
    limit = values.pop("cp + fsync")
    return Bars(
        f"Merging a LoRA into a {result['shape']} base",
        "seconds, process start included",
        False,
        values,
        limit,
        "cp and fsync of the same file",
    )


def starting(result: Mapping[str, Any]) -> Bars:
    """C5, C6 and C7: the tools beside what each of them cannot do without."""
    what, floor = FLOORS[str(result["id"]).upper()]
    values = {name: statistics.median(seconds) for name, seconds in result["seconds"].items()}
    tools = {name: value for name, value in values.items() if not name.startswith(("import ", "python "))}
    return Bars(what, "seconds", False, tools, values[floor], floor)


FLOORS = {
    "C5": ("Help texts", "python -c pass"),
    "C6": ("Process start to the first token", "import torch"),
    "C7": ("Process start to the first step of a fine-tuning", "import Fabric"),
}
READERS: dict[str, Callable[[Mapping[str, Any]], Bars]] = {
    "C1": training, "C2": memory, "C3": decoding, "C4": merging, "C5": starting, "C6": starting, "C7": starting,
}  # fmt: skip


def caption(path: Path, result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return f"{path.stem[:10]} · {machine['cpu']}, {machine['threads']} threads · extensions/benchmarks/results/{path.name}"


# ---- drawing -----------------------------------------------------------------------------------------------------------


def draw(bars: Bars, caption: str, path: Path) -> None:
    from matplotlib.figure import Figure

    names = sorted(bars.values, key=lambda name: bars.values[name], reverse=not bars.more_is_better)
    ours = bars.values["litlora" if "litlora" in names else next(name for name in names if name.startswith("litlora"))]
    figure = Figure(figsize=(8, 1.3 + 0.42 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    values = [bars.values[name] for name in names]
    axes.barh(names, values, color=[OURS if name.startswith("litlora") else PEER for name in names])
    for row, value in enumerate(values):
        ours_over_it = ours / value if bars.more_is_better else value / ours
        compared = "" if names[row].startswith("litlora") else f"  (litlora: {ours_over_it:.2f}x)"
        axes.annotate(f" {value:.3g}{compared}", (value, row), va="center")
    if bars.limit is not None:
        axes.axvline(bars.limit, color=LIMIT, linestyle="--")
        axes.annotate(
            f"{bars.limit_is}: {bars.limit:.3g} ",
            (bars.limit, 1.0),
            xycoords=("data", "axes fraction"),
            color=LIMIT,
            ha="center",
            va="bottom",
        )
    axes.set_xlim(0, 1.25 * max([*values, bars.limit or 0]))
    axes.set_xlabel(f"{bars.unit} ({'more' if bars.more_is_better else 'less'} is better)")
    axes.set_title(bars.title, loc="left", pad=22)
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0, -0.02, caption, fontsize=7, color="#666666")
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
