"""Pictures of every kind that is read, and tables beside them, broken in ways that follow from a seed."""

# ruff: noqa: E501 - tables of mistakes, one kind a line

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import openpyxl
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless

SIDE = 48
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm", ".dicom")
WORDS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 30_000, 9_999, 16)
CSV = "path,label,patient,source,split,mask\n" + "".join(
    f"{'ab'[index % 2]}/{index}.png,{'ab'[index % 2]},p{index // 2},s,,\n" for index in range(8)
)

Kind = Callable[[random.Random, bytes], bytes]


def pictures() -> dict[str, bytes]:
    """One whole file of every kind: format and variant, with the suffix it has by right -> bytes."""
    values = np.random.default_rng(0).integers(0, 160, (SIDE, SIDE))
    values[: SIDE // 2, : SIDE // 2] += 90
    grey, deep = Image.fromarray(values.astype(np.uint8)), Image.fromarray((values * 257).astype(np.uint16))
    colour = grey.convert("RGB")
    found = {
        "png.png": _saved(grey, "PNG"),
        "png16.png": _saved(deep, "PNG"),
        "palette.png": _saved(colour.quantize(32), "PNG"),
        "alpha.png": _saved(colour.convert("RGBA"), "PNG"),
        "bits.png": _saved(grey.convert("1"), "PNG"),
        "adam7.png": _interlaced(values.astype(np.uint8)),
        "baseline.jpg": _saved(grey, "JPEG"),
        "progressive.jpg": _saved(colour, "JPEG", progressive=True),
        "cmyk.jpg": _saved(colour.convert("CMYK"), "JPEG"),
        "exif.jpg": _saved(grey, "JPEG", exif=_turned()),
        "plain.tif": _saved(grey, "TIFF"),
        "lzw.tiff": _saved(colour, "TIFF", compression="tiff_lzw"),
        "deflate16.tif": _saved(deep, "TIFF", compression="tiff_adobe_deflate"),
        "packbits.tif": _saved(grey, "TIFF", compression="packbits"),
        "jpeg.tif": _saved(colour, "TIFF", compression="jpeg"),
        "g4.tif": _saved(grey.convert("1"), "TIFF", compression="group4"),
        "pages.tif": _saved(grey, "TIFF", save_all=True, append_images=[grey]),
        "bmp.bmp": _saved(colour, "BMP"),
        "palette.bmp": _saved(colour.quantize(16), "BMP"),
        "animated.gif": _saved(grey, "GIF", save_all=True, append_images=[grey.rotate(90), grey.rotate(180)]),
        "webp.webp": _saved(colour, "WEBP"),
        "lossless.webp": _saved(colour, "WEBP", lossless=True),
        "animated.webp": _saved(colour, "WEBP", save_all=True, append_images=[colour.rotate(90)]),
        "plain.dcm": _dicom(values, ExplicitVRLittleEndian),
        "deflated.dcm": _dicom(values, DeflatedExplicitVRLittleEndian),
        "rle.dcm": _dicom(values, RLELossless),
        "windowed.dcm": _dicom(values, ExplicitVRLittleEndian, WindowCenter=80, WindowWidth=100),
        "rescaled.dcm": _dicom(values, ExplicitVRLittleEndian, RescaleSlope=2, RescaleIntercept=-100),
        "sigmoid.dcm": _dicom(
            values, ExplicitVRLittleEndian, WindowCenter=80, WindowWidth=100, VOILUTFunction="SIGMOID"
        ),
        "inverted.dcm": _dicom(values, ExplicitVRLittleEndian, PhotometricInterpretation="MONOCHROME1"),
    }  # fmt: skip
    return found


def broken_picture(chance: random.Random, whole: Mapping[str, bytes]) -> tuple[str, bytes, str]:
    """A file's suffix, its bytes, and what was done to which kind."""
    name = chance.choice(sorted(whole))
    data, suffix, kinds = whole[name], "." + name.rsplit(".", 1)[1], []
    if chance.random() < 0.1:
        kind, make = chance.choice(list(_MADE.items()))
        return chance.choice(SUFFIXES), make(chance, data), kind
    for _ in range(chance.choice((1, 1, 2, 4))):
        kind, change = chance.choice(list(_CHANGES.items()))
        if data:
            data = change(chance, data)
            kinds.append(kind)
    if suffix not in SUFFIXES or chance.random() < 0.1:
        suffix = chance.choice(SUFFIXES)
    return suffix, data, f"{name}: {'+'.join(kinds)}"


def broken_table(chance: random.Random) -> tuple[bytes, str]:
    """A CSV file of `CSV`'s images, with mistakes."""
    kind, change = chance.choice(list(_TABLE_CHANGES.items()))
    data = change(chance, CSV.encode())
    if chance.random() < 0.3:
        other, again = chance.choice(list(_TABLE_CHANGES.items()))
        kind, data = f"{kind}+{other}", again(chance, data or b"p")
    return data, f"csv: {kind}"


def broken_sheet(chance: random.Random) -> tuple[bytes, str]:
    """A spreadsheet as the COVID-19 Radiography Database has it, with mistakes."""
    if chance.random() < 0.5:
        kind, change = chance.choice(list(_CHANGES.items()))
        return change(chance, _sheet()), f"xlsx: {kind}"
    part = chance.choice(("xl/worksheets/sheet1.xml", "xl/workbook.xml", "[Content_Types].xml", "xl/sharedStrings.xml"))
    kind, change = chance.choice(list(_SHEET_CHANGES.items()))
    return _with_part(_sheet(), part, lambda text: change(chance, text)), f"xlsx {part}: {kind}"


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "upright"
    return exif


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """With its length and its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _interlaced(values: np.ndarray) -> bytes:
    """An 8-bit grey PNG in Adam7 order, which Pillow reads and does not write."""
    rows = b""
    for left, top, across, down in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)):  # fmt: skip
        rows += b"".join(b"\0" + row.tobytes() for row in values[top::down, left::across])
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 1)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def _dicom(values: np.ndarray, syntax: str, **tags: object) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    file = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID = file.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1"
    file.PatientID, file.Rows, file.Columns, file.SamplesPerPixel = "P1", SIDE, SIDE, 1
    file.PhotometricInterpretation, file.PixelRepresentation = "MONOCHROME2", 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 12, 11
    file.PixelData = (values * 16).astype(np.uint16).tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    if syntax == RLELossless:
        file.compress(RLELossless)
    written = io.BytesIO()
    file.save_as(written, enforce_file_format=True)
    return written.getvalue()


def _flipped(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 3, 30, 300))):
        # Half of the flips hit the headers, where the readers decide.
        most = len(changed) if chance.random() < 0.5 else min(200, len(changed))
        changed[chance.randrange(most)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _word(chance: random.Random, data: bytes) -> bytes:
    """A number overwritten, in either byte order."""
    changed = bytearray(data)
    size = chance.choice((2, 4))
    place = chance.randrange(max(1, min(len(data), chance.choice((100, 400, len(data)))) - size))
    word = (chance.choice(WORDS) & (0xFFFF if size == 2 else 0xFFFFFFFF)).to_bytes(
        size, chance.choice(("big", "little"))
    )
    changed[place : place + size] = word
    return bytes(changed)


def _sized(chance: random.Random, data: bytes) -> bytes:
    """An absurd width and height where the format keeps them; the checksum of a PNG is made to fit."""
    wide, high = (chance.choice((0, 1, 5, 15, 4_000, 9_999, 30_000, 65_535)) for _ in range(2))
    changed = bytearray(data)
    if data[:4] == b"\x89PNG" and len(data) > 33:
        changed[16:24] = struct.pack(">II", wide, high)
        changed[29:33] = struct.pack(">I", zlib.crc32(bytes(changed[12:29])))
    elif data[:2] == b"BM":
        changed[18:26] = struct.pack("<ii", wide, chance.choice((1, -1)) * high)
    elif data[:3] == b"GIF":
        changed[6:10] = struct.pack("<HH", wide, high)
    elif data[:2] == b"\xff\xd8":
        place = next((at for at in range(len(data) - 9) if data[at] == 0xFF and data[at + 1] in (0xC0, 0xC2)), None)
        if place:
            changed[place + 5 : place + 9] = struct.pack(">HH", high, wide)
    elif data[128:132] == b"DICM":
        for tag, value in ((b"\x28\x00\x10\x00US\x02\x00", high), (b"\x28\x00\x11\x00US\x02\x00", wide)):
            if (place := data.find(tag)) > 0:
                changed[place + 8 : place + 10] = struct.pack("<H", value)
    else:
        for tag in (b"\x00\x01\x04\x00\x01\x00\x00\x00", b"\x01\x01\x04\x00\x01\x00\x00\x00"):
            if (place := data.find(tag)) > 0:
                changed[place + 8 : place + 12] = struct.pack("<I", chance.choice((wide, high)))
    return bytes(changed)


def _moved(chance: random.Random, data: bytes) -> bytes:
    """Two pieces exchanged; whole chunks where it is a PNG."""
    pieces = png_pieces(data)
    if len(pieces) > 2:
        one, two = (chance.randrange(1, len(pieces)) for _ in range(2))
        pieces[one], pieces[two] = pieces[two], pieces[one]
        return b"".join(pieces)
    size, one, two = chance.choice((4, 32, 256)), chance.randrange(len(data)), chance.randrange(len(data))
    first, second = sorted((one, two))
    if second - first < size:
        return data
    middle = data[first + size : second]
    return data[:first] + data[second : second + size] + middle + data[first : first + size] + data[second + size :]


def _doubled(chance: random.Random, data: bytes) -> bytes:
    pieces = png_pieces(data)
    if len(pieces) > 2:
        place = chance.randrange(1, len(pieces))
        return b"".join([*pieces[:place], pieces[place] * chance.choice((2, 50)), *pieces[place + 1 :]])
    start = chance.randrange(len(data))
    stop = start + chance.choice((4, 64, 1000))
    return data[:stop] + data[start:stop] * chance.choice((1, 20)) + data[stop:]


def png_pieces(data: bytes) -> list[bytes]:
    """The signature and every chunk; a list of one for what is no PNG."""
    if data[:4] != b"\x89PNG":
        return [data]
    pieces, place = [data[:8]], 8
    while place + 12 <= len(data):
        length = struct.unpack(">I", data[place : place + 4])[0]
        pieces.append(data[place : place + 12 + length])
        place += 12 + length
    return [*pieces, data[place:]] if data[place:] else pieces


def _removed(chance: random.Random, data: bytes) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.choice((1, 4, 64, 1000)) :]


_CHANGES: dict[str, Kind] = {
    "flipped": _flipped,
    "word": _word,
    "sized": _sized,
    "moved": _moved,
    "doubled": _doubled,
    "removed": _removed,
    "cut": lambda chance, data: data[: chance.randrange(len(data))],
    "inserted": lambda chance, data: data[: (place := chance.randrange(len(data)))] + chance.randbytes(chance.choice((1, 4, 99))) + data[place:],
    "appended": lambda chance, data: data + chance.choice((b"\0" * 5000, chance.randbytes(3000), data)),
    "zeroed": lambda chance, data: data[: (place := chance.randrange(len(data)))] + b"\0" * (len(data) - place),
}  # fmt: skip


def _png_bomb(chance: random.Random, data: bytes) -> bytes:
    """Hundreds of megapixels of nothing in a small file."""
    wide, high, kind = chance.choice(((30_000, 30_000, 0), (9_999, 9_999, 0), (9_999, 9_999, 6), (20_000, 4_900, 2)))
    row = zlib.compressobj(9)
    packed = row.compress(b"\0" * 5_000_000) + row.flush()
    header = struct.pack(">IIBBBBB", wide, high, 8, kind, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def _text_bomb(chance: random.Random, data: bytes) -> bytes:
    """Text chunks that unpack to far more than they take, in front of a small picture."""
    packed = zlib.compress(b"\0" * 20_000_000, 9)
    bodies = {b"zTXt": b"a\0\0" + packed, b"iTXt": b"a\0\1\0\0\0" + packed, b"iCCP": b"a\0\0" + packed}
    kind = chance.choice(sorted(bodies))
    whole = png_pieces(_interlaced(np.zeros((SIDE, SIDE), np.uint8)))
    return b"".join([whole[0], whole[1], png_chunk(kind, bodies[kind]) * chance.choice((1, 40)), *whole[2:]])


def _archive(chance: random.Random, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", b"\0" * 5_000_000)
    return file.getvalue()


def _deflate_bomb(chance: random.Random, data: bytes) -> bytes:
    """A deflated DICOM file that unpacks to gigabytes."""
    whole = _dicom(np.zeros((SIDE, SIDE), np.int64), DeflatedExplicitVRLittleEndian)
    length = int.from_bytes(whole[140:144], "little")
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(b"\0" * 10_000_000) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return whole[: 144 + length] + block * 300 + squeeze.flush()


def _one_pixel(chance: random.Random, data: bytes) -> bytes:
    return _saved(Image.new("L", chance.choice(((1, 1), (1, 500), (15, 15), (16, 90)))), "PNG")


def _other(chance: random.Random, data: bytes) -> bytes:
    """What is none of the formats: some have readers in Pillow that must never be tried."""
    return chance.choice((b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", b"%PDF-1.4\n", b"P5 99 99 255\n", b"<svg/>", b"qoif", b"", b"\n", b"\0" * 9999, b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF", b"\0" * 128 + b"DICM"))  # fmt: skip


_MADE: dict[str, Kind] = {
    "png bomb": _png_bomb,
    "text bomb": _text_bomb,
    "archive": _archive,
    "deflate bomb": _deflate_bomb,
    "one pixel": _one_pixel,
    "other": _other,
    "random": lambda chance, data: chance.randbytes(chance.choice((1, 30, 5000))),
}


def _csv_line(chance: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    lines[chance.randrange(len(lines))] = chance.choice(
        (
            *(b"", b",", b"a/0.png", b"a/0.png,a,,,dev,", b"\0,\0", b'"unfinished', b"x" * 200_000 + b",a", b"," * 50_000),
            *(b"a\0b.png,a", b"\xff\xfe.png,a", b"/dev/zero,a", b"../../../../etc/passwd,a", b"~/x.png,a", b"a/" * 3000 + b",a"),
            *(b"a/0.png,b,,,,/dev/zero", b"a/0.png,a,,,," + b"m" * 5000, b"a/2.png,a,,,,a\0b", b"=1+1,a", b".,a", b"a,a", b"path,label"),
        )
    )  # fmt: skip
    return b"\n".join(lines)


_TABLE_CHANGES: dict[str, Kind] = {
    "line": _csv_line,
    "line again": _csv_line,
    "flipped": _flipped,
    "cut": lambda chance, data: data[: chance.randrange(len(data))],
    "separator": lambda chance, data: data.replace(b",", chance.choice((b";", b"\t", b"|", b" ", b",,", b'",'))),
    "line ends": lambda chance, data: data.replace(b"\n", chance.choice((b"\r", b"\r\n", b"\n\n", b"\0\n", b""))),
    "encoding": lambda chance, data: data.decode(errors="replace").encode(chance.choice(("utf-16", "utf-32", "utf-8-sig"))),
    "column": lambda chance, data: data.replace(
        chance.choice((b"path", b"label", b"patient", b"split", b"mask")),
        chance.choice((b"", b"x", b"path", b"label", b"id", b"patient", b"pathx", b"spilt", b"p" * 30_000)),
        1,
    ),
    "doubled": lambda chance, data: data * 2,
    "removed": _removed,
    "columns": lambda chance, data: data.replace(b"path,", b"path," + b"spilt2," * chance.choice((3, 5000)), 1),
}  # fmt: skip


def _sheet() -> bytes:
    book = openpyxl.Workbook()
    book.active.append(["FILE NAME", "FORMAT", "SIZE", "URL"])
    for index in range(1, 6):
        book.active.append([f"a-{index}", "PNG", "256*256", "https://hospital.org/"])
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def _with_part(data: bytes, part: str, change: Callable[[bytes], bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name == part else old.read(name))
    return file.getvalue()


LAUGHS = b'<!DOCTYPE l [<!ENTITY a "ha">' + b"".join(
    b'<!ENTITY %c "%s">' % (98 + index, b"&%c;" % (97 + index) * 10) for index in range(9)
) + b"]>"  # fmt: skip

_SHEET_CHANGES: dict[str, Kind] = {
    "flipped": _flipped,
    "cut": lambda chance, data: data[: chance.randrange(len(data))],
    "empty": lambda chance, data: b"",
    "last row": lambda chance, data: data.replace(b'<row r="6"', b'<row r="1048576"').replace(b'r="A6"', b'r="A1048576"'),
    "dimension": lambda chance, data: data.replace(b"A1:D6", b"A1:XFD1048576"),
    "both": lambda chance, data: data.replace(b"A1:D6", b"A1:XFD1048576").replace(b'<row r="6"', b'<row r="1048576"'),
    "bomb": lambda chance, data: data + b" " * 110_000_000,
    "laughs": lambda chance, data: LAUGHS + data.replace(b"</", b"&j;</", 1),
    "header": lambda chance, data: data.replace(b"FILE NAME", chance.choice((b"FILE", b"", b"URL", b"FILE\0NAME"))),
}  # fmt: skip
