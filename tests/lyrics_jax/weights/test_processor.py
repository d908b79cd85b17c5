"""The exported processor gives the tokens and pixels of training, and CLIP's own preprocessing the same pixels."""

import dataclasses
import sys

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from saved_run import make_run_config
from tokenizers import models, normalizers, pre_tokenizers

from lyrics_jax.data.spatial import parse_boxes
from lyrics_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD
from lyrics_jax.torch_model.processing_lyrics import LyricsProcessor, RefinerFeatures
from lyrics_jax.weights.formats import format_of

QUESTION = ["Where is <box 0.1>, the dog?"]
DIALOGUE = ["How many cats?", "Two.", "Where?", "At <box 0.0>.", "Sure?"]
VISUAL = ("image", "detection", "detection_mask", "masks", "masks_mask")
ANSWERED = ["How many cats?", "Two.", "Where?", "At <box 0.0>."]
ENDLESS = ["Tell me all.", "A cat " * 200, "More?", "No."]


@pytest.fixture(scope="module")
def make_pair(tokenizer_directory, tmp_path_factory):
  """The examples of training with these settings, and the processor that a directory exported from them has."""
  def make(stage="instruct", **changes):
    config = make_run_config(stage, "unused", tokenizer_directory, **changes)
    directory = tmp_path_factory.mktemp("processor")
    format_of(config).write_processor(directory)
    examples = config.data.rows.examples(config.data, config.fields, config.dimensions, config.stage.objectives)
    return examples, LyricsProcessor.from_pretrained(directory)
  return make


def same_sight(got, expected, row=0):
  """Pixels to float32's last bits, local tokens exactly; training pads to a fixed number of rows."""
  expected = {name: value[0] for name, value in expected.items() if name in VISUAL}  # of the only picture
  pixels = (expected["image"].astype(np.float64) / 255 - PIXEL_MEAN) / PIXEL_STD
  np.testing.assert_allclose(got["pixel_values"][row].numpy(), pixels.transpose(2, 0, 1), atol=1e-6)
  for name in ("detection", "masks"):
    count = got[name].shape[1]
    np.testing.assert_array_equal(got[f"{name}_mask"][row], expected[f"{name}_mask"][:count])
    np.testing.assert_array_equal(got[name][row], expected[name][:count])
    assert not expected[f"{name}_mask"][count:].any()


def same_ids(got, expected, row=0, names=("spatial", "instruction")):
  for name in names:
    ours, mask = expected[f"{name}_ids"].reshape(-1), expected[f"{name}_mask"].reshape(-1)
    np.testing.assert_array_equal(got[f"{name}_ids"][row][got[f"{name}_mask"][row]], ours[mask])


def same_conversation(got, expected, row=0):
  kept, mask = got["attention_mask"][row].bool(), expected["segments"] > 0
  assert not kept.any() or kept[kept.nonzero()[0, 0]:].all()  # padding is at the left only
  np.testing.assert_array_equal(got["input_ids"][row][kept], expected["ids"][mask])
  np.testing.assert_array_equal(got["image_slot"][row][kept], expected["slot"][mask])
  assert (got["image_slot"][row][~kept] == -1).all()
  if "labels" in got:
    ids, trained = expected["ids"][mask], expected["targets"][mask]
    np.testing.assert_array_equal(got["labels"][row][kept], np.where(trained, ids, -100))
    assert (got["labels"][row][~kept] == -100).all()


@pytest.mark.parametrize("changes", [
    {}, {"data__coordinates": "integer", "data__rows__spatial_to_llm": True},
    {"data__rows__spatial_to_llm": True, "data__spatial_length": 60, "data__caption_length": 5,
     "data__llm_length": 250},
    {"connector__spatial": False, "connector__instruction": False}, {"data__use_refiner": False},
], ids=lambda changes: ", ".join(name.split("__")[-1] for name in changes) or "default")
def test_conversations_as_in_training(make_pair, records, changes):
  examples, processor = make_pair(**changes)
  asked = [QUESTION, DIALOGUE]
  batch = processor(text=asked, refined=[record.picture for record in records[:2]])
  read = [name for name in ("spatial", "instruction") if f"{name}_ids" in examples.fields]
  for row, (record, texts) in enumerate(zip(records, asked)):
    expected = examples.prompt(record, texts)
    same_sight(batch, expected, row)
    same_ids(batch, expected, row, read)
    same_conversation(batch, expected, row)


