"""Names of parameters in checkpoints from before parameters were named after the parts of the model.

`renamed` translates a name of such a checkpoint. It leaves today's names as they are, so it may be applied to the names
of any checkpoint.
"""

# Old prefix -> new prefix. The first prefix that fits counts.
_PREFIXES = (
    ("perception/vision/", "vision/"),
    ("perception/mq_former/", "connector/former/"),
    ("perception/", "connector/"),
    ("projection/", "connector/projection/"),
)


def renamed(path: str) -> tuple[str, bool]:
  """Today's name of a stored parameter, and whether its last two axes must change places.

  A matrix [n, m] whose rows were split into heads was stored as `weight` [m, n]. Today every matrix is a `kernel` [n,
  m].
  """
  for old, new in _PREFIXES:
    if path.startswith(old):
      path = new + path.removeprefix(old)
      break
  module, _, leaf = path.rpartition("/")
  if leaf == "weight":
    return f"{module}/kernel", True
  if leaf == "weight_scale":
    return f"{module}/kernel_scale", False
  return path, False
