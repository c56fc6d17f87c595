"""The figures in README and docs come only from the records."""

import copy
import re
import subprocess

import pytest

from bench import records, report
from dfad.experiments import provenance

GROUP = "activation boundary, taps 8x64x32x32, float32, forward+backward, graph"
MACHINE = {
    "device": "NVIDIA H200",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "python": "3.12.3",
    "commit": "0123456789abcdef + changes",
}


def row(group: str, contender: str, seconds: float, **more: object) -> dict[str, object]:
    return {"group": group, "contender": contender, "seconds": seconds, "machine": MACHINE, **more}


@pytest.fixture
def record() -> records.Record:
    return {
        "device": "NVIDIA H200",
        "benchmarks": [
            row("round cifar-resnet20", "published", 0.5, images_per_second=100.0, peak_memory_bytes=7_000_000),
            row("round cifar-resnet20", "ours", 0.125),
            row("round cifar-resnet20", "floor", 0.1),
            row(GROUP, "ours", 2e-3, bytes=400),
            row(GROUP, "copy", 1.5e-3, bytes=400),
            row(GROUP.replace("8x64", "4x64"), "ours", 1e-3, bytes=200),
            row(GROUP.replace("float32", "bfloat16"), "ours", 3e-3, bytes=800),
            row("decoding 9 images once", "native", 0.5, images_per_second=18),
            row("ranks, a step", "one process", 0.5, ranks=1, rounds_per_second=1.5, images_per_second=96.0),
            row(
                *("ranks, a step", "2 ranks", 0.25),
                **{"ranks": 2, "rounds_per_second": 3.5, "images_per_second": 224.0},
                **{"collectives": 13, "bytes_sent": 4_500_000, "share_in_collectives": 0.25},
            ),
        ],
        "checks": {"apex": "not installed"},
        "teachers": [
            {
                "name": "resnet34",
                "machine": MACHINE,
                "accuracy": 0.9375,
                "epochs": 40,
                "seconds": 200,
                "images_per_second": 10_000,
            },
        ],
        "campaign": {
            "students": [
                {
                    "name": "full recipe",
                    "machine": MACHINE,
                    "teacher_accuracy": 0.9375,
                    "accuracy": {"mean": 0.93, "std": 0.0025},
                    "best_accuracy": 0.925,
                    "seconds": 299.7,
                    "runs": [{}, {}],
                }
            ]
        },
    }


def test_readme_and_docs_are_written_from_the_records():
    """Fails if pages and records differ; ``make report`` writes the pages."""
    committed = records.load_all()
    assert committed
    text = report.README.read_text(encoding="utf-8")
    assert report.readme(text, committed) == text
    assert report.results(committed) == report.ALL_RESULTS.read_text(encoding="utf-8")


def test_no_record_names_a_place_on_a_machine():
    files = sorted(records.RESULTS.glob("*.json"))
    assert files
    for path in files:
        assert not re.findall(r'"(?:/|~|[A-Z]:\\)[^"]*"', path.read_text(encoding="utf-8")), path


def test_a_changed_figure_shows(record):
    committed = records.load_all()
    text = report.README.read_text(encoding="utf-8")
    changed = copy.deepcopy(committed)
    for content in changed.values():
        for benchmark in content.get("benchmarks", []):
            if benchmark["contender"] == "ours":
                benchmark["seconds"] *= 1.5
    assert report.readme(text, changed) != text
    assert report.readme(text, {**committed, "nvidia-h200.json": record}) != text


def test_readme_tells_no_figure_of_its_own():
    section = report.README.read_text(encoding="utf-8").partition("## Results\n")[2].partition("\n## ")[0]
    prose = re.sub(r"<!-- (\w+): .*?<!-- end of \1 -->", "", section, flags=re.DOTALL)
    assert "make report" in prose
    assert not re.search(r"\d[\d.,]* ?(%|×|ms\b|s\b|seconds|times|points|GB)", prose)


