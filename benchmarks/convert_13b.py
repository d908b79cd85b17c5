"""How much memory and time `convert` needs for a language model of Vicuna-13B's shape, both ways; prints JSON last.

  python benchmarks/convert_13b.py --directory DIR [--layers 40]

Writes random bfloat16 weights in Hugging Face's layout, shard by shard, with a small image encoder and small
tokenizers; converts them with `from-hf`; removes them; exports what came out with `to-hf`, LoRA merged; and compares
every tensor of the language model with what was written at first, by SHA-256. (LoRA's product is zero at the start of
a run, so the kernels stay as they were.) Each conversion runs in a process of its own. Its peak resident memory
(`getrusage`, pages of mapped files included) is reported beside a bound: twice the largest tensor of the files plus 2
GB. A kernel's stacked layers, 5.7 GB for 40 layers, are never in memory. The directory, which is removed at the end,
needs 52 GB for 40 layers.
"""

import argparse
import hashlib
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from lyrics_jax.config import Config
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.data.train_tokenizers import write_tokenizers
from lyrics_jax.models.connectors.mq_former import MQFormerSettings
from lyrics_jax.models.connectors.q_former import QFormerSettings
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.models.vision.vit import ViTSettings
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.objectives.next_token import NextToken
from lyrics_jax.stage import Stage
from lyrics_jax.weights.from_hf import convert
from lyrics_jax.weights.lyrics_names import LANGUAGE_PREFIX
from lyrics_jax.weights.to_hf import export
from refiner_export.common.weight_files import read_tensors

LAYER = {
    "input_layernorm": ("norm",), "post_attention_layernorm": ("norm",),
    "self_attn.q_proj": ("width", "width"), "self_attn.k_proj": ("width", "width"),
    "self_attn.v_proj": ("width", "width"), "self_attn.o_proj": ("width", "width"),
    "mlp.gate_proj": ("mlp_dim", "width"), "mlp.up_proj": ("mlp_dim", "width"), "mlp.down_proj": ("width", "mlp_dim")}


def make_config(layers: int, directory: pathlib.Path) -> Config:
  tokenizers = directory / "tokenizers"
  former = MQFormerSettings(width=32, layers=2, heads=2, mlp_dim=32, vocab_size=1024)
  model = VLMSettings(vision=ViTSettings(image_size=28, width=32, layers=1, heads=2, mlp_dim=32),
                      connector=QFormerSettings(former=former), llm=LlamaSettings(layers=layers))
  config = Config(
      stage=Stage(model=model, objectives=(NextToken(),), train=("connector/*", "llm/*/lora_*")),
      output="unused", batch_size=8,
      data=DataSettings(records="unused", rows=Conversations(), mq_former_tokenizer=str(tokenizers / "mq_former"),
                        llm_tokenizer=str(tokenizers / "llm")))
  config.finalize()
  return config


# --- the steps, each in a process of its own; what they return is printed as JSON ---

def write(config: Config, directory: pathlib.Path) -> dict:
  """Writes the published files. Returns the size of the language model's, and the digests of its tensors by name."""
  rng, llm = np.random.default_rng(0), config.stage.model.llm
  # Drawn once: drawing takes longer than writing.
  pool = (rng.standard_normal(llm.width * llm.mlp_dim) * 0.02).astype(ml_dtypes.bfloat16)

  def make(*shape: int) -> np.ndarray:
    return np.roll(pool, int(rng.integers(len(pool))))[:int(np.prod(shape))].reshape(shape)

  written = write_language_model(config, directory / "llama", make)
  (directory / "clip").mkdir()
  save_file(image_encoder(config, make), directory / "clip" / "model.safetensors")
  write_tokenizers(["A picture of a cat, 0123456789."], str(directory / "tokenizers"))
  return written


def from_hf(config: Config, directory: pathlib.Path) -> dict:
  paths = {"clip": str(directory / "clip"), "llama": str(directory / "llama")}
  return measured(convert, config, paths, str(directory / "converted"))


def to_hf(config: Config, directory: pathlib.Path) -> dict:
  return measured(export, str(directory / "converted"), str(directory / "exported"))


def digests(config: Config, directory: pathlib.Path) -> dict:
  """The digests of the exported language model's tensors, by LLaMA's own names."""
  found = {}
  for name, tensor in read_tensors(epath.Path(directory / "exported")).items():
    if name.startswith(LANGUAGE_PREFIX):
      found[name.removeprefix(LANGUAGE_PREFIX)] = digest(tensor.read())
  return found


STEPS = {"write": write, "from-hf": from_hf, "to-hf": to_hf, "digests": digests}


def measured(work: Callable[..., None], *arguments) -> dict[str, float]:
  """Seconds, and the peak of this process."""
  start = time.perf_counter()
  work(*arguments)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {"seconds": time.perf_counter() - start, "peak_rss_gb": peak}


