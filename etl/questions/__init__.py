"""Questions to the lake: what one is, who answers it, where answers are kept."""
