"""How a rollout lies in arrays for training: prompts and completions go in, packed rows come out.

The completions of a prompt stand behind it in one row, as branches that do not see one another (see `attention`), so a
prompt is read once, however many completions it has. Several such groups share a row. What is known of completions,
such as advantages, stands apart from the rows in a grid `[B, C]`, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.cache import BRANCH
from minillm_jax.data import Batch
from rl.rollout import Rollout

ROW = 256
"""Tokens of a row that groups are packed up to: long enough for quick products, short enough for quick attention."""


@dataclass(frozen=True)
class Layout:
    """Shapes of a rollout's batches. Each one is compiled, which takes as long as many steps: they only ever grow.

    Attributes:
        groups: of a row, or in the controls of a run those of a unit, which is a row or several; 0 is not chosen yet.
        tokens: length T of a row.
        drawn: tokens S of a row's completions, at most.
        length: tokens C of a completion, at most.
    """

    groups: int = 0
    tokens: int = 0
    drawn: int = 0
    length: int = 0


def group_sizes(rollout: Rollout, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the tokens `[P]` that a row reads for each group, and those `[P]` that were drawn in it."""
    drawn = np.asarray([len(completion) for completion in rollout.completions]).reshape(-1, group_size)
    prompts = np.asarray([len(prompt) for prompt in rollout.prompts[::group_size]])
    return prompts + (drawn - 1).sum(1), drawn.sum(1)  # nothing follows a last token


def balanced_order(sizes: np.ndarray, groups: int) -> np.ndarray:
    """Order groups such that each `groups` in succession, a row, have about the same number of tokens.

    Args:
        sizes: `[P]` tokens of each group.
        groups: of a row; divides P.

    Returns:
        A permutation `[P]`.
    """
    rows: list[list[int]] = [[] for _ in range(len(sizes) // groups)]
    totals = np.zeros(len(rows))
    for i in np.argsort(-sizes, kind="stable"):  # the largest first, each to the emptiest row that has a place
        row = int(totals.argmin())
        rows[row].append(int(i))
        totals[row] += sizes[i]
        if len(rows[row]) == groups:
            totals[row] = np.inf
    return np.concatenate([np.asarray(row, np.int64) for row in rows])


def groups_per_row(sizes: np.ndarray, parts: int) -> int:
    """Choose how many groups share a row: as many as fit into `ROW` on average and leave `parts` equal parts."""
    each = len(sizes) // parts
    fitting = [n for n in range(1, each + 1) if each % n == 0 and n * sizes.mean() <= ROW]
    return max(fitting, default=1)


def grown(layout: Layout, rollout: Rollout, group_size: int) -> Layout:
    """Widen a layout, whose `groups` are chosen, until a rollout in balanced order fits into it."""
    read, drawn = (sizes.reshape(-1, layout.groups).sum(1).max() for sizes in group_sizes(rollout, group_size))
    return Layout(
        layout.groups,
        max(layout.tokens, _rounded(int(read))),
        max(layout.drawn, _rounded(int(drawn))),
        max(layout.length, *map(len, rollout.completions)),
    )


def _rounded(length: int) -> int:
    """Round up by an eighth at most, so that a layout seldom grows."""
    unit = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // unit) * unit


def to_batch(rollout: Rollout, group_size: int, layout: Layout) -> tuple[Batch, np.ndarray]:
    """Lay a rollout out.

    Args:
        rollout: B = P * G completions, those of one prompt side by side; K groups in succession make a row.
        group_size: completions G per prompt.
        layout: shapes, see `grown`.

    Returns:
        Rows R of K groups: `tokens segment_ids positions`, `[R, T]`, what is read. `states targets`, `[R, S]`: where
        in T the states stand that tokens were drawn from, and those tokens. `grid weights`, `[R, K * G, C]`: where in S
        the tokens of each completion stand, and 1 where there is one. And the sampler's log-probabilities `[B, C]`, 0
        behind a completion's end.
    """
    per_row = layout.groups * group_size
    rows = len(rollout.completions) // per_row
    batch: Batch = {name: np.zeros((rows, layout.tokens), np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch |= {name: np.zeros((rows, layout.drawn), np.int32) for name in ("states", "targets")}
    batch["grid"] = np.zeros((rows, per_row, layout.length), np.int32)
    batch["weights"] = np.zeros((rows, per_row, layout.length), np.float32)
    logprobs = np.zeros((len(rollout.completions), layout.length), np.float32)
    for row in range(rows):
        _lay_row(rollout, row * per_row, group_size, {name: array[row] for name, array in batch.items()})
    for i, values in enumerate(rollout.logprobs):
        logprobs[i, : len(values)] = values
    return batch, logprobs


def _lay_row(rollout: Rollout, first: int, group_size: int, row: Batch) -> None:
    """Fill one row of every array, from the completion `first` on."""
    end = drawn = 0
    for member in range(len(row["grid"])):
        completion, segment = rollout.completions[first + member], 1 + member // group_size
        if member % group_size == 0:
            prompt = rollout.prompts[first + member]
            size, last = len(prompt), end + len(prompt) - 1
            _write(row, end, prompt, segment, 0)
            end += size
        branch = 1 + member % group_size
        _write(row, end, completion[:-1], segment + branch * BRANCH, size)
        place = np.arange(drawn, drawn + len(completion))
        row["states"][place] = [last, *range(end, end + len(completion) - 1)]
        row["targets"][place] = completion
        row["grid"][member, : len(completion)] = place
        row["weights"][member, : len(completion)] = 1.0
        end, drawn = end + len(completion) - 1, drawn + len(completion)


def _write(row: Batch, at: int, tokens: Sequence[int], segment: int, position: int) -> None:
    place = slice(at, at + len(tokens))
    row["tokens"][place], row["segment_ids"][place] = tokens, segment
    row["positions"][place] = position + np.arange(len(tokens))


def on_grid(flat: jax.Array, grid: jax.Array) -> jax.Array:
    """Arrange what is known of drawn tokens `[R, S]` by completions, `[B, C]`; meaningless where weights are 0."""
    values = jnp.take_along_axis(flat, grid.reshape(grid.shape[0], -1), axis=1)
    return values.reshape(-1, grid.shape[-1])


def by_completion(array: jax.Array) -> jax.Array:
    """`[R, K * G, C]` of rows to `[B, C]` of completions."""
    return array.reshape(-1, array.shape[-1])
