"""Suggested pairs: hints from the middle third of the teacher."""

import jax
import numpy as np
import pytest

from hintjax import suggest_pairs
from hintjax.pairing import (
    Candidate,
    Measured,
    candidates,
    choose,
    first_pair,
    head,
    remarks,
    stage_pairs,
)

pytestmark = pytest.mark.quick


def layers(*paths, shape=(1, 8, 8, 4), **others):
    shapes = {path: shape for path in paths} | others
    return {path: jax.ShapeDtypeStruct(s, "float32") for path, s in shapes.items()}


def convs(count):
    return layers(*(f"conv{i}" for i in range(1, count + 1)))


@pytest.mark.parametrize(
    ("teacher", "middle"),
    [
        (2, {1}),
        (3, {2}),
        (4, {2}),
        (5, {2, 3}),
        (6, {3, 4}),
        (9, {4, 5, 6}),
        (12, {5, 6, 7, 8}),
    ],
)
def test_hints_are_the_middle_third_of_the_teacher(teacher, middle):
    pairs = suggest_pairs(convs(teacher), convs(teacher), count=99)
    assert [hint for _, hint in pairs] == [f"conv{i}" for i in sorted(middle)]
    # If both networks are equal, each layer is paired with itself.
    assert all(guided == hint for guided, hint in pairs)


def test_one_pair_is_the_middle():
    assert suggest_pairs(convs(20), convs(6)) == (("conv10", "conv3"),)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pairs_are_counted_and_go_from_shallow_to_deep(count):
    student, teacher = convs(20), convs(15)
    pairs = suggest_pairs(student, teacher, count=count)
    assert len(pairs) == count
    for network, which in ((student, 0), (teacher, 1)):
        order = [list(network).index(pair[which]) for pair in pairs]
        assert order == sorted(order)


def test_layers_inside_blocks_are_passed_over_where_there_are_blocks():
    inside = [f"group{i}/{part}" for i in (1, 2, 3) for part in ("conv", "norm")]
    paths = sorted([*inside, "group1", "group2", "group3"], key=order_of_execution)
    pairs = suggest_pairs(convs(3), layers(*paths))
    assert pairs == (("conv2", "group2"),)


def order_of_execution(path):
    return path.split("/")[0], "/" not in path, path


def test_vectors_are_no_candidates_but_tokens_are():
    student = convs(3) | layers("head", "logits", shape=(1, 10))
    assert suggest_pairs(student, convs(3)) == (("conv2", "conv2"),)
    tokens = layers("block1", "block2", "block3", shape=(1, 5, 16))
    assert suggest_pairs(tokens, tokens) == (("block2", "block2"),)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_network_without_maps_is_named(which):
    networks = {"student": convs(3), "teacher": convs(3)}
    networks[which] = layers("dense", shape=(1, 10))
    with pytest.raises(ValueError, match=f"feature maps in the {which}.*explicitly"):
        suggest_pairs(networks["student"], networks["teacher"])


def test_a_teacher_with_one_map_has_a_pair():
    assert suggest_pairs(convs(3), convs(1))


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(count):
    with pytest.raises(ValueError, match="count"):
        suggest_pairs(convs(3), convs(3), count=count)


def residual(*groups, **others):
    """A stem and groups, each with a block, and a BatchNorm at the end."""
    found = layers("stem", shape=(1, 32, 32, 16))
    for group, side in zip(groups, (32, 16, 8), strict=True):
        found |= layers(f"{group}/block1", group, shape=(1, side, side, 16))
    return found | layers("norm", shape=(1, 8, 8, 16), **others)


def test_stages_end_where_the_resolution_changes_in_a_layer_of_layers():
    network = residual("group1", "group2", "group3")
    groups = ("group1", "group2", "group3")
    assert stage_pairs(network, network) == tuple(zip(groups, groups, strict=True))
    assert first_pair(network, network) == ("stem", "stem")


def test_unlike_networks_are_paired_by_depth():
    teacher = residual("a", "b", "c")
    assert stage_pairs(convs(10), teacher) == (
        ("conv3", "a"),
        ("conv7", "b"),
        ("conv10", "c"),
    )


def test_a_network_of_one_resolution_is_cut_into_thirds():
    assert stage_pairs(convs(6), convs(9)) == (
        ("conv2", "conv3"),
        ("conv4", "conv6"),
        ("conv6", "conv9"),
    )


def test_the_head_is_the_last_two_vectors():
    vectors = layers("pool", "classifier", shape=(1, 8))
    assert head(convs(3) | vectors) == ("pool", "classifier")
    with pytest.raises(ValueError, match="head: expected a pooled vector"):
        head(convs(3) | layers("classifier", shape=(1, 8)))


def candidate(hint, **other):
    """A candidate at half of the depth, with a guided layer of its own."""
    usual = {"guided_depth": 0.5, "depth": 0.5, "cost": 0.5, "regressor": 9}
    usual |= {"probe": 0.8, "explained": 0.2, "guided": f"of {hint}", "shape": (4,)}
    return Candidate(**(usual | {"hint": hint} | other))


