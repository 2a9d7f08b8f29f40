"""Baseline: KerasTuner, whose grid search runs the listed trials one after the other with all cores.

As https://keras.io/guides/keras_tuner/getting_started/ shows it: a `HyperModel` whose `fit` takes the batch size and
the epochs from the trial too. The file is not called `keras_tuner.py`, because it imports the package of that name.

Run:  python benchmarks/baselines/keras_tuner_loop.py --data DIR --trials FILE.json --weights FILE --out FILE.json
Cost: minutes a trial; use few trials and epochs. Needs `pip install 'keras-tuner>=1.4.7'`.
"""

import tempfile
import time
from typing import Any

import keras
import keras_tuner  # type: ignore
from model import EpochTimes, as_run, build_model, image_datasets
from protocol import Arguments, Ran, Trial, read_arguments, write_results


class ListedModel(keras_tuner.HyperModel):  # type: ignore[misc]
    """Builds and fits the trial that the only hyperparameter, its place in the list, names."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self._arguments = arguments
        self._classes = len([folder for folder in (arguments.data / "train").iterdir() if folder.is_dir()])
        self._began = 0.0
        self.ran: list[Ran] = []

    def _trial(self, hp: Any) -> Trial:
        place: int = hp.Choice("trial", list(range(len(self._arguments.trials))))
        return self._arguments.trials[place]

    def build(self, hp: Any) -> keras.Model:
        self._began = time.time()
        trial = self._trial(hp)
        keras.utils.set_random_seed(trial.seed)
        return build_model(
            freeze=trial.freeze,
            learning_rate=trial.learning_rate,
            dropout=trial.dropout,
            side=self._arguments.side,
            classes=self._classes,
            weights=self._arguments.weights,
        )

    def fit(self, hp: Any, model: keras.Model, callbacks: list[Any], **options: Any) -> Any:
        trial = self._trial(hp)
        train_images, val_images, _ = image_datasets(
            self._arguments.data, side=self._arguments.side, batch_size=trial.batch_size, seed=trial.seed
        )
        times = EpochTimes()
        history = model.fit(
            train_images,
            validation_data=val_images,
            epochs=trial.epochs,
            callbacks=[*callbacks, times],
            **options,
        )
        self.ran.append(as_run(trial, self._began, times, model, history))
        return history


def main() -> None:
    """Run every trial."""
    arguments = read_arguments("KerasTuner")
    model = ListedModel(arguments)
    with tempfile.TemporaryDirectory() as folder:
        tuner = keras_tuner.GridSearch(
            model,
            objective="val_accuracy",
            max_trials=len(arguments.trials),
            directory=folder,
            project_name="baseline",
        )
        tuner.search(verbose=2)
    write_results(arguments, model.ran, at_once=1)


if __name__ == "__main__":
    main()
