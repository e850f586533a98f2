"""The one error type for everything a user can put right."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator


class BridgeError(ValueError):
    """Bad input: the message is one line that says what was given, what is allowed and what to change.

    The command line prints it on stderr and exits with 2; inside vLLM it is the exception's text.
    """


@contextlib.contextmanager
def about(what: object) -> Iterator[None]:
    """Whatever is refused inside is said of `what`: the message begins with it."""
    try:
        yield
    except BridgeError as error:
        raise BridgeError(f"{what}: {error}") from None


def refuse(options: Iterable[tuple[object, str, str]], where: str) -> None:
    """Raise for the first option that is asked for, of those that are not supported `where`.

    Args:
        options: Whether it is asked for, what it is ("LoRA is"), and what to do instead.
    """
    for asked, what, allowed in options:
        if asked:
            raise BridgeError(f"{what} not supported {where}; {allowed}")


def did_you_mean(given: str, known: Iterable[str], prefix: str = "") -> str:
    """ "did you mean NAME? " with the nearest of the known names, or nothing."""
    import difflib  # noqa: PLC0415  only for this message

    near = difflib.get_close_matches(given, list(known), n=1)
    return f"did you mean {prefix}{near[0]}? " if near else ""


def few(items: Collection[str], most: int = 3, separator: str = ", ") -> str:
    """The first items, and how many more there are: for messages."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return (separator.join(list(items)[:most]) or "none") + more
