"""Images -> scores: an image set and its manifest go in, scores.json and per_item.jsonl come out."""
