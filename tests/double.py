"""The test double of driver, NCCL and hosts: the Python module mnnvl_native, built by importing this (tests/native).

    run_fake_setup(**FakeSetupConfig)        SymmetricBuffer::create on every rank, over simulated drivers
    run_host_setup(**FakeSetupConfig)        HostSegments::create on every rank
    run_descriptor_exchange(world_size, scenario, timeout_ms)
    exported_descriptor_flags()              fcntl's flags of an exported allocation

The first three give FakeSetupResult as a dict (tests/native/fake_setup.h says what the fields are).
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

from native.build import build_module


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mnnvl_native", build_module())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_module = _load()
run_fake_setup = _module.run_fake_setup
run_host_setup = _module.run_host_setup
run_descriptor_exchange = _module.run_descriptor_exchange
exported_descriptor_flags = _module.exported_descriptor_flags
