import numpy as np
import pytest

from lyrics_jax.data.conversation_text import ConversationText, place_pictures
from lyrics_jax.data.templates import Plain, VicunaV1
from lyrics_jax.data.tokenizers import load_llm_tokenizer
from refiner_export.common.settings import UserError

TEXTS = ("How many cats?", "two", "Where?", "On the floor.", "Sure?", "Yes.")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory):
  return load_llm_tokenizer(f"{tokenizer_directory}/llm")


def encode(tokenizer, texts, length=200, tokens=4, pictures=1, objects=(), template=VicunaV1("Be kind.")):
  texts = place_pictures(texts, pictures)
  return ConversationText(tokenizer, template, length, tokens).encode(texts, [(0, text) for text in objects])


def kept(tokenizer, encoded):
  """Ids without padding, and the targets among them."""
  return encoded["ids"][encoded["segments"] > 0].tolist(), encoded["ids"][encoded["targets"]].tolist()


def words(tokenizer, encoded):
  """The text around the pictures."""
  return tokenizer.decode(encoded["ids"][(encoded["segments"] > 0) & (encoded["slot"] < 0)])


def test_golden(tokenizer):
  encoded = encode(tokenizer, TEXTS[:4])
  ids, targets = kept(tokenizer, encoded)
  before = [tokenizer.bos, *tokenizer.encode("Be kind. USER: ")]
  two, floor = ([*tokenizer.encode(text), tokenizer.eos] for text in ("two", "On the floor."))
  assert ids == [*before, *[tokenizer.pad] * 4, *tokenizer.encode("\nHow many cats? ASSISTANT:"), *two,
                 *tokenizer.encode("USER: Where? ASSISTANT:"), *floor]
  assert targets == two + floor
  slots = encoded["slot"]
  assert slots[len(before):len(before) + 4].tolist() == [0, 1, 2, 3] and (slots >= 0).sum() == 4
  assert {name: (array.dtype.name, array.shape) for name, array in encoded.items()} == {
      "ids": ("int32", (200,)), "segments": ("int32", (200,)), "targets": ("bool", (200,)),
      "slot": ("int32", (200,))}
  text = tokenizer.backend.decode([token for token, slot in zip(ids, slots) if slot < 0], skip_special_tokens=False)
  assert text == "<s> Be kind. USER:  \nHow many cats? ASSISTANT: two</s> USER: Where? ASSISTANT: On the floor.</s>"


def test_without_a_picture(tokenizer):
  encoded = encode(tokenizer, TEXTS[:2], pictures=0)
  assert (encoded["slot"] == -1).all()
  prompt = tokenizer.encode("Be kind. USER: How many cats? ASSISTANT:")
  assert kept(tokenizer, encoded)[0] == [tokenizer.bos, *prompt, *tokenizer.encode("two"), tokenizer.eos]


@pytest.mark.parametrize("texts", [1, 3, 5])
@pytest.mark.parametrize("objects", [(), ("<br><T> cat </T><Bbox> (0.1,0.2),(0.3,0.4) </Box></br>",) * 5])
def test_a_prompt_is_what_training_saw(tokenizer, texts, objects):
  prompt = encode(tokenizer, TEXTS[:texts], objects=objects)
  trained = encode(tokenizer, TEXTS[:texts + 1], objects=objects)
  count = prompt["segments"].sum()
  np.testing.assert_array_equal(prompt["ids"][:count], trained["ids"][:count])
  np.testing.assert_array_equal(prompt["slot"], trained["slot"])
  np.testing.assert_array_equal(prompt["targets"][:count], trained["targets"][:count])
  assert trained["targets"][count:trained["segments"].sum()].all()


def test_last_turns_go_first(tokenizer):
  whole = encode(tokenizer, TEXTS)
  lengths = [encode(tokenizer, TEXTS[:n])["segments"].sum() for n in (2, 4, 6)]
  for length in range(lengths[0], lengths[2] + 1):
    cut = encode(tokenizer, TEXTS, length=length)
    count = max(n for n in lengths if n <= length)
    assert cut["segments"].sum() == count
    np.testing.assert_array_equal(cut["ids"][:count], whole["ids"][:count])


def test_first_answer_is_cut_but_not_to_nothing(tokenizer):
  texts = ("What?", "A very long answer about one cat and another cat.")
  prompt = encode(tokenizer, texts[:1])["segments"].sum()
  for room in (1, 3):
    cut = encode(tokenizer, texts, length=int(prompt) + room)
    assert cut["segments"].all() and kept(tokenizer, cut)[1] == tokenizer.encode(texts[1])[:room]
  encode(tokenizer, texts[:1], length=int(prompt))
  for unfitting in (texts, texts[:1]):
    with pytest.raises(UserError, match=r"the prompt 'What\?' takes \d+ tokens, .* raise config\.data\.llm_length"):
      encode(tokenizer, unfitting, length=int(prompt) - (len(unfitting) == 1))


def test_objects_take_at_most_half(tokenizer):
  objects = [f"<br><T> ball </T><Bbox> (0.{k},0.2),(0.3,0.4) </Box></br>" for k in range(9)]
  size = len(tokenizer.encode(objects[0]))
  plain = encode(tokenizer, TEXTS[:1], length=160)["segments"].sum()
  encoded = encode(tokenizer, TEXTS[:1], length=160, objects=objects)
  added = encoded["segments"].sum() - plain
  assert 78 - size - 2 < added <= 78
  text = tokenizer.decode(kept(tokenizer, encoded)[0])
  count = text.count("<br>")
  assert "".join(objects[:count]) + "\nHow many cats? ASSISTANT:" in text
  assert encode(tokenizer, TEXTS[:1], length=int(plain) + 3, objects=objects)["segments"].sum() == plain


