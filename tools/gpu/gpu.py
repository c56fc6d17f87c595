"""``python -m tools.gpu.gpu``: measures everything that is claimed for a GPU, part by part, and keeps it as data.

The work is a list of parts, the most important first. Each runs in its own process and its outcome is kept; after each
the record is written again. A call runs the parts that fit into its time and are not done yet. A part that fails
blocks only those that need its outcome; ``--retry`` runs it again.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import figures, records, report
from dfad.experiments.comparisons import INHERITED, RECIPE_BARE, RECIPE_FULL
from dfad.experiments.provenance import device_name, file_name, machine
from dfad.files import write_text
from tools.gpu import parcel, rehearsal

ROOT = Path(__file__).parents[2]

RESERVE = 25.0
"""Seconds at the end of a call for the record and the parcel."""

GRACE = 20.0
"""Seconds for a part to write its checkpoint after the request to stop."""

PATIENCE = 1.6
"""Multiple of a part's expected time after which it is stopped: it hangs, or the machine is slower than expected."""

REHEARSED = 90.0
"""Longest time of a part of a rehearsal on two cores."""

CALLS = 6
"""Largest number of calls in which a part is continued."""

DONE, FAILED, STOPPED = "done", "failed", "stopped"

NOTHING_COLLECTED = 5
"""Exit code of pytest."""

OPTIONAL = ("apex", "nvidia-dali-cuda130", "liger-kernel")
"""Optional packages; without them their figures are missing."""


@dataclass(frozen=True)
class Part:
    """A process with an outcome."""

    name: str

    command: tuple[str, ...]
    """Arguments of the interpreter; ``{result}`` stands for the file that it writes."""

    seconds: float
    """Expected seconds; a call with less time left does not start it."""

    after: str = ""
    """Name of the part whose outcome it needs."""

    shortest: float = 0.0
    """Seconds that are enough to start it, because it continues after a stop; 0 if it does not."""

    continued: tuple[str, ...] = ()
    """Further arguments of a part that continues."""

    @property
    def resumable(self) -> bool:
        """Whether it continues after a stop."""
        return self.shortest > 0

    @property
    def needs(self) -> float:
        """Seconds that must be left."""
        return min(self.seconds, self.shortest) if self.resumable else self.seconds

    @property
    def slug(self) -> str:
        """Its name in the form of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass
class Outcome:
    """The outcome of a part."""

    status: str
    seconds: float = 0.0
    calls: int = 0
    result: Any = None
    error: str = ""
    device: str = ""

    @property
    def is_of_this_device(self) -> bool:
        """Whether it counts here: figures are compared on one device, but a trained teacher is the same on all."""
        return self.device in ("", device_name()) or _is_teacher(self.result)


@dataclass(frozen=True)
class Places:
    """Locations of inputs and outputs."""

    state: Path
    """Folder for everything that a later call needs."""

    data: Path | None = None
    """Archive of JPEGs."""

    lossless: Path | None = None
    """Archive of CIFAR-10's records."""

    network: Path | None = None
    """Weights of a trained ResNet-20."""

    @property
    def kept(self) -> Path:
        """Folder whose content is sent in a parcel."""
        return self.state / "kept"

    @property
    def benchmarks(self) -> Path:
        """Folder for the records of benchmarks."""
        return self.kept / "benchmarks"

    @property
    def compiled(self) -> Path:
        """Triton's cache: a fresh machine would need half a minute to compile the kernels of a round again."""
        return self.kept / "triton"

    @property
    def work(self) -> Path:
        """Folder that is not sent: checkpoints."""
        return self.state / "work"


ROUNDS = (
    "ours",
    "floor",
    "repaired",
    "published, TF32",
    "ours without merge_upsampling",
    "ours without fuse_batchnorm",
    "ours without channels_last",
    "ours with two streams",
    "published",
    "ours without the graph",
    "ours without the graph, BatchNorm",
)
COMPILED = ("ours", "repaired + torch.compile", "ours + torch.compile", "repaired + reduce-overhead")
"""Contenders of ``bench/bench_step.py``, the most telling and the fastest first; each that compiles takes a minute."""


