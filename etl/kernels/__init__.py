"""Where kernels come from, and what watches them: cold ones, and those that wait, forked ahead of time."""
