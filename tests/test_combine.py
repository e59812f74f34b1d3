"""Combining checkpoints. The oracle is fp64: the merged weights of each parent, combined as the papers write it, tensor by tensor."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge import make_base, merged, read
from test_merge_methods import as_fresh, base_of, exact, scale_shift, step_of, trained, tuning_of

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import Tensors
from litlora.checkpoint.manifest import read_manifest, verify_files
from litlora.checkpoint.resolve import resolve
from litlora.combine import Parent, combine, prepare, recipe_of
from litlora.combine.arithmetic import dropping, elected, factored, shortened, stacked, trimming
from litlora.errors import UserError
from litlora.methods.tuning import LoRASlot
from litlora.options import AdapterOptions, Combine, FreezeOptions, LoRAOptions, ProOptions
from litlora.safetensors_file import SafetensorsFile

Weights = dict[str, np.ndarray]  # of a plain model, in fp64

# ---- samples ---------------------------------------------------------------------------------------------------------

PLAIN = LoRAOptions(r=3, alpha=5, target_modules=["q_proj", "v_proj", "down_proj"])
ALL = LoRAOptions(r=2, alpha=8)
# name -> the base's family, and what each parent was trained with
PAIRS: dict[str, tuple[str, tuple[LoRAOptions, ...]]] = {
    "the same twice": ("llama3", (PLAIN, PLAIN)),
    "other ranks and alphas": ("mistral", (PLAIN, replace(PLAIN, r=5, alpha=1.5))),
    "other targets": ("llama3", (PLAIN, ALL)),
    "rsLoRA and LoRA": ("qwen3", (replace(ALL, use_rslora=True), replace(PLAIN, r=4))),
    "patterns": ("llama3", (replace(ALL, rank_pattern=["down_proj=5"], alpha_pattern=["layers.1.self_attn.q_proj=3"]), PLAIN)),
    "other layers": ("qwen2", (replace(ALL, layers=["0-1"]), replace(PLAIN, layers=["1-2"]))),
    "PiSSA and plain": ("llama3", (replace(ALL, init="pissa"), PLAIN)),
    "norms whole in one": ("llama3", (replace(PLAIN, modules_to_save=["norm", "input_layernorm"]), ALL)),
    "a shared head in both": ("smollm", (replace(PLAIN, modules_to_save=["embed_tokens"]), replace(ALL, modules_to_save=["lm_head"]))),
    "a separate head in one": ("smollm", (replace(PLAIN, modules_to_save=["lm_head"], untie=True), ALL)),
    "three": ("llama3", (PLAIN, ALL, replace(PLAIN, r=1, target_modules=["lm_head", "o_proj"]))),
}
SAME: dict[str, tuple[str, Any]] = {
    "layers": ("qwen3", FreezeOptions(extra_modules=["norm", "lm_head"])),
    "a shared head": ("smollm", FreezeOptions(layers=["0"], modules=["mlp"], extra_modules=["embed_tokens"])),
    "blocks": ("llama_biased", ProOptions(positions=["0"], modules_to_save=["norm"])),
    "blocks and a separate head": ("smollm", ProOptions(n_insert=1, modules_to_save=["lm_head"], untie=True)),
}


def noisy(options: Any, base: Path, seed: int, size: float = 0.1) -> Tensors:
    """Another training's result: the same for a seed, and the same under both names of a shared matrix."""
    parameters = tuning_of(options, base).file_names(Checkpoint(base, "base").config())
    tensors = dict(trained(options, base))
    for name, (dtype, shape, values) in tensors.items():
        number = int.from_bytes(parameters[name].encode()[-6:], "little") + seed
        noise = np.random.default_rng(number).normal(size=shape).astype(np.float32) * np.float32(size)
        tensors[name] = (dtype, shape, np.asarray(values) + noise)
    return tensors


def steps_on(place: Path, base: Path, all_options: Sequence[Any]) -> list[Path]:
    return [
        step_of(place / f"run{number}", base, options, noisy(options, base, seed=100 * number))
        for number, options in enumerate(all_options)
    ]


