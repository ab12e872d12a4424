"""What a source tells, before it is split and written."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing that a source tells, to be found by its query and to be chatted about.

    Attributes:
      keys: what it is about. Facts that share a key stand on the same side of the split.
      user: a question or a task.
      assistant: its answer.
      query: what the passage is looked for with; "" for a fact that is only chatted about.
      passage: what answers the query.
      negatives: passages that are easily taken for the answer, and are not.
      unmasked: the passage with the names that are masked in it, where no turn is that alone.
      kind: of the task, where a dataset has several.
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
    """How the facts of a source are named, split and asked for.

    Attributes:
      name: of the source.
      passages: what its passages are, the second half of the name of its embedding dataset; ""
        for a source that is only chatted about.
      instruction: of its queries.
      held_out: the share of its keys that is held out.
      most_queries: of its held-out queries.
      most_chats: of its held-out chats.
    """

    name: str
    passages: str
    instruction: str
    held_out: float
    most_queries: int = 1000
    most_chats: int = 300

    @property
    def embedding_name(self) -> str:
        """The name of its dataset of queries and passages."""
        return f"{self.name}_{self.passages}"

    @property
    def chat_name(self) -> str:
        """The name of its dataset of chats."""
        return f"{self.name}_chat"


def normalised(text: str) -> str:
    """The text's words in lower case with one space around each, whatever stands between them."""
    words = re.findall(r"[^\W_]+", text.casefold())
    return f" {' '.join(words)} "