def test_a_record_appears_by_itself(record):
    shown = {"nvidia-h200.json": record}
    speed = report.speed(shown)
    assert "| nvidia-h200 | cifar-resnet20 | 125 | 4 × |  | 1.25 × |" in speed
    # the largest in float32, not the smaller one nor the one in bfloat16
    assert "| nvidia-h200 | activation boundary, taps 8x64x32x32 | 2 |  |  | 75 % |" in speed
    assert sum("activation boundary" in line for line in speed) == 1
    assert not any("There is no record from a GPU" in line for line in speed)
    assert report.accuracies(shown)[-1] == (
        "| nvidia-h200 | full recipe | 93.75 % | 93.00 % ± 0.25 | 92.50 % | 2 |  | 300 |"
    )
    assert report.provenance(shown) == [
        "- [nvidia-h200.json](bench/results/nvidia-h200.json): NVIDIA H200; torch 2.11.0, triton 3.6.0, Python 3.12.3; "
        "commit `0123456` with changes"
    ]
    assert "| nvidia-h200 | resnet34 | 93.75 % | 40 | 200 | 10,000 |" in report.accuracy(shown)
    everything = report.results(shown)
    assert "| nvidia-h200 | apex | not installed |" in everything
    assert "| nvidia-h200 | decoding 9 images once | native | 500 | 18 |" in everything
    assert everything.count("activation boundary") == 4
    assert "| nvidia-h200 | ranks, a step | one process | 500 | 1.5 | 96 |  |  |  |" in everything
    assert "| nvidia-h200 | ranks, a step | 2 ranks | 250 | 3.5 | 224 | 13 | 4.50 | 25 % |" in everything
    assert everything.count("ranks, a step") == 2


def test_every_arm_of_a_comparison_is_a_row():
    comparison = {
        "comparison": "digits",
        "teacher_accuracy": 0.99,
        "test_images": 360,
        "machine": MACHINE,
        "arms": {
            "DFAD": {"accuracy": {"mean": 0.9, "std": 0.01, "values": [0.89, 0.91]}, "seconds": {"mean": 9.6}},
            "real data": {"accuracy": {"mean": 0.98, "std": 0.0, "values": [0.98]}},
        },
        "claims": [{"text": "DFAD ends well", "holds": False}],
    }
    shown = {"reproduce-digits.json": comparison}
    assert report.accuracies(shown)[2:] == [
        "| reproduce-digits | digits, DFAD | 99.00 % | 90.00 % ± 1.00 |  | 2 | 360 | 10 |",
        "| reproduce-digits | digits, real data | 99.00 % | 98.00 % |  | 1 | 360 |  |",
    ]
    assert "NVIDIA H200" in report.provenance(shown)[0]
    assert "- reproduce-digits: DFAD ends well: does not hold" in report.results(shown)


def test_what_a_record_lacks_is_told(record):
    for benchmark in record["benchmarks"]:
        benchmark["machine"] = {"device": "a chip"}
    del record["campaign"], record["teachers"]
    (line,) = report.provenance({"old.json": record})
    assert line.endswith("a chip; torch not recorded, triton not recorded, Python not recorded; commit not recorded")
    del record["benchmarks"][1]  # ours
    assert "| old | cifar-resnet20 |  |  |  |  |" in report.rounds({"old.json": record})
    assert report.speed({"empty.json": {}})[-1].startswith("There is no record from a GPU")


def test_a_part_without_markers_is_an_error():
    with pytest.raises(ValueError, match="no part between <!-- results"):
        report.readme("# dfad\n", {})


def test_records_share_their_machines(tmp_path, record):
    records.save(tmp_path / "nvidia-h200.json", record)
    assert (tmp_path / "nvidia-h200.json").read_text().count("2.11.0") == 3  # benchmarks, teacher, student
    assert records.load_all(tmp_path) == {"nvidia-h200.json": record}


class TestCommit:
    @pytest.fixture
    def checkout(self, tmp_path):
        for name in provenance.CODE:
            place = tmp_path / name
            if "." in name:
                place.write_text("text")
            else:
                place.mkdir()
                (place / "code.py").write_text("pass")
        return tmp_path

    @staticmethod
    def git(folder, *arguments: str) -> str:
        identity = ("-c", "user.name=A", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(folder), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def test_is_that_of_the_checkout(self, checkout):
        self.git(checkout, "init", "-q")
        self.git(checkout, "add", ".")
        self.git(checkout, "commit", "-qm", "All")
        head = self.git(checkout, "rev-parse", "HEAD")
        (checkout / "bench" / "results").mkdir()
        (checkout / "bench" / "results" / "record.json").write_text("{}")
        assert provenance.commit.__wrapped__(checkout) == head
        (checkout / "dfad" / "code.py").write_text("changed")
        assert provenance.commit.__wrapped__(checkout) == f"{head} + changes"

    def test_travels_without_history_as_long_as_the_code_is_the_same(self, checkout):
        commit_file = checkout / "commit"
        commit_file.write_text(f"0123 + changes of {provenance.code_hash(checkout)}")
        assert provenance.commit.__wrapped__(checkout, commit_file) == "0123 + changes"
        (checkout / "kernels" / "code.py").write_text("changed")
        assert provenance.commit.__wrapped__(checkout, commit_file) == provenance.UNKNOWN
        commit_file.unlink()
        assert provenance.commit.__wrapped__(checkout, commit_file) == provenance.UNKNOWN
