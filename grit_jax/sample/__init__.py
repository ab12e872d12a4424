"""The embedded sample: a little real text of both kinds, for demos and tests.

`train/` and `held_out/` each hold two files of embedding examples (`wordnet_senses.jsonl.gz`,
`jargon_entries.jsonl.gz`) and two of chats (`wordnet_chat.jsonl.gz`, `jargon_chat.jsonl.gz`). Lines
are sorted by word, which keeps the files small. `LICENSES.md` names the sources of the text, and
`python -m tools.sample.build` builds the files.
"""

from pathlib import Path

SAMPLE_FOLDER = Path(__file__).parent
