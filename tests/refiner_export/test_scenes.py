"""The made-up world: its pictures, objects and texts are exact, and splits have nothing in common."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from refiner_export.common.settings import UserError
from refiner_export.records.record import BOX_PLACEHOLDER
from refiner_export.sources import scene_layout, scene_texts
from refiner_export.sources.scene_layout import Thing, held_out
from refiner_export.sources.scene_shapes import COLOURS, SHAPES, TEXTURES, inside, pattern
from refiner_export.sources.scenes import SPLITS, Scenes

COUNT = 40


def scenes(**changes) -> Scenes:
  source = Scenes(**dict(count=COUNT) | changes)
  source.finalize("source")
  return source


def layout_of(source: Scenes, number: int) -> tuple[Thing, ...]:
  rules = scene_layout.Rules(source.objects, source.occlusion, source.split == "held_out")
  return scene_layout.draw_layout(source._streams(number)[0], rules, source.size)


def pixels(example) -> np.ndarray:
  with Image.open(io.BytesIO(example.pictures[0].read())) as image:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_fills_its_square(shape):
  x, y = np.meshgrid(np.linspace(-1.2, 1.2, 241), np.linspace(-1.2, 1.2, 241))
  mask = inside(shape, x, y)
  left, top, right, bottom = np.array(scene_layout.bounds(mask)) * 2.4 - 1.2
  assert -1.02 <= left < -0.8 and -1.02 <= top < -0.8 and 0.8 < right <= 1.02 and 0.75 < bottom <= 1.02
  others = [inside(other, x, y) for other in SHAPES if other != shape]
  assert all((mask != other).mean() > 0.03 for other in others)


def test_textures_differ():
  x, y = np.meshgrid(np.linspace(-1, 1, 50), np.linspace(-1, 1, 50))
  shares = [pattern(texture, x, y).mean() for texture in TEXTURES]
  assert shares[0] == 0 and all(0.2 < share < 0.6 for share in shares[1:])


@pytest.mark.parametrize("background", ["plain", "photos"])
def test_the_same_bytes_every_time_and_in_any_order(background):
  source = scenes(background=background)
  examples = list(source.examples())
  again = list(scenes(background=background).read_slice(source.shards()[0], 5, 7))
  for first, second in zip(examples[5:7], again):
    assert first.pictures[0].read() == second.pictures[0].read()
    assert (first.id, first.captions, first.conversations) == (second.id, second.captions, second.conversations)
    assert first.pictures[0].text_boxes == second.pictures[0].text_boxes
  assert len({example.pictures[0].read() for example in examples}) == COUNT


def test_units_have_a_fixed_size_and_need_no_reading():
  units = scenes(count=10**8).shards()
  assert len(units) == 10**5 and {unit.count for unit in units} == {1000}
  assert scenes(count=2500).shards()[-1].count == 500
  [example] = scenes(count=10**8).read_slice(units[-1], 999, 1000)
  assert example.id == "train-0-99999999"


def test_boxes_and_masks_are_those_of_the_visible_pixels():
  source = scenes(size=64)
  for number in range(COUNT):
    example, things = source.example(number), layout_of(source, number)
    picture = example.pictures[0]
    assert 2 <= len(things) <= 8 and [found.tag for found in picture.objects] == [thing.shape for thing in things]
    masks = np.stack([found.mask() for found in picture.objects])
    assert masks.sum(0).max() == 1  # each pixel belongs to the uppermost object
    image = pixels(example)
    for found, mask, thing in zip(picture.objects, masks, things):
      left, top, right, bottom = (np.array(found.box) * 64).round().astype(int)
      outside = mask.copy()
      outside[top:bottom, left:right] = False
      assert not outside.any() and mask[top].any() and mask[bottom - 1].any()
      assert mask[:, left].any() and mask[:, right - 1].any()
      assert mask.sum() >= (1 - source.occlusion) * thing.whole_mask(64).sum()
      # The darkest of an object's colours is the one that it is named after.
      colour = np.array(COLOURS[thing.colour]) * thing.brightness
      assert np.abs(image[mask] - colour).max(-1).min() <= 1
    ground = image[~masks.any(0)]
    assert (ground.max(-1) == ground.min(-1)).all() and ground.min() > 100


def test_occlusion_is_bounded_and_happens():
  hidden = []
  for occlusion in (0.0, 0.4):
    source, shares = scenes(occlusion=occlusion, objects=(7, 8)), []
    for number in range(10):
      things = layout_of(source, number)
      for thing, mask in zip(things, scene_layout.visible_masks(things, source.size)):
        shares.append(1 - mask.sum() / thing.whole_mask(source.size).sum())
    assert max(shares) <= occlusion
    hidden.append(max(shares))
  assert hidden[0] == 0 and hidden[1] > 0.1


def test_splits_have_no_scene_and_held_out_scenes_have_new_combinations():
  assert sum(held_out(colour, shape) for colour in COLOURS for shape in SHAPES) == 8
  seen = {}
  for split in SPLITS:
    source = scenes(split=split)
    new = [[held_out(thing.colour, thing.shape) for thing in layout_of(source, number)] for number in range(COUNT)]
    assert all(any(found) == (split == "held_out") for found in new)
    seen[split] = {example.pictures[0].read() for example in source.examples()}
    said = " ".join(turn.text for example in source.examples() for conversation in example.conversations
                    for turn in conversation.turns)
    named = [pair for pair in re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", said) if held_out(*pair)]
    assert bool(named) == (split == "held_out")
  assert len(set.union(*seen.values())) == 3 * COUNT
  other = {example.pictures[0].read() for example in scenes(seed=1).examples()}
  assert not other & seen["train"]


def test_captions_count_every_object():
  things = (_thing("circle", "red"), _thing("circle", "red", size="large"), _thing("cross", "orange", x=0.9),
            _thing("cross", "orange", x=0.7))
  first, second, third = scene_texts.captions(things)
  assert first == "two red circles and two orange crosses."
  assert second == "a picture of a large red circle, a small red circle and two small orange crosses."
  assert third == "from left to right: a red circle, a red circle, an orange cross and an orange cross."


def test_an_object_is_referred_to_by_the_fewest_words_that_fit_it_alone():
  red, large, blue = _thing("circle", "red"), _thing("circle", "red", size="large"), _thing("star", "blue")
  things = red, large, blue
  assert scene_texts.refer(things, blue) == "star"
  assert scene_texts.refer(things, red) == "small circle"
  assert scene_texts.refer(things, blue, without="shape") == "blue object"
  assert scene_texts.refer(things, large, without="colour") == "large circle"
  assert scene_texts.refer((red, red), red) is None


def _thing(shape, colour, texture="plain", size="small", x=0.3, y=0.5) -> Thing:
  return Thing(shape, colour, texture, size, x if size == "small" else 0.6, y if size == "small" else 0.8, 0.08)


# --- every answer is checked against the layout, by rules that are written out once more here ---

def fits(words: str, things) -> list[int]:
  found = []
  for number, thing in enumerate(things):
    known = {thing.size, thing.texture, thing.colour, thing.shape, "object"}
    if set(words.split()) <= known:
      found.append(number)
  return found


def check_answer(question: str, answer: str, things) -> str:
  """The kind of the question."""
  if match := re.fullmatch(r"What (shape|colour) is the (.+)\?", question):
    [number] = fits(match[2], things)
    assert getattr(things[number], match[1]) == answer
    return match[1]
  if match := re.fullmatch(r"How many (.+) are there\?", question):
    words = match[1].replace("objects", "object")
    singular = words if words in ("cross",) else re.sub(r"(?<=cross)es$|s$", "", words)
    assert answer == str(len(fits(singular, things)))
    return "count"
  if match := re.fullmatch(r"Is there an? (.+)\?", question):
    assert answer == ("yes" if fits(match[1], things) else "no")
    return "presence"
  match = re.fullmatch(r"Is the (.+) (left of|right of|above|below) the (.+)\?", question)
  [first], [second] = fits(match[1], things), fits(match[3], things)
  across, down = things[first].x - things[second].x, things[first].y - things[second].y
  true = {"left of": across < 0, "right of": across > 0, "above": down < 0, "below": down > 0}[match[2]]
  assert answer == ("yes" if true else "no")
  return "relation"


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_true(split):
  source, kinds = scenes(split=split), []
  for number in range(COUNT):
    example, things = source.example(number), layout_of(source, number)
    picture = example.pictures[0]
    assert len(example.conversations) <= 12
    for conversation in example.conversations:
      question, answer = [turn.text for turn in conversation.turns]
      if conversation.task == "rec":
        [k] = fits(question.removeprefix("the "), things)
        box = picture.text_boxes[int(BOX_PLACEHOLDER.fullmatch(answer)[2])]
        assert box == picture.objects[k].box
      elif conversation.task == "region":
        box = picture.text_boxes[int(BOX_PLACEHOLDER.fullmatch(question)[2])]
        described = [thing for thing, found in zip(things, picture.objects) if found.box == box]
        assert fits(answer, described)
      else:
        assert conversation.task == "vqa"
        kinds.append(check_answer(question, answer, things))
  assert set(kinds) == {"shape", "colour", "count", "presence", "relation"}


@pytest.mark.parametrize("changes, message", [
    (dict(objects=(1, 4)), "source.objects=(1, 4) must be two ascending numbers from 2 to 8"),
    (dict(occlusion=1.0), "source.occlusion=1.0 must lie in [0, 1)"),
    (dict(size=8), "source.size=8: expected at least 32 pixels"),
    (dict(split="all"), "source.split"),
    (dict(count=0), "source.count=0 must be at least 1"),
    (dict(seed=-1), "source.seed=-1 must not be negative"),
])
def test_mistakes(changes, message):
  with pytest.raises(UserError) as error:
    scenes(**changes)
  assert message in str(error.value)
