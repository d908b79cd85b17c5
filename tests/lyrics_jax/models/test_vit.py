"""The image encoder equals Hugging Face's CLIP."""

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from lyrics_jax.models.vision.vit import ViTSettings
from lyrics_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD, ViT

MODULES = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
           "v": "self_attn.v_proj", "o": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}


def test_equals_hugging_face():
  torch.manual_seed(0)
  theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
      hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=12, patch_size=4,
      hidden_act="quick_gelu")).eval()
  for parameter in theirs.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
  vision = getattr(theirs, "vision_model", theirs)  # the wrapper went away in transformers 5

  def copied(path):
    if path[0] == "stack":
      modules = [layer.get_submodule(MODULES[path[2]]) for layer in vision.encoder.layers]
      values = [module.bias if path[3] == "bias" else module.weight for module in modules]
      return torch.stack([value.T if path[3] == "kernel" else value for value in values])
    embeddings = vision.embeddings
    if path[0] == "input_norm":
      return vision.pre_layrnorm.weight if path[-1] == "scale" else vision.pre_layrnorm.bias
    if path[0] == "patch":
      return embeddings.patch_embedding.weight.permute(2, 3, 1, 0).reshape(-1, 32)
    single = {"class_token": embeddings.class_embedding, "positions": embeddings.position_embedding.weight}
    return single[path[0]]

  config = ViTSettings(image_size=12, patch_size=4, width=32, layers=3, heads=4, mlp_dim=48)
  graph, state = nnx.split(ViT(config, rngs=nnx.Rngs(0)))
  state = nnx.from_flat_state([(path, variable.replace(jnp.asarray(copied(path).detach().numpy())))
                               for path, variable in nnx.to_flat_state(state)])
  pictures = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
  ours = nnx.merge(graph, state)(jnp.asarray(pictures), jnp.float32)
  normalised = (pictures / 255 - PIXEL_MEAN) / PIXEL_STD
  processor = transformers.CLIPImageProcessor()
  np.testing.assert_allclose((PIXEL_MEAN, PIXEL_STD), (processor.image_mean, processor.image_std), rtol=1e-6)
  with torch.no_grad():
    pixels = torch.tensor(normalised.transpose(0, 3, 1, 2)).float()
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-1].numpy()
  assert ours.shape == (2, config.tokens, 32)
  # float32 in both; the residual stream grows to about 10.
  np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
