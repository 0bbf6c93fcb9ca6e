"""Tiny models of many kinds, made by transformers from their configs: what is built, adapted and fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from generate import Tensors


@dataclass(frozen=True)
class Kind:
    """A model class, the sizes of its config, and what of it is adapted.

    ``parameters`` are stacked experts; ``apart`` is what they are called one by one: for gate, up and down.
    """

    model: str
    config: str
    sizes: Mapping[str, Any]
    modules: tuple[str, ...] = ("q_proj", "o_proj")
    parameters: tuple[str, ...] = ()
    apart: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    inputs: Callable[[], Tensors] = field(default=lambda: {"input_ids": torch.arange(3, 15).view(2, 6)})

    def build(self, seed: int = 0) -> transformers.PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.sizes)
        config._experts_implementation = "eager"
        return getattr(transformers, self.model)(config).eval()


TEXT = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
"""Experts are 24 wide, so that no two of their dimensions are alike."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
BOTH = ("gate_up_proj", "down_proj")
W = ("w1", "w3", "w2")

MIXTURES: dict[str, Kind] = {
    "qwen2_moe": Kind(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**TEXT, **EXPERTS, "shared_expert_intermediate_size": 20},
        ("q_proj", "shared_expert.gate_proj", "shared_expert.down_proj"), BOTH,
    ),
    "qwen3_moe": Kind("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**TEXT, **EXPERTS}, parameters=(*BOTH, "gate.weight")),
    "mixtral": Kind(
        "MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 4}, parameters=(*BOTH, "gate.weight"),
        apart=W,
    ),
    "deepseek_v3": Kind(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", {**TEXT, **ROUTED, **LATENT, "num_key_value_heads": 4},
        ("q_a_proj", "kv_b_proj"), BOTH,
    ),
    "glm4_moe": Kind(
        "Glm4MoeForCausalLM", "Glm4MoeConfig", {**TEXT, **ROUTED}, parameters=BOTH
    ),
    "olmoe": Kind("OlmoeForCausalLM", "OlmoeConfig", {**TEXT, **EXPERTS, "intermediate_size": 24}, parameters=BOTH),
    "phimoe": Kind(
        "PhimoeForCausalLM", "PhimoeConfig", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
        parameters=BOTH, apart=W,
    ),
    "jamba": Kind(
        "JambaForCausalLM", "JambaConfig",
        {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4,
         "mamba_d_state": 4},
        ("q_proj", "in_proj"), BOTH,
    ),
    "granitemoe": Kind(
        "GraniteMoeForCausalLM", "GraniteMoeConfig", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
        parameters=BOTH, apart=(),
    ),
    "gpt_oss": Kind(
        "GptOssForCausalLM", "GptOssConfig",
        {**TEXT, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
        parameters=BOTH, apart=(),
    ),
    "llama4": Kind(
        "Llama4ForCausalLM", "Llama4TextConfig",
        {**TEXT, "num_local_experts": 4, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 1},
        ("q_proj", "shared_expert.up_proj"), BOTH, (),
    ),
    "qwen3_vl_moe": Kind(
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
        {"text_config": {**TEXT, **EXPERTS, "decoder_sparse_step": 1,
                         "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
         "vision_config": {"depth": 1, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2,
                           "out_hidden_size": 32, "patch_size": 8, "deepstack_visual_indexes": [0]},
         "tie_word_embeddings": False},
        parameters=BOTH, apart=(),
    ),
    "qwen3_next": Kind(
        "Qwen3NextForCausalLM", "Qwen3NextConfig",
        {**TEXT, **EXPERTS, "shared_expert_intermediate_size": 20, "linear_num_key_heads": 2,
         "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "layer_types": ["linear_attention", "full_attention"]},
        ("q_proj", "in_proj_qkvz"), BOTH,
    ),
    "ernie4_5_moe": Kind(
        "Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig",
        {**TEXT, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1,
         "moe_num_shared_experts": 1},
        parameters=BOTH,
    ),
    "nemotron_h": Kind(
        "NemotronHForCausalLM", "NemotronHConfig",
        {**TEXT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1,
         "topk_group": 1, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 20,
         "layers_block_type": ["moe", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 4,
         "n_groups": 1},
        ("q_proj",), ("up_proj", "down_proj"), ("up_proj", "down_proj"),
    ),
}  # fmt: skip

CLIP_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "projection_dim": 16,
}  # fmt: skip
SIGLIP_VISION = {**CLIP_VISION, "model_type": "siglip_vision_model"}
LLAMA_TEXT = {**TEXT, "model_type": "llama", "vocab_size": 80}
M_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}


def pictured(token: int, count: int, pixels: tuple[int, ...], **more: torch.Tensor) -> Callable[[], Tensors]:
    """Words around ``count`` times the picture's token, and pixels."""
    words = torch.tensor([[5, *[token] * count, 6, 7]])
    values = torch.linspace(-1, 1, torch.Size(pixels).numel()).view(pixels).sin()
    return lambda: {"input_ids": words, "pixel_values": values, **more}


QWEN_PICTURE: dict[str, torch.Tensor] = {
    "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0, 0]])
}  # fmt: skip

SEEING: dict[str, Kind] = {
    "llava": Kind(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": LLAMA_TEXT, "vision_config": CLIP_VISION, "image_token_index": 70, "image_seq_length": 4},
        ("q_proj", "down_proj", "linear_1", "fc1", "lm_head"), inputs=pictured(70, 4, (1, 3, 16, 16)),
    ),
    "llava_next": Kind(
        "LlavaNextForConditionalGeneration", "LlavaNextConfig",
        {"text_config": LLAMA_TEXT, "vision_config": CLIP_VISION, "image_token_index": 70},
        ("q_proj", "down_proj", "linear_1"),
    ),
    "qwen2_vl": Kind(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {"text_config": {**TEXT, **M_ROPE, "vocab_size": 80}, "image_token_id": 70, "tie_word_embeddings": False,
         "vision_config": {"depth": 1, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "patch_size": 8,
                           "mlp_ratio": 2}},
        ("q_proj", "qkv", "fc1", "lm_head"), inputs=pictured(70, 4, (16, 384), **QWEN_PICTURE),
    ),
    "qwen2_5_vl": Kind(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"text_config": {**TEXT, **M_ROPE, "vocab_size": 80}, "image_token_id": 70, "tie_word_embeddings": False,
         "vision_config": {"depth": 1, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "patch_size": 8,
                           "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [0]}},
        ("q_proj", "qkv", "gate_proj"), inputs=pictured(70, 4, (16, 384), **QWEN_PICTURE),
    ),
    "gemma3": Kind(
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": {**TEXT, "vocab_size": 80, "tie_word_embeddings": True}, "vision_config": SIGLIP_VISION,
         "image_token_index": 70, "mm_tokens_per_image": 4},
        ("q_proj", "down_proj", "out_proj"), inputs=pictured(70, 4, (1, 3, 16, 16)),
    ),
    "paligemma": Kind(
        "PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
        {"text_config": {**TEXT, "model_type": "gemma", "vocab_size": 80, "tie_word_embeddings": True},
         "vision_config": SIGLIP_VISION, "image_token_index": 70, "projection_dim": 32},
        ("q_proj", "linear", "out_proj"), inputs=pictured(70, 4, (1, 3, 16, 16)),
    ),
    "mistral3": Kind(
        "Mistral3ForConditionalGeneration", "Mistral3Config",
        {"text_config": {**TEXT, "model_type": "mistral", "vocab_size": 80}, "image_token_index": 70,
         "vision_config": {"model_type": "pixtral", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "head_dim": 12}},
        ("q_proj", "linear_1", "gate_proj"),
    ),
    "mllama": Kind(
        "MllamaForConditionalGeneration", "MllamaConfig",
        {"text_config": {**TEXT, "cross_attention_layers": [1], "vocab_size": 80},
         "vision_config": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_global_layers": 1,
                           "attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 48,
                           "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2]],
                           "intermediate_layers_indices": [0]}},
        ("q_proj", "down_proj"),
    ),
    "internvl": Kind(
        "InternVLForConditionalGeneration", "InternVLConfig",
        {"text_config": {**TEXT, "model_type": "qwen2", "vocab_size": 80}, "image_token_id": 70,
         "vision_config": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "image_size": [16, 16], "patch_size": [4, 4]}},
        ("q_proj", "linear_1", "fc1"),
    ),
}  # fmt: skip

