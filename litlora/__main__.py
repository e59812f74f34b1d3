"""The door: `litlora COMMAND ...` -> the command's options -> its function. Imports nothing that the command does not need."""

import atexit
import os
import re
import shlex
import sys
import threading
from collections.abc import Sequence
from typing import Any

from litlora.commands import COMMANDS, Command, Commands
from litlora.console import drop_output, put, say
from litlora.errors import Interrupted, Refusal, UserError, did_you_mean
from litlora.importing import import_whole

BARE_CHECKPOINT = "A first bare word is the checkpoint: litlora chat out/step-200"

EXAMPLES = {
    "litlora finetune": "With a model and rows of yours:\n  litlora finetune lora MODEL_DIR --data rows.jsonl",
    "litlora estimate": "They are those of finetune:\n  litlora estimate lora MODEL_DIR --data rows.jsonl",
    "litlora data": "First bare words are the files:\n  litlora data inspect rows.jsonl",
}

# What peers call a command, and people look for. Else the nearest name would be guessed, which is another thing.
PEER_COMMANDS = {
    "train": "finetune lora",
    "sft": "finetune lora",
    "finetune qlora": "finetune lora --quantize nf4",
    "finetune dora": "finetune lora --lora.use_dora true",
    "estimate qlora": "estimate lora --quantize nf4",
    "estimate dora": "estimate lora --lora.use_dora true",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code (errors.py says what each means). Without `words`: the process's own; it may end here."""
    if words is not None:
        return code_of(list(words))
    share_cores()
    code = code_of(sys.argv[1:])
    end_at_once(code)
    return code


def share_cores() -> None:
    """Before torch is imported: OpenMP's threads, as GNU's are, look for their next work for a shorter time before they sleep.

    As long as a core is another process's, the others look in vain: 60 steps of the demo beside two busy processes took 93 s, now 55, and
    alone as long as before (looking still shorter costs more there than it gains here).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def code_of(rest: list[str]) -> int:
    """Run one command whatever happens."""
    open_what_is_closed()
    debug = "--debug" in rest
    if debug:
        rest.remove("--debug")
    try:
        return run(rest)
    except (Exception, KeyboardInterrupt) as error:  # the last place where anything can be said of it
        if debug:
            raise
        return exit_code_of(error)


def open_what_is_closed() -> None:
    """`2>&-`, `>&-`: a file opened later must not get the number of a standard stream, for whoever writes to that writes into the file."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")


def end_at_once(code: int) -> None:
    """End the process. All is on the disk and said by now, and Python would take a second more to take torch apart, object by object.

    It is left to Python where that is quick, and where another thread or whoever watches (a debugger, coverage) has something to end.
    """
    if "torch" not in sys.modules or threading.active_count() > 1 or is_watched() or sys.flags.interactive:
        return
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # Python has its own word for it
        return
    os._exit(code)


