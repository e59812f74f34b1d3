"""What merging takes of a peer beside its own command line (C4): PEFT has none, and litgpt reads a LoRA of its own layout.

    python -m extensions.benchmarks.run_merge peft BASE ADAPTER OUT
    python -m extensions.benchmarks.run_merge litgpt-adapter LITGPT_BASE ADAPTER OUT PRECISION

The first is a user's script, and is timed. The second writes the PEFT adapter as `litgpt finetune_lora` would have left it, and is not.
"""

import sys
from pathlib import Path


def peft(base: str, adapter: str, out: str) -> None:
    """As PEFT's documentation merges; transformers keeps the dtype of the base's file."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def litgpt_adapter(litgpt_base: str, adapter: str, out: str, precision: str) -> None:
    """A directory with `lit_model.pth.lora`: in fp32 after training in bf16-mixed, litgpt's default, and in bf16 after bf16-true."""
    import json

    import torch
    import yaml
    from litgpt.lora import GPT, Config
    from litgpt.utils import copy_config_files

    from extensions.benchmarks.run_litgpt import load_adapter

    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    options = {"lora_r": settings["r"], "lora_alpha": settings["lora_alpha"], "lora_dropout": 0.0, "lora_head": False}
    options |= dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True)
    with torch.device("meta"):
        model = GPT(Config.from_file(Path(litgpt_base) / "model_config.yaml", **options))
    tensors = {name: torch.empty(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    load_adapter(tensors, Path(adapter))
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}[precision]
    place = Path(out)
    place.mkdir(parents=True)
    torch.save({"model": {name: tensor.to(dtype) for name, tensor in tensors.items()}}, place / "lit_model.pth.lora")
    copy_config_files(Path(litgpt_base), place)
    (place / "hyperparameters.yaml").write_text(yaml.dump({"checkpoint_dir": litgpt_base, "precision": precision, **options}))


if __name__ == "__main__":
    {"peft": peft, "litgpt-adapter": litgpt_adapter}[sys.argv[1]](*sys.argv[2:])
