"""The configuration: saved and read back; impossible combinations, each named by its field."""

import dataclasses
import json
import pathlib

import pytest
import tiny

from lyrics_jax.config import Config
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.evaluation.retriever import Retrieval
from lyrics_jax.models.layers.lora import LoRASettings
from lyrics_jax.objectives.itc import ITC
from lyrics_jax.objectives.next_token import NextToken
from refiner_export.common import config_file
from refiner_export.common.settings import UserError, from_dict

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
MODEL, FORMER = "stage__model", "stage__model__connector__former"
LLM = "stage__model__llm"


@pytest.mark.parametrize("stage", ["align", "instruct", "llava"])
def test_saved_and_read_back(stage):
  config = tiny.make_config(stage, data__crop_scale=(0.25, 1.0))
  again = from_dict(Config, json.loads(config.to_json()))
  assert again == config and hash(again) == hash(config)
  assert type(again.stage.model) is type(config.stage.model) and type(again.data.rows) is type(config.data.rows)
  with pytest.raises(dataclasses.FrozenInstanceError, match="already checked"):
    again.steps = 3


def test_evaluations_and_rates_are_saved_too():
  config = tiny.make_config("align", evaluations=(Retrieval(records="held_out", every=100),))
  again = from_dict(Config, json.loads(config.to_json()))
  assert again == config and type(again.evaluations[0]) is Retrieval


def test_unknown_fields_are_named():
  values = json.loads(tiny.make_config().to_json())
  values["stage"]["model"]["connector"]["former"]["widht"] = 3
  message = r"^config.stage.model.connector.former.widht: unknown field \(did you mean width\?\)$"
  with pytest.raises(UserError, match=message):
    from_dict(Config, values)


def dotted(name: str) -> str:
  text = "config"
  for part in name.split("__"):
    text += f"[{part}]" if part.isdigit() else f".{part}"
  return text


@pytest.mark.parametrize("stage, name, value", [
    ("align", "steps", "ten"), ("align", "compute__dtype", "float16"), ("align", "compute__remat", "some"),
    ("align", "optimizer__peak_lr", None), ("align", "data__crop_scale", (0.5,)),
    ("instruct", f"{LLM}__lora__targets", ("query",)), ("align", "stage__objectives__1__negatives", "none"),
    ("align", "stage__model__connector", LoRASettings()), ("align", "data__rows", None)])
def test_values_of_the_wrong_kind(stage, name, value):
  with pytest.raises(UserError) as caught:
    tiny.make_config(stage, **{name: value})
  assert str(caught.value).removeprefix(dotted(name)).removeprefix("[0]").startswith(": expected ")


