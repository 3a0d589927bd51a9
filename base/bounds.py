"""Types of the numbers in configs: a field's type gives its range, and `base.config` refuses numbers outside.

A number that nobody can mean (a pack of 10^12 images) is refused with its key when the config is read, rather than
later, when a list of that length is built.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MAX_COUNT = 1 << 24
"""Largest count. No GPU holds so many images of a pack; a list of so many entries still fits into memory."""
MAX_FEW = 1 << 10
"""Largest `Few`: draws of a caption, crops of an image, threads or requests in flight never number thousands."""
MAX_STEPS = 1 << 40
MAX_SECONDS = 1e8
"""Three years, which clocks and queues of the libraries can still represent."""

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
"""A count of at least 1, or a length in pixels or channels."""
Few = Annotated[int, Field(ge=1, le=MAX_FEW)]
"""A number of repetitions or of parallel workers, at least 1."""
Amount = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""A count that may be 0."""
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
"""A number of steps: of a training, or of an interval in it; at least 1."""
Step = Annotated[int, Field(ge=0, le=MAX_STEPS)]
"""The number of a step, from 0, or a number of steps that may be 0."""
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
"""Seed of random draws, 63 bits."""
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
Share = Annotated[float, Field(ge=0, le=1)]
"""A fraction in [0, 1]."""
Weight = Annotated[float, Field(ge=0)]
"""A factor or rate that is not negative."""
