"""A distillation: its rounds, the selection of the best student, and the state to resume from."""

import copy
import logging
import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfad import functional
from dfad.config import DistillConfig
from dfad.copies import in_float32
from dfad.distillation import preflight
from dfad.distillation.collapse import CollapseGuard
from dfad.distillation.frozen_teacher import FrozenTeacher
from dfad.distillation.round import Round
from dfad.distillation.selection import AgreementBank
from dfad.engine import Engine, choose_device
from dfad.errors import ConfigurationError, DivergenceError, RankError, RunFolderError
from dfad.models.model_file import weights_hash
from dfad.models.outputs import as_outputs
from dfad.models.probing import image_shape_of, parameter_count
from dfad.modes import evaluating, statistics_kept
from dfad.runs import checkpoint, report
from dfad.runs.folder import extend, open_folder
from dfad.runs.loop import run_loop
from dfad.runs.recorder import MetricBuffer, seconds_until
from dfad.runs.report import Samples
from dfad.runs.run_page import RunFacts, write_page
from dfad.runs.settings import leaves
from dfad.runs.snapshots import IMAGES, Snapshot, load_snapshots, moments, save_snapshot
from dfad.seeds import random_states, seeded, set_random_states, stream_seed
from dfad_kernels import kernel_name

log = logging.getLogger(__name__)

GLOBAL_STREAMS = ("cpu", "cuda", "python", "numpy")
"""Names in a checkpoint of the states of global generators, from which networks draw."""

OBSERVED_BATCHES = 16
"""Largest number of batches over which predicted classes are counted."""

REPORTED_BATCHES = 8
"""Of which classes and disagreements are reported at the end."""


@dataclass(frozen=True)
class Result:
    """The result of a distillation."""

    rounds: int
    images: int
    """Number of generated images, including those of the generator's warm-up."""
    student_images: int
    """Number of images that the student was trained on, including mixed ones and repeated draws from the bank."""
    teacher_queries: int
    """Number of images that the teacher was queried at in training, including the warm-up."""
    seconds: float
    """Time of warm-up, rounds, recording and selection, of all processes that a resumed run had."""
    rounds_per_second: float
    agreement: float | None
    """Agreement of the last student with the teacher on the bank of generated images."""
    best_agreement: float | None
    best_round: int | None
    accuracy: float | None
    """Accuracy of the last student on the evaluation set, if there is one."""
    best_accuracy: float | None
    """Accuracy of the student with the best agreement, which is selected without labels."""
    captured: bool = False
    """Whether rounds of the last process that ran some were replayed as a CUDA graph."""


TIMES = ("seconds", "rounds_per_second", "captured")
"""Of a result, what a process that runs no round leaves as it is."""


