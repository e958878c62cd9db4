"""The model against itself: cache, packing, padding, causality, and every field of its configuration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.cache import init_cache
from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig, RopeScaling
from minillm_jax.flops import count_params
from minillm_jax.losses import language_model_loss
from minillm_jax.model import forward, forward_hidden, init_params, param_axes, unembed
from minillm_jax.rope import rope_frequencies

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=512,
    initializer_range=0.2,
)
MOE = dataclasses.replace(TINY, use_moe=True, num_experts=3, moe_intermediate_size=24)
VARIANTS = {
    "dense": TINY,
    "moe": MOE,
    "sigmoid_moe": dataclasses.replace(MOE, scoring_func="sigmoid", n_shared_experts=0, norm_topk_prob=False),
    "qk_norm_bias_untied": dataclasses.replace(TINY, use_qk_norm=True, attention_bias=True, tie_word_embeddings=False),
    "odd_head": dataclasses.replace(TINY, num_attention_heads=3, num_key_value_heads=1, head_dim=10),
    "yarn": dataclasses.replace(TINY, rope_scaling=RopeScaling("yarn", 4.0, original_max_position_embeddings=16)),
}
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
draw = jax.jit(init_params, static_argnums=0)
run = jax.jit(forward_hidden, static_argnames=("config", "compute"))
gradient = jax.jit(
    lambda config, compute, params, row: jax.value_and_grad(language_model_loss(config, compute), has_aux=True)(
        params, None, row, None
    ),
    static_argnums=(0, 1),
)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def model(request):
    return request.param, draw(request.param, jax.random.key(0))


def random_tokens(rows, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, TINY.vocab_size)


def test_parameters_match_the_analytic_count(model):
    config, params = model
    assert sum(x.size for x in jax.tree.leaves(params)) == count_params(config)


def test_every_parameter_names_all_its_axes(model):
    config, params = model
    ranks = jax.tree.map(jnp.ndim, params)
    assert jax.tree.map(len, param_axes(config), is_leaf=lambda x: isinstance(x, tuple)) == ranks


def test_later_tokens_do_not_change_earlier_logits(model):
    config, params = model
    tokens = random_tokens(2, 150)
    longer = forward(params, config, tokens)
    np.testing.assert_allclose(longer[:, :40], forward(params, config, tokens[:, :40]), **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_equals_the_full_forward_pass(model, side):
    config, params = model
    lengths, width, new = [5, 9, 1], 9, 4
    tokens = random_tokens(3, width + new)
    prompts = np.zeros((3, width), np.int32)
    segments = np.zeros((3, width), np.int32)
    positions = np.zeros((3, width), np.int32)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        prompts[row, where], segments[row, where], positions[row, where] = tokens[row, :length], 1, np.arange(length)
    output = run(params, config, prompts, positions=positions, segment_ids=segments, cache=init_cache(config, 3, 32))
    steps, cache = [output.hidden], output.cache
    for i in range(new):
        here = np.asarray(lengths)[:, None] + i
        output = run(params, config, np.take_along_axis(np.asarray(tokens), here, 1), positions=here, cache=cache)
        cache = output.cache
        steps.append(output.hidden)
    for row, length in enumerate(lengths):
        full = forward(params, config, tokens[row : row + 1, : length + new])[0]
        first = width - length if side == "left" else 0
        prompt_logits = unembed(params, config, steps[0][row, first : first + length])
        np.testing.assert_allclose(prompt_logits, full[:length], **TOLERANCE)
        for i in range(new):
            np.testing.assert_allclose(unembed(params, config, steps[i + 1][row, 0]), full[length + i], **TOLERANCE)


def pack(documents, length):
    """Put documents one after another into a row, as `data.packing` does."""
    row = {name: np.zeros((1, length), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    row["weights"] = np.zeros((1, length), np.float32)
    offset = 0
    for segment, (tokens, weights) in enumerate(documents, start=1):
        n = len(tokens) - 1
        where = (0, slice(offset, offset + n))
        row["tokens"][where], row["targets"][where] = tokens[:-1], tokens[1:]
        row["weights"][where], row["segment_ids"][where], row["positions"][where] = weights[1:], segment, np.arange(n)
        offset += n
    return row


@pytest.mark.parametrize("length", [40, 300])  # within one block of queries, and across several
def test_packed_rows_equal_separate_rows(model, length):
    config, params = model
    if length > 40 and config not in (TINY, MOE):
        pytest.skip("blocks of queries do not depend on the variant")
    rng = np.random.default_rng(0)
    sizes = [length // 4, length // 3, length // 5]
    documents = [(rng.integers(0, config.vocab_size, n), (rng.random(n) < 0.6).astype(np.float32)) for n in sizes]
    (packed, (weight, _)), grads = gradient(config, ComputeConfig(), params, pack(documents, length))
    alone = [gradient(config, ComputeConfig(), params, pack([document], length)) for document in documents]
    np.testing.assert_allclose(packed, sum(a[0][0] for a in alone), rtol=1e-5)
    assert float(weight) == sum(float(a[0][1][0]) for a in alone)
    total = jax.tree.map(lambda *g: sum(g), *[a[1] for a in alone])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, total)


CHANGES = {
    "vocab_size": 64,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "intermediate_size": 40,
    "max_position_embeddings": 8,
    "rope_theta": 100.0,
    "rope_scaling": RopeScaling("linear", 3.0),
    "rms_norm_eps": 0.1,
    "tie_word_embeddings": False,
    "use_qk_norm": True,
    "attention_bias": True,
    "dropout": 0.5,
    "initializer_range": 0.1,
    "use_moe": False,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "n_shared_experts": 0,
    "moe_intermediate_size": 32,
    "scoring_func": "sigmoid",
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.5,
    "router_aux_loss_scope": "batch",
    "router_z_loss_coef": 0.5,
    "expert_capacity_factor": 0.5,
}


def observe(config):
    """What one can see of a configuration: parameter shapes, hidden states and routing loss of a training pass."""
    params = draw(config, jax.random.key(0))
    # A bias starts at zero and shows only once it has moved.
    params = jax.tree.map_with_path(lambda path, x: x + 0.1 if "bias" in str(path[-1]) else x, params)
    try:
        output = run(params, config, random_tokens(2, 20), dropout_key=jax.random.key(7))
    except ValueError as error:
        return str(error)
    logits = unembed(params, config, output.hidden)
    return [np.asarray(logits), *([] if output.router_loss is None else [np.asarray(output.router_loss)])]


def test_the_list_of_changes_covers_every_field():
    assert set(CHANGES) == {f.name for f in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("name", CHANGES)
def test_every_model_field_changes_the_forward_pass(name):
    base = dataclasses.replace(MOE, attention_bias=False) if name != "intermediate_size" else TINY
    before, after = observe(base), observe(dataclasses.replace(base, **{name: CHANGES[name]}))
    same = (
        len(before) == len(after)
        and all(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        if isinstance(after, list)
        else False
    )
    assert not same


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(RopeScaling)])
def test_every_rope_scaling_field_changes_the_forward_pass(field):
    scaling = RopeScaling("llama3" if "freq" in field else "yarn", 4.0, original_max_position_embeddings=64)
    other = {"rope_type": "linear", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0,
             "beta_slow": 0.25, "attention_factor": 2.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0}  # fmt: skip
    base = dataclasses.replace(TINY, head_dim=16, rope_theta=100.0, rope_scaling=scaling)
    changed = dataclasses.replace(base, rope_scaling=dataclasses.replace(scaling, **{field: other[field]}))
    assert not np.array_equal(observe(base)[0], observe(changed)[0])


def test_yarn_keeps_fast_dimensions_and_stretches_slow_ones():
    config = ModelConfig(rope_scaling=RopeScaling("yarn", 8.0, original_max_position_embeddings=2048))
    plain, _ = rope_frequencies(ModelConfig())
    scaled, factor = rope_frequencies(config)
    np.testing.assert_allclose(scaled[0], plain[0])
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8)
    assert factor == pytest.approx(0.1 * np.log(8) + 1)


@pytest.mark.parametrize(
    "compute",
    [ComputeConfig(remat="none"), ComputeConfig(remat="full"), ComputeConfig(unroll=2)],
    ids=["remat_none", "remat_full", "unroll"],
)
@pytest.mark.parametrize("config", [TINY, MOE], ids=["dense", "moe"])
def test_compute_options_do_not_change_loss_or_gradient(config, compute):
    params = draw(config, jax.random.key(0))
    rng = np.random.default_rng(1)
    row = pack([(rng.integers(0, config.vocab_size, 30), np.ones(30, np.float32))], 32)
    losses = [gradient(config, c, params, row) for c in (ComputeConfig(), compute)]
    np.testing.assert_allclose(losses[0][0][0], losses[1][0][0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), losses[0][1], losses[1][1])


def test_bfloat16_stays_near_float32():
    params = draw(TINY, jax.random.key(0))
    tokens = random_tokens(2, 24)
    full = jax.nn.log_softmax(forward(params, TINY, tokens))
    half = jax.nn.log_softmax(forward(params, TINY, tokens, compute=ComputeConfig(dtype="bfloat16")))
    assert half.dtype == jnp.float32
    assert float(jnp.abs(full - half).mean()) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 34}, "not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "must be even"),
        ({"num_experts_per_tok": 9}, "between 1 and num_experts"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **changes)
