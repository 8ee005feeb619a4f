"""The setting of a run."""

import pytest

from hintjax import Refusal
from hintjax.experiments.comparison_table import machine_of
from hintjax.experiments.config import Config
from hintjax.experiments.setting import prepare, taught_by

RESNETS = dict.fromkeys(("student", "teacher"), "hintjax.models:resnet8")


@pytest.mark.parametrize("teach", [True, False])
def test_only_a_setting_with_a_teacher_has_its_network(corners, teach):
    setting = prepare(Config(dataset=corners, devices=1, **RESNETS), teach=teach)
    if teach:
        assert taught_by(setting) is setting.teacher
    else:
        with pytest.raises(Refusal, match="setting: expected a teacher, got none"):
            taught_by(setting)


@pytest.mark.parametrize("devices", [1, 4])
def test_results_name_the_devices_that_the_run_used(corners, devices):
    config = Config(dataset=corners, devices=devices, **RESNETS)
    assert machine_of(prepare(config))["device"] == f"{devices} x cpu"