class Distiller:
    """Distils a student from a frozen teacher without any data.

    Args:
        teacher: a trained classifier; copied, never changed.
        student: trained in place. Until the end of :meth:`fit` it is in the form and on the device that the engine
            chose; after that, also after an exception, it is the plain network that was given, with its new weights:
            on its former device, or on the GPU if the run was on one.
        config: all settings.
        image_shape: ``(channels, height, width)`` of the teacher's images; found by trial forward passes by default.
        normalisation: mean and standard deviation per channel of the teacher's images, undone in the pictures of a run;
            by default the configuration's.
        evaluate: returns the accuracy of a network on real data; reported, never used to train or select.

    Raises:
        ModelError: if the networks cannot be combined as the configuration asks.
        ConfigurationError: if the machine does not support what the configuration asks for.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        config: DistillConfig | None = None,
        *,
        image_shape: tuple[int, int, int] | None = None,
        normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
    ) -> None:
        self.config = config = config or DistillConfig()
        method = config.method
        self.evaluate = evaluate
        self.normalisation = normalisation or (config.teacher.mean, config.teacher.std)
        self.device = choose_device(config.device)
        self.engine = Engine(
            config.engine, fused=config.fused, device=self.device, optimizer_backend=config.optimizer.backend
        )
        log.info("Loss kernels: %s, on %s.", _loss_kernels(self.device, fused=config.fused), self.device)
        preflight.check_keywords(config)
        preflight.require_usable(teacher, "teacher")
        preflight.require_usable(student, "student")
        teacher = in_float32(teacher, copied=True)
        self.teacher_hash = weights_hash(teacher.state_dict())
        self.ranks = self.engine.ranks
        student_hash = weights_hash(student.state_dict()) if self.ranks.several else ""
        self.ranks.require_equal(**dict(leaves(config)), teacher=self.teacher_hash, student=student_hash)
        self.image_shape = image_shape or image_shape_of(teacher, config.teacher.channels, config.teacher.image_size)
        preflight.check_normalisation(self.normalisation, self.image_shape[0])
        self.round = Round(teacher, student, config, self.engine, self.image_shape)
        self.bank = AgreementBank(config.selection.bank_size, method.rounds, self.device)
        self.round_index = -method.warm_up
        """Number of rounds done; below 0, the negated number of remaining warm-up steps."""
        self.best: dict[str, Any] = {}
        """Round, metrics and weights of the student that agreed most with the teacher on the bank."""
        self.collapse_guard = CollapseGuard(
            config.collapse, self.generator, self.round.generator_optimizer, self.round.fresh_generator_weights
        )
        self._global_rng: dict[str, Any] = {}
        self._constants = {name for name, buffer in self.student.named_buffers() if not buffer.isfinite().all()}
        """Buffers of the student that are infinite by design, such as masks."""

    @property
    def teacher(self) -> FrozenTeacher:
        """The teacher: a frozen copy."""
        return self.round.teacher

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.round.student

    @property
    def generator(self) -> nn.Module:
        """The network that makes the images."""
        return self.round.generator

    def run_round(self) -> Mapping[str, Tensor]:
        """Run the next round, or the next step of the generator's warm-up; returns metrics, on the device."""
        if self.round_index < 0:
            terms = self.round.warm_up()
        else:
            terms = self.round.run(self.round_index / self.config.method.rounds)
        self.round_index += 1
        return terms

    # The run

    def fit(self, run_dir: Path | str | None = None, *, resume: bool = False, overwrite: bool = False) -> Result:
        """Run the generator's warm-up and all rounds.

        Args:
            run_dir: folder for metrics, checkpoints, networks and pictures; nothing is written without one.
            resume: continue the run in that folder from its last checkpoint; with more rounds in the configuration than
                it was started with, extend it.
            overwrite: replace the run in that folder.

        Raises:
            DivergenceError: if a loss becomes NaN or infinite.
            Interrupted: after SIGINT or SIGTERM, when the checkpoint is written.
            RunFolderError: if the run cannot use the folder, or it cannot be written to.
            ModelError: if the student cannot be stored, or a run is resumed with another teacher.
        """
        with torch.inference_mode(False), torch.enable_grad(), self.round.student_placed():
            return self._fit(Path(run_dir) if run_dir is not None else None, resume=resume, overwrite=overwrite)

    def _fit(self, folder: Path | None, *, resume: bool, overwrite: bool) -> Result:
        if folder is None and resume:
            raise RunFolderError("Resuming needs the folder of the run: fit(run_dir, resume=True).")
        if folder is not None:
            self.ranks.require_equal(folder=folder)
            state = self.ranks.of_first(lambda: self._open(folder, resume=resume, overwrite=overwrite))
            if state is not None:
                preflight.check_teacher(folder, state.get("teacher"), self.teacher_hash)
                self.load_state_dict(state)
            if resume:
                self.ranks.of_first(lambda: extend(folder, self.config))
        started, start_round = time.perf_counter(), self.round_index
        # networks draw from the global generators themselves, as for dropout
        networks = f"networks-{self.ranks.rank}" if self.ranks.rank else "networks"
        with self.engine.running(), seeded(stream_seed(self.config.seed, networks), self.device):
            self._restore_global_rng()
            history = self._run_rounds(folder)
            earlier = self.ranks.of_first(lambda: seconds_until(start_round, history, -self.config.method.warm_up))
            result = self._result(earlier + time.perf_counter() - started)
        if folder is not None and start_round == self.config.method.rounds:  # finished before
            kept = {name: value for name, value in report.read_result(folder).items() if name in TIMES}
            result = replace(result, **kept)
        if folder is not None and self.ranks.first:
            self._report(folder, history, result)
        return result

    def _open(self, folder: Path, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        preflight.check_files(self.student, self.config)
        size = preflight.bytes_of_run(self.student, self.generator, self.image_shape, self.config)
        preflight.check_room(folder, size)
        return open_folder(folder, self.config, resume=resume, overwrite=overwrite)

    def _run_rounds(self, folder: Path | None) -> list[dict[str, float]]:
        log_every, select_every = self.config.recording.log_every, self.config.selection.every
        writes = folder is not None and self.ranks.first
        kept = moments(self.config.method.rounds) if writes else set()
        buffer = MetricBuffer()
        with run_loop(
            folder,
            self.config.method.rounds,
            lambda: self.round_index,
            self.state_dict,
            self.config.recording.checkpoint_every,
            first=-self.config.method.warm_up,
            ranks=self.ranks,
        ) as loop:
            for _ in loop:
                buffer.add(self.run_round())
                if self.bank.is_due(self.round_index):
                    self._extend_bank()
                if folder is not None and self.round_index in kept:
                    self._save_snapshot(folder)
                selecting = self.round_index > 0 and loop.due(select_every)
                # at 0, the end of the warm-up, everything is due, because warm-up metrics differ from those of a round
                if loop.saving or loop.due(log_every) or selecting:
                    metrics = self._read(buffer, folder)
                    if selecting:
                        metrics |= self._select()
                    loop.record(metrics)
        return loop.history

    def _report(self, folder: Path, history: Sequence[Mapping[str, float]], result: Result) -> None:
        report.write_networks(
            folder,
            self.config,
            self.image_shape,
            self.normalisation,
            architecture=report.student_architecture(self.student, self.config.student),
            student=self.student.state_dict(),
            best=self.best,
            generator=self.generator.state_dict(),
            rounds=self.round_index,
        )
        report.write_result(folder, asdict(result))
        report.write_pictures(folder, self.samples(report.SAMPLES), self.normalisation, history)
        teacher_logits, student_logits = self._predictions()
        facts = RunFacts(
            config=self.config,
            result=asdict(result),
            history=history,
            snapshots=load_snapshots(folder, self.round_index),
            teacher_logits=teacher_logits,
            student_logits=student_logits,
            parameters={
                "teacher": self.teacher.parameter_count,
                "student": parameter_count(self.student),
                "generator": parameter_count(self.generator),
            },
            teacher_hash=self.teacher_hash,
            architecture=report.student_architecture(self.student, self.config.student),
            image_shape=self.image_shape,
            normalisation=self.normalisation,
            device=str(self.device),
        )
        write_page(folder, facts)

    @torch.no_grad()
    def _predictions(self) -> tuple[Tensor, Tensor]:
        """What teacher and last student say of generated images, the same each time; on the CPU."""
        stream = torch.Generator(self.device).manual_seed(stream_seed(self.config.seed, "report"))
        shape = (self.config.method.batch_size, self.config.generator.noise_dim)
        pairs = []
        with self.engine.autocast(), statistics_kept(self.generator), evaluating(self.student):
            for _ in range(REPORTED_BATCHES):
                images = self.generator(torch.randn(shape, generator=stream, device=self.device))
                pairs.append((self.teacher(images).logits.float().cpu(), self._classify(images).float().cpu()))
        teacher, student = map(torch.cat, zip(*pairs, strict=True))
        return teacher, student

    def _save_snapshot(self, folder: Path) -> None:
        samples = self.samples(IMAGES)
        pixels = (report.to_pixels(samples.images, *self.normalisation) * 255).round().astype("uint8")
        labels, confidences = samples.labels.tolist(), samples.confidences.tolist()
        save_snapshot(folder, Snapshot(self.round_index, pixels, labels, confidences))

    @torch.no_grad()
    def samples(self, count: int) -> Samples:
        """Generated images with the teacher's predictions; from the same noise each time."""
        stream = torch.Generator(self.device).manual_seed(stream_seed(self.config.seed, "samples"))
        noise = torch.randn(count, self.config.generator.noise_dim, generator=stream, device=self.device)
        with self.engine.autocast(), statistics_kept(self.generator):
            images = self.generator(noise)
            confidences, labels = self.teacher(images).logits.float().softmax(dim=1).max(dim=1)
        return Samples(images.float().cpu(), labels.cpu(), confidences.cpu())

    def _read(self, buffer: MetricBuffer, folder: Path | None) -> dict[str, float]:
        # losses belong to the weights before a step, checkpoints to those after it
        norms = {
            "student_norm": _norm(self.student, self.round.connectors, without=self._constants),
            "generator_norm": _norm(self.generator),
        }
        observed = self.observe()
        metrics = self._agreed({**buffer.read(), **norms, **observed})
        observed = {name: metrics[name] for name in observed}
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            kept = f" The last good checkpoint is kept in {folder}." if folder and checkpoint.exists(folder) else ""
            raise DivergenceError(
                f"{', '.join(broken)} became NaN or infinite by round {self.round_index}.{kept} Lower the learning "
                "rates (--optimizer.student.lr, --optimizer.generator.lr) or the weights of the loss."
            )
        return metrics | self.collapse_guard.look(observed, self.round_index, self.config.method.rounds)

    def _agreed(self, metrics: dict[str, float]) -> dict[str, float]:
        """Means over the ranks, whose networks must be the same ones."""
        if not self.ranks.several:
            return metrics
        bits = {"student": _checksum(self.student, self.round.connectors), "generator": _checksum(self.generator)}
        everyone, bits_of_all = zip(*self.ranks.all_of((metrics, bits)), strict=True)
        agreed = {name: sum(each[name] for each in everyone) / len(everyone) for name in metrics}
        if all(map(math.isfinite, agreed.values())):  # NaN has more than one form
            for rank, others in enumerate(bits_of_all):
                for name in (name for name in bits if others[name] != bits_of_all[0][name]):
                    raise RankError(
                        f"By round {self.round_index} rank {rank} has another {name} than rank 0. Ranks stay alike "
                        "where a network computes the same on all of them and holds no buffers, but the statistics of "
                        "BatchNorms, that follow the images of one."
                    )
        return agreed

    @torch.no_grad()
    def observe(self) -> dict[str, float]:
        """Diversity of generated images, on separate images: one batch, or several if there are more classes than
        images in one. Waits for the device."""
        batch_size = self.config.method.batch_size
        with self.engine.autocast(), statistics_kept(self.generator):
            images = self.generator(self.round.sample_noise(batch_size, "probe"))
            teacher, features = self.teacher.with_statistics(images)
            batches = min(math.ceil(teacher.logits.shape[1] / batch_size), OBSERVED_BATCHES)
            others = [
                self.teacher(self.generator(self.round.sample_noise(batch_size, "probe"))).logits
                for _ in range(batches - 1)
            ]
        logits = torch.cat([teacher.logits, *others])
        observed = {
            "class_entropy": functional.class_entropy(logits),
            "pairwise_diversity": functional.pairwise_diversity(images),
            "teacher_confidence": logits.float().softmax(dim=1).amax(dim=1).mean(),
        }
        if features:
            observed["batchnorm_distance"] = self.round.batchnorm_statistics(features)
        return dict(zip(observed, torch.stack(list(observed.values())).tolist(), strict=True))

    def _extend_bank(self) -> None:
        with torch.no_grad(), self.engine.autocast(), statistics_kept(self.generator):
            images = self.generator(self.round.sample_noise(self.bank.slice_size, "bank"))
            self.bank.add(images, self.teacher(images).logits)

    def _select(self) -> dict[str, float]:
        """Measure the student, and keep it if its agreement is the best; a later student, which saw more, wins ties."""
        metrics: dict[str, float] = {}
        with evaluating(self.student):
            if self.evaluate:
                metrics["accuracy"] = float(self.evaluate(self.student))
            if self.bank.complete:
                metrics["agreement"] = self.bank.agreement(self._classify)
        metrics = self.ranks.of_first(lambda: metrics)
        if metrics.get("agreement", -1.0) >= self.best.get("agreement", 0.0):
            state = dict(copy.deepcopy(self.student.state_dict()))  # tied weights stay one tensor
            self.best = {"round": self.round_index, **metrics, "state": state}
        return metrics

    @torch.no_grad()
    def _classify(self, images: Tensor) -> Tensor:
        with self.engine.autocast():
            return as_outputs(self.student(images)).logits

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to end with the same bits as an uninterrupted one."""
        parts = {name: part.state_dict() for name, part in self._stateful().items()}
        rng: dict[str, Any] = {name: generator.get_state() for name, generator in self.round.rng.items()}
        rng |= {"cpu": torch.get_rng_state(), **random_states()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.ranks.several:
            rng["of_ranks"] = self.ranks.all_of({name: rng[name] for name in GLOBAL_STREAMS if name in rng})
        progress = {"round": self.round_index, "best": self.best, "rng": rng, "teacher": self.teacher_hash}
        return {**self.round.state_dict(), **parts, **progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.round.load_state_dict(state)
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        for name, generator in self.round.rng.items():
            if name in state["rng"]:  # an older checkpoint without this stream did not draw from it
                generator.set_state(state["rng"][name])
        self._global_rng = self._own_rng(state["rng"])
        self.round_index, self.best = state["round"], state["best"]

    def _stateful(self) -> dict[str, Any]:
        return {"bank": self.bank, "collapse_guard": self.collapse_guard}

    def _own_rng(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The states of the global generators that this rank had; none where there was no such rank."""
        of_ranks = saved.get("of_ranks", [saved])
        if len(of_ranks) != self.ranks.count:
            log.warning(
                "The run was saved with a number of ranks of %d and goes on with %d: its images stay the same; its "
                "rounding, and what networks draw themselves, do not.",
                *(len(of_ranks), self.ranks.count),
            )
        return of_ranks[self.ranks.rank] if self.ranks.rank < len(of_ranks) else {}

    def _restore_global_rng(self) -> None:
        if self._global_rng:
            torch.set_rng_state(self._global_rng["cpu"])
            if "python" in self._global_rng:  # of an older checkpoint they are not known
                set_random_states(self._global_rng)
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self._global_rng["cuda"], self.device)

    def _result(self, seconds: float) -> Result:
        method = self.config.method
        last = self._select() if self.round_index else {}
        warm_up = method.warm_up * method.batch_size
        return Result(
            rounds=self.round_index,
            images=warm_up + self.round_index * method.images_per_round,
            student_images=self.round_index * method.student_images_per_round,
            teacher_queries=warm_up + self.round_index * method.queries_per_round,
            seconds=seconds,
            rounds_per_second=self.round_index / seconds,
            agreement=last.get("agreement"),
            accuracy=last.get("accuracy"),
            best_round=self.best.get("round"),
            best_agreement=self.best.get("agreement"),
            best_accuracy=self.best.get("accuracy"),
            captured=self.engine.captured,
        )


