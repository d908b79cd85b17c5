"""A run's model with its parameters on a mesh, ready to compute."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lyrics_jax.config import Config
from lyrics_jax.models.base import ModelSettings
from lyrics_jax.sharding import BATCH, MeshSettings, batch_shards, everywhere, make_mesh
from lyrics_jax.training.checkpoint import open_run, saved_config
from lyrics_jax.training.parameters import ModelParameters, Parameters
from refiner_export.common.settings import UserError, require


class LoadedModel:
  """The model of a run: `config`, `model_parameters` (names and shapes), `mesh`, and `parameters` (trained, frozen).

  `parameters` may be assigned: programs take the new values without being compiled again. So one `LoadedModel` serves a
  whole training.
  """

  def __init__(self, model_parameters: ModelParameters, mesh: Mesh, trained: Parameters, frozen: Parameters):
    self.model_parameters, self.mesh = model_parameters, mesh
    self.parameters = trained, frozen

  @classmethod
  def open(cls, output: str, mesh_settings: MeshSettings | None = None,
           kind: type[ModelSettings] = ModelSettings) -> "LoadedModel":
    """The newest checkpoint of a run. Each device reads its own part of every parameter.

    Args:
      output: the run's output directory.
      mesh_settings: the mesh over all devices; None takes the first device of this process.
      kind: the class that the settings of the run's model must have.

    Raises:
      UserError: there is no such run, its model is of another kind, or the mesh does not divide a parameter.
    """
    require_model(saved_config(output), kind, f"{output}: this command")
    checkpoints, config = open_run(output)
    with contextlib.closing(checkpoints):
      model_parameters = ModelParameters.of(config)
      if mesh_settings is None:
        mesh = make_mesh(MeshSettings(data=1), jax.local_devices()[:1])
      else:
        mesh = make_mesh(mesh_settings)
      return cls(model_parameters, mesh, *checkpoints.restore_model(model_parameters, mesh))

  @property
  def config(self) -> Config:
    return self.model_parameters.config

  def rows(self, count: int) -> int:
    """The least batch size from `count` on that the mesh divides."""
    shards = batch_shards(self.mesh)
    return -(-count // shards) * shards

  def compiled(self, function: Callable[..., Any], replicated: bool = True) -> "Program":
    """`function(module, *inputs)` as a program of its inputs.

    Args:
      replicated: whether each device gets the whole result, so that every host can read it. Otherwise the result stays
        where the compiler puts it.
    """
    return Program(self, function, replicated)


class Program:
  """A compiled function of a model. Inputs are pytrees of arrays.

  NumPy arrays are split over the devices by rows. On several hosts each host passes the same whole arrays. JAX arrays,
  such as the results of another program, stay where they are.
  """

  def __init__(self, loaded: LoadedModel, function: Callable[..., Any], replicated: bool):
    def with_parameters(parameters: tuple[Parameters, Parameters], *inputs):
      return function(loaded.model_parameters.model(*parameters), *inputs)

    self._loaded = loaded
    self._by_rows = NamedSharding(loaded.mesh, BATCH)
    self._jitted = jax.jit(with_parameters, out_shardings=everywhere(loaded.mesh) if replicated else None)

  def __call__(self, *inputs):
    with jax.set_mesh(self._loaded.mesh):
      return self._jitted(self._loaded.parameters, *jax.tree.map(self._placed, inputs))

  @property
  def compilations(self) -> int:
    """How many shapes of inputs this program was compiled for."""
    return self._jitted._cache_size()

  def _placed(self, value: np.ndarray | jax.Array) -> jax.Array:
    if isinstance(value, jax.Array):
      return value
    return jax.make_array_from_callback(value.shape, self._by_rows, value.__getitem__)


def require_model(config: Config, kind: type[ModelSettings], where: str) -> None:
  """Raises `UserError` unless the settings of the run's model are of class `kind`. `where` starts the message."""
  found = type(config.stage.model)
  require(issubclass(found, kind), f"{where} needs a model of {kind.__name__}, the run's is {found.__name__}")


def parse_mesh(text: str | None) -> MeshSettings | None:
  """The mesh of a command's `--mesh=DATA,FSDP,TENSOR`, such as 1,8,1, where -1 takes what the others leave.

  None for no text. Raises `UserError` for anything else.
  """
  if not text:
    return None
  try:
    data, fsdp, tensor = (int(size) for size in text.split(","))
  except ValueError:
    raise UserError(f"--mesh={text}: expected three numbers of devices, DATA,FSDP,TENSOR, such as 1,8,1") from None
  settings = MeshSettings(data, fsdp, tensor)
  settings.finalize("--mesh")
  return settings
