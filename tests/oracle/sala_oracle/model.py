"""The model: forward only; gradients come from jax.grad.

Everything is float64. Three things are rounded on purpose:
  * The rotary angle is the float32 product float32(position) * float32(theta^(-2i/d)), as published; its cosine and sine are float64.
    An exact angle would be another model: at position 6000 the two differ by 2e-4.
  * The slopes of decay are a float32 table, as published; lambda = exp(-slope) of it is float64.
  * With Published arithmetic every tensor that the published code stores in bfloat16 is rounded to it; sums, exponentials and the
    recurrent state, which it has in float32, stay float64.

Shapes: T tokens of all documents one after the other, H query heads, K key/value heads, D channels of a head. `documents` is a list
of ranges (begin, end) of tokens; nothing crosses from one to the next and positions start at 0 in each.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from . import selection


class Exact:
    """Arithmetic without rounding."""

    @staticmethod
    def store(x):
        return x

    @staticmethod
    def table(x):
        return x


class Published:
    """Rounds what the published code stores: activations to bfloat16 (through the float32 in which they were summed), cosines and
    sines to float32. Values stay in float64 arrays."""

    @staticmethod
    def store(x):
        return x.astype(jnp.float32).astype(jnp.bfloat16).astype(jnp.float64)

    @staticmethod
    def table(x):
        return x.astype(np.float32).astype(np.float64)


# ---- pieces ----


def linear(x, weight, arithmetic):
    return arithmetic.store(x @ weight.T)


def rms_norm(x, weight, eps, arithmetic):
    """Over the last axis; the normalised value is stored before the weight multiplies it."""
    normalised = arithmetic.store(x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps))
    return arithmetic.store(normalised * weight)


def sigmoid(x):
    return 1.0 / (1.0 + jnp.exp(-x))


def inverse_frequencies(dim, theta):
    """theta^(-2i/dim), i < dim/2, rounded to float32."""
    return np.asarray([theta ** (-2.0 * i / dim) for i in range(dim // 2)], dtype=np.float32)


def rotate(x, positions, theta, arithmetic):
    """Rotary embedding of [T, heads, D]: channel i turns with channel i + D/2."""
    angle = positions.astype(np.float32)[:, None] * inverse_frequencies(x.shape[-1], theta)[None, :]
    assert angle.dtype == np.float32
    cos = arithmetic.table(np.cos(angle.astype(np.float64)))[:, None, :]
    sin = arithmetic.table(np.sin(angle.astype(np.float64)))[:, None, :]
    low, high = jnp.split(x, 2, axis=-1)
    return arithmetic.store(jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1))


def positions_of(documents):
    return np.concatenate([np.arange(end - begin) for begin, end in documents])


def per_document(function, documents, *tensors):
    """function of each document's rows, joined again."""
    return jnp.concatenate([function(*(x[begin:end] for x in tensors)) for begin, end in documents], axis=0)


# ---- softmax layers ----


QUERIES_AT_ONCE = 800  # bounds the memory of a long document's scores; does not change a bit


def attention(q, k, v, chosen=None, block_size=1):
    """Of one document: q [T, H, D], k and v [T, K, D]; a query sees the keys up to its own, and of them, if `chosen` [K, T, blocks] is
    given, those in its group's chosen blocks."""
    tokens, heads, dim = q.shape
    groups = k.shape[1]
    outputs = []
    for first in range(0, tokens, QUERIES_AT_ONCE):
        some = np.arange(first, min(tokens, first + QUERIES_AT_ONCE))
        keys = np.arange(some[-1] + 1)
        scores = q[some].reshape(len(some), groups, heads // groups, dim)
        scores = jnp.einsum("tghd,jgd->ghtj", scores, k[keys]) / math.sqrt(dim)
        visible = (keys[None, :] <= some[:, None])[None]
        if chosen is not None:
            visible = visible & chosen[:, some][:, :, keys // block_size]
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
        outputs.append(jnp.einsum("ghtj,jgd->tghd", weights, v[keys]).reshape(len(some), heads * dim))
    return jnp.concatenate(outputs, axis=0)


def queries_keys_values(n, weights, config, documents, arithmetic):
    """Of a softmax layer, as attention and block selection use them: [T, H, D], [T, K, D], [T, K, D]."""
    tokens = n.shape[0]
    q = linear(n, weights["q_proj"], arithmetic).reshape(tokens, config.heads, config.head_dim)
    k = linear(n, weights["k_proj"], arithmetic).reshape(tokens, config.kv_heads, config.head_dim)
    v = linear(n, weights["v_proj"], arithmetic).reshape(tokens, config.kv_heads, config.head_dim)
    if config.qk_norm:
        q = rms_norm(q, weights["q_norm"], config.eps, arithmetic)
        k = rms_norm(k, weights["k_norm"], config.eps, arithmetic)
    if config.rope:
        positions = positions_of(documents)
        q = rotate(q, positions, config.theta, arithmetic)
        k = rotate(k, positions, config.theta, arithmetic)
    return q, k, v


def softmax_mixer(n, weights, config, documents, sparse_attention, arithmetic):
    def one(q, k, v):
        if not sparse_attention or q.shape[0] < config.sparse.dense_len:
            return attention(q, k, v)
        return attention(q, k, v, selection.selected_blocks(q, k, config.sparse, arithmetic.store), config.sparse.block_size)

    o = arithmetic.store(per_document(one, documents, *queries_keys_values(n, weights, config, documents, arithmetic)))
    if config.gate:
        o = arithmetic.store(o * arithmetic.store(sigmoid(linear(n, weights["o_gate"], arithmetic))))
    return linear(o, weights["o_proj"], arithmetic)


# ---- linear layers ----


def decay_slopes(heads):
    """The rates of decay: 2^(-8h/H), h = 1..H, for a power of two H; otherwise those of the power of two below, then every second
    one of twice that many."""
    below = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * h / below) for h in range(1, below + 1)]
    more = [2.0 ** (-8.0 * h / (2 * below)) for h in range(1, 2 * below + 1)][0::2]
    return np.asarray(slopes + more[: heads - below])


