"""BLIP-2's ViT-g with the norm behind it equals Hugging Face's, small and at full width.

It has no input norm, a bias on its patches and the exact GELU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from lyrics_jax.models.vision.vit import ViTSettings
from lyrics_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD, ViT
from lyrics_jax.models.layers.norms import LayerNorm

TOLERANCE = 1e-4  # float32 in both, summed in another order; behind the norm outputs are of size 1
FULL = ViTSettings.eva_vit_g_14()
EVA = {"input_norm": False, "patch_bias": True, "activation": "gelu"}
SIZES = {"small": ViTSettings(**EVA, image_size=12, patch_size=4, width=32, layers=3, heads=4, mlp_dim=48,
                              norm_eps=1e-6),
         # 2 of 39 layers: they are all alike
         "full width": ViTSettings(**EVA, width=FULL.width, layers=2, mlp_dim=FULL.mlp_dim, norm_eps=FULL.norm_eps)}


def test_the_published_size_is_hugging_faces_default():
  theirs = transformers.Blip2VisionConfig()
  assert (FULL.width, FULL.layers, FULL.heads, FULL.mlp_dim, FULL.image_size, FULL.patch_size, FULL.norm_eps) == (
      theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.intermediate_size,
      theirs.image_size, theirs.patch_size, theirs.layer_norm_eps)


@pytest.mark.parametrize("size", SIZES)
def test_equals_hugging_face(size):
  config = SIZES[size]
  torch.manual_seed(0)
  theirs = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(
      hidden_size=config.width, intermediate_size=config.mlp_dim, num_hidden_layers=config.layers,
      num_attention_heads=config.heads, image_size=config.image_size, patch_size=config.patch_size)).eval()
  for parameter in theirs.parameters():
    torch.nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else (len(parameter) / parameter.numel()) ** 0.5)

  def both(rngs):
    return nnx.Dict(vision=ViT(config, rngs=rngs), norm=LayerNorm(config.width, config.norm_eps, rngs=rngs))

  def third(n, kind):  # of query, key and value, below each other
    return [getattr(layer.self_attn.qkv, kind).chunk(3)[n] for layer in theirs.encoder.layers]

  def copied(path):
    """Our parameter, written out by hand from their modules."""
    *_, module, leaf = path
    kind = "bias" if leaf == "bias" else "weight"
    embeddings = theirs.embeddings
    if path[0] == "norm":
      return getattr(theirs.post_layernorm, kind)
    if path[1] == "patch":
      patch = embeddings.patch_embedding
      return patch.bias if kind == "bias" else patch.weight.permute(2, 3, 1, 0).reshape(-1, config.width)
    if path[1] in ("class_token", "positions"):
      return {"class_token": embeddings.class_embedding[0, 0], "positions": embeddings.position_embedding[0]}[path[1]]
    name = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "o": "self_attn.projection", "up": "mlp.fc1",
            "down": "mlp.fc2"}.get(module)
    values = (third("qkv".index(module), kind) if module in "qkv"
              else [getattr(layer.get_submodule(name), kind) for layer in theirs.encoder.layers])
    return torch.stack([value.T if leaf == "kernel" else value for value in values])

  graph, state = nnx.split(nnx.eval_shape(lambda: both(nnx.Rngs(0))))
  state = nnx.from_flat_state([(path, variable.replace(jnp.asarray(copied(path).detach().numpy())))
                               for path, variable in nnx.to_flat_state(state)])
  count = sum(parameter.numel() for parameter in theirs.parameters())
  assert sum(value.size for value in jax.tree.leaves(state)) == count

  @jax.jit
  def ours(state, pictures):
    model = nnx.merge(graph, state)
    return model["norm"](model["vision"](pictures, jnp.float32))

  pictures = np.random.default_rng(0).integers(0, 256, (2, config.image_size, config.image_size, 3), np.uint8)
  with torch.no_grad():
    pixels = torch.tensor(((pictures / 255 - PIXEL_MEAN) / PIXEL_STD).transpose(0, 3, 1, 2)).float()
    expected = theirs(pixels).last_hidden_state
  difference = np.abs(ours(state, pictures) - expected.numpy()).max()
  print(f"largest difference: {difference:.1e}")
  assert difference < TOLERANCE
