"""One tool's answers to the prompts of a decoding job, each token with the moment at which it was known.

`python -m extensions.benchmarks.run_decode JOB.json`; the last line of stdout is a JSON object. Each tool by the functions that its own
command line decodes with; none stops at an end token, and what decodes ids to text is left out everywhere.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from extensions.benchmarks.measure import bandwidth, peak_mb, versions

SHOWN = 2048  # logits of the first ids that are compared
Seen = Callable[[int], None]  # told each new token
Decode = Callable[[list[int], int, Seen], None]  # a prompt's ids, how many new ones
Logits = Callable[[list[int], list[int]], torch.Tensor]  # after a prompt computed at once and further ids one by one: (V,)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    decode, logits = {"litlora": litlora, "transformers": transformers, "litgpt": litgpt}[job["tool"]](job)
    decode(job["prompts"][0], 4, lambda token: None)  # whatever is made at the first use
    speeds, answers = [bandwidth()], []
    for prompt in job["prompts"]:
        answers.append(answer(decode, prompt, job["new_tokens"]))
        speeds.append(bandwidth())
    found = {"answers": answers, "bandwidth": [each._asdict() for each in speeds], "peak_mb": peak_mb(), "versions": versions()}
    with torch.inference_mode():
        logged = [logits(prompt, job["forced"]).float().tolist()[:SHOWN] for prompt in job["prompts"]]
    print(json.dumps(found | {"logits": logged}))


def answer(decode: Decode, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    ids: list[int] = []
    moments: list[float] = []
    cpu: list[float] = []

    def seen(token: int) -> None:
        moments.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
        ids.append(token)

    start, start_cpu = time.perf_counter(), time.process_time()
    decode(prompt, new_tokens, seen)
    assert len(ids) == new_tokens, f"{len(ids)} tokens came, {new_tokens} were asked for"
    more = new_tokens - 1
    return {
        "prompt_tokens": len(prompt),
        "ids": ids,
        "first_token_seconds": moments[0],
        "tokens_per_second": more / (moments[-1] - moments[0]),
        "cpu_seconds_per_token": (cpu[-1] - cpu[0]) / more,
    }


def dtype_of(job: dict[str, Any]) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]


def litlora(job: dict[str, Any]) -> tuple[Decode, Logits]:
    from litlora.checkpoint.resolve import resolve
    from litlora.checkpoint.weights import for_answers, load_model
    from litlora.generation import Conversation
    from litlora.options import SamplingOptions
    from litlora.precision import choose_dtype
    from litlora.tokenizer import Tokenizer

    dtype = choose_dtype("auto", "cpu")  # as `litlora generate` does: the peers' precision is not ours
    model = load_model(resolve(job["base"]), dtype=dtype, quantize=job["quantize"], as_stored=for_answers("auto", dtype, "cpu")).eval()
    tokenizer = Tokenizer(Path(job["base"]))

    def decode(prompt: list[int], new_tokens: int, seen: Seen) -> None:
        sampling = SamplingOptions(temperature=0.0, max_new_tokens=new_tokens, prompt_lookup=job["prompt_lookup"])
        take(Conversation(model, tokenizer, ()).ask(prompt, sampling).tokens, new_tokens, seen)

    def logits(prompt: list[int], forced: list[int]) -> torch.Tensor:
        conversation = Conversation(model, tokenizer, ())
        conversation.prefill(prompt)
        return [conversation.step(torch.tensor(token), token)[-1] for token in forced][-1]

    return decode, logits


def take(tokens: Iterable[int], count: int, seen: Seen) -> None:
    for token in itertools.islice(tokens, count):
        seen(token)


def transformers(job: dict[str, Any]) -> tuple[Decode, Logits]:
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype_of(job)).eval()

    class Streamer:
        """generate() gives it the prompt first, then each token."""

        def __init__(self, seen: Seen) -> None:
            self.seen, self.prompt_came = seen, False

        def put(self, value: torch.Tensor) -> None:
            if self.prompt_came:
                self.seen(int(value))
            self.prompt_came = True

        def end(self) -> None: ...

    def decode(prompt: list[int], new_tokens: int, seen: Seen) -> None:
        tokens = torch.tensor([prompt])
        how = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if job["static_cache"]:
            how["cache_implementation"] = "static"
        model.generate(tokens, attention_mask=torch.ones_like(tokens), streamer=Streamer(seen), **how)

    def logits(prompt: list[int], forced: list[int]) -> torch.Tensor:
        size = len(prompt) + len(forced)
        cache: Any = StaticCache(model.config, max_cache_len=size) if job["static_cache"] else DynamicCache(config=model.config)
        parts = [prompt, *([token] for token in forced)]
        return [model(torch.tensor([part]), past_key_values=cache, use_cache=True).logits[0, -1] for part in parts][-1]

    return decode, logits


def litgpt(job: dict[str, Any]) -> tuple[Decode, Logits]:
    import lightning as L
    from litgpt.config import Config
    from litgpt.generate.base import generate_fn
    from litgpt.model import GPT
    from litgpt.utils import load_checkpoint

    fabric = L.Fabric(accelerator="cpu", devices=1, precision={"fp32": "32-true", "bf16": "bf16-true"}[job["precision"]])
    directory = Path(job["litgpt_base"])
    with fabric.init_module(empty_init=True):
        model = GPT(Config.from_file(directory / "model_config.yaml"))
        model.set_kv_cache(batch_size=1)
    model.eval()
    wrapped = fabric.setup_module(model)
    load_checkpoint(fabric, wrapped, directory / "lit_model.pth")

    def room(most: int) -> None:
        """As its command does: a cache of just the length that is needed."""
        with fabric.init_tensor():
            model.max_seq_length = most
            model.set_kv_cache(batch_size=1)

    def decode(prompt: list[int], new_tokens: int, seen: Seen) -> None:
        most = len(prompt) + new_tokens
        room(most)
        found = generate_fn(wrapped, torch.tensor(prompt), most, temperature=0.0, top_k=None, include_prompt=False, include_eos=True)
        for token in found:
            seen(int(token))

    def logits(prompt: list[int], forced: list[int]) -> torch.Tensor:
        room(len(prompt) + len(forced))
        found = wrapped(torch.tensor([prompt]), torch.arange(len(prompt)))
        for place, token in enumerate(forced, len(prompt)):
            found = wrapped(torch.tensor([[token]]), torch.tensor([place]))
        return found[0, -1]

    return decode, logits


if __name__ == "__main__":
    main()
