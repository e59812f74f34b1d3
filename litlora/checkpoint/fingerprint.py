"""One short text that stands for all weights of a model: another one the moment a single bit differs.

Per tensor XXH3-128 (https://github.com/Cyan4973/xxHash) over name, dtype, shape and bytes; then XXH3-128 over those in the order
of the names. So it does not matter how the tensors are spread over files, or what the directory is called. Every byte is
read, never a sample; what a file gave is remembered under its path, inode, size, mtime and ctime.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from litlora.errors import UserError
from litlora.safetensors_file import SafetensorsFile

PREFIX = "xxh3:"
DIGEST = re.compile("[0-9a-f]{32}")
CACHE_LIMIT = 64  # files remembered; some kilobytes each
PART = 2**20  # bytes read and hashed at a time: the memory of this process stays flat


class TensorHash:
    """One tensor's hash, made while its bytes stream by: `update` in order, then `digest` (32 hexadecimal digits)."""

    def __init__(self, name: str, dtype: str, shape: Iterable[int]) -> None:
        head = json.dumps([name, dtype, list(shape)], separators=(",", ":")).encode()
        self._state = xxhash.xxh3_128(len(head).to_bytes(8, "little") + head)

    def update(self, part: bytes | bytearray | memoryview) -> None:
        self._state.update(part)

    def digest(self) -> str:
        return self._state.hexdigest()


def combine(digests: Mapping[str, str]) -> str:
    """The model's fingerprint from its tensors' digests (name -> hexadecimal)."""
    state = xxhash.xxh3_128()
    for name in sorted(digests):
        state.update(bytes.fromhex(digests[name]))
    return PREFIX + state.hexdigest()


def fingerprint(shards: Mapping[str, Path], *, use_cache: bool = True) -> str:
    """Of the tensors in `shards` (tensor name -> file it lies in). UserError where a file is unsound or lacks one.

    `use_cache=False` reads every byte again; what it finds is remembered all the same.
    """
    return combine(tensor_digests(shards, use_cache=use_cache))


def is_remembered(shards: Mapping[str, Path]) -> bool:
    """Whether their fingerprint is known without reading them: they are as they were when they were last read."""
    remembered = _remembered()
    return all(_key(file) in remembered for file in set(shards.values()))


def tensor_digests(shards: Mapping[str, Path], *, use_cache: bool = True) -> dict[str, str]:
    """Tensor name -> its digest."""
    files = sorted(set(shards.values()))
    remembered = _remembered() if use_cache else {}
    found: dict[Path, dict[str, str]] = {}
    for file in files:
        key = _key(file)
        digests = remembered.get(key)
        if digests is None:
            digests = _hash_file(file)
            if _key(file) == key and _is_settled(file):  # else it was written to meanwhile: true of no one moment
                _remember(key, digests)
        found[file] = digests
    missing = sorted(name for name, file in shards.items() if name not in found[file])
    if missing:
        raise UserError(f"lacks the tensor {missing[0]}", where=shards[missing[0]])
    return {name: found[file][name] for name, file in shards.items()}


def _hash_file(path: Path) -> dict[str, str]:
    with SafetensorsFile(path) as file, ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:

        def one(name: str) -> str:
            info = file.tensors[name]
            state = TensorHash(name, info.dtype, info.shape)
            for part in file.parts(name, memoryview(bytearray(min(PART, info.size)))):
                state.update(part)
            return state.digest()

        return dict(zip(file.tensors, pool.map(one, file.tensors), strict=True))


# ---- what is remembered ----------------------------------------------------------------------------------------------


def cache_path() -> Path:
    """Where hashes are remembered."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "litlora" / "fingerprints.json"


def _key(path: Path) -> str:
    real = path.resolve()
    status = real.stat()
    return f"{real}|{status.st_ino}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"


def _is_settled(path: Path) -> bool:
    """Whether the last change lies far enough back for another one to show: clocks of file systems tick in milliseconds, or seconds."""
    return time.time() - path.stat().st_ctime > 2


def _remembered() -> dict[str, dict[str, str]]:
    """What earlier runs hashed. Nothing at all where the file is missing or unsound: it only saves time."""
    try:
        values = json.loads(cache_path().read_bytes())
        sound = isinstance(values, dict) and all(
            isinstance(digests, dict) and all(isinstance(text, str) and DIGEST.fullmatch(text) for text in digests.values())
            for digests in values.values()
        )
    except (OSError, ValueError, RuntimeError, RecursionError):
        return {}
    return values if sound else {}


def _remember(key: str, digests: dict[str, str]) -> None:
    """Best effort: a cache that cannot be written costs time, never a result."""
    kept = {old: value for old, value in _remembered().items() if old.split("|")[0] != key.split("|")[0]}
    kept[key] = digests
    try:
        path = cache_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(dict(list(kept.items())[-CACHE_LIMIT:])))
        os.replace(temporary, path)
    except (OSError, RuntimeError):
        return
