"""The configuration: saved and read back; impossible combinations, each named by its field."""

import dataclasses
import json

import pytest
import tiny

from lyrics_jax.config import Config
from refiner_export.common.settings import UserError, from_dict


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_saved_and_read_back(stage):
  config = tiny.make_config(stage, data__crop_scale=(0.25, 1.0), model__llm__lora__targets=("q", "o"))
  again = from_dict(Config, json.loads(config.to_json()))
  assert again == config and hash(again) == hash(config)
  with pytest.raises(dataclasses.FrozenInstanceError, match="already checked"):
    again.steps = 3


def test_unknown_fields_are_named():
  values = json.loads(tiny.make_config().to_json())
  values["model"]["mq_former"]["widht"] = 3
  with pytest.raises(UserError, match=r"^config.model.mq_former.widht: unknown field \(did you mean width\?\)$"):
    from_dict(Config, values)


@pytest.mark.parametrize("name, value", [
    ("steps", "ten"), ("model__dtype", "float16"), ("model__remat", "some"), ("stage", "pretrain"), ("optimizer__peak_lr", None),
    ("data__crop_scale", (0.5,)), ("model__llm__lora__targets", ("query",)), ("align__itm_negatives", "none")])
def test_values_of_the_wrong_kind(name, value):
  with pytest.raises(UserError, match=rf"^config\.{name.replace('__', '.')}: expected "):
    tiny.make_config(**{name: value})


@pytest.mark.parametrize("stage, changes, message", [
    ("align", {"model__vision__image_size": 10}, r"config.model.vision.image_size=10 is not a multiple of config.model.vision.patch_size=4"),
    ("align", {"model__vision__heads": 3}, r"config.model.vision.width=16 is not a multiple of config.model.vision.heads=3"),
    ("align", {"model__vision__patch_size": 0}, r"config.model.vision.patch_size=0"),
    ("align", {"model__refiner__feature_width": 0}, r"config.model.refiner.feature_width=0"),
    ("align", {"model__refiner__detection_rows": -1}, r"config.model.refiner.detection_rows=-1"),
    ("align", {"model__mq_former__heads": 5}, r"config.model.mq_former.width=16 is not a multiple of config.model.mq_former.heads=5"),
    ("align", {"model__mq_former__heads": 0}, r"config.model.mq_former.heads=0"),
    ("align", {"model__mq_former__layers": 3, "model__mq_former__cross_attention_frequency": 2},
     r"config.model.mq_former.layers=3 is not a multiple of config.model.mq_former.cross_attention_frequency=2"),
    ("align", {"model__mq_former__cross_attention_frequency": 0}, r"config.model.mq_former.cross_attention_frequency=0"),
    ("align", {"model__mq_former__dropout": 1.0}, r"config.model.mq_former.dropout=1.0"),
    ("align", {"model__mq_former__visual_queries": 0}, r"config.model.mq_former.visual_queries=0"),
    ("align", {"model__mq_former__grounding_queries": -1}, r"config.model.mq_former.grounding_queries=-1"),
    ("instruct", {"model__llm__kv_heads": 0}, r"config.model.llm.kv_heads=0"),
    ("instruct", {"model__llm__heads": 4, "model__llm__kv_heads": 3}, r"config.model.llm.heads=4 is not a multiple of config.model.llm.kv_heads=3"),
    ("instruct", {"model__llm__lora__rank": 0}, r"config.model.llm.lora.rank=0 must be positive"),
    ("instruct", {"model__llm__lora__targets": ()}, r"config.model.llm.lora.targets is empty"),
    ("instruct", {"model__llm__lora__dropout": -0.1}, r"config.model.llm.lora.dropout=-0.1"),
    ("align", {"align__label_smoothing": 1.5}, r"config.align.label_smoothing=1.5"),
    ("align", {"align__temperature": 0.0}, r"config.align.temperature=0.0"),
    ("align", {"align__mask_probability": 2.0}, r"config.align.mask_probability=2.0"),
    ("align", {"data__crop_scale": (0.9, 0.5)}, r"config.data.crop_scale=\(0.9, 0.5\) must satisfy"),
    ("align", {"data__buckets": (0.5,)}, r"config.data.buckets=\(0.5,\)"),
    ("align", {"data__spatial_length": 0}, r"config.data.spatial_length=0"),
    ("align", {"data__workers": -1}, r"config.data.workers=-1"),
    ("align", {"optimizer__peak_lr": 0.0}, r"config.optimizer.peak_lr=0.0 must be positive"),
    ("align", {"optimizer__warmup_fraction": 1.0}, r"config.optimizer.warmup_fraction=1.0 must lie in \[0, 1\)"),
    ("align", {"optimizer__clip_norm": 0.0}, r"config.optimizer.clip_norm=0.0 must be positive"),
    ("align", {"optimizer__accumulate_steps": 0}, r"config.optimizer.accumulate_steps=0 must be at least 1"),
    ("align", {"mesh__data": -1, "mesh__fsdp": -1}, r"config.mesh=\(-1, -1, 1\): each axis is a positive count, at most one is -1"),
    ("align", {"mesh__tensor": 0}, r"config.mesh=\(-1, 1, 0\)"),
    ("align", {"output": ""}, r"config.output is empty"),
    ("align", {"data__records": ""}, r"config.data.records is empty"),
    ("align", {"data__mq_former_tokenizer": ""}, r"config.data.mq_former_tokenizer is empty"),
    ("instruct", {"data__llm_tokenizer": ""}, r"config.data.llm_tokenizer is empty"),
    ("align", {"steps": 0}, r"config.steps"),
    ("align", {"log_every": 0}, r"config.log_every=0"),
    ("align", {"checkpoint_every": 0}, r"config.checkpoint_every=0"),
    ("align", {"keep_checkpoints": 0}, r"config.keep_checkpoints=0"),
    ("align", {"batch_size": 6, "optimizer__accumulate_steps": 4}, r"config.batch_size=6 is not a multiple of config.optimizer.accumulate_steps"),
    ("align", {"batch_size": 4, "optimizer__accumulate_steps": 4}, r"config.batch_size=4: contrastive learning needs at least 2"),
    ("align", {"data__spatial_length": 40}, r"config.data.spatial_length and caption_length need 40 positions, config.model.mq_former.max_positions=32"),
    ("align", {"data__spatial_length": 30, "model__mq_former__restart_positions": False}, r"need 38 positions"),
    ("instruct", {"data__llm_length": 4}, r"config.data.llm_length=4 must exceed the 4 image positions"),
    ("instruct", {"data__llm_length": 4000}, r"config.data.llm_length=4000 .* config.model.llm.max_positions=2048"),
])
def test_impossible_combinations(stage, changes, message):
  with pytest.raises(UserError, match=message) as caught:
    tiny.make_config(stage, **changes)
  assert "\n" not in str(caught.value)


def test_the_published_settings_are_possible():
  for stage in ("align", "instruct"):
    config = Config(stage=stage, output="runs/x", steps=10)
    config.data.records, config.data.mq_former_tokenizer, config.data.llm_tokenizer = "records", "bert", "vicuna"
    config.finalize()
    assert config.model.vision.tokens == 257
