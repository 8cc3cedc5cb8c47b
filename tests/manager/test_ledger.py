"""The ledger: transitions, budgets, leases, identities, and files that are none."""

from __future__ import annotations

import json
import sqlite3

import pytest

from fedsweep.errors import StateError, TransitionRefused
from fedsweep.manager.ledger import Ledger
from fedsweep.manager.records import Counts, LedgerUnwritable, UnknownAttempt, UnknownTask
from fedsweep.manager.schema import APPLICATION_ID, MIGRATIONS

ONE = "one: {combinations: [{width_factor: [1]}]}"
THREE = "three: {combinations: [{width_factor: [1, 2, 4]}]}"


@pytest.fixture
def fresh(ledgers, make_grid):
    """A ledger with the tasks of a grid."""

    def make(text: str) -> Ledger:
        ledger = ledgers()
        ledger.store_plan(make_grid(text).tasks)
        return ledger

    return make


# ---- hand-outs


def test_tasks_go_out_each_once(fresh):
    ledger = fresh(THREE)
    ids = [ledger.hand_out("w", 60)[0].task_id for _ in range(3)]
    assert ids == ["three_2_42", "three_1_42", "three_0_42"]  # the widest costs most
    assert ledger.hand_out("w", 60) == []
    assert ledger.view.counts() == Counts(assigned=3)


def test_a_task_has_the_fields_that_its_worker_needs(fresh, clock):
    (task,) = fresh(ONE).hand_out("host-1", 60)
    assert (task.phase, task.seed, task.output_dir, task.output_dirs) == ("one", 42, "results_one", ("results_one",))
    assert (task.config["width_factor"], task.config["optimizer"], task.config["seed"]) == (1, "sgd", 42)
    assert (task.status, task.assigned_to, task.assigned_at, task.attempt) == ("assigned", "host-1", clock.now(), 1)


def test_attempt_numbers_never_repeat(fresh, ledgers):
    ledger = fresh(ONE)
    seen = []
    for _ in range(4):
        (task,) = ledger.hand_out("w", 60)
        seen.append(task.attempt)
        ledger.release(task.task_id, "w", task.attempt)
        ledger = ledgers()
    assert seen == sorted(set(seen))


def test_a_lost_attempt_leaves_no_number_to_be_used_again(fresh, ledgers, make_grid):
    ledger = fresh(ONE)
    (task,) = ledger.hand_out("w", 60)
    ledger.store_plan(make_grid(THREE).tasks)  # the task is an orphan now
    assert ledgers().hand_out("w", 60)[0].attempt > task.attempt


# ---- leases and late messages


def test_a_silent_worker_loses_its_task_when_the_lease_ends(fresh, clock):
    ledger = fresh(ONE)
    ledger.hand_out("w", 60)
    clock.advance(59.9)
    assert ledger.lose_stale() == []
    clock.advance(0.2)
    (lost,) = ledger.lose_stale()
    assert (lost.status, lost.losses, lost.failures) == ("pending", 1, 0)


def test_heartbeats_keep_a_task(fresh, clock):
    ledger = fresh(ONE)
    (task,) = ledger.hand_out("w", 60)
    for _ in range(10):
        clock.advance(50)
        assert ledger.renew(task.task_id, "w", task.attempt)
        assert ledger.lose_stale() == []


def test_leases_are_renewed_in_full_by_a_restart(fresh, ledgers, clock):
    ledger = fresh(ONE)
    ledger.hand_out("w", 60)
    clock.advance(3600)  # the manager was away for an hour, the worker was not
    ledger = ledgers()
    clock.advance(59)
    assert ledger.lose_stale() == []
    clock.advance(2)
    assert len(ledger.lose_stale()) == 1


def test_setting_the_clock_ends_no_lease(fresh, clock):
    ledger = fresh(ONE)
    ledger.hand_out("w", 60)
    clock.time_of_day = clock.time_of_day.replace(year=2027)
    assert ledger.lose_stale() == []


