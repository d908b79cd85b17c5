"""Parameters from weight files to devices and on to a checkpoint, few at a time.

A device's slice of a parameter is read from the files on its own (`place`), so that no host ever holds whole a parameter
that is split over several hosts' devices. A checkpoint is written parameter by parameter (`Writer`).
"""

import ctypes
import json
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from lyrics_jax.hf.read import Index, Tensor
from lyrics_jax.hf.table import Source

_CHUNK = 2**26  # bytes of an array that are compressed, and can be read, by themselves
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
           "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # NumPy's names -> safetensors'
_GROUP = 2**28  # bytes of parameters that are saved at once


def place(source: Source, path: str, like: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
  """Our parameter with this path, laid out; every device's slice is read by itself, and nothing else."""
  def read(index: Index) -> np.ndarray:
    return source.read(path, index, like.dtype)

  return jax.make_array_from_callback(like.shape, sharding, read)


def groups(shapes: dict[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
  """Paths in order, so many at a time as are small together; a large one comes alone."""
  group, total = [], 0
  for path, shape in shapes.items():
    size = shape.size * shape.dtype.itemsize
    if group and total + size > _GROUP:
      yield group
      group, total = [], 0
    group.append(path)
    total += size
  if group:
    yield group


class Writer:
  """Writes parameters, by path, to the new directory `directory`, as `training.checkpoint` reads them.

  Memory needed besides the parameters of one call is as much again: their compressed chunks.
  """

  def __init__(self, directory: epath.Path):
    self._directory = directory
    self._context = ocp.Context()
    self._context.array.saving.storage_options.chunk_byte_size = _CHUNK
    # A limit on what is written at once keeps Orbax from holding a copy of all of it in one transaction.
    self._context.memory.write_concurrent_bytes = 2**40

  def write(self, parameters: dict[str, jax.Array]) -> None:
    with self._context:
      ocp.partial.save(self._partial, parameters)
    _give_memory_back()

  def finish(self) -> None:
    """Puts what was written in its place; to be called once, at the end."""
    with self._context:
      ocp.partial.finalize(self._partial)
    (self._partial / "state").rename(self._directory)  # what is around it only Orbax' newer API reads
    self._partial.rmtree()

  @property
  def _partial(self) -> epath.Path:
    return self._directory.with_name(f"{self._directory.name}.orbax")


def write_all(directory: epath.Path, shapes: dict[str, jax.ShapeDtypeStruct], make: Callable[[str], jax.Array]) -> None:
  """Writes the parameters that `make(path)` gives to the new directory, few at a time."""
  writer = Writer(directory)
  for group in groups(shapes):
    writer.write({path: make(path) for path in group})
  writer.finish()


def write_safetensors(path: epath.Path, tensors: Mapping[str, Tensor]) -> None:
  """Writes a .safetensors file, one tensor in memory at a time (the library's own writer wants all of them)."""
  header, end = {}, 0
  for name, tensor in tensors.items():
    dtype = tensor.read(tuple(slice(0, 0) for _ in tensor.shape)).dtype
    start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
    header[name] = {"dtype": _DTYPES[dtype.name], "shape": tensor.shape, "data_offsets": [start, end]}
  text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
      file.write(np.ascontiguousarray(tensor.read()).tobytes())


def _give_memory_back() -> None:
  """Hands freed memory back to the system: glibc keeps what the threads that compress chunks have used, gigabytes of it."""
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is not None:
    trim(0)
