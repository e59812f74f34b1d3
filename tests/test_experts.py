"""Mixtures of experts: what a token gets, which modules learn, and the way from a base through a run to a merged model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tokens, relative, tiny_config, tiny_gpt, tiny_hf_config, transformers_model
from safetensors.torch import load_file, save_file
from talkers import byte_tokenizer
from torch import Tensor

from litlora.__main__ import main
from litlora.checkpoint.resolve import resolve
from litlora.errors import UserError, WorkError
from litlora.families import linear_shapes, stored_name
from litlora.merge import merge, prepare
from litlora.methods import linear_names, lora_config, tuning_of
from litlora.methods.attach import attach, trainable, tuned_state
from litlora.model import GPT, Experts, Linear
from litlora.options import FreezeOptions, LoRAOptions
from litlora.peft import adapter_config_to_peft
from litlora.train.loop import check_alive

UNITS = {"mixtral": ["w1", "w2", "w3"], "qwen3_moe": ["gate_proj", "up_proj", "down_proj"]}
COMMANDED: dict[str, list[str]] = UNITS | {"gpt_oss": [], "deepseek_v2": [], "deepseek_v3": []}
NO_DENSE = {"mixtral": {}, "qwen3_moe": {"mlp_only_layers": []}}


def on_experts(family: str, **changes: Any) -> tuple[GPT, LoRAOptions]:
    """A model with trained LoRA on attention and on every expert."""
    gpt, options = tiny_gpt(family, **changes), LoRAOptions(r=3, alpha=7.0, target_modules=["all-linear", *UNITS[family]])
    attach(gpt, tuning_of(options, gpt.config), seed=1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainable(gpt).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return gpt, options


# ---- which modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", UNITS)
def test_experts_are_targets_where_they_are_named_and_routers_never(family: str) -> None:
    """DESIGN, decision 2. Must catch: all-linear with the experts, which are most of the weights; without the layers that have none."""
    config = tiny_config(family)
    linears = [stored_name(name, config) for name in linear_shapes(config) if name != "lm_head"]
    assert linear_names(config) == [*linears, "lm_head"]

    def hosts(*words: str) -> list[str]:
        tuning = tuning_of(LoRAOptions(target_modules=list(words)), config)
        return [stored_name(slot.removesuffix(".adapter"), config) for slot in tuning.slots]

    assert hosts("all-linear") == [name for name in linears if ".experts." not in name]
    assert len(hosts("all-linear")) == 3 * 4 + 3 * len(config.mlp_only_layers)
    assert hosts("all-linear", *UNITS[family]) == linears
    assert len([name for name in linears if ".experts." in name]) == 3 * config.num_experts * (3 - len(config.mlp_only_layers))
    one = next(name for name in linears if name.endswith(f"experts.2.{UNITS[family][0]}"))
    assert hosts(one) == [one]
    with pytest.raises(UserError, match="gate"):
        hosts("gate")


def test_stacked_experts_and_sinks_are_no_targets_and_learn_whole() -> None:
    """gpt-oss. Must catch: a parameter of them that no word of `freeze` or `modules_to_save` means."""
    config = tiny_config("gpt_oss")
    assert {name.rpartition(".")[2] for name in linear_names(config)} == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
    with pytest.raises(UserError, match="down_proj"):
        tuning_of(LoRAOptions(target_modules=["down_proj"]), config)
    whole = tuning_of(LoRAOptions(modules_to_save=["layers.1.mlp.experts", "layers.1.mlp.router"]), config).whole
    parts = ["gate.weight", "gate.bias", *(f"experts.{part}{end}" for part in ("gate_up_proj", "down_proj") for end in ("", "_bias"))]
    assert sorted(whole) == sorted(f"model.layers.1.mlp.{part}" for part in parts)
    assert "model.layers.2.self_attn.sinks" in tuning_of(FreezeOptions(layers=["2"], modules=["self_attn"]), config).whole


# ---- what they compute -----------------------------------------------------------------------------------------------


def dense(experts: Experts, x: Tensor) -> Tensor:
    """By definition, in fp64: every expert computes every token, with what its adapters add folded into its weights."""
    scores = torch.exp(x @ experts.gate.weight.t())
    shares = scores / scores.sum(-1, keepdim=True)  # (n, E)
    kept = shares >= shares.sort(-1, descending=True).values[:, experts.gate.k - 1, None]
    shares = torch.where(kept, shares, 0.0)
    if experts.gate.normed:
        shares = shares / shares.sum(-1, keepdim=True)
    total = torch.zeros_like(x)
    for number, expert in enumerate(experts.experts):
        gate, up, down = (linear.adapter.folded(linear)[0] for linear in expert.children() if isinstance(linear, Linear))
        inner = (x @ gate.t()) * torch.sigmoid(x @ gate.t()) * (x @ up.t())
        total = total + shares[:, number, None] * (inner @ down.t())
    return total


@pytest.mark.parametrize("family", UNITS)
def test_experts_with_lora_are_the_sum_that_the_paper_writes(family: str) -> None:
    """N01, values and gradients of x, the router and the adapters, fp64. (Mutations seen to fail: the softmax after the choice; weights
    not renormalised; an expert's rows in another's order.)"""
    gpt, _ = on_experts(family)
    experts = gpt.double().model.layers[0].mlp
    assert isinstance(experts, Experts)
    experts.gate.requires_grad_(True)
    x = torch.randn(2, 17, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    toward = torch.randn(2, 17, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    learning = [x, *(parameter for parameter in experts.parameters() if parameter.requires_grad)]
    ours, want = experts(x), dense(experts, x.flatten(0, 1)).view_as(x)
    assert (ours - want).abs().max() <= 1e-12
    for got, expected in zip(*(torch.autograd.grad((y * toward).sum(), learning) for y in (ours, want)), strict=True):
        assert relative(got, expected) <= 1e-10


@pytest.mark.parametrize("family", UNITS)
def test_peft_computes_the_same_with_our_adapter_of_experts(family: str, tmp_path: Path) -> None:
    """A04: under the names of Hugging Face's checkpoints, which PEFT puts together to its own. Must catch: w1 and w3 swapped."""
    from peft import PeftModel

    gpt, options = on_experts(family, **NO_DENSE[family])
    tuning, base = tuning_of(options, gpt.config), gpt.config
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config_to_peft(lora_config(options, base, "base"))))
    save_file(tuned_state(gpt, tuning, base), tmp_path / "adapter_model.safetensors")
    plain = transformers_model(family, tiny_gpt(family, **NO_DENSE[family]), **NO_DENSE[family])
    theirs = PeftModel.from_pretrained(plain, tmp_path).eval()
    tokens = random_tokens(2, 15)
    with torch.no_grad():
        want = gpt(tokens)
        assert relative(tiny_gpt(family, **NO_DENSE[family])(tokens), want) > 0.05
        assert (theirs(tokens).logits - want).abs().max() <= 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize("family", ["qwen3_moe_sparse", "gpt_oss"])
