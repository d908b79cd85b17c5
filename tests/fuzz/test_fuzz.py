"""A few cases of each part of `make fuzz`, always the same ones."""

import fuzz
import pytest


@pytest.mark.parametrize("name", [*fuzz.PARTS, "bits"])
def test_no_case_ends_badly(name, capsys):
  ends = fuzz.run(name, seed=1, small=True)
  assert ends.total() > 50 and fuzz.bad(ends) == 0, capsys.readouterr()


def test_bad_ends_are_counted(capsys):
  ends = fuzz.collections.Counter(read=7, wrong=2, crash=1)
  assert fuzz.bad(ends) == 3
  assert fuzz.line("pictures", ends, 3) == "pictures: 10 cases in 3 s: 7 read; 0 traceback, 1 crash, 0 hang, 2 wrong"
