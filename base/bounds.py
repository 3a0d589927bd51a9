"""Types of the numbers in configs: the type of a field says its range, `base.config` refuses what lies outside.

A number that cannot be meant (a pack of 10^12 images) is told with its key when a config is read, and not where
a list of so many, or a date so far away, does not exist.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MAX_COUNT = 1 << 24
"""No GPU holds so many images of a pack, no machine starts so many threads; lists of so many fit into memory."""
MAX_FEW = 1 << 10
"""Draws of one caption, crops of one image, threads, requests in flight: none of these makes sense by the thousand."""
MAX_STEPS = 1 << 40
MAX_SECONDS = 1e8
"""Three years: clocks and queues of the libraries can wait so long."""

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
"""How many there are, at least one; also a length in pixels or channels."""
Few = Annotated[int, Field(ge=1, le=MAX_FEW)]
"""How often one thing is done, or by how many at once, at least one."""
Amount = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""How many there are; 0 is a number that makes sense."""
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
"""Steps of a training, or of a rhythm in it."""
Step = Annotated[int, Field(ge=0, le=MAX_STEPS)]
"""A step by its number, from 0, or a span of steps that may be empty."""
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
"""What random draws derive from."""
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole."""
Weight = Annotated[float, Field(ge=0)]
"""A factor of a loss, a rate or a size: nothing negative."""
