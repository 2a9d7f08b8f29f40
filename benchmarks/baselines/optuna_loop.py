"""Baseline: an Optuna study that builds and fits the listed trials one after the other with all cores.

As https://optuna.readthedocs.io and its Keras example show it: `enqueue_trial`, then `optimize` in one process, with
Keras' session cleared before each trial.

Run:  python benchmarks/baselines/optuna_loop.py --data DIR --trials FILE.json --weights FILE --out FILE.json
Cost: minutes a trial; use few trials and epochs.
"""

import time

import keras
import optuna
from model import FIRST_TRAINED, EpochTimes, as_run, build_model, image_datasets
from protocol import Arguments, Ran, read_arguments, write_results


def fit(arguments: Arguments, trial: optuna.Trial) -> Ran:
    """Train one trial; what it took."""
    began = time.time()
    keras.backend.clear_session()
    listed = arguments.trials[trial.number]
    freeze = trial.suggest_categorical("freeze", ["all", *FIRST_TRAINED, "none"])
    learning_rate = trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)
    dropout = trial.suggest_float("dropout", 0.0, 0.5)
    batch_size = trial.suggest_categorical("batch_size", [16, 32])
    keras.utils.set_random_seed(listed.seed)
    train_images, val_images, classes = image_datasets(
        arguments.data, side=arguments.side, batch_size=batch_size, seed=listed.seed
    )
    model = build_model(
        freeze=freeze,
        learning_rate=learning_rate,
        dropout=dropout,
        side=arguments.side,
        classes=classes,
        weights=arguments.weights,
    )
    times = EpochTimes()
    history = model.fit(train_images, validation_data=val_images, epochs=listed.epochs, verbose=0, callbacks=[times])
    return as_run(listed, began, times, model, history)


def main() -> None:
    """Run every trial."""
    arguments = read_arguments("Optuna loop + Keras")
    ran: list[Ran] = []

    def objective(trial: optuna.Trial) -> float:
        ran.append(fit(arguments, trial))
        return ran[-1].val_accuracy

    study = optuna.create_study(direction="maximize")
    for trial in arguments.trials:
        names = ("freeze", "learning_rate", "dropout", "batch_size")
        study.enqueue_trial({name: getattr(trial, name) for name in names})
    study.optimize(objective, n_trials=len(arguments.trials))
    write_results(arguments, ran, at_once=1)


if __name__ == "__main__":
    main()
