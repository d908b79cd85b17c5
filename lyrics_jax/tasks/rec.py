"""Referring expression comprehension: the words for an object, its box as the answer."""

import dataclasses

from lyrics_jax.tasks.base import Task


@dataclasses.dataclass(unsafe_hash=True)
class Rec(Task):
  name: str = "rec"
  templates: tuple[str, ...] = (
      "Where is {tag}? Give its box.",
      "Find {tag} in the image and write down the box around it.",
      "Give the coordinates of {tag}.",
      "Which region of the image shows {tag}? Reply with one box.",
      "Locate {tag}.",
  )