def plan(places: Places, *, small: bool) -> list[Part]:
    """All parts in order; those up to the tests of rounds fit into one call of 540 seconds.

    Args:
        places: parts whose data is not given are omitted.
        small: a rehearsal: each kind of part for seconds, on a CPU.
    """

    def pytest(name: str, seconds: float, arguments: str, *more: str) -> Part:
        return Part(name, ("-m", "pytest", "-q", "--junitxml={result}", *shlex.split(arguments), *more), seconds)

    def benchmark(
        name: str, seconds: float, arguments: str, contenders: Sequence[str] = (), shortest: float = 40
    ) -> Part:
        more = ["--benchmark-disable-gc", f"--results={places.benchmarks}"]
        if contenders:
            more.append(f"--contenders={';'.join(contenders)}")
        return replace(pytest(name, seconds, arguments, *more), shortest=shortest, continued=("--missing",))

    def module(name: str, seconds: float, *command: str) -> Part:
        return Part(name, ("-m", *command, "--result", "{result}"), seconds)

    def campaign(what: str, name: str, seconds: float, data: Path, *more: str, after: str = "") -> Part:
        training = seconds / 60 if small else seconds
        arguments = [what, "--seconds", str(training), "--data", str(data), *more]
        arguments += ["--scale", "rehearsal" if small else "gpu"]
        arguments += ["--kept", str(places.kept), "--work", str(places.work), "--result", "{result}"]
        # to read the data, to choose algorithms, and to measure the time of an epoch or a round
        expected = seconds + 45
        # checkpoints stay on the machine, and the next call may have another
        return Part(name, ("-m", "tools.gpu.campaign", *arguments), expected, after, shortest=expected)

    def of_others(seconds: float) -> list[Part]:
        if not (places.network and places.lossless):
            return []
        return [campaign("student", "ResNet-20 student", seconds, places.lossless, "--network", str(places.network))]

    def own(*students: tuple[str, float]) -> list[Part]:
        if not places.data:
            return []
        return [
            campaign("teacher", "teacher", 180, places.data),
            *(
                campaign("student", f"student, {arm}", seconds, places.data, "--arm", arm, after="teacher")
                for arm, seconds in students
            ),
        ]

    def operators(dtype: str, words: str = "graph and backward") -> Part:
        return benchmark(
            f"operators, {dtype}" + (f", {words}" if words != "graph and backward" else ""),
            90,
            f"bench/bench_ops.py --full --seconds=0.1 -k '{dtype} and {words}'",
        )

    versions = module("versions", 5, "tools.gpu.checks", "versions")
    probes = module("probes", 60, "tools.gpu.probes")
    checks = [module(what, 90, "tools.gpu.checks", what) for what in ("memcheck", "racecheck", "profile")]
    if small:
        digits = "bench/bench_step.py -k '(test_round or kernels) and digits'"
        parts = [
            versions,
            probes,
            pytest("tests", 60, "tests/test_losses.py -n 2 --dist worksteal"),
            benchmark("rounds: digits", 60, f"{digits} --full", ("ours", "floor", "published")),
            *of_others(60),
            benchmark(
                "operators, float32",
                60,
                "bench/bench_ops.py --seconds=0.01 -k 'plain and float32'",
                ("published", "ours", "copy"),
            ),
            *own((RECIPE_FULL + INHERITED, 60)),
            checks[0],
        ]
        return [replace(part, seconds=REHEARSED) for part in parts]
    workers = "-n 12 --dist worksteal --durations=8"
    pairs = {"ResNet-34 to ResNet-18": "resnet34", "ResNet-20": "cifar-resnet20"}
    steps = {name: f"bench/bench_step.py --full -k 'test_round and {words}'" for name, words in pairs.items()}
    large, thin = pairs
    with_kernels = {name: words.replace("test_round", "(test_round or kernels)") for name, words in steps.items()}
    return [
        versions,
        benchmark(f"rounds: {large}", 145, with_kernels[large], ROUNDS),
        benchmark(f"rounds: {thin}", 130, with_kernels[thin], ROUNDS),
        *of_others(60),
        pytest("tests of rounds", 60, f"-m gpu {' '.join(TESTS_OF_ROUNDS)} {workers}"),
        # what follows refines the record, in further calls
        pytest("tests of kernels", 130, f"-m gpu tests/kernels/test_gpu.py {workers}"),
        operators("bfloat16"),
        *own((RECIPE_FULL, 140), (RECIPE_FULL + INHERITED, 60), (RECIPE_BARE, 120)),
        benchmark("operators over features", 60, "bench/bench_ops.py --full --seconds=0.1 -k features"),
        probes,
        operators("float32"),
        benchmark(f"rounds, compiled: {large}", 200, steps[large], COMPILED, shortest=150),
        benchmark(f"rounds, compiled: {thin}", 180, steps[thin], COMPILED, shortest=120),
        benchmark(
            "rounds: small pairs",
            90,
            "bench/bench_step.py --full -k '(test_round or kernels) and (digits or lenet5)'",
            ROUNDS,
        ),
        benchmark("a round's parts", 90, steps[large], ("ours", *PARTS)),
        benchmark("BatchNorm and what follows", 60, "bench/bench_step.py --full -k follows"),
        benchmark("data", 60, "bench/bench_data.py --full"),
        benchmark("views", 20, "bench/bench_augmentation.py --full"),
        benchmark("optimizers", 20, "bench/bench_optimizers.py"),
        *checks,
        *(operators(dtype, "graph and not backward") for dtype in ("bfloat16", "float32")),
        *(operators(dtype, "eager") for dtype in ("bfloat16", "float32")),
        benchmark("choices of a round", 90, "bench/bench_step.py --full -k 'mixed or statistics'"),
    ]


