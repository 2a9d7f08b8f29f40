"""Figures agree with the reports and with scikit-learn, for every image once and for many countings at once."""

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from cxr_models.metrics import (
    FURTHER_BY_CLASS,
    FURTHER_METRICS,
    classification_report,
    confusion_matrix,
    evaluate,
    evaluate_further,
    matrix_report,
    measure,
)
from cxr_models.trial import METRICS

CLASSES = ("COVID", "Lung_Opacity", "Normal", "Viral_Pneumonia")

# Confusion matrices of MobileNetV2 on 2,117 radiographs at three freeze depths, with accuracy and macro f1.
REPORTED = {
    "head only": ([[300, 17, 42, 3], [9, 481, 112, 0], [11, 53, 952, 3], [1, 0, 7, 126]], 0.88, 0.89),
    "last convolution": ([[331, 13, 15, 3], [6, 505, 91, 0], [9, 65, 944, 1], [0, 0, 5, 129]], 0.90, 0.92),
    "last two": ([[338, 8, 14, 2], [14, 512, 76, 0], [50, 98, 869, 2], [1, 1, 6, 126]], 0.87, 0.89),
}


def scores_of(predicted: np.ndarray, classes: int, certainty: float = 0.9) -> np.ndarray:
    """Log-probabilities whose largest is the predicted class."""
    scores = np.full((len(predicted), classes), math.log((1 - certainty) / (classes - 1)))
    scores[np.arange(len(predicted)), predicted] = math.log(certainty)
    return scores


