"""What every tool is given: a base of a true shape with random weights, a fresh adapter, and tokenised samples.

All of it is made from seeds, once, and kept in the work directory. `python -m extensions.benchmarks.artefacts --help`;
the drivers start it in a process of its own, because it needs torch and they do not.
"""

import argparse
import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from extensions.benchmarks.measure import default_work_dir

SEED = 1234
END = "<|endoftext|>"
PROJECTIONS = {  # name of a projection below its block: which sizes it maps from and to
    "self_attn.q_proj": ("hidden", "queries"),
    "self_attn.k_proj": ("hidden", "keys"),
    "self_attn.v_proj": ("hidden", "keys"),
    "self_attn.o_proj": ("queries", "hidden"),
    "mlp.gate_proj": ("hidden", "mlp"),
    "mlp.up_proj": ("hidden", "mlp"),
    "mlp.down_proj": ("mlp", "hidden"),
}


def shape(
    hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, context: int, theta: float, tied: bool, dtype: str
) -> dict[str, Any]:
    """A Hugging Face config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": dtype,
    }


SHAPES = {
    "tiny": shape(48, 2, 3, 1, 96, 320, 256, 10_000.0, True, "float32"),  # for the tests: unlike any real one
    "tiny-bf16": shape(48, 2, 3, 1, 96, 320, 256, 10_000.0, False, "bfloat16"),  # where the matter is how a file is rounded
    "135m": shape(576, 30, 9, 3, 1536, 49_152, 8192, 100_000.0, True, "float32"),  # SmolLM2-135M
    "1.1b": shape(2048, 22, 32, 4, 5632, 32_000, 2048, 10_000.0, False, "bfloat16"),  # TinyLlama-1.1B
    "8b": shape(4096, 32, 32, 8, 14_336, 128_256, 131_072, 500_000.0, False, "bfloat16"),  # Llama-3.1-8B, its rope not stretched
}


def sizes(config: dict[str, Any]) -> dict[str, int]:
    head_dim = config["head_dim"]
    return {
        "hidden": config["hidden_size"],
        "queries": config["num_attention_heads"] * head_dim,
        "keys": config["num_key_value_heads"] * head_dim,
        "mlp": config["intermediate_size"],
    }


def linears(config: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(name, in, out) of every projection of the blocks."""
    width = sizes(config)
    for layer in range(config["num_hidden_layers"]):
        for name, (inner, outer) in PROJECTIONS.items():
            yield f"model.layers.{layer}.{name}", width[inner], width[outer]


def flops_per_token(config: dict[str, Any], graded_share: float, mean_keys: float, r: int) -> float:
    """What LoRA training must multiply and add per real token: forward, and backward without weight gradients of the frozen weights.

    4 N for the blocks' matrices, 4 H f for the head on the graded share f, 3.5 forward passes of attention over
    `mean_keys` keys, 6 P for the adapters.
    """
    blocks = sum(inner * outer for _, inner, outer in linears(config))
    adapters = sum(r * (inner + outer) for _, inner, outer in linears(config))
    head = config["vocab_size"] * config["hidden_size"]
    attention = 4 * mean_keys * sizes(config)["queries"] * config["num_hidden_layers"]
    return 4 * blocks + 4 * head * graded_share + 3.5 * attention + 6 * adapters


# ---- making them -----------------------------------------------------------------------------------------------------


def make_base(path: Path, config: dict[str, Any], tokenizer: Path | None) -> None:
    """A Hugging Face directory with random weights: normal(0, 0.02), norm gains around one."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(SEED)
    dtype = getattr(torch, config["torch_dtype"])

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).mul_(config["initializer_range"]).to(dtype)

    def gain() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(config["hidden_size"], generator=generator)).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], config["hidden_size"])}
    for name, inner, outer in linears(config):
        tensors[f"{name}.weight"] = normal(outer, inner)
    for layer in range(config["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = gain()
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"] = gain()
    tensors["model.norm.weight"] = gain()
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], config["hidden_size"])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=1))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}))
    if tokenizer is None:
        make_tokenizer(path)
    else:
        copy_tokenizer(tokenizer, path, config["vocab_size"])


def copy_tokenizer(source: Path, path: Path, vocab: int) -> None:
    """A tokenizer without what somebody's training left in it: padding and cutting to a length, tokens that the base has no row for.

    litgpt does as the file says, and would pad a prompt of 8 tokens to 192.
    """
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer |= {"padding": None, "truncation": None}
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < vocab]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    known = {
        key: settings[key] for key in ("tokenizer_class", "bos_token", "eos_token", "add_bos_token", "add_prefix_space") if key in settings
    }
    (path / "tokenizer_config.json").write_text(json.dumps(known))


def make_tokenizer(path: Path) -> None:
    """A small byte-level tokenizer, learnt from this file: for the smoke mode, which has no other."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "add_bos_token": False}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def make_adapter(path: Path, config: dict[str, Any], r: int, alpha: float) -> None:
    """A fresh LoRA in PEFT's format: A uniform in +-sqrt(1 / in) as PEFT and litgpt draw it, B zero."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(SEED + 1)
    tensors = {}
    for name, inner, outer in linears(config):
        bound = math.sqrt(1 / inner)  # kaiming_uniform with a = sqrt(5)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.empty(r, inner).uniform_(-bound, bound, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(outer, r)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "../base",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.split(".")[1] for name in PROJECTIONS],
    }
    (path / "adapter_config.json").write_text(json.dumps(settings, indent=1))


def alpaca_samples(rows: Path, tokenizer: Path, count: int, longest: int, grade: str) -> list[dict[str, Any]]:
    """`count` rows of an Alpaca file, drawn by seed, in the Alpaca prompt, with an end token."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = encoder.token_to_id(END)
    end = encoder.token_to_id("</s>") if end is None else end
    chosen = json.loads(rows.read_text())
    random.Random(SEED).shuffle(chosen)
    samples = []
    for row in chosen[:count]:
        asked = encoder.encode(alpaca_prompt(row), add_special_tokens=False).ids
        answer = [*encoder.encode(row["output"], add_special_tokens=False).ids, end]
        graded = [False] + [grade == "all"] * (len(asked) - 1) + [True] * len(answer)
        samples.append({"ids": (asked + answer)[:longest], "graded": graded[:longest]})
    assert len(samples) == count, f"{rows.name} has {len(samples)} rows, {count} are needed"
    return samples


