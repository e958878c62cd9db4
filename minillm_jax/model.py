"""The transformer: a pre-norm decoder in the Llama family, dense or with experts, as a pure function.

Tokens, positions and segments go in; hidden states, the cache and what routing has to say come out. Layers are
scanned, so compile time does not grow with depth, and every parameter names its axes for `sharding.RULES`. Flax stays
inside this file: the functions at its end are what the rest of the house calls.

Axes: B batch, T query time, S key time, N heads, K key-value heads, H head size, D model, F hidden, V vocabulary, E
    experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from minillm_jax.attention import CHECKPOINT_NAME, attention
from minillm_jax.cache import KVCache, write_layer, write_slots
from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.expert_parallel import Capacity, Weights, expert_layer
from minillm_jax.matmul import LowRank, matmul, product
from minillm_jax.moe import auxiliary_loss, expert_capacities, limit_to_capacity, model_balancing_loss, route
from minillm_jax.rope import rope_tables, rotate
from minillm_jax.sharding import constrain
from minillm_jax.slots import LayerSlots

Params = dict[str, Any]

QKV, GATE_UP = "qkv_proj", "gate_up_proj"
"""Names of matrices that `decoding.join_matrices` has put beside each other."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelOutput:
    """What one forward pass returns.

    Attributes:
        hidden: `[B, T, D]` final hidden states, normalised; `unembed` turns them into logits.
        cache: the cache with this call's tokens written, or None.
        router_loss: `[B, T]` float32 auxiliary loss per token, summed over layers, coefficients included; None if
            dense.
        expert_load: `[L, E]` share of assignments per expert; None if dense.
        dropped_share: `[L]` share of assignments that exceeded their expert's capacity; None if there is no limit.
    """

    hidden: jax.Array
    cache: KVCache | None
    router_loss: jax.Array | None
    expert_load: jax.Array | None
    dropped_share: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Named(nn.meta.AxisMetadata[jax.Array]):
    """A new parameter in a box that bears its axis names. Names only: `sharding.py` decides what becomes of them."""

    value: Any
    names: tuple[str | None, ...] = field(metadata={"static": True})

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> _Named:
        return _Named(val, self.names)

    def add_axis(self, index: int, params: dict[Any, Any]) -> _Named:
        names = list(self.names)
        names.insert(index, params[nn.PARTITION_NAME])
        return _Named(self.value, tuple(names))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> _Named:
        return _Named(self.value, self.names[:index] + self.names[index + 1 :])


