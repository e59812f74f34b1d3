"""What `litlora download` writes beside a model: whose files these are, and whether all of them are there.

Until the last file was read again and found right, the record says `finished: false`, and no command takes the directory for a model.
"""

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.commit import write_atomically
from litlora.checkpoint.reading import read_json
from litlora.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Download:
    """`.cache/huggingface/litlora.json` of a directory: a model of a hub at one commit."""

    repo_id: str  # ORG/NAME
    revision: str  # as it was asked for
    commit: str  # what that was, in hexadecimal
    files: dict[str, int]  # name -> bytes
    finished: bool = False

    def missing(self, directory: Path) -> list[str]:
        """Those of its files that are not there, or not of their size."""
        paths = {name: directory / name for name in self.files}
        return [name for name, path in paths.items() if not path.is_file() or path.stat().st_size != self.files[name]]

    def command(self, directory: Path) -> str:
        """What goes on with it."""
        revision = "" if self.revision == names.MAIN else f" --revision {shlex.quote(self.revision)}"
        return f"litlora download {shlex.quote(self.repo_id)} --out_dir {shlex.quote(str(directory))}{revision}"


def read_download(directory: Path) -> Download | None:
    """The record of a directory, None where it has none. UserError where that is unsound."""
    path = directory / names.DOWNLOAD
    if not path.exists():
        return None
    values = read_json(path.parent, path.name)
    kinds: dict[str, Any] = {"repo_id": str, "revision": str, "commit": str, "files": dict, "finished": bool}
    wrong = next((key for key, kind in kinds.items() if not isinstance(values.get(key), kind)), None)
    if wrong or not all(isinstance(size, int) for size in values["files"].values()):
        raise UserError(f"{wrong or 'files'} is not what litlora writes there", where=path, hint="delete this file, then download again")
    return Download(**{key: values[key] for key in kinds})


def write_download(directory: Path, download: Download) -> None:
    """WorkError (disk full and the like): the record is what it was."""
    path = directory / names.DOWNLOAD
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(asdict(download), indent=1) + "\n").encode())


def refuse_unfinished(directory: Path) -> None:
    """UserError where a download into `directory` was begun and not finished."""
    download = read_download(directory)
    if download is not None and not download.finished:
        what = f"the download of {download.repo_id} was not finished"
        raise UserError(what, where=directory, hint=f"go on with it: {download.command(directory)}")
