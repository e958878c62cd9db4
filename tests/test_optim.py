import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax.config import ConfigError, OptimConfig
from minillm_jax.optim import decay_mask, global_norm, make_optimizer, make_schedule, muon_mask


def make_params(seed: int = 0) -> dict:
    """A small tree with every kind of parameter: L=3, D=8, F=12, E=2, V=16."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32)

    return {
        "embed_tokens": {"embedding": normal(16, 8)},
        "layers": {
            "input_layernorm": {"scale": normal(3, 8)},
            "self_attn": {
                "q_proj": {"kernel": normal(3, 8, 8), "bias": normal(3, 8)},
                "q_norm": {"scale": normal(3, 4)},
            },
            "mlp": {
                "router": {"kernel": normal(3, 8, 2)},
                "experts": {"gate_proj": normal(3, 2, 8, 12), "down_proj": normal(3, 2, 12, 8)},
                "shared": {"up_proj": {"kernel": normal(3, 8, 12)}},
            },
        },
        "norm": {"scale": normal(8)},
        "lm_head": {"kernel": normal(8, 16)},
    }


def marked(mask: dict) -> set[str]:
    paths = jax.tree_util.tree_flatten_with_path(mask)[0]
    return {".".join(entry.key for entry in path) for path, value in paths if value}


def plain(**changes: object) -> OptimConfig:
    """A constant rate without clipping, so that one update shows the rule alone."""
    values = {"schedule": "constant", "warmup_ratio": 0.0, "grad_clip": 0.0, "weight_decay": 0.0, **changes}
    return OptimConfig(**values)  # type: ignore[arg-type]


def first_update(config: OptimConfig, params: dict, grads: dict) -> dict:
    optimizer = make_optimizer(config, 10, params)
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


# ------------------------------------------------------------------------------------------------------------ schedule


def rates(total: int, **changes: object) -> list[float]:
    schedule = make_schedule(OptimConfig(learning_rate=1.0, **changes), total)  # type: ignore[arg-type]
    return [round(float(schedule(step)), 6) for step in range(total)]


def test_cosine_rises_to_its_peak_and_ends_at_the_final_ratio():
    got = rates(8, schedule="cosine", warmup_ratio=0.25, min_lr_ratio=0.1)
    # (1 + cos(pi k / 6)) / 2 for k = 0..6, between 1 and 0.1
    expected = [0.5, 1.0, 0.939711, 0.775, 0.55, 0.325, 0.160289, 0.1]
    assert got == pytest.approx(expected, abs=2e-6)


def test_wsd_warms_up_stays_and_falls_linearly():
    got = rates(10, schedule="wsd", warmup_ratio=0.2, decay_ratio=0.4, min_lr_ratio=0.2)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_wsd_without_decay_is_constant():
    assert rates(4, schedule="wsd", warmup_ratio=0.5, decay_ratio=0.0) == pytest.approx([0.5, 1, 1, 1])


def test_constant_stays_at_the_peak():
    assert rates(5, schedule="constant", warmup_ratio=0.4) == pytest.approx([0.5, 1, 1, 1, 1])


def test_without_warmup_the_first_step_has_the_peak_rate():
    assert rates(3, schedule="cosine", warmup_ratio=0.0, min_lr_ratio=0.0) == pytest.approx([1.0, 0.5, 0.0])


def test_a_run_of_one_step_has_the_peak_rate():
    for shape in ("cosine", "wsd", "constant"):
        assert rates(1, schedule=shape) == [1.0]


def test_steps_after_the_last_keep_its_rate():
    schedule = make_schedule(OptimConfig(), 10)
    assert float(schedule(1000)) == float(schedule(9)) == pytest.approx(5e-5)


def test_schedule_is_the_same_traced_and_not():
    schedule = make_schedule(OptimConfig(), 50)
    traced = jax.jit(jax.vmap(schedule))(jnp.arange(50, dtype=jnp.int32))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, [schedule(step) for step in range(50)], rtol=1e-6)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    shape=st.sampled_from(["cosine", "wsd", "constant"]),
    total=st.integers(1, 256),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    final=st.floats(0, 1),
)
def test_rate_rises_then_never_rises_again(shape: str, total: int, warmup: float, decay: float, final: float):
    config = OptimConfig(
        learning_rate=1.0,
        schedule=shape,
        warmup_ratio=warmup,
        decay_ratio=decay,
        min_lr_ratio=final,  # type: ignore[arg-type]
    )
    values = np.asarray(make_schedule(config, total)(np.arange(256)))[:total]
    peak = max(0, round(warmup * total) - 1)
    assert values[0] > 0
    assert values[peak] == pytest.approx(1.0) and values.max() == pytest.approx(1.0)
    assert (np.diff(values[: peak + 1]) > 0).all() and (np.diff(values[peak:]) <= 1e-6).all()


@pytest.mark.parametrize(
    "changes, total, message",
    [
        ({"warmup_ratio": 1.5}, 10, r"warmup_ratio must lie in \[0, 1\], not 1.5"),
        ({"min_lr_ratio": -0.1}, 10, r"min_lr_ratio must lie in \[0, 1\]"),
        ({"schedule": "wsd", "warmup_ratio": 0.6, "decay_ratio": 0.6}, 10, "overlap"),
        ({}, 0, "at least one step, not 0"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict, total: int, message: str):
    with pytest.raises(ConfigError, match=message):
        make_schedule(OptimConfig(**changes), total)


# --------------------------------------------------------------------------------------------------- which rule applies


def test_decay_shrinks_matrices_and_nothing_else():
    assert marked(decay_mask(make_params())) == {
        "layers.self_attn.q_proj.kernel",
        "layers.mlp.router.kernel",
        "layers.mlp.experts.gate_proj",
        "layers.mlp.experts.down_proj",
        "layers.mlp.shared.up_proj.kernel",
        "lm_head.kernel",
    }


def test_muon_moves_the_matrices_inside_layers_except_the_router():
    assert marked(muon_mask(make_params())) == {
        "layers.self_attn.q_proj.kernel",
        "layers.mlp.experts.gate_proj",
        "layers.mlp.experts.down_proj",
        "layers.mlp.shared.up_proj.kernel",
    }


def test_adapters_are_decayed_and_stay_with_adam():
    adapter = {"layers": {"self_attn": {"q_proj": {"a": jnp.ones((3, 8, 2)), "b": jnp.zeros((3, 2, 8))}}}}
    assert marked(decay_mask(adapter)) == {"layers.self_attn.q_proj.a", "layers.self_attn.q_proj.b"}
    assert marked(muon_mask(adapter)) == set()
    grads = jax.tree.map(jnp.ones_like, adapter)
    by_adam = first_update(plain(), adapter, grads)
    by_muon = first_update(plain(optimizer="muon"), adapter, grads)
    jax.tree.map(np.testing.assert_array_equal, by_adam, by_muon)


# ---------------------------------------------------------------------------------------------------------------- AdamW


def test_adamw_follows_its_formula_over_three_steps():
    config = OptimConfig(schedule="wsd", learning_rate=0.1, warmup_ratio=0.5, decay_ratio=0.0, grad_clip=0.0)
    params = {"dense": {"kernel": jnp.array([[1.0, -2.0]])}, "norm": {"scale": jnp.array([1.0, -2.0])}}
    grads = [0.3, -0.1, 2.0]
    optimizer = make_optimizer(config, 4, params)
    state = optimizer.init(params)
    expected = {True: np.array([1.0, -2.0]), False: np.array([1.0, -2.0])}  # decayed or not
    m = v = 0.0
    for t, (grad, rate) in enumerate(zip(grads, [0.05, 0.1, 0.1], strict=True), start=1):
        updates, state = optimizer.update(jax.tree.map(lambda p, g=grad: jnp.full_like(p, g), params), state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        for decayed, value in expected.items():
            expected[decayed] = value - rate * (direction + 0.1 * decayed * value)
    np.testing.assert_allclose(params["dense"]["kernel"][0], expected[True], rtol=1e-5)
    np.testing.assert_allclose(params["norm"]["scale"], expected[False], rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_gradient_only_matrices_shrink(name: str):
    params = make_params()
    config = plain(optimizer=name, weight_decay=0.1, learning_rate=0.5)
    updates = first_update(config, params, jax.tree.map(jnp.zeros_like, params))

    def check(decayed: bool, update: jax.Array, param: jax.Array) -> None:
        np.testing.assert_allclose(update, -0.05 * param if decayed else jnp.zeros_like(param), rtol=1e-6)

    jax.tree.map(check, decay_mask(params), updates, params)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_is_arrays_with_float32_moments(name: str):
    params = make_params()
    optimizer = make_optimizer(OptimConfig(optimizer=name), 10, params)
    state = optimizer.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    shapes = jax.eval_shape(optimizer.init, jax.eval_shape(lambda: params))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_optimizer_can_be_made_from_shapes_alone():
    params = {"layers": {"kernel": jnp.ones((2, 4, 4)), "scale": jnp.ones((2, 4))}}
    optimizer = make_optimizer(plain(optimizer="muon", learning_rate=1.0), 10, jax.eval_shape(lambda: params))
    updates = jax.jit(optimizer.update)(params, optimizer.init(params), params)[0]
    jax.tree.map(
        np.testing.assert_array_equal, updates, first_update(plain(optimizer="muon", learning_rate=1.0), params, params)
    )


# ------------------------------------------------------------------------------------------------------------- clipping


def test_global_norm_adds_up_in_float32():
    tree = {"a": jnp.full((4096,), 1.0, jnp.bfloat16), "b": jnp.array([3.0])}  # bfloat16 cannot count past 256 by ones
    assert float(global_norm(tree)) == pytest.approx(np.sqrt(4096 + 9))
    assert global_norm(tree).dtype == jnp.float32


def clipped(max_norm: float, grads: dict) -> dict:
    """Gradients after clipping, read off Adam's first moment."""
    params = jax.tree.map(jnp.zeros_like, grads)
    optimizer = make_optimizer(OptimConfig(grad_clip=max_norm, beta1=0.0), 10, params)
    state = optimizer.update(grads, optimizer.init(params), params)[1]
    return optax.tree.get(state, "mu")


