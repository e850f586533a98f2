"""A config.json of each family, small and with odd sizes."""

from __future__ import annotations

COMMON = {
    "vocab_size": 777,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_ROPE},
}
QWEN3 = COMMON | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
MOE = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
    "norm_topk_prob": True,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "original_max_position_embeddings": 128,
}
DEEPSEEK = {name: value for name, value in COMMON.items() if name != "head_dim"} | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 8,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "routed_scaling_factor": 1.5,
    "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
}
GPT_OSS = COMMON | {
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "swiglu_limit": 5.0,
    "rope_parameters": YARN | {"truncate": False},
}
