"""Configuration of the Lyrics vision-language models (arXiv 2312.05278) for Hugging Face transformers."""

from transformers import CLIPVisionConfig, LlamaConfig, PretrainedConfig


class LyricsMQFormerConfig(PretrainedConfig):
  """Multi-scale Querying Transformer (section 3.1 of the paper); the defaults are its published size.

  Args:
    cross_attention_frequency: f where layers 0, f, 2f, ... have cross-attention.
    restart_positions: whether the positions of the caption or instruction begin at 0 again after the spatial
      representation.
    itc_width: the width of the features by which image and text are compared.
  """
  model_type = "lyrics_mq_former"
  base_config_key = "mq_former_config"

  def __init__(self, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
               visual_queries=32, grounding_queries=32, cross_attention_frequency=2, hidden_act="relu",
               vocab_size=30592, max_position_embeddings=512, restart_positions=True, hidden_dropout_prob=0.1,
               layer_norm_eps=1e-12, itc_width=256, **kwargs):
    self.hidden_size = hidden_size
    self.num_hidden_layers = num_hidden_layers
    self.num_attention_heads = num_attention_heads
    self.intermediate_size = intermediate_size
    self.visual_queries = visual_queries
    self.grounding_queries = grounding_queries
    self.cross_attention_frequency = cross_attention_frequency
    self.hidden_act = hidden_act
    self.vocab_size = vocab_size
    self.max_position_embeddings = max_position_embeddings
    self.restart_positions = restart_positions
    self.hidden_dropout_prob = hidden_dropout_prob
    self.layer_norm_eps = layer_norm_eps
    self.itc_width = itc_width
    super().__init__(**kwargs)


class LyricsConfig(PretrainedConfig):
  """The configuration of `LyricsForConditionalGeneration`.

  Args:
    vision_config, mq_former_config, text_config: of image encoder, MQ-Former and LLaMA; objects or dictionaries.
    vision_kind: "clip", or "eva" for EVA-CLIP as in BLIP-2: no norm before the first block, a bias on the patches.
    feature_width: of the refiner's features. A local token is a feature and its box, `feature_width + 4` wide.
    instruction_aware: whether the MQ-Former reads the instruction.
    spatial_to_mq_former: whether the MQ-Former reads the spatial representation.
    language_model_apart: whether LLaMA's weights are missing here. The user then gives a LLaMA to the model, with the
      adapter in `adapter/`.
    itc_pooling: "mean" compares a picture by its pooled queries, "max" by its most similar query.
  """
  model_type = "lyrics"
  sub_configs = {"vision_config": CLIPVisionConfig, "mq_former_config": LyricsMQFormerConfig,
                 "text_config": LlamaConfig}

  def __init__(self, vision_config=None, mq_former_config=None, text_config=None, vision_kind="clip", feature_width=256,
               instruction_aware=True, spatial_to_mq_former=True, language_model_apart=False, itc_pooling="mean",
               **kwargs):
    self.vision_config = _make(CLIPVisionConfig, vision_config)
    self.mq_former_config = _make(LyricsMQFormerConfig, mq_former_config)
    self.text_config = _make(LlamaConfig, text_config) if "text_config" in self.sub_configs else None
    self.vision_kind = vision_kind
    self.feature_width = feature_width
    self.instruction_aware = instruction_aware
    self.spatial_to_mq_former = spatial_to_mq_former
    self.language_model_apart = language_model_apart
    self.itc_pooling = itc_pooling
    super().__init__(**kwargs)


class LyricsAlignmentConfig(LyricsConfig):
  """The configuration of `LyricsForAlignment`: the same without a language model."""
  model_type = "lyrics_alignment"
  sub_configs = {"vision_config": CLIPVisionConfig, "mq_former_config": LyricsMQFormerConfig}

  def __init__(self, **kwargs):  # transformers 5 would write another `__init__` here
    super().__init__(**kwargs)


def _make(kind: type, given: PretrainedConfig | dict | None) -> PretrainedConfig:
  if given is None or isinstance(given, dict):
    return kind(**(given or {}))
  return given
