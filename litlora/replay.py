"""One more token of each text, or some, as the same work every time: nothing changes from token to token but numbers in tensors.

So all of it can be done again without Python: on a GPU as one CUDA graph, where a call of the model is some thousand launches that it would
wait for; on a CPU as a tape (`cpu/tape.py`), where around small products Python takes as long as they do. The graph has not run on a GPU
yet. The step that is captured is tested on CPUs, bit for bit against the plain one.
"""

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from litlora import cpu
from litlora.cpu.tape import Tape
from litlora.model import GPT, Experts, KVCache


class WholeCache(KVCache):
    """Another cache's keys and values. Where they go on is a number on the device; all their room may be looked at, masked."""

    is_ragged = True

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        super().__init__(cache.size, len(cache.lengths))
        self.held = cache.held
        self.first = next(iter(cache.held.values()))  # what is replaced first where it grows, even if memory ends before the last is
        self.at = torch.zeros(len(cache.lengths), dtype=torch.int64, device=device)  # (B,)

    def starts(self, device: torch.device) -> Tensor:
        return self.at

    def end(self, T: int) -> int:
        return self.size

    def advance(self, T: int) -> None:
        """Not here: in the cache that owns them."""


class ReplayedStep:
    """The model's step after what `cache` holds, of the model as it was at the last `renew`. Made anew, too, when that cache has grown.

    What hooks on its modules do in Python is not done again.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self.model, self.cache, self.device = model, cache, next(model.parameters()).device
        self.whole: WholeCache | None = None
        self.parts: list[int] = []
        self.made: dict[torch.Size, tuple[Tensor, Tensor, Callable[[], object]]] = {}  # for (B, T): tokens, logits, and the step once more

    @staticmethod
    def serves(model: GPT) -> bool:
        """On a GPU, and on a CPU whose attention is ours: not with experts, for which the host must know what a router chose, nor with a
        rope that depends on a text's length."""
        ropes = (model.config.rope_of(layer) for layer in range(model.config.num_hidden_layers))
        varies = any(rope.depends_on_length for rope in ropes if rope) or any(isinstance(module, Experts) for module in model.modules())
        return not varies and (next(model.parameters()).is_cuda or sees_what_is_held(model))

    def takes(self, tokens: Tensor) -> bool:
        """On a GPU one token of each row; on a CPU no more than our kernels do."""
        return tokens.numel() <= cpu.FEW if self.device.type == "cpu" else tokens.size(1) == 1

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:  # (B, T) int64 -> (B, T, V)
        """Logits after each of some more tokens, which it takes and for which there is room."""
        self.cache.check_room(*tokens.shape)
        if self.whole is None or self.whole.first is not next(iter(self.cache.held.values())):
            self.prepare()
        assert self.whole is not None
        self.whole.at.copy_(torch.tensor(self.cache.lengths))
        if tokens.shape in self.made:
            read, logits, again = self.made[tokens.shape]
            read.copy_(tokens)
            again()
        else:
            read = tokens.clone()
            logits, again = self.recorded(read)
            self.made[tokens.shape] = (read, logits, again)
        self.cache.advance(tokens.size(1))
        with cpu.one_thread():
            return logits.clone()  # the next step writes over them

    def renew(self) -> None:
        """Before an answer. A tape holds what was computed of weights, and who writes these over may leave no trace (a fused optimizer,
        `data`): it is made anew. A graph reads the weights each time, where they lay."""
        if self.device.type == "cpu" or (self.whole is not None and self.parts != self.parts_now()):
            self.whole, self.made = None, {}

    def prepare(self) -> None:
        self.whole, self.made = WholeCache(self.cache, self.device), {}
        if len(self.cache.lengths) == 1 and not sees_what_is_held(self.model):  # rows beside each other were zero from the start
            for sides in self.cache.held.values():
                for side in sides:
                    side[:, :, self.cache.lengths[0] :].zero_()  # what is not held is weighed with 0, but no NaN may lie there
        self.parts = self.parts_now()
        self.known = [one.detach() for one in (*self.model.parameters(), *self.model.buffers())]  # no other may come to lie there

    def parts_now(self) -> list[int]:
        """By which a graph knows its model: the modules and their modes, and where the tensors lie."""
        modules = (number for module in self.model.modules() for number in (id(module), module.training))
        return [*modules, *(one.data_ptr() for one in (*self.model.parameters(), *self.model.buffers()))]

    def recorded(self, tokens: Tensor) -> tuple[Tensor, Callable[[], object]]:
        """The step, done; its logits (B, T, V), and what does it again, into them."""
        assert self.whole is not None
        try:
            if self.device.type == "cuda":
                return self.captured(tokens)
            with Tape(tokens, self.whole.at, *itertools.chain(*self.cache.held.values())) as tape:
                logits = self.step(tokens)
            return logits, tape.play
        except RuntimeError as error:
            warnings.warn(f"a step cannot be recorded ({error}): tokens come more slowly", stacklevel=2)
            logits = self.step(tokens)
            return logits, lambda: logits.copy_(self.step(tokens))

    def captured(self, tokens: Tensor) -> tuple[Tensor, Callable[[], object]]:
        beside, graph = stream_beside(self.device), torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):  # one that is current captures nothing of what another computes, and says nothing
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                self.step(tokens)  # what happens once must not be captured: compiling, tables, workspaces
            torch.cuda.current_stream().wait_stream(beside)
            with torch.cuda.graph(graph, stream=beside):
                logits = self.step(tokens)
            graph.replay()
        return logits, graph.replay

    def step(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        return cast(Tensor, self.model(tokens, cache=self.whole))


@functools.cache
def stream_beside(device: torch.device) -> torch.cuda.Stream:
    """On which graphs are captured. Always the same: for each that it multiplies on, torch keeps up to 32 MiB for good."""
    return torch.cuda.Stream(device)


def sees_what_is_held(model: GPT) -> bool:
    """Whether a kernel of ours computes each attention on this CPU: where others look at all the room of a cache, it ends with the text."""
    whole = not model.config.head_dim % cpu.EIGHT and not model.config.value_dim % cpu.EIGHT
    if not (cpu.working() and whole):
        return False
    embedding = model.model.embed_tokens.weight
    return embedding.is_cpu and (model.model.dtype or embedding.dtype) is torch.float32
