"""Pictures, what the visual refiner found in them, and texts, as the tensors that the Lyrics models read.

The tokens and pixels are those of training, for a picture seen whole. There are two tokenizers: LLaMA's for
conversations and a BERT-style one for the MQ-Former. The template of a conversation is Vicuna v1.1's, and its pieces
are tokenised one by one:

  {system} USER: <image>\\n{objects}\\n{question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>
"""

import dataclasses
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

VISIBLE_SHARE = 0.3  # a box with less than this share of its area in the picture is left out
Object = tuple[str, np.ndarray]  # tag and box, (4,) xyxy in [0, 1]
IGNORED = -100  # label of a token that is not trained
NO_SLOT = -1  # image_slot of a token that is text

_NOT_SETTINGS = ("processor_class", "auto_map", "chat_template")  # what else processor_config.json may hold
_MARKERS = ("<br>", "</br>", "<T>", "</T>", "<Bbox>", "</Box>")  # of the spatial representation
_PLACEHOLDER = re.compile(r"<box (?:0\.)?(\d+)>")  # a text of a record may number the picture too
_NUMBER = r"\s*(\d+\.\d*|\.\d+|\d+)\s*"
_CORNERS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")


def _no_rows(width: int):
  """A field of a dataclass that has no rows unless it is given."""
  return dataclasses.field(default_factory=functools.partial(np.zeros, (0, width), np.float32))


@dataclasses.dataclass
class RefinerFeatures:
  """What the visual refiner found in one picture: K objects, N detector rows, W features wide; float32 arrays.

  Any object with these attributes will do, such as a picture of a record of `refiner_export`. If it has an `image`,
  this is the picture.
  """
  tags: Sequence[str] = ()                    # K, lower case
  boxes: np.ndarray = _no_rows(4)                  # (K, 4) xyxy in [0, 1] of the picture, best score first
  mask_features: np.ndarray = _no_rows(256)        # (K, W), of the segmenter
  detection_features: np.ndarray = _no_rows(256)   # (N, W), best score first
  detection_boxes: np.ndarray = _no_rows(4)        # (N, 4) cxcywh in [0, 1] of the picture
  text_boxes: np.ndarray = _no_rows(4)             # (M, 4) xyxy, what `<box K>` in a text means


