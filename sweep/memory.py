"""How much memory a trial takes, estimated from its layers before anything is built."""

from collections.abc import Mapping, Sequence

from cxr_models.backbones import BACKBONES
from cxr_models.cuts import BYTES_PER_ELEMENT, activation_bytes
from cxr_models.freezing import parse_strategy
from cxr_models.layer_table import LayerTable
from cxr_models.network import head_parameters
from cxr_models.trial import TrialConfig
from sweep.machine import TrialMemory

MIB = 1024**2
# A process with TensorFlow, Keras and a warm network, and what it holds of images or features at once.
PROCESS_BYTES = 1200 * MIB
# The same on a GPU: its context, its libraries' work space, and the inputs of some steps.
CONTEXT_BYTES = 1500 * MIB
# What CUDA's libraries take of the machine's memory beside the process.
CUDA_BYTES = 2500 * MIB
# A weight, its gradient, two moments of the optimizer, and its best value so far.
COPIES = 5


def trial_memory(
    configs: Sequence[TrialConfig], tables: Mapping[tuple[str, int], LayerTable], classes: int, batch_size: int
) -> TrialMemory:
    """The memory of the largest trial of a space.

    Args:
        configs: every network of the space.
        tables: (backbone, image side) -> its layers.
        classes: of the data.
        batch_size: the largest of the space.
    """
    weights = [COPIES * BYTES_PER_ELEMENT * _parameters(config, tables, classes) for config in configs]
    activations = [_activations(config, tables, batch_size) for config in configs]
    return memory_of(weights, activations)


def memory_of(weights: Sequence[int], activations: Sequence[int]) -> TrialMemory:
    """The memory of the largest trial, from the bytes of each network's weights, in all their copies, and outputs."""
    largest = max(map(sum, zip(weights, activations, strict=True)))
    return TrialMemory(PROCESS_BYTES + largest, CONTEXT_BYTES + largest, PROCESS_BYTES + CUDA_BYTES + max(weights))


def _parameters(config: TrialConfig, tables: Mapping[tuple[str, int], LayerTable], classes: int) -> int:
    table = tables[config.backbone, config.image_side]
    return table.parameters + head_parameters(config, table, classes)


def _activations(config: TrialConfig, tables: Mapping[tuple[str, int], LayerTable], batch_size: int) -> int:
    row, table = BACKBONES[config.backbone], tables[config.backbone, config.image_side]
    return max(activation_bytes(phase, row, table, batch_size) for phase in parse_strategy(config.freeze).phases)
