"""Training, in three functions to read top to bottom: `fit` (the story), `train_step` (the arithmetic), `evaluate`.

The loss is a sum over graded tokens, divided once by their count over the whole global batch. How a batch is cut into
micro-batches, packed into streams or spread over ranks does not change the update (DESIGN section 1, decision 5).
"""

import math
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from litlora.console import Progress, count, counted
from litlora.data.batches import Batch, share_of_rank
from litlora.data.lanes import in_lanes
from litlora.data.samples import Sample
from litlora.errors import Interrupted, WorkError
from litlora.model import IGNORE
from litlora.options import TrainOptions
from litlora.train.lanes import backward, lanes_of, learns_in_lanes
from litlora.train.loss import summed_loss
from litlora.train.metrics import Metrics, memory_text
from litlora.train.optimizer import learning_rate, set_learning_rate
from litlora.train.plan import Plan, Position
from litlora.train.ranks import over_ranks
from litlora.train.saving import Commit, Prepared, Saver
from litlora.train.signals import Signals
from litlora.train.watch import Watch

if TYPE_CHECKING:  # Fabric takes seconds to import: a run imports it once its input is known to be good
    from lightning_fabric import Fabric

CPU_TOKENS = 1024  # computed at once where nothing else was asked: enough to keep the cores busy, small enough for the caches
GPU_TOKENS = 8192  # so many that a GPU computes most of the time, and is not waited for by its own launches


class StepResult(NamedTuple):
    """What one update did, over all ranks."""

    loss: float  # nats per graded token
    grad_norm: float  # before clipping
    graded: int  # tokens that count in the loss
    stop: bool  # a rank was asked to stop
    commit: bool  # a rank was asked to commit
    failed: bool  # a commit that was under way has failed

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def fault(self) -> str:
        """What of it is not finite."""
        return f"the gradient's norm is {self.grad_norm}" if math.isfinite(self.loss) else f"the loss is {self.loss}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What `fit` works with."""

    fabric: "Fabric"
    model: Any  # as fabric.setup_module returned it
    optimizer: torch.optim.Optimizer
    plan: Plan
    samples: Sequence[Sample]
    validation: Sequence[Sample]
    options: TrainOptions
    eval_interval: int
    seed: int
    metrics: Metrics
    signals: Signals
    watch: Watch = field(default_factory=lambda: Watch({}))  # groups of parameters whose progress is shown
    prepare: Callable[[Commit], Prepared]  # called on the first rank: looks at what is to be committed, and copies it


