"""Learning rates within a phase."""

import numpy as np
import pytest

from cxr_models.schedules import EXPONENTIAL_END, PLATEAU_PATIENCE, Schedule
from cxr_models.trial import CHOICES


def rates(kind: str, *, warmup: float = 0.0, epochs: int = 10, steps: int = 7, losses=()) -> np.ndarray:
    """Of all steps of a phase with a rate of 0.1, whose epochs end with the given losses."""
    schedule = Schedule(kind, 0.1, steps=steps, epochs=epochs, warmup=warmup)
    found = []
    for epoch in range(epochs):
        found.append(schedule.next_epoch())
        schedule.observe(losses[epoch] if losses else 1.0 - epoch / epochs)
    return np.concatenate(found)


@pytest.mark.parametrize("kind", CHOICES["schedule"])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_every_schedule_gives_a_finite_rate_for_every_step_and_never_more_than_the_rate_itself(kind, warmup):
    found = rates(kind, warmup=warmup)
    assert found.shape == (70,)
    assert found.dtype == np.float32
    assert (found > 0).all()
    assert found.max() == pytest.approx(0.1)


def test_constant():
    assert set(rates("constant")) == {np.float32(0.1)}


def test_cosine_falls_along_half_a_cosine():
    found = rates("cosine")
    np.testing.assert_allclose(found, 0.05 * (1 + np.cos(np.pi * np.arange(70) / 70)), rtol=1e-6)


def test_exponential_falls_by_the_same_share_in_every_step():
    found = rates("exponential").astype(float)
    np.testing.assert_allclose(found[1:] / found[:-1], EXPONENTIAL_END ** (1 / 70), rtol=1e-5)
    assert found[-1] == pytest.approx(0.1 * EXPONENTIAL_END, rel=0.1)


def test_the_warm_up_rises_evenly_before_the_schedule_begins():
    found = rates("cosine", warmup=0.2).astype(float)
    np.testing.assert_allclose(np.diff(found[:14]), 0.1 / 15, rtol=1e-4)
    assert found[14] == pytest.approx(0.1)
    assert (np.diff(found[14:]) < 0).all()


def test_plateau_halves_after_epochs_without_a_new_minimum():
    assert PLATEAU_PATIENCE == 2
    found = rates("plateau", epochs=9, steps=1, losses=[1.0, 0.9, 0.95, 0.9, 0.8, 0.8, 0.9, 0.7, 0.6])
    # Halved after the 4th epoch, which equals the minimum but is none, and after the 7th.
    np.testing.assert_allclose(found, np.array([8, 8, 8, 8, 4, 4, 4, 2, 2]) / 80, rtol=1e-6)


@pytest.mark.parametrize("kind", CHOICES["schedule"])
def test_behind_epochs_that_were_trained_before_the_rates_are_the_same(kind):
    losses = [1.0, 0.9, 0.95, 0.9, 0.8, 0.8, 0.9, 0.7, 0.6]
    whole = rates(kind, warmup=0.2, epochs=9, losses=losses)
    for past in range(9):
        schedule = Schedule(kind, 0.1, steps=7, epochs=9, warmup=0.2)
        schedule.follow(losses[:past])
        for epoch in range(past, 9):
            np.testing.assert_array_equal(schedule.next_epoch(), whole[7 * epoch : 7 * (epoch + 1)])
            schedule.observe(losses[epoch])


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"expected a schedule of trial.CHOICES, but got 'linear'"):
        rates("linear")
