"""Pure loss functions: tensors in, tensors out."""

from __future__ import annotations

from mvmr.losses.distance_correlation import distance_correlation, distance_covariance
from mvmr.losses.variance import invariance, variance_hinge

__all__ = ["distance_correlation", "distance_covariance", "invariance", "variance_hinge"]
