"""Where trials happen: a tiny base that every command works on, rows, and what an undisturbed run makes of them."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extensions.reliability.processes import Server
from litlora.checkpoint import names

VOLATILE = ("seconds", "tokens_per_second", "memory_mb")  # columns of time and memory


@dataclass
class Place:
    """A directory with `base/`, `rows.jsonl`, and whatever the trials make."""

    path: Path
    server: Server
    references: dict[tuple[str, ...], dict[str, bytes]] = field(default_factory=dict)
    benches: dict[str, Any] = field(default_factory=dict)  # of the commands that write

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def rows(self) -> Path:
        return self.path / "rows.jsonl"

    def finetune(self, out: Path, steps: int, *more: str) -> list[str]:
        """A run with dropout, evaluation and a commit each second step."""
        words = f"finetune lora --checkpoint_dir {self.base} --data {self.rows} --out_dir {out} --train.max_steps {steps}"
        words += " --train.global_batch_size 2 --train.lr 1e-3 --train.save_interval 2 --eval.interval 4 --eval.fraction 0.2"
        return [
            *words.split(),
            "--lora.dropout",
            "0.1",
            "--lora.r",
            "4",
            "--lora.target_modules",
            "q_proj",
            "--threads",
            "1",
            "--accelerator",
            "cpu",
            *more,
        ]

    def reference(self, steps: int, *more: str) -> dict[str, bytes]:
        """What a run that nobody disturbs ends with."""
        key = (str(steps), *more)
        if key not in self.references:
            out = self.path / f"undisturbed-{len(self.references)}"
            code, said = self.server.run(self.finetune(out, steps, *more))
            assert code == 0, said
            self.references[key] = ending(out, steps)
            self.references[(*key, "path")] = {"path": os.fsencode(out)}
        return self.references[key]

    def undisturbed(self, steps: int, *more: str) -> Path:
        """The directory of that run."""
        self.reference(steps, *more)
        return Path(os.fsdecode(self.references[(str(steps), *more, "path")]["path"]))

    def fresh(self, name: str) -> Path:
        """An empty directory of that name, whatever was there before."""
        path = self.path / name
        if path.exists():
            shutil.rmtree(path)
        path.mkdir()
        return path


def make_place(path: Path, server: Server) -> Place:
    from talkers import make_talker

    path.chmod(0o755)  # a trial without root's privileges reads here
    make_talker(path / "base")
    rows = [{"prompt": f"say {number}", "completion": f"{number}!"} for number in range(16)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Place(path, server)


def scratch() -> Path:
    """A directory in memory, where there is such a place: a real disk takes milliseconds to sync, a thousand times."""
    return Path(tempfile.mkdtemp(prefix="litlora-trials-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def ending(out: Path, step: int) -> dict[str, bytes]:
    """What must be equal to the bit: weights and optimizer of the last step, every row of the metrics but for time and memory."""
    from litlora.train.metrics import read

    rows = [{name: value for name, value in row.items() if name not in VOLATILE} for row in read(out / names.METRICS)]
    last = out / names.step_name(step)
    files = {name: (last / name).read_bytes() for name in (names.ADAPTER_WEIGHTS, names.TRAINING_STATE) if (last / name).exists()}
    return files | {names.METRICS: json.dumps(rows).encode()}


def temporaries(directory: Path) -> list[str]:
    """What is not yet, or no longer, anything."""
    return sorted(path.name for path in directory.iterdir() if names.temporary_owner(path) is not None) if directory.exists() else []
