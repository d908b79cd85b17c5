"""What is set before a test imports JAX: eight CPU devices, so that one machine shows what a mesh does; fixed seeds."""

import os
import random

import numpy as np
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    # Eight devices share few cores. On a busy machine the last device may come late to a collective.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600", "--xla_cpu_collective_timeout_seconds=600",
    # Programs of tests run once or twice, so the time of the compiler is what they cost.
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]).strip()
# A collective holds a thread of each device until the last device has come. With one thread per device, which is the
# default, the suite once stood still for good: all threads waited, presumably in two collectives at once. With 32
# threads this has not happened.
os.environ["PJRT_NPROC"] = "32"


@pytest.fixture(autouse=True)
def _seeds():
  random.seed(0)
  np.random.seed(0)
