"""Text-oriented visual question answering: the answer is written in the picture."""

import dataclasses

from lyrics_jax.tasks.base import Task


@dataclasses.dataclass(unsafe_hash=True)
class TextVQA(Task):
  name: str = "text_vqa"
  templates: tuple[str, ...] = (
      "Read the text in the image, then answer: {question}",
      "{question} The answer is written in the image.",
      "Use the words and numbers that you can read in the picture. {question}",
      "Question about the text in this image: {question} Short answer:",
  )
  crop: bool = False  # the writing must stay in the picture
  flip: bool = False  # mirrored writing cannot be read
