"""A training run in its directory: what is checked before it begins, what is said, what a step holds, and how it is taken up again.

A command decides what is trained on what (`Job`); `train` does the rest, the same for every method.
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from litlora import __version__, console
from litlora.checkpoint import names
from litlora.checkpoint.commit import commit_step, write_atomically
from litlora.checkpoint.manifest import BaseRecord, Manifest
from litlora.checkpoint.resolve import Checkpoint
from litlora.checkpoint.run import Run as RunDirectory
from litlora.checkpoint.run import drop_old_states, drop_old_steps, prepare_run_directory
from litlora.checkpoint.state import load_state, save_state
from litlora.checkpoint.weights import raw_bytes, raw_tensors
from litlora.config import Config
from litlora.data.samples import DataSet, Sample, load_data, marked, warn_of_placeholders
from litlora.errors import Interrupted, UserError, WorkError
from litlora.families import config_to_hf
from litlora.importing import import_whole
from litlora.methods.attach import trainable
from litlora.methods.tuning import Tuning
from litlora.model import GPT
from litlora.options import FitOptions
from litlora.parsing import to_yaml
from litlora.precision import choose_dtype, device_of
from litlora.prompts import Prompts
from litlora.train.allocator import keep_freed_memory
from litlora.train.before import is_first_process, states_kept, steps_kept
from litlora.train.estimate import Load, Memory, largest, memory_of, seconds_of_step
from litlora.train.lanes import lanes_of
from litlora.train.loop import Run, fit, micro_batch_tokens
from litlora.train.metrics import Metrics, peak_memory_mb
from litlora.train.optimizer import build_optimizer
from litlora.train.paths import absolute
from litlora.train.plan import Plan, Position
from litlora.train.saving import Commit, Prepared, free_memory
from litlora.train.signals import Signals
from litlora.train.watch import Watch


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a training command decides. Everything here is known before the first byte is written."""

    command: str  # finetune lora
    options: FitOptions
    method: str
    method_options: Mapping[str, Any]  # recorded, and fixed for the run's life
    prompts: Prompts
    data: DataSet
    base: BaseRecord | None  # None: the run makes a whole model
    parent: str | None  # the step that training goes on from, with a fresh optimizer; of `full`, the model
    facts: Sequence[tuple[str, str]]  # header lines about the model and the method
    build: Callable[[torch.device], GPT]  # the model, what learns in it requiring gradients
    restore: Callable[[GPT, Checkpoint], None]  # puts what a step holds back into the model
    contents: Callable[[GPT], Mapping[str, Mapping[str, torch.Tensor]]]  # weight files of a step: name -> tensors, maybe the model's own
    exact: Callable[[GPT], Mapping[str, torch.Tensor]] = lambda model: {}  # what these hold rounded, or not at all: goes with the state
    files: Mapping[str, bytes]  # what else lies in every step: name -> bytes
    card: Callable[[Manifest], str]  # the step's README
    lr_ratio: float = 1.0  # LoRA+
    config: Config  # of the base, or of the model that is made
    tuning: Tuning  # what learns in it
    from_nothing: bool = True  # whether the model is a new one, all in fp32
    lineage: Sequence[dict[str, Any]] = ()  # of the step that training goes on from
    origin: str | None = None  # without a base: the fingerprint of the model that training begins with
    watched: Mapping[str, str] = field(default_factory=dict)  # metrics by group: column -> how its parameters' names begin


