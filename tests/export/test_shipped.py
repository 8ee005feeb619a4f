"""The shipped network gives the outputs that training saw."""

import jax
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax.export import deployed, deployed_variables, standalone
from hintjax.models import PlainCNN
from hintjax.networks import Wants
from hintjax.training import load_tree, save_tree

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def trained():
    student, teacher = (
        hj.linen(PlainCNN(widths, classes=4)) for widths in ((3, 3), (6, 5))
    )
    images = jax.random.normal(KEY, (8, 8, 8, 1))
    batch = {"image": images, "label": np.arange(8, dtype=np.int32) % 4}
    theirs = teacher.init(jax.random.key(1), images)
    method = hj.objective(simkd=hj.simkd(("conv2", "conv2")))
    stage = hj.distillation_stage(student, teacher, method, optax.sgd(0.1))
    state = stage.init(KEY, jax.jit(student.init)(KEY, images), theirs, batch)
    for _ in range(3):
        state, _ = stage.update(state, theirs, batch)
    return student, teacher, theirs, method, stage, state, batch


def test_the_deployed_network_is_as_accurate_as_evaluation_said(trained, tmp_path):
    student, teacher, theirs, method, stage, state, batch = trained
    network = deployed(student, teacher, method)
    variables = deployed_variables(state, method, teacher, theirs, batch["image"])
    save_tree(tmp_path / "deployed", variables._asdict())
    variables = hj.Variables(**load_tree(tmp_path / "deployed"))
    wants = Wants(output=True, hints=("conv1",))
    shown, _ = network.apply(*variables, batch["image"], wants=wants, train=False)
    assert shown.output.shape == (8, 4)
    assert list(shown.hints) == ["conv1"]
    right = (shown.output.argmax(-1) == batch["label"]).mean()
    assert stage.evaluate(state, theirs, batch)["simkd/accuracy"] == right
    own, _ = student.apply(
        *hj.student_variables(state), batch["image"], wants=wants, train=False
    )
    assert not np.allclose(own.output, shown.output)  # its own head is not trained


def test_a_deployed_network_is_one_like_any_other(trained):
    student, teacher, _, method, _, state, batch = trained
    network = deployed(student, teacher, method)
    made = jax.eval_shape(network.init, KEY, batch["image"])
    assert set(made.params["teacher"]) == {"classifier"}
    found = network.layers(*made, batch["image"])
    assert list(found) == list(
        student.layers(*hj.student_variables(state), batch["image"])
    )


def test_a_student_that_stands_alone_is_shipped_as_it_is(trained):
    student, teacher, theirs, _, _, state, batch = trained
    assert deployed(student, teacher, hj.kd()) is student
    shipped = deployed_variables(state, hj.kd(), teacher, theirs, batch["image"])
    assert shipped == hj.student_variables(state)


def test_two_terms_cannot_both_be_deployed():
    term = hj.simkd(("a", "x"))
    with pytest.raises(ValueError, match="objective: expected at most one term whose"):
        hj.objective(one=term, two=term)


def test_a_deployed_network_stands_alone(trained):
    student, teacher, theirs, method, _, state, batch = trained
    network = deployed(student, teacher, method)
    variables = deployed_variables(state, method, teacher, theirs, batch["image"])
    one = np.ones(1)
    model = standalone(network, variables, (8, 8, 1), mean=one, std=one)
    pixels = jax.random.randint(KEY, (2, 8, 8, 1), 0, 256)
    shown, _ = network.apply(
        *variables, pixels / 255 - 1, wants=Wants(output=True), train=False
    )
    np.testing.assert_allclose(model.apply(pixels), shown.output, atol=1e-5)
