"""What a merged model computes beside what its parts compute: logits on probe texts, and the loss on rows. Torch is imported late."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.errors import WorkError
from litlora.families import tensor_name
from litlora.methods.tuning import EMBEDDING, HEAD
from litlora.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    import torch

    from litlora.data.samples import Sample
    from litlora.model import GPT

# How far the logits may differ, times max(1, largest logit), and their KL divergence in nats: by the dtype that rounded the weights.
# The first column is what random models of a few layers keep with room to spare; KL grows with depth, so it has more of it.
BOUNDS = {"F32": (1e-5, 1e-8), "F16": (5e-3, 1e-4), "BF16": (4e-2, 1e-3)}
LOSS_BOUNDS = {"F32": 1e-5, "F16": 1e-3, "BF16": 1e-2}  # of the mean loss, times max(1, loss): what rounding moves cancels over tokens

PROBES = (  # texts of several kinds; the ids that come of them are cut to the model's context
    "Once upon a time there was a small house at the edge of the forest.",
    "def add(a, b):\n    return a + b\n",
    '{"name": "Ada", "born": 1815, "languages": ["en", "fr"]}',
    "Die Summe aus 17 und 25 ist 42. 你好，世界！",
)


def logits_of(
    checkpoint: Checkpoint,
    probes: Sequence[Sequence[int]],
    watched: "Callable[[GPT], AbstractContextManager[object]]" = nullcontext,
    accelerator: str = "cpu",
) -> "torch.Tensor":  # (T, V), of all probes
    """What it computes, in fp32; it is in memory only meanwhile. `watched`: what its routers are asked under."""
    import torch

    from litlora.checkpoint.weights import load_model
    from litlora.precision import device_of

    device = device_of(accelerator)
    with torch.inference_mode():
        model = load_model(checkpoint, dtype=torch.float32, device=device).eval()
        with watched(model):
            return torch.cat([model(torch.tensor([ids], device=device))[0].cpu().double() for ids in probes])


def compare_logits(adapter: Checkpoint, merged: Checkpoint, accelerator: str = "cpu") -> dict[str, Any]:
    """The merged model against the base with what was trained on it, both computed in fp32, through the same experts where it has some.
    WorkError where they differ beyond the dtype's bound."""
    from litlora.verify.routing import Routing

    probes, routing = probe_ids(adapter, merged), Routing()
    hint = "use the adapter unmerged, and report this"
    expected = logits_of(adapter, probes, routing.recorded, accelerator)
    try:
        found = logits_of(merged, probes, routing.followed, accelerator)
    except WorkError as error:
        raise WorkError(f"the merged model computes something else: {error.what}", where=adapter.path, hint=hint) from error
    largest = float(expected.abs().max())
    difference = float((expected - found).abs().max())
    kl = float((expected.softmax(-1) * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean())
    bound, kl_bound = BOUNDS[rounded_to(merged)]
    routers_bound, bound = bound * max(1.0, routing.largest), bound * max(1.0, largest)
    seen = f"logits differ by {difference:.3g} (at most {bound:.3g}), KL {kl:.3g} (at most {kl_bound:.3g})"
    if not routing.difference <= routers_bound:
        seen = f"the logarithms of its routers' scores differ by {routing.difference:.3g} (at most {routers_bound:.3g}); {seen}"
    if not (difference <= bound and kl <= kl_bound and routing.difference <= routers_bound):
        raise WorkError(f"the merged model computes something else: {seen}", where=adapter.path, hint=hint)
    experts = {"choices_of_experts": routing.choices, "decided_by_rounding": routing.ties, "routers_apart": routing.difference}
    return {
        "positions": len(expected),
        "largest_logit": largest,
        "largest_difference": difference,
        "bound": bound,
        "kl": kl,
        "kl_bound": kl_bound,
        **(experts if routing.choices else {}),
    }


def same_logits(base: Checkpoint, expanded: Checkpoint, accelerator: str) -> list[str]:
    """A line where a deeper model does not compute what its base does, to the last bit."""
    probes = probe_ids(base, expanded)
    found = [logits_of(model, probes, accelerator=accelerator) for model in (base, expanded)]
    apart = float((found[0] - found[1]).abs().max())
    return [] if apart == 0 else [f"its logits are {apart:.3g} away from those of {base.path}"]


def rounded_to(model: Checkpoint) -> str:
    """The dtype of its weights, by that of its head."""
    shards = model.shards()
    ours = {tensor_name(name, model.config()): name for name in shards}
    head = ours.get(HEAD) or ours[EMBEDDING]
    with SafetensorsFile(shards[head]) as file:
        return file.tensors[head].dtype if file.tensors[head].dtype in BOUNDS else "BF16"


def losses(checkpoints: Sequence[Checkpoint], samples: "Sequence[Sample]", accelerator: str) -> list[float]:
    """The mean loss of each on the samples, in nats per graded token, computed in fp32; one model in memory at a time."""
    import torch

    from litlora.checkpoint.weights import load_model
    from litlora.precision import device_of
    from litlora.train.loss import loss_of_samples

    found = []
    for checkpoint in checkpoints:
        model = load_model(checkpoint, dtype=torch.float32, device=device_of(accelerator))
        total, graded = loss_of_samples(model, samples)
        found.append(total / graded)
    return found


def loss_bound(merged: Checkpoint, loss: float) -> float:
    """How far a merged model's loss may lie from that of its parts, which is `loss`."""
    return LOSS_BOUNDS[rounded_to(merged)] * max(1.0, loss)


def probe_ids(adapter: Checkpoint, merged: Checkpoint) -> list[list[int]]:
    """Token ids to compute with: the probe texts, or, of a model without a tokenizer, ids spread over its vocabulary."""
    config = merged.config()
    context = min(64, config.max_position_embeddings)
    if not names.has_vocabulary(adapter.tokenizer_dir()):
        return [[(1 + 7919 * (i + probe)) % config.vocab_size for i in range(context)] for probe in range(4)]
    from litlora.checkpoint.files import open_tokenizer

    tokenizer = open_tokenizer(adapter)
    rows = [[i for i in tokenizer.encode(text, special=False) if i < config.vocab_size][:context] for text in PROBES]
    return [ids for ids in rows if ids]
