"""Reads the rows of published datasets by the names of their columns.

`RowReader` turns a row of any layout below into a line of `formats`:

    query, question or anchor + positive, passage, answer or pos_doc (+ negative, negative_1, ...)
    sentence1 + sentence2                     two texts of the same meaning
    messages                                  a chat
    conversations (+ system)                  ShareGPT
    instruction + output (+ input, system)    Alpaca
    prompt + completion

A row with none of these layouts is a line already, or not understood.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import re
from typing import Any

from grit_jax.text.examples import RejectedExample

Fields = dict[str, Any]

QUERY_COLUMNS = ("query", "question", "anchor")
POSITIVE_COLUMNS = ("pos", "positive", "passage", "answer", "pos_doc")
NEGATIVE_COLUMNS = ("neg", "negative", "neg_doc")
NUMBERED_NEGATIVE = re.compile(r"(?:neg|negative)_(\d+)")
# Columns of a pair's similarity, or of its class.
GRADE_COLUMNS = ("score", "label")
# Roles of ShareGPT. Others are kept, and then refused by name.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}

# For messages about rows that are not understood.
LAYOUTS = (
    f"{' or '.join(QUERY_COLUMNS)} + {' or '.join(POSITIVE_COLUMNS)} (+ negative, negative_1, ...)",
    "sentence1 + sentence2",
    "messages",
    "conversations",
    "instruction + output",
    "prompt + completion",
    "text",
)
# Names that --columns can give to columns.
NAMES = (
    *QUERY_COLUMNS,
    *POSITIVE_COLUMNS,
    *NEGATIVE_COLUMNS,
    *("sentence1", "sentence2", "messages", "conversations", "system"),
    *("instruction", "input", "output", "prompt", "completion", "text"),
)


class ColumnsError(ValueError):
    """The argument of --columns is wrong; the message says what to do."""


def parse_columns(argument: str) -> dict[str, list[str]]:
    """Returns the columns to read for each name, from NAME=COLUMN,NAME=COLUMN,...

    Raises:
      ColumnsError: a part is not NAME=COLUMN, or a name has no meaning or only one column.
    """
    columns: dict[str, list[str]] = {}
    for part in argument.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise ColumnsError(f"{part!r} is not NAME=COLUMN, such as query=title")
        if name not in NAMES and not NUMBERED_NEGATIVE.fullmatch(name):
            raise ColumnsError(f"{name!r} is not one of {', '.join(NAMES)}")
        columns.setdefault(name, []).append(column)
    for name, given in columns.items():
        if len(given) > 1 and name not in ("pos", "neg"):
            raise ColumnsError(
                f"{name} is given {len(given)} times; only pos and neg may be several columns"
            )
    return columns


class RowReader:
    """Turns rows into lines of `formats`.

    Args:
      columns: columns to read for names of `NAMES`; by default rows are read by their own names.
    """

    def __init__(self, columns: Mapping[str, Sequence[str]] | None = None):
        self.columns = columns or {}

    def __call__(self, row: Fields) -> tuple[Fields, set[str]]:
        """Returns the line of a row, and the columns that it was made from.

        Raises:
          RejectedExample: a column is missing or has the wrong type.
        """
        if not self.columns:
            return _read(row)
        line, _ = _read({name: _rename(row, name, given) for name, given in self.columns.items()})
        return line, {column for given in self.columns.values() for column in given}


def _rename(row: Fields, name: str, columns: Sequence[str]) -> Any:
    for column in columns:
        if column not in row:
            raise RejectedExample(f"no {column!r}")
    if name in ("pos", "neg"):
        return _texts(row[column] for column in columns)
    return row[columns[0]]


def _read(row: Fields) -> tuple[Fields, set[str]]:
    layout = _layout(frozenset(row))
    if layout is None:
        return row, set(row)
    used, convert = layout
    return convert(row), set(used)


@functools.lru_cache(maxsize=1024)
def _layout(names: frozenset[str]) -> tuple[tuple[str, ...], Callable[[Fields], Fields]] | None:
    """Returns the columns and the function of the layout that has these columns.

    None stands for a line of `formats` as it is, and for an unknown layout.
    """
    if {"query", "pos"} <= names or "messages" in names:
        return None
    if "conversations" in names:
        return _present(names, "conversations", "system"), _share_gpt
    query = next((name for name in QUERY_COLUMNS if name in names), None)
    positive = next((name for name in POSITIVE_COLUMNS if name in names), None)
    if query and positive and "text" not in names:
        negatives = (*_present(names, *NEGATIVE_COLUMNS), *_numbered_negatives(names))
        convert = functools.partial(_pair, query=query, positive=positive, negatives=negatives)
        return _present(names, query, positive, *negatives, "prompt"), convert
    if {"sentence1", "sentence2"} <= names:
        grades = _present(names, *GRADE_COLUMNS)
        return ("sentence1", "sentence2"), functools.partial(_sentences, grades=grades)
    if {"instruction", "output"} <= names:
        return _present(names, "instruction", "input", "output", "system"), _alpaca
    if {"prompt", "completion"} <= names:
        return ("prompt", "completion"), _completion
    return None


def _present(names: frozenset[str], *wanted: str) -> tuple[str, ...]:
    return tuple(name for name in wanted if name in names)


def _numbered_negatives(names: frozenset[str]) -> list[str]:
    numbers = {name: match for name in names if (match := NUMBERED_NEGATIVE.fullmatch(name))}
    return sorted(numbers, key=lambda name: (int(numbers[name][1]), name))


def _pair(row: Fields, query: str, positive: str, negatives: Sequence[str]) -> Fields:
    line = {
        "query": row[query],
        "pos": _texts([row[positive]]),
        "neg": _texts(row[name] for name in negatives),
    }
    return line | ({"prompt": row["prompt"]} if "prompt" in row else {})


def _texts(values: Iterable[Any]) -> list[Any]:
    """Returns the texts of columns that hold a text, a list of texts, or nothing."""
    texts = []
    for value in values:
        if isinstance(value, list):
            texts += value
        elif value is not None:
            texts.append(value)
    return texts


def _sentences(row: Fields, grades: Sequence[str]) -> Fields:
    if any(row[name] is not None for name in grades):
        raise RejectedExample(
            f"graded pairs ({grades[0]!r}), which no loss uses: keep those of equal meaning, and "
            "prepare them with --columns query=sentence1,pos=sentence2"
        )
    return {"query": row["sentence1"], "pos": _texts([row["sentence2"]])}


def _share_gpt(row: Fields) -> Fields:
    messages = row["conversations"]
    if not isinstance(messages, list):
        raise RejectedExample("'conversations' is not a list")
    turns = [_share_gpt_message(message) for message in messages]
    return {"messages": [*_system(row), *turns]}


def _share_gpt_message(message: Any) -> Any:
    if not isinstance(message, Mapping) or "from" not in message:
        return message
    role = message["from"]
    return {
        "role": ROLES.get(role, role) if isinstance(role, str) else role,
        "content": message.get("value"),
    }


def _alpaca(row: Fields) -> Fields:
    user, extra = row["instruction"], row.get("input")
    if extra and isinstance(user, str) and isinstance(extra, str):
        user = f"{user}\n\n{extra}"
    return {"messages": [*_system(row), *_turns(user, row["output"])]}


def _completion(row: Fields) -> Fields:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return {"messages": [*prompt, *completion]}
    return {"messages": _turns(prompt, completion)}


def _turns(user: Any, assistant: Any) -> list[Fields]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _system(row: Fields) -> list[Fields]:
    system = row.get("system")
    return [{"role": "system", "content": system}] if system else []
