"""How the processes of one run find each other: each host of a TPU slice, a node of a cluster, or several on one machine."""

import glob
import importlib.util

import jax

from refiner_export.common.settings import UserError, require

AUTO = "auto"
_REMEDY = "expected ADDRESS:PORT,COUNT,INDEX, such as --hosts=10.0.0.1:8476,4,0 on the first of four, or --hosts=auto"


def join(hosts: str | None) -> None:
  """Connects this process with the others of its run. To be called before anything asks for a device.

  Args:
    hosts: None joins the others by itself on a Cloud TPU machine and stays alone elsewhere. "auto" finds them as
      `jax.distributed.initialize` does: SLURM, Open MPI, Kubernetes. "ADDRESS:PORT,COUNT,INDEX" names where the first process
      listens, how many there are, and which of them this one is.

  Raises:
    UserError: `hosts` is none of these, or the others cannot be found.
  """
  if hosts is None and not _on_cloud_tpu():
    return
  try:
    if hosts in (None, AUTO):
      jax.distributed.initialize()
    else:
      address, count, index = _parse(hosts)
      jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of no account on other devices
      jax.distributed.initialize(address, count, index)
  except (RuntimeError, ValueError) as error:
    raise UserError(f"--hosts: cannot join the other processes ({' '.join(str(error).split())[:200]}): {_REMEDY}") from None


def _parse(hosts: str) -> tuple[str, int, int]:
  address, *numbers = hosts.split(",")
  require(":" in address and len(numbers) == 2 and all(number.isdigit() for number in numbers), f"--hosts={hosts}: {_REMEDY}")
  count, index = map(int, numbers)
  require(index < count, f"--hosts={hosts}: the processes are numbered 0 to {count - 1}")
  return address, count, index


def _on_cloud_tpu() -> bool:
  """Whether this machine has TPU chips and the library for them. Asking JAX would start its devices, too early."""
  return importlib.util.find_spec("libtpu") is not None and bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))
