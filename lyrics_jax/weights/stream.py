"""Tensors that are written while they are read, a piece at a time: no host ever holds the stacked layers of a kernel.

A checkpoint is written chunk by chunk, a .safetensors file tensor by tensor.
"""

import collections
import itertools
import json
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from lyrics_jax.weights.read import SAFETENSORS_DTYPES, Index, Tensor

_CHUNK = 2**26  # bytes of an array that are compressed, and can be read, by themselves
_AHEAD = 2  # chunks that are still being compressed and written while the next one is read


def write_checkpoint(directory: epath.Path, tensors: Mapping[str, Tensor]) -> None:
  """Writes the new directory `directory` as `ocp.StandardCheckpointer` would have written these arrays, by path.

  A stack of layers, [L, ...], is cut into layers, so that one can be written, and read again, without the others.
  """
  # Orbax looks for the handler of jax.Array too, and warns where there is none.
  registry = ocp.type_handlers.create_type_handler_registry(
      (Tensor, _TensorHandler()), (jax.Array, ocp.type_handlers.ArrayHandler()))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
    checkpointer.save(directory, args=ocp.args.PyTreeSave(
        dict(tensors), save_args={path: _layout(tensor) for path, tensor in tensors.items()}))


def _layout(tensor: Tensor) -> ocp.SaveArgs:
  layers = len(tensor.shape) > 2 and math.prod(tensor.shape) * tensor.dtype.itemsize > _CHUNK
  return ocp.SaveArgs(chunk_byte_size=_CHUNK, shard_axes=(0,) if layers else ())


class _TensorHandler(ocp.type_handlers.NumpyHandler):
  """Writes a `Tensor` where and how Orbax writes a NumPy array, but reads it only then, chunk by chunk.

  Orbax' own handlers want the whole array in memory. The array's specification, hence the form and the place of its
  chunks, is Orbax' all the same, as is everything around it (_METADATA, the manifest): whatever reads checkpoints reads
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
    return []  # futures: everything is written


def _chunks(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Index]:
  """What each chunk of an array has of it, a slice per axis; Orbax chooses chunks that divide the array."""
  return itertools.product(*([slice(start, start + step) for start in range(0, size, step)]
                             for size, step in zip(shape, chunk, strict=True)))


def write_safetensors(path: epath.Path, tensors: Mapping[str, Tensor]) -> None:
  """Writes a .safetensors file, one tensor in memory at a time (the library's own writer wants all of them)."""
  # As in the library's files: what has the largest numbers comes first, so that every tensor is aligned.
  ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
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
