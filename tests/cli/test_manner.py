"""How the command line speaks: wrong input of every kind is one line that names it, and says what may be meant."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from spectralmoe.cli.console import Clock, count, over_seeds, print_finding, say
from spectralmoe.json_files import read_json
from spectralmoe.presets import find_preset
from spectralmoe.training.logs import LOGS, open_logs
from spectralmoe.training.logs.wandb import WandbLog
from spectralmoe.training.settings import parse
from spectralmoe.training.settings.run import TrainSettings

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = 'data = "digits"\nrouter = "linear"\ndepth = 1\ntrain_size = 50\n[optimization]\nepochs = 2\n'


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "c.toml").write_text(SMALL)
    return tmp_path / "c.toml"


def test_no_word_of_the_help_is_taken_for_markup(call):
    for verb in ("train", "bench", "compare"):
        assert "[default" in call(verb, "--help")[1]
    assert "[default" in call("adapt", "trials", "--help")[1]
    assert "with a section [backbone] a timm model" in " ".join(call("train", "--help")[1].split())
    assert "[SUITE]..." in call("bench", "--help")[1]


def test_list_speaks_plain_words(call):
    out = call("list")[1]
    assert "\\" not in out
    assert ":math:" not in out
    assert "``" not in out
    assert "whose scores sum to p (p, max_k, normalize, score)" in out
    assert "a sample is degraded (key, width, token, hidden)" in " ".join(out.split())  # its own, not the network's


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--routers", "liner", "--out", "o"], "unknown router 'liner'; did you mean 'linear'? known:"),
        (["compare", "--routers", "SR-MOE", "--out", "o"], "did you mean 'sr-moe'?"),
        (["compare", "--data", "minst5k", "--out", "o"], "unknown data set 'minst5k'; did you mean 'mnist5k'? known:"),
        (["bench", "layr"], "unknown suite 'layr'; did you mean 'layer'? known:"),
        (["compare", "--routers", "zzz", "--out", "o"], "unknown router 'zzz'; known:"),
    ],
)
def test_near_names_are_offered(refused, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optimization]\nepochs = true\n", "optimization.epochs should be a valid integer, got True"),
        ("[optimization]\nlr = true\n", "optimization.lr should be a valid number, got True"),
        ("depth = '2'\n", "depth should be a valid integer, got '2'"),
        ("hold_out = 7\n", "hold_out should be a valid string, got 7; write it in quotes"),
        ("[network]\nk = 'sofft'\n", "network.k should be a valid integer or 'soft', got 'sofft'"),
        ("network = 3\n", "network should be a section, got 3"),
        ("[optimisation]\nlr = 1\n", "unknown key 'optimisation'; did you mean 'optimization'?"),
        (f"a = {'[' * 5000}{']' * 5000}\n", "not a readable TOML file (nested too deeply)"),
        (f"depth = {'9' * 5000}\n", "not a readable TOML file"),
    ],
    ids=lambda value: value[:30],
)
def test_settings_that_are_wrong(refused, tmp_path, text, words):
    (tmp_path / "c.toml").write_text('data = "digits"\n' + text)
    assert words in refused("train", "--config", tmp_path / "c.toml", "--print-config")


def test_a_toml_file_may_begin_with_a_byte_order_mark(call, config):
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert call("train", "--config", config, "--print-config")[0] == 0


@pytest.mark.parametrize("name", ["train.toml", "vit.toml", "emoe-vit.toml"])
def test_the_printed_config_reads_back_as_the_same(call, name):
    code, out, _ = call("train", "--config", EXAMPLES / name, "--seed", 7, "--print-config")
    assert code == 0
    values = tomllib.loads((EXAMPLES / name).read_text())
    values.setdefault("optimization", {})["seed"] = 7
    assert parse(TrainSettings, tomllib.loads(out), "printed") == parse(TrainSettings, values, "file")


def test_set_changes_values_by_their_type(call, config):
    changes = ("optimization.lr=1e-2", "network.k=soft", "router=sr-moe", "depth=3", "hold_out='7'", "train_size=90")
    options = [part for change in changes for part in ("--set", change)]
    code, out, _ = call("train", "--config", config, *options, "--print-config", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["optimization"] | {"lr": 0.01, "epochs": 2} == found["optimization"]
    assert found["network"]["k"] == "soft"
    assert [found[key] for key in ("router", "depth", "hold_out", "train_size")] == ["sr-moe", 3, "7", 90]


def test_set_goes_before_options_and_may_choose_where_these_go(call):
    options = ("--seed", 5, "--router", "linear", "--set", "optimization.seed=3", "--set", "backbone.name=vit_tiny")
    code, out, _ = call("train", "--data", "mnist5k", *options, "--print-config", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["optimization"]["seed"], found["moe"]["router"]) == (3, "linear")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("depht=2", "with --set: unknown key 'depht'; did you mean 'depth'?"),
        ("netwrk.k=2", "unknown key 'netwrk'; did you mean 'network'?"),
        ("depth", "--set 'depth' is no assignment such as network.k=2"),
        ("=3", "is no assignment"),
        ("a..b=3", "is no assignment"),
        ("data.x=3", "data.x: data is a value, not a section"),
        ("depth=true", "depth should be a valid integer, got True"),
        ("depth=2\nrouter='x'", "depth should be a valid integer"),
    ],
)
def test_set_that_cannot_be(refused, config, change, words):
    assert words in refused("train", "--config", config, "--set", change, "--print-config")


def test_a_module_that_a_file_names_is_not_imported(refused, call, tmp_path, monkeypatch):
    (tmp_path / "harm.py").write_text(
        "from pathlib import Path\nfrom spectralmoe import LinearScorer as Own\nPath('imported').touch()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "c.toml").write_text(SMALL.replace('"linear"', '"harm:Own"'))
    line = refused("train", "--config", "c.toml", "--out", "o")
    assert "router 'harm:Own' is a class of your own; if you trust it, add --allow harm:Own" in line
    assert not (tmp_path / "imported").exists()
    (tmp_path / "compare.toml").write_text('data = "digits"\nrouters = ["linear", {scorer = "harm:Own"}]\n')
    line = refused("compare", "--config", "compare.toml", "--out", "c")
    assert "router 'harm:Own' is a class of your own; if you trust it, add --allow harm:Own" in line
    assert not (tmp_path / "imported").exists()
    assert call("train", "--config", "c.toml", "--allow", "harm:Own", "--out", "o")[0] == 0
    assert (tmp_path / "imported").exists()


def test_errors_are_json_where_json_was_asked_for(call, config):
    code, out, err = call("compare", "--routers", "liner", "--out", "o", "--json")
    assert json.loads(out) == {"error": err.strip().removeprefix("error: "), "exit_code": 2}
    assert code == 2
    code, out, _ = call("compare", "--nonsense", "--json")
    assert json.loads(out)["exit_code"] == code == 2


def test_a_diverged_training_is_no_mistake_of_the_users(call, config, tmp_path):
    wild = ("--set", "optimization.lr=1e30", "--set", "optimization.warmup=0", "--set", "optimization.epochs=20")
    code, out, err = call("train", "--config", config, *wild, "--out", tmp_path / "o", "--json")
    assert code == 1
    assert "training diverged at step" in err
    assert json.loads(out)["exit_code"] == 1


def test_a_file_is_no_folder(refused, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    options = ("--data", "digits", "--seeds", 1)
    line = refused("compare", *options, "--out", tmp_path / "README.md")
    assert "README.md: it is a file, not a folder" in line
    assert "a part of its path is a file" in refused("compare", *options, "--out", tmp_path / "README.md" / "x")
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inspection.json", "holds an inspection (see its report.html), not a model"),
        ("results.json", "holds a comparison (its models are the folders in "),
        ("fewshot.json", "holds few-shot results"),
        ("training.safetensors", "holds a training that has not ended"),
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "evaluate"])
def test_what_a_verb_wrote_is_called_what_it_is(refused, tmp_path, verb, name, words):
    (tmp_path / name).write_text("{}")
    assert words in refused(verb, tmp_path)
    if name.endswith(".json"):
        assert "is a .json file, not a model" in refused(verb, tmp_path / name)


def test_colons_in_names(call, tmp_path):
    for name in ("a:1", "b:2"):
        (tmp_path / "my:set" / name).mkdir(parents=True)
        for index in range(12):
            np.save(tmp_path / "my:set" / name / f"{index}:x.npy", np.random.default_rng(index).random((8, 8)))
    (tmp_path / "c:d.toml").write_text(f'data = "folder:{tmp_path}/my:set"\ndepth = 1\n[optimization]\nepochs = 1\n')
    model = tmp_path / "out:1"
    code, _, err = call("train", "--config", tmp_path / "c:d.toml", "--out", model)
    assert code == 0, err
    assert call("evaluate", model)[0] == 0
    image = tmp_path / "my:set" / "a:1" / "0:x.npy"
    found = json.loads(call("predict", model, image, "--json")[1])
    assert found[0]["file"] == str(image)
    assert found[0]["class"] in ("a:1", "b:2")


def test_time_left_is_told_only_when_it_can_be_known():
    now = [0.0]
    clock = Clock(lambda: now[0])

    def left(at, done):
        now[0] = at
        return clock.left(done)

    assert left(5.0, 0.0) == ""  # the clock starts with the work
    assert left(6.0, 1e-7) == ""  # too soon
    assert left(8.0, 1e-7) == ""  # 3 seconds of work tell nothing of a year
    assert left(65.0, 0.25) == "3:00 left"
    assert left(65.0 + 3600, 0.5) == "1:01:00 left"
    assert left(7000.0, 1.0) == ""
    started_again = Clock(lambda: now[0])
    now[0] = 0.0
    assert started_again.left(0.5) == ""
    now[0] = 10.0
    assert started_again.left(0.75) == "0:10 left"  # what was done before is no measure of speed


def test_one_seed_is_one_and_has_no_interval(call, tmp_path):
    assert [count(n, "seed") for n in (0, 1, 2)] == ["0 seeds", "1 seed", "2 seeds"]
    assert "±" not in over_seeds(1)
    options = ("--data", "digits", "--depths", 1, "--epochs", 1, "--train-size", 50, "--trials", 1)
    code, out, _ = call("compare", *options, "--routers", "linear", "--seeds", 1, "--out", tmp_path / "o")
    assert code == 0
    assert "digits, 1 seed, k = 2" in out
    assert "±" not in out
    assert "Paired differences" not in (tmp_path / "o" / "table.md").read_text()


@pytest.mark.parametrize("width", [60, 80])
def test_findings_are_wrapped_on_a_terminal_and_whole_in_a_pipe(capsys, monkeypatch, width):
    long = "word " * 60
    print_finding("warning", "dead_experts", [long], long)
    assert max(map(len, capsys.readouterr().out.splitlines())) > 200
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    print_finding("warning", "dead_experts", [long], long)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines).split()).count("word") == 120
    assert all(line.startswith("            word") for line in lines[2:] if "-" not in line and "to do" not in line)


def test_a_finished_training_is_told_epoch_by_epoch_and_logged(call, config, tmp_path):
    out = tmp_path / "o"
    code, _, err = call("train", "--config", config, "--log", "csv", "--out", out)
    assert code == 0, err
    held = read_json(out / "history.json")
    assert held["title"] == "linear on digits"
    for number, epoch in enumerate(held["epochs"], 1):
        told = f"training linear, epoch {number}/2: loss {epoch['loss']:.3g}, validation "
        assert told + f"{epoch['validation_accuracy']:.2f}%" in err
    rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    assert rows[0] == ["epoch", "loss", "validation_accuracy", "seconds"]
    assert [row[0] for row in rows[1:]] == ["1", "2"]
    assert [float(row[1]) for row in rows[1:]] == [epoch["loss"] for epoch in held["epochs"]]
    (out / "log.csv").unlink()
    assert call("train", "--config", config, "--log", "csv", "--out", out)[0] == 0  # nothing to train, all to write
    assert [line.split(",") for line in (out / "log.csv").read_text().splitlines()] == rows


def test_a_log_that_is_not_there_is_refused_before_anything_runs(refused, config, tmp_path, monkeypatch):
    monkeypatch.setattr("spectralmoe.training.logs.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        line = refused("train", "--config", config, "--log", f"csv,{name}", "--out", tmp_path / "o")
        assert f"--log {name} needs the package {name}: pip install {name}" in line
    assert "unknown log 'cvs'; did you mean 'csv'?" in refused(
        "train", "--config", config, "--log", "cvs", "--out", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()


EPOCHS = [{"loss": 2.0, "validation_accuracy": float("nan")}, {"loss": 1.0, "validation_accuracy": 50.0}]


class Run:
    """What wandb gives, as far as the log uses it: steps must grow."""

    def __init__(self, step):
        self.step, self.lines = step, []

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self):
        self.lines.append("finished")


def test_a_wandb_run_goes_on_without_duplicates(tmp_path, monkeypatch):
    runs = []

    class Module:
        @staticmethod
        def init(**arguments):
            runs.append((arguments, Run(step=0 if not runs else 2)))
            return runs[-1][1]

    monkeypatch.setitem(sys.modules, "wandb", Module)
    first = WandbLog(tmp_path, "title")
    first.write(EPOCHS[:1])
    first.close()
    second = WandbLog(tmp_path, "title")  # the first epoch was logged: the next step is 2
    second.write(EPOCHS)
    assert runs[0][1].lines == [(1, {"loss": 2.0}), "finished"]
    assert runs[1][1].lines == [(2, {"loss": 1.0, "validation_accuracy": 50.0})]
    assert runs[0][0]["id"] == runs[1][0]["id"]
    assert runs[0][0]["resume"] == "allow"


def test_tensorboard_gets_each_epoch_once(tmp_path, monkeypatch):
    written = []

    class Events:
        def __init__(self, folder, purge_step):
            written.append((Path(folder).name, purge_step))

        def add_scalar(self, *scalar):
            written.append(scalar)

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Events
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("spectralmoe.training.logs.find_spec", lambda name: name)
    assert set(LOGS) == {"csv", "tensorboard", "wandb"}
    with open_logs(["tensorboard"], tmp_path, "title") as (log,):
        log.write(EPOCHS[:1])
        log.write(EPOCHS)
    scalars = [("loss", 2.0, 1), ("loss", 1.0, 2), ("validation_accuracy", 50.0, 2)]
    assert written == [("tensorboard", 0), *scalars, "closed"]


def test_the_bar_stays_on_one_screen(config, tmp_path):
    """On a terminal of 60 columns no line is longer, and the running loss is there."""
    code = (
        "import sys; from spectralmoe.cli.console import show_progress\n"
        "with show_progress() as progress:\n"
        "    text = 'training linear+load_balance, epoch 1/8: loss 0.4, validation 93.2%'\n"
        "    for n in range(3): progress(text, n / 3, 'loss 0.3')"
    )
    env = {"FORCE_COLOR": "1", "COLUMNS": "60", "PYTHONPATH": ":".join(sys.path), "TERM": "xterm"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stderr
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n")
    assert "loss 0.3" in " ".join(plain.split())
    assert max(map(len, plain.splitlines())) <= 60


def test_say_does_not_break_words(capsys):
    say("a" * 200)
    assert capsys.readouterr().out == "a" * 200 + "\n"


def test_the_settings_file_of_the_docs_says_parts_in_sections(tmp_path, call):
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    settings = parse(TrainSettings, tomllib.loads(text), "compare.md")
    preset = find_preset(settings.row)
    assert (preset.scorer["type"], preset.selector, preset.experts["activation"]) == (
        "prototype",
        {"type": "topp", "p": 0.7},
        "swiglu",
    )
    assert preset.terms["load_balance"].weight == 0.01
    (tmp_path / "c.toml").write_text(text)
    code, out, _ = call("train", "--config", tmp_path / "c.toml", "--print-config")
    assert code == 0
    assert parse(TrainSettings, tomllib.loads(out), "printed") == settings


def test_a_router_of_the_command_line_stands_for_that_of_the_file(call, refused, config, tmp_path, monkeypatch):
    table = '{scorer = "cosine", temperature = 0.2}'
    code, _, err = call("train", "--config", config, "--router", table, "--out", tmp_path / "o", "--json")
    assert code == 0, err
    assert json.loads((tmp_path / "o" / "config.json").read_text())["meta"]["router"] == table
    (layer,) = json.loads((tmp_path / "o" / "config.json").read_text())["layers"].values()
    assert layer["router"]["scorer"] == {
        "type": "cosine",
        "dim": 64,
        "num_experts": 8,
        "proj_dim": None,
        "temperature": 0.2,
    }
    assert "unknown router 'liner'" in refused(
        "train", "--config", config, "--router", "liner", "--out", tmp_path / "p"
    )
    (tmp_path / "trusted.py").write_text("ROW = {'scorer': 'linear', 'terms': {'router_z': 'much'}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    line = refused("train", "--config", config, "--router", "trusted:ROW", "--out", tmp_path / "q")
    assert "router 'trusted:ROW': term 'router_z' needs a weight, such as router_z = 0.01" in line
