"""Every implementation of attention and of the grouped product against plain XLA operations, and what `auto` picks.

No kernel's own device is needed: those of TPU and of Triton are stepped through, and what cuDNN and tokamax are given
is given to JAX's own operations. On a GPU, cuDNN itself runs as well.
"""

import dataclasses
import functools
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from minillm_jax import attention as chooser
from minillm_jax import attention_kernels, kernels, matmul, matmul_kernels
from minillm_jax.attention import attention, choose
from minillm_jax.attention_kernels import Call, dense_mask, refusal, splash
from minillm_jax.attention_xla import visible, xla_attention
from minillm_jax.cache import BRANCH
from minillm_jax.config import ModelConfig
from minillm_jax.matmul import grouped_matmul
from minillm_jax.model import forward, init_params

ROWS = {
    "packed": [[1] * 5 + [2] * 20 + [3] * 15, [1] * 40],
    "padded right": [[1] * 30 + [0] * 10, [1] * 7 + [2] * 7 + [0] * 26],
    "padded left": [[0] * 10 + [1] * 30, [0] * 39 + [1]],
    "only padding": [[0] * 40, [1] * 40],
}


def rows(name):
    """Positions and segments `[2, 40]`."""
    segments = np.asarray(ROWS[name])
    positions = np.stack([np.arange(40) - [list(s).index(i) for i in s] for s in segments])
    return jnp.asarray(positions), jnp.asarray(segments)


def arrays(length, keys, heads=4, groups=2, size=16):
    shapes = [(2, length, heads, size), *[(2, groups, keys, size)] * 2, (2, length, heads, size)]
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def agree(ours, masks, causal_layout, heads=4, groups=2):
    """Compare outputs of real tokens, and the gradients that they send back, with those of `xla`."""
    *qkv, g = arrays(masks[0].shape[1], masks[1].shape[1], heads, groups)
    g = g * (masks[2] > 0)[:, :, None, None]
    theirs = lambda q, k, v: xla_attention(q, k, v, masks, causal_layout)
    (out, *grads), (wanted, *wanted_grads) = both_ways(ours, g, *qkv), both_ways(theirs, g, *qkv)
    assert bool(jnp.isfinite(out).all())
    real = np.asarray(masks[2] > 0)
    np.testing.assert_allclose(out[real], wanted[real], rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def both_ways(function, g, *inputs):
    """Output of a function, and the gradients of its inputs given that of its output."""
    out, pull = jax.vjp(function, *inputs)
    return out, *pull(g)


@pytest.mark.parametrize("name", ROWS)
def test_splash_sees_what_xla_sees(name):
    positions, segments = rows(name)
    masks = (positions, positions, segments, segments)
    agree(lambda q, k, v: splash(q, k, v, masks, interpret=True), masks, True)


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (3, 3)])
def test_splash_groups_heads(heads, groups):
    positions, segments = rows("packed")
    masks = (positions, positions, segments, segments)
    agree(lambda q, k, v: splash(q, k, v, masks, interpret=True), masks, True, heads, groups)


@pytest.mark.parametrize("broken", ["branches", "order"])
def test_splash_gives_no_number_where_it_would_give_a_wrong_one(broken):
    positions, segments = rows("packed")
    if broken == "branches":
        segments = segments.at[0, 20].add(BRANCH)
    else:
        positions = positions.at[0, 2].set(0)
    q, k, v, _ = arrays(40, 40)
    assert bool(jnp.isnan(splash(q, k, v, (positions, positions, segments, segments), interpret=True)).all())


def branched_rows():
    """A trunk of 10 tokens, two branches of 10, another segment, and padding."""
    segments = jnp.asarray([[1] * 10 + [1 + BRANCH] * 10 + [1 + 2 * BRANCH] * 10 + [2] * 6 + [0] * 4] * 2)
    positions = jnp.asarray([[*range(20), *range(10, 20), *range(6), *[0] * 4]] * 2)
    return positions, segments


@pytest.mark.parametrize("name", [*ROWS, "branches"])
def test_the_table_of_cudnn_and_tokamax_is_the_mask_of_xla(name):
    positions, segments = branched_rows() if name == "branches" else rows(name)
    masks = (positions, positions, segments, segments)
    agree(lambda q, k, v: dense_mask("xla", q, k, v, masks, True), masks, True)


def cached_masks():
    """Four queries and ten slots, of which rows have filled different ones, in any order."""
    kv_positions = jnp.asarray([[3, 1, 0, 2, 5, 4, 7, 6, 0, 0], [0, 0, 0, 1, 2, 3, 4, 5, 0, 0]])
    kv_segments = jnp.asarray([[1] * 8 + [0] * 2, [0] * 2 + [1] * 6 + [0] * 2])
    q_positions, q_segments = jnp.asarray([[4, 5, 6, 7], [0, 3, 4, 5]]), jnp.asarray([[1] * 4, [0, 1, 1, 1]])
    return q_positions, kv_positions, q_segments, kv_segments


