"""Compiled programs: shared by phases that are built alike, and only by them."""

import dataclasses

import pytest

import hintjax as hj
from hintjax.experiments import attachment, phases, recipes
from hintjax.experiments.config import Config
from hintjax.experiments.phases import check, check_balance
from hintjax.experiments.setting import prepare

RESNETS = dict.fromkeys(("student", "teacher"), "hintjax.models:resnet8")


@pytest.fixture
def setting(corners):
    config = Config(dataset=corners, devices=1, hinted_rate=0.1, **RESNETS)
    return prepare(config, teach=True)


def test_phases_of_one_name_with_other_rates_are_other_programs(setting):
    """AB and FSP both end with the task, but had their hints at other layers."""
    check(setting, recipes.AB)
    before = set(setting.programs)
    check(setting, recipes.FSP)
    assert len(setting.programs) == len(before) + 2


def test_phases_of_one_name_with_other_methods_are_other_programs(setting):
    middle = recipes.AT._replace(where=attachment.middle)
    check(setting, recipes.AT)
    check(setting, middle)
    check(setting, middle._replace(weight=1.0))
    assert len(setting.programs) == 3


def test_a_config_that_builds_another_stage_makes_another_program(setting):
    check(setting, recipes.KD)
    for change in ({"kd_weight": 1.0}, {"weight_decay": 0.1}, {"accumulate": 2}):
        changed = dataclasses.replace(setting.config, **change)
        check(setting._replace(config=changed), recipes.KD)
    assert len(setting.programs) == 4


def test_a_balanced_method_has_a_weight_in_the_state_and_a_share(setting):
    for weight, recipe in ((None, recipes.AT), (3.0, recipes.KD), (None, recipes.DKD)):
        change = {"balance": 0.4, "balance_every": 7, "weight": weight}
        changed = dataclasses.replace(setting.config, **change)
        (phase,) = check(setting._replace(config=changed), recipe)
        assert phase.balance == hj.Balance({phase.name: 0.4}, 7)
        check_balance(changed, [phase])
        with pytest.raises(hj.Refusal, match="whose share can be balanced, got back"):
            check_balance(changed, check(setting, recipes.backprop))
    # DKD's weight grows: the schedule is a factor of the weight in the state.
    assert {phase.name for phase in check(setting, recipes.DKD)} == {"decoupled_kd"}


@pytest.mark.parametrize(
    ("arms", "programs"),
    [
        ((recipes.FITNETS, recipes.FITNETS), 2),
        ((recipes.AT, recipes.AT), 1),
        # Both have the hint stage of FitNets.
        ((recipes.FITNETS, recipes.HINTS_THEN_TASK), 3),
    ],
)
def test_arms_share_what_is_built_alike_whatever_their_rate_and_seed(
    arms, programs, setting
):
    for number, recipe in enumerate(arms):
        rate = {"learning_rate": 0.1**number, "seed": number}
        config = dataclasses.replace(setting.config, **rate)
        check(setting._replace(config=config), recipe)
    assert len(setting.programs) == programs


def test_rates_of_layers_multiply_the_rate_of_hinted_layers(setting, monkeypatch):
    """The hint of FitNets is at group1; in the hint stage no rate is scaled."""
    seen = []

    def recorded(*given, rates, **named):
        seen.append(rates)
        return hj.distillation_stage(*given, rates=rates, **named)

    monkeypatch.setattr(phases, "distillation_stage", recorded)
    rates = ("group1=0.5", "classifier=10")
    config = dataclasses.replace(setting.config, layer_rates=rates)
    check(setting._replace(config=config), recipes.FITNETS)
    (found,) = seen
    assert found == pytest.approx({"group1": 0.05, "classifier": 10})


def test_a_rate_of_an_unknown_layer_is_refused_before_training(setting):
    config = dataclasses.replace(setting.config, layer_rates=("group9=0.5",))
    with pytest.raises(hj.Refusal, match="group9"):
        check(setting._replace(config=config), recipes.KD)
