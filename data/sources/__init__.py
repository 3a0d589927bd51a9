"""Where samples come from: each source yields `data.shards.Sample`s."""
