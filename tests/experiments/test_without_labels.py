"""Runs without labels or with few of them, the page about them, and `probe`."""

import functools
import json
import re
import runpy
import shlex
import sys
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from hintjax._checks import Refusal
from hintjax.cli import main
from hintjax.data import Files, fits_on_device, sources
from hintjax.experiments import config as configs
from hintjax.experiments import recipes, run
from hintjax.experiments.attachment import Places
from hintjax.experiments.config import Config
from hintjax.experiments.distill import show_costs
from hintjax.experiments.finished import load_student
from hintjax.experiments.methods_table import RECIPES
from hintjax.experiments.plan import planned
from hintjax.experiments.probing import layer_of
from hintjax.experiments.setting import prepare
from hintjax.experiments.standardizing import check_varies, with_standardizations
from hintjax.losses import feature_moments, standardize_features
from hintjax.method import Context
from hintjax.models import VisionTransformer
from hintjax.models.blocks import GlobalAveragePool
from hintjax.networks import Features, Wants
from hintjax.training import load_tree, streamed

PAGE = Path(__file__).parents[2] / "hintjax" / "data" / "README.md"
# Methods that read the label of every example.
EVERY_LABEL = {"crd", "crd_in_batch", "crd_shared", "dkd"}


class Net(nn.Module):
    """Three maps, the pooled vector, outputs."""

    width: int
    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        for number in range(1, 4):
            x = nn.relu(nn.Conv(self.width, (1, 1), name=f"group{number}")(x))
        x = GlobalAveragePool(name="pool")(x)
        return nn.Dense(self.classes, name="classifier")(x)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The folders of the page, and networks to import in place of ResNets."""
    path = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for at in range(60):
        image = random.integers(0, 90, (10, 12, 3), dtype=np.uint8)
        image[..., at % 2] += 120
        name = f"{('rose', 'iris')[at % 2]}/{at:02}.png" if at < 40 else f"{at}.png"
        file = path / ("flowers" if at < 40 else "photos") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    made = types.ModuleType("small_networks")
    made.resnet8 = lambda classes: Net(3, classes)
    made.resnet20 = lambda classes: Net(8, classes)
    made.vit = lambda classes: VisionTransformer(4, 8, 2, 2, classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "small_networks", made)
        patch.chdir(path)
        yield path


def small(command):
    """The arguments of a command of the page, for small networks and few epochs."""
    command = command.replace("hintjax.models", "small_networks").replace("96", "4")
    _, *words = shlex.split(command, comments=True)
    if words[0] == "distill":
        words += ["--epochs", "2", "--batch-size", "8", "--devices", "1"]
        words += ["--teacher-at-least", "0"]
    return words


def blocks(language):
    """The blocks of the page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def page(folder):
    """Runs all commands of the page once."""
    (text,) = blocks("sh")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line[0] != "#"]
    shown = len(PAGE.read_text().split("```")) > 4 and "".join(blocks("(?:sh|python)"))
    assert len(shown.splitlines()) <= 40
    for line in lines:
        main(small(line))
    return lines


def result(name):
    return json.loads(Path("runs", name, "result.json").read_text())


def test_the_page_runs_and_its_student_learns_without_labels(page, capsys):
    found = result("student")
    assert found["class_names"] == [] and found["classes"] == 2
    for split in ("validation", "test"):
        assert np.isfinite(found[f"{split}/loss"])
        assert found[f"{split}/dense_matching/r2"] <= 1
        assert f"{split}/accuracy" not in found
    main(["eval", "runs/student"])
    shown = capsys.readouterr().out
    assert f"test dense_matching/r2: {found['test/dense_matching/r2']:.4g}" in shown
    network, variables = load_student("runs/student")
    wants = Wants(output=True)
    image = jnp.zeros((1, 4, 4, 3))
    features, _ = network.apply(*variables, image, wants=wants, train=False)
    assert features.output.shape == (1, 2)
    assert 0 <= result("few")["test/accuracy"] <= 1


def test_the_code_of_the_page_runs(folder):
    (code,) = blocks("python")
    Path("page.py").write_text(code.replace("96", "4"))
    scope = runpy.run_path("page.py")
    assert (scope["flowers"].train.label >= 0).sum() == 20


