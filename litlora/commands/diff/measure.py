"""How far two checkpoints are apart, tensor by tensor, and what else differs. No torch; memory stays flat."""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.files import open_prompts
from litlora.config import Config
from litlora.errors import UserError
from litlora.merge.effective import Effective
from litlora.merge.plan import blocks, check_values
from litlora.merge.tensors import Floats
from litlora.methods.tuning import why_unmergeable
from litlora.safetensors_file import SafetensorsFile

LAYER = re.compile(r"model\.layers\.(\d+)(\.inserted)?\.(.+)")
NOT_COMPARED = ("files", "lineage", "format_version")  # of a manifest: what is in the files is compared itself


@dataclass(frozen=True)
class Sums:
    """Sums of squares over the numbers of a tensor, or of several."""

    a: float = 0.0
    b: float = 0.0
    away: float = 0.0  # of B - A
    update_a: float = 0.0  # of A - base
    update_b: float = 0.0
    dot: float = 0.0  # (A - base) . (B - base)
    equal: bool = True  # whether every number is the same, bit for bit

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.a + other.a,
            self.b + other.b,
            self.away + other.away,
            self.update_a + other.update_a,
            self.update_b + other.update_b,
            self.dot + other.dot,
            self.equal and other.equal,
        )

    @property
    def relative(self) -> float:
        """||B - A|| / ||A||."""
        return math.sqrt(self.away / self.a) if self.a else math.inf if self.away else 0.0

    @property
    def cosine(self) -> float | None:
        """Of the angle between the two updates: 1 the same way, 0 at right angles; None where one of them is zero."""
        if not (self.update_a and self.update_b):
            return None
        return max(-1.0, min(1.0, self.dot / math.sqrt(self.update_a) / math.sqrt(self.update_b)))

    @property
    def longer(self) -> float | None:
        """||B - base|| / ||A - base||."""
        return math.sqrt(self.update_b / self.update_a) if self.update_a else None


@dataclass(frozen=True)
class Tensor:
    """One that both have."""

    sums: Sums
    shape: tuple[int, ...]
    rows: int | None = None  # compared, where one of them has more
    dtypes: tuple[str, str] | None = None  # where they differ


@dataclass
class Difference:
    """Everything that differs between A and B; names are those of the parameters, a new block's those of the layer it follows."""

    what: str = "weights"  # weights: of the plain models they mean; trained: of the tensors that were trained, which no plain model holds
    same_base: bool | None = None  # of two adapters; True as well where one is the base of the other
    has_updates: bool = False  # whether both were compared with one base as well
    fields: dict[str, dict[str, tuple[Any, Any]]] = field(default_factory=dict)  # manifest, config, tokenizer -> key -> (A's, B's)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    only_in_a: dict[str, tuple[int, ...]] = field(default_factory=dict)
    only_in_b: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def total(self) -> Sums:
        return added(tensor.sums for tensor in self.tensors.values())

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs: no number, no name, no dtype, no setting."""
        alone = self.only_in_a or self.only_in_b or any(self.fields.values())
        return not alone and all(one.sums.equal and not one.rows and not one.dtypes for one in self.tensors.values())

    def cells(self) -> dict[tuple[str, str], Sums]:
        """(row, column) -> a module's weight and bias together: the layer (`3`; `3+` the new block after it) or nothing, and the module."""
        found: dict[tuple[str, str], Sums] = {}
        for name, tensor in self.tensors.items():
            place = place_of(name)
            found[place] = found.get(place, Sums()) + tensor.sums
        return found


def added(parts: Iterable[Sums]) -> Sums:
    total = Sums()
    for one in parts:
        total += one
    return total


def place_of(name: str) -> tuple[str, str]:
    """model.layers.3.self_attn.q_proj.weight -> ("3", "q_proj"), model.embed_tokens.weight -> ("", "embed_tokens")."""
    found = LAYER.fullmatch(name)
    rest = found[3] if found else name.removeprefix("model.")
    words = [word for word in rest.split(".") if word not in ("weight", "bias", "adapter")]
    if len(words) > 1 and words[1].endswith(("_proj", "_norm")):
        words = words[1:]  # without self_attn or mlp
    return (f"{found[1]}+" if found[2] else found[1]) if found else "", ".".join(words) or rest


