"""What stands in the store is others' bytes: whatever they are, a set-up ends at once or by its deadline, with an error
that can be shown and, where a rank's record doesn't parse, names the rank. Parsers alone: tests/fuzz."""

from __future__ import annotations

import os
import pickle
import time
from contextlib import suppress
from datetime import timedelta

import pytest
import torch.distributed as dist
from meeting import PREFIX, Threads, exchange, set_up

from mnnvl_backend import wire
from mnnvl_backend.flashinfer.control import StoreComm

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

CASES = int(os.environ.get("MNNVL_TEST_CASES", "25"))
SETTINGS = {"deadline": None, "database": None, "derandomize": "MNNVL_TEST_CASES" not in os.environ}


def failed_set_up(store: dist.Store, seconds: float = 0.2) -> str:
    began = time.monotonic()
    with pytest.raises((dist.DistBackendError, TimeoutError)) as raised:
        set_up(store, 0, 2, seconds)
    assert time.monotonic() - began < seconds + 3
    return str(raised.value)


@hypothesis.settings(max_examples=CASES, **SETTINGS)
@hypothesis.given(st.binary(max_size=60))
def test_any_bytes_as_a_peer_s_presence(record: bytes) -> None:
    store = dist.HashStore()
    store.set(f"{PREFIX}/here/1", record)
    store.add(f"{PREFIX}/tries/1", 1)
    text = failed_set_up(store)
    assert "of rank 1" in text or "waited" in text or "word" in text, text


@pytest.mark.parametrize(
    ("record", "expected"),
    [(b"", "the set-up record of rank 1, 0 bytes, does not parse"), (b"x" * 60, "of rank 1, 60 bytes, does not parse"),
     (bytes(1 << 21), "the set-up record of rank 1 has 2097152 bytes, and none has more than 1048576")],
)  # fmt: skip
def test_a_malformed_presence_names_the_rank_at_once(record: bytes, expected: str) -> None:
    store = dist.HashStore()
    store.set(f"{PREFIX}/here/1", record)
    store.add(f"{PREFIX}/tries/1", 1)
    began = time.monotonic()
    assert expected in failed_set_up(store, seconds=30)
    assert time.monotonic() - began < 5


def test_a_word_that_is_no_text_is_shown() -> None:
    """Not as a UnicodeDecodeError, which would say nothing of the rank's reason."""
    store, threads = dist.HashStore(), Threads()
    threads.start("waits", lambda: exchange(store, 0, 2).all_gather(b""))
    peer = exchange(store, 1, 2)
    record = (5).to_bytes(8, "little") + bytes(8) + (2).to_bytes(4, "little")
    word = b"caf\xc3\xa9 \xff\x00\x1b[31m"
    time.sleep(0.05)
    process, litter = bytes(5 * 4), bytes(4)  # four empty texts and a pid; none
    store.set(f"{PREFIX}/here/1", record + len(word).to_bytes(4, "little") + word + process + litter)
    store.add(f"{PREFIX}/tries/1", 1)
    error, _ = threads.join()["waits"]
    assert isinstance(error, dist.DistBackendError)
    assert "café \\xff\\x00\\x1b[31m" in str(error)
    del peer


def test_numpy_integers_are_numbers() -> None:
    """As in a mapping's ranks, which may be numpy's everywhere else."""
    numpy = pytest.importorskip("numpy")
    assert wire.loads(wire.dumps((numpy.int64(3), [numpy.uint8(7)]))) == (3, [7])


def contribution(data: bytes) -> tuple[object, object]:
    """What two ranks get of a round in which rank 1 contributes `data`."""
    store, threads = dist.HashStore(), Threads()
    comm = StoreComm(store, 0, 2, timedelta(seconds=5), PREFIX)
    threads.start(0, lambda: comm.allgather("mine"))
    threads.start(1, lambda: exchange(store, 1, 2, 5).all_gather(data))
    results = threads.join()
    return results[0][0], results[1][0]


def test_a_contribution_has_a_limit() -> None:
    for result in contribution(bytes((1 << 20) + 1)):
        assert isinstance(result, (dist.DistBackendError, RuntimeError))
        assert "what rank 1 contributes has 1048577 bytes, and at most 1048576 are taken" in str(result)


class Ran(Exception):
    pass


def run_code() -> None:
    raise Ran


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[()]]:
        return run_code, ()


@pytest.mark.parametrize(
    "data", [pickle.dumps(Exploit()), b"", b"\xff", b'{"bytes": 1}', b'{"a": 1, "b": 2}', b"[" * 100000]
)
def test_objects_of_other_ranks_run_no_code(data: bytes) -> None:
    result, _ = contribution(data)
    assert isinstance(result, RuntimeError)
    assert f"what rank 1 said, {len(data)} bytes, is malformed" in str(result)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@hypothesis.settings(max_examples=4 * CASES, **SETTINGS)
@hypothesis.given(PLAIN, st.binary())
def test_plain_objects_come_as_they_went(value: object, anything: bytes) -> None:
    back = wire.loads(wire.dumps(value))
    assert (back, type(back)) == (value, type(value))
    with suppress(ValueError):
        wire.loads(anything)
    with pytest.raises(TypeError, match="allgather: expected numbers, text, bytes"):
        wire.dumps([value, object()])
