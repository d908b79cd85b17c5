"""Hugging Face weights to a directory that a run starts from: config.json, frozen parameters, the trained ones as step 0.

What the sources have is loaded, everything else is initialised as a run would, and no tensor of a source is left over
without a reason. Frozen parameters must all come from somewhere.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from lyrics_jax.config import Config, MeshConfig
from lyrics_jax.weights import blip2
from lyrics_jax.weights import clip_names
from lyrics_jax.weights import exported
from lyrics_jax.weights import llama_names
from lyrics_jax.weights import ziya
from lyrics_jax.weights.read import Tensor
from lyrics_jax.weights.stream import write_checkpoint
from lyrics_jax.weights.table import Found, Source, part
from lyrics_jax.stages import make_stage
from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.parameters import ParameterPlan
from lyrics_jax.training.sharding import make_mesh
from refiner_export.common.settings import existing_path, require

SOURCES: Mapping[str, Callable[..., Source]] = {
    "clip": clip_names.find, "llama": llama_names.find, "blip2": blip2.find, "ziya": ziya.find, "lyrics": exported.find}
_AT_ONCE = 32  # parameters that are initialised together, by a program of their own
REFINER = "refiner"  # directory of the refiner's weights inside the written one, where a source has them


def convert(config: Config, paths: Mapping[str, str], output: str) -> None:
  """Writes the new directory `output`, all or nothing, and logs where every part comes from.

  Args:
    config: of the run that will start from it; its mesh need not be here.
    paths: kind of source, a key of `SOURCES`, -> file or directory. What two sources have is taken from the first.
    output: for `config.init_from`.

  Raises:
    UserError: a source is not whole, does not fit `config`, or has unknown tensors; or a frozen parameter has no source.
  """
  # --- what there will be: everything abstract first ---
  require(bool(paths), f"nothing to convert: name one or more of {', '.join(f'--{kind}' for kind in SOURCES)}")
  require(jax.process_count() == 1, "weights are converted by one process: run this on one machine")
  target = epath.Path(output)
  require(not target.exists(), f"{output} already exists: remove it, or name another directory")
  config = _stored(config, output)
  plan = ParameterPlan.of(make_stage(config))

  # --- what the sources have for it ---
  remedy = "Name a file of weights or a Hugging Face directory"
  sources = [SOURCES[kind](existing_path(path, f"--{kind}", remedy), config.model, plan.shapes)
             for kind, path in paths.items()]
  for source in sources:
    source.require_known()
  origin = {path: source for source in reversed(sources) for path in source.entries}
  at_random = sorted({part(path) for path in plan.paths(trained=False) if path not in origin})
  require(not at_random, f"frozen, and no source has it: {', '.join(at_random)}. Add --clip or --llama with its weights")
  whole = {path for path, source in origin.items() if source.shape(path) == plan.shapes[path].shape}

  # --- write ---
  with _all_or_nothing(target) as directory:
    fresh = _fresh(plan, [path for path in plan.shapes if path not in whole])

    def tensor(path: str) -> Tensor:
      if path in whole:
        return origin[path].tensor(path, plan.shapes[path].dtype)
      value = fresh[path]
      if path in origin:  # its first rows
        rows = origin[path].read(path, dtype=value.dtype)
        value = np.concatenate([rows, value[len(rows):]])
      return Tensor(path, value.shape, value.dtype, value.__getitem__)

    tensors = lambda trained: {path: tensor(path) for path in plan.paths(trained)}
    write_checkpoint(_step_0(directory) / "parameters", tensors(True))
    if plan.paths(trained=False):
      write_checkpoint(directory / "frozen", tensors(False))
    (directory / "config.json").write_text(config.to_json())
    if "ziya" in paths:
      ziya.write_refiner(epath.Path(paths["ziya"]), directory / REFINER)
  loaded = {path: jax.ShapeDtypeStruct(source.shape(path), plan.shapes[path].dtype) for path, source in origin.items()}
  left_over = {f"{source.name}, {reason}": names for source in sources for reason, names in source.left_over.items()}
  logging.info("parameters from %s\n%s", ", ".join(paths.values()), Found(loaded, left_over).report(plan.shapes))
  logging.info("written: %s, for config.init_from", output)


def _stored(config: Config, output: str) -> Config:
  """The configuration that describes what is stored: int8 is made of it when a run starts."""
  model = config.model
  if model.frozen_dtype == "int8":
    model = dataclasses.replace(model, frozen_dtype="bfloat16")
  config = dataclasses.replace(config, output=output, init_from="", model=model)
  config.finalize()
  return config


def _fresh(plan: ParameterPlan, paths: Sequence[str]) -> dict[str, np.ndarray]:
  """Parameters as a run would initialise them, some at a time: making them takes more memory than they have."""
  mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices()[:1])
  fresh = {}
  for start in range(0, len(paths), _AT_ONCE):
    fresh |= jax.device_get(plan.fresh(mesh, plan.stage.config.seed, paths[start:start + _AT_ONCE]))
  return fresh


def _step_0(output: epath.Path) -> epath.Path:
  """The directory of a checkpoint that lacks nothing but its parameters: what else belongs there Orbax has written."""
  checkpoints = Checkpoints(str(output))
  checkpoints.manager.save(0, args=ocp.args.Composite(parameters=ocp.args.StandardSave({"": np.zeros(1)})))
  checkpoints.close()
  step = output / "checkpoints" / "0"
  (step / "parameters").rmtree()
  return step


@contextlib.contextmanager
def _all_or_nothing(target: epath.Path) -> Iterator[epath.Path]:
  """A directory beside the target that takes its name once everything is in it, and is gone after an error."""
  temporary = target.absolute().with_name(f".{target.name}.partial")
  temporary.rmtree(missing_ok=True)
  temporary.mkdir(parents=True)
  try:
    yield temporary
    temporary.rename(target.absolute())
  except BaseException:
    temporary.rmtree(missing_ok=True)
    raise
