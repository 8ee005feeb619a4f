"""The page of promises: each with its tests, its campaign and the figures."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Figures = Mapping[str, Any]  # of one campaign
Record = Mapping[str, Figures]  # by campaign

GOODPUT, BLOCKED, CHECKSUMS, STOP = 0.95, 0.10, 0.05, 10.0  # the bars

TOP = """\
# What a run survives

Each row of the first table is one promise, with the tests and the campaign that show it
and the result of the campaign. `./test.sh` runs the tests, and `./test.sh --long` the
long tests too. `python benchmarks/reliability.py --out FILE.json` repeats the campaigns
in an hour and writes this page. Nothing else is promised. All tests and campaigns ran
on one machine, on CPUs and a local file system; each run of a campaign was one process.
"""
NOT_SHOWN = """\
## Not promised

No campaign on this machine has shown these aims.
"""


class Promise(NamedTuple):
    """One row of the page.

    Attributes:
        text: the promise, as sentences.
        tests: the tests that show it, as pytest names them.
        campaign: the campaign that shows it, if there is one.
        held: decides from the campaign's figures whether the promise was kept.
        figure: the campaign's main figures in words.
    """

    text: str
    tests: tuple[str, ...]
    campaign: str | None = None
    held: Callable[[Figures], bool] = bool
    figure: Callable[[Figures], str] = str


def _killed(found: Figures) -> bool:
    return (
        found["final state equal bit for bit"]
        and not found["failed restores"]
        and not found["committed steps lost"]
        and not found["restored states that differ"]
    )


def _stopped(found: Figures) -> bool:
    return (
        found["SIGTERM exits with"] == [143]
        and found["SIGINT exits with"] == [-2]
        and found["seconds to the exit, most"] <= STOP
        and not found["stops with a step unsaved"]
        and not found["restored states that differ"]
        and found["final state equal bit for bit"]
    )


def _ways(found: Figures) -> dict[str, Any]:
    return {name: way for name, way in found.items() if name != "machine"}


def _exact(found: Figures) -> bool:
    return (
        found["kills in the first epoch"] >= 5
        and not found["epochs in which an example was not seen exactly once"]
        and found["same order"]
        and found["same pixels, byte for byte"]
    )


def _exact_figure(found: Figures) -> str:
    return (
        f"{found['kills in the first epoch']} SIGKILLs in an epoch of "
        f"{found['examples in an epoch']} examples, {found['steps done again']} steps "
        "repeated"
    )


def _interval(found: Figures) -> str:
    return " [{low:.1%}, {high:.1%}]".format(**found)


CAMPAIGN = "tests/reliability/test_campaign.py::"
RESUME = "tests/reliability/test_resume.py::"
DATA = "tests/reliability/test_data_exact.py::"
LOOP, COMMAND = "tests/training/test_loop.py::", "tests/test_cli.py::"
FILES, STAGES = "tests/training/test_checkpoints.py::", "tests/stages/test_stages.py::"
PROCESSES = "tests/test_processes.py::"
READ_ONLY = "tests/reliability/test_read_only.py::"
FUZZ = "tests/reliability/test_fuzz_"
SECURITY = "tests/reliability/test_security.py::"
LONG = f"{CAMPAIGN}test_the_long_campaign"
SHORT = f"{CAMPAIGN}test_goodput_is_measured_in_parts"

PROMISES = (
    Promise(
        "A run that is killed at any instant continues and ends with the same bits; no "
        "committed checkpoint is lost.",
        (f"{CAMPAIGN}test_a_run_that_is_killed_twice_ends_in_the_same_bits", LONG),
        "SIGKILL",
        _killed,
        lambda found: (
            f"{found['kills']} kills, {found['in a save']} of them during a save and "
            f"{found['at the start']} during the start: {found['failed restores']} "
            f"failed restores, {found['committed steps lost']} committed steps lost"
        ),
    ),
    Promise(
        "A run that is stopped at any step, in either stage, continues and ends with "
        "the same bits, for the methods that the test names.",
        (
            f"{RESUME}test_a_run_that_is_stopped_at_every_step_ends_in_the_same_bits",
            f"{RESUME}test_a_run_that_is_stopped_at_any_one_step_ends_in_the_same_bits",
        ),
    ),
    Promise(
        "A run can be resumed on a different number of devices or processes; the "
        "student is the same up to rounding.",
        (
            f"{PROCESSES}test_a_run_moves_from_two_processes_to_one_and_back",
            f"{PROCESSES}test_a_checkpoint_of_two_processes_is_read_by_both_and_by_one",
        ),
    ),
    Promise(
        "The command saves a checkpoint at the first report after a minute, even "
        "within a long epoch.",
        (f"{LOOP}test_an_old_checkpoint_is_followed_by_one_at_the_next_report",),
    ),
    Promise(
        "The two newest checkpoints and the checkpoint with the best validation metric "
        "are kept.",
        (f"{FILES}test_the_latest_and_the_best_stay",),
    ),
    Promise(
        "Later versions read the checkpoints and exports that this version writes.",
        (f"{FILES}test_what_earlier_versions_wrote_is_read_for_ever",),
    ),
    Promise(
        "A restore refuses a checkpoint with another tree, shape, dtype, teacher or "
        "config and names the differences; it restores nothing in part and casts "
        "nothing.",
        (
            f"{FILES}test_another_tree_is_refused_with_both_shapes",
            f"{LOOP}test_another_teacher_or_identity_is_refused_on_resume",
            f"{COMMAND}test_a_changed_config_is_refused_with_its_difference",
        ),
    ),
    Promise(
        "A step whose loss or gradient is not finite changes only the step number; the "
        "rest of the state keeps its bits. The step is counted as skipped. After 20 "
        "skipped steps in a row, the run ends and names the terms and layers.",
        (
            f"{STAGES}test_a_step_that_is_not_finite_changes_nothing_but_its_number",
            f"{STAGES}test_a_report_names_what_is_not_finite",
            f"{LOOP}test_a_run_gives_up_after_updates_skipped_in_a_row_and_says_why",
        ),
    ),
    Promise(
        "A config that cannot be run is refused with one sentence, and every accepted "
        "config trains. A public function returns a result or refuses its arguments "
        "with one sentence.",
        (
            f"{FUZZ}configs.py::test_a_thousand_mutated_configs",
            f"{FUZZ}configs.py::test_mutated_configs_are_accepted_or_refused_in_a_sentence",
            f"{FUZZ}configs.py::test_damaged_yaml_is_refused_in_a_sentence",
            f"{FUZZ}calls.py::test_a_function_refuses_in_a_sentence_what_it_cannot_take",
        ),
    ),
    Promise(
        "A run directory that cannot be written is refused before training starts; "
        "files that are read-only can be read.",
        (
            f"{READ_ONLY}test_a_run_directory_that_cannot_be_written_is_refused_at_once",
            f"{READ_ONLY}test_what_is_read_only_can_be_read_and_stays_as_it_is",
        ),
    ),
    Promise(
        "After SIGTERM or SIGINT, a run saves its current step and ends within "
        f"{STOP:.0f} s.",
        (LONG,),
        "SIGTERM and SIGINT",
        _stopped,
        lambda found: (
            f"{found['signals']} signals, at most "
            f"{found['seconds to the exit, most']:.1f} s, "
            f"{found['stops with a step unsaved']} steps unsaved"
        ),
    ),
    Promise(
        "If a bit or a file of the newest checkpoint is damaged, the older checkpoint "
        "is read instead; damaged values are never read.",
        (f"{CAMPAIGN}test_no_damage_is_read_as_other_values", LONG),
        "damage",
        lambda found: all(
            way["seen, older one read"] == way["tried"] and not way["wrong values"]
            for way in _ways(found).values()
        ),
        lambda found: "; ".join(
            f"{name}: {way['seen, older one read']} of {way['tried']}"
            for name, way in _ways(found).items()
        ),
    ),
    Promise(
        "A full disk ends a run with an error that names the path, the bytes needed "
        "and the bytes free; earlier checkpoints stay.",
        (LONG,),
        "full disk",
        lambda found: found["tried"] and "bytes are needed" in found["error"],
        lambda found: (
            f"checkpoints that stay: {' '.join(found['left'])}"
            if found["tried"]
            else "this machine has no file system to fill"
        ),
    ),
    Promise(
        "A second run in the same directory is refused, with the name of the process "
        "that owns it.",
        (LONG,),
        "second run",
        lambda found: found["names the owner"] and not found["steps made"],
        lambda found: f"exit code {found['exit code']}, {found['steps made']} steps",
    ),
    *(
        Promise(
            f"With {path}: after any interruption, each example of an epoch is still "
            f"seen exactly once, in the same order, with the same augmented pixels.",
            (
                f"{DATA}test_an_interrupted_epoch_has_the_same_examples",
                f"{DATA}test_a_feed_that_forgets_where_it_was_is_seen",
                LONG,
            ),
            f"data {feed}",
            _exact,
            _exact_figure,
        )
        for feed, path in (
            ("on_device", "data on the device"),
            ("streamed", "data read by Grain, in one process"),
        )
    ),
    *(
        Promise(
            f"With {path}: a run that is killed every minute and saves about once a "
            f"second spends at least {GOODPUT:.0%} of its time on steps and "
            f"evaluations that count. Process start, imports and compilation are left "
            f"out of the time.",
            (SHORT,),
            f"goodput {feed}",
            lambda found: found["goodput"] >= GOODPUT,
            lambda found: (
                f"{found['goodput']:.1%}, {found['kills']} kills, one every "
                f"{found['seconds between kills']:.0f} s"
            ),
        )
        for feed, path in (
            ("on_device", "data on the device"),
            ("streamed", "data read by Grain"),
        )
    ),
    Promise(
        "At its end, a run of the command prints its goodput and the seconds of steps, "
        "evaluation, compilation, checkpoints, waits for data and lost steps, summed "
        "over all attempts.",
        (
            f"{LOOP}test_where_the_time_went_is_told_over_all_attempts",
            f"{LOOP}test_what_trains_nobody_counts_against_goodput",
            f"{LOOP}test_steps_that_wait_for_data_are_told",
            f"{COMMAND}test_a_teacher_can_be_an_earlier_run",
        ),
    ),
    Promise(
        "The command keeps compiled programs in the run directory for a restart, "
        "unless JAX has its own cache directory.",
        (
            f"{COMMAND}test_programs_are_kept_in_the_run_directory_unless_jax_was_told_where",
        ),
    ),
    Promise(
        f"A save blocks the training thread for at most {BLOCKED:.0%} of a step, in "
        "the median (WRN-16-2, Adam, batches of 32).",
        (f"{CAMPAIGN}test_what_saves_cost_is_measured",),
        "saves",
        lambda found: (
            found["training thread blocked, share of a step"]["median"] <= BLOCKED
        ),
        lambda found: (
            "{median:.1%}".format(**found["training thread blocked, share of a step"])
            + _interval(found["training thread blocked, share of a step"])
        ),
    ),
    Promise(
        f"Checksums take at most {CHECKSUMS:.0%} of a save and do not run on the "
        "training thread.",
        (f"{CAMPAIGN}test_what_saves_cost_is_measured",),
        "saves",
        lambda found: (
            found["checksums, share of a save"]["median"] <= CHECKSUMS
            and not found["checksums on the training thread"]
        ),
        lambda found: (
            "{median:.1%}".format(**found["checksums, share of a save"])
            + _interval(found["checksums, share of a save"])
        ),
    ),
    Promise(
        "No file that is read can run code, and no file is written outside its folder.",
        (
            f"{SECURITY}test_the_package_has_no_way_to_run_what_it_reads",
            f"{SECURITY}test_what_others_put_into_a_checkpoint_is_not_read",
            f"{SECURITY}test_a_config_that_would_run_something_is_refused",
            f"{SECURITY}test_a_name_cannot_leave_the_folder_of_runs",
        ),
    ),
)


def page(record: Record) -> str:
    """The page: the promises, the aims not shown, and all figures of all campaigns.

    Args:
        record: figures by campaign. A promise whose campaign is missing or failed goes
            under "Not promised".
    """
    shown, others = [], []
    for promise in PROMISES:
        found = record.get(promise.campaign)
        told = "" if found is None else promise.figure(found)
        if promise.campaign is None or found is not None and promise.held(found):
            by = ", ".join(f"`{name}`" for name in promise.tests)
            if promise.campaign is not None:
                by += f", campaign *{promise.campaign}*"
            shown.append(f"| {promise.text} | {by} | {told} |")
        else:
            others.append(f"| {promise.text} | {told or 'not measured'} |")
    parts = [TOP, "| promise | shown by | result |\n|---|---|---|", *shown]
    if others:
        parts += ["", NOT_SHOWN, "| aim | result |\n|---|---|", *others]
    tables = "\n\n".join(rows(name, figures) for name, figures in record.items())
    return "\n".join([*parts, "", "## All figures", "", tables, ""])


def rows(campaign: str, figures: Mapping[str, Any]) -> str:
    """One campaign as a Markdown table; its head names the date and the machine."""
    machine = figures["machine"]
    where = f"{machine['date'][:10]}, {machine['processor']}, {machine['cores']} cores"
    lines = [f"| {campaign} | {where}, load {machine['load']} |", "|---|---|"]
    for name, value in figures.items():
        if name != "machine":
            lines.append(f"| {name} | {_shown(value)} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
