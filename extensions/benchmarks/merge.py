"""C4 of PERFORMANCE.md: merging a LoRA on all linears into a 1.1B bf16 base, against `cp` and fsync of the same file.

    python -m extensions.benchmarks.merge --work /somewhere/with/7/GB

Each tool runs in a process of its own, interpreter start included, in turn with the others; the files are in the cache of the
system for all of them. Beside the time: CPU seconds, peak memory, bytes written, and a check of the result against fp64.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extensions.benchmarks.artefacts import shape
from extensions.benchmarks.measure import Run, default_threads, default_work_dir, run, run_json, table, tail, thread_env, write_results

SHAPES = {  # of Llamas: hidden, layers, heads, kv heads, MLP, vocabulary
    "1.1b": (2048, 22, 32, 4, 5632, 32000),
    "tiny": (64, 2, 4, 2, 160, 512),
}
RANK, ALPHA, SEED = 16, 32, 1234
SAMPLED = 64  # rows of each sampled module that are checked against fp64
MB = 10**6


@dataclass
class Job:
    """The directories of one benchmark."""

    work: Path

    @property
    def base(self) -> Path:
        return self.work / "base"

    @property
    def step(self) -> Path:
        return self.work / "run" / "step-100"

    @property
    def target(self) -> Path:
        return self.work / "result"

    @property
    def weights(self) -> Path:
        return self.base / "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=default_work_dir() / "merge", help="where base, adapter and results go (about three bases)"
    )
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="directory for the results' JSON and table (default: only printed)")
    parser.add_argument("--keep", action="store_true", help="keep base and adapter for the next time")
    parser.add_argument("--make", action="store_true", help="make base and adapter, and measure nothing")
    arguments = parser.parse_args()
    job = Job(arguments.work / arguments.shape)
    if arguments.make:
        make_base(job, SHAPES[arguments.shape])
        make_step(job)
        return
    # in a process of its own: Linux counts what this one once held as the peak of every process that it starts later
    made = run([sys.executable, "-m", "extensions.benchmarks.merge", "--make", "--work", str(arguments.work), "--shape", arguments.shape])
    if made.code != 0:
        raise SystemExit("no base: " + "\n".join(tail(made.stderr, 20)))
    runs: dict[str, list[Run]] = {}
    for repeat in range(arguments.repeats):
        for name in commands(job):
            print(f"repeat {repeat + 1} of {arguments.repeats}: {name}", file=sys.stderr, flush=True)
            runs.setdefault(name, []).append(measured(job, name))
    result = summary(job, arguments.shape, runs, check(job))  # of the last run's result
    text = table(rows(result["tools"]))
    if arguments.out:
        write_results(arguments.out, "C4", result, text)
    print(json.dumps(result, indent=1))
    print(text)
    shutil.rmtree(job.target, ignore_errors=True)
    if not arguments.keep:
        shutil.rmtree(job.work)


# ---- what is measured ------------------------------------------------------------------------------------------------


def commands(job: Job) -> dict[str, list[str]]:
    """The tools by name. `litlora, base not seen before`: its fingerprint is in no cache, so the base is read twice."""
    merge = [sys.executable, "-m", "litlora", "merge_lora", str(job.step), "--out_dir", str(job.target / "merged")]
    copied = job.target / job.weights.name
    return {
        "cp + fsync": ["sh", "-c", 'mkdir -p "$1" && cp "$2" "$3" && sync "$3"', "sh", str(job.target), str(job.weights), str(copied)],
        "litlora": merge,
        "litlora, base not seen before": merge,
    }


def measured(job: Job, name: str) -> Run:
    """One run with everything before it written back, its output removed, and the base in the system's cache."""
    shutil.rmtree(job.target, ignore_errors=True)
    cache = job.work / "cache"
    if name.endswith("not seen before"):
        shutil.rmtree(cache, ignore_errors=True)
    run(["sync"])
    with open(job.weights, "rb", buffering=0) as file:
        while file.read(2**22):
            pass
    done = run(commands(job)[name], env={"XDG_CACHE_HOME": str(cache), **thread_env(default_threads())})
    if done.code != 0:
        raise SystemExit(f"{name} failed: " + "\n".join(tail(done.stderr, 20)))
    return done


def summary(job: Job, shape: str, runs: Mapping[str, list[Run]], checked: Mapping[str, Any]) -> dict[str, Any]:
    first = next(iter(runs))
    written = {name: job.weights.stat().st_size if name == first else checked["bytes_written"] for name in runs}
    tools = {
        name: {
            "wall_s": [round(one.wall, 3) for one in of_tool],
            "ratio": round(statistics.median(one.wall / limit.wall for one, limit in zip(of_tool, runs[first], strict=True)), 3),
            "cpu_s": round(statistics.median(one.cpu for one in of_tool), 2),
            "peak_mb": round(max(one.peak_mb for one in of_tool), 1),
            "bytes_written": written[name],
        }
        for name, of_tool in runs.items()
    }
    machine = run_json([sys.executable, "-m", "extensions.benchmarks.measure", str(default_threads())])
    return {"id": "C4", "shape": shape, "rank": RANK, "tools": tools, "check": dict(checked), "machine": machine}


