"""How the miniature's images are scored."""
