"""Hyperparameter and strategy sweeps over `cxr_models`: search, scheduling, tracking and reports."""
