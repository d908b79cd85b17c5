"""Multiple-choice visual question answering: the question holds its options, as `(a) ... (b) ...`."""

import dataclasses

from lyrics_jax.tasks.base import Task


@dataclasses.dataclass(unsafe_hash=True)
class MultipleChoice(Task):
  name: str = "multiple_choice"
  templates: tuple[str, ...] = (
      "{question}",
      "{question} Reply with the option, its letter included.",
      "Pick the option that fits the image. {question}",
      "Read the question and its options, then choose one. {question}",
  )
