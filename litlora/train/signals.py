"""SIGINT and SIGTERM: finish the step, commit, leave with 128 + the number; a second one leaves at once. SIGUSR1: commit and go on."""

import contextlib
import os
import signal
from types import FrameType
from typing import Any

from litlora.errors import Interrupted

ENDING = (signal.SIGINT, signal.SIGTERM)
IDLE = "interrupted while no step was under way; what was committed stays"


class Signals:
    """A context in which the signals are ours. Before `training` is set there is nothing to commit, and the first one ends the command."""

    def __init__(self) -> None:
        self.number = 0  # of the signal that asked to stop; 0: none did
        self.commit = False  # SIGUSR1 came: commit once
        self.training = False
        self.before: dict[int, Any] = {}

    def asked(self) -> tuple[bool, bool]:
        """Whether to (stop, commit) after this step; a commit is asked for once."""
        commit, self.commit = self.commit, False
        return self.number != 0, commit

    def __enter__(self) -> "Signals":
        self.before = {number: signal.signal(number, self.receive) for number in (*ENDING, signal.SIGUSR1)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.number and not self.training and isinstance(error[1], Exception) and not isinstance(error[1], Interrupted):
            # torch, in the middle of a call, makes an error of its own of what `receive` raises
            raise Interrupted(self.number, IDLE) from error[1]

    def receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.commit = True
            return
        if self.number:
            os._exit(128 + number)  # a second signal: at once; a commit under way is left behind as a temporary directory
        self.number = number
        if not self.training:
            raise Interrupted(number, IDLE)
        with contextlib.suppress(OSError):  # past Python's own file: the signal may have come in the middle of a print to it
            os.write(2, b"\nstopping after this step; once more to stop at once\n")
