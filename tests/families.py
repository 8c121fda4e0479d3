"""Model families: the causal LM class of each type of model in transformers, as tiny as it can be built."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES: Mapping[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The causal LM class of every `model_type` of which transformers has one."""

IN_CI = (
    *("llama", "qwen3", "gemma2", "mistral"),
    *("phi3", "gpt_neox", "gpt2"),  # fused projections, and transposed ones
    *("mixtral", "deepseek_v3"),  # experts, and latent attention
    *("gemma4_text", "qwen3_5_text", "bloom"),  # shared keys and values, linear attention, no positions
)
"""Families that are widely used, or built in another way than others."""

MOST_PARAMETERS = 5_000_000

Shape = Mapping[str, Any]
IDS: Shape = {"vocab_size": 260, "bos_token_id": 257, "eos_token_id": 256, "pad_token_id": 258}
USUAL: Shape = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
EXPERTS: Shape = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
}
LATENT: Shape = {  # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
GPT: Shape = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
DECODER: Shape = {  # of an encoder-decoder
    **IDS,
    "d_model": 32,
    "max_position_embeddings": 512,
    "max_target_positions": 512,
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_layers", "num_hidden_layers"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim"), 48),
}
MAMBA: Shape = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
DELTA_RULE: Shape = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
DOTS3: Shape = {
    "use_dsa": False,
    "use_sliding_window": False,
    "head_dim": 12,
    "topk_group": 1,
    "shared_experts_intermediate_size": 16,
}
INDEXER: Shape = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
WINDOWS: Shape = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA4: Shape = {
    **USUAL,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 260,
    "sliding_window": 16,
    "global_head_dim": 8,
}
VISION: Shape = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