def pair(place: Path, name: str, dtype: str = "F32") -> tuple[Path, list[Path]]:
    family, all_options = PAIRS[name]
    base = base_of(place / "base", family, dtype)
    return base, steps_on(place, base, all_options)


def made(out_dir: Path, paths: Sequence[Path | str], how: str = "average", **options: Any) -> Path:
    """What `litlora combine` does, without the command."""
    wanted = Combine(how=how, **{name: value for name, value in options.items() if name in ("t", "decay", "density", "scale", "seed")})  # type: ignore[arg-type]
    weights = options.get("weights", [1.0] * len(paths))
    parents = [Parent(resolve(path)) for path in paths]
    recipe = recipe_of(wanted, weights, [str(path) for path in paths])
    base = resolve(options["base_dir"]) if "base_dir" in options else None
    others = {name: options[name] for name in ("rank", "whole", "dtype") if name in options}
    combine(prepare(parents, recipe, out_dir, base=base, **others))
    return out_dir


def weights_of(path: Path, base: Path) -> Weights:
    """What a checkpoint means, in fp64: of a whole model its tensors."""
    if resolve(path).is_model:
        return {name: values for name, (_, values, _) in read(path).items()}
    return {name: values for name, (values, _) in exact(path, base).items()}


def start_of(place: Path, base: Path, options: Any) -> Weights:
    """The merged weights before training, under the same names."""
    return weights_of(step_of(place / f"fresh{len(list(place.iterdir()))}", base, options, as_fresh(options, base)), base)


def with_head(weights: Weights) -> Weights:
    """A model whose head is the embedding, as if it had one of its own."""
    return {**weights, "lm_head.weight": weights.get("lm_head.weight", weights["model.embed_tokens.weight"])}


def summed(start: Weights, parents: Sequence[Weights], weights: Sequence[float]) -> Weights:
    return {name: start[name] + sum(w * (one[name] - start[name]) for w, one in zip(weights, parents, strict=True)) for name in start}