def train(job: Job, resumed: Checkpoint | None, signals: Signals) -> Path:
    """Run a job in its directory; return the last step's path. `resumed`: the whole step to go on from.

    Raises WorkError and Interrupted as `fit` does, UserError where a resumed run is not the same run (YARDSTICK R04).
    """
    options = job.options
    plan = plan_of(job)
    fixed = what_may_not_change(job)
    lineage = tuple(job.lineage)
    if resumed is not None:
        refuse_another_run(resumed, fixed, options)
        lineage = lineage_of(resumed, options)
    if is_first_process():
        console.header(header(job, plan, resumed))
        if resumed is not None and (changed := lineage[-1]["changed"]):
            console.header(
                [("changed", f"{name}: {shown(old)} until now, {shown(new)} from here on") for name, (old, new) in changed.items()]
            )
    fabric = launch(options)
    load = load_of(job, fabric.device)
    memory = memory_of(load)
    recompute = recomputes(load, memory, options)
    if is_first_process():
        console.header(needs(load, memory_of(load, recompute=True) if recompute else memory, recompute, plan))
    model = job.build(fabric.device)
    model.model.recompute = recompute
    trained = trainable(model)
    optimizer = build_optimizer(trained, options.train, job.lr_ratio)
    start = Position()
    if resumed is not None:
        job.restore(model, resumed)
        values = load_state(resumed, optimizer, trained, job.exact(model))
        start = Position(**values["position"])
    watch = Watch({column: [p for name, p in trained.items() if name.startswith(prefix)] for column, prefix in job.watched.items()})
    out_dir = Path(options.out_dir)
    if fabric.is_global_zero:  # first of all, what the run is: without it, `--resume` would not know
        write_atomically(out_dir / names.RUN_YAML, run_yaml(job).encode())
        if job.data.skipped:
            write_atomically(out_dir / names.SKIPPED_ROWS, "".join(f"{reason}\n" for reason in job.data.skipped).encode())
    metrics = Metrics(
        out_dir / names.METRICS if fabric.is_global_zero else None, keep_until=start.step if resumed else -1, more=watch.columns,
        device=fabric.device,
    )  # fmt: skip
    initial = {name: digest(parameter) for name, parameter in trained.items()}
    committer = Committer(job, model, trained, initial, optimizer, plan, fixed, resumed, lineage, metrics)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    run = Run(
        fabric=fabric, model=wrapped, optimizer=wrapped_optimizer, plan=plan, samples=job.data.train, validation=job.data.validation,
        options=options.train, eval_interval=options.eval.interval, seed=options.seed, metrics=metrics, signals=signals, watch=watch,
        prepare=committer.prepare,
    )  # fmt: skip
    signals.training = True
    try:
        end = fit(run, start)
    except Interrupted as stop:
        raise Interrupted(
            stop.exit_code - 128, f"go on with: litlora {job.command} --resume --out_dir {shlex.quote(options.out_dir)}"
        ) from stop
    signals.training = False
    return out_dir / names.step_name(end.step)


@dataclass
class Committer:
    """Makes steps: the weights that learnt, the optimizer's state, and where all of it comes from."""

    job: Job
    model: GPT
    trained: Mapping[str, torch.nn.Parameter]
    initial: Mapping[str, bytes]  # digests of what is trained, before the first step
    optimizer: torch.optim.Optimizer
    plan: Plan
    fixed: Mapping[str, Any]
    resumed: Checkpoint | None
    lineage: tuple[dict[str, Any], ...]
    metrics: Metrics

    def prepare(self, commit: Commit) -> Prepared:
        """What becomes `out/step-N`. WorkError where nothing changed, or a tensor is not finite: that is never saved.

        It is copied, so that it can be written while training goes on, where the copy takes at most half of the memory that is free: an
        adapter's always does; a whole model with its optimizer (`full`, `pretrain`), 14 to 16 bytes a parameter, may not, and then
        training waits for the commit.
        """
        self.refuse_what_is_no_result()
        contents, exact = self.job.contents(self.model), self.job.exact(self.model)
        held = [state for states in self.optimizer.state.values() for state in states.values() if isinstance(state, torch.Tensor)]
        copied = sum(tensor.nbytes for tensors in (*contents.values(), exact) for tensor in tensors.values()) + sum(t.nbytes for t in held)
        room = copied <= free_memory() // 2
        manifest, values = self.manifest(commit), self.values(commit.position)
        tensors = {name: raw_tensors(found, copy=room) for name, found in contents.items()}
        files = {**self.job.files, names.README: self.job.card(manifest).encode()}
        state = save_state(self.optimizer, self.trained, values, exact, copy=room)
        run = Path(self.job.options.out_dir)

        def write() -> None:
            self.metrics.sync()
            commit_step(run, manifest, tensors=tensors, files=files, state=state)

        return Prepared(write=write, after=lambda: self.drop_what_is_old(run), in_background=room)

    def drop_what_is_old(self, run: Path) -> None:
        """Only after a commit, so that what goes is never the newest. What cannot be deleted is no reason to stop training."""
        options, began = self.job.options, [self.resumed.path] if self.resumed else []
        began += [Path(self.job.parent)] if self.job.parent else []
        try:
            if (number := steps_kept(options)) is not None:
                drop_old_steps(run, number, protected=began)
            if (number := states_kept(options, of_models=self.job.base is None)) is not None:
                drop_old_states(run, number)
        except OSError as error:
            console.warn(f"an old checkpoint could not be deleted: {error.strerror or error}: {error.filename}")

    def manifest(self, commit: Commit) -> Manifest:
        position = commit.position
        return Manifest(
            method=self.job.method,
            options=dict(self.job.method_options),
            step=position.step,
            epoch=round(position.epoch + position.window / self.plan.windows_in(position.epoch), 6),
            tokens=position.tokens,
            train_loss=commit.loss,
            val_loss=commit.val_loss,
            base=self.job.base,
            tokenizer=self.job.prompts.tokenizer.hash,
            chat_template=self.job.prompts.template_hash,
            data=self.job.data.fingerprint,
            parent=str(self.resumed.path.resolve()) if self.resumed else self.job.parent,
            lineage=self.lineage,
            versions=versions(),
        )

    def values(self, position: Position) -> dict[str, Any]:
        """What the training state holds beside tensors."""
        return {"position": asdict(position), "fixed": dict(self.fixed), "changeable": may_change(self.job.options)}

    def refuse_what_is_no_result(self) -> None:
        broken = [name for name, parameter in self.trained.items() if not torch.isfinite(parameter).all()]
        if broken:
            raise WorkError(f"{broken[0]} holds values that are not finite; nothing was committed", hint="lower --train.lr")
        same = all(digest(parameter) == self.initial[name] for name, parameter in self.trained.items())  # seldom reads beyond the first
        if same and self.job.options.train.lr:  # a rate of 0 is asked for by who wants to measure
            raise WorkError("no trained tensor differs from its start; nothing was committed", hint="look at --train.lr and the data")


