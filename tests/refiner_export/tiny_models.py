"""Models of the neural refiner at a size for tests, with random weights, and their checkpoints on disk."""

import pathlib

import torch
from transformers import BertConfig, BertTokenizer, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

GROUNDING_DINO_WORDS = (
    "object", "cat", "dog", "red", "blue", "car", "tree", "house", "per", "##son", "##s", "st", "bernard")
TINY_QUERIES, TINY_BUDGET = 30, 16


def tiny_grounding_dino(
    directory: pathlib.Path, queries: int = TINY_QUERIES, budget: int = TINY_BUDGET,
) -> pathlib.Path:
  """Saves a Grounding-DINO of one to three layers and its tokenizer. `budget` is the number of tokens in a caption."""
  config = GroundingDinoConfig(
      backbone_config=SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                                 image_size=64, out_indices=[2, 3, 4]).to_dict(),
      text_config=BertConfig(vocab_size=1060, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=64).to_dict(),
      num_queries=queries, max_text_len=budget, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=64,
      decoder_ffn_dim=64, d_model=256)  # records hold features of this width
  model = GroundingDinoForObjectDetection(config)
  randomise(model, seed=0)
  with torch.no_grad():
    for layer in model.model.encoder.layers:  # otherwise every query is sure of every token
      layer.text_enhancer_layer.layer_norm_after.weight *= 0.1
    model.model.encoder_output_bbox_embed.layers[-1].weight *= 8  # so that some boxes touch the border
  model.save_pretrained(directory)
  tiny_tokenizer().save_pretrained(directory)
  return directory


def tiny_tokenizer() -> BertTokenizer:
  """A tokenizer of few words. The special tokens have the numbers that they have in bert-base-uncased."""
  placed = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
  placed |= dict(enumerate(GROUNDING_DINO_WORDS, start=1030))
  return BertTokenizer(vocab={placed.get(number, f"[unused{number}]"): number for number in range(max(placed) + 1)})


def randomise(model: torch.nn.Module, seed: int) -> None:
  """Fills the parameters with random values. With the values of a new model, boxes and attention hardly change."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if "norm" in name.lower() and name.endswith("weight"):
        parameter.copy_(1 + 0.1 * noise)
      elif parameter.dim() <= 1:
        parameter.copy_(0.1 * noise)
      else:
        parameter.copy_(noise / parameter[0].numel() ** 0.5)
