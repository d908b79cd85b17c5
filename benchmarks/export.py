"""Times the export's chain of networks against a straightforward one over the same weights and pictures, in one run.

  python benchmarks/export.py --images coco/val2017 --pictures 64
  python benchmarks/export.py --tiny                               small networks, for a quick try

Ours is `pipeline.refine` over windows of pictures: each network takes batches of pictures of one size, the detector
looks for all tags of a picture in one pass, and all boxes of several pictures are decoded together. The other side is
what scripts around these networks commonly do, over the same network objects, so that only the order of work differs:

  per prompt    one picture after the other; a pass of the detector for each tag; one encode of the picture for its
                masks, then a decode for each box
  per picture   the same, but one pass of the detector for all tags of the picture: the best that can be done without
                batches. It must give the same tags, boxes and features as ours.

Both read and encode the same files, run on the same device in the same precision, and keep every network loaded. The
weights are random, so thresholds would decide how much there is to do: instead the best `--tags` tags and the best
`--boxes` boxes of each picture are taken, on all sides.

On a CPU that others use too, compare the seconds of CPU time: they hardly depend on who else is there.

The sizes of records are those of the pictures that were refined, against float32.
"""

import dataclasses
import io
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from absl import app, flags
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import random_refiner  # noqa: E402
from refiner_export.export import pipeline  # noqa: E402
from refiner_export.export.config import ImageSettings  # noqa: E402
from refiner_export.common.images import to_jpeg  # noqa: E402
from refiner_export.records.record import Record  # noqa: E402
from refiner_export.records.schema import Schema  # noqa: E402
from refiner_export.refiners.base import Detections, Segments, Tags, UprightPicture  # noqa: E402
from refiner_export.refiners.compute import Compute  # noqa: E402
from refiner_export.refiners.grounding_dino.detector import GroundingDino, GroundingDinoDetector  # noqa: E402
from refiner_export.refiners.neural import NeuralModels  # noqa: E402
from refiner_export.refiners.ram_plus.tagger import RamPlusTagger  # noqa: E402
from refiner_export.refiners.sam_hq.segmenter import SamHQ, SamHQSegmenter  # noqa: E402
from refiner_export.refiners.sam_hq.decoder import MaskDecoder  # noqa: E402
from refiner_export.sources.base import SourceExample, SourcePicture  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_string("images", None, "Folder of JPEG files; without it, noise of the sizes that COCO's pictures have.")
flags.DEFINE_integer("pictures", 16, "How many.", lower_bound=1)
flags.DEFINE_integer("window", 128, "Pictures that ours sees at once.", lower_bound=1)
flags.DEFINE_integer("tags", 10, "Taken of each picture.", lower_bound=1)
flags.DEFINE_integer("boxes", 8, "Taken of each picture.", lower_bound=1)
flags.DEFINE_enum("tagger", "swin_l", ["swin_l", "swin_b"], "RAM++'s image encoder.")
flags.DEFINE_enum("segmenter", "vit_h", ["vit_h", "vit_l", "vit_b"], "SAM-HQ's image encoder.")
flags.DEFINE_list("batches", ["16", "8", "4", "64"], "Of ours: tagger, detector, segmenter, boxes in a decode.")
flags.DEFINE_enum("precision", "float32", ["float32", "bfloat16"], "Of matrix products, on all sides.")
flags.DEFINE_string("device", "auto", "As in `Compute`.")
flags.DEFINE_bool("per_prompt", True, "Whether to run that side; it takes the longest.")
flags.DEFINE_bool("tiny", False, "Small networks and pictures; the times mean little.")

COCO_SIZES = (640, 480), (480, 640), (640, 427), (640, 480), (640, 426), (427, 640), (640, 480), (500, 375)
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.2}
STAGES = "tag", "detect", "segment"
STORAGE = ("float16", None), ("bfloat16", None), ("int8", None), ("float16", 100), ("int8", 100)  # type, rows kept