def labels_and_scores(matrix: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Images that give this confusion matrix."""
    cells = np.repeat(np.arange(len(matrix) ** 2), np.ravel(matrix))
    labels, predicted = np.divmod(cells, len(matrix))
    return labels, scores_of(predicted, len(matrix))


def random_case(seed: int, images: int = 200, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=images)
    logits = generator.normal(size=(images, classes))
    logits[np.arange(images), labels] += 1.0
    return labels, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("name", REPORTED)
def test_the_figures_of_the_third_report(name):
    matrix, accuracy, macro_f1 = REPORTED[name]
    labels, scores = labels_and_scores(matrix)
    assert len(labels) == 2117
    np.testing.assert_array_equal(confusion_matrix(labels, scores), matrix)
    found = evaluate(labels, scores, CLASSES)
    assert (round(found["accuracy"], 2), round(found["macro_f1"], 2)) == (accuracy, macro_f1)
    assert found["recall/COVID"] == matrix[0][0] / sum(matrix[0])


# By hand from the matrices: precision is the diagonal over its column's sum, recall (sensitivity) over its row's.
BY_HAND = {
    "head only": {
        "COVID": ((300, 321), (300, 362)),
        "Lung_Opacity": ((481, 551), (481, 602)),
        "Normal": ((952, 1113), (952, 1019)),
        "Viral_Pneumonia": ((126, 132), (126, 134)),
    },
    "last convolution": {
        "COVID": ((331, 346), (331, 362)),
        "Lung_Opacity": ((505, 583), (505, 602)),
        "Normal": ((944, 1055), (944, 1019)),
        "Viral_Pneumonia": ((129, 133), (129, 134)),
    },
    "last two": {
        "COVID": ((338, 403), (338, 362)),
        "Lung_Opacity": ((512, 619), (512, 602)),
        "Normal": ((869, 965), (869, 1019)),
        "Viral_Pneumonia": ((126, 130), (126, 134)),
    },
}


@pytest.mark.parametrize("name", REPORTED)
def test_the_classes_of_the_third_report(name):
    report = matrix_report(np.array(REPORTED[name][0], float), CLASSES)
    assert report == classification_report(*labels_and_scores(REPORTED[name][0]), CLASSES)
    for class_name, ((hits, predicted), (_, actual)) in BY_HAND[name].items():
        row = report[class_name]
        assert row["precision"] == pytest.approx(hits / predicted)
        assert row["recall"] == pytest.approx(hits / actual)  # sensitivity
        assert row["f1-score"] == pytest.approx(2 * hits / (predicted + actual))
        assert row["support"] == actual
    assert report["macro avg"]["f1-score"] == pytest.approx(REPORTED[name][2], abs=0.005)
    weighted = sum(hits for (hits, _), _ in BY_HAND[name].values()) / 2117
    assert report["weighted avg"]["recall"] == pytest.approx(weighted)


def test_the_accuracies_in_the_text_of_the_third_report_do_not_follow_from_its_matrices():
    for (matrix, _, _), stated in zip(REPORTED.values(), (0.8621, 0.8728, 0.8384), strict=True):
        found = matrix_report(np.array(matrix, float), CLASSES)["accuracy"]
        assert found == np.trace(matrix) / 2117
        assert abs(found - stated) > 0.015


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_agreement_with_scikit_learn(classes, weighted):
    labels, scores = random_case(classes, classes=classes)
    weights = np.random.default_rng(7).uniform(0.1, 3.0, len(labels)) if weighted else None
    found = evaluate(labels, scores, CLASSES[:classes], weights)
    predicted, given = scores.argmax(axis=1), {"sample_weight": weights}
    ranked = scores[:, 1] if classes == 2 else np.exp(scores)
    recalls = sklearn_metrics.recall_score(labels, predicted, average=None, **given)
    expected = {
        "loss": sklearn_metrics.log_loss(labels, np.exp(scores), **given),
        "accuracy": sklearn_metrics.accuracy_score(labels, predicted, **given),
        "macro_f1": sklearn_metrics.f1_score(labels, predicted, average="macro", **given),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, predicted, **given),
        "auroc": sklearn_metrics.roc_auc_score(labels, ranked, multi_class="ovr", **given),
        **{f"recall/{name}": recall for name, recall in zip(CLASSES, recalls, strict=False)},
    }
    assert found == pytest.approx(expected, rel=1e-9)


def degenerate_cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Labels and log-probabilities of three classes at the edge of what is defined."""
    labels, scores = random_case(5, images=60, classes=3)
    tied = np.log(np.random.default_rng(3).multinomial(4, [1 / 3] * 3, 60) + 0.5)
    return {
        "usual": (labels, scores),
        "absent": (labels % 2, scores),
        "never predicted": (labels, scores - np.array([0.0, 0.0, 9.0])),
        "absent and never predicted": (labels % 2, scores - np.array([0.0, 0.0, 9.0])),
        "constant": (labels, np.tile(np.log([0.5, 0.3, 0.2]), (60, 1))),
        "ties": (labels, tied - np.log(np.exp(tied).sum(axis=1, keepdims=True))),
        "all right": (labels, scores_of(labels, 3)),
        "all wrong": (labels, scores_of((labels + 1) % 3, 3)),
        "one class": (np.ones(60, int), scores),
        "one image": (np.array([2]), scores[:1]),
    }


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("case", degenerate_cases())
@pytest.mark.filterwarnings("ignore::UserWarning")  # scikit-learn's, of what is undefined
@pytest.mark.filterwarnings("ignore::RuntimeWarning:sklearn")
def test_the_final_figures_are_those_of_scikit_learn(case, weighted):
    labels, scores = degenerate_cases()[case]
    scores = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    weights = np.random.default_rng(7).integers(1, 4, len(labels)).astype(float) if weighted else None
    found = evaluate_further(labels, scores, CLASSES[:3], weights)
    expected = figures_of_scikit_learn(labels, scores, weights)
    assert found.keys() == {
        *METRICS,
        *FURTHER_METRICS,
        *(f"{kind}/{name}" for kind in BY_CLASS for name in CLASSES[:3]),
    }
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)


BY_CLASS = ("recall", *FURTHER_BY_CLASS)


