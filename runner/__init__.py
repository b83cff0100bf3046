"""One notebook run as a trustworthy job."""
