"""A model's parameters as flat dictionaries `path -> array`, split into trained and frozen ones.

Paths such as `perception/mq_former/queries` are the names of checkpoints, weight tables and reports alike.
"""

import dataclasses
import math
from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lyrics_jax.stages.base import Stage
from lyrics_jax.training.sharding import parameter_sharding

Parameters = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ParameterPlan:
  """Everything about a stage's parameters that is known before one exists.

  `shapes`: abstract arrays by path, frozen ones in their storage dtype. `axes`: their logical axes.
  """
  stage: Stage
  graph: nnx.GraphDef
  variables: dict[str, nnx.Variable]
  shapes: dict[str, jax.ShapeDtypeStruct]
  axes: dict[str, tuple[str | None, ...]]

  @classmethod
  def of(cls, stage: Stage) -> "ParameterPlan":
    graph, state = nnx.split(nnx.eval_shape(lambda: stage.build(nnx.Rngs(0))))
    variables = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    metadata = {path: v.get_metadata() for path, v in variables.items()}
    frozen_dtype = stage.config.model.frozen_dtype
    frozen_dtype = jnp.dtype("bfloat16" if frozen_dtype == "int8" else frozen_dtype)  # int8 ones keep theirs
    kept = lambda path: stage.trains(path) or metadata[path].get("keeps_dtype", False)
    shapes = {path: jax.ShapeDtypeStruct(v.shape, v.dtype if kept(path) else frozen_dtype)
              for path, v in variables.items()}
    return cls(stage, graph, variables, shapes, {path: metadata[path]["logical_axes"] for path in variables})

  def paths(self, trained: bool) -> list[str]:
    return [path for path in self.shapes if self.stage.trains(path) == trained]

  def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
    """Raises `UserError` for a dimension that the mesh does not divide."""
    return {path: parameter_sharding(mesh, path, shape.shape, self.axes[path]) for path, shape in self.shapes.items()}

  def initialise(self, mesh: Mesh, seed: int) -> tuple[Parameters, Parameters]:
    """Fresh (trained, frozen) parameters, made where they will lie."""
    return self.split(self.fresh(mesh, seed, self.shapes))

  def fresh(self, mesh: Mesh, seed: int, paths: Collection[str]) -> Parameters:
    """Those of the fresh parameters that have these paths; the others are never in memory."""
    if not paths:
      return {}
    shardings = self.shardings(mesh)

    def create(key: jax.Array) -> Parameters:
      _, state = nnx.split(self.stage.build(nnx.Rngs(params=key)))
      values = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
      return {path: values[path][...].astype(self.shapes[path].dtype) for path in paths}

    with jax.set_mesh(mesh):
      return jax.jit(create, out_shardings={path: shardings[path] for path in paths})(jax.random.key(seed))

  def split(self, parameters: Parameters) -> tuple[Parameters, Parameters]:
    """(trained, frozen)."""
    return ({path: parameters[path] for path in self.paths(trained=True)},
            {path: parameters[path] for path in self.paths(trained=False)})

  def model(self, trained: Parameters, frozen: Parameters) -> nnx.Module:
    """The module with these parameters."""
    values = trained | frozen
    return nnx.merge(self.graph, nnx.from_flat_state(
        [(_path(path), variable.replace(values[path])) for path, variable in self.variables.items()]))

  def report(self) -> str:
    """Parameters by part, trained and frozen, as lines for a person."""
    lines = [f"{'part':32}{'trained':>16}{'frozen':>16}"]
    for part in dict.fromkeys(map(_part, self.shapes)):
      counts = [sum(math.prod(self.shapes[path].shape) for path in self.paths(trained) if _part(path) == part)
                for trained in (True, False)]
      lines.append(f"{part:32}" + "".join(f"{count:16,}" for count in counts))
    return "\n".join([*lines, f"{'all':32}{self.count(True):16,}{self.count(False):16,}"])

  def count(self, trained: bool) -> int:
    return sum(math.prod(self.shapes[path].shape) for path in self.paths(trained))


def _part(path: str) -> str:
  return "/".join(path.split("/")[:2]) if path.startswith("perception/") else path.split("/")[0]


def _path(path: str) -> tuple[str | int, ...]:
  return tuple(int(part) if part.isdigit() else part for part in path.split("/"))
