"""Bases in few bits: the code book, what rounding costs, and that a model of them computes what its few bits stand for.

The oracle is an ordinary model whose weights are those few bits, made wide. Mutations seen to fail stand in docstrings, after "Caught:".
"""

import copy
import hashlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, kept_for_backward, random_tokens, relative, tiny_gpt
from safetensors.torch import load_file, save_file
from talkers import make_talker
from test_merge import exact, half_unit, read
from test_native import decoded, needs_native
from test_promises import CASES, learnt
from test_saving import weights_of
from test_saving import words as words_of
from torch import Tensor

import litlora
from litlora import cpu
from litlora import quantized as few
from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.manifest import read_manifest
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.weights import base_tensors, load_base, load_model, quantize_meant
from litlora.errors import UserError
from litlora.methods import tuning_of
from litlora.methods.attach import (
    add,
    as_base,
    attach,
    blocks,
    linears,
    merge,
    numbers_in,
    put_back,
    snapshot,
    trainable,
    tuned_state,
    widen,
)
from litlora.methods.tuning import HEAD, Tuning
from litlora.model import GPT
from litlora.options import FullOptions, LoRAOptions
from litlora.quantized import KINDS, NF4, Int8, Quantized, hold, quantized

kinds = pytest.mark.parametrize("kind", list(KINDS))
WIDEST = (1 - 0.6961928009986877) / 2  # the farthest that a number lies from its code in NF4: between the two lowest


def weight_of(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def words(talker: tuple[Path, Path], out: Path, method: str = "lora", more: str = "") -> list[str]:
    """`litlora finetune`, 12 small steps, a commit every 4."""
    start, _, *rest = words_of(talker, out, "full", more)
    return [start, method, *rest]


def in_few_bits(model: GPT, kind: str, wide: tuple[str, ...] = ()) -> tuple[GPT, GPT]:
    """The model with its blocks' weights in few bits, and an ordinary one of what these stand for."""
    for name, host in linears(model).items():
        if name != "lm_head" and f"{name}.weight" not in wide:
            hold(host, quantized(kind, host.weight.detach()))
    plain = copy.deepcopy(model)
    for host in linears(plain).values():
        if host.quantized is not None:
            hold(host, None)
    return model, plain


# ---- the numbers -----------------------------------------------------------------------------------------------------


def test_the_code_book_is_the_papers() -> None:
    """arXiv:2305.14314, section 3 and appendix E: quantiles of a normal distribution, 0 among them. Caught: a digit changed."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2  # 0.9677083, as the authors chose it
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((above, below, torch.zeros(1))).sort().values
    assert len(NF4) == 16 and NF4[7] == 0
    assert (values / values.max() - torch.tensor(NF4)).abs().max() < 1e-6


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


# What bitsandbytes 0.50.2 makes on a CPU of three weights drawn one after the other: codes, scales, wide, wide by way of nf4-dq.
BITSANDBYTES = [
    ((64, 128), torch.float32, "53cf813e1a32cc03", "300c46dd3c6e0847", "50c2facb553223db", "7de3f99fa79def56"),
    ((64, 128), torch.bfloat16, "f6a547fb8466c0b7", "16dd6c3292d1ae3f", "ad6b015d6f7d893d", "3901199876225d24"),
    ((7, 40), torch.float32, "8194c374edb8330a", "5964e976efd92ca3", "9ef0bb68b976d3e9", "28d6dbd2c0b3a2e7"),
]


@pytest.mark.parametrize("at_once", [2**20, 64 * 40])
def test_nf4_is_bit_for_bit_what_bitsandbytes_makes(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also cut into several parts, and where blocks of 64 go over the ends of rows. Caught: low half of a byte first; the last block of
    a part left out."""
    monkeypatch.setattr(few, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(5)
    for shape, dtype, codes, scales, wide, twice in BITSANDBYTES:
        weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        made = quantized("nf4", weight)
        assert (digest(made.get_parameter("codes").data), digest(made.scales.data)) == (codes, scales)
        assert digest(made.wide().to(dtype).float()) == wide
        assert digest(quantized("nf4-dq", weight).wide().to(dtype).float()) == twice
    assert digest(few.table(few.eight_bit(), torch.device("cpu"))) == "e732639a65f497b4"


def test_the_nearest_code_is_found_on_both_sides_of_every_midpoint() -> None:
    """Caught: parts that begin half a part later."""
    middles = few.midpoints(NF4, torch.device("cpu"))
    close = [middles, *(torch.nextafter(middles, torch.full_like(middles, way)) for way in (-2.0, 2.0))]
    edges = torch.arange(-128, 129) / 128
    close += [edges, *(torch.nextafter(edges, torch.full_like(edges, way)) for way in (-2.0, 2.0)), torch.rand(2**16) * 2 - 1]
    numbers = torch.cat(close).clamp(-1, 1)
    assert torch.equal(few.nearest(numbers).long(), torch.bucketize(numbers, middles))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 128), (31, 40), (3, 7)])
