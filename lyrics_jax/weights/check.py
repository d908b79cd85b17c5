"""Compares a run's newest checkpoint with the Hugging Face directory made of it: both models, the same made-up inputs.

Differences are those of float32 sums in another order, about 1e-5 of outputs of size 1. Where kernels are in bfloat16
or int8, the exported ones also differ by rounding: those with merged LoRA, and those that were in int8.
"""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import torch
from etils import epath
from flax import nnx

from lyrics_jax.config import Config
from lyrics_jax.evaluation.trained import TrainedModel
from lyrics_jax.weights import exported
from lyrics_jax.torch_model import modeling_lyrics
from lyrics_jax.weights.sizes import read_settings
from lyrics_jax.models import masks
from lyrics_jax.models.clip import PIXEL_MEAN, PIXEL_STD
from lyrics_jax.models.mq_former import spatial_and_caption
from lyrics_jax.stages import make_stage
from lyrics_jax.stages.align import Align, image_features, image_text_similarity
from lyrics_jax.stages.base import Batch, Stage
from lyrics_jax.stages.instruct import Instruct
from lyrics_jax.training.parameters import ParameterPlan
from refiner_export.common.settings import require

_ROWS = 2


def compare(checkpoint: str, hf_directory: str) -> dict[str, float]:
  """Prints and returns the largest difference per part; a part that only one of them has is left out.

  Raises `UserError` when there is no such run or directory, one is not of the other, or the directory is not whole.
  """
  directory = epath.Path(hf_directory)
  require((directory / "config.json").exists(),
          f"{hf_directory} is not a Hugging Face directory, it has no config.json: name one that to-hf wrote")
  architecture = next(iter(read_settings(directory).get("architectures") or []), "")
  stage_of = {"LyricsForAlignment": "align", "LyricsForConditionalGeneration": "instruct"}
  require(architecture in stage_of, f"{hf_directory} holds a {architecture or 'model of unknown class'}, not a Lyrics "
                                    "model: name a directory that to-hf wrote")
  trained = TrainedModel(checkpoint, stage_of[architecture])
  # transformers would fill in at random what is missing, and say so among other things.
  exported.find(directory, trained.config.model, trained.plan.shapes).require_known()
  batch = made_up_batch(trained.config)
  ours = _in_float32(trained, batch)
  del trained
  gc.collect()  # the two models need not be in memory at once
  model = getattr(modeling_lyrics, architecture).from_pretrained(directory, dtype=torch.float32).eval()
  theirs = torch_outputs(model, batch)

  differences = {}
  print(f"{'part':16}{'largest difference':>20}{'largest value':>16}")
  for name, value in theirs.items():
    expected = ours.pop(name)
    require(value.shape == expected.shape, f"{hf_directory} is not made of {checkpoint}: {name} has shape "
                                           f"{value.shape} there, {expected.shape} here")
    differences[name] = float(np.abs(value - expected).max())
    print(f"{name:16}{differences[name]:20.2e}{np.abs(expected).max():16.3g}")
  for name in ours:
    print(f"{name:16}{'not in the directory':>20}")
  return differences


