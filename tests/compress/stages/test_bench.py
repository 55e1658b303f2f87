from __future__ import annotations

from compress.config import BenchConfig
from compress.data import Dataset
from compress.stages.bench import dataset_row, measured_images


def test_the_report_tells_of_the_images_that_were_measured_and_no_others(tiny_data: Dataset) -> None:
    val = tiny_data.splits["val"]
    whole, three = (dataset_row(tiny_data, measured_images(BenchConfig(max_images=n), tiny_data)) for n in (0, 3))
    assert (whole["images"], whole["instances"]) == (4, val.boxes)
    assert (three["images"], three["instances"]) == (3, sum(len(sample.labels) for sample in val.samples[:3]))
    assert whole["sha256"] != three["sha256"]
