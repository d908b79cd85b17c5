"""Reading the examples of one shard from the source: lazily, counted, and with a hash of their texts."""

import hashlib
from collections.abc import Iterator

from refiner_export.common.settings import require
from refiner_export.export.plan import ExportPlan
from refiner_export.sources.base import SourceExample


class ShardExamples:
  """The examples of shard `number`, read once by `batches`; afterwards `count` and `texts` are final.

  Attributes:
    count: how many examples were read so far.
    texts: a hash of their ids, texts and annotations, so that an edited source is noticed. Pictures are not part of it.
  """

  def __init__(self, plan: ExportPlan, number: int):
    self._source, self._slice = plan.config.source, plan.slice_of(number)
    self._digest = hashlib.sha256()
    self.count = 0

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
      self._add(example)
      batch.append(example)
      if len(batch) == size:
        yield batch
        batch = []
    if batch:
      yield batch
    self._check_count()

  def _add(self, example: SourceExample) -> None:
    self.count += 1
    # The repr of texts and floats is the same on every machine.
    self._digest.update(repr((example.id, example.captions, example.conversations)).encode())
    for picture in example.pictures:
      objects = [(thing.tag, thing.box) for thing in picture.objects]
      self._digest.update(repr((picture.text_boxes, picture.credit, objects)).encode())

  def _check_count(self) -> None:
    unit, start, planned = self._slice.unit, self._slice.start, self._slice.count
    require(planned in (None, self.count),
            f"source: unit {unit.name} gives {self.count} examples after example {start}, and its count of "
            f"{unit.count} makes it {planned}: mend the source's method shards or read")