@pytest.mark.parametrize("stage, changes, message", [
    ("align", {f"{MODEL}__vision__image_size": 10},
     r"{model}vision.image_size=10 is not a multiple of {model}vision.patch_size=4"),
    ("align", {f"{MODEL}__vision__heads": 3}, r"{model}vision.width=16 is not a multiple of {model}vision.heads=3"),
    ("align", {f"{MODEL}__vision__patch_size": 0}, r"{model}vision.patch_size=0"),
    ("align", {f"{MODEL}__connector__local__feature_width": 0}, r"{model}connector.local.feature_width=0"),
    ("align", {f"{MODEL}__connector__local__detection_rows": -1}, r"{model}connector.local.detection_rows=-1"),
    ("align", {f"{FORMER}__heads": 5}, r"{former}width=16 is not a multiple of {former}heads=5"),
    ("align", {f"{FORMER}__heads": 0}, r"{former}heads=0"),
    ("align", {f"{FORMER}__layers": 3, f"{FORMER}__cross_attention_frequency": 2},
     r"{former}layers=3 is not a multiple of {former}cross_attention_frequency=2"),
    ("align", {f"{FORMER}__cross_attention_frequency": 0}, r"{former}cross_attention_frequency=0"),
    ("align", {f"{FORMER}__dropout": 1.0}, r"{former}dropout=1.0"),
    ("align", {f"{FORMER}__visual_queries": 0}, r"{former}visual_queries=0"),
    ("align", {f"{FORMER}__grounding_queries": -1}, r"{former}grounding_queries=-1"),
    ("instruct", {f"{LLM}__kv_heads": 0}, r"{model}llm.kv_heads=0"),
    ("instruct", {f"{LLM}__heads": 4, f"{LLM}__kv_heads": 3},
     r"{model}llm.heads=4 is not a multiple of {model}llm.kv_heads=3"),
    ("instruct", {f"{LLM}__lora__rank": 0}, r"{model}llm.lora.rank=0 must be positive"),
    ("instruct", {f"{LLM}__lora__targets": ()}, r"{model}llm.lora.targets is empty"),
    ("instruct", {f"{LLM}__lora__dropout": -0.1}, r"{model}llm.lora.dropout=-0.1"),
    ("align", {"stage__objectives__0__label_smoothing": 1.5}, r"config.stage.objectives\[0\].label_smoothing=1.5"),
    ("align", {"stage__objectives__2__weight": 0.0}, r"config.stage.objectives\[2\].weight=0.0 must be positive"),
    ("align", {f"{MODEL}__temperature": 0.0}, r"{model}temperature=0.0"),
    ("align", {"stage__objectives__3__mask_probability": 2.0}, r"config.stage.objectives\[3\].mask_probability=2.0"),
    ("instruct", {"stage__objectives__0__chunk": 0}, r"config.stage.objectives\[0\].chunk=0"),
    ("align", {"stage__objectives": (NextToken(),)}, r"config.stage.objectives\[0\]"),
    ("align", {"stage__objectives": ()}, r"config.stage.objectives"),
    ("align", {"stage__train": ()}, r"config.stage.train is empty"),
    ("align", {"stage__objectives": (ITC(), ITC())}, r"config.stage.objectives\[1\]: itc stands there twice"),
    ("align", {f"{FORMER}__grounding_queries": 0}, r"{former}grounding_queries=0: .*"),
    ("align", {"evaluations": (Retrieval(records="held_out", every=30),)},
     r"config.evaluations\[0\].every=30 is not a multiple"),
    ("align", {"data__crop_scale": (0.9, 0.5)}, r"config.data.crop_scale=\(0.9, 0.5\) must satisfy"),
    ("align", {"data__buckets": (0.5,)}, r"config.data.buckets=\(0.5,\)"),
    ("align", {"data__spatial_length": 0}, r"config.data.spatial_length=0"),
    ("align", {"data__workers": -1}, r"config.data.workers=-1"),
    ("align", {"data__rows": Conversations()}, r"config.data.rows=Conversations makes no field"),
    ("align", {"optimizer__peak_lr": 0.0}, r"config.optimizer.peak_lr=0.0 must be positive"),
    ("align", {"optimizer__warmup_fraction": 1.0}, r"config.optimizer.warmup_fraction=1.0 must lie in \[0, 1\)"),
    ("align", {"optimizer__clip_norm": 0.0}, r"config.optimizer.clip_norm=0.0 must be positive"),
    ("align", {"optimizer__accumulate_steps": 0}, r"config.optimizer.accumulate_steps=0 must be at least 1"),
    ("align", {"mesh__data": -1, "mesh__fsdp": -1},
     r"config.mesh=\(-1, -1, 1\): each axis is a positive count, at most one is -1"),
    ("align", {"mesh__tensor": 0}, r"config.mesh=\(-1, 1, 0\)"),
    ("align", {"output": ""}, r"config.output is empty"),
    ("align", {"data__records": ""}, r"config.data.records is empty"),
    ("align", {"data__mq_former_tokenizer": ""}, r"config.data.mq_former_tokenizer is empty"),
    ("instruct", {"data__llm_tokenizer": ""}, r"config.data.llm_tokenizer is empty"),
    ("align", {"steps": 0}, r"config.steps"),
    ("align", {"log_every": 0}, r"config.log_every=0"),
    ("align", {"checkpoint_every": 0}, r"config.checkpoint_every=0"),
    ("align", {"keep_checkpoints": 0}, r"config.keep_checkpoints=0"),
    ("align", {"batch_size": 6, "optimizer__accumulate_steps": 4},
     r"config.batch_size=6 is not a multiple of config.optimizer.accumulate_steps"),
    ("align", {"batch_size": 4, "optimizer__accumulate_steps": 4},
     r"config.batch_size=.*: contrastive learning needs at least 2"),
    ("align", {"data__spatial_length": 40}, r"40 positions.* {former}max_positions=32"),
    ("align", {"data__spatial_length": 30, f"{FORMER}__restart_positions": False}, r"38 positions"),
    ("instruct", {"data__llm_length": 4}, r"config.data.llm_length=4 must exceed the 4 "),
    ("instruct", {"data__llm_length": 4000}, r"config.data.llm_length=4000 .*max_positions=2048"),
])
def test_impossible_combinations(stage, changes, message):
  message = message.replace("{former}", "{model}connector.former.").replace("{model}", "config.stage.model.")
  with pytest.raises(UserError, match=message) as caught:
    tiny.make_config(stage, **changes)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted(path.name for path in CONFIGS.glob("*.py") if "-> Config:" in path.read_text()))
def test_the_configurations_of_the_repository_are_possible(file):
  config = config_file.load(str(CONFIGS / file), Config)
  config.finalize()
  assert from_dict(Config, json.loads(config.to_json())) == config