def _named(init: nn.initializers.Initializer, axes: tuple[str | None, ...]) -> Callable[..., _Named]:
    """Make an initializer whose result bears axis names."""
    return lambda *args: _Named(init(*args), axes)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in float32 (arXiv:1910.07467)."""

    eps: float
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis."""
        init = _named(nn.initializers.ones_init(), (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


def _adapter(module: nn.Module, name: str) -> LowRank | None:
    """Read the adapter that `lora.combine` put beside a weight; it drops inputs where there is a rate and a key."""
    if not module.has_variable("params", f"{name}_lora_a"):
        return None
    a, b, rate = (module.get_variable("params", f"{name}_lora_{part}") for part in ("a", "b", "dropout"))
    return LowRank(a, b, rate, None if rate is None or not module.has_rng("dropout") else module.make_rng("dropout"))


class Linear(nn.Module):
    """A matrix `[in, out]` with named axes, and a bias if asked."""

    features: int
    axes: tuple[str, str]
    stddev: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiply the last axis."""
        init = _named(nn.initializers.normal(self.stddev), self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        if self.has_variable("params", "kernel_scale"):  # see quantize.py
            y = product(x, kernel) * self.get_variable("params", "kernel_scale").astype(x.dtype)
        else:
            y = matmul(x, kernel.astype(x.dtype))
        if (adapter := _adapter(self, "kernel")) is not None:
            y = y + adapter(x)
        if self.use_bias:
            zeros = _named(nn.initializers.zeros_init(), (self.axes[1],))
            y = y + self.param("bias", zeros, (self.features,), jnp.float32).astype(x.dtype)
        return y


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: jax.Array, kv: Any, shared: Shared, layer: jax.Array) -> Any:
        """Return `[B, T, D]` and the updated cache: buffers of all layers, `LayerSlots` of this one, or None."""
        c = self.config
        batch, length, _ = x.shape
        std, size = c.initializer_range, c.head_size
        project = functools.partial(Linear, stddev=std, use_bias=c.attention_bias)
        wide, narrow = c.num_attention_heads * size, c.num_key_value_heads * size
        if self.has_variable("params", QKV):
            joined = project(wide + 2 * narrow, ("embed", "heads"), name=QKV)(x)
            q, k, v = jnp.split(joined, (wide, wide + narrow), axis=-1)
        else:
            q = project(wide, ("embed", "heads"), name="q_proj")(x)
            k = project(narrow, ("embed", "kv_heads"), name="k_proj")(x)
            v = project(narrow, ("embed", "kv_heads"), name="v_proj")(x)
        q = q.reshape(batch, length, c.num_attention_heads, size)
        k = k.reshape(batch, length, c.num_key_value_heads, size)
        v = v.reshape(batch, length, c.num_key_value_heads, size)
        if c.use_qk_norm:
            q = RMSNorm(c.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        q, k = rotate(q, shared.cos, shared.sin), rotate(k, shared.cos, shared.sin)
        q = constrain(q, "batch", None, "heads", None)
        k, v = (constrain(x.swapaxes(1, 2), "batch", "kv_heads", None, None) for x in (k, v))  # [B, K, T, H]
        if isinstance(kv, LayerSlots):  # a server's, whose rows differ in length
            y, kv = kv.attend(q, k, v)
        else:
            y, kv = self._attend(q, k, v, kv, shared, layer)
        out_std = std / math.sqrt(2 * c.num_hidden_layers)
        y = Linear(c.hidden_size, ("heads", "embed"), out_std, name="o_proj")(y.reshape(*y.shape[:2], -1))
        return y, kv

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        kv: tuple[jax.Array, jax.Array] | None,
        shared: Shared,
        layer: Any,
    ) -> Any:
        if kv is not None:
            k_buffer, k = write_layer(kv[0], k, layer, shared.start)
            v_buffer, v = write_layer(kv[1], v, layer, shared.start)
            kv = (k_buffer, v_buffer)
        y = attention(
            q,
            k,
            v,
            q_positions=shared.positions,
            kv_positions=shared.kv_positions,
            q_segment_ids=shared.segment_ids,
            kv_segment_ids=shared.kv_segment_ids,
            causal_layout=kv is None,
            branched=shared.branched,
            impl=self.compute.attention_impl,
        )
        return y, kv


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    width: int
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[..., D]` to `[..., D]`."""
        c = self.config
        project = functools.partial(Linear, axes=("embed", "mlp"), stddev=c.initializer_range)
        if self.has_variable("params", GATE_UP):
            gate, up = jnp.split(project(2 * self.width, name=GATE_UP)(x), 2, axis=-1)
        else:
            gate, up = project(self.width, name="gate_proj")(x), project(self.width, name="up_proj")(x)
        out_std = c.initializer_range / math.sqrt(2 * c.num_hidden_layers)
        hidden = constrain(jax.nn.silu(gate) * up, "batch", *[None] * (x.ndim - 2), "mlp")
        return Linear(c.hidden_size, ("mlp", "embed"), out_std, name="down_proj")(hidden)


class Experts(nn.Module):
    """The stacked weights of the routed experts."""

    config: ModelConfig

    @nn.compact
    def __call__(self, dtype: Any) -> tuple[Weights, tuple[LowRank | None, ...]]:
        """Return gate and up `[E, D, F]` and down `[E, F, D]`, and their adapters."""
        c = self.config
        out_std = c.initializer_range / math.sqrt(2 * c.num_hidden_layers)

        def weight(name: str, axes: tuple[str, ...], shape: tuple[int, ...], stddev: float) -> jax.Array:
            init = _named(nn.initializers.normal(stddev), axes)
            stored = self.param(name, init, shape, jnp.float32).astype(dtype)
            scale = self.get_variable("params", f"{name}_scale")  # see quantize.py
            return stored if scale is None else stored * scale.astype(dtype)[:, None]

        into, back = (c.num_experts, c.hidden_size, c.expert_size), (c.num_experts, c.expert_size, c.hidden_size)
        weights = (
            weight("gate_proj", ("experts", "embed", "mlp"), into, c.initializer_range),
            weight("up_proj", ("experts", "embed", "mlp"), into, c.initializer_range),
            weight("down_proj", ("experts", "mlp", "embed"), back, out_std),
        )
        return weights, tuple(_adapter(self, name) for name in ("gate_proj", "up_proj", "down_proj"))


class MoE(nn.Module):
    """Routed experts, and shared ones beside them."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array | None, ...]:
        """Return `[B, T, D]`, the auxiliary loss `[B, T]`, load and mean scores `[E]`, and the share dropped."""
        c = self.config
        flat = x.reshape(-1, x.shape[-1])
        logits = Linear(c.num_experts, ("embed", "norm"), c.initializer_range, name="router")(flat.astype(jnp.float32))
        routing, dropped = limit_to_capacity(route(logits, c), segment_ids, c)
        weights, adapters = Experts(c, name="experts")(x.dtype)
        capacities = expert_capacities(x.shape[1], c)
        capacity = None if capacities is None else Capacity(int(capacities[-1]), x.shape[1])
        y = expert_layer(flat, weights, routing, adapters, capacity).reshape(x.shape)
        if c.n_shared_experts:
            y = y + MLP(c.n_shared_experts * c.expert_size, c, name="shared")(x)
        return y, *auxiliary_loss(routing, segment_ids, c), dropped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shared:
    """What all layers read alike: rotary tables and masks of this call."""

    cos: jax.Array  # [B, T, 1, H/2]
    sin: jax.Array
    positions: jax.Array  # [B, T]
    segment_ids: jax.Array  # [B, T]
    kv_positions: jax.Array  # [B, S]
    kv_segment_ids: jax.Array  # [B, S]
    start: jax.Array  # scalar, first cache slot that is written
    branched: bool = field(metadata={"static": True})  # segments may have branches


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    config: ModelConfig
    compute: ComputeConfig
    deterministic: bool

    @nn.compact
    def __call__(self, carry: Any, layer: jax.Array, shared: Shared) -> Any:
        """Scan body: carry is the residual stream and the cache buffers."""
        c = self.config
        x, kv = carry
        dropout = nn.Dropout(c.dropout, deterministic=self.deterministic)
        with jax.named_scope("attention"):
            y = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
            y, kv = SelfAttention(c, self.compute, name="self_attn")(y, kv, shared, layer)
            segment_ids = shared.segment_ids
            if isinstance(kv, LayerSlots):
                x, segment_ids = kv.pick(x), kv.pick(segment_ids)
            x = constrain(x + dropout(y), "batch", None, None)
        routed = None
        with jax.named_scope("mlp"):
            y = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x)
            if c.use_moe:
                y, *routed = MoE(c, name="mlp")(y, segment_ids)
            else:
                y = MLP(c.mlp_size, c, name="mlp")(y)
            x = constrain(x + dropout(y), "batch", None, None)
        return (x, kv), routed


def _keep_product(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Keep products for the backward pass, but not an adapter's second: it is as large as x W, and quick to redo."""
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **params):
        return False
    (contracted, _), _ = params["dimension_numbers"]
    return 4 * math.prod(operands[0].shape[axis] for axis in contracted) > operands[1].shape[-1]


_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _keep_product,
        jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nn.Module):
    """Embedding, scanned layers, final norm."""

    config: ModelConfig
    compute: ComputeConfig = ComputeConfig()
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: KVCache | None,
        branched: bool = False,
    ) -> ModelOutput:
        """See `forward_hidden`."""
        c = self.config
        dtype = compute_dtype(self.compute)
        init = _named(nn.initializers.normal(c.initializer_range), ("vocab", "embed"))
        table = _Table(init, (c.vocab_size, c.hidden_size), "embedding", name="embed_tokens")()
        x = constrain(table.astype(dtype)[tokens], "batch", None, None)  # [B, T, D]
        cos, sin = rope_tables(positions, c)
        start = jnp.zeros((), jnp.int32) if cache is None else cache.index
        if cache is not None:
            cache = write_slots(cache, positions, segment_ids)
        shared = Shared(
            cos, sin, positions, segment_ids,
            positions if cache is None else cache.positions,
            segment_ids if cache is None else cache.segment_ids,
            start,
            branched,
        )  # fmt: skip
        block = Block
        remat = self.compute.remat
        if remat == "auto":  # on CPU, reading a saved activation costs more than computing it again
            remat = "dots" if jax.default_backend() == "cpu" else "none"
        if remat != "none":
            block = nn.remat(Block, policy=_REMAT_POLICIES[remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=c.num_hidden_layers,
            unroll=self.compute.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.compute, self.deterministic, name="layers")
        kv = None if cache is None else (cache.k, cache.v)
        (x, kv), routed = layers((x, kv), jnp.arange(c.num_hidden_layers), shared)
        if cache is not None:
            cache = KVCache(kv[0], kv[1], cache.positions, cache.segment_ids, cache.index)
        x = RMSNorm(c.rms_norm_eps, name="norm")(x)
        if not c.tie_word_embeddings and self.is_initializing():
            head = _named(nn.initializers.normal(c.initializer_range), ("embed", "vocab"))
            _Table(head, (c.hidden_size, c.vocab_size), "kernel", name="lm_head")()
        if routed is None:
            return ModelOutput(x, cache, None, None)
        losses, load, mean_scores, dropped = routed
        router_loss = losses.sum(0)
        if c.router_aux_loss_scope == "model":
            router_loss += model_balancing_loss(load, mean_scores, segment_ids, c)
        return ModelOutput(x, cache, router_loss, load, dropped)


class _Table(nn.Module):
    """A bare parameter under a module name of its own."""

    initializer: Any
    shape: tuple[int, ...]
    param_name: str

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param(self.param_name, self.initializer, self.shape, jnp.float32)


def compute_dtype(compute: ComputeConfig) -> Any:
    """Dtype of activations: float32 on CPU and bfloat16 elsewhere, unless chosen."""
    if compute.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(compute.dtype)


def _init_boxed(config: ModelConfig, key: jax.Array) -> Any:
    ids = jnp.zeros((1, 2), jnp.int32)
    compute = ComputeConfig(dtype="float32", attention_impl="xla")
    return Transformer(config, compute).init(key, ids, ids, ids + 1, None)["params"]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Draw float32 parameters: normal, with smaller deviation where they write to the residual stream (GPT-2)."""
    return nn.meta.unbox(_init_boxed(config, key))


def param_axes(config: ModelConfig) -> Params:
    """Tree like the parameters, with each leaf's tuple of logical axis names."""
    boxed = jax.eval_shape(functools.partial(_init_boxed, config), jax.random.key(0))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda leaf: isinstance(leaf, _Named))


