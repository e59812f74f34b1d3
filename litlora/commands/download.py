"""`litlora download ORG/NAME`: a base from a hub, with what litlora reads of it and nothing else.

huggingface_hub carries the bytes (retries, Range requests, tokens, mirrors). Here it is decided which files, looked at first whether they
can be used and find room, and looked at last whether they are what the hub says: every file is read again and hashed.
"""

import errno
import glob
import hashlib
import os
import shlex
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litlora.checkpoint import names
from litlora.checkpoint.commit import check_free_space, check_writable, sync, write_error
from litlora.checkpoint.downloaded import Download as Record
from litlora.checkpoint.downloaded import read_download, write_download
from litlora.checkpoint.foreign import convert_hint
from litlora.checkpoint.reading import is_plain_name, read_json, sha256
from litlora.checkpoint.resolve import looked_at
from litlora.checkpoint.shards import files_of_index
from litlora.console import MB, Progress, amount, counted, header, put, say
from litlora.errors import Interrupted, UserError, WorkError
from litlora.families import config_from_hf, quantised_by, unquantised
from litlora.options import Download

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BIG = 2**26  # bytes from which on a progress line is worth it
MARGIN = 2**24  # bytes free beyond the files themselves: metadata and locks
ALWAYS = (names.CONFIG, names.GENERATION_CONFIG, *names.TOKENIZER_FILES, *names.LICENCE_FILES, *names.PROCESSOR_FILES, names.README)


@dataclass(frozen=True)
class File:
    """One file as the hub lists it."""

    size: int
    digest: str  # sha256 of a large file (Git LFS), else git's own name of it: sha1 over a header and the bytes

    def is_at(self, path: Path) -> bool:
        """Whether `path` holds exactly these bytes. Reads them."""
        return path.is_file() and path.stat().st_size == self.size and (sha256 if len(self.digest) == 64 else git_name)(path) == self.digest


def download(options: Download) -> None:
    """Fetch what `options` names; the directory goes to standard output.

    UserError: no such model, a gated one, one that litlora cannot read, a directory that holds something else; nothing was written.
    WorkError: the network or the disk; what is finished stays, and the same command goes on.
    """
    repo_id = options.repo_id
    if repo_id is None:
        raise UserError("which model?", hint="litlora download HuggingFaceTB/SmolLM2-135M-Instruct")
    directory = Path(options.out_dir or Path(names.MODELS) / repo_id.split("/")[-1])
    with looked_at(directory):
        begun = begun_before(directory, repo_id, options.revision)
    if begun is not None and begun.finished and not begun.missing(directory):
        say(f"{directory} holds {repo_id} already, complete ({begun.revision}, commit {begun.commit[:12]}): nothing to do")
        return what_next(directory)
    api = open_hub()
    with understood(api, repo_id, options.revision):
        record, files = look_up(api, repo_id, options.revision, begun.commit if begun else options.revision)
    if begun is None:
        check_directory(directory, files)
    missing = [name for name in files if not (directory / name).is_file()]
    if begun is None and not missing:
        say(f"{directory} holds {repo_id} already, complete (commit {record.commit[:12]}): nothing to do")
        return what_next(directory)
    check_writable(directory)
    size = sum(files[name].size for name in missing)
    check_free_space(directory, size + MARGIN)
    there = f"; {counted(len(files) - len(missing), 'is', 'are')} there already" if len(missing) < len(files) else ""
    header(
        [
            ("model", f"{repo_id}, {options.revision}, commit {record.commit[:12]}, from {api.endpoint}"),
            ("result", f"{directory}: {counted(len(missing), 'file')}, {amount(size)}{there}"),
        ]
    )
    try:
        with understood(api, repo_id, options.revision, directory, size):
            fetch(api, directory, record, missing)
            check_bytes(directory, files, missing)
            settle(directory, record)
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, interrupted(record, directory)) from None
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    say(f"fetched {counted(len(missing), 'file')}, {amount(size)}: {', '.join(missing[:4])}{more}")
    say(f"read again from the disk: {counted(len(files), 'file')}, each as the hub says")
    what_next(directory)


def what_next(directory: Path) -> None:
    """Commands that work with the model."""
    place = shlex.quote(str(directory))
    if quantised_by(read_json(directory, names.CONFIG)) is not None:
        say(f"next: litlora convert {place} --to hf --out_dir {shlex.quote(f'{directory}-plain')}")
    elif any(directory.glob("*" + names.SAFETENSORS)):
        say(f"next: litlora finetune lora --checkpoint_dir {place} --data rows.jsonl")
        say(f"      or litlora inspect {place}")
    else:
        say(f"next: {convert_hint(directory)}")
    put(directory)


