"""`litlora expand`: a deeper model that computes what its base does, ready for `litlora finetune pro`. Says what is new in it."""

import shlex
from pathlib import Path

from litlora.console import Progress, counted, header, put, say
from litlora.errors import UserError
from litlora.options import Expand

BIG = 256 * 2**20  # bytes of a model from which on a progress line is worth it
MB = 10**6


def expand(options: Expand) -> None:
    """Write the deeper model; its path goes to standard output. UserError, WorkError: nothing was written."""
    if options.out_dir is None:
        raise UserError("no directory is given for the deeper model", where="out_dir", hint="--out_dir a directory that is not there yet")
    from litlora.checkpoint.resolve import demo_base, resolve
    from litlora.merge.expand import expand as write
    from litlora.merge.expand import prepare_expansion

    base = demo_base() if options.checkpoint_dir is None else resolve(options.checkpoint_dir)
    plan = prepare_expansion(base, Path(options.out_dir), options.n_insert, options.positions)
    model = plan.model
    before, after, new = model.base_config.num_hidden_layers, model.config.num_hidden_layers, model.new_layers
    header(
        [
            ("base", f"{base.typed}, {counted(before, 'layer')}, {model.base_bytes / MB:,.0f} MB"),
            ("result", f"{plan.out_dir}, {after} layers, {model.bytes / MB:,.0f} MB; it computes what the base does"),
            ("new", f"layers {', '.join(map(str, new))} (from 0), each a copy of the one before it whose output projections are zero"),
        ]
    )
    bar = Progress(model.bytes // MB, "MB", quiet=model.bytes < BIG)
    write(plan, progress=lambda done: bar.update(done // MB))
    bar.close()
    say(f"read again from the disk: {counted(sum(1 for _ in model), 'tensor')} as written")
    say(f"next: litlora finetune pro {shlex.quote(str(plan.out_dir))} --data FILE   (trains exactly the {counted(len(new), 'new layer')})")
    put(plan.out_dir)