@pytest.mark.parametrize("message", ["fail", "release", "renew"])
def test_messages_of_an_old_attempt_change_nothing(fresh, clock, message):
    ledger = fresh(ONE)
    (old,) = ledger.hand_out("slow", 60)
    clock.advance(61)
    ledger.lose_stale()
    (new,) = ledger.hand_out("quick", 60)
    before = ledger.view.task(new.task_id)
    arguments = (old.task_id, "slow", "late") if message == "fail" else (old.task_id, "slow")
    assert not getattr(ledger, message)(*arguments, attempt=old.attempt)
    assert not getattr(ledger, message)(*arguments)  # a client that knows no attempts is known by its name
    assert ledger.view.task(new.task_id) == before
    clock.advance(59)
    assert ledger.lose_stale() == []


def test_a_late_renewal_does_not_prolong_the_new_lease(fresh, clock):
    ledger = fresh(ONE)
    (old,) = ledger.hand_out("slow", 60)
    clock.advance(61)
    ledger.lose_stale()
    ledger.hand_out("quick", 60)
    clock.advance(30)
    ledger.renew(old.task_id, "slow", old.attempt)
    clock.advance(31)
    assert len(ledger.lose_stale()) == 1


def test_a_result_of_a_worker_that_was_given_up_is_taken(fresh, clock, make_result):
    ledger = fresh(ONE)
    (old,) = ledger.hand_out("slow", 60)
    clock.advance(61)
    ledger.lose_stale()
    (new,) = ledger.hand_out("quick", 60)
    assert ledger.accept(old.task_id, "slow", make_result(old.as_dict()), old.attempt) == "accepted"
    assert not ledger.renew(new.task_id, "quick", new.attempt)  # the other may stop
    assert ledger.accept(new.task_id, "quick", make_result(new.as_dict()), new.attempt) == "duplicate"
    assert ledger.view.conflicts() == []


# ---- results


def test_a_result_is_kept_as_it_came_and_survives_a_restart(fresh, ledgers, make_result):
    ledger = fresh(ONE)
    (task,) = ledger.hand_out("w", 60)
    result = make_result(task.as_dict(), mean_test_acc=0.1 + 0.2, device="cpu", per_class_test_acc=[0.1, None])
    assert ledger.accept(task.task_id, "w", result, task.attempt) == "accepted"
    ledger = ledgers()
    assert ledger.view.result(task.number) == result
    assert ledger.view.counts() == Counts(complete=1)


def test_a_second_result_that_differs_is_kept_as_a_conflict(fresh, make_result):
    ledger = fresh(ONE)
    (task,) = ledger.hand_out("w", 60)
    result = make_result(task.as_dict(), worker="w", wall_time_s=1.0, plan="loop")
    ledger.accept(task.task_id, "w", result, task.attempt)
    elsewhere = {**result, "worker": "v", "wall_time_s": 2.0, "plan": "reference"}  # time and place may differ
    assert ledger.accept(task.task_id, "v", elsewhere, task.attempt) == "duplicate"
    assert ledger.view.conflicts() == []
    other = {**result, "mean_test_acc": 0.125}
    assert ledger.accept(task.task_id, "v", other, task.attempt) == "duplicate"
    (conflict,) = ledger.view.conflicts()
    assert (conflict["signature"], conflict["worker"], conflict["data"]) == (task.signature, "v", other)
    assert ledger.view.result(task.number) == result


def test_a_different_history_is_a_conflict_too(fresh, make_result):
    ledger = fresh(ONE)
    (task,) = ledger.hand_out("w", 60)
    result = make_result(task.as_dict())
    ledger.accept(task.task_id, "w", result, task.attempt)
    ledger.accept(task.task_id, "w", {**result, "history": result["history"][:1]}, task.attempt)
    assert len(ledger.view.conflicts()) == 1


