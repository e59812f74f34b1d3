"""`litlora verify PATH`: is it whole, is its base the same, is a merged model what its parts make. Exit code 1 where anything failed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.fingerprint import combine, tensor_digests
from litlora.checkpoint.reading import read_json, sha256
from litlora.checkpoint.resolve import kind_of, list_step_paths, looked_at, names_step_of_run, read_step, resolve
from litlora.console import counted, put_json, say, show
from litlora.errors import Refusal, UserError, WorkError, printable, told
from litlora.options import Verify

if TYPE_CHECKING:
    from litlora.data.samples import Sample


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    path: str
    what: str
    faults: tuple[str, ...] = ()  # nothing: it is as it should be
    warnings: tuple[str, ...] = ()  # what could not be looked at, and why: no failure
    figures: dict[str, Any] = field(default_factory=dict)  # what was measured
    told: tuple[str, ...] = ()  # the same in words
    hint: str = ""  # what helps against its faults

    def __str__(self) -> str:
        head = f"{'FAILED' if self.faults else 'note' if self.warnings else 'ok':<8}{self.path}: {self.what}"
        return "\n".join([printable(head), *(f"        {told(line)}" for line in (*self.faults, *self.warnings, *self.told))])


def verify(options: Verify) -> None:
    """Look at everything again, byte for byte, and print what was found. WorkError (exit code 1) where anything failed."""
    if options.accelerator != "cpu":  # asked for, so that it is refused before anything is looked at
        from litlora.precision import device_of

        device_of(options.accelerator)
    path = Path(options.checkpoint_dir or run_or_demo())
    found = []
    for finding in findings(path, options):
        found.append(finding)
        if not options.json:
            show(str(finding))
    if options.json:
        put_json([as_json(finding) for finding in found], indent=2)
    failed = [finding for finding in found if finding.faults]
    if failed:
        hint = next((finding.hint for finding in failed if finding.hint), "")
        raise WorkError(f"{len(failed)} of {counted(len(found), 'check')} failed", where=path, context=[failed[0].faults[0]], hint=hint)


def run_or_demo() -> str:
    """What is meant where no path is given: as for other commands, but of a run all its steps."""
    if list_step_paths(Path(names.RUN)):
        return names.RUN
    say(f"no path was given and there is no run in {names.RUN}: the demo base")
    return names.DEMO


def as_json(finding: Finding) -> dict[str, Any]:
    values = asdict(finding)
    values.pop("told")
    return values


def findings(path: Path, options: Verify) -> Iterator[Finding]:
    """What can be checked of a run, a step, a merged model, an adapter or a base."""
    if names_step_of_run(path):
        path = resolve(path, base_dir=options.base_dir).path
    with looked_at(path):
        kind = kind_of(path)
    if kind == "run":
        steps = list_step_paths(path)
        if not steps:
            raise UserError("is a run without a checkpoint yet", where=path, hint="there is nothing to verify")
        for inside in steps:
            try:
                yield from findings(inside, options)
            except UserError:
                if inside.is_dir():
                    raise
                yield Finding(str(inside), "it is gone", warnings=("the run took it away meanwhile, as --train.keep says",))
        return
    if kind == "step":
        step = read_step(path)
        files = counted(len(step.manifest.files) if step.manifest else 0, "file against its hash", "files against their hashes")
        yield Finding(str(path), files, step.faults)
        if step.has_state:
            yield Finding(str(path), "training state against its hashes", step.state_faults)
        if step.faults:
            return
    checkpoint = resolve(path, base_dir=options.base_dir)
    if (path / names.MERGE_REPORT).exists():
        yield from of_merged(checkpoint, options)
        return
    yield from (of_model if checkpoint.is_model else of_adapter)(checkpoint, options)
    yield from of_lineage(checkpoint)


# ---- what is no merge ------------------------------------------------------------------------------------------------


def of_adapter(adapter: Checkpoint, options: Verify) -> Iterator[Finding]:
    from litlora.verify.files import adapter_faults, base_faults

    unproven = () if adapter.manifest else ("a PEFT adapter does not say which weights it was trained on, so nobody can tell",)
    of_base = checked(adapter, "its base is there, every byte as recorded", base_faults, unproven)
    yield of_base
    if of_base.faults:
        return  # the shapes of its tensors are its base's, and so is the loss
    yield checked(adapter, "its tensors are those of its method, all numbers finite", adapter_faults)
    yield from of_loss([adapter], options)


def of_model(model: Checkpoint, options: Verify) -> Iterator[Finding]:
    from litlora.verify.files import model_faults

    yield checked(model, f"its tensors are those of its {names.CONFIG}, all numbers finite", model_faults)
    if (model.path / names.EXTEND_REPORT).exists():
        yield from of_extended(model)
    if (model.path / names.EXPAND_REPORT).exists():
        yield from of_expanded(model, options)
    elif model.config().llama_pro_layers:
        yield inserted_blocks(model)
    yield from of_loss([model], options)


def inserted_blocks(model: Checkpoint) -> Finding:
    """Whether the blocks that were inserted add nothing yet. That they have learnt is no fault."""
    from litlora.verify.weights import audible_layers

    new, heard = model.config().llama_pro_layers, audible_layers(model)
    numbers = ", ".join(map(str, heard))
    said = f"layers {numbers} were trained: it computes something else than it did without them" if heard else "all of them add nothing yet"
    inserted = counted(len(new), "inserted layer")
    return Finding(str(model.path), f"its {inserted}", figures={"inserted": list(new), "trained": heard}, told=(said,))


def of_expanded(model: Checkpoint, options: Verify) -> Iterator[Finding]:
    """A deeper base as `expand` wrote it: it must still compute what the base does that it was made from."""
    from litlora.verify.files import reread
    from litlora.verify.logits import same_logits
    from litlora.verify.weights import compare_expanded

    yield checked(model, "every tensor and file against its report", lambda one: reread(one.path, names.EXPAND_REPORT))
    yield inserted_blocks(model)
    report = read_json(model.path, names.EXPAND_REPORT)
    base, why = base_of_report(report["base"])
    if base is None:
        yield Finding(str(model.path), "it was not compared with its base", warnings=(why,))
        return
    what = f"all but its new layers is its base's, byte for byte, and those are silent copies: {base.path}"
    yield checked(model, what, lambda one: compare_expanded(base, one, report["positions"]))
    if options.level == "full":
        yield checked(model, "logits equal to its base's, to the last bit", lambda one: same_logits(base, one, options.accelerator))


def base_of_report(record: dict[str, Any]) -> tuple[Checkpoint | None, str]:
    """The base that a report names, where it is there and holds the weights that it did; else why not."""
    try:
        base = resolve(record["path"])
    except UserError as error:
        return None, str(error)
    if combine(tensor_digests(base.shards(), use_cache=False)) != record["fingerprint"]:
        return None, f"{base.path} holds other weights than it did"
    return base, ""


def of_extended(model: Checkpoint) -> Iterator[Finding]:
    """A base with a larger vocabulary: as it was written, and beside the base it was made from."""
    from litlora.verify.files import reread
    from litlora.verify.weights import compare_extended

    yield checked(model, "every tensor and file against its report", lambda one: reread(one.path, names.EXTEND_REPORT))
    report = read_json(model.path, names.EXTEND_REPORT)
    what = f"all but its new rows are its base's, byte for byte: {report['base']['path']}"
    base, why = base_of_report(report["base"])
    if base is None:
        yield Finding(str(model.path), "it was not compared with its base", warnings=(why,))
        return
    tokens, grown = report["tokens"]["before"], report["rows"]["tensors"]
    yield checked(model, what, lambda one: compare_extended(base, one, tokens=tokens, grown=grown))


def of_lineage(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What it was combined from: whether that is still there, and still the same."""
    events = checkpoint.manifest.lineage if checkpoint.manifest else ()
    for parent in (parent for event in events if event["event"] == "combined" for parent in event["parents"]):
        what = f"what it was combined from: {parent['path']}"
        if not Path(parent["path"]).is_dir():
            yield Finding(str(checkpoint.path), what, warnings=("is not there any more",))
            continue
        try:
            found = resolve(parent["path"])
            same = (
                found.fingerprint() == parent["fingerprint"]
                if "fingerprint" in parent
                else sha256(found.adapter_file()) == parent["sha256"]
            )
            yield Finding(str(checkpoint.path), what, () if same else (f"{parent['path']} was altered since",))
        except UserError as error:
            yield Finding(str(checkpoint.path), what, (str(error), *error.context))


