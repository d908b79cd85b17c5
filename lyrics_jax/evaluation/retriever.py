"""Retrieval with a stage-1 model: pictures and texts ranked by ITC, and the best of them again by ITM (paper section 3.3).

A text is `[BOS]` spatial representation `[CLS]` caption, as stage 1 trained it, and the spatial representation is that of
the caption's own picture. So the text's features carry the objects of the very picture that is looked for: the figures are
about a text with its objects, not about a caption. The honest second figure, `captions_only`, leaves the spatial
representation blank ([BOS] alone), and takes of ITM what the visual queries say, which see nothing of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lyrics_jax.config import ItcPooling
from lyrics_jax.data.loader import Records, make_examples
from lyrics_jax.data.retrieval_examples import RetrievalExamples
from lyrics_jax.evaluation.retrieval import best, recalls, reranked
from lyrics_jax.models import masks
from lyrics_jax.models.lyrics import LyricsForAlignment
from lyrics_jax.models.mq_former import Sources, Text, spatial_and_caption
from lyrics_jax.stages.align import image_features, text_features
from lyrics_jax.stages.base import Array, Batch
from lyrics_jax.training.parameters import ParameterPlan, Parameters
from lyrics_jax.training.sharding import BATCH
from refiner_export.common.settings import require

Example = dict[str, np.ndarray]
FIGURES = ("", "captions_only_")  # texts with their picture's objects, and without


class Retriever:
  """ITC features and ITM probabilities, in batches of `batch_size` that are always full: each program compiles once.

  On several hosts all of them call the same methods with the same arguments and get the same results. Each reads all
  records and keeps all features and the [P, T] matrices in its memory; the devices share the computation.

  Args:
    batch_size: pictures, texts or pairs at a time; a multiple of the devices that `mesh` splits a batch over.
  """

  def __init__(self, plan: ParameterPlan, mesh: Mesh, batch_size: int):
    config = plan.stage.config
    self.examples = RetrievalExamples(config, make_examples(config).tokenizer)
    self.mesh, self.batch_size = mesh, batch_size
    everywhere = NamedSharding(mesh, PartitionSpec())
    compiled = lambda function, out=None: jax.jit(
        lambda parameters, *inputs: function(plan.model(*parameters), *inputs), out_shardings=out)
    self._picture_features = compiled(functools.partial(_picture_features, config.align.itc_pooling), everywhere)
    self._text_features = compiled(_text_features, everywhere)
    self._look = compiled(lambda model, pictures: model.perception.look(pictures))
    self._matching = compiled(_matching, everywhere)

  def picture_features(self, parameters: tuple[Parameters, Parameters], records: Records) -> np.ndarray:
    """float32[P, N, D], each of length 1: see `align.image_features`."""
    batches = self._batches(len(records))
    return np.concatenate([np.asarray(self._picture_features(parameters, self._pictures(records, some)))[:len(some)]
                           for some in batches])

  def text_features(self, parameters: tuple[Parameters, Parameters], texts: list[Example]) -> np.ndarray:
    """float32[2, T, D], of length 1: with the spatial representation, and with a blank one."""
    return np.concatenate([np.asarray(self._text_features(parameters, self._full([texts[k] for k in some])))[:, :len(some)]
                           for some in self._batches(len(texts))], axis=1)

  def matching(self, parameters: tuple[Parameters, Parameters], records: Records, texts: list[Example],
               wanted: np.ndarray) -> np.ndarray:
    """float32[2, P, T]: probability that picture and text belong together, by all queries and by the visual ones alone.

    Args:
      wanted: bool[P, T], the pairs to score; the others are 0.
    """
    probabilities = np.zeros((2, *wanted.shape), np.float32)
    for some in self._batches(len(records)):
      # What a picture's pairs have in common, its cross-attention keys and values, is computed once.
      sources = self._look(parameters, self._pictures(records, some))
      pictures, matched = np.nonzero(wanted[some.start:some.stop])
      for pairs in self._batches(len(pictures)):
        within = slice(pairs.start, pairs.stop)
        batch = self._full([texts[text] | {"picture": np.int32(picture)}
                            for picture, text in zip(pictures[within], matched[within])])
        scored = np.asarray(self._matching(parameters, sources, batch))[:, :len(pairs)]
        probabilities[:, some.start + pictures[within], matched[within]] = scored
    return probabilities

  def _batches(self, count: int) -> list[range]:
    return [range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

  def _pictures(self, records: Records, some: range) -> Batch:
    return self._full([self.examples.picture(records[k]) for k in some])

  def _full(self, examples: list[Example]) -> Batch:
    """A batch on the mesh, filled up with copies of the first example; the same on every host."""
    examples = examples + examples[:1] * (self.batch_size - len(examples))
    sharding = NamedSharding(self.mesh, BATCH)
    stacked = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    return {name: jax.make_array_from_callback(value.shape, sharding, lambda index, value=value: value[index])
            for name, value in stacked.items()}


def retrieve(retriever: Retriever, parameters: tuple[Parameters, Parameters], records: Records,
             rerank: int) -> dict[str, float]:
  """Recalls in [0, 1] over all pictures and all captions of `records`, named `[captions_only_](itc|itm)_(i2t|t2i)_r(1|5|10)`.

  Args:
    rerank: how many of the best by ITC are ranked again by ITC + ITM, which gives the `itm` figures; 0 gives none.
  """
  require(len(records) > 0, "no record to retrieve: export some first")
  with jax.set_mesh(retriever.mesh):
    texts_of = [retriever.examples.texts(records[k]) for k in range(len(records))]
    picture_of = np.repeat(np.arange(len(records)), [len(some) for some in texts_of])
    texts = sum(texts_of, [])
    pictures = retriever.picture_features(parameters, records)
    # Rounded: equal texts shall score alike in whatever order a product is summed.
    similarities = [np.round(cosines(pictures, features), 6) for features in retriever.text_features(parameters, texts)]
    results = {f"{figure}itc_{name}": value for figure, similarity in zip(FIGURES, similarities)
               for name, value in recalls(similarity, similarity, picture_of).items()}
    if not rerank:
      return results
    chosen = [best(similarity, rerank) for similarity in similarities]
    wanted = np.any(chosen, axis=(0, 1))
    logging.info("retrieval: %d pictures, %d captions, %d pairs to match", len(records), len(texts), wanted.sum())
    for figure, similarity, matching, (of_picture, of_text) in zip(
        FIGURES, similarities, retriever.matching(parameters, records, texts, wanted), chosen):
      again = recalls(reranked(similarity, matching, of_picture), reranked(similarity, matching, of_text), picture_of)
      results |= {f"{figure}itm_{name}": value for name, value in again.items()}
  return results


def cosines(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
  """float32[P, T]: of each text, [T, D], with the most similar of each picture's features, [P, N, D]."""
  return functools.reduce(np.maximum, (pictures[:, n] @ texts.T for n in range(pictures.shape[1])))