def test_no_number_is_farther_from_its_few_bits_than_half_a_gap(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The scale is the largest number's, by row or by block of 64. Caught: rounding down; one scale for all."""
    weight = weight_of(*shape, dtype).float()
    made = quantized(kind, weight.to(dtype))
    error = (made.wide() - weight).abs()
    assert error.max() > 0 or (kind, dtype) == ("bf16", torch.bfloat16)
    if kind == "bf16":
        assert (error <= weight.abs() * 2.0**-8 * (dtype != torch.bfloat16)).all()
        return
    if kind == "int8":
        assert (error <= weight.abs().amax(1, keepdim=True) / 127 * 0.5 * (1 + 1e-5)).all()
        return
    blocks_of = few.in_blocks(weight, 64).abs().amax(1)
    scales = blocks_of.repeat_interleave(64)[: weight.numel()].view(shape)
    slack = 0.0 if kind == "nf4" else float((blocks_of - blocks_of.mean()).abs().max()) * 0.015  # the eight bits' own half gap at the top
    assert (error <= scales * WIDEST * (1 + 1e-5) + slack).all()


@kinds
def test_what_few_bits_stand_for_has_the_same_few_bits(kind: str) -> None:
    """Nothing is lost twice; zeros stay zeros. Caught: a scale that is no number of the row; zeros divided by their
    scale."""
    weight = weight_of(16, 64)
    weight[3] = 0
    once = quantized(kind, weight)
    assert (once.wide()[3] == 0).all()
    again = quantized(kind, once.wide())
    assert torch.equal(again.get_parameter("codes"), once.get_parameter("codes"))
    assert relative(again.wide(), once.wide()) <= (2e-3 if kind == "nf4-dq" else 1e-6)  # the scales' mean is another one


@pytest.mark.parametrize(
    ("kind", "bits"), [("bf16", 16), ("int8", 8 + 32 / 1024), ("nf4", 4.5), ("nf4-dq", 4 + 8 / 64 + 32 / 64 / 256 + 32 / 2**20)]
)
def test_so_many_bits_a_weight_are_kept_and_no_more(kind: str, bits: float) -> None:
    """C2. Caught: scales kept in fp64."""
    made = quantized(kind, weight_of(1024, 1024))
    assert made.nbytes * 8 == bits * 2**20
    for shape in ((1024, 1024), (7, 40), (33, 65)):
        assert few.bytes_of(kind, *shape) == quantized(kind, weight_of(*shape)).nbytes
    assert made.nbytes == sum(tensor.nbytes for tensor in made.state_dict().values()) and not list(made.buffers())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bf16"])  # where one number spoils no other
def test_numbers_that_are_none_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    """Caught: the check left out."""
    for bad in (math.nan, math.inf):
        weight = weight_of(4, 64)
        weight[2, 5] = bad
        with pytest.raises(UserError, match="not finite") as refused:
            quantized(kind, weight, "somewhere: q_proj")
        assert "somewhere: q_proj" in str(refused.value)


# ---- the model -------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_are_those_of_what_the_few_bits_stand_for(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family, weights in one part and in several. Caught: a bias left out; another part's rows; in int8 another row's
    scale."""
    monkeypatch.setattr(cpu, "FEW", 0)  # an expert's few tokens would be rounded to bf16
    model, plain = in_few_bits(tiny_gpt(family), kind)
    tokens = random_tokens(2, 17)
    with torch.no_grad():
        wanted = plain(tokens)
        assert relative(model(tokens), wanted) <= 1e-5
        assert relative(wanted, tiny_gpt(family)(tokens)) > 1e-4  # it is another model
        monkeypatch.setattr(few, "AT_ONCE", 64 * 9)
        assert relative(model(tokens), wanted) <= 1e-5


ALL = [(name, case.families[0]) for name, case in CASES.items() if not isinstance(case.options, FullOptions)]


@kinds
@pytest.mark.parametrize(("case", "family"), ALL)
def test_what_learns_gets_the_gradients_that_it_gets_beside_wide_weights(case: str, family: str, kind: str) -> None:
    """N01 for few bits, every method, in fp64. Caught: the way back without the scales; a block's copy in few bits, which
    cannot learn."""
    options, changes = CASES[case].options, CASES[case].changes
    base = tiny_gpt(family, **changes).double()  # in fp32 the last layer's rounding is larger than a mistake might be
    stored = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    tuning = tuning_of(options, base.config)
    models = in_few_bits(base, kind, tuning.whole)
    tokens, found = random_tokens(2, 19), []
    for model in models:
        attach(model, tuning, seed=1, stored=stored)
        found.append({name: parameter.detach().clone() for name, parameter in trainable(model).items()})
        learnt(model)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    (ours, theirs), (start, their_start) = (trainable(model) for model in models), found
    assert ours.keys() == theirs.keys() != {}
    for name, parameter in ours.items():
        assert torch.equal(start[name], their_start[name]), f"{name} starts elsewhere"
        assert parameter.grad is not None and relative(parameter.grad, theirs[name].grad) <= 1e-5, name  # type: ignore[arg-type]
    held = [host for host in linears(models[0]).values() if host.quantized is not None]
    assert held and not any(parameter.requires_grad for host in held for parameter in host.quantized.parameters())  # type: ignore[union-attr]


@kinds
def test_no_wide_copy_outlives_its_product(kind: str) -> None:
    """C2: neither for the backward pass nor afterwards. Caught: the product left to autograd, which keeps the wide weight."""
    model, _ = in_few_bits(tiny_gpt("llama"), kind)
    attach(model, tuning_of(CASES["lora"].options, model.config), seed=1)
    shapes = {shape for host in linears(model).values() if host.quantized for shape in ((host.out_features, host.in_features),)}
    tokens = random_tokens(2, 19)
    before = {id(tensor) for tensor in model.parameters()}
    with kept_for_backward() as held:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    kept = [tuple(tensor.shape) for tensor in held]
    assert kept and not [shape for shape in kept if shape in shapes or shape[::-1] in shapes]
    assert {id(tensor) for tensor in model.parameters()} == before and not list(model.buffers())


@kinds
def test_wide_rows_lie_in_one_place_of_each_thread(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C2: what comes and goes beside tensors that stay leaves no holes. The gradients are right where two threads compute at once.
    Caught: room that threads share; new memory for each product."""
    monkeypatch.setattr(few, "AT_ONCE", 4096)
    held, x = quantized(kind, torch.randn(96, 128)), torch.randn(40, 128)
    places: dict[int, set[int]] = {}
    honest = few.room

    def noted(*shape: Any) -> Tensor:
        found = honest(*shape)
        places.setdefault(threading.get_ident(), set()).add(found.untyped_storage().data_ptr())
        return found

    monkeypatch.setattr(few, "room", noted)
    barrier = threading.Barrier(2, timeout=60)

    def learn(factor: float) -> list[Tensor]:
        barrier.wait()
        found = []
        for _ in range(50):
            into = (factor * x).requires_grad_()
            y = held(into)
            found += [y, *torch.autograd.grad(y.square().sum(), into)]
        return found

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(learn, (1.0, -3.0)))
    wide = held.wide()
    for factor, found in zip((1.0, -3.0), results, strict=True):
        y = factor * x @ wide.t()
        for each, right in zip(found, [y, 2 * y @ wide] * 50, strict=True):
            torch.testing.assert_close(each.detach(), right, atol=1e-3, rtol=1e-4)
    assert len(places) == 2 and all(len(each) == 1 for each in places.values()) and not set.intersection(*places.values())


