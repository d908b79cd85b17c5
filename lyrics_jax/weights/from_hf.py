"""Hugging Face weights to a directory that a run starts from: config.json, frozen parameters, the trained ones as
step 0.

What the origins have is loaded. Everything else is initialised as a run would, and no tensor is left over without a
reason. Frozen parameters must all come from somewhere.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from lyrics_jax.config import Config
from lyrics_jax.sharding import MeshSettings, make_mesh
from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.parameters import ModelParameters, part
from lyrics_jax.weights import sources
from lyrics_jax.weights import ziya
from lyrics_jax.weights.stream import write_checkpoint
from lyrics_jax.weights.table import Origin, report
from refiner_export.common.settings import require
from refiner_export.common.weight_files import Tensor

_AT_ONCE = 32  # parameters that one program initialises
REFINER = "refiner"  # directory of the refiner's weights inside the written one, where an origin has them


def convert(config: Config, paths: Mapping[str, str], output: str) -> None:
  """Writes the new directory `output`, all or nothing, and logs where every part comes from.

  Args:
    config: of the run that will start from it; its mesh need not be here.
    paths: name of a kind in `sources.KINDS` -> file or directory. What two of them have is taken from the first.
    output: for `config.init_from`.

  Raises:
    UserError: weights are not whole, do not fit `config`, or have unknown tensors; or a frozen parameter has no origin.
  """
  # --- what there will be: everything abstract first ---
  flags = ", ".join(f"--{kind.name}" for kind in sources.KINDS)
  require(bool(paths), f"nothing to convert: name one or more of {flags}")
  require(jax.process_count() == 1, "weights are converted by one process: run this on one machine")
  target = epath.Path(output)
  require(not target.exists(), f"{output} already exists: remove it, or name another directory")
  config = _stored(config, output)
  model_parameters = ModelParameters.of(config)

  # --- what the origins have for it ---
  origins = []
  for kind, path in paths.items():
    origins.append(sources.find(path, model_parameters, kind, f"--{kind}"))
  origin_of = {}
  for origin in reversed(origins):
    origin.require_known()
    origin_of |= dict.fromkeys(origin.paths(), origin)
  _require_frozen(model_parameters, origin_of)

  # --- write ---
  with _all_or_nothing(target) as directory:
    tensors = _tensors(model_parameters, origin_of)
    trained, frozen = model_parameters.split(tensors)
    write_checkpoint(_step_0(directory) / "parameters", trained)
    if frozen:
      write_checkpoint(directory / "frozen", frozen)
    (directory / "config.json").write_text(config.to_json())
    if "ziya" in paths:
      ziya.write_refiner(epath.Path(paths["ziya"]), directory / REFINER)
  logging.info("parameters from %s\n%s", ", ".join(paths.values()), _report(model_parameters, origins, origin_of))
  logging.info("written: %s, for config.init_from", output)


def _stored(config: Config, output: str) -> Config:
  """The configuration that describes what is stored: int8 is made of it when a run starts."""
  compute = config.compute
  if compute.frozen_dtype == "int8":
    compute = dataclasses.replace(compute, frozen_dtype="bfloat16")
  config = dataclasses.replace(config, output=output, init_from="", compute=compute)
  config.finalize()
  return config


def _require_frozen(model_parameters: ModelParameters, origin_of: Mapping[str, Origin]) -> None:
  """Raises `UserError` when a frozen parameter would have random values."""
  at_random = set()
  for path in model_parameters.paths(trained=False):
    if path not in origin_of:
      at_random.add(part(path))
  require(not at_random, f"frozen, and no source has it: {', '.join(sorted(at_random))}. Add --clip or --llama with "
                         "its weights")


def _tensors(model_parameters: ModelParameters, origin_of: Mapping[str, Origin]) -> dict[str, Tensor]:
  """All parameters by path, unread where an origin has the whole of them."""
  tensors, fresh_paths = {}, []
  for path, like in model_parameters.shapes.items():
    if path in origin_of and origin_of[path].shape(path) == like.shape:
      tensors[path] = origin_of[path].tensor(path, like.dtype)
    else:
      fresh_paths.append(path)
  for path, value in _fresh(model_parameters, fresh_paths).items():
    if path in origin_of:  # the first rows
      rows = origin_of[path].read(path, dtype=value.dtype)
      value = np.concatenate([rows, value[len(rows):]])
    tensors[path] = Tensor(path, value.shape, value.dtype, value.__getitem__)
  return tensors


def _fresh(model_parameters: ModelParameters, paths: Sequence[str]) -> dict[str, np.ndarray]:
  """Parameters as a run would initialise them, some at a time: making them takes more memory than they have."""
  mesh = make_mesh(MeshSettings(data=1, fsdp=1, tensor=1), jax.local_devices()[:1])
  fresh = {}
  for start in range(0, len(paths), _AT_ONCE):
    some = paths[start:start + _AT_ONCE]
    in_memory = model_parameters.fresh(mesh, model_parameters.config.seed, some)
    fresh |= jax.device_get(model_parameters.turned(in_memory))
  return fresh


def _report(model_parameters: ModelParameters, origins: Sequence[Origin], origin_of: Mapping[str, Origin]) -> str:
  loaded, left_over = {}, {}
  for path, origin in origin_of.items():
    loaded[path] = origin.shape(path)
  for origin in origins:
    for reason, names in origin.left_over.items():
      left_over[f"{origin.name}, {reason}"] = names
  return report(model_parameters.shapes, loaded, left_over)


def _step_0(output: epath.Path) -> epath.Path:
  """The directory of a checkpoint that lacks its parameters only: Orbax has written what else belongs there."""
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
