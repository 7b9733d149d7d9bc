"""The page of a run: what it reads, what it says, and that a browser draws it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layout import ROOT
from train.__main__ import _recipe_of, compose, run
from train.job.heartbeat import write_beat
from train.job.provenance import HISTORY_FILE
from train.settings.run import Config, save_config
from train.settings.tree import ConfigError, from_dict
from train.watch import catalog
from train.watch.catalog import METRICS, Cadence, Kind
from train.watch.dashboard import SECTIONS, View
from train.watch.report.figures import EACH_STEP, Shown, lines_left_out
from train.watch.report.page import page, read_run
from train.watch.report.series import BINS, Log, read_log
from train.watch.report.summary import short

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What no panel draws: numbers of the first step or of the machine, and what others say as well.
NOT_DRAWN = {"disk_gb", "forced_routing", "peak_tflops", "slowest_process"}
WIDTHS = {"desk": 1440, "phone": 390}


def logged_metrics() -> dict[str, object]:
    """One value for every name of the catalog that a run of three layers and two parts might log."""
    values: dict[str, object] = {}
    for metric in METRICS:
        parts, layers = metric.parts or ("first", "second"), ("1", "2", "10", "mtp")
        if metric.kind is Kind.EACH_STEP:
            values[metric.name] = [1.5, 2.5]
        elif metric.kind is Kind.HEATMAP:
            values |= {f"{metric.name}/{layer}": [0.0, 2.0, 1.0] for layer in layers}
        else:
            names = [f"{metric.name}/{part}" for part in parts] if "PART" in metric.kind else [metric.name]
            by_layer = [f"{name}/{layer}" for name in names for layer in layers] if "LAYER" in metric.kind else []
            values |= dict.fromkeys([*names, *by_layer], 1.5)
    return values


def make_run(folder: Path, name: str, lines: int = 12, zero: tuple[str, ...] = (), **changes: object) -> Config:
    """A run with all metrics in its log, two starts and a bad step."""
    config = from_dict(Config, {"run": {"name": name, "dir": str(folder), "steps": 40}, "wandb": changes})
    (config.run.path / "logs" / "20261130-000000").mkdir(parents=True)
    save_config(config)
    values = logged_metrics() | dict.fromkeys(zero, 0.0)
    with (config.run.path / "metrics.jsonl").open("w") as file:
        for line in range(1, lines + 1):
            scaled = {key: value * line if isinstance(value, float) else value for key, value in values.items()}
            file.write(json.dumps({"step": 2 * line, **scaled}) + "\n")
    start = {"time": "2026-11-30T10:00:00Z", "step": 0, "changed": {}, "host": "node1", "processes": 4}
    command = ["python", "-m", "train", "--worker", "train", "-cn", "tiny", "run.steps=40"]
    later = start | {"step": 6, "changed": {"optim.lr": [0.001, 0.002]}, "command": command, "commit": "abc"}
    (config.run.path / HISTORY_FILE).write_text(f"{json.dumps(start)}\n{json.dumps(later)}\n")
    bad = {"step": 9, "reason": "a loss is nan", "samples": [64, 71], "parameters": ["decoder.weight"], "time": 1.8e9}
    (config.run.path / "logs" / "bad_steps.jsonl").write_text(json.dumps(bad) + "\n")
    return config


def page_of(*configs: Config, now: float | None = None) -> str:
    return page([read_run(config, ("tiny", compose(["-cn", "tiny"], planned=True)), now) for config in configs])


def test_every_metric_of_the_catalog_stands_in_a_panel_and_every_panel_finds_its_own():
    logged, shown = set(logged_metrics()), set()
    for panel in (panel for section in SECTIONS for panel in section.panels):
        assert [metric.name for metric in panel.declared] == list(panel.metrics), panel.title
        found = panel.names(logged)
        assert {name.partition("/")[0] for name in found} >= {name.partition("/")[0] for name in panel.metrics}
        shown |= set(found)
    for metric in METRICS:
        if metric.kind is Kind.EACH_STEP:
            assert EACH_STEP[metric.name] in shown
        elif metric.cadence is not Cadence.START and metric.parts != catalog.EXTREMES:
            assert any(name.split("/")[: metric.name.count("/") + 1] == metric.name.split("/") for name in shown) != (
                metric.name in NOT_DRAWN
            ), metric.name


def test_a_figure_says_how_many_of_its_lines_it_shows():
    panel = next(panel for section in SECTIONS for panel in section.panels if "over weight by group" in panel.title)
    log = Log(1, 1)
    for group in "abcde":
        log.add(1, f"update_to_weight/{group}", 1.0)
    run = Shown("one", log)
    assert (lines_left_out(panel, [run]), lines_left_out(panel, [run, run])) == ("", "the first 4 of 5")


def test_layers_stand_in_their_order():
    panel = next(panel for section in SECTIONS for panel in section.panels if panel.view is View.LAYERS)
    layers = [name.rpartition("/")[2] for name in panel.names(logged_metrics())]
    assert layers[:4] == ["1", "2", "10", "mtp"]


def test_a_long_log_keeps_its_spikes_in_few_stretches(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": step, "lm_loss": 2.0, "every_step/lm_loss": [2.0] * 10, "lr": 1e-3} for step in range(10, 20001, 10)
    ]
    lines[777]["every_step/lm_loss"] = [2.0, 2.0, 9.0, *[2.0] * 7]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = read_log(path, EACH_STEP)
    assert (log.first, log.final) == (1, 20000) and len(log.steps) <= BINS and log.steps[-1] == 20000
    points = log.series["lm_loss"].points()
    assert sum(log.series["lm_loss"].counts) == 20000
    spike = points[log.place(7773)]
    assert spike[1:] == (2.0, 9.0) and 2.0 < spike[0] < 2.5
    assert [place for place, point in points.items() if point[2] > 2.0] == [log.place(7773)]


def test_torn_lines_and_numbers_that_are_none_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\0\0\0\n{"step": 2, "lo\n{"step": 3, "loss": null}\n')
    log = read_log(path, EACH_STEP)
    assert (log.broken, log.series["loss"].not_finite, log.last("loss")) == (2, 1, 2.0)
    assert read_log(tmp_path / "none", EACH_STEP).names == set()


def test_the_page_says_how_the_run_stands_and_what_happened(tmp_path):
    config = make_run(tmp_path, "one", zero=("dead_experts",), project="<script>alert(1)</script>")
    told = "alert: step 8: dead_experts 2: raise balance.weight\nwarning: another line\n"
    (config.run.path / "logs" / "20261130-000000" / "rank_00000.err").write_text(told)
    write_beat(config.run.path, 24, {})
    beat = json.loads((config.run.path / "heartbeat.json").read_text())
    text = page_of(config, now=beat["time"] + 1)
    assert '<span class="state running">running</span>' in text and "(60.0%)" in text
    assert "a loss is nan; samples [64, 71]; in decoder.weight" in text and "bad step" in text
    assert "<td>8</td><td>alert</td><td>dead_experts 2: raise balance.weight</td>" in text
    assert "1 alert, 1 bad step" in text and "node1" in text and "optim.lr" in text and "0.002" in text
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert not re.search(r"(src|href)=\"?(https?:)?//|@import|url\((?!#)", text), "it loads nothing"
    data = json.loads(re.search(r'id="page-data">(.*?)</script>', text, re.DOTALL)[1])
    marks = [(step, kind) for step, kind, _ in sorted(data["runs"][0]["marks"])]
    assert marks == [(6, "start"), (8, "alert"), (9, "bad step")]
    assert "Zero all along: Dead experts" in text
    assert data["runs"][0]["series"]["lm_loss"]["y"][:2] == [1.5, 2.5], "every step, not only the logged ones"
    titles = [figure["title"] for figure in data["figures"]]
    assert "Load of each expert" in titles and "Dead experts" not in titles


def test_a_run_that_stopped_shows_its_last_words(tmp_path):
    config = make_run(tmp_path, "one")
    (config.run.path / "logs" / "20261130-000000" / "rank_00000.err").write_text("RuntimeError: <out of> memory\n")
    write_beat(config.run.path, 24, {})
    text = page_of(config, now=4e9)
    assert "state stopped" in text and "does not seem to run" in text
    assert "RuntimeError: &lt;out of&gt; memory" in text


def test_sections_and_panels_without_anything_are_named_with_the_reason(tmp_path):
    config = make_run(tmp_path, "one")
    (config.run.path / "metrics.jsonl").write_text('{"step": 1, "lm_loss": 2.0, "balance_loss": 1.0}\n')
    text = page_of(config)
    assert "<b>Multi-token prediction</b>: nothing to show; the model has no MTP layer" in text
    assert "Not logged: Loss that is minimised" in text and 'href="#loss"' in text and 'href="#attention"' not in text


def test_a_run_that_has_logged_nothing_has_a_page_that_says_so(tmp_path, capsys):
    config = from_dict(Config, {"run": {"name": "young", "dir": str(tmp_path)}})
    config.run.path.mkdir()
    save_config(config)
    assert run(["report", f"run={config.run.path}"]) == 0
    assert capsys.readouterr().out == f"{config.run.path}/report.html: 0.0 MB, to open in a browser\n"
    text = (config.run.path / "report.html").read_text()
    assert "Nothing is logged yet" in text and "no step has been done yet" in text and "state not-begun" in text


def test_several_runs_share_figures_and_show_in_which_settings_they_differ(tmp_path):
    first, second = make_run(tmp_path, "first", project="a"), make_run(tmp_path, "second", lines=8, project="b")
    assert run(["report", "run=[first,second]", f"run.dir={tmp_path}"]) == 0
    text = (tmp_path / "first_second.html").read_text()
    assert "In which these runs differ" in text
    assert "<td><code>wandb.project</code></td><td><code>a</code></td><td><code>b</code></td>" in text
    assert page_of(first, second).count('class="state') == 2
    data = json.loads(re.search(r'id="page-data">(.*?)</script>', text, re.DOTALL)[1])
    lines = next(figure for figure in data["figures"] if figure["title"] == "Learning rate")["lines"]
    assert [(line["run"], line["label"], line["colour"]) for line in lines] == [(0, "first", 0), (1, "second", 1)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run=nope"], "run.name=nope is not a run in runs: it holds none"),
        (["run=[]"], "run=[] cannot be shown beside each other: name 1 to 8 different runs"),
        (["run=[a,a]"], "cannot be shown beside each other"),
        (["run=a", "output=/dev/null/x.html"], "output=/dev/null/x.html cannot be written: /dev/null: Not a directory"),
        (["runs=a"], "unknown setting runs=a: --help lists all that are known"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run(["report", *arguments])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_recipe_is_the_one_of_the_runs_own_command_line():
    name, config = _recipe_of(["python", "-m", "train", "--worker", "train", "-cn", "tiny_512e", "run.steps=3"])
    assert (name, config.model.experts) == ("tiny_512e", 512)
    assert _recipe_of([])[0] == "tiny"
    assert _recipe_of(["train", "-cn", "gone"]) == ("tiny", None) or _recipe_of(["train", "-cn", "gone"])[1] is None


def test_numbers_of_the_head_are_short():
    assert [short(number) for number in (0.5, 4.0, 2338.4, 327680, 79.7e9, 15e12)] == [
        "0.5",
        "4",
        "2,338",
        "327.7k",
        "79.7B",
        "15T",
    ]


def test_a_report_needs_no_torch():
    code = (
        "import sys, train.__main__, train.watch.report.page, train.watch.workspace; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0


@pytest.mark.slow  # 7 s a screen
@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
@pytest.mark.parametrize("screen", WIDTHS)
def test_a_browser_draws_every_figure_without_a_word_on_its_console(tmp_path, screen):
    first, second = make_run(tmp_path, "first"), make_run(tmp_path, "second", lines=8)
    probe = "<script>document.title = document.documentElement.scrollWidth - innerWidth</script></body>"
    for name, configs in {"one": [first], "two": [first, second]}.items():
        text = page_of(*configs)
        (tmp_path / f"{name}.html").write_text(text.replace("</body>", probe))
        dom, console = browse(tmp_path / f"{name}.html", WIDTHS[screen])
        assert "CONSOLE" not in console, console
        assert re.search(r"<title>-?\d+</title>", dom)[0] in ("<title>0</title>", "<title>-15</title>"), (
            "no sideways scrolling"
        )
        drawn = re.findall(r'<figure id="(figure-\d+)"[^>]*>(.*?)</figure>', dom, re.DOTALL)
        assert len(drawn) == text.count('<figure id="') > 40
        for figure, inside in drawn:
            marks = re.findall(r'class="curve" d="M[\d.]+,[\d.]+|<canvas width="(?!0)\d+"', inside)
            assert marks and "NaN" not in inside, figure


@pytest.mark.slow  # 7 s
@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_a_curve_of_few_points_shows_its_first_one(tmp_path):
    config = make_run(tmp_path, "one", lines=60)
    path = config.run.path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        of_layers = [name for name in line if name.startswith("attention_sink")]
        line |= dict.fromkeys(of_layers, 0.5 if number == 0 else 0.1)
        for name in of_layers if 0 < number < len(lines) - 1 else ():
            del line[name]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page_of(config)
    (tmp_path / "one.html").write_text(text)
    dom, _ = browse(tmp_path / "one.html", WIDTHS["desk"])
    (figure,) = re.findall(r"<figcaption>Attention on the first token <.*?</figure>", dom, re.DOTALL)
    assert 'class="curve"' in figure and 'class="beyond"' not in figure


def browse(path: Path, width: int) -> tuple[str, str]:
    """A page's elements once it is drawn, and what the browser wrote to its log."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    options += ["--virtual-time-budget=2000", f"--window-size={width},900", f"--user-data-dir={path.parent}/browser"]
    found = subprocess.run([BROWSER, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return found.stdout, found.stderr
