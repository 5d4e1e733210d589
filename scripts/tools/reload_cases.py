"""Tiny random checkpoints of the official layouts, and what is cut from them, for the checks of reloads and exports."""

from structprune.structured.plan import BlockPlan

LLADA_TEXT = {"gen_length": 8, "block_length": 4, "steps": 8, "threshold": 0.9}
TEXTS: dict[str, dict] = {  # family -> options of its sampler, where they are not LLaDA's
    "dream": {"max_new_tokens": 8, "steps": 4, "alg": "entropy"},
    "sdar": {"gen_length": 7, "steps": 7, "threshold": 0.9},
    "nemotron-labs": {"gen_length": 7, "steps": 7, "threshold": 0.9},
    "a2d-qwen3-blocks": {"gen_length": 7, "steps": 7, "threshold": 0.9},
    "llada2": {"gen_length": 7, "steps": 7, "threshold": 0.9},
}
MASK_ID = 2047  # of the embedded tokenizer, which the tiny checkpoints use
COMMON = {
    "vocab_size": 2048, "mask_token_id": MASK_ID, "pad_token_id": 2046, "torch_dtype": "float32", "rope_theta": 10000.0,
}  # fmt: skip
LLADA_VALUES = COMMON | {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 64, "n_heads": 4, "n_kv_heads": 4,
    "n_layers": 3, "mlp_hidden_size": 96, "embedding_size": 2048, "max_sequence_length": 64, "rms_norm_eps": 1e-5,
    "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi": False,
    "rope_full_precision": True, "include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False,
    "weight_tying": False, "attention_layer_norm": False, "block_group_size": 1, "init_device": "cpu",
    "use_cache": False, "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
    "flash_attention": False, "input_emb_norm": False, "multi_query_attention": None, "scale_logits": False,
    "mlp_ratio": 4, "init_fn": "normal", "layer_norm_with_affine": True, "init_std": 0.02,
    "init_cutoff_factor": None, "alibi_bias_max": 8.0, "attention_layer_norm_with_affine": True, "precision": None,
    "eos_token_id": 2046,
}  # fmt: skip
UNREAD_TIE = {"tie_word_embeddings": True}  # LLaDA's code reads weight_tying instead: its head is separate
DREAM_VALUES = COMMON | {
    "model_type": "Dream", "architectures": ["DreamModel"], "hidden_size": 72, "num_attention_heads": 6,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 96, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "tie_word_embeddings": False, "hidden_act": "silu", "use_cache": False,
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 3, "attention_dropout": 0.0,
    "bos_token_id": 2046, "eos_token_id": 2046,
}  # fmt: skip