def digest(parameter: torch.nn.Parameter) -> bytes:
    """Of a tensor's bytes: whether it changed can be told without keeping a copy."""
    return xxhash.xxh3_128_digest(raw_bytes(parameter))


# ---- taking a run up again -------------------------------------------------------------------------------------------


def what_may_not_change(job: Job) -> dict[str, Any]:
    """What makes a run this run: with any of it changed, going on would not be the same training (YARDSTICK R04)."""
    options = job.options
    return {
        "method": job.method,
        **{f"{job.method}.{name}": value for name, value in job.method_options.items()},
        "base": job.base.fingerprint if job.base else job.origin,
        "shape": hashlib.sha256(json.dumps(config_to_hf(job.config), sort_keys=True).encode()).hexdigest(),
        "tokenizer": job.prompts.tokenizer.hash,
        "chat template": job.prompts.template_hash,
        "data": job.data.fingerprint,
        "training rows": rows_hash(job.data.train),
        "seed": options.seed,
        "train.global_batch_size": options.train.global_batch_size,
        "train.micro_batch_tokens": micro_batch_tokens(options.train, device_of(options.accelerator)),
        "train.packing": options.train.packing,
        "train.share_prefix": options.train.share_prefix,
        "precision": options.precision,
        **({"quantize": job.base.quantize} if job.base and job.base.quantize != "none" else {}),  # as older runs have it: left out
    }


def may_change(options: FitOptions) -> dict[str, Any]:
    """What a resumed run may set anew; kept beside the state, so that the lineage shows what was changed when."""
    length, rate = ("max_steps", "epochs", "patience"), ("lr", "lr_schedule", "lr_warmup_steps")
    kept = (*length, *rate, "weight_decay", "beta1", "beta2", "max_norm", "save_interval")
    changeable = {f"train.{name}": getattr(options.train, name) for name in kept} | {"eval.interval": options.eval.interval}
    if device_of(options.accelerator).type == "cpu":  # where they decide on last digits
        changeable["threads"] = options.threads or torch.get_num_threads()
    return changeable


def lineage_of(resumed: Checkpoint, options: FitOptions) -> tuple[dict[str, Any], ...]:
    """What made the steps of a resumed run: all that made the one it goes on from, and this resuming, with what it set anew."""
    before, now = resumed.training_values().get("changeable", {}), may_change(options)
    changed = {name: [before[name], now[name]] for name in now if name in before and before[name] != now[name]}
    earlier, step = (resumed.manifest.lineage, resumed.manifest.step) if resumed.manifest else ((), 0)
    return (*earlier, {"event": "resumed", "from": str(resumed.path.resolve()), "step": step, "changed": changed})


