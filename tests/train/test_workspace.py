"""The view of a W&B project: what its objects say, and what a server of this process is sent in W&B's place."""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import wandb

from tests.train.test_report import logged_metrics
from train.__main__ import run
from train.settings.commands import DashboardConfig
from train.settings.run import Config, save_config
from train.settings.tree import ConfigError, from_dict
from train.watch.dashboard import SECTIONS
from train.watch.workspace import specification, workspace

NAMED = {"wandb": {"project": "mine", "entity": "me"}, "run": {"name": "one"}}


def sections(view: dict) -> dict[str, list[dict]]:
    """The panels of each section of a view as W&B is sent it."""
    found = view["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in found if section["panels"]}


@pytest.fixture
def packages():
    pytest.importorskip("wandb_workspaces", reason="needs the extra dashboard")


@pytest.mark.usefixtures("packages")
def test_the_view_has_every_section_and_each_panel_finds_what_is_logged():
    logged = set(logged_metrics())
    view = workspace(DashboardConfig(), from_dict(Config, NAMED), "me", logged)
    assert (view.entity, view.project, view.name, view.settings.x_axis) == ("me", "mine", "Tessera", "step")
    found = sections(specification(view))
    assert list(found) == [section.title for section in SECTIONS]
    names = {re.sub(r"(expert_load)/\w+", r"\1", name) for name in logged}
    for panel in (panel for panels in found.values() for panel in panels):
        config = panel["config"]
        named = config.get("metrics") or config.get("mediaKeys") or []
        assert names >= set(named), config["chartTitle"]
        if "metricRegex" in config:
            assert any(re.search(config["metricRegex"], name) for name in names), config["chartTitle"]
        else:
            assert named
        if panel["viewType"] == "Run History Line Plot":
            assert config["xAxis"] == "step"
    by_layer = next(panel["config"] for panel in found["Routing"] if panel["config"]["chartTitle"] == "MaxVio by layer")
    near = ("max_violation/3", "max_violation/mtp", "max_violation", "max_violation_micro/3")
    assert [name for name in near if re.search(by_layer["metricRegex"], name)] == list(near[:2])


@pytest.mark.usefixtures("packages")
def test_panels_of_what_a_run_does_not_log_are_left_out(tmp_path, capsys):
    config = from_dict(Config, {**NAMED, "run": {"name": "one", "dir": str(tmp_path)}})
    config.run.path.mkdir()
    save_config(config)
    (config.run.path / "metrics.jsonl").write_text('{"step": 1, "lm_loss": 2.0, "lr": 0.1}\n')
    file = tmp_path / "view.json"
    assert run(["dashboard", f"run={config.run.path}", f"output={file}"]) == 0
    assert capsys.readouterr().out == f"{file}: the view 'Tessera', as W&B would get it\n"
    found = sections(json.loads(file.read_text()))
    titles = {name: [panel["config"]["chartTitle"] for panel in panels] for name, panels in found.items()}
    assert titles == {"Loss": ["Language-model loss"], "Optimizer": ["Learning rate"]}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run=nope"], "run.name=nope is not a run in runs"),
        (["run=a", "output=/dev/null/x.json"], "output=/dev/null/x.json cannot be written"),
        (["run=a", "name=x"], "unknown setting name=x"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run(["dashboard", *arguments])
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("packages")
def test_without_a_key_it_says_what_to_do(tmp_path, monkeypatch):
    config = from_dict(Config, {**NAMED, "run": {"name": "one", "dir": str(tmp_path)}})
    config.run.path.mkdir()
    save_config(config)
    monkeypatch.setattr("train.watch.workspace.has_login", lambda: False)
    with pytest.raises(ConfigError, match=r"dashboard finds no API key: `wandb login`, or output=view\.json"):
        run(["dashboard", f"run={config.run.path}"])


class _Server(BaseHTTPRequestHandler):
    """W&B's GraphQL as far as a view is saved: who asks, and views by their names."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        query, variables = asked.get("query", ""), asked.get("variables") or {}
        answer: dict = {"viewer": {"id": "1", "username": "me", "entity": "me", "teams": {"edges": []}}}
        if "upsertView" in query:
            self.server.saved.append(variables)
            answer = {"upsertView": {"view": {"id": "view1", "name": variables["name"]}, "inserted": True}}
        elif "allViews" in query:
            node = {"id": "view1", "displayName": "Theirs", "spec": self.server.saved[-1]["spec"]}
            answer = {"project": {"allViews": {"edges": [{"node": node}]}}}
        body = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server in W&B's place, and a key for it; its ``saved`` are the variables of each view that it was sent."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    server.saved = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    wandb.teardown()  # forgets the server of this process
    yield server
    wandb.teardown()
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("packages")
def test_the_view_is_sent_to_the_server_and_again_under_its_address(server, tmp_path, capsys):
    config = from_dict(Config, {**NAMED, "run": {"name": "one", "dir": str(tmp_path)}})
    config.run.path.mkdir()
    save_config(config)
    (config.run.path / "metrics.jsonl").write_text('{"step": 1, "lm_loss": 2.0, "lr": 0.1}\n')
    assert run(["dashboard", f"run={config.run.path}"]) == 0
    (sent,) = server.saved
    assert (sent["entityName"], sent["projectName"], sent["displayName"]) == ("me", "mine", "Tessera")
    expected = specification(workspace(DashboardConfig(), config, "me", ["lm_loss", "lr"]))
    titles = {name: [panel["config"]["chartTitle"] for panel in panels] for name, panels in sections(expected).items()}
    found = sections(json.loads(sent["spec"]))
    assert {name: [panel["config"]["chartTitle"] for panel in panels] for name, panels in found.items()} == titles
    url = capsys.readouterr().out.split()[-1]
    assert url.startswith(f"http://127.0.0.1:{server.server_port}/me/mine?nw=")
    assert run(["dashboard", f"run={config.run.path}", f"url={url}"]) == 0
    assert server.saved[1]["id"] == "view1" and server.saved[1]["displayName"] == "Tessera"


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    config = from_dict(Config, {**NAMED, "run": {"name": "one", "dir": str(tmp_path)}})
    config.run.path.mkdir()
    save_config(config)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(
        ConfigError, match=r"dashboard needs the package wandb-workspaces .*\./launch\.sh setup dashboard"
    ):
        run(["dashboard", f"run={config.run.path}"])
