"""The paper's refiner over COCO: RAM++ (Swin-L), Grounding-DINO-T and SAM-HQ (ViT-H), with published thresholds.

Put the files where the fields below say, or say where they are: `--config.refiner.tagger.checkpoint=...`.
"""

from refiner_export.export.config import ExportConfig, ImageSettings
from refiner_export.refiners.grounding_dino.detector import GroundingDino
from refiner_export.refiners.neural import NeuralRefiner
from refiner_export.refiners.ram_plus.tagger import RamPlus
from refiner_export.refiners.sam_hq.segmenter import SamHQ
from refiner_export.sources.coco import Coco


def get_config() -> ExportConfig:
  return ExportConfig(
      output="runs/coco/records",
      source=Coco(images="data/coco/train2017", captions="data/coco/annotations/captions_train2017.json",
                  instances="data/coco/annotations/instances_train2017.json"),
      refiner=NeuralRefiner(
          tagger=RamPlus(checkpoint="checkpoints/ram_plus_swin_large_14m.pth",
                         tag_list="checkpoints/ram_tag_list.txt",
                         thresholds="checkpoints/ram_tag_list_threshold.txt"),
          detector=GroundingDino(checkpoint="checkpoints/groundingdino_swint_ogc.pth",
                                 tokenizer="checkpoints/bert-base-uncased"),
          segmenter=SamHQ(checkpoint="checkpoints/sam_hq_vit_h.pth")),
      image=ImageSettings(max_side=640),  # as large as COCO's are; the networks see what is stored
      batch=128)
