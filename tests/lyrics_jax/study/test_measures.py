"""What is counted as right, on made-up predictions."""

import numpy as np
import pytest

from lyrics_jax.study.measure_align import _Hidden, _Matched


class Tokenizer:
  """Characters as tokens; a tag is one letter."""

  def encode(self, text):
    return [ord(letter) for letter in text]


def ids(*texts: str) -> np.ndarray:
  """int32 [B, L]; `_` stands where nothing is hidden."""
  return np.array([[-1 if letter == "_" else ord(letter) for letter in text] for text in texts], np.int32)


def test_hidden_tokens_by_kind():
  hidden = _Hidden(Tokenizer())
  hidden.add(ids("_c_(0.12,0.34)"), ids("?c?(0.19,1.34)"))
  hidden.add(ids("_s_(0.56,1.00)"), ids("?t?(0.56,1.00)"))
  assert hidden.figures() == pytest.approx({"msp_tags": 1 / 2, "msp_tenths": 4 / 4, "msp_digits": 10 / 12})


def test_nothing_hidden_gives_no_figure():
  hidden = _Hidden(Tokenizer())
  hidden.add(ids("_____"), ids("abcde"))
  assert hidden.figures() == {}


def told(**changes):
  yes = np.ones((2, 4), bool)
  return dict(pairs=yes, negatives=~yes, named=yes, found=yes[0]) | changes


def test_pairs_and_negatives_weigh_the_same():
  matched = _Matched()
  matched.add(told(found=np.array([True, False, False, False])))
  assert matched.figures() == {"itm_visual": 1.0, "itm_grounding": 1.0}
  matched = _Matched()
  matched.add(told(negatives=np.ones((2, 4), bool)))  # whoever always says yes knows nothing
  assert matched.figures() == {"itm_visual": 0.5, "itm_grounding": 0.5}


def test_halves_are_apart_and_texts_without_objects_are_left_out_of_the_second():
  pairs = np.array([[True, True, False, False], [True, False, False, False]])
  named = np.array([[True, True, False, False], [True, True, True, False]])
  matched = _Matched()
  matched.add(told(pairs=pairs, named=named))
  assert matched.figures() == {"itm_visual": (0.5 + 1) / 2, "itm_grounding": (0.5 + 1) / 2}
  matched = _Matched()
  matched.add(told(named=np.zeros((2, 4), bool)))
  assert matched.figures() == {"itm_visual": 1.0}
