"""Image captioning: one sentence about the picture. There is no question."""

import dataclasses

from lyrics_jax.tasks.base import Task


@dataclasses.dataclass(unsafe_hash=True)
class Caption(Task):
  name: str = "caption"
  templates: tuple[str, ...] = (
      "Describe the image in one sentence.",
      "Write a short caption for this image.",
      "What does the picture show? Reply with one sentence.",
      "Sum up what can be seen here.",
      "Give a brief description of the photo.",
  )
