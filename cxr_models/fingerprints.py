"""What tells pictures apart or shows them to be the same: a digest of the pixels, a thumbnail, hash and correlation."""

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32  # of a thumbnail, in pixels
FREQUENCIES = 8  # of the cosine transform, each way: 64 coefficients, one a bit of the hash
BLUR = 1 / 32  # standard deviation of what details are taken from, as a share of the side
EVEN = 0.1  # of the mean power of details is added to the local one, so that noise in black corners stays small
ROUNDING = 1e-3  # in grey levels: below it nothing is a detail


def pixel_digest(picture: Image.Image, grey: bool) -> str:
    """SHA-256 of an 8-bit picture's size and pixels, the same in every file format, and for grey saved as RGB.

    Args:
        picture: in mode L or RGB.
        grey: whether its colour channels are equal.
    """
    same = picture.convert("L") if grey else picture
    return hashlib.sha256(f"{same.mode} {same.size} ".encode() + same.tobytes()).hexdigest()


def thumbnail(picture: Image.Image) -> str:
    """The picture's luminance averaged down to (`SIDE`, `SIDE`), 8 bits a pixel, in base64."""
    return base64.b64encode(shrunk(picture, SIDE).tobytes()).decode()


def shrunk(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """(side, side) luminance, averaged; the aspect ratio is not kept."""
    return np.asarray(picture.convert("L").resize((side, side), Image.Resampling.BOX))


def read_thumbnails(texts: Sequence[str]) -> NDArray[np.uint8]:
    """(images, `SIDE`, `SIDE`) of what `thumbnail` wrote."""
    pixels = b"".join(map(base64.b64decode, texts))
    return np.frombuffer(pixels, np.uint8).reshape(len(texts), SIDE, SIDE)


def perceptual_hashes(pictures: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(images,) 64 bits each: the signs of the lowest frequencies of (images, side, side) pictures.

    As in pHash (Zauner 2010), a cosine transform; but a bit is a coefficient's sign, not its place beside the median,
    so that any change of brightness or contrast without clipping leaves every bit. The constant part has no say.
    """
    places = (np.arange(pictures.shape[1]) + 0.5) * np.pi / pictures.shape[1]
    waves = np.cos(np.arange(FREQUENCIES)[:, None] * places[None, :]).astype(np.float32)
    coefficients = waves @ pictures.astype(np.float32) @ waves.T
    coefficients[:, 0, 0] = 0.0
    bits = np.packbits(coefficients.reshape(len(pictures), -1) > 0, axis=1)
    return np.ascontiguousarray(bits).view(np.uint64).reshape(-1)


def whole_vectors(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(images, side x side) of mean 0 and length 1: their scalar products are the pictures' correlations."""
    return _unit(pictures.astype(np.float32))


def detail_vectors(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(images, 2 x side x side) of length 1: scalar products compare ribs and vessels, not what all chests share.

    A scalar product is the mean of two correlations: of what is finer than a blur, and of the same with equal contrast
    everywhere, so that the outline of the lungs counts no more than what lies in them.
    """
    from scipy.ndimage import gaussian_filter

    sharp = pictures.astype(np.float32)
    widths = (0.0, *(BLUR * side for side in pictures.shape[1:]))
    fine = sharp - gaussian_filter(sharp, widths)
    power = np.square(fine)
    local = np.sqrt(gaussian_filter(power, widths) + EVEN * power.mean(axis=(1, 2), keepdims=True) + ROUNDING)
    return np.concatenate([_unit(fine), _unit(fine / local)], axis=1) * np.float32(np.sqrt(0.5))


def _unit(pictures: NDArray[Any]) -> NDArray[np.float32]:
    vectors = pictures.reshape(len(pictures), -1)
    vectors = vectors - vectors.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    # A picture of one grey value is like no other: its correlation is 0, not undefined.
    return np.asarray(np.where(lengths > ROUNDING, vectors / np.maximum(lengths, ROUNDING), 0.0), np.float32)
