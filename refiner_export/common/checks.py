"""Checks that many settings classes make: least values, shares, and widths that heads divide."""

from refiner_export.common.settings import Settings, require


def at_least(settings: Settings, path: str, least: int, *names: str) -> None:
  """Raises `UserError` unless each of these fields is at least `least`."""
  for name in names:
    value = getattr(settings, name)
    require(value >= least, f"{path}.{name}={value} must be at least {least}")


def below_one(settings: Settings, path: str, *names: str) -> None:
  """Raises `UserError` unless each of these fields lies in [0, 1)."""
  for name in names:
    value = getattr(settings, name)
    require(0 <= value < 1, f"{path}.{name}={value} must lie in [0, 1)")


def heads_divide(path: str, width: int, heads: int) -> None:
  """Raises `UserError` unless `heads` divides `width`."""
  require(width % heads == 0, f"{path}.width={width} is not a multiple of {path}.heads={heads}")
