"""Region description: a box, a phrase for what it shows as the answer."""

import dataclasses

from lyrics_jax.tasks.base import Task


@dataclasses.dataclass(unsafe_hash=True)
class Region(Task):
  name: str = "region"
  templates: tuple[str, ...] = (
      "What is at {box}?",
      "Describe the region {box} of the image.",
      "Write a short phrase for the object in {box}.",
      "Which thing does the box {box} enclose?",
  )