class Best:
  """A refiner that keeps the best tags and boxes of another, and the seconds that its parts took."""

  def __init__(self, tagger, detector, segmenter, device: torch.device):
    self._parts, self._device, self.rows = (tagger, detector, segmenter), device, 0
    self.tagger = self.detector = self.segmenter = self
    self.seconds = dict.fromkeys(STAGES, 0.0)

  def tag(self, pictures: Sequence[UprightPicture]) -> list[Tags]:
    found = self._timed("tag", self._parts[0].tag, pictures)
    return [Tags(tags.names[:FLAGS.tags], tags.scores[:FLAGS.tags]) for tags in found]

  def detect(self, pictures: Sequence[UprightPicture], tags: Sequence[Tags]) -> list[Detections]:
    found = self._timed("detect", self._parts[1].detect, pictures, tags)
    first = lambda values: values[:FLAGS.boxes]
    return [dataclasses.replace(some, tags=first(some.tags), boxes=first(some.boxes), scores=first(some.scores))
            for some in found]

  def segment(self, pictures: Sequence[UprightPicture], detections: Sequence[Detections]) -> list[Segments]:
    return self._timed("segment", self._parts[2].segment, pictures, detections)

  def _timed(self, stage: str, function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    if self._device.type == "cuda":
      torch.cuda.synchronize(self._device)
    self.seconds[stage] += time.perf_counter() - start
    return result


class PerPrompt:
  """A detector that is asked for one tag at a time."""

  def __init__(self, detector: GroundingDinoDetector):
    self._detector = detector

  def detect(self, pictures: Sequence[UprightPicture], tags: Sequence[Tags]) -> list[Detections]:
    return [self._of_picture(picture, found) for picture, found in zip(pictures, tags, strict=True)]

  def _of_picture(self, picture: UprightPicture, tags: Tags) -> Detections:
    asked = [Tags((name,), tags.scores[k:k + 1]) for k, name in enumerate(tags.names)] or [tags]
    passes = [self._detector.detect([picture], [one])[0] for one in asked]
    boxes, scores = (np.concatenate([getattr(found, name) for found in passes]) for name in ("boxes", "scores"))
    names, order = [name for found in passes for name in found.tags], np.argsort(-scores, kind="stable")
    return dataclasses.replace(passes[0], tags=tuple(names[k] for k in order), boxes=boxes[order], scores=scores[order])


def make_networks(compute: Compute) -> tuple[RamPlusTagger, GroundingDinoDetector, SamHQSegmenter]:
  """Random networks with the batches of ours."""
  sizes = random_refiner.tiny() if FLAGS.tiny else random_refiner.published(FLAGS.tagger, FLAGS.segmenter)
  torch.manual_seed(0)
  taggers, detectors, segmenters, boxes = map(int, FLAGS.batches)
  names = random_refiner.tag_names(sizes.ram_plus.tags)
  everything = np.zeros(len(names), np.float32)
  tagger = RamPlusTagger(random_refiner.ram_plus(sizes.ram_plus), names, everything, taggers, compute)
  settings = GroundingDino("random", shortest=sizes.shortest, longest=sizes.longest, batch=detectors)
  detector = GroundingDinoDetector(
      random_refiner.grounding_dino(sizes.grounding_dino), random_refiner.tokenizer(), settings, compute)
  sam = random_refiner.sam_hq(sizes.sam_hq)
  segmenter = SamHQSegmenter(sam.vision_encoder, MaskDecoder(sam), sam.config.vision_config.image_size,
                             SamHQ("random", batch=segmenters, box_batch=boxes), compute)
  return tagger, detector, segmenter


def set_thresholds(networks, picture: UprightPicture) -> None:
  """So that there are about twice as many boxes as are taken: all of 900 queries would burden the suppression."""
  tagger, detector, _ = networks
  (tags,) = tagger.tag([picture])
  detector.settings = dataclasses.replace(detector.settings, box_threshold=0.0, text_threshold=0.0)
  (found,) = detector.detect([picture], [Tags(tags.names[:FLAGS.tags], tags.scores[:FLAGS.tags])])
  threshold = float(found.scores[min(2 * FLAGS.boxes, len(found.scores) - 1)])
  detector.settings = dataclasses.replace(detector.settings, box_threshold=threshold, text_threshold=threshold)


def make_examples() -> list[SourceExample]:
  if FLAGS.images:
    files = sorted(path for path in pathlib.Path(FLAGS.images).iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    assert len(files) >= FLAGS.pictures, f"{FLAGS.images} has {len(files)} JPEG files"
    return [SourceExample(path.stem, (SourcePicture(path.read_bytes),)) for path in files[:FLAGS.pictures]]
  rng, examples = np.random.default_rng(0), []
  for k in range(FLAGS.pictures):
    noise = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8))
    data = to_jpeg(noise.resize(COCO_SIZES[k % len(COCO_SIZES)], Image.Resampling.BICUBIC))
    examples.append(SourceExample(str(k), (SourcePicture(io.BytesIO(data).getvalue),)))
  return examples


def run(refiner: Best, examples: Sequence[SourceExample], window: int) -> tuple[list[Record], dict]:
  """The records, and the figures of a side."""
  image, records = ImageSettings(max_side=160 if FLAGS.tiny else 640), []
  start, processor = time.perf_counter(), time.process_time()
  for first in range(0, len(examples), window):
    records += pipeline.refine(examples[first:first + window], refiner, image, "benchmark")
  seconds, processor = time.perf_counter() - start, time.process_time() - processor
  assert all(isinstance(record, Record) for record in records), "a picture cannot be read"
  figures = {"images_per_second": len(records) / seconds, "seconds_per_image": seconds / len(records),
             "cpu_seconds_per_image": processor / len(records)}
  figures |= {f"{stage}_seconds": refiner.seconds[stage] / len(records) for stage in STAGES}
  figures["other_seconds"] = figures["seconds_per_image"] - sum(refiner.seconds.values()) / len(records)
  return records, figures | {"boxes_per_image": sum(len(record.picture.tags) for record in records) / len(records)}


