"""What would go wrong on another device than a CPU, found where there is none.

Models are computed on torch's meta device, whose tensors have a shape and a place and no numbers: whatever a step makes beside it, or asks
it for, is seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import EVERY, tiny_config, tiny_gpt
from test_promises import CASES, options_on
from test_replay import varies
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litlora.checkpoint.weights import NothingDrawn
from litlora.commands.finetune import as_stored
from litlora.methods import tuning_of
from litlora.methods.attach import attach, linears, trainable
from litlora.model import GPT, Experts, KVCache
from litlora.options import FinetuneLoRA
from litlora.precision import choose_dtype
from litlora.quantized import KINDS, hold, quantized
from litlora.replay import ReplayedStep, WholeCache, stream_beside
from litlora.train import run
from litlora.train.metrics import memory_text, peak_memory_mb

META = torch.device("meta")
FIRST = ("llama3", "qwen3_moe", "gemma3", "gpt_oss", "deepseek_v3", "longrope")  # the others when time is no matter
OWN = ("dora", "pissa", "prompt", "scale-shift", "series", "pro", "head-untied")
families = pytest.mark.parametrize("family", [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in EVERY])
cases = pytest.mark.parametrize("case", [pytest.param(name, marks=() if name in OWN else pytest.mark.slow) for name in CASES])
kinds = pytest.mark.parametrize("kind", list(KINDS))


class Elsewhere(TorchDispatchMode):
    """Which operations take or make a tensor that is not on the meta device. (A single number may be anywhere: it goes along by value.)"""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, made)) if isinstance(each, Tensor)]
        self.found |= {f"{func} on {tensor.device}" for tensor in tensors if not tensor.is_meta and tensor.dim()}
        return made


class WithoutNumbers(TorchFunctionMode):
    """What a step asks its device for and waits: which tokens are graded (half of them), how many an expert gets (each as many)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.nonzero:
            return args[0].new_zeros((args[0].numel() // 2, 1), dtype=torch.int64)
        if func is Tensor.bincount:
            chosen, experts = args[0].numel(), kwargs["minlength"]
            return SimpleNamespace(tolist=lambda: [chosen * (n + 1) // experts - chosen * n // experts for n in range(experts)])
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_elsewhere() -> Iterator[None]:
    with Elsewhere() as elsewhere, WithoutNumbers():
        yield
    assert not elsewhere.found


def model_of(family: str, case: str | None = None, kind: str | None = None) -> GPT:
    changes = CASES[case].changes if case else {}
    config = tiny_config(family, **changes)
    with META, NothingDrawn():
        gpt = GPT(config)
    for name, host in linears(gpt).items():
        if kind and name != "lm_head":
            hold(host, quantized(kind, torch.ones(host.weight.shape)).to(META))
    if case:
        with META, NothingDrawn():
            attach(gpt, tuning_of(options_on(case, config), config), seed=None)
    return gpt.train()


def family_of(case: str) -> str:
    return "qwen2" if "qwen2" in CASES[case].families else CASES[case].families[0]


def train(gpt: GPT) -> None:
    tokens = torch.zeros(1, 20, dtype=torch.int64, device=META)
    learning, prefix = trainable(gpt), 3 if gpt.can_share else 0
    with nothing_elsewhere():
        gpt(tokens, tokens, segments=[9, 11 - prefix], prefix=prefix).backward()
    assert {name for name, parameter in learning.items() if parameter.grad is not None} == learning.keys()


@torch.inference_mode()
def answer(gpt: GPT) -> None:
    """A prompt in two parts and a token; the same beside another one; and the token as a graph would have it."""
    tokens, last = torch.zeros(2, 9, dtype=torch.int64, device=META), torch.zeros(2, dtype=torch.int64, device=META)
    with nothing_elsewhere():
        cache = KVCache(32)
        for part in (tokens[:1], tokens[:1, :3], tokens[:1, :1]):
            gpt(part, cache=cache, logits_at=last[:1])
        if varies(gpt.config):
            return
        cache = KVCache(32, rows=2)
        gpt(tokens, cache=cache, logits_at=last)
        cache.rewind([9, 4])
        gpt(tokens[:, :1], cache=cache)
        if not any(isinstance(module, Experts) for module in gpt.modules()):
            gpt(tokens[:, :1], cache=WholeCache(cache, META))


@families
def test_a_step_and_an_answer_compute_nothing_on_another_device_than_the_models(family: str) -> None:
    """Forward and back, packed and with a beginning that samples share; with a cache, alone and beside another. Caught: positions, lengths
    of a cache or keys of a mask made on the CPU, also where they are moved then; angles and groups of experts where nothing says."""
    gpt = model_of(family)
    train(gpt)
    answer(gpt.eval())


@cases
def test_with_whatever_is_attached(case: str) -> None:
    gpt = model_of(family_of(case), case)
    train(gpt)
    answer(gpt.eval())


@kinds
def test_beside_a_base_in_few_bits(kind: str) -> None:
    """Caught: rows made wide in a CPU's memory wherever the device is no GPU."""
    gpt = model_of("qwen2", "lora", kind)
    train(gpt)
    answer(gpt.eval())


# ---- the same bits -------------------------------------------------------------------------------------------------------


class AsOnCuda(TorchFunctionMode):
    """What CUDA computes otherwise to the last bit: a quotient by a number is a product with the number's inverse, rounded, and a mean is
    added up in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.on_cpu: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__truediv__, Tensor.div, torch.div) and isinstance(args[1], int | float):
            return args[0] * (1 / torch.tensor(float(args[1])))
        made = func(*args, **(kwargs or {}))
        if func is Tensor.cpu:
            self.on_cpu.append(made := made.clone())
        if func is Tensor.mean and not any(args[0] is one for one in self.on_cpu):
            made = torch.nextafter(made, 2 * made)
        return made


@kinds
def test_few_bits_are_the_same_wherever_they_are_made(kind: str) -> None:
    """What was trained on a GPU is answered with on a CPU. Caught: scales of int8 as quotients by 127 itself, of which CUDA gives one in
    twenty another last bit; the mean of nf4-dq's scales as the device adds them."""
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    with AsOnCuda():
        there = quantized(kind, weight)
    assert torch.equal(there.wide(), quantized(kind, weight).wide())


def test_a_commit_rounds_a_whole_model_into_the_machines_own_memory() -> None:
    """Tensor by tensor; what is stored as it is goes there when it is written. Caught: all of them rounded on the GPU at once."""
    trained = {name: torch.nn.Parameter(torch.ones(3)) for name in ("rounded", "as it is")}
    with AsOnCuda() as cuda:
        stored = as_stored(trained, {"rounded": torch.bfloat16, "as it is": torch.float32})
    assert [id(stored["rounded"])] == [id(tensor) for tensor in cuda.on_cpu]
    assert stored["as it is"].data_ptr() == trained["as it is"].data_ptr()


# ---- which device, which dtype -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capability", "dtype"), [(7, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_auto_is_bf16_on_a_gpu_that_has_it(capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: on a GPU before Ampere, where torch emulates it."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=capability))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert choose_dtype("auto", "cuda") is dtype
    assert (choose_dtype("bf16", "cuda"), choose_dtype("auto", "cpu")) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("word", "there", "chosen"), [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu")])
def test_a_run_computes_where_its_header_says(word: Any, there: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: Fabric's own choice, which on a Mac is another one."""
    import lightning_fabric

    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(lightning_fabric, "Fabric", lambda **options: asked.append(options["accelerator"]) or SimpleNamespace(launch=int))
    monkeypatch.setattr(run, "keep_freed_memory", lambda: None)
    options = FinetuneLoRA(accelerator=word)
    run.launch(options)
    assert asked == [chosen] and run.compute_text(options, torch.float32).startswith(f"{chosen}, fp32")


def test_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an estimate of a GPU's memory a run shows what it took of that. Caught: the process's own memory for every device."""
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 2**30)
    assert memory_text(torch.device("cuda", 0)) == "3.0 GB"
    assert peak_memory_mb(torch.device("cpu")) == peak_memory_mb() > 0


# ---- graphs --------------------------------------------------------------------------------------------------------------


class Streams:
    """torch.cuda on a machine with several GPUs, as far as a capture goes: it notes what is current while what is done."""

    def __init__(self) -> None:
        self.device, self.done = 0, list[tuple[str, int]]()

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    @contextmanager
    def graph(self, graph: Any, stream: Any = None) -> Iterator[None]:
        self.done.append(("capture", self.device if stream is None else stream.device))
        with self.on(0 if stream is None else stream.device):  # torch's own stream for it is of the first device that asked
            yield


def test_a_graph_is_of_the_models_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is not the current one, nothing would be captured, nothing said, and each token have the first one's logits. Caught:
    the current device and torch's own stream; a new stream for each graph."""
    cuda, streams = Streams(), list[int]()
    gpt, cache = tiny_gpt(), KVCache(16)
    with torch.inference_mode():
        gpt(torch.zeros(1, 9, dtype=torch.int64), cache=cache)
    step = ReplayedStep(gpt, cache)
    step.prepare()
    step.device = torch.device("cuda", 1)

    def stream(device: torch.device) -> Any:
        streams.append(device.index)
        return SimpleNamespace(device=device.index, wait_stream=lambda other: None)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: cuda.on(stream.device))
    monkeypatch.setattr(torch.cuda, "device", lambda device: cuda.on(device.index))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "graph", cuda.graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: cuda.done.append(("replay", cuda.device))))
    monkeypatch.setattr(step, "step", lambda tokens: cuda.done.append(("step", cuda.device)))
    stream_beside.cache_clear()
    step.captured(torch.zeros(1, 1, dtype=torch.int64))
    assert cuda.done == [("step", 1), ("capture", 1), ("step", 1), ("replay", 1)]
    step.captured(torch.zeros(1, 1, dtype=torch.int64))
    assert streams == [1]
    stream_beside.cache_clear()
