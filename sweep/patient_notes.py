"""What a plan says of the patients: how many there are by which rule, and what a person can do about it."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from cxr_models.dataset import Manifest
from cxr_models.patients import BY_TABLE, EACH_ITS_OWN
from sweep.wording import count


def patient_notes(manifest: Manifest, given: Sequence[str]) -> Iterator[str]:
    """A note or two.

    Args:
        manifest: the images.
        given: what the sources of the data section have as `patient`, those that have it.
    """
    images: dict[str, int] = defaultdict(int)
    patients: dict[str, set[str]] = defaultdict(set)
    for record in manifest.records:
        images[record.patient_by] += 1
        patients[record.patient_by].add(record.patient)
    alone = images.pop("", 0)
    named = " or ".join(repr(text) for text in sorted({*given}))
    if not images and {*given} == {EACH_ITS_OWN}:
        yield "each image counts as its own patient, as data.patient: none says"
    elif not images and given:
        yield f"data.patient {named} matches no file name: each image counts as its own patient"
    elif not images:
        yield "no file name tells a patient: each image counts as its own (data.patient says how names tell them)"
    if not images:
        return
    told = [
        f"{count(images[rule], 'image')} of {count(len(patients[rule]), 'patient')} by {rule}"
        for rule in sorted(images, key=lambda rule: -images[rule])
    ]
    if alone:
        told.append(f"{count(alone, 'image')} by nothing (each counts as its own patient)")
    unasked = {*images} - {BY_TABLE} and not given
    hint = "; data.patient: none ignores PatientID and names" if unasked else ""
    yield f"patients: {', '.join(told)}{hint}"
    if manifest.patients == len(manifest.records) and {*given} - {EACH_ITS_OWN}:
        yield f"data.patient {named} gives every image a patient of its own; does it match the names?"