def refuse_another_run(resumed: Checkpoint, fixed: Mapping[str, Any], options: FitOptions) -> None:
    before = resumed.training_values()["fixed"]
    plain = json.loads(json.dumps(fixed))
    different = [name for name in sorted({*before, *plain}) if before.get(name) != plain.get(name)]
    if different:
        shown = [f"{name}: {before.get(name)} then, {plain.get(name)} now" for name in different]
        typed = " ".join(filter(None, (words_for(name, before.get(name), options) for name in different)))
        raise UserError(
            f"cannot be resumed: {', '.join(different)} changed",
            where=resumed.path,
            context=shown,
            hint=f"run with the same settings{typed and f' ({typed})'}, or start another run in another --out_dir",
        )


def words_for(name: str, value: Any, options: FitOptions) -> str:
    """How to type what may not change as it was; "" where no option says it, or none so shortly."""
    has = name != "data"  # by its fingerprint; the option has its paths
    group: Any = options
    for part in name.split("."):
        has, group = has and hasattr(group, part), getattr(group, part, None)
    values = value if isinstance(value, list) else [value]
    if not has or not values or not all(isinstance(one, str | int | float) for one in values):
        return ""
    return f"--{name} {' '.join(str(one).lower() if isinstance(one, bool) else shlex.quote(str(one)) for one in values)}"


def run_yaml(job: Job) -> str:
    path = shlex.quote(str(Path(job.options.out_dir) / names.RUN_YAML))
    options = absolute(job.options, template_is_file=job.prompts.template_name == getattr(job.options, "chat_template", None))
    options = replace(options, resume=False, overwrite=False, dry_run=False)
    return f"# Again, elsewhere: litlora {job.command} --config {path} --out_dir DIR\n{to_yaml(options)}"


# ---- the directory ---------------------------------------------------------------------------------------------------


def open_run(options: FitOptions, needed_bytes: int) -> RunDirectory:
    """The run's directory, ours from here on: the one place where something is written or deleted before training begins.

    Processes other than the first only look up the step to go on from: the first has already made the directory ready.
    """
    if is_first_process():
        return prepare_run_directory(options.out_dir, resume=options.resume, overwrite=options.overwrite, needed_bytes=needed_bytes)
    if options.resume:
        return prepare_run_directory(options.out_dir, resume=True, dry_run=True)
    return RunDirectory(Path(options.out_dir))


# ---- rows ------------------------------------------------------------------------------------------------------------


def load_rows(options: FitOptions, prompts: Prompts, context: int) -> DataSet:
    """The run's samples, checked and tokenized before anything else is loaded; `context` in tokens is the longest they may be."""
    longest = min(options.train.max_seq_length or context, context)
    data = load_data(options.data, prompts, rows=options.rows, max_seq_length=longest, mask_prompt=options.train.mask_prompt)
    if options.eval.data is not None:
        other = load_data(
            [options.eval.data], prompts, rows=options.rows, max_seq_length=longest, mask_prompt=options.train.mask_prompt, heldout=True
        )
        data = replace(data, validation=other.train)
    if is_first_process():
        warn_of_placeholders(data)
    return data.split(options.eval.fraction, options.seed, options.eval.max_samples)


def show_samples(job: Job, number: int = 2) -> None:
    """`--dry_run`: what the plan is, and the first samples as the model sees them, the graded part between «»."""
    console.header(header(job, plan_of(job), None))
    options = job.options
    try:
        prepare_run_directory(options.out_dir, resume=options.resume, overwrite=options.overwrite, dry_run=True)
    except UserError as error:
        console.warn(f"the run itself would be refused: {error.where}: {error.what}; {error.hint}")
    for sample in job.data.train[:number]:
        tokens = console.counted(len(sample.tokens), "token")
        console.show(f"--- {sample.where}: {tokens}, {sample.graded} graded\n{marked(sample, job.prompts)}")


def rows_hash(samples: Sequence[Sample]) -> str:
    """Of the samples that are trained on, after the split, in their order."""
    state = hashlib.sha256()
    for sample in samples:
        state.update(sample.tokens.tobytes() + sample.targets.tobytes())
    return state.hexdigest()


def plan_of(job: Job) -> Plan:
    options = job.options
    plan = Plan(
        weights=tuple(job.data.weights),
        global_batch_size=options.train.global_batch_size,
        epochs=options.train.epochs,
        max_steps=options.train.max_steps,
        seed=options.seed,
    )
    if plan.steps == 0 or not plan.windows_in(0):
        raise UserError(
            "not one step is planned: an epoch draws no sample", where=" ".join(options.data), hint="raise the weight or --train.epochs"
        )
    return plan


