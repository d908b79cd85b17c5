"""Instruction families of stage 2 (paper section 3.4): how a record's bare text becomes what a user would say.

Records carry the name of the family and the bare text: the question of a VQA pair, the words of a referring expression,
`<box K>` of a region. A template's placeholder says what the bare text is in that family. The first template of a
family is the one that evaluation uses.
"""

import numpy as np

from refiner_export.common.settings import require

TEMPLATES: dict[str, tuple[str, ...]] = {
    "caption": (
        "Describe the image in one sentence.",
        "Write a short caption for this image.",
        "What does the picture show? Reply with one sentence.",
        "Sum up what can be seen here.",
        "Give a brief description of the photo.",
    ),
    "vqa": (
        "{question}",
        "{question} Answer with a word or a short phrase.",
        "Look at the image and reply briefly: {question}",
        "Question: {question} Short answer:",
    ),
    "text_vqa": (
        "Read the text in the image, then answer: {question}",
        "{question} The answer is written in the image.",
        "Use the words and numbers that you can read in the picture. {question}",
        "Question about the text in this image: {question} Short answer:",
    ),
    "grounded_caption": (
        "Describe the image and give the box of each object that you mention.",
        "Write a caption in which every object is followed by its place in the image.",
        "What is in the picture, and where? Name the objects with their boxes.",
        "Caption this image with the coordinates of what you name.",
    ),
    "rec": (
        "Where is {tag}? Give its box.",
        "Find {tag} in the image and write down the box around it.",
        "Give the coordinates of {tag}.",
        "Which region of the image shows {tag}? Reply with one box.",
        "Locate {tag}.",
    ),
    "region": (
        "What is at {box}?",
        "Describe the region {box} of the image.",
        "Write a short phrase for the object in {box}.",
        "Which thing does the box {box} enclose?",
    ),
    "multiple_choice": (
        "{question}",
        "{question} Reply with the letter of the option.",
        "Pick the option that fits the image. {question}",
        "Read the question and its options, then choose one. {question}",
    ),
    "dialogue": ("{question}",),
}


def instructions(task: str, text: str) -> list[str]:
  """The bare text in every template of a family. A task that `TEMPLATES` has not is a `UserError`."""
  require(task in TEMPLATES, f"unknown task {task!r} in a record; known tasks: {', '.join(TEMPLATES)}")
  return [template.format(question=text, tag=text, box=text) for template in TEMPLATES[task]]


def instruction(task: str, text: str, rng: np.random.Generator | None = None) -> str:
  """The user's turn of a family.

  Args:
    task: a key of `TEMPLATES`.
    text: the bare text; options of a multiple choice are part of it, as `(a) ... (b) ...`.
    rng: draws the template; None takes the first, as evaluation does.
  """
  said = instructions(task, text)
  return said[0 if rng is None else rng.integers(len(said))]