# ---- a merge ---------------------------------------------------------------------------------------------------------


def of_merged(merged: Checkpoint, options: Verify) -> Iterator[Finding]:
    """A merged model: as it was written; and, where its parts are still there, that it is what they make together."""
    from litlora.verify.files import base_faults, model_faults, reread

    yield checked(merged, "every tensor and file against its report", lambda one: reread(one.path))
    yield checked(merged, f"its tensors are those of its {names.CONFIG}, all numbers finite", model_faults)
    report = read_json(merged.path, names.MERGE_REPORT)
    try:
        adapter = adapter_of(merged, report, options.base_dir)
    except Refusal as error:
        yield Finding(str(merged.path), "its adapter", (str(error), *error.context), hint=error.hint)
        return
    if adapter is None:
        why = f"its adapter {report['adapter']['path']} is not there any more"
        yield Finding(str(merged.path), "it was not compared with what it is made of", warnings=(why,))
        yield from of_loss([merged], options)
        return
    yield Finding(str(merged.path), f"its adapter is there and the same: {adapter.path}")
    of_base = checked(
        adapter, "its base is there, every byte as it was merged", lambda one: base_faults(one, report["base"]["fingerprint"])
    )
    yield of_base
    if of_base.faults:
        return
    yield of_weights(adapter, merged)
    if options.level == "full":
        yield of_logits(adapter, merged, options.accelerator)
    yield from of_loss([adapter.base(), adapter, merged], options)


