"""Files -> batches; knows no model."""

import base  # noqa: F401  # before torch: base/__init__.py says how its threads wait
