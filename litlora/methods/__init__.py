"""Methods of fine-tuning: METHODS says what each word after `litlora finetune` means.

tuning.py   what a method does to a model, resolved to the last name (no torch)
attach.py   doing it: attach, save, load, compose, remove
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from litlora.config import Config
from litlora.errors import UserError
from litlora.families import expected_tensors, linear_shapes, stored_name, tensor_name
from litlora.methods.tuning import (
    EMBEDDING,
    HEAD,
    BottleneckSlot,
    LoRASlot,
    PromptSlot,
    ScaleShiftSlot,
    Slot,
    Tuning,
    evenly,
    whole_parameters,
)
from litlora.options import AdapterOptions, FreezeOptions, FullOptions, LoRAOptions, ProOptions
from litlora.peft import AdapterConfig, adapter_config, doubled, rank_and_alpha, targets
from litlora.peft.targets import (
    compiled,
    is_named,
    layer_number,
    layers_meant,
    modules_ending,
    modules_named,
    modules_of,
    named_or_matched,
    shortened,
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One word after `litlora finetune`."""

    options: type  # its dataclass in options.py
    tuning: Callable[[Any, Config], Tuning]  # what its options mean for a base
    rate: float  # the learning rate where none was asked for
    demo_rate: float  # the same for the demo's base, which is 128 wide and takes larger steps


# ---- LoRA --------------------------------------------------------------------------------------------------------------


def lora(options: LoRAOptions, config: Config) -> Tuning:
    """LoRA on the targets, as it is trained. As it is stored, it is what `from_peft` makes of `lora_config`."""
    described = described_lora(options, config)
    if options.init != "default" and options.use_dora:
        raise UserError(f"init {options.init} is not for DoRA", where="use_dora", hint="leave one of the two out")
    shapes = {stored_name(name, config): shape for name, shape in linear_shapes(config).items()}
    odd = [r for name in targets(described, list(shapes)) if (r := rank_and_alpha(described, name)[0]) % 2]
    narrow = [name for name in targets(described, list(shapes)) if rank_and_alpha(described, name)[0] > min(shapes[name])]
    if options.init == "pissa" and narrow:
        what = f"init pissa cannot take more components than {narrow[0]} has: {min(shapes[narrow[0]])}"
        raise UserError(what, where="r", hint="a smaller r, or rank_pattern for these modules")
    if options.init == "orthogonal" and odd:
        raise UserError(f"init orthogonal shares the rank out between A and B, so {odd[0]} must be even", where="r")
    tuning = from_peft(described, config, untied=options.untie)
    return replace(
        tuning, slots={slot: replace(kind, init=options.init) for slot, kind in tuning.slots.items() if isinstance(kind, LoRASlot)}
    )


def lora_config(options: LoRAOptions, config: Config, base_model_name_or_path: str | None = None) -> AdapterConfig:
    """What adapter_config.json says of an adapter that was trained with `options`."""
    described = replace(described_lora(options, config), base_model_name_or_path=base_model_name_or_path)
    return doubled(described) if options.init == "pissa" else described


def described_lora(options: LoRAOptions, config: Config) -> AdapterConfig:
    """PEFT's description of what `options` mean for a base. UserError where a word of them means nothing there."""
    linears, modules = linear_names(config), module_names(config)
    embedding, head = (stored_name(name.removesuffix(".weight"), config) for name in (EMBEDDING, HEAD))
    for word in options.target_modules:
        if is_named(embedding, word):
            hint = f"--lora.modules_to_save {word} trains it whole; leave it out of target_modules"
            raise UserError(f"{word} is an embedding, no Linear, so it carries no LoRA", where="target_modules", hint=hint)
    tied = separated(config, options.untie).tie_word_embeddings
    described = adapter_config(options, linears, module_names=modules, shared=(embedding, head) if tied else ())
    if config.text_of:  # a word alone would mean modules of the vision tower too
        described = replace(described, target_modules=targets(described, linears), layers_to_transform=None)
    for option, table in (("rank_pattern", described.rank_pattern), ("alpha_pattern", described.alpha_pattern)):
        for name in table:
            only = replace(described, rank_pattern={name: 0}, alpha_pattern={})
            if all(rank_and_alpha(only, module)[0] for module in targets(described, linears)):
                raise UserError(f"{name} matches none of the targets", where=option, hint="the end of a target's name, such as down_proj")
    if tied and head in targets(described, linears):
        what = f"LoRA on {head} would have to change the embedding as well: here they are one matrix"
        raise UserError(what, where="target_modules", hint=f"leave {head} out of target_modules, or separate the two: --lora.untie true")
    return described


