"""One run of a notebook: asked for, executed, recorded, delivered, found again, repeated."""
