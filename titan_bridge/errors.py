"""The one error type for everything a user can put right."""

from __future__ import annotations


class BridgeError(ValueError):
    """Bad input: the message is one line that says what was given, what is allowed and what to change.

    The command line prints it on stderr and exits with 2; inside vLLM it is the exception's text.
    """
