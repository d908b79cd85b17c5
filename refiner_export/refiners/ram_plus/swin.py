"""Swin Transformer (Liu et al. 2021, Hierarchical Vision Transformer using Shifted Windows) for one image size.

Parameters are named as in Microsoft's implementation, so that checkpoints made with it fit. Its two kinds of tables,
`relative_position_index` and `attn_mask`, are computed here and are not in the state dict.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

_MASKED = -100.0  # added to the attention logits of places that are not neighbours in the picture, as upstream
_MLP_RATIO = 4


@dataclasses.dataclass(frozen=True)
class SwinConfig:
  """Sizes of a Swin.

  Attributes:
    width: channels of the first stage; each later stage has twice as many.
    heads: attention heads of each stage.
    depths: blocks of each stage.
    image_size: pixels along a side. Each stage's side in patches must be a multiple of `window`, or smaller than it.
    window: patches along a window's side.
    patch: pixels along a patch's side.
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
  """The backbone without a classifier: a feature of each patch of the last stage."""

  def __init__(self, config: SwinConfig):
    super().__init__()
    self.patch_embed = _PatchEmbed(config.patch, config.width)
    side, last = config.image_size // config.patch, len(config.depths) - 1
    self.layers = nn.ModuleList(
        _Stage(config.width << k, heads, depth, side >> k, config.window, downsample=k < last)
        for k, (heads, depth) in enumerate(zip(config.heads, config.depths)))
    self.norm = nn.LayerNorm(config.output_width)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """float (B, 3, image_size, image_size), normalised -> (B, patches of the last stage, output_width), row by row."""
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
  """Blocks at one resolution, their windows in turn aligned with the picture and shifted by half a window."""

  def __init__(self, width: int, heads: int, depth: int, side: int, window: int, downsample: bool):
    super().__init__()
    # One window that covers everything has nothing to be shifted against.
    window, shift = (window, window // 2) if side > window else (side, 0)
    self.blocks = nn.ModuleList(_Block(width, heads, side, window, shift if k % 2 else 0) for k in range(depth))
    self.downsample = _PatchMerging(width) if downsample else nn.Identity()

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, side, side, width) -> the same, or (B, side / 2, side / 2, 2 * width) when downsampled."""
    for block in self.blocks:
      x = block(x)
    return self.downsample(x)


class _PatchMerging(nn.Module):
  def __init__(self, width: int):
    super().__init__()
    self.norm = nn.LayerNorm(4 * width)
    self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, side, side, width) -> (B, side / 2, side / 2, 2 * width); of four neighbours the left ones come first."""
    four = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return self.reduction(self.norm(torch.cat(four, dim=-1)))


class _Block(nn.Module):
  def __init__(self, width: int, heads: int, side: int, window: int, shift: int):
    super().__init__()
    self.shift = shift
    self.norm1 = nn.LayerNorm(width)
    self.attn = _WindowAttention(width, heads, side, window, shift)
    self.norm2 = nn.LayerNorm(width)
    self.mlp = _Mlp(width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, side, side, width) -> the same."""
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
  """Self-attention within each window, with a learned bias for each offset between two of its places."""

  def __init__(self, width: int, heads: int, side: int, window: int, shift: int):
    super().__init__()
    self.heads, self.window = heads, window
    self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)
    self.register_buffer("offsets", _offsets(window), persistent=False)
    self.register_buffer("mask", _seam_mask(side, window, shift) if shift else None, persistent=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, side, side, width), rolled by the shift -> the same."""
    batch, side, _, width = x.shape
    count, places = side // self.window, self.window ** 2
    windows = x.view(batch, count, self.window, count, self.window, width).transpose(2, 3)
    qkv = self.qkv(windows).view(batch * count ** 2, places, 3, self.heads, width // self.heads)
    bias = self.relative_position_bias_table[self.offsets].permute(2, 0, 1)
    if self.mask is not None:  # another bias in each window: windows of a picture count as heads
      bias = (bias + self.mask[:, None]).flatten(0, 1)
    query, key, value = (part.transpose(1, 2).reshape(-1, len(bias), places, width // self.heads)
                         for part in qkv.unbind(2))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    attended = attended.view(-1, self.heads, places, width // self.heads).transpose(1, 2)
    return self.proj(attended.reshape(windows.shape).transpose(2, 3).reshape(x.shape))


# Tables are computed on the CPU even while a module is being built on the device `meta`.

def _offsets(window: int) -> torch.Tensor:
  """int64 (window^2, window^2): for each pair of a window's places, the bias table's row of their offset."""
  y, x = torch.meshgrid(*[torch.arange(window, device="cpu")] * 2, indexing="ij")
  difference = lambda at: at.flatten()[:, None] - at.flatten() + window - 1
  return difference(y) * (2 * window - 1) + difference(x)


def _seam_mask(side: int, window: int, shift: int) -> torch.Tensor:
  """float32 (windows, window^2, window^2): `_MASKED` for pairs that only the roll has brought together, else 0."""
  wrapped = torch.arange(side, device="cpu") >= side - shift  # rows, or columns, that came from the other border
  region = 2 * wrapped[:, None] + wrapped
  count = side // window
  region = region.view(count, window, count, window).transpose(1, 2).reshape(count ** 2, window ** 2)
  return (region[:, :, None] != region[:, None]) * torch.tensor(_MASKED, device="cpu")
