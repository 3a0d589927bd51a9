"""The miniature's pictures: scenes of emoji, their captions and edits."""
