"""Memory that is taken and freed over and over while files are read stays with the process until they are read."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as mallopt(3) names and numbers them
LARGEST = 32 << 20  # bytes of a block of the heap; a larger one is the system's, whatever is asked for
KEPT = 256 << 20  # bytes that may be free at the end of the heap


@contextmanager
def kept() -> Iterator[None]:
    """Within it memory that is freed is kept for what comes next; at its end all that is free goes back.

    A file's bytes, and what is parsed at once, are above the size from which glibc takes a block from the system and
    gives it back, to be mapped again page by page: a twentieth of the time of ingestion. Nothing without glibc.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
