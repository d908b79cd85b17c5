import json

import pytest
import transformers

from lyrics_jax.data.conversations import Conversations
from lyrics_jax.data.spatial import SPECIAL_TOKENS, format_object
from lyrics_jax.data.tokenizers import MQ_FORMER_ADDED, load_llm_tokenizer, load_mq_former_tokenizer
from lyrics_jax.data.train_tokenizers import VOCAB_SIZE, record_texts, write_tokenizers
from refiner_export.common.settings import UserError

OBJECT = format_object("Red Ball", (0.125, 0.0, 1.0, 0.5), "decimal")


def test_mq_former_tokens(tokenizer_directory):
  tokenizer = load_mq_former_tokenizer(f"{tokenizer_directory}/mq_former")
  assert len(tokenizer) <= VOCAB_SIZE
  for token in MQ_FORMER_ADDED:
    assert len(tokenizer.encode(token)) == 1
  assert [tokenizer.encode(token) for token in SPECIAL_TOKENS] == [[index] for index in tokenizer.spatial]
  assert tokenizer.decode(tokenizer.encode(OBJECT)) == (
      "<br> <T> red ball </T> <Bbox> ( 0. 1 2 5, 0. 0 0 0 ), ( 1. 0 0 0, 0. 5 0 0 ) </Box> </br>")


def test_plain_bert_gets_the_missing_tokens(tmp_path):
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "0", "125", ".", "(", ")", ",", "<", "t", ">"]
  (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
  tokenizer = load_mq_former_tokenizer(str(tmp_path))
  assert len(tokenizer) == len(words) + len(MQ_FORMER_ADDED)
  assert tokenizer.dec == len(words)  # BLIP-2's place for it: right after BERT's vocabulary
  cat, zero, thousandths = words.index("cat"), words.index("0"), words.index("125")
  assert tokenizer.encode("<T> CAT </T>") == [tokenizer.spatial[2], cat, tokenizer.spatial[3]]
  assert tokenizer.encode("0.125") == [zero, words.index("."), thousandths]


@pytest.mark.parametrize("text", [
    OBJECT, "two\nlines,  two spaces", "Grüße, 猫! 12.5 % 🙂", "A cat <Bbox> (0.125,0.250),(0.500,0.999) </Box>.", ""])
def test_llm_round_trip(tokenizer_directory, text):
  tokenizer = load_llm_tokenizer(f"{tokenizer_directory}/llm")
  assert tokenizer.decode([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos, tokenizer.pad]) == text


def test_llm_tokens(tokenizer_directory):
  tokenizer = load_llm_tokenizer(f"{tokenizer_directory}/llm")
  assert len(tokenizer) <= VOCAB_SIZE
  assert all(len(tokenizer.backend.encode(token, add_special_tokens=False)) == 1 for token in SPECIAL_TOKENS)
  assert len(tokenizer.encode("1234567")) == 8  # the start of a word, then one per digit


def test_trained_tokenizers_behave_like_their_models(tokenizer_directory):
  bert = transformers.AutoTokenizer.from_pretrained(f"{tokenizer_directory}/mq_former")
  assert bert.convert_ids_to_tokens(bert("A cat.").input_ids) == ["[CLS]", "a", "cat", ".", "[SEP]"]
  llama = transformers.AutoTokenizer.from_pretrained(f"{tokenizer_directory}/llm")
  assert llama.convert_ids_to_tokens(llama("A cat.").input_ids) == ["<s>", "▁A", "▁cat", "."]


def test_missing_tokenizer_is_one_line(tmp_path, tokenizer_directory):
  with pytest.raises(UserError, match="no such directory: /nowhere; name the directory"):
    load_mq_former_tokenizer("/nowhere")
  with pytest.raises(UserError, match="no tokenizer can be read from .*train_tokenizers") as caught:
    load_llm_tokenizer(str(tmp_path))
  assert "\n" not in str(caught.value)
  with pytest.raises(UserError, match="not BERT-style: it has no .*CLS"):
    load_mq_former_tokenizer(f"{tokenizer_directory}/llm")
  with pytest.raises(UserError, match="not LLaMA-style"):
    load_llm_tokenizer(f"{tokenizer_directory}/mq_former")


def test_too_small_an_embedding_is_one_line(make_run):
  with pytest.raises(UserError, match=r"^config\.stage\.model\.connector\.former\.vocab_size=100 is too small"):
    make_run(sizes={"former_vocabulary": 100}).examples
  with pytest.raises(UserError, match=r"^config\.stage\.model\.llm\.vocab_size=512 is too small"):
    make_run(Conversations(), sizes={"llm_vocabulary": 512}).examples


def test_texts_to_train_on(make_record):
  """Every template of a task, every caption, every object and box in both forms of coordinates; no placeholder."""
  record = make_record(0, pictures=2, conversations=(
      ("vqa", ("<image 1>\nHow many?", "two at <box 1.0>")), ("a user's task", ("Count!", "2"))))
  texts = list(record_texts([record]))
  assert set(record.captions) < set(texts) and "Question: How many? Short answer: ASSISTANT:" in texts
  assert "Count! ASSISTANT:" in texts
  for picture in record.pictures:
    for coordinates in ("decimal", "integer"):
      assert format_object(picture.tags[0], picture.boxes[0], coordinates) in texts
  assert not any("<image" in text or "<box" in text for text in texts)


def test_training_does_not_overwrite(tokenizer_directory):
  with pytest.raises(UserError, match="already exists: remove it"):
    write_tokenizers(["a cat"], tokenizer_directory)
