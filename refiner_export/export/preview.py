"""A dry run: a few examples go through the refiner and onto a page, and no shard is written."""

import collections
import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator

from etils import epath

from refiner_export.common import images
from refiner_export.common.files import write_atomically, writing
from refiner_export.common.settings import require
from refiner_export.export import pipeline
from refiner_export.export.cleaning import clean
from refiner_export.export.config import ExportConfig
from refiner_export.export.plan import ExportPlan, clear_plans, make_plan
from refiner_export.export.prefetch import prefetch
from refiner_export.export.reports import skip_of
from refiner_export.pages import gallery
from refiner_export.records.features import FeatureSums
from refiner_export.records.manifest import SPLIT, Manifest
from refiner_export.records.record import Record
from refiner_export.records.schema import SCHEMA_VERSION
from refiner_export.records.shard_files import ShardInfo
from refiner_export.sources.base import SourceExample

PAGE = "preview.html"

_LOOKED_AT = 10_000  # examples of a shard among which some are drawn; a unit of unknown size may have many more


def preview(config: ExportConfig, count: int, seed: int | None = None) -> epath.Path:
  """Writes a gallery of `count` examples into `config.output`, and returns its path.

  Args:
    config: of the export that is tried.
    count: how many examples; fewer where the source has fewer.
    seed: examples are drawn at random by this seed; None takes the first.

  Raises:
    UserError: see `make_plan`; or the page cannot be written.
  """
  clear_plans()
  plan = make_plan(config)
  refiner = config.refiner.build()
  examples = _first(plan, count) if seed is None else _drawn(plan, count, random.Random(seed))
  read = functools.partial(pipeline.read, image=config.image, reading=config.runner.reading)
  batches = iter(lambda: list(itertools.islice(examples, config.batch)), [])
  items, records, skipped = [], [], []
  for batch, found in prefetch(read, batches, config.runner.threads, config.runner.prefetch):
    for result in pipeline.refine_read(batch, found, refiner, config.source.name):
      if isinstance(result, images.UnreadableImage):
        skipped.append(skip_of(result))
      else:
        items.append(plan.schema.item(result))
        records.append(plan.schema.decode(items[-1].payload))
  require(bool(items or skipped), "config.source: there is no example in it")
  page = gallery.render_records(_manifest(plan, items, records, skipped), records, skipped, len(records))
  path = plan.directory / PAGE
  with writing(path):
    plan.directory.mkdir(parents=True, exist_ok=True)
  write_atomically(path, page.encode())
  return path


def _first(plan: ExportPlan, count: int) -> Iterator[SourceExample]:
  left = count
  for number in range(plan.shards):
    for example in itertools.islice(_examples(plan, number), left):
      yield example
      left -= 1
    if left == 0:
      return


def _drawn(plan: ExportPlan, count: int, draw: random.Random) -> Iterator[SourceExample]:
  """Examples of shards that are drawn at random, and at random within them. Only texts are read to choose."""
  wanted = collections.Counter(draw.choices(range(plan.shards), k=count))
  for number in sorted(wanted):
    candidates = list(itertools.islice(_examples(plan, number), _LOOKED_AT))
    yield from draw.sample(candidates, min(wanted[number], len(candidates)))


def _examples(plan: ExportPlan, number: int) -> Iterator[SourceExample]:
  part = plan.slice_of(number)
  for example in plan.config.source.read_slice(part.unit, part.start, part.stop):
    yield clean(example)


def _manifest(plan: ExportPlan, items: list, records: list[Record], skipped: list) -> Manifest:
  """What a directory with these records would say of itself."""
  sums = dataclasses.asdict(FeatureSums.total([item.features for item in items])) if items else {}
  conversations, pictures = sum(item.conversations for item in items), sum(item.pictures for item in items)
  size = sum(len(item.payload) for item in items)
  shard = ShardInfo("preview", len(items), conversations, pictures, size, "", **sums)
  rows = 0
  for record in records:
    for picture in record.pictures:
      rows = max(rows, len(picture.detection_features))
  return Manifest(
      schema_version=SCHEMA_VERSION, fingerprint=plan.schema.fingerprint, feature_dtype=plan.schema.feature_dtype,
      detection_rows=rows, refiner=plan.described, source=plan.config.source.name, split=SPLIT, shards=(shard,),
      records=len(items), conversations=conversations, pictures=pictures, skipped=len(skipped),
      format=plan.config.format, optional_fields=plan.schema.optional_fields)