class LyricsProcessor(ProcessorMixin):
  """See the module's docstring; `__call__` makes batches, `answers` reads what `generate` returned.

  Args:
    tokenizer: the language model's; None for `LyricsForAlignment`.
    mq_former_tokenizer: the MQ-Former's.
    settings: what processor_config.json holds: sizes, lengths in tokens, and which texts go where.
  """

  def __init__(self, tokenizer: PreTrainedTokenizerFast | None, mq_former_tokenizer: PreTrainedTokenizerFast,
               **settings):
    self.tokenizer, self.mq_former_tokenizer, self.chat_template = tokenizer, mq_former_tokenizer, None
    self.settings = settings
    ids = mq_former_tokenizer.convert_tokens_to_ids
    self._pad, self._cls, self._sep = ids(["[PAD]", "[CLS]", "[SEP]"])
    self._bos, self._dec, self._mlm = ids(["[BOS]", "[DEC]", "[MLM]"])
    self._markers = ids(list(_MARKERS))

  @classmethod
  def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
    settings, kwargs = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
    for name in _NOT_SETTINGS:
      settings.pop(name, None)
    kwargs.pop("trust_remote_code", None)
    load = functools.partial(PreTrainedTokenizerFast.from_pretrained, pretrained_model_name_or_path, **kwargs)
    return cls(load() if "llm_length" in settings else None, load(subfolder="mq_former_tokenizer"), **settings)

  def save_pretrained(self, save_directory, **kwargs):
    os.makedirs(save_directory, exist_ok=True)
    if self.tokenizer is not None:
      self.tokenizer.save_pretrained(save_directory)
    self.mq_former_tokenizer.save_pretrained(os.path.join(save_directory, "mq_former_tokenizer"))
    with open(os.path.join(save_directory, "processor_config.json"), "w", encoding="utf-8") as file:
      json.dump(self.to_dict(), file, indent=2)

  def to_dict(self) -> dict:
    return {"processor_class": "LyricsProcessor", "auto_map": {"AutoProcessor": "processing_lyrics.LyricsProcessor"},
            **self.settings}

  def __repr__(self) -> str:
    return f"LyricsProcessor({self.settings})"

  def __call__(self, images=None, text=None, refined=None, return_tensors: str = "pt", **kwargs) -> BatchFeature:
    """A batch of B pictures with their texts; single ones make a batch of one.

    Args:
      images: PIL image, uint8 array (height, width, 3) or the bytes of a picture file, or B of them. None, also in a
        list, is the picture that `refined` brings along, or no picture. An array of shape (S, S, 3), the size that the
        model reads, is taken as it is. Pillow decodes and resizes everything else.
      text: B texts. For a conversation a question, or a sequence of question, answer, question, ...; if the sequence
        ends with an answer, the batch has `labels`. For `LyricsForAlignment` a caption. A text may hold `<box K>`,
        which stands for box K of the `text_boxes` of `refined`.
      refined: `RefinerFeatures` or a similar object, or B of them; None, also in a list, where the refiner found
        nothing.

    Returns, all as tensors:
      pixel_values: float32[B, 3, S, S], CLIP's normalisation; a picture is squeezed to a square, so that its boxes keep
        their coordinates.
      detection, masks: float32[B, N, W + 4] and [B, M, W + 4], features and boxes (cxcywh); detection_mask, masks_mask:
        bool[B, N] and [B, M], False on padding.
      spatial_ids, spatial_mask: int64 and bool [B, Ts], `[BOS]` and the spatial representation.
      Of a conversation: input_ids, attention_mask, image_slot (int64[B, T], padded at the left), labels, and
        instruction_ids, instruction_mask [B, Ti]: `[CLS]` first question `[SEP]`.
      For `LyricsForAlignment`: caption_ids, caption_mask [B, Tc]: `[CLS]` caption `[SEP]`; icg_ids, msp_ids: caption
        and spatial representation with `[DEC]` and `[MLM]` in front.
    """
    if return_tensors != "pt":
      raise ValueError(f"return_tensors={return_tensors!r}: the Lyrics models read PyTorch's tensors, 'pt'")
    texts = [text] if isinstance(text, str) else list(text)
    count = len(texts)
    images, refined = _one_for_each(images, count), _one_for_each(refined, count)
    if not len(images) == len(refined) == count:
      raise ValueError(f"{count} texts, {len(images)} images and {len(refined)} refined: give one of each, or the same "
                       "one for all of them")
    examples = list(map(self._example, images, texts, refined))
    batch = {}
    for name in examples[0]:
      batch[name] = [example[name] for example in examples if name in example]
    if any(example.keys() != batch.keys() for example in examples):
      raise ValueError("text: in a batch, all of the conversations end with a question, or all with an answer")
    for name, rows in batch.items():
      batch[name] = self._collate(name, rows)
    return BatchFeature(batch)

  def answers(self, generated: torch.Tensor, input_ids: torch.Tensor) -> list[str]:
    """The texts that `generate` put behind the prompts `input_ids`, [B, T]."""
    texts = self.tokenizer.batch_decode(generated[:, input_ids.shape[1]:], skip_special_tokens=True)
    return list(map(str.strip, texts))

  @staticmethod
  def boxes(answer: str) -> np.ndarray:
    """Boxes written in an answer, float32 (n, 4), xyxy in [0, 1] of the picture; malformed ones are left out."""
    boxes = []
    for corners in _CORNERS.findall(answer):
      one = 1 if "." in "".join(corners) else 1000  # whole numbers are thousandths
      boxes.append([float(number) / one for number in corners])
    return np.clip(np.array(boxes, np.float32).reshape(-1, 4), 0, 1)

  def _example(self, image, text, refined) -> dict[str, np.ndarray]:
    """What `__call__` returns, for one example and without padding."""
    settings = self.settings
    found = RefinerFeatures() if refined is None else refined
    image = getattr(found, "image", None) if image is None else image
    image = None if isinstance(image, bytes) and not image else image  # a record of text alone
    text_boxes, _ = _in_picture(found.text_boxes)
    turns = []
    for turn in [text] if isinstance(text, str) else text:
      turns.append(self._fill_boxes(turn, text_boxes))
    boxes, boxes_seen = _in_picture(found.boxes)
    detection_boxes, detections_seen = _in_picture(_to_xyxy(found.detection_boxes))
    objects = []
    for tag, box, seen in zip(found.tags, boxes, boxes_seen):
      if seen and settings["use_refiner"]:
        objects.append((tag, box))
    example = {"pixel_values": self._pixels(image)}
    example |= self._local_tokens("detection", found.detection_features, detection_boxes, detections_seen)
    example |= self._local_tokens("masks", found.mask_features, boxes, boxes_seen)
    if self.tokenizer is None:
      spatial, caption = self._encode_objects(objects), self._encode_sentence(turns[0])
      example |= _with_mask("spatial", spatial) | _with_mask("caption", caption)
      return example | {"icg_ids": [self._dec, *caption[1:]], "msp_ids": [self._mlm, *spatial[1:]]}
    example |= _with_mask("spatial", self._encode_objects(objects if settings["spatial_to_mq_former"] else []))
    example |= _with_mask("instruction", self._encode_sentence(turns[0] if settings["instruction_aware"] else ""))
    return example | self._encode_conversation(turns, 0 if image is None else settings["image_tokens"], objects)

  def _collate(self, name: str, rows: list) -> torch.Tensor:
    """Rows of an input of this name, ragged in their first axis, as one tensor."""
    if name == "pixel_values":
      return torch.from_numpy(np.stack(rows))
    conversation = name in ("input_ids", "attention_mask", "labels", "image_slot")
    fill = {"labels": IGNORED, "image_slot": NO_SLOT}.get(name, 0)
    if name.endswith("_ids"):
      fill = self.tokenizer.pad_token_id if conversation else self._pad
    tensors = list(map(torch.as_tensor, map(np.asarray, rows)))
    # An answer is written behind its prompt, so prompts end together.
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill,
                                           padding_side="left" if conversation else "right")

  # --- pictures and local tokens ---

  def _pixels(self, image) -> np.ndarray:
    """float32 (3, S, S) in CLIP's normalisation."""
    settings = self.settings
    size = settings["image_size"]
    if image is None:
      whole = np.zeros((size, size, 3), np.uint8)
    elif isinstance(image, np.ndarray) and image.shape == (size, size, 3) and image.dtype == np.uint8:
      whole = image
    else:
      whole = _squeezed(image, size)
    mean, std = np.array(settings["image_mean"], np.float32), np.array(settings["image_std"], np.float32)
    pixels = (whole.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))

  def _local_tokens(self, name: str, features: np.ndarray, boxes: np.ndarray, seen: np.ndarray) -> dict:
    """The first rows of features with their boxes, at least one row. Rows that are not `seen` are blank.

    The model may have been trained without a refiner: then no row is seen.
    """
    limit = self.settings[{"detection": "detection_rows", "masks": "mask_rows"}[name]]
    width = self.settings["feature_width"]
    features, boxes, seen = features[:limit], boxes[:limit], seen[:limit] & self.settings["use_refiner"]
    if len(features) and features.shape[1] != width:
      raise ValueError(f"{name}: features are {features.shape[1]} wide, this model reads {width}: give those of the "
                       "refiner that it was trained with")
    tokens, mask = np.zeros((max(len(features), 1), width + 4), np.float32), np.zeros(max(len(features), 1), bool)
    mask[:len(seen)] = seen
    centres = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
    tokens[mask] = np.concatenate([features, centres], axis=1)[seen] if len(features) else 0
    return {name: tokens, f"{name}_mask": mask}

  # --- texts ---

  def _box(self, box: np.ndarray) -> str:
    numbers = []
    for value in box:
      thousandths = round(min(max(float(value), 0.0), 1.0) * 1000)
      numbers.append(thousandths / 1000 if self.settings["coordinates"] == "decimal" else min(thousandths, 999))
    form = "({:.3f},{:.3f}),({:.3f},{:.3f})" if self.settings["coordinates"] == "decimal" else "({},{}),({},{})"
    return form.format(*numbers)

  def _encode_objects(self, objects: list[Object]) -> list[int]:
    """`[BOS]` and as many whole objects as fit."""
    open_object, close_object, open_tag, close_tag, open_box, close_box = self._markers
    ids = [self._bos]
    for tag, box in objects:
      added = [open_object, open_tag, *self._encode_bert(tag), close_tag,
               open_box, *self._encode_bert(self._box(box)), close_box, close_object]
      if len(ids) + len(added) > self.settings["spatial_length"]:
        break
      ids += added
    return ids

  def _encode_sentence(self, text: str) -> list[int]:
    ids = self._encode_bert(text)
    return [self._cls, *ids[:self.settings["caption_length"] - 2], self._sep]

  def _encode_bert(self, text: str) -> list[int]:
    return self.mq_former_tokenizer.encode(text, add_special_tokens=False)

  def _encode_conversation(self, turns: list[str], image_tokens: int, objects: list[Object]) -> dict:
    """input_ids, attention_mask and image_slot. A conversation that ends with an answer has labels, and may be cut."""
    before, after = self._first_question(turns[0], image_tokens, objects)
    pairs = self._pairs(turns, before + [self.tokenizer.pad_token_id] * image_tokens + after)
    ids, labels = [], []
    for question, answer in pairs:
      ids += question + answer
      labels += [IGNORED] * len(question) + answer
    length = self.settings["llm_length"]
    if len(ids) > length:
      raise ValueError(f"the prompt {turns[0][:40]!r} takes {len(ids)} tokens, there is room for {length}: shorten it")
    slot = np.full(len(ids), NO_SLOT)
    slot[len(before):len(before) + image_tokens] = np.arange(image_tokens)
    encoded = {"input_ids": ids, "attention_mask": np.ones(len(ids), np.int64), "image_slot": slot}
    return encoded | {"labels": labels} if len(turns) % 2 == 0 else encoded

  def _pairs(self, turns: list[str], first: list[int]) -> list[tuple[list[int], list[int]]]:
    """The ids of each question and of its answer; the last question may have no answer.

    A conversation that ends with an answer is for training. It is cut behind the last answer that there is room for. If
    there is no room for the first answer, the start of that answer is kept.

    Args:
      first: the ids of the first question.
    """
    length, pairs = self.settings["llm_length"], []
    for question, answer in itertools.zip_longest(turns[::2], turns[1::2]):
      asked = self._encode(f"USER: {question} ASSISTANT:") if pairs else first
      pairs.append((asked, [] if answer is None else self._encode(answer) + [self.tokenizer.eos_token_id]))
    if len(turns) % 2:
      return pairs
    ends = np.cumsum([len(asked) + len(answered) for asked, answered in pairs])
    whole = int(np.searchsorted(ends, length, side="right"))
    asked, answered = pairs[0]
    return pairs[:whole] or [(asked, answered[:max(length - len(asked), 1)])]

  def _first_question(self, question: str, image_tokens: int, objects: list[Object]) -> tuple[list[int], list[int]]:
    """Ids before and after the picture. Behind it stand the objects that fit in half of the room.

    The objects that are asked about come first.
    """
    system, length = self.settings["system_message"], self.settings["llm_length"]
    bos = self.tokenizer.bos_token_id
    if not image_tokens:
      return [bos, *self._encode(f"{system} USER: {question} ASSISTANT:")], []
    before = [bos, *self._encode(f"{system} USER: ")]
    after = self._encode(f"\n{question} ASSISTANT:")
    if not self.settings["spatial_to_llm"]:
      return before, after
    named, others = [], []
    for tag, box in objects:
      asked_about = re.search(rf"\b{re.escape(tag)}\b", question.lower())
      (named if asked_about else others).append(f"<br><T> {tag} </T>{self._reference(box)}</br>")
    texts = named + others
    room = min((length - image_tokens) // 2, length - image_tokens - len(before) - len(after) - 1)
    ends = np.cumsum([len(self._encode(text)) for text in texts])
    # Texts that stand together may have more tokens than the texts one by one.
    for count in range(int(np.searchsorted(ends, room, side="right")), 0, -1):
      with_objects = self._encode(f"\n{''.join(texts[:count])}\n{question} ASSISTANT:")
      if len(with_objects) - len(after) <= room:
        return before, with_objects
    return before, after

  def _encode(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, add_special_tokens=False)

  def _reference(self, box: np.ndarray) -> str:
    return f"<Bbox> {self._box(box)} </Box>"

  def _fill_boxes(self, text: str, boxes: np.ndarray) -> str:
    """The text with its boxes in place of `<box K>`."""
    def written_out(match: re.Match) -> str:
      index = int(match[1])
      if index >= len(boxes):
        raise ValueError(f"the text {text[:60]!r} refers to <box {index}>, but there are {len(boxes)} text_boxes")
      return self._reference(boxes[index])

    return _PLACEHOLDER.sub(written_out, text)


def _one_for_each(given, count: int) -> list:
  """A list with one thing per example; a single thing is used for all examples."""
  return list(given) if isinstance(given, (list, tuple)) else [given] * count


def _squeezed(image, size: int) -> np.ndarray:
  """uint8 (S, S, 3). Pillow's bicubic on whole pixel values, as in training and in CLIP's own preprocessing."""
  try:
    from PIL import Image, ImageOps
  except ImportError:
    raise ImportError("images: Pillow is needed to decode and resize pictures: pip install pillow. Without it, give "
                      f"uint8 arrays of shape ({size}, {size}, 3)") from None
  if isinstance(image, bytes):
    image = Image.open(io.BytesIO(image))
  image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
  return np.asarray(ImageOps.exif_transpose(image).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _with_mask(name: str, ids: list[int]) -> dict:
  return {f"{name}_ids": ids, f"{name}_mask": np.ones(len(ids), bool)}


def _to_xyxy(boxes: np.ndarray) -> np.ndarray:
  return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def _in_picture(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """float32 (n, 4) xyxy, clipped to the picture, and bool (n,), True where enough of the box lies in it."""
  boxes = np.asarray(boxes, np.float32)
  clipped = np.clip(boxes, 0, 1)
  area, remaining = _area(boxes), _area(clipped)
  centre = (boxes[:, :2] + boxes[:, 2:]) / 2
  inside = ((centre >= 0) & (centre <= 1)).all(axis=1)
  return clipped, np.where(area > 0, remaining >= VISIBLE_SHARE * area, inside)


def _area(boxes: np.ndarray) -> np.ndarray:
  return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