def adapter_of(merged: Checkpoint, report: dict[str, Any], base_dir: str | None) -> Checkpoint | None:
    """The adapter that was merged, where it was or in the directory above (a run may move); None where it is in neither. WorkError
    where there is another one now."""
    recorded = Path(report["adapter"]["path"])
    there = [place for place in dict.fromkeys((recorded, merged.path.absolute().parent)) if place.is_dir()]
    for place in there:
        if kind_of(place) not in ("step", "adapter"):
            continue
        adapter = resolve(place, base_dir=base_dir)
        if sha256(adapter.adapter_file()) == report["adapter"]["sha256"]:
            return adapter
    if recorded in there:
        raise WorkError("was altered since it was merged", where=recorded)
    return None


def of_weights(adapter: Checkpoint, merged: Checkpoint) -> Finding:
    """Key audit and every number."""
    from litlora.verify.weights import compare_weights

    try:
        proof = compare_weights(adapter, merged)
    except Refusal as error:
        return Finding(str(merged.path), "every tensor against base + adapter", (str(error), *error.context))
    whole = counted(proof.adapter_tensors, "tensor of the adapter is", "tensors of the adapter are")
    told = [f"{'all ' * (proof.adapter_tensors > 1)}{whole} in it; {counted(proof.changed, 'tensor is', 'tensors are')} changed or new"]
    told += (
        [f"{counted(proof.identical, 'that was not trained is', 'that were not trained are')} the base's, byte for byte"]
        if proof.identical
        else []
    )
    told += (
        [f"{counted(proof.converted, 'that was not trained is', 'that were not trained are')} stored in another dtype, rounded once"]
        if proof.converted
        else []
    )
    away = f"at {proof.farthest:.1%} of the error that one rounding explains"
    numbers, tensors = counted(proof.numbers, "number"), counted(proof.tensors, "tensor")
    told += [f"{numbers} computed again in fp64: the farthest, in {proof.where}, is {away}"] if proof.numbers else []
    told += [f"the update is {proof.relative:.3%} of the weights, of which rounding took {proof.lost:.1%}"] if proof.relative else []
    figures = asdict(proof)
    faults = tuple(figures.pop("faults"))
    return Finding(str(merged.path), f"{tensors} against base + adapter", faults, figures=figures, told=(*told, proof.size))


