"""`litlora diff A B`: how two checkpoints differ, of whatever kind: settings, tensors, and how far each module is apart.

measure.py   what differs
picture.py   the map of layers and modules
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.commands.diff.measure import Difference, Sums, compare
from litlora.commands.diff.picture import check_plot, draw, heat_map, in_colours, modules_of, percent, short
from litlora.console import Progress, counted, put_json, show
from litlora.errors import UserError, WorkError, printable
from litlora.options import Diff

BIG = 256 * 2**20  # bytes of weights from which on a progress line is worth it
MANY = 12  # lines of one kind that are shown to a person; --json has them all


def diff(options: Diff) -> None:
    """Print what differs. The exit code is 0 either way; with `--exit_code` it is 1 where anything does (WorkError)."""
    from litlora.checkpoint.resolve import resolve

    if options.checkpoint_dir is None or options.other_dir is None:
        raise UserError("two checkpoints are needed", hint="litlora diff out/step-100 out/step-200")
    if options.plot:
        check_plot(options.plot)
    a, b = (resolve(path, base_dir=options.base_dir) for path in (options.checkpoint_dir, options.other_dir))
    size = sum(path.stat().st_size for path in {*a.shards().values(), *b.shards().values()})
    with Progress(0, "tensors", quiet=options.json or size < BIG) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        difference = compare(a, b, update)
    if options.plot:
        draw(difference, options.plot, str(a.path), str(b.path))
    if options.json:
        put_json(as_json(difference, a, b), indent=2)
    else:
        show("\n".join(lines(difference, a, b)))
    if options.exit_code and not difference.is_equal:
        raise WorkError(f"differs from {a.path}", where=b.path)


# ---- for a person ----------------------------------------------------------------------------------------------------


def lines(difference: Difference, a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    yield from map(printable, described(difference, a, b))
    if not difference.is_equal:
        yield from maps(difference)


def described(difference: Difference, a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """All but the maps. Names in it may be of somebody else's choice."""
    yield f"A  {a.path}: {kind(a)}"
    yield f"B  {b.path}: {kind(b)}"
    if difference.same_base is not None:
        one_is_it = difference.same_base and (a.is_model or b.is_model)
        yield "base: one of them is the other's base" if one_is_it else f"base: {'the same' if difference.same_base else 'not the same'}"
    for part, pairs in difference.fields.items():
        for key, (mine, theirs) in list(pairs.items())[:MANY]:
            yield f"{part}  {key}: {shown(mine)} -> {shown(theirs)}"
        if len(pairs) > MANY:
            yield f"{part}  and {len(pairs) - MANY} more (--json lists them)"
    for side, alone in (("A", difference.only_in_a), ("B", difference.only_in_b)):
        told = list(alone_in_words(alone))
        yield from (f"only in {side}  {line}" for line in told[:MANY])
        if len(told) > MANY:
            yield f"only in {side}  and {len(told) - MANY} more (--json lists them)"
    if difference.is_equal:
        yield "nothing differs: every number is the same, bit for bit"
        return
    yield from in_words(difference)


