"""What every table of names is made of: how parameters of ours are made of tensors in files.

A `Form` says how one array lies in a file. An `Entry` says which tensors make up one parameter. `Names` is the table of
one part of the model, and makes the entries of its parameters. An `Origin` is what a file or directory has for a model.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from lyrics_jax.models.layers.int8 import SCALE
from refiner_export.common.settings import require
from refiner_export.common.weight_files import Index, Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, jax.ShapeDtypeStruct]  # by path; every matrix is a kernel [..., n, m]
UNKNOWN = "unknown"  # the reason of tensors that are left over without a reason


# --- forms: how one array lies in a file ---

@dataclasses.dataclass(frozen=True)
class Form:
  """An array that lies in the file as it is here. Subclasses say how it lies otherwise."""

  def shape(self, ours: Shape) -> Shape:
    """The shape in the file of an array that has shape `ours` here."""
    return ours

  def take(self, there: np.ndarray) -> np.ndarray:
    """Our array, made of the array in the file."""
    return there

  def give(self, ours: np.ndarray) -> np.ndarray:
    """The array in the file, made of ours: the inverse of `take`."""
    return ours

  def axes(self, dimensions: int) -> Sequence[int] | None:
    """For each axis in the file, which axis of our array it is. None where `take` does more than reorder axes."""
    return range(dimensions)


@dataclasses.dataclass(frozen=True)
class Transposed(Form):
  """Our kernel [n, m] is a weight [m, n] in the file, as PyTorch has it."""

  def shape(self, ours: Shape) -> Shape:
    return ours[::-1]

  def take(self, there: np.ndarray) -> np.ndarray:
    return there.T

  def give(self, ours: np.ndarray) -> np.ndarray:
    return ours.T

  def axes(self, dimensions: int) -> Sequence[int]:
    return range(dimensions)[::-1]


@dataclasses.dataclass(frozen=True)
class Behind(Form):
  """In the file, `count` axes of length 1 stand before ours."""
  count: int

  def shape(self, ours: Shape) -> Shape:
    return (1,) * self.count + ours

  def take(self, there: np.ndarray) -> np.ndarray:
    return there.reshape(there.shape[self.count:])

  def give(self, ours: np.ndarray) -> np.ndarray:
    return ours.reshape(self.shape(ours.shape))

  def axes(self, dimensions: int) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Patch(Form):
  """The linear map of patches: [p * p * 3, D] here, a convolution [D, 3, p, p] in the file."""

  def shape(self, ours: Shape) -> Shape:
    side = math.isqrt(ours[0] // 3)
    return (ours[1], 3, side, side)

  def take(self, there: np.ndarray) -> np.ndarray:
    return there.transpose(2, 3, 1, 0).reshape(-1, len(there))

  def give(self, ours: np.ndarray) -> np.ndarray:
    width, channels, side, _ = self.shape(ours.shape)
    return ours.T.reshape(width, side, side, channels).transpose(0, 3, 1, 2)

  def axes(self, dimensions: int) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Third(Form):
  """One tensor holds the weights of query, key and value below each other, another tensor their biases.

  Our array is one of the three. There is no `give`, because it would need all three.
  """
  number: int

  def shape(self, ours: Shape) -> Shape:
    return (3 * ours[-1], *ours[:-1])

  def take(self, there: np.ndarray) -> np.ndarray:
    return np.split(there, 3)[self.number].T

  def give(self, ours: np.ndarray) -> np.ndarray:
    raise NotImplementedError

  def axes(self, dimensions: int) -> None:
    return None


PLAIN, TRANSPOSED, PATCH = Form(), Transposed(), Patch()
THIRDS = {"q": Third(0), "k": Third(1), "v": Third(2)}
# Our name of a parameter within its module -> the name in PyTorch's modules, and the form there.
LEAVES = {"kernel": ("weight", TRANSPOSED), "embedding": ("weight", PLAIN), "scale": ("weight", PLAIN),
          "bias": ("bias", PLAIN), "lora_a": ("lora_A.weight", TRANSPOSED), "lora_b": ("lora_B.weight", TRANSPOSED)}


# --- entries: which tensors make up one parameter ---

@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter of ours.

  Attributes:
    names: its tensors: one, or one per layer of a stack, in the order of the layers.
    form: of each tensor.
    shape: ours; of a single layer when `stacked`.
    stacked: whether our parameter has a leading axis, the layers.
    fewer_rows: whether the file may have fewer rows. They are then our first ones.
  """
  names: tuple[str, ...]
  form: Form
  shape: Shape
  stacked: bool = False
  fewer_rows: bool = False

  def fits(self, there: Shape) -> bool:
    """Whether a tensor of this shape can be read."""
    expected = self.form.shape(self.shape)
    if self.fewer_rows and len(there) == len(expected):
      return there[0] <= expected[0] and there[1:] == expected[1:]
    return there == expected

  def read(self, tensors: Mapping[str, Tensor], index: Index | None = None,
           dtype: np.dtype | None = None) -> np.ndarray:
    """Our parameter, in this dtype or in that of the file.

    Besides the result, one layer is in memory at a time. Where the form only reorders axes, it is the part of the layer
    that `index` selects.

    Args:
      index: a slice for each axis of ours; None selects everything.
    """
    if index is None:
      index = (slice(None),) * (len(self.shape) + self.stacked)
    if not self.stacked:
      return self._read_tensor(tensors[self.names[0]], index, dtype)
    names = self.names[index[0]]
    first = self._read_tensor(tensors[names[0]], index[1:], dtype)
    if len(names) == 1:
      return first[None]
    result = np.empty((len(names), *first.shape), first.dtype)
    result[0] = first
    del first
    for layer, name in enumerate(names[1:], start=1):
      result[layer] = self._read_tensor(tensors[name], index[1:], dtype)
    return result

  def _read_tensor(self, tensor: Tensor, index: Index, dtype: np.dtype | None) -> np.ndarray:
    axes = self.form.axes(len(index))
    if axes is None:
      value = self.form.take(tensor.read())[index]
    else:
      value = self.form.take(tensor.read(tuple(index[axis] for axis in axes)))
    return value if dtype is None else value.astype(dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class Made(Entry):
  """A parameter of ours that no file has. `value` makes our model compute what the published one does."""
  value: np.ndarray | None = None

  def read(self, tensors: Mapping[str, Tensor], index: Index | None = None,
           dtype: np.dtype | None = None) -> np.ndarray:
    value = self.value if index is None else self.value[index]
    return value if dtype is None else value.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Names:
  """The names in a file of one part of our model, whose layers lie in one stack here.

  Attributes:
    root: our path of the part, such as "vision".
    parameters: our path below the root -> name and form of a parameter that is no weight or bias of a module.
    modules: our path below the root -> module in the file.
    layers: the name in the file that stands before a layer's number.
    layer: our path of a module within a layer -> what stands before "weight" or "bias" in the file, dot included.
    forms: our path of a module within a layer -> form of its weight and bias, where `LEAVES` has another form.
  """
  root: str
  parameters: Mapping[str, tuple[str, Form]]
  modules: Mapping[str, str]
  layers: str
  layer: Mapping[str, str]
  forms: Mapping[str, Form] = dataclasses.field(default_factory=dict)

  def entries(self, shapes: Shapes, prefix: str = "", group: int | None = None) -> dict[str, Entry]:
    """The entries of our parameters that this table knows, by path.

    Args:
      shapes: of our parameters, by path. Parameters of other parts are ignored.
      prefix: what stands in the file before all names of the part.
      group: how many layers a group has, for a Q-Former: one stack holds the first layer of every group, another
        stack the second layer of every group, and so on. None where there is only one stack.
    """
    result = {}
    for path, shape in shapes.items():
      if path.startswith(f"{self.root}/"):
        entry = self._entry(path.removeprefix(f"{self.root}/"), shape.shape, prefix, group)
        if entry is not None:
          result[path] = entry
    return result

  def _entry(self, inner: str, shape: Shape, prefix: str, group: int | None) -> Entry | None:
    if inner in self.parameters:
      name, form = self.parameters[inner]
      return Entry((prefix + name,), form, shape)
    module, _, leaf = inner.rpartition("/")
    if leaf not in LEAVES:
      return None
    suffix, form = LEAVES[leaf]
    if not module.startswith("stack/blocks/"):
      known = module in self.modules
      return Entry((f"{prefix}{self.modules[module]}.{suffix}",), form, shape) if known else None
    module, first, step = module.removeprefix("stack/blocks/"), 0, 1
    if group is not None:
      number, module = re.fullmatch(r"layers/(\d+)/(.*)", module).groups()
      first, step = int(number), group
    if module not in self.layer:
      return None
    names = []
    for place in range(shape[0]):
      names.append(f"{prefix}{self.layers}.{first + step * place}.{self.layer[module]}{suffix}")
    return Entry(tuple(names), self.forms.get(module, form), shape[1:], stacked=True)


def single_entries(shapes: Shapes, modules: Mapping[str, str], parameters: Mapping[str, str]) -> dict[str, Entry]:
  """The entries of modules and lone parameters that stand once in the model, in no stack.

  Args:
    modules: our path of a module -> its name in the file.
    parameters: our path of a parameter that belongs to no such module -> its name in the file.
  """
  found = {}
  for path, shape in shapes.items():
    module, _, leaf = path.rpartition("/")
    if path in parameters:
      found[path] = Entry((parameters[path],), PLAIN, shape.shape)
    elif module in modules:
      suffix, form = LEAVES[leaf]
      found[path] = Entry((f"{modules[module]}.{suffix}",), form, shape.shape)
  return found


# --- origins: what a file or directory has for a model ---

def component(path: str) -> str:
  """The piece of a model that a file has as a whole or not at all: `vision`, `former/visual_attention`, `lm_head`.

  Pieces are finer than the parts of `training.parameters.part`, because BLIP-2's files may lack pieces of a Q-Former.
  """
  pieces = re.sub(r"^connector/|stack/blocks/|layers/\d+/", "", path).split("/")
  return "/".join(pieces[:2] if pieces[0] == "former" else pieces[:1])


@dataclasses.dataclass(frozen=True)
class Origin:
  """What weight files have for a model. Nothing is in memory until it is read.

  Attributes:
    name: the file or directory, for messages.
    tensors: by the names that the entries give them.
    entries: by our path. `account` has checked that they fit the tensors.
    left_over: why tensors have no place in our model -> their names. `UNKNOWN` stands for no reason.
  """
  name: str
  tensors: Mapping[str, Tensor]
  entries: Mapping[str, Entry]
  left_over: Mapping[str, list[str]]

  @property
  def unknown(self) -> list[str]:
    """Names of tensors that files of this kind are not expected to have."""
    return self.left_over.get(UNKNOWN, [])

  def paths(self) -> list[str]:
    """Our parameters that are here, wholly or with fewer rows."""
    return list(self.entries)

  def shape(self, path: str) -> Shape:
    """The shape in which `read` gives our parameter: ours, or fewer rows."""
    entry = self.entries[path]
    if entry.fewer_rows:
      return (self.tensors[entry.names[0]].shape[0], *entry.shape[1:])
    return (len(entry.names), *entry.shape) if entry.stacked else entry.shape

  def read(self, path: str, sharding: NamedSharding | None = None, dtype: np.dtype | None = None,
           transposed: bool = False) -> np.ndarray | jax.Array:
    """Our parameter with this path.

    Args:
      sharding: how the parameter is laid out as a `jax.Array`. Each process reads only what its devices hold. None
        gives an array of NumPy.
      dtype: None gives that of the file.
      transposed: whether the last two axes change places. `sharding` is then that of the turned array.
    """
    shape = self.shape(path)
    shape = _turned(shape) if transposed else shape
    pieces = {}  # devices that hold the same part share what is read

    def piece(index: Index) -> np.ndarray:
      key = str(index)
      if key not in pieces:
        inside = _turned(index) if transposed else index
        value = self.entries[path].read(self.tensors, inside, dtype)
        pieces[key] = value.swapaxes(-1, -2) if transposed else value
      return pieces[key]

    if sharding is None:
      return piece((slice(None),) * len(shape))
    return jax.make_array_from_callback(shape, sharding, piece)

  def tensor(self, path: str, dtype: np.dtype) -> Tensor:
    """Our parameter with this path, in this dtype, still unread."""
    def fetch(index: Index) -> np.ndarray:
      return self.entries[path].read(self.tensors, index, dtype)

    return Tensor(path, self.shape(path), np.dtype(dtype), fetch)

  def require_known(self) -> None:
    """Raises `UserError` when there is an unknown tensor."""
    require(not self.unknown, f"{self.name}: unexpected tensor {next(iter(self.unknown), '')} ({len(self.unknown)} in "
                              "all): these are not the weights of such a model alone")

  def report(self, shapes: Shapes) -> str:
    """What became of our parameters and of the tensors, for a person."""
    loaded = {}
    for path in self.entries:
      loaded[path] = self.shape(path)
    return report(shapes, loaded, self.left_over)


def _turned(axes: tuple) -> tuple:
  return (*axes[:-2], axes[-1], axes[-2])


def report(shapes: Shapes, loaded: Mapping[str, Shape], left_over: Mapping[str, list[str]]) -> str:
  """Per component, how many numbers are loaded and initialised; per reason, how many tensors are left over.

  Args:
    shapes: of our parameters, by path. Scales of int8 kernels are not counted: each comes with its kernel.
    loaded: shapes of what is loaded, by path.
    left_over: as in `Origin`.
  """
  loaded_numbers, all_numbers = Counter(), Counter()
  for path, shape in shapes.items():
    if not path.endswith(SCALE):
      all_numbers[component(path)] += math.prod(shape.shape)
      loaded_numbers[component(path)] += math.prod(loaded[path]) if path in loaded else 0
  lines = [f"{'part':32}{'loaded':>16}{'initialised':>16}"]
  for name, count in all_numbers.items():
    lines.append(f"{name:32}{loaded_numbers[name]:16,}{count - loaded_numbers[name]:16,}")
  total, of_all = loaded_numbers.total(), all_numbers.total()
  lines.append(f"{'all':32}{total:16,}{of_all - total:16,}")
  for reason, names in left_over.items():
    tops = Counter(re.split(r"[./]", name)[0] for name in names)
    counts = ", ".join(f"{top} ({count})" for top, count in tops.items())
    lines.append(f"left over, {reason}: {counts}")
  return "\n".join(lines)


def account(name: str, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry], required: Callable[[str], bool],
            remedy: Callable[[str, Shape, Shape], str], reasons: Mapping[str, str]) -> Origin:
  """Checks that our parameters can be made of the tensors of a file, and says what becomes of its other tensors.

  Args:
    name: the file or directory.
    entries: by our path. A file has all parameters of a component or none.
    required: whether a component must be in the file.
    remedy: (our path, the tensor's shape, the shape that is needed) -> what a person should do when these differ.
    reasons: why a tensor is left over -> pattern of such names. The last pattern that fits counts.

  Raises:
    UserError: a tensor is missing or has another shape.
  """
  wanted = _wanted(tensors, entries, required)
  missing, used = [], set()
  for entry in wanted.values():
    used.update(entry.names)
    missing += [tensor for tensor in entry.names if tensor not in tensors]
  require(not missing, f"{name}: tensor {next(iter(missing), '')} is missing ({len(missing)} in all); the file is not "
                       "complete, save or download it again")
  for path, entry in wanted.items():
    expected = entry.form.shape(entry.shape)
    for tensor in entry.names:
      there = tensors[tensor].shape
      require(entry.fits(there), f"{name}: tensor {tensors[tensor].name} has shape {there}, this model needs "
                                 f"{expected}; {remedy(path, there, expected)}")
  left_over = {}
  for key, tensor in tensors.items():
    if key not in used:
      left_over.setdefault(_reason(key, reasons), []).append(tensor.name)
  return Origin(name, tensors, wanted, left_over)


def _wanted(tensors: Mapping[str, Tensor], entries: Mapping[str, Entry],
            required: Callable[[str], bool]) -> dict[str, Entry]:
  """The entries of components that are required, or of which the file has something."""
  present = set()
  for path, entry in entries.items():
    if not tensors.keys().isdisjoint(entry.names):
      present.add(component(path))
  wanted = {}
  for path, entry in entries.items():
    if component(path) in present or required(component(path)):
      wanted[path] = entry
  return wanted


def _reason(name: str, reasons: Mapping[str, str]) -> str:
  for reason, pattern in reversed(reasons.items()):
    if re.fullmatch(pattern, name):
      return reason
  return UNKNOWN
