"""The whole configuration of a run, as typed dataclasses that are checked before anything else happens.

A file in `configs/` returns one `Config`. Defaults are the published settings of the paper (arXiv 2312.05278), section
by section; `--config.part.field=value` overrides any of them.
"""

import dataclasses
from dataclasses import field
from typing import Literal

from refiner_export.common.settings import Settings, require

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "attention", "full"]  # from most memory to most work, see `models/layers.py`
Attention = Literal["auto", "xla", "splash", "cudnn"]
ItcPooling = Literal["mean", "max"]


@dataclasses.dataclass(unsafe_hash=True)
class VisionConfig(Settings):
  """The frozen image encoder. The paper's is CLIP ViT-L/14 at 224, the published weights' is BLIP-2's ViT-g (`vit_g`).

  `kind` "clip": norm before the first block, quick GELU; "eva" (EVA-CLIP, Fang et al. 2022): no such norm, exact GELU, and
  a bias on patches.
  """
  kind: Literal["clip", "eva"] = "clip"
  image_size: int = 224
  patch_size: int = 14
  width: int = 1024
  layers: int = 24
  heads: int = 16
  mlp_dim: int = 4096
  norm_eps: float = 1e-5

  @classmethod
  def vit_g(cls) -> "VisionConfig":
    """BLIP-2's ViT-g/14: EVA-CLIP without its last block."""
    return cls(kind="eva", width=1408, layers=39, mlp_dim=6144, norm_eps=1e-6)

  @property
  def tokens(self) -> int:
    return (self.image_size // self.patch_size) ** 2 + 1

  def check(self, path):
    _at_least(self, path, 1, "image_size", "patch_size", "width", "layers", "heads", "mlp_dim")
    require(self.image_size % self.patch_size == 0,
            f"{path}.image_size={self.image_size} is not a multiple of {path}.patch_size={self.patch_size}")
    _check_heads(path, self.width, self.heads)


@dataclasses.dataclass(unsafe_hash=True)
class RefinerConfig(Settings):
  """What of the visual refiner's output enters the model (token counts are upper bounds; the rest is padded and masked)."""
  detection_rows: int = 900
  mask_rows: int = 64
  feature_width: int = 256  # a token is a feature and its box: 256 + 4 wide

  def check(self, path):
    _at_least(self, path, 0, "detection_rows", "mask_rows")
    _at_least(self, path, 1, "feature_width")


@dataclasses.dataclass(unsafe_hash=True)
class MQFormerConfig(Settings):
  """Multi-scale Querying Transformer (paper section 3.2), BERT-base size."""
  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp_dim: int = 3072
  visual_queries: int = 32
  grounding_queries: int = 32
  cross_attention_frequency: int = 2  # BLIP-2: layers 0, 2, 4, ...; 1 = every layer
  activation: Literal["relu", "gelu"] = "relu"  # gelu when initialised from BLIP-2
  vocab_size: int = 30592  # rows of the word embedding; at least the tokenizer's size
  max_positions: int = 512
  restart_positions: bool = True  # the caption's positions start at 0 again after the spatial representation
  dropout: float = 0.1
  norm_eps: float = 1e-12
  itc_width: int = 256

  def check(self, path):
    _at_least(self, path, 1, "width", "layers", "heads", "mlp_dim", "visual_queries", "cross_attention_frequency",
              "vocab_size", "max_positions", "itc_width")
    _at_least(self, path, 0, "grounding_queries")
    _below_one(self, path, "dropout")
    _check_heads(path, self.width, self.heads)
    require(self.layers % self.cross_attention_frequency == 0,
            f"{path}.layers={self.layers} is not a multiple of {path}.cross_attention_frequency={self.cross_attention_frequency}")


@dataclasses.dataclass(unsafe_hash=True)
class LoRAConfig(Settings):
  """Low-rank adapters, scaled by alpha / rank; B starts at zero."""
  rank: int = 16
  alpha: float = 32.0
  dropout: float = 0.05
  targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ("q", "v")

  def check(self, path):
    require(self.rank > 0, f"{path}.rank={self.rank} must be positive")
    _below_one(self, path, "dropout")
    require(bool(self.targets), f"{path}.targets is empty: name a projection, or set model.llm.train=frozen")


@dataclasses.dataclass(unsafe_hash=True)
class LLMConfig(Settings):
  """LLaMA; the published language model is Vicuna-13B v1.1."""
  vocab_size: int = 32000
  width: int = 5120
  layers: int = 40
  heads: int = 40
  kv_heads: int = 40
  mlp_dim: int = 13824
  rope_theta: float = 10000.0
  norm_eps: float = 1e-6
  max_positions: int = 2048
  train: Literal["full", "lora", "frozen"] = "lora"
  lora: LoRAConfig = field(default_factory=LoRAConfig)

  def check(self, path):
    _at_least(self, path, 1, "vocab_size", "width", "layers", "heads", "kv_heads", "mlp_dim", "max_positions")
    _check_heads(path, self.width, self.heads)
    require(self.heads % self.kv_heads == 0, f"{path}.heads={self.heads} is not a multiple of {path}.kv_heads={self.kv_heads}")


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig(Settings):
  vision: VisionConfig = field(default_factory=VisionConfig)
  refiner: RefinerConfig = field(default_factory=RefinerConfig)
  mq_former: MQFormerConfig = field(default_factory=MQFormerConfig)
  llm: LLMConfig = field(default_factory=LLMConfig)
  use_refiner: bool = True  # false feeds a blank refiner: no local tokens, no spatial representation (paper table 6)
  dtype: Dtype = "bfloat16"  # of the computation; trained parameters, softmax and losses are float32
  # In which frozen parameters are stored. int8: the kernels of the transformer blocks, with a scale per output channel;
  # the rest is in bfloat16.
  frozen_dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
  remat: Remat = "none"
  attention: Attention = "auto"  # the kernel of the LLM's self-attention, see `models/attention.py`


@dataclasses.dataclass(unsafe_hash=True)
class AlignConfig(Settings):
  """Stage 1, representation alignment: L = L_itc + L_itm + L_icg + L_msp (paper section 3.3)."""
  label_smoothing: float = 0.1  # on ITC, ICG and MSP
  temperature: float = 0.07  # initial; learnt
  itc_pooling: ItcPooling = "mean"  # a picture is its pooled queries (paper), or its most similar query (BLIP-2)
  itm_negatives: Literal["global", "local"] = "global"  # drawn from the global batch, or from the device's own pairs
  mask_probability: float = 0.15  # of masking a whole object in MSP
  retrieval_records: str = ""  # held-out directory of records to measure retrieval on while training; empty = none
  retrieval_every: int = 10_000  # steps between two such measurements
  retrieval_rerank: int = 16  # how many of the best by ITC are ranked again by ITM; 0 = none

  def check(self, path):
    _below_one(self, path, "label_smoothing")
    require(self.temperature > 0, f"{path}.temperature={self.temperature} must be positive")
    require(0 <= self.mask_probability <= 1, f"{path}.mask_probability={self.mask_probability} must lie in [0, 1]")
    require(self.retrieval_every > 0, f"{path}.retrieval_every={self.retrieval_every} must be positive")
    require(self.retrieval_rerank >= 0, f"{path}.retrieval_rerank={self.retrieval_rerank} must be 0 or more")


@dataclasses.dataclass(unsafe_hash=True)
class InstructConfig(Settings):
  """Stage 2, instruction fine-tuning (paper section 3.4)."""
  instruction_aware: bool = True  # the instruction also enters the MQ-Former as text
  spatial_to_mq_former: bool = True
  spatial_to_llm: bool = False  # as many as there is room for; those that the question names come first
  loss_chunk: int = 256  # tokens of each conversation whose logits are in memory at a time
  system_message: str = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives "
                         "helpful, detailed, and polite answers to the user's questions.")

  def check(self, path):
    _at_least(self, path, 1, "loss_chunk")


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig(Settings):
  """Where the records are and how they become batches. Lengths are in tokens."""
  records: str = ""
  fingerprint: str = ""  # refuse records of another refiner; empty accepts what the manifest says
  mq_former_tokenizer: str = ""  # directory of a BERT-style WordPiece tokenizer
  llm_tokenizer: str = ""  # directory of a LLaMA-style tokenizer; stage 2 only
  spatial_length: int = 384
  caption_length: int = 96  # caption in stage 1, instruction in stage 2
  llm_length: int = 512  # conversation of stage 2, the 64 image positions included
  buckets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # shares that batches are cut to, see `data/buckets.py`
  coordinates: Literal["decimal", "integer"] = "decimal"  # 0.125 or 125 of 1000
  crop_scale: tuple[float, float] = (0.5, 1.0)  # share of the area kept by the random resized crop; (1, 1) = no crop
  flip: bool = True
  shuffle: bool = True
  workers: int = 2  # reading threads per host

  def check(self, path):
    _at_least(self, path, 2, "spatial_length", "caption_length", "llm_length")
    _at_least(self, path, 0, "workers")
    low, high = self.crop_scale
    require(0 < low <= high <= 1, f"{path}.crop_scale={self.crop_scale} must satisfy 0 < low <= high <= 1")
    require(bool(self.buckets) and self.buckets[-1] == 1 and list(self.buckets) == sorted(set(self.buckets)) and self.buckets[0] > 0,
            f"{path}.buckets={self.buckets} must be ascending shares in (0, 1] that end with 1.0")