def test_the_table_finds_cached_keys_in_any_slot():
    masks = cached_masks()
    agree(lambda q, k, v: dense_mask("xla", q, k, v, masks, False), masks, False)


def test_who_sees_whom_spelled_out():
    segments = jnp.asarray([[1, 1 + BRANCH, 1 + 2 * BRANCH, 2, 0]])
    positions = jnp.asarray([[0, 1, 1, 0, 0]])
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert visible(positions, positions, segments, segments)[0].astype(int).tolist() == expected


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("name", [*ROWS, "branches"])
def test_cudnn_agrees_on_a_gpu(name):
    positions, segments = branched_rows() if name == "branches" else rows(name)
    masks = (positions, positions, segments, segments)
    *qkv, g = (x.astype(jnp.bfloat16) for x in arrays(40, 40))
    g = g * (segments > 0)[:, :, None, None]
    results = []
    for f in (
        lambda *qkv: dense_mask("cudnn", *qkv, masks, True),
        lambda *qkv: xla_attention(*qkv, masks, True),
    ):
        out, pull = jax.vjp(f, *qkv)
        results.append((out * (segments > 0)[:, :, None, None], *pull(g)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.05, rtol=0.05)


TRAINING = Call("tpu", 8, 512, 512, 8, 2, 64, "bfloat16", causal_layout=True, branched=False)


@pytest.mark.parametrize(
    ("changes", "choice"),
    [
        ({}, "splash"),
        ({"branched": True}, "xla"),
        ({"causal_layout": False}, "xla"),
        ({"length": 64, "keys": 64}, "xla"),
        ({"platform": "cpu"}, "xla"),
        ({"platform": "gpu"}, "cudnn"),
        ({"platform": "gpu", "branched": True}, "cudnn"),
        ({"platform": "gpu", "dtype": "float32"}, "xla"),
        ({"platform": "gpu", "batch": 64, "length": 8192, "keys": 8192}, "xla"),
    ],
)
def test_auto_picks_by_platform_dtype_and_shape(monkeypatch, changes, choice):
    monkeypatch.setattr(attention_kernels, "installed", lambda name: False)
    assert choose(dataclasses.replace(TRAINING, **changes)) == choice


@pytest.mark.parametrize(
    ("impl", "changes", "message"),
    [
        ("splash", {"platform": "cpu"}, "runs on TPU, and this is compiled for CPU"),
        ("splash", {"causal_layout": False}, "no form for a key-value cache"),
        ("splash", {"branched": True}, "may have branches"),
        ("cudnn", {}, "runs on GPU"),
        ("cudnn", {"platform": "gpu", "dtype": "float32"}, "not float32"),
        ("cudnn", {"platform": "gpu", "size": 20}, "head size 20"),
        ("cudnn", {"platform": "gpu", "length": 511, "keys": 511}, "even numbers of tokens"),
        ("tokamax", {"platform": "gpu"}, "not installed"),
    ],
)
def test_an_implementation_that_cannot_is_refused_with_the_reason(monkeypatch, impl, changes, message):
    monkeypatch.setattr(attention_kernels, "installed", lambda name: False)
    with pytest.raises(ValueError, match=message):
        choose(dataclasses.replace(TRAINING, **changes), impl)


def test_a_kernel_that_ignores_segments_is_found_out_and_left_out(monkeypatch, caplog):
    call = dataclasses.replace(TRAINING, platform="cpu", size=16)
    monkeypatch.setattr(kernels, "_tried", {})
    monkeypatch.setattr(kernels, "_said", set())
    monkeypatch.setattr(chooser, "PREFERRED", {"cpu": ("cudnn",)})
    monkeypatch.setattr(attention_kernels, "refusal", lambda impl, call: None)
    honest = lambda impl, q, k, v, masks, causal_layout: dense_mask("xla", q, k, v, masks, causal_layout)
    blind = lambda impl, q, k, v, masks, causal_layout: honest(
        impl, q, k, v, (*masks[:2], masks[2] * 0 + 1, masks[3] * 0 + 1), causal_layout
    )
    with caplog.at_level(logging.INFO, logger="minillm_jax.kernels"):
        monkeypatch.setattr(attention_kernels, "run", honest)
        assert [choose(call), choose(call)] == ["cudnn", "cudnn"]
        kernels._tried.clear()
        monkeypatch.setattr(attention_kernels, "run", blind)
        assert choose(call) == "xla"
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "cudnn (" in line] == ["attention: cudnn (cpu, bfloat16, 512 x 512 tokens)"]
    assert any("left out: its results differ" in line for line in said)


