"""The pages of runs: what they show, that they need nothing else, and how a browser takes them."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dfad import cli, compare
from dfad.config import (
    DistillConfig,
    ImageBankConfig,
    MethodConfig,
    RandomFieldsConfig,
    RegularizerConfig,
    StudentConfig,
    TeacherConfig,
)
from dfad.distillation.distiller import Distiller
from dfad.runs import page, run_page
from dfad.runs.compare import differences, names_of, read_runs
from dfad.runs.run_page import RunFacts, shrunk, write_page
from dfad.runs.settings import leaves
from dfad.runs.snapshots import Snapshot, load_snapshots, moments, save_snapshot
from tests.conftest import IMAGE_SHAPE, with_method
from tests.runs.browser import driven, needs_browser


@pytest.fixture
def run(teacher, student, config, tmp_path):
    """The folder of a finished run."""
    config = replace(
        config,
        teacher=TeacherConfig(mean=(0.3,), std=(0.4,)),
        student=StudentConfig("convnet", {"channels": [4, 8], "num_classes": 4, "in_channels": 1}),
    )
    Distiller(teacher, student, config, image_shape=IMAGE_SHAPE).fit(tmp_path / "run")
    return tmp_path / "run"


def facts(**changes) -> RunFacts:
    torch.manual_seed(0)
    logits = torch.randn(64, 4)
    result = {
        "rounds": 6, "images": 100, "student_images": 90, "teacher_queries": 80, "seconds": 1.5,
        "rounds_per_second": 4.0, "agreement": 0.5, "best_agreement": 0.75, "best_round": 4,
        "accuracy": None, "best_accuracy": None,
    }  # fmt: skip
    plain = RunFacts(
        config=DistillConfig(), result=result, history=[{"round": 1, "agreement": 0.5}, {"round": 6, "agreement": 0.7}],
        snapshots=[], teacher_logits=logits, student_logits=logits.flip(1),
        parameters={"teacher": 1000, "student": 250, "generator": 77}, teacher_hash="0123456789abcdef01",
        architecture={}, image_shape=(3, 8, 8), normalisation=((), ()), device="cpu",
    )  # fmt: skip
    return replace(plain, **changes)


def written(facts_: RunFacts, folder) -> str:
    write_page(folder, facts_)
    return (folder / run_page.REPORT).read_text(encoding="utf-8")


class TestReport:
    def test_a_run_leaves_one_page_that_needs_nothing_else(self, run):
        text = (run / "report.html").read_text(encoding="utf-8")
        assert len(text) < 1_000_000
        assert set(re.findall(r'(?:src|href)="([^":]*:)', text)) == {"data:"}
        assert "url(" not in text
        assert "default-src 'none'" in text
        result = json.loads((run / "result.json").read_text())
        for shown in (
            f"{result['best_agreement']:.2%}", "convnet, distilled from a network given in Python", "load_model(Path(",
            f"dfad export {run}", "SHA-256", "images generated",
        ):  # fmt: skip
            assert shown in text
        for name, _ in leaves(DistillConfig()):
            assert f"<code>{name}</code>" in text
        assert text.count("After round ") == 6
        assert text.count("<img ") == 6 * 8
        assert '<span class="changed">6</span>' in text  # method.rounds
        assert '<span class="changed">float32</span>' in text

    def test_images_that_were_not_generated_are_named(self, tmp_path):
        assert "on generated images, without any data" in written(facts(), tmp_path)
        method = MethodConfig(
            warm_up=1, image_bank=ImageBankConfig(size=128), regularizers=RegularizerConfig(one_hot=1.0),
            random_fields=RandomFieldsConfig(share=0.75),
        )  # fmt: skip
        text = written(facts(config=DistillConfig(method=method)), tmp_path)
        assert "on generated images, but for 75% of them, which were strokes and blobs drawn at random, without" in text

    def test_confusion_and_classes_are_counted(self, tmp_path):
        teacher = torch.eye(4)[[0, 0, 0, 1, 3]]
        student = torch.eye(4)[[0, 0, 2, 1, 2]]
        text = written(facts(teacher_logits=teacher, student_logits=student), tmp_path)
        assert "finds 3 of its 4 classes in 5 images" in text
        assert "gives 60.00% of 5 generated images" in text
        assert '<tr><th scope="row">0</th><td style="--share:0.667">2</td><td style="--share:0.000"></td>' in text
        assert '<tr><th scope="row">3</th><td class="number">2</td><td class="number">1</td></tr>' in text

    def test_many_classes_are_listed_in_part(self, tmp_path):
        logits = torch.randn(512, 1000)
        text = written(facts(teacher_logits=logits, student_logits=logits.roll(1, 0)), tmp_path)
        assert 'class="matrix"' not in text.partition("</style>")[2]
        assert text.count("--share:") == 2 * run_page.LISTED + text.partition("</style>")[0].count("--share:")
        assert len(text) < 200_000

    def test_what_users_named_cannot_become_html(self, tmp_path):
        config = DistillConfig(student=StudentConfig("a:<script>b", {"c": "</script><b>"}))
        text = written(facts(config=config, architecture={"factory": "a:<script>b", "kwargs": {"c": "<b>"}}), tmp_path)
        assert "<script>b" not in text
        assert "<b>" not in text

    def test_images_are_small_enough_whatever_their_size(self, tmp_path):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
        snapshots = [Snapshot(i, pixels, [1] * 8, [0.5] * 8) for i in range(1, 7)]
        assert len(written(facts(snapshots=snapshots), tmp_path)) < 1_000_000
        assert shrunk(pixels, 3000).shape == (8, 31, 31, 3)
        assert shrunk(pixels[..., 0], 900).shape == (8, 30, 30)
        assert shrunk(pixels[:, :8, :8], 3000) is not None
        flat = np.full((1, 64, 64, 3), 200, dtype=np.uint8)
        assert (shrunk(flat, 300) == 200).all()

    def test_the_names_in_the_curves_are_those_that_are_recorded(self, run):
        recorded = {name for line in (run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
        drawn = {name for names in run_page.PANELS.values() for name in names} - {"accuracy"}
        assert drawn <= recorded


class TestSnapshots:
    def test_moments_are_spread_over_the_run_and_end_with_it(self):
        assert sorted(moments(60)) == [10, 20, 30, 40, 50, 60]
        assert sorted(moments(2)) == [1, 2]
        assert moments(1) == {1}

    def test_they_hold_the_images_of_their_moment(self, run, tmp_path):
        found = load_snapshots(run, 6)
        assert [snapshot.round for snapshot in found] == [1, 2, 3, 4, 5, 6]
        assert found[0].pixels.shape == (8, 8, 8)
        assert any((found[0].pixels != snapshot.pixels).any() for snapshot in found[1:])
        assert [snapshot.round for snapshot in load_snapshots(run, 4)] == [1, 2, 3, 4]

    def test_colours_come_back(self, tmp_path):
        pixels = np.random.default_rng(2).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8).transpose(0, 2, 3, 1)
        save_snapshot(tmp_path, Snapshot(1, pixels, [1, 2], [0.5, 0.5]))
        (found,) = load_snapshots(tmp_path, 1)
        assert (found.pixels == pixels).all()

    def test_one_that_is_damaged_is_left_out(self, tmp_path, caplog):
        for number in (1, 2):
            save_snapshot(tmp_path, Snapshot(number, np.zeros((1, 2, 2), np.uint8), [3], [0.25]))
        (tmp_path / "samples" / "round-0000001.safetensors").write_bytes(b"damaged")
        (found,) = load_snapshots(tmp_path, 9)
        assert (found.round, found.labels, found.confidences) == (2, [3], [0.25])
        assert "cannot be read" in caplog.text

    def test_they_move_no_random_stream(self, teacher, student, config, tmp_path):
        with_folder = Distiller(teacher, student, config, image_shape=IMAGE_SHAPE)
        state = {name: value.clone() for name, value in student.state_dict().items()}
        with_folder.fit(tmp_path / "a")
        learned = {name: value.clone() for name, value in student.state_dict().items()}
        student.load_state_dict(state)
        Distiller(teacher, student, config, image_shape=IMAGE_SHAPE).fit()
        assert all(torch.equal(value, learned[name]) for name, value in student.state_dict().items())
        assert load_file(tmp_path / "a" / "student.safetensors").keys() == learned.keys()


class TestPieces:
    @pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 4, 3)])
    def test_png_is_read_by_others(self, shape):
        pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        assert (np.array(Image.open(io.BytesIO(page.png(pixels)))) == pixels).all()

    @pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-11.9, -11.2), (0, 1e6), (1e-7, 2e-7), (3.0, 3.0), (0, 0)])
    def test_ticks_reach_around_the_values(self, low, high):
        ticks = page.nice_ticks(low, high)
        assert ticks[0] <= low + 1e-9
        assert ticks[-1] >= high - 1e-9
        assert 2 <= len(ticks) <= 7
        assert len({page.number(tick) for tick in ticks}) == len(ticks)

    def test_long_curves_are_thinned_and_keep_their_end(self):
        points = [(float(x), 0.0) for x in range(100_001)]
        kept = page.thinned(points)
        assert len(kept) <= page.POINTS
        assert kept[-1] == points[-1]
        assert page.thinned(points[:7]) == points[:7]
        assert page.thinned([]) == []

    def test_a_chart_draws_what_is_finite(self):
        drawn = page.chart("t", {"a": [(0, 0.0), (10, 1.0)], "b": [(5, float("nan"))], "c": []})
        (points,) = re.findall(r'points="([^"]*)"', drawn)
        assert points == f"{page.LEFT:.1f},{page.BOTTOM:.1f} {page.RIGHT:.1f},{page.TOP:.1f}"
        assert page.chart("t", {"b": [(5, float("inf"))]}) == ""
        alone = page.chart("t", {"a": [(3, 2.0)]})
        assert "stroke-width: 6" in alone  # as a style, for the sheet's own would win over an attribute
        assert ">round 3<" in alone


class TestCompare:
    @pytest.fixture
    def runs(self, run, teacher, student, config, tmp_path):
        """A finished run, and one that was never finished."""
        other = tmp_path / "other"
        Distiller(teacher, student, with_method(config, rounds=4), image_shape=IMAGE_SHAPE).fit(other)
        (other / "result.json").unlink()
        with (other / "metrics.jsonl").open("a") as file:
            file.write('{"round": 5, "cut')
        return [run, other]

    def call(self, *arguments) -> object:
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: compare.main([str(argument) for argument in arguments]))
        return ended.value.code or 0

    def test_it_lists_what_differs(self, runs, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        assert self.call(*runs) == 0
        out = capsys.readouterr().out
        assert re.search(r"method\.rounds\W+6\W+4", out)
        assert re.search(r"teacher\.mean\W+0\.3", out)
        assert "optimizer.student.lr" not in out
        assert re.search(r"│ rounds +│ +6 │ +– │", out)
        read = read_runs(runs)
        assert set(differences(read)) == {"method.rounds", "teacher.mean", "teacher.std", "student.factory",
                                          "student.kwargs"}  # fmt: skip
        assert [record["round"] for record in read[1].history][-1] == 4
        assert self.call(runs[0], runs[0]) == 0
        assert "All settings are the same." in capsys.readouterr().out

    def test_json_is_for_programs(self, runs, capsys):
        assert self.call(*runs, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["differences"]["method.rounds"] == ["6", "4"]
        assert told["runs"]["other"]["result"] == {}

    def test_the_page_overlays_curves(self, runs, tmp_path, capsys):
        path = tmp_path / "comparison.html"
        assert self.call(*runs, "--output", path) == 0
        text = path.read_text(encoding="utf-8")
        assert "Not finished: other." in text
        charts = [json.loads(found) for found in re.findall(r'application/json">(.*?)</script>', text)]
        assert ["run", "other"] in [[series["name"] for series in chart["series"]] for chart in charts]
        assert (runs[0] / "report.html").as_uri() in text
        assert self.call(*runs, "--output", path) == 4
        assert self.call(*runs, "--output", path, "--overwrite") == 0

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["only"], 2, "1 run is named; two or more can be compared"),
            (["only", "nothing"], 4, "nothing holds no config.yaml"),
            (["only", "only", "--output", "page.txt"], 2, "names no page"),
            (["only", "only", "--output", "none/page.html"], 4, "There is no folder"),
        ],
    )
    def test_what_cannot_be_compared_is_refused(self, arguments, code, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "only").mkdir()
        (tmp_path / "only" / "config.yaml").write_text("seed: 1\n")
        assert self.call(*arguments) == code
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())

    def test_names_are_as_long_as_they_must_be(self, tmp_path):
        assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
        assert names_of([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
        assert len(set(names_of([tmp_path, tmp_path]))) == 2


@needs_browser
class TestInABrowser:
    def test_every_part_is_there_and_curves_answer_pointer_and_keys(self, run, tmp_path):
        told, console = driven(
            run / "report.html",
            """
            const chart = document.querySelector(".chart"), svg = chart.querySelector("svg");
            const reading = () => chart.querySelector(".reading").textContent;
            const box = svg.getBoundingClientRect();
            const at = (x) => svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + x * box.width }));
            const key = (name) => svg.dispatchEvent(new KeyboardEvent("keydown", { key: name, cancelable: true }));
            const readings = [reading()];
            at(0.99); readings.push(reading());
            at(0.01); readings.push(reading());
            svg.dispatchEvent(new PointerEvent("pointerleave")); readings.push(reading());
            key("End"); readings.push(reading());
            key("ArrowLeft"); readings.push(reading());
            return {
              readings, headings: [...document.querySelectorAll("h2")].map((h) => h.textContent),
              broken: [...document.images].filter((i) => !i.naturalWidth).length,
              images: document.images.length, charts: document.querySelectorAll(".chart").length,
            };
            """,
            tmp_path / "browser",
        )
        found = json.loads(told)
        assert console == []
        assert found["broken"] == 0
        assert found["images"] == 48
        assert found["charts"] >= 6
        assert "Curves" in found["headings"]
        assert "Settings" in found["headings"]
        none, last, first, left, end, before = found["readings"]
        assert (none, left) == ("", "")
        assert last == end
        assert last.startswith("round 6: agreement ")
        assert first.startswith("round ")
        assert first != last != before

    def test_the_console_is_listened_to(self, tmp_path):
        (tmp_path / "page.html").write_text("<!DOCTYPE html><body></body>")
        told, console = driven(tmp_path / "page.html", 'setTimeout(() => nothing()); return "x";', tmp_path / "browser")
        assert told == '"x"'
        assert any("nothing is not defined" in line for line in console)

    @pytest.mark.parametrize("dark", [False, True])
    def test_it_is_readable_at_400_pixels_in_either_colour(self, dark, run, tmp_path):
        told, console = driven(
            run / "report.html",
            """
            document.querySelector("details").open = true;
            const light = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255)
              .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
              .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            const ground = light(getComputedStyle(document.body).backgroundColor);
            const contrast = (element) => {
              const own = light(getComputedStyle(element).color);
              return (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05);
            };
            return {
              ground, wide: document.documentElement.scrollWidth,
              contrast: Math.min(
                ...[...document.querySelectorAll("h1, p, th, td, figcaption, caption, li")].map(contrast)),
              small: Math.min(...[...document.querySelectorAll("p, td, figcaption")].map(
                (e) => parseFloat(getComputedStyle(e).fontSize))),
            };
            """,
            tmp_path / "browser",
            width=400,
            dark=dark,
        )
        found = json.loads(told)
        assert console == []
        assert found["wide"] <= 400
        assert found["contrast"] >= 4.5  # WCAG 2.2, AA
        assert found["small"] >= 12
        assert (found["ground"] < 0.05) == dark