def test_few_rows_in_int8_are_as_near_as_bf16_and_many_are_exact(without_kernels_of_ours: None) -> None:
    """C3: torch's own product for the tokens of an answer rounds what goes in and what comes out to bf16: 2^-8 of the sum of what is added.
    Caught: the rounded product while training; torch's product for rows of every length."""
    weight = weight_of(300, 256)
    made = quantized("int8", weight)
    assert isinstance(made, Int8)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = x @ made.wide().t()
        assert relative(made(x), wanted) <= 1e-6
        near = made(x[:4])
        assert ((near - wanted[:4]).abs() <= 2.0**-8 * (x[:4].abs() @ made.wide().abs().t())).all()
        assert relative(near, wanted[:4]) <= 4e-3
        odd = quantized("int8", weight[:, :100].clone())  # torch's product would read beyond the weight's end, and crash
        assert relative(odd(x[:4, :100]), x[:4, :100] @ odd.wide().t()) <= 1e-6
    assert relative(made(x[:4].requires_grad_()), wanted[:4]) <= 1e-6  # while training


def test_a_base_in_bf16_is_held_as_it_is_stored(without_kernels_of_ours: None) -> None:
    """C2: without a copy, and exactly. Many rows, and those of a training, are computed in fp32, few are rounded to bf16. Caught: a copy;
    rows of a training rounded."""
    weight = weight_of(300, 256, torch.bfloat16)
    made = quantized("bf16", weight)
    assert made.codes.data_ptr() == weight.data_ptr() and torch.equal(made.wide(), weight.float())
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = x @ weight.float().t()
        assert relative(made(x), wanted) <= 1e-6
        assert 0 < relative(made(x[:2]), wanted[:2]) <= 4e-3
    assert relative(made(x[:2].requires_grad_()), wanted[:2]) <= 1e-6  # while training


