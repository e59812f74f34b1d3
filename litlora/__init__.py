"""litlora: a lightweight GPT with LoRA built in, whose intermediate checkpoints are first-class.

    from litlora import GPT, generate

    model = GPT.from_pretrained("base")
    print(generate(model, prompt="Once upon a time", adapter_path="out/step-200"))

Importing litlora is quick: torch is imported when a model is first used.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from litlora.config import Config as Config
    from litlora.model import GPT as GPT

__all__ = ["GPT", "Config", "__version__", "generate", "load"]
__version__ = "0.1.0"

_HOMES = {"GPT": "litlora.model", "Config": "litlora.config"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'litlora' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


def load(
    path: str | Path | None = None,
    *,
    base_dir: str | Path | None = None,
    dtype: "torch.dtype | None" = None,
    adapters: Mapping[str | Path, float] | None = None,
    quantize: str = "auto",
) -> "GPT":
    """The model at `path`: a Hugging Face directory, a step, a run (None: the run in `out`, else the demo base).

    `adapters` maps more adapters to the weights with which they are added. `dtype` None keeps the weights' own. `quantize`: bf16, int8,
    nf4, nf4-dq or none; auto is what the step was trained on.
    UserError where a path is none of these, or anything in it does not fit.
    """
    from litlora.checkpoint.resolve import resolve
    from litlora.checkpoint.weights import load_model, quantize_meant

    checkpoint = resolve(path, base_dir=base_dir)
    added = [(resolve(adapter, base_dir=checkpoint.base().path), weight) for adapter, weight in (adapters or {}).items()]
    on = [*([] if checkpoint.is_model else [checkpoint]), *(adapter for adapter, _ in added)]
    model = load_model(checkpoint, dtype=dtype, adapters=added, quantize=quantize_meant(quantize, on))
    model.checkpoint = checkpoint
    return model


def generate(
    model: "GPT",
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    adapter_path: str | Path | None = None,
    adapter_weight: float = 1.0,
    system: str | None = None,
    raw: bool = False,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 1234,
    prompt_lookup: int = 0,
) -> str:
    """The answer of `model`, which GPT.from_pretrained or load made, to `prompt`: a text, or messages with `role` and `content`.

    adapter_path: a step, a run or a PEFT adapter of the same base, counted `adapter_weight` times on top of what the model
        carries; it is taken off again afterwards, also after an exception.
    system, raw: a system prompt; or no chat template at all: the text is gone on with.
    The others sample as `litlora generate` does; temperature 0 takes the likeliest token each time.

    UserError where something does not fit; nothing was computed then.
    """
    from litlora.commands.generate import answer_once
    from litlora.options import SamplingOptions

    sampling = SamplingOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=[stop] if isinstance(stop, str) else list(stop),
        seed=seed,
        prompt_lookup=prompt_lookup,
    )
    adapter = None if adapter_path is None else (adapter_path, adapter_weight)
    return answer_once(model, prompt, adapter, sampling, system=system, raw=raw)
