"""Recall at K of image-text retrieval, from scores of pictures and texts. NumPy only, no model.

Each text belongs to one picture; a picture has one text or more. Scores are float[P, T], a row per picture and a
column per text. Ties, and scores that are not numbers, count as wrong: a right answer ranks behind every wrong answer
that does not score clearly less.
"""

import numpy as np

KS = (1, 5, 10)

_BEHIND = 3.0  # moves a cosine, in [-1, 1], below every cosine + probability, in [-1, 2]


def picture_to_text_ranks(scores: np.ndarray, picture_of: np.ndarray) -> np.ndarray:
  """int[P]: for each picture, how many texts of other pictures rank before the best of its texts.

  Args:
    picture_of: int[T], the picture that each text belongs to. Each picture has at least one text.
  """
  belongs = picture_of[None] == np.arange(len(scores))[:, None]
  best = np.where(belongs, scores, -np.inf).max(1, keepdims=True)
  return (~belongs & ~(scores < best)).sum(1)


def text_to_picture_ranks(scores: np.ndarray, picture_of: np.ndarray) -> np.ndarray:
  """int[T]: for each text, how many other pictures rank before its picture."""
  right = scores[picture_of, np.arange(len(picture_of))]
  return (~(scores < right)).sum(0) - 1  # the right picture is not clearly worse than itself, and is taken off again


def recalls(picture_to_text: np.ndarray, text_to_picture: np.ndarray, picture_of: np.ndarray) -> dict[str, float]:
  """Shares in [0, 1] found among the first K: `i2t_r1` (text for a picture), `t2i_r1` (picture for a text) and so on.

  Args:
    picture_to_text: [P, T], the scores that rank texts for a picture.
    text_to_picture: [P, T], the scores that rank pictures for a text.
    picture_of: int[T], the picture that each text belongs to.
  """
  ranks = {"i2t": picture_to_text_ranks(picture_to_text, picture_of),
           "t2i": text_to_picture_ranks(text_to_picture, picture_of)}
  shares = {}
  for direction, rank in ranks.items():
    for k in KS:
      shares[f"{direction}_r{k}"] = float((rank < k).mean())
  return shares


def best(similarity: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """bool[P, T] twice: the `count` best texts of each picture, and the `count` best pictures of each text."""
  return _best_of_rows(similarity, count), _best_of_rows(similarity.T, count).T


def reranked(similarity: np.ndarray, matching: np.ndarray, chosen: np.ndarray) -> np.ndarray:
  """Scores that put the chosen pairs first, by similarity + matching probability as in BLIP-2, then the others.

  Args:
    similarity: [P, T], cosines; the others keep their order by them.
    matching: [P, T], probabilities; only those of the chosen pairs are used.
    chosen: bool[P, T].
  """
  return np.where(chosen, similarity + matching, similarity - _BEHIND)


def _best_of_rows(scores: np.ndarray, count: int) -> np.ndarray:
  """bool, of the shape of `scores`: True at the `count` greatest of each row."""
  chosen = np.zeros(scores.shape, bool)
  order = np.argsort(-scores, axis=1, kind="stable")
  np.put_along_axis(chosen, order[:, :count], True, axis=1)
  return chosen
