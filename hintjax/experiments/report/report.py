"""The report of a run or of a comparison: report.html, made from its files alone.

It needs no data, no networks and no network access. Pictures are drawn by matplotlib; a
report without it has none, and says so.
"""

import dataclasses
import importlib.util
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hintjax._checks import Refusal, message
from hintjax.experiments import config as configs
from hintjax.experiments.comparison import REPORT
from hintjax.experiments.comparison_picture import ATTENTION, COMPARISON
from hintjax.experiments.comparison_table import differences, unit_of
from hintjax.experiments.config import Config
from hintjax.experiments.finished import RESULT
from hintjax.experiments.report import page
from hintjax.experiments.report.facts import FACTS, SHOWN
from hintjax.experiments.report.page import Html
from hintjax.experiments.statistics import proportion, summary
from hintjax.experiments.tasks import TASKS, Task
from hintjax.training import read_metrics
from hintjax.training.remarks import read_remarks
from hintjax.training.run_directory import replace_text

PAGE = "report.html"
_LISTED = 12  # confusions that are listed of many classes
_NO_PICTURES = (
    "This report has no pictures, because matplotlib is not installed. Install it with "
    "`pip install hintjax[viz]`, and make the report again with `hintjax report`."
)
Lines = Sequence[Mapping[str, Any]]
Curve = tuple[list[float | int], list[float | int]]
Curves = dict[str, Curve]
Points = dict[str, tuple[float | int, float | int]]


class Ran(NamedTuple):
    """A finished run, as its files have it.

    Attributes:
        name: name of the run.
        path: run directory.
        config: config of the run.
        result: contents of result.json.
        facts: contents of facts.json; empty if there is no such file.
        lines: lines of metrics.jsonl.
    """

    name: str
    path: Path
    config: Config
    result: Mapping[str, Any]
    facts: Mapping[str, Any]
    lines: Lines

    @property
    def task(self) -> Task:
        """The task of the run."""
        return TASKS[self.config.task]

    @property
    def score(self) -> float:
        """The metric of the task on the test split; nan without labels."""
        return self.result.get(f"test/{self.task.name}", math.nan)


def write_report(run_dir: Path) -> Path:
    """Writes report.html of a finished run or comparison.

    Args:
        run_dir: its directory.

    Returns:
        The path of the report.

    Raises:
        Refusal: if the run or the comparison is not finished.
    """
    compared = run_dir / REPORT
    made = _of_comparison(run_dir) if compared.exists() else _of_run(read_run(run_dir))
    replace_text(run_dir / PAGE, made)
    return run_dir / PAGE


def write_comparison(run_dirs: Sequence[Path], file: Path) -> Path:
    """Writes one report that compares finished runs.

    Args:
        run_dirs: the run directories, of runs with one dataset and one task.
        file: the file of the report.

    Returns:
        The path of the report.

    Raises:
        Refusal: if a run is not finished, or if they differ in dataset or task.
    """
    runs = [read_run(path) for path in run_dirs]
    for field in ("dataset", "task"):
        found = list(dict.fromkeys(getattr(run.config, field) for run in runs))
        if len(found) > 1:
            do = "Compare runs of one test split, or make a report of each."
            raise Refusal(message("report", f"runs of one {field}", f"{found}", do))
    replace_text(file, _of_runs(_renamed(runs)))
    return file


def read_run(run_dir: Path) -> Ran:
    """Reads the files of a finished run.

    Args:
        run_dir: run directory.

    Raises:
        Refusal: if the run is not finished.
    """
    config = configs.load(run_dir)
    if not (run_dir / RESULT).exists():
        if (run_dir / REPORT).exists():
            do = "Name runs in it, such as KD/rate0.001-seed0."
            got = f"the comparison {run_dir}"
            raise Refusal(message("report", "runs", got, do))
        do = f"Finish it with `hintjax resume {run_dir}`."
        raise Refusal(message("report", "a finished run", f"{run_dir}", do))
    result, facts = (
        json.loads(path.read_text()) if path.exists() else {}
        for path in (run_dir / RESULT, run_dir / FACTS)
    )
    lines = read_metrics(run_dir)
    return Ran(run_dir.name, run_dir, config, result, facts, lines)


def _renamed(runs: Sequence[Ran]) -> list[Ran]:
    """The runs with as much of their paths as tells them apart."""
    names = [run.name for run in runs]
    return [
        run._replace(name=run.name if names.count(run.name) == 1 else str(run.path))
        for run in runs
    ]


# The three reports


