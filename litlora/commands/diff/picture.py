"""The difference as a map, a row for each layer and a column for each module: on a terminal in colours, elsewhere a table, or a PNG."""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litlora.commands.diff.measure import Difference, Sums, added
from litlora.errors import UserError

SHORT = {"self_attn": "attn", "input_layernorm": "norm 1", "post_attention_layernorm": "norm 2"}
SHORT |= {"pre_feedforward_layernorm": "norm 3", "post_feedforward_layernorm": "norm 4"}  # and q_proj is q
# Of the 256 colours of terminals, dark to light, as the eye orders them: from the smallest difference to the largest (viridis, roughly).
HEAT = (53, 54, 24, 30, 36, 72, 113, 148, 184, 226)
DARK = (53, 54, 24, 88, 124)  # of both, those that want light letters
TURN = (88, 124, 131, 138, 244, 108, 71, 34, 40)  # cosine: -1 red, 0 grey, 1 green


def short(module: str) -> str:
    return ".".join(SHORT.get(word, word.removesuffix("_proj")) for word in module.split("."))


def layers_of(difference: Difference) -> list[str]:
    """Rows of the map, in the model's order: 3, then 3+ (the new block after it)."""
    found = {layer for layer, _ in difference.cells() if layer}
    return sorted(found, key=lambda layer: (int(layer.rstrip("+")), layer.endswith("+")))


def modules_of(difference: Difference) -> list[str]:
    """Columns of the map: the modules that differ in some layer."""
    return list(dict.fromkeys(module for (layer, module), sums in difference.cells().items() if layer and not sums.equal))


# ---- in text ---------------------------------------------------------------------------------------------------------


def in_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def heat_map(difference: Difference, *, colours: bool, cosine: bool = False) -> str:
    """Lines of cells: how far a module is apart in percent of A's, or the cosine of the two updates. `=` is the same bit for bit."""
    cells, layers, modules = difference.cells(), layers_of(difference), modules_of(difference)
    far = [value.relative for (layer, _), value in cells.items() if layer and value.relative > 0 and math.isfinite(value.relative)]
    low, high = limits(far)
    heads = [*(short(module) for module in modules), *([] if len(modules) < 2 else ["all"])]
    widths = [max(6, len(head)) for head in heads]
    lines = [" ".join(["layer", *(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))])]
    for layer in layers:
        row = [cells.get((layer, module)) for module in modules]
        texts = [cell(value, cosine) for value in row]
        if len(modules) > 1:
            texts.append(cell(added(value for (its, _), value in cells.items() if its == layer), cosine))  # with what is no column
        padded = [f"{text:>{width}} " for text, width in zip(texts, widths, strict=True)]
        if colours:
            padded = [painted(text, value, low, high, cosine) for text, value in zip(padded, [*row, None][: len(padded)], strict=True)]
        lines.append("".join([f"{layer:>5} ", *padded]).rstrip())
    return "\n".join(lines)


def cell(value: Sums | None, cosine: bool) -> str:
    if value is None:
        return ""
    if cosine:
        return "" if value.cosine is None else f"{value.cosine:.2f}"
    return percent(value)


def percent(value: Sums) -> str:
    """Three digits of a percentage; `=` where every bit is the same."""
    if value.equal:
        return "="
    if not math.isfinite(value.relative):
        return "new"
    far = 100 * value.relative
    return (
        f"{far:.2g}"
        if far < 0.01
        else f"{far:.3f}"
        if far < 1
        else f"{far:.2f}"
        if far < 10
        else f"{far:.1f}"
        if far < 1000
        else f"{far:.0g}"
    )


def painted(text: str, value: Sums | None, low: float, high: float, cosine: bool) -> str:
    """A cell on its colour: dark for little, light for much, by the logarithm."""
    if value is None or (value.cosine is None if cosine else value.equal):
        return text
    colours = TURN if cosine else HEAT
    where = ((value.cosine or 0.0) + 1) / 2 if cosine else math.log(value.relative / low) / math.log(high / low)
    shade = colours[round(max(0.0, min(1.0, where)) * (len(colours) - 1))] if math.isfinite(where) else colours[-1]
    return f"\x1b[48;5;{shade};38;5;{255 if shade in DARK else 16}m{text}\x1b[0m"


# ---- as a PNG --------------------------------------------------------------------------------------------------------


def check_plot(path: str) -> None:
    """UserError where no picture could be drawn there, before anything is computed."""
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError("is no name of a picture", where=path, hint="end it in .png, .svg or .pdf")
    if not Path(path).absolute().parent.is_dir():
        raise UserError("there is no such directory", where=Path(path).absolute().parent)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("a picture needs matplotlib, which is not installed", where="--plot", hint='pip install "litlora[plot]"') from error


def draw(difference: Difference, path: str, a: str, b: str) -> None:
    """The map of differences, and beside it that of cosines where there is one."""
    import matplotlib.colors
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, modules, cells = layers_of(difference), modules_of(difference), difference.cells()
    values = [[cells.get((layer, module)) for module in modules] for layer in layers]
    far = [[math.nan if one is None or one.equal else 100 * one.relative for one in row] for row in values]
    known = [value for row in far for value in row if math.isfinite(value) and value > 0]
    low, high = limits(known)
    panels: list[tuple[list[list[float]], str, str, matplotlib.colors.Normalize, list[float], str]] = []
    ticks = [low * (high / low) ** (part / 4) for part in range(5)]
    panels.append((far, "||B - A|| in % of ||A||", "viridis", matplotlib.colors.LogNorm(low, high), ticks, "{:.2g}"))
    if difference.has_updates:
        way = [[math.nan if one is None or one.cosine is None else one.cosine for one in row] for row in values]
        panels.append((way, "cosine of the two updates", "RdYlGn", matplotlib.colors.Normalize(-1, 1), [-1, -0.5, 0, 0.5, 1], "{:.2f}"))
    width = 1.8 + max(2.4, 0.62 * len(modules))
    figure = Figure(figsize=(max(4.5, len(panels) * width), 1.9 + max(0.9, 0.3 * len(layers))), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"A: {shortened(a)}\nB: {shortened(b)}", fontsize=9, x=0.01, ha="left")
    if not modules:
        figure.text(0.5, 0.4, "no module of any layer differs", ha="center", fontsize=9)
        panels = []
    for number, (numbers, title, colours, norm, ticks, form) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        axes.set_facecolor("#e8e8e8")  # the same bit for bit, or not there
        image = axes.imshow(numbers, cmap=colours, norm=norm, aspect="auto")
        axes.set_xticks(range(len(modules)), [short(module) for module in modules], rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(layers)), layers, fontsize=8)
        axes.set_ylabel("layer")
        axes.set_title(title, fontsize=9)
        if len(layers) <= 40:
            write_numbers(axes, image, numbers, form)
        bar = figure.colorbar(image, ax=axes)
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks], fontsize=7)
        bar.minorticks_off()
    figure.savefig(path, dpi=150)


def limits(known: Sequence[float]) -> tuple[float, float]:
    """Both ends of a scale, at least a factor of two apart."""
    low, high = (min(known), max(known)) if known else (0.1, 1.0)
    return (low, high) if high >= 2 * low else (high / 2, high)


def write_numbers(axes: Any, image: Any, numbers: Sequence[Sequence[float]], form: str) -> None:
    for y, row in enumerate(numbers):
        for x, value in enumerate(row):
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                axes.text(x, y, form.format(value), ha="center", va="center", fontsize=6.5, color="white" if dark else "black")


def shortened(text: str, most: int = 90) -> str:
    return text if len(text) <= most else f"...{text[3 - most :]}"