def rows(tools: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "tool": name,
            "wall, median": f"{statistics.median(tool['wall_s']):.2f} s",
            "x cp + fsync": f"{tool['ratio']:.2f}",
            "CPU": f"{tool['cpu_s']:.2f} s",
            "peak memory": f"{tool['peak_mb']:.0f} MB",
            "written": f"{tool['bytes_written'] / MB:,.0f} MB",
        }
        for name, tool in tools.items()
    ]


def check(job: Job) -> dict[str, Any]:
    """Rows of some merged modules against fp64, within half a unit of bf16 and fp32's own error; an untouched tensor bit for bit."""
    from litlora.safetensors_file import SafetensorsFile

    merged = job.target / "merged"
    worst = 0.0
    with (
        SafetensorsFile(job.weights) as base,
        SafetensorsFile(merged / job.weights.name) as result,
        SafetensorsFile(job.step / "adapter_model.safetensors") as adapter,
    ):
        assert result.bytes("model.embed_tokens.weight") == base.bytes("model.embed_tokens.weight"), "an untouched tensor changed"
        modules = [name.removesuffix(".weight") for name in base.tensors if name.startswith("model.layers.1.") and "proj" in name]
        for module in modules:
            a, b = (adapter.float32(f"base_model.model.{module}.lora_{side}.weight").astype(np.float64) for side in "AB")
            old, new = (file.float32(f"{module}.weight")[:SAMPLED].astype(np.float64) for file in (base, result))
            exact = old + ALPHA / RANK * b[:SAMPLED] @ a
            own = (RANK + 2) * 2.0**-24 * (np.abs(old) + ALPHA / RANK * np.abs(b[:SAMPLED]) @ np.abs(a))
            half_unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(new), 2.0**-126))) - 8)
            worst = max(worst, float((np.abs(new - exact) / (half_unit + own)).max()))
    assert worst <= 1, f"an element is {worst} times as far from the exact result as it may be"
    written = sum(path.stat().st_size for path in merged.iterdir())
    return {"modules": len(modules), "worst_error_of_bound": round(worst, 4), "bytes_written": written}


# ---- what is merged --------------------------------------------------------------------------------------------------


def make_base(job: Job, sizes: tuple[int, ...]) -> None:
    """A Llama of a true shape with random bf16 weights, in one file."""
    from litlora.families import expected_tensors
    from litlora.safetensors_file import from_float32, header_bytes

    config = shape(*sizes, context=2048, theta=10_000.0, tied=False, dtype="bfloat16")
    if job.weights.exists() and json.loads((job.base / "config.json").read_text()) == config:
        return
    shutil.rmtree(job.work, ignore_errors=True)
    job.base.mkdir(parents=True)
    (job.base / "config.json").write_text(json.dumps(config))
    header, places = header_bytes({name: ("BF16", shape) for name, shape in expected_tensors(llama(config)).items()}, {"format": "pt"})
    generator = np.random.default_rng(SEED)
    with open(job.weights, "wb") as file:
        file.write(header)
        for place in places.values():
            file.write(from_float32(generator.standard_normal(place.shape, np.float32) * np.float32(0.02), "BF16"))


def make_step(job: Job) -> None:
    """A step as training commits it: LoRA on every projection, and a manifest with the base's fingerprint."""
    from litlora import peft
    from litlora.checkpoint import BaseRecord, Manifest, commit_step
    from litlora.checkpoint.fingerprint import fingerprint
    from litlora.methods import from_peft

    shutil.rmtree(job.work / "run", ignore_errors=True)
    job.step.parent.mkdir()
    from litlora.safetensors_file import SafetensorsFile

    with SafetensorsFile(job.weights) as file:
        base = fingerprint(dict.fromkeys(file.tensors, job.weights))
    adapter = peft.AdapterConfig(r=RANK, alpha=ALPHA, target_modules=peft.ALL_LINEAR, base_model_name_or_path=str(job.base))
    config = llama(json.loads((job.base / "config.json").read_text()))
    shapes = from_peft(adapter, config).file_shapes(config)
    generator = np.random.default_rng(SEED + 1)
    tensors = {name: ("F32", shape, generator.standard_normal(shape, np.float32) * np.float32(0.01)) for name, shape in shapes.items()}
    commit_step(
        job.step.parent,
        Manifest(
            method="lora",
            options={"r": RANK},
            step=100,
            epoch=1.0,
            tokens=0,
            base=BaseRecord(path=str(job.base), model_type="llama", fingerprint=base),
        ),
        tensors={"adapter_model.safetensors": tensors},
        files={"adapter_config.json": json.dumps(peft.adapter_config_to_peft(adapter)).encode()},
    )


def llama(config: Mapping[str, Any]) -> Any:
    from litlora.families import config_from_hf

    return config_from_hf(config, "the benchmark's base")


if __name__ == "__main__":
    main()
