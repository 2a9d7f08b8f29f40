"""What is said of the best model stands beside the model itself."""

import json

from sweep.champion import champion_notes, note_champion
from sweep.record import RunFolder
from tests.test_tracking import NOTED


def test_the_model_s_config_has_the_notes_and_all_it_had(tmp_path):
    folder = RunFolder.create(tmp_path, "noted", exactly=True)
    note_champion(folder, NOTED)
    assert not folder.best_config.exists(), "there is no model to speak of"
    folder.best_config.parent.mkdir()
    folder.best_config.write_text(json.dumps({"trial_id": "one", "classes": ["a", "b"]}))
    note_champion(folder, NOTED)
    assert json.loads(folder.best_config.read_text()) == {
        "trial_id": "one",
        "classes": ["a", "b"],
        "doctor": "still_improving;constant_predictor",
        "audit": "earlier_model_saw_test;blank_images",
        "verdict": "`all` is the only strategy.",
    }


def test_of_a_sound_or_unfinished_sweep_nothing_is_said():
    notes = [{"name": "exact_duplicates", "severity": "note"}]
    sound = {"best": {"trial_id": "one", "doctor": []}, "strategies": [{"trial_id": "one"}], "audit": notes}
    assert champion_notes(sound) == champion_notes({}) == champion_notes({"verdict": None}) == {}