TESTS_OF_ROUNDS = (
    "tests/data/test_backends.py",
    "tests/distillation/test_distributed.py",
    "tests/engine/test_cuda_graph.py",
    "tests/supervised/test_teaching.py",
)
"""Files with tests marked ``gpu``, besides those of the kernels; each worker collects them."""

PARTS = (
    "ours without cast_weights",
    "losses",
    "losses, folding",
    "losses, folding, merging",
    "losses, folding, merging, optimizers",
    "losses, folding, merging, optimizers, BatchNorm",
)
"""Further contenders: the last ones, with more and more parts of the engine, run without a graph."""


class State:
    """The outcomes so far, saved at every change."""

    def __init__(self, kept: Path) -> None:
        self.path = kept / "parts.json"
        kept.mkdir(parents=True, exist_ok=True)
        written = json.loads(self.path.read_text()) if self.path.exists() else {}
        found = {name: Outcome(**outcome) for name, outcome in written.items()}
        self.outcomes = {name: outcome for name, outcome in found.items() if outcome.is_of_this_device}
        if others := {outcome.device for outcome in found.values() if not outcome.is_of_this_device}:
            print(f"What was measured on {', '.join(sorted(others))} does not count on {device_name()}.")

    def status(self, part: Part) -> str:
        """Status of a part; empty if it was not started."""
        return self.outcomes[part.name].status if part.name in self.outcomes else ""

    def keep(self, part: Part, outcome: Outcome) -> None:
        """Save the outcomes."""
        self.outcomes[part.name] = outcome
        write_text(self.path, json.dumps({name: asdict(outcome) for name, outcome in self.outcomes.items()}, indent=1))

    def forget(self, parts: Sequence[Part], wanted: str, *, failed: bool) -> None:
        """Mark parts to be run again: those whose names contain the words, and those that failed; of the latter
        benchmarks measure what is missing."""
        for part in parts:
            if wanted and wanted in part.name:
                self.outcomes.pop(part.name, None)
            elif failed and self.status(part) == FAILED:
                self.outcomes[part.name].status = STOPPED


def run_parts(
    parts: Sequence[Part], state: State, places: Places, budget: float, after_each: Callable[[], object] = lambda: None
) -> list[str]:
    """Run what is not done and fits; returns a line for each part that was begun or had to be left for later."""
    deadline = time.monotonic() + budget - RESERVE
    lines = []
    for part in parts:
        if state.status(part) in (DONE, FAILED):
            continue
        left = deadline - time.monotonic()
        if part.after and (part.after not in state.outcomes or state.outcomes[part.after].status != DONE):
            lines.append(f"{part.name:<44}waits for {part.after}")
            continue
        if left < part.needs:
            lines.append(f"{part.name:<44}left for the next call: takes {part.needs:.0f} s")
            continue
        outcome = run_part(part, state, places, left)
        state.keep(part, outcome)
        told = outcome.error or _told(outcome.result)
        lines.append(f"{part.name:<44}{outcome.status:<8}{outcome.seconds:6.1f} s  {told}".rstrip())
        print(lines[-1], flush=True)
        after_each()
    return lines


def run_part(part: Part, state: State, places: Places, left: float) -> Outcome:
    """Run a part within the remaining time, and return its outcome."""
    before = state.outcomes.get(part.name, Outcome(STOPPED))
    outcome = Outcome(STOPPED, before.seconds, before.calls + 1, device=device_name())
    state.keep(part, outcome)  # so that a killed call counts, too
    print(f"{part.name} …", flush=True)
    logs = places.kept / "logs"
    logs.mkdir(exist_ok=True)
    result = places.work / f"{part.slug}.result"
    result.parent.mkdir(exist_ok=True)
    result.unlink(missing_ok=True)
    limit = min(left, PATIENCE * part.seconds)
    command = [*part.command, *(part.continued if before.calls else ())]
    started = time.monotonic()
    with (logs / f"{part.slug}.log").open("a" if before.calls else "w") as log:
        code = _wait([word.replace("{result}", str(result)) for word in command], log, limit, places)
    outcome.seconds += time.monotonic() - started
    outcome.result = read_result(result)
    if code in (0, NOTHING_COLLECTED):
        outcome.status = DONE
    elif code is not None:
        outcome.status, outcome.error = FAILED, f"exit code {code}: {_last_words(logs / f'{part.slug}.log')}"
    elif not part.resumable and limit < left:
        outcome.status, outcome.error = FAILED, f"still running after {limit:.0f} s"
    elif outcome.calls >= CALLS:
        outcome.status, outcome.error = FAILED, f"not finished in {CALLS} calls"
    return outcome


