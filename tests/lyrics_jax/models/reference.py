"""The MQ-Former and the losses of stage 1 once more, in float64 NumPy, from the paper's description.

Nothing is shared with the package: no scan, no reuse of keys and values. Every objective is one full pass over
[V, G, S, C] with one full mask. Only the parameters' names are the package's.
"""

import numpy as np
from scipy.special import erf

# Who sees whom, and whether the caption is causal (paper figure 3).
SEES = {
    "itc": ({"V": "VG", "G": "VG", "S": "SC", "C": "SC"}, False),
    "itm": ({"V": "VC", "G": "GS", "S": "GS", "C": "VC"}, False),
    "icg": ({"V": "VG", "G": "VG", "S": "", "C": "VGC"}, True),
    "msp": ({"V": "VG", "G": "VG", "S": "VGS", "C": ""}, False),
    "instruct": (dict.fromkeys("VGSC", "VGSC"), False),
}


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def layer_norm(p, x, eps):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def linear(p, x):
  return x @ p["kernel"] + p["bias"]


def gelu(x):
  return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def below(parameters, prefix):
  """The parameters below a path, named from there on."""
  return {path[len(prefix) + 1:]: value for path, value in parameters.items() if path.startswith(prefix + "/")}


def attention(p, x, source, mask, heads, eps):
  """Post-norm attention: norm(x + O(softmax(Q K / sqrt d) V)).

  `mask`: bool[B, rows, columns]; a row that sees nothing adds O(0).
  """
  batch, rows, width = x.shape
  cut = lambda a: a.reshape(batch, -1, heads, width // heads).transpose(0, 2, 1, 3)
  q, k, v = cut(linear(below(p, "q"), x)), cut(linear(below(p, "k"), source)), cut(linear(below(p, "v"), source))
  scores = np.where(mask[:, None], q @ k.transpose(0, 1, 3, 2) / np.sqrt(width // heads), -1e30)
  seen = softmax(scores) * mask[:, None]
  found = (seen @ v).transpose(0, 2, 1, 3).reshape(batch, rows, width)
  return layer_norm(below(p, "norm"), x + linear(below(p, "o"), found), eps)


def feed_forward(p, x, activation, eps):
  y = linear(below(p, "up"), x)
  y = gelu(y) if activation == "gelu" else np.maximum(y, 0)
  return layer_norm(below(p, "norm"), x + linear(below(p, "down"), y), eps)


def full_mask(objective, counts, valid):
  """bool[B, N, N] over [V, G, S, C] with `counts` positions each; `valid`: bool[B, N]."""
  sees, causal = SEES[objective]
  names = "".join(name * count for name, count in zip("VGSC", counts))
  mask = np.array([[target in sees[source] for target in names] for source in names])
  if causal:
    start = len(names) - counts[3]
    mask[start:, start:] &= np.tril(np.ones((counts[3], counts[3]), bool))
  return mask[None] & valid[:, None, :]


def mq_former(parameters, config, objective, image_tokens, local_tokens, local_valid, spatial, caption):
  """Hidden states (queries [B, Q, D], spatial [B, S, D], caption [B, C, D]) of one full pass.

  `parameters`: those of the MQ-Former. `spatial`, `caption`: (ids, valid); a text that the objective masks out has no
  valid token. Positions of the caption begin at 0, or after the spatial representation's valid tokens.
  """
  (spatial_ids, spatial_valid), (caption_ids, caption_valid) = spatial, caption
  batch, visual, grounding = len(image_tokens), config.visual_queries, config.grounding_queries
  counts = (visual, grounding, spatial_ids.shape[1], caption_ids.shape[1])
  words, places = parameters["words/embedding"], parameters["positions/embedding"]
  begin = 0 if config.restart_positions else spatial_valid.sum(1)[:, None]
  x = np.concatenate([
      np.broadcast_to(parameters["queries"], (batch, visual + grounding, config.width)),
      words[spatial_ids] + places[np.arange(counts[2])],
      words[caption_ids] + places[begin + np.broadcast_to(np.arange(counts[3]), (batch, counts[3]))]], axis=1)
  x = layer_norm(below(parameters, "norm"), x, config.norm_eps)
  valid = np.concatenate([np.ones((batch, visual + grounding), bool), spatial_valid, caption_valid], axis=1)
  mask = full_mask(objective, counts, valid)
  for number in range(config.layers):
    group, within = divmod(number, config.cross_attention_frequency)
    p = {path: value[group] for path, value in below(parameters, f"stack/blocks/layers/{within}").items()}
    x = attention(below(p, "self_attention"), x, x, mask, config.heads, config.norm_eps)
    v, g, text = x[:, :visual], x[:, visual:visual + grounding], x[:, visual + grounding:]
    if within == 0:
      everywhere = np.ones((batch, visual, image_tokens.shape[1]), bool)
      v = attention(below(p, "visual_attention"), v, image_tokens, everywhere, config.heads, config.norm_eps)
      local = np.broadcast_to(local_valid[:, None], (batch, grounding, local_valid.shape[1]))
      g = attention(below(p, "grounding_attention"), g, local_tokens, local, config.heads, config.norm_eps)
    queries = feed_forward(below(p, "query_mlp"), np.concatenate([v, g], axis=1), config.activation, config.norm_eps)
    text = feed_forward(below(p, "text_mlp"), text, config.activation, config.norm_eps)
    x = np.concatenate([queries, text], axis=1)
  ends = np.cumsum([visual + grounding, counts[2]])
  return x[:, :ends[0]], x[:, ends[0]:ends[1]], x[:, ends[1]:]


def cross_entropy(logits, targets, smoothing=0.0):
  log_p = np.log(softmax(logits))
  return -(1 - smoothing) * np.take_along_axis(log_p, targets[..., None], -1)[..., 0] - smoothing * log_p.mean(-1)


class Reference:
  """A stage-1 model: `parameters` by path as float64, `image_tokens` of the (separately tested) image encoder."""

  def __init__(self, parameters, config, image_tokens, batch):
    batch = {name: value[:, 0] if "pictures" in config.fields[name].dims else value for name, value in batch.items()}
    self.parameters, self.config, self.batch = parameters, config, batch
    self.smoothing = config.stage.objectives[0].label_smoothing  # the same of all objectives
    self.mq_config = config.stage.model.connector.former
    self.p = below(parameters, "connector/former")
    source = parameters["connector/local_tokens/source"]
    kinds = [linear(below(parameters, f"connector/local_tokens/{kind}"), batch[name].astype(np.float64)) + source[k]
             for k, (kind, name) in enumerate((("detection", "detection"), ("mask", "masks")))]
    self.image_tokens, self.local_tokens = image_tokens, np.concatenate(kinds, axis=1)
    self.local_valid = np.concatenate([batch["detection_mask"], batch["masks_mask"]], axis=1)
    self.spatial = batch["spatial_ids"], batch["spatial_mask"]
    self.caption = batch["caption_ids"], batch["caption_mask"]

  def run(self, objective, spatial, caption, pictures=None):
    pictures = np.arange(len(self.image_tokens)) if pictures is None else pictures
    return mq_former(self.p, self.mq_config, objective, self.image_tokens[pictures], self.local_tokens[pictures],
                     self.local_valid[pictures], spatial, caption)

  def absent(self, text):
    """The text masked out: no token of it is valid."""
    return text[0], np.zeros_like(text[1])

  def means(self, queries):
    visual = self.mq_config.visual_queries
    return queries[:, :visual].mean(1), queries[:, visual:].mean(1)

  def similarity(self, pooling="mean"):
    queries, spatial, caption = self.run("itc", self.spatial, self.caption)
    if pooling == "mean":
      inputs = [np.concatenate(self.means(queries), -1)]
    else:
      visual, blank = self.mq_config.visual_queries, np.zeros_like(queries[:, 0])
      inputs = [np.concatenate([query, blank] if n < visual else [blank, query], -1)
                for n, query in enumerate(queries.swapaxes(0, 1))]
    text = linear(below(self.parameters, "itc_text"), np.concatenate([spatial[:, 0], caption[:, 0]], -1))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    each = [unit(linear(below(self.parameters, "itc_image"), image)) @ unit(text).T for image in inputs]
    return np.max(each, axis=0) / self.parameters["temperature"]

  def itc(self):
    similarity, smoothing = self.similarity(), self.smoothing
    diagonal = np.arange(len(similarity))
    of_images = cross_entropy(similarity, diagonal, smoothing).mean()
    return (of_images + cross_entropy(similarity.T, diagonal, smoothing).mean()) / 2

  def itm(self, negative_pictures, negative_texts):
    """`negative_pictures`, `negative_texts`: int[B], the hard negatives of each pair."""
    own = np.arange(len(self.image_tokens))
    losses = {"V": [], "G": []}
    for pictures, texts, label in ((own, own, 1), (negative_pictures, own, 0), (own, negative_texts, 0)):
      pick = lambda text: (text[0][texts], text[1][texts])
      queries, _, _ = self.run("itm", pick(self.spatial), pick(self.caption), pictures)
      names_object = pick(self.spatial)[1].sum(1) > 1  # more than [BOS]
      for half, pooled in zip("VG", self.means(queries), strict=True):
        loss = cross_entropy(linear(below(self.parameters, "itm"), pooled), np.full(len(own), label))
        losses[half].extend(loss if half == "V" else loss[names_object])
    return (np.mean(losses["V"]) + np.mean(losses["G"])) / 2

  def words(self, hidden):
    p = below(self.parameters, "lm_head")
    x = layer_norm(below(p, "norm"), gelu(linear(below(p, "dense"), hidden)), self.mq_config.norm_eps)
    return x @ self.p["words/embedding"].T + p["bias"]

  def icg(self):
    ids, valid = self.batch["icg_ids"], self.batch["caption_mask"]
    hidden = self.run("icg", self.absent(self.spatial), (ids, valid))[2]
    losses = cross_entropy(self.words(hidden)[:, :-1], ids[:, 1:], self.smoothing)
    return losses[valid[:, 1:]].mean()

  def msp(self):
    targets = self.batch["msp_targets"]
    hidden = self.run("msp", (self.batch["msp_ids"], self.batch["spatial_mask"]), self.absent(self.caption))[1]
    losses = cross_entropy(self.words(hidden), np.maximum(targets, 0), self.smoothing)
    return losses[targets >= 0].mean()
