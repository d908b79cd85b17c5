import dataclasses
import re

import numpy as np
import pytest

from lyrics_jax.data.images import View, mentions_side
from lyrics_jax.data.instruct_examples import InstructExamples
from lyrics_jax.data.loader import make_examples
from lyrics_jax.data.spatial import format_object, parse_boxes
from refiner_export.records.record import RecordError

VQA, REC, REGION, CAPTION, TEXT_VQA, GROUNDED, CHOICE, DIALOGUE = range(8)


@pytest.fixture
def maker(make_config):
  return lambda **changes: make_examples(make_config(stage="instruct", **changes))


def said(maker: InstructExamples, example) -> str:
  return maker.llm_tokenizer.decode(example["llm_ids"][example["llm_mask"] & (example["image_slot"] < 0)])


def answer(maker: InstructExamples, example) -> str:
  return maker.llm_tokenizer.decode(example["llm_ids"][example["llm_targets"]])


def test_shapes(maker, records):
  example = maker()((records[0], VQA), np.random.default_rng(0))
  assert {name: (a.dtype.name, a.shape) for name, a in example.items() if name != "id"} == {
      "image": ("uint8", (28, 28, 3)),
      "detection": ("float32", (8, 260)), "detection_mask": ("bool", (8,)),
      "masks": ("float32", (5, 260)), "masks_mask": ("bool", (5,)),
      "spatial_ids": ("int32", (192,)), "spatial_mask": ("bool", (192,)),
      "instruction_ids": ("int32", (24,)), "instruction_mask": ("bool", (24,)),
      "llm_ids": ("int32", (320,)), "llm_mask": ("bool", (320,)), "llm_targets": ("bool", (320,)),
      "image_slot": ("int32", (320,))}
  assert example["image_slot"].max() == 3 and example["id"] == "picture-0"


def test_unaugmented_conversations(maker, records):
  examples, record = maker(), records[0]
  make = lambda index: examples((record, index), np.random.default_rng(0), augment=False)
  assert said(examples, make(VQA)).endswith("\nHow many cats are there? ASSISTANT: two")
  rec = make(REC)
  assert "\nWhere is the red ball? Give its box. ASSISTANT:<Bbox>" in said(examples, rec)
  np.testing.assert_allclose(parse_boxes(answer(examples, rec)), record.text_boxes[:1], atol=5.1e-4)
  np.testing.assert_allclose(parse_boxes(said(examples, make(REGION))), record.text_boxes[:1], atol=5.1e-4)
  np.testing.assert_allclose(parse_boxes(answer(examples, make(GROUNDED))), record.text_boxes[::-1], atol=5.1e-4)
  assert answer(examples, make(CAPTION)) == "A cat plays with a ball."
  assert answer(examples, make(DIALOGUE)).startswith("A dog. Yes, very. At <Bbox> (")


def test_instruction_for_the_mq_former(maker, records):
  examples = maker()
  tokenizer = examples.mq_former_tokenizer
  ids = lambda example: example["instruction_ids"][example["instruction_mask"]].tolist()
  vqa = examples((records[0], VQA), np.random.default_rng(0), augment=False)
  assert ids(vqa) == [tokenizer.cls, *tokenizer.encode("How many cats are there?"), tokenizer.sep]
  unaware = maker(instruct={"instruction_aware": False})((records[0], VQA), np.random.default_rng(0))
  assert ids(unaware) == [tokenizer.cls, tokenizer.sep]


@pytest.mark.parametrize("to_mq_former", [False, True])
@pytest.mark.parametrize("to_llm", [False, True])
def test_where_the_spatial_representation_goes(maker, records, to_mq_former, to_llm):
  examples = maker(instruct={"spatial_to_mq_former": to_mq_former, "spatial_to_llm": to_llm})
  example = examples((records[0], VQA), np.random.default_rng(0), augment=False)
  assert (example["spatial_mask"].sum() > 1) == to_mq_former
  first = format_object(records[0].tags[0], records[0].boxes[0], "decimal")
  assert (f"\n{first}" in said(examples, example)) == to_llm
  assert said(examples, example).endswith("\nHow many cats are there? ASSISTANT: two")


