"""What COCO's files hold, in little memory: names of pictures and categories, and where each annotation lies.

Both files are read once, entry by entry, before anything is exported. What cannot be an annotation file of COCO at all
ends there, with the entry named. A single annotation that is of no use is left out later and counted.
"""

import array
import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from refiner_export.common.settings import UserError, require
from refiner_export.records.record import is_text
from refiner_export.sources.json_entries import Entry, Places, entries

NO_PICTURE = "its image_id is no picture's id"
SAME_PICTURE = "a picture is listed again"
SAME_CATEGORY = "a category is listed again"
_SHOWN = 60  # characters of a wrong value in an error

Key = int | str


@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
  """A picture of the annotation files; `key` is its id."""
  key: Key
  file: str
  width: int
  height: int


class Annotations:
  """The annotations of one file: where they lie, and which picture they belong to."""

  def __init__(self, path: epath.Path, positions: Mapping[Key, int]):
    """Args: path: of the file; positions: id -> number of each picture."""
    self._path, self._positions, self._unmatched = path, positions, 0
    self._stray: Key | None = None  # an image_id that is no picture's
    self._keys: list[Key] = []
    self._pictures, self._spans = array.array("q"), array.array("q")

  def add(self, entry: Entry) -> None:
    key = key_of(self._path, entry, "image_id")
    position = self._positions.get(key)
    if position is None:
      self._unmatched += 1
      self._stray = key
      return
    self._keys.append(key_of(self._path, entry, "id"))
    self._pictures.append(position)
    self._spans.extend((entry.start, entry.stop))

  def close(self) -> int:
    """Sorts what was added. Returns how many annotations belong to no picture.

    Raises:
      UserError: not a single one of them belongs to a picture.
    """
    pictures = np.frombuffer(self._pictures, np.int64)
    require(len(pictures) > 0 or self._unmatched == 0,
            f"{self._path}: none of its {self._unmatched} annotations belongs to a picture: an image_id is "
            f"{_shown(self._stray)}, an id of a picture {_shown(next(iter(self._positions), None))}")
    order = _order(pictures, self._keys)
    self._spans = np.frombuffer(self._spans, np.int64).reshape(-1, 2)[order]
    self._first = np.searchsorted(pictures[order], np.arange(len(self._positions) + 1))
    self._places = Places(self._path)
    del self._keys, self._pictures
    return self._unmatched

  def of(self, picture: int) -> Iterator[dict]:
    """The annotations of a picture, in the order of their ids."""
    for start, stop in self._spans[self._first[picture]:self._first[picture + 1]].tolist():
      yield self._places.parse(start, stop)


@dataclasses.dataclass(frozen=True)
class Index:
  """Both files.

  Attributes:
    pictures: in the order of their ids.
    captions, objects: None where the file is not given.
    categories: category id -> name.
    unmatched: how many entries were left out because they belong to nothing, by reason.
  """
  pictures: Sequence[Listed]
  captions: Annotations | None
  objects: Annotations | None
  categories: Mapping[Key, str]
  unmatched: Mapping[str, int]


# An export reads slices of the same two files many times. `version` is the hash of the files, so that files which
# were edited in between are read again.
@functools.lru_cache(maxsize=1)
def read_index(captions: epath.Path | None, instances: epath.Path | None, version: str) -> Index:
  """Raises `UserError`, which names file and entry."""
  del version
  unmatched = collections.Counter()
  field = "source.captions" if captions else "source.instances"
  pictures = _read_pictures(captions or instances, field, unmatched)
  positions = {picture.key: number for number, picture in enumerate(pictures)}
  caption_index = _read_captions(captions, positions, unmatched) if captions else None
  object_index, categories = _read_instances(instances, positions, unmatched) if instances else (None, {})
  return Index(pictures, caption_index, object_index, categories, dict(unmatched))


def as_key(value: object) -> Key | None:
  """An id as it is compared: the text "7" is the number 7. None for what is no id."""
  if type(value) is int:
    return value
  if isinstance(value, float) and value.is_integer():
    return int(value)
  if not is_text(value) or not value.strip():
    return None
  is_number = value.isascii() and value.isdecimal() and len(value) < 19 and str(int(value)) == value
  return int(value) if is_number else value


def key_of(path: epath.Path, entry: Entry, name: str) -> Key:
  """The id that an entry has under this name. Raises `UserError` for what is no id."""
  key = as_key(entry.fields.get(name))
  if key is None:
    raise bad_entry(path, entry, name, "expected a number or a text")
  return key


