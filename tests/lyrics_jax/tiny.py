"""Models small enough to compile in seconds, their parameters, and made-up batches, for tests.

No tokenizer and no records: token ids are drawn from a vocabulary of 48.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lyrics_jax.config import Config
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.pairs import Pairs
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.models.aligner import AlignerSettings
from lyrics_jax.models.connectors.local_tokens import LocalTokensSettings
from lyrics_jax.models.connectors.mlp import MLPSettings
from lyrics_jax.models.connectors.mq_former import MQFormerSettings
from lyrics_jax.models.connectors.q_former import QFormerSettings
from lyrics_jax.models.layers.compute import Compute
from lyrics_jax.models.layers.lora import LoRASettings
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.models.vision.vit import ViTSettings
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.objectives.icg import ICG
from lyrics_jax.objectives.itc import ITC
from lyrics_jax.objectives.itm import ITM
from lyrics_jax.objectives.msp import MSP
from lyrics_jax.objectives.next_token import NextToken
from lyrics_jax.sharding import make_mesh
from lyrics_jax.stage import Stage
from lyrics_jax.training.optimizer import OptimizerSettings
from lyrics_jax.training.parameters import ModelParameters

VOCABULARY = 48
QUERIES = 4
PAD, BOS, CLS, DEC, MLM, MASK, WORDS = 0, 1, 2, 3, 4, 5, 6  # words are the ids from WORDS on

EVERYTHING = ("connector/*", "itc_*", "itm/*", "temperature", "lm_head/*")  # all of an aligner but its image encoder
LORA = ("connector/*", "llm/*/lora_*")
FULL = ("connector/*", "llm/*")
# What of a language model trains, as changes for `make_config`.
TRAIN = {"full": {"stage__train": FULL, "stage__model__llm__lora": None}, "lora": {"stage__train": LORA},
         "frozen": {"stage__train": ("connector/*",), "stage__model__llm__lora": None}}


def vision(**changes) -> ViTSettings:
  return ViTSettings(**(dict(image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp_dim=32) | changes))


def connector() -> QFormerSettings:
  return QFormerSettings(
      former=MQFormerSettings(width=16, layers=2, heads=2, mlp_dim=32, visual_queries=2, grounding_queries=2,
                              cross_attention_frequency=1, vocab_size=VOCABULARY, max_positions=32, dropout=0.0),
      local=LocalTokensSettings(detection_rows=4, mask_rows=3, feature_width=12))


def llm() -> LlamaSettings:
  return LlamaSettings(vocab_size=VOCABULARY, width=16, layers=2, heads=2, kv_heads=2, mlp_dim=32,
                       lora=LoRASettings(rank=4, dropout=0.0))


def align_stage() -> Stage:
  return Stage(AlignerSettings(vision(), connector(), itc_width=8), (ITC(), ITM(), ICG(), MSP()), EVERYTHING)


def instruct_stage() -> Stage:
  return Stage(VLMSettings(vision(), connector(), llm()), (NextToken(),), LORA)


def llava_stage() -> Stage:
  """LLaVA-1.5's first stage: the image encoder without its class token, an MLP, and the MLP alone trained."""
  language_model = llm()
  language_model.lora = None
  return Stage(VLMSettings(vision(class_token="drop"), MLPSettings(), language_model), (NextToken(),), ("connector/*",))


STAGES = {"align": align_stage, "instruct": instruct_stage, "llava": llava_stage}


def make_config(stage: str = "align", **changes) -> Config:
  """A configuration of one of `STAGES`.

  Keyword arguments are dotted field names with `__` for the dot: `stage__model__connector__former__layers=4`.
  """
  pairs = stage == "align"
  config = Config(
      stage=STAGES[stage](), output="unused", steps=10, batch_size=8,
      compute=Compute(dtype="float32", frozen_dtype="float32"), optimizer=OptimizerSettings(peak_lr=1e-2),
      data=DataSettings(records="unused", mq_former_tokenizer="unused", llm_tokenizer="unused",
                        rows=Pairs() if pairs else Conversations(), spatial_length=10, caption_length=8, llm_length=16))
  for name, value in changes.items():
    *parts, last = name.split("__")
    node = config
    for part in parts:
      node = node[int(part)] if part.isdigit() else getattr(node, part)
    setattr(node, last, value)
  config.finalize()
  return config


def make_plan(config: Config) -> ModelParameters:
  return ModelParameters.of(config)


def one_device_mesh(config: Config):
  return make_mesh(config.mesh, jax.devices()[:1])


