"""The text model inside a model of text and images: computed, trained and merged as by itself; everything else stays, byte for byte."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative, tiny_hf_config
from safetensors.torch import load_file, save_file
from talkers import SIZE, byte_tokenizer
from test_family_commands import WORDS, stored
from test_finetune import apart, did, refused, write_rows

from litlora import GPT
from litlora.checkpoint import names
from litlora.errors import UserError
from litlora.families import config_from_hf, with_changes

TOKENS = torch.arange(30)[None] % SIZE
VISION = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24, "image_size": 28, "patch_size": 14}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3", {"mm_tokens_per_image": 4}),
    "mistral3": ("mistral", {"tie_word_embeddings": False, "spatial_merge_size": 1}),
}
SIZES = {"vocab_size": 288, "max_position_embeddings": 128}
spellings = pytest.mark.parametrize("old", [False, True], ids=["new names", "old names"])
kinds = pytest.mark.parametrize("kind", KINDS)


def text_config(kind: str) -> dict[str, Any]:
    family, _ = KINDS[kind]
    return tiny_hf_config(family, **SIZES, **({"sliding_window": None} if kind == "mistral3" else {}))


def made(path: Path, kind: str, *, old: bool = False) -> Path:
    """As transformers saves it (new names in memory, old ones in its files), every tensor random; `old` False: as newer files have it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = VISION | ({"model_type": "siglip_vision_model"} if kind == "gemma3" else {"model_type": "pixtral", "head_dim": 8})
    config = AutoConfig.for_model(kind, text_config=text_config(kind), vision_config=vision, eos_token_id=[257, 258], **KINDS[kind][1])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape) if "norm" in name else 0.05 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if not (kind == "gemma3" and name == "lm_head.weight")}
    if old:
        for new, before in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
            tensors = {name.replace(new, before, 1) if name.startswith(new) else name: tensor for name, tensor in tensors.items()}
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, path / names.WEIGHTS, {"format": "pt"})
    (path / "preprocessor_config.json").write_text('{"size": 28}')
    return byte_tokenizer(path)


def theirs(path: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    model, told = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True, attn_implementation="eager")
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