def bad_entry(path: epath.Path, entry: Entry, name: str, problem: str) -> UserError:
  """Names the file, the entry and its id."""
  value = f" {_shown(entry.fields[name])}" if name in entry.fields else ""
  return UserError(f"{path}: {entry.array}[{entry.number}] (id {_shown(entry.fields.get('id'))}): bad or missing entry "
                   f"{name!r}{value}: {problem}: mend the file")


def _shown(value: object) -> str:
  text = ascii(value)
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _order(pictures: np.ndarray, keys: list[Key]) -> np.ndarray:
  """Sorts by picture, then by id. Numbers come before texts."""
  try:
    return np.lexsort((np.array(keys, np.int64), pictures))
  except (ValueError, OverflowError, TypeError):
    return np.array(sorted(range(len(keys)), key=lambda k: (pictures[k], *_rank(keys[k]))), np.int64)


def _rank(key: Key) -> tuple[bool, Key]:
  return isinstance(key, str), key


def _read_pictures(path: epath.Path, field: str, unmatched: collections.Counter) -> list[Listed]:
  found: dict[Key, Listed] = {}
  for entry in entries(path, field, ("images",)):
    key = key_of(path, entry, "id")
    picture = Listed(key, _file(path, entry), _side(path, entry, "width"), _side(path, entry, "height"))
    if found.setdefault(key, picture) == picture and found[key] is picture:
      continue
    require(found[key] == picture, f"{path}: images[{entry.number}] (id {_shown(key)}): {_shown(picture.file)} has the "
                                   f"id of {_shown(found[key].file)}: mend the file")
    unmatched[SAME_PICTURE] += 1
  return sorted(found.values(), key=lambda picture: _rank(picture.key))


def _file(path: epath.Path, entry: Entry) -> str:
  name = entry.fields.get("file_name")
  if name is None and isinstance(entry.fields.get("coco_url"), str):  # LVIS names no file
    name = entry.fields["coco_url"].rpartition("/")[2]
  if not is_text(name) or not name:
    raise bad_entry(path, entry, "file_name", "expected the name of a file")
  return name


def _side(path: epath.Path, entry: Entry, name: str) -> int:
  value = entry.fields.get(name)
  if type(value) is not int or not 1 <= value < 2**31:
    raise bad_entry(path, entry, name, "expected a number of pixels")
  return value


def _read_captions(path: epath.Path, positions: Mapping[Key, int], unmatched: collections.Counter) -> Annotations:
  found = Annotations(path, positions)
  for entry in entries(path, "source.captions", ("annotations",)):
    if "caption" not in entry.fields:
      raise bad_entry(path, entry, "caption", "expected COCO's captions file")
    found.add(entry)
  _count(unmatched, f"caption: {NO_PICTURE}", found.close())
  return found


def _read_instances(
    path: epath.Path, positions: Mapping[Key, int], unmatched: collections.Counter,
) -> tuple[Annotations, dict[Key, str]]:
  found, categories, named = Annotations(path, positions), {}, set()
  for entry in entries(path, "source.instances", ("annotations", "categories")):
    if entry.array == "annotations":
      named.add(_category(path, entry))
      found.add(entry)
      continue
    key, name = key_of(path, entry, "id"), entry.fields.get("name")
    if not isinstance(name, str):
      raise bad_entry(path, entry, "name", "expected a text")
    if key in categories:
      require(categories[key] == name, f"{path}: categories[{entry.number}] (id {_shown(key)}): {_shown(name)} has the "
                                       f"id of {_shown(categories[key])}: mend the file")
      unmatched[SAME_CATEGORY] += 1
    categories[key] = name
  require(not named or not named.isdisjoint(categories),
          f"{path}: none of its annotations has a category of the file: a category_id is "
          f"{_shown(next(iter(named), None))}, an id of a category {_shown(next(iter(categories), None))}")
  _count(unmatched, f"object: {NO_PICTURE}", found.close())
  return found, categories


def _category(path: epath.Path, entry: Entry) -> Key:
  """The category of an object, whose box is checked too."""
  key = key_of(path, entry, "category_id")
  box = entry.fields.get("bbox")
  if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
    raise bad_entry(path, entry, "bbox", "expected four numbers")
  return key


def _are_numbers(values: list) -> bool:
  for value in values:
    if type(value) not in (int, float):
      return False
  return True


def _count(unmatched: collections.Counter, reason: str, number: int) -> None:
  if number:
    unmatched[reason] += number
