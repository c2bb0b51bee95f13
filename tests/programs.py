"""Random programs of sends, receives, batches and collectives, right by construction: what tests/collectives/
test_random_programs.py runs.

A program is a timeline that every rank can make from its seed. Each rank goes through its own events in order of time.
A blocking event (a wait, a blocking call, a collective) stands later than the events of other ranks that it needs, or, where
ranks block together, at the same time; so by induction over time none can wait for ever. Whether the transport needs
anything more is what the programs find out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby


def any_source_tag(seed: int, number: int) -> int:
    """Of this message alone: another with its tag, be it of the next program, which a rank may have begun, could be taken
    in its place."""
    return 1000 * (seed % 1_000_000 + 1) + number


@dataclass
class Message:
    number: int
    source: int
    destination: int
    bytes: int
    tag: int
    any_source: bool = False

    def __str__(self) -> str:
        source = f"{self.source} (received from any source)" if self.any_source else str(self.source)
        return f"message {self.number}: {self.bytes} bytes, {source} to {self.destination}, tag {self.tag}"


@dataclass
class Collective:
    number: int
    kind: str  # all_reduce, broadcast, all_gather or barrier
    numel: int
    root: int
    asynchronous: bool


@dataclass(order=True)
class Event:
    """What a rank does at a time: post messages (all of one direction or mixed, if as a batch), wait, or a collective."""

    time: float
    rank: int
    what: str = field(compare=False)  # post, batch, blocking, collective, wait, poll
    messages: list[Message] = field(compare=False, default_factory=list)
    collective: Collective | None = field(compare=False, default=None)
    handle: int = field(compare=False, default=-1)  # a post's, and of the wait for it

    def __str__(self) -> str:
        subject = self.collective or "; ".join(map(str, self.messages)) or ""
        return f"{self.time:8.3f} rank {self.rank} {self.what} #{self.handle} {subject}"


@dataclass
class Program:
    seed: int
    world_size: int
    in_order: bool  # a pair's messages are received in the order in which they were sent, as a GPU wants it
    largest: int = 16 << 20
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.seed} {self.world_size} {self.in_order}")
        self._numbers, self._handles = 0, 0
        self._last: dict[tuple[int, ...], tuple[float, float]] = {}  # of those that may not overtake: posts' times
        for now in range(self._random.randint(3, 16)):
            makers = [
                self._single,
                self._single,
                self._single,
                self._blocking,
                self._batch,
                self._lopsided,
                self._collective,
            ]
            self._random.choice(makers)(float(now))
        self.events.sort()

    def __str__(self) -> str:
        title = f"program {self.seed} of {self.world_size} ranks{', in order' if self.in_order else ''}"
        return "\n".join([title, *map(str, self.events)])

    def of_rank(self, rank: int) -> Iterator[Event]:
        return (event for event in self.events if event.rank == rank)

    def _bytes(self) -> int:
        """Most are small, a few larger than any ring."""
        kind = self._random.random()
        if kind < 0.08:
            return 0
        top = 200 if kind < 0.6 else 20_000 if kind < 0.85 else 400_000 if kind < 0.99 else self.largest
        return self._random.randint(1, min(top, self.largest))

    def _message(self, source: int, destination: int) -> Message:
        self._numbers += 1
        any_source = not self.in_order and self._random.random() < 0.1
        tag = any_source_tag(self.seed, self._numbers) if any_source else self._random.choice([0, 0, 1, 2, 7])
        return Message(self._numbers, source, destination, self._bytes(), tag, any_source)

    def _pair(self) -> tuple[int, int]:
        source, destination = self._random.sample(range(self.world_size), 2)
        return source, destination

    def _earliest(self, message: Message, in_batch: bool = False) -> tuple[float, float]:
        """When its ends may post it: behind earlier messages that it must not overtake. A batch of messages in order
        begins when these have ended, and holds up its other messages until then: so both their ends are posted."""
        send, receive = self._last.get(self._queue(message), (-1.0, -1.0))
        if in_batch and self.in_order:
            send = receive = max(send, receive)
        return send + 1e-6, receive + 1e-6

    def _record(self, message: Message, send: float, receive: float) -> None:
        self._last[self._queue(message)] = send, receive

    def _queue(self, message: Message) -> tuple[int, ...]:
        return (message.source, message.destination, *([] if self.in_order else [message.tag]))

    def _later(self, after: float) -> float:
        return after + self._random.choice([0.001, 0.5, 2.0, 6.0]) * (1 + self._random.random())

    def _post(self, time: float, rank: int, messages: list[Message], ready: float) -> None:
        """Also the wait for it, some time after all that it needs is `ready`."""
        self._handles += 1
        batch = len(messages) > 1 or self._random.random() < 0.2
        self.events.append(Event(time, rank, "batch" if batch else "post", messages, handle=self._handles))
        self._wait(rank, max(time, ready))

    def _wait(self, rank: int, ready: float) -> None:
        what = "poll" if self._random.random() < 0.15 else "wait"
        self.events.append(Event(self._later(ready), rank, what, handle=self._handles))

    def _single(self, now: float) -> None:
        """Posted early or late at either end."""
        message = self._message(*self._pair())
        send, receive = (
            max(earliest, now + self._random.choice([0.0, 0.0, 0.3, 3.0]) + 0.2 * self._random.random())
            for earliest in self._earliest(message)
        )
        self._record(message, send, receive)
        self._post(send, message.source, [message], receive)
        self._post(receive, message.destination, [message], send)

    def _blocking(self, now: float) -> None:
        """send meets recv; nobody else stands at that time."""
        message = self._message(*self._pair())
        time = max(now + 0.5 + 0.2 * self._random.random(), *self._earliest(message))
        self._record(message, time, time)
        for rank in (message.source, message.destination):
            self.events.append(Event(time, rank, "blocking", [message]))

    def _batch(self, now: float) -> None:
        """Messages among some ranks; each posts all of its own at once, in an order of its own."""
        messages = [self._message(*self._pair()) for _ in range(self._random.randint(1, 2 * self.world_size))]
        time = max(
            now + 0.8 + 0.1 * self._random.random(), *(t for m in messages for t in self._earliest(m, in_batch=True))
        )
        for message in messages:
            self._record(message, time, time)
        for rank in range(self.world_size):
            own = [m for m in messages if rank in (m.source, m.destination)]
            if own:
                self._post(time, rank, self._shuffled(own), time)

    def _shuffled(self, messages: list[Message]) -> list[Message]:
        """Those of one pair and direction stay in order, wherever they go."""
        routes = [(m.source, m.destination) for m in messages]
        self._random.shuffle(routes)
        queues: dict[tuple[int, int], list[Message]] = {}
        for message in messages:
            queues.setdefault((message.source, message.destination), []).append(message)
        return [queues[route].pop(0) for route in routes]

    def _lopsided(self, now: float) -> None:
        """A batch at one rank, single calls at the others."""
        rank = self._random.randrange(self.world_size)
        others = [r for r in range(self.world_size) if r != rank]
        messages = []
        for _ in range(self._random.randint(1, 5)):
            other = self._random.choice(others)
            messages.append(self._message(*((rank, other) if self._random.random() < 0.5 else (other, rank))))
        sides = [0 if m.source == rank else 1 for m in messages]
        earliest = [self._earliest(m, in_batch=True) for m in messages]
        time = max(now + 0.9, *(ends[side] for ends, side in zip(earliest, sides, strict=True)))
        ready = time
        for message, side in zip(messages, sides, strict=True):
            theirs = time + self._random.choice([-0.3, 0.3, 2.0]) * self._random.random()
            theirs = max(theirs, self._earliest(message)[1 - side])
            self._record(message, *((time, theirs) if side == 0 else (theirs, time)))
            self._post(theirs, message.destination if side == 0 else message.source, [message], time)
            ready = max(ready, theirs)
        if self.in_order:  # what comes next on these ways has to wait for the whole batch
            for message in messages:
                self._record(message, ready, ready)
        self._post(time, rank, messages, ready)

    def _collective(self, now: float) -> None:
        self._numbers += 1
        kind = self._random.choice(["all_reduce", "all_reduce", "broadcast", "all_gather", "barrier"])
        numel = self._random.choice([1, 37, 1001, 60_001])
        asynchronous = self._random.random() < 0.4
        collective = Collective(self._numbers, kind, numel, self._random.randrange(self.world_size), asynchronous)
        now += 0.7 + 0.05 * self._random.random()
        for rank in range(self.world_size):
            self._handles += 1
            self.events.append(Event(now, rank, "collective", collective=collective, handle=self._handles))
            if asynchronous:
                self._wait(rank, now)


def early_waits(program: Program) -> list[Event]:
    """Of a program in order, the waits that stand before what they wait for is sure to have ended. On a GPU messages that
    were posted together begin together, when all that this rank has posted before on each of their ways has ended, and
    they end when the other ends of all of them have begun."""
    posts = [event for event in program.events if event.messages]
    ends_of: dict[int, list[int]] = {}  # posts, by message
    last: dict[tuple[int, int, int], int] = {}  # by rank and way
    before: list[set[int]] = []
    for number, post in enumerate(posts):
        ways = {(post.rank, m.source, m.destination) for m in post.messages}
        before.append({last[way] for way in ways if way in last})
        last.update(dict.fromkeys(ways, number))
        for message in post.messages:
            ends_of.setdefault(message.number, []).append(number)
    needed = [{end for message in post.messages for end in ends_of[message.number]} for post in posts]
    number_of = {(post.rank, post.handle): number for number, post in enumerate(posts) if post.what != "blocking"}

    early: list[Event] = []
    begun: set[int] = set()
    ended: set[int] = set()
    for time, at_once in groupby(program.events, key=lambda event: event.time):
        posted = [number for number, post in enumerate(posts) if post.time <= time]
        while True:
            known = len(begun) + len(ended)
            begun.update(number for number in posted if before[number] <= ended)
            ended.update(number for number in begun if needed[number] <= begun)
            if len(begun) + len(ended) == known:
                break
        for event in at_once:
            if event.what == "blocking":
                late = next(number for number, post in enumerate(posts) if post is event) not in ended
            else:
                number = number_of.get((event.rank, event.handle)) if event.what in ("wait", "poll") else None
                late = number is not None and number not in ended
            if late:
                early.append(event)
    return early
