"""A figure of where the queries look: over the photo's patches, and over the boxes of the refiner's tokens."""

import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from PIL import Image

from refiner_export.common.boxes import iou, to_xyxy
from refiner_export.pages.page import object_colour
from refiner_export.records.record import Picture

_ROWS = 4  # layers shown at most
_COLUMNS = ("mean of all", "most focused", "least like it")
_OUTLINED = 5  # tokens per panel that get their box drawn
_SAME_BOX = 0.9  # an object and a detection row with at least this IoU are the same thing
_RASTER = 192  # points per side on which boxes are drawn
_COLOURS = "inferno"


@dataclasses.dataclass(frozen=True)
class Token:
  """One token of the refiner: its box, (4,) xyxy in [0, 1], and the number of the object it is about, if any."""
  box: np.ndarray
  object: int | None
  mask: bool


@dataclasses.dataclass(frozen=True)
class _Kind:
  """One kind of query: its name, its weights [G, queries, tokens], and the refiner's tokens that it looks at.

  Without refiner tokens, the queries look at the image encoder's patches.
  """
  name: str
  weights: np.ndarray
  refined: tuple[Token, ...] = ()


def tokens(
    picture: Picture, detection_boxes: np.ndarray, mask_boxes: np.ndarray, masks_mask: np.ndarray,
) -> list[Token]:
  """The refiner's tokens in the model's order: detection rows, then masks.

  Args:
    picture: gives the objects.
    detection_boxes: (N, 4) cxcywh in [0, 1] of the detection rows, padding included.
    mask_boxes: (M, 4) cxcywh of the mask tokens, padding included; token k is about object k.
    masks_mask: bool (M,), False for padding.
  """
  detection, masks = to_xyxy(detection_boxes), to_xyxy(mask_boxes)
  object_of: dict[int, int] = {}  # detection row -> object
  for number, box in enumerate(picture.boxes):
    overlap = iou(np.repeat(box[None], len(detection), axis=0), detection)
    if len(overlap) and overlap.max() >= _SAME_BOX:
      object_of.setdefault(int(overlap.argmax()), number)
  found = []
  for row, box in enumerate(detection):
    found.append(Token(box, object_of.get(row), mask=False))
  for number, box in enumerate(masks):
    found.append(Token(box, number if masks_mask[number] else None, mask=True))
  return found


def draw(
    picture: Picture, refined: Sequence[Token], visual: np.ndarray, grounding: np.ndarray, frequency: int, title: str,
) -> bytes:
  """A PNG: the photo with its objects, then a row per layer (at most four) with three panels per kind of query.

  Args:
    picture: the photo and its objects.
    refined: the refiner's tokens, in the order of the last axis of `grounding`.
    visual: [G, H, V, Ti], weights of the visual queries; heads are averaged.
    grounding: [G, H, Q, Tl], weights of the grounding queries. Without grounding queries, or where they had no token to
      look at, their panels are left out.
    frequency: layers from one with cross-attention to the next.
    title: over the figure.
  """
  visual, grounding = np.asarray(visual), np.asarray(grounding)
  with Image.open(io.BytesIO(picture.image)) as image:
    photo = np.asarray(image.convert("RGB"))
  kinds = [_Kind("visual queries", visual.mean(axis=1))]
  if grounding.any():
    kinds.append(_Kind("grounding queries", grounding.mean(axis=1), tuple(refined)))
  layers = np.unique(np.linspace(0, len(visual) - 1, _ROWS).round().astype(int))
  height = min(max(photo.shape[0] / photo.shape[1], 0.5), 1.5)
  figure = Figure(
      figsize=(3 * len(kinds) * len(_COLUMNS), 3 * height * (1.35 + len(layers)) + 1.2), dpi=100, layout="constrained")
  figure.suptitle(title, fontsize=15, parse_math=False)
  top, *rows = figure.subfigures(1 + len(layers), 1, height_ratios=[1.35] + [1] * len(layers))

  overview, shares = top.subplots(1, 2, width_ratios=[1, 1])
  _show_objects(overview, photo, picture)
  _show_shares(shares, layers, frequency, kinds)
  for row, layer in zip(rows, layers):
    for block, kind in zip(np.atleast_1d(row.subfigures(1, len(kinds))), kinds):
      _show_layer(block, photo, picture, kind, layer, frequency)
      block.suptitle(kind.name if layer == layers[0] else None, fontsize=13, fontweight="bold")
  written = io.BytesIO()
  figure.savefig(written, format="png")
  return written.getvalue()


def telling_queries(weights: np.ndarray) -> tuple[int, int]:
  """Of [queries, tokens]: the query with the least entropy, and the query whose weights overlap least with it."""
  entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(axis=1)
  focused = int(entropy.argmin())
  return focused, int(np.minimum(weights, weights[focused]).sum(axis=1).argmin())