def test_scales_of_rows_are_not_rounded_where_few_rows_are_computed(without_kernels_of_ours: None) -> None:
    """A scale rounded to bf16 would be off by up to 0.4%, the same way for every token. Caught: scales rounded."""
    made = quantized("int8", weight_of(64, 64))
    ones = torch.ones(1, 64)
    with torch.no_grad():
        exactly = made.wide().double().sum(1)
        rounded = (made.get_parameter("codes").double().sum(1)).bfloat16().double() * made.scales.double()
        assert torch.allclose(made(ones)[0].double(), rounded, rtol=1e-6) and not torch.equal(rounded, exactly)


def test_a_model_in_few_bits_counts_moves_and_refuses_as_a_wide_one(tmp_path: Path) -> None:
    """A06: merged in memory is refused, and so is training what cannot learn. Caught: each refusal
    left out; few bits that are not counted."""
    wide = tiny_gpt("llama")
    model, _ = in_few_bits(copy.deepcopy(wide), "nf4")
    assert numbers_in(model) == numbers_in(wide) == sum(parameter.numel() for parameter in wide.parameters())
    for options in (CASES["full"].options, CASES["freeze"].options):
        with pytest.raises(UserError, match="is held in nf4, and here it is trained whole"):
            attach(model, tuning_of(options, model.config), seed=1)
        assert model.plain is None
    trained_wide = copy.deepcopy(wide)
    tuning = tuning_of(CASES["freeze"].options, wide.config)
    attach(trained_wide, tuning, seed=1)
    with pytest.raises(UserError, match="is held in nf4"):
        add(model, tuning, tuned_state(learnt(trained_wide), tuning, wide.config))
    attach(model, tuning_of(CASES["lora"].options, model.config), seed=1)
    with pytest.raises(UserError, match="merging goes into the original weights"):
        merge(model)
    assert model.to("cpu") is model and all(host.quantized is not None for name, host in linears(model).items() if name != "lm_head")


@kinds
def test_adapters_come_off_again_and_leave_the_few_bits(kind: str) -> None:
    """Compare and /adapter in chat. Caught: an adapter that is left in its slot."""
    model, plain = in_few_bits(tiny_gpt("llama"), kind)
    tokens, config = random_tokens(1, 18), model.config
    tuning = tuning_of(CASES["lora"].options, config)
    attach(plain, tuning, seed=1)
    state = tuned_state(learnt(plain), tuning, config)
    with torch.no_grad():
        before = model(tokens)
        add(model, tuning, state)
        assert relative(model(tokens), plain(tokens)) <= 1e-5
        with as_base(model):
            assert torch.equal(model(tokens), before)
        assert relative(model(tokens), plain(tokens)) <= 1e-5