@pytest.mark.parametrize("texts", [ANSWERED, ENDLESS])
def test_conversations_to_train_on(make_pair, records, texts):
  examples, processor = make_pair()
  same_conversation(processor(text=[texts], refined=records[0].picture), examples.prompt(records[0], texts))


def test_objects_that_leave_the_picture(make_pair, make_record):
  """A box that is mostly outside is no object; one that is partly outside is clipped."""
  outside = np.array([[-0.9, 0, 0.1, 1], [-0.1, 0.1, 0.6, 0.5], [0.2, 0.2, 0.2, 0.4], [0, 0, 1, 1]], np.float32)
  whole = make_record(3)
  picture = dataclasses.replace(whole.picture, boxes=outside, detection_boxes=np.tile(
      np.array([[0.0, 0.5, 0.4, 0.4], [-0.3, 0.5, 0.8, 0.4]], np.float32), (3, 1)))
  record = dataclasses.replace(whole, pictures=(picture,))
  examples, processor = make_pair(data__rows__spatial_to_llm=True)
  expected, got = examples.prompt(record, QUESTION), processor(text=QUESTION, refined=picture)
  assert not expected["masks_mask"][0, 0] and expected["masks_mask"][0, 1]
  same_sight(got, expected)
  same_ids(got, expected)
  same_conversation(got, expected)


def test_text_alone_and_pictures_without_refiner(make_pair, records, make_record):
  examples, processor = make_pair()
  expected = examples.prompt(make_record(0, pictures=0), ["Hi"])
  assert (expected["slot"] == -1).all()
  for got in (processor(text="Hi"), processor(text="Hi", refined=RefinerFeatures())):
    same_conversation(got, expected)
  image = records[1].picture.image
  blank = make_record(0, objects=0, rows=0)
  blank = dataclasses.replace(blank, pictures=(dataclasses.replace(blank.picture, image=image),))
  got = processor(images=image, text=["What?"])
  same_sight(got, examples.prompt(blank, ["What?"]))
  same_ids(got, examples.prompt(blank, ["What?"]))
  same_conversation(got, examples.prompt(blank, ["What?"]))


def test_pairs_as_in_stage_1(make_pair, records):
  examples, processor = make_pair("align")
  captions = [record.captions[0] for record in records]
  batch = processor(text=captions, refined=[record.picture for record in records])
  for row, record in enumerate(records):
    expected = examples(record, np.random.default_rng(0), augment=False)
    same_sight(batch, expected, row)
    same_ids(batch, expected, row, ("spatial", "caption"))
    mask = expected["caption_mask"]
    np.testing.assert_array_equal(batch["icg_ids"][row][batch["caption_mask"][row]], expected["icg_ids"][mask])
    hidden = expected["msp_targets"] >= 0  # the processor masks nothing
    spatial_mask = expected["spatial_mask"].reshape(-1)
    whole = np.where(hidden, expected["spatial_ids"], expected["msp_ids"]).reshape(-1)[spatial_mask]
    np.testing.assert_array_equal(batch["msp_ids"][row][batch["spatial_mask"][row]], whole)


def test_golden_ids(tmp_path):
  """A conversation and the MQ-Former's texts, word by word: the template, the picture's places, BOS and EOS."""
  words = ["<unk>", "<s>", "</s>", "A", "chat.", "USER:", "What?", "ASSISTANT:", "A", "cat.", "Sure?", "Yes.", "\n"]
  vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
  former = ("[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] [BOS] [MLM] <br> </br> <T> </T> <Bbox> </Box> "
            "what ? cat ( ) , . 0 1 000 500").split()
  make = lambda words, unk: transformers.PreTrainedTokenizerFast(tokenizer_object=word_level(words, unk))
  llm, mq_former = make(vocabulary, "<unk>"), make({word: index for index, word in enumerate(former)}, "[UNK]")
  llm.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"})
  processor = LyricsProcessor(llm, mq_former, image_size=4, image_mean=PIXEL_MEAN, image_std=PIXEL_STD,
                              use_refiner=True, feature_width=256, detection_rows=2, mask_rows=2, coordinates="decimal",
                              spatial_length=40, caption_length=8, llm_length=40, image_tokens=3,
                              system_message="A chat.", instruction_aware=True, spatial_to_mq_former=True,
                              spatial_to_llm=False)
  found = RefinerFeatures(tags=("cat",), boxes=np.array([[0, 0.5, 1, 1]], np.float32),
                          mask_features=np.ones((1, 256), np.float32))
  picture = Image.new("RGB", (5, 3), "red")
  batch = processor(images=picture, text=[["What?", "A cat.", "Sure?", "Yes."]], refined=found)
  said = lambda tokenizer, ids: tokenizer.convert_ids_to_tokens(ids)
  assert said(llm, batch["input_ids"][0]) == [
      "<s>", "A", "chat.", "USER:", "<unk>", "<unk>", "<unk>", "\n", "What?", "ASSISTANT:", "A", "cat.", "</s>",
      "USER:", "Sure?", "ASSISTANT:", "Yes.", "</s>"]
  assert batch["image_slot"][0].tolist() == [-1] * 4 + [0, 1, 2] + [-1] * 11
  trained = batch["labels"][0] != -100
  assert said(llm, batch["input_ids"][0][trained]) == ["A", "cat.", "</s>", "Yes.", "</s>"]
  assert said(mq_former, batch["instruction_ids"][0]) == ["[CLS]", "what", "?", "[SEP]"]
  assert said(mq_former, batch["spatial_ids"][0]) == [
      "[BOS]", "<br>", "<T>", "cat", "</T>", "<Bbox>", *"( 0 . 000 , 0 . 500 ) , ( 1 . 000 , 1 . 000 )".split(),
      "</Box>", "</br>"]
  np.testing.assert_array_equal(batch["masks"][0, 0], [1] * 256 + [0.5, 0.75, 1, 0.5])


