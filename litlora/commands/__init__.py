"""The list of commands. One word = one command = one file in this room = one function of the same name.

Nothing is imported until it runs: a command is named here by its module, and its options by their dataclass.
"""

from typing import NamedTuple


class Command(NamedTuple):
    help: str  # one line
    module: str  # where the function is
    function: str
    options: str  # the dataclass in options.py
    first: str = ""  # in train/before.py: what looks at the options before `module` is imported, and torch with it


def finetune(help: str, options: str) -> Command:
    return Command(help, "litlora.commands.finetune", "finetune", options, first="check_paths")


def estimate(help: str, options: str) -> Command:
    return Command(help, "litlora.commands.estimate", "estimate", options, first="check_files")


def data(help: str, options: str) -> Command:
    return Command(help, "litlora.commands.data", "data", options)


Commands = dict[str, "Command | Commands"]

COMMANDS: Commands = {
    "finetune": {
        "lora": finetune("LoRA and DoRA: small matrices beside the frozen weights; where to start", "FinetuneLoRA"),
        "adapter": finetune("bottlenecks, a learnt prompt, or scales and shifts; --adapter.kind says which", "FinetuneAdapter"),
        "pro": finetune("LLaMA-Pro: new blocks between the frozen ones, for new knowledge", "FinetunePro"),
        "freeze": finetune("some layers and modules of the model itself, the rest frozen", "FinetuneFreeze"),
        "full": finetune("every parameter; needs the most memory, and each step is a whole model", "FinetuneFull"),
    },
    "estimate": {
        "lora": estimate("memory and time that finetune lora would take", "FinetuneLoRA"),
        "adapter": estimate("the same of finetune adapter", "FinetuneAdapter"),
        "pro": estimate("the same of finetune pro", "FinetunePro"),
        "freeze": estimate("the same of finetune freeze", "FinetuneFreeze"),
        "full": estimate("the same of finetune full", "FinetuneFull"),
    },
    "pretrain": Command(
        "train a small model from nothing, or a given one further", "litlora.commands.pretrain", "pretrain", "Pretrain", first="check_paths"
    ),
    "data": {
        "inspect": data("formats, lengths, the graded share, rows as the model sees them", "InspectData"),
        "validate": data("every row that cannot be used, with its place and the reason", "ValidateData"),
    },
    "merge_lora": Command(
        "write a plain Hugging Face model with what was trained merged in", "litlora.commands.merge_lora", "merge_lora", "MergeLoRA"
    ),
    "combine": Command("one checkpoint of several: averages, sums, soups, TIES, DARE", "litlora.commands.combine", "combine", "Combine"),
    "expand": Command("a deeper model that computes the same, for finetune pro", "litlora.commands.expand", "expand", "Expand"),
    "extend_vocab": Command(
        "a base whose tokenizer knows more tokens, for another language", "litlora.commands.extend_vocab", "extend_vocab", "ExtendVocab"
    ),
    "convert": Command(
        "a model or an adapter in another format: hf, peft, litlora, gguf", "litlora.commands.convert", "convert", "Convert"
    ),
    "download": Command("a base from Hugging Face: the files that litlora reads", "litlora.commands.download", "download", "Download"),
    "generate": Command("answer one prompt, or many", "litlora.commands.generate", "generate", "Generate"),
    "chat": Command("talk to a model in the terminal", "litlora.commands.chat", "chat", "Chat"),
    "inspect": Command("what a path is, and what its training changed", "litlora.commands.inspect", "inspect", "Inspect"),
    "verify": Command("is it whole, is its base the same, does it compute what it should", "litlora.commands.verify", "verify", "Verify"),
    "diff": Command("how two checkpoints differ, module by module", "litlora.commands.diff", "diff", "Diff"),
    "list": Command("a run's checkpoints in a table", "litlora.commands.list", "list_run", "ListSteps"),
    "note": Command("write a note about a checkpoint", "litlora.commands.note", "note", "WriteNote"),
    "evaluate": Command("loss, perplexity and exact match on rows", "litlora.commands.evaluate", "evaluate", "Evaluate"),
}
