"""Trainer: phases -> epochs -> windows over one DeepSpeed engine, which is always called `ds`."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from typing import Any

import torch
from torch import nn

from gdyn import ds_config, ds_engine, loss_curves, progress, watchdog, window
from gdyn.checkpoints import Checkpoint, CheckpointStore, full_weights, phases_of
from gdyn.config import RunConfig
from gdyn.ds_config import DsConfig
from gdyn.errors import UserError
from gdyn.evaluation import Stopped, evaluate
from gdyn.inference import begin_from, choose, load_weights
from gdyn.learning_rate import LearningRates
from gdyn.loader import Batch, Loader
from gdyn.metrics import Journal, Meter
from gdyn.phase_best import PhaseBest
from gdyn.phases import Phase, Position, improves
from gdyn.ranks import AgreedError, RankContext
from gdyn.rundir import RunDir, write_json
from gdyn.signals import StopRequest
from gdyn.watchdog import Watchdog

log = logging.getLogger("gdyn")


class Trainer:
    """One run, as seen by one rank. Every rank must make one and call the same methods in the same order.

    Raises: UserError for data, batch sizes or a DeepSpeed JSON that cannot work together.
    """

    def __init__(
        self,
        config: RunConfig,
        here: RankContext,
        run_dir: RunDir,
        recipe: DsConfig,
        stop: StopRequest,
        watch: Watchdog | None = None,
    ):
        self.config, self.here, self.run_dir, self.stop = config, here, run_dir, stop
        self.watch = watch or Watchdog(here)
        self.engine, self.plan = config.engine, config.plan
        self.datasets = self.engine.datasets()
        wishes = config.optimization
        self.loader = Loader(
            self.datasets["train"],
            *ds_config.batch_sizes(recipe, wishes.batch_size, wishes.gradient_accumulation_steps),
            here,
            seed=config.seed,
            workers=config.workers,
            limit_windows=config.limit_windows,
            overfit_windows=config.overfit_windows,
            max_size=self.engine.max_size,
            size_key=f"engine.{self.engine.size_key}",
            like_sizes=self.engine.like_sizes,
        )
        self.loader.check()
        for split in self.datasets:
            self._whole(split).check_sizes()
        self.notices = self.engine.notices(self.datasets["train"], self.loader.window_size)
        # Where sizes bound the micro-batches, epochs differ a little in steps; the first stands for all.
        total_steps = self.plan.epochs * self.loader.windows_per_epoch(0)
        self.ds_json = ds_config.complete(recipe, wishes, total_steps)
        self.rates = LearningRates(wishes.lr_schedule, total_steps) if wishes.lr_schedule else None
        keep = config.checkpointing
        self.store = CheckpointStore(run_dir.checkpoints, here, keep.keep, keep.save_best_only)
        self.ds: Any = None
        self.trains: list[str] = []
        self.console = progress.Console(config.logging.style, run_dir.checkpoints)
        self.checkpoint_seconds, self.asked_at = 1.0, time.monotonic()
        self.position = Position()
        """What is next; up to date whenever `stop` is asked."""
        self.phase_best = PhaseBest(self.plan)
        self.skipped = window.Skipped()
        self.startup: dict[str, float] = {}
        """Seconds until the first optimizer step was done, by what they went into."""

    # -- the table of contents ----------------------------------------------------------------------------------------

    def fit(self) -> Position:
        """Train what is left of the plan, or until a stop is requested; returns what is next. Every rank must call
        this."""
        checkpoint = self.store.find(self.config.resume)
        position = self._begin(checkpoint)
        journal = Journal(self.run_dir, self.here.main, position.step, self.config.hyper_parameters, self.config.wandb)
        self.journal, self.trained, self.seconds = journal, 0, 0.0
        self.position = self.saved = position
        while not self.plan.done(self.position):
            phase = self.position.phase
            self._enter(self.position, checkpoint)
            goes_on = self._train_epoch(checkpoint)
            if self.here.main and (not goes_on or self.position.phase > phase):
                loss_curves.write(self.run_dir, self.plan, self.engine.higher_is_better)
            if not goes_on:
                break
            checkpoint = None
        self._release()
        return self.position

    def finish(self, position: Position) -> dict[str, Any]:
        """Score the best checkpoint on validation and test, write summary.json and return it. Every rank must call
        this."""
        self.watch.at("final evaluation")
        chosen = choose(self.store, self.plan.phases, "best")
        model = self.engine.model()
        load_weights(model, chosen.weights(), str(chosen.path))
        model.to(self.here.device).eval()
        phase = self.plan.phases[-1]
        scores: dict[str, dict[str, Any]] = {}
        for split in ("validation", "test"):
            if split in self.datasets:
                scores[split], _ = evaluate(
                    self.engine, model, self._whole(split), phase, self.here, lambda: self._progress("final evaluation")
                )
        if "test" in scores:
            # Validation is in the summary only: its lines are of the epochs, and stay unique when a finished run is
            # resumed.
            self.journal.write(
                scores["test"], step=position.step, phase=phase.label, epoch=self.plan.epochs, split="test"
            )
        for name, figure in self.engine.figures(scores).items() if self.here.main else ():
            self.journal.figure(name, figure, position.step)
        summary: dict[str, Any] = {
            "engine": type(self.engine).__name__,
            "world_size": self.here.world_size,
            "phases": [{"name": p.label, "objective": p.objective, "epochs": p.epochs} for p in self.plan.phases],
            "steps": position.step,
            "skipped_windows": self.skipped.total,
            "epochs": self.plan.global_epoch(position),
            "samples_per_second": self.trained / self.seconds if self.seconds else None,
            "best": {objective: entry["score"] for objective, entry in self.store.best().items()},
            **scores,
            "checkpoint": chosen.tag,
        }
        if self.here.main:
            write_json(self.run_dir.summary_json, summary)
        self.journal.close()
        return summary

    # -- before the first step ----------------------------------------------------------------------------------------

    def _begin(self, checkpoint: Checkpoint | None) -> Position:
        """Where to start, with the sentences that say so."""
        log.info("%s", self.loader)
        for notice in self.notices:
            log.warning("%s", notice)
        if checkpoint is None:
            if self.run_dir.metrics_jsonl.exists():
                log.warning("%s has no checkpoint yet: starting from the beginning.", self.run_dir.path)
            return Position()
        position = checkpoint.position
        change = self.plan.check_past(phases_of(checkpoint), position, self.config.allow_schedule_change)
        if change:
            log.warning("%s", change)
        self._check_seed(checkpoint)
        self.store.recall_best(checkpoint)
        self.phase_best.load_state_dict(checkpoint.record.get("phase_best"))
        self.skipped = window.Skipped(**checkpoint.record.get("skipped_windows", {}))
        if self.rates is not None:
            # Here rather than by DeepSpeed, which loads nothing where a phase begins that trains other parameters.
            self.rates.steps = position.step - self.skipped.total
            self.rates.load_state_dict(checkpoint.record.get("learning_rates"))
        if self.plan.done(position):
            log.info("the run is finished (checkpoint %s); nothing to train, evaluating.", checkpoint.tag)
        else:
            log.info(
                "resuming from checkpoint %s: %d of %d epochs done, starting from phase %d, epoch %d, sample %d.",
                checkpoint.tag,
                self.plan.global_epoch(position),
                self.plan.epochs,
                position.phase,
                position.epoch,
                position.sample,
            )
        return position

    def _check_seed(self, checkpoint: Checkpoint) -> None:
        position, record = checkpoint.position, checkpoint.record
        if position.sample and record["seed"] != self.config.seed:
            raise UserError(
                f"checkpoint {checkpoint.tag} lies within an epoch whose order seed {record['seed']} gave; the run "
                "file says seed "
                f"{self.config.seed}. Restore the seed, or resume from the end of an epoch."
            )
        if position.sample and record["global_batch"] != self.loader.window_size:
            log.warning(
                "the global batch was %d and is now %d: training goes on, but not as if it had never stopped.",
                record["global_batch"],
                self.loader.window_size,
            )

    def _enter(self, position: Position, checkpoint: Checkpoint | None) -> None:
        """Make `ds` for the phase of `position`, unless the present one trains the same parameters and these are not to
        be restored. Every rank must call this."""
        began = time.monotonic()
        self._progress("initializing")
        phase = self.plan.phase(position)
        if self.ds is None or (position.epoch == 0 and position.sample == 0):
            first = self.plan.global_epoch(position) + 1  # as printed, from 1
            last, total = first + phase.epochs - position.epoch - 1, self.plan.epochs
            log.info("phase %s: objective %s, epochs %d-%d of %d.", phase.label, phase.objective, first, last, total)
            self.console.phase(position.phase, phase)
        if self.rates is not None:
            self.rates.begin_phase(position.phase, phase.epochs * self.loader.windows_per_epoch(0))
        weights = self.phase_best.restored(position, self.store)
        if weights is not None:
            checkpoint = None  # its optimizer state belongs to other weights
        elif self.ds is not None:
            if self.trains == ds_engine.trainable(self.ds.module, phase):
                return
            weights = full_weights(self.ds)
        self._release()
        torch.manual_seed(self.config.seed)
        model = self.engine.model()
        if weights is not None:
            load_weights(model, weights, str(self.store.path))
        elif checkpoint is None and self.config.init_from:
            begin_from(self.config.init_from, model)
            log.info("weights from %s.", self.config.init_from)
        self.trains = ds_engine.trainable(model, phase)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in set(self.trains))
        if checkpoint is not None:
            # Refuses another network's with a sentence, which DeepSpeed would not.
            load_weights(model, checkpoint.weights(), str(checkpoint.path))
            if checkpoint.record["trains"] != self.trains:
                checkpoint = None  # the optimizer state of another trainable set has no place to go
        self._initialize(model, phase, checkpoint)
        self.startup.setdefault("initialize", time.monotonic() - began)

    def _initialize(self, model: nn.Module, phase: Phase, checkpoint: Checkpoint | None) -> None:
        values, tag = dict(self.ds_json), ""
        if checkpoint is not None:
            with self.watch.away("converting the checkpoint"):
                tag, universal = self.store.reshape(
                    checkpoint, ds_config.zero_stage(values), ds_config.optimizer_type(values)
                )
            if universal:
                values["checkpoint"] = {**values.get("checkpoint", {}), "load_universal": True}
        self.here.limit_collectives(self.watch.limit + watchdog.COLLECTIVES)
        self.ds = ds_engine.make(self.engine, model, phase, values, self.rates)
        if checkpoint is not None:
            self.store.load(self.ds, checkpoint, tag)
            if self.rates is not None:
                self.rates.apply()
        if self.config.optimization.torch_compile:
            self.ds.compile(compile_kwargs={"mode": self.config.optimization.compile_mode})

    def _release(self) -> None:
        if self.ds is not None:
            ds_engine.release(self.ds)
            self.ds = None

    # -- one epoch ----------------------------------------------------------------------------------------------------

    def _train_epoch(self, checkpoint: Checkpoint | None) -> bool:
        """Train from `position` to the end of its epoch, validate and save; false if a stop was requested meanwhile,
        and everything until then is saved. `checkpoint`: what this run has just resumed from. Every rank must call
        this."""
        phase, epoch = self.plan.phase(self.position), self.plan.global_epoch(self.position)
        total, recent = self._meters(checkpoint)
        started = lapped = time.perf_counter()
        first_sample = lap_sample = self.position.sample
        ends = iter(self.loader.ends(epoch, first_sample))
        self.ds.train()
        for batches, stopping in self.here.each(self._bar(self.position), lambda: self._asked("training")):
            if stopping:
                self._save_within_epoch(total, recent)
                return False
            due = (self.position.step + 1) % self.config.logging.every_steps == 0
            end = int(next(ends))
            norms = self._train_window(batches, phase, end, recent, due)
            position = self.position = self.plan.after_window(self.position, end - self.position.sample)
            if due:
                values = recent.means() | ds_engine.learning_rates(self.ds) | norms
                values |= self.engine.gauges(self.ds.module, phase)
                values |= {"skipped_windows": self.skipped.total} if self.skipped.total else {}
                now = time.perf_counter()
                values["samples_per_second"] = (position.sample - lap_sample) / (now - lapped)
                self.journal.write(values, step=position.step, phase=phase.label, epoch=epoch, split="train")
                total.absorb(recent)
                recent, lapped, lap_sample = Meter(self.here.device), now, position.sample
            if "first_window" not in self.startup:
                self._started_up(time.perf_counter() - started)
            every = self.config.checkpointing.every_steps
            if every and position.step % every == 0 and position.sample < self.loader.samples_per_epoch(epoch):
                self._save_within_epoch(total, recent)
        position, seconds = self.position, time.perf_counter() - started
        self.ds.eval()
        whole = self._whole("validation")
        try:
            validation, last = evaluate(
                self.engine, self.ds, whole, phase, self.here, lambda: self._asked("validation")
            )
        except Stopped:  # it starts anew when the run goes on
            self._save_within_epoch(total, recent)
            return False
        total.absorb(recent)
        train = total.means()
        samples = position.sample - first_sample
        self.trained, self.seconds = self.trained + samples, self.seconds + seconds
        self.journal.write(validation, step=position.step, phase=phase.label, epoch=epoch, split="validation")
        self.position, improved, tag = self._end_epoch(position, validation)
        early = self.position.phase > position.phase and position.epoch + 1 < phase.epochs
        report = progress.EpochReport(
            epoch=epoch + 1,
            epochs=self.plan.epochs,
            epoch_of_phase=position.epoch + 1,
            phase=phase,
            train=train,
            train_last=total.last,
            validation=validation,
            validation_last=last,
            learning_rate=ds_engine.learning_rates(self.ds)["lr"],
            samples_per_second=samples / seconds,
            seconds=seconds,
            improved=improved,
            early=early,
            checkpoint=tag,
            shown=list(dict.fromkeys([phase.objective, *self.engine.shown])),
        )
        self.console.epoch(report)
        return True

    def _meters(self, checkpoint: Checkpoint | None) -> tuple[Meter, Meter]:
        """Of the epoch and since the last line of metrics; with what they had counted before an interruption within the
        epoch."""
        meters = Meter(self.here.device), Meter(self.here.device)
        ranks = checkpoint.record.get("meters", []) if checkpoint is not None else []
        # Rank by rank where that is possible, so that even the order of summation is as if nothing had happened.
        for rank, sums in enumerate(ranks):
            for meter, by_name in zip(meters, sums, strict=True):
                meter.add_sums(by_name, counts=rank % self.here.world_size == self.here.rank)
        return meters

    def _train_window(self, batches: list[Batch], phase: Phase, end: int, meter: Meter, measure: bool) -> window.Norms:
        """One optimizer step, of the samples up to `end` of the epoch's order; returns the gradient norms if `measure`.
        Every rank must call this."""
        # Randomness is a function of seed, step and rank, so that a resumed run draws what an uninterrupted one would.
        torch.manual_seed(self.config.seed + 1_000_003 * self.position.step + 7_919 * self.here.rank)
        outcome = window.train(self.engine, self.ds, batches, phase, self.here, meter, measure)
        if outcome.skipped is None:
            self.skipped.row.clear()
        else:
            self._skip(outcome.skipped, end)
        return outcome.norms

    def _skip(self, losses: list[float], end: int) -> None:
        """Count and report a window, up to `end` of the epoch's order, that was skipped. Every rank must call this.
        losses: of this rank's micro-batches.

        Raises: AgreedError if there are too many in a row.
        """
        position, most = self.position, self.config.optimization.max_skipped_windows
        samples = self.loader.samples(self.plan.global_epoch(position), position.sample, end)
        found = [(loss, part.tolist()) for loss, part in zip(losses, samples, strict=True)]
        reason = window.described(self.here.gather(found), self.loader.name)
        self.skipped.total += 1
        self.skipped.row.append(f"step {position.step + 1}: {reason}")
        log.warning("skipped %s; weights and optimizer stay as they are.", self.skipped.row[-1])
        if len(self.skipped.row) >= most:
            place = f"epoch {position.epoch}, sample {position.sample}, step {position.step + 1}"
            raise AgreedError(
                f"{len(self.skipped.row)} optimizer steps in a row were skipped, because a loss or gradient was not "
                f"finite, at phase {self.plan.phase(position).label}, {place}. "
                f"{'; '.join(self.skipped.row[-most:])}. Usual cures: a smaller learning_rate (halve it), a larger "
                "batch or epsilon, data without NaN. The checkpoints before these steps are intact; "
                f"optimization.max_skipped_windows = {most} says how many are too many."
            )

    def _end_epoch(self, position: Position, validation: dict[str, Any]) -> tuple[Position, bool, str]:
        """(what is next, whether the objective's best score improved, tag of the checkpoint if one was due). Every rank
        must call this."""
        phase = self.plan.phase(position)
        higher = self.engine.higher_is_better(phase.objective)
        # One rank's, because what follows must be the same everywhere, and other processors may round differently.
        score, best = self.here.broadcast((validation.get(phase.objective, math.nan), self.store.best()))
        if self.rates is not None:
            self.rates.end_epoch(phase.objective, score, higher)
        # Per objective: the scales of different objectives cannot be compared.
        improved = improves(score, best.get(phase.objective, {}).get("score"), higher)
        following, restorable = self.phase_best.follow(position, score, higher)
        epoch = self.plan.global_epoch(position) + 1
        due = epoch % self.config.checkpointing.every_epochs == 0 and not self.config.checkpointing.save_best_only
        if not (improved or due or restorable or following.phase > position.phase):
            return following, improved, ""
        if improved:
            best[phase.objective] = {"tag": self.plan.tag(following), "score": score, "epoch": epoch}
        tag = self._save(following, validation=validation, best=best)
        if self.here.main:
            self.store.prune()
        self.here.barrier()
        return following, improved, tag

    # -- small things -------------------------------------------------------------------------------------------------

    def _save(self, position: Position, **facts: Any) -> str:
        """Every rank must call this."""
        self._progress("saving")
        facts = {
            "engine": type(self.engine).__name__,
            "seed": self.config.seed,
            "global_batch": self.loader.window_size,
            "trains": self.trains,
            "best": self.store.best(),
            "phase_best": self.phase_best.state_dict(),
            "learning_rates": self.rates and self.rates.state_dict(),
            "skipped_windows": dataclasses.asdict(self.skipped),
            **facts,
        }
        began = time.monotonic()
        tag = self.store.save(self.ds, self.plan, position, facts)
        self.checkpoint_seconds = max(self.checkpoint_seconds, time.monotonic() - began)
        self.saved = position
        return tag

    def _save_within_epoch(self, total: Meter, recent: Meter) -> None:
        """Save, with what the epoch's meters have counted. Every rank must call this."""
        if self.position != self.saved:
            self._save(self.position, meters=self.here.collect([total.sums_by_name(), recent.sums_by_name()]))

    def _asked(self, stage: str) -> bool:
        """Whether this rank was asked to stop, or has just time enough left for a piece of work and a checkpoint.
        Called before each piece: it is also the sign that the run gets on."""
        self._progress(stage)
        now = time.monotonic()
        # Twice the slowest so far: file systems have bad moments, and a lost checkpoint costs more than a short job.
        needed = 2 * (now - self.asked_at + self.checkpoint_seconds)
        self.asked_at = now
        return self.stop.due(now, needed)

    def _progress(self, stage: str) -> bool:
        """Tell the watchdog; false, so that it can stand where an evaluation asks whether to stop."""
        phase = "" if self.plan.done(self.position) else self.plan.phase(self.position).label
        self.watch.at(stage, phase, self.plan.global_epoch(self.position), self.position.step)
        return False

    def _started_up(self, first_window: float) -> None:
        """Say, and put on record, what the time until the first optimizer step went into."""
        self.startup["first_window"] = first_window
        parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in self.startup.items())
        log.info("first step after %.1f s: %s.", sum(self.startup.values()), parts)
        if self.here.main:
            self.run_dir.amend_start({"startup": {name: round(s, 3) for name, s in self.startup.items()}})

    def _whole(self, split: str) -> Loader:
        """The loader of a split that is evaluated."""
        return Loader(
            self.datasets[split],
            self.loader.micro_batch,
            self.loader.accumulation,
            self.here,
            workers=self.config.workers,
            limit_windows=self.config.limit_windows,
            max_size=self.loader.max_size,
            size_key=self.loader.size_key,
            like_sizes=self.loader.like_sizes,
        )

    def _bar(self, position: Position) -> Any:
        epoch = self.plan.global_epoch(position)
        label = f"epoch {epoch + 1}/{self.plan.epochs} {self.plan.phase(position).label}"
        total = self.loader.windows_per_epoch(epoch)
        done = total - len(self.loader.ends(epoch, position.sample))
        style = str(self.config.logging.progress) if self.here.main else "off"
        return progress.bar(self.loader.windows(epoch, position.sample), total, done, label, style)
