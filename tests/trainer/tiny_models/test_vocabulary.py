"""The tokenizers of tiny models."""

import gzip
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from trainer.architectures import read_architecture
from trainer.tiny_models.vocabulary import CLIP, WORDS, build_tokenizer, caption_words, clip_vocabulary_file, write_tokenizer

COMPONENT = read_architecture("stable_diffusion_1_5").components["tokenizer"]
NO_VOCABULARY = clip_vocabulary_file() is None


def test_every_word_of_our_captions_is_one_token() -> None:
    tokenizer = build_tokenizer(COMPONENT, WORDS)
    split = [word for word in caption_words() if len(tokenizer(word).input_ids) != 3]
    assert not split


def test_any_text_has_tokens_and_comes_back() -> None:
    tokenizer = build_tokenizer(COMPONENT, WORDS)
    for text in ("a <cmg>cartoon car", "grüße, 42 x!", "\u6f2b\u753b \U0001f600"):
        tokens = tokenizer(text).input_ids
        assert (tokens[0], tokens[-1]) == (len(tokenizer) - 2, len(tokenizer) - 1), "as CLIP's, the last two"
        assert tokenizer.unk_token_id not in tokens[1:-1]
        letters = tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(letters, str)
        assert letters.replace(" ", "") == text.replace(" ", "")


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(COMPONENT, WORDS)
    assert write_tokenizer(tokenizer, tmp_path) == len(tokenizer)
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {path.name for path in tmp_path.iterdir()}
    loaded = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "a girl writing a letter in candlelight"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.model_max_length == 77


@pytest.mark.skipif(NO_VOCABULARY, reason="open-clip-torch, which brings CLIP's vocabulary along, is not installed")
def test_the_true_vocabulary_gives_the_true_numbers() -> None:
    tokenizer = build_tokenizer(COMPONENT, CLIP)
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.skipif(not NO_VOCABULARY, reason="CLIP's vocabulary is here")
def test_a_missing_true_vocabulary_names_the_package() -> None:
    with pytest.raises(ValueError, match="pip install --no-deps open-clip-torch"):
        build_tokenizer(COMPONENT, CLIP)


def test_a_vocabulary_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file; give words, clip, or the path"):
        build_tokenizer(COMPONENT, "letters")
    (tmp_path / "plain.gz").write_text("a b")
    with pytest.raises(ValueError, match="is not read as bpe_simple_vocab_16e6"):
        build_tokenizer(COMPONENT, str(tmp_path / "plain.gz"))
    (tmp_path / "short.gz").write_bytes(gzip.compress(b"version\na b\n"))
    with pytest.raises(ValueError, match="merges; wanted the 48894"):
        build_tokenizer(COMPONENT, str(tmp_path / "short.gz"))
