"""CLIP's byte-pair vocabulary: the true one where open-clip-torch lies on this machine, else one learnt from the words of our captions."""

import functools
import gzip
import importlib.util
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trainer.architectures import Component

WORDS = "words"
CLIP = "clip"
_FILE = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_MERGES = 49152 - 256 - 2
"""The file has more of them; CLIP takes this many."""
_END = "</w>"
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_CAPTIONS = """
a an the of with and in on at by to from for is as his her their this that no one two three
photo picture image cartoon drawing portrait style face faces person man woman girl boy child couple people character smiling
hair skin
eyes eye eyebrows nose mouth lips beard moustache glasses hat cap ears ear earrings shirt jacket dress sweater collar mask head
short long curly straight wavy bald bangs bun ponytail afro blond blonde
brown black white grey gray red green blue yellow orange pink purple
lavender beige light dark pale tan bright plain big small old young happy sad angry calm serious surprised expression very
background wall sky tree house car street letter candle candlelight writing historic retro vintage coloured colored sitting standing
wearing holding looking front side medium cat dog city water flowers room table
"""
"""Words that captions of faces, cartoons and old photographs are made of, and the paper's own prompts."""


def clip_vocabulary_file() -> Path | None:
    """The true vocabulary's file, which open-clip-torch brings along; None where that is not installed. Imports nothing of it."""
    found = importlib.util.find_spec("open_clip")
    files = [Path(folder) / _FILE for folder in (found.submodule_search_locations or ())] if found is not None else []
    return next((file for file in files if file.is_file()), None)


def caption_words() -> list[str]:
    """The words of our captions, in the order of the alphabet."""
    return sorted(set(_CAPTIONS.split()))


def build_tokenizer(component: Component, vocabulary: str) -> CLIPTokenizer:
    """The tokenizer of a pipeline. vocabulary: `words`, `clip` or the path of the true vocabulary's .txt.gz file.

    Any text has tokens: what is no known word falls to pieces, at worst to its bytes.
    Raises: ValueError if it is none of them, or clip where open-clip-torch is not installed."""
    merges = _word_merges() if vocabulary == WORDS else _clip_merges(vocabulary)
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + _END for letter in letters), *("".join(merge) for merge in merges), *_SPECIAL]
    assert len(set(tokens)) == len(tokens), "two merges make one token"
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=list(merges),  # pyright: ignore[reportArgumentType] (pairs, as the fast tokenizer takes them)
        **component.config,  # pyright: ignore[reportArgumentType]
    )


def write_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> int:
    """Save it for today's transformers (tokenizer.json) and older ones (vocab.json, merges.txt); returns its number of tokens."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    return len(tokenizer)


def _clip_merges(vocabulary: str) -> Sequence[tuple[str, str]]:
    file = clip_vocabulary_file() if vocabulary == CLIP else Path(vocabulary)
    if file is None:
        raise ValueError("CLIP's true vocabulary is not on this machine; run pip install --no-deps open-clip-torch, or give `words`")
    if not file.is_file():
        raise ValueError(f"vocabulary {vocabulary}: there is no such file; give words, clip, or the path of {_FILE}")
    try:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ValueError(f"vocabulary {vocabulary} is not read as {_FILE}: {error}") from None
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines[1 : _CLIP_MERGES + 1])]
    if len(merges) != _CLIP_MERGES or not all(first and second for first, second in merges):
        raise ValueError(f"vocabulary {vocabulary} has {len(merges)} merges; wanted the {_CLIP_MERGES} of {_FILE}")
    return merges


@functools.cache
def _word_merges() -> Sequence[tuple[str, str]]:
    """Merges that make every word above one token: the most frequent pair first, of equals the first in the alphabet.

    Source: Sennrich et al. 2016, arXiv:1508.07909, algorithm 1."""
    words = [[*word[:-1], word[-1] + _END] for word in caption_words()]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        most = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(most)
        for word in words:
            _merge(word, most)
    return tuple(merges)


def _merge(word: list[str], pair: tuple[str, str]) -> None:
    at = 0
    while at < len(word) - 1:
        if (word[at], word[at + 1]) == pair:
            word[at : at + 2] = ["".join(pair)]
        at += 1
