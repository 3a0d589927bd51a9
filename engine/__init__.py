"""The one training loop, on DeepSpeed. Only `launch` starts it."""

import base  # noqa: F401  # before torch: base/__init__.py says how its threads wait
