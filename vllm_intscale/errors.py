"""The one exception type of this package."""


class IntScaleError(ValueError):
    """Something cannot run as asked.

    The message is one line that names what (file, layer or tensor), the offending value, the
    limit it breaks and what to do about it.
    """