SHAPES: Mapping[str, Shape] = {
    "axk1": {**USUAL, **EXPERTS, **LATENT},
    "axk2": {**USUAL, **EXPERTS, **LATENT},
    "bailing_hybrid": {**USUAL, **EXPERTS, **LATENT, "layer_types": ["linear_attention", "full_attention"]},
    "bamba": {**USUAL, **MAMBA, "attn_layer_indices": [1]},
    "bart": DECODER,
    "big_bird": {**USUAL, "is_decoder": True, "attention_type": "original_full"},
    "bigbird_pegasus": DECODER,
    "blt": {
        **USUAL,
        "encoder_hash_byte_group_vocab": 64,
        **{
            f"{part}_config": {**USUAL, "hidden_size_global": 32, "vocab_size": 260}
            for part in ("patcher", "encoder", "decoder", "global")
        },
    },
    "blenderbot": DECODER,
    "blenderbot-small": DECODER,
    "bloom": {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": {**GPT, "rotary_dim": 4, "n_ctx": 512},
    "cohere2": {**USUAL, **WINDOWS},
    "cohere_compass_text": {
        **USUAL,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "cpmant": {**IDS, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48, "num_hidden_layers": 2},
    "ctrl": {**GPT, "dff": 48},
    "dbrx": {
        **IDS,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**USUAL, **EXPERTS, **LATENT},
    "deepseek_v3": {**USUAL, **EXPERTS, **LATENT},
    "deepseek_v32": {**USUAL, **EXPERTS, **LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64},
    "dory": {
        **USUAL,
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "dots3_note_text": {**USUAL, **EXPERTS, **LATENT, **DOTS3},
    "emu3": {
        "text_config": USUAL,
        "vq_config": {
            "codebook_size": 16,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 8,
            "hidden_size": 16,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
        },
        "vocabulary_map": {"<image>": 250},
    },
    "exaone4": {**USUAL, **WINDOWS},
    "falcon": {name: value for name, value in USUAL.items() if name != "head_dim"},
    "falcon_h1": {**USUAL, **MAMBA, "mamba_d_ssm": 64},
    "falcon_mamba": {**USUAL, "state_size": 4, "time_step_rank": 4},
    "gemma2": {**USUAL, **WINDOWS},
    "gemma3": {
        "text_config": {**USUAL, **WINDOWS},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 250,
        "boi_token_index": 251,
        "eoi_token_index": 252,
    },
    "gemma3_text": {**USUAL, **WINDOWS},
    "gemma3n_text": {
        **USUAL,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 260,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "sliding_window": 16,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    "gemma4": {"text_config": GEMMA4, "vision_config": None, "audio_config": None, "image_token_id": 250},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            **GEMMA4,
            **dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0),
            "num_kv_shared_layers": 4,
        },
        "backbone_hidden_size": 32,
        "num_centroids": 4,
        "centroid_intermediate_top_k": 2,
    },
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": {**USUAL, **WINDOWS}, "image_token_id": 250},
    "gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text", **USUAL, **WINDOWS, "num_kv_shared_layers": 2},
        "backbone_hidden_size": 32,
        "num_centroids": 4,
        "centroid_intermediate_top_k": 2,
    },
    "gemma4_unified_text": {**USUAL, **WINDOWS, "global_head_dim": 8},
    "git": {**USUAL, "vision_config": VISION},
    "glm4_moe_lite": {**USUAL, **EXPERTS, **LATENT},
    "glm_moe_dsa": {**USUAL, **EXPERTS, **LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64},
    "got_ocr2": {
        "text_config": {"model_type": "qwen2", **USUAL},
        "vision_config": {**VISION, "image_size": 64, "patch_size": 16, "mlp_dim": 48, "output_channels": 8},
        "image_token_index": 250,
    },
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        **IDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 512,
    },
    "gpt_oss": {**USUAL, **EXPERTS, **WINDOWS},
    "gptj": {**GPT, "rotary_dim": 4},
    "granitemoehybrid": {
        **USUAL,
        **EXPERTS,
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 16,
    },
    "hy_v4": {**USUAL, **EXPERTS, **LATENT},
    "jamba": {
        **USUAL,
        **EXPERTS,
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "inkling2_loop_text": {**USUAL, **EXPERTS, "unpadded_vocab_size": 260},
    "inkling2_text": {**USUAL, **EXPERTS, "unpadded_vocab_size": 260},
    "kimi_linear": {**USUAL, **EXPERTS, **LATENT, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {**USUAL, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 8},
    "lfm2_moe": {**USUAL, **EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {**USUAL, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 8},
    "llama4": {"text_config": {**USUAL, **EXPERTS, "num_experts_per_tok": 1}},
    "longcat_flash": {
        **USUAL,
        **EXPERTS,
        **LATENT,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "num_layers": 2,
        "moe_topk": 2,
    },
    "mamba": {**USUAL, "state_size": 4, "time_step_rank": 4},
    "mamba2": {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "num_heads": 8, "n_groups": 2},
    "marian": DECODER,
    "mbart": DECODER,
    "minicpm3": {**USUAL, **LATENT},
    "minimax": {**USUAL, **EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "mistral": {**USUAL, "sliding_window": 16},
    "mllama": {
        "text_config": {**USUAL, "cross_attention_layers": [1]},
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2}
        | {"intermediate_size": 48, "vision_output_dim": 64, "image_size": 28, "intermediate_layers_indices": [0]},
        "image_token_index": 250,
    },
    "modernbert-decoder": {
        **USUAL,
        "local_attention": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "moss_transcribe_diarize": {
        "text_config": {"model_type": "qwen3", **USUAL},
        "audio_config": {**VISION, "num_mel_bins": 8, "max_source_positions": 16},
        "audio_token_id": 250,
    },
    "mpt": {**IDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "mvp": DECODER,
    "nemotron_h": {
        **USUAL,
        **EXPERTS,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 16,
    },
    "olmo3": {**USUAL, **WINDOWS},
    "olmo_hybrid": {**USUAL, **DELTA_RULE},
    "openai-gpt": {**GPT, "afn": "gelu"},
    "opt": {
        **IDS,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "pegasus": DECODER,
    "phi4_multimodal": {
        **USUAL,
        "vision_config": {**VISION, "crop_size": 28},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 1,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "input_size": 8,
            "nemo_conv_channels": 8,
        },
    },
    "plbart": DECODER,
    "prophetnet": {
        **IDS,
        "hidden_size": 32,
        "max_position_embeddings": 512,
        **{f"num_{part}_layers": 2 for part in ("encoder", "decoder")},
        **{f"num_{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
    },
    "qwen3_5": {"text_config": {**USUAL, **DELTA_RULE}},
    "qwen3_5_moe": {"text_config": {**USUAL, **EXPERTS, **DELTA_RULE}},
    "qwen3_5_moe_text": {**USUAL, **EXPERTS, **DELTA_RULE},
    "qwen3_5_text": {**USUAL, **DELTA_RULE},
    "qwen3_next": {**USUAL, **EXPERTS, **DELTA_RULE},
    "qwen4_exp": {"text_config": {**USUAL, **EXPERTS, **DELTA_RULE, **INDEXER}},
    "qwen4_exp_text": {**USUAL, **EXPERTS, **DELTA_RULE, **INDEXER},
    "recurrent_gemma": {**USUAL, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    "reformer": {
        **IDS,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_head_size": 16,
        "attn_layers": ["local", "local"],
        "is_decoder": True,
        "feed_forward_size": 48,
        "axial_pos_embds": False,
        "max_position_embeddings": 512,
    },
    "roc_bert": {**USUAL, "is_decoder": True, "pronunciation_vocab_size": 260, "shape_vocab_size": 260},
    "rwkv": {**USUAL, "attention_hidden_size": 32, "context_length": 128},
    "sarvam_mla": {**USUAL, **EXPERTS, **LATENT},
    "trocr": DECODER,
    "whisper": DECODER,
    "xglm": DECODER,
    "xlm": {**IDS, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True, "n_words": 260},
    "xlnet": {**IDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "xlstm": {**IDS, "hidden_size": 64, "embedding_dim": 64, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 4}
    | {"chunk_size": 16},
    "xmod": {**USUAL, "is_decoder": True, "default_language": "en_XX"},
    "youtu": {**USUAL, **LATENT},
    "zamba": {
        **USUAL,
        "num_hidden_layers": 6,
        "layer_types": ["mamba", "mamba", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 1,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        **USUAL,
        "num_hidden_layers": 5,
        "layer_types": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [2, 4],
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "adapter_rank": 4,
        "use_mamba_kernels": False,
    },
    "zaya": {**USUAL, **EXPERTS, "num_experts_per_tok": 1},
}
"""The config of a family where the usual one, with experts and as a decoder, is not tiny or makes no model."""

_OF_GEMMA4 = "a draft of Gemma 4, which reads the states of the model that it drafts for"
_OF_MUSICGEN = "speaks codes of sound, several at a time, and no text"
NOT_BUILT: Mapping[str, str] = {
    "dots3_note": "the text model of `dots3_note_text` behind images and sound, whose towers have no tiny shape",
    "gemma3n": "the text model of `gemma3n_text` behind images, whose tower needs the package timm",
    "gemma4_assistant": _OF_GEMMA4,
    "gemma4_unified_assistant": _OF_GEMMA4,
    "musicgen": _OF_MUSICGEN,
    "musicgen_melody": _OF_MUSICGEN,
}
"""Why there is no tiny model of a family that could be walked."""


def build(family: str) -> PreTrainedModel:
    """Makes a tiny model of random weights, which are large enough that its logits depend on every layer."""
    config = CONFIG_MAPPING[family](**SHAPES.get(family, {**USUAL, **EXPERTS, "is_decoder": True}))
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert num_parameters < MOST_PARAMETERS, f"{family} has {num_parameters:,} parameters; give it a shape in SHAPES"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Some classes force the last token, or forbid repetitions.
    model.generation_config = GenerationConfig(**{name: IDS[name] for name in IDS if name != "vocab_size"})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model
