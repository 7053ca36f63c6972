"""Which months train, choose and judge the model, and how it is judged."""

import numpy as np
import pandas as pd
import xgboost as xgb

from . import source
from .features import FEATURES, LABEL

TRAINING_MONTHS = [f"{source.YEAR}-{month:02d}" for month in range(1, 9)]
VALIDATION_MONTHS = [f"{source.YEAR}-{month:02d}" for month in (9, 10)]
"""The sweep chooses on these."""
HELD_OUT_MONTHS = [f"{source.YEAR}-{month:02d}" for month in (11, 12)]
"""The model is judged on these; nothing before has seen them."""

BASELINE = "late rate by hour of departure in the training months"


def dmatrix(table: pd.DataFrame) -> xgb.DMatrix:
    """Features and label in XGBoost's own form."""
    return xgb.DMatrix(table[list(FEATURES)], label=table[LABEL])


def auc(label: pd.Series, score: "pd.Series | np.ndarray") -> float:
    """Area under the ROC curve: the chance that a late flight scores higher than one in time (ties count half)."""
    late = label.to_numpy(dtype=bool)
    ranks = pd.Series(np.asarray(score)).rank().to_numpy()
    n_late, n_rest = int(late.sum()), int((~late).sum())
    return float((ranks[late].sum() - n_late * (n_late + 1) / 2) / (n_late * n_rest))


def baseline_auc(training: pd.DataFrame, judged: pd.DataFrame) -> float:
    """The AUC of BASELINE: what a model has to beat."""
    rate = training.groupby(training["departure_minute"] // 60)[LABEL].mean()
    return auc(judged[LABEL], (judged["departure_minute"] // 60).map(rate).fillna(training[LABEL].mean()))