def test_results_of_tasks_that_were_never_handed_out_are_refused(fresh, make_result):
    ledger = fresh(THREE)
    (task,) = ledger.hand_out("w", 60)
    result = make_result(task.as_dict())
    with pytest.raises(UnknownTask, match="no task has the id 'nonsense'"):
        ledger.accept("nonsense", "w", result)
    with pytest.raises(UnknownAttempt, match="task 'three_1_42' was never handed out"):
        ledger.accept("three_1_42", "w", result)
    with pytest.raises(UnknownAttempt, match="task 'three_0_42' has no attempt 7"):
        ledger.accept("three_0_42", "w", result, attempt=7)
    with pytest.raises(UnknownAttempt, match="task 'three_1_42' has no attempt 1"):
        ledger.accept("three_1_42", "w", result, attempt=task.attempt)
    assert ledger.view.counts() == Counts(pending=2, assigned=1)


def test_an_old_client_delivers_without_an_attempt(fresh, make_result):
    ledger = fresh(ONE)
    (task,) = ledger.hand_out("old", 6 * 3600)
    assert ledger.accept(task.task_id, "old", make_result(task.as_dict())) == "accepted"


def test_diverged_results_are_complete_and_counted(fresh):
    ledger = fresh(ONE)
    (task,) = ledger.hand_out("w", 60)
    ledger.accept(task.task_id, "w", {"outcome": "diverged", "mean_test_acc": None}, task.attempt)
    assert ledger.view.counts() == Counts(complete=1, diverged=1)
    assert ledger.hand_out("w", 60) == []


def test_the_file_itself_allows_one_result_and_one_open_attempt(fresh, make_result, tmp_path):
    ledger = fresh(ONE)
    (task,) = ledger.hand_out("w", 60)
    ledger.accept(task.task_id, "w", make_result(task.as_dict()), task.attempt)
    ledger.close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite3")
    with pytest.raises(sqlite3.IntegrityError):
        db.execute("INSERT INTO results (task, received_at, data) VALUES (1, '', '{}')")
    opened = "INSERT INTO attempts (task, worker, lease_s, started_at) VALUES (1, 'w', 1, '')"
    db.execute(opened)
    with pytest.raises(sqlite3.IntegrityError):
        db.execute(opened)
    db.close()


# ---- budgets


def test_three_retries_then_failed(fresh):
    ledger = fresh(ONE)
    for number in range(1, 5):
        (task,) = ledger.hand_out("w", 60)
        assert ledger.fail(task.task_id, "w", f"ValueError: {number}", task.attempt)
        task = ledger.view.task(task.task_id)
        assert (task.failures, task.last_error) == (number, f"ValueError: {number}")
        assert task.status == ("failed" if number == 4 else "pending")
    assert ledger.hand_out("w", 60) == []
    assert ledger.view.counts() == Counts(failed=1)
    assert ledger.view.failed() == [("one_0_42", "ValueError: 4")]


def test_five_losses_then_failed_with_the_workers_named(fresh, clock):
    ledger = fresh(ONE)
    for number in range(1, 6):
        ledger.hand_out(f"host-{number}", 60)
        clock.advance(61)
        (task,) = ledger.lose_stale()
        assert (task.losses, task.failures) == (number, 0)
        assert task.status == ("failed" if number == 5 else "pending")
    assert task.last_error == "lost 5 times: contact ended with host-1, host-2, host-3, host-4, host-5"


def test_losses_and_failures_are_two_budgets(fresh, clock):
    ledger = fresh(ONE)
    for _ in range(3):
        (task,) = ledger.hand_out("w", 60)
        ledger.fail(task.task_id, "w", "ValueError", task.attempt)
    for _ in range(4):
        ledger.hand_out("w", 60)
        clock.advance(61)
        ledger.lose_stale()
    assert ledger.view.counts() == Counts(pending=1)


def test_releases_are_without_limit_and_without_blame(fresh):
    ledger = fresh(ONE)
    for _ in range(20):
        (task,) = ledger.hand_out("w", 60)
        assert ledger.release(task.task_id, "w", task.attempt)
    task = ledger.view.task(task.task_id)
    assert (task.status, task.failures, task.losses) == ("pending", 0, 0)