def _of_run(run: Ran) -> str:
    """The report of one run."""
    config, task = run.config, run.task
    title = f"{config.method} on {_dataset(config)}: {_shown(task, run.score)}"
    return page.page(
        title,
        _warnings(run.path),
        page.section("What was run", _what(run)),
        page.section("Results", _results(run)),
        page.section("Curves", *_curves(run)),
        page.section("Classes", *_classes(run)),
        page.section("Attention maps", _file(run.path / ATTENTION, _ATTENTION)),
        page.section("Accuracy and size", _against_size(task, _points(run)))
        if task.larger
        else Html(""),
        page.section("Configuration", _configuration(config)),
        _without_pictures(),
    )


def _of_comparison(run_dir: Path) -> str:
    """The report of a comparison."""
    report = json.loads((run_dir / REPORT).read_text())
    config, task = configs.load(run_dir), TASKS[report.get("task", Config.task)]
    title = f"Comparison on {_dataset(config)}"
    runs = {
        row["arm"]: [read_run(run_dir / one) for one in row.get("runs", ())]
        for row in report["rows"]
    }
    points = {
        "teacher": (report["teacher"]["parameters"], report["teacher"][task.name]),
        **{row["arm"]: (report["parameters"], row["mean"]) for row in report["rows"]},
    }
    points = {name: at for name, at in points.items() if not math.isnan(at[1])}
    arms = [
        page.folded(name, *_curves(found[0]), *_classes(found[0]))
        for name, found in runs.items()
        if found
    ]
    return page.page(
        title,
        _warnings(run_dir),
        page.section("What was run", _what_was_compared(report, config)),
        page.section("Results", *_arms(report, task, runs)),
        page.section("Pictures", _file(run_dir / COMPARISON, "The comparison.")),
        page.section("Metric and size", _against_size(task, points)),
        page.section("Each arm, its first seed", *arms),
        page.section("Configuration", _configuration(config)),
        _without_pictures(),
    )


def _of_runs(runs: Sequence[Ran]) -> str:
    """The report that compares finished runs."""
    task, config = runs[0].task, runs[0].config
    points = {
        run.name: (run.facts["parameters"]["student"], run.score)
        for run in runs
        if run.facts and not math.isnan(run.score)
    }
    metric = {run.name: _validated(run) for run in runs}
    words = f"Validation {_words(task)} over the steps."
    differ = [
        field.name
        for field in dataclasses.fields(Config)
        if len({getattr(run.config, field.name) for run in runs}) > 1
    ]
    rows = [[name, *(_option(run.config, name) for run in runs)] for name in differ]
    return page.page(
        f"{len(runs)} runs on {_dataset(config)}",
        *(_warnings(run.path, run.name) for run in runs),
        page.section("Results", *_rows(runs)),
        page.section(
            "Curves",
            page.pictures(*_drawn(words, lambda draw: draw.curves(metric, title=words)))
            if all(metric.values())
            else Html(""),
        ),
        page.section("Metric and size", _against_size(task, points)),
        page.section(
            "Options that differ",
            page.table(("option", *(run.name for run in runs)), rows)
            if rows
            else page.paragraph("None."),
        ),
        _without_pictures(),
    )


# The parts of a report


def _what(run: Ran) -> Html:
    """The networks, their sizes, the pair, and the length of a run."""
    config, facts = run.config, run.facts
    sizes, pair = facts.get("parameters", {}), facts.get("pair")
    found: dict[str, object] = {
        "method": config.method,
        "dataset": _counted(_dataset(config), facts),
        "student": _sized(config.student, sizes.get("student")),
    }
    if "teacher" in sizes:
        found["teacher"] = _sized(config.teacher, sizes["teacher"])
        found["compression"] = f"{sizes['teacher'] / max(sizes['student'], 1):.1f} x"
    if pair:
        found["pair"] = f"{pair['guided']} = {pair['hint']}"
        found["R² of the pair"] = _r2(pair)
    phases = list(dict.fromkeys(line["stage"] for line in run.lines))
    ends = run.result["boundaries"]
    found["phases"] = ", ".join(
        f"{name} up to step {end}" for name, end in zip(phases, ends, strict=False)
    )
    found["seed"] = config.seed
    found["time"] = f"{run.result['seconds']:.1f} s of training"
    spent = [f"{name} {s:.1f} s" for name, s in run.result.get("spent", {}).items()]
    found["beside training"] = ", ".join(spent)
    found |= _machine(facts.get("machine", {}))
    return page.values({name: words for name, words in found.items() if words != ""})


