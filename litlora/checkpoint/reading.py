"""Files out of a model's directory, opened with care: the directory may come from anywhere.

Only regular files that lie inside the directory are opened. A symbolic link may leave it only as Hugging Face's cache does
(`models--org--name/snapshots/HASH/file -> ../../blobs/...`): within the same `models--*` directory.
"""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.errors import UserError

JSON_LIMIT = 64 * 2**20  # bytes; an index of a thousand shards has about one million
CHUNK = 2**20
READ_UNASKED = 10**9  # bytes: a second or so. More is read where a command says that it does, or is asked to with --check


def file_in(directory: Path, name: str) -> Path:
    """`directory/name`, after checking that `name` is a plain file name and the file a regular one inside the directory.

    Raises UserError before anything is opened.
    """
    if not is_plain_name(name):
        raise UserError(f"{name!r} is no plain file name", where=directory, hint="use a copy of this directory from a source you trust")
    path = directory / name
    try:
        status = path.stat()
        target = path.resolve(strict=True)
    except OSError as error:
        raise unreadable(error, path) from error
    except RuntimeError as error:  # Python 3.10 to 3.12 on a loop of links
        raise UserError("is a link that leads to itself", where=path) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError("is no regular file", where=path)
    if not any(target.is_relative_to(root) for root in allowed_roots(directory)):
        raise UserError(
            f"is a link out of its directory, to {target}", where=path, hint="put the file itself here, or name the directory it is in"
        )
    return path


def unreadable(error: OSError, path: Path) -> UserError:
    """What to say of a file that cannot be opened. A step that was chosen may be gone when it is read."""
    if not isinstance(error, FileNotFoundError):
        return UserError(f"cannot be read: {error.strerror}", where=path)
    if path.parent.exists() or names.step_number(path.parent) is None:
        return UserError("is missing", where=path)
    hint = "a run that trains takes older steps away (--train.keep): the same once more finds one that is there"
    return UserError("is gone since it was looked up", where=path.parent, hint=hint)


def is_plain_name(name: object) -> bool:
    """Whether it names a file of a directory and nothing beyond: no slashes, no drive, no `..`, nothing unprintable."""
    return isinstance(name, str) and name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\:") and len(name) < 256


def allowed_roots(directory: Path) -> list[Path]:
    """Where the files of `directory` may really lie: in it, or in the `models--*` directory of the cache it belongs to."""
    real = directory.resolve()
    caches = [parent for parent in real.parents if parent.name.startswith("models--") and real.is_relative_to(parent / "snapshots")]
    return [real, *caches]


def read_bytes(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """A small regular file's bytes; UserError where it is none or too long."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise unreadable(error, path) from error
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UserError("is no regular file", where=path)
        if status.st_size > limit:
            raise UserError(f"has {status.st_size:,} bytes; at most {limit:,} are read", where=path)
        return file.read(limit)


def parse_json(raw: bytes, where: Path) -> dict[str, Any]:
    """A JSON object in which no key stands twice; UserError naming `where` otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UserError(f"names {key!r} twice", where=where)
            found[key] = value
        return found

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"is no sound JSON: {error}", where=where, hint="copy or download this file again") from error
    if not isinstance(value, dict):
        raise UserError("holds no JSON object", where=where)
    return value


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in `directory/name`, a file that passes `file_in`."""
    path = file_in(directory, name)
    return parse_json(read_bytes(path), path)


def size_of(directory: Path) -> int:
    """Bytes of all files in a directory and below."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    """Of a whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