def measured(*found, alike=0.5):
    teacher, student = (
        tuple(dict.fromkeys(getattr(one, which) for one in found))
        for which in ("hint", "guided")
    )
    n = len(teacher) + len(student)
    matrix = np.full((n, n), alike) + (1 - alike) * np.eye(n)
    return Measured(found, 0.1, teacher, student, matrix)


def hints(found, count=9):
    return [choice.hint for choice in choose(found, count=count)]


def test_the_pair_that_knows_most_and_is_explained_least_is_chosen():
    found = [
        candidate("knows little", probe=0.3),
        candidate("best"),
        candidate("explained", explained=0.7),
        candidate("shallow", guided_depth=0.1),
        candidate("costs more", cost=0.6),
    ]
    assert hints(measured(*found), 1) == ["best"]
    assert hints(measured(*found[::-1]), 1) == ["best"]
    # Worse than the mean counts as not explained at all.
    below = candidate("below the mean", explained=-3.0, probe=0.5)
    assert hints(measured(candidate("best"), below), 1) == ["best"]
    (choice,) = choose(measured(*found), count=1)
    assert choice.guided == "of best"
    assert choice.reason == (
        "a linear probe of the hint is right for 80% of the images (chance 10%), an "
        "untrained guided layer explains 20% of the hint, and the hint stage trains "
        "50% of the student for 50% of the FLOPs"
    )


def test_without_labels_a_hint_counts_by_all_but_its_probe():
    found = [
        candidate("shallow", guided_depth=0.4, explained=0.1, probe=None),
        candidate("best", explained=0.1, probe=None),
        candidate("explained", explained=0.7, probe=None),
    ]
    unlabeled = measured(*found)._replace(chance=None)
    assert hints(unlabeled, 1) == ["best"] and remarks(unlabeled) == ()
    (choice,) = choose(unlabeled)
    assert choice.reason.startswith("an untrained guided layer explains 10%")


@pytest.mark.parametrize(
    "wrong",
    [{"depth": 0.7}, {"guided_depth": 0.7}, {"regressor": None}, {"explained": 0.9}],
)
def test_a_pair_against_the_rule_is_left_out(wrong):
    good, bad = candidate("good", probe=0.2), candidate("bad", probe=1.0, **wrong)
    assert hints(measured(good, bad)) == ["good"]
    assert hints(measured(bad)) == []


def test_several_pairs_differ_and_go_from_shallow_to_deep():
    found = [
        candidate("deep", depth=0.6, probe=0.9),
        candidate("middle", depth=0.5),
        candidate("same student's layer", guided="of deep"),
        candidate("shallow", depth=0.4, probe=0.7),
    ]
    assert hints(measured(*found)) == ["shallow", "middle", "deep"]
    assert hints(measured(*found), 2) == ["middle", "deep"]
    assert hints(measured(*found, alike=0.98)) == ["deep"]


def test_suggested_pairs_follow_the_measurements_if_there_are_any():
    student, teacher = convs(20), convs(6)
    found = candidate("conv2", guided="conv5")
    pairs = suggest_pairs(student, teacher, measured=measured(found))
    assert pairs == (("conv5", "conv2"),)
    # No candidate passes the rule: the pair is that of the middle.
    none = measured(found._replace(regressor=None))
    assert suggest_pairs(student, teacher, measured=none) == (("conv10", "conv3"),)


def test_a_pair_in_use_is_warned_about_with_what_to_do():
    found = measured(
        candidate("explained", explained=0.95),
        candidate("deep", depth=0.9),
        candidate("too deep", guided_depth=0.8),
        candidate("good"),
    )
    assert remarks(found) == ()
    used = [(one.guided, one.hint) for one in found.candidates]
    explained, deep, too_deep = remarks(found, used)
    assert explained.startswith("of explained=explained: a linear map of the untrained")
    assert "explains 95% of the hint" in explained and "deeper hint layer" in explained
    assert "the hint layer is at 90%" in deep and "Choose one at 67%" in deep
    assert "the guided layer is at 80%" in too_deep
    assert remarks(found, used[-1:]) == ()


def test_a_teacher_whose_layers_know_nothing_is_warned_about():
    found = measured(candidate("one", probe=0.1), candidate("two", probe=0.05))
    (warning,) = remarks(found)
    assert "more of the labels than chance" in warning and "is trained" in warning


def test_candidates_are_blocks_where_the_outermost_layers_are_few():
    found = layers("stem")
    for group, side in (("group1", 8), ("group2", 4)):
        for block in ("block1", "block2"):
            for part in ("/conv", "/norm", ""):
                found |= layers(f"{group}/{block}{part}", shape=(1, side, side, 4))
        found |= layers(group, shape=(1, side, side, 4))
    found |= layers("pool", "classifier", ":out", shape=(1, 4))
    assert candidates(found) == {
        "stem": 0.2,
        "group1/block1": 0.4,
        "group1": 0.6,
        "group2/block1": 0.8,
        "group2": 1.0,
    }
    assert list(candidates(found, enough=3)) == ["stem", "group1", "group2"]
    wrapped = {f"net/{path}": layer for path, layer in convs(3).items()}
    assert list(candidates(wrapped)) == ["net/conv1", "net/conv2", "net/conv3"]
    assert len(candidates(convs(20))) == 20