def figures_of_scikit_learn(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None) -> dict[str, float]:
    probabilities, predicted, given = np.exp(scores), scores.argmax(axis=1), {"sample_weight": weights}
    classes, true = range(scores.shape[1]), np.eye(scores.shape[1])[labels]
    one_vs_rest = sklearn_metrics.multilabel_confusion_matrix(labels, predicted, labels=classes, **given)
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0, **given
    )
    by_class: dict[str, list[float]] = {"precision": list(precision), "recall": list(recall), "f1": list(f1)}
    by_class["specificity"] = [tn / (tn + fp) if tn + fp else math.nan for (tn, fp), _ in one_vs_rest]
    both = [0 < true[:, k].sum() < len(labels) for k in classes]
    by_class["auroc"] = [
        sklearn_metrics.roc_auc_score(true[:, k], scores[:, k], **given) if both[k] else math.nan for k in classes
    ]
    by_class["auprc"] = [sklearn_metrics.average_precision_score(true[:, k], scores[:, k], **given) for k in classes]
    for kind, values in by_class.items():
        if kind != "specificity":
            by_class[kind] = [value if images else math.nan for value, images in zip(values, support, strict=True)]
    macro = {kind: mean_of(np.array(values)[support > 0]) for kind, values in by_class.items()}
    right = (predicted == labels).astype(int)
    bins = np.clip(np.ceil(probabilities.max(axis=1) * 15) - 1, 0, 14)
    counted = np.ones(len(labels)) if weights is None else weights
    gaps = [abs((counted * (right - probabilities.max(axis=1)))[bins == each].sum()) for each in range(15)]
    return {
        "loss": sklearn_metrics.log_loss(labels, probabilities, labels=classes, **given),
        "accuracy": sklearn_metrics.accuracy_score(labels, predicted, **given),
        "macro_f1": macro["f1"],
        "balanced_accuracy": macro["recall"],
        "auroc": macro["auroc"],
        "auprc": macro["auprc"],
        "macro_precision": macro["precision"],
        "macro_specificity": macro["specificity"],
        "kappa": sklearn_metrics.cohen_kappa_score(labels, predicted, **given),
        "mcc": sklearn_metrics.matthews_corrcoef(labels, predicted, **given),
        "brier": sklearn_metrics.brier_score_loss(labels, probabilities, labels=classes, scale_by_half=False, **given),
        "ece": sum(gaps) / counted.sum(),
        **{f"{kind}/{CLASSES[k]}": by_class[kind][k] for kind in by_class for k in classes},
    }


