"""What a run left behind, read without the configuration of another run."""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.metrics import read


def steps_of(output) -> list[int]:
  """Finished checkpoints, ascending; an unfinished one has another name."""
  folder = pathlib.Path(output) / "checkpoints"
  return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def saved(output):
  """Trained parameters, optimizer state and frozen parameters of the newest checkpoint, as saved."""
  checkpoints = Checkpoints(str(output))
  restored = checkpoints.manager.restore(checkpoints.latest(), args=ocp.args.Composite(
      parameters=ocp.args.StandardRestore(), optimizer=ocp.args.StandardRestore()))
  checkpoints.close()
  with ocp.StandardCheckpointer() as checkpointer:
    frozen = checkpointer.restore(checkpoints.frozen) if checkpoints.frozen.exists() else {}
  return restored.parameters, restored.optimizer, frozen


def assert_same_bits(output, other) -> None:
  """Of all that two runs saved."""
  jax.tree.map(np.testing.assert_array_equal, saved(output), saved(other))


def losses(output) -> list[dict[str, float]]:
  """The metrics of each step but its rates, which no two runs share."""
  lines = read(str(output))
  for line in lines:
    del line["images_per_second"], line["tokens_per_second"]
  return lines


def mean_loss(lines) -> float:
  return np.mean([line["loss"] for line in lines])


def keys_of(tree) -> set[str]:
  """The keys of all dictionaries in a tree."""
  keys = set()
  for place, _ in jax.tree_util.tree_leaves_with_path(tree):
    keys |= {key.key for key in place if isinstance(key, jax.tree_util.DictKey)}
  return keys
