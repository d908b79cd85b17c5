"""Without grounding queries the MQ-Former is BLIP-2's Q-Former: the same outputs as Hugging Face's, from the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from lyrics_jax.config import MQFormerConfig
from lyrics_jax.models import masks
from lyrics_jax.models.mq_former import MQFormer, spatial_and_caption

WIDTH, IMAGE_WIDTH, LAYERS, QUERIES, VOCABULARY = 16, 24, 4, 3, 40

# The package's module of a layer -> BLIP-2's.
ATTENTION = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense", "norm": "output.LayerNorm"}
MODULES = ({f"self_attention/{ours}": f"attention.{theirs}" for ours, theirs in ATTENTION.items()}
           | {f"visual_attention/{ours}": f"crossattention.{theirs}" for ours, theirs in ATTENTION.items()}
           | {"query_mlp/up": "intermediate_query.dense", "query_mlp/down": "output_query.dense",
              "query_mlp/norm": "output_query.LayerNorm", "text_mlp/up": "intermediate.dense", "text_mlp/down": "output.dense",
              "text_mlp/norm": "output.LayerNorm"})


def copied(path, shape, former, embeddings, queries, frequency):
  """The value of our parameter in BLIP-2's model."""
  top = {"queries": queries, "words/embedding": embeddings.word_embeddings.weight,
         "positions/embedding": embeddings.position_embeddings.weight,
         "norm/scale": former.layernorm.weight, "norm/bias": former.layernorm.bias}
  if path in top:
    return top[path].detach().numpy()
  _, _, _, within, *module, kind = path.split("/")  # stack/blocks/layers/N/module/.../kind
  if module[0] == "grounding_attention":
    return np.full(shape, np.nan)  # never computed with: not a number would show
  layers = [former.encoder.layer[group * frequency + int(within)] for group in range(LAYERS // frequency)]
  values = [getattr(layer.get_submodule(MODULES["/".join(module)]), "bias" if kind == "bias" else "weight") for layer in layers]
  return np.stack([(value.T if kind == "kernel" else value).detach().numpy() for value in values])


@pytest.fixture(scope="module", params=[1, 2])
def outputs(request):
  """{pass: (ours, theirs)} of the queries alone, text alone and both."""
  frequency = request.param
  torch.manual_seed(0)
  settings = transformers.Blip2QFormerConfig(
      vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=32,
      hidden_act="gelu", max_position_embeddings=12, cross_attention_frequency=frequency, encoder_hidden_size=IMAGE_WIDTH,
      use_qformer_text_input=True, layer_norm_eps=1e-12)
  settings._attn_implementation = "eager"
  former, embeddings = transformers.Blip2QFormerModel(settings).eval(), Blip2TextEmbeddings(settings)
  for parameter in (*former.parameters(), *embeddings.parameters()):
    torch.nn.init.normal_(parameter, std=0.3)
  queries = torch.randn(QUERIES, WIDTH)
  model = MQFormer(MQFormerConfig(width=WIDTH, layers=LAYERS, heads=2, mlp_dim=32, visual_queries=QUERIES, grounding_queries=0,
                                  cross_attention_frequency=frequency, activation="gelu", vocab_size=VOCABULARY,
                                  max_positions=12), IMAGE_WIDTH, dtype=jnp.float32, rngs=nnx.Rngs(0))
  graph, state = nnx.split(model)
  state = nnx.from_flat_state([
      (path, variable.replace(jnp.asarray(copied("/".join(map(str, path)), variable.shape, former, embeddings, queries, frequency))))
      for path, variable in nnx.to_flat_state(state)])

  rng = np.random.default_rng(0)
  image = rng.standard_normal((2, 7, IMAGE_WIDTH)).astype(np.float32)
  ids, valid = rng.integers(0, VOCABULARY, (2, 6)), np.array([[1] * 6, [1] * 4 + [0] * 2], bool)

  @jax.jit
  def run(state):
    model = nnx.merge(graph, state)
    sources = model.look(image, jnp.zeros((2, 0, WIDTH)), jnp.zeros((2, 0), bool))
    text = spatial_and_caption(None, (jnp.asarray(ids), jnp.asarray(valid)), True)
    return {"queries": model.query_pass(sources)[0], "text": model.text_pass(text, masks.ITC, None),
            "joint": jnp.concatenate(model.joint_pass(sources, text, masks.INSTRUCT), axis=1)}

  ours = run(state)
  batch_queries, tokens, image = queries.expand(2, -1, -1), torch.tensor(ids), torch.tensor(image)
  one = torch.ones(2, QUERIES, dtype=torch.long)
  text_valid = torch.tensor(valid).long()
  with torch.no_grad():
    theirs = {
        "queries": former(batch_queries, encoder_hidden_states=image),
        "text": former(embeddings(tokens), query_length=0, attention_mask=text_valid),
        "joint": former(embeddings(tokens, query_embeds=batch_queries), query_length=QUERIES, encoder_hidden_states=image,
                        attention_mask=torch.cat([one, text_valid], dim=1))}
  shown = {"queries": one.bool().numpy(), "text": valid, "joint": np.concatenate([one.bool().numpy(), valid], axis=1)}
  return {name: (np.asarray(ours[name])[shown[name]], theirs[name].last_hidden_state.numpy()[shown[name]]) for name in ours}


@pytest.mark.parametrize("name", ["queries", "text", "joint"])
def test_equals_blip_2(outputs, name):
  ours, theirs = outputs[name]
  np.testing.assert_allclose(ours, theirs, atol=1e-5)  # float32 in both, summed in another order
