"""What a method does to a model, resolved to the last name: adapters in slots, new blocks after blocks, parameters trained whole.

Every method comes down to a `Tuning`; attaching, saving, loading, composing and merging know nothing else. No torch here: a merge
needs the names and shapes alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from litlora.config import Config, expanded_config
from litlora.errors import UserError
from litlora.families import expected_tensors, linear_shapes, stored_name, with_biases
from litlora.peft import to_peft_name
from litlora.peft.targets import modules_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Shapes = dict[str, tuple[int, ...]]


# ---- what sits in a slot -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoRASlot:
    """`Q.adapter` of a Linear Q: LoRA, or DoRA. `start` other than default: what A and B are at first (PiSSA: what is subtracted)."""

    r: int
    alpha: float
    dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    init: str = "default"

    merges = True

    def shapes(self, out: int, into: int) -> Shapes:
        r = 2 * self.r if self.init == "pissa" else self.r
        return {"lora_A": (r, into), "lora_B": (out, r)} | ({"magnitude": (out,)} if self.use_dora else {})


@dataclass(frozen=True, kw_only=True)
class ScaleShiftSlot:
    """`Q.adapter` of a Linear Q: LLaMA-Adapter v2."""

    merges = True

    def shapes(self, out: int, into: int) -> Shapes:
        return {"scale": (out,), "shift": (out,)}


@dataclass(frozen=True, kw_only=True)
class BottleneckSlot:
    """`A.adapter` of an attention or an MLP: series (after it) or parallel (beside it)."""

    parallel: bool
    width: int
    scale: float
    activation: str

    merges = False

    def shapes(self, out: int, into: int) -> Shapes:
        w = self.width
        return {"down.weight": (w, into), "down.bias": (w,), "up.weight": (out, w), "up.bias": (out,)}


@dataclass(frozen=True, kw_only=True)
class PromptSlot:
    """`A.prompt` of an attention: LLaMA-Adapter v1."""

    length: int

    merges = False

    def shapes(self, out: int, into: int) -> Shapes:
        return {"adaption_prompt": (1, self.length, into), "adaption_gate": (1,)}


Slot = LoRASlot | ScaleShiftSlot | BottleneckSlot | PromptSlot


# ---- a tuning ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is added to a model, and what of its own is trained."""

    slots: Mapping[str, Slot] = field(default_factory=dict)  # model.layers.0.self_attn.q_proj.adapter -> what sits in it
    inserted: tuple[int, ...] = ()  # layers of the base that a new block follows, ascending
    whole: tuple[str, ...] = ()  # parameters of the base that are trained themselves, in its order
    untied: bool = False  # the head was the embedding's own matrix, and has one of its own now
    in_peft: bool = False  # whether its file is one that PEFT reads

    def __post_init__(self) -> None:
        both = [host for slot in self.slots if f"{(host := slot.rpartition('.')[0])}.weight" in self.whole]
        if both:
            raise UserError(f"{both[0]} would carry an adapter and be trained whole as well", hint="leave it out of one of the two")

    def parameters(self, config: Config) -> Shapes:
        """Every parameter that learns, and so is saved: its name in the model that carries the tuning, and its shape.

        `config` is the base's. PiSSA's A and B have here the rank they are stored with, twice the trained one.
        """
        base, linears = expected_tensors(self.carrying(config)), linear_shapes(config)
        shapes: Shapes = {}
        for slot, kind in self.slots.items():  # an attention, an MLP or experts as a whole go from C to C
            out, into = linears.get(slot.rpartition(".")[0], (config.hidden_size, config.hidden_size))
            shapes |= {f"{slot}.{part}": shape for part, shape in kind.shapes(out, into).items()}
        for layer in self.inserted:
            own = f"model.layers.{layer}."
            shapes |= {own + "inserted." + name.removeprefix(own): shape for name, shape in base.items() if name.startswith(own)}
        return shapes | {name: base[name] for name in self.whole}

    @property
    def looked_at(self) -> tuple[str, ...]:
        """Weights of the base that it needs wide at every token, or replaces: those that DoRA measures, and what was trained whole."""
        measured = (slot.rpartition(".")[0] for slot, kind in self.slots.items() if isinstance(kind, LoRASlot) and kind.use_dora)
        return (*self.whole, *(f"{host}.weight" for host in measured))

    def carrying(self, config: Config) -> Config:
        """The base's Config with its head separated, where this tuning separates it."""
        return replace(config, tie_word_embeddings=False) if self.untied else config

    def file_names(self, config: Config) -> dict[str, str]:
        """The tensors of its file: the name there -> the parameter. PEFT has a shared matrix twice, under both its names."""
        names = {self.file_name(name, config): name for name in self.parameters(config)}
        if self.in_peft and EMBEDDING in self.whole and self.carrying(config).tie_word_embeddings:
            names[to_peft_name(stored_name(HEAD, config))] = EMBEDDING
        return names

    def file_name(self, parameter: str, config: Config) -> str:
        """Whatever is for PEFT carries the names of the family; our own files the model's."""
        return to_peft_name(stored_name(parameter, config)) if self.in_peft else parameter

    def file_shapes(self, config: Config) -> Shapes:
        """The same with shapes: what must be in the file, and nothing else."""
        shapes = self.parameters(config)
        return {stored: shapes[name] for stored, name in self.file_names(config).items()}


