"""`litlora evaluate`: loss, perplexity and exact match of a checkpoint on rows, beside its base if asked."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litlora import console
from litlora.checkpoint import names
from litlora.commands.generate import Opened, open_model
from litlora.console import counted, put, put_json
from litlora.data.samples import IGNORE, DataSet, Sample, load_data
from litlora.errors import UserError
from litlora.options import Evaluate, SamplingOptions
from litlora.prompts import Prompts

if TYPE_CHECKING:
    from litlora.generation import Answer


def evaluate(options: Evaluate) -> None:
    """Print one line of figures for the checkpoint, and one for its base alone with `--compare_base`."""
    names = (options.checkpoint_dir, options.base_dir, options.adapter, options.chat_template)
    opened = open_model(options, *names, options.quantize, answers=False)
    samples, source = rows_of(opened, options)
    console.header(
        [
            ("model", str(opened.checkpoint.path) + (f", weights held in {opened.quantize}" if opened.quantize != "none" else "")),
            ("data", source),
        ]
    )
    results = {}
    if options.compare_base:
        from litlora.methods.attach import as_base

        if opened.checkpoint.is_model and not options.adapter:
            raise UserError(
                "is a base itself, so there is nothing to compare it with", where=opened.checkpoint.path, hint="leave --compare_base out"
            )
        with as_base(opened.model):
            results["base"] = figures(opened, samples, options, "base")
    results["model"] = figures(opened, samples, options, "model")
    if options.json:
        put_json(results if options.compare_base else results["model"])
        return
    for name, values in results.items():
        put(line(name, values))


def rows_of(opened: Opened, options: Evaluate) -> tuple[Sequence[Sample], str]:
    """The rows with a line that says whose they are: of `--data`, else those that the step's run held out, else the demo's."""
    context = opened.model.config.max_position_embeddings
    step = opened.checkpoint.path.resolve()
    if not options.data and names.step_number(step) is not None and (step.parent / names.RUN_YAML).is_file():
        held_out, data = rows_of_run(step.parent, opened.prompts, context)
        if held_out:
            samples = held_out[: options.max_samples]
            return samples, f"{counted(len(samples), 'sample')} that the run {opened.checkpoint.path.parent} held out of {', '.join(data)}"
    if not options.data and not opened.base.is_demo:
        console.warn("these are the demo's rows, which say little of another model: --data FILE names yours")
    found = load_data(options.data or ["demo"], opened.prompts, rows=options.rows, max_seq_length=context, heldout=True)
    samples = found.train[: options.max_samples]
    return samples, summary(found, samples)


def rows_of_run(run: Path, prompts: Prompts, context: int) -> tuple[Sequence[Sample], list[str]]:
    """The validation rows of a run, split off as its run.yaml says, and the data that they are of; ([], []) where no command began it."""
    import litlora.options
    from litlora.commands import COMMANDS, Command
    from litlora.parsing import parse
    from litlora.train.paths import found_again
    from litlora.train.run import load_rows

    file = run / names.RUN_YAML
    words = re.search(r"litlora ([\w ]+) --config", file.read_text(encoding="utf-8").partition("\n")[0])  # train/run.py writes it
    command: Any = COMMANDS if words else None
    for word in words[1].split() if words else ():
        command = command.get(word) if isinstance(command, dict) else None
    if words is None or not isinstance(command, Command):
        return [], []
    options = found_again(parse(getattr(litlora.options, command.options), ["--config", str(file)], command=words[1]), run)
    return load_rows(options, prompts, context).validation, options.data if options.eval.data is None else [options.eval.data]


def figures(opened: Opened, samples: Sequence[Sample], options: Evaluate, what: str) -> dict[str, float | int]:
    """loss (nats per graded token), perplexity, graded tokens; nats per graded character, which does not depend on the vocabulary;
    exact_match: the share of answers equal to the row's, end token included."""
    from litlora.train.loss import loss_of_samples

    total, graded = loss_of_samples(opened.model, samples)
    loss = total / graded
    found: dict[str, float | int] = {
        "samples": len(samples),
        "graded_tokens": graded,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
    }
    texts = (opened.prompts.tokenizer.decode(sample.targets[sample.targets != IGNORE].tolist()) for sample in samples)
    characters = sum(map(len, texts))
    if characters:
        found |= {"characters": characters, "nats_per_character": total / characters}
    if options.exact_match:
        from litlora.prompts.channels import channels_of, text_of

        asked = [(sample, split) for sample in samples if (split := last_answer(sample)) is not None]
        if asked:
            answers = answered(opened, [prompt for _, (prompt, _) in asked], options, what)
            prompts = opened.prompts
            how = prompts.tokenizer, prompts.stop_ids, channels_of(prompts)
            answers_of_rows = [text_of(wanted, *how) for _, (_, wanted) in asked]
            right = sum(is_exact(answer, text) for answer, text in zip(answers, answers_of_rows, strict=True))
            found |= {"asked": len(asked), "exact_match": right / len(asked)}
    return found


def answered(opened: Opened, prompts: Sequence[list[int]], options: Evaluate, what: str) -> "list[Answer]":
    """Greedy answers to all prompts, as `litlora generate` gives them."""
    from litlora.generation import generate_batch
    from litlora.prompts.channels import channels_of

    sampling = SamplingOptions(max_new_tokens=options.max_new_tokens, temperature=0.0)
    with console.Progress(len(prompts), f"answers of the {what}") as progress:
        how: dict[str, Any] = {"channels": channels_of(opened.prompts), "done": progress.update}
        return generate_batch(opened.model, opened.prompts.tokenizer, opened.prompts.stop_ids, prompts, sampling, **how)


def last_answer(sample: Sample) -> tuple[list[int], list[int]] | None:
    """A sample as (prompt, the ids of its last answer with the end token); None where nothing stands before what is graded."""
    graded = sample.targets != IGNORE
    end = int(graded.nonzero()[0][-1]) + 1
    start = end
    while start > 0 and graded[start - 1]:
        start -= 1
    prompt = sample.tokens[: start + 1].tolist()
    return (prompt, sample.targets[start:end].tolist()) if start > 0 else None


def is_exact(answer: "Answer", wanted: str) -> bool:
    """Whether the answer ended by itself and reads the same: another way to cut the same text into tokens is no mistake."""
    return answer.finish_reason == "stop" and answer.text == wanted


def summary(data: DataSet, samples: Sequence[Sample]) -> str:
    kinds = ", ".join(dict.fromkeys(data.formats.values()))
    return f"{counted(len(samples), 'sample')} ({kinds}) from {', '.join(data.formats)}"


def line(name: str, values: dict[str, float | int]) -> str:
    parts = [f"loss {values['loss']:.4f}", f"perplexity {values['perplexity']:.3f}"]
    if "characters" in values:
        parts.append(f"{values['nats_per_character']:.4f} nats per character")
    if "exact_match" in values:
        parts.append(f"exact match {values['exact_match']:.1%} of {values['asked']}")
    return f"{name:<6}{'  '.join(parts)}"