OTHERS: dict[str, Kind] = {
    "gpt_neox": Kind(
        "GPTNeoXForCausalLM", "GPTNeoXConfig",
        {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "tie_word_embeddings": False},
        ("query_key_value", "dense_h_to_4h", "lm_head"),
    ),
    "falcon": Kind(
        "FalconForCausalLM", "FalconConfig",
        {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
         "new_decoder_architecture": True},
        ("query_key_value", "dense"),
    ),
    "phi3": Kind("Phi3ForCausalLM", "Phi3Config", TEXT, ("qkv_proj", "gate_up_proj", "lm_head")),
    "nomic_bert": Kind(
        "NomicBertForMaskedLM", "NomicBertConfig",
        {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64},
        ("q_proj", "v_proj", "gate_proj", "down_proj"),
    ),
    "modernbert": Kind(
        "ModernBertForMaskedLM", "ModernBertConfig",
        {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "eos_token_id": 2,
         "bos_token_id": 1},
        ("Wqkv", "Wi", "Wo"),
    ),
    "clip": Kind(
        "CLIPModel", "CLIPConfig",
        {"text_config": {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "eos_token_id": 2},
         "vision_config": CLIP_VISION, "projection_dim": 16},
        ("q_proj", "fc1", "text_projection"), inputs=pictured(8, 3, (1, 3, 16, 16)),
    ),
    "siglip": Kind(
        "SiglipModel", "SiglipConfig",
        {"text_config": {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
                         "num_attention_heads": 4},
         "vision_config": SIGLIP_VISION},
        ("q_proj", "fc1"), inputs=pictured(8, 3, (1, 3, 16, 16)),
    ),
    "whisper": Kind(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {"vocab_size": 61, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "num_mel_bins": 20,
         "max_source_positions": 30, "max_target_positions": 30, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
        ("q_proj", "fc1"),
        inputs=lambda: {
            "input_features": torch.linspace(-1, 1, 2 * 20 * 60).view(2, 20, 60).cos(),
            "decoder_input_ids": torch.arange(4, 14).view(2, 5),
        },
    ),
}  # fmt: skip

KINDS = {**MIXTURES, **SEEING, **OTHERS}
