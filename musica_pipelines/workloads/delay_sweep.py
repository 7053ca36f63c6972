"""Search hyperparameters of the delay model on Ray: one trial a GPU where there are GPUs, else one a CPU."""

import json
import random
import time
from typing import Any

import ray
import xgboost as xgb
from dagster_pipes import PipesContext, open_dagster_pipes

from flight_delays import evaluation, reporting, storage
from flight_delays.features import LABEL

SEED = 2013
ROUNDS = 150
STOP_AFTER = 15
"""Rounds without a better AUC on the validation months."""


def sample_parameters(trials: int) -> list[dict[str, Any]]:
    """The same random draws for the same number of trials, so that a sweep can be repeated."""
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


def usable_device() -> str:
    """`cuda` where Ray gave this task a GPU and XGBoost can use it, else `cpu`."""
    if not ray.get_gpu_ids():
        return "cpu"
    try:
        xgb.train({"device": "cuda"}, xgb.DMatrix([[0.0], [1.0]], label=[0, 1]), num_boost_round=1)
    except xgb.core.XGBoostError:
        return "cpu"
    return "cuda"


def run_trial(parameters: dict[str, Any], training: Any, validation: Any, threads: int) -> dict[str, Any]:
    """Train once; the AUC on the validation months, with what it took."""
    begun = time.monotonic()
    device = usable_device()
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
        **parameters,
    }


def sweep(pipes: PipesContext, training: Any, validation: Any, trials: int) -> list[dict[str, Any]]:
    """All trials, best first; each is told as it ends."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    nodes = len(ray.nodes())  # type: ignore[no-untyped-call]
    threads = max(cpus // gpus, 1) if gpus else 1
    pipes.log.info(f"Ray: {nodes} node(s), {cpus} CPUs, {gpus} GPUs; {threads} thread(s) a trial")
    task = ray.remote(num_cpus=threads, num_gpus=1 if gpus else 0)(run_trial)
    tables = ray.put(training), ray.put(validation)
    running = {
        task.remote(parameters, *tables, threads): n for n, parameters in enumerate(sample_parameters(trials), 1)
    }
    finished: list[dict[str, Any]] = []
    while running:
        done, _ = ray.wait(list(running))
        result = {"trial": running.pop(done[0]), **ray.get(done[0])}
        finished.append(result)
        pipes.log.info(
            f"trial {result['trial']} ({len(finished)} of {trials}): AUC {result['auc']:.4f}, {result['seconds']} s"
        )
        pipes.report_custom_message({"trial": result})
    return sorted(finished, key=lambda result: -result["auc"])


def main() -> None:
    with open_dagster_pipes() as pipes:
        begun = time.monotonic()
        training = storage.read_features(evaluation.TRAINING_MONTHS)
        validation = storage.read_features(evaluation.VALIDATION_MONTHS)
        ray.init(log_to_driver=False)
        try:
            finished = sweep(pipes, training, validation, int(pipes.get_extra("trials")))
        finally:
            ray.shutdown()
        best, baseline = finished[0], evaluation.baseline_auc(training, validation)
        storage.write_atomically(storage.trials_file(), lambda part: part.write_text(json.dumps(finished, indent=1)))
        pipes.report_asset_check(
            "better_than_baseline",
            passed=best["auc"] > baseline,
            metadata={"auc": best["auc"], "baseline_auc": baseline, "baseline": evaluation.BASELINE},
        )
        metadata = {
            "trials": len(finished),
            "best_auc": best["auc"],
            "baseline_auc": round(baseline, 5),
            "device": ", ".join(sorted({result["device"] for result in finished})),
            "rows": len(training) + len(validation),
            "seconds": round(time.monotonic() - begun, 2),
            "trial_seconds": round(sum(result["seconds"] for result in finished), 2),
            "results": reporting.table(finished),
        }
        pipes.report_asset_materialization(metadata=metadata)


if __name__ == "__main__":
    main()
