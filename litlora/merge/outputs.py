"""What a new model consists of: each of its tensors, which bytes it starts from, and what happens to them on the way."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.config import Config, merged_layers
from litlora.errors import UserError
from litlora.families import expected_tensors, is_beside, is_derived, learns, spelt_as, stored_name, tensor_name
from litlora.merge.tensors import WIDTH
from litlora.methods.tuning import EMBEDDING, HEAD, LoRASlot, ScaleShiftSlot, Tuning, merged_config, merged_name
from litlora.peft import scale
from litlora.safetensors_file import DTYPE_BITS, SafetensorsFile, TensorInfo

Files = Mapping[Path, Mapping[str, TensorInfo]]


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """LoRA, or DoRA, on a weight: its tensors in the adapter's file, and what B is multiplied by."""

    a: str
    b: str
    magnitude: str | None
    factor: float


@dataclass(frozen=True, kw_only=True)
class Rows:
    """`scale` times each row of a weight; of a bias, `scale` times the sum of it and `shift`. Tensors of the adapter's file."""

    scale: str
    shift: str | None


@dataclass(frozen=True, kw_only=True)
class Output:
    """One tensor of the new model: the base's (`source`) or one number (`fill`), with `update` put on it; or the
    adapter's (`value`)."""

    name: str  # in the files
    parameter: str  # the same with its full name
    shape: tuple[int, ...]
    dtype: str
    source: str | None = None  # a tensor of the base's file of the same name
    source_dtype: str = ""
    own: bool = False  # `source` became this tensor; else this is one more, made from it or from nothing
    value: str | None = None
    update: LowRank | Rows | None = None
    in_new_layer: bool = False
    fill: float | None = None  # of what a new block writes last: the number that lets nothing through

    @property
    def module(self) -> str:
        return self.parameter.rpartition(".")[0]

    @property
    def is_changed(self) -> bool:
        """Whether what was trained changes its numbers, which were in the base before."""
        return (self.value is not None or self.update is not None) and not self.in_new_layer

    @property
    def is_copied(self) -> bool:
        return self.source is not None and self.value is None and self.update is None and self.dtype == self.source_dtype

    @property
    def can_tell(self) -> bool:
        """Whether the model computes something else where this is another: a new block adds what its last projections let through."""
        return self.is_changed or self.fill is not None

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, kw_only=True)
class NewModel:
    """A model to be written, file by file beside the base's own."""

    base: Checkpoint
    config: Config
    base_config: Config
    dtype: str | None  # the file's word; None: every tensor keeps its own
    files: Files  # the base's, and what they hold
    outputs: Mapping[Path, tuple[Output, ...]]  # the base's file -> what the new file of that name holds
    new_layers: tuple[int, ...]  # of its layers, those that were inserted

    def __iter__(self) -> Iterator[Output]:
        for outputs in self.outputs.values():
            yield from outputs

    @cached_property
    def base_bytes(self) -> int:
        """All tensors of the base."""
        return sum(info.size for tensors in self.files.values() for info in tensors.values())

    @cached_property
    def bytes(self) -> int:
        """The same of the new model."""
        return sum(output.size for output in self)

    @cached_property
    def keeps_names(self) -> bool:
        """Whether it has the tensors that the base has, under the same names."""
        return all(output.own and output.name == output.source for output in self)


