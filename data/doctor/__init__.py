"""What is wrong with a data set, what is in it, and whether a training could start on it."""