def assert_close(found: Weights, wanted: Weights, tolerance: float = 3e-7) -> None:
    """Each tensor, to `tolerance` of its norm: some units of fp32's last place."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert np.linalg.norm(found[name] - wanted[name]) <= tolerance * np.linalg.norm(wanted[name]), name


def tensors_in(path: Path) -> dict[str, bytes]:
    with SafetensorsFile(Checkpoint(path, "step", manifest=read_manifest(path)).adapter_file()) as file:
        return {name: bytes(file.bytes(name)) for name in file.tensors}


# ---- sums of LoRA ----------------------------------------------------------------------------------------------------


SUMS: dict[str, tuple[float, ...]] = {"weighted_sum": (0.75, -0.4), "average": (0.5, 0.5), "interpolate": (0.7, 0.3)}
OF_EACH = [*((name, "weighted_sum") for name in PAIRS), ("patterns", "average"), ("three", "average"), ("patterns", "interpolate")]


@pytest.mark.parametrize(("name", "how"), OF_EACH)
def test_a_linear_combination_of_lora_is_exact(tmp_path: Path, name: str, how: str) -> None:
    """W0 + sum_i w_i s_i B_i A_i, and what was trained whole likewise, for other ranks, targets, scales and layers. (Mutations seen to
    fail: the parent's own scale left out; a module of one parent counted for both; the base counted once too often where one parent
    did not train a tensor.)"""
    base, steps = pair(tmp_path, name)
    weights = (1 / 3,) * 3 if len(steps) == 3 and how == "average" else (*SUMS[how], 0.25)[: len(steps)]
    options: dict[str, Any] = {"t": 0.3} if how == "interpolate" else {} if how == "average" else {"weights": list(weights)}
    result = made(tmp_path / "result", steps, how, **options)
    parents = [with_head(weights_of(step, base)) for step in steps]
    start = with_head(weights_of(base, base))
    assert_close(with_head(weights_of(result, base)), summed(start, parents, weights))


def test_the_result_has_the_sum_of_the_ranks_and_scale_1(tmp_path: Path) -> None:
    _, steps = pair(tmp_path, "other targets")
    result = resolve(made(tmp_path / "result", steps))
    ranks = {slot: kind.r for slot, kind in result.tuning().slots.items() if isinstance(kind, LoRASlot)}
    assert {ranks[f"model.layers.1.self_attn.{which}.adapter"] for which in ("q_proj", "v_proj")} == {5}
    assert ranks["model.layers.1.self_attn.o_proj.adapter"] == 2
    assert all(isinstance(kind, LoRASlot) and kind.alpha == kind.r for kind in result.tuning().slots.values())
    assert result.manifest is not None and result.manifest.options["r"] == 2


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_recorded_means_what_is_stored(tmp_path: Path, name: str) -> None:
    """The options of the manifest, given to `finetune lora`, are the adapter in the file: training can go on from it."""
    from litlora.methods import stored_tuning

    _, steps = pair(tmp_path, name)
    result = resolve(made(tmp_path / "result", steps))
    assert result.manifest is not None and verify_files(result.path, result.manifest) == []
    meant = stored_tuning(LoRAOptions(**result.manifest.options), result.config())
    assert meant == result.tuning()
    with SafetensorsFile(result.adapter_file()) as file:
        assert {name: info.shape for name, info in file.tensors.items()} == meant.file_shapes(result.config())


@pytest.mark.parametrize("name", ["other ranks and alphas", "patterns", "three"])
def test_a_smaller_rank_is_the_best_there_is_and_says_what_it_costs(tmp_path: Path, name: str) -> None:
    """Eckart-Young: the error is what numpy's SVD of the whole fp64 update leaves, by module, and is reported. (Mutation: the factors of
    the wrong side's QR.)"""
    base, steps = pair(tmp_path, name)
    result = made(tmp_path / "result", steps, rank=2)
    report = json.loads((result / names.COMBINE_REPORT).read_text())["result"]
    start, found = weights_of(base, base), weights_of(result, base)
    wanted = summed(start, [weights_of(step, base) for step in steps], [1 / len(steps)] * len(steps))
    lost = kept = 0.0
    for module, cost in report["modules"].items():
        update = wanted[f"{module}.weight"] - start[f"{module}.weight"]
        values = np.linalg.svd(update, compute_uv=False)
        tail = math.sqrt(float(np.square(values[2:]).sum()) / float(np.square(values).sum()))
        stored = found[f"{module}.weight"] - start[f"{module}.weight"]
        assert cost["relative_error"] == pytest.approx(tail, rel=1e-5, abs=1e-6)
        assert np.linalg.norm(stored - update) / np.linalg.norm(update) == pytest.approx(tail, rel=1e-4, abs=1e-6)
        assert cost["energy_kept"] == pytest.approx(1 - tail**2, abs=1e-6)
        assert np.linalg.matrix_rank(stored, tol=1e-5) <= 2
        lost, kept = lost + float(np.square(values[2:]).sum()), kept + float(np.square(values).sum())
    assert report["relative_error"] == pytest.approx(math.sqrt(lost / kept), rel=1e-5)


def test_a_rank_that_is_large_enough_costs_nothing(tmp_path: Path) -> None:
    _, steps = pair(tmp_path, "other ranks and alphas")
    exactly, large = made(tmp_path / "exactly", steps), made(tmp_path / "large", steps, rank=100)
    assert tensors_in(exactly) == tensors_in(large)
    assert json.loads((large / names.COMBINE_REPORT).read_text())["result"]["relative_error"] == 0


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 12), into=st.integers(1, 12), ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3), rank=st.integers(1, 16))
def test_factors_are_stacked_and_shortened_in_every_shape(out: int, into: int, ranks: list[int], rank: int) -> None:
    """Ranks above either side of the matrix, too."""
    random = np.random.default_rng(out * 1000 + into)
    factors = [(random.normal(size=(out, r)).astype(np.float32), random.normal(size=(r, into)).astype(np.float32)) for r in ranks]
    weights = [0.5, -2.0, 1.25][: len(ranks)]
    update = sum(w * b.astype(np.float64) @ a.astype(np.float64) for w, (b, a) in zip(weights, factors, strict=True))
    b, a = stacked(factors, weights)
    assert np.allclose(b.astype(np.float64) @ a, update, atol=1e-5)
    values = np.linalg.svd(update, compute_uv=False)
    for (left, right), cut in (shortened((b, a), rank), factored(np.asarray(update, np.float32), rank)):
        assert left.shape[1] == right.shape[0] <= min(rank, out, into)
        assert cut.lost == pytest.approx(float(np.square(values[rank:]).sum()), rel=1e-3, abs=1e-4)
        assert np.linalg.norm(left.astype(np.float64) @ right - update) == pytest.approx(math.sqrt(cut.lost), rel=1e-2, abs=1e-3)


