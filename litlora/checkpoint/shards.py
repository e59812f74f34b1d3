"""Which file of a model's directory holds which tensor: one model.safetensors, or the files that an index names.

An index comes with the model and is believed in nothing: each file name in it must be a plain one, and the file a regular
one of this directory, before anything is opened (`reading.file_in`).
"""

from pathlib import Path

from litlora.checkpoint import names
from litlora.checkpoint.reading import file_in, is_plain_name, read_json
from litlora.errors import UserError
from litlora.safetensors_file import SafetensorsFile


def has_weights(directory: Path) -> bool:
    """Whether there is something that should be a model's weights."""
    return any((directory / name).exists() for name in (names.WEIGHTS, names.WEIGHTS_INDEX))


def find_shards(directory: Path) -> dict[str, Path]:
    """Tensor name -> its file. Every file is there, of its full length, with a sound header, and holds what is said of it."""
    if (directory / names.WEIGHTS).exists() or not (directory / names.WEIGHTS_INDEX).exists():
        path = _present(directory, names.WEIGHTS)
        with SafetensorsFile(path) as file:
            return dict.fromkeys(file.tensors, path)
    weight_map = files_of_index(directory, names.WEIGHTS_INDEX, names.SAFETENSORS)
    paths = {name: _present(directory, name) for name in sorted(set(weight_map.values()))}
    for name, path in paths.items():
        with SafetensorsFile(path) as file:
            absent = next((tensor for tensor, home in weight_map.items() if home == name and tensor not in file.tensors), None)
        if absent is not None:
            raise UserError(
                f"lacks the tensor {absent}, which {names.WEIGHTS_INDEX} says is in it", where=path, hint="download the model again"
            )
    return {tensor: paths[name] for tensor, name in weight_map.items()}


def files_of_index(directory: Path, name: str, ending: str) -> dict[str, str]:
    """Tensor name -> the name of its file, by the index `name`: each plain, with this ending, none differing from another in case only
    (one file to some file systems)."""
    index = directory / name
    weight_map = read_json(directory, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("has no weight_map", where=index, hint="download this file again")
    files: set[str] = set()
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(ending):
            raise UserError(f"{tensor} is said to be in {file!r}, which is no name of a {ending.removeprefix('.')} file", where=index)
        files.add(file)
    for what, found in (("files", files), ("tensors", weight_map.keys())):
        lower: dict[str, str] = {}
        for each in sorted(found):
            if (other := lower.setdefault(each.lower(), each)) != each:
                raise UserError(f"names the {what} {other!r} and {each!r}, which differ in case only", where=index)
    return weight_map


def _present(directory: Path, name: str) -> Path:
    """The path of a file that is there."""
    try:
        return file_in(directory, name)
    except UserError as error:
        if error.what != "is missing":
            raise
        unfinished = next(directory.glob(names.UNFINISHED), None) is not None
        hint = (
            "the download of this model was not finished: start it again" if unfinished else "the model is not complete: download it again"
        )
        raise UserError(
            f"is missing; {names.WEIGHTS_INDEX} names it" if name != names.WEIGHTS else "is missing", where=directory / name, hint=hint
        ) from None
