"""The same numbers as the reference implementations: transformers for models, PEFT for adapters, stories3m's own record."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, random_tokens, randomise, relative, shared_data, tiny_config, tiny_gpt, tiny_hf_config, transformers_model
from torch import Tensor

from litlora.families import config_from_hf
from litlora.model import GPT, IGNORE, DoRA, KVCache, Linear, LoRA

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def lengths(family: str) -> list[int]:
    """1, 17, the context, and for a stretched rope the context times its factor."""
    config = tiny_hf_config(family)
    context = config["max_position_embeddings"]
    factor = config.get("rope_scaling", {}).get("factor", 1)
    return sorted({1, 17, context, int(context * factor)})


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def some_graded(tokens: Tensor) -> Tensor:
    """Targets for `tokens` of which about a third are not graded, the last one always is."""
    targets = tokens.roll(-1, 1)
    targets[:, :-1][torch.rand(targets[:, :-1].shape, generator=torch.Generator().manual_seed(5)) < 0.3] = IGNORE
    return targets


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family: str) -> None:
    """M01, logits, fp32. Must catch: rotating pairs (2i, 2i + 1); a window one token off; norm gains swapped."""
    gpt = tiny_gpt(family)
    theirs = transformers_model(family, gpt)
    assert config_from_hf(theirs.config.to_dict(), "config.json").rope == gpt.config.rope
    for length in lengths(family):
        tokens = random_tokens(2, length)
        with torch.no_grad():
            expected = theirs(tokens).logits
            assert (gpt(tokens) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max()), length


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_that_transformers_writes_gives_the_same_model(family: str) -> None:
    """M01: from config.to_dict(), in the spelling of transformers 5, through families.py."""
    ours = config_from_hf(transformers_model(family).config.to_dict(), "config.json")
    gpt = randomise(GPT(ours), 3).eval()
    tokens = random_tokens(1, 20)
    torch.testing.assert_close(gpt(tokens), tiny_gpt(family, seed=3)(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_equals_that_of_transformers(family: str) -> None:
    """M01, gradients of all parameters, fp32; at every length. Must catch: turning the wrong way in Rotated.backward."""
    gpt = tiny_gpt(family)
    theirs = transformers_model(family, gpt)
    for length in lengths(family):
        tokens = random_tokens(2, length)
        targets = some_graded(tokens)
        gpt.zero_grad()
        theirs.zero_grad()
        gpt(tokens, targets).backward()
        plain_loss(theirs(tokens).logits, targets).backward()
        expected = dict(theirs.named_parameters())
        for name, parameter in gpt.named_parameters():
            assert parameter.grad is not None
            if length == 1 and name.endswith(
                ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias", "q_norm.weight", "k_norm.weight")
            ):
                assert parameter.grad.abs().max() < 1e-5  # one token looks at itself whatever q and k are
                continue
            assert relative(parameter.grad, expected[name].grad) <= 1e-5, (name, length)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_agree_with_those_of_transformers(family: str) -> None:
    """M01, bf16: KL <= 1e-4, largest difference <= 3% of the largest logit; and no farther from fp32 than transformers is."""
    gpt = tiny_gpt(family).bfloat16()
    theirs = transformers_model(family, gpt).bfloat16()
    tokens = random_tokens(4, 40)
    with torch.no_grad():
        ours, expected, truth = gpt(tokens).float(), theirs(tokens).logits.float(), gpt.float()(tokens)
    assert divergence(ours, expected) <= 1e-4
    assert (ours - expected).abs().max() <= 3e-2 * expected.abs().max()
    assert divergence(ours, truth) <= 1.1 * divergence(expected, truth)


def divergence(ours: Tensor, theirs: Tensor) -> float:
    """Mean KL of logits (B, T, V)."""
    return float(F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean())


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapt_both(gpt: GPT, theirs: Any, method: type[LoRA], r: int, alpha: int, dropout: float, use_rslora: bool) -> Any:
    """Random adapters on every projection and the head of `gpt`, and the same in PEFT around `theirs`."""
    from peft import LoraConfig, get_peft_model

    gpt.requires_grad_(False)
    for name, host in gpt.named_modules():
        if isinstance(host, Linear):
            assert name.rpartition(".")[2] in PROJECTIONS
            host.adapter = method(host, r, alpha, dropout, use_rslora)
    for name, parameter in randomised_adapters(gpt).items():
        assert parameter.requires_grad, name
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=PROJECTIONS, use_rslora=use_rslora, use_dora=method is DoRA
    )
    theirs = get_peft_model(theirs, config)
    for name, parameter in theirs_by_our_name(theirs).items():
        parameter.data.copy_(gpt.get_parameter(name).view_as(parameter))
    return theirs


def randomised_adapters(gpt: GPT) -> dict[str, torch.nn.Parameter]:
    """|B A| is some tenths of |W|, far more than 1%."""
    generator = torch.Generator().manual_seed(9)
    adapters = {name: p for name, p in gpt.named_parameters() if ".adapter." in name}
    for name, parameter in adapters.items():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * (1 + 0.2 * noise) if name.endswith("magnitude") else 0.1 * noise
    return adapters


def theirs_by_our_name(theirs: Any) -> dict[str, torch.nn.Parameter]:
    names = {"lora_A.default.weight": "lora_A", "lora_B.default.weight": "lora_B", "lora_magnitude_vector.default.weight": "magnitude"}
    found = {}
    for name, parameter in theirs.named_parameters():
        for their_end, our_end in names.items():
            if name.endswith(their_end):
                found[name.removeprefix("base_model.model.").removesuffix(their_end) + "adapter." + our_end] = parameter
    return found


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "llama_biased", "qwen2", "qwen3"])
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_adapters_compute_and_learn_as_in_peft(method: type[LoRA], family: str, kv_heads: int, use_rslora: bool) -> None:
    """N01. Must catch: alpha / r for rsLoRA; the bias inside DoRA's gain; the norm inside DoRA's gradient."""
    gpt = tiny_gpt(family, num_key_value_heads=kv_heads)
    theirs = transformers_model(family, gpt, num_key_value_heads=kv_heads)
    theirs = adapt_both(gpt, theirs, method, r=5, alpha=12, dropout=0.0, use_rslora=use_rslora)
    tokens = random_tokens(2, 20)
    targets = some_graded(tokens)
    expected = theirs(tokens).logits
    assert (gpt(tokens) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    gpt(tokens, targets).backward()
    plain_loss(expected, targets).backward()
    learnt = theirs_by_our_name(theirs)
    assert len(learnt) == (3 if method is DoRA else 2) * (7 * 3 + 1)
    for name, parameter in learnt.items():
        ours = gpt.get_parameter(name).grad
        assert ours is not None
        assert parameter.grad is not None
        assert relative(ours, parameter.grad.view_as(ours)) <= 1e-5, name


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_dropout_drops_what_peft_drops(method: type[LoRA]) -> None:
    """N01 with dropout: the same draws give the same logits and gradients. Must catch: DoRA's base part on the dropped-out x only."""
    gpt = tiny_gpt("llama_biased")
    theirs = adapt_both(gpt, transformers_model("llama_biased", gpt), method, r=3, alpha=6, dropout=0.4, use_rslora=False).train()
    gpt.train()
    tokens = random_tokens(2, 20)
    torch.manual_seed(11)
    ours = gpt(tokens)
    torch.manual_seed(11)
    expected = theirs(tokens).logits
    assert (ours - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    ours.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in theirs_by_our_name(theirs).items():
        grad = gpt.get_parameter(name).grad
        assert grad is not None
        assert parameter.grad is not None
        assert relative(grad, parameter.grad.view_as(grad)) <= 1e-5, name


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories() -> tuple[GPT, dict[str, Any]]:
    """The real 3M model, read with nothing of ours but model.py and families.py, and what transformers said about it."""
    from safetensors.torch import load_file

    directory = shared_data("models/stories3m-llama")
    with torch.device("meta"):
        gpt = GPT(config_from_hf(json.loads((directory / "config.json").read_text()), directory / "config.json"))
    tensors = load_file(directory / "model.safetensors")
    gpt.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, assign=True)
    gpt.tie()
    return gpt.eval(), json.loads((directory / "reference.json").read_text())


