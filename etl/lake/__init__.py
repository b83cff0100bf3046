"""Delta tables that hold each row of the input exactly once, and one published snapshot of them."""