def alone_in_words(alone: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Tensors by name; those of a new block together."""
    blocks = Counter(name.partition(".inserted.")[0] for name in alone if ".inserted." in name)
    yield from (f"the new block after {block}: {counted(count, 'tensor')}" for block, count in blocks.items())
    yield from (f"{name} {list(shape)}" for name, shape in alone.items() if ".inserted." not in name)


def in_words(difference: Difference) -> Iterator[str]:
    tensors, total = difference.tensors, difference.total
    apart = sum(not tensor.sums.equal for tensor in tensors.values())
    what = "of what was trained, which no plain model holds: " if difference.what == "trained" else ""
    if tensors:
        far = f": ||B - A|| is {percent(total)}% of ||A||" if apart and math.isfinite(total.relative) else ""
        others = "is" if len(tensors) - apart == 1 else f"{len(tensors) - apart:,} are"
        same = f"; the other {others} the same bit for bit" if apart < len(tensors) else ""
        yield f"{what}{apart:,} of {counted(len(tensors), 'tensor')} in both {'differs' if apart == 1 else 'differ'}{far}{same}"
    for name, tensor in tensors.items():
        if tensor.rows is not None:
            yield f"{name}: one has more rows; of the {tensor.rows:,} in both, {distance(tensor.sums)}"
    for mine, theirs in sorted({tensor.dtypes for tensor in tensors.values() if tensor.dtypes}):
        count = sum(tensor.dtypes == (mine, theirs) for tensor in tensors.values())
        yield f"{counted(count, 'tensor is', 'tensors are')} stored as {mine} in A and {theirs} in B"
    if total.cosine is not None and total.longer is not None:
        way = f"cosine {total.cosine:.4f} ({in_what_way(total.cosine)})"
        yield f"the two updates of their base: {way}, B's is {total.longer:.3g} times as long"


def in_what_way(cosine: float) -> str:
    ways = ((0.9, "the same way"), (0.3, "partly the same way"), (-0.3, "ways that have little to do with each other"))
    return next((way for least, way in ways if cosine >= least), "against each other")


def distance(sums: Sums) -> str:
    return "every number is the same" if sums.equal else f"{percent(sums)}% apart"


def maps(difference: Difference) -> Iterator[str]:
    """The map by layers and modules, what lies outside the layers, and the map of cosines."""
    cells = difference.cells()
    outside = [(module, sums) for (layer, module), sums in cells.items() if not layer]
    if columns := modules_of(difference):
        yield ""
        yield "||B - A|| in % of ||A||, = is the same bit for bit:"
        yield heat_map(difference, colours=in_colours())
        if same := sorted({short(module) for layer, module in cells if layer and module not in columns}):
            yield f"the same in every layer: {', '.join(same)}"
    for module, sums in outside if not difference.total.equal else ():
        way = f", cosine {sums.cosine:.2f}" if sums.cosine is not None else ""
        yield f"{module}: {distance(sums)}{way}"
    if difference.total.cosine is not None:
        yield ""
        yield "cosine of the two updates:"
        yield heat_map(difference, colours=in_colours(), cosine=True)


def kind(checkpoint: Checkpoint) -> str:
    if checkpoint.manifest is not None:
        return checkpoint.method + (f", step {checkpoint.manifest.step}" if checkpoint.manifest.step else "")
    if checkpoint.kind == "adapter":
        return f"a PEFT adapter ({checkpoint.method})"
    return "a merged model" if (checkpoint.path / names.MERGE_REPORT).exists() else "a whole model"


def shown(value: Any, most: int = 60) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value).replace("\n", "\\n")
    return text if len(text) <= most else f"{text[: most - 3]}..."


# ---- for a program ---------------------------------------------------------------------------------------------------


def as_json(difference: Difference, a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
    return {
        "a": str(a.path),
        "b": str(b.path),
        "equal": difference.is_equal,
        "compared": difference.what,
        "same_base": difference.same_base,
        **{part: {key: list(pair) for key, pair in pairs.items()} for part, pairs in difference.fields.items()},
        "only_in_a": {name: list(shape) for name, shape in difference.only_in_a.items()},
        "only_in_b": {name: list(shape) for name, shape in difference.only_in_b.items()},
        "total": figures(difference.total),
        "layers": {
            layer: {module: figures(sums) for (its, module), sums in difference.cells().items() if its == layer}
            for layer in dict.fromkeys(layer for layer, _ in difference.cells())
        },
        "tensors": {
            name: {
                **figures(tensor.sums),
                **({"rows": tensor.rows} if tensor.rows is not None else {}),
                **({"dtypes": list(tensor.dtypes)} if tensor.dtypes else {}),
            }
            for name, tensor in difference.tensors.items()
        },
    }


def figures(sums: Sums) -> dict[str, Any]:
    relative = sums.relative if math.isfinite(sums.relative) else None  # of a zero tensor that is none any more
    found = {"equal": sums.equal, "relative": relative}
    return found if sums.cosine is None else {**found, "cosine": sums.cosine, "update_ratio": sums.longer}
