import dataclasses
import re

import numpy as np
import pytest

from lyrics_jax.data.conversations import ConversationExamples, Conversations, ConversationSource
from lyrics_jax.data.spatial import format_object, parse_boxes
from lyrics_jax.data.templates import Plain
from lyrics_jax.data.views import View
from lyrics_jax.tasks import TASKS, Task, find_task, mentions_side
from refiner_export.common.settings import UserError
from refiner_export.records.record import RecordError, conversation_items

VQA, REC, REGION, CAPTION, TEXT_VQA, GROUNDED, CHOICE, DIALOGUE = range(8)


@pytest.fixture
def maker(make_run):
  """`maker(names, pictures, **changes)`: examples of `Conversations(**changes)`; other settings in `data`."""

  def make(names=None, data=None, **changes):
    return make_run(Conversations(**changes), names, **data or {}).examples

  return make


def said(maker: ConversationExamples, example) -> str:
  return maker.tokenizers.llm.decode(example["ids"][(example["segments"] > 0) & (example["slot"] < 0)])


def answer(maker: ConversationExamples, example) -> str:
  return maker.tokenizers.llm.decode(example["ids"][example["targets"]])


def heard(maker: ConversationExamples, example, picture=0) -> str:
  """What the MQ-Former reads of the question."""
  return maker.tokenizers.former.decode(example["instruction_ids"][picture][example["instruction_mask"][picture]])


def seen(maker: ConversationExamples, example, picture=0) -> np.ndarray:
  """The boxes of the spatial representation that the MQ-Former reads."""
  ids = example["spatial_ids"][picture][example["spatial_mask"][picture]]
  return parse_boxes(maker.tokenizers.former.decode(ids).replace(" ", ""))


def test_shapes(maker, records):
  example = maker()((records[0], VQA), np.random.default_rng(0))
  assert example.pop("record") == "picture-0"
  assert {name: (a.dtype.name, a.shape) for name, a in example.items()} == {
      "image": ("uint8", (1, 28, 28, 3)), "picture_mask": ("bool", (1,)),
      "detection": ("float32", (1, 8, 260)), "detection_mask": ("bool", (1, 8)),
      "masks": ("float32", (1, 5, 260)), "masks_mask": ("bool", (1, 5)),
      "spatial_ids": ("int32", (1, 192)), "spatial_mask": ("bool", (1, 192)),
      "instruction_ids": ("int32", (1, 24)), "instruction_mask": ("bool", (1, 24)),
      "ids": ("int32", (320,)), "segments": ("int32", (320,)), "targets": ("bool", (320,)), "slot": ("int32", (320,))}
  assert example["slot"].max() == 3 and example["picture_mask"].all()


def test_unaugmented_conversations(maker, records):
  examples, record = maker(), records[0]
  make = lambda index: examples((record, index), np.random.default_rng(0), augment=False)
  assert said(examples, make(VQA)).endswith("\nHow many cats are there? ASSISTANT: two")
  rec = make(REC)
  assert "\nWhere is the red ball? Give its box. ASSISTANT:<Bbox>" in said(examples, rec)
  np.testing.assert_allclose(parse_boxes(answer(examples, rec)), record.picture.text_boxes[:1], atol=5.1e-4)
  np.testing.assert_allclose(parse_boxes(said(examples, make(REGION))), record.picture.text_boxes[:1], atol=5.1e-4)
  grounded = parse_boxes(answer(examples, make(GROUNDED)))
  np.testing.assert_allclose(grounded, record.picture.text_boxes[::-1], atol=5.1e-4)
  assert answer(examples, make(CAPTION)) == "A cat plays with a ball."
  assert answer(examples, make(DIALOGUE)).startswith("A dog. Yes, very. At <Bbox> (")


def test_captions_are_conversations_too(maker, records):
  examples, record = maker(), records[0]
  items = conversation_items(record)
  assert len(items) == len(record.conversations) + len(record.captions)
  for index, caption in enumerate(record.captions, start=len(record.conversations)):
    example = examples((record, index), np.random.default_rng(0), augment=False)
    assert answer(examples, example) == caption
    assert "Describe the image in one sentence." in said(examples, example)


def test_instruction_for_the_mq_former(maker, records):
  examples = maker()
  tokenizer = examples.tokenizers.former
  example = examples((records[0], VQA), np.random.default_rng(0), augment=False)
  ids = example["instruction_ids"][example["instruction_mask"]].tolist()
  assert ids == [tokenizer.cls, *tokenizer.encode("How many cats are there?"), tokenizer.sep]


