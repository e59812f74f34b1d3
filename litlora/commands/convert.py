"""`litlora convert`: a model or an adapter in another format. Says what it read, what became of it, and what to type next."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litlora.console import Progress, counted, header, put, say
from litlora.errors import UserError
from litlora.options import Convert

BIG = 256 * 2**20  # bytes of a model from which on a progress line is worth it
MB = 10**6
ASKED = {"hf": "a Hugging Face directory", "peft": "a PEFT adapter", "litlora": "a step of litlora", "gguf": "GGUF, for llama.cpp"}


def convert(options: Convert) -> None:
    """Convert what `options` names; the result's path goes to standard output. UserError, WorkError: nothing was written."""
    from litlora.convert import Adapter, check, open_source
    from litlora.convert import convert as write
    from litlora.convert.gguf_file import open_package

    to = options.to
    if to is None:
        raise UserError("into which format?", where="--to", hint="--to hf, peft, litlora or gguf")
    if options.out_dir is None:
        raise UserError("where is the result to go?", where="--out_dir", hint="--out_dir a directory that does not exist yet")
    if to == "gguf":
        open_package()  # refuses before anything is read or said
    out_dir = Path(options.out_dir)
    source = open_source(options.checkpoint_dir, to=to, base_dir=options.base_dir)
    check(source, to, out_dir, options.dtype)
    size = sum(part.size for part in source.tensors.values())
    chosen = f" ({source.checkpoint.why})" if source.checkpoint is not None and source.checkpoint.why else ""
    work = OnTheWay(
        [
            ("source", f"{source.path}{chosen}, {source.kind}: {counted(len(source.tensors), 'tensor')}, {size / MB:,.1f} MB"),
            ("result", f"{out_dir}, {ASKED[to]}"),
        ],
        size,
    )
    try:
        report = write(source, to, out_dir, dtype=options.dtype, max_shard_size=options.max_shard_size, progress=work.goes_on)
        work.goes_on(0)  # of an adapter nothing was heard
    finally:
        work.close()
    tell(report)
    for line in what_next(to, out_dir, report, is_adapter=isinstance(source, Adapter)):
        say(line)
    put(out_dir)


class OnTheWay:
    """What is said of a conversion while it goes on: nothing before something is written, for until then it may be refused."""

    def __init__(self, rows: Sequence[tuple[str, str]], size: int) -> None:
        self.rows, self.size, self.done = rows, size, 0
        self.bar: Progress | None = None

    def goes_on(self, count: int) -> None:
        """So many bytes more are written."""
        if self.bar is None:
            header(self.rows)
            self.bar = Progress(round(self.size / MB), "MB", quiet=self.size < BIG)
        self.done += count
        self.bar.update(round(self.done / MB))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def tell(report: dict[str, Any]) -> None:
    """The proof, and what was left out, in a few lines."""
    proof, renamed, dropped = report["proof"], report["renamed"], report["dropped"]
    rounded = f", {proof['rounded_once']:,} rounded once" if proof["rounded_once"] else ""
    say(f"read again from the disk: {counted(proof['tensors'], 'tensor')}, {proof['equal']:,} equal to the source's{rounded}")
    if renamed:
        say(f"{counted(len(renamed), 'tensor has', 'tensors have')} another name than there")
    for why in dict.fromkeys(dropped.values()):
        left = [name for name, reason in dropped.items() if reason == why]
        say(f"left out: {', '.join(left[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''} ({why})")


def what_next(to: str, out_dir: Path, report: dict[str, Any], *, is_adapter: bool) -> list[str]:
    """Commands that work with the result."""
    place = shlex.quote(str(out_dir))
    if to == "gguf":
        file = shlex.quote(str(out_dir / report["files"][0]))
        return [f"next: llama-cli -m BASE.gguf --lora {file}" if is_adapter else f"next: llama-cli -m {file}"]
    if to == "peft":
        return [f"next: PeftModel.from_pretrained(base, {str(out_dir)!r}), or litlora chat {place}"]
    more = f"litlora merge_lora {place}" if to == "litlora" else f"vllm serve {place}"
    return [f"next: litlora chat {place}", f"      or {more}"]