def test_an_adapter_on_experts_put_together_is_refused_and_merged_by_peft(family: str, tmp_path: Path) -> None:
    """PEFT's target_parameters: one A and B for all experts of a layer, in an order that its file does not say. What the refusal says to
    do, works: merged by PEFT it is a model like any other. Caught: the key taken for harmless, experts left out."""
    from peft import LoraConfig, get_peft_model

    theirs = transformers_model(family, tiny_gpt(family))
    adapted = get_peft_model(theirs, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    theirs_base, tokens = transformers_model(family, tiny_gpt(family)), random_tokens(1, 20)
    theirs_base.save_pretrained(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError) as refused:
        GPT.from_pretrained(tmp_path / "adapter", base_dir=tmp_path / "base")
    assert "target_parameters" in refused.value.where and "merge the adapter into its base with PEFT" in refused.value.hint
    with torch.no_grad():
        want = adapted(tokens).logits
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        assert (GPT.from_pretrained(tmp_path / "merged").eval()(tokens) - want).abs().max() <= 1e-5 * want.abs().max()
        assert relative(theirs_base(tokens).logits, want) > 0.05


# ---- training --------------------------------------------------------------------------------------------------------


def test_an_expert_that_no_token_reached_does_not_stop_a_run_and_a_layer_of_them_does() -> None:
    """C3. Must catch: the exemption taken as one for all that bears the name."""
    gpt, _ = on_experts("qwen3_moe")
    gpt(random_tokens(1, 3), random_tokens(1, 3, seed=1)).backward()
    still = {name for name, parameter in trainable(gpt).items() if parameter.grad is None or not parameter.grad.any()}
    assert still
    assert all(".mlp.experts." in name for name in still)
    assert all(parameter.grad is not None for parameter in trainable(gpt).values())  # several processes wait for each
    check_alive(gpt, set(), step=2)
    for name, parameter in trainable(gpt).items():
        if name.startswith("model.layers.2.mlp.experts.") and "down_proj" in name:
            parameter.grad = None
    with pytest.raises(WorkError, match=r"model\.layers\.2\.mlp\.experts\.0\.down_proj"):
        check_alive(gpt, set(), step=2)


def base_directory(path: Path, family: str, **changes: Any) -> Path:
    """As downloaded: written by transformers in several files, with a tokenizer of bytes."""
    changes = {"vocab_size": 288, "max_position_embeddings": 256, **changes}
    transformers_model(family, tiny_gpt(family, **changes), **changes).save_pretrained(path, max_shard_size="100KB")
    (path / "config.json").write_text(json.dumps(tiny_hf_config(family, **changes)))
    byte_tokenizer(path)
    return path


@pytest.mark.parametrize("family", COMMANDED)
def test_a_base_with_experts_is_trained_merged_proven_and_generated_from(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """N05, A06: ten steps of LoRA on attention and experts by the real commands; transformers reads what comes out."""
    from transformers import AutoModelForCausalLM

    base, rows, out = base_directory(tmp_path / "base", family), tmp_path / "rows.json", tmp_path / "out"
    assert len(list(base.glob("*.safetensors"))) > 1
    rows.write_text(json.dumps([{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three", "four", "five")]))
    words = f"finetune lora --checkpoint_dir {base} --data {rows} --out_dir {out} --train.max_steps 10 --threads 1 --eval.fraction 0"
    assert main([*words.split(), "--train.lr", "1e-2", "--lora.r", "4", "--lora.target_modules", "all-linear", *COMMANDED[family]]) == 0
    step = out / "step-10"
    adapter = load_file(step / "adapter_model.safetensors")
    moved = [name for name, tensor in adapter.items() if name.endswith("lora_B.weight") and tensor.any()]
    assert len([name for name in moved if ".experts." in name]) >= (30 if COMMANDED[family] else 0)  # every one of them
    assert main(["merge_lora", str(step), "--verify", "full"]) == 0
    assert main(["verify", str(step / "merged")]) == 0
    capsys.readouterr()
    assert main(["generate", str(step / "merged"), "--prompt", "Say one.", "--max_new_tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out
    merged, told = AutoModelForCausalLM.from_pretrained(step / "merged", output_loading_info=True, attn_implementation="eager")
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        want = GPT.from_pretrained(step)(tokens)
        assert (merged(tokens).logits - want).abs().max() <= 1e-5 * max(1, want.abs().max())
        assert relative(GPT.from_pretrained(base)(tokens), want) > 0.01


def test_a_swapped_expert_is_found_by_verify(tmp_path: Path) -> None:
    """N05: two experts' tensors of a merged model exchanged. Must catch: experts that the proof does not look at."""
    gpt, options = on_experts("qwen3_moe", vocab_size=288)
    base, step = base_directory(tmp_path / "base", "qwen3_moe"), tmp_path / "step"
    step.mkdir()
    described = adapter_config_to_peft(lora_config(options, gpt.config, str(base)))
    (step / "adapter_config.json").write_text(json.dumps(described))
    save_file(tuned_state(gpt, tuning_of(options, gpt.config), gpt.config), step / "adapter_model.safetensors")
    merge(prepare(resolve(step), tmp_path / "merged"))
    assert main(["verify", str(tmp_path / "merged")]) == 0
    one, other = (f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in (1, 2))
    files = {path: load_file(path) for path in (tmp_path / "merged").glob("*.safetensors")}
    found = {name: tensors[name] for tensors in files.values() for name in (one, other) if name in tensors}
    for path, tensors in files.items():
        swapped = {name: found[other if name == one else one] if name in found else tensor for name, tensor in tensors.items()}
        save_file(swapped, path, {"format": "pt"})
    assert main(["verify", str(tmp_path / "merged")]) == 1


# ---- what never learns -----------------------------------------------------------------------------------------------


def test_a_correction_of_the_routing_is_kept_to_the_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V3: no gradient reaches it. In every run it stays as it is: in steps and in merged models."""
    base, rows = base_directory(tmp_path / "base", "deepseek_v3"), tmp_path / "rows.json"
    ends, wanted = ".e_score_correction_bias", corrections(base)
    assert len(wanted) == 2  # the first layer has no experts
    narrowed(base, except_for=ends)
    assert corrections(base) == wanted
    rows.write_text(json.dumps([{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three", "four", "five")]))
    words = f"--checkpoint_dir {base} --data {rows} --train.max_steps 3 --threads 1 --eval.fraction 0 --train.lr 1e-2"
    capsys.readouterr()
    for method in ("full", "lora --lora.modules_to_save gate", "pro --pro.n_insert 1"):
        out = tmp_path / method.split()[0]
        assert main([*f"finetune {method} --out_dir {out} {words}".split()]) == 0
        step = out / "step-3"
        assert "e_score" not in capsys.readouterr().err  # nobody expected it to move
        if method != "full":
            assert main(["merge_lora", str(step), "--dtype", "bfloat16"]) == 0
        model = step if method == "full" else step / "merged"
        found = corrections(model)
        assert set(found.values()) == set(wanted.values()), method
        assert {name: found[name] for name in list(wanted)[:1]} == dict(list(wanted.items())[:1])
        assert GPT.from_pretrained(model, dtype=torch.bfloat16).get_parameter(next(iter(wanted))).dtype == torch.float32


def corrections(directory: Path) -> dict[str, tuple[Any, bytes]]:
    found = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: (one.dtype, one.numpy().tobytes()) for name, one in sorted(found.items()) if name.endswith(".e_score_correction_bias")}


def narrowed(directory: Path, except_for: str) -> None:
    """Its weights in bf16, as such a model is published, but for those tensors."""
    for path in directory.glob("*.safetensors"):
        tensors = {name: one if name.endswith(except_for) else one.bfloat16() for name, one in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})


def test_layers_that_predict_further_tokens_are_refused_and_converted_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V3 is published with one after its last. Must catch: half a model loaded; a layer taken for a new one."""
    base = base_directory(tmp_path / "base", "deepseek_v3")
    more = {"model.layers.3.eh_proj.weight": torch.zeros(40, 80), "model.layers.3.mlp.gate.weight": torch.zeros(6, 40)}
    path = next(iter(sorted(base.glob("*.safetensors"))))
    save_file(load_file(path) | more, path, {"format": "pt"})
    index = base / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] |= dict.fromkeys(more, path.name)
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match="eh_proj") as refused:
        GPT.from_pretrained(base)
    assert "convert" in refused.value.hint
    assert main(["convert", str(base), "--to", "hf", "--out_dir", str(tmp_path / "plain")]) == 0
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(
            GPT.from_pretrained(tmp_path / "plain")(tokens), tiny_gpt("deepseek_v3", vocab_size=288, max_position_embeddings=256)(tokens)
        )