@dataclasses.dataclass(unsafe_hash=True)
class OptimizerConfig(Settings):
  """AdamW with linear warm-up and cosine decay (paper section 4.1)."""
  peak_lr: float = 1e-4
  final_lr: float = 0.0
  warmup_fraction: float = 0.15
  weight_decay: float = 0.05
  beta1: float = 0.9
  beta2: float = 0.98
  clip_norm: float = 1.0
  accumulate_steps: int = 1  # microbatches per update

  def check(self, path):
    require(self.peak_lr > 0, f"{path}.peak_lr={self.peak_lr} must be positive")
    require(0 <= self.warmup_fraction < 1, f"{path}.warmup_fraction={self.warmup_fraction} must lie in [0, 1)")
    require(self.clip_norm > 0, f"{path}.clip_norm={self.clip_norm} must be positive")
    require(self.accumulate_steps >= 1, f"{path}.accumulate_steps={self.accumulate_steps} must be at least 1")


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig(Settings):
  """Devices per mesh axis; -1 on one axis takes what the others leave."""
  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  slices: int = 1  # TPU slices joined by the data-center network, which only the data axis crosses

  def check(self, path):
    sizes = (self.data, self.fsdp, self.tensor)
    require(sizes.count(-1) <= 1 and all(s == -1 or s > 0 for s in sizes),
            f"{path}={sizes}: each axis is a positive count, at most one is -1")
    _at_least(self, path, 1, "slices")
    require(self.data == -1 or self.data % self.slices == 0, f"{path}.data={self.data} is not a multiple of {path}.slices={self.slices}")


