"""The doctor: finds faults of a data set, describes its content, and checks whether a training could start on it."""
