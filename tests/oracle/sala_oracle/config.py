"""What a config.json says, in the terms of the formulas."""

import dataclasses
import math

LINEAR_SPELLINGS = ("lightning", "lightning_attn", "lightning-attn")


@dataclasses.dataclass(frozen=True)
class Sparse:
    """Block selection of softmax layers in long documents. Sizes in tokens unless they say blocks."""

    kernel_size: int
    kernel_stride: int
    init_blocks: int
    block_size: int
    window_size: int
    topk: int
    dense_len: int

    def __post_init__(self):
        # The rules "visible" and "overlaps" hold in this form only.
        if self.kernel_size != 2 * self.kernel_stride or self.block_size % self.kernel_stride:
            raise ValueError(f"{self}: kernel_size must be 2 * kernel_stride, block_size a multiple of kernel_stride")

    @property
    def total_blocks(self):
        return self.topk + self.window_size // self.block_size

    @property
    def window_blocks(self):
        """Blocks before a query's own that are always seen."""
        return self.window_size // self.block_size


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int
    hidden: int
    vocabulary: int
    eps: float
    theta: float
    tied: bool
    embedding_factor: float  # x0 = embedding_factor * E[token]
    residual_factor: float  # x += residual_factor * branch
    logit_divisor: float  # logits = head(y / logit_divisor)
    linear: tuple  # per layer: is it a linear layer
    # Softmax layers.
    heads: int
    kv_heads: int
    head_dim: int
    rope: bool
    qk_norm: bool
    gate: bool
    sparse: Sparse | None
    # Linear layers.
    linear_heads: int
    linear_head_dim: int
    linear_rope: bool
    linear_qk_norm: bool
    linear_output_norm: bool
    linear_gate: bool


def read(c):
    """The Config of a config.json given as a dict."""
    family = c["model_type"]
    if family not in ("minicpm_sala", "minicpm", "llama", "qwen3"):
        raise ValueError(f"model_type {family} is not known here")
    layers, hidden = c["num_hidden_layers"], c["hidden_size"]
    hybrid = family == "minicpm_sala"
    mup = family in ("minicpm_sala", "minicpm")
    head_dim = c.get("head_dim") or hidden // c["num_attention_heads"]
    linear = tuple(kind in LINEAR_SPELLINGS for kind in c["mixer_types"]) if hybrid else (False,) * layers
    if len(linear) != layers:
        raise ValueError(f"mixer_types has {len(linear)} entries for {layers} layers")
    sparse = None
    if hybrid and c.get("sparse_config"):
        sparse = Sparse(**{field.name: c["sparse_config"][field.name] for field in dataclasses.fields(Sparse)})
    return Config(
        layers=layers,
        hidden=hidden,
        vocabulary=c["vocab_size"],
        eps=c["rms_norm_eps"],
        theta=c["rope_theta"],
        tied=c["tie_word_embeddings"],
        embedding_factor=float(c["scale_emb"]) if mup else 1.0,
        residual_factor=c["scale_depth"] / math.sqrt(layers) if mup else 1.0,
        logit_divisor=hidden / c["dim_model_base"] if mup else 1.0,
        linear=linear,
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=head_dim,
        rope=c["attn_use_rope"] if hybrid else True,
        qk_norm=family == "qwen3",
        gate=c["attn_use_output_gate"] if hybrid else False,
        sparse=sparse,
        linear_heads=c["lightning_nh"] if hybrid else 0,
        linear_head_dim=c["lightning_head_dim"] if hybrid else 0,
        linear_rope=c["lightning_use_rope"] if hybrid else False,
        linear_qk_norm=c["qk_norm"] if hybrid else False,
        linear_output_norm=c["use_output_norm"] if hybrid else False,
        linear_gate=c["use_output_gate"] if hybrid else False,
    )


def tensor_shapes(config, intermediate):
    """{tensor name: shape} of the checkpoint of a model; linear weights are [out, in]."""
    hidden = config.hidden
    shapes = {"model.embed_tokens.weight": (config.vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocabulary, hidden)
    for layer, linear in enumerate(config.linear):
        heads, dim = (config.linear_heads, config.linear_head_dim) if linear else (config.heads, config.head_dim)
        width, kv_width = heads * dim, (heads if linear else config.kv_heads) * dim
        mixer = {"q_proj": (width, hidden), "k_proj": (kv_width, hidden), "v_proj": (kv_width, hidden), "o_proj": (hidden, width)}
        if config.linear_qk_norm if linear else config.qk_norm:
            mixer |= {"q_norm": (dim,), "k_norm": (dim,)}
        if linear and config.linear_output_norm:
            mixer["o_norm"] = (width,)
        if config.linear_gate if linear else config.gate:
            mixer["z_proj" if linear else "o_gate"] = (width, hidden)
        mlp = {"gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}.weight": shape for name, shape in mixer.items()}
        shapes |= {f"{prefix}mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"{prefix}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes
