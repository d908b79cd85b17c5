"""Set before JAX is imported anywhere: eight CPU devices, so that one machine shows what a mesh does; seeds that never change."""

import os
import random

import numpy as np
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    # Eight devices share few cores: on a busy machine the last one may come late to a collective.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600", "--xla_cpu_collective_timeout_seconds=600",
    # Programs here run once or twice: the compiler's own time is what they cost.
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]).strip()
# A collective holds a thread of each device until the last one has come. With one thread per device, as is the default, the
# suite has stood still for good, all threads waiting, presumably in two collectives at once; with 32 it has not.
os.environ["PJRT_NPROC"] = "32"


@pytest.fixture(autouse=True)
def _seeds():
  random.seed(0)
  np.random.seed(0)