# ---- what changes nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_an_average_of_one_and_the_ends_of_an_interpolation_are_the_parents_byte_for_byte(tmp_path: Path, name: str) -> None:
    """(Mutation: a parent with weight 0 is stacked as zeros.)"""
    base, steps = pair(tmp_path, name)
    first, second = tensors_in(steps[0]), tensors_in(steps[1])
    assert tensors_in(made(tmp_path / "one", steps[:1])) == first
    assert tensors_in(made(tmp_path / "t0", steps[:2], "interpolate", t=0.0)) == first
    assert tensors_in(made(tmp_path / "t1", steps[:2], "interpolate", t=1.0)) == second
    assert tensors_in(made(tmp_path / "sum", steps[:2], "weighted_sum", weights=[0.0, 1.0])) == second
    assert_close(weights_of(tmp_path / "t0", base), weights_of(steps[0], base))
    assert resolve(tmp_path / "t1").tuning() == resolve(steps[1]).tuning()


@pytest.mark.parametrize("how", ["average", "ties", "dare", "dare_ties"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_order_of_the_parents_does_not_matter(tmp_path: Path, how: str, whole: bool) -> None:
    """What DARE drops of a parent is that parent's own. (Mutation: its choice keyed by the parent's number.)"""
    base, steps = pair(tmp_path, "three")
    there = made(tmp_path / "there", steps, how, weights=[1.0, 2.0, 3.0], whole=whole)
    back = made(tmp_path / "back", steps[::-1], how, weights=[3.0, 2.0, 1.0], whole=whole)
    assert_close(weights_of(there, base), weights_of(back, base), 1e-6)


def test_an_average_over_steps_is_the_closed_form_of_the_recurrence(tmp_path: Path) -> None:
    """theta <- d theta + (1 - d) theta_k, from the first step on. (Mutation: the first step gets (1 - d) d^(n-1).)"""
    base = base_of(tmp_path / "base", "llama3")
    steps = steps_on(tmp_path, base, [ALL, ALL, ALL, ALL])
    parents = [weights_of(step, base) for step in steps]
    moving = parents[0]
    for one in parents[1:]:
        moving = {name: 0.7 * moving[name] + 0.3 * one[name] for name in moving}
    assert_close(weights_of(made(tmp_path / "result", steps, "ema", decay=0.7), base), moving)
    assert tensors_in(made(tmp_path / "last", steps, "ema", decay=0.0)) == tensors_in(steps[-1])


# ---- TIES and DARE ---------------------------------------------------------------------------------------------------


def plain_ties(start: np.ndarray, parents: Sequence[np.ndarray], weights: Sequence[float], density: float, scale: float) -> np.ndarray:
    """arXiv:2306.01708, algorithm 1, one number after another."""
    updates = [(one - start).reshape(-1) for one in parents]
    for update in updates:
        kept = max(1, int(density * update.size))
        update[np.argsort(np.abs(update), kind="stable")[: update.size - kept]] = 0
    result = np.zeros(start.size)
    for place in range(start.size):
        numbers = [update[place] for update in updates]
        sign = 1 if sum(w * number for w, number in zip(weights, numbers, strict=True)) >= 0 else -1
        agreeing = [(w, number) for w, number in zip(weights, numbers, strict=True) if number * sign > 0]
        if agreeing:
            result[place] = sum(w * number for w, number in agreeing) / sum(w for w, _ in agreeing)
    return start + scale * result.reshape(start.shape)


@pytest.mark.parametrize("name", ["other targets", "norms whole in one", "three", "a separate head in one"])
def test_ties_is_the_papers_algorithm(tmp_path: Path, name: str) -> None:
    """Of a whole model exactly; of an adapter as far as its rank goes, which is reported. (Mutations: the sign elected without
    weights; the mean over all parents instead of those that agree; trimming keeps the smallest.)"""
    base, steps = pair(tmp_path, name)
    weights = [1.0, 0.5, 2.0][: len(steps)]
    options: dict[str, Any] = {"weights": weights, "density": 0.3, "scale": 0.8}
    whole = with_head(weights_of(made(tmp_path / "whole", steps, "ties", whole=True, **options), base)) if "separate" not in name else None
    start, parents = with_head(weights_of(base, base)), [with_head(weights_of(step, base)) for step in steps]
    wanted = {}
    for tensor in start:  # of a parent that did not train it, every number is as it was
        if all(np.array_equal(one[tensor], start[tensor]) for one in parents):
            wanted[tensor] = start[tensor]
        else:
            wanted[tensor] = plain_ties(start[tensor], [one[tensor] for one in parents], weights, 0.3, 0.8)
    if whole is not None:
        assert_close(whole, wanted, 3e-5)  # numbers that tie with another one to fp32 may be trimmed instead
    result = made(tmp_path / "adapter", steps, "ties", rank=1000, **options)
    assert_close(with_head(weights_of(result, base)), wanted, 3e-5)
    short = made(tmp_path / "short", steps, "ties", rank=2, **options)
    report = json.loads((short / names.COMBINE_REPORT).read_text())["result"]
    found = with_head(weights_of(short, base))
    for module, cost in report["modules"].items():
        update = wanted[f"{module}.weight"] - start[f"{module}.weight"]
        error = np.linalg.norm(found[f"{module}.weight"] - wanted[f"{module}.weight"]) / np.linalg.norm(update)
        assert cost["relative_error"] == pytest.approx(error, rel=1e-3, abs=1e-4)


def trimmed(update: np.ndarray, density: float, rows: int) -> np.ndarray:
    """What TIES keeps of an update that comes so many rows at a time."""
    blocks = [update[row : row + rows] for row in range(0, len(update), rows)]
    trim = trimming(lambda: iter(blocks), update.size, density)
    return np.concatenate([trim(block) for block in blocks])


def test_the_steps_of_ties_on_numbers_one_can_check_by_hand() -> None:
    update = np.array([[3.0, -1.0], [0.5, -4.0]])
    assert trimmed(update, 0.5, 2).tolist() == [[3.0, 0.0], [0.0, -4.0]]
    assert trimmed(update, 1.0, 2).tolist() == update.tolist()
    one, other = np.array([2.0, -1.0, 0.0, 1.0]), np.array([4.0, 3.0, 0.0, -1.0])
    assert elected([one, other], [1.0, 1.0]).tolist() == [3.0, 3.0, 0.0, 1.0]  # a sum of zero elects plus, as PEFT does
    assert elected([one, other], [4.0, 1.0]).tolist() == [2.4, -1.0, 0.0, 1.0]


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.999])
@pytest.mark.parametrize("kind", ["normal", "tiny", "many alike", "zeros"])
def test_ties_keeps_the_largest_numbers_without_sorting_them(kind: str, density: float, rows: int) -> None:
    """Against a sort, in blocks of any size. Caught: counting from below; all kept that are as large as the
    least kept; as many of them in every block."""
    normal = np.random.default_rng(3).normal(size=(300, 20)).astype(np.float32)
    kinds = {"normal": normal, "tiny": normal * np.float32(1e-40), "many alike": np.round(normal), "zeros": np.where(normal > 2, normal, 0)}
    update = kinds[kind].astype(np.float32)
    found, kept = trimmed(update, density, rows), max(1, int(density * update.size))
    order = np.argsort(-np.abs(update).reshape(-1), kind="stable")[:kept]
    wanted = np.zeros(update.size, np.float32)
    wanted[order] = update.reshape(-1)[order]
    assert np.array_equal(found.reshape(-1), wanted)


