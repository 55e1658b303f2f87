from __future__ import annotations

import pytest
from pydantic import ValidationError

from compress.config import (
    BuildConfig,
    DistillConfig,
    QuantizeConfig,
    Recipe,
    StudyConfig,
    TeacherConfig,
    TrainConfig,
    result_settings,
)


@pytest.mark.parametrize("change", [{"workers": 7}, {"tensorboard": False}, {"checkpoint_interval": 9}])
def test_a_marked_setting_is_none_that_a_result_depends_on(change: dict[str, object]) -> None:
    for kind in (TrainConfig, TeacherConfig, DistillConfig):
        assert result_settings(kind.model_validate(change)) == result_settings(kind())


def test_groups_within_groups_are_reached() -> None:
    recipe = Recipe.model_validate({"data": "d", "teacher": {"workers": 5, "optimizer": {"lr0": 0.5}}})
    found = result_settings(recipe)
    assert "workers" not in found["teacher"]
    assert found["teacher"]["optimizer"]["lr0"] == 0.5
    assert found["data"] == "d"


def test_every_other_setting_of_a_training_is_one() -> None:
    dumped = TrainConfig().model_dump(mode="json")
    assert dumped.keys() - result_settings(TrainConfig()).keys() == {
        "workers", "threads", "tensorboard", "checkpoint_interval", "cuda_graph",
    }  # fmt: skip
    assert all(dumped[key] == value for key, value in result_settings(TrainConfig()).items())


def test_a_gpu_number_may_be_written_as_yaml_reads_it() -> None:
    assert Recipe.model_validate({"data": "data.yaml", "device": 0}).device == "0"
    with pytest.raises(ValidationError):
        Recipe.model_validate({"data": "data.yaml", "device": True})


@pytest.mark.parametrize("targets", ["sm86,sm89", "sm86, sm89,", ["sm86", "sm89"]])
def test_targets_are_a_list_or_a_text_with_commas(targets: object) -> None:
    assert BuildConfig.model_validate({"targets": targets}).targets == ("sm86", "sm89")


@pytest.mark.parametrize("names", ["fp16,int8-trt", "fp16, int8-trt,", ["fp16", "int8-trt"]])
def test_flavours_and_precisions_are_a_list_or_a_text_with_commas(names: object) -> None:
    assert QuantizeConfig.model_validate({"flavours": names}).flavours == ("fp16", "int8-trt")
    assert BuildConfig.model_validate({"precisions": names}).precisions == ("fp16", "int8-trt")
    for group, key in ((QuantizeConfig, "flavours"), (BuildConfig, "precisions")):
        with pytest.raises(ValidationError, match="expected one of fp16, "):
            group.model_validate({key: "fp16,int9"})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0b"])
def test_the_name_of_a_run_or_an_arm_is_that_of_a_folder(name: str) -> None:
    with pytest.raises(ValidationError, match="expected a name for a folder"):
        Recipe(data="data.yaml", name=name)
    with pytest.raises(ValidationError, match="expected a name for a folder"):
        StudyConfig(arms={name: {}})
