"""Referential dialogue: free conversation about pictures, in which texts may hold boxes."""

import dataclasses

from lyrics_jax.tasks.base import Task


@dataclasses.dataclass(unsafe_hash=True)
class Dialogue(Task):
  name: str = "dialogue"
  templates: tuple[str, ...] = ("{question}",)
