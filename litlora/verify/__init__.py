"""The proof of a checkpoint, from what lies on the disk: nothing that was measured while it was made is believed.

files.py     every file and tensor against the hashes that were written down, and a model against its config.json
weights.py   of a merged model every number against base + adapter, computed once more in fp64
logits.py    what it computes: logits on probe texts, the loss on rows (this and the next need torch)
routing.py   experts: whether tokens go through the same ones, where rounding alone does not decide
"""

from pathlib import Path
from typing import Any

from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.shards import find_shards
from litlora.errors import WorkError
from litlora.verify.files import reread
from litlora.verify.logits import compare_logits

__all__ = ["compare_logits", "prove", "reread"]


def prove(adapter: Checkpoint, directory: Path) -> dict[str, Any]:
    """Both proofs of a merged model before it gets its name; what they found. WorkError where one fails."""
    if faults := reread(directory):
        raise WorkError("\n  ".join(["what lies on the disk is not what was written:", *faults]), where=directory)
    merged = resolve(directory)
    return {"tensors": len(find_shards(directory))} | compare_logits(adapter, merged)
