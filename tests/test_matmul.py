"""The plain product in all its forms: what it computes does not depend on how many rows there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.matmul import (
    CONVERTED_COLUMNS,
    FEW_ROWS,
    LOOPED_OPTIONS,
    LOOPED_ROWS,
    LOOPED_SIZE,
    batched_product,
    looped_products,
    looped_rows,
    matmul,
    product,
)


def draw(rows, depth=48, width=40):
    rng = np.random.default_rng(rows)
    return rng.standard_normal((rows, depth), np.float32), rng.standard_normal((depth, width), np.float32)


@pytest.mark.parametrize("rows", [1, 2, 7, FEW_ROWS, FEW_ROWS + 1])
def test_any_number_of_rows(rows):
    x, w = draw(rows)
    expected = x.astype(np.float64) @ w
    np.testing.assert_allclose(matmul(x, w), expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(matmul)(x[:, None], w)[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_gradients_are_those_of_the_plain_product(rows):
    x, w = draw(rows)
    ours = jax.grad(lambda x, w: (matmul(x, w) ** 2).sum(), argnums=(0, 1))(x, w)
    plain = jax.grad(lambda x, w: ((x @ w) ** 2).sum(), argnums=(0, 1))(x, w)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def looped(x, w):
    """Return the product of few rows as a loop, compiled as the engine compiles it."""
    with looped_products(True):
        lowered = jax.jit(lambda x, w: product(x, w)).lower(x, w)  # a function of its own: traced anew
    assert "dot_general" not in lowered.as_text()
    return lowered.compile(LOOPED_OPTIONS if jax.default_backend() == "cpu" else None)(x, w)


@pytest.mark.parametrize("depth", [96, 97])
def test_long_columns(depth):
    x, w = draw(16, depth)
    np.testing.assert_allclose(matmul(x, w), x.astype(np.float64) @ w, atol=1e-5)
    half, matrix = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    y = matmul(half, matrix)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), half.astype(np.float32) @ matrix.astype(np.float32), 2**-7, 0.02)


@pytest.mark.parametrize("shape", [(1, 48), (1, 1, 48), (3, 48), (LOOPED_ROWS, 1, 48)])
def test_few_rows_as_a_loop(shape):
    x, w = draw(shape[0])
    y = looped(x.reshape(shape), w)
    assert y.shape == (*shape[:-1], 40)
    np.testing.assert_allclose(y.reshape(-1, 40), x @ w, atol=1e-5)


@pytest.mark.parametrize("depth", [8, 96, 1408])
def test_loops_of_any_depth_add_up_all_parts(depth):
    x, w = draw(2, depth)
    np.testing.assert_allclose(looped(x, w), x.astype(np.float64) @ w, atol=1e-4)
    steps = np.round(w * 40).astype(np.int8)
    np.testing.assert_allclose(looped(x, steps), x.astype(np.float64) @ steps, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("width", [3 * CONVERTED_COLUMNS, CONVERTED_COLUMNS // 2, 5 * 64, 40])
@pytest.mark.parametrize("rows", [1, 7, FEW_ROWS + 1])
def test_integers_are_converted_some_columns_at_a_time(rows, width):
    x, w = draw(rows, width=width)
    steps = np.round(w * 40).astype(np.int8)
    multiply = jax.jit(product)
    np.testing.assert_allclose(multiply(x[None], steps)[0], x.astype(np.float64) @ steps, rtol=1e-5, atol=1e-3)
    assert multiply(jnp.asarray(x, jnp.bfloat16), steps).dtype == jnp.bfloat16
    whole = f"f32[{x.shape[1]},{width}]"
    assert width < CONVERTED_COLUMNS or whole not in multiply.lower(x, steps).compile().as_text()


@pytest.mark.parametrize("depth", [8, 200])
def test_products_of_a_batch_of_small_and_large_matrices(depth):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3, 4, depth), np.float32), rng.standard_normal((2, 3, depth, 16), np.float32)
    for wanted in (False, True):
        with looped_products(wanted):
            lowered = jax.jit(lambda x, w: batched_product(x, w)).lower(x, w)
        assert ("dot_general" in lowered.as_text()) == (not wanted or depth * 16 > LOOPED_SIZE)
        np.testing.assert_allclose(lowered.compile()(x, w), x.astype(np.float64) @ w, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_more_rows_are_no_loop(dtype):
    most = looped_rows(np.dtype(dtype))
    x, w = draw(most + 1)
    assert looped(x[:most], w.astype(dtype)).shape == (most, 40)
    with looped_products(True):
        assert "dot_general" in jax.jit(lambda x, w: product(x, w)).lower(x, w.astype(dtype)).as_text()


def test_a_loop_converts_integers_and_adds_up_in_float32():
    x, w = draw(1)
    steps = np.round(w * 40).astype(np.int8)
    np.testing.assert_allclose(looped(x, steps), x @ steps.astype(np.float32), rtol=1e-5, atol=1e-4)
    half = jnp.asarray(x, jnp.bfloat16)
    y = looped(half, jnp.asarray(w, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(half, np.float32) @ np.asarray(jnp.asarray(w, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.1, rtol=2**-8)


def test_a_depth_that_no_loop_divides_is_a_plain_product():
    x, w = draw(1, depth=50)
    with looped_products(True):
        lowered = jax.jit(lambda x, w: product(x, w)).lower(x, w)
    assert "dot_general" in lowered.as_text()
    np.testing.assert_allclose(lowered.compile()(x, w), x @ w, atol=1e-5)


def test_a_matrix_for_each_row_of_the_batch():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3, 8), np.float32), rng.standard_normal((2, 8, 5), np.float32)
    np.testing.assert_allclose(matmul(x, w), x @ w, atol=1e-5)
