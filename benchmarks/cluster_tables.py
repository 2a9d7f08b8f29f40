"""What the same sweep came to on one host and on three, for the page of results."""

from collections.abc import Mapping
from typing import Any

from tables import table


def cluster_page(result: Mapping[str, Any]) -> list[str]:
    """The part of the page: time, slots, processors and network of each way, and what differed."""
    rows = [
        [
            row["name"],
            str(row["slots"]),
            f"{row['wall_seconds']:.1f}",
            f"{row['search_seconds']:.1f}",
            f"{row['trials_seconds']:.1f}",
            f"{100 * row['train_seconds'] / (row['slots'] * row['trials_seconds']):.0f}",
            f"{row['processor_seconds']:.1f}",
            f"{row['sent_bytes'] / 1e6:.1f}, {row['received_bytes'] / 1e6:.1f}",
        ]
        for row in result["rows"]
    ]
    header = [
        "the sweep ran on",
        "trials at once",
        "seconds, whole program",
        "of them search",
        "first trial to last epoch",
    ]
    header += ["slots busy, %", "processor seconds of trainings", "MB the driver's host sent, received"]
    lost = result["complaints"]
    same = (
        f"{result['trials']} trials (`cluster.yaml`), a fixed list: the same trials, and every epoch's training and "
        "validation metrics, best trial and test figures equal to the last bit."
        if not lost
        else "They are not the same:\n\n" + "\n".join(f"- {text}" for text in lost)
    )
    return [
        "## One host and three",
        f"{same} The hosts are network namespaces on one machine, each with its own address, files and processes, and "
        "share its cores: what is measured is what it costs to be apart, not what more cores gain. Three hosts are a "
        "head, which runs no trials, and two workers with one slot each.",
        table(header, rows),
        "Slots busy: seconds of all trials' epochs, compiling and features with them, over the slots' seconds from the "
        "first trial's start to the last epoch. Of one host, the network carries nothing. A running cluster spares "
        "starting Ray; its first trials pay for their workers and for the files that go to each node once.",
    ]
