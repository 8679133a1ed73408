"""Scores, report and page of a monodecoder run: numbers against scikit-learn and NumPy, and what a reader is told."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from sklearn import metrics

from gdyn.engines.monodecoder import findings, report, scores
from gdyn.engines.monodecoder.scores import UNKNOWN, Survey
from gdyn.errors import UserError
from gdyn.inference import Run
from gdyn.rundir import read_json, read_metrics
from launch import analyze, export
from launch import evaluate as evaluation
from tests.engines.monodecoder_run import CODES, LEAST_PLDDT
from tests.proteins import write_proteins
from tests.test_report import Page


@pytest.fixture(scope="module")
def run(monodecoder_run) -> Run:
    return monodecoder_run


@pytest.fixture(scope="module")
def result(run):
    return report.evaluate(run, run.engine.test)


@pytest.fixture(scope="module")
def everything(run):
    """(batch of the whole test split, what the network says of it, which residues have enough confidence)."""
    structures = run.engine.structures(run.engine.test)
    batch = structures[np.arange(len(structures))]
    known = batch["plddt"].numpy() >= LEAST_PLDDT
    assert 0 < known.sum() < len(known)
    with torch.inference_mode():
        return batch, run.model(batch, torch.zeros((2, 0), dtype=torch.int64)), known


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_scikit_learns(ties) -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 50, 1000):
        true = rng.random(size) < 0.2
        true[rng.integers(size)] = True
        values = rng.integers(0, 5, size) / 5 if ties else rng.random(size)
        assert scores.average_precision(true, values) == pytest.approx(metrics.average_precision_score(true, values))
    assert math.isnan(scores.average_precision(np.zeros(3, bool), np.ones(3)))


def test_contact_scores_are_those_of_a_loop_over_pairs() -> None:
    rng, n = np.random.default_rng(1), 30
    contacts, p = np.triu(rng.random((n, n)) < 0.15, 1), np.triu(rng.random((n, n)), 1)
    contacts, p = contacts | contacts.T, p + p.T
    known = rng.random(n) < 0.8
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n) if known[i] and known[j]]
    far = [(i, j) for i, j in pairs if j - i >= 6]
    best = sorted(far, key=lambda pair: -p[pair])[:n]
    found = scores.contact_scores(contacts, p, known)
    assert found == pytest.approx(
        {
            "average_precision": metrics.average_precision_score(
                [contacts[at] for at in pairs], [p[at] for at in pairs]
            ),
            "average_precision_long": metrics.average_precision_score(
                [contacts[at] for at in far], [p[at] for at in far]
            ),
            "precision_at_l": sum(contacts[at] for at in best) / n,
        }
    )


def test_scores_of_residues_are_scikit_learns(result, everything) -> None:
    batch, out, known = everything
    amino, secondary = batch["amino_acids"].argmax(1).numpy(), batch["secondary"].argmax(1).numpy()
    probabilities = out["aa_logits"].softmax(1).double().numpy()
    probabilities /= probabilities.sum(1, keepdims=True)
    assert result["aa_cross_entropy"] == pytest.approx(metrics.log_loss(amino, probabilities, labels=range(20)), 1e-5)
    assert result["aa_perplexity"] == pytest.approx(math.exp(result["aa_cross_entropy"]))
    assert result["aa_accuracy"] == metrics.accuracy_score(amino, probabilities.argmax(1))
    assert result["ss_accuracy"] == metrics.accuracy_score(secondary[known], out["ss_logits"].argmax(1)[known])
    assert (result["structures"], result["residues"]) == (8, len(amino))
    shares = np.unique_counts(out["codes"].numpy()).counts / len(amino)
    assert result["codebook_perplexity"] == pytest.approx(np.prod(shares**-shares))
    assert (result["codes_used"], result["codes"]) == (len(shares), CODES)


def test_angle_errors_are_the_shorter_way_round_and_leave_out_what_is_undefined(result, everything) -> None:
    batch, out, known = everything
    true, said = (angles.double().numpy()[known] for angles in (batch["angles"], out["angles"]))
    ways = np.abs(said - true)[..., None] + 2 * np.pi * np.array([-1, 0, 1])
    errors = np.degrees(np.abs(ways).min(-1))
    assert result["angle_mae_degrees"] == pytest.approx(errors[true != 0].mean(), rel=1e-4)
    for i, name in enumerate(("phi", "psi", "omega")):
        expected = errors[:, i][true[:, i] != 0].mean()
        assert result[f"{name}_mae_degrees"] == pytest.approx(expected, rel=1e-4)
    assert scores.wrapped(np.radians(350.0)) == pytest.approx(np.radians(-10))


def test_contacts_are_means_over_structures(run, result) -> None:
    structures = run.engine.structures(run.engine.test)
    precision, by_nearness = [], []
    for index in range(len(structures)):
        batch = structures[np.array([index])]
        with torch.inference_mode():
            out = run.model(batch, torch.zeros((2, 0), dtype=torch.int64))
            (p,) = run.model.decoders.contact_probabilities(out["quantized"], batch["lengths"])
        distances = torch.cdist(batch["coordinates"], batch["coordinates"]).numpy()
        pairs = np.argwhere(np.triu(np.ones_like(distances), 1))
        i, j = pairs[(batch["plddt"].numpy()[pairs] >= LEAST_PLDDT).all(1)].T
        precision.append(metrics.average_precision_score(distances[i, j] < 8, p.numpy()[i, j]))
        by_nearness.append(metrics.average_precision_score(distances[i, j] < 8, i - j))
    assert result["contact_average_precision"] == pytest.approx(np.mean(precision))
    assert result["chance"]["contact_average_precision"] == pytest.approx(np.mean(by_nearness))


def test_chance_is_always_saying_the_most_frequent(result, everything) -> None:
    batch, _, known = everything
    counts = batch["amino_acids"].sum(0).numpy()
    shares = counts[counts > 0] / counts.sum()
    assert result["chance"]["aa_accuracy"] == pytest.approx(shares.max())
    assert result["chance"]["aa_cross_entropy"] == pytest.approx(-np.sum(shares * np.log(shares)))
    assert result["chance"]["ss_accuracy"] == pytest.approx(float(batch["secondary"][known].mean(0).max()))
    psi = batch["angles"][known, 1].double().numpy()
    psi = psi[psi != 0]
    mean = np.angle(np.exp(1j * psi).mean())
    errors = np.abs(np.angle(np.exp(1j * (psi - mean))))
    assert result["chance"]["psi_mae_degrees"] == pytest.approx(np.degrees(errors.mean()), rel=1e-4)


SAME = {
    "aa_cross_entropy": "aa",
    "aa_accuracy": "aa_accuracy",
    "ss_accuracy": "ss_accuracy",
    "angle_mae_degrees": "angle_mae_degrees",
    "codebook_perplexity": "codebook_perplexity",
}
"""Scores of an evaluation, and what training calls them."""


def test_evaluation_is_the_validation_of_the_training(run, result) -> None:
    """On the same file, with residues of low confidence left out of both."""
    validation = read_json(run.dir.summary_json)["validation"]
    for name, in_training in SAME.items():
        assert result[name] == pytest.approx(validation[in_training], abs=1e-4), name
    assert result["losses"] == pytest.approx({name: validation[name] for name in result["losses"]}, abs=1e-4)
    assert result["losses"].keys() >= {"loss", "aa", "ss", "edge", "logit", "angles", "vq", "fft2"}
    assert result["least_plddt"] == LEAST_PLDDT


def test_what_is_promised_to_scripts_is_there(result) -> None:
    assert isinstance(result["contact_average_precision"], float)
    assert all(isinstance(result[name], float) for name in SAME)


def by_hand(**changes: np.ndarray) -> Survey:
    """Six residues with two of three codes; two amino acids and one secondary structure are not known."""
    residues = {
        "codes": np.array([0, 0, 0, 2, 2, 2]),
        "amino": np.array([0, 0, UNKNOWN, 5, 5, UNKNOWN]),
        "amino_decoded": np.array([0, 5, 5, 5, 5, 5]),
        "amino_nats": np.array([1.0, 2.0, np.nan, 1.0, 0.0, np.nan]),
        "secondary": np.array([1, 1, 2, 0, 0, UNKNOWN]),
        "secondary_decoded": np.array([1, 1, 1, 0, 0, 0]),
        "angles": np.radians([[170, 10, np.nan], [-170, 20, 180]] * 3),
        "angles_decoded": np.radians([[-170, 10, 0], [170, 20, 180]] * 3),
    }
    contacts = {name: np.array([0.5, np.nan]) for name in ("average_precision", "average_precision_long")}
    return Survey(residues | changes, contacts, contacts, 3)


def test_what_has_no_label_does_not_count() -> None:
    found = scores.scores(by_hand())
    assert found["aa_cross_entropy"] == 1.0
    assert found["aa_accuracy"] == 3 / 4
    assert found["ss_accuracy"] == 4 / 5
    assert found["phi_mae_degrees"] == pytest.approx(20)
    assert found["angle_mae_degrees"] == pytest.approx((6 * 20 + 6 * 0 + 3 * 0) / 15)
    assert found["contact_average_precision"] == 0.5
    assert found["codebook_perplexity"] == pytest.approx(2)
    nothing = by_hand(amino=np.full(6, UNKNOWN), amino_nats=np.full(6, np.nan), angles=np.full((6, 3), np.nan))
    assert all(
        math.isnan(scores.scores(nothing)[name]) for name in ("aa_accuracy", "aa_cross_entropy", "phi_mae_degrees")
    )


def test_a_letter_is_described_by_its_residues() -> None:
    first, unused, last = scores.describe(by_hand())
    assert (first.share, unused.share, last.share) == (0.5, 0, 0.5)
    np.testing.assert_allclose(first.secondary, [0, 2 / 3, 1 / 3])
    np.testing.assert_allclose(last.secondary, [1, 0, 0])
    # not 57 degrees, the mean of 170, -170 and 170 as plain numbers
    assert first.angles[0] == pytest.approx(np.angle(np.exp(1j * np.radians([170, -170, 170])).mean()))
    assert first.enrichment[0] > 0 > first.enrichment[5]
    np.testing.assert_allclose(unused.enrichment, 0, atol=1e-12)
    assert np.isnan(unused.secondary).all() and np.isnan(unused.angles).all()


def test_warnings_say_what_cannot_be_believed(result) -> None:
    def warned(**changes: float) -> str:
        good = result | {"residues": 10**6, "codebook_perplexity": 11.0, "angle_mae_degrees": 10.0}
        good |= {"aa_accuracy": 0.5, "aa_cross_entropy": 1.5, "ss_accuracy": 0.9}
        good |= {"contact_average_precision": 0.99, "contact_average_precision_long": 0.5}
        good["chance"] = result["chance"] | {"contact_average_precision_long": 0.04}
        return " ".join(findings.warnings(good | changes, [1 / 12] * 11 + [changes.get("last", 0.05)]))

    assert warned() == ""
    assert "codebook has collapsed: 1.5 letters" in warned(codebook_perplexity=1.5)
    assert "1 of 12 letters cover less than 0.1 %" in warned(last=0.0)
    assert "Secondary structure: no better" in warned(ss_accuracy=0.2)
    assert "Amino acids: no better" in warned(aa_accuracy=0.01)
    assert "nats) say no more than their frequencies" in warned(aa_cross_entropy=3.5)
    assert "Backbone angles: no better than always giving their means (90° against" in warned(angle_mae_degrees=90.0)
    assert "Contacts come back no better (average precision 0.3) than by nearness" in warned(
        contact_average_precision=0.3
    )
    assert "Contacts of residues 6 or more apart come back no better" in warned(contact_average_precision_long=0.03)
    assert "are few for 12 letters" in warned(residues=300)


@pytest.fixture(scope="module")
def summary(run):
    return report.report(run, split="validation")


def test_report_writes_summary_strings_and_pictures(run, summary, result) -> None:
    on_disk = json.loads((run.dir.analysis / "analysis_summary.json").read_text(), parse_constant=pytest.fail)
    assert on_disk == summary
    assert {name: result[name] for name in summary["scores"]} == summary["scores"]
    assert summary["losses"] == result["losses"]
    names = {path.stem for path in run.dir.analysis.glob("*.png")}
    assert names == {"usage", "protein", "strip", "confusion", "training"}
    assert (run.dir.predictions / "validation.fasta").read_text().count(">") == 8
    assert sum(letter["share"] for letter in summary["letters"]) == pytest.approx(1)


def test_page_stands_alone_and_says_what_was_learned(run, summary) -> None:
    html = run.dir.report_html.read_text()
    page = Page(html)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 5
    assert all(picture["src"].startswith("data:image/png;base64,") and picture["alt"] for picture in pictures)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://", html)
    for text in (summary["learned"], *summary["warnings"], summary["shown"], "pLDDT below 0.3"):
        assert text in page.text
    string = (run.dir.predictions / "validation.fasta").read_text().split(f">{summary['shown']}\n")[1].split("\n")[0]
    assert string in page.text


def test_training_curves_are_of_what_training_logs(run) -> None:
    lines = read_metrics(run.dir.metrics_jsonl)
    for split in ("train", "validation"):
        logged = set().union(*(line for line in lines if line["split"] == split))
        assert {name for name, _ in report.CURVES} <= logged


def test_a_validation_held_out_from_the_training_files_has_a_report_too(run) -> None:
    engine = dataclasses.replace(run.engine, validation=None, validation_share=0.3)
    held_out = dataclasses.replace(run, config=dataclasses.replace(run.config, engine=engine))
    structures, sources = report.open_split(held_out, "validation")
    assert 0 < len(structures) < 48 and sources == run.engine.train
    assert structures.identifiers == engine.datasets()["validation"].identifiers
    assert scores.survey(run.model, structures, None).usage.sum() == structures.sizes.sum()
    with pytest.raises(UserError, match="no test structures"):
        report.open_split(
            dataclasses.replace(
                run, config=dataclasses.replace(run.config, engine=dataclasses.replace(engine, test=None))
            ),
            "test",
        )


def test_the_protein_shown_is_the_median_one(run, summary) -> None:
    seen = scores.survey(run.model, run.engine.structures(run.engine.validation), LEAST_PLDDT)
    precision = seen.contacts["average_precision"]
    shown = run.engine.structures(run.engine.validation).identifiers.index(summary["shown"])
    assert (precision < precision[shown]).sum() == 4  # of eight


def test_more_codes_than_letters_are_called_by_their_numbers() -> None:
    assert report.names_of(64)[-1] == "/"
    assert report.names_of(65)[-1] == "64"


def test_evaluate_prints_a_table_and_writes_json(run, result, tmp_path, capsys) -> None:
    data = ["--data", run.engine.test[0]]
    assert evaluation.main([str(run.dir.path), *data, "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail) == result
    printed = capsys.readouterr().out
    assert re.search(rf"amino acid accuracy, % +{100 * result['aa_accuracy']:.3g} +", printed)
    assert evaluation.main([str(run.dir.path), "--data", str(tmp_path / "no.h5")]) == 2
    assert "no.h5 is not a file" in capsys.readouterr().err


def test_evaluate_pools_files(run, result, tmp_path) -> None:
    other = str(write_proteins(tmp_path / "other.h5", structures=3, seed=2))
    both, alone = report.evaluate(run, [run.engine.test[0], other]), report.evaluate(run, [other])
    assert both["residues"] == result["residues"] + alone["residues"]
    weights = [result["residues"], alone["residues"]]
    assert both["aa_accuracy"] == pytest.approx(
        np.average([result["aa_accuracy"], alone["aa_accuracy"]], weights=weights)
    )


def test_there_is_no_program_to_export_and_one_sentence_says_so(run, tmp_path, capsys) -> None:
    assert export.main([str(run.dir.path), "--output", str(tmp_path / "export")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("gdyn: Monodecoder has no stand-alone predictor") and message.count("\n") == 1
    assert list(run.dir.path.glob("checkpoints/*/weights.safetensors"))
    assert not (tmp_path / "export").exists()


def test_analyze_prints_scores_and_paths_and_refuses_lags(run, summary, monkeypatch, capsys) -> None:
    monkeypatch.setattr(report, "report", lambda run, split: summary)
    assert analyze.main([str(run.dir.path), "--split", "validation"]) == 0
    printed = capsys.readouterr().out
    assert str(run.dir.report_html) in printed and "codebook perplexity" in printed
    assert analyze.main([str(run.dir.path), "--lags", "1", "5"]) == 2
    assert "--lags: the report of Monodecoder has no such option" in capsys.readouterr().err
