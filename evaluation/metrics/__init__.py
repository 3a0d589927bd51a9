"""Numbers from images, and how sure they are."""
