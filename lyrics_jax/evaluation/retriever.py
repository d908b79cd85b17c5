"""Retrieval with an aligner: pictures and texts ranked by ITC, the best pairs ranked again by ITM (paper section 3.2).

A text is `[BOS]` spatial representation `[CLS]` caption, as in training, and the spatial representation is that of the
caption's picture. So the text's features carry the objects of the picture that is searched for: the figures are about
a text with its objects, not about a caption. The second figure, `captions_only`, is about the caption: there the
spatial representation is blank ([BOS] alone), and of ITM only the visual queries count, which do not see it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from lyrics_jax.config import Config
from lyrics_jax.data.batch import Batch
from lyrics_jax.data.retrieval_examples import RetrievalExamples
from lyrics_jax.evaluation.retrieval import best, recalls, reranked
from lyrics_jax.inference.loaded import LoadedModel, require_model
from lyrics_jax.models.aligner import Aligner, AlignerSettings
from lyrics_jax.models.connectors.key_values import PictureKeyValues
from lyrics_jax.training.evaluations import EvaluationSettings
from refiner_export.common.settings import require
from refiner_export.records.reader import RecordDirectory

Array = jax.Array
Example = dict[str, np.ndarray]
FIGURES = ("", "captions_only_")  # texts with their picture's objects, and texts without


@dataclasses.dataclass(unsafe_hash=True)
class Retrieval(EvaluationSettings):
  """Recall on a held-out directory of records while an aligner trains, such as `retrieval/itc_i2t_r1`; see `retrieve`.

  On several hosts all hosts measure at the same steps. Measuring draws no random numbers and changes nothing, so a run
  takes the same steps with and without it.
  """
  name = "retrieval"
  records: str = ""  # directory of held-out records
  rerank: int = 16  # how many of the best by ITC are ranked again by ITM; 0 = none

  def check(self, path: str) -> None:
    super().check(path)
    require(bool(self.records), f"{path}.records is empty: name a directory that refiner_export wrote")
    require(self.rerank >= 0, f"{path}.rerank={self.rerank} must be 0 or more")

  def check_run(self, config: Config, path: str) -> None:
    super().check_run(config, path)
    require_model(config, AlignerSettings, path)

  def build(self, config: Config, fingerprint: str) -> Callable[[LoadedModel], dict[str, float]]:
    records = RecordDirectory(self.records, fingerprint)

    @functools.lru_cache(maxsize=1)
    def retriever_of(loaded: LoadedModel) -> Retriever:  # its programs are compiled once for the whole training
      return Retriever(loaded, config.microbatch)

    def measure(loaded: LoadedModel) -> dict[str, float]:
      return retrieve(retriever_of(loaded), records, self.rerank)

    return measure


class Retriever:
  """ITC features and ITM probabilities, in batches of `batch_size` that are always full: each program compiles once.

  On several hosts all hosts call the same methods with the same arguments and get the same results. Each host reads all
  records and keeps all features and the [P, T] matrices in its memory; the devices share the computation.

  Args:
    batch_size: pictures, texts or pairs at a time; raised to the next multiple that the mesh divides.

  Raises:
    UserError: a tokenizer is missing.
  """

  def __init__(self, loaded: LoadedModel, batch_size: int):
    config = loaded.config
    self.examples = RetrievalExamples(config.data, config.fields, config.dimensions)
    self.batch_size = loaded.rows(batch_size)
    self._picture_features = loaded.compiled(_picture_features)
    self._text_features = loaded.compiled(_text_features)
    self._key_values = loaded.compiled(_key_values, replicated=False)
    self._matching = loaded.compiled(_matching)

  def picture_features(self, records: RecordDirectory) -> np.ndarray:
    """float32[P, N, D], each of length 1: see `Aligner.encode_images`."""
    features = []
    for chunk in self._chunks(len(records)):
      computed = self._picture_features(self._pictures(records, chunk))
      features.append(np.asarray(computed)[:len(chunk)])
    return np.concatenate(features)

  def text_features(self, texts: list[Example]) -> np.ndarray:
    """float32[2, T, D], each of length 1: with the spatial representation, and with a blank one."""
    features = []
    for chunk in self._chunks(len(texts)):
      computed = self._text_features(self._full(texts[chunk.start:chunk.stop]))
      features.append(np.asarray(computed)[:, :len(chunk)])
    return np.concatenate(features, axis=1)

  def matching(self, records: RecordDirectory, texts: list[Example], wanted: np.ndarray) -> np.ndarray:
    """float32[2, P, T]: the probability that picture and text belong together, by all queries and by the visual ones.

    Args:
      wanted: bool[P, T], the pairs to score; the others are 0.
    """
    probabilities = np.zeros((2, *wanted.shape), np.float32)
    for chunk in self._chunks(len(records)):
      # The pairs of a picture share its cross-attention keys and values, which are computed once.
      key_values = self._key_values(self._pictures(records, chunk))
      pictures, matched = np.nonzero(wanted[chunk.start:chunk.stop])
      for pairs in self._chunks(len(pictures)):
        rows, columns = pictures[pairs.start:pairs.stop], matched[pairs.start:pairs.stop]
        batch = [texts[column] | {"picture": np.int32(row)} for row, column in zip(rows, columns)]
        scored = np.asarray(self._matching(key_values, self._full(batch)))
        probabilities[:, chunk.start + rows, columns] = scored[:, :len(pairs)]
    return probabilities

  def _chunks(self, count: int) -> Iterator[range]:
    for start in range(0, count, self.batch_size):
      yield range(start, min(start + self.batch_size, count))

  def _pictures(self, records: RecordDirectory, chunk: range) -> Batch:
    return self._full([self.examples.picture(records[position]) for position in chunk])

  def _full(self, examples: list[Example]) -> Batch:
    """A batch, filled up with copies of the first example."""
    filled = examples + examples[:1] * (self.batch_size - len(examples))
    batch = {}
    for name in examples[0]:
      batch[name] = np.stack([example[name] for example in filled])
    return batch


def retrieve(retriever: Retriever, records: RecordDirectory, rerank: int) -> dict[str, float]:
  """Recalls in [0, 1] over all pictures and all captions, named `[captions_only_](itc|itm)_(i2t|t2i)_r(1|5|10)`.

  Args:
    rerank: how many of the best by ITC are ranked again by ITC + ITM, which gives the `itm` figures; 0 gives none.

  Raises:
    UserError: there is no record, or a record has no caption or not exactly one picture.
  """
  require(len(records) > 0, "no record to retrieve: export some first")
  texts, picture_of = [], []
  for position in range(len(records)):
    of_picture = retriever.examples.texts(records[position])
    texts += of_picture
    picture_of += [position] * len(of_picture)
  picture_of = np.array(picture_of)
  pictures = retriever.picture_features(records)

  results, similarities = {}, []
  for figure, features in zip(FIGURES, retriever.text_features(texts)):
    # Rounded: equal texts must score alike, in whatever order a product is summed.
    similarity = np.round(cosines(pictures, features), 6)
    similarities.append(similarity)
    results |= _named(f"{figure}itc_", recalls(similarity, similarity, picture_of))
  if not rerank:
    return results

  chosen = [best(similarity, rerank) for similarity in similarities]
  wanted = np.any(chosen, axis=(0, 1))
  logging.info("retrieval: %d pictures, %d captions, %d pairs to match", len(records), len(texts), wanted.sum())
  matching = retriever.matching(records, texts, wanted)
  for figure, similarity, probabilities, (of_picture, of_text) in zip(FIGURES, similarities, matching, chosen):
    picture_to_text = reranked(similarity, probabilities, of_picture)
    text_to_picture = reranked(similarity, probabilities, of_text)
    results |= _named(f"{figure}itm_", recalls(picture_to_text, text_to_picture, picture_of))
  return results


def cosines(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
  """float32[P, T]: the cosine of each text, [T, D], with the most similar feature of each picture, [P, N, D]."""
  similarity = pictures[:, 0] @ texts.T
  for n in range(1, pictures.shape[1]):
    similarity = np.maximum(similarity, pictures[:, n] @ texts.T)
  return similarity


def _named(prefix: str, figures: dict[str, float]) -> dict[str, float]:
  return {prefix + name: value for name, value in figures.items()}


def _key_values(model: Aligner, pictures: Batch) -> PictureKeyValues:
  return model.passes(pictures).key_values


def _picture_features(model: Aligner, pictures: Batch) -> Array:
  return model.passes(pictures).images


def _text_features(model: Aligner, texts: Batch) -> Array:
  mask = texts["spatial_mask"]
  blank = mask & (jnp.arange(mask.shape[-1]) == 0)
  without_objects = texts | {"spatial_mask": blank}
  return jnp.stack([model.passes(texts).texts, model.passes(without_objects).texts])


def _matching(model: Aligner, pictures: PictureKeyValues, pairs: Batch) -> Array:
  """float32[2, B]; `pairs` are texts, each with the number of its `picture` among `pictures`, int32[B]."""
  logits = model.match(pictures.pick(pairs["picture"]), model.passes(pairs).text)
  probabilities = jax.nn.softmax(logits.astype(jnp.float32))[..., 1]
  return jnp.stack([probabilities.mean(0), probabilities[0]])
