"""transformers, from process start to its first token: `python -m extensions.benchmarks.first_token BASE PROMPT [DTYPE]`."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(base: str, prompt: str, dtype: str = "auto") -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        answer = model.generate(**tokens, max_new_tokens=1, do_sample=False)  # type: ignore[misc]
    print(tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
