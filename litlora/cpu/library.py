"""What the compiler made of `native.c`, where it did and for this CPU. Without torch: a merge has no need of it."""

import ctypes
import functools
import importlib.machinery
import warnings
from pathlib import Path

VERSION = 6  # to be counted up, here and in native.c, where what is called there changes


@functools.cache
def working() -> ctypes.CDLL | None:
    """The library; None, and a warning, where it cannot be loaded; None where there is none, or not for this CPU."""
    try:
        return load() if compiled() and load().usable() else None
    except OSError as error:
        warnings.warn(f"the kernels for this CPU cannot be loaded ({error}): answers and merging take longer", stacklevel=2)
        return None


@functools.cache
def compiled() -> Path | None:
    """Where the compiler put it when litlora was installed."""
    paths = (Path(__file__).with_name(f"_native{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


@functools.cache
def load() -> ctypes.CDLL:
    """What `compiled` names. OSError where it cannot be loaded, or is of another version: a source tree that was updated since."""
    path = compiled()
    assert path is not None
    loaded = ctypes.CDLL(str(path))
    found = loaded.version() if hasattr(loaded, "version") else None
    if found != VERSION:
        raise OSError(f"{path} is of version {found}, not {VERSION}: install litlora again")
    return loaded
