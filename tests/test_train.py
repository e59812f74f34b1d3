"""The training step and the story around it: the same update however the batch is cut, exact resume, and what stops a run."""

import math
import os
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_gpt
from lightning.fabric import Fabric

from litlora.data.batches import pack
from litlora.data.samples import Sample
from litlora.errors import Interrupted, WorkError
from litlora.methods import METHODS, attach, trainable
from litlora.model import GPT, IGNORE
from litlora.options import LoRAOptions, TrainOptions
from litlora.train.guards import untrained_ends
from litlora.train.loop import Commit, Run, evaluate, fit, train_step
from litlora.train.metrics import Metrics, read
from litlora.train.optimizer import build_optimizer, learning_rate
from litlora.train.plan import Plan, Position
from litlora.train.signals import Signals

LoRA = LoRAOptions(r=4, alpha=8)


def samples(number: int, seed: int = 0) -> list[Sample]:
    """Ragged samples, part of each not graded."""
    random = np.random.default_rng(seed)
    made = []
    for index in range(number):
        length = int(random.integers(3, 30))
        ids = random.integers(0, 131, length + 1).astype(np.int32)
        targets = np.where(np.arange(length) < random.integers(0, length), IGNORE, ids[1:]).astype(np.int32)
        made.append(Sample(ids[:-1], targets, f"row {index}"))
    return made


def fabric() -> Any:
    return Fabric(accelerator="cpu", devices=1, precision="32-true")


def adapted(dtype: torch.dtype = torch.float32, lora: LoRAOptions = LoRA) -> GPT:
    model = tiny_gpt("llama3").to(dtype)
    attach(model, lora, seed=3)
    return model.train()


def run_of(
    tmp_path: Path, model: GPT, rows: Sequence[Sample], options: TrainOptions, commits: list[Any], *, seed: int = 7, validation: int = 3
) -> tuple[Run, torch.optim.Optimizer]:
    """A Run whose commits are kept in memory: weights, optimizer state and position."""
    learning = trainable(model)
    optimizer = build_optimizer(learning, options)

    def save(commit: Commit) -> None:
        weights = {name: parameter.detach().clone() for name, parameter in learning.items()}
        state = [{key: value.clone() for key, value in optimizer.state[parameter].items()} for parameter in learning.values()]
        commits.append((commit, weights, state))

    one = fabric()
    wrapped, wrapped_optimizer = one.setup(model, optimizer)
    plan = Plan(
        weights=[1.0] * len(rows),
        global_batch_size=options.global_batch_size,
        epochs=options.epochs,
        max_steps=options.max_steps,
        seed=seed,
    )
    run = Run(
        fabric=one, model=wrapped, optimizer=wrapped_optimizer, plan=plan, samples=rows, validation=samples(validation, seed=99),
        options=options, eval_interval=5, seed=seed, metrics=Metrics(tmp_path / "metrics.csv"), signals=Signals(), save=save,
    )  # fmt: skip
    run.signals.training = True
    return run, optimizer


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_update_does_not_depend_on_how_the_batch_is_cut(method: str, dtype: torch.dtype, tolerance: float) -> None:
    """YARDSTICK N11, N09: three clipped AdamW steps, ragged samples, masked prompts; packed or padded, in 1 to 8 micro-batches.

    Caught: dividing each micro-batch by its own count of graded tokens.
    """
    rows = samples(8)
    results = []
    for micro_batch_tokens, packing in ((10_000, True), (60, True), (30, True), (1, True), (10_000, False), (45, False)):
        model = adapted(dtype)
        options = TrainOptions(lr=1e-3)
        one = fabric()
        wrapped, optimizer = one.setup(model, build_optimizer(trainable(model), options))
        losses = [train_step(one, wrapped, optimizer, pack(rows, micro_batch_tokens, packing), max_norm=0.05).loss for _ in range(3)]
        results.append((losses, [parameter.detach().clone() for parameter in trainable(model).values()]))
    for losses, parameters in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-6)
        for ours, first in zip(parameters, results[0][1], strict=True):
            assert (ours - first).abs().max() <= tolerance