@dataclasses.dataclass(unsafe_hash=True)
class Config(Settings):
  """One run of `python -m lyrics_jax.train`."""
  stage: Literal["align", "instruct"] = "align"
  output: str = ""  # directory of checkpoints, metrics and the saved configuration
  # What this run starts from: the output directory of an earlier run, or BLIP-2's weights: LAVIS' .pth, a .safetensors file
  # or a Hugging Face directory.
  init_from: str = ""
  seed: int = 0
  steps: int = 800_000
  batch_size: int = 512  # global, over all hosts and microbatches
  log_every: int = 100
  checkpoint_every: int = 1000
  keep_checkpoints: int = 2
  model: ModelConfig = field(default_factory=ModelConfig)
  align: AlignConfig = field(default_factory=AlignConfig)
  instruct: InstructConfig = field(default_factory=InstructConfig)
  data: DataConfig = field(default_factory=DataConfig)
  optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)

  def check(self, path):
    require(bool(self.output), f"{path}.output is empty: name a directory for checkpoints")
    require(bool(self.data.records), f"{path}.data.records is empty: name a directory that refiner_export wrote")
    require(bool(self.data.mq_former_tokenizer), f"{path}.data.mq_former_tokenizer is empty: name a tokenizer directory")
    _at_least(self, path, 1, "steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints")
    require(self.batch_size % self.optimizer.accumulate_steps == 0,
            f"{path}.batch_size={self.batch_size} is not a multiple of {path}.optimizer.accumulate_steps")
    text = self.data.spatial_length + self.data.caption_length
    positions = self.model.mq_former.max_positions
    longest = max(self.data.spatial_length, self.data.caption_length) if self.model.mq_former.restart_positions else text
    require(longest <= positions, f"{path}.data.spatial_length and caption_length need {longest} positions, "
                                  f"{path}.model.mq_former.max_positions={positions}")
    if self.stage == "align":
      require(self.batch_size // self.optimizer.accumulate_steps >= 2,
              f"{path}.batch_size={self.batch_size}: contrastive learning needs at least 2 pairs per microbatch")
      require(not self.align.retrieval_records or self.align.retrieval_every % self.log_every == 0,
              f"{path}.align.retrieval_every={self.align.retrieval_every} is not a multiple of {path}.log_every={self.log_every}: "
              "retrieval is written with the metrics of its step")
    else:
      require(bool(self.data.llm_tokenizer), f"{path}.data.llm_tokenizer is empty: stage 2 needs a LLaMA-style tokenizer directory")
      queries = self.model.mq_former.visual_queries + self.model.mq_former.grounding_queries
      require(queries < self.data.llm_length <= self.model.llm.max_positions,
              f"{path}.data.llm_length={self.data.llm_length} must exceed the {queries} image positions and be at most "
              f"{path}.model.llm.max_positions={self.model.llm.max_positions}")


def _at_least(settings: Settings, path: str, least: int, *names: str) -> None:
  for name in names:
    require(getattr(settings, name) >= least, f"{path}.{name}={getattr(settings, name)} must be at least {least}")


def _below_one(settings: Settings, path: str, *names: str) -> None:
  for name in names:
    require(0 <= getattr(settings, name) < 1, f"{path}.{name}={getattr(settings, name)} must lie in [0, 1)")


def _check_heads(path: str, width: int, heads: int) -> None:
  require(width % heads == 0, f"{path}.width={width} is not a multiple of {path}.heads={heads}")
