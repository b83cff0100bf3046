"""The domain: TPC-H as a live stream, the lake it becomes, and what is asked of it."""
