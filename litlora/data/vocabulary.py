"""A vocabulary for a model trained from nothing: byte-level BPE, and the files in which it is kept.

Every byte is a token, so no text is unknown. Digits stand alone, so a number is copied digit by digit. The splitting
rule is SmolLM's (digits, then GPT-2's words), which llama.cpp and transformers both know by name.
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from litlora.tokenizer import FILES

END = "<|end|>"  # ends a document and a turn: one token to learn to stop with
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
SPECIAL_TOKENS = (END, *ROLES)  # ids 0, 1, 2, 3

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE of at most `vocab_size` tokens from `texts` (Sennrich et al. 2016, arXiv:1508.07909).

    `vocab_size` counts the 256 bytes and the four special tokens; little text gives fewer tokens than asked for.
    """
    assert vocab_size >= 256 + len(SPECIAL_TOKENS), vocab_size
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, max_length: int, chat_template: str = CHAT_TEMPLATE) -> dict[str, bytes]:
    """The files, by name, that transformers, vLLM and llama.cpp read; `max_length` is the model's context in tokens.

    The chat template is written twice: old readers look into tokenizer_config.json, new ones for chat_template.jinja.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": END,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": chat_template,
    }
    vocabulary, settings, template = FILES
    return {
        vocabulary: tokenizer.to_str(pretty=True).encode() + b"\n",
        settings: json.dumps(config, indent=2).encode() + b"\n",
        template: chat_template.encode(),
    }
