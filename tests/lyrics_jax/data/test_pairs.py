import dataclasses

import numpy as np
import pytest

from lyrics_jax.data.mq_former_text import encode_objects
from lyrics_jax.data.pictures import PictureInputs
from lyrics_jax.data.spatial import format_object, parse_boxes
from lyrics_jax.data.tokenizers import load_mq_former_tokenizer
from lyrics_jax.data.views import View
from lyrics_jax.objectives.msp import mask_objects
from refiner_export.common.boxes import to_cxcywh
from refiner_export.common.settings import UserError
from refiner_export.records.record import RecordError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory):
  return load_mq_former_tokenizer(f"{tokenizer_directory}/mq_former")


@pytest.fixture
def make_example(make_run):
  """The arrays without the pictures axis of 1."""

  def make(record, seed=0, augment=True, **changes):
    example = make_run(**changes).examples(record, np.random.default_rng(seed), augment)
    visual = ("image", "detection", "detection_mask", "masks", "masks_mask")
    for name in (*visual, "spatial_ids", "spatial_mask", "msp_ids", "msp_targets"):
      (example[name],) = example[name]
    return example

  return make


def test_shapes(make_run, records):
  run = make_run()
  example = run.examples(records[0], np.random.default_rng(0))
  assert example.pop("record") == "picture-0"
  assert {name: (a.dtype.name, a.shape) for name, a in example.items()} == {
      "image": ("uint8", (1, 28, 28, 3)),
      "detection": ("float32", (1, 8, 260)), "detection_mask": ("bool", (1, 8)),
      "masks": ("float32", (1, 5, 260)), "masks_mask": ("bool", (1, 5)),
      "spatial_ids": ("int32", (1, 192)), "spatial_mask": ("bool", (1, 192)),
      "msp_ids": ("int32", (1, 192)), "msp_targets": ("int32", (1, 192)),
      "caption_ids": ("int32", (24,)), "caption_mask": ("bool", (24,)), "icg_ids": ("int32", (24,))}
  for name, array in example.items():
    assert array.shape == run.fields[name].example_shape(run.dimensions)


def test_unaugmented_text(make_example, records, tokenizer):
  record, example = records[0], make_example(records[0], augment=False)
  whole = "".join(format_object(tag, box, "decimal") for tag, box in zip(record.picture.tags, record.picture.boxes))
  ids = example["spatial_ids"][example["spatial_mask"]].tolist()
  assert ids == [tokenizer.bos, *tokenizer.encode(whole)]
  assert (example["spatial_ids"][~example["spatial_mask"]] == tokenizer.pad).all()
  caption = [tokenizer.cls, *tokenizer.encode(record.captions[0]), tokenizer.sep]
  assert example["caption_ids"][example["caption_mask"]].tolist() == caption
  assert example["icg_ids"][example["caption_mask"]].tolist() == [tokenizer.dec, *caption[1:]]


def test_only_whole_objects_are_written(tokenizer, make_record):
  record = make_record(0, objects=9)
  objects = list(zip(record.picture.tags, record.picture.boxes))
  for length in range(1, 200, 7):
    ids, owners = encode_objects(tokenizer, objects, "decimal", length)
    count = max(owners) + 1
    assert len(ids) == len(owners) <= length and ids[0] == tokenizer.bos
    whole = "".join(format_object(tag, box, "decimal") for tag, box in objects[:count])
    assert ids[1:] == tokenizer.encode(whole)


def test_long_captions_keep_their_end_mark(make_example, make_record, tokenizer):
  example = make_example(make_record(0, captions=("A cat " * 40,)))
  assert example["caption_mask"].all() and example["caption_ids"][-1] == tokenizer.sep