def _results(run: Ran) -> Html:
    """The metrics of a run at its end."""
    task, classes, teacher = (
        run.task,
        run.facts.get("classes"),
        run.facts.get("teacher"),
    )
    found: dict[str, object] = {
        f"test {_words(task)}": f"{_shown(task, run.score)}{_interval(classes)}",
        f"validation {_words(task)}": _shown(
            task, run.result.get(f"validation/{task.name}", math.nan)
        ),
    }
    if classes:
        found["calibration error (ECE)"] = f"{classes['ece']:.4f}"
    if teacher:
        right = teacher["right"] / max(teacher["examples"], 1)
        words = f"{_shown(task, right)}{_interval(teacher)}, ECE {teacher['ece']:.4f}"
        found["test accuracy of the teacher"] = words
    others = {
        name: f"{value:.5g}"
        for name, value in run.result.items()
        if name.startswith("test/") and name != f"test/{task.name}"
    }
    return page.joined(
        page.values(found),
        page.paragraph(_SPREAD, "note") if classes else Html(""),
        page.folded("All terms and metrics on the test split", page.values(others)),
    )


_SPREAD = (
    "The interval is Wilson's 95 % interval for the number of test examples. It does "
    "not say how much another seed would change the result."
)
_ATTENTION = (
    "Attention maps of the pair on test images. Red in the difference: the student "
    "looks more; blue: it looks less."
)


def _arms(
    report: Mapping[str, Any], task: Task, runs: Mapping[str, Sequence[Ran]]
) -> list[Html]:
    """The table of the arms, and the differences with their verdicts."""
    rows = []
    known = report["teacher"][task.name]
    rows.append(
        ["teacher", "other classes" if math.isnan(known) else _shown(task, known)]
    )
    for row in report["rows"]:
        spread = summary(row["seeds"])
        interval = _ends(task, spread.low, spread.high) if spread.count > 1 else ""
        errors = [run.facts["classes"] for run in runs[row["arm"]] if run.facts]
        ece = [one["ece"] for one in errors if one]
        rows.append(
            [
                row["arm"],
                task.shown(row["mean"]),
                interval,
                " ".join(map(task.shown, row["seeds"])),
                f"{row['trained']}/{len(row['seeds'])}",
                f"{row['r2']:.2f}",
                f"{sum(ece) / len(ece):.3f}" if ece else "",
                f"{row['rate']:g}",
                f"{row['seconds']:.1f}",
            ]
        )
    name = f"test {_words(task)}{', %' if task.larger else ''}"
    head = ("arm", name, "95 % interval", "each seed", "trained", "R²", "ECE")
    rows[0] += [""] * (len(head) + 2 - len(rows[0]))
    against = report["baseline"]
    verdicts = [
        f"{arm}: {mean} {interval}{unit_of(task)} against {against}"
        f"{f', {verdict}' if verdict else ''}."
        for arm, mean, interval, verdict in differences(report)
    ]
    return [
        page.table((*head, "rate", "seconds"), rows, f"Trained: seeds {task.above()}."),
        page.paragraph("Differences, with 95 % intervals of the paired seeds:"),
        page.points(verdicts),
    ]


def _rows(runs: Sequence[Ran]) -> list[Html]:
    """The table of finished runs."""
    task, rows = runs[0].task, []
    for run in runs:
        classes, pair = (run.facts.get(name) for name in ("classes", "pair"))
        size = run.facts.get("parameters", {}).get("student")
        rows.append(
            [
                run.name,
                run.config.method,
                run.config.student,
                "" if size is None else f"{size:,}",
                "no labels" if math.isnan(run.score) else task.shown(run.score),
                _interval(classes).strip(),
                f"{classes['ece']:.3f}" if classes else "",
                f"{pair['after']:.2f}" if pair and pair["after"] is not None else "",
                f"{run.result['seconds']:.1f}",
            ]
        )
    name = f"test {_words(task)}{', %' if task.larger else ''}"
    head = ("run", "method", "student", "parameters", name, "95 % interval", "ECE")
    return [
        page.table((*head, "R²", "seconds"), rows),
        page.paragraph(
            f"{_SPREAD} A verdict about methods needs several seeds of each: "
            f"`hintjax distill --compare A B --seeds 3`.",
            "note",
        ),
    ]


def _what_was_compared(report: Mapping[str, Any], config: Config) -> Html:
    """The networks and the machine of a comparison."""
    teacher = report["teacher"]["parameters"]
    return page.values(
        {
            "dataset": _dataset(config),
            "teacher": _sized(config.teacher, teacher),
            "student": _sized(config.student, report["parameters"]),
            "compression": f"{report['compression']:.1f} x",
            "pairs": ", ".join(
                f"{guided} = {hint}" for guided, hint in report["pairs"]
            ),
            "seeds": config.seeds,
            "epochs": config.epochs,
            **_machine(report["machine"]),
        }
    )