def _wait(arguments: Sequence[str], log: Any, limit: float, places: Places) -> int | None:
    """The exit code; None if the process had to be stopped."""
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "DFAD_CACHE": str(places.work / "cache"),
        "TRITON_CACHE_DIR": str(places.compiled),
    }
    if places.data:
        environment["DFAD_DATA"] = str(places.data.parent)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # a process in its own session survives this one, and its children survive it
        for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
            if process.poll() is None:
                os.killpg(process.pid, number)
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue


def keep_own_kernels(cache: Path) -> None:
    """Remove what torch.compile made from Triton's cache, before that is sent: there is much of it."""
    for group in cache.glob("*/__grp__triton_*.json"):
        shutil.rmtree(group.parent, ignore_errors=True)


def read_result(path: Path) -> Any:
    """JSON, or the summary of a pytest report; None if it is missing or incomplete."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    try:
        if not text.startswith("<?xml"):
            return json.loads(text)
        cases = list(ET.fromstring(text).iter("testcase"))
    except (ValueError, ET.ParseError):  # a killed process may have written only a part
        return None
    kinds = {"failed": ("failure", "error"), "skipped": ("skipped",)}
    counts = {
        kind: [case.get("name") for case in cases if any(case.find(tag) is not None for tag in tags)]
        for kind, tags in kinds.items()
    }
    passed = len(cases) - sum(map(len, counts.values()))
    return {"passed": passed, "failed": counts["failed"], "skipped": len(counts["skipped"])}


def _told(result: Any) -> str:
    """A short description of a result."""
    if isinstance(result, dict) and "passed" in result:
        failed = f", {len(result['failed'])} failed: {', '.join(result['failed'][:3])}" if result["failed"] else ""
        skipped = f", {result['skipped']} skipped" if result["skipped"] else ""
        return f"{result['passed']} passed{failed}{skipped}"
    if isinstance(result, dict) and "accuracy" in result:
        teacher = f" of a teacher's {result['teacher_accuracy']:.2%}" if "teacher_accuracy" in result else ""
        return f"{result['accuracy']:.2%}{teacher} after {result['seconds']:.0f} s"
    return result if isinstance(result, str) else ""


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def make_record(parts: Sequence[Part], state: State, places: Places, *, small: bool) -> records.Record:
    """All measurements so far on this device."""
    measured = places.benchmarks / file_name()
    benchmarks = records.load(measured) if measured.exists() else {}
    results = {part.name: state.outcomes[part.name] for part in parts if part.name in state.outcomes}
    checks: dict[str, str] = {}
    for name in ("versions", "probes"):
        found = results[name].result if name in results else None
        checks |= {key: words for key, words in (found or {}).items() if isinstance(words, str)}
    for name, outcome in results.items():
        if name.startswith("tests") or outcome.status == FAILED or isinstance(outcome.result, str):
            words = " ".join(filter(None, (_told(outcome.result), outcome.error)))
            checks[name] = f"failed: {words}" if outcome.status == FAILED else words
    versions = machine()
    checks |= {package: versions[package] for package in OPTIONAL}
    of_networks = [outcome.result for outcome in results.values() if isinstance(outcome.result, dict)]
    profiled = results["profile"].result if "profile" in results else None
    return {
        "device": device_name(),
        **({"rehearsal": True} if small else {}),
        "machine": versions,
        "checks": checks,
        "teachers": [result for result in of_networks if _is_teacher(result)],
        "students": [result for result in of_networks if "teacher_accuracy" in result],
        "kernels": profiled if isinstance(profiled, list) else [],
        "profiles": benchmarks.get("profiles", []),
        "seconds": sum(outcome.seconds for outcome in results.values()),
        "benchmarks": benchmarks.get("benchmarks", []),
    }


def _is_teacher(result: Any) -> bool:
    return isinstance(result, dict) and "epochs" in result


def with_earlier(record: records.Record, earlier: records.Record) -> records.Record:
    """A record completed by what an earlier one of this device holds and it does not: by tasks, rounds and networks,
    because figures of different calls are not compared."""
    keys = {"benchmarks": "group", "profiles": "round", "students": "name", "teachers": "name", "kernels": "kernel"}
    completed = dict(record)
    for kind, key in keys.items():
        known = {row[key] for row in record[kind]}
        completed[kind] = [*record[kind], *(row for row in earlier.get(kind, []) if row[key] not in known)]
    return completed


def write_record(record: records.Record, folder: Path, *, small: bool) -> list[Path]:
    """Write JSON and Markdown; a rehearsal is marked as one, and is kept apart from the records."""
    path = folder / "rehearsal.json" if small else records.RESULTS / file_name()
    if not small and path.exists():
        record = with_earlier(record, records.load(path))
    records.save(path, record)
    tables = folder / "summary.md"
    tables.write_text(report.summary(record, path.name), encoding="utf-8")
    return [path, tables]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=540, help="seconds of this call")
    parser.add_argument("--state", type=Path, help="folder for what later calls need; by default runs/gpu")
    parser.add_argument("--data", type=Path, help="archive of CIFAR-10's JPEGs: train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--lossless", type=Path, help="archive of CIFAR-10's official binary version, or of a part")
    parser.add_argument("--network", type=Path, help="weights of a ResNet-20 trained on CIFAR-10")
    parser.add_argument("--out", type=Path, help="folder for the record and a parcel of the state")
    parser.add_argument("--rehearse", action="store_true", help="run every part for seconds, on any machine")
    parser.add_argument("--retry", action="store_true", help="run failed parts again")
    parser.add_argument("--again", default="", metavar="TEXT", help="run parts again whose names contain this text")
    parser.add_argument("--only", default="", metavar="TEXT,…", help="run parts alone whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print the parts and their status, and stop")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    command = parse(arguments)
    small = command.rehearse
    if not small and not command.list and not torch.cuda.is_available():
        raise SystemExit(
            f"PyTorch {torch.__version__} sees no NVIDIA GPU here, and a record needs one. Run it where there "
            "is one, or rehearse every part on the CPU with --rehearse (REHEARSE=1 make gpu)."
        )
    places = Places(
        command.state or ROOT / "runs" / ("gpu-rehearsal" if small else "gpu"),
        *(path and path.resolve() for path in (command.data, command.lossless, command.network)),
    )
    arrived = places.state / "in"
    if (arrived / parcel.MANIFEST).exists() and not places.kept.exists():
        parcel.receive(arrived, places.kept)
        print(f"Continuing what {arrived} brought.")
    state = State(places.kept)
    if small and not places.data:
        places = Places(places.state, *rehearsal.make(places.work / "data"))
    parts = plan(places, small=small)
    if command.list:
        for part in parts:
            print(f"{part.name:<44}{part.seconds:5.0f} s  {state.status(part) or 'to do'}")
        return
    state.forget(parts, command.again, failed=command.retry)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lines = [] if places.data else ["Without --data no teacher is trained, and none is distilled."]

    def written() -> list[Path]:
        paths = write_record(make_record(parts, state, places, small=small), places.state, small=small)
        if command.out:
            command.out.mkdir(parents=True, exist_ok=True)
            for path in paths:
                shutil.copy(path, command.out)
        return paths

    try:
        chosen = [part for part in parts if any(text in part.name for text in command.only.split(","))]
        lines += run_parts(chosen, state, places, command.budget, written)
    except KeyboardInterrupt:
        lines.append("Stopped by a signal.")
    paths = written()
    record = records.load(paths[0])
    plots = places.state / "figures.png"
    figures.save(record, plots)
    if command.out:
        keep_own_kernels(places.compiled)
        parcel.send(places.kept, command.out)
        shutil.copy(plots, command.out)
    standings = [state.status(part) for part in parts]
    left = [part for part in parts if state.status(part) not in (DONE, FAILED)]
    print("\n".join(["", *lines, ""]))
    print(f"{record['device']}: {standings.count(DONE)} of {len(parts)} parts done, {standings.count(FAILED)} failed.")
    if left:
        print(f"Call it again for the other {len(left)}, about {sum(part.seconds for part in left):.0f} s.")
    if FAILED in standings:
        print("Call it again with --retry for those that failed.")
    print("Written:", ", ".join(map(str, (*paths, plots))))
    if small:
        print("This was a rehearsal: none of its figures is a measurement.")


if __name__ == "__main__":
    main()