def test_masking_hides_whole_objects_and_nothing_else(make_example, records, tokenizer):
  markers = {tokenizer.bos, tokenizer.pad, *tokenizer.spatial}
  open_box, close_box = tokenizer.spatial[4:]
  some = False
  for seed in range(60):
    example = make_example(records[seed % 6], seed)
    ids, msp, targets = example["spatial_ids"], example["msp_ids"], example["msp_targets"]
    hidden = targets >= 0
    assert msp[0] == tokenizer.mlm
    some = some or hidden.any()
    assert (msp[hidden] == tokenizer.mask).all() and (targets[hidden] == ids[hidden]).all()
    assert (msp[1:] == ids[1:])[~hidden[1:]].all()
    assert not hidden[np.isin(ids, list(markers))].any()
    ends = np.flatnonzero(ids == tokenizer.spatial[1])
    starts = np.flatnonzero(ids == tokenizer.spatial[0])
    for start, end in zip(starts, ends):
      content = ~np.isin(ids[start:end], list(markers))
      assert len(set(hidden[start:end][content])) == 1  # the tag and all four coordinates, or nothing
      opened, closed = (start + np.flatnonzero(ids[start:end] == marker)[0] for marker in (open_box, close_box))
      box = slice(opened + 1, closed)
      assert len(parse_boxes(tokenizer.decode(ids[box]).replace(" ", ""))) == 1
      assert hidden[box].all() == hidden[box].any()
  assert some


@pytest.mark.parametrize("objects", [1, 2, 20])
def test_masking_rate(objects):
  """The share of masked objects is the probability, however few there are; a forced object raises it."""
  rng = np.random.default_rng(0)
  owners = np.concatenate([[-1], np.repeat(np.arange(objects), 3), [-1]])
  rates = {}
  for at_least_one in (False, True):
    drawn = [mask_objects(owners, 0.15, at_least_one, rng).sum() / (3 * objects) for _ in range(4000)]
    rates[at_least_one] = np.mean(drawn)
  assert rates[False] == pytest.approx(0.15, abs=0.02)
  assert rates[True] == pytest.approx(0.15 + 0.85 ** objects / objects, abs=0.02)
  assert not mask_objects(owners, 0.0, False, rng).any()
  assert mask_objects(owners, 0.0, True, rng).sum() == 3
  assert not mask_objects(np.array([-1]), 0.15, True, rng).any()


def test_local_tokens_follow_the_view(make_run, make_record):
  run, picture = make_run(), make_record(1, objects=7, rows=12).picture
  view = View(0.3, 0.2, 0.9, 0.8, flip=True)
  seen = PictureInputs(run.data, run.fields, run.dimensions).arrays(picture, view)
  boxes, visible = view.boxes_cxcywh(picture.detection_boxes)
  assert seen["detection_mask"].tolist() == visible[:8].tolist()
  np.testing.assert_array_equal(seen["detection"][visible[:8]],
                                np.concatenate([picture.detection_features, boxes], axis=1)[:8][visible[:8]])
  assert not seen["detection"][~seen["detection_mask"]].any()
  corners, visible = view.boxes_xyxy(picture.boxes)
  assert seen["masks_mask"].tolist() == visible[:5].tolist() and 0 < visible[:5].sum() < 5
  np.testing.assert_array_equal(seen["masks"][seen["masks_mask"]][:, 256:], to_cxcywh(corners)[:5][visible[:5]])


def test_only_fields_that_are_read_are_made(make_run, make_record):
  run = make_run(names=("image", "spatial_ids", "caption_ids"))
  assert not {"detection", "detection_mask", "masks", "masks_mask"} & run.examples(
      make_record(0), np.random.default_rng(0)).keys()


def test_spatial_text_follows_the_view(make_example, records, tokenizer):
  written = set()
  for seed in range(20):
    example = make_example(records[0], seed)
    boxes = parse_boxes(tokenizer.decode(example["spatial_ids"]).replace(" ", ""))
    masks = example["masks"][example["masks_mask"]][:, 256:]
    np.testing.assert_allclose(to_cxcywh(boxes), masks, atol=1.1e-3)
    written.add(len(boxes))
  assert len(written) > 1  # some views lose objects