# ---- from files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def talker(tmp_path: Path) -> tuple[Path, Path]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Name a colour, {n}.", "output": "blue" * (n % 4 + 1)}) + "\n" for n in range(24)))
    return make_talker(tmp_path / "base"), rows


@kinds
def test_loading_makes_the_same_few_bits_and_keeps_the_rest(kind: str, tmp_path: Path) -> None:
    """Embedding, head, norms and what is named stay wide. Caught: the head too; `wide` ignored; a refusal that does not name
    the tensor."""
    base = resolve(make_talker(tmp_path / "base"))
    stays = "model.layers.1.mlp.up_proj.weight"
    model, wide = load_base(base, quantize=kind, wide={stays}), load_base(base)
    for name, parameter in wide.named_parameters():
        module = name.rpartition(".")[0]
        held = getattr(model.get_submodule(module), "quantized", None)
        if held is None:
            assert torch.equal(model.get_parameter(name), parameter), name
        else:
            assert torch.equal(held.wide(), quantized(kind, parameter.detach()).wide())
    counted = sum(isinstance(module, Quantized) for module in model.modules())
    assert counted == 2 * 7 - 1 and model.get_parameter(stays) is not None
    if kind == "bf16":  # a number that is none spoils no other, and stays what it is
        return
    broken = make_talker(tmp_path / "broken")
    raw = bytearray((broken / names.WEIGHTS).read_bytes())
    size = int.from_bytes(raw[:8], "little")
    start = json.loads(raw[8 : 8 + size])["model.layers.0.self_attn.q_proj.weight"]["data_offsets"][0]
    raw[8 + size + start : 8 + size + start + 4] = np.float32("nan").tobytes()
    (broken / names.WEIGHTS).write_bytes(raw)
    with pytest.raises(UserError, match="not finite") as refused:
        load_base(resolve(broken), quantize=kind)
    assert "model.layers.0.self_attn.q_proj.weight" in str(refused.value)


@pytest.mark.parametrize("saved", [[], ["embed_tokens"]])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_an_embedding_that_is_looked_up_stays_as_it_is_stored(saved: list[str], quantize: str, tmp_path: Path) -> None:
    """C2: in bf16, in the map of its file, where it is no head and does not learn; all else is as wide as was asked, and loss and
    gradients are the same to the bit. Caught: rows in bf16 that are not made wide; an embedding that learns in bf16; a tied one."""
    path = make_talker(tmp_path / "base")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path / names.WEIGHTS).items()}, path / names.WEIGHTS)
    base, tokens, found = resolve(path), random_tokens(2, 19), []
    options = LoRAOptions(r=2, modules_to_save=saved)
    for looked_up in (True, False):
        tuning = tuning_of(options, base.config())
        model = load_base(base, torch.float32, quantize=quantize, wide=tuning.whole, looked_up=looked_up)
        stored = looked_up and not saved
        assert model.model.embed_tokens.weight.dtype == (torch.bfloat16 if stored else torch.float32)
        assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.float32
        attach(model, tuning, seed=1, stored=base_tensors(base))
        assert all(parameter.dtype == torch.float32 for parameter in trainable(model).values())
        model.train()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in trainable(model).values())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    late = load_base(base, torch.float32, looked_up=True)
    attach(late, tuning_of(LoRAOptions(r=2, modules_to_save=["embed_tokens"]), late.config), seed=1, stored=base_tensors(base))
    assert late(tokens).dtype == torch.float32
    config = json.loads((path / names.CONFIG).read_text())
    (path / names.CONFIG).write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(path / names.WEIGHTS)
    del weights["lm_head.weight"]
    save_file(weights, path / names.WEIGHTS)
    tied = load_base(resolve(path), torch.float32, looked_up=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and tied.lm_head.weight.dtype == torch.float32


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def stored_in_bf16(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    """A base as most are published, whose head is the embedding, or is not."""
    path, tied = make_talker(tmp_path / "base", hidden_size=64), request.param
    weights = {name: tensor.bfloat16() for name, tensor in load_file(path / names.WEIGHTS).items() if not tied or name != HEAD}
    save_file(weights, path / names.WEIGHTS)
    config = json.loads((path / names.CONFIG).read_text())
    (path / names.CONFIG).write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    return resolve(path)


def said_of(model: GPT) -> Tensor:
    """Logits one by one and by threes, and of a batch that no kernel of ours takes at once."""
    tokens, rows = random_tokens(1, 24), random_tokens(20, 1)
    with torch.no_grad():
        return torch.cat((decoded(model, tokens), decoded(model, tokens, 3), model(rows)[:, 0]))


@needs_native
@pytest.mark.parametrize("quantize", ["none", *KINDS])
def test_head_and_embedding_are_read_as_they_are_stored(quantize: str, stored_in_bf16: Checkpoint) -> None:
    """C2, C3: for answers both stay in bf16 in the map of their file, one matrix where they are one, and logits are those of wide ones to
    the bit. Caught: a copy; a head that is made wide, or whose few rows are rounded; rows of an embedding in bf16 that are not made wide;
    a head in fewer bits."""
    config = stored_in_bf16.config()
    narrow, wide = (load_base(stored_in_bf16, torch.float32, quantize=quantize, as_stored=as_stored) for as_stored in (True, False))
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(stored_in_bf16.path / names.WEIGHTS))]
    for weight, other in ((narrow.lm_head.weight, wide.lm_head), (narrow.model.embed_tokens.weight, wide.model.embed_tokens)):
        assert weight.dtype == torch.bfloat16 and other.weight.dtype == torch.float32 and torch.equal(weight.float(), other.weight)
        assert any(int(start, 16) <= weight.data_ptr() < int(end, 16) for start, end in spans)
    assert (narrow.lm_head.weight is narrow.model.embed_tokens.weight) == config.tie_word_embeddings
    assert narrow.model.norm.weight.dtype == torch.float32
    assert torch.equal(said_of(narrow), said_of(wide))


