import io
import json
import math
import time

import jax.numpy as jnp
import numpy as np
import pytest

from hintjax.experiments.statistics import paired, summary
from hintjax.training import metrics, progress

pytestmark = pytest.mark.quick


def lines_of(run_dir):
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_one_line_holds_every_metric_by_name_in_the_order_given(tmp_path):
    with metrics.open_metrics(tmp_path, tensorboard=False) as writer:
        values = {
            "loss": jnp.float32(0.1),
            "hint": jnp.bfloat16(1.5),
            "hint/r2": np.float64(0.25),
            "accuracy": 1,
            "finite": jnp.array(True),
        }
        writer.write(3, "hint", values)
    (line,) = lines_of(tmp_path)
    assert list(line) == ["step", "stage", "time", *values]
    assert line.pop("time") > 1.6e9
    assert line == {
        "step": 3,
        "stage": "hint",
        "loss": 0.1,  # not 0.10000000149011612
        "hint": 1.5,
        "hint/r2": 0.25,
        "accuracy": 1,
        "finite": 1,
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float16(math.nan)])
def test_what_is_not_finite_is_null(tmp_path, value):
    with metrics.open_metrics(tmp_path) as writer:
        writer.write(0, "hint", {"loss": value})
    assert metrics.read_metrics(tmp_path)[0]["loss"] is None


def test_a_written_line_is_on_disk_before_the_writer_is_closed(tmp_path):
    writer = metrics.open_metrics(tmp_path, tensorboard=False)
    writer.write(0, "hint", {"loss": 1.0})
    assert [line["step"] for line in lines_of(tmp_path)] == [0]
    writer.close()
    writer.close()


@pytest.mark.parametrize(
    "bad", [{"step": 1.0}, {"time": 1.0}, {"loss": np.zeros(3)}], ids=str
)
def test_a_bad_metric_is_named_and_nothing_is_written(tmp_path, bad):
    writer = metrics.open_metrics(tmp_path)
    with pytest.raises(ValueError, match=next(iter(bad))):
        writer.write(0, "hint", bad)
    writer.close()
    assert metrics.read_metrics(tmp_path) == []


def test_a_new_run_does_not_write_over_an_old_one(tmp_path):
    with metrics.open_metrics(tmp_path) as writer:
        writer.write(0, "hint", {"loss": 1.0})
    with pytest.raises(ValueError, match="resume="):
        metrics.open_metrics(tmp_path)


