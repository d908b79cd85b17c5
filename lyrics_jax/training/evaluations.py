"""What a run measures while it trains. The loop is handed evaluations and knows none of them by name."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from refiner_export.common.settings import Settings, require


@dataclasses.dataclass(unsafe_hash=True)
class EvaluationSettings(Settings):
  """Settings of an evaluation, and how to build it.

  Attributes:
    name: stands before the figures in the metrics, such as `retrieval/i2t_r1`.
    every: steps between two measurements. The last step is measured too.
  """
  name: ClassVar[str]
  every: int = 10_000

  def build(self, config: Any, fingerprint: str) -> Callable[[Any], dict[str, float]]:
    """The function that measures: from a `LoadedModel` to figures by name.

    Args:
      config: the run's `Config`.
      fingerprint: the refiner of the training records. The same refiner must have made the evaluation's records.

    Raises:
      UserError: what the evaluation needs is missing or does not fit.
    """
    raise NotImplementedError

  def check_run(self, config: Any, path: str) -> None:
    """Raises `UserError` for a run that cannot be evaluated so. `path` is the dotted name of these settings."""
    require(self.every % config.log_every == 0,
            f"{path}.every={self.every} is not a multiple of config.log_every={config.log_every}: figures are written "
            "with the metrics of their step")

  def check(self, path: str) -> None:
    require(self.every > 0, f"{path}.every={self.every} must be positive")


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """An evaluation that is built. With several hosts, all hosts call it at the same steps.

  It draws no random numbers and changes nothing: a run takes the same steps with it as without it.
  """
  name: str
  every: int
  measure: Callable[[Any], dict[str, float]]

  def due(self, step: int, steps: int) -> bool:
    return step % self.every == 0 or step == steps

  def __call__(self, loaded: Any) -> dict[str, float]:
    """The figures of a `LoadedModel`, with the evaluation's name in front."""
    return {f"{self.name}/{figure}": value for figure, value in self.measure(loaded).items()}
