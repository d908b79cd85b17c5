"""Checkpoints of a run, with Orbax.

    OUTPUT/config.json            the run's configuration
    OUTPUT/manifest.json          the manifest of the records it is trained on
    OUTPUT/frozen/                frozen parameters, written once
    OUTPUT/checkpoints/STEP/      trained parameters, optimizer state, the data iterators' position
"""

import json

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from lyrics_jax.config import Config
from lyrics_jax.data.loader import for_hosts
from lyrics_jax.training.parameters import Parameters
from lyrics_jax.training.step import TrainState
from refiner_export.common import settings
from refiner_export.records.manifest import MANIFEST, Manifest
from refiner_export.common.settings import UserError, existing_path


class Checkpoints:
  """Reads and writes the checkpoints below one output directory."""

  def __init__(self, output: str, keep: int = 2):
    self.output = epath.Path(output).absolute()
    handlers = {"parameters": ocp.StandardCheckpointHandler(), "optimizer": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler()}
    self.manager = ocp.CheckpointManager(self.output / "checkpoints", item_handlers=handlers,
                                         options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))

  def latest(self) -> int | None:
    return self.manager.latest_step()

  def save(self, state: TrainState, data: grain.DatasetIterator) -> None:
    """Writes in the background; a half-written checkpoint is never taken for a whole one."""
    step = int(state.step)
    if self.latest() != step:
      self.manager.save(step, args=ocp.args.Composite(
          parameters=ocp.args.StandardSave(state.parameters), optimizer=ocp.args.StandardSave(state.optimizer),
          data=ocp.args.JsonSave({"hosts": jax.process_count(), "state": data.get_state()})))

  def restore(self, state: TrainState, data: grain.DatasetIterator) -> TrainState:
    """The newest checkpoint, laid out like `state`; `data` is moved to where it stood, with however many hosts that was."""
    step = self.latest()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    try:
      restored = self.manager.restore(step, args=ocp.args.Composite(
          parameters=ocp.args.StandardRestore(abstract.parameters), optimizer=ocp.args.StandardRestore(abstract.optimizer),
          data=ocp.args.JsonRestore()))
    except (ValueError, KeyError) as error:
      raise _misfit(self.output / "checkpoints" / str(step), error) from error
    data.set_state(for_hosts(restored.data["state"], restored.data["hosts"], jax.process_count()))
    return TrainState(jax.device_put(jax.numpy.int32(step), state.step.sharding), restored.parameters, restored.optimizer)

  def restore_parameters(self, like: dict[str, jax.ShapeDtypeStruct] | None = None) -> Parameters:
    """Trained parameters of the newest checkpoint, in this host's memory, or laid out like `like` (with shardings)."""
    step = self.latest()
    like = like or _in_host_memory(self.manager.item_metadata(step)["parameters"])
    return self.manager.restore(step, args=ocp.args.Composite(parameters=ocp.args.StandardRestore(like))).parameters

  def stored_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """All parameters of the newest checkpoint, trained and frozen, abstract."""
    return {path: jax.ShapeDtypeStruct(array.shape, array.dtype)
            for directory in self._parameter_directories() for path, array in _stored(directory).items()}

  def restore_some(self, like: dict[str, jax.ShapeDtypeStruct]) -> Parameters:
    """These parameters of the newest checkpoint, trained or frozen, laid out like `like`; nothing else is read."""
    values = {}
    for directory in self._parameter_directories():
      inside = {path: like[path] for path in _stored(directory) if path in like}
      if inside:
        with ocp.PyTreeCheckpointer() as checkpointer:
          values |= checkpointer.restore(directory, args=ocp.args.PyTreeRestore(
              inside, restore_args=ocp.checkpoint_utils.construct_restore_args(inside), partial_restore=True))
    return values

  def _parameter_directories(self) -> list[epath.Path]:
    both = self.output / "checkpoints" / str(self.latest()) / "parameters", self.output / "frozen"
    return [directory for directory in both if directory.exists()]

  def reached_preemption(self, step: int) -> bool:
    return self.manager.reached_preemption(step)

  def close(self) -> None:
    """Waits for the last write."""
    self.manager.wait_until_finished()
    self.manager.close()

  def save_frozen(self, frozen: Parameters) -> None:
    if frozen and not (self.output / "frozen").exists():
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(self.output / "frozen", frozen)

  def restore_frozen(self, like: dict[str, jax.ShapeDtypeStruct] | None = None) -> Parameters:
    if not (self.output / "frozen").exists():
      return {}
    try:
      with ocp.StandardCheckpointer() as checkpointer:
        like = like or _in_host_memory(checkpointer.metadata(self.output / "frozen").item_metadata.tree)
        return checkpointer.restore(self.output / "frozen", like)
    except (ValueError, KeyError) as error:
      raise _misfit(self.output / "frozen", error) from error

  def save_config(self, config: Config, manifest: Manifest) -> None:
    """Writes what the parameters alone do not say: the configuration, and how the records were made."""
    if jax.process_index() == 0:
      self.output.mkdir(parents=True, exist_ok=True)
      manifest.save(self.output)
      temporary = self.output / "config.json.tmp"
      temporary.write_text(config.to_json())
      temporary.replace(self.output / "config.json")


def _in_host_memory(saved) -> dict[str, jax.ShapeDtypeStruct]:
  """As saved, but for where it lay: the devices of the run that saved it may not be here."""
  here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  return {path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=here) for path, value in saved.items()}


def _stored(directory: epath.Path) -> dict:
  """By path, what Orbax knows of the arrays in a directory without reading them."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    return checkpointer.metadata(directory).item_metadata.tree


def _misfit(path: epath.Path, error: Exception) -> UserError:
  return UserError(f"checkpoint {path} does not fit this configuration; use the run's own config.json or another config.output. "
                   f"({' '.join(str(error).split())[:300]})")


def saved_config(output: str) -> Config:
  """The configuration of a run. Raises `UserError` when there is none."""
  remedy = "Name the output directory of python -m lyrics_jax.train"
  path = existing_path(output, "run", remedy) / "config.json"
  return settings.from_dict(Config, json.loads(existing_path(path, "saved configuration", remedy).read_text()))


def open_run(output: str) -> tuple[Checkpoints, Config]:
  """A finished or stopped run. Raises `UserError` when there is none."""
  config = saved_config(output)
  checkpoints = Checkpoints(output, config.keep_checkpoints)
  if checkpoints.latest() is None:
    raise UserError(f"no checkpoint in {output}/checkpoints: the run was stopped before its first one")
  return checkpoints, config


def trained_manifest(output: str, config: Config) -> Manifest:
  """The manifest of the records a run was trained on: the run's own copy, which needs no records beside it."""
  copied = epath.Path(output) / MANIFEST
  return Manifest.load(output if copied.exists() else config.data.records)
