"""A figure of where the queries look: over the photo's patches, and over the boxes of the refiner's tokens."""

import dataclasses
import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lyrics_jax.data.images import decode, to_xyxy
from lyrics_jax.evaluation.scoring import iou
from refiner_export.pages.page import object_colour
from refiner_export.records.record import Record

_ROWS = 4  # layers shown at most
_COLUMNS = ("mean of all", "most focused", "least like it")
_OUTLINED = 5  # tokens per panel that get their box drawn
_SAME_BOX = 0.9  # IoU from which on a detection row is the one an object came from
_RASTER = 192  # points per side on which boxes are drawn
_COLOURS = "inferno"


@dataclasses.dataclass(frozen=True)
class Token:
  """One token of the refiner: its box, xyxy in [0, 1], and the object it is about, if any."""
  box: np.ndarray
  object: int | None
  mask: bool


def tokens(record: Record, inputs: dict[str, np.ndarray]) -> list[Token]:
  """The tokens in the model's order, detection rows and then masks; `inputs` as of `visual.visual_inputs`."""
  detection, masks = (to_xyxy(inputs[name][:, -4:]) for name in ("detection", "masks"))
  object_of: dict[int, int] = {}
  for number, box in enumerate(record.boxes):
    overlap = iou(np.repeat(box[None], len(detection), 0), detection)
    if len(overlap) and overlap.max() >= _SAME_BOX:
      object_of.setdefault(int(overlap.argmax()), number)
  return [*(Token(box, object_of.get(row), False) for row, box in enumerate(detection)),
          *(Token(box, number if inputs["masks_mask"][number] else None, True) for number, box in enumerate(masks))]


def draw(record: Record, inputs: dict[str, np.ndarray], visual: np.ndarray, grounding: np.ndarray, frequency: int,
         title: str) -> bytes:
  """A PNG: the photo with its objects, then a row per layer (at most four) with three panels per kind of query.

  Args:
    record: has a picture.
    inputs: what the model saw of it, `visual.visual_inputs`.
    visual, grounding: [G, H, V, Ti] and [G, H, Q, Tl], weights of `attention_maps` for this picture; heads are averaged.
      Without grounding queries, or where they had no token to look at, their panels are left out.
    frequency: layers from one with cross-attention to the next.
  """
  photo, refined = decode(record.image), tokens(record, inputs)
  visual, grounding = visual.mean(1), grounding.mean(1)
  kinds = [("visual queries", visual)] + [("grounding queries", grounding)] * bool(grounding.any())
  layers = np.unique(np.linspace(0, len(visual) - 1, _ROWS).round().astype(int))
  panels = len(kinds) * len(_COLUMNS)
  height = min(max(photo.shape[0] / photo.shape[1], 0.5), 1.5)
  figure = Figure(figsize=(3 * panels, 3 * height * (1.35 + len(layers)) + 1.2), dpi=100, layout="constrained")
  figure.suptitle(title, fontsize=15, parse_math=False)
  top, *rows = figure.subfigures(1 + len(layers), 1, height_ratios=[1.35] + [1] * len(layers))

  overview, shares = top.subplots(1, 2, width_ratios=[1, 1])
  _show_objects(overview, photo, record)
  _show_shares(shares, layers * frequency, visual[layers], grounding[layers] if len(kinds) > 1 else None,
               len(inputs["detection"]))

  for row, layer in zip(rows, layers):
    for block, (kind, weights) in zip(np.atleast_1d(row.subfigures(1, len(kinds))), kinds):
      axes = block.subplots(1, len(_COLUMNS))
      single = telling_queries(weights[layer])
      chosen = [weights[layer].mean(0), *weights[layer][list(single)]]
      names = [_COLUMNS[0], *(f"{name}: no. {query}" for name, query in zip(_COLUMNS[1:], single))]
      maps = [_patches(each) if kind == "visual queries" else _coverage(each, refined) for each in chosen]
      scale = PowerNorm(0.5, 0, max(float(np.max(maps)), 1e-6))  # the square root: the weak is seen beside the strong
      for axis, name, heat, each in zip(axes, names, maps, chosen):
        _show_heat(axis, photo, heat, scale, name)
        if kind != "visual queries":
          _outline(axis, photo, each, refined, record)
      axes[0].set_ylabel(f"layer {layer * frequency}", fontsize=12)
      block.suptitle(kind if layer == layers[0] else None, fontsize=13, fontweight="bold")
      bar = block.colorbar(ScalarMappable(scale, _COLOURS), ax=axes, shrink=0.8, aspect=18, pad=0.01)
      bar.set_label("times uniform" if kind == "visual queries" else "share on boxes here", fontsize=9)

  written = io.BytesIO()
  figure.savefig(written, format="png")
  return written.getvalue()


