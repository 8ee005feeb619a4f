"""Real processes, killed and started again: a few here, many with ./test.sh --long."""

import random
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def campaign():
    """The script, imported as if it were run from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import reliability

        yield reliability
        for name in [name for name in sys.modules if name.startswith("reliability")]:
            del sys.modules[name]


def assert_survived(found):
    assert found["failed restores"] == 0
    assert found["committed steps lost"] == 0
    assert found["restored states that differ"] == 0
    assert found["final state equal bit for bit"] is True


def assert_seen(found):
    for way, outcome in found.items():
        assert outcome["wrong values"] == 0, way
        assert outcome["seen, older one read"] == outcome["tried"], way


def test_a_run_that_is_killed_twice_ends_in_the_same_bits(campaign, tmp_path):
    whole = campaign.undisturbed(tmp_path, steps=40)
    # The first kill comes as soon as a save begins. A later instant, as in the long
    # campaign, can come after the end of a save that is faster than usual.
    at_once = whole | {"save_seconds": 0.0}
    found = campaign.kills(tmp_path, 40, at_once, 2, random.Random(0))
    assert_survived(found)
    assert found["kills"] == 2 and found["in a save"] >= 1


def test_no_damage_is_read_as_other_values(campaign, tmp_path):
    assert_seen(campaign.damage(tmp_path, 20, random.Random(0)))


@pytest.mark.long
def test_the_long_campaign(campaign, tmp_path):
    out = tmp_path / "reliability.json"
    timed = {name for name in campaign.CAMPAIGNS if name.startswith("goodput")}
    rest = [name for name in campaign.CAMPAIGNS if name not in {*timed, "saves"}]
    found = campaign.main(["--only", *rest, "--out", str(out)])
    assert [*found] == rest
    assert_survived(found["SIGKILL"])
    assert found["SIGKILL"]["kills"] == 50
    assert found["SIGKILL"]["in a save"] >= 20
    stopped = found["SIGTERM and SIGINT"]
    assert stopped["SIGTERM exits with"] == [143]
    assert stopped["SIGINT exits with"] == [-2]
    assert stopped["seconds to the exit, most"] < 10
    assert stopped["stops with a step unsaved"] == 0
    assert stopped["final state equal bit for bit"] is True
    assert_seen(found["damage"])
    if found["full disk"]["tried"]:
        assert "bytes are needed" in found["full disk"]["error"]
        assert ".hintjax-tmp" not in found["full disk"]["left"]
        assert len(found["full disk"]["left"]) == 2
    second = found["second run"]
    assert (second["exit code"], second["steps made"]) == (1, 0)
    assert second["names the owner"] is True
    for feed in ("on_device", "streamed"):
        seen = found[f"data {feed}"]
        assert seen["kills in the first epoch"] == 5
        assert seen["epochs in which an example was not seen exactly once"] == 0
        assert seen["same order"] and seen["same pixels, byte for byte"]
    promised, _, others = out.with_suffix(".md").read_text().partition("## Not pro")
    shown = {name for name in rest[1:] if found[name].get("tried", True)}
    assert all(f"campaign *{name}*" in promised for name in shown)
    assert others.count("| not measured |") == 4  # goodput, and what saves cost


@pytest.mark.long
@pytest.mark.parametrize("feed", ["on_device", "streamed"])
def test_goodput_is_measured_in_parts(campaign, feed, tmp_path):
    goodput = campaign.reliability_goodput
    found = goodput.goodput(tmp_path, feed, minutes=1.5, every=30)
    assert found["kills"] == 3
    # Every second has its part.
    assert 90 <= sum(found["seconds"].values()) < 95
    assert min(found["seconds"].values()) >= 0
    assert (found["seconds"]["data wait"] > 0) <= (feed == "streamed")
    for part in ("start", "compilation", "restore", "checkpoint", "lost", "steps"):
        assert found["seconds"][part] > 0, part
    assert found["steps that count"] > 0
    assert found["steps of the run never went back"] is True
    assert 0 < found["goodput"] < 1


@pytest.mark.long
def test_what_saves_cost_is_measured(campaign, tmp_path):
    found = campaign.reliability_goodput.saves(tmp_path, rounds=8)
    assert found["rounds"] == 8
    assert found["checksums on the training thread"] is False
    for name in (
        "training thread blocked, share of a step",
        "checksums, share of a save",
    ):
        assert 0 < found[name]["low"] <= found[name]["high"] < 1
