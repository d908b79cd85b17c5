"""Visual question answering: a question, a word or a short phrase as the answer."""

import dataclasses

from lyrics_jax.tasks.base import Task


@dataclasses.dataclass(unsafe_hash=True)
class VQA(Task):
  name: str = "vqa"
  templates: tuple[str, ...] = (
      "{question}",
      "{question} Answer with a word or a short phrase.",
      "Look at the image and reply briefly: {question}",
      "Question: {question} Short answer:",
  )
