"""One more token of one text, as the same work every time: nothing changes from token to token but numbers in tensors.

So all of it can be done again without Python: on a GPU as one CUDA graph, where a call of the model is some thousand launches that it would
wait for; on a CPU as a tape (`cpu/tape.py`), where around small products Python takes as long as they do. The graph has not run on a GPU
yet. The step that is captured is tested on CPUs, bit for bit against the plain one.
"""

import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from litlora import cpu
from litlora.cpu.tape import Tape
from litlora.model import GPT, Attention, Experts, KVCache


class WholeCache(KVCache):
    """Another cache's keys and values. Where they go on is a number on the device; all their room may be looked at, masked."""

    is_ragged = True

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        super().__init__(cache.size)
        self.held = cache.held
        self.first = next(iter(cache.held.values()))  # what is replaced first where it grows, even if memory ends before the last is
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # (1,)

    def starts(self, device: torch.device) -> Tensor:
        return self.at

    def end(self, T: int) -> int:
        return self.size

    def advance(self, T: int) -> None:
        """Not here: in the cache that owns them."""


class ReplayedStep:
    """The model's step after what `cache` holds, which is one text. Made anew when that cache has grown, or the model has other parts."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self.model, self.cache, self.device = model, cache, next(model.parameters()).device
        self.whole: WholeCache | None = None
        self.again: Callable[[], object] | None = None  # does the step once more; None: not done yet
        self.parts: object = None

    @staticmethod
    def serves(model: GPT) -> bool:
        """On a GPU, and on a CPU whose attention is ours: not with experts, for which the host must know what a router chose, nor with a
        rope that depends on a text's length."""
        ropes = (model.config.rope_of(layer) for layer in range(model.config.num_hidden_layers))
        varies = any(rope.depends_on_length for rope in ropes if rope) or any(isinstance(module, Experts) for module in model.modules())
        return not varies and (next(model.parameters()).is_cuda or sees_what_is_held(model))

    @torch.inference_mode()
    def __call__(self, token: Tensor) -> Tensor:  # () int64 -> (V,)
        """Logits after one more token, for which there is room."""
        self.cache.check_room(1, 1)
        if self.whole is None or self.whole.first is not next(iter(self.cache.held.values())) or self.parts != self.parts_now():
            self.prepare()
        assert self.whole is not None
        self.whole.at.fill_(self.cache.lengths[0])
        self.token.copy_(token)
        if self.again is None:
            self.logits, self.again = self.recorded()
        else:
            self.again()
        self.cache.advance(1)
        return self.logits.clone()  # the next step writes over them

    def prepare(self) -> None:
        self.whole = WholeCache(self.cache, self.device)
        self.token = torch.zeros((), dtype=torch.int64, device=self.device)
        self.again = None
        if not sees_what_is_held(self.model):
            for sides in self.cache.held.values():  # what is not held is weighed with 0, but no NaN may lie there
                for side in sides:
                    side[:, :, self.cache.lengths[0] :].zero_()
        modules = list(self.model.modules())
        self.places = [module._modules for module in modules], [module._parameters for module in modules]
        self.parts = self.parts_now()

    def parts_now(self) -> tuple[list[int], list[int]]:
        """By which the step knows a model: its modules, and where its parameters lie."""
        modules, parameters = self.places
        here = [id(one) for place in modules for one in place.values()]
        return here, [one.data_ptr() for place in parameters for one in place.values() if one is not None]

    def recorded(self) -> tuple[Tensor, Callable[[], object]]:
        """The step, done; its logits, and what does it again, into them."""
        if self.device.type == "cuda":
            try:
                return self.captured()
            except RuntimeError as error:
                warnings.warn(f"a step cannot be captured as a graph ({error}): tokens come more slowly", stacklevel=2)
                logits = self.step()
                return logits, lambda: logits.copy_(self.step())
        with Tape() as tape:
            logits = self.step()
        return logits, tape.play

    def captured(self) -> tuple[Tensor, Callable[[], object]]:
        beside = torch.cuda.Stream(self.device)
        beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(beside):
            self.step()  # what happens once must not be captured: compiling, tables, workspaces
        torch.cuda.current_stream(self.device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.step()
        graph.replay()
        return logits, graph.replay

    def step(self) -> Tensor:  # (V,)
        return cast(Tensor, self.model(self.token.view(1, 1), cache=self.whole)[0, 0])


def sees_what_is_held(model: GPT) -> bool:
    """Whether a kernel of ours computes each attention on this CPU: where others look at all the room of a cache, it ends with the text."""
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    whole = not model.config.head_dim % cpu.EIGHT and not model.config.value_dim % cpu.EIGHT
    if not (cpu.working() and whole and attentions and all(attention.is_plain for attention in attentions)):
        return False
    embedding = model.model.embed_tokens.weight
    return embedding.is_cpu and (model.model.dtype or embedding.dtype) is torch.float32
