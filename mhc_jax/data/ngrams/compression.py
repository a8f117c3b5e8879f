"""Token compression: which tokens of a vocabulary count as one (arXiv 2601.07372, section 2.2 and appendix C)."""

import numpy as np
from jaxtyping import Int32
from tokenizers import Regex, Tokenizer, normalizers

from mhc_jax.data.tokenizer import TextTokenizer, failures_told

_BLANK = "\ue000"  # private use: keeps a token of nothing but white space from being stripped to nothing
_UNDECODABLE = "\ufffd"


def compress_vocabulary(tokenizer: TextTokenizer) -> Int32[np.ndarray, " vocab"]:
    """For each token id the number of its class; classes are numbered in the order of their first token.

    Tokens are in one class when their texts are equal after NFKC, removal of accents, lower case, and joining and stripping of white space.
    A token that is a part of a character (its text holds U+FFFD) is known by its name in the vocabulary instead. Names and texts share one
    space, as in the published code: a name that looks like another token's text joins its class.

    Raises:
      UserError: the tokenizer cannot decode one of its own tokens.
    """
    normaliser = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _BLANK),
            normalizers.Strip(),
            normalizers.Replace(_BLANK, " "),
        ]
    )
    classes: dict[str, int] = {}
    lookup = np.empty(tokenizer.size, np.int32)
    with failures_told("the tokenizer cannot decode its own tokens"):
        library = Tokenizer.from_str(tokenizer.json)
        for token, text in enumerate(library.decode_batch([[i] for i in range(tokenizer.size)], skip_special_tokens=False)):
            name = library.id_to_token(token)
            key = name if name and _UNDECODABLE in text else normaliser.normalize_str(text) or text
            lookup[token] = classes.setdefault(key, len(classes))
    return lookup
