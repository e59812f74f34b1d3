"""Checkpoints: what a path means, what lies on the disk, and how it gets there. The one owner of file names.

names        every file name                      resolve      path -> Checkpoint; steps of a run, whole or torn
reading      opening files of a model with care   checkpoint   Checkpoint: config, shards, base, tokenizer, adapter
manifest     litlora.json, hashes                 shards       tensor -> file       base    adapter -> its model
fingerprint  one text for all weights             commit       atomic writing       run     a run's directory
card         README.md of a step                  weights, state   with torch: imported by those who need them
"""

from litlora.checkpoint.card import model_card
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import commit_directory, commit_step, write_atomically
from litlora.checkpoint.manifest import BaseRecord, Manifest, TrainingState, read_manifest
from litlora.checkpoint.resolve import Step, demo_base, list_steps, resolve, whole_steps
from litlora.checkpoint.run import Run, prepare_run_directory

__all__ = [
    "BaseRecord",
    "Checkpoint",
    "Manifest",
    "Run",
    "Step",
    "TrainingState",
    "commit_directory",
    "commit_step",
    "demo_base",
    "list_steps",
    "model_card",
    "prepare_run_directory",
    "read_manifest",
    "resolve",
    "whole_steps",
    "write_atomically",
]
