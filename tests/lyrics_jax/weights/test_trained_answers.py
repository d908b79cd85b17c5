"""A trained run answers fifty questions about ten pictures as the directories do that were exported from it."""

import dataclasses

import pytest
from published import trained_llama
from saved_run import make_run_config, stored, write_records

from lyrics_jax.config import Config
from lyrics_jax.data.templates import VicunaV1
from lyrics_jax.inference.generator import Generator
from lyrics_jax.inference.loaded import LoadedModel
from lyrics_jax.models.layers.lora import LoRASettings
from lyrics_jax.train import train
from lyrics_jax.torch_model.modeling_lyrics import LyricsForConditionalGeneration
from lyrics_jax.torch_model.processing_lyrics import LyricsProcessor
from lyrics_jax.weights.to_hf import export
from lyrics_jax.training.metrics import read
from refiner_export.records.reader import RecordDirectory
from refiner_export.records.record import Record

PICTURES, BATCH, STEPS = 10, 10, 200
NEW = 16  # tokens of an answer
NUMBERS = ("one", "two", "three", "four", "five")
QUESTIONS = ("How many cats are there?", "What does the sign say?", "Where is the red ball?", "Who sits on the left?",
             "Describe the image in one sentence.")


def answers_of(index: int) -> tuple[str, ...]:
  """What is right about a picture."""
  number = NUMBERS[index % len(NUMBERS)]
  return (number, f"STOP {index}{index}", "<box 0.0>", f"A {('dog', 'cat', 'ball')[index % 3]}.",
          f"{number.capitalize()} cats play with a ball.")


@dataclasses.dataclass
class Trained:
  """A run, the questions about every picture, and the run's answers."""
  config: Config
  questions: list[tuple[Record, str]]
  answers: list[str]


@pytest.fixture(scope="module")
def trained(make_record, tokenizer_directory, tmp_path_factory) -> Trained:
  folder = tmp_path_factory.mktemp("trained")
  records = [make_record(index, conversations=[("dialogue", pair) for pair in zip(QUESTIONS, answers_of(index))])
             for index in range(PICTURES)]
  config = make_run_config(
      "instruct", folder / "run", tokenizer_directory, data__records=write_records(records, folder / "records"),
      steps=STEPS, batch_size=16, log_every=10, checkpoint_every=STEPS, optimizer__peak_lr=1e-2,
      optimizer__weight_decay=0.0,
      data__rows__template=VicunaV1(system_message="A chat."), llm__width=32, llm__mlp_dim=64,
      llm__lora=LoRASettings(rank=8, alpha=16.0, dropout=0.0, targets=("q", "v", "o", "up", "down")),
      data__llm_length=80, data__spatial_length=48, data__buckets=(1.0,), data__crop_scale=(1.0, 1.0), data__flip=False)
  train(config)
  pictures = RecordDirectory(folder / "records")
  questions = [(pictures[index], question) for index in range(PICTURES) for question in QUESTIONS]
  return Trained(config, questions, Generator(LoadedModel.open(config.output), BATCH, NEW).answer(questions))


def test_it_has_learnt(trained):
  losses = [entry["loss"] for entry in read(trained.config.output)]
  assert losses[-1] < 0.5 * losses[0]
  assert len(trained.questions) == 50 and len(set(trained.answers)) > 10


def answers_with(model, processor, questions) -> list[str]:
  """Greedy answers, in batches of prompts of different lengths."""
  answers = []
  for start in range(0, len(questions), BATCH):
    pictures, texts = zip(*questions[start:start + BATCH])
    batch = processor(text=list(texts), refined=[record.picture for record in pictures])
    answers += processor.answers(model.generate(**batch, max_new_tokens=NEW), batch["input_ids"])
  return answers


def test_merged(trained, tmp_path):
  export(trained.config.output, str(tmp_path / "hf"))
  model = LyricsForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
  assert answers_with(model, LyricsProcessor.from_pretrained(tmp_path / "hf"), trained.questions) == trained.answers


def test_adapter(trained, tmp_path):
  peft = pytest.importorskip("peft")
  export(trained.config.output, str(tmp_path / "hf"), lora="adapter")
  base = trained_llama(trained.config, stored(trained.config.output))
  model = LyricsForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
  model.language_model = peft.PeftModel.from_pretrained(base, tmp_path / "hf" / "adapter").eval()
  assert answers_with(model, LyricsProcessor.from_pretrained(tmp_path / "hf"), trained.questions) == trained.answers
