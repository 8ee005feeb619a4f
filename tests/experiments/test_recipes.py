"""Every method by its name in the command: where it attaches, and in which stages."""

import json
import re
from pathlib import Path

import jax
import pytest

from hintjax import methods
from hintjax.cli import main
from hintjax.experiments import recipes
from hintjax.experiments.config import Config
from hintjax.experiments.finished import load_student
from hintjax.experiments.listing import ATTACHED, markdown
from hintjax.experiments.methods_table import METHODS, RECIPES
from hintjax.experiments.phases import check
from hintjax.experiments.recipes import backprop
from hintjax.experiments.run import load_deployed
from hintjax.experiments.setting import prepare
from hintjax.networks import Wants

GROUPS = ("group1", "group2", "group3")
SUMS = tuple(f"{group}/block1/sum" for group in GROUPS)
POOL = ("pool",)
MAPS = ("pool:in",)
# The phases of a recipe, and what each wants to see of the student.
PHASES = {
    "ab": {"activation_boundary": SUMS, "backprop": ()},
    "at": {"attention_transfer": GROUPS},
    "backprop": {"backprop": ()},
    "catkd": {"class_attention": MAPS},
    "cc": {"correlation_congruence": POOL},
    "crd": {"crd": POOL},
    "crd_in_batch": {"crd_in_batch": POOL},
    "crd_shared": {"crd_shared": POOL},
    "cwd": {"channel_wise": GROUPS[2:]},
    "dense_matching": {"dense_matching": GROUPS[2:], "backprop": ()},
    "dist": {"dist": ()},
    "dkd": {"decoupled_kd": ()},
    "fitnet": {"fitnets_jointly": GROUPS[1:2]},
    "fitnets": {"fitnets": GROUPS[:1], "soft_targets": ()},
    "fsp": {"fsp": ("stem", *GROUPS), "backprop": ()},
    "ft": {"before factor_transfer": GROUPS[2:], "factor_transfer": GROUPS[2:]},
    "gram": {"token_gram": GROUPS},
    "hard": {"hard_labels": ()},
    "kd": {"kd": ()},
    "mgd": {"masked_generation": GROUPS[2:]},
    "nst": {"selectivity": GROUPS},
    "ofd": {"overhaul": SUMS},
    "orthogonal_projection": {"orthogonal_projection": POOL, "backprop": ()},
    "phi_s": {"dense_matching": GROUPS[2:], "backprop": ()},
    "pkt": {"probability_transfer": POOL},
    "queue_similarity": {"queue_similarity": POOL, "backprop": ()},
    "review": {"review": (*GROUPS, *POOL)},
    "rkd": {"relational": POOL},
    "simkd": {"simkd": MAPS},
    "soft": {"soft_targets": ()},
    "sp": {"similarity_preserving": GROUPS[2:]},
    "std_kd": {"standardized_kd": ()},
    "vid": {"variational": GROUPS},
}
BLOCKS = ("block1", "block2", "block4")
SCORES = tuple(f"{block}/attention/scores" for block in BLOCKS)
RELATIONS = tuple(f"block4/attention/{name}" for name in ("query", "key", "value"))
TRANSFORMERS = {
    "cosine": {"cosine": BLOCKS[2:]},
    "minilm": {"minilm": RELATIONS, "backprop": ()},
    "pkd": {"patient": BLOCKS[:2]},
    "tinybert": {"tinybert": (*BLOCKS, *SCORES), "soft_targets": ()},
}
RESNETS = {"student": "hintjax.models:resnet8", "teacher": "hintjax.models:resnet8"}


@pytest.fixture(scope="module")
def setting(corners):
    config = Config(method="kd", dataset=corners, devices=1, **RESNETS)
    return prepare(config, teach=True)


def test_every_method_has_a_name_in_the_command():
    makers = {
        name for name in methods.__all__ if name.islower() and name not in HELPERS
    }
    named = {
        recipe.method.__name__ for recipe in RECIPES.values() if recipe is not backprop
    }
    assert named == makers
    assert set(PHASES) | set(TRANSFORMERS) == set(RECIPES)


# What is exported beside methods: schedules, masks, sizes, parts of methods, and the
# forms of KD that belong to other tasks than classification.
HELPERS = {
    *("binary_kd", "dense_kd", "regression_kd"),
    *("crd_bytes", "explained_variance", "flows", "lambda_decay", "masked_channels"),
    *("masked_positions", "paraphrase", "reused_classifier", "warm_up"),
}


def test_the_page_of_methods_is_current(capsys):
    """Write its table anew with `hintjax methods --markdown` when this fails."""
    main(["methods", "--markdown"])
    assert capsys.readouterr().out.strip() == markdown()
    file = Path(methods.__file__).parent / "README.md"
    assert markdown() in file.read_text()


