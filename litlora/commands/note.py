"""`litlora note STEP TEXT`: words about a checkpoint, which `litlora list` and `litlora inspect` show. Without TEXT: what was written."""

from litlora.checkpoint.note import read_note, write_note
from litlora.checkpoint.resolve import resolve
from litlora.console import put
from litlora.errors import UserError
from litlora.options import WriteNote


def note(options: WriteNote) -> None:
    """Write, add to, show or take away the note of one step."""
    if options.checkpoint_dir is None:
        raise UserError("which checkpoint is the note about?", hint='litlora note out/step-200 "sounds right #release"')
    checkpoint = resolve(options.checkpoint_dir)
    if checkpoint.kind != "step":
        raise UserError("is no step of a run; notes are kept in steps", where=checkpoint.path)
    if options.text is None:
        put(read_note(checkpoint.path))
        return
    before = read_note(checkpoint.path)
    write_note(checkpoint.path, f"{before}\n{options.text}" if options.append and before else options.text)
    put(checkpoint.path)
