"""How the processes of a run find each other: hosts of a TPU slice, nodes of a cluster, or several on one machine."""

import glob
import importlib.util

import jax

from refiner_export.common.settings import UserError, require

AUTO = "auto"
_REMEDY = "expected ADDRESS:PORT,COUNT,INDEX, such as --hosts=10.0.0.1:8476,4,0 on the first of four, or --hosts=auto"


def join(hosts: str | None) -> None:
  """Connects this process with the others of its run. Call it before anything asks for a device.

  Args:
    hosts: None finds the other processes on a Cloud TPU machine and stays alone elsewhere. "auto" finds them as
      `jax.distributed.initialize` does: SLURM, Open MPI, Kubernetes. "ADDRESS:PORT,COUNT,INDEX" names where the first
      process listens, how many processes there are, and the number of this one.

  Raises:
    UserError: `hosts` has another form, or the other processes cannot be found.
  """
  if hosts is None and not _on_cloud_tpu():
    return
  try:
    if hosts in (None, AUTO):
      jax.distributed.initialize()
    else:
      address, count, index = _parse(hosts)
      jax.config.update("jax_cpu_collectives_implementation", "gloo")  # other devices ignore it
      jax.distributed.initialize(address, count, index)
  except (RuntimeError, ValueError) as error:
    reason = " ".join(str(error).split())[:200]
    raise UserError(f"--hosts: cannot join the other processes ({reason}): {_REMEDY}") from None


def _parse(hosts: str) -> tuple[str, int, int]:
  address, *numbers = hosts.split(",")
  well_formed = ":" in address and len(numbers) == 2 and all(number.isdigit() for number in numbers)
  require(well_formed, f"--hosts={hosts}: {_REMEDY}")
  count, index = map(int, numbers)
  require(index < count, f"--hosts={hosts}: the processes are numbered 0 to {count - 1}")
  return address, count, index


def _on_cloud_tpu() -> bool:
  """Whether this machine has TPU chips and the library for them. Asking JAX would start the chips too early."""
  chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  return importlib.util.find_spec("libtpu") is not None and bool(chips)
