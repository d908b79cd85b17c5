"""Captions of tags and the places of the tags in them are compared with values written by hand."""

import pytest
from tiny_models import tiny_tokenizer

from refiner_export.refiners.grounding_dino.tag_caption import Caption, Captioner, load_tokenizer
from refiner_export.common.settings import UserError

CLS, SEP, STOP, PAD = 101, 102, 1012, 0
OBJECT, CAT, DOG, RED, BLUE, CAR, TREE, HOUSE, PER, SON, S, ST, BERNARD = range(1030, 1043)


@pytest.fixture(scope="module")
def tokenizer():
  return tiny_tokenizer()


def test_each_tag_knows_its_tokens(tokenizer):
  (caption,) = Captioner(tokenizer, 256).captions(["Red Car", "dog", "persons"])
  assert caption.ids == (CLS, RED, CAR, STOP, DOG, STOP, PER, SON, S, STOP, SEP)
  assert caption.tags == ("Red Car", "dog", "persons") and caption.spans == ((1, 3), (4, 5), (6, 9))
  assert list(caption.ids) == tokenizer("red car . dog . persons .")["input_ids"]


def test_what_divides_tags_cannot_stand_in_one(tokenizer):
  (caption,) = Captioner(tokenizer, 256).captions(["St. Bernard", "?", "", "cat?"])
  assert caption.ids == (CLS, ST, BERNARD, STOP, CAT, STOP, SEP)
  assert caption.tags == ("St. Bernard", "cat?") and caption.spans == ((1, 3), (4, 5))


def test_a_caption_ends_where_the_next_tag_would_exceed_the_budget(tokenizer):
  captions = Captioner(tokenizer, 8).captions(["cat", "red car", "dog", "blue tree", "house"])
  assert captions == [
      Caption((CLS, CAT, STOP, RED, CAR, STOP, SEP), ("cat", "red car"), ((1, 2), (3, 5))),
      Caption((CLS, DOG, STOP, BLUE, TREE, STOP, SEP), ("dog", "blue tree"), ((1, 2), (3, 5))),
      Caption((CLS, HOUSE, STOP, SEP), ("house",), ((1, 2),))]
  (full,) = Captioner(tokenizer, 8).captions(["cat", "dog", "car"])
  assert len(full.ids) == 8


def test_a_tag_longer_than_a_caption_is_cut(tokenizer):
  captions = Captioner(tokenizer, 6).captions(["cat", "red blue car tree", "dog"])
  assert [caption.ids for caption in captions] == [
      (CLS, CAT, STOP, SEP), (CLS, RED, BLUE, CAR, STOP, SEP), (CLS, DOG, STOP, SEP)]
  assert captions[1].tags == ("red blue car tree",) and captions[1].spans == ((1, 4),)


@pytest.mark.parametrize("tags", [[], ["?", " "]])
def test_without_a_tag_there_is_a_caption_without_tags(tokenizer, tags):
  assert Captioner(tokenizer, 256).captions(tags) == [Caption((CLS, OBJECT, STOP, SEP))]


def test_no_caption_of_many_tags_exceeds_the_budget_and_none_is_lost(tokenizer):
  words = ["cat", "red car", "persons", "blue tree house"]
  tags = [words[k * k % 4] for k in range(500)]
  captions = Captioner(tokenizer, 256).captions(tags)
  assert len(captions) > 3 and max(len(caption.ids) for caption in captions) <= 256
  assert [tag for caption in captions for tag in caption.tags] == tags


def test_padding(tokenizer):
  captioner = Captioner(tokenizer, 256)
  ids, mask, owners = captioner.pad([*captioner.captions(["red car", "dog"]), *captioner.captions([])])
  assert ids.tolist() == [[CLS, RED, CAR, STOP, DOG, STOP, SEP], [CLS, OBJECT, STOP, SEP, PAD, PAD, PAD]]
  assert mask.tolist() == [[1] * 7, [1] * 4 + [0] * 3]
  assert owners.tolist() == [[0, 1, 1, 0, 2, 0, 0], [0] * 7]


def test_a_vocabulary_is_read_from_either_file(tokenizer, tmp_path):
  tokenizer.save_pretrained(tmp_path)
  (tmp_path / "plain").mkdir()
  vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
  (tmp_path / "plain" / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocabulary))
  for file in (tmp_path / "tokenizer.json", tmp_path / "plain" / "vocab.txt"):
    loaded = load_tokenizer(file, len(tokenizer))
    assert loaded("Pèrsons")["input_ids"] == [CLS, PER, SON, S, SEP]


def test_a_vocabulary_that_the_model_was_not_trained_with(tokenizer, tmp_path):
  (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n.\n?\ncat\n")
  with pytest.raises(UserError, match=r"vocab.txt: \[CLS\] is token 2, the model knows it as 101.*bert-base-uncased"):
    load_tokenizer(tmp_path / "vocab.txt", 30522)
  tokenizer.save_pretrained(tmp_path)
  with pytest.raises(UserError, match="1043 tokens, the model knows 1000"):
    load_tokenizer(tmp_path / "tokenizer.json", 1000)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match="tokenizer.json: not a tokenizer"):
    load_tokenizer(tmp_path / "tokenizer.json", 30522)