def _curves(run: Ran) -> list[Html]:
    """The pictures of the metrics of a run."""
    lines, ends = run.lines, run.result["boundaries"][:-1]
    terms = list(
        dict.fromkeys(
            name.removesuffix("/weighted")
            for line in lines
            for name in line
            if name.endswith("/weighted") and not name.startswith("validation/")
        )
    )
    groups: dict[str, tuple[Curves, bool]] = {
        "Each term, before its weight": (_series(lines, terms), True),
        "Each term, after its weight": (
            _series(lines, [*(f"{name}/weighted" for name in terms), "loss"]),
            True,
        ),
        "Validation: each term, before its weight": (
            _series(lines, [f"validation/{name}" for name in (*terms, "loss")]),
            True,
        ),
        f"{_words(run.task).capitalize()}": (_measured(run), False),
        "R² of the regressors": (_series(lines, _named(lines, "/r2")), False),
        "Weights of the terms": (_series(lines, _named(lines, "/weight")), False),
    }
    drawn = []
    for title, (series, logarithmic) in groups.items():
        if not series:
            continue

        def draw(pictures: Any, title=title, series=series, log=logarithmic) -> Any:
            how = {"title": title, "boundaries": ends, "logarithmic": log}
            return pictures.curves(series, **how)

        drawn += _drawn(f"{title}: {', '.join(series)}, over the steps.", draw)
    return [page.pictures(*drawn)] if drawn else []


def _classes(run: Ran) -> list[Html]:
    """The confusion matrix, or the most frequent confusions, and the calibration."""
    classes = run.facts.get("classes")
    if not classes:
        return []
    names = dict(enumerate(map(str, run.result.get("class_names", ()))))
    found = [_calibration(classes)]
    if classes["complete"]:
        count = 1 + max(max(one[:2]) for one in classes["confusions"])
        count = min(SHOWN, max(count, run.result["classes"]))
        counts = [[0] * count for _ in range(count)]
        for true, guess, n in classes["confusions"]:
            counts[true][guess] = n
        shown = [names.get(i, str(i)) for i in range(count)]
        note = "Test examples by class (rows) and predicted class (columns)."
        return [page.matrix(shown, counts, note), *found]
    most = sorted(classes["confusions"], key=lambda one: -one[2])[:_LISTED]
    rows = [
        [names.get(true, true), names.get(guess, guess), n] for true, guess, n in most
    ]
    note = "The most frequent confusions among the test examples."
    return [page.table(("class", "predicted", "examples"), rows, note), *found]


def _calibration(classes: Mapping[str, Any]) -> Html:
    """The accuracy in each bin of the confidence."""
    rows, bins = [], classes["bins"]
    for number, (count, right, confidence) in enumerate(bins):
        if count:
            ends = f"{number / len(bins):.2f} to {(number + 1) / len(bins):.2f}"
            shown = (f"{100 * x / count:.1f} %" for x in (confidence, right))
            rows.append([ends, f"{count:.0f}", *shown])
    note = (
        f"Calibration: the expected calibration error (ECE) is {classes['ece']:.4f}, "
        f"the mean distance of confidence and accuracy."
    )
    head = ("confidence", "examples", "mean confidence", "accuracy")
    return page.folded("Calibration", page.table(head, rows, note))


def _warnings(run_dir: Path, name: str = "") -> Html:
    """The warnings of a run."""
    found = read_remarks(run_dir)
    title = f"Warnings of {name}" if name else "Warnings"
    return page.section(title, page.points(found, "doubt"))


def _configuration(config: Config) -> Html:
    """All options; those that are not the default come first, unfolded."""
    changed, usual = {}, {}
    for field in dataclasses.fields(Config):
        place = usual if getattr(config, field.name) == field.default else changed
        place[field.name] = _option(config, field.name)
    return page.joined(
        page.values(changed),
        page.folded("Options with their default", page.values(usual)),
    )


def _against_size(task: Task, points: Points) -> Html:
    """The picture of the metric against the number of parameters."""
    if not points:
        return Html("")
    words = f"Test {_words(task)} against the number of parameters."
    how = {"metric": _words(task), "percent": task.larger}
    return page.pictures(*_drawn(words, lambda draw: draw.sizes(points, **how)))