def fit(run: Run, start: Position) -> Position:
    """Train from `start` to the plan's end, or until patience is at its end; return where it ended.

    Raises WorkError when the loss or a gradient is not finite, a tensor can never learn or a commit fails (at the next step at the
    latest), Interrupted after the commit that a signal asked for. However it ends, no commit is under way any more.
    """
    position, alive = start, set[str]()
    if start.step == 0 and run.validation:
        run.metrics.write(step=0, epoch=0, val_loss=evaluate(run.fabric, run.model, run.validation, run.options)[0])
    with (
        Progress(run.plan.steps, "step", start=start.step, quiet=not run.fabric.is_global_zero) as progress,
        Saver(run.fabric, run.prepare, start.step, progress.line) as saver,
    ):
        for window in run.plan.windows(start):
            if position.step >= run.plan.steps or position.is_enough(run.options.patience):
                break
            began = time.monotonic()
            lanes = share_of_window(run.fabric, run.model, [run.samples[index] for index in window.indices], run.options)
            lr = learning_rate(run.options, position.step + 1, run.plan.steps)
            set_learning_rate(run.optimizer, lr)
            seed_step(run.seed, position.step, run.fabric.global_rank)
            if every(run.options.log_interval, position.step + 1):
                run.watch.before()
            result = train_step(
                run.fabric, run.model, run.optimizer, lanes, max_norm=run.options.max_norm,
                asked=lambda: (*run.signals.asked(), saver.look()),
            )  # fmt: skip
            if result.failed:
                saver.finish()  # raises
            if result.graded == 0:  # nothing to learn from: no update, and the count of updates stands still
                position = replace(position, epoch=window.epoch, window=window.number + 1)
                progress.line(f"warning: window {window.number} of epoch {window.epoch} grades no token; skipped")
                continue
            tokens = sum(len(run.samples[index].tokens) for index in window.indices)
            position = position.after(window, tokens=tokens, graded=result.graded)
            seconds = time.monotonic() - began
            if not result.finite:
                record(run, progress, position, result, lr, seconds, tokens, val_loss=None)
                raise not_finite(position.step, saver.newest(), result.fault)
            if position.step <= 2 and lr > 0:
                check_alive(run.model, alive, position.step)
            last = position.step == run.plan.steps
            val_loss = None
            if run.validation and (last or every(run.eval_interval, position.step)):
                val_loss = evaluate(run.fabric, run.model, run.validation, run.options)[0]
                position = position.validated(val_loss)
                last = last or position.is_enough(run.options.patience)
            if last or val_loss is not None or every(run.options.log_interval, position.step):
                record(run, progress, position, result, lr, seconds, tokens, val_loss)
            if val_loss is not None and not math.isfinite(val_loss):
                raise not_finite(position.step, saver.newest(), f"the validation loss is {val_loss}")
            best = run.options.patience > 0 and val_loss is not None and position.waited == 0  # what patience will have waited for
            if last or result.stop or result.commit or best or every(run.options.save_interval, position.step):
                saver.save(Commit(position=position, loss=result.loss, val_loss=val_loss))
            if result.stop and not last:
                saver.finish()
                raise Interrupted(run.signals.number or signal.SIGTERM)
        if position.is_enough(run.options.patience):
            progress.line(f"stopped: {counted(position.waited, 'validation')} brought no loss below {position.best_val_loss:.4f}")
    return position


def every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def record(
    run: Run, progress: Progress, position: Position, result: StepResult, lr: float, seconds: float, tokens: int, val_loss: float | None
) -> None:
    """One row of metrics.csv, and the live line."""
    watched = run.watch.after(unclipped=max(1.0, result.grad_norm / run.options.max_norm) if run.options.max_norm else 1.0)
    run.metrics.write(
        step=position.step, epoch=position.epoch, loss=result.loss, val_loss=val_loss, lr=lr, grad_norm=result.grad_norm,
        graded=result.graded, tokens=position.tokens, seconds=seconds, tokens_per_second=tokens / seconds, **watched,
    )  # fmt: skip
    val = {} if position.best_val_loss is None else {"val": f"{position.best_val_loss:.4f}"}
    speed = {"lr": f"{lr:.1e}", "tok/s": count(tokens / seconds), "memory": memory_text(run.fabric.device)}
    progress.update(position.step, loss=f"{result.loss:.4f}", **val, **run.watch.shown(watched), **speed)


def train_step(
    fabric: "Fabric",
    model: Any,  # as fabric.setup_module returned it
    optimizer: torch.optim.Optimizer,
    lanes: Sequence[Sequence[Batch]],
    *,
    max_norm: float = 0.0,
    asked: Callable[[], tuple[bool, bool, bool]] = lambda: (False, False, False),
) -> StepResult:
    """One update on this rank's share of the global batch, `lanes` of batches. The gradients stay in place until the next step.

    `max_norm` 0 clips nothing. `asked`: this rank's wish to stop, its wish to commit, and whether a commit has failed; it is called when
    the gradients are there, so that a signal is obeyed after the step that it came in, and every rank learns of the answers in the same
    step. A batch that grades nothing (`asked` is not called then), or a loss or gradient that is not finite, makes no update.
    """
    optimizer.zero_grad()
    here = sum(batch.graded for batches in lanes for batch in batches)
    graded = int(over_ranks(fabric, torch.tensor(here, dtype=torch.float64)).item())  # over the whole global batch
    if graded == 0:
        return StepResult(0.0, 0.0, 0, stop=False, commit=False, failed=False)
    scale = fabric.world_size / graded  # ranks are averaged, so undo it
    if len(lanes) > 1:
        total = backward(inner(model), lanes, fabric.device, scale)
    else:
        wide = torch.float32 if fabric.device.type == "mps" else torch.float64  # Apple's GPUs have no fp64
        total = torch.zeros((), dtype=wide, device=fabric.device)
        for i, batch in enumerate(lanes[0]):
            with fabric.no_backward_sync(model, enabled=i < len(lanes[0]) - 1):
                loss = batch.loss(model, fabric.device)  # a sum
                fabric.backward(loss * scale)
            total += loss.detach()
    norm: Any = fabric.clip_gradients(model, optimizer, max_norm=max_norm or math.inf, error_if_nonfinite=False)
    loss_sum, *wishes = over_ranks(fabric, torch.tensor([total.item(), *asked()], dtype=torch.float64)).tolist()
    result = StepResult(loss_sum / graded, norm.item(), graded, *map(bool, wishes))
    if result.finite:
        optimizer.step()
    return result


