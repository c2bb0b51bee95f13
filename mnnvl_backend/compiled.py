"""The way from Python to the compiled module: loads it, and refuses one that was built against another torch."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from types import ModuleType

import torch

REBUILD = "run `pip install --no-build-isolation .` in its source tree, or `python setup.py build_ext --inplace` there"


def load_compiled() -> ModuleType:
    """The compiled module. Not a plain import, so that the error says what to do.

    Raises:
        RuntimeError: it isn't built, or was built for another torch or Python.
    """
    try:
        module = importlib.import_module("mnnvl_backend._C")
    except ImportError as error:
        raise RuntimeError(
            f"mnnvl_backend's compiled module could not be loaded: {error}. It must be built with the torch that uses "
            f"it (this is torch {torch.__version__}, Python {sys.version.split()[0]}): {REBUILD}"
        ) from error
    built_with = built_for_torch(module)
    if built_with and _release(built_with) != _release(torch.__version__):
        # It may well load: what differs is the layout of c10d's classes, which shows as a crash in some later call.
        raise RuntimeError(
            f"mnnvl_backend's compiled module was built with torch {built_with} and can't be used with another; this "
            f"is torch {torch.__version__}. With it, {REBUILD}"
        )
    return module


def built_for_torch(module: ModuleType) -> str:
    """The version of torch that a compiled module was built with, such as "2.13.0"; empty if it doesn't say."""
    return str(module.build_info().get("torch") or "")


def _release(version: str) -> tuple[int, ...]:
    """(major, minor): c10d's classes keep their layout within a minor release. Local parts (+cu130) don't matter."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, match.groups())) if match else ()


def nccl_path() -> str:
    """libnccl.so.2 of an nvidia-nccl wheel, empty if there is none. libnccl is otherwise looked for by its soname."""
    if not torch.backends.cuda.is_built():
        return ""
    spec = importlib.util.find_spec("nvidia")  # a namespace package: nothing of it is executed
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = os.path.join(folder, "nccl", "lib", "libnccl.so.2")
        if os.path.exists(path):
            return path
    return ""
