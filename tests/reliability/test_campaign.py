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
        del sys.modules["reliability"]


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
    found = campaign.kills(tmp_path, 40, whole, 2, random.Random(0))
    assert_survived(found)
    assert found["kills"] == 2 and found["in a save"] >= 1


def test_no_damage_is_read_as_other_values(campaign, tmp_path):
    assert_seen(campaign.damage(tmp_path, 20, random.Random(0)))


@pytest.mark.long
def test_the_long_campaign(campaign, tmp_path):
    out = tmp_path / "reliability.json"
    found = campaign.main(["--out", str(out)])
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
    assert found["second run"] == {
        "exit code": 1,
        "names the owner": True,
        "steps made": 0,
    }
    assert out.with_suffix(".md").read_text().startswith("| campaign")
