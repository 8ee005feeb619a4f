"""Suggested pairs: hints from the middle third of the teacher."""

import jax
import pytest

from hintjax import suggest_pairs
from hintjax.pairing import first_pair, head, stage_pairs

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
