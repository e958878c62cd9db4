"""Attention against its definition, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.attention import QUERY_BLOCK, attention


def by_definition(q, k, v, visible):
    """Softmax over visible keys, head by head."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("btnh,bnsh->bnts", q, k) / np.sqrt(q.shape[-1])
    probs = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bnsh->btnh", jnp.where(visible[:, None], probs, 0.0), v)


@pytest.mark.parametrize("length", [7, QUERY_BLOCK, 2 * QUERY_BLOCK + 3])
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (3, 3)])
def test_attention_and_its_gradients_equal_the_definition_on_packed_rows(length, heads, groups):
    shapes = [(2, length, heads, 8), (2, groups, length, 8), (2, groups, length, 8)]
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    segment_ids = jnp.stack([jnp.repeat(jnp.arange(1, 4), length)[::3], jnp.ones(length, jnp.int32)])
    positions = jnp.stack([jnp.arange(length) - jnp.searchsorted(s, s) for s in segment_ids])
    visible = (segment_ids[:, :, None] == segment_ids[:, None]) & (positions[:, None] <= positions[:, :, None])
    ours = lambda q, k, v: attention(
        q, k, v, q_positions=positions, kv_positions=positions, q_segment_ids=segment_ids,
        kv_segment_ids=segment_ids, causal_layout=True,
    )  # fmt: skip
    theirs = lambda q, k, v: by_definition(q, k, v, visible)
    for a, b in zip(*((*jax.vjp(f, q, k, v)[1](q), f(q, k, v)) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_padding_is_finite_and_changes_nothing():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 2, 6, 8)) for i in range(3))
    q = q.swapaxes(1, 2)
    positions, segment_ids = jnp.asarray([[0, 1, 2, 0, 1, 2]]), jnp.asarray([[1, 1, 1, 0, 0, 0]])
    masks = {"q_positions": positions, "kv_positions": positions, "causal_layout": True}
    run = lambda q, k, v: attention(q, k, v, **masks, q_segment_ids=segment_ids, kv_segment_ids=segment_ids)
    out = run(q, k, v)
    assert bool(jnp.isfinite(out).all())
    changed = run(q, k.at[:, :, 3:].set(100.0), v.at[:, :, 3:].set(100.0))
    np.testing.assert_array_equal(out[:, :3], changed[:, :3])


def test_cached_layout_finds_keys_by_position_in_any_slot():
    k, v = (jax.random.normal(jax.random.key(i), (1, 2, 9, 8)) for i in (1, 2))
    q = jax.random.normal(jax.random.key(0), (1, 2, 4, 8))
    kv_positions = jnp.asarray([[3, 1, 0, 2, 5, 4, 0, 0, 0]])
    kv_segment_ids = jnp.asarray([[1, 1, 1, 1, 1, 1, 0, 0, 0]])
    q_positions = jnp.asarray([[4, 5]])
    visible = (kv_segment_ids[:, None] == 1) & (kv_positions[:, None] <= q_positions[:, :, None])
    ours = attention(
        q, k, v, q_positions=q_positions, kv_positions=kv_positions, q_segment_ids=jnp.ones_like(q_positions),
        kv_segment_ids=kv_segment_ids, causal_layout=False,
    )  # fmt: skip
    np.testing.assert_allclose(ours, by_definition(q, k, v, visible), rtol=1e-5, atol=1e-6)


def test_unknown_implementation_is_refused():
    x = jnp.zeros((1, 1, 1, 2))
    ids = jnp.ones((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="choose auto or xla"):
        attention(
            x, x, x, q_positions=ids, kv_positions=ids, q_segment_ids=ids, kv_segment_ids=ids,
            causal_layout=True, impl="flash9",
        )  # fmt: skip
