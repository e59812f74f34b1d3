"""One more token of one text, as the same work every time: nothing changes from token to token but numbers in tensors.

So a GPU can be given all of it at once, as one CUDA graph, where a call of the model is some thousand launches that it would wait for.
The graph has not run on a GPU yet. The step that is captured is tested on CPUs, token for token against the plain one.
"""

import warnings
from typing import cast

import torch
from torch import Tensor

from litlora.model import GPT, Experts, KVCache


class WholeCache(KVCache):
    """Another cache's keys and values. Where they go on is a number on the device; all their room is looked at, what is beyond masked."""

    is_ragged = True

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        super().__init__(cache.size)
        self.held = cache.held
        self.first = next(iter(cache.held.values()))  # what is replaced first where it grows, even if memory ends before the last is
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # (1,)
        for keys, values in self.held.values():  # weighed with 0, but no NaN may lie there
            keys[:, :, cache.lengths[0] :].zero_()
            values[:, :, cache.lengths[0] :].zero_()

    def starts(self, device: torch.device) -> Tensor:
        return self.at

    def end(self, T: int) -> int:
        return self.size

    def advance(self, T: int) -> None:
        """Not here: in the cache that owns them."""


class ReplayedStep:
    """The model's step after what `cache` holds, which is one text. Made anew when that cache has grown."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self.model, self.cache, self.device = model, cache, model.lm_head.weight.device
        self.whole: WholeCache | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    @staticmethod
    def serves(model: GPT) -> bool:
        """On a GPU: not with experts, for which the host must know what a router chose, nor with a rope that depends on a text's length."""
        ropes = (model.config.rope_of(layer) for layer in range(model.config.num_hidden_layers))
        varies = any(rope.depends_on_length for rope in ropes if rope) or any(isinstance(module, Experts) for module in model.modules())
        return model.lm_head.weight.is_cuda and not varies

    @torch.inference_mode()
    def __call__(self, token: Tensor) -> Tensor:  # () int64 -> (V,)
        """Logits after one more token, for which there is room."""
        self.cache.check_room(1, 1)
        if self.whole is None or self.whole.first is not next(iter(self.cache.held.values())):
            self.prepare()
        assert self.whole is not None
        self.whole.at.fill_(self.cache.lengths[0])
        self.token.copy_(token)
        if self.graph is None:
            self.logits = self.step()
        else:
            self.graph.replay()
        self.cache.advance(1)
        return self.logits.clone()  # the next step writes over them

    def prepare(self) -> None:
        self.whole, self.graph = WholeCache(self.cache, self.device), None
        self.token = torch.zeros((), dtype=torch.int64, device=self.device)
        if self.device.type == "cuda":
            self.whole.at.fill_(self.cache.lengths[0])  # what is written while it is captured is written again
            try:
                self.graph, self.logits = self.captured()
            except RuntimeError as error:
                warnings.warn(f"a step cannot be captured as a graph ({error}): tokens come more slowly", stacklevel=2)

    def captured(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        beside = torch.cuda.Stream(self.device)
        beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(beside):
            self.step()  # what happens once must not be captured: compiling, tables, workspaces
        torch.cuda.current_stream(self.device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.step()
        return graph, logits

    def step(self) -> Tensor:  # (V,)
        return cast(Tensor, self.model(self.token.view(1, 1), cache=self.whole)[0, 0])
