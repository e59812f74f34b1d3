"""Torch and Fabric make a million objects while they are imported, and all of them stay. To look through them for garbage, again and
again while they come, takes a sixth of the time of importing them; and so it would at every full collection of the run.
"""

import atexit
import gc
import sys
from importlib import import_module
from typing import Any


def import_whole(name: str) -> Any:
    """A module. Where it is imported now, nothing is collected meanwhile, and what is there then is taken to stay."""
    if name in sys.modules or not gc.isenabled():
        return import_module(name)
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # what is taken apart at the end is all of it: else nanobind, in triton, complains of leaks