def telling_queries(weights: np.ndarray) -> tuple[int, int]:
  """Of [queries, tokens]: the query with the least entropy, and the one whose weights overlap least with it."""
  entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(1)
  focused = int(entropy.argmin())
  return focused, int(np.minimum(weights, weights[focused]).sum(1).argmin())


def _patches(weights: np.ndarray) -> np.ndarray:
  """[S, S] of [1 + S * S] tokens, the class token left out; 1 is what every token would get alike."""
  side = round((len(weights) - 1) ** 0.5)
  return weights[1:].reshape(side, side) * len(weights)


def _coverage(weights: np.ndarray, refined: list[Token]) -> np.ndarray:
  """[_RASTER, _RASTER]: at each point the summed weight of the boxes that cover it, in [0, 1]."""
  points = (np.arange(_RASTER) + 0.5) / _RASTER
  boxes = np.stack([token.box for token in refined])
  within = lambda low, high: ((points >= low[:, None]) & (points <= high[:, None])).astype(np.float32)
  return np.einsum("t,ty,tx->yx", weights, within(boxes[:, 1], boxes[:, 3]), within(boxes[:, 0], boxes[:, 2]), optimize=True)


def _show_heat(axis: Axes, photo: np.ndarray, heat: np.ndarray, scale: PowerNorm, name: str) -> None:
  extent = (0, photo.shape[1], photo.shape[0], 0)
  axis.imshow(photo.mean(2), cmap="gray", extent=extent, vmin=-40, vmax=295)
  alpha = 0.3 + 0.5 * np.asarray(scale(heat))  # where nobody looks, the photo is to be seen
  axis.imshow(heat, cmap=_COLOURS, norm=scale, alpha=alpha, extent=extent, interpolation="nearest")
  axis.set_title(name, fontsize=10)
  axis.set(xticks=[], yticks=[])


def _outline(axis: Axes, photo: np.ndarray, weights: np.ndarray, refined: list[Token], record: Record) -> None:
  """The boxes of the heaviest tokens: masks dashed, those of an object in its colour and with its tag."""
  for position in np.argsort(-weights)[:_OUTLINED]:
    token, weight = refined[position], weights[position]
    if weight > 0:
      known = token.object is not None
      label = f"{record.tags[token.object]}{' (mask)' if token.mask else ''} {100 * weight:.0f} %" if known else ""
      colour = object_colour(token.object) if known else "white"
      _box(axis, photo, token.box, colour, label, "--" if token.mask else "-", 1.4)


def _box(axis: Axes, photo: np.ndarray, box: np.ndarray, colour: str, label: str, style: str, width: float) -> None:
  left, top, right, bottom = box * np.array([photo.shape[1], photo.shape[0]] * 2)
  axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linestyle=style,
                           linewidth=width))
  if label:
    at_right, above = left > 0.6 * photo.shape[1], top > 0.1 * photo.shape[0]  # labels stay within the photo
    axis.text(right if at_right else left, top, label, fontsize=8, color="white", ha="right" if at_right else "left",
              va="bottom" if above else "top", parse_math=False, bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2})


def _show_objects(axis: Axes, photo: np.ndarray, record: Record) -> None:
  axis.imshow(photo)
  for number, (box, tag, score) in enumerate(zip(record.boxes, record.tags, record.scores)):
    _box(axis, photo, box, object_colour(number), f"{tag} {score:.2f}", "-", 2.0)
  axis.set_title("the photo and its objects", fontsize=12)
  axis.set(xticks=[], yticks=[])


def _show_shares(axis: Axes, layers: np.ndarray, visual: np.ndarray, grounding: np.ndarray | None, detections: int) -> None:
  """What share of the attention each kind of token gets, per layer."""
  rows = [("visual: patches", visual[..., 1:]), ("visual: class token", visual[..., :1])]
  if grounding is not None:
    rows += [("grounding: detection rows", grounding[..., :detections]),
             ("grounding: mask tokens", grounding[..., detections:])]
  names, values = [], []
  for name, some in rows:
    for layer, share in zip(layers, some.sum(-1).mean(1)):
      names.append(f"{name}, layer {layer}")
      values.append(100 * share)
  bars = axis.barh(names, values, color=[object_colour(number) for number in range(len(rows)) for _ in layers])
  axis.bar_label(bars, fmt="%.1f %%", padding=3, fontsize=9)
  axis.set(xlim=(0, 115), xticks=[])
  axis.invert_yaxis()
  axis.spines[["top", "right", "bottom"]].set_visible(False)
  axis.set_title("what the queries' attention goes to", fontsize=12)
