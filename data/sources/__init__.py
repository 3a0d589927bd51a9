"""Sources of samples: each reads one kind of input and yields `data.shards.Sample`s."""
