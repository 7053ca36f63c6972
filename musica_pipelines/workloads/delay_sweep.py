"""Search hyperparameters of the delay model on Ray: one trial per GPU, or per CPU without GPUs.

Each finished trial is saved at once: a retry, after a preemption or a lost node, runs only the others. When the time
limit is near, no further trial begins.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from typing import Any

import ray
import xgboost as xgb
from dagster_pipes import PipesContext, open_dagster_pipes

from flight_delays import evaluation, reporting, storage
from flight_delays.features import LABEL

SEED = 2013
ROUNDS = 150
LOOK_SECONDS = 1.0
STOP_AFTER = 15
"""Rounds without a better AUC on the validation months."""


def sample_parameters(trials: int) -> list[dict[str, Any]]:
    """Draw the parameters of each trial at random, always the same ones: a sweep can be repeated."""
    draw = random.Random(SEED)
    return [
        {
            "max_depth": draw.randint(3, 9),
            "eta": round(10 ** draw.uniform(-1.3, -0.3), 4),
            "subsample": round(draw.uniform(0.6, 1.0), 2),
            "colsample_bytree": round(draw.uniform(0.5, 1.0), 2),
            "min_child_weight": draw.randint(1, 20),
        }
        for _ in range(trials)
    ]


def run_trial(parameters: dict[str, Any], training: Any, validation: Any, threads: int) -> dict[str, Any]:
    """Train once; return the AUC on the validation months, the time, the device and the parameters."""
    begun = time.monotonic()
    device = "cuda" if ray.get_gpu_ids() and evaluation.can_use("cuda") else "cpu"
    threads = min(threads, os.cpu_count() or 1)  # Ray counts the CPUs of the job; the node may have fewer
    booster = xgb.train(
        {**parameters, "objective": "binary:logistic", "eval_metric": "auc", "device": device, "nthread": threads},
        evaluation.dmatrix(training),
        num_boost_round=ROUNDS,
        evals=[(judged := evaluation.dmatrix(validation), "validation")],
        early_stopping_rounds=STOP_AFTER,
        verbose_eval=False,
    )
    score = booster.predict(judged, iteration_range=(0, booster.best_iteration + 1))
    return {
        "auc": round(evaluation.auc(validation[LABEL], score), 5),
        "rounds": booster.best_iteration + 1,
        "seconds": round(time.monotonic() - begun, 2),
        "device": device,
        "gpu": next(iter(ray.get_gpu_ids()), None),
        "host": socket.gethostname(),
        **parameters,
    }


def describe_devices(finished: list[dict[str, Any]]) -> str:
    """Return the devices on which the trials ran, and how many could not use their GPU."""
    devices = ", ".join(sorted({result["device"] for result in finished}))
    unused = sum(result["device"] == "cpu" and result["gpu"] is not None for result in finished)
    return f"{devices} ({unused} trial(s) had a GPU, but XGBoost could not use CUDA on it)" if unused else devices


class Trials:
    """The finished trials of one sweep, on disk: a repetition of the same sweep continues with them.

    Attributes:
        drawn: the parameters of each trial; the first has the number 1.
        finished: by number.
        resumed: how many were there from the beginning.
    """

    def __init__(self, drawn: list[dict[str, Any]]) -> None:
        self.drawn = drawn
        months = evaluation.TRAINING_MONTHS + evaluation.VALIDATION_MONTHS
        same = json.dumps([drawn, storage.features_version(months)])
        self._folder = storage.finished_trials(hashlib.sha256(same.encode()).hexdigest()[:12])
        found = [json.loads(path.read_text()) for path in self._folder.glob("trial-*.json")]
        self.finished = {result["trial"]: result for result in found}
        self.resumed = len(found)

    def add(self, result: dict[str, Any]) -> None:
        """Save a trial that has just finished."""
        path = self._folder / f"trial-{result['trial']}.json"
        storage.write_atomically(path, lambda part: part.write_text(json.dumps(result)))
        self.finished[result["trial"]] = result

    @property
    def ranked(self) -> list[dict[str, Any]]:
        """The finished trials, the best one first."""
        return sorted(self.finished.values(), key=lambda result: -result["auc"])

    def remove(self) -> None:
        """Remove the trials, when the results of the whole sweep are saved."""
        shutil.rmtree(self._folder)


def sweep(pipes: PipesContext, tables: tuple[Any, Any], trials: Trials) -> None:
    """Run all trials that are not finished yet; report and save each one when it ends.

    Raises:
        SystemExit: with exit code 75, which requests another attempt: the time limit is near.
    """
    warned = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: warned.set())
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    nodes, total = len(ray.nodes()), len(trials.drawn)  # type: ignore[no-untyped-call]
    threads = max(cpus // gpus, 1) if gpus else 1
    pipes.log.info(f"Ray: {nodes} node(s), {cpus} CPUs, {gpus} GPUs; {threads} thread(s) per trial")
    if trials.resumed:
        pipes.log.info(f"{trials.resumed} of {total} trials were finished by an earlier attempt")
    task = ray.remote(num_cpus=threads, num_gpus=1 if gpus else 0, scheduling_strategy="SPREAD")(run_trial)
    training, validation = (ray.put(table) for table in tables)
    running = {
        task.remote(parameters, training, validation, threads): number
        for number, parameters in enumerate(trials.drawn, 1)
        if number not in trials.finished
    }
    while running:
        done, _ = ray.wait(list(running), timeout=LOOK_SECONDS)
        for reference in done:
            result = {"trial": running.pop(reference), **ray.get(reference)}
            trials.add(result)
            pipes.log.info(
                f"trial {result['trial']} ({len(trials.finished)} of {total}): "
                f"AUC {result['auc']:.4f}, {result['seconds']} s on {result['host']}"
            )
            pipes.report_custom_message({"trial": result})
        if warned.is_set() and running:
            pipes.log.warning(f"the time limit is near: {len(running)} trial(s) are left for another attempt")
            raise SystemExit(os.EX_TEMPFAIL)


def main() -> None:
    with open_dagster_pipes() as pipes:
        begun = time.monotonic()
        training = storage.read_features(evaluation.TRAINING_MONTHS)
        validation = storage.read_features(evaluation.VALIDATION_MONTHS)
        trials = Trials(sample_parameters(int(pipes.get_extra("trials"))))
        ray.init(log_to_driver=False)
        try:
            sweep(pipes, (training, validation), trials)
        finally:
            ray.shutdown()
        finished = trials.ranked
        best, baseline = finished[0], evaluation.baseline_auc(training, validation)
        storage.write_atomically(storage.trials_file(), lambda part: part.write_text(json.dumps(finished, indent=1)))
        trials.remove()
        pipes.report_asset_check(
            "better_than_baseline",
            passed=best["auc"] > baseline,
            metadata={"auc": best["auc"], "baseline_auc": baseline, "baseline": evaluation.BASELINE},
        )
        metadata = {
            "trials": len(finished),
            "best_auc": best["auc"],
            "baseline_auc": round(baseline, 5),
            "trials_resumed": trials.resumed,
            "device": describe_devices(finished),
            "nodes": len({result["host"] for result in finished}),
            "rows": len(training) + len(validation),
            "seconds": round(time.monotonic() - begun, 2),
            "trial_seconds": round(sum(result["seconds"] for result in finished), 2),
            "results": reporting.table(finished),
        }
        pipes.report_asset_materialization(metadata=metadata)


if __name__ == "__main__":
    main()
