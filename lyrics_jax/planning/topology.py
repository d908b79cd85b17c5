"""The devices of a TPU slice that this machine does not have, as libtpu's ahead-of-time compiler describes them."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from lyrics_jax.planning.chips import Chip, chip_of
from refiner_export.common.settings import UserError, require

# What libtpu would otherwise ask a metadata server, or complain about, on a machine without a TPU.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock guards a TPU; any number of programs may compile at a time
}


@dataclasses.dataclass(frozen=True)
class Target:
  """`sides`: a slice's shape in chips. `places`: where each device, one per chip, stands: number of the slice, then coordinates."""
  name: str
  chip: Chip
  sides: tuple[int, ...]
  places: dict[jax.Device, tuple[int, ...]]

  @property
  def devices(self) -> list[jax.Device]:
    return list(self.places)

  @classmethod
  def of(cls, name: str, slices: int = 1) -> "Target":
    """The chips of `slices` slices called, for example, v5e:4x4.

    Raises:
      UserError: no such chip or slice shape, or libtpu is not installed.
    """
    chip = chip_of(name)
    require(re.fullmatch(r"\w+:\d+(x\d+)+", name) is not None, f"--topology={name}: write chip and shape, for example v5p:4x4x4")
    require(importlib.util.find_spec("libtpu") is not None,
            "compiling for a TPU needs libtpu, which is not installed: pip install 'lyrics_jax[plan]'")
    for variable, value in _NO_TPU_HERE.items():
      os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles; it must not look for a TPU to run on
    sides = tuple(map(int, name.split(":")[1].split("x")))
    options = {"chip_config_name": chip.cores} | ({} if slices == 1 else {"num_slices": slices})
    if math.prod(sides) == 1:
      options["chips_per_host_bounds"] = (1, 1, 1)  # the default host has four chips
    try:
      devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
      raise UserError(f"--topology={name}: libtpu does not describe this slice ({' '.join(str(error).split())[:200]})") from None
    places = {device: (getattr(device, "slice_index", 0) or 0, *device.coords) for device in devices}
    return cls(name, chip, sides, places)

  def links(self, mesh: Mesh, group: list[int]) -> int:
    """Links by which each chip of a group, places in the flat mesh, reaches the others; 0 where they are of several slices.

    Along a physical axis that is a ring there are two, else the ends of the line have one.
    """
    number, *coordinates = zip(*(self.places[device] for device in mesh.devices.reshape(-1)[group]))
    if len(set(number)) > 1:
      return 0
    return max(1, sum(1 + (side % self.chip.wraps == 0) for side, along in zip(self.sides, coordinates) if len(set(along)) > 1))
