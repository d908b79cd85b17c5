import numpy as np
import pytest

from lyrics_jax.data.batch import FIELDS, Dimensions, Field, made_up, padding, select, spec, text_masks, text_tokens
from refiner_export.common.settings import UserError

DIMENSIONS = Dimensions(rows=5, pictures=2, image_size=6, detection_rows=7, mask_rows=3, local_width=12, spatial=20,
                        caption=9, conversation=30, tokens=4, former_vocabulary=48, llm_vocabulary=40)


def test_shapes_come_from_the_dimensions():
  specs = spec(FIELDS, DIMENSIONS)
  assert specs["image"].shape == (5, 2, 6, 6, 3) and specs["image"].dtype == np.uint8
  assert specs["detection"].shape == (5, 2, 7, 12) and specs["masks_mask"].shape == (5, 2, 3)
  assert specs["spatial_ids"].shape == (5, 2, 20) and specs["instruction_mask"].shape == (5, 2, 9)
  assert specs["caption_ids"].shape == (5, 9) and specs["slot"].shape == (5, 30)
  assert specs["picture_mask"].shape == (5, 2)
  assert FIELDS["masks"].example_shape(DIMENSIONS) == (2, 3, 12)


def test_the_table_is_whole():
  """Every field names sizes that there are, and a mask that is in the table and covers its leading axes."""
  for name, field in FIELDS.items():
    assert field.dims[0] == "rows" and len(field.shape(DIMENSIONS)) == len(field.dims)
    assert field.below is None or getattr(DIMENSIONS, field.below) > 0
    if field.mask is not None:
      mask = FIELDS[field.mask]
      assert mask.dims == field.dims[:len(mask.dims)] and mask.mask == field.mask and mask.bucket == field.bucket, name
    if field.bucket is not None:
      assert field.dims[-1] in ("spatial", "caption", "conversation")


def test_select_brings_the_masks_along():
  added = {"icg_ids": Field(("rows", "caption"), np.int32, bucket="caption", mask="caption_mask")}
  assert list(select(("slot", "image", "masks"), added)) == [
      "image", "masks", "masks_mask", "caption_mask", "segments", "slot", "icg_ids"]
  with pytest.raises(UserError, match="^unknown field 'images' of a batch; known fields: image, "):
    select(("images",))


def test_padding_is_nothing():
  batch = padding(FIELDS, DIMENSIONS)
  assert (batch.pop("slot") == -1).all() and not any(array.any() for array in batch.values())
  assert text_tokens(batch, select(("ids", "spatial_ids"))) == 0


def test_token_counts():
  fields = select(("ids", "spatial_ids", "detection"))
  batch = padding(fields, DIMENSIONS)
  batch["segments"][0, :9] = [1, 1, 1, 1, 2, 2, 2, 2, 2]
  batch["spatial_mask"][1, 0, :3] = True
  batch["detection_mask"][:] = True
  assert text_masks(fields) == ["spatial_mask", "segments"] and text_tokens(batch, fields) == 12


@pytest.mark.parametrize("seed", range(3))
def test_made_up_batches_keep_the_rules(seed):
  dims = ("rows", "pictures", "spatial")
  added = {"msp_targets": Field(dims, np.int32, -1, "former_vocabulary", "text", "spatial_mask")}
  fields = FIELDS | added
  batch = made_up(fields, DIMENSIONS, seed)
  assert list(batch) == list(fields)
  for name, array in batch.items():
    field, expected = fields[name], spec(fields, DIMENSIONS)[name]
    assert array.shape == expected.shape and array.dtype == expected.dtype, name
    if field.mask not in (None, name):
      nothing = array[batch[field.mask] == 0]
      assert (nothing == field.padding).all(), name
    if field.below is not None:
      assert array.max() < getattr(DIMENSIONS, field.below), name
  assert batch["picture_mask"].all()
  for name in text_masks(fields):
    used = batch[name] > 0
    assert (used[..., :2]).all() and (np.diff(used.astype(int)) <= 0).all(), name  # in front, and at least two tokens
  assert len(set((batch["segments"] > 0).sum(1).tolist())) > 1
  slot = batch["slot"]
  assert all(row[row >= 0].tolist() == list(range(8)) for row in slot)
  assert (slot[:, :2] == -1).all() and not (batch["targets"] & (slot >= 0)).any() and batch["targets"].any(1).all()
  some, other = made_up(fields, DIMENSIONS, seed), made_up(fields, DIMENSIONS, seed + 1)
  np.testing.assert_array_equal(batch["ids"], some["ids"])
  assert (batch["ids"] != other["ids"]).any()
  hidden = batch["msp_targets"] >= 0
  assert hidden.any() and not hidden[batch["spatial_mask"]].all()


def test_a_row_too_short_for_all_pictures_holds_whole_ones():
  short = Dimensions(rows=3, pictures=4, conversation=14, tokens=4, llm_vocabulary=9)
  batch = made_up(select(("ids", "targets", "slot")), short)
  assert (batch["slot"].max(1) == 7).all() and batch["targets"].any(1).all()
  assert (batch["segments"][batch["slot"] >= 0] == 1).all()
