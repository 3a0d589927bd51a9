"""In which order samples are read, on any number of ranks, and where a run stands in it."""
