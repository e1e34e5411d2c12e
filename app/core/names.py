"""Names that several processes must agree on."""

from __future__ import annotations

MODEL_DEPLOYMENT = "Model"
"""The deployment that makes a Serve application a model application."""

OWNER_MARK = "FRONTLINE_OWNER"
"""Environment variable of every process of an engine; its value names the owner. The reaper, which
imports nothing of this project, repeats the name."""
