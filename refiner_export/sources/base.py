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
    mask_version: a text that changes with the mask, so that an edited mask is noticed. Where it is empty the exporter
      calls `mask` to find out, which takes longer.
  """
  tag: str
  box: Corners
  mask: Callable[[], np.ndarray] | None = None
  mask_version: str = ""


@dataclasses.dataclass(frozen=True)
class SourcePicture:
  """A picture as found.

  Attributes:
    read: returns the bytes of the file. The exporter calls it when the example's turn comes, so that a list of many
      thousands of examples stays small.
    objects: the source's annotations; empty for a picture that nobody annotated.
    text_boxes: the boxes that texts refer to, xyxy in [0, 1]; `<box I.K>` stands for `text_boxes[K]` of picture I.
    credit: whom to thank for the picture; pages show it.
    size: width and height, in pixels, of the picture that the annotations were made for; None where nobody says. A file
      that is stored turned may have this size before turning: its boxes and masks then turn with it. A picture of
      another size is skipped.
    as_stored: whether the annotations were made for the picture as it is stored, where its size does not tell: in a
      picture that is stored mirrored or upside down, and in a square one.
    version: returns a text that changes when the file is edited, such as `files.stamp` or a checksum that the source
      states; None where an edited picture need not be noticed. The exporter calls it after `read`.
    sha256: the checksum of the file in hex, where the source states it; a picture with another checksum is skipped.
  """
  read: Callable[[], bytes]
  objects: tuple[SourceObject, ...] = ()
  text_boxes: tuple[Corners, ...] = ()
  credit: str = ""
  size: tuple[int, int] | None = None
  as_stored: bool = False
  version: Callable[[], str] | None = None
  sha256: str = ""


@dataclasses.dataclass(frozen=True)
class SourceExample:
  """Pictures with their texts. A text points at picture K by `<image K>`; an example of text alone has no picture.

  Attributes:
    id: no other example of the source has it.
    pictures: in their order.
    captions: plain texts. The exporter escapes what looks like a placeholder in them.
    conversations: may hold placeholders. A source passes texts from outside through `records.record.escape` first.
    dropped: a reason for each annotation that the source left out. Equal reasons are counted together.
    fault: why the example cannot become a record; it is skipped for this reason. Empty for a good example.
  """
  id: str
  pictures: tuple[SourcePicture, ...] = ()
  captions: tuple[str, ...] = ()
  conversations: tuple[Conversation, ...] = ()
  dropped: tuple[str, ...] = ()
  fault: str = ""


def current_version(picture: SourcePicture) -> str:
  """What `picture.version` says; "" where it says nothing or the file is not there."""
  try:
    return picture.version() if picture.version else ""
  except (OSError, ValueError):
    return ""


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