# ---- the hub ---------------------------------------------------------------------------------------------------------


def open_hub() -> "HfApi":
    """The hub that HF_ENDPOINT names; the token is HF_TOKEN, or what `hf auth login` stored."""
    try:
        from huggingface_hub import HfApi, logging
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        hint = 'pip install "litlora[download]"'
        raise UserError("models are fetched by huggingface_hub, which is not installed", hint=hint) from error
    logging.set_verbosity_error()  # its warnings tell of retries; what fails in the end is told here
    disable_progress_bars()  # `watched` shows one line for all files
    return HfApi(library_name="litlora")


@contextmanager
def understood(api: "HfApi", repo_id: str, revision: str, directory: Path | None = None, size: int = 0) -> Iterator[None]:
    """What the hub, the network and the disk answer, in words. Of their own messages nothing is shown: they may hold signed addresses."""
    from huggingface_hub import errors

    again = "try again" if directory is None else "what is finished stays: the same command goes on"
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError("is no name of a model on a hub", where=repr(repo_id), hint="litlora download ORG/NAME") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing is fetched", where=repo_id, hint="unset HF_HUB_OFFLINE") from error
    except errors.GatedRepoError as error:
        hint = f"accept its terms at {api.endpoint}/{repo_id}, then set HF_TOKEN to a token of that account"
        raise UserError("is gated: only those may fetch it whom its owners let in", where=repo_id, hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"has no revision {revision!r}", where=repo_id, hint="--revision a branch, a tag or a commit") from error
    except errors.RepositoryNotFoundError as error:
        what, hint = f"there is no such model on {api.endpoint}, or it is private", "check the name; for a private one set HF_TOKEN"
        raise UserError(what, where=repo_id, hint=hint) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(f"{api.endpoint} refused the token ({status})", where=repo_id, hint="check HF_TOKEN and its rights") from error
        raise WorkError(f"{api.endpoint} answered {status}", where=repo_id, hint=f"{again}, later") from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        what = f"{api.endpoint} cannot be reached, or broke off"
        raise WorkError(what, where=repo_id, hint=f"check the network, HF_ENDPOINT and HTTPS_PROXY; {again}") from error
    except OSError as error:
        if error.errno is None:  # how huggingface_hub says that a file came short
            raise WorkError("a file came incomplete", where=repo_id, hint=again) from error
        full = write_error(error, directory or Path(tempfile.gettempdir()), size)
        hint = f"free some space, or write to another disk; {again}" if error.errno == errno.ENOSPC else again
        raise WorkError(full.what, where=full.where, hint=hint) from error


def look_up(api: "HfApi", repo_id: str, revision: str, at: str) -> tuple[Record, dict[str, File]]:
    """What has to be fetched of a model at the revision `at`. UserError where that is no base that litlora can read."""
    info = api.model_info(repo_id, revision=at, files_metadata=True)
    assert info.sha is not None
    listed = {each.rfilename: File(each.size or 0, each.lfs["sha256"] if each.lfs else each.blob_id or "") for each in info.siblings or ()}
    if names.CONFIG not in listed:
        adapter = names.ADAPTER_CONFIG in listed
        what = "is an adapter, not a base" if adapter else f"holds no {names.CONFIG}, and so no model that litlora reads"
        raise UserError(what, where=repo_id, hint=f"download its base; its {names.ADAPTER_CONFIG} names it" if adapter else "")
    with tempfile.TemporaryDirectory(prefix="litlora-") as place:
        first = [name for name in (names.CONFIG, names.WEIGHTS_INDEX, names.PICKLED_INDEX) if name in listed]
        api.snapshot_download(repo_id, revision=info.sha, local_dir=place, allow_patterns=first)
        config_from_hf(unquantised(read_json(Path(place), names.CONFIG)), f"{repo_id}: {names.CONFIG}")
        weights = weights_of(repo_id, listed, Path(place))
    templates = [name for name in listed if is_template(name)]
    files = {name: listed[name] for name in (*ALWAYS, *templates, *weights) if name in listed}
    lost = next((name for name in weights if name not in listed), None)
    if lost is not None:
        raise UserError(f"its index names {lost}, which is not there", where=repo_id, hint="tell the model's authors")
    return Record(repo_id=repo_id, revision=revision, commit=info.sha, files={name: file.size for name, file in files.items()}), files


def is_template(name: str) -> bool:
    """Whether it is one of several chat templates, in a folder of their own."""
    folder, _, file = name.partition("/")
    return folder == names.ADDITIONAL_TEMPLATES and is_plain_name(file) and file.endswith(names.TEMPLATE)


