"""Small models of every family of transformers that recurra reaches under."""

from __future__ import annotations

import importlib

import torch
from torch import nn

VOCABULARY = 64
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_INKLING = _ATTENTION | {
    "layer_types": ["hybrid_sliding", "hybrid"],
    "d_rel": 4,
    "rel_extent": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_LINEAR = ["linear_attention", "full_attention"]

# The family: the class of the model, and its configuration beyond COMMON.
FAMILIES: dict[str, tuple[str, dict]] = {
    "mamba": ("MambaForCausalLM", {"state_size": 8}),
    "falcon_mamba": ("FalconMambaForCausalLM", {"state_size": 8}),
    "jamba": (
        "JambaForCausalLM",
        {"mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 2, "attn_layer_period": 2}
        | {"attn_layer_offset": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "zamba": (
        "ZambaForCausalLM",
        {"attention_hidden_size": 64, "attention_head_dim": 16, "num_attention_heads": 4}
        | {"num_key_value_heads": 4, "mamba_d_state": 8, "mamba_dt_rank": 4}
        | {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 2}
        | {"num_hidden_layers": 4},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    ),
    "bamba": (
        "BambaForCausalLM",
        _MAMBA2 | {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1]},
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        {"layers_block_type": ["linear_attention", "hybrid"], "num_attention_heads": 4}
        | {"mamba_d_state": 16, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1}
        | {"chunk_size": 8, "num_key_value_heads": 4, "num_mem_blocks": 1},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        _ATTENTION
        | {"layers_block_type": ["linear_attention", "full_attention", "mlp"]}
        | {"ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2}
        | {"chunk_size": 8, "num_hidden_layers": 3},
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        _MAMBA2 | {"mamba_d_ssm": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        _MAMBA2
        | {"layer_types": _LINEAR, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"num_local_experts": 2, "shared_intermediate_size": 16},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        _ATTENTION | _DELTA | _EXPERTS | {"layer_types": _LINEAR},
    ),
    "qwen3_5": ("Qwen3_5ForCausalLM", _ATTENTION | _DELTA | {"layer_types": _LINEAR}),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        _ATTENTION | _DELTA | _EXPERTS | {"layer_types": _LINEAR},
    ),
    "qwen4_exp": (
        "Qwen4ExpForCausalLM",
        _ATTENTION
        | _DELTA
        | _EXPERTS
        | {"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2}
        | {"indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
        | {"indexer_compress_ratio": 4},
    ),
    "olmo_hybrid": (
        "OlmoHybridForCausalLM",
        _DELTA | {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": _LINEAR},
    ),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        _LATENT
        | {"layer_types": _LINEAR, "mlp_layer_types": ["dense", "dense"]}
        | {"linear_num_heads": 2, "linear_head_dim": 8}
        | {"num_experts": 4, "num_experts_per_token": 2},
    ),
    "bailing_hybrid": (
        "BailingHybridForCausalLM",
        _LATENT
        | {"layer_types": _LINEAR, "num_experts": 8, "num_experts_per_token": 2, "head_dim": 8}
        | {"moe_intermediate_size": 16, "num_expert_group": 1, "topk_group": 1},
    ),
    "glm5_next": (
        "Glm5NextTextModel",
        _LATENT
        | {"layer_types": ["linear_attention", "indexed_attention"], "q_lora_rank": 8}
        | {"mlp_layer_types": ["dense", "dense"], "index_head_dim": 8, "index_n_heads": 2}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "qk_rope_head_dim": 0}
        | {"linear_num_heads": 2, "linear_head_dim": 8},
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"], "num_attention_heads": 4}
        | {"num_key_value_heads": 2},
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        _EXPERTS
        | {"layer_types": ["conv", "full_attention"], "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "num_dense_layers": 1},
    ),
    "lfm3": (
        "Lfm3ForCausalLM",
        {"layer_types": ["conv", "full_attention"], "num_attention_heads": 4}
        | {"num_key_value_heads": 2},
    ),
    "lara_mini": (
        "LaraMiniForCausalLM",
        _ATTENTION
        | _DELTA
        | _EXPERTS
        | {"layer_types": _LINEAR, "shared_expert_intermediate_size": 16},
    ),
    "inkling": ("InklingForCausalLM", _INKLING),
    "inkling2": ("Inkling2ForCausalLM", _INKLING | {"unpadded_vocab_size": VOCABULARY}),
    "inkling2_loop": (
        "Inkling2LoopForCausalLM",
        _INKLING
        | {"unpadded_vocab_size": VOCABULARY, "loop_gate_rank": 4, "loop_num_passes": 2}
        | {"n_layers_per_attn_res_block": 2, "num_hidden_layers": 6}
        | {"layer_types": ["hybrid_sliding", "hybrid"] * 3}
        | {"loop_layer_index_start": 2, "loop_layer_index_end": 4},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {"lru_width": 32, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
        | {"block_types": ["recurrent", "attention"], "attention_window_size": 16},
    ),
    "rwkv": ("RwkvForCausalLM", {"attention_hidden_size": 32, "context_length": 64}),
}
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def modelling_file(family: str):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def build(family: str, **changes) -> nn.Module:
    """A model with weights large enough for every part to matter."""
    name, options = FAMILIES[family]
    cls = getattr(modelling_file(family), name)
    config = cls.config_class(**(COMMON | options | changes))
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1 and "A_log" not in key:
                p.normal_(0, 1 if "embed" in key else p.shape[-1] ** -0.5)
    return model
