"""config.json of tiny official checkpoints, one for each family."""

MASK_ID = 2047  # of the embedded tokenizer, which tiny checkpoints carry
LLADA = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 32, "n_heads": 4, "n_kv_heads": 4,
    "n_layers": 3, "mlp_hidden_size": 48, "vocab_size": 2048, "embedding_size": 2048, "max_sequence_length": 64,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "mask_token_id": MASK_ID, "torch_dtype": "float32",
    "include_bias": False, "include_qkv_bias": False, "weight_tying": False, "block_type": "llama",
}  # fmt: skip
DREAM = {
    "model_type": "Dream", "architectures": ["DreamModel"], "hidden_size": 32, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3, "intermediate_size": 48, "vocab_size": 2048,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "mask_token_id": MASK_ID,
    "torch_dtype": "float32", "rope_scaling": None, "tie_word_embeddings": False,
}  # fmt: skip


MMADA = LLADA | {"model_type": "mmada", "architectures": ["MMadaModelLM"]}
A2D_QWEN3 = DREAM | {
    "model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], "tie_word_embeddings": True,
    "layer_types": ["full_attention"] * 3, "attention_bias": False,
}  # fmt: skip
A2D_LLAMA = DREAM | {
    "model_type": "a2d-llama", "architectures": ["A2DLlamaLMHeadModel"], "num_attention_heads": 4,
    "num_key_value_heads": 4, "mlp_bias": False, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip
A2D_QWEN2 = DREAM | {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"]}
SDAR = DREAM | {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 4, "attention_bias": False}
SDAR |= {"attn_implementation": "flex_attention", "fuse_cross_entropy": True}
LLADA_MOE = DREAM | {
    "model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "num_attention_heads": 4, "num_key_value_heads": 4,
    "expert_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_layer_freq": [1] * 3,
    "qk_layernorm": True, "shared_expert_intermediate_size": None, "norm_topk_prob": None,
}  # fmt: skip
del LLADA_MOE["intermediate_size"]
NEMOTRON = {
    "model_type": "nemotron_labs_diffusion", "architectures": ["NemotronLabsDiffusionModel"], "hidden_size": 32,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3, "intermediate_size": 48,
    "vocab_size": 2048, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "mask_token_id": 2047, "block_size": 4,
    "rope_parameters": {
        "rope_type": "yarn", "factor": 0.25, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.1,
        "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "rope_theta": 10000.0,
    },
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "sliding_window": None,
    "attn_implementation": "sdpa", "dlm_paradigm": "bidirectional", "dlm_loss_weight": None, "torch_dtype": "float32",
}  # fmt: skip
LLADA2 = DREAM | {  # the first block has a plain MLP
    "model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "num_attention_heads": 4, "block_size": 4,
    "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "num_shared_experts": 1, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5, "routed_scaling_factor": 2.5,
    "use_qk_norm": True, "use_bias": False, "use_qkv_bias": False, "score_function": "sigmoid",
}  # fmt: skip
VALUES = {
    "llada": LLADA, "mmada": MMADA, "dream": DREAM, "a2d-qwen3": A2D_QWEN3, "a2d-llama": A2D_LLAMA,
    "a2d-qwen2": A2D_QWEN2, "a2d-qwen3-blocks": A2D_QWEN3 | {"block_size": 4}, "sdar": SDAR, "llada-moe": LLADA_MOE,
    "nemotron-labs": NEMOTRON, "llada2": LLADA2,
}  # fmt: skip
DENSE = ["llada", "dream", "a2d-qwen3", "sdar", "nemotron-labs"]  # one family for each kind of pass and layer
GRAPHS = [*DENSE, "llada-moe", "llada2"]
