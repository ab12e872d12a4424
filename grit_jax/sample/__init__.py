"""A small sample of real text for both streams, ready to train and to test on.

``train/`` and ``held_out/`` each hold two embedding files (``wordnet_senses.jsonl.gz`` and
``jargon_entries.jsonl.gz``) and two chat files (``wordnet_chat.jsonl.gz`` and
``jargon_chat.jsonl.gz``). Lines are sorted by word, which keeps the files small, so shuffle the
training lines before batching them. ``LICENSES.md`` says where the text comes from, and
``python -m tools.sample.build`` makes the files again.
"""

from pathlib import Path

SAMPLE_FOLDER = Path(__file__).parent
