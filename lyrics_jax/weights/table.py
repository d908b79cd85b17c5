"""How parameters of ours are made of tensors of a file, and what became of both: the machinery of every name table."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping

import jax
import numpy as np

from lyrics_jax.weights.read import Index, Tensor
from refiner_export.common.settings import require

Shape = tuple[int, ...]
UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Form:
  """How an array of ours lies in a file: `shape` is its shape there, `take` gets ours from what lies there.

  Where `shape` only reorders axes, so does `take`, and parts of the array can be read.
  """
  shape: Callable[[Shape], Shape]
  take: Callable[[np.ndarray], np.ndarray]

  def order(self, dimensions: int) -> tuple[int, ...] | None:
    """Which axis of ours each axis in the file is; None where it is more than a reordering of axes."""
    ours = tuple(range(2, 2 + dimensions))  # sizes that tell the axes apart
    theirs = self.shape(ours)
    return tuple(ours.index(size) for size in theirs) if sorted(theirs) == list(ours) else None


PLAIN = Form(lambda shape: shape, lambda a: a)
TRANSPOSED = Form(lambda shape: shape[::-1], lambda a: a.T)
FIRST = Form(lambda shape: (1, *shape), lambda a: a[0])  # behind an axis of length 1
PATCH = Form(lambda shape: (shape[1], 3, *[math.isqrt(shape[0] // 3)] * 2),  # [D, 3, p, p] <-> [p * p * 3, D]
             lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]))
# One tensor holds the kernels, another the biases, of query, key and value below each other.
THIRDS = {name: Form(lambda shape: (3 * shape[-1], *shape[:-1]), lambda a, n=n: np.split(a, 3)[n].T)
          for n, name in enumerate("qkv")}
LEAVES = {"kernel": ("weight", TRANSPOSED), "embedding": ("weight", PLAIN), "scale": ("weight", PLAIN),
          "bias": ("bias", PLAIN)}


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

  def read(self, tensors: Mapping[str, Tensor], index: Index | None = None, dtype: np.dtype | None = None):
    """Ours, or the part of it that `index`, a slice per axis of ours, selects, in this dtype or in the file's.

    One layer is in memory at a time besides the result, and of it only what `index` selects (see `Form.order`).
    """
    index = (slice(None),) * (len(self.shape) + self.stacked) if index is None else index
    if not self.stacked:
      return self._read_one(tensors[self.names[0]], index, dtype)
    names, result = self.names[index[0]], None
    if len(names) == 1:
      return self._read_one(tensors[names[0]], index[1:], dtype)[None]
    for place, name in enumerate(names):
      value = self._read_one(tensors[name], index[1:], dtype)
      if result is None:
        result = np.empty((len(names), *value.shape), value.dtype)
      result[place] = value
    return result

  def _read_one(self, tensor: Tensor, index: Index, dtype: np.dtype | None) -> np.ndarray:
    order = self.form.order(len(index))
    if order is None:
      value = self.form.take(tensor.read())[index]
    else:
      value = self.form.take(tensor.read(tuple(index[axis] for axis in order)))
    return value if dtype is None else value.astype(dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class Made(Entry):
  """A parameter of ours that no file has: `value` is what stands in its place in the source's model."""
  value: np.ndarray | None = None

  def read(self, tensors: Mapping[str, Tensor], index: Index | None = None, dtype: np.dtype | None = None):
    value = self.value if index is None else self.value[index]
    return value if dtype is None else value.astype(dtype)


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


@dataclasses.dataclass(frozen=True)
class Source:
  """What weight files have for a model, still lying in them.

  `entries`: by our path, checked to fit the tensors, which are by the names that the entries give them. `left_over`: as in
  `Found`.
  """
  name: str
  tensors: Mapping[str, Tensor]
  entries: Mapping[str, Entry]
  left_over: Mapping[str, list[str]]

  def shape(self, path: str) -> Shape:
    """The shape in which `read` gives our parameter: ours, or with fewer rows."""
    entry = self.entries[path]
    if entry.fewer_rows:
      return (self.tensors[entry.names[0]].shape[0], *entry.shape[1:])
    return (len(entry.names), *entry.shape) if entry.stacked else entry.shape

  def read(self, path: str, index: Index | None = None, dtype: np.dtype | None = None) -> np.ndarray:
    """As `Entry.read`, of our parameter with this path."""
    return self.entries[path].read(self.tensors, index, dtype)

  def tensor(self, path: str, dtype: np.dtype) -> Tensor:
    """Our parameter with this path, in this dtype, still unread."""
    return Tensor(path, self.shape(path), np.dtype(dtype), lambda index: self.read(path, index, dtype))

  def require_known(self) -> None:
    """Raises `UserError` when there is a tensor that such weights do not have."""
    unknown = self.left_over.get(UNKNOWN, [])
    require(not unknown, f"{self.name}: unexpected tensor {next(iter(unknown), '')} ({len(unknown)} in all): these are not "
                         "the weights of such a model alone")

  def found(self) -> Found:
    """Everything, read."""
    return Found({path: self.read(path) for path in self.entries}, self.left_over)


def account(source: str, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry], required: Callable[[str], bool],
            remedy: Callable[[str, Shape, Shape], str], reasons: Mapping[str, str]) -> Source:
  """Checks that our parameters can be made of the tensors of `source`, and says what becomes of the other tensors.

  Args:
    entries: by our path. Those of a part (see `part`) are all there or none of them; `required` parts must be.
    remedy: (our path, the tensor's shape, the shape needed) -> what a person should do when these differ.
    reasons: why a tensor is left over -> pattern of such names; of several that fit the last one counts.

  Raises:
    UserError: a tensor is missing or has another shape.
  """
  present = {part(path) for path, entry in entries.items() if any(name in tensors for name in entry.names)}
  wanted = {path: entry for path, entry in entries.items() if part(path) in present or required(part(path))}
  missing = [name for entry in wanted.values() for name in entry.names if name not in tensors]
  require(not missing, f"{source}: tensor {next(iter(missing), '')} is missing ({len(missing)} in all); the file is not "
                       f"complete, save or download it again")
  for path, entry in wanted.items():
    for name in entry.names:
      tensor = tensors[name]
      expected = entry.form.shape(entry.shape)
      require(entry.fits(tensor.shape), f"{source}: tensor {tensor.name} has shape {tensor.shape}, this model needs "
                                        f"{expected}; {remedy(path, tensor.shape, expected)}")
  used = {name for entry in wanted.values() for name in entry.names}
  left_over = {}
  for name, tensor in tensors.items():
    if name not in used:
      reason = next((reason for reason, pattern in reversed(reasons.items()) if re.fullmatch(pattern, name)), UNKNOWN)
      left_over.setdefault(reason, []).append(tensor.name)
  return Source(source, tensors, wanted, left_over)
