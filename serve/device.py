"""The device as the engine sees it: parameters, state, and few programs, all compiled before the first request.

The methods of `Device` take and return numpy arrays of a few numbers a row, and none of them waits for a result.
Batches are padded to a few sizes and prompts are read in pieces of a few sizes, so that nothing is compiled later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.kernels import present_platform
from minillm_jax.matmul import LOOPED_OPTIONS, looped_rows
from minillm_jax.model import Params, compute_dtype
from minillm_jax.sharding import mesh_of, on_mesh_of
from serve import traced
from serve.programs import (
    Chunk,
    Piece,
    Rows,
    Segments,
    copy_row,
    decode,
    filler_rows,
    init_state,
    read_piece,
    segments_of,
    set_row,
)


class Device:
    """Parameters, state and compiled programs. Only the engine's thread calls it.

    Args:
        config: the model's shape.
        params: from `decoding.split_layers`.
        eos_token_ids: tokens that end a completion.
        slots: completions decoded at once.
        length: tokens of the cache a slot.
        chunk: most steps of one call of `decode`.
        pieces: sizes of the pieces that prompts are read in, rising.
        batches: sizes of decoding batches, rising; the last is `slots`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        eos_token_ids: Sequence[int],
        *,
        slots: int,
        length: int,
        chunk: int,
        pieces: Sequence[int],
        batches: Sequence[int],
    ) -> None:
        self.config, self.params, self.slots, self.chunk = config, params, slots, chunk
        self.pieces, self.batches = tuple(pieces), tuple(batches)
        compute = ComputeConfig()
        self._mesh = mesh_of(params)
        self._one_cpu = self._mesh is None and present_platform() == "cpu"
        self._looped_rows = max(looped_rows(leaf.dtype) for leaf in jax.tree.leaves(params)) if self._one_cpu else 0
        with on_mesh_of(params):
            make = jax.jit(init_state, static_argnums=(0, 1, 2, 3))
            self._state = make(config, slots, length, compute_dtype(compute))
        everything = {b: np.ones((b, config.vocab_size), bool) for b in batches}
        # On a mesh the programs say where it lies, and moving what lies elsewhere would be compiled at the first call.
        self._allowed = everything if self._mesh is not None else jax.device_put(everything)
        read = functools.partial(read_piece, config=config, compute=compute)
        draw = functools.partial(
            decode, config=config, compute=compute, chunk=chunk, eos_token_ids=tuple(eos_token_ids)
        )
        zero = np.zeros((), np.int32)
        row = np.zeros(config.vocab_size)
        building: dict[tuple[str, int], Future[Any]] = {}
        with ThreadPoolExecutor(2) as pool, on_mesh_of(params):  # one is traced while others are compiled

            def build(name: str, size: int, function: Callable[..., Any], donated: int, *arguments: Any) -> None:
                options = LOOPED_OPTIONS if name == "decode" and self._loops(size) else None
                lowered = self._lower(functools.partial(function), donated, *arguments)
                building[(name, size)] = pool.submit(lowered.compile, options)

            for b in batches:
                build("decode", b, functools.partial(draw, looped=self._loops(b)), 1, *self._decode_arguments(b))
            for p in pieces:
                build("read", p, read, 1, *self._piece_arguments(p))
            build("set", 0, set_row, 0, self._state, zero, row.astype(bool), row.astype(np.float32))
            build("copy", 0, copy_row, 0, self._state, zero, zero)
        self._programs = {name: future.result() for name, future in building.items()}

    def read(
        self, tokens: np.ndarray, targets: np.ndarray, segments: Segments, *, score: bool, whole: bool, adapter: int
    ) -> Piece:
        """Read up to the largest piece of tokens; see `read_piece`."""
        size = next(p for p in self.pieces if p >= len(tokens))
        padded = np.zeros((2, size), np.int32)
        padded[0, : len(tokens)], padded[1, : len(targets)] = tokens, targets
        settings = np.bool_(score), np.bool_(whole), np.int32(adapter)
        self._state, piece = self._programs[("read", size)](self.params, self._state, *padded, segments, *settings)
        return piece

    def decode(self, rows: Rows, steps: int, mask: np.ndarray | None = None) -> Chunk:
        """Draw up to `steps` tokens for rows that fill one of the batch sizes; see `decode`."""
        batch = len(rows.slots)
        allowed = self._allowed[batch] if mask is None else mask
        self._state, chunk = self._programs[("decode", batch)](
            self.params, self._state, rows, allowed, np.bool_(mask is not None), np.int32(steps)
        )
        return chunk

    def set_row(self, slot: int, seen: np.ndarray, bias: np.ndarray) -> None:
        """Prepare a slot for penalties; see `set_row`."""
        self._state = self._programs[("set", 0)](self._state, np.int32(slot), seen, bias)

    def copy_row(self, source: int, target: int) -> None:
        """Copy what one slot has read to another."""
        self._state = self._programs[("copy", 0)](self._state, np.int32(source), np.int32(target))

    def _loops(self, batch: int) -> bool:
        return batch <= self._looped_rows

    def _lower(self, function: functools.partial[Any], donated: int, *arguments: Any) -> jax.stages.Lowered:
        """Lower a program whose state comes out as it went in; what else it returns lies on every device of a mesh."""
        if self._one_cpu:  # elsewhere it may hold kernels that cannot be kept
            return traced.lower(function, donated, *arguments)
        if self._mesh is None:
            return jax.jit(function, donate_argnums=donated).lower(*arguments)
        state = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        out = state if donated == 0 else (state, NamedSharding(self._mesh, PartitionSpec()))
        return jax.jit(function, donate_argnums=donated, out_shardings=out).lower(*arguments)

    def _piece_arguments(self, size: int) -> tuple[Any, ...]:
        tokens, no = np.zeros(size, np.int32), np.zeros((), bool)
        return self.params, self._state, tokens, tokens, segments_of([]), no, no, np.zeros((), np.int32)

    def _decode_arguments(self, batch: int) -> tuple[Any, ...]:
        zero = np.zeros((), np.int32)
        return self.params, self._state, filler_rows(batch, self.slots), self._allowed[batch], np.zeros((), bool), zero
