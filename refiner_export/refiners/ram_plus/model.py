"""RAM++, the Recognize Anything Plus model (Huang et al. 2023, Open-Set Image Tagging with Multi-Grained Text
Supervision): how much each tag of a list is in a picture.

Each tag comes with many descriptions, embedded once by CLIP's text encoder. A picture chooses among a tag's
descriptions, their weighted sum becomes the tag's query, and a decoder without self-attention lets each query look at
the picture. Parameters are named as in the official checkpoint.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from refiner_export.refiners.ram_plus.swin import SWIN_B, SWIN_L, Swin, SwinConfig


@dataclasses.dataclass(frozen=True)
class RamPlusConfig:
  """Sizes of a RAM++.

  Attributes:
    swin: of the image encoder.
    tags: how many the model knows.
    descriptions: of each tag.
    text_width: of CLIP's embeddings, into which the picture is projected too.
    width: of the tagging head; its feed-forward layers have four times as much.
    layers, heads: of the tagging head.
  """
  swin: SwinConfig
  tags: int = 4585
  descriptions: int = 51
  text_width: int = 512
  width: int = 768
  layers: int = 2
  heads: int = 4


RAM_PLUS_SWIN_L = RamPlusConfig(SWIN_L)
RAM_PLUS_SWIN_B = RamPlusConfig(SWIN_B)


class RamPlusModel(nn.Module):
  """The model; `label_embed` holds each tag's descriptions one after another, not normalised."""

  def __init__(self, config: RamPlusConfig):
    super().__init__()
    self.config = config
    self.visual_encoder = Swin(config.swin)
    self.image_proj = nn.Linear(config.swin.output_width, config.text_width)
    self.label_embed = nn.Parameter(torch.zeros(config.tags * config.descriptions, config.text_width))
    self.reweight_scale = nn.Parameter(torch.zeros(()))
    self.wordvec_proj = nn.Linear(config.text_width, config.width)
    self.tagging_head = _TaggingHead(config)
    self.fc = nn.Linear(config.width, 1)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3, image_size, image_size), normalised -> float32 (B, tags), a logit of each tag."""
    return self.classify(self.encode(images))

  def encode(self, images: torch.Tensor) -> torch.Tensor:
    """The picture in CLIP's space: (B, 1 + patches, text_width), first the mean of all patches, then each patch."""
    patches = self.visual_encoder(images)
    return self.image_proj(torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1))

  def classify(self, features: torch.Tensor) -> torch.Tensor:
    """What `encode` gave -> float32 (B, tags), a logit of each tag."""
    queries = F.relu(self.wordvec_proj(self.reweight(features[:, 0])))
    return self.fc(self.tagging_head(queries, features))[..., 0].float()

  def reweight(self, image: torch.Tensor) -> torch.Tensor:
    """Each tag's descriptions averaged as they fit the pictures: (B, text_width) -> float32 (B, tags, text_width).

    Always in float32: to convert all the embeddings for each batch would take longer than these products.
    """
    with torch.autocast(image.device.type, enabled=False):
      descriptions = self.label_embed.unflatten(0, (self.config.tags, self.config.descriptions))
      scaled = self.reweight_scale.exp() * F.normalize(image.float(), dim=-1)
      weights = torch.einsum("bc,tdc->btd", scaled, descriptions).softmax(dim=-1)
      return torch.einsum("btd,tdc->btc", weights, descriptions)


# The tagging head is a BERT stripped to its cross-attention; its modules are nested for the sake of their names.

class _TaggingHead(nn.Module):
  def __init__(self, config: RamPlusConfig):
    super().__init__()
    self.encoder = nn.Module()
    self.encoder.layer = nn.ModuleList(_Layer(config) for _ in range(config.layers))

  def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(B, tags, width) and (B, 1 + patches, text_width) -> (B, tags, width). No tag sees another."""
    for layer in self.encoder.layer:
      queries = layer(queries, features)
    return queries


class _Layer(nn.Module):
  def __init__(self, config: RamPlusConfig):
    super().__init__()
    self.crossattention = nn.Module()
    self.crossattention.self = _CrossAttention(config)
    self.crossattention.output = _Residual(config.width, config.width)
    self.intermediate = nn.Module()
    self.intermediate.dense = nn.Linear(config.width, 4 * config.width)
    self.output = _Residual(4 * config.width, config.width)

  def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    x = self.crossattention.output(self.crossattention.self(queries, features), queries)
    return self.output(F.gelu(self.intermediate.dense(x)), x)


class _CrossAttention(nn.Module):
  def __init__(self, config: RamPlusConfig):
    super().__init__()
    self.heads = config.heads
    self.query = nn.Linear(config.width, config.width)
    self.key = nn.Linear(config.text_width, config.width)
    self.value = nn.Linear(config.text_width, config.width)

  def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
    attended = F.scaled_dot_product_attention(
        split(self.query(queries)), split(self.key(features)), split(self.value(features)))
    return attended.transpose(1, 2).flatten(2)


class _Residual(nn.Module):
  """Projection, sum with what went into the sublayer, normalisation."""

  def __init__(self, inner: int, width: int):
    super().__init__()
    self.dense = nn.Linear(inner, width)
    self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

  def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return self.LayerNorm(self.dense(x) + residual)
