"""The entries of the arrays of a large JSON file, one at a time: the file is never in memory as a whole.

The file is read in windows. Bytes count as characters there, so that the place of an entry in the window is its place
in the file. An entry that is not plain ASCII is parsed again from its bytes.
"""

import json
import os
from collections.abc import Iterator
from json.decoder import WHITESPACE
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from refiner_export.common.files import is_local
from refiner_export.common.settings import UserError, require

_WINDOW = 1 << 20  # bytes
_MARK = b"\xef\xbb\xbf"  # what some editors write before UTF-8
_DECODE = json.JSONDecoder().raw_decode


class Entry(NamedTuple):
  """An object in a JSON array that the file's root names.

  Attributes:
    array: the name of the array.
    number: the place in the array.
    fields: the object.
    start, stop: where its bytes lie in the file.
  """
  array: str
  number: int
  fields: dict
  start: int
  stop: int


def entries(path: epath.Path, field: str, arrays: tuple[str, ...]) -> Iterator[Entry]:
  """The entries of these arrays, in the order of the file; what else the file holds is passed over.

  Args:
    path: the file.
    field: of the configuration, which names the file; for errors.
    arrays: entries of the root.

  Raises:
    UserError: the file is no JSON object, one of the arrays is missing or is no array, or an entry is no object.
  """
  with path.open("rb") as file:
    reader = _Reader(file)
    try:
      yield from _entries(reader, path, field, arrays)
    except (ValueError, RecursionError) as error:
      reason = " ".join(str(error).split())
      raise UserError(f"{field}: {path} is not JSON ({reason}, after byte {reader.offset}): mend the file") from None


def _entries(reader: "_Reader", path: epath.Path, field: str, arrays: tuple[str, ...]) -> Iterator[Entry]:
  seen, where = set(), f"{field}: {path}"
  require(reader.peek() == "{", f"{where}: holds no object of arrays such as {', '.join(arrays)}: mend the file")
  for name in reader.keys():
    if name not in arrays:
      reader.value()
      continue
    require(name not in seen, f"{where}: has {name!r} twice: mend the file")
    seen.add(name)
    require(reader.peek() == "[", f"{where}: {name} is not an array: mend the file")
    for number, fields, start in reader.elements():
      require(isinstance(fields, dict), f"{where}: {name}[{number}] is not an object: mend the file")
      yield Entry(name, number, fields, start, reader.offset)
  reader.end()
  for name in arrays:
    require(name in seen, f"{where}: bad or missing entry {name!r}: expected an array")


class Places:
  """Reads parts of a file at any place: from the disk, or from memory where the file lies in an object store."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._file = path.open("rb") if is_local(path) else None
    self._data = b"" if is_local(path) else path.read_bytes()

  def parse(self, start: int, stop: int) -> dict:
    """The object whose bytes lie there. Raises `UserError` when the file was edited since."""
    try:
      return json.loads(self._bytes(start, stop))
    except ValueError:
      raise UserError(f"{self._path} was edited while it was read: run the same command again") from None

  def _bytes(self, start: int, stop: int) -> bytes:
    if self._file is None:
      return self._data[start:stop]
    return os.pread(self._file.fileno(), stop - start, start)


class _Reader:
  """JSON values one after the other. All methods raise `ValueError` for what is no JSON."""

  def __init__(self, file: BinaryIO):
    self._file, self._ended = file, False
    start = file.read(len(_MARK))
    self._text = "" if start == _MARK else start.decode("latin-1")
    self._base = len(_MARK) if start == _MARK else 0
    self._next = 0

  @property
  def offset(self) -> int:
    """Where the next character lies in the file."""
    return self._base + self._next

  def peek(self) -> str:
    """The next character that is not white space."""
    if self._text[self._next:self._next + 1] > " ":
      return self._text[self._next]
    while True:
      self._next = WHITESPACE.match(self._text, self._next).end()
      if self._next < len(self._text):
        return self._text[self._next]
      if self._ended:
        raise ValueError("it ends too early")
      self._refill()

  def end(self) -> None:
    """Raises `ValueError` when something follows."""
    while not self._ended:
      self._next = WHITESPACE.match(self._text, self._next).end()
      if self._next < len(self._text):
        raise ValueError("something follows its end")
      self._refill()

  def keys(self) -> Iterator[str]:
    """The keys of the object that comes next. Whoever iterates reads each value before he asks for the next key."""
    self._take("{")
    if self.peek() == "}":
      self._take("}")
      return
    while True:
      key = self.value()
      if not isinstance(key, str):
        raise ValueError("a key is not a text")
      self._take(":")
      yield key
      if self._take(",}") == "}":
        return

  def elements(self) -> Iterator[tuple[int, Any, int]]:
    """Number, value and first byte of each element of the array that comes next."""
    self._take("[")
    if self.peek() == "]":
      self._take("]")
      return
    number = 0
    while True:
      self.peek()
      start = self._base + self._next
      yield number, self._value(), start
      if self._take(",]") == "]":
        return
      number += 1

  def value(self) -> Any:
    self.peek()
    return self._value()

  def _value(self) -> Any:
    """The value that begins at the next character."""
    while True:
      try:
        value, end = _DECODE(self._text, self._next)
        following = self._text[end:end + 1]
        whole = self._ended or following != "" and following not in ".eE"  # a number may go on in the next window
      except ValueError:
        if self._ended:
          raise
        whole = False
      if whole:
        text = self._text[self._next:end]
        self._next = end
        return value if text.isascii() else json.loads(text.encode("latin-1"))
      self._refill()

  def _take(self, expected: str) -> str:
    found = self.peek()
    if found not in expected:
      raise ValueError(f"expected one of {expected!r}, found {found!r}")
    self._next += 1
    return found

  def _refill(self) -> None:
    """Reads on. The window grows as long as one value does not fit into it."""
    data = self._file.read(max(_WINDOW, len(self._text) - self._next))
    self._ended = not data
    self._base += self._next
    self._text = self._text[self._next:] + data.decode("latin-1")
    self._next = 0
