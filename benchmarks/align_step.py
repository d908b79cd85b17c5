"""Times one stage-1 step, forward and backward with all four losses, against the authors' algorithm in PyTorch.

  python benchmarks/align_step.py --batch_size 8
  python benchmarks/align_step.py --tiny            a small model, for a quick try

Both sides run on the same device, one after the other, with the same weights, inputs and negatives, at the published
size and without dropout; their losses and the norm of their gradients must agree. The frozen image encoder is left
out of both: its tokens are given. Ours runs every batch of one window of the input pipeline in its text bucket,
weighted as they occur; the authors' time does not depend on the texts, which they pad to one length.
"""

import collections
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

from lyrics_jax.config import Config, DataConfig, ModelConfig, MQFormerConfig, RefinerConfig, VisionConfig  # noqa: E402
from lyrics_jax.data.buckets import WINDOW, cut_to, lengths_of, sorted_batches  # noqa: E402
from lyrics_jax.data.mq_former_text import OUTSIDE, mask_objects  # noqa: E402
from lyrics_jax.data.padding import pad_ids  # noqa: E402
from lyrics_jax.stages.align import Align, hard_negatives, image_text_similarity  # noqa: E402
from lyrics_jax.models.mq_former import spatial_and_caption  # noqa: E402
from lyrics_jax.planning.flops import count_flops  # noqa: E402
from lyrics_jax.training.parameters import ParameterPlan  # noqa: E402
from lyrics_jax.training.sharding import make_mesh  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_integer("batch_size", 8, "Pairs of picture and text in a step.", lower_bound=2)
flags.DEFINE_integer("steps", 3, "Timed steps after the check, which warms up; ours, in each bucket.", lower_bound=1)
flags.DEFINE_bool("tiny", False, "A small model and short texts; checks every batch, its times mean little.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation; bfloat16 is autocast in PyTorch.")
flags.DEFINE_enum("remat", "none", ["none", "dots", "full"], "What our backward pass computes again.")
flags.DEFINE_float("peak_tflops", None, "The device's peak in this dtype; adds the share that each side reaches.")
flags.DEFINE_bool("authors", True, "Whether to run the authors' side.")

# Made-up ids take the places of BERT's special tokens; words are the ids from WORDS on.
PAD, BOS, CLS, SEP, DEC, MLM, MASK, WORDS = range(8)
MARKERS = 6  # <br> <T> </T> <Bbox> </Box> </br>
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


