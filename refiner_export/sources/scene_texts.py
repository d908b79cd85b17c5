"""What can truly be said and asked about a made-up scene.

An object is referred to by the fewest words that fit no other object of the scene, such as "the red circle" or "the
small striped square". A question is left out where no such words exist.
"""

import collections
import itertools
from collections.abc import Sequence

import numpy as np

from refiner_export.records.record import Conversation
from refiner_export.sources.base import SourceObject, TextBoxes, ask
from refiner_export.sources.scene_layout import Thing, held_out
from refiner_export.sources.scene_shapes import COLOURS, SHAPES

APART = 0.12  # how far apart two centres must be, at least, for "left of" and "above"

_RELATIONS = ("left of", "right of", "above", "below")
_ADJECTIVES = ("size", "texture", "colour")  # in the order in which English has them
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_REFERRED = 3  # objects of a scene that referring expressions are made for, at most


def name(thing: Thing, adjectives: Sequence[str], noun: bool = True) -> str:
  """Such as "small red circle"; without the noun "small red object"."""
  words = []
  for adjective in _ADJECTIVES:
    if adjective in adjectives:
      words.append(getattr(thing, adjective))
  return " ".join([*words, thing.shape if noun else "object"])


def refer(things: Sequence[Thing], thing: Thing, without: str = "") -> str | None:
  """The fewest words that fit this object alone; None where there are none.

  Args:
    without: a word that may not be used, because it is asked for: "colour", "shape" or "".
  """
  usable = []
  for adjective in reversed(_ADJECTIVES):  # a colour is said rather than a texture
    if adjective != without:
      usable.append(adjective)
  for count in range(len(usable) + 1):
    for adjectives in itertools.combinations(usable, count):
      words = name(thing, adjectives, without != "shape")
      fitting = 0
      for other in things:
        fitting += name(other, adjectives, without != "shape") == words
      if fitting == 1:
        return words
  return None


def captions(things: Sequence[Thing]) -> tuple[str, ...]:
  """Three sentences about all objects: by colour and shape, by size too, and in their order in the picture.

  The first two name the objects in a fixed order, so that a mirrored picture does not belie them.
  """
  in_order = []
  for thing in sorted(things, key=_across):
    in_order.append(_with_article(name(thing, ("colour",))))
  return (f"{_listed(things, ('colour',))}.", f"a picture of {_listed(things, ('size', 'colour'))}.",
          f"from left to right: {_joined(in_order)}.")


def conversations(things: Sequence[Thing], objects: Sequence[SourceObject], boxes: TextBoxes,
                  rng: np.random.Generator, new: bool) -> list[Conversation]:
  """Questions of every kind with exact answers, at most twelve.

  Args:
    objects: the annotations of `things`, in the same order.
    boxes: collects the boxes that texts refer to.
    new: whether questions may name combinations that training scenes never show.
  """
  asked = _what_and_colour(things, rng)
  asked += _counts(things, rng)
  asked += _presence(things, rng, new)
  related = _related(things, rng)
  if related is not None:
    first, relation, second = related
    asked.append(ask("vqa", f"Is the {first} {relation} the {second}?", "yes"))
    asked.append(ask("vqa", f"Is the {second} {relation} the {first}?", "no"))
  asked += _places(things, objects, boxes, rng)
  return asked


def _listed(things: Sequence[Thing], adjectives: Sequence[str]) -> str:
  """Such as "two red circles, a blue square and a green star"."""
  names = collections.Counter()
  for thing in sorted(things, key=_order):
    names[name(thing, adjectives)] += 1
  parts = []
  for words, count in names.items():
    parts.append(_with_article(words) if count == 1 else f"{_NUMBERS[count]} {_plural(words)}")
  return _joined(parts)


def _joined(parts: Sequence[str]) -> str:
  return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def _with_article(words: str) -> str:
  return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _across(thing: Thing) -> float:
  return thing.x


