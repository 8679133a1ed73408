"""The report of a run: what is written, that it can be sent on its own, and that it warns."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from deeptime.decomposition import VAMP

from gdyn import report
from gdyn.config import RunConfig
from gdyn.engine import Engine
from gdyn.engines import Vamp
from gdyn.engines.vamp import findings, kinetics
from gdyn.engines.vamp.clock import Clock
from gdyn.engines.vamp.report import evaluate, write
from gdyn.inference import Run
from gdyn.phases import Phase
from gdyn.rundir import RunDir
from launch import analyze
from launch import evaluate as evaluation
from tests.engines.test_kinetics import THREE, TWO, chain, hard, soft

PICOSECONDS = Clock(0.5, "ps")
SCORES = {"vamp1": 1.2, "vamp2": 0.8, "vampe": 0.8, "singular_values": [0.8, 0.4], "effective_rank": 2}
ORIGIN = {"run": "<b>odd & name", "checkpoint": "p1-vamp2-e0003", "split": "test", "scores": SCORES}


class Page(HTMLParser):
    """Tags, and text outside of style."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.text += data + " "


def log_training(run_dir: RunDir) -> None:
    rows = [
        {"step": step, "phase": phase, "epoch": epoch, "split": split, "loss": -step / 90, "vamp2": step / 90}
        for epoch, phase in enumerate(("vamp2", "vamp_sym", "vamp2"))
        for step, split in ((30 * epoch + 10, "train"), (30 * epoch + 30, "train"), (30 * epoch + 30, "validation"))
    ]
    run_dir.metrics_jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 91, "pha')


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(run folder, predictions, summary) of two trajectories of a three-state chain."""
    run_dir = RunDir(tmp_path_factory.mktemp("run"))
    log_training(run_dir)
    predictions = [soft(chain(THREE, frames, 2, seed=frames), 3) for frames in (3000, 2000)]
    return run_dir, predictions, write(run_dir, predictions, 2, PICOSECONDS, ORIGIN, {"seed": 7})


def test_report_saves_predictions_summary_and_pictures(written):
    run_dir, predictions, summary = written
    for i, prediction in enumerate(predictions):
        saved = np.load(run_dir.predictions / f"test_{i}.npy")
        assert saved.dtype == np.float32
        np.testing.assert_array_equal(saved, prediction)
    on_disk = json.loads((run_dir.analysis / "analysis_summary.json").read_text(), parse_constant=pytest.fail)
    assert on_disk == summary
    names = {path.stem for path in run_dir.analysis.glob("*.png")}
    assert names == {"implied_timescales", "chapman_kolmogorov", "populations", "eigenvectors", "excerpt", "training"}


def test_summary_is_kinetics_in_physical_time(written):
    _, predictions, summary = written
    matrix = kinetics.koopman(predictions, 2)
    np.testing.assert_allclose(summary["timescales"]["values"], 0.5 * kinetics.timescales(matrix, 2))
    assert (summary["timescales"]["lag"], summary["timescales"]["unit"]) == (1.0, "ps")
    assert summary["implied_timescales"]["lags"][0] == 0.5
    assert np.sum(summary["transition_counts"]) == 2 * (2999 + 1999)
    np.testing.assert_allclose(sum(summary["populations"]["values"]), 1)
    assert summary["chapman_kolmogorov"]["times"] == [0, 1, 2, 3, 4, 5]


def test_page_stands_alone_and_shows_text_as_text(written):
    html = (written[0].analysis / "report.html").read_text()
    page = Page(html)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 6
    assert all(picture["src"].startswith("data:image/png;base64,") and picture["alt"] for picture in pictures)
    assert not {"script", "link", "iframe", "b>odd"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://", html)
    assert "<b>odd & name" in page.text  # escaped in the source, so the parser sees it as text
    assert written[2]["learned"] in page.text


def test_learned_names_states_timescale_band_and_populations(written):
    sentence, times = written[2]["learned"], written[2]["timescales"]
    assert sentence.startswith("3 states. ")
    for key in ("values", "lower", "upper"):
        assert f"{times[key][0]:.3g}" in sentence
    assert sentence.count("% in state") == 3


def test_training_curves_have_a_panel_per_phase_and_mark_boundaries(written):
    figure = report.training_figure(written[0].metrics_jsonl, [("vamp2", "VAMP-2"), ("absent", "never logged")])
    assert figure is not None
    *losses, scores = figure.axes
    assert [axes.get_title() for axes in losses] == ["phase vamp2", "phase vamp_sym", "phase vamp2"]
    boundaries = [line.get_xdata()[0] for line in scores.lines if line.get_linestyle() == ":"]
    assert boundaries == [40, 70]


def test_a_run_without_metrics_has_no_training_curves(tmp_path):
    assert report.training_figure(tmp_path / "metrics.jsonl") is None


def warn(p: np.ndarray, lag: int) -> str:
    return " ".join(findings.warnings(kinetics.analyse(p, lag), Clock()))


def test_a_good_model_has_no_warnings():
    assert warn(hard(chain(TWO, 6000, 2), 2), 1) == ""


def test_warnings_say_what_cannot_be_believed():
    unused = np.concatenate([hard(chain(TWO, 2000), 2), np.zeros((2000, 1, 1))], axis=-1)
    text = warn(unused, 1)
    for fact in ("Process 2: no timescale", "span 1 independent", "State 2 (0 %) is hardly populated"):
        assert fact in text
    assert "Process 1 (" in warn(hard(chain(TWO, 4000), 2), 3)
    assert "is faster than the lag of 3 frames" in warn(hard(chain(TWO, 4000), 2), 3)
    slow = np.array([[0.998, 0.002], [0.002, 0.998]])
    assert "bands are too narrow" in warn(hard(chain(slow, 1000), 2), 1)
    hidden = np.array([[0.90, 0.10, 0.00], [0.10, 0.89, 0.01], [0.00, 0.004, 0.996]])
    text = warn(hard((chain(hidden, 20000, 2) > 0).astype(int), 2), 5)
    assert "Chapman-Kolmogorov test fails" in text
    assert "Process 1 still slows with the lag" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(113.4, "113"), (0.012345, "0.0123"), (21512.0, "21,500"), (0, "0"), (np.nan, "—"), (np.inf, "—")],
)
def test_numbers_as_people_write_them(value, text):
    assert report.number(value) == text


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """An untrained tiny network on random frames, as `load_run` would open it."""
    folder, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir()
        arrays = {
            "atom_types": np.array([6, 8, 1, 1], dtype=np.int32),
            "target_index": np.array([0, 2], dtype=np.int32),
            "nbr_lists": np.tile(np.array([[1, 2], [0, 3], [0, 1], [1, 0]], dtype=np.int32), (150, 1, 1)),
            "nbr_dists": rng.uniform(1, 4, (150, 4, 2)).astype(np.float32),
        }
        for key, value in arrays.items():
            np.save(folder / name / f"{key}.npy", value)
    sources = [str(folder / "a"), str(folder / "b")]
    engine = Vamp(
        sources[:1], sources[:1], sources, tau=3, state_len=3, atom_fea_len=8, n_conv=1, lobe_sharing="shared",
        frame_time=0.5, time_unit="ps",
    )  # fmt: skip
    config = RunConfig(engine, "fp32_zero1", str(folder / "run"), phases=[Phase("vamp2", 1)])
    torch.manual_seed(0)
    return Run(RunDir(folder / "run"), config, engine.model().eval(), "p0-vamp2-e0001")


def test_engine_report_binds_a_run(run):
    summary = run.engine.report(run, lags=[1, 3, 9])
    assert summary["implied_timescales"]["lags"] == [0.5, 1.5, 4.5]
    assert np.load(run.dir.predictions / "test_1.npy").shape == (150, 2, 3)
    assert "Vamp" in Page((run.dir.analysis / "report.html").read_text()).text


def test_evaluate_scores_the_pooled_set_once_like_deeptime(run):
    result = evaluate(run, run.engine.test)
    trajectories = run.engine.trajectories(run.engine.test)
    parts = [run.engine.predict(run, trajectory).astype(np.float64)[..., :2] for trajectory in trajectories]
    x, y = (np.concatenate([p[s].reshape(-1, 2) for p in parts]) for s in (slice(None, -3), slice(3, None)))
    model = VAMP(lagtime=3, epsilon=1e-14).fit_fetch((x, y))
    for name, key in (("vamp1", "VAMP1"), ("vamp2", "VAMP2"), ("vampe", "VAMPE")):
        assert result[name] == pytest.approx(model.score(key[4:] if key[4:] == "E" else int(key[4:])) - 1, abs=1e-6)
    np.testing.assert_allclose(result["singular_values"], model.singular_values[:2], atol=1e-6)
    np.testing.assert_allclose(result["timescales"]["values"], -1.5 / np.log(result["singular_values"]))
    assert result["timescales"]["lag"] == 1.5
    assert result["frames"] == 300


def test_evaluate_prints_and_writes_json(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluation, "load_run", lambda path, checkpoint: run)
    data = [word for source in run.engine.test for word in ("--data", source)]
    assert evaluation.main(["anywhere", *data, "--json", str(tmp_path / "scores.json")]) == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    assert f"{result['vamp2']:.6f}" in capsys.readouterr().out
    assert evaluation.main(["anywhere", "--data", str(tmp_path / "nothing")]) == 2
    assert "nothing is not a directory" in capsys.readouterr().err


def test_analyze_prints_the_short_table(run, monkeypatch, capsys):
    monkeypatch.setattr(analyze, "load_run", lambda path, checkpoint: run)
    assert analyze.main(["anywhere", "--split", "validation", "--lags", "1", "5"]) == 0
    printed = capsys.readouterr().out
    assert str(run.dir.analysis / "report.html") in printed
    assert "validation_0.npy" in printed


def test_an_engine_without_an_outline_of_its_own_prints_its_numbers(run):
    result = {"checkpoint": "p0", "frames": 300, "vamp2": 0.123456789, "values": [1, 2], "none": None}
    expected = ["checkpoint  p0", "frames      300", "vamp2       0.123457"]
    assert Engine.evaluation_lines(run.engine, result) == Engine.report_lines(run.engine, result) == expected


@pytest.mark.parametrize(
    "command", [lambda path: analyze.main([path]), lambda path: evaluation.main([path, "--data", path])]
)
def test_a_folder_that_is_no_run_is_one_message_and_exit_2(command, tmp_path, capsys):
    assert command(str(tmp_path)) == 2
    message = capsys.readouterr().err
    assert "is not a run folder" in message
    assert "Traceback" not in message