def test_only_fields_that_are_read_are_made(maker, records):
  """LLaVA reads no text and no local token beside the conversation, and needs no tokenizer of an MQ-Former."""
  names = ("image", "ids", "segments", "targets", "slot")
  examples = maker(names, data={"mq_former_tokenizer": ""})
  example = examples((records[0], VQA), np.random.default_rng(0))
  assert set(example) == {"record", *names} and examples.tokenizers.former is None
  with pytest.raises(UserError, match="^config.data.mq_former_tokenizer is empty: name a tokenizer directory"):
    maker(data={"mq_former_tokenizer": ""})
  with pytest.raises(UserError, match="^config.data.rows=Conversations makes no field 'caption_ids'"):
    maker(("ids", "caption_ids"))


@pytest.mark.parametrize("to_llm", [False, True])
def test_whether_the_language_model_reads_objects(maker, records, to_llm):
  examples = maker(spatial_to_llm=to_llm)
  example = examples((records[0], VQA), np.random.default_rng(0), augment=False)
  first = format_object(records[0].picture.tags[0], records[0].picture.boxes[0], "decimal")
  assert (f"\n{first}" in said(examples, example)) == to_llm
  assert said(examples, example).endswith("\nHow many cats are there? ASSISTANT: two")


def test_what_is_asked_about_is_written_first(maker, records):
  """The room for objects is limited, so the one in question must not be what is left out."""
  examples = maker(spatial_to_llm=True)

  def written(text):
    return re.findall(r"<T> (.*?) </T>", said(examples, examples.prompt(records[0], [text])))

  in_order = written("What is there?")
  assert in_order == list(records[0].picture.tags[:len(in_order)]) and len(in_order) >= 2
  asked = records[0].picture.tags[-1]
  assert written(f"Where is the {asked.upper()}?")[:2] == [asked, in_order[0]]
  assert written(f"Where are the {asked}s?") == in_order  # another word


def view_of(examples, record, index, seed):
  """The view under which conversation `index` of a record of one picture is seen."""
  conversation = record.conversations[index]
  texts, task = [turn.text for turn in conversation.turns], find_task(examples.rows.tasks, conversation.task)
  (shown,) = examples._look(record, texts, task, np.random.default_rng(seed))
  return shown.view


def test_a_referred_box_stays_in_view(maker, records):
  examples = maker(data={"crop_scale": (0.1, 0.3)})
  moved = set()
  for record in records:
    for seed in range(10):
      view = view_of(examples, record, GROUNDED, seed)
      boxes, visible = view.boxes_xyxy(record.picture.text_boxes)
      assert visible.all()
      moved.add(view == View())
      written = parse_boxes(answer(examples, examples((record, GROUNDED), np.random.default_rng(seed))))
      np.testing.assert_allclose(written, boxes[::-1], atol=5.1e-4)
  assert moved == {True, False}  # some pairs of boxes fit no small crop: then the whole picture


def test_sides_and_writing_are_never_mirrored(maker, records):
  examples = maker()
  for index, conversation in enumerate(records[0].conversations):
    flips = [view_of(examples, records[0], index, seed).flip for seed in range(40)]
    fixed = index == TEXT_VQA or any(mentions_side(turn.text) for turn in conversation.turns)
    assert any(flips) != fixed
  assert mentions_side(records[0].conversations[DIALOGUE].turns[0].text)


def test_a_task_of_a_user(maker, make_record):
  """A task from outside of the packages: its templates, and pictures that stay whole."""

  @dataclasses.dataclass(unsafe_hash=True)
  class Counting(Task):
    name: str = "counting"
    templates: tuple[str, ...] = ("Count: {question}", "How many? {question}")
    crop: bool = False
    flip: bool = False

  examples = maker(tasks=(*TASKS, Counting()))
  record = make_record(7, conversations=(("counting", ("cats", "3")), ("vqa", ("Who?", "a cat"))))
  heard_texts = set()
  for seed in range(30):
    example = examples((record, 0), np.random.default_rng(seed))
    heard_texts.add(heard(examples, example))
    assert view_of(examples, record, 0, seed) == View() and answer(examples, example) == "3"
  assert len(heard_texts) == 2
  with pytest.raises(UserError, match=r"^config\.data\.rows\.tasks: two tasks are named 'vqa': keep one"):
    maker(tasks=(*TASKS, Task(name="vqa")))


