"""The refiner's three networks at published or small sizes with random weights, in memory or as their checkpoints.

What random networks say means nothing; it takes them as long as trained ones.
"""

import dataclasses
import pathlib

import torch
from transformers import BertConfig, BertTokenizer, GroundingDinoConfig, SamHQConfig, SamHQModel, SwinConfig

from refiner_export.refiners.ram_plus import swin
from refiner_export.refiners.grounding_dino.model import GroundingDinoModel
from refiner_export.refiners.ram_plus.model import RAM_PLUS_SWIN_B, RAM_PLUS_SWIN_L, RamPlusConfig, RamPlusModel

_WORDS = 1000  # of two of which each tag is made, as real tags are of one to three word pieces
_FIRST_WORD = 2000
_SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}

_VIT = {"vit_b": (768, 12, 12, [2, 5, 8, 11]), "vit_l": (1024, 24, 16, [5, 11, 17, 23]),
        "vit_h": (1280, 32, 16, [7, 15, 23, 31])}  # width, layers, heads, layers of global attention


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the three networks; `shortest` and `longest` are sides of what the detector sees, in pixels."""
  ram_plus: RamPlusConfig
  grounding_dino: GroundingDinoConfig
  sam_hq: SamHQConfig
  shortest: int = 800
  longest: int = 1333


def published(tagger: str, segmenter: str) -> Sizes:
  """RAM++ with `swin_l` or `swin_b`, Grounding-DINO-T, SAM-HQ with `vit_h`, `vit_l` or `vit_b`."""
  width, layers, heads, attend_globally = _VIT[segmenter]
  return Sizes({"swin_l": RAM_PLUS_SWIN_L, "swin_b": RAM_PLUS_SWIN_B}[tagger], GroundingDinoConfig(), SamHQConfig(
      vision_config={"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
                     "global_attn_indexes": attend_globally}, mask_decoder_config={"vit_dim": width}))


def tiny() -> Sizes:
  """Networks of a few layers that show that everything runs, in seconds."""
  size = {"image_size": 128}
  return Sizes(
      RamPlusConfig(swin.SwinConfig(8, (1, 2, 2), (1, 2, 1), image_size=64, window=4), tags=200, descriptions=5),
      GroundingDinoConfig(
          backbone_config=SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                                     image_size=64, out_indices=[2, 3, 4]).to_dict(),
          text_config=BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=64).to_dict(),
          num_queries=100, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64),
      SamHQConfig(vision_config=size | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                                        "window_size": 3, "global_attn_indexes": [1]},
                  prompt_encoder_config=size, mask_decoder_config={"vit_dim": 32}), shortest=96, longest=160)


def ram_plus(config: RamPlusConfig) -> RamPlusModel:
  model = RamPlusModel(config)
  with torch.no_grad():
    model.label_embed.normal_()
  return model


def grounding_dino(config: GroundingDinoConfig) -> GroundingDinoModel:
  model = GroundingDinoModel(config)
  with torch.no_grad():  # else each query is sure of each token
    model.model.encoder.layers[-1].text_enhancer_layer.layer_norm_after.weight.mul_(0.1)
  return model


def sam_hq(config: SamHQConfig) -> SamHQModel:
  return SamHQModel(config)


def tag_names(count: int) -> list[str]:
  return [f"{_word(k % _WORDS)} {_word(k * 7 // _WORDS)}" for k in range(count)]


def tokenizer() -> BertTokenizer:
  """With the numbers that bert-base-uncased gives to the tokens which the model knows by number."""
  words = {_FIRST_WORD + k: _word(k) for k in range(_WORDS)}
  named = _SPECIAL | words
  return BertTokenizer(vocab={named.get(k, f"[unused{k}]"): k for k in range(max(named) + 1)})


def _word(k: int) -> str:
  return "".join(chr(ord("a") + int(digit)) for digit in f"{k:04d}")


def save(sizes: Sizes, folder: pathlib.Path) -> None:
  """Writes `ram_plus.pth`, `tags.txt` and the directories `grounding_dino` and `sam_hq`, as the refiner reads them."""
  torch.save({"model": ram_plus(sizes.ram_plus).state_dict()}, folder / "ram_plus.pth")
  (folder / "tags.txt").write_text("".join(f"{name}\n" for name in tag_names(sizes.ram_plus.tags)))
  grounding_dino(sizes.grounding_dino).save_pretrained(folder / "grounding_dino")
  tokenizer().save_pretrained(folder / "grounding_dino")
  sam_hq(sizes.sam_hq).save_pretrained(folder / "sam_hq")
