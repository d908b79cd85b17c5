"""Times one stage-1 step, forward and backward with all four losses, against the authors' algorithm in PyTorch.

  python benchmarks/align_step.py --batch_size 8
  python benchmarks/align_step.py --tiny            a small model, for a quick try

Both sides run on the same device, one after the other, with the same weights, inputs and negatives, at the published
size and without dropout; their losses and the norm of their gradients must agree. The frozen image encoder is left
out of both: its tokens are given. Our side runs every batch of one window of the input pipeline in its text bucket,
weighted as they occur; the authors' time does not depend on the texts, which they pad to one length.
"""

import collections
import dataclasses
import gc
import json
import os
import pathlib
import resource
import statistics
import sys
import time

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from lyrics_jax.config import Config  # noqa: E402
from lyrics_jax.data.batch import Batch  # noqa: E402
from lyrics_jax.data.buckets import WINDOW, cut_to, lengths_of, sorted_batches  # noqa: E402
from lyrics_jax.data.padding import pad_ids  # noqa: E402
from lyrics_jax.data.pairs import EncodedPair, Pairs  # noqa: E402
from lyrics_jax.data.settings import DataSettings  # noqa: E402
from lyrics_jax.models.aligner import Aligner, AlignerSettings  # noqa: E402
from lyrics_jax.models.connectors.local_tokens import LocalTokensSettings  # noqa: E402
from lyrics_jax.models.connectors.mq_former import MQFormerSettings  # noqa: E402
from lyrics_jax.models.connectors.q_former import QFormerSettings  # noqa: E402
from lyrics_jax.models.layers.compute import Compute  # noqa: E402
from lyrics_jax.models.vision.vit import ViTSettings  # noqa: E402
from lyrics_jax.objectives.icg import ICG  # noqa: E402
from lyrics_jax.objectives.itc import ITC  # noqa: E402
from lyrics_jax.objectives.itm import ITM, hard_negatives  # noqa: E402
from lyrics_jax.objectives.msp import MSP  # noqa: E402
from lyrics_jax.planning.flops import count_flops  # noqa: E402
from lyrics_jax.sharding import make_mesh  # noqa: E402
from lyrics_jax.stage import Stage  # noqa: E402
from lyrics_jax.training.parameters import ModelParameters  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_integer("batch_size", 8, "Pairs of picture and text in a step.", lower_bound=2)
flags.DEFINE_integer("steps", 3, "Timed steps after the check, which warms up; ours in each bucket.", lower_bound=1)
flags.DEFINE_bool("tiny", False, "A small model and short texts; checks every batch, its times mean little.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation; bfloat16 is autocast in PyTorch.")
flags.DEFINE_enum("remat", "none", ["none", "dots", "full"], "What our backward pass computes again.")
flags.DEFINE_float("peak_tflops", None, "The device's peak in this dtype; adds the share that each side reaches.")
flags.DEFINE_bool("authors", True, "Whether to run the authors' side.")

# Made-up ids take the places of BERT's special tokens; words are the ids from WORDS on.
PAD, BOS, CLS, SEP, DEC, MLM, MASK, WORDS = range(8)
MARKERS = 6  # <br> <T> </T> <Bbox> </Box> </br>
OUTSIDE = -1  # owner of a token that belongs to no object's tag or box
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
OBJECTIVES = (ITC(), ITM(), ICG(), MSP())


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """In the tokenizer's place, for the objectives: the ids that stand in front of texts and over hidden tokens."""
  dec: int = DEC
  mlm: int = MLM
  mask: int = MASK


