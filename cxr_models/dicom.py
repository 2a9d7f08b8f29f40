"""One DICOM file: its picture in 8 bits as a viewer shows it, and its patient. Pydicom is loaded when one is read."""

import zlib
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_models.sizes import MAX_FILE_BYTES, AbsurdSizeError, check_large

PREAMBLE = 128  # bytes in front of the magic
MAGIC = b"DICM"
MOST_VALUES = 2**16  # that stored values lie between, of all X-ray detectors
MOST_META_BYTES = 10_000  # in front of the data set; it names the transfer syntax
_CHUNK = 1024**2
INVERTED = "MONOCHROME1"  # the smallest value is shown white
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom returns all of them as RGB


class Decoded(NamedTuple):
    """What a file holds.

    Attributes:
        picture: mode L or RGB, 8 bits a channel, as a viewer shows it: bones white.
        mode: photometric interpretation and bits stored, such as `MONOCHROME1/12`.
        patient: PatientID, "" if the file gives none.
        format: of the file, Pillow's name of it or `DICOM`.
    """

    picture: Image.Image
    mode: str
    patient: str
    format: str


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file, which is at its beginning and stays there, has DICOM's magic."""
    found = file.read(PREAMBLE + len(MAGIC))[PREAMBLE:] == MAGIC
    file.seek(0)
    return found


def read_dicom(file: BinaryIO) -> Decoded:
    """Read a DICOM file's only frame.

    Rescale slope and intercept are applied, then the VOI LUT or the first window where the file has one; without,
    the smallest and the largest value become 0 and 255. MONOCHROME1 is inverted.

    Raises:
        ValueError: no pixels, several frames, more than `sizes.MAX_PIXELS`, an unknown photometric interpretation, or a
            transfer syntax that needs an absent decoder; in a few words.
    """
    import pydicom
    from pydicom.pixels import pixel_array

    _check_inflated(file)
    dataset = pydicom.dcmread(file)
    if "PixelData" not in dataset:
        raise ValueError("a DICOM file without pixels")
    if (frames := int(dataset.get("NumberOfFrames") or 1)) != 1:
        raise ValueError(f"a DICOM file of {frames} frames; expected one")
    check_large(dataset.Columns * dataset.SamplesPerPixel, dataset.Rows)
    meaning = str(dataset.PhotometricInterpretation)
    try:
        values = pixel_array(dataset)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise ValueError(f"cannot be decompressed ({syntax}): {' '.join(str(error).split())[:200]}") from error
    if meaning in COLOURS and values.dtype == np.uint8:
        picture = Image.fromarray(values)
    elif meaning.startswith("MONOCHROME"):
        picture = _grey_picture(values, dataset, inverted=meaning == INVERTED)
    else:
        raise ValueError(f"DICOM pixels of {meaning} in {values.dtype}; expected MONOCHROME1, MONOCHROME2 or 8-bit RGB")
    patient = str(dataset.get("PatientID") or "").strip()
    return Decoded(picture, f"{meaning}/{dataset.BitsStored}", patient, format="DICOM")


def _check_inflated(file: BinaryIO) -> None:
    """Refuse a deflated file that would take gigabytes once inflated, since pydicom inflates without a limit.

    Raises:
        AbsurdSizeError: more than `sizes.MAX_FILE_BYTES`.
    """
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    head = file.read(MOST_META_BYTES)
    file.seek(0)
    if str(DeflatedExplicitVRLittleEndian).encode() not in head:
        return
    # The group of meta data in front says its own length, in its first element.
    start = PREAMBLE + len(MAGIC) + 12 + int.from_bytes(head[PREAMBLE + len(MAGIC) + 8 :][:4], "little")
    file.seek(start)
    inflate, left = zlib.decompressobj(-zlib.MAX_WBITS), MAX_FILE_BYTES
    while chunk := file.read(_CHUNK):
        while chunk and not inflate.eof:
            left -= len(inflate.decompress(chunk, _CHUNK))
            chunk = inflate.unconsumed_tail
            if left < 0:
                raise AbsurdSizeError(f"a deflated DICOM file of more than {MAX_FILE_BYTES:,} bytes")
    file.seek(0)


def _grey_picture(stored: NDArray[Any], dataset: Any, *, inverted: bool) -> Image.Image:
    """In 8 bits. Shades are worked out once for each stored value there is, since a picture of them takes gigabytes.

    Raises:
        ValueError: the file's window or rescaling leaves values that are no numbers.
    """
    low, span = int(stored.min()), int(stored.max()) - int(stored.min())
    if stored.dtype.kind not in "iu" or span >= MOST_VALUES:
        return Image.fromarray(_shades(stored, dataset, inverted=inverted))
    places = stored.astype(np.int32) - low if low else stored
    present = np.zeros(span + 1, bool)
    present[places] = True
    table = np.zeros(span + 1, np.uint8)
    table[present] = _shades((np.flatnonzero(present) + low).astype(stored.dtype), dataset, inverted=inverted)
    return Image.fromarray(table[places])


def _shades(stored: NDArray[Any], dataset: Any, *, inverted: bool) -> NDArray[np.uint8]:
    with np.errstate(all="ignore"):
        shares = _displayed(stored, dataset)
    if not np.isfinite(shares).all():
        raise ValueError("its window or rescaling gives values that are no numbers")
    return np.rint((1.0 - shares if inverted else shares) * 255.0).astype(np.uint8)


def _displayed(stored: NDArray[Any], dataset: Any) -> NDArray[np.float64]:
    """Stored grey values as shares from 0, the lower end of what is displayed, to 1."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence"):
        most = 2 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1
        return np.asarray(apply_voi(values.astype(np.int64), dataset) / most, np.float64)
    values = np.asarray(values, np.float64)
    if dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        center, width = _first(dataset.WindowCenter), _first(dataset.WindowWidth)
        return _windowed(values, center, width, str(dataset.get("VOILUTFunction") or "LINEAR"))
    padding = dataset.get("PixelPaddingValue")
    shown = values if padding is None or (stored == padding).all() else values[stored != padding]
    low, high = shown.min(), shown.max()
    if low == high:
        return np.zeros(values.shape)
    return np.asarray(np.clip((values - low) / (high - low), 0.0, 1.0))


def _windowed(values: NDArray[np.float64], center: float, width: float, function: str) -> NDArray[np.float64]:
    """DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    if function == "SIGMOID":
        shares: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-4.0 * (values - center) / width))
        return shares
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0.0, 1.0)
    if width <= 1.0:  # a threshold
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def _first(value: Any) -> float:
    """Of several windows the first, which is the one that viewers open with."""
    return float(value) if isinstance(value, int | float | str) else float(value[0])
