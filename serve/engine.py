"""The serving engine: continuous batching of completions over one model, behind `protocol.EngineLike`.

Requests wait in a queue; one thread owns the device. It gives them slots of a cache, reads prompts piece by piece
between chunks of decoding, decodes all live slots together, and reads each chunk on the host while the next one runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np

from minillm_jax.decoding import split_layers
from minillm_jax.lm import LanguageModel
from minillm_jax.lora import Adapter, lay_beside
from minillm_jax.quantize import quantize
from minillm_jax.sharding import replicate_rest
from serve.compilations import compilations_here
from serve.device import Device
from serve.live import HostLogprobs, Live
from serve.prefill import Part, cut, joins
from serve.programs import SEGMENTS, Chunk, Logprobs, Piece, Rows, filler_rows, segments_of
from serve.protocol import (
    EngineStats,
    EngineStoppedError,
    Event,
    Finished,
    FinishReason,
    Request,
    Sink,
)
from serve.queue import Entry, RequestQueue
from serve.requests import check_request, seed_words
from serve.slots import Slots

DRAINED = "the engine is shutting down; send requests to another"


@dataclass(frozen=True)
class EngineConfig:
    """How many requests are served at once, and how many may wait."""

    slots: int = 16
    """Completions decoded at once; each has room for a whole context in the cache."""
    context: int | None = None
    """Most tokens of a prompt and its completion; None takes what the model can, at most 2048."""
    chunk: int = 8
    """Decoding steps between two looks at the queue: more is faster, fewer lets new requests begin sooner."""
    prefill_piece: int = 256
    """Most tokens of prompts that are read between two chunks of decoding."""
    piece_sizes: int = 8
    """Sizes of what is read at once, in equal steps: fewer are compiled sooner, more pad less."""
    max_queue: int = 256
    """Requests that may wait."""
    max_queue_tokens: int = 262_144
    """Tokens of prompts and longest completions that may wait."""
    weights: Literal["stored", "int8"] = "stored"
    """Keep matrices as they were loaded, or as 8-bit integers with a scale for each output: a quarter of the memory."""
    min_shared_prefix: int = 32
    """Shortest beginning that a slot holds and that is not read again, if it is less than half of the prompt."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot work."""
        names = "slots chunk prefill_piece piece_sizes max_queue max_queue_tokens min_shared_prefix"
        for name in names.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class Engine:
    """Serves completions of one model; see `protocol.EngineLike`.

    Args:
        lm: the model.
        config: sizes.
        adapters: adapters of the model, from `minillm_jax.pretrained.load_adapter`, by the names that requests give.
    """

    def __init__(
        self,
        lm: LanguageModel,
        config: EngineConfig = EngineConfig(),
        adapters: Mapping[str, Adapter] = MappingProxyType({}),
    ) -> None:
        self._lm, self._config, self._adapters = lm, config, dict(adapters)
        self._adapter_number = {None: 0} | {name: i + 1 for i, name in enumerate(adapters)}
        longest = lm.config.max_position_embeddings
        self._context = min(longest, config.context or 2048)
        self._queue = RequestQueue(config.max_queue, config.max_queue_tokens, self._context)
        self._slots = Slots(config.slots, config.min_shared_prefix)
        self._ends = frozenset(lm.tokenizer.eos_token_ids)
        self._live: list[Live] = []
        self._pending: list[Callable[[], None]] = []
        self._stats = dict.fromkeys(("requests", "prompt_tokens", "cached_tokens", "generated_tokens"), 0)
        self._compilations = 0
        self._ready, self._stop, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._started = False
        self._failure: BaseException | None = None
        self._device: Device
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- What other threads call ---------------------------------------------------------------------------------

    def start(self, wait: bool = False) -> None:
        """Start the thread, which compiles everything first; requests may be queued already.

        Args:
            wait: return only when the engine is ready.

        Raises:
            EngineStoppedError: with `wait`, if compiling failed.
        """
        self._started = True
        self._thread.start()
        if wait:
            self._ready.wait()
            if self._failure is not None:
                raise EngineStoppedError(f"the engine did not start: {self._failure}") from self._failure

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its completion together."""
        return self._context

    @property
    def vocab_size(self) -> int:
        """Tokens V of the model."""
        return self._lm.config.vocab_size

    @property
    def adapters(self) -> Sequence[str]:
        """Names of the adapters that requests may ask for."""
        return tuple(self._adapters)

    @property
    def ready(self) -> bool:
        """Whether everything is compiled and requests are taken."""
        return self._ready.is_set() and self._failure is None and not self._ended.is_set() and not self._queue.closed

    def submit(self, request: Request, sink: Sink) -> int:
        """Queue a request; see `protocol.EngineLike.submit`."""
        check_request(request, self)
        return self._queue.put(request, sink)

    def cancel(self, number: int) -> None:
        """Give a request up; its slot is free within a chunk."""
        self._queue.cancel(number)

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the mean-pooled final hidden states `[n, D]` float32 of prompts; blocks until they are there.

        Raises:
            ValueError, EngineBusyError, EngineStoppedError: as `submit`.
            RuntimeError: the engine failed, or was shut down, in between.
        """
        requests = [Request(prompt, max_new_tokens=0) for prompt in prompts]
        for request in requests:
            check_request(request, self)
        futures: list[Future[np.ndarray]] = [Future() for _ in requests]
        numbers = []
        try:
            for request, future in zip(requests, futures, strict=True):
                numbers.append(self._queue.put(request, _fail_with(future), _mean_into(future, len(request.token_ids))))
        except Exception:
            for number in numbers:
                self.cancel(number)
            raise
        rows = [future.result() for future in futures]
        return np.stack(rows) if rows else np.zeros((0, self._lm.config.hidden_size), np.float32)

    def stats(self) -> EngineStats:
        """Describe this moment."""
        queued, queued_tokens = self._queue.waiting()
        return EngineStats(
            slots=self._config.slots,
            slots_used=self._slots.used,
            queued=queued,
            queued_tokens=queued_tokens,
            cache_tokens=self._config.slots * self._context,
            cache_tokens_used=self._slots.used_tokens,
            compilations=self._compilations,
            **self._stats,
        )

    def drain(self, timeout: float) -> bool:
        """Take no more requests, let those taken end, and stop; False if some had to be given up at the timeout."""
        if not self._queue.closed:
            self._queue.close(DRAINED)
        if not self._started:
            self._give_up_all("shutdown", DRAINED)
            return False
        ended = self._ended.wait(timeout)
        self._stop.set()
        self._queue.wake()
        self._thread.join()
        return ended and self._failure is None

    # --- The thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._device = self._compile()
            before = compilations_here()
            self._ready.set()
            while not self._stop.is_set():
                busy = self._turn()
                self._compilations = compilations_here() - before
                if not busy and self._queue.closed:
                    break
        except BaseException as error:  # whatever it is: nobody may be left waiting
            self._failure = error
            self._queue.close(f"the engine has failed: {error}")
            self._give_up_all("error", f"the engine has failed: {error}")
        else:
            self._give_up_all("shutdown", DRAINED)
        finally:
            self._ended.set()
            self._ready.set()  # ends the wait of `start`

    def _compile(self) -> Device:
        config = self._config
        largest = min(config.prefill_piece, _power_of_two(self._context))
        pieces = sorted({-(-largest * (i + 1) // config.piece_sizes) for i in range(config.piece_sizes)})
        batches = sorted({min(1 << i, config.slots) for i in range(config.slots.bit_length() + 1)})
        params = self._lm.params
        if config.weights == "int8":
            params = jax.jit(quantize)(params)
        if self._adapters:
            params = replicate_rest(lay_beside(params, list(self._adapters.values())))
        return Device(
            self._lm.config, split_layers(params, self._lm.config), sorted(self._ends), slots=config.slots,
            length=self._context + max(largest, config.chunk), chunk=config.chunk, pieces=pieces, batches=batches,
        )  # fmt: skip

    def _turn(self) -> bool:
        """Do one round of everything; False when there was nothing to do."""
        began = time.monotonic()
        self._give_up_unwanted(began)
        earlier, self._pending = self._pending, []
        if any(live.entry.request.constraint is not None for live in self._live):
            self._deliver(earlier)  # its next mask depends on what was drawn
            earlier = []
        tokens = self._read_prompts()
        tokens += self._draw()
        self._deliver(earlier)
        self._free_slots()
        if tokens or earlier:
            self._queue.throughput.add(tokens, time.monotonic() - began)
        elif not self._live and not self._queue.waiting()[0]:
            if self._queue.closed:
                return False
            self._queue.wait(1.0)
        return True

    def _deliver(self, results: list[Callable[[], None]]) -> None:
        for deliver in results:
            deliver()
        self._free_slots()

    def _free_slots(self) -> None:
        for live in [live for live in self._live if live.finished]:
            self._live.remove(live)
            self._slots.give_back(live.slot)

    def _give_up_unwanted(self, now: float) -> None:
        """End what was cancelled and what is past its deadline."""
        cancelled = self._queue.pop_cancelled()

        def reason(entry: Entry) -> FinishReason | None:
            if entry.number in cancelled:
                return "cancelled"
            deadline = entry.request.deadline
            return "deadline" if deadline is not None and deadline <= now else None

        for entry in self._queue.pop_where(lambda entry: reason(entry) is not None):
            entry.sink(Finished(reason(entry) or "cancelled"))
        for live in self._live:
            if (why := reason(live.entry)) is not None:
                live.finish(why)
        self._free_slots()

    def _give_up_all(self, reason: FinishReason, detail: str) -> None:
        for entry in self._queue.pop_where(lambda _: True):
            entry.sink(Finished(reason, detail))
        for live in self._live:
            live.finish(reason, detail)
        self._free_slots()

    # --- Reading prompts -----------------------------------------------------------------------------------------

    def _read_prompts(self) -> int:
        """Dispatch pieces of prompts up to a budget; returns how many tokens, padding included."""
        left, parts = self._config.prefill_piece, list[Part]()
        while left > (gathered := sum(map(len, parts))):
            live = next((live for live in self._live if live.read < len(live.entry.request.token_ids)), None)
            if live is None:
                if (begun := self._begin()) is None:
                    break
                live, source = begun
                if source is not None:  # what is copied may be among the parts
                    left -= self._read(parts)
                    self._device.copy_row(source, live.slot.number)
                    continue
            if not joins(parts, live, SEGMENTS):
                left -= self._read(parts)
                continue
            part = Part(live, live.read, min(len(live.prompt), live.read + left - gathered))
            parts.append(part)
            live.slot.tokens += live.prompt[part.start : part.end]
            live.read = part.end
        left -= self._read(parts)
        return self._config.prefill_piece - left

    def _begin(self) -> tuple[Live, int | None] | None:
        """Give the oldest request that waits a slot, to which that of the returned number must be copied first."""
        if self._slots.used == self._config.slots or (entry := self._queue.pop()) is None:
            return None
        request = entry.request
        adapter = self._adapter_number[request.adapter]
        place = self._slots.take(request.token_ids, adapter, reuse=not request.prompt_logprobs and entry.pooled is None)
        assert place is not None
        slot, cached = place.slot, len(place.slot.tokens)
        budget = min(request.max_new_tokens, self._context - len(request.token_ids))
        live = Live(entry, slot, budget, adapter=adapter, cached=cached, read=cached)
        if _penalised(request):
            seen, bias = np.zeros(self.vocab_size, bool), np.zeros(self.vocab_size, np.float32)
            seen[np.asarray(request.token_ids)] = True
            for token, value in request.logit_bias.items():
                bias[token] = value
            self._device.set_row(slot.number, seen, bias)
        self._live.append(live)
        self._stats["requests"] += 1
        self._stats["prompt_tokens"] += len(request.token_ids)
        self._stats["cached_tokens"] += cached
        return live, place.source

    def _read(self, parts: list[Part]) -> int:
        """Dispatch the parts, and empty their list; returns how many tokens, padding included."""
        pieces = cut(parts, self._device.pieces)
        parts.clear()
        for _, piece in pieces:
            self._read_piece(piece)
        return sum(size for size, _ in pieces)

    def _read_piece(self, parts: Sequence[Part]) -> None:
        tokens = [token for part in parts for token in part.live.prompt[part.start : part.end]]
        score = any(part.live.entry.request.prompt_logprobs for part in parts)
        wanted = score or any(part.live.entry.pooled is not None for part in parts)
        piece = self._device.read(
            np.asarray(tokens),
            np.asarray([token for part in parts for token in part.targets]),
            segments_of([(part.live.slot.number, part.start, len(part)) for part in parts]),
            score=score,
            whole=wanted,
            adapter=parts[0].live.adapter,
        )

        def deliver() -> None:
            host: Piece | None = jax.device_get(piece) if wanted else None
            logprobs = None if host is None else _host(host.logprobs)
            first = 0
            for i, part in enumerate(parts):
                scored = logprobs if part.live.entry.request.prompt_logprobs else None
                own = None if scored is None else scored.cut(first, first + len(part))
                part.live.take_piece(part.start, part.end, own, None if host is None else np.asarray(host.hidden[i]))
                first += len(part)

        self._pending.append(deliver)

    # --- Decoding ------------------------------------------------------------------------------------------------

    def _draw(self) -> int:
        """Dispatch a chunk of decoding for all rows that have tokens left; returns how many tokens at most."""
        live = [live for live in self._live if live.decoding]
        constrained = [each for each in live if each.entry.request.constraint is not None]
        masks = {each.entry.number: self._mask(each) for each in constrained}
        live = [each for each in live if not each.finished]
        if not live:
            return 0
        batch = next(size for size in self._device.batches if size >= len(live))
        mask = None
        if constrained:
            mask = np.ones((batch, self.vocab_size), bool)
            for i, each in enumerate(live):
                mask[i] = masks.get(each.entry.number, True)
        first = any(each.drawn == 0 for each in live)  # a first token is sent as soon as it is there
        steps = 1 if constrained or first else min(self._config.chunk, max(each.budget - each.drawn for each in live))
        chunk = self._device.decode(self._rows(live, batch), steps, mask)
        for each in live:
            each.drawn = min(each.drawn + steps, each.budget)

        def deliver() -> None:
            self._take_chunk(live, chunk)

        self._pending.append(deliver)
        return steps * len(live)

    def _mask(self, live: Live) -> Any:
        """Ask a constraint for its tokens; one that fails, or allows none, ends its request."""
        try:
            mask = np.asarray(live.entry.request.constraint.mask())  # type: ignore[union-attr]
            if mask.shape != (self.vocab_size,) or not mask.any():
                raise ValueError(f"it allows no token, or has the shape {mask.shape} instead of ({self.vocab_size},)")
        except Exception as error:  # the caller's code: it ends this request alone
            live.finish("error", f"the constraint failed: {error}")
            return True
        return mask

    def _rows(self, live: list[Live], batch: int) -> Rows:
        rows = filler_rows(batch, self._config.slots)
        for i, each in enumerate(live):
            request = each.entry.request
            rows.slots[i], rows.lengths[i], rows.drawn[i] = each.slot.number, each.length, each.drawn
            rows.seeds[i] = seed_words(request.seed)
            rows.adapters[i] = each.adapter
            rows.ignore_eos[i] = request.ignore_eos
            rows.logprobs[i] = request.logprobs is not None
            for name in ("temperature", "top_k", "top_p", "min_p"):
                getattr(rows.sampling, name)[i] = getattr(request, name)
            rows.penalties.repetition[i] = request.repetition_penalty
            rows.penalties.presence[i] = request.presence_penalty
            rows.penalties.frequency[i] = request.frequency_penalty
            rows.penalties.biased[i] = bool(request.logit_bias)
        return rows

    def _take_chunk(self, live: list[Live], chunk: Chunk) -> None:
        wanted = any(each.entry.request.logprobs is not None for each in live)
        tokens, steps = np.asarray(chunk.tokens), int(chunk.steps)  # faster than `jax.device_get`
        logprobs = jax.device_get(chunk.logprobs) if wanted else None
        for i, each in enumerate(live):
            own = None if logprobs is None else _host(jax.tree.map(lambda leaf: leaf[:, i], logprobs))  # noqa: B023
            self._stats["generated_tokens"] += each.take_tokens(tokens[:steps, i].tolist(), own, self._ends)


def _host(logprobs: Logprobs) -> HostLogprobs:
    return HostLogprobs(np.asarray(logprobs.own), np.asarray(logprobs.top), np.asarray(logprobs.ids))


def _penalised(request: Request) -> bool:
    neutral = request.repetition_penalty == 1 and request.presence_penalty == 0 and request.frequency_penalty == 0
    return not neutral or bool(request.logit_bias)


def _power_of_two(at_most: int) -> int:
    return 1 << (at_most.bit_length() - 1)


def _mean_into(future: Future[np.ndarray], count: int) -> Callable[[np.ndarray], None]:
    return lambda total: future.set_result(total / count)


def _fail_with(future: Future[np.ndarray]) -> Sink:
    def sink(event: Event) -> None:
        if isinstance(event, Finished) and not future.done():
            future.set_exception(RuntimeError(f"no embedding: {event.reason} {event.detail}"))

    return sink
