"""The model written plainly in PyTorch, float32, one document: what someone would write who has no trainer for it.

Softmax layers call scaled_dot_product_attention, with a mask of T x T where a document is long enough for block selection; linear
layers take chunks: products inside a chunk, a state from one chunk to the next. Autograd does the backward pass. Formulas as in
sala_oracle, which is the same model in float64.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 128  # tokens of a chunk of the linear layers
QUERIES_AT_ONCE = 1024  # of block selection; bounds the memory of its scores


def rotate(x, cos, sin):
    """Rotary embedding of [T, heads, D]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def rotary_tables(tokens, dim, theta):
    frequencies = torch.tensor([theta ** (-2.0 * i / dim) for i in range(dim // 2)], dtype=torch.float32)
    angle = (torch.arange(tokens, dtype=torch.float32)[:, None] * frequencies)[:, None, :]
    return angle.cos(), angle.sin()


def chunked_recurrence(q, k, v, slopes):
    """S[t] = decay S[t-1] + k[t] v[t]^T, o[t] = S[t]^T q[t] / sqrt(D); q, k, v [T, H, D]."""
    tokens, heads, dim = q.shape
    chunks = -(-tokens // CHUNK)
    if tokens % CHUNK != 0:  # zeros behind the end change nothing before it
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, chunks * CHUNK - tokens)) for x in (q, k, v))
    q, k, v = (x.view(chunks, CHUNK, heads, dim).permute(0, 2, 1, 3) for x in (q, k, v))
    i = torch.arange(CHUNK, dtype=torch.float32)
    distance = i[:, None] - i[None, :]
    inside = torch.where(distance >= 0, torch.exp(-slopes[:, None, None] * distance.clamp(min=0)), 0.0)
    from_start = torch.exp(-slopes[:, None] * (i + 1))[..., None]
    to_end = torch.exp(-slopes[:, None] * (CHUNK - 1 - i))[..., None]
    whole = torch.exp(-slopes * CHUNK)[:, None, None]
    o = ((q @ k.transpose(-1, -2)) * inside) @ v
    added = (k * to_end).transpose(-1, -2) @ v
    state = torch.zeros(heads, dim, dim)
    states = []
    for c in range(chunks):
        states.append(state)
        state = whole * state + added[c]
    o = o + (q * from_start) @ torch.stack(states)
    return o.permute(0, 2, 1, 3).reshape(chunks * CHUNK, heads, dim)[:tokens] / math.sqrt(dim)


def pooled(k, size, stride):
    """Means of the full windows of the keys [T, K, D]: [windows, K, D]."""
    return k.unfold(0, size, stride).mean(dim=-1)


@torch.no_grad()
def selection_mask(q, k, sparse):
    """[K, T, T]: the keys that each query of a group sees."""
    tokens, heads, dim = q.shape
    groups = k.shape[1]
    fine_size, fine_stride, block = sparse.kernel_size, sparse.kernel_stride, sparse.block_size
    coarse_size, coarse_stride = 4 * fine_size, 4 * fine_stride
    fine = pooled(k, fine_size, fine_stride).permute(1, 2, 0)  # [K, D, windows]
    coarse = pooled(k, coarse_size, coarse_stride).permute(1, 2, 0)
    windows, blocks = fine.shape[-1], -(-tokens // block)
    per_block = block // fine_stride
    b = torch.arange(blocks)
    mask = torch.empty(groups, tokens, tokens, dtype=torch.bool)
    for first in range(0, tokens, QUERIES_AT_ONCE):
        t = torch.arange(first, min(tokens, first + QUERIES_AT_ONCE))
        some = q[t].view(len(t), groups, heads // groups, dim).permute(1, 2, 0, 3) / math.sqrt(dim)  # [K, G, t, D]
        fine_seen = fine_stride * torch.arange(windows) + fine_size - 1 <= t[:, None]
        coarse_seen = coarse_stride * torch.arange(coarse.shape[-1]) + coarse_size - 1 <= t[:, None]
        normaliser = torch.logsumexp((some @ coarse[:, None]).masked_fill(~coarse_seen, -math.inf), dim=-1, keepdim=True)
        p = torch.exp((some @ fine[:, None] - normaliser).clamp(max=80))
        p = torch.where(fine_seen & coarse_seen.any(dim=-1, keepdim=True), p, 0.0).sum(dim=1)
        # The best of the windows that overlap a block: those that begin in it, and the one before.
        p = F.pad(p, (1, per_block * blocks - windows), value=-math.inf)
        scores = F.max_pool1d(p, per_block + 1, per_block)
        own = (t // block)[:, None]
        possible = b <= own
        forced = ((b < sparse.init_blocks) | (b >= own - sparse.window_blocks)) & possible
        scores = torch.where(possible, torch.where(forced, math.inf, scores), -math.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : sparse.total_blocks]
        chosen = torch.zeros(groups, len(t), blocks, dtype=torch.bool).scatter_(-1, best, True) & possible
        mask[:, t] = chosen.repeat_interleave(block, dim=-1)[..., :tokens]
    return mask.tril_()


class Mixer(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        self.config, self.linear = config, linear
        self.heads = config.linear_heads if linear else config.heads
        self.kv_heads = self.heads if linear else config.kv_heads
        self.dim = config.linear_head_dim if linear else config.head_dim
        width, kv_width, hidden = self.heads * self.dim, self.kv_heads * self.dim, config.hidden
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        self.qk_norm = config.linear_qk_norm if linear else config.qk_norm
        self.rope = config.linear_rope if linear else config.rope
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(self.dim, config.eps)
            self.k_norm = nn.RMSNorm(self.dim, config.eps)
        if linear and config.linear_output_norm:
            self.o_norm = nn.RMSNorm(width, config.eps)
        self.gate = config.linear_gate if linear else config.gate
        if self.gate:
            setattr(self, "z_proj" if linear else "o_gate", nn.Linear(hidden, width, bias=False))

    def attend(self, q, k, v, slopes):
        if self.linear:
            return chunked_recurrence(q, k, v, slopes)
        # Groups as a batch: a mask is per group, keys and values are those of all its heads.
        groups, shared = self.kv_heads, self.heads // self.kv_heads
        mask = None
        if self.config.sparse is not None and len(q) >= self.config.sparse.dense_len:
            mask = selection_mask(q, k, self.config.sparse)[:, None]
        q = q.view(len(q), groups, shared, self.dim).permute(1, 2, 0, 3)
        k, v = (x.transpose(0, 1)[:, None].expand(-1, shared, -1, -1) for x in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return o.permute(2, 0, 1, 3).reshape(-1, self.heads, self.dim)

    def forward(self, n, tables, slopes):
        tokens = n.shape[0]
        q = self.q_proj(n).view(tokens, self.heads, self.dim)
        k = self.k_proj(n).view(tokens, self.kv_heads, self.dim)
        v = self.v_proj(n).view(tokens, self.kv_heads, self.dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q, *tables), rotate(k, *tables)
        o = self.attend(q, k, v, slopes).reshape(tokens, -1)
        if self.linear and self.config.linear_output_norm:
            o = self.o_norm(o)
        if self.gate:
            o = o * torch.sigmoid((self.z_proj if self.linear else self.o_gate)(n))
        return self.o_proj(o)


class Mlp(nn.Module):
    def __init__(self, config, intermediate):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, config.hidden, bias=False)

    def forward(self, n):
        return self.down_proj(F.silu(self.gate_proj(n)) * self.up_proj(n))


class Layer(nn.Module):
    def __init__(self, config, intermediate, linear):
        super().__init__()
        self.factor = config.residual_factor
        self.input_layernorm = nn.RMSNorm(config.hidden, config.eps)
        self.self_attn = Mixer(config, linear)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, config.eps)
        self.mlp = Mlp(config, intermediate)

    def forward(self, x, tables, slopes):
        x = x + self.factor * self.self_attn(self.input_layernorm(x), tables, slopes)
        return x + self.factor * self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, config, intermediate):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config, intermediate, linear) for linear in config.linear)
        self.norm = nn.RMSNorm(config.hidden, config.eps)


class Model(nn.Module):
    """Parameters have the names of an exported folder. `slopes` [linear heads] are the rates of decay."""

    def __init__(self, config, intermediate, slopes):
        super().__init__()
        self.config = config
        self.model = Body(config, intermediate)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.register_buffer("slopes", torch.as_tensor(slopes, dtype=torch.float32), persistent=False)

    def forward(self, tokens):
        """Logits [T, V] of one document."""
        config = self.config
        dims = {False: config.head_dim, True: config.linear_head_dim}
        tables = {linear: rotary_tables(len(tokens), dim, config.theta) for linear, dim in dims.items()}
        x = config.embedding_factor * self.model.embed_tokens(tokens)
        for linear, layer in zip(config.linear, self.model.layers):
            x = layer(x, tables[linear], self.slopes)
        head = self.model.embed_tokens.weight if config.tied else self.lm_head.weight
        return F.linear(self.model.norm(x) / config.logit_divisor, head)

    def loss(self, tokens):
        """Mean cross entropy of each token but the first."""
        return F.cross_entropy(self(tokens)[:-1], tokens[1:])