def from_peft(described: AdapterConfig, config: Config, *, untied: bool | None = None) -> Tuning:
    """What an adapter_config.json means for a base. `untied` None: as PEFT does, who separates a shared head unless told otherwise."""
    modules = module_names(config)
    saved = [tensor_name(name, config) for name in modules_ending(described.modules_to_save, modules)]
    lost = [word for word in described.modules_to_save if not modules_ending([word], modules)]
    if lost:
        hint = "it belongs to another base, or to another kind of model than one that writes"
        raise UserError(f"the base has no module named {', '.join(lost)}", where="modules_to_save", hint=hint)
    refuse_embedding(described, config)
    meant = {tensor_name(name, config): name for name in targets(described, linear_names(config))}  # ours: as the file has it
    if untied is None:
        shared = any(is_named(name, word) for name in saved for word in ("embed_tokens", "lm_head"))
        untied = config.tie_word_embeddings and (("lm_head" in meant) or (shared and not described.ensure_weight_tying))
    slots: dict[str, LoRASlot] = {}
    for module, name in meant.items():
        r, alpha = rank_and_alpha(described, name)
        slots[f"{module}.adapter"] = LoRASlot(
            r=r, alpha=alpha, dropout=described.dropout, use_dora=described.use_dora, use_rslora=described.use_rslora
        )
    return Tuning(slots=slots, whole=whole_parameters(saved, separated(config, untied)), untied=untied, in_peft=True)


def refuse_embedding(described: AdapterConfig, config: Config) -> None:
    """UserError where PEFT would put LoRA on the embedding, as it does on a target of that name."""
    embedding, words = stored_name(EMBEDDING.removesuffix(".weight"), config), described.target_modules
    named = compiled(words).fullmatch(embedding) if isinstance(words, str) else any(is_named(embedding, word) for word in words)
    if named and embedding in targets(described, [*linear_names(config), embedding]):
        raise UserError(
            f"LoRA on {embedding}, which is an embedding, is not supported: only Linear layers carry it",
            where="target_modules",
            hint="merge the adapter into its base with PEFT, or train it anew with embed_tokens in modules_to_save",
        )


def lora_options(tuning: Tuning, config: Config) -> LoRAOptions:
    """The options that mean a tuning of LoRA, as `finetune lora` would be given them: with them training goes on from it."""
    slots = {stored_name(slot.removesuffix(".adapter"), config): kind for slot, kind in tuning.slots.items() if isinstance(kind, LoRASlot)}
    kinds = list(slots.values())
    r, alpha = Counter(kind.r for kind in kinds).most_common(1)[0][0], Counter(kind.alpha for kind in kinds).most_common(1)[0][0]
    saved = [stored_name(name.rpartition(".")[0], config) for name in tuning.whole]
    return LoRAOptions(
        r=r,
        alpha=alpha,
        dropout=kinds[0].dropout,
        target_modules=shortened(list(slots), linear_names(config)),
        rank_pattern=patterns({name: kind.r for name, kind in slots.items()}, r),
        alpha_pattern=patterns({name: kind.alpha for name, kind in slots.items()}, alpha),
        use_dora=kinds[0].use_dora,
        use_rslora=kinds[0].use_rslora,
        modules_to_save=shortened(list(dict.fromkeys(saved)), module_names(config)) if saved else [],
        untie=tuning.untied,
    )


def patterns(values: Mapping[str, float], default: float) -> list[str]:
    """NAME=VALUE words for the modules that have another value than most."""
    found = []
    for value in sorted(set(values.values()) - {default}):
        found += [f"{name}={value:.17g}" for name in shortened([name for name, own in values.items() if own == value], list(values))]
    return found


# ---- the others --------------------------------------------------------------------------------------------------------


