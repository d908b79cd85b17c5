"""The form of Lyrics models: `LyricsForAlignment` and `LyricsForConditionalGeneration`, which bring their code."""

import pathlib
import shutil

import jax
import jax.numpy as jnp

from lyrics_jax import torch_model
from lyrics_jax.data.batch import Batch, Fields, select
from lyrics_jax.data.templates import VicunaV1
from lyrics_jax.data.tokenizers import load_llm_tokenizer, load_mq_former_tokenizer
from lyrics_jax.models.aligner import Aligner, AlignerSettings
from lyrics_jax.models.base import ModelSettings
from lyrics_jax.models.connectors.q_former import QFormerSettings
from lyrics_jax.models.inputs import Pictures
from lyrics_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD
from lyrics_jax.models.vlm import VLM, VLMSettings
from lyrics_jax.objectives.icg import ICG
from lyrics_jax.objectives.msp import MSP
from lyrics_jax.weights import eva_names
from lyrics_jax.weights import hf_files
from lyrics_jax.weights import hf_settings
from lyrics_jax.weights import lyrics_names
from lyrics_jax.weights import model_card
from lyrics_jax.weights.hf_format import HFFormat
from lyrics_jax.weights.stored import StoredRun
from lyrics_jax.weights.table import Entry, Shapes
from refiner_export.common.settings import require

PROCESSOR = "processor_config.json"
MQ_FORMER_TOKENIZER = "mq_former_tokenizer"  # directory of that tokenizer inside the exported one
MODULES = ("configuration_lyrics.py", "modeling_lyrics.py", "processing_lyrics.py")  # copied as they are
_SEEN = ("pixel_values", "detection", "detection_mask", "masks", "masks_mask")  # what the exported model sees


class _LyricsFormat(HFFormat):
  """What both models have in common."""
  kind = "lyrics"

  def entries(self, shapes: Shapes) -> dict[str, Entry]:
    return lyrics_names.entries(self.model, shapes)

  def shared_settings(self, config_class: str, auto_classes: tuple[str, ...]) -> dict:
    """config.json, but for what differs between the two models."""
    vision, connector = self.model.vision, self.model.connector
    former, where = connector.former, "config.stage.model.vision"
    kind = "eva" if eva_names.is_vit_g(vision) else "clip"
    require(kind == "eva" or vision.input_norm and not vision.patch_bias,
            f"{where}: the exported model has an image encoder like CLIP's or like ViT-g; set input_norm, patch_bias "
            "and activation to those of one of them")
    require(vision.class_token == "keep", f"{where}.class_token=drop: the exported model keeps the class token")
    auto_map = {"AutoConfig": f"configuration_lyrics.{config_class}"}
    for name in auto_classes:
      auto_map[name] = f"modeling_lyrics.{self.architecture}"
    return {
        "architectures": [self.architecture],
        "auto_map": auto_map,
        "dtype": self.config.compute.dtype,
        "vision_kind": kind,
        "feature_width": connector.local.feature_width,
        "instruction_aware": connector.instruction,
        "spatial_to_mq_former": connector.spatial,
        "language_model_apart": self.apart,
        "vision_config": hf_settings.vision_settings(vision),
        "mq_former_config": {
            "model_type": "lyrics_mq_former", "hidden_size": former.width, "num_hidden_layers": former.layers,
            "num_attention_heads": former.heads, "intermediate_size": former.mlp_dim,
            "visual_queries": former.visual_queries, "grounding_queries": former.grounding_queries,
            "cross_attention_frequency": former.cross_attention_frequency, "hidden_act": former.activation,
            "vocab_size": former.vocab_size, "max_position_embeddings": former.max_positions,
            "restart_positions": former.restart_positions, "hidden_dropout_prob": former.dropout,
            "layer_norm_eps": former.norm_eps},
        "tie_word_embeddings": False,
    }

  def processor_settings(self) -> dict:
    """`processor_config.json`: how pictures and texts were made into the model's inputs."""
    data, local = self.config.data, self.model.connector.local
    require(data.fit == "squash", f"config.data.fit={data.fit}: the exported processor squashes pictures to a square")
    return {
        "processor_class": "LyricsProcessor",
        "auto_map": {"AutoProcessor": "processing_lyrics.LyricsProcessor"},
        "image_size": self.model.vision.image_size, "image_mean": list(PIXEL_MEAN), "image_std": list(PIXEL_STD),
        "use_refiner": data.use_refiner, "feature_width": local.feature_width,
        "detection_rows": local.detection_rows, "mask_rows": local.mask_rows, "coordinates": data.coordinates,
        "spatial_length": data.spatial_length, "caption_length": data.caption_length,
    }

  def write_files(self, directory: pathlib.Path) -> None:
    self.write_processor(directory)
    for name in MODULES:
      shutil.copyfile(pathlib.Path(torch_model.__file__).with_name(name), directory / name)

  def write_processor(self, directory: pathlib.Path) -> None:
    """`processor_config.json` and the tokenizers."""
    hf_files.write_json(directory / PROCESSOR, self.processor_settings())
    tokenizer = load_mq_former_tokenizer(self.config.data.mq_former_tokenizer)
    hf_files.write_mq_former_tokenizer(directory / MQ_FORMER_TOKENIZER, tokenizer)

  def card(self, run: StoredRun) -> str:
    return model_card.render("lyrics_card.md.jinja", run, self.apart)

  def load(self, directory: pathlib.Path):
    import torch

    from lyrics_jax.torch_model import modeling_lyrics
    kind = getattr(modeling_lyrics, self.architecture)
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