def weights_of(repo_id: str, listed: Mapping[str, Any], place: Path) -> list[str]:
    """The files of its weights: safetensors; pickled ones only where there are none. In `place` are its indexes."""
    kinds = ((names.WEIGHTS, names.WEIGHTS_INDEX, names.SAFETENSORS), (names.PICKLED_WEIGHTS, names.PICKLED_INDEX, names.PICKLES[0]))
    for single, index, ending in kinds:
        if single in listed:
            return [single]
        if index in listed:
            return [index, *sorted(set(files_of_index(place, index, ending).values()))]
    found = [name for name in listed if name.endswith((names.GGUF, *names.PICKLES))]
    context = (f"found: {', '.join(found[:3])}",) if found else ()
    what = f"holds neither {names.WEIGHTS} nor {names.PICKLED_WEIGHTS}"
    raise UserError(what, where=repo_id, context=context, hint="look for the same model in safetensors format")


def fetch(api: "HfApi", directory: Path, record: Record, missing: list[str]) -> None:
    """The missing files; from the first byte until `settle` the record keeps every command from taking the directory for a model."""
    directory.mkdir(parents=True, exist_ok=True)
    write_download(directory, record)
    if missing:
        patterns = [glob.escape(name) for name in missing]
        with watched(directory, record, missing):
            api.snapshot_download(record.repo_id, revision=record.commit, local_dir=directory, allow_patterns=patterns)


@contextmanager
def watched(directory: Path, record: Record, missing: list[str]) -> Iterator[None]:
    """One line says how far it is: the bytes that lie in the directory, looked at now and then.

    Ctrl-C ends the process there and then: huggingface_hub would first finish the files that are under way, gigabytes perhaps."""

    def written() -> int:
        return sum(map(size_at, (*(directory / name for name in missing), *directory.glob(names.UNFINISHED))))

    def look() -> None:
        while not done.wait(0.5):
            bar.update(round((written() - before) / MB))

    def stop(*_: object) -> None:
        bar.close()
        say(interrupted(record, directory))
        os._exit(128 + signal.SIGINT)

    size, before, done = sum(record.files[name] for name in missing), written(), threading.Event()
    bar = Progress(round(size / MB), "MB", quiet=size < BIG)
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    handler = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        done.set()
        watcher.join()
        bar.close()


def interrupted(record: Record, directory: Path) -> str:
    return f"\ninterrupted; go on with: {record.command(directory)}"


def size_at(path: Path) -> int:
    """0 where there is nothing, any more or yet."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


# ---- the directory ---------------------------------------------------------------------------------------------------


def begun_before(directory: Path, repo_id: str, revision: str) -> Record | None:
    """The download of this model into `directory`, if there was one. UserError where it was another's."""
    record = read_download(directory)
    if record is None:
        return None
    if record.repo_id != repo_id or revision not in (record.revision, record.commit):
        holds = f"{record.repo_id} ({record.revision}, commit {record.commit[:12]})"
        raise UserError(f"holds {holds}, not {repo_id} ({revision})", where=directory, hint="--out_dir another directory")
    return record


def check_directory(directory: Path, files: Mapping[str, File]) -> None:
    """UserError unless `directory` is new, empty, or holds this very model, fetched by other means and perhaps not all of it."""
    with looked_at(directory):
        if not os.path.lexists(directory) or (directory.is_dir() and not any(directory.iterdir())):
            return
        there = [name for name in files if (directory / name).exists()]
        differs = next((name for name in there if not files[name].is_at(directory / name)), None)
    if names.CONFIG not in there or differs:
        what = f"holds another model: its {differs} is not this one's" if differs else "is not empty, and holds no part of this model"
        raise UserError(what, where=directory, hint="--out_dir another directory")


def check_bytes(directory: Path, files: Mapping[str, File], fetched: list[str]) -> None:
    """WorkError where a file is not what the hub says. One that was fetched just now is taken away, so that it is fetched again."""
    for name, file in files.items():
        path = directory / name
        if file.is_at(path):
            sync(path)
            continue
        if name in fetched:
            path.unlink(missing_ok=True)
        hint = "start it again: this file is fetched anew" if name in fetched else "move it away, then start again"
        raise WorkError("does not hold the bytes that the hub says", where=path, hint=hint)


def settle(directory: Path, record: Record) -> None:
    """From here on it is a model. What killed downloads left half is removed."""
    for path in directory.glob(names.UNFINISHED):
        path.unlink(missing_ok=True)
    write_download(directory, replace(record, finished=True))


def git_name(path: Path) -> str:
    """What git calls a file of these bytes (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects). For small files."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