# ---- both ------------------------------------------------------------------------------------------------------------


def compare(a: Checkpoint, b: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None) -> Difference:
    """What differs between two checkpoints of any kind. `progress` is told the tensors done and how many there are.

    Weights are compared as the plain model that each means: an adapter's is its base with it put on, before any rounding. Where one
    of them means no such model (a learnt prompt, a bottleneck), what was trained is compared instead.
    """
    difference = Difference(same_base=on_same_base(a, b))
    odd = [one for one in (a, b) if not one.is_model and why_unmergeable(one.tuning(), one.config())]
    difference.fields = {"manifest": manifests(a, b), "tokenizer": tokenizers(a, b)}
    if odd:
        difference.what = "trained"
        difference.fields["config"] = unlike(asdict(a.config()), asdict(b.config()))
        compare_trained(a, b, difference)
        return difference
    with ExitStack() as stack:
        one, other = (stack.enter_context(Effective(checkpoint)) for checkpoint in (a, b))
        difference.fields["config"] = unlike(asdict(one.config), asdict(other.config))
        mine, theirs = aligned(one.config, one.shapes), aligned(other.config, other.shapes)
        base = common_base(a, b)
        of_base = stack.enter_context(Effective(base)) if base else None
        compare_models(one, other, mine, theirs, of_base, difference, progress)
    return difference


def on_same_base(a: Checkpoint, b: Checkpoint) -> bool | None:
    """Of two adapters, whether it is one base; True where one is the base of the other, else nothing that can be said."""
    same = a.base().fingerprint() == b.base().fingerprint()
    return None if a.is_model and b.is_model else same if a.is_model == b.is_model else same or None


def common_base(a: Checkpoint, b: Checkpoint) -> Checkpoint | None:
    """The base that both updates can be measured from: that of an adapter among them, if the other is no adapter of another one, nor
    that base itself."""
    adapters = [one for one in (a, b) if not one.is_model]
    if not adapters:
        return None
    base = adapters[0].base()
    its = base.fingerprint()
    others = [one.fingerprint() == its for one in (a, b) if one is not adapters[0]]  # of a model its own, of an adapter its base's
    return base if others[0] == (len(adapters) == 2) else None


def aligned(config: Config, names: Iterable[str]) -> dict[str, str]:
    """A name that two models of different depth share -> the model's own: layers are counted without the new blocks of LLaMA-Pro, and a
    new block has the number of the layer it follows."""
    new, places, before = set(config.llama_pro_layers), {}, -1
    for layer in range(config.num_hidden_layers):
        before += layer not in new
        places[str(layer)] = f"{before}.inserted" if layer in new else str(before)
    if len(set(places.values())) < len(places):  # two new blocks in a row: nobody can tell which is which
        places = {layer: layer for layer in places}
    found = {}
    for name in names:
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = places[parts[2]]
        found[".".join(parts)] = name
    return found


def compare_models(
    one: Effective,
    other: Effective,
    mine: Mapping[str, str],
    theirs: Mapping[str, str],
    base: Effective | None,
    difference: Difference,
    progress: Callable[[int, int], None],
) -> None:
    in_base = aligned(base.config, base.shapes) if base else {}
    shared = [name for name in mine if name in theirs and one.shapes[mine[name]][1:] == other.shapes[theirs[name]][1:]]
    difference.only_in_a = {name: one.shapes[own] for name, own in mine.items() if name not in shared}
    difference.only_in_b = {name: other.shapes[own] for name, own in theirs.items() if name not in shared}
    difference.has_updates = base is not None

    def look(name: str) -> Tensor:
        own, its = mine[name], theirs[name]
        shape, longer = sorted((one.shapes[own], other.shapes[its]))
        dtypes = (one.dtypes[own], other.dtypes[its])
        start = base.blocks(in_base[name]) if base and name in in_base and base.shapes[in_base[name]][1:] == shape[1:] else None
        sums = summed(one.blocks(own), other.blocks(its), start, shape[0])
        return Tensor(sums, shape, shape[0] if shape != longer else None, dtypes if len(set(dtypes)) > 1 else None)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for done, (name, tensor) in enumerate(zip(shared, pool.map(look, shared), strict=True), 1):
            difference.tensors[name] = tensor
            progress(done, len(shared))