def test_segments_number_the_conversations_of_a_row(tokenizer):
  segments = encode(tokenizer, TEXTS)["segments"]
  count = segments.sum()
  assert set(segments.tolist()) == {0, 1} and (segments[:count] == 1).all()


# --- several pictures ---


def test_pictures_stand_before_the_first_question_without_a_placeholder(tokenizer):
  encoded = encode(tokenizer, TEXTS[:2], tokens=3, pictures=2)
  before = [tokenizer.bos, *tokenizer.encode("Be kind. USER: ")]
  question = tokenizer.encode("\nHow many cats? ASSISTANT:")
  assert kept(tokenizer, encoded)[0] == [
      *before, *[tokenizer.pad] * 6, *question, *tokenizer.encode("two"), tokenizer.eos]
  assert encoded["slot"][len(before):len(before) + 6].tolist() == [0, 1, 2, 3, 4, 5]
  assert place_pictures(TEXTS, 0) == list(TEXTS)


def test_placeholders_say_where_pictures_stand(tokenizer):
  texts = ("Compare <image 1> with <image 0>.", "They differ.", "And <image 2>?", "Alike.")
  encoded = encode(tokenizer, texts, tokens=2, pictures=3)
  pieces = ("Be kind. USER: Compare ", 1, " with ", 0, ". ASSISTANT:", "They differ.", "USER: And ", 2, "? ASSISTANT:",
            "Alike.")  # a number is a picture
  ids, slot, answers = [tokenizer.bos], [-1], []
  for piece in pieces:
    if isinstance(piece, int):
      ids += [tokenizer.pad] * 2
      slot += [2 * piece, 2 * piece + 1]
    else:
      words = tokenizer.encode(piece)
      if piece in texts:
        words.append(tokenizer.eos)
        answers += words
      ids += words
      slot += [-1] * len(words)
  assert kept(tokenizer, encoded) == (ids, answers)
  assert encoded["slot"][:len(slot)].tolist() == slot and (encoded["slot"][len(slot):] == -1).all()


def test_a_placeholder_in_front_is_as_no_placeholder(tokenizer):
  plain, placed = encode(tokenizer, TEXTS), encode(tokenizer, ("<image 0>\n" + TEXTS[0], *TEXTS[1:]))
  for name in plain:
    np.testing.assert_array_equal(plain[name], placed[name])


def test_soft_tokens_are_never_targets(tokenizer):
  encoded = encode(tokenizer, ("Show me a cat.", "Here: <image 0> a cat."))
  assert not encoded["targets"][encoded["slot"] >= 0].any() and (encoded["slot"] >= 0).sum() == 4
  assert kept(tokenizer, encoded)[1] == [*tokenizer.encode("Here: "), *tokenizer.encode(" a cat."), tokenizer.eos]


def test_a_later_turn_takes_its_picture_along(tokenizer):
  texts = ("What is <image 0>?", "A cat.", "What is <image 1>?", "A dog.")
  whole = encode(tokenizer, texts, pictures=2)
  cut = encode(tokenizer, texts, pictures=2, length=int(whole["segments"].sum()) - 1)
  assert cut["slot"].max() == 3 and "dog" not in words(tokenizer, cut) and words(tokenizer, cut).endswith("A cat.")


def test_objects_stand_behind_their_picture(tokenizer):
  cat, dog = ("<br><T> %s </T><Bbox> (0.1,0.2),(0.3,0.4) </Box></br>" % tag for tag in ("cat", "dog"))
  encoder = ConversationText(tokenizer, VicunaV1("Be kind."), 400, 2)
  objects = [(1, dog), (0, cat)]
  default = encoder.encode(place_pictures(["Which is larger?"], 2), objects)
  assert words(tokenizer, default).replace(" ", "").endswith(
      f"USER:\n{cat}\n\n{dog}\nWhichislarger?ASSISTANT:".replace(" ", ""))  # picture 1 stands between two newlines
  placed = encoder.encode(["Is <image 1> larger?"], objects)
  assert words(tokenizer, placed).replace(" ", "").endswith(f"USER:Is\n{dog}\nlarger?ASSISTANT:".replace(" ", ""))
  later = ["Is <image 0> large?", "Yes.", "And <image 1>?"]
  trained = encoder.encode([*later, "No."], objects)
  assert cat in words(tokenizer, trained) and dog not in words(tokenizer, trained)  # the first question alone decides
  prompt = encoder.encode(later, objects)
  count = prompt["segments"].sum()
  np.testing.assert_array_equal(prompt["ids"][:count], trained["ids"][:count])


# --- the plain template ---


def test_plain_template(tokenizer):
  """LLaVA's pre-training: `<s>`, the picture, the caption and a newline, which are trained."""
  encoded = encode(tokenizer, ("Describe the image.", "A cat."), template=Plain())
  caption = tokenizer.encode("A cat.\n")
  assert kept(tokenizer, encoded) == ([tokenizer.bos, *[tokenizer.pad] * 4, *caption], caption)
  assert encoded["slot"][:6].tolist() == [-1, 0, 1, 2, 3, -1]
  prompt = encode(tokenizer, ("Describe the image.",), template=Plain())
  assert kept(tokenizer, prompt) == ([tokenizer.bos, *[tokenizer.pad] * 4], [])
