"""Models of text and images: their text model is read, trained and merged; everything else in their files stays as it is.

Such a config.json has the text model's in `text_config`. The weights are spelt in two ways, by age: `language_model.model.layers...` or
`model.language_model.layers...`; both are read, and a merge keeps what the base has.
"""

from collections.abc import Mapping
from typing import Any

from litlora.config import Config

WRAPPED = {"gemma3": "gemma3_text", "mistral3": "mistral"}  # model type -> its text model's
OLD, NEW = "language_model.", "model.language_model."
INSIDE = "text_config"
TIED = "tie_word_embeddings"  # transformers looks at the whole's alone
OF_THE_WHOLE = (  # what may stand beside text_config, and then counts
    TIED,
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "quantization_config",
    "dtype",
    "torch_dtype",
)


def is_wrapped(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of such a model."""
    kind, inside = values.get("model_type"), values.get(INSIDE)
    return isinstance(kind, str) and isinstance(inside, Mapping) and inside.get("model_type", WRAPPED.get(kind)) == WRAPPED.get(kind, "")


def text_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's config.json."""
    above = {key: values[key] for key in OF_THE_WHOLE if values.get(key) is not None}
    return {**values[INSIDE], **above, "model_type": WRAPPED[values["model_type"]]}


def with_changes(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with keys of the text model changed, where they stand."""
    if not is_wrapped(values):
        return {**values, **changes}
    above = {key: value for key, value in changes.items() if key in OF_THE_WHOLE and (key == TIED or values.get(key) is not None)}
    return {**values, INSIDE: {**values[INSIDE], **changes}, **above}


def text_name(name: str) -> str:
    """The parameter of the text model that a tensor of the whole belongs to, as the text model alone would store it; others as they are."""
    for start in (NEW, OLD + "model."):
        if name.startswith(start):
            return "model." + name.removeprefix(start)
    return name.removeprefix(OLD)


def whole_name(name: str) -> str:
    """The inverse, in the newer spelling."""
    return NEW + name.removeprefix("model.") if name.startswith("model.") else name


def spelt_as(name: str, example: str) -> str:
    """A name in the newer spelling, in that of another tensor of the text model."""
    if not example.startswith(OLD):
        return name
    return OLD + ("model." + name.removeprefix(NEW) if name.startswith(NEW) else name)


def is_beside(name: str, config: Config) -> bool:
    """Whether a tensor of the files is none of the text model: of a vision tower, or what joins the two."""
    return bool(config.text_of) and not text_name(name).startswith(("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."))
