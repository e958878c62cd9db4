"""An engine without a model: scripted or random replies, in chunks, with delays, failures, a queue, and a memory."""

import random
import threading
import time
import types
from collections import deque
from dataclasses import dataclass

import numpy as np

from serve.protocol import (
    EngineBusyError,
    EngineStats,
    EngineStoppedError,
    Finished,
    PromptRead,
    TokenLogprobs,
    Tokens,
)


class FakeEngine:
    """Serves requests one chunk each in turn, on a thread of its own, as the real engine does.

    Args:
        tokenizer: of the pretended model.
        reply: maps a request to the text or the token ids of its reply; None draws random tokens by the seed.
        chunk: tokens of one event.
        delay: seconds between two rounds.
        slots: requests served at once; others wait.
        queue: requests that may wait.
        fail_after: tokens after which every request fails.
    """

    def __init__(
        self, tokenizer, reply=None, *, chunk=4, delay=0.0, slots=8, queue=64, fail_after=None, context=512, extra=8
    ):
        self.tokenizer, self.reply = tokenizer, reply
        self.chunk, self.delay, self.slots, self.queue, self.fail_after = chunk, delay, slots, queue, fail_after
        self.context, self.vocab_size = context, tokenizer.vocab_size + extra
        self.adapters, self.ready = ("pirate",), True
        self.requests, self.cancelled, self.drained = [], [], None
        self._live, self._waiting, self._lock = {}, deque(), threading.Lock()
        self._stopped = False
        self._counts = {"prompt_tokens": 0, "generated_tokens": 0}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request, sink):
        if not request.token_ids or len(request.token_ids) + request.max_new_tokens > self.context:
            raise ValueError(f"the prompt has {len(request.token_ids)} tokens")
        with self._lock:
            if self._stopped:
                raise EngineStoppedError
            if len(self._waiting) >= self.queue:
                raise EngineBusyError(7.2)
            self.requests.append(request)
            number = len(self.requests)
            self._waiting.append((number, request, sink))
        return number

    def cancel(self, number):
        with self._lock:
            self.cancelled.append(number)
            self._waiting = deque(item for item in self._waiting if item[0] != number)
            self._live.pop(number, None)

    def embed(self, prompts):
        return np.stack([np.array([len(p), sum(p) / len(p), -0.5], np.float32) for p in prompts])

    def stats(self):
        with self._lock:
            live, waiting = len(self._live), len(self._waiting)
        return EngineStats(
            self.slots, live, waiting, 0, 1000, 0, len(self.requests), cached_tokens=0, compilations=0, **self._counts
        )

    def drain(self, timeout):
        with self._lock:
            self._stopped = True
        deadline = time.monotonic() + timeout
        while self.stats().slots_used + self.stats().queued and time.monotonic() < deadline:
            time.sleep(0.01)
        self.drained = not self.stats().slots_used + self.stats().queued
        with self._lock:
            left, self._live = list(self._live.values()), {}
        for state in left:
            state["sink"](Finished("shutdown"))
        return self.drained

    def idle(self, seconds=5.0):
        """Wait until nothing is served and nothing waits."""
        deadline = time.monotonic() + seconds
        while self.stats().slots_used + self.stats().queued:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    # The engine's thread.

    def _run(self):
        while True:
            with self._lock:
                while self._waiting and len(self._live) < self.slots:
                    number, request, sink = self._waiting.popleft()
                    self._live[number] = self._begin(request, sink)
                live = list(self._live.items())
            for number, state in live:
                self._step(number, state)
            time.sleep(self.delay if live else 0.002)

    def _begin(self, request, sink):
        script = None if self.reply is None else self.reply(request)
        if isinstance(script, str):
            script = [*self.tokenizer.encode_control(script), self.tokenizer.eos_token_id]
        self._counts["prompt_tokens"] += len(request.token_ids)
        draw = random.Random(f"{request.seed} {list(request.token_ids)}")
        return {"request": request, "sink": sink, "script": script, "draw": draw, "drawn": 0, "begun": False}

    def _step(self, number, state):
        request, sink = state["request"], state["sink"]
        if not state["begun"]:
            state["begun"] = True
            scored = [self._scored(request, t, i) for i, t in enumerate(request.token_ids)]
            sink(PromptRead(cached_tokens=1, logprobs=tuple(scored) if request.prompt_logprobs else ()))
        tokens, reason = [], None
        while reason is None and len(tokens) < self.chunk:
            if state["drawn"] >= request.max_new_tokens:
                reason = "length"
            elif self.fail_after is not None and state["drawn"] >= self.fail_after:
                reason = "error"
            elif request.deadline is not None and time.monotonic() > request.deadline:
                reason = "deadline"
            elif request.constraint is not None and request.constraint.ended:
                reason = "stop"
            else:
                token = self._draw(request, state)
                tokens.append(token)
                state["drawn"] += 1
                if token in self.tokenizer.eos_token_ids and not request.ignore_eos:
                    reason = "stop"
        with self._lock:
            if number not in self._live:
                return
            self._counts["generated_tokens"] += len(tokens)
        if tokens:
            scored = [self._scored(request, t, 1) for t in tokens] if request.logprobs is not None else []
            sink(Tokens(tuple(tokens), tuple(scored)))
        if reason is not None:
            with self._lock:
                self._live.pop(number, None)
            sink(Finished(reason, "device on fire at /secret/path" if reason == "error" else ""))

    def _draw(self, request, state):
        if request.constraint is not None:
            allowed = np.flatnonzero(request.constraint.mask())
            token = int(state["draw"].choice(list(allowed)))
            request.constraint.push(token)
            return token
        if state["script"] is not None:
            return state["script"][state["drawn"] % len(state["script"])]
        return state["draw"].randrange(3, self.tokenizer.vocab_size)

    def _scored(self, request, token, place):
        top = tuple((t, -0.5 - i) for i, t in enumerate([token, 40, 41, 42, 43][: request.logprobs or 0]))
        return TokenLogprobs(token, None if place == 0 else -0.5, () if place == 0 else top)


@dataclass(frozen=True)
class FakeEngineConfig:
    """Stands for the real engine's settings on the command line."""

    slots: int = 4


class StartedEngine(FakeEngine):
    """Is made and started like the real engine."""

    def __init__(self, lm, config, adapters):
        super().__init__(lm.tokenizer, chunk=1, delay=0.02, slots=config.slots)
        self.adapters = tuple(adapters)

    def start(self):
        pass


def take_the_place(modules):
    """Let `serve.__main__` find this engine where it looks for the real one."""
    modules["serve.engine"] = module = types.ModuleType("serve.engine")
    module.Engine, module.EngineConfig = StartedEngine, FakeEngineConfig
