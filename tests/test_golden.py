"""Numbers of other people's code: what `transformers` and PyTorch computed for the folders in `golden/`.

`golden/make_golden.py` made the folders. An error here is the largest absolute difference over the largest absolute
value of the reference, both float32.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conformance import subject
from safetensors.numpy import load_file

import minillm_jax
from minillm_jax.moe import route

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")
ROPE = ("rope_linear", "rope_llama3", "rope_yarn")
LAYOUTS = ("plain", "right", "left", "packed")


class Case:
    """A loaded folder and its expected numbers."""

    def __init__(self, folder, expected):
        self.lm, self.expected = minillm_jax.load(folder), load_file(expected)

    def __getitem__(self, prefix):
        """All arrays whose names start with the prefix, without it."""
        return {
            name.removeprefix(prefix + "."): array
            for name, array in self.expected.items()
            if name.startswith(prefix + ".")
        }


def folder_of(name, tmp_path_factory):
    """The folder of a case; that of a legacy case is a copy with the older `config.json`."""
    if not name.endswith("_legacy"):
        return GOLDEN / name
    folder = tmp_path_factory.mktemp(name) / "model"
    shutil.copytree(GOLDEN / name.removesuffix("_legacy"), folder)
    return (folder / "legacy_config.json").replace(folder / "config.json").parent


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    folder = folder_of(request.param, tmp_path_factory)
    return Case(folder, folder / "expected.safetensors")


def of_cases(*names):
    return pytest.mark.parametrize("case", names, indirect=True)


@of_cases(*ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_every_architecture_and_layout(case, layout):
    batch = case[layout]
    assert subject.logits_error(case.lm, batch, batch["logits"]) < 2e-5


@of_cases(*ROPE, *(name + "_legacy" for name in ROPE))
def test_logits_far_beyond_the_original_context_in_both_spellings(case):
    batch = case["plain"]
    assert batch["positions"].max() > 3 * 16  # yarn's and llama3's original context, linear's context before scaling
    assert subject.logits_error(case.lm, batch, batch["logits"]) < 2e-5


@of_cases("qwen3", "qwen3_moe")
def test_cached_decoding(case):
    batch = case["cached"]
    real = batch["segment_ids"] > 0
    assert subject.error(subject.cached_logits(case.lm, batch)[real], batch["logits"][real]) < 2e-5


@of_cases(*ARCHITECTURES, "rope_yarn")
def test_greedy_generation_token_for_token(case):
    greedy = case["greedy"]
    assert len(greedy["tokens"]) == 64
    assert subject.greedy(case.lm, greedy["prompt"], 64) == greedy["tokens"].tolist()


@of_cases("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
def test_loss_and_every_gradient_of_a_training_step(case):
    batch = case["step"]
    loss, gradient = subject.loss_and_gradient(case.lm, batch)
    np.testing.assert_allclose(loss, batch["loss"], rtol=1e-6)
    assert gradient.keys() == case["gradient"].keys()
    for name, expected in case["gradient"].items():
        assert subject.error(gradient[name], expected) < 1e-5, name


@of_cases("qwen3_moe")
def test_router_probabilities_choices_weights_and_auxiliary_loss(case):
    router, config = case["router"], case.lm.config
    for layer in range(config.num_hidden_layers):
        routing = jax.jit(route, static_argnums=1)(router["logits"][layer], config)
        np.testing.assert_allclose(routing.scores, router["probabilities"][layer], rtol=2e-6, atol=1e-9)
        np.testing.assert_array_equal(routing.experts, router["experts"][layer])
        np.testing.assert_allclose(routing.weights, router["weights"][layer], rtol=2e-6)
    assert subject.auxiliary_loss(case.lm, case["step"]) == pytest.approx(float(router["auxiliary_loss"]), rel=1e-6)


@of_cases("training")
def test_fifty_steps_of_training_at_each_step(case):
    curve = case["curve"]
    losses, norms = curve.pop("loss"), curve.pop("grad_norm")
    batches = [{name: array[step] for name, array in curve.items()} for step in range(50)]
    settings = json.loads((GOLDEN / "training" / "training.json").read_text("utf-8"))
    ours = subject.train(case.lm, batches, settings)
    assert losses[-1] < 0.7 * losses[0]  # something was learnt, and some gradients were clipped
    assert (norms > settings["grad_clip"]).any() and (norms < settings["grad_clip"]).any()
    np.testing.assert_allclose(ours[0], losses, rtol=1e-4)
    np.testing.assert_allclose(ours[1], norms, rtol=1e-4)