def summed(mine: Iterator[Floats], theirs: Iterator[Floats], base: Iterator[Floats] | None, rows: int) -> Sums:
    """Over the first `rows` rows of two tensors, and of the one both began as."""
    total = Sums()
    nothing: Iterator[Floats] = iter(())
    with np.errstate(all="ignore"):
        for x, y, start in zip_longest(mine, theirs, base or nothing):
            if x is None or y is None or rows <= 0:
                break
            count = min(len(x), len(y), rows)
            rows -= count
            x, y = x[:count].reshape(-1), y[:count].reshape(-1)
            away = y - x
            sums = Sums(square(x), square(y), square(away), equal=np.array_equal(x.view(np.uint32), y.view(np.uint32)))
            if start is not None and len(start) >= count:
                start = start[:count].reshape(-1)
                x, y = x - start, y - start
                sums = replace(sums, update_a=square(x), update_b=square(y), dot=inner(x, y))
            total += sums
    return total


def square(x: Floats) -> float:
    return inner(x, x)


def inner(x: Floats, y: Floats) -> float:
    """In pieces of fp32, added up in fp64: exact enough for four digits of a billion numbers."""
    return float(np.dot(x, y)) if x.size < 2**20 else float(np.einsum("i,i->", x, y, dtype=np.float64))


# ---- what no plain model holds ----------------------------------------------------------------------------------------


def compare_trained(a: Checkpoint, b: Checkpoint, difference: Difference) -> None:
    """The tensors of two adapters by their parameters; a whole model has none."""
    with ExitStack() as stack:
        sides = [trained(one, stack) for one in (a, b)]
        mine, theirs = sides
        shared = [name for name in mine if name in theirs and mine[name][2] == theirs[name][2]]
        difference.only_in_a = {name: mine[name][2] for name in mine if name not in shared}
        difference.only_in_b = {name: theirs[name][2] for name in theirs if name not in shared}
        for name in shared:
            (file, stored, shape), (its_file, its, _) = mine[name], theirs[name]
            size = math.prod(shape)
            dtypes = (file.tensors[stored].dtype, its_file.tensors[its].dtype)
            sums = summed(blocks(file, stored), blocks(its_file, its), None, size)
            difference.tensors[name] = Tensor(sums, shape, None, dtypes if len(set(dtypes)) > 1 else None)


def trained(checkpoint: Checkpoint, stack: ExitStack) -> dict[str, tuple[SafetensorsFile, str, tuple[int, ...]]]:
    """Parameter -> the file, the name in it, the shape."""
    if checkpoint.is_model:
        return {}
    file = stack.enter_context(SafetensorsFile(checkpoint.adapter_file()))
    tuning, config = checkpoint.tuning(), checkpoint.config()
    check_values(file, tuning, config)
    return {name: (file, stored, file.tensors[stored].shape) for stored, name in tuning.file_names(config).items()}


# ---- what is said beside the weights ----------------------------------------------------------------------------------


def manifests(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """What their manifests say differently; nothing where one has none."""
    if a.manifest is None or b.manifest is None:
        return {}
    return unlike(
        *({key: value for key, value in asdict(one.manifest).items() if key not in NOT_COMPARED} for one in (a, b) if one.manifest)
    )


def tokenizers(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Whether a text becomes other ids, or messages another text."""
    found: list[dict[str, str | None]] = []
    for one in (a, b):
        try:
            prompts = open_prompts(one)
            found.append({"tokenizer": prompts.tokenizer.hash[:16], "chat_template": prompts.template})
        except UserError as error:
            found.append({"tokenizer": f"none: {error.what}", "chat_template": None})
    return unlike(*found)


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, those of nested tables joined with dots."""
    mine, theirs = dict(flat(a)), dict(flat(b))
    return {key: (mine.get(key), theirs.get(key)) for key in dict.fromkeys([*mine, *theirs]) if mine.get(key) != theirs.get(key)}


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
