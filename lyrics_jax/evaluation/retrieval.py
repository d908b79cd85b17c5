"""Recall at K of image-text retrieval, from scores of pictures and texts. Plain NumPy, no model.

Every text belongs to one picture; a picture has one text or more. Scores are float[P, T], row a picture, column a text.
Ties, and scores that are not numbers, count against us: a right answer stands behind every wrong one that is not clearly worse.
"""

import numpy as np

KS = (1, 5, 10)

_BEHIND = 3.0  # takes a cosine, [-1, 1], below every cosine + probability, [-1, 2]


def picture_to_text_ranks(scores: np.ndarray, picture_of: np.ndarray) -> np.ndarray:
  """int[P]: how many texts of other pictures stand before the best of a picture's own.

  Args:
    picture_of: int[T], the picture that each text belongs to; every picture has at least one.
  """
  own = picture_of[None] == np.arange(len(scores))[:, None]
  best = np.where(own, scores, -np.inf).max(1, keepdims=True)
  return (~own & ~(scores < best)).sum(1)


def text_to_picture_ranks(scores: np.ndarray, picture_of: np.ndarray) -> np.ndarray:
  """int[T]: how many other pictures stand before a text's own."""
  own = scores[picture_of, np.arange(len(picture_of))]
  return (~(scores < own)).sum(0) - 1  # its own picture is not before itself


def recalls(picture_to_text: np.ndarray, text_to_picture: np.ndarray, picture_of: np.ndarray) -> dict[str, float]:
  """Shares in [0, 1] found among the first K, as `i2t_r1` (text for a picture), `t2i_r1` (picture for a text) and so on.

  Args:
    picture_to_text, text_to_picture: [P, T], the scores by which texts are ranked for a picture, and pictures for a text.
  """
  ranks = {"i2t": picture_to_text_ranks(picture_to_text, picture_of), "t2i": text_to_picture_ranks(text_to_picture, picture_of)}
  return {f"{direction}_r{k}": float((rank < k).mean()) for direction, rank in ranks.items() for k in KS}


def best(similarity: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """bool[P, T] twice: the `count` best texts of each picture, and the `count` best pictures of each text."""
  def of_rows(scores):
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, np.argsort(-scores, axis=1, kind="stable")[:, :count], True, axis=1)
    return chosen

  return of_rows(similarity), of_rows(similarity.T).T


def reranked(similarity: np.ndarray, matching: np.ndarray, chosen: np.ndarray) -> np.ndarray:
  """Scores that put the chosen first, by similarity + matching probability as BLIP-2 does; the rest follow by similarity.

  Args:
    similarity: [P, T], cosines. matching: [P, T], probabilities, looked at where `chosen`, bool[P, T], only.
  """
  return np.where(chosen, similarity + matching, similarity - _BEHIND)
