"""The sharding plan: one mesh `(data, fsdp, tensor)` and one table from logical to mesh axes.

Batches are split over `data` and `fsdp`. Parameters are split over `fsdp` along the model's width, and over `tensor`
along heads, MLP and vocabulary. Everything else lies on every device. A dimension that does not divide is an error:
nothing is replicated silently. No other file names a mesh axis.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from refiner_export.common.checks import at_least
from refiner_export.common.settings import Settings, require

MESH_AXES = ("data", "fsdp", "tensor")
MESH_AXIS_OF = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor", None: None}
ROWS = ("data", "fsdp")  # the mesh axes that split the rows of a batch
HEADS = MESH_AXIS_OF["heads"]
BATCH = PartitionSpec(ROWS)


@dataclasses.dataclass(unsafe_hash=True)
class MeshSettings(Settings):
  """Devices per mesh axis; -1 on one axis takes what the others leave."""
  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  slices: int = 1  # TPU slices joined by the data-center network, which only the data axis crosses

  def check(self, path: str) -> None:
    sizes = (self.data, self.fsdp, self.tensor)
    require(sizes.count(-1) <= 1 and all(size == -1 or size > 0 for size in sizes),
            f"{path}={sizes}: each axis is a positive count, at most one is -1")
    at_least(self, path, 1, "slices")
    require(self.data == -1 or self.data % self.slices == 0,
            f"{path}.data={self.data} is not a multiple of {path}.slices={self.slices}")


def make_mesh(settings: MeshSettings, devices: list[jax.Device] | None = None) -> Mesh:
  """The mesh over all devices. With several slices, each slice holds a part of the data axis and all of the others.

  Devices that are not TPUs have no slices: there, each process counts as one.

  Raises:
    UserError: the axes do not multiply to the number of devices, or the number of slices is another one.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [settings.data, settings.fsdp, settings.tensor]
  known = math.prod(size for size in sizes if size != -1)
  sizes = [len(devices) // known if size == -1 else size for size in sizes]
  product = " x ".join(map(str, sizes))
  require(math.prod(sizes) == len(devices),
          f"config.mesh: data x fsdp x tensor = {product} does not give the {len(devices)} devices here")
  if settings.slices == 1:
    return _mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True))
  by_process = devices[0].platform != "tpu"
  found = len({device.process_index if by_process else device.slice_index for device in devices})
  require(found == settings.slices, f"config.mesh.slices={settings.slices}, but the devices here are of {found}")
  require(sizes[0] % settings.slices == 0,
          f"config.mesh.data={sizes[0]} is not a multiple of config.mesh.slices={settings.slices}")
  within, across = (sizes[0] // settings.slices, *sizes[1:]), (settings.slices, 1, 1)
  return _mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices, process_is_granule=by_process,
                                                    allow_split_physical_axes=True))


def _mesh(devices: np.ndarray) -> Mesh:
  """Neighbours on a mesh axis are neighbours in the slice. Two axes may share a side of it: fsdp 16 on 4x8x8 does."""
  return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
  """Over how many devices the mesh, by default the one in use, splits the rows of a batch; 1 without a mesh."""
  sizes = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
  return math.prod(sizes.get(axis, 1) for axis in ROWS)


def heads_shards() -> int:
  """Over how many devices the mesh in use splits heads; 1 without a mesh."""
  return jax.sharding.get_abstract_mesh().shape.get(HEADS, 1)


def splits_width() -> bool:
  """Whether the mesh in use splits parameters along the model's width."""
  return jax.sharding.get_abstract_mesh().shape.get(MESH_AXIS_OF["embed"], 1) > 1


def check_batch(batch_size: int, mesh: Mesh) -> None:
  """Raises `UserError` unless all devices have equally many rows of a microbatch, and every host its own rows."""
  shards = batch_shards(mesh)
  hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
  of_a_host = hosts.size // len(np.unique(hosts))
  require(bool((hosts == hosts[..., :1]).all()),
          f"config.mesh.{HEADS}={mesh.shape[HEADS]} splits one example over several hosts: make it divide the "
          f"{of_a_host} devices of a host")
  require(batch_size % shards == 0, f"config.batch_size: {batch_size} examples per microbatch are not a multiple of "
                                    f"the {shards} devices that config.mesh.data x config.mesh.fsdp splits them over")


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...],
                       logical_axes: tuple[str | None, ...]) -> NamedSharding:
  """Where a parameter lies. `logical_axes` name its last dimensions; leading ones, the scanned layers, are not split.

  Raises:
    UserError: the mesh does not divide a dimension.
  """
  names = (None,) * (len(shape) - len(logical_axes)) + logical_axes
  axes = tuple(MESH_AXIS_OF[name] for name in names)
  for size, axis, name in zip(shape, axes, names):
    require(axis is None or size % mesh.shape[axis] == 0,
            f"config.mesh.{axis}={mesh.shape.get(axis)} does not divide dimension {name!r} ({size}) of parameter "
            f"{path}")
  return NamedSharding(mesh, PartitionSpec(*axes))


def everywhere(mesh: Mesh) -> NamedSharding:
  """A copy on each device."""
  return NamedSharding(mesh, PartitionSpec())


def global_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Puts this host's part of a batch on its devices; the result is the batch of all hosts."""
  sharding = NamedSharding(mesh, BATCH)
  return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in local.items()}


def keep_rows(x: jax.Array) -> jax.Array:
  """x: [B, ...], held to the mesh axes of the batch; without a mesh, or where they do not divide B, x as it is.

  Without this the compiler may let activations follow the parameters, which `fsdp` splits along the width: every device
  then computes all rows, and each product is summed over all devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or x.ndim < 2 or x.shape[0] % batch_shards(mesh):
    return x
  return jax.lax.with_sharding_constraint(x, BATCH)
