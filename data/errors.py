"""The error that every user mistake with data ends in."""


class CorpusError(ValueError):
    """A user's mistake with data. The message is one line: the setting, its value, why, how to mend it."""


def one_line(error: BaseException) -> str:
    """The first 300 characters of a library's message without its line breaks."""
    return " ".join(str(error).split())[:300] or type(error).__name__