def test_a_probe_shows_student_teacher_and_untrained_student(page, capsys):
    found = json.loads(Path("runs", "student", "probe.json").read_text())
    assert found["dataset"] == "flowers" and found["classes"] == 2
    names = [(row["network"], row["labels"]) for row in found["rows"]]
    counts = [2, 3, found["train"]]
    networks = ("student", "teacher", "untrained student")
    assert names == [(name, count) for name in networks for count in counts]
    for row in found["rows"]:
        assert 0 <= row["knn"] <= 1 and 0 <= row["linear"] <= 1
    # The two classes differ in their mean color.
    whole = {row["network"]: row for row in found["rows"][2::3]}
    assert whole["teacher"]["linear"] == whole["teacher"]["knn"] == 1
    main(["probe", "runs/few", "--k", "5", "--student-layer", "group3"])
    shown = capsys.readouterr().out
    assert "group3" in shown and "k 5, temperature 0.07" in shown
    for options, match in {
        ("runs/student",): "labels of classes, got no labels in photos",
        ("runs/few", "--dataset", "digits"): r"images of \(4, 4, 3\)",
    }.items():
        with pytest.raises(SystemExit):
            main(["probe", *options])
        assert re.search(match, capsys.readouterr().err)


def test_a_probe_reads_what_the_head_reads():
    vector, grid = (jax.ShapeDtypeStruct(s, float) for s in ((1, 8), (1, 4, 4, 8)))
    maps = {"conv1": grid, "conv2": grid}
    assert layer_of({**maps, "pool": vector, "classifier": vector}) == "pool"
    assert layer_of({**maps, "classifier": vector}) == "conv2"
    assert layer_of({"classifier": vector}) is None


def test_layers_are_suggested_without_labels(page, tmp_path, capsys):
    picture = tmp_path / "similar.png"
    capsys.readouterr()
    main(["suggest", "runs/student", "--images", "16", "--picture", str(picture)])
    out = capsys.readouterr().out
    columns = re.split(r"  +", out.splitlines()[0])
    assert columns[4:] == ["regressor", "CKA", "R^2", "guided layer"]
    assert "probe" not in out and "chance" not in out and "labels" not in out
    assert re.search(r"^(suggested: group|No layer passes)", out, re.MULTILINE)
    assert picture.exists()


def test_a_run_does_not_resume_with_other_images(page, capsys):
    main(["resume", "runs/student"])
    Image.new("RGB", (12, 10)).save("photos/45.png")
    with pytest.raises(SystemExit):
        main(["resume", "runs/student"])
    assert "images" in capsys.readouterr().err


# Images that do not fit into memory


@pytest.fixture
def little_memory(monkeypatch):
    """A machine that neither decodes the folders in memory nor on the device."""
    fits = functools.partial(fits_on_device, limit=0)
    monkeypatch.setattr(sources, "IN_MEMORY", 100)
    for module in (sources, run):
        monkeypatch.setattr(module, "fits_on_device", fits)
    read = []
    of_files = Files.read

    def counted(files, index):
        read.append(len(index))
        return of_files(files, index)

    monkeypatch.setattr(Files, "read", counted)
    return read


def again(page, name, *more):
    """Trains a run of the page once more, and returns its directory."""
    (line,) = [line for line in page if line.endswith(f"--run-dir runs/{name}")]
    run_dir = f"runs/again_{name}{len(more)}"
    main([*small(line), "--run-dir", run_dir, *more])
    return run_dir


def without_times(name):
    found = json.loads(Path(name, "result.json").read_text())
    return {key: value for key, value in found.items() if key not in TIMES}


TIMES = {"seconds", "spent"}


