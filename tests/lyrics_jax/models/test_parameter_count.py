"""How many parameters the published sizes have, by part. Nothing is allocated.

| trained                                             | stage 1     | stage 2     |
|-----------------------------------------------------|-------------|-------------|
| MQ-Former (12 layers, 32 + 32 queries, 30592 words) | 196,406,784 | 196,406,784 |
| linear maps of the local tokens                     |     402,432 |     402,432 |
| norm of the image tokens                            |       2,048 |       2,048 |
| ITC, ITM and LM heads, temperature                  |   1,411,203 |             |
| projection 768 -> 5120                              |             |   3,937,280 |
| LoRA, rank 16, on q and v of Vicuna-13B             |             |  13,107,200 |
| all                                                 | 198,222,467 | 213,855,744 |

The paper says about 278 M for stage 2, without a breakdown: 64 M more than this. Sizes that it does not state could
make up for part of it: cross-attention in every layer adds 31 M, LoRA of rank 64 adds 39 M.
"""

import math
import re
from collections import Counter

import pytest
import tiny

from lyrics_jax.config import Config
from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.pairs import Pairs
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.models.aligner import AlignerSettings
from lyrics_jax.models.connectors.mq_former import MQFormerSettings
from lyrics_jax.models.connectors.q_former import QFormerSettings
from lyrics_jax.models.layers.lora import LoRASettings
from lyrics_jax.models.llm.llama import LlamaSettings
from lyrics_jax.models.vlm import VLMSettings
from lyrics_jax.stage import Stage

SHARED = {"former": 196_406_784, "local_tokens": 402_432, "image_norm": 2_048}
VISION = 303_177_728  # CLIP ViT-L/14 at 224, without the final norm and the projection
ALIGN = SHARED | {"itc_image": 393_472, "itc_text": 393_472, "itm": 1_538, "lm_head": 622_720, "temperature": 1}
INSTRUCT = SHARED | {"projection": 3_937_280, "llm": 13_107_200}
VICUNA = 13_015_864_320
PUBLISHED = {  # the stages at the sizes that are the settings' defaults
    "align": Stage(AlignerSettings(), tiny.align_stage().objectives, tiny.EVERYTHING),
    "instruct": Stage(VLMSettings(), tiny.instruct_stage().objectives, tiny.LORA)}


def plan_of(stage: Stage):
  rows = Pairs() if isinstance(stage.model, AlignerSettings) else Conversations()
  data = DataSettings(records="unused", rows=rows, mq_former_tokenizer="unused", llm_tokenizer="unused")
  config = Config(stage, output="unused", data=data)
  config.finalize()
  return tiny.make_plan(config)


@pytest.mark.parametrize("stage, trained, frozen", [
    ("align", ALIGN, {"vision": VISION}), ("instruct", INSTRUCT, {"vision": VISION, "llm": VICUNA})])
def test_published_sizes(stage, trained, frozen):
  plan = plan_of(PUBLISHED[stage])
  for expected, is_trained in ((trained, True), (frozen, False)):
    counts = Counter()
    for path in plan.paths(is_trained):
      counts[path.removeprefix("connector/").split("/")[0]] += math.prod(plan.shapes[path].shape)
    assert counts == expected
    assert plan.count(is_trained) == sum(expected.values())
    assert re.search(rf"\nall .*{plan.count(is_trained):,}", plan.report())  # what a run logs at its start
  assert plan.count(True) == {"align": 198_222_467, "instruct": 213_855_744}[stage]


@pytest.mark.parametrize("change, more", [
    ({"connector": QFormerSettings(former=MQFormerSettings(cross_attention_frequency=1))}, 30_726_144),
    ({"llm": LlamaSettings(lora=LoRASettings(rank=64))}, 39_321_600),
])
def test_what_could_be_the_difference_to_the_paper(change, more):
  stage = Stage(VLMSettings(**change), tiny.instruct_stage().objectives, tiny.LORA)
  assert plan_of(stage).count(True) == 213_855_744 + more