ON_THE_HEAD = {
    "lora": LoRAOptions(r=2, target_modules=["lm_head", "q_proj"]),
    "dora": LoRAOptions(r=2, target_modules=["lm_head"], use_dora=True),
    "embedding": LoRAOptions(r=2, modules_to_save=["embed_tokens"]),
    "head": LoRAOptions(r=2, modules_to_save=["lm_head"]),
    "head apart": LoRAOptions(r=2, modules_to_save=["lm_head"]),
    "both": LoRAOptions(r=2, modules_to_save=["embed_tokens", "lm_head"]),
}


@needs_native
@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("what", ON_THE_HEAD)
def test_what_was_trained_of_head_or_embedding_takes_its_place_as_wide_as_it_is(
    what: str, weight: float, stored_in_bf16: Checkpoint
) -> None:
    """C2, A02: to the bit what it is on wide ones; taken off again the stored matrix is there, the same memory. Caught: what was trained
    rounded to bf16; DoRA that makes a matrix wide for each token."""
    config = stored_in_bf16.config()
    options = replace(ON_THE_HEAD[what], untie=config.tie_word_embeddings and what in ("lora", "dora", "head apart"))
    if options.use_dora and weight != 1.0:
        pytest.skip("DoRA goes alone, with weight 1")
    tuning, learner = tuning_of(options, config), load_base(stored_in_bf16, torch.float32)
    attach(learner, tuning, seed=1, stored=base_tensors(stored_in_bf16))
    with torch.no_grad():
        state = {name: tensor.clone() for name, tensor in tuned_state(learnt(learner), tuning, config).items()}
    narrow, wide = (load_base(stored_in_bf16, torch.float32, as_stored=as_stored) for as_stored in (True, False))
    plain, loaded, places = said_of(narrow), snapshot(narrow), (narrow.lm_head.weight, narrow.model.embed_tokens.weight)
    for model in (narrow, wide):
        with torch.no_grad():
            widen(model, tuning.looked_at)
            add(model, tuning, state, weight)
    assert torch.equal(said_of(narrow), said_of(wide)) and relative(said_of(narrow), plain) > 1e-3
    assert all(narrow.get_parameter(name).dtype == torch.float32 for name in tuning.looked_at)
    put_back(narrow, loaded)
    assert narrow.lm_head.weight is places[0] and narrow.model.embed_tokens.weight is places[1]
    assert torch.equal(said_of(narrow), plain)