def word_level(vocabulary, unknown):
  """Words by spaces and line ends for the one, by punctuation and lower-cased for the other."""
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
  if unknown == "[UNK]":
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
  else:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")])
  tokenizer.add_special_tokens([word for word in vocabulary if word[0] in "[<" and len(word) > 1])
  return tokenizer


def test_pixels_equal_clip(make_pair):
  """CLIPImageProcessor on Pillow, told not to crop, within a hundredth of a grey level."""
  processor = make_pair(vision__image_size=224)[1]
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 333, 3), np.uint8))
  clip = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
  clip = clip(size={"height": 224, "width": 224}, do_center_crop=False)
  theirs = clip(picture, return_tensors="np")["pixel_values"][0]
  ours = processor(images=picture, text="What?")["pixel_values"][0].numpy()
  grey_level = 1 / 255 / np.array(PIXEL_STD)[:, None, None]
  assert np.abs((ours - theirs) / grey_level).max() < 1e-2


def test_any_kind_of_picture(make_pair):
  processor = make_pair()[1]
  pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  array, image = (processor(images=each, text="What?")["pixel_values"] for each in (pixels, Image.fromarray(pixels)))
  assert torch.equal(array, image)
  turned = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
  exif = turned.getexif()
  exif[0x0112] = 6  # turn by 270 degrees to see it upright
  assert torch.equal(processor(images=turned, text="What?")["pixel_values"], image)


def test_a_picture_of_the_models_own_size_needs_no_pillow(make_pair, monkeypatch):
  processor = make_pair()[1]
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
  expected = processor(images=picture, text="What?")["pixel_values"]
  size = processor.settings["image_size"]
  pixels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
  monkeypatch.setitem(sys.modules, "PIL", None)
  assert torch.equal(processor(images=pixels, text="What?")["pixel_values"], expected)
  assert processor(text="What?")["pixel_values"].shape == expected.shape  # and no picture at all
  for other in (pixels[1:], pixels.astype(np.float32), b"a file"):
    message = rf"pip install pillow. Without it, give uint8 arrays of shape \({size}, {size}, 3\)"
    with pytest.raises(ImportError, match=message):
      processor(images=other, text="What?")


@pytest.mark.parametrize("answer", ["at (0.125,0.5),(1.000,0.75)", "(125,500),(999,750) and (0.1,0.2),(0.3", "nowhere"])
def test_boxes_of_an_answer(answer):
  np.testing.assert_array_equal(LyricsProcessor.boxes(answer), parse_boxes(answer))


@pytest.mark.parametrize("call, message", [
    (dict(text=["a", "b"], images=[None]), "2 texts, 1 images and 2 refined"),
    (dict(text="where is <box 3>?"), "refers to <box 3>, but there are 0 text_boxes"),
    (dict(text="long " * 400), r"takes \d+ tokens, there is room for 320"),
    (dict(text="a", return_tensors="np"), "read PyTorch's tensors"),
    (dict(text=["a", ["b", "c"]]), "all of the conversations end with a question, or all with an answer"),
    (dict(text="a", refined=RefinerFeatures(mask_features=np.ones((1, 8)), boxes=np.ones((1, 4)))), "8 wide"),
])
def test_mistakes(make_pair, call, message):
  with pytest.raises(ValueError, match=message):
    make_pair()[1](**call)
