"""From converted weights, the MQ-Former without grounding queries gives what Hugging Face's Q-Formers give, and the
image encoder what CLIP gives: small, and at full size (slow).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from flax import nnx
from lavis_layout import image_encoder, q_former, random_clip, with_noise
from loaded import built, values_of

from lyrics_jax.config import Config
from lyrics_jax.weights import blip2
from lyrics_jax.models import visibility
from lyrics_jax.models.connectors.mq_former import MQFormer, MQFormerSettings
from lyrics_jax.models.inputs import spatial_and_caption
from lyrics_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD, ViT, ViTSettings

TOLERANCE = 1e-4  # float32 in both, summed in another order; post-norm outputs are of size 1
SIZES = ["small, cross-attention everywhere", "small", pytest.param("full", marks=pytest.mark.slow)]


def config_of(size: str, make_config, vocabulary: int) -> Config:
  if size == "full":
    former = MQFormerSettings(activation="gelu", grounding_queries=0, vocab_size=vocabulary)
    return make_config("instruct", stage__model__vision=ViTSettings(layers=23), connector__former=former)
  return make_config("instruct", former__grounding_queries=0,
                     former__cross_attention_frequency=1 if "everywhere" in size else 2)


def settings(config: Config, **more) -> dict:
  """Of the Q-Former, in Hugging Face's words."""
  former = config.stage.model.connector.former
  return dict(vocab_size=former.vocab_size, hidden_size=former.width, num_hidden_layers=former.layers,
              num_attention_heads=former.heads, intermediate_size=former.mlp_dim,
              max_position_embeddings=former.max_positions, encoder_hidden_size=config.stage.model.vision.width,
              cross_attention_frequency=former.cross_attention_frequency, **more)


def inputs(config: Config, vocabulary: int):
  rng, vision = np.random.default_rng(0), config.stage.model.vision
  image = rng.standard_normal((2, vision.tokens, vision.width)).astype(np.float32)
  return image, rng.integers(0, vocabulary, (2, 9)), np.arange(9) < np.array([[9], [6]])


def ours(config: Config, values, queries, image, ids, valid) -> dict[str, np.ndarray]:
  """Hidden states of the queries alone, of text alone and of both."""
  values = values | {f"{blip2.FORMER}/queries": queries}
  former = config.stage.model.connector.former
  graph, state = built(lambda: MQFormer(former, config.stage.model.vision.width, config.compute, rngs=nnx.Rngs(0)),
                       values, blip2.FORMER)

  @jax.jit
  def run(state):
    model = nnx.merge(graph, state)
    pictures = model.key_values(jnp.asarray(image))
    text = spatial_and_caption(None, (jnp.asarray(ids), jnp.asarray(valid)), True)
    return {"queries": model.query_pass(pictures)[0], "text": model.text_pass(text, visibility.ITC, None),
            "joint": jnp.concatenate(model.joint_pass(pictures, text, visibility.INSTRUCT), axis=1)}

  return jax.device_get(run(state))


def same(got, theirs, valid, queries):
  """`got` equals Hugging Face's outputs wherever there is no padding."""
  seen = np.ones((2, queries), bool)
  shown = {"queries": seen, "text": valid, "joint": np.concatenate([seen, valid], axis=1)}
  for name, expected in theirs.items():
    difference = np.abs(got[name] - expected.last_hidden_state.numpy())[shown[name]].max()
    print(f"largest difference, {name}: {difference:.1e}")
    assert difference < TOLERANCE, name


@pytest.mark.parametrize("size", SIZES)
def test_blip_2(size, make_config, tmp_path):
  config = config_of(size, make_config, vocabulary=30523)
  former, image_width = config.stage.model.connector.former, config.stage.model.vision.width
  model = with_noise(transformers.Blip2ForImageTextRetrieval(transformers.Blip2Config(
      vision_config=dict(hidden_size=image_width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8),
      qformer_config=settings(config, use_qformer_text_input=True), num_query_tokens=former.visual_queries,
      image_text_hidden_size=4)).eval())
  model.save_pretrained(tmp_path)
  values = values_of(blip2.find(tmp_path, config.stage.model, tiny.make_plan(config).shapes))
  image, ids, valid = inputs(config, former.vocab_size)
  got = ours(config, values, values[f"{blip2.FORMER}/queries"], image, ids, valid)

  queries, tokens = model.query_tokens.expand(2, -1, -1), torch.tensor(ids)
  seen = torch.cat([torch.ones(2, former.visual_queries), torch.tensor(valid)], dim=1).long()
  with torch.no_grad():
    theirs = {
        "queries": model.qformer(queries, encoder_hidden_states=torch.tensor(image)),
        "text": model.qformer(model.embeddings(tokens), query_length=0, attention_mask=torch.tensor(valid).long()),
        "joint": model.qformer(model.embeddings(tokens, query_embeds=queries), query_length=former.visual_queries,
                               encoder_hidden_states=torch.tensor(image), attention_mask=seen)}
  same(got, theirs, valid, former.visual_queries)


@pytest.mark.parametrize("size", SIZES)
def test_instruct_blip(size, make_config, tmp_path):
  config = config_of(size, make_config, vocabulary=30523)
  former = config.stage.model.connector.former
  model = transformers.InstructBlipQFormerModel(transformers.InstructBlipQFormerConfig(**settings(config)))
  model = with_noise(model.eval())
  model.save_pretrained(tmp_path)
  values = values_of(blip2.find(tmp_path, config.stage.model, tiny.make_plan(config).shapes))
  image, ids, valid = inputs(config, former.vocab_size)
  queries = torch.randn(former.visual_queries, former.width)  # not part of this model
  got = ours(config, values, queries.numpy(), image, ids, valid)

  tokens, batch, image = torch.tensor(ids), queries.expand(2, -1, -1), torch.tensor(image)
  one, text = torch.ones(2, former.visual_queries).long(), torch.tensor(valid).long()
  with torch.no_grad():
    theirs = {"queries": model(None, query_embeds=batch, attention_mask=one, encoder_hidden_states=image),
              "text": model(tokens, attention_mask=text),
              "joint": model(tokens, query_embeds=batch, attention_mask=torch.cat([one, text], dim=1),
                             encoder_hidden_states=image)}
  same(got, theirs, valid, former.visual_queries)


@pytest.mark.parametrize("size", SIZES[1:])
def test_image_encoder_in_openai_names(size, make_config, tmp_path):
  config = config_of(size, make_config, vocabulary=48)
  vision = config.stage.model.vision
  clip = random_clip(config)
  torch.save({"model": q_former(config) | image_encoder(clip)}, tmp_path / "blip2.pth")
  values = values_of(blip2.find(tmp_path / "blip2.pth", config.stage.model, tiny.make_plan(config).shapes))
  graph, state = built(lambda: ViT(vision, rngs=nnx.Rngs(0)), values, "vision")
  pictures = np.random.default_rng(0).integers(0, 256, (2, vision.image_size, vision.image_size, 3), np.uint8)
  got = jax.jit(lambda state: nnx.merge(graph, state)(jnp.asarray(pictures), jnp.float32))(state)
  normalised = torch.tensor(((pictures / 255 - PIXEL_MEAN) / PIXEL_STD).transpose(0, 3, 1, 2)).float()
  with torch.no_grad():
    expected = clip(normalised, output_hidden_states=True).hidden_states[-1].numpy()
  difference = np.abs(got - expected).max()
  print(f"largest difference: {difference:.1e}")
  assert difference < TOLERANCE