def test_a_failed_task_still_takes_a_result(fresh, make_result):
    ledger = fresh(ONE)
    for _ in range(4):
        (task,) = ledger.hand_out("w", 60)
        ledger.fail(task.task_id, "w", "ValueError", task.attempt)
    assert ledger.accept(task.task_id, "w", make_result(task.as_dict()), task.attempt) == "accepted"
    assert ledger.view.counts() == Counts(complete=1)


def test_tasks_that_failed_go_out_after_the_others(fresh):
    ledger = fresh(THREE)
    (first,) = ledger.hand_out("w", 60)
    ledger.fail(first.task_id, "w", "ValueError", first.attempt)
    assert [ledger.hand_out("w", 60)[0].task_id for _ in range(3)] == ["three_1_42", "three_0_42", "three_2_42"]


def test_forgiven_failures_are_taken_back_and_the_task_waits_again(fresh):
    ledger = fresh(ONE)
    attempts = []
    for _ in range(4):
        (task,) = ledger.hand_out("broken", 60)
        attempts.append(ledger.fail(task.task_id, "broken", "CUDA error", task.attempt))
    assert ledger.view.counts() == Counts(failed=1)
    ledger.forgive(attempts[1:])
    ledger.forgive(attempts[1:])  # once is enough
    task = ledger.view.task(task.task_id)
    assert (task.status, task.failures) == ("pending", 1)


def test_a_transition_from_another_state_is_refused(fresh):
    ledger = fresh(ONE)
    with pytest.raises(TransitionRefused, match="task 1 is not assigned"), ledger._transaction() as db:
        ledger._move(db, 1, leaves="assigned", enters="pending", attempt=None)


# ---- the plan and its edits


def test_an_edited_grid_adds_keeps_orphans_and_restores(fresh, ledgers, make_grid, make_result):
    ledger = fresh(THREE)
    tasks = [ledger.hand_out("w", 60)[0] for _ in range(3)][:0:-1]  # of widths 1 and 2
    ledger.release("three_2_42", "w")
    ledger.accept(tasks[0].task_id, "w", make_result(tasks[0].as_dict()), tasks[0].attempt)

    change = ledger.store_plan(make_grid("three: {combinations: [{width_factor: [4, 8]}]}").tasks)
    assert str(change) == "1 added, 1 kept"
    assert ledger.view.counts() == Counts(pending=2, orphaned=2)
    ledger = ledgers()
    assert ledger.view.result(tasks[0].number)["mean_test_acc"] > 0  # never dropped
    assert {ledger.hand_out("w", 60)[0].config["width_factor"] for _ in range(2)} == {4, 8}  # orphans do not run
    assert not ledger.renew(tasks[1].task_id, "w", tasks[1].attempt)

    change = ledger.store_plan(make_grid(THREE).tasks)
    assert str(change) == "0 added, 1 kept, 2 restored"
    assert ledger.view.counts() == Counts(pending=1, assigned=1, complete=1, orphaned=1)


def test_a_late_result_of_an_orphan_is_kept(fresh, make_grid, make_result):
    ledger = fresh(ONE)
    (task,) = ledger.hand_out("w", 60)
    ledger.store_plan(make_grid("two: {combinations: [{width_factor: [64]}]}").tasks)
    assert ledger.accept(task.task_id, "w", make_result(task.as_dict()), task.attempt) == "accepted"
    ledger.store_plan(make_grid(ONE).tasks)
    assert ledger.view.counts() == Counts(complete=1, orphaned=1)


def test_a_task_keeps_its_id_and_no_id_names_two_computations(fresh, make_grid):
    ledger = fresh(THREE)
    before = {task.signature: task.task_id for task in ledger.view.all_tasks()}
    ledger.store_plan(make_grid("three: {combinations: [{width_factor: [1, 3, 2, 4, 8]}]}\nseeds: [42, 7]").tasks)
    after = {task.signature: task.task_id for task in ledger.view.all_tasks()}
    assert before.items() <= after.items()
    assert len(set(after.values())) == len(after) == 10
    by_width = {(task.config["width_factor"], task.seed): task.task_id for task in ledger.view.all_tasks()}
    assert by_width[2, 42] == "three_1_42"  # where it was
    assert by_width[3, 42] == "three_5_42"  # its number, 1, names another computation
    assert by_width[3, 7] == "three_5_7"  # and its other seeds go with it