def test_a_step_says_what_it_was_trained_on_and_is_served_on_that(
    talker: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is trained is what is served. The base stays what it was: path and fingerprint. Caught: auto means none, in the library
    or in the commands; the record left out of the manifest; an adapter's record not looked at."""
    assert main(words(talker, tmp_path / "out", more="--quantize nf4 --train.max_steps 2")) == 0
    said = capsys.readouterr().err
    assert "frozen    14 weights in nf4: " in said
    step = resolve(tmp_path / "out" / "step-2")
    record = read_manifest(step.path).base
    assert record is not None and (record.quantize, record.fingerprint) == ("nf4", resolve(talker[0]).fingerprint())
    assert "held the base's weights in nf4" in (step.path / names.README).read_text()
    assert quantize_meant("auto", [step]) == "nf4" and quantize_meant("none", [step]) == "none" and quantize_meant("auto", []) == "none"
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        served, wide = litlora.load(step.path)(tokens), litlora.load(step.path, quantize="none")(tokens)
        added = litlora.load(talker[0], adapters={step.path: 1.0})(tokens)
        assert torch.equal(served, load_model(step, quantize="nf4")(tokens)) and torch.equal(served, GPT.from_pretrained(step.path)(tokens))
        assert torch.equal(added, served) and torch.equal(wide, load_model(step)(tokens)) and relative(wide, served) > 1e-3
    for word, more in (("nf4", []), ("int8", ["--quantize", "int8"])):
        assert main(["evaluate", str(step.path), "--data", str(talker[1]), "--max_samples", "2", "--exact_match", "false", *more]) == 0
        assert f"weights held in {word}" in capsys.readouterr().err
    assert main(["evaluate", str(step.path), "--data", str(talker[1]), "--exact_match", "false", "--quantize", "none"]) == 0
    assert "held in" not in capsys.readouterr().err
    assert main(["generate", str(step.path), "--prompt", "hi", "--max_new_tokens", "3"]) == 0
    assert main(["inspect", str(step.path)]) == 0
    assert "training held it in nf4" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "kind"), [("lora", "int8"), ("pissa", "nf4"), ("pro", "nf4-dq"), ("freeze", "nf4")])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(method: str, kind: str, talker: tuple[Path, Path], tmp_path: Path) -> None:
    """R01, R04: to the bit; and not on other bits. Caught: the few bits left out of what may not change."""
    import shutil

    more = {"pissa": "--lora.r 4 --lora.init pissa", "freeze": "--freeze.layers last:1"}.get(method, "") + f" --quantize {kind}"
    command = "lora" if method == "pissa" else method
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(words(talker, whole, command, more)) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "step-12")
    assert main(["finetune", command, "--resume", "--out_dir", str(cut)]) == 0
    assert weights_of(cut / "step-12") == weights_of(whole / "step-12")
    if method == "lora":
        shutil.rmtree(cut / "step-12")
        assert main(["finetune", command, "--resume", "--out_dir", str(cut), "--quantize", "none"]) == 2
        assert main(["finetune", command, "--resume", "--out_dir", str(cut), "--quantize", "nf4"]) == 2
        assert not (cut / "step-12").exists()
    if method == "freeze":
        trained = {name for name in base_tensors(resolve(talker[0])) if ".layers.1." in name}
        model = litlora.load(whole / "step-12")
        held = {name for name, host in linears(model).items() if host.quantized is not None}
        assert held and not any(f"{name}.weight" in trained for name in held)


def test_training_goes_on_from_a_step_on_what_it_was_trained_on(talker: tuple[Path, Path], tmp_path: Path) -> None:
    """Caught: auto looks at the base."""
    assert main(words(talker, tmp_path / "out", more="--quantize int8 --train.max_steps 2")) == 0
    assert main(words((tmp_path / "out" / "step-2", talker[1]), tmp_path / "more", more="--train.max_steps 2")) == 0
    record = read_manifest(tmp_path / "more" / "step-2").base
    assert record is not None and record.quantize == "int8"


