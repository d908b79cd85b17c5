"""Reading the examples of one shard from the source: lazily, cleaned, counted, and with a hash of their texts."""

import collections
import hashlib
from collections.abc import Iterator, Sequence

from refiner_export.common.images import UnreadableImage
from refiner_export.common.settings import require
from refiner_export.export.cleaning import clean
from refiner_export.export.pipeline import StoredPicture
from refiner_export.export.plan import ExportPlan
from refiner_export.sources.base import SourceExample


class PictureVersions:
  """A hash of the versions of many pictures, one example after the other; "" when nobody states a version."""

  def __init__(self):
    self._digest, self._is_known = hashlib.sha256(), False

  def add(self, versions: Sequence[str]) -> None:
    self._is_known = self._is_known or any(versions)
    self._digest.update(repr(list(versions)).encode())

  @property
  def text(self) -> str:
    return self._digest.hexdigest()[:12] if self._is_known else ""


class ShardExamples:
  """The examples of shard `number`, read once by `batches`; afterwards `count`, `texts` and `dropped` are final.

  Attributes:
    count: how many examples were read so far.
    texts: a hash of their ids, texts and annotations, masks included, so that an edited source is noticed. Pictures are
      not part of it.
    pictures_version: a hash of the versions of the pictures that were read; "" where the source states none.
    dropped: how many texts and annotations were left out, by reason.
  """

  def __init__(self, plan: ExportPlan, number: int):
    self._source, self._slice = plan.config.source, plan.slice_of(number)
    self._digest = hashlib.sha256()
    self.count = 0
    self.dropped = collections.Counter()
    self._versions = PictureVersions()

  @property
  def texts(self) -> str:
    return self._digest.hexdigest()[:12]

  def batches(self, size: int) -> Iterator[list[SourceExample]]:
    """Lists of `size` examples in their order; the last list may be shorter.

    Raises:
      UserError: the source gives another number of examples than it has announced.
    """
    batch = []
    for example in self._source.read_slice(self._slice.unit, self._slice.start, self._slice.stop):
      batch.append(self._add(clean(example)))
      if len(batch) == size:
        yield batch
        batch = []
    if batch:
      yield batch
    self._check_count()

  def _add(self, example: SourceExample) -> SourceExample:
    self.count += 1
    self.dropped.update(example.dropped)
    # The repr of texts and floats is the same on every machine.
    self._digest.update(repr((example.id, example.fault, example.captions, example.conversations)).encode())
    for picture in example.pictures:
      objects = [(thing.tag, thing.box, thing.mask_version) for thing in picture.objects]
      self._digest.update(repr(
          (picture.text_boxes, picture.credit, picture.size, picture.as_stored, objects)).encode())
    return example

  def add_versions(self, found: tuple[StoredPicture, ...] | UnreadableImage) -> None:
    """Takes note of the files of an example that was read."""
    if not isinstance(found, UnreadableImage):
      self._versions.add([stored.version for stored in found])

  @property
  def pictures_version(self) -> str:
    return self._versions.text

  def counted(self) -> dict[str, int]:
    """`dropped` in a fixed order."""
    return dict(sorted(self.dropped.items()))

  def _check_count(self) -> None:
    unit, start, planned = self._slice.unit, self._slice.start, self._slice.count
    require(planned in (None, self.count),
            f"source: unit {unit.name} gives {self.count} examples after example {start}, and its count of "
            f"{unit.count} makes it {planned}: mend the source's method shards or read")
