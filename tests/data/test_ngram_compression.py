"""Which tokens count as one: the published rules, on a vocabulary made for them."""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mhc_jax.data.ngrams.compression import compress_vocabulary
from mhc_jax.data.tokenizer import END_OF_TEXT, TextTokenizer

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def named(text: str) -> str:
    """The name that a byte-level tokenizer gives to a token of this text."""
    ((name, _),) = BYTES.pre_tokenize_str(text)
    return name


def of_names(*names: str) -> TextTokenizer:
    """A byte-level tokenizer with these tokens and no merges."""
    library = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    library.decoder = decoders.ByteLevel()
    return TextTokenizer(json=library.to_str(), size=len(names), end_of_text=0, _tokenizer=library)


def classes(*texts: str) -> list[int]:
    return compress_vocabulary(of_names(*map(named, texts))).tolist()


def test_classes_are_numbered_by_their_first_token():
    assert classes("b", "a", "B", "c", "A") == [0, 1, 0, 2, 1]


def test_case_accents_width_and_surrounding_space_do_not_count():
    assert classes("a", "A", " a", "\ta\n", "á", "À", "ａ", "ª") == [0] * 8  # NFKC joins the last two: full width, ordinal
    assert classes("ﬁ", "fi", "FI") == [0] * 3


def test_words_and_inner_space_count():
    assert classes("a b", "a  b", "a\r\nb", "ab", "a-b") == [0, 0, 0, 1, 2]


def test_tokens_of_white_space_are_one_class_and_not_the_empty_one():
    # NFKC turns the ideographic space into a plain one. A lone accent normalises to nothing and stays what it is.
    assert classes(" ", "\n", "\t \r\n", "\u3000", "\u0301", "\u0300", "a") == [0, 0, 0, 0, 1, 2, 3]


def test_the_sentinel_of_white_space_is_not_a_class_of_its_own():
    assert classes("\ue000", " ") == [0, 0]  # as in the published code


def test_parts_of_characters_are_known_by_their_names():
    parts = ["Ã", "©", "ä¸"]  # the byte C3, the byte A9 (é together), two bytes of three
    lookup = compress_vocabulary(of_names(*parts, named("é"), named("e")))
    assert lookup.tolist() == [0, 1, 2, 3, 3]


def test_a_name_that_looks_like_another_tokens_text_joins_its_class():
    assert compress_vocabulary(of_names(named("ł"), "ł")).tolist() == [0, 0]  # the name of the byte A0 is ł


def test_added_tokens_are_classes_and_ids_without_a_token_are_the_empty_text():
    library = Tokenizer(models.BPE({"a": 0, "A": 1, "b": 5}, []))
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END_OF_TEXT])
    ids = library.get_vocab(with_added_tokens=True)
    tokenizer = TextTokenizer(json=library.to_str(), size=max(ids.values()) + 1, end_of_text=ids[END_OF_TEXT], _tokenizer=library)
    lookup = compress_vocabulary(tokenizer)
    assert lookup.dtype == np.int32
    assert ids[END_OF_TEXT] == 3
    assert lookup.tolist() == [0, 0, 1, 2, 1, 3]