def test_resume_removes_later_and_half_written_lines(tmp_path):
    with metrics.open_metrics(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write(step, "hint", {"loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "sta')
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [10, 20, 30]
    with metrics.open_metrics(tmp_path, resume=20) as writer:
        writer.write(30, "hint", {"loss": 7.0})
    lines = lines_of(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [
        (10, 1.0),
        (20, 2.0),
        (30, 7.0),
    ]


def test_resume_of_nothing_starts_anew(tmp_path):
    with metrics.open_metrics(tmp_path / "new", resume=-1) as writer:
        writer.write(0, "hint", {})
    with metrics.open_metrics(tmp_path / "new", resume=-1):
        pass
    assert metrics.read_metrics(tmp_path / "new") == []
    assert metrics.read_metrics(tmp_path / "never written") == []


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    with metrics.open_metrics(tmp_path) as writer:
        writer.write(5, "hint", {"loss": 1.25, "hint/r2": math.nan})
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert b"hint/loss" in data and np.float32(1.25).tobytes() in data
    assert b"hint/hint/r2" not in data


def test_without_tensorboard_only_lines_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with metrics.open_metrics(tmp_path) as writer:
        writer.write(5, "hint", {"loss": 1.25})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def clock(monkeypatch, seconds_per_call):
    times = iter(np.arange(1000) * seconds_per_call)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(times)))


def test_progress_writes_plain_lines_where_there_is_no_terminal(monkeypatch):
    clock(monkeypatch, 1.0)
    out = io.StringIO()
    with progress(100, "a, seed 0", images_per_step=8, stream=out) as report:
        report(10, {"loss": 0.5, "kd": 1 / 3, "kd/weighted": 9.0})
        report(20)
        report(100, {"loss": jnp.float32(0.25)}, "b, seed 1")
    first, last = out.getvalue().splitlines()
    assert first.startswith("a, seed 0: 10/100  ETA 0:00:09  loss 0.5  kd 0.3333")
    assert first.endswith("10 steps/s  80 images/s")
    assert last.startswith("b, seed 1: 100/100  ETA 0:00:00  loss 0.25")


def test_progress_writes_a_plain_line_at_most_every_so_many_seconds(monkeypatch):
    clock(monkeypatch, 1.0)
    out = io.StringIO()
    with progress(1000, "a", every=10.0, stream=out) as report:
        for step in range(1, 51):
            report(step)
    # Each report reads the clock two or three times.
    assert 8 <= len(out.getvalue().splitlines()) <= 12


def test_progress_counts_from_the_restored_step(monkeypatch):
    clock(monkeypatch, 1.0)
    out = io.StringIO()
    with progress(1000, "a", start=900, stream=out) as report:
        report(901)
    assert out.getvalue() == "a: 901/1000  ETA 0:01:39  1 steps/s\n"


def test_progress_draws_a_bar_on_a_terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with progress(10, "[red]name[/red]", stream=out) as report:
        report(10, {"loss": 0.5})
    text = out.getvalue()
    assert "[red]name[/red]" in text and "10/10" in text and "loss 0.5" in text
    assert "━" in text


def test_progress_leaves_an_exception_alone():
    def loop():
        with progress(10, "a", stream=io.StringIO()):
            raise RuntimeError("from the loop")

    with pytest.raises(RuntimeError, match="from the loop"):
        loop()


def test_summary_of_known_numbers():
    # By hand: mean 3, variance 2.5, t(0.975, 4) = 2.776445.
    result = summary([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5 / 5)
    np.testing.assert_allclose(
        result, [5, 3, math.sqrt(2.5), 3 - half, 3 + half], rtol=1e-4
    )


def test_summary_of_one_value_knows_no_spread():
    result = summary([0.5])
    assert result.mean == 0.5 and math.isnan(result.std)
    assert (result.low, result.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("bad", [[], [[1.0, 2.0]], 3.0])
def test_summary_wants_one_number_per_seed(unchecked, bad):
    with pytest.raises(ValueError, match="one number per seed"):
        summary(bad)


# Published quantiles of Student's t at 0.975, by degrees of freedom.
QUANTILES = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 10: 2.228, 15: 2.131}
QUANTILES |= {20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980, 10**6: 1.960}


@pytest.mark.parametrize("freedom", QUANTILES)
def test_student_t_quantiles(freedom):
    values = np.zeros(freedom + 1)
    values[0] = 1.0
    result = summary(values)
    quantile = (result.high - result.mean) * math.sqrt(result.count) / result.std
    assert quantile == pytest.approx(QUANTILES[freedom], abs=6e-4)


def test_the_interval_covers_the_mean_95_times_in_100():
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    hits = [result.low < 0 < result.high for result in map(summary, draws)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.012)


def test_paired_sees_what_is_common_to_the_seeds():
    seeds = np.array([0.1, 0.5, 0.9])
    result = paired(seeds + [0.05, 0.06, 0.04], seeds)
    assert result.told_apart and result.verdict == "higher"
    assert result.mean == pytest.approx(0.05)
    assert 0 < result.low < 0.05 < result.high
    reverse = paired(seeds, seeds + [0.05, 0.06, 0.04])
    assert reverse.told_apart and reverse.verdict == "lower"


@pytest.mark.parametrize(
    "a, b",
    [
        ([0.9, 0.8, 0.7], [0.8, 0.9, 0.7]),
        ([0.9], [0.1]),  # one seed says nothing
        ([0.9, math.nan, 0.9], [0.1, 0.1, 0.1]),
        ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1]),
    ],
)
def test_paired_does_not_claim_what_it_cannot_know(a, b):
    result = paired(a, b)
    assert not result.told_apart and result.verdict == "cannot be told apart"


def test_paired_wants_the_same_seeds():
    with pytest.raises(ValueError, match="same seeds"):
        paired([1.0, 2.0], [1.0])
