"""Files of every type and layout are read as the same rows, in order, or refused in one line."""

import csv
import gzip
import json

from datasets import Dataset, DatasetDict
from etils import epath
from hypothesis import given, settings, strategies
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from grit_jax.data.manifest import PreparedDataset, load_mixture
from grit_jax.prepare.data_file import DataFile
from grit_jax.prepare.datasets import mixtures_of_files
from grit_jax.prepare.files import DataFiles, kind_of_files
from grit_jax.prepare.finding import find_datasets, find_files
from grit_jax.prepare.prepare import prepare_mixtures
from grit_jax.prepare.tables import read_arrow
from grit_jax.text.columns import ColumnsError, RowReader, parse_columns
from grit_jax.text.examples import RejectedExample, TextOptions
from grit_jax.text.jsonl import SourceError
from grit_jax.text.kinds import TEXT_KINDS, kind_of_line
from grit_jax.text.tokenizer import Tokenizer

ROWS = [
    {"anchor": f"question {n}", "positive": f'answer, "{n}"\nü', "negative_1": None, "id": n}
    | ({"negative_1": f"no {n}"} if n % 3 else {})
    for n in range(40)
]


def write_table(path, rows=ROWS):
    """Writes rows to a file of the type that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in rows]
    text, name = "".join(line + "\n" for line in lines), path.name
    table = pa.Table.from_pylist(rows)
    if name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=7)
    elif name.endswith(".arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    elif name.endswith(".feather"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table, max_chunksize=3)
    elif name.endswith((".csv", ".tsv")):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if "tsv" in name else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    else:
        compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(compress(text.encode()))


def read(files, block_bytes=150, columns=None):
    """Returns the number and the canonical form of each row, or why it is rejected."""
    reader, found = RowReader(columns), []
    for file in files:
        for block in file.read(block_bytes):
            for number, _, parse in block.rows():
                try:
                    line, _ = reader(parse())
                    found.append((number, TEXT_KINDS[str(kind_of_line(line))].to_canonical(line)))
                except RejectedExample as reason:
                    found.append((number, str(reason)))
    return found


TYPES = ("jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "tsv", "parquet", "arrow", "feather")


@pytest.mark.parametrize("block_bytes", [1, 500, 10**6])
@pytest.mark.parametrize("suffix", TYPES)
def test_every_type_of_file_has_the_same_rows(tmp_path, suffix, block_bytes):
    path = tmp_path / f"x.{suffix}"
    write_table(path)
    negatives = [[["", f"no {n}"]] if n % 3 else [] for n in range(40)]
    expected = [
        {"query": ["", f"question {n}"], "pos": [["", f'answer, "{n}"\nü']], "neg": negatives[n]}
        for n in range(40)
    ]
    assert read(find_files(path), block_bytes) == list(enumerate(expected, 1))


def test_no_whole_row_group_is_held(tmp_path):
    rows = [{"text": f"{n} " * 500} for n in range(2000)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False)
    blocks = list(read_arrow(tmp_path / "x.parquet", 50_000))
    assert max(len(block.data) for block in blocks) < 150_000
    assert blocks[-1].position == (tmp_path / "x.parquet").stat().st_size
    before = pa.total_allocated_bytes()
    reading = read_arrow(tmp_path / "x.parquet", 50_000)
    block = next(reading)
    assert block.first_row == 1 and pa.total_allocated_bytes() - before < 1_000_000
    del reading


QUERY = {"query": ["", "q"], "pos": [["", "p"]], "neg": []}
NEGATIVES = {**QUERY, "neg": [["", "n1"], ["", "n2"], ["", "n10"]]}
CHAT = {"text": ["u", "a"]}
# GRIT's format joins the system message and the user's; chat templates take them one by one.
SYSTEM = {
    "text": ["s\n\nu", "a"],
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ],
}
TURNS = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
MESSAGES = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"anchor": "q", "positive": "p"}, QUERY),
        ({"query": "q", "passage": "p", "dataset": "x"}, QUERY),
        ({"question": "q", "answer": "p", "id": 1}, QUERY),
        ({"query": "q", "answer": ["p", "p2"]}, {**QUERY, "pos": [["", "p"], ["", "p2"]]}),
        ({"sentence1": "q", "sentence2": "p"}, QUERY),
        ({"sentence1": "q", "sentence2": "p", "score": None}, QUERY),
        ({"question": "q", "pos_doc": ["p"], "neg_doc": ["n1", "n2", "n10"]}, NEGATIVES),
        (
            {"query": "q", "passage": "p", "negative_10": "n10", "negative_2": "n2"}
            | {"negative_1": "n1", "negative_3": None},
            NEGATIVES,
        ),
        ({"anchor": "q", "positive": "p", "negative": ["n1", "n2", "n10"]}, NEGATIVES),
        ({"query": "q", "positive": "p", "prompt": "i"}, {**QUERY, "query": ["i", "q"]}),
        ({"query": "q", "pos": ["p"], "passage": "other"}, QUERY),
        ({"messages": MESSAGES, "question": "q", "answer": "p"}, CHAT),
        ({"conversations": TURNS}, CHAT),
        ({"conversations": TURNS, "system": "s"}, SYSTEM),
        ({"conversations": [{"from": "system", "value": "s"}, *TURNS]}, SYSTEM),
        ({"conversations": MESSAGES}, CHAT),
        ({"instruction": "u", "input": "", "output": "a", "text": "### u ### a"}, CHAT),
        ({"instruction": "u", "input": "i", "output": "a"}, {"text": ["u\n\ni", "a"]}),
        ({"prompt": "u", "completion": "a"}, CHAT),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, CHAT),
        ({"text": ["u", "a"], "question": "q", "answer": "p"}, CHAT),
        (
            {"sentence1": "q", "sentence2": "p", "label": 0},
            r"^graded pairs \('label'\), .*--columns",
        ),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "role 'tool' is unknown"),
        ({"conversations": "x"}, "'conversations' is not a list"),
        ({"instruction": 1, "output": "a"}, "content is not a string"),
        ({"anchor": "q", "positive": None}, "no positive"),
    ],
)
def test_published_layouts_are_read_as_their_authors_mean_them(row, expected):
    def canonical():
        line, _ = RowReader()(row)
        raw = TEXT_KINDS[str(kind_of_line(line))].to_canonical(line)
        if raw.get("pos") == []:
            raise RejectedExample("no positive")  # As when it is tokenized.
        return raw

    if isinstance(expected, dict):
        assert canonical() == expected
    else:
        with pytest.raises(RejectedExample, match=expected):
            canonical()


names = strategies.sampled_from(
    ["query", "question", "pos", "positive", "negative_1", "neg", "text", "messages", "prompt"]
)


@settings(deadline=None)
@given(
    strategies.dictionaries(
        names, strategies.none() | strategies.text() | strategies.lists(strategies.text())
    )
)
def test_no_row_raises_anything_but_a_reason(row):
    try:
        line, used = RowReader()(row)
        assert used <= row.keys()
        if kind := kind_of_line(line):
            TEXT_KINDS[kind].to_canonical(line)
    except RejectedExample:
        pass


def test_columns_are_named_by_the_user(tmp_path):
    columns = parse_columns("query=title, pos=body,neg=bad,neg=worse")
    row = {"title": "q", "body": "p", "bad": "n1", "worse": ["n2", "n10"], "query": "other"}
    line, used = RowReader(columns)(row)
    assert (TEXT_KINDS["embedding"].to_canonical(line), used) == (
        NEGATIVES,
        {"title", "body", "bad", "worse"},
    )
    with pytest.raises(RejectedExample, match="no 'body'"):
        RowReader(columns)({"title": "q"})
    for argument, message in (
        ("title", "'title' is not NAME=COLUMN, such as query=title"),
        ("heading=title", "'heading' is not one of query, question"),
        ("query=a,query=b", "query is given 2 times"),
    ):
        with pytest.raises(ColumnsError, match=message):
            parse_columns(argument)
    write_table(tmp_path / "x.csv", [{"title": "q", "body": "p"}])
    with pytest.raises(SourceError) as error:
        kind_of_files(find_files(tmp_path / "x.csv"), None)
    assert "x.csv: no row is an example (row 1: it has 'title', 'body'); understood are query" in (
        str(error.value)
    )
    assert str(error.value).endswith("with --columns query=title,pos=body")
    columns = parse_columns("query=title,pos=body")
    assert kind_of_files(find_files(tmp_path / "x.csv"), None, RowReader(columns)) == "embedding"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b'query,pos\na,"b\n', r"x.csv, line 2: unexpected end of data; quotes"),
        ("x.csv", b"query,query\na,b\n", "names the column 'query' twice"),
        ("x.csv", b"", r"x.csv: no row is an example \(empty\)"),
        ("x.csv", b"query,pos\na\n", r"row 1: 1 fields, not 2"),
        ("x.parquet", b"PAR1 and no more", "x.parquet, after row 0: "),
        ("x.arrow", b"ARROW1 and no more", "x.arrow, after row 0: "),
        ("x.parquet", b"", "x.parquet, after row 0: "),
    ],
)
def test_damaged_tables_are_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message) as error:
        kind_of_files([DataFile(epath.Path(tmp_path / name))], None)
    assert "\n" not in str(error.value)


def test_rows_that_cannot_be_used_are_rejected_with_their_number(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"query,passage\na,b\nc\n\n\xff,d\ne,f\n")
    assert read(find_files(tmp_path / "x.csv")) == [
        (1, {"query": ["", "a"], "pos": [["", "b"]], "neg": []}),
        (2, "1 fields, not 2"),
        (4, "half of a surrogate pair"),
        (5, {"query": ["", "e"], "pos": [["", "f"]], "neg": []}),
    ]


def found_names(folder):
    found = find_datasets(folder)
    datasets = {
        name: [str(file.path.relative_to(folder)) for file in files]
        for name, files in found.datasets.items()
    }
    return datasets, [str(path.relative_to(folder)) for path in found.unread]


def test_the_files_of_a_folder_are_grouped_into_datasets(tmp_path):
    for name in (
        "a.jsonl",
        "b.csv.gz",
        "data/train-00000-of-00002-0123456789abcdef.parquet",
        "data/train-00001-of-00002-0123456789abcdef.parquet",
        "data/test-00000-of-00001.parquet",
        "alone/test-00000-of-00001.parquet",
        "README.md",
        "dataset_infos.json",
        ".git/x.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "settings.json").write_text('{\n "a": 1}')
    train = [f"data/train-0000{n}-of-00002-0123456789abcdef.parquet" for n in range(2)]
    assert found_names(tmp_path) == (
        {
            "a": ["a.jsonl"],
            "alone/test": ["alone/test-00000-of-00001.parquet"],
            "b": ["b.csv.gz"],
            "data/train": train,
        },
        ["README.md", "data/test-00000-of-00001.parquet", "settings.json"],
    )
    (tmp_path / train[0]).unlink()
    with pytest.raises(SourceError, match=r"'train' has the files train-00001.* not 2 files"):
        find_datasets(tmp_path)
    (tmp_path / train[1]).unlink()
    (tmp_path / "a.parquet").touch()
    with pytest.raises(SourceError, match=r"a\.jsonl, .*a\.parquet: all would be the dataset 'a'"):
        find_datasets(tmp_path)
    with pytest.raises(SourceError, match="nowhere: no such file or folder"):
        find_files(tmp_path / "nowhere")
    (tmp_path / "other" / "notes").mkdir(parents=True)
    with pytest.raises(SourceError, match=r"other has no file of a known type: these are read"):
        find_files(tmp_path / "other")
    (tmp_path / "other" / "x.xlsx").touch()
    with pytest.raises(SourceError, match=r"known type, only x\.xlsx: .*\.parquet"):
        find_files(tmp_path / "other")


def test_folders_of_save_to_disk_are_read_without_datasets(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one" / "saved", num_shards=3)
    splits = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}
    DatasetDict(**splits).save_to_disk(tmp_path / "two")
    expected = read([*find_files(tmp_path / "one")], 10**6)
    assert len(expected) == 40
    assert [row for _, row in expected] == [row for _, row in read(find_files(tmp_path / "two"))]
    datasets, unread = found_names(tmp_path)
    assert {name: len(files) for name, files in datasets.items()} == {"one/saved": 3, "two": 1}
    assert unread == ["two/test"]
    (shard,) = (tmp_path / "one" / "saved").glob("*-00001-*")
    shard.unlink()
    with pytest.raises(SourceError, match=r"data-00001-of-00003\.arrow is missing"):
        find_datasets(tmp_path)


def test_splits_and_kinds(tmp_path):
    files = DataFiles({"train": (), "validation": ()}, held_out=0.5)
    rows = [str(number).encode() for number in range(100)]
    assert {files.split_of("train", row) for row in rows} == {"train", "held_out"}
    assert {files.split_of("validation", row) for row in rows} == {"validation"}
    path = tmp_path / "a.jsonl"
    path.write_text('broken\n{"title": 1}\n\n{"query": "q"}\n{"text": ["u", "a"]}\n')
    assert kind_of_files(find_files(path), None) == "generative"
    path.write_text('{"title": 1}\n')

    def preprocess(raw):
        return {"query": raw["title"], "positive": "p"}

    assert kind_of_files(find_files(path), preprocess) == "embedding"


@pytest.mark.slow
def test_all_types_are_prepared_to_the_same_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suffix in TYPES:
        write_table(tmp_path / "all" / f"of_{suffix.replace('.', '_')}.{suffix}")
    for shard, rows in enumerate((ROWS[:11], ROWS[11:])):
        write_table(tmp_path / "all" / f"of_s-0000{shard}-of-00002.parquet", rows)
    options = TextOptions(query_length=24, passage_length=32, chat_length=48)
    prepare_mixtures(["all"], [], "out", Tokenizer(), options, processes=2, held_out=0.2)
    records = {}
    for split in ("train", "held_out"):
        for dataset in load_mixture("out", "all", split, "embedding", "x"):
            records.setdefault(dataset.name, {})[split] = [
                example.to_bytes() for example in dataset.read(range(len(dataset)))
            ]
    # A row is held out by its content, which differs between lines, records and tables.
    assert len(records) == len(TYPES) + 1
    assert all(sum(map(len, splits.values())) == 40 for splits in records.values())
    for same in (("jsonl", "jsonl_gz", "jsonl_zst"), ("csv", "tsv"), ("parquet", "arrow", "s")):
        assert len({repr(records[f"all.of_{name}"]) for name in same}) == 1
    assert all(
        len({record for split in s.values() for record in split}) == 40 for s in records.values()
    )
    manifest = PreparedDataset("out", "all.of_parquet", "train").manifest
    assert manifest.notes == {} and len(manifest.source["files"]["train"]) == 1


def test_the_columns_are_part_of_what_a_dataset_is_made_from(tmp_path):
    write_table(tmp_path / "x.jsonl", [{"title": "q", "body": "p", "other": "p"}])
    described = [
        next(
            iter(mixtures_of_files("x", tmp_path / "x.jsonl", columns=columns)[0].rates)
        ).source.describe()
        for columns in (
            parse_columns("query=title,pos=body"),
            parse_columns("query=title,pos=other"),
        )
    ]
    assert described[0] != described[1]
