"""Which months train, choose and judge the model, on which device, and how it is judged."""

import json
from typing import Any

import numpy as np
import pandas as pd
import xgboost as xgb
from dagster_pipes import PipesContext

from . import source, storage
from .features import FEATURES, LABEL

TRAINING_MONTHS = [f"{source.YEAR}-{month:02d}" for month in range(1, 9)]
VALIDATION_MONTHS = [f"{source.YEAR}-{month:02d}" for month in (9, 10)]
"""The sweep chooses on these."""
HELD_OUT_MONTHS = [f"{source.YEAR}-{month:02d}" for month in (11, 12)]
"""The model is judged on these; nothing before has seen them."""

HYPERPARAMETERS = ("max_depth", "eta", "subsample", "colsample_bytree", "min_child_weight")
BASELINE = "late rate by hour of departure in the training months"


def dmatrix(table: pd.DataFrame) -> xgb.DMatrix:
    """Return features and label as XGBoost reads them."""
    return xgb.DMatrix(table[list(FEATURES)], label=table[LABEL])


def can_use(device: str) -> bool:
    """Return whether XGBoost can train on this GPU: `cuda`, or `cuda:2` for one of several."""
    try:
        with xgb.config_context(verbosity=0):
            booster = xgb.train({"device": device}, xgb.DMatrix([[0.0], [1.0]], label=[0, 1]), num_boost_round=1)
    except xgb.core.XGBoostError:
        return False
    # Without a GPU, XGBoost may continue on the CPU without an error.
    used: str = json.loads(booster.save_config())["learner"]["generic_param"]["device"]
    return used.startswith("cuda")


def read_best_trial() -> tuple[dict[str, Any], int]:
    """Return the parameters and the number of rounds of the best trial of the newest sweep."""
    path = storage.trials_file()
    if not path.exists():
        raise SystemExit(f"{path} does not exist: materialise delay_sweep first")
    best = json.loads(path.read_text())[0]
    return {"objective": "binary:logistic", **{name: best[name] for name in HYPERPARAMETERS}}, best["rounds"]


def auc(label: pd.Series, score: "pd.Series | np.ndarray") -> float:
    """Return the area under the ROC curve: the chance that a late flight scores higher than one in time."""
    late = label.to_numpy(dtype=bool)
    ranks = pd.Series(np.asarray(score)).rank().to_numpy()
    n_late, n_rest = int(late.sum()), int((~late).sum())
    return float((ranks[late].sum() - n_late * (n_late + 1) / 2) / (n_late * n_rest))


def baseline_auc(training: pd.DataFrame, judged: pd.DataFrame) -> float:
    """Return the AUC of BASELINE, which a model has to beat."""
    rate = training.groupby(training["departure_minute"] // 60)[LABEL].mean()
    return auc(judged[LABEL], (judged["departure_minute"] // 60).map(rate).fillna(training[LABEL].mean()))


def publish(
    pipes: PipesContext, asset: str, booster: xgb.Booster, training: pd.DataFrame, held_out: pd.DataFrame
) -> tuple[np.ndarray, dict[str, Any]]:
    """Save the model of an asset and report its check; the predictions for the held-out flights, and metadata."""
    path = storage.model_file(asset)  # `pipes.asset_key` is known only in a run of Dagster
    storage.write_atomically(path, lambda part: part.write_bytes(booster.save_raw("ubj")))
    probability = booster.predict(dmatrix(held_out))
    found, baseline = auc(held_out[LABEL], probability), baseline_auc(training, held_out)
    pipes.log.info(
        f"AUC {found:.4f} on {len(held_out)} held-out flights (baseline {baseline:.4f}) -> {storage.name(path)}"
    )
    pipes.report_asset_check(
        "better_than_baseline",
        passed=found > baseline,
        metadata={"auc": found, "baseline_auc": baseline, "baseline": BASELINE},
    )
    return probability, {
        "auc": round(found, 5),
        "baseline_auc": round(baseline, 5),
        "rows": len(training),
        "held_out_rows": len(held_out),
        "model": {"type": "path", "raw_value": str(path)},
    }
