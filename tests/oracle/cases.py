"""The cases of the comparison: small models with random weights, each with something that the others do not have.

Weights and inputs come from numpy's seeded generator (PCG64) and are float32, so both sides start from the same numbers. Goldens
(goldens.py) store them, so reading a golden needs no generator.
"""

import dataclasses
import zlib

import ml_dtypes
import numpy as np

from sala_oracle import config as configs
from sala_oracle import tasks


@dataclasses.dataclass
class Case:
    name: str
    what: str  # for the table of docs/numerics.md
    request: dict
    student: tasks.Model
    batch: tasks.Batch
    teacher: tasks.Model | None = None
    gradients: bool = True  # false: logits and loss only
    published: bool = False  # also compared in the published rounding
    golden: bool = False


# ---- configurations ----


def sala(mixers, **changes):
    """config.json of a hybrid; `mixers` has one letter per layer: S softmax, L linear."""
    kinds = {"S": "minicpm4", "L": "lightning-attn"}
    config = {
        "architectures": ["MiniCPMSALAForCausalLM"],
        "model_type": "minicpm_sala",
        "torch_dtype": "float32",
        "dtype": "float32",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": len(mixers),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 524288,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.1,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
        "mup_denominator": len(mixers),
        "pretraining_tp": 1,
        "shift_labels": True,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "mixer_types": [kinds[letter] for letter in mixers],
        "attn_use_rope": False,
        "attn_use_output_gate": True,
        "lightning_nh": 4,
        "lightning_nkv": 4,
        "lightning_head_dim": 8,
        "lightning_scale": "1/sqrt(d)",
        "lightning_use_rope": True,
        "qk_norm": True,
        "use_output_norm": True,
        "use_output_gate": True,
        "sparse_config": {
            "kernel_size": 32,
            "kernel_stride": 16,
            "init_blocks": 1,
            "block_size": 64,
            "window_size": 2048,
            "topk": 64,
            "use_nope": False,
            "dense_len": 8192,
        },
    }
    sparse = changes.pop("sparse_config", {})
    config["sparse_config"] = config["sparse_config"] | sparse
    return config | changes | ({"lightning_nkv": changes["lightning_nh"]} if "lightning_nh" in changes else {})


def minicpm(layers, **changes):
    """A teacher with muP factors: softmax layers with rotary embedding, no gates."""
    config = sala("S" * layers, model_type="minicpm", architectures=["MiniCPMForCausalLM"])
    hybrid_only = [name for name in config if name.startswith("lightning_") or name.startswith("attn_use")]
    for name in [*hybrid_only, "mixer_types", "qk_norm", "use_output_norm", "use_output_gate", "sparse_config"]:
        del config[name]
    return config | changes


def plain(family, layers, **changes):
    """llama or qwen3: no muP factors; qwen3 has query/key norms."""
    config = minicpm(layers, model_type=family, architectures=[{"llama": "Llama", "qwen3": "Qwen3"}[family] + "ForCausalLM"])
    for name in ("scale_emb", "scale_depth", "dim_model_base", "mup_denominator", "shift_labels"):
        del config[name]
    return config | changes


# Eight tokens a block, five blocks a query: selection drops blocks from 40 tokens on.
SMALL_BLOCKS = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 8, "topk": 4, "dense_len": 48}
# A stride is a whole block, no initial block.
SMALLEST_BLOCKS = SMALL_BLOCKS | {"kernel_size": 8, "kernel_stride": 4, "init_blocks": 0, "block_size": 4, "window_size": 12, "topk": 5}


# ---- numbers ----


def random_weights(config, rng, bfloat16=False):
    """Norm weights around 1, matrices that keep the size of what they multiply (queries and keys twice that, so that attention is far
    from uniform)."""
    weights = {}
    spec = configs.read(config)
    for name, shape in configs.tensor_shapes(spec, config["intermediate_size"]).items():
        kind = name.split(".")[-2]
        if len(shape) == 1:
            value = 1.0 + 0.25 * rng.standard_normal(shape)
        elif kind == "embed_tokens":
            value = rng.standard_normal(shape) / (np.sqrt(shape[1]) if spec.tied else spec.embedding_factor)
        else:
            value = rng.standard_normal(shape) * (2.0 if kind in ("q_proj", "k_proj") else 1.0) / np.sqrt(shape[1])
            if kind == "lm_head":
                value *= spec.logit_divisor
        weights[name] = round_bfloat16(value) if bfloat16 else value.astype(np.float32)
    return weights


