"""Lanes: a step's batches side by side on the cores of a CPU. The same update, to the bit for a seed, and no more memory.

(That the update does not depend on the number of lanes is promised of every method in test_train.py.)
"""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import samples_of, taken_apart, templated
from test_train import adapted, fabric, optimizer_of, run_of, samples
from torch import Tensor

from litlora.data.batches import Batch, pack
from litlora.data.lanes import in_lanes
from litlora.data.samples import Sample
from litlora.kernels import linear
from litlora.methods.attach import trainable
from litlora.options import AdapterOptions, FullOptions, LoRAOptions, ProOptions, TrainOptions
from litlora.train import lanes as lanes_module
from litlora.train.lanes import lanes_of, learns_in_lanes, side_by_side
from litlora.train.loop import evaluate, fit, share_of_window, train_step
from litlora.train.loss import loss_of_samples
from litlora.train.plan import Position

FEW = LoRAOptions(r=2, alpha=4)  # few enough of a tiny model's parameters


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


# ---- which sample is computed where ------------------------------------------------------------------------------------


KINDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 25), st.integers(0, 2)), min_size=1, max_size=25)


@settings(max_examples=200, deadline=None)
@given(KINDS, st.integers(1, 400), st.booleans(), st.booleans(), st.integers(1, 4))
def test_each_sample_is_in_one_lane_and_no_more_is_computed_at_once(
    kinds: list[tuple[int, int, int]], limit: int, packing: bool, share: bool, number: int
) -> None:
    """N10's ground, and C2's: the largest batches of all lanes fit together.

    Caught: room for each lane as if it were alone.
    """
    rows = [replace(row, tokens=row.tokens + 1) for row in (templated(*kind) for kind in kinds)]  # a 0 would look like padding
    lanes = in_lanes(rows, limit, packing, share, number)
    assert 1 <= len(lanes) <= number and all(lanes)
    parts = [part for batches in lanes for batch in batches for part in taken_apart(batch)]
    assert sorted(parts) == sorted((sample.tokens.tolist(), sample.targets.tolist()) for sample in rows)
    if len(lanes) > 1:
        assert sum(max(batch.tokens.numel() for batch in batches) for batches in lanes) <= limit


def tokens(lanes: Sequence[Sequence[Batch]]) -> list[int]:
    return [sum(batch.tokens.numel() for batch in batches) for batches in lanes]


def test_lanes_are_done_at_about_the_same_time() -> None:
    """Longest first alone gives 150 and 110; an exchange makes them even. Caught: no exchange; a sample that is taken over and kept."""
    assert sorted(tokens(in_lanes(samples_of([70, 60, 50, 40, 40]), 1000, lanes=2))) == [130, 130]
    assert len(in_lanes(samples_of([500, 20, 20]), 1000, lanes=2)) == 1, "two cores at one thing are faster than one that waits"
    assert len(in_lanes(samples_of([500, 480]), 1000, lanes=2)) == 2
    assert len(in_lanes(samples_of([500, 480]), 900, lanes=2)) == 1, "they are not to be computed at once"


