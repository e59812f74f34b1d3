"""`litlora estimate METHOD`: the memory and the time that `litlora finetune METHOD` with the same options would take.

Writes nothing, and needs no weights: of a base its config.json and its tokenizer are enough.
"""

from dataclasses import replace

from litlora.checkpoint import names
from litlora.checkpoint.resolve import demo_base, resolve_shapes
from litlora.commands.finetune import planned
from litlora.console import counted, duration, print_table, put, say
from litlora.errors import UserError
from litlora.options import Finetune
from litlora.precision import device_of
from litlora.train.estimate import FABRIC, memory_of, seconds_of_step
from litlora.train.run import free_bytes, gigabytes, load_of, plan_of


def estimate(options: Finetune) -> None:
    """Print what is needed at the peak, with every block's activations kept and with them computed again, and the time of each."""
    path = options.checkpoint_dir
    work, job = planned(options, resolve_shapes(path, base_dir=options.base_dir) if path else replace(demo_base(), looks_only=True))
    try:
        work.base.shards()
    except UserError as error:
        say(f"estimated from {names.CONFIG} alone: {error}")
    device = device_of(options.accelerator)
    load = load_of(job, device)
    load = replace(load, program=load.program + FABRIC)
    steps = plan_of(job).steps
    ways = {"none": False, "blocks": True}
    memories = {way: memory_of(load, recompute=again) for way, again in ways.items()}
    seconds = {way: seconds_of_step(load, recompute=again) for way, again in ways.items()}
    rows = [
        [what, *(gigabytes(getattr(memory, name)) for memory in memories.values())]
        for what, name in (
            ("Python, torch, Lightning", "program"),
            ("weights that stand still", "weights"),
            ("what learns, its gradients and moments", "trained"),
            ("activations", "activations"),
            ("at work", "workspace"),
            ("memory at the peak", "total"),
        )
    ]
    rows.append(["a step", *(duration(step) for step in seconds.values())])
    rows.append([f"{counted(steps, 'step')}, without validation", *(duration(step * steps) for step in seconds.values())])
    print_table(["", *(f"--train.checkpoint_activations {way}" for way in ways)], rows, right={1, 2}, bold={5})
    put(f"free on {device.type}: {gigabytes(free_bytes(device))}")
