"""Reports as HTML: of a real run with a hostile name, and of runs made by hand."""

import html.parser
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hintjax.cli import main
from hintjax.experiments import config as configs
from hintjax.experiments.config import Config
from hintjax.experiments.report.facts import calibration_error

EMPTY = ("meta", "img", "br", "hr", "link", "input")
# Attributes that load or open something, besides the `src` of an image.
LOADING = {"href", "srcset", "data", "poster", "action", "background", "ping"}
NAME = "<img src=x onerror=alert(1)>&amp;'\"$title.npz"


class Page(html.parser.HTMLParser):
    """The tags, the attributes and the text of a page; every tag must be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page(path):
    """A page that fetches nothing and whose tags are balanced."""
    text = Path(path).read_text(encoding="utf-8")
    for loading in ("http:", "https:", "@import", "url("):
        assert loading not in text
    found = Page(text)
    assert {name for name, _ in found.tags}.isdisjoint({"script", "link", "iframe"})
    for _, attributes in found.tags:
        assert not {name for name in attributes if name.startswith("on")}
        assert LOADING.isdisjoint(attributes)
    sources = [name for name, attributes in found.tags if "src" in attributes]
    assert set(sources) <= {"img"}
    for image in found.all("img"):
        assert image["src"].startswith("data:image/") and image["alt"]
    return found


@pytest.fixture(scope="module")
def finished(corners, tmp_path_factory):
    """A run of a dataset whose name and whose layers' user is hostile."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(corners, folder / NAME)
    run_dir = folder / "fitnets"
    main(
        [
            *("distill", "--dataset", str(folder / NAME), "--method", "fitnets"),
            *("--student", "hintjax.models:plain_wide", "--batch-size", "16"),
            *("--epochs", "2", "--teacher-epochs", "1", "--devices", "1"),
            *("--run-dir", str(run_dir)),
        ]
    )
    return run_dir


def test_a_run_leaves_one_file_that_fetches_nothing(finished):
    found = page(finished / "report.html")
    for words in ("What was run", "Results", "Curves", "Classes", "Configuration"):
        assert words in found.text
    assert "conv2 = conv2" in found.text and "before training" in found.text
    assert "hintjax.models:plain_wide: 111,940 parameters" in found.text
    assert "calibration error (ECE)" in found.text
    facts = json.loads((finished / "facts.json").read_text())
    assert sum(n for *_, n in facts["classes"]["confusions"]) == 24
    assert facts["classes"]["ece"] == calibration_error(facts["classes"]["bins"])
    assert facts["pair"]["after"] > 0


def test_a_hostile_name_of_a_dataset_is_text(finished):
    found = page(finished / "report.html")
    assert found.text.count(NAME.removesuffix(".npz")) >= 3  # two titles, and a cell
    assert all(image["src"] != "x" for image in found.all("img"))


def test_the_pictures_of_a_run_are_in_its_report(finished):
    pytest.importorskip("matplotlib")
    images = page(finished / "report.html").all("img")
    kinds = [image["src"].partition(";")[0].rpartition("/")[2] for image in images]
    assert kinds.count("png") == 1 and kinds.count("svg+xml") >= 5
    said = " ".join(image["alt"] for image in images)
    for words in ("fitnets/weighted", "validation/task", "fitnets/r2", "parameters"):
        assert words in said


def test_a_report_is_made_again_from_the_files_alone(finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    files = ("config.yaml", "result.json", "facts.json", "metrics.jsonl")
    for name in (*files, "attention.png"):
        if (finished / name).exists():
            shutil.copy(finished / name, copy / name)
    main(["report", str(copy)])
    assert f"report: {copy}/report.html" in capsys.readouterr().out
    again, before = page(copy / "report.html"), page(finished / "report.html")
    assert again.text == before.text
    assert len(again.all("img")) == len(before.all("img"))


def test_without_matplotlib_a_report_says_that_it_has_no_pictures(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("*.png", "c*s"))
    main(["report", str(copy)])
    found = page(copy / "report.html")
    assert not found.all("img")
    assert "no pictures, because matplotlib is not installed" in found.text


@pytest.mark.quick
def test_hostile_names_of_classes_are_text(by_hand, tmp_path):
    path = by_hand(tmp_path / "run", names=("<script>", "</td>&"))
    main(["report", str(path)])
    found = page(path / "report.html")
    assert "<script>" in found.text and "</td>&" in found.text


@pytest.mark.quick
def test_finished_runs_are_compared_with_their_intervals(by_hand, tmp_path, capsys):
    paths = [
        by_hand(tmp_path / "a", accuracy=0.9),
        by_hand(tmp_path / "b", "at", accuracy=0.8, learning_rate=0.01),
        by_hand(tmp_path / "more" / "b", "at", accuracy=0.7),
    ]
    (paths[1] / "warnings.txt").write_text("the term 'kd' does not move.\n")
    output = tmp_path / "all.html"
    main(["report", *map(str, paths), "--output", str(output)])
    assert f"report: {output}" in capsys.readouterr().out
    found = page(output)
    assert "[82.6, 94.5]" in found.text  # Wilson's interval of 90 in 100
    assert "learning_rate" in found.text and "batch_size" not in found.text
    assert str(paths[2]) in found.text  # two runs are named b
    assert "the term 'kd' does not move." in found.text
    assert len(found.all("img")) in (0, 2)


@pytest.mark.quick
def test_a_comparison_leaves_one_file_that_fetches_nothing(compared_by_hand, tmp_path):
    path = compared_by_hand(tmp_path / "compared", ["kd", "<b>fitnets</b>"])
    (path / "comparison.png").write_bytes(b"\x89PNG")
    main(["report", str(path)])
    found = page(path / "report.html")
    for words in ("What was run", "Results", "Each arm", "Configuration"):
        assert words in found.text
    assert "<b>fitnets</b>" in found.text and "cannot be told apart" in found.text
    (box,) = (at for at in found.all("div") if at["class"] == "box wide")
    picture = found.tags[found.tags.index(("div", box)) + 2]
    assert picture[0] == "img" and picture[1]["src"].startswith("data:image/png")


@pytest.mark.quick
def test_runs_that_cannot_be_compared_are_refused(by_hand, tmp_path, capsys):
    one = by_hand(tmp_path / "one")
    other = by_hand(tmp_path / "other", dataset="mnist")
    unfinished = tmp_path / "unfinished"
    configs.save(Config(), unfinished) if unfinished.mkdir() is None else None
    for paths, words in (
        ([one, other], "runs of one dataset, got ['digits', 'mnist']"),
        ([one, unfinished], "a finished run, got"),
        ([unfinished], "hintjax resume"),
        ([tmp_path / "nothing"], "expected a file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["report", *map(str, paths)])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err


@pytest.mark.quick
def test_many_classes_show_their_most_frequent_confusions(by_hand, tmp_path):
    path = by_hand(tmp_path / "run")
    facts = json.loads((path / "facts.json").read_text())
    pairs = [[i, i + 1, 1 + i % 7] for i in range(100)]
    facts["classes"] |= {"confusions": pairs, "complete": False}
    (path / "facts.json").write_text(json.dumps(facts))
    main(["report", str(path)])
    found = page(path / "report.html")
    assert "most frequent confusions" in found.text
    assert np.max([n for *_, n in pairs]) == 7
