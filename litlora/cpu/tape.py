"""What was computed once, to be computed again: the same operations on the same memory, in which other numbers stand by then.

A model's step is some thousand calls of Python for some hundred products; as a tape it is one call of `native.c` for each run of
functions of ours, and one of torch for whatever lies between. Nothing here knows a model.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from litlora.cpu import native


class Tape(TorchDispatchMode):
    """Records what is computed inside it, which is computed all the same. Every tensor of it lives as long as the tape.

    What comes in is to be written into the tensors that came in then, and what comes out is found where it came out. No shape may depend on
    a number, and no number may be asked for: RuntimeError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], Any] | list[bytes]] = []  # torch's, or calls of ours in a row
        self.kept: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's own would import its compiler, to keep it out: five seconds at the first answer."""
        return False

    def __enter__(self) -> "Tape":
        native.RECORDING.heard = self.heard
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        native.RECORDING.heard = None
        super().__exit__(*exception)

    def heard(self, call: bytes, tensors: Sequence[Tensor | None]) -> None:
        if not self.steps or not isinstance(self.steps[-1], list):
            self.steps.append([])
        calls = self.steps[-1]
        assert isinstance(calls, list)
        calls.append(call)
        self.kept += (tensor.detach() for tensor in tensors if tensor is not None)  # it, whatever its owner's `data` will be

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.add.Tensor and isinstance(args[1], Tensor) and native.sums(*args):
            return native.summed(args[0], args[1], kwargs.get("alpha", 1))
        made = func(*args, **kwargs)
        self.kept.append((args, kwargs, made))
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        if known and isinstance(made, bool | int | float):
            raise RuntimeError(f"{func} gives a number, which may be another one the next time")
        if func._schema.is_mutable:
            self.steps.append(lambda: func(*args, **kwargs))
        elif "empty" not in func._schema.name:
            new = [n for n, tensor in enumerate(tensors_in(made)) if tensor.untyped_storage().data_ptr() not in known]
            if new:  # else views, which are still there
                self.steps.append(lambda: again(made, new, func(*args, **kwargs)))
        return made

    def play(self) -> None:
        for step in self.steps:
            if isinstance(step, list):
                native.run(step)
            else:
                step()


def again(made: Any, new: Sequence[int], remade: Any) -> None:
    """Into those tensors of what was made, what was made now."""
    before, now = list(tensors_in(made)), list(tensors_in(remade))
    for n in new:
        before[n].copy_(now[n])


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)
