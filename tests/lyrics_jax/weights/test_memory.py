"""`from-hf` never holds the stacked layers of a kernel in memory, which here are larger than all that it may need.

The numbers are zeros, which take neither time to draw nor room on the disk; in memory they take what others take.
"""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
from published import save_clip
from saved_run import make_run_config

from lyrics_jax.models.llm.llama import LlamaSettings

BOUND = 2e9  # bytes besides twice the largest tensor of the files
LAYERS, WIDTH, MLP = 130, 1024, 8192  # a kernel of all layers is 2.2 GB

# Not getrusage: its peak is also that of the process that started this one.
PEAK = """
import pathlib
status = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) * 1024)
"""

WRITE = """
import sys
import numpy as np
from etils import epath
from lyrics_jax.weights.stream import write_checkpoint
from refiner_export.common.weight_files import Tensor
shape = tuple(map(int, sys.argv[2:]))
size = lambda part, whole: len(range(*part.indices(whole)))
tensor = Tensor("a", shape, np.dtype(np.float32), lambda index: np.zeros([*map(size, index, shape)], np.float32))
write_checkpoint(epath.Path(sys.argv[1]), {"a": tensor})
"""

CONVERT = """
import json, sys
from lyrics_jax.config import Config
from lyrics_jax.weights.from_hf import convert
from refiner_export.common.settings import from_dict
config = from_dict(Config, json.loads(sys.argv[1]))
config.finalize()
convert(config, json.loads(sys.argv[2]), sys.argv[3])
"""


def peak(program: str, *arguments) -> int:
  """Of the resident memory of a process of its own, bytes."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  done = subprocess.run([sys.executable, "-c", program + PEAK, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                        check=True, cwd=pathlib.Path(__file__).parents[3], env=environment)
  return int(done.stdout.splitlines()[-1])


def test_a_stack_is_never_whole(tmp_path):
  shape = 80, 2048, 4096
  assert peak(WRITE, tmp_path / "written", *shape) < 1e9 < 4 * math.prod(shape)


def write_empty_llama(llm: LlamaSettings, directory: pathlib.Path) -> int:
  """Zeros in LLaMA's layout, in a file that takes no room on the disk. Returns the bytes of the largest tensor."""
  names = {"input_layernorm": (llm.width,), "post_attention_layernorm": (llm.width,),
           **{f"self_attn.{name}_proj": (llm.width, llm.width) for name in "qkvo"},
           "mlp.gate_proj": (llm.mlp_dim, llm.width), "mlp.up_proj": (llm.mlp_dim, llm.width),
           "mlp.down_proj": (llm.width, llm.mlp_dim)}
  shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(llm.layers) for name, shape in names.items()}
  shapes |= {"model.embed_tokens.weight": (llm.vocab_size, llm.width), "model.norm.weight": (llm.width,),
             "lm_head.weight": (llm.vocab_size, llm.width)}
  header, end = {}, 0
  for name, shape in shapes.items():
    start, end = end, end + 2 * math.prod(shape)
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  directory.mkdir()
  with open(directory / "model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
  return max(2 * math.prod(shape) for shape in shapes.values())


@pytest.mark.slow
def test_twice_the_largest_tensor_and_2_gb(tokenizer_directory, tmp_path):
  config = make_run_config("instruct", tmp_path / "unused", tokenizer_directory, compute__frozen_dtype="bfloat16",
                           llm__layers=LAYERS, llm__width=WIDTH, llm__mlp_dim=MLP)
  save_clip(config, tmp_path / "clip")
  largest = write_empty_llama(config.stage.model.llm, tmp_path / "llama")
  sources = {kind: str(tmp_path / kind) for kind in ("clip", "llama")}
  used = peak(CONVERT, config.to_json(), json.dumps(sources), tmp_path / "converted")
  assert used < 2 * largest + BOUND < 2 * LAYERS * WIDTH * MLP