def test_prompt_is_the_beginning_of_training(maker, records):
  examples = maker()
  trained = examples((records[0], REGION), np.random.default_rng(0), augment=False)
  prompt = examples.prompt(records[0], ["What is at <box 0.0>?"])
  assert prompt.keys() == trained.keys() and not prompt["targets"].any()
  count = prompt["segments"].sum()
  np.testing.assert_array_equal(prompt["ids"][:count], trained["ids"][:count])
  for name in ("image", "detection", "masks", "spatial_ids", "instruction_ids", "slot"):
    np.testing.assert_array_equal(prompt[name], trained[name])
  assert said(examples, examples.prompt(records[0], ["a", "b", "c"])).endswith("\na ASSISTANT: b USER: c ASSISTANT:")


def test_text_without_a_picture(maker, records):
  examples = maker()
  example = examples((dataclasses.replace(records[0], pictures=()), VQA), np.random.default_rng(0), augment=False)
  assert not example["picture_mask"].any() and not example["image"].any() and (example["slot"] == -1).all()
  assert not example["spatial_mask"].any() and not example["instruction_mask"].any()
  assert said(examples, example).endswith(" USER: How many cats are there? ASSISTANT: two")


def test_without_the_refiner_all_is_blank(maker, records):
  examples = maker(spatial_to_llm=True, data={"use_refiner": False})
  example = examples((records[0], VQA), np.random.default_rng(0))
  assert not example["detection_mask"].any() and not example["masks_mask"].any()
  assert example["spatial_mask"].sum() == 1 and "<br>" not in said(examples, example)


# --- several pictures ---

COMPARE = ("dialogue", (
    "<image 0>\nWhat is at <box 0.1>?", "A cat.", "<image 2>\nAnd at <box 2.0>?", "Like <box 0.0>."))


def test_each_picture_has_fields_of_its_own(maker, make_record):
  """A conversation about pictures 0 and 2 of a record of three; its fourth place stays empty."""
  examples = maker(data={"pictures": 3, "spatial_length": 96})
  record = make_record(7, pictures=3, conversations=(COMPARE,))
  example = examples((record, 0), np.random.default_rng(0), augment=False)
  assert example["image"].shape == (3, 28, 28, 3) and example["picture_mask"].tolist() == [True, True, False]
  alone = maker()
  for place, number in enumerate((0, 2)):
    single = alone.prompt(dataclasses.replace(record, pictures=record.pictures[number:number + 1]), ["x"])
    for name in ("image", "detection", "detection_mask", "masks", "masks_mask"):
      np.testing.assert_array_equal(example[name][place], single[name][0], err_msg=name)
    boxes = seen(examples, example, place)
    np.testing.assert_allclose(boxes, record.pictures[number].boxes[:len(boxes)], atol=5.1e-4)
    assert len(boxes) >= 1
  for name in ("image", "detection", "detection_mask", "masks_mask", "spatial_mask", "instruction_mask"):
    assert not example[name][2].any(), name


def test_slots_are_the_places_of_the_pictures(maker, make_record):
  examples = maker(data={"pictures": 3})
  record = make_record(7, pictures=3, conversations=(COMPARE,))
  example = examples((record, 0), np.random.default_rng(0), augment=False)
  slot = example["slot"]
  assert slot[slot >= 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]  # pictures 0 and 2 of the record are 0 and 1 of the row
  text = said(examples, example)
  boxes = [record.pictures[0].text_boxes[1], record.pictures[2].text_boxes[0], record.pictures[0].text_boxes[0]]
  np.testing.assert_allclose(parse_boxes(text), boxes, atol=5.1e-4)
  assert "image" not in text and not example["targets"][slot >= 0].any()


def test_the_mq_former_reads_the_question_in_which_a_picture_stands(maker, make_record):
  examples = maker(data={"pictures": 2})
  record = make_record(7, pictures=2, conversations=())
  example = examples.prompt(record, ["Who is <image 0> here?", "A cat.", "<image 1>\nAnd here?"])
  assert [heard(examples, example, k) for k in range(2)] == ["[CLS] who is here? [SEP]", "[CLS] and here? [SEP]"]
  example = examples.prompt(record, ["Who?", "A cat.", "And here?"])
  assert [heard(examples, example, k) for k in range(2)] == ["[CLS] who? [SEP]"] * 2


