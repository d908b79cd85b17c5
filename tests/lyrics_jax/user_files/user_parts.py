"""A user's own parts, in a file outside the packages: a source, a connector, an objective, a task and an evaluation."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from lyrics_jax.models.connectors.base import ConnectorSettings
from lyrics_jax.models.layers.linear import Linear
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.objectives.base import Objective, Term
from lyrics_jax.tasks import Task
from lyrics_jax.training.evaluations import EvaluationSettings
from refiner_export.records.record import ASSISTANT, USER, Conversation, Turn
from refiner_export.sources.base import SourceExample, SourcePicture
from refiner_export.sources.source import SourceSettings, Unit


# --- a source: squares of one colour, and the question which colour it is ---
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


@dataclasses.dataclass(unsafe_hash=True)
class ColourSquares(SourceSettings):
  """`units` units of three pictures each; nothing is read before its turn comes."""
  name = "colour squares"
  units: int = 4

  def shards(self):
    return [Unit(f"unit {number}", 3) for number in range(self.units)]

  def read(self, unit):
    for name, colour in COLOURS.items():
      turns = Turn(USER, "square"), Turn(ASSISTANT, name)
      yield SourceExample(f"{unit.name}, {name}", (SourcePicture(lambda colour=colour: _png(colour)),),
                          captions=(f"A {name} square.",), conversations=(Conversation("colour", turns),))


def _png(colour):
  file = io.BytesIO()
  Image.new("RGB", (40, 40), colour).save(file, "PNG")
  return file.getvalue()


# --- a task: its templates, and how an answer is scored ---
@dataclasses.dataclass(unsafe_hash=True)
class Colour(Task):
  """Which colour something has. A picture may be cropped and mirrored."""
  name: str = "colour"
  templates: tuple[str, ...] = ("Which colour has the {tag}?", "Name the colour of the {tag}.")


# --- a connector: the mean of all image tokens becomes a few soft tokens ---
@dataclasses.dataclass(unsafe_hash=True)
class PooledSettings(ConnectorSettings):
  count: int = 3

  def tokens(self, vision):
    return self.count

  def build(self, vision, width, compute, rngs):
    return Pooled(self, vision.width, width, rngs=rngs)


class Pooled(nnx.Module):
  def __init__(self, settings, image_width, width, *, rngs):
    self.count = settings.count
    self.linear = Linear(image_width, settings.count * width, (None, "embed"), rngs=rngs)

  def __call__(self, features, text=None, key=None):
    soft = self.linear(features.image.mean(1))
    return soft.reshape(len(soft), self.count, -1)

  def text(self, batch):
    return None


# --- an objective: the logits' normaliser is kept small ---
@dataclasses.dataclass(unsafe_hash=True)
class ZLoss(Objective):
  """L_z = E[logsumexp(logits)^2] over the targets."""
  name = "z"
  model = VLMSettings
  reads = ("targets",)

  def __call__(self, passes):
    normaliser = jax.nn.logsumexp(passes.model.logits(passes.hidden), axis=-1)
    targets = passes.batch["targets"]
    return Term(jnp.where(targets, normaliser**2, 0).sum() / jnp.maximum(targets.sum(), 1))


# --- an evaluation: a figure of the loaded model ---
@dataclasses.dataclass(unsafe_hash=True)
class WeightNorm(EvaluationSettings):
  name = "weights"
  every: int = 1

  def build(self, config, fingerprint):
    def measure(loaded):
      trained, _ = loaded.parameters
      return {"largest": max(float(np.abs(value).max()) for value in trained.values())}

    return measure
