"""Tiny data sets, one function for each layout that is found by itself; the same arguments give the same files.

In every one, the class of an image can be seen: a bright square lies where the class's place says.
"""

import csv
import zlib
from pathlib import Path

import numpy as np
import openpyxl
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

SIDE = 48
RADIOGRAPHY = ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")
XRAY_STORAGE = "1.2.840.10008.5.1.4.1.1.1.1"


def xray(name: str, place: int, side: int = SIDE) -> NDArray[np.float64]:
    """(side, side) values from 0 to 1: noise that follows from the name, with a bright square in one of four places."""
    values = np.random.default_rng(zlib.crc32(name.encode())).random((side, side)) * 0.4
    half, (top, left) = side // 2, divmod(place % 4, 2)
    values[top * half : (top + 1) * half, left * half : (left + 1) * half] += 0.5
    return values


def save(path: Path, place: int, side: int = SIDE) -> None:
    """An 8-bit grey image of a class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rint(xray(path.name, place, side) * 255).astype(np.uint8)).save(path)


def save_mask(path: Path, side: int = SIDE) -> None:
    """A lung mask: two white columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((side, side), np.uint8)
    mask[side // 8 : -side // 8, side // 8 : side // 3] = 255
    mask[side // 8 : -side // 8, -side // 3 : -side // 8] = 255
    Image.fromarray(mask).save(path)


def save_dicom(
    path: Path,
    values: NDArray[np.float64],
    *,
    bits: int = 12,
    meaning: str = "MONOCHROME2",
    patient: str = "",
    window: bool = False,
) -> None:
    """Values from 0 (black) to 1 (white) as a DICOM file.

    Args:
        path: where.
        values: (rows, columns).
        bits: stored; more than 8 are allocated as 16.
        meaning: photometric interpretation; MONOCHROME1 stores white as 0.
        patient: PatientID.
        window: whether the file has one, from a quarter to three quarters of the range.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = XRAY_STORAGE
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), Dataset(), file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = XRAY_STORAGE, meta.MediaStorageSOPInstanceUID
    if patient:
        dataset.PatientID = patient
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, meaning
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 if bits == 8 else 16, bits, bits - 1
    dataset.PixelRepresentation = 0
    most = 2**bits - 1
    if window:
        dataset.WindowCenter, dataset.WindowWidth = (most + 1) / 2, most / 2 + 1  # as PS3.3 C.11.2.1.2 counts
    shown = 1.0 - values if meaning == "MONOCHROME1" else values
    dataset.PixelData = np.rint(shown * most).astype(np.uint8 if bits == 8 else np.uint16).tobytes()
    dataset.save_as(path, enforce_file_format=True)


def class_folders(folder: Path, images: int = 8) -> Path:
    """`<Class>/*.png`, three classes."""
    for place, name in enumerate(("Covid-19", "No_findings", "Pneumonia")):
        for index in range(images):
            save(folder / name / f"{name}-{index}.png", place)
    return folder


def covid_radiography(folder: Path, images: int = 8) -> Path:
    """The COVID-19 Radiography Database as shipped, one level down; `images` of each of four classes."""
    root = folder / "COVID-19_Radiography_Dataset"
    for place, name in enumerate(RADIOGRAPHY):
        book = openpyxl.Workbook()
        book.active.append(["FILE NAME", "FORMAT", "SIZE", "URL"])
        for index in range(1, images + 1):
            save(root / name / "images" / f"{name}-{index}.png", place)
            save_mask(root / name / "masks" / f"{name}-{index}.png")
            # The spreadsheets write NORMAL-1 for Normal-1.png, and leave blanks behind addresses.
            book.active.append([f"{name.upper()}-{index}", "PNG", "256*256", f"https://hospital-{index % 2}.org/ "])
        book.save(root / f"{name}.metadata.xlsx")
    (root / "README.md.txt").write_text("about the data")
    return folder


def kermany(folder: Path, images: int = 200) -> Path:
    """Chest X-Ray Images (Pneumonia) as shipped, in `chest_xray/` with a second copy and what macOS adds.

    There are `images` of each class in train, 8 in val, and a tenth in test; a patient has up to three.
    """
    root = folder / "chest_xray"
    for part, first, count in (("test", 1, images // 10), ("train", 1000, images), ("val", 5000, 8)):
        for index in range(count):
            child, picture = first + index // 3, index % 3 + 1
            kind = "virus" if child % 2 else "bacteria"
            prefix = "NORMAL2-IM" if child % 2 else "IM"
            normal = f"{prefix}-{child:04}-0001{f'-{picture:04}' if picture > 1 else ''}.jpeg"
            save(root / part / "NORMAL" / normal, 0, side=32)
            save(root / part / "PNEUMONIA" / f"person{child}_{kind}_{index + 1}.jpeg", 3, side=32)
    save(root / "chest_xray" / "train" / "NORMAL" / "IM-1000-0001.jpeg", 0, side=32)
    (root / "__MACOSX" / "train" / "NORMAL").mkdir(parents=True)
    (root / "__MACOSX" / "train" / "NORMAL" / "._IM-1000-0001.jpeg").write_bytes(b"\0")
    (root / "train" / ".DS_Store").write_bytes(b"\0")
    return folder


def nested(folder: Path, images: int = 8) -> Path:
    """`<Class>/<Class>/*.png`, two classes."""
    for place, name in enumerate(("COVID", "NORMAL")):
        for index in range(images):
            save(folder / name / name / f"{name}-{index}.png", place)
    return folder


def csv_file(folder: Path, images: int = 8) -> Path:
    """A CSV file, separated by semicolons, that lists images of two classes with patient and source."""
    rows = []
    for place, name in enumerate(("flu", "healthy")):
        for index in range(images):
            save(folder / "files" / f"{name}{index}.png", place)
            rows.append((f"files/{name}{index}.png", name, f"{name}{index // 2}", f"site {index % 2}"))
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("path", "label", "patient", "source"), *rows])
    return folder / "list.csv"


def dicom(folder: Path, images: int = 12) -> Path:
    """A tree of DICOM files, patient by patient, with a CSV file of labels as the RSNA challenge has it.

    They have 8, 12 and 16 bits in turn, MONOCHROME1 and MONOCHROME2, with and without a window; a patient has two.
    """
    rows = []
    for index in range(images):
        label, patient, name = index // 2 % 2, f"P{index // 2:03}", f"x{index:03}"
        save_dicom(
            folder / "files" / patient / f"{name}.dcm",
            xray(name, 3 * label),
            bits=(8, 12, 16)[index % 3],
            meaning=f"MONOCHROME{1 + index % 2}",
            patient=patient,
            window=index % 4 == 0,
        )
        rows += [(name, label)] * (1 + label)  # a line for each box around an opacity
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("patientId", "Target"), *rows])
    return folder


def images_and_masks(folder: Path, images: int = 8) -> Path:
    """`images/*.jpg` and `masks/*.png` of the same names, without classes."""
    for index in range(images):
        save(folder / "images" / f"chest-{index}.jpg", index)
        save_mask(folder / "masks" / f"chest-{index}.png")
    return folder
