"""Models: the one that is published under a root, how it becomes that, and how it is read."""