def test_dare_keeps_its_share_and_the_expectation() -> None:
    """(Mutation: no rescaling.)"""
    update = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)

    def dropped(key: str, rows: int = 300) -> np.ndarray:
        drop = dropping(0.25, key)
        return np.concatenate([drop(update[row : row + rows]) for row in range(0, 300, rows)])

    found = dropped("a key")
    kept = found != 0
    assert 0.24 < kept.mean() < 0.26
    assert np.array_equal(found[kept], update[kept] / np.float32(0.25))
    assert np.array_equal(found, dropped("a key", rows=7)), "the same in blocks of any size"
    assert not np.array_equal(found, dropped("another key"))
    mean = np.mean([dropped(str(number)) for number in range(200)], axis=0)
    assert np.linalg.norm(mean - update) / np.linalg.norm(update) < 0.15  # sqrt(3 / 200)


@pytest.mark.parametrize("whole", [False, True])
def test_dare_that_drops_nothing_is_the_weighted_sum(tmp_path: Path, whole: bool) -> None:
    base, steps = pair(tmp_path, "other targets")
    found = weights_of(made(tmp_path / "dare", steps, "dare", density=1.0, weights=[0.5, -1.0], whole=whole), base)
    assert_close(found, weights_of(made(tmp_path / "sum", steps, "weighted_sum", weights=[0.5, -1.0]), base), 2e-6)