def recurrence(q, k, v, decay):
    """One document, token by token: S[t] = decay S[t-1] + k[t] v[t]^T, o[t] = S[t]^T q[t] / sqrt(D). All [T, H, D], decay [H]."""
    _, heads, dim = q.shape

    def step(state, token):
        q_t, k_t, v_t = token
        state = decay[:, None, None] * state + k_t[:, :, None] * v_t[:, None, :]
        return state, jnp.einsum("hkv,hk->hv", state, q_t)

    _, o = jax.lax.scan(step, jnp.zeros((heads, dim, dim)), (q, k, v))
    return o / math.sqrt(dim)


def linear_mixer(n, weights, config, documents, arithmetic):
    tokens = n.shape[0]
    shape = (tokens, config.linear_heads, config.linear_head_dim)
    q = linear(n, weights["q_proj"], arithmetic).reshape(shape)
    k = linear(n, weights["k_proj"], arithmetic).reshape(shape)
    v = linear(n, weights["v_proj"], arithmetic).reshape(shape)
    if config.linear_qk_norm:
        q = rms_norm(q, weights["q_norm"], config.eps, arithmetic)
        k = rms_norm(k, weights["k_norm"], config.eps, arithmetic)
    if config.linear_rope:
        positions = positions_of(documents)
        q = rotate(q, positions, config.theta, arithmetic)
        k = rotate(k, positions, config.theta, arithmetic)
    decay = np.exp(-decay_slopes(config.linear_heads).astype(np.float32).astype(np.float64))
    o = per_document(lambda q, k, v: recurrence(q, k, v, decay), documents, q, k, v)
    o = arithmetic.store(o.reshape(tokens, -1))
    if config.linear_output_norm:
        o = rms_norm(o, weights["o_norm"], config.eps, arithmetic)
    if config.linear_gate:
        o = arithmetic.store(o * arithmetic.store(sigmoid(linear(n, weights["z_proj"], arithmetic))))
    return linear(o, weights["o_proj"], arithmetic)


# ---- the whole ----


def layer_weights(weights, layer, part):
    """{"q_proj": ...} of model.layers.LAYER.PART.*.weight."""
    prefix, suffix = f"model.layers.{layer}.{part}.", ".weight"
    return {name[len(prefix) : -len(suffix)]: w for name, w in weights.items() if name.startswith(prefix)}


def mixer(layer, n, weights, config, documents, sparse_attention, arithmetic):
    """Layer `layer`'s mixer of its normalised input, after o_proj, before the residual factor."""
    parts = layer_weights(weights, layer, "self_attn")
    if config.linear[layer]:
        return linear_mixer(n, parts, config, documents, arithmetic)
    return softmax_mixer(n, parts, config, documents, sparse_attention, arithmetic)


def mlp(n, weights, arithmetic):
    gate = linear(n, weights["gate_proj"], arithmetic)
    up = linear(n, weights["up_proj"], arithmetic)
    activated = arithmetic.store(gate * sigmoid(gate))
    return linear(arithmetic.store(activated * up), weights["down_proj"], arithmetic)


def forward(weights, config, tokens, documents, sparse_attention=False, arithmetic=Exact, mixers=None):
    """The hidden states after the final norm, [T, hidden]. `mixers`, if given, is a list that gets (input, output) of each layer's
    mixer."""
    r, store = config.residual_factor, arithmetic.store
    x = store(config.embedding_factor * weights["model.embed_tokens.weight"][tokens])
    for layer in range(config.layers):
        n = rms_norm(x, weights[f"model.layers.{layer}.input_layernorm.weight"], config.eps, arithmetic)
        a = mixer(layer, n, weights, config, documents, sparse_attention, arithmetic)
        if mixers is not None:
            mixers.append((n, a))
        x = store(x + store(r * a))
        n = rms_norm(x, weights[f"model.layers.{layer}.post_attention_layernorm.weight"], config.eps, arithmetic)
        x = store(x + store(r * mlp(n, layer_weights(weights, layer, "mlp"), arithmetic)))
    return rms_norm(x, weights["model.norm.weight"], config.eps, arithmetic)


def logits_of(weights, config, hidden, arithmetic=Exact):
    head = weights["model.embed_tokens.weight" if config.tied else "lm_head.weight"]
    return linear(arithmetic.store(hidden / config.logit_divisor), head, arithmetic)