def adapter(options: AdapterOptions, config: Config) -> Tuning:
    """Bottlenecks, prompts, or scales and shifts in the chosen layers."""
    layers = layers_meant(options.layers, config.num_hidden_layers, "layers") if options.layers else list(range(config.num_hidden_layers))
    attentions = [f"model.layers.{layer}.self_attn" for layer in layers]
    mlps = [f"model.layers.{layer}.mlp" for layer in layers]
    slots: dict[str, Slot] = {}
    norms: list[str] = []
    if options.kind == "prompt":
        slots = {f"{host}.prompt": PromptSlot(length=options.length) for host in attentions}
    elif options.kind == "scale_shift":
        chosen = [tensor_name(name, config) for name in named_or_matched(options.target_modules, linear_names(config))]
        inside = [name for name in chosen if layer_number(name, ()) in (None, *layers)]
        slots = {f"{name}.adapter": ScaleShiftSlot() for name in inside}
        if options.norms:
            gains = [
                name for name, shape in expected_tensors(config).items() if name.endswith(".weight" if len(shape) == 1 else "_norm.weight")
            ]
            norms = [name.removesuffix(".weight") for name in gains]
            norms = [name for name in norms if layer_number(f"{name}.", ()) in (None, *layers)]
    else:
        parallel = options.kind == "parallel"
        kind = BottleneckSlot(parallel=parallel, width=options.width, scale=options.scale, activation=options.activation)
        hosts = {"attention": attentions, "mlp": mlps, "both": [*attentions, *mlps]}[options.positions]
        slots = {f"{host}.adapter": kind for host in hosts}
    whole, untied = saved_whole(options, config, also=norms)
    top = layers == list(range(layers[0], config.num_hidden_layers))
    return Tuning(slots=slots, whole=whole, untied=untied, in_peft=options.kind == "prompt" and top and not whole and peft_prompts(config))


def refuse_options_of_other_kinds(options: AdapterOptions) -> None:
    """An option that a kind does not have would be recorded, and change nothing."""
    plain = AdapterOptions()
    bottleneck = ("positions", "width", "scale", "activation")
    own = {"prompt": ("length",), "scale_shift": ("target_modules", "norms"), "series": bottleneck, "parallel": bottleneck}
    for kind, names in own.items():
        for name in names:
            if name not in own[options.kind] and getattr(options, name) != getattr(plain, name):
                raise UserError(f"is an option of kind {kind}, and kind is {options.kind}", where=name, hint="leave it out")


def peft_prompts(config: Config) -> bool:
    """Whether PEFT's ADAPTION_PROMPT computes what `Prompt` does: not where it applies the output's bias twice, nor where it counts
    the heads wrong (0.21)."""
    square = config.num_attention_heads * config.head_dim == config.hidden_size
    return config.model_type in ("llama", "mistral") and not config.text_of and square and not config.attention_out_bias


def pro(options: ProOptions, config: Config) -> Tuning:
    """New blocks; or, on a base that `litlora expand` made, the new blocks that it has."""
    whole, untied = saved_whole(options, config)
    if config.llama_pro_layers and not options.positions and options.n_insert is None:
        own = tuple(f"model.layers.{layer}." for layer in config.llama_pro_layers)
        mine = [name for name in expected_tensors(separated(config, untied)) if name.startswith(own) or name in whole]
        return Tuning(whole=tuple(mine), untied=untied)
    return Tuning(inserted=insert_positions(options.n_insert, options.positions, config), whole=whole, untied=untied)


def insert_positions(n_insert: int | None, positions: Sequence[str], config: Config) -> tuple[int, ...]:
    """The base's layers that a new block follows. UserError where both were asked for, or a layer is not there."""
    if positions and n_insert is not None:
        raise UserError("n_insert and positions cannot both be given", where="positions", hint="n_insert spreads blocks evenly")
    if positions:
        return tuple(layers_meant(positions, config.num_hidden_layers, "positions"))
    return evenly(config.num_hidden_layers, n_insert if n_insert is not None else math.ceil(config.num_hidden_layers / 4))


def freeze(options: FreezeOptions, config: Config) -> Tuning:
    """The chosen modules of the chosen layers, and the extra ones outside them."""
    config = separated(config, options.untie)
    layers = layers_meant(options.layers, config.num_hidden_layers, "layers")
    modules = module_names(config)
    within = {name for name in modules if tensor_name(name, config).startswith("model.layers")}
    outside = [name for name in modules if name not in within and not any(other.startswith(f"{name}.layers") for other in modules)]
    inside = [name for name in modules if layer_number(f"{name}.", ()) in layers]
    named = modules_named([word for word in options.modules if word != "all"], inside, "modules") if layers else []
    chosen = inside if "all" in options.modules else named
    extra = modules_named(options.extra_modules, outside, "extra_modules")
    whole = whole_parameters([tensor_name(name, config) for name in (*chosen, *extra)], config)
    if not whole:
        raise UserError("nothing is left to learn: no layer and no extra module is named", where="layers", hint="last:2, for example")
    return Tuning(whole=whole, untied=options.untie)


