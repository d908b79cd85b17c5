"""Checkpoints of a run, with Orbax.

    OUTPUT/config.json            the run's configuration
    OUTPUT/manifest.json          the manifest of the records it is trained on
    OUTPUT/frozen/                frozen parameters, written once
    OUTPUT/checkpoints/STEP/      trained parameters, optimizer state, the data iterators' position

Every kernel is [..., n, m] in a checkpoint. Some kernels lie the other way around in a device's memory, because a TPU
then reads them faster (`models/layers/linear.py`). They are turned around here, on saving and on restoring.
"""

import functools
import json
from collections.abc import Callable

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lyrics_jax.config import Config
from lyrics_jax.data.loader import for_hosts
from lyrics_jax.training.parameters import ModelParameters, Parameters
from lyrics_jax.training.step import TrainState
from refiner_export.common import settings
from refiner_export.common.files import write_atomically
from refiner_export.common.settings import UserError, existing_path
from refiner_export.records.manifest import MANIFEST, Manifest


class Checkpoints:
  """Reads and writes the checkpoints below one output directory.

  Args:
    keep: how many checkpoints stay; older ones are removed.
  """

  def __init__(self, output: str, keep: int = 2):
    self.output = epath.Path(output).absolute()
    handlers = {"parameters": ocp.StandardCheckpointHandler(), "optimizer": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self.manager = ocp.CheckpointManager(self.output / "checkpoints", item_handlers=handlers, options=options)

  @property
  def frozen(self) -> epath.Path:
    return self.output / "frozen"

  def latest(self) -> int | None:
    """The step of the newest checkpoint; None when there is none."""
    return self.manager.latest_step()

  def save(self, state: TrainState, data: grain.DatasetIterator, parameters: ModelParameters) -> None:
    """Writes in the background. A half-written checkpoint is never taken for a whole one."""
    step = int(state.step)
    if self.latest() == step:
      return
    stored = turned_state(parameters, state)
    position = {"hosts": jax.process_count(), "state": data.get_state()}
    self.manager.save(step, args=ocp.args.Composite(
        parameters=ocp.args.StandardSave(stored.parameters), optimizer=ocp.args.StandardSave(stored.optimizer),
        data=ocp.args.JsonSave(position)))

  def restore(self, state: TrainState, data: grain.DatasetIterator, parameters: ModelParameters) -> TrainState:
    """The newest checkpoint, laid out like `state`.

    `data` is moved to the position that it had, also when the number of hosts is another one.

    Raises:
      UserError: the checkpoint is that of another model or optimizer.
    """
    step = self.latest()
    abstract = turned_state(parameters, jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    try:
      restored = self.manager.restore(step, args=ocp.args.Composite(
          parameters=ocp.args.StandardRestore(abstract.parameters),
          optimizer=ocp.args.StandardRestore(abstract.optimizer), data=ocp.args.JsonRestore()))
    except (ValueError, KeyError) as error:
      raise _misfit(self.output / "checkpoints" / str(step), error) from error
    data.set_state(for_hosts(restored.data["state"], restored.data["hosts"], jax.process_count()))
    count = jax.device_put(jax.numpy.int32(step), state.step.sharding)
    return turned_state(parameters, TrainState(count, restored.parameters, restored.optimizer))

  def restore_model(self, parameters: ModelParameters, mesh: Mesh) -> tuple[Parameters, Parameters]:
    """(trained, frozen) parameters of the newest checkpoint, as they lie in memory; each device reads its own part.

    Raises:
      UserError: the checkpoint is that of another model.
    """
    shardings = parameters.shardings(mesh, stored=True)
    like = _like(parameters, shardings, trained=True)
    args = ocp.args.Composite(parameters=ocp.args.StandardRestore(like))
    try:
      trained = self.manager.restore(self.latest(), args=args).parameters
    except (ValueError, KeyError) as error:
      raise _misfit(self.output / "checkpoints" / str(self.latest()), error) from error
    return _turned(parameters, trained), self.restore_frozen(parameters, shardings)

  def stored_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract arrays of all parameters of the newest checkpoint, trained and frozen, under the names that it has."""
    shapes = {}
    for directory in self._parameter_directories():
      for path, array in _stored(directory).items():
        shapes[path] = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return shapes

  def restore_some(self, like: dict[str, jax.ShapeDtypeStruct]) -> Parameters:
    """The parameters of the newest checkpoint that `like` names, laid out as `like` says. Nothing else is read."""
    values = {}
    for directory in self._parameter_directories():
      inside = {path: like[path] for path in _stored(directory) if path in like}
      if inside:
        restore_args = ocp.checkpoint_utils.construct_restore_args(inside)
        with ocp.PyTreeCheckpointer() as checkpointer:
          values |= checkpointer.restore(directory, args=ocp.args.PyTreeRestore(
              inside, restore_args=restore_args, partial_restore=True))
    return values

  def _parameter_directories(self) -> list[epath.Path]:
    both = self.output / "checkpoints" / str(self.latest()) / "parameters", self.frozen
    return [directory for directory in both if directory.exists()]

  def reached_preemption(self, step: int) -> bool:
    """Whether all hosts are to stop after this step, because one of them was told to."""
    return self.manager.reached_preemption(step)

  def close(self) -> None:
    """Waits for the last write."""
    self.manager.wait_until_finished()
    self.manager.close()

  def save_frozen(self, frozen: Parameters, parameters: ModelParameters) -> None:
    """Writes the frozen parameters, given as they lie in memory, unless the run has them already."""
    if frozen and not self.frozen.exists():
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(self.frozen, _turned(parameters, frozen))

  def restore_frozen(self, parameters: ModelParameters, shardings: dict) -> Parameters:
    """The run's frozen parameters, as they lie in memory; empty when none are saved yet.

    Args:
      shardings: by path, of the arrays as stored.

    Raises:
      UserError: they are those of another model.
    """
    if not self.frozen.exists():
      return {}
    like = _like(parameters, shardings, trained=False)
    try:
      with ocp.StandardCheckpointer() as checkpointer:
        return _turned(parameters, checkpointer.restore(self.frozen, like))
    except (ValueError, KeyError) as error:
      raise _misfit(self.frozen, error) from error

  def save_config(self, config: Config, manifest: Manifest) -> None:
    """Writes what the parameters alone do not say: the configuration, and how the records were made."""
    if jax.process_index() == 0:
      self.output.mkdir(parents=True, exist_ok=True)
      manifest.save(self.output)
      write_atomically(self.output / "config.json", config.to_json().encode())


def turned_state(parameters: ModelParameters, state: TrainState) -> TrainState:
  """A state as checkpoints have it, from a state as it lies in memory; or the other way. It may be abstract.

  The optimizer's moments lie as their parameters do.
  """
  return TrainState(state.step, _turned(parameters, state.parameters), _turned(parameters, state.optimizer))


def _turned(parameters: ModelParameters, tree):
  """The tree with those leaves turned around that stand below the path of a transposed parameter."""
  def turn(place, leaf):
    for key in place:
      if getattr(key, "key", None) in parameters.transposed:
        return _turn(leaf)
    return leaf

  return jax.tree_util.tree_map_with_path(turn, tree)


def _turn(x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
  """[..., n, m] -> [..., m, n]. The mesh axes move with the dimensions, so that each device turns its own part."""
  sharding = x.sharding
  if isinstance(sharding, NamedSharding):
    *leading, n, m = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*leading, m, n))
  if isinstance(x, jax.ShapeDtypeStruct):
    *leading, n, m = x.shape
    return jax.ShapeDtypeStruct((*leading, m, n), x.dtype, sharding=sharding)
  return _turning(sharding)(x)


@functools.cache
def _turning(sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
  """The compiled program whose result is laid out so."""
  def turn(x: jax.Array) -> jax.Array:
    return x.swapaxes(-1, -2)

  return jax.jit(turn, out_shardings=sharding)


def _like(parameters: ModelParameters, shardings: dict, trained: bool) -> dict[str, jax.ShapeDtypeStruct]:
  """The abstract arrays to restore: as stored, with these shardings."""
  like = {}
  for path in parameters.paths(trained):
    shape = parameters.shapes[path]
    like[path] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[path])
  return like


def _stored(directory: epath.Path) -> dict:
  """What Orbax knows of the arrays in a directory without reading them, by path."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    return checkpointer.metadata(directory).item_metadata.tree


def _misfit(path: epath.Path, error: Exception) -> UserError:
  reason = " ".join(str(error).split())[:300]
  return UserError(f"checkpoint {path} does not fit this configuration; use the run's own config.json or another "
                   f"config.output. ({reason})")


def saved_config(output: str) -> Config:
  """The configuration of the run with this output directory. Raises `UserError` when there is none."""
  remedy = "Name the output directory of python -m lyrics_jax.train"
  path = existing_path(output, "run", remedy) / "config.json"
  return settings.from_dict(Config, json.loads(existing_path(path, "saved configuration", remedy).read_text()))


def open_run(output: str) -> tuple[Checkpoints, Config]:
  """The checkpoints and the configuration of a finished or stopped run. Raises `UserError` when there are none."""
  config = saved_config(output)
  checkpoints = Checkpoints(output, config.keep_checkpoints)
  if checkpoints.latest() is None:
    raise UserError(f"no checkpoint in {output}/checkpoints: the run was stopped before its first one")
  return checkpoints, config


def trained_manifest(output: str, config: Config) -> Manifest:
  """The manifest of the records that a run was trained on.

  It is the run's own copy, so that the records may be gone. A run of before such copies needs its records.
  """
  copied = epath.Path(output) / MANIFEST
  return Manifest.load(output if copied.exists() else config.data.records)