def test_what_begins_alike_goes_to_one_lane() -> None:
    """Two rows of each of two templates of 30 words, 29 of which can be shared. Caught: spreading by lengths alone (158 in all)."""
    rows = [templated(template, 10, seed) for template, seed in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert tokens(in_lanes(rows, 1000, share=True, lanes=2)) == [29 + 2 * 11] * 2


# ---- side by side -----------------------------------------------------------------------------------------------------


def batches_of(number: int) -> list[list[Batch]]:
    return [pack(samples_of([length]), 100) for length in range(1, number + 1)]


@pytest.mark.usefixtures("three_threads")
def test_lanes_are_computed_at_the_same_time_each_with_its_share_of_the_threads() -> None:
    """Caught: one after another (the barrier breaks); every lane with all threads."""
    barrier = threading.Barrier(3, timeout=60)

    def compute(batches: Iterable[Batch]) -> tuple[int, int]:
        barrier.wait()
        return sum(batch.tokens.numel() for batch in batches), torch.get_num_threads()

    assert side_by_side(batches_of(3), compute) == [(1, 1), (2, 1), (3, 1)]


@pytest.mark.usefixtures("three_threads")
def test_afterwards_there_are_as_many_threads_as_before() -> None:
    """Here and in threads that begin later, as that which writes a commit. Caught: not set back."""
    side_by_side(batches_of(3), list)
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("how", ["an error", "Ctrl-C"])
def test_what_fails_in_a_lane_or_is_interrupted_ends_all_lanes_after_their_batch(how: str) -> None:
    """And the step, or the evaluation, with it. Caught: lanes that compute all that is left to them first."""
    lanes = [batches * 1000 for batches in batches_of(3)]
    computed: list[int] = []
    pressed = threading.Lock()

    def compute(batches: Iterable[Batch]) -> None:
        for batch in batches:
            computed.append(batch.tokens.numel())
            time.sleep(0.005)
            if computed[-1] == 2 and len(computed) > 10 and how == "an error":
                raise MemoryError("lane 2")
            if len(computed) >= 10 and how == "Ctrl-C" and pressed.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises((MemoryError, KeyboardInterrupt)):
        side_by_side(lanes, compute)
    assert len(computed) < 1000 and torch.get_num_threads() == 3


def slowed(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """The lanes end in the order first, first + 1, ..."""
    honest = torch.autograd.grad

    def grad(loss: Tensor, *given: Any, **named: Any) -> Any:
        found = honest(loss, *given, **named)
        own = int(threading.current_thread().name.rsplit("_", 1)[1])
        time.sleep(0.05 * ((own - first) % 3))
        return found

    monkeypatch.setattr(torch.autograd, "grad", grad)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("first", [1, 2])
def test_the_update_has_the_same_bits_whichever_lane_is_done_first(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """N12: three lanes, whose sums depend on their order. Caught: gradients summed in the order in which the lanes end."""
    rows, results = samples(9), []
    for order in (0, first):
        with monkeypatch.context() as patch:
            slowed(patch, order)
            model = adapted(options=FEW)
            one = fabric()
            wrapped, optimizer = one.setup(model, optimizer_of(model, TrainOptions(lr=1e-3), FEW))
            lanes = in_lanes(rows, 1000, lanes=3)
            assert len(lanes) == 3
            losses = [train_step(one, wrapped, optimizer, lanes, max_norm=0.5).loss for _ in range(2)]
        results.append((losses, [parameter.detach().clone() for parameter in trainable(model).values()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0][1], results[1][1], strict=True))


# ---- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("three_threads")
def test_only_few_parameters_without_random_numbers_learn_in_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lane has a gradient of its own, and dropout's numbers are drawn in turn. A tenth of the model is few, and so is what takes no
    memory to speak of, as all of a tiny model. Caught: dropout that does not count; a whole model; few of a tiny model left to one lane."""
    assert learns_in_lanes(adapted(options=FullOptions()))
    assert not learns_in_lanes(adapted(options=LoRAOptions(r=2, dropout=0.1)))
    monkeypatch.setattr(lanes_module, "LITTLE", 0)
    learn = {
        "lora": adapted(options=FEW),
        "adapter": adapted(options=AdapterOptions(kind="scale_shift")),
        "dropout": adapted(options=LoRAOptions(r=2, dropout=0.1)),
        "full": adapted(options=FullOptions()),
        "pro": adapted(options=ProOptions(n_insert=2)),
    }
    assert [name for name, model in learn.items() if learns_in_lanes(model)] == ["lora", "adapter"]
    assert learns_in_lanes(learn["dropout"].eval())
    assert (lanes_of(torch.device("cpu")), lanes_of(torch.device("cuda"))) == (3, 1)
    options, one = TrainOptions(), fabric()
    assert len(share_of_window(one, learn["full"], samples(12), options, learning=False)) == 3, "a validation needs no gradients"
    for name, model in learn.items():
        lanes = share_of_window(one, model.train(), samples(12), options)
        assert len(lanes) == (3 if name in ("lora", "adapter") else 1), name


def test_as_many_cores_work_as_can() -> None:
    """By threads: 5 are better used by 4 lanes, 6 by 3 of 2, 7 by one. Caught: as many lanes as may be."""
    assert [lanes_of(torch.device("cpu"), threads) for threads in range(1, 13)] == [1, 2, 3, 4, 4, 3, 1, 4, 3, 2, 1, 4]


@pytest.mark.usefixtures("three_threads")
def test_a_gradient_is_nobody_elses_and_lies_as_its_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused optimizer reads it in the parameter's order. Caught: what autograd gave, as it lies."""
    honest = torch.autograd.grad

    def transposed(*given: Any, **named: Any) -> Any:
        return tuple(None if one is None else one.t().contiguous().t() for one in honest(*given, **named))

    results = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(torch.autograd, "grad", transposed)
        model = adapted(options=FEW)
        one = fabric()
        wrapped, optimizer = one.setup(model, optimizer_of(model, TrainOptions(lr=1e-3), FEW))
        train_step(one, wrapped, optimizer, in_lanes(samples(9), 1000, lanes=3), max_norm=0.5)
        for parameter in trainable(model).values():
            assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()
            assert parameter.grad.untyped_storage().nbytes() == parameter.grad.nbytes
        results.append([parameter.detach().clone() for parameter in trainable(model).values()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.usefixtures("three_threads")
def test_a_validation_in_lanes_finds_the_same_loss() -> None:
    model, rows = adapted(torch.float64, FEW), samples(12)
    alone = evaluate(fabric(), model, rows, TrainOptions(micro_batch_tokens=1))
    lanes = evaluate(fabric(), model, rows, TrainOptions())
    assert lanes == (pytest.approx(alone[0], rel=1e-12), alone[1])
    total, graded = loss_of_samples(model, rows)
    assert (total / graded, graded) == (pytest.approx(alone[0], rel=1e-12), alone[1])
    assert model.training, "left as it was"


@pytest.mark.usefixtures("three_threads")
def test_a_run_in_lanes_is_the_same_twice(tmp_path: Path) -> None:
    """R02: every commit of two runs, to the bit."""
    options, runs = TrainOptions(global_batch_size=6, max_steps=6, save_interval=1, lr=2e-3), []
    for attempt in ("one", "two"):
        commits: list[Any] = []
        place = tmp_path / attempt
        place.mkdir()
        run, _ = run_of(place, adapted(options=FEW), samples(15), options, commits, method=FEW)
        assert len(share_of_window(run.fabric, run.model, list(run.samples)[:6], options)) == 3
        fit(run, Position())
        runs.append(commits)
    for (_, ours, state), (_, theirs, other) in zip(*runs, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert all(torch.equal(a[key], b[key]) for a, b in zip(state, other, strict=True) for key in b)


def test_a_sample_alone_has_all_cores() -> None:
    assert len(in_lanes([Sample(*(samples(1)[0].tokens,) * 2, "")], 1000, lanes=4)) == 1


@pytest.mark.usefixtures("three_threads")
def test_a_few_rows_are_multiplied_by_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """C3: the same numbers, of one token or of several rows, with and without a bias. Caught: another part's rows; the bias left out."""
    honest, split = torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda *given: split.append(1) or honest(*given))
    for out, rows in ((96, 1), (96, 5), (96, 16), (96, 17), (97, 1)):
        weight, bias, x = torch.randn(out, 36), torch.randn(out), torch.randn(rows, 36)
        for into in (x, x[None], x[:, None]):
            for added in (None, bias):
                before = len(split)
                with torch.no_grad():
                    ours = linear(into, weight, added)
                torch.testing.assert_close(ours, torch.nn.functional.linear(into, weight, added), atol=1e-5, rtol=1e-5)
                assert (len(split) > before) == (out == 96 and rows <= 16)
    with torch.no_grad():
        assert linear(torch.randn(0, 36), torch.randn(96, 36), None).shape == (0, 96)
    before = len(split)
    linear(x[:1].requires_grad_(), torch.randn(96, 36), None).sum().backward()
    assert len(split) == before, "while training nothing is split"
