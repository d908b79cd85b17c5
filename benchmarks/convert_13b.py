"""How much memory and time `convert` needs for a language model of Vicuna-13B's shape, both ways; prints JSON last.

  python benchmarks/convert_13b.py --directory DIR [--layers 40]

Writes random bfloat16 weights in Hugging Face's layout, shard by shard, with a small image encoder and small
tokenizers; converts them with `from-hf`; removes them; exports what came out with `to-hf`, LoRA merged (its product is
zero at the start of a run, so the kernels stay as they were); and compares every tensor of the language model with what
was written at first, by SHA-256. Each conversion runs in a process of its own, whose peak resident memory (`getrusage`,
pages of mapped files included) is reported beside a bound: twice the largest tensor of the files plus 2 GB. A kernel's
stacked layers, 5.7 GB of 40, are never in memory. The directory, which is removed at the end, needs 52 GB for 40 layers.
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

from lyrics_jax.config import Config, DataConfig, LLMConfig, MQFormerConfig, ModelConfig, VisionConfig
from lyrics_jax.data.train_tokenizers import write_tokenizers
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
  config = Config(
      stage="instruct", output="unused", batch_size=8,
      model=ModelConfig(vision=VisionConfig(image_size=28, width=32, layers=1, heads=2, mlp_dim=32),
                        mq_former=MQFormerConfig(width=32, layers=2, heads=2, mlp_dim=32, vocab_size=1024),
                        llm=LLMConfig(layers=layers)),
      data=DataConfig(records="unused", mq_former_tokenizer=str(tokenizers / "mq_former"),
                      llm_tokenizer=str(tokenizers / "llm")))
  config.finalize()
  return config


# --- the steps, each in a process of its own; what they return is printed as JSON ---

def write(config: Config, directory: pathlib.Path) -> dict:
  """Writes the sources; the size of the language model's, and the digests of its tensors by name."""
  rng, llm = np.random.default_rng(0), config.model.llm
  # Drawn once: drawing takes longer than writing.
  pool = (rng.standard_normal(llm.width * llm.mlp_dim) * 0.02).astype(ml_dtypes.bfloat16)
  make = lambda *shape: np.roll(pool, int(rng.integers(len(pool))))[:int(np.prod(shape))].reshape(shape)
  written = write_language_model(config, directory / "llama", make)
  (directory / "clip").mkdir()
  save_file(image_encoder(config, make), directory / "clip" / "model.safetensors")
  write_tokenizers(["A picture of a cat, 0123456789."], str(directory / "tokenizers"))
  return written


def from_hf(config: Config, directory: pathlib.Path) -> dict:
  sources = {kind: str(directory / kind) for kind in ("clip", "llama")}
  return measured(lambda: convert(config, sources, str(directory / "converted")))


def to_hf(config: Config, directory: pathlib.Path) -> dict:
  return measured(lambda: export(str(directory / "converted"), str(directory / "exported")))


def digests(config: Config, directory: pathlib.Path) -> dict:
  """The digests of the exported language model's tensors, by LLaMA's own names."""
  tensors = read_tensors(epath.Path(directory / "exported"))
  return {name.removeprefix(LANGUAGE_PREFIX): digest(tensor.read()) for name, tensor in tensors.items()
          if name.startswith(LANGUAGE_PREFIX)}


STEPS = {"write": write, "from-hf": from_hf, "to-hf": to_hf, "digests": digests}


def measured(work: Callable[[], None]) -> dict[str, float]:
  """Seconds, and the peak of this process."""
  start = time.perf_counter()
  work()
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {"seconds": time.perf_counter() - start, "peak_rss_gb": peak}


def digest(tensor: np.ndarray) -> str:
  """Of dtype, shape and bytes."""
  return hashlib.sha256(f"{tensor.dtype}{tensor.shape}".encode() + np.ascontiguousarray(tensor).tobytes()).hexdigest()


def write_language_model(config: Config, llama: pathlib.Path, make: Callable[..., np.ndarray]) -> dict:
  """A shard per layer and one for the rest."""
  llm, total, weight_map, digest_of = config.model.llm, 0, {}, {}
  sizes = {"norm": llm.width, "width": llm.width, "mlp_dim": llm.mlp_dim}
  llama.mkdir(parents=True)
  words = lambda: make(llm.vocab_size // 4, llm.width).repeat(4, 0)
  rest = {"model.embed_tokens.weight": words(), "model.norm.weight": make(llm.width), "lm_head.weight": words()}
  for n in range(llm.layers + 1):
    tensors = rest if n == llm.layers else {
        f"model.layers.{n}.{name}.weight": make(*(sizes[size] for size in shape)) for name, shape in LAYER.items()}
    file = f"model-{n + 1:05}-of-{llm.layers + 1:05}.safetensors"
    save_file(tensors, llama / file)
    weight_map |= dict.fromkeys(tensors, file)
    digest_of |= {name: digest(tensor) for name, tensor in tensors.items()}
    total += sum(tensor.nbytes for tensor in tensors.values())
  (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return {"bytes": total, "digests": digest_of}


def image_encoder(config: Config, make: Callable[..., np.ndarray]) -> dict[str, np.ndarray]:
  """CLIP's, under its own names."""
  vision, part = config.model.vision, "vision_model"
  width = vision.width
  linear = lambda name, n, m: {f"{name}.weight": make(m, n), f"{name}.bias": make(m)}
  norm = lambda name: {f"{name}.{kind}": make(width) for kind in ("weight", "bias")}
  clip = norm(f"{part}.pre_layrnorm") | {
      f"{part}.embeddings.class_embedding": make(width),
      f"{part}.embeddings.position_embedding.weight": make(vision.tokens, width),
      f"{part}.embeddings.patch_embedding.weight": make(width, 3, vision.patch_size, vision.patch_size)}
  for n in range(vision.layers):
    layer = f"{part}.encoder.layers.{n}"
    clip |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
      clip |= linear(f"{layer}.self_attn.{name}", width, width)
    clip |= linear(f"{layer}.mlp.fc1", width, vision.mlp_dim) | linear(f"{layer}.mlp.fc2", vision.mlp_dim, width)
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
  llm = config.model.llm
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
