"""The list of commands. One word = one command = one file in this room = one function of the same name.

Nothing is imported until it runs: a command is named here by its module, and its options by their dataclass.
"""

from typing import NamedTuple


class Command(NamedTuple):
    help: str  # one line
    module: str  # where the function is
    function: str
    options: str  # the dataclass in options.py


Commands = dict[str, "Command | Commands"]

COMMANDS: Commands = {
    "finetune": {
        "lora": Command("LoRA and DoRA: small matrices beside the frozen weights", "litlora.commands.finetune", "finetune", "FinetuneLoRA"),
    },
    "pretrain": Command("train a small model from nothing", "litlora.commands.pretrain", "pretrain", "Pretrain"),
    "merge_lora": Command(
        "write a plain Hugging Face model with the adapter merged in", "litlora.commands.merge_lora", "merge_lora", "MergeLoRA"
    ),
    "generate": Command("answer one prompt, or many", "litlora.commands.generate", "generate", "Generate"),
    "chat": Command("talk to a model in the terminal", "litlora.commands.chat", "chat", "Chat"),
    "evaluate": Command("loss, perplexity and exact match on rows", "litlora.commands.evaluate", "evaluate", "Evaluate"),
}
