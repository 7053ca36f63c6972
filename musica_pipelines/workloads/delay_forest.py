"""Train the best trial's parameters as a boosted forest, with all ranks: each reads its share of the flights.

SrunLauncher starts this program once per GPU. All ranks train one model together; rank 0 judges and reports it.
"""

import time
from typing import Any

import xgboost as xgb
from dagster_pipes import PipesContext, open_dagster_pipes
from matplotlib.figure import Figure

from flight_delays import evaluation, ranks, reporting, storage
from flight_delays.features import LABEL

ROUNDS = 40
FOREST = {"num_parallel_tree": 4, "subsample": 0.5, "colsample_bynode": 0.5}
"""Each round adds four trees; each of these sees half of the flights, and at each split half of the features."""
Losses = dict[str, dict[str, list[float]]]
"""By name of the data and of the metric, one number per round."""
SHOW_ROUNDS = 10
"""A line in the log each time so many rounds are done."""


class Progress(xgb.callback.TrainingCallback):
    """Logs how well the model fits; in other ranks than 0, `pipes.log` does nothing."""

    def __init__(self, pipes: PipesContext) -> None:
        self._pipes = pipes

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:  # noqa: ARG002
        """XGBoost calls this after each round; True would end the training."""
        losses = ", ".join(f"{name} {values['logloss'][-1]:.4f}" for name, values in evals_log.items())
        if (epoch + 1) % SHOW_ROUNDS == 0:
            self._pipes.log.info(f"round {epoch + 1}: log loss {losses}")
        return False


def train(pipes: PipesContext, rank: ranks.Rank) -> tuple[xgb.Booster, Losses]:
    """Train with all ranks; every rank gets the same model and the same losses."""
    parameters, _ = evaluation.read_best_trial()
    months = evaluation.TRAINING_MONTHS + evaluation.VALIDATION_MONTHS
    share = slice(rank.number, None, rank.count)
    training = evaluation.dmatrix(storage.read_features(months).iloc[share])
    held_out = evaluation.dmatrix(storage.read_features(evaluation.HELD_OUT_MONTHS).iloc[share])
    print(f"{training.num_row()} flights on {rank.device}")
    losses: Losses = {}
    booster = xgb.train(
        {**parameters, **FOREST, "eval_metric": "logloss", "device": rank.device},
        training,
        ROUNDS,
        evals=[(training, "training"), (held_out, "held_out")],
        evals_result=losses,
        callbacks=[Progress(pipes)],
        verbose_eval=False,
    )
    return booster, losses


def loss_picture(losses: Losses) -> Figure:
    """The log loss after each round."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in losses.items():
        axes.plot(range(1, len(values["logloss"]) + 1), values["logloss"], label=name)
    axes.set(xlabel="round", ylabel="log loss", title="Training of the forest")
    axes.legend()
    return figure


def report(pipes: PipesContext, booster: xgb.Booster, losses: Losses) -> dict[str, Any]:
    """Judge the model on the held-out months, keep it, and report its check; return what to show."""
    training = storage.read_features(evaluation.TRAINING_MONTHS + evaluation.VALIDATION_MONTHS)
    held_out = storage.read_features(evaluation.HELD_OUT_MONTHS)
    auc = evaluation.auc(held_out[LABEL], booster.predict(evaluation.dmatrix(held_out)))
    baseline = evaluation.baseline_auc(training, held_out)
    path = storage.forest_file()
    storage.write_atomically(path, lambda part: part.write_bytes(booster.save_raw("ubj")))
    pipes.log.info(f"AUC {auc:.4f} on {len(held_out)} held-out flights -> {storage.name(path)}")
    pipes.report_asset_check(
        "better_than_baseline",
        passed=auc > baseline,
        metadata={"auc": auc, "baseline_auc": baseline, "baseline": evaluation.BASELINE},
    )
    return {
        "auc": round(auc, 5),
        "baseline_auc": round(baseline, 5),
        "rows": len(training),
        "held_out_rows": len(held_out),
        "trees": ROUNDS * FOREST["num_parallel_tree"],
        "model": {"type": "path", "raw_value": str(path)},
        "loss": reporting.picture(loss_picture(losses), "loss"),
    }


def main() -> None:
    with open_dagster_pipes() as pipes:
        begun = time.monotonic()
        with ranks.joined() as rank:
            booster, losses = train(pipes, rank)
        if rank.number == 0:  # the other ranks have done their part
            metadata = report(pipes, booster, losses)
            metadata |= {"ranks": rank.count, "device": rank.device.partition(":")[0]}
            metadata["seconds"] = round(time.monotonic() - begun, 2)
            pipes.report_asset_materialization(metadata=metadata)


if __name__ == "__main__":
    main()
