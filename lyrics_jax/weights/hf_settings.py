"""A run's configuration in Hugging Face's words: the JSON files of an exported directory.

Written as plain dictionaries, in names that transformers 4.57 and 5 both read, and not by its classes, which write the
form of the version that is installed.
"""

from lyrics_jax.config import Config
from lyrics_jax.data.tokenizers import LLMTokenizer
from lyrics_jax.weights.lyrics_names import LLAMA_LAYER
from lyrics_jax.models.clip import PIXEL_MEAN, PIXEL_STD

PROCESSOR = "processor_config.json"
MAX_NEW_TOKENS = 96  # of an answer, where a generation says nothing else


def model_settings(config: Config, apart: bool) -> dict:
  """`config.json`; `apart`: the language model's own weights are not in the directory."""
  vision, former, llm = config.model.vision, config.model.mq_former, config.model.llm
  align = config.stage == "align"
  name = "LyricsForAlignment" if align else "LyricsForConditionalGeneration"
  classes = ["AutoModel"] if align else ["AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"]
  settings = {
      "architectures": [name],
      "auto_map": {"AutoConfig": f"configuration_lyrics.{'LyricsAlignmentConfig' if align else 'LyricsConfig'}",
                   **{each: f"modeling_lyrics.{name}" for each in classes}},
      "model_type": "lyrics_alignment" if align else "lyrics",
      "dtype": config.model.dtype,
      "vision_kind": vision.kind,
      "feature_width": config.model.refiner.feature_width,
      "instruction_aware": config.instruct.instruction_aware,
      "spatial_to_mq_former": config.instruct.spatial_to_mq_former,
      "itc_pooling": config.align.itc_pooling,
      "language_model_apart": apart,
      "vision_config": {
          "model_type": "clip_vision_model", "image_size": vision.image_size, "patch_size": vision.patch_size,
          "hidden_size": vision.width, "num_hidden_layers": vision.layers, "num_attention_heads": vision.heads,
          "intermediate_size": vision.mlp_dim, "layer_norm_eps": vision.norm_eps,
          "hidden_act": {"clip": "quick_gelu", "eva": "gelu"}[vision.kind]},
      "mq_former_config": {
          "model_type": "lyrics_mq_former", "hidden_size": former.width, "num_hidden_layers": former.layers,
          "num_attention_heads": former.heads, "intermediate_size": former.mlp_dim,
          "visual_queries": former.visual_queries, "grounding_queries": former.grounding_queries,
          "cross_attention_frequency": former.cross_attention_frequency, "hidden_act": former.activation,
          "vocab_size": former.vocab_size, "max_position_embeddings": former.max_positions,
          "restart_positions": former.restart_positions, "hidden_dropout_prob": former.dropout,
          "layer_norm_eps": former.norm_eps, "itc_width": former.itc_width},
      "tie_word_embeddings": False,
  }
  return settings if align else settings | {
      "text_config": {
          "model_type": "llama", "vocab_size": llm.vocab_size, "hidden_size": llm.width,
          "num_hidden_layers": llm.layers, "num_attention_heads": llm.heads, "num_key_value_heads": llm.kv_heads,
          "head_dim": llm.width // llm.heads, "intermediate_size": llm.mlp_dim, "rope_theta": llm.rope_theta,
          "rms_norm_eps": llm.norm_eps, "max_position_embeddings": llm.max_positions, "tie_word_embeddings": False},
  }


def generation_settings(tokenizer: LLMTokenizer) -> dict:
  """`generation_config.json`: greedy decoding, as in evaluation."""
  return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad,
          "do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}


def processor_settings(config: Config) -> dict:
  """`processor_config.json`: how pictures and texts were made into the model's inputs."""
  data, refiner, former, instruct = config.data, config.model.refiner, config.model.mq_former, config.instruct
  shared = {
      "processor_class": "LyricsProcessor",
      "auto_map": {"AutoProcessor": "processing_lyrics.LyricsProcessor"},
      "image_size": config.model.vision.image_size, "image_mean": list(PIXEL_MEAN), "image_std": list(PIXEL_STD),
      "use_refiner": config.model.use_refiner, "feature_width": refiner.feature_width,
      "detection_rows": refiner.detection_rows, "mask_rows": refiner.mask_rows, "coordinates": data.coordinates,
      "spatial_length": data.spatial_length, "caption_length": data.caption_length,
  }
  if config.stage == "align":
    return shared
  return shared | {
      "llm_length": data.llm_length, "image_tokens": former.visual_queries + former.grounding_queries,
      "system_message": instruct.system_message, "instruction_aware": instruct.instruction_aware,
      "spatial_to_mq_former": instruct.spatial_to_mq_former, "spatial_to_llm": instruct.spatial_to_llm,
  }


def adapter_settings(config: Config) -> dict:
  """`adapter_config.json` of PEFT."""
  lora = config.model.llm.lora
  return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha,
          "lora_dropout": lora.dropout, "bias": "none", "inference_mode": True, "base_model_name_or_path": None,
          "target_modules": [LLAMA_LAYER[name].split(".")[-1] for name in lora.targets]}
