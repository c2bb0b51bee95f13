"""Makes "mnnvl" known to torch.distributed, and creates its process groups."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NAME = "mnnvl"


def load_compiled() -> ModuleType:
    """The compiled module. Not a plain import, so that the error says what to do.

    Raises:
        RuntimeError: it isn't built, or was built for another torch or Python.
    """
    try:
        return importlib.import_module("mnnvl_backend._C")
    except ImportError as error:
        raise RuntimeError(
            f"mnnvl_backend's compiled module could not be loaded: {error}. It must be built with the torch that uses "
            f"it (this is torch {torch.__version__}, Python {sys.version.split()[0]}): run "
            "`pip install --no-build-isolation .` in its source tree, or `python setup.py build_ext --inplace` there"
        ) from error


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


def create(dist_backend_opts: Any, pg_options: Any) -> Any:
    """torch.distributed's creator ("extended API"): one backend object serves CPU and CUDA tensors.

    Raises:
        TypeError, ValueError: bad options, or a malformed MNNVL_* variable.
        RuntimeError: the compiled module can't be loaded.
    """
    from mnnvl_backend import config
    from mnnvl_backend.options import Options

    options = Options() if pg_options is None else pg_options
    if not isinstance(options, Options):
        raise TypeError(f"pg_options of backend 'mnnvl': expected mnnvl_backend.Options, got {type(options).__name__}")
    timeout: timedelta = dist_backend_opts.timeout
    settings = config.merge(options, config.read_environment(), max(1, int(timeout.total_seconds() * 1000)))
    return load_compiled().ProcessGroupMNNVL(
        dist_backend_opts.store,
        dist_backend_opts.group_rank,
        dist_backend_opts.group_size,
        timeout_ms=settings.timeout_ms,
        workspace_bytes=settings.workspace_bytes,
        strategy=settings.strategy.value,
        multicast=settings.multicast,
        bootstrap=settings.bootstrap_code,
        host_id=settings.host_id,
        blocking_wait=settings.blocking_wait,
        nccl_path=nccl_path(),
    )


def register() -> None:
    """Registers the backend once; does nothing in a torch without distributed."""
    if not torch.distributed.is_available():
        return
    from torch.distributed import distributed_c10d as c10d

    if hasattr(c10d.Backend, NAME.upper()):
        return
    c10d.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])
    _complete_default_backend(c10d)


def _complete_default_backend(c10d: ModuleType) -> None:
    """Wraps torch's _new_process_group_helper, which forgets a group's default backend as soon as a plugin is known.

    For a device map such as "cpu:gloo,cuda:mnnvl" that function takes the *first* registered plugin's upper-case name
    and looks for it among the map's lower-case ones, so it finds none; and because any plugin is registered, it skips
    its own fallback to gloo as well. The group then has the default backend "undefined": every new_group and
    destroy_process_group warns from hasHooks(), sequence numbers and splitting fail, and that even for somebody's
    "cpu:gloo,cuda:gloo" who only has this package installed.

    The creator never sees the group, and the registry's keys are looked up in upper case elsewhere, so there is no
    hook before the group is returned. Hence this wrapper: it fills in what is missing and otherwise stays out of the
    way. In a torch that sets the default itself it does nothing.
    """
    helper = c10d._new_process_group_helper
    signature = inspect.signature(helper)

    @functools.wraps(helper)
    def with_default_backend(*args: Any, **kwargs: Any) -> Any:
        result = helper(*args, **kwargs)
        pg = result[0]
        if type(pg) is c10d.ProcessGroup and pg.name() == "undefined":
            backend = str(signature.bind(*args, **kwargs).arguments["backend"]).lower()
            _set_default_backend(pg, {part.rpartition(":")[2] for part in backend.split(",")})
        return result

    c10d._new_process_group_helper = with_default_backend  # type: ignore[attr-defined]


def _set_default_backend(pg: ProcessGroup, names: set[str]) -> None:
    """CUSTOM for a map with "mnnvl" in it, else what torch would have chosen had no plugin been registered."""
    if NAME in names:
        pg._set_default_backend(type(pg).BackendType.CUSTOM)
    elif "gloo" in names:
        pg._set_default_backend(type(pg).BackendType.GLOO)
