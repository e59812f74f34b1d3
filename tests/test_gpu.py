"""What only a GPU can tell: `pytest -m gpu` runs this file and the kernels' own, compiled, in a few minutes on one GPU.

Everything is compared with the same on the CPU in fp32, or with torch's plain operations on the GPU. Skipped where there is none.
It has not run on a GPU yet.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gradients, random_tokens, relative, tiny_gpt
from talkers import byte_tokenizer
from test_generation import CONFIG, GREEDY, WINDOWED, ids_of, tiny_model
from test_promises import trained
from torch import Tensor

from litlora import gpu
from litlora.__main__ import main
from litlora.generation import Conversation, generate_batch
from litlora.gpu import packed
from litlora.methods.attach import linears, trainable
from litlora.model import GPT, IGNORE
from litlora.options import TrainOptions
from litlora.quantized import KINDS, hold, quantized
from litlora.tokenizer import Tokenizer
from litlora.train.optimizer import build_optimizer

DEVICE = torch.device("cuda", 0)  # as a tensor calls it, and what is remembered of a device
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
SEGMENTS = [5, 119, 1, 70]


def on_gpu(gpt: GPT, dtype: torch.dtype = torch.float32) -> GPT:
    return copy.deepcopy(gpt).to(DEVICE, dtype)


def packed_loss(gpt: GPT, prefix: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    device, length = gpt.lm_head.weight.device, prefix + sum(SEGMENTS)
    targets = random_tokens(1, length, seed=1)
    targets[0, ::3] = IGNORE
    loss = gpt(random_tokens(1, length).to(device), targets.to(device), segments=SEGMENTS, prefix=prefix)
    return loss, gradients(gpt, loss)


def agree(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], bound: float) -> None:
    assert relative(ours[0].cpu(), theirs[0].cpu()) <= bound
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert relative(ours[1][name].cpu(), grad.cpu()) <= bound, name


def without(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any]) -> Any:
    """In torch's plain operations."""
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "triton_for", lambda x: None)
        patch.setattr(packed, "has_kernel", lambda device: False)
        return function()


def test_triton_works_here() -> None:
    """Else every test below would compare torch with itself."""
    assert gpu.triton_for(torch.ones(1, device=DEVICE)) is not None


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt_oss", "deepseek_v2", "mixtral"])
def test_loss_and_gradients_in_fp32_are_those_of_the_cpu(family: str) -> None:
    gpt = tiny_gpt(family)
    agree(packed_loss(on_gpu(gpt)), packed_loss(gpt), 2e-4)


@pytest.mark.parametrize("prefix", [0, 40])
@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma3"])
def test_all_samples_in_one_launch_give_what_one_after_another_does(family: str, prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, which is what the kernel takes."""
    assert packed.has_kernel(DEVICE), "this GPU has no such kernel"
    calls, kernel = [], packed.kernel()
    counted = functools.wraps(kernel)(lambda *args, **more: calls.append(1) or kernel(*args, **more))  # its words are looked at
    monkeypatch.setattr(packed, "kernel", lambda: counted)
    gpt = tiny_gpt(family, hidden_size=64, head_dim=16)
    half = on_gpu(gpt, torch.bfloat16)
    ours = packed_loss(half, prefix)
    assert len(calls) == gpt.config.num_hidden_layers
    exact = packed_loss(gpt, prefix)
    plain = without(monkeypatch, lambda: packed_loss(half, prefix))
    assert relative(ours[0].cpu(), exact[0]) <= 1e-2
    for name, grad in exact[1].items():
        error = relative(plain[1][name].cpu(), grad)
        assert relative(ours[1][name].cpu(), grad) <= 1.5 * error + 5e-3, name  # no further away than what was rounded as often


def test_training_takes_the_same_way_as_on_the_cpu() -> None:
    """LoRA by AdamW, ten updates."""
    losses = {}
    for device in (torch.device("cpu"), DEVICE):
        gpt, _, _ = trained("lora", "qwen2")
        gpt.to(device).train()
        optimizer = build_optimizer(trainable(gpt), TrainOptions(lr=1e-2))
        for _ in range(10):
            loss, _ = packed_loss(gpt)
            losses.setdefault(device.type, []).append(loss.item())
            optimizer.step()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
    assert losses["cpu"][-1] < 0.9 * losses["cpu"][0]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_base_in_few_bits_is_the_same_as_on_the_cpu(kind: str) -> None:
    """Made on the GPU to the bit, and computed with in both directions and token by token."""
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    here, there = quantized(kind, weight), quantized(kind, weight.to(DEVICE))
    assert torch.equal(there.wide().cpu(), here.wide())
    gpt = tiny_gpt("llama3", hidden_size=64, intermediate_size=128, head_dim=16)
    for name, host in linears(gpt).items():
        if name != "lm_head":
            hold(host, quantized(kind, host.weight.detach()))
    moved = on_gpu(gpt)
    agree(packed_loss(moved), packed_loss(gpt), 2e-4)
    tokens = random_tokens(1, 3)
    with torch.no_grad():
        assert relative(moved(tokens.to(DEVICE)).cpu(), gpt(tokens)) <= (2e-2 if kind == "int8" else 2e-4)  # int8 answers in bf16 on a CPU


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["plain", "windowed"])
def test_answers_are_those_of_the_cpu_and_come_from_a_graph(config: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Greedy, in fp32, alone and side by side."""
    gpt, tokenizer = tiny_model(config), Tokenizer(byte_tokenizer(tmp_path))
    moved, prompts = on_gpu(gpt), [ids_of(6), ids_of(11, seed=1)]
    for prompt in prompts:
        conversation = Conversation(moved, tokenizer, ())
        answer, expected = conversation.ask(prompt, GREEDY), Conversation(gpt, tokenizer, ()).ask(prompt, GREEDY)
        answer.all(), expected.all()
        assert answer.ids == expected.ids
        assert conversation.replayed is not None and conversation.replayed.made
        assert not [message for warning in recwarn if "cannot be recorded" in (message := str(warning.message))]
    beside = generate_batch(moved, tokenizer, (), prompts, GREEDY)
    assert [answer.ids for answer in beside] == [answer.ids for answer in generate_batch(gpt, tokenizer, (), prompts, GREEDY)]


@pytest.mark.parametrize("case", ["lora", "dora", "prompt", "parallel"])
def test_an_adapter_that_is_on_answers_from_the_graph_too(case: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_tokenizer(tmp_path))
    gpt, _, _ = trained(case, "qwen2")
    answers = []
    for model in (gpt.eval(), on_gpu(gpt)):
        answer = Conversation(model, tokenizer, ()).ask([token % 131 for token in ids_of(6)], GREEDY)
        answer.all()
        answers.append(answer.ids)
    assert answers[0] == answers[1]


def test_the_commands_train_and_answer_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bf16, as a GPU has it by default."""
    out = str(tmp_path / "out")
    assert main(["finetune", "lora", "--out_dir", out, "--train.max_steps", "20", "--accelerator", "cuda"]) == 0
    assert main(["generate", out, "--prompt", "hello", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.strip()
