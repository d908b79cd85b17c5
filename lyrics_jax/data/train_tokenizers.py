"""Trains two small tokenizers on the texts of a record directory, for runs too small for BERT's and LLaMA's vocabulary.

Writes `mq_former` (lower-case WordPiece) and `llm` (LLaMA-style BPE with byte fallback) into the output directory. Both
load with Hugging Face's `AutoTokenizer`. In both every digit is one token, so that coordinates need ten tokens.
"""

import json
import os
import shutil
import string
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lyrics_jax.data.spatial import SPECIAL_TOKENS, fill_boxes, format_object, without_pictures
from lyrics_jax.data.templates import VICUNA_SYSTEM
from lyrics_jax.data.tokenizers import MQ_FORMER_ADDED
from lyrics_jax.tasks import TASKS, Task
from refiner_export.common.command import Command, Flag
from refiner_export.common.settings import require
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import USER, Conversation, Record, conversation_items

VOCAB_SIZE = 1000  # most tokens of either vocabulary, added tokens included

_ALPHABET = sorted(string.ascii_letters + string.digits + string.punctuation)
_LETTERS = 200  # distinct characters kept from the texts; any other is [UNK], or bytes for the language model
_BYTES = [f"<0x{value:02X}>" for value in range(256)]
_WORD_START = "▁"


def record_texts(records: Iterable[Record], tasks: Sequence[Task] = TASKS) -> Iterator[str]:
  """What training will see, about as often: captions, objects, conversations with every template of their task."""
  for record in records:
    yield from record.captions
    for coordinates in ("decimal", "integer"):
      for picture in record.pictures:
        for tag, box in zip(picture.tags, picture.boxes):
          yield format_object(tag, box, coordinates)
      boxes = [picture.text_boxes for picture in record.pictures]
      for conversation in conversation_items(record):
        yield f"{VICUNA_SYSTEM} USER:"
        for text in _said(conversation, tasks):
          yield fill_boxes(text, boxes, coordinates)


def _said(conversation: Conversation, tasks: Sequence[Task]) -> Iterator[str]:
  """The turns of a conversation, a question in every template; bare for a task that is not among `tasks`."""
  known = {task.name: task for task in tasks}
  task = known.get(conversation.task, Task(name=conversation.task))
  for turn in conversation.turns:
    text = without_pictures(turn.text)
    if turn.role == USER:
      for instruction in task.instructions(text):
        yield f"{instruction} ASSISTANT:"
    else:
      yield text


def train_mq_former(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> transformers.PreTrainedTokenizerFast:
  """WordPiece in BERT's manner: lower-case, accents dropped, punctuation and digits apart."""
  tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)])
  tokenizer.decoder = decoders.WordPiece()
  trainer = trainers.WordPieceTrainer(
      vocab_size=vocab_size, limit_alphabet=_LETTERS, show_progress=False,
      initial_alphabet=[letter for letter in _ALPHABET if not letter.isupper()],
      special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *MQ_FORMER_ADDED])
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.post_processor = processors.BertProcessing(
      ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]")))
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
      mask_token="[MASK]", clean_up_tokenization_spaces=False)


def train_llm(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> transformers.PreTrainedTokenizerFast:
  """BPE in LLaMA's manner: spaces are part of words, unknown characters are bytes; spatial markers are whole tokens."""
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Metaspace(replacement=_WORD_START, prepend_scheme="first", split=True),
      pre_tokenizers.Digits(individual_digits=True)])
  tokenizer.decoder = decoders.Sequence(
      [decoders.Replace(_WORD_START, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
  trainer = trainers.BpeTrainer(
      vocab_size=vocab_size - len(SPECIAL_TOKENS), limit_alphabet=_LETTERS, show_progress=False,
      initial_alphabet=[_WORD_START, "\n", *_ALPHABET],
      special_tokens=["<unk>", "<s>", "</s>", *_BYTES])
  tokenizer.train_from_iterator(map(_without_markers, texts), trainer)
  # The trainer reserves ids only for special tokens, so bytes were given as special. Decoding must not skip them.
  layout = json.loads(tokenizer.to_str())
  layout["added_tokens"] = [token for token in layout["added_tokens"] if token["content"] not in _BYTES]
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(layout))
  tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
  tokenizer.post_processor = processors.TemplateProcessing(
      single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
      clean_up_tokenization_spaces=False)


def write_tokenizers(texts: Iterable[str], output: str) -> None:
  """Trains both tokenizers and writes them to `output/mq_former` and `output/llm`, all or nothing.

  Raises `UserError` when `output` exists.
  """
  require(not os.path.exists(output), f"--output={output} already exists: remove it, or name another directory")
  texts = list(texts)
  parent = os.path.dirname(os.path.abspath(output))
  os.makedirs(parent, exist_ok=True)
  temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(output)}.", dir=parent)
  try:
    train_mq_former(texts).save_pretrained(os.path.join(temporary, "mq_former"))
    train_llm(texts).save_pretrained(os.path.join(temporary, "llm"))
    os.chmod(temporary, 0o755)  # mkdtemp keeps others out
    os.rename(temporary, output)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def train_tokenizers(records: str, output: str) -> None:
  directory = RecordDirectory(records)
  write_tokenizers(record_texts(map(directory.__getitem__, range(len(directory)))), output)
  print(f"wrote {output}/mq_former and {output}/llm")


def _without_markers(text: str) -> str:
  for token in SPECIAL_TOKENS:
    text = text.replace(token, " ")
  return text


COMMAND = Command(
    name="lyrics_jax.data.train_tokenizers",
    about=__doc__,
    main=train_tokenizers,
    flags=(
        Flag("records", "directory of records that refiner_export wrote", metavar="DIR", required=True),
        Flag("output", "directory to write the two tokenizers to", metavar="DIR", required=True),
    ),
    examples=("python -m lyrics_jax.data.train_tokenizers --records=runs/records --output=runs/tokenizers",),
)

if __name__ == "__main__":
  COMMAND.run()