def test_without_segments_the_model_says_that_there_are_no_branches(monkeypatch):
    seen = []

    def record(*args, branched, **kwargs):
        seen.append(branched)
        return attention(*args, branched=branched, **kwargs)

    monkeypatch.setattr("minillm_jax.model.attention", record)
    config = ModelConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    params = init_params(config, jax.random.key(0))
    tokens = jnp.ones((1, 5), jnp.int32)
    seen.clear()
    forward(params, config, tokens)
    forward(params, config, tokens, segment_ids=jnp.ones_like(tokens))
    assert set(seen[: len(seen) // 2]) == {False}
    assert set(seen[len(seen) // 2 :]) == {True}


# --- The grouped product ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[130, 1, 0, 59], [0, 0, 5, 14], [20, 0, 0, 4]])
@pytest.mark.parametrize("impl", ["triton", "megablox"])
def test_grouped_kernels_and_their_gradients_equal_ragged_dot(impl, sizes):
    total = sum(sizes)
    rows = total + 3  # of which the last belong to no group
    x, w, g = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(rows, 32), (4, 32, 48), (rows, 48)])
    )
    counts = jnp.asarray(sizes, jnp.int32)
    g = g.at[total:].set(0.0)
    ours, dx, dw = both_ways(lambda x, w: matmul_kernels.run(impl, x, w, counts, interpret=True), g, x, w)
    theirs, dx_ragged, dw_ragged = both_ways(lambda x, w: jax.lax.ragged_dot(x, w, counts), g, x, w)
    np.testing.assert_allclose(ours[:total], theirs[:total], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx[:total], dx_ragged[:total], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, dw_ragged, rtol=1e-4, atol=1e-4)


def test_the_triton_kernels_lower_for_nvidia_gpus():
    shapes = [((512, 64), jnp.bfloat16), ((4, 64, 96), jnp.bfloat16), ((4,), jnp.int32)]
    loss = lambda x, w, sizes: matmul_kernels.run("triton", x, w, sizes).astype(jnp.float32).sum()
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*(jax.ShapeDtypeStruct(*s) for s in shapes))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert {"grouped_matmul_transposed", "grouped_matmul_weights"} <= set(re.findall(r"grouped_matmul\w*", text))


@pytest.mark.parametrize(
    ("platform", "rows", "dtype", "shape", "choice"),
    [
        ("tpu", 512, "bfloat16", (4, 64, 96), "megablox"),
        ("gpu", 512, "bfloat16", (4, 64, 96), "triton"),
        ("gpu", 512, "float32", (4, 64, 96), "ragged_dot"),
        ("gpu", 512, "bfloat16", (4, 64, 8), "ragged_dot"),
        ("tpu", 8, "bfloat16", (4, 64, 96), "ragged_dot"),
    ],
)
def test_the_grouped_product_is_picked_by_platform_dtype_and_shape(monkeypatch, platform, rows, dtype, shape, choice):
    chosen = []
    monkeypatch.setattr(matmul, "platform", lambda: platform)
    monkeypatch.setattr(matmul_kernels, "installed", lambda name: False)
    monkeypatch.setattr(matmul_kernels, "run", lambda impl, x, w, sizes: chosen.append(impl))
    monkeypatch.setattr(jax.lax, "ragged_dot", lambda x, w, sizes: chosen.append("ragged_dot"))
    grouped_matmul(jnp.zeros((rows, shape[1]), dtype), jnp.zeros(shape, dtype), jnp.zeros(shape[0], jnp.int32))
    assert chosen == [choice]


@pytest.mark.parametrize(("impl", "message"), [("megablox", "runs on TPU"), ("cublas", "is unknown")])
def test_a_grouped_product_that_cannot_is_refused(impl, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(jnp.zeros((128, 16)), jnp.zeros((2, 16, 16)), jnp.asarray([64, 64]), impl)


ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
from minillm_jax import attention_kernels
from minillm_jax.attention_xla import xla_attention
from minillm_jax.sharding import make_mesh
shapes = [(4, 24, 8, 16), (4, 2, 24, 16), (4, 2, 24, 16)]
q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
segments = jnp.asarray([[1] * 9 + [2] * 12 + [0] * 3] * 4)
positions = jnp.asarray([[*range(9), *range(12), 0, 0, 0]] * 4)
masks = (positions, positions, segments, segments)
real = (segments > 0)[:, :, None, None]
square = lambda f: jax.jit(jax.value_and_grad(lambda *qkv: ((f(*qkv) * real) ** 2).sum(), argnums=(0, 1, 2)))
wanted = square(lambda *qkv: xla_attention(*qkv, masks, True))(q, k, v)
with jax.set_mesh(make_mesh("data=2,tensor=4")):  # two key-value heads for four devices
    def splash(*qkv):
        return attention_kernels.run("splash", *qkv, masks, True, interpret=True)

    def dense(*qkv):
        table = lambda q, k, v, masks: attention_kernels.dense_mask("xla", q, k, v, masks, True)
        return attention_kernels._on_mesh(table, *qkv, masks)

    for kernel in (splash, dense):
        for a, b in zip(jax.tree.leaves(square(kernel)(q, k, v)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
print("equal")
"""


@pytest.mark.slow
def test_kernels_run_on_each_device_s_rows_and_heads():
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", ON_A_MESH], env=env, cwd=root, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "equal\n"


def test_refusals_know_what_every_implementation_is_for():
    cpu = dataclasses.replace(TRAINING, platform="cpu")
    assert all(refusal(impl, cpu) for impl in chooser.IMPLEMENTATIONS if impl != "xla")
