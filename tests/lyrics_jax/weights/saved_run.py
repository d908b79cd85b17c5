"""Small runs on disk, with random parameters in place of trained ones: what is exported in these tests; and records."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import orbax.checkpoint as ocp
import tiny

from lyrics_jax.config import Config
from lyrics_jax.models.quantised import SCALE
from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.parameters import ParameterPlan
from refiner_export.records.manifest import Manifest, shard_name
from refiner_export.records.record import SCHEMA_VERSION, Record, Schema
from refiner_export.records.tfrecord import write_shard

MANIFEST = Manifest(schema_version=SCHEMA_VERSION, fingerprint="0123456789ab", feature_dtype="bfloat16",
                    detection_rows=6, refiner={"name": "made-up", "version": 1}, source="nowhere", split="train",
                    shards=(), records=6, conversations=48, skipped=0)


def make_run_config(stage: str, output, tokenizers: str, **changes) -> Config:
  """Real tokenizers and features of real width; changes as in `tiny.make_config`."""
  return tiny.make_config(stage, **{
      "output": str(output), "model__refiner__feature_width": 256, "model__refiner__detection_rows": 8,
      "model__refiner__mask_rows": 3, "model__mq_former__vocab_size": 1024, "model__mq_former__max_positions": 256,
      "model__llm__vocab_size": 1024, "model__llm__max_positions": 512, "model__vision__image_size": 28,
      "model__vision__patch_size": 14, "data__mq_former_tokenizer": f"{tokenizers}/mq_former",
      "data__llm_tokenizer": f"{tokenizers}/llm", "data__spatial_length": 96, "data__caption_length": 24,
      "data__llm_length": 320, **changes})


def random_parameters(plan: ParameterPlan, seed: int = 0) -> dict[str, np.ndarray]:
  """Parameters by path, in their storage dtypes; outputs are of size 1, no bias is 0, no scale 1."""
  rng = np.random.default_rng(seed)

  def draw(path, like):
    if like.dtype == np.int8:
      return rng.integers(-127, 128, like.shape)
    if path.endswith(SCALE):
      return rng.uniform(1e-3, 4e-3, like.shape)
    return (0.07 if path == "temperature" else 1.0 if path.endswith("/scale") else 0.0) + (
        0.2 * rng.standard_normal(like.shape) if like.shape else 0)

  return {path: np.asarray(draw(path, like)).astype(like.dtype) for path, like in plan.shapes.items()}


def save_run(config: Config, step: int = 7) -> dict[str, np.ndarray]:
  """Writes a run of these settings to `config.output`; returns its parameters by path."""
  plan = tiny.make_plan(config)
  parameters = random_parameters(plan, seed=step)
  trained, frozen = plan.split(parameters)
  checkpoints = Checkpoints(config.output)
  checkpoints.save_config(config, MANIFEST)
  checkpoints.save_frozen(frozen)
  checkpoints.manager.save(step, args=ocp.args.Composite(parameters=ocp.args.StandardSave(trained)))
  checkpoints.close()
  return parameters


def write_records(records: Sequence[Record], directory: pathlib.Path) -> str:
  """An exported directory of these records; returns its path."""
  directory.mkdir()
  schema = Schema(MANIFEST.feature_dtype, MANIFEST.fingerprint)
  encoded = [(schema.encode(record), len(record.conversations)) for record in records]
  shard = write_shard(directory / shard_name(0, 1), encoded)
  dataclasses.replace(MANIFEST, shards=(shard,), records=len(records), conversations=shard.conversations).save(directory)
  return str(directory)
