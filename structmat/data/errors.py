"""The one error type of data."""


class DataError(ValueError):
    """Data is missing, empty or malformed; the text names the place, what was found and how to get it right."""
