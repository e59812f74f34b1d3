"""`litlora chat`: talk to a model. `session.py` is what is said and the slash commands, `terminal.py` what is typed."""

import sys

from litlora.commands.chat.session import COMMANDS, Session, described
from litlora.commands.chat.terminal import Lines, Reader, Terminal
from litlora.commands.generate import Opened, open_model
from litlora.console import header, say
from litlora.errors import Refusal, WorkError
from litlora.options import Chat


def chat(options: Chat) -> None:
    """Read a message, answer it, until the end of the input. On a pipe each line or block is a message, and replies are all that
    is printed; a line that was refused makes the exit code 1 at the end."""
    opened = open_model(options, options.checkpoint_dir, options.base_dir, options.adapter, options.chat_template, options.quantize)
    interactive = sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())
    banner(opened, interactive)
    session = Session(opened, options, interactive=interactive)
    reader: Reader = Terminal(COMMANDS) if interactive else Lines(sys.stdin)
    refused = 0
    while (text := reader.read()) is not None:
        try:
            if not session.handle(text):
                return
        except Refusal as error:
            say(error.report())
            refused += 1
        except KeyboardInterrupt:  # in a command, or between two tokens: nothing changed
            if not interactive:
                raise
            say()
    if refused and not interactive:
        raise WorkError(f"{refused} of the lines on standard input {'was' if refused == 1 else 'were'} refused, as said above")


def banner(opened: Opened, interactive: bool) -> None:
    """What was loaded."""
    checkpoint = opened.checkpoint
    rows = [("model", checkpoint.typed)]
    if not checkpoint.is_model:
        rows.append(("base", opened.base.typed))
    if opened.quantize != "none":
        rows.append(("weights", f"held in {opened.quantize}"))
    rows += [("adapter", described(adapter, weight)) for adapter, weight in opened.on if adapter is not checkpoint]
    rows.append(("template", opened.prompts.template_name))
    rows.append(("context", f"{opened.model.config.max_position_embeddings:,} tokens"))
    if opened.base.is_demo:
        rows.append(("note", "the demo base is a toy: it knows only what the demo data teaches"))
    header(rows)
    if interactive:
        say("/help lists the commands, Ctrl-C breaks off a reply, Ctrl-D leaves\n")