def whole_parameters(modules: Iterable[str], config: Config) -> tuple[str, ...]:
    """The parameters of `modules`, in the model's order; a head that is the embedding is named as the embedding."""
    tensors = expected_tensors(config)
    chosen = set(modules)
    if config.tie_word_embeddings and "lm_head" in chosen:
        chosen.add(EMBEDDING.removesuffix(".weight"))
    return tuple(name for name in tensors if not chosen.isdisjoint(modules_of([name])))


# ---- folded into the base ----------------------------------------------------------------------------------------------


def why_unmergeable(tuning: Tuning, config: Config) -> str:
    """Why no plain model computes the same, in words that go on with "it cannot be merged: "; empty where one does."""
    for slot, kind in tuning.slots.items():
        if not kind.merges:
            what = "a learnt prompt" if isinstance(kind, PromptSlot) else "a bottleneck with an activation"
            return f"{what} at {slot.rpartition('.')[0]} computes more than weights can hold"
    if "lm_head.adapter" in tuning.slots and tuning.carrying(config).tie_word_embeddings:
        return "the head is the embedding's own matrix, which would change as well"
    shifted = shifted_modules(tuning)
    if shifted and with_biases(config, shifted) is None:
        return f"a {config.model_type} model has no place for the shifts: its config.json cannot say that each of these has a bias"
    return ""


def why_misread(tuning: Tuning, config: Config) -> str:
    """Why PEFT would compute something else with its file; empty where it does not.

    PEFT 0.21 goes by the last word of a target: where transformers holds a layer's experts in one tensor, it takes gate_proj, up_proj and
    down_proj of any module for theirs.
    """
    if config.num_experts and config.mlp != "stacked":
        for slot in tuning.slots:
            if ".mlp." in slot and ".experts." not in slot:
                return (
                    f"it takes {stored_name(slot.removesuffix('.adapter'), config)}, which every token goes through, for one of the experts"
                )
    return ""


def merged_config(tuning: Tuning, config: Config) -> Config:
    """The shape of the plain model that computes what the base with the tuning on it does."""
    config = tuning.carrying(config)
    shifted = shifted_modules(tuning)
    if shifted:
        biased = with_biases(config, shifted)
        assert biased is not None, why_unmergeable(tuning, config)
        config = biased
    return expanded_config(config, tuning.inserted)


def shifted_modules(tuning: Tuning) -> list[str]:
    return [slot.rpartition(".")[0] for slot, kind in tuning.slots.items() if isinstance(kind, ScaleShiftSlot)]


def merged_name(name: str, places: Mapping[tuple[int, bool], int]) -> str:
    """A parameter's name in the deeper model; `places`: what `merged_layers` lists -> its number there."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return name
    is_new = parts[3] == "inserted"
    return ".".join(["model", "layers", str(places[int(parts[2]), is_new]), *parts[4 if is_new else 3 :]])


def evenly(count: int, n_insert: int) -> tuple[int, ...]:
    """After which of `count` blocks `n_insert` new ones go: after block floor((i + 1) count / n) - 1, as in the paper's figure 2.

    32 blocks and 8 new ones: after 3, 7, ..., 31, so that the new ones are 4, 9, ..., 39 of 40.
    """
    if not 1 <= n_insert <= count:
        raise UserError(f"{n_insert} new blocks do not go between {count}", where="n_insert", hint=f"a number from 1 to {count}")
    return tuple((i + 1) * count // n_insert - 1 for i in range(n_insert))
