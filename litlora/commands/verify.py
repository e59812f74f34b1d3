"""`litlora verify PATH`: is it whole, is its base the same, does a merged model compute what its parts do. Exit code 1 if not."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.fingerprint import combine, tensor_digests
from litlora.checkpoint.reading import read_json, sha256
from litlora.checkpoint.resolve import kind_of, list_step_paths, read_step, resolve
from litlora.errors import Refusal, UserError, WorkError
from litlora.options import Verify


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    path: str
    what: str
    faults: tuple[str, ...] = ()  # nothing: it is as it should be

    def __str__(self) -> str:
        head = f"{'FAILED' if self.faults else 'ok':<8}{self.path}: {self.what}"
        return "\n".join([head, *(f"        {fault}" for fault in self.faults)])


def verify(options: Verify) -> None:
    """Look at everything again, byte for byte, and print what was found. WorkError (exit code 1) where anything failed."""
    path = Path(options.checkpoint_dir or names.RUN)
    found = []
    for finding in findings(path, options.base_dir):
        found.append(finding)
        if not options.json:
            print(finding, flush=True)
    if options.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2, ensure_ascii=False))
    failed = [finding for finding in found if finding.faults]
    if failed:
        raise WorkError(f"{len(failed)} of {len(found)} checks failed", where=path, context=[failed[0].faults[0]])


def findings(path: Path, base_dir: str | None) -> Iterator[Finding]:
    """What can be checked of a run, a step, a merged model, an adapter or a base."""
    kind = kind_of(path)
    if kind == "run":
        for inside in list_step_paths(path):
            yield from findings(inside, base_dir)
        return
    if kind == "step":
        step = read_step(path)
        yield Finding(str(path), f"{len(step.manifest.files) if step.manifest else 0} files against their hashes", step.faults)
        if step.has_state:
            yield Finding(str(path), "training state against its hashes", step.state_faults)
        if step.faults:
            return
    checkpoint = resolve(path, base_dir=base_dir)
    if (path / names.MERGE_REPORT).exists():
        yield from of_merged(checkpoint)
    elif checkpoint.is_model:
        yield checked(checkpoint, "its tensors are those of its config.json, all numbers finite", tensors_of_model)
    else:
        yield checked(checkpoint, "its base is there, every byte as recorded", base_bytes)
        yield checked(checkpoint, "its tensors are those of its method, all numbers finite", tensors_of_adapter)


def of_merged(merged: Checkpoint) -> Iterator[Finding]:
    """A merged model: as it was written; and, where its parts are still there, that it computes what they do together."""
    from litlora.verify import compare_logits, reread

    yield Finding(str(merged.path), "every tensor and file against its report", tuple(reread(merged.path)))
    report = read_json(merged.path, names.MERGE_REPORT)
    place = Path(report["adapter"]["path"])
    if not place.is_dir():
        yield Finding(str(merged.path), f"its adapter {place} is not there any more, so its logits were not compared")
        return
    try:
        adapter = resolve(place)
        same = sha256(adapter.adapter_file()) == report["adapter"]["sha256"]
        yield Finding(str(merged.path), f"its adapter {place}", () if same else ("was altered since it was merged",))
        proof = compare_logits(adapter, merged) if same else None
    except (UserError, WorkError) as error:
        yield Finding(str(merged.path), "logits against the unmerged adapter", (str(error),))
        return
    if proof is not None:
        figures = "differ by at most {largest_difference:.2g} of {largest_logit:.3g} (bound {bound:.2g}), KL {kl:.1g}".format(**proof)
        yield Finding(str(merged.path), f"logits against the unmerged adapter: {figures}")


def checked(checkpoint: Checkpoint, what: str, look: Callable[[Checkpoint], list[str]]) -> Finding:
    try:
        return Finding(str(checkpoint.path), what, tuple(look(checkpoint)))
    except Refusal as error:
        return Finding(str(checkpoint.path), what, (str(error), *error.context))


def base_bytes(checkpoint: Checkpoint) -> list[str]:
    """The base's fingerprint, computed from its files as they are now: nothing is taken from a cache."""
    base = checkpoint.base()
    if checkpoint.manifest is None or checkpoint.manifest.base is None:
        return []
    found, recorded = combine(tensor_digests(base.shards(), use_cache=False)), checkpoint.manifest.base.fingerprint
    return [] if found == recorded else [f"{base.path} holds other weights: {found} instead of {recorded}"]


def tensors_of_adapter(checkpoint: Checkpoint) -> list[str]:
    from litlora.checkpoint.weights import adapter_tensors
    from litlora.peft import check_tensors, copied_base_tensor

    tensors = {name: tensor for name, tensor in adapter_tensors(checkpoint).items() if copied_base_tensor(name) is None}
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, checkpoint.tuning().file_shapes(checkpoint.config()), "")
    return [f"{name} holds values that are not finite" for name, tensor in tensors.items() if not tensor.isfinite().all()]


def tensors_of_model(checkpoint: Checkpoint) -> list[str]:
    from litlora.checkpoint.weights import base_tensors

    return [f"{name} holds values that are not finite" for name, tensor in base_tensors(checkpoint).items() if not tensor.isfinite().all()]
