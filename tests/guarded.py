"""Commands under an audit hook that forbids what no model, no row and no name may bring about: `python guarded.py PLAN.json`.

The plan: `root` (what may be written lies below), `foreign` (directories no code may come from), `commands` (each with `words`, the
directory it is run in, and the paths that it may make). One line of JSON for each: exit code, what it said, what it did that is forbidden.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

FORBIDDEN = (
    "socket.", "ftplib.", "http.client.", "smtplib.", "urllib.Request", "webbrowser.open", "os.system", "os.exec", "os.posix_spawn",
    "os.spawn", "os.fork", "os.startfile", "subprocess.Popen", "pty.spawn", "pickle.find_class", "ctypes.dlopen", "code.__new__",
    "marshal.loads",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MARK = "EVIL-PAYLOAD"  # a code with this text in it is somebody else's


class Guard:
    """The hook. It can't be taken off again: `seen` gathers what one command did."""

    def __init__(self, root: str, foreign: list[str]) -> None:
        self.root, self.foreign, self.seen = os.path.realpath(root), tuple(map(os.path.realpath, foreign)), list[str]()
        self.looking = False

    def forbid(self, what: str) -> None:
        self.seen.append(what)
        raise PermissionError(f"audit: {what}")

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.looking:
            return
        if event.startswith(FORBIDDEN) and not self.comes_from_python(event, arguments):
            self.forbid(f"{event} {arguments!r:.300}")
        elif event in ("exec", "compile"):
            self.code(event, arguments)
        elif event == "import" and arguments[1] and self.is_foreign(str(arguments[1])):
            self.forbid(f"import {arguments[1]}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike) and isinstance(arguments[2], int):
            if arguments[2] & WRITING and not self.may_write(os.fspath(arguments[0])):
                self.forbid(f"open for writing: {arguments[0]!r}")
        elif event == "os.mkdir" and not self.may_write(os.fspath(arguments[0])):
            self.forbid(f"mkdir {arguments[0]!r}")

    def code(self, event: str, arguments: tuple[Any, ...]) -> None:
        source, file = (arguments[0], arguments[1]) if event == "compile" else (None, getattr(arguments[0], "co_filename", ""))
        text = source.decode("utf-8", "replace") if isinstance(source, bytes) else source if isinstance(source, str) else ""
        if MARK in text or self.is_foreign(os.fsdecode(file) if isinstance(file, str | bytes) else str(file)):
            self.forbid(f"{event} of {file!r}")

    def comes_from_python(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """An import of an installed module unmarshals its code, and loads its library."""
        if event == "ctypes.dlopen":
            return not self.is_foreign(str(arguments[0]))
        return event in ("marshal.loads", "code.__new__") and MARK.encode() not in (
            arguments[0] if isinstance(arguments[0], bytes) else b""
        )

    def is_foreign(self, path: str) -> bool:
        return path.startswith("/") and os.path.realpath(path).startswith(self.foreign) if self.foreign else False

    def may_write(self, path: str | bytes) -> bool:
        whole = os.path.realpath(os.fsdecode(path))
        return whole.startswith((self.root, "/dev/", "/proc/self/"))


def everything(root: Path) -> set[str]:
    return {os.path.join(here, name) for here, inside, files in os.walk(root) for name in (*inside, *files)}


def main(plan: dict[str, Any]) -> None:
    import jinja2.sandbox  # noqa: F401  what libraries do while they are imported is their own
    import lightning_fabric.fabric  # noqa: F401
    import torch

    torch.set_num_threads(1)
    from litlora.__main__ import main as litlora

    guard, root = Guard(plan["root"], plan.get("foreign", [])), Path(plan["root"])
    sys.addaudithook(guard)
    for command in plan["commands"]:
        os.chdir(command["cwd"])
        before, guard.seen, said = everything(root), [], io.StringIO()
        sys.stdin = io.StringIO("Hello\n")
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            guard.looking = True
            try:
                code: Any = litlora(command["words"])
            except SystemExit as leaving:
                code = leaving.code
            guard.looking = False
        allowed = tuple(os.path.join(command["cwd"], path) for path in command["makes"])
        made = sorted(path for path in everything(root) - before if not path.startswith(allowed or ("/nowhere/",)))
        print(json.dumps({"code": code, "said": said.getvalue(), "seen": guard.seen, "made": made}), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
