"""The sharding plan: one mesh `(data, fsdp, tensor)` and one table from logical to mesh axes.

Batches are split over `data` and `fsdp`; parameters over `fsdp` along the model's width and over `tensor` along heads, MLP
and vocabulary; everything else is on every device. A dimension that does not divide is an error, never replicated in silence.
"""

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lyrics_jax.config import MeshConfig
from lyrics_jax.models.layers import ROWS
from refiner_export.common.settings import require

MESH_AXES = ("data", "fsdp", "tensor")
MESH_AXIS_OF = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor", None: None}
BATCH = PartitionSpec(ROWS)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """The mesh over all devices; with several slices, each holds a part of the data axis and all of the others.

  Of devices that are no TPUs each process counts as a slice.

  Raises:
    UserError: the axes do not multiply to the number of devices, or there are not so many slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [config.data, config.fsdp, config.tensor]
  known = int(np.prod([size for size in sizes if size != -1]))
  sizes = [len(devices) // known if size == -1 else size for size in sizes]
  require(int(np.prod(sizes)) == len(devices),
          f"config.mesh: data x fsdp x tensor = {' x '.join(map(str, sizes))} does not give the {len(devices)} devices here")
  if config.slices == 1:
    return _mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True))
  by_process = devices[0].platform != "tpu"
  found = len({device.process_index if by_process else device.slice_index for device in devices})
  require(found == config.slices, f"config.mesh.slices={config.slices}, but the devices here are of {found}")
  require(sizes[0] % config.slices == 0, f"config.mesh.data={sizes[0]} is not a multiple of config.mesh.slices={config.slices}")
  return _mesh(mesh_utils.create_hybrid_device_mesh((sizes[0] // config.slices, *sizes[1:]), (config.slices, 1, 1), devices,
                                                    process_is_granule=by_process, allow_split_physical_axes=True))


def _mesh(devices: np.ndarray) -> Mesh:
  """Devices placed so that neighbours of an axis are neighbours in the slice. A side of it may be shared by two axes: fsdp 16 on 4x8x8."""
  return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def check_batch(batch_size: int, mesh: Mesh) -> None:
  """Raises `UserError` unless every device has as many rows of a (micro)batch, and every host rows of its own."""
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
  require(bool((hosts == hosts[..., :1]).all()), f"config.mesh.tensor={mesh.shape['tensor']} splits one example over several hosts: "
                                                 f"make it divide the {hosts.size // len(np.unique(hosts))} devices of a host")
  require(batch_size % shards == 0, f"config.batch_size: {batch_size} examples per microbatch are not a multiple of the "
                                    f"{shards} devices that config.mesh.data x config.mesh.fsdp splits them over")


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...], logical_axes: tuple[str | None, ...]) -> NamedSharding:
  """Where a parameter lies. `logical_axes` name the last dimensions; leading ones (the scanned layers) are not split."""
  axes = (None,) * (len(shape) - len(logical_axes)) + tuple(MESH_AXIS_OF[name] for name in logical_axes)
  for size, axis, name in zip(shape, axes, (None,) * (len(shape) - len(logical_axes)) + logical_axes):
    require(axis is None or size % mesh.shape[axis] == 0,
            f"config.mesh.{axis}={mesh.shape.get(axis)} does not divide dimension {name!r} ({size}) of parameter {path}")
  return NamedSharding(mesh, PartitionSpec(*axes))


def global_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Puts this host's part of a batch on its devices; the result is the batch of all hosts."""
  sharding = NamedSharding(mesh, BATCH)
  return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in local.items()}