# ---- what it takes ---------------------------------------------------------------------------------------------------


def load_of(job: Job, device: torch.device) -> Load:
    """What a run of `job` computes, for its estimate."""
    options, lengths = job.options, job.data.train.lengths
    return Load(
        config=job.config,
        tuning=job.tuning,
        dtype=torch.float32 if job.from_nothing else choose_dtype(options.precision, device),
        quantize=job.base.quantize if job.base else "none",
        device=device,
        micro_batch=largest(lengths, micro_batch_tokens(options.train, device)),
        tokens=job.data.tokens / len(lengths) * options.train.global_batch_size / (options.devices * options.num_nodes),
        length=job.data.tokens / len(lengths),
        graded=job.data.graded / max(job.data.tokens, 1),
        program=int(peak_memory_mb() * 2**20) if device.type == "cpu" else 0,
        lanes=lanes_of(device, options.threads) if options.devices * options.num_nodes == 1 else 1,
    )


def recomputes(load: Load, memory: Memory, options: FitOptions) -> bool:
    """Whether blocks are computed again in the backward pass; `auto`: where what they keep would not fit."""
    if options.train.checkpoint_activations != "auto":
        return options.train.checkpoint_activations == "blocks"
    return memory.total - load.program > free_bytes(load.device)


def free_bytes(device: torch.device) -> int:
    """What this process may still take of the memory that it computes in."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()


def needs(load: Load, memory: Memory, recompute: bool, plan: Plan) -> list[tuple[str, str]]:
    """Header lines: how much memory at the peak and what for, and how long."""
    step = seconds_of_step(load, recompute=recompute)
    shares = {"Python and torch": memory.program, "weights": memory.weights, "what learns": memory.trained}
    shares |= {"at work": memory.workspace, "activations": memory.activations}  # the last one: what follows is about it
    parts = ", ".join(f"{what} {gigabytes(size)}" for what, size in shares.items())
    again = ", which are computed again block by block" if recompute else ""
    return [
        ("memory", f"about {gigabytes(memory.total)} at the peak: {parts}{again}"),
        ("time", f"about {console.duration(step)} a step, {console.duration(step * plan.steps)} in all without validation"),
    ]


def shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def gigabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GB"


# ---- the machine -----------------------------------------------------------------------------------------------------


def launch(options: FitOptions) -> Any:
    """Fabric on the devices that were asked for, its processes started. Imported here: only training needs it."""
    import_whole("lightning_fabric")
    from lightning_fabric import Fabric

    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    fabric = Fabric(
        accelerator=device_of(options.accelerator).type,  # Fabric's own auto is another
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=options.strategy,
        precision="32-true",
    )
    fabric.launch()
    return fabric


def versions() -> dict[str, str]:
    return {"litlora": __version__, "torch": torch.__version__}


# ---- what is said ----------------------------------------------------------------------------------------------------


def header(job: Job, plan: Plan, resumed: Checkpoint | None) -> list[tuple[str, str]]:
    """A few lines before it begins: model, data, method, plan, where it writes."""
    options = job.options
    passes = console.counted(options.train.epochs, "epoch") if options.train.max_steps is None else "max_steps"
    whose = "the demo's rows (--data FILE takes yours) · " if options.data == [names.DEMO] else ""
    lines = [*job.facts, ("data", whose + job.data.summary())]
    rate = f"lr {options.train.lr:g} {options.train.lr_schedule}"
    steps, samples = console.counted(plan.steps, "step"), console.counted(options.train.global_batch_size, "sample")
    lines.append(("plan", f"{steps} ({passes}) of {samples} · {rate}"))
    begun = f", going on from {resumed.path.name}" if resumed else ""
    if resumed and (names.step_number(resumed.path) or 0) >= plan.steps:
        begun += ", its last step: nothing is left to do (a larger --train.max_steps trains longer)"
    lines.append(("writing", f"{options.out_dir}/{begun}"))
    return lines


def compute_text(options: FitOptions, dtype: torch.dtype | None = None) -> str:
    """Where and in which dtype (None: what --precision means) it is computed."""
    device = device_of(options.accelerator).type
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype or choose_dtype(options.precision, device)]
    threads = options.threads or torch.get_num_threads()
    return f"{device}, {name}, {console.counted(threads, 'thread')}" if device == "cpu" else f"{device}, {name}"
