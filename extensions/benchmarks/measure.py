"""What every benchmark shares: the clock, peak memory, the machine's speed of the moment, processes and tables.

No torch when imported: the drivers stay small, and a runner decides itself when it pays for the import.
"""

import functools
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]  # the repository: runners are started from here
STARTED = "LITLORA_BENCHMARK_STARTED"  # the driver's time.monotonic() when it started a runner
GEMM_SIZE = 1024
TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
PACKAGES = (
    "torch",
    "lightning",
    "litgpt",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "llamafactory",
    "litlora",
    "lightning-fabric",
    "tokenizers",
    "safetensors",
    "numpy",
)

# ---- in a runner -----------------------------------------------------------------------------------------------------


@dataclass
class StepClock:
    """Times optimizer steps, each from the end of the one before it, and notes the machine's speed around the timed ones."""

    warmup: int  # steps that are run and not timed
    total: int  # steps, warm-up included
    seconds: list[float] = field(default_factory=list)  # of every step, warm-up included
    losses: list[float] = field(default_factory=list)  # mean over the graded tokens of the step
    gemm_gflops: list[float] = field(default_factory=list)  # when the warm-up is over, and at the end
    cpu_seconds: list[float] = field(default_factory=list)  # of every step, all threads: far below threads * seconds = we were kept waiting
    first_step_at: float = 0.0  # seconds from the process's start to the end of its first step
    last: float = 0.0
    last_cpu: float = 0.0

    def start(self) -> None:
        self.last, self.last_cpu = time.perf_counter(), time.process_time()

    def tick(self, loss: float) -> None:
        """A step is done; `loss` is its mean over graded tokens."""
        self.seconds.append(time.perf_counter() - self.last)
        self.cpu_seconds.append(time.process_time() - self.last_cpu)
        self.losses.append(loss)
        if len(self.seconds) == 1:
            self.first_step_at = time.monotonic() - float(os.environ.get(STARTED, "nan"))
        if len(self.seconds) in (self.warmup, self.total):
            self.gemm_gflops.append(gemm_gflops())
        self.start()  # what was measured in between is nobody's step

    def report(self) -> dict[str, Any]:
        assert len(self.seconds) == self.total, f"{len(self.seconds)} steps were taken, {self.total} were asked for"
        return {
            "step_seconds": self.seconds[self.warmup :],
            "step_cpu_seconds": self.cpu_seconds[self.warmup :],
            "warmup_seconds": self.seconds[: self.warmup],
            "losses": self.losses,
            "gemm_gflops": self.gemm_gflops,
            "first_step_at": self.first_step_at,
            "peak_mb": peak_mb(),
            "versions": versions(),
        }


