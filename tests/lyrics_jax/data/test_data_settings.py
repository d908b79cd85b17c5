import json

import pytest

from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.settings import DataSettings
from lyrics_jax.data.templates import Plain
from lyrics_jax.tasks import TASKS, Task
from refiner_export.common.settings import UserError, from_dict


@pytest.mark.parametrize("changes, message", [
    ({"spatial_length": 1}, "spatial_length=1 must be at least 2"), ({"pictures": 0}, "pictures=0 must be at least 1"),
    ({"workers": -1}, "workers=-1 must be at least 0"), ({"fit": "stretch"}, "fit: expected"),
    ({"crop_scale": (0.0, 1.0)}, r"crop_scale=\(0.0, 1.0\) must satisfy 0 < low <= high <= 1"),
    ({"crop_scale": (0.9, 0.5)}, "crop_scale")])
def test_impossible_settings_name_the_field(changes, message):
  with pytest.raises(UserError, match=rf"^config\.data\.{message}"):
    DataSettings(**changes).finalize("config.data")


def test_rows_templates_and_tasks_are_read_back():
  rows = Conversations(template=Plain(), spatial_to_llm=True, tasks=(*TASKS, Task(name="ocr", templates=("Read it.",))))
  data = DataSettings(rows=rows, pictures=4, fit="pad")
  data.finalize("config.data")
  assert from_dict(DataSettings, json.loads(data.to_json())) == data