def greatest_difference(ours: Sequence[Record], theirs: Sequence[Record]) -> float:
  """Of boxes, scores and features; the sets of tags must be the same."""
  greatest = 0.0
  for left, right in zip(ours, theirs, strict=True):
    assert left.picture.tags == right.picture.tags, f"{left.id}: the two sides do not find the same objects"
    for name in ("boxes", "scores", "detection_features", "mask_features"):
      difference = np.abs(getattr(left.picture, name) - getattr(right.picture, name))
      greatest = max(greatest, float(difference.max(initial=0)))
  return greatest


def record_sizes(records: Sequence[Record]) -> dict[str, dict]:
  """Bytes per image of each way to store features, of the features and of the whole record, and shares of float32."""
  single = np.mean([sum(getattr(record.picture, name).nbytes for name in (
      "detection_features", "detection_boxes", "mask_features")) for record in records])
  sizes = {"float32": {"features": float(single)}}
  for dtype, top_k in STORAGE:
    schema = Schema(dtype, "0" * 12, top_k=top_k)
    sizes[dtype if top_k is None else f"{dtype}, best {top_k} rows"] = of_option = {
        "features": float(np.mean([schema.measure(record).feature_bytes for record in records])),
        "record": float(np.mean([len(schema.encode(record)) for record in records]))}
  sizes["float32"]["record"] = single + of_option["record"] - of_option["features"]  # the picture and texts, as in all
  for of_option in sizes.values():
    of_option |= {f"{name}_share": of_option[name] / sizes["float32"][name] for name in ("features", "record")}
  return sizes


def print_table(sides: dict[str, dict], sizes: dict[str, dict]) -> None:
  print(f"\n{'':24}" + "".join(f"{side:>14}" for side in sides))
  for name in next(iter(sides.values())):
    print(f"{name.replace('_', ' '):24}" + "".join(f"{figures[name]:14.3f}" for figures in sides.values()))
  print(f"\n{'bytes per image':24}{'features':>14}{'of float32':>14}{'record':>14}{'of float32':>14}")
  for option, of_option in sizes.items():
    print(f"{option:24}{of_option['features']:14,.0f}{of_option['features_share']:14.3f}"
          f"{of_option['record']:14,.0f}{of_option['record_share']:14.3f}")


def main(_):
  compute = Compute(FLAGS.device, FLAGS.precision)
  compute.finalize("--")
  networks = tagger, detector, segmenter = make_networks(compute)
  single = SamHQSegmenter(segmenter.encoder, segmenter.decoder, segmenter.prepare.side,
                          dataclasses.replace(segmenter.settings, batch=1, box_batch=1), compute)
  examples = make_examples()
  found = pipeline.read(examples[0], ImageSettings(max_side=640))
  assert isinstance(found, tuple), f"{examples[0].id} cannot be read"
  set_thresholds(networks, UprightPicture(found[0].image))

  models = NeuralModels(*networks)
  chains = {"ours": (Best(models.tagger, models.detector, models.segmenter, compute.torch_device), FLAGS.window),
            "per picture": (Best(tagger, detector, single, compute.torch_device), 1)}
  if FLAGS.per_prompt:
    chains["per prompt"] = Best(tagger, PerPrompt(detector), single, compute.torch_device), 1
  sides, records = {}, {}
  if compute.torch_device.type == "cuda":  # libraries choose their kernels at the first picture of each size
    for refiner, window in list(chains.values())[:2]:
      run(refiner, examples, window)
      refiner.seconds = dict.fromkeys(STAGES, 0.0)
  for side, (refiner, window) in chains.items():
    records[side], sides[side] = run(refiner, examples, window)
    print(json.dumps({side: sides[side]}), flush=True)
  difference = greatest_difference(records["ours"], records["per picture"])
  assert difference < TOLERANCE[FLAGS.precision], f"the sides differ by {difference}"

  sizes = record_sizes(records["ours"])
  print_table(sides, sizes)
  ratios = {side: sides["ours"]["images_per_second"] / figures["images_per_second"]
            for side, figures in sides.items() if side != "ours"}
  print("\n" + ", ".join(f"{ratio:.2f} times as fast as {side}" for side, ratio in ratios.items())
        + f"; greatest difference from per picture {difference:.1e}")
  name = torch.cuda.get_device_name(compute.torch_device) if compute.torch_device.type == "cuda" else "cpu"
  print(json.dumps({
      "device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "pictures": len(examples),
      "tags": FLAGS.tags, "boxes": FLAGS.boxes, "tagger": FLAGS.tagger, "segmenter": FLAGS.segmenter,
      "precision": FLAGS.precision, "tiny": FLAGS.tiny, "ratios": ratios, "difference": difference, "bytes": sizes,
      "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, **sides}))


if __name__ == "__main__":
  app.run(main)
