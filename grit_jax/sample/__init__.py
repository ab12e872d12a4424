"""A small sample of real text for embedding and chat, for training and tests.

`train/` and `held_out/` each contain two embedding files (`wordnet_senses.jsonl.gz` and
`jargon_entries.jsonl.gz`) and two chat files (`wordnet_chat.jsonl.gz` and
`jargon_chat.jsonl.gz`). Lines are sorted by word, which keeps the files small, so shuffle the
training lines before batching. `LICENSES.md` lists the sources of the text;
`python -m tools.sample.build` rebuilds the files.
"""

from pathlib import Path

SAMPLE_FOLDER = Path(__file__).parent
