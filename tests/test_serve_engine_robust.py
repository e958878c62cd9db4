"""Things that end early: cancelled, late, too many, failing, shutting down. Everyone gets exactly one last event."""

import dataclasses
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from engines import PROMPTS, SMALL, complete, drawn, model, started

from serve.client import generate as events_of
from serve.engine import Engine, EngineConfig
from serve.protocol import EngineBusyError, EngineStoppedError, Finished, Request, Tokens
from serve.queue import RequestQueue, Throughput

LONG = Request(PROMPTS[1], 190, temperature=0.0)


class Events:
    """A sink that remembers, and can be waited for."""

    def __init__(self):
        self.events, self.ended = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Finished):
            self.ended.set()

    def last(self):
        assert self.ended.wait(60)
        time.sleep(0.05)  # nothing may follow
        assert sum(isinstance(event, Finished) for event in self.events) == 1
        return self.events[-1]


@pytest.fixture
def engine():
    engine = started(model())
    yield engine
    engine.drain(5)


def slowed(engine, seconds=0.02):
    """Make every chunk take a while, so that there is time to interfere."""
    decode = engine._device.decode

    def slow(*arguments):
        time.sleep(seconds)
        return decode(*arguments)

    engine._device.decode = slow
    return engine


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_cancelling_frees_slots_and_queue(engine):
    slowed(engine)
    sinks = [Events() for _ in range(7)]
    numbers = [engine.submit(LONG, sink) for sink in sinks]
    until(lambda: engine.stats().slots_used == 4)
    assert engine.stats().queued == 3 and engine.stats().queued_tokens == 3 * 195
    for number in (numbers[0], numbers[6], numbers[6], 999):
        engine.cancel(number)
    assert sinks[0].last() == sinks[6].last() == Finished("cancelled")
    until(lambda: engine.stats().queued == 1)
    for number in numbers:
        engine.cancel(number)
    assert [sink.last().reason for sink in sinks] == ["cancelled"] * 7
    until(lambda: engine.stats().slots_used == 0)
    assert len(drawn(engine, LONG)) == 190


def test_closing_an_iterator_cancels_its_request(engine):
    events = events_of(slowed(engine), LONG)
    while not isinstance(next(events), Tokens):
        pass
    events.close()
    until(lambda: engine.stats().slots_used == 0)
    assert engine.stats().generated_tokens < 100


def test_requests_past_their_deadline_are_given_up(engine):
    slowed(engine)
    late = dataclasses.replace(LONG, deadline=time.monotonic() + 0.2)
    sinks = [Events() for _ in range(6)]
    for sink in sinks:
        engine.submit(late, sink)
    assert {sink.last().reason for sink in sinks} == {"deadline"}
    assert complete(engine, Request(PROMPTS[0], 3, deadline=time.monotonic() + 60))[2] == Finished("length")


def test_a_full_queue_says_when_to_come_back():
    config = dataclasses.replace(SMALL, slots=1, max_queue=2, max_queue_tokens=500)
    engine = slowed(started(model(), config), 0.05)
    sinks = [Events() for _ in range(3)]
    engine.submit(LONG, sinks[0])
    until(lambda: engine.stats().slots_used == 1)
    for sink in sinks[1:]:
        engine.submit(LONG, sink)
    with pytest.raises(EngineBusyError, match="try again in") as busy:
        engine.submit(Request([1], 1), print)
    assert 1 <= busy.value.retry_after <= 60
    assert not engine.drain(0.1)  # what is left is given up
    assert [sink.last().reason for sink in sinks] == ["shutdown"] * 3
    with pytest.raises(EngineStoppedError, match="shutting down"):
        engine.submit(LONG, print)
    assert not engine.ready


def test_draining_lets_everything_end(engine):
    sinks = [Events() for _ in range(6)]
    for sink in sinks:
        engine.submit(LONG, sink)
    assert engine.drain(60)
    assert [sink.last() for sink in sinks] == [Finished("length")] * 6
    with pytest.raises(EngineStoppedError):
        engine.embed([[1]])


@pytest.mark.parametrize("method", ["read", "decode"])
def test_a_failing_device_ends_everything_with_an_error(engine, method):
    def fail(*arguments, **settings):
        raise RuntimeError("the device is on fire")

    slowed(engine)
    sinks = [Events() for _ in range(6)]
    for sink in sinks[:5]:
        engine.submit(LONG, sink)
    until(lambda: engine.stats().slots_used == 4)
    setattr(engine._device, method, fail)
    engine.cancel(1)  # makes room for the fifth, which is read
    engine.submit(LONG, sinks[5])
    last = [sink.last() for sink in sinks]
    assert {event.reason for event in last} <= {"error", "cancelled"}
    assert [event.reason for event in last].count("error") >= 5
    assert all("on fire" in event.detail for event in last if event.reason == "error")
    assert not engine.ready
    assert not engine.drain(1)
    with pytest.raises(EngineStoppedError, match="on fire"):
        engine.submit(LONG, print)


def test_an_engine_that_cannot_be_compiled_says_so():
    engine = Engine(dataclasses.replace(model(), params={}), SMALL)
    sink = Events()
    engine.submit(LONG, sink)
    with pytest.raises(EngineStoppedError, match="did not start"):
        engine.start(wait=True)
    assert sink.last().reason == "error"


def test_requests_may_come_before_the_engine_is_ready():
    engine = Engine(model(), SMALL)
    assert not engine.ready
    sink = Events()
    engine.submit(Request(PROMPTS[0], 3), sink)
    engine.start(wait=True)
    assert sink.last() == Finished("length")
    assert engine.ready
    assert engine.drain(5)


def test_an_engine_that_was_never_started_can_be_drained():
    engine, sink = Engine(model(), SMALL), Events()
    engine.submit(LONG, sink)
    assert not engine.drain(1)
    assert sink.last() == Finished("shutdown", sink.last().detail)


def test_one_request_alone_may_cost_more_than_the_queue_holds():
    queue = RequestQueue(max_requests=5, max_tokens=10, context=100)
    queue.put(Request([1] * 20, 5), print)
    with pytest.raises(EngineBusyError):
        queue.put(Request([1], 1), print)
    assert queue.waiting() == (1, 25)
    assert queue.pop().cost == 25 and queue.pop() is None
    assert queue.waiting() == (0, 0)
    queue.put(Request([1] * 20, 10**9), print)  # it will end with the context
    assert queue.waiting() == (1, 100)


def test_throughput_follows_the_speed_of_late():
    speed = Throughput()
    for _ in range(100):
        speed.add(1000, 1.0)
    assert speed.rate == pytest.approx(1000, rel=0.05)
    for _ in range(300):
        speed.add(10, 1.0)
    assert speed.rate == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("field", ["slots", "chunk", "prefill_piece", "piece_sizes", "max_queue"])
def test_sizes_that_cannot_work_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, not 0"):
        EngineConfig(**{field: 0})


def test_what_the_api_needs_is_imported_without_jax():
    code = (
        "import sys, serve.protocol, serve.client, serve.queue, serve.requests, serve.live; print('jax' in sys.modules)"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