def test_a_micro_batch_without_graded_tokens_adds_nothing() -> None:
    """YARDSTICK N13: no NaN, and the same update as without it."""
    rows = samples(4)
    silent = replace(rows[0], targets=np.full_like(rows[0].targets, IGNORE))
    parameters = []
    for batch in (rows[1:], [silent, *rows[1:]]):
        model = adapted()
        one = fabric()
        wrapped, optimizer = one.setup(model, build_optimizer(trainable(model), TrainOptions(lr=1e-3)))
        result = train_step(one, wrapped, optimizer, pack(batch, 1), max_norm=1.0)
        assert math.isfinite(result.loss)
        parameters.append([parameter.detach().clone() for parameter in trainable(model).values()])
    for ours, theirs in zip(*parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)


def test_a_window_without_graded_tokens_is_no_step(tmp_path: Path) -> None:
    """YARDSTICK N13: no update, the count of steps unchanged, said in the log."""
    rows = samples(8)
    silent = [replace(row, targets=np.full_like(row.targets, IGNORE)) for row in rows[:4]]
    commits: list[Any] = []
    options = TrainOptions(global_batch_size=1, max_steps=6, save_interval=0, lr=1e-3)
    run, _ = run_of(tmp_path, adapted(), [*silent, *rows[4:]], options, commits)
    end = fit(run, Position())
    assert end.step == 6
    assert end.epoch * 8 + end.window > 6  # windows were passed over
    assert [int(row["step"]) for row in read(tmp_path / "metrics.csv")] == [0, 1, 2, 3, 4, 5, 6]


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_every_sample_is_used_once_an_epoch_and_the_tail_is_a_window() -> None:
    """YARDSTICK N12: 13 samples in windows of 8, two epochs."""
    plan = Plan(weights=[1.0] * 13, global_batch_size=8, epochs=2, max_steps=None, seed=1)
    windows = [window for window, _ in zip(plan.windows(Position()), range(plan.steps), strict=False)]
    assert plan.steps == 4
    assert [len(window.indices) for window in windows] == [8, 5, 8, 5]
    for epoch in (0, 1):
        assert sorted(index for window in windows if window.epoch == epoch for index in window.indices) == list(range(13))
    assert windows[0].indices != windows[2].indices


def test_a_plan_taken_up_anywhere_goes_on_the_same() -> None:
    """YARDSTICK R03: what comes next depends on the position alone."""
    plan = Plan(weights=[1.0] * 13, global_batch_size=4, epochs=3, max_steps=None, seed=5)
    whole = [window for window, _ in zip(plan.windows(Position()), range(plan.steps), strict=False)]
    position = Position()
    for number, window in enumerate(whole):
        rest = plan.windows(position)
        assert [next(rest) for _ in whole[number:]] == whole[number:]
        position = position.after(window, tokens=1, graded=1)


def expected_rate(lr: float, t: int, w: int, steps: int, schedule: str) -> float:
    w = min(w, steps)
    if t <= w:
        return lr * t / w
    done = (t - w) / (steps - w + 1)
    return {"cosine": lr * (1 + math.cos(math.pi * done)) / 2, "linear": lr * (1 - done), "constant": lr}[schedule]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (10, 10), (15, 10), (3, 10), (0, 1), (1, 1), (5, 1)])
def test_the_learning_rate_follows_its_closed_form(schedule: Any, warmup: int, steps: int) -> None:
    """YARDSTICK N15: warm-up 0, all of it, more than all of it, a single step; never negative, never an exception."""
    options = TrainOptions(lr=3e-4, lr_warmup_steps=warmup, lr_schedule=schedule)
    for t in range(1, steps + 1):
        rate = learning_rate(options, t, steps)
        assert rate == pytest.approx(expected_rate(3e-4, t, warmup, steps, schedule), abs=1e-12)
        assert rate > 0


