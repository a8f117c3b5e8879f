"""The tokenizer: a byte-level BPE trained on the corpus, or one that is given. Where it is kept is decided elsewhere (prepare)."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mhc_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# What well-known tokenizers call it, in the order of preference; the last is DeepSeek's.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")

SMALLEST_BPE = 257  # the 256 bytes and end-of-text
LARGEST_BPE = 1 << 22  # several times the largest vocabularies in use; the trainer allocates all of it beforehand


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that can encode documents."""

    json: str  # the content of its tokenizer.json
    size: int  # one more than its largest token id
    end_of_text: int  # token id
    _tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        """sha256 of its json, hexadecimal."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token by itself; a token that is part of a character has the replacement character."""
        return self._tokenizer.decode_batch([[token] for token in tokens], skip_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens in a row, without special tokens; an incomplete character has the replacement character."""
        return self._tokenizer.decode(list(tokens))

    def encode(self, texts: Sequence[str]) -> list[Int64[np.ndarray, " tokens"]]:
        """Token ids of each text, without end-of-text: a text that spells a special token out gets ordinary tokens.

        Raises:
          UserError: a given tokenizer cannot encode it, for example because its token for unknown text is not in its vocabulary.
        """
        with failures_told("the tokenizer cannot encode this text"):
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, among them the 256 bytes and `<|endoftext|>`.

    A text that is too short for so many merges gives fewer tokens.
    """
    check_trainable(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, tokenizer.to_str(), "the trained tokenizer")


def check_trainable(vocab_size: int) -> None:
    """Raises UserError unless a byte-level BPE can have this many tokens."""
    if vocab_size < SMALLEST_BPE:
        raise UserError(
            f"model.vocab_size is {vocab_size}, but a byte-level tokenizer needs at least {SMALLEST_BPE} tokens "
            "(256 bytes and end-of-text); raise it, or give a smaller tokenizer with data.tokenizer"
        )
    if vocab_size > LARGEST_BPE:
        raise UserError(f"model.vocab_size is {vocab_size}; a tokenizer of at most {LARGEST_BPE} tokens can be trained; lower it")


def load_tokenizer(path: Path, vocab_size: int) -> TextTokenizer:
    """The tokenizer of a tokenizer.json, for a model with `vocab_size` embeddings.

    Raises:
      UserError: the file is missing, unreadable or no tokenizer; it has more tokens than the model; it has no end-of-text token.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"data.tokenizer: cannot read {path}: {error.strerror}; give the path of a tokenizer.json") from error
    except ValueError as error:
        raise UserError(f"data.tokenizer: {path} is not a tokenizer (it is not UTF-8); give a tokenizer.json") from error
    with failures_told(f"data.tokenizer: {path} is not a tokenizer; give a tokenizer.json of the tokenizers library"):
        tokenizer = Tokenizer.from_buffer(text.encode())
    loaded = _wrap(tokenizer, text, str(path))
    if loaded.size > vocab_size:
        raise UserError(
            f"the tokenizer {path} has {loaded.size} tokens, more than model.vocab_size = {vocab_size}; "
            f"set model.vocab_size to {loaded.size} or more, or choose a smaller tokenizer"
        )
    return loaded


def _wrap(tokenizer: Tokenizer, text: str, name: str) -> TextTokenizer:
    ids = tokenizer.get_vocab(with_added_tokens=True)
    end_of_text = next((ids[token] for token in END_OF_TEXT_NAMES if token in ids), None)
    if end_of_text is None:
        raise UserError(f"{name} has no end-of-text token; it needs one of {', '.join(END_OF_TEXT_NAMES)}")
    if len(set(ids.values())) < len(ids):
        raise UserError(f"{name} gives one id to several tokens; what they stand for could not be told apart, so mend it")
    # A given tokenizer may cut, pad, or read special tokens out of the text: documents are encoded whole and literally.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # of merges, at random: the same text would be other tokens in the next cache
    return TextTokenizer(json=text, size=max(ids.values()) + 1, end_of_text=end_of_text, _tokenizer=tokenizer)


@contextlib.contextmanager
def failures_told(what: str) -> Iterator[None]:
    """Turns what the library raises into a UserError: bare Exceptions, and panics of its Rust code, which are not even Exceptions."""
    try:
        yield
    except BaseException as error:
        # The class of a panic cannot be imported; anything else beside Exception (an interrupt) is not the library's.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({str(error)[:300]})") from error
