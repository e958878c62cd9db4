"""Experts on a mesh against one device, the arithmetic of the exchange, and the capacity of experts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax import moe
from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig
from minillm_jax.expert_parallel import Capacity, make_plan, slices_to_experts
from minillm_jax.losses import language_model_loss
from minillm_jax.matmul import grouped_matmul
from minillm_jax.model import forward_hidden, init_params

TESTS = Path(__file__).parent
CONFIG = ModelConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, use_moe=True, num_experts=4)
TOP1 = dataclasses.replace(CONFIG, num_experts_per_tok=1, expert_capacity_factor=1.0)


# --- On eight simulated devices ----------------------------------------------------------------------------------


def on_eight_devices(*names):
    """What `experts_on_a_mesh` measured, in a process where XLA simulates eight devices."""
    command = [sys.executable, str(TESTS / "experts_on_a_mesh.py"), *names]
    env = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1500)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.timeout(1600)
def test_layers_on_meshes_equal_one_device_in_output_and_gradients():
    measured = on_eight_devices("layers")["layers"]
    assert len(measured) == 5
    assert {name: value for name, value in measured.items() if not value < 1e-5} == {}


@pytest.fixture(scope="module")
def measured():
    return on_eight_devices("more_layers", "dropout", "step", "scopes", "generation")


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_layers_on_further_meshes_equal_one_device(measured):
    assert len(measured["more_layers"]) == 7
    assert {name: value for name, value in measured["more_layers"].items() if not value < 1e-5} == {}


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_a_training_step_on_a_mesh_is_that_of_one_device(measured):
    step = measured["step"]
    for name, (ours, theirs) in step["metrics"].items():
        assert ours == pytest.approx(theirs, rel=1e-5), name
    assert 0.05 < step["metrics"]["dropped_share"][0] < 0.6
    assert step["added"] < 5e-5  # differences of parameters a hundred times as large


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_compiled_step_keeps_experts_where_they_are(measured):
    step = measured["step"]
    assert step["share of experts here"] == 1 / 8
    assert {"4,16,6", "4,6,16"} <= set(step["gathered"])  # over fsdp, a layer's experts of this device
    assert step["whole stacks gathered"] == []


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_scope_of_the_balancing_loss_is_the_same_on_a_mesh(measured):
    assert max(measured["scopes"].values()) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_decoding_rows_that_no_axis_divides_equals_one_device(measured):
    assert measured["generation"] < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_devices_drop_elements_of_adapters_independently(measured):
    assert measured["dropout"] == 8


# --- The exchange ------------------------------------------------------------------------------------------------


plan_exchange = jax.jit(slices_to_experts)


def exchanged(sent, slices, rows):
    """`ragged_all_to_all` in numpy: lists of each device's rows in, and out."""
    received, ranks = [np.full(rows, -1) for _ in sent], len(sent)
    for source, (data, part) in enumerate(zip(sent, slices, strict=True)):
        per_device = len(part.send_sizes) // ranks
        offsets = zip(part.input_offsets, part.send_sizes, part.output_offsets, strict=True)
        for i, (begin, size, target) in enumerate(offsets):
            to, place = divmod(i, per_device)
            assert slices[to].recv_sizes[source * per_device + place] == size
            assert (received[to][target : target + size] == -1).all()  # nothing is written twice
            received[to][target : target + size] = data[begin : begin + size]
    return received


@settings(max_examples=40)
@given(st.sampled_from([(1, 2), (2, 3), (4, 1), (3, 2)]), st.data())
def test_the_exchange_lays_rows_out_by_expert_and_returns_them(shape, data):
    ranks, per_device = shape
    experts = ranks * per_device
    size = st.one_of(st.just(0), st.integers(0, 5))
    counts = np.asarray(data.draw(st.lists(size, min_size=ranks * experts, max_size=ranks * experts)))
    counts = counts.reshape(ranks, experts)
    # A row is a number that says where it comes from and which expert it is for.
    sent = [np.concatenate([[1000 * r + 10 * e + i for i in range(n)] for e, n in enumerate(row)]).astype(int)
            for r, row in enumerate(counts)]  # fmt: skip
    plans = [jax.tree.map(np.asarray, plan_exchange(counts.astype(np.int32), r)) for r in range(ranks)]
    most = int(counts.sum()) + 1
    received = exchanged(sent, [out for out, _ in plans], most)
    for rank, rows in enumerate(received):
        mine = [1000 * r + 10 * e + i for e in range(rank * per_device, (rank + 1) * per_device)
                for r in range(ranks) for i in range(counts[r, e])]  # fmt: skip
        assert rows.tolist() == mine + [-1] * (most - len(mine))
    returned = exchanged(received, [back for _, back in plans], most)
    for rows, back in zip(sent, returned, strict=True):
        assert back.tolist() == rows.tolist() + [-1] * (most - len(rows))


