"""Tokenizer of a Hugging Face `tokenizer.json`."""

from collections.abc import Container, Iterable, Mapping, Sequence
import functools
import json

from jaxtyping import Int
import numpy as np
import tokenizers
from tokenizers import processors

# Texts without anything special, to see which tokens a tokenizer adds to the first that it knows.
PLAIN = "a1.<"


class HuggingFaceTokenizer:
    """A tokenizer of the package `tokenizers`.

    Args:
      content: content of a `tokenizer.json`.
      added: tokens to add that are not in it, by their ids.

    Raises:
      ValueError: the content is not a tokenizer, or a token cannot have its id.
    """

    def __init__(self, content: bytes, added: Mapping[int, tokenizers.AddedToken] | None = None):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # `tokenizers` raises plain Exceptions.
            raise ValueError(f"not a valid tokenizer.json: {error}") from None
        # Special tokens are added as ids. In a text, "</s>" is four characters.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.content = content
        self._add(added or {})
        # A tokenizer.json does not say which token is BOS, and which EOS.
        self.special_tokens: dict[str, str] = {}

    def _add(self, tokens: Mapping[int, tokenizers.AddedToken]) -> None:
        """Adds the tokens that the tokenizer does not have."""
        present = self._tokenizer.get_added_tokens_decoder()
        new = {i: token for i, token in sorted(tokens.items()) if str(present.get(i)) != str(token)}
        for token_id, token in new.items():
            self._tokenizer.add_tokens([token])
            if self._tokenizer.token_to_id(token.content) != token_id:
                raise ValueError(
                    f"the added token {token.content!r} cannot have the id {token_id}: use the "
                    "tokenizer.json that transformers saves (save_pretrained)"
                )
        if new:
            self.content = self._tokenizer.to_str().encode()

    def mark_special(self, tokens: Iterable[str]) -> None:
        """Marks tokens as special; those that are not in the vocabulary are ignored."""
        known = {token for token in tokens if self._tokenizer.token_to_id(token) is not None}
        if missing := sorted(known - self.control_tokens.keys()):
            self._tokenizer.add_special_tokens(
                [tokenizers.AddedToken(token, special=True, normalized=False) for token in missing]
            )
            self.content = self._tokenizer.to_str().encode()

    @property
    def control_tokens(self) -> dict[str, int]:
        """The special tokens, which no text becomes, with their ids."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: token_id for token_id, token in added if token.special}

    @property
    def last_base_id(self) -> int:
        """The largest id of a token that was not added to the vocabulary."""
        added = self._tokenizer.get_added_tokens_decoder().keys()
        return max({*self._tokenizer.get_vocab().values()} - added, default=0)

    @property
    def last_id(self) -> int:
        """The largest id that a text may have: of all tokens that are not special."""
        return max({*self._tokenizer.get_vocab().values()} - {*self.control_tokens.values()})

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token, or None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int | None) -> str | None:
        """Returns the token with an id, or None if there is none."""
        return None if token_id is None else self._tokenizer.id_to_token(token_id)

    def tokens_around(self) -> tuple[list[str], list[str]]:
        """Returns the tokens that the post-processor puts before and after a text.

        Raises:
          ValueError: it changes the text's own tokens.
        """
        text = next(filter(self.encode, PLAIN), "")
        own = self._tokenizer.encode(text, add_special_tokens=False).tokens
        whole = self._tokenizer.encode(text).tokens
        for start in range(len(whole) - len(own) + 1):
            if whole[start : start + len(own)] == own:
                return whole[:start], whole[start + len(own) :]
        raise ValueError("its post_processor changes the tokens of a text")

    def exported(self, begin: Sequence[str], end: Sequence[str]) -> bytes:
        """Returns a tokenizer.json that puts these tokens before and after each text."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        single = [*begin, "$A", *end]
        pair = [*single, *(f"{token}:1" for token in begin), "$B:1", *(f"{t}:1" for t in end)]
        ids = {token: copy.token_to_id(token) for token in (*begin, *end)}
        template = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=list(ids.items())
        )
        copy.post_processor = template
        return copy.to_str(pretty=True).encode()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without begin and end token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_markup(self, text: str) -> list[int]:
        """Returns the ids of `text`, in which special tokens are tokens."""
        return self._of_markup.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Returns the text of `ids`, skipping special ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def ids(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Returns the ids of `encode` as an array."""
        return np.array(self.encode(text), np.int32)

    def ids_after(
        self, prefix: str, prefix_ids: Int[np.ndarray, " prefix_tokens"], text: str
    ) -> Int[np.ndarray, " tokens"]:
        """Returns the ids of `prefix + text`."""
        del prefix_ids  # A token may span the boundary.
        return self.ids(prefix + text)

    def with_renamed_tokens(self, names: Mapping[str, str]) -> tokenizers.Tokenizer:
        """Returns a tokenizer in which special tokens have other names, and are found in texts.

        Their former names are ordinary text. It neither begins nor ends texts.
        """
        content = json.loads(self._tokenizer.to_str())
        for token in content["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "special": False}
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not _makes(pair, names)]
        content["post_processor"] = None
        renamed = tokenizers.Tokenizer.from_str(json.dumps(content))
        renamed.encode_special_tokens = True
        return renamed

    @functools.cached_property
    def _of_markup(self) -> tokenizers.Tokenizer:
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = False
        return copy


def _makes(merge: Sequence[str], tokens: Container[str]) -> bool:
    """Returns whether one of some tokens is a part or the result of a merge."""
    return any(token in tokens for token in (*merge, "".join(merge)))
