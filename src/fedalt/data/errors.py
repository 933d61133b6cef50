"""What a field of client data holds: errors that name it, and texts that can be written down."""


class DataError(ValueError):
    """Client data that cannot be used; the text names file, line and field."""


def as_text(value: object, place: str) -> str:
    """A value that is text. Raises DataError, also for one that no file can hold."""
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text, got {described(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: character {error.start} is half of a surrogate pair") from None
    return value


def described(value: object) -> str:
    """What a wrong value is, short enough for an error."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "an object"
        case _:
            text = repr(value)
            return text if len(text) <= 40 else f"{text[:37]}..."
