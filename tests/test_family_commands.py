"""The commands on bases of other families, as typed: what each writes is read by transformers and PEFT under the names that it had.

(The arithmetic of the families: test_parity.py; the commands themselves, on a Llama: a file each.)
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY, shared_data, tiny_gpt, transformers_model
from safetensors.torch import load_file
from talkers import SIZE, byte_tokenizer
from test_finetune import SMALL, apart, did, write_rows

from litlora import GPT
from litlora.checkpoint import names
from litlora.families import linear_shapes, stored_name

# What is peculiar: phi: names, a head with a bias. pythia: names, grouped q k v, embed_out. gemma2: norms that are stored as gain - 1.
# phi3: fused. cohere2: no positions in some layers, a tied head. glm4: norms after. olmo: norms without parameters.
# mixtral, qwen3_moe: experts. gpt_oss: experts in one tensor, sinks. deepseek: latents, experts in groups, layers without.
FAMILIES = ("phi", "pythia", "gemma2", "phi3", "cohere2", "glm4", "olmo", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3")
families = pytest.mark.parametrize("family", [pytest.param(name, marks=() if name == "phi" else pytest.mark.slow) for name in FAMILIES])
WORDS = f"{SMALL} --train.max_steps 4 --train.save_interval 2 --eval.interval 4 --precision fp32"
TEXT = "the quick brown fox jumps over the lazy dog. " * 30


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", "one two three four five six")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As transformers saves them, in shards, with a tokenizer of bytes; its last rows have no token."""
    path, made = tmp_path_factory.mktemp("bases"), {}
    for family in FAMILIES:
        assert family in EVERY
        sizes: dict[str, Any] = {"vocab_size": 288, "max_position_embeddings": 128, "eos_token_id": 257}
        if family == "qwen3_moe":
            sizes["mlp_only_layers"] = []  # PEFT takes the names of a plain layer's MLP for those of experts
        transformers_model(family, tiny_gpt(family, **sizes), **sizes).save_pretrained(path / family, max_shard_size="60KB")
        made[family] = byte_tokenizer(path / family)
    return made


def theirs(directory: Path) -> Any:
    """The model that transformers makes of a directory, in which it finds every tensor it looks for, and no other."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(directory.glob("model*.safetensors")) for name, tensor in load_file(path).items()}


def trained(words: str, base: Path, rows: Path, out: Path) -> Path:
    """The last step of a run of four."""
    did(f"{words} --checkpoint_dir {base} --data {rows} --out_dir {out} {WORDS}".split())
    return out / names.step_name(4)


@families
def test_lora_is_peft_s_and_merges(family: str, bases: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    """N02, N05, A07. Targets are named as the family names its modules. Must catch: a name of Llama's written for PEFT."""
    from peft import PeftModel

    base = bases[family]
    config = GPT.from_pretrained(base).config
    plain = "self_attn" if config.n_shared_experts else ""  # of the rest PEFT takes the plain layers' for those of experts
    last = [stored_name(name, config).rpartition(".")[2] for name in linear_shapes(config) if f"layers.0.{plain}" in name]
    step = trained(f"finetune lora --lora.r 4 --lora.target_modules {' '.join(dict.fromkeys(last))}", base, rows, tmp_path / "out")
    merged = tmp_path / "merged"
    did(["merge_lora", str(step), "--out_dir", str(merged), "--verify", "full"])
    did(["verify", str(step)])
    did(["verify", str(merged)])
    ours = GPT.from_pretrained(step).eval()
    assert apart(ours, theirs(merged)) <= 1e-5
    assert apart(ours, PeftModel.from_pretrained(theirs(base), step).eval()) <= 1e-5
    assert apart(ours, theirs(base)) > 1e-3
    assert stored(merged).keys() == stored(base).keys()
    found = json.loads(did(["diff", str(step), str(merged), "--json"]))
    assert found["equal"], found


