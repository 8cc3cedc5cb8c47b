"""The rows of the present grid, and the settings that all of them share."""

from __future__ import annotations

import pytest

from fedsweep.manager.gaps import FolderPlan, Gap
from fedsweep.manager.results import summarise
from fedsweep.plan.experiment import defaults, unusual
from fedsweep.report.coverage import with_gaps
from fedsweep.report.labels import constants, parameters
from fedsweep.report.look import scales
from fedsweep.report.plots import figures
from fedsweep.report.present import planned_rows
from fedsweep.report.tables import constants_line

SETTINGS = {"poison_level": "client", "num_clients": 5}


@pytest.fixture
def rows(make_rows):
    """Two ratios, each with 6 and with 2 rounds."""
    return make_rows({"poison_ratio": [0.0, 0.3], "global_rounds": [6, 2]})


def plan_of(rows, gone, settings=SETTINGS, gaps=()):
    """A grid that asked for all these rows before, and at present for those that are not `gone`."""
    keys = rows.loc[gone, ["phase", "signature"]].itertuples(index=False, name=None)
    return FolderPlan(
        gaps=list(gaps), earlier=dict.fromkeys(keys, ()), signatures=frozenset(rows["signature"]), settings=settings
    )


def test_without_a_plan_nothing_is_changed(rows):
    assert planned_rows(rows, None) is rows


def test_columns_that_only_earlier_rows_need_go_with_them(rows):
    kept = planned_rows(rows, plan_of(rows, rows["global_rounds"] == 2))
    assert len(kept) == 6
    assert "global_rounds" not in kept
    assert set(kept["poison_level"]) == {"client"}
    assert "global_rounds" in planned_rows(rows, plan_of(rows, rows["poison_ratio"] == 0))


def test_a_column_stays_if_what_has_no_result_differs_in_it(rows):
    values = {name: rows.iloc[0][name] for name in parameters(rows)} | {"global_rounds": 9, "seed": 1}
    gap = Gap(phase="attack", values=values, reason="failed")
    kept = planned_rows(rows, plan_of(rows, rows["global_rounds"] == 2, gaps=[gap]))
    assert set(kept["global_rounds"]) == {6}


def test_every_row_if_asked_for(rows):
    kept = planned_rows(rows, plan_of(rows, rows["global_rounds"] == 2), every_row=True)
    assert len(kept) == len(rows)
    assert set(kept["global_rounds"]) == {2, 6}


def test_settings_that_all_cells_share_are_in_the_line_above_the_table_and_in_every_caption(rows, make_history):
    grid = rows[rows["global_rounds"] == 6].drop(columns="global_rounds")
    kept = planned_rows(grid, plan_of(grid, grid["seed"] == 0, SETTINGS | {"global_rounds": 6, "batch_size": 32}))
    cells = with_gaps(summarise(kept), kept, [])
    assert constants_line(cells).endswith("batch_size 32, poison_level client, num_clients 5, global_rounds 6")
    rounds = kept.merge(make_history(kept)[["signature", "round", "val_loss", "val_acc"]], on="signature")
    drawn = dict(figures("attack", cells, rounds, scales([cells])))
    assert set(drawn) == {"accuracy", "validation"}
    for pages in drawn.values():
        for figure in pages:
            words = figure.get_supxlabel().replace("\n", " ").replace("\xa0", " ")
            assert "poison level client, clients 5, rounds 6" in words


def test_rows_of_others_are_not_said_to_share_them(rows):
    plan = plan_of(rows.iloc[1:], rows.iloc[1:]["seed"] == 0)
    assert not set(SETTINGS) & set(constants(planned_rows(rows, plan)))


def test_what_is_not_as_built_in():
    assert unusual(defaults()) == {}
    assert unusual({"seed": 7, "engine": "reference", "lr": 0.5, "depth": defaults()["depth"]}) == {"lr": 0.5}