def test_few_tokens_are_split_over_fewer_axes():
    sizes = {"data": 2, "expert": 4}
    plans = [make_plan(sizes, (tokens, 8), (8, 8, 16), 2, None) for tokens in (32, 6, 5)]
    assert [plan.tokens for plan in plans] == [("data", "expert"), ("data",), ()]
    assert [plan.exchange for plan in plans] == ["gather", "replicated", "replicated"]
    assert [plan.most for plan in plans] == [2 * 32 // 2, 2 * 3, 2 * 5]


def test_an_axis_that_does_not_divide_leaves_weights_whole():
    plan = make_plan({"expert": 4, "tensor": 2, "fsdp": 3}, (12, 8), (6, 8, 16), 2, None)
    assert (plan.experts, plan.embed, plan.mlp, plan.exchange) == ((), (), ("tensor",), "local")


def test_a_limit_bounds_what_a_device_makes_room_for():
    limit = Capacity(per_row=2, length=8)
    assert limit.most(16) == 4
    assert limit.most(4) == 4  # half a row may be parts of two
    plan = make_plan({"expert": 4}, (64, 8), (8, 8, 16), 2, limit)
    assert plan.most == 2 * 2 * 8  # of 128 rows without a limit


# --- Capacity ----------------------------------------------------------------------------------------------------


def routed(experts, config=TOP1, seed=0):
    experts = jnp.asarray(experts)
    weights = jax.random.uniform(jax.random.key(seed), experts.shape)
    scores = jnp.full((experts.shape[0], config.num_experts), 1 / config.num_experts)
    return moe.Routing(experts, weights, scores, scores)


def test_what_exceeds_a_rows_capacity_is_dropped():
    # Two rows of 8 tokens, 4 experts, one each: an even share is 2.
    experts = [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 1, 0, 0, 0, 1, 2]
    segment_ids = jnp.asarray([[1] * 8, [1, 1, 1, 2, 2, 2, 0, 0]])  # the second row: 6 tokens, so ceil(1.5) = 2
    routing, dropped = moe.limit_to_capacity(routed([[e] for e in experts]), segment_ids, TOP1)
    kept = [1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    assert routing.kept.astype(int)[:, 0].tolist() == kept
    assert float(dropped) == pytest.approx(4 / 14)


@pytest.mark.parametrize(("factor", "kept"), [(0.5, 4), (1.0, 8), (1.1, 9), (2.0, 16), (4.0, 20)])
def test_a_single_favourite_keeps_its_capacity(factor, kept):
    config = dataclasses.replace(CONFIG, num_experts_per_tok=2, expert_capacity_factor=factor)
    experts = jnp.tile(jnp.asarray([[3, 1]]), (16, 1))  # k T / E = 8; each of the two would take 16
    routing, dropped = moe.limit_to_capacity(routed(experts, config), jnp.ones((1, 16), jnp.int32), config)
    assert routing.kept.sum(0).tolist() == [min(kept, 16)] * 2
    assert float(dropped) == pytest.approx(1 - min(kept, 16) / 16)


def test_dropped_assignments_add_nothing_and_pass_no_gradient():
    x, gate, up, down = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(24, 8), (4, 8, 12), (4, 8, 12), (4, 12, 8)])
    )
    experts = jax.random.randint(jax.random.key(5), (24, 2), 0, 2)  # experts 2 and 3 get none
    routing = routed(experts.at[:, 1].add(1), dataclasses.replace(CONFIG, num_experts_per_tok=2))
    kept = jax.random.bernoulli(jax.random.key(6), 0.4, (24, 2))
    most = int(kept.sum()) + 2

    def ours(x, gate, up, down, weights):
        limited = dataclasses.replace(routing, weights=weights, kept=kept)
        return (moe.moe_mlp(x, gate, up, down, limited, most=most) ** 2).sum()

    def silenced(x, gate, up, down, weights):
        return (moe.moe_mlp(x, gate, up, down, dataclasses.replace(routing, weights=weights * kept)) ** 2).sum()

    args = (x, gate, up, down, routing.weights)
    a, b = (jax.jit(jax.value_and_grad(f, argnums=range(5)))(*args) for f in (ours, silenced))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), a, b)


