"""Several adapters in one batch give what each gives merged into the base; weights of 8 bits give nearly the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import DENSE, NEW, PROMPTS, SMALL, complete, drawn, model, next_logits, started, together

from minillm_jax.config import LoraConfig
from minillm_jax.lora import Adapter, init_adapter, lay_beside, merge
from minillm_jax.model import forward
from minillm_jax.quantize import dequantize, quantize
from serve.protocol import Request

MOE = dataclasses.replace(DENSE, use_moe=True, num_experts=3)
UNTIED = dataclasses.replace(DENSE, tie_word_embeddings=False)
SOME = {
    "wide": LoraConfig(lora_rank=5, lora_alpha=8.0),
    "narrow": LoraConfig(lora_rank=2, lora_alpha=3.0, lora_targets=("q_proj", "down_proj"), use_rslora=True),
}
ROUTED = {"routed": LoraConfig(lora_rank=3, lora_targets=("router", "experts.up_proj", "shared.gate_proj"))}


def adapters_of(lm, configs):
    """Adapters whose products are not zero."""

    def draw(i, config):
        fresh = jax.jit(init_adapter, static_argnums=1)(lm.params, config, jax.random.key(i))
        return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size + i), x.shape), fresh)

    return {name: Adapter(draw(i, config), config) for i, (name, config) in enumerate(configs.items())}


@pytest.mark.parametrize(
    ("config", "configs"),
    [(DENSE, SOME), pytest.param(MOE, SOME | ROUTED, marks=pytest.mark.slow)],
    ids=["dense", "moe"],
)
def test_adapters_in_one_batch_equal_merged_models(config, configs):
    lm = model(config)
    adapters = adapters_of(lm, configs)
    engine = started(lm, adapters=adapters)
    assert engine.adapters == tuple(configs)
    requests, expected = [], []
    for prompt in (PROMPTS[1], PROMPTS[3]):
        for name in (None, *configs):
            params = lm.params if name is None else merge(lm.params, adapters[name].params, adapters[name].config)
            merged = dataclasses.replace(lm, params=params)
            requests.append(Request(prompt, NEW, temperature=0.0, adapter=name, logprobs=0))
            read, got, _ = complete(engine, requests[-1])
            logits = next_logits(merged, [*prompt, *got.token_ids])[len(prompt) - 1 : -1]
            assert list(got.token_ids) == logits.argmax(-1).tolist()
            best = np.asarray(jax.nn.log_softmax(logits)).max(-1)
            np.testing.assert_allclose([entry.logprob for entry in got.logprobs], best, atol=1e-4)
            assert read.cached_tokens == 0 or name is None  # what another adapter read is of no use
            expected.append(list(got.token_ids))
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert together(engine, requests) == expected
    assert engine.drain(5)
    assert engine.stats().compilations == 0


def test_an_adapter_of_another_model_is_refused():
    lm = model()
    (adapter,) = adapters_of(model(MOE), ROUTED).values()
    with pytest.raises(ValueError, match=r"an adapter is for mlp\..*, which this model does not have"):
        lay_beside(lm.params, [adapter])


@pytest.mark.parametrize("config", [DENSE, MOE, UNTIED], ids=["dense", "moe", "untied"])
def test_8_bit_weights_are_computed_as_if_they_were_rounded(config):
    lm = model(config)
    small = quantize(lm.params)
    tokens = jnp.asarray([PROMPTS[4]])
    rounded = forward(dequantize(small), config, tokens)
    np.testing.assert_allclose(forward(small, config, tokens), rounded, atol=2e-5)
    plain = forward(lm.params, config, tokens)
    off = float(jnp.linalg.norm(rounded - plain) / jnp.linalg.norm(plain))
    assert 1e-4 < off < 0.05


def test_8_bit_weights_are_off_by_at_most_half_a_step():
    lm = model(MOE)
    small = quantize(lm.params)
    exact, rounded = (jax.tree_util.tree_leaves_with_path(t) for t in (lm.params, dequantize(small)))
    for (path, a), (_, b) in zip(exact, rounded, strict=True):
        step = jnp.abs(a).max(-2, keepdims=True) / 127 if a.ndim > 1 else jnp.zeros(())
        assert float((jnp.abs(a - b) - 0.5001 * step).max()) <= 0, path
    routed = small["layers"]["mlp"]["router"]["kernel"]
    assert routed.dtype == jnp.float32 and small["layers"]["mlp"]["experts"]["up_proj"].dtype == jnp.int8
    np.testing.assert_array_equal(small["embed_tokens"]["embedding"], lm.params["embed_tokens"]["embedding"])


def test_the_engine_serves_8_bit_weights():
    lm = model(UNTIED)
    rounded = dataclasses.replace(lm, params=dequantize(quantize(lm.params)))
    engine = started(lm, dataclasses.replace(SMALL, weights="int8"))
    tokens = drawn(engine, Request(PROMPTS[3], NEW, temperature=0.0))
    logits = next_logits(rounded, [*PROMPTS[3], *tokens])[len(PROMPTS[3]) - 1 : -1]
    assert tokens == logits.argmax(-1).tolist()
    assert engine.drain(5)
