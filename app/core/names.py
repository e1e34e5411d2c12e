"""Names that several processes must agree on."""

from __future__ import annotations

MODEL_DEPLOYMENT = "Model"
"""The deployment that makes a Serve application a model application."""
