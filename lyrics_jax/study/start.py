"""Where a run of the study starts from: pieces of several earlier runs, such as image encoder and language model."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from lyrics_jax.training.parameters import ModelParameters
from lyrics_jax.weights import sources
from lyrics_jax.weights.table import Origin


@dataclasses.dataclass(frozen=True)
class Piece:
  """The parameters of the run in directory `run` whose paths match `pattern`."""
  run: str
  pattern: str


class Pieces:
  """What several runs have for a model, as `training.initialise.Origin` asks for it."""

  def __init__(self, origins: Mapping[str, Origin]):
    self._origins = origins  # by path
    self.name = ", ".join(sorted({origin.name for origin in origins.values()}))
    self.unknown: list[str] = []

  @classmethod
  def find(cls, pieces: Sequence[Piece], parameters: ModelParameters) -> "Pieces":
    """Raises `UserError` for a run that is missing or does not fit."""
    origins = {}
    for piece in pieces:
      origin = sources.find(piece.run, parameters)
      for path in fnmatch.filter(origin.paths(), piece.pattern):
        origins[path] = origin
    return cls(origins)

  def paths(self) -> list[str]:
    return list(self._origins)

  def shape(self, path: str) -> tuple[int, ...]:
    return self._origins[path].shape(path)

  def read(self, path: str, sharding: NamedSharding | None = None, dtype: np.dtype | None = None,
           transposed: bool = False) -> np.ndarray | jax.Array:
    return self._origins[path].read(path, sharding, dtype, transposed)

  def report(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    return f"{len(self._origins)} of {len(shapes)} parameters are read; the others are fresh"
