"""The command that measures everything on a GPU: order of parts, kept results, output."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import figures, records
from bench.kernel_times import tabulate
from bench.rounds import contenders
from tests.processes import HANGING
from tools.gpu import gpu, parcel, probes
from tools.gpu.gpu import DONE, FAILED, STOPPED, Part, Places, State, plan, run_parts

ROOT = Path(__file__).parents[2]
PLENTY = 600.0


@pytest.fixture
def places(tmp_path) -> Places:
    return Places(tmp_path / "state")


def python(name: str, code: str, seconds: float = 5, **options) -> Part:
    return Part(name, ("-c", code), seconds, **options)


def writes(value: object, extra: str = "") -> str:
    return f"import pathlib; pathlib.Path(r'{{result}}').write_text({json.dumps(value)!r}); {extra}"


def statuses(state: State) -> dict[str, str]:
    return {name: outcome.status for name, outcome in state.outcomes.items()}


class TestRunning:
    def test_parts_run_in_order_and_only_once(self, places, tmp_path):
        seen = tmp_path / "seen"
        parts = [python(name, f"open(r'{seen}', 'a').write('{name} ')") for name in ("first", "second", "third")]
        for _ in range(2):  # a later call knows what an earlier one did
            run_parts(parts, State(places.kept), places, PLENTY)
        assert seen.read_text() == "first second third "

    def test_what_is_there_is_written_after_every_part(self, places):
        seen: list[list[str]] = []
        state = State(places.kept)
        parts = [python("first", writes(1)), python("second", "raise SystemExit(1)")]
        run_parts(parts, state, places, PLENTY, lambda: seen.append(list(State(places.kept).outcomes)))
        assert seen == [["first"], ["first", "second"]]

    def test_a_failure_is_told_and_holds_up_only_what_needs_it(self, places):
        parts = [
            python("bad", "print('what went wrong'); raise SystemExit(3)"),
            python("dependent", writes(1), after="bad"),
            python("other", writes("fine")),
        ]
        state = State(places.kept)
        lines = run_parts(parts, state, places, PLENTY)
        assert statuses(state) == {"bad": FAILED, "other": DONE}
        assert state.outcomes["bad"].error == "exit code 3: what went wrong"
        assert state.outcomes["other"].result == "fine"
        assert [line.split()[:2] for line in lines] == [["bad", "failed"], ["dependent", "waits"], ["other", "done"]]
        run_parts(parts, state, places, PLENTY)
        assert state.outcomes["bad"].calls == 1  # not tried again unless asked
        state.forget(parts, "", failed=True)
        assert statuses(state) == {"bad": STOPPED, "other": DONE}
        state.forget(parts, "oth", failed=False)
        assert statuses(state) == {"bad": STOPPED}

    def test_a_part_that_does_not_fit_is_left_and_a_shorter_one_runs(self, places):
        parts = [python("long", writes(1), seconds=300), python("short", writes(2), seconds=5)]
        state = State(places.kept)
        lines = run_parts(parts, state, places, budget=100)
        assert statuses(state) == {"short": DONE}
        assert "left for the next call: takes 300 s" in lines[0]
        run_parts(parts, state, places, PLENTY)
        assert statuses(state) == {"short": DONE, "long": DONE}

    def test_a_part_is_stopped_by_the_budget_and_continues(self, places, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu, "RESERVE", 0.0)
        marks = tmp_path / "marks"
        code = (
            "import pathlib, time\n"
            f"marks = pathlib.Path(r'{marks}')\n"
            "if marks.exists():\n    raise SystemExit(0)\n"
            "try:\n    time.sleep(60)\n"
            "except KeyboardInterrupt:\n    marks.write_text('checkpoint')\n    raise SystemExit(130)\n"
        )
        part = python("training", code, seconds=30, shortest=0.5)
        state = State(places.kept)
        run_parts([part], state, places, budget=2)
        assert statuses(state) == {"training": STOPPED}
        assert marks.read_text() == "checkpoint"
        run_parts([part], State(places.kept), places, budget=20)
        outcome = State(places.kept).outcomes["training"]
        assert (outcome.status, outcome.calls) == (DONE, 2)
        assert outcome.seconds > 1  # of both calls

    def test_a_part_that_continues_is_told_so_and_stops_before_the_others_lose_their_time(self, places, monkeypatch):
        monkeypatch.setattr(gpu, "GRACE", 0.5)
        code = "import sys, time; print(sys.argv[1:], flush=True); time.sleep(0 if sys.argv[1:] else 60)"
        parts = [
            python("benchmark", code, seconds=1, shortest=0.1, continued=("--missing",)),
            python("next", writes("ran"), seconds=PLENTY / 2),
        ]
        run_parts(parts, State(places.kept), places, PLENTY)
        assert statuses(State(places.kept)) == {"benchmark": STOPPED, "next": DONE}
        monkeypatch.setattr(gpu, "PATIENCE", PLENTY)  # however slow the machine is
        run_parts(parts, State(places.kept), places, PLENTY)
        assert statuses(State(places.kept)) == {"benchmark": DONE, "next": DONE}
        assert (places.kept / "logs" / "benchmark.log").read_text().endswith("['--missing']\n")

    def test_on_another_device_only_a_trained_teacher_counts(self, places, monkeypatch, capsys):
        parts = [python("rounds", writes(1)), python("teacher", writes({"epochs": 3}))]
        run_parts(parts, State(places.kept), places, PLENTY)
        assert statuses(State(places.kept)) == {"rounds": DONE, "teacher": DONE}
        capsys.readouterr()
        here = gpu.device_name()
        monkeypatch.setattr(gpu, "device_name", lambda: "another")
        assert statuses(State(places.kept)) == {"teacher": DONE}
        assert capsys.readouterr().out == f"What was measured on {here} does not count on another.\n"

    def test_a_part_that_hangs_is_killed_with_its_children(self, places, monkeypatch, tmp_path):
        monkeypatch.setattr(gpu, "GRACE", 0.5)
        child = tmp_path / "child"
        code = (
            "import pathlib, signal, subprocess, sys, time\n"
            "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
            f"pathlib.Path(r'{child}').write_text(str(child.pid))\n"
            "time.sleep(60)\n"
        )
        state = State(places.kept)
        run_parts([python("hanging", code, seconds=0.8)], state, places, PLENTY)
        assert state.outcomes["hanging"].status == FAILED
        assert state.outcomes["hanging"].error == "still running after 1 s"
        pid = int(child.read_text())
        for _ in range(50):
            if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
                return
            time.sleep(0.1)
        pytest.fail("the child of a killed part lives on")

    def test_a_call_that_is_killed_leaves_its_part_to_be_continued(self, places):
        state = State(places.kept)
        state.keep(python("begun", ""), gpu.Outcome(STOPPED, calls=1))
        run_parts([python("begun", writes(1))], State(places.kept), places, PLENTY)
        assert State(places.kept).outcomes["begun"].calls == 2

    def test_what_never_finishes_is_given_up(self, places, monkeypatch):
        monkeypatch.setattr(gpu, "RESERVE", 0.0)
        part = python("endless", "import time; time.sleep(60)", seconds=30, shortest=0.1)
        state = State(places.kept)
        state.keep(part, gpu.Outcome(STOPPED, calls=gpu.CALLS - 1))
        run_parts([part], state, places, budget=1)
        assert statuses(state) == {"endless": FAILED}

    def test_results_of_pytest_are_counted(self, places, tmp_path):
        tests = tmp_path / "test_some.py"
        tests.write_text(
            "import pytest\ndef test_a(): pass\ndef test_b(): assert False\n@pytest.mark.skip\ndef test_c(): pass\n"
        )
        arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml={result}")
        parts = [
            Part("some", (*arguments, str(tests)), 60),
            Part("none", (*arguments, str(tests), "-k", "nothing"), 60),
        ]
        state = State(places.kept)
        lines = run_parts(parts, state, places, PLENTY)
        assert state.outcomes["some"].result == {"passed": 1, "failed": ["test_b"], "skipped": 1}
        assert statuses(state) == {"some": FAILED, "none": DONE}  # nothing to run is no failure
        assert "0 passed" in lines[1]

    def test_half_a_result_is_none(self, tmp_path):
        for text in ('{"a": ', "<?xml version='1.0'?><testsuites><testcase"):
            (tmp_path / "half").write_text(text)
            assert gpu.read_result(tmp_path / "half") is None
        assert gpu.read_result(tmp_path / "none") is None


class TestPlan:
    @pytest.fixture
    def parts(self, places) -> list[Part]:
        data, lossless, network = (
            Path(f"/{name}") for name in ("cifar10.tar.xz", "lossless.tar.xz", "net.safetensors")
        )
        return plan(Places(places.state, data, lossless, network), small=False)

    ORDER = (
        "versions",
        "rounds: ResNet-34 to ResNet-18",
        "rounds: ResNet-20",
        "ResNet-20 student",
        "tests of rounds",
    )

    def test_the_most_telling_parts_are_first_and_fit_one_call(self, parts):
        first = parts[: len(self.ORDER)]
        assert tuple(part.name for part in first) == self.ORDER
        assert sum(part.seconds for part in first) + gpu.RESERVE <= 540 - 20  # what provisioning takes

    def test_every_part_fits_a_call_and_has_a_name_of_its_own(self, parts):
        assert len({part.slug for part in parts}) == len(parts)
        names = {part.name for part in parts}
        for part in parts:
            assert part.needs + gpu.RESERVE < 540
            assert not part.after or part.after in names

    def test_any_one_part_fits_the_call_that_repeats_it(self, parts):
        assert max(part.needs for part in parts) + gpu.RESERVE <= 300

    def test_without_data_nothing_is_trained(self, places):
        assert not [part for part in plan(places, small=False) if "tools.gpu.campaign" in part.command]

    def test_tests_share_the_machine_and_none_is_left_out(self, parts):
        tests = [part for part in parts if part.name.startswith("tests")]
        assert all({"gpu", "12", "worksteal"} <= set(part.command) for part in tests)
        files = {ROOT / word for part in tests for word in part.command if word.startswith("tests/")}
        others = {path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)}
        assert {path for path in others if "mark.gpu" in path.read_text()} == files

    def test_probes_end_by_themselves_before_they_are_stopped(self, parts):
        (part,) = [part for part in parts if part.name == "probes"]
        assert gpu.PATIENCE * part.seconds > probes.LIMIT

    def test_what_benchmarks_measured_is_not_measured_again_when_they_continue(self, parts):
        benchmarks = [part for part in parts if any(word.startswith("bench/") for word in part.command)]
        assert all(part.resumable and part.continued == ("--missing",) for part in benchmarks)

    def test_every_contender_exists(self, monkeypatch):
        monkeypatch.setattr("bench.rounds.has_bfloat16", lambda device: True)
        known = set(contenders(torch.device("cuda")))
        assert {*gpu.ROUNDS, *gpu.COMPILED, *gpu.PARTS} <= known
        assert known <= {*gpu.ROUNDS, *gpu.COMPILED, *gpu.PARTS}

    def test_a_rehearsal_has_a_part_of_each_kind(self, places, parts):
        paths = Path("/data"), Path("/lossless"), Path("/network")
        small = plan(Places(places.state, *paths), small=True)
        modules = {part.command[1] for part in parts}
        assert {part.command[1] for part in small} == modules

    def test_each_benchmark_is_in_a_slice(self, parts):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "bench", "--full"]
        lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        benchmarks = [line for line in lines if "::" in line]
        assert len(benchmarks) > 60

        def takes(part: Part, benchmark: str) -> bool:
            file = next((word for word in part.command if word.startswith("bench/")), "")
            if not file or not benchmark.startswith(file):
                return False
            expression = part.command[part.command.index("-k") + 1] if "-k" in part.command else "test"
            # as pytest reads it: words that are in the name
            words = re.sub(
                r"[\w-]+", lambda m: m[0] if m[0] in ("and", "or", "not") else f"({m[0]!r} in name)", expression
            )
            # on a CPU there are no CUDA graphs
            return eval(words.replace("'graph'", "'eager'"), {"name": benchmark.partition("::")[2]})

        left_out = [name for name in benchmarks if not any(takes(part, name) for part in parts)]
        # of CPUs alone
        assert all("residual_blocks" in name or name.startswith("bench/bench_distributed") for name in left_out)
        # and every slice takes some, but that of the pair that needs a GPU
        idle = {
            part.name
            for part in parts
            if any(word.startswith("bench/") for word in part.command)
            and not any(takes(part, name) for name in benchmarks)
        }
        large = "ResNet-34 to ResNet-18"
        assert idle == {f"rounds: {large}", f"rounds, compiled: {large}", "a round's parts"}


class TestRecord:
    @pytest.fixture
    def state(self, places) -> State:
        state = State(places.kept)
        student = {
            "name": "student",
            "teacher_accuracy": 0.9,
            "accuracy": 0.8,
            "best_accuracy": None,
            "seconds": 12.0,
            "curve": [{"seconds": 6.0, "accuracy": 0.7}, {"seconds": 12.0, "accuracy": 0.8}],
        }
        teacher = {"name": "t", "epochs": 3, "accuracy": 0.9, "seconds": 5.0, "images_per_second": 8.0}
        kernel = {"kernel": "forward_kernel, launch 0", "metrics": {"MB read": 12.5}}
        round_ = {
            "round": "digits",
            "captured": True,
            "precision": "bfloat16",
            "milliseconds": 2.5,
            **tabulate([("slow", 3, 1500.0), ("fast", 1, 500.0)]),
        }
        rows = [
            {"group": "round digits", "contender": name, "seconds": seconds, "machine": {"device": "here"}}
            for name, seconds in (("ours", 1.0), ("published", 2.0))
        ]
        rows[0]["left_out"] = ["Without engine.channels_last for the student: it changes output 0."]
        records.save(places.benchmarks / gpu.file_name(), {"benchmarks": rows, "profiles": [round_]})
        outcomes = {
            "tests": gpu.Outcome(FAILED, 1, 1, {"passed": 3, "failed": ["test_b"], "skipped": 0}, "code 1"),
            "versions": gpu.Outcome(DONE, 0, 1, {"machine": {"torch": "2"}, "driver": "580.1"}),
            "memcheck": gpu.Outcome(DONE, 1, 1, "not installed"),
            "profile": gpu.Outcome(DONE, 1, 1, [kernel]),
            "probes": gpu.Outcome(DONE, 1, 1, {"a failed capture": "survived"}),
            "teacher": gpu.Outcome(DONE, 5, 1, teacher),
            "student": gpu.Outcome(DONE, 12, 2, student),
            "data": gpu.Outcome(DONE, 1, 1, {"passed": 2, "failed": [], "skipped": 0}),
        }
        for name, outcome in outcomes.items():
            state.keep(python(name, ""), outcome)
        return state

    @pytest.fixture
    def record(self, state, places) -> records.Record:
        elsewhere = {"group": "round digits", "contender": "floor", "seconds": 1.0, "machine": {"device": "elsewhere"}}
        records.save(places.benchmarks / "another-device.json", {"benchmarks": [elsewhere]})
        return gpu.make_record([python(name, "") for name in state.outcomes], state, places, small=True)

    def test_holds_everything(self, record):
        assert record["rehearsal"] is True
        assert [row["contender"] for row in record["benchmarks"]] == ["ours", "published"]
        assert [student["name"] for student in record["students"]] == ["student"]
        assert [teacher["name"] for teacher in record["teachers"]] == ["t"]
        assert record["kernels"][0]["metrics"] == {"MB read": 12.5}
        assert record["checks"]["tests"] == "failed: 3 passed, 1 failed: test_b code 1"
        assert record["checks"]["memcheck"] == record["checks"]["apex"] == "not installed"
        assert record["checks"]["driver"] == "580.1"
        assert record["checks"]["a failed capture"] == "survived"
        assert record["seconds"] == 22
        assert [profile["launches"] for profile in record["profiles"]] == [4]

    def test_of_a_rehearsal_stands_nowhere_among_the_records(self, record, tmp_path):
        before = set(records.RESULTS.iterdir())
        written, tables = gpu.write_record(record, tmp_path, small=True)
        plots = tmp_path / "figures.png"
        figures.save(record, plots)
        assert written.parent == tmp_path
        assert set(records.RESULTS.iterdir()) == before
        assert records.load(written) == record
        assert "none of these figures is a measurement" in tables.read_text()
        assert "| rehearsal | digits | published | 2,000 |" in tables.read_text()
        assert "digits in bfloat16: 2.50 ms, of which kernels 2.00 ms in 4 launches; captured" in tables.read_text()
        assert "| slow | 3 | 1,500 | 75.0 % |" in tables.read_text()
        left_out = "- rehearsal, round digits, ours: Without engine.channels_last for the student: it changes output 0."
        assert left_out in tables.read_text()
        assert "](" not in tables.read_text()  # it may be read anywhere
        assert plots.read_bytes().startswith(b"\x89PNG")

    def test_what_an_earlier_record_holds_of_other_tasks_stays(self, record):
        row = {"seconds": 1.0, "machine": {}}
        earlier = {
            "device": "here",
            "checks": {"old": "failed"},
            "benchmarks": [
                {**row, "group": "round digits", "contender": "repaired"},
                {**row, "group": "a loss", "contender": "ours"},
            ],
            "profiles": [{"round": "digits", "old": True}, {"round": "large"}],
            "students": [{"name": "student", "old": True}, {"name": "another"}],
        }
        completed = gpu.with_earlier(record, earlier)
        tasks = [(row["group"], row["contender"]) for row in completed["benchmarks"]]
        assert tasks == [("round digits", "ours"), ("round digits", "published"), ("a loss", "ours")]
        for kind, key in (("profiles", "round"), ("students", "name")):
            assert [row[key] for row in completed[kind]] == [record[kind][0][key], earlier[kind][1][key]]
            assert "old" not in completed[kind][0]
        assert completed["checks"] == record["checks"]
        assert gpu.with_earlier(record, completed) == completed

    def test_every_panel_is_drawn_of_its_part(self, record):
        assert figures.round_times(record) == {"digits": {"ours": 1000.0, "published": 2000.0}}
        assert [student["accuracy"] for student in figures.curves(record)] == [0.8]
        row = {"contender": "ours", "seconds": 2.0}
        losses = [
            {**row, "group": f"a loss 8x8, float32, {direction}, {launch}", "contender": contender, "seconds": seconds}
            for launch, ours in (("eager", 4.0), ("graph", 2.0))
            for direction in ("forward", "forward+backward")
            for contender, seconds in (("ours", ours), ("copy", 1.0))
        ]
        assert figures.loss_shares({"benchmarks": losses}) == {"a loss 8x8, float32": 0.5}
        assert figures.loss_shares({}) == {}


class TestCommand:
    def test_without_a_gpu_it_tells_the_way_out(self, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("tests the behaviour without a GPU, and here is one")
        with pytest.raises(SystemExit, match="sees no NVIDIA GPU here.*--rehearse"):
            gpu.main(["--state", str(tmp_path)])

    def test_lists_what_is_to_do(self, tmp_path, capsys):
        gpu.main(["--state", str(tmp_path), "--list", "--data", "/cifar10.tar.xz"])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) > 20
        assert all(line.endswith("to do") for line in lines)

    def test_a_signal_ends_a_call_and_everything_is_kept(self, tmp_path):
        code = (
            "from tools.gpu import gpu\n"
            "gpu.plan = lambda places, small: [\n"
            "    gpu.Part('first', ('-c', ''), 1),\n"
            "    gpu.Part('second', ('-c', 'import time; time.sleep(60)'), 60),\n"
            "]\n"
            f"gpu.main(['--rehearse', '--state', r'{tmp_path / 'state'}', '--out', r'{tmp_path / 'out'}'])\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            # with as many threads: on a CPU the device's name contains them
            env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("second"):
                break
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=HANGING)
        assert "Stopped by a signal." in told
        assert "1 of 2 parts done" in told
        assert "none of its figures is a measurement" in told
        assert statuses(State(tmp_path / "state" / "kept")) == {"first": DONE, "second": STOPPED}
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names == {"parcel.json", "parcel-0", "rehearsal.json", "summary.md", "figures.png"}

    def test_compiled_kernels_of_this_project_go_along(self, tmp_path, monkeypatch):
        code = (
            "import os, pathlib\n"
            "for name in ('_moments_kernel', 'triton_poi_fused_add'):\n"
            "    folder = pathlib.Path(os.environ['TRITON_CACHE_DIR']) / f'hash of {name}'\n"
            "    folder.mkdir(parents=True)\n"
            "    (folder / f'__grp__{name}.json').touch()\n"
            "    (folder / f'{name}.cubin').touch()\n"
        )
        monkeypatch.setattr(gpu, "plan", lambda places, small: [python("compiles", code)])
        gpu.main(["--rehearse", "--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")])
        parcel.receive(tmp_path / "out", tmp_path / "arrived")
        names = {path.name for path in (tmp_path / "arrived" / "triton").rglob("*")}
        assert names == {"hash of _moments_kernel", "__grp___moments_kernel.json", "_moments_kernel.cubin"}

    def test_runs_what_is_chosen_alone(self, tmp_path, monkeypatch, capsys):
        parts = [python(name, writes(name)) for name in ("rounds", "teacher", "student, recipe")]
        monkeypatch.setattr(gpu, "plan", lambda places, small: parts)
        gpu.main(["--rehearse", "--state", str(tmp_path), "--only", "teacher,student"])
        assert statuses(State(tmp_path / "kept")) == {"teacher": DONE, "student, recipe": DONE}
        assert "2 of 3 parts done" in capsys.readouterr().out

    def test_a_fresh_machine_goes_on_from_a_parcel(self, tmp_path, monkeypatch, capsys):
        part = python("only", writes("done here"))
        monkeypatch.setattr(gpu, "plan", lambda places, small: [part])
        gpu.main(["--rehearse", "--state", str(tmp_path / "one"), "--out", str(tmp_path / "two" / "in")])
        monkeypatch.setattr(gpu, "plan", lambda places, small: [python("only", "raise SystemExit(1)")])
        capsys.readouterr()
        gpu.main(["--rehearse", "--state", str(tmp_path / "two")])
        assert "Continuing what" in (told := capsys.readouterr().out)
        assert "1 of 1 parts done, 0 failed" in told

    @pytest.mark.alone
    def test_a_rehearsal_of_a_part_of_each_kind(self, tmp_path, monkeypatch, capsys):
        wanted = ("versions", "operators, float32", "memcheck", "teacher", "student, recipe, inherited weights")
        everything = gpu.plan

        def few(places: Places, *, small: bool) -> list[Part]:
            return [part for part in everything(places, small=small) if part.name in wanted]

        monkeypatch.setattr(gpu, "plan", few)
        monkeypatch.setattr(gpu, "PATIENCE", 50.0)  # however slow the machine is
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # under which nothing is benchmarked
        arguments = ["--rehearse", "--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]
        gpu.main(arguments)
        assert "5 of 5 parts done, 0 failed" in (told := capsys.readouterr().out), told
        record = records.load(tmp_path / "out" / "rehearsal.json")
        assert {row["contender"] for row in record["benchmarks"]} == {"published", "ours", "copy"}
        assert record["benchmarks"][0]["machine"] == record["machine"]
        (teacher,), (student,) = record["teachers"], record["students"]
        # of as many epochs as the machine had time for
        assert 0 <= teacher["accuracy"] == student["teacher_accuracy"] <= 1
        assert student["curve"][-1]["accuracy"] == student["accuracy"]
        assert record["checks"]["memcheck"] == "not installed"
        tables = (tmp_path / "out" / "summary.md").read_text()
        assert "| rehearsal | jpeg: convnet, recipe, inherited weights, 1 s |" in tables
        assert "plain KL" in tables
        gpu.main(arguments)
        assert "…" not in capsys.readouterr().out  # nothing is begun twice

    @pytest.mark.parametrize("name", ["DATA", "OUT"])
    def test_the_shell_script_hands_over_its_environment(self, name, tmp_path):
        script = (ROOT / "tools" / "gpu" / "gpu.sh").read_text()
        fake = tmp_path / "python"
        fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "calls"}\n')
        fake.chmod(0o755)
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(fake), name: "/a place", "BUDGET": "100"}
        subprocess.run([ROOT / "tools" / "gpu" / "gpu.sh", "--retry"], env=environment, check=True)
        install, call = (tmp_path / "calls").read_text().splitlines()
        assert install.startswith("-m tools.gpu.provision install build/gpu/wheels")
        words = shlex.split(call)
        assert words[:3] == ["-m", "tools.gpu.gpu", "--budget"]
        assert 90 <= int(words[3]) <= 100
        assert call.endswith(f"--{name.lower()} /a place --retry")
        assert "--rehearse" not in words
        assert "REHEARSE" in script


class TestParcel:
    @pytest.fixture
    def sent(self, tmp_path) -> Path:
        folder = tmp_path / "folder"
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "noise").write_bytes(os.urandom(2500))
        (folder / "text").write_text("text")
        parcel.send(folder, tmp_path / "parts", limit=1000)
        return tmp_path / "parts"

    def test_arrives_as_it_was(self, sent, tmp_path):
        assert [path.stat().st_size for path in sorted(sent.glob("parcel-*"))][:2] == [1000, 1000]
        parcel.receive(sent, tmp_path / "arrived")
        for name in ("inner/noise", "text"):
            assert (tmp_path / "arrived" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()

    def test_replaces_an_earlier_and_longer_one(self, sent, tmp_path):
        (tmp_path / "short").mkdir()
        parts = parcel.send(tmp_path / "short", sent)
        assert sorted(sent.iterdir()) == sorted(parts)
        assert len(parts) == 2

    @pytest.mark.parametrize("damage", ["missing", "changed"])
    def test_damage_is_told_and_nothing_laid_out(self, damage, sent, tmp_path):
        part = sent / "parcel-1"
        if damage == "missing":
            part.unlink()
        else:
            part.write_bytes(part.read_bytes()[:-1] + b"\0\0")
        words = {"missing": "lacks parcel-1", "changed": r"parcel-1 \(1001 bytes\) is not what was sent"}[damage]
        with pytest.raises(parcel.ParcelError, match=words):
            parcel.receive(sent, tmp_path / "arrived")
        assert not (tmp_path / "arrived").exists()