def alpaca_prompt(row: Mapping[str, str]) -> str:
    """As github.com/tatsu-lab/stanford_alpaca has it."""
    more, given = "", ""
    if row.get("input"):
        more, given = ", paired with an input that provides further context", f"### Input:\n{row['input']}\n\n"
    return (
        f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"
    )


def random_samples(count: int, vocab: int, longest: int, grade: str) -> list[dict[str, Any]]:
    """Samples of random ids and uneven lengths: for the smoke mode, which has no rows."""
    chance = random.Random(SEED)
    samples = []
    for _ in range(count):
        length = chance.randint(longest // 4, longest)
        prompt = length // 2
        graded = [False] + [grade == "all"] * (prompt - 1) + [True] * (length - prompt)
        samples.append({"ids": [chance.randrange(1, vocab) for _ in range(length)], "graded": graded})
    return samples


def alpaca_like(count: int, vocab: int, longest: int = 799, beginning: int = 32) -> list[dict[str, Any]]:
    """Random ids in samples as long as Alpaca-GPT4's: log-normal with a median of 189 tokens and a mean of 234, cut at 799; the same
    beginning, as its template has, and 73% graded."""
    chance = random.Random(SEED)
    first = [chance.randrange(1, vocab) for _ in range(beginning)]
    samples = []
    for _ in range(count):
        length = min(longest, max(beginning + 8, round(chance.lognormvariate(math.log(189), 0.65))))
        prompt = max(beginning, round(0.27 * length))
        ids = first + [chance.randrange(1, vocab) for _ in range(length - beginning)]
        samples.append({"ids": ids, "graded": [False] * prompt + [True] * (length - prompt)})
    return samples


def full_samples(count: int, vocab: int, length: int) -> list[dict[str, Any]]:
    """Random ids, all of one length, all graded."""
    chance = random.Random(SEED)
    return [{"ids": [chance.randrange(1, vocab) for _ in range(length)], "graded": [False] + [True] * (length - 1)} for _ in range(count)]


def once(directory: Path, wanted: dict[str, Any]) -> bool:
    """Is `directory` still to be made? What it was made of is noted inside, by `finish`; anything else is thrown away first."""
    made = directory / "made_of.json"
    if made.is_file() and json.loads(made.read_text()) == wanted:
        return False
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    return True


def finish(directory: Path, wanted: dict[str, Any]) -> None:
    (directory / "made_of.json").write_text(json.dumps(wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--work_dir", type=Path, default=default_work_dir(), help="where the artefacts are kept")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--tokenizer", type=Path, help="directory with a tokenizer.json (default: a tiny one is made)")
    parser.add_argument("--rows", type=Path, help="an Alpaca JSON file (default: random samples)")
    parser.add_argument("--count", type=int, default=0, help="samples; 0: the base alone")
    parser.add_argument("--longest", type=int, default=512, help="longest sample, in tokens; longer ones are cut")
    parser.add_argument("--grade", choices=("all", "answers"), default="all")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32.0)
    args = parser.parse_args()
    config = SHAPES[args.shape]
    base, adapter, samples = (args.work_dir / args.shape / name for name in ("base", "adapter", "samples"))

    wanted: dict[str, Any] = {"config": config, "seed": SEED, "tokenizer": str(args.tokenizer and args.tokenizer.resolve()), "recipe": 2}
    if once(base, wanted):
        make_base(base, config, args.tokenizer)
        finish(base, wanted)
    wanted = {"config": config, "seed": SEED, "r": args.r, "alpha": args.alpha}
    if once(adapter, wanted):
        make_adapter(adapter, config, args.r, args.alpha)
        finish(adapter, wanted)
    if args.count:
        shutil.rmtree(samples, ignore_errors=True)
        samples.mkdir(parents=True)
        if args.rows is None:
            chosen = random_samples(args.count, config["vocab_size"], args.longest, args.grade)
        else:
            chosen = alpaca_samples(args.rows, base, args.count, args.longest, args.grade)
        highest = max(max(sample["ids"]) for sample in chosen)
        assert highest < config["vocab_size"], f"token {highest} is outside the base's vocabulary: choose the tokenizer for {args.shape}"
        (samples / "samples.json").write_text(json.dumps({"samples": chosen}))


if __name__ == "__main__":
    main()
