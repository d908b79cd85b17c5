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

# On a machine without a TPU libtpu would ask a metadata server for these, or complain that they are missing.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu's lock guards a TPU; any number of programs may compile at a time
}


@dataclasses.dataclass(frozen=True)
class Target:
  """A slice, or several, to compile for.

  Attributes:
    sides: a slice's shape in chips.
    places: where each device stands: the number of its slice, then its coordinates. One device is one chip.
  """
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
      UserError: there is no such chip or slice shape, or libtpu is not installed.
    """
    chip = chip_of(name)
    require(re.fullmatch(r"\w+:\d+(x\d+)+", name) is not None,
            f"--topology={name}: write chip and shape, for example v5p:4x4x4")
    require(importlib.util.find_spec("libtpu") is not None,
            "compiling for a TPU needs libtpu, which is not installed: pip install 'lyrics_jax[plan]'")
    for variable, value in _NO_TPU_HERE.items():
      os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles; it must not look for a TPU to run on
    sides = tuple(map(int, name.split(":")[1].split("x")))
    options = {"chip_config_name": chip.cores}
    if slices > 1:
      options["num_slices"] = slices
    if math.prod(sides) == 1:
      options["chips_per_host_bounds"] = (1, 1, 1)  # the default host has four chips
    try:
      devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
      reason = " ".join(str(error).split())[:200]
      raise UserError(f"--topology={name}: libtpu does not describe this slice ({reason})") from None
    places = {}
    for device in devices:
      places[device] = (getattr(device, "slice_index", 0) or 0, *device.coords)
    return cls(name, chip, sides, places)

  def links(self, mesh: Mesh, group: list[int]) -> int:
    """How many links each chip of a group has to the others; 0 where the group crosses slices.

    Along a side of the slice that is a ring a chip has two links, along a line it has one. `group`: places in
    the flat mesh.
    """
    slices, *coordinates = zip(*map(self.places.get, mesh.devices.reshape(-1)[group]))
    if len(set(slices)) > 1:
      return 0
    links = 0
    for side, along in zip(self.sides, coordinates):
      if len(set(along)) > 1:
        links += 2 if side % self.chip.wraps == 0 else 1
    return max(1, links)