def digest(tensor: np.ndarray) -> str:
  """SHA-256 of dtype, shape and bytes."""
  return hashlib.sha256(f"{tensor.dtype}{tensor.shape}".encode() + np.ascontiguousarray(tensor).tobytes()).hexdigest()


def write_language_model(config: Config, llama: pathlib.Path, make: Callable[..., np.ndarray]) -> dict:
  """A shard per layer and one for the rest."""
  llm, total, weight_map, digest_of = config.stage.model.llm, 0, {}, {}
  sizes = {"norm": llm.width, "width": llm.width, "mlp_dim": llm.mlp_dim}
  llama.mkdir(parents=True)
  for n in range(llm.layers + 1):
    tensors = {}
    if n == llm.layers:
      tensors["model.norm.weight"] = make(llm.width)
      for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = make(llm.vocab_size // 4, llm.width).repeat(4, 0)
    else:
      for name, shape in LAYER.items():
        tensors[f"model.layers.{n}.{name}.weight"] = make(*map(sizes.get, shape))
    file = f"model-{n + 1:05}-of-{llm.layers + 1:05}.safetensors"
    save_file(tensors, llama / file)
    weight_map |= dict.fromkeys(tensors, file)
    for name, tensor in tensors.items():
      digest_of[name] = digest(tensor)
      total += tensor.nbytes
  (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return {"bytes": total, "digests": digest_of}


def image_encoder(config: Config, make: Callable[..., np.ndarray]) -> dict[str, np.ndarray]:
  """CLIP's, under its own names."""
  vision, prefix = config.stage.model.vision, "vision_model"
  width = vision.width
  clip = {f"{prefix}.embeddings.class_embedding": make(width),
          f"{prefix}.embeddings.position_embedding.weight": make(vision.tokens, width),
          f"{prefix}.embeddings.patch_embedding.weight": make(width, 3, vision.patch_size, vision.patch_size)}
  shapes = {f"{prefix}.pre_layrnorm": (width,)}
  for n in range(vision.layers):
    layer = f"{prefix}.encoder.layers.{n}"
    for name in ("layer_norm1", "layer_norm2"):
      shapes[f"{layer}.{name}"] = (width,)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
      shapes[f"{layer}.self_attn.{name}"] = (width, width)
    shapes |= {f"{layer}.mlp.fc1": (vision.mlp_dim, width), f"{layer}.mlp.fc2": (width, vision.mlp_dim)}
  for name, shape in shapes.items():
    clip |= {f"{name}.weight": make(*shape), f"{name}.bias": make(shape[0])}
  return clip


# --- all of it ---

def run(step: str, options: argparse.Namespace) -> dict:
  """What the step printed last.

  This process stays small, because a peak is handed down to the processes that it starts.
  """
  done = subprocess.run([sys.executable, __file__, f"--directory={options.directory}", f"--layers={options.layers}",
                         f"--step={step}"], check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def report(figures: dict, output: pathlib.Path, bound: float) -> dict:
  """A conversion's figures, with the size of what it wrote."""
  written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
  within = figures["peak_rss_gb"] < bound
  return rounded(figures | {"bound_gb": bound, "written_gb": written}) | {"within_bound": within}


def rounded(figures: dict) -> dict:
  return {name: round(value / 1e9, 2) if name.endswith("_gb") else round(value, 1) for name, value in figures.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--directory", required=True, help="a directory that does not exist yet")
  parser.add_argument("--layers", type=int, default=40, help="of the language model; Vicuna-13B has 40")
  parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
  options = parser.parse_args()
  directory = pathlib.Path(options.directory).absolute()
  config = make_config(options.layers, directory)
  if options.step:
    print(json.dumps(STEPS[options.step](config, directory)))
    return
  llm = config.stage.model.llm
  stacked = 2 * llm.layers * llm.width * llm.mlp_dim
  single = 2 * max(llm.width * llm.mlp_dim, llm.vocab_size * llm.width)
  bound = 2 * single + 2e9
  directory.mkdir(parents=True)
  try:
    source = run("write", options)
    inward = report(run("from-hf", options), directory / "converted", bound)
    for kind in ("clip", "llama"):  # the disk need not hold the model three times
      shutil.rmtree(directory / kind)
    outward = report(run("to-hf", options), directory / "exported", bound)
    exported = run("digests", options)
  finally:
    shutil.rmtree(directory)
  identical = sum(exported.get(name) == expected for name, expected in source["digests"].items())
  sizes = rounded({"source_gb": source["bytes"], "largest_parameter_gb": stacked, "largest_tensor_gb": single})
  print(json.dumps({"layers": options.layers, **sizes, "from_hf": inward, "to_hf": outward,
                    "tensors": len(source["digests"]), "exported_tensors": len(exported),
                    "identical_tensors": identical}))


if __name__ == "__main__":
  main()