def test_ids_of_combinations_that_move_stay_together(fresh, make_grid):
    ledger = fresh("p: {combinations: [{width_factor: [1, 2]}]}\nseeds: [1, 2]")
    ledger.store_plan(make_grid("p: {combinations: [{width_factor: [8, 16]}]}\nseeds: [1, 2]").tasks)
    ids = {(task.config["width_factor"], task.seed): task.task_id for task in ledger.view.all_tasks()}
    assert [ids[8, 1], ids[8, 2], ids[16, 1], ids[16, 2]] == ["p_2_1", "p_2_2", "p_3_1", "p_3_2"]


def test_options_follow_the_config_and_the_rest_does_not_change(fresh, make_grid):
    ledger = fresh(ONE)
    ledger.store_plan(make_grid("defaults: {num_parallel_workers: 3, output_dir: elsewhere}\n" + ONE).tasks)
    task = ledger.view.task("one_0_42")
    assert (task.config["num_parallel_workers"], task.output_dirs) == (3, ("elsewhere",))
    assert ledger.view.counts() == Counts(pending=1)


def test_varying_parameters_are_those_in_which_the_cells_of_a_folder_differ(fresh, make_grid):
    ledger = fresh("defaults: {output_dir: out}\na: {combinations: [{lr: [0.1, 0.2]}, {poison_ratio: [0, 0.0]}]}")
    assert ledger.view.varying("out") == ("lr",)
    (task,) = ledger.hand_out("w", 60)
    ledger.accept(task.task_id, "w", {"mean_test_acc": 0.5}, task.attempt)
    ledger.store_plan(make_grid("defaults: {output_dir: out, num_clients: 7}\na: {combinations: [{lr: [0.1]}]}").tasks)
    # The finished row of the earlier grid differs from the new one in num_clients; both stay in the file.
    assert ledger.view.varying("out") == ("num_clients",)


# ---- files that are no ledger


