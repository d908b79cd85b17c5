"""The Swin Transformer for one image size.

Source: Liu et al. 2021, Hierarchical Vision Transformer using Shifted Windows.

Parameters have the names of Microsoft's implementation, so that its checkpoints fit. The tables
`relative_position_index` and `attn_mask` of that implementation are computed here and are not in the state dict.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

# Added to the attention logits of two places that are not neighbours in the picture. The official code has this value.
_MASKED = -100.0
_MLP_RATIO = 4


@dataclasses.dataclass(frozen=True)
class SwinConfig:
  """Sizes of a Swin.

  Attributes:
    width: channels of the first stage. Every later stage has twice the channels of the stage before it.
    heads: attention heads, one number per stage.
    depths: blocks, one number per stage.
    image_size: pixels along a side. The side of a stage in patches must be a multiple of `window`, or smaller.
    window: patches along the side of a window.
    patch: pixels along the side of a patch.
  """
  width: int
  heads: tuple[int, ...]
  depths: tuple[int, ...] = (2, 2, 18, 2)
  image_size: int = 384
  window: int = 12
  patch: int = 4

  @property
  def output_width(self) -> int:
    return self.width << (len(self.depths) - 1)


SWIN_L = SwinConfig(192, (6, 12, 24, 48))
SWIN_B = SwinConfig(128, (4, 8, 16, 32))


class Swin(nn.Module):
  """The backbone without a classifier. It gives one feature per patch of the last stage."""

  def __init__(self, config: SwinConfig):
    super().__init__()
    self.patch_embed = _PatchEmbed(config.patch, config.width)
    self.layers = nn.ModuleList()
    width, side = config.width, config.image_size // config.patch
    for number, (heads, depth) in enumerate(zip(config.heads, config.depths), start=1):
      self.layers.append(_Stage(width, heads, depth, side, config.window, downsample=number < len(config.depths)))
      width, side = 2 * width, side // 2
    self.norm = nn.LayerNorm(config.output_width)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """Describes pictures patch by patch.

    Args:
      images: float32 (B, 3, image_size, image_size), normalised.

    Returns:
      (B, patches, output_width), the patches of the last stage row by row.
    """
    x = self.patch_embed(images)
    for stage in self.layers:
      x = stage(x)
    return self.norm(x).flatten(1, 2)


class _PatchEmbed(nn.Module):
  def __init__(self, patch: int, width: int):
    super().__init__()
    self.proj = nn.Conv2d(3, width, patch, stride=patch)
    self.norm = nn.LayerNorm(width)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, H / patch, W / patch, width)."""
    return self.norm(self.proj(images).permute(0, 2, 3, 1))


class _Stage(nn.Module):
  """Blocks at one resolution. The windows of every second block are shifted by half a window."""

  def __init__(self, width: int, heads: int, depth: int, side: int, window: int, downsample: bool):
    super().__init__()
    shift = window // 2
    if side <= window:  # one window covers the whole picture, so there is nothing to shift
      window, shift = side, 0
    self.blocks = nn.ModuleList()
    for number in range(depth):
      self.blocks.append(_Block(width, heads, side, window, shift if number % 2 else 0))
    self.downsample = _PatchMerging(width) if downsample else nn.Identity()

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, side, side, width) -> (B, side / 2, side / 2, 2 * width), or the same shape when nothing is downsampled."""
    for block in self.blocks:
      x = block(x)
    return self.downsample(x)


class _PatchMerging(nn.Module):
  def __init__(self, width: int):
    super().__init__()
    self.norm = nn.LayerNorm(4 * width)
    self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, side, side, width) -> (B, side / 2, side / 2, 2 * width)."""
    left, right = x[:, :, 0::2], x[:, :, 1::2]
    neighbours = [left[:, 0::2], left[:, 1::2], right[:, 0::2], right[:, 1::2]]
    return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


class _Block(nn.Module):
  def __init__(self, width: int, heads: int, side: int, window: int, shift: int):
    super().__init__()
    self.shift = shift
    self.norm1 = nn.LayerNorm(width)
    self.attn = _WindowAttention(width, heads, side, window, shift)
    self.norm2 = nn.LayerNorm(width)
    self.mlp = _Mlp(width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, side, side, width) -> the same shape."""
    attended = self.attn(torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2)))
    x = x + torch.roll(attended, (self.shift, self.shift), (1, 2))
    return x + self.mlp(self.norm2(x))


class _Mlp(nn.Module):
  def __init__(self, width: int):
    super().__init__()
    self.fc1 = nn.Linear(width, _MLP_RATIO * width)
    self.fc2 = nn.Linear(_MLP_RATIO * width, width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.fc2(F.gelu(self.fc1(x)))


class _WindowAttention(nn.Module):
  """Self-attention inside each window, with a learned bias for the offset between two places."""

  def __init__(self, width: int, heads: int, side: int, window: int, shift: int):
    super().__init__()
    self.heads, self.window = heads, window
    self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)
    self.register_buffer("offsets", _offsets(window), persistent=False)
    self.register_buffer("mask", _seam_mask(side, window, shift) if shift else None, persistent=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, side, side, width), rolled by the shift -> the same shape."""
    batch, side, _, width = x.shape
    count, places = side // self.window, self.window ** 2
    windows = x.view(batch, count, self.window, count, self.window, width).transpose(2, 3)
    qkv = self.qkv(windows).view(batch * count ** 2, places, 3, self.heads, width // self.heads)
    bias = self.relative_position_bias_table[self.offsets].permute(2, 0, 1)
    if self.mask is not None:  # the bias differs between windows, so the windows of a picture count as heads
      bias = (bias + self.mask[:, None]).flatten(0, 1)
    heads_first = (-1, len(bias), places, width // self.heads)
    query, key, value = qkv.transpose(1, 3).unbind(2)
    query, key, value = query.reshape(heads_first), key.reshape(heads_first), value.reshape(heads_first)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    attended = attended.view(-1, self.heads, places, width // self.heads).transpose(1, 2)
    return self.proj(attended.reshape(windows.shape).transpose(2, 3).reshape(x.shape))


# The tables are computed on the CPU even when a module is built on the device `meta`.

def _offsets(window: int) -> torch.Tensor:
  """int64 (window^2, window^2): the row of the bias table for each pair of places of a window."""
  places = torch.arange(window ** 2, device="cpu")
  y, x = places // window, places % window
  down = y[:, None] - y + window - 1
  right = x[:, None] - x + window - 1
  return down * (2 * window - 1) + right


def _seam_mask(side: int, window: int, shift: int) -> torch.Tensor:
  """float32 (windows, window^2, window^2): `_MASKED` for pairs that are neighbours only because of the roll, else 0."""
  wrapped = torch.arange(side, device="cpu") >= side - shift  # rows, or columns, that came from the other border
  region = 2 * wrapped[:, None] + wrapped
  count = side // window
  region = region.view(count, window, count, window).transpose(1, 2).reshape(count ** 2, window ** 2)
  return (region[:, :, None] != region[:, None]) * torch.tensor(_MASKED, device="cpu")
