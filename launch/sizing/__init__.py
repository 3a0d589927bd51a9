"""What a run will need, before it is started: memory, time, storage; and one measured step."""
