"""Entry points: each parses a config, composes the parts, and calls them."""