@pytest.mark.bits
@pytest.mark.parametrize(
    "name", ["teacher", pytest.param("few", marks=pytest.mark.long)]
)
def test_a_folder_in_files_trains_the_same_student(page, name, little_memory):
    run_dir = again(page, name)
    assert set(little_memory) > {8}  # batches of training, and larger ones
    ours, theirs = (load_tree(Path(of, "student")) for of in (run_dir, f"runs/{name}"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert without_times(run_dir) == without_times(f"runs/{name}")
    main(["resume", run_dir])


@pytest.mark.long
def test_a_folder_in_files_is_probed_alike(page, little_memory):
    def probed():
        main(["probe", "runs/few"])
        return Path("runs/few/probe.json").read_text()

    on_disk = probed()
    assert len(little_memory) > 3
    little_memory.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "IN_MEMORY", 2**30)
        assert probed() == on_disk
    assert not little_memory


@pytest.mark.bits
@pytest.mark.long
def test_a_cache_of_a_folder_in_files_is_that_of_the_folder_in_memory(page, request):
    options = ("--cache", "--pad", "1", "--views", "2")
    whole = again(page, "student", *options)
    request.getfixturevalue("little_memory")
    run_dir = again(page, "student", *options, "--cache-dtype", "float32")
    ours, theirs = (
        b"".join(path.read_bytes() for path in sorted(Path(of).glob("cache/rows*")))
        for of in (run_dir, whole)
    )
    assert ours == theirs
    ours, theirs = (load_tree(Path(of, "student")) for of in (run_dir, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_file_that_vanishes_ends_the_run_with_a_sentence(
    page, little_memory, monkeypatch, capsys
):
    def removing(*arguments):
        Path("photos/50.png").rename("photos/50.bak")
        return streamed(*arguments)

    monkeypatch.setattr(run, "streamed", removing)
    with pytest.raises(SystemExit) as stopped:
        again(page, "student", "--seed", "1")
    Path("photos/50.bak").rename("photos/50.png")
    assert stopped.value.code == 2
    assert "the file '50.png' of photos as it was at the start" in (
        capsys.readouterr().err
    )


# Recipes


def options(**given):
    usual = {
        "dataset": "photos",
        "size": 4,
        "teacher": "runs/teacher",
        "student": "small_networks:resnet8",
        "devices": 1,
        "batch_size": 8,
    }
    return configs.check(Config(**usual | given))


def test_recipes_without_labels_have_no_task_or_say_that_they_need_labels(corners):
    models = dict.fromkeys(("student", "teacher"), "hintjax.models:resnet8")
    config = Config(method="kd", dataset=corners, devices=1, **models)
    setting = prepare(config, teach=True)
    for labels in (0, 10):
        places = setting.places._replace(labels=labels)
        refused = set()
        for name, recipe in RECIPES.items():
            if name in ("cosine", "minilm", "pkd", "tinybert"):
                continue  # they are for transformers
            try:
                phases = recipe(config, places, 4)
            except Refusal as error:
                assert re.search("labels of .* needs, got (none|10 of 86)", f"{error}")
                refused.add(name)
                continue
            assert sum(phase.epochs for phase in phases) == config.epochs
            for phase in phases:
                assert -1 in phase.method.ignored
                learned = phase.method.student.output or phase.method.student.params
                assert labels or phase.hints_only or learned or name == "simkd"
                if name == "simkd":
                    shown = metrics_of(phase.method, setting)
                    assert ("simkd/accuracy" in shown) == bool(labels)
        assert refused == (EVERY_LABEL if labels else EVERY_LABEL | {"backprop"})


def metrics_of(method, setting):
    """The names of the metrics of a method, from shapes alone."""

    def shown(key):
        image = jnp.zeros((2, *setting.inputs.shape[1:]))
        features = []
        for network, wants in (
            (setting.student, method.student),
            (setting.teacher, method.teacher),
        ):
            variables = network.init(key, image)
            features += [network.apply(*variables, image, wants=wants, train=False)[0]]
        params, memory = method.init(key, *features, None)
        batch, context = {"label": jnp.array([0, -1])}, Context(key, jnp.int32(0), True)
        return method.apply(params, memory, *features, batch, context)[2]

    return set(jax.eval_shape(shown, jax.random.key(0)))


def test_the_task_counts_examples_with_a_label_as_a_batch_of_them():
    output, label = jnp.eye(3)[:2].repeat(4, 0), jnp.array([0, -1, 1, -1, 1, 2, -1, -1])
    places = Places({}, {}, examples=80, labels=40)
    term = recipes.kinds._task(Config(), places, 0.5)
    context = Context(jnp.zeros(2, jnp.uint32), jnp.int32(0), True)
    features = Features(output=output)
    values, _, metrics = term.method.apply(
        {}, {}, features, Features(), {"label": label}, context
    )
    known = np.flatnonzero(label >= 0)
    loss = optax.softmax_cross_entropy_with_integer_labels
    want = loss(output[known], label[known])
    assert float((term.weight * values).mean()) == pytest.approx(0.5 * want.mean())
    right = output[known].argmax(-1) == label[known]
    assert float(metrics["accuracy"]) == pytest.approx(right.mean())


def test_the_student_has_the_outputs_of_a_teacher_from_a_file(folder):
    np.savez("images.npz", image=np.zeros((40, 12, 12, 3), np.uint8))
    file = str(PAGE.parents[2] / "tests" / "fixtures" / "timm_vit.safetensors")
    given = {"dataset": "images.npz", "teacher": "small_networks:vit", "weights": file}
    setting = prepare(options(method="phi_s", size=None, **given), teach=True)
    assert setting.dataset.classes == 5 and setting.places.same_outputs
    assert setting.places.student["classifier"].shape == (1, 5)


def test_a_weight_of_the_task_needs_labels(page):
    config = options(method="kd", task_weight=1.0)
    with pytest.raises(Refusal, match=r"the task \(--task-weight\) needs, got none"):
        show_costs(config)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"method": "backprop"}, "labels in photos, to train without a teacher"),
        (
            {"method": "kd", "teacher": "small_networks:resnet20"},
            "labels in photos, to train the teacher .* Name a trained teacher",
        ),
        ({}, "labels in photos, to compare methods, got none. Name one method"),
        ({"method": "dkd"}, "labels of all training examples, which decoupled_kd"),
        ({"method": "kd", "labels": 3}, r"labels of 'photos', .* got none"),
    ],
)
def test_what_needs_labels_says_so_before_it_trains(given, match, page):
    with pytest.raises(Refusal, match=match):
        show_costs(options(**given))