def _points(run: Ran) -> Points:
    """Parameters and accuracy of teacher and student."""
    sizes, teacher = run.facts.get("parameters", {}), run.facts.get("teacher")
    points = {}
    if teacher:
        right = teacher["right"] / max(teacher["examples"], 1)
        points["teacher"] = (sizes["teacher"], right)
    if sizes and not math.isnan(run.score):
        points["student"] = (sizes["student"], run.score)
    return points


# Pictures


def drawing() -> bool:
    """Whether pictures can be drawn: matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _drawn(words: str, draw: Callable[[Any], Any]) -> list[Html]:
    """A picture as a part of the page; none without matplotlib.

    Args:
        words: the picture in words.
        draw: makes the figure, from the module of the pictures.
    """
    if not drawing():
        return []
    from hintjax.experiments.pictures import comparison as pictures

    file = io.BytesIO()
    draw(pictures).savefig(file, format="svg", metadata={"Date": None})
    return [page.image(file.getvalue(), "svg+xml", words)]


def _file(path: Path, words: str) -> Html:
    """A picture in the run directory; nothing if there is none."""
    if not path.exists():
        return Html("")
    return page.pictures(page.image(path.read_bytes(), "png", words))


def _without_pictures() -> Html:
    return Html("") if drawing() else page.paragraph(_NO_PICTURES, "doubt")


# Numbers and names


def _series(lines: Lines, names: Sequence[str]) -> Curves:
    """The values of metrics over the steps, by name, where they were reported.

    A nan stands between two phases, so that no line is drawn from one to the other.
    """
    found: Curves = {}
    for name in names:
        at, values, phase = [], [], None
        for line in lines:
            if name not in line:
                continue
            if phase not in (None, line["stage"]):
                at.append(line["step"])
                values.append(math.nan)
            phase, value = line["stage"], line[name]
            at.append(line["step"])
            values.append(math.nan if value is None else value)
        if at:
            found[name] = (at, values)
    return found


def _named(lines: Lines, end: str) -> list[str]:
    """The metrics whose names end so, without those of the validation."""
    names = dict.fromkeys(name for line in lines for name in line)
    return [
        name
        for name in names
        if name.endswith(end) and not name.startswith("validation/")
    ]


def _measured(run: Ran) -> Curves:
    """The metric of the task in training and validation."""
    names = dict.fromkeys(name for line in run.lines for name in line)
    ends = [name for name in names if name.endswith(f"/{run.task.name}")]
    return _series(run.lines, ends)


def _validated(run: Ran) -> Curve | None:
    """The metric of the task in validation."""
    series = _measured(run)
    found = [curve for name, curve in series.items() if name.startswith("validation/")]
    return found[-1] if found else None


def _dataset(config: Config) -> str:
    """The name of the dataset, without its directories."""
    return Path(config.dataset).stem if config.dataset else ""


def _counted(name: str, facts: Mapping[str, Any]) -> str:
    """A dataset with the sizes of its splits."""
    if "train" not in facts:
        return name
    return f"{name}: {facts['train']:,} training and {facts['test']:,} test examples"


def _sized(name: str, parameters: int | None) -> str:
    """A network with the number of its parameters."""
    return name if parameters is None else f"{name}: {parameters:,} parameters"


def _r2(pair: Mapping[str, Any]) -> str:
    """R^2 of a pair before and after training, in words."""
    before, after = (
        "unknown" if pair[name] is None else f"{pair[name]:.2f}"
        for name in ("before", "after")
    )
    return f"{before} before training, {after} after it"


def _machine(machine: Mapping[str, Any]) -> dict[str, str]:
    """The device and the versions, in words."""
    if not machine:
        return {}
    others = [f"{k} {v}" for k, v in machine.items() if k not in ("device", "cores")]
    device = f"{machine['device']}, {machine['cores']} CPU cores"
    return {"device": device, "versions": ", ".join(others)}


def _option(config: Config, name: str) -> str:
    """The value of an option, as text."""
    value = getattr(config, name)
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _words(task: Task) -> str:
    return task.name.replace("_", " ")


def _shown(task: Task, value: float) -> str:
    if math.isnan(value):
        return "no labels"
    return f"{task.shown(value)}{' %' if task.larger else ''}"


def _ends(task: Task, low: float, high: float) -> str:
    return f"[{task.shown(low)}, {task.shown(high)}]"


def _interval(classes: Mapping[str, Any] | None) -> str:
    """Wilson's interval of an accuracy, in percent; empty without counts."""
    if not classes:
        return ""
    low, high = proportion(classes["right"], classes["examples"])
    return f" [{100 * low:.1f}, {100 * high:.1f}]"
