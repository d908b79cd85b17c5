"""Shows that networks of full size, their files, the exporter's commands and the trainer fit together.

  python benchmarks/export_full_size.py coco --split val2017 --pictures 16 --work full_size

Writes checkpoints with random weights (RAM++ Swin-B, Grounding-DINO-T, SAM-HQ ViT-B, about 2 GB) into the work folder,
exports COCO pictures with `configs/export_neural.py`, and takes a few steps of stage 1 on the records, all by the
commands that a person would type. Prints, as one JSON object on the last line, what the records hold, the times and
the export's greatest memory.
"""

import itertools
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from absl import app, flags

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import random_refiner  # noqa: E402
from refiner_export.common.images import open_upright  # noqa: E402
from refiner_export.records.reader import RecordDirectory  # noqa: E402
from refiner_export.refiners.base import Tags, UprightPicture  # noqa: E402
from refiner_export.refiners.compute import Compute  # noqa: E402
from refiner_export.refiners.grounding_dino.detector import GroundingDino  # noqa: E402
from refiner_export.refiners.ram_plus.tagger import RamPlus  # noqa: E402
from refiner_export.sources.coco import Coco  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_string("split", "val2017", "Pictures; annotations/captions_ and instances_SPLIT.json name them.")
flags.DEFINE_integer("pictures", 16, "How many to export.", lower_bound=1)
flags.DEFINE_integer("steps", 3, "Of stage 1.", lower_bound=1)
flags.DEFINE_integer("objects", 8, "About how many to find in a picture.", lower_bound=1)
flags.DEFINE_string("work", None, "Folder for checkpoints and records; a temporary one when left out.")

POSSIBLE_TAGS = 24  # the others are forbidden; a picture then has about half of these


def choose_thresholds(work: pathlib.Path, coco: Coco, sizes: random_refiner.Sizes) -> float:
  """Writes the tags' thresholds and returns the detector's, so that random networks find some things in most pictures.

  Each possible tag is in half of the first pictures, and the first picture with the surest boxes has `--objects` boxes.
  """
  pictures = []
  for example in itertools.islice(coco.examples(), 2):
    pictures.append(UprightPicture(open_upright(example.pictures[0].read(), example.id)))
  names = random_refiner.tag_names(sizes.ram_plus.tags)
  (work / "thresholds.txt").write_text("0\n" * len(names))
  files = (str(work / name) for name in ("ram_plus.pth", "tags.txt", "thresholds.txt"))
  tagger = RamPlus(*files, "swin_b").build(Compute())
  scores = [dict(zip(found.names, found.scores)) for found in tagger.tag(pictures)]
  thresholds = [f"{np.mean([of_picture[name] for of_picture in scores]):.8f}" for name in names[:POSSIBLE_TAGS]]
  thresholds += ["1"] * (len(names) - POSSIBLE_TAGS)
  (work / "thresholds.txt").write_text("\n".join(thresholds))
  del tagger

  settings = GroundingDino(str(work / "grounding_dino"), box_threshold=0.0, text_threshold=0.0)
  asked = Tags(tuple(names[:POSSIBLE_TAGS]), np.ones(POSSIBLE_TAGS, np.float32))
  found = settings.build(Compute()).detect(pictures, [asked] * len(pictures))
  return max(float(some.scores[FLAGS.objects]) for some in found if len(some.scores) > FLAGS.objects)


def command(*arguments: str) -> float:
  """Runs `python -m ...` and returns the seconds that it took."""
  print("$ python -m " + " ".join(arguments), flush=True)
  start = time.perf_counter()
  subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True)
  return time.perf_counter() - start


def run(coco: Coco, work: pathlib.Path) -> dict:
  torch.manual_seed(0)
  sizes = random_refiner.published("swin_b", "vit_b")
  random_refiner.save(sizes, work)
  threshold = choose_thresholds(work, coco, sizes)
  records, settings = work / "records", {
      "output": work / "records", "limit": FLAGS.pictures,
      **{f"source.{name}": getattr(coco, name) for name in ("images", "captions", "instances")},
      "refiner.tagger.checkpoint": work / "ram_plus.pth", "refiner.tagger.backbone": "swin_b",
      "refiner.tagger.tag_list": work / "tags.txt", "refiner.tagger.thresholds": work / "thresholds.txt",
      "refiner.detector.checkpoint": work / "grounding_dino", "refiner.detector.tokenizer": work / "grounding_dino",
      "refiner.detector.box_threshold": threshold, "refiner.detector.text_threshold": threshold,
      # On a CPU larger batches take more memory and no less time.
      "refiner.tagger.batch": 4, "refiner.detector.batch": 2, "refiner.segmenter.batch": 1,
      "refiner.segmenter.checkpoint": work / "sam_hq"}
  export_seconds = command("refiner_export", "--config", "configs/export_neural.py",
                           *(f"--config.{name}={value}" for name, value in settings.items()))
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
  directory = RecordDirectory(records)
  found = [directory[k] for k in range(len(directory))]
  command("lyrics_jax.data.train_tokenizers", "--records", str(records), "--output", str(work / "tokenizers"))
  train_seconds = command(
      "lyrics_jax.train", "--config", "configs/quickstart_align.py", f"--config.output={work / 'align'}",
      f"--config.steps={FLAGS.steps}", "--config.log_every=1", "--config.batch_size=8",
      f"--config.data.records={records}",
      f"--config.data.fingerprint={directory.manifest.fingerprint}",
      f"--config.data.mq_former_tokenizer={work / 'tokenizers' / 'mq_former'}",
      f"--config.data.llm_tokenizer={work / 'tokenizers' / 'llm'}")
  *_, last = (work / "align" / "metrics.jsonl").read_text().splitlines()
  return {
      "records": len(found), "skipped": directory.manifest.skipped, "refiner": directory.manifest.fingerprint,
      "detection_features": sorted({record.picture.detection_features.shape for record in found}),
      "boxes_per_image": [len(record.picture.tags) for record in found],
      "bytes_per_record": sum(shard.bytes for shard in directory.manifest.shards) // len(found),
      "export_seconds": export_seconds, "export_peak_gb": peak, "train_seconds": train_seconds,
      "last_step": json.loads(last)}


def main(arguments):
  assert len(arguments) == 2, "name one COCO directory"
  coco = pathlib.Path(arguments[1]).resolve()
  annotations = [str(coco / "annotations" / f"{kind}_{FLAGS.split}.json") for kind in ("captions", "instances")]
  source = Coco(str(coco / FLAGS.split), *annotations)
  with tempfile.TemporaryDirectory() as temporary:
    work = pathlib.Path(FLAGS.work or temporary).resolve()
    work.mkdir(parents=True, exist_ok=True)
    print(json.dumps(run(source, work)))


if __name__ == "__main__":
  app.run(main)