def test_what_is_asked_about_is_written_first(maker, records):
  """The room for objects is limited, so the one in question must not be what is left out."""
  examples = maker(instruct={"spatial_to_llm": True})
  written = lambda text: [tag for tag in re.findall(r"<T> (.*?) </T>", said(examples, examples.prompt(records[0], [text])))]
  in_order = written("What is there?")
  assert in_order == list(records[0].tags[:len(in_order)]) and len(in_order) >= 2
  asked = records[0].tags[-1]
  assert written(f"Where is the {asked.upper()}?")[:2] == [asked, in_order[0]]
  assert written(f"Where are the {asked}s?") == in_order  # another word


def test_a_referred_box_stays_in_view(maker, records):
  examples = maker(data={"crop_scale": (0.1, 0.3)})
  moved = set()
  for record in records:
    for seed in range(10):
      rng = np.random.default_rng(seed)
      view = examples._sample_view(record, record.conversations[GROUNDED], rng)
      boxes, visible = view.boxes_xyxy(record.text_boxes)
      assert visible.all()
      moved.add(view == View())
      written = parse_boxes(answer(examples, examples((record, GROUNDED), np.random.default_rng(seed))))
      np.testing.assert_allclose(written, boxes[::-1], atol=5.1e-4)
  assert moved == {True, False}  # some pairs of boxes fit no small crop: then the whole picture


def test_sides_and_writing_are_never_mirrored(maker, records):
  examples = maker()
  for index, conversation in enumerate(records[0].conversations):
    flips = [examples._sample_view(records[0], conversation, np.random.default_rng(seed)).flip for seed in range(40)]
    fixed = index == TEXT_VQA or any(mentions_side(turn.text) for turn in conversation.turns)
    assert any(flips) != fixed
  assert mentions_side(records[0].conversations[DIALOGUE].turns[0].text)


def test_prompt_is_the_beginning_of_training(maker, records):
  examples = maker()
  trained = examples((records[0], REGION), np.random.default_rng(0), augment=False)
  prompt = examples.prompt(records[0], ["What is at <box 0>?"])
  assert prompt.keys() == trained.keys() and not prompt["llm_targets"].any()
  count = prompt["llm_mask"].sum()
  np.testing.assert_array_equal(prompt["llm_ids"][:count], trained["llm_ids"][:count])
  for name in ("image", "detection", "masks", "spatial_ids", "instruction_ids", "image_slot"):
    np.testing.assert_array_equal(prompt[name], trained[name])
  assert said(examples, examples.prompt(records[0], ["a", "b", "c"])).endswith("\na ASSISTANT: b USER: c ASSISTANT:")


def test_text_without_a_picture(maker, records):
  examples = maker()
  example = examples((dataclasses.replace(records[0], image=b""), VQA), np.random.default_rng(0), augment=False)
  assert not example["image"].any() and (example["image_slot"] == -1).all()
  assert said(examples, example).endswith(" USER: How many cats are there? ASSISTANT: two")


def test_without_the_refiner_all_is_blank(maker, records):
  examples = maker(model={"use_refiner": False}, instruct={"spatial_to_llm": True})
  example = examples((records[0], VQA), np.random.default_rng(0))
  assert not example["detection_mask"].any() and not example["masks_mask"].any()
  assert example["spatial_mask"].sum() == 1 and "<br>" not in said(examples, example)


def test_errors_name_the_record(maker, make_record):
  record = make_record(7, conversations=(("ocr", ("Read.", "STOP")),))
  with pytest.raises(RecordError, match="record picture-7: unknown task 'ocr'"):
    maker()((record, 0), np.random.default_rng(0))
  with pytest.raises(RecordError, match="record picture-7: the text .* refers to <box 9>, but there are 2"):
    maker().prompt(record, ["Find <box 9>"])
