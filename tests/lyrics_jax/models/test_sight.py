"""The attention masks say what the table of objectives says, pair by pair."""

import jax.numpy as jnp
import numpy as np
import pytest

from lyrics_jax.models import visibility
from lyrics_jax.models.connectors.sight import attention_mask

# For each objective, who may look (row) at whom (column), in the order V, G, S, C: the paper's figure 3 as text.
TABLE = {
    "ITC": {"V": "VG", "G": "VG", "S": "SC", "C": "SC"},
    "ITM": {"V": "VC", "G": "GS", "S": "GS", "C": "VC"},
    "ICG": {"V": "VG", "G": "VG", "S": "", "C": "VGC"},
    "MSP": {"V": "VG", "G": "VG", "S": "VGS", "C": ""},
    "INSTRUCT": {"V": "VGSC", "G": "VGSC", "S": "VGSC", "C": "VGSC"},
}
LENGTHS = {"V": 2, "G": 3, "S": 4, "C": 5}


def segments(names):
  return np.array([visibility._NUMBER[name] for name in names for _ in range(LENGTHS[name])])


def expected(objective, rows, columns, valid):
  """The mask position by position. A position is (segment, index within it); `valid` is bool[B, columns]."""
  spread = lambda names: [(name, index) for name in names for index in range(LENGTHS[name])]
  out = np.zeros((len(valid), 1, len(spread(rows)), len(spread(columns))), bool)
  for b in range(len(valid)):
    for r, (source, i) in enumerate(spread(rows)):
      for c, (target, j) in enumerate(spread(columns)):
        future = objective == "ICG" and source == target == "C" and j > i
        out[b, 0, r, c] = target in TABLE[objective][source] and valid[b, c] and not future
  return out


@pytest.mark.parametrize("objective", TABLE)
@pytest.mark.parametrize("rows, columns", [
    ("VGSC", "VGSC"),  # one full pass
    ("VG", "VG"), ("SC", "SC"), ("C", "C"), ("S", "S"),  # a part alone
    ("C", "VGC"), ("S", "VGS"), ("SC", "VGSC"),  # queries that ran before stand in front
])
def test_equals_the_table(objective, rows, columns):
  total = sum(LENGTHS[name] for name in columns)
  valid = np.random.default_rng(0).random((3, total)) < 0.6
  valid[0] = True
  made = attention_mask(getattr(visibility, objective), segments(rows), segments(columns), jnp.asarray(valid))
  np.testing.assert_array_equal(made, expected(objective, rows, columns, valid))


def test_only_generation_is_causal():
  assert [name for name in TABLE if getattr(visibility, name).causal] == ["ICG"]


def test_padding_is_seen_by_nobody():
  valid = np.ones((2, 14), bool)
  valid[1, 9:] = False
  for objective in TABLE:
    made = attention_mask(getattr(visibility, objective), segments("VGSC"), segments("VGSC"), jnp.asarray(valid))
    assert not np.asarray(made)[1, 0, :, 9:].any()
