"""Files -> batches; knows no model."""