def made_up_batch(config: Config, seed: int = 0) -> Batch:
  """Two random examples of either stage, of different lengths; their padding is masked, as in a real batch."""
  rng, model, data = np.random.default_rng(seed), config.model, config.data
  size, width = model.vision.image_size, model.refiner.feature_width + 4

  def text(name: str, length: int, vocabulary: int) -> Batch:
    mask = np.arange(length) < np.array([[length], [max(length // 2, 2)]])
    return {f"{name}_ids": rng.integers(0, vocabulary, (_ROWS, length)).astype(np.int32), f"{name}_mask": mask}

  batch = {"image": rng.integers(0, 256, (_ROWS, size, size, 3)).astype(np.uint8)}
  for name, rows in (("detection", model.refiner.detection_rows), ("masks", model.refiner.mask_rows)):
    batch |= {name: rng.standard_normal((_ROWS, rows, width)).astype(np.float32),
              f"{name}_mask": rng.random((_ROWS, rows)) < 0.7}
  batch |= text("spatial", data.spatial_length, model.mq_former.vocab_size)
  if config.stage == "align":
    batch |= text("caption", data.caption_length, model.mq_former.vocab_size)
    return batch | {"icg_ids": batch["caption_ids"], "msp_ids": batch["spatial_ids"]}
  queries = model.mq_former.visual_queries + model.mq_former.grounding_queries
  batch |= text("instruction", data.caption_length, model.mq_former.vocab_size)
  batch |= text("llm", data.llm_length, model.llm.vocab_size)
  batch["llm_mask"][1] |= np.arange(data.llm_length) < queries + 2
  slot = np.full((_ROWS, data.llm_length), -1, np.int32)
  slot[:, 1:1 + queries] = np.arange(queries)
  return batch | {"image_slot": slot}


def jax_outputs(stage: Stage, model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
  """What each part of a JAX model makes of a batch, by part; zero at padding."""
  perception = model.perception
  mq_former = perception.mq_former
  sources = perception.look(batch)
  outputs = {"vision": perception.image_norm(perception.vision(batch["image"], perception.dtype))}
  visible = lambda logits, name: jnp.where(batch[f"{name}_mask"][..., None], logits, 0)
  if isinstance(stage, Instruct):
    queries = stage.see(model, batch, None)
    segments = batch["llm_mask"].astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    hidden, _ = model.llm(stage.embed(model, batch, None), positions, segments)
    return outputs | {"mq-former": queries, "projection": model.projection(queries),
                      "llm logits": visible(model.llm.logits(hidden), "llm")}
  assert isinstance(stage, Align)
  queries, context = mq_former.query_pass(sources)
  text, pooling = stage.text(model, batch), stage.config.align.itc_pooling
  matched = mq_former.joint_pass(sources, text, masks.ITM, read=())[0]
  join = lambda spatial, caption: spatial_and_caption(spatial, caption, mq_former.config.restart_positions)
  caption = mq_former.text_pass(join(None, (batch["icg_ids"], batch["caption_mask"])), masks.ICG, context)
  spatial = mq_former.text_pass(join((batch["msp_ids"], batch["spatial_mask"]), None), masks.MSP, context)
  return outputs | {
      "mq-former": image_features(model, queries, pooling),
      "itc": image_text_similarity(model, queries, text, pooling, None),
      "itm": jnp.stack([model.itm(pooled) for pooled in mq_former.pool(matched)], axis=1),
      "icg": visible(model.lm_head(caption, mq_former.words), "caption"),
      "msp": visible(model.lm_head(spatial, mq_former.words), "spatial")}


@torch.no_grad()
def torch_outputs(model: modeling_lyrics.LyricsPreTrainedModel, batch: Batch) -> dict[str, np.ndarray]:
  """The same of a PyTorch model, by the same names; without "llm logits" where it has no language model."""
  given = {name: torch.from_numpy(np.asarray(value)) for name, value in batch.items()}
  given = {name: value.long() if value.dtype == torch.int32 else value for name, value in given.items()}
  image = given.pop("image").float() / 255
  given["pixel_values"] = ((image - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)).permute(0, 3, 1, 2)
  pair = lambda name: (given[f"{name}_ids"], given[f"{name}_mask"])
  local = {name: given[name] for name in ("detection", "detection_mask", "masks", "masks_mask")}
  outputs = {"vision": model.look(given["pixel_values"], **local).image}
  visible = lambda logits, name: torch.where(given[f"{name}_mask"][..., None], logits, 0)
  if isinstance(model, modeling_lyrics.LyricsForAlignment):
    made = model(**{name: value for name, value in given.items() if name != "msp_targets"})
    outputs |= {"mq-former": made.image_features, "itc": made.logits_per_image, "itm": made.itm_logits,
                "icg": visible(made.icg_logits, "caption"), "msp": visible(made.msp_logits, "spatial")}
  else:
    queries = model.see(given["pixel_values"], pair("spatial"), pair("instruction"), **local)
    outputs |= {"mq-former": queries, "projection": model.projection(queries)}
    if model.language_model is not None:
      rest = {name: value for name, value in given.items() if name not in ("llm_ids", "llm_mask", "llm_targets")}
      logits = model(input_ids=given["llm_ids"], attention_mask=given["llm_mask"].long(), **rest).logits
      outputs["llm logits"] = visible(logits, "llm")
  return {name: value.float().numpy() for name, value in outputs.items()}


def _in_float32(trained: TrainedModel, batch: Batch) -> dict[str, np.ndarray]:
  """What a run's model makes of a batch, computed in float32 whatever it trains in."""
  config = dataclasses.replace(trained.config, model=dataclasses.replace(trained.config.model, dtype="float32"))
  plan = ParameterPlan.of(make_stage(config))
  run = jax.jit(lambda parameters, batch: jax_outputs(plan.stage, plan.model(*parameters), batch))
  with jax.set_mesh(trained.mesh):
    return jax.device_get(run(trained.parameters, batch))
