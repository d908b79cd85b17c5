"""What XLA's compiler is told about a train step, by the kind of device that the step is for."""

from jax.sharding import Mesh

# How many MiB of its fast memory a TPU's core may give to one fusion. v5p and v5e have 128 MiB and give 16 by default.
# With more, the tiles of a product are larger, and what is fused to the product is read less often: Vicuna-13B's
# products reach 94 % of v5p's peak instead of 64 % (docs/plan.md). 64 MiB gain 2 % more, but compiling takes ten times
# as long. v4 has no more to give, and what v6e gives by default is enough.
_FAST_MEMORY = {"TPU v5": 32, "TPU v5p": 32, "TPU v5 lite": 32, "TPU v5e": 32}


def compiler_options(mesh: Mesh) -> dict[str, str]:
  """The `compiler_options` of `jax.jit` for programs on this mesh; empty for other devices than TPUs."""
  device = mesh.devices.flat[0]
  if device.platform != "tpu":
    return {}
  # A product whose parameters are split over devices could be cut into pieces, each computed when its parameters arrive
  # from a neighbour. The threshold forbids it: small pieces take twice the time, and whole parameters can travel while
  # the layer before is computed.
  options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
  if device.device_kind in _FAST_MEMORY:
    options["xla_tpu_scoped_vmem_limit_kib"] = str(_FAST_MEMORY[device.device_kind] * 2**10)
  return options