def gemm_gflops(dtype: str = "float32", size: int = GEMM_SIZE, times: int = 20) -> float:
    """What square matrix products reach now on the threads that torch has, in GFLOP/s: all threads at one product, or each at its own,
    whichever is more. The mean, for others' work counts too."""
    import torch

    threads = torch.get_num_threads()
    together = products_per_second(dtype, size, times)

    def alone(_: int) -> float:
        torch.set_num_threads(1)
        return products_per_second(dtype, size, max(1, times // threads))

    with ThreadPoolExecutor(threads) as pool:
        apart = sum(pool.map(alone, range(threads)))
    torch.set_num_threads(threads)
    return max(together, apart) * 2 * size**3 / 1e9


def products_per_second(dtype: str, size: int, times: int) -> float:
    import torch

    a, b = (torch.ones(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
    torch.mm(a, b)
    start = time.perf_counter()
    for _ in range(times):
        torch.mm(a, b)
    return times / (time.perf_counter() - start)


class Bandwidth(NamedTuple):
    """Bytes a second at which memory is read, by whichever of several ways of reading was the fastest."""

    best: float  # the fastest reading of all
    steady: float  # one after the other for a while, as an answer's tokens read the weights


def bandwidth(megabytes: int = 256, seconds: float = 0.3) -> Bandwidth:
    """Now, on the threads that torch has; each way for so many seconds."""
    import torch

    from litlora.kernels import linear

    matrix, vector = torch.ones(megabytes * 2**20 // 4 // 4096, 4096), torch.ones(1, 4096)
    best, steady = [], []
    with torch.inference_mode():
        for read in (matrix.sum, functools.partial(torch.mv, matrix, vector[0]), functools.partial(linear, vector, matrix, None)):
            moments = [time.perf_counter()]
            while len(moments) < 6 or moments[-1] - moments[0] < seconds:
                read()
                moments.append(time.perf_counter())
            best.append(matrix.nbytes / min(after - before for before, after in itertools.pairwise(moments)))
            steady.append(matrix.nbytes * (len(moments) - 1) / (moments[-1] - moments[0]))
    return Bandwidth(max(best), max(steady))


def peak_mb() -> float:
    """The most memory this process has held, in MB (file pages that it maps included).

    VmHWM belongs to this program alone; ru_maxrss can carry over what the parent held when it started us.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter, as far as they are installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(threads: int) -> dict[str, Any]:
    """What this machine is and what its matrix products reach at the moment."""
    import torch

    torch.set_num_threads(threads)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": model,
        "flags": [flag for flag in TELLING_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(terse=True),
        "gemm_fp32_gflops": gemm_gflops(),
        "gemm_bf16_gflops": gemm_gflops("bfloat16", size=512, times=5),  # where it is emulated, larger ones take a minute
    }


# ---- in a driver -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One process that a driver started."""

    code: int
    wall: float  # seconds from start to exit
    cpu: float  # seconds of all its threads, user and system
    peak_mb: float
    first: float | None  # seconds from start to the output that was waited for
    stdout: str
    stderr: str


def run(command: Sequence[str], *, env: Mapping[str, str] | None = None, wanted: Callable[[str], bool] | None = None) -> Run:
    """Start `command` in the repository's root and wait for it; the moment is noted when `wanted(stdout so far)` is first true."""
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | dict(env or {})
    start = time.monotonic()
    environment[STARTED] = repr(start)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    out, err, first = b"", b"", None
    pipes = {process.stdout.fileno(), process.stderr.fileno()}
    while pipes:
        for pipe in select.select(list(pipes), [], [])[0]:
            chunk = os.read(pipe, 65536)
            if not chunk:
                pipes.remove(pipe)
            elif pipe == process.stderr.fileno():
                err += chunk
            else:
                out += chunk
                if wanted is not None and first is None and wanted(out.decode(errors="replace")):
                    first = time.monotonic() - start
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    process.stderr.close()
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(
        code=process.returncode,
        wall=wall,
        cpu=usage.ru_utime + usage.ru_stime,
        peak_mb=usage.ru_maxrss * unit / 1e6,
        first=first,
        stdout=out.decode(errors="replace"),
        stderr=err.decode(errors="replace"),
    )


def run_json(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run `command`, whose last line of stdout is a JSON object; a failure gives {"failed": last lines of what it said}."""
    done = run(command, env=env)
    if done.code != 0:
        return {"failed": f"exit code {done.code}: " + " | ".join(tail(done.stderr or done.stdout))}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tail(text: str, lines: int = 4) -> list[str]:
    return [line for line in text.splitlines() if line.strip()][-lines:]


def missing(python: str, modules: Sequence[str]) -> list[str]:
    """Those of `modules` that this interpreter does not have (found without importing them)."""
    program = "import importlib.util, sys; print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])"
    done = run([python, "-c", program, *modules])
    return done.stdout.split() if done.code == 0 else list(modules)


def thread_env(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table; the first row names the columns, the first column is text and the others are figures."""
    columns = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in columns]

    def line(cells: Sequence[str]) -> str:
        aligned = (cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(aligned) + " |"

    rule = "|" + "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|"
    return "\n".join([line(columns), rule, *(line([row[name] for name in columns]) for row in rows)])


def word(reached: bool) -> str:
    """What a verdict says of an aim."""
    return "reached" if reached else "MISSED"


def write_results(out_dir: Path, id: str, result: Mapping[str, Any], markdown: str) -> Path:
    """DATE-ID.json and DATE-ID.md; an earlier result of the same day is kept, and this one gets a number."""
    out_dir.mkdir(parents=True, exist_ok=True)
    stem = f"{time.strftime('%Y-%m-%d')}-{id}"
    name, number = stem, 1
    while (out_dir / f"{name}.json").exists():
        number += 1
        name = f"{stem}-{number}"
    path = out_dir / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown + "\n")
    return path


def default_work_dir() -> Path:
    """Where bases and samples are kept between runs: they take seconds to minutes to make and never change."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "litlora" / "benchmarks"


def default_threads() -> int:
    """The cores that this process may use, hyper-threads included."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":  # `python -m extensions.benchmarks.measure THREADS`: the machine, as JSON
    print(json.dumps(machine(int(sys.argv[1]))))
