"""BLIP-2's stage-1 weights as LAVIS stores them, with random numbers: names and shapes written out again."""

import torch
import transformers

from lyrics_jax.config import Config

WORDS = 41  # rows of the file's word embedding; BLIP-2's own are 30523


def linear(name, n, m):
  return {f"{name}.weight": (m, n), f"{name}.bias": (m,)}


def norm(name, width):
  return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def attention(name, width, source):
  projections = linear(f"{name}.self.query", width, width) | linear(f"{name}.self.key", source, width)
  return (projections | linear(f"{name}.self.value", source, width) | linear(f"{name}.output.dense", width, width)
          | norm(f"{name}.output.LayerNorm", width))


def q_former(config: Config, words: int = WORDS) -> dict[str, torch.Tensor]:
  """The Q-Former with its heads, of the sizes of `config`."""
  former, image = config.stage.model.connector.former, config.stage.model.vision.width
  width, bert, head = former.width, "Qformer.bert", "Qformer.cls.predictions"
  shapes = {"query_tokens": (1, former.visual_queries, width), "temp": (), f"{head}.bias": (words,),
            f"{bert}.embeddings.position_ids": (1, former.max_positions),
            f"{bert}.embeddings.word_embeddings.weight": (words, width),
            f"{bert}.embeddings.position_embeddings.weight": (former.max_positions, width)}
  shapes |= norm(f"{bert}.embeddings.LayerNorm", width) | norm("ln_vision", image) | linear("itm_head", width, 2)
  shapes |= linear("vision_proj", width, 256) | linear("text_proj", width, 256)
  shapes |= linear(f"{head}.transform.dense", width, width) | norm(f"{head}.transform.LayerNorm", width)
  for n in range(former.layers):
    layer = f"{bert}.encoder.layer.{n}"
    shapes |= attention(f"{layer}.attention", width, width)
    if n % former.cross_attention_frequency == 0:
      shapes |= attention(f"{layer}.crossattention", width, image)
    for suffix in ("", "_query"):
      shapes |= linear(f"{layer}.intermediate{suffix}.dense", width, former.mlp_dim)
      shapes |= linear(f"{layer}.output{suffix}.dense", former.mlp_dim, width)
      shapes |= norm(f"{layer}.output{suffix}.LayerNorm", width)
  torch.manual_seed(0)
  tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
  # torch.save keeps these two as one, as they are in the model.
  tensors[f"{head}.decoder.weight"] = tensors[f"{bert}.embeddings.word_embeddings.weight"]
  tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"]
  return tensors


_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
         "mlp.fc2": "mlp.c_proj"}


def image_encoder(clip: transformers.CLIPVisionModel) -> dict[str, torch.Tensor]:
  """A CLIP image encoder in OpenAI's names, below `visual_encoder`."""
  vision = getattr(clip, "vision_model", clip)  # the wrapper went away in transformers 5
  tensors = {"conv1.weight": vision.embeddings.patch_embedding.weight,
             "class_embedding": vision.embeddings.class_embedding,
             "positional_embedding": vision.embeddings.position_embedding.weight,
             "ln_pre.weight": vision.pre_layrnorm.weight, "ln_pre.bias": vision.pre_layrnorm.bias}
  for n, layer in enumerate(vision.encoder.layers):
    block = f"transformer.resblocks.{n}"
    for kind in ("weight", "bias"):
      projections = [getattr(layer.get_submodule(f"self_attn.{name}_proj"), kind) for name in "qkv"]
      tensors[f"{block}.attn.in_proj_{kind}"] = torch.cat(projections)
      for theirs, openai in _CLIP.items():
        tensors[f"{block}.{openai}.{kind}"] = getattr(layer.get_submodule(theirs), kind)
  return {f"visual_encoder.{name}": tensor.detach() for name, tensor in tensors.items()}


_VIT_G = {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
          "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
          "embeddings.patch_embedding.bias": "patch_embed.proj.bias"}
_VIT_G_BLOCK = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.projection": "attn.proj",
                "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def vit_g(vision: torch.nn.Module) -> dict[str, torch.Tensor]:
  """A `Blip2VisionModel` whose keys have no bias in LAVIS' names, and the norm behind it."""
  theirs = vision.state_dict()
  tensors = {f"visual_encoder.{ours}": theirs[name] for name, ours in _VIT_G.items()}
  for n in range(vision.config.num_hidden_layers):
    layer, block = f"encoder.layers.{n}", f"visual_encoder.blocks.{n}"
    query, key, value = theirs[f"{layer}.self_attn.qkv.bias"].chunk(3)
    assert not key.any()
    tensors |= {f"{block}.attn.q_bias": query, f"{block}.attn.v_bias": value,
                f"{block}.attn.qkv.weight": theirs[f"{layer}.self_attn.qkv.weight"]}
    tensors |= {f"{block}.{ours}.{kind}": theirs[f"{layer}.{name}.{kind}"]
                for name, ours in _VIT_G_BLOCK.items() for kind in ("weight", "bias")}
  return tensors | {f"ln_vision.{kind}": theirs[f"post_layernorm.{kind}"] for kind in ("weight", "bias")}


def random_clip(config: Config) -> transformers.CLIPVisionModel:
  """Hugging Face's image encoder of the sizes of `config.stage.model.vision`, with noise on every parameter."""
  vision = config.stage.model.vision
  clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
      hidden_size=vision.width, intermediate_size=vision.mlp_dim, num_hidden_layers=vision.layers,
      num_attention_heads=vision.heads, image_size=vision.image_size, patch_size=vision.patch_size,
      hidden_act="quick_gelu"))
  return with_noise(clip.eval())


@torch.no_grad()
def with_noise(model: torch.nn.Module) -> torch.nn.Module:
  """No bias stays 0, no scale 1; small enough for a sum over a row to stay of size 1."""
  torch.manual_seed(0)
  for parameter in model.parameters():
    parameter.add_(0.5 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
  return model