class GivenTokens(nnx.Module):
  """In the image encoder's place: the batch holds its tokens."""

  def __call__(self, image: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return image.astype(dtype)


class AlignGivenTokens(Align):
  """Stage 1 without the image encoder."""

  def build(self, rngs: nnx.Rngs) -> nnx.Module:
    model = super().build(rngs)
    model.perception.vision = GivenTokens()
    return model


def make_config() -> tuple[Config, int]:
  """The configuration, and the length to which the authors pad texts."""
  config = Config(output="unused", batch_size=FLAGS.batch_size, model=ModelConfig(
      vision=VisionConfig(layers=1), mq_former=MQFormerConfig(dropout=0.0), dtype=FLAGS.dtype, remat=FLAGS.remat),
      data=DataConfig(records="unused", mq_former_tokenizer="unused"))
  padded = 600
  if FLAGS.tiny:
    config.model.vision = VisionConfig(image_size=28, width=48, layers=1, heads=4, mlp_dim=48)
    config.model.refiner = RefinerConfig(detection_rows=24, mask_rows=8, feature_width=16)
    config.model.mq_former = MQFormerConfig(width=48, layers=4, heads=4, mlp_dim=96,
                                            visual_queries=8, grounding_queries=8,
                                            vocab_size=300, itc_width=16, dropout=0.0)
    config.data.spatial_length, config.data.caption_length, padded = 128, 32, 200
  config.finalize()
  return config, padded


def make_example(config: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """One example with texts as long as those of COCO; pictures and words are noise.

  Measured on 79 annotated pictures of COCO val2017 with BERT's vocabulary: 7.9 objects in a picture on average (tenths
  of the pictures have up to 2, 2, 3, 4, 6, 8, 10, 11, 18 and 26, which a geometric distribution follows), 28.8 tokens
  for an object and its box (standard deviation 1.2, between 26 and 32), 14.0 for a caption with [CLS] and [SEP] (2.9,
  between 9 and 29).
  """
  data, refiner = config.data, config.model.refiner
  words = lambda n: rng.integers(WORDS, config.model.mq_former.vocab_size, n)
  owners = [OUTSIDE]
  objects = rng.geometric(1 / 7.9)
  for index in range(objects):
    tokens = int(np.clip(round(rng.normal(28.8, 1.2)), 26, 32))
    if len(owners) + tokens > data.spatial_length:
      break
    owners += [OUTSIDE] * MARKERS + [index] * (tokens - MARKERS)
  ids = np.array([BOS, *words(len(owners) - 1)])
  hidden = mask_objects(owners, config.align.mask_probability, rng)
  length = int(min(9 + rng.gamma(3, 1.65), 29, data.caption_length))
  caption = [CLS, *words(length - 2), SEP]

  spatial_ids, spatial_mask = pad_ids(ids, data.spatial_length, PAD)
  caption_ids, caption_mask = pad_ids(caption, data.caption_length, PAD)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  return {
      "image": normal(config.model.vision.tokens, config.model.vision.width),
      "detection": normal(refiner.detection_rows, refiner.feature_width + 4),
      "detection_mask": np.ones(refiner.detection_rows, bool),
      "masks": normal(refiner.mask_rows, refiner.feature_width + 4),
      "masks_mask": np.arange(refiner.mask_rows) < objects,
      "spatial_ids": spatial_ids, "spatial_mask": spatial_mask,
      "msp_ids": pad_ids([MLM, *np.where(hidden, MASK, ids)[1:]], data.spatial_length, PAD)[0],
      "msp_targets": pad_ids(np.where(hidden, ids, -1), data.spatial_length, -1)[0],
      "caption_ids": caption_ids, "caption_mask": caption_mask,
      "icg_ids": np.concatenate([[DEC], caption_ids[1:]]).astype(np.int32)}


def make_window(config: Config) -> list[dict[str, np.ndarray]]:
  """The batches of one window of the input pipeline, from the shortest texts to the longest, at full length."""
  rng = np.random.default_rng(0)
  examples = [make_example(config, rng) for _ in range(WINDOW * config.batch_size)]
  return [{name: np.stack([example[name] for example in batch]) for name in batch[0]}
          for batch in sorted_batches(examples, config.batch_size, np.arange(WINDOW))]


def tokens_of(config: Config, spatial: int, caption: int, padded: bool) -> int:
  """Tokens that one example sends through the layers: queries, text, three pairs, caption and spatial passes."""
  queries = config.model.mq_former.visual_queries + config.model.mq_former.grounding_queries
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


def run_ours(config: Config, window: list[dict[str, np.ndarray]], checked: list[int]):
  """Figures of our side; for the checked batches losses, gradient norm and negatives; and the parameters."""
  plan = ParameterPlan.of(AlignGivenTokens(config))
  parameters, _ = plan.initialise(make_mesh(config.mesh, jax.devices()[:1]), config.seed)

  def gradients(parameters, batch):
    def loss_of(parameters):
      loss = plan.stage.loss(plan.model(parameters, {}), batch, None)
      return loss.value, loss.metrics

    (_, losses), gradient = jax.value_and_grad(loss_of, has_aux=True)(parameters)
    return losses, gradient

  @jax.jit
  def negatives(parameters, batch):
    model = plan.model(parameters, {})
    queries, _ = model.perception.mq_former.query_pass(model.perception.look(batch))
    text = spatial_and_caption((batch["spatial_ids"], batch["spatial_mask"]),
                               (batch["caption_ids"], batch["caption_mask"]),
                               config.model.mq_former.restart_positions)
    # Without a key the stage draws its negatives from this one.
    similarity = image_text_similarity(model, queries, text, config.align.itc_pooling, None)
    return hard_negatives(similarity, batch["caption_ids"], jax.random.key(0))

  rows, checks = [], {}
  lengths = [lengths_of(config.data, batch) for batch in window]
  texts = [(length["spatial_ids"], length["caption_ids"]) for length in lengths]
  for (spatial, caption), count in sorted(collections.Counter(texts).items()):
    members = {k: jax.device_put(cut_to(lengths[k], window[k])) for k, own in enumerate(texts) if own == (spatial, caption)}
    batch = next(iter(members.values()))
    start = time.perf_counter()
    step = jax.jit(gradients).lower(parameters, batch).compile()
    compiled = time.perf_counter() - start
    # The checks are the warm-up: at the published size a CPU takes minutes for a step.
    for k in [k for k in checked if k in members] or [next(iter(members))]:
      losses, gradient = step(parameters, members[k])
      checks[k] = ({name: float(losses[name]) for name in ("itc", "itm", "icg", "msp")},
                   float(optax.global_norm(gradient)), jax.tree.map(np.array, negatives(parameters, members[k])))
    del gradient
    rows.append({"text": f"{spatial}+{caption}", "batches": count, "compile_seconds": compiled,
                 "seconds": timed(lambda: jax.block_until_ready(step(parameters, batch))),
                 "flops": count_flops(gradients, parameters, batch),
                 "tokens": tokens_of(config, spatial, caption, padded=False)})
    print(json.dumps({"ours": rows[-1]}), flush=True)
  share = lambda name: sum(row["batches"] * row[name] for row in rows) / len(window)
  figures = {name: share(name) for name in ("seconds", "flops", "tokens")}
  figures |= {"compile_seconds": sum(row["compile_seconds"] for row in rows), "buckets": rows, "peak_gb": peak_gb()}
  return figures, {k: checks[k] for k in checked}, {path: np.array(value) for path, value in parameters.items()}


def run_authors(config: Config, window, checks: dict, parameters: dict[str, np.ndarray], padded: int):
  """Figures of the authors' side, and the greatest differences of losses and of the gradient's norm from ours."""
  import torch  # here, so that its threads and memory do not weigh on our side

  from benchmarks.authors_align_step import AuthorsAlignStep
  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  authors = AuthorsAlignStep(config, parameters, padded, device, FLAGS.dtype)
  difference = {}
  for k, (ours, norm, negatives) in checks.items():
    flops, losses = authors.count_flops(window[k], negatives)
    differences = {name: abs(losses[name] - ours[name]) for name in ours}
    differences["gradient_norm"] = abs(authors.gradient_norm() / norm - 1)  # relative
    difference = {name: max(value, difference.get(name, 0.0)) for name, value in differences.items()}
    print(json.dumps({"batch": k, "ours": ours, "authors": losses, "difference": differences}), flush=True)
    assert max(differences.values()) < TOLERANCE[FLAGS.dtype], "the two sides do not compute the same"

  def step():
    authors.step(window[k], negatives)
    if device == "cuda":
      torch.cuda.synchronize()

  seconds = timed(step)
  return {"seconds": seconds, "flops": flops, "compile_seconds": 0.0, "peak_gb": peak_gb(),
          "tokens": tokens_of(config, padded, 0, padded=True)}, difference


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
  ours, checks, parameters = run_ours(config, window, checked)
  sides = {"ours": ours}
  result = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "batch_size": config.batch_size,
            "dtype": FLAGS.dtype, "remat": FLAGS.remat, "steps": FLAGS.steps, "tiny": FLAGS.tiny}
  if FLAGS.authors:
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
