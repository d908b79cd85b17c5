"""AdamW with linear warm-up, cosine decay and clipping of the global gradient norm (paper section 4.1)."""

import dataclasses
import fnmatch
from collections.abc import Mapping

import jax
import optax

from refiner_export.common.checks import at_least
from refiner_export.common.settings import Settings, require


@dataclasses.dataclass(unsafe_hash=True)
class Rate(Settings):
  """Another learning rate for the parameters whose paths match `pattern`.

  Attributes:
    pattern: as in `stage.train`, for example `connector/projection/*`.
    peak_lr: instead of `OptimizerSettings.peak_lr`. The schedule keeps its form, so `final_lr` changes in proportion.
  """
  pattern: str
  peak_lr: float

  def check(self, path: str) -> None:
    require(self.peak_lr > 0, f"{path}.peak_lr={self.peak_lr} must be positive; to freeze, leave it out of stage.train")


@dataclasses.dataclass(unsafe_hash=True)
class OptimizerSettings(Settings):
  """AdamW and its learning rate.

  Attributes:
    peak_lr, final_lr: the learning rate after warm-up, and at the last step.
    warmup_fraction: the share of all steps in which the learning rate rises from 0.
    weight_decay: of matrices alone; biases, norms and scalars do not decay.
    clip_norm: the largest norm that the gradient of all parameters together may have.
    accumulate_steps: microbatches per update.
    rates: other learning rates of single parameters. Where several patterns match a parameter, the first counts.
  """
  peak_lr: float = 1e-4
  final_lr: float = 0.0
  warmup_fraction: float = 0.15
  weight_decay: float = 0.05
  beta1: float = 0.9
  beta2: float = 0.98
  clip_norm: float = 1.0
  accumulate_steps: int = 1
  rates: tuple[Rate, ...] = ()

  def check(self, path: str) -> None:
    require(self.peak_lr > 0, f"{path}.peak_lr={self.peak_lr} must be positive")
    require(0 <= self.warmup_fraction < 1, f"{path}.warmup_fraction={self.warmup_fraction} must lie in [0, 1)")
    require(self.clip_norm > 0, f"{path}.clip_norm={self.clip_norm} must be positive")
    at_least(self, path, 1, "accumulate_steps")


def learning_rate(settings: OptimizerSettings, steps: int) -> optax.Schedule:
  """The schedule of `peak_lr`. The learning rates of `rates` are multiples of it.

  Updates are counted from 1: the first update of a warm-up already moves, and the last update has `final_lr`.
  """
  warmup = round(settings.warmup_fraction * steps)
  start = 0.0 if warmup else settings.peak_lr
  schedule = optax.warmup_cosine_decay_schedule(start, settings.peak_lr, warmup, steps, settings.final_lr)

  def of_update(count: jax.Array) -> jax.Array:
    return schedule(count + 1)

  return of_update


def make_optimizer(settings: OptimizerSettings, steps: int, axes: Mapping[str, tuple]) -> optax.GradientTransformation:
  """The optimizer of the trained parameters.

  Args:
    steps: of the whole run, which the schedule is stretched over.
    axes: the logical axes of each trained parameter, by path. A parameter decays if it has at least two.

  Raises:
    UserError: a pattern of `rates` matches no trained parameter.
  """
  def decays(parameters: Mapping[str, jax.Array]) -> dict[str, bool]:
    return {path: len(axes[path]) >= 2 for path in parameters}

  adamw = optax.adamw(learning_rate(settings, steps), settings.beta1, settings.beta2,
                      weight_decay=settings.weight_decay, mask=decays)
  return optax.chain(optax.clip_by_global_norm(settings.clip_norm), _with_rates(adamw, settings, axes))


def _with_rates(optimizer: optax.GradientTransformation, settings: OptimizerSettings,
                axes: Mapping[str, tuple]) -> optax.GradientTransformation:
  """Multiplies the update of a parameter by its learning rate over the common one.

  The state is that of `optimizer`, so that a run may go on with other rates.
  """
  for n, rate in enumerate(settings.rates):
    require(any(fnmatch.fnmatchcase(path, rate.pattern) for path in axes),
            f"config.optimizer.rates[{n}].pattern={rate.pattern!r} matches no trained parameter; the first that is "
            f"trained is {next(iter(axes))}")

  def factor(path: str) -> float:
    for rate in settings.rates:
      if fnmatch.fnmatchcase(path, rate.pattern):
        return rate.peak_lr / settings.peak_lr
    return 1.0

  def update(gradients: Mapping[str, jax.Array], state: optax.OptState, parameters: Mapping[str, jax.Array]):
    updates, state = optimizer.update(gradients, state, parameters)
    return {path: factor(path) * of_path for path, of_path in updates.items()}, state

  return optax.GradientTransformation(optimizer.init, update) if settings.rates else optimizer
