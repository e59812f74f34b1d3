"""What was computed once, to be computed again: the same operations on the same memory, in which other numbers stand by then.

A model's step is some thousand calls of Python for some hundred products; as a tape it is one call of `native.c` for each run of
functions of ours, and one of torch for whatever lies between. Nothing here knows a model.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from litlora.cpu import native, native_for


class Tape(TorchDispatchMode):
    """Records what is computed inside it of some tensors, and is computed all the same; of what else is computed it keeps the result.

    `varying`: those that hold other numbers the next time, as what comes in, or that hold on to theirs until then. What comes out is found
    where it came out. No shape may depend on a number, and no number may be asked for: RuntimeError.
    """

    def __init__(self, *varying: Tensor) -> None:
        super().__init__()
        self.varying = {memory(tensor) for tensor in varying}
        self.fresh: set[int] = set()  # memory that came to be inside, and nothing was written to yet
        self.own: set[int] = set()  # memory that came to be inside, holds what does not vary, and has not been read by a step yet
        self.steps: list[Callable[[], Any] | list[bytes]] = []  # torch's, or calls of ours in a row
        self.kept = [tensor.untyped_storage() for tensor in varying]  # also what calls of ours point into: nobody else may lie there

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's own would import its compiler, to keep it out: five seconds at the first answer."""
        return False

    def __enter__(self) -> "Tape":
        native.RECORDING.heard, native.RECORDING.room = self.heard, None
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        native.RECORDING.heard, native.RECORDING.room = None, None
        super().__exit__(*exception)

    def heard(self, call: bytes, tensors: Sequence[Tensor | None]) -> None:
        pointed = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
        places = [storage.data_ptr() for storage in pointed]
        if self.varying.isdisjoint(places) and places[-1] in self.own:  # to be computed this once
            self.fresh.discard(places[-1])
            return
        self.prepare(pointed[-1])
        if not self.steps or not isinstance(self.steps[-1], list):
            self.steps.append([])
        calls = self.steps[-1]
        assert isinstance(calls, list)
        calls.append(call)
        self.kept += pointed  # it, whatever its owner's `data` will be
        self.own.difference_update(places)

    def prepare(self, storage: torch.UntypedStorage) -> None:
        """For a step that writes to this memory: what does not vary, and an earlier step may have read, is put back at the beginning."""
        place = storage.data_ptr()
        if place not in self.varying and place not in self.fresh:
            self.kept.append(storage)
            saved = ctypes.string_at(place, storage.nbytes())  # no operation of torch's, which would be heard
            self.steps.insert(0, functools.partial(ctypes.memmove, place, saved, len(saved)))
        self.varying.add(place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {memory(tensor) for tensor in tensors_in((args, kwargs))}
        targets = list(written(func, args, kwargs)) if func._schema.is_mutable else []
        if "empty" in func._schema.name or (known.isdisjoint(self.varying) and self.own.issuperset(map(memory, targets))):
            made = func(*args, **kwargs)
            come = {memory(tensor) for tensor in tensors_in(made)} - known
            self.own |= come
            self.fresh = self.fresh | come if "empty" in func._schema.name else self.fresh - known - come
            return made
        self.own -= known
        if func is torch.ops.aten.add.Tensor and isinstance(args[1], Tensor) and native_for(args[0]) and native.sums(*args):
            y = torch.empty_like(args[0])
            self.fresh.add(memory(y))
            return native.summed(args[0], args[1], kwargs.get("alpha", 1), y)
        if func._schema.is_mutable:
            for target in targets:
                self.prepare(target.untyped_storage())
            self.steps.append(functools.partial(func, *args, **kwargs))
            return func(*args, **kwargs)
        made = func(*args, **kwargs)
        if not isinstance(made, Tensor | tuple | list):
            raise RuntimeError(f"{func} gives a number, which may be another one the next time")
        new = [n for n, tensor in enumerate(tensors_in(made)) if memory(tensor) not in known]
        if new:  # else views, which are still there
            self.steps.append(lambda: again(made, new, func(*args, **kwargs)))
            self.varying.update(memory(tensor) for tensor in tensors_in(made))
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


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Which of its arguments an operation writes to."""
    for n, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in(args[n] if n < len(args) else kwargs.get(argument.name))


def memory(tensor: Tensor) -> int:
    """Its memory, views alike."""
    return tensor.untyped_storage().data_ptr()


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)