def distill(
    teacher: nn.Module,
    student: nn.Module,
    config: DistillConfig | None = None,
    *,
    run_dir: Path | str | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> Result:
    """Distil a student, trained in place, from a frozen teacher; see :class:`Distiller`."""
    return Distiller(teacher, student, config, evaluate=evaluate).fit(run_dir)


def _loss_kernels(device: torch.device, *, fused: bool) -> str:
    try:
        return kernel_name(device) if fused else "PyTorch reference"
    except RuntimeError as error:
        raise ConfigurationError(str(error)) from error


@torch.no_grad()
def _checksum(*networks: nn.Module) -> int:
    """A number that changes with any bit of parameters and buffers. Waits for the device."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = [
        torch.view_as_real(tensor) if tensor.is_complex() else tensor
        for network in networks
        for tensor in (*network.parameters(), *network.buffers())
    ]
    # squares, because the rounding of two weights may differ by opposite amounts
    sums = [tensor.view(integers[tensor.itemsize]).long().square().sum() for tensor in tensors]
    return int(torch.stack(sums).sum()) if sums else 0


@torch.no_grad()
def _norm(*networks: nn.Module, without: Container[str] = ()) -> float:
    """Euclidean norm of parameters and statistics: finite if and only if each of them is."""
    state = [
        value
        for network in networks
        for name, value in (*network.named_parameters(), *network.named_buffers())
        if value.is_floating_point() and name not in without
    ]
    return torch.nn.utils.get_total_norm(state).item()
