"""The training loop of every stage.

Order of one step, and why: take a batch; dispatch the step (asynchronous); only then look at the metrics of the step
before, so that the device never waits for the host; log; save; stop when preempted.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from lyrics_jax.config import Config
from lyrics_jax.data.buckets import Lengths, cut_to, lengths_of, most_shapes
from lyrics_jax.data.loader import open_records, train_batches
from lyrics_jax.evaluation.while_training import WhileTraining
from lyrics_jax.stages import make_stage
from lyrics_jax.training.checkpoint import Checkpoints
from lyrics_jax.training.initialise import initial_parameters
from lyrics_jax.training.metrics import Metrics
from lyrics_jax.training.optimizer import learning_rate, make_optimizer
from lyrics_jax.training.parameters import ParameterPlan
from lyrics_jax.training.sharding import check_batch, global_batch, make_mesh
from lyrics_jax.training.step import initial_state, make_train_step
from refiner_export.common.settings import UserError, require


class NonFiniteLoss(UserError):
  """A loss or gradient became infinite or not a number; the message names the step and the examples."""


def train(config: Config) -> None:
  """Trains `config.stage` from the newest checkpoint in `config.output`, or from the start, to `config.steps`."""
  # --- mesh and stage: everything abstract first ---
  mesh = make_mesh(config.mesh)
  check_batch(config.batch_size // config.optimizer.accumulate_steps, mesh)
  require(config.batch_size % jax.process_count() == 0, f"config.batch_size={config.batch_size} is not a multiple of the "
                                                        f"{jax.process_count()} hosts")
  stage = make_stage(config)
  plan = ParameterPlan.of(stage)
  optimizer = make_optimizer(config.optimizer, config.steps, plan.axes)
  plan.shardings(mesh)

  # --- data ---
  records = open_records(config)
  data = train_batches(config, records, jax.process_index(), jax.process_count())
  evaluation = WhileTraining(plan, mesh, records.manifest.fingerprint)

  # --- parameters: from this run's newest checkpoint, an earlier run, or fresh ---
  logging.info("parameters\n%s", plan.report())
  checkpoints = Checkpoints(config.output, config.keep_checkpoints)
  trained, frozen = initial_parameters(plan, mesh, checkpoints)
  checkpoints.save_frozen(frozen)
  state = initial_state(plan, optimizer, mesh, trained)
  if checkpoints.latest() is not None:
    state = checkpoints.restore(state, data)
    logging.info("continuing from step %d of %s", int(state.step), config.output)
  checkpoints.save_config(config, records.manifest)  # not before the old checkpoint was found to fit

  # --- loop ---
  start = int(state.step)
  train_step = make_train_step(plan, optimizer, learning_rate(config.optimizer, config.steps), mesh)
  key = jax.random.key(config.seed)
  metrics = Metrics(config.output, start, config.steps)
  compiled = []  # the lengths of texts met so far
  pending = None  # (step, its metrics on the device, its examples' ids)
  # Closed after an error too: a checkpoint may still be on its way to the disk.
  with jax.set_mesh(mesh), contextlib.closing(checkpoints), contextlib.closing(metrics), _watch_for_preemption() as preempted:
    for step in range(start + 1, config.steps + 1):
      batch = next(data)
      ids = batch.pop("ids")
      lengths = _agree(lengths_of(config.data, batch))
      if lengths not in compiled:
        compiled.append(lengths)
        logging.info("step %d: compiling for texts of %s tokens (%d of at most %d compilations)", step,
                     ", ".join(f"{lengths[name]} ({name.removesuffix('_mask')})" for name in lengths if name.endswith("_mask")),
                     len(compiled), most_shapes(config.data, lengths))
      batch = cut_to(lengths, batch)
      state, values = train_step(state, frozen, global_batch(mesh, batch), key)
      if pending is not None:
        _finish(metrics, config, *pending)
      metrics.count(_tokens(batch) * jax.process_count(), config.batch_size)  # after the step before was told its rates
      if evaluation.due(step):
        jax.block_until_ready(values)  # the step's own time counts as training
        with metrics.paused():
          values = values | evaluation(state.parameters, frozen)
      pending = (step, values, ids)
      stop = preempted() or checkpoints.reached_preemption(step)
      if stop or step % config.checkpoint_every == 0 or step == config.steps:
        _finish(metrics, config, *pending)  # a state that is not finite is never saved as good
        pending = None
        checkpoints.save(state, data)
      if stop:
        logging.warning("preempted: saved step %d of %s; start again to continue", step, config.output)
        break


def _finish(metrics: Metrics, config: Config, step: int, values: dict[str, jax.Array], ids: list[str]) -> None:
  values = {name: float(value) for name, value in jax.device_get(values).items()}
  if not values.pop("finite"):
    raise NonFiniteLoss(f"loss or gradient is not finite at step {step} (loss {values['loss']}, gradient norm "
                        f"{values['gradient_norm']}); the update was not applied. Examples on this host: {', '.join(ids)}. "
                        f"Lower config.optimizer.peak_lr, or look at these records; the last checkpoint is good")
  if step % config.log_every == 0 or step == config.steps:
    metrics.write(step, values)


def _tokens(batch: dict[str, np.ndarray]) -> int:
  """Text tokens of this host's part of a batch, padding not counted."""
  return sum(int(value.sum()) for name, value in batch.items() if name.endswith("_mask") and name not in ("detection_mask", "masks_mask"))


def _agree(lengths: Lengths) -> Lengths:
  """The greatest of all hosts' lengths: one global batch has one shape."""
  if jax.process_count() == 1:
    return lengths
  everywhere = multihost_utils.process_allgather(np.array(list(lengths.values()), np.int32))
  return dict(zip(lengths, everywhere.max(0).tolist()))


@contextlib.contextmanager
def _watch_for_preemption() -> Iterator[Callable[[], bool]]:
  """Makes SIGTERM (what clouds send before taking a machine) end the loop after its current step; yields the question.

  Several hosts must stop after the same step: there JAX's own service catches the signal and Orbax asks it.
  """
  if jax.process_count() > 1:
    yield lambda: False
    return
  received = []
  before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
  try:
    yield lambda: bool(received)
  finally:
    signal.signal(signal.SIGTERM, before)
