"""Small runs on disk, with random parameters in place of trained ones: what is exported in these tests; and records."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import small
import tiny

from lyrics_jax.config import Config
from lyrics_jax.models.layers.int8 import SCALE
from lyrics_jax.training.checkpoint import Checkpoints, open_run
from lyrics_jax.training.parameters import ModelParameters
from refiner_export.records.manifest import Manifest, shard_name
from refiner_export.records.record import Record, conversation_items
from refiner_export.records.schema import SCHEMA_VERSION, Schema
from refiner_export.records.shard_files import ShardItem
from refiner_export.records.tfrecord import write_shard

MANIFEST = Manifest(schema_version=SCHEMA_VERSION, fingerprint="0123456789ab", feature_dtype="bfloat16",
                    detection_rows=6, refiner={"name": "made-up", "version": 1}, source="nowhere", split="train",
                    shards=(), records=6, conversations=48, pictures=6, skipped=0)


def make_run_config(stage: str, output, tokenizers: str, **changes) -> Config:
  """Real tokenizers and features of real width; changes as in `small.make_config`."""
  sizes = {"output": str(output), "vision__image_size": 28, "vision__patch_size": 14,
           "data__mq_former_tokenizer": f"{tokenizers}/mq_former", "data__llm_tokenizer": f"{tokenizers}/llm",
           "data__spatial_length": 96, "data__caption_length": 24, "data__llm_length": 320}
  if stage != "llava":
    sizes |= {"local__feature_width": 256, "local__detection_rows": 8, "local__mask_rows": 3,
              "former__vocab_size": 1024, "former__max_positions": 256}
  if stage != "align":
    sizes |= {"llm__vocab_size": 1024, "llm__max_positions": 512}
  return small.make_config(stage, **(sizes | changes))


def random_parameters(plan: ModelParameters, seed: int = 0) -> dict[str, np.ndarray]:
  """Parameters as checkpoints have them, in their storage dtypes. Outputs are of size 1, no bias is 0, no scale 1."""
  rng, parameters = np.random.default_rng(seed), {}
  for path, like in plan.shapes.items():
    if like.dtype == np.int8:
      value = rng.integers(-127, 128, like.shape)
    elif path.endswith(SCALE):
      value = rng.uniform(1e-3, 4e-3, like.shape)
    elif path == "temperature":
      value = np.array(0.07)
    else:
      value = path.endswith("/scale") + 0.2 * rng.standard_normal(like.shape)
    parameters[path] = value.astype(like.dtype)
  return parameters


def save_run(config: Config, step: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
  """Writes a run of these settings to `config.output`; returns its parameters by path."""
  plan = tiny.make_plan(config)
  parameters = random_parameters(plan, seed)
  trained, frozen = plan.split(parameters)
  checkpoints = Checkpoints(config.output)
  checkpoints.save_config(config, MANIFEST)
  checkpoints.save_frozen(plan.turned(jax.tree.map(jnp.asarray, frozen)), plan)
  checkpoints.manager.save(step, args=ocp.args.Composite(parameters=ocp.args.StandardSave(trained)))
  checkpoints.close()
  return parameters


def stored(output) -> dict[str, np.ndarray]:
  """All parameters of a run, by path, as Orbax itself reads them."""
  checkpoints, _ = open_run(str(output))
  parameters = checkpoints.restore_some(checkpoints.stored_shapes())
  checkpoints.close()
  return {path: np.asarray(value) for path, value in parameters.items()}


def write_records(records: Sequence[Record], directory: pathlib.Path) -> str:
  """An exported directory of these records; returns its path."""
  directory.mkdir()
  schema = Schema(MANIFEST.feature_dtype, MANIFEST.fingerprint)
  items = []
  for record in records:
    items.append(ShardItem(schema.encode(record), len(conversation_items(record)), len(record.pictures)))
  shard = write_shard(directory / shard_name(0, 1), items)
  dataclasses.replace(MANIFEST, shards=(shard,), records=len(records), pictures=len(records),
                      conversations=shard.conversations).save(directory)
  return str(directory)
