"""Files that are not what was written: cut, one bit flipped, swapped, missing. Found, named, and never taken for whole (F03)."""

import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from extensions.reliability.place import Place, ending
from extensions.reliability.runs import STEPS
from extensions.reliability.tally import Tally
from litlora.checkpoint import names
from litlora.checkpoint.resolve import newest_resumable, read_step
from litlora.errors import UserError
from litlora.verify import reread

STATE = (names.TRAINING_STATE, names.TRAINING_STATE_META)


def damages(path: Path, seeds: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each in words, and done; the file is to be put back in between."""
    good = path.read_bytes()
    for size in sorted({0, 1, len(good) // 2, len(good) - 1}):
        yield f"cut to {size} bytes", lambda size=size: path.write_bytes(good[:size])  # type: ignore[misc]
    yield "one byte more", lambda: path.write_bytes(good + b"\0")
    yield "zeros", lambda: path.write_bytes(bytes(len(good)))
    yield "missing", path.unlink
    for seed in range(seeds):
        bit = random.Random(f"{path.name}{seed}").randrange(8 * len(good))
        yield f"bit {bit} flipped", lambda bit=bit: path.write_bytes(flipped(good, bit))  # type: ignore[misc]


def flipped(data: bytes, bit: int) -> bytes:
    raw = bytearray(data)
    raw[bit // 8] ^= 1 << bit % 8
    return bytes(raw)


def of_a_step(place: Place, seeds: int) -> Tally:
    """Every file of the newest of three steps; what is then resumed from is the one before."""
    tally = Tally("a step: cut, flipped, missing, swapped files")
    run = place.path / "altered"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(place.undisturbed(STEPS), run)
    step = run / names.step_name(STEPS)
    for path in sorted(step.iterdir()):
        good = path.read_bytes()
        for words, damage in damages(path, seeds):
            with tally.trial():
                damage()
                found = read_step(step)
                faults = "\n".join((*found.faults, *found.state_faults))
                tally.expect("undetected", path.name in faults, f"{path.name}: {words}: {faults}")
                newest = newest_resumable(run)[0]
                back = newest is not None and newest.number == STEPS - 2
                tally.expect("torn", back, f"{path.name}: {words}: resumed from {newest and newest.number}")
                path.write_bytes(good)
    for first, second in itertools.combinations(sorted(path.name for path in step.iterdir()), 2):
        with tally.trial():
            swap(step / first, step / second)
            found = read_step(step)
            tally.expect("undetected", bool(found.faults or found.state_faults), f"{first} and {second} swapped")
            swap(step / first, step / second)
    for name in sorted(path.name for path in step.iterdir()):
        other = run / names.step_name(STEPS - 2) / name
        if other.read_bytes() != (step / name).read_bytes():
            with tally.trial():
                swap(step / name, other)
                found = read_step(step)
                tally.expect("undetected", bool(found.faults or found.state_faults), f"{name} of another step")
                swap(step / name, other)
    tally.expect("undetected", not read_step(step).faults, "the harness did not put the step back")
    return tally


def of_a_merged_model(place: Place, seeds: int) -> Tally:
    """Every file of a merged directory, as `litlora verify` reads it again."""
    tally = Tally("a merged model: cut, flipped, missing files")
    merged = place.fresh("altered-merged") / "merged"
    code, said = place.server.run(["merge_lora", str(place.undisturbed(STEPS) / names.step_name(STEPS)), "--out_dir", str(merged)])
    assert code == 0, said
    for path in sorted(merged.iterdir()):
        good = path.read_bytes()
        for words, damage in damages(path, seeds):
            with tally.trial():
                damage()
                try:
                    faults = "\n".join(reread(merged))
                except UserError as error:
                    faults = error.report()
                tally.expect("undetected", faults != "", f"{path.name}: {words}")
                path.write_bytes(good)
    return tally


def swap(first: Path, second: Path) -> None:
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def by_the_commands(place: Place, files: int = 99) -> Tally:
    """One flipped bit in each file (or in so many of them): what each command does with that step, and with its run."""
    tally = Tally("commands on a step with a flipped bit")
    run = place.path / "altered"
    found = sorted(path.name for path in (place.undisturbed(STEPS) / names.step_name(STEPS)).iterdir())
    for number, name in enumerate(found[:: max(1, len(found) // files)]):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(place.undisturbed(STEPS), run)
        step = run / names.step_name(STEPS)
        good = (step / name).read_bytes()
        (step / name).write_bytes(flipped(good, random.Random(number).randrange(8 * len(good))))
        said_state = ["--prompt", "say 1", "--max_new_tokens", "2"]
        asked: list[tuple[list[str], int, str]] = [(["verify", str(step)], 1, name), (["verify", str(run)], 1, name)]
        if name not in STATE:  # the weights are whole without the training state
            asked += [(["generate", str(step), *said_state], 2, name), (["merge_lora", str(step)], 2, name)]
            asked += [(["evaluate", str(step), "--data", str(place.rows), "--max_new_tokens", "2"], 2, name)]
            asked += [(["convert", str(step), "--to", "peft", "--out_dir", str(place.path / "not-made")], 2, name)]
            asked += [(["combine", str(step), f"{run}/step-{STEPS - 2}", "--out_dir", str(place.path / "not-made")], 2, name)]
            asked += [(["diff", str(step), f"{run}/step-{STEPS - 2}"], 2, name)]
            asked += [(["inspect", str(step)], 0, name), (["generate", f"{run}/last", *said_state], 0, name)]
        asked.append((["list", str(run)], 0, "torn" if name not in STATE else ""))
        for words, wanted, named in asked:
            with tally.trial():
                code, said = place.server.run(words)
                tally.expect("undetected", named in said, f"{name}: litlora {words[0]}: {code}: {said}")
                tally.expect("exit code", code == wanted, f"{name}: litlora {words[0]}: {code} instead of {wanted}: {said}")
        tally.expect("torn", not (place.path / "not-made").exists(), f"{name}: something was made of it")
        with tally.trial():
            shutil.rmtree(run / names.MERGED, ignore_errors=True)
            code, said = place.server.run(["finetune", "lora", "--resume", "--out_dir", str(run)])
            tally.expect("exit code", code == 0 and name in said and f"step-{STEPS - 2}" in said, f"{name}: resume: {code}: {said}")
            tally.expect("differs", ending(run, STEPS) == place.reference(STEPS), f"{name}: the resumed run differs")
    return tally


def merged_by_the_commands(place: Place, files: int = 99) -> Tally:
    """Each file of a merged model (or so many of them) with a flipped bit, cut, and missing: `verify` finds it, and no command meets it
    with a bug of its own. What cannot be read at all is refused by its name."""
    tally = Tally("commands on a merged model with a bad file")
    merged, other = place.fresh("merged-by-commands") / "merged", place.path / "merged-by-commands" / "hf"
    code, said = place.server.run(["merge_lora", str(place.undisturbed(STEPS) / names.step_name(STEPS)), "--out_dir", str(merged)])
    assert code == 0, said
    found = sorted(path.name for path in merged.iterdir())
    needed = (names.WEIGHTS, names.CONFIG, names.TOKENIZER)
    for number, name in enumerate(found[:: max(1, len(found) // files)]):
        path, good = merged / name, (merged / name).read_bytes()
        bit = random.Random(number).randrange(8 * len(good))
        damaged = (("flipped", flipped(good, bit)), ("cut", good[: len(good) // 2]), ("missing", None))
        for words, data in damaged:
            path.unlink() if data is None else path.write_bytes(data)
            with tally.trial():  # without its report it is a model like any other
                code, said = place.server.run(["verify", str(merged)])
                plain = name == names.MERGE_REPORT and data is None
                tally.expect("undetected", plain or code in (1, 2), f"verify, {name} {words}: {code}: {said}")
            for command in ("inspect", "generate", "convert"):
                more = {"generate": ["--prompt", "say 1", "--max_new_tokens", "2"], "convert": ["--to", "hf", "--out_dir", str(other)]}
                with tally.trial():
                    code, said = place.server.run([command, str(merged), *more.get(command, [])])
                    shutil.rmtree(other, ignore_errors=True)
                    told = f"{command}, {name} {words}: {code}: {said}"
                    tally.expect("exit code", code in (0, 1, 2) and "this is a bug" not in said, told)
                    refused = code == 2 and (name in said or words == "missing")
                    unread = words != "flipped" and name in needed and command == "generate"
                    tally.expect("undetected", refused or not unread, told)
            path.write_bytes(good)
    return tally