def round_bfloat16(value):
    return value.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def random_batch(vocabulary, lengths, rng, masked=0.0):
    """Documents of random tokens. The last token of a document has no label; of the others a share of `masked` has none."""
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = rng.integers(0, vocabulary, borders[-1]).astype(np.int32)
    labels = np.full(borders[-1], -1, dtype=np.int32)
    for begin, end in zip(borders[:-1], borders[1:]):
        labels[begin : end - 1] = tokens[begin + 1 : end]
    labels[rng.random(borders[-1]) < masked] = -1
    return tasks.Batch(tokens, labels, borders)


def make(name, what, request, config, lengths, teacher_config=None, masked=0.0, seed=0, **options):
    """The name is part of the seed, so cases are independent; `seed` changes one whose selection is not clear."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    bfloat16 = options.get("published", False)
    student = tasks.Model(config, random_weights(config, rng, bfloat16))
    teacher = tasks.Model(teacher_config, random_weights(teacher_config, rng, bfloat16)) if teacher_config else None
    batch = random_batch(config["vocab_size"], lengths, rng, masked)
    return Case(name, what, request, student, batch, teacher, **options)


def all_cases():
    """By name. A case is made when asked for: list(all_cases()) costs nothing."""
    ce = {"task": "cross_entropy", "logits": True}
    sparse = ce | {"sparse_attention": True}
    tiny = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24}
    packed = [9, 1, 24, 16]  # with a document of one token
    table = {
        # Teachers.
        "teacher_minicpm": lambda n: make(
            n, "muP factors, rotary, grouped heads; packed, masked labels", ce, minicpm(3), packed, masked=0.3
        ),
        "teacher_qwen3": lambda n: make(
            n, "query/key norm, heads wider than hidden / heads", ce | {"grad_scale": 0.25}, plain("qwen3", 3, head_dim=16), packed
        ),
        "teacher_llama": lambda n: make(
            n,
            "one key/value head, six query heads",
            ce,
            plain("llama", 3, num_attention_heads=6, num_key_value_heads=1, rms_norm_eps=1e-5),
            packed,
        ),
        "teacher_tied": lambda n: make(
            n, "tied embeddings, rope_theta 1e6", ce, plain("qwen3", 2, tie_word_embeddings=True, rope_theta=1e6), [40]
        ),
        # Hybrids, dense.
        "hybrid_dense": lambda n: make(
            n, "released form, packed, masked labels", ce, sala("SLLSLS"), packed, masked=0.3, published=True
        ),
        "hybrid_dense_long": lambda n: make(
            n, "documents longer than a chunk of linear attention", ce, sala("LSL", hidden_size=24, dim_model_base=12), [150, 70], published=True
        ),
        "hybrid_heads": lambda n: make(
            n,
            "3 linear heads of 16, 6 query and 3 key/value heads of 8, no recompute",
            ce | {"recompute": False},
            sala("SLLS", lightning_nh=3, lightning_head_dim=16, num_attention_heads=6, num_key_value_heads=3),
            packed,
        ),
        "hybrid_many_heads": lambda n: make(
            n,
            "12 linear heads, whose slopes are no powers of two; logits divided by 1.5",
            ce,
            sala("LSL", hidden_size=24, lightning_nh=12, lightning_head_dim=4),
            packed,
            published=True,
        ),
        "hybrid_bare": lambda n: make(
            n,
            "no gates, no norms in linear layers, rotary in softmax layers only",
            ce,
            sala(
                "LSSL",
                attn_use_rope=True,
                attn_use_output_gate=False,
                lightning_use_rope=False,
                qk_norm=False,
                use_output_norm=False,
                use_output_gate=False,
            ),
            packed,
        ),
        "hybrid_odd": lambda n: make(
            n,
            "no size is a multiple of four",
            ce,
            sala(
                "SLS",
                vocab_size=53,
                hidden_size=37,
                intermediate_size=45,
                num_attention_heads=6,
                num_key_value_heads=3,
                head_dim=10,
                lightning_nh=5,
                lightning_head_dim=6,
            ),
            [35, 1, 67],
            masked=0.5,
        ),
        # Hybrids, block selection.
        "hybrid_sparse": lambda n: make(
            n,
            "selection in two of four documents",
            sparse,
            sala("SLLS", sparse_config=SMALL_BLOCKS),
            [100, 1, 47, 75],
            masked=0.2,
            published=True,
        ),
        "hybrid_sparse_smallest": lambda n: make(
            n,
            "one window a block, no initial block, one group of three heads",
            sparse,
            sala("SLS", num_attention_heads=3, num_key_value_heads=1, sparse_config=SMALLEST_BLOCKS),
            [90],
        ),
        "hybrid_sparse_group": lambda n: make(
            n,
            "16 query heads to one key/value head as released, rotary in softmax layers",
            sparse,
            sala("SSL", num_attention_heads=16, num_key_value_heads=1, head_dim=4, attn_use_rope=True, sparse_config=SMALL_BLOCKS),
            [81, 49],
        ),
        "hybrid_sparse_released": lambda n: make(
            n,
            "released block sizes, 6400 tokens, forward only",
            sparse,
            sala("SL", num_attention_heads=2, num_key_value_heads=1, lightning_nh=2, sparse_config={"dense_len": 6144}, **tiny),
            [6400],
            gradients=False,
        ),
        # Stages of conversion.
        "distillation": lambda n: make(
            n,
            "hybrid from a muP teacher",
            {"task": "distillation", "logits": True},
            sala("SLLS"),
            packed,
            teacher_config=minicpm(4),
        ),
        "distillation_mixed": lambda n: make(
            n,
            "temperature 2, ce_weight 0.5, teacher with query/key norm and rotary, student without muP factors",
            {"task": "distillation", "logits": True, "temperature": 2.0, "ce_weight": 0.5, "grad_scale": 0.015625},
            sala("LSL", scale_emb=1, scale_depth=3.0**0.5, dim_model_base=32),
            packed,
            teacher_config=plain("qwen3", 3),
            masked=0.3,
        ),
        "alignment": lambda n: make(
            n,
            "linear mixers to a muP teacher's softmax mixers, mean square",
            {"task": "alignment", "alignment_loss": "mse"},
            sala("LLL"),
            packed,
            teacher_config=minicpm(3),
        ),
        "alignment_l2_norm": lambda n: make(
            n,
            "to a teacher with query/key norm, Euclidean norm",
            {"task": "alignment", "alignment_loss": "l2_norm", "grad_scale": 3.0},
            sala("LL", scale_emb=1, scale_depth=2.0**0.5, dim_model_base=32),
            packed,
            teacher_config=plain("qwen3", 2),
        ),
        # Small enough to be committed with their results.
        "golden_teacher": lambda n: make(
            n, "small teacher", ce, plain("qwen3", 2, **tiny, head_dim=4), [11, 1, 13], masked=0.2, golden=True
        ),
        "golden_hybrid": lambda n: make(
            n,
            "small hybrid, three linear heads",
            ce,
            sala("SLS", **tiny, num_attention_heads=2, num_key_value_heads=1, lightning_nh=3),
            [14, 1, 9],
            masked=0.2,
            golden=True,
        ),
        "golden_sparse": lambda n: make(
            n, "small hybrid, block selection", sparse, sala("SL", **tiny, head_dim=4, sparse_config=SMALL_BLOCKS), [64, 12], golden=True
        ),
        "golden_distillation": lambda n: make(
            n,
            "small hybrid from a small teacher",
            {"task": "distillation", "logits": True, "temperature": 1.5, "ce_weight": 0.5},
            sala("SL", **tiny, head_dim=4, lightning_nh=3),
            [12, 8],
            teacher_config=minicpm(2, **tiny, head_dim=4),
            masked=0.2,
            golden=True,
        ),
        "golden_alignment": lambda n: make(
            n,
            "small linear mixers to a small teacher",
            {"task": "alignment", "alignment_loss": "mse"},
            sala("LL", **tiny, head_dim=4, lightning_nh=4, lightning_head_dim=4),
            [12, 8],
            teacher_config=minicpm(2, **tiny, head_dim=4),
            golden=True,
        ),
    }
    return {name: (lambda name=name, maker=maker: maker(name)) for name, maker in table.items()}
