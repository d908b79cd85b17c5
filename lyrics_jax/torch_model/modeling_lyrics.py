"""Lyrics vision-language models (arXiv 2312.05278) in PyTorch: `LyricsForConditionalGeneration`, which talks about a
picture, and `LyricsForAlignment`, which compares pictures and texts. `LyricsProcessor` makes their inputs.

CLIP's image encoder sees the picture. An offline refiner (tags, boxes, masks) has turned the objects in it into local
tokens and into a text, the spatial representation. The MQ-Former's queries look at all of it. In shapes, B is the
number of pictures and D the width of the model at hand.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel, GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from .configuration_lyrics import LyricsAlignmentConfig, LyricsConfig, LyricsMQFormerConfig

# The four segments of a sequence: visual and grounding queries, spatial representation, caption or instruction.
SEGMENTS = V, G, S, C = range(4)
Ids = tuple[torch.Tensor, torch.Tensor]  # int64[B, T] token ids, and bool[B, T], False on padding


@dataclasses.dataclass(frozen=True)
class Visibility:
  """Which segments each of V, G, S, C attends to. `causal` restricts C to its own past."""
  V: str = "VG"
  G: str = "VG"
  S: str = ""
  C: str = ""
  causal: bool = False

  def mask(self, counts: list[int], valid: torch.Tensor) -> torch.Tensor:
    """bool[B, 1, T, T]: may the row look at the column.

    Args:
      counts: how many tokens each segment has.
      valid: bool[B, T], False on padding.
    """
    device = valid.device
    table = []
    for row in (self.V, self.G, self.S, self.C):
      table.append([column in row for column in "VGSC"])
    segment = torch.repeat_interleave(torch.tensor(SEGMENTS, device=device), torch.tensor(counts, device=device))
    allowed = torch.tensor(table, device=device)[segment][:, segment]
    if self.causal:
      within = (segment == C)[:, None] & (segment == C)[None]
      allowed = allowed & ~(within & torch.ones_like(allowed).triu(1))
    return allowed[None, None] & valid[:, None, None, :]


# Section 3.2 of the paper; queries never look at text in ITC, ICG and MSP.
ITC = Visibility(S="SC", C="SC")
ITM = Visibility(V="VC", G="GS", S="GS", C="VC")
ICG = Visibility(C="VGC", causal=True)
MSP = Visibility(S="VGS")
INSTRUCT = Visibility(V="VGSC", G="VGSC", S="VGSC", C="VGSC")  # section 3.3


@dataclasses.dataclass
class Features:
  """What queries look at: image tokens [B, Ti, Di], local tokens [B, Tl, D], and bool[B, Tl], False on padding.

  The local ones are None for a model without grounding queries.
  """
  image: torch.Tensor
  local: torch.Tensor | None = None
  local_mask: torch.Tensor | None = None


class Attention(nn.Module):
  """Multi-head attention with output projection, residual and post-norm. Who may look nowhere takes in nothing."""

  def __init__(self, config: LyricsMQFormerConfig, key_width: int):
    super().__init__()
    width, self.heads = config.hidden_size, config.num_attention_heads
    self.q = nn.Linear(width, width)
    self.k = nn.Linear(key_width, width)
    self.v = nn.Linear(key_width, width)
    self.o = nn.Linear(width, width)
    self.norm = nn.LayerNorm(width, config.layer_norm_eps)
    self.dropout = nn.Dropout(config.hidden_dropout_prob)

  def forward(self, x: torch.Tensor, attended: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x: [B, T, D]; attended: [B, S, D']; mask: bool[B, 1, T or 1, S], or None for everywhere."""
    query, key, value = self._by_head(self.q(x)), self._by_head(self.k(attended)), self._by_head(self.v(attended))
    if mask is None:
      y = F.scaled_dot_product_attention(query, key, value)
    else:
      blind = ~mask.any(-1, keepdim=True)  # a softmax over nothing would be no number
      y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask | blind).masked_fill(blind, 0)
    return self.norm(x + self.dropout(self.o(y.transpose(1, 2).flatten(2))))

  def _by_head(self, x: torch.Tensor) -> torch.Tensor:
    """[B, T, D] -> [B, H, T, D / H]."""
    return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
  """Two linear maps, residual and post-norm: [B, T, D] -> [B, T, D]."""

  def __init__(self, config: LyricsMQFormerConfig):
    super().__init__()
    self.up = nn.Linear(config.hidden_size, config.intermediate_size)
    self.down = nn.Linear(config.intermediate_size, config.hidden_size)
    self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
    self.activation = {"relu": F.relu, "gelu": F.gelu}[config.hidden_act]
    self.dropout = nn.Dropout(config.hidden_dropout_prob)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.norm(x + self.dropout(self.down(self.activation(self.up(x)))))