def _show_layer(
    block: SubFigure, photo: np.ndarray, picture: Picture, kind: _Kind, layer: int, frequency: int,
) -> None:
  """Three panels: the mean of all queries, and the two queries that tell most."""
  axes = block.subplots(1, len(_COLUMNS))
  weights = kind.weights[layer]
  names, chosen = [_COLUMNS[0]], [weights.mean(axis=0)]
  for name, query in zip(_COLUMNS[1:], telling_queries(weights)):
    names.append(f"{name}: no. {query}")
    chosen.append(weights[query])
  maps = []
  for row in chosen:
    maps.append(_coverage(row, kind.refined) if kind.refined else _patches(row))
  scale = PowerNorm(0.5, 0, max(float(np.max(maps)), 1e-6))  # the square root shows weak weights beside strong ones
  for axis, name, heat, row in zip(axes, names, maps, chosen):
    _show_heat(axis, photo, heat, scale, name)
    _outline(axis, photo, row, kind.refined, picture)
  axes[0].set_ylabel(f"layer {layer * frequency}", fontsize=12)
  bar = block.colorbar(ScalarMappable(scale, _COLOURS), ax=axes, shrink=0.8, aspect=18, pad=0.01)
  bar.set_label("share on boxes here" if kind.refined else "times uniform", fontsize=9)


def _patches(weights: np.ndarray) -> np.ndarray:
  """[S, S] of [1 + S * S] or [S * S] tokens; 1 is the weight that every token would get if all were equal."""
  side = math.isqrt(len(weights))
  return weights[len(weights) - side * side:].reshape(side, side) * len(weights)


def _coverage(weights: np.ndarray, refined: Sequence[Token]) -> np.ndarray:
  """[_RASTER, _RASTER]: at each point the summed weight of the boxes that cover it, in [0, 1]."""
  points = (np.arange(_RASTER) + 0.5) / _RASTER
  left, top, right, bottom = np.stack([token.box for token in refined]).T[..., None]
  columns = ((points >= left) & (points <= right)).astype(np.float32)
  rows = ((points >= top) & (points <= bottom)).astype(np.float32)
  return np.einsum("t,ty,tx->yx", weights, rows, columns, optimize=True)


def _show_heat(axis: Axes, photo: np.ndarray, heat: np.ndarray, scale: PowerNorm, name: str) -> None:
  extent = (0, photo.shape[1], photo.shape[0], 0)
  axis.imshow(photo.mean(axis=2), cmap="gray", extent=extent, vmin=-40, vmax=295)
  alpha = 0.3 + 0.5 * np.asarray(scale(heat))  # the photo shows through where no query looks
  axis.imshow(heat, cmap=_COLOURS, norm=scale, alpha=alpha, extent=extent, interpolation="nearest")
  axis.set_title(name, fontsize=10)
  axis.set(xticks=[], yticks=[])


def _outline(
    axis: Axes, photo: np.ndarray, weights: np.ndarray, refined: Sequence[Token], picture: Picture,
) -> None:
  """The boxes of the heaviest tokens. Masks are dashed; the box of an object has the object's colour and tag."""
  if not refined:
    return
  for position in np.argsort(-weights)[:_OUTLINED]:
    token, weight = refined[position], weights[position]
    if weight <= 0:
      continue
    label, colour = "", "white"
    if token.object is not None:
      label = f"{picture.tags[token.object]}{' (mask)' if token.mask else ''} {100 * weight:.0f} %"
      colour = object_colour(token.object)
    _box(axis, photo, token.box, colour, label, "--" if token.mask else "-", 1.4)


def _box(axis: Axes, photo: np.ndarray, box: np.ndarray, colour: str, label: str, style: str, width: float) -> None:
  left, top, right, bottom = box * np.array([photo.shape[1], photo.shape[0]] * 2)
  axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linestyle=style,
                           linewidth=width))
  if label:
    # The label is placed so that it stays within the photo.
    at_right, above = left > 0.6 * photo.shape[1], top > 0.1 * photo.shape[0]
    axis.text(right if at_right else left, top, label, fontsize=8, color="white", ha="right" if at_right else "left",
              va="bottom" if above else "top", parse_math=False,
              bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2})


def _show_objects(axis: Axes, photo: np.ndarray, picture: Picture) -> None:
  axis.imshow(photo)
  for number, (box, tag, score) in enumerate(zip(picture.boxes, picture.tags, picture.scores)):
    _box(axis, photo, box, object_colour(number), f"{tag} {score:.2f}", "-", 2.0)
  axis.set_title("the photo and its objects", fontsize=12)
  axis.set(xticks=[], yticks=[])


def _show_shares(axis: Axes, layers: np.ndarray, frequency: int, kinds: Sequence[_Kind]) -> None:
  """The share of the attention that each kind of token gets, per layer."""
  rows = []  # the name of a kind of token, and its weights
  for kind in kinds:
    weights = kind.weights[layers]
    if kind.refined:
      detections = len([token for token in kind.refined if not token.mask])
      rows += [("grounding: detection rows", weights[..., :detections]),
               ("grounding: mask tokens", weights[..., detections:])]
      continue
    patches = math.isqrt(weights.shape[-1]) ** 2  # a class token, where there is one, comes first
    rows.append(("visual: patches", weights[..., weights.shape[-1] - patches:]))
    if patches < weights.shape[-1]:
      rows.append(("visual: class token", weights[..., :-patches]))
  names, values, colours = [], [], []
  for number, (name, weights) in enumerate(rows):
    for layer, share in zip(layers, weights.sum(axis=-1).mean(axis=1)):
      names.append(f"{name}, layer {layer * frequency}")
      values.append(100 * share)
      colours.append(object_colour(number))
  bars = axis.barh(names, values, color=colours)
  axis.bar_label(bars, fmt="%.1f %%", padding=3, fontsize=9)
  axis.set(xlim=(0, 115), xticks=[])
  axis.invert_yaxis()
  axis.spines[["top", "right", "bottom"]].set_visible(False)
  axis.set_title("what the queries' attention goes to", fontsize=12)
