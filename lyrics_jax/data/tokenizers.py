"""The two tokenizers: BERT-style WordPiece for the MQ-Former, LLaMA-style for the language model.

Hugging Face's `AutoTokenizer` reads both from a local directory. Only its Rust tokenizer is kept: it is fast, reading
threads can share it, and it adds no token by itself.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import tokenizers

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing, which training does not use
import transformers

from lyrics_jax.data.batch import Dimensions, Fields, uses_vocabulary
from lyrics_jax.data.spatial import SPECIAL_TOKENS
from refiner_export.common.settings import UserError, require

if TYPE_CHECKING:
  from lyrics_jax.data.settings import DataSettings

# [DEC] comes first, so that behind BERT's vocabulary it gets the id that it has in BLIP-2's checkpoint.
MQ_FORMER_ADDED = ("[DEC]", "[BOS]", "[MLM]", *SPECIAL_TOKENS)

_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_REMEDY = "name the directory of a saved tokenizer, or train one: python -m lyrics_jax.data.train_tokenizers"


@dataclasses.dataclass(frozen=True)
class MQFormerTokenizer:
  """Text and ids of the MQ-Former. `spatial` holds the ids of `spatial.SPECIAL_TOKENS`, in that order."""
  backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
  pad: int
  cls: int
  sep: int
  mask: int
  bos: int
  dec: int
  mlm: int
  spatial: tuple[int, ...]

  def __len__(self) -> int:
    return self.backend.get_vocab_size(with_added_tokens=True)

  def encode(self, text: str) -> list[int]:
    """Ids of the text alone, without [CLS] and [SEP]."""
    return self.backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text, special tokens included: WordPiece does not remember where spaces were."""
    return self.backend.decode(list(ids), skip_special_tokens=False)


@dataclasses.dataclass(frozen=True)
class LLMTokenizer:
  """Text and ids of the language model. `pad` is the unknown token; any id would do, because padding is masked."""
  backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
  bos: int
  eos: int
  pad: int

  def __len__(self) -> int:
    return self.backend.get_vocab_size(with_added_tokens=True)

  def encode(self, text: str) -> list[int]:
    """Ids of the text alone, without `<s>` and `</s>`. A text starts a new word, as in LLaMA's tokenizer."""
    return self.backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text without `<s>`, `</s>` and `<unk>`; the tokens of the spatial representation stay."""
    return self.backend.decode(list(ids), skip_special_tokens=True)


@dataclasses.dataclass(frozen=True)
class Tokenizers:
  """The tokenizers of a run; None where no field of a batch needs it."""
  former: MQFormerTokenizer | None
  llm: LLMTokenizer | None


def load_tokenizers(data: "DataSettings", fields: Fields, dimensions: Dimensions) -> Tokenizers:
  """Reads the tokenizers that the fields need. Raises `UserError` when a tokenizer is missing or too large."""
  data.require_tokenizers(fields)
  former = llm = None
  if uses_vocabulary(fields, "former_vocabulary"):
    former = load_mq_former_tokenizer(data.mq_former_tokenizer)
    require_vocabulary(former, dimensions.former_vocabulary, "config.stage.model.connector.former.vocab_size")
  if uses_vocabulary(fields, "llm_vocabulary"):
    llm = load_llm_tokenizer(data.llm_tokenizer)
    require_vocabulary(llm, dimensions.llm_vocabulary, "config.stage.model.llm.vocab_size")
  return Tokenizers(former, llm)


@functools.lru_cache(maxsize=4)
def load_mq_former_tokenizer(directory: str) -> MQFormerTokenizer:
  """Reads a BERT-style tokenizer and appends the tokens of `MQ_FORMER_ADDED` that it lacks.

  Raises `UserError` when the directory or the tokenizer in it is missing, or is not BERT-style.
  """
  backend = _load(directory, "MQ-Former tokenizer")
  backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in MQ_FORMER_ADDED])
  ids = {token: backend.token_to_id(token) for token in (*_BERT_TOKENS, *MQ_FORMER_ADDED)}
  missing = [token for token, index in ids.items() if index is None]
  require(not missing,
          f"MQ-Former tokenizer in {directory} is not BERT-style: it has no {', '.join(missing)}; {_REMEDY}")
  return MQFormerTokenizer(backend, pad=ids["[PAD]"], cls=ids["[CLS]"], sep=ids["[SEP]"], mask=ids["[MASK]"],
                           bos=ids["[BOS]"], dec=ids["[DEC]"], mlm=ids["[MLM]"],
                           spatial=tuple(map(ids.get, SPECIAL_TOKENS)))


@functools.lru_cache(maxsize=4)
def load_llm_tokenizer(directory: str) -> LLMTokenizer:
  """Reads a LLaMA-style tokenizer as it is: a published language model's embedding has no room for new tokens.

  Raises `UserError` when the directory or the tokenizer in it is missing, or is not LLaMA-style.
  """
  backend = _load(directory, "language model tokenizer")
  bos, eos, unknown = backend.token_to_id("<s>"), backend.token_to_id("</s>"), backend.token_to_id("<unk>")
  require(bos is not None and eos is not None,
          f"language model tokenizer in {directory} is not LLaMA-style: it has no <s> or no </s>; {_REMEDY}")
  return LLMTokenizer(backend, bos=bos, eos=eos, pad=eos if unknown is None else unknown)


def require_vocabulary(tokenizer: MQFormerTokenizer | LLMTokenizer, vocab_size: int, field: str) -> None:
  """Raises `UserError` naming the config `field` when the tokenizer has more ids than the embedding has rows."""
  size = len(tokenizer)
  require(size <= vocab_size, f"{field}={vocab_size} is too small: the tokenizer has {size} tokens; "
                              f"set {field} to at least {size}")


def _load(directory: str, what: str) -> tokenizers.Tokenizer:
  require(os.path.isdir(directory), f"{what}: no such directory: {directory}; {_REMEDY}")
  try:
    loaded = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
  except Exception as error:  # without a tokenizer there, transformers raises OSError, ValueError, KeyError and more
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f"{what}: no tokenizer can be read from {directory} ({reason[:160]}); {_REMEDY}") from error
  require(loaded.is_fast, f"{what} in {directory} has no tokenizer.json and cannot be converted to one; {_REMEDY}")
  backend = loaded.backend_tokenizer
  backend.no_truncation()
  backend.no_padding()
  return backend