class MQFormerLayer(nn.Module):
  """Queries and text share the self-attention. Each kind of query has a cross-attention, each side a feed-forward."""

  def __init__(self, config: LyricsMQFormerConfig, image_width: int, cross: bool):
    super().__init__()
    self.visual_queries = config.visual_queries
    grounding = cross and config.grounding_queries > 0
    self.self_attention = Attention(config, config.hidden_size)
    self.visual_attention = Attention(config, image_width) if cross else None
    self.grounding_attention = Attention(config, config.hidden_size) if grounding else None
    self.query_mlp = FeedForward(config)
    self.text_mlp = FeedForward(config)

  def forward(self, hidden: torch.Tensor, queries: int, mask: torch.Tensor, features: Features | None) -> torch.Tensor:
    """hidden: [B, T, D], of which the first `queries` are queries; mask: bool[B, 1, T, T]."""
    hidden = self.self_attention(hidden, hidden, mask)
    parts = []
    if queries:
      parts.append(self.query_mlp(self._cross_attend(hidden[:, :queries], features)))
    if hidden.shape[1] > queries:
      parts.append(self.text_mlp(hidden[:, queries:]))
    return torch.cat(parts, dim=1)

  def _cross_attend(self, queries: torch.Tensor, features: Features) -> torch.Tensor:
    if self.visual_attention is None:
      return queries
    visual, grounding = queries[:, :self.visual_queries], queries[:, self.visual_queries:]
    visual = self.visual_attention(visual, features.image, None)
    if self.grounding_attention is None:
      return visual
    grounding = self.grounding_attention(grounding, features.local, features.local_mask[:, None, None, :])
    return torch.cat([visual, grounding], dim=1)


