"""Kernels in Triton against torch's arithmetic: in Triton's interpreter on a CPU, and each compiled for a GPU that need not be there.

The interpreter cuts fp32 off where a GPU rounds it to bf16, so bf16 is compared to one of its last places.
"""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, gradients, random_tokens, relative, tiny_gpt
from torch import Tensor

from litlora import gpu, kernels
from litlora.methods.attach import linears
from litlora.model import GPT, IGNORE, KVCache
from litlora.quantized import KINDS, Quantized, hold, quantized

pytest.importorskip("triton", reason="Triton is not installed; the test extra has it on Linux")

from triton.errors import TritonError

from litlora.gpu import triton_kernels

pytestmark = pytest.mark.gpu
KERNELS = [name for name in vars(triton_kernels) if name.endswith("_kernel")]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3 if torch.cuda.is_available() else 8e-3}
dtypes = pytest.mark.parametrize("dtype", list(BOUNDS))

WITH_KERNELS = [kind for kind in KINDS if kind != "bf16"]  # which torch widens in one pass


class Fused:
    """`triton_kernels`, and which of its functions were called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.called.append(name)
        return getattr(triton_kernels, name)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Fused:
    """The way of a GPU, on a CPU as well."""
    made = Fused()
    monkeypatch.setattr(gpu, "triton_for", lambda x: made if x.dtype in gpu.SERVED else None)
    return made


def in_torch(function: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "triton_for", lambda x: None)
        return function()


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def both_ways(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """What a function gives, and the gradients of those of its inputs that have one, for a slope that is not the same everywhere."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    y = function(*leaves)
    y.backward(numbers(*y.shape, dtype=y.dtype, seed=9))
    return (y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))


def alike(function: Callable[..., Tensor], *inputs: Tensor, fused: Fused, bound: float) -> None:
    """Forward and back in the dtype given, against torch in fp32, rounded once."""
    ours = both_ways(function, *inputs)
    assert fused.called
    theirs = in_torch(lambda: both_ways(function, *(x.detach().float().requires_grad_(x.requires_grad) for x in inputs)))
    assert len(ours) == len(theirs)
    for one, other, dtype in zip(ours, theirs, [inputs[0].dtype, *(x.dtype for x in inputs if x.requires_grad)], strict=True):
        assert one.dtype == dtype
        assert relative(one, other) <= bound and (one - other).abs().max() <= 4 * bound * other.abs().max()


