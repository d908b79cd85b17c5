"""Stage 1 as the authors compute it, in eager PyTorch: the other side of `align_step.py`.

Every objective runs a separate pass over texts padded to one long row (spatial representation, then caption),
and attention masks say what a pass ignores. Matching runs three passes, each of which computes its
cross-attention keys and values anew. The two language modelling passes reuse the self-attention keys and values
of the query pass, and predict at every position.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lyrics_jax.config import Config

Tensor = torch.Tensor
STACK = "connector/former/stack/blocks/layers/"


def _attention_flops(query, key, value, *_, **__) -> int:
  return sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient, query, key, value, *_, **__) -> int:
  return sdpa_backward_flop_count(gradient, query, key, value)


# PyTorch's counter does not know the fused attention of the CPU; it counts like that of the GPU.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@dataclasses.dataclass
class Pictures:
  """What the queries attend to. `image`: [B, Ti, Di]; `local`: [B, Tl, D]; `local_valid`: bool[B, 1, 1, Tl]."""
  image: Tensor
  local: Tensor
  local_valid: Tensor

  def take(self, index: Tensor) -> "Pictures":
    return Pictures(self.image[index], self.local[index], self.local_valid[index])


class AuthorsAlignStep:
  """Losses and gradients of one batch.

  Args:
    parameters: ours by path (see `lyrics_jax/training/parameters.py`); copied.
    text_length: every text is padded to it; the caption lies in the last `config.data.caption_length` positions.
  """

  def __init__(self, config: Config, parameters: dict[str, np.ndarray], text_length: int, device: str, dtype: str):
    self.config, self.model, self.device, self.dtype = config, config.stage.model.connector.former, device, dtype
    self.spatial_slot, self.text_length = text_length - config.data.caption_length, text_length
    self.smoothing = {}
    for objective in config.stage.objectives:
      self.smoothing[objective.name] = getattr(objective, "label_smoothing", 0.0)
    self.leaves = {}
    for path, value in parameters.items():
      if path.startswith(STACK):
        number, name = path.removeprefix(STACK).split("/", 1)
        for group, layer in enumerate(value):
          self._add(f"layers/{group * self.model.cross_attention_frequency + int(number)}/{name}", layer)
      else:
        self._add(path.removeprefix("connector/").removeprefix("former/"), value)

  def _add(self, name: str, value: np.ndarray) -> None:
    value = value.T if name.endswith("kernel") else value  # nn.Linear's layout
    self.leaves[name] = torch.tensor(np.ascontiguousarray(value), device=self.device).requires_grad_()

  def count_flops(self, batch: dict[str, np.ndarray], negatives) -> tuple[int, dict[str, float]]:
    """FLOPs of a step, forward and backward, and its losses."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
      losses = self.step(batch, negatives)
    return counter.get_total_flops(), losses

  def gradient_norm(self) -> float:
    return float(torch.stack([leaf.grad.norm() for leaf in self.leaves.values() if leaf.grad is not None]).norm())

  def step(self, batch: dict[str, np.ndarray], negatives: tuple[np.ndarray, ...]) -> dict[str, float]:
    """Losses of a batch; the gradients of their sum lie in `leaves`.

    Args:
      batch: one picture a row and no axis of pictures; texts at full length; `image` holds the image encoder's
      tokens. negatives: for each pair a picture and a text, int[B] both, and whether the pair has any, bool[B].
    """
    for leaf in self.leaves.values():
      leaf.grad = None
    with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
      batch = {name: torch.as_tensor(value, device=self.device) for name, value in batch.items()}
      negatives = [torch.as_tensor(value, device=self.device) for value in negatives]
      pictures = self._pictures(batch)
      queries, _, context = self._run(pictures, None, None)
      itc = self._itc(queries, batch)
      itm = self._itm(pictures, batch, *negatives)
    # Two backward passes give the gradients of one; the activations of matching need not wait for the rest.
    itm.backward(retain_graph=True)
    itm = itm.detach()
    with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
      icg, msp = self._icg(batch, context), self._msp(batch, context)
    (itc + icg + msp).backward()
    return {name: float(loss.detach()) for name, loss in (("itc", itc), ("itm", itm), ("icg", icg), ("msp", msp))}

  def _itc(self, queries: Tensor, batch: dict[str, Tensor]) -> Tensor:
    valid = self._row(batch["spatial_mask"], batch["caption_mask"])
    _, text, _ = self._run(None, self._row(batch["spatial_ids"], batch["caption_ids"]), valid[:, None, None])
    image = self._linear("itc_image", torch.cat(self._means(queries), -1))
    text = self._linear("itc_text", torch.cat([text[:, 0], text[:, self.spatial_slot]], -1))
    similarity = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T / self.leaves["temperature"]
    target, smoothing = torch.arange(len(image), device=self.device), self.smoothing["itc"]
    return (F.cross_entropy(similarity, target, label_smoothing=smoothing) +
            F.cross_entropy(similarity.T, target, label_smoothing=smoothing)) / 2

  def _itm(self, pictures: Pictures, batch: dict[str, Tensor], other_pictures, other_texts, found) -> Tensor:
    pairs = torch.arange(len(found), device=self.device)
    ids = self._row(batch["spatial_ids"], batch["caption_ids"])
    valid = self._row(batch["spatial_mask"], batch["caption_mask"])
    visual, grounding = self._queries
    caption_side = torch.tensor(  # V sees C and G sees S, and nothing else across
        [True] * visual + [False] * (grounding + self.spatial_slot) + [True] * (self.text_length - self.spatial_slot),
        device=self.device)
    sees = caption_side[:, None] == caption_side[None]
    losses, counted = [], []
    for label, of_picture, of_text in ((1, pairs, pairs), (0, other_pictures, pairs), (0, pairs, other_texts)):
      keys = F.pad(valid[of_text], (sum(self._queries), 0), value=True)
      queries, _, _ = self._run(pictures.take(of_picture), ids[of_text], sees & keys[:, None, None])
      for pooled in self._means(queries):
        logits = self._linear("itm", pooled).float()
        losses.append(F.cross_entropy(logits, torch.full_like(pairs, label), reduction="none"))
        counted.append(found | bool(label))
    losses, counted = torch.stack(losses), torch.stack(counted)
    return (losses * counted).sum() / counted.sum()

  def _icg(self, batch: dict[str, Tensor], context: list) -> Tensor:
    """Next-token prediction; the masked-out spatial representation stays in the row."""
    nothing = torch.zeros_like(batch["spatial_mask"])
    ids, valid = self._row(batch["spatial_ids"], batch["icg_ids"]), self._row(nothing, batch["caption_mask"])
    past = torch.ones(self.text_length, self.text_length, dtype=torch.bool, device=self.device).tril()
    mask = F.pad(past & valid[:, None, None], (sum(self._queries), 0), value=True)
    _, hidden, _ = self._run(None, ids, mask, context)
    targets = torch.where(valid, ids, -1)
    targets[:, self.spatial_slot] = -1
    return self._language_loss(self._words(hidden)[:, :-1], targets[:, 1:], self.smoothing["icg"])

  def _msp(self, batch: dict[str, Tensor], context: list) -> Tensor:
    nothing = torch.zeros_like(batch["caption_mask"])
    ids, valid = self._row(batch["msp_ids"], batch["caption_ids"]), self._row(batch["spatial_mask"], nothing)
    mask = F.pad(valid, (sum(self._queries), 0), value=True)
    _, hidden, _ = self._run(None, ids, mask[:, None, None], context)
    targets = self._row(batch["msp_targets"], nothing.int()).where(valid, -1)
    return self._language_loss(self._words(hidden), targets, self.smoothing["msp"])

  def _language_loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long(), ignore_index=-1,
                           label_smoothing=smoothing)

  def _words(self, hidden: Tensor) -> Tensor:
    """BERT's prediction head at every position: [B, T, vocabulary]."""
    x = self._norm("lm_head/norm", F.gelu(self._linear("lm_head/dense", hidden)))
    return F.linear(x, self.leaves["words/embedding"], self.leaves["lm_head/bias"])

  @property
  def _queries(self) -> tuple[int, int]:
    return self.model.visual_queries, self.model.grounding_queries

  def _means(self, queries: Tensor) -> tuple[Tensor, Tensor]:
    v, g = queries.split(self._queries, 1)
    return v.mean(1), g.mean(1)

  def _row(self, spatial: Tensor, caption: Tensor, fill: int = 0) -> Tensor:
    """Both texts in one row of the padded length."""
    return torch.cat([F.pad(spatial, (0, self.spatial_slot - spatial.shape[1]), value=fill), caption], 1)

  def _pictures(self, batch: dict[str, Tensor]) -> Pictures:
    source = self.leaves["local_tokens/source"]
    local = torch.cat([self._linear("local_tokens/detection", batch["detection"]) + source[0],
                       self._linear("local_tokens/mask", batch["masks"]) + source[1]], 1)
    valid = torch.cat([batch["detection_mask"], batch["masks_mask"]], 1)
    image = self._norm("image_norm", batch["image"], self.config.stage.model.vision.norm_eps)
    return Pictures(image, local, valid[:, None, None])

  def _run(self, pictures: Pictures | None, ids: Tensor | None, mask: Tensor | None, context: list | None = None):
    """One pass of queries (if there are `pictures`) and text (if there are `ids`).

    Returns:
      The last hidden states of both, and the self-attention keys and values of every layer.
    """
    parts = []
    if pictures is not None:
      parts.append(self.leaves["queries"].expand(len(pictures.image), -1, -1))
    if ids is not None:
      places = torch.cat([torch.arange(self.spatial_slot), torch.arange(self.text_length - self.spatial_slot)])
      parts.append(F.embedding(ids, self.leaves["words/embedding"]) +
                   F.embedding(places.to(self.device), self.leaves["positions/embedding"]))
    hidden = self._norm("norm", torch.cat(parts, 1))
    count, kept = sum(self._queries) if pictures is not None else 0, []
    for number in range(self.model.layers):
      layer = f"layers/{number}/"
      key_value = self._keys_values(layer + "self_attention", hidden)
      kept.append(key_value)
      seen = key_value
      if context is not None:
        seen = [torch.cat(pair, 2) for pair in zip(context[number], key_value)]
      hidden = self._attention(layer + "self_attention", hidden, seen, mask)
      parts = []
      if count:
        queries = hidden[:, :count]
        if number % self.model.cross_attention_frequency == 0:
          v, g = queries.split(self._queries, 1)
          v = self._attention(layer + "visual_attention", v,
                              self._keys_values(layer + "visual_attention", pictures.image), None)
          g = self._attention(layer + "grounding_attention", g,
                              self._keys_values(layer + "grounding_attention", pictures.local), pictures.local_valid)
          queries = torch.cat([v, g], 1)
        parts.append(self._feed_forward(layer + "query_mlp", queries))
      if ids is not None:
        parts.append(self._feed_forward(layer + "text_mlp", hidden[:, count:]))
      hidden = torch.cat(parts, 1)
    return hidden[:, :count], hidden[:, count:], kept

  def _keys_values(self, path: str, source: Tensor) -> tuple[Tensor, Tensor]:
    return self._heads(self._linear(path + "/k", source)), self._heads(self._linear(path + "/v", source))

  def _heads(self, x: Tensor) -> Tensor:
    """[B, T, D] -> [B, H, T, D / H]."""
    return x.unflatten(-1, (self.model.heads, -1)).transpose(1, 2)

  def _attention(self, path: str, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    y = F.scaled_dot_product_attention(self._heads(self._linear(path + "/q", x)), *keys_values, attn_mask=mask)
    return self._norm(path + "/norm", x + self._linear(path + "/o", y.transpose(1, 2).flatten(2)))

  def _feed_forward(self, path: str, x: Tensor) -> Tensor:
    y = self._linear(path + "/up", x)
    y = F.gelu(y) if self.model.activation == "gelu" else F.relu(y)
    return self._norm(path + "/norm", x + self._linear(path + "/down", y))

  def _linear(self, path: str, x: Tensor) -> Tensor:
    return F.linear(x, self.leaves[path + "/kernel"], self.leaves[path + "/bias"])

  def _norm(self, path: str, x: Tensor, eps: float | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], self.leaves[path + "/scale"], self.leaves[path + "/bias"],
                        eps or self.model.norm_eps)
