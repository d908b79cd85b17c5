"""How parameters of ours are made of tensors of a file, and what became of both: the machinery of every name table."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping

import jax
import numpy as np

from lyrics_jax.hf.read import Tensor
from refiner_export.settings import require

Shape = tuple[int, ...]
UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Form:
  """How an array of ours lies in a file: `shape` is its shape there, `take` gets ours from what lies there."""
  shape: Callable[[Shape], Shape]
  take: Callable[[np.ndarray], np.ndarray]


PLAIN = Form(lambda shape: shape, lambda a: a)
TRANSPOSED = Form(lambda shape: shape[::-1], lambda a: a.T)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter of ours.

  `names`: its tensors; one per layer of a stack, in order, when `stacked`. `shape`: ours, of a single layer.
  `fewer_rows`: the file may have fewer rows, which are then our first ones.
  """
  names: tuple[str, ...]
  form: Form
  shape: Shape
  stacked: bool = False
  fewer_rows: bool = False

  def fits(self, there: Shape) -> bool:
    expected = self.form.shape(self.shape)
    if self.fewer_rows and len(there) == len(expected):
      return there[0] <= expected[0] and there[1:] == expected[1:]
    return there == expected

  def read(self, tensors: Mapping[str, Tensor]) -> np.ndarray:
    values = [self.form.take(tensors[name].read()) for name in self.names]
    return np.stack(values) if self.stacked else values[0]


@dataclasses.dataclass(frozen=True)
class Found:
  """What a source has for a model.

  `values`: by our path; one with fewer rows than ours fills the first of them. `left_over`: the source's names that have
  no place here, by reason; those under `UNKNOWN` are not expected there at all.
  """
  values: Mapping[str, np.ndarray | jax.Array]
  left_over: Mapping[str, list[str]]

  def report(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """Numbers loaded and initialised by part of the model, and the tensors left over by reason, for a person."""
    lines = [f"{'part':32}{'loaded':>16}{'initialised':>16}"]
    loaded, all_ = Counter(), Counter()
    for path, shape in shapes.items():
      all_[part(path)] += math.prod(shape.shape)
      loaded[part(path)] += math.prod(self.values[path].shape) if path in self.values else 0
    lines += [f"{name:32}{loaded[name]:16,}{count - loaded[name]:16,}" for name, count in all_.items()]
    lines.append(f"{'all':32}{loaded.total():16,}{all_.total() - loaded.total():16,}")
    for reason, names in self.left_over.items():
      tops = Counter(re.split(r"[./]", name)[0] for name in names)
      lines.append(f"left over, {reason}: {', '.join(f'{top} ({count})' for top, count in tops.items())}")
    return "\n".join(lines)


def part(path: str) -> str:
  """The part of the model that a parameter belongs to: `vision`, `mq_former/visual_attention`, `lm_head`."""
  parts = re.sub(r"^perception/|stack/blocks/|layers/\d+/", "", path).split("/")
  return "/".join(parts[:2] if parts[0] == "mq_former" else parts[:1])


def assemble(source: str, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry], required: frozenset[str],
             remedy: Callable[[str, Shape, Shape], str]) -> dict[str, np.ndarray]:
  """Reads our parameters from the tensors of `source`. Everything is checked before anything is read.

  Args:
    entries: by our path. Those of a part (see `part`) are all there or none of them; `required` parts must be.
    remedy: (our path, the tensor's shape, the shape needed) -> what a person should do when these differ.
  """
  present = {part(path) for path, entry in entries.items() if any(name in tensors for name in entry.names)}
  wanted = {path: entry for path, entry in entries.items() if part(path) in present | required}
  missing = [name for entry in wanted.values() for name in entry.names if name not in tensors]
  require(not missing, f"{source}: tensor {next(iter(missing), '')} is missing ({len(missing)} in all); the file is not "
                       f"complete, save or download it again")
  for path, entry in wanted.items():
    for name in entry.names:
      tensor = tensors[name]
      expected = entry.form.shape(entry.shape)
      require(entry.fits(tensor.shape), f"{source}: tensor {tensor.name} has shape {tensor.shape}, this model needs "
                                        f"{expected}; {remedy(path, tensor.shape, expected)}")
  return {path: entry.read(tensors) for path, entry in wanted.items()}
