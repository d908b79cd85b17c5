"""How the turns of a conversation become the text that the language model reads.

`<image K>` in a text stands for the soft tokens of picture K. A template keeps these placeholders in their order.
"""

import dataclasses

from lyrics_jax.data.spatial import referred_pictures
from lyrics_jax.data.tokenizers import LLMTokenizer
from refiner_export.common.settings import Settings
from refiner_export.records.record import image_placeholder

VICUNA_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives "
                 "helpful, detailed, and polite answers to the user's questions.")


@dataclasses.dataclass(unsafe_hash=True)
class Template(Settings):
  """The base of all templates. Questions and answers are tokenised apart: a prompt has the ids that training saw."""

  def question(self, text: str, first: bool) -> str:
    """What stands before an answer. `first` says whether the question opens the conversation."""
    raise NotImplementedError

  def answer(self, text: str) -> str:
    """What the model is to say."""
    return text

  def end(self, tokenizer: LLMTokenizer) -> list[int]:
    """The ids that follow every answer and are trained as part of it."""
    raise NotImplementedError


@dataclasses.dataclass(unsafe_hash=True)
class VicunaV1(Template):
  """Vicuna v1.1: `{system} USER: {question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>`."""
  system_message: str = VICUNA_SYSTEM

  def question(self, text, first):
    asked = f"USER: {text} ASSISTANT:"
    return f"{self.system_message} {asked}" if first else asked

  def end(self, tokenizer):
    return [tokenizer.eos]


@dataclasses.dataclass(unsafe_hash=True)
class Plain(Template):
  """LLaVA's template of pre-training: the pictures, the answer and a newline. No word of a question, no `</s>`."""

  def question(self, text, first):
    return "".join(map(image_placeholder, referred_pictures(text)))

  def answer(self, text):
    return f"{text}\n"

  def end(self, tokenizer):
    return []
