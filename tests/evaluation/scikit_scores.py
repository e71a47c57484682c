"""What scikit-learn's logistic regressions say of several classes an image."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression


def scikit_scores(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, l2: float) -> np.ndarray:
    """[M, C] of one logistic regression a class on features standardised over all training images."""
    x, x_test = x.astype(np.float64), x_test.astype(np.float64)
    mean, deviation = x.mean(0), x.std(0)
    deviation[deviation == 0] = np.inf
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    columns = []
    for of_class in y.T:
        known = of_class >= 0
        model = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000, solver="newton-cholesky")
        columns.append(model.fit(x[known], of_class[known]).decision_function(x_test))
    return np.stack(columns, axis=1)
