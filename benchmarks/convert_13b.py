"""How much memory and time `convert from-hf` needs for a language model of Vicuna-13B's shape; prints JSON last.

  python benchmarks/convert_13b.py --directory DIR [--layers 40]

Writes random bfloat16 weights in Hugging Face's layout, shard by shard, and a small image encoder; converts them in a
process of its own; and reports that process's peak resident memory (`getrusage`, pages of mapped files included) beside
the bound: twice the largest parameter, the layers of one kernel stacked, plus 2 GB. The directory, which is removed at the
end, needs 52 GB for 40 layers.
"""

import argparse
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lyrics_jax.config import Config, DataConfig, LLMConfig, MQFormerConfig, ModelConfig, VisionConfig

LAYER = {"input_layernorm": ("norm",), "self_attn.q_proj": ("width", "width"), "self_attn.k_proj": ("width", "width"),
         "self_attn.v_proj": ("width", "width"), "self_attn.o_proj": ("width", "width"), "post_attention_layernorm": ("norm",),
         "mlp.gate_proj": ("mlp_dim", "width"), "mlp.up_proj": ("mlp_dim", "width"), "mlp.down_proj": ("width", "mlp_dim")}


def make_config(layers: int) -> Config:
  config = Config(
      stage="instruct", output="unused", batch_size=8,
      model=ModelConfig(vision=VisionConfig(image_size=28, width=32, layers=1, heads=2, mlp_dim=32),
                        mq_former=MQFormerConfig(width=32, layers=2, heads=2, mlp_dim=32, vocab_size=1024), llm=LLMConfig(layers=layers)),
      data=DataConfig(records="unused", mq_former_tokenizer="unused", llm_tokenizer="unused"))
  config.finalize()
  return config


def write_weights(config: Config, directory: pathlib.Path) -> int:
  """The language model in a shard per layer and one for the rest, and an image encoder. Returns the bytes written."""
  rng, llm, vision = np.random.default_rng(0), config.model.llm, config.model.vision
  pool = (rng.standard_normal(llm.width * llm.mlp_dim) * 0.02).astype(ml_dtypes.bfloat16)  # drawn once: drawing takes longer than writing
  sizes = {"norm": llm.width, "width": llm.width, "mlp_dim": llm.mlp_dim}
  make = lambda *shape: np.roll(pool, int(rng.integers(len(pool))))[:int(np.prod(shape))].reshape(shape)
  llama, total, weight_map = directory / "llama", 0, {}
  llama.mkdir(parents=True)
  rest = {"model.embed_tokens.weight": make(llm.vocab_size // 4, llm.width).repeat(4, 0), "model.norm.weight": make(llm.width),
          "lm_head.weight": make(llm.vocab_size // 4, llm.width).repeat(4, 0)}
  for n in range(llm.layers + 1):
    tensors = rest if n == llm.layers else {
        f"model.layers.{n}.{name}.weight": make(*(sizes[size] for size in shape)) for name, shape in LAYER.items()}
    file = f"model-{n + 1:05}-of-{llm.layers + 1:05}.safetensors"
    save_file(tensors, llama / file)
    weight_map |= dict.fromkeys(tensors, file)
    total += sum(tensor.nbytes for tensor in tensors.values())
  (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

  width, clip, part = vision.width, {}, "vision_model"
  linear = lambda name, n, m: {f"{name}.weight": make(m, n), f"{name}.bias": make(m)}
  norm = lambda name: {f"{name}.{kind}": make(width) for kind in ("weight", "bias")}
  clip |= norm(f"{part}.pre_layrnorm") | {
      f"{part}.embeddings.class_embedding": make(width), f"{part}.embeddings.position_embedding.weight": make(vision.tokens, width),
      f"{part}.embeddings.patch_embedding.weight": make(width, 3, vision.patch_size, vision.patch_size)}
  for n in range(vision.layers):
    layer = f"{part}.encoder.layers.{n}"
    clip |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
      clip |= linear(f"{layer}.self_attn.{name}", width, width)
    clip |= linear(f"{layer}.mlp.fc1", width, vision.mlp_dim) | linear(f"{layer}.mlp.fc2", vision.mlp_dim, width)
  (directory / "clip").mkdir()
  save_file(clip, directory / "clip" / "model.safetensors")
  return total


def convert(config: Config, directory: pathlib.Path) -> dict[str, float]:
  """Seconds, and the peak of this process."""
  from lyrics_jax.hf.from_hf import convert
  start = time.perf_counter()
  convert(config, {kind: str(directory / kind) for kind in ("clip", "llama")}, str(directory / "converted"))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {"seconds": time.perf_counter() - start, "peak_rss_bytes": peak}


def in_a_process_of_its_own(step: str, options: argparse.Namespace):
  """What the step printed last. This process stays small, because a peak is handed down to the processes that it starts."""
  done = subprocess.run([sys.executable, __file__, f"--directory={options.directory}", f"--layers={options.layers}",
                         f"--step={step}"], check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--directory", required=True, help="a directory that does not exist yet")
  parser.add_argument("--layers", type=int, default=40, help="of the language model; Vicuna-13B has 40")
  parser.add_argument("--step", choices=["write", "convert"], help=argparse.SUPPRESS)
  options = parser.parse_args()
  directory, config = pathlib.Path(options.directory), make_config(options.layers)
  if options.step:
    print(json.dumps(write_weights(config, directory) if options.step == "write" else convert(config, directory)))
    return
  directory.mkdir(parents=True)
  try:
    source = in_a_process_of_its_own("write", options)
    measured = in_a_process_of_its_own("convert", options)
    written = sum(path.stat().st_size for path in (directory / "converted").rglob("*") if path.is_file())
  finally:
    shutil.rmtree(directory)
  llm = config.model.llm
  stacked = 2 * llm.layers * llm.width * llm.mlp_dim
  single = 2 * max(llm.width * llm.mlp_dim, llm.vocab_size * llm.width)
  peak = measured["peak_rss_bytes"]
  result = {"layers": options.layers, "source_gb": source, "written_gb": written, "largest_parameter_gb": stacked,
            "largest_tensor_gb": single, "bound_gb": 2 * max(stacked, single) + 2e9, "peak_rss_gb": peak}
  print(json.dumps({name: round(value / 1e9, 2) if name.endswith("_gb") else value for name, value in result.items()}
                   | {"seconds": round(measured["seconds"], 1), "within_bound": peak < result["bound_gb"]}))


if __name__ == "__main__":
  main()
