"""Makes "mnnvl" known to torch.distributed, and creates its process groups."""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from mnnvl_backend.compiled import load_compiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NAME = "mnnvl"
EXIT_GRACE_MS = 2000


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
    environment = config.read_environment()
    settings = config.merge(options, environment, config.milliseconds(dist_backend_opts.timeout))
    compiled = load_compiled()
    _finish_at_exit(compiled)
    if environment.dump_signal is not None:
        _dump_on_signal(compiled, environment.dump_signal)
    return compiled.ProcessGroupMNNVL(
        dist_backend_opts.store,
        dist_backend_opts.group_rank,
        dist_backend_opts.group_size,
        global_ranks=dist_backend_opts.global_ranks_in_group,
        **settings.fields(),
    )


@functools.cache
def _finish_at_exit(compiled: ModuleType) -> None:
    """Before the interpreter goes: a thread that completes a future then would want a GIL that is no more, and abort
    the process. What is in flight gets a moment to end, the rest is aborted."""
    atexit.register(compiled.finish_groups, EXIT_GRACE_MS)


@functools.cache
def _dump_on_signal(compiled: ModuleType, signum: int) -> None:
    """Once: a program that takes the signal for itself later may do so, and makes groups as before. Again in a forked
    child, which has lost the handler."""
    try:
        compiled.write_on_signal(signum)
    except RuntimeError as error:  # no reason to have no group
        warnings.warn(f"MNNVL_DUMP_SIGNAL: {error}", RuntimeWarning, stacklevel=3)


# Of a child by fork(), of any backend, with the process that made them: their ranks are that one's.
inherited_groups: dict[ProcessGroup, int] = {}


def _in_child() -> None:
    _dump_on_signal.cache_clear()
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is not None and torch.distributed.is_available():
        for group in c10d._world.pg_map:
            inherited_groups.setdefault(group, os.getppid())


os.register_at_fork(after_in_child=_in_child)


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

    The other case: init_process_group() without a name, after somebody made "mnnvl" a device's default
    (Backend.default_device_backend_map). That function then takes NCCL or gloo for the default without a look, and what
    asks the group for it (DDP's logger, new_group's warnings) fails.
    """
    helper = c10d._new_process_group_helper
    signature = inspect.signature(helper)

    @functools.wraps(helper)
    def with_default_backend(*args: Any, **kwargs: Any) -> Any:
        result = helper(*args, **kwargs)
        pg = result[0]
        if type(pg) is c10d.ProcessGroup:
            backend = c10d.Backend(str(signature.bind(*args, **kwargs).arguments["backend"]))
            names = set(c10d.BackendConfig(backend).get_device_backend_map().values())
            if pg.name() == "undefined" or (backend == c10d.Backend.UNDEFINED and NAME in names):
                _set_default_backend(pg, names)
        return result

    c10d._new_process_group_helper = with_default_backend  # type: ignore[attr-defined]


def _set_default_backend(pg: ProcessGroup, names: set[str]) -> None:
    """CUSTOM for a map with "mnnvl" in it, else what torch would have chosen had no plugin been registered."""
    if NAME in names:
        pg._set_default_backend(type(pg).BackendType.CUSTOM)
    elif "gloo" in names:
        pg._set_default_backend(type(pg).BackendType.GLOO)