def full(options: FullOptions, config: Config) -> Tuning:
    """Everything."""
    refuse_part(config, "full writes a whole model")
    return Tuning(whole=tuple(expected_tensors(separated(config, options.untie))), untied=options.untie)


def refuse_part(config: Config, what: str) -> None:
    """UserError where the model is a part of a larger one, whose other weights would be missing in what is written."""
    if config.text_of:
        why = f"{what}, and this is the text model inside a {config.text_of}, whose other weights would be missing in it"
        raise UserError(why, hint="lora, adapter, pro or freeze, and merge_lora, which carries them over")


def linear_names(config: Config) -> list[str]:
    """The Linears as the family calls them: words, patterns and PEFT's files mean these names."""
    return [stored_name(name, config) for name in linear_shapes(config)]


def module_names(config: Config) -> list[str]:
    """The same of every module that has parameters; the head among them, tied or not."""
    return modules_of([stored_name(name, config) for name in (*expected_tensors(config), HEAD)])


def saved_whole(options: AdapterOptions | ProOptions, config: Config, *, also: Sequence[str] = ()) -> tuple[tuple[str, ...], bool]:
    """The parameters that `modules_to_save` (and `also`) mean, and whether the head is separated."""
    config = separated(config, options.untie)
    saved = [tensor_name(name, config) for name in modules_named(options.modules_to_save, module_names(config), "modules_to_save")]
    return whole_parameters([*saved, *also], config), options.untie


def separated(config: Config, untie: bool) -> Config:
    """The base's Config, with a head of its own where that is asked for. UserError where it has one already."""
    if untie and not config.tie_word_embeddings:
        raise UserError("the head of this base is a matrix of its own already", where="untie", hint="leave untie out")
    return replace(config, tie_word_embeddings=config.tie_word_embeddings and not untie)


METHODS: dict[str, Method] = {
    "lora": Method(options=LoRAOptions, tuning=lora, rate=2e-4, demo_rate=1e-3),
    "adapter": Method(options=AdapterOptions, tuning=adapter, rate=1e-3, demo_rate=3e-3),
    "pro": Method(options=ProOptions, tuning=pro, rate=5e-5, demo_rate=1e-3),
    "freeze": Method(options=FreezeOptions, tuning=freeze, rate=2e-5, demo_rate=1e-3),
    "full": Method(options=FullOptions, tuning=full, rate=1e-5, demo_rate=5e-4),
}


def tuning_of(options: Any, config: Config) -> Tuning:
    """What a method's options mean for a base. UserError where that is nothing, or one of them does not go with the others."""
    if isinstance(options, AdapterOptions):
        refuse_options_of_other_kinds(options)  # of what is asked for: a step's record may have another version's defaults
    tuning = next(method for method in METHODS.values() if type(options) is method.options).tuning(options, config)
    if not (tuning.slots or tuning.inserted or tuning.whole):
        raise UserError("nothing is left to learn", where="layers", hint="name targets that lie in these layers")
    return tuning


def stored_tuning(options: Any, config: Config) -> Tuning:
    """The same as its file describes it: of LoRA, what adapter_config.json means."""
    if isinstance(options, LoRAOptions):
        return from_peft(lora_config(options, config), config, untied=options.untie)
    return tuning_of(options, config)


def from_manifest(method: str, options: Mapping[str, Any], config: Config, where: str | Path) -> Tuning:
    """What a step's record of its method means for its base. UserError, naming `where`, of one that this litlora does not know."""
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown", where=where, hint=f"known: {', '.join(METHODS)}; a newer litlora may know it")
    try:
        wanted = METHODS[method].options(**options)
        for field in fields(wanted):
            value, plain = getattr(wanted, field.name), getattr(METHODS[method].options(), field.name)
            if plain is not None and not isinstance(value, (int, float) if type(plain) is float else type(plain)):
                raise TypeError(f"{field.name} is {value!r}")
        return METHODS[method].tuning(wanted, config)
    except UserError as error:
        raise UserError(f"does not fit its base: {error}", where=where) from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"its options are not those of {method}: {error}", where=where) from error
