"""What one TPU chip of each generation can do: the constants of the cost model.

FLOP/s, memory and bandwidths are from the system pages of Google Cloud's TPU documentation, and from "How to
Scale Your Model" (Austin et al. 2025), chapter 2. The clock of v4, v5e and v5p follows from their matrix
units: peak FLOP/s = 2 x side^2 x units x clock. The clock of v6e is the one at which the compiler's cycles of
matrix products come within 12 % of the chip's peak; see docs/plan.md.
"""

import dataclasses

from refiner_export.common.settings import require


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    flops: bfloat16 FLOP/s.
    hbm: bytes of memory.
    hbm_bandwidth: bytes/s between HBM and the cores.
    link_bandwidth: bytes/s of one link of the interconnect in one direction.
    dcn_bandwidth: bytes/s of the data-center network per chip.
    clock: cycles per second.
    wraps: a side of the slice is a ring where its length is a multiple of this number.
    cores: the word by which libtpu treats the cores of a chip as one device, as JAX does on the machine itself.
  """
  name: str
  flops: float
  hbm: float
  hbm_bandwidth: float
  link_bandwidth: float
  dcn_bandwidth: float
  clock: float
  wraps: int
  cores: str = "default"


CHIPS = {
    # cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1200 GB/s; two cores of four 128 x 128 units.
    "v4": Chip("v4", 275e12, 32 * 2**30, 1.2e12, 4.5e10, 6.25e9, 1.05e9, 4, "megacore"),
    # cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, 1600 Gbit/s over four links;
    # one core of four units.
    "v5e": Chip("v5e", 197e12, 16 * 2**30, 8.2e11, 4.5e10, 3.125e9, 1.5e9, 16),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GB, 2765 GB/s, 1200 GB/s both ways over six
    # links; two cores of four units.
    "v5p": Chip("v5p", 459e12, 95 * 2**30, 2.765e12, 9e10, 6.25e9, 1.75e9, 4),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1640 GB/s, 3200 Gbit/s over four links.
    "v6e": Chip("v6e", 918e12, 32 * 2**30, 1.64e12, 9e10, 1.25e10, 1.75e9, 16),
}


def chip_of(topology: str) -> Chip:
  """The chip of a topology such as "v5p:4x4x4". Raises `UserError` for an unknown one."""
  name = topology.split(":")[0]
  require(name in CHIPS, f"--topology={topology}: no such TPU; known are {', '.join(CHIPS)}, for example v5p:4x4x4 or "
                         "v5e:4x4")
  return CHIPS[name]
