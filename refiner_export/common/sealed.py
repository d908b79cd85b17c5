"""JSON files that begin with their checksum, so that a reader notices any changed bit, in white space too.

A sealed text is the text of a JSON object with an entry `checksum` put in front: the SHA-256 of the text without it.
"""

import dataclasses
import hashlib
import json
import math
import re
import typing

_ENTRY = '"checksum": "{}"'
_SEALED = re.compile(rb'\{(?P<space>\n  |)"checksum": "(?P<digest>[0-9a-f]{64})",')


def seal(fields: dict, indent: int | None = None) -> bytes:
  """The sealed text of a JSON object with at least one entry: one line, or indented by two columns."""
  body = json.dumps(fields, indent=indent, sort_keys=True) + "\n"
  space = "\n  " if indent else ""
  entry = _ENTRY.format(hashlib.sha256(body.encode()).hexdigest())
  return f"{{{space}{entry},{body[1:]}".encode()


def unseal(data: bytes) -> dict:
  """The entries of a sealed text, or of a plain JSON object as earlier versions wrote it.

  Raises:
    ValueError: the text is no JSON object, or it is not as it was sealed. The message is one line.
  """
  fields = parse_object(data)
  if "checksum" not in fields:
    return fields
  found = _SEALED.match(data)
  if not found or hashlib.sha256(b"{" + data[found.end():]).hexdigest() != found["digest"].decode():
    raise ValueError("its checksum does not match: it is damaged or was edited")
  del fields["checksum"]
  return fields


def parse_object(data: bytes) -> dict:
  """The entries of a JSON object in UTF-8. Raises `ValueError` with one line for everything else."""
  try:
    fields = json.loads(data)
  except RecursionError:
    raise ValueError("it is nested too deeply") from None
  except ValueError as error:  # bad UTF-8 too
    raise ValueError(" ".join(str(error).split())) from None
  if not isinstance(fields, dict):
    raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
  return fields


def build(kind: type, fields: dict):
  """A dataclass of counts, numbers, texts, lists and objects, out of a JSON object.

  Raises:
    ValueError: an entry is missing, unknown or of another type; a count is negative; a number is not finite.
  """
  if not isinstance(fields, dict):
    raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
  known = {field.name: field for field in dataclasses.fields(kind)}
  unknown = sorted(set(fields) - set(known))
  if unknown:
    raise ValueError(f"{unknown[0]!r} is unknown to this program")
  for name, field in known.items():
    if name in fields:
      _check(name, fields[name], field.type)
    elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      raise ValueError(f"{name!r} is missing")
  return kind(**fields)


def _check(name: str, value, annotation) -> None:
  kind = typing.get_origin(annotation) or annotation
  fits = isinstance(value, kind)
  if kind is int:
    fits = type(value) is int and value >= 0
  elif kind is float:
    fits = type(value) in (int, float) and math.isfinite(value)
  if not fits:
    raise ValueError(f"{name!r} is {str(value)[:40]!r}, expected {kind.__name__}")
