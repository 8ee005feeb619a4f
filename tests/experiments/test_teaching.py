"""Teachers from finished runs, also of other datasets, and the classes of data."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax as hj
from hintjax import models
from hintjax.cli import main
from hintjax.experiments import config as configs
from hintjax.experiments import recipes
from hintjax.experiments.attachment import compares_outputs
from hintjax.experiments.config import Config
from hintjax.experiments.distill import show_classes
from hintjax.experiments.methods_table import METHODS
from hintjax.experiments.phases import check
from hintjax.experiments.setting import prepare
from hintjax.experiments.teaching import check_teacher
from hintjax.networks import join
from hintjax.training import save_tree

FEW = ("--student", "hintjax.models:plain_wide", "--batch-size", "16", "--epochs", "2")


def finished_run(run_dir, module, classes, shape=(8, 8, 1), **fields):
    """A run directory as after training, of a network that is only initialized."""
    run_dir.mkdir()
    variables = hj.linen(module).init(jax.random.key(0), jnp.zeros((1, *shape)))
    save_tree(run_dir / "student", join(variables))
    (run_dir / "result.json").write_text(json.dumps({"classes": classes}))
    configs.save(Config(method="backprop", **fields), run_dir)
    return str(run_dir)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A teacher of the ten digits."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    student = "hintjax.models:plain_wide"
    return finished_run(path, models.plain_wide(classes=10), 10, student=student)


def refused(capsys, *arguments):
    """The error of a command that ends before it trains."""
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


@pytest.mark.quick
def test_a_teacher_of_other_channels_is_one_sentence(
    digits, tmp_path, capsys, unchecked
):
    image = np.zeros((40, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "color.npz", image=image, label=np.arange(40) % 4)
    command = ("distill", "--dataset", tmp_path / "color.npz", "--teacher", digits)
    where = ("--run-dir", tmp_path / "run", *FEW)
    for method in ("kd", "at"):
        error = refused(capsys, *command, "--method", method, *where)
        assert "expected images like those of digits, on which" in error
        assert "got (8, 8, 3) of" in error and "color.npz" in error
        assert "(3, 3, 1, 64) in the teacher, (3, 3, 3, 64) for these" in error
    assert not list((tmp_path / "run").iterdir())


def test_a_teacher_of_other_image_sizes_is_one_sentence(
    corners, tmp_path, capsys, unchecked
):
    """A ViT has a position for each patch."""
    vit = {"student": "hintjax.models:vit_micro"}
    run_dir = finished_run(
        tmp_path / "vit", models.vit_micro(4), 4, (16, 16, 1), dataset="big", **vit
    )
    command = ("distill", "--dataset", corners, "--teacher", run_dir, *FEW)
    error = refused(capsys, *command, "--method", "at", "--run-dir", tmp_path / "run")
    assert "embed/positions: (65, 32) in the teacher, (17, 32) for these" in error


@pytest.mark.quick
@pytest.mark.parametrize("method", ["kd", "soft", "dkd", "simkd", "catkd"])
def test_outputs_of_other_classes_are_not_compared(
    method, digits, corners, tmp_path, capsys, unchecked
):
    command = ("distill", "--dataset", corners, "--teacher", digits, *FEW)
    where = ("--run-dir", tmp_path / "run")
    error = refused(capsys, *command, "--method", method, *where)
    assert "a teacher with outputs (4,) of the student" in error
    assert f"got outputs (10,) of {digits}. A method of hints, such as" in error
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.quick
def test_a_kd_term_and_a_comparison_with_kd_are_refused_too(
    digits, corners, tmp_path, capsys, unchecked
):
    command = ("distill", "--dataset", corners, "--teacher", digits, *FEW)
    where = ("--run-dir", tmp_path / "run")
    kd = ("--method", "at", "--kd-weight", "1")
    assert "Leave out --kd-weight" in refused(capsys, *command, *kd, *where)
    assert "got outputs (10,)" in refused(capsys, *command, *where)


@pytest.fixture
def other(digits, corners):
    config = Config(
        dataset=corners,
        devices=1,
        batch_size=16,
        student="hintjax.models:plain_wide",
        teacher=digits,
    )
    return prepare(config, teach=True)


@pytest.mark.quick
def test_a_teacher_keeps_its_own_classes(other):
    assert not other.places.same_outputs
    assert other.places.teacher["classifier"].shape == (1, 10)
    assert other.places.student["classifier"].shape == (1, 4)


@pytest.mark.quick
def test_methods_of_hints_work_with_a_teacher_of_other_classes(other):
    """Every method is either refused with advice, or has no need of a common head."""
    fields = {"method": "fitnets", "hint_epochs": 1, "epochs": 2, "batch_size": 4}
    other = other._replace(config=dataclasses.replace(other.config, **fields))
    refused = set()
    for name, named in METHODS.items():
        if name in ("minilm", "tinybert", "pkd"):  # they need transformers
            continue
        phases = named.recipe(other.config, other.places, 5)
        if any(compares_outputs(phase.method, other.places) for phase in phases):
            refused.add(name)
    expected = ("catkd", "dist", "dkd", "hard", "kd", "simkd", "soft", "std_kd")
    assert refused == {*expected}
    hint, task = check(other, recipes.FITNETS)
    assert (hint.name, task.name) == ("fitnets", "backprop")
    assert "other classes" in task.note


@pytest.mark.quick
def test_a_teacher_of_other_classes_is_not_judged(other, capsys):
    teacher = other.teacher.init(jax.random.key(0), other.inputs)
    assert check_teacher(other, teacher) is None
    assert "knows other classes, so it is not judged" in capsys.readouterr().out


def test_hints_of_a_teacher_of_other_classes_train_a_student(
    digits, corners, tmp_path, capsys
):
    command = ("distill", "--dataset", corners, "--teacher", digits, *FEW)
    how = ("--devices", "1", "--rates", "0.001", "--seeds", "1")
    run_dir = tmp_path / "run"
    main([*command, *how, "--compare", "at", "--run-dir", str(run_dir)])
    out = capsys.readouterr().out
    assert "other classes" in out
    report = json.loads((run_dir / "report.json").read_text())
    assert np.isnan(report["teacher"]["accuracy"])
    assert [row["arm"] for row in report["rows"]] == ["at"]
    assert (run_dir / "comparison.png").exists()
    main(["eval", str(run_dir)])
    assert "other classes" in capsys.readouterr().out


@pytest.mark.quick
def test_a_head_has_one_output_for_each_class_that_occurs(corners, tmp_path, capsys):
    """Teacher and student number the classes alike, and one line says how."""
    with np.load(corners) as file:
        ids = np.array([3, 10, 57, 200])[file["label"]]
        np.savez(tmp_path / "ids.npz", image=file["image"], label=ids)
    config = Config(dataset=str(tmp_path / "ids.npz"), devices=1)
    setting, plain = (
        prepare(dataclasses.replace(config, dataset=path), teach=True)
        for path in (config.dataset, corners)
    )
    for layers in (setting.places.student, setting.places.teacher):
        assert layers["classifier"].shape == (1, 4)
    np.testing.assert_array_equal(
        setting.dataset.train.label, plain.dataset.train.label
    )
    show_classes(plain)
    assert not capsys.readouterr().out
    show_classes(setting)
    out = capsys.readouterr().out
    assert out == f"classes 0..3 are the labels 3, 10, 57, 200 of {config.dataset}\n"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["0", "1", "2", "3"], False),
        (None, False),  # of an older version
        (["3", "10", "57", "200"], True),
        (["0", "1", "3", "2"], True),
    ],
)
def test_a_teacher_whose_classes_have_other_names_is_named(
    names, warned, corners, tmp_path
):
    student, path = "hintjax.models:plain_wide", tmp_path / "run"
    run_dir = finished_run(path, models.plain_wide(classes=4), 4, student=student)
    result = {"classes": 4} | ({} if names is None else {"class_names": names})
    (path / "result.json").write_text(json.dumps(result))
    config = Config(dataset=corners, teacher=run_dir, teacher_at_least=0.0, devices=1)
    setting = prepare(config, teach=True)
    expect = pytest.warns(
        UserWarning, match=r"is named (3|2), and class \d of .*corners"
    )
    with expect if warned else contextlib.nullcontext():
        check_teacher(setting, setting.teacher.init(jax.random.key(0), setting.inputs))


@pytest.mark.quick
def test_floats_are_read_in_the_range_of_the_config(
    corners, tmp_path, capsys, unchecked
):
    path = tmp_path / "floats.npz"
    with np.load(corners) as file:
        np.savez(path, image=file["image"] / 255, label=file["label"])
    command = ("distill", "--dataset", path, "--run-dir", tmp_path / "run")
    assert "(--range 0..1)" in refused(capsys, *command, "--method", "kd")
    config = Config(dataset=str(path), method="backprop", range="0..1", devices=1)
    plain = dataclasses.replace(config, dataset=corners, range=None)
    got, want = (prepare(one).dataset.train for one in (config, plain))
    np.testing.assert_array_equal(got.image, want.image)