# ---- validation ------------------------------------------------------------------------------------------------------


def test_validation_is_the_mean_over_tokens_and_leaves_no_trace() -> None:
    """YARDSTICK N16: one pass, ragged; random numbers, train mode and gradients are as before."""
    model = adapted(lora=LoRAOptions(r=4, dropout=0.3))
    rows = samples(7)
    one = fabric()
    wrapped = one.setup(model)
    total = count = 0.0
    with torch.no_grad():
        model.eval()
        for row in rows:
            logits = model(torch.from_numpy(row.tokens).long()[None])[0].double()
            chosen = torch.from_numpy(row.targets).long()
            total += float(torch.nn.functional.cross_entropy(logits, chosen, ignore_index=IGNORE, reduction="sum"))
            count += row.graded
        model.train()
    before = torch.get_rng_state()
    loss, graded = evaluate(one, wrapped, rows, TrainOptions(micro_batch_tokens=37))
    assert loss == pytest.approx(total / count, abs=1e-6)
    assert graded == count
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("stops", [[1], [7], [8], [9], [15], [3, 6, 9, 12, 15]])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, packing: bool, stops: list[int]) -> None:
    """YARDSTICK R01, R02, L07: weights, optimizer, losses, learning rates and metrics, to the bit, with dropout and evaluation in between.

    15 samples in windows of 2 make an epoch of 8 steps. Caught: seeding dropout once per run instead of once per step.
    """
    rows = samples(15)
    options = TrainOptions(global_batch_size=2, max_steps=16, save_interval=1, lr=2e-3, packing=packing, micro_batch_tokens=40)
    lora = LoRAOptions(r=4, dropout=0.1)
    whole: list[Any] = []
    run, _ = run_of(tmp_path, adapted(lora=lora), rows, options, whole)
    fit(run, Position())
    expected = read(tmp_path / "metrics.csv")

    position, weights, state = Position(), None, None
    for stop in [*stops, 16]:
        part: list[Any] = []
        model = adapted(lora=lora)
        run, optimizer = run_of(tmp_path, model, rows, options, part)
        if weights is not None and state is not None:
            with torch.no_grad():
                for name, parameter in trainable(model).items():
                    parameter.copy_(weights[name])
            for parameter, held in zip(trainable(model).values(), state, strict=True):
                optimizer.state[parameter] = {key: value.clone() for key, value in held.items()}
            run = replace(run, metrics=Metrics(tmp_path / "resumed.csv", keep_until=position.step))
        else:
            run = replace(run, metrics=Metrics(tmp_path / "resumed.csv"))
        run = replace(run, plan=replace(run.plan, max_steps=16))
        with pytest.raises(StopHere) if stop < 16 else nullcontext():
            fit(replace(run, save=stopping(run.save, stop)) if stop < 16 else run, position)
        commit, weights, state = part[-1]
        position = commit.position
    assert position == whole[-1][0].position
    for name, tensor in whole[-1][1].items():
        assert torch.equal(tensor, weights[name]), name
    for ours, theirs in zip(state, whole[-1][2], strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    volatile = ("seconds", "tokens_per_second", "memory_mb")
    plain = [{key: value for key, value in row.items() if key not in volatile} for row in expected]
    assert [{key: value for key, value in row.items() if key not in volatile} for row in read(tmp_path / "resumed.csv")] == plain


class StopHere(Exception):
    """A crash at a moment of the test's choosing."""


def stopping(save: Any, step: int) -> Any:
    def saved(commit: Commit) -> None:
        save(commit)
        if commit.position.step == step:
            raise StopHere

    return saved


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """YARDSTICK N17."""
    ends = []
    for _ in range(2):
        commits: list[Any] = []
        options = TrainOptions(global_batch_size=3, max_steps=6, lr=1e-3)
        fit(run_of(tmp_path, adapted(lora=LoRAOptions(r=4, dropout=0.2)), samples(9), options, commits)[0], Position())
        ends.append(commits[-1][1])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# ---- what stops a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["weight", "gradient", "infinite weight"])
def test_a_value_that_is_not_finite_stops_the_run_at_its_step(tmp_path: Path, where: str) -> None:
    """YARDSTICK F16: the step is named, the row is logged, nothing is committed after it.

    Caught: testing the loss alone (a gradient may overflow while the loss is fine).
    """
    model = adapted()
    commits: list[Any] = []
    options = TrainOptions(global_batch_size=2, max_steps=10, save_interval=2, lr=1e-3)
    run, _ = run_of(tmp_path, model, samples(20), options, commits)
    victim = next(iter(trainable(model).values()))

    def save(commit: Commit) -> None:
        run.save(commit)
        if commit.position.step == 4:
            if where == "gradient":
                victim.register_hook(lambda grad: grad * math.inf)
            else:
                victim.data[0] = math.nan if where == "weight" else math.inf

    with pytest.raises(WorkError, match=r"^the (loss|gradient's norm) is .* at step 5; the last good checkpoint is step-4"):
        fit(replace(run, save=save), Position())
    assert [commit.position.step for commit, *_ in commits] == [2, 4]
    last = read(tmp_path / "metrics.csv")[-1]
    assert last["step"] == "5"
    assert not (math.isfinite(float(last["loss"])) and math.isfinite(float(last["grad_norm"])))


def test_a_tensor_that_cannot_learn_stops_the_run_by_name(tmp_path: Path) -> None:
    """DESIGN section 5: q of a block whose output projection is zero gets no gradient, and nobody noticed."""
    model = adapted()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.model.layers[1].self_attn.o_proj.adapter = None
    run, _ = run_of(tmp_path, model, samples(20), TrainOptions(global_batch_size=2, max_steps=5, lr=1e-3), [])
    with pytest.raises(WorkError, match=r"layers\.1\.self_attn\.q_proj.*no gradient after two updates"):
        fit(run, Position())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_a_commit(tmp_path: Path, number: int) -> None:
    """YARDSTICK F10: the step is finished and committed; the exit code is 128 + the signal's number."""
    commits: list[Any] = []
    run, _ = run_of(tmp_path, adapted(), samples(20), TrainOptions(global_batch_size=2, max_steps=50, save_interval=3, lr=1e-3), commits)

    def save(commit: Commit) -> None:
        run.save(commit)
        if commit.position.step == 3:
            os.kill(os.getpid(), number)

    with run.signals, pytest.raises(Interrupted) as stop:
        fit(replace(run, save=save), Position())
    assert stop.value.exit_code == 128 + number
    assert [commit.position.step for commit, *_ in commits] == [3, 4]


def test_sigusr1_commits_and_goes_on(tmp_path: Path) -> None:
    """DESIGN section 7."""
    commits: list[Any] = []
    run, _ = run_of(tmp_path, adapted(), samples(20), TrainOptions(global_batch_size=2, max_steps=6, save_interval=2, lr=1e-3), commits)

    def save(commit: Commit) -> None:
        run.save(commit)
        if commit.position.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    with run.signals:
        fit(replace(run, save=save), Position())
    assert [commit.position.step for commit, *_ in commits] == [2, 3, 4, 6]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_for_the_metrics_costs_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YARDSTICK F07: a logger is not the run."""
    metrics = Metrics(tmp_path / "metrics.csv")
    metrics.path = Path("/dev/full")
    metrics.write(step=1, epoch=0, loss=1.0)
    metrics.write(step=2, epoch=0, loss=1.0)
    assert capsys.readouterr().err.count("warning") == 1


def test_an_untrained_end_token_is_seen() -> None:
    """DESIGN section 5: a row of the head that is one of many near-equal ones was never trained."""
    head = torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    head[40:60] = head[40] + 1e-4 * torch.randn(20, 16, generator=torch.Generator().manual_seed(2))
    assert untrained_ends(head, [50]) == {50: 20}
    assert untrained_ends(head, [3]) == {}