def forward_hidden(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    dropout_key: jax.Array | None = None,
    branched: bool = True,
    compute: ComputeConfig = ComputeConfig(),
) -> ModelOutput:
    """Run the transformer up to its final norm.

    Args:
        params: parameter tree of `init_params`, with or without an adapter's factors beside the weights.
        config: the model's shape.
        tokens: `[B, T]` ints.
        positions: `[B, T]` position of each token within its segment; None counts from 0 (or from the cache's index).
        segment_ids: `[B, T]`; tokens see their own segment only, 0 is padding; None makes each row one segment.
            Continuations of one beginning are branches of its segment, see `attention`.
        cache: past keys and values; the call's tokens are written behind them.
        dropout_key: turns dropout on, the adapter's included, and the limit of `expert_capacity_factor`.
        branched: segments may have such branches. False, where none has, admits faster attention; with branches after
            all, the result is NaN.
        compute: dtype, attention implementation, rematerialisation.

    Raises:
        ValueError: more tokens than `max_position_embeddings`.
    """
    tokens = jnp.asarray(tokens)
    batch, length = tokens.shape
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{length} tokens do not fit max_position_embeddings {config.max_position_embeddings}; "
            "shorten the input, or extend the context with rope_scaling"
        )
    if positions is None:
        start = 0 if cache is None else cache.index
        positions = jnp.broadcast_to(start + jnp.arange(length), (batch, length))
    if segment_ids is None:
        segment_ids, branched = jnp.ones((batch, length), jnp.int32), False
    if dropout_key is None:
        config = replace(config, expert_capacity_factor=None)
    model = Transformer(config, compute, deterministic=dropout_key is None or config.dropout == 0.0)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return model.apply({"params": params}, tokens, positions, segment_ids, cache, branched, rngs=rngs)


def unembed(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Turn hidden states `[..., D]` into float32 logits `[..., V]`."""
    tied = config.tie_word_embeddings
    if "score" in params or not (tied or "lm_head" in params):
        raise ValueError("these are a reward model's parameters, which have no output head; see reward.reward_scores")
    head = params["embed_tokens"]["embedding"].T if tied else params["lm_head"]["kernel"]
    if not tied and "kernel_scale" in params["lm_head"]:
        logits = product(hidden, head).astype(jnp.float32) * params["lm_head"]["kernel_scale"]
    else:
        logits = matmul(hidden, head.astype(hidden.dtype)).astype(jnp.float32)
    return constrain(logits, "batch", *[None] * (logits.ndim - 2), "vocab")


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def forward(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    compute: ComputeConfig = ComputeConfig(),
) -> jax.Array:
    """Logits `[B, T, V]` float32 of `[B, T]` tokens; arguments as in `forward_hidden`."""
    output = forward_hidden(params, config, tokens, positions=positions, segment_ids=segment_ids, compute=compute)
    return unembed(params, config, output.hidden)