def test_a_caption_with_a_side_is_never_flipped(make_run, make_record, monkeypatch):
  allowed = []

  def sample(rng, crop_scale, flip):
    allowed.append(flip)
    return View()

  monkeypatch.setattr("lyrics_jax.data.pictures.sample_view", sample)
  for caption, flip in (("A dog left of a cat.", True), ("A dog.", True), ("A dog.", False)):
    make_run(flip=flip).examples(make_record(0, captions=(caption,)), np.random.default_rng(0))
  assert allowed == [False, True, False]


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_fit_of_the_settings_is_used(make_example, records, fit):
  picture = records[0].picture
  view = View().fitted(fit, picture.width, picture.height)
  example = make_example(records[0], augment=False, fit=fit)
  boxes, visible = view.boxes_cxcywh(picture.detection_boxes)
  np.testing.assert_array_equal(example["detection_mask"][:6], visible)
  np.testing.assert_array_equal(example["detection"][:6][visible][:, 256:], boxes[visible])
  assert (example["image"] != make_example(records[0], augment=False)["image"]).any()


def test_without_the_refiner_all_is_blank(make_example, records, tokenizer):
  example = make_example(records[0], use_refiner=False)
  for name in ("detection", "detection_mask", "masks", "masks_mask"):
    assert not example[name].any()
  assert example["spatial_ids"][example["spatial_mask"]].tolist() == [tokenizer.bos]
  assert (example["msp_targets"] == -1).all() and example["msp_ids"][0] == tokenizer.mlm
  assert example["image"].any() and example["caption_mask"].any()


def test_a_picture_without_objects(make_example, make_record):
  example = make_example(make_record(0, objects=0, rows=0))
  assert not example["detection_mask"].any() and not example["masks_mask"].any()
  assert example["spatial_mask"].sum() == 1 and (example["msp_targets"] == -1).all()


def test_errors_name_the_record(make_example, records):
  record = records[0]
  with pytest.raises(RecordError, match="^record picture-0: it has no caption"):
    make_example(dataclasses.replace(record, captions=()))
  damaged = dataclasses.replace(record.picture, image=b"no picture")
  with pytest.raises(RecordError, match="^record picture-0: its image cannot be decoded"):
    make_example(dataclasses.replace(record, pictures=(damaged,)))
  with pytest.raises(RecordError, match="features are 256 wide, config.stage.model.connector.local.feature_width=128"):
    make_example(record, sizes={"local_width": 132})


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_pair_has_one_picture(make_example, make_record, pictures):
  with pytest.raises(RecordError, match=f"^record picture-0: it has {pictures} pictures, and a pair has one"):
    make_example(make_record(0, pictures))


def test_settings_that_pairs_cannot_use(make_run):
  with pytest.raises(UserError, match=r"^config\.data\.pictures=2: a row of config\.data\.rows=Pairs has one picture"):
    make_run(pictures=2)
  with pytest.raises(UserError, match="^config.data.rows=Pairs makes no field 'segments', which the stage reads"):
    make_run(names=("image", "slot")).examples


def test_an_objective_of_a_user_adds_a_field(make_run, records, tokenizer):
  """A field that no other part knows: the number of objects that are written."""
  from lyrics_jax.data.batch import Field, select

  class Count:
    adds = {"object_count": Field(("rows", "pictures"), np.int32)}

    def prepare(self, pair, tokenizer, rng):
      return {"object_count": pair.owners.max() + 1}

  run = make_run()
  run = dataclasses.replace(run, fields=select(("image", "spatial_ids"), Count.adds), objectives=(Count(),))
  batch = next(run.batches(records))
  assert batch["object_count"].shape == (4, 1)
  written = (batch["spatial_ids"] == tokenizer.spatial[0]).sum(-1)
  np.testing.assert_array_equal(batch["object_count"], written)
