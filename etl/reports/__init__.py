"""What people read about a run, and which of it is kept."""
