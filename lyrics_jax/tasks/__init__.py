"""The instruction families of stage 2 (paper section 3.3), one file each. NumPy alone."""

from lyrics_jax.tasks.base import Task, Utterance, find_task, mentions_side
from lyrics_jax.tasks.caption import Caption
from lyrics_jax.tasks.dialogue import Dialogue
from lyrics_jax.tasks.grounded_caption import GroundedCaption
from lyrics_jax.tasks.multiple_choice import MultipleChoice
from lyrics_jax.tasks.rec import Rec
from lyrics_jax.tasks.region import Region
from lyrics_jax.tasks.text_vqa import TextVQA
from lyrics_jax.tasks.vqa import VQA


def default_tasks() -> tuple[Task, ...]:
  """New values of all tasks. Settings are assignable, so two configurations must not share them."""
  return Caption(), VQA(), TextVQA(), GroundedCaption(), Rec(), Region(), MultipleChoice(), Dialogue()


TASKS = default_tasks()

__all__ = ["TASKS", "Task", "Utterance", "default_tasks", "find_task", "mentions_side"]