def test_pictures_in_front_stay_in_front_of_the_template(maker, make_record):
  examples = maker()
  texts = {
      "vqa": "<image 0>\nHow many?", "caption": "<image 0>", "multiple_choice": "<image 0> Which? (a) one (b) two"}
  record = make_record(7, conversations=[(task, (text, "x")) for task, text in texts.items()])
  plain = maker().prompt(record, ["How many?"])
  for index, task in enumerate(texts):
    for seed in range(8):
      example = examples((record, index), np.random.default_rng(seed))
      np.testing.assert_array_equal(example["slot"], plain["slot"], err_msg=task)
  assert "USER: \nDescribe the image" in re.sub(" +", " ", said(
      examples, examples((record, 1), np.random.default_rng(0), augment=False)))


def test_each_picture_is_viewed_on_its_own(maker, make_record):
  examples = maker(data={"pictures": 2})
  record = make_record(7, pictures=2, conversations=(("vqa", ("Alike?", "no")), ("vqa", ("On the left?", "no"))))
  task, rng = TASKS[1], np.random.default_rng(0)
  views = [[one.view for one in examples._look(record, ["Alike?", "no"], task, rng)] for _ in range(20)]
  assert all(first != second for first, second in views)
  assert any(first.flip != second.flip for first, second in views)
  assert not any(one.view.flip for _ in range(20) for one in examples._look(record, ["On the left?"], task, rng))


def test_objects_of_several_pictures_for_the_language_model(maker, make_record):
  examples = maker(spatial_to_llm=True, data={"pictures": 2, "llm_length": 900})
  record = make_record(7, pictures=2, objects=2)
  text = said(examples, examples.prompt(record, ["Which is larger?"]))
  written = parse_boxes(text)
  np.testing.assert_allclose(written, np.concatenate([picture.boxes for picture in record.pictures]), atol=5.1e-4)
  assert len(re.findall(r"</br> ?\n", text)) == 2  # one line for each picture


def test_too_many_pictures_is_one_line(maker, make_record):
  record = make_record(7, pictures=3, conversations=(("vqa", ("Alike?", "no")), ("vqa", ("<image 2>\nWhat?", "a cat"))))
  examples = maker(data={"pictures": 2})
  with pytest.raises(RecordError, match="^record picture-7: a conversation has 3 pictures, config.data.pictures=2: "):
    examples((record, 0), np.random.default_rng(0))
  assert examples((record, 1), np.random.default_rng(0))["picture_mask"].tolist() == [True, False]  # it names one alone


def test_the_plain_template(maker, make_record):
  """LLaVA's pre-training: captions alone, without a question."""
  examples = maker(("image", "ids", "segments", "targets", "slot"), template=Plain())
  record = make_record(7, conversations=(), captions=("A cat.", "A dog."))
  tokenizer = examples.tokenizers.llm
  for index, caption in enumerate(record.captions):
    example = examples((record, index), np.random.default_rng(0))
    ids = [tokenizer.bos, *[tokenizer.pad] * 4, *tokenizer.encode(f"{caption}\n")]
    assert example["ids"][example["segments"] > 0].tolist() == ids
    assert example["targets"].sum() == len(ids) - 5


def test_errors_name_the_record(maker, make_record):
  record = make_record(7, conversations=(("ocr", ("Read.", "STOP")),))
  with pytest.raises(RecordError, match="^record picture-7: unknown task 'ocr'"):
    maker()((record, 0), np.random.default_rng(0))
  two = maker(data={"pictures": 2})
  pair = make_record(7, pictures=2)
  for texts, message in (
      ("Find <box 0.9>", "a text refers to <box 0.9>, but there are 2 boxes in picture 0"),
      ("Find <box 5.0>", "a text refers to <box 5.0>, but picture 5 stands nowhere"),
      ("Find <box 1.0> in <image 0>", "a text refers to <box 1.0>, but picture 1 stands nowhere in the conversation"),
      ("See <image 2>", "a text refers to <image 2>, but there are 2 pictures"),
      ("Find <box 0>", r"the text 'Find <box 0>' has <box 0>, which names no picture: write <box 0\.0>")):
    with pytest.raises(RecordError, match=f"^record picture-7: {message}"):
      two.prompt(pair, [texts])


def test_records_without_conversations_are_passed_over(records, make_record):
  silent = [make_record(index, conversations=(), captions=()) for index in (0, 2)]
  source = ConversationSource(type(records)([silent[0], make_record(1), silent[1]]))
  assert [(record.id, index) for record, index in map(source.__getitem__, range(len(source)))] == [
      ("picture-1", index) for index in range(11)]
