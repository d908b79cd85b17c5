"""Recall at K against ranking by hand, with ties."""

import numpy as np
import pytest

from lyrics_jax.evaluation.retrieval import KS, best, picture_to_text_ranks, recalls, reranked, text_to_picture_ranks


def by_hand(scores, picture_of):
  """Recalls from sorted lists in which wrong answers come first among equals."""
  def place(candidates):  # of the first right answer in a list of (score, right)
    ordered = sorted(candidates, key=lambda each: (-each[0], each[1]))
    return next(place for place, (_, right) in enumerate(ordered) if right)

  pictures, texts = range(scores.shape[0]), range(scores.shape[1])
  ranks = {"i2t": [place([(scores[p, t], picture_of[t] == p) for t in texts]) for p in pictures],
           "t2i": [place([(scores[p, t], picture_of[t] == p) for p in pictures]) for t in texts]}
  return {f"{direction}_r{k}": np.mean([rank < k for rank in some]) for direction, some in ranks.items() for k in KS}


@pytest.mark.parametrize("seed", range(20))
def test_against_ranking_by_hand(seed):
  rng = np.random.default_rng(seed)
  pictures = int(rng.integers(2, 14))
  picture_of = rng.permutation(np.concatenate([np.arange(pictures), rng.integers(0, pictures, 2 * pictures)]))
  scores = rng.integers(0, 6, (pictures, len(picture_of))) / 4  # many ties
  assert recalls(scores, scores, picture_of) == pytest.approx(by_hand(scores, picture_of))


def test_perfect_scores():
  picture_of = np.repeat(np.arange(12), 3)
  scores = (picture_of[None] == np.arange(12)[:, None]).astype(float)
  assert set(recalls(scores, scores, picture_of).values()) == {1.0}


def test_chance():
  picture_of = np.arange(300)
  found = recalls(*np.random.default_rng(0).random((2, 300, 300)), picture_of)
  for name, value in found.items():
    assert value == pytest.approx(int(name.rpartition("r")[2]) / 300, abs=0.03)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_scores_that_say_nothing_find_nothing(value):
  picture_of = np.repeat(np.arange(12), 2)
  scores = np.full((12, 24), value)
  assert (picture_to_text_ranks(scores, picture_of) == 22).all()
  assert (text_to_picture_ranks(scores, picture_of) == 11).all()
  assert set(recalls(scores, scores, picture_of).values()) == {0.0}


def test_the_directions_have_their_own_scores():
  right, wrong = np.eye(20), 1 - np.eye(20)
  found = recalls(right, wrong, np.arange(20))
  assert found["i2t_r1"] == 1 and found["t2i_r10"] == 0


def test_the_best_of_both_directions():
  similarity = np.array([[0.9, 0.1, 0.5], [0.8, 0.2, 0.3]])
  texts, pictures = best(similarity, 1)
  np.testing.assert_array_equal(texts, [[True, False, False], [True, False, False]])
  np.testing.assert_array_equal(pictures, [[True, False, True], [False, True, False]])
  assert all(chosen.all() for chosen in best(similarity, 5))


def test_the_reranked_come_first_and_the_rest_keep_their_order():
  similarity = np.array([[0.9, 0.8, -0.9, -1.0, 1.0]])
  scores = reranked(similarity, np.array([[0.0, 0.3, 0.0, 0.0, 9.0]]), np.array([[True, True, False, True, False]]))
  np.testing.assert_array_equal(np.argsort(-scores[0]), [1, 0, 3, 4, 2])
