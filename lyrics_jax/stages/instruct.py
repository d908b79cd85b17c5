"""Stage 2, instruction fine-tuning (paper section 3.4): next-token loss on the assistant's words.

The queries look at the picture, and at the instruction and spatial representation where the configuration says so; their
outputs are projected to soft tokens that stand at the picture's place in a Vicuna conversation.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lyrics_jax.config import Config
from lyrics_jax.models import masks
from lyrics_jax.models.attention import segment_positions
from lyrics_jax.models.lyrics import LyricsForInstruction
from lyrics_jax.models.mq_former import spatial_and_caption
from lyrics_jax.stages.base import Array, Batch, Loss, next_token_loss, text_spec, visual_spec


class Instruct:
  def __init__(self, config: Config):
    self.config = config

  def build(self, rngs: nnx.Rngs) -> LyricsForInstruction:
    return LyricsForInstruction(self.config.model, rngs=rngs)

  def trains(self, path: str) -> bool:
    if path.startswith("llm/"):
      return {"full": True, "lora": "/lora_" in path, "frozen": False}[self.config.model.llm.train]
    return not path.startswith("perception/vision/")

  def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    data = self.config.data
    return visual_spec(self.config) | text_spec(self.config.batch_size, {
        "spatial_ids": (data.spatial_length, jnp.int32), "spatial_mask": (data.spatial_length, jnp.bool_),
        "instruction_ids": (data.caption_length, jnp.int32), "instruction_mask": (data.caption_length, jnp.bool_),
        "llm_ids": (data.llm_length, jnp.int32), "llm_mask": (data.llm_length, jnp.bool_),
        "llm_targets": (data.llm_length, jnp.bool_), "image_slot": (data.llm_length, jnp.int32)})

  def loss(self, model: LyricsForInstruction, batch: Batch, key: Array | None) -> Loss:
    query_key, llm_key = (None, None) if key is None else jax.random.split(key)
    embeddings = self.embed(model, batch, query_key)
    segments = batch["llm_mask"].astype(jnp.int32)
    hidden, _ = model.llm(embeddings, segment_positions(segments), segments, key=llm_key)
    ids, trained = batch["llm_ids"], batch["llm_targets"]
    value, accuracy = next_token_loss(model.llm.logits, hidden, ids, trained, self.config.instruct.loss_chunk)
    return Loss(value, trained[:, 1:].sum().astype(jnp.float32), {"lm": value, "token_accuracy": accuracy})

  def embed(self, model: LyricsForInstruction, batch: Batch, key: Array | None) -> Array:
    """The LLM's input [B, L, D]: word embeddings, with soft tokens of the picture where `image_slot` >= 0."""
    soft = model.projection(self.see(model, batch, key))
    words = model.llm.words(batch["llm_ids"]).astype(soft.dtype)
    slot = batch["image_slot"]
    return jnp.where((slot >= 0)[..., None], jnp.take_along_axis(soft, jnp.maximum(slot, 0)[..., None], axis=1), words)

  def see(self, model: LyricsForInstruction, batch: Batch, key: Array | None) -> Array:
    """Query outputs [B, Q, D]."""
    mq_former, instruct = model.perception.mq_former, self.config.instruct
    sources = model.perception.look(batch)
    spatial = (batch["spatial_ids"], batch["spatial_mask"]) if instruct.spatial_to_mq_former else None
    instruction = (batch["instruction_ids"], batch["instruction_mask"]) if instruct.instruction_aware else None
    if spatial is None and instruction is None:
      return mq_former.query_pass(sources, key)[0]
    text = spatial_and_caption(spatial, instruction, mq_former.config.restart_positions)
    return mq_former.joint_pass(sources, text, masks.INSTRUCT, key, read=())[0]