class GivenTokens(nnx.Module):
  """In the image encoder's place: the batch holds its tokens."""

  def __call__(self, image: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return image.astype(dtype)


@dataclasses.dataclass(unsafe_hash=True)
class AlignerOfTokens(AlignerSettings):
  """The model of stage 1 without the image encoder."""

  def build(self, compute: Compute, int8, rngs: nnx.Rngs) -> Aligner:
    model = super().build(compute, int8, rngs)
    model.vision = GivenTokens()
    return model


def make_config() -> tuple[Config, int]:
  """The configuration, and the length to which the authors pad texts."""
  model = AlignerOfTokens(
      vision=ViTSettings(layers=1), connector=QFormerSettings(former=MQFormerSettings(dropout=0.0)))
  data, padded = DataSettings(records="unused", rows=Pairs(), mq_former_tokenizer="unused"), 600
  if FLAGS.tiny:
    model = AlignerOfTokens(
        vision=ViTSettings(image_size=28, width=48, layers=1, heads=4, mlp_dim=48),
        connector=QFormerSettings(
            former=MQFormerSettings(width=48, layers=4, heads=4, mlp_dim=96, visual_queries=8, grounding_queries=8,
                                    vocab_size=300, dropout=0.0),
            local=LocalTokensSettings(detection_rows=24, mask_rows=8, feature_width=16)),
        itc_width=16)
    data.spatial_length, data.caption_length, padded = 128, 32, 200
  config = Config(output="unused", batch_size=FLAGS.batch_size,
                  stage=Stage(model=model, objectives=OBJECTIVES, train=("*",)), data=data,
                  compute=Compute(dtype=FLAGS.dtype, remat=FLAGS.remat))
  config.finalize()
  return config, padded


def make_texts(config: Config, rng: np.random.Generator) -> tuple[EncodedPair, int]:
  """Texts as long as those of COCO, of random words; and the number of objects in the picture.

  Measured on 79 annotated pictures of COCO val2017 with BERT's vocabulary: 7.9 objects in a picture on average (tenths
  of the pictures have up to 2, 2, 3, 4, 6, 8, 10, 11, 18 and 26, which a geometric distribution follows), 28.8 tokens
  for an object and its box (standard deviation 1.2, between 26 and 32), 14.0 for a caption with [CLS] and [SEP] (2.9,
  between 9 and 29).
  """
  data, vocabulary = config.data, config.stage.model.connector.former.vocab_size
  owners, objects = [OUTSIDE], rng.geometric(1 / 7.9)
  for index in range(objects):
    tokens = int(np.clip(round(rng.normal(28.8, 1.2)), 26, 32))
    if len(owners) + tokens > data.spatial_length:
      break
    owners += [OUTSIDE] * MARKERS + [index] * (tokens - MARKERS)
  spatial = [BOS, *rng.integers(WORDS, vocabulary, len(owners) - 1)]
  length = int(min(9 + rng.gamma(3, 1.65), 29, data.caption_length))
  caption = [CLS, *rng.integers(WORDS, vocabulary, length - 2), SEP]
  spatial_ids, spatial_mask = pad_ids(spatial, data.spatial_length, PAD)
  caption_ids, caption_mask = pad_ids(caption, data.caption_length, PAD)
  owners, _ = pad_ids(owners, data.spatial_length, OUTSIDE)
  return EncodedPair(spatial_ids, spatial_mask, owners, caption_ids, caption_mask), objects


def make_example(config: Config, rng: np.random.Generator) -> Batch:
  """One row of a batch: texts as in `make_texts`, and noise for the image encoder's tokens and the local tokens."""
  vision, local = config.stage.model.vision, config.stage.model.connector.local
  pair, objects = make_texts(config, rng)
  example = {
      "image": rng.standard_normal((vision.tokens, vision.width), np.float32),
      "detection": rng.standard_normal((local.detection_rows, local.feature_width + 4), np.float32),
      "detection_mask": np.ones(local.detection_rows, bool),
      "masks": rng.standard_normal((local.mask_rows, local.feature_width + 4), np.float32),
      "masks_mask": np.arange(local.mask_rows) < objects,
      "spatial_ids": pair.spatial_ids, "spatial_mask": pair.spatial_mask,
      "caption_ids": pair.caption_ids, "caption_mask": pair.caption_mask}
  for objective in OBJECTIVES:
    example |= objective.prepare(pair, SpecialTokens(), rng)
  for name, field in config.fields.items():
    if "pictures" in field.dims:
      example[name] = example[name][None]
  return example


def make_window(config: Config) -> list[Batch]:
  """The batches of one window of the input pipeline, from the shortest texts to the longest, at full length."""
  rng, window = np.random.default_rng(0), []
  examples = [make_example(config, rng) for _ in range(WINDOW * config.batch_size)]
  for rows in sorted_batches(config.fields, examples, config.batch_size, np.arange(WINDOW)):
    batch = {}
    for name in rows[0]:
      batch[name] = np.stack([example[name] for example in rows])
    window.append(batch)
  return window


def tokens_of(config: Config, spatial: int, caption: int, padded: bool) -> int:
  """Tokens that one example sends through the layers: queries, text, three pairs, caption and spatial passes."""
  queries = config.stage.model.connector.former.queries
  text = spatial + caption
  return queries + text + 3 * (queries + text) + (2 * text if padded else text)


def timed(step) -> float:
  """Median seconds of a step, which has run before."""
  seconds = []
  for _ in range(FLAGS.steps):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


@dataclasses.dataclass(frozen=True)
class Check:
  """What both sides must agree on for a batch, and the negatives that both use."""
  losses: dict[str, float]
  gradient_norm: float
  negatives: tuple[np.ndarray, ...]


class OurSide:
  """Our step on one device."""

  def __init__(self, config: Config):
    self.config, self.model_parameters = config, ModelParameters.of(config)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    self.parameters, _ = self.model_parameters.initialise(mesh, config.seed)

  def gradients(self, parameters, batch):
    """Losses by name, and the gradient of their sum."""

    def loss_of(parameters):
      loss = self.config.stage.loss(self.model_parameters.model(parameters, {}), batch, None)
      return loss.value, loss.metrics

    (_, losses), gradient = jax.value_and_grad(loss_of, has_aux=True)(parameters)
    return losses, gradient

  def negatives(self, parameters, batch):
    """The negatives that ITM draws without a key."""
    passes = self.model_parameters.model(parameters, {}).passes(batch)
    return hard_negatives(passes.similarity, batch["caption_ids"], jax.random.key(0))

  def run(self, window: list[Batch], checked: list[int]) -> tuple[dict, dict[int, Check]]:
    """Our figures, and the checks of the batches with these numbers."""
    members = collections.defaultdict(dict)  # by text lengths, then by number
    for number, batch in enumerate(window):
      lengths = lengths_of(self.config.fields, self.config.data.buckets, batch)
      members[lengths["spatial_ids"], lengths["caption_ids"]][number] = cut_to(lengths, batch)
    rows, checks = [], {}
    for lengths in sorted(members):
      row, found = self.run_bucket(lengths, members[lengths], checked)
      rows.append(row)
      checks |= found
      print(json.dumps({"ours": row}), flush=True)
    figures = {"buckets": rows, "peak_gb": peak_gb(), "compile_seconds": sum(row["compile_seconds"] for row in rows)}
    for name in ("seconds", "flops", "tokens"):
      figures[name] = sum(row["batches"] * row[name] for row in rows) / len(window)
    return figures, checks

  def run_bucket(self, lengths: tuple[int, int], batches: dict[int, Batch], checked: list[int]):
    """The figures of the batches of one bucket, and the checks of those among them that are to be checked."""
    batches, checks = jax.device_put(batches), {}
    batch = next(iter(batches.values()))
    start = time.perf_counter()
    step = jax.jit(self.gradients).lower(self.parameters, batch).compile()
    compiled = time.perf_counter() - start
    # The checks are the warm-up: at the published size a CPU takes minutes for a step.
    numbers = [number for number in checked if number in batches]
    for number in numbers or [next(iter(batches))]:
      losses, gradient = step(self.parameters, batches[number])
      negatives = jax.jit(self.negatives)(self.parameters, batches[number])
      if number in checked:
        losses = {objective.name: float(losses[objective.name]) for objective in OBJECTIVES}
        checks[number] = Check(losses, float(optax.global_norm(gradient)), jax.tree.map(np.array, negatives))
    del gradient
    return {"text": f"{lengths[0]}+{lengths[1]}", "batches": len(batches), "compile_seconds": compiled,
            "seconds": timed(lambda: jax.block_until_ready(step(self.parameters, batch))),
            "flops": count_flops(self.gradients, self.parameters, batch),
            "tokens": tokens_of(self.config, *lengths, padded=False)}, checks


def run_authors(config: Config, window: list[Batch], checks: dict[int, Check], parameters: dict[str, np.ndarray],
                padded: int) -> tuple[dict, dict]:
  """Figures of the authors' side, and the greatest differences of losses and of the gradient's norm from ours."""
  import torch  # here, so that its threads and memory do not weigh on our side

  from benchmarks.authors_align_step import AuthorsAlignStep
  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  authors = AuthorsAlignStep(config, parameters, padded, device, FLAGS.dtype)
  difference = collections.defaultdict(float)
  for number, check in checks.items():
    batch = without_pictures(config, window[number])
    flops, losses = authors.count_flops(batch, check.negatives)
    found = {"gradient_norm": abs(authors.gradient_norm() / check.gradient_norm - 1)}  # relative
    for name, value in check.losses.items():
      found[name] = abs(losses[name] - value)
    for name, value in found.items():
      difference[name] = max(value, difference[name])
    print(json.dumps({"batch": number, "ours": check.losses, "authors": losses, "difference": found}), flush=True)
    assert max(found.values()) < TOLERANCE[FLAGS.dtype], "the two sides do not compute the same"

  def step():
    authors.step(batch, check.negatives)
    if device == "cuda":
      torch.cuda.synchronize()

  seconds = timed(step)
  return {"seconds": seconds, "flops": flops, "compile_seconds": 0.0, "peak_gb": peak_gb(),
          "tokens": tokens_of(config, padded, 0, padded=True)}, dict(difference)


def without_pictures(config: Config, batch: Batch) -> Batch:
  """The batch without the axis of pictures: a pair has one."""
  found = {}
  for name, value in batch.items():
    found[name] = value[:, 0] if "pictures" in config.fields[name].dims else value
  return found


def peak_gb() -> float:
  """The process's greatest resident memory so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def print_table(sides: dict[str, dict]) -> None:
  print(f"\n{'':26}" + "".join(f"{side:>12}" for side in sides))
  rows = [("seconds per step", "seconds", 1, 2), ("compile seconds", "compile_seconds", 1, 1),
          ("TFLOP per step", "flops", 1e12, 3), ("tokens per example", "tokens", 1, 0), ("share of peak", "mfu", 1, 3)]
  for title, name, unit, digits in rows:
    if all(name in figures for figures in sides.values()):
      print(f"{title:26}" + "".join(f"{figures[name] / unit:12.{digits}f}" for figures in sides.values()))


def main(_):
  config, padded = make_config()
  window = make_window(config)
  checked = list(range(WINDOW)) if FLAGS.tiny else [WINDOW // 2]
  our_side = OurSide(config)
  ours, checks = our_side.run(window, checked)
  sides = {"ours": ours}
  result = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "batch_size": config.batch_size,
            "dtype": FLAGS.dtype, "remat": FLAGS.remat, "steps": FLAGS.steps, "tiny": FLAGS.tiny}
  if FLAGS.authors:
    parameters = jax.tree.map(np.array, our_side.parameters)
    del our_side
    jax.clear_caches()
    gc.collect()
    sides["authors"], difference = run_authors(config, window, checks, parameters, padded)
    result |= {"difference": difference, "time_ratio": sides["authors"]["seconds"] / ours["seconds"],
               "flops_ratio": ours["flops"] / sides["authors"]["flops"]}
  if FLAGS.peak_tflops:
    for figures in sides.values():
      figures["mfu"] = figures["flops"] / figures["seconds"] / (FLAGS.peak_tflops * 1e12)
  print_table(sides)
  if FLAGS.authors:
    print(f"\nours takes {1 / result['time_ratio']:.3f} of the authors' time "
          f"({result['time_ratio']:.2f} times as fast) "
          f"and {result['flops_ratio']:.3f} of their FLOPs")
    print("greatest difference: " + ", ".join(f"{name} {value:.1e}" for name, value in difference.items()))
  print(json.dumps(result | sides))


if __name__ == "__main__":
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves a GPU's memory to PyTorch
  app.run(main)