def test_a_method_that_trains_every_weight_is_refused_before_anything_is_written(
    talker: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Caught: the refusal left out."""
    assert main(words(talker, tmp_path / "out", "full", "--quantize nf4")) == 2
    assert "full trains every weight, and those in nf4 cannot learn" in capsys.readouterr().err
    assert main(words(talker, tmp_path / "out", "freeze", "--quantize int8 --freeze.layers 0-1")) == 2
    assert not (tmp_path / "out").exists()


def test_new_blocks_begin_as_copies_of_the_original_and_add_nothing_to_the_few_bits(tmp_path: Path) -> None:
    """N07 on few bits. Caught: the copy made of the few bits; the output projection of the copy not zero."""
    base = resolve(make_talker(tmp_path / "base"))
    model, tokens = load_base(base, quantize="nf4"), torch.arange(60)[None]
    stored = base_tensors(base)
    with torch.no_grad():
        before = model(tokens)
        attach(model, tuning_of(CASES["pro-positions"].options, model.config), seed=1, stored=stored)
        assert torch.equal(model(tokens), before)
    new = blocks(model)[0].inserted
    assert new is not None and torch.equal(new.self_attn.q_proj.weight, stored["model.layers.0.self_attn.q_proj.weight"])
    assert not any(isinstance(module, Quantized) for module in new.modules())


def test_a_merge_goes_into_the_original_weights_and_says_what_training_saw(
    talker: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A06, N04: the base is never the few bits. Caught: merged into what the few bits stand for; the report silent."""
    base, _ = talker
    assert main(words(talker, tmp_path / "out", more="--quantize nf4 --train.max_steps 4 --train.lr 1e-2")) == 0
    step = tmp_path / "out" / "step-4"
    capsys.readouterr()
    assert main(["merge_lora", str(step)]) == 0
    assert "training saw the base in nf4; this went into the original weights" in capsys.readouterr().err
    report = json.loads((step / names.MERGED / names.MERGE_REPORT).read_text())
    assert report["trained_on"] == "nf4" and report["base"]["fingerprint"] == resolve(base).fingerprint()
    oracle, before, after = exact(step, base), read(base), read(step / names.MERGED)
    assert set(oracle) == {f"{name}.weight" for name in linears(litlora.load(base)) if name != "lm_head"}
    for name, (stored, values, raw) in after.items():
        if name not in oracle:
            assert raw == before[name][2]
            continue
        result, error = oracle[name]
        assert (np.abs(values - result) <= half_unit(values, stored) + error).all(), name
        assert np.linalg.norm(result - before[name][1]) > 0


def test_bits_that_this_litlora_does_not_know_are_refused(talker: tuple[Path, Path], tmp_path: Path) -> None:
    """A manifest of a later litlora, or somebody's own. Caught: the check left out."""
    assert main(words(talker, tmp_path / "out", more="--train.max_steps 1")) == 0
    step = resolve(tmp_path / "out" / "step-1")
    assert step.manifest is not None and step.manifest.base is not None
    other = Checkpoint(step.path, "step", manifest=replace(step.manifest, base=replace(step.manifest.base, quantize="int3")))
    with pytest.raises(UserError, match="int3, which this litlora does not know"):
        quantize_meant("auto", [other])


def test_a_combination_remembers_what_all_its_parents_were_trained_on(talker: tuple[Path, Path], tmp_path: Path) -> None:
    """Caught: the record left out; the first parent's record."""
    for name, kind in (("a", "nf4"), ("b", "nf4"), ("c", "none")):
        assert main(words(talker, tmp_path / name, more=f"--quantize {kind} --train.max_steps 1")) == 0
    found: dict[str, Any] = {}
    for other in "bc":
        steps = [str(tmp_path / name / "step-1") for name in ("a", other)]
        assert main(["combine", *steps, "--out_dir", str(tmp_path / f"with_{other}")]) == 0
        record = read_manifest(tmp_path / f"with_{other}").base
        found[other] = record.quantize if record else None
    assert found == {"b": "nf4", "c": "none"}


def test_tuning_is_what_it_is_whatever_holds_the_base(tmp_path: Path) -> None:
    """The file of a step names no few bits: others load it as any other."""
    model, plain = in_few_bits(tiny_gpt("llama"), "nf4")
    tuning: Tuning = tuning_of(CASES["dora"].options, model.config)
    config = model.config
    for each in (model, plain):
        attach(each, tuning, seed=1)
    ours, theirs = tuned_state(model, tuning, config), tuned_state(plain, tuning, config)
    assert list(ours) == list(theirs) == list(tuning.file_shapes(config))