class LyricsAlignment(_LyricsFormat):
  """`LyricsForAlignment`: the model of stage 1."""
  architecture = "LyricsForAlignment"

  @classmethod
  def writes(cls, model: ModelSettings) -> bool:
    return isinstance(model, AlignerSettings)

  def settings(self) -> dict:
    settings = self.shared_settings("LyricsAlignmentConfig", ("AutoModel",))
    settings["mq_former_config"]["itc_width"] = self.model.itc_width
    return settings | {"model_type": "lyrics_alignment", "itc_pooling": self.model.itc_pooling}

  def fields(self) -> Fields:
    return select(self.model.reads + ("spatial_ids", "caption_ids"), ICG.adds | MSP.adds)

  def jax_outputs(self, model: Aligner, batch: Batch) -> dict[str, jax.Array]:
    output = model(batch)
    image = model.connector.image_norm(model.see(Pictures.of(batch)).image)
    spatial, caption = batch["spatial_mask"][:, 0, :, None], batch["caption_mask"][..., None]
    return {"vision": image, "mq-former": output.image_features, "itc": output.similarity,
            "itm": output.itm.swapaxes(0, 1), "icg": jnp.where(caption, output.icg, 0),
            "msp": jnp.where(spatial, output.msp, 0)}

  def torch_outputs(self, model, batch: Batch) -> dict:
    given = self.torch_inputs(batch)
    output = model(**given)
    return {"vision": model.see(**_seen(given)).image, "mq-former": output.image_features,
            "itc": output.logits_per_image, "itm": output.itm_logits,
            "icg": output.icg_logits * given["caption_mask"][..., None],
            "msp": output.msp_logits * given["spatial_mask"][..., None]}


class LyricsGeneration(_LyricsFormat):
  """`LyricsForConditionalGeneration`: the model of stage 2. Its connector is an MQ-Former."""
  architecture = "LyricsForConditionalGeneration"

  @classmethod
  def writes(cls, model: ModelSettings) -> bool:
    return isinstance(model, VLMSettings) and isinstance(model.connector, QFormerSettings)

  def settings(self) -> dict:
    auto_classes = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
    settings = self.shared_settings("LyricsConfig", auto_classes)
    return settings | {"model_type": "lyrics", "text_config": hf_settings.llama_settings(self.model.llm)}

  def processor_settings(self) -> dict:
    data, connector = self.config.data, self.model.connector
    template = data.rows.template
    require(isinstance(template, VicunaV1), f"config.data.rows.template is {type(template).__name__}: the exported "
                                            "processor writes conversations in the template VicunaV1")
    return super().processor_settings() | {
        "llm_length": data.llm_length, "image_tokens": self.config.dimensions.tokens,
        "system_message": template.system_message,
        "instruction_aware": connector.instruction, "spatial_to_mq_former": connector.spatial,
        "spatial_to_llm": data.rows.spatial_to_llm,
    }

  def write_processor(self, directory: pathlib.Path) -> None:
    super().write_processor(directory)
    tokenizer = load_llm_tokenizer(self.config.data.llm_tokenizer)
    hf_files.write_llm_tokenizer(directory, tokenizer, self.model.llm.max_positions)
    hf_files.write_json(directory / "generation_config.json", hf_settings.generation_settings(tokenizer))

  def fields(self) -> Fields:
    return select(self.model.reads)

  def jax_outputs(self, model: VLM, batch: Batch) -> dict[str, jax.Array]:
    features, connector = model.see(Pictures.of(batch)), model.connector
    valid = batch["segments"][..., None] > 0
    return {"vision": connector.image_norm(features.image),
            "mq-former": connector.query_outputs(features, connector.text(batch)),
            "projection": model.soft_tokens(batch),
            "llm logits": jnp.where(valid, model.logits(model(batch)), 0)}

  def torch_outputs(self, model, batch: Batch) -> dict:
    given = self.torch_inputs(batch)
    ids, valid, slot = given.pop("ids"), given.pop("segments") > 0, given.pop("slot")
    texts = {}
    for name in ("spatial", "instruction"):
      if f"{name}_ids" in given:
        texts[name] = given[f"{name}_ids"], given[f"{name}_mask"]
    features = model.see(**_seen(given))
    outputs = {"vision": features.image, "mq-former": model.query_outputs(features, **texts),
               "projection": model.soft_tokens(features, **texts)}
    if model.language_model is not None:
      logits = model(input_ids=ids, attention_mask=valid.long(), image_slot=slot, **given).logits
      outputs["llm logits"] = logits * valid[..., None]
    return outputs


def _seen(given: dict) -> dict:
  """The inputs that the exported model sees, texts left out."""
  return {name: given[name] for name in _SEEN if name in given}
