"""Grounded captioning: a caption in which every object is followed by its box. There is no question."""

import dataclasses

from lyrics_jax.tasks.base import Task


@dataclasses.dataclass(unsafe_hash=True)
class GroundedCaption(Task):
  name: str = "grounded_caption"
  templates: tuple[str, ...] = (
      "Describe the image and give the box of each object that you mention.",
      "Write a caption in which every object is followed by its place in the image.",
      "What is in the picture, and where? Name the objects with their boxes.",
      "Caption this image with the coordinates of what you name.",
  )