@spellings
@kinds
def test_the_text_model_gives_transformers_logits_and_gradients(kind: str, old: bool, tmp_path: Path) -> None:
    """M01, issue 5.2: nested text_config, both spellings of the weights. Caught: end ids of the whole overlooked."""
    base = made(tmp_path / "base", kind, old=old)
    ours, reference = GPT.from_pretrained(base).eval(), theirs(base)
    assert ours.config.text_of == kind and ours.config.eos_token_ids == (257, 258)
    want = reference(TOKENS).logits
    difference = (ours(TOKENS) - want).abs().max() / max(1, want.abs().max())
    print(f"largest difference {kind} {difference.item():.1e}")
    assert difference <= 1e-5
    want.square().sum().backward()
    ours(TOKENS).square().sum().backward()
    expected = {name.replace("model.language_model.", "model."): tensor.grad for name, tensor in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert relative(parameter.grad, expected[name]) <= 1e-5, name


@spellings
@kinds
def test_a_step_is_peft_s_and_a_merge_carries_the_rest_over(kind: str, old: bool, tmp_path: Path) -> None:
    """N02, N05, N07, A07: the merged directory is of the same class, its vision tower the same bytes, its names the base's; so are those of
    a deeper one. Caught: the tower's tensors left out; converted with --dtype; renamed in the deeper model."""
    from peft import PeftModel

    base, rows = made(tmp_path / "base", kind, old=old), write_rows(tmp_path / "rows.jsonl", "one two three four")
    for words in ("finetune lora --lora.r 4", "finetune pro --pro.n_insert 1"):
        run = tmp_path / words.split()[1]
        did(f"{words} --checkpoint_dir {base} --data {rows} --out_dir {run} {WORDS}".split())
        step, merged = run / "step-4", run / "merged"
        did(["merge_lora", str(step), "--out_dir", str(merged)])
        did(["verify", str(merged)])
        assert apart(GPT.from_pretrained(step).eval(), theirs(merged)) <= 1e-5
        assert apart(theirs(base), theirs(merged)) > 1e-4
        before, after = stored(base), stored(merged)
        beside = {name for name in before if "language_model" not in name and "lm_head" not in name}
        assert len(beside) > 10 and all(torch.equal(before[name], after[name]) for name in beside)
        assert {name for name in after if "language_model" not in name and "lm_head" not in name} == beside
        if "lora" in words:
            assert after.keys() == before.keys()
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Found missing adapter keys")  # of a tower that a short name means as well
                adapted = PeftModel.from_pretrained(theirs(base), step).eval()
            assert apart(GPT.from_pretrained(step).eval(), adapted) <= 1e-5
        else:
            starts = {name.split(".layers.")[0] for name in after if ".layers." in name and "language_model" in name}
            assert starts == {"language_model.model" if old else "model.language_model"}
        assert (merged / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    did(["merge_lora", str(tmp_path / "lora" / "step-4"), "--out_dir", str(tmp_path / "rough"), "--dtype", "bfloat16"])
    assert all(torch.equal(stored(tmp_path / "rough")[name], before[name]) for name in beside)
    told = load_file(tmp_path / "rough" / names.WEIGHTS)
    assert {tensor.dtype for name, tensor in told.items() if name not in beside} == {torch.bfloat16}


@kinds
def test_another_bit_of_the_tower_is_another_base(kind: str, tmp_path: Path) -> None:
    """A05: an adapter belongs to the whole."""
    base, rows = made(tmp_path / "base", kind), write_rows(tmp_path / "rows.jsonl", "one two three four")
    did(f"finetune lora --lora.r 2 --checkpoint_dir {base} --data {rows} --out_dir {tmp_path / 'out'} {WORDS}".split())
    tensors = load_file(base / names.WEIGHTS)
    name = next(name for name in tensors if "vision_tower" in name)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, base / names.WEIGHTS, {"format": "pt"})
    assert "its weights are others" in refused(["merge_lora", str(tmp_path / "out" / "step-4")])


@kinds
def test_a_larger_vocabulary_is_written_where_it_stands(kind: str, tmp_path: Path) -> None:
    base, out, text = made(tmp_path / "base", kind), tmp_path / "out", tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    did(["extend_vocab", str(base), "--data", str(text), "--vocab_size", "300", "--out_dir", str(out)])
    assert theirs(out).config.text_config.vocab_size > 288
    assert apart(GPT.from_pretrained(out).eval(), theirs(out)) <= 1e-5


@kinds
def test_what_would_lose_the_tower_is_refused(kind: str, tmp_path: Path) -> None:
    """Before anything is written, with what can be done instead. Caught: `pretrain` refused once its directory was made."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    base, other, rows = made(tmp_path / "base", kind), made(tmp_path / "other", kind), write_rows(tmp_path / "rows.jsonl", "one two")
    words = (
        f"finetune full --checkpoint_dir {base} --data {rows} --out_dir {tmp_path / 'out'}",
        f"pretrain --checkpoint_dir {base} --data {text} --out_dir {tmp_path / 'out'}",
        f"combine {base} {other} --out_dir {tmp_path / 'out'}",
        f"convert {base} --to hf --out_dir {tmp_path / 'out'}",
    )
    for each in words:
        said = refused(each.split())
        assert f"inside a {kind}" in said and "merge_lora" in said
        assert not (tmp_path / "out").exists()


def test_other_models_of_text_and_more_are_refused_by_name() -> None:
    inside = tiny_hf_config("llama")
    for config in (
        {"model_type": "llava", "text_config": inside},
        {"model_type": "gemma3", "text_config": {**inside, "model_type": "llama"}},
    ):
        with pytest.raises(UserError, match="text and more"):
            config_from_hf(config, "config.json")
    with pytest.raises(UserError, match="quantised") as found:
        config_from_hf({"model_type": "mistral3", "text_config": {}, "quantization_config": {"quant_method": "gptq"}}, "config.json")
    assert "quantization_config" in found.value.where


def test_what_changes_stands_where_transformers_looks() -> None:
    """An untied head is said by the whole, the number of layers by the text model."""
    values = {"model_type": "gemma3", "eos_token_id": 1, "text_config": {"num_hidden_layers": 2}}
    changed = with_changes(values, {"num_hidden_layers": 3, "tie_word_embeddings": False, "bos_token_id": 7})
    assert changed["text_config"]["num_hidden_layers"] == 3
    assert changed["tie_word_embeddings"] is False and "bos_token_id" not in changed and changed["text_config"]["bos_token_id"] == 7
    plain = json.loads(json.dumps(with_changes({"model_type": "llama"}, {"num_hidden_layers": 3})))
    assert plain == {"model_type": "llama", "num_hidden_layers": 3}
