"""The rows of new tokens, and the files of weights with these rows in them, written while the base streams by."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from litlora import families
from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.fingerprint import TensorHash
from litlora.errors import UserError
from litlora.methods.tuning import EMBEDDING, HEAD
from litlora.safetensors_file import FLOAT_BYTES, SafetensorsFile, TensorInfo, from_float32, header_bytes, to_float32

PART = 2**20  # bytes copied at once
BLOCK = 256  # new rows computed at once
HEAD_BIAS = HEAD.replace("weight", "bias")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The base's files, and which of their tensors have a row for each token."""

    files: dict[Path, dict[str, TensorInfo]]
    by_token: frozenset[str]  # the embedding, and the head with its bias where it is one of its own
    rows: int  # they have; at least as many as there are tokens


@dataclass(frozen=True, kw_only=True)
class Digests:
    """Of each tensor, in the base and in the new model."""

    before: dict[str, str]
    after: dict[str, str]


def find_weights(base: Checkpoint, tokens: int) -> Weights:
    """UserError where the base has no embedding or head for its `tokens` tokens, of the shape that config.json says, in a float dtype."""
    config = base.config()
    expected = {name: shape for name, shape in families.expected_tensors(config).items() if name in (EMBEDDING, HEAD, HEAD_BIAS)}
    shapes = {HEAD: expected[EMBEDDING]} | expected  # a tied model may carry its matrix twice
    files: dict[Path, dict[str, TensorInfo]] = {}
    found: dict[str, str] = {}
    for path in sorted(set(base.shards().values())):
        with SafetensorsFile(path) as file:
            files[path] = file.tensors
        for name, info in files[path].items():
            if (parameter := families.tensor_name(name, config)) not in shapes:
                continue
            found[parameter] = name
            if info.shape != shapes[parameter]:
                raise UserError(
                    f"{name} has the shape {info.shape}; {names.CONFIG} says {shapes[parameter]}",
                    where=path,
                    hint="download the base again",
                )
            if info.dtype not in FLOAT_BYTES:
                hint = "use a base in float32, bfloat16 or float16"
                raise UserError(f"{name} is {info.dtype}, which cannot be averaged", where=path, hint=hint)
    for name in expected:
        if name not in found:
            raise UserError(f"the base has no {name}", where=base.path, hint="download the base again")
    if tokens > config.vocab_size:
        what = f"its tokenizer has {tokens:,} tokens and its embedding rows for {config.vocab_size:,}"
        raise UserError(what, where=base.path, hint="take the tokenizer and the weights from the same release")
    return Weights(files=files, by_token=frozenset(found.values()), rows=config.vocab_size)


def write_weights(
    weights: Weights, directory: Path, first: int, pieces: Sequence[Sequence[int]], progress: Callable[[int], None] = lambda done: None
) -> Digests:
    """Write the base's files again, with a row for each new token in the tensors that go by token.

    Token `first + i` gets the mean of the rows `pieces[i]`, summed in fp64, in fp32, rounded once to the tensor's dtype. Where the
    base has spare rows from `first` on, they are used before any is added; every other byte is the base's. `progress` is told
    the bytes that are done.
    """
    digests = Digests(before={}, after={})
    done = 0
    for path, tensors in weights.files.items():
        with SafetensorsFile(path) as source, open(directory / path.name, "xb") as sink:
            shapes = {name: (info.dtype, new_shape(weights, name, info, first + len(pieces))) for name, info in tensors.items()}
            grows = any(shapes[name][1] != info.shape for name, info in tensors.items())
            sink.write(header_bytes(shapes, source.metadata, keep_order=True)[0] if grows else source.header())
            for name, info in tensors.items():
                before, after = TensorHash(name, info.dtype, info.shape), TensorHash(name, *shapes[name])
                parts = (
                    grown(source, name, first, pieces, before) if name in weights.by_token else copied(source, info.start, info.end, before)
                )
                for part in parts:
                    sink.write(part)
                    after.update(part)
                digests.before[name], digests.after[name] = before.digest(), after.digest()
                done += info.size
                progress(done)
    return digests


def new_shape(weights: Weights, name: str, info: TensorInfo, tokens: int) -> tuple[int, ...]:
    """A tensor's shape in the new model, which has so many tokens."""
    return (max(info.shape[0], tokens), *info.shape[1:]) if name in weights.by_token else info.shape


def grown(
    source: SafetensorsFile, name: str, first: int, pieces: Sequence[Sequence[int]], before: TensorHash
) -> Iterator[bytes | memoryview]:
    """The tensor's bytes in the new model, in order; `before` is told those in the base."""
    info = source.tensors[name]
    row = info.size // info.shape[0]
    spare = info.start + first * row  # where those rows begin that no token has used
    rest = min(info.end, spare + len(pieces) * row)
    yield from copied(source, info.start, spare, before)
    for start in range(0, len(pieces), BLOCK):
        yield from_float32(means(source, name, pieces[start : start + BLOCK]), info.dtype)
    for _ in copied(source, spare, rest, before):
        pass
    yield from copied(source, rest, info.end, before)


def copied(source: SafetensorsFile, start: int, end: int, before: TensorHash) -> Iterator[memoryview]:
    """The file's bytes from `start` to `end`, a part at a time in the same memory."""
    buffer = memoryview(bytearray(min(PART, end - start)))
    for position in range(start, end, PART):
        part = buffer[: end - position]
        source.read_into(position, part)
        before.update(part)
        yield part


def means(source: SafetensorsFile, name: str, pieces: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """(len(pieces), C), of a bias (len(pieces),): for each, the mean of these rows of the tensor."""
    info = source.tensors[name]
    row, columns = info.size // info.shape[0], info.shape[1:]
    numbers = sorted({number for ids in pieces for number in ids})
    buffer = bytearray(row * len(numbers))
    for place, number in enumerate(numbers):
        source.read_into(info.start + number * row, memoryview(buffer)[place * row : (place + 1) * row])
    rows = to_float32(buffer, info.dtype, (len(numbers), *columns))
    places = {number: place for place, number in enumerate(numbers)}
    found = np.empty((len(pieces), *columns), np.float32)
    for place, ids in enumerate(pieces):
        found[place] = rows[[places[number] for number in ids]].mean(axis=0, dtype=np.float64)
    return found