def test_a_real_model_gives_the_recorded_logits_and_loss(stories: tuple[GPT, dict[str, Any]]) -> None:
    """M01 on stories3m-llama."""
    gpt, reference = stories
    with torch.no_grad():
        logits = gpt(torch.tensor([reference["prompt_ids"]]))[0, -1]
        text = torch.tensor([reference["text_ids"]])
        loss = gpt(text[:, :-1], text[:, 1:]) / (text.size(1) - 1)
    expected = torch.tensor(reference["last_logits"])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert float(loss) == pytest.approx(reference["text_mean_loss"], rel=1e-6)


def test_a_real_model_writes_the_recorded_story(stories: tuple[GPT, dict[str, Any]]) -> None:
    """M05 on stories3m-llama: 64 greedy tokens through the cache."""
    gpt, reference = stories
    cache, tokens, story = KVCache(128), torch.tensor([reference["prompt_ids"]]), []
    for _ in reference["greedy_ids"]:
        tokens = gpt(tokens, cache=cache)[:, -1:].argmax(-1)
        story.append(int(tokens))
    assert story == reference["greedy_ids"]


def test_the_tiny_models_are_unfriendly() -> None:
    """Shapes that agree by chance hide mistakes: the conventions of YARDSTICK's acceptance tests."""
    for family in FAMILIES:
        config = tiny_config(family)
        assert config.num_attention_heads * config.head_dim != config.hidden_size
        assert config.window(2) == (7 if family in ("mistral", "qwen2") else None)


def test_a_real_model_is_read_from_its_directory() -> None:
    """`GPT.from_pretrained` gives the model that was put together by hand above."""
    reference = json.loads((shared_data("models/stories3m-llama") / "reference.json").read_text())
    gpt = GPT.from_pretrained(shared_data("models/stories3m-llama"))
    expected = torch.tensor(reference["last_logits"])
    with torch.no_grad():
        assert (gpt(torch.tensor([reference["prompt_ids"]]))[0, -1] - expected).abs().max() <= 1e-5 * expected.abs().max()
    rough = GPT.from_pretrained(shared_data("models/stories3m-llama"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in rough.parameters()} == {torch.bfloat16}