def test_grouped_matmul_leaves_rows_behind_the_last_group_alone():
    x, w, g = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(40, 6), (3, 6, 5), (40, 5)]))
    sizes, used = jnp.asarray([7, 0, 12]), 19
    poisoned = x.at[used:].set(jnp.nan)

    @jax.jit
    def product_and_gradients(x, w, g):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes)[:used], x, w)
        return y, pull(g[:used])

    y, (dx, dw) = product_and_gradients(poisoned, w, g)
    y_theirs, (dx_theirs, dw_theirs) = product_and_gradients(x[:used], w, g)
    np.testing.assert_allclose(y, y_theirs, rtol=1e-5)
    np.testing.assert_allclose(dx[:used], dx_theirs[:used], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dw, dw_theirs, rtol=1e-5, atol=1e-5)


MODEL = dataclasses.replace(
    CONFIG, vocab_size=32, hidden_size=16, num_hidden_layers=2, intermediate_size=16, initializer_range=0.3,
    expert_capacity_factor=0.75,
)  # fmt: skip


@pytest.fixture(scope="module")
def run():
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    forward = jax.jit(forward_hidden, static_argnames=("config", "compute"))
    return lambda config, tokens, **options: forward(params, config, tokens, **options)


def test_what_is_dropped_depends_neither_on_padding_nor_on_other_rows(run):
    tokens = jax.random.randint(jax.random.key(1), (3, 12), 0, 32)
    key = jax.random.key(0)
    together = run(MODEL, tokens, dropout_key=key)
    assert 0.05 < float(together.dropped_share.mean()) < 0.8
    for row in range(3):
        padded = jnp.pad(tokens[row : row + 1], ((0, 0), (0, 5)))
        alone = run(MODEL, padded, segment_ids=(jnp.arange(17)[None] < 12).astype(jnp.int32), dropout_key=key)
        np.testing.assert_allclose(together.hidden[row], alone.hidden[0, :12], rtol=1e-5, atol=1e-5)


def test_nothing_is_dropped_outside_training(run):
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)
    limited, free = run(MODEL, tokens), run(dataclasses.replace(MODEL, expert_capacity_factor=None), tokens)
    np.testing.assert_array_equal(limited.hidden, free.hidden)
    assert limited.dropped_share is None


def test_training_reports_the_dropped_share_where_there_is_a_limit():
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    ones = np.ones((2, 8), np.int32)
    batch = {"tokens": ones, "targets": ones, "weights": ones * 1.0, "segment_ids": ones, "positions": ones}

    def metrics(factor, key):
        config = dataclasses.replace(MODEL, expert_capacity_factor=factor)
        return jax.jit(language_model_loss(config, ComputeConfig()))(params, None, batch, key)[1][1]

    # All tokens are alike and so are their experts: each of the two takes 3 = 0.75 * 8 * 2 / 4 of the row's 8.
    total, weight = metrics(0.75, jax.random.key(0))["dropped_share"]
    assert float(total / weight) == pytest.approx(1 - 3 / 8)
    assert "dropped_share" not in metrics(None, jax.random.key(0))
    assert "dropped_share" not in metrics(0.75, None)


def test_a_factor_that_is_not_positive_is_refused():
    with pytest.raises(ConfigError, match="expert_capacity_factor must be positive"):
        dataclasses.replace(CONFIG, expert_capacity_factor=0.0)
