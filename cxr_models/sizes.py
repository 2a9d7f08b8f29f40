"""Which sizes of a picture are taken for an X-ray at all."""

MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 1_000_000_000  # more than 100 megapixels take uncompressed
MIN_SIDE = 16  # in pixels; an icon or a tracking pixel, nothing that shows a chest
MAX_ASPECT = 5.0  # longer side over shorter side: a ruler, a banner, a signal drawn as a picture


class AbsurdSizeError(ValueError):
    """A picture that is far too large, too small or too long; the message is the reason in a few words."""


def check_large(width: int, height: int) -> None:
    """Refuse what would take gigabytes to decode; to be called before it is.

    Raises:
        AbsurdSizeError: more than `MAX_PIXELS`.
    """
    if width * height > MAX_PIXELS:
        raise AbsurdSizeError(f"{width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} megapixels")


def check_small(width: int, height: int) -> None:
    """Refuse what shows no chest.

    Raises:
        AbsurdSizeError: a side below `MIN_SIDE`, or one over `MAX_ASPECT` times the other.
    """
    if min(width, height) < MIN_SIDE:
        raise AbsurdSizeError(f"{width} x {height} pixels; expected at least {MIN_SIDE} on each side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise AbsurdSizeError(f"{width} x {height} pixels; expected at most {MAX_ASPECT:g} times as long as wide")
