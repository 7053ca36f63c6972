"""Train a forest with all ranks: the best trial's parameters, but several trees per round, which see parts of the data.

SrunLauncher starts this program once per GPU. All ranks train one model together; rank 0 judges and reports it.
"""

import time

import pandas as pd
import xgboost as xgb
from dagster_pipes import PipesContext, open_dagster_pipes
from xgboost import collective

from flight_delays import evaluation, ranks, storage

ROUNDS = 40
FOREST = {"num_parallel_tree": 4, "subsample": 0.5, "colsample_bynode": 0.5}
"""Each round adds four trees; each of these sees half of the flights, and at each split half of the features."""


def train(pipes: PipesContext, device: str, training: pd.DataFrame, held_out: pd.DataFrame) -> xgb.Booster:
    """Train with all ranks, each with its share of the flights; each of them gets the whole model."""
    share = slice(collective.get_rank(), None, collective.get_world_size())
    own, judged = evaluation.dmatrix(training.iloc[share]), evaluation.dmatrix(held_out.iloc[share])
    print(f"{own.num_row()} flights on {device}")
    parameters, _ = evaluation.read_best_trial()
    return xgb.train(
        {**parameters, **FOREST, "eval_metric": "logloss", "device": device},
        own,
        ROUNDS,
        evals=[(own, "training"), (judged, "held_out")],
        callbacks=[xgb.callback.EvaluationMonitor(period=10, logger=lambda text: pipes.log.info(text.strip()))],
        verbose_eval=False,
    )


def main() -> None:
    with open_dagster_pipes() as pipes:
        begun = time.monotonic()
        training = storage.read_features(evaluation.TRAINING_MONTHS + evaluation.VALIDATION_MONTHS)
        held_out = storage.read_features(evaluation.HELD_OUT_MONTHS)
        with ranks.joined() as device:
            rank, count = collective.get_rank(), collective.get_world_size()
            booster = train(pipes, device, training, held_out)
        if rank == 0:  # the others are done
            _, metadata = evaluation.publish(pipes, "delay_forest", booster, training, held_out)
            metadata |= {"trees": ROUNDS * FOREST["num_parallel_tree"], "ranks": count}
            metadata |= {"device": device.partition(":")[0], "seconds": round(time.monotonic() - begun, 2)}
            pipes.report_asset_materialization(metadata=metadata)


if __name__ == "__main__":
    main()