def _order(thing: Thing) -> tuple:
  return list(COLOURS).index(thing.colour), SHAPES.index(thing.shape), thing.size


def _plural(words: str) -> str:
  return f"{words}es" if words.endswith("cross") else f"{words}s"


def _shuffled(things: Sequence[Thing], rng: np.random.Generator) -> list[Thing]:
  order = rng.permutation(len(things))
  return [things[k] for k in order]


def _related(things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str, str] | None:
  """Two objects with the relation that the first has to the second; a relation is drawn first, then a pair."""
  named = []
  for thing in _shuffled(things, rng):
    words = refer(things, thing)
    if words is not None:
      named.append((thing, words))
  relation = _RELATIONS[rng.integers(len(_RELATIONS))]
  for (first, first_words), (second, second_words) in itertools.permutations(named, 2):
    if _holds(relation, first, second):
      return first_words, relation, second_words
  return None


def _holds(relation: str, first: Thing, second: Thing) -> bool:
  right, down = first.x - second.x, first.y - second.y
  return {"left of": -right, "right of": right, "above": -down, "below": down}[relation] >= APART


def _what_and_colour(things: Sequence[Thing], rng: np.random.Generator) -> list[Conversation]:
  """One question for a shape and one for a colour."""
  asked = []
  for wanted, start in ("shape", "What shape is"), ("colour", "What colour is"):
    for thing in _shuffled(things, rng):
      words = refer(things, thing, without=wanted)
      if words is not None:
        asked.append(ask("vqa", f"{start} the {words}?", getattr(thing, wanted)))
        break
  return asked


def _counts(things: Sequence[Thing], rng: np.random.Generator) -> list[Conversation]:
  """How many objects there are, and how many of a colour or a shape; one in five of the latter asks for what is absent.

  Answers are digits.
  """
  asked = [ask("vqa", "How many objects are there?", str(len(things)))]
  attribute, words = (("colour", list(COLOURS)), ("shape", list(SHAPES)))[rng.integers(2)]
  present = collections.Counter(getattr(thing, attribute) for thing in things)
  absent = [word for word in words if word not in present]
  drawn = absent if rng.random() < 0.2 else sorted(present)
  word = drawn[rng.integers(len(drawn))]
  noun = f"{word} objects" if attribute == "colour" else _plural(word)
  asked.append(ask("vqa", f"How many {noun} are there?", str(present[word])))
  return asked


def _presence(things: Sequence[Thing], rng: np.random.Generator, new: bool) -> list[Conversation]:
  """Is there such an object? Once yes, once no. For every second "no", the scene has the colour and the shape apart."""
  present, absent, near = set(), [], []
  colours, shapes = set(), set()
  for thing in things:
    present.add((thing.colour, thing.shape))
    colours.add(thing.colour)
    shapes.add(thing.shape)
  for colour in COLOURS:
    for shape in SHAPES:
      if (colour, shape) not in present and (new or not held_out(colour, shape)):
        (near if colour in colours and shape in shapes else absent).append((colour, shape))
  asked = []
  drawn = near if near and rng.random() < 0.5 else absent
  for pairs, answer in (sorted(present), "yes"), (drawn, "no"):
    colour, shape = pairs[rng.integers(len(pairs))]
    asked.append(ask("vqa", f"Is there {_with_article(f'{colour} {shape}')}?", answer))
  return asked


def _places(things: Sequence[Thing], objects: Sequence[SourceObject], boxes: TextBoxes,
            rng: np.random.Generator) -> list[Conversation]:
  """Referring expressions with their boxes, and the words for one box."""
  asked, order = [], rng.permutation(len(things))
  for k in order:
    words = refer(things, things[k])
    if words is not None and len(asked) < _REFERRED:
      asked.append(ask("rec", f"the {words}", boxes.placeholder(objects[k].box)))
  described = order[0]
  asked.append(ask("region", boxes.placeholder(objects[described].box), name(things[described], _ADJECTIVES)))
  return asked
