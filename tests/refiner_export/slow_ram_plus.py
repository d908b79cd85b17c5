"""RAM++ as its papers describe it, in double precision: one window, one place, one tag, one description at a time.

This model shares only the names of the weights with the model under test. Pictures are never rolled: places attend to
each other when they lie in one window of the partition and are neighbours in the picture.
"""

import math

import torch


class SlowRamPlus:
  def __init__(self, weights, *, window, heads, depths, descriptions, tagging_heads, tagging_layers):
    self.weights = {name: tensor.double() for name, tensor in weights.items()}
    self.window, self.heads, self.depths = window, heads, depths
    self.descriptions, self.tagging_heads, self.tagging_layers = descriptions, tagging_heads, tagging_layers

  def linear(self, name, x):
    bias = self.weights.get(f"{name}.bias")
    product = x @ self.weights[f"{name}.weight"].T
    return product if bias is None else product + bias

  def norm(self, name, x, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

  def logits(self, image):
    """float (3, H, W) -> (tags,)"""
    return self.tag(self.encode(image))

  def encode(self, image):
    """(3, H, W) -> (1 + places, text width)"""
    swin = "visual_encoder"
    grid = self.patches(swin, image)
    for stage, depth in enumerate(self.depths):
      for block in range(depth):
        grid = self.block(f"{swin}.layers.{stage}.blocks.{block}", grid, self.heads[stage], shifted=block % 2 == 1)
      if stage < len(self.depths) - 1:
        grid = self.merge(f"{swin}.layers.{stage}.downsample", grid)
    places = self.norm(f"{swin}.norm", grid.flatten(0, 1))
    return self.linear("image_proj", torch.cat([places.mean(0, keepdim=True), places]))

  def patches(self, swin, image):
    kernel, bias = (self.weights[f"{swin}.patch_embed.proj.{part}"] for part in ("weight", "bias"))
    size, side = kernel.shape[-1], image.shape[1] // kernel.shape[-1]
    cut = lambda y, x: image.double()[:, y * size:(y + 1) * size, x * size:(x + 1) * size]
    rows = [torch.stack([kernel.flatten(1) @ cut(y, x).flatten() + bias for x in range(side)]) for y in range(side)]
    return self.norm(f"{swin}.patch_embed.norm", torch.stack(rows))

  def merge(self, name, grid):
    side = len(grid) // 2
    four = lambda y, x: torch.cat([grid[2 * y, 2 * x], grid[2 * y + 1, 2 * x],
                                   grid[2 * y, 2 * x + 1], grid[2 * y + 1, 2 * x + 1]])
    merged = torch.stack([torch.stack([four(y, x) for x in range(side)]) for y in range(side)])
    return self.linear(f"{name}.reduction", self.norm(f"{name}.norm", merged))

  def block(self, name, grid, heads, shifted):
    side = len(grid)
    window = min(self.window, side)
    shift = window // 2 if shifted and side > window else 0
    normed, out = self.norm(f"{name}.norm1", grid), grid.clone()
    for first_row in range(shift, shift + side, window):
      for first_column in range(shift, shift + side, window):
        places = [((first_row + y) % side, (first_column + x) % side) for y in range(window) for x in range(window)]
        attended = self.attend_in_window(f"{name}.attn", places, [normed[place] for place in places], heads, window)
        for place, value in zip(places, attended):
          out[place] += value
    hidden = gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", out)))
    return out + self.linear(f"{name}.mlp.fc2", hidden)

  def attend_in_window(self, name, places, features, heads, window):
    """The attention of each place to the places of its window that are its neighbours."""
    table = self.weights[f"{name}.relative_position_bias_table"]
    query, key, value = self.linear(f"{name}.qkv", torch.stack(features)).chunk(3, dim=-1)
    width = query.shape[-1] // heads
    places = torch.tensor(places)
    offsets = places[:, None] - places  # (from, to, 2)
    neighbours = (offsets.abs() < window).all(-1)
    rows = (offsets[..., 0] + window - 1) * (2 * window - 1) + offsets[..., 1] + window - 1
    results = []
    for head in range(heads):
      part = slice(head * width, (head + 1) * width)
      attended = []
      for place, seen in enumerate(neighbours):
        scores = key[seen, part] @ query[place, part] / math.sqrt(width) + table[rows[place, seen], head]
        attended.append(softmax(scores) @ value[seen, part])
      results.append(torch.stack(attended))
    return self.linear(f"{name}.proj", torch.cat(results, dim=-1))

  def tag(self, features):
    """(1 + places, text width) -> (tags,)"""
    embeddings = self.weights["label_embed"]
    picture = features[0] / features[0].square().sum().sqrt()
    logits = []
    for first in range(0, len(embeddings), self.descriptions):
      mine = embeddings[first:first + self.descriptions]
      chances = softmax(torch.stack([self.weights["reweight_scale"].exp() * (text @ picture) for text in mine]))
      query = sum(chance * text for chance, text in zip(chances, mine))
      logits.append(self.look(self.linear("wordvec_proj", query).clamp(min=0), features))
    return torch.stack(logits)

  def look(self, query, features):
    """The query of one tag, (width,), and the picture -> the logit of the tag."""
    for number in range(self.tagging_layers):
      layer = f"tagging_head.encoder.layer.{number}"
      cross = f"{layer}.crossattention"
      split = lambda x: x.unflatten(-1, (self.tagging_heads, -1))
      looking = split(self.linear(f"{cross}.self.query", query))
      keys, values = (split(self.linear(f"{cross}.self.{part}", features)) for part in ("key", "value"))
      heads = [softmax(keys[:, head] @ looking[head] / math.sqrt(looking.shape[-1])) @ values[:, head]
               for head in range(self.tagging_heads)]
      seen = self.linear(f"{cross}.output.dense", torch.cat(heads))
      query = self.norm(f"{cross}.output.LayerNorm", seen + query, eps=1e-12)
      hidden = gelu(self.linear(f"{layer}.intermediate.dense", query))
      query = self.norm(f"{layer}.output.LayerNorm", self.linear(f"{layer}.output.dense", hidden) + query, eps=1e-12)
    return self.linear("fc", query)[0]


def softmax(x):
  powers = (x - x.max()).exp()
  return powers / powers.sum()


def gelu(x):
  return x * (1 + torch.erf(x / math.sqrt(2))) / 2
