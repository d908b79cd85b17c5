"""What a model sees of the pictures of a record: pixels for the image encoder, and the refiner's local tokens."""

import dataclasses
import io
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lyrics_jax.data.batch import Batch, Dimensions, Fields
from lyrics_jax.data.padding import pad_rows
from lyrics_jax.data.views import View, sample_view
from refiner_export.common.boxes import to_cxcywh
from refiner_export.common.settings import UserError, require
from refiner_export.records.record import Picture

if TYPE_CHECKING:
  from lyrics_jax.data.settings import DataSettings

# The fields that `PictureInputs.arrays` makes.
VISUAL = ("image", "picture_mask", "picture_id", "detection", "detection_mask", "masks", "masks_mask")

_VIEW_TRIES = 10  # to find a view that keeps every box that must stay visible


def decode(data: bytes) -> np.ndarray:
  """JPEG bytes to uint8 (height, width, 3) RGB. Raises `OSError` for bytes that are no picture."""
  with Image.open(io.BytesIO(data)) as image:
    return np.asarray(image.convert("RGB"))


@dataclasses.dataclass(frozen=True)
class PictureInputs:
  """Makes the visual fields of examples. `fields` are those that the stage reads; no other field is made."""
  data: "DataSettings"
  fields: Fields
  dimensions: Dimensions

  def whole(self, picture: Picture) -> View:
    """The view of evaluation: the whole picture, fitted to a square."""
    return View().fitted(self.data.fit, picture.width, picture.height)

  def sample(self, picture: Picture, rng: np.random.Generator, crop: bool = True, flip: bool = True,
             kept: Sequence[int] = ()) -> View:
    """A random view, fitted to a square.

    Args:
      crop, flip: whether the picture may be cropped and mirrored; the settings may forbid more.
      kept: indices of text boxes that the view must show. After ten tries without success it is the whole picture.
    """
    boxes = picture.text_boxes[list(kept)]
    for _ in range(_VIEW_TRIES):
      view = sample_view(rng, self.data.crop_scale if crop else (1.0, 1.0), flip and self.data.flip)
      view = view.fitted(self.data.fit, picture.width, picture.height)
      if view.boxes_xyxy(boxes)[1].all():
        return view
    return self.whole(picture)

  def arrays(self, picture: Picture, view: View) -> Batch:
    """The visual fields of one picture; S = image size, N = detection rows, M = mask rows, W = feature width (256).

    Returns, of the fields that the stage reads:
      image: uint8 (S, S, 3).
      picture_mask: bool (), True.
      picture_id: int32 (), the same for the same picture wherever it stands.
      detection: float32 (N, W + 4), the detector's feature and its box, cxcywh in [0, 1] of the view.
      detection_mask: bool (N,), False for padding and for rows outside of the view.
      masks: float32 (M, W + 4), the segmenter's feature and the object's box, likewise.
      masks_mask: bool (M,).
    What `data` does not show is blank: black pixels, masked rows (paper table 5).
    """
    arrays = {"picture_mask": np.array(True), "picture_id": _identity(picture)}
    if "image" in self.fields:
      size = self.dimensions.image_size
      black = np.zeros((size, size, 3), np.uint8)
      arrays["image"] = _pixels(picture, view, size) if self.data.shows("image") else black
    if "detection" in self.fields:
      boxes, visible = view.boxes_cxcywh(picture.detection_boxes)
      arrays["detection"], arrays["detection_mask"] = self._local_tokens(
          picture.detection_features, boxes, visible & self.data.shows("detection"), self.dimensions.detection_rows)
    if "masks" in self.fields:
      boxes, visible = view.boxes_xyxy(picture.boxes)
      arrays["masks"], arrays["masks_mask"] = self._local_tokens(
          picture.mask_features, to_cxcywh(boxes), visible & self.data.shows("masks"), self.dimensions.mask_rows)
    return {name: value for name, value in arrays.items() if name in self.fields}

  def objects(self, picture: Picture, view: View) -> list[tuple[str, np.ndarray]]:
    """Tag and box (xyxy in [0, 1] of the view) of each visible object, best scores first; none without the refiner."""
    objects = []
    boxes, visible = view.boxes_xyxy(picture.boxes)
    for index, tag in enumerate(picture.tags):
      if visible[index] and self.data.shows("spatial"):
        objects.append((tag, boxes[index]))
    return objects

  def stack(self, pictures: Sequence[Batch]) -> Batch:
    """The fields of several pictures with a pictures axis in front, padded to `dimensions.pictures`.

    Args:
      pictures: the fields of each picture, all with the same names; empty for a row without a picture.

    Returns:
      Every field that has a pictures axis.
    """
    stacked = {}
    for name, field in self.fields.items():
      if len(field.dims) < 2 or field.dims[1] != "pictures":
        continue
      stacked[name] = np.full(field.example_shape(self.dimensions), field.padding, field.dtype)
      for index, arrays in enumerate(pictures):
        stacked[name][index] = arrays[name]
    return stacked

  def _local_tokens(self, features: np.ndarray, boxes: np.ndarray, visible: np.ndarray,
                    count: int) -> tuple[np.ndarray, np.ndarray]:
    width = self.dimensions.local_width - boxes.shape[1]
    found = features.shape[1]
    require(found == width, f"features are {found} wide, config.stage.model.connector.local.feature_width={width}: "
                            f"set it to {found}")
    return pad_rows(np.concatenate([features, boxes], axis=1), visible, count)


def _identity(picture: Picture) -> np.ndarray:
  """int32 (): a hash of the stored bytes."""
  return np.array(zlib.crc32(picture.image), np.uint32).view(np.int32)


def _pixels(picture: Picture, view: View, size: int) -> np.ndarray:
  try:
    return view.image(decode(picture.image), size)
  except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
    raise UserError(f"its image cannot be decoded ({error}): export it again") from error
