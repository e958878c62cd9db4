"""Live comparison of training with a plain PyTorch loop: one step's loss and gradient, and fifty steps."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from conformance import reference, subject

import minillm_jax

pytestmark = pytest.mark.conformance


def draw(architecture, seed, folder, groups=2):
    rng = np.random.default_rng(seed)
    shape = reference.random_shape(architecture, rng, groups, tied=seed % 2 == 0)
    model = reference.random_model(architecture, seed, reference.random_rope(rng), **shape)
    reference.save(model, folder)
    return model, minillm_jax.load(folder), rng


@pytest.mark.parametrize("seed, architecture", list(enumerate(reference.ARCHITECTURES)))
def test_loss_and_every_gradient_of_one_step(architecture, seed, tmp_path):
    theirs, ours, rng = draw(architecture, seed, tmp_path)
    batch = reference.step_batch(rng, ours.config.vocab_size, rows=4, width=24)
    expected_loss, expected = reference.loss_and_gradient(theirs, batch)
    noise = reference.gradient_noise(theirs, batch)
    loss, gradient = subject.loss_and_gradient(ours, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert gradient.keys() == expected.keys()
    for name, tensor in expected.items():
        # A random network may be so sensitive that rounding its weights once more moves its own gradient by more.
        assert subject.error(gradient[name], tensor) < max(1e-5, 2 * noise[name]), name


@pytest.mark.parametrize("architecture", ["qwen3", "mixtral"])
def test_fifty_steps_at_each_step(architecture, tmp_path):
    theirs, ours, rng = draw(architecture, 3, tmp_path)
    batches = reference.training_batches(rng, ours.config.vocab_size)
    losses, norms = reference.train(theirs, batches, reference.TRAINING)
    assert losses[-1] < losses[0]
    our_losses, our_norms = subject.train(ours, batches, reference.TRAINING)
    np.testing.assert_allclose(our_losses, losses, rtol=1e-4)
    np.testing.assert_allclose(our_norms, norms, rtol=1e-4)
