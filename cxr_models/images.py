"""One image file: whether it can be read, what it is, and its picture in 8 bits."""

import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cxr_models.dicom import Decoded, is_dicom, read_dicom
from cxr_models.fingerprints import pixel_digest, thumbnail
from cxr_models.sizes import MAX_FILE_BYTES, MAX_PIXELS, AbsurdSizeError, check_large, check_small

DICOM_SUFFIXES = (".dcm", ".dicom")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", *DICOM_SUFFIXES)
# What may lie behind those names. Pillow's other readers are never tried: that of EPS starts another program.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")
# Words of Pillow's and pydicom's readers about a file that ends too early.
CUT_SHORT = ("truncated", "broken png", "end of file", "less than expected")
LARGE_PIXELS = 16_000_000  # larger than what detectors deliver; of larger pictures one is decoded at a time
LONGEST_REASON = 300  # characters
GREY_BIT_DEPTHS = (8, 10, 12, 14, 16)  # as X-ray detectors write them, mostly into 16-bit files


_ONE_LARGE, _QUIET = Lock(), Lock()


class ImageFacts(NamedTuple):
    """What reading the whole file once tells.

    Attributes:
        sha256: of the file's bytes.
        width, height: in pixels, of the upright picture.
        mode: Pillow's, of the file; of a DICOM file its own, such as `MONOCHROME1/12`.
        grey: whether the colour channels are equal in every pixel.
        patient: DICOM's PatientID; "" for none.
        format: of the file, such as `PNG` or `DICOM`.
        pixels: `fingerprints.pixel_digest` of the upright picture in 8 bits.
        thumbnail: `fingerprints.thumbnail` of it.
    """

    sha256: str
    width: int
    height: int
    mode: str
    grey: bool
    patient: str
    format: str
    pixels: str
    thumbnail: str


class Flaw(StrEnum):
    """What is wrong with a file that is left out."""

    EMPTY = "empty"
    TRUNCATED = "truncated"
    SIZE = "size"
    MASK = "mask"  # a lung mask that a table names and that is not there
    UNREADABLE = "unreadable"


class Fault(NamedTuple):
    """Why a file is left out, in kind and in a few words."""

    flaw: Flaw
    reason: str


@contextmanager
def quiet_codecs() -> Iterator[None]:
    """Keep libtiff off the terminal: of broken files it prints lines that name none, from C, past Python's warnings."""
    if not _QUIET.acquire(blocking=False):  # another thread has seen to it
        yield
        return
    try:
        kept = os.dup(2)
    except OSError:  # there is no error output
        _QUIET.release()
        yield
        return
    try:
        sys.stderr.flush()
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        _QUIET.release()


def examine(path: Path) -> ImageFacts | Fault:
    """Read and decode the whole file.

    Returns:
        The facts, or why there is no X-ray in the file.
    """
    try:
        with _opened(path) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if file.tell() == 0:
                return Fault(Flaw.EMPTY, "the file is empty (0 bytes)")
            file.seek(0)
            with _room_for(file):
                picture, mode, patient, file_format = _decoded(file)
                check_small(*picture.size)
                grey = _is_grey(picture)
                known = (sha256, *picture.size, mode, grey, patient, file_format)
                return ImageFacts(*known, pixel_digest(picture, grey), thumbnail(picture))
    except UnidentifiedImageError:
        return Fault(Flaw.UNREADABLE, f"no picture of the formats {', '.join((*FORMATS, 'DICOM'))}")
    except AbsurdSizeError as error:
        return Fault(Flaw.SIZE, str(error))
    except OSError as error:
        return _fault(error.strerror or str(error) or type(error).__name__)
    except Exception as error:  # what pathlib says of a path that can be none, such as one with a zero byte
        return _fault(f"{type(error).__name__}: {error}")


def _fault(reason: str) -> Fault:
    """Of what a reader raised."""
    cut = any(words in reason.lower() for words in CUT_SHORT)
    shown = "".join(letter if letter.isprintable() else " " for letter in reason[:LONGEST_REASON])
    return Fault(Flaw.TRUNCATED if cut else Flaw.UNREADABLE, " ".join(shown.split()))


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """A file to read that is one: a pipe would have no end to wait for, and a device none to read to."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("no file, but a folder, a pipe or a device")
    if status.st_size > MAX_FILE_BYTES:
        raise AbsurdSizeError(f"{status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
    with path.open("rb") as file:
        yield file


@contextmanager
def _room_for(file: BinaryIO) -> Iterator[None]:
    """Wait until no other large picture is being decoded: a few at once would take all of the memory."""
    if not _is_large(file):
        yield
        return
    with _ONE_LARGE:
        yield


def _is_large(file: BinaryIO) -> bool:
    """By what the header says, or for DICOM by the file's size; the file stays at its beginning."""
    if is_dicom(file):
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return size > LARGE_PIXELS
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.width * image.height > LARGE_PIXELS
    except Exception:
        return False  # `_decoded` will tell what is wrong
    finally:
        file.seek(0)


def read_picture(path: Path) -> Image.Image:
    """Read one picture as people see it: upright, in mode L or RGB, 8 bits a channel.

    EXIF orientation is applied. Alpha is dropped, not blended. Grey values of 16 or 32 bits are scaled linearly from
    the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value of the image. DICOM files, which are known
    by their contents and not by their names, are shown as `dicom.read_dicom` says.

    Raises:
        OSError: the file is missing, truncated or no picture.
        ValueError: more than `sizes.MAX_PIXELS`, float pixels, grey values outside 16 bits, or a broken file.
    """
    with _opened(path) as file, _room_for(file):
        return _decoded(file).picture


def _decoded(file: BinaryIO) -> Decoded:
    """What `read_picture` returns, and what is told beside it.

    Raises:
        OSError, ValueError: nothing else, whatever is in the file.
    """
    try:
        return read_dicom(file) if is_dicom(file) else _pillow_decoded(file)
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours
        raise AbsurdSizeError(f"more than {MAX_PIXELS // 1_000_000} megapixels") from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # of a broken file: SyntaxError, struct.error, RecursionError ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _pillow_decoded(file: BinaryIO) -> Decoded:
    with Image.open(file, formats=FORMATS) as image:
        check_large(*image.size)
        picture = _in_eight_bits(ImageOps.exif_transpose(image))
        return Decoded(picture, image.mode, patient="", format=image.format or "")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    match image.mode:
        case "L" | "RGB":
            return image
        case "1" | "LA" | "La":
            return image.convert("L")
        case "P" | "PA":
            return image.convert("RGBA").convert("RGB")  # straight to RGB, Pillow warns about transparent palettes
        case "F":
            raise ValueError("float pixels (mode F) have no known range; expected 8 or 16 bits a channel")
        case mode if mode.startswith("I"):
            return _scaled_to_eight_bits(image)
        case _:
            return image.convert("RGB")


def _scaled_to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    bits = next((bits for bits in GREY_BIT_DEPTHS if high < 2**bits), None)
    if low < 0 or bits is None:
        raise ValueError(f"grey values from {low} to {high}; expected 0 to 65535")
    table = np.rint(np.arange(2**bits) * (255 / (2**bits - 1))).astype(np.uint8)
    return Image.fromarray(table[values])


def _is_grey(picture: Image.Image) -> bool:
    if picture.mode == "L":
        return True
    red, green, blue = np.moveaxis(np.asarray(picture), -1, 0)
    return bool((red == green).all() and (green == blue).all())
