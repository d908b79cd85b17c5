"""What one row of a batch is: the base of `pairs.Pairs` and `conversations.Conversations`."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from lyrics_jax.data.batch import Dimensions, Fields
from refiner_export.common.settings import Settings, require
from refiner_export.records.record import Record

if TYPE_CHECKING:
  from lyrics_jax.data.settings import DataSettings

Example = dict[str, "np.ndarray | str"]  # the fields of one row, without the rows axis, and "record", the record's id


class Records(Protocol):
  """What is read: `reader.RecordDirectory`, or anything like it."""

  def __len__(self) -> int: ...
  def __getitem__(self, position: int) -> Record: ...
  def read_conversation_counts(self) -> np.ndarray: ...


class Objective(Protocol):
  """What the rows need to know of an objective of the stage: the fields that it adds, and how to make them."""
  adds: Fields

  def prepare(self, pair: Any, tokenizer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]: ...


class Examples(Protocol):
  """Turns an item, what `Rows.items` gives, into an example.

  `augment` false takes the whole picture, the first caption and the first template of a task. An item that cannot be
  used is a `RecordError` that names the record.
  """
  fields: Fields

  def __call__(self, item: Any, rng: np.random.Generator, augment: bool = True) -> Example: ...


@dataclasses.dataclass(unsafe_hash=True)
class Rows(Settings):
  """What one row of a batch is made of. A subclass says which items there are and how one becomes a row."""
  makes: ClassVar[tuple[str, ...]] = ()  # names of the fields that the rows can hold, those of objectives not counted
  item: ClassVar[str] = "record"  # what an item is called in messages

  def items(self, records: Records) -> Sequence:
    """Random access to the items of a directory, each of which becomes one row."""
    raise NotImplementedError

  def examples(self, data: "DataSettings", fields: Fields, dimensions: Dimensions,
               objectives: Sequence[Objective] = ()) -> Examples:
    """What turns an item into an example.

    Args:
      data: lengths, tokenizers, augmentation.
      fields: those that the stage reads; no other field is made.
      dimensions: the sizes of their shapes.
      objectives: their `prepare` makes the fields that they add.

    Raises:
      UserError: a tokenizer is missing or too large; these rows cannot make a field that is read.
    """
    raise NotImplementedError

  def check_data(self, data: "DataSettings", path: str) -> None:
    """Raises `UserError` for data settings that these rows cannot use. `path` is the dotted name of `data`."""

  def check_fields(self, fields: Fields, objectives: Sequence[Objective] = ()) -> None:
    """Raises `UserError` when a field is read that neither these rows nor an objective makes."""
    made = set(self.makes)
    for objective in objectives:
      made |= set(objective.adds)
    for name in fields:
      require(name in made, f"config.data.rows={type(self).__name__} makes no field {name!r}, which the stage reads: "
                            "choose other rows, or leave out the objective that reads it")