def base_files(base: Checkpoint, config: Config) -> dict[Path, dict[str, TensorInfo]]:
    """The base's files and their tensors, after checking that they hold exactly the model that config.json describes."""
    files: dict[Path, dict[str, TensorInfo]] = {}
    for path in sorted(set(base.shards().values())):
        with SafetensorsFile(path) as file:
            files[path] = file.tensors
    found: dict[str, tuple[int, ...]] = {}
    for tensors in files.values():
        for name, info in tensors.items():
            if tensor_name(name, config) in found:
                raise UserError(f"the tensor {name} is there twice", where=base.path)
            found[tensor_name(name, config)] = info.shape
    expected = expected_tensors(config)
    extra = [name for name in found.keys() - expected.keys() if not is_derived(name, config)]
    if config.tie_word_embeddings:
        extra = [name for name in extra if name != HEAD]  # a copy of the embedding, which every reader ignores
    faults = [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    faults += [f"unexpected: {name} {found[name]}" for name in sorted(extra)]
    faults += [f"wrong shape: {n} {found[n]}, needed {expected[n]}" for n in expected if n in found and found[n] != expected[n]]
    if faults:
        what = "\n".join([f"the base's tensors are not those of its {names.CONFIG}", *(f"  {fault}" for fault in faults)])
        raise UserError(what, where=base.path, hint="copy or download the base again")
    return files


# ---- which tensors the new model has ---------------------------------------------------------------------------------


def new_model(base: Checkpoint, config: Config, tuning: Tuning, *, dtype: str | None, trained: bool) -> NewModel:
    """The plain model that computes what the base with the tuning on it does; `trained` false: what it did before training.

    Where it has other tensors than the base, all names are the full ones: readers that add a missing `model.` add it to every name.
    """
    files = base_files(base, config)
    after, layers = merged_config(tuning, config), merged_layers(config, tuning.inserted)
    homes = {tensor_name(name, config): (path, name) for path, tensors in files.items() for name in tensors}
    places = {layer: number for number, layer in enumerate(layers)}
    shapes = expected_tensors(after)
    origins = {merged_name(parameter, places): parameter for parameter in homes}  # name in the new model: in that with the tuning on it
    origins |= {name: parameter_before(name, layers) for name in shapes}
    renamed = origins.keys() != homes.keys()
    outputs: dict[Path, list[Output]] = {path: [] for path in files}

    def full_name(name: str) -> str:
        return spelt_as(stored_name(name, after), homes[EMBEDDING][1]) if after.text_of else stored_name(name, after)

    for name, parameter in origins.items():
        path, stored = homes[relative_in_base(parameter, homes)]
        info = files[path][stored]
        own = parameter in homes
        in_new_layer = ".inserted." in parameter
        fill = config.silence(parameter) if in_new_layer else None
        copied = own or parameter == HEAD or (in_new_layer and not trained and fill is None)
        outputs[path].append(
            Output(
                name=stored if own and (not renamed or is_beside(stored, config)) else full_name(name),
                parameter=name,
                shape=shapes.get(name, info.shape),
                dtype=stored_dtype(dtype, stored, info, config),
                source=stored if copied else None,
                source_dtype=info.dtype if copied else "",
                own=own,
                value=trained_whole(parameter, tuning, config, after) if trained else None,
                update=update_of(parameter, tuning, config),
                in_new_layer=in_new_layer,
                fill=fill,
            )
        )
    new_layers = tuple(number for number, (_, is_new) in enumerate(layers) if is_new)
    model = NewModel(
        base=base,
        config=after,
        base_config=config,
        dtype=dtype,
        files=files,
        outputs={path: tuple(of_file) for path, of_file in outputs.items()},
        new_layers=new_layers,
    )
    check_dtypes(model)
    check_shared_head(model)
    return model


def parameter_before(name: str, layers: list[tuple[int, bool]]) -> str:
    """The inverse of `merged_name`: the parameter of the model that carries the tuning."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return name
    layer, is_new = layers[int(parts[2])]
    return ".".join([*parts[:2], str(layer), *(["inserted"] if is_new else []), *parts[3:]])


def relative_in_base(parameter: str, homes: Mapping[str, tuple[Path, str]]) -> str:
    """The base's tensor that a parameter is, or else goes with: into its file, and in its dtype."""
    plain = parameter.replace(".inserted.", ".")
    nearest = (plain, plain.removesuffix("bias") + "weight", EMBEDDING)  # a new block: its layer; a new bias: its weight; a new head
    return next(name for name in nearest if name in homes)


def trained_whole(parameter: str, tuning: Tuning, config: Config, after: Config) -> str | None:
    """The adapter's tensor that stands in place of the base's."""
    if parameter == HEAD and after.tie_word_embeddings:
        parameter = EMBEDDING  # a file may hold the shared matrix twice
    return tuning.file_name(parameter, config) if parameter in tuning.whole or ".inserted." in parameter else None


def update_of(parameter: str, tuning: Tuning, config: Config) -> LowRank | Rows | None:
    """What the adapter on a parameter's module makes of it."""
    module, _, kind = parameter.rpartition(".")
    held = tuning.slots.get(f"{module}.adapter")
    if isinstance(held, LoRASlot) and kind == "weight":
        a, b, magnitude = (tuning.file_name(f"{module}.adapter.{part}", config) for part in ("lora_A", "lora_B", "magnitude"))
        return LowRank(a=a, b=b, magnitude=magnitude if held.use_dora else None, factor=scale(held.alpha, held.r, held.use_rslora))
    if isinstance(held, ScaleShiftSlot):
        of, by = (tuning.file_name(f"{module}.adapter.{part}", config) for part in ("scale", "shift"))
        return Rows(scale=of, shift=by if kind == "bias" else None)
    return None


def stored_dtype(dtype: str | None, name: str, info: TensorInfo, config: Config) -> str:
    """What the new model stores a tensor as; `dtype` is the one that was asked for."""
    keeps = dtype is None or info.dtype not in ("F16", "BF16", "F32", "F64") or is_derived(name, config) or not learns(name)
    return info.dtype if keeps or dtype is None else dtype


def check_dtypes(model: NewModel) -> None:
    for path, outputs in model.outputs.items():
        for output in outputs:
            odd = next((dtype for dtype in (output.source_dtype, output.dtype) if dtype and dtype not in WIDTH), None)
            if odd and not output.is_copied:
                what = f"{output.source or output.name} is {odd}, which cannot be computed with"
                raise UserError(what, where=path, hint="use a base in float32, bfloat16 or float16")


def check_shared_head(model: NewModel) -> None:
    """A base whose head is the embedding may hold a copy of it; one that differs would make two models of it, by who reads it."""
    homes = {tensor_name(name, model.base_config): (path, name) for path, tensors in model.files.items() for name in tensors}
    if not model.base_config.tie_word_embeddings or HEAD not in homes:
        return
    (first, embedding), (second, head) = homes[EMBEDDING], homes[HEAD]
    with SafetensorsFile(first) as one, SafetensorsFile(second) as other:
        parts = zip(one.parts(embedding, memoryview(bytearray(2**20))), other.parts(head, memoryview(bytearray(2**20))), strict=True)
        same = one.tensors[embedding].dtype == other.tensors[head].dtype and all(mine == theirs for mine, theirs in parts)
    if not same:
        what = f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings says that they are one"
        raise UserError(what, where=model.base.path / names.CONFIG, hint="set tie_word_embeddings to false if the head is right")
