"""metrics.csv: one row per logged step. A row is written whole, and rows beyond the checkpoint are dropped when a run is resumed."""

import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from litlora.checkpoint.commit import sync, write_atomically
from litlora.console import warn

if TYPE_CHECKING:
    import torch

COLUMNS = ("step", "epoch", "loss", "val_loss", "lr", "grad_norm", "graded", "tokens", "seconds", "tokens_per_second", "memory_mb")


class Metrics:
    """Appends rows to a CSV file. A full disk here costs a warning, not the run. `path` None (other ranks) writes nothing.

    `more`: columns beside COLUMNS, of this kind of run. `device`: where it computes (None: a CPU).
    """

    def __init__(self, path: Path | None, *, keep_until: int = -1, more: Sequence[str] = (), device: "torch.device | None" = None) -> None:
        self.path, self.columns, self.device = path, (*COLUMNS, *more), device
        self.warned = False
        if path is not None:
            kept = [row for row in read(path) if int(row["step"]) <= keep_until]
            lines = [",".join(self.columns), *(",".join(row.get(name, "") for name in self.columns) for row in kept)]
            write_atomically(path, "".join(f"{line}\n" for line in lines).encode())

    def write(self, **values: float | None) -> None:
        """A row; columns without a value stay empty."""
        values = {**values, "memory_mb": peak_memory_mb(self.device)}
        if self.path is None:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(",".join(written(values.get(name)) for name in self.columns) + "\n")
        except OSError as error:
            self.complain(error)

    def sync(self) -> None:
        """Before a checkpoint counts, its rows are on the disk: what is resumed after a power cut has none missing."""
        try:
            if self.path is not None and self.path.exists():
                sync(self.path)
        except OSError as error:
            self.complain(error)

    def complain(self, error: OSError) -> None:
        if not self.warned:
            warn(f"{self.path}: {error.strerror}; going on without the missing rows")
        self.warned = True


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file; a row that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    columns = lines[0].split(",") if lines else []
    rows = [line.split(",") for line in lines[1:]]
    return [dict(zip(columns, row, strict=True)) for row in rows if len(row) == len(columns) and row[0].isdecimal()]


def written(value: float | None) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, int) or not math.isfinite(value) else f"{value:.17g}"


def memory_text(device: "torch.device") -> str:
    return f"{peak_memory_mb(device) / 1024:.1f} GB"


def peak_memory_mb(device: "torch.device | None" = None) -> float:
    """The most memory this process ever held where it computes, in MB (2**20 bytes): of a GPU with what torch keeps for later."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_reserved(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024
