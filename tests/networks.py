"""What tests of networks share."""

from pathlib import Path

import h5py
import keras
from keras.src.legacy.saving import legacy_h5_format


def save_as_keras_ships(model: keras.Model, path: Path) -> None:
    """Write weights in the older layout of the files of ImageNet weights."""
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
