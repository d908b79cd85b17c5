"""What every source yields: one picture with its texts and, where known, its objects."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from refiner_export.records.record import ASSISTANT, USER, Conversation, Turn


@dataclasses.dataclass(frozen=True)
class SourceObject:
  """An annotated object.

  Attributes:
    tag: lower-case name.
    box: xyxy in [0, 1] of the upright picture.
    mask: None, or a function without arguments that returns bool (H, W) over the whole upright picture, at any size.
  """
  tag: str
  box: tuple[float, float, float, float]
  mask: Callable[[], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class SourceExample:
  """One picture as found, with its texts; `<box K>` in a text stands for `text_boxes[K]`, xyxy in [0, 1].

  `read_image` returns the bytes of the file: they are read only when the example's turn comes, so that a plan over
  many thousands of examples stays small.
  """
  id: str
  read_image: Callable[[], bytes]
  captions: tuple[str, ...] = ()
  conversations: tuple[Conversation, ...] = ()
  text_boxes: tuple[tuple[float, float, float, float], ...] = ()
  objects: tuple[SourceObject, ...] = ()


class Source(Protocol):
  """A settings class that names its input files and reads them."""
  name: str

  def examples(self) -> Sequence[SourceExample]:
    """All examples, in the same order on each call; ids are unique. Raises `UserError` for missing or wrong files."""


class TextBoxes:
  """Collects the boxes that one picture's texts refer to; the same box gets the same placeholder."""

  def __init__(self):
    self._boxes: dict[tuple[float, float, float, float], int] = {}

  def placeholder(self, box: tuple[float, float, float, float]) -> str:
    return f"<box {self._boxes.setdefault(box, len(self._boxes))}>"

  def collected(self) -> tuple[tuple[float, float, float, float], ...]:
    return tuple(self._boxes)


def ask(task: str, question: str, answer: str) -> Conversation:
  """A conversation of one question and its answer."""
  return Conversation(task, (Turn(USER, question), Turn(ASSISTANT, answer)))


def normalise_box(box: Sequence[float], width: float, height: float) -> tuple[float, float, float, float]:
  """xyxy in pixels -> xyxy in [0, 1], clipped to the picture."""
  clip = lambda value: float(min(max(value, 0.0), 1.0))
  return clip(box[0] / width), clip(box[1] / height), clip(box[2] / width), clip(box[3] / height)
