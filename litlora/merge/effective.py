"""The plain model that a checkpoint means, tensor by tensor, without writing it: what a merge would round and store.

A base, a merged model and a step of `full` are such models as they lie; a mergeable step or PEFT adapter is its base with what was
trained put on. Nothing is loaded as a whole: `blocks` gives some megabytes of rows at a time. No torch here.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType

import numpy as np
import numpy.typing as npt

from litlora.checkpoint.checkpoint import Checkpoint
from litlora.errors import UserError
from litlora.families import expected_tensors
from litlora.merge.outputs import NewModel, Output, new_model
from litlora.merge.plan import check_adapter_file, refuse_unmergeable
from litlora.merge.tensors import BLOCK, GROUP, WIDTH, Floats, Making, Moved, Workspace, cuts, fold, read_base
from litlora.merge.weights import load_update
from litlora.methods.tuning import Tuning
from litlora.safetensors_file import SafetensorsFile


class Effective:
    """Every parameter of the plain model under its full name: of LLaMA-Pro's a deeper model, of a tied one without a second head.

    A context manager: its files are open inside. `dtype` (the file's word: BF16 ...): what a merge would store it as; None: every tensor
    as the base has it. `model` says what each parameter is made of. UserError where the checkpoint cannot be
    merged, with the reason, where its files are not those of its config.json, or where its base is not there or another one.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: str | None = None) -> None:
        if checkpoint.is_model:
            tuning = Tuning()
        else:
            refuse_unmergeable(checkpoint)
            tuning = checkpoint.tuning()
        self.checkpoint = checkpoint
        self.model: NewModel = new_model(checkpoint.base(), checkpoint.config(), tuning, dtype=dtype, trained=True)
        self.config = self.model.config  # of the plain model
        made = {output.parameter: (path, output) for path, outputs in self.model.outputs.items() for output in outputs}
        self.outputs: dict[str, Output] = {name: made[name][1] for name in expected_tensors(self.config)}  # in the model's order
        self.shapes = {name: output.shape for name, output in self.outputs.items()}
        self.dtypes = {name: output.dtype for name, output in self.outputs.items()}  # as a merge stores them: BF16, F32 ...
        odd = next((name for name, dtype in self.dtypes.items() if dtype not in WIDTH), None)
        if odd:
            what = f"{odd} is {self.dtypes[odd]}, which cannot be computed with"
            raise UserError(what, where=made[odd][0], hint="use a model in float32, bfloat16 or float16")
        self._homes = {name: path for name, (path, _) in made.items()}
        with ExitStack() as stack:
            self._files = {path: stack.enter_context(SafetensorsFile(path)) for path in dict.fromkeys(self._homes.values())}
            self._adapter = None if checkpoint.is_model else stack.enter_context(SafetensorsFile(checkpoint.adapter_file()))
            if self._adapter is not None:
                check_adapter_file(self._adapter, tuning, self.model)
            self._stack = stack.pop_all()

    def blocks(self, name: str, dtype: npt.DTypeLike = np.float32) -> Iterator[Floats]:
        """A parameter's numbers, not rounded to what they would be stored as: of a matrix some rows (rows, in) at a time, of a vector (n,).

        Computed in `dtype`, float32 (the very numbers that a merge rounds) or float64. A block is valid until the next one is asked for.
        """
        return computed(self.making(name, dtype), dtype)

    def read(self, name: str, dtype: npt.DTypeLike = np.float32) -> Floats:
        """The same in one piece, in memory of its own."""
        whole = np.empty(self.shapes[name], dtype)
        row = 0
        for block in self.blocks(name, dtype):
            whole[row : row + len(block)] = block
            row += len(block)
        return whole

    def making(self, name: str, dtype: npt.DTypeLike = np.float32) -> Making:
        """What a parameter is made of, ready to be computed with."""
        output = self.outputs[name]
        return Making(
            name=name,
            shape=output.shape,
            base=self._files[self._homes[name]],
            source=output.source,
            adapter=self._adapter,
            value=output.value,
            update=load_update(self._adapter, output.update, dtype),
        )

    def base_file(self, output: Output) -> SafetensorsFile:
        """The base's file that an output starts from, or goes with."""
        return self._files[self._homes[output.parameter]]

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> "Effective":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def computed(way: Making, dtype: npt.DTypeLike = np.float32, moved: Moved | None = None) -> Iterator[Floats]:
    """A tensor's numbers from what it is made of, a cut at a time, as `blocks` gives them; what training changed is added to `moved`."""
    space = Workspace(max(BLOCK, GROUP * way.shape[-1]), dtype)
    for cut in cuts(way.shape, in_rows=True):
        with np.errstate(all="ignore"):  # what is not finite is for the reader to judge
            block = fold(way, read_base(way, cut, space), cut, space, moved or Moved())
        yield block.reshape(-1, cut.columns) if len(way.shape) == 2 else block
