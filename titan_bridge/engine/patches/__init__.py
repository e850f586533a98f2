"""Every change to somebody else's code, and how it is applied."""
