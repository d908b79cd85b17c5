"""What the objects of a made-up scene look like: shapes, colours, textures and sizes.

A shape is a rule that says which points of the plane lie inside it. The rule gives the exact mask at any resolution.
"""

import numpy as np

COLOURS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (40, 80, 220), "yellow": (240, 212, 40),
    "purple": (148, 60, 190), "orange": (250, 140, 20), "cyan": (50, 205, 215), "black": (25, 25, 25)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "heart")
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": (0.07, 0.09), "large": (0.13, 0.16)}  # half of an object's side, as a share of the picture's side

_STRIPES, _DOTS = 2.0, 3.0  # how often a pattern repeats from the middle of an object to its edge
_STAR = np.cos(np.deg2rad(72))  # distance of a pentagram's lines from its centre; its tips have the distance 1
_HEART = 1.25  # the curve reaches a little beyond 1; it is shrunk by this factor


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """bool, of the shape of `x` and `y`: which points lie inside a shape that fills the square [-1, 1] x [-1, 1].

  Args:
    x, y: coordinates of the points; x grows to the right and y grows downwards.
  """
  across, radius = np.maximum(np.abs(x), np.abs(y)), np.hypot(x, y)
  match shape:
    case "circle":
      return radius <= 1
    case "square":
      return across <= 0.9
    case "triangle":
      return (np.abs(x) <= (y + 1) / 2) & (y <= 1)
    case "diamond":
      return np.abs(x) + np.abs(y) <= 1
    case "cross":
      return (across <= 1) & (np.minimum(np.abs(x), np.abs(y)) <= 0.33)
    case "ring":
      return (radius <= 1) & (radius >= 0.55)
    case "star":
      return _in_star(x, y)
    case "heart":
      return _in_heart(_HEART * x, -_HEART * y)
  raise ValueError(f"unknown shape {shape!r}")


def pattern(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """bool, of the shape of `x` and `y`: which points of an object have the second, lighter colour."""
  match texture:
    case "plain":
      return np.zeros(x.shape, bool)
    case "striped":
      return np.floor((x + y) * _STRIPES) % 2 == 1
    case "dotted":
      return np.hypot(_to_cell(x), _to_cell(y)) <= 0.6
  raise ValueError(f"unknown texture {texture!r}")


def _in_star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """A pentagram with one tip upwards: the points that lie on the inner side of at least four of its five lines."""
  count = np.zeros(x.shape, int)
  for tip in range(5):
    angle = np.deg2rad(90 + 72 * tip)
    count += x * np.cos(angle) + y * np.sin(angle) <= _STAR
  return count >= 4


def _in_heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """The sextic curve (x^2 + y^2 - 1)^3 = x^2 y^3, y upwards."""
  return (x * x + y * y - 1) ** 3 <= x * x * y ** 3


def _to_cell(value: np.ndarray) -> np.ndarray:
  """Coordinates in [-1, 1] of the cell of a regular grid that each value lies in."""
  return 2 * (value * _DOTS / 2 % 1) - 1
