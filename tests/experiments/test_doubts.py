"""Doubts about a run before and after it, each with what to do."""

import json

import numpy as np
import pytest

from hintjax.experiments import doubts, recipes
from hintjax.experiments.config import Config
from hintjax.experiments.report.facts import Pair
from hintjax.experiments.setting import prepare

PLAIN = dict.fromkeys(("student", "teacher"), "hintjax.models:plain_wide")


@pytest.fixture(scope="module")
def setting(corners):
    return prepare(Config(dataset=corners, devices=1, **PLAIN), teach=True)


def planned(setting, recipe):
    return recipe(setting.config, setting.places, 5)


def with_pairs(setting, *pairs):
    return setting._replace(places=setting.places._replace(pairs=pairs))


@pytest.mark.quick
def test_a_pair_of_a_hint_stage_deeper_than_two_thirds_is_told(setting):
    deep = with_pairs(setting, ("conv3", "conv2"))
    (sentence,) = doubts.doubts_before(deep, planned(deep, recipes.FITNETS), None)
    assert sentence.startswith("conv3=conv2: the guided layer is at 100% of the depth")
    assert "Choose one at 67% or less." in sentence
    # A method beside the task may take the ends of all stages.
    assert doubts.doubts_before(deep, planned(deep, recipes.AT), None) == []
    shallow = with_pairs(setting, ("conv2", "conv2"), ("conv1", "conv1"))
    phases = planned(shallow, recipes.FITNETS)
    assert doubts.doubts_before(shallow, phases, None) == []


@pytest.mark.quick
def test_a_hint_that_an_untrained_student_explains_is_told(setting):
    pair = Pair("conv2", "conv2", lambda variables: 0.0, 0.95)
    phases = planned(setting, recipes.FITNETS)
    (said,) = doubts.doubts_before(setting, phases, pair)
    assert said.startswith("conv2=conv2: a linear map of the untrained guided layer")
    assert "Choose a deeper hint layer" in said
    assert doubts.doubts_before(setting, phases, pair._replace(before=0.5)) == []


@pytest.mark.quick
def test_a_teacher_of_images_with_another_standardization_is_told(setting, tmp_path):
    ours = setting.dataset.standardize
    same = {name: np.ravel(x).tolist() for name, x in ours._asdict().items()}
    scaled = {"mean": same["mean"], "std": [255 * x for x in same["std"]]}
    moved = {"mean": [x + y for x, y in zip(*same.values(), strict=True)]}
    for theirs, told in ((same, 0), (scaled, 1), ({**same, **moved}, 1)):
        (tmp_path / "result.json").write_text(json.dumps({"standardize": theirs}))
        config = Config(**{**setting.config.__dict__, "teacher": str(tmp_path)})
        other = setting._replace(config=config)
        said = doubts._other_images(other)
        assert len(said) == told
        assert all("the same dataset, size and range" in one for one in said)
    (tmp_path / "result.json").write_text("{}")  # a run of an earlier version
    assert doubts._other_images(other) == []


@pytest.mark.quick
def test_a_teacher_that_is_worse_than_its_student_is_told(setting):
    students = {"kd": 0.74, "at": 0.7}
    (said,) = doubts.doubts_after(setting, 0.71, students)
    assert "worse than the student of kd" in said and "71.0 % against 74.0 %" in said
    assert "--teacher-epochs" in said
    for teacher, own in (
        (0.9, students),
        (0.74, students),
        (None, students),
        (0.1, {}),
    ):
        assert doubts.doubts_after(setting, teacher, own) == []
