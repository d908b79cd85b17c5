"""A model's parameters as flat dictionaries `path -> array`, split into trained and frozen ones.

Paths such as `connector/former/queries` are the names of checkpoints, weight tables and reports alike.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lyrics_jax.config import Config
from lyrics_jax.sharding import parameter_sharding
from refiner_export.common.settings import require

Parameters = dict[str, jax.Array]
Abstract = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class ModelParameters:
  """What is known of a run's parameters before one of them exists.

  Attributes:
    config: of the run.
    graph, variables: the model without its arrays, to which `model` adds them.
    shapes: abstract arrays by path, as checkpoints have them: every kernel is [..., n, m], and frozen parameters have
      their storage dtype.
    axes: the logical axes of `shapes`, without the axis of scanned layers.
    transposed: paths of the kernels that lie in memory as [..., m, n]; see `models/layers/linear.py`.
    bounds: between which two values an update leaves a parameter, by path.
  """
  config: Config
  graph: nnx.GraphDef
  variables: dict[str, nnx.Variable]
  shapes: Abstract
  axes: dict[str, tuple[str | None, ...]]
  transposed: frozenset[str]
  bounds: dict[str, tuple[float, float]]

  @classmethod
  def of(cls, config: Config) -> "ModelParameters":
    """Raises `UserError` for a pattern of `stage.train` that matches nothing, or a trained parameter in int8."""
    stage, compute = config.stage, config.compute
    graph, state = nnx.split(nnx.eval_shape(lambda: stage.build(compute, nnx.Rngs(0))))
    variables, shapes, axes, transposed, bounds = {}, {}, {}, set(), {}
    for place, variable in nnx.to_flat_state(state):
      path, metadata = _path(place), variable.get_metadata()
      kept = stage.trains(path) or metadata.get("keeps_dtype", False)
      shape, logical = variable.shape, metadata["logical_axes"]
      if metadata.get("transposed", False):
        transposed.add(path)
        shape, logical = _swapped(shape), _swapped(logical)
      if metadata.get("bounds") is not None:
        bounds[path] = metadata["bounds"]
      variables[path], axes[path] = variable, logical
      shapes[path] = jax.ShapeDtypeStruct(shape, variable.dtype if kept else compute.storage)
    parameters = cls(config, graph, variables, shapes, axes, frozenset(transposed), bounds)
    parameters._check()
    return parameters

  def _check(self) -> None:
    for pattern in self.config.stage.train:
      require(bool(fnmatch.filter(self.shapes, pattern)), f"config.stage.train: the pattern {pattern!r} matches no "
              f"parameter; the model's parts are {', '.join(dict.fromkeys(map(part, self.shapes)))}")
    for path in self.paths(trained=True):
      require(self.shapes[path].dtype != jnp.int8,
              f"config.stage.train names {path}, which config.compute.frozen_dtype=int8 stores in int8: train all of "
              "this part, or set config.compute.frozen_dtype=bfloat16")

  def paths(self, trained: bool) -> list[str]:
    """The paths of the trained parameters, or of the frozen ones."""
    return [path for path in self.shapes if self.config.stage.trains(path) == trained]

  @property
  def memory(self) -> Abstract:
    """Abstract arrays as they lie in memory."""
    memory = dict(self.shapes)
    for path in self.transposed:
      shape = self.shapes[path]
      memory[path] = jax.ShapeDtypeStruct(_swapped(shape.shape), shape.dtype)
    return memory

  def shardings(self, mesh: Mesh, stored: bool = False) -> dict[str, NamedSharding]:
    """Where parameters lie on a mesh.

    Args:
      stored: whether the arrays are as checkpoints have them, not as they lie in memory.

    Raises:
      UserError: the mesh does not divide a dimension.
    """
    shardings = {}
    for path, shape in self.shapes.items():
      axes, dimensions = self.axes[path], shape.shape
      if path in self.transposed and not stored:
        axes, dimensions = _swapped(axes), _swapped(dimensions)
      shardings[path] = parameter_sharding(mesh, path, dimensions, axes)
    return shardings

  def turned(self, parameters: Parameters) -> Parameters:
    """Arrays as checkpoints have them, from arrays as they lie in memory; or the other way, which is the same."""
    turned = {}
    for path, value in parameters.items():
      turned[path] = value.swapaxes(-1, -2) if path in self.transposed else value
    return turned

  def initialise(self, mesh: Mesh, seed: int) -> tuple[Parameters, Parameters]:
    """Fresh (trained, frozen) parameters, made on the devices where they will lie."""
    return self.split(self.fresh(mesh, seed, self.shapes))

  def fresh(self, mesh: Mesh, seed: int, paths: Collection[str]) -> Parameters:
    """The fresh parameters with these paths, as they lie in memory. No other parameter takes memory meanwhile."""
    if not paths:
      return {}
    stage, compute, shardings = self.config.stage, self.config.compute, self.shardings(mesh)

    def create(key: jax.Array) -> Parameters:
      _, state = nnx.split(stage.build(compute, nnx.Rngs(params=key)))
      values = {}
      for place, variable in nnx.to_flat_state(state):
        path = _path(place)
        if path in out_shardings:
          values[path] = variable[...].astype(self.shapes[path].dtype)
      return values

    out_shardings = {path: shardings[path] for path in paths}
    with jax.set_mesh(mesh):
      return jax.jit(create, out_shardings=out_shardings)(jax.random.key(seed))

  def split(self, parameters: Mapping) -> tuple[dict, dict]:
    """(trained, frozen), in the order of `shapes`."""
    trained = {path: parameters[path] for path in self.paths(trained=True)}
    return trained, {path: parameters[path] for path in self.paths(trained=False)}

  def model(self, trained: Parameters, frozen: Parameters) -> nnx.Module:
    """The module with these parameters, which are as they lie in memory."""
    values = trained | frozen
    state = []
    for path, variable in self.variables.items():
      state.append((_place(path), variable.replace(values[path])))
    return nnx.merge(self.graph, nnx.from_flat_state(state))

  def count(self, trained: bool) -> int:
    """The number of trained, or of frozen, values."""
    return sum(math.prod(self.shapes[path].shape) for path in self.paths(trained))

  def report(self) -> str:
    """Numbers of parameters by part, trained and frozen, as lines for a person."""
    counts: dict[str, list[int]] = {}
    for path, shape in self.shapes.items():
      of_part = counts.setdefault(part(path), [0, 0])
      of_part[0 if self.config.stage.trains(path) else 1] += math.prod(shape.shape)
    counts["all"] = [self.count(True), self.count(False)]
    lines = [f"{'part':32}{'trained':>16}{'frozen':>16}"]
    for name, (trained, frozen) in counts.items():
      lines.append(f"{name:32}{trained:16,}{frozen:16,}")
    return "\n".join(lines)


def part(path: str) -> str:
  """The part of the model that a parameter belongs to, such as `vision`, `connector/former`, `llm` or `itm`."""
  first, *rest = path.split("/")
  return f"{first}/{rest[0]}" if first == "connector" else first


def _swapped(sizes: tuple) -> tuple:
  """The same, but the last two have changed places."""
  return (*sizes[:-2], sizes[-1], sizes[-2])


def _path(place: tuple[str | int, ...]) -> str:
  """From the names and numbers that lead to a variable in an NNX state."""
  return "/".join(map(str, place))


def _place(path: str) -> tuple[str | int, ...]:
  return tuple(int(name) if name.isdigit() else name for name in path.split("/"))
