"""The form of LLaVA models: `LlavaForConditionalGeneration` of transformers, with its processor."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tokenizers

from lyrics_jax.data.batch import Batch, Fields, select
from lyrics_jax.data.templates import VicunaV1
from lyrics_jax.data.tokenizers import LLMTokenizer, load_llm_tokenizer
from lyrics_jax.data.views import MEAN_COLOUR
from lyrics_jax.models.base import ModelSettings
from lyrics_jax.models.connectors.mlp import MLPSettings
from lyrics_jax.models.inputs import Pictures
from lyrics_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD
from lyrics_jax.models.vlm import VLM, VLMSettings
from lyrics_jax.weights import hf_files
from lyrics_jax.weights import hf_settings
from lyrics_jax.weights import llava_names
from lyrics_jax.weights import model_card
from lyrics_jax.weights.hf_format import HFFormat
from lyrics_jax.weights.stored import StoredRun
from lyrics_jax.weights.table import Entry, Shapes
from refiner_export.common.settings import require
from refiner_export.common.weight_files import Tensor

IMAGE_TOKEN = "<image>"
ADDED_ROWS = 64  # of word embedding and head, for the image token: rows are a multiple of 64, as in the published files
_CHAT_TEMPLATE = """\
{{ system }} {% for message in messages %}{% if message['role'] == 'user' %}USER: \
{% for piece in message['content'] if piece['type'] == 'image' %}<image>
{% endfor %}{% for piece in message['content'] if piece['type'] == 'text' %}{{ piece['text'] }}{% endfor %}\
{% else %} ASSISTANT: \
{% for piece in message['content'] if piece['type'] == 'text' %}{{ piece['text'] }}{% endfor %}</s>{% endif %}\
{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"""


class Llava(HFFormat):
  """A vision-language model whose connector is an MLP."""
  architecture = "LlavaForConditionalGeneration"
  kind = "llava"

  @classmethod
  def writes(cls, model: ModelSettings) -> bool:
    return isinstance(model, VLMSettings) and isinstance(model.connector, MLPSettings)

  @property
  def image_token(self) -> int:
    """The id of the token that stands at the places of pictures: the first one that the model has no word for."""
    return self.model.llm.vocab_size

  def entries(self, shapes: Shapes) -> dict[str, Entry]:
    return llava_names.entries(shapes, ADDED_ROWS)

  def constants(self) -> dict[str, Tensor]:
    """The norm behind CLIP's last block. The class has it, but nothing reads its result."""
    width = self.model.vision.width
    tensors = {}
    for leaf, value in (("weight", np.ones), ("bias", np.zeros)):
      name = f"{llava_names.FINAL_NORM}.{leaf}"
      array = value(width, ml_dtypes.bfloat16)
      tensors[name] = Tensor(name, array.shape, array.dtype, array.__getitem__)
    return tensors

  def settings(self) -> dict:
    vision, llm, where = self.model.vision, self.model.llm, "config.stage.model.vision"
    require(vision.input_norm and not vision.patch_bias and vision.activation == "quick_gelu",
            f"{where}: LlavaForConditionalGeneration has CLIP's image encoder; set it to ViTSettings.clip_vit_l_14() "
            "or to another size of CLIP")
    require(not self.apart,
            "LlavaForConditionalGeneration cannot be loaded without its language model: use --lora=merge")
    text = hf_settings.llama_settings(llm) | {"vocab_size": llm.vocab_size + ADDED_ROWS}
    return {
        "architectures": [self.architecture],
        "model_type": "llava",
        "dtype": self.config.compute.dtype,
        "image_token_index": self.image_token,
        "image_seq_length": self.config.dimensions.tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,  # the directory has only the blocks that run
        "vision_feature_select_strategy": {"drop": "default", "keep": "full"}[vision.class_token],
        "vision_config": hf_settings.vision_settings(vision),
        "text_config": text,
        "tie_word_embeddings": False,
    }

  def write_files(self, directory: pathlib.Path) -> None:
    tokenizer = load_llm_tokenizer(self.config.data.llm_tokenizer)
    length = self.model.llm.max_positions
    hf_files.write_llm_tokenizer(directory, self._with_image_token(tokenizer), length, image_token=IMAGE_TOKEN)
    hf_files.write_json(directory / "generation_config.json", hf_settings.generation_settings(tokenizer))
    hf_files.write_json(directory / "preprocessor_config.json", self.picture_settings())
    hf_files.write_json(directory / "processor_config.json", self.processor_settings())
    template = self.config.data.rows.template
    if isinstance(template, VicunaV1):
      system = template.system_message.replace("\\", "\\\\").replace("'", "\\'")
      chat = _CHAT_TEMPLATE.replace("{{ system }}", f"{{{{ '{system}' }}}}")
      (directory / "chat_template.jinja").write_text(chat)

  def _with_image_token(self, tokenizer: LLMTokenizer) -> LLMTokenizer:
    """The tokenizer with the image token, which gets the id that the model has for it.

    Training tokenises what stands behind the picture by itself, so it starts a new word here too.
    """
    values = json.loads(tokenizer.backend.to_str())
    splitter = values["pre_tokenizer"] or {}
    for step in splitter.get("pretokenizers", [splitter]):
      if step.get("prepend_scheme") == "first":
        step["prepend_scheme"] = "always"
    backend = tokenizers.Tokenizer.from_str(json.dumps(values))
    # Ids without a word come between the tokenizer's last word and the embedding's last row.
    for number in range(len(tokenizer), self.image_token):
      backend.add_special_tokens([tokenizers.AddedToken(f"<unused {number}>", normalized=False, special=True)])
    backend.add_special_tokens([tokenizers.AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    return LLMTokenizer(backend, tokenizer.bos, tokenizer.eos, tokenizer.pad)

  def picture_settings(self) -> dict:
    """`preprocessor_config.json`: how a picture becomes a square."""
    size, fit = self.model.vision.image_size, self.config.data.fit
    square = {"height": size, "width": size}
    settings = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size},
                "do_center_crop": fit == "crop", "crop_size": square, "resample": 3, "do_rescale": True,
                "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
                "image_mean": list(PIXEL_MEAN), "image_std": list(PIXEL_STD)}
    if fit == "squash":
      settings["size"] = square
    if fit == "pad":
      settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "background_color": list(MEAN_COLOUR)}
    return settings

  def processor_settings(self) -> dict:
    """`processor_config.json`: how many places a picture has among the words."""
    settings = self.settings()
    return {"processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, "patch_size": self.model.vision.patch_size,
            "num_additional_image_tokens": 1,  # the class token
            "vision_feature_select_strategy": settings["vision_feature_select_strategy"]}

  def card(self, run: StoredRun) -> str:
    return model_card.render("llava_card.md.jinja", run, self.apart)

  # --- for `check` ---

  def load(self, directory: pathlib.Path):
    import torch
    import transformers
    kind = transformers.LlavaForConditionalGeneration
    return kind.from_pretrained(directory, dtype=torch.float32).eval()

  def fields(self) -> Fields:
    return select(self.model.reads)

  def jax_outputs(self, model: VLM, batch: Batch) -> dict[str, jax.Array]:
    valid = batch["segments"][..., None] > 0
    return {"vision": model.see(Pictures.of(batch)).image, "connector": model.soft_tokens(batch),
            "llm logits": jnp.where(valid, model.logits(model(batch)), 0)}

  def torch_outputs(self, model, batch: Batch) -> dict:
    given = self.torch_inputs(batch)
    valid, pixels = given["segments"] > 0, given["pixel_values"]
    vision = model.get_submodule("model.vision_tower")
    seen = vision(pixels, output_hidden_states=True).hidden_states[-1]
    seen = seen[:, 1:] if self.model.vision.class_token == "drop" else seen
    ids = given["ids"].masked_fill(given["slot"] >= 0, self.image_token)
    logits = model(input_ids=ids, pixel_values=pixels, attention_mask=valid.long()).logits
    words = logits[..., :self.model.llm.vocab_size]
    return {"vision": seen, "connector": model.get_submodule("model.multi_modal_projector")(seen),
            "llm logits": words * valid[..., None]}
