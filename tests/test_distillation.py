"""The losses of distillation: numbers of other people's code, properties of divergences, the loss of whole models."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_trainer import MOE, TINY, draw, uneven_batch

from minillm_jax import losses
from minillm_jax.config import ComputeConfig, ConfigError
from minillm_jax.distillation import (
    DistillConfig,
    distillation_loss,
    divergence,
    top_k_divergence,
    top_k_logprobs,
)
from minillm_jax.losses import language_model_loss, logprobs_from_logits, reweighted
from minillm_jax.model import forward
from minillm_jax.trainer import accumulate_gradients

GOLDEN = load_file(Path(__file__).parent / "golden" / "distill" / "expected.safetensors")
BETAS, TEMPERATURES = (0.0, 0.1, 0.5, 0.9, 1.0), (1.0, 2.5)  # as are ALPHA and TOP_K, those of make_golden_distill.py
ALPHA, TOP_K = 0.3, 4
TAGS, TAG_WEIGHT = (2, 5, 6, 11), 10.0
KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")
TEACHER = dataclasses.replace(TINY, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, head_dim=6)
STUDENT_KEY, TEACHER_KEY = jax.random.key(1), jax.random.key(2)
accumulate = jax.jit(accumulate_gradients, static_argnums=(0, 5))


def settings_of(beta, **more):
    """TRL names three divergences by one number."""
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jensen_shannon")
    return {"kind": kind, "jsd_beta": beta, **more}


def masked_mean(values):
    return (values * GOLDEN["mask"]).sum() / GOLDEN["mask"].sum()


def cross_entropy(logits):
    return -logprobs_from_logits(logits, GOLDEN["labels"])


def agree(function, name):
    value, gradient = jax.value_and_grad(function)(GOLDEN["student"])
    np.testing.assert_allclose(value, GOLDEN[name][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[name + ".gradient"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
class TestOtherPeoplesNumbers:
    def test_divergences_are_those_of_trl(self, beta, temperature):
        far = partial(divergence, teacher_logits=GOLDEN["teacher"], **settings_of(beta, temperature=temperature))
        agree(lambda logits: masked_mean(far(logits)), f"trl.divergence.{beta}.{temperature}")

    def test_totals_are_those_written_out_in_torch(self, beta, temperature):
        far = partial(divergence, teacher_logits=GOLDEN["teacher"], **settings_of(beta, temperature=temperature))

        def total(logits):
            mixed = ALPHA * cross_entropy(logits) + (1 - ALPHA) * temperature**2 * far(logits)
            return masked_mean(mixed)

        agree(total, f"torch.total.{beta}.{temperature}")

    def test_top_k_divergences_are_those_written_out_in_torch(self, beta, temperature):
        ids, logprobs = top_k_logprobs(jnp.asarray(GOLDEN["teacher"]), TOP_K, temperature)
        options = settings_of(beta, temperature=temperature)
        far = lambda logits: masked_mean(top_k_divergence(logits, ids, logprobs, **options))
        agree(far, f"torch.top_k.{beta}.{temperature}")


def test_weighted_tags_are_those_written_out_in_torch():
    def loss_fn(params, frozen, batch, key):
        values = (cross_entropy(params) * batch["weights"]).sum()
        return values, (batch["weights"].sum(), {})

    batch = {"targets": jnp.asarray(GOLDEN["labels"]), "weights": jnp.asarray(GOLDEN["mask"])}

    def mean(logits):
        total, (weight, _) = reweighted(loss_fn, TAGS, TAG_WEIGHT)(logits, None, batch, None)
        return total / weight

    agree(mean, "torch.tags")


# ---------------------------------------------------------------------------------------------------------------------
# What every divergence has in common

V = 7
logits_of_two = st.lists(st.floats(-8, 8, width=32), min_size=2 * V, max_size=2 * V).map(
    lambda values: np.asarray(values, np.float32).reshape(2, V)
)
kinds = st.sampled_from(KINDS)
temperatures = st.floats(0.5, 4.0, width=32)
far = jax.jit(divergence, static_argnums=2)
far_with_gradient = jax.jit(jax.value_and_grad(divergence), static_argnums=2)
stored_far = jax.jit(top_k_divergence, static_argnums=3)
stored_with_gradient = jax.jit(jax.value_and_grad(top_k_divergence), static_argnums=3)
store = jax.jit(top_k_logprobs, static_argnums=1)


@given(logits_of_two, kinds, temperatures)
def test_a_divergence_is_never_negative_and_zero_for_equals(logits, kind, temperature):
    student, teacher = logits
    assert float(far(student, teacher, kind, temperature)) >= -1e-6
    assert abs(float(far(student, student + 3.0, kind, temperature))) < 1e-6  # logits shifted alike are equal
    if np.abs(jax.nn.softmax(student / temperature) - jax.nn.softmax(teacher / temperature)).max() > 0.01:
        assert float(far(student, teacher, kind, temperature)) > 1e-5


@given(logits_of_two, kinds, temperatures)
def test_temperature_divides_both_logits(logits, kind, temperature):
    softened = far(logits[0] / temperature, logits[1] / temperature, kind)
    np.testing.assert_allclose(far(*logits, kind, temperature), softened, rtol=1e-5, atol=1e-6)


@given(logits_of_two)
def test_at_high_temperature_gradients_are_those_of_matching_logits(logits):
    """arXiv:1503.02531, equation 4."""
    centred = logits - logits.mean(-1, keepdims=True)
    gradient = 1e4 * far_with_gradient(*logits, "forward_kl", 1e2)[1]
    np.testing.assert_allclose(gradient, (centred[0] - centred[1]) / V, atol=0.15)


@given(logits_of_two, kinds, temperatures)
def test_all_tokens_stored_are_the_whole_teacher(logits, kind, temperature):
    student, teacher = logits
    ids, logprobs = store(teacher, V, temperature)
    assert logprobs.shape == (V,)
    whole = far_with_gradient(student, teacher, kind, temperature)
    stored = stored_with_gradient(student, ids, logprobs, kind, temperature)
    np.testing.assert_allclose(stored[0], whole[0], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(stored[1], whole[1], rtol=1e-4, atol=2e-6)


@given(logits_of_two, kinds, st.sampled_from([1, 3, 6]))
def test_fewer_tokens_see_less_and_never_more(logits, kind, k):
    student, teacher = logits
    fewer, more = (float(stored_far(student, *store(teacher, n), kind)) for n in (k, k + 1))
    assert -1e-6 <= fewer <= more + 2e-6
    assert more <= float(far(student, teacher, kind)) + 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind):
    sure, wrong = jnp.asarray([200.0, 0.0, -200.0]), jnp.asarray([-200.0, 0.0, 200.0])
    impossible = jnp.asarray([0.0, 1.0, -jnp.inf])
    pairs = [(sure, wrong), (wrong, sure)] + [(sure, impossible)] * (kind == "forward_kl")
    for student, teacher in pairs:
        far, gradient = jax.value_and_grad(divergence)(student, teacher, kind)
        assert np.isfinite(far)
        assert np.isfinite(gradient).all()
    far, gradient = jax.value_and_grad(top_k_divergence)(wrong, *top_k_logprobs(sure, 1), kind)
    assert np.isfinite(far)
    assert np.isfinite(gradient).all()


def test_rounding_to_half_precision_hardly_moves_a_stored_teacher():
    rng = np.random.default_rng(0)
    student, teacher = 3 * rng.standard_normal((2, 50, 40)).astype(np.float32)
    ids, logprobs = top_k_logprobs(jnp.asarray(teacher), 8)
    exact = top_k_divergence(student, ids, logprobs)
    np.testing.assert_allclose(top_k_divergence(student, ids, logprobs.astype(jnp.float16)), exact, rtol=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The loss of whole models


def models(student=TINY, teacher=TEACHER):
    return draw(student, STUDENT_KEY), draw(teacher, TEACHER_KEY)


def run(settings, batch, student=TINY, teacher=TEACHER, parts=1):
    params, frozen = models(student, teacher)
    loss_fn = distillation_loss(student, teacher, ComputeConfig(), settings)
    return accumulate(loss_fn, params, frozen, batch, STUDENT_KEY, parts)


def with_store(batch, k, temperature=1.0):
    logits = forward(models()[1], TEACHER, batch["tokens"], batch["positions"], batch["segment_ids"])
    ids, logprobs = top_k_logprobs(logits, k, temperature)
    return batch | {"teacher_ids": ids, "teacher_logprobs": logprobs}


def close(ours, theirs, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, theirs)


def test_the_loss_is_the_formula_over_trained_tokens():
    batch = uneven_batch(rows=3)
    logits = [
        forward(params, config, batch["tokens"], batch["positions"], batch["segment_ids"])
        for params, config in zip(models(), (TINY, TEACHER), strict=True)
    ]
    settings = DistillConfig(alpha=0.25, temperature=2.0, divergence="reverse_kl")
    _, weight, metrics = run(settings, batch)
    labels = -(logprobs_from_logits(logits[0], batch["targets"]) * batch["weights"]).sum()
    far = (divergence(*logits, "reverse_kl", 2.0) * batch["weights"]).sum()
    assert float(weight) == batch["weights"].sum()
    np.testing.assert_allclose(metrics["loss"][0], labels, rtol=1e-5)
    np.testing.assert_allclose(metrics["divergence"][0], far, rtol=1e-5)
    np.testing.assert_allclose(metrics["total_loss"][0], 0.25 * labels + 0.75 * 4.0 * far, rtol=1e-5)


@pytest.mark.parametrize("student", [TINY, MOE], ids=["dense", "moe"])
def test_labels_alone_are_the_language_model_loss(student):
    batch = uneven_batch(rows=3)
    ours = run(DistillConfig(alpha=1.0), batch, student=student)
    params = models(student)[0]
    theirs = accumulate(language_model_loss(student, ComputeConfig()), params, None, batch, STUDENT_KEY, 1)
    close(ours[0], theirs[0])
    assert theirs[2].keys() <= ours[2].keys()


def test_a_mixture_of_experts_teaches_a_dense_student_and_is_not_trained():
    params, frozen = models(TINY, MOE)
    loss_fn = distillation_loss(TINY, MOE, ComputeConfig(), DistillConfig(alpha=0.0))
    grads, _, metrics = accumulate(loss_fn, params, frozen, uneven_batch(rows=3), STUDENT_KEY, 1)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert float(metrics["divergence"][0]) > 0
    assert "router_loss" not in metrics  # the teacher's routing is none of the student's business


def test_a_teacher_of_the_same_parameters_teaches_nothing():
    params = models()[0]
    loss_fn = distillation_loss(TINY, TINY, ComputeConfig(), DistillConfig(alpha=0.0))
    grads, weight, _ = accumulate(loss_fn, params, params, uneven_batch(rows=3), STUDENT_KEY, 1)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-4 * float(weight)


@pytest.mark.parametrize("stored", [False, True], ids=["on the fly", "stored"])
def test_micro_batches_equal_one_batch_with_uneven_masks(stored):
    batch = uneven_batch(rows=4)
    batch = with_store(batch, 5) if stored else batch
    teacher = None if stored else TEACHER
    params, frozen = models()
    loss_fn = distillation_loss(TINY, teacher, ComputeConfig(), DistillConfig())
    whole, parts = (accumulate(loss_fn, params, None if stored else frozen, batch, STUDENT_KEY, n) for n in (1, 4))
    assert float(whole[1]) == float(parts[1])
    close(parts[0], whole[0])


def test_padding_changes_nothing():
    batch = uneven_batch(rows=2, length=12)
    wider = {name: np.pad(array, ((0, 1), (0, 9))) for name, array in batch.items()}
    ours, theirs = run(DistillConfig(), wider), run(DistillConfig(), batch)
    close(ours, theirs)


@pytest.mark.parametrize("stored", [False, True], ids=["on the fly", "stored"])
def test_chunks_of_tokens_equal_the_whole(monkeypatch, stored):
    batch = uneven_batch(rows=3, length=10)
    batch = with_store(batch, 5, temperature=2.0) if stored else batch
    params, frozen = models()
    loss_fn = distillation_loss(TINY, None if stored else TEACHER, ComputeConfig(), DistillConfig(temperature=2.0))
    total = lambda params: loss_fn(params, frozen, batch, None)[0]
    whole = jax.value_and_grad(total)(params)
    monkeypatch.setattr(losses, "LOGITS_BYTES", 7 * 2 * TINY.vocab_size * 4)
    close(jax.value_and_grad(total)(params), whole)


def test_a_store_of_the_whole_vocabulary_is_the_teacher():
    batch = uneven_batch(rows=3)
    params, _ = models()
    settings = DistillConfig(temperature=1.5, divergence="jensen_shannon", jsd_beta=0.3)
    whole = run(settings, batch)
    loss_fn = distillation_loss(TINY, None, ComputeConfig(), settings)
    stored = accumulate(loss_fn, params, None, with_store(batch, TINY.vocab_size, 1.5), STUDENT_KEY, 1)
    close(stored, whole)


def test_what_the_student_wrote_has_a_teacher_but_no_labels():
    batch = uneven_batch(rows=4)
    batch["sampled"] = np.zeros_like(batch["weights"])
    batch["sampled"][2:] = batch["weights"][2:]
    only = {name: array[:2] for name, array in batch.items() if name != "sampled"}
    plain = {name: array for name, array in batch.items() if name != "sampled"}
    mixed, labelled, whole = (run(DistillConfig(alpha=0.5), rows)[2] for rows in (batch, only, plain))
    close(mixed["loss"], labelled["loss"])
    close(mixed["divergence"], whole["divergence"])
    close(mixed["total_loss"][0], 0.5 * labelled["loss"][0] + 0.5 * whole["divergence"][0])


@pytest.mark.parametrize(
    "values", [{"alpha": -0.1}, {"alpha": 1.1}, {"temperature": 0.0}, {"temperature": float("inf")}, {"jsd_beta": 1.0}]
)
def test_settings_that_mean_nothing_are_refused(values):
    with pytest.raises(ConfigError, match=f"--{next(iter(values))} must"):
        DistillConfig(**values)
