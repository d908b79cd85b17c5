import numpy as np
import pytest

from lyrics_jax.data.conversation import encode_conversation
from lyrics_jax.data.instructions import TEMPLATES, instruction
from lyrics_jax.data.tokenizers import load_llm_tokenizer
from refiner_export.common.settings import UserError

TEXTS = ("How many cats?", "two", "Where?", "On the floor.", "Sure?", "Yes.")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory):
  return load_llm_tokenizer(f"{tokenizer_directory}/llm")


def encode(tokenizer, texts, length=200, image_tokens=4, **more):
  return encode_conversation(tokenizer, "Be kind.", texts, length, image_tokens, **more)


def kept(tokenizer, encoded):
  """Ids without padding, and the targets among them."""
  return encoded["llm_ids"][encoded["llm_mask"]].tolist(), encoded["llm_ids"][encoded["llm_targets"]].tolist()


def test_golden(tokenizer):
  encoded = encode(tokenizer, TEXTS[:4])
  ids, targets = kept(tokenizer, encoded)
  before = [tokenizer.bos, *tokenizer.encode("Be kind. USER: ")]
  two, floor = ([*tokenizer.encode(text), tokenizer.eos] for text in ("two", "On the floor."))
  assert ids == [*before, *[tokenizer.pad] * 4, *tokenizer.encode("\nHow many cats? ASSISTANT:"), *two,
                 *tokenizer.encode("USER: Where? ASSISTANT:"), *floor]
  assert targets == two + floor
  slots = encoded["image_slot"]
  assert slots[len(before):len(before) + 4].tolist() == [0, 1, 2, 3] and (slots >= 0).sum() == 4
  assert {name: (array.dtype.name, array.shape) for name, array in encoded.items()} == {
      "llm_ids": ("int32", (200,)), "llm_mask": ("bool", (200,)), "llm_targets": ("bool", (200,)),
      "image_slot": ("int32", (200,))}
  text = tokenizer.backend.decode([token for token, slot in zip(ids, slots) if slot < 0], skip_special_tokens=False)
  assert text == "<s> Be kind. USER:  \nHow many cats? ASSISTANT: two</s> USER: Where? ASSISTANT: On the floor.</s>"


def test_without_a_picture(tokenizer):
  encoded = encode(tokenizer, TEXTS[:2], image_tokens=0)
  assert (encoded["image_slot"] == -1).all()
  prompt = tokenizer.encode("Be kind. USER: How many cats? ASSISTANT:")
  assert kept(tokenizer, encoded)[0] == [tokenizer.bos, *prompt, *tokenizer.encode("two"), tokenizer.eos]


@pytest.mark.parametrize("texts", [1, 3, 5])
@pytest.mark.parametrize("objects", [(), ("<br><T> cat </T><Bbox> (0.1,0.2),(0.3,0.4) </Box></br>",) * 5])
def test_a_prompt_is_what_training_saw(tokenizer, texts, objects):
  prompt = encode(tokenizer, TEXTS[:texts], objects=objects)
  trained = encode(tokenizer, TEXTS[:texts + 1], objects=objects)
  count = prompt["llm_mask"].sum()
  np.testing.assert_array_equal(prompt["llm_ids"][:count], trained["llm_ids"][:count])
  np.testing.assert_array_equal(prompt["image_slot"], trained["image_slot"])
  np.testing.assert_array_equal(prompt["llm_targets"][:count], trained["llm_targets"][:count])
  assert trained["llm_targets"][count:trained["llm_mask"].sum()].all()


def test_last_turns_go_first(tokenizer):
  whole = encode(tokenizer, TEXTS)
  lengths = [encode(tokenizer, TEXTS[:n])["llm_mask"].sum() for n in (2, 4, 6)]
  for length in range(lengths[0], lengths[2] + 1):
    cut = encode(tokenizer, TEXTS, length=length)
    count = max(n for n in lengths if n <= length)
    assert cut["llm_mask"].sum() == count
    np.testing.assert_array_equal(cut["llm_ids"][:count], whole["llm_ids"][:count])


def test_first_answer_is_cut_but_not_to_nothing(tokenizer):
  texts = ("What?", "A very long answer about one cat and another cat.")
  prompt = encode(tokenizer, texts[:1])["llm_mask"].sum()
  for room in (1, 3):
    cut = encode(tokenizer, texts, length=int(prompt) + room)
    assert cut["llm_mask"].all() and kept(tokenizer, cut)[1] == tokenizer.encode(texts[1])[:room]
  encode(tokenizer, texts[:1], length=int(prompt))
  for unfitting in (texts, texts[:1]):
    with pytest.raises(UserError, match=r"the prompt 'What\?' takes \d+ tokens, .* raise config\.data\.llm_length"):
      encode(tokenizer, unfitting, length=int(prompt) - (len(unfitting) == 1))


def test_objects_take_at_most_half(tokenizer):
  objects = [f"<br><T> ball </T><Bbox> (0.{k},0.2),(0.3,0.4) </Box></br>" for k in range(9)]
  size = len(tokenizer.encode(objects[0]))
  plain = encode(tokenizer, TEXTS[:1], length=160)["llm_mask"].sum()
  encoded = encode(tokenizer, TEXTS[:1], length=160, objects=objects)
  added = encoded["llm_mask"].sum() - plain
  assert 78 - size - 2 < added <= 78
  text = tokenizer.decode(kept(tokenizer, encoded)[0])
  count = text.count("<br>")
  assert "".join(objects[:count]) + "\nHow many cats? ASSISTANT:" in text
  assert encode(tokenizer, TEXTS[:1], length=int(plain) + 3, objects=objects)["llm_mask"].sum() == plain


def test_instructions():
  assert instruction("vqa", "How many?") == "How many?"
  assert instruction("rec", "the cat {left}") == "Where is the cat {left}? Give its box."
  assert instruction("dialogue", "Hi", np.random.default_rng(0)) == "Hi"
  rng = np.random.default_rng(0)
  for task, templates in TEMPLATES.items():
    said = {instruction(task, "<box 0>", rng) for _ in range(100)}
    assert len(said) == len(templates)
    assert all("<box 0>" in text for text in said) or task in ("caption", "grounded_caption")
    assert not any("left" in text or "right" in text for text in templates)
  with pytest.raises(UserError, match="unknown task 'ocr' in a record; known tasks: caption, vqa"):
    instruction("ocr", "")