def _picture_features(pooling: ItcPooling, model: LyricsForAlignment, pictures: Batch) -> Array:
  queries, _ = model.perception.mq_former.query_pass(model.perception.look(pictures))
  return image_features(model, queries, pooling)


def _text_features(model: LyricsForAlignment, texts: Batch) -> Array:
  blank = texts["spatial_mask"] & (jnp.arange(texts["spatial_mask"].shape[1]) == 0)

  return jnp.stack([text_features(model, _text(model, texts)), text_features(model, _text(model, texts | {"spatial_mask": blank}))])


def _matching(model: LyricsForAlignment, sources: Sources, pairs: Batch) -> Array:
  """float32[2, B]; `pairs` are texts, each with the number of its `picture` among `sources`, int32[B]."""
  picked = lambda axis: lambda a: jnp.take(a, pairs["picture"], axis=axis)
  sources = Sources(*jax.tree.map(picked(1), (sources.visual, sources.grounding)), picked(0)(sources.grounding_valid))
  queries, _ = model.perception.mq_former.joint_pass(sources, _text(model, pairs), masks.ITM, read=())
  visual, grounding = (jax.nn.softmax(model.itm(pooled).astype(jnp.float32))[:, 1]
                       for pooled in model.perception.mq_former.pool(queries))
  return jnp.stack([(visual + grounding) / 2, visual])


def _text(model: LyricsForAlignment, texts: Batch) -> Text:
  return spatial_and_caption((texts["spatial_ids"], texts["spatial_mask"]), (texts["caption_ids"], texts["caption_mask"]),
                             model.perception.mq_former.config.restart_positions)