def make_parameters(parameters: ModelParameters, seed: int = 0, spread: float = 0.0):
  """(trained, frozen) on one device. With `spread`, noise of that scale is added: no bias is 0 and no scale is 1."""
  rng = np.random.default_rng(seed)

  def noisy(value: jax.Array) -> jax.Array:
    value = np.asarray(value)
    return jnp.asarray((value + spread * rng.standard_normal(value.shape)).astype(value.dtype) if value.ndim else value)

  fresh = parameters.initialise(one_device_mesh(parameters.config), seed)
  return tuple({path: noisy(value) for path, value in part.items()} for part in fresh)


def make_batch(config: Config, seed: int = 0, rows: int | None = None) -> dict[str, np.ndarray]:
  """A batch that keeps the rules of real ones: valid text in front, padding behind, rows of different lengths."""
  rng, data, sizes = np.random.default_rng(seed), config.data, config.dimensions
  rows = rows or config.batch_size

  def sentence(first: int, length: int, shortest: int):
    mask = np.arange(length) < rng.integers(shortest, length + 1, rows)[:, None]
    ids = np.where(mask, rng.integers(WORDS, VOCABULARY, (rows, length)), PAD).astype(np.int32)
    ids[:, 0] = first
    return ids, mask

  batch = {"image": rng.integers(0, 256, (rows, 1, sizes.image_size, sizes.image_size, 3), np.uint8),
           "picture_mask": np.ones((rows, 1), bool), "picture_id": np.arange(rows, dtype=np.int32)[:, None]}
  for name, count in (("detection", sizes.detection_rows), ("masks", sizes.mask_rows)):
    mask = rng.random((rows, 1, count)) < 0.7
    values = rng.standard_normal((rows, 1, count, sizes.local_width))
    batch |= {name: np.where(mask[..., None], values, 0).astype(np.float32), f"{name}_mask": mask}
  spatial, spatial_mask = sentence(BOS, data.spatial_length, 4)
  second, second_mask = sentence(CLS, data.caption_length, 3)
  hidden = spatial_mask & (rng.random(spatial.shape) < 0.4)
  hidden[:, 0], hidden[:, 1] = False, True
  msp, icg = np.where(hidden, MASK, spatial).astype(np.int32), second.copy()
  msp[:, 0], icg[:, 0] = MLM, DEC
  batch |= {"spatial_ids": spatial[:, None], "spatial_mask": spatial_mask[:, None],
            "msp_ids": msp[:, None], "msp_targets": np.where(hidden, spatial, -1).astype(np.int32)[:, None],
            "caption_ids": second, "caption_mask": second_mask, "icg_ids": icg,
            "instruction_ids": second[:, None], "instruction_mask": second_mask[:, None]}
  tokens = sizes.tokens
  ids, mask = sentence(BOS, data.llm_length, tokens + 4)
  slot = np.full(ids.shape, -1, np.int32)
  slot[:, 2:2 + tokens] = np.arange(tokens)
  targets = mask & (rng.random(ids.shape) < 0.5) & (np.arange(data.llm_length) > tokens + 1)
  targets[:, tokens + 2] = True
  batch |= {"ids": ids, "segments": mask.astype(np.int32), "targets": targets, "slot": slot}
  return {name: batch[name] for name in config.fields}


def pad_batch(batch: dict[str, np.ndarray], longer: Config, seed: int = 0) -> dict[str, np.ndarray]:
  """The batch at the lengths of another configuration; whatever is masked there is filled with noise.

  Padded caption ids keep the padding token: whether two captions are the same is asked of the ids.
  """
  rng, padded = np.random.default_rng(seed), {}
  for name, like in make_batch(longer).items():
    field = longer.fields[name]
    if field.padding == -1 or like.dtype == bool or name in ("caption_ids", "segments"):
      padded[name] = np.full_like(like, field.padding)
    elif like.dtype == np.int32:
      padded[name] = rng.integers(0, VOCABULARY, like.shape).astype(np.int32)
    else:
      padded[name] = (100 * rng.standard_normal(like.shape)).astype(like.dtype)
    axis = 2 if "pictures" in field.dims and like.ndim > 2 else 1
    if name == "image":
      padded[name] = batch[name]
      continue
    inside = (slice(None),) * axis + (slice(batch[name].shape[axis]),) if like.ndim > axis else ...
    kept = batch[name]
    if field.mask not in (None, name) and batch[field.mask].dtype == bool:
      mask = batch[field.mask].reshape(batch[field.mask].shape + (1,) * (kept.ndim - batch[field.mask].ndim))
      kept = np.where(mask, kept, padded[name][inside])
    padded[name][inside] = kept
  return padded


def numpy(parameters) -> dict[str, np.ndarray]:
  """Parameters as float64, for references."""
  return {path: np.asarray(value, np.float64) for path, value in parameters.items()}
