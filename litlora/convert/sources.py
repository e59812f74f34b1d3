"""What a path holds, whatever its format: a whole model under Hugging Face's names, or an adapter under PEFT's.

A Hugging Face directory, a step, a run and a PEFT adapter are what `resolve` makes of them; what only this room reads is looked for
first: pickled weights (pytorch_model.bin, adapter_model.bin) and LitGPT's directories. Nothing of a tensor is read here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.card import typed
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.reading import file_in, parse_json, read_bytes, read_json
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.shards import files_of_index, has_weights
from litlora.config import Config
from litlora.convert.litgpt import litgpt_config, lora_in_peft, model_in_hf, read_yaml
from litlora.convert.parts import Part, parts_of, refuse_not_finite
from litlora.errors import UserError
from litlora.families import config_from_hf, config_to_hf, expected_tensors, is_beyond, is_derived, stored_name, tensor_name
from litlora.methods import refuse_part
from litlora.methods.tuning import EMBEDDING, HEAD
from litlora.peft import check_tensors

SHARED = "the head is the embedding's own matrix (tie_word_embeddings)"
BEYOND = "a layer after the last one, which predicts further tokens (num_nextn_predict_layers)"
DERIVED = "rotary frequencies, which every reader computes from config.json"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A whole model. `config_json` are the bytes of its config.json, where it has one that is meant to stay."""

    path: Path
    kind: str  # in words
    config: Config
    tensors: Mapping[str, Part]  # by Hugging Face's full names: exactly those that the config means
    read: list[Path]  # the files of its weights
    config_json: bytes | None = None
    dropped: dict[str, str] = field(default_factory=dict)  # what it holds besides: why that is left out
    origins: dict[str, str] = field(default_factory=dict)  # name -> where it came from, where it was called otherwise
    checkpoint: Checkpoint | None = None

    def values(self) -> dict[str, Any]:
        """Its config.json."""
        return parse_json(self.config_json, self.path / names.CONFIG) if self.config_json is not None else config_to_hf(self.config)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What was trained on a base, as PEFT describes it."""

    path: Path
    kind: str
    values: dict[str, Any]  # adapter_config.json
    tensors: Mapping[str, Part]  # by PEFT's names
    read: list[Path]
    config_json: bytes | None = None  # of an adapter that has one: kept to the byte
    file: Path | None = None  # the safetensors file that holds exactly these tensors
    origins: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None  # of one that is a step or a PEFT directory already
    base_dir: Path | None = None  # where the user says that its base is

    def base(self) -> Checkpoint:
        """Its base. UserError where that is not there, or is no model."""
        if self.checkpoint is not None:
            return self.checkpoint.base()
        named = self.base_dir or self.values.get("base_model_name_or_path")
        if not named or not (Path(named).is_dir() or str(named) == names.DEMO):
            what = "its base is not known, and an adapter holds no base weights" if not named else f"its base is not there: {named}"
            raise UserError(what, where=self.path, hint="--base_dir the base's Hugging Face directory")
        base = resolve(named)
        if not base.is_model:
            raise UserError("is an adapter; the base of an adapter is a whole model", where=base.path, hint="--base_dir the base itself")
        return base


def open_source(path: str | Path | None, *, to: str, base_dir: str | None = None) -> Model | Adapter:
    """What lies at `path`. `to` decides where a LitGPT directory holds both an adapter and the model with it merged in.

    UserError: nothing known, a damaged file, one that asks for code to be run, tensors that are not those of the config.
    """
    place = Path(path) if path is not None else None
    moved = Path(base_dir) if base_dir is not None else None
    if place is not None and place.is_dir():
        merged = (place / names.LITGPT_WEIGHTS).exists()
        if (place / names.LITGPT_LORA).exists() and (to in ("peft", "litlora") or not merged):
            return litgpt_adapter(place, moved)
        if merged:
            return litgpt_model(place)
        if (place / names.CONFIG).exists() and not has_weights(place) and pickled_model_files(place):
            return pickled_model(place)
        if (place / names.ADAPTER_CONFIG).exists() and not (place / names.ADAPTER_WEIGHTS).exists() and pickled_adapter_file(place):
            return pickled_adapter(place, moved)
        if to in ("hf", "gguf") and has_weights(place):
            from litlora.convert.plain import is_dequantised, plain_model

            if is_dequantised(place):
                return plain_model(place)
    checkpoint = resolve(place, base_dir=base_dir)
    return model_of(checkpoint) if checkpoint.is_model else adapter_of(checkpoint)


# ---- whole models ----------------------------------------------------------------------------------------------------


def model_of(checkpoint: Checkpoint) -> Model:
    """A Hugging Face directory, or a step of method `full`."""
    shards = checkpoint.shards()
    kind = "step of a whole model" if checkpoint.manifest else "Hugging Face directory"
    return whole_model(
        checkpoint.path, kind, checkpoint.config(), parts_of(shards), sorted(set(shards.values())), checkpoint=checkpoint, has_config=True
    )


def pickled_model_files(directory: Path) -> bool:
    return any((directory / name).exists() for name in (names.PICKLED_WEIGHTS, names.PICKLED_INDEX))


def pickled_model(directory: Path) -> Model:
    """A Hugging Face directory as it was before safetensors: pytorch_model.bin, or an index and its files."""
    from litlora.convert.pickles import read_pickled

    if (directory / names.PICKLED_WEIGHTS).exists():
        files = [file_in(directory, names.PICKLED_WEIGHTS)]
        tensors = read_pickled(files[0])
    else:
        weight_map = files_of_index(directory, names.PICKLED_INDEX, names.PICKLES[0])
        files = [file_in(directory, name) for name in sorted(set(weight_map.values()))]
        held = {path.name: read_pickled(path) for path in files}
        lost = [name for name, home in weight_map.items() if name not in held[home]]
        if lost:
            raise UserError(f"lacks the tensor {lost[0]}, which the index says is in it", where=directory / weight_map[lost[0]])
        tensors = {name: held[home][name] for name, home in weight_map.items()}
    where = directory / names.CONFIG
    return whole_model(
        directory,
        "Hugging Face directory with pickled weights",
        config_from_hf(read_json(directory, names.CONFIG), where),
        tensors,
        files,
        has_config=True,
    )


def litgpt_model(directory: Path) -> Model:
    from litlora.convert.pickles import read_pickled

    path = file_in(directory, names.LITGPT_WEIGHTS)
    where = directory / names.LITGPT_CONFIG
    found = read_pickled(path, inside="model")
    config, shape = litgpt_config(read_yaml(directory, names.LITGPT_CONFIG), where, directory, found, path)
    tensors, origins = model_in_hf(found, shape, path)
    return whole_model(directory, "LitGPT checkpoint", config, tensors, [path], origins=origins)


def whole_model(
    path: Path,
    kind: str,
    config: Config,
    tensors: Mapping[str, Part],
    read: list[Path],
    *,
    origins: Mapping[str, str] | None = None,
    checkpoint: Checkpoint | None = None,
    has_config: bool = False,
) -> Model:
    """The tensors that the config means, under their full names; the others are named with the reason why they are left out."""
    refuse_part(config, "convert reads whole models")
    dropped = {name: DERIVED for name in tensors if is_derived(name)} | {name: BEYOND for name in tensors if is_beyond(name, config)}
    kept = {tensor_name(name, config): part for name, part in tensors.items() if name not in dropped}
    if len(kept) + len(dropped) < len(tensors):
        raise UserError("names a tensor twice, with and without `model.` in front", where=path)
    ours = {name: tensor_name(name, config) for name in tensors}
    called = dict(origins or {}) | {own: name for name, own in ours.items() if stored_name(own, config) != name}
    if config.tie_word_embeddings and HEAD in kept and EMBEDDING in kept:
        head, embedding = kept.pop(HEAD), kept[EMBEDDING]
        if head.shape != embedding.shape or head.dtype != embedding.dtype or not np.array_equal(head.bytes(), embedding.bytes()):
            what = f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings says that they are one"
            raise UserError(what, where=path / names.CONFIG, hint="set tie_word_embeddings to false if the head is right")
        dropped[called.pop(HEAD, HEAD)] = SHARED
    check_tensors({name: part.shape for name, part in kept.items()}, expected_tensors(config), read[0] if len(read) == 1 else path)
    return Model(
        path=path,
        kind=kind,
        config=config,
        tensors={name: kept[name] for name in expected_tensors(config)},
        read=read,
        config_json=read_bytes(file_in(path, names.CONFIG)) if has_config else None,
        dropped=dropped,
        origins=called,
        checkpoint=checkpoint,
    )


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapter_of(checkpoint: Checkpoint) -> Adapter:
    """A step or a PEFT directory. UserError of a method that PEFT does not know."""
    if not (checkpoint.path / names.ADAPTER_CONFIG).exists():
        hint = f"litlora merge_lora {typed(str(checkpoint.path))} makes a plain model where the method allows it, and that converts"
        raise UserError(f"PEFT has no format for what {checkpoint.method} trained here", where=checkpoint.path, hint=hint)
    path = checkpoint.adapter_file()
    with_names = dict.fromkeys(names_in(path), path)
    return Adapter(
        path=checkpoint.path,
        kind="step" if checkpoint.manifest else "PEFT adapter",
        values=checkpoint.peft_values(),
        tensors=parts_of(with_names),
        read=[path],
        config_json=read_bytes(file_in(checkpoint.path, names.ADAPTER_CONFIG)),
        file=path,
        checkpoint=checkpoint,
        base_dir=checkpoint.base_dir,
    )


def names_in(path: Path) -> list[str]:
    from litlora.safetensors_file import SafetensorsFile

    with SafetensorsFile(path) as file:
        return list(file.tensors)


def pickled_adapter_file(directory: Path) -> Path | None:
    return next((directory / name for name in names.PICKLED_ADAPTERS if (directory / name).exists()), None)


def pickled_adapter(directory: Path, base_dir: Path | None) -> Adapter:
    """A PEFT adapter as it was before safetensors: adapter_model.bin."""
    from litlora.convert.pickles import read_pickled

    held = pickled_adapter_file(directory)
    assert held is not None
    path = file_in(directory, held.name)
    found = read_pickled(path)
    named = {plain_peft_name(name): name for name in found}
    if len(named) < len(found):
        raise UserError("holds one tensor under two names", where=path)
    tensors = {plain: found[name] for plain, name in named.items()}
    refuse_not_finite(tensors, path)
    return Adapter(
        path=directory,
        kind="PEFT adapter with pickled weights",
        values=read_json(directory, names.ADAPTER_CONFIG),
        tensors=tensors,
        read=[path],
        config_json=read_bytes(file_in(directory, names.ADAPTER_CONFIG)),
        origins={plain: name for plain, name in named.items() if plain != name},
        base_dir=base_dir,
    )


def plain_peft_name(name: str) -> str:
    """PEFT's name in a file, of one out of a live model's state_dict, which names the adapter (`default`) as well."""
    for inner, plain in ((".modules_to_save.default.", "."), (".lora_A.default.", ".lora_A."), (".lora_B.default.", ".lora_B.")):
        name = name.replace(inner, plain)
    return name.replace(".lora_magnitude_vector.default", ".lora_magnitude_vector").replace("_vector.weight", "_vector")


def litgpt_adapter(directory: Path, base_dir: Path | None) -> Adapter:
    from litlora.convert.pickles import read_pickled

    path = file_in(directory, names.LITGPT_LORA)
    found = read_pickled(path, inside="model")
    options = read_yaml(directory, names.LITGPT_HYPERPARAMETERS)
    values, tensors, origins = lora_in_peft(found, options, read_yaml(directory, names.LITGPT_CONFIG), directory)
    if base_dir is not None:
        values["base_model_name_or_path"] = str(base_dir.resolve())
    refuse_not_finite(tensors, path)
    return Adapter(path=directory, kind="LitGPT LoRA", values=values, tensors=tensors, read=[path], origins=origins, base_dir=base_dir)