def test_dare_depends_on_its_seed_alone(tmp_path: Path) -> None:
    _, steps = pair(tmp_path, "the same twice")
    first, again = (made(tmp_path / name, steps, "dare", seed=7) for name in ("first", "again"))
    assert tensors_in(first) == tensors_in(again)
    assert tensors_in(first) != tensors_in(made(tmp_path / "other", steps, "dare", seed=8))


# ---- other methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("how", ["average", "weighted_sum", "ties"])
def test_what_was_trained_whole_is_combined_number_by_number(tmp_path: Path, name: str, how: str) -> None:
    """LLaMA-Pro's new blocks relative to what they began as, frozen layers relative to the base. (Mutation: the start of a new block's
    last projections is its neighbour's.)"""
    family, options = SAME[name]
    base = base_of(tmp_path / "base", family)
    steps = steps_on(tmp_path, base, [options, options])
    weights = [0.5, 0.5] if how == "average" else [0.75, 0.5]
    result = made(
        tmp_path / "result", steps, how, **({} if how == "average" else {"weights": weights}), **({"density": 0.4} if how == "ties" else {})
    )
    start, parents = start_of(tmp_path, base, options), [weights_of(step, base) for step in steps]
    if how == "ties":
        wanted = {t: plain_ties(start[t], [one[t] for one in parents], weights, 0.4, 1.0) for t in start}
    else:
        wanted = summed(start, parents, weights)
    assert_close(weights_of(result, base), wanted)
    assert resolve(result).tuning() == resolve(steps[0]).tuning()


UNLINEAR = {
    "DoRA": LoRAOptions(r=2, alpha=4, use_dora=True),
    "series": AdapterOptions(kind="series", width=4),
    "parallel": AdapterOptions(kind="parallel", width=4, positions="mlp"),
    "prompt": AdapterOptions(kind="prompt", length=3),
    "scales and shifts": scale_shift(),
}


def any_tensors(options: Any, base: Path, seed: int) -> Tensors:
    config, tuning = Checkpoint(base, "base").config(), tuning_of(options, base)
    random = np.random.default_rng(seed)
    return {
        name: ("F32", shape, 1 + random.normal(size=shape).astype(np.float32) * 0.1) for name, shape in tuning.file_shapes(config).items()
    }


