"""What a trial is expected to take: more for what is deeper, larger or comes in larger batches."""

from dataclasses import replace

import pytest

from cxr_models.layer_table import layer_tables
from cxr_models.trial import TrialConfig
from sweep.memory import CONTEXT_BYTES, PROCESS_BYTES, trial_memory

SMALL = TrialConfig("mobilenet_v2_0.35", image_side=96)
MIB = 1024**2


@pytest.fixture(scope="module")
def need(cache_dir):
    tables = layer_tables([("mobilenet_v2_0.35", 96), ("mobilenet_v2_0.35", 224), ("vanilla_cnn", 96)], cache_dir)

    def bytes_of(*configs: TrialConfig, batch_size: int = 16) -> int:
        return trial_memory(configs, tables, 4, batch_size).process_bytes - PROCESS_BYTES

    return bytes_of


def test_it_grows_with_what_trains(need):
    head, stage, everything = (need(replace(SMALL, freeze=freeze)) for freeze in ("all", "stages:1", "none"))
    assert head < stage < everything
    assert need(replace(SMALL, freeze="all>none")) == everything


def test_it_grows_with_batch_side_and_head(need):
    one = need(replace(SMALL, freeze="none"))
    assert need(replace(SMALL, freeze="none"), batch_size=32) > 1.8 * one - 20 * MIB
    assert need(replace(SMALL, freeze="none", image_side=224)) > 4 * one - 20 * MIB
    wide = need(replace(SMALL, pooling="flatten", hidden_units=(1024, 512)))
    assert wide - need(SMALL) == pytest.approx(5 * 4 * (3 * 3 * 1280 + 1 - 4 + 512) * 1024, rel=0.01)


def test_the_largest_counts(need):
    deep = replace(SMALL, freeze="none")
    assert need(SMALL, deep) == need(deep, SMALL) == need(deep)


def test_a_gpu_holds_the_same_beside_its_context(cache_dir):
    tables = layer_tables([("mobilenet_v2_0.35", 96)], cache_dir)
    found = trial_memory([SMALL], tables, 4, 16)
    assert found.on_gpu_bytes - CONTEXT_BYTES == found.process_bytes - PROCESS_BYTES > 0


def test_of_the_machine_it_takes_no_activations_then(cache_dir):
    tables = layer_tables([("mobilenet_v2_0.35", 96)], cache_dir)
    small, large = (trial_memory([replace(SMALL, freeze="none")], tables, 4, size) for size in (16, 64))
    assert large.on_gpu_bytes > small.on_gpu_bytes + 100 * MIB
    assert large.beside_gpu_bytes == small.beside_gpu_bytes > PROCESS_BYTES
