"""The proof of a merge beyond what is measured while it is made: the directory read again, and its logits against the step's.

`reread` needs no torch; `compare_logits` imports it when it is called.
"""

from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.fingerprint import tensor_digests
from litlora.checkpoint.reading import read_json, sha256
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.shards import find_shards
from litlora.errors import UserError, WorkError

# How far the logits may differ, times max(1, largest logit), and their KL divergence in nats: by the dtype that rounded the weights.
# The first column is what random models of a few layers keep with room to spare; KL grows with depth, so it has more of it.
BOUNDS = {"F32": (1e-5, 1e-8), "F16": (5e-3, 1e-4), "BF16": (4e-2, 1e-3)}

PROBES = (  # texts of several kinds; the ids that come of them are cut to the model's context
    "Once upon a time there was a small house at the edge of the forest.",
    "def add(a, b):\n    return a + b\n",
    '{"name": "Ada", "born": 1815, "languages": ["en", "fr"]}',
    "Die Summe aus 17 und 25 ist 42. 你好，世界！",
)


def prove(adapter: Checkpoint, directory: Path) -> dict[str, Any]:
    """Both proofs of a merged model before it gets its name; what they found. WorkError where one fails."""
    if faults := reread(directory):
        raise WorkError("\n  ".join(["what lies on the disk is not what was written:", *faults]), where=directory)
    merged = resolve(directory)
    return {"tensors": len(find_shards(directory))} | compare_logits(adapter, merged)


def reread(directory: Path) -> list[str]:
    """What differs from the merged directory's own report, one line each; every byte is read, nothing is taken from a cache."""
    report = read_json(directory, names.MERGE_REPORT)
    weights, files = report.get("weights"), report.get("files")
    if not isinstance(weights, dict) or not isinstance(files, dict):
        raise UserError("holds no hashes", where=directory / names.MERGE_REPORT)
    found = tensor_digests(find_shards(directory), use_cache=False)
    faults = [f"{name} is missing" for name in weights if name not in found]
    faults += [f"{name} was added" for name in found if name not in weights]
    faults += [f"{name} was altered" for name in weights if name in found and found[name] != weights[name]]
    for name, recorded in files.items():
        path = directory / name
        if not path.is_file() or sha256(path) != recorded:
            faults.append(f"{name} was altered" if path.is_file() else f"{name} is missing")
    return faults


def compare_logits(adapter: Checkpoint, merged: Checkpoint) -> dict[str, Any]:
    """The merged model against the base with what was trained on it, both computed in fp32. WorkError where they differ beyond the
    dtype's bound."""
    import torch

    from litlora.checkpoint.weights import load_model
    from litlora.safetensors_file import SafetensorsFile

    probes = probe_ids(adapter, merged)
    logits = []
    with torch.inference_mode():
        for checkpoint in (adapter, merged):
            model = load_model(checkpoint, dtype=torch.float32).eval()
            logits.append([model(torch.tensor([ids])).double() for ids in probes])
            del model  # two models never lie in memory together
    expected, found = (torch.cat([one[0] for one in side]) for side in logits)  # (T, V)
    largest = float(expected.abs().max())
    difference = float((expected - found).abs().max())
    kl = float((expected.softmax(-1) * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean())
    shards = merged.shards()
    head = next(name for name in ("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight") if name in shards)
    with SafetensorsFile(shards[head]) as file:
        bound, kl_bound = BOUNDS.get(file.tensors[head].dtype, BOUNDS["BF16"])
    bound *= max(1.0, largest)
    if not (difference <= bound and kl <= kl_bound):
        seen = f"logits differ by {difference:.3g} (at most {bound:.3g}), KL {kl:.3g} (at most {kl_bound:.3g})"
        raise WorkError(
            f"the merged model computes something else: {seen}",
            where=adapter.path,
            hint="use the adapter unmerged, and report this",
        )
    return {
        "positions": len(expected),
        "largest_logit": largest,
        "largest_difference": difference,
        "bound": bound,
        "kl": kl,
        "kl_bound": kl_bound,
    }


def probe_ids(adapter: Checkpoint, merged: Checkpoint) -> list[list[int]]:
    """Token ids to compute with: the probe texts, or, of a model without a tokenizer, ids spread over its vocabulary."""
    config = merged.config()
    context = min(64, config.max_position_embeddings)
    if not (adapter.tokenizer_dir() / names.TOKENIZER).exists():
        return [[(1 + 7919 * (i + probe)) % config.vocab_size for i in range(context)] for probe in range(4)]
    from litlora.checkpoint.files import open_tokenizer

    tokenizer = open_tokenizer(adapter)
    rows = [tokenizer.encode(text, special=False)[:context] for text in PROBES]
    return [ids for ids in rows if ids]
