"""Formats of pictures that are not read: they are named, so that a person knows what to do."""

_BRANDS = {  # of an ISO media file, in bytes 8 to 11
    b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"hevc": "HEIC", b"hevx": "HEIC",
    b"mif1": "HEIF", b"msf1": "HEIF", b"avif": "AVIF", b"avis": "AVIF", b"crx ": "raw camera"}
_BEGINNINGS = {
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000", b"\0\0\1\0": "ICO", b"\0\0\2\0": "ICO",
    b"8BPS": "PSD", b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL", b"\xff\x0a": "JPEG XL", b"%!PS": "PostScript",
    b"%PDF": "PDF", b"gimp xcf": "XCF", b"SIMPLE  =": "FITS", b"\x76\x2f\x31\x01": "OpenEXR", b"#?RADIANCE": "HDR",
    b"qoif": "QOI", b"DDS ": "DDS", b"FUJIFILMCCD-RAW": "raw camera", b"IIRO": "raw camera", b"FORM": "IFF"}


def name_of(data: bytes) -> str | None:
  """The name of a format that is known and not read, by the first bytes of a file."""
  if data[4:8] == b"ftyp" and data[8:12] in _BRANDS:
    return _BRANDS[data[8:12]]
  for beginning, name in _BEGINNINGS.items():
    if data.startswith(beginning):
      return name
  if data[128:132] == b"DICM":
    return "DICOM"
  return None


def refusal(data: bytes) -> str:
  """Why a file that is none of the formats that are read is refused."""
  name = name_of(data)
  but = "" if name is None else f" of a kind that is read, but {name}: convert it to PNG or JPEG"
  return f"not a picture{but}"
