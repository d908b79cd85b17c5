"""Three exported photos and a stage-2 run of four steps on them."""

import pathlib

import pytest
import small_run


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> pathlib.Path:
  return small_run.exported_photos(tmp_path_factory, 3, small_run.GRID)


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> pathlib.Path:
  """The output directory of a finished run. Not to be changed: copy it."""
  return small_run.trained_vlm(tmp_path_factory)
