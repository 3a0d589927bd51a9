"""Files -> batches; knows no model."""

import engine  # noqa: F401  # before torch: engine/__init__.py says how its threads wait