@pytest.mark.parametrize("name", UNLINEAR)
def test_what_is_not_linear_gets_the_mean_of_its_parameters_or_nothing(tmp_path: Path, name: str) -> None:
    options = UNLINEAR[name]
    base = base_of(tmp_path / "base", "llama")
    tensors = [any_tensors(options, base, seed) for seed in (1, 2)]
    steps = [step_of(tmp_path / f"run{number}", base, options, one) for number, one in enumerate(tensors)]
    for path in steps:  # prompts of PEFT's own form need their config
        assert resolve(path).tuning()
    result = made(tmp_path / "result", steps, "interpolate", t=0.25)
    with SafetensorsFile(resolve(result).adapter_file()) as file:
        for tensor in file.tensors:
            one, other = (np.asarray(of[tensor][2]).astype(np.float64) for of in tensors)
            assert np.allclose(file.float32(tensor), 0.75 * one + 0.25 * other, rtol=1e-6)
    if name == "scales and shifts":
        made(tmp_path / "sum", steps, "weighted_sum")
        return
    with pytest.raises(UserError, match="not linear in its parameters"):
        made(tmp_path / "sum", steps, "weighted_sum")
    assert not (tmp_path / "sum").exists()


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_models_are_averaged_tensor_by_tensor(tmp_path: Path, dtype: str, shards: int) -> None:
    """(Mutation: the sum is rounded to the stored dtype parent by parent.)"""
    models = [make_base(tmp_path / f"model{seed}", dtype, shards=shards, seed=seed) for seed in (0, 1)]
    result = made(tmp_path / "result", models, "interpolate", t=0.25)
    found, (one, other) = read(result), (read(model) for model in models)
    assert found.keys() == one.keys() and sorted(p.name for p in result.glob("*.safetensors")) == sorted(
        p.name for p in models[0].glob("*.safetensors")
    )
    for name, (stored, values, _) in found.items():
        assert stored == dtype
        wanted = 0.75 * one[name][1] + 0.25 * other[name][1]
        assert np.all(np.abs(values - wanted) <= (2.0**-24 if dtype == "F32" else 2.0**-8 * (1 + 1e-6)) * np.abs(wanted)), name
    assert resolve(result).is_model and resolve(result).config() == resolve(models[0]).config()
    assert read(made(tmp_path / "one", models[:1])).keys() == one.keys()
    assert all(read(tmp_path / "one")[name][2] == one[name][2] for name in one)


@pytest.mark.parametrize("how", ["weighted_sum", "ties", "dare"])
def test_updates_of_models_are_relative_to_the_base_that_is_named(tmp_path: Path, how: str) -> None:
    base, *models = (make_base(tmp_path / f"model{seed}", seed=seed) for seed in range(3))
    with pytest.raises(UserError, match="--base_dir"):
        made(tmp_path / "result", models, how)
    options: dict[str, Any] = {} if how == "weighted_sum" else {"density": 0.3 if how == "ties" else 1.0}
    result = made(tmp_path / "result", models, how, base_dir=base, weights=[0.5, 0.25], **options)
    start, parents = weights_of(base, base), [weights_of(model, base) for model in models]
    if how == "ties":
        wanted = {t: plain_ties(start[t], [one[t] for one in parents], [0.5, 0.25], 0.3, 1.0) for t in start}
    else:
        wanted = summed(start, parents, [0.5, 0.25])
    assert_close(weights_of(result, base), wanted)


@pytest.mark.parametrize("name", ["patterns", "a shared head in both", "norms whole in one"])
def test_a_whole_result_is_what_merging_the_adapter_gives(tmp_path: Path, name: str) -> None:
    _, steps = pair(tmp_path, name)
    whole = read(made(tmp_path / "whole", steps, whole=True))
    from_adapter = read(merged(made(tmp_path / "adapter", steps), tmp_path / "merged"))
    assert_close({name: values for name, (_, values, _) in whole.items()}, {name: values for name, (_, values, _) in from_adapter.items()})


def test_dora_is_combined_through_the_models_it_makes(tmp_path: Path) -> None:
    options = UNLINEAR["DoRA"]
    base = base_of(tmp_path / "base", "llama")
    steps = steps_on(tmp_path, base, [options, replace(options, r=3)])  # type: ignore[type-var]
    with pytest.raises(UserError, match="is built otherwise") as caught:
        made(tmp_path / "result", steps)
    assert "--whole" in caught.value.hint
    result = made(tmp_path / "result", steps, whole=True)
    assert_close(weights_of(result, base), summed(weights_of(base, base), [weights_of(step, base) for step in steps], [0.5, 0.5]), 1e-6)


def test_a_whole_result_may_have_another_dtype(tmp_path: Path) -> None:
    _, steps = pair(tmp_path, "the same twice")
    result = made(tmp_path / "result", steps, whole=True, dtype="float16")
    assert {dtype for dtype, _, _ in read(result).values()} == {"F16"}
    assert json.loads((result / names.CONFIG).read_text())["torch_dtype"] == "float16"