def mean_of(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def test_many_countings_at_once_are_each_of_them():
    labels, scores = random_case(0)
    weights = np.random.default_rng(1).integers(0, 4, (len(labels), 5)).astype(float)
    found = measure(labels, scores, CLASSES, weights, further=True)
    for draw in range(5):
        alone = evaluate_further(labels, scores, CLASSES, weights[:, draw])
        assert {name: values[draw] for name, values in found.items()} == pytest.approx(alone, nan_ok=True)


def test_the_figures_of_every_epoch_are_those_of_the_final_evaluation():
    labels, scores = random_case(0)
    epoch = evaluate(labels, scores, CLASSES)
    assert epoch.items() <= evaluate_further(labels, scores, CLASSES).items()


def test_equal_scores_count_half():
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(2, size=300), np.log(generator.integers(1, 6, (300, 2)) / 6)
    weights = generator.uniform(0.0, 2.0, 300)
    expected = [sklearn_metrics.roc_auc_score(labels == k, scores[:, k], sample_weight=weights) for k in (0, 1)]
    assert evaluate(labels, scores, CLASSES[:2], weights)["auroc"] == pytest.approx(np.mean(expected), rel=1e-9)


def test_whole_weights_are_repeated_images():
    labels, scores = random_case(0)
    times = np.random.default_rng(1).integers(0, 4, len(labels))
    repeated = np.repeat(np.arange(len(labels)), times)
    weighted = evaluate(labels, scores, CLASSES, times.astype(float))
    assert weighted == pytest.approx(evaluate(labels[repeated], scores[repeated], CLASSES))


def test_a_class_never_predicted():
    labels = np.array([0, 0, 1, 1, 2, 2])
    found = evaluate(labels, scores_of(np.array([0, 0, 1, 1, 0, 1]), 3), CLASSES[:3])
    assert found["recall/Normal"] == 0.0
    assert found["balanced_accuracy"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((0.8 + 0.8 + 0.0) / 3)


def test_a_class_without_images_is_left_out_of_the_means():
    labels = np.array([0, 0, 1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(labels, scores_of(np.array([0, 0, 1, 2]), 3), CLASSES[:3])
    assert math.isnan(found["recall/Normal"])
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)


def test_names_of_the_figures():
    assert evaluate(*random_case(0), CLASSES).keys() == {*METRICS, *(f"recall/{name}" for name in CLASSES)}


def test_the_area_is_undefined_with_one_class_or_infinite_scores():
    labels, scores = random_case(0, classes=3)
    one_class = evaluate(np.zeros_like(labels), scores, CLASSES[:3])
    assert math.isnan(one_class["auroc"])
    assert math.isfinite(one_class["accuracy"])
    scores[3] = np.nan
    assert math.isnan(evaluate(labels, scores, CLASSES[:3])["auroc"])


def test_the_loss_does_not_saturate():
    """A probability of exp(-300) is no float32; its logarithm is."""
    scores = np.array([[0.0, -300.0], [-300.0, 0.0]], np.float32)
    assert evaluate(np.array([1, 0]), scores, CLASSES[:2])["loss"] == 300.0
    assert evaluate(np.array([0, 0]), scores, CLASSES[:2])["loss"] == 150.0


def test_the_first_of_equal_scores_is_the_prediction():
    assert confusion_matrix(np.array([1]), np.zeros((1, 3)))[1].tolist() == [1, 0, 0]


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_report_per_class_is_that_of_scikit_learn(classes, seed):
    labels, scores = random_case(seed, images=40, classes=classes)
    assert_report_of_scikit_learn(labels, scores, classes)


@pytest.mark.parametrize(
    ("labels", "predicted"),
    [
        ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 0, 1]),  # the third is never predicted
        ([0, 0, 1, 1, 1, 1], [0, 2, 1, 1, 2, 1]),  # the third has no image
        ([0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0]),  # neither
        ([1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
        ([1, 1, 1, 1, 1, 1], [0, 0, 0, 2, 0, 0]),
    ],
)
def test_the_report_where_figures_are_undefined_is_that_of_scikit_learn(labels, predicted):
    assert_report_of_scikit_learn(np.array(labels), scores_of(np.array(predicted), 3), 3)


def assert_report_of_scikit_learn(labels: np.ndarray, scores: np.ndarray, classes: int) -> None:
    expected = sklearn_metrics.classification_report(
        labels,
        scores.argmax(axis=1),
        labels=range(classes),
        target_names=CLASSES[:classes],
        output_dict=True,
        zero_division=0,
    )
    # Where each label is a class of the list, scikit-learn calls the accuracy by the name of what it equals.
    accuracy = expected.pop("micro avg", None) or {"f1-score": expected.pop("accuracy")}
    found = classification_report(labels, scores, CLASSES[:classes])
    assert found.pop("accuracy") == pytest.approx(accuracy["f1-score"], rel=1e-12)
    assert list(found) == list(expected)
    for name, figures in expected.items():
        assert found[name] == pytest.approx(figures, rel=1e-12)
        assert list(found[name]) == list(figures)


def test_the_report_per_class():
    labels, scores = labels_and_scores(REPORTED["head only"][0])
    found = classification_report(labels, scores, CLASSES)
    assert found["COVID"]["precision"] == pytest.approx(300 / 321)
    assert found["Viral_Pneumonia"]["support"] == 134
    assert found["macro avg"]["f1-score"] == pytest.approx(evaluate(labels, scores, CLASSES)["macro_f1"])
    never = classification_report(np.array([0, 1]), scores_of(np.array([0, 0]), 4), CLASSES)
    assert never["Lung_Opacity"]["f1-score"] == 0.0
    assert never["Normal"]["support"] == 0
