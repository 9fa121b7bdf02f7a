"""Write ops/grafana/*.json, Grafana's dashboards, from the panels in dashboard_panels.py.

python tools/build_dashboards.py            write the files
python tools/build_dashboards.py --check    exit 1 if one is not what the panels say

Drawn with grafana-foundation-sdk (extra `dev`), which knows what Grafana 11.6 reads.
"""

import argparse
import itertools
import string
import sys
from pathlib import Path

from dashboard_board import Board, Look, Panel
from dashboard_panels import BOARDS
from grafana_foundation_sdk.builders import bargauge, common, dashboard, stat, table, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER = Path(__file__).parents[1] / "ops" / "grafana"
RUNS = "label_values(cocoa_run_wall_seconds, run_id)"
_SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
_TAG = "cocoa"
_HEIGHTS = {Look.LINES: 8, Look.STACK: 8, Look.NUMBER: 4, Look.BARS: 8, Look.TABLE: 8}

AnyPanel = timeseries.Panel | stat.Panel | bargauge.Panel | table.Panel


def render(board: Board) -> str:
    """Return a dashboard as Grafana reads it."""
    drawn = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.about)
        .tags([_TAG])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .editable()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("cocoa")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags([_TAG])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Source").type("prometheus")
        )
    )
    if board.one_run:
        drawn.with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .datasource(_SOURCE)
            .query({"query": RUNS, "refId": "run"})
            .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(model.VariableSort.ALPHABETICAL_ASC)
        )
    numbers = itertools.count(1)  # or Grafana gives others at each import, and links go astray
    for heading, panels in board.rows.items():
        drawn.with_row(dashboard.Row(heading).id(next(numbers)))
        for panel in panels:
            drawn.with_panel(draw(panel).id(next(numbers)))
    return JSONEncoder(sort_keys=True, indent=1).encode(drawn.build()) + "\n"


def draw(panel: Panel) -> AnyPanel:
    """Return the builder of one panel."""
    drawn = _START[panel.look]()
    drawn.title(panel.title).description(panel.about).unit(panel.unit).datasource(_SOURCE)
    drawn.height(_HEIGHTS[panel.look]).span(panel.width)
    lines = panel.look in (Look.LINES, Look.STACK)
    for letter, (legend, expression) in zip(
        string.ascii_uppercase, panel.queries.items(), strict=False
    ):
        query = Dataquery().expr(expression).ref_id(letter).datasource(_SOURCE)
        query = query.range() if lines else query.instant()
        if panel.look is Look.TABLE:
            query.format(PromQueryFormat.TABLE)
        drawn.with_target(query.legend_format(legend or panel.title))
    _colour(drawn, panel, palette=lines)
    if panel.log_scale and isinstance(drawn, timeseries.Panel):
        scale = common.ScaleDistributionConfig().type(common_model.ScaleDistribution.LOG).log(10)
        drawn.scale_distribution(scale)
    return drawn


def _colour(drawn: AnyPanel, panel: Panel, *, palette: bool) -> None:
    """Colour series by a palette, numbers by their limit; a limit of series is a dashed line."""
    good, bad = ("red", "green") if panel.low_is_bad else ("green", "red")
    steps = [model.Threshold(value=None, color="text" if panel.limit is None else good)]
    if panel.limit is not None:
        steps.append(model.Threshold(value=panel.limit, color=bad))
    drawn.thresholds(dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
    ids = model.FieldColorModeId
    mode = ids.PALETTE_CLASSIC if palette else ids.THRESHOLDS
    drawn.color_scheme(dashboard.FieldColor().mode(mode))
    if panel.limit is not None and isinstance(drawn, timeseries.Panel):
        dashed = common_model.GraphThresholdsStyleMode.DASHED
        drawn.thresholds_style(common.GraphThresholdsStyleConfig().mode(dashed))


def _lines() -> timeseries.Panel:
    legend = common.VizLegendOptions().display_mode(common_model.LegendDisplayMode.LIST)
    legend.placement(common_model.LegendPlacement.BOTTOM).show_legend(True)
    tooltip = common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI)
    drawn = timeseries.Panel().legend(legend).tooltip(tooltip).line_width(1)
    return drawn.show_points(common_model.VisibilityMode.NEVER)


def _stack() -> timeseries.Panel:
    stacking = common.StackingConfig().mode(common_model.StackingMode.NORMAL)
    return _lines().fill_opacity(40).stacking(stacking)


def _number() -> stat.Panel:
    newest = common.ReduceDataOptions().calcs(["lastNotNull"])
    return (
        stat.Panel()
        .reduce_options(newest)
        .text_mode(common_model.BigValueTextMode.VALUE_AND_NAME)
        .graph_mode(common_model.BigValueGraphMode.NONE)
    )


def _bars() -> bargauge.Panel:
    newest = common.ReduceDataOptions().calcs(["lastNotNull"])
    return (
        bargauge.Panel()
        .reduce_options(newest)
        .orientation(common_model.VizOrientation.HORIZONTAL)
        .display_mode(common_model.BarGaugeDisplayMode.BASIC)
        .min(0)
    )


def _table() -> table.Panel:
    return table.Panel().align(common_model.FieldTextAlignment.AUTO)


_START = {
    Look.LINES: _lines,
    Look.STACK: _stack,
    Look.NUMBER: _number,
    Look.BARS: _bars,
    Look.TABLE: _table,
}


def main() -> int:
    """Write the dashboards, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    stale = []
    for name, board in BOARDS.items():
        path, text = FOLDER / f"{name}.json", render(board)
        if not arguments.check:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    if stale:
        print(f"{', '.join(stale)}: not what the panels say; run python {sys.argv[0]}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
