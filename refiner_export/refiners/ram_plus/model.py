"""RAM++, the Recognize Anything Plus model, which scores every tag of a list for a picture.

Source: Huang et al. 2023, Open-Set Image Tagging with Multi-Grained Text Supervision.

Every tag has many descriptions, which CLIP's text encoder has embedded once. The picture gives weights to the
descriptions of a tag, and their weighted sum becomes the query of the tag. A decoder without self-attention lets each
query attend to the picture. Parameters have the names of the official checkpoint.
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
    swin: sizes of the image encoder.
    tags: number of tags that the model knows.
    descriptions: number of descriptions of a tag.
    text_width: width of CLIP's embeddings. The picture is projected to this width too.
    width: width of the tagging head. Its feed-forward layers are four times as wide.
    layers, heads: numbers of layers and of attention heads of the tagging head.
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
  """The whole model.

  `label_embed` holds the embeddings of all descriptions, tag after tag. They are not normalised.
  """

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
    """float32 (B, 3, image_size, image_size), normalised -> float32 (B, tags), logits."""
    return self.classify(self.encode(images))

  def encode(self, images: torch.Tensor) -> torch.Tensor:
    """Describes pictures in the space of CLIP's embeddings.

    Args:
      images: float32 (B, 3, image_size, image_size), normalised.

    Returns:
      (B, 1 + patches, text_width): first the mean of all patches, then the patches.
    """
    patches = self.visual_encoder(images)
    return self.image_proj(torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1))

  def classify(self, features: torch.Tensor) -> torch.Tensor:
    """(B, 1 + patches, text_width) from `encode` -> float32 (B, tags), logits."""
    queries = F.relu(self.wordvec_proj(self.reweight(features[:, 0])))
    return self.fc(self.tagging_head(queries, features))[..., 0].float()

  def reweight(self, image: torch.Tensor) -> torch.Tensor:
    """Averages the descriptions of each tag, weighted by how well they fit the picture.

    This always runs in float32, because converting all embeddings for each batch would take longer than the products.

    Args:
      image: (B, text_width), the first row that `encode` gives for each picture.

    Returns:
      float32 (B, tags, text_width).
    """
    with torch.autocast(image.device.type, enabled=False):
      descriptions = self.label_embed.unflatten(0, (self.config.tags, self.config.descriptions))
      scaled = self.reweight_scale.exp() * F.normalize(image.float(), dim=-1)
      weights = torch.einsum("bc,tdc->btd", scaled, descriptions).softmax(dim=-1)
      return torch.einsum("btd,tdc->btc", weights, descriptions)


# The tagging head is a BERT of which only the cross-attention is left. The modules are nested so that their parameters
# have the official names.

class _TaggingHead(nn.Module):
  def __init__(self, config: RamPlusConfig):
    super().__init__()
    self.encoder = nn.Module()
    self.encoder.layer = nn.ModuleList(_Layer(config) for _ in range(config.layers))

  def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(B, tags, width) and (B, 1 + patches, text_width) -> (B, tags, width). Tags do not attend to each other."""
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
    query = self._split_heads(self.query(queries))
    key, value = self._split_heads(self.key(features)), self._split_heads(self.value(features))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

  def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
    """(B, T, width) -> (B, heads, T, width / heads)."""
    return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _Residual(nn.Module):
  """The end of a sublayer: a projection, the sum with the sublayer's input, and a layer norm."""

  def __init__(self, inner: int, width: int):
    super().__init__()
    self.dense = nn.Linear(inner, width)
    self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

  def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return self.LayerNorm(self.dense(x) + residual)