@families
def test_full_and_further_pretraining_write_whole_models(family: str, bases: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    """A07: their steps are directories of Hugging Face's with the base's names."""
    base, text = bases[family], tmp_path / "text.txt"
    text.write_text(TEXT)
    for words, data in (("finetune full", rows), ("pretrain --train.max_seq_length 40", text)):
        step = trained(words, base, data, tmp_path / words.split()[0])
        did(["verify", str(step)])
        assert stored(step).keys() == stored(base).keys()
        assert apart(GPT.from_pretrained(step).eval(), theirs(step)) <= 1e-5
        assert apart(theirs(base), theirs(step)) > 1e-3


@families
def test_new_blocks_learn_and_merge(family: str, bases: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    """N07. `expand` first, so that the deeper base is one of transformers' too; and at once."""
    base, deep, merged = bases[family], tmp_path / "deep", tmp_path / "merged"
    did(["expand", str(base), "--n_insert", "1", "--out_dir", str(deep)])
    assert apart(theirs(deep), theirs(base)) == 0
    step = trained("finetune pro --pro.n_insert 2", base, rows, tmp_path / "out")
    did(["merge_lora", str(step), "--out_dir", str(merged)])
    did(["verify", str(merged)])
    assert apart(GPT.from_pretrained(step).eval(), theirs(merged)) <= 1e-5
    assert apart(theirs(merged), theirs(base)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_experts_in_bf16_from_real_rows_to_an_answer(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """A step of real rows, gone on with, merged and proven in bf16, said the same words by as PEFT's and transformers' models do."""
    rows, base, run = shared_data("instruct/alpaca_en_demo.json"), tmp_path / "base", tmp_path / "out"
    theirs(bases[family]).to(torch.bfloat16).save_pretrained(base)
    byte_tokenizer(base)
    words = f"finetune lora --checkpoint_dir {base} --data {rows} --out_dir {run} --train.max_seq_length 100 --train.global_batch_size 4"
    words += " --train.save_interval 2 --train.lr 1e-2 --eval.max_samples 4 --threads 1"
    did([*words.split(), "--train.max_steps", "2"])
    did([*words.split(), "--train.max_steps", "4", "--resume"])
    step = run / names.step_name(4)
    did(["merge_lora", str(step), "--verify", "full"])
    for path in (step, step / names.MERGED):
        assert "FAILED" not in did(["verify", str(path)])
    said = [
        did(f"generate {path} --prompt Hello --max_new_tokens 8 --temperature 0 --precision fp32".split())
        for path in (step, step / names.MERGED)
    ]
    assert said[0] == said[1] != ""
    assert did(["chat", str(step), "--max_new_tokens", "4"], stdin="Hello\n")
    assert apart(GPT.from_pretrained(step / names.MERGED, dtype=torch.float32).eval(), theirs(step / names.MERGED)) <= 1e-5


@families
def test_a_larger_vocabulary_gives_old_text_its_logits(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Must catch: a head's bias (phi) that does not grow with its matrix."""
    base, out, text = bases[family], tmp_path / "out", tmp_path / "text.txt"
    text.write_text(TEXT)
    did(["extend_vocab", str(base), "--data", str(text), "--vocab_size", "300", "--out_dir", str(out)])
    before, after = theirs(base), theirs(out)
    assert apart(GPT.from_pretrained(out).eval(), after) <= 1e-5
    tokens = torch.arange(40)[None] % SIZE
    with torch.no_grad():
        assert torch.equal(after(tokens).logits[..., :SIZE], before(tokens).logits[..., :SIZE])
    assert after.config.vocab_size > 288


@families
def test_averages_of_models_and_of_steps(family: str, bases: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    """Half of a model and half of another, parameter by parameter; and of two steps of LoRA, which PEFT reads."""
    from peft import PeftModel

    base = bases[family]
    whole, out = trained("finetune full", base, rows, tmp_path / "full"), tmp_path / "average"
    did(["combine", str(base), str(whole), "--out_dir", str(out)])
    first, second, mean = stored(base), stored(whole), stored(out)
    assert mean.keys() == first.keys() == second.keys()
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)
    theirs(out)
    targets = "o_proj" if family.startswith("deepseek") else "all-linear"  # PEFT takes plain layers' matrices for those of experts
    lora = trained(f"finetune lora --lora.r 2 --lora.target_modules {targets}", base, rows, tmp_path / "lora")
    did(["combine", str(lora.with_name("step-2")), str(lora), "--out_dir", str(tmp_path / "both")])
    assert apart(GPT.from_pretrained(tmp_path / "both").eval(), PeftModel.from_pretrained(theirs(base), tmp_path / "both").eval()) <= 1e-5
