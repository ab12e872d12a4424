"""Facts extracted from a source, before they are split and written."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """A fact from a source, used for a retrieval example and for a chat.

    Attributes:
      keys: what the fact is about. Facts that share a key are in the same split.
      user: a question or a task.
      assistant: the answer.
      query: retrieval query for the passage; "" for a fact used only in chats.
      passage: the passage that answers the query.
      negatives: hard negatives, passages that resemble the answer but are wrong.
      unmasked: the passage without masking, if no chat turn contains exactly that text.
      kind: kind of task, for datasets with several.
    """

    keys: tuple[str, ...]
    user: str
    assistant: str
    query: str = ""
    passage: str = ""
    negatives: tuple[str, ...] = ()
    unmasked: str = ""
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How the facts of a source are named, split and queried.

    Attributes:
      name: name of the source.
      passages: second half of the name of the embedding dataset; "" for a source used only in
        chats.
      instruction: instruction of the queries.
      held_out: fraction of the keys that is held out.
      most_queries: maximum number of held-out queries.
      most_chats: maximum number of held-out chats.
    """

    name: str
    passages: str
    instruction: str
    held_out: float
    most_queries: int = 1000
    most_chats: int = 300

    @property
    def embedding_name(self) -> str:
        """Name of the dataset of queries and passages."""
        return f"{self.name}_{self.passages}"

    @property
    def chat_name(self) -> str:
        """Name of the dataset of chats."""
        return f"{self.name}_chat"


def normalize_words(text: str) -> str:
    """Returns the words of the text in lower case, with single spaces around them."""
    words = re.findall(r"[^\W_]+", text.casefold())
    return f" {' '.join(words)} "