def is_watched() -> bool:
    """By a debugger, a profiler or a measure of coverage."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on, with six places for tools
    return bool(sys.gettrace() or sys.getprofile() or (monitoring and any(map(monitoring.get_tool, range(6)))))


def run(words: list[str]) -> int:
    table: Command | Commands = COMMANDS
    taken: list[str] = []
    while isinstance(table, dict):
        if not words or words[0] in ("-h", "--help", "help"):
            put(overview(taken, table))
            return 0
        if words[0] in ("--version", "-V") and not taken:
            from litlora import __version__

            put(f"litlora {__version__}")
            return 0
        word = words.pop(0)
        if word not in table:
            raise no_command(taken, word, words, table)
        taken.append(word)
        table = table[word]
    from litlora import options

    parsed = parsed_options(getattr(options, table.options), words, " ".join(taken))
    if table.first:
        from litlora.train import before

        getattr(before, table.first)(parsed)
    getattr(import_whole(table.module), table.function)(parsed)
    return 0


def no_command(taken: Sequence[str], word: str, rest: Sequence[str], table: Commands) -> UserError:
    """What to say of a word that is no command where one is needed."""
    name, behind = " ".join(["litlora", *taken]), shlex.join([word, *rest])
    inner = {f"{outer}_{name}": f"{outer} {name}" for outer, inside in COMMANDS.items() if isinstance(inside, dict) for name in inside}
    meant = PEER_COMMANDS.get(" ".join([*taken, word])) or inner.get(word)
    if meant or (close := did_you_mean(word.lower(), table)):
        return UserError(f"no command '{name} {word}'", hint=f"here it is litlora {meant}" if meant else close)
    is_option, is_path = word.startswith("-"), "/" in word or "." in word or os.path.exists(word)
    if not is_path and not (is_option and taken):
        return UserError(f"no command '{name} {word}'", hint=f"{name} --help lists the commands")
    first, *_, last = table
    which = f"{', '.join(list(table)[:-1])} or {last}" if taken else "a command"
    return UserError(f"{name} needs {which} before {word}", hint=f"for example: {name} {first if taken else 'inspect'} {behind}")


def parsed_options(kind: type, words: Sequence[str], command: str) -> Any:
    """The command's options. A run that is resumed is taken up with those it had; what is given now, in files or words, wins."""
    from litlora import parsing

    if not hasattr(kind, "resume"):
        return parsing.parse(kind, words, command=command)
    asks_only = any(word.partition("=")[0] == "--print_config" for word in words)
    given: Any = parsing.parse(kind, [word for word in words if word.partition("=")[0] != "--print_config"], command=command)
    if not given.resume and not asks_only:
        return given
    if given.resume:
        first = 1 if words and not words[0].startswith("-") else 0  # a first bare word is the checkpoint
        again = options_of_run(given.out_dir, command)
        if not again and not any(word.partition("=")[0] == "--config" for word in words):
            from litlora.checkpoint.run import refuse_lost_options

            refuse_lost_options(given.out_dir)  # else it would be taken up with those of the demo
        words = [*words[:first], *again, *words[first:]]
    parsed: Any = parsing.parse(kind, words, command=command)
    if parsed.resume:
        from litlora.train.paths import found_again

        return found_again(parsed, parsed.out_dir)
    return parsed


def options_of_run(out_dir: str, command: str) -> list[str]:
    """The words that stand for the options of the run in `out_dir`; its file may name another place: where it was before it moved."""
    from litlora.checkpoint.names import RUN_YAML

    path = os.path.join(out_dir, RUN_YAML)
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            begun = re.search(r"litlora (\S+(?: \S+)?) --config", file.readline())
        if begun and begun[1] != command:
            hint = f"go on with: litlora {begun[1]} --resume --out_dir {out_dir}"
            raise UserError(f"this run was begun by litlora {begun[1]}, not by litlora {command}", where=out_dir, hint=hint)
    return ["--config", path, f"--out_dir={out_dir}"] if os.path.isfile(path) else []


def overview(taken: Sequence[str], table: Commands) -> str:
    """What `litlora --help` and `litlora finetune --help` print."""
    rows = []
    for word, inside in table.items():
        if isinstance(inside, Command):
            rows.append((word, inside.help))
        else:
            rows += [(f"{word} {name}", leaf.help) for name, leaf in inside.items() if isinstance(leaf, Command)]
    width = max(len(word) for word, _ in rows) + 2
    name = " ".join(["litlora", *taken])
    lines = [f"usage: {name} COMMAND [--option value ...]", ""]
    lines += [f"  {word:<{width}}{help}" for word, help in rows]
    lines += ["", f"{name} COMMAND --help lists a command's options. {EXAMPLES.get(name, BARE_CHECKPOINT)}"]
    if name in ("litlora", "litlora finetune"):
        lines += ["Start here, offline, in about two minutes: litlora finetune lora"]
    return "\n".join(lines)


def exit_code_of(error: BaseException) -> int:
    """Tell the user in a few lines what happened; the traceback is for --debug."""
    if isinstance(error, Interrupted):
        if error.message:
            say(error.message)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        say("\ninterrupted")
        return 130
    if isinstance(error, BrokenPipeError):  # the reader of our output went away (litlora list | head): not an error of ours
        drop_output()
        return 0
    if isinstance(error, Refusal):
        say(error.report())
        return int(getattr(error, "exit_code", 1))
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        hint = "see who may read and write it" if isinstance(error, PermissionError) else "--debug shows where"
        say(f"error: {place}{error.strerror or error}\nhint: {hint}")
        return 1
    first_line = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in first_line:
        what, hint = "out of memory", "in training, a smaller --train.micro_batch_tokens keeps the same result"
    else:
        what = f"{type(error).__name__}: {first_line}".removesuffix(": ")
        known = isinstance(error, (ValueError, RuntimeError))  # what other packages raise where they cannot do what is asked
        hint = "--debug shows where" if known else "this is a bug, please report it; --debug shows where"
    say(f"error: {what}\nhint: {hint}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
