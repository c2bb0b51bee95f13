"""Options and the environment: what is refused, what goes before what, and what the compiled module is told."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path

import pytest

from mnnvl_backend import MNNVLAllreduceFusionStrategy as Strategy
from mnnvl_backend import Options, config

ROOT = Path(__file__).resolve().parents[2]
CENTURY_MS = 100 * 365 * 24 * 3600 * 1000


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"timeout": 5}, TypeError, r"Options.timeout: expected datetime.timedelta or None, got 5"),
        ({"timeout": timedelta(0)}, ValueError, "Options.timeout: expected a positive duration"),
        ({"timeout": timedelta(seconds=-1)}, ValueError, "Options.timeout: expected a positive duration"),
        ({"workspace_bytes": "1M"}, TypeError, r"Options.workspace_bytes: expected an integer from .*got '1M' \(str\)"),
        ({"workspace_bytes": 2.0**21}, TypeError, r"Options.workspace_bytes: expected an .*got 2097152.0 \(float\)"),
        ({"workspace_bytes": True}, TypeError, r"Options.workspace_bytes: expected an .*got True \(bool\)"),
        ({"workspace_bytes": 10}, ValueError, "Options.workspace_bytes: .*from 1048576 to 1099511627776 bytes, got 10"),
        ({"workspace_bytes": 1 << 70}, ValueError, "Options.workspace_bytes: expected .*, got 1180591620717411303424"),
        ({"strategy": "ring"}, ValueError, "Options.strategy: expected one of 'oneshot', 'twoshot', 'auto'"),
        ({"strategy": 0}, TypeError, r"Options.strategy: expected one of .*, got 0 \(int\)"),
        ({"strategy": ["auto"]}, TypeError, r"Options.strategy: expected one of .*, got \['auto'\] \(list\)"),
        ({"multicast": "maybe"}, ValueError, "Options.multicast: expected True, False or 'auto', got 'maybe'"),
        ({"multicast": 1}, TypeError, r"Options.multicast: expected True, False or 'auto', got 1 \(int\)"),
        ({"bootstrap": "mpi"}, ValueError, "Options.bootstrap: expected 'auto', 'nccl' or 'store', got 'mpi'"),
        ({"bootstrap": None}, TypeError, r"Options.bootstrap: expected .*, got None"),
        ({"max_ctas": 0}, ValueError, "Options.max_ctas: expected an integer from 1 to 1024, got 0"),
        ({"max_ctas": True}, TypeError, "Options.max_ctas: expected .*, got True"),
        ({"async_max_ctas": None}, TypeError, "Options.async_max_ctas: expected an integer from 1 to 1024, got None"),
        ({"pdl": 1}, TypeError, r"Options.pdl: expected True or False, got 1 \(int\)"),
    ],
)
def test_options_name_the_argument(options, error, text):
    """When made, and, since attributes can be assigned, when a group takes them."""
    with pytest.raises(error, match=text):
        Options(**options)
    ((name, value),) = options.items()
    assigned = Options()
    setattr(assigned, name, value)
    with pytest.raises(error, match=text):
        config.merge(assigned, config.Config())


def test_integers_of_numpy_are_taken():
    np = pytest.importorskip("numpy")
    options = Options(workspace_bytes=np.int64(2 << 20))
    assert options.workspace_bytes == 2 << 20
    assert type(options.workspace_bytes) is int  # what the compiled module is told


LONG = [timedelta(days=36500), timedelta(days=109500), timedelta(days=10**9 - 1), timedelta.max]


@pytest.mark.parametrize("long", LONG)
def test_very_long_timeouts_saturate(long):
    """As int64 they must survive being nanoseconds and being added to a clock; a double would not even be exact."""
    assert config.milliseconds(long) == CENTURY_MS
    assert config.merge(Options(timeout=long), config.Config()).fields()["timeout_ms"] == CENTURY_MS
    assert 2 * CENTURY_MS * 10**6 < 2**63


@pytest.mark.parametrize(
    ("duration", "expected"),
    [(timedelta(microseconds=1), 1), (timedelta(milliseconds=1), 1), (timedelta(microseconds=2999), 2),
     (timedelta(minutes=30), 1800000), (timedelta(days=36499, milliseconds=1), 36499 * 86400000 + 1)],
)  # fmt: skip
def test_timeouts_in_milliseconds(duration, expected):
    assert config.milliseconds(duration) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("MNNVL_STRATEGY", "ring", "oneshot, twoshot or auto"),
        ("MNNVL_MULTICAST", "yes", "0, 1 or auto"),
        ("MNNVL_BOOTSTRAP", "mpi", "nccl, store or auto"),
        ("MNNVL_WORKSPACE_BYTES", "12X", "bytes from 1M to 1024G"),
        ("MNNVL_WORKSPACE_BYTES", "1K", "bytes from 1M to 1024G"),
        ("MNNVL_WORKSPACE_BYTES", "1025G", "bytes from 1M to 1024G"),
        ("MNNVL_WORKSPACE_BYTES", "9" * 40, "bytes from 1M to 1024G"),
        ("MNNVL_WORKSPACE_BYTES", "٤M", "bytes from 1M to 1024G"),
        ("MNNVL_BLOCKING_WAIT", "2", "0 or 1"),
    ],
)
def test_malformed_variables_are_errors(name, value, expected):
    with pytest.raises(ValueError, match=f"{name}: expected {expected}.*, got '{value}'"):
        config.read_environment({name: value})


def test_variables_are_read():
    assert config.read_environment({}) == config.Config()
    assert config.read_environment({"MNNVL_STRATEGY": "", "OTHER": "x"}) == config.Config()
    read = config.read_environment(
        {"MNNVL_STRATEGY": "TwoShot", "MNNVL_MULTICAST": "auto", "MNNVL_BOOTSTRAP": "store",
         "MNNVL_WORKSPACE_BYTES": "64M", "MNNVL_HOST_ID": "h", "MNNVL_BLOCKING_WAIT": "1", "MNNVL_PDL": "0",
         "MNNVL_MAX_CTAS": "32", "MNNVL_ASYNC_MAX_CTAS": "16"}
    )  # fmt: skip
    assert read == config.Config(Strategy.TWOSHOT, "auto", "store", 64 << 20, "h", True, pdl=False, max_ctas=32,
                                 async_max_ctas=16)  # fmt: skip
    assert config.merge(Options(), read).pdl is False
    assert config.merge(Options(max_ctas=8), read).max_ctas == 32
    assert config.merge(Options(max_ctas=8), config.Config()).max_ctas == 8
    assert config.merge(Options(async_max_ctas=8), read).async_max_ctas == 16
    assert config.merge(Options(async_max_ctas=8), config.Config()).async_max_ctas == 8
    assert config.merge(Options(pdl=False), config.Config()).pdl is False


def test_unknown_variable_warns():
    with pytest.warns(UserWarning, match="MNNVL_STRATEGEY is not a variable of mnnvl_backend.*known: MNNVL_STRATEGY"):
        config.read_environment({"MNNVL_STRATEGEY": "oneshot"})


def test_variables_of_the_tests_are_no_unknown_ones():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.read_environment({"MNNVL_TEST_SEED": "1"})


@pytest.mark.parametrize(
    ("environ", "allowed"),
    [({}, True), ({"MNNVL_MULTICAST": "0"}, False), ({"MNNVL_MULTICAST": "1"}, True),
     ({"NCCL_NVLS_ENABLE": "0"}, False), ({"NCCL_NVLS_ENABLE": "2"}, True),
     ({"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}, False), ({"TORCH_SYMM_MEM_DISABLE_MULTICAST": "0"}, True),
     ({"TORCH_SYMM_MEM_DISABLE_MULTICAST": "anything"}, False),
     ({"MNNVL_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}, False)],
)  # fmt: skip
def test_every_no_forbids_multicast(environ, allowed):
    assert config.merge(Options(), config.read_environment(environ)).multicast is allowed
    assert config.merge(Options(multicast=False), config.read_environment(environ)).multicast is False
    fields = config.merge(Options(), config.read_environment(environ)).fields()
    assert (fields["multicast"], fields["multicast_forbidden"] == "") == (allowed, allowed)


def test_the_compiled_module_is_told_who_forbids_multicast():
    environ = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "MNNVL_MULTICAST": "1"}
    fields = config.merge(Options(), config.read_environment(environ)).fields()
    assert fields["multicast_forbidden"] == "NCCL_NVLS_ENABLE=0, TORCH_SYMM_MEM_DISABLE_MULTICAST=1"
    fields = config.merge(Options(multicast=False), config.read_environment({})).fields()
    assert (fields["multicast"], fields["multicast_forbidden"]) == (False, "")


def test_environment_goes_before_options():
    options = Options(timeout=timedelta(seconds=2), workspace_bytes=2 << 20, strategy="oneshot", bootstrap="nccl")
    merged = config.merge(options, config.Config(), timeout_ms=99)
    assert merged == config.Settings(2 << 20, Strategy.ONESHOT, True, "nccl", "", False, 2000)
    environ = {"MNNVL_STRATEGY": "auto", "MNNVL_WORKSPACE_BYTES": "3M", "MNNVL_BOOTSTRAP": "store"}
    merged = config.merge(options, config.read_environment(environ))
    assert (merged.strategy, merged.workspace_bytes, merged.bootstrap) == (Strategy.AUTO, 3 << 20, "store")
    assert config.merge(Options(), config.Config(), timeout_ms=99).timeout_ms == 99


def test_fields_are_what_the_compiled_module_takes(monkeypatch):
    monkeypatch.setattr(config, "nccl_path", lambda: "/x/libnccl.so.2")
    environ = {"MNNVL_HOST_ID": "host", "MNNVL_BLOCKING_WAIT": "1", "MNNVL_MULTICAST": "0"}
    options = Options(timeout=timedelta(seconds=2), workspace_bytes=2 << 20, strategy="twoshot", bootstrap="nccl")
    assert config.merge(options, config.read_environment(environ)).fields() == {
        "timeout_ms": 2000,
        "workspace_bytes": 2 << 20,
        "strategy": 1,
        "cpu_oneshot_bytes": {},
        "cuda_oneshot_bytes": {},
        "pdl": True,
        "max_ctas": 0,
        "async_max_ctas": 32,
        "multicast": False,
        "multicast_forbidden": "MNNVL_MULTICAST=0",
        "bootstrap": 0,
        "host_id": "host",
        "nccl_path": "/x/libnccl.so.2",
        "blocking_wait": True,
    }
    defaults = config.merge(Options(), config.Config()).fields()
    assert (defaults["workspace_bytes"], defaults["strategy"], defaults["bootstrap"]) == (0, 99, 2)
    assert {name: type(value) for name, value in defaults.items()} == {
        "timeout_ms": int, "workspace_bytes": int, "strategy": int, "cpu_oneshot_bytes": dict,
        "cuda_oneshot_bytes": dict, "pdl": bool, "max_ctas": int, "async_max_ctas": int, "multicast": bool, "multicast_forbidden": str,
        "bootstrap": int, "host_id": str, "nccl_path": str, "blocking_wait": bool,
    }  # fmt: skip


def test_readme_has_the_table_of_variables():
    readme = (ROOT / "README.md").read_text()
    for variable in config.VARIABLES:
        assert f"| `{variable.name}` | {variable.expected} | {variable.default} | {variable.meaning} |" in readme
