"""The sections and panels of `train.watch.dashboard` as a view of a W&B project, by wandb-workspaces.

Everything is made here and sent in one call; without an account the same goes into a file.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.files import write_whole
from data.secrets import one_line
from train.settings.commands import DashboardConfig
from train.settings.run import Config
from train.settings.tree import ConfigError
from train.watch.dashboard import SECTIONS, SEVERAL, Panel, View
from train.watch.metrics import METRICS_FILE, STEP
from train.watch.report.figures import EACH_STEP
from train.watch.report.series import read_log
from train.watch.trackers import has_login

COLUMNS, ROWS = 3, 3  # panels of a page of a section


def publish(asked: DashboardConfig, config: Config) -> str:
    """Publishes the view, or writes it to a file; says where it is.

    Raises:
        ConfigError: the package or a login is missing, there is no such view, or W&B does not take it.
    """
    workspaces, _ = _packages()
    logged = read_log(config.run.path / METRICS_FILE, EACH_STEP).names
    if asked.output is not None:
        found = workspace(asked, config, config.wandb.entity or "", logged)
        write_whole(Path(asked.output), json.dumps(specification(found), indent=1) + "\n")
        return f"{asked.output}: the view {asked.title!r}, as W&B would get it"
    import wandb

    if not has_login():
        raise ConfigError("dashboard finds no API key: `wandb login`, or output=view.json to see what it would publish")
    try:
        entity = config.wandb.entity or wandb.Api().default_entity
        made = workspace(asked, config, entity or "", logged)
        if asked.url is not None:
            known = workspaces.Workspace.from_url(asked.url)
            known.name, known.sections, known.settings = made.name, made.sections, made.settings
            made = known
        made.save()
    except (wandb.Error, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{'url=' + asked.url if asked.url else 'the dashboard'} cannot be published ({one_line(error)}): "
            f"wandb.project={config.wandb.project} must be there with a run in it (`wandb sync`), and yours to write to"
        ) from error
    return f"published: {made.url}"


def workspace(asked: DashboardConfig, config: Config, entity: str, logged: Iterable[str]) -> Any:
    """The view with the panels of all that a run has logged, or, where that is nothing yet, with all panels."""
    workspaces, _ = _packages()
    names = set(logged)
    sections = []
    for section in SECTIONS:
        panels = [_panel(panel) for panel in section.panels if not names or panel.names(names)]
        layout = workspaces.SectionLayoutSettings(columns=COLUMNS, rows=ROWS)
        is_open = section is SECTIONS[0]
        if panels:
            sections.append(
                workspaces.Section(name=section.title, panels=panels, is_open=is_open, layout_settings=layout)
            )
    settings = workspaces.WorkspaceSettings(x_axis=STEP)
    return workspaces.Workspace(
        name=asked.title, entity=entity, project=config.wandb.project, sections=sections, settings=settings
    )


def specification(view: Any) -> dict[str, Any]:
    """What W&B is sent of a view, as plain JSON."""
    found: dict[str, Any] = json.loads(view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return found


def _panel(panel: Panel) -> Any:
    """A panel of W&B. Names that depend on the run are given as a pattern, so that later runs find theirs."""
    _, reports = _packages()
    declared = panel.declared
    if panel.view is View.COLUMNS:
        return reports.MediaBrowser(title=panel.title, media_keys=[metric.name for metric in declared])
    if panel.view is View.SHARES:
        parts = [f"{metric.name}/{part}" for metric in declared for part in metric.parts]
        return reports.BarPlot(title=panel.title, metrics=parts)
    common: dict[str, Any] = {
        "title": panel.title,
        "x": STEP,
        "title_y": declared[0].unit or None,
        "log_y": panel.logarithmic or None,
    }
    if panel.view is View.LAYERS or any(metric.kind in SEVERAL for metric in declared):
        patterns = "|".join(panel.pattern(metric) for metric in declared)
        return reports.LinePlot(**common, metric_regex=f"^(?:{re.sub(r'[(][?]:', '(', patterns)})$")
    return reports.LinePlot(**common, y=[metric.name for metric in declared])


def _packages() -> tuple[Any, Any]:
    """wandb_workspaces' workspaces and reports.

    Raises:
        ConfigError: they are not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ConfigError(
            f"dashboard needs the package wandb-workspaces ({one_line(error)}): ./launch.sh setup dashboard"
        ) from error
    return workspaces, reports