@dtypes
@pytest.mark.parametrize("shape", [(1, 40), (3, 7, 129), (2, 3, 4500)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, fused: Fused) -> None:
    """Caught: the mean over the columns that a program holds, not over C; the gain left out on the way back."""
    x, weight = numbers(*shape, dtype=dtype).requires_grad_(), numbers(shape[-1], dtype=dtype, seed=1)
    for learns in (False, True):
        alike(lambda x, w: kernels.rms_norm(x, w, 1e-3), x, weight.requires_grad_(learns), fused=fused, bound=BOUNDS[dtype])


def test_rms_norm_with_many_rows_for_each_program(fused: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: a step of one tile, where it is one of all programs together."""
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 2)
    monkeypatch.setattr(triton_kernels, "TILE", 64)
    alike(
        lambda x, w: kernels.rms_norm(x, w, 1e-3), numbers(23, 12).requires_grad_(), numbers(12, seed=1).requires_grad_(),
        fused=fused, bound=1e-6,
    )  # fmt: skip


def test_rms_norm_of_a_row_that_does_not_lie_whole_with_gains_of_more_digits(fused: Fused) -> None:
    """Gemma's gains are fp32 beside a bf16 stream, and what comes out is bf16. Caught: gains rounded to x's dtype."""
    weight = torch.full((12,), 1 + 4.8e-4, device=DEVICE)  # 1 in fp16
    x = numbers(5, 24, dtype=torch.float16).requires_grad_()
    alike(lambda x, w: kernels.rms_norm(x[:, ::2], w, 1e-3), x, weight, fused=fused, bound=3.5e-4)


@dtypes
@pytest.mark.parametrize("width", [5, 1025])
def test_swiglu(width: int, dtype: torch.dtype, fused: Fused) -> None:
    """Two products, or the halves of one. Caught: the step of a row taken for its width; the slope of silu without its second term."""
    gate, up = (numbers(2, 3, width, dtype=dtype, seed=seed).requires_grad_() for seed in range(2))
    alike(kernels.swiglu, gate, up, fused=fused, bound=BOUNDS[dtype])
    alike(lambda both: kernels.swiglu(*both.chunk(2, -1)), numbers(2, 3, 2 * width, dtype=dtype).requires_grad_(), fused=fused,
          bound=BOUNDS[dtype])  # fmt: skip


@dtypes
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("interleaved", [False, True])
def test_turning(interleaved: bool, rows: int, dtype: torch.dtype, fused: Fused) -> None:
    """As q lies in memory, with one table for all rows or one for each. Caught: turned forwards whatever the way; a table of the first row
    for all; pairs (i, i + D/2) where they are neighbours."""
    angles = numbers(rows, 1, 5, 6).repeat_interleave(2, -1) if interleaved else numbers(rows, 1, 5, 6).repeat(1, 1, 1, 2)
    sign = torch.tensor([-1.0, 1.0], device=DEVICE)
    sin = angles.sin() * (sign.repeat(6) if interleaved else sign.repeat_interleave(6))
    x = numbers(2, 5, 3, 12, dtype=dtype).requires_grad_()
    alike(
        lambda x, cos, sin: kernels.Rotated.apply(x.transpose(1, 2), cos, sin, interleaved), x, angles.cos(), sin,
        fused=fused, bound=BOUNDS[dtype],
    )  # fmt: skip


@pytest.mark.parametrize("kind", WITH_KERNELS)
@pytest.mark.parametrize("shape", [(33, 40), (70, 128)])
def test_a_weight_in_few_bits_is_widened_to_the_same_numbers(kind: str, shape: tuple[int, int], fused: Fused) -> None:
    """To the bit, for fp16 too. Caught: the low code first; the scale of the next block."""
    few = quantized(kind, numbers(*shape))
    for dtype in (torch.float32, torch.float16):
        ours = few.rows(0, shape[0], dtype)
        assert any(name.startswith("widened") for name in fused.called)
        assert torch.equal(ours, in_torch(lambda: few.rows(0, shape[0], dtype))), dtype  # noqa: B023


@dtypes
@pytest.mark.parametrize("kind", WITH_KERNELS)
@pytest.mark.parametrize("shape", [(33, 64), (6, 2112)])
def test_a_few_rows_are_multiplied_without_widening_the_weight(kind: str, shape: tuple[int, int], dtype: torch.dtype, fused: Fused) -> None:
    """Caught: every row with the first one's numbers; the second half of a byte times the number before its own; columns beyond the
    first piece left out."""
    few = quantized(kind, numbers(*shape))
    for rows in ((1, 1), (3,), (1, 4)):
        x = numbers(*rows, shape[1], dtype=dtype, seed=2)
        fused.called.clear()
        with torch.no_grad():
            ours = few(x)
        assert [name[:7] for name in fused.called] == ["product"]
        theirs = x.float() @ in_torch(few.wide).t()
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert relative(ours, theirs) <= BOUNDS[dtype]


@pytest.mark.parametrize("kind", WITH_KERNELS)
def test_more_rows_and_those_that_learn_take_a_wide_weight(kind: str, fused: Fused) -> None:
    few, x = quantized(kind, numbers(33, 64)), numbers(5, 64)
    with torch.no_grad():
        few(x)
    alike(few, x.requires_grad_(), fused=fused, bound=2e-6)
    assert not any(name.startswith("product") for name in fused.called)


@dtypes
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("sizes", [(4, 2, 12, 12), (6, 1, 16, 24)])  # H, K, D, V
def test_attention_of_one_query(
    sizes: tuple[int, int, int, int], window: int | None, dtype: torch.dtype, fused: Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over what each row holds, more than a part or less than one, of a cache that is larger and holds NaN beyond. Caught: the key after
    the last; the first part alone; a window of one key too few; a group's heads in another's place; parts weighed alike."""
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bf16 as if they were whole numbers")
    monkeypatch.setattr(triton_kernels, "SPLITS", 4)  # few programs: each takes the interpreter some milliseconds
    H, K, D, V = sizes
    positions = torch.tensor([[2], [170]], device=DEVICE)
    q, k, v = (numbers(2, n, T, width, dtype=dtype, seed=T + n) for n, T, width in ((H, 1, D), (K, 200, D), (K, 200, V)))
    ours = fused.attention_of_one(positions, q, k, v, window, 0.3)
    for row, at in enumerate(positions.flatten().tolist()):
        first = 0 if window is None else max(0, at + 1 - window)
        seen = (side[row : row + 1, :, first : at + 1].float() for side in (k, v))
        theirs = F.scaled_dot_product_attention(q[row : row + 1].float(), *seen, scale=0.3, enable_gqa=True)
        assert relative(ours[row], theirs[0].transpose(0, 1)) <= 2 * BOUNDS[dtype]
        for side in (k, v):
            side[row, :, at + 1 :] = torch.nan
    assert torch.equal(ours, fused.attention_of_one(positions, q, k, v, window, 0.3))


# ---- whole models --------------------------------------------------------------------------------------------------------


def loss_and_gradients(gpt: GPT) -> tuple[Tensor, dict[str, Tensor]]:
    targets = random_tokens(1, 9, seed=1)
    targets[0, ::3] = IGNORE
    loss = gpt(random_tokens(1, 9).to(DEVICE), targets.to(DEVICE), segments=[5, 4])
    return loss, gradients(gpt, loss)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3", "phi3", "stablelm", "glm4"])
def test_a_model_of_any_family_has_the_loss_and_gradients_that_it_has_without(family: str, fused: Fused) -> None:
    gpt = tiny_gpt(family, num_hidden_layers=1).to(DEVICE)
    ours, our_grads = loss_and_gradients(gpt)
    expected = {"turned"} | ({"gated", "gated_back"} if gpt.config.hidden_act == "silu" else set())
    expected |= {"rms_norm", "rms_norm_back"} if gpt.config.norm == "rms" else set()
    assert expected == set(fused.called)
    loss, grads = in_torch(lambda: loss_and_gradients(gpt))
    assert relative(ours, loss) <= 2e-6
    for name, grad in grads.items():
        assert relative(our_grads[name], grad) <= 2e-5, name


@pytest.mark.parametrize("kind", WITH_KERNELS)
def test_a_base_in_few_bits_has_the_logits_that_it_has_without(kind: str, fused: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "MATVEC_OUT", 32)
    gpt = tiny_gpt("llama3", hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=1)
    for name, host in linears(gpt).items():
        if name != "lm_head":
            hold(host, quantized(kind, host.weight.detach()))
    gpt.to(DEVICE)
    tokens = random_tokens(1, 2).to(DEVICE)
    with torch.no_grad():
        ours = gpt(tokens)
        theirs = in_torch(lambda: [exactly(gpt), gpt(tokens)][1])
    assert relative(ours, theirs) <= 1e-5
    assert {name for name in fused.called if name.startswith("product")} == {"product_int8" if kind == "int8" else "product_nf4"}


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_rows_that_differ_in_length_go_on_in_one_kernel(family: str, fused: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scores are plain, one token each; over a window too. Caught: any number of tokens; capped scores taken for plain ones."""
    monkeypatch.setattr(triton_kernels, "SPLITS", 2)
    gpt, tokens = tiny_gpt(family, num_hidden_layers=1).to(DEVICE), random_tokens(2, 13).to(DEVICE)

    def logits() -> Tensor:
        cache = KVCache(16, rows=2)
        gpt(tokens[:, :9], cache=cache)
        cache.rewind([9, 4])
        return torch.cat([gpt(tokens[:, 9:10], cache=cache), gpt(tokens[:, 10:], cache=cache)], 1)

    ours = logits()
    assert fused.called.count("attention_of_one") == (0 if family == "gemma2" else 1)
    assert relative(ours, in_torch(logits)) <= 1e-5


def exactly(gpt: GPT) -> None:
    """On a CPU int8 is multiplied in bf16 where nothing learns; not here."""
    for module in gpt.modules():
        if isinstance(module, Quantized):
            module.answering = module.product  # type: ignore[method-assign]


@pytest.mark.parametrize("error", [RuntimeError, TritonError])
def test_where_triton_fails_torch_computes_and_says_so(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """No C compiler, say, or what its own compiler refuses. Caught: a failure that is passed on; Triton's own errors, which are no
    RuntimeError."""

    def failing(*args: Tensor) -> Tensor:
        raise error("Failed to find C compiler.")

    assert gpu.tried(DEVICE) is triton_kernels
    monkeypatch.setattr(triton_kernels, "gated", failing)
    with pytest.warns(UserWarning, match="Triton does not work here .Failed to find C compiler"):
        assert gpu.tried(DEVICE) is None


def test_a_cpu_has_no_use_for_them() -> None:
    assert gpu.triton_for(torch.ones(1)) is None


# ---- compiled ------------------------------------------------------------------------------------------------------------

COMPILE = """
import inspect, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from litlora.gpu import triton_kernels

known = {"ROWS": 2, "COLUMNS": 1024, "LEARNS": True, "INTERLEAVED": False, "HEADS": 8, "HALF": 64, "BLOCK": 64, "SIZE": 2048, "OUT": 4,
         "BYTES": 32, "x_d": 1, "y_d": 1, "WINDOW": 0, "SPLITS": 16, "KEYS": 64, "GROUP": 16, "WIDTH": 128, "VALUES": 128}
wide = {"parts": "*fp32", "cos": "*fp32", "sin": "*fp32", "scales": "*fp32", "table": "*fp32", "eps": "fp32", "way": "fp32",
        "positions": "*i64", "largest": "*fp32", "sums": "*fp32", "scale": "fp32"}
steps = {"rows", "C", "width", "n", "T", "half", "count", "into", "out", "K", "group", "D", "V"}
known |= json.loads(sys.argv[4])
for name in json.loads(sys.argv[1]):
    kernel = getattr(triton_kernels, name)
    types = {}
    for word in inspect.signature(kernel.fn).parameters:
        number = word in steps or word.endswith("_step") or word[1:2] == "_"
        codes = "*i8" if "int8" in name else "*u8"
        types[word] = "constexpr" if word in known else "i32" if number else codes if word == "codes" else wide.get(word, "*" + sys.argv[3])
    constants = {word: known[word] for word in types if word in known}
    even = [word for word in types if types[word][0] == "*" or word in {"D", "V"} or word[:2] in {"k_", "v_"}]  # by 16, as at a launch
    known_of = {(list(types).index(word),): [["tt.divisibility", 16]] for word in even}
    made = triton.compile(ASTSource(kernel, types, constants, known_of), target=GPUTarget("cuda", int(sys.argv[2]), 32))
    assert made.asm["cubin"]
    print(name, made.metadata.shared)
"""


def compiled(names: list[str], capability: int, dtype: str = "bf16", **known: int) -> dict[str, int]:
    """Name -> bytes of shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-c", COMPILE, json.dumps(names), str(capability), dtype, json.dumps(known)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return {name: int(size) for name, size in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_every_kernel_compiles_for_a_gpu(capability: int) -> None:
    """To machine code, by the compiler that comes with Triton. Caught: a loop over a Python list; a name that Triton does not know."""
    assert list(compiled(KERNELS, capability)) == KERNELS


@pytest.mark.parametrize(
    ("dtype", "size"),  # of a head, as Gemma's and Llama's
    [("fp32", 256), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bf16", 256), ("fp32", 128)))],
)
def test_attention_has_room_on_every_gpu(dtype: str, size: int) -> None:
    """99 KB of shared memory are what the smallest from Ampere on give a program. Caught: as many keys at once whatever their size (283 KB,
    more than any GPU has)."""
    keys = triton_kernels.keys_at_once(2 * size * (4 if dtype == "fp32" else 2))
    room = compiled(["attention_of_one_kernel"], 80, dtype, WIDTH=size, VALUES=size, KEYS=keys)
    assert room["attention_of_one_kernel"] <= 99 * 1024


def test_every_kernel_is_compiled_and_compared() -> None:
    """A kernel that no test above launches would be one that nobody tried."""
    launched = inspect.getsource(triton_kernels)
    assert len(KERNELS) == launched.count("@triton.jit") == len({name for name in KERNELS if f"{name}[" in launched})