class MQFormer(nn.Module):
  """The Multi-scale Querying Transformer (section 3.1). `image_width` is the width of the image encoder's tokens."""

  def __init__(self, config: LyricsMQFormerConfig, image_width: int):
    super().__init__()
    self.config = config
    width = config.hidden_size
    self.queries = nn.Parameter(torch.zeros(config.visual_queries + config.grounding_queries, width))
    self.words = nn.Embedding(config.vocab_size, width)
    self.positions = nn.Embedding(config.max_position_embeddings, width)
    self.norm = nn.LayerNorm(width, config.layer_norm_eps)
    self.dropout = nn.Dropout(config.hidden_dropout_prob)
    self.layers = nn.ModuleList()
    for number in range(config.num_hidden_layers):
      self.layers.append(MQFormerLayer(config, image_width, cross=number % config.cross_attention_frequency == 0))

  def forward(self, visibility: Visibility, features: Features | None = None, spatial: Ids | None = None,
              caption: Ids | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the queries [B, Q, D], none without `features`, and of both texts [B, Ts + Tc, D]."""
    embedded, valid, counts = [], [], [0, 0, 0, 0]
    if features is not None:
      embedded.append(self.queries.expand(len(features.image), -1, -1))
      valid.append(torch.ones(embedded[0].shape[:2], dtype=torch.bool, device=embedded[0].device))
      counts[V:S] = self.config.visual_queries, self.config.grounding_queries
    start = 0
    for segment, text in ((S, spatial), (C, caption)):
      if text is not None:
        ids, mask = text[0], text[1].bool()
        places = start + torch.arange(ids.shape[1], device=ids.device)
        embedded.append(self.words(ids) + self.positions(places))
        valid.append(mask)
        counts[segment] = ids.shape[1]
        if not self.config.restart_positions:
          start = mask.sum(1, keepdim=True)
    hidden = self.dropout(self.norm(torch.cat(embedded, dim=1)))
    mask, queries = visibility.mask(counts, torch.cat(valid, dim=1)), counts[V] + counts[G]
    for layer in self.layers:
      hidden = layer(hidden, queries, mask, features)
    return hidden[:, :queries], hidden[:, queries:]

  def pool(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the visual and of the grounding queries, each [B, D]."""
    visual = self.config.visual_queries
    return queries[:, :visual].mean(1), queries[:, visual:].mean(1)


class LocalTokens(nn.Module):
  """The refiner's detection rows and mask features as one token sequence; each kind has its linear map and source."""

  def __init__(self, feature_width: int, width: int):
    super().__init__()
    self.feature_width = feature_width
    self.detection = nn.Linear(feature_width + 4, width)
    self.mask = nn.Linear(feature_width + 4, width)
    self.source = nn.Parameter(torch.zeros(2, width))

  def forward(self, detection: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """[B, N, 260] and [B, M, 260] -> [B, N + M, D]; the last four columns are the box, cxcywh in [0, 1]."""
    return torch.cat([self.detection(detection) + self.source[0], self.mask(masks) + self.source[1]], dim=1)

  def rows(self, pixels: torch.Tensor, rows: torch.Tensor | None, mask: torch.Tensor | None) -> tuple:
    """Rows [B, N, 260] in the dtype of the parameters, and bool[B, N]. No rows become one masked row per picture."""
    if rows is None:
      rows = pixels.new_zeros(len(pixels), 1, self.feature_width + 4)
      mask = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
    elif mask is None:
      mask = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    return rows.to(self.source.dtype), mask.bool()


class LMHead(nn.Module):
  """BERT's prediction head; the output words are the word embedding."""

  def __init__(self, config: LyricsMQFormerConfig):
    super().__init__()
    self.dense = nn.Linear(config.hidden_size, config.hidden_size)
    self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
    self.bias = nn.Parameter(torch.zeros(config.vocab_size))

  def forward(self, hidden: torch.Tensor, words: nn.Embedding) -> torch.Tensor:
    return F.linear(self.norm(F.gelu(self.dense(hidden))), words.weight, self.bias)


class LyricsPreTrainedModel(PreTrainedModel):
  """What both models have: image encoder, local tokens and MQ-Former."""
  config_class = LyricsConfig
  base_model_prefix = ""
  _no_split_modules = ["CLIPVisionEmbeddings", "CLIPEncoderLayer", "MQFormerLayer", "LlamaDecoderLayer"]
  _supports_sdpa = True
  _supports_flash_attn = True  # in CLIP and LLaMA; the MQ-Former's masks need scaled_dot_product_attention

  def __init__(self, config: LyricsConfig):
    super().__init__(config)
    vision = CLIPVisionModel(config.vision_config)
    self.vision_model = getattr(vision, "vision_model", vision)  # before transformers 5 CLIPVisionModel wraps it
    self.vision_model.post_layernorm = nn.Identity()  # of the pooled output, which nothing reads
    if config.vision_kind == "eva":
      patch = self.vision_model.embeddings.patch_embedding
      self.vision_model.embeddings.patch_embedding = nn.Conv2d(patch.in_channels, patch.out_channels, patch.kernel_size,
                                                               patch.stride)
      self.vision_model.pre_layrnorm = nn.Identity()
    former = config.mq_former_config
    self.image_norm = nn.LayerNorm(config.vision_config.hidden_size, config.vision_config.layer_norm_eps)
    self.local_tokens = LocalTokens(config.feature_width, former.hidden_size) if former.grounding_queries else None
    self.mq_former = MQFormer(former, config.vision_config.hidden_size)

  def see(self, pixel_values: torch.Tensor, detection: torch.Tensor | None = None,
          detection_mask: torch.Tensor | None = None, masks: torch.Tensor | None = None,
          masks_mask: torch.Tensor | None = None) -> Features:
    """What the queries look at.

    Args:
      pixel_values: [B, 3, S, S], normalised by CLIP's mean and standard deviation.
      detection: [B, N, feature_width + 4], the detector's features and boxes (cxcywh in [0, 1]); None for none.
      masks: [B, M, feature_width + 4], features and boxes of the segmenter; None for none.
      detection_mask, masks_mask: bool[B, N] and [B, M], False on padding; None where there is no padding.
    """
    image = self.image_norm(self.vision_model(pixel_values.to(self.image_norm.weight.dtype)).last_hidden_state)
    if self.local_tokens is None:
      return Features(image)
    detection, detection_mask = self.local_tokens.rows(pixel_values, detection, detection_mask)
    masks, masks_mask = self.local_tokens.rows(pixel_values, masks, masks_mask)
    return Features(image, self.local_tokens(detection, masks), torch.cat([detection_mask, masks_mask], dim=1))

  @torch.no_grad()
  def _init_weights(self, module):
    super()._init_weights(module)
    if isinstance(module, MQFormer):
      nn.init.normal_(module.queries, std=0.02)
    elif isinstance(module, LocalTokens):
      nn.init.normal_(module.source, std=0.02)
    elif isinstance(module, LMHead):
      nn.init.zeros_(module.bias)


class LyricsForConditionalGeneration(LyricsPreTrainedModel, GenerationMixin):
  """Answers about a picture: the query outputs become soft tokens at the picture's places in LLaMA's input."""

  _PICTURE = ("pixel_values", "image_slot", "detection", "detection_mask", "masks", "masks_mask", "spatial_ids",
              "spatial_mask", "instruction_ids", "instruction_mask")  # read once, when a generation begins

  def __init__(self, config: LyricsConfig):
    super().__init__(config)
    self.projection = nn.Linear(config.mq_former_config.hidden_size, config.text_config.hidden_size)
    self.language_model = None if config.language_model_apart else LlamaForCausalLM(config.text_config)
    self.post_init()

  def get_input_embeddings(self) -> nn.Module | None:
    return None if self.language_model is None else self.language_model.get_input_embeddings()

  def set_input_embeddings(self, value: nn.Module) -> None:
    self.language_model.set_input_embeddings(value)

  def get_output_embeddings(self) -> nn.Module | None:
    return None if self.language_model is None else self.language_model.get_output_embeddings()

  def set_output_embeddings(self, value: nn.Module) -> None:
    self.language_model.set_output_embeddings(value)

  def query_outputs(self, features: Features, spatial: Ids | None = None,
                    instruction: Ids | None = None) -> torch.Tensor:
    """Hidden states of the queries, [B, Q, D]. Texts count where the configuration says so."""
    spatial = spatial if self.config.spatial_to_mq_former else None
    instruction = instruction if self.config.instruction_aware else None
    visibility = INSTRUCT if spatial is not None or instruction is not None else ITC
    return self.mq_former(visibility, features, spatial, instruction)[0]

  def soft_tokens(self, features: Features, spatial: Ids | None = None, instruction: Ids | None = None) -> torch.Tensor:
    """What stands for each picture in LLaMA's input, [B, Q, D of LLaMA]."""
    return self.projection(self.query_outputs(features, spatial, instruction))

  def embed(self, words: torch.Tensor, soft: torch.Tensor, image_slot: torch.Tensor) -> torch.Tensor:
    """The words [B, T, D], and where `image_slot` [B, T'] is not negative the soft token of that number.

    Without a cache a generation passes its growing answer again, behind the T' tokens of the prompt.
    """
    slot = F.pad(image_slot.to(soft.device), (0, words.shape[1] - image_slot.shape[1]), value=-1)[..., None]
    placed = soft.gather(1, slot.clamp(min=0).expand(-1, -1, soft.shape[-1]))
    return torch.where(slot >= 0, placed, words)

  def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
              position_ids: torch.Tensor | None = None, past_key_values=None, inputs_embeds: torch.Tensor | None = None,
              labels: torch.Tensor | None = None, pixel_values: torch.Tensor | None = None,
              image_slot: torch.Tensor | None = None, detection: torch.Tensor | None = None,
              detection_mask: torch.Tensor | None = None, masks: torch.Tensor | None = None,
              masks_mask: torch.Tensor | None = None, spatial_ids: torch.Tensor | None = None,
              spatial_mask: torch.Tensor | None = None, instruction_ids: torch.Tensor | None = None,
              instruction_mask: torch.Tensor | None = None, **kwargs) -> CausalLMOutputWithPast:
    """LLaMA's output for conversations about pictures, all of it made by `LyricsProcessor`.

    Args:
      input_ids: int64[B, T]; what stands at the picture's places does not matter.
      image_slot: int64[B, T], the number of the soft token at each of the picture's places, -1 elsewhere.
      pixel_values, detection, detection_mask, masks, masks_mask: see `see`; without pixel_values there is no picture.
      spatial_ids, instruction_ids: int64[B, Ts], [B, Ti], the MQ-Former's texts; *_mask: False on padding.
      labels: int64[B, T], -100 where nothing is trained.
    """
    if self.language_model is None:
      raise ValueError("this directory holds no LLaMA: set model.language_model to one, with the adapter in adapter/")
    if inputs_embeds is None:
      inputs_embeds = self.get_input_embeddings()(input_ids)
    if pixel_values is not None:
      features = self.see(pixel_values, detection, detection_mask, masks, masks_mask)
      spatial = None if spatial_ids is None else (spatial_ids, spatial_mask)
      instruction = None if instruction_ids is None else (instruction_ids, instruction_mask)
      soft = self.soft_tokens(features, spatial, instruction).to(inputs_embeds)
      inputs_embeds = self.embed(inputs_embeds, soft, image_slot)
    return self.language_model(attention_mask=attention_mask, position_ids=position_ids, labels=labels,
                               past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs)

  def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
    inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
    begun = past_key_values is not None and past_key_values.get_seq_length() > 0
    for name in self._PICTURE:
      inputs.pop(name, None)
      if not begun and kwargs.get(name) is not None:
        inputs[name] = kwargs[name]
    return inputs


@dataclasses.dataclass
class LyricsAlignmentOutput(ModelOutput):
  """Of B pairs: `image_features` [B, N, itc_width] and `text_features` [B, itc_width], both of length 1.

  The others are the results of the methods of `LyricsForAlignment`: `logits_per_image` of `similarity`, `itm_logits` of
  `match`, `icg_logits` of `caption_logits` and `msp_logits` of `spatial_logits`.
  """
  image_features: torch.Tensor | None = None
  text_features: torch.Tensor | None = None
  logits_per_image: torch.Tensor | None = None
  itm_logits: torch.Tensor | None = None
  icg_logits: torch.Tensor | None = None
  msp_logits: torch.Tensor | None = None


class LyricsForAlignment(LyricsPreTrainedModel):
  """Stage 1 (section 3.2): how well picture and text agree, captions, and masked tags and boxes."""
  config_class = LyricsAlignmentConfig

  def __init__(self, config: LyricsAlignmentConfig):
    super().__init__(config)
    width, itc_width = config.mq_former_config.hidden_size, config.mq_former_config.itc_width
    self.itc_image = nn.Linear(2 * width, itc_width)
    self.itc_text = nn.Linear(2 * width, itc_width)
    self.temperature = nn.Parameter(torch.tensor(0.07))
    self.itm = nn.Linear(width, 2)
    self.lm_head = LMHead(config.mq_former_config)
    self.post_init()

  def encode_images(self, features: Features) -> torch.Tensor:
    """[B, N, itc_width], of length 1: one pooled feature, or with "max" pooling one of each query."""
    queries = self.mq_former(ITC, features)[0]
    if self.config.itc_pooling == "mean":
      return F.normalize(self.itc_image(torch.cat(self.mq_former.pool(queries), dim=-1)), dim=-1)[:, None]
    visual, width = self.config.mq_former_config.visual_queries, queries.shape[-1]
    first_half, second_half = F.pad(queries[:, :visual], (0, width)), F.pad(queries[:, visual:], (width, 0))
    return F.normalize(self.itc_image(torch.cat([first_half, second_half], dim=1)), dim=-1)

  def encode_texts(self, spatial: Ids, caption: Ids) -> torch.Tensor:
    """[B, itc_width], of length 1, of [BOS] and [CLS], which stand first in the two texts."""
    words = self.mq_former(ITC, None, spatial, caption)[1]
    return F.normalize(self.itc_text(torch.cat([words[:, 0], words[:, spatial[0].shape[1]]], dim=-1)), dim=-1)

  def similarity(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """[B, B], row the picture, column the text, over the learnt temperature; the most similar feature counts."""
    return torch.einsum("ind,jd->inj", images, texts).amax(1) / self.temperature

  def match(self, features: Features, spatial: Ids, caption: Ids) -> torch.Tensor:
    """[B, 2, 2]: logits of (no match, match) by the visual and by the grounding queries."""
    visual, grounding = self.mq_former.pool(self.mq_former(ITM, features, spatial, caption)[0])
    return torch.stack([self.itm(visual), self.itm(grounding)], dim=1)

  def caption_logits(self, features: Features, caption: Ids) -> torch.Tensor:
    """[B, Tc, vocabulary], of the token that follows each token of `[DEC]` caption."""
    return self.lm_head(self.mq_former(ICG, features, None, caption)[1], self.mq_former.words)

  def spatial_logits(self, features: Features, spatial: Ids) -> torch.Tensor:
    """[B, Ts, vocabulary], of the token at each place of `[MLM]` spatial representation, where [MASK] hides it."""
    return self.lm_head(self.mq_former(MSP, features, spatial)[1], self.mq_former.words)

  def forward(self, pixel_values: torch.Tensor, spatial_ids: torch.Tensor, spatial_mask: torch.Tensor,
              caption_ids: torch.Tensor, caption_mask: torch.Tensor, icg_ids: torch.Tensor | None = None,
              msp_ids: torch.Tensor | None = None, detection: torch.Tensor | None = None,
              detection_mask: torch.Tensor | None = None, masks: torch.Tensor | None = None,
              masks_mask: torch.Tensor | None = None, **kwargs) -> LyricsAlignmentOutput:
    """Of B pairs; `icg_ids` and `msp_ids` are the texts that begin with [DEC] and [MLM], masked as the others."""
    features = self.see(pixel_values, detection, detection_mask, masks, masks_mask)
    spatial, caption = (spatial_ids, spatial_mask), (caption_ids, caption_mask)
    images, texts = self.encode_images(features), self.encode_texts(spatial, caption)
    return LyricsAlignmentOutput(
        image_features=images, text_features=texts, logits_per_image=self.similarity(images, texts),
        itm_logits=self.match(features, spatial, caption),
        icg_logits=None if icg_ids is None else self.caption_logits(features, (icg_ids, caption_mask)),
        msp_logits=None if msp_ids is None else self.spatial_logits(features, (msp_ids, spatial_mask)))
