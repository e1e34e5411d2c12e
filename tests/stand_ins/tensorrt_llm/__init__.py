"""Stands in for TensorRT-LLM where there is no GPU: its command line, in front of the simulated
engine in its dialect. For tests of the adapter only; put ``tests/stand_ins`` and
``deployments/engines/inside`` on PYTHONPATH."""