def _message(path) -> str:
    with pytest.raises(StateError) as caught:
        Ledger(path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_empty_file_is_no_ledger(tmp_path):
    path = tmp_path / "ledger.sqlite3"
    path.touch()
    assert "is empty" in _message(path)
    assert path.read_bytes() == b""


def test_garbage_and_short_files_are_no_ledger(tmp_path):
    path = tmp_path / "ledger.sqlite3"
    for content in (b"hello", b"\0" * 4096, b"SQLite format 3\0", b"x" * 100_000):
        path.write_bytes(content)
        assert "is not a state file of fedsweep" in _message(path)
        assert path.read_bytes() == content


def test_a_database_of_another_program_is_no_ledger(tmp_path):
    path = tmp_path / "ledger.sqlite3"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE notes (words TEXT)")
    db.commit()
    db.close()
    before = path.read_bytes()
    assert "belongs to another program" in _message(path)
    assert path.read_bytes() == before


def test_a_newer_ledger_is_left_alone(fresh, tmp_path):
    fresh(ONE).close()
    path = tmp_path / "ledger.sqlite3"
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    assert "was written by a newer fedsweep (state version 3; this one knows 2)" in _message(path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_ledger_is_refused(fresh, tmp_path, share):
    fresh(ONE).close()
    path = tmp_path / "ledger.sqlite3"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "cannot be used" in _message(path)


def test_a_ledger_with_a_damaged_page_is_refused(fresh, tmp_path):
    fresh(ONE).close()
    path = tmp_path / "ledger.sqlite3"
    content = bytearray(path.read_bytes())
    content[4096:8192] = b"\xa5" * 4096
    path.write_bytes(content)
    assert "cannot be used" in _message(path)


def test_a_missing_ledger_beside_its_log_is_not_a_fresh_start(fresh, tmp_path):
    fresh(ONE).close()
    path = tmp_path / "ledger.sqlite3"
    path.unlink()
    (tmp_path / "ledger.sqlite3-wal").write_bytes(b"rows")
    assert "is missing but ledger.sqlite3-wal is there" in _message(path)
    assert not path.exists()


def test_a_folder_in_the_place_of_the_ledger_is_refused(tmp_path):
    (tmp_path / "ledger.sqlite3").mkdir()
    assert "is not a file" in _message(tmp_path / "ledger.sqlite3")


def test_what_a_crash_left_of_a_new_ledger_is_cleared_away(tmp_path):
    for suffix in ("", "-journal"):
        (tmp_path / f"ledger.sqlite3.new{suffix}").write_bytes(b"half")
    Ledger(tmp_path / "ledger.sqlite3").close()
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.sqlite3"]


def test_the_file_says_whose_it_is(fresh, tmp_path):
    fresh(ONE).close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite3")
    assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    db.close()


def test_a_full_disk_changes_nothing(fresh, make_result):
    ledger = fresh(ONE)
    (task,) = ledger.hand_out("w", 60)
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    large = make_result(task.as_dict(), device="x" * 1_000_000)
    with pytest.raises(LedgerUnwritable, match="database or disk is full"):
        ledger.accept(task.task_id, "w", large, task.attempt)
    assert ledger.view.task(task.task_id).status == "assigned"
    ledger._db.execute("PRAGMA max_page_count = 100000")
    assert ledger.accept(task.task_id, "w", large, task.attempt) == "accepted"


def test_results_are_synced_before_they_are_acknowledged(fresh):
    ledger = fresh(ONE)
    assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    assert ledger._db.execute("PRAGMA locking_mode").fetchone()[0] == "exclusive"


def test_asking_uses_indices_whatever_the_number_of_tasks(fresh):
    ledger = fresh(THREE)
    steps: list[str] = []
    ledger._db.set_trace_callback(steps.append)
    ledger.hand_out("w", 60, max_tasks=2)
    ledger.view.counts()
    ledger._db.set_trace_callback(None)
    for statement in steps:
        if statement.startswith(("SELECT", "UPDATE")) and "tasks" in statement:
            plan = [step["detail"] for step in ledger._db.execute(f"EXPLAIN QUERY PLAN {statement}")]
            assert not [step for step in plan if "TEMP B-TREE" in step or ("SCAN" in step and "INDEX" not in step)]


def test_the_last_page_of_histories_costs_what_the_first_does(fresh, make_result):
    """It once looked through all cells of the folder for each result, and let every request wait meanwhile."""
    ledger = fresh(f"p: {{combinations: [{{seed: {list(range(200))}}}]}}")
    with ledger.together():
        for task in ledger.hand_out("w", 60, max_tasks=200):
            ledger.accept(task.task_id, "w", make_result(task.as_dict()), task.attempt)
    (output_dir,) = ledger.view.output_dirs()
    steps = []

    def step() -> None:
        steps[-1] += 1

    for after in (0, 190):
        steps.append(0)
        ledger._db.set_progress_handler(step, 1)
        assert len(ledger.view.histories(output_dir, after, limit=10)) == 10
        ledger._db.set_progress_handler(None, 0)
    assert steps[1] < 1.5 * steps[0]


def test_a_note_is_kept(ledgers):
    ledgers().set_meta("plan_digest", "abc")
    assert ledgers().view.meta("plan_digest") == "abc"
    assert ledgers().view.meta("nothing") is None


def test_results_are_plain_json_in_the_file(fresh, tmp_path, make_result):
    ledger = fresh(ONE)
    (task,) = ledger.hand_out("w", 60)
    result = make_result(task.as_dict())
    ledger.accept(task.task_id, "w", result, task.attempt)
    ledger.close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite3")
    data, history = db.execute("SELECT data, history FROM results").fetchone()
    assert json.loads(data) | {"history": json.loads(history)} == result
    db.close()