def of_logits(adapter: Checkpoint, merged: Checkpoint, accelerator: str) -> Finding:
    from litlora.verify.logits import compare_logits

    try:
        proof = compare_logits(adapter, merged, accelerator)
    except Refusal as error:
        return Finding(str(merged.path), "logits against the unmerged adapter", (str(error),))
    figures = "differ by at most {largest_difference:.2g} of {largest_logit:.3g} (bound {bound:.2g}), KL {kl:.1g} (bound {kl_bound:.0e})"
    what = f"logits against the unmerged adapter on {counted(proof['positions'], 'token')}"
    told = [figures.format(**proof)]
    if "choices_of_experts" in proof:
        ties = "through the same experts; at {decided_by_rounding:,} of {choices_of_experts:,} choices rounding would have taken another"
        told.append(ties.format(**proof))
    return Finding(str(merged.path), what, figures=proof, told=tuple(told))


def of_loss(checkpoints: Sequence[Checkpoint], options: Verify) -> Iterator[Finding]:
    """With `--data`: the loss of the last one, and of what it is made of (a merge: base, adapter, merged; an adapter: base, adapter)."""
    if not options.data:
        return
    from litlora.verify.logits import loss_bound, losses

    last = checkpoints[-1]
    if len(checkpoints) == 1 and not last.is_model:
        checkpoints = [last.base(), last]
    samples = samples_of(checkpoints[-2] if len(checkpoints) == 3 else last, options)
    found = losses(checkpoints, samples, options.accelerator)
    words = {1: ("",), 2: ("base ", "adapter "), 3: ("base ", "adapter ", "merged ")}[len(checkpoints)]
    told = ", ".join(f"{word}{loss:.5f}" for word, loss in zip(words, found, strict=True))
    figures: dict[str, Any] = {"samples": len(samples)} | {word.strip() or "loss": loss for word, loss in zip(words, found, strict=True)}
    faults: tuple[str, ...] = ()
    if len(checkpoints) == 3:
        bound = loss_bound(last, found[1])
        away = abs(found[2] - found[1])
        figures |= {"apart": away, "bound": bound}
        told = f"{told} (apart {away:.1g}, bound {bound:.1g})"
        faults = () if away <= bound else (f"merged, the loss is {away:.3g} away from base + adapter (at most {bound:.3g})",)
    yield Finding(str(last.path), f"loss on {counted(len(samples), 'sample')}", faults, figures=figures, told=(told,))


def samples_of(checkpoint: Checkpoint, options: Verify) -> "Sequence[Sample]":
    """The rows of `--data` as the checkpoint's own tokenizer and template make samples of them."""
    from litlora.checkpoint.files import open_prompts
    from litlora.data.samples import load_data

    context = checkpoint.config().max_position_embeddings
    data = load_data(options.data, open_prompts(checkpoint), rows=options.rows, max_seq_length=context, heldout=True)
    return data.train[: options.max_samples]


# ---- details ---------------------------------------------------------------------------------------------------------


def checked(checkpoint: Checkpoint, what: str, look: Callable[[Checkpoint], list[str]], warnings: tuple[str, ...] = ()) -> Finding:
    """What `look` finds; what it raises is a fault as well."""
    try:
        return Finding(str(checkpoint.path), what, tuple(look(checkpoint)), warnings)
    except Refusal as error:
        return Finding(str(checkpoint.path), what, (str(error), *error.context), hint=error.hint)