def test_the_row_of_every_method_is_complete():
    cells = [line.strip("| ").split(" | ") for line in markdown().splitlines()]
    assert all(len(row) == len(cells[0]) and all(row) for row in cells)
    assert {named.recipe.where for named in METHODS.values()} == set(ATTACHED)
    assert [*METHODS] == sorted(METHODS)
    years = re.compile(r"^[A-Z][\w, ]+(?:et al\.)? \d{4}, \w")
    for named in METHODS.values():
        assert years.match(named.reference)
        assert not (named.transfers + named.reference).endswith(".")


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200])
def test_the_table_of_methods_fits_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    main(["methods"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= min(max(width, 80), 120)
    first = [line.split()[0] for line in lines if line[:1].strip()]
    assert [name for name in first if name in RECIPES] == [*METHODS, "backprop"]
    assert "…" not in out and "`at" not in out


@pytest.fixture(scope="module")
def transformers(corners):
    models = dict.fromkeys(("student", "teacher"), "hintjax.models:vit_micro")
    config = Config(method="kd", dataset=corners, devices=1, **models)
    return prepare(config, teach=True)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_traces_and_attaches_where_its_authors_did(
    name, setting, transformers
):
    setting = transformers if name in TRANSFORMERS else setting
    phases = check(setting, RECIPES[name])
    found = {phase.name: phase.method.student.hints for phase in phases}
    assert found == {**PHASES, **TRANSFORMERS}[name]
    assert sum(phase.epochs for phase in phases) == setting.config.epochs
    assert [phase.hints_only for phase in phases] == [False] * len(phases) or (
        [phase.hints_only for phase in phases] == [True, False]
    )


@pytest.mark.parametrize("name", ["at", "fitnets"])
@pytest.mark.parametrize("turned", [False, True])
def test_tokens_are_compared_with_maps_on_their_grid(name, turned, corners):
    models = [f"hintjax.models:{model}" for model in ("vit_micro", "resnet8")]
    student, teacher = reversed(models) if turned else models
    given = {"dataset": corners, "student": student, "teacher": teacher, "devices": 1}
    mixed = prepare(Config(method=name, **given), teach=True)
    assert mixed.places.class_tokens == ((0, 1) if turned else (1, 0))
    check(mixed, RECIPES[name])


def test_pairs_that_are_given_are_used(setting):
    places = setting.places._replace(pairs=(("group2", "group3"),))
    (phase,) = recipes.AT(setting.config, places, 4)
    assert phase.method.student.hints == ("group2",)
    assert phase.method.teacher.hints == ("group3",)


def test_layers_before_the_relu_must_be_known(setting):
    places = setting.places._replace(preactivations=({}, {}))
    with pytest.raises(ValueError, match=r"recipe: expected .*group1.* --pairs"):
        recipes.AB(setting.config, places, 4)


def test_one_pair_is_one(setting):
    places = setting.places._replace(pairs=(("pool", "pool"), ("group1", "group1")))
    with pytest.raises(ValueError, match="recipe: expected one pair"):
        recipes.CRD(setting.config, places, 4)


def run(corners, run_dir, *options):
    main(
        [
            *("distill", "--dataset", corners, "--run-dir", str(run_dir)),
            *("--batch-size", "16", "--epochs", "2", "--teacher-epochs", "1"),
            *("--devices", "1"),
            *("--student", RESNETS["student"], "--teacher", RESNETS["teacher"]),
            *options,
        ]
    )
    return json.loads((run_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def teacher(corners, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "kd"
    run(corners, run_dir, "--method", "kd")
    return ("--teacher", str(run_dir / "teacher"))


@pytest.mark.parametrize("name", ["crd", "ft"])
def test_methods_of_many_shapes_train_by_name(name, corners, teacher, tmp_path, capsys):
    """With a memory bank; a stage on the teacher alone. All others are long."""
    found = run(corners, tmp_path / "run", "--method", name, *teacher)
    assert 0 <= found["test/accuracy"] <= 1
    shown = capsys.readouterr().out
    assert ("MiB for the memory bank" in shown) == (name == "crd")
    assert f"{RECIPES[name].method.__name__}: student " in shown
    main(["eval", str(tmp_path / "run")])
    assert f"test accuracy: {found['test/accuracy']:.4f}" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES)
def test_every_method_trains_by_name(name, corners, teacher, tmp_path):
    if name in TRANSFORMERS:
        vit = "hintjax.models:vit_micro"
        teacher = ("--student", vit, "--teacher", vit, "--teacher-at-least", "0")
    found = run(corners, tmp_path / "run", "--method", name, *teacher)
    assert 0 <= found["test/accuracy"] <= 1


def test_a_student_with_parts_is_shipped_with_them(corners, teacher, tmp_path, capsys):
    path = tmp_path / "run"
    found = run(corners, path, "--method", "simkd", *teacher)
    main(["eval", str(path)])
    assert f"test accuracy: {found['test/accuracy']:.4f}" in capsys.readouterr().out
    config = Config(
        method="simkd", dataset=corners, student=RESNETS["student"], devices=1
    )
    config = Config(**{**vars(config), "teacher": teacher[1]})
    setting = prepare(config, teach=True)
    network, variables = load_deployed(setting, path, RECIPES["simkd"])
    shown, _ = network.apply(
        *variables, jax.numpy.ones((2, 8, 8, 1)), wants=Wants(output=True), train=False
    )
    assert shown.output.shape == (2, 4)
    with pytest.raises(ValueError, match="that stands alone, got one of simkd"):
        load_student(path)


def test_kd_can_be_one_more_term(setting):
    config = Config(**{**vars(setting.config), "kd_weight": 1.0})
    (phase,) = recipes.CRD(config, setting.places, 4)
    assert phase.method.student.output
    assert phase.method.teacher.output