A2D_VALUES = DREAM_VALUES | {"model_type": "a2d-qwen3", "head_dim": 12, "tie_word_embeddings": True}
A2D_LLAMA_VALUES = DREAM_VALUES | {
    "model_type": "a2d-llama", "architectures": ["A2DLlamaLMHeadModel"], "head_dim": 12, "mlp_bias": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
}  # fmt: skip
A2D_QWEN2_VALUES = DREAM_VALUES | {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"]}
LLADA_MOE_VALUES = {key: value for key, value in DREAM_VALUES.items() if key != "intermediate_size"} | {
    "model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "expert_intermediate_size": 16, "num_experts": 6,
    "num_experts_per_tok": 2, "moe_layer_freq": [1] * 3, "qk_layernorm": True, "norm_topk_prob": None,
    "shared_expert_intermediate_size": None, "dense_intermediate_size": 96, "partial_rotary_factor": 1,
    "moe_router_score_function": "softmax",
}  # fmt: skip
LLADA2_VALUES = DREAM_VALUES | {  # the first block has a plain MLP
    "model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "head_dim": 12, "block_size": 4,
    "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "num_shared_experts": 1, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5, "routed_scaling_factor": 2.5,
    "use_qk_norm": True, "use_bias": False, "use_qkv_bias": False, "score_function": "sigmoid",
}  # fmt: skip
SDAR_VALUES = DREAM_VALUES | {
    "model_type": "sdar", "architectures": ["SDARForCausalLM"], "head_dim": 12, "block_size": 4,
    "attention_bias": False, "attn_implementation": "flex_attention", "fuse_cross_entropy": True,
}  # fmt: skip
NEMOTRON_VALUES = COMMON | {
    "model_type": "nemotron_labs_diffusion", "architectures": ["NemotronLabsDiffusionModel"], "hidden_size": 72,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 3, "intermediate_size": 96,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "block_size": 4, "attention_bias": False, "mlp_bias": False,
    "rope_parameters": {
        "rope_type": "yarn", "factor": 0.25, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.1,
        "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "rope_theta": 10000.0,
    },
    "tie_word_embeddings": False, "sliding_window": None, "attn_implementation": "sdpa", "dlm_loss_weight": None,
    "ar_loss_weight": 1.0, "dlm_paradigm": "bidirectional", "bos_token_id": 2046, "eos_token_id": 2046,
}  # fmt: skip


def block(queries, kv_heads, channels: int) -> BlockPlan:
    """Keep these heads and every other one of the first 2 * `channels` MLP channels (or all 96)."""
    indices = tuple(range(96)) if channels == 96 else tuple(range(0, 96, 2))[:channels]
    return BlockPlan(tuple(queries), tuple(kv_heads), indices)


def mixture(heads: tuple, experts, channels: int, shared: int = 0) -> BlockPlan:
    """Keep these heads, these experts, and of 16 channels the last so many of each and of what all tokens go through.

    Args:
        heads: query and KV heads.
    """
    (queries, kv_heads), kept = heads, range(16 - channels, 16)
    indices = tuple(16 * expert + channel for expert in experts for channel in kept)
    return BlockPlan(tuple(queries), tuple(kv_heads), indices, tuple(experts), tuple(range(16 - shared, 16)))


ALL = (range(4), range(4))
DREAM_ALL = (range(6), range(2))
# name -> config.json, plan of each block, biases on the consumers, export class
CASES = {
    "llada-free": (
        LLADA_VALUES, [block((0, 2, 3), (0, 2, 3), 40), block(*ALL, 96), block((1,), (1,), 17)], True, "free",
    ),
    "llada-kept": (LLADA_VALUES | UNREAD_TIE, [block(*ALL, 96)] * 3, False, "free"),
    "llada-gaps": (
        LLADA_VALUES, [block((), (), 40), block(*ALL, 0), block((1, 2), (1, 2), 96)], True, "free",
    ),
    "llada-depth": (LLADA_VALUES | UNREAD_TIE, [block(*ALL, 32), block((), (), 0), block(*ALL, 32)], False, "official"),
    "llada-uniform": (LLADA_VALUES, [block((0, 3), (0, 3), 48)] * 3, False, "uniform"),
    "llada-official": (LLADA_VALUES | UNREAD_TIE, [block(*ALL, 32)] * 3, False, "official"),
    "mmada-free": (
        LLADA_VALUES | {"model_type": "mmada", "architectures": ["MMadaModelLM"]},
        [block((0, 2), (0, 2), 24), block((1,), (1,), 48), block(*ALL, 8)], False, "free",
    ),
    "dream-free": (
        DREAM_VALUES, [block((0, 2, 3, 4), (0, 1), 24), block(range(3, 6), (1,), 40), block((1, 5), (0, 1), 96)],
        True, "free",
    ),
    "dream-gaps": (DREAM_VALUES, [block(*DREAM_ALL, 0), block((), (), 0), block((), (), 96)], False, "free"),
    "dream-depth": (DREAM_VALUES, [block((), (), 0), block(*DREAM_ALL, 40), block(*DREAM_ALL, 40)], False, "official"),
    "dream-uniform": (DREAM_VALUES, [block((0, 1, 4, 5), (0, 1), 48)] * 3, False, "uniform"),
    "dream-official": (DREAM_VALUES, [block(*DREAM_ALL, 40)] * 3, False, "official"),
    "a2d-free": (A2D_VALUES, [block(range(3, 6), (1,), 40), block((), (), 24), block(*DREAM_ALL, 96)], True, "free"),
    "a2d-uniform": (A2D_VALUES, [block((0, 1, 4, 5), (0, 1), 48)] * 3, False, "uniform"),
    "a2d-blocks-free": (
        A2D_VALUES | {"block_size": 4}, [block(range(3, 6), (1,), 40), block((), (), 24), block(*DREAM_ALL, 96)], True,
        "free",
    ),
    "sdar-free": (SDAR_VALUES, [block(range(3, 6), (1,), 40), block((), (), 24), block(*DREAM_ALL, 96)], True, "free"),
    "sdar-official": (SDAR_VALUES, [block((0, 1, 4, 5), (0, 1), 48)] * 3, False, "official"),
    "nemotron-free": (
        NEMOTRON_VALUES, [block(range(3, 6), (1,), 40), block((), (), 24), block(*DREAM_ALL, 96)], True, "free",
    ),
    "nemotron-uniform": (NEMOTRON_VALUES, [block((0, 1, 4, 5), (0, 1), 48)] * 3, False, "uniform"),
    # not uniform: transformers 5's AutoTokenizer fails at the scaled positions of that layout, the source's too
    "a2d-llama-free": (
        A2D_LLAMA_VALUES, [block(range(3, 6), (1,), 40), block((), (), 24), block(*DREAM_ALL, 96)], True, "free",
    ),
    "a2d-qwen2-free": (
        A2D_QWEN2_VALUES, [block(range(3, 6), (1,), 40), block((), (), 24), block(*DREAM_ALL, 96)], True, "free",
    ),
    "a2d-qwen2-uniform": (A2D_QWEN2_VALUES, [block((0, 1, 4, 5), (0, 1), 48)] * 3, False, "uniform"),
    "llada-moe-free": (
        LLADA_MOE_VALUES,
        [mixture(((3, 4, 5), (1,)), (0, 2, 5), 7), mixture(((), ()), (1, 3), 16), mixture(DREAM_ALL, (), 0)],
        False, "free",
    ),
    "llada-moe-uniform": (
        LLADA_MOE_VALUES, [mixture(((0, 1, 4, 5), (0, 1)), (0, 1, 2, 4), 8)] * 3, False, "uniform",
    ),
    "llada-moe-official": (LLADA_MOE_VALUES, [mixture(DREAM_ALL, (1, 2, 3, 5), 12)] * 3, False, "official"),
    "llada2-free": (
        LLADA2_VALUES,
        [block(range(3, 6), (1,), 40), mixture(((0, 1, 4, 5), (0, 1)), (0, 1, 3, 4, 6, 7), 9, 5),
         mixture(DREAM_ALL, (2, 3, 4, 5), 16)],
        False, "free",
    ),
    "llada2-official": (
        LLADA2_VALUES,
        [block((0, 1, 4, 5), (0, 1), 40), *[mixture(((0, 1, 4, 5), (0, 1)), (0, 1, 3, 4, 6, 7), 8, 8)] * 2],
        False, "official",
    ),
}  # fmt: skip
RECOVERED = ("llada-free", "llada2-official")  # of these also a model that was trained with low-rank updates
