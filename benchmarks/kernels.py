"""Is every implementation right, and how fast is it? Attention and the grouped product, against their definitions.

    python -m benchmarks.kernels                      # what this device offers, in float32 and bfloat16

Each implementation that the library offers here computes packed, padded, cached and branching rows, forward and
backward. It is compared with the definition, written out below and computed in float32 with full-precision products
from the very same (rounded) inputs. One JSON line per implementation, case and dtype gives the error and its tolerance,
or says why the implementation cannot compute the case. The exit status is 1 if an error is beyond its tolerance.

Tolerances are multiples of the unit roundoff u of the dtype, on the relative error in the Frobenius norm: 2 u in
bfloat16 (u = 2^-8), where probabilities and results are rounded once each, and 1e-5 in float32, where sums over
hundreds of terms add up to some 100 u. A gradient passes through several rounded products, one of them of a difference
(the softmax), and gets four times as much. A wrong mask gives errors near 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import digits, emit, machine, note, timed
from benchmarks.roofline import Work, against, roofline
from minillm_jax import attention, matmul
from minillm_jax.cache import BRANCH
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ConfigError, parse_cli

ATTENTION = ("auto", *attention.IMPLEMENTATIONS)
"""Names of the library's attention implementations."""
ALWAYS = ("auto", "xla")
"""Implementations that must take every case; others may refuse some with a ValueError."""
GROUPED = ("auto", *matmul.IMPLEMENTATIONS)
"""Names of the library's implementations of the grouped product."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0 * 2.0**-8}
"""Largest relative error of a result; of a gradient, four times as much."""


@dataclass(frozen=True)
class KernelBenchmark:
    """Sizes of what is computed."""

    batch: int = 2
    """Rows B."""
    length: int = 1024
    """Tokens T per row, and slots of the cache."""
    heads: int = 8
    """Query heads N."""
    kv_heads: int = 2
    """Key and value heads K."""
    head_dim: int = 64
    """Size H of a head."""
    rows: int = 4096
    """Rows M of the grouped product."""
    experts: int = 4
    """Groups E of the grouped product."""
    hidden: int = 512
    """Width D of its input."""
    width: int = 1408
    """Width F of its output."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Dtypes of inputs."""
    repeats: int = 10
    """Timed calls; 0 compares without timing."""
    append: str | None = None
    """File that the lines are appended to as well."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int) and value < (0 if f.name == "repeats" else 1):
                raise ConfigError(f"--{f.name} {value}: must be at least 1")
        if unknown := set(self.dtypes) - set(TOLERANCE):
            raise ConfigError(f"--dtypes {' '.join(sorted(unknown))}: choose from {' '.join(TOLERANCE)}")
        if self.length < 16:
            raise ConfigError(f"--length {self.length}: must be at least 16, to be cut into documents and branches")


Arrays = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Case:
    """One kind of input.

    Attributes:
        name: of the case.
        masks: positions and segments of queries `[B, T]` and keys `[B, S]`, as `attention` takes them.
        causal_layout: see `attention`.
        branched: whether segments have branches.
    """

    name: str
    masks: dict[str, np.ndarray]
    causal_layout: bool
    branched: bool = False

    @property
    def real(self) -> np.ndarray:
        """`[B, T]` bool, queries that are no padding."""
        return self.masks["q_segment_ids"] > 0

    def visible(self) -> np.ndarray:
        """`[B, T, S]` bool, by definition: an equal segment, or the segment that a branch grows from, and no later."""
        q_segments, k_segments = (self.masks[f"{of}_segment_ids"] for of in ("q", "kv"))
        q, k = q_segments[:, :, None], k_segments[:, None, :]
        same = (q == k) | (q % BRANCH == k)
        earlier = self.masks["kv_positions"][:, None, :] <= self.masks["q_positions"][:, :, None]
        return same & earlier & (k > 0)


def same_tokens(name: str, segments: np.ndarray, positions: np.ndarray, branched: bool = False) -> Case:
    """Make a case whose queries and keys are the same tokens."""
    ids = {f"{of}_segment_ids": np.asarray(segments, np.int32) for of in ("q", "kv")}
    places = {f"{of}_positions": np.asarray(positions, np.int32) for of in ("q", "kv")}
    return Case(name, ids | places, causal_layout=True, branched=branched)


def cases(config: KernelBenchmark) -> Iterator[Case]:
    """Yield full, packed, padded, branching, cached and decoding inputs."""
    batch, length = config.batch, config.length
    shape, index = (batch, length), np.arange(length)
    yield same_tokens("full", np.ones(shape), np.broadcast_to(index, shape))

    rng = np.random.default_rng(0)
    cuts = np.zeros(shape, bool)
    for row in cuts:
        row[rng.choice(np.arange(1, length), 5, replace=False)] = True
    segments = 1 + np.cumsum(cuts, -1)
    starts = np.maximum.accumulate(np.where(cuts, index, 0), -1)
    yield same_tokens("packed", segments, index - starts)

    lengths = rng.integers(length // 4, length, batch)[:, None]
    inside = index < lengths
    yield same_tokens("padded", inside.astype(int), np.where(inside, index, 0))

    trunk, branch = length // 2, length // 4  # a beginning, and two continuations of it that do not see one another
    grown = np.concatenate(
        [np.full(trunk, 1), np.full(branch, 1 + BRANCH), np.full(length - trunk - branch, 1 + 2 * BRANCH)]
    )
    places = np.concatenate([np.arange(trunk), trunk + np.arange(branch), trunk + np.arange(length - trunk - branch)])
    yield same_tokens("branches", np.broadcast_to(grown, shape), np.broadcast_to(places, shape), branched=True)

    for name, queries in (("cached", length // 8), ("decode", 1)):
        filled = rng.integers(queries, length - queries, batch)[:, None]  # tokens in the cache, the queries included
        slots = {"kv_segment_ids": index < filled, "kv_positions": np.where(index < filled, index, 0)}
        own = {"q_segment_ids": np.ones((batch, queries)), "q_positions": filled - queries + np.arange(queries)}
        masks = {field: np.asarray(value, np.int32) for field, value in (slots | own).items()}
        yield Case(name, masks, causal_layout=False)


def attention_by_definition(case: Case, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax over visible keys: `[B, T, N, H]` of float32 inputs; zero for padding."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[1], axis=1) for x in (k, v))
    visible = case.visible()[:, None]
    scores = jnp.einsum("btnh,bnsh->bnts", q, k) / np.sqrt(q.shape[-1])
    probs = jnp.where(visible, jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1), 0.0)
    return jnp.einsum("bnts,bnsh->btnh", probs, v)


def grouped_by_definition(sizes: Sequence[int], x: jax.Array, w: jax.Array) -> jax.Array:
    """One product per group: `[M, F]`."""
    parts = jnp.split(x, np.cumsum(sizes)[:-1])
    return jnp.concatenate([part @ matrix for part, matrix in zip(parts, w, strict=True)])


def forward_and_backward(function: Callable[..., jax.Array], inputs: Arrays, cotangent: jax.Array) -> Arrays:
    """Return the result and the gradients of all inputs."""
    out, pullback = jax.vjp(function, *inputs)
    return out, *pullback(cotangent.astype(out.dtype))


def relative_error(ours: jax.Array, exact: jax.Array) -> float:
    """Frobenius norm of the difference over that of the exact result; infinite if anything is not finite."""
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    return float(error) if np.isfinite(error) else float("inf")


@dataclass(frozen=True)
class Problem:
    """Something to compute in several ways.

    Attributes:
        fields: that say in a line what it is.
        inputs: float32 arrays.
        cotangent: of the result; zero where the result means nothing, which is not compared then.
        definition: computes it plainly.
        implementations: name → function of the inputs.
        flops: of a forward pass.
    """

    fields: dict[str, Any]
    inputs: tuple[np.ndarray, ...]
    cotangent: np.ndarray
    definition: Callable[..., jax.Array]
    implementations: dict[str, Callable[..., jax.Array]]
    flops: float


def normals(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Draw float32 arrays of these shapes."""
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def attention_problem(config: KernelBenchmark, case: Case) -> Problem:
    """Attention in one case; FLOPs are those of pairs that see one another."""
    batch, queries = case.real.shape
    shapes = [(batch, queries, config.heads, config.head_dim)]
    shapes += 2 * [(batch, config.kv_heads, config.length, config.head_dim)]
    *inputs, cotangent = normals(*shapes, shapes[0])

    masks = {name: jnp.asarray(mask) for name, mask in case.masks.items()}

    def run(impl: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.attention(
            q, k, v, **masks, causal_layout=case.causal_layout, branched=case.branched, impl=impl
        )

    return Problem(
        fields={"operation": "attention", "case": case.name},
        inputs=tuple(inputs),
        cotangent=np.where(case.real[:, :, None, None], cotangent, np.float32(0)),
        definition=partial(attention_by_definition, case),
        implementations={impl: partial(run, impl) for impl in ATTENTION},
        flops=4.0 * float(case.visible().sum()) * config.heads * config.head_dim,
    )


def grouped_problem(config: KernelBenchmark, name: str, sizes: Sequence[int]) -> Problem:
    """The grouped product with some sizes of groups."""
    rows, matrices = config.rows, (config.experts, config.hidden, config.width)
    x, w, cotangent = normals((rows, config.hidden), matrices, (rows, config.width))
    held = jnp.asarray(sizes, jnp.int32)
    return Problem(
        fields={"operation": "grouped_matmul", "case": name},
        inputs=(x, w / np.float32(np.sqrt(config.hidden))),
        cotangent=cotangent,
        definition=partial(grouped_by_definition, sizes),
        implementations={impl: partial(matmul.grouped_matmul, sizes=held, impl=impl) for impl in GROUPED},
        flops=2.0 * config.rows * config.hidden * config.width,
    )


def problems(config: KernelBenchmark) -> Iterator[Problem]:
    """Yield everything that is computed."""
    for case in cases(config):
        yield attention_problem(config, case)
    even = [len(part) for part in np.array_split(np.arange(config.rows), config.experts)]
    yield grouped_problem(config, "even groups", even)
    if config.experts > 1:
        small = config.rows // 7
        uneven = [small, *[0] * (config.experts - 2), config.rows - small]
        yield grouped_problem(config, "uneven and empty groups", uneven)


def judge(config: KernelBenchmark, problem: Problem, dtype: str) -> Iterator[dict[str, Any]]:
    """Compare all implementations with the definition; yields a line of each."""
    rounded = tuple(x.astype(jnp.dtype(dtype)) for x in (*problem.inputs, problem.cotangent))
    *inputs, cotangent = jax.device_put(rounded)
    with jax.default_matmul_precision("highest"):
        plain = jax.jit(partial(forward_and_backward, problem.definition))
        *widened, wide_cotangent = (x.astype(np.float32) for x in rounded)
        exact = plain(tuple(widened), wide_cotangent)
    meant = problem.cotangent != 0
    for impl, function in problem.implementations.items():
        line = {"name": "kernels", **problem.fields, "impl": impl, "dtype": dtype}
        # An accelerator multiplies float32 in TF32 or bfloat16 by default, which is not what is judged here.
        with jax.default_matmul_precision("highest" if dtype == "float32" else None):
            forward, both = jax.jit(function), jax.jit(partial(forward_and_backward, function))
            try:
                found = both(tuple(inputs), cotangent)
            except (ValueError, NotImplementedError) as refusal:
                line |= {"refused": str(refusal).splitlines()[0]}
                yield line | ({"ok": False} if impl in ALWAYS else {})
                continue
            except Exception as error:  # a kernel may fail to compile in any way, and the others are still to be judged
                yield line | {"failed": f"{type(error).__name__}: {error}"[:500], "ok": False}
                continue
            errors = [relative_error(np.where(meant, found[0], 0), np.where(meant, exact[0], 0))]
            errors += [relative_error(a, b) for a, b in zip(found[1:], exact[1:], strict=True)]
            line |= {
                "error": digits(errors[0]),
                "gradient_error": digits(max(errors[1:])),
                "tolerance": TOLERANCE[dtype],
            }
            line["ok"] = errors[0] <= TOLERANCE[dtype] and max(errors[1:]) <= 4.0 * TOLERANCE[dtype]
            yield line | clock(config.repeats, problem.flops, forward, both, tuple(inputs), cotangent)


def clock(repeats: int, flops: float, forward: Any, both: Any, inputs: Arrays, cotangent: jax.Array) -> dict[str, Any]:
    """Time an implementation forward, and forward with backward; the roofline is that of the former."""
    if not repeats:
        return {}
    wait = jax.block_until_ready
    calls = (lambda: wait(forward(*inputs)), lambda: wait(both(inputs, cotangent)))
    once, back = (float(np.median(timed(call, repeats))) for call in calls)
    work = Work(flops, sum(x.nbytes for x in inputs) + cotangent.nbytes)  # the result is as large as its cotangent
    seconds = {"seconds": digits(once), "forward_backward_seconds": digits(back)}
    return seconds | against(work, once, roofline(jax.devices()[0]))


def main() -> int:
    """Compare and time everything; returns 1 if anything is wrong."""
    with user_errors():
        config = parse_cli(KernelBenchmark, str(__doc__))
        setup_jax()
        wrong, right = [], 0
        for dtype in config.dtypes:
            for problem in problems(config):
                for line in judge(config, problem, dtype):
                    emit(line | machine(), config.append)
                    right += line.get("ok", False)
                    if line.get("ok") is False:
                        wrong.append(f"{line['operation']}, {line['case']}, {line['impl']}, {dtype}")
        note(f"{right} results within their bounds, {len(wrong)} beyond: {'; '.join(wrong) or 'none'}")
    return 1 if wrong or not right else 0


if __name__ == "__main__":
    sys.exit(main())
