"""What every source yields: examples, which are pictures as found with the texts about them."""

import dataclasses
from collections.abc import Callable

import numpy as np

from refiner_export.records.record import ASSISTANT, USER, Conversation, Turn, box_placeholder

Corners = tuple[float, float, float, float]  # xyxy in [0, 1] of the upright picture


@dataclasses.dataclass(frozen=True)
class SourceObject:
  """An annotated object.

  Attributes:
    tag: lower-case name.
    box: xyxy in [0, 1] of the upright picture.
    mask: None, or a function without arguments that returns bool (H, W) over the whole upright picture, at any size.
  """
  tag: str
  box: Corners
  mask: Callable[[], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class SourcePicture:
  """A picture as found.

  Attributes:
    read: returns the bytes of the file. The exporter calls it when the example's turn comes, so that a list of many
      thousands of examples stays small.
    objects: the source's annotations; empty for a picture that nobody annotated.
    text_boxes: the boxes that texts refer to, xyxy in [0, 1]; `<box I.K>` stands for `text_boxes[K]` of picture I.
    credit: whom to thank for the picture; pages show it.
  """
  read: Callable[[], bytes]
  objects: tuple[SourceObject, ...] = ()
  text_boxes: tuple[Corners, ...] = ()
  credit: str = ""


@dataclasses.dataclass(frozen=True)
class SourceExample:
  """Pictures with their texts. A text points at picture K by `<image K>`; an example of text alone has no picture."""
  id: str
  pictures: tuple[SourcePicture, ...] = ()
  captions: tuple[str, ...] = ()
  conversations: tuple[Conversation, ...] = ()


class TextBoxes:
  """Collects the boxes that texts refer to in one picture; equal boxes get the same placeholder.

  Args:
    picture: the number of the picture in its example.
  """

  def __init__(self, picture: int = 0):
    self._picture = picture
    self._numbers: dict[Corners, int] = {}

  def placeholder(self, box: Corners) -> str:
    number = self._numbers.setdefault(box, len(self._numbers))
    return box_placeholder(self._picture, number)

  def collected(self) -> tuple[Corners, ...]:
    return tuple(self._numbers)


def ask(task: str, question: str, answer: str) -> Conversation:
  """A conversation of one question and its answer."""
  return Conversation(task, (Turn(USER, question), Turn(ASSISTANT, answer)))
