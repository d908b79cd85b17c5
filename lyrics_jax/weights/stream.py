"""Tensors that are written while they are read, a piece at a time: no host ever holds the stacked layers of a kernel.

A checkpoint is written chunk by chunk, a .safetensors file tensor by tensor.
"""

import collections
import itertools
import json
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from refiner_export.common.weight_files import SAFETENSORS_DTYPES, Index, Tensor

_CHUNK = 2**26  # bytes of an array that are compressed, and can be read, by themselves
_AHEAD = 2  # chunks that are still being compressed and written while the next one is read


def write_checkpoint(directory: epath.Path, tensors: Mapping[str, Tensor]) -> None:
  """Writes the new directory `directory` as `ocp.StandardCheckpointer` would have written these arrays, by path.

  A stack of layers, [L, ...], is cut into layers, so that one can be written, and read again, without the others.
  """
  # Orbax looks for the handler of jax.Array too, and warns where there is none.
  registry = ocp.type_handlers.create_type_handler_registry(
      (Tensor, _TensorHandler()), (jax.Array, ocp.type_handlers.ArrayHandler()))
  layouts = {path: _layout(tensor) for path, tensor in tensors.items()}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
    checkpointer.save(directory, args=ocp.args.PyTreeSave(dict(tensors), save_args=layouts))


def _layout(tensor: Tensor) -> ocp.SaveArgs:
  layers = len(tensor.shape) > 2 and tensor.nbytes > _CHUNK
  return ocp.SaveArgs(chunk_byte_size=_CHUNK, shard_axes=(0,) if layers else ())


class _TensorHandler(ocp.type_handlers.NumpyHandler):
  """Writes a `Tensor` where and how Orbax writes a NumPy array, but reads it only then, chunk by chunk.

  Orbax' own handlers want the whole array in memory. The array's specification is Orbax' all the same, and so are the
  form and the place of its chunks and everything around it (_METADATA, the manifest). Whatever reads checkpoints reads
  this one.
  """

  async def serialize(self, values, infos, args=None):
    for tensor, info, arg in zip(values, infos, args, strict=True):
      specification = ocp.type_handlers.get_json_tspec_write(
          info, use_ocdbt=True, global_shape=tensor.shape, local_shape=tensor.shape, dtype=tensor.dtype,
          process_index=0, arg=arg)
      array = await tensorstore.open(specification, create=True, context=info.ts_context)
      writing = collections.deque()
      for index in _chunks(tensor.shape, array.chunk_layout.write_chunk.shape or ()):  # None of a scalar
        while len(writing) >= _AHEAD:
          await writing.popleft()
        writing.append(array[index].write(tensor.read(index), can_reference_source_data_indefinitely=True))
      for write in writing:
        await write
    return []  # no futures: everything is written


def _chunks(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Index]:
  """The part of an array that each chunk holds, a slice per axis. Orbax chooses chunks that divide the array."""
  slices = []
  for size, step in zip(shape, chunk, strict=True):
    slices.append([slice(start, start + step) for start in range(0, size, step)])
  return itertools.product(*slices)


def write_safetensors(path: epath.Path, tensors: Mapping[str, Tensor]) -> None:
  """Writes a .safetensors file, one tensor in memory at a time (the library's own writer wants all of them)."""
  # Tensors with the longest numbers come first, as in the library's files, so that every tensor is aligned.
  ordered = dict(sorted(tensors.items(), key=_shortness))
  header, end = {}, 0
  for name, tensor in ordered.items():
    start, end = end, end + tensor.nbytes
    header[name] = {"dtype": SAFETENSORS_DTYPES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [start, end]}
  text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()  # transformers refuses files without it
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered.values():
      file.write(np.ascontiguousarray(tensor.read()).view(np.uint8))


def _shortness(item: tuple[str, Tensor]) -> int:
  return -item[1].dtype.itemsize