def test_large_gradients_are_scaled_to_the_largest_norm():
    got = clipped(1.0, {"a": {"kernel": jnp.array([[3.0]])}, "b": {"scale": jnp.array([4.0])}})
    np.testing.assert_allclose([got["a"]["kernel"][0, 0], got["b"]["scale"][0]], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("max_norm", [5.0, 100.0, 0.0])
def test_small_gradients_pass_clipping_bit_for_bit(max_norm: float):
    grads = {"a": {"kernel": jnp.array([[3.0]])}, "b": {"scale": jnp.array([4.0])}}
    jax.tree.map(np.testing.assert_array_equal, clipped(max_norm, grads), grads)


# ----------------------------------------------------------------------------------------------------------------- Muon


@pytest.fixture(scope="module")
def muon_updates() -> dict:
    """Muon's first update of `make_params()` by the gradients `make_params(1)`, at rate 1."""
    return first_update(plain(optimizer="muon", learning_rate=1.0), make_params(), make_params(1))


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five quintic steps with the published coefficients, in plain numpy on one matrix."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_treats_each_layer_and_expert_as_its_own_matrix(muon_updates: dict):
    grads = make_params(1)
    for path in (("self_attn", "q_proj", "kernel"), ("mlp", "experts", "gate_proj"), ("mlp", "experts", "down_proj")):
        grad, update = grads["layers"], muon_updates["layers"]
        for name in path:
            grad, update = grad[name], update[name]
        scale = 0.2 * np.sqrt(max(grad.shape[-2:]))
        for index in np.ndindex(grad.shape[:-2]):  # one layer, or one expert of one layer
            expected = -scale * newton_schulz(np.asarray(grad[index], np.float64))
            np.testing.assert_allclose(update[index], expected, atol=1e-4)


def test_muon_updates_are_nearly_orthogonal_with_adams_size(muon_updates: dict):
    for layer in np.asarray(muon_updates["layers"]["mlp"]["shared"]["up_proj"]["kernel"]):  # [8, 12]
        singular_values = np.linalg.svd(layer / (0.2 * np.sqrt(12)), compute_uv=False)
        assert singular_values.min() > 0.6 and singular_values.max() < 1.3
        assert np.sqrt((layer**2).mean()) == pytest.approx(0.2, rel=0.2)


def test_muon_steps_against_the_gradient(muon_updates: dict):
    products = jax.tree.map(lambda u, g: float((u * g).sum()), muon_updates, make_params(1))
    assert max(jax.tree.leaves(products)) < 0


def test_muon_leaves_embeddings_head_router_norms_and_biases_to_adam(muon_updates: dict):
    by_adam = first_update(plain(learning_rate=1.0), make_params(), make_params(1))
    same = jax.tree.map(lambda a, m: bool((a == m).all()), by_adam, muon_updates)
    assert same == jax.tree.map(lambda is_muon: not is_muon, muon_mask(make_params()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_both_optimizers_learn_a_linear_map_at_the_same_rate(name: str):
    target = jax.random.normal(jax.random.key(1), (1, 8, 8))
    params = {"layers": {"kernel": jnp.zeros((1, 8, 8))}}
    optimizer = make_optimizer(
        OptimConfig(optimizer=name, learning_rate=0.1, weight_decay=0.0, grad_clip=0.0), 200, params
    )

    def loss(p: dict) -> jax.Array:
        return jnp.mean((p["layers"]["kernel"] - target) ** 2)

    def step(carry: tuple, _: None) -> tuple:
        p, state = carry
        updates, state = optimizer.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=200))(
        (params, optimizer.init(params))
    )
    assert float(loss(params)) < 0.01 * float(jnp.mean(target**2))