def test_other_tasks_need_every_label():
    with pytest.raises(Refusal, match="no labels option for regression"):
        options(task="regression", labels=3)


def test_phi_s_standardizes_the_features_of_the_teacher(page):
    config = options(method="phi_s")
    setting = prepare(config, teach=True)
    _, teacher = load_student("runs/teacher")
    plan = planned(config).recipes
    ready = with_standardizations(setting, plan, teacher)
    ((hint, transform),) = ready.places.standardizations.items()
    assert hint == "group3"
    image = jnp.asarray(setting.dataset.train.image / 255, jnp.float32)
    image = (image - setting.dataset.standardize.mean) / setting.dataset.standardize.std
    wants = Wants(hints=(hint,))
    features, _ = setting.teacher.apply(*teacher, image, wants=wants, train=False)
    moments = feature_moments(standardize_features(features.hints[hint], transform))
    variance = jnp.diag(moments.scatter) / (moments.count - 1)
    np.testing.assert_allclose(moments.mean, 0, atol=1e-4)
    np.testing.assert_allclose(variance, 1, rtol=1e-3)
    (phase,) = plan[0](config, ready.places, 2)
    assert phase.hints_only and phase.epochs == config.epochs
    assert with_standardizations(setting, [recipes.DENSE], teacher) is setting


@pytest.mark.parametrize("value", [0.0, 0.007, np.nan])
def test_constant_features_are_not_standardized(value):
    moments = feature_moments(jnp.full((99, 4), value))
    with pytest.raises(Refusal, match="layer conv9 that vary between images, got a"):
        check_varies("conv9", moments)


@pytest.mark.long
@pytest.mark.parametrize("name", ["kd", "phi_s", "queue_similarity", "simkd", "ft"])
def test_methods_train_on_images_alone(name, page, tmp_path):
    given = {"--size": "4", "--student": "small_networks:resnet8", "--devices": "1"}
    given |= {"--batch-size": "8", "--epochs": "2", "--run-dir": str(tmp_path / "run")}
    words = [word for pair in given.items() for word in pair]
    teacher = ["--teacher", "runs/teacher"]
    main(["distill", "--method", name, "--dataset", "photos", *teacher, *words])
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert np.isfinite(found["test/loss"])
    assert not any(key.endswith("/accuracy") for key in found)
