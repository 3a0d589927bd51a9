"""Images -> scores: an image set and its manifest go in, scores.json and per_item.jsonl come out."""

import base  # noqa: F401  # before torch: base/__init__.py says how its threads wait