def evaluate(fabric: "Fabric", model: nn.Module, samples: Sequence[Sample], options: TrainOptions) -> tuple[float, int]:
    """The loss per graded token over all of `samples`, in nats, and how many tokens were graded; one pass, over all ranks.

    Leaves train mode, random numbers and gradients as they were (YARDSTICK N16).
    """
    total, graded = summed_loss(model, share_of_window(fabric, model, samples, options, learning=False), fabric.device)
    sums = over_ranks(fabric, torch.tensor([total, graded], dtype=torch.float64))
    return (sums[0] / sums[1]).item(), int(sums[1].item())


def share_of_window(
    fabric: "Fabric", model: Any, window: Sequence[Sample], options: TrainOptions, *, learning: bool = True
) -> list[list[Batch]]:
    """This rank's micro-batches of `window`, in lanes. A rank without a sample computes one that grades nothing, so that all take part."""
    mine = share_of_rank(window, fabric.global_rank, fabric.world_size)
    if not mine:
        idle = min(window, key=lambda sample: len(sample.tokens))
        mine = [replace(idle, targets=np.full_like(idle.targets, IGNORE))]
    share, room = options.share_prefix and inner(model).can_share, micro_batch_tokens(options, fabric.device)
    alone = fabric.world_size == 1  # ranks are lanes already
    lanes = lanes_of(fabric.device) if alone and (learns_in_lanes(inner(model)) or not learning) else 1
    return in_lanes(mine, room, options.packing, share, lanes)


def micro_batch_tokens(options: TrainOptions, device: torch.device) -> int:
    return options.micro_batch_tokens or (GPU_TOKENS if device.type == "cuda" else CPU_TOKENS)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Every step's random numbers (dropout) are a function of these three: there is no generator state to save or to restore."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + rank) % 2**63)


def check_alive(model: nn.Module, alive: set[str], step: int) -> None:
    """After the second update every trained tensor must have had a gradient: LoRA's A has none in the first, for B is zero."""
    trained = {name: parameter for name, parameter in inner(model).named_parameters() if parameter.requires_grad}
    alive |= {name for name, parameter in trained.items() if parameter.grad is not None and bool(parameter.grad.any())}
    reached = {of_any_expert(name) for name in alive}  # an expert that no token went through yet is no fault
    dead = sorted(name for name in trained if of_any_expert(name) not in reached)
    if step == 2 and dead:
        more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
        raise WorkError(
            f"{', '.join(dead[:3])}{more}: still no gradient after two updates, so training can never change it",
            hint="leave them out, or train what stands behind them: what goes into a new block's zero o_proj or down_proj cannot learn",
        )


def inner(model: Any) -> Any:
    """The GPT without Fabric's wrapper, which would stand in front of every name."""
    return getattr(model, "module", model)


def of_any_expert(name: str) -> str:
    """A parameter's name without the number of its expert: the same for all experts of a layer."""
    return re.sub(r"(\.experts)\.\d+\.", r"\1.", name)


def not_finite(step: int, committed: int, what: str) -> WorkError:
    last = f"the last good checkpoint is step-{committed}" if committed else "nothing was committed yet"
    return WorkError(f"{what} at step {step}; {last}", hint="lower --train.lr, or look at the rows of this step")
