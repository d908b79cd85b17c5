"""A model small enough to compile in seconds, its parameters, and made-up batches, for the tests of models, stages and training.

No tokenizer and no records: token ids are drawn from a vocabulary of 48.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lyrics_jax.config import (AlignConfig, Config, DataConfig, LLMConfig, LoRAConfig, MQFormerConfig, ModelConfig, OptimizerConfig,
                               RefinerConfig, VisionConfig)
from lyrics_jax.stages import make_stage
from lyrics_jax.training.parameters import ParameterPlan
from lyrics_jax.training.sharding import make_mesh

VOCABULARY = 48
QUERIES = 4
PAD, BOS, CLS, DEC, MLM, MASK, WORDS = 0, 1, 2, 3, 4, 5, 6  # words are the ids from WORDS on


def make_config(stage: str = "align", **changes) -> Config:
  """Keyword arguments are dotted field names with `__` for the dot: `model__mq_former__layers=4`."""
  config = Config(
      stage=stage, output="unused", steps=10, batch_size=8,
      model=ModelConfig(
          vision=VisionConfig(image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp_dim=32),
          refiner=RefinerConfig(detection_rows=4, mask_rows=3, feature_width=12),
          mq_former=MQFormerConfig(width=16, layers=2, heads=2, mlp_dim=32, visual_queries=2, grounding_queries=2,
                                   cross_attention_frequency=1, vocab_size=VOCABULARY, max_positions=32, itc_width=8, dropout=0.0),
          llm=LLMConfig(vocab_size=VOCABULARY, width=16, layers=2, heads=2, kv_heads=2, mlp_dim=32,
                        lora=LoRAConfig(rank=4, dropout=0.0)),
          dtype="float32", frozen_dtype="float32"),
      align=AlignConfig(), optimizer=OptimizerConfig(peak_lr=1e-2),
      data=DataConfig(records="unused", mq_former_tokenizer="unused", llm_tokenizer="unused",
                      spatial_length=10, caption_length=8, llm_length=16))
  for name, value in changes.items():
    *parts, last = name.split("__")
    node = config
    for part in parts:
      node = getattr(node, part)
    setattr(node, last, value)
  config.finalize()
  return config


def make_plan(config: Config) -> ParameterPlan:
  return ParameterPlan.of(make_stage(config))


def one_device_mesh(config: Config):
  return make_mesh(config.mesh, jax.devices()[:1])


def make_parameters(plan: ParameterPlan, seed: int = 0, spread: float = 0.0):
  """(trained, frozen) on one device. With `spread`, noise of that scale is added, so that no bias is 0 and no scale is 1."""
  rng = np.random.default_rng(seed)
  noisy = lambda a: (a + spread * rng.standard_normal(a.shape)).astype(a.dtype) if a.ndim else a
  return tuple({path: jnp.asarray(noisy(np.asarray(value))) for path, value in part.items()}
               for part in plan.initialise(one_device_mesh(plan.stage.config), seed))


def make_batch(config: Config, seed: int = 0, rows: int | None = None) -> dict[str, np.ndarray]:
  """A batch that keeps the rules of the real ones: valid text in front, padding behind, rows of different lengths."""
  rng, model, data = np.random.default_rng(seed), config.model, config.data
  rows = rows or config.batch_size
  wide = model.refiner.feature_width + 4

  def sentence(first, length, shortest):
    lengths = rng.integers(shortest, length + 1, rows)
    mask = np.arange(length) < lengths[:, None]
    ids = np.where(mask, rng.integers(WORDS, VOCABULARY, (rows, length)), PAD).astype(np.int32)
    ids[:, 0] = first
    return ids, mask

  batch = {"image": rng.integers(0, 256, (rows, model.vision.image_size, model.vision.image_size, 3), np.uint8)}
  for name, count in (("detection", model.refiner.detection_rows), ("masks", model.refiner.mask_rows)):
    batch[f"{name}_mask"] = rng.random((rows, count)) < 0.7
    batch[name] = np.where(batch[f"{name}_mask"][..., None], rng.standard_normal((rows, count, wide)), 0).astype(np.float32)
  spatial, spatial_mask = sentence(BOS, data.spatial_length, 4)
  second, second_mask = sentence(CLS, data.caption_length, 3)
  batch |= {"spatial_ids": spatial, "spatial_mask": spatial_mask}
  if config.stage == "align":
    hidden = spatial_mask & (rng.random(spatial.shape) < 0.4)
    hidden[:, 0], hidden[:, 1] = False, True
    msp = np.where(hidden, MASK, spatial).astype(np.int32)
    msp[:, 0] = MLM
    icg = second.copy()
    icg[:, 0] = DEC
    return batch | {"msp_ids": msp, "msp_targets": np.where(hidden, spatial, -1).astype(np.int32),
                    "caption_ids": second, "caption_mask": second_mask, "icg_ids": icg}
  ids, mask = sentence(BOS, data.llm_length, QUERIES + 4)
  slot = np.full(ids.shape, -1, np.int32)
  slot[:, 2:2 + QUERIES] = np.arange(QUERIES)
  targets = mask & (rng.random(ids.shape) < 0.5) & (np.arange(data.llm_length) > QUERIES + 1)
  targets[:, QUERIES + 2] = True
  return batch | {"instruction_ids": second, "instruction_mask": second_mask,
                  "llm_ids": ids, "llm_mask": mask, "llm_targets": targets, "image_slot": slot}


def pad_batch(batch: dict[str, np.ndarray], longer: Config, seed: int = 0) -> dict[str, np.ndarray]:
  """The batch at the lengths of another configuration; all that is masked is filled with noise.

  But for padded caption ids: whether two captions are the same is asked of the ids, so their padding is always the same token.
  """
  rng, padded = np.random.default_rng(seed), {}
  mask_of = {"spatial_ids": "spatial_mask", "msp_ids": "spatial_mask", "caption_ids": "caption_mask", "icg_ids": "caption_mask",
             "instruction_ids": "instruction_mask", "llm_ids": "llm_mask", "detection": "detection_mask", "masks": "masks_mask"}
  fill = {"msp_targets": -1, "image_slot": -1, "caption_ids": PAD}
  for name, like in make_batch(longer).items():
    if name in fill or like.dtype == bool:
      padded[name] = np.full_like(like, fill.get(name, False))
    elif like.dtype == np.int32:
      padded[name] = rng.integers(0, VOCABULARY, like.shape).astype(np.int32)
    else:
      padded[name] = (100 * rng.standard_normal(like.shape)).astype(like.dtype)
    kept = batch[mask_of[name]] if name in mask_of else np.ones(batch[name].shape[:2], bool)
    padded[name][:, :batch[name].shape[1]][kept] = batch[name][kept]
  return padded


def numpy(parameters) -> dict[str, np.ndarray]:
  """Parameters as float64, for references."""
  return {path: np.asarray(value, np.float64) for path, value in parameters.items()}
