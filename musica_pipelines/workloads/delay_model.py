"""Train the best trial's parameters on all months but the held-out ones, and judge the model on those."""

import time

import numpy as np
import pandas as pd
import xgboost as xgb
from dagster_pipes import open_dagster_pipes
from matplotlib.figure import Figure

from flight_delays import evaluation, reporting, storage
from flight_delays.features import LABEL


def calibration_picture(label: pd.Series, probability: np.ndarray) -> Figure:
    """Draw the predicted against the observed share of late flights, in ten groups of equal size."""
    group = np.argsort(np.argsort(probability)) * 10 // len(probability)
    table = pd.DataFrame({"predicted": probability, "observed": label.to_numpy(), "group": group})
    points = table.groupby("group")[["predicted", "observed"]].mean()
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="perfect")
    axes.plot(points["predicted"], points["observed"], marker="o", label="model")
    limit = float(points.to_numpy().max()) * 1.1
    axes.set(
        xlim=(0, limit),
        ylim=(0, limit),
        xlabel="predicted chance to be late",
        ylabel="share that was late",
        title="Calibration on the held-out months",
    )
    axes.legend()
    return figure


def importance_picture(booster: xgb.Booster) -> Figure:
    """Draw the mean gain of the splits on each feature."""
    gain = pd.Series(booster.get_score(importance_type="gain")).sort_values()
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.barh(gain.index, gain.to_numpy())
    axes.set(xlabel="mean gain of a split", title="What the model looks at")
    return figure


def main() -> None:
    with open_dagster_pipes() as pipes:
        begun = time.monotonic()
        parameters, rounds = evaluation.read_best_trial()
        training = storage.read_features(evaluation.TRAINING_MONTHS + evaluation.VALIDATION_MONTHS)
        held_out = storage.read_features(evaluation.HELD_OUT_MONTHS)
        booster = xgb.train(parameters, evaluation.dmatrix(training), rounds)
        probability, metadata = evaluation.publish(pipes, "delay_model", booster, training, held_out)
        metadata |= {
            "seconds": round(time.monotonic() - begun, 2),
            "calibration": reporting.picture(calibration_picture(held_out[LABEL], probability), "calibration"),
            "importance": reporting.picture(importance_picture(booster), "importance"),
        }
        pipes.report_asset_materialization(metadata=metadata)


if __name__ == "__main__":
    main()
