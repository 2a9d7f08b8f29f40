"""What a plan holds of a segmentation: the images that have a mask, and what a U-Net takes. Needs no Keras."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cxr_models import unet
from cxr_models.cuts import BYTES_PER_ELEMENT
from cxr_models.dataset import DataError, Manifest
from cxr_models.storage import size_text
from cxr_models.trial import TrialConfig
from sweep.machine import TrialMemory
from sweep.memory import COPIES, memory_of


@dataclass(frozen=True)
class UNetRow:
    """A U-Net of the space.

    Attributes:
        activation_bytes: of a training step with the largest batch of the space, estimated.
    """

    filters: int
    depth: int
    image_side: int
    parameters: int
    activation_bytes: int

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as the plan shows it."""
        numbers = f"{self.parameters:,}", size_text(self.activation_bytes)
        return str(self.filters), str(self.depth), f"{self.image_side} px", *numbers


def with_masks(manifest: Manifest) -> tuple[Manifest, tuple[str, ...]]:
    """The images that have a mask, and a note of how many have none.

    Raises:
        DataError: none has one.
    """
    found = tuple(record for record in manifest.records if record.mask)
    missing = len(manifest.records) - len(found)
    if not found:
        raise DataError(
            f"expected lung masks for task: segment\n  found: {missing} images in {str(manifest.root)!r} and no mask\n"
            "  remedy: put the masks into a folder masks/ beside images/, with the same file names, or name them in "
            "the column mask of a CSV file"
        )
    notes = (f"images without a mask, which are left out: {missing}",) if missing else ()
    return replace(manifest, records=found, unmasked=missing), notes


def unet_rows(configs: Sequence[TrialConfig], channels: int, batch_size: int) -> tuple[UNetRow, ...]:
    """The U-Nets of a space, the smallest first.

    Args:
        configs: every network of the space.
        channels: of the images.
        batch_size: the largest of the space.
    """
    rows = {
        UNetRow(
            filters=config.unet_filters,
            depth=config.unet_depth,
            image_side=config.image_side,
            parameters=unet.count_parameters(config, channels),
            activation_bytes=_activation_bytes(config, channels, batch_size),
        )
        for config in configs
    }
    return tuple(sorted(rows, key=lambda row: (row.parameters, row.activation_bytes)))


def unet_memory(rows: Sequence[UNetRow]) -> TrialMemory:
    """The memory of the largest trial."""
    weights = [COPIES * BYTES_PER_ELEMENT * row.parameters for row in rows]
    return memory_of(weights, [row.activation_bytes for row in rows])


def unet_order(config: TrialConfig) -> tuple[Any, ...]:
    """Sort key by which trials that share a compiled program follow each other, long ones first."""
    work = sum(block.work for block in unet.blocks(config, channels=1))
    shape = config.image_side, config.unet_filters, config.unet_depth
    return (-work, *shape, config.mask_loss, config.optimizer, config.batch_size, -config.epochs)


def _activation_bytes(config: TrialConfig, channels: int, batch_size: int) -> int:
    """Of the layers' outputs, which a step keeps for its gradients, each with its gradient."""
    elements = sum(block.elements for block in unet.blocks(config, channels))
    return 2 * BYTES_PER_ELEMENT * batch_size * elements
